"""What a model's images must be: Preprocessing, which every trained model and every checkpoint carries.

Shapes:  B images, C channels, H, W height and width.
"""

import math
from dataclasses import dataclass, replace

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import center_crop, get_size, resize

from vit_bridge.errors import InputError, check_choice, check_int, pair

SMALL_SIDE = 64  # pixels: images up to this side are seen whole
INTERPOLATIONS = ("bilinear", "bicubic")

# Mean and standard deviation of each channel (red, green, blue), of values from 0 to 1.
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
    """What a model's images must be, and what its outputs are called.

    img_size       side or (height, width) in pixels; a side where the two are equal
    mean, std      of each of the C channels, of values from 0 to 1: (x - mean) / std is what the model sees
    interpolation  "bilinear" or "bicubic": how images are resized
    class_names    in the order of the model's outputs; None: not known

    Raises InputError for sizes and names that cannot be, and for a mean and std that are not one finite number for each
    channel, those of std above 0.
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
            raise InputError(f"mean {self.mean} and std {self.std} are of {len(self.mean)} and {len(self.std)} "
                             f"channels; expected one number in each for each channel")
        if isinstance(self.class_names, str):
            raise InputError(f"class_names {self.class_names!r} is one string; expected a list of names")
        if self.class_names is not None:  # as plain values, which a checkpoint can hold
            names = [name.item() if hasattr(name, "item") else name for name in self.class_names]
            object.__setattr__(self, "class_names", names)

    @property
    def size(self):
        """(height, width)."""
        return pair(self.img_size)

    @property
    def n_channels(self):
        """C: 1 for grey images, 3 for colour, 4 for colour and transparency."""
        return len(self.mean)

    def with_channels(self, n_channels):
        """The same for images of another number of channels: 1 gets the mean over the colours; more repeat them."""
        if n_channels == self.n_channels:
            return self
        mean, std = (resized_channels(numbers, n_channels) for numbers in (self.mean, self.std))
        return replace(self, mean=mean, std=std)

    def normalise(self, images):
        """uint8 (B, C, H, W) -> normalised float32, the same shape."""
        return v2.functional.normalize(images.float() / 255, list(self.mean), list(self.std))

    def denormalise(self, images):
        """Normalised (..., C, H, W) -> the values from 0 to 1 that they came from, clipped."""
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)


def eval_transform(preprocessing):
    """PIL image of C channels -> normalised float32 tensor (C, H, W), as the validation and test loaders show an
    image."""
    fit = FitSize(preprocessing.img_size, preprocessing.interpolation)
    return v2.Compose([fit, v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(list(preprocessing.mean), list(preprocessing.std))])


class FitSize:
    """An image, PIL's or a tensor (..., C, h, w), at another size, (height, width): resized until it just covers that,
    then the middle cut out. A photograph is resized to 256 / 224 of the size before the cut, as is usual for ImageNet.
    Images up to 64 pixels, and all images where the size is, lose nothing but what lies beyond the size at two edges.
    An image of the size stays as it is."""

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
    """How a photograph is fitted with nothing cut off: to whole patches, in its own proportions as nearly as patches
    allow.

    max_tokens  patches at most; None: as many as the model was built for
    img_size    side or (height, width) in pixels instead; the photograph is stretched to it

    Raises InputError for a max_tokens below 1.
    """

    max_tokens: int | None = None
    img_size: int | tuple | None = None

    def __post_init__(self):
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1)
        if self.img_size is not None:
            pair(self.img_size)

    def size_for(self, image_size, patch_size, n_patches):
        """The (height, width) in pixels for an image of image_size, (h, w), by a model of n_patches patches of
        patch_size, (height, width)."""
        if self.img_size is not None:
            return pair(self.img_size)
        most, (h, w), (height, width) = self.max_tokens or n_patches, image_size, patch_size
        highest = min(most, 2 + 2 * math.isqrt(most * h * width // (w * height)))  # twice the rows of square patches
        fitting = ((rows, max(1, round(rows * height * w / (h * width)))) for rows in range(1, highest + 1))
        grids = [(rows, min(columns, most // rows)) for rows, columns in fitting]

        def price(grid):
            """How far an image is stretched in one direction, 0 for not at all, and the share of patches left over."""
            stretch = abs(math.log(grid[0] * height * w / (grid[1] * width * h)))
            return 2 * stretch + 1 - grid[0] * grid[1] / most

        rows, columns = min(grids, key=price)
        return rows * height, columns * width


def covering_size(image_size, size):
    """The smallest (height, width) in the proportions of image_size, (h, w), that covers size, (H, W)."""
    (h, w), (H, W) = image_size, size
    return (H, H * w // h) if h * W <= w * H else (W * h // w, W)


def one_side(sides):
    """(height, width), as one number where they are equal."""
    return sides[0] if sides[0] == sides[1] else tuple(sides)


def describe_size(size):
    """A side, or (height, width), in words: "32", "96x160"."""
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


def resized_channels(numbers, n_channels):
    """A number for each channel, for another number of channels: for 1 their mean, for more they are repeated."""
    if n_channels == 1:
        return (sum(numbers) / len(numbers),)
    return tuple(numbers[i % len(numbers)] for i in range(n_channels))


def _channel_numbers(name, values):
    """A mean or a std, in any kind of sequence, as a tuple of floats."""
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
