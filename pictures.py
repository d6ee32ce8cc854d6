"""What an image may be, and how it becomes a model's input and a picture to show.

An image may be
    a picture: a path, a PIL image, an array (H, W, 3) or (H, W), uint8 or float in 0..1, or a uint8 tensor
    (3, H, W) or (1, 3, H, W);
    a model's input: a float tensor (3, H, W) or (1, 3, H, W), normalised. It is shown with the normalisation
    undone, values outside 0..1 clipped. A float tensor that has merely been scaled to 0..1 is none: pictures.normalise
    makes one of uint8 images.
The normalisation is that of the model: its mean and std, or what timm keeps with it. For a ViT of transformers, which
keeps it apart from the model, it is that of Google's checkpoints, 0.5 and 0.5; where nothing else is known it is
ImageNet's. `model.mean, model.std = ...` says another one.

Letters:  H, W height and width.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as image_functional

from cnn_model import ConvNet
from recording import anatomy_of
from vit_data import NORMALISATION, FitSquare, channel_numbers, open_image, three_numbers, to_rgb
from vit_model import InputError, pair


def prepare_image(image, model):
    """(what the model is fed, what it looks like): a tensor (1, 3, H, W) and an array (H, W, 3) in 0..1.

    A picture is resized and its centre cut to the model's img_size, as the validation images are; a float
    tensor must have that size. Raises InputError for an image that cannot be used.
    """
    channels, size, any_size = input_of(model)
    if channels != 3:
        raise InputError(f"the model takes images of {channels} channels; expected 3, build it with in_channels=3 to "
                         f"give it pictures")
    mean, std = statistics_of(model)
    if is_input(image):
        images = as_batch(image)
        if tuple(images.shape[2:]) != size and not any_size:
            raise InputError(f"got a tensor of {images.shape[2]}x{images.shape[3]} pixels, expected "
                             f"{size[0]}x{size[1]}; resize it, or give a picture, which is resized here")
    else:
        kept = getattr(model, "pretrained_cfg", None) or {}  # timm's
        interpolation = getattr(model, "interpolation", None) or kept.get("interpolation") or "bilinear"
        picture = fit_picture(open_picture(image), size, interpolation)
        images = normalise(image_functional.pil_to_tensor(picture).unsqueeze(0), mean, std)  # (1, 3, H, W)
    return images, undo_normalisation(images, mean, std)


def prepare_images(images, model):
    """What the model is fed, (B, 3, H, W), from a batch that it can be fed already, or from one image or a list of
    them, of any kind. Raises InputError for no image, for values that are not finite, and for images of several sizes,
    which make no batch."""
    if isinstance(images, torch.Tensor) and images.is_floating_point() and images.ndim == 4 and len(images):
        check_finite(images)
        return images
    listed = list(images) if isinstance(images, (list, tuple)) else [images]
    if isinstance(images, torch.Tensor) and images.ndim == 4:
        listed = list(images)
    if not listed:
        raise InputError("there is no image; expected at least one")
    fed = [prepare_image(image, model)[0] for image in listed]
    sizes = sorted({f"{one.shape[2]}x{one.shape[3]}" for one in fed})
    if len(sizes) > 1:
        raise InputError(f"got images of {' and '.join(sizes)} pixels, expected one size; give those of one size "
                         f"together, or pictures, which are resized here")
    return torch.cat(fed)


def input_of(model):
    """(channels, (height, width), whether other sizes will do too) of the images that a model takes."""
    if isinstance(model, ConvNet):
        return model.config.in_channels, pair(model.config.img_size), False
    anatomy = anatomy_of(model)
    return anatomy.in_channels, anatomy.img_size, anatomy.any_size


def as_picture(image, mean=None, std=None):
    """An image of any kind as an array (H, W, 3) in 0..1, at its own size."""
    if is_input(image):
        return undo_normalisation(as_batch(image), mean, std)
    return np.asarray(open_picture(image)) / 255


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
    check_finite(batch)
    return batch.float() if is_input(batch) else batch


def check_finite(images):
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
        check_scale(upright)
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


def check_scale(image):
    """Raises InputError for a PIL image of a mode that does not tell where white is, unless its values do."""
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        if image.mode == "F" or not (low == high == 0 or (low >= 0 and 255 < high < 65536)):
            raise InputError(f"got a PIL image of mode {image.mode!r} with values from {low:.3g} to {high:.3g}, which "
                             f"does not tell where white is; give a float array in 0..1, or one of uint8")


def fit_picture(image, size, interpolation="bilinear"):
    """A PIL image resized and its centre cut to size, (height, width), as the validation images are.

    Where the size is no square, which those always are, the picture just covers it.
    """
    height, width = size
    if height == width:
        return FitSquare(height, interpolation)(image)
    return ImageOps.fit(image, (width, height), Image.Resampling[interpolation.upper()])


def statistics_of(model):
    """(mean, std) of the images that the model was trained on, each a tuple of floats, or ImageNet's where it has none.
    Raises InputError where those of the model are not one number for each of its channels."""
    kept = getattr(model, "pretrained_cfg", None) or {}  # timm's
    if getattr(getattr(model, "config", None), "model_type", None) == "vit":  # of transformers
        kept = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    own = {name: getattr(model, name, None) for name in ("mean", "std")}
    own = {name: kept.get(name) if values is None else values for name, values in own.items()}
    if any(values is None for values in own.values()):
        return NORMALISATION["folder"]
    n_channels, advice = input_of(model)[0], "set model.mean and model.std to those of its training"
    return tuple(channel_numbers(name, values, n_channels, advice) for name, values in own.items())


def normalise(images, mean, std):
    """uint8 (B, 3, H, W) -> normalised float32, the same shape."""
    return image_functional.normalize(images.float() / 255, list(mean), list(std))


def undo_normalisation(images, mean=None, std=None):
    """A normalised tensor (1, 3, H, W) as an array (H, W, 3), clipped to 0..1; ImageNet's statistics for None."""
    imagenet_mean, imagenet_std = NORMALISATION["folder"]
    mean, std = imagenet_mean if mean is None else mean, imagenet_std if std is None else std
    mean, std = (torch.tensor(three_numbers(*one)).view(3, 1, 1) for one in (("mean", mean), ("std", std)))
    return (images[0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()  # (H, W, 3)


# ---- Panels -----------------------------------------------------------------------------------------------


def spread(n, most):
    """At most `most` of the indices 0 .. n - 1, evenly from the first to the last."""
    return sorted({round(i * (n - 1) / max(min(n, most) - 1, 1)) for i in range(min(n, most))})


def proportion(picture):
    """Height over width, kept within what a figure bears."""
    return min(2.5, max(0.4, picture.shape[0] / picture.shape[1]))


def extent_of(picture):
    """The frame in which a coarser map lies over the picture, for imshow."""
    height, width = picture.shape[:2]
    return (-0.5, width - 0.5, height - 0.5, -0.5)
