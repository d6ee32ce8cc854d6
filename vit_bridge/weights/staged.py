"""Infer the configuration of a model with stages, a ConvNet, ConvNeXt or SwinTransformer, from the tensors of a file.

    convnet_config(weights), convnext_config(weights), swin_config(weights)    the functions in STAGED_CONFIGS

Shapes:  C channels, k side of a kernel, K classes, D width, H heads.
"""

import math
import re

from vit_bridge.errors import InputError
from vit_bridge.models.convnet import BLOCKS, ConvNetConfig
from vit_bridge.models.convnext import ConvNeXtConfig
from vit_bridge.models.swin import SwinConfig
from vit_bridge.preprocessing import one_side
from vit_bridge.weights.formats import OUR_SWIN
from vit_model import grid_of, pair


def convnet_config(weights):
    """Return the ConvNetConfig of a ResNet's Weights.

    Raises
    ------
    InputError
        For a variant of ResNet that ConvNet does not support.
    """
    tensors, depths = weights.tensors, _depths(weights, r"stages\.(\d+)\.(\d+)\.")
    stem, narrow = _tensor(weights, "stem.0.weight"), _tensor(weights, "stages.0.0.conv1.weight")  # 2 x (C', C, k, k)
    block = "bottleneck" if "stages.0.0.conv3.weight" in tensors else "residual"
    widths = tuple(len(_tensor(weights, f"stages.{i}.0.conv1.weight")) for i in range(len(depths)))
    inside = _tensor(weights, "stages.0.0.conv2.weight")
    last = tensors.get("stages.0.0.conv3.weight", inside)
    if inside.shape[1] != len(narrow):
        _refuse(weights, f"a ResNeXt, whose 3 x 3 convolutions have {len(narrow) // inside.shape[1]} groups; ConvNet "
                         f"has one group")
    expansion = BLOCKS[block].expansion
    if len(last) != expansion * widths[0]:
        _refuse(weights, f"a wide ResNet, with {widths[0]} channels inside a block that outputs {len(last)}; ConvNet "
                         f"has {len(last) // expansion}")
    if "stem.1.running_mean" not in tensors:
        _refuse(weights, "a ResNet without batch norm, which ConvNet needs")
    if stem.shape[-1] not in (3, 7) or len(stem) != widths[0]:
        _refuse(weights, f"a ResNet whose first convolution has {len(stem)} kernels of {stem.shape[-1]} x "
                         f"{stem.shape[-1]}; ConvNet has {widths[0]} of 7 x 7 or 3 x 3")
    small = stem_is_small(weights)
    return ConvNetConfig(32 if small else 224, stem.shape[1], _n_classes(weights), widths, depths, 1 if small else 4,
                         block)


def convnext_config(weights):
    """Return the ConvNeXtConfig of a ConvNeXt's Weights.

    Raises
    ------
    InputError
        For a variant of ConvNeXt that our class does not support.
    """
    tensors, depths = weights.tensors, _depths(weights, r"stages\.(\d+)\.blocks\.(\d+)\.")
    stem, kernel = _tensor(weights, "stem.0.weight"), _tensor(weights, "stages.0.blocks.0.conv_dw.weight")
    if _tensor(weights, "stem.1.weight").ndim != 1 or stem.shape[-1] != stem.shape[-2]:
        _refuse(weights, "a ConvNeXt whose stem has several convolutions; ours has a single one, over patches")
    if kernel.shape[1:] != (1, 7, 7):
        _refuse(weights, f"a ConvNeXt with kernels of {kernel.shape[-1]} x {kernel.shape[-1]}; ours are 7 x 7")
    widths = tuple(len(_tensor(weights, f"stages.{i}.blocks.0.conv_dw.weight")) for i in range(len(depths)))
    layer_scale = 1e-6 if "stages.0.blocks.0.ls.gamma" in tensors else None
    img_size = max(224, stem.shape[-1] * 2 ** (len(depths) - 1))
    return ConvNeXtConfig(img_size, stem.shape[1], _n_classes(weights), widths, depths, stem.shape[-1],
                          layer_scale=layer_scale, norm_eps=weights.format.norm_eps or 1e-6)


def swin_config(weights):
    """Return the SwinConfig of a Swin Transformer's Weights.

    Unless a config.json records the image size, it is the one that the paper's code uses for the window: in the last
    stage, one window covers the map. Stages with smaller windows show the size, because there the window is the map.

    Raises
    ------
    InputError
        For a variant of Swin that SwinTransformer does not support.
    """
    tensors, depths = weights.tensors, _depths(weights, r"stages\.(\d+)\.blocks\.(\d+)\.")
    stem = _tensor(weights, "patch_embed.proj.weight")  # (D, C, height, width of a patch)
    hidden = len(_tensor(weights, "stages.0.blocks.0.mlp.fc1.weight"))
    if stem.ndim != 4:
        _refuse(weights, f"a Swin Transformer whose patches have {stem.ndim - 2} dimensions; ours have 2")
    if "stages.0.blocks.0.attn.relative_position_bias_table" not in tensors:
        _refuse(weights, "a Swin Transformer without tables of relative positions, which show its heads and windows; "
                         "build the model as it was trained, and use load_checkpoint(model, path)")
    tables = [_tensor(weights, f"stages.{i}.blocks.0.attn.relative_position_bias_table") for i in range(len(depths))]
    rows, n_heads = [len(table) for table in tables], tuple(table.shape[1] for table in tables)
    sides = [(math.isqrt(n) + 1) // 2 for n in rows]
    if 0 in (*sides, *n_heads, *stem.shape):
        _refuse(weights, "not a complete SwinTransformer: its patches or its tables of relative positions are empty")
    (D, C, *patch), recorded = stem.shape, weights.recorded.config
    window = recorded.get("window_size", sides[0])
    shown = next(((i, side) for i, side in enumerate(sides) if side != sides[0]), (len(sides) - 1, sides[0]))
    img_size = recorded.get("img_size", one_side(tuple(length * shown[1] * 2 ** shown[0] for length in patch)))
    ratio = next(r for r in (hidden / D, math.nextafter(hidden / D, math.inf)) if int(D * r) == hidden)
    config = SwinConfig(img_size, one_side(tuple(patch)), C, _n_classes(weights), D, depths, n_heads, window, ratio,
                        norm_eps=weights.format.norm_eps)
    windows = config.windows()
    if [(2 * h - 1) * (2 * w - 1) for h, w in windows] != rows:
        _refuse(weights, f"a Swin Transformer whose tables have {', '.join(map(str, rows))} offsets, which do not "
                         f"belong to images of {'x'.join(map(str, pair(img_size)))} pixels and windows of "
                         f"{'x'.join(map(str, pair(window, 'window_size')))} tokens; build the model as it was "
                         f"trained, and use load_checkpoint(model, path)")
    grids = [[-(-side // 2 ** i) for side in grid_of(pair(img_size), tuple(patch))] for i in range(len(depths))]
    if weights.format.library == "timm" and any(side % length for grid, window in zip(grids, windows, strict=True)
                                                for side, length in zip(grid, window, strict=True)):
        weights.choices.append("padding: timm pads maps after it shifts them, but this library pads before, so the "
                               "windows of the shifted blocks differ at the edges")
    if weights.format.library == "transformers" and any((grid[0] <= window[0]) != (grid[1] <= window[1])
                                                        for grid, window in zip(grids, windows, strict=True)):
        weights.choices.append("shift: where a window covers a map along one side only, transformers shifts its "
                               "windows along neither side, but this library shifts them along the other")
    return config


def stem_is_small(weights):
    """Return whether the first convolution is ConvNet's 3 x 3 one, whose stride no tensor shows."""
    return weights.format.holds == "ConvNet" and weights.tensors["stem.0.weight"].shape[-1] == 3


def not_in_tensors(weights, config):
    """Return {field of the configuration that no tensor of the file shows: the value that is assumed, in words}."""
    if stem_is_small(weights):
        return dict(stem_stride=f"stem_stride={config.stem_stride} without pooling")
    if weights.format.name == OUR_SWIN:  # in other libraries, every second block shifts its windows
        return dict(shift=f"shift={config.shift}")
    return {}


STAGED_CONFIGS = dict(ConvNet=convnet_config, ConvNeXt=convnext_config, SwinTransformer=swin_config)


def _depths(weights, block):
    """Return the number of blocks in each stage.

    `block` is a pattern for the start of their names, with one group for the stage and one for the block.
    """
    found = {tuple(map(int, place.groups())) for name in weights.tensors if (place := re.match(block, name))}
    stages = [{j for i, j in found if i == stage} for stage in range(len({i for i, _ in found}))]
    if not stages or any(stage != set(range(len(stage))) or not stage for stage in stages):
        _refuse(weights, f"not a complete {weights.format.holds}: blocks are missing from its stages")
    return tuple(map(len, stages))


def _tensor(weights, name):
    if name not in weights.tensors:
        _refuse(weights, f"not a complete {weights.format.holds}: {name} is missing")
    return weights.tensors[name]


def _n_classes(weights):
    """Return K, or 0 if there is no head."""
    head = weights.tensors.get("head.weight")
    return 0 if head is None else len(head)


def _refuse(weights, reason):
    raise InputError(f"{weights.path} ({weights.format.name}) is {reason}")
