"""How predictions change when images change: shifted, shuffled, hidden, or with cues at odds.

    shift_consistency                           how often the prediction stays when the image moves by some pixels
    shuffle_patches, occlude, accuracy_curve    patches shuffled or hidden, and how many predictions stay correct
    cue_choices, shape_bias                     outline against texture

Each change is drawn from a seed, anew for each image. Images are normalised, (B, C, height, width), and on the CPU.

Shapes:  B images in a batch, N images, C channels, n patches of an image, m of them, P patch side,
         R the largest shift in pixels.
"""

import torch

from vit_bridge.data.augmentation import crop_and_flip, generator_of
from vit_bridge.errors import InputError, check_choice, check_int
from vit_bridge.runtime import predictions
from vit_model import grid_of, pair

FILLS = ("black", "mean")


def shift_consistency(model, images, reach=4, batch_size=128):
    """The fraction of images whose predicted class stays when they are moved, by offset: (2R + 1, 2R + 1) float64.

    Row and column R + r, R + c hold the offset of r rows down and c columns right; the middle is 1. What comes in at
    the border is mirrored, as in training. As in Zhang 2019, "Making Convolutional Networks Shift-Invariant Again",
    Sec. 4, except that each offset is compared with no shift, not two random ones with each other. Raises
    InputError for a reach below 1 or not below the side.
    """
    check_int("reach", reach, 1)
    if reach >= min(images.shape[2:]):
        raise InputError(f"reach {reach} moves images of {images.shape[2]}x{images.shape[3]} pixels out of sight; "
                         f"expected less than their side")
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
    """The mean of shift_consistency's map over all offsets but none at all."""
    return ((stays.sum() - 1) / (stays.numel() - 1)).item()


# ---- Patches ----------------------------------------------------------------------------------------------


def to_patches(images, patch_size):
    """(B, C, height, width) -> (B, n, C, P, P), row by row; and the (rows, columns) of the grid."""
    (height, width), (rows, columns) = pair(patch_size, "patch_size"), grid_of(tuple(images.shape[2:]),
                                                                              pair(patch_size, "patch_size"))
    patches = images.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # (B, C, rows, P, columns, P)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2), (rows, columns)  # (B, n, C, P, P)


def from_patches(patches, grid_size):
    """The images that to_patches cut: (B, n, C, P, P) -> (B, C, height, width)."""
    grid = patches.unflatten(1, tuple(grid_size)).permute(0, 3, 1, 4, 2, 5)  # (B, C, rows, P, columns, P)
    return grid.flatten(4, 5).flatten(2, 3)  # (B, C, height, width)


def _random_ranks(n_images, n, seed):
    """For each image a fresh random order of n places: (N, n), each row the numbers 0 to n - 1."""
    return torch.rand(n_images, n, generator=generator_of(seed, 4), dtype=torch.float64).argsort(dim=1)


def shuffle_patches(images, patch_size, share=1.0, seed=0, offset=0):
    """Images in which a random fraction `share` of the patches has been permuted, each image in its own way.
    Naseer et al. 2021, "Intriguing Properties of Vision Transformers", Sec. 3.3.

    offset: pixels by which the grid is moved down and right; the image wraps around. With 0 a ViT with this patch size
    keeps its tokens whole; with half a patch, the permuted squares cut through its patches.
    """
    patches, grid = to_patches(images.cpu().roll((-offset, -offset), dims=(2, 3)), patch_size)  # (B, n, C, P, P)
    B, n = patches.shape[:2]
    chosen = _random_ranks(B, n, seed)[:, :_share_of(share, n)]  # (B, m) places that take part
    order = torch.arange(n).expand(B, n).clone()  # (B, n)
    order.scatter_(1, chosen, chosen.gather(1, _random_ranks(B, chosen.shape[1], seed + 1)))
    moved = from_patches(patches[torch.arange(B)[:, None], order], grid)  # (B, C, height, width)
    return moved.roll((offset, offset), dims=(2, 3))


def occlude(images, patch_size, share, fill="mean", seed=0, preprocessing=None):
    """Images in which a random fraction `share` of the patches is hidden, other ones in each image.

    fill   "mean": the mean of the normalisation, 0 in normalised images; "black": pixels of 0, which needs the
           preprocessing of the images

    Naseer et al. 2021, Sec. 3.1. Raises InputError for an unknown fill.
    """
    check_choice("fill", fill, FILLS)
    if fill == "black" and preprocessing is None:
        raise InputError("fill 'black' is another number in every normalisation; give the preprocessing of a loader or "
                         "of a trained model")
    patches, grid = to_patches(images.cpu(), patch_size)  # (B, n, C, P, P)
    B, n = patches.shape[:2]
    hidden = _random_ranks(B, n, seed) < _share_of(share, n)  # (B, n)
    value = torch.zeros(images.shape[1])  # (C)
    if fill == "black":
        value = -torch.tensor(preprocessing.mean) / torch.tensor(preprocessing.std)
    patches = torch.where(hidden[:, :, None, None, None], value.to(patches)[:, None, None], patches)
    return from_patches(patches, grid)  # (B, C, height, width)


def _share_of(share, n):
    """How many of n patches a share is. Raises InputError unless it is from 0 to 1."""
    if not 0 <= share <= 1:
        raise InputError(f"share {share} is out of range; expected 0 to 1")
    return round(share * n)


def accuracy_curve(model, images, labels, change, shares):
    """How many predictions are correct after `change(images, share=s)`, for each share s: a list of counts."""
    return [int((predictions(model, change(images, share=share)) == labels.cpu()).sum()) for share in shares]


# ---- Outline against texture ------------------------------------------------------------------------------


def cue_choices(answers, outlines, textures):
    """How many predictions are the class of the outline, that of the texture, and neither, for images whose cues are of
    different classes. answers: the predicted classes; answers, outlines, textures: class numbers (N,). Raises
    InputError where the two cues agree in an image."""
    if (outlines == textures).any():
        raise InputError(f"outline and texture agree in {int((outlines == textures).sum())} images; expected images in "
                         f"which they are of different classes")
    by_outline, by_texture = int((answers == outlines).sum()), int((answers == textures).sum())
    return dict(outline=by_outline, texture=by_texture, neither=len(answers) - by_outline - by_texture)


def shape_bias(choices):
    """The fraction by outline of the predictions by either cue, from cue_choices; NaN where there are none. Geirhos
    et al. 2019, "ImageNet-trained CNNs are biased towards texture"."""
    either = choices["outline"] + choices["texture"]
    return choices["outline"] / either if either else float("nan")
