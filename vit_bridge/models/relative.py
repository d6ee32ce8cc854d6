"""Self-attention that adds a learned bias for each offset between two positions: RelativeAttention.

Swin uses it within its windows (Liu et al. 2021, Eq. 4). Parameters have the names of the paper's code and of timm.

Shapes:  H heads, D width of a token, h, w height and width of a grid of positions, M = h w positions, n queries.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vit_model import MultiHeadAttention


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
    """

    def __init__(self, embed_dim, n_heads, grid_size, dropout=0.0, relative_bias=True):
        super().__init__(embed_dim, n_heads, dropout)
        self.grid_size = grid_size
        self.relative_position_bias_table = None
        if relative_bias:
            n_offsets = (2 * grid_size[0] - 1) * (2 * grid_size[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(n_offsets, n_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(grid_size), persistent=False)

    def bias(self, n_query_tokens=None):
        """Return B for the first n queries, (H, n, M), or None if there is no table."""
        if self.relative_position_bias_table is None:
            return None
        return self.relative_position_bias_table[self.relative_position_index[:n_query_tokens]].permute(2, 0, 1)


def relative_position_index(grid_size):
    """Return the row of the table for each pair of positions, (M, M); rows of the grid come first in the table.

    Query i and key j have the offset (row_i - row_j, column_i - column_j); the smallest offset has row 0.
    """
    h, w = grid_size
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()  # (M), (M)
    return (rows[:, None] - rows + h - 1) * (2 * w - 1) + (columns[:, None] - columns + w - 1)


def resample_bias_table(table, old, new):
    """Resample a table from one grid to another, bicubically: (offsets, H) -> (new offsets, H).

    This is what the paper's code does to fine-tune with larger windows. old, new: (h, w) of the grids.
    """
    if old == new:
        return table
    sides = [tuple(2 * side - 1 for side in grid) for grid in (old, new)]
    images = table.T.unflatten(1, sides[0])[None].float()  # (1, H, 2h - 1, 2w - 1)
    images = F.interpolate(images, size=sides[1], mode="bicubic")
    return images[0].flatten(1).T.to(table)
