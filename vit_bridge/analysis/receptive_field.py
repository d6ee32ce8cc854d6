"""Which pixels one unit of a model sees.

receptive_field, theoretical_receptive_field     measured by gradients, and derived from kernels
radius_holding, unit_centre, untrained_copy     helpers for figures and comparisons

Shapes:  B images, C channels, D width, k side of a kernel.
"""

import torch
from torch import nn

from vit_bridge.analysis.capture import differentiable, watch_layer
from vit_bridge.errors import InputError
from vit_bridge.models.adapters import adapt, check_depth
from vit_bridge.runtime import unwrapped
from vit_model import pair


@differentiable()
def receptive_field(model, images, depth=None):
    """Return the effective receptive field of the centre unit: the weight of each pixel.

    Parameters
    ----------
    model : nn.Module
        One of our models, or a ViT or Swin Transformer from timm, transformers or torchvision.
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    depth : int, optional
        Number of blocks (ViT, hybrid) or stages (CNN, Swin) before the unit; 0 is after the patch embedding or the
        stem.
        By default after the last block or stage.

    Returns
    -------
    Tensor, shape (height, width)
        Weights that sum to one, float64.

    Raises
    ------
    InputError
        If the model does not accept these images, if `depth` is out of range, or if the gradient is zero everywhere.

    Notes
    -----
    The unit is at position (rows // 2, columns // 2) of the feature map or of the grid of patch tokens. Its channels
    are summed with `channel_weights`, and the absolute gradient of the sum with respect to the pixels is averaged over
    images and colours.

    References
    ----------
    Luo et al. 2016, "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks".
    """
    model = unwrapped(model)
    adapter, depth = adapt(model), check_depth(model, depth)
    adapter.check_images(images)
    pixels, features, _ = watch_layer(model, adapter.layers[depth], images, getattr(model, "forward_features", None))
    features = adapter.as_map(features, images, depth)  # (B, D, rows, columns)
    rows, columns = features.shape[2:]
    unit = features[:, :, rows // 2, columns // 2]  # (B, D)
    gradient, = torch.autograd.grad((unit * channel_weights(unit)).sum(), pixels)  # (B, C, height, width)
    field = gradient.cpu().double().abs().mean(dim=(0, 1))  # (height, width)
    if not field.sum() > 0:
        raise InputError("the gradient of the centre unit is zero at every pixel, so its receptive field cannot be "
                         "measured on these images; use different images or a different depth")
    return field / field.sum()


def channel_weights(features):
    """Return weights of D channels, (D), normal and always the same, for features (..., D).

    With equal weights the sum of the channels after a LayerNorm would be constant, and its gradient zero.
    """
    weights = torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(0))
    return weights.to(features)


def theoretical_receptive_field(model, depth=None):
    """Return (height, width) in pixels of the window that can influence a unit.

    Parameters
    ----------
    model : nn.Module
        One of our models.
    depth : int, optional
        As in `receptive_field`.

    Notes
    -----
    A convolution or pooling with kernel k at total stride j enlarges the window by (k - 1) j; the window may exceed the
    image. After an attention block, the window is the whole image. In a Swin Transformer it depends on the position of
    the unit in its window; it is that of the unit in the centre of an image of the model's size, as in
    `receptive_field`.

    References
    ----------
    Araujo et al. 2019, "Computing Receptive Fields of Convolutional Neural Networks", Eq. 2.
    """
    depth = check_depth(model, depth)
    adapter = adapt(model)
    if adapter.windowed:
        return tuple(_reach_of_windows(adapter, depth, axis) for axis in (0, 1))
    if depth and adapter.attends:
        return adapter.img_size
    return tuple(_walk_kernels(model, depth, axis)[0] for axis in (0, 1))


def unit_centre(model, img_size, depth=None):
    """Return (row, column) of the pixel at the centre of the unit that `receptive_field` measures.

    Pixels count from 0. The centre may lie between two pixels: in a 4-pixel patch, it is 1.5 pixels from the first.
    """
    centre, adapter = [], adapt(model)
    if adapter.windowed:
        size = adapter.patch_size_in(max(check_depth(model, depth) - 1, 0))
        return tuple((-(-side // length) // 2 + 0.5) * length - 0.5 for side, length in zip(pair(img_size), size,
                                                                                            strict=True))
    for axis, side in enumerate(pair(img_size)):
        depth, n_units = check_depth(model, depth), side
        for kernel, step, padding in _kernels_of(model, depth, axis):
            n_units = (n_units + 2 * padding - kernel) // step + 1
        _, stride, first = _walk_kernels(model, depth, axis)
        centre.append(first + n_units // 2 * stride)
    return tuple(centre)


def _reach_of_windows(adapter, depth, axis):
    """Return how many pixels along one axis can influence the centre unit after some stages of a Swin Transformer.

    From the last block to the first, the reach grows to the ends of the windows that it touches.
    """
    sides = [-(-adapter.img_size[axis] // adapter.patch_size[axis] // 2**stage) for stage in range(max(depth, 1))]
    first = last = sides[-1] // 2
    for stage in reversed(range(depth)):
        for block in reversed(adapter.stages[stage]):
            grid = tuple(-(-side // patch // 2**stage) for side, patch in zip(adapter.img_size, adapter.patch_size,
                                                                              strict=True))
            window, shift = (pair[axis] for pair in adapter.window_of(block, grid))
            first = max(0, shift + (first - shift) // window * window)
            last = min(sides[stage] - 1, shift + ((last - shift) // window + 1) * window - 1)
        if stage:
            first, last = 2 * first, min(2 * last + 1, sides[stage - 1] - 1)
    return (last - first + 1) * adapter.patch_size[axis]


def _walk_kernels(model, depth, axis):
    """Return (window of one unit, step between units, first centre) in pixels along one axis."""
    window, stride, first = 1, 1, 0.0
    for kernel, step, padding in _kernels_of(model, depth, axis):
        window += (kernel - 1) * stride
        first += ((kernel - 1) / 2 - padding) * stride
        stride *= step
    return window, stride, first


def _kernels_of(model, depth, axis):
    """Yield (size, step, padding) along one axis of each convolution and pooling up to a depth, in order.

    Only the main path of a residual block counts; its shortcut has the same stride and no larger window.
    """
    for layer in adapt(model).layers[:depth + 1]:
        for name, module in layer.named_modules():
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d)) and "shortcut" not in name:
                yield tuple(size[axis] if isinstance(size, tuple) else size
                            for size in (module.kernel_size, module.stride, module.padding))


def radius_holding(field, share, centre=None):
    """Return the smallest radius in pixels around the centre that holds a share of the field's mass.

    Parameters
    ----------
    field : Tensor, shape (height, width)
        Non-negative weights, as from `receptive_field`.
    share : float
        Fraction of the mass, in (0, 1].
    centre : tuple of float, optional
        (row, column), as from `unit_centre`. The middle of the image by default.

    Raises
    ------
    InputError
        If `share` is out of range.

    Notes
    -----
    Distances are measured between the centres of pixels, so the field of a single pixel has radius 0.
    """
    if not 0 < share <= 1:
        raise InputError(f"share {share} is out of range; expected 0 < share <= 1, such as 0.5 for half the mass")
    height, width = field.shape
    row, column = centre or ((height - 1) / 2, (width - 1) / 2)
    rows = torch.arange(height, dtype=torch.float64) - row
    columns = torch.arange(width, dtype=torch.float64) - column
    distances, order = torch.hypot(rows[:, None], columns[None, :]).flatten().sort()  # (height * width)
    mass = field.double().flatten()[order].cumsum(dim=0)  # (height * width)
    enough = mass >= share * mass[-1] * (1 - 1e-12)  # allow for rounding of the sum
    return distances[enough.nonzero()[0, 0]].item()


def untrained_copy(model):
    """Return a freshly initialised model (seed 0) with the same configuration and preprocessing.

    The state of torch's global random generator does not change.
    """
    model = unwrapped(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        fresh = type(model)(**vars(model.config))
    fresh.preprocessing = adapt(model).preprocessing
    return fresh.eval()
