"""Small models to measure, and images for them."""

import torch

from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.hybrid import HybridCNNViT
from vit_model import VisionTransformer, pair

# 2 x 3 patches of 7 x 5 pixels, so that no swapped axis stays unseen.
SIZE, PATCH, GRID, N = (14, 15), (7, 5), (2, 3), 7


def vit(**options):
    torch.manual_seed(0)
    settings = dict(img_size=SIZE, patch_size=PATCH, n_classes=5, embed_dim=22, depth=3, n_heads=2, dropout=0.5)
    return VisionTransformer(**{**settings, **options})


def convnet(**options):
    torch.manual_seed(0)
    settings = dict(img_size=29, n_classes=5, widths=(3, 5, 7), depths=(1, 2, 1), stem_stride=1)
    return ConvNet(**{**settings, **options})


def hybrid():
    torch.manual_seed(0)
    return HybridCNNViT(n_classes=5, embed_dim=22, depth=2, n_heads=2, img_size=(12, 20), patch_size=4)


def images_for(model, n=3):
    size = pair(model.config.img_size)
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1))
