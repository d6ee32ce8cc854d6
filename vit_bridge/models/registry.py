"""Models by name: build_model("hybrid", n_classes=10)."""

import torch

from vit_bridge.errors import check_choice
from vit_bridge.models.convnet import ConvNet, ConvNetConfig
from vit_bridge.models.hybrid import HybridCNNViT, HybridConfig, PooledStem
from vit_bridge.models.initialisation import whitening_filters
from vit_model import VARIANTS, PatchEmbedding, VisionTransformer, ViTConfig, pair

CONFIGS = {VisionTransformer: ViTConfig, HybridCNNViT: HybridConfig, ConvNet: ConvNetConfig}
CLASSES = {model_class.__name__: model_class for model_class in CONFIGS}
# vit_nano, hybrid and convnet are within 10% of each other in parameters, with 10 classes and 32 x 32 images:
# 459,562, 497,818 and 481,170.
MODELS = {
    **{name: (VisionTransformer, vars(config)) for name, config in VARIANTS.items()},
    "hybrid": (HybridCNNViT, dict(img_size=32, patch_size=4, embed_dim=96, depth=4, n_heads=3)),
    "hybrid_small": (HybridCNNViT, dict(img_size=224, patch_size=16, embed_dim=384, depth=6, n_heads=6)),
    "convnet": (ConvNet, dict(img_size=32, widths=(40, 80, 160), depths=(1, 1, 1), stem_stride=1)),
    "resnet18": (ConvNet, dict(img_size=224, widths=(64, 128, 256, 512), depths=(2, 2, 2, 2), stem_stride=4)),
}


def build_model(name, **arguments):
    """A new model of the table MODELS; the arguments override its own.

    With an img_size and no patch_size (or stem_stride) the patch is fitted to the image: 4 pixels up to 64,
    8 up to 128, 16 above; for a ConvNet the stride of the stem, 1, 2 and 4.

    Raises InputError for an unknown name or argument, and as the model's class does.
    """
    check_choice("model", name, tuple(MODELS))
    model_class, defaults = MODELS[name]
    check_arguments(model_class, arguments)
    fitted = {}
    if "img_size" in arguments:
        side = max(pair(arguments["img_size"]))
        scale = 1 if side <= 64 else 2 if side <= 128 else 4
        fitted = dict(stem_stride=scale) if model_class is ConvNet else dict(patch_size=4 * scale)
    return model_class(**{**defaults, **fitted, **arguments})


def check_arguments(model_class, arguments):
    """Raises InputError for an argument that the model's configuration does not have."""
    for argument in arguments:
        check_choice("argument", argument, tuple(CONFIGS[model_class].__dataclass_fields__))


def whitening_layer(model):
    """The convolution that meets the pixels, where whitening_filters have a place: the patch projection of a ViT, the
    first layer of a pooled ConvNet and of a pooled stem; None in other models."""
    if isinstance(model, ConvNet):
        return model.stem[0] if model.config.block == "pooled" else None
    embed = getattr(model, "patch_embed", None)
    if isinstance(embed, PooledStem):
        return embed.whiten
    return embed.proj if isinstance(embed, PatchEmbedding) else None


@torch.no_grad()
def whiten_first_layer(model, images):
    """Gives the whitening_layer of a model, if it has one, the whitening_filters of images (B, C, height, width),
    normalised as the model will see them. Returns the model.

    Convolutional layers have room for each filter and its negative, and keep them in training. A patch projection
    takes the filters of the largest variance, as many as it has channels, and little noise in the channels that are
    left, and learns on from there.
    """
    layer = whitening_layer(model)
    if layer is None:
        return model
    filters = whitening_filters(images, layer.kernel_size[0])  # (C k k, C, k, k)
    layer.bias.zero_()
    if isinstance(model, VisionTransformer) and isinstance(model.patch_embed, PatchEmbedding):
        n = min(len(filters), len(layer.weight))
        layer.weight.normal_(std=0.02)[:n] = filters[:n]
    else:
        layer.weight.copy_(torch.cat([filters, -filters]))
        layer.requires_grad_(False)
    return model
