"""Linear classifiers: on pixels (linear_classifier), and on a frozen backbone (feature_loaders, Heads).

Shapes:  B images in a batch, N images in a set, C channels, K classes, H heads, D features that a head reads, F pixel
         features.
"""

from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

from vit_bridge.data.loaders import DatasetLoader
from vit_bridge.errors import InputError
from vit_bridge.models.protocol import ImageModel
from vit_bridge.runtime import evaluating, explain_out_of_memory

# Penalties that linear_classifier tries, as multiples of the mean squared feature.
RIDGES = (0.01, 0.1, 1.0, 10.0)


@torch.no_grad()
def linear_classifier(train_loader, val_loader, test_loader=None, max_images=20_000):
    """Fit a linear classifier on the pixels, the baseline for the accuracy of every trained model.

    This is ridge regression from pixels, averaged down to at most 32 x 32, to one-hot classes. The penalty is the
    value in RIDGES with the best validation accuracy, the largest on a tie. The test images are read once,
    after that choice.

    Parameters
    ----------
    train_loader, val_loader, test_loader : iterable
        Batches of images (B, C, H, W) and labels (B); train_loader has class_names. test_loader may be None.
    max_images : int
        Use only the first training images that the loader yields, at most this many.

    Returns
    -------
    dict
        val_acc and test_acc from 0 to 1, test_correct, test_n and ridge. Without a test_loader the test values are
        None.

    Raises
    ------
    InputError
        If a loader yields no images.
    """
    n_classes = len(train_loader.class_names)
    gram, moments, n = None, None, 0
    for images, labels in train_loader:
        x = _pixel_features(images[:max_images - n])  # (B, F)
        y = F.one_hot(labels[:len(x)], n_classes).to(x)  # (B, K)
        if gram is None:
            gram, moments = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], n_classes)
        gram.addmm_(x.T, x)  # (F, F)
        moments.addmm_(x.T, y)  # (F, K)
        n += len(x)
        if n >= max_images:
            break
    if n == 0:
        raise InputError("the training loader yielded 0 images; expected at least one batch, so check the data")
    gram, moments = gram.cpu().double(), moments.cpu().double()
    mean_square = max(gram.diagonal()[:-1].mean().item(), 1e-12)  # so that all-black images have a solution, too
    penalty = torch.full((len(gram),), mean_square, dtype=torch.float64)  # (F)
    penalty[-1] = 0  # no penalty on the constant
    ridges = sorted(RIDGES, reverse=True)
    factors = (torch.linalg.cholesky(gram + torch.diag(ridge * penalty)) for ridge in ridges)  # each (F, F)
    weights = [torch.cholesky_solve(moments, factor) for factor in factors]  # each (F, K)
    correct, n = _count_correct(weights, val_loader)
    best = max(range(len(ridges)), key=correct.__getitem__)
    result = dict(val_acc=correct[best] / n, test_acc=None, test_correct=None, test_n=None, ridge=ridges[best])
    if test_loader is not None:
        (test_correct,), n = _count_correct([weights[best]], test_loader)
        result.update(test_acc=test_correct / n, test_correct=test_correct, test_n=n)
    return result


def _pixel_features(images):
    """Return the pixels of images (B, C, H, W) averaged down to at most 32 x 32, and a constant 1: (B, F)."""
    size = [min(side, 32) for side in images.shape[2:]]
    if images.device.type == "mps":  # on MPS, the output size must divide the image size
        images = images.cpu()
    pixels = F.adaptive_avg_pool2d(images.float(), size).flatten(1)  # (B, F - 1)
    return F.pad(pixels, (0, 1), value=1.0)  # (B, F)


def _count_correct(weights, loader):
    """Return ([images that each weight matrix (F, K) classifies correctly], number of images)."""
    weights = torch.stack(weights).float()  # (classifiers, F, K)
    correct, n = torch.zeros(len(weights), dtype=torch.long), 0
    for images, labels in loader:
        predicted = (_pixel_features(images).cpu() @ weights).argmax(dim=-1)  # (classifiers, B)
        correct += (predicted == labels.cpu()).sum(dim=1)
        n += len(labels)
    if n == 0:
        raise InputError("a validation or test loader yielded 0 images; expected at least one batch, so check the data")
    return correct.tolist(), n


class FeatureLoader(DatasetLoader):
    """A loader of features (B, H, D) and labels (B), held in memory and never augmented.

    `features` (N, H, D) are in the order of `labels` (N). Order, shards and positions work as in DatasetLoader.
    """

    def __init__(self, features, labels, source):
        super().__init__(labels, source.info, source.batch_size, source.seed, source.training)
        self.features = features

    def to(self, device):
        """Move the features to the device and return the loader."""
        self.features, self.labels = self.features.to(device), self.labels.to(device)
        return self

    def __iter__(self):
        _, batches = self.epoch_batches()
        for batch in batches:
            yield self.features[batch], self.labels[batch]  # (B, H, D), (B)


def feature_loaders(model, loaders, device):
    """Return a FeatureLoader for each loader, with the inputs of the model's heads computed once.

    Parameters
    ----------
    model : Module
        A model of this library, moved to the device.
    loaders : sequence of DatasetLoader
        Files that cannot be read are added to their `skipped`.
    device : torch.device
    """
    made = []
    for loader in loaders:
        plain = loader.without_augmentation()
        made.append(FeatureLoader(*_head_inputs(model.to(device), plain, device), loader))
        loader.skipped.update(plain.skipped)
    return tuple(made)


@torch.no_grad()
def _head_inputs(model, loader, device):
    """Return (features (N, H, D), labels (N)) of a loader's images on the CPU; the model runs in eval mode."""
    read, features, labels = {}, [], []
    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(_keep_input, read, name))
             for name in model.head_names]
    try:
        with evaluating(model):
            for images, targets in tqdm(loader.to(device), desc="features", unit="batch", leave=False, disable=None):
                with explain_out_of_memory(device, len(images)):
                    model(images)
                features.append(torch.stack([read[name] for name in model.head_names], dim=1).cpu())  # (B, H, D)
                labels.append(targets.cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(features), torch.cat(labels)  # (N, H, D), (N)


def _keep_input(read, name, _, inputs):
    """Keep the input of a head (B, D) in read[name]."""
    read[name] = inputs[0]


class Heads(ImageModel):
    """The heads of a model, each on its own features: (B, H, D) -> logits (B, K), as the model returns them.

    In training mode, several heads return a tuple, one entry for each. In eval mode, they return their mean.
    """

    def __init__(self, model):
        super().__init__()
        self.config, self.head_names = model.config, model.head_names
        for name in self.head_names:
            self.add_module(name, model.get_submodule(name))

    def layers(self):
        """Return no layers: the backbone is not part of this module."""
        return []

    def forward(self, features):
        """Return the logits."""
        logits = tuple(self.get_submodule(name)(x) for name, x in zip(self.head_names, features.unbind(1), strict=True))
        return logits if self.training and len(logits) > 1 else sum(logits) / len(logits)
