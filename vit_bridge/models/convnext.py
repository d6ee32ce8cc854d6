"""ConvNeXt, the CNN rebuilt from a ViT's ideas: Liu et al. 2022, "A ConvNet for the 2020s".

Its block stands beside the ViT's: a depthwise convolution mixes the places of each channel, where the ViT has
attention; the MLP then mixes the channels of each place. Parameters carry timm's names, but for the head.

Shapes:  B images, C channels of a map, h, w its height and width, S stride of the stem.
"""

from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from vit_bridge.errors import InputError, check_int, pair
from vit_bridge.models.convnet import check_stages
from vit_bridge.models.protocol import ImageModel
from vit_model import MLP, DropPath, LayerScale, check_images, check_positive, check_rate, drop_path_rates


class ChannelNorm(nn.LayerNorm):
    """(B, C, h, w) -> (B, C, h, w): a LayerNorm over the channels of each place."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """(B, C, h, w) -> (B, C, h, w): the block of Fig. 4. One norm and one activation, where ResNet's has three."""

    def __init__(self, channels, drop_path=0.0, layer_scale=1e-6, norm_eps=1e-6):
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)  # each channel by itself
        self.norm = nn.LayerNorm(channels, eps=norm_eps)
        self.mlp = MLP(channels, 4 * channels)
        self.ls = LayerScale(channels, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        y = self.conv_dw(x).permute(0, 2, 3, 1)  # (B, h, w, C), the places as a ViT has its tokens
        y = self.ls(self.mlp(self.norm(y)))  # (B, h, w, C)
        return x + self.drop_path(y.permute(0, 3, 1, 2))  # (B, C, h, w)


class ConvNeXtStage(nn.Module):
    """(B, C, h, w) -> (B, C', h // stride, w // stride): with stride 2 a norm and a convolution of 2 x 2, then the
    blocks. With stride 1, C = C', the blocks alone."""

    def __init__(self, in_channels, channels, stride, rates, layer_scale=1e-6, norm_eps=1e-6):
        super().__init__()
        self.downsample = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(ChannelNorm(in_channels, norm_eps),
                                            nn.Conv2d(in_channels, channels, stride, stride))
        self.blocks = nn.Sequential(*(ConvNeXtBlock(channels, rate, layer_scale, norm_eps) for rate in rates))

    def forward(self, x):
        return self.blocks(self.downsample(x))


class ConvNeXt(ImageModel):
    """(B, C, height, width) -> (B, n_classes) logits. The arguments are the fields of ConvNeXtConfig, in its order.

    A stem that cuts the image into patches, stages of blocks, each stage but the first at half the resolution of the
    one before, the mean over all places, a norm, a linear head. With its default arguments it is ConvNeXt-T.
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
        return self.config.widths[-1]

    @property
    def no_muon(self):
        """The depthwise kernels: each row is a filter by itself, and no matrix mixes its channels."""
        return tuple(name for name, _ in self.named_parameters() if name.endswith("conv_dw.weight"))

    def layers(self):
        """The stem, then the stages."""
        return [self.stem, *self.stages]

    def forward_features(self, images):
        """The last stage's map, (B, C, height / S, width / S), S = stem_stride * 2^(stages - 1), rounded down."""
        check_images(images, self.config.in_channels)
        self.config.check_size(tuple(images.shape[2:]))
        x = self.stem(images.contiguous(memory_format=torch.channels_last))  # (B, C, height / stem_stride, ...)
        for stage in self.stages:
            x = stage(x)  # half the height and width, but for the first
        return x

    def forward_head(self, x, pre_logits=False):
        """The map -> logits (B, n_classes), or with pre_logits=True what the head reads, (B, C)."""
        x = self.norm(x.mean(dim=(2, 3)))  # (B, C)
        return x if pre_logits else self.head(x)  # (B, n_classes)


@dataclass(frozen=True)
class ConvNeXtConfig:
    """All that is needed to build the model again: ConvNeXt(**vars(config)).

    img_size      the size that it is meant for, in pixels; as a CNN it takes larger and smaller ones as well
    widths        channels of each stage
    depths        blocks of each stage
    stem_stride   side of the patches that the stem cuts; 4 in the paper, less for small images
    drop_path     stochastic depth of the last block, in [0, 1); 0.1, 0.4, 0.5 and 0.5 for T, S, B and L in the paper
    layer_scale   None, or where each channel's factor on a residual branch starts
    norm_eps      added to the variance in every LayerNorm

    Raises InputError for a value out of range.
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
        for name in ("widths", "depths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_stages(self.widths, self.depths)
        check_rate("drop_path", self.drop_path)
        check_positive("norm_eps", self.norm_eps)
        if self.layer_scale is not None:
            check_positive("layer_scale", self.layer_scale)
        self.check_size(pair(self.img_size))

    def check_size(self, size):
        """Raises InputError where (height, width) leaves no place after the last stage."""
        least = self.stem_stride * 2 ** (len(self.widths) - 1)
        if min(size) < least:
            raise InputError(f"images of {size[0]}x{size[1]} pixels leave nothing after {len(self.widths)} stages; "
                             f"they need at least {least} pixels, or a smaller stem_stride, or fewer stages")


ConvNeXt.config_class = ConvNeXtConfig
