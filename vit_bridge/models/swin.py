"""Swin, a ViT with the locality and the stages of a CNN: Liu et al. 2021, "Swin Transformer".

Attention stays within windows, so its cost grows with the number of tokens and not with its square (Eq. 1 and 2). In
every second block the windows are shifted by half their side, and tokens of neighbouring windows meet. Between stages,
2 x 2 neighbouring tokens merge into one that is twice as wide, as a CNN halves its resolution.

Parameters have timm's names, except that `layers.` is `stages.` and the norm of the patches is `patch_norm`.

Shapes:  B images, C channels of an image, D channels of a map (embed_dim, doubled in each stage), h, w height and width
         of a map in tokens, W windows, M tokens of a window, H heads, K = D / H width of a head.
"""

from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from vit_bridge.errors import InputError, check_choice, check_int, pair
from vit_bridge.models.protocol import ImageModel, create_variant
from vit_bridge.models.relative import RelativeAttention
from vit_model import (
    PatchEmbedding,
    TransformerBlock,
    attend,
    check_positive,
    check_rate,
    drop_path_rates,
    grid_of,
    head_width,
)

# ---- Windows ----------------------------------------------------------------------------------------------


def split_windows(x, window):
    """Cut a map into windows, row by row: (B, h, w, D) -> (B, W, M, D). h and w must be multiples of the window."""
    (rows, columns), (B, h, w, D) = window, x.shape
    x = x.reshape(B, h // rows, rows, w // columns, columns, D)
    return x.transpose(2, 3).reshape(B, -1, rows * columns, D)  # (B, W, M, D)


def join_windows(windows, window, size):
    """Undo split_windows: (B, W, M, D) -> (B, h, w, D), with size (h, w)."""
    (rows, columns), (h, w) = window, size
    x = windows.reshape(len(windows), h // rows, w // columns, rows, columns, windows.shape[-1])
    return x.transpose(2, 3).reshape(len(windows), h, w, -1)  # (B, h, w, D)


def shift_mask(size, window, shift, device=None):
    """Return which tokens of a window are neighbours in a shifted map: (W, M, M), 0 for neighbours, else -inf.

    Rolling a map brings tokens from opposite edges into one window. They must not attend to each other.
    """
    ids = torch.zeros(1, *size, 1, device=device)
    for axis, (side, length, by) in enumerate(zip(size, window, shift, strict=True), start=1):
        place = torch.arange(side, device=device)
        region = (place >= side - length).long() + (place >= side - by)  # 0, 1 or 2 along this axis
        ids = 3 * ids + region.view([-1 if one == axis else 1 for one in range(4)])
    ids = split_windows(ids, window)[0, :, :, 0]  # (W, M)
    return torch.zeros(len(ids), ids.shape[1], ids.shape[1], device=device).masked_fill(
        ids[:, :, None] != ids[:, None], -torch.inf)


class WindowAttention(RelativeAttention):
    """Self-attention within windows of a map: (B, h, w, D) -> (B, h, w, D).

    Maps that the windows do not divide are padded with zeros at the bottom and the right, as in torchvision. The maps
    of all windows are computed at once, as if every window had heads of its own.

    Parameters
    ----------
    embed_dim, n_heads : int
        D and H.
    window : (int, int)
        Height and width of a window, in tokens.
    shift : (int, int)
        By how many tokens the windows are shifted down and to the right.
    dropout, relative_bias : optional
        As in RelativeAttention.
    """

    def __init__(self, embed_dim, n_heads, window, shift=(0, 0), dropout=0.0, relative_bias=True):
        super().__init__(embed_dim, n_heads, window, dropout, relative_bias)
        self.shift = shift

    def forward(self, x, return_attention=False, n_query_tokens=None):
        """Return the map (B, h, w, D), and with return_attention also A (B, W, H, M, M), whose rows sum to one."""
        size, window = x.shape[1:3], self.grid_size
        x = F.pad(x, (0, 0, 0, -size[1] % window[1], 0, -size[0] % window[0]))
        padded, shift = x.shape[1:3], self.shift_in(size)
        if any(shift):
            x = x.roll([-by for by in shift], dims=(1, 2))
        x = split_windows(x, window)  # (B, W, M, D)
        n_windows = x.shape[1]
        qkv = self.qkv(x).unflatten(3, (3, self.n_heads, -1))  # (B, W, M, 3, H, K)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # 3 x (B, W H, M, K)
        bias = self.bias()  # (H, M, M)
        if any(shift):
            mask = shift_mask(padded, window, shift, x.device)[:, None].to(x.dtype)  # (W, 1, M, M)
            bias = (mask if bias is None else bias + mask).expand(-1, self.n_heads, -1, -1)  # (W, H, M, M)
        elif bias is not None:
            bias = bias.expand(n_windows, -1, -1, -1)  # (W, H, M, M)
        heads, attention = attend(q, k, v, return_attention, None if bias is None else bias.flatten(0, 1))
        x = heads.unflatten(1, (n_windows, -1)).transpose(2, 3).flatten(3)  # (B, W, M, D), the heads concatenated
        x = join_windows(self.dropout(self.proj(x)), window, padded)  # (B, h, w, D)
        if any(shift):
            x = x.roll(shift, dims=(1, 2))
        x = x[:, :size[0], :size[1]]
        return (x, attention.unflatten(1, (n_windows, -1))) if return_attention else x

    def shift_in(self, size):
        """Return the shift for a map of this (height, width): 0 along a side that one window covers."""
        return [by if length < side else 0 for by, length, side in zip(self.shift, self.grid_size, size, strict=True)]


def spread_windows(maps, window, shift, size):
    """Return the attention of a whole map from that of its windows: (B, W, H, M, M) -> (B, H, h w, h w).

    A token does not attend outside its window, so these weights are 0. Padding outside the map is left out; only if
    there is any, rows can sum to less than one.

    Parameters
    ----------
    maps : Tensor, shape (B, W, H, M, M)
        As from WindowAttention.
    window, shift : (int, int)
        Height and width of a window, and the shift that was used.
    size : (int, int)
        (h, w).
    """
    padded = [side + -side % length for side, length in zip(size, window, strict=True)]
    ids = torch.arange(padded[0] * padded[1], device=maps.device).view(1, *padded, 1)
    ids = split_windows(ids.roll([-by for by in shift], dims=(1, 2)), window)[0, :, :, 0]  # (W, M), places in the map
    whole = maps.new_zeros(len(maps), maps.shape[2], padded[0] * padded[1], padded[0] * padded[1])
    whole[:, :, ids[:, :, None], ids[:, None]] = maps.transpose(1, 2)  # (B, H, W, M, M)
    inside = torch.arange(padded[0] * padded[1], device=maps.device).view(padded)[:size[0], :size[1]].flatten()
    return whole[:, :, inside][:, :, :, inside]  # (B, H, h w, h w)


# ---- The model --------------------------------------------------------------------------------------------


class SwinBlock(TransformerBlock):
    """An encoder block whose attention stays within windows: (B, h, w, D) -> (B, h, w, D), Eq. 3.

    Parameters
    ----------
    embed_dim, n_heads, window, shift, relative_bias : optional
        As in WindowAttention.
    mlp_ratio, dropout, drop_path, norm_eps : optional
        As in TransformerBlock.
    """

    def __init__(self, embed_dim, n_heads, window, shift, mlp_ratio=4.0, dropout=0.0, drop_path=0.0, norm_eps=1e-5,
                 relative_bias=True):
        super().__init__(embed_dim, n_heads, mlp_ratio, dropout, drop_path, norm_eps=norm_eps)
        self.attn = WindowAttention(embed_dim, n_heads, window, shift, dropout, relative_bias)


class PatchMerging(nn.Module):
    """Merge 2 x 2 neighbouring tokens into one: (B, h, w, D) -> (B, h / 2, w / 2, 2D), rounded up.

    The four are joined in the order upper left, lower left, upper right, lower right. Odd sides are padded with zeros.
    """

    def __init__(self, channels, norm_eps=1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels, eps=norm_eps)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x):
        """Return the merged map."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, h / 2, 2, w / 2, 2, D)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, h / 2, w / 2, 4D), columns before rows
        return self.reduction(self.norm(x))  # (B, h / 2, w / 2, 2D)


class SwinStage(nn.Module):
    """A stage: merging, except in the first, then blocks; maps (B, D, h, w), channels first as in a CNN."""

    def __init__(self, downsample, blocks):
        super().__init__()
        self.downsample, self.blocks = downsample, nn.Sequential(*blocks)

    def forward(self, x):
        """Return the map after the stage."""
        x = self.blocks(self.downsample(x.permute(0, 2, 3, 1)))  # (B, h, w, D)
        return x.permute(0, 3, 1, 2)  # (B, D, h, w)


class SwinTransformer(ImageModel):
    """The whole model: images (B, C, height, width) -> logits (B, n_classes). By default it is Swin-T.

    Parameters
    ----------
    *args, **options
        The fields of SwinConfig, in order.

    Raises
    ------
    InputError
        If an argument is out of range, or if the images do not fit the model.

    Examples
    --------
    >>> model = SwinTransformer(32, 2, n_classes=10, embed_dim=32, depths=(2, 2, 2), n_heads=(1, 2, 4), window_size=4)
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, *args, **options):
        super().__init__()
        self.config = c = SwinConfig(*args, **options)
        self.patch_embed = PatchEmbedding(c.img_size, c.patch_size, c.in_channels, c.embed_dim)
        self.patch_embed.any_size = True
        self.patch_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.dropout, self.stages = nn.Dropout(c.dropout), nn.ModuleList()
        rates = iter(drop_path_rates(c.drop_path, sum(c.depths)))
        for i, (depth, n_heads, window) in enumerate(zip(c.depths, c.n_heads, c.windows(), strict=True)):
            D, half = c.embed_dim << i, tuple(side // 2 for side in window)
            blocks = [SwinBlock(D, n_heads, window, half if c.shift and j % 2 else (0, 0), c.mlp_ratio, c.dropout, rate,
                                c.norm_eps, c.relative_bias) for j, rate in enumerate(islice(rates, depth))]
            self.stages.append(SwinStage(PatchMerging(D // 2, c.norm_eps) if i else nn.Identity(), blocks))
        self.norm = nn.LayerNorm(self.n_features, eps=c.norm_eps)
        self.head = nn.Linear(self.n_features, c.n_classes) if c.n_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def n_features(self):
        """The width of the head's input: D of the last stage."""
        return self.config.embed_dim << (len(self.config.depths) - 1)

    @property
    def no_weight_decay(self):
        """The bias tables, as in the paper's code."""
        return tuple(name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table"))

    def whitening_layer(self):
        """Return the layer to whiten, and whether it holds each filter together with its negative."""
        return self.patch_embed.proj, False

    def layers(self):
        """Return the patch embedding and the stages, in order."""
        return [self.patch_embed, *self.stages]

    def forward_features(self, images):
        """Return the map of the last stage, (B, D, h, w)."""
        x = self.dropout(self.patch_norm(self.patch_embed(images)))  # (B, h w, D)
        size = grid_of(tuple(images.shape[2:]), self.patch_embed.patch_size)
        x = x.transpose(1, 2).unflatten(2, size)  # (B, D, h, w)
        for stage in self.stages:
            x = stage(x)  # halves h and w and doubles D, except the first
        return x

    def forward_head(self, x, pre_logits=False):
        """Return the logits (B, n_classes) of the map, or with pre_logits=True the head's input (B, D)."""
        x = self.norm(x.permute(0, 2, 3, 1)).mean(dim=(1, 2))  # (B, D)
        return x if pre_logits else self.head(x)  # (B, n_classes)


@dataclass(frozen=True)
class SwinConfig:
    """Everything needed to rebuild a model: SwinTransformer(**vars(config)).

    Parameters
    ----------
    img_size, patch_size : int or (int, int)
        Side, or (height, width), in pixels. The model accepts other image sizes too: multiples of the patch size.
    in_channels, n_classes : int
        Channels of an image, and number of logits. With 0 classes the model has no head and returns the pooled
        features.
    embed_dim : int
        D of the first stage ("C" in the paper).
    depths, n_heads : tuple of int
        Blocks and heads of each stage.
    window_size : int or (int, int)
        Side, or (height, width), of a window, in tokens. In a stage whose map for img_size is smaller, the window is
        the whole map.
    mlp_ratio : float
        Hidden width of the MLP, divided by D.
    dropout, drop_path : float
        As in ViTConfig. The paper uses a drop_path of 0.2, 0.3 and 0.5 for T, S and B.
    norm_eps : float
        Added to the variance in every LayerNorm.
    shift : bool
        Whether every second block shifts its windows.
    relative_bias : bool
        Whether attention learns a bias for each offset. The paper compares both without (Table 4).

    Raises
    ------
    InputError
        If a value is out of range.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 4
    in_channels: int = 3
    n_classes: int = 1000
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    n_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | tuple[int, int] = 7
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    drop_path: float = 0.0
    norm_eps: float = 1e-5
    shift: bool = True
    relative_bias: bool = True

    def __post_init__(self):
        for name, least in dict(in_channels=1, n_classes=0, embed_dim=1).items():
            check_int(name, getattr(self, name), least)
        for name in ("depths", "n_heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for value in getattr(self, name):
                check_int(name, value, 1)
        if not self.depths or len(self.depths) != len(self.n_heads):
            raise InputError(f"depths {self.depths} and n_heads {self.n_heads} need the same length, at least 1; pass "
                             f"one number for each stage")
        for i, n_heads in enumerate(self.n_heads):
            head_width(self.embed_dim << i, n_heads)
        for name in ("dropout", "drop_path"):
            check_rate(name, getattr(self, name))
        for name in ("mlp_ratio", "norm_eps"):
            check_positive(name, getattr(self, name))
        for name in ("shift", "relative_bias"):
            check_choice(name, getattr(self, name), (True, False))
        self.windows()

    def windows(self):
        """Return the (height, width) of the windows of each stage, in tokens."""
        grid, window = grid_of(pair(self.img_size), pair(self.patch_size, "patch_size")), pair(self.window_size,
                                                                                               "window_size")
        return [tuple(min(length, -(-side // 2**i)) for length, side in zip(window, grid, strict=True))
                for i in range(len(self.depths))]


SwinTransformer.config_class = SwinConfig


# Tiny, Small and Base come from Sec. 3.3 of the paper. Nano is our own, for 32-pixel images on a laptop.
SWIN_VARIANTS = {
    "swin_nano": SwinConfig(img_size=32, patch_size=2, embed_dim=32, depths=(2, 2, 2), n_heads=(1, 2, 4),
                            window_size=4),
    "swin_tiny": SwinConfig(),
    "swin_small": SwinConfig(depths=(2, 2, 18, 2)),
    "swin_base": SwinConfig(embed_dim=128, depths=(2, 2, 18, 2), n_heads=(4, 8, 16, 32)),
}


def create_swin_nano(n_classes=1000, **overrides):
    """Build Swin-nano/2 for 32 x 32 images: windows of 4 x 4 tokens, 3 stages of 2 blocks, D = 32, 64 and 128."""
    return create_variant(SwinTransformer, SWIN_VARIANTS["swin_nano"], n_classes, overrides)


def create_swin_tiny(n_classes=1000, **overrides):
    """Build Swin-T for 224 x 224 images: 28,288,354 parameters with 1,000 classes."""
    return create_variant(SwinTransformer, SWIN_VARIANTS["swin_tiny"], n_classes, overrides)


def create_swin_small(n_classes=1000, **overrides):
    """Build Swin-S for 224 x 224 images: 49,606,258 parameters with 1,000 classes."""
    return create_variant(SwinTransformer, SWIN_VARIANTS["swin_small"], n_classes, overrides)


def create_swin_base(n_classes=1000, **overrides):
    """Build Swin-B for 224 x 224 images: 87,768,224 parameters with 1,000 classes."""
    return create_variant(SwinTransformer, SWIN_VARIANTS["swin_base"], n_classes, overrides)
