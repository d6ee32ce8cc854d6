"""How the library sees a model: ours, or a ViT of timm, transformers or torchvision.

Shapes:  B images, C channels, L blocks, N tokens (prefix tokens, then patches), D width, K classes, n patches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vit_bridge.errors import InputError
from vit_bridge.models.convnet import ConvNet
from vit_bridge.preprocessing import NORMALISATION, channel_numbers
from vit_model import VisionTransformer, check_images, grid_of, pair


@dataclass(frozen=True)
class ViTAdapter:
    """Where the parts of a ViT lie.

    library      whose model it is: "ours", "timm", "transformers" or "torchvision"
    blocks       its L encoder blocks, each (B, N, D) -> (B, N, D)
    patch_size   (height, width) in pixels
    n_prefix     tokens before the patches: CLS, distillation token, registers
    pool         what the head reads: "cls", "mean" (over the patches), or words for another way
    read         tokens after any block, (B, N, D) -> logits (B, K): the last norm, the pooling and the head
    n_classes    K, of the last linear layer of the head; None where there is none, and `read` gives features
    projection   the layer that makes patches into tokens, or the stem before them
    positions    (n, D), of the patches; None where there are none
    img_size     (height, width) in pixels that it is built for
    in_channels  of its images
    class_names  a list of K, or None where the model has none that fit its head
    any_size     whether it takes images of other sizes too
    """
    library: str
    blocks: list
    patch_size: tuple
    n_prefix: int
    pool: str
    read: Callable
    n_classes: int | None
    projection: torch.nn.Module
    positions: torch.Tensor | None
    img_size: tuple
    in_channels: int
    class_names: list | None
    any_size: bool = False

    @property
    def has_head(self):
        return self.n_classes is not None

    def grid(self, images):
        """Patches of these images along (height, width)."""
        return grid_of(tuple(images.shape[2:]), self.patch_size)


def check_input(images, adapter):
    """Raises InputError unless images are normalised, (B, C, height, width), B > 0, of a size that the model takes."""
    check_kind(images, adapter.in_channels)
    size = None if adapter.any_size else adapter.img_size
    if adapter.library == "ours":
        check_images(images, adapter.in_channels, size)
    elif images.ndim != 4 or images.shape[1] != adapter.in_channels or tuple(images.shape[2:]) != (
            size or tuple(images.shape[2:])):
        sides = "height, width" if size is None else f"{size[0]}, {size[1]}"
        raise InputError(f"got images of shape {tuple(images.shape)}, expected (B, {adapter.in_channels}, {sides}); "
                         f"convert or resize them")
    adapter.grid(images)


def check_batch(images, model):
    """check_input, of any model that is known here, a ConvNet too, which minds no size."""
    if isinstance(model, ConvNet):
        check_kind(images, model.config.in_channels)
    else:
        check_input(images, adapt(model))


def check_kind(images, in_channels):
    """Raises InputError unless images are a tensor of floating-point numbers that holds one image at least."""
    if not isinstance(images, torch.Tensor):
        raise InputError(f"got images as a {type(images).__name__}; expected a tensor (B, {in_channels}, height, "
                         f"width), which pictures.prepare_images(images, model) makes")
    if not images.is_floating_point():
        raise InputError(f"got images of {images.dtype}; expected normalised floating-point numbers, which "
                         f"pictures.prepare_images(images, model) makes of pictures")
    if not images.numel():
        raise InputError(f"got images of shape {tuple(images.shape)}, in which there is no image; expected at least "
                         f"one")


# ---- Whose model it is ------------------------------------------------------------------------------------


def adapt(model):
    """The Anatomy of a ViT. Raises InputError for what is none that is known here."""
    for name, describe in ADAPTERS.items():
        if any(f"{cls.__module__}.{cls.__qualname__}" == name for cls in type(model).__mro__):
            return describe(model)
    raise InputError(f"a {type(model).__name__} has no attention maps that are known here; expected a "
                     f"VisionTransformer or HybridCNNViT, or a ViT of timm, transformers (for image classification) or "
                     f"torchvision (of a ConvNet there is explanations.explain(model, images, 'grad_cam'))")


def of_ours(model):
    n = model.patch_embed.n_patches
    return ViTAdapter("ours", list(model.blocks), pair(model.config.patch_size, "patch_size"), model.n_prefix_tokens,
                   model.config.pool, lambda x: model.forward_head(model.norm(x)), classes_of(model.head),
                   model.patch_embed.proj, None if model.pos_embed is None else model.pos_embed[0, -n:].detach(),
                   model.patch_embed.img_size, model.config.in_channels, names_of(model, model.head),
                   model.patch_embed.any_size)


def of_timm(model):
    pool = {"token": "cls", "avg": "mean", "": "every token by itself"}.get(model.global_pool, model.global_pool)
    if pool == "mean" and getattr(model, "pool_include_prefix", False):
        pool = "the mean of all tokens"
    if hasattr(model, "head_dist"):
        pool = "CLS and the distillation token"
    projection = getattr(model.patch_embed, "proj", None)
    if not isinstance(projection, torch.nn.Conv2d):
        raise InputError(f"this {type(model).__name__} of timm makes its tokens in another way than by one projection "
                         f"of patches, and is not known here; give a plain ViT")
    n = model.patch_embed.num_patches
    positions = None if model.pos_embed is None else model.pos_embed.reshape(-1, model.embed_dim)[-n:].detach()
    return ViTAdapter("timm", list(model.blocks), tuple(model.patch_embed.patch_size), model.num_prefix_tokens, pool,
                   lambda x: model.forward_head(model.norm(x)), classes_of(model.head), projection, positions,
                   tuple(model.patch_embed.img_size), projection.in_channels, names_of(model, model.head),
                   bool(getattr(model, "dynamic_img_size", False)))


def of_torchvision(model):
    return ViTAdapter("torchvision", list(model.encoder.layers), pair(model.patch_size, "patch_size"), 1, "cls",
                   lambda x: model.heads(model.encoder.ln(x)[:, 0]), classes_of(model.heads), model.conv_proj,
                   model.encoder.pos_embedding[0, 1:].detach(), pair(model.image_size), 3,
                   names_of(model, model.heads))


def of_transformers(model):
    """ViTForImageClassification and DeiTForImageClassification, whose head reads CLS."""
    base, config = getattr(model, model.base_model_prefix), model.config
    layers = base.layers if hasattr(base, "layers") else base.encoder.layer  # since version 5, before
    n_prefix = 2 if config.model_type == "deit" else 1
    positions = base.embeddings.position_embeddings[0, n_prefix:].detach()
    return ViTAdapter("transformers", list(layers), pair(config.patch_size, "patch_size"), n_prefix, "cls",
                   lambda x: model.classifier(base.layernorm(x)[:, 0]), classes_of(model.classifier),
                   base.embeddings.patch_embeddings.projection, positions, pair(config.image_size), config.num_channels,
                   names_of(model, model.classifier, listed_names(config.id2label)))


def classes_of(head):
    """How many classes a head tells apart, by its last linear layer; None where it has none."""
    layers = [layer for layer in head.modules() if isinstance(layer, torch.nn.Linear)]
    return layers[-1].out_features if layers else None


def listed_names(id2label):
    """The names of transformers' {0: name, ...} by number: its order is any, and its keys may be words. None where one
    is missing."""
    by_number = {str(key): name for key, name in id2label.items()}
    names = [by_number.get(str(i)) for i in range(len(by_number))]
    return None if None in names else names


def names_of(model, head, names=None):
    """Names of the classes, where the model has as many as its head has classes; else None."""
    names = getattr(model, "class_names", None) or names
    return list(names) if names and len(names) == classes_of(head) else None


ADAPTERS = {
    f"{VisionTransformer.__module__}.VisionTransformer": of_ours,
    "timm.models.vision_transformer.VisionTransformer": of_timm,
    "torchvision.models.vision_transformer.VisionTransformer": of_torchvision,
    "transformers.models.vit.modeling_vit.ViTForImageClassification": of_transformers,
    "transformers.models.deit.modeling_deit.DeiTForImageClassification": of_transformers,
}


# ---- What the functions above lean on ---------------------------------------------------------------------


def only(output):
    """A block's tokens, where a library gives them in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def layers_of(model):
    """What makes the tokens or the first map, then the blocks (ViT, hybrid) or stages (ConvNet).

    Raises InputError for another kind of model than a ConvNet and the ViTs that recording.anatomy_of knows.
    """
    if isinstance(model, VisionTransformer):
        return [model.patch_embed, *model.blocks]
    if isinstance(model, ConvNet):
        return [model.stem, *model.stages]
    try:
        adapter = adapt(model)
    except InputError:
        raise InputError(f"a {type(model).__name__} has no known layers; expected a ConvNet, a VisionTransformer or "
                         f"HybridCNNViT, or a ViT of timm, transformers or torchvision") from None
    return [adapter.projection, *adapter.blocks]


def check_depth(model, depth):
    """depth, or the last where it is None. Raises InputError where the model is not that deep."""
    last = len(layers_of(model)) - 1
    if depth is None:
        return last
    if not isinstance(depth, int) or not 0 <= depth <= last:
        raise InputError(f"depth {depth!r} is out of range; this {type(model).__name__} has depths 0 to {last}")
    return depth


# ---- What the functions above lean on ---------------------------------------------------------------------


def check_head(model):
    """Raises InputError for a model without a head."""
    if not has_head(model):
        raise InputError(f"this {type(model).__name__} has no head, so there is no class to explain; give one with a "
                         f"head, or ask for attention or rollout")


def has_head(model):
    return bool(model.config.n_classes) if isinstance(model, ConvNet) else adapt(model).has_head


def class_names_of(model):
    return getattr(model, "class_names", None) if isinstance(model, ConvNet) else adapt(model).class_names


def check_pool(pool):
    """Raises InputError where the head reads neither CLS nor the mean of the patches."""
    if pool not in ("cls", "mean"):
        raise InputError(f"the head reads {pool}, neither CLS alone nor the mean of the patches; there is no row of "
                         f"tokens to show for it")


def input_of(model):
    """(channels, (height, width), whether other sizes will do too) of the images that a model takes."""
    if isinstance(model, ConvNet):
        return model.config.in_channels, pair(model.config.img_size), False
    adapter = adapt(model)
    return adapter.in_channels, adapter.img_size, adapter.any_size


def statistics_of(model):
    """(mean, std) of the images that the model was trained on, each a tuple of floats, or ImageNet's where it has none.
    Raises InputError where those of the model are not one number for each of its channels."""
    kept = getattr(model, "pretrained_cfg", None) or {}  # timm's
    if getattr(getattr(model, "config", None), "model_type", None) == "vit":  # of transformers
        kept = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    own = {name: getattr(model, name, None) for name in ("mean", "std")}
    own = {name: kept.get(name) if values is None else values for name, values in own.items()}
    if any(values is None for values in own.values()):
        return NORMALISATION["folder"]
    n_channels, advice = input_of(model)[0], "set model.mean and model.std to those of its training"
    return tuple(channel_numbers(name, values, n_channels, advice) for name, values in own.items())
