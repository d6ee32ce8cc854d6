"""Reconstructions of hidden patches: by a masked autoencoder, and by two controls that use no network.

    reconstructions         an image, its visible patches, and the hidden ones filled in three ways
    reconstruction_errors   the mean squared error of each way
    fill_with_mean          the mean colour of the visible pixels
    fill_by_interpolation   the smoothest surface through the visible pixels

Shapes:  B images, C channels, H, W height and width, N patches.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vit_bridge.data.augmentation import generator_of
from vit_bridge.errors import InputError
from vit_bridge.models.protocol import ask, class_name
from vit_bridge.runtime import device_of, evaluating, to_model, unwrapped
from vit_model import grid_of

INTERPOLATION, MEAN, BORROWED = "interpolation", "mean colour", "borrowed mean"  # the controls


@dataclass
class Reconstructions:
    """Images whose hidden patches were filled.

    Attributes
    ----------
    images : Tensor, shape (B, C, H, W)
        The normalised images.
    hidden : Tensor of bool, shape (B, H, W)
        Which pixels were hidden.
    filled : dict
        {"model", "interpolation", "mean colour", ...: images (B, C, H, W)}; visible pixels are unchanged. If the model
        borrows, there is also "borrowed mean": each hidden patch has its own true mean, and nothing else.
    borrows : bool
        Whether the model predicts normalised pixels, so that its patches have the mean and the standard deviation of
        the hidden ones, which it has not seen.
    """

    images: torch.Tensor
    hidden: torch.Tensor
    filled: dict
    borrows: bool


@torch.no_grad()
def reconstructions(model, images, mask_ratio=None, seed=0):
    """Hide patches of images and fill them with a MaskedAutoencoder and with the controls.

    Parameters
    ----------
    model : MaskedAutoencoder
    images : Tensor, shape (B, C, H, W)
        Normalised images.
    mask_ratio : float, optional
        Share of the patches to hide. By default the model's.
    seed : int, optional
        The i-th image has the i-th mask of a sequence that depends only on the seed.

    Returns
    -------
    Reconstructions
        On the CPU.

    Raises
    ------
    InputError
        If the model does not reconstruct images, or if the ratio hides nothing or everything.
    """
    model = unwrapped(model)
    if mask_ratio is not None and not 0 < mask_ratio < 1:
        raise InputError(f"mask_ratio {mask_ratio!r} must lie between 0 (hide no patch) and 1 (hide all patches)")
    if not ask(model, "masks"):
        raise InputError(f"a {class_name(model)} reconstructs nothing, because it has no decoder; train a "
                         f"MaskedAutoencoder with `python train_vit.py --pretrain mae`, or load a file that holds one")
    patch_size = model.patch_embed.patch_size
    grid_size = grid_of(tuple(images.shape[2:]), patch_size)
    noise = torch.stack([torch.rand(grid_size[0] * grid_size[1], generator=generator_of(seed, i))
                         for i in range(len(images))])  # (B, N)
    with evaluating(model):
        painted, mask = model.reconstruct(to_model(images, model), noise.to(device_of(model)), mask_ratio)
    hidden = (mask > 0).cpu().unflatten(1, grid_size)  # (B, rows, columns)
    hidden = hidden.repeat_interleave(patch_size[0], 1).repeat_interleave(patch_size[1], 2)  # (B, H, W)
    images = images.float().cpu()
    filled = dict(model=painted.float().cpu(), **{INTERPOLATION: fill_by_interpolation(images, hidden),
                                                  MEAN: fill_with_mean(images, hidden)})
    borrows = model.config.norm_pix_loss
    if borrows:
        means = F.avg_pool2d(images, patch_size).mean(dim=1, keepdim=True)  # (B, 1, rows, columns), of all channels
        means = means.repeat_interleave(patch_size[0], 2).repeat_interleave(patch_size[1], 3)  # (B, 1, H, W)
        filled[BORROWED] = torch.where(hidden[:, None], means, images)
    return Reconstructions(images, hidden, filled, borrows)


def reconstruction_errors(model, images, mask_ratio=None, seed=0):
    """Return {"model", "interpolation", "mean colour", ...: mean squared error of the hidden pixels, from 0 to 1}.

    The arguments are those of `reconstructions`. The errors are those of pixels from 0 to 1 if the model's
    preprocessing has a std, and of the normalised pixels otherwise.
    """
    found = reconstructions(model, images, mask_ratio, seed)
    shown = unwrapped(model).preprocessing
    scale = 1.0 if shown is None else torch.tensor(shown.std)[:, None, None]  # (C, 1, 1)
    hidden = found.hidden[:, None].expand_as(found.images)
    return {name: ((filled - found.images) * scale)[hidden].square().mean().item()
            for name, filled in found.filled.items()}


def fill_with_mean(images, hidden):
    """Return the images with each hidden pixel replaced by the mean of its image's visible pixels.

    Parameters
    ----------
    images : Tensor, shape (B, C, H, W)
    hidden : Tensor of bool, shape (B, H, W)

    Raises
    ------
    InputError
        If the shapes do not fit, or if all pixels of an image are hidden.
    """
    hidden = _checked(images, hidden)  # (B, 1, H, W)
    visible = (~hidden).to(images.dtype)
    mean = (images * visible).sum(dim=(2, 3), keepdim=True) / visible.sum(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    return torch.where(hidden, mean, images)


@torch.no_grad()
def fill_by_interpolation(images, hidden, tolerance=1e-4, max_rounds=2000):
    """Return the images with the hidden pixels interpolated: each is the mean of its neighbours.

    This is the discrete Laplace equation with the visible pixels as its boundary, solved by conjugate gradients. It
    reproduces flat and linearly rising colours exactly, and nothing else.

    Parameters
    ----------
    images : Tensor, shape (B, C, H, W)
    hidden : Tensor of bool, shape (B, H, W)
    tolerance : float, optional
        Stop when the residual is this small, relative to that of the first guess.
    max_rounds : int, optional
        Stop after this many rounds in any case.

    Raises
    ------
    InputError
        As `fill_with_mean`.
    """
    filled, hidden = fill_with_mean(images, hidden), _checked(images, hidden)
    residual = -_laplacian(filled) * hidden  # what is left to solve: A x = residual, with x = 0 where visible
    change, direction, size = torch.zeros_like(filled), residual.clone(), _squared(residual)
    first = size.clone()  # (B, C, 1, 1)
    for _ in range(max_rounds):
        if (size <= tolerance**2 * first).all():
            break
        product = _laplacian(direction) * hidden
        step = size / (direction * product).sum(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(images.dtype).tiny)
        change, residual = change + step * direction, residual - step * product
        before, size = size, _squared(residual)
        direction = residual + size / before.clamp(min=torch.finfo(images.dtype).tiny) * direction
    return filled + change


def _laplacian(x):
    """Return the sum of the differences of each pixel from its neighbours inside the image: (B, C, H, W)."""
    total = torch.zeros_like(x)
    for dim in (2, 3):
        difference = x.diff(dim=dim)
        n = x.shape[dim] - 1
        total.narrow(dim, 0, n).sub_(difference)
        total.narrow(dim, 1, n).add_(difference)
    return total


def _squared(x):
    return x.square().sum(dim=(2, 3), keepdim=True)


def _checked(images, hidden):
    """Return hidden as (B, 1, H, W) on the images' device."""
    if hidden.dtype != torch.bool or hidden.shape != images.shape[:1] + images.shape[2:]:
        raise InputError(f"hidden is {hidden.dtype} {tuple(hidden.shape)}; expected torch.bool "
                         f"{(len(images), *images.shape[2:])} for images of {tuple(images.shape)}")
    if hidden.flatten(1).all(dim=1).any():
        raise InputError("all pixels of an image are hidden, so nothing is left to fill them from; show at least one")
    return hidden[:, None].to(images.device)
