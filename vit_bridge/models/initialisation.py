"""Initial weights of convolutions, and whitening filters for the first layer.

Shapes:  B images, C channels, k side of a kernel.
"""

import torch
import torch.nn.functional as F
from torch import nn


def initialise_convolutions(model):
    """Make convolutions He-normal (fan-out), as torchvision's ResNet does; leave other layers unchanged."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@torch.no_grad()
def initialise_as_identity(stages):
    """Make the first output channels of each convolution copy its input channels.

    Other channels keep torch's initialisation. (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", Sec.
    3.3.)
    """
    for module in stages.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight[:module.in_channels])


# ---- Whitening --------------------------------------------------------------------------------------------


def whitening_filters(images, side, floor=0.01):
    """Return filters that whiten the patches of images.

    Their outputs are uncorrelated and have nearly equal variance. The filters are the principal directions of the
    patches, largest variance first, each divided by the square root of (its variance + `floor`).

    Parameters
    ----------
    images : Tensor, shape (B, C, height, width)
    side : int
        k, side of a patch in pixels.
    floor : float, optional
        Added to each variance, so that directions with little variance are not amplified too much.

    Returns
    -------
    Tensor, shape (C k k, C, k, k)

    References
    ----------
    Page 2019, "How to Train Your ResNet"; Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", Sec. 3.2.
    """
    patches = F.unfold(images.float(), side, stride=side).transpose(1, 2).flatten(0, 1).double()  # (patches, C k k)
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))  # (C k k), (C k k, C k k)
    filters = (directions / (variances + floor).sqrt()).flip(1).T  # (C k k, C k k), one filter per row
    return filters.to(images.dtype).reshape(-1, images.shape[1], side, side)


@torch.no_grad()
def whiten_first_layer(model, images):
    """Set the model's whitening layer, if it has one, to whitening_filters(images); return the model.

    A layer that holds each filter and its negative is frozen. Any other layer, such as a patch projection, stays
    trainable: its channels are set to the filters with the largest variance, and any remaining channels to small random
    weights.

    Parameters
    ----------
    model : nn.Module
        A model that follows the protocol.
    images : Tensor, shape (B, C, height, width)
        Images normalised for this model.
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
