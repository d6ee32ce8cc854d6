"""The CNN on the other bank: a residual or a pooled ConvNet; and a convolution written as attention.

Shapes:  B images, C channels, N tokens, M tokens with those around the image, S total stride, k side of a kernel;
         h, w height and width of a map, C' channels of the output.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vit_bridge.errors import InputError, check_choice, check_int
from vit_bridge.models.initialisation import initialise_as_identity, initialise_convolutions
from vit_bridge.models.protocol import ImageModel
from vit_model import check_images, pair


class PooledStage(nn.Sequential):
    """(B, C, h, w) -> (B, C', h // 2, w // 2): a convolution, the largest of each 2 x 2, and `depth` convolutions more,
    each with batch norm and GELU. (Jordan 2024, Sec. 3.1 and Listing 4, without its frozen norms.)"""

    def __init__(self, in_channels, channels, depth=1):
        layers = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.MaxPool2d(2),
                  nn.BatchNorm2d(channels), nn.GELU()]
        for _ in range(depth):
            layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.GELU()]
        super().__init__(*layers)


class ResidualBlock(nn.Module):
    """(B, C, h, w) -> (B, C', h / stride, w / stride): the basic block of He et al. 2016, Fig. 2."""

    expansion = 1

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))  # (B, C', h / stride, w / stride)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))  # (B, C', h / stride, w / stride)


class BottleneckBlock(nn.Module):
    """(B, C, h, w) -> (B, 4C', h / stride, w / stride): the deeper nets' block (He et al. 2016, Fig. 5). A convolution
    of 1 x 1 narrows the map to C' channels, one of 3 x 3 works on these, and one of 1 x 1 widens it again.

    The stride is in the 3 x 3 convolution, as in torchvision; in the paper it is in the first.
    """

    expansion = 4  # channels that come out, over those inside

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.shortcut = _shortcut(in_channels, 4 * channels, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))  # (B, C', h, w)
        y = F.relu(self.bn2(self.conv2(y)))  # (B, C', h / stride, w / stride)
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))  # (B, 4C', h / stride, w / stride)


def _shortcut(in_channels, out_channels, stride):
    """The other way around a block: a projection only where the shape changes (option B of He et al. 2016)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


BLOCKS = dict(residual=ResidualBlock, bottleneck=BottleneckBlock)  # by what comes in, C' and the stride


class ConvNet(ImageModel):
    """(B, C, height, width) -> (B, n_classes) logits.

    A stem, stages, the mean over all places, a linear head. With its default arguments it is ResNet-18, number for
    number: stages of residual blocks, each stage but the first at half the resolution of the one before. With
    block="bottleneck" and depths=(3, 4, 6, 3) it is ResNet-50. With block="pooled" the stages are PooledStages on one
    convolution, for which whitening_filters are meant.
    """

    def __init__(self, img_size=224, in_channels=3, n_classes=1000, widths=(64, 128, 256, 512),
                 depths=(2, 2, 2, 2), stem_stride=4, block="residual"):
        super().__init__()
        self.config = ConvNetConfig(img_size, in_channels, n_classes, tuple(widths), tuple(depths), stem_stride, block)
        if block == "pooled":
            side = max(2, stem_stride)
            self.stem = nn.Sequential(nn.Conv2d(in_channels, 2 * in_channels * side**2, side, stem_stride), nn.GELU())
        elif stem_stride == 4:
            self.stem = nn.Sequential(nn.Conv2d(in_channels, widths[0], 7, stride=2, padding=3, bias=False),
                                      nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True),
                                      nn.MaxPool2d(3, stride=2, padding=1))
        else:
            self.stem = nn.Sequential(nn.Conv2d(in_channels, widths[0], 3, stem_stride, padding=1, bias=False),
                                      nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
        self.stages = nn.ModuleList()
        channels = self.stem[0].out_channels
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if block == "pooled":
                self.stages.append(PooledStage(channels, width, depth))
                channels = width
                continue
            make, blocks = BLOCKS[block], []
            for stride in [1 if i == 0 else 2] + [1] * (depth - 1):
                blocks.append(make(channels, width, stride))
                channels = width * make.expansion
            self.stages.append(nn.Sequential(*blocks))
        self.head = nn.Linear(channels, n_classes) if n_classes else nn.Identity()
        if block == "pooled":
            initialise_as_identity(self.stages)
        else:
            initialise_convolutions(self)

    @property
    def n_features(self):
        block = BLOCKS.get(self.config.block)
        return self.config.widths[-1] * (block.expansion if block else 1)

    def layers(self):
        """The stem, then the stages."""
        return [self.stem, *self.stages]

    def whitening_layer(self):
        return (self.stem[0], True) if self.config.block == "pooled" else None

    def forward_features(self, images):
        """The last stage's map, (B, C, height / S, width / S), S = stem_stride * 2^(stages - 1), rounded up; pooled
        stages halve once more, and round down."""
        check_images(images, self.config.in_channels)
        if self.stages[-1].training and len(images) == 1 and self.config.block != "pooled":
            stride = self.config.stem_stride * 2 ** (len(self.stages) - 1)
            if max(images.shape[2:]) <= stride:
                raise InputError(f"one image of {images.shape[2]}x{images.shape[3]} pixels leaves one place after the "
                                 f"last stage, of which no batch statistics can be taken; train with larger batches or "
                                 f"images, or in eval mode")
        x = self.stem(images.contiguous(memory_format=torch.channels_last))  # (B, C, height / stem_stride, ...)
        for stage in self.stages:
            x = stage(x)  # half the height and width, but for the first of residual blocks
        return x

    def forward_head(self, x, pre_logits=False):
        """The map -> logits (B, n_classes), or with pre_logits=True what the head reads, (B, C)."""
        x = x.mean(dim=(2, 3))  # (B, C)
        return x if pre_logits else self.head(x)  # (B, n_classes)


@dataclass(frozen=True)
class ConvNetConfig:
    """All that is needed to build the model again: ConvNet(**vars(config)).

    img_size      the size that it is meant for, in pixels; as a CNN it takes any other as well
    widths        channels of each stage; inside its bottlenecks, where four times as many come out
    depths        blocks of each stage; of a pooled one the convolutions after its pooling
    stem_stride   1 or 2: one 3 x 3 convolution, for small images; 4: ResNet's 7 x 7 convolution and max-pooling. Before
                  pooled stages a convolution of 2 x 2, 2 x 2 or 4 x 4
    block         "residual", "bottleneck" or "pooled", as ConvNet has them

    Raises InputError for a value out of range.
    """

    img_size: int | tuple[int, int] = 224
    in_channels: int = 3
    n_classes: int = 1000
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    stem_stride: int = 4
    block: str = "residual"

    def __post_init__(self):
        check_int("in_channels", self.in_channels, 1)
        check_int("n_classes", self.n_classes, 0)
        check_stages(self.widths, self.depths)
        pair(self.img_size)
        check_choice("stem_stride", self.stem_stride, (1, 2, 4))
        check_choice("block", self.block, (*BLOCKS, "pooled"))
        least = self.stem_stride * (2 ** len(self.widths) - 1) + max(2, self.stem_stride)
        if self.block == "pooled" and min(pair(self.img_size)) < least:
            raise InputError(f"img_size {self.img_size} leaves nothing after {len(self.widths)} pooled stages; they "
                             f"need at least {least} pixels, or fewer stages")


ConvNet.config_class = ConvNetConfig


def check_stages(widths, depths):
    """Raises InputError unless widths and depths hold a positive whole number for each of one or more stages."""
    if not widths or len(widths) != len(depths):
        raise InputError(f"widths {widths} and depths {depths} must be of one length, a number for each stage")
    for name, values in dict(widths=widths, depths=depths).items():
        for value in values:
            check_int(name, value, 1)


# ---- A convolution as attention ---------------------------------------------------------------------------


class ConvolutionAsAttention(nn.Module):
    """(B, C, h, w) -> (B, C', h, w): what a convolution of k x k does, done by attention between pixels.

    Every pixel is a token, and every place of the kernel a head: k k heads. A head scores a pixel by where it lies
    from the query alone, -sharpness |offset - own offset|^2, so that its softmax comes to rest on the one pixel that
    its place of the kernel lies on. Values are the pixels as they are; the projection after the heads holds the
    kernel. Around the image lie tokens of zeros, the convolution's padding: they are keys and values, never queries.
    Cordonnier, Loukas and Jaggi 2020, "On the Relationship between Self-Attention and Convolutional Layers", Theorem 1
    and Eq. 9.

    `places` (k k, 3), from which the scores are made, and `proj` are parameters: training may leave the convolution.
    """

    def __init__(self, in_channels, out_channels, kernel_size=3, sharpness=50.0):
        super().__init__()
        check_int("kernel_size", kernel_size, 1)
        if kernel_size % 2 == 0:
            raise InputError(f"kernel_size {kernel_size} has no middle; expected an odd one, such as 3")
        self.reach = kernel_size // 2
        offsets = _offsets_between((1, 1), self.reach)[0]  # (k k, 2), of the places of the kernel from its middle
        self.places = nn.Parameter(-sharpness * torch.cat([torch.ones(len(offsets), 1), -2 * offsets], dim=1))
        self.proj = nn.Linear(len(offsets) * in_channels, out_channels)

    @classmethod
    @torch.no_grad()
    def from_conv(cls, conv, sharpness=50.0):
        """The layer that equals a Conv2d. Raises InputError for one with a stride, groups, dilation or another padding
        than that which keeps the size."""
        k = conv.kernel_size[0]
        plain = dict(kernel_size=(k, k), stride=(1, 1), dilation=(1, 1), groups=1, padding=(k // 2, k // 2),
                     padding_mode="zeros")
        for name, expected in plain.items():
            if getattr(conv, name) != expected:
                raise InputError(f"a convolution with {name} {getattr(conv, name)} has no such attention; expected "
                                 f"{name} {expected}")
        layer = cls(conv.in_channels, conv.out_channels, k, sharpness)
        layer.proj.weight.copy_(conv.weight.permute(0, 2, 3, 1).flatten(1))  # (C', k k C), the heads side by side
        layer.proj.bias.copy_(torch.zeros(conv.out_channels) if conv.bias is None else conv.bias)
        return layer

    def forward(self, x, return_attention=False):
        """With return_attention=True also the maps, (k k, N, M): N pixels look at M, those of the padding included."""
        size, (left, right) = x.shape[2:], (self.reach,) * 2
        tokens = F.pad(x, (left, right, left, right)).flatten(2).transpose(1, 2)  # (B, M, C)
        offsets = _offsets_between(size, self.reach).to(x)  # (N, M, 2)
        encoding = torch.cat([offsets.square().sum(dim=2, keepdim=True), offsets], dim=2)  # (N, M, 3)
        attention = (encoding @ self.places.T).permute(2, 0, 1).softmax(dim=2)  # (k k, N, M)
        heads = attention @ tokens[:, None]  # (B, k k, N, C)
        y = self.proj(heads.transpose(1, 2).flatten(2))  # (B, N, C')
        y = y.transpose(1, 2).unflatten(2, tuple(size))  # (B, C', h, w)
        return (y, attention) if return_attention else y


def _offsets_between(size, reach):
    """(N, M, 2): rows and columns from each pixel of a map of `size` to each of the map with `reach` more around it."""
    inner = torch.cartesian_prod(*(torch.arange(side) for side in size))  # (N, 2)
    outer = torch.cartesian_prod(*(torch.arange(-reach, side + reach) for side in size))  # (M, 2)
    return (outer[None] - inner[:, None]).float()  # (N, M, 2)
