"""How a model's input images must be preprocessed: size, mean, std, interpolation and class names.

Every trained model and every checkpoint carries a Preprocessing. FitSize, Whole and eval_transform apply it to images.

Shapes:  B images, C channels, H, W height and width.
"""

import math
from dataclasses import dataclass, replace

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import center_crop, get_size, resize

from vit_bridge.errors import InputError, check_choice, check_int, pair

SMALL_SIDE = 64  # pixels: up to this side, images are resized without a margin (see FitSize)
INTERPOLATIONS = ("bilinear", "bicubic")

# Mean and standard deviation of each channel (red, green, blue), for values from 0 to 1.
NORMALISATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,) * 3, (0.3081,) * 3),
    "fashion-mnist": ((0.2860,) * 3, (0.3530,) * 3),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
    "shapes": ((0.5,) * 3, (0.25,) * 3),
}
IMAGENET_MEAN, IMAGENET_STD = NORMALISATION["folder"]


@dataclass(frozen=True)
class Preprocessing:
    """How a model's input images must be preprocessed, and the names of its classes.

    Parameters
    ----------
    img_size : int or (int, int)
        Side, or (height, width), in pixels. Equal sides become one number.
    mean, std : sequence of C floats, optional
        Mean and standard deviation of each channel, for values from 0 to 1: the model receives (x - mean) / std.
        ImageNet's by default.
    interpolation : {"bilinear", "bicubic"}, optional
        How images are resized.
    class_names : list, optional
        One name for each output of the model, in order. None if they are not known.

    Raises
    ------
    InputError
        If a value is invalid, or if mean and std differ in length, are not finite or std is not positive.
    """

    img_size: int | tuple
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    interpolation: str = "bilinear"
    class_names: list | None = None

    def __post_init__(self):
        object.__setattr__(self, "img_size", one_side(pair(self.img_size)))
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        for name in ("mean", "std"):
            object.__setattr__(self, name, _channel_numbers(name, getattr(self, name)))
        if len(self.mean) != len(self.std):
            raise InputError(f"mean {self.mean} and std {self.std} have {len(self.mean)} and {len(self.std)} "
                             f"numbers; pass one number per channel in each")
        if isinstance(self.class_names, str):
            raise InputError(f"class_names {self.class_names!r} is one string; expected a list of names")
        if self.class_names is not None:  # plain Python values, which a checkpoint can hold
            names = [name.item() if hasattr(name, "item") else name for name in self.class_names]
            object.__setattr__(self, "class_names", names)

    @property
    def size(self):
        """The image size as (height, width), in pixels."""
        return pair(self.img_size)

    @property
    def n_channels(self):
        """C: 1 for greyscale images, 3 for colour, 4 for colour and transparency."""
        return len(self.mean)

    def with_channels(self, n_channels):
        """Return this preprocessing for a different number of channels.

        One channel gets the mean over the colours; more channels repeat the colours in order.
        """
        if n_channels == self.n_channels:
            return self
        mean, std = (resized_channels(numbers, n_channels) for numbers in (self.mean, self.std))
        return replace(self, mean=mean, std=std)

    def normalise(self, images):
        """Normalise uint8 images (B, C, H, W) to float32 of the same shape."""
        return v2.functional.normalize(images.float() / 255, list(self.mean), list(self.std))

    def denormalise(self, images):
        """Undo `normalise` for (..., C, H, W), and clip the values to the range from 0 to 1."""
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)


def eval_transform(preprocessing):
    """Return the transform of validation and test images: PIL image -> normalised float32 (C, H, W)."""
    fit = FitSize(preprocessing.img_size, preprocessing.interpolation)
    return v2.Compose([fit, v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(list(preprocessing.mean), list(preprocessing.std))])


class FitSize:
    """A transform that resizes an image until it just covers a size, then crops the middle.

    It takes PIL images and tensors (..., C, h, w). Photographs are resized to 256 / 224 of the size before the crop, as
    is usual for ImageNet. If the size, or a side of the image, is at most 64 pixels, there is no such margin, and only
    what does not fit the target's proportions is cut off. An image that already has the size is returned unchanged.

    Parameters
    ----------
    img_size : int or (int, int)
        Side, or (height, width), in pixels.
    interpolation : {"bilinear", "bicubic"}, optional
        How images are resized.
    """

    def __init__(self, img_size, interpolation="bilinear"):
        check_choice("interpolation", interpolation, INTERPOLATIONS)
        self.size, self.interpolation = pair(img_size), InterpolationMode(interpolation)

    def __call__(self, image):
        h, w = get_size(image)
        if (h, w) == self.size:
            return image
        small = min(max(self.size), h, w) <= SMALL_SIDE
        covered = self.size if small else [round(side * 256 / 224) for side in self.size]
        return center_crop(resize(image, covering_size((h, w), covered), self.interpolation), self.size)


@dataclass(frozen=True)
class Whole:
    """How to fit a photograph to whole patches without cropping, in nearly its own proportions.

    Parameters
    ----------
    max_tokens : int, optional
        Maximum number of patches. By default, the number that the model was built for.
    img_size : int or (int, int), optional
        Side, or (height, width), in pixels. If set, the photograph is stretched to this size instead.

    Raises
    ------
    InputError
        If max_tokens is below 1 or img_size is invalid.
    """

    max_tokens: int | None = None
    img_size: int | tuple | None = None

    def __post_init__(self):
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1)
        if self.img_size is not None:
            pair(self.img_size)

    def size_for(self, image_size, patch_size, n_patches):
        """Return the (height, width), in pixels, to which an image is resized.

        Parameters
        ----------
        image_size : (int, int)
            Height and width of the image.
        patch_size : (int, int)
            Height and width of a patch.
        n_patches : int
            Number of patches that the model was built for.
        """
        if self.img_size is not None:
            return pair(self.img_size)
        most, (h, w), (height, width) = self.max_tokens or n_patches, image_size, patch_size
        highest = min(most, 2 + 2 * math.isqrt(most * h * width // (w * height)))  # twice the rows of square patches
        fitting = ((rows, max(1, round(rows * height * w / (h * width)))) for rows in range(1, highest + 1))
        grids = [(rows, min(columns, most // rows)) for rows, columns in fitting]

        def price(grid):
            """Return how far a grid stretches the image, plus the fraction of patches left unused."""
            stretch = abs(math.log(grid[0] * height * w / (grid[1] * width * h)))
            return 2 * stretch + 1 - grid[0] * grid[1] / most

        rows, columns = min(grids, key=price)
        return rows * height, columns * width


def covering_size(image_size, size):
    """Return the smallest (height, width) in the proportions of image_size that covers `size`."""
    (h, w), (H, W) = image_size, size
    return (H, H * w // h) if h * W <= w * H else (W * h // w, W)


def one_side(sides):
    """Return (height, width) as one number if they are equal."""
    return sides[0] if sides[0] == sides[1] else tuple(sides)


def describe_size(size):
    """Return a side or (height, width) as text: "32", "96x160"."""
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


def resized_channels(numbers, n_channels):
    """Return one number per channel: the mean for n_channels=1, otherwise repeated in order."""
    if n_channels == 1:
        return (sum(numbers) / len(numbers),)
    return tuple(numbers[i % len(numbers)] for i in range(n_channels))


def _channel_numbers(name, values):
    """Return a mean or std, in any kind of sequence, as a tuple of floats."""
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64)
        sound = numbers.isfinite() & (numbers > 0) if name == "std" else numbers.isfinite()
        fits = numbers.ndim == 1 and len(numbers) > 0 and bool(sound.all())
    except (TypeError, ValueError, RuntimeError, OverflowError):
        fits = False
    if not fits:
        above = " above 0" if name == "std" else ""
        raise InputError(f"{name} {' '.join(repr(values).split())[:200]} is out of range; expected a finite number"
                         f"{above} for each channel")
    return tuple(numbers.tolist())
