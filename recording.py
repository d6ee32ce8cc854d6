"""A forward pass, watched: the tokens after every block, the attention maps of every head, and the logits.

    record(model, images)           all three, as a Recording; with gradients where asked for
    attention_maps(model, images)   the maps alone, as one tensor
    answers_of(model, images)       the logits alone, of a ConvNet too
    anatomy_of(model)               where blocks, patches, prefix tokens, positions and head of a ViT lie

Our own models go in, and the ViTs of timm, transformers (ViT, DeiT) and torchvision, as they are. Fused attention holds
no maps; so while a pass is watched its softmax is worked out beside it, and what goes on is computed from that. Nothing
is stored on a module, and afterwards hooks, modes and weights are as they were, also after an error.

Letters:  B images, C channels, L blocks, H heads, N tokens (prefix tokens, then patches), D width, K classes,
          n patches.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from cnn_model import ConvNet
from vit_model import InputError, VisionTransformer, check_images, grid_of, pair

SOFTMAXES = (F.softmax, torch.softmax, torch.Tensor.softmax)
ALIKE = 1e-4  # by so much, of the largest logit, a watched pass of another library's model may differ from its own


@dataclass(frozen=True)
class Anatomy:
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


@dataclass
class Recording:
    """tokens: L + 1 of (B, N, D), before the first block and after each; maps: L of (B, H, N, N), rows are queries and
    sum to one; logits (B, K); grid (rows, columns) of the patches; anatomy of the model."""
    tokens: list
    maps: list
    logits: torch.Tensor
    grid: tuple
    anatomy: Anatomy


def record(model, images, gradients=False, change=None):
    """Recording of a model in eval mode.

    images     normalised, (B, C, height, width)
    gradients  True: logits, maps and tokens hang together, for torch.autograd.grad
    change     a function (block number, map) -> map; the pass goes on with what it gives

    It does so also where the caller has switched gradients off (no_grad, inference_mode). Raises InputError for a model
    that is no ViT known here, for images that it does not take, for gradients of a model that does not keep its blocks'
    tokens for them, and where the maps are not those that its own answers come from; NoNumbers where they or the
    answers are no numbers.
    """
    anatomy, tokens = anatomy_of(model), []
    check_input(images, anatomy)
    if gradients:
        check_kept(model)
    grid = anatomy.grid(images)
    hooks = [anatomy.blocks[0].register_forward_pre_hook(lambda module, args: tokens.append(args[0]))]
    hooks += [block.register_forward_hook(lambda module, args, output: tokens.append(only(output)))
              for block in anatomy.blocks]
    recorder = AttentionRecorder(change)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), evaluating(model), recorder:
            pixels = to_model(images.detach(), model).clone().requires_grad_(gradients)
            logits = logits_of(model(pixels))  # (B, K)
    finally:
        for hook in hooks:
            hook.remove()
    check_maps(recorder.maps, len(anatomy.blocks), anatomy.n_prefix + grid[0] * grid[1])
    check_finite_numbers(model, logits, *recorder.maps)
    if change is None and anatomy.library != "ours":
        check_answers(model, images[:1], logits[:1])
    return Recording(tokens, recorder.maps, logits, grid, anatomy)


def attention_maps(model, images):
    """Softmax attention weights of every block and head, (L, B, H, N, N); rows are queries and sum to one. Of a model
    in half precision they are float32.

    images: normalised, (B, C, height, width). Raises InputError as record does.
    """
    return at_least_float32(torch.stack(record(model, images).maps))  # (L, B, H, N, N)


@torch.no_grad()
def answers_of(model, images):
    """The model's logits, (B, K), in eval mode. Raises InputError for images that it does not take, and where it gives
    no numbers."""
    check_batch(images, model)
    with evaluating(model):
        logits = logits_of(model(to_model(images, model)))
    check_finite_numbers(model, logits)
    return logits


@contextmanager
def differentiable():
    """Gradients are computed here, also where the caller has switched them off (no_grad, inference_mode). A function is
    decorated with it: @differentiable()."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def watch_layer(model, layer, images, run=None):
    """(pixels, output, answer) of one layer, hanging together for torch.autograd.grad: the images that gradients go to,
    what the layer gave of them, and what `run`, the model itself where it is None, gave at the end. Raises InputError
    for a model that does not keep its blocks' tokens for gradients."""
    check_kept(model)
    outputs = []
    hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with differentiable(), evaluating(model):
            pixels = to_model(images.detach(), model).clone().requires_grad_()
            answer = (run or model)(pixels)
    finally:
        hook.remove()
    return pixels, outputs[0], answer


class AttentionRecorder(TorchFunctionMode):
    """While this is entered attention is worked out by an explicit softmax, and `maps` collects that, (B, H, N, N).

    It sees the functions of torch that attention is made of, not the modules, so that it asks nothing of a library.
    """

    def __init__(self, change=None):
        super().__init__()
        self.maps, self.change = [], change

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self.attend_in_projection(*args, **kwargs)
        result = func(*args, **kwargs)
        return self.note(result) if func in SOFTMAXES and is_map(result) else result

    def note(self, attention):
        if self.change is not None:
            attention = self.change(len(self.maps), attention)
        self.maps.append(attention)
        return attention

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """As torch's scaled_dot_product_attention: (B, H, N, K) each -> (B, H, N, K)."""
        if is_causal or enable_gqa:
            raise InputError("causal or grouped attention is not what a ViT has; its maps are not worked out here")
        scores = query @ key.transpose(-2, -1)  # (B, H, N, N)
        scores = scores / math.sqrt(query.shape[-1]) if scale is None else scores * scale
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return self.note(scores.softmax(dim=-1)) @ value

    def attend_in_projection(self, query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias,
                             bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, **others):
        """As torch's multi_head_attention_forward, tokens first: (N, B, D) -> (N, B, D), and None for the weights."""
        if query is not key or key is not value or in_proj_weight is None or bias_k is not None or add_zero_attn \
                or others.get("attn_mask") is not None or others.get("key_padding_mask") is not None:
            raise InputError("attention between two sequences, or masked, is not what a ViT has; its maps are not "
                             "worked out here")
        qkv = F.linear(query, in_proj_weight, in_proj_bias)  # (N, B, 3 D)
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 1, 3, 0, 4)  # 3 x (B, H, N, K)
        heads = self.attend(q, k, v)  # (B, H, N, K)
        return F.linear(heads.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias), None  # (N, B, D)


def is_map(result):
    return result.ndim == 4 and result.shape[-1] == result.shape[-2] > 1


def check_input(images, anatomy):
    """Raises InputError unless images are normalised, (B, C, height, width), B > 0, of a size that the model takes."""
    check_kind(images, anatomy.in_channels)
    size = None if anatomy.any_size else anatomy.img_size
    if anatomy.library == "ours":
        check_images(images, anatomy.in_channels, size)
    elif images.ndim != 4 or images.shape[1] != anatomy.in_channels or tuple(images.shape[2:]) != (
            size or tuple(images.shape[2:])):
        sides = "height, width" if size is None else f"{size[0]}, {size[1]}"
        raise InputError(f"got images of shape {tuple(images.shape)}, expected (B, {anatomy.in_channels}, {sides}); "
                         f"convert or resize them")
    anatomy.grid(images)


def check_batch(images, model):
    """check_input, of any model that is known here, a ConvNet too, which minds no size."""
    if isinstance(model, ConvNet):
        check_kind(images, model.config.in_channels)
    else:
        check_input(images, anatomy_of(model))


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


def check_kept(model):
    """Raises InputError for a model that keeps nothing for gradients: one made in inference mode, or one of timm whose
    blocks are computed again in the backward pass."""
    if any(weight.is_inference() for weight in model.parameters()):
        raise InputError(f"this {type(model).__name__} was made inside torch.inference_mode(), and its weights take no "
                         f"part in gradients; make or load it outside")
    if getattr(model, "grad_checkpointing", False):
        raise InputError(f"this {type(model).__name__} computes its blocks again in the backward pass, where nobody "
                         f"watches; call model.set_grad_checkpointing(False) first")


def check_maps(maps, n_blocks, n_tokens):
    """Raises InputError unless there is a map over so many tokens for each block."""
    sizes = sorted({tuple(one.shape[-2:]) for one in maps})
    if len(maps) != n_blocks or sizes != [(n_tokens, n_tokens)]:
        raise InputError(f"{len(maps)} attention maps of {sizes or 'no'} tokens were seen, expected {n_blocks}, one a "
                         f"block, of {n_tokens} tokens; this model does not attend as a plain ViT does")


class NoNumbers(InputError):
    """A model gives NaN or infinity."""


def check_finite_numbers(model, *values):
    """Raises NoNumbers unless all that a model gives are numbers."""
    if not all(value.isfinite().all() for value in values):
        raise NoNumbers(f"this {type(model).__name__} gives NaN or infinity for these images, and nothing can be seen "
                        f"in that; give a model whose training went well, or call .float() on one in half precision")


def check_answers(model, images, logits):
    """Raises InputError unless the model gives these logits when nobody watches."""
    with evaluating(model), torch.no_grad():
        own = logits_of(model(to_model(images.detach(), model)))
    difference, scale = (own - logits.detach()).abs().max().item(), max(1.0, own.abs().max().item())
    if not difference <= max(ALIKE, 8 * torch.finfo(own.dtype).eps) * scale:
        raise InputError(f"with its attention worked out this {type(model).__name__} answers otherwise than by itself "
                         f"(largest difference {difference:.1e}); its maps would not be those it uses")


# ---- Whose model it is ------------------------------------------------------------------------------------


def anatomy_of(model):
    """The Anatomy of a ViT. Raises InputError for what is none that is known here."""
    for name, describe in ANATOMIES.items():
        if any(f"{cls.__module__}.{cls.__qualname__}" == name for cls in type(model).__mro__):
            return describe(model)
    raise InputError(f"a {type(model).__name__} has no attention maps that are known here; expected a "
                     f"VisionTransformer or HybridCNNViT, or a ViT of timm, transformers (for image classification) or "
                     f"torchvision (of a ConvNet there is explanations.explain(model, images, 'grad_cam'))")


def of_ours(model):
    n = model.patch_embed.n_patches
    return Anatomy("ours", list(model.blocks), pair(model.config.patch_size, "patch_size"), model.n_prefix_tokens,
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
    return Anatomy("timm", list(model.blocks), tuple(model.patch_embed.patch_size), model.num_prefix_tokens, pool,
                   lambda x: model.forward_head(model.norm(x)), classes_of(model.head), projection, positions,
                   tuple(model.patch_embed.img_size), projection.in_channels, names_of(model, model.head),
                   bool(getattr(model, "dynamic_img_size", False)))


def of_torchvision(model):
    return Anatomy("torchvision", list(model.encoder.layers), pair(model.patch_size, "patch_size"), 1, "cls",
                   lambda x: model.heads(model.encoder.ln(x)[:, 0]), classes_of(model.heads), model.conv_proj,
                   model.encoder.pos_embedding[0, 1:].detach(), pair(model.image_size), 3,
                   names_of(model, model.heads))


def of_transformers(model):
    """ViTForImageClassification and DeiTForImageClassification, whose head reads CLS."""
    base, config = getattr(model, model.base_model_prefix), model.config
    layers = base.layers if hasattr(base, "layers") else base.encoder.layer  # since version 5, before
    n_prefix = 2 if config.model_type == "deit" else 1
    positions = base.embeddings.position_embeddings[0, n_prefix:].detach()
    return Anatomy("transformers", list(layers), pair(config.patch_size, "patch_size"), n_prefix, "cls",
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


ANATOMIES = {
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


def logits_of(output):
    """What a model gave, as logits: transformers has them in an object."""
    return getattr(output, "logits", output)


@contextmanager
def evaluating(model):
    """Inside, the whole model is in eval mode; afterwards each of its modules is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def device_of(model):
    """The device that the model's parameters are on."""
    return next(model.parameters()).device


def to_model(images, model):
    """Images on the device and in the precision of the model's parameters."""
    one = next(model.parameters())
    return images.to(one.device, one.dtype) if one.is_floating_point() else images.to(one.device)


def at_least_float32(values):
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
