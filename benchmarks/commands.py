"""Measure the time of the commands that a reader runs first, and store the comparison of the shipped models.

    python benchmarks/commands.py          runs each command three times, in turns, and prints the seconds
    python benchmarks/commands.py --keep   also keeps both tables: `commands`, and `shipped` from cnn_vs_vit.py

Each time is the wall time of a new process, offline; run this on an otherwise idle machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from results import write_cell

from vit_bridge.compare.experiments import EXPERIMENTS
from vit_bridge.data.images import sample_photographs
from vit_bridge.system import ROOT

ROUNDS = 3
COMMANDS = {
    "examples": "python examples.py",
    "comparison": "python cnn_vs_vit.py --output-dir {folder}/comparison-{turn}",
    "look": "python visualizations.py {photo} --pretrained vit_nano_cifar10 --output-dir {folder}/look-{turn}",
}


def seconds_of(command, folder, turn):
    """Run a command and return its wall time in seconds."""
    words = command.format(folder=folder, turn=turn, photo=sample_photographs()[1]).split()
    environment = dict(os.environ, MPLBACKEND="Agg")
    start = time.perf_counter()
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    seconds = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):
            for name, command in COMMANDS.items():
                seconds[name].append(seconds_of(command, folder, turn))
                print(f"{name}: {seconds[name][-1]:.0f} s", flush=True)
        found = json.loads((Path(folder) / f"comparison-{ROUNDS - 1}" / "results.json").read_text())
    result = {name: dict(command=COMMANDS[name].split(" --output-dir")[0].replace("{photo}", "photo.jpg"),
                         seconds=own, median=median(own)) for name, own in seconds.items()}
    if options.keep:
        write_cell("commands", "cpu", None, "python benchmarks/commands.py --keep", result)
        shipped = {name: one["data"] for name, one in found["results"].items() if name in EXPERIMENTS}
        write_cell("shipped", "cpu", 0, "python cnn_vs_vit.py", shipped)


if __name__ == "__main__":
    main()
