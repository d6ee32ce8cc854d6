"""The CNN that the ViT is compared with: ConvNet, with residual, bottleneck or pooled stages.

ConvolutionAsAttention computes a convolution by attention.

Shapes:  B images, C channels, N tokens, M tokens including the padding around the image, S total stride,
         k side of a kernel; h, w height and width of a map, C' channels of the output.
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
    """A stage of a pooled ConvNet: (B, C, h, w) -> (B, C', h // 2, w // 2).

    It consists of a convolution, 2 x 2 max-pooling, and `depth` more convolutions. Batch norm and GELU follow the
    pooling and each later convolution.

    Parameters
    ----------
    in_channels, channels : int
        C and C'.
    depth : int, optional
        Convolutions after the pooling.

    References
    ----------
    Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", Sec. 3.1 and Listing 4, without its frozen norms.
    """

    def __init__(self, in_channels, channels, depth=1):
        layers = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.MaxPool2d(2),
                  nn.BatchNorm2d(channels), nn.GELU()]
        for _ in range(depth):
            layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.GELU()]
        super().__init__(*layers)


class ResidualBlock(nn.Module):
    """The basic block of ResNet: (B, C, h, w) -> (B, C', h / stride, w / stride).

    Parameters
    ----------
    in_channels, channels : int
        C and C'.
    stride : int
        Stride of the first convolution.

    References
    ----------
    He et al. 2016, "Deep Residual Learning for Image Recognition", Fig. 2.
    """

    expansion = 1

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x):
        """Return the map after the block."""
        y = F.relu(self.bn1(self.conv1(x)))  # (B, C', h / stride, w / stride)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))  # (B, C', h / stride, w / stride)


class BottleneckBlock(nn.Module):
    """The block of deeper ResNets: (B, C, h, w) -> (B, 4C', h / stride, w / stride).

    A 1 x 1 convolution narrows the map to C' channels, a 3 x 3 convolution works on them, and a second 1 x 1
    convolution widens the map again. The stride is in the 3 x 3 convolution, as in torchvision; in the paper it is in
    the first.

    Parameters
    ----------
    in_channels, channels : int
        C and C'.
    stride : int
        Stride of the 3 x 3 convolution.

    References
    ----------
    He et al. 2016, "Deep Residual Learning for Image Recognition", Fig. 5.
    """

    expansion = 4  # output channels over inner channels

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
        """Return the map after the block."""
        y = F.relu(self.bn1(self.conv1(x)))  # (B, C', h, w)
        y = F.relu(self.bn2(self.conv2(y)))  # (B, C', h / stride, w / stride)
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))  # (B, 4C', h / stride, w / stride)


def _shortcut(in_channels, out_channels, stride):
    """Return a block's shortcut, with a projection only if the shape changes (He et al. 2016, option B)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return Projection(in_channels, out_channels, stride)


class Projection(nn.Sequential):
    """A 1 x 1 convolution with a stride, and batch normalisation: (B, C, h, w) -> (B, C', h / stride, w / stride).

    It takes the positions before the convolution. With a stride, the backward pass of torch's own 1 x 1 convolution on
    fewer than 8 channels can write outside its memory on a CPU (github.com/uxlfoundation/oneDNN/issues/6035).
    """

    def __init__(self, in_channels, out_channels, stride):
        super().__init__(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.stride = stride

    def forward(self, x):
        """Return the map of every stride-th position."""
        return super().forward(x[:, :, ::self.stride, ::self.stride])


BLOCKS = dict(residual=ResidualBlock, bottleneck=BottleneckBlock)


class ConvNet(ImageModel):
    """A CNN: images (B, C, height, width) -> logits (B, n_classes).

    It has a stem, stages, the mean over all positions and a linear head. By default it is ResNet-18 and computes the
    same as torchvision's: it has stages of residual blocks, and each stage but the first halves the resolution. With
    block="bottleneck" and depths=(3, 4, 6, 3) it is ResNet-50. With block="pooled" it consists of PooledStages
    after one convolution, which is meant for whitening_filters.

    Parameters
    ----------
    img_size, in_channels, n_classes, widths, depths, stem_stride, block : optional
        As in ConvNetConfig.

    Raises
    ------
    InputError
        If an argument is out of range, or if the images do not fit the model.
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
        """Return the stem and the stages, in order."""
        return [self.stem, *self.stages]

    def whitening_layer(self):
        return (self.stem[0], True) if self.config.block == "pooled" else None

    def forward_features(self, images):
        """Return the map of the last stage, (B, C, height / S, width / S).

        S = stem_stride * 2^(stages - 1), and sizes are rounded up. Pooled stages halve the map once more and round
        down.
        """
        check_images(images, self.config.in_channels)
        if self.stages[-1].training and len(images) == 1 and self.config.block != "pooled":
            stride = self.config.stem_stride * 2 ** (len(self.stages) - 1)
            if max(images.shape[2:]) <= stride:
                raise InputError(f"one image of {images.shape[2]}x{images.shape[3]} pixels leaves one value per "
                                 f"channel after the last stage, too few for batch normalisation; use larger batches "
                                 f"or images, or eval mode")
        x = self.stem(images.contiguous(memory_format=torch.channels_last))  # (B, C, height / stem_stride, ...)
        for stage in self.stages:
            x = stage(x)  # halves height and width; a first stage of residual blocks keeps them
        return x

    def forward_head(self, x, pre_logits=False):
        """Return the logits (B, n_classes) of the map, or with pre_logits=True the head's input (B, C)."""
        x = x.mean(dim=(2, 3))  # (B, C)
        return x if pre_logits else self.head(x)  # (B, n_classes)


@dataclass(frozen=True)
class ConvNetConfig:
    """Everything needed to rebuild a model: ConvNet(**vars(config)).

    Parameters
    ----------
    img_size : int or (int, int)
        The size, in pixels, for which the model is meant. A CNN also accepts other sizes.
    in_channels, n_classes : int
        Channels of an image, and number of logits. With 0 classes the model has no head and returns the pooled
        features.
    widths : tuple of int
        Channels of each stage. In bottleneck stages this is the inner width; the output has four times as many.
    depths : tuple of int
        Blocks in each stage; in pooled stages, convolutions after the pooling.
    stem_stride : {1, 2, 4}
        With 1 or 2 the stem is one 3 x 3 convolution, for small images. With 4 it is ResNet's 7 x 7 convolution and
        max-pooling. Before pooled stages it is a 2 x 2, 2 x 2 or 4 x 4 convolution.
    block : {"residual", "bottleneck", "pooled"}
        As in ConvNet.

    Raises
    ------
    InputError
        If a value is out of range.
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
        check_stages(widths=self.widths, depths=self.depths)
        pair(self.img_size)
        check_choice("stem_stride", self.stem_stride, (1, 2, 4))
        check_choice("block", self.block, (*BLOCKS, "pooled"))
        least = self.stem_stride * (2 ** len(self.widths) - 1) + max(2, self.stem_stride)
        if self.block == "pooled" and min(pair(self.img_size)) < least:
            raise InputError(f"img_size {self.img_size} is too small for {len(self.widths)} pooled stages; use at "
                             f"least {least} pixels, or fewer stages")


ConvNet.config_class = ConvNetConfig


def check_stages(**stages):
    """Raise InputError unless each argument, such as widths and depths, holds one positive whole number per stage."""
    for name, values in stages.items():
        if not isinstance(values, (tuple, list)):
            raise InputError(f"{name} {values!r} is not a tuple; pass one number for each stage, such as (2, 2, 6, 2)")
    lengths = {len(values) for values in stages.values()}
    if len(lengths) > 1 or lengths == {0}:
        listed = " and ".join(f"{name} {tuple(values)}" for name, values in stages.items())
        raise InputError(f"{listed} need the same length, at least 1; pass one number for each stage")
    for name, values in stages.items():
        for value in values:
            check_int(name, value, 1)


# ---- A convolution as attention ---------------------------------------------------------------------------


class ConvolutionAsAttention(nn.Module):
    """A k x k convolution, computed by attention between pixels: (B, C, h, w) -> (B, C', h, w).

    Every pixel is a token, and every position in the kernel is a head, so there are k k heads. A head scores a key only
    by its offset from the query, as -sharpness |offset - own offset|^2. Its softmax therefore selects the one pixel
    under its position in the kernel. Values are the raw pixels, and the projection after the heads holds the kernel.
    Tokens of zeros around the image are the padding: they are keys and values, but never queries.

    `places` (k k, 3), which determines the scores, and `proj` are parameters, so training may move away from a
    convolution.

    Parameters
    ----------
    in_channels, out_channels : int
        C and C'.
    kernel_size : int, optional
        k, which must be odd.
    sharpness : float, optional
        How fast the scores fall with distance from a head's own offset.

    References
    ----------
    Cordonnier, Loukas and Jaggi 2020, "On the Relationship between Self-Attention and Convolutional Layers", Theorem 1
    and Eq. 9.
    """

    def __init__(self, in_channels, out_channels, kernel_size=3, sharpness=50.0):
        super().__init__()
        check_int("kernel_size", kernel_size, 1)
        if kernel_size % 2 == 0:
            raise InputError(f"kernel_size {kernel_size} is even; expected an odd number such as 3")
        self.reach = kernel_size // 2
        offsets = _offsets_between((1, 1), self.reach)[0]  # (k k, 2), from the centre of the kernel
        self.places = nn.Parameter(-sharpness * torch.cat([torch.ones(len(offsets), 1), -2 * offsets], dim=1))
        self.proj = nn.Linear(len(offsets) * in_channels, out_channels)

    @classmethod
    @torch.no_grad()
    def from_conv(cls, conv, sharpness=50.0):
        """Return the layer that equals a Conv2d.

        Raises InputError if the convolution has a stride, groups, dilation, or a padding that changes the size.
        """
        k = conv.kernel_size[0]
        plain = dict(kernel_size=(k, k), stride=(1, 1), dilation=(1, 1), groups=1, padding=(k // 2, k // 2),
                     padding_mode="zeros")
        for name, expected in plain.items():
            if getattr(conv, name) != expected:
                raise InputError(f"a convolution with {name} {getattr(conv, name)} cannot be written as attention; "
                                 f"expected {name} {expected}")
        layer = cls(conv.in_channels, conv.out_channels, k, sharpness)
        layer.proj.weight.copy_(conv.weight.permute(0, 2, 3, 1).flatten(1))  # (C', k k C), the heads concatenated
        layer.proj.bias.copy_(torch.zeros(conv.out_channels) if conv.bias is None else conv.bias)
        return layer

    def forward(self, x, return_attention=False):
        """Return the map (B, C', h, w), and with return_attention the attention maps (k k, N, M)."""
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
    """Return the offsets (N, M, 2) from each pixel of a map to each pixel of the padded map.

    size: (height, width) of the map; reach: width of the padding. Offsets are in rows and columns.
    """
    inner = torch.cartesian_prod(*(torch.arange(side) for side in size))  # (N, 2)
    outer = torch.cartesian_prod(*(torch.arange(-reach, side + reach) for side in size))  # (M, 2)
    return (outer[None] - inner[:, None]).float()  # (N, M, 2)
