"""Costs against counts by hand and a published count."""

import pytest
import torch
from measured_models import N, convnet, images_for, vit
from torch import nn

from vit_bridge.analysis.cost import count_flops, count_parameters, fitted_exponent, peak_memory, throughput
from vit_model import InputError, VisionTransformer


def test_count_parameters_counts_all_or_only_trainable():
    model = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 5))
    assert count_parameters(model) == 28 + 40
    model[0].requires_grad_(False)
    assert count_parameters(model, trainable_only=True) == 40
    assert count_parameters(model) == 28 + 40


def test_count_flops_matches_a_vit_by_hand():
    D, hidden, patches = 22, 88, 6
    embed = 2 * patches * (7 * 5 * 3) * D
    block = 2 * N * D * 3 * D + 2 * 2 * N * N * D + 2 * N * D * D + 2 * 2 * N * D * hidden
    assert count_flops(vit()) == embed + 3 * block + 2 * D * 5


def test_count_flops_matches_a_convnet_by_hand():
    model = convnet(depths=(1, 1, 1))
    H, W = 17, 13
    hand = 2 * 9 * 3 * 3 * H * W + 2 * 2 * 9 * 3 * 3 * H * W  # stem, stage 1
    hand += 2 * (9 * 3 * 5 + 9 * 5 * 5 + 3 * 5) * 9 * 7  # stage 2 with its 1 x 1 shortcut
    hand += 2 * (9 * 5 * 7 + 9 * 7 * 7 + 5 * 7) * 5 * 4
    assert count_flops(model, (H, W)) == hand + 2 * 7 * 5


def test_count_flops_matches_a_published_model():
    # DeiT-Ti: 1.3 G multiply-adds at 224 pixels (Touvron et al. 2021, released code: 1.258 G with attention)
    tiny = VisionTransformer(embed_dim=192, depth=12, n_heads=3)
    assert count_flops(tiny) / 2 == pytest.approx(1.26e9, rel=0.01)


def test_throughput_is_images_over_the_median_time(monkeypatch):
    ticks = iter([0, 1, 10, 12, 20, 27])  # passes of 1, 2 and 7 s
    monkeypatch.setattr("vit_bridge.analysis.cost.time.perf_counter", lambda: next(ticks))
    assert throughput(vit(), batch_size=11, seconds=0) == 11 / 2
    with pytest.raises(InputError, match="batch_size 0"):
        throughput(vit(), batch_size=0)


class CountsPasses(nn.Module):
    """A linear layer of which every copy counts its passes into one list."""

    def __init__(self):
        super().__init__()
        self.layer, self.log = nn.Linear(3, 7), []
        self.config = type("Config", (), dict(img_size=1, in_channels=3))

    def __deepcopy__(self, memo):
        return self

    def forward(self, images):
        self.log.append("pass")
        return self.layer(images.flatten(1))


def test_throughput_warms_up_with_two_passes_before_the_clock(monkeypatch):
    model = CountsPasses()
    clock = iter(range(100))
    monkeypatch.setattr("vit_bridge.analysis.cost.time.perf_counter",
                        lambda: model.log.append("clock") or next(clock))
    throughput(model, batch_size=2, seconds=0)
    assert model.log == ["pass"] * 2 + ["clock", "pass", "clock"] * 3


def test_peak_memory_matches_sizes_by_hand():
    assert peak_memory(nn.Linear(3, 7), torch.zeros(5, 3)) == 4 * 5 * 7
    # The second layer's input is alive while its output is made; the first layer's is the images.
    two = nn.Sequential(nn.Linear(3, 1000), nn.Linear(1000, 7))
    assert peak_memory(two, torch.zeros(5, 3)) == 4 * 5 * (1000 + 7)


def test_peak_memory_in_training_includes_activations_and_gradients():
    model = vit()
    images = images_for(model, 11)
    weights = 4 * count_parameters(model)
    assert peak_memory(model, images, train=True) > peak_memory(model, images) + weights


def test_peak_memory_in_training_matches_sizes_by_hand():
    """Check that the gradients of two weights of 4 MB are what counts.

    The gradients of the warm-up must be gone. Otherwise each layer would free its new gradient as soon as it is added
    to the old one, and only one would be held at a time.
    """
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False))
    gradients = 2 * 4 * 1000 * 1000
    assert gradients <= peak_memory(model, torch.zeros(2, 1000), train=True) < 1.1 * gradients


class Workspace(nn.Module):
    """Allocates a thousand numbers in the first pass, seven in those after it."""

    def __init__(self):
        super().__init__()
        self.weight, self.n = nn.Parameter(torch.zeros(1)), 1000

    def forward(self, images):
        n, self.n = self.n, 7
        return torch.zeros(n)


def test_peak_memory_measures_the_second_pass():
    """A library may allocate a workspace once: the first pass is not what a pass needs."""
    assert peak_memory(Workspace(), torch.zeros(2, 3)) == 4 * 7


def test_fitted_exponent_recovers_a_power_law():
    assert fitted_exponent([2, 3, 7], [5 * n**1.5 for n in (2, 3, 7)]) == pytest.approx(1.5)
    for sizes, values in (([2], [3]), ([2, 3], [1]), ([2, 0], [1, 1]), ([2, 3], [1, -1])):
        with pytest.raises(InputError, match="no exponent can be fitted"):
            fitted_exponent(sizes, values)
