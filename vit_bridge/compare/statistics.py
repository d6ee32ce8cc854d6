"""Rankings of models, and how certain they are.

    Ranking                          the best model, those tied with it and those behind it
    rank_candidates, rank_trainings  rank models that were tested on the same images
    rank_samples                     ranks models by one accuracy per seed
    rank_kept                        ranks models by the accuracy that they keep on changed images
    Noise, power, smallest_lead      how often a lead is found, and the smallest lead that usually is

Every claim "A is ahead of B" that one ranking makes is wrong with a probability of at most 5% for all of them together,
whatever the number of models.

Shapes:  S seeds, n test images, k models.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from statistics import NormalDist, mean, stdev, variance

import numpy as np
import torch

from vit_bridge.analysis.metrics import wilson_interval
from vit_bridge.errors import InputError, join_words

# The nominal probability of at least one wrong claim in a ranking of equal models. The degrees of freedom of three
# seeds are only approximate: the simulated probability is a little higher, but below 5% (benchmarks/verdict_errors.py).
LEVEL = 0.035
MIN_IMAGES = 20  # with fewer test images, no winner is declared
FOUND = 0.8  # the fraction of comparisons that must find a lead for it to count as the smallest lead
SPLIT_Z = 2.5  # width, in standard deviations, of the intervals that part seeds that learned from the others
MOST_IMAGES = 10**7  # images_needed() looks no further


# ---- Intervals --------------------------------------------------------------------------------------------


@cache
def t_quantile(p, df):
    """Return the number that Student's t with `df` degrees of freedom exceeds with probability 1 - p, for p > 1/2.

    With t = sqrt(df) tan(a), the density of the angle a is proportional to cos(a)^(df - 1). It is summed up from a = 0
    to the angle that leaves 1 - p above it.
    """
    angles = np.linspace(0, min(math.pi / 2, 40 / math.sqrt(df)), 4001)
    density = np.cos(angles) ** (df - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])  # trapezoids
    return math.sqrt(df) * math.tan(np.interp(p - 0.5, below / below[-1] / 2, angles))


def half_width(parts, k=2):
    """Return half the width of an interval for a difference of two models, out of k that are compared.

    Parameters
    ----------
    parts : list of (float, float)
        The variance of the difference as a sum of parts, each with its degrees of freedom.
    k : float, optional
        Number of models. The intervals of all k (k - 1) / 2 pairs hold together with 95% probability (Bonferroni).

    Notes
    -----
    The degrees of freedom of the sum are those of Welch and Satterthwaite, rounded down to tenths, and at least 1.
    """
    variance = sum(part for part, _ in parts)
    df = variance**2 / sum(part**2 / own for part, own in parts)
    return t_quantile(1 - LEVEL / (k * (k - 1)), max(1.0, math.floor(10 * df) / 10)) * math.sqrt(variance)


def compare_two(first, second, k=2):
    """Compare the mean accuracies of two models, out of k, that were tested on the same images.

    Parameters
    ----------
    first, second : list of dict
        One row per training run: `accuracy`, and `right`, n booleans.
    k : int, optional
        As in half_width().

    Returns
    -------
    tuple of float
        The difference of the mean accuracies, and half the width of its interval.

    Notes
    -----
    The variance has two parts: between seeds, and between images. The second is the variance, over the images, of the
    difference between the two models, each averaged over its seeds. Two images are added, one that only the first model
    classifies correctly and one that only the second does, so that agreement on a few images proves little.
    """
    accuracies = [[row["accuracy"] for row in rows] for rows in (first, second)]
    by_image = [_right_of(rows).mean(dim=0) for rows in (first, second)]  # (n)
    differences = torch.cat([by_image[0] - by_image[1], torch.tensor([1.0, -1.0]).double()])  # (n + 2)
    parts = [(differences.var().item() / len(differences), len(differences) - 1),
             *((stdev(values) ** 2 / len(values), len(values) - 1) for values in accuracies)]
    return mean(accuracies[0]) - mean(accuracies[1]), half_width(parts, k)


def _right_of(rows):
    """Return which images each row classifies correctly, 1 or 0: (S, n)."""
    return torch.stack([torch.as_tensor(row["right"]) for row in rows]).double()


def margin(first, second, n, k=2):
    """Return how far the means of two samples of accuracies may differ by chance.

    Chance includes variation between seeds and between images; each sample is treated as if it had its own n images.
    The margin is infinite if a sample has fewer than two accuracies.

    Parameters
    ----------
    first, second : list of float
        One accuracy per seed.
    n : int
        Number of test images behind each accuracy.
    k : int, optional
        As in half_width().
    """
    if min(len(first), len(second)) < 2:
        return math.inf
    parts = [(stdev(values) ** 2 / len(values), len(values) - 1) for values in (first, second)]
    parts += [(mean(values) * (1 - mean(values)) / n + 1 / n**2, n)
              for values in (first, second)]
    return half_width(parts, k)


def variance_of_ratio(before, after, n):
    """Return the variance of after / before, two counts of correct predictions on n images (delta method).

    Each count is treated as if it came from its own images.
    """
    after = max(after, 1)
    return (after / before) ** 2 * ((1 - after / n) / after + (1 - before / n) / before)


# ---- What can be found ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """The noise that can hide a lead between two of k models, each trained with S seeds, tested on the same n images.

    Attributes
    ----------
    n_images, n_seeds, n_models : int
        n, S and k.
    spread : float
        Standard deviation between a model's seeds, beyond the part explained by the choice of test images.
    chance : float
        Variance of one seed's result on an image (1 right, 0 wrong) about the mean of all seeds.
    apart : float
        Variance over the images of the difference between two models, each averaged over its seeds.
    """

    n_images: int
    n_seeds: int
    n_models: int
    spread: float
    chance: float
    apart: float


def assumed_noise(n_images, n_seeds, n_models=2, spread=0.01, accuracy=0.75):
    """Return the Noise to expect before any training, for an assumed spread and accuracy.

    Correct predictions are assumed to be independent between seeds. This is the worst case: in practice, an image that
    is hard for one seed is usually hard for the others too.
    """
    chance = accuracy * (1 - accuracy)
    return Noise(n_images, n_seeds, n_models, spread, chance, 2 * chance / n_seeds)


def measured_noise(rows, n_models=None):
    """Return the Noise of {name: [one row per training run]}, averaged over the models and their pairs.

    The rows have the form used in compare_two(). `n_models` is k, by default the number of models in `rows`.
    """
    right = [_right_of(own) for own in rows.values()]  # each (S, n)
    n_seeds, n = right[0].shape
    chance = mean(own.var(dim=0).mean().item() for own in right)
    between = mean(variance(row["accuracy"] for row in own) for own in rows.values())
    apart = mean((one.mean(dim=0) - other.mean(dim=0)).var().item() for one, other in combinations(right, 2))
    return Noise(n, n_seeds, n_models or len(rows), math.sqrt(max(0, between - chance / n)), chance, apart)


def power(lead, noise, draws=2000):
    """Return how often compare_two() finds a lead of this size, as a fraction of all comparisons.

    The observed lead is assumed to be normally distributed. The width of its interval depends on the seeds, which are
    simulated, always with the same random numbers. The power is 0 with fewer than MIN_IMAGES images or two seeds.
    """
    if noise.n_images < MIN_IMAGES or noise.n_seeds < 2:
        return 0.0
    half_widths, error = _simulated_intervals(noise, draws)
    return torch.special.ndtr((lead - half_widths) / max(error, 1e-12)).mean().item()


@cache
def _simulated_intervals(noise, draws):
    """Return (half the width of the interval in each simulated comparison, standard deviation of the lead)."""
    n, n_seeds = noise.n_images, noise.n_seeds
    between = noise.spread**2 + noise.chance / n  # variance between the accuracies of a model's seeds
    drawn = torch.randn(draws, 2, n_seeds, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = ((n - 1) * noise.apart + 2) / (n + 1) / (n + 2), n + 1  # with one image added for each side
    half_widths = torch.tensor([half_width([images, *((part, n_seeds - 1) for part in parts)], noise.n_models)
                                for parts in (between * drawn.var(dim=2) / n_seeds).tolist()])  # (draws)
    # the chance part of each seed is in `apart` too, and must count only once
    return half_widths, math.sqrt(2 * between / n_seeds + max(0, noise.apart - 2 * noise.chance / n_seeds) / n)


def smallest_lead(noise, share=FOUND):
    """Return the smallest lead found in this fraction of comparisons, to 0.01 points; infinite if there is none."""
    low, high = 0, 10_000  # hundredths of a point
    if power(1.0, noise) < share:
        return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle / 10_000, noise) >= share else (middle, high)
    return high / 10_000


def images_needed(lead, noise, share=FOUND):
    """Return the number of test images with which this lead is found in this fraction of comparisons.

    It is exact to 5%, and infinite above MOST_IMAGES: if the seeds alone hide the lead, no number is enough.
    """
    low, high = MIN_IMAGES, MOST_IMAGES
    if power(lead, replace(noise, n_images=high), 500) < share:
        return math.inf
    while high > 1.05 * low:
        middle = round(math.sqrt(low * high))
        found = power(lead, replace(noise, n_images=middle), 500) >= share
        low, high = (low, middle) if found else (middle, high)
    return high


def learned_level(n, guessing=0.5):
    """Return the accuracy that shows learning: guessing plus the larger of 0.1 and three standard errors."""
    return guessing + max(0.1, 3 * math.sqrt(guessing * (1 - guessing) / n))


def seeds_that_learned(accuracies, n, guessing):
    """Return which seeds learned, if some clearly did and the others only guess; otherwise None.

    If accuracies (each from n images) split like this, their mean describes none of the seeds. Some seeds must be no
    better than guessing (by the lower end of a Wilson interval), and all others above learned_level(). The wider Wilson
    intervals of SPLIT_Z must not overlap between the two groups, and the gap between the groups must be wider than the
    range of those that learned.
    """
    learned = [own for own in accuracies if own >= learned_level(n, guessing)]
    others = [own for own in accuracies if wilson_interval(round(own * n), n)[0] <= guessing]
    if not learned or not others or len(learned) + len(others) < len(accuracies):
        return None
    lowest, highest = min(learned), max(others)
    if wilson_interval(round(lowest * n), n, SPLIT_Z)[0] <= wilson_interval(round(highest * n), n, SPLIT_Z)[1]:
        return None
    return None if lowest - highest <= max(learned) - lowest else [own >= lowest for own in accuracies]


# ---- Rankings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """The name with the highest value, and how the others compare with it.

    Attributes
    ----------
    best : str
        The name with the highest value.
    tied, behind : tuple of str
        The other names, highest first: names whose deficit chance could explain, and the rest.
    values : dict
        The value of each name.
    differences, half_widths : dict
        For each other name, the lead of the best over it, and half the width of that lead's interval.
    """

    best: str
    tied: tuple
    behind: tuple
    values: dict
    differences: dict
    half_widths: dict

    @property
    def leaders(self):
        """The best name and all names tied with it."""
        return [self.best, *self.tied]

    @property
    def winner(self):
        """The best name if all others are behind it; None if any is tied or there are no others."""
        return self.best if self.behind and not self.tied else None


def rank(values, half_widths):
    """Return the Ranking of values by name; `half_widths` are for each other name's distance from the best."""
    best, *others = sorted(values, key=values.get, reverse=True)
    differences = {name: values[best] - values[name] for name in others}
    tied = tuple(name for name in others if differences[name] <= half_widths[name])
    behind = tuple(name for name in others if name not in tied)
    return Ranking(best, tied, behind, values, differences, {name: half_widths[name] for name in others})


def rank_candidates(rows, guessing=0.0):
    """Rank models that were trained several times, except those that learned with only some of the seeds.

    The mean over seeds that learned and seeds that only guess describes neither.

    Parameters
    ----------
    rows : dict
        As in rank_trainings().
    guessing : float, optional
        The accuracy without learning.

    Returns
    -------
    tuple
        The Ranking of the models that behave the same with every seed (None if there are fewer than two), and {name:
        [whether each seed learned]} of the others.
    """
    learned = {name: seeds_that_learned([row["accuracy"] for row in own], len(own[0]["right"]), guessing)
               for name, own in rows.items()}
    steady = {name: own for name, own in rows.items() if learned[name] is None}
    return (rank_trainings(steady, len(rows)) if len(steady) > 1 else None,
            {name: own for name, own in learned.items() if own is not None})


def rank_trainings(rows, k=None):
    """Rank models that were trained several times and tested on the same images.

    Parameters
    ----------
    rows : dict
        {name: [one row per training run]}, with rows as in compare_two().
    k : int, optional
        Number of models that were compared, if `rows` has only some of them.

    Returns
    -------
    Ranking
        With fewer than MIN_IMAGES images, all models are tied.

    Raises
    ------
    InputError
        For fewer than two models, or fewer than two training runs of a model.
    """
    if len(rows) < 2 or min(map(len, rows.values())) < 2:
        raise InputError("a comparison needs at least two models and two seeds of each; train the missing ones")
    values = {name: mean(row["accuracy"] for row in own) for name, own in rows.items()}
    best = rows[max(values, key=values.get)]
    few = len(best[0]["right"]) < MIN_IMAGES
    return rank(values, {name: math.inf if few else compare_two(best, own, k or len(rows))[1]
                         for name, own in rows.items()})


def rank_samples(samples, n):
    """Return the Ranking of {name: [one accuracy per seed]}, each from its own n images; see margin()."""
    values = {name: mean(own) for name, own in samples.items()}
    best, k = samples[max(values, key=values.get)], max(2, len(samples))
    return rank(values, {name: margin(best, own, n, k) for name, own in samples.items()})


def rank_by_variance(values, variances):
    """Return the Ranking of values with known variances; the intervals of all pairs hold together with 95%."""
    best, k = variances[max(values, key=values.get)], max(2, len(values))
    z = NormalDist().inv_cdf(1 - 0.05 / (k * (k - 1)))  # Bonferroni
    return rank(values, {name: z * math.sqrt(best + variances[name]) for name in values})


def rank_shares(shares, n):
    """Return the Ranking of fractions of n images, by name."""
    return rank_by_variance(shares, {name: share * (1 - share) / n for name, share in shares.items()})


def rank_speeds(speeds):
    """Return the Ranking of speeds that were measured once; a gap of up to 10% of the fastest is a tie."""
    return rank(speeds, dict.fromkeys(speeds, 0.1 * max(speeds.values())))


def beats_guessing(correct, n, n_classes):
    """Return whether `correct` out of n predictions beats guessing, by the lower end of a Wilson interval."""
    return wilson_interval(correct, n)[0] > 1 / n_classes


def rank_kept(counts, n, n_classes):
    """Rank models by the fraction of correct predictions that stay correct when the images are changed.

    Parameters
    ----------
    counts : dict
        {name: (before, after)}, correct predictions on n images.

    Returns
    -------
    tuple
        The Ranking of the models that still beat guessing after the change (None if there are none), and the names of
        those that fell to guessing. Models that only guessed before the change appear in neither.
    """
    counts = {name: pair for name, pair in counts.items() if beats_guessing(pair[0], n, n_classes)}
    left = {name: pair for name, pair in counts.items() if beats_guessing(pair[1], n, n_classes)}
    shares = {name: after / before for name, (before, after) in left.items()}
    variances = {name: variance_of_ratio(*pair, n) for name, pair in left.items()}
    return rank_by_variance(shares, variances) if left else None, [name for name in counts if name not in left]


# ---- Other comparisons ------------------------------------------------------------------------------------


def gains_over(samples, n, pairs):
    """Return {pair: (gain, margin())} for each pair (before, after) of names, if both have samples.

    The samples are those of rank_samples(). The intervals of all pairs hold together with 95% probability.
    """
    pairs = [pair for pair in pairs if samples.keys() >= {*pair}]
    k = (1 + math.sqrt(1 + 8 * max(1, len(pairs)))) / 2  # k models have as many pairs
    return {(before, after): (mean(samples[after]) - mean(samples[before]),
                              margin(samples[before], samples[after], n, k=k)) for before, after in pairs}


def majority_with_every_seed(counts):
    """Return whether there are at least two seeds and each has a majority beyond chance.

    `counts` is a list of (votes in favour, all votes); each Wilson interval must lie above one half.
    """
    return len(counts) > 1 and all(n and wilson_interval(chosen, n)[0] > 0.5 for chosen, n in counts)


def none_beats(accuracies, control, n):
    """Return whether no model, not even with a single seed, beats the control's accuracy by more than chance.

    `accuracies` is {name: [one accuracy per seed]}.
    """
    k = len(accuracies) + 1  # the control is one more
    return all(mean(own) - control <= margin(own, own, n, k=k) and seeds_that_learned(own, n, control) is None
               for own in accuracies.values())


def sort_by_change(before, after, least):
    """Return three lists of names: values that grew by at least `least`, values that fell by as much, and the rest."""
    change = {name: after[name] - before[name] for name in after}
    grew, fell = [n for n in change if change[n] >= least], [n for n in change if change[n] <= -least]
    return grew, fell, [name for name in change if name not in (*grew, *fell)]


def spread_is_learned(trained, random, uniform):
    """Return whether training spread the heads' attention distances.

    The spread must exceed both twice the spread of random heads and a tenth of the distance of uniform attention.
    """
    return max(trained) - min(trained) > max(2 * (max(random) - min(random)), 0.1 * uniform)


# ---- Words ------------------------------------------------------------------------------------------------


def is_or_are(names):
    return f"{join_words(names)} {'is' if len(names) == 1 else 'are'}"


def mean_min_max(values):
    """Return (mean, lowest, highest)."""
    return mean(values), min(values), max(values)


def format_range(shares):
    """Return the mean of fractions as text, in percent, with the lowest and the highest where these differ."""
    low, high = (f"{100 * one:.1f}" for one in (min(shares), max(shares)))
    return f"{mean(shares):.1%}" + (f" ({low} to {high})" if low != high else "")


def format_lead(ranking, name):
    """Return the lead of the best model over this one as text, with its interval, in percentage points."""
    difference, half = ranking.differences[name], ranking.half_widths[name]
    low, high = difference - half, min(1, difference + half)
    return f"{100 * difference:.1f} points (95% interval {100 * low:.1f} to {100 * high:.1f})"


def describe_ranking(ranking):
    """Describe a Ranking of fractions: which models are ahead, tied or behind."""
    if not (ranking.tied or ranking.behind):
        return f"there is no other model to compare {ranking.best} with"
    if ranking.winner:
        return f"{ranking.best} is ahead of {ranking.behind[0]} by {format_lead(ranking, ranking.behind[0])}"
    text = f"{join_words(ranking.leaders)} cannot be distinguished"
    if ranking.behind:
        closest = ", the closest" if len(ranking.behind) > 1 else ""
        text += f"; {is_or_are(ranking.behind)} behind{closest} by {format_lead(ranking, ranking.behind[0])}"
    return text


def describe_verdict(rows, guessing=0.0):
    """Describe which model is best, or that none is, and which models learned with only some of the seeds.

    Parameters
    ----------
    rows, guessing
        As in rank_candidates().

    Returns
    -------
    list of str
        Lines of text.
    """
    ranking, split = rank_candidates(rows, guessing)
    n, steady = len(next(iter(rows.values()))[0]["right"]), [name for name in rows if name not in split]
    if n < MIN_IMAGES:
        text = f"No winner: {n} images are too few; at least {MIN_IMAGES} are needed."
    elif ranking is None:
        text = f"No winner: {f'only {join_words(steady)}' if steady else 'no model'} behaves the same with every seed."
    else:
        text = f"{'' if ranking.winner else 'No winner: '}{describe_ranking(ranking)}."
    return [text, *(describe_split(name, [row["accuracy"] for row in rows[name]], learned)
                    for name, learned in split.items())]


def describe_leaders(ranking, points=False):
    """Describe which models lead in a Ranking of fractions; with `points`, also by how much if there is a winner."""
    if ranking.winner is None:
        tied = f"{join_words(ranking.leaders)} cannot be distinguished"
        return tied if ranking.tied else describe_ranking(ranking)
    second = ranking.behind[0]
    lead = f" of {second} by {100 * ranking.differences[second]:.1f} points" if points else ""
    return f"{ranking.winner} is ahead{lead}"


def describe_power(noise):
    """Describe which lead is found in FOUND of all comparisons, as a clause that ends with a full stop."""
    least = 100 * smallest_lead(noise)
    tested = f"{noise.n_images:,} images, {noise.n_seeds} seeds, {noise.n_models} models"
    if least == math.inf:
        return f"no lead, however large, would be found reliably ({tested})."
    return (f"only a lead of about {least:.{0 if least >= 10 else 1}f} points or more would be found with {FOUND:.0%} "
            f"probability ({tested}).")


def describe_split(name, accuracies, learned):
    """Describe a kind that learned with only some seeds; `learned` comes from seeds_that_learned()."""
    good, bad = ([own for own, has in zip(accuracies, learned, strict=True) if has == which] for which in (True, False))
    return (f"{name} learned with only {len(good)} of {len(accuracies)} seeds. These reach at least {min(good):.1%}, "
            f"the others at most {max(bad):.1%}.")
