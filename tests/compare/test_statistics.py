"""Intervals, rankings and their words: a winner only where seeds and images leave no doubt."""

import math
import random

import pytest
import torch

from vit_bridge.compare import statistics as st
from vit_model import InputError


def rows_of(shares, n=400, seeds=3, spread=0.0, generator=None):
    """Rows as from compare_on_dataset(): each kind right by chance in this share, the same images hard for all."""
    generator = generator or random.Random(0)
    hard = [generator.random() for _ in range(n)]
    rows = {}
    for kind, share in shares.items():
        rows[kind] = []
        for seed in range(seeds):
            level = share + spread * generator.gauss(0, 1)
            right = [0.5 * h + 0.5 * generator.random() < level for h in hard]
            rows[kind].append(dict(seed=seed, n_steps=1, right=right, accuracy=sum(right) / n))
    return rows


def accuracies_of(levels):
    """{name: one accuracy a seed}, half a point apart."""
    return {name: [level + by for by in (-0.005, 0.0, 0.005)] for name, level in levels.items()}


# ---- Trainings asked about the same images


def test_rank_trainings_names_a_clear_winner():
    ranking = st.rank_trainings(rows_of(dict(ConvNet=0.9, Hybrid=0.6, ViT=0.5)))
    assert (ranking.winner, ranking.tied, ranking.behind) == ("ConvNet", (), ("Hybrid", "ViT"))
    for name, difference in ranking.differences.items():
        assert difference == pytest.approx(ranking.values["ConvNet"] - ranking.values[name])
        assert 0 < ranking.half_widths[name] < difference
    assert st.rank_trainings(rows_of(dict(ConvNet=0.5, Hybrid=0.6, ViT=0.9))).winner == "ViT"


def test_rank_trainings_ties_a_lead_within_the_noise():
    ranking = st.rank_trainings(rows_of(dict(ConvNet=0.71, Hybrid=0.70, ViT=0.3)))
    assert ranking.winner is None
    assert set(ranking.leaders) == {"ConvNet", "Hybrid"}
    assert ranking.behind == ("ViT",)


def test_rank_trainings_ties_when_seeds_differ_much():
    clear = rows_of(dict(ConvNet=0.75, Hybrid=0.6, ViT=0.6), n=2000)
    noisy = {kind: [dict(row, accuracy=row["accuracy"] + by) for row, by in zip(own, (-0.2, 0, 0.2), strict=True)]
             for kind, own in clear.items()}
    assert st.rank_trainings(clear).winner == "ConvNet"
    assert (st.rank_trainings(noisy).winner, st.rank_trainings(noisy).best) == (None, "ConvNet")


def test_rank_trainings_rarely_finds_a_false_winner():
    generator = random.Random(7)
    named = sum(st.rank_trainings(rows_of(dict(ConvNet=0.7, Hybrid=0.7, ViT=0.7), 200, spread=0.02,
                                          generator=generator)).winner is not None for _ in range(200))
    assert named <= 10  # 5% of 200


def test_rank_trainings_ties_when_images_are_few():
    """Seeds that are all alike: what is left are the images, of which 30 do not tell 10 points apart."""
    def rows(n, share):
        right = [i < round(share * n) for i in range(n)]
        return [dict(seed=seed, right=right, accuracy=sum(right) / n) for seed in range(3)]

    for n, winner in ((30, None), (3000, "ConvNet")):
        ranking = st.rank_trainings(dict(ConvNet=rows(n, 0.8), Hybrid=rows(n, 0.7), ViT=rows(n, 0.7)))
        assert (ranking.best, ranking.winner) == ("ConvNet", winner)
    difference, half = st.compare_two(rows(30, 0.8), rows(30, 0.7))
    assert difference == pytest.approx(0.1)
    by_image = torch.tensor([0.0] * 27 + [1.0] * 3 + [1.0, -1.0])  # and one more image for each side
    assert half == pytest.approx(st.t_quantile(31) * (by_image.var().item() / 32) ** 0.5, rel=1e-6)


def test_rank_trainings_names_no_winner_below_twenty_images():
    for n, winner in ((2, None), (19, None), (20, "ConvNet")):
        rows = {kind: [dict(seed=seed, right=[right] * n, accuracy=float(right)) for seed in range(3)]
                for kind, right in (("ConvNet", True), ("ViT", False))}
        assert st.rank_trainings(rows).winner == winner
    assert st.rank_samples(dict(ViT=[44 / 50] * 3, ConvNet=[45 / 50] * 3), 50).winner is None


def test_rank_trainings_needs_two_seeds_and_two_kinds():
    with pytest.raises(InputError, match="two seeds"):
        st.rank_trainings(rows_of(dict(ConvNet=0.9, ViT=0.1), seeds=1))
    with pytest.raises(InputError, match="two kinds"):
        st.rank_trainings(rows_of(dict(ConvNet=0.9)))


# ---- Samples, shares, speeds


def test_rank_samples_ties_samples_of_one_seed():
    assert st.rank_samples(dict(A=[0.9], B=[0.1]), 1000).tied == ("B",)
    assert st.margin([0.9], [0.1, 0.2], 1000) == math.inf
    assert st.rank_samples(accuracies_of(dict(A=0.9, B=0.1)), 1000).winner == "A"


def test_rank_samples_names_no_winner_among_one():
    alone = st.rank_samples(accuracies_of(dict(A=0.9)), 1000)
    assert (alone.best, alone.leaders, alone.winner) == ("A", ["A"], None)
    assert st.describe_ranking(alone) == "there is nothing to compare A with"


def test_rank_shares_ties_shares_of_few_images():
    assert st.rank_shares(dict(A=0.9, B=0.5), 1000).winner == "A"
    assert st.rank_shares(dict(A=0.88, B=0.9), 50).tied == ("A",)


def test_rank_speeds_ties_speeds_within_a_tenth():
    assert st.rank_speeds(dict(A=9, B=5)).winner == "A"
    assert st.rank_speeds(dict(A=4.8, B=5)).leaders == ["B", "A"]


# ---- What is kept, and what is lost


def test_rank_kept_ignores_chance_and_guessing():
    def kept(*pairs):
        return st.rank_kept(dict(zip("AB", pairs, strict=False)), 400, 10)

    ranking, lost = kept((80, 56), (80, 66))  # 70% and 83%, of 80 predictions each
    assert (ranking.leaders, lost) == (["B", "A"], [])
    assert kept((380, 90), (380, 170))[0].winner == "B"
    assert kept((60, 30), (60, 36)) == (None, ["A", "B"])
    ranking, lost = kept((380, 90), (380, 42))
    assert (ranking.leaders, ranking.winner, lost) == (["A"], None, ["B"])
    assert kept((60, 30)) == (None, ["A"])


def test_rank_kept_leaves_out_models_that_guessed_before():
    ranking, lost = st.rank_kept(dict(A=(90, 30), B=(12, 30)), 100, 10)
    assert (list(ranking.values), lost) == (["A"], [])
    assert ranking.values["A"] == pytest.approx(1 / 3)
    assert st.rank_kept(dict(B=(12, 30)), 100, 10) == (None, [])


def test_variance_of_ratio_matches_a_hand_value():
    # 90 and 50 of 380 with p = 0.225 and 0.125: (90/380)^2 (0.775/90 + 0.05/380)
    assert st.variance_of_ratio(380, 90, 400) == pytest.approx(0.05609 * (0.008611 + 0.0001316), rel=1e-3)


def falls(**levels):
    return st.rank_falls({name: torch.tensor([own] * 3).double() / 100 for name, own in levels.items()}, 100)


def test_rank_falls_measures_from_earlier_to_later_steps():
    assert falls(ViT=(98, 97), ConvNet=(99, 55)).winner == "ConvNet"
    assert falls(ViT=(99, 51, 98), ConvNet=(99, 98, 97)).values["ViT"] == pytest.approx(0.48)
    assert falls(ViT=(55, 99), ConvNet=(99, 98)).best == "ConvNet"  # which rises loses nothing
    alike = falls(ViT=(99, 55), Hybrid=(98, 97), ConvNet=(99, 54))
    assert (alike.leaders, alike.behind) == (["ConvNet", "ViT"], ("Hybrid",))


def test_rank_falls_leaves_out_models_that_learned_nothing():
    assert list(falls(ViT=(51, 50), ConvNet=(99, 55)).values) == ["ConvNet"]
    assert falls(ViT=(50, 49), ConvNet=(52, 55)) is None


def test_rank_falls_ties_single_measurements():
    one = {name: torch.tensor([own]).double() / 100 for name, own in (("ViT", (99, 97)), ("ConvNet", (99, 55)))}
    assert st.rank_falls(one, 100).winner is None


# ---- Yes or no


def test_step_gains_are_differences_between_neighbours():
    samples = accuracies_of(dict(ViT=0.3, Hybrid=0.301, ConvNet=0.4))
    (first, gain, half), (second, larger, other) = st.step_gains(samples, 1000)
    assert (first, second) == ("Hybrid", "ConvNet")
    assert gain == pytest.approx(0.001)
    assert half == st.margin(samples["ViT"], samples["Hybrid"], 1000) > gain
    assert larger == pytest.approx(0.099)
    assert larger > other


@pytest.mark.parametrize(("counts", "expected"), [
    ([(80, 100)] * 3, True), ([(80, 100)], False), ([(80, 100), (70, 100), (40, 100)], False),
    ([(55, 100)] * 3, False), ([(80, 100), (0, 0), (0, 0)], False)])
def test_majority_with_every_seed_must_beat_chance(counts, expected):
    assert st.majority_with_every_seed(counts) == expected


def test_none_beats_allows_for_chance():
    for share, none in ((0.9, False), (0.49, True), (0.51, True)):
        accuracies = {kind: [share - 0.01, share, share + 0.01] for kind in ("ConvNet", "ViT")}
        assert st.none_beats(accuracies, 0.5, 1000) == none


def test_sort_by_change_groups_by_sign():
    assert st.sort_by_change(dict(A=1, B=1, C=1), dict(A=2, B=0, C=1.4), 0.5) == (["A"], ["B"], ["C"])


def test_spread_is_learned_compares_with_random_heads():
    assert st.spread_is_learned([2.0, 15.0], [8.0, 8.2], 16.5)
    assert not st.spread_is_learned([8.0, 8.2], [8.0, 8.2], 16.5)
    assert not st.spread_is_learned([4.0, 12.0], [4.0, 10.0], 16.5)  # less than twice


# ---- Student's t


def student_tail(t, df, step=1e-3, end=400.0):
    """P(T > t) for Student's t, by the trapezoid rule; of df = 1, whose tail is too long for that, by its formula."""
    if df == 1:
        return 0.5 - math.atan(t) / math.pi
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    x = torch.arange(t, end, step, dtype=torch.float64)
    return (constant * torch.trapezoid((1 + x**2 / df) ** (-(df + 1) / 2), x)).item()


@pytest.mark.parametrize("df", sorted(st.CONFIDENCE))
def test_confidence_holds_students_t_quantiles(df):
    assert student_tail(st.CONFIDENCE[df], df) == pytest.approx(0.05 / 3 / 2, rel=2e-3)


def test_t_quantile_rounds_degrees_of_freedom_down():
    assert [st.t_quantile(df) for df in (1, 2, 2.9, 5, 7, 400)] == [38.19, 7.649, 7.649, 3.534, 3.287, 2.428]


def test_half_width_combines_degrees_of_freedom():
    assert st.half_width([(0.25, 2), (0.25, 2)]) == pytest.approx(st.CONFIDENCE[4] * 0.5**0.5)
    assert st.half_width([(1.0, 120), (0.0, 2)]) == pytest.approx(st.CONFIDENCE[120])


# ---- Words


def test_join_words_uses_commas_and_and():
    assert [st.join_words(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


@pytest.mark.parametrize(("values", "half", "words"), [
    (dict(A=0.9, B=0.8, C=0.5), 0.05, "A is ahead of B by 10.0 points (95% interval 5.0 to 15.0)"),
    (dict(A=0.9, B=0.88), 0.05, "A and B cannot be told apart"),
    (dict(A=0.9, B=0.88, C=0.5), 0.05,
     "A and B cannot be told apart; C is behind by 40.0 points (95% interval 35.0 to 45.0)"),
    (dict(A=0.9, B=0.88, C=0.5, D=0.4), 0.05,
     "A and B cannot be told apart; C and D are behind, the closest by 40.0 points (95% interval 35.0 to 45.0)"),
    (dict(A=1.0, B=0.0), 0.2, "A is ahead of B by 100.0 points (95% interval 80.0 to 100.0)")])
def test_describe_ranking_puts_a_ranking_in_words(values, half, words):
    assert st.describe_ranking(st.rank(values, dict.fromkeys(values, half))) == words
