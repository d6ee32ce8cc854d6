"""Measure how costs grow with the number of tokens or pixels.

    python benchmarks/growth.py --keep           attention: writes results/growth-*.json and figures/growth.png
    python benchmarks/growth.py models --keep    models: writes results/resolution-*.json and figures/resolution.png

Attention is fused or explicit. The model has four blocks of ViT-Tiny (D = 192, 3 heads) and reads one image of N = 64
to 4,096 patches, with pool="mean", so that the last block computes every token. For each N the two kinds of attention
take turns, in inference and in training (forward and backward); the median over the rounds is kept. Memory is measured
with analysis.cost.peak_memory.

Models: FLOPs and images per second of vit_nano, swin_nano and convnext_nano against the side of the images. Patches and
windows keep their size. The sides are multiples of 32, so that Swin's windows divide every map, and vit_nano has
pool="mean". Every pass holds the same number of pixels. In each round the models and sides take turns; the median over
the rounds is kept.
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
from vit_bridge.analysis.cost import count_flops, fitted_exponent, peak_memory, throughput
from vit_bridge.models.registry import MODELS
from vit_bridge.plots.charts import BLUE, GREEN, ORANGE, finish, new_figure
from vit_bridge.runtime import choose_device

GRIDS = (8, 11, 16, 23, 32, 45, 64)
SIDES = (32, 64, 96, 128, 192, 256)
DRAWN_MODELS = {"vit_nano": (dict(pool="mean"), BLUE), "swin_nano": ({}, ORANGE), "convnext_nano": ({}, GREEN)}
D, DEPTH = 192, 4
EXPLICIT = vit_model.attend


def attend_fused(q, k, v, return_attention=False, bias=None):
    return F.scaled_dot_product_attention(q, k, v, bias), None


def attend_explicit(q, k, v, return_attention=False, bias=None):
    heads, _ = EXPLICIT(q, k, v, return_attention=True, bias=bias)
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
    """Fit the slope of log values over log sizes to the upper half of the sizes."""
    half = len(sizes) // 2
    return fitted_exponent(sizes[half:], values[half:])


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


def measure_models(sides, n_rounds, device, seconds):
    """Return the FLOPs and the images per second of each model at each side, and their exponents over the pixels."""
    result = dict(device=device.type, sides=list(sides), rounds=n_rounds, models={})
    pixels, models, speeds = [side * side for side in sides], {}, defaultdict(list)
    for name, (options, _) in DRAWN_MODELS.items():
        for side in sides:
            torch.manual_seed(0)
            entry = MODELS[name]
            models[name, side] = entry.model_class(**{**entry.arguments, **options, "img_size": side}).to(device).eval()
    for _ in range(n_rounds):
        for (name, side), model in models.items():
            batch_size = max(1, pixels[-1] // side**2)
            speeds[name, side].append(throughput(model, batch_size=batch_size, seconds=seconds))
    for name in DRAWN_MODELS:
        flops = [count_flops(models[name, side]) for side in sides]
        speed = [statistics.median(speeds[name, side]) for side in sides]
        result["models"][name] = dict(flops=flops, images_per_second=speed, flops_exponent=exponent(pixels, flops),
                                      seconds_exponent=exponent(pixels, [1 / each for each in speed]))
        print("\n".join(f"{name} {side:4d} pixels  {count / 1e9:8.3f} GFLOPs  {each:9.1f} images/s"
                        for side, count, each in zip(sides, flops, speed, strict=True)))
        print("{}: FLOPs pixels^{flops_exponent:.2f}, time pixels^{seconds_exponent:.2f}".format(
            name, **result["models"][name]))
    return result


def draw_models(result, save_path=None):
    """Draw FLOPs (left) and images per second (right) against the side of the images."""
    figure, sides = new_figure(12.5, 5.4), result["sides"]
    for axes, what, power in zip(figure.subplots(1, 2), ("flops", "images_per_second"), ("flops", "seconds"),
                                 strict=True):
        for name, row in result["models"].items():
            values = np.array(row[what]) / (1e9 if what == "flops" else 1)
            axes.plot(sides, values, color=DRAWN_MODELS[name][1], marker="o", linewidth=2,
                      label=f"{name}: {row[f'{power}_exponent']:.2f}")
        axes.set(xscale="log", yscale="log", xlabel="side of the image in pixels",
                 ylabel="GFLOPs per image" if what == "flops" else "images per second",
                 title="FLOPs" if what == "flops" else "Speed, inference")
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=10, title=f"{'FLOPs' if what == 'flops' else 'time'}: exponent of the pixels")
    figure.suptitle(f"ViT, Swin and ConvNeXt, float32, {result['device']}", fontsize=14)
    return finish(figure, save_path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("attention", "models"), default="attention")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--grids", type=int, nargs="+", default=GRIDS, help="numbers of patches along a side")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="models: sides of the images, in pixels")
    parser.add_argument("--seconds", type=float, default=1.0, help="models: time of a turn (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="write the result and the figure")
    options = parser.parse_args()
    device = choose_device(options.device)
    if options.what == "models":
        result = measure_models(options.sides, options.rounds, device, options.seconds)
        if options.keep:
            write_cell("resolution", device.type, 0, f"python benchmarks/growth.py models --device {device.type} "
                       f"--rounds {options.rounds} --sides {' '.join(map(str, options.sides))} --seconds "
                       f"{options.seconds:g} --keep", result)
            draw_models(result, HERE / "figures" / f"resolution{'' if device.type == 'cpu' else '-' + device.type}.png")
        return
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
