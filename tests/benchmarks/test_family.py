"""benchmarks/family.py: learning rates are searched with the first seed, beyond the grid if its edge wins."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def family(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("family", BENCHMARKS / "family.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "family", module)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("best", [1e-3, 1.6e-2, 6.25e-5])
def test_the_search_of_rates_ends_where_an_inner_rate_wins(best, family, monkeypatch):
    tried = {}
    monkeypatch.setattr(family, "read", lambda name, rate, seed: tried.get((name, rate)))
    for _ in range(20):
        rate, missing = family.search("Swin")
        if not missing:
            break
        assert family.chosen_rate("Swin") is None
        tried |= {("Swin", one): dict(val_acc=-abs(one - best)) for one in missing}
    assert rate == family.chosen_rate("Swin") == family.chosen_rate("Swin, no shift") == best
    assert sorted(rate for _, rate in tried)[0] < best < sorted(rate for _, rate in tried)[-1]


def test_a_figure_shows_only_arms_that_were_tested(family, monkeypatch):
    cells = {("ViT", rate, 0): dict(val_acc=0.7 + 0.1 * (rate == 1e-3)) for rate in (5e-4, 1e-3, 2e-3)}
    cells["ViT", 1e-3, 0]["test_acc"] = 0.75
    monkeypatch.setattr(family, "read", lambda name, rate, seed: cells.get((name, float(rate), seed)))
    assert family.accuracies("ViT") == [0.75]
    assert family.accuracies("Swin") == []  # its learning rate is not known yet
    assert [[label.get_text() for label in axes.get_yticklabels()] for axes in family.draw().axes] == [["ViT"]] * 2
