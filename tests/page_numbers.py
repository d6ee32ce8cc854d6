"""Where the numbers on README and docs come from: for each page its measured numbers, and those with another source.

`measured` has (text, value, ...): the text as it stands on the page, with a format field for each value, and the values
from the cells in benchmarks/results (`cell`, `seeds`) or from the code (`parameters`). `stated` has (text, source): a
number that nobody here measured, as it stands on the page, and the paper, table or definition it comes from.
Line breaks do not matter. tests/test_numbers.py checks that each text is on its page, and that no other number there
looks measured (a decimal fraction, a percentage, or a number with a unit of time, memory or accuracy).
"""

import json
import math
from pathlib import Path
from statistics import mean, stdev  # noqa: F401  (for the rows below)

import torch

import vit_bridge.models
import vit_model

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
        ("In two minutes it reached {:.1%} on the built-in drawn shapes, with each of three seeds",
         min(seeds("shapes-vit_nano-bf16-?", "test_acc"))),
        ("With 450 images and equal steps, the ConvNet led the ViT by {:.0f} points",
         points(mean(accuracies("data-cifar10-jpeg-ConvNet-450-?")) - mean(accuracies("data-cifar10-jpeg-ViT-450-?")))),
        ("the ConvNet followed the outline in {:.0%} of cases and the ViT in {:.0%}",
         mean(seeds("cues-ConvNet-?", "shape_bias")), mean(seeds("cues-ViT-?", "shape_bias"))),
        ("A ConvNet with a window of 25 pixels fell to {:.0%} at a distance of {}; ViT and hybrid stayed above {:.0%}",
         mean(seeds("reach-ConvNet-?", "correct", -1)) / 1000, cell("reach-ConvNet-0", "distances", -1),
         math.floor(min(map(min, seeds("reach-[HV]*", "correct"))) / 10) / 100),
        ("A ViT-Tiny training step was {:.2f} times as fast as the fastest of four other libraries",
         smallest_ratio("throughput-cpu-tiny-16-training-float32")),
        ("{} runs were killed at random moments, {} of them before their first checkpoint; all ended",
         len(cell("kills-cpu", "rows")), sum(row["kept_step"] is None for row in cell("kills-cpu", "rows"))),
        ("| `create_vit_nano` (32 pixels) | {:.1f}M |", parameters("create_vit_nano", n_classes=1000) / 1e6),
        *((f"| `create_vit_{size}` | {{:.1f}}M |", parameters(f"create_vit_{size}", n_classes=1000) / 1e6)
          for size in ("tiny", "small", "base", "large")),
    ],
    stated=[
        ("Python 3.11 or newer", "pyproject.toml"),
        ("a lesson of 90 minutes", "lesson.ipynb, its timetable"),
        ("90 minutes for a class", "lesson.ipynb, its timetable"),
        ("torch 2.7 and matplotlib 3.10 are the oldest that work. Prefer torch 2.10", "requirements.txt"),
        ("a new model in ten minutes", "docs/extending.md"),
        ("A ConvNet for the 2020s", "the title of the paper"),
    ],
)

# ---- docs/comparison.md -----------------------------------------------------------------------------------

KINDS = ("ConvNet", "Hybrid", "ViT")
RUNGS = ("ViT", "ViT-mean-pooling", "Hybrid", "ConvNet")
UNTRAINED = "random weights"


def shipped(experiment, *keys):
    """Return a value for each of KINDS from the comparison of the shipped models; "KIND" among the keys is the kind."""
    return [cell("shipped-cpu", experiment, *(kind if key == "KIND" else key for key in keys)) for kind in KINDS]


def verdict(folder):
    """Return the mean accuracy of each of KINDS on a folder of benchmarks/verdicts.py."""
    return [mean(row["accuracy"] for row in cell(f"verdicts-{folder}", "rows", kind)) for kind in KINDS]


def data(n_images, dataset=""):
    """Return the mean test accuracy of each of RUNGS with so many training images."""
    cells = [seeds(f"data-{dataset}{kind}-{n_images}-?") for kind in RUNGS]
    return [mean(one["correct"] / one["n"] for one in own) for own in cells]


def reach(kind):
    """Return the mean accuracy of a kind at each distance."""
    trials = seeds(f"reach-{kind}-?")
    return [mean(trial["correct"][i] / trial["n"] for trial in trials) for i in range(len(trials[0]["distances"]))]


def off_diagonal(matrix):
    """Return the mean of a square matrix without its diagonal."""
    n = len(matrix)
    return mean(matrix[i][j] for i in range(n) for j in range(n) if i != j)


def kept(change):
    """Return for each of KINDS the fraction of its correct predictions that are still correct after a change."""
    return [counts[-1] / counts[0] for counts in shipped("position", "models", "KIND", "correct", change)]


def first_heads(kind, weights):
    """Return the distance of the nearest and of the farthest head of the first block."""
    heads = cell("shipped-cpu", "attention_distance", kind, weights)[0]
    return min(heads), max(heads)


PAGES["docs/comparison.md"] = Page(
    measured=[
        ("{:,} parameters (ConvNet), {:,} (hybrid) and {:,} (ViT)",
         *(rows[0]["parameters"] for rows in shipped("cost", "resolution", "KIND"))),
        ("360 training images | {:.1%} | {:.1%} | {:.1%} |", *verdict("locality")),
        ("within the ConvNet's window | {:.1%} | {:.1%} | {:.1%} |", *verdict("near")),
        ("farther apart than that window | {:.1%} | {:.1%} | {:.1%} |", *verdict("far")),
        ("noise with random classes | {:.1%} | {:.1%} | {:.1%} |", *verdict("nothing")),
        ("(a multiply-add counts as 2) | {:.0f} | {:.1f} | {:.1f} |",
         *(rows[0]["flops"] / 1e6 for rows in shipped("cost", "resolution", "KIND"))),
        ("pixels to the power | {:.2f} | {:.2f} | {:.2f} |", *shipped("cost", "exponents", "KIND", "flops")),
        ("lies within, pixels | {:.1f} | {:.1f} | {:.1f} | | … with random weights | {:.1f} | {:.1f} | {:.1f} |",
         *(rows[-1][weights][0] for weights in ("trained", UNTRAINED) for rows in shipped("receptive_field", "KIND"))),
        ("first block's heads, pixels | | {:.1f} to {:.1f} | {:.1f} to {:.1f} | "
         "| … with random weights | | {:.1f} to {:.1f} | {:.1f} to {:.1f} |",
         *(end for weights in ("trained", UNTRAINED) for kind in KINDS[1:] for end in first_heads(kind, weights))),
        ("two different layers, mean | {:.2f} | {:.2f} | {:.2f} | | … with random weights | {:.2f} | {:.2f} | {:.2f} |",
         *(off_diagonal(matrix) for weights in ("within", UNTRAINED) for matrix in shipped("similarity", weights,
                                                                                           "KIND"))),
        ("by up to 4 pixels | {:.0%} | {:.0%} | {:.0%} | | … by 5 or 6 pixels | {:.0%} | {:.0%} | {:.0%} |",
         *shipped("position", "models", "KIND", "consistency"),
         *shipped("position", "models", "KIND", "consistency_beyond")),
        ("by up to 4 pixels, with random weights | {:.0%} | {:.0%} | {:.0%} |",
         *shipped("position", "models", "KIND", "consistency, random weights")),
        ("it took {:.0f} seconds on 2 cores", cell("commands-cpu", "comparison", "median")),
        ("75% of the ViT's own patches | {:.0%} | {:.0%} | {:.0%} |", *kept("shuffled")),
        ("moved by half a patch | {:.0%} | {:.0%} | {:.0%} |", *kept("shuffled, grid moved")),
        ("{} steps (ConvNet), {} (hybrid) and {:,} (ViT). Their test accuracies are {:.1%}, {:.1%} and {:.1%}.",
         *(cell(f"weights-{name}-0", key) for key in ("n_steps", "test_acc")
           for name in ("convnet", "hybrid", "vit_nano"))),
        ("Uniform attention would give {:.1f} pixels", cell("shipped-cpu", "attention_distance", "ViT", "uniform")),
        *(("| {:,} | {:.1%} | {:.1%} | {:.1%} | {:.1%} |", n, *data(n, "cifar10-jpeg-")) for n in (450, 4500, 45000)),
        *(("| {:,} | {:.1%} | {:.1%} | {:.1%} | {:.1%} |", n, *data(n)) for n in (180, 1800, 18000)),
        ("{:.1%} (ViT), {:.1%} (hybrid) and {:.1%} (ConvNet)",
         *(mean(seeds(f"targets-{name}-?", "test_acc")) for name in (
             "vit_nano-10-vit_nano_fast", "hybrid-10-hybrid_fast", "convnet-10-convnet_wide"))),
        ("| {:.0%} | {:.0%} | {:.0%} | {:.0%} |",
         *(mean(seeds(f"cues-{kind}-?", "shape_bias")) for kind in ("ConvNet", "Hybrid", "ViT", "ViT-mean-pooling"))),
        *(("{} |" + " {:.1%} |" * 6, words, *reach(kind)) for words, kind in (
            ("CLS or mean pooling", "ViT"), ("CLS or mean pooling", "ViT-mean-pooling"), ("| hybrid", "Hybrid"),
            ("| ConvNet", "ConvNet"))),
    ],
    stated=[
        ("at 5% for the three comparisons together", "CONFIDENCE in vit_bridge/compare/statistics.py"),
        ("--minutes 30", "an option"),
        ("under a ceiling of 100%", "definition of an accuracy"),
    ],
)

# ---- docs/concepts.md -------------------------------------------------------------------------------------

PAGES["docs/concepts.md"] = Page(
    measured=[
    ],
    stated=[
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
    ],
    stated=[
    ],
)

# ---- docs/reliability.md ----------------------------------------------------------------------------------

PAGES["docs/reliability.md"] = Page(
    measured=[
    ],
    stated=[
    ],
)

# ---- docs/speed.md ----------------------------------------------------------------------------------------

PAGES["docs/speed.md"] = Page(
    measured=[
    ],
    stated=[
    ],
)

# ---- docs/training.md -------------------------------------------------------------------------------------

PAGES["docs/training.md"] = Page(
    measured=[
    ],
    stated=[
    ],
)
