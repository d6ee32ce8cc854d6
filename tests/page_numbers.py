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
        ("PowerShell 5", "the version of Windows"),
    ],
)

# ---- docs/comparison.md -----------------------------------------------------------------------------------

PAGES["docs/comparison.md"] = Page(
    measured=[
    ],
    stated=[
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

PAGES["docs/looking-inside.md"] = Page(
    measured=[
    ],
    stated=[
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
