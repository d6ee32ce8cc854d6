"""Train networks of the ladder again, as their files say or with one change.

    python benchmarks/repeat.py --data-dir CIFAR "ViT, CLS" "ViT, mean pooling" --keep      on another machine
    python benchmarks/repeat.py --data-dir CIFAR "ConvNeXt, convolutional stem" --as-fast-as ConvNet --keep
    python benchmarks/repeat.py --data-dir CIFAR "ViT, mean pooling" --minutes 2.5 --keep
    python benchmarks/repeat.py --data-dir CIFAR hybrid --lr 0.008 --keep

Rounding differs between machines, and training amplifies it. So the weights differ after some steps, and the accuracies
should differ about as much as those of two seeds. The other commands are controls. Is a network worse only because it
makes fewer steps in the same minutes? What does half of the minutes reach alone? Is another learning rate better?
Without --keep, the accuracies are only printed.
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
from vit_bridge.cli import OneLineParser, positive, script
from vit_bridge.compare.ladder import MINUTES, RUNGS
from vit_bridge.compare.trials import SEEDS, read_trial
from vit_bridge.errors import check_choice
from vit_bridge.system import machine


def repeat(trial, plan, folder, as_fast_as=None, minutes=MINUTES, lr=None):
    """Train a trial again with the speed of another network, for other minutes or with another learning rate.

    Returns its result, with that of its file as `first`.
    """
    first = read_trial(trial.path(folder))
    speeds = json.loads((folder / f"speeds-ladder-{trial.dataset}.json").read_text())["result"]["speeds"]
    speeds[trial.arm] = speeds[as_fast_as or trial.arm]
    chosen = dict(rate=dict(learning_rate=lr or first["result"]["learning_rate"]))
    result = plan.experiments["ladder"].measure(trial, loaders=plan.loaders, speeds=speeds, chosen=chosen,
                                                minutes=minutes, **plan.run)
    kept = {key: first["result"][key] for key in ("correct", "n", "n_steps", "learning_rate")}
    return result | dict(device=plan.run["device"], first=dict(machine=first["machine"], **kept))


def main(argv=None):
    parser = OneLineParser(prog="repeat.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="NETWORK", help=f"of the ladder: {'; '.join(RUNGS)}")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], choices=SEEDS)
    parser.add_argument("--as-fast-as", choices=tuple(RUNGS), metavar="NETWORK", help="give it this network's steps")
    parser.add_argument("--minutes", type=positive(), default=MINUTES)
    parser.add_argument("--lr", type=positive(), help="learning rate (default: the one that was chosen)")
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
    changed = {key: getattr(options, key) for key in ("as_fast_as", "minutes", "lr")
               if getattr(options, key) != parser.get_default(key)}
    for arm, seed in product(options.arms, options.seeds):
        trial = next(one for one in plan.trials if (one.arm, one.seed) == (arm, seed))  # the smaller number of images
        result = repeat(trial, plan, options.results_dir, **changed)
        first = result["first"]
        print(f"{arm}, seed {seed}, {changed or 'the same'}: {result['correct'] / result['n']:.1%} on "
              f"{machine(result['device'])} after {result['n_steps']:,} steps, validation {result['rates']}; "
              f"{first['correct'] / first['n']:.1%} on {first['machine']} after {first['n_steps']:,} steps", flush=True)
        if options.keep:
            more = [word for key, value in changed.items() for word in (f"--{key.replace('_', '-')}", str(value))]
            name = "-".join([trial.path(Path()).stem.removeprefix("ladder-"), *(word.strip("-") for word in more)])
            command = ["python", "benchmarks/repeat.py", "--data-dir", "CIFAR", arm, "--seeds", str(seed), *more]
            write_cell("repeats", name, seed, shlex.join([*command, "--keep"]), result)


if __name__ == "__main__":
    script(main)
