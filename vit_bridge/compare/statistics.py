"""Rankings of models, and how certain they are.

    Ranking                       the best model, those tied with it and those behind; describe_ranking puts it in words
    rank_trainings, rank_samples  rank models tested on the same images, or by one accuracy per seed
    rank_kept, rank_falls         rank models by accuracy kept on changed images, or lost on harder tasks
    Noise, power, smallest_lead   how often a lead is found, and the smallest lead that usually is

Shapes:  S seeds, n test images.
"""

import math
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import mean, stdev, variance

import torch

from vit_bridge.analysis.metrics import wilson_interval
from vit_bridge.errors import InputError, join_words

MIN_IMAGES = 20  # with fewer test images, no winner is declared
FOUND = 0.8  # the fraction of comparisons that must find a lead for it to count as the smallest lead
# Student's t by degrees of freedom: two-sided 5% for three comparisons together (Bonferroni: 5% / 3 each).
CONFIDENCE = {1: 38.19, 2: 7.649, 3: 4.857, 4: 3.961, 5: 3.534, 6: 3.287, 8: 3.016, 10: 2.870, 15: 2.694, 20: 2.613,
              30: 2.536, 60: 2.463, 120: 2.428}


# ---- Intervals --------------------------------------------------------------------------------------------


def t_quantile(df):
    """Return the quantile for `df` >= 1; between two entries of CONFIDENCE, return the larger one."""
    return CONFIDENCE[max(known for known in CONFIDENCE if known <= df)]


def half_width(parts):
    """Return half the interval's width for a sum of (variance, degrees of freedom) parts, by Welch-Satterthwaite."""
    variance = sum(part for part, _ in parts)
    df = variance**2 / sum(part**2 / own for part, own in parts)
    return t_quantile(max(1, df)) * math.sqrt(variance)


def compare_two(first, second):
    """Compare the mean accuracies of two models that were tested on the same images.

    Parameters
    ----------
    first, second : list of dict
        One row per training run: `accuracy`, and `right`, n booleans.

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
    by_image = [torch.tensor([row["right"] for row in rows]).double().mean(dim=0) for rows in (first, second)]  # (n)
    differences = torch.cat([by_image[0] - by_image[1], torch.tensor([1.0, -1.0]).double()])  # (n + 2)
    parts = [(differences.var().item() / len(differences), len(differences) - 1),
             *((stdev(values) ** 2 / len(values), len(values) - 1) for values in accuracies)]
    return mean(accuracies[0]) - mean(accuracies[1]), half_width(parts)


def margin(first, second, n, of_images=None):
    """Return how far the means of two samples of accuracies may differ by chance.

    Chance includes variation between seeds and between images; each sample is treated as if it had its own n images.
    The margin is infinite if a sample has fewer than two accuracies.

    Parameters
    ----------
    first, second : list of float
        One accuracy per seed.
    n : int
        Number of test images behind each accuracy.
    of_images : float, optional
        Variance between images. By default it is the variance of an accuracy; for a drop from one accuracy to another,
        it is at most 0.5 / n.
    """
    if min(len(first), len(second)) < 2:
        return math.inf
    parts = [(stdev(values) ** 2 / len(values), len(values) - 1) for values in (first, second)]
    parts += [(mean(values) * (1 - mean(values)) / n + 1 / n**2 if of_images is None else of_images, n)
              for values in (first, second)]
    return half_width(parts)


def variance_of_ratio(before, after, n):
    """Return the variance of after / before, two counts of correct predictions on n images (delta method).

    Each count is treated as if it came from its own images.
    """
    after = max(after, 1)
    return (after / before) ** 2 * ((1 - after / n) / after + (1 - before / n) / before)


# ---- What can be found ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """The noise that can hide a lead between two models, each trained with S seeds and tested on the same n images.

    Attributes
    ----------
    n_images, n_seeds : int
        n and S.
    spread : float
        Standard deviation between a model's seeds, beyond the part explained by the choice of test images.
    chance : float
        Variance of one seed's result on an image (1 right, 0 wrong) about the mean of all seeds.
    apart : float
        Variance over the images of the difference between two models, each averaged over its seeds.
    """

    n_images: int
    n_seeds: int
    spread: float
    chance: float
    apart: float


def assumed_noise(n_images, n_seeds, spread=0.01, accuracy=0.75):
    """Return the Noise to expect before any training, for an assumed spread and accuracy.

    Correct predictions are assumed to be independent between seeds. This is the worst case: in practice, an image that
    is hard for one seed is usually hard for the others too.
    """
    chance = accuracy * (1 - accuracy)
    return Noise(n_images, n_seeds, spread, chance, 2 * chance / n_seeds)


def measured_noise(rows):
    """Return the Noise of {name: [one row per training run]}, averaged over the models and their pairs.

    The rows have the form used in compare_two().
    """
    right = [torch.tensor([row["right"] for row in own]).double() for own in rows.values()]  # each (S, n)
    n_seeds, n = right[0].shape
    chance = mean(own.var(dim=0).mean().item() for own in right)
    between = mean(variance(row["accuracy"] for row in own) for own in rows.values())
    apart = mean((one.mean(dim=0) - other.mean(dim=0)).var().item() for one, other in combinations(right, 2))
    return Noise(n, n_seeds, math.sqrt(max(0, between - chance / n)), chance, apart)


def power(lead, noise, draws=2000):
    """Return how often compare_two() finds a lead of this size, as a fraction of all comparisons.

    The observed lead is assumed to be normally distributed. The width of its interval depends on the seeds, which are
    simulated, always with the same random numbers. The power is 0 with fewer than MIN_IMAGES images or two seeds.
    """
    n, n_seeds = noise.n_images, noise.n_seeds
    if n < MIN_IMAGES or n_seeds < 2:
        return 0.0
    between = noise.spread**2 + noise.chance / n  # variance between the accuracies of a model's seeds
    drawn = torch.randn(draws, 2, n_seeds, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = ((n - 1) * noise.apart + 2) / (n + 1) / (n + 2), n + 1  # with one image added for each side
    half_widths = torch.tensor([half_width([images, *((part, n_seeds - 1) for part in parts)])
                                for parts in (between * drawn.var(dim=2) / n_seeds).tolist()])  # (draws)
    # the chance part of each seed is in `apart` too, and must count only once
    error = math.sqrt(2 * between / n_seeds + max(0, noise.apart - 2 * noise.chance / n_seeds) / n)
    return torch.special.ndtr((lead - half_widths) / max(error, 1e-12)).mean().item()


def smallest_lead(noise, share=FOUND):
    """Return the smallest lead found in this fraction of comparisons, to 0.01 points; infinite if there is none."""
    low, high = 0, 10_000  # hundredths of a point
    if power(1.0, noise) < share:
        return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle / 10_000, noise) >= share else (middle, high)
    return high / 10_000


def learned_level(n, guessing=0.5):
    """Return the accuracy that shows learning: guessing plus the larger of 0.1 and three standard errors."""
    return guessing + max(0.1, 3 * math.sqrt(guessing * (1 - guessing) / n))


def seeds_that_learned(accuracies, n, guessing):
    """Return which seeds learned, if some clearly did and the others only guess; otherwise None.

    Some seeds must be no better than guessing (by the lower end of a Wilson interval), all others must be above
    learned_level(), and the gap between the two groups must be wider than the range of those that learned. If
    accuracies (each from n images) split like this, their mean describes none of the seeds.
    """
    learned = [own for own in accuracies if own >= learned_level(n, guessing)]
    others = [own for own in accuracies if wilson_interval(round(own * n), n)[0] <= guessing]
    if not learned or not others or len(learned) + len(others) < len(accuracies):
        return None
    if min(learned) - max(others) <= max(learned) - min(learned):
        return None
    return [own >= min(learned) for own in accuracies]


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


def rank_trainings(rows):
    """Rank models that were trained several times and tested on the same images.

    Parameters
    ----------
    rows : dict
        {name: [one row per training run]}, with rows as in compare_two().

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
        raise InputError("a comparison needs at least two kinds of model and two seeds of each; train the missing ones")
    values = {name: mean(row["accuracy"] for row in own) for name, own in rows.items()}
    best = rows[max(values, key=values.get)]
    few = len(best[0]["right"]) < MIN_IMAGES
    return rank(values, {name: math.inf if few else compare_two(best, own)[1] for name, own in rows.items()})


def rank_samples(samples, n, of_images=None):
    """Return the Ranking of {name: [one accuracy per seed]}, each from its own n images; see margin()."""
    values = {name: mean(own) for name, own in samples.items()}
    best = samples[max(values, key=values.get)]
    return rank(values, {name: margin(best, own, n, of_images) for name, own in samples.items()})


def rank_by_variance(values, variances):
    """Return the Ranking of values with known variances; each difference has its own 95% interval."""
    best = variances[max(values, key=values.get)]
    return rank(values, {name: 1.96 * math.sqrt(best + variances[name]) for name in values})


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


def rank_falls(accuracies, n):
    """Rank models by the accuracy they lose as a task with two classes gets harder, the largest loss first.

    The loss of a seed is its largest drop from one step to a later one.

    Parameters
    ----------
    accuracies : dict
        {name: tensor (S, steps from easy to hard)}, each accuracy from n images.

    Returns
    -------
    Ranking or None
        Ranks the models that learned the task, that is, whose mean accuracy exceeds learned_level() at some step. None
        if no model did.
    """
    falls = {name: (own.cummax(dim=1).values - own).amax(dim=1).tolist() for name, own in accuracies.items()
             if own.mean(dim=0).max() > learned_level(n)}
    return rank_samples(falls, n, 0.5 / n) if falls else None


# ---- Other comparisons ------------------------------------------------------------------------------------


def step_gains(samples, n):
    """Return [(name, gain, margin())] of each name over the previous one, for samples as in rank_samples()."""
    return [(after, mean(samples[after]) - mean(samples[before]), margin(samples[before], samples[after], n))
            for before, after in pairwise(samples)]


def majority_with_every_seed(counts):
    """Return whether there are at least two seeds and each has a majority beyond chance.

    `counts` is a list of (votes in favour, all votes); each Wilson interval must lie above one half.
    """
    return len(counts) > 1 and all(n and wilson_interval(chosen, n)[0] > 0.5 for chosen, n in counts)


def none_beats(accuracies, control, n):
    """Return whether no model, not even with a single seed, beats the control's accuracy by more than chance.

    `accuracies` is {name: [one accuracy per seed]}.
    """
    return all(mean(own) - control <= margin(own, own, n) and seeds_that_learned(own, n, control) is None
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
    """Return the mean, lowest and highest of fractions as text, in percent."""
    return f"{mean(shares):.1%} ({100 * min(shares):.1f} to {100 * max(shares):.1f})"


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
    least, tested = 100 * smallest_lead(noise), f"{noise.n_images:,} images, {noise.n_seeds} seeds"
    if least == math.inf:
        return f"no lead, however large, would be found reliably ({tested})."
    return (f"only a lead of about {least:.{0 if least >= 10 else 1}f} points or more would be found with {FOUND:.0%} "
            f"probability ({tested}).")


def describe_split(name, accuracies, learned):
    """Describe a kind that learned with only some seeds; `learned` comes from seeds_that_learned()."""
    good, bad = ([own for own, has in zip(accuracies, learned, strict=True) if has == which] for which in (True, False))
    return (f"{name} learned with only {len(good)} of {len(accuracies)} seeds. These reach at least {min(good):.1%}, "
            f"the others at most {max(bad):.1%}.")
