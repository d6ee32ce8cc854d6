"""Train networks of the ladder again, on this machine, with the learning rates and the steps of their files.

    python benchmarks/repeat.py --data-dir CIFAR "ViT, CLS" "ViT, mean pooling"           prints the accuracies
    python benchmarks/repeat.py --data-dir CIFAR "ViT, CLS" "ViT, mean pooling" --keep    also keeps them

Rounding differs between machines, and training amplifies it. So the weights differ after some steps, and the accuracies
should differ about as much as those of two seeds.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from results import write_cell

import cnn_vs_vit
from vit_bridge.cli import OneLineParser, script
from vit_bridge.compare.ladder import RUNGS
from vit_bridge.compare.trials import read_trial
from vit_bridge.errors import check_choice
from vit_bridge.system import machine


def repeat(arm, plan, folder):
    """Train the first seed of an arm again; return the result, with the accuracy and the machine of the first time."""
    trial = next(one for one in plan.trials if one.arm == arm)  # the smaller number of images
    first = read_trial(trial.path(folder))
    speeds = json.loads((folder / f"speeds-ladder-{trial.dataset}.json").read_text())["result"]["speeds"]
    result = plan.experiments["ladder"].measure(trial, loaders=plan.loaders, speeds=speeds,
                                                chosen=dict(rate=first["result"]), **plan.run)
    return trial, result | dict(device=plan.run["device"], first=dict(
        machine=first["machine"], correct=first["result"]["correct"], n=first["result"]["n"]))


def main(argv=None):
    parser = OneLineParser(prog="repeat.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="NETWORK", help=f"of the ladder: {'; '.join(RUNGS)}")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results-dir", type=Path, default=cnn_vs_vit.COMMITTED, help="folder of the ladder's files")
    parser.add_argument("--keep", action="store_true", help="keep the table `repeats`")
    options = parser.parse_args(argv)
    for arm in options.arms:
        check_choice("NETWORK", arm, tuple(RUNGS))
    words = ["--train", "--data-dir", options.data_dir, "--train-fractions", "0.1", "1", "--device", options.device,
             "--amp", "off"]
    with tempfile.TemporaryDirectory() as empty:
        plan = cnn_vs_vit.make_plan(["ladder"], Path(empty), cnn_vs_vit.make_parser().parse_args(words))
    for arm in options.arms:
        trial, result = repeat(arm, plan, options.results_dir)
        print(f"{arm}: {result['correct'] / result['n']:.1%} on {machine(result['device'])}; "
              f"{result['first']['correct'] / result['first']['n']:.1%} on {result['first']['machine']}", flush=True)
        if options.keep:
            write_cell("repeats", trial.path(Path()).stem.removeprefix("ladder-"), trial.seed,
                       f'python benchmarks/repeat.py --data-dir CIFAR "{arm}" --keep', result)


if __name__ == "__main__":
    script(main)
