"""Who is ahead, and how sure that is.

Shapes:  S seeds, n test images."""

import math
from statistics import mean, stdev

import torch

FEW = 20  # of fewer images no winner is named
# Student's t by degrees of freedom: two-sided 5% over three comparisons together (Bonferroni: 5% / 3 each).
CONFIDENCE = {1: 38.19, 2: 7.649, 3: 4.857, 4: 3.961, 5: 3.534, 6: 3.287, 8: 3.016, 10: 2.870, 15: 2.694, 20: 2.613,
              30: 2.536, 60: 2.463, 120: 2.428}


def t_quantile(df):
    """That of CONFIDENCE, for 1 degree of freedom or more; of a number not listed the next lower's, which is wider."""
    return CONFIDENCE[max(known for known in CONFIDENCE if known <= df)]


def compare_two(first, second):
    """(difference of the mean accuracies, half the width of its interval): rows of judge(), of S seeds and n images.

    The variance is that between seeds, plus that between images: of the differences image by image, each the mean over
    the seeds, with one image more that speaks for each side, so that few images that agree prove little. Degrees of
    freedom by Welch and Satterthwaite.
    """
    accuracies = [[row["accuracy"] for row in rows] for rows in (first, second)]
    by_image = [torch.tensor([row["right"] for row in rows]).double().mean(dim=0) for rows in (first, second)]  # (n)
    batch_split_warning = torch.cat([by_image[0] - by_image[1], torch.tensor([1.0, -1.0]).double()])  # (n + 2)
    parts = [(batch_split_warning.var().item() / len(batch_split_warning), len(batch_split_warning) - 1),
             *((stdev(values) ** 2 / len(values), len(values) - 1) for values in accuracies)]
    return mean(accuracies[0]) - mean(accuracies[1]), half_width(parts)


def format_range(shares):
    """Mean, lowest and highest in words."""
    return f"{mean(shares):.1%} ({100 * min(shares):.1f} to {100 * max(shares):.1f})"


def mean_min_max(values):
    """(mean, lowest, highest)."""
    return mean(values), min(values), max(values)


def bands(cells, what="bands"):
    """What bands, or lines, in a figure of cells show."""
    return f"{what}: from the lowest to the highest of {len({cell['seed'] for cell in cells})} seeds"


def margin(first, second, n, of_images=None):
    """What the means of two samples of accuracies, each of n images, may differ by chance, between seeds and between
    images (as if each had images of its own); without end where there are fewer than two of a sample. of_images: the
    variance between images; None: that of an accuracy; of a fall from one accuracy to another it is 0.5 / n at most."""
    if min(len(first), len(second)) < 2:
        return math.inf
    parts = [(stdev(values) ** 2 / len(values), len(values) - 1) for values in (first, second)]
    parts += [(mean(values) * (1 - mean(values)) / n + 1 / n**2 if of_images is None else of_images, n)
              for values in (first, second)]
    return half_width(parts)


def half_width(parts):
    """Half an interval of a sum whose parts have these (variance, degrees of freedom), by Welch and Satterthwaite."""
    variance = sum(part for part, _ in parts)
    df = variance**2 / sum(part**2 / own for part, own in parts)
    return t_quantile(max(1, df)) * math.sqrt(variance)


def level_with_the_best(values, variances):
    """The names of the largest value and of those that cannot be told from it (95%), the best first; both by name."""
    order = sorted(values, key=values.get, reverse=True)
    best = order[0]
    return [name for name in order
            if values[best] - values[name] <= 1.96 * math.sqrt(variances[best] + variances[name])]


def join_words(words):
    """"a", "a and b", "a, b and c"."""
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def variance_of_ratio(before, after, n):
    """Of after / before, two numbers of right answers of n, as if each had images of its own (delta method)."""
    after = max(after, 1)
    return (after / before) ** 2 * ((1 - after / n) / after + (1 - before / n) / before)


def describe_ranking(names, n):
    """Which of n names mind least: where there are several as not to be told apart, where there are all as that."""
    if n == 1:
        return "there is no other to compare it with"
    if len(names) == 1:
        return f"{names[0]} minds it least"
    return f"no difference between {join_words(names)} shows" if len(names) == n else \
        f"{join_words(names)}, not to be told apart, mind it least"
