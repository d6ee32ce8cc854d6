"""The results that the project keeps: one JSON file a run, and the page that is drawn from them.

    python benchmarks/results.py add TABLE runs/NAME     keeps the result of a run of train_vit.py in a table
    python benchmarks/results.py ship NAME runs/NAME     puts its best model into benchmarks/weights, in float16
    python benchmarks/results.py page                    writes benchmarks/RESULTS.md anew from all of them
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
TABLES = {
    "shapes": "The built-in shapes, two minutes (`python train_vit.py --seed SEED`)",
    "cifar10-jpeg": "CIFAR-10 (JPEG), five minutes (`python train_vit.py --data-dir DIR --minutes 5 --model MODEL`). "
                    "JPEG is lossy: accuracies published for the original files are 2 to 3 points higher",
    "weights": "The models in benchmarks/weights, on the built-in shapes (the command is in each result; then "
               "`python benchmarks/results.py ship NAME runs/RUN`)",
}


INTRODUCTION = """# Results

Drawn from the files in results/ by `python benchmarks/results.py page`. Accuracies are of the test images, read once
at the end of a run, with their 95% Wilson interval; `linear` is a linear classifier on the pixels, trained and tested
on the same images; `data` the share of the training seconds that went to fetching and augmenting (at commit 602f427
the share of the whole run's)."""


def machine():
    """What a figure was measured on, in words."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}"


def add(table, run):
    """Writes results/<table>-<model>-<seed>.json from the result.json of a run."""
    result = json.loads((run / "result.json").read_text())
    write_cell(table, f"{result['model']}-{result['seed']}", result["seed"], result["command"], result,
               versions=dict(torch=result["torch"], torchvision=result["torchvision"]))


def write_cell(table, name, seed, command, result, versions=None):
    """Writes results/<table>-<name>.json: the result, and where it comes from.

    versions: of packages, by name; None: of those installed here that a result may depend on.
    """
    cell = dict(table=table, commit=commit(), date=datetime.date.today().isoformat(), machine=machine(),
                versions=dict(python=platform.python_version(), **(versions or installed())), seed=seed,
                command=command, result=result)
    path = HERE / "results" / f"{table}-{name}.json"
    path.write_text(json.dumps(cell, indent=2) + "\n")
    print(path)


def commit():
    """The short hash of the checkout's commit, with -dirty where a tracked file differs from it; or "unknown"."""
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=HERE, capture_output=True,
                          text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def installed():
    """The versions of the packages that are measured or measured against."""
    versions = {}
    for package in ("torch", "torchvision", "timm", "transformers", "vit-pytorch"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def ship(name, run):
    """Writes weights/<name>.pt, which create_pretrained(name) loads, from the best.pt of a run."""
    import torch

    sys.path.insert(0, str(HERE.parent))
    from model_zoo import load_model, save_model

    result = json.loads((run / "result.json").read_text())
    path = HERE / "weights" / f"{name}.pt"
    save_model(load_model(run / "best.pt"), path, dtype=torch.float16, command=result["command"], seed=result["seed"],
               test_acc=result["test_acc"])
    print(f"{path}: {path.stat().st_size:,} bytes")


def page():
    """RESULTS.md: a table for each group of results, a row a run, and the mean over seeds."""
    tables = defaultdict(list)
    for path in sorted((HERE / "results").glob("*.json")):
        cell = json.loads(path.read_text())
        tables[cell["table"]].append(cell)
    lines = [*INTRODUCTION.splitlines(), ""]
    for table, title in TABLES.items():
        if not tables[table]:
            continue
        lines += [f"## {table}", "", f"{title}.", "",
                  "| model | seed | test accuracy | interval | linear | images/s | data | steps | seconds | commit |",
                  "|---|---:|---:|---|---:|---:|---:|---:|---:|---|"]
        by_model = defaultdict(list)
        for cell in tables[table]:
            r = cell["result"]
            by_model[r["model"]].append(r["test_acc"])
            low, high = r["test_interval"]
            lines.append(f"| {r['model']} | {r['seed']} | {r['test_acc']:.1%} | {low:.1%} to {high:.1%} | "
                         f"{r['linear_test_acc']:.1%} | {r['images_per_second']:.0f} | {r['data_share']:.1%} | "
                         f"{r['n_steps']} | {r['seconds']:.0f} | {cell['commit']} |")
        lines.append("")
        for model, accuracies in by_model.items():
            if len(accuracies) > 1:
                lines += [f"{model}, {len(accuracies)} seeds: mean {mean(accuracies):.1%}, standard deviation "
                          f"{100 * stdev(accuracies):.1f} points.", ""]
        for where in sorted({f"{c['machine']}; torch {c['versions']['torch']}; {c['date']}" for c in tables[table]}):
            lines += [f"Measured on {where}.", ""]
    (HERE / "RESULTS.md").write_text("\n".join(lines).rstrip() + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("table", choices=TABLES)
    adding.add_argument("run", type=Path)
    shipping = commands.add_parser("ship")
    shipping.add_argument("name")
    shipping.add_argument("run", type=Path)
    commands.add_parser("page")
    options = parser.parse_args()
    if options.command == "add":
        add(options.table, options.run)
    if options.command == "ship":
        ship(options.name, options.run)
    page()


if __name__ == "__main__":
    main()
