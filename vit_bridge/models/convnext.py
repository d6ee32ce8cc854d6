"""ConvNeXt, a CNN redesigned with ideas from the ViT: Liu et al. 2022, "A ConvNet for the 2020s".

Compare its block with the ViT's. A depthwise convolution takes the role of attention and mixes the positions of each
channel; the MLP then mixes the channels at each position. Parameters have timm's names, except in the layer
scale and the head.

Shapes:  B images, C channels of a map, h, w its height and width, S total stride, C' channels of the output.
"""

from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from vit_bridge.errors import InputError, check_int, pair
from vit_bridge.models.convnet import check_stages
from vit_bridge.models.protocol import ImageModel, create_variant
from vit_model import MLP, DropPath, LayerScale, check_images, check_positive, check_rate, drop_path_rates


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels at each position: (B, C, h, w) -> (B, C, h, w)."""

    def forward(self, x):
        """Return the normalised map."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """The block of Fig. 4: (B, C, h, w) -> (B, C, h, w).

    It has one norm and one activation; a bottleneck block of ResNet has three of each.

    Parameters
    ----------
    channels : int
        C.
    drop_path, layer_scale, norm_eps : optional
        As in ConvNeXtConfig.
    """

    def __init__(self, channels, drop_path=0.0, layer_scale=1e-6, norm_eps=1e-6):
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)  # one filter per channel
        self.norm = nn.LayerNorm(channels, eps=norm_eps)
        self.mlp = MLP(channels, 4 * channels)
        self.ls = LayerScale(channels, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        """Return the map after the block."""
        y = self.conv_dw(x).permute(0, 2, 3, 1)  # (B, h, w, C): each position is like a token of a ViT
        y = self.ls(self.mlp(self.norm(y)))  # (B, h, w, C)
        return x + self.drop_path(y.permute(0, 3, 1, 2))  # (B, C, h, w)


class ConvNeXtStage(nn.Module):
    """A stage: downsampling if stride > 1, then blocks; (B, C, h, w) -> (B, C', h // stride, w // stride).

    The downsampling is a norm and a stride x stride convolution. Without it, C' = C.

    Parameters
    ----------
    in_channels, channels, stride : int
        C, C' and the stride.
    rates : list of float
        Drop rate of each block.
    layer_scale, norm_eps : optional
        As in ConvNeXtConfig.
    """

    def __init__(self, in_channels, channels, stride, rates, layer_scale=1e-6, norm_eps=1e-6):
        super().__init__()
        self.downsample = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(ChannelNorm(in_channels, norm_eps),
                                            nn.Conv2d(in_channels, channels, stride, stride))
        self.blocks = nn.Sequential(*(ConvNeXtBlock(channels, rate, layer_scale, norm_eps) for rate in rates))

    def forward(self, x):
        """Return the map after the stage."""
        return self.blocks(self.downsample(x))


class ConvNeXt(ImageModel):
    """The whole model: images (B, C, height, width) -> logits (B, n_classes). By default it is ConvNeXt-T.

    A stem cuts the image into patches. Stages of blocks follow, and each stage but the first halves the resolution. The
    mean over all positions, a norm and a linear head complete the model.

    Parameters
    ----------
    *args, **options
        The fields of ConvNeXtConfig, in order.

    Raises
    ------
    InputError
        If an argument is out of range, or if the images do not fit the model.
    """

    def __init__(self, *args, **options):
        super().__init__()
        self.config = c = ConvNeXtConfig(*args, **options)
        self.stem = nn.Sequential(nn.Conv2d(c.in_channels, c.widths[0], c.stem_stride, c.stem_stride),
                                  ChannelNorm(c.widths[0], c.norm_eps))
        rates = iter(drop_path_rates(c.drop_path, sum(c.depths)))
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(c.widths, c.depths, strict=True)):
            self.stages.append(ConvNeXtStage(c.widths[max(i - 1, 0)], width, 1 if i == 0 else 2,
                                             list(islice(rates, depth)), c.layer_scale, c.norm_eps))
        self.norm = nn.LayerNorm(c.widths[-1], eps=c.norm_eps)
        self.head = nn.Linear(c.widths[-1], c.n_classes) if c.n_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def n_features(self):
        """C, the width of the head's input."""
        return self.config.widths[-1]

    @property
    def no_muon(self):
        """The depthwise kernels: each row is a filter of its own, and no matrix mixes the channels."""
        return tuple(name for name, _ in self.named_parameters() if name.endswith("conv_dw.weight"))

    def whitening_layer(self):
        """Return the layer to whiten, and whether it holds each filter together with its negative."""
        return self.stem[0], False

    def layers(self):
        """Return the stem and the stages, in order."""
        return [self.stem, *self.stages]

    def forward_features(self, images):
        """Return the map of the last stage, (B, C, height / S, width / S).

        S = stem_stride * 2^(stages - 1), and sizes are rounded down.
        """
        check_images(images, self.config.in_channels)
        self.config.check_size(tuple(images.shape[2:]))
        x = self.stem(images.contiguous(memory_format=torch.channels_last))  # (B, C, height / stem_stride, ...)
        for stage in self.stages:
            x = stage(x)  # halves height and width, except the first
        return x

    def forward_head(self, x, pre_logits=False):
        """Return the logits (B, n_classes) of the map, or with pre_logits=True the head's input (B, C)."""
        x = self.norm(x.mean(dim=(2, 3)))  # (B, C)
        return x if pre_logits else self.head(x)  # (B, n_classes)


@dataclass(frozen=True)
class ConvNeXtConfig:
    """Everything needed to rebuild a model: ConvNeXt(**vars(config)).

    Parameters
    ----------
    img_size : int or (int, int)
        The size, in pixels, for which the model is meant. A CNN also accepts other sizes.
    in_channels, n_classes : int
        Channels of an image, and number of logits. With 0 classes the model has no head and returns the pooled
        features.
    widths, depths : tuple of int
        Channels of each stage, and blocks in each stage.
    stem_stride : int
        Side of the patches that the stem cuts. It is 4 in the paper; smaller patches suit small images.
    drop_path : float
        Stochastic depth: the drop rate of the last block, in [0, 1). The paper uses 0.1, 0.4, 0.5 and 0.5 for T, S, B
        and L (Liu et al. 2022, Table 5).
    layer_scale : float or None
        Initial value of a learned factor on each channel of a residual branch. None omits the factors.
    norm_eps : float
        Added to the variance in every LayerNorm.

    Raises
    ------
    InputError
        If a value is out of range.
    """

    img_size: int | tuple[int, int] = 224
    in_channels: int = 3
    n_classes: int = 1000
    widths: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    stem_stride: int = 4
    drop_path: float = 0.0
    layer_scale: float | None = 1e-6
    norm_eps: float = 1e-6

    def __post_init__(self):
        check_int("in_channels", self.in_channels, 1)
        check_int("n_classes", self.n_classes, 0)
        check_int("stem_stride", self.stem_stride, 1)
        check_stages(widths=self.widths, depths=self.depths)
        for name in ("widths", "depths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_rate("drop_path", self.drop_path)
        check_positive("norm_eps", self.norm_eps)
        if self.layer_scale is not None:
            check_positive("layer_scale", self.layer_scale)
        self.check_size(pair(self.img_size))

    def check_size(self, size):
        """Raise InputError if images of this (height, width) are too small for the stages."""
        least = self.stem_stride * 2 ** (len(self.widths) - 1)
        if min(size) < least:
            raise InputError(f"images of {size[0]}x{size[1]} pixels are too small for {len(self.widths)} stages; use "
                             f"at least {least} pixels, a smaller stem_stride, or fewer stages")


ConvNeXt.config_class = ConvNeXtConfig

# Tiny to Large come from Sec. 3 of the paper. Nano is our own, for 32-pixel images on a laptop.
CONVNEXT_VARIANTS = {
    "convnext_nano": ConvNeXtConfig(img_size=32, widths=(36, 72, 144), depths=(2, 2, 2), stem_stride=2),
    "convnext_tiny": ConvNeXtConfig(),
    "convnext_small": ConvNeXtConfig(depths=(3, 3, 27, 3)),
    "convnext_base": ConvNeXtConfig(widths=(128, 256, 512, 1024), depths=(3, 3, 27, 3)),
    "convnext_large": ConvNeXtConfig(widths=(192, 384, 768, 1536), depths=(3, 3, 27, 3)),
}


def create_convnext_nano(n_classes=1000, **overrides):
    """Build ConvNeXt-nano/2 for 32 x 32 images: 3 stages of 2 blocks, with 36, 72 and 144 channels."""
    return create_variant(ConvNeXt, CONVNEXT_VARIANTS["convnext_nano"], n_classes, overrides)


def create_convnext_tiny(n_classes=1000, **overrides):
    """Build ConvNeXt-T for 224 x 224 images: 28,589,128 parameters with 1,000 classes."""
    return create_variant(ConvNeXt, CONVNEXT_VARIANTS["convnext_tiny"], n_classes, overrides)


def create_convnext_small(n_classes=1000, **overrides):
    """Build ConvNeXt-S for 224 x 224 images: 50,223,688 parameters with 1,000 classes."""
    return create_variant(ConvNeXt, CONVNEXT_VARIANTS["convnext_small"], n_classes, overrides)


def create_convnext_base(n_classes=1000, **overrides):
    """Build ConvNeXt-B for 224 x 224 images: 88,591,464 parameters with 1,000 classes."""
    return create_variant(ConvNeXt, CONVNEXT_VARIANTS["convnext_base"], n_classes, overrides)
