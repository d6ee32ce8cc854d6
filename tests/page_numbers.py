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

PAGES["docs/comparison.md"] = Page(
    measured=[
    ],
    stated=[
    ],
)

# ---- docs/concepts.md -------------------------------------------------------------------------------------

PAGES["docs/concepts.md"] = Page(
    stated=[
        ("224 / 16 = 14 patches along each side, so 14 × 14 = **196 tokens**", "definition"),
        ("The 50,176 pixels of a 224 × 224 image make more than two billion pairs", "224² = 50,176, and its square"),
        ("2N²D and 12ND², and they are equal at N = 6D tokens", "the products of one block, counted"),
        ("For ViT-Base that is 4,608 tokens", "6 × 768"),
        ("ImageNet's 1.3 million images, and ahead with 300 million", "Dosovitskiy et al. 2021, Sec. 4.1 and Figure 3"),
        ("a lesson of 90 minutes", "the timetable in lesson.ipynb"),
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
        *((f"`{name}` | `ConvNeXt` | 224 | 1,000 | {{:,}} |", parameters("build_model", name=name))
          for name in ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")),
        ("Ours reach {:.1%} (ViT), {:.1%} (hybrid) and {:.1%} (ConvNet) of the test images of CIFAR-10",
         *(cell(f"weights-{name}-bf16-0", "test_acc") for name in ("vit_nano", "hybrid", "convnet"))),
        ("The largest difference of the ViT formats was {:.1e} of the largest value",
         max(row["difference"] for row in cell("formats-all", "rows"))),
    ],
    stated=[
        ("gives Large as 307M", "Dosovitskiy et al. 2021, Table 1"),
        ("1e-6, in transformers' ViT 1e-12", "the default of each library: vit_bridge/weights/formats.py"),
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
