"""Attention within windows: what the blocks of a Swin Transformer attend to.

capture_windows     one forward pass that keeps the attention of each block, as a Windowed
window_rows, window_distances     the attention of one patch in every block, and how far each head looks

Shapes:  B images, C channels, L blocks, H heads, h, w height and width of a map in tokens, N = h w tokens, W windows,
         M tokens of a window.
"""

import math
from dataclasses import dataclass

import torch

from vit_bridge.analysis.capture import AttentionCapture, check_finite_numbers, check_same_logits
from vit_bridge.errors import InputError, check_index
from vit_bridge.models.adapters import adapt
from vit_bridge.models.protocol import class_name
from vit_bridge.models.swin import spread_windows, window_places
from vit_bridge.runtime import at_least_float32, evaluating, logits_of, to_model, unwrapped


@dataclass
class Windowed:
    """The attention of one block.

    Attributes
    ----------
    maps : Tensor, shape (B, W, H, M, M)
        Rows are queries and sum to one. Places outside the map, which only pad it, are included.
    size : (int, int)
        (h, w).
    window, shift : (int, int)
        Height and width of the windows, and by how many tokens they are shifted.
    stage : int
        The stage of the block, from 0.
    token_size : (int, int)
        Height and width of a token, in pixels.
    pads_first : bool
        As in models.swin.window_places.
    """

    maps: torch.Tensor
    size: tuple
    window: tuple
    shift: tuple
    stage: int
    token_size: tuple
    pads_first: bool = True

    @property
    def places(self):
        """The token of the map at each place of each window, (W, M), row by row; N for padding."""
        return window_places(self.size, self.window, self.shift, self.pads_first)

    def whole(self):
        """Return the attention between all tokens of the map, (B, H, N, N); it is 0 outside a token's window."""
        return spread_windows(self.maps, self.window, self.shift, self.size, self.pads_first)

    def row(self, place):
        """Return the attention of the token at (row, column) to all tokens, (B, H, N)."""
        places, n, token = self.places, self.size[0] * self.size[1], place[0] * self.size[1] + place[1]
        window, i = (places == token).nonzero()[0].tolist()
        row = self.maps.new_zeros(len(self.maps), self.maps.shape[2], n + 1)
        row[:, :, places[window]] = self.maps[:, window, :, i]
        return row[:, :, :n]

    def distances(self):
        """Return how far the tokens look in each head, in pixels, (B, H): the mean of sum_j A_ij distance_ij.

        Padding is left out, and the weights of each token on the others are rescaled to sum to one.
        """
        places, n, (_, columns) = self.places, self.size[0] * self.size[1], self.size
        inside = (places < n).double()  # (W, M)
        centres = torch.stack([places // columns * self.token_size[0], places % columns * self.token_size[1]],
                              dim=2).double()  # (W, M, 2), in pixels
        apart = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")  # (W, M, M)
        weights = self.maps.double() * inside[:, None, None]  # (B, W, H, M, M)
        totals = weights.sum(dim=4).clamp(min=1e-300)  # 0 in the rows of padding that attends to padding alone
        means = (weights * apart[:, None]).sum(dim=4) / totals  # (B, W, H, M)
        return (means * inside[:, None]).sum(dim=(1, 3)) / n


def capture_windows(model, images, keep=None):
    """Run a Swin Transformer in eval mode and return what each block attends to.

    Parameters
    ----------
    model : nn.Module
        A Swin Transformer, ours or from timm, transformers or torchvision.
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    keep : callable, optional
        Windowed -> what to keep of a block. By default the whole Windowed.

    Returns
    -------
    blocks : list
        For each of the L blocks, what `keep` returned.
    logits : Tensor, shape (B, K)

    Raises
    ------
    InputError
        If the model is not a Swin Transformer, if it does not accept these images, or if it computes its attention in
        a way that cannot be captured.
    """
    model = unwrapped(model)
    adapter = adapt_windows(model)
    adapter.check_images(images)
    blocks, stages, kept = adapter.blocks, adapter.stage_of_block, []

    def note(index, attended):
        if index >= len(blocks):
            return
        size = adapter.grid_in(images, stages[index])
        window, shift = (tuple(pair) for pair in adapter.window_of(blocks[index], size))
        n_windows = math.prod(-(-side // length) for side, length in zip(size, window, strict=True))
        maps, length = at_least_float32(attended.maps.detach()).cpu(), math.prod(window)
        if maps.shape[-1] != length or maps.shape[0] * maps.shape[1] % (len(images) * n_windows):
            return
        maps = maps.reshape(len(images), n_windows, -1, length, length)  # from (B, W H, M, M), or (B W, H, M, M)
        one = Windowed(maps, size, window, shift, stages[index], adapter.patch_size_in(stages[index]),
                       adapter.pads_first)
        kept.append(one if keep is None else keep(one))

    recorder = AttentionCapture(keep=note, least=1)
    with torch.no_grad(), evaluating(model):
        with recorder:
            logits = logits_of(model(to_model(images, model)))
        check_finite_numbers(model, logits)
        if len(kept) != len(blocks):
            raise InputError(f"this {class_name(model)} computed {len(recorder.kept)} attention maps; expected one for "
                             f"each of its {len(blocks)} blocks, over the tokens of its windows")
    check_same_logits(model, images[:1], logits[:1])
    return kept, logits


def adapt_windows(model):
    """Return the WindowAdapter of a model. Raises InputError if it is not a Swin Transformer."""
    adapter = adapt(model)
    if not adapter.windowed:
        raise InputError(f"a {class_name(model)} does not attend within windows; use a Swin Transformer")
    return adapter


def window_rows(model, images, patch):
    """Return the attention of one patch in every block: L tensors (B, H, h, w), one for each block.

    Parameters
    ----------
    model, images
        As for capture_windows.
    patch : (int, int)
        (row, column) of a patch of the first stage, from 0, or from the end if negative. In later stages it is the
        token that holds this patch.

    Raises
    ------
    InputError
        As capture_windows, and if the patch does not exist.
    """
    adapter = adapt_windows(model)
    adapter.check_images(images)
    patch = check_patch(patch, adapter.grid(images))

    def keep(one):
        return one.row([place >> one.stage for place in patch]).unflatten(2, one.size)

    return capture_windows(model, images, keep)[0]


def check_patch(patch, grid):
    """Return (row, column) of a patch, from 0. Raises InputError if it does not exist."""
    if not isinstance(patch, (tuple, list)) or len(patch) != 2:
        raise InputError(f"patch {patch!r} is not a position; expected (row, column), such as (0, {grid[1] - 1})")
    return tuple(check_index("patch", place, n) for place, n in zip(patch, grid, strict=True))


def window_distances(model, images):
    """Return how far each head looks, averaged over images: (L, H) in pixels, float64, H of the last stage.

    Early stages have fewer heads; the others are NaN. The distance is between the centres of tokens, whose size doubles
    in each stage.
    """
    found = capture_windows(model, images, Windowed.distances)[0]  # L tensors (B, heads of the block)
    most = max(one.shape[1] for one in found)
    return torch.stack([torch.nn.functional.pad(one.mean(dim=0), (0, most - one.shape[1]), value=torch.nan)
                        for one in found])
