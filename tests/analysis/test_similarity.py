"""CKA against its definition in plain numpy, and against its known properties."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vit_bridge.analysis import similarity as r
from vit_bridge.models.convnet import ConvNet
from vit_model import InputError, VisionTransformer


def vit(seed=0, **options):
    torch.manual_seed(seed)
    return VisionTransformer(**dict(img_size=(14, 15), patch_size=(7, 5), n_classes=5, embed_dim=22, depth=2, n_heads=2)
                             | options)


def convnet():
    torch.manual_seed(2)
    return ConvNet(img_size=(14, 15), n_classes=5, widths=(3, 5), depths=(1, 1), stem_stride=1)


def images_for(n):
    return torch.randn(n, 3, 14, 15, generator=torch.Generator().manual_seed(1))


def hsic_by_definition(K, L):
    """Song et al. 2012, Eq. 5, term by term."""
    n, ones = len(K), np.ones(len(K))
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    return (np.trace(K @ L) + ones @ K @ ones * (ones @ L @ ones) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (ones @ K @ L @ ones)) / (n * (n - 3))


def cka_by_definition(batches_a, batches_b):
    """Three terms, each the mean over the batches, then divided: features (n, F) of one layer of each model."""
    grams = [(a @ a.T, b @ b.T) for a, b in zip(batches_a, batches_b, strict=True)]
    both = np.mean([hsic_by_definition(K, L) for K, L in grams])
    return both / np.sqrt(np.mean([hsic_by_definition(K, K) for K, _ in grams])
                          * np.mean([hsic_by_definition(L, L) for _, L in grams]))


def test_layer_features_are_those_of_each_layer():
    model = vit().train()
    features = r.layer_features(model, images_for(3))
    assert [x.shape for x in features] == [(3, 6 * 22), (3, 7 * 22), (3, 7 * 22)]
    model.eval()
    assert torch.equal(features[0], model.patch_embed(images_for(3)).flatten(1))
    assert torch.allclose(model.norm(features[2].unflatten(1, (7, 22))), model.forward_features(images_for(3)))
    assert not any(module._forward_hooks for module in model.modules())


def test_layer_features_restores_hooks_and_mode_after_an_error():
    model = vit().train()
    with pytest.raises(InputError, match="expected"):
        r.layer_features(model, torch.zeros(3, 3, 14, 20))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("batch_size", [13, 26])
def test_layer_similarity_matches_its_definition(batch_size):
    first, second, images = vit(), convnet(), images_for(26 + 3)  # the last 3 are no whole batch
    ours = r.layer_similarity(first, second, images, batch_size)
    parts = images[:26].split(batch_size)
    features = [[[x.double().numpy() for x in r.layer_features(model, part)] for part in parts]
                for model in (first, second)]
    expected = [[cka_by_definition([layers[i] for layers in features[0]], [layers[j] for layers in features[1]])
                 for j in range(3)] for i in range(3)]
    assert ours.dtype == torch.float64
    assert np.allclose(ours, expected, atol=1e-9)


def test_layer_similarity_of_a_layer_with_itself_is_one():
    similarity = r.layer_similarity(vit(), vit(), images_for(12), 12)
    assert torch.allclose(similarity.diagonal(), torch.ones(3).double())
    assert torch.allclose(similarity, similarity.T)
    assert similarity.max() <= 1 + 1e-9


class Layers(nn.Module):
    """Stands for a model whose one layer gives what it is told to."""

    def __init__(self, features):
        super().__init__()
        self.features, self.layer, self.weight = features, nn.Identity(), nn.Parameter(torch.zeros(()))

    def forward_features(self, images):
        return self.layer(self.features[images[:, 0, 0, 0].long()])


@pytest.fixture
def similarity_of(monkeypatch):
    """Return a function that computes the CKA of two sets of features (n, F)."""
    monkeypatch.setattr(r, "adapt", lambda model: SimpleNamespace(layers=[model.layer]))

    def compute(a, b, batch_size=64):
        numbers = torch.arange(len(a)).view(-1, 1, 1, 1).float()
        return r.layer_similarity(Layers(a), Layers(b), numbers, batch_size).item()

    return compute


def test_layer_similarity_ignores_rotation_and_scale_but_not_stretching(similarity_of):
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(53, 7, generator=generator)
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=generator)).Q
    assert similarity_of(a, 3.7 * a @ rotation + 5) == pytest.approx(1, abs=1e-5)
    assert similarity_of(a, a * torch.tensor([9.0, 1, 1, 1, 1, 1, 1])) < 0.9


@pytest.mark.parametrize("batch_size", [16, 512])
def test_layer_similarity_of_independent_noise_is_near_zero(batch_size, similarity_of):
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(512, 300, generator=generator) for _ in range(2))
    assert abs(similarity_of(a, b, batch_size)) < 0.02  # the biased estimator gives 0.37 and more


def test_layer_similarity_refuses_too_few_or_equal_images():
    with pytest.raises(InputError, match="3 images are too few"):
        r.layer_similarity(vit(), vit(), images_for(3))
    with pytest.raises(InputError, match="batch_size 3"):
        r.layer_similarity(vit(), vit(), images_for(8), 3)
    same = images_for(1).expand(8, -1, -1, -1)
    with pytest.raises(InputError, match="has the same features for all images"):
        r.layer_similarity(vit(), vit(), same)
