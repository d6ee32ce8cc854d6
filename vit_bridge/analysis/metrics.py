"""Which classes are confused, and how sure an accuracy is.

Shapes:  K classes, n images."""

import math

from vit_bridge.errors import InputError

# ---- Confusion --------------------------------------------------------------------------------------------


def confusion_matrix(labels, predictions, n_classes):
    """How many images of each class were taken for each class, (K, K) int64: rows are true, columns predicted.

    labels, predictions: class numbers from 0, int64 (n). Raises InputError where they are not equally many, and for
    a number out of range.
    """
    if labels.shape != predictions.shape or labels.ndim != 1:
        raise InputError(f"labels of shape {tuple(labels.shape)} and predictions of shape {tuple(predictions.shape)} "
                         f"are no pairs; expected one of each for an image, (n)")
    labels, predictions = labels.cpu(), predictions.cpu()
    for name, values in (("labels", labels), ("predictions", predictions)):
        if len(values) and not 0 <= values.min() <= values.max() < n_classes:
            raise InputError(f"{name} from {values.min()} to {values.max()} are out of range; expected 0 to "
                             f"{n_classes - 1}, a number for each class of the model")
    pairs = labels * n_classes + predictions  # (n)
    return pairs.bincount(minlength=n_classes**2).reshape(n_classes, n_classes)  # (K, K)


def class_recalls(confusion):
    """The fraction of each class's images that were recognised, (K) float64; NaN for a class without images.

    confusion: (K, K), as from confusion_matrix.
    """
    return confusion.diagonal().double() / confusion.sum(dim=1)


def balanced_accuracy(confusion):
    """The mean of class_recalls over the classes that have images: rare classes count as much as frequent ones.

    Raises InputError where no class has images.
    """
    if not confusion.any():
        raise InputError("the confusion matrix counts 0 images; expected at least one, check the data")
    return class_recalls(confusion).nanmean().item()


# ---- Intervals --------------------------------------------------------------------------------------------


def wilson_interval(correct, n, z=1.96):
    """(low, high): where the accuracy lies when `correct` of n independent images were right.

    z=1.96 is 95 % confidence. Wilson 1927, "Probable Inference, the Law of Succession, and Statistical
    Inference". Raises InputError unless 0 <= correct <= n and n >= 1.
    """
    if n < 1 or not 0 <= correct <= n:
        raise InputError(f"{correct} correct of {n} is no count; expected 0 <= correct <= n and n of at least 1")
    share = correct / n
    middle = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, (middle - half) / (1 + z**2 / n)), min(1.0, (middle + half) / (1 + z**2 / n))


def percent(correct, n):
    """'87.5% (86.9 to 88.1)': an accuracy with its 95% Wilson interval."""
    low, high = wilson_interval(correct, n)
    return f"{correct / n:.1%} ({100 * low:.1f} to {100 * high:.1f})"
