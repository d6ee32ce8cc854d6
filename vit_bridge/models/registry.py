"""Models by name: build_model("hybrid", n_classes=10). A new model is one file and one line in MODELS."""

from dataclasses import dataclass

from vit_bridge.errors import check_choice
from vit_bridge.models.beit import BEIT_VARIANTS, MASKED_TOKEN_VARIANTS, BEiT, MaskedTokenModel
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.convnext import CONVNEXT_VARIANTS, ConvNeXt
from vit_bridge.models.deit import DistilledViT
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.models.mae import MAE_VARIANTS, MaskedAutoencoder
from vit_bridge.models.protocol import ImageModel, check_arguments
from vit_bridge.models.swin import SWIN_VARIANTS, SwinTransformer
from vit_model import VARIANTS, VisionTransformer, pair


@dataclass(frozen=True)
class ModelEntry:
    """A named model: its class and its arguments.

    `scaled` is the argument that grows with the images, and its value for images of up to 64 pixels. The value is
    doubled up to 128 pixels and quadrupled above. None if no argument grows.
    """

    model_class: type
    arguments: dict
    scaled: tuple | None = ("patch_size", 4)

    @property
    def unlabelled(self):
        """Whether it learns without labels (ImageModel.encoder)."""
        return getattr(self.model_class, "encoder", ImageModel.encoder) is not None


def _resnet(depths, block="residual"):
    """Return the entry of a ResNet for 224 x 224 images."""
    return ModelEntry(ConvNet, dict(img_size=224, widths=(64, 128, 256, 512), depths=depths, stem_stride=4,
                                    block=block), ("stem_stride", 1))


# With 10 classes and 32 x 32 images, vit_nano, hybrid and convnet have similar sizes: 459,562, 497,818 and 481,170
# parameters.
MODELS = {
    **{name: ModelEntry(VisionTransformer, vars(config)) for name, config in VARIANTS.items()},
    "hybrid": ModelEntry(HybridCNNViT, dict(img_size=32, patch_size=4, embed_dim=96, depth=4, n_heads=3)),
    "hybrid_small": ModelEntry(HybridCNNViT, dict(img_size=224, patch_size=16, embed_dim=384, depth=6, n_heads=6)),
    "convnet": ModelEntry(ConvNet, dict(img_size=32, widths=(40, 80, 160), depths=(1, 1, 1), stem_stride=1),
                          ("stem_stride", 1)),
    **{name.replace("vit", "deit"): ModelEntry(DistilledViT, vars(config)) for name, config in VARIANTS.items()
       if name != "vit_large"},
    **{name: ModelEntry(MaskedAutoencoder, vars(config), None if name == "mae_huge" else ModelEntry.scaled)
       for name, config in MAE_VARIANTS.items()},
    **{name: ModelEntry(BEiT, vars(config)) for name, config in BEIT_VARIANTS.items()},
    **{name: ModelEntry(MaskedTokenModel, vars(config)) for name, config in MASKED_TOKEN_VARIANTS.items()},
    **{name: ModelEntry(SwinTransformer, vars(config), ("patch_size", 2 if name == "swin_nano" else 1))
       for name, config in SWIN_VARIANTS.items()},
    **{name: ModelEntry(ConvNeXt, vars(config), ("stem_stride", 2 if name == "convnext_nano" else 1))
       for name, config in CONVNEXT_VARIANTS.items()},
    "resnet18": _resnet((2, 2, 2, 2)),  # He et al. 2016, Table 1
    "resnet34": _resnet((3, 4, 6, 3)),
    "resnet50": _resnet((3, 4, 6, 3), "bottleneck"),
    "resnet101": _resnet((3, 4, 23, 3), "bottleneck"),
    "resnet152": _resnet((3, 8, 36, 3), "bottleneck"),
}


def model_classes():
    """Return {class name: class} of every model in MODELS."""
    return {entry.model_class.__name__: entry.model_class for entry in MODELS.values()}


def build_model(name, **arguments):
    """Build a new model from MODELS.

    If you pass img_size but no patch_size, the patch size is 4 pixels for images of up to 64 pixels, 8 up to 128 pixels
    and 16 above. For a Swin it is 1, 2 and 4, and so is the stride of the stem of a ConvNet or ConvNeXt. For swin_nano
    and convnext_nano these are 2, 4 and 8.

    Parameters
    ----------
    name : str
        A name in MODELS, such as "vit_tiny", "hybrid" or "resnet18".
    **arguments
        Fields of the model's configuration, which override the values in its entry.

    Returns
    -------
    nn.Module
        A model with new weights.

    Raises
    ------
    InputError
        If the name or an argument is unknown, or if a value is out of range.
    """
    check_choice("model", name, tuple(MODELS), "python train_vit.py --help")
    entry = MODELS[name]
    check_arguments(entry.model_class, arguments)
    scaled = {}
    if "img_size" in arguments and entry.scaled:
        side, (argument, value) = max(pair(arguments["img_size"])), entry.scaled
        scaled = {argument: value * (1 if side <= 64 else 2 if side <= 128 else 4)}
    return entry.model_class(**{**entry.arguments, **scaled, **arguments})
