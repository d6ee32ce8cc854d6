"""DeiT, Swin and ConvNeXt on CIFAR-10 (JPEG): equal minutes, learning rates chosen with the first seed, three seeds.

    python benchmarks/family.py --data-dir CIFAR speeds          measures the speed of each arm, on an idle machine
    python benchmarks/family.py --data-dir CIFAR run             trains every cell that has no result yet
    python benchmarks/family.py --data-dir CIFAR plan            prints the cells and their minutes
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vit_bridge.models.initialisation import whiten_first_layer

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import HERE, write_cell

from train_vit import WHITENED_BY, Trainer, first_images
from vit_bridge.analysis.metrics import wilson_interval
from vit_bridge.data.loaders import get_data_loaders, get_test_loader
from vit_bridge.models.registry import build_model
from vit_bridge.training.config import RECIPES
from vit_bridge.training.objectives import Classification, Distillation
from vit_bridge.weights.checkpoints import load, save_model

TEACHER, TEACHER_MINUTES = "convnet_cifar10", 5  # the shipped ConvNet; its 2,958 steps take 4.8 minutes here
ROUNDS, ROUND_SECONDS = 4, 1.5
RATES, SEEDS = (5e-4, 1e-3, 2e-3), (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """One way to train: a recipe, changes to the model, a teacher, minutes, and the arm whose learning rate it uses."""

    recipe: str
    options: dict
    kind: str | None = None
    minutes: float = 5
    rate_of: str | None = None


ARMS = {
    "ViT": Arm("vit_nano_fast", {}),
    "ViT, soft": Arm("vit_nano_fast", {}, "soft"),
    "ViT, hard": Arm("vit_nano_fast", {}, "hard", rate_of="ViT, soft"),
    "DeiT, soft": Arm("deit_nano_fast", {}, "soft"),
    "DeiT, hard": Arm("deit_nano_fast", {}, "hard", rate_of="DeiT, soft"),
    "DeiT, no teacher": Arm("deit_nano_fast", {}, rate_of="DeiT, soft"),
    "ViT, the teacher's minutes added": Arm("vit_nano_fast", {}, minutes=5 + TEACHER_MINUTES, rate_of="ViT"),
    "Swin": Arm("swin_nano_fast", {}),
    "Swin, no shift": Arm("swin_nano_fast", dict(shift=False), rate_of="Swin"),
    "Swin, no bias": Arm("swin_nano_fast", dict(relative_bias=False), rate_of="Swin"),
    "Hybrid": Arm("hybrid_fast", {}),
    "ConvNeXt": Arm("convnext_nano_fast", {}),
}


def prepare(arm, loader, seed, learning_rate):
    """Return (recipe, trainer) of an arm, ready to train on the loader."""
    arm = ARMS[arm]
    recipe = RECIPES[arm.recipe]
    recipe = replace(recipe, train=replace(recipe.train, learning_rate=learning_rate),
                     model_options=recipe.model_options | arm.options)
    loader.batch_size, loader.seed = recipe.batch_size, seed
    loader.set_augmentation(recipe.augmentation)
    torch.manual_seed(seed)
    model = build_model(recipe.model, n_classes=len(loader.class_names), img_size=loader.img_size,
                        **recipe.model_options)
    if recipe.train.progressive_resize:
        model.any_size = True
    if recipe.whiten and model.whitening_layer() is not None:
        whiten_first_layer(model, first_images(loader, WHITENED_BY))
    objective = Classification(recipe.label_smoothing)
    if arm.kind:
        objective = Distillation(load(TEACHER), loader.preprocessing, arm.kind, label_smoothing=recipe.label_smoothing)
    return recipe, Trainer(model, "auto", objective, recipe.train, amp="off",
                           resize_multiple=getattr(model.config, "patch_size", 4))


def measure_speeds(loader):
    """Return {arm: images per second}: medians over rounds in which all arms take turns."""
    arms = {name: prepare(name, loader, 0, 1e-6) for name, arm in ARMS.items() if arm.minutes == 5}
    speeds = {name: [] for name in arms}
    for i in range(ROUNDS + 1):
        for name, (recipe, trainer) in arms.items():
            wanted = 0 if i == 0 else ROUND_SECONDS * speeds[name][0] / recipe.batch_size
            n_steps = 5 * max(1, round(wanted / 5))  # three steps out of five may use smaller images
            history = trainer.train(loader, n_steps=n_steps, progress=False)
            speeds[name].append(history["images_per_second"][0])
    return {name: round(statistics.median(values[1:]), 1) for name, values in speeds.items()}


def speed_of(name):
    """Return the measured images per second of an arm; a longer arm has the speed of the short one."""
    speeds = json.loads((HERE / "results" / "family-speeds-cpu.json").read_text())["result"]["speeds"]
    return speeds.get(name, speeds["ViT"])


def cell_of(name, learning_rate, seed):
    """Return the path of a cell."""
    words = name.replace(", ", "-").replace(" ", "-").replace("'", "")
    return HERE / "results" / f"family-{words}-{learning_rate:g}-{seed}.json"


def read(name, learning_rate, seed):
    """Return the result of a cell, or None."""
    path = cell_of(name, learning_rate, seed)
    return json.loads(path.read_text())["result"] if path.exists() else None


def search(name):
    """Return (the arm's learning rate or None, the rates that seed 0 still has to try).

    The grid grows beyond its edge for as long as the edge has the best validation accuracy.
    """
    owner, rates = ARMS[name].rate_of or name, list(RATES)
    while True:
        found = {rate: read(owner, rate, 0) for rate in rates}
        if missing := [rate for rate, result in found.items() if result is None]:
            return None, missing
        best = max(found, key=lambda rate: found[rate]["val_acc"])
        if min(rates) < best < max(rates):
            return best, []
        rates.append(best / 2 if best == min(rates) else best * 2)


def chosen_rate(name):
    """Return the arm's learning rate, or None while its grid is not complete."""
    return search(name)[0]


def wanted_cells():
    """Yield (arm, learning rate, seed) of the next cells: first the grids with seed 0, then the other seeds."""
    for name, arm in ARMS.items():
        if arm.rate_of is None:
            for rate in search(name)[1]:
                yield name, rate, 0
    for seed in SEEDS:
        for name in ARMS:
            rate = chosen_rate(name)
            result = rate and read(name, rate, seed)
            if rate and (result is None or "test_acc" not in result):
                yield name, rate, seed


def run_cell(name, learning_rate, seed, loaders, work):
    """Train an arm and return its result. The test images are read only if this is the arm's chosen rate."""
    train_loader, val_loader, test_loader = loaders
    path, result = work / f"{cell_of(name, learning_rate, seed).stem}.pt", read(name, learning_rate, seed)
    if result is None:
        recipe, trainer = prepare(name, train_loader, seed, learning_rate)
        n_steps, started = int(60 * ARMS[name].minutes * speed_of(name) / recipe.batch_size), time.perf_counter()
        trainer.train(train_loader, n_steps=n_steps, seed=seed, progress=False)
        model = trainer.model.eval()
        plain = trainer.evaluate(val_loader)
        save_model(model, path, train_loader.preprocessing)
        result = dict(arm=name, recipe=recipe.describe(), learning_rate=learning_rate, minutes=ARMS[name].minutes,
                      teacher=TEACHER if ARMS[name].kind else None, images_per_second=speed_of(name), n_steps=n_steps,
                      epochs=round(n_steps * recipe.batch_size / train_loader.n_images, 2),
                      parameters=sum(p.numel() for p in model.parameters()), val_acc=plain["acc"],
                      val_correct=plain["correct"], val_n=plain["n"], device="cpu", precision="torch.float32",
                      training_seconds=round(time.perf_counter() - started), threads=torch.get_num_threads())
    if chosen_rate(name) == learning_rate or seed > 0:
        tested = Trainer(load(path), "auto", Classification(0.1), amp="off").evaluate(test_loader)
        result |= dict(test_acc=tested["acc"], test_correct=tested["correct"], test_n=tested["n"],
                       test_interval=wilson_interval(tested["correct"], tested["n"]))
    return result


def claim(work, cell):
    """Return whether this process may train a cell; a file marks those that another one trains."""
    mark = work / f"{cell_of(*cell).stem}.claim"
    try:
        with open(mark, "x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        pid = mark.read_text()
        if pid and not Path(f"/proc/{pid}").exists():  # it was killed
            mark.unlink()
            return claim(work, cell)
        return False


def main():
    """Measure the speeds, or train the cells.

    An arm trains for as many steps as fit into its minutes on an idle machine, with the time of its teacher counted.
    The speeds are measured first, on all cores, in rounds in which all arms take turns. The result of those steps does
    not depend on the load of the machine, so two cells train at a time, each on one thread. Rates are chosen with seed
    0 on the 5,000 validation images that train_vit.py splits off; test images are read for the chosen rate only.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/family"), help="folder for the trained weights")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--job", type=int, help="run one job in this process (used internally)")
    parser.add_argument("command", choices=("speeds", "run", "plan"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/family.py --data-dir CIFAR"
    if options.command == "plan":
        for name, arm in ARMS.items():
            print(f"{name:35s} {arm.minutes:g} min x {len(SEEDS)} seeds, "
                  + (f"rate of {arm.rate_of}" if arm.rate_of else f"{len(RATES)} rates with seed 0"))
        n = sum(arm.minutes * (len(SEEDS) + (len(RATES) - 1) * (arm.rate_of is None)) for arm in ARMS.values())
        print(f"{n:g} minutes in all")
        return
    if options.command == "run" and options.job is None:
        script = [sys.executable, __file__, "--data-dir", options.data_dir, "--work", str(options.work), "run"]
        jobs = [subprocess.Popen([*script, "--job", str(job)], env=dict(os.environ, OMP_NUM_THREADS="1"))
                for job in range(options.jobs)]
        sys.exit(max(job.wait() for job in jobs))
    loaders = get_data_loaders(options.data_dir, img_size=None)
    if options.command == "speeds":
        write_cell("family-speeds", "cpu", 0, f"{command} speeds",
                   dict(speeds=measure_speeds(loaders[0]), threads=torch.get_num_threads(), device="cpu"))
        return
    loaders = (*loaders, get_test_loader(options.data_dir, img_size=None))
    while cell := next((cell for cell in wanted_cells() if claim(options.work, cell)), None):
        name, learning_rate, seed = cell
        result = run_cell(name, learning_rate, seed, loaders, options.work)
        write_cell("family", cell_of(*cell).stem.removeprefix("family-"), seed, f"{command} run", result)
        (options.work / f"{cell_of(*cell).stem}.claim").unlink()
        print(f"{time.strftime('%H:%M')} {name}, rate {learning_rate:g}, seed {seed}: validation "
              f"{result['val_acc']:.1%}, test {result.get('test_acc', float('nan')):.1%}, "
              f"{result['training_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
