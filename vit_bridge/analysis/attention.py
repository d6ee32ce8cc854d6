"""Where tokens look, how far, and how alike their positions are.

    attention_rows, mean_distances     of a model: the maps of one block are in memory at a time
    select_attention, cls_attention_grid, attention_distance     of maps that are at hand

Shapes:  B images, L blocks, H heads, N tokens (CLS, registers, patches), n patches, D width.
"""

import numpy as np
import torch
import torch.nn.functional as F

from vit_bridge.analysis.capture import capture
from vit_bridge.errors import InputError, check_index
from vit_bridge.models.adapters import adapt, adapt_vit, reading_weights
from vit_bridge.models.protocol import class_name
from vit_bridge.runtime import at_least_float32
from vit_model import grid_of, pair

PART = 2**22  # so many weights of a head, in the maps of as many images as are looked at together


def attention_rows(model, images, patch=None):
    """The attention that what the head reads pays to every token, in all blocks and heads: (L, B, H, N), on the CPU.

    images  normalised, (B, C, height, width)
    patch   (row, column), from 0 or from the end: what this patch attends to, instead of what the head reads

    Raises InputError as capture does, for a head that reads no tokens of its own, and for a patch that is not there.
    """
    adapter = adapt_vit(model)
    adapter.check_images(images)
    grid, first = adapter.grid(images), adapter.n_prefix
    weights = torch.zeros(first + grid[0] * grid[1])
    if patch is None:
        weights = reading_weights(adapter.pool, first, len(weights))
    elif not isinstance(patch, (tuple, list)) or len(patch) != 2:
        raise InputError(f"patch {patch!r} is no place; expected (row, column), such as (0, {grid[1] - 1})")
    else:
        row, column = (check_index("patch", place, n) for place, n in zip(patch, grid, strict=True))
        weights[first + row * grid[1] + column] = 1
    chosen = weights.nonzero()[:, 0]

    def keep(block, attended):
        rows = at_least_float32(attended.maps[:, :, chosen])  # (B, H, some, N)
        return weights[chosen].to(rows) @ rows  # (B, H, N)

    parts = [torch.stack(capture(model, part, keep=keep).maps).cpu() for part in in_parts(adapter, images)]
    return torch.cat(parts, dim=1)  # (L, B, H, N)


def mean_distances(model, images, renormalise=True):
    """The attention_distance of a model, over normalised images (B, C, height, width): (L, H) float64, on the CPU."""
    adapter, total = adapt_vit(model), 0
    adapter.check_images(images)
    layout = adapter.grid(images), adapter.patch_size, adapter.n_prefix, renormalise
    for part in in_parts(adapter, images):
        found = capture(model, part, keep=lambda block, attended: attention_distance(attended.maps[None], *layout)[0])
        total = total + len(part) * torch.stack(found.maps)  # (L, H)
    return total / len(images)


def in_parts(adapter, images):
    """The images in parts, of which each block's maps are not too much for the memory."""
    rows, columns = adapter.grid(images)
    return images.split(max(1, PART // (adapter.n_prefix + rows * columns)**2))


def patches_of(row, grid_size, n_prefix_tokens):
    """The weights of the patches, in their places, out of weights of all tokens: (..., N) -> (..., rows, columns)."""
    return row[..., n_prefix_tokens:].unflatten(-1, grid_size)


def select_attention(maps, layer_idx=-1, head_idx=None):
    """The map of one layer and head, (B, N, N), from maps (L, B, H, N, N) as capture.attention_maps gives them.

    Indices count from 0, negative ones from the end; head_idx=None is the mean over the heads. Raises
    InputError for an index out of range.
    """
    n_layers, _, n_heads = maps.shape[:3]
    attention = maps[check_index("layer_idx", layer_idx, n_layers)]  # (B, H, N, N)
    if head_idx is None:
        return attention.mean(dim=1)  # (B, N, N)
    return attention[:, check_index("head_idx", head_idx, n_heads)]  # (B, N, N)


def cls_attention_grid(attention, grid_size, n_prefix_tokens=1, pool="cls"):
    """The attention that what the head reads pays to each patch: maps (..., N, N) -> (..., rows, columns).

    grid_size        (rows, columns), as model.patch_embed.grid_size
    n_prefix_tokens  tokens before the patches, as model.n_prefix_tokens: CLS and the registers
    pool             as model.config.pool: "cls", attention of CLS; "mean", the mean attention of the patches; or
                     another that adapters.reading_weights knows, the mean of their rows by those weights

    Weights are not rescaled: together with those of CLS and the registers they sum to one. Raises InputError
    where prefix and grid do not make N tokens, and for a pool of which no rows are what the head reads.
    """
    rows, columns = grid_size
    if attention.shape[-1] != n_prefix_tokens + rows * columns:
        prefix = "CLS" if n_prefix_tokens == 1 else f"{n_prefix_tokens} tokens before them"
        raise InputError(f"a map over {attention.shape[-1]} tokens does not fit a grid of {rows}x{columns} patches "
                         f"and {prefix}, {n_prefix_tokens + rows * columns} tokens; give the grid_size and the "
                         f"n_prefix_tokens of its model")
    return patches_of(row_of_head(attention, pool, n_prefix_tokens), grid_size, n_prefix_tokens)


def row_of_head(attention, pool, n_prefix_tokens):
    """What the head reads attends to: the mean of its rows by reading_weights, (..., N, N) -> (..., N), of maps in half
    precision in float32."""
    weights = reading_weights(pool, n_prefix_tokens, attention.shape[-1])  # (N)
    readers = weights.nonzero()[:, 0]
    rows = at_least_float32(attention[..., readers, :])
    return weights[readers].to(rows) @ rows  # (..., N)


def _patch_distances(grid_size, patch_size):
    """Pixels between the middles of all pairs of patches, (n, n), n = rows * columns, float64."""
    sides = zip(grid_size, pair(patch_size, "patch_size"), strict=True)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) * side for n, side in sides))  # (n, 2)
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")  # (n, n)


def attention_distance(maps, grid_size, patch_size, n_prefix_tokens=1, renormalise=True):
    """How far patches look, in pixels: the mean over them of sum_j A_ij distance_ij, (L, H) float64.

    maps         (L, B, H, N, N), as from attention_maps; the mean is over images and patches
    renormalise  True: the weights of a patch on all patches are scaled to a sum of one, so that CLS and the registers
                 do not count. False: they count with distance 0

    ViT paper, Fig. 7 (right). Raises InputError where prefix and grid do not make N tokens.
    """
    n = grid_size[0] * grid_size[1]
    if maps.shape[-1] != n_prefix_tokens + n:
        raise InputError(f"maps over {maps.shape[-1]} tokens do not fit a grid of {grid_size[0]}x{grid_size[1]} "
                         f"patches and {n_prefix_tokens} tokens before them; expected {n_prefix_tokens + n} tokens")
    apart = _patch_distances(grid_size, patch_size)  # (n, n)
    total = torch.zeros(maps.shape[0], maps.shape[2], dtype=torch.float64)  # (L, H)
    for block, head in np.ndindex(*total.shape):
        for one in maps[block, :, head, n_prefix_tokens:, n_prefix_tokens:]:
            weights = one.cpu().double()  # (n, n): one at a time, in double precision
            distances = torch.einsum("ij,ij->i", weights, apart)  # (n)
            total[block, head] += (distances / weights.sum(dim=1) if renormalise else distances).mean()
    return total / maps.shape[1]


def uniform_attention_distance(grid_size, patch_size):
    """The attention_distance of uniform attention over the patches, in pixels: the control."""
    return _patch_distances(grid_size, patch_size).mean().item()


@torch.no_grad()
def position_similarity(model):
    """Cosine similarity of the position embeddings of all pairs of patches, (rows, columns, rows, columns).

    CLS is left out, registers have none. ViT paper, Fig. 7 (centre). Raises InputError for a model without position
    embeddings.
    """
    adapter = adapt(model)
    if not adapter.attends or adapter.positions is None:
        raise InputError(f"this {class_name(model)} has no position embeddings; expected a VisionTransformer "
                         f"or HybridCNNViT with position 'learned' or 'sincos'")
    positions = F.normalize(adapter.positions.float(), dim=-1)  # (n_patches, D)
    return (positions @ positions.T).reshape(2 * grid_of(adapter.img_size, adapter.patch_size))  # rows, columns, twice
