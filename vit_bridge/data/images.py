"""What an image may be, and how it becomes a model's input and a picture to show.

A picture is a path, a PIL image, an array (H, W, 3) or (H, W), uint8 or float in 0..1, or a uint8 tensor (C, H, W) or
(1, C, H, W). A model's input is a float tensor (C, H, W) or (1, C, H, W), normalised by model.preprocessing; it is
shown with the normalisation undone, values outside 0..1 clipped. A float tensor that is only scaled to 0..1 is neither:
Preprocessing.normalise turns uint8 images into inputs.

Shapes:  B images, C channels, H, W height and width.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as image_functional

from vit_bridge.errors import InputError
from vit_bridge.models.adapters import adapt
from vit_bridge.preprocessing import FitSize, Preprocessing

FILE_CHANNELS = (1, 3, 4)  # as which an image file can be read: grey, colour, colour and transparency


class UnreadableImage(InputError):
    """An image file that cannot be read, and why. Its fields are its args, so that it passes between processes."""

    def __init__(self, path, reason, advice="replace or remove it"):
        super().__init__(path, reason, advice)
        self.path, self.reason = path, reason

    def __str__(self):
        path, reason, advice = self.args
        return (f"image file {path!r} cannot be read ({reason}): expected a whole image in a format that Pillow knows; "
                f"{advice}")

    def in_a_set(self):
        """The same with the advice for one image of many."""
        return UnreadableImage(self.path, self.reason, "replace or remove it, or go on without it: --skip-corrupt (in "
                                                       "Python skip_corrupt=True)")


def open_image(path, n_channels=3):
    """An image file as an upright PIL image of n_channels, one of FILE_CHANNELS, 8 bits each, as with_channels has it.
    Raises InputError, naming the file, where there is none or it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return with_channels(ImageOps.exif_transpose(image), n_channels)
    except FileNotFoundError:
        raise InputError(f"there is no image file {str(path)!r}: give the path of one") from None
    except IsADirectoryError:
        raise InputError(f"{str(path)!r} is a folder: give the path of an image file in it") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UnreadableImage(str(path), " ".join(str(error).split()) or type(error).__name__) from None


def open_or_skip(path, skip_corrupt, skipped, n_channels=3):
    """open_image for one of many files. With skip_corrupt one that cannot be read is None, and its reason goes into
    the dict skipped."""
    try:
        return open_image(path, n_channels)
    except UnreadableImage as error:
        if not skip_corrupt:
            raise error.in_a_set() from None
        skipped[path] = error.reason


def with_channels(image, n_channels):
    """A PIL image of any mode as one of n_channels: 3, RGB, what is transparent on white; 1, the same in grey; 4, RGBA.
    Raises InputError for other numbers."""
    if n_channels not in FILE_CHANNELS:
        raise InputError(f"a picture cannot be read as {n_channels} channels; expected "
                         f"{' or '.join(map(str, FILE_CHANNELS))}. Give a uint8 tensor ({n_channels}, H, W)")
    if n_channels == 4:
        return (image if image.has_transparency_data else to_rgb(image)).convert("RGBA")
    return to_rgb(image) if n_channels == 3 else to_rgb(image).convert("L")


def grey(images):
    """uint8 (B, 3, H, W) -> (B, 1, H, W), by the same sum of the colours as Pillow's, ITU-R 601-2."""
    red, green, blue = images.int().unbind(1)  # (B, H, W) each
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8).unsqueeze(1)  # (B, 1, H, W)


def to_rgb(image):
    """A PIL image of any mode as an RGB one: 16 bits of grey scaled to 8, what is transparent on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        grey = (np.asarray(image, dtype=np.float64).clip(0, 65535) / 257).round()
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # for which there is no direct way
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def prepare_image(image, model):
    """(what the model is fed, what it looks like): a tensor (1, C, H, W) and an array (H, W, 3) in 0..1.

    A picture is resized and its centre cut to the model's img_size, as the validation images are; a float
    tensor must have that size. Raises InputError for an image that cannot be used.
    """
    adapter = adapt(model)
    size, preprocessing = adapter.img_size, adapter.preprocessing
    if is_input(image):
        images = as_batch(image, adapter.in_channels)
        if tuple(images.shape[2:]) != size and not adapter.any_size:
            raise InputError(f"got a tensor of {images.shape[2]}x{images.shape[3]} pixels, expected "
                             f"{size[0]}x{size[1]}; resize it, or give a picture, which is resized here")
    else:
        picture = FitSize(size, preprocessing.interpolation)(open_picture(image, adapter.in_channels))
        if isinstance(picture, Image.Image):
            picture = image_functional.pil_to_tensor(picture).unsqueeze(0)  # (1, C, H, W)
        images = preprocessing.normalise(picture)  # (1, C, H, W)
    return images, to_array(images, preprocessing)


def prepare_images(images, model):
    """What the model is fed, (B, C, H, W), from a batch that it can be fed already, or from one image or a list of
    them, of any kind. Raises InputError for no image, for values that are not finite, and for images of several sizes,
    which make no batch."""
    if isinstance(images, torch.Tensor) and images.is_floating_point() and images.ndim == 4 and len(images):
        _check_finite(images)
        return images
    several = list(images) if isinstance(images, (list, tuple)) else [images]
    if isinstance(images, torch.Tensor) and images.ndim == 4:
        several = list(images)
    if not several:
        raise InputError("there is no image; expected at least one")
    fed = [prepare_image(image, model)[0] for image in several]
    sizes = sorted({f"{one.shape[2]}x{one.shape[3]}" for one in fed})
    if len(sizes) > 1:
        raise InputError(f"got images of {' and '.join(sizes)} pixels, expected one size; give those of one size "
                         f"together, or pictures, which are resized here")
    return torch.cat(fed)


def as_picture(image, preprocessing=None):
    """An image of any kind as an array (H, W, 3) in 0..1, at its own size."""
    if is_input(image):
        return to_array(as_batch(image, preprocessing.n_channels if preprocessing else 3), preprocessing)
    picture = open_picture(image)
    return np.asarray(picture) / 255 if isinstance(picture, Image.Image) else shown_channels(picture[0] / 255)


def to_array(images, preprocessing=None):
    """A normalised tensor (1, C, H, W) as an array (H, W, 3) in 0..1; preprocessing None: ImageNet's mean and std."""
    preprocessing = preprocessing or Preprocessing(tuple(images.shape[2:])).with_channels(images.shape[1])
    return shown_channels(preprocessing.denormalise(images[0]))


def shown_channels(picture):
    """(C, H, W) in 0..1 as an array (H, W, 3) to look at: up to two channels as their mean in grey, of more the first
    three."""
    picture = picture[:3] if len(picture) >= 3 else picture.mean(dim=0).expand(3, -1, -1)  # (3, H, W)
    return picture.permute(1, 2, 0).numpy()  # (H, W, 3)


def is_input(image):
    """Whether the image is a model's input, a float tensor, and not a picture."""
    return isinstance(image, torch.Tensor) and image.is_floating_point()


def as_batch(image, n_channels=3):
    """A tensor (C, H, W) or (1, C, H, W) as (1, C, H, W) on the CPU. Raises InputError for another shape, NaN
    or infinity."""
    C = n_channels
    if tuple(image.shape[:-2]) not in ((C,), (1, C)) or image.numel() == 0:
        raise InputError(f"got a tensor of shape {tuple(image.shape)}, expected ({C}, H, W) or (1, {C}, H, W); give "
                         f"one image, such as images[0]")
    batch = image.detach().cpu().reshape(1, *image.shape[-3:])  # (1, C, H, W)
    _check_finite(batch)
    return batch.float() if is_input(batch) else batch


def _check_finite(images):
    """Raises InputError where a model's input has NaN or infinity."""
    if is_input(images) and not images.isfinite().all():
        raise InputError("the image has values that are not finite; expected a normalised float tensor, check how "
                         "it was made")


def open_picture(image, n_channels=3):
    """A picture of any kind as an upright PIL image of n_channels; a uint8 tensor of other channels than FILE_CHANNELS
    as it is, (1, C, H, W). Raises InputError for what is no picture."""
    if isinstance(image, (str, Path)):
        return open_image(image, n_channels)
    if isinstance(image, Image.Image):
        try:
            upright = ImageOps.exif_transpose(image)  # which reads it whole
        except (OSError, ValueError) as error:  # ValueError: it is closed
            raise InputError(f"the PIL image cannot be read ({error}); replace its file by a sound one, or open it "
                             f"anew") from error
        _check_scale(upright)
        return with_channels(upright, n_channels)
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        channels = image.shape[-3] if image.ndim in (3, 4) and image.shape[-3] in FILE_CHANNELS else n_channels
        batch = as_batch(image, channels)  # (1, C, H, W)
        if channels not in FILE_CHANNELS:
            return batch
        return with_channels(image_functional.to_pil_image(batch[0]), n_channels)
    if isinstance(image, np.ndarray) and image.size and (image.ndim == 2 or image.shape[2:] in ((3,), (4,))):
        if np.issubdtype(image.dtype, np.floating):
            low, high = image.min(), image.max()
            if not (low >= 0 and high <= 1):
                raise InputError(f"got a float array with values from {low:.3g} to {high:.3g}, expected 0..1; "
                                 f"scale it, or give a normalised image as a torch tensor")
            image = (image * 255).round().astype(np.uint8)
        if image.dtype == np.uint8:
            return with_channels(Image.fromarray(image), n_channels)
    kind = type(image).__name__
    if hasattr(image, "shape"):
        kind = f"{kind} of {image.dtype} and shape {tuple(image.shape)}"
    raise InputError(f"got a {kind}, which is no image; expected a path, a PIL image, an array (H, W, 3) or "
                     f"(H, W), uint8 or float in 0..1, or a tensor (3, H, W)")


def _check_scale(image):
    """Raises InputError for a PIL image of a mode without a defined white, unless its values show it."""
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        if image.mode == "F" or not (low == high == 0 or (low >= 0 and 255 < high < 65536)):
            raise InputError(f"got a PIL image of mode {image.mode!r} with values from {low:.3g} to {high:.3g}, which "
                             f"does not tell where white is; give a float array in 0..1, or one of uint8")

