"""Where the numbers on README and docs come from: for each page its measured numbers, and those with another source.

`measured` has (text, value, ...): the text as it stands on the page, with a format field for each value, and the values
from the cells in benchmarks/results (`cell`, `seeds`) or from the code (`parameters`). `stated` has (text, source): a
number that nobody here measured, as it stands on the page, and the paper, table or definition it comes from.
Line breaks do not matter. tests/test_numbers.py checks that each text is on its page, and that no other number there
looks measured (a decimal fraction, a percentage, or a number with a unit of time, memory or accuracy).
"""

import json
import math
from functools import cache
from pathlib import Path
from statistics import geometric_mean, mean, stdev

import torch

import vit_bridge.models
import vit_model
from benchmarks.results import band
from vit_bridge.compare.ladder import BESIDE, CHANGES, MORE, PLAIN, STEPS, gains_of, samples_of
from vit_bridge.compare.trials import read_trials

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def cell(name, *keys):
    """Return what a cell holds: cell("weights-vit_nano-bf16-0", "test_acc")."""
    value = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["result"]
    for key in keys:
        value = value[key]
    return value


def seeds(pattern, *keys):
    """Return the same value of several cells, in the order of their names: seeds("targets-hybrid-10-hybrid_fast-?",
    "test_acc")."""
    found = sorted(RESULTS.glob(f"{pattern}.json"))
    assert found, f"no cell is named {pattern}.json"
    return [cell(path.stem, *keys) for path in found]


def parameters(create, **options):
    """Return the number of parameters of a model: parameters("create_vit_base", n_classes=10)."""
    build = getattr(vit_model, create, None) or getattr(vit_bridge.models, create)
    with torch.device("meta"):
        return sum(p.numel() for p in build(**options).parameters())


def accuracies(pattern):
    """Return the share of correct images of several cells."""
    return [right / n for right, n in zip(seeds(pattern, "correct"), seeds(pattern, "n"), strict=True)]


def points(difference):
    """Return a difference of shares in points."""
    return 100 * difference


def smallest_ratio(name):
    """Return our speed over that of the fastest other library, from a cell of the table throughput."""
    return min(one["ratio"][0] for library, one in cell(name, "libraries").items() if library != "ours")


def arm(name):
    """Return (mean test accuracy in per cent, half its 95% interval) of an arm of benchmarks/family.py."""
    results = [cell(path.stem) for path in RESULTS.glob("family-*.json") if path.stem != "family-speeds-cpu"]
    found = [100 * one["test_acc"] for one in results if one["arm"] == name and "test_acc" in one]
    return mean(found), band(found)


def pretraining(name, n_labels):
    """Return (mean test accuracy in per cent, half its 95% interval) of an arm of benchmarks/pretraining.py.

    For "... probe", it is the linear probe on a start.
    """
    start = name.removesuffix(" probe")
    results = [cell(path.stem) for path in RESULTS.glob("pretraining-*.json") if path.stem != "pretraining-speeds-cpu"]
    found = [100 * one["probe"][str(n_labels)]["test_acc"] for one in results if one["name"] == start and "probe" in one
             ] if start != name else [100 * one["test_acc"] for one in results
                                      if (one["name"], one["n_labels"]) == (name, n_labels) and "test_acc" in one]
    return mean(found), band(found)


@cache
def ladder():
    """Return the results of the ladder's trials."""
    return [trial["result"] for trial in read_trials(["ladder"], [RESULTS])["ladder"]]


def ladder_mean(name):
    """Return the mean test accuracy of a bar of the ladder."""
    return mean(samples_of(ladder())[name])


def ladder_gain(before, after):
    """Return (gain, half of its interval) between two bars of the ladder, in points."""
    return map(points, gains_of(ladder())[before, after])


def before_and_again(name):
    """Return the test accuracy of a network that was trained again, and that of the first time."""
    result = cell(f"repeats-cifar10-jpeg-{name}")
    return [one["correct"] / one["n"] for one in (result, result["first"])]


def mean_and_spread(pattern, *keys):
    """Return the mean over seeds and the standard deviation in points."""
    values = seeds(pattern, *keys)
    return mean(values), points(stdev(values))


def few_images(method):
    return mean_and_spread(f"few-images-{method}-?", "test", "accuracy")


def lead(name, other, *keys):
    """Return the smallest and the largest lead of cells over others with the same seeds, in points."""
    pairs = zip(*(seeds(f"{one}-?", *(keys or ["test_acc"])) for one in (name, other)), strict=True)
    leads = [points(first - second) for first, second in pairs]
    return min(leads), max(leads)


def lead_with_few_images(method, other):
    return lead(f"few-images-{method}", f"few-images-{other}", "test", "accuracy")


def reach_range(name, *distances):
    """Return the lowest and the highest accuracy of all seeds at these distances in reach."""
    found = [trial["result"] for trial in read_trials(["reach"], [RESULTS])["reach"] if trial["result"]["arm"] == name]
    assert len(found) == 3
    accuracies = [one["correct"][one["distances"].index(distance)] / one["n"] for one in found
                  for distance in distances]
    return min(accuracies), max(accuracies)


def cue_row(name):
    """Return the row of a network in the table of outline and texture."""
    pattern = f"cues-{name.replace(', ', '-').replace(' ', '-')}-?"
    biases = seeds(pattern, "shape_bias")
    return (f"| {name} | {{:.0%}} ({{:.0%}} to {{:.0%}}) | {{:.1%}} |", mean(biases), min(biases), max(biases),
            mean(seeds(pattern, "val_acc")))


def right_everywhere(name, window):
    """Return the row of a network that is right at every distance in reach."""
    everywhere = round(reach_range(name, 8, 12, 16, 20, 23, 26)[0], 2)
    return f"| {name} | {window} | {{0:.0%}} | {{0:.0%}} | {{0:.0%}} |", everywhere


class Page:
    """The numbers of one page."""

    def __init__(self, measured=(), stated=()):
        self.measured, self.stated = list(measured), list(stated)


PAGES = {}

# ---- README.md --------------------------------------------------------------------------------------------

PAGES["README.md"] = Page(
    measured=[
        ("The ViT reached {:.1%}, the hybrid {:.1%} and the ConvNet {:.1%} (float32)",
         mean(seeds("targets-vit_nano-10-vit_nano_fast-?", "test_acc")),
         mean(seeds("targets-hybrid-10-hybrid_fast-?", "test_acc")),
         mean(seeds("targets-convnet-10-convnet_wide-?", "test_acc"))),
        ("a ViT reached {:.1%}, a hybrid {:.1%} and a ConvNet {:.1%}", *map(ladder_mean, (PLAIN, "hybrid", "ConvNet"))),
        ("The Swin lost {:.1f} points against the hybrid",
         -next(ladder_gain("hybrid", "Swin, convolutional stem"))),
        ("ten times the labels gained {:.1f}", next(ladder_gain(PLAIN, MORE))),
        ("A ViT-Tiny training step was {:.0%} faster than the same step in the fastest of four other libraries",
         smallest_ratio("throughput-cpu-tiny-16-training-float32") - 1),
        ("{} runs were killed at random moments and resumed; all ended with the same tensors as an uninterrupted run. "
         "({} had no checkpoint yet and started again.)",
         len(cell("kills-cpu", "rows")), sum(row["kept_step"] is None for row in cell("kills-cpu", "rows"))),
        ("a CNN teacher cost {:.1f} points in five minutes. A hybrid as the teacher, in twelve minutes, [did help]: "
         "{:.1f}% instead of {:.1f}%",
         -next(ladder_gain(PLAIN, "labels from the ConvNet")),
         *(pretraining(name, 4_500)[0] for name in ("ViT taught by the hybrid", "ViT, 10 minutes more"))),
        ("in five minutes, {:.1f}% on labels alone and {:.1f}% with a hard teacher",
         *(arm(name)[0] for name in ("ViT", "ViT, hard"))),
        ("raised a ViT from {:.1f}% to {:.1f}% with 4,500 labels, and from {:.1f}% to {:.1f}% with 45,000. With "
         "45,000, ten more minutes of ordinary training raised it to {:.1f}%. With 4,500, a hybrid reached {:.1f}%",
         *(pretraining(name, n)[0] for n in (4_500, 45_000) for name in ("ViT", "MAE, fine-tuned")),
         pretraining("ViT, 10 minutes more", 45_000)[0], pretraining("hybrid", 4_500)[0]),
        ("| `create_vit_nano` (32 pixels) | {:.1f}M |", parameters("create_vit_nano", n_classes=1000) / 1e6),
        *((f"| `create_vit_{size}` | {{:.1f}}M |", parameters(f"create_vit_{size}", n_classes=1000) / 1e6)
          for size in ("tiny", "small", "base", "large")),
    ],
    stated=[
        ("Python 3.11 or newer", "pyproject.toml"),
        ("a 90-minute lesson", "lesson.ipynb, its timetable"),
        ("torch 2.7 and matplotlib 3.10 are the oldest that work. Use torch 2.10", "requirements.txt"),
        ("a new model in ten minutes", "docs/extending.md"),
        ("with DINOv2 (an 88 MB download)", "weights/pretrained.py, megabytes of the file; tests/weights checks it"),
        ("A ConvNet for the 2020s", "the title of the paper"),
    ],
)

# ---- docs/comparison.md -----------------------------------------------------------------------------------

KINDS = ("ConvNet", "Hybrid", "ViT")
TRIOS = ("shipped-cpu", "shipped-cifar10-cpu")
UNTRAINED = "random weights"


def shipped(experiment, *keys):
    """Return a value for each of KINDS in each of TRIOS; "KIND" among the keys is the kind."""
    return [cell(trio, experiment, *(kind if key == "KIND" else key for key in keys))
            for trio in TRIOS for kind in KINDS]


def columns(text, n=6):
    """Return a row of a table with a format field in each of n columns: columns("{:.1f}") is "{:.1f} | {:.1f} ..."."""
    return " | ".join([text] * n)


def verdict_rows(what, n_models):
    """Return the rows of benchmarks/verdict_errors.py about this number of models: {number of images: row}."""
    return {row["n_images"]: row for row in cell("verdict-errors-cpu", "rows") if row["what"] == what
            and len(row["levels"]) == n_models}


def announced(n_images):
    """Return the smallest lead that is announced for six models and this number of images, in points."""
    best, second, *_ = verdict_rows("a true lead", 6)[n_images]["levels"]
    return points(best - second)


def off_diagonal(matrix):
    """Return the mean of a square matrix without its diagonal."""
    n = len(matrix)
    return mean(matrix[i][j] for i in range(n) for j in range(n) if i != j)


def kept(change):
    """Return for each of shipped() the fraction of its correct predictions that are still correct after a change."""
    return [counts[-1] / counts[0] for counts in shipped("position", "models", "KIND", "correct", change)]


def first_heads(weights):
    """Return the distance of the nearest and of the farthest head of the first block, for each hybrid and ViT."""
    heads = [cell(trio, "attention_distance", kind, weights)[0] for trio in TRIOS for kind in KINDS[1:]]
    return [end for own in heads for end in (min(own), max(own))]


def shares_of(candidate, draw):
    """Return the accuracy of each seed of a candidate on one of the three folders of photographs."""
    return [row["right"] / row["n"] for row in cell(f"verdicts-photographs-{draw}", "results", candidate, "rows")]


def on_photographs(candidate):
    """Return the lowest and the highest accuracy of a candidate on the three folders of photographs."""
    shares = [share for draw in range(3) for share in shares_of(candidate, draw)]
    return min(shares), max(shares)


PAGES["docs/comparison.md"] = Page(
    measured=[
        ("reached {:.0%} to {:.0%}, and a new ViT {:.0%} to {:.0%}",
         *on_photographs("fine-tuned vit_nano_shapes"), *on_photographs("ViT from scratch")),
        ("no setting had more than {:.1%} of comparisons with a false claim",
         max(row["false_claims"] / row["n"] for row in cell("verdict-errors-cpu", "rows"))),
        ("30 test images, it finds only leads of about {:.0f} points; with 1,000 images, leads of about {:.0f} points",
         announced(30), announced(1000)),
        (f"parameters, thousands | {columns('{:.0f}')} |",
         *(rows[0]["parameters"] / 1e3 for rows in shipped("cost", "resolution", "KIND"))),
        ("(a multiply-add counts as 2) | {:.0f} | {:.1f} | {:.1f} | {:.1f} | {:.1f} | {:.1f} |",
         *(rows[0]["flops"] / 1e6 for rows in shipped("cost", "resolution", "KIND"))),
        (f"from 32 to 512 pixels | {columns('{:.2f}')} |", *shipped("cost", "exponents", "KIND", "flops")),
        ("last unit, pixels | {} | | | {} | | |",
         *(cell(trio, "receptive_field", "ConvNet")[-1]["window"] for trio in TRIOS)),
        (f"half of its gradient | {columns('{:.1f}')} | | … with random weights | {columns('{:.1f}')} |",
         *(rows[-1][weights][0] for weights in ("trained", UNTRAINED) for rows in shipped("receptive_field", "KIND"))),
        (" | | ".join(["first block's heads, pixels", *[columns("{:.1f} to {:.1f}", 2)] * 2, "… with random weights",
                       *[columns("{:.1f} to {:.1f}", 2)] * 2]) + " |",
         *(end for weights in ("trained", UNTRAINED) for end in first_heads(weights))),
        (f"two different layers, mean | {columns('{:.2f}')} | | … with random weights | {columns('{:.2f}')} |",
         *(off_diagonal(matrix) for weights in ("within", UNTRAINED) for matrix in shipped("similarity", weights,
                                                                                           "KIND"))),
        (f"by up to 4 pixels | {columns('{:.0%}')} | | … by 5 pixels | {columns('{:.0%}')} |",
         *shipped("position", "models", "KIND", "consistency"),
         *shipped("position", "models", "KIND", "consistency_beyond")),
        (f"by up to 4 pixels, with random weights | {columns('{:.0%}')} |",
         *shipped("position", "models", "KIND", "consistency, random weights")),
        ("CLS lowers its row to {:.1f} to {:.1f} pixels",
         *(end(cell("shipped-cifar10-cpu", "attention_distance", "Hybrid", "trained, CLS counted")[0])
           for end in (min, max))),
        ("keep at least {:.0%} of their predictions",
         min(shipped("position", "models", "KIND", "consistency_beyond"))),
        ("took {:.0f}, {:.0f} and {:.0f} minutes in bfloat16, to {:.1%}, {:.1%} and {:.1%}",
         *(cell(f"weights-{name}-bf16-0", "seconds") / 60 for name in ("convnet", "hybrid", "vit_nano")),
         *(cell(f"weights-{name}-bf16-0", "test_acc") for name in ("convnet", "hybrid", "vit_nano"))),
        ("it took {:.0f} seconds on 2 cores", cell("commands-cpu", "comparison", "median")),
        (f"75% of the ViT's own patches | {columns('{:.0%}')} |", *kept("shuffled")),
        (f"that is moved by half a patch | {columns('{:.0%}')} |", *kept("shuffled, grid moved")),
        ("{} steps (ConvNet), {} (hybrid) and {:,} (ViT), to test accuracies of {:.1%}, {:.1%} and {:.1%}.",
         *(cell(f"weights-{name}-0", key) for key in ("n_steps", "test_acc")
           for name in ("convnet", "hybrid", "vit_nano"))),
        ("the distance is {:.1f} pixels ({:.1f} in the CIFAR-10 hybrid)",
         cell("shipped-cpu", "attention_distance", "ViT", "uniform"),
         cell("shipped-cifar10-cpu", "attention_distance", "Hybrid", "uniform")),
        *((f"| {words} | {{:.1f}}% | {{:.1f}}% | |", *(pretraining(name, n)[0] for name in ("ViT", "hybrid")))
          for n, words in ((450, "450 | one minute (398)"), (4500, "4,500 | two minutes (797)"))),
        ("| 45,000 | five minutes (1,994) | {:.1f}% | {:.1f}% | |", *(arm(name)[0] for name in ("ViT", "Hybrid"))),
        ("leads by {:.1f} to {:.1f} points, depending on the seed; with 4,500 images by {:.1f} to {:.1f}, and with "
         "45,000 by {:.1f} to {:.1f} points",
         *lead("pretraining-hybrid-450-0.001", "pretraining-ViT-450-0.0005"),
         *lead("pretraining-hybrid-4500-0.008", "pretraining-ViT-4500-0.002"),
         *lead("family-Hybrid-0.002", "family-ViT-0.001")),
        ("from {:.1f}% to {:.1f}% with 450 images, and from {:.1f}% to {:.1f}% with 4,500. With 45,000 images, they "
         "raise it to {:.1f}%",
         *(pretraining(name, n)[0] for n in (450, 4500) for name in ("ViT", "ViT, 10 minutes more")),
         pretraining("ViT, 10 minutes more", 45_000)[0]),
        ("| 450, of five classes | 240 steps (240) | {:.1%} | | {:.1%} |", few_images("from-scratch")[0],
         few_images("ConvNet-from-scratch")[0]),
        (f"| 4,500 | five minutes (959) | {columns('{:.1%}', 3)} |", *map(ladder_mean, (PLAIN, "hybrid", "ConvNet"))),
        (f"| 45,000 | ten minutes ({{:,.0f}}) | {columns('{:.1%}', 3)} |",
         mean(seeds("targets-vit_nano-10-vit_nano_fast-?", "n_steps")),
         *(mean(seeds(f"targets-{name}-?", "test_acc")) for name in (
             "vit_nano-10-vit_nano_fast", "hybrid-10-hybrid_fast", "convnet-10-convnet_wide"))),
        (f"| ViT, CLS | {CHANGES['ViT, CLS']} | {{:.1%}} | |", ladder_mean("ViT, CLS")),
        *((f"| {after} | {CHANGES[after]} | {{:.1%}} | {{:+.1f}} ± {{:.1f}} |", ladder_mean(after),
           *ladder_gain(before, after)) for before, after in STEPS),
        *((f"| {name} | {words} | {{:.1%}} | {{:+.1f}} ± {{:.1f}} |", ladder_mean(name), *ladder_gain(PLAIN, name))
          for name, words in (BESIDE | {MORE: "45,000 labels instead of 4,500"}).items()),
        ("The hybrid covers {:.1f} of the {:.1f} points between the ViT with mean pooling and the ConvNet.** The "
         "ConvNet is {:.1f} ± {:.1f} points above the hybrid.", *(next(ladder_gain(PLAIN, name))
                                                                for name in ("hybrid", "ConvNet")),
         *ladder_gain("hybrid", "ConvNet")),
        ("With twice the steps and all labels, the ViT has {:.1%}",
         mean(seeds("targets-vit_nano-10-vit_nano_fast-?", "test_acc"))),
        ("a teacher does help: {:.1f}% instead of {:.1f}%",
         *(pretraining(name, 4_500)[0] for name in ("ViT taught by the hybrid", "ViT, 10 minutes more"))),
        ("{} for the ConvNeXt, whose depthwise convolutions are slow there, and {:,} for the ConvNet",
         *(cell(f"ladder-cifar10-jpeg-{name}-4500-0", "n_steps")
           for name in ("ConvNeXt-convolutional-stem", "ConvNet"))),
        ("It has {:.1%}, and the pre-trained one {:.1%}. In the teacher's case, it has {:.1%}, and the taught one "
         "{:.1%}",
         *(share for minutes, name in (("2.5", "pre-trained-with-MAE"), ("1.825", "labels-from-the-ConvNet"))
           for share in (before_and_again(f"ViT-mean-pooling-4500-0-minutes-{minutes}")[0],
                         *accuracies(f"ladder-cifar10-jpeg-{name}-4500-0")))),
        ("the ConvNeXt has {:.1%} instead of {:.1%}",
         *before_and_again("ConvNeXt-convolutional-stem-4500-0-as-fast-as-ConvNet")),
        ("{:.1%} at its rate, and {:.1%} at four times this rate",
         cell("ladder-cifar10-jpeg-hybrid-4500-0", "rates", "0.002"),
         cell("repeats-cifar10-jpeg-hybrid-4500-0-lr-0.008", "rates", "0.008")),
        ("they have {:.1%} instead of {:.1%}, and {:.1%} instead of {:.1%}",
         *before_and_again("ViT-CLS-4500-0"), *before_and_again("ViT-mean-pooling-4500-0")),
        ("rose from {:.1%} with its recipe's rate to {:.1%}",
         *(cell("ladder-cifar10-jpeg-ConvNet-4500-0", "rates", rate) for rate in ("0.002", "0.064"))),
        *map(cue_row, ("ViT, patches of 4", "ViT, patches of 8", "hybrid", "ConvNet")),
        right_everywhere("ViT", "the whole image"),
        right_everywhere("hybrid", "the whole image"),
        ("| Swin | the whole image | {:.0%} to {:.0%} | {:.0%} to {:.0%} | {:.0%} to {:.0%} |",
         *reach_range("Swin", 8, 12, 16, 20), *reach_range("Swin", 23), *reach_range("Swin", 26)),
        ("Its validation accuracy is {:.0%} to {:.0%}",
         *(end(max(rates.values()) for rates in seeds("reach-Swin-?", "rates")) for end in (min, max))),
        ("| … with 2,000 steps (one seed) | the whole image | {0:.0%} | {0:.0%} | {0:.0%} |",
         min(cell("repeats-reach-Swin-0-steps-2000", "correct")) / 1000),
        (f"| ConvNet, 2 stages | {cell('reach-ConvNet-2-stages-0', 'window')} | {{:.0%}} | {{:.0%}} | {{:.0%}} to "
         "{:.0%} |", reach_range("ConvNet, 2 stages", 8, 12, 16, 20)[0], reach_range("ConvNet, 2 stages", 23)[0],
         *reach_range("ConvNet, 2 stages", 26)),
        *(right_everywhere(f"ConvNet, {n} stages", cell(f"reach-ConvNet-{n}-stages-0", "window")) for n in (3, 4)),
        ("in five minutes, a ConvNet that labelled the images once cost {:.1f} points",
         -next(ladder_gain(PLAIN, "labels from the ConvNet"))),
        ("was {:.1f} to {:.1f} points better after fine-tuning than a new ViT with the same recipe, depending on the "
         "seed",
         *lead_with_few_images("fine-tuned", "from-scratch-recipe-classic")),
        ("faster than the ViT, has {:.1%} there. It leads by {:.1f} to {:.1f} points",
         few_images("small-ConvNet-from-scratch")[0], *lead_with_few_images("small-ConvNet-from-scratch",
                                                                            "from-scratch")),
        ("the runs took {:.1f} minutes (ViT), {:.1f} (hybrid) and {:.1f} (ConvNet) on average",
         *(mean(seeds(f"targets-{name}-?", "seconds")) / 60 for name in (
             "vit_nano-10-vit_nano_fast", "hybrid-10-hybrid_fast", "convnet-10-convnet_wide"))),
        ("on 1,800 photographs, it led by {:.1f} to {:.1f} points",
         *(end(points(mean(shares_of("ConvNet from scratch", draw)) - mean(shares_of("hybrid from scratch", draw)))
               for draw in range(3)) for end in (min, max))),
        ("a ViT reached {:.1f}% after 15 minutes, and the hybrid {:.1f}% after five",
         pretraining("ViT, 10 minutes more", 45_000)[0], arm("Hybrid")[0]),
        ("leads the ConvNeXt by {:.1f} points, because the ConvNeXt is {:.1f} points below the hybrid",
         next(ladder_gain("ConvNeXt, convolutional stem", "ConvNet")),
         points(ladder_mean("hybrid") - ladder_mean("ConvNeXt, convolutional stem"))),
        ("one of them only just ({:.0%} outline)", max(seeds("cues-ViT-patches-of-4-?", "shape_bias"))),
        ("Ten times the labels gain {:.1f} points", next(ladder_gain(PLAIN, MORE))),
        ("taught by a hybrid reached {:.1f}% instead of {:.1f}% with 4,500 labels",
         *(pretraining(name, 4_500)[0] for name in ("ViT taught by the hybrid", "ViT, 10 minutes more"))),
        ("mean pooling gains {:.1f} points over CLS", next(ladder_gain("ViT, CLS", PLAIN))),
        ("fast, raised a ViT from {:.1f}% to {:.1f}%",
         *(arm(name)[0] for name in ("ViT", "ViT, the teacher's minutes added"))),
    ],
    stated=[
        ("The ± are 95% intervals for all gains together", "LEVEL in vit_bridge/compare/statistics.py"),
        ("a model of more than 1.2 million parameters", "the ConvNet of docs/training.md, below"),
        ("All networks need 62 to 73 MFLOPs", "test_rungs_have_nearly_equal_flops in tests/compare/test_ladder.py"),
        ("(76% of the FLOPs) make 16 tokens", "test_convolutions_do_a_share_of_the_flops in the same file"),
        ("Its convolutions do 12% of the FLOPs", "the same test"),
        ("The models train on 10,000 drawn images", "the default of Cues.measure()"),
        ("30 minutes are two for each of 15 runs", "five candidates besides the probe, three seeds"),
        ("makes up to 1.8 times as many steps", "1,413 steps and 797 in benchmarks/results/pretraining-*-4500-*"),
        ("no model there trained for more than 15 minutes", "the minutes of the tables in "
         "benchmarks/RESULTS.md"),
        ("On 72 drawn shapes", "benchmarks/verdicts.py; the table in benchmarks/RESULTS.md"),
        ("its steps take twice as long as those of the ViT", "seconds in benchmarks/results/few-images-*"),
        ("a minute of the ViT has about twice as many steps as in the fourth and the sixth, and a minute of the hybrid "
         "about three times",
         "n_steps in benchmarks/results/: 797 in two minutes and 959 in five, 706 in one and 2,405 in ten"),
        ("which allows 75% at best",
         "test_reach_sums_over_single_marks_solve_at_most_three_quarters in tests/compare/test_trained.py"),
        ("Solving the 9 odd distances from 8 to 26 and guessing at the 10 even ones gives 74%", "(9 + 10 / 2) / 19"),
        ("an image costs five times as much", "4.9 times the FLOPs, by count_flops()"),
        ("Each network learned from 20,000 images", "the default of Reach.measure()"),
        ("classifies 75% of the images", "test_reach_sums_over_single_marks_solve_at_most_three_quarters in "
                                            "tests/compare/test_trained.py"),
        ("A ConvNet for the 2020s", "the title of Liu et al. 2022"),
        ("assumes an accuracy of 75% and seeds that differ by one point", "the defaults of assumed_noise()"),
        ("on 1,800 small photographs", "2,000 images in benchmarks/verdicts.py, less a tenth for validation"),
        ("--minutes 30", "an option"),
    ],
)

# ---- docs/concepts.md -------------------------------------------------------------------------------------

PAGES["docs/concepts.md"] = Page(
    stated=[
        ("224 / 16 = 14 patches along each side, so 14 × 14 = **196 tokens**", "definition"),
        ("The 50,176 pixels of a 224 × 224 image make more than two billion pairs", "224² = 50,176, and its square"),
        ("2N²D and 12ND², so the share of the first is N / (N + 6D)", "the products of one block, counted"),
        ("With 197 tokens, the first term is 4% of the cost", "197 / (197 + 6 × 768)"),
        ("equal at N = 6D, which is 4,608 tokens for ViT-Base", "6 × 768"),
        ("ImageNet's 1.3 million images, and overtook them with 300 million", "Dosovitskiy et al. 2021, Figure 3"),
        ("a 90-minute lesson", "the timetable in lesson.ipynb"),
    ],
)

# ---- docs/family.md ---------------------------------------------------------------------------------------

PAGES["docs/family.md"] = Page(
    measured=[
        *((f"| {words} | {{:.1f}} ± {{:.1f}}{seeds_in_words} |", *arm(name)) for words, name, seeds_in_words in (
            ("ViT, labels alone", "ViT", ""), ("ViT, hard teacher", "ViT, hard", ""),
            ("ViT, soft teacher", "ViT, soft", ""), ("DeiT, labels alone", "DeiT, no teacher", ""),
            ("DeiT, hard teacher", "DeiT, hard", ""), ("DeiT, soft teacher", "DeiT, soft", ""),
            ("ViT, labels alone, ten minutes", "ViT, the teacher's minutes added", " (two seeds)"),
            ("hybrid", "Hybrid", ""), ("ViT", "ViT", ""), ("ConvNeXt", "ConvNeXt", ""), ("Swin", "Swin", ""),
            ("Swin without the bias", "Swin, no bias", " (two seeds)"),
            ("Swin without the shift", "Swin, no shift", " (two seeds)"))),
        ("| ViT that reads CLS, labels alone | {:.1f} (one seed) |", arm("ViT, CLS")[0]),
    ],
    stated=[
        ("A ConvNet for the 2020s", "the title of the paper"),
        ("saw the images 1.7 times as often", "3,446 steps and 1,994 in benchmarks/results/family-*"),
        ("the mean over three seeds and its 95% interval", "benchmarks/results.py, band"),
        ("By default λ is 0.1 and T is 3, as in the paper", "Touvron et al. 2021, Sec. 5.1; DISTILLATIONS in "
         "vit_bridge/training/objectives.py"),
    ],
)

# ---- docs/extending.md ------------------------------------------------------------------------------------

PAGES["docs/extending.md"] = Page(
    measured=[
    ],
    stated=[
    ],
)

# ---- docs/glossary.md -------------------------------------------------------------------------------------

PAGES["docs/glossary.md"] = Page(
    measured=[
    ],
    stated=[
    ],
)

# ---- docs/looking-inside.md -------------------------------------------------------------------------------


def trust(what):
    """Return the lowest and the highest lead over random order of each method, over the three models."""
    leads = seeds("trust-vit_nano-?", "leads", what)
    spans = [[lead[method][0] for lead in leads] for method in ("attention", "rollout", "relevance", "grad_cam")]
    return [f"{end:.3f}".replace("-", "−") for span in spans for end in (min(span), max(span))]


def megabytes(tokens):
    """Return the size in MB of the explorer's page of ViT-S/14 at so many tokens."""
    return next(row["bytes"] / 1e6 for row in cell("explorer-vit-s-14", "rows") if row["tokens"] == tokens)


PAGES["docs/looking-inside.md"] = Page(
    measured=[
        ("better than random) | {} to {} | {} to {} | {} to {} | {} to {} | "
         "| insertion (above 0: better than random) | {} to {} | {} to {} | {} to {} | {} to {} |",
         *trust("deletion"), *trust("insertion")),
        ("measured {} test images", *{n for n in seeds("trust-vit_nano-?", "n")}),
        ("{:.1f} MB for ViT-S/14 at 577 tokens, {:.1f} MB at 1,370", megabytes(577), megabytes(1370)),
    ],
    stated=[
        ("about 88 MB", "PUBLIC in vit_bridge/weights/pretrained.py: four bytes for each weight"),
        ("(under 3 MB)", "max_mb in benchmarks/pictures.py"),
        ("hold 50% and 90% of the gradient", "compare_receptive_fields in visualizations.py"),
    ],
)

# ---- docs/models-and-weights.md ---------------------------------------------------------------------------

PAGES["docs/models-and-weights.md"] = Page(
    measured=[
        ("`create_vit_nano` | 32 | 4 | 96 | 4 | 3 | {:,} |", parameters("create_vit_nano")),
        ("`create_vit_tiny` | 224 | 16 | 192 | 12 | 3 | {:,} |", parameters("create_vit_tiny")),
        ("`create_vit_small` | 224 | 16 | 384 | 12 | 6 | {:,} |", parameters("create_vit_small")),
        ("`create_vit_base` | 224 | 16 | 768 | 12 | 12 | {:,} |", parameters("create_vit_base")),
        ("`create_vit_large` | 224 | 16 | 1024 | 24 | 16 | {:,} |", parameters("create_vit_large")),
        ("Large/16 at 224 pixels with 1,000 classes has {:,} parameters", parameters("create_vit_large")),
        ("`vit_nano` | `VisionTransformer` | 32 | 10 | {:,} |", parameters("create_vit_nano", n_classes=10)),
        ("`hybrid` | `HybridCNNViT` | 32 | 10 | {:,} |", parameters("build_model", name="hybrid", n_classes=10)),
        ("`convnet` | `ConvNet` | 32 | 10 | {:,} |", parameters("build_model", name="convnet", n_classes=10)),
        ("`hybrid_small` | `HybridCNNViT` | 224 | 1,000 | {:,} |", parameters("build_model", name="hybrid_small")),
        *((f"`{name}` | `ConvNet` | 224 | 1,000 | {{:,}} |", parameters("build_model", name=name))
          for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")),
        *((f"`{name}` | `{kind}` | 224 | 1,000 | {{:,}} |", parameters("build_model", name=name))
          for kind, names in (("DistilledViT", ("deit_tiny", "deit_small", "deit_base")),
                              ("SwinTransformer", ("swin_tiny", "swin_small", "swin_base")),
                              ("BEiT", ("beit_base", "beit_large")),
                              ("ConvNeXt", ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")))
          for name in names),
        *((f"`{name}` | `{kind}` | 32 | 10 | {{:,}} |", parameters("build_model", name=name, n_classes=10))
          for name, kind in (("deit_nano", "DistilledViT"), ("swin_nano", "SwinTransformer"), ("beit_nano", "BEiT"),
                             ("convnext_nano", "ConvNeXt"))),
        *((f"`{name}` | `{kind}` | {side} | none | {{:,}} |", parameters("build_model", name=name))
          for name, kind, side in (("mae_nano", "MaskedAutoencoder", 32), ("mae_tiny", "MaskedAutoencoder", 224),
                                   ("mae_base", "MaskedAutoencoder", 224), ("mae_large", "MaskedAutoencoder", 224),
                                   ("mae_huge", "MaskedAutoencoder", 224),
                                   ("beit_nano_pretraining", "MaskedTokenModel", 32),
                                   ("beit_tiny_pretraining", "MaskedTokenModel", 224),
                                   ("beit_base_pretraining", "MaskedTokenModel", 224))),
        ("ours reach a test accuracy of {:.1%} (ViT), {:.1%} (hybrid) and {:.1%} (ConvNet)",
         *(cell(f"weights-{name}-bf16-0", "test_acc") for name in ("vit_nano", "hybrid", "convnet"))),
        ("only five minutes of training: {:.1%} (DeiT), {:.1%} (Swin) and {:.1%} (ConvNeXt)",
         *(cell(f"family-{name}-0", "test_acc") for name in ("DeiT-hard-0.001", "Swin-0.001", "ConvNeXt-0.008"))),
        ("The largest difference in all rows but the last was {:.1e} of the largest value",
         max(row["difference"] for row in cell("formats-all", "rows"))),
    ],
    stated=[
        ("lists Large as 307M", "Dosovitskiy et al. 2021, Table 1"),
        ("a mask ratio of 0.75", "MAEConfig in vit_bridge/models/mae.py"),
        ("A mean and a std of 0.5 are assumed", "BEIT_IMAGES in vit_bridge/weights/formats.py"),
        ("1e-6, in transformers' ViT 1e-12", "the default of each library: vit_bridge/weights/formats.py"),
    ],
)

# ---- docs/pretraining.md ----------------------------------------------------------------------------------

PAGES["docs/pretraining.md"] = Page(
    measured=[
        *((f"| {words} |" + " {:.1f} ± {:.1f} |" * len(numbers), *(value for n in numbers
                                                                   for value in pretraining(name, n)))
          for words, name, numbers in (
              ("MAE, then fine-tuned", "MAE, fine-tuned", (450, 4_500, 45_000)),
              ("MAE, then a linear probe", "MAE probe", (450, 4_500, 45_000)),
              ("ViT from scratch", "ViT", (450, 4_500, 45_000)),
              ("ViT from scratch, ten minutes longer", "ViT, 10 minutes more", (450, 4_500, 45_000)),
              ("hybrid from scratch", "hybrid", (450, 4_500)),
              ("ViT taught by this hybrid", "ViT taught by the hybrid", (450, 4_500)))),
        ("{:.1f} points more accurate than the ViT from scratch, and with all labels {:.1f} points",
         *(pretraining("MAE, fine-tuned", n)[0] - pretraining("ViT", n)[0] for n in (4_500, 45_000))),
        *((f"| {words} | {{:.1f}} | {{:.1f}} |",
           100 * next(one["test_acc"] for one in seeds(f"pretraining-{file}-fine-tuned-4500-*-0") if "test_acc" in one),
           100 * cell(f"pretraining-{file}-0", "probe", "4500", "test_acc"))
          for words, file in (
              ("MAE, 75% hidden (seed 0)", "MAE"), ("MAE, 50% hidden", "MAE-50-hidden"),
              ("MAE, 90% hidden", "MAE-90-hidden"),
              ("MAE, plain pixels instead of normalised ones", "MAE-plain-pixels"),
              ("MAE, 40% hidden, in blocks as in BEiT", "MAE-40-hidden-in-blocks"),
              ("BEiT, tokens of pixels", "BEiT-tokens-of-pixels"),
              ("BEiT, tokens of MAE's features", "BEiT-tokens-of-MAEs-features"))),
        ("They are {:.0f} passes over the images", cell("pretraining-MAE-0", "epochs")),
    ],
    stated=[
        ("about 40% of the patches, in blocks", "Bao et al. 2022, Sec. 2.3; MaskedTokens in "
         "vit_bridge/training/objectives.py"),
        ("for one minute with 450 labels, for two minutes with 4,500, or for five minutes with", "MINUTES in "
         "benchmarks/pretraining.py"),
        ("learned for ten minutes", "PRETRAINING in benchmarks/pretraining.py"),
        ("the mean test accuracy over three seeds and its 95% interval", "benchmarks/results.py, band"),
    ],
)

# ---- docs/reliability.md ----------------------------------------------------------------------------------

GPU = json.loads((RESULTS / "gpu-nvidia-h200.json").read_text(encoding="utf-8"))  # a list of cells
GPU_RATIOS = [min(one["ratio"][0] for library, one in each["result"]["libraries"].items() if library != "ours")
              for each in GPU if each["result"]["part"] == "throughput"]
KILLS, RANKS, MUTANTS = cell("kills-cpu", "rows"), cell("processes-cpu", "rows"), cell("mutants-0")
FORMATS = cell("formats-all", "rows")


def kills_during(*names):
    """Return how many runs were killed while they wrote one of these files."""
    return sum(any(part.removesuffix(".part") in names for part in row["in_a_write_of"]) for row in KILLS)


PAGES["docs/reliability.md"] = Page(
    measured=[
        ("- {} of the {} kills came before the first checkpoint", sum(row["kept_step"] is None for row in KILLS),
         len(KILLS)),
        ("- {} kills came after a checkpoint", sum(row["kept_step"] is not None for row in KILLS)),
        ("- {} kills interrupted the writing of a file: {} hit `config.json` at the start of the run, and {} hit "
         "`last.pt`.", sum(bool(row["in_a_write_of"]) for row in KILLS), kills_during("config.json"),
         kills_during("last.pt")),
        ("by less than {}e-7", math.ceil(1e7 * max(
            row[f"{name}_loss difference"] for row in RANKS for name in ("train", "val")))),
        ("Each of the {} test images", *{row["test_n"] for row in RANKS}),
        ("now {} of the same {} are caught", MUTANTS["killed"], len(MUTANTS["rows"])),
        ("one NVIDIA H200 with torch {}: all {} device tests pass", GPU[0]["versions"]["torch"].removesuffix(".0"),
         GPU[0]["result"]["passed"]),
        ("{} kinds of checkpoint file ", len(FORMATS)),
        ("agree to within {}e-15", math.ceil(1e15 * max(row["difference"] for row in FORMATS))),
    ],
    stated=[
        ("at most 3 minutes old (`--save-minutes`)", "TrainConfig.save_every"),
        ("the tests caught 25. One changed nothing that a user could see. Four survived",
         "the text of the table mutants in benchmarks/results.py: when the breaks were first drawn"),
        ("in at most 9 minutes", "benchmarks/on_gpu.py, TOTAL_SECONDS"),
        ("The oldest supported torch is 2.7. With torch 2.7 to 2.9,", "requirements.txt"),
        ("Prefer 2.10 or newer", "the releases of torch"),
    ],
)

# ---- docs/speed.md ----------------------------------------------------------------------------------------

COLUMNS = sorted(path.stem for path in RESULTS.glob("throughput-cpu-*.json"))
LIBRARIES = ("ours", "timm", "torchvision", "transformers", "vit-pytorch")


def throughput_row(label, column, digits=1):
    """Return the row of a table on the page for a column of the benchmark: images a second, then the smallest ratio."""
    found = cell(f"throughput-cpu-{column}", "libraries")
    ratio = min((found[name]["ratio"] for name in LIBRARIES[1:]), key=lambda ratio: ratio[0])
    fields = " | ".join([f"{{:.{digits}f}}"] * len(LIBRARIES))
    return (f"| {label} | {fields} | {{:.2f}} ({{:.2f}} to {{:.2f}}) |",
            *(found[name]["images_per_second"] for name in LIBRARIES), *ratio)


def growth_row(n_tokens):
    """Return the row of the table of growth, in training, for this many tokens."""
    place = cell("growth-cpu", "tokens").index(n_tokens)
    fused, explicit = (next(curve for curve in cell("growth-cpu", "curves") if curve["path"] == path and curve["train"])
                       for path in ("fused", "explicit"))
    values = [value for curve in (fused, explicit)
              for value in (1e3 * curve["seconds"][place], curve["bytes"][place] / 2**20)]
    return f"| {n_tokens:,} | {{:,.0f}} ms, {{:,.0f}} MiB | {{:,.0f}} ms, {{:,.0f}} MiB |", *values


def exponent(path, what):
    """Return the exponent of a curve of growth in training."""
    return next(curve[f"{what}_exponent"] for curve in cell("growth-cpu", "curves")
                if curve["path"] == path and curve["train"])


def step_row(label, recipe):
    """Return the row of the table of a training step's time for a recipe."""
    row = next(row for row in cell("steps-cpu", "rows") if row["recipe"] == recipe)
    shares = [row["shares"].get(group, 0) for group in ("matrix products", "convolutions", "attention", "GELU")]
    return (f"| {label} | {{:.0f}} |{' {:.0%} |' * 5}", 1e3 * row["seconds"], *shares, row["share_of_floor"])


PAGES["docs/speed.md"] = Page(
    measured=[
        throughput_row("Tiny/16, 1 image, inference", "tiny-1-inference-float32"),
        throughput_row("Tiny/16, 16 images, inference", "tiny-16-inference-float32"),
        throughput_row("Tiny/16, 16 images, training step", "tiny-16-training-float32"),
        throughput_row("Small/16, 16 images, training step", "small-16-training-float32"),
        throughput_row("nano at 32 pixels, 128 images, training step", "nano-128-training-float32", 0),
        throughput_row("Tiny/16, 16 images, inference, compiled", "tiny-16-inference-float32-compiled"),
        ("the geometric mean of the ratios is {:.3f}", geometric_mean(map(smallest_ratio, COLUMNS))),
        ("the ratio lies between {:.2f} and {:.2f} in all eight configurations",
         *(bound(smallest_ratio(name) for name in COLUMNS if name.endswith("bf16")) for bound in (min, max))),
        ("at 224 pixels in bfloat16, our model is {:.2f} to {:.2f} times as fast as timm", min(GPU_RATIOS),
         max(GPU_RATIOS)),
        *map(growth_row, (256, 1024, 4096)),
        ("the count grows as N^{:.2f}", cell("growth-cpu", "multiplications_exponent")),
        ("the time of the fused kernel grows as N^{:.2f}", exponent("fused", "seconds")),
        ("the time of explicit attention grows as N^{:.2f}, and its memory as N^{:.2f}",
         exponent("explicit", "seconds"), exponent("explicit", "bytes")),
        ("this is {:.0f} times as fast as torchvision's transforms, which process one image at a time: "
         "{:,} compared with {:,}",
         *(cell("augmentation-cpu", "rows")[0][key] for key in ("ratio", "ours", "torchvision"))),
        step_row("ViT", "vit_nano_fast"), step_row("hybrid", "hybrid_fast"), step_row("ConvNet", "convnet_fast"),
        ("takes {:.0f} ms per step for the ViT's matrices, compared with {:.1f} ms for AdamW. PyTorch's own Muon "
         "takes {:.0f} ms",
         *(1e3 * cell("steps-cpu", "optimizers")[name] for name in ("Muon, ours", "AdamW", "Muon, torch's"))),
        ("backward passes take {:.0f} ms; with channels first, {:.0f} ms",
         *(1e3 * cell("steps-cpu", "layouts")[name] for name in ("channels last", "channels first"))),
        ("the ViT's step takes {:.0f} ms", 1e3 * cell("steps-cpu-bf16", "rows")[0]["seconds"]),
    ],
    stated=[("with its 95% interval", "benchmarks/throughput.py, median_interval")],
)

# ---- docs/training.md -------------------------------------------------------------------------------------


def level(model):
    """Return the validation accuracy of a model's recipe after two minutes, mean of three seeds."""
    return mean(seeds(f"factors-{model}-the-recipe-2-?", "val_acc"))


def change(model, factor):
    """Return what a change of the recipe gives, in points."""
    return points(cell(f"factors-{model}-{factor}-2-0", "val_acc") - level(model))


MINUTES = [seconds / 60 for seconds in seeds("targets-[vhc]*-10-*", "seconds")]
SPREADS = [points(stdev(seeds(f"factors-{model}-the-recipe-2-?", "val_acc")))
           for model in ("vit_nano", "hybrid", "convnet")]
WRONG = [n - right for n, right in zip(seeds("shapes-vit_nano-bf16-?", "test_n"),
                                       seeds("shapes-vit_nano-bf16-?", "test_correct"), strict=True)]
PAGES["docs/training.md"] = Page(
    measured=[
        ("| linear probe | {:.1%} | {:.1f} |", *few_images("linear-probe")),
        ("| fine-tuned | {:.1%} | {:.1f} |", *few_images("fine-tuned")),
        ("| fine-tuned, `--layer-decay 0.75` | {:.1%} | {:.1f} |", *few_images("fine-tuned-layer-decay-0.75")),
        ("| from scratch, `--recipe classic` | {:.1%} | {:.1f} |", *few_images("from-scratch-recipe-classic")),
        ("| from scratch | {:.1%} | {:.1f} |", *few_images("from-scratch")),
        ("| ConvNet from scratch | {:.1%} | {:.1f} |", *few_images("ConvNet-from-scratch")),
        ("| ConvNet from scratch, `--recipe convnet_fast` | {:.1%} | {:.1f} |",
         *few_images("small-ConvNet-from-scratch")),
        ("leads by {:.1f} to {:.1f} points", *lead_with_few_images("small-ConvNet-from-scratch", "from-scratch")),
        ("worse than the fine-tuned one by {:.1f} to {:.1f} points",
         *lead_with_few_images("fine-tuned", "from-scratch-recipe-classic")),
        ("from {:.1%} at the recipe's learning rate to {:.1%} at 32 times this rate",
         *(cell("ladder-cifar10-jpeg-ConvNet-4500-0", "rates", rate) for rate in ("0.002", "0.064"))),
        ("the largest model has {:.1f} million weights",
         cell("few-images-ConvNet-from-scratch-0", "run", "parameters") / 1e6),
        ("It has {:.1f} times the ViT's weights", cell("few-images-ConvNet-from-scratch-0", "run", "parameters")
         / cell("few-images-from-scratch-0", "run", "parameters")),
        ("([{:.1f} images/s])", cell("throughput-cpu-tiny-16-training-float32", "libraries", "ours",
                                     "images_per_second")),
        ("(a plain ViT) | {:.1%} ± {:.1f} |", *mean_and_spread("targets-vit_nano-10-vit_nano_fast-?", "test_acc")),
        ("--model hybrid` | {:.1%} ± {:.1f} | {:.1%} ± {:.1f} |", *mean_and_spread(
            "targets-hybrid-10-hybrid_fast-?", "test_acc"), *mean_and_spread(
            "targets-hybrid-10-bf16-hybrid_fast-?", "test_acc")),
        ("--model convnet` | {:.1%} ± {:.1f} | {:.1%} (one seed) |", *mean_and_spread(
            "targets-convnet-10-convnet_wide-?", "test_acc"),
         cell("targets-convnet-10-bf16-convnet_wider-0", "test_acc")),
        ("--minutes 30 --model hybrid` | {:.1%} (one seed) |", cell("targets-hybrid-30-hybrid_fast-0", "test_acc")),
        ("the ten-minute runs took between {:.1f} and {:.1f} minutes", min(MINUTES), max(MINUTES)),
        ("It reached {:.1%}. Do not", cell("targets-peer-10-0", "test_acc")),
        ("its model has {:.0f} times as many parameters as ours, and ten minutes are enough for only {} of its steps",
         cell("targets-peer-10-0", "parameters") / cell("targets-vit_nano-10-vit_nano_fast-0", "parameters"),
         cell("targets-peer-10-0", "n_steps")),
        ("it makes {} steps and reaches {:.1%}", cell("targets-peer-generous-10-0", "n_steps"),
         cell("targets-peer-generous-10-0", "test_acc")),
        ("reached {:.1%} with each of three seeds: at most {} of {:,} test images were misclassified. These runs "
         "used bfloat16 and took {} to {:,} steps", min(seeds("shapes-vit_nano-bf16-?", "test_acc")), max(WRONG),
         cell("shapes-vit_nano-bf16-0", "test_n"), min(seeds("shapes-vit_nano-bf16-?", "n_steps")),
         max(seeds("shapes-vit_nano-bf16-?", "n_steps"))),
        ("the three seeds reached {:.1%}, {:.1%} and {:.1%}. Those runs used float32 on a different machine and "
         "took {} to {} steps",
         *seeds("shapes-vit_nano-?", "test_acc"), min(seeds("shapes-vit_nano-?", "n_steps")),
         max(seeds("shapes-vit_nano-?", "n_steps"))),
        ("have a standard deviation of {:.1f} to {:.1f} points", min(SPREADS), max(SPREADS)),
        ("| the recipe | {:.1%} | {:.1%} | {:.1%} |", *map(level, ("vit_nano", "hybrid", "convnet"))),
        ("| AdamW instead of Muon | {:+.1f} | {:+.1f} | {:+.1f} |",
         *(change(model, "adamw") for model in ("vit_nano", "hybrid", "convnet"))),
        ("| Xavier instead of mimetic initialisation | {:+.1f} | {:+.1f} | |",
         *(change(model, "xavier") for model in ("vit_nano", "hybrid"))),
        ("| no whitening | {:+.1f} | {:+.1f} | {:+.1f} |",
         *(change(model, "not-whitened") for model in ("vit_nano", "hybrid", "convnet"))),
        ("Cutmix costs {:.1f} points, cutout {:.1f} and mixup {:.1f}. Removing the shifts gains {:.1f}. Label "
         "smoothing is the exception: without it, accuracy falls by {:.1f}", -change("vit_nano", "cutmix"),
         -change("vit_nano", "cutout-0.25"), -change("vit_nano", "mixup"), change("vit_nano", "no-shift"),
         -change("vit_nano", "label-smoothing-0")),
        ("A width of 64 instead of 96 gains {:.1f} points, and a narrower MLP {:.1f}", change("vit_nano", "64-wide"),
         change("vit_nano", "MLP-2-wide")),
        ("of the steps gain {:.1f}; the recipe `vit_nano_fast` includes this. Wider or deeper models lose {:.1f} to "
         "{:.1f}",
         change("vit_nano", "24-pixels-for-60"), -change("vit_nano", "128-wide-3-deep"),
         -change("vit_nano", "128-wide")),
    ],
    stated=[
        ("`--layer-decay 0.75`", "an option's value"),
        *((f"{aim}% |", "the aims: TARGETS in benchmarks/results.py") for aim in (74, 86, 89, 90)),
        ("Smaller images in the first 60%", "RECIPES, progressive_resize"),
        ("from 8 minutes", "RECIPES"),
        ("from 16 minutes", "RECIPES"),
        ("with its 95% interval", "analysis.metrics.wilson_interval"),
        ("its 95% Wilson interval", "analysis.metrics.wilson_interval"),
        ("0.1 by default", "TrainConfig"),
        ("`--drop-path 0.1`", "an option's value"),
        ("If a model classifies 80 of 100 test images correctly, its 95% interval reaches from 71% to 87%",
         "Wilson 1927, by hand"),
    ],
)
