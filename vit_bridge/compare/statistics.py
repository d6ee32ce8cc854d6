"""Who is ahead, and how sure that is.

    Ranking                         the best, who is tied with it, who is behind; describe_ranking says it in words
    rank_trainings, rank_samples    models by predictions on the same images; by one accuracy a seed
    rank_kept, rank_falls           by the accuracy kept on changed images; by the accuracy lost as a task grows harder
    Noise, power, smallest_lead     how often a lead is found, and the smallest that is, before or after a comparison
    seeds_that_learned              which seeds of a kind learned, where the others only guess

Shapes:  S seeds, n test images."""

import math
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import mean, stdev, variance

import torch

from vit_bridge.analysis.metrics import wilson_interval
from vit_bridge.errors import InputError

MIN_IMAGES = 20  # with fewer test images, nobody is named the winner
FOUND = 0.8  # the share of comparisons in which the smallest lead is found
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


# ---- What can be found ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """What hides a lead between two models, each trained with S seeds and tested on the same n images.

    spread   standard deviation between a model's seeds, beyond what the images give by chance
    chance   variance of one seed's answer to an image (1 right, 0 wrong) about the mean of all seeds
    apart    variance of the models' difference image by image, each the mean over its seeds
    """
    n_images: int
    n_seeds: int
    spread: float
    chance: float
    apart: float


def assumed_noise(n_images, n_seeds, spread=0.01, accuracy=0.75):
    """The Noise before anything is trained, if each answer is right by chance, with this accuracy. That is the worst
    case: images that are hard for one seed are mostly hard for the others too."""
    chance = accuracy * (1 - accuracy)
    return Noise(n_images, n_seeds, spread, chance, 2 * chance / n_seeds)


def measured_noise(rows):
    """The Noise of {name: [a row a training]}, rows as in compare_two: the mean over the models, and over their
    pairs."""
    right = [torch.tensor([row["right"] for row in own]).double() for own in rows.values()]  # each (S, n)
    n_seeds, n = right[0].shape
    chance = mean(own.var(dim=0).mean().item() for own in right)
    between = mean(variance(row["accuracy"] for row in own) for own in rows.values())
    apart = mean((one.mean(dim=0) - other.mean(dim=0)).var().item() for one, other in combinations(right, 2))
    return Noise(n, n_seeds, math.sqrt(max(0, between - chance / n)), chance, apart)


def power(lead, noise, draws=2000):
    """How often compare_two() puts a model that is better by `lead` ahead of another: a share of all comparisons.

    The lead that is seen is normal; half the width of its interval varies with the seeds, which are drawn (always the
    same draws). 0 with fewer than MIN_IMAGES images or two seeds.
    """
    n, n_seeds = noise.n_images, noise.n_seeds
    if n < MIN_IMAGES or n_seeds < 2:
        return 0.0
    between = noise.spread**2 + noise.chance / n  # variance between the accuracies of a model's seeds
    drawn = torch.randn(draws, 2, n_seeds, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = ((n - 1) * noise.apart + 2) / (n + 1) / (n + 2), n + 1  # with one image added for each side
    half_widths = torch.tensor([half_width([images, *((part, n_seeds - 1) for part in parts)])
                                for parts in (between * drawn.var(dim=2) / n_seeds).tolist()])  # (draws)
    # the seeds' own chance is in `apart` too; a lead varies by it only once
    error = math.sqrt(2 * between / n_seeds + max(0, noise.apart - 2 * noise.chance / n_seeds) / n)
    return torch.special.ndtr((lead - half_widths) / max(error, 1e-12)).mean().item()


def smallest_lead(noise, share=FOUND):
    """The smallest lead that is found in this share of comparisons, to a hundredth of a point; infinite where none
    is."""
    low, high = 0, 10_000  # hundredths of a point
    if power(1.0, noise) < share:
        return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle / 10_000, noise) >= share else (middle, high)
    return high / 10_000


def learned_level(n, guessing=0.5):
    """The accuracy on n images from which a model has learned: a tenth above guessing, and three standard errors."""
    return guessing + max(0.1, 3 * math.sqrt(guessing * (1 - guessing) / n))


def seeds_that_learned(accuracies, n, guessing):
    """[whether each seed learned] of a kind that learns or does not; None for any other.

    It is one if some seeds are no better than guessing, by the lower end of a Wilson interval, all others are above
    learned_level(), and the gap between the two is wider than the span of those that learned. Such accuracies, of n
    images each, have no mean worth a name.
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

    The loss of a seed is its largest fall from a step to a later one. Learned is a mean accuracy above learned_level()
    at a step.
    """
    falls = {name: (own.cummax(dim=1).values - own).amax(dim=1).tolist() for name, own in accuracies.items()
             if own.mean(dim=0).max() > learned_level(n)}
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
    """Whether no model has a mean accuracy above the control's by more than chance, nor single seeds that learned:
    accuracies, name -> one a seed."""
    return all(mean(own) - control <= margin(own, own, n) and seeds_that_learned(own, n, control) is None
               for own in accuracies.values())


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


def describe_power(noise):
    """In words: how often a lead of 2 points is found, and which lead is found in FOUND of all comparisons."""
    given = (f"{noise.n_images:,} images, {noise.n_seeds} seeds and {100 * noise.spread:.1f} points between seeds "
             f"beyond chance")
    least = smallest_lead(noise)
    if least == math.inf:
        return f"with {given}, no lead is found in {FOUND:.0%} of cases"
    return (f"with {given}, a lead of 2 points over another model is found in {power(0.02, noise):.0%} of cases, one "
            f"of {100 * least:.1f} points in {FOUND:.0%}")


def describe_split(name, accuracies, learned):
    """In words: that this kind learns or does not. learned: from seeds_that_learned()."""
    groups = [[own for own, has in zip(accuracies, learned, strict=True) if has == which] for which in (True, False)]
    ranges = [" to ".join(dict.fromkeys(f"{end:.1%}" for end in (min(own), max(own)))) for own in groups]
    return (f"{name} learns or does not: {len(groups[0])} of {len(accuracies)} seeds learned ({ranges[0]}; otherwise "
            f"{ranges[1]})")
