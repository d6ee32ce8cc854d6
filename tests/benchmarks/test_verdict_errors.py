"""benchmarks/verdict_errors.py: the simulated models are as good as they should be, and false claims are counted."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def errors(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("verdict_errors", BENCHMARKS / "verdict_errors.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "verdict_errors", module)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def right_of(errors, answers, learns=1.0, spread=0.0):
    """The simulated predictions of two models, (k, S, n), and which seeds of the first one learned."""
    setting = errors.Setting("", (0.9, 0.7), 20_000, spread, answers, learns)
    rows, learned = errors.simulate(setting, torch.Generator().manual_seed(3))
    for own in rows.values():
        assert all(row["accuracy"] == pytest.approx(row["right"].double().mean().item()) for row in own)
    return torch.stack([torch.stack([row["right"] for row in own]) for own in rows.values()]).double(), learned


@pytest.mark.parametrize(("answers", "of_seeds", "of_models"), [
    ("independent", 0, 0), ("of all models", 1, 1), ("of each model", 1, 0)])
def test_simulated_models_have_their_accuracies_and_share_the_difficulty_of_images(errors, answers, of_seeds,
                                                                                   of_models):
    right, learned = right_of(errors, answers)
    assert learned == [True] * 3
    assert right.mean(dim=2).flatten().tolist() == pytest.approx([0.9] * 3 + [0.7] * 3, abs=0.015)
    together = torch.corrcoef(right.flatten(0, 1))
    assert (together[3, 4] > 0.5) == bool(of_seeds)
    assert (together[0, 3] > 0.2) == bool(of_models)
    assert together[3, 4].abs() > 0.5 or together[3, 4].abs() < 0.03


def test_seeds_that_do_not_learn_guess_and_seeds_spread(errors):
    right, learned = right_of(errors, "independent", learns=0.5)
    assert 0 < sum(learned) < 3
    assert right[0].mean(dim=1).tolist() == pytest.approx([0.9 if own else 0.5 for own in learned], abs=0.015)
    right, _ = right_of(errors, "independent", spread=0.1)
    assert right.mean(dim=2).std(dim=1).min() > 0.02


def test_measure_counts_false_claims_and_leads_that_are_found(errors, monkeypatch):
    def counts(levels, learns=1.0, n=1000):
        found = errors.measure(errors.Setting("", levels, n, 0.0, "independent", learns), 20, 0)
        return [found[key] for key in ("false_winners", "false_claims", "found", "false_splits")]

    assert counts((0.9, 0.6, 0.6)) == [0, 0, 20, 0]
    assert counts((0.6, 0.9)) == [0, 0, 0, 0]  # a true lead of the second
    monkeypatch.setattr(errors.Setting, "true_levels", property(lambda self: [0.75] * len(self.levels)))
    assert counts((0.9, 0.6, 0.6)) == [20, 20, 20, 0]  # if they were equally good
    assert counts((0.9, 0.9, 0.6)) == [0, 20, 0, 0]  # a false claim without a winner
    split = errors.measure(errors.Setting("", (0.9, 0.6), 1000, 0.0, "independent", 0.5), 20, 0)
    assert split["splits"] == split["splits_found"] > 5
    assert split["false_splits"] == 0


def test_settings_cover_what_the_page_claims(errors):
    found = errors.settings()
    equal = {(len(one.levels), one.n_images, one.spread, one.answers) for one in found if one.what == "equal"}
    assert len(equal) == 2 * 4 * 3 * 3
    assert {one.learns for one in found} == {0.5, 0.8, 1.0}
    assert errors.Setting("", (0.8, 0.7), 9, 0.0, "independent", 0.5).true_levels == pytest.approx([0.65, 0.7])
    leads = [one for one in found if one.what == "a true lead"]
    assert all(one.levels[0] - one.levels[1] == pytest.approx(errors.smallest_lead(
        errors.assumed_noise(one.n_images, 3, len(one.levels)))) for one in leads)
