"""Measure every view of ViTs at realistic sizes: whether it works, its time and its memory.

    python benchmarks/views.py --keep                       all views of all models
    python benchmarks/views.py --keep --code DIR --as NAME  the same with the code of a different checkout
    python benchmarks/views.py --models vit_nano --views rollout relevance

Each view runs in its own process, on one photograph (Linux only). Weights are random unless a file is available: they
affect neither time nor memory. Memory is the peak of the process during the call (VmHWM) minus its memory before the
call. Seconds are the processor time of one call, including its drawing, on one thread. A view that takes longer than
LIMIT seconds is stopped. An InputError counts as refused; any other error, or a map that is not finite, is a defect.
"""

import argparse
import importlib
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).parent
PHOTO = HERE.parent / "vit_bridge" / "data" / "samples" / "astronaut.jpg"
DINO = HERE.parents[1] / "shared" / "weights" / "dinov2_vits14_focus.safetensors"  # optional
LIMIT = 120  # seconds of processor time


# ---- The models: key -> (what it is, a function that builds it) -------------------------------------------


def _nano():
    return _of("vit_bridge.weights.checkpoints").load("vit_nano_shapes")


def _timm(name, **options):
    return _of("timm").create_model(name, pretrained=False, **options)


def _small_14():
    """Build a ViT-S/14 and add a random head of ten classes, so that views of a class can be measured."""
    model = _of("vit_bridge.weights.checkpoints").load(DINO) if DINO.exists() else _timm("vit_small_patch14_dinov2")
    model.head = _of("torch").nn.Linear(384, 10)
    return model


def _large():
    return _of("vit_model").create_vit_large(img_size=384)


MODELS = {
    "vit_nano": ("ours, nano at 32: 65 tokens", _nano),
    "vit_base_16": ("timm ViT-B/16 at 224: 197 tokens", lambda: _timm("vit_base_patch16_224")),
    "vit_small_14": ("ours, ViT-S/14 at 518, a random head: 1,370 tokens", _small_14),
    "vit_large_16": ("ours, ViT-L/16 at 384: 577 tokens", _large),
    "deit_base_distilled": ("timm DeiT-B distilled at 224: 198 tokens",
                            lambda: _timm("deit_base_distilled_patch16_224")),
    "dinov2_small_registers": ("timm DINOv2-S with registers at 518: 1,374 tokens",
                               lambda: _timm("vit_small_patch14_reg4_dinov2")),
}


# ---- The views, each a function of AttentionVisualizer, model, images and a folder ------------------------


def _deletion(views, model, photo, images, folder):
    explanations, torch = _of("vit_bridge.analysis.explanations"), _of("torch")
    saliency = torch.rand(1, *views.adapter.grid(images), generator=torch.Generator().manual_seed(0))
    return explanations.deletion_insertion(model, images, saliency, torch.tensor([0]), n_steps=4)


def _page(views, model, photo, images, folder):
    views.explore([photo], save_path=str(folder / "page.html"))
    return (folder / "page.html").stat().st_size


def _figure(name, *options, **more):
    return lambda views, model, photo, images, folder: getattr(views, name)(photo, *options, **more)


def _figure_of(name, given=lambda model, photo, images: (model,)):
    return lambda views, model, photo, images, folder: getattr(_of("visualizations"), name)(
        *given(model, photo, images))


VIEWS = {
    "whole maps": _figure("attention_maps"),
    "attention": _figure("visualize_attention"),
    "all heads": _figure("visualize_all_heads"),
    "all layers": _figure("visualize_all_layers"),
    "rollout": _figure("visualize_rollout"),
    "relevance": _figure("visualize_relevance"),
    "Grad-CAM": _figure("visualize_grad_cam"),
    "logit lens": _figure("visualize_logit_lens"),
    "token norms": _figure("visualize_token_norms"),
    "attention distance": lambda views, model, photo, images, folder: views.visualize_attention_distance([photo]),
    "feature colours": _figure_of("visualize_features", lambda model, photo, images: (model, [photo])),
    "positions": _figure_of("visualize_positions"),
    "filters": _figure_of("visualize_patch_filters"),
    "receptive field": lambda views, model, photo, images, folder: _of("visualizations").compare_receptive_fields(
        None, {"ViT": model}, images),
    "deletion and insertion, 4 steps": _deletion,
    "all explanations, 2 steps, 1 draw": _figure("visualize_explanations", n_steps=2, n_draws=1),
    "selfcheck": lambda views, model, photo, images, folder: views.selfcheck([photo]),
    "explorer": _page,
}


# ---- One view in its own process --------------------------------------------------------------------------


def _of(module):
    return importlib.import_module(module)


def _memory(name):
    """Read VmRSS or VmHWM of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def look(model, view):
    """Measure one view of one model in this process."""
    model, photo = MODELS[model][1]().eval(), str(PHOTO)
    visualizations, images = _of("visualizations"), _of("vit_bridge.data.images")
    views = visualizations.AttentionVisualizer(model, device="cpu")
    pixels, _ = images.prepare_image(photo, model)
    visualizations.plot_images([photo]).savefig(io.BytesIO())  # loads fonts and libraries before the measurement
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    held, start, result = _memory("VmRSS"), time.process_time(), {}
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(start) + LIMIT, resource.RLIM_INFINITY))
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = VIEWS[view](views, model, photo, pixels, Path(folder))
            if hasattr(made, "savefig"):
                made.savefig(io.BytesIO())
        result["status"] = "ok" if _finite(made) else "defect: not finite"
        if isinstance(made, int):
            result["bytes"] = made
        if isinstance(made, list) and any(check.holds is False for check in made):
            result["status"] = "defect: " + next(check.name for check in made if check.holds is False)
    except _of("vit_bridge.errors").InputError as error:
        result["status"] = f"refused: {error}"
    except Exception as error:
        result["status"] = f"defect: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return dict(result, seconds=time.process_time() - start, mebibytes=_memory("VmHWM") - held)


def _finite(made):
    torch = _of("torch")
    parts = made if isinstance(made, tuple) else (made,)
    return all(part.isfinite().all() for part in parts if isinstance(part, torch.Tensor))


def measure(model, view, code):
    """Measure one view of one model in its own process, with the code in a folder."""
    command = [sys.executable, __file__, "--one", model, view, "--code", str(code)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=code)
    if done.returncode == -signal.SIGXCPU:
        return dict(status=f"over {LIMIT} s", seconds=None, mebibytes=None)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return dict(status=f"defect: ended with {done.returncode}: {last}", seconds=None, mebibytes=None)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=list(VIEWS))
    parser.add_argument("--code", type=Path, default=HERE.parent, help="a checkout of the project (default: this one)")
    parser.add_argument("--as", dest="name", default="now", help="its name in the table (default: %(default)s)")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "VIEW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(options.code), str(HERE)]
    if options.one:
        warnings.simplefilter("ignore")
        print(json.dumps(look(*options.one)))
        return
    write_cell = _of("results").write_cell
    for model in options.models:
        found = {}
        for view in options.views:
            found[view] = one = measure(model, view, options.code)
            figures = "" if one["seconds"] is None else f"{one['seconds']:.1f} s, {one['mebibytes']:.0f} MiB, "
            print(f"{model}, {view}: {figures}{one['status']}", flush=True)
        if options.keep:
            code = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=options.code, capture_output=True,
                                  text=True)
            write_cell("views", f"{model}-{options.name}", 0, command_of(model, options),
                       dict(model=model, what=MODELS[model][0], name=options.name, code=code.stdout.strip(),
                            views=found, device="cpu"))


def command_of(model, options):
    """Return the command that repeats a cell."""
    return f"python benchmarks/views.py --keep --models {model}" + (
        f" --code {options.code} --as {options.name}" * (options.name != "now")) + (
        " --views " + " ".join(f"'{view}'" for view in options.views)) * (options.views != list(VIEWS))


if __name__ == "__main__":
    main()
