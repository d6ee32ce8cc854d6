"""Compare one process with several, and whole batches with gradient accumulation, on the same training run.

    python benchmarks/processes.py            prints the largest differences
    python benchmarks/processes.py --keep     also keeps them in benchmarks/results/ and figures/processes.png

There are 363 training, 40 validation and 43 test images, so that the last batch is small and the processes have unequal
shares.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from results import write_cell

from vit_bridge.plots.charts import plot_curves

WAYS = {"1 process": (1, []), "2 processes": (2, []), "3 processes": (3, []),
        "1 process, in 4 parts": (1, ["--grad-accum-steps", "4"])}
COMMON = ["--epochs", "6", "--batch-size", "33", "--model", "vit_nano", "--device", "cpu", "--amp", "off"]


def make_images(folder):
    """Write five classes of noisy images, each with a faint colour, into train/ and test/."""
    generator = np.random.default_rng(0)
    for part, n_images in (("train", 403), ("test", 43)):
        for i in range(n_images):
            label = i % 5
            pixels = generator.normal(128, 60, (32, 32, 3)) + generator.normal(0, 30, 3)
            pixels += 40 * np.array([label & 1, label >> 1 & 1, label >> 2])
            (folder / part / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / part / str(label) / f"{i}.png")


def run(data, folder, n_processes, words):
    """Run one training and return (history as a dict of lists, result)."""
    launcher = [sys.executable]
    if n_processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={n_processes}"]
    command = [*launcher, str(HERE.parent / "train_vit.py"), "--data-dir", str(data), *COMMON, *words, "--output-dir",
               str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=dict(os.environ, OMP_NUM_THREADS="1"))
    with open(folder / "history.csv") as file:
        rows = list(csv.DictReader(file))
    return ({name: [float(row[name]) for row in rows] for name in rows[0]},
            json.loads((folder / "result.json").read_text()))


def compare(histories, results):
    """Return one row per way: the largest differences from one process, and its counts."""
    rows, base = [], histories["1 process"]
    for way, history in histories.items():
        differences = {f"{name} difference": max(abs(a - b) for a, b in zip(history[name], base[name], strict=True))
                       for name in ("train_loss", "val_loss", "val_acc")}
        rows.append(dict(way=way, **differences, test_n=results[way]["test_n"],
                         test_correct=results[way]["test_correct"],
                         images_per_second=results[way]["images_per_second"]))
    return rows


def draw(curves, save_path=None):
    """Draw the training loss of each way against the epoch. curves: way -> {"train_loss": one value per epoch}."""
    losses = {way: list(enumerate(history["train_loss"], start=1)) for way, history in curves.items()}
    return plot_curves({"Training loss": losses}, "epoch", "cross-entropy (nats)", save_path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--keep", action="store_true", help="keep the outcome in benchmarks/")
    options = parser.parse_args()
    histories, results = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "images"
        make_images(data)
        for way, (n_processes, words) in WAYS.items():
            histories[way], results[way] = run(data, Path(scratch) / way, n_processes, words)
    rows = compare(histories, results)
    for row in rows:
        print(row)
    if options.keep:
        curves = ("train_loss", "val_loss")
        write_cell("processes", "cpu", 0, "python benchmarks/processes.py --keep",
                   dict(device="cpu", rows=rows, curves={way: {name: histories[way][name] for name in curves}
                                                         for way in WAYS}))
        draw(histories, HERE / "figures" / "processes.png")


if __name__ == "__main__":
    main()
