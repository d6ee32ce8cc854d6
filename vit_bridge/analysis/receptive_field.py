"""Which pixels one unit of a model sees.

Shapes:  B images, C channels, D width, k side of a kernel."""

import torch
from torch import nn

from vit_bridge.analysis.capture import differentiable, watch_layer
from vit_bridge.errors import InputError
from vit_bridge.models.adapters import adapt, check_depth
from vit_bridge.runtime import tokens_of, unwrapped
from vit_model import pair


@differentiable()
def receptive_field(model, images, depth=None):
    """The effective receptive field of the centre unit: the weight of each pixel, (height, width), sum 1, float64.

    The unit is the place (rows // 2, columns // 2) of the feature map, or of the grid of patch tokens, after
    `depth` blocks (ViT, hybrid) or stages (ConvNet); 0: after the patch embedding or the stem; None: the last.
    Its channels are summed, and of the gradient of that sum to the input pixels the absolute value is averaged
    over images and colours: Luo et al. 2016, "Understanding the Effective Receptive Field".

    images: normalised, (B, C, height, width); a ViT is ours, or timm's, transformers' or torchvision's. Raises
    InputError for images that the model does not take, for a depth out of range, and where the gradient is zero
    everywhere.
    """
    model = unwrapped(model)
    layer = adapt(model).layers[check_depth(model, depth)]
    adapt(model).check_images(images)
    pixels, features, _ = watch_layer(model, layer, images, getattr(model, "forward_features", None))
    features = tokens_of(features)
    if features.ndim == 3:
        grid = adapt(model).grid(images)
        patches = features[:, -grid[0] * grid[1]:]  # (B, n_patches, D), without CLS and registers
        features = patches.transpose(1, 2).unflatten(2, grid)  # (B, D, rows, columns)
    rows, columns = features.shape[2:]
    unit = features[:, :, rows // 2, columns // 2].sum()
    gradient, = torch.autograd.grad(unit, pixels)  # (B, C, height, width)
    field = gradient.cpu().double().abs().mean(dim=(0, 1))  # (height, width)
    if not field.sum() > 0:
        raise InputError("the gradient of the centre unit is zero at every pixel, so it has no receptive field "
                         "on these images; give other images, or another depth")
    return field / field.sum()


def theoretical_receptive_field(model, depth=None):
    """(height, width) in pixels of the window that can reach one unit, at a depth as in receptive_field.

    Convolutions and pooling: r + (k - 1) * j for each kernel k at total stride j (Araujo et al. 2019, "Computing
    Receptive Fields of Convolutional Neural Networks", Eq. 2); it may be larger than the image. After an
    attention block: the whole image.
    """
    depth = check_depth(model, depth)
    adapter = adapt(model)
    if depth and adapter.attends:
        return adapter.img_size
    return tuple(_walk_kernels(model, depth, axis)[0] for axis in (0, 1))


def unit_centre(model, img_size, depth=None):
    """(row, column) of the pixel below the middle of the unit that receptive_field takes; pixels count from 0.

    It may lie between two pixels: the middle of a patch of 4 pixels is 1.5 pixels from its first.
    """
    centre = []
    for axis, side in enumerate(pair(img_size)):
        depth, n_units = check_depth(model, depth), side
        for kernel, step, padding in _kernels_of(model, depth, axis):
            n_units = (n_units + 2 * padding - kernel) // step + 1
        _, stride, first = _walk_kernels(model, depth, axis)
        centre.append(first + n_units // 2 * stride)
    return tuple(centre)


def _walk_kernels(model, depth, axis):
    """Along one axis (0: height, 1: width), in pixels: window of one unit, step between units, first middle."""
    window, stride, first = 1, 1, 0.0
    for kernel, step, padding in _kernels_of(model, depth, axis):
        window += (kernel - 1) * stride
        first += ((kernel - 1) / 2 - padding) * stride
        stride *= step
    return window, stride, first


def _kernels_of(model, depth, axis):
    """(size, step, padding) along one axis of each convolution and pooling up to a depth, in their order.

    A residual block is walked along its main path; its shortcut has the same stride and no larger window.
    """
    for layer in adapt(model).layers[:depth + 1]:
        for name, module in layer.named_modules():
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d)) and "shortcut" not in name:
                yield tuple(size[axis] if isinstance(size, tuple) else size
                            for size in (module.kernel_size, module.stride, module.padding))


def radius_holding(field, share, centre=None):
    """The smallest radius in pixels around the centre within which `share` of the field's mass lies.

    field   (height, width), not negative, as from receptive_field
    share   fraction of the mass, in (0, 1]
    centre  (row, column), as from unit_centre; None: the middle of the image

    Distances are between middles of pixels, so the field of a single pixel has radius 0.
    Raises InputError for a share out of range.
    """
    if not 0 < share <= 1:
        raise InputError(f"share {share} is out of range; expected 0 < share <= 1, such as 0.5 for half the mass")
    height, width = field.shape
    row, column = centre or ((height - 1) / 2, (width - 1) / 2)
    rows = torch.arange(height, dtype=torch.float64) - row
    columns = torch.arange(width, dtype=torch.float64) - column
    distances, order = torch.hypot(rows[:, None], columns[None, :]).flatten().sort()  # (height * width)
    mass = field.double().flatten()[order].cumsum(dim=0)  # (height * width)
    enough = mass >= share * mass[-1] * (1 - 1e-12)  # the sum is rounded
    return distances[enough.nonzero()[0, 0]].item()


def untrained_copy(model):
    """A new model of the same configuration, from seed 0, with the same normalisation; torch's own random
    state stays as it is."""
    model = unwrapped(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        fresh = type(model)(**vars(model.config))
    fresh.preprocessing = adapt(model).preprocessing
    return fresh.eval()
