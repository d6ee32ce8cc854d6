"""Intervals and rankings name a winner only if seeds and images leave no doubt."""

import math
import random
from dataclasses import replace

import pytest
import torch

from vit_bridge.compare import statistics as st
from vit_model import InputError

P = 1 - st.LEVEL / 2  # of t_quantile() in an interval for two models


def rows_of(shares, n=400, seeds=3, spread=0.0, generator=None):
    """Draw rows as from compare_candidates(): each kind with this accuracy, and the same images hard for all."""
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
    """Return {name: [one accuracy per seed]}, half a point apart."""
    return {name: [level + by for by in (-0.005, 0.0, 0.005)] for name, level in levels.items()}


def tenth(df):
    """Degrees of freedom as half_width() rounds them."""
    return max(1, math.floor(10 * df) / 10)


# ---- Trainings tested on the same images


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


def test_rank_trainings_rarely_finds_a_false_winner_among_seeds_that_differ():
    """All noise comes from the seeds here; if the margin ignored them for either model, many would win."""
    generator, named = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        levels = torch.normal(0.7, 0.03, (3, 3), generator=generator).tolist()  # (kinds, seeds)
        rows = {str(kind): [dict(right=[i < 200 * level for i in range(200)], accuracy=level) for level in own]
                for kind, own in enumerate(levels)}
        named += st.rank_trainings(rows).winner is not None
    assert named <= 15  # 5% of 300


def test_compare_two_adds_the_seeds_of_both_models():
    """Compare with a sum by hand, for models whose seeds differ much, little and not at all."""
    def rows(*accuracies, n=100):
        return [dict(right=[i < 50 for i in range(n)], accuracy=own) for own in accuracies]

    images = 2 / 101 / 102, 101  # no image apart but the two that are added
    wide, narrow, same = (0.5, 0.6, 0.7), (0.4, 0.42, 0.44), (0.5, 0.5, 0.5)
    for first, second, parts in ((wide, narrow, [(0.01 / 3, 2), (0.0004 / 3, 2)]), (narrow, wide, [
            (0.0004 / 3, 2), (0.01 / 3, 2)]), (wide, same, [(0.01 / 3, 2)]), (same, wide, [(0.01 / 3, 2)])):
        difference, half = st.compare_two(rows(*first), rows(*second))
        assert difference == pytest.approx(sum(first) / 3 - sum(second) / 3)
        total = images[0] + sum(part for part, _ in parts)
        df = total**2 / (images[0] ** 2 / images[1] + sum(part**2 / own for part, own in parts))
        assert half == pytest.approx(st.t_quantile(P, tenth(df)) * math.sqrt(total))


def test_margin_adds_seeds_and_images_of_both_samples():
    wide, narrow = (0.5, 0.6, 0.7), (0.4, 0.42, 0.44)
    images = [0.6 * 0.4 / 50 + 1 / 2500, 0.42 * 0.58 / 50 + 1 / 2500]
    parts = [(0.01 / 3, 2), (0.0004 / 3, 2), (images[0], 50), (images[1], 50)]
    total = sum(part for part, _ in parts)
    df = total**2 / sum(part**2 / own for part, own in parts)
    for first, second in ((wide, narrow), (narrow, wide)):
        assert st.margin(first, second, 50) == pytest.approx(st.t_quantile(P, tenth(df)) * math.sqrt(total))
    one, other = st.margin(wide, narrow, 10**9), st.margin(narrow, (0.42,) * 3, 10**9)  # seeds alone
    assert one == pytest.approx(st.t_quantile(P, 2.1) * math.sqrt(0.0104 / 3), rel=1e-3)
    assert other == pytest.approx(st.t_quantile(P, 2) * math.sqrt(0.0004 / 3), rel=1e-3)


def test_rank_trainings_ties_when_images_are_few():
    """All seeds are equal, so only the images matter, and 30 images cannot resolve 10 points."""
    def rows(n, share):
        right = [i < round(share * n) for i in range(n)]
        return [dict(seed=seed, right=right, accuracy=sum(right) / n) for seed in range(3)]

    for n, winner in ((30, None), (3000, "ConvNet")):
        ranking = st.rank_trainings(dict(ConvNet=rows(n, 0.8), Hybrid=rows(n, 0.7), ViT=rows(n, 0.7)))
        assert (ranking.best, ranking.winner) == ("ConvNet", winner)
    difference, half = st.compare_two(rows(30, 0.8), rows(30, 0.7))
    assert difference == pytest.approx(0.1)
    by_image = torch.tensor([0.0] * 27 + [1.0] * 3 + [1.0, -1.0])  # and one more image for each side
    assert half == pytest.approx(st.t_quantile(P, 31) * (by_image.var().item() / 32) ** 0.5, rel=1e-6)


def test_rank_trainings_names_no_winner_below_twenty_images():
    for n, winner in ((2, None), (19, None), (20, "ConvNet")):
        rows = {kind: [dict(seed=seed, right=[right] * n, accuracy=float(right)) for seed in range(3)]
                for kind, right in (("ConvNet", True), ("ViT", False))}
        assert st.rank_trainings(rows).winner == winner
    assert st.rank_samples(dict(ViT=[44 / 50] * 3, ConvNet=[45 / 50] * 3), 50).winner is None


def test_rank_trainings_needs_two_seeds_and_two_models():
    with pytest.raises(InputError, match="two seeds"):
        st.rank_trainings(rows_of(dict(ConvNet=0.9, ViT=0.1), seeds=1))
    with pytest.raises(InputError, match="two models"):
        st.rank_trainings(rows_of(dict(ConvNet=0.9)))


# ---- Samples, shares, speeds


def test_rank_samples_ties_samples_of_one_seed():
    assert st.rank_samples(dict(A=[0.9], B=[0.1]), 1000).tied == ("B",)
    assert st.margin([0.9], [0.1, 0.2], 1000) == math.inf
    assert st.rank_samples(accuracies_of(dict(A=0.9, B=0.1)), 1000).winner == "A"


def test_rank_samples_names_no_winner_among_one():
    alone = st.rank_samples(accuracies_of(dict(A=0.9)), 1000)
    assert (alone.best, alone.leaders, alone.winner) == ("A", ["A"], None)
    assert st.describe_ranking(alone) == st.describe_leaders(alone) == "there is no other model to compare A with"


def test_rank_shares_ties_shares_of_few_images():
    assert st.rank_shares(dict(A=0.9, B=0.5), 1000).winner == "A"
    assert st.rank_shares(dict(A=0.88, B=0.9), 50).tied == ("A",)


def test_rank_by_variance_takes_a_95_percent_interval():
    """The two-sided 5% of a normal distribution: ndtr(-1.96) = 2.5%."""
    ranking = st.rank_by_variance(dict(A=3.0, B=0.0), dict(A=1.0, B=3.0))
    assert ranking.half_widths == pytest.approx(dict(B=1.96 * 2), rel=1e-4)
    assert torch.special.ndtr(torch.tensor(-ranking.half_widths["B"] / 2)).item() == pytest.approx(0.025, rel=1e-3)
    assert (ranking.winner, st.rank_by_variance(dict(A=4.0, B=0.0), dict(A=1.0, B=3.0)).winner) == (None, "A")


def test_rank_by_variance_takes_wider_intervals_for_more_models():
    """Bonferroni: each of the three pairs of three models has 5% / 3."""
    half = st.rank_by_variance(dict(A=1.0, B=0.5, C=0.0), dict(A=0.5, B=0.5, C=0.5)).half_widths["B"]
    assert torch.special.ndtr(torch.tensor(-half, dtype=torch.float64)).item() == pytest.approx(0.05 / 6)


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


@pytest.mark.parametrize(("n", "level"), [(100, 0.65), (900, 0.6), (10_000, 0.6), (25, 0.8)])
def test_learned_is_a_tenth_above_guessing_and_three_standard_errors(n, level):
    assert st.learned_level(n) == pytest.approx(level)


def test_learned_level_of_ten_classes():
    assert st.learned_level(10_000, 0.1) == pytest.approx(0.2)
    assert st.learned_level(25, 0.1) == pytest.approx(0.1 + 3 * 0.06)


@pytest.mark.parametrize(("accuracies", "learned"), [
    ((0.97, 0.5, 0.96), [True, False, True]), ((0.49, 0.51, 0.9), [False, False, True]),
    ((0.97, 0.96, 0.95), None),  # all learned
    ((0.5, 0.51, 0.5), None),  # none
    ((0.97, 0.55, 0.96), None),  # better than guessing, and not yet learned: a spread
    ((0.95, 0.7, 0.5), None),  # the learned differ more among themselves than from guessing
    ((0.0, 0.9, 0.9), [False, True, True])])  # as a training that diverged
def test_seeds_that_learned_part_those_that_guess(accuracies, learned):
    assert st.seeds_that_learned(accuracies, 1000, 0.5) == learned


def test_seeds_that_learned_part_only_if_images_do_not_explain_it():
    for n, learned in ((30, None), (60, [True, False, True])):  # 25 and 50 right, and half of the images
        assert st.seeds_that_learned((25 / 30, 15 / 30, 25 / 30), n, 0.5) == learned


def rows_with(accuracies, n=1000):
    """Return rows as from compare_candidates(), with these accuracies per seed."""
    return {name: [dict(seed=seed, right=[i < round(level * n) for i in range(n)], accuracy=level)
                   for seed, level in enumerate(own)] for name, own in accuracies.items()}


def test_rank_candidates_ranks_no_mean_of_seeds_that_part():
    rows = rows_with(dict(A=(0.9, 0.91, 0.9), B=(0.7, 0.71, 0.7), C=(0.97, 0.5, 0.96)))
    ranking, split = st.rank_candidates(rows, 0.5)
    assert (ranking.winner, split) == ("A", dict(C=[True, False, True]))  # not C, whose mean is between them
    assert ranking.half_widths["B"] == st.compare_two(rows["A"], rows["B"], 3)[1]  # C was compared, too
    assert st.rank_candidates(rows, 0.0)[1] == {}
    assert st.rank_candidates({name: rows[name] for name in "AC"}, 0.5) == (None, dict(C=[True, False, True]))


def test_describe_verdict_names_a_winner_or_none():
    rows = rows_with(dict(A=(0.9, 0.91, 0.9), B=(0.7, 0.71, 0.7), C=(0.97, 0.5, 0.96)))
    split = "C learned with only 2 of 3 seeds. These reach at least 96.0%, the others at most 50.0%."
    first, second = st.describe_verdict(rows, 0.5)
    assert first.startswith("A is ahead of B by 20.0 points (95% interval ")
    assert second == split
    assert st.describe_verdict({name: rows[name] for name in "AC"}, 0.5) == [
        "No winner: only A behaves the same with every seed.", split]
    assert st.describe_verdict({"C": rows["C"], "D": rows["C"]}, 0.5)[0] == (
        "No winner: no model behaves the same with every seed.")
    tied = rows_with(dict(A=(0.9, 0.91, 0.9), B=(0.9, 0.91, 0.91), C=(0.5, 0.51, 0.5)))
    (text,) = st.describe_verdict(tied)
    assert text.startswith("No winner: B and A cannot be distinguished; C is behind by 40.")
    assert st.describe_verdict(rows_with(dict(A=(1.0, 1.0), B=(0.0, 0.0)), n=19)) == [
        "No winner: 19 images are too few; at least 20 are needed."]


# ---- Yes or no


def test_gains_are_differences_of_pairs_whose_intervals_hold_together():
    samples = accuracies_of(dict(ViT=0.3, Hybrid=0.301, ConvNet=0.4))
    pairs = [("ViT", "Hybrid"), ("ViT", "ConvNet"), ("Hybrid", "Swin")]  # Swin has no samples yet
    gains = st.gains_over(samples, 1000, pairs)
    assert list(gains) == pairs[:2]
    level = (1 + math.sqrt(17)) / 2  # k (k - 1) / 2 = 2 pairs
    gain, half = gains["ViT", "Hybrid"]
    assert gain == pytest.approx(0.001)
    assert half == st.margin(samples["ViT"], samples["Hybrid"], 1000, k=level) > gain
    gain, half = gains["ViT", "ConvNet"]
    assert gain == pytest.approx(0.1)
    assert gain > half


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
    assert not st.spread_is_learned([8.0, 9.0], [8.0, 8.2], 16.5)  # less than a tenth of uniform


# ---- What can be found


def test_power_follows_its_closed_form_where_seeds_do_not_differ():
    """With a fixed half width and a normal lead, the power is ndtr((lead - half) / error)."""
    noise = st.Noise(1000, 3, 2, spread=0.0, chance=0.0, apart=0.1)
    error = math.sqrt(0.1 / 1000)
    half = st.t_quantile(P, 1001) * math.sqrt((999 * 0.1 + 2) / 1001 / 1002)
    for lead in (0.0, 0.02, 0.03):
        expected = torch.special.ndtr(torch.tensor((lead - half) / error)).item()
        assert st.power(lead, noise) == pytest.approx(expected, rel=1e-4)
    assert st.smallest_lead(noise) == pytest.approx(half + 0.84162 * error, abs=1e-4)  # ndtr(0.84162) = 80%


def test_power_follows_its_closed_form_where_seeds_are_all():
    """With two seeds and unlimited images, S / sigma of each side is the absolute value of a normal number."""
    noise = st.Noise(10**9, 2, 2, spread=0.01, chance=0.0, apart=0.0)
    a = torch.linspace(0.0005, 0.9995, 1000).double()
    chi = torch.special.ndtri((1 + a) / 2) ** 2  # chi squared of one degree, by its quantiles
    halves = [st.half_width([(5e-5 * x, 1), (5e-5 * y, 1)]) for x in chi[::20].tolist() for y in chi[::20].tolist()]
    for lead in (0.05, 0.2):
        expected = torch.special.ndtr((lead - torch.tensor(halves)) / 0.01).mean().item()
        assert st.power(lead, noise) == pytest.approx(expected, abs=0.03)


def shares_found(levels, n, spread, by_chance, repeats, seed=0):
    """Simulate comparisons of two models out of three, three seeds each.

    Returns how often compare_two() puts the first ahead, and the Noise with the mean of the measured variances.
    by_chance is the fraction of predictions that do not depend on the image's difficulty.
    """
    generator, found, noises = torch.Generator().manual_seed(seed), 0, []
    for _ in range(repeats):
        hard, rows = torch.rand(n, generator=generator), {}
        for kind, level in enumerate(levels):
            rows[kind] = []
            for _ in range(3):
                chosen, luck = torch.rand(2, n, generator=generator)
                needed = torch.where(chosen < by_chance, luck, hard)  # (n), uniform: the accuracy is the level
                right = (needed < level + spread * torch.randn((), generator=generator)).tolist()
                rows[kind].append(dict(right=right, accuracy=sum(right) / n))
        difference, half = st.compare_two(*rows.values(), 3)
        found += difference > half
        noises.append(st.measured_noise(rows))
    chance, apart = (sum(getattr(noise, name) for noise in noises) / repeats for name in ("chance", "apart"))
    return found / repeats, st.Noise(n, 3, 3, spread, chance, apart)


@pytest.mark.parametrize(("spread", "by_chance", "lead"), [(0.0, 1.0, 0.12), (0.04, 0.5, 0.15), (0.02, 0.2, 0.08)])
def test_power_is_how_often_compare_two_finds_a_lead(spread, by_chance, lead):
    share, noise = shares_found((0.7 + lead / 2, 0.7 - lead / 2), 300, spread, by_chance, 200)
    assert 0.1 < share < 0.95
    assert st.power(lead, noise) == pytest.approx(share, abs=0.11)  # three standard errors of 200


def test_power_of_two_points_is_a_few_percent():
    """With 1,000 images and 0.9 points between seeds, a lead of 2 points is found in 3 to 4% of cases."""
    noise = st.assumed_noise(1000, 3, 3, spread=0.009, accuracy=0.71)
    assert st.power(0.02, noise) == pytest.approx(0.035, abs=0.01)
    share, _ = shares_found((0.72, 0.70), 1000, 0.009, 1.0, 300)
    assert share == pytest.approx(0.03, abs=0.03)


def test_power_grows_with_images_seeds_and_lead():
    base = st.assumed_noise(1000, 3)
    assert st.power(0.05, base) < st.power(0.05, st.assumed_noise(4000, 3))
    assert st.power(0.05, base) < st.power(0.05, st.assumed_noise(1000, 6))
    assert st.power(0.05, base) > st.power(0.05, st.assumed_noise(1000, 3, 2, spread=0.03))
    assert st.power(0.03, base) < st.power(0.05, base)
    assert st.power(st.smallest_lead(base), base) >= 0.8 > st.power(st.smallest_lead(base) - 2e-4, base)
    for noise in (st.assumed_noise(19, 3), st.assumed_noise(1000, 1), st.assumed_noise(1000, 3, 2, spread=0.9)):
        assert st.smallest_lead(noise) == math.inf


def test_measured_noise_matches_hand_values():
    rows = dict(A=[dict(right=[1, 1, 0, 0], accuracy=0.5), dict(right=[1, 1, 1, 0], accuracy=0.75)],
                B=[dict(right=[0, 0, 0, 0], accuracy=0.0)] * 2)
    noise = st.measured_noise(rows)
    assert (noise.n_images, noise.n_seeds, noise.n_models) == (4, 2, 2)
    assert st.measured_noise(rows, 6) == replace(noise, n_models=6)
    assert noise.chance == pytest.approx((0.5 / 4 + 0) / 2)  # one image of four, whose variance is a half
    assert noise.spread == pytest.approx(math.sqrt(0.03125 / 2 - noise.chance / 4), abs=1e-9)
    assert noise.apart == pytest.approx(torch.tensor([1.0, 1.0, 0.5, 0.0]).var().item())


def test_describe_power_names_the_lead_and_what_it_rests_on():
    noise = st.assumed_noise(1000, 3, 3)
    assert st.describe_power(noise) == (
        f"only a lead of about {100 * st.smallest_lead(noise):.1f} points or more would be found with 80% probability "
        f"(1,000 images, 3 seeds, 3 models).")
    assert st.describe_power(st.assumed_noise(30, 3, 6)).startswith("only a lead of about 46 points or more")
    assert st.describe_power(st.assumed_noise(10, 3, 6)) == (
        "no lead, however large, would be found reliably (10 images, 3 seeds, 6 models).")


def test_images_needed_finds_the_lead_and_fewer_do_not():
    noise = st.assumed_noise(100, 3, 3, spread=0.005)
    n = st.images_needed(0.1, noise)
    assert 100 < n < 10_000
    assert st.power(0.1, replace(noise, n_images=n), 500) >= 0.8
    assert st.power(0.1, replace(noise, n_images=round(0.94 * n)), 500) < 0.8
    assert st.images_needed(0.01, noise) == st.images_needed(0.0, noise) == math.inf  # the seeds alone hide it
    assert st.images_needed(0.01, replace(noise, spread=0.0)) < math.inf


# ---- Student's t


@pytest.mark.parametrize(("p", "df", "t"), [  # from printed tables
    (0.975, 4, 2.776), (0.975, 2, 4.303), (0.95, 10, 1.812), (0.995, 3, 5.841), (0.975, 30, 2.042), (0.99, 120, 2.358)])
def test_t_quantile_agrees_with_printed_tables(p, df, t):
    assert st.t_quantile(p, df) == pytest.approx(t, abs=6e-4)


@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 1 - 0.05 / 30])
def test_t_quantile_follows_the_closed_forms(p):
    """Of 1 and 2 degrees of freedom, and of so many that t is normal."""
    assert st.t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-6)
    assert st.t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-5)
    normal = torch.special.ndtri(torch.tensor(p, dtype=torch.float64)).item()
    assert st.t_quantile(p, 1e9) == pytest.approx(normal, rel=1e-4)
    assert normal < st.t_quantile(p, 700) < st.t_quantile(p, 600) < st.t_quantile(p, 30.5) < st.t_quantile(p, 30)


@pytest.mark.parametrize("k", [2, 3, 6, 10])
def test_half_width_shares_the_level_among_all_pairs(k):
    p = 1 - st.LEVEL / 2 / math.comb(k, 2)
    assert st.half_width([(0.25, 2), (0.25, 2)], k) == pytest.approx(st.t_quantile(p, 4) * 0.5**0.5)
    assert st.half_width([(1.0, 120), (0.0, 2)], k) == pytest.approx(st.t_quantile(p, 120))


def test_rankings_count_all_models_of_the_comparison():
    rows = rows_of(dict(A=0.9, B=0.6, C=0.5, D=0.3), spread=0.02)
    ranking = st.rank_trainings(rows)
    assert ranking.half_widths["B"] == st.compare_two(rows["A"], rows["B"], 4)[1]
    two = {name: rows[name] for name in "AB"}
    assert st.rank_trainings(two).half_widths["B"] == st.compare_two(rows["A"], rows["B"])[1]
    assert st.rank_trainings(two, 4).half_widths["B"] == ranking.half_widths["B"]
    samples = {name: [row["accuracy"] for row in own] for name, own in rows.items()}
    assert st.rank_samples(samples, 400).half_widths["B"] == st.margin(samples["A"], samples["B"], 400, k=4)


# ---- Words


def test_join_words_uses_commas_and_and():
    assert [st.join_words(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_bands_are_of_all_seeds():
    assert st.mean_min_max([2, 1, 6]) == (3, 1, 6)
    assert st.format_range([0.2, 0.1, 0.6]) == "30.0% (10.0 to 60.0)"
    assert st.format_range([0.99999, 1.0]) == "100.0%"


@pytest.mark.parametrize(("values", "half", "words"), [
    (dict(A=0.9, B=0.8, C=0.5), 0.05, "A is ahead of B by 10.0 points (95% interval 5.0 to 15.0)"),
    (dict(A=0.9, B=0.88), 0.05, "A and B cannot be distinguished"),
    (dict(A=0.9, B=0.88, C=0.5), 0.05,
     "A and B cannot be distinguished; C is behind by 40.0 points (95% interval 35.0 to 45.0)"),
    (dict(A=0.9, B=0.88, C=0.5, D=0.4), 0.05,
     "A and B cannot be distinguished; C and D are behind, the closest by 40.0 points (95% interval 35.0 to 45.0)"),
    (dict(A=1.0, B=0.0), 0.2, "A is ahead of B by 100.0 points (95% interval 80.0 to 100.0)")])
def test_describe_ranking_puts_a_ranking_in_words(values, half, words):
    ranking = st.rank(values, dict.fromkeys(values, half))
    assert st.describe_ranking(ranking) == words
    leaders = st.describe_leaders(ranking, points=True)
    assert words.startswith(leaders)
    assert "interval" not in leaders
    assert "points" not in st.describe_leaders(ranking)
