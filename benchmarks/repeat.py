"""Train networks of the ladder or of reach again, as their files say or with one change.

    python benchmarks/repeat.py --data-dir CIFAR "ViT, CLS" "ViT, mean pooling" --keep      on another machine
    python benchmarks/repeat.py --data-dir CIFAR "ConvNeXt, convolutional stem" --as-fast-as ConvNet --keep
    python benchmarks/repeat.py --data-dir CIFAR "ViT, mean pooling" --minutes 2.5 --keep
    python benchmarks/repeat.py --data-dir CIFAR hybrid --lr 0.008 --keep
    python benchmarks/repeat.py --experiment reach Swin --steps 2000 --keep

Rounding differs between machines, and training amplifies it. So the weights differ after some steps, and the accuracies
should differ about as much as those of two seeds. The other commands are controls. Is a network worse only because it
makes fewer steps in the same minutes? What does half of the minutes reach alone? Is another learning rate better?
Does a network that fails in reach learn the task in more steps? Reach is tested at every distance.

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
from vit_bridge.cli import OneLineParser, int_at_least, positive, script
from vit_bridge.compare.ladder import RUNGS
from vit_bridge.compare.trained import REACH_ARMS
from vit_bridge.compare.trials import SEEDS, read_trial
from vit_bridge.errors import InputError, check_choice, join_words
from vit_bridge.runtime import choose_device
from vit_bridge.system import machine

DISTANCES = tuple(range(8, 27))  # all that the training images of reach have


def repeat(trial, plan, folder, as_fast_as=None, lr=None, **changes):
    """Train a trial again with the speed of another network, another learning rate or other arguments of measure().

    Returns its result, with that of its file as `first`.
    """
    first = read_trial(trial.path(folder))
    setting = plan.setting_of(trial.experiment, trial.arm)
    same = dict(recipe="recipes", images="images")
    if differing := [words for key, words in same.items() if first.get("setting", {}).get(key) != setting[key]]:
        raise InputError(f"{trial.path(folder)} was trained with other {join_words(differing)} than this version and "
                         f"--data-dir give")
    experiment = plan.experiments[trial.experiment]
    if experiment.needs_speeds:
        speeds = json.loads((folder / f"speeds-ladder-{trial.dataset}.json").read_text())["result"]["speeds"]
        speeds[trial.arm] = speeds[as_fast_as or trial.arm]
        changes |= dict(loaders=plan.loaders, speeds=speeds)
    chosen = dict(rate=dict(learning_rate=lr or first["result"]["learning_rate"]))
    result = experiment.measure(trial, chosen=chosen, **changes, **plan.run)
    kept = {key: first["result"][key] for key in ("correct", "n", "n_steps", "learning_rate")}
    return result | dict(device=choose_device(plan.run["device"]).type, first=dict(machine=first["machine"], **kept))


def main(argv=None):
    parser = OneLineParser(prog="repeat.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="NETWORK",
                        help=f"of the ladder: {'; '.join(RUNGS)}. Of reach: {'; '.join(REACH_ARMS)}")
    parser.add_argument("--experiment", choices=("ladder", "reach"), default="ladder")
    parser.add_argument("--data-dir", help="the images of the ladder")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], choices=SEEDS)
    parser.add_argument("--as-fast-as", choices=tuple(RUNGS), metavar="NETWORK", help="give it this network's steps")
    parser.add_argument("--minutes", type=positive(), help="of the ladder")
    parser.add_argument("--steps", type=int_at_least(1), help="of reach")
    parser.add_argument("--lr", type=positive(), help="learning rate (default: the one that was chosen)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results-dir", type=Path, default=cnn_vs_vit.COMMITTED, help="folder of the first files")
    parser.add_argument("--keep", action="store_true", help="keep the table `repeats` or `repeats-reach`")
    options = parser.parse_args(argv)
    on_ladder = options.experiment == "ladder"
    for name in ("steps",) if on_ladder else ("data_dir", "as_fast_as", "minutes"):
        if getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} has no effect on the experiment {options.experiment}")
    for arm in options.arms:
        check_choice("NETWORK", arm, tuple(RUNGS if on_ladder else REACH_ARMS))
    words = ["--train", "--device", options.device, "--amp", "off"]
    if on_ladder:
        words += ["--data-dir", options.data_dir or parser.error("the ladder needs --data-dir"), "--train-fractions",
                  "0.1", "1"]
    with tempfile.TemporaryDirectory() as empty:
        plan = cnn_vs_vit.make_plan([options.experiment], Path(empty), cnn_vs_vit.make_parser().parse_args(words))
    changed = {key: value for key in ("as_fast_as", "minutes", "steps", "lr") if (value := getattr(options, key))}
    arguments = {dict(steps="n_steps").get(key, key): value for key, value in changed.items()}
    arguments |= {} if on_ladder else dict(distances=DISTANCES)
    for arm, seed in product(options.arms, options.seeds):
        trial = next(one for one in plan.trials if (one.arm, one.seed) == (arm, seed))  # the smaller number of images
        result = repeat(trial, plan, options.results_dir, **arguments)
        first, again = result["first"], dict(result, machine=machine(result["device"]))
        print(f"{arm}, seed {seed}, {changed or 'the same'}: {_describe(again)}, validation {result['rates']}; first: "
              f"{_describe(first)}", flush=True)
        if options.keep:
            changed |= {} if result["device"] == "cpu" else dict(device=result["device"])
            more = [word for key, value in changed.items() for word in (f"--{key.replace('_', '-')}", str(value))]
            path = trial.path(Path()).stem.removeprefix(f"{options.experiment}-")
            name = "-".join([path, *(word.strip("-") for word in more)])
            which = ["--data-dir", "CIFAR"] if on_ladder else ["--experiment", "reach"]
            command = ["python", "benchmarks/repeat.py", *which, arm, "--seeds", str(seed), *more, "--keep"]
            write_cell("repeats" if on_ladder else "repeats-reach", name, seed, shlex.join(command), result)


def _describe(result):
    """Return what a training reached, in words."""
    correct = result["correct"] if isinstance(result["correct"], list) else [result["correct"]]
    shares = ", ".join(f"{count / result['n']:.1%}" for count in correct)
    return f"{shares} on {result['machine']} after {result['n_steps']:,} steps"


if __name__ == "__main__":
    script(main)
