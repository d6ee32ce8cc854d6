"""Who is ahead, and how sure that is.

    Ranking                         the best, who is tied with it, who is behind; describe_ranking says it in words
    rank_trainings, rank_samples    models by predictions on the same images; by one accuracy a seed
    rank_kept, rank_falls           by the accuracy kept on changed images; by the accuracy lost as a task grows harder

Shapes:  S seeds, n test images."""

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev

import torch

from vit_bridge.analysis.metrics import wilson_interval
from vit_bridge.errors import InputError

MIN_IMAGES = 20  # with fewer test images, nobody is named the winner
# Student's t by degrees of freedom: two-sided 5% over three comparisons together (Bonferroni: 5% / 3 each).
CONFIDENCE = {1: 38.19, 2: 7.649, 3: 4.857, 4: 3.961, 5: 3.534, 6: 3.287, 8: 3.016, 10: 2.870, 15: 2.694, 20: 2.613,
              30: 2.536, 60: 2.463, 120: 2.428}


# ---- Intervals --------------------------------------------------------------------------------------------


def t_quantile(df):
    """The quantile in CONFIDENCE for df >= 1; between two entries the wider one, that of the lower df."""
    return CONFIDENCE[max(known for known in CONFIDENCE if known <= df)]


def half_width(parts):
    """Half the interval of a sum whose parts have these (variance, degrees of freedom), by Welch and Satterthwaite."""
    variance = sum(part for part, _ in parts)
    df = variance**2 / sum(part**2 / own for part, own in parts)
    return t_quantile(max(1, df)) * math.sqrt(variance)


def compare_two(first, second):
    """(difference of the mean accuracies, half the width of its interval) of two models, each tested on the same n
    images after S trainings: lists of S rows dict(accuracy=, right=[n booleans]).

    The variance is that between seeds plus that between images. The latter is the variance of the differences image by
    image, each the mean over the seeds. One image is added for each side, so that agreement on few images proves
    little.
    """
    accuracies = [[row["accuracy"] for row in rows] for rows in (first, second)]
    by_image = [torch.tensor([row["right"] for row in rows]).double().mean(dim=0) for rows in (first, second)]  # (n)
    differences = torch.cat([by_image[0] - by_image[1], torch.tensor([1.0, -1.0]).double()])  # (n + 2)
    parts = [(differences.var().item() / len(differences), len(differences) - 1),
             *((stdev(values) ** 2 / len(values), len(values) - 1) for values in accuracies)]
    return mean(accuracies[0]) - mean(accuracies[1]), half_width(parts)


def margin(first, second, n, of_images=None):
    """By how much the means of two samples of accuracies, each of n images, may differ by chance, between seeds and
    between images (as if each sample had images of its own). Infinite with fewer than two accuracies in a sample.

    of_images: the variance between images; None: that of an accuracy. For a fall from one accuracy to another it is
    0.5 / n at most.
    """
    if min(len(first), len(second)) < 2:
        return math.inf
    parts = [(stdev(values) ** 2 / len(values), len(values) - 1) for values in (first, second)]
    parts += [(mean(values) * (1 - mean(values)) / n + 1 / n**2 if of_images is None else of_images, n)
              for values in (first, second)]
    return half_width(parts)


def variance_of_ratio(before, after, n):
    """The variance of after / before, two counts of correct predictions of n images, as if each had images of its own
    (delta method)."""
    after = max(after, 1)
    return (after / before) ** 2 * ((1 - after / n) / after + (1 - before / n) / before)


# ---- Rankings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """The name with the highest value, and how the others compare with it.

    tied, behind   the other names, highest first: those within chance of the best, and those further away
    values         name -> value, of all
    differences    name -> the lead of the best over it
    half_widths    name -> half the width of that lead's interval
    """
    best: str
    tied: tuple
    behind: tuple
    values: dict
    differences: dict
    half_widths: dict

    @property
    def leaders(self):
        return [self.best, *self.tied]

    @property
    def winner(self):
        """The best, where all others are behind it; None where any is tied, or where there are no others."""
        return self.best if self.behind and not self.tied else None


def rank(values, half_widths):
    """The Ranking of values by name. half_widths: for the difference of each other name from the best."""
    best, *others = sorted(values, key=values.get, reverse=True)
    differences = {name: values[best] - values[name] for name in others}
    tied = tuple(name for name in others if differences[name] <= half_widths[name])
    behind = tuple(name for name in others if name not in tied)
    return Ranking(best, tied, behind, values, differences, {name: half_widths[name] for name in others})


def rank_trainings(rows):
    """The Ranking of models trained several times and tested on the same images: {name: [a row a training]}, the
    rows as in compare_two. With fewer than MIN_IMAGES images all are tied.

    Raises InputError for fewer than two models, or two trainings of one.
    """
    if len(rows) < 2 or min(map(len, rows.values())) < 2:
        raise InputError("comparing needs at least two kinds of model and two seeds of each; give more minutes")
    values = {name: mean(row["accuracy"] for row in own) for name, own in rows.items()}
    best = rows[max(values, key=values.get)]
    few = len(best[0]["right"]) < MIN_IMAGES
    return rank(values, {name: math.inf if few else compare_two(best, own)[1] for name, own in rows.items()})


def rank_samples(samples, n, of_images=None):
    """The Ranking of {name: one accuracy a seed}, each of n images of its own; of_images as in margin()."""
    values = {name: mean(own) for name, own in samples.items()}
    best = samples[max(values, key=values.get)]
    return rank(values, {name: margin(best, own, n, of_images) for name, own in samples.items()})


def rank_by_variance(values, variances):
    """The Ranking of values with known variances, both by name; intervals are 95% for each difference by itself."""
    best = variances[max(values, key=values.get)]
    return rank(values, {name: 1.96 * math.sqrt(best + variances[name]) for name in values})


def rank_shares(shares, n):
    """The Ranking of fractions of n images, by name."""
    return rank_by_variance(shares, {name: share * (1 - share) / n for name, share in shares.items()})


def rank_speeds(speeds):
    """The Ranking of speeds, each measured once: less than a tenth apart counts as tied."""
    return rank(speeds, dict.fromkeys(speeds, 0.1 * max(speeds.values())))


def beats_guessing(correct, n, n_classes):
    """Whether `correct` of n predictions are more than guessing gives: by the lower end of a Wilson interval."""
    return wilson_interval(correct, n)[0] > 1 / n_classes


def rank_kept(counts, n, n_classes):
    """(the Ranking by the fraction of correct predictions that models keep when their images are changed, who falls to
    guessing). counts: name -> correct predictions of n images (before, after). Who only guesses before the change is
    left out; the Ranking is of those who still beat guessing after it, None if nobody does."""
    counts = {name: pair for name, pair in counts.items() if beats_guessing(pair[0], n, n_classes)}
    left = {name: pair for name, pair in counts.items() if beats_guessing(pair[1], n, n_classes)}
    shares = {name: after / before for name, (before, after) in left.items()}
    variances = {name: variance_of_ratio(*pair, n) for name, pair in left.items()}
    return rank_by_variance(shares, variances) if left else None, [name for name in counts if name not in left]


def rank_falls(accuracies, n):
    """The Ranking of what models lose as a task with two classes grows harder, the largest loss first; None if no model
    learned it. accuracies: name -> tensor (S, steps from easy to hard), of n images each.

    The loss of a seed is its largest fall from a step to a later one. Learned is a mean accuracy above 60% at a step.
    """
    least = max(0.6, 0.5 + 3 * math.sqrt(0.25 / n))
    falls = {name: (own.cummax(dim=1).values - own).amax(dim=1).tolist() for name, own in accuracies.items()
             if own.mean(dim=0).max() > least}
    return rank_samples(falls, n, 0.5 / n) if falls else None


# ---- Other comparisons ------------------------------------------------------------------------------------


def step_gains(samples, n):
    """What each step from one name to the next adds to the mean accuracy: [(name, gain, margin()), ...] of all but the
    first; samples as in rank_samples."""
    return [(after, mean(samples[after]) - mean(samples[before]), margin(samples[before], samples[after], n))
            for before, after in pairwise(samples)]


def majority_with_every_seed(counts):
    """Whether, with at least two seeds, each has a majority beyond chance: counts, [(for it, of how many), ...]; by
    Wilson intervals above a half."""
    return len(counts) > 1 and all(n and wilson_interval(chosen, n)[0] > 0.5 for chosen, n in counts)


def none_beats(accuracies, control, n):
    """Whether no model has a mean accuracy above the control's by more than chance: accuracies, name -> one a seed."""
    return all(mean(own) - control <= margin(own, own, n) for own in accuracies.values())


def sort_by_change(before, after, least):
    """(names whose value grew by at least `least`, that fell by as much, that did neither); before, after: by name."""
    change = {name: after[name] - before[name] for name in after}
    grew, fell = [n for n in change if change[n] >= least], [n for n in change if change[n] <= -least]
    return grew, fell, [name for name in change if name not in (*grew, *fell)]


def spread_is_learned(trained, random, uniform):
    """Whether trained heads differ in distance by more than twice what random ones do, and more than a tenth of the
    distance of uniform attention."""
    return max(trained) - min(trained) > max(2 * (max(random) - min(random)), 0.1 * uniform)


# ---- Words ------------------------------------------------------------------------------------------------


def join_words(words):
    """"a", "a and b", "a, b and c"."""
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def is_or_are(names):
    return f"{join_words(names)} {'is' if len(names) == 1 else 'are'}"


def mean_min_max(values):
    """(mean, lowest, highest)."""
    return mean(values), min(values), max(values)


def format_range(shares):
    """Mean, lowest and highest of shares, as percentages."""
    return f"{mean(shares):.1%} ({100 * min(shares):.1f} to {100 * max(shares):.1f})"


def format_lead(ranking, name):
    """The lead of the best over this name, with its interval, in percentage points."""
    difference, half = ranking.differences[name], ranking.half_widths[name]
    low, high = difference - half, min(1, difference + half)
    return f"{100 * difference:.1f} points (95% interval {100 * low:.1f} to {100 * high:.1f})"


def describe_ranking(ranking):
    """A Ranking of fractions in words: who is ahead, who cannot be told apart, who is behind."""
    if not (ranking.tied or ranking.behind):
        return f"there is nothing to compare {ranking.best} with"
    if ranking.winner:
        return f"{ranking.best} is ahead of {ranking.behind[0]} by {format_lead(ranking, ranking.behind[0])}"
    text = f"{join_words(ranking.leaders)} cannot be told apart"
    if ranking.behind:
        closest = ", the closest" if len(ranking.behind) > 1 else ""
        text += f"; {is_or_are(ranking.behind)} behind{closest} by {format_lead(ranking, ranking.behind[0])}"
    return text
