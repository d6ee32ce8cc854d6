"""benchmarks/cifar_models.py measures on images of all classes."""

import importlib
from pathlib import Path

import torch

from vit_bridge.compare.trials import loader_of


def test_first_images_have_all_classes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("cifar_models")
    labels = torch.arange(10).repeat_interleave(100)  # a folder is sorted by class
    images = labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    monkeypatch.setattr(module, "get_test_loader",
                        lambda *words, **options: loader_of(images, labels, tuple("abcdefghij")))
    setup = module.cifar_setup("CIFAR")
    assert len(setup.labels) == module.N_IMAGES
    assert setup.labels[:32].bincount(minlength=10).min() > 0
    normalise = setup.preprocessing.normalise
    assert torch.allclose(setup.images, normalise(images[100 * setup.labels]))  # each image has its label
