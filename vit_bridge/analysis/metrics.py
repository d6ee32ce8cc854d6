"""Which classes a model confuses, and how certain its accuracy is.

confusion_matrix, class_recalls, balanced_accuracy     results by class
wilson_interval, percent     confidence intervals

Shapes:  K classes, n images.
"""

import math

from vit_bridge.errors import InputError

# ---- Confusion --------------------------------------------------------------------------------------------


def confusion_matrix(labels, predictions, n_classes):
    """Count how many images of each class were predicted as each class.

    Parameters
    ----------
    labels, predictions : Tensor, shape (n,)
        Class numbers from 0, int64.
    n_classes : int
        Number of classes, K.

    Returns
    -------
    Tensor, shape (K, K)
        Counts, int64. Rows are true classes, and columns are predicted classes.

    Raises
    ------
    InputError
        If the numbers of labels and predictions differ, or if a class number is out of range.
    """
    if labels.shape != predictions.shape or labels.ndim != 1:
        raise InputError(f"labels of shape {tuple(labels.shape)} and predictions of shape {tuple(predictions.shape)} "
                         f"do not match; expected one of each for every image, (n)")
    labels, predictions = labels.cpu(), predictions.cpu()
    for name, values in (("labels", labels), ("predictions", predictions)):
        if len(values) and not 0 <= values.min() <= values.max() < n_classes:
            raise InputError(f"{name} from {values.min()} to {values.max()} are out of range; expected 0 to "
                             f"{n_classes - 1} for a model with {n_classes} classes")
    pairs = labels * n_classes + predictions  # (n)
    return pairs.bincount(minlength=n_classes**2).reshape(n_classes, n_classes)  # (K, K)


def class_recalls(confusion):
    """Return the fraction of each class's images that were predicted correctly: (K, K) -> (K), float64.

    The fraction is NaN for a class without images.
    """
    return confusion.diagonal().double() / confusion.sum(dim=1)


def balanced_accuracy(confusion):
    """Return the mean recall over the classes that have images; rare classes count as much as others.

    Raises
    ------
    InputError
        If no class has images.
    """
    if not confusion.any():
        raise InputError("the confusion matrix counts 0 images; expected at least one, check the data")
    return class_recalls(confusion).nanmean().item()


# ---- Intervals --------------------------------------------------------------------------------------------


def wilson_interval(correct, n, z=1.96):
    """Return (low, high), the Wilson confidence interval of an accuracy.

    Parameters
    ----------
    correct : int
        Number of correct predictions.
    n : int
        Number of independent images.
    z : float, optional
        Width in standard deviations; 1.96 for 95% confidence.

    Raises
    ------
    InputError
        Unless 0 <= correct <= n and n >= 1.

    References
    ----------
    Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    if n < 1 or not 0 <= correct <= n:
        raise InputError(f"{correct} correct of {n} is not possible; expected 0 <= correct <= n and n of at least 1")
    share = correct / n
    middle = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, (middle - half) / (1 + z**2 / n)), min(1.0, (middle + half) / (1 + z**2 / n))


def percent(correct, n):
    """Return an accuracy with its 95% Wilson interval as text, such as '87.5% (86.9 to 88.1)'."""
    low, high = wilson_interval(correct, n)
    return f"{correct / n:.1%} ({100 * low:.1f} to {100 * high:.1f})"
