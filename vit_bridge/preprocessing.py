"""What a model's images must be: Preprocessing, which every trained model and every checkpoint carries.

Shapes:  B images, C channels, H, W height and width, S side of a square image in pixels.
"""

from dataclasses import dataclass

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import center_crop, resize

from vit_bridge.errors import InputError, check_choice, pair

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

    img_size       side or (height, width) in pixels
    mean, std      of each channel, of values from 0 to 1: (x - mean) / std is what the model sees
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
        pair(self.img_size)
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

    def normalise(self, images):
        """uint8 (B, C, H, W) -> normalised float32, the same shape."""
        return v2.functional.normalize(images.float() / 255, list(self.mean), list(self.std))

    def denormalise(self, images):
        """Normalised (..., C, H, W) -> the values from 0 to 1 that they came from, clipped."""
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)


def eval_transform(preprocessing):
    """PIL RGB image -> normalised float32 tensor (3, S, S), as the validation and test loaders show an image."""
    fit = FitSquare(preprocessing.img_size, preprocessing.interpolation)
    return v2.Compose([fit, v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(list(preprocessing.mean), list(preprocessing.std))])


class FitSquare:
    """PIL image -> PIL image of S x S: the shorter side resized, then the middle cut out. A photograph is resized to
    256 / 224 of S before the cut, as is usual for ImageNet. Images up to 64 pixels, and all images where S is, lose
    nothing but the ends of the longer side. An image of S x S stays as it is."""

    def __init__(self, img_size, interpolation="bilinear"):
        check_choice("interpolation", interpolation, INTERPOLATIONS)
        self.img_size, self.interpolation = img_size, InterpolationMode(interpolation)

    def __call__(self, image):
        if image.size == (self.img_size, self.img_size):
            return image
        small = min(self.img_size, *image.size) <= SMALL_SIDE
        image = resize(image, [self.img_size if small else round(self.img_size * 256 / 224)], self.interpolation)
        return center_crop(image, [self.img_size])


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
