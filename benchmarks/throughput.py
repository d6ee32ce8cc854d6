"""Compare the speed of VisionTransformer with four other libraries, which take turns in one process.

    python benchmarks/throughput.py                         every column, in each precision that this machine supports
    python benchmarks/throughput.py --columns tiny-16-inference-float32 --rounds 5
    python benchmarks/throughput.py --device cuda --set gpu --budget 210 --output gpu.jsonl    as on_gpu.sh calls it

It needs timm, transformers and vit-pytorch (requirements-dev.txt). Missing libraries are reported and skipped.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer as TorchvisionViT

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import write_cell

from vit_bridge.analysis.cost import peak_memory
from vit_bridge.errors import InputError, check_choice, first_line
from vit_bridge.runtime import choose_device, choose_precision
from vit_model import VARIANTS, VisionTransformer

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
SECONDS_A_TURN = 0.2
PRODUCT_SIDES = {"cuda": 8192}  # 2048 on other devices; that is too little work for a GPU


@dataclass(frozen=True)
class Column:
    variant: str
    batch: int
    train: bool
    precision: str = "float32"
    compiled: bool = False

    @property
    def name(self):
        return "-".join([self.variant.removeprefix("vit_"), str(self.batch), "training" if self.train else "inference",
                         self.precision, *["compiled"] * self.compiled])


def all_columns():
    """List the columns of the table: both passes of four models in each precision, and Tiny/16 compiled."""
    columns = []
    for precision in DTYPES:
        for variant, batch in (("vit_tiny", 1), ("vit_tiny", 16), ("vit_small", 16), ("vit_nano", 128)):
            columns += [Column(variant, batch, train, precision) for train in (False, True)]
        columns += [Column("vit_tiny", 16, train, precision, compiled=True) for train in (False, True)]
    return columns


def gpu_columns():
    """List columns for a large GPU: bf16 at 224 pixels, the compiled ones last.

    Compiling takes so long that it could use up the budget of the others.
    """
    sizes = (("vit_tiny", 256), ("vit_small", 256), ("vit_base", 128))
    columns = [Column(variant, batch, train, "bf16") for variant, batch in sizes for train in (False, True)]
    return columns + [Column("vit_base", 128, train, "bf16", compiled=True) for train in (False, True)]


def dry_columns():
    """List two tiny columns for a dry run, in float32: a CPU may lack the instructions for bfloat16."""
    return [Column("vit_nano", 2, False), Column("vit_nano", 2, True, compiled=True)]


SETS = {"all": all_columns, "gpu": gpu_columns, "dry-run": dry_columns}


# ---- The models


class Logits(nn.Module):
    """A model of transformers that returns its logits (B, n_classes) instead of an output object."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images).logits


def build_ours(c):
    return VisionTransformer(**vars(c))


def build_timm(c):
    from timm.models import VisionTransformer as TimmViT

    return TimmViT(img_size=c.img_size, patch_size=c.patch_size, num_classes=c.n_classes, embed_dim=c.embed_dim,
                   depth=c.depth, num_heads=c.n_heads)


def build_torchvision(c):
    return TorchvisionViT(c.img_size, c.patch_size, c.depth, c.n_heads, c.embed_dim, 4 * c.embed_dim,
                          num_classes=c.n_classes)


def build_transformers(c):
    from transformers import ViTConfig, ViTForImageClassification

    return Logits(ViTForImageClassification(ViTConfig(
        hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.n_heads,
        intermediate_size=4 * c.embed_dim, image_size=c.img_size, patch_size=c.patch_size, num_labels=c.n_classes)))


def build_vit_pytorch(c):
    from vit_pytorch import ViT

    return ViT(image_size=c.img_size, patch_size=c.patch_size, num_classes=c.n_classes, dim=c.embed_dim, depth=c.depth,
               heads=c.n_heads, mlp_dim=4 * c.embed_dim, dim_head=c.embed_dim // c.n_heads)


LIBRARIES = {"ours": build_ours, "timm": build_timm, "torchvision": build_torchvision,
             "transformers": build_transformers, "vit-pytorch": build_vit_pytorch}


def available_libraries():
    """List the installed libraries, and print the names of the others."""
    found = []
    for name, build in LIBRARIES.items():
        try:
            build(VARIANTS["vit_nano"])
            found.append(name)
        except ImportError as error:
            print(f"{name} is skipped: {error}")
    return found


# ---- Measuring


class Turn:
    """One library's passes in one column."""

    def __init__(self, model, images, column, device):
        self.model, self.images, self.column, self.device = model.to(device).train(column.train), images, column, device
        if column.train:
            self.optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            self.labels = torch.arange(len(images), device=device) % 1000
        self.step = torch.compile(self.model) if column.compiled else self.model
        self.n_passes = 1

    def run(self):
        """Start one pass, without waiting for the device."""
        autocast = nullcontext()
        if self.column.precision != "float32":
            autocast = torch.autocast(self.device.type, DTYPES[self.column.precision])
        if not self.column.train:
            with torch.inference_mode(), autocast:
                self.step(self.images)
            return
        with autocast:
            logits = self.step(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def seconds(self):
        """Time n_passes passes and return the seconds of one."""
        wait(self.device)
        start = time.perf_counter()
        for _ in range(self.n_passes):
            self.run()
        wait(self.device)
        return (time.perf_counter() - start) / self.n_passes

    def warm_up(self):
        for _ in range(3):
            self.seconds()
        self.n_passes = max(1, round(SECONDS_A_TURN / self.seconds()))


class Product:
    """A product of two square matrices, timed like a Turn: the machine's own speed."""

    def __init__(self, dtype, device, side=2048):
        self.a, self.b = torch.randn(2, side, side, device=device).to(dtype)
        self.device, self.n_passes, self.flops = device, 1, 2 * side**3

    def run(self):
        torch.mm(self.a, self.b)

    seconds, warm_up = Turn.seconds, Turn.warm_up


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_pass(model, images, train):
    """Count the FLOPs of one pass of the whole batch: a multiply-add as 2, a backward pass as two forward ones.

    The count runs on the device "meta" with explicit attention, so that every library is counted in the same way.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    state = {name: value.to("meta") for name, value in model.state_dict().items()}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        torch.func.functional_call(model.eval(), state, (images.to("meta"),))
    return counter.get_total_flops() * (3 if train else 1)


def median_interval(values, confidence=0.95):
    """Return (median, low, high), with a confidence interval for the median between two order statistics.

    It contains the median with at least this confidence, by the binomial distribution of the number of values below it.
    With fewer than 6 values it is their range.
    """
    values, n = sorted(values), len(values)
    below, k, chance = 0.5**n, 0, 0.5**n
    while k + 1 < n / 2:
        chance = chance * (n - k) / (k + 1)
        if 2 * (below + chance) > 1 - confidence:
            break
        below, k = below + chance, k + 1
    return statistics.median(values), values[k], values[n - 1 - k]


def measure(column, names, n_rounds, device, max_seconds=600):
    """Measure every library in one column, and the ratios to ours.

    A column is a model, a batch size, a pass (inference, or a training step: forward, backward, AdamW), a precision,
    and eager or compiled. In each round every library has one turn, in a new order. A turn is as many passes as take a
    fifth of a second. A ratio is the peer's time divided by ours in the same round, so ours is faster above 1. It is
    reported as the median over rounds with a 95% interval from order statistics, which assumes independent rounds and
    no distribution. `share` is the FLOPs per second as a fraction of Product's FLOPs per second in the same rounds.

    After max_seconds, and at least five rounds, no further round starts.
    """
    start = time.perf_counter()
    config = VARIANTS[column.variant]
    side = config.img_size
    images = torch.rand(column.batch, 3, side, side, device=device, generator=torch.Generator(device).manual_seed(0))
    turns, flops, memory = {}, {}, {}
    for name in names:
        torch.manual_seed(0)
        model = LIBRARIES[name](config)
        flops[name] = count_pass(model, images, column.train)
        if not column.compiled and column.precision == "float32":
            memory[name] = peak_memory(model.to(device), images, column.train)
        turns[name] = Turn(model, images, column, device)
    turns["product"] = Product(DTYPES[column.precision], device, PRODUCT_SIDES.get(device.type, 2048))
    for turn in turns.values():
        turn.warm_up()
    seconds, order = defaultdict(list), list(turns)
    for done in range(n_rounds):
        if done >= 5 and time.perf_counter() - start > max_seconds:
            break
        random.Random(done).shuffle(order)
        for name in order:
            seconds[name].append(turns[name].seconds())
    rate = turns["product"].flops / statistics.median(seconds["product"])
    result = dict(column=column.name, device=device.type, **vars(column), rounds=len(seconds["ours"]),
                  product_gflops=rate / 1e9, libraries={})
    for name in names:
        median, low, high = median_interval([column.batch / s for s in seconds[name]])
        result["libraries"][name] = dict(images_per_second=median, interval=[low, high], flops=flops[name],
                                         share=flops[name] / statistics.median(seconds[name]) / rate,
                                         peak_bytes=memory.get(name))
    for name in names[1:]:
        ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)]
        result["libraries"][name].update(ratio=median_interval(ratios), ratios=[round(ratio, 4) for ratio in ratios])
    return result


def describe(result):
    """Describe the result of a column in a few lines."""
    lines = [f"{result['column']}  ({result['rounds']} rounds, product {result['product_gflops']:.0f} GFLOP/s)"]
    for name, cell in result["libraries"].items():
        ratio = "" if name == "ours" else "  ours/it {:.2f} ({:.2f} to {:.2f})".format(*cell["ratio"])
        memory = "" if cell["peak_bytes"] is None else f"  {cell['peak_bytes'] / 2**20:.0f} MiB"
        lines.append(f"    {name:13s} {cell['images_per_second']:8.1f} images/s  share {cell['share']:.0%}{memory}"
                     f"{ratio}")
    return "\n".join(lines)


def choose_columns(options, device):
    """Return the columns that the options name; an unknown name raises InputError."""
    columns = SETS[options.set]()
    if options.columns:
        for name in options.columns:
            check_choice("column", name, [column.name for column in columns])
        return [column for column in columns if column.name in options.columns]
    if options.set == "all" and choose_precision("auto", device) is None:
        print(f"{device} has no bfloat16 instructions: the bf16 columns are skipped unless --columns names them")
        return [column for column in columns if column.precision != "bf16"]
    return columns


def measure_within(column, libraries, n_rounds, device, seconds):
    """Return the result of measure(), or the reason if it fails or no time is left."""
    if seconds <= 0:
        return dict(column=column.name, device=device.type, error="no time was left for it")
    names = [name for name in libraries if name in ("ours", "timm") or not column.compiled]
    try:
        return measure(column, names, n_rounds, device, seconds)
    except Exception as error:  # whatever a library raises, the other columns are still measured
        return dict(column=column.name, device=device.type, error=first_line(error))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="all", help="the columns to choose from (default: %(default)s)")
    parser.add_argument("--columns", nargs="+", metavar="NAME",
                        help=" ".join(column.name for columns in SETS.values() for column in columns()))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/throughput-*.json")
    parser.add_argument("--output", type=Path, help="append each result to this file, as a line of JSON")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="time for all columns together; if a column "
                        "fails or no time is left for it, its result is the reason")
    options = parser.parse_args()
    try:
        device = choose_device(options.device)
        columns = choose_columns(options, device)
    except InputError as error:
        parser.error(str(error))
    libraries, start = available_libraries(), time.perf_counter()
    for done, column in enumerate(columns):
        if options.budget is None:
            result = measure(column, libraries, options.rounds, device)
        else:
            left = options.budget - (time.perf_counter() - start)
            result = measure_within(column, libraries, options.rounds, device, left / (len(columns) - done))
        print(f"{column.name}: {result['error']}" if "error" in result else describe(result), flush=True)
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(result) + "\n")
        if options.keep:
            write_cell("throughput", f"{device.type}-{column.name}", 0, f"python benchmarks/throughput.py --columns "
                       f"{column.name} --device {device.type} --rounds {options.rounds} --keep", result)


if __name__ == "__main__":
    main()
