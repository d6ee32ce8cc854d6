"""Small ViTs of other libraries, with random weights, and ours with the same: for tests of what looks into them."""

from functools import partial

import timm
import torch
import torchvision
import transformers
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from vit_bridge.models.beit import BEiT
from vit_bridge.models.swin import SwinTransformer
from vit_bridge.weights.checkpoints import load_checkpoint
from vit_model import VisionTransformer

D, HEADS, PATCH, SIDE, CLASSES, DEPTH = 28, 7, 5, 15, 11, 3  # K = 4, a grid of 3 x 3
HF = dict(image_size=SIDE, patch_size=PATCH, num_labels=CLASSES, hidden_size=D, num_hidden_layers=DEPTH,
          num_attention_heads=HEADS, intermediate_size=3 * D)


def timm_vit(model_class=timm.models.VisionTransformer, **options):
    settings = dict(img_size=SIDE, patch_size=PATCH, num_classes=CLASSES, embed_dim=D, depth=DEPTH, num_heads=HEADS,
                    mlp_ratio=3)
    return model_class(**settings | options)


def timm_beit(shared=False, **options):
    """timm's BEiT; shared: all blocks have one table."""
    return timm_vit(Beit, use_rel_pos_bias=not shared, use_shared_rel_pos_bias=shared, init_values=0.1,
                    **dict(use_abs_pos_emb=False) | options)


def torchvision_vit():
    return torchvision.models.VisionTransformer(SIDE, PATCH, DEPTH, HEADS, D, 3 * D, num_classes=CLASSES)


def transformers_vit(attention="sdpa"):
    return transformers.ViTForImageClassification(transformers.ViTConfig(**HF, attn_implementation=attention))


class DinoVisionTransformer(nn.Module):
    """A stand-in for the class of facebookresearch/dinov2, with its names, of timm's blocks. n_chunks: as in trainings,
    blocks lie in chunks, after place holders for those of earlier chunks."""

    def __init__(self, num_register_tokens=0, n_chunks=0):
        super().__init__()
        self.patch_embed = timm.layers.PatchEmbed(SIDE, PATCH, 3, D)
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, D)), nn.Parameter(torch.zeros(1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, D))
        self.num_register_tokens = num_register_tokens
        self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, D)) if num_register_tokens else None
        norm = partial(nn.LayerNorm, eps=1e-6)
        blocks = [timm.models.vision_transformer.Block(D, HEADS, 3, qkv_bias=True, init_values=1.0, norm_layer=norm)
                  for _ in range(DEPTH)]
        self.chunked_blocks = n_chunks > 0
        self.blocks = nn.ModuleList(blocks)
        if n_chunks:
            size = DEPTH // n_chunks
            self.blocks = nn.ModuleList(nn.ModuleList([nn.Identity()] * i + blocks[i:i + size])
                                        for i in range(0, DEPTH, size))
        self.norm, self.head = norm(D), nn.Identity()

    def forward(self, images):
        patches = self.patch_embed(images)  # (B, n, D)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(images), -1, -1), x[:, 1:]], dim=1)
        for chunk in self.blocks if self.chunked_blocks else [self.blocks]:
            for block in chunk:
                x = block(x)
        return self.head(self.norm(x)[:, 0])


DinoVisionTransformer.__module__ = "dinov2.models.vision_transformer"


def of_transformers(name, attention="sdpa", **options):
    """A model of transformers by the name of its class; without a config of its own that of its base."""
    model_class = getattr(transformers, name)
    known = model_class.config_class().to_dict()
    settings = {key: value for key, value in HF.items() if key in known or key == "num_labels"}
    ratio = dict(mlp_ratio=3) if "mlp_ratio" in known else {}
    return model_class(model_class.config_class(**settings | ratio | options, attn_implementation=attention))


def transformers_beit(name="BeitForImageClassification", shared=False, **options):
    """transformers' BEiT; shared: all blocks have one table."""
    return of_transformers(name, use_relative_position_bias=not shared, use_shared_relative_position_bias=shared,
                           **options)


def torchvision_without_head():
    model = torchvision_vit()
    model.heads = nn.Identity()
    return model


# Name -> (build, what the head reads, the names of the prefix tokens), and whether it has a head.
CLS, TWO, DIST = ("CLS",), ("CLS", "distillation token"), "CLS and the distillation token"
BESIDE, SINGLE = "CLS and the mean of the patches", "every token by itself"
POOLED, REGISTERS = "the patches by attention pooling", ("CLS", "register", "register")
TWO_REGISTERS = dict(num_register_tokens=2)
WITH_HEAD = {
    "timm": (timm_vit, "cls", CLS),
    "timm, mean": (partial(timm_vit, global_pool="avg"), "mean", CLS),
    "timm, norm before the blocks": (partial(timm_vit, pre_norm=True), "cls", CLS),
    "timm, no CLS": (partial(timm_vit, class_token=False, global_pool="avg", reg_tokens=1), "mean", ("register",)),
    "timm, attention pooling": (partial(timm_vit, class_token=False, global_pool="map"), POOLED, ()),
    "timm, distilled": (partial(timm_vit, VisionTransformerDistilled), DIST, TWO),
    "timm, BEiT": (timm_beit, "mean", CLS),
    "timm, BEiT, positions of both kinds": (partial(timm_beit, use_abs_pos_emb=True, global_pool="token"), "cls", CLS),
    "torchvision": (torchvision_vit, "cls", CLS),
    **{name: (partial(of_transformers, name), "cls", CLS) for name in (
        "ViTForImageClassification", "ViTMSNForImageClassification")},
    "DeiTForImageClassification": (partial(of_transformers, "DeiTForImageClassification"), "cls", TWO),
    "DeiTForImageClassificationWithTeacher": (
        partial(of_transformers, "DeiTForImageClassificationWithTeacher"), DIST, TWO),
    "Dinov2ForImageClassification": (partial(of_transformers, "Dinov2ForImageClassification"), BESIDE, CLS),
    "Dinov2WithRegistersForImageClassification": (
        partial(of_transformers, "Dinov2WithRegistersForImageClassification", **TWO_REGISTERS), BESIDE, REGISTERS),
    "IJepaForImageClassification": (partial(of_transformers, "IJepaForImageClassification"), "mean", ()),
    "BeitForImageClassification": (transformers_beit, "mean", CLS),
    "BeitForImageClassification, CLS and positions": (partial(
        transformers_beit, use_mean_pooling=False, use_absolute_position_embeddings=True), "cls", CLS),
}
HEADLESS = {
    "timm, no head": (partial(timm_vit, num_classes=0), "cls", CLS),
    "timm, no head, mean": (partial(timm_vit, num_classes=0, global_pool="avg"), "mean", CLS),
    "timm, no head, all tokens": (partial(timm_vit, num_classes=0, global_pool=""), "cls", CLS),
    "timm, no head, no CLS": (partial(timm_vit, num_classes=0, global_pool="", class_token=False), SINGLE, ()),
    "timm, no head, attention pooling": (partial(timm_vit, num_classes=0, global_pool="map"), POOLED, CLS),
    "timm, no head, distilled": (partial(timm_vit, VisionTransformerDistilled, num_classes=0), DIST, TWO),
    "timm, DINOv2 with registers": (partial(timm_vit, num_classes=0, reg_tokens=2, no_embed_class=True, init_values=1,
                                            dynamic_img_size=True), "cls", REGISTERS),
    "timm, BEiT, no head": (partial(timm_beit, num_classes=0), "mean", CLS),
    "timm, BEiT, no head, all tokens": (partial(timm_beit, shared=True, num_classes=0, global_pool=""), "cls", CLS),
    "torchvision, no head": (torchvision_without_head, "cls", CLS),
    "the hub's DINOv2": (DinoVisionTransformer, "cls", CLS),
    "the hub's DINOv2, registers, in chunks": (partial(DinoVisionTransformer, 2, n_chunks=3), "cls", REGISTERS),
    **{name: (partial(of_transformers, name), "cls", CLS) for name in ("ViTModel", "ViTMSNModel", "Dinov2Model")},
    "ViTForImageClassification, no labels": (
        partial(of_transformers, "ViTForImageClassification", num_labels=0), "cls", CLS),
    "DeiTModel": (partial(of_transformers, "DeiTModel"), "cls", TWO),
    "Dinov2WithRegistersModel": (partial(of_transformers, "Dinov2WithRegistersModel", **TWO_REGISTERS), "cls",
                                 REGISTERS),
    "IJepaModel": (partial(of_transformers, "IJepaModel"), SINGLE, ()),
    "BeitModel": (partial(transformers_beit, "BeitModel"), "cls", CLS),
    "BeitForMaskedImageModeling": (partial(
        transformers_beit, "BeitForMaskedImageModeling", shared=True, use_mean_pooling=False), "cls", CLS),
}


def randomised(model):
    """In eval mode, with every parameter drawn, so that no zero hides anything."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def some_images(n=2, size=(SIDE, SIDE)):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1))


BUILDERS = {
    "timm": (timm_vit, {}),
    "timm, mean": (lambda: timm_vit(global_pool="avg", fc_norm=False), dict(pool="mean")),
    "timm, mean and fc_norm": (lambda: timm_vit(global_pool="avg"), dict(pool="mean", fc_norm=True)),
    "timm, registers": (lambda: timm_vit(reg_tokens=2, no_embed_class=True), dict(n_registers=2)),
    "timm, 2 x 5 patches": (lambda: timm_vit(img_size=(10, 25)), dict(img_size=(10, 25))),
    "torchvision": (torchvision_vit, {}),
    "transformers": (transformers_vit, dict(norm_eps=1e-12)),
    "transformers, eager": (lambda: transformers_vit("eager"), dict(norm_eps=1e-12)),
    "timm, BEiT, mean": (timm_beit, dict(build=BEiT)),
    "timm, BEiT, mean, shared table, 2 x 5 patches": (
        lambda: timm_beit(shared=True, img_size=(10, 25)), dict(build=BEiT, shared_bias=True, img_size=(10, 25))),
    "transformers, BEiT, mean": (transformers_beit, dict(build=BEiT, norm_eps=1e-12)),
    "transformers, BEiT, mean, shared table": (
        lambda: transformers_beit(shared=True), dict(build=BEiT, shared_bias=True, norm_eps=1e-12)),
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
                    mlp_ratio=3, build=VisionTransformer) | options
    ours = settings.pop("build")(**settings).double().eval()
    load_checkpoint(ours, folder / "theirs.pt")
    size = ours.patch_embed.img_size
    return theirs, ours, torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(7)).double()


# ---- Swin Transformers: three stages of two blocks with 1, 2 and 4 heads, patches of 4, windows of 7


def _swin(build):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def _swin_of(library, side=56):
    if library == "ours":
        return SwinTransformer(img_size=side, patch_size=4, n_classes=CLASSES, embed_dim=12, depths=(2, 2, 2),
                               n_heads=(1, 2, 4))
    if library == "timm":
        return timm.models.swin_transformer.SwinTransformer(
            img_size=side, patch_size=4, num_classes=CLASSES, embed_dim=12, depths=(2, 2, 2), num_heads=(1, 2, 4))
    if library == "torchvision":
        return torchvision.models.SwinTransformer([4, 4], 12, [2, 2, 2], [1, 2, 4], [7, 7], num_classes=CLASSES)
    return transformers.SwinForImageClassification(transformers.SwinConfig(
        image_size=2 * side, patch_size=4, num_labels=CLASSES, embed_dim=12, depths=[2, 2, 2], num_heads=[1, 2, 4],
        window_size=7))


SWINS = {library: lambda library=library, **options: _swin(partial(_swin_of, library, **options))
         for library in ("ours", "timm", "torchvision", "transformers")}


def swin_images(name, n=2):
    """Images of 56 pixels, or for transformers of 112, whose windows do not shrink at a stage of 4 tokens."""
    side = 112 if name == "transformers" else 56
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(2))
