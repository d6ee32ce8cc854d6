"""A forward pass with everything kept: the tokens after each block, the attention map of each head, the logits.

    capture(model, images)          all three, as a Capture; with gradients on request. `keep` reduces each block's
                                    attention as it is computed, so that one block's maps are in memory at a time
    attention_maps(model, images)   the maps alone, as one tensor
    predict_logits(model, images)   the logits alone, of a ConvNet too

Fused attention keeps no maps, so AttentionCapture computes an explicit softmax instead, and the pass goes on with that.
Nothing is stored on a module. Afterwards hooks and modes are as they were, even after an error.

Shapes:  B images, C channels, L blocks, H heads, N tokens (prefix tokens, then patches), D width, K classes,
         W width of a head.
"""

import math
from contextlib import contextmanager, nullcontext
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
MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
ALIKE = 1e-4  # how far, as a part of the largest logit, a captured pass may differ from a plain one
ALIKE_QUANTISED = 0.05  # of a model that rounds what passes through it to 8 bits


@dataclass
class Attended:
    """What one block attends with, as `keep` is given it.

    maps        (B, H, N, N), rows are queries and sum to one: softmax(query @ key^T + bias)
    query, key  (B, H, N, W), the query with its scale in it; None where the scores are no product of the two
    bias        what is added to the scores, as of relative positions, (B or 1, H or 1, N, N); None: nothing
    """
    maps: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    bias: torch.Tensor | None


def whole_maps(block, attended):
    """A `keep` for capture: all of a block's maps, (B, H, N, N)."""
    return attended.maps


@dataclass
class Capture:
    """tokens: L + 1 of (B, N, D), before the first block and after each; maps: what `keep` made of the attention of
    each of the L blocks, else (B, H, N, N), rows are queries and sum to one; logits (B, K); grid (rows, columns) of the
    patches; adapter of the model."""
    tokens: list
    maps: list
    logits: torch.Tensor
    grid: tuple
    adapter: ViTAdapter


def capture(model, images, gradients=False, change=None, keep=whole_maps):
    """A Capture of a model in eval mode.

    images     normalised, (B, C, height, width)
    gradients  True: logits, maps and tokens are in one graph, for torch.autograd.grad, even where the caller has
               switched gradients off (no_grad, inference_mode)
    change     a function (index of the block, map) -> map; the pass goes on with what it returns
    keep       a function (index of the block, Attended) -> what is kept of it in `maps`: rows, a mean, queries and
               keys. None: no map is computed at all, for who needs the tokens alone

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
    recorder = AttentionCapture(change, keep) if keep else nullcontext()
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), evaluating(model), recorder:
            pixels = to_model(images.detach(), model).clone().requires_grad_(gradients)
            logits = logits_of(model(pixels))  # (B, K)
    finally:
        for hook in hooks:
            hook.remove()
    check_finite_numbers(model, logits)
    if keep is None:
        return Capture(tokens, [], logits, grid, adapter)
    _check_maps(model, recorder, len(adapter.blocks), adapter.n_prefix + grid[0] * grid[1])
    if change is None and adapter.library != "ours":
        _check_logits(model, images[:1], logits[:1])
    return Capture(tokens, recorder.kept, logits, grid, adapter)


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
    """While this is entered, attention is an explicit softmax, and `kept` collects what `keep` makes of each.

    It intercepts the functions of torch that attention is made of, not modules, so that it works with any library.
    """

    def __init__(self, change=None, keep=whole_maps):
        super().__init__()
        self.kept, self.sizes, self.finite = [], set(), True
        self.change, self.keep = change, keep
        self.product = None  # (query, key^T, their product): the last that could be scores

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self.attend_in_projection(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in MATMULS and _is_map(result):
            self.product = (*args[:2], result)
        if func not in SOFTMAXES or not _is_map(result):
            return result
        if self.product is None or self.product[2].shape != result.shape:
            return self.note(Attended(result, None, None, None))
        query, transposed, product = self.product
        scale, bias = _scale_and_bias(args[0] if args else kwargs["input"], product)
        return self.note(Attended(result, query * scale, transposed.transpose(-2, -1), bias))

    def note(self, attended):
        """The map of a block, with which the pass goes on; what is kept of it is kept."""
        if self.change is not None:
            attended.maps = self.change(len(self.kept), attended.maps)
        self.sizes.add(tuple(attended.maps.shape[-2:]))
        self.finite = self.finite and bool(attended.maps.isfinite().all())
        self.kept.append(self.keep(len(self.kept), attended))
        return attended.maps

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """As torch's scaled_dot_product_attention: (B, H, N, W) each -> (B, H, N, W)."""
        if is_causal or enable_gqa:
            raise InputError("causal or grouped attention is not what a ViT has; its maps are not computed here")
        query = query / math.sqrt(query.shape[-1]) if scale is None else query * scale
        scores = query @ key.transpose(-2, -1)  # (B, H, N, N)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
            scores = scores + attn_mask
        return self.note(Attended(scores.softmax(dim=-1), query, key, attn_mask)) @ value

    def attend_in_projection(self, query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias,
                             bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, **others):
        """As torch's multi_head_attention_forward, tokens first: (N, B, D) -> (N, B, D), and None for the weights."""
        if query is not key or key is not value or in_proj_weight is None or bias_k is not None or add_zero_attn \
                or others.get("attn_mask") is not None or others.get("key_padding_mask") is not None:
            raise InputError("attention between two sequences, or masked, is not what a ViT has; its maps are not "
                             "computed here")
        qkv = F.linear(query, in_proj_weight, in_proj_bias)  # (N, B, 3 D)
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 1, 3, 0, 4)  # 3 x (B, H, N, W)
        heads = self.attend(q, k, v)  # (B, H, N, W)
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


def _scale_and_bias(scores, product):
    """(scale, bias): scores (B, H, N, N) = scale * product + bias, bias None where a scale alone will do."""
    if scores is product:
        return 1.0, None
    given, whole = scores.detach(), product.detach()
    largest = whole.abs().argmax()
    scale = (given.flatten()[largest] / whole.flatten()[largest]).item()
    size = (scale * whole).abs().max()  # and not of the scores, which a mask makes infinite
    if (given - scale * whole).abs().max() <= 16 * torch.finfo(given.dtype).eps * size:
        return scale, None
    seen = given.isfinite()
    scale = ((given * whole)[seen].sum() / whole[seen].square().sum()).item()  # which leaves the smallest bias
    return scale, scores - scale * product


def _check_maps(model, recorder, n_blocks, n_tokens):
    """Raises InputError unless there was a map over n_tokens tokens for each block, of finite numbers."""
    if len(recorder.kept) != n_blocks or recorder.sizes != {(n_tokens, n_tokens)}:
        raise InputError(f"{len(recorder.kept)} attention maps of {sorted(recorder.sizes) or 'no'} tokens were seen, "
                         f"expected {n_blocks}, one a block, of {n_tokens} tokens; this model does not attend as a "
                         f"plain ViT does")
    if not recorder.finite:
        raise NoNumbers(_no_numbers(model))


class NoNumbers(InputError):
    """A model's output holds NaN or infinity."""


def check_finite_numbers(model, *values):
    """Raises NoNumbers unless all these values of a model are finite."""
    if not all(value.isfinite().all() for value in values):
        raise NoNumbers(_no_numbers(model))


def _no_numbers(model):
    return (f"this {class_name(model)} gives NaN or infinity for these images, and nothing can be seen in that; give a "
            f"model whose training went well, or call .float() on one in half precision")


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
