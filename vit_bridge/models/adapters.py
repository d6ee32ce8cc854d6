"""How the library sees a model: its own by the protocol, or a ViT of timm, transformers or torchvision.

    adapt(model)      a ModelAdapter: its layers, what images it takes, its classes; a ViTAdapter where it attends
    adapt_vit(model)  a ViTAdapter, or InputError

Shapes:  B images, C channels, N tokens (prefix tokens, then patches), D width, K classes, n patches.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vit_bridge.errors import InputError
from vit_bridge.models.protocol import ask, class_name, is_ours
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.runtime import unwrapped
from vit_model import check_images, grid_of, pair

HEADS = "head", "heads", "classifier"  # what the libraries call them
CLS_AND_DISTILLATION = "CLS and the distillation token"  # a distilled DeiT's


@dataclass(frozen=True, kw_only=True)
class ModelAdapter:
    """What the library has to know of a model.

    library        whose it is: "ours", "timm", "transformers" or "torchvision"
    layers         what makes the first map or the tokens, then the stages or blocks
    img_size       (height, width) in pixels that it is built for
    in_channels    of its images
    n_classes      K; None where it has no head, and gives features
    preprocessing  what its images must be; ImageNet's mean and std where nothing says which
    any_size       whether it takes images of other sizes too
    attends        whether its layers are attention blocks: it is then a ViTAdapter
    """
    library: str
    layers: list
    img_size: tuple
    in_channels: int
    n_classes: int | None
    preprocessing: Preprocessing
    any_size: bool = False
    attends = False
    unit = "stage"

    @property
    def has_head(self):
        return self.n_classes is not None

    @property
    def class_names(self):
        """A list of K, or None where there are none that fit the head."""
        names = self.preprocessing.class_names
        return names if names and len(names) == self.n_classes else None

    def check_images(self, images):
        """Raises InputError unless images are normalised, (B, C, height, width), B > 0, of a size that it takes."""
        _check_kind(images, self.in_channels)
        if self.library == "ours":
            check_images(images, self.in_channels, None if self.any_size else self.img_size)
            return
        size = tuple(images.shape[2:]) if self.any_size else self.img_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (self.in_channels, *size):
            wanted = "height, width" if self.any_size else f"{size[0]}, {size[1]}"
            raise InputError(f"got images of shape {tuple(images.shape)}, expected (B, {self.in_channels}, {wanted}); "
                             f"convert or resize them")


@dataclass(frozen=True, kw_only=True)
class ViTAdapter(ModelAdapter):
    """Where the parts of a ViT lie.

    patch_size   (height, width) in pixels
    n_prefix     tokens before the patches: CLS, distillation token, registers
    pool         what the head reads: "cls", "mean" (over the patches), CLS_AND_DISTILLATION (the mean of two heads, one
                 on each token), or words for another way
    read         tokens after any block, (B, N, D) -> logits (B, K): the last norm, the pooling and the head
    projection   the layer that makes patches into tokens, or the stem before them
    positions    (n, D), of the patches; None where there are none
    """
    patch_size: tuple
    n_prefix: int
    pool: str
    read: Callable
    projection: torch.nn.Module
    positions: torch.Tensor | None
    attends = True
    unit = "block"

    @property
    def blocks(self):
        """Its encoder blocks, each (B, N, D) -> (B, N, D)."""
        return self.layers[1:]

    @property
    def reads_patches(self):
        """Whether the head reads the patch tokens: else those after the last block go nowhere."""
        return self.pool not in ("cls", CLS_AND_DISTILLATION)

    @property
    def projects_patches(self):
        """Whether each token is one projection of its own patch, as in a plain ViT, and not of windows that overlap."""
        return getattr(self.projection, "kernel_size", None) == self.patch_size

    def grid(self, images):
        """Patches of these images along (height, width)."""
        return grid_of(tuple(images.shape[2:]), self.patch_size)

    def check_images(self, images):
        super().check_images(images)
        self.grid(images)


def adapt(model):
    """The ModelAdapter of a model, or of that inside torch's wrappers. Raises InputError for one that is not known
    here."""
    model = unwrapped(model)
    if is_ours(model):
        return _of_ours(model)
    for name, make in _LIBRARIES.items():
        if any(f"{cls.__module__}.{cls.__qualname__}" == name for cls in type(model).__mro__):
            return make(model)
    raise InputError(f"a {class_name(model)} is not known here; expected one of vit_bridge.models, or a ViT "
                     f"of timm, transformers (for image classification) or torchvision")


def adapt_vit(model):
    """The ViTAdapter of a model. Raises InputError for one whose layers are not attention blocks."""
    adapter = adapt(model)
    if not adapter.attends:
        raise InputError(f"a {class_name(model)} has no attention maps; give a ViT, or ask for Grad-CAM: "
                         f"explain(model, images, 'grad_cam')")
    return adapter


# ---- Whose model it is ------------------------------------------------------------------------------------


def _of_ours(model):
    config, n_classes = model.config, _classes_of(model.head)
    common = dict(library="ours", layers=model.layers(), img_size=pair(config.img_size), in_channels=config.in_channels,
                  n_classes=n_classes, any_size=ask(model, "any_size"), preprocessing=_preprocessing_of(
                      model, config.in_channels, config.img_size))
    if not ask(model, "attends"):
        return ModelAdapter(**common)
    n = model.patch_embed.n_patches
    return ViTAdapter(
        **common, patch_size=pair(config.patch_size, "patch_size"), n_prefix=model.n_prefix_tokens, pool=config.pool,
        read=lambda x: model.forward_head(model.norm(x)), projection=model.patch_embed.proj,
        positions=None if model.pos_embed is None else model.pos_embed[0, -n:].detach())


def _of_timm(model):
    pool = {"token": "cls", "avg": "mean", "": "every token by itself"}.get(model.global_pool, model.global_pool)
    if pool == "mean" and getattr(model, "pool_include_prefix", False):
        pool = "the mean of all tokens"
    if hasattr(model, "head_dist"):
        pool = CLS_AND_DISTILLATION
    projection = getattr(model.patch_embed, "proj", None)
    if not isinstance(projection, torch.nn.Conv2d):
        raise InputError(f"this {class_name(model)} of timm makes its tokens in another way than by one projection "
                         f"of patches, and is not known here; give a plain ViT")
    kept = getattr(model, "pretrained_cfg", None) or {}  # none where it was built by its class
    n, img_size = model.patch_embed.num_patches, tuple(model.patch_embed.img_size)
    positions = None if model.pos_embed is None else model.pos_embed.reshape(-1, model.embed_dim)[-n:].detach()
    facts = {name: kept[name] for name in ("mean", "std", "interpolation") if kept.get(name) is not None}
    return ViTAdapter(
        library="timm", layers=[projection, *model.blocks], img_size=img_size, in_channels=projection.in_channels,
        n_classes=_classes_of(model.head), any_size=bool(getattr(model, "dynamic_img_size", False)),
        preprocessing=_preprocessing_of(model, projection.in_channels, img_size, **facts),
        patch_size=tuple(model.patch_embed.patch_size), n_prefix=model.num_prefix_tokens, pool=pool,
        read=lambda x: model.forward_head(model.norm(x)), projection=projection, positions=positions)


def _of_torchvision(model):
    return ViTAdapter(
        library="torchvision", layers=[model.conv_proj, *model.encoder.layers], img_size=pair(model.image_size),
        in_channels=3, n_classes=_classes_of(model.heads), preprocessing=_preprocessing_of(model, 3, model.image_size),
        patch_size=pair(model.patch_size, "patch_size"), n_prefix=1, pool="cls",
        read=lambda x: model.heads(model.encoder.ln(x)[:, 0]), projection=model.conv_proj,
        positions=model.encoder.pos_embedding[0, 1:].detach())


def _of_transformers(model):
    """ViTForImageClassification and DeiTForImageClassification, whose head reads CLS, and the DeiT with both heads."""
    base, config = getattr(model, model.base_model_prefix), model.config
    layers = base.layers if hasattr(base, "layers") else base.encoder.layer  # since version 5, before
    n_prefix = 2 if config.model_type == "deit" else 1
    # Its image processor lies apart from the model: ViT's are Google's checkpoints, with 0.5 and 0.5.
    facts = dict(mean=(0.5,) * config.num_channels, std=(0.5,) * config.num_channels) if n_prefix == 1 else {}
    projection = base.embeddings.patch_embeddings.projection
    two_heads = hasattr(model, "distillation_classifier")
    heads = (model.cls_classifier, model.distillation_classifier) if two_heads else (model.classifier,)
    return ViTAdapter(
        library="transformers", layers=[projection, *layers], img_size=pair(config.image_size),
        in_channels=config.num_channels, n_classes=_classes_of(heads[0]),
        preprocessing=_preprocessing_of(model, config.num_channels, config.image_size,
                                        class_names=listed_names(config.id2label), **facts),
        patch_size=pair(config.patch_size, "patch_size"), n_prefix=n_prefix,
        pool=CLS_AND_DISTILLATION if two_heads else "cls", projection=projection,
        read=lambda x: sum(head(base.layernorm(x)[:, i]) for i, head in enumerate(heads)) / len(heads),
        positions=base.embeddings.position_embeddings[0, n_prefix:].detach())


_LIBRARIES = {
    "timm.models.vision_transformer.VisionTransformer": _of_timm,
    "torchvision.models.vision_transformer.VisionTransformer": _of_torchvision,
    "transformers.models.vit.modeling_vit.ViTForImageClassification": _of_transformers,
    "transformers.models.deit.modeling_deit.DeiTForImageClassification": _of_transformers,
    "transformers.models.deit.modeling_deit.DeiTForImageClassificationWithTeacher": _of_transformers,
}


def _preprocessing_of(model, n_channels, img_size, **facts):
    """The model's own Preprocessing, or one of these facts. Raises InputError where it is for other channels."""
    own = getattr(model, "preprocessing", None)
    if own is None:
        default = Preprocessing(img_size)
        if n_channels != len(facts.get("mean", default.mean)):  # nothing is known of such channels
            facts |= dict(mean=(0.0,) * n_channels, std=(1.0,) * n_channels)
        return replace(default, **facts)
    if len(own.mean) != n_channels:
        raise InputError(f"model.preprocessing has a mean and std of {len(own.mean)} channels, and the model takes "
                         f"{n_channels}; set model.preprocessing to that of its training")
    return own


def _classes_of(head):
    """The number of classes of a head, by its last linear layer, quantised or not; None where it has none."""
    widths = [layer.out_features for layer in head.modules() if hasattr(layer, "out_features")]
    return widths[-1] if widths else None


def listed_names(id2label):
    """The names of transformers' {0: name, ...} by number: its order is any, and its keys may be words. None where one
    is missing."""
    by_number = {str(key): name for key, name in id2label.items()}
    names = [by_number.get(str(i)) for i in range(len(by_number))]
    return None if None in names else names


# ---- Checks -----------------------------------------------------------------------------------------------


def _check_kind(images, in_channels):
    """Raises InputError unless images are a tensor of floating-point numbers that holds one image at least."""
    if not isinstance(images, torch.Tensor):
        raise InputError(f"got images as a {type(images).__name__}; expected a tensor (B, {in_channels}, height, "
                         f"width), which vit_bridge.data.images.prepare_images(images, model) makes")
    if not images.is_floating_point():
        raise InputError(f"got images of {images.dtype}; expected normalised floating-point numbers, which "
                         f"vit_bridge.data.images.prepare_images(images, model) makes of pictures")
    if not images.numel():
        raise InputError(f"got images of shape {tuple(images.shape)}, in which there is no image; expected at least "
                         f"one")


def check_depth(model, depth):
    """depth, or the last where it is None. Raises InputError where the model is not that deep."""
    last = len(adapt(model).layers) - 1
    if depth is None:
        return last
    if not isinstance(depth, int) or not 0 <= depth <= last:
        raise InputError(f"depth {depth!r} is out of range; this {class_name(model)} has depths 0 to {last}")
    return depth


def check_head(model):
    """Raises InputError for a model without a head."""
    if not adapt(model).has_head:
        raise InputError(f"this {class_name(model)} has no head, so there is no class to explain; give one with a "
                         f"head, or ask for attention or rollout")


def check_has_head(model):
    """Raises InputError for a known model without a head, or with nn.Identity in its place. Others may call their
    head what they like."""
    model = unwrapped(model)
    try:
        headless = not adapt(model).has_head
    except InputError:
        return
    parts = [part for name in HEADS for part in getattr(model, name, torch.nn.Identity()).modules()]
    if headless and all(isinstance(part, torch.nn.Identity | torch.nn.Sequential) for part in parts):
        raise InputError(f"this {class_name(model)} has no head, it gives features and no classes; build it with "
                         f"n_classes and train it")


def check_pool(pool):
    """Raises InputError where no rows of tokens are what the head reads."""
    if pool not in ("cls", "mean", CLS_AND_DISTILLATION):
        raise InputError(f"the head reads {pool}, not CLS, CLS and a distillation token, or the mean of the patches; "
                         f"there is no row of tokens to show for it")
