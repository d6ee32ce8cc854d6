"""Fill hidden pixels without a network: the controls for the reconstructions of a masked autoencoder.

    fill_with_mean          the mean colour of the visible pixels
    fill_by_interpolation   the smoothest surface through the visible pixels

Shapes:  B images, C channels, H, W height and width.
"""

import torch

from vit_bridge.errors import InputError


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
