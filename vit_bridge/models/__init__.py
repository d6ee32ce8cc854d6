"""The models, importable from here, such as SwinTransformer, create_swin_tiny and build_model."""

from vit_bridge.models.beit import BEiT, MaskedTokenModel, create_beit_base, create_beit_large, create_beit_nano
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.convnext import (
    ConvNeXt,
    create_convnext_base,
    create_convnext_nano,
    create_convnext_small,
    create_convnext_tiny,
)
from vit_bridge.models.deit import (
    DistilledViT,
    create_deit_base,
    create_deit_nano,
    create_deit_small,
    create_deit_tiny,
)
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.models.mae import (
    MaskedAutoencoder,
    create_mae_base,
    create_mae_huge,
    create_mae_large,
    create_mae_nano,
    create_mae_tiny,
)
from vit_bridge.models.registry import build_model
from vit_bridge.models.swin import (
    SwinTransformer,
    create_swin_base,
    create_swin_nano,
    create_swin_small,
    create_swin_tiny,
)
from vit_model import VisionTransformer

__all__ = ["BEiT", "ConvNeXt", "ConvNet", "DistilledViT", "HybridCNNViT", "MaskedAutoencoder", "MaskedTokenModel",
           "SwinTransformer", "VisionTransformer", "build_model", "create_beit_base", "create_beit_large",
           "create_beit_nano", "create_convnext_base", "create_convnext_nano", "create_convnext_small",
           "create_convnext_tiny", "create_deit_base", "create_deit_nano", "create_deit_small", "create_deit_tiny",
           "create_mae_base", "create_mae_huge", "create_mae_large", "create_mae_nano", "create_mae_tiny",
           "create_swin_base", "create_swin_nano", "create_swin_small", "create_swin_tiny"]
