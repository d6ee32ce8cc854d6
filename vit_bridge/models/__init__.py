"""The models, importable from here: VisionTransformer, HybridCNNViT, ConvNet, ConvNeXt, build_model."""

from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.convnext import ConvNeXt
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.models.registry import build_model
from vit_model import VisionTransformer

__all__ = ["ConvNeXt", "ConvNet", "HybridCNNViT", "VisionTransformer", "build_model"]
