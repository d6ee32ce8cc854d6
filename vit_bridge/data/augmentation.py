"""Augmentation of training images.

    train_transform                    photographs, one at a time, with torchvision
    Augmentation, EpochAugmentation    small images, a batch at a time: shift, mirror, cutout
    Mixing                             MixUp and CutMix of a batch, with torchvision

The random numbers of an epoch depend only on (seed, epoch), so an interrupted epoch can resume at any batch.

Shapes:  B images in a batch, N images in a data set, C channels, H, W height and width, K classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2

from vit_bridge.errors import InputError, check_choice
from vit_bridge.preprocessing import eval_transform

FLIPS = ("random", "alternating", "none")
MIXINGS = ("none", "mixup", "cutmix")


# ---- A photograph -----------------------------------------------------------------------------------------


def train_transform(preprocessing):
    """Return the training augmentation of photographs.

    It crops, mirrors and recolours at random. The aspect ratio of a crop is 3/4 to 4/3 times the output's. Only images
    of 1 or 3 channels are recoloured.

    Parameters
    ----------
    preprocessing : Preprocessing
        Size, mean, std and interpolation of the output.

    Returns
    -------
    callable
        From a PIL image with C channels to a normalised float32 tensor (C, H, W).
    """
    height, width = preprocessing.size
    shapes = (3 / 4 * width / height, 4 / 3 * width / height)
    crop = v2.RandomResizedCrop(preprocessing.size, ratio=shapes,
                                interpolation=InterpolationMode(preprocessing.interpolation))
    recolour = [v2.ColorJitter(0.4, 0.4, 0.4), v2.AutoAugment()] if preprocessing.n_channels in (1, 3) else []
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *recolour, eval_transform(preprocessing)])


# ---- A batch of small images ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images in memory, drawn anew in every epoch.

    Parameters
    ----------
    shift : float
        Largest shift as a fraction of the side, from 0 to 0.5: 0.125 moves a 32-pixel image by up to 4 pixels in each
        direction. The gap is filled by reflecting the image at its border.
    flip : str
        Mirroring left to right. "random" mirrors with probability 1/2 in each epoch. "alternating" draws the first
        epoch at random and alternates after that, so two successive epochs show both versions [1]_. "none" never
        mirrors.
    cutout : float
        Side of a square that is replaced by the mean, as a fraction of the image's side, from 0 (none) to 2. Its centre
        may be any pixel, so part of the square can lie outside the image [2]_.

    Raises
    ------
    InputError
        If a value is out of range.

    References
    ----------
    .. [1] Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", Section 3.6.
    .. [2] DeVries and Taylor 2017, "Improved Regularization of Convolutional Neural Networks with Cutout".
    """

    shift: float = 0.125
    flip: str = "random"
    cutout: float = 0.0

    def __post_init__(self):
        check_choice("flip", self.flip, FLIPS)
        for name, most in (("shift", 0.5), ("cutout", 2.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= most:
                raise InputError(f"{name} {value!r} is out of range; use a fraction of the side from 0 to {most:g}")


class EpochAugmentation:
    """The random numbers of one epoch: an `Augmentation` of N images of H x W pixels.

    Attributes
    ----------
    top, left : Tensor, shape (N,)
        Rows and columns by which each image is shifted.
    flip : Tensor of bool, shape (N,)
        Whether each image is mirrored.
    centre : Tensor, shape (2, N)
        Row and column of the centre of the cutout, from 0 to 1.
    """

    def __init__(self, augmentation, n_images, height, width, seed, epoch, device="cpu"):
        self.cutout, generator = augmentation.cutout, generator_of(seed, epoch, 1)
        top, left = (torch.randint(-reach, reach + 1, (n_images,), generator=generator)
                     for reach in (int(augmentation.shift * side) for side in (height, width)))
        flip = torch.rand(n_images, generator=generator) < 0.5
        if augmentation.flip == "alternating":
            first = torch.rand(n_images, generator=generator_of(seed, 2)) < 0.5
            flip = first ^ bool(epoch % 2)
        elif augmentation.flip == "none":
            flip = torch.zeros_like(flip)
        centre = torch.rand(2, n_images, generator=generator)
        self.top, self.left, self.flip, self.centre = (drawn.to(device) for drawn in (top, left, flip, centre))

    def move(self, images, indices):
        """Shift and mirror images (B, C, H, W) of any dtype, whose indices in the data set are (B,)."""
        return crop_and_flip(images, self.top[indices], self.left[indices], self.flip[indices])

    def hide(self, images, indices):
        """Apply cutout in place to normalised images (B, C, H, W), in which 0 is the mean."""
        return _hide_square(images, self.centre[:, indices], self.cutout) if self.cutout else images


def crop_and_flip(images, top, left, flip):
    """Shift each image, then mirror it left to right.

    Parameters
    ----------
    images : Tensor, shape (B, C, H, W)
        Images of any dtype.
    top, left : Tensor of int, shape (B,)
        How far the window moves down and right. Pixels outside the image are reflected at its border.
    flip : Tensor of bool, shape (B,)
        Whether each image is mirrored.

    Returns
    -------
    Tensor, shape (B, C, H, W)
    """
    B, C, H, W = images.shape
    rows = _reflected(torch.arange(H, device=images.device) + top[:, None], H)  # (B, H)
    columns = _reflected(torch.arange(W, device=images.device) + left[:, None], W)  # (B, W)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    pixels = (rows[:, :, None] * W + columns[:, None, :]).view(B, 1, H * W)  # (B, 1, H * W), flat pixel indices
    return images.reshape(B, C, H * W).gather(2, pixels.expand(B, C, H * W)).view(B, C, H, W)


def _reflected(indices, length):
    """Reflect indices that are less than `length` outside 0 .. length - 1 at the first and last index."""
    return torch.minimum(indices.abs(), 2 * (length - 1) - indices.abs())


def _hide_square(images, centre, share):
    """Set a square of each image (B, C, H, W) to zero, in place, and return the images.

    The square's side is `share` of the image's side; centre (2, B) gives its middle row and column, from 0 to 1.
    """
    hidden = []
    for length, middle in zip(images.shape[2:], centre, strict=True):
        first = (middle * length).floor() - round(share * length) // 2  # (B,), negative if the square starts outside
        place = torch.arange(length, device=images.device) - first[:, None]  # (B, length), index within the square
        hidden.append((place >= 0) & (place < round(share * length)))
    rows, columns = hidden  # (B, H), (B, W)
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


class Mixing:
    """MixUp or CutMix: combine pairs of images in a batch, and their labels.

    Called with images (B, C, H, W) and labels (B,), it returns images of the same shape and soft targets (B, K). It
    draws from torch's global random generator.

    Parameters
    ----------
    kind : str
        "mixup" adds two images with weights [1]_; "cutmix" pastes a box of one image into another [2]_.
    n_classes : int
        K.
    alpha : float, optional
        The weight, or the area of the box, is drawn from Beta(alpha, alpha) once per batch. 0.2 for mixup and 1 for
        cutmix by default.

    References
    ----------
    .. [1] Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization".
    .. [2] Yun et al. 2019, "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features".
    """

    def __init__(self, kind, n_classes, alpha=None):
        check_choice("mixing", kind, MIXINGS[1:])
        make, usual = dict(mixup=(v2.MixUp, 0.2), cutmix=(v2.CutMix, 1.0))[kind]
        self.transform = make(alpha=usual if alpha is None else alpha, num_classes=n_classes)

    def __call__(self, images, labels):
        return self.transform(images, labels)


# ---- Random numbers ---------------------------------------------------------------------------------------


def mix_seed(*numbers):
    """Combine non-negative integers into one 63-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_of(*numbers):
    return torch.Generator().manual_seed(mix_seed(*numbers))
