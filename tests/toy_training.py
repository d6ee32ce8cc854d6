"""Small models, batches and trainings for the tests of the Trainer."""

import inspect
import io

import torch
from torch import nn

import train_vit
from train_vit import Trainer
from vit_bridge.data.datasets import DatasetInfo
from vit_bridge.data.loaders import MemoryLoader
from vit_bridge.models.convnet import ConvNet
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.training.config import Callback
from vit_model import VisionTransformer

TINY = dict(img_size=8, patch_size=4, embed_dim=12, depth=1, n_heads=3, n_classes=3)


def toy_batches(n_batches=5, batch_size=7):
    """Three classes that a linear model can part: the mean of a channel says which."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(n_batches):
        labels = torch.randint(0, 3, (batch_size,), generator=generator)
        images = 0.1 * torch.randn(batch_size, 3, 8, 8, generator=generator)
        images[torch.arange(batch_size), labels] += 1.0
        batches.append((images, labels))
    return batches


def toy_trainer(seed=0, **settings):
    torch.manual_seed(seed)
    return Trainer(VisionTransformer(**TINY), device="cpu", **settings)


def small_net():
    """No bias here has a gradient of zero but for rounding, which Adam would make a step of full length."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 11), nn.GELU(), nn.Linear(11, 3))


def vit_with_sincos():
    return VisionTransformer(**TINY, position="sincos")


def convnet():
    return ConvNet(8, 3, 3, (5,), (1,), 1)


def memory_loader(n, batch_size, training=False):
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    facts = DatasetInfo("folder", Preprocessing(8, (0.5,) * 3, (0.25,) * 3, class_names=["a", "b", "c"]))
    return MemoryLoader(images, torch.arange(n) % 3, facts, batch_size, 5, training)


class Drawing(nn.Module):
    """A model that draws a number in every training step, and notes it."""

    def __init__(self):
        super().__init__()
        self.net, self.drawn = small_net(), []

    def forward(self, images):
        if self.training:
            self.drawn.append(torch.rand(()).item())
        return self.net(images)


class Call:
    """An on_batch that asks to stop when it is called for the n-th time, counted from 0."""

    def __init__(self, n=None):
        self.n, self.count = n, 0

    def __call__(self, state):
        self.count += 1
        return self.count - 1 == self.n


class Calls(Callback):
    """Calls these functions of a state."""

    def __init__(self, on_batch=None, on_epoch=None, on_save=None):
        for name, function in (("on_batch", on_batch), ("on_epoch", on_epoch), ("on_save", on_save)):
            if function is not None:
                setattr(self, name, function)


def train_quietly(trainer, *loaders, on_batch=None, on_epoch=None, on_save=None, **settings):
    return trainer.train(*loaders, callbacks=[Calls(on_batch, on_epoch, on_save)],
                         **(dict(learning_rate=1e-2, seed=7, progress=False) | settings))


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in weights.items())


def assert_close(weights, others, tolerance):
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=0, atol=tolerance, msg=lambda text, name=name: name + text)


def without_times(history):
    return {name: values for name, values in history.items() if name not in ("seconds", "images_per_second")}


def through_a_file(entries):
    file = io.BytesIO()
    torch.save(entries, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def one_step(*args, **settings):
    """In place of steps_within, and only where steps_within would take the same arguments."""
    inspect.signature(train_vit.steps_within).bind(*args, **settings)
    return 1
