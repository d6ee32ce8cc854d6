"""Two steps away from the Vision Transformer, towards the CNN.

HybridCNNViT    a ViT whose tokens come from a small stack of convolutions (Sec. 3.1 of the ViT paper, "Hybrid
                Architecture"; the stack is that of Xiao et al. 2021, "Early Convolutions Help Transformers See
                Better", less its last 1 x 1 convolution)
ConvNet         a residual network (He et al. 2016): convolutions from the first pixel to the last feature

Both have the forward_features / forward_head / head / config of VisionTransformer.

Letters:  B images, C channels, P patch side, N tokens, D width (embed_dim), S total stride of a ConvNet.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from vit_model import InputError, VisionTransformer, check_choice, check_images, check_whole, grid_of, pair


class ConvStem(nn.Module):
    """(B, C, height, width) -> (B, N, D), in the place of PatchEmbedding, one token for P x P pixels as there.

    log2(P) convolutions of 3 x 3 and stride 2, the channels doubling up to D; batch norm and ReLU between them.
    Neighbouring tokens overlap: each sees (2P - 1) x (2P - 1) pixels.
    """

    def __init__(self, img_size=224, patch_size=16, in_channels=3, embed_dim=384):
        super().__init__()
        self.img_size, self.patch_size, self.in_channels = pair(img_size), pair(patch_size, "patch_size"), in_channels
        side = self.patch_size[0]
        if self.patch_size[1] != side or side < 2 or side & (side - 1):
            raise InputError(f"patch_size {patch_size} cannot be reached by halving; a convolutional stem takes "
                             f"2, 4, 8, 16 or 32")
        n_convs = side.bit_length() - 1
        if embed_dim % 2 ** (n_convs - 1):
            raise InputError(f"embed_dim {embed_dim} cannot be halved {n_convs - 1} times, which the stem for "
                             f"patch_size {side} does; choose a multiple of {2 ** (n_convs - 1)}")
        self.grid_size = grid_of(self.img_size, self.patch_size)
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
        check_images(images, self.in_channels, self.img_size)
        x = self.proj(images)  # (B, D, height / P, width / P)
        return x.flatten(2).transpose(1, 2)  # (B, N, D)


class HybridCNNViT(VisionTransformer):
    """(B, C, height, width) -> (B, n_classes) logits: ConvStem, then VisionTransformer as it is.

    n_heads=None means one head for every 64 channels, as throughout Table 1 of the ViT paper. `options` are the
    other fields of ViTConfig. Raises InputError as VisionTransformer and ConvStem do.
    """

    def __init__(self, n_classes=1000, embed_dim=384, depth=6, n_heads=None, img_size=224, patch_size=16,
                 in_channels=3, **options):
        if n_heads is None:
            n_heads = max(1, embed_dim // 64)
        super().__init__(img_size, patch_size, in_channels, n_classes, embed_dim, depth, n_heads, **options)
        self.patch_embed = ConvStem(img_size, patch_size, in_channels, embed_dim)


class ResidualBlock(nn.Module):
    """(B, C, h, w) -> (B, C', h / stride, w / stride): the basic block of He et al. 2016, Fig. 2."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride > 1 or in_channels != channels:  # projection shortcut, option B of He et al.
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                                          nn.BatchNorm2d(channels))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))  # (B, C', h / stride, w / stride)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))  # (B, C', h / stride, w / stride)


class ConvNet(nn.Module):
    """(B, C, height, width) -> (B, n_classes) logits.

    A stem, stages of residual blocks, each stage but the first at half the resolution of the one before, the
    mean over all places, a linear head. With its default arguments it is ResNet-18, number for number.
    """

    def __init__(self, img_size=224, in_channels=3, n_classes=1000, widths=(64, 128, 256, 512),
                 depths=(2, 2, 2, 2), stem_stride=4):
        super().__init__()
        self.config = ConvNetConfig(img_size, in_channels, n_classes, tuple(widths), tuple(depths), stem_stride)
        if stem_stride == 4:
            self.stem = nn.Sequential(nn.Conv2d(in_channels, widths[0], 7, stride=2, padding=3, bias=False),
                                      nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True),
                                      nn.MaxPool2d(3, stride=2, padding=1))
        else:
            self.stem = nn.Sequential(nn.Conv2d(in_channels, widths[0], 3, stem_stride, padding=1, bias=False),
                                      nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
        self.stages = nn.ModuleList()
        channels = widths[0]
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            strides = [1 if i == 0 else 2] + [1] * (depth - 1)
            self.stages.append(nn.Sequential(*(ResidualBlock(channels if j == 0 else width, width, stride)
                                               for j, stride in enumerate(strides))))
            channels = width
        self.head = nn.Linear(channels, n_classes) if n_classes else nn.Identity()
        initialise_convolutions(self)

    def forward(self, images):
        return self.forward_head(self.forward_features(images))  # (B, n_classes)

    def forward_features(self, images):
        """The last stage's map, (B, C, height / S, width / S), S = stem_stride * 2^(stages - 1), rounded up."""
        check_images(images, self.config.in_channels)
        x = self.stem(images)  # (B, widths[0], height / stem_stride, width / stem_stride)
        for stage in self.stages:
            x = stage(x)  # half the height and width from the second stage on
        return x

    def forward_head(self, x, pre_logits=False):
        """The map -> logits (B, n_classes), or with pre_logits=True what the head reads, (B, C)."""
        x = x.mean(dim=(2, 3))  # (B, C)
        return x if pre_logits else self.head(x)  # (B, n_classes)


@dataclass(frozen=True)
class ConvNetConfig:
    """All that is needed to build the model again: ConvNet(**vars(config)).

    img_size      the size that it is meant for, in pixels; as a CNN it takes any other as well
    widths        channels of each stage
    depths        residual blocks of each stage
    stem_stride   1 or 2: one 3 x 3 convolution, for small images; 4: ResNet's 7 x 7 convolution and max-pooling

    Raises InputError for a value out of range.
    """

    img_size: int | tuple[int, int] = 224
    in_channels: int = 3
    n_classes: int = 1000
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    stem_stride: int = 4

    def __post_init__(self):
        check_whole("in_channels", self.in_channels, 1)
        check_whole("n_classes", self.n_classes, 0)
        if not self.widths or len(self.widths) != len(self.depths):
            raise InputError(f"widths {self.widths} and depths {self.depths} must be of one length, a number for "
                             f"each stage")
        for name in ("widths", "depths"):
            for value in getattr(self, name):
                check_whole(name, value, 1)
        pair(self.img_size)
        check_choice("stem_stride", self.stem_stride, (1, 2, 4))


def initialise_convolutions(model):
    """He-normal convolutions (fan-out), as torchvision's ResNet; all else as torch makes it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
