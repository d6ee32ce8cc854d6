"""The models, importable from here, such as VisionTransformer, SwinTransformer and build_model."""

from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.convnext import ConvNeXt
from vit_bridge.models.deit import DistilledViT
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.models.registry import build_model
from vit_bridge.models.swin import SwinTransformer
from vit_model import VisionTransformer

__all__ = ["ConvNeXt", "ConvNet", "DistilledViT", "HybridCNNViT", "SwinTransformer", "VisionTransformer",
           "build_model"]
