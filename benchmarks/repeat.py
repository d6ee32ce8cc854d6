"""Train networks of the ladder again, on this machine, with the learning rates and the steps of their files.

    python benchmarks/repeat.py --data-dir CIFAR "ViT, CLS" "ViT, mean pooling"           prints the accuracies
    python benchmarks/repeat.py --data-dir CIFAR "ViT, CLS" "ViT, mean pooling" --keep    also keeps them
    python benchmarks/repeat.py --data-dir CIFAR "ConvNeXt, convolutional stem" --as-fast-as ConvNet

Rounding differs between machines, and training amplifies it. So the weights differ after some steps, and the accuracies
should differ about as much as those of two seeds. The third command asks whether a network is worse only because it
makes fewer steps in the same minutes: it gets as many steps as a faster network.
"""

import argparse
import json
import shlex
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from results import write_cell

import cnn_vs_vit
from vit_bridge.cli import OneLineParser, script
from vit_bridge.compare.ladder import RUNGS
from vit_bridge.compare.trials import SEEDS, read_trial
from vit_bridge.errors import check_choice
from vit_bridge.system import machine


def repeat(arm, seed, plan, folder, as_fast_as=None):
    """Train an arm again, perhaps with the speed of another; return its trial, and the result with that of its file."""
    trial = next(one for one in plan.trials if (one.arm, one.seed) == (arm, seed))  # the smaller number of images
    first = read_trial(trial.path(folder))
    speeds = json.loads((folder / f"speeds-ladder-{trial.dataset}.json").read_text())["result"]["speeds"]
    speeds[arm] = speeds[as_fast_as or arm]
    result = plan.experiments["ladder"].measure(trial, loaders=plan.loaders, speeds=speeds,
                                                chosen=dict(rate=first["result"]), **plan.run)
    return trial, result | dict(device=plan.run["device"], first=dict(
        machine=first["machine"], **{key: first["result"][key] for key in ("correct", "n", "n_steps")}))


def main(argv=None):
    parser = OneLineParser(prog="repeat.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="NETWORK", help=f"of the ladder: {'; '.join(RUNGS)}")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], choices=SEEDS)
    parser.add_argument("--as-fast-as", choices=tuple(RUNGS), metavar="NETWORK", help="give it this network's steps")
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
    faster = ["--as-fast-as", options.as_fast_as] if options.as_fast_as else []
    for arm, seed in product(options.arms, options.seeds):
        trial, result = repeat(arm, seed, plan, options.results_dir, options.as_fast_as)
        first = result["first"]
        print(f"{arm}, seed {seed}: {result['correct'] / result['n']:.1%} on {machine(result['device'])} after "
              f"{result['n_steps']:,} steps; {first['correct'] / first['n']:.1%} on {first['machine']} after "
              f"{first['n_steps']:,} steps", flush=True)
        if options.keep:
            words = ["python", "benchmarks/repeat.py", "--data-dir", "CIFAR", arm, "--seeds", str(seed), *faster]
            name = "-".join([trial.path(Path()).stem.removeprefix("ladder-"), *faster[1:]])
            write_cell("repeats", name, seed, shlex.join([*words, "--keep"]), result)


if __name__ == "__main__":
    script(main)
