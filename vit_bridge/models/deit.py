"""DeiT, a ViT that learns from a teacher: Touvron et al. 2021, "Training data-efficient image transformers".

A second token, DIST, runs beside CLS through all blocks and has a head of its own. In training CLS learns the labels
and DIST what the teacher predicts (training/objectives.py, Distillation). Parameters have the names of timm and of the
paper's code, so state dicts can be exchanged.

Shapes:  B images, N tokens (CLS, DIST, registers, patches), D width of a token (embed_dim).
"""

from dataclasses import dataclass

import torch
from torch import nn

from vit_bridge.errors import InputError, check_choice
from vit_bridge.models.protocol import create_variant
from vit_model import VARIANTS, VisionTransformer, ViTConfig


class DistilledViT(VisionTransformer):
    """A ViT with two heads: images (B, C, height, width) -> logits (B, n_classes).

    In training mode it returns the logits of both heads, (CLS, DIST), because each has its own target. In eval mode it
    returns their mean. (The paper adds the softmaxes of the heads, Sec. 4; its code averages the logits, and so does
    this class.)

    Parameters
    ----------
    *args, **options
        The fields of DistilledConfig, in order: those of ViTConfig.

    Raises
    ------
    InputError
        If an argument is out of range, or if the images do not fit the model.

    Examples
    --------
    >>> model = DistilledViT(img_size=32, patch_size=4, n_classes=10, embed_dim=96, depth=4, n_heads=3)
    >>> [logits.shape for logits in model(torch.randn(2, 3, 32, 32))]
    [torch.Size([2, 10]), torch.Size([2, 10])]
    >>> model.eval()(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    n_cls_tokens = 2  # CLS and DIST
    head_names = ("head", "head_dist")

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        c = self.config
        self.dist_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        self.head_dist = nn.Linear(c.embed_dim, c.n_classes) if c.n_classes else nn.Identity()
        if c.n_classes:
            nn.init.xavier_uniform_(self.head_dist.weight)
            nn.init.zeros_(self.head_dist.bias)

    def cls_tokens(self):
        """Return CLS and DIST, (1, 2, D)."""
        return torch.cat([self.cls_token, self.dist_token], dim=1)

    def forward_head(self, x, pre_logits=False):
        """Return the logits of tokens (B, N, D): of both heads in training mode, else their mean (B, n_classes).

        With pre_logits=True it returns the mean of the two tokens, (B, D).
        """
        if pre_logits:
            return x[:, :2].mean(dim=1)  # (B, D)
        cls, dist = self.head(x[:, 0]), self.head_dist(x[:, 1])  # 2 x (B, n_classes)
        return (cls, dist) if self.training else (cls + dist) / 2


@dataclass(frozen=True)
class DistilledConfig(ViTConfig):
    """Everything needed to rebuild a model: DistilledViT(**vars(config)).

    It has the fields of ViTConfig. The heads read CLS and DIST, so `pool` is "cls".
    """

    def __post_init__(self):
        super().__post_init__()
        if self.pool != "cls":
            raise InputError(f"pool {self.pool!r} does not fit a DistilledViT, whose heads read CLS and DIST; leave it "
                             f"out, or use a VisionTransformer")


DistilledViT.config_class = DistilledConfig


def create_deit(size, n_classes, distilled, overrides):
    """Build a DistilledViT of a size in vit_model.VARIANTS, such as "tiny", or without distilled the plain ViT."""
    check_choice("distilled", distilled, (True, False))
    model_class = DistilledViT if distilled else VisionTransformer
    return create_variant(model_class, VARIANTS[f"vit_{size}"], n_classes, overrides)


def create_deit_nano(n_classes=1000, distilled=True, **overrides):
    """Build DeiT-nano/4 for 32 x 32 images: D = 96, 4 blocks of 3 heads. It is our own."""
    return create_deit("nano", n_classes, distilled, overrides)


def create_deit_tiny(n_classes=1000, distilled=True, **overrides):
    """Build DeiT-Ti/16 for 224 x 224 images: 5,910,800 parameters with 1,000 classes."""
    return create_deit("tiny", n_classes, distilled, overrides)


def create_deit_small(n_classes=1000, distilled=True, **overrides):
    """Build DeiT-S/16 for 224 x 224 images: 22,436,432 parameters with 1,000 classes."""
    return create_deit("small", n_classes, distilled, overrides)


def create_deit_base(n_classes=1000, distilled=True, **overrides):
    """Build DeiT-B/16 for 224 x 224 images: 87,338,192 parameters with 1,000 classes."""
    return create_deit("base", n_classes, distilled, overrides)
