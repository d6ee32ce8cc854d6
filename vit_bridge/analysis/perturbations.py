"""How predictions change when images are shifted, shuffled, occluded, or given conflicting cues.

shift_consistency                            how often the prediction is unchanged when the image is shifted
shuffle_patches, occlude, accuracy_curve     patches shuffled or hidden, and the correct predictions that remain
cue_choices, shape_bias                      outline against texture

Images are normalised, (B, C, height, width), and on the CPU. Random changes depend on a seed and differ by image.

Shapes:  B images in a batch, N images, C channels, n patches of an image, m of them, P patch side,
         R the maximum shift in pixels.
"""

import torch

from vit_bridge.data.augmentation import crop_and_flip, generator_of
from vit_bridge.errors import InputError, check_choice, check_int
from vit_bridge.runtime import predictions
from vit_model import grid_of, pair

FILLS = ("black", "mean")


def shift_consistency(model, images, reach=4, batch_size=128):
    """Return how often the predicted class stays the same when images are shifted, for each offset.

    Parameters
    ----------
    model : nn.Module
        A classifier.
    images : Tensor, shape (B, C, height, width)
        Normalised images. Pixels beyond the border are filled by mirroring the image, as in training.
    reach : int, optional
        The maximum shift R in pixels.
    batch_size : int, optional
        Number of images in one pass.

    Returns
    -------
    Tensor, shape (2R + 1, 2R + 1)
        Fractions of the images, float64. Entry (R + r, R + c) is for a shift by r rows down and c columns right; the
        middle entry is 1.

    Raises
    ------
    InputError
        If `reach` is below 1 or not below the sides of the images.

    References
    ----------
    Zhang 2019, "Making Convolutional Networks Shift-Invariant Again", Sec. 4. The paper compares two random offsets
    with each other; this function compares each offset with no shift.
    """
    check_int("reach", reach, 1)
    if reach >= min(images.shape[2:]):
        raise InputError(f"reach {reach} shifts images of {images.shape[2]}x{images.shape[3]} pixels out of the frame; "
                         f"expected less than their shorter side")
    images = images.cpu()
    unmoved, whole = predictions(model, images, batch_size), torch.ones(len(images), dtype=torch.long)
    still = torch.zeros(len(images), dtype=torch.bool)
    stays = torch.ones(2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
    for row in range(-reach, reach + 1):
        for column in range(-reach, reach + 1):
            if row or column:
                moved = crop_and_flip(images, -row * whole, -column * whole, still)
                same = predictions(model, moved, batch_size) == unmoved
                stays[row + reach, column + reach] = same.double().mean()
    return stays


def mean_consistency(stays):
    """Return the mean of a `shift_consistency` map over all offsets except zero."""
    return ((stays.sum() - 1) / (stays.numel() - 1)).item()


# ---- Patches ----------------------------------------------------------------------------------------------


def to_patches(images, patch_size):
    """Cut images into patches, row by row: (B, C, height, width) -> (B, n, C, P, P), (rows, columns)."""
    (height, width), (rows, columns) = pair(patch_size, "patch_size"), grid_of(tuple(images.shape[2:]),
                                                                              pair(patch_size, "patch_size"))
    patches = images.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # (B, C, rows, P, columns, P)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2), (rows, columns)  # (B, n, C, P, P)


def from_patches(patches, grid_size):
    """Reassemble the patches of `to_patches`: (B, n, C, P, P) -> (B, C, height, width)."""
    grid = patches.unflatten(1, tuple(grid_size)).permute(0, 3, 1, 4, 2, 5)  # (B, C, rows, P, columns, P)
    return grid.flatten(4, 5).flatten(2, 3)  # (B, C, height, width)


def _random_ranks(n_images, n, seed):
    """Draw a random order of n patches for each image: (N, n), each row a permutation of 0 to n - 1."""
    return torch.rand(n_images, n, generator=generator_of(seed, 4), dtype=torch.float64).argsort(dim=1)


def shuffle_patches(images, patch_size, share=1.0, seed=0, offset=0):
    """Permute a random fraction of the patches of each image, differently for each image.

    Parameters
    ----------
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    patch_size : int or tuple of int
        Side of the patches, or (height, width).
    share : float, optional
        Fraction of the patches that are permuted, from 0 to 1.
    seed : int, optional
        Seed of the random order.
    offset : int, optional
        Pixels by which the grid moves down and right; the image wraps around. With 0, the patches of a ViT with this
        patch size stay intact; with half a patch, the shuffled squares cut through its patches.

    Returns
    -------
    Tensor, shape (B, C, height, width)

    References
    ----------
    Naseer et al. 2021, "Intriguing Properties of Vision Transformers", Sec. 3.3.
    """
    patches, grid = to_patches(images.cpu().roll((-offset, -offset), dims=(2, 3)), patch_size)  # (B, n, C, P, P)
    B, n = patches.shape[:2]
    chosen = _random_ranks(B, n, seed)[:, :_share_of(share, n)]  # (B, m) positions to permute
    order = torch.arange(n).expand(B, n).clone()  # (B, n)
    order.scatter_(1, chosen, chosen.gather(1, _random_ranks(B, chosen.shape[1], seed + 1)))
    moved = from_patches(patches[torch.arange(B)[:, None], order], grid)  # (B, C, height, width)
    return moved.roll((offset, offset), dims=(2, 3))


def occlude(images, patch_size, share, fill="mean", seed=0, preprocessing=None):
    """Hide a random fraction of the patches of each image, different patches in each image.

    Parameters
    ----------
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    patch_size : int or tuple of int
        Side of the patches, or (height, width).
    share : float
        Fraction of the patches to hide, from 0 to 1.
    fill : str, optional
        "mean" fills with the mean of the normalisation, which is 0; "black" fills with pixels of 0.
    seed : int, optional
        Seed of the random choice of patches.
    preprocessing : Preprocessing, optional
        The images' preprocessing; "black" needs it.

    Returns
    -------
    Tensor, shape (B, C, height, width)

    Raises
    ------
    InputError
        If `fill` is unknown, or if it is "black" without a `preprocessing`.

    References
    ----------
    Naseer et al. 2021, "Intriguing Properties of Vision Transformers", Sec. 3.1.
    """
    check_choice("fill", fill, FILLS)
    if fill == "black" and preprocessing is None:
        raise InputError("fill 'black' depends on the normalisation of the images; pass the preprocessing of a loader "
                         "or of a trained model")
    patches, grid = to_patches(images.cpu(), patch_size)  # (B, n, C, P, P)
    B, n = patches.shape[:2]
    hidden = _random_ranks(B, n, seed) < _share_of(share, n)  # (B, n)
    value = torch.zeros(images.shape[1])  # (C)
    if fill == "black":
        value = -torch.tensor(preprocessing.mean) / torch.tensor(preprocessing.std)
    patches = torch.where(hidden[:, :, None, None, None], value.to(patches)[:, None, None], patches)
    return from_patches(patches, grid)  # (B, C, height, width)


def _share_of(share, n):
    """Return the number of patches for a fraction of n. Raises InputError unless it is from 0 to 1."""
    if not 0 <= share <= 1:
        raise InputError(f"share {share} is out of range; expected 0 to 1")
    return round(share * n)


def accuracy_curve(model, images, labels, change, shares):
    """Return the number of correct predictions after `change(images, share=s)`, for each share s.

    Parameters
    ----------
    model : nn.Module
        A classifier.
    images : Tensor, shape (N, C, height, width)
        Normalised images.
    labels : Tensor, shape (N,)
        Their classes.
    change : callable
        For example `occlude`, with its other arguments fixed by functools.partial.
    shares : sequence of float
        Fractions of the patches, from 0 to 1.

    Returns
    -------
    list of int
    """
    return [int((predictions(model, change(images, share=share)) == labels.cpu()).sum()) for share in shares]


# ---- Outline against texture ------------------------------------------------------------------------------


def cue_choices(predicted, outlines, textures):
    """Count the predictions that follow the outline, the texture, or neither.

    The two cues of each image must belong to different classes.

    Parameters
    ----------
    predicted : Tensor, shape (N,)
        Predicted classes.
    outlines, textures : Tensor, shape (N,)
        Class of the outline and class of the texture of each image.

    Returns
    -------
    dict
        Counts under "outline", "texture" and "neither".

    Raises
    ------
    InputError
        If outline and texture agree in an image.
    """
    if (outlines == textures).any():
        raise InputError(f"outline and texture agree in {int((outlines == textures).sum())} images; use images whose "
                         f"cues belong to different classes")
    by_outline, by_texture = int((predicted == outlines).sum()), int((predicted == textures).sum())
    return dict(outline=by_outline, texture=by_texture, neither=len(predicted) - by_outline - by_texture)


def shape_bias(choices):
    """Return the fraction of outline predictions among those that follow either cue; NaN if there are none.

    References
    ----------
    Geirhos et al. 2019, "ImageNet-trained CNNs are biased towards texture".
    """
    either = choices["outline"] + choices["texture"]
    return choices["outline"] / either if either else float("nan")
