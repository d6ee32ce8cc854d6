"""Where training starts: convolutions, and whitening filters for the layer that meets the pixels."""

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
    first, each divided by the root of its variance and of `floor`, so that their answers are uncorrelated and of
    nearly equal size. (Page 2019, "How to Train Your ResNet"; Jordan 2024, Sec. 3.2.)"""
    patches = F.unfold(images.float(), side, stride=side).transpose(1, 2).flatten(0, 1).double()  # (patches, C k k)
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))  # (C k k), (C k k, C k k)
    filters = (directions / (variances + floor).sqrt()).flip(1).T  # (C k k, C k k), a row a filter
    return filters.to(images.dtype).reshape(-1, images.shape[1], side, side)
