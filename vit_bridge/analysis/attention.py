"""Where tokens look, how far they look, and how similar their position embeddings are.

attention_rows, mean_distances     run a model on images; only one block's maps are in memory at a time
rows_by_block, window_groups       the rows of each block, also of a Swin; which of its tokens attend to each other
token_similarity                   how similar the class token and the distillation token are
select_attention, cls_attention_grid, attention_distance     work on attention maps that you already have
position_similarity     compares the position embeddings of the patches

Shapes:  B images, L blocks, H heads, N tokens (CLS, registers, patches), n patches, D width, h, w height and width of a
         map in tokens, W windows, M tokens of a window.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from vit_bridge.analysis.capture import capture
from vit_bridge.analysis.windows import check_patch, window_distances, window_rows
from vit_bridge.errors import InputError, check_index
from vit_bridge.models.adapters import adapt, adapt_attention, adapt_vit, reading_weights
from vit_bridge.models.protocol import class_name
from vit_bridge.models.swin import shift_mask
from vit_bridge.runtime import at_least_float32
from vit_model import grid_of, pair

PART = 2**22  # maximum number of attention weights of one head, over all images that are processed together


def attention_rows(model, images, patch=None):
    """Return the attention that the classifier head's input pays to every token, in all blocks and heads.

    If the classifier head reads CLS, the result is the row of CLS. If it reads the mean of the patches, the result is
    the mean of the patch rows.

    Parameters
    ----------
    model : nn.Module
        A ViT, ours or from timm, transformers or torchvision.
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    patch : tuple of int, optional
        (row, column) of a patch, counted from 0, or from the end if negative. This patch's row is returned instead.

    Returns
    -------
    Tensor, shape (L, B, H, N)
        Attention weights on the CPU; each row sums to one.

    Raises
    ------
    InputError
        For the same reasons as `capture`, if the classifier head does not read a weighted mean of tokens, or if the
        patch does not exist.
    """
    adapter = adapt_vit(model)
    adapter.check_images(images)
    grid, first = adapter.grid(images), adapter.n_prefix
    weights = torch.zeros(first + grid[0] * grid[1])
    if patch is None:
        weights = reading_weights(adapter.pool, first, len(weights))
    else:
        row, column = check_patch(patch, grid)
        weights[first + row * grid[1] + column] = 1
    chosen = weights.nonzero()[:, 0]

    def keep(block, attended):
        rows = at_least_float32(attended.maps[:, :, chosen])  # (B, H, some, N)
        return weights[chosen].to(rows) @ rows  # (B, H, N)

    parts = [torch.stack(capture(model, part, keep=keep).maps).cpu() for part in in_parts(adapter, images)]
    return torch.cat(parts, dim=1)  # (L, B, H, N)


@dataclass
class BlockRows:
    """The attention of one token, or of what the classifier head reads, in one block.

    Attributes
    ----------
    weights : Tensor, shape (B, H, N)
        Attention weights on the CPU, with the tokens before the patches first. Each row sums to one, or to less if the
        windows of a Swin Transformer also hold padding.
    grid : (int, int)
        (rows, columns) of the patches, or of the tokens of a stage.
    token_size : (int, int)
        Height and width of one of them, in pixels.
    """

    weights: torch.Tensor
    grid: tuple
    token_size: tuple


def rows_by_block(model, images, patch=None):
    """Return the attention of attention_rows in each block, also for a Swin Transformer: a list of L BlockRows.

    Parameters
    ----------
    model : nn.Module
        A ViT or a Swin Transformer, ours or from timm, transformers or torchvision.
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    patch : (int, int), optional
        As in attention_rows. A Swin Transformer needs it. In its later stages the row is that of the token that holds
        the patch.

    Raises
    ------
    InputError
        As attention_rows, and for a Swin Transformer without a patch.
    """
    adapter = adapt_attention(model)
    if not adapter.windowed or patch is None:  # attention_rows gives the reason why a Swin needs a patch
        grid, rows = adapter.grid(images), attention_rows(model, images, patch)
        return [BlockRows(weights, grid, adapter.patch_size) for weights in rows]
    rows = window_rows(model, images, patch)  # L tensors (B, H, h, w)
    return [BlockRows(row.flatten(2), tuple(row.shape[2:]), adapter.patch_size_in(stage))
            for row, stage in zip(rows, adapter.stage_of_block, strict=True)]


def block_names(adapter):
    """Return the names of the L blocks for figures: "block 3", or in a Swin Transformer "stage 2, block 1"."""
    if not adapter.windowed:
        return [f"block {i + 1}" for i in range(len(adapter.blocks))]
    return [f"stage {i + 1}, block {j + 1}" for i, stage in enumerate(adapter.stages) for j in range(len(stage))]


def mean_distances(model, images, renormalise=True):
    """Return the attention distance of each head, averaged over images: (L, H) in pixels, float64.

    Blocks of a Swin Transformer with fewer heads than the last have NaN for the others.

    Parameters
    ----------
    model : nn.Module
        A ViT or a Swin Transformer, ours or from timm, transformers or torchvision.
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    renormalise : bool, optional
        As in `attention_distance`.
    """
    if adapt(model).windowed:
        return window_distances(model, images)
    adapter, total = adapt_vit(model), 0
    adapter.check_images(images)
    layout = adapter.grid(images), adapter.patch_size, adapter.n_prefix, renormalise
    for part in in_parts(adapter, images):
        found = capture(model, part, keep=lambda block, attended: attention_distance(attended.maps[None], *layout)[0])
        total = total + len(part) * torch.stack(found.maps)  # (L, H)
    return total / len(images)


def in_parts(adapter, images):
    """Split images into parts small enough that one block's maps of a part fit in memory."""
    rows, columns = adapter.grid(images)
    return images.split(max(1, PART // (adapter.n_prefix + rows * columns)**2))


def patches_of(row, grid_size, n_prefix_tokens):
    """Select the patches from weights on all tokens: (..., N) -> (..., rows, columns)."""
    return row[..., n_prefix_tokens:].unflatten(-1, grid_size)


def select_attention(maps, layer_idx=-1, head_idx=None):
    """Return the attention map of one block and one head, or of the mean over the heads.

    Parameters
    ----------
    maps : Tensor, shape (L, B, H, N, N)
        Attention maps, as from `capture.attention_maps`.
    layer_idx : int, optional
        Python index of the block: 0 is the first, -1 the last.
    head_idx : int, optional
        Python index of the head, from 0. By default the mean over the heads is returned.

    Returns
    -------
    Tensor, shape (B, N, N)

    Raises
    ------
    InputError
        If an index is out of range.
    """
    n_layers, _, n_heads = maps.shape[:3]
    attention = maps[check_index("layer_idx", layer_idx, n_layers)]  # (B, H, N, N)
    if head_idx is None:
        return attention.mean(dim=1)  # (B, N, N)
    return attention[:, check_index("head_idx", head_idx, n_heads)]  # (B, N, N)


def cls_attention_grid(attention, grid_size, n_prefix_tokens=1, pool="cls"):
    """Return the attention that the classifier head's input pays to each patch: (..., N, N) -> (..., rows, columns).

    The weights are not rescaled: together with the weights on CLS and the registers, they sum to one.

    Parameters
    ----------
    attention : Tensor, shape (..., N, N)
        Attention maps; rows are queries.
    grid_size : tuple of int
        (rows, columns) of the patches, as in `model.patch_embed.grid_size`.
    n_prefix_tokens : int, optional
        Number of tokens before the patches (CLS and registers), as in `model.n_prefix_tokens`.
    pool : str, optional
        What the classifier head reads, as in `model.config.pool`: "cls" selects the attention of CLS, "mean" the mean
        attention of the patches. Other values that `adapters.reading_weights` accepts select a weighted mean of rows.

    Raises
    ------
    InputError
        If the prefix and the grid do not add up to N tokens, or if `pool` corresponds to no rows of the map.
    """
    rows, columns = grid_size
    if attention.shape[-1] != n_prefix_tokens + rows * columns:
        prefix = "CLS" if n_prefix_tokens == 1 else f"{n_prefix_tokens} prefix tokens"
        raise InputError(f"a map over {attention.shape[-1]} tokens does not fit a grid of {rows}x{columns} patches "
                         f"and {prefix} ({n_prefix_tokens + rows * columns} tokens); pass the grid_size and "
                         f"n_prefix_tokens of the model that computed it")
    return patches_of(row_of_head(attention, pool, n_prefix_tokens), grid_size, n_prefix_tokens)


def row_of_head(attention, pool, n_prefix_tokens):
    """Average the rows of the tokens that the classifier head reads: (..., N, N) -> (..., N), at least in float32."""
    weights = reading_weights(pool, n_prefix_tokens, attention.shape[-1])  # (N)
    readers = weights.nonzero()[:, 0]
    rows = at_least_float32(attention[..., readers, :])
    return weights[readers].to(rows) @ rows  # (..., N)


def _patch_distances(grid_size, patch_size):
    """Return the distances in pixels between the centres of all pairs of patches: (n, n), float64."""
    sides = zip(grid_size, pair(patch_size, "patch_size"), strict=True)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) * side for n, side in sides))  # (n, 2)
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")  # (n, n)


def attention_distance(maps, grid_size, patch_size, n_prefix_tokens=1, renormalise=True):
    """Return how far patches look, in pixels: the mean over patches of sum_j A_ij distance_ij.

    Parameters
    ----------
    maps : Tensor, shape (L, B, H, N, N)
        Attention maps, as from `attention_maps`. The mean is over images and patches.
    grid_size : tuple of int
        (rows, columns) of the patches.
    patch_size : int or tuple of int
        Side of a patch in pixels, or (height, width).
    n_prefix_tokens : int, optional
        Number of tokens before the patches.
    renormalise : bool, optional
        If True, the weights of each patch on the patches are rescaled to sum to one, so CLS and the registers do not
        count. If False, those tokens count with distance 0.

    Returns
    -------
    Tensor, shape (L, H)
        Distances in pixels, float64.

    Raises
    ------
    InputError
        If the prefix and the grid do not add up to N tokens.

    References
    ----------
    Dosovitskiy et al. 2021 (the ViT paper), Fig. 7 (right).
    """
    n = grid_size[0] * grid_size[1]
    if maps.shape[-1] != n_prefix_tokens + n:
        raise InputError(f"maps over {maps.shape[-1]} tokens do not fit a grid of {grid_size[0]}x{grid_size[1]} "
                         f"patches and {n_prefix_tokens} prefix tokens; expected {n_prefix_tokens + n} tokens")
    apart = _patch_distances(grid_size, patch_size)  # (n, n)
    total = torch.zeros(maps.shape[0], maps.shape[2], dtype=torch.float64)  # (L, H)
    for block, head in np.ndindex(*total.shape):
        for one in maps[block, :, head, n_prefix_tokens:, n_prefix_tokens:]:
            weights = one.cpu().double()  # (n, n): one at a time, in double precision
            distances = torch.einsum("ij,ij->i", weights, apart)  # (n)
            total[block, head] += (distances / weights.sum(dim=1) if renormalise else distances).mean()
    return total / maps.shape[1]


def uniform_attention_distance(grid_size, patch_size):
    """Return the attention distance in pixels that uniform attention over the patches would have."""
    return _patch_distances(grid_size, patch_size).mean().item()


def uniform_distances(model, images):
    """Return the attention distance in pixels that uniform attention would have in each block: a list of L numbers.

    In a Swin Transformer it is uniform within a whole window. Windows that the shift or the edge cuts are smaller.
    Call it after a pass, as `WindowAdapter.window_of`.
    """
    adapter = adapt_attention(model)
    if not adapter.windowed:
        return [uniform_attention_distance(adapter.grid(images), adapter.patch_size)] * len(adapter.blocks)
    distances = []
    for block, stage in zip(adapter.blocks, adapter.stage_of_block, strict=True):
        size = adapter.grid_in(images, stage)
        window = tuple(map(min, adapter.window_of(block, size)[0], size))
        distances.append(uniform_attention_distance(window, adapter.patch_size_in(stage)))
    return distances


def window_groups(block):
    """Return which tokens of a map attend to each other: (h, w), with equal numbers for the tokens of one group.

    A group is a window, or after a shift a part of one at an edge of the map: tokens from opposite edges share a window
    and are masked from each other. `block` is a Windowed, as from windows.capture_windows.
    """
    (h, w), places = block.size, block.places  # (W, M)
    padded = [side + -side % length for side, length in zip(block.size, block.window, strict=True)]
    first = (shift_mask(padded, block.window, block.shift) == 0).int().argmax(dim=2)  # (W, M), first of the group
    groups = places.new_zeros(h * w + 1)
    groups[places] = first + places.shape[1] * torch.arange(len(places))[:, None]
    return groups[:-1].view(h, w)


def bias_by_offset(table, window):
    """Return the relative position bias by the offset of the key from the query: (offsets, H) -> (H, 2h - 1, 2w - 1).

    The offset (0, 0) is in the centre; rows count down and columns to the right. The table itself is ordered by query
    minus key, so both axes are reversed. `window` is the (height, width) of a window, in tokens. The rows of prefix
    tokens, which come last in the table of a BEiT, are left out.
    """
    sides = [2 * length - 1 for length in window]
    return table[:sides[0] * sides[1]].detach().cpu().float().T.unflatten(1, sides).flip(1, 2)


@torch.no_grad()
def token_similarity(model, images):
    """Return how similar the class token and the distillation token are, as means of cosine similarities.

    Parameters
    ----------
    model : nn.Module
        A distilled ViT, ours or from timm or transformers.
    images : Tensor, shape (B, C, height, width)
        Normalised images.

    Returns
    -------
    features : Tensor, shape (L + 1,)
        Of the two tokens before the first block and after each block, averaged over the images; float64.
    attention : Tensor, shape (L,)
        Of their rows of attention in each block, averaged over the images and heads; float64.

    Raises
    ------
    InputError
        If the model has no distillation token, and for the same reasons as `capture`.

    References
    ----------
    Touvron et al. 2021, "Training data-efficient image transformers", Sec. 4: the two tokens become more similar from
    layer to layer.
    """
    adapter = check_distilled(model)
    adapter.check_images(images)
    features, attention = 0, 0

    def keep(block, attended):
        return _cosine(*attended.maps[:, :, :2].unbind(dim=2)).mean()  # of two (B, H, N)

    for part in in_parts(adapter, images):
        seen = capture(model, part, keep=keep)
        features = features + len(part) * torch.stack([_cosine(*tokens[:, :2].unbind(dim=1)).mean()
                                                       for tokens in seen.tokens])  # (L + 1)
        attention = attention + len(part) * torch.stack(seen.maps)  # (L)
    return features / len(images), attention / len(images)


def check_distilled(model):
    """Return the ViTAdapter of a model. Raises InputError if it has no distillation token beside CLS."""
    adapter = adapt(model)
    if not adapter.attends or adapter.prefix[:2] != ("CLS", "distillation token"):
        raise InputError(f"this {class_name(model)} has no distillation token; use a DistilledViT, or a distilled DeiT "
                         f"of timm or transformers")
    return adapter


def _cosine(first, second):
    """Return the cosine similarity of vectors (..., N), in float64 on the CPU."""
    return F.cosine_similarity(first.cpu().double(), second.cpu().double(), dim=-1)


@torch.no_grad()
def position_similarity(model):
    """Return the cosine similarity of the position embeddings of all pairs of patches.

    CLS is left out; registers have no position embeddings.

    Returns
    -------
    Tensor, shape (rows, columns, rows, columns)

    Raises
    ------
    InputError
        If the model has no position embeddings.

    References
    ----------
    Dosovitskiy et al. 2021 (the ViT paper), Fig. 7 (centre).
    """
    adapter = adapt(model)
    positions = adapter.positions if adapter.attends else None
    if positions is None and adapter.tables:
        raise InputError(f"a {class_name(model)} has no position embeddings, but a bias for each offset between two "
                         f"tokens; use visualize_bias_tables")
    if positions is None:
        raise InputError(f"this {class_name(model)} has no position embeddings; use a VisionTransformer or a "
                         f"HybridCNNViT with position 'learned' or 'sincos'")
    positions = F.normalize(positions.float(), dim=-1)  # (n_patches, D)
    return (positions @ positions.T).reshape(2 * grid_of(adapter.img_size, adapter.patch_size))  # rows, columns, twice
