"""Adapters for all models: the library's own by their protocol, ViTs of other libraries by their class.

    adapt(model)       its ModelAdapter: layers, image size, classes; a ViTAdapter if it has attention
    adapt_vit(model)   its ViTAdapter, or an InputError; adapt_attention also accepts a WindowAdapter (Swin)
    reading_weights    how much of each token the head reads

LIBRARIES lists the supported classes. To add one, write a function that returns its ViTAdapter, and add an entry.

Shapes:  B images, C channels, N tokens (prefix tokens, then patches), D width, K classes, n patches.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vit_bridge.errors import InputError, assume
from vit_bridge.models.protocol import ask, class_name, is_ours
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.runtime import tokens_of, unwrapped
from vit_model import check_images, grid_of, pair

HEADS = "head", "heads", "classifier"  # the libraries' names for a head
CLS_AND_DISTILLATION = "CLS and the distillation token"  # distilled DeiT
CLS_AND_PATCHES = "CLS and the mean of the patches"  # DINOv2
SINGLE_TOKENS = "every token by itself"
# {what a head reads: (weights of the first tokens, weight of all patches together)}
SHARES = {"cls": ((1.0,), 0.0), "mean": ((), 1.0), CLS_AND_DISTILLATION: ((0.5, 0.5), 0.0),
          CLS_AND_PATCHES: ((0.5,), 0.5)}


@dataclass(frozen=True, kw_only=True)
class ModelAdapter:
    """The facts that the library needs about a model.

    Attributes
    ----------
    library : str
        "ours", "timm", "transformers", "torchvision" or "dinov2" (from its hub).
    layers : list of nn.Module
        The stem or patch projection, then the stages or blocks.
    img_size : (int, int)
        Height and width, in pixels, for which the model is built.
    in_channels : int
        Channels of its images.
    n_classes : int or None
        K. None if the model has no head and returns features.
    preprocessing : Preprocessing
        How its input images must be preprocessed.
    assumed : str
        Which part of `preprocessing` is a guess, as a message for errors.assume; "" if none is. The message
        appears when an image is prepared.
    any_size : bool
        Whether it accepts images of other sizes.
    tables : list of (Tensor, (int, int))
        The relative position bias tables, (offsets, H), and their grid or window: one for each block, or one that all
        blocks share, before those of the blocks if a model has both. Empty if there is none.
    attends : bool
        Whether its layers are attention blocks. If so, the adapter is a ViTAdapter.
    unit : str
        What a layer is called: "stage" or "block".
    """

    library: str
    layers: list
    img_size: tuple
    in_channels: int
    n_classes: int | None
    preprocessing: Preprocessing
    assumed: str = ""
    any_size: bool = False
    tables: list = ()
    attends = windowed = projects_patches = False
    unit = "stage"

    @property
    def has_attention(self):
        """Whether the model attends to tokens: as a ViT, or within windows."""
        return self.attends or self.windowed

    @property
    def size_step(self):
        """What the height and width of its images must be multiples of, in pixels."""
        return 1, 1

    @property
    def has_head(self):
        """Whether the model returns logits."""
        return self.n_classes is not None

    @property
    def class_names(self):
        """The K class names, or None if no names match the head."""
        names = self.preprocessing.class_names
        return names if names and len(names) == self.n_classes else None

    def check_images(self, images):
        """Raise InputError unless the model accepts these images.

        They must be normalised, (B, C, height, width), with B > 0 and a size that the model accepts.
        """
        _check_kind(images, self.in_channels)
        if self.library == "ours":
            check_images(images, self.in_channels, None if self.any_size else self.img_size)
            return
        size = tuple(images.shape[2:]) if self.any_size else self.img_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (self.in_channels, *size):
            wanted = "height, width" if self.any_size else f"{size[0]}, {size[1]}"
            raise InputError(f"got images of shape {tuple(images.shape)}, expected (B, {self.in_channels}, {wanted}); "
                             f"convert or resize them")

    def as_map(self, output, images, depth):
        """Return the output of layers[depth] for these images as a map (B, D, rows, columns)."""
        return output


@dataclass(frozen=True, kw_only=True)
class ViTAdapter(ModelAdapter):
    """The facts that the library needs about a ViT, and references to its parts.

    Attributes
    ----------
    patch_size : (int, int)
        Height and width of a patch, in pixels.
    prefix : tuple of str
        Names of the tokens before the patches: "CLS", "distillation token", "register".
    pool : str
        What the head reads: "cls", "mean" (of the patches), CLS_AND_DISTILLATION (the mean of two heads, one for each
        token), CLS_AND_PATCHES (CLS and the mean of the patches, concatenated), or a description of something else. If
        a model has no head and returns all tokens, it is "cls" if there is a CLS, because the views show that token.
    read : callable
        Maps the tokens (B, N, D) after any block to what the model would return if that block were the last: logits
        (B, K); without a head for classes, features (B, D), all tokens after the last norm (B, N, D), or the logits of
        each patch.
    projection : nn.Module
        The layer that turns patches into tokens, or the stem before it.
    positions : Tensor, shape (n, D), or None
        Position embeddings of the patches.
    """

    patch_size: tuple
    prefix: tuple
    pool: str
    read: Callable
    projection: torch.nn.Module
    positions: torch.Tensor | None
    attends = True
    unit = "block"

    @property
    def size_step(self):
        """The patch size: images of other sizes cannot be cut into patches."""
        return self.patch_size

    @property
    def n_prefix(self):
        """The number of tokens before the patches."""
        return len(self.prefix)

    @property
    def blocks(self):
        """The encoder blocks, each (B, N, D) -> (B, N, D)."""
        return self.layers[1:]

    @property
    def reads_patches(self):
        """Whether the head reads the patch tokens. If not, their last values are never used."""
        return SHARES.get(self.pool, ((), 1.0))[1] > 0

    @property
    def projects_patches(self):
        """Whether each token is a projection of its own patch only, and not of an overlapping window."""
        return getattr(self.projection, "kernel_size", None) == self.patch_size

    def grid(self, images):
        """Return the number of patches of these images along (height, width)."""
        return grid_of(tuple(images.shape[2:]), self.patch_size)

    def as_map(self, output, images, depth):
        """Return the patch tokens after layers[depth] as a map (B, D, rows, columns), without the prefix."""
        grid, output = self.grid(images), tokens_of(output)
        if output.ndim == 4:
            return output  # of a convolution, the projection
        return output[:, -grid[0] * grid[1]:].transpose(1, 2).unflatten(2, grid)

    def check_images(self, images):
        """Raise InputError unless the model accepts these images and their sides are multiples of the patch size."""
        super().check_images(images)
        self.grid(images)


@dataclass(frozen=True, kw_only=True)
class WindowAdapter(ModelAdapter):
    """The facts that the library needs about a Swin Transformer: stages of blocks with attention within windows.

    Attributes
    ----------
    patch_size : (int, int)
        Height and width of a patch of the first stage, in pixels. It doubles in each stage.
    stages : list of list of nn.Module
        The blocks of each stage.
    window_of : callable
        (block, (h, w)) -> ((height, width) of its windows, shift) for a map of h x w tokens. Call it after a pass.
    projection : nn.Module
        The layer that turns patches into tokens.
    pads_first : bool
        Whether maps are padded before they are rolled.
    channels_last : bool
        Whether the layers return (B, h, w, D).
    least_side : int
        Smallest number of tokens along a side of a map that the blocks accept.
    """

    patch_size: tuple
    stages: list
    window_of: Callable
    projection: torch.nn.Module
    pads_first: bool = True
    channels_last: bool = False
    least_side: int = 1
    windowed = True
    pool = "mean"
    prefix = ()
    n_prefix = 0
    reads_patches = projects_patches = True

    @property
    def size_step(self):
        """The patch size: images of other sizes cannot be cut into patches."""
        return self.patch_size

    @property
    def blocks(self):
        """The blocks of all stages, in order."""
        return [block for stage in self.stages for block in stage]

    @property
    def stage_of_block(self):
        """The stage of each block, from 0."""
        return [i for i, stage in enumerate(self.stages) for _ in stage]

    def grid(self, images):
        """Return the number of patches of these images along (height, width)."""
        return grid_of(tuple(images.shape[2:]), self.patch_size)

    def grid_in(self, images, stage):
        """Return the number of tokens along (height, width) in a stage, from 0."""
        return tuple(-(-side // 2**stage) for side in self.grid(images))

    def patch_size_in(self, stage):
        """Return the height and width in pixels of a token in a stage, from 0."""
        return tuple(side << stage for side in self.patch_size)

    def as_map(self, output, images, depth):
        """Return the output of layers[depth] for these images as a map (B, D, rows, columns)."""
        output = tokens_of(output)
        if output.ndim == 3:
            return output.transpose(1, 2).unflatten(2, self.grid_in(images, max(depth - 1, 0)))
        return output.permute(0, 3, 1, 2) if self.channels_last and depth else output

    def check_images(self, images):
        """Raise InputError unless the model accepts these images and their sides are multiples of the patch size."""
        super().check_images(images)
        self.grid(images)
        if (side := min(self.grid_in(images, len(self.stages) - 1))) < self.least_side:
            raise InputError(f"got images of {images.shape[2]}x{images.shape[3]} pixels, whose last map has only "
                             f"{side} tokens along a side, but this model's windows need {self.least_side}; use larger "
                             f"images")


def adapt(model):
    """Return the ModelAdapter of a model, or of the model inside torch's wrappers.

    Parameters
    ----------
    model : nn.Module
        A model of this library, a ViT of timm, transformers, torchvision or DINOv2's hub, or a Swin Transformer of
        timm, transformers or torchvision.

    Returns
    -------
    ModelAdapter
        A ViTAdapter if the model's layers are attention blocks, a WindowAdapter for a Swin Transformer.

    Raises
    ------
    InputError
        If the model's class is unknown.
    """
    model = unwrapped(model)
    if ask(model, "encoder"):
        raise InputError(f"a {class_name(model)} learns without labels and has no head; train its encoder on images "
                         f"with labels, `python train_vit.py --pretrained FILE --data-dir LABELLED`, or use "
                         f"model.encoder()")
    if is_ours(model):
        return _of_ours(model)
    if make := _maker_for(model):
        return make(model)
    inside = [f"pass the {class_name(part)} inside it, its module {name!r}" for name, part in getattr(
        model, "named_modules", tuple)() if is_ours(part) or _maker_for(part)]
    advice = inside[0] if inside else (
        "expected a model of vit_bridge.models, a VisionTransformer or SwinTransformer of timm or torchvision, a "
        "Beit of timm, a VisionTransformer of DINOv2's hub, or a ViT, DeiT, DINOv2, ViT-MSN, I-JEPA, BEiT or Swin "
        "model of transformers; for another class, save its state_dict and try load()")
    raise InputError(f"the class {class_name(model)} is not supported; {advice}")


def adapt_unlabelled(model):
    """Return the ModelAdapter of a model for its images and layers; unlike adapt, also if it learns without labels."""
    model = unwrapped(model)
    return _of_ours(model) if ask(model, "encoder") else adapt(model)


def preprocessing_of(model):
    """Return how a model's images must be prepared, for any model that records it.

    Besides the supported classes these are models with a `preprocessing`, and other models of timm.

    Raises
    ------
    InputError
        If nothing records it.
    """
    model = unwrapped(model)
    if is_ours(model) or _maker_for(model):
        adapter = adapt(model)
        if adapter.assumed:
            assume(adapter.assumed)
        return adapter.preprocessing
    if (own := getattr(model, "preprocessing", None)) is not None:
        return own
    facts = _facts_of_timm(model)
    if "mean" not in facts:
        raise InputError(f"nothing records how images for this {class_name(model)} are prepared; set "
                         f"model.preprocessing = Preprocessing(img_size, mean, std, class_names=...)")
    return Preprocessing(tuple(model.pretrained_cfg.get("input_size", (3, 224, 224))[1:]), **facts)


def images_of_ours(model):
    """Return the Preprocessing that a model of this library records, or ImageNet's if it records none."""
    return _images_of(model, model.config.in_channels, model.config.img_size)["preprocessing"]


def _facts_of_timm(model):
    """Return what a model of timm records about its images; nothing if it was built by its class."""
    kept = getattr(model, "pretrained_cfg", None) or {}
    return {name: kept[name] for name in ("mean", "std", "interpolation") if kept.get(name) is not None}


def _images_of_timm(model, n_channels, img_size):
    """Return the fields `preprocessing` and `assumed` of the adapter of a model of timm."""
    facts = _facts_of_timm(model)
    unsure = "" if "mean" in facts else "ImageNet's; timm.create_model would record the model's own"
    return _images_of(model, n_channels, img_size, unsure, **facts)


def adapt_vit(model):
    """Return the ViTAdapter of a model. Raises InputError if its layers are not attention blocks."""
    adapter = adapt(model)
    if adapter.windowed:
        raise InputError(f"a {class_name(model)} attends within windows, and its tokens change between stages, so this "
                         f"view, which follows the same tokens through all blocks, does not apply; use the attention "
                         f"of a patch=(row, column), the attention distance, or Grad-CAM")
    if not adapter.attends:
        raise InputError(f"a {class_name(model)} has no attention maps; use a ViT, or Grad-CAM: "
                         f"explain(model, images, 'grad_cam')")
    return adapter


def adapt_attention(model):
    """Return the ViTAdapter or WindowAdapter of a model. Raises InputError if it has no attention."""
    adapter = adapt(model)
    return adapter if adapter.has_attention else adapt_vit(model)


# ---- Adapters by library ----------------------------------------------------------------------------------


def _of_ours(model):
    """Adapt a model that follows the protocol."""
    config, n_classes = model.config, _classes_of(model.head)
    common = dict(library="ours", layers=model.layers(), img_size=pair(config.img_size), in_channels=config.in_channels,
                  n_classes=n_classes, any_size=ask(model, "any_size"),
                  **_images_of(model, config.in_channels, config.img_size))
    if ask(model, "windowed"):
        stages = [list(stage.blocks) for stage in model.stages]
        return WindowAdapter(
            **common, patch_size=model.patch_embed.patch_size, stages=stages, projection=model.patch_embed.proj,
            window_of=lambda block, size: (block.attn.grid_size, block.attn.shift_in(size)),
            tables=[(block.attn.relative_position_bias_table.detach(), block.attn.grid_size) for stage in stages
                    for block in stage if config.relative_bias])
    if not ask(model, "attends"):
        return ModelAdapter(**common)
    n, distilled = model.patch_embed.n_patches, model.n_cls_tokens == 2
    return ViTAdapter(
        **common, patch_size=pair(config.patch_size, "patch_size"),
        prefix=_prefix(1, model.n_prefix_tokens - model.n_cls_tokens, distilled),
        pool=CLS_AND_DISTILLATION if distilled else config.pool, projection=model.patch_embed.proj,
        read=lambda x: model.forward_head(model.norm(x)), tables=_tables_in(model, model.patch_embed.grid_size),
        positions=None if model.pos_embed is None else model.pos_embed[0, -n:].detach())


def _tables_in(model, grid):
    """Return the tables of a BEiT of any library, and their grid; an empty list for a ViT without tables."""
    return [(table.detach(), grid) for name, table in model.named_parameters()
            if name.endswith("relative_position_bias_table")]


def _of_timm(model, prefix=None):
    """Adapt a VisionTransformer of timm, which may be distilled, have registers, or lack CLS or a head.

    `prefix` is needed for a class that does not record it.

    Kinds of attention that are unsupported but not refused here are refused by the views that need the maps.
    """
    embed, n_classes = model.patch_embed, _classes_of(model.head)
    projection = getattr(embed, "proj", None)
    if not isinstance(projection, torch.nn.Conv2d) or "backbone" in embed._modules:
        raise InputError(f"this {class_name(model)} of timm does not make its tokens by one projection of patches, "
                         f"which is not supported; use a plain ViT")
    if differential := [name for name in map(class_name, model.blocks.modules()) if name.startswith("Diff")]:
        raise InputError(f"this {class_name(model)} of timm uses {differential[0]}, the difference of two maps, "
                         f"which is not supported; use a plain ViT")
    pool = TIMM_POOLS.get(model.global_pool, f"the patches by timm's pooling {model.global_pool!r}")
    if pool == "mean" and getattr(model, "pool_include_prefix", False):
        pool = "the mean of all tokens"
    if pool == SINGLE_TOKENS and n_classes is not None:
        raise InputError(f"this {class_name(model)} of timm computes logits for each token (global_pool=''), which "
                         f"is not supported; build it with global_pool='token' or 'avg', or with num_classes=0")
    distilled = "head_dist" in model._modules
    prefix = prefix or _prefix(model.has_class_token, model.num_reg_tokens, distilled)
    if pool == SINGLE_TOKENS and "CLS" in prefix:
        pool = "cls"
    return ViTAdapter(
        library="timm", layers=[projection, *model.blocks], img_size=tuple(embed.img_size), n_classes=n_classes,
        in_channels=projection.in_channels, any_size=bool(getattr(model, "dynamic_img_size", False)),
        **_images_of_timm(model, projection.in_channels, embed.img_size),
        patch_size=tuple(embed.patch_size), pool=CLS_AND_DISTILLATION if distilled else pool,
        prefix=prefix, read=lambda x: model.forward_head(model.norm(x)), projection=projection,
        tables=_tables_in(model, tuple(embed.grid_size)),
        positions=None if model.pos_embed is None else model.pos_embed[0, -embed.num_patches:].detach())


def _of_timm_beit(model):
    return _of_timm(model, _prefix(1))


TIMM_POOLS = {"token": "cls", "avg": "mean", "": SINGLE_TOKENS, "map": "the patches by attention pooling"}


def _of_torchvision(model):
    """Adapt a VisionTransformer of torchvision."""
    return ViTAdapter(
        library="torchvision", layers=[model.conv_proj, *model.encoder.layers], img_size=pair(model.image_size),
        in_channels=model.conv_proj.in_channels, n_classes=_classes_of(model.heads),
        **_images_of(model, model.conv_proj.in_channels, model.image_size),
        patch_size=pair(model.patch_size, "patch_size"), prefix=_prefix(1), pool="cls",
        read=lambda x: model.heads(model.encoder.ln(x)[:, 0]), projection=model.conv_proj,
        positions=model.encoder.pos_embedding[0, 1:].detach())


def _of_hub_dinov2(model):
    """Adapt a DinoVisionTransformer of facebookresearch/dinov2.

    Its blocks may be grouped in chunks; each chunk is padded with nn.Identity up to its first block.
    """
    chunks = model.blocks if model.chunked_blocks else [model.blocks]
    blocks = [block for chunk in chunks for block in chunk if not isinstance(block, torch.nn.Identity)]
    embed, projection = model.patch_embed, model.patch_embed.proj
    return ViTAdapter(
        library="dinov2", layers=[projection, *blocks], img_size=tuple(embed.img_size), any_size=True,
        in_channels=projection.in_channels, n_classes=_classes_of(model.head),
        **_images_of(model, projection.in_channels, embed.img_size, interpolation="bicubic"),
        patch_size=tuple(embed.patch_size), prefix=_prefix(1, getattr(model, "num_register_tokens", 0)), pool="cls",
        read=lambda x: model.head(model.norm(x)[:, 0]), projection=projection,
        positions=model.pos_embed[0, 1:].detach())


def _of_transformers(model, prefix, pool="cls", any_size=False, unsure="", **facts):
    """Adapt a model of transformers, with or without a head.

    Its base model must return all tokens after the last norm.

    Parameters
    ----------
    prefix, pool, any_size
        As in ViTAdapter, with the pool of the head.
    unsure, **facts
        As in _images_of, because the image processor that records these facts is stored apart from the model.
    """
    base, config = model.base_model, model.config
    heads = [model._modules[name] for name in ("classifier", "cls_classifier", "distillation_classifier")
             if name in model._modules]
    if not heads:
        pool = "cls" if "CLS" in prefix else SINGLE_TOKENS
    elif len(heads) == 2:
        pool = CLS_AND_DISTILLATION
    layers = base.layers if "layers" in base._modules else base.encoder.layer
    projection, img_size = base.embeddings.patch_embeddings.projection, pair(config.image_size)
    positions = base.embeddings.position_embeddings
    patch_size = pair(config.patch_size, "patch_size")
    rows, columns = grid_of(img_size, patch_size)

    def read(x):
        x = base.layernorm(x)  # (B, N, D)
        if not heads:
            return x
        return sum(head(part) for head, part in zip(heads, READ_BY[pool](x, len(prefix)), strict=True)) / len(heads)

    return ViTAdapter(
        library="transformers", layers=[projection, *layers], img_size=img_size, in_channels=config.num_channels,
        n_classes=_classes_of(heads[0]) if heads else None, any_size=any_size, patch_size=patch_size, prefix=prefix,
        **_images_of(model, config.num_channels, img_size, unsure, class_names=listed_names(config.id2label), **facts),
        pool=pool, read=read, projection=projection, tables=_tables_in(base, (rows, columns)),
        positions=None if positions is None else positions[0, -rows * columns:].detach())


# The input of each head of a model, from tokens (B, N, D) with n prefix tokens.
READ_BY = {"cls": lambda x, n: [x[:, 0]], "mean": lambda x, n: [x[:, n:].mean(dim=1)],
           CLS_AND_DISTILLATION: lambda x, n: [x[:, 0], x[:, 1]],
           CLS_AND_PATCHES: lambda x, n: [torch.cat([x[:, 0], x[:, n:].mean(dim=1)], dim=1)]}


def _of_vit(model):
    """Adapt a ViT of transformers, with the mean and std of Google's checkpoints."""
    half = (0.5,) * model.config.num_channels
    return _of_transformers(model, _prefix(1), mean=half, std=half,
                            unsure="as in Google's checkpoints; DINO's ViTs use the same class, but "
                                   "ImageNet's values")


def _of_vit_msn(model):
    return _of_transformers(model, _prefix(1))


def _of_deit(model):
    return _of_transformers(model, _prefix(1, distilled=True), interpolation="bicubic")


def _of_dinov2(model):
    """Adapt DINOv2, with or without registers. It resamples its positions for any image size."""
    return _of_transformers(model, _prefix(1, getattr(model.config, "num_register_tokens", 0)), CLS_AND_PATCHES,
                            any_size=True, interpolation="bicubic")


def _of_ijepa(model):
    return _of_transformers(model, (), "mean", unsure="ImageNet's, as in I-JEPA's training")


def _of_beit(model):
    """Adapt BEiT, which resamples its positions for any image size and may predict tokens of patches."""
    base, half = model.base_model, (0.5,) * model.config.num_channels

    def read(x):
        x = base.layernorm(x)  # (B, N, D)
        if "lm_head" in model._modules:
            return model.lm_head(model.layernorm(x[:, 1:]))  # (B, n, tokens of the tokenizer)
        return model.classifier(base.pooler(x)) if "classifier" in model._modules else x

    adapter = _of_transformers(model, _prefix(1), "mean" if model.config.use_mean_pooling else "cls", any_size=True,
                               mean=half, std=half, interpolation="bicubic",
                               unsure="as in BEiT's checkpoints; BEiT v2 and BEiT trained on ImageNet-1k alone expect "
                                      "ImageNet's values")
    if adapter.tables and len(set(adapter.tables[0][1])) == 2:
        raise InputError(f"the patches of this {class_name(model)} form no square, and transformers then mixes up the "
                         f"rows of its tables; use square images, or load() its state_dict")
    return replace(adapter, read=read)


def _classes_in(folder, make, *names):
    """Return entries of LIBRARIES for classes of transformers in one folder."""
    return {f"transformers.models.{folder}.modeling_{folder}.{name}": make for name in names}


# ---- Swin Transformers of other libraries


def _of_timm_swin(model):
    """Adapt a SwinTransformer of timm. Its windows and masks are built for one image size."""
    projection = model.patch_embed.proj
    if any(getattr(layer, "grad_checkpointing", False) for layer in model.layers):
        raise InputError(f"this {class_name(model)} uses gradient checkpointing, which hides its blocks; call "
                         f"model.set_grad_checkpointing(False) first")
    stages = [list(layer.blocks) for layer in model.layers]
    return WindowAdapter(
        library="timm", layers=[projection, *(stage[-1] for stage in stages)],
        img_size=tuple(model.patch_embed.img_size), in_channels=projection.in_channels,
        n_classes=_classes_of(model.head), channels_last=True, pads_first=False,
        **_images_of_timm(model, projection.in_channels, model.patch_embed.img_size),
        patch_size=tuple(model.patch_embed.patch_size), stages=stages, projection=projection,
        window_of=lambda block, size: (tuple(block.window_size), tuple(block.shift_size)), tables=_tables_of(stages))


def _tables_of(stages):
    """Return the table and the window of each block of timm or torchvision."""
    return [(block.attn.relative_position_bias_table.detach(), tuple(block.attn.window_size)) for stage in stages
            for block in stage]


def _of_torchvision_swin(model):
    """Adapt a SwinTransformer of torchvision, which accepts any image size and does not record its own."""
    projection = model.features[0][0]
    stages = [list(stage) for stage in list(model.features)[1::2]]
    if "cpb_mlp" in stages[0][0].attn._modules:
        raise InputError(f"this {class_name(model)} is a Swin Transformer V2, whose attention is a scaled cosine; use "
                         f"a Swin Transformer of the first version")
    return WindowAdapter(
        library="torchvision", layers=[projection, *(stage[-1] for stage in stages)], img_size=(224, 224),
        in_channels=projection.in_channels, n_classes=_classes_of(model.head), any_size=True, channels_last=True,
        **_images_of(model, projection.in_channels, 224, interpolation="bicubic"),
        patch_size=tuple(projection.kernel_size), stages=stages, projection=projection, window_of=_torchvision_window,
        tables=_tables_of(stages))


def _torchvision_window(block, size):
    """Return the window of a block, and its shift: 0 along a side that one window covers."""
    window = tuple(block.attn.window_size)
    return window, [by if length < side else 0 for by, length, side in zip(block.attn.shift_size, window, size,
                                                                           strict=True)]


def _of_transformers_swin(model):
    """Adapt a SwinModel or SwinForImageClassification of transformers."""
    base, config = model.base_model, model.config
    if config.use_absolute_embeddings:
        raise InputError(f"this {class_name(model)} adds absolute positions, which is not supported; use a Swin "
                         f"Transformer with relative positions only")
    stages = [list(stage.blocks) for stage in base.encoder.layers]
    projection, head = base.embeddings.patch_embeddings.projection, model._modules.get("classifier")
    return WindowAdapter(
        library="transformers", layers=[projection, *(stage[-1] for stage in stages)], img_size=pair(config.image_size),
        in_channels=config.num_channels, n_classes=_classes_of(head) if head else None, any_size=True,
        **_images_of(model, config.num_channels, config.image_size, class_names=listed_names(config.id2label),
                     interpolation="bicubic"),
        patch_size=pair(config.patch_size, "patch_size"), stages=stages, projection=projection,
        least_side=config.window_size,  # on a smaller map the window shrinks, but not its table
        window_of=lambda block, size: (pair(int(block.window_size)), [int(block.shift_size)] * 2),
        tables=[(block.attention.relative_position_bias.relative_position_bias_table.detach(), pair(config.window_size))
                for stage in stages for block in stage])


LIBRARIES = {  # {full name of a class: function that adapts models of this class and its subclasses}
    "timm.models.vision_transformer.VisionTransformer": _of_timm,
    "timm.models.beit.Beit": _of_timm_beit,
    "torchvision.models.vision_transformer.VisionTransformer": _of_torchvision,
    "timm.models.swin_transformer.SwinTransformer": _of_timm_swin,
    "torchvision.models.swin_transformer.SwinTransformer": _of_torchvision_swin,
    **_classes_in("swin", _of_transformers_swin, "SwinModel", "SwinForImageClassification"),
    "dinov2.models.vision_transformer.DinoVisionTransformer": _of_hub_dinov2,
    **_classes_in("vit", _of_vit, "ViTModel", "ViTForImageClassification"),
    **_classes_in("vit_msn", _of_vit_msn, "ViTMSNModel", "ViTMSNForImageClassification"),
    **_classes_in("deit", _of_deit, "DeiTModel", "DeiTForImageClassification",
                  "DeiTForImageClassificationWithTeacher"),
    **_classes_in("dinov2", _of_dinov2, "Dinov2Model", "Dinov2ForImageClassification"),
    **_classes_in("dinov2_with_registers", _of_dinov2, "Dinov2WithRegistersModel",
                  "Dinov2WithRegistersForImageClassification"),
    **_classes_in("beit", _of_beit, "BeitModel", "BeitForImageClassification", "BeitForMaskedImageModeling"),
    **_classes_in("ijepa", _of_ijepa, "IJepaModel", "IJepaForImageClassification"),
}


def _maker_for(model):
    """Return the function in LIBRARIES for a model's class or a parent of it, or None."""
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__]
    return next((LIBRARIES[name] for name in names if name in LIBRARIES), None)


def _prefix(n_cls=0, n_registers=0, distilled=False):
    """Return the names of the prefix tokens, in the order that all libraries use."""
    return ("CLS",) * n_cls + ("distillation token",) * distilled + ("register",) * n_registers


def _images_of(model, n_channels, img_size, unsure="", **facts):
    """Return the fields `preprocessing` and `assumed` of an adapter.

    They come from the model's own Preprocessing, or otherwise from these facts. If it is a guess that the facts apply
    to this model, `unsure` says whose mean and std they are. Raises InputError if the model's own Preprocessing has a
    different number of channels.
    """
    own = getattr(model, "preprocessing", None)
    if own is None:
        default = replace(Preprocessing(img_size), **facts)
        if n_channels != default.n_channels:
            facts |= dict(mean=(0.0,) * n_channels, std=(1.0,) * n_channels)
            unsure, default = f"as for any {n_channels} channels", replace(default, **facts)
        line = (f"nothing records how images for this {class_name(model)} are normalised: assuming mean "
                f"{_short(default.mean)} and std {_short(default.std)} ({unsure}); otherwise set model.preprocessing")
        return dict(preprocessing=default, assumed=line if unsure else "")
    if len(own.mean) != n_channels:
        raise InputError(f"model.preprocessing has a mean and std for {len(own.mean)} channels, but the model expects "
                         f"{n_channels}; set model.preprocessing to the one used in training")
    return dict(preprocessing=own)


def _short(numbers):
    """Return one number per channel as text, or a single number if all are equal."""
    return f"{numbers[0]:g}" if len(set(numbers)) == 1 else "(" + ", ".join(f"{one:g}" for one in numbers) + ")"


def _classes_of(head):
    """Return the number of classes of a head, read from its last linear layer, or None if it has none."""
    widths = [layer.out_features for layer in head.modules() if hasattr(layer, "out_features")]
    return widths[-1] if widths else None


def listed_names(id2label):
    """Return the names of transformers' {0: name, ...} in the order of their numbers.

    The dict may have any order, and its keys may be strings. Returns None if a number is missing.
    """
    by_number = {str(key): name for key, name in id2label.items()}
    names = [by_number.get(str(i)) for i in range(len(by_number))]
    return None if None in names else names


# ---- Checks -----------------------------------------------------------------------------------------------


def _check_kind(images, in_channels):
    """Raise InputError unless images are a floating-point tensor with at least one image."""
    if not isinstance(images, torch.Tensor):
        raise InputError(f"got images as a {type(images).__name__}; expected a tensor (B, {in_channels}, height, "
                         f"width), as vit_bridge.data.images.prepare_images(images, model) returns")
    if not images.is_floating_point():
        raise InputError(f"got images of {images.dtype}; expected normalised floating-point numbers, as "
                         f"vit_bridge.data.images.prepare_images(images, model) returns")
    if not images.numel():
        raise InputError(f"got images of shape {tuple(images.shape)}, which contains no image; expected at least "
                         f"one")


def check_depth(model, depth):
    """Return depth, or the last one if it is None. Raises InputError if the model is not that deep."""
    last = len(adapt(model).layers) - 1
    if depth is None:
        return last
    if not isinstance(depth, int) or not 0 <= depth <= last:
        raise InputError(f"depth {depth!r} is out of range; this {class_name(model)} has depths 0 to {last}")
    return depth


def check_head(model):
    """Raise InputError for a model without a head."""
    if not adapt(model).has_head:
        raise InputError(f"this {class_name(model)} has no head, so there is no class to explain; use a model with a "
                         f"head, or the views 'attention' or 'rollout'")


def check_has_head(model):
    """Raise InputError for a model of a supported class without a head, or with nn.Identity as its head.

    Models of other classes pass, because their head may have any name.
    """
    model = unwrapped(model)
    try:
        headless = not adapt(model).has_head
    except InputError:
        if is_ours(model):  # it learns without labels
            raise
        return
    parts = [part for name in HEADS for part in getattr(model, name, torch.nn.Identity()).modules()]
    if headless and all(isinstance(part, torch.nn.Identity | torch.nn.Sequential) for part in parts):
        raise InputError(f"this {class_name(model)} has no head, so it returns features and no logits; build it "
                         f"with n_classes and train it")


def check_pool(pool):
    """Raise InputError unless the head reads a mean of tokens."""
    if pool not in SHARES:
        raise InputError(f"the head reads {pool}, so no row of an attention map belongs to it; use "
                         f"visualize_attention or visualize_all_heads with patch=(row, column)")


def reading_weights(pool, n_prefix, n_tokens):
    """Return how much of each token the head reads: (N,) float64, with sum 1.

    A view of what the head reads averages the tokens' rows with these weights. Raises InputError unless the head reads
    a mean of tokens.
    """
    check_pool(pool)
    first, of_patches = SHARES[pool]
    weights = torch.zeros(n_tokens, dtype=torch.float64)
    weights[:len(first)] = torch.tensor(first, dtype=torch.float64)
    weights[n_prefix:] += of_patches / (n_tokens - n_prefix)
    return weights
