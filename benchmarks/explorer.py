"""Measure the explorer's page against the number of tokens: size, loading time, hover time and error.

    python benchmarks/explorer.py --keep [--weights FILE]     results/explorer-*.json (about two minutes)

The page shows one photograph at 8 x 8 to 37 x 37 patches, in a random ViT-S/16 and, with --weights, in a pretrained
ViT-S/14, and is opened in Chromium. The hover time is the time from choosing a different patch until the next frame is
drawn, as a median of 15. The error compares twenty random rows of attention, as the page computes them, with the
model's own softmax.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import HERE, write_cell

from vit_bridge.analysis.capture import capture
from vit_bridge.data.images import prepare_image
from vit_bridge.plots.explorer import explore
from vit_bridge.preprocessing import Whole
from vit_bridge.weights.checkpoints import load
from vit_model import create_vit_small

SIDES = (8, 14, 24, 37)
PHOTO = HERE.parent / "vit_bridge" / "data" / "samples" / "astronaut.jpg"
VIEWS = {"from": dict(direction="from", head=0), "to": dict(direction="to", head=0),
         "mean": dict(direction="from", head=-1)}
HOVER = """async part => {
  change(part);
  const times = [], n = imageOf(main).rows * imageOf(main).columns;
  for (let i = 0; i < 15; i++) {
    await new Promise(done => setTimeout(done, 50));
    const start = performance.now();
    change({patch: (i * 37 + 5) % n});
    await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
    times.push(performance.now() - start);
  }
  return times;
}"""
ROW = """([layer, head, token]) => {
  const part = imageOf(main).attention[layer], out = new Float64Array(part.n);
  addAttention(part, head, token, 1, false, out);
  return [...out];
}"""


def measure(model, side, browser):
    """Measure the page of one model at side x side patches."""
    model.any_size = True
    whole = Whole(img_size=side * model.config.patch_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        started = time.perf_counter()
        made = explore(model, PHOTO, path, whole=whole)
        seconds = time.perf_counter() - started
        page = browser.new_page(viewport=dict(width=1280, height=900))
        started = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-state=ready]")
        load_seconds = time.perf_counter() - started
        hover = {name: statistics.median(page.evaluate(HOVER, part)) for name, part in VIEWS.items()}
        drawn = np.random.default_rng(0)
        rows = [[int(drawn.integers(n)) for n in (model.config.depth, model.config.n_heads, side**2 + 1)]
                for _ in range(20)]
        own = capture(model, prepare_image(PHOTO, model, whole)[0], keep=lambda block, attended: {
            (head, token): attended.maps[0, head, token].numpy() for layer, head, token in rows if layer == block}).maps
        errors = [(np.abs(np.array(page.evaluate(ROW, row)) - own[row[0]][row[1], row[2]]).max(),
                   own[row[0]][row[1], row[2]].max()) for row in rows]
        page.close()
    return dict(tokens=side**2 + 1, bits=made.bits, bytes=len(made.html.encode()), seconds=seconds,
                load_seconds=load_seconds, hover_ms=hover, row_error=float(max(error for error, _ in errors)),
                row_error_relative=float(max(error / most for error, most in errors)),
                weight_error=made.weight_error, relative_error=made.quantisation_error)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--weights", help="a file with a ViT-S/14")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    models = {"ViT-S/16, random": create_vit_small(n_classes=1000).eval()}
    if options.weights:
        models["ViT-S/14, " + Path(options.weights).stem] = load(options.weights)
    command = "python benchmarks/explorer.py --keep" + " --weights FILE" * bool(options.weights)
    with sync_playwright() as started:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, model in models.items():
            rows = []
            for side in SIDES:
                rows.append(measure(model, side, browser))
                print(name, rows[-1], flush=True)
            if options.keep:
                slug = name.split(",")[0].lower().replace("/", "-")
                write_cell("explorer", slug, 0, command, dict(model=name, rows=rows, device="cpu"))
        browser.close()


if __name__ == "__main__":
    main()
