"""Measure time and memory of fused and explicit attention against the number of tokens.

    python benchmarks/growth.py --keep        writes results/growth-*.json and figures/growth.png

The model has four blocks of ViT-Tiny (D = 192, 3 heads) and reads one image of N = 64 to 4,096 patches, with
pool="mean", so that the last block computes every token. For each N the two kinds of attention take turns, in inference
and in training (forward and backward); the median over the rounds is kept. Memory is measured with
analysis.cost.peak_memory.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import HERE, write_cell

import vit_model
from vit_bridge.analysis.cost import peak_memory
from vit_bridge.plots.charts import BLUE, GREEN, ORANGE, finish, new_figure
from vit_bridge.runtime import choose_device

GRIDS = (8, 11, 16, 23, 32, 45, 64)
D, DEPTH = 192, 4
EXPLICIT = vit_model.attend


def attend_fused(q, k, v, return_attention=False):
    return F.scaled_dot_product_attention(q, k, v), None


def attend_explicit(q, k, v, return_attention=False):
    heads, _ = EXPLICIT(q, k, v, return_attention=True)
    return heads, None


PATHS = {"fused": attend_fused, "explicit": attend_explicit}


@contextmanager
def attention_path(name):
    kept, vit_model.attend = vit_model.attend, PATHS[name]
    try:
        yield
    finally:
        vit_model.attend = kept


def multiplications(n_tokens):
    """Count the multiplications of the blocks: each has 12 N D^2 in dense layers and 2 N^2 D in attention."""
    return DEPTH * (12 * n_tokens * D**2 + 2 * n_tokens**2 * D)


def seconds_of(model, images, train):
    start = time.perf_counter()
    if train:
        model(images).square().sum().backward()
        model.zero_grad()
    else:
        with torch.inference_mode():
            model(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start


def measure(grid, n_rounds, device):
    """Return two dicts for one size: {(path, train): seconds} and {(path, train): bytes}."""
    torch.manual_seed(0)
    model = vit_model.VisionTransformer(4 * grid, 4, 3, 10, D, DEPTH, 3, pool="mean", position="none").to(device)
    images = torch.rand(1, 3, 4 * grid, 4 * grid, device=device)
    times, memory = defaultdict(list), {}
    for train in (False, True):
        model.train(train)
        for path in PATHS:
            with attention_path(path):
                memory[path, train] = peak_memory(model, images, train)
        for _ in range(n_rounds):
            for path in PATHS:
                with attention_path(path):
                    times[path, train].append(seconds_of(model, images, train))
    return {key: statistics.median(values) for key, values in times.items()}, memory


def exponent(sizes, values):
    """Fit the slope of log values over log sizes, by least squares over the upper half of the sizes."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def draw(result, save_path=None):
    """Draw time (left) and memory (right) against the number of tokens.

    The number of multiplications is drawn with the times, scaled to fused inference at the largest size.
    """
    figure = new_figure(12.5, 5.4)
    sizes = result["tokens"]
    for axes, unit, scale in zip(figure.subplots(1, 2), ("seconds", "bytes"), (1e3, 2**-20), strict=True):
        for curve in result["curves"]:
            values = np.array(curve[unit]) * scale
            colour = BLUE if curve["path"] == "fused" else ORANGE
            label = f"{curve['path']}, {'training' if curve['train'] else 'inference'}"
            axes.plot(sizes, values, color=colour, marker="s" if curve["train"] else "o", linewidth=2,
                      linestyle="--" if curve["train"] else "-", label=f"{label}: N^{curve[unit + '_exponent']:.2f}")
        axes.set(xscale="log", yscale="log", xlabel="tokens N")
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=9)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time_axes, memory_axes = figure.axes
    fused = next(c for c in result["curves"] if c["path"] == "fused" and not c["train"])
    counted = np.array(result["multiplications"], dtype=float)
    time_axes.plot(sizes, counted * fused["seconds"][-1] * 1e3 / counted[-1], color=GREEN, linestyle=":", linewidth=2.5,
                   label=f"12 N D² + 2 N² D, scaled: N^{result['multiplications_exponent']:.2f}")
    time_axes.set(ylabel="milliseconds per pass", title="Time")
    memory_axes.set(ylabel="MiB beyond weights and image", title="Peak memory")
    for axes in (time_axes, memory_axes):
        axes.legend(fontsize=10, title="slope over the upper half")
    figure.suptitle(f"Four blocks of ViT-Tiny, one image, float32, {result['device']}", fontsize=14)
    return finish(figure, save_path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--grids", type=int, nargs="+", default=GRIDS, help="numbers of patches along a side")
    parser.add_argument("--keep", action="store_true", help="write the result and the figure")
    options = parser.parse_args()
    device = choose_device(options.device)
    columns = defaultdict(lambda: ([], []))
    for grid in options.grids:
        times, memory = measure(grid, options.rounds, device)
        for key in times:
            columns[key][0].append(times[key])
            columns[key][1].append(memory[key])
        print(f"{grid * grid:5d} tokens  " + "  ".join(
            f"{path} {'training' if train else 'inference'} {1e3 * times[path, train]:.1f} ms "
            f"{memory[path, train] / 2**20:.1f} MiB" for path, train in times), flush=True)
    tokens = [grid * grid for grid in options.grids]
    counted = [multiplications(n) for n in tokens]
    result = dict(device=device.type, tokens=tokens, multiplications=counted,
                  multiplications_exponent=exponent(tokens, counted), rounds=options.rounds,
                  curves=[dict(path=path, train=train, seconds=seconds, bytes=held,
                               seconds_exponent=exponent(tokens, seconds), bytes_exponent=exponent(tokens, held))
                          for (path, train), (seconds, held) in columns.items()])
    for curve in result["curves"]:
        print(f"{curve['path']} {'training' if curve['train'] else 'inference'}: time "
              f"N^{curve['seconds_exponent']:.2f}, memory N^{curve['bytes_exponent']:.2f}")
    print(f"multiplications N^{result['multiplications_exponent']:.2f}")
    if options.keep:
        write_cell("growth", device.type, 0, f"python benchmarks/growth.py --device {device.type} --rounds "
                   f"{options.rounds} --grids {' '.join(map(str, options.grids))} --keep", result)
        draw(result, HERE / "figures" / f"growth{'' if device.type == 'cpu' else '-' + device.type}.png")


if __name__ == "__main__":
    main()
