"""The hybrid: a ViT whose tokens come from a small stack of convolutions.

Shapes:  B images, C channels, P patch side, N tokens, D width (embed_dim).
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from vit_bridge.errors import InputError, check_choice
from vit_bridge.models.convnet import PooledStage
from vit_bridge.models.initialisation import initialise_convolutions
from vit_model import VisionTransformer, ViTConfig, check_images, grid_of, pair


class ConvStem(nn.Module):
    """A stem of strided convolutions that replaces PatchEmbedding: (B, C, height, width) -> (B, n_patches, D).

    It has log2(P) 3 x 3 convolutions with stride 2, so there is still one token for every P x P pixels. The channels
    double up to D, with batch norm and ReLU in between. Neighbouring tokens overlap: each sees (2P - 1) x (2P - 1)
    pixels.

    Parameters
    ----------
    img_size, patch_size : int or (int, int), optional
        Side, or (height, width), in pixels. P must be 2, 4, 8, 16 or 32.
    in_channels, embed_dim : int, optional
        C and D.
    """

    def __init__(self, img_size=224, patch_size=16, in_channels=3, embed_dim=384):
        super().__init__()
        self.img_size, self.patch_size, self.in_channels = pair(img_size), pair(patch_size, "patch_size"), in_channels
        n_convs = _halvings(patch_size, self.patch_size)
        if embed_dim % 2 ** (n_convs - 1):
            raise InputError(f"embed_dim {embed_dim} cannot be halved {n_convs - 1} times, as the stem for "
                             f"patch_size {patch_size} requires; choose a multiple of {2 ** (n_convs - 1)}")
        self.grid_size, self.any_size = grid_of(self.img_size, self.patch_size), False
        self.n_patches = self.grid_size[0] * self.grid_size[1]
        layers = []
        for i in reversed(range(n_convs)):
            channels, is_last = embed_dim >> i, i == 0
            layers.append(nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=is_last))
            if not is_last:
                layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            in_channels = channels
        self.proj = nn.Sequential(*layers)
        initialise_convolutions(self)

    def forward(self, images):
        """Return the tokens of images (B, C, height, width)."""
        check_images(images, self.in_channels, None if self.any_size else self.img_size)
        x = self.proj(images)  # (B, D, height / P, width / P)
        return x.flatten(2).transpose(1, 2)  # (B, n_patches, D)


def _halvings(given, patch_size):
    """Return log2(P) of a patch size (P, P). Raises InputError if P is not a power of two."""
    side = patch_size[0]
    if patch_size[1] != side or side < 2 or side & (side - 1):
        raise InputError(f"patch_size {given} cannot be reached by halving; a convolutional stem needs a side of 2, 4, "
                         f"8, 16 or 32")
    return side.bit_length() - 1


class PooledStem(nn.Module):
    """A stem of pooled stages that replaces PatchEmbedding: (B, C, height, width) -> (B, n_patches, D).

    It consists of the first layers of a pooled ConvNet: a 2 x 2 convolution, which is meant for whitening_filters,
    and log2(P) stages whose channels double. A 1 x 1 convolution then sets the width to D.

    Parameters
    ----------
    img_size, patch_size, in_channels, embed_dim : optional
        As in ConvStem.
    channels : int, optional
        Channels of the first stage.
    """

    def __init__(self, img_size=224, patch_size=16, in_channels=3, embed_dim=384, channels=32):
        super().__init__()
        self.img_size, self.patch_size, self.in_channels = pair(img_size), pair(patch_size, "patch_size"), in_channels
        n_stages = _halvings(patch_size, self.patch_size)
        self.grid_size, self.any_size = grid_of(self.img_size, self.patch_size), False
        self.n_patches = self.grid_size[0] * self.grid_size[1]
        self.whiten = nn.Conv2d(in_channels, 2 * in_channels * 4, 2)
        widths = [self.whiten.out_channels, *(channels << i for i in range(n_stages))]
        self.stages = nn.ModuleList(PooledStage(*two) for two in pairwise(widths))
        self.proj = nn.Conv2d(widths[-1], embed_dim, 1)
        initialise_convolutions(self)

    def forward(self, images):
        """Return the tokens of images (B, C, height, width)."""
        return self.forward_map(images).flatten(2).transpose(1, 2)  # (B, n_patches, D)

    def forward_map(self, images):
        """Return the tokens as a map, (B, D, height / P, width / P)."""
        check_images(images, self.in_channels, None if self.any_size else self.img_size)
        x = F.pad(images.contiguous(memory_format=torch.channels_last), (0, 1, 0, 1))  # (B, C, height + 1, width + 1)
        x = F.gelu(self.whiten(x))  # (B, 8C, height, width)
        for stage in self.stages:
            x = stage(x)  # halves height and width
        return self.proj(x)  # (B, D, height / P, width / P)


STEMS = dict(strided=ConvStem, pooled=PooledStem)


class HybridCNNViT(VisionTransformer):
    """A convolutional stem, then a VisionTransformer: images (B, C, height, width) -> logits (B, n_classes).

    Parameters
    ----------
    n_classes, embed_dim, depth, img_size, patch_size, in_channels : optional
        As in ViTConfig, with smaller defaults.
    n_heads : int, optional
        By default one head for every 64 channels, as in ViT-Base and ViT-Large.
    stem : {"strided", "pooled"}, optional
        The layers that produce the tokens: ConvStem or PooledStem.
    **options
        Other fields of ViTConfig.

    Raises
    ------
    InputError
        If an argument is out of range, or if the images do not fit the model.

    Examples
    --------
    >>> model = HybridCNNViT(n_classes=10, embed_dim=384, depth=6)
    >>> model(torch.randn(1, 3, 224, 224)).shape
    torch.Size([1, 10])
    """

    def __init__(self, n_classes=1000, embed_dim=384, depth=6, n_heads=None, img_size=224, patch_size=16,
                 in_channels=3, stem="strided", **options):
        if n_heads is None:
            n_heads = max(1, embed_dim // 64)
        super().__init__(img_size, patch_size, in_channels, n_classes, embed_dim, depth, n_heads, **options)
        self.config = replace(self.config, stem=stem)
        self.patch_embed = STEMS[stem](img_size, patch_size, in_channels, embed_dim)

    def whitening_layer(self):
        """Return None, or the layer to whiten and whether it holds each filter with its negative."""
        return (self.patch_embed.whiten, True) if self.config.stem == "pooled" else None


@dataclass(frozen=True)
class HybridConfig(ViTConfig):
    """Everything needed to rebuild a model: HybridCNNViT(**vars(config)).

    It has the fields of ViTConfig, and `stem`, {"strided", "pooled"}, as in HybridCNNViT.
    """

    stem: str = "strided"

    def __post_init__(self):
        super().__post_init__()
        check_choice("stem", self.stem, tuple(STEMS))


HybridCNNViT.config_class = HybridConfig
