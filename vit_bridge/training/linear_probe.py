"""Linear classifiers: on the pixels, as a control; and a head on the features of a frozen backbone.

Shapes:  B images of a batch, N images of a set, C channels, K classes, D features that the
         head reads, F pixel features.
"""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from vit_bridge.data.loaders import DatasetLoader
from vit_bridge.errors import InputError
from vit_bridge.runtime import evaluating, explain_out_of_memory

# Strengths that linear_classifier tries, as multiples of the mean square of a feature.
RIDGES = (0.01, 0.1, 1.0, 10.0)


@torch.no_grad()
def linear_classifier(train_loader, val_loader, test_loader=None, max_images=20_000):
    """The control beside every trained accuracy: a linear classifier on the pixels, without features.

    Ridge regression from pixels to one-hot classes, the images averaged down to at most 32 x 32; the strength,
    one of RIDGES, is the best on the validation images (the largest among equals), and the test images are read
    once, after that choice. A loader yields images (B, C, height, width), labels (B,), and has class_names.
    At most max_images training images, the first that the loader gives, are used.

    Returns a dict: val_acc and test_acc in 0..1, test_correct, test_n, ridge. Without a test_loader its three
    are None. Raises InputError where a loader gives no images.
    """
    n_classes = len(train_loader.class_names)
    gram, moments, n = None, None, 0
    for images, labels in train_loader:
        x = _pixel_features(images[:max_images - n])  # (B, F)
        y = F.one_hot(labels[:len(x)], n_classes).to(x)  # (B, K)
        if gram is None:
            gram, moments = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], n_classes)
        gram.addmm_(x.T, x)  # (F, F), the sum of x^T x over the batches
        moments.addmm_(x.T, y)  # (F, K)
        n += len(x)
        if n >= max_images:
            break
    if n == 0:
        raise InputError("the training loader gave 0 images; expected at least one batch, check the data")
    gram, moments = gram.cpu().double(), moments.cpu().double()
    mean_square = max(gram.diagonal()[:-1].mean().item(), 1e-12)  # images of nothing but zeros have a solution too
    penalty = torch.full((len(gram),), mean_square, dtype=torch.float64)  # (F)
    penalty[-1] = 0  # the constant is free
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
    """(B, C, height, width) -> (B, F): the pixels of at most 32 x 32, and a constant 1 at the end."""
    size = [min(side, 32) for side in images.shape[2:]]
    if images.device.type == "mps":  # which pools only to sizes that divide
        images = images.cpu()
    pixels = F.adaptive_avg_pool2d(images.float(), size).flatten(1)  # (B, F - 1)
    return F.pad(pixels, (0, 1), value=1.0)  # (B, F)


def _count_correct(weights, loader):
    """(how many images each of the weight matrices (F, K) gets right, how many images there are)."""
    weights = torch.stack(weights).float()  # (classifiers, F, K)
    correct, n = torch.zeros(len(weights), dtype=torch.long), 0
    for images, labels in loader:
        answers = (_pixel_features(images).cpu() @ weights).argmax(dim=-1)  # (classifiers, B)
        correct += (answers == labels.cpu()).sum(dim=1)
        n += len(labels)
    if n == 0:
        raise InputError("a validation or test loader gave 0 images; expected at least one batch, check the data")
    return correct.tolist(), n


class FeatureLoader(DatasetLoader):
    """Batches of features (B, D) and labels (B,) of the images of another loader, in memory, never augmented.

    features: (N, D), in the order of labels (N,). Order, shards and positions are those of a DatasetLoader.
    """

    def __init__(self, features, labels, source):
        super().__init__(labels, source.info, source.batch_size, source.seed, source.training)
        self.features = features

    def to(self, device):
        """Moves the features to the device. Returns the loader."""
        self.features, self.labels = self.features.to(device), self.labels.to(device)
        return self

    def __iter__(self):
        _, batches = self.epoch_batches()
        for batch in batches:
            yield self.features[batch], self.labels[batch]  # (B, D), (B)


def feature_loaders(model, loaders, device):
    """A FeatureLoader for each loader: what the model's head reads of its images, each computed once.

    The model is moved to the device; its head, which must be one module named `head`, is not used. Files that
    could not be read are listed in the `skipped` of these loaders.
    """
    made = []
    for loader in loaders:
        plain = loader.without_augmentation()
        made.append(FeatureLoader(*_head_inputs(model.to(device), plain, device), loader))
        loader.skipped.update(plain.skipped)
    return tuple(made)


@torch.no_grad()
def _head_inputs(model, loader, device):
    """(features (N, D), labels (N,)) of a loader's images, on the CPU: what the model's head reads, in eval mode."""
    head, model.head = model.head, nn.Identity()
    features, labels = [], []
    try:
        with evaluating(model):
            for images, answers in tqdm(loader.to(device), desc="features", unit="batch", leave=False, disable=None):
                with explain_out_of_memory(device, len(images)):
                    features.append(model(images).cpu())  # (B, D)
                labels.append(answers.cpu())
    finally:
        model.head = head
    return torch.cat(features), torch.cat(labels)  # (N, D), (N)
