"""Transfer: what a training takes from weights that were trained before.

    layer_factors      how much slower each layer learns than the head: layer-wise decay of the learning rate
    feature_loaders    what a frozen backbone makes of every image, computed once: the linear probe's images

Letters:  B images in a batch, N images of a set, D features that the head reads.
"""

import torch
from torch import nn
from tqdm import tqdm

from measurements import evaluating
from trainer import memory_explained
from vit_data import Loader
from vit_model import InputError


def layer_factors(model, decay):
    """{name of a parameter: decay to the power of the layers between it and the head}, for Trainer's rate_factors.

    Layers are what comes before the blocks (patch embedding or stem, tokens, positions), each block or stage, and
    last, with factor 1, the head with the norm before it. Clark et al. 2020 (ELECTRA), for ViTs Bao et al. 2022
    (BEiT). Raises InputError for a model without blocks or stages.
    """
    stack = next((name for name in ("blocks", "stages") if hasattr(model, name)), None)
    if stack is None:
        raise InputError(f"a {type(model).__name__} has neither blocks nor stages whose learning rates could decay; "
                         f"leave out layer decay")
    n_layers, factors = len(getattr(model, stack)) + 1, {}
    for name, _ in model.named_parameters():
        top, *rest = name.split(".")
        layer = int(rest[0]) + 1 if top == stack else n_layers if top in ("norm", "head") else 0
        factors[name] = decay ** (n_layers - layer)
    return factors


class FeatureLoader(Loader):
    """Batches of features (B, D) and labels (B,) of the images of another loader, in memory, never augmented.

    features: (N, D), in the order of labels (N,). Order, shares and positions are those of a Loader.
    """

    def __init__(self, features, labels, source):
        super().__init__(labels, source.facts, source.batch_size, source.seed, source.training)
        self.features = features

    def to(self, device):
        """Moves the features to the device. Returns the loader."""
        self.features, self.labels = self.features.to(device), self.labels.to(device)
        return self

    def __iter__(self):
        _, batches = self.begin_pass()
        for batch in batches:
            yield self.features[batch], self.labels[batch]  # (B, D), (B)


def feature_loaders(model, loaders, device):
    """A FeatureLoader for each loader: what the model's head reads of its images, each computed once.

    The model is moved to the device; its head, which must be one module named `head`, is not used. What files could not
    be read on the way is told in the `skipped` of the loaders given.
    """
    made = []
    for loader in loaders:
        plain = loader.plain()
        made.append(FeatureLoader(*head_inputs(model.to(device), plain, device), loader))
        loader.skipped.update(plain.skipped)
    return tuple(made)


@torch.no_grad()
def head_inputs(model, loader, device):
    """(features (N, D), labels (N,)) of a loader's images, on the CPU: what the model's head reads, in eval mode."""
    head, model.head = model.head, nn.Identity()
    features, labels = [], []
    try:
        with evaluating(model):
            for images, answers in tqdm(loader.to(device), desc="features", unit="batch", leave=False, disable=None):
                with memory_explained(device, len(images)):
                    features.append(model(images).cpu())  # (B, D)
                labels.append(answers.cpu())
    finally:
        model.head = head
    return torch.cat(features), torch.cat(labels)  # (N, D), (N)
