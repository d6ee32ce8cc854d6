"""Swin, a ViT with the locality and the stages of a CNN: Liu et al. 2021, "Swin Transformer".

Attention stays within windows, so its cost grows with the number of tokens and not with its square (Eq. 1 and 2). In
every second block the windows are shifted by half their side, and tokens of neighbouring windows meet. Between stages,
2 x 2 neighbouring tokens merge into one that is twice as wide, as a CNN halves its resolution.

Parameters have timm's names, with three exceptions: `stages` is `layers` in timm, `patch_norm` is `patch_embed.norm`,
and `head` is `head.fc`.

Shapes:  B images, C channels of an image, D channels of a map (embed_dim, doubled in each stage), h, w height and width
         of a map in tokens, h', w' the same with padding, W windows, M tokens of a window, H heads, K = D / H width of
         a head.
"""

from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from vit_bridge.errors import InputError, check_choice, check_int, pair
from vit_bridge.models.convnet import check_stages
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
    """Cut a map into windows of (rows, columns), row by row: (B, h, w, D) -> (B, W, M, D). They must fit exactly."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))  # (B, h / rows, rows, w / columns, columns, D)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, W, M, D)


def join_windows(windows, window, size):
    """Undo split_windows: (B, W, M, D) -> (B, h, w, D), with size (h, w)."""
    x = windows.unflatten(2, window).unflatten(1, (size[0] // window[0], size[1] // window[1]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, h, w, D)


def shift_mask(size, window, shift, device=None):
    """Return what is added to the scores of a rolled map: (W, M, M), -inf for tokens that must not meet, else 0.

    The roll moves the first rows to the end, where they share windows with the last rows, and the same happens to the
    columns. Tokens from opposite edges of the map must not attend to each other.
    """
    rows, columns = (torch.arange(side, device=device) >= side - by for side, by in zip(size, shift, strict=True))
    edges = 2 * rows[:, None] + columns  # (h, w): whether the row and the column come from the opposite edge
    edges = split_windows(edges[None, :, :, None], window)[0, :, :, 0]  # (W, M)
    apart = edges[:, :, None] != edges[:, None]  # (W, M, M)
    return torch.zeros(apart.shape, device=device).masked_fill(apart, -torch.inf)


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
        """Return the map (B, h, w, D), and with return_attention also A (B, W, H, M, M), whose rows sum to one.

        n_query_tokens is always None here: every token of a map is needed.
        """
        size, window = x.shape[1:3], self.grid_size
        x = F.pad(x, (0, 0, 0, -size[1] % window[1], 0, -size[0] % window[0]))  # (B, h', w', D)
        padded, shift = x.shape[1:3], self.shift_in(size)
        if any(shift):
            x = x.roll([-by for by in shift], dims=(1, 2))
        x = split_windows(x, window)  # (B, W, M, D)
        n_windows = x.shape[1]
        qkv = self.qkv(x).unflatten(3, (3, self.n_heads, -1))  # (B, W, M, 3, H, K)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # 3 x (B, W H, M, K)
        mask = shift_mask(padded, window, shift, x.device).to(x.dtype) if any(shift) else None  # (W, M, M)
        heads, attention = attend(q, k, v, return_attention, self.window_bias(n_windows, mask))
        x = heads.unflatten(1, (n_windows, -1)).transpose(2, 3).flatten(3)  # (B, W, M, D), the heads concatenated
        x = join_windows(self.dropout(self.proj(x)), window, padded)  # (B, h', w', D)
        if any(shift):
            x = x.roll(shift, dims=(1, 2))
        x = x[:, :size[0], :size[1]]  # (B, h, w, D)
        return (x, attention.unflatten(1, (n_windows, -1))) if return_attention else x

    def window_bias(self, n_windows, mask):
        """Return what is added to the scores, (W H, M, M): the heads' bias plus the windows' mask, or None."""
        bias = self.bias()  # (H, M, M)
        if mask is not None:
            bias = mask[:, None] if bias is None else bias + mask[:, None]  # (W, 1, M, M), or (W, H, M, M)
        return None if bias is None else bias.expand(n_windows, self.n_heads, -1, -1).flatten(0, 1)  # (W H, M, M)

    def shift_in(self, size):
        """Return the shift for a map of this (height, width): 0 along a side that one window covers."""
        return [by if length < side else 0 for by, length, side in zip(self.shift, self.grid_size, size, strict=True)]


def spread_windows(maps, window, shift, size, pads_first=True):
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
    pads_first : bool, optional
        As in window_places.
    """
    places = window_places(size, window, shift, pads_first).to(maps.device)  # (W, M)
    n = size[0] * size[1]  # the number of tokens, and the place of padding
    whole = maps.new_zeros(len(maps), maps.shape[2], n + 1, n + 1)
    whole[:, :, places[:, :, None], places[:, None]] = maps.transpose(1, 2)  # (B, H, W, M, M)
    return whole[:, :, :n, :n]


def window_places(size, window, shift, pads_first=True):
    """Return which token of a map is at each place of each window, (W, M): row by row, and h w for padding.

    With pads_first=False the map is rolled before it is padded, as in timm.
    """
    pad = (0, -size[1] % window[1], 0, -size[0] % window[0])
    places, back = torch.arange(size[0] * size[1]).view(*size), [-by for by in shift]
    places = places if pads_first else places.roll(back, dims=(0, 1))
    places = F.pad(places, pad, value=size[0] * size[1])
    places = places.roll(back, dims=(0, 1)) if pads_first else places
    return split_windows(places[None, :, :, None], window)[0, :, :, 0]  # (W, M)


# ---- The model --------------------------------------------------------------------------------------------


class SwinBlock(TransformerBlock):
    """An encoder block whose attention stays within windows: (B, h, w, D) -> (B, h, w, D), Eq. 3.

    Parameters
    ----------
    embed_dim, n_heads, window, shift
        As in WindowAttention.
    relative_bias : optional
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
            D, shifts = c.embed_dim * 2**i, [(0, 0), tuple(side // 2 for side in window) if c.shift else (0, 0)]
            blocks = [SwinBlock(D, n_heads, window, shifts[j % 2], c.mlp_ratio, c.dropout, rate, c.norm_eps,
                                c.relative_bias) for j, rate in enumerate(islice(rates, depth))]
            self.stages.append(SwinStage(PatchMerging(D // 2, c.norm_eps) if i else nn.Identity(), blocks))
        self.norm = nn.LayerNorm(self.n_features, eps=c.norm_eps)
        self.head = nn.Linear(self.n_features, c.n_classes) if c.n_classes else nn.Identity()
        for module in self.modules():  # as in the paper's code
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    windowed = True

    @property
    def n_features(self):
        """The width of the head's input: D of the last stage."""
        return self.config.embed_dim * 2 ** (len(self.config.depths) - 1)

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
        Side, or (height, width), of a window, in tokens. In a stage where the map of an image of img_size is shorter or
        narrower, the window has the height or the width of the map.
    mlp_ratio : float
        Hidden width of the MLP, divided by D.
    dropout, drop_path : float
        As in ViTConfig. The paper uses a drop_path of 0.2, 0.3 and 0.5 for T, S and B.
    norm_eps : float
        Added to the variance in every LayerNorm.
    shift : bool
        Whether every second block shifts its windows.
    relative_bias : bool
        Whether attention learns a bias for each offset. Table 4 of the paper measures what shift and relative_bias add.

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
        check_stages(depths=self.depths, n_heads=self.n_heads)
        for name in ("depths", "n_heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for i, n_heads in enumerate(self.n_heads):
            head_width(self.embed_dim * 2**i, n_heads)
        for name in ("dropout", "drop_path"):
            check_rate(name, getattr(self, name))
        for name in ("mlp_ratio", "norm_eps"):
            check_positive(name, getattr(self, name))
        if self.embed_dim * self.mlp_ratio < 1:
            raise InputError(f"mlp_ratio {self.mlp_ratio} leaves no hidden unit; expected a positive number such as 4")
        for name in ("shift", "relative_bias"):
            check_choice(name, getattr(self, name), (True, False))
        self.windows()

    def windows(self):
        """Return the (height, width) of the windows of each stage, in tokens."""
        grid = grid_of(pair(self.img_size), pair(self.patch_size, "patch_size"))
        window = pair(self.window_size, "window_size")
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
