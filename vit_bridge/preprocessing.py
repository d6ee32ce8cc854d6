"""What a model's images must be."""

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import center_crop, resize

from vit_bridge.errors import InputError, check_choice

SMALL_SIDE = 64  # pixels: images up to this side are seen whole
INTERPOLATIONS = ("bilinear", "bicubic")


def eval_transform(img_size, mean, std, interpolation="bilinear"):
    """PIL RGB image -> normalised float32 tensor (3, S, S), as the validation and test loaders show an image."""
    return v2.Compose([FitSquare(img_size, interpolation), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(list(mean), list(std))])


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


# Mean and standard deviation of each channel (red, green, blue), of values from 0 to 1.
NORMALISATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,) * 3, (0.3081,) * 3),
    "fashion-mnist": ((0.2860,) * 3, (0.3530,) * 3),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
    "shapes": ((0.5,) * 3, (0.25,) * 3),
}


def three_numbers(name, values):
    """A mean or a std as a tuple of three floats."""
    return channel_numbers(name, values, 3, "give the model's own, or leave out mean and std")


def channel_numbers(name, values, n_channels, advice):
    """A mean or a std, in any kind of sequence, as a tuple of floats, one a channel. Raises InputError, with the
    advice, for another number of them, and for what is not finite or no std."""
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64)
        sound = numbers.isfinite() & (numbers > 0) if name == "std" else numbers.isfinite()
        fits = numbers.shape == (n_channels,) and bool(sound.all())
    except (TypeError, ValueError, RuntimeError, OverflowError):
        fits = False
    if not fits:
        count = "three finite numbers" if n_channels == 3 else f"finite numbers, {n_channels} of them"
        raise InputError(f"{name} {in_one_line(values)} is out of range: expected {count}"
                         f"{' above 0' if name == 'std' else ''}, one a channel; {advice}")
    return tuple(numbers.tolist())


def in_one_line(value):
    return " ".join(repr(value).split())[:200]
