"""A forward pass with everything kept: the tokens after each block, the attention map of each head, the logits.

    capture(model, images)          all three, as a Capture; with gradients on request
    attention_maps(model, images)   the maps alone, as one tensor
    predict_logits(model, images)   the logits alone, of a ConvNet too

Fused attention keeps no maps, so AttentionCapture computes an explicit softmax instead, and the pass goes on with that.
Nothing is stored on a module. Afterwards hooks and modes are as they were, even after an error.

Shapes:  B images, C channels, L blocks, H heads, N tokens (prefix tokens, then patches), D width, K classes.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from vit_bridge.errors import InputError
from vit_bridge.models.adapters import ViTAdapter, adapt, adapt_vit
from vit_bridge.models.protocol import class_name
from vit_bridge.runtime import (
    at_least_float32,
    evaluating,
    is_quantised,
    logits_of,
    to_model,
    tokens_of,
    unwrapped,
)

SOFTMAXES = (F.softmax, torch.softmax, torch.Tensor.softmax)
ALIKE = 1e-4  # how far, as a part of the largest logit, a captured pass may differ from a plain one
ALIKE_QUANTISED = 0.05  # of a model that rounds what passes through it to 8 bits


@dataclass
class Capture:
    """tokens: L + 1 of (B, N, D), before the first block and after each; maps: L of (B, H, N, N), rows are queries and
    sum to one; logits (B, K); grid (rows, columns) of the patches; adapter of the model."""
    tokens: list
    maps: list
    logits: torch.Tensor
    grid: tuple
    adapter: ViTAdapter


def capture(model, images, gradients=False, change=None):
    """A Capture of a model in eval mode.

    images     normalised, (B, C, height, width)
    gradients  True: logits, maps and tokens are in one graph, for torch.autograd.grad, even where the caller has
               switched gradients off (no_grad, inference_mode)
    change     a function (index of the block, map) -> map; the pass goes on with what it returns

    Raises InputError for a model that is no known ViT, for images that it does not take, for gradients of a model that
    is quantised or does not keep the tokens of its blocks, for one that does not attend as a plain ViT does, and for
    another library's model whose captured logits differ from those of a plain pass; NoNumbers where maps or logits are
    not finite.
    """
    model = unwrapped(model)
    adapter, tokens = adapt_vit(model), []
    adapter.check_images(images)
    if gradients:
        _check_kept(model)
    grid = adapter.grid(images)
    hooks = [adapter.blocks[0].register_forward_pre_hook(lambda module, args: tokens.append(args[0]))]
    hooks += [block.register_forward_hook(lambda module, args, output: tokens.append(tokens_of(output)))
              for block in adapter.blocks]
    recorder = AttentionCapture(change)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), evaluating(model), recorder:
            pixels = to_model(images.detach(), model).clone().requires_grad_(gradients)
            logits = logits_of(model(pixels))  # (B, K)
    finally:
        for hook in hooks:
            hook.remove()
    _check_maps(recorder.maps, len(adapter.blocks), adapter.n_prefix + grid[0] * grid[1])
    check_finite_numbers(model, logits, *recorder.maps)
    if change is None and adapter.library != "ours":
        _check_logits(model, images[:1], logits[:1])
    return Capture(tokens, recorder.maps, logits, grid, adapter)


def attention_maps(model, images):
    """Softmax attention weights of every block and head, (L, B, H, N, N); rows are queries and sum to one. Of a model
    in half precision they are float32.

    images: normalised, (B, C, height, width). Raises InputError as capture does.
    """
    return at_least_float32(torch.stack(capture(model, images).maps))  # (L, B, H, N, N)


@torch.no_grad()
def predict_logits(model, images):
    """The model's logits, (B, K), in eval mode. Raises InputError for images that it does not take, and NoNumbers where
    they are not finite."""
    model = unwrapped(model)
    adapt(model).check_images(images)
    with evaluating(model):
        logits = logits_of(model(to_model(images, model)))
    check_finite_numbers(model, logits)
    return logits


@contextmanager
def differentiable():
    """Computes gradients inside, even where the caller has switched them off (no_grad, inference_mode). It decorates a
    function: @differentiable()."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def watch_layer(model, layer, images, run=None):
    """(pixels, output, result) in one graph, for torch.autograd.grad: the images, the output of the layer, and the
    result of `run` on the images (None: the model itself). Raises InputError for a model that is quantised, or does not
    keep the tokens of its blocks for gradients."""
    model = unwrapped(model)
    _check_kept(model)
    outputs = []
    hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with differentiable(), evaluating(model):
            pixels = to_model(images.detach(), model).clone().requires_grad_()
            answer = (run or model)(pixels)
    finally:
        hook.remove()
    return pixels, outputs[0], answer


class AttentionCapture(TorchFunctionMode):
    """While this is entered, attention is an explicit softmax, and `maps` collects it, (B, H, N, N).

    It intercepts the functions of torch that attention is made of, not modules, so that it works with any library.
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
        return self.note(result) if func in SOFTMAXES and _is_map(result) else result

    def note(self, attention):
        if self.change is not None:
            attention = self.change(len(self.maps), attention)
        self.maps.append(attention)
        return attention

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """As torch's scaled_dot_product_attention: (B, H, N, K) each -> (B, H, N, K)."""
        if is_causal or enable_gqa:
            raise InputError("causal or grouped attention is not what a ViT has; its maps are not computed here")
        query = query / math.sqrt(query.shape[-1]) if scale is None else query * scale
        scores = query @ key.transpose(-2, -1)  # (B, H, N, N)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return self.note(scores.softmax(dim=-1)) @ value

    def attend_in_projection(self, query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias,
                             bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, **others):
        """As torch's multi_head_attention_forward, tokens first: (N, B, D) -> (N, B, D), and None for the weights."""
        if query is not key or key is not value or in_proj_weight is None or bias_k is not None or add_zero_attn \
                or others.get("attn_mask") is not None or others.get("key_padding_mask") is not None:
            raise InputError("attention between two sequences, or masked, is not what a ViT has; its maps are not "
                             "computed here")
        qkv = F.linear(query, in_proj_weight, in_proj_bias)  # (N, B, 3 D)
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 1, 3, 0, 4)  # 3 x (B, H, N, K)
        heads = self.attend(q, k, v)  # (B, H, N, K)
        return F.linear(heads.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias), None  # (N, B, D)


def _is_map(result):
    return result.ndim == 4 and result.shape[-1] == result.shape[-2] > 1


def _check_kept(model):
    """Raises InputError for a model that keeps nothing for gradients: one that is quantised, one made in inference
    mode, or one of timm whose blocks are computed again in the backward pass."""
    if is_quantised(model):
        raise InputError(f"this {class_name(model)} is quantised, and no gradient passes weights of whole numbers; ask "
                         f"for attention or rollout, or give the model that it was made from")
    if any(weight.is_inference() for weight in model.parameters()):
        raise InputError(f"this {class_name(model)} was made inside torch.inference_mode(), and its weights take no "
                         f"part in gradients; make or load it outside")
    if getattr(model, "grad_checkpointing", False):
        raise InputError(f"this {class_name(model)} computes its blocks again in the backward pass, where nobody "
                         f"watches; call model.set_grad_checkpointing(False) first")


def _check_maps(maps, n_blocks, n_tokens):
    """Raises InputError unless there is a map over n_tokens tokens for each block."""
    sizes = sorted({tuple(one.shape[-2:]) for one in maps})
    if len(maps) != n_blocks or sizes != [(n_tokens, n_tokens)]:
        raise InputError(f"{len(maps)} attention maps of {sizes or 'no'} tokens were seen, expected {n_blocks}, one a "
                         f"block, of {n_tokens} tokens; this model does not attend as a plain ViT does")


class NoNumbers(InputError):
    """A model's output holds NaN or infinity."""


def check_finite_numbers(model, *values):
    """Raises NoNumbers unless all these values of a model are finite."""
    if not all(value.isfinite().all() for value in values):
        raise NoNumbers(f"this {class_name(model)} gives NaN or infinity for these images, and nothing can be seen "
                        f"in that; give a model whose training went well, or call .float() on one in half precision")


def alike_within(model, dtype):
    """How far, as a part of the largest logit, a captured pass may differ from a plain one with logits of a dtype."""
    return ALIKE_QUANTISED if is_quantised(model) else max(ALIKE, 8 * torch.finfo(dtype).eps)


def _check_logits(model, images, logits):
    """Raises InputError unless the model gives these logits in a plain pass, too."""
    with evaluating(model), torch.no_grad():
        own = logits_of(model(to_model(images.detach(), model)))
    difference, scale = (own - logits.detach()).abs().max().item(), max(1.0, own.abs().max().item())
    if not difference <= alike_within(model, own.dtype) * scale:
        raise InputError(f"with explicit attention this {class_name(model)} gives other logits than in a plain pass "
                         f"(largest difference {difference:.1e}); its maps would not be those it uses")
