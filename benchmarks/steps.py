"""Profile a training step of each recipe, and compare it with the time of its multiplications alone.

    python benchmarks/steps.py --keep                on an idle machine
    python benchmarks/steps.py --amp bf16 --keep     on a CPU with bfloat16 instructions

It also times a step of each optimiser on the matrices of vit_nano, and convolutions with channels last and first, both
in float32, as medians over rounds in which they take turns.
"""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vit_bridge.preprocessing import Preprocessing

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import write_cell

from train_vit import Trainer
from vit_bridge.data.datasets import DatasetInfo
from vit_bridge.data.loaders import MemoryLoader
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.registry import build_model
from vit_bridge.training.config import RECIPES
from vit_bridge.training.objectives import Classification
from vit_bridge.training.optimizers import Muon, hidden_matrices

ROUNDS = 9
GROUPS = {  # {group: how the names of torch's operators begin, after aten::}
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "convolutions": ("convolution", "mkldnn_convolution", "thnn_conv2d", "_slow_conv2d", "unfold"),
    "attention": ("_scaled_dot_product", "_flash_attention", "softmax", "_softmax"),
    "norms": ("native_layer_norm", "native_batch_norm", "layer_norm", "batch_norm"),
    "GELU": ("gelu",),
    "pooling": ("max_pool", "mean", "max"),
    "copies": ("copy_", "cat", "clone", "contiguous", "stack", "index", "gather"),
}


def time_of(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def medians(works):
    """Return {name: median seconds} of functions that take turns."""
    seconds = {name: [] for name in works}
    for _ in range(ROUNDS + 1):
        for name, work in works.items():
            seconds[name].append(time_of(work))
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def loader_of(recipe):
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (4096, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (4096,))
    facts = DatasetInfo("cifar10", Preprocessing(32, (0.5,) * 3, (0.25,) * 3, class_names=map(str, range(10))))
    return MemoryLoader(images, labels, facts, recipe.batch_size, 0, True, augmentation=recipe.augmentation)


def profile_recipe(name, amp):
    """Return each operator group's share of a step, by the profiler, and the floor of the step.

    The floor is the time that the step's FLOPs (torch's FlopCounterMode; a multiply-add is 2) would take at the speed
    of a 2048 x 2048 matrix product in the same precision, measured between the steps.
    """
    recipe = RECIPES[name]
    loader = loader_of(recipe)
    model = build_model(recipe.model, n_classes=10, img_size=32, **recipe.model_options)
    trainer = Trainer(model, "cpu", Classification(recipe.label_smoothing), recipe.train, amp=amp)
    run = dict(learning_rate=1e-6, progressive_resize=None, progress=False)
    matrix = torch.randn(2048, 2048).to(trainer.dtype or torch.float32)
    n_steps = 8
    works = dict(step=lambda: trainer.train(loader, n_steps=n_steps, **run), product=lambda: matrix @ matrix)
    seconds = medians(works)
    with FlopCounterMode(display=False) as counter:
        trainer.train(loader, n_steps=1, **run)
    with profile(activities=[ProfilerActivity.CPU]) as capture:
        trainer.train(loader, n_steps=n_steps, **run)
    shares = defaultdict(float)
    for event in capture.key_averages():
        operator = event.key.removeprefix("aten::")
        group = next((group for group, starts in GROUPS.items() if operator.startswith(starts)), "all else")
        shares[group] += event.self_cpu_time_total
    total = sum(shares.values())
    floor = counter.get_total_flops() * seconds["product"] / (2 * 2048**3)
    step = seconds["step"] / n_steps
    return dict(recipe=name, seconds=step, images_per_second=round(recipe.batch_size / step, 1),
                mflops_an_image=round(counter.get_total_flops() / recipe.batch_size / 1e6, 1), floor_seconds=floor,
                share_of_floor=round(floor / step, 3), product_gflops=round(2 * 2048**3 / seconds["product"] / 1e9, 1),
                shares={group: round(share / total, 3) for group, share in sorted(shares.items(), key=lambda s: -s[1])},
                data_share=round(trainer.data_share, 4))


def optimizer_seconds():
    """Time a step of each optimiser on vit_nano's hidden matrices; torch's Muon does not split q, k and v."""
    recipe, works = RECIPES["vit_nano_fast"], {}
    for name in ("AdamW", "Muon, ours", "Muon, torch's"):
        model = build_model("vit_nano", n_classes=10, img_size=32, **recipe.model_options)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        hidden = hidden_matrices(model)
        works[name] = {"AdamW": torch.optim.AdamW(hidden), "Muon, ours": Muon(
            [dict(params=[p for p in hidden if hidden[p] == n], n_splits=n) for n in (1, 3)]),
            "Muon, torch's": torch.optim.Muon(list(hidden))}[name].step
    return medians(works)


def layout_seconds():
    """Time forward and backward of the ConvNet's recipe on 128 images, for each memory layout."""
    torch.manual_seed(0)
    model = ConvNet(32, 3, 10, **dict(dict(depths=(1, 1, 1), stem_stride=1), **RECIPES["convnet_fast"].model_options))
    works = {}
    for name, order in (("channels last", torch.channels_last), ("channels first", torch.contiguous_format)):
        images = torch.randn(128, 3, 32, 32).contiguous(memory_format=order)

        def work(images=images):
            x = model.stem(images)
            for stage in model.stages:
                x = stage(x)
            model.forward_head(x).sum().backward()

        works[name] = work
    return medians(works)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--amp", default="off", choices=("off", "bf16"))
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler of torch 2.14 prints extra lines
    recipes = ["vit_nano_fast", "hybrid_fast", "convnet_fast", *["convnet_wider"] * (options.amp == "bf16")]
    rows = [profile_recipe(name, options.amp) for name in recipes]
    precision = "bfloat16" if options.amp == "bf16" else "float32"
    result = dict(device="cpu", precision=precision, rows=rows, optimizers=optimizer_seconds(),
                  layouts=layout_seconds())
    for row in rows:
        print(row)
    print(result["optimizers"], result["layouts"])
    if options.keep:
        words = f" --amp {options.amp}" * (options.amp != "off")
        name = "cpu" if options.amp == "off" else f"cpu-{options.amp}"
        write_cell("steps", name, 0, f"python benchmarks/steps.py{words} --keep", result)


if __name__ == "__main__":
    main()
