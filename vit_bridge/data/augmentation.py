"""What happens to the pixels of training images on their way to a model.

    train_transform                    a photograph, one at a time, by torchvision
    Augmentation, EpochAugmentation    small images, a batch at a time: shifted, mirrored, partly hidden
    Mixing                             two images and their labels in one, by torchvision

All random numbers of an epoch are drawn at once, from (seed, epoch), so that a pass can begin anywhere.

Shapes:  B images in a batch, N images in a set, C channels, H, W height and width, K classes.
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
    """The training augmentation of photographs: PIL image of C channels -> normalised float32 tensor (C, H, W). Crops
    have the shape of the result, up to a third wider or narrower; only grey and colour images are recoloured."""
    height, width = preprocessing.size
    shapes = (3 / 4 * width / height, 4 / 3 * width / height)
    crop = v2.RandomResizedCrop(preprocessing.size, ratio=shapes,
                                interpolation=InterpolationMode(preprocessing.interpolation))
    recolour = [v2.ColorJitter(0.4, 0.4, 0.4), v2.AutoAugment()] if preprocessing.n_channels in (1, 3) else []
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *recolour, eval_transform(preprocessing)])


# ---- A batch of small images ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """How training images in memory are varied, each anew in every epoch.

    shift    the largest shift, as a fraction of the side: 0.125 is up to 4 of 32 pixels each way. What comes in is
             mirrored at the border
    flip     left to right: "random", in each epoch with probability 1/2; "alternating", at random in the first epoch
             and then every other time, so that two epochs show an image both ways (Jordan 2024, "94% on CIFAR-10 in
             3.29 Seconds", Sec. 3.6); "none"
    cutout   side of a square that is filled with the mean, as a fraction of the image's; its centre is any pixel, so it
             may lie partly outside (DeVries and Taylor 2017). 0: none

    Raises InputError for a value out of range.
    """
    shift: float = 0.125
    flip: str = "random"
    cutout: float = 0.0

    def __post_init__(self):
        check_choice("flip", self.flip, FLIPS)
        for name, most in (("shift", 0.5), ("cutout", 2.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= most:
                raise InputError(f"{name} {value!r} is out of range; expected a share of the side, 0 to {most:g}")


class EpochAugmentation:
    """The random numbers of one epoch: `augmentation` for N images of H x W, from (seed, epoch).

    top, left   (N,) rows and columns by which the window moves
    flip        (N,) whether it is mirrored
    centre      (2, N) row and column of the middle of the hidden square, from 0 to 1
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

    def move(self, images, places):
        """Shifts and mirrors: images (B, C, H, W) of any type, at `places` (B,) of the set."""
        return crop_and_flip(images, self.top[places], self.left[places], self.flip[places])

    def hide(self, images, places):
        """Cutout, in place: images (B, C, H, W), normalised, so that 0 is the mean."""
        return _hide_square(images, self.centre[:, places], self.cutout) if self.cutout else images


def crop_and_flip(images, top, left, flip):
    """Each image of (B, C, H, W) through a window moved `top` rows down and `left` columns right, each (B,), outside
    mirrored at the border; then mirrored left to right where flip (B,) is true. Returns (B, C, H, W)."""
    B, C, H, W = images.shape
    rows = _reflected(torch.arange(H, device=images.device) + top[:, None], H)  # (B, H)
    columns = _reflected(torch.arange(W, device=images.device) + left[:, None], W)  # (B, W)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    pixels = (rows[:, :, None] * W + columns[:, None, :]).view(B, 1, H * W)  # (B, 1, H * W), places in an image
    return images.reshape(B, C, H * W).gather(2, pixels.expand(B, C, H * W)).view(B, C, H, W)


def _reflected(places, length):
    """Places outside 0 .. length - 1, by less than length, mirrored at the first and the last."""
    return torch.minimum(places.abs(), 2 * (length - 1) - places.abs())


def _hide_square(images, centre, share):
    """Zeros, in place, in a square of `share` of the side of each image of (B, C, H, W), around the pixel that lies at
    centre (2, B), row and column from 0 to 1; what falls outside is lost. Returns the images."""
    hidden = []
    for length, middle in zip(images.shape[2:], centre, strict=True):
        first = (middle * length).floor() - round(share * length) // 2  # (B,), before the first row where negative
        place = torch.arange(length, device=images.device) - first[:, None]  # (B, length), from the square's first
        hidden.append((place >= 0) & (place < round(share * length)))
    rows, columns = hidden  # (B, H), (B, W)
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


class Mixing:
    """Pairs of images of a batch in one, and their labels with them: (images (B, C, H, W), labels (B)) -> (images,
    soft targets (B, K)).

    kind    "mixup": a weighted sum of two images (Zhang et al. 2018); "cutmix": a box of one in the other (Yun et al.
            2019); the weight, or the area of the box, is drawn from Beta(alpha, alpha), once for a batch
    alpha   usually 0.2 for mixup, 1 for cutmix

    torchvision mixes; random numbers come from torch's own generator.
    """

    def __init__(self, kind, n_classes, alpha=None):
        check_choice("mixing", kind, MIXINGS[1:])
        make, usual = dict(mixup=(v2.MixUp, 0.2), cutmix=(v2.CutMix, 1.0))[kind]
        self.transform = make(alpha=usual if alpha is None else alpha, num_classes=n_classes)

    def __call__(self, images, labels):
        return self.transform(images, labels)


# ---- Random numbers ---------------------------------------------------------------------------------------


def mix_seed(*numbers):
    """One seed of 63 bits out of whole numbers from 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_of(*numbers):
    return torch.Generator().manual_seed(mix_seed(*numbers))
