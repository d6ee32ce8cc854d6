"""Read images of any kind and convert them to a model's input.

An image is a path, a PIL image, an array (H, W, C) or (H, W) of uint8, uint16, bool or float in 0..1, or a uint8 tensor
(C, H, W) or (1, C, H, W). A float tensor of these shapes is a model's input: it must be normalised by
model.preprocessing (`Preprocessing.normalise` does that), not merely scaled to 0..1. `prepare_image` and
`prepare_images` make inputs, `open_image` reads a file. Images whose range of values is unknown are refused.

Shapes:  B images, C channels, H, W height and width.
"""

import math
import os
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as image_functional

from vit_bridge.data.files import image_endings, image_formats, to_convert
from vit_bridge.errors import InputError, assume
from vit_bridge.models.adapters import adapt_unlabelled
from vit_bridge.preprocessing import FitSize, Preprocessing
from vit_model import grid_of

FILE_CHANNELS = (1, 3, 4)  # an image file can be read as grey, colour, or colour and transparency

# TIFF tags that specify what the values of a pixel mean.
BITS, PHOTOMETRIC, MAX_SAMPLE, SAMPLE_FORMAT, S_MIN_SAMPLE, S_MAX_SAMPLE = 258, 262, 281, 339, 340, 341
WHITE_IS_ZERO, SIGNED = 0, 2  # values of PHOTOMETRIC and SAMPLE_FORMAT
SIXTEEN_BITS = 65535
ALL_ONES = [2**bits - 1 for bits in range(8, 17)]
ANIMATED = (".gif", ".webp", ".tif", ".tiff", ".avif", ".avifs", ".apng", ".fli", ".flc", ".dcx")


class UnreadableImage(InputError):
    """An image file that cannot be read.

    Parameters
    ----------
    path, reason : str
        The file, and why it cannot be read.
    expected : str, optional
        What was expected. Without it, `reason` states what the file is, such as "damaged (truncated)".
    advice : str, optional
        What to do.
    alone : str, optional
        The whole message, used if this is the only file requested.

    Notes
    -----
    All arguments are kept in `args`, so that the error can be pickled and passed between processes.
    """

    def __init__(self, path, reason, expected="an undamaged image in a format that Pillow reads", alone=None,
                 advice="replace or remove it"):
        super().__init__(path, reason, expected, alone, advice)
        self.path, self.reason = path, reason

    def __str__(self):
        path, reason, expected, alone, advice = self.args
        if not expected:
            return alone or f"{path!r} is {reason}; {advice}"
        return alone or f"image file {path!r} cannot be read ({reason}); expected {expected}; {advice}"

    def in_a_set(self):
        """Return this error with the advice for one image of many."""
        return UnreadableImage(*self.args[:3], None, "remove it, or add --skip-corrupt (in Python skip_corrupt=True)")


class UnknownRange(ValueError):
    """An image whose values for black and white are unknown."""


def open_image(path, n_channels=3):
    """Read an image file as an upright PIL image with 8 bits per channel.

    Parameters
    ----------
    path : path
        The file.
    n_channels : int
        1 for grey, 3 for colour, 4 for colour and transparency.

    Returns
    -------
    PIL.Image.Image

    Raises
    ------
    UnreadableImage
        If there is no such file, if it cannot be decoded, or if its range of values is unknown.
    """
    try:
        with open_header(path) as image:
            upright = eight_bits(image)
    except FileNotFoundError:
        dead = f", which is a link to {os.readlink(path)!r}" if os.path.islink(path) else ""
        raise UnreadableImage(str(path), f"there is no such file{dead and ': a dead link'}", "an image",
                              f"there is no image file {str(path)!r}{dead}; use the path of an image") from None
    except IsADirectoryError:
        raise UnreadableImage(str(path), "it is a folder", "an image", f"{str(path)!r} is a folder; use the path of "
                                                                       f"an image file in it") from None
    except UnknownRange as error:
        raise UnreadableImage(str(path), str(error), "unsigned values of 8 or 16 bits per channel, or a TIFF file "
                                                     "whose tags SMinSampleValue and SMaxSampleValue state "
                                                     "the range") from None
    except Image.DecompressionBombError as error:
        n, most = (int(number) / 1e6 for number in re.findall(r"\d+", str(error))[:2])
        raise UnreadableImage(str(path), f"{n:.0f} million pixels, more than the {most:.0f} million that Pillow opens",
                              "fewer pixels, or a higher PIL.Image.MAX_IMAGE_PIXELS") from None
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise _unreadable(str(path), error) from None
    return with_channels(upright, n_channels)


def _unreadable(path, error):
    """Return the UnreadableImage for an error of the operating system or of a decoder."""
    words, ending = " ".join(str(error).split()) or type(error).__name__, os.path.splitext(path)[1].lower()
    if isinstance(error, OSError) and error.errno:
        return UnreadableImage(path, words)
    if os.path.isfile(path) and not os.path.getsize(path):
        return UnreadableImage(path, "empty", None)
    if isinstance(error, UnidentifiedImageError):
        known = ending in image_endings()
        return UnreadableImage(path, f"{'damaged, or ' * known}not an image that Pillow can read", None,
                               advice=to_convert([ending]) or "replace or remove it")
    return UnreadableImage(path, f"damaged ({'truncated' if 'truncated' in words else words})", None)


def open_header(path):
    """Open an image file as a PIL image without reading its pixels yet.

    Pillow's warning about large images (more than half of its limit) is hidden, because they are opened anyway.
    """
    if isinstance(path, (str, Path)) and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UnreadableImage(str(path), "it is a pipe or a device, not a file")  # opening one could block forever
    silence = ("ignore", None, Image.DecompressionBombWarning, None, 0)
    if silence not in warnings.filters:  # catch_warnings() would affect all threads at once
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    return Image.open(path, formats=image_formats())


def open_or_skip(path, skip_corrupt, skipped, n_channels=3):
    """Open one of many image files, as `open_image`.

    With skip_corrupt, return None for a file that cannot be read and record the reason in the dict `skipped`.
    """
    try:
        return open_image(path, n_channels)
    except UnreadableImage as error:
        if not skip_corrupt:
            raise error.in_a_set() from None
        skipped[path] = error.reason


def remark_on(files):
    """Warn, once for a whole data set, about images that are read only in part or look too dark.

    It checks up to 64 of the files for several frames or pages, and up to 8 16-bit images for an unused range. It runs
    in the main process; worker processes do not warn.
    """
    n_deep = 0
    for file in files[:: -(-len(files) // 64) or 1]:
        try:
            with open_header(file) as image:
                several = file.lower().endswith(ANIMATED) and getattr(image, "is_animated", False)
                deep = _is_deep(image) and n_deep < 8
            if several:
                assume("Some image files hold several images (frames or pages): the first of each is used, the others "
                       "are ignored")
            if deep:
                n_deep += 1
                open_image(file)
        except Exception:  # reported when the file is read
            continue


# ---- The range of pixels ----------------------------------------------------------------------------------


def eight_bits(image):
    """Return a freshly opened PIL image upright and with 8 bits per channel.

    16-bit values are scaled from 0..65535, or from the number of bits that a TIFF file states. Values of the modes "I"
    and "F" are scaled by the range that the file states: a 16-bit PGM or PNG, or the tags of a TIFF file.

    Raises
    ------
    UnknownRange
        If the file states no range, if the values exceed the stated range, or if they are signed 8-bit values.
    """
    limits, deep, key = _limits(image), _is_deep(image), image.info.get("transparency")
    signed = SIGNED in np.ravel(getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, 1))
    image = ImageOps.exif_transpose(image)  # this reads the pixels
    if image.mode != "F" and not image.mode.startswith("I"):
        if signed:
            raise UnknownRange(f"mode {image.mode!r} with signed values, for which black and white are unknown")
        if deep and 0 < np.asarray(image.convert("RGB")).max() < 64:
            _say_dark()
        return image
    values = np.asarray(image)  # (H, W)
    low, high = values.min(), values.max()
    if limits is None or not (min(limits) <= low and high <= max(limits)):
        stated = f", outside the {min(limits):g} to {max(limits):g} that the file states" if limits else ""
        raise UnknownRange(f"mode {image.mode!r} with values from {low:g} to {high:g}{stated}, for which black and "
                           f"white are unknown")
    grey = to_bytes(values, *limits)
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey)


def to_bytes(values, black=0, white=SIXTEEN_BITS):
    """Scale numbers of any dtype to uint8 of the same shape: black becomes 0 and white 255."""
    if max(black, white) == SIXTEEN_BITS and 0 < values.max() <= SIXTEEN_BITS // 4:
        _say_dark()
    return np.round((values.astype(np.float64) - black) * (255 / (white - black))).astype(np.uint8)


def _say_dark():
    assume("A 16-bit image has no value above a quarter of 65535, as if 12 or 14 bits had been stored in 16. It is "
           "used unchanged and looks dark; scale its values up if 65535 is not white")


def _is_deep(image):
    """Return whether a PIL image, not yet read, has 16 bits per channel in its file."""
    return image.mode.startswith("I;16") or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _limits(image):
    """Return the values of (black, white) of a freshly opened PIL image, or None if they are unknown."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    tags = getattr(image, "tag_v2", {})
    most, low, high, bits = (np.ravel(tags.get(tag, np.nan)).astype(float)[0]
                             for tag in (MAX_SAMPLE, S_MIN_SAMPLE, S_MAX_SAMPLE, BITS))
    limits = None
    if low < high and not image.mode.startswith("I;16"):
        limits = low, high
    elif most in ALL_ONES and image.mode != "F":  # any other number is just the largest value in use
        limits = 0, most
    elif image.mode.startswith("I;16"):
        limits = 0, 4095 if bits == 12 else SIXTEEN_BITS
    elif image.mode == "I" and image.format in ("PNG", "PPM"):
        limits = 0, SIXTEEN_BITS
    return limits[::-1] if limits and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else limits


def with_channels(image, n_channels):
    """Convert a PIL image to n_channels: 3 is RGB, 1 is grey, 4 is RGBA.

    For RGB and grey, transparent areas become white.

    Raises
    ------
    InputError
        For any other number of channels.
    """
    if n_channels not in FILE_CHANNELS:
        raise InputError(f"an image file cannot be read as {n_channels} channels; expected "
                         f"{', '.join(map(str, FILE_CHANNELS[:-1]))} or {FILE_CHANNELS[-1]}. For other channels, "
                         f"pass a uint8 tensor ({n_channels}, H, W)")
    if n_channels == 4:
        return (image if image.has_transparency_data else to_rgb(image)).convert("RGBA")
    return to_rgb(image) if n_channels == 3 else to_rgb(image).convert("L")


def grey(images):
    """Convert colour images uint8 (B, 3, H, W) to grey (B, 1, H, W).

    The colours have the weights that Pillow uses (ITU-R 601-2).
    """
    red, green, blue = images.int().unbind(1)  # (B, H, W) each
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8).unsqueeze(1)  # (B, 1, H, W)


def to_rgb(image):
    """Convert a PIL image with 8 bits per channel to RGB; transparent areas become white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # "La" cannot be converted to "RGBA" directly
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# ---- A model's input -------------------------------------------------------------------------------------


def sample_photographs():
    """Return the paths of the four photographs in this package: an astronaut, a cat, coffee, a rocket."""
    return sorted((Path(__file__).parent / "samples").glob("*.jpg"))


def prepare_image(image, model, whole=None):
    """Convert an image to a model's input and to an array for display.

    Parameters
    ----------
    image : path, PIL image, array or tensor
        An image of any kind that this module accepts. A float tensor counts as a normalised input.
    model : Module
        The model, whose preprocessing is used.
    whole : preprocessing.Whole, optional
        Resize the whole image instead of cropping its centre; the model must accept images of any size.

    Returns
    -------
    images : Tensor, shape (1, C, H, W)
        The input. Images are resized and centre-cropped to the model's img_size, as validation images are; a float
        tensor must already have that size, unless the model accepts any size.
    picture : ndarray, shape (H, W, 3)
        The same image in 0..1, with the normalisation undone and the values clipped.

    Raises
    ------
    InputError
        If the image cannot be used.
    """
    adapter = adapt_unlabelled(model)
    size, preprocessing = adapter.img_size, adapter.preprocessing
    if is_input(image):
        images = as_batch(image, adapter.in_channels)
        if tuple(images.shape[2:]) != size and not adapter.any_size:
            raise InputError(f"got a tensor of {images.shape[2]}x{images.shape[3]} pixels, expected "
                             f"{size[0]}x{size[1]}; resize it, or pass an image file or a uint8 image, which is "
                             f"resized automatically")
    else:
        picture = open_picture(image, adapter.in_channels)
        if adapter.assumed:
            assume(adapter.assumed)
        if whole is None:
            picture = FitSize(size, preprocessing.interpolation)(picture)
        else:
            wanted = whole_size(image_functional.get_size(picture), adapter, whole)
            picture = image_functional.resize(picture, wanted, InterpolationMode(preprocessing.interpolation))
        if isinstance(picture, Image.Image):
            picture = image_functional.pil_to_tensor(picture).unsqueeze(0)  # (1, C, H, W)
        images = preprocessing.normalise(picture)  # (1, C, H, W)
    return images, to_array(images, preprocessing)


def whole_size(image_size, adapter, whole):
    """Return the (height, width) at which the model receives a whole image of image_size, (h, w).

    Raises
    ------
    InputError
        If the model accepts only one size, and the image needs a different one.
    """
    step = adapter.size_step
    size = whole.size_for(image_size, step, math.prod(grid_of(adapter.img_size, step)))
    if size != adapter.img_size and not adapter.any_size:
        height, width = adapter.img_size
        raise InputError(f"this model accepts only images of {height}x{width} pixels, but the whole image needs "
                         f"{size[0]}x{size[1]}; set model.any_size = True (timm: dynamic_img_size=True), or crop the "
                         f"image")
    return size


def prepare_images(images, model, whole=None):
    """Return the input (B, C, H, W) for one image, a list of images, or a batch that is already an input.

    `whole` works as in `prepare_image`.

    Raises
    ------
    InputError
        If there is no image, if values are not finite, or if the images differ in size and cannot form a batch.
    """
    if _is_batch(images):
        _check_finite(images)
        return images
    fed = prepare_each(images, model, whole)
    sizes = sorted({f"{one.shape[2]}x{one.shape[3]}" for one in fed})
    if len(sizes) > 1:
        raise InputError(f"got images of {' and '.join(sizes)} pixels, expected one size; pass images of one size, or "
                         f"image files, which are resized automatically")
    return torch.cat(fed)


def prepare_each(images, model, whole=None):
    """Prepare images like `prepare_images`, as a list of inputs (1, C, H, W) that may differ in size."""
    if _is_batch(images):
        _check_finite(images)
        return list(images.split(1))
    several = list(images) if isinstance(images, (list, tuple)) else [images]
    if isinstance(images, torch.Tensor) and images.ndim == 4:
        several = list(images)
    if not several:
        raise InputError("there is no image; pass at least one")
    return [prepare_image(image, model, whole)[0] for image in several]


def _is_batch(images):
    """Return whether images are an input (B, C, H, W) with B > 0."""
    return is_input(images) and images.ndim == 4 and len(images) > 0


def as_picture(image, preprocessing=None):
    """Return an image of any kind as an array (H, W, 3) in 0..1, at its own size."""
    if is_input(image):
        return to_array(as_batch(image, preprocessing.n_channels if preprocessing else 3), preprocessing)
    picture = open_picture(image)
    return np.asarray(picture) / 255 if isinstance(picture, Image.Image) else shown_channels(picture[0] / 255)


def to_array(images, preprocessing=None):
    """Convert a normalised tensor (1, C, H, W) to an array (H, W, 3) in 0..1.

    `preprocessing` None means ImageNet's mean and std.
    """
    preprocessing = preprocessing or Preprocessing(tuple(images.shape[2:])).with_channels(images.shape[1])
    return shown_channels(preprocessing.denormalise(images[0]))


def shown_channels(picture):
    """Convert a tensor (C, H, W) in 0..1 to an array (H, W, 3) for display.

    One or two channels are averaged to grey. If there are more than three, the first three are shown.
    """
    picture = picture[:3] if len(picture) >= 3 else picture.mean(dim=0).expand(3, -1, -1)  # (3, H, W)
    return picture.permute(1, 2, 0).numpy()  # (H, W, 3)


def is_input(image):
    """Return whether the image is a model's input, which means a float tensor."""
    return isinstance(image, torch.Tensor) and image.is_floating_point()


def as_batch(image, n_channels=3):
    """Return a tensor (C, H, W) or (1, C, H, W) as (1, C, H, W) on the CPU.

    Raises
    ------
    InputError
        If the shape is wrong, or if a value is not finite.
    """
    C = n_channels
    if tuple(image.shape[:-2]) not in ((C,), (1, C)) or image.numel() == 0:
        raise InputError(f"got a tensor of shape {tuple(image.shape)}, expected ({C}, H, W) or (1, {C}, H, W); pass "
                         f"one image, such as images[0]")
    batch = image.detach().cpu().reshape(1, *image.shape[-3:])  # (1, C, H, W)
    _check_finite(batch)
    return batch.float() if is_input(batch) else batch


def _check_finite(images):
    """Raise InputError if an input holds NaN or infinity."""
    if is_input(images) and not images.isfinite().all():
        raise InputError("the image has values that are not finite; pass a normalised float tensor without NaN or "
                         "infinity")


def open_picture(image, n_channels=3):
    """Return an image as an upright PIL image of n_channels.

    An array or uint8 tensor whose channels a PIL image cannot hold becomes a tensor (1, C, H, W).

    Raises
    ------
    InputError
        If it is not an image.
    """
    if isinstance(image, (str, Path)):
        return open_image(image, n_channels)
    if isinstance(image, Image.Image):
        try:
            upright = eight_bits(image)
        except UnknownRange as error:
            raise InputError(f"got a PIL image of {error}; pass a float array in 0..1, or a uint8 array") from None
        except (OSError, ValueError) as error:  # ValueError: the image is closed
            raise InputError(f"the PIL image cannot be read ({error}); open it again, or replace its file if that is "
                             f"damaged") from error
        return with_channels(upright, n_channels)
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        channels = image.shape[-3] if image.ndim in (3, 4) and image.shape[-3] in FILE_CHANNELS else n_channels
        batch = as_batch(image, channels)  # (1, C, H, W)
        if channels not in FILE_CHANNELS:
            return batch
        return with_channels(image_functional.to_pil_image(batch[0]), n_channels)
    channels = image.shape[2:] if isinstance(image, np.ndarray) and image.ndim in (2, 3) and image.size else None
    if channels in ((), (1,), (3,), (4,), (n_channels,)):
        if np.issubdtype(image.dtype, np.floating):
            low, high = image.min(), image.max()
            if not (low >= 0 and high <= 1):
                raise InputError(f"got a float array with values from {low:.3g} to {high:.3g}, expected 0..1; scale "
                                 f"it, or pass a normalised image as a torch tensor")
            image = to_bytes(image, 0, 1)
        elif image.dtype in (np.bool_, np.uint16):
            image = to_bytes(image, 0, 1 if image.dtype == np.bool_ else SIXTEEN_BITS)
        if image.dtype == np.uint8 and channels in ((), (1,), (3,), (4,)):
            return with_channels(Image.fromarray(image[:, :, 0] if channels == (1,) else image), n_channels)
        if image.dtype == np.uint8:
            return torch.from_numpy(image.transpose(2, 0, 1)[None].copy())  # (1, C, H, W)
    kind = type(image).__name__
    if hasattr(image, "shape"):
        kind = f"{kind} of {image.dtype} and shape {tuple(image.shape)}"
    raise InputError(f"got a {kind}, which is not an image; expected a path, a PIL image, an array (H, W, "
                     f"{n_channels}) or (H, W) of uint8, uint16, bool or float in 0..1, or a uint8 tensor "
                     f"({n_channels}, H, W)")

