"""Where the numbers on README and docs come from: for each page its measured numbers, and those with another source.

`measured` has (text, value, ...): the text as it stands on the page, with a format field for each value, and the values
from the cells in benchmarks/results (`cell`, `seeds`) or from the code (`parameters`). `stated` has (text, source): a
number that nobody here measured, as it stands on the page, and the paper, table or definition it comes from.
Line breaks do not matter. tests/test_numbers.py checks that each text is on its page, and that no other number there
looks measured (a decimal fraction, a percentage, or a number with a unit of time, memory or accuracy).
"""

import json
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


class Page:
    """The numbers of one page."""

    def __init__(self, measured=(), stated=()):
        self.measured, self.stated = list(measured), list(stated)


PAGES = {}

# ---- README.md --------------------------------------------------------------------------------------------

PAGES["README.md"] = Page(
    measured=[
    ],
    stated=[
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
