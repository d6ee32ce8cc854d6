"""Confusion, recalls and intervals against values by hand."""

import math

import pytest
import torch

from vit_bridge.analysis.metrics import balanced_accuracy, class_recalls, confusion_matrix, wilson_interval
from vit_model import InputError


def test_confusion_matrix_matches_counts_by_hand():
    labels, predictions = torch.tensor([0, 0, 0, 2, 2, 0]), torch.tensor([0, 1, 0, 2, 0, 1])
    confusion = confusion_matrix(labels, predictions, 4)
    assert confusion.tolist() == [[2, 2, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert confusion.dtype == torch.int64
    assert class_recalls(confusion).nan_to_num(-1).tolist() == [0.5, -1, 0.5, -1]
    assert confusion_matrix(labels[:0], labels[:0], 2).tolist() == [[0, 0], [0, 0]]


def test_balanced_accuracy_averages_recalls_over_present_classes():
    assert balanced_accuracy(torch.tensor([[90, 10], [4, 1]])) == pytest.approx((0.9 + 0.2) / 2)
    assert balanced_accuracy(torch.tensor([[3, 1, 0], [0, 0, 0], [1, 1, 0]])) == pytest.approx(0.75 / 2)
    with pytest.raises(InputError, match="0 images"):
        balanced_accuracy(torch.zeros(3, 3, dtype=torch.int64))


@pytest.mark.parametrize(("labels", "predictions", "text"), [
    ([0, 3], [0, 1], "labels from 0 to 3 are out of range; expected 0 to 2"),
    ([0, -1], [0, 1], "labels from -1 to 0"),
    ([0, 1], [0, 3], "predictions from 0 to 3"),
    ([0, 1], [0], "do not match"),
])
def test_confusion_matrix_refuses_impossible_classes(labels, predictions, text):
    with pytest.raises(InputError, match=text):
        confusion_matrix(torch.tensor(labels), torch.tensor(predictions), 3)


def test_wilson_interval_solves_its_equation():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    low, high = wilson_interval(0, 20)
    assert low == 0
    assert high == pytest.approx(1.96**2 / (20 + 1.96**2))
    assert wilson_interval(20, 20)[1] == pytest.approx(1)
    low, high = wilson_interval(37, 101, z=1.3)
    for edge in (low, high):  # the edges p solve |share - p| = z sqrt(p (1 - p) / n)
        assert abs(37 / 101 - edge) == pytest.approx(1.3 * math.sqrt(edge * (1 - edge) / 101))
    for correct, n in ((-1, 10), (11, 10), (0, 0)):
        with pytest.raises(InputError, match=f"{correct} correct of {n}"):
            wilson_interval(correct, n)
