"""Where training starts: convolutions, and whitening filters for the first layer.

Shapes:  B images, C channels, k side of a kernel.
"""

import torch
import torch.nn.functional as F
from torch import nn


def initialise_convolutions(model):
    """He-normal convolutions (fan-out), as torchvision's ResNet; all else as torch makes it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@torch.no_grad()
def initialise_as_identity(stages):
    """Convolutions whose first channels hand on those that come in, as many as there are; the other channels as torch
    makes them. (Jordan 2024, Sec. 3.3.)"""
    for module in stages.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight[:module.in_channels])


# ---- Whitening --------------------------------------------------------------------------------------------


def whitening_filters(images, side, floor=0.01):
    """(C k k, C, k, k), k = side: the principal directions of the patches of images (B, C, height, width), largest
    first, each divided by the root of its variance plus `floor`, so that their outputs are uncorrelated and of nearly
    equal size. (Page 2019, "How to Train Your ResNet"; Jordan 2024, Sec. 3.2.)"""
    patches = F.unfold(images.float(), side, stride=side).transpose(1, 2).flatten(0, 1).double()  # (patches, C k k)
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))  # (C k k), (C k k, C k k)
    filters = (directions / (variances + floor).sqrt()).flip(1).T  # (C k k, C k k), a row a filter
    return filters.to(images.dtype).reshape(-1, images.shape[1], side, side)


@torch.no_grad()
def whiten_first_layer(model, images):
    """Gives the model's whitening_layer, if it has one, the whitening_filters of images (B, C, height, width), which
    are normalised as the model will see them. Returns the model.

    A layer that holds each filter and its negative keeps them in training. Another, such as a patch projection, takes
    the filters of the largest variance, as many as it has channels, and little noise in the channels that are left, and
    learns on from there.
    """
    found = model.whitening_layer()
    if found is None:
        return model
    layer, holds_negatives = found
    filters = whitening_filters(images, layer.kernel_size[0])  # (C k k, C, k, k)
    layer.bias.zero_()
    if holds_negatives:
        layer.weight.copy_(torch.cat([filters, -filters]))
        layer.requires_grad_(False)
    else:
        n = min(len(filters), len(layer.weight))
        layer.weight.normal_(std=0.02)[:n] = filters[:n]
    return model
