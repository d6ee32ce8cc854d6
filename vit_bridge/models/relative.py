"""Self-attention that adds a learned bias for each offset between two positions: RelativeAttention.

Swin uses it within its windows (Liu et al. 2021, Eq. 4), BEiT over all patches and CLS (Bao et al. 2022). Parameters
have the names of the papers' code and of timm.

Shapes:  H heads, D width of a token, h, w height and width of a grid of positions, M tokens: p prefix tokens, such as
         CLS, then the h w positions, n queries.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vit_model import MultiHeadAttention


class BiasTable(nn.Module):
    """A table of biases that several RelativeAttentions share: one row for each offset, one column for each head.

    grid_size, n_heads, n_prefix_tokens: as in RelativeAttention.
    """

    def __init__(self, grid_size, n_heads, n_prefix_tokens=0):
        super().__init__()
        self.relative_position_bias_table = new_table(grid_size, n_heads, n_prefix_tokens)


class RelativeAttention(MultiHeadAttention):
    """Self-attention with softmax(Q K^T / sqrt(D / H) + B) V, where B depends on the offset from key to query.

    The table has one row for each offset and one column for each head. Positions with the same offset share a row, so
    a pattern such as "attend to the left neighbour" is learned once for all positions.

    Parameters
    ----------
    embed_dim, n_heads : int
        D and H.
    grid_size : (int, int)
        (h, w).
    dropout : float, optional
        Dropout rate after the output projection.
    relative_bias : bool, optional
        Without it, there is no table and B is zero.
    n_prefix_tokens : int, optional
        p. Tokens before those of the grid have no offset. If there are any, the table ends with three more rows: for a
        prefix token that attends to a position, for a position that attends to a prefix token, and for two prefix
        tokens.
    shared : BiasTable, optional
        Use this table, which the model owns, and have none.
    """

    def __init__(self, embed_dim, n_heads, grid_size, dropout=0.0, relative_bias=True, n_prefix_tokens=0, shared=None):
        super().__init__(embed_dim, n_heads, dropout)
        self.grid_size, self.n_prefix_tokens = grid_size, n_prefix_tokens
        self.shared = None if shared is None else (shared,)  # a tuple, so that it does not become a part of this module
        self.relative_position_bias_table = None
        if relative_bias and shared is None:
            self.relative_position_bias_table = new_table(grid_size, n_heads, n_prefix_tokens)
        index = relative_position_index(grid_size, n_prefix_tokens)
        self.register_buffer("relative_position_index", index, persistent=False)

    def bias(self, n_query_tokens=None):
        """Return B for the first n queries, (H, n, M), or None if there is no table."""
        owner = self if self.shared is None else self.shared[0]
        if owner.relative_position_bias_table is None:
            return None
        return owner.relative_position_bias_table[self.relative_position_index[:n_query_tokens]].permute(2, 0, 1)

    def fit_grid(self, grid_size):
        """Change the grid in place: resample the table, unless it is shared, and compute the index again."""
        if self.relative_position_bias_table is not None:
            resize_table(self, self.grid_size, grid_size)
        index = relative_position_index(grid_size, self.n_prefix_tokens)
        self.grid_size, self.relative_position_index = grid_size, index.to(self.relative_position_index.device)


def new_table(grid_size, n_heads, n_prefix_tokens=0):
    """Return a new table, (offsets, H), or with prefix tokens (offsets + 3, H)."""
    n_rows = (2 * grid_size[0] - 1) * (2 * grid_size[1] - 1) + (3 if n_prefix_tokens else 0)
    return nn.init.trunc_normal_(nn.Parameter(torch.zeros(n_rows, n_heads)), std=0.02)


def relative_position_index(grid_size, n_prefix_tokens=0):
    """Return the row of the table for each pair of tokens, (M, M); rows of the grid come first in the table.

    Query i and key j have the offset (row_i - row_j, column_i - column_j); the smallest offset has row 0.
    """
    (h, w), p = grid_size, n_prefix_tokens
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()  # (h w), (h w)
    index = (rows[:, None] - rows + h - 1) * (2 * w - 1) + (columns[:, None] - columns + w - 1)
    index, n_offsets = F.pad(index, (p, 0, p, 0)), (2 * h - 1) * (2 * w - 1)  # (M, M)
    index[:p, p:], index[p:, :p], index[:p, :p] = n_offsets, n_offsets + 1, n_offsets + 2
    return index


def resample_bias_table(table, old, new):
    """Resample a table from one grid to another, bicubically: (offsets, H) -> (new offsets, H).

    This is what the code of Swin does to fine-tune with larger windows. old, new: (h, w) of the grids. The three rows
    of prefix tokens, if there are any, stay unchanged.
    """
    if old == new:
        return table
    sides = [tuple(2 * side - 1 for side in grid) for grid in (old, new)]
    n_offsets = sides[0][0] * sides[0][1]
    images = table[:n_offsets].T.unflatten(1, sides[0])[None].float()  # (1, H, 2h - 1, 2w - 1)
    images = F.interpolate(images, size=sides[1], mode="bicubic")
    return torch.cat([images[0].flatten(1).T.to(table), table[n_offsets:]])


def resize_table(owner, old, new):
    """Replace the table of a RelativeAttention or BiasTable by a new parameter for another grid."""
    table = owner.relative_position_bias_table
    resampled = resample_bias_table(table.detach(), old, new)
    owner.relative_position_bias_table = nn.Parameter(resampled, table.requires_grad)
