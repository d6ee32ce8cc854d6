"""Ablation of the recipes: one change at a time, scored on the validation images.

    python benchmarks/factors.py --data-dir CIFAR speeds         measures the speed of each variant, on an idle machine
    python benchmarks/factors.py --data-dir CIFAR run            trains every variant that has no result yet
    python benchmarks/factors.py --data-dir CIFAR run --minutes 10 --keep vit_nano adamw 0     trains one and stores it
    python benchmarks/factors.py --data-dir CIFAR --amp bf16 ...  the same in bfloat16, on a CPU that has it
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import HERE, write_cell

from train_vit import new_model, set_up_loader, trainer_for
from vit_bridge.data.loaders import get_data_loaders
from vit_bridge.inference import Mirrored
from vit_bridge.training.config import RECIPES

ROUNDS, ROUND_SECONDS = 4, 0.8
ADAMW = {"adamw": dict(optimizer="adamw"), "adamw, rate 4e-3": dict(optimizer="adamw", learning_rate=4e-3)}
NOT_WHITENED = {"not whitened": dict(whiten=False)}
RATES = {"rate 1e-3": dict(learning_rate=1e-3), "rate 4e-3": dict(learning_rate=4e-3)}
ATTENTION = {"xavier": dict(init="xavier"), "head reads CLS": dict(pool="cls")}
LOW = dict(progressive_resize=(0.75, 0.6))
REGULARISATION = {
    "no flip": dict(flip="none"),
    "cutout 0.25": dict(cutout=0.25),
    "cutmix": dict(mixing="cutmix"),
    "label smoothing 0": dict(label_smoothing=0.0),
    "24 pixels for 60%": LOW,
}
STEPS = {"average 0.99": dict(ema_decay=0.99), "batch 64": dict(batch_size=64), "batch 256": dict(batch_size=256)}
FACTORS = {  # the ViT has most; the others have those whose effect may differ with convolutions
    "vit_nano": {"the recipe": {}, **ADAMW, **NOT_WHITENED, **ATTENTION,
                 "64 wide": dict(embed_dim=64, n_heads=2), "128 wide": dict(embed_dim=128, n_heads=4),
                 "128 wide, 3 deep": dict(embed_dim=128, n_heads=4, depth=3), "6 deep": dict(depth=6),
                 "MLP 2 wide": dict(mlp_ratio=2.0), "patches of 8": dict(patch_size=8), **REGULARISATION, **RATES,
                 **STEPS, "no shift": dict(shift=0.0), "mixup": dict(mixing="mixup"),
                 "fixed positions": dict(position="sincos"), "drop path 0.1": dict(drop_path=0.1),
                 "normed queries and keys": dict(qk_norm=True), "random flip": dict(flip="random"),
                 "cosine": dict(schedule="cosine"), "weight decay 0": dict(weight_decay=0.0),
                 "128 wide, 24 pixels for 60%": dict(embed_dim=128, n_heads=4, **LOW)},
    "hybrid": {"the recipe": {}, **ADAMW, **NOT_WHITENED, **ATTENTION,
               "strided stem, patches of 4": dict(stem="strided", patch_size=4),
               "pooled stem, patches of 4": dict(patch_size=4),
               "1 block": dict(depth=1), "4 blocks": dict(depth=4), "192 wide": dict(embed_dim=192, n_heads=6),
               **REGULARISATION, **RATES, "192 wide, 24 pixels for 60%": dict(embed_dim=192, n_heads=6, **LOW)},
    "convnet": {"the recipe": {}, **ADAMW, **NOT_WHITENED,
                "residual blocks": dict(block="residual"),
                "24, 48, 96 channels": dict(widths=(24, 48, 96)), "48, 96, 192 channels": dict(widths=(48, 96, 192)),
                "2 convolutions after pooling": dict(depths=(2, 2, 2)), **REGULARISATION, **RATES,
                "48, 96, 192 channels, cutout 0.25": dict(widths=(48, 96, 192), cutout=0.25),
                "48, 96, 192 channels, shift 0.0625": dict(widths=(48, 96, 192), shift=0.0625),
                "64, 128, 256 channels": dict(widths=(64, 128, 256)),
                "48, 96, 192 channels, 24 pixels for 60%": dict(widths=(48, 96, 192), **LOW),
                "64, 128, 256 channels, 24 pixels for 60%": dict(widths=(64, 128, 256), **LOW)},
}
SEEDS_OF_RECIPE = 3  # a change has one seed
FREE = {"learning_rate", "schedule", "weight_decay", "label_smoothing", "whiten", "init", "position", "flip", "shift",
        "cutout", "mixing"}  # these change the time of a step by less than its own variation
AUGMENTATION = ("shift", "flip", "cutout")


def variant(model_name, factor):
    """Return a model's recipe with one factor changed."""
    recipe, changes = RECIPES[f"{model_name}_fast"], FACTORS[model_name][factor]
    pixels = {name: value for name, value in changes.items() if name in AUGMENTATION}
    train = {name: value for name, value in changes.items() if name in vars(recipe.train)}
    whole = {name: value for name, value in changes.items() if name in vars(recipe)}
    options = {name: value for name, value in changes.items() if name not in pixels | train | whole}
    return replace(recipe, augmentation=replace(recipe.augmentation, **pixels),
                   train=replace(recipe.train, **dict(progressive_resize=None) | train),
                   model_options=recipe.model_options | options, **whole)


def prepare(model_name, factor, loader, seed, amp="off"):
    """Return (recipe, trainer) of a variant, ready to train on the loader."""
    recipe = variant(model_name, factor)
    set_up_loader(loader, recipe, seed)
    return recipe, trainer_for(recipe, new_model(model_name, recipe, loader, seed=seed), amp=amp)


def measure_speeds(model_name, loader, amp):
    """Return {factor: images per second}: medians over rounds in which all variants take turns."""
    variants = {factor: prepare(model_name, factor, loader, 0, amp) for factor in FACTORS[model_name]}
    speeds = {factor: [] for factor in variants}
    for i in range(ROUNDS + 1):
        for factor, (recipe, trainer) in variants.items():
            loader.batch_size = recipe.batch_size
            loader.set_augmentation(recipe.augmentation)
            wanted = 0 if i == 0 else ROUND_SECONDS * speeds[factor][0] / recipe.batch_size
            n_steps = max(2, round(wanted))
            if recipe.train.progressive_resize:
                n_steps = 5 * max(1, round(wanted / 5))  # three steps out of five use smaller images
            history = trainer.train(loader, n_steps=n_steps, learning_rate=1e-6, progress=False)
            speeds[factor].append(history["images_per_second"][0])
    return {factor: round(statistics.median(values[1:]), 1) for factor, values in speeds.items()}


def run_cell(model_name, factor, seed, minutes, loaders, speed, amp="off"):
    """Train a variant and return its result."""
    train_loader, val_loader = loaders
    recipe, trainer = prepare(model_name, factor, train_loader, seed, amp)
    n_steps, started = int(60 * minutes * speed / recipe.batch_size), time.perf_counter()
    trainer.train(train_loader, n_steps=n_steps, seed=seed, progress=False)
    trained = trainer.average or trainer.model
    plain, mirrored = (trainer.evaluate(val_loader, model) for model in (trained, Mirrored(trained)))
    return dict(model=model_name, factor=factor, minutes=minutes, change=FACTORS[model_name][factor],
                recipe=recipe.describe(),
                images_per_second=speed, n_steps=n_steps,
                epochs=round(n_steps * recipe.batch_size / train_loader.n_images, 2), val_acc=plain["acc"],
                val_correct=plain["correct"], val_n=plain["n"], val_mirrored_acc=mirrored["acc"], device="cpu",
                precision=str(trainer.dtype or torch.float32),
                training_seconds=round(time.perf_counter() - started), threads=torch.get_num_threads())


def speed_of(model_name, factor, amp):
    """Return the measured images per second of a variant; a change that costs no time has the recipe's speed."""
    path = HERE / "results" / f"speeds-{model_name}{suffix(amp)}.json"
    speeds, changes = json.loads(path.read_text())["result"]["speeds"], costly(FACTORS[model_name][factor])
    return speeds[next((name for name, those in FACTORS[model_name].items() if those == changes), factor)]


def costly(changes):
    return {name: value for name, value in changes.items() if name not in FREE}


def suffix(amp):
    return "" if amp == "off" else f"-{amp}"


def cell_name(model_name, factor, seed, minutes, amp):
    factor = re.sub(r"[^\w.]+", "-", factor).strip("-")
    return f"{model_name}-{factor}-{minutes:g}{suffix(amp)}-{seed}"


def missing_cells(minutes, amp):
    wanted = [(place, seed, model_name, factor) for model_name, factors in FACTORS.items()
              for place, factor in enumerate(factors) for seed in range(SEEDS_OF_RECIPE if not place else 1)]
    return [(model_name, factor, seed) for _, seed, model_name, factor in sorted(wanted, key=lambda cell: cell[:2])
            if not (HERE / "results" / f"factors-{cell_name(model_name, factor, seed, minutes, amp)}.json").exists()]


def main():
    """Measure the speeds, or train the variants.

    A variant is a model's recipe with one change. The recipe here has no progressive_resize, which counts as a change
    like the others.

    A variant trains for as many steps as fit into 2 minutes on an idle machine. The speeds are measured first, on all
    cores, in rounds in which all variants of a model take turns. The result of those steps does not depend on the load
    of the machine, so two runs train at a time, each on one thread. Speeds and results in bfloat16 are stored
    separately from those in float32. The validation images are the 5,000 that train_vit.py splits off; no test image is
    read.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--amp", default="off", choices=("off", "bf16"))
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("speeds").add_argument("models", nargs="*", metavar="MODEL")
    running = commands.add_parser("run")
    running.add_argument("cell", nargs="*", metavar="MODEL FACTOR SEED")
    running.add_argument("--minutes", type=float, default=2)
    running.add_argument("--jobs", type=int, default=2)
    running.add_argument("--part", type=int, help="run only this part of the jobs in this process (used internally)")
    running.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    if options.command == "run" and not options.cell and options.part is None:
        script = [sys.executable, __file__, "--data-dir", options.data_dir, "--amp", options.amp, "run",
                  "--jobs", str(options.jobs), "--minutes", str(options.minutes), *["--keep"] * options.keep]
        jobs = [subprocess.Popen([*script, "--part", str(part)], env=dict(os.environ, OMP_NUM_THREADS="1"))
                for part in range(options.jobs)]
        sys.exit(max(job.wait() for job in jobs))
    loaders = get_data_loaders(options.data_dir, img_size=None)
    command, amp = "python benchmarks/factors.py --data-dir CIFAR", options.amp
    command += f" --amp {amp}" * (amp != "off")
    if options.command == "speeds":
        for model_name in options.models or FACTORS:
            speeds = measure_speeds(model_name, loaders[0], amp)
            write_cell("speeds", model_name + suffix(amp), 0, f"{command} speeds {model_name}",
                       dict(model=model_name, amp=amp, speeds=speeds))
        return
    if options.cell:
        model_name, factor, seed = options.cell
        cells = [(model_name, factor, int(seed))]
    else:
        cells = missing_cells(options.minutes, amp)[options.part::options.jobs]
    for model_name, factor, seed in cells:
        speed = speed_of(model_name, factor, amp)
        result = run_cell(model_name, factor, seed, options.minutes, loaders, speed, amp)
        print(f"{model_name}, {factor}, seed {seed}: {result['val_acc']:.2%}", flush=True)
        if options.keep:
            write_cell("factors", cell_name(model_name, factor, seed, options.minutes, amp), seed,
                       f"{command} run --minutes {options.minutes:g} {model_name} {factor!r} {seed}", result)


if __name__ == "__main__":
    main()
