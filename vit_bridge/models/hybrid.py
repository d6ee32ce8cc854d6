"""The hybrid: a ViT whose tokens come from a small stack of convolutions.

Shapes:  B images, C channels, P patch side, N tokens, D width (embed_dim)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from vit_bridge.errors import InputError, check_choice
from vit_bridge.models.convnet import PooledStage
from vit_bridge.models.initialisation import initialise_convolutions
from vit_model import VisionTransformer, ViTConfig, check_images, grid_of, pair


class ConvStem(nn.Module):
    """(B, C, height, width) -> (B, N, D), instead of PatchEmbedding: one token for P x P pixels, too.

    log2(P) convolutions of 3 x 3 and stride 2, the channels doubling up to D; batch norm and ReLU between them.
    Neighbouring tokens overlap: each sees (2P - 1) x (2P - 1) pixels.
    """

    def __init__(self, img_size=224, patch_size=16, in_channels=3, embed_dim=384):
        super().__init__()
        self.img_size, self.patch_size, self.in_channels = pair(img_size), pair(patch_size, "patch_size"), in_channels
        n_convs = _halvings(patch_size, self.patch_size)
        if embed_dim % 2 ** (n_convs - 1):
            raise InputError(f"embed_dim {embed_dim} cannot be halved {n_convs - 1} times, which the stem for "
                             f"patch_size {patch_size} does; choose a multiple of {2 ** (n_convs - 1)}")
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
        check_images(images, self.in_channels, None if self.any_size else self.img_size)
        x = self.proj(images)  # (B, D, height / P, width / P)
        return x.flatten(2).transpose(1, 2)  # (B, N, D)


def _halvings(given, patch_size):
    """log2(P) of a patch size, (P, P). Raises InputError, naming what was given, for one that halving cannot reach."""
    side = patch_size[0]
    if patch_size[1] != side or side < 2 or side & (side - 1):
        raise InputError(f"patch_size {given} cannot be reached by halving; a convolutional stem takes 2, 4, 8, 16 or "
                         f"32")
    return side.bit_length() - 1


class PooledStem(nn.Module):
    """(B, C, height, width) -> (B, N, D), instead of PatchEmbedding: the first layers of a pooled ConvNet.

    A convolution of 2 x 2, for which whitening_filters are meant, and log2(P) stages, the channels doubling; where the
    last stage is narrower than D a 1 x 1 convolution widens it.

    channels   of the first stage
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
        check_images(images, self.in_channels, None if self.any_size else self.img_size)
        x = F.pad(images.contiguous(memory_format=torch.channels_last), (0, 1, 0, 1))  # (B, C, height + 1, width + 1)
        x = F.gelu(self.whiten(x))  # (B, 8C, height, width)
        for stage in self.stages:
            x = stage(x)  # half the height and width
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, D)


STEMS = dict(strided=ConvStem, pooled=PooledStem)


class HybridCNNViT(VisionTransformer):
    """(B, C, height, width) -> (B, n_classes) logits: a convolutional stem, then VisionTransformer as it is.

    stem: "strided" (ConvStem) or "pooled" (PooledStem). n_heads=None means one head for every 64 channels, as
    throughout Table 1 of the ViT paper. `options` are the other fields of ViTConfig. Raises InputError as
    VisionTransformer and the stems do.
    """

    def __init__(self, n_classes=1000, embed_dim=384, depth=6, n_heads=None, img_size=224, patch_size=16,
                 in_channels=3, stem="strided", **options):
        if n_heads is None:
            n_heads = max(1, embed_dim // 64)
        super().__init__(img_size, patch_size, in_channels, n_classes, embed_dim, depth, n_heads, **options)
        self.config = HybridConfig(**vars(self.config), stem=stem)
        self.patch_embed = STEMS[stem](img_size, patch_size, in_channels, embed_dim)

    def whitening_layer(self):
        return (self.patch_embed.whiten, True) if self.config.stem == "pooled" else None


@dataclass(frozen=True)
class HybridConfig(ViTConfig):
    """All that is needed to build the model again: HybridCNNViT(**vars(config)).

    stem   what makes the tokens: "strided" or "pooled", as HybridCNNViT has them
    """

    stem: str = "strided"

    def __post_init__(self):
        super().__post_init__()
        check_choice("stem", self.stem, tuple(STEMS))


HybridCNNViT.config_class = HybridConfig
