"""Kill training runs at random times, resume them, and compare them with an uninterrupted run.

    python benchmarks/kills.py            sends 30 SIGKILLs
    python benchmarks/kills.py --keep     also keeps the outcome in benchmarks/results/

Three kinds of run take turns: a ViT on images in memory, with stochastic depth, averaged weights and class weights; a
ViT on photographs that worker processes read and augment; a ConvNet with batch normalisation and gradient accumulation
over three parts. A third of the kills happen while a file of the run is being written.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch
from results import write_cell

from vit_bridge.weights.checkpoints import read_checkpoint

KINDS = {
    "ViT in memory": (24, ["--model", "vit_nano", "--drop-path", "0.3", "--model-ema", "0.9", "--class-weights"]),
    "ViT on photographs": (72, ["--model", "vit_nano", "--num-workers", "2", "--drop-path", "0.1"]),
    "ConvNet in parts": (24, ["--model", "convnet", "--grad-accum-steps", "3"]),
}
COMMON = ["--epochs", "4", "--batch-size", "16", "--save-minutes", "0.001", "--device", "cpu", "--amp", "off"]


def make_photos(folder, side):
    """Write three classes of 40, 30 and 20 noisy images, each class with one stronger colour."""
    generator = np.random.default_rng(0)
    for channel, n in enumerate((40, 30, 20)):
        (folder / f"class{channel}").mkdir(parents=True)
        for i in range(n):
            pixels = generator.integers(0, 150, (side, side, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(folder / f"class{channel}" / f"{i}.jpg", quality=95)


def start(photos, folder, words):
    command = [sys.executable, str(HERE.parent / "train_vit.py"), "--data-dir", str(photos), *COMMON, *words,
               "--resume", "--output-dir", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))


def run_to_the_end(photos, folder, words):
    """Run training to its end and return the seconds; raise RuntimeError with the output if it fails."""
    started, process = time.monotonic(), start(photos, folder, words)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {output}")
    return time.monotonic() - started


def run_and_kill(photos, folder, words, seconds, in_a_write):
    """Start a run, kill it after this many seconds, and return what the kill interrupted.

    With in_a_write, the kill then waits until a file is being written.
    """
    process, until = start(photos, folder, words), time.monotonic() + seconds
    while process.poll() is None and (time.monotonic() < until or (in_a_write and not list(folder.glob("*.part")))):
        time.sleep(0.0002 if in_a_write else 0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    parts, last = [path.name for path in folder.glob("*.part")], folder / "last.pt"
    step = read_checkpoint(last)["training"]["step"] if last.exists() else None
    return dict(seconds=round(seconds, 2), ended=process.returncode == 0, in_a_write_of=parts, kept_step=step)


def outcome(folder):
    """Return the values that must be equal: the tensors by name, and the history without its times."""
    tensors = {}
    for file in ("last.pt", "best.pt"):
        entries = read_checkpoint(folder / file)
        collect(entries, file, tensors)
    with open(folder / "history.csv") as file:
        rows = [{name: value for name, value in row.items() if name not in ("seconds", "images_per_second")}
                for row in csv.DictReader(file)]
    return tensors, rows


def collect(entries, path, tensors):
    """Collect the tensors of nested dicts and lists by their path."""
    if isinstance(entries, torch.Tensor):
        tensors[path] = entries
    items = entries.items() if isinstance(entries, dict) else enumerate(entries) if isinstance(entries, list) else ()
    for key, value in items:
        collect(value, f"{path}/{key}", tensors)


def same(one, other):
    (tensors, rows), (others, other_rows) = one, other
    return rows == other_rows and tensors.keys() == others.keys() and all(
        torch.equal(value, others[name]) for name, value in tensors.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the outcome in benchmarks/results/")
    options = parser.parse_args()
    chance, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        scratch, whole = Path(scratch), {}
        for kind, (side, words) in KINDS.items():
            photos = scratch / str(side)
            if not photos.exists():
                make_photos(photos, side)
            whole[kind] = (run_to_the_end(photos, scratch / kind, words), outcome(scratch / kind))
            print(f"{kind}: {whole[kind][0]:.1f} s uninterrupted, {len(whole[kind][1][0])} tensors", flush=True)
        for i in range(options.kills):
            kind = list(KINDS)[i % len(KINDS)]
            (side, words), (seconds, expected), folder = KINDS[kind], whole[kind], scratch / "cut"
            in_a_write = i // len(KINDS) % 3 == 2
            instant = chance.uniform(0, 0.7 * seconds if in_a_write else seconds)
            met = run_and_kill(scratch / str(side), folder, words, instant, in_a_write)
            run_to_the_end(scratch / str(side), folder, words)
            rows.append(dict(kind=kind, **met, equal=same(outcome(folder), expected)))
            print(rows[-1], flush=True)
            shutil.rmtree(folder)
    equal, in_writes = sum(row["equal"] for row in rows), sum(bool(row["in_a_write_of"]) for row in rows)
    print(f"{equal} of {len(rows)} runs ended with every tensor and every row of the history equal; {in_writes} kills "
          f"interrupted the writing of a file")
    if options.keep:
        write_cell("kills", "cpu", options.seed, "python benchmarks/kills.py --keep", dict(device="cpu", rows=rows))
    sys.exit(equal < len(rows))


if __name__ == "__main__":
    main()
