"""Small ViTs of other libraries, with random weights, and ours with the same: for tests of what looks into them."""

import timm
import torch
import torchvision
import transformers

from vit_bridge.weights.checkpoints import load_checkpoint
from vit_model import VisionTransformer

D, HEADS, PATCH, SIDE, CLASSES, DEPTH = 28, 7, 5, 15, 11, 3  # K = 4, a grid of 3 x 3
HF = dict(image_size=SIDE, patch_size=PATCH, num_labels=CLASSES, hidden_size=D, num_hidden_layers=DEPTH,
          num_attention_heads=HEADS, intermediate_size=3 * D)


def timm_vit(**options):
    settings = dict(img_size=SIDE, patch_size=PATCH, num_classes=CLASSES, embed_dim=D, depth=DEPTH, num_heads=HEADS,
                    mlp_ratio=3)
    return timm.models.VisionTransformer(**settings | options)


def torchvision_vit():
    return torchvision.models.VisionTransformer(SIDE, PATCH, DEPTH, HEADS, D, 3 * D, num_classes=CLASSES)


def transformers_vit(attention="sdpa"):
    return transformers.ViTForImageClassification(transformers.ViTConfig(**HF, attn_implementation=attention))


BUILDERS = {
    "timm": (timm_vit, {}),
    "timm, mean": (lambda: timm_vit(global_pool="avg", fc_norm=False), dict(pool="mean")),
    "timm, mean and fc_norm": (lambda: timm_vit(global_pool="avg"), dict(pool="mean", fc_norm=True)),
    "timm, registers": (lambda: timm_vit(reg_tokens=2, no_embed_class=True), dict(n_registers=2)),
    "timm, 2 x 5 patches": (lambda: timm_vit(img_size=(10, 25)), dict(img_size=(10, 25))),
    "torchvision": (torchvision_vit, {}),
    "transformers": (transformers_vit, dict(norm_eps=1e-12)),
    "transformers, eager": (lambda: transformers_vit("eager"), dict(norm_eps=1e-12)),
}


def shared(name, folder):
    """(theirs, ours) with the same random weights, float64, in eval mode, and three images."""
    build, options = BUILDERS[name]
    torch.manual_seed(5)
    theirs = build().double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))  # numbers of float32, which any file holds exactly
    torch.save(theirs.state_dict(), folder / "theirs.pt")
    settings = dict(img_size=SIDE, patch_size=PATCH, n_classes=CLASSES, embed_dim=D, depth=DEPTH, n_heads=HEADS,
                    mlp_ratio=3)
    ours = VisionTransformer(**settings | options).double().eval()
    load_checkpoint(ours, folder / "theirs.pt")
    size = ours.patch_embed.img_size
    return theirs, ours, torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(7)).double()
