"""DeiT, Swin and ConvNeXt on CIFAR-10 (JPEG): equal minutes, learning rates chosen with the first seed, three seeds.

    python benchmarks/family.py --data-dir CIFAR speeds          measures the speed of each arm, on an idle machine
    python benchmarks/family.py --data-dir CIFAR run             trains every cell that has no result yet
    python benchmarks/family.py --data-dir CIFAR plan            prints the cells and their minutes
    python benchmarks/family.py --data-dir CIFAR ship            keeps the weights of SHIPPED for load(name)
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import HERE, band, write_cell

from train_vit import Trainer, new_model, set_up_loader, trainer_for
from vit_bridge.analysis.metrics import wilson_interval
from vit_bridge.data.loaders import get_data_loaders, get_test_loader
from vit_bridge.plots.charts import finish, looks_of, new_figure, set_heading
from vit_bridge.system import write_json
from vit_bridge.training.config import RECIPES
from vit_bridge.training.objectives import Classification, Distillation
from vit_bridge.weights.checkpoints import load, save_model
from vit_bridge.weights.pretrained import OURS_FOLDER

TEACHER, TEACHER_MINUTES = "convnet_cifar10", 5  # the shipped ConvNet; its 2,958 steps take 4.8 minutes here
ROUNDS, ROUND_SECONDS = 8, 1.5
RATES, SEEDS = (5e-4, 1e-3, 2e-3), (0, 1, 2)
SHIPPED = {"deit_nano_cifar10": "DeiT, hard", "swin_nano_cifar10": "Swin", "convnext_nano_cifar10": "ConvNeXt"}


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
    "ViT, CLS": Arm("vit_nano_fast", dict(pool="cls")),
    "ViT, soft": Arm("vit_nano_fast", {}, "soft"),
    "ViT, hard": Arm("vit_nano_fast", {}, "hard"),
    "DeiT, no teacher": Arm("deit_nano_fast", {}),
    "DeiT, soft": Arm("deit_nano_fast", {}, "soft"),
    "DeiT, hard": Arm("deit_nano_fast", {}, "hard", rate_of="DeiT, soft"),
    "ViT, the teacher's minutes added": Arm("vit_nano_fast", {}, minutes=5 + TEACHER_MINUTES, rate_of="ViT"),
    "Swin": Arm("swin_nano_fast", {}),
    "Swin, no shift": Arm("swin_nano_fast", dict(shift=False), rate_of="Swin"),
    "Swin, no bias": Arm("swin_nano_fast", dict(relative_bias=False), rate_of="Swin"),
    "Hybrid": Arm("hybrid_fast", {}),
    "ConvNeXt": Arm("convnext_nano_fast", {}),
}


PANELS = {"What a teacher adds": ("ViT", "ViT, CLS", "ViT, the teacher's minutes added", "ViT, soft", "ViT, hard",
                                  "DeiT, no teacher", "DeiT, soft", "DeiT, hard"),
          "What mixes the positions": ("ViT", "Swin", "Swin, no shift", "Swin, no bias", "ConvNeXt", "Hybrid")}


def prepare(arm, loader, seed, learning_rate, device="cpu"):
    """Return (recipe, trainer) of an arm, ready to train on the loader."""
    arm = ARMS[arm]
    recipe = RECIPES[arm.recipe]
    recipe = replace(recipe, train=replace(recipe.train, learning_rate=learning_rate),
                     model_options=recipe.model_options | arm.options)
    set_up_loader(loader, recipe, seed)
    model, objective = new_model(recipe.model, recipe, loader, seed=seed), None
    if arm.kind:
        objective = Distillation(load(TEACHER), loader.preprocessing, arm.kind, label_smoothing=recipe.label_smoothing)
    return recipe, trainer_for(recipe, model, device, objective, amp="off")


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


def run_cell(name, learning_rate, seed, loaders, work, device):
    """Train an arm and return its result. The test images are read only if this is the arm's chosen rate."""
    train_loader, val_loader, test_loader = loaders
    path, result = work / f"{cell_of(name, learning_rate, seed).stem}.pt", read(name, learning_rate, seed)
    if result is None:
        recipe, trainer = prepare(name, train_loader, seed, learning_rate, device)
        n_steps, started = int(60 * ARMS[name].minutes * speed_of(name) / recipe.batch_size), time.perf_counter()
        trainer.train(train_loader, n_steps=n_steps, seed=seed, progress=False)
        model = trainer.model.eval()
        plain = trainer.evaluate(val_loader)
        save_model(model, path, train_loader.preprocessing)
        result = dict(arm=name, recipe=recipe.describe(), learning_rate=learning_rate, minutes=ARMS[name].minutes,
                      teacher=TEACHER if ARMS[name].kind else None, images_per_second=speed_of(name), n_steps=n_steps,
                      epochs=round(n_steps * recipe.batch_size / train_loader.n_images, 2),
                      parameters=sum(p.numel() for p in model.parameters()), val_acc=plain["acc"],
                      val_correct=plain["correct"], val_n=plain["n"], device=trainer.device.type,
                      precision="torch.float32", training_seconds=round(time.perf_counter() - started),
                      threads=torch.get_num_threads())
    if chosen_rate(name) == learning_rate or seed > 0:
        result |= read_test(path, device, "off", test_loader)
    return result


def ship(work, command):
    """Write the weights of the first seed into the package, in int8 steps."""
    for name, arm in SHIPPED.items():
        cell = cell_of(arm, chosen_rate(arm), SEEDS[0])
        save_model(load(work / f"{cell.stem}.pt"), OURS_FOLDER / f"{name}.pt", dtype=torch.int8, command=command,
                   seed=SEEDS[0], test_acc=read(arm, chosen_rate(arm), SEEDS[0])["test_acc"])
        print(f"{name}: {(OURS_FOLDER / f'{name}.pt').stat().st_size:,} bytes")


def accuracies(name):
    """Return the test accuracies of an arm, one for each seed."""
    rate = chosen_rate(name)
    results = [read(name, rate, seed) for seed in SEEDS] if rate else []
    return [result["test_acc"] for result in results if result and "test_acc" in result]


def draw():
    """Draw the test accuracies of all arms: a point for each seed, the mean, and the 95% interval of the mean."""
    figure = new_figure(12, 4.4)
    for axes, (title, names) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        found = {name: [100 * value for value in accuracies(name)] for name in names}
        found = {name: values for name, values in found.items() if values}
        looks = looks_of([name.split(",")[0] for name in found])
        for i, (name, values) in enumerate(found.items()):
            colour = looks[name.split(",")[0]].colour
            axes.plot(values, [i] * len(values), "o", color=colour, alpha=0.4, markersize=5)
            axes.errorbar(statistics.mean(values), i, xerr=band(values), fmt="D", color=colour, capsize=4)
        axes.set_yticks(range(len(found)), list(found))
        axes.invert_yaxis()
        axes.set_title(title, fontsize=12)
        axes.set_xlabel("test accuracy (%)")
        axes.grid(alpha=0.3)
    set_heading(figure, "CIFAR-10 (JPEG), equal minutes: points are seeds, diamonds and bars their mean and its 95% "
                        "interval")
    return finish(figure, None)


def claim(mark):
    """Return whether this process may train a cell; the file `mark` exists while another one trains it."""
    try:
        with open(mark, "x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        pid = mark.read_text()
        if pid and not Path(f"/proc/{pid}").exists():  # it was killed
            mark.unlink()
            return claim(mark)
        return False


def keep(table, path, seed, command, result):
    """Write the result of a cell. If only its test is new, the cell stays one of the machine that trained it."""
    if path.exists():
        write_json(json.loads(path.read_text()) | dict(result=result), path)
    else:
        write_cell(table, path.stem.removeprefix(f"{table}-"), seed, command, result)


def read_test(weights, device, amp, loader):
    """Return the entries of a result about the test images, for the model in a file."""
    tested = Trainer(load(weights), device, Classification(0.1), amp=amp).evaluate(loader)
    return dict(test_acc=tested["acc"], test_correct=tested["correct"], test_n=tested["n"],
                test_interval=wilson_interval(tested["correct"], tested["n"]))


def mark_of(work, cell):
    """Return the file that marks a cell in training."""
    return work / f"{cell_of(*cell).stem}.claim"


def run_job(options, loaders, command):
    """Train cells until none is left, or until too little time is left for another."""
    torch.backends.cudnn.allow_tf32 = False  # convolutions on a GPU in float32, too
    started, longest = time.perf_counter(), 0
    while time.perf_counter() - started + longest < 60 * options.until:
        cell = next((cell for cell in wanted_cells() if claim(mark_of(options.work, cell))), None)
        if cell is None:
            return
        name, learning_rate, seed = cell
        begun = time.perf_counter()
        result = run_cell(name, learning_rate, seed, loaders, options.work, options.device)
        longest = max(longest, time.perf_counter() - begun)
        keep("family", cell_of(*cell), seed, f"{command} run", result)
        mark_of(options.work, cell).unlink()
        print(f"{time.strftime('%H:%M:%S')} {name}, rate {learning_rate:g}, seed {seed}: validation "
              f"{result['val_acc']:.1%}, test {result.get('test_acc', float('nan')):.1%}, "
              f"{result['training_seconds']} s", flush=True)


def main():
    """Measure the speeds, or train the cells.

    An arm trains for as many steps as fit into its minutes on two idle cores, with the time of its teacher counted. The
    speeds are measured first, in rounds in which all arms take turns. The result of those steps depends neither on the
    load of the machine nor on the device, so several cells train at a time, on a CPU one thread each. Rates are chosen
    with seed 0 on the 5,000 validation images that train_vit.py splits off; test images are read for the chosen rate
    only.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/family"), help="folder for the trained weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the cells are trained")
    parser.add_argument("--jobs", type=int, default=2, help="processes that train at the same time")
    parser.add_argument("--until", type=float, default=float("inf"), help="minutes after which no cell is started")
    parser.add_argument("command", choices=("speeds", "run", "plan", "ship"))
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
    if options.command == "speeds":
        loader = get_data_loaders(options.data_dir, img_size=None)[0]
        write_cell("family-speeds", "cpu", 0, f"{command} speeds",
                   dict(speeds=measure_speeds(loader), threads=torch.get_num_threads(), device="cpu"))
        return
    if options.command == "ship":
        ship(options.work, f"{command} run")
        return
    torch.set_num_threads(1)
    loaders = (*get_data_loaders(options.data_dir, img_size=None), get_test_loader(options.data_dir, img_size=None))
    fork = multiprocessing.get_context("fork")  # the jobs share the decoded images
    jobs = [fork.Process(target=run_job, args=(options, loaders, command)) for _ in range(options.jobs)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    sys.exit(max(job.exitcode for job in jobs))


if __name__ == "__main__":
    main()
