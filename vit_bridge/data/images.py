"""What an image may be, and how it becomes a model's input and a picture to show.

A picture is a path, a PIL image, an array (H, W, C) or (H, W), uint8, uint16, bool or float in 0..1, or a uint8 tensor
(C, H, W) or (1, C, H, W). One of which nothing says which value is white is refused. A model's input is a float tensor
(C, H, W) or (1, C, H, W), normalised by model.preprocessing; it is shown with the normalisation undone, values outside
0..1 clipped. A float tensor that is only scaled to 0..1 is neither: Preprocessing.normalise turns uint8 images into
inputs.

Shapes:  B images, C channels, H, W height and width.
"""

import math
import os
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as image_functional

from vit_bridge.data.files import image_formats
from vit_bridge.errors import InputError, assume
from vit_bridge.models.adapters import adapt
from vit_bridge.preprocessing import FitSize, Preprocessing
from vit_model import grid_of

FILE_CHANNELS = (1, 3, 4)  # as which an image file can be read: grey, colour, colour and transparency

# TIFF's tags for what the values of a pixel mean.
BITS, PHOTOMETRIC, MAX_SAMPLE, SAMPLE_FORMAT, S_MIN_SAMPLE, S_MAX_SAMPLE = 258, 262, 281, 339, 340, 341
WHITE_IS_ZERO, SIGNED = 0, 2  # of PHOTOMETRIC and SAMPLE_FORMAT
SIXTEEN_BITS = 65535
ALL_ONES = [2**bits - 1 for bits in range(8, 17)]
ANIMATED = (".gif", ".webp", ".tif", ".tiff", ".avif", ".avifs", ".apng", ".fli", ".flc", ".dcx")


class UnreadableImage(InputError):
    """An image file that cannot be read, and why. Its fields are its args, so that it passes between processes. alone:
    the whole message where it is the only file that was asked for."""

    def __init__(self, path, reason, expected="a whole image in a format that Pillow knows", alone=None,
                 advice="replace or remove it"):
        super().__init__(path, reason, expected, alone, advice)
        self.path, self.reason = path, reason

    def __str__(self):
        path, reason, expected, alone, advice = self.args
        return alone or f"image file {path!r} cannot be read ({reason}): expected {expected}; {advice}"

    def in_a_set(self):
        """The same with the advice for one image of many."""
        return UnreadableImage(*self.args[:3], None, "replace or remove it, or go on without it: --skip-corrupt (in "
                                                     "Python skip_corrupt=True)")


class UnknownRange(ValueError):
    """An image whose values do not tell where black and white are."""


def open_image(path, n_channels=3):
    """An image file as an upright PIL image of n_channels, one of FILE_CHANNELS, 8 bits each, as with_channels has it.
    Raises UnreadableImage where there is none, where it cannot be decoded, and where nothing says which value is
    white."""
    try:
        with open_header(path) as image:
            upright = eight_bits(image)
    except FileNotFoundError:
        dead = f", which is a link to {os.readlink(path)!r}" if os.path.islink(path) else ""
        raise UnreadableImage(str(path), f"there is no such file{dead and ': a dead link'}", "an image",
                              f"there is no image file {str(path)!r}{dead}: give the path of one") from None
    except IsADirectoryError:
        raise UnreadableImage(str(path), "it is a folder", "an image", f"{str(path)!r} is a folder: give the path of "
                              f"an image file in it") from None
    except UnknownRange as error:
        raise UnreadableImage(str(path), str(error), "8 or 16 bits a channel without a sign, or a TIFF file with tags "
                              "that tell the range, SMinSampleValue and SMaxSampleValue") from None
    except Image.DecompressionBombError as error:
        n, most = (int(number) / 1e6 for number in re.findall(r"\d+", str(error))[:2])
        raise UnreadableImage(str(path), f"{n:.0f} million pixels, more than the {most:.0f} million that Pillow opens",
                              "fewer, or a higher PIL.Image.MAX_IMAGE_PIXELS") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UnreadableImage(str(path), " ".join(str(error).split()) or type(error).__name__) from None
    return with_channels(upright, n_channels)


def open_header(path):
    """An image file as a PIL image whose pixels are not read yet. Pillow warns of those above half of its limit, which
    are opened all the same: that is not shown."""
    if isinstance(path, (str, Path)) and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError("it is no file, but a pipe or a device")  # opening one may wait for ever
    silence = ("ignore", None, Image.DecompressionBombWarning, None, 0)
    if silence not in warnings.filters:  # catch_warnings() would work on all threads at once
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    return Image.open(path, formats=image_formats())


def open_or_skip(path, skip_corrupt, skipped, n_channels=3):
    """open_image for one of many files. With skip_corrupt one that cannot be read is None, and its reason goes into
    the dict skipped."""
    try:
        return open_image(path, n_channels)
    except UnreadableImage as error:
        if not skip_corrupt:
            raise error.in_a_set() from None
        skipped[path] = error.reason


def remark_on(files):
    """Says what the first look at a set shows, once for the whole set: of up to 64 of the files whether they hold
    several pictures, of 8 with 16 bits whether they use only a part of them. Worker processes say nothing."""
    n_deep = 0
    for file in files[:: -(-len(files) // 64) or 1]:
        try:
            with open_header(file) as image:
                several = file.lower().endswith(ANIMATED) and getattr(image, "is_animated", False)
                deep = _is_deep(image) and n_deep < 8
            if several:
                assume("Some image files hold several pictures (frames or pages): the first of each is taken, the "
                       "others are left out")
            if deep:
                n_deep += 1
                open_image(file)
        except Exception:  # it is named when its turn comes
            continue


# ---- The range of pixels ----------------------------------------------------------------------------------


def eight_bits(image):
    """A PIL image, as it was opened, upright and with 8 bits a channel.

    Values of 16 bits are scaled from 0..65535, or from the bits that a TIFF file says it has. Other numbers, the modes
    "I" and "F", are scaled by what the file says of their range: a 16-bit PGM or PNG, or TIFF's tags. Raises
    UnknownRange where it says nothing, and for signed values of 8 bits.
    """
    limits, deep, key = _limits(image), _is_deep(image), image.info.get("transparency")
    signed = SIGNED in np.ravel(getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, 1))
    image = ImageOps.exif_transpose(image)  # which reads it whole
    if image.mode != "F" and not image.mode.startswith("I"):
        if signed:
            raise UnknownRange(f"mode {image.mode!r} with signed values, which do not tell where white is")
        if deep and 0 < np.asarray(image.convert("RGB")).max() < 64:
            _say_dark()
        return image
    values = np.asarray(image)  # (H, W)
    low, high = values.min(), values.max()
    if limits is None or not (min(limits) <= low and high <= max(limits)):
        stated = f", and the file states {min(limits):g} to {max(limits):g}" if limits else ""
        raise UnknownRange(f"mode {image.mode!r} with values from {low:g} to {high:g}{stated}, which does not tell "
                           f"where white is")
    grey = to_bytes(values, *limits)
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey)


def to_bytes(values, black=0, white=SIXTEEN_BITS):
    """Numbers of any kind as uint8 of the same shape: black as 0, white as 255."""
    if max(black, white) == SIXTEEN_BITS and 0 < values.max() <= SIXTEEN_BITS // 4:
        _say_dark()
    return np.round((values.astype(np.float64) - black) * (255 / (white - black))).astype(np.uint8)


def _say_dark():
    assume("A 16-bit image has no value above a quarter of 65535, as where 12 or 14 bits were put into 16: it is taken "
           "as it is, so it is dark; scale its values up where 65535 is not white")


def _is_deep(image):
    """Whether an image that was opened, and not yet read, has 16 bits a channel in its file."""
    return image.mode.startswith("I;16") or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _limits(image):
    """(the value that is black, the value that is white) of a PIL image as it was opened; None: not known."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    tags = getattr(image, "tag_v2", {})
    most, low, high, bits = (np.ravel(tags.get(tag, np.nan)).astype(float)[0]
                             for tag in (MAX_SAMPLE, S_MIN_SAMPLE, S_MAX_SAMPLE, BITS))
    limits = None
    if low < high and not image.mode.startswith("I;16"):
        limits = low, high
    elif most in ALL_ONES and image.mode != "F":  # any other number is the largest value used
        limits = 0, most
    elif image.mode.startswith("I;16"):
        limits = 0, 4095 if bits == 12 else SIXTEEN_BITS
    elif image.mode == "I" and image.format in ("PNG", "PPM"):
        limits = 0, SIXTEEN_BITS
    return limits[::-1] if limits and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else limits
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
    """A PIL image with 8 bits a channel as an RGB one, what is transparent on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # for which there is no direct way
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# ---- What a model is fed ----------------------------------------------------------------------------------


def sample_photographs():
    """The paths of the four photographs that come with this package: an astronaut, a cat, a cup of coffee, a rocket."""
    return sorted((Path(__file__).parent / "samples").glob("*.jpg"))


def prepare_image(image, model, whole=None):
    """(what the model is fed, what it looks like): a tensor (1, C, H, W) and an array (H, W, 3) in 0..1.

    A picture is resized and its centre cut to the model's img_size, as the validation images are; with a
    preprocessing.Whole nothing is cut off, and the model must take any size. A float tensor must have the model's
    size. Raises InputError for an image that cannot be used.
    """
    adapter = adapt(model)
    size, preprocessing = adapter.img_size, adapter.preprocessing
    if is_input(image):
        images = as_batch(image, adapter.in_channels)
        if tuple(images.shape[2:]) != size and not adapter.any_size:
            raise InputError(f"got a tensor of {images.shape[2]}x{images.shape[3]} pixels, expected "
                             f"{size[0]}x{size[1]}; resize it, or give a picture, which is resized here")
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
    """The (height, width) at which an image of image_size, (h, w), is fed whole. Raises InputError for a model that
    takes one size alone."""
    patch = adapter.patch_size if adapter.attends else (1, 1)
    size = whole.size_for(image_size, patch, math.prod(grid_of(adapter.img_size, patch)))
    if size != adapter.img_size and not adapter.any_size:
        height, width = adapter.img_size
        raise InputError(f"this model takes images of {height}x{width} pixels alone, and the whole image needs "
                         f"{size[0]}x{size[1]}; set model.any_size = True (timm: dynamic_img_size=True), or let the "
                         f"image be cut")
    return size


def prepare_images(images, model, whole=None):
    """What the model is fed, (B, C, H, W), from a batch that it can be fed already, or from one image or a list of
    them, of any kind; whole as in prepare_image. Raises InputError for no image, for values that are not finite, and
    for images of several sizes, which make no batch."""
    if _is_batch(images):
        _check_finite(images)
        return images
    fed = prepare_each(images, model, whole)
    sizes = sorted({f"{one.shape[2]}x{one.shape[3]}" for one in fed})
    if len(sizes) > 1:
        raise InputError(f"got images of {' and '.join(sizes)} pixels, expected one size; give those of one size "
                         f"together, or pictures, which are resized here")
    return torch.cat(fed)


def prepare_each(images, model, whole=None):
    """The same images as prepare_images, each by itself, as they may differ in size: a list of (1, C, H, W)."""
    if _is_batch(images):
        _check_finite(images)
        return list(images.split(1))
    several = list(images) if isinstance(images, (list, tuple)) else [images]
    if isinstance(images, torch.Tensor) and images.ndim == 4:
        several = list(images)
    if not several:
        raise InputError("there is no image; expected at least one")
    return [prepare_image(image, model, whole)[0] for image in several]


def _is_batch(images):
    """Whether these are a model's inputs, (B, C, H, W), B > 0, and no pictures."""
    return is_input(images) and images.ndim == 4 and len(images) > 0


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
    """A picture of any kind as an upright PIL image of n_channels; an array or a uint8 tensor of other channels than
    FILE_CHANNELS as a tensor, (1, C, H, W). Raises InputError for what is no picture."""
    if isinstance(image, (str, Path)):
        return open_image(image, n_channels)
    if isinstance(image, Image.Image):
        try:
            upright = eight_bits(image)
        except UnknownRange as error:
            raise InputError(f"got a PIL image of {error}; give a float array in 0..1, or one of uint8") from None
        except (OSError, ValueError) as error:  # ValueError: it is closed
            raise InputError(f"the PIL image cannot be read ({error}); replace its file by a sound one, or open it "
                             f"anew") from error
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
                raise InputError(f"got a float array with values from {low:.3g} to {high:.3g}, expected 0..1; "
                                 f"scale it, or give a normalised image as a torch tensor")
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
    raise InputError(f"got a {kind}, which is no image; expected a path, a PIL image, an array (H, W, "
                     f"{n_channels}) or (H, W), uint8, uint16, bool or float in 0..1, or a tensor ({n_channels}, H, W) "
                     f"of uint8")

