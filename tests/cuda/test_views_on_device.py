"""Predictions and views on the device, in float32, beside the CPU's in float64."""

import copy

import pytest
from device_checks import SHIPPED, shipped

from visualizations import AttentionVisualizer
from vit_bridge.analysis.explanations import explain
from vit_bridge.analysis.receptive_field import receptive_field
from vit_bridge.inference import predict, score

pytestmark = pytest.mark.cuda


def pair_of(name, device):
    """(exact, model, images, labels): the model in float64 on the CPU, and in float32 on the device."""
    model, images, labels = shipped(name)
    return copy.deepcopy(model).double(), model.to(device), images, labels


def assert_equal_views(found, exact):
    """Within 1e-4 of the largest value, all on the CPU."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    assert found.shape == exact.shape
    assert (found - exact).abs().max() < 1e-4 * exact.abs().max()


# ---- Predictions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_predict_on_the_device_matches_the_cpu(device, name):
    exact, model, images, _ = pair_of(name, device)
    for found, right in zip(predict(model, images, top=3), predict(exact, images.double(), top=3), strict=True):
        assert [label for label, _ in found] == [label for label, _ in right]
        assert [p for _, p in found] == pytest.approx([p for _, p in right], abs=1e-4)


@pytest.mark.parametrize("name", SHIPPED)
def test_score_on_the_device_matches_the_cpu(device, name):
    exact, model, images, labels = pair_of(name, device)
    found = score(model, [(images[:40], labels[:40]), (images[40:], labels[40:])], device=str(device))
    right = score(exact, [(images.double(), labels)], device="cpu")
    assert found.confusion.equal(right.confusion)
    assert found.accuracy == right.accuracy > 0.5
    mixed = score(model, [(images, labels)], device=str(device), amp="bf16")
    assert abs(mixed.correct - right.correct) <= 3


# ---- Views ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_nano_shapes", "hybrid_shapes"])
@pytest.mark.parametrize("view", ["attention_maps", "rollout", "relevance", "grad_cam"])
def test_attention_visualizer_on_the_device_matches_the_cpu(device, name, view):
    exact, model, images, _ = pair_of(name, device)
    found, right = AttentionVisualizer(model, str(device)), AttentionVisualizer(exact, "cpu")
    for image in images[:4]:
        assert_equal_views(getattr(found, view)(image), getattr(right, view)(image.double()))


def test_grad_cam_of_a_convnet_matches_the_cpu(device):
    exact, model, images, labels = pair_of("convnet_shapes", device)
    found = explain(model, images[:4].to(device), "grad_cam", labels[:4]).saliency
    assert_equal_views(found, explain(exact, images[:4].double(), "grad_cam", labels[:4]).saliency)


@pytest.mark.parametrize("name", SHIPPED)
def test_receptive_field_on_the_device_matches_the_cpu(device, name):
    exact, model, images, _ = pair_of(name, device)
    for depth in (1, None):
        assert_equal_views(receptive_field(model, images[:4].to(device), depth),
                           receptive_field(exact, images[:4].double(), depth))


def test_receptive_field_moves_images_to_the_models_device(device):
    model, images, _ = shipped("vit_nano_shapes")
    assert_equal_views(receptive_field(model.to(device), images[:2]),
                       receptive_field(model, images[:2].to(device)))
