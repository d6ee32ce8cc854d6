"""What an image may be, and how it becomes a model's input and a picture to show.

A picture is a path, a PIL image, an array (H, W, 3) or (H, W), uint8 or float in 0..1, or a uint8 tensor (3, H, W) or
(1, 3, H, W). A model's input is a float tensor (3, H, W) or (1, 3, H, W), normalised by model.preprocessing; it is
shown with the normalisation undone, values outside 0..1 clipped. A float tensor that is only scaled to 0..1 is neither:
Preprocessing.normalise turns uint8 images into inputs.

Shapes:  B images, H, W height and width.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as image_functional

from vit_bridge.errors import InputError
from vit_bridge.models.adapters import adapt
from vit_bridge.preprocessing import FitSquare, Preprocessing


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


def open_image(path):
    """An image file as an upright PIL image in RGB, 8 bits a channel, what is transparent on white. Raises InputError,
    naming the file, where there is none or it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise InputError(f"there is no image file {str(path)!r}: give the path of one") from None
    except IsADirectoryError:
        raise InputError(f"{str(path)!r} is a folder: give the path of an image file in it") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UnreadableImage(str(path), " ".join(str(error).split()) or type(error).__name__) from None


def open_or_skip(path, skip_corrupt, skipped):
    """open_image for one of many files. With skip_corrupt one that cannot be read is None, and its reason goes into
    the dict skipped."""
    try:
        return open_image(path)
    except UnreadableImage as error:
        if not skip_corrupt:
            raise error.in_a_set() from None
        skipped[path] = error.reason


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
    """(what the model is fed, what it looks like): a tensor (1, 3, H, W) and an array (H, W, 3) in 0..1.

    A picture is resized and its centre cut to the model's img_size, as the validation images are; a float
    tensor must have that size. Raises InputError for an image that cannot be used.
    """
    adapter = adapt(model)
    size, preprocessing = adapter.img_size, adapter.preprocessing
    if adapter.in_channels != 3:
        raise InputError(f"the model takes images of {adapter.in_channels} channels; expected 3, build it with "
                         f"in_channels=3 to give it pictures")
    if is_input(image):
        images = as_batch(image)
        if tuple(images.shape[2:]) != size and not adapter.any_size:
            raise InputError(f"got a tensor of {images.shape[2]}x{images.shape[3]} pixels, expected "
                             f"{size[0]}x{size[1]}; resize it, or give a picture, which is resized here")
    else:
        picture = fit_picture(open_picture(image), size, preprocessing.interpolation)
        images = preprocessing.normalise(image_functional.pil_to_tensor(picture).unsqueeze(0))  # (1, 3, H, W)
    return images, to_array(images, preprocessing)


def prepare_images(images, model):
    """What the model is fed, (B, 3, H, W), from a batch that it can be fed already, or from one image or a list of
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
        return to_array(as_batch(image), preprocessing)
    return np.asarray(open_picture(image)) / 255


def to_array(images, preprocessing=None):
    """A normalised tensor (1, 3, H, W) as an array (H, W, 3) in 0..1; preprocessing None: ImageNet's mean and std."""
    preprocessing = preprocessing or Preprocessing(tuple(images.shape[2:]))
    return preprocessing.denormalise(images[0]).permute(1, 2, 0).numpy()  # (H, W, 3)


def is_input(image):
    """Whether the image is a model's input, a float tensor, and not a picture."""
    return isinstance(image, torch.Tensor) and image.is_floating_point()


def as_batch(image):
    """A tensor (3, H, W) or (1, 3, H, W) as (1, 3, H, W) on the CPU. Raises InputError for another shape, NaN
    or infinity."""
    if tuple(image.shape[:-2]) not in ((3,), (1, 3)) or image.numel() == 0:
        raise InputError(f"got a tensor of shape {tuple(image.shape)}, expected (3, H, W) or (1, 3, H, W); give "
                         f"one image, such as images[0]")
    batch = image.detach().cpu().reshape(1, *image.shape[-3:])  # (1, 3, H, W)
    _check_finite(batch)
    return batch.float() if is_input(batch) else batch


def _check_finite(images):
    """Raises InputError where a model's input has NaN or infinity."""
    if is_input(images) and not images.isfinite().all():
        raise InputError("the image has values that are not finite; expected a normalised float tensor, check how "
                         "it was made")


def open_picture(image):
    """A picture of any kind as an upright PIL image in RGB. Raises InputError for what is no picture."""
    if isinstance(image, (str, Path)):
        return open_image(image)
    if isinstance(image, Image.Image):
        try:
            upright = ImageOps.exif_transpose(image)  # which reads it whole
        except (OSError, ValueError) as error:  # ValueError: it is closed
            raise InputError(f"the PIL image cannot be read ({error}); replace its file by a sound one, or open it "
                             f"anew") from error
        _check_scale(upright)
        return to_rgb(upright)
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        return image_functional.to_pil_image(as_batch(image)[0])
    if isinstance(image, np.ndarray) and image.size and (image.ndim == 2 or image.shape[2:] in ((3,), (4,))):
        if np.issubdtype(image.dtype, np.floating):
            low, high = image.min(), image.max()
            if not (low >= 0 and high <= 1):
                raise InputError(f"got a float array with values from {low:.3g} to {high:.3g}, expected 0..1; "
                                 f"scale it, or give a normalised image as a torch tensor")
            image = (image * 255).round().astype(np.uint8)
        if image.dtype == np.uint8:
            return to_rgb(Image.fromarray(image))
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


def fit_picture(image, size, interpolation="bilinear"):
    """A PIL image resized and its centre cut to size, (height, width), as the validation images are.

    Validation images are always square; for another size the picture is scaled until it just covers it.
    """
    height, width = size
    if height == width:
        return FitSquare(height, interpolation)(image)
    return ImageOps.fit(image, (width, height), Image.Resampling[interpolation.upper()])
