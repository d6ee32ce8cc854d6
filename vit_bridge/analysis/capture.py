"""One forward pass with its intermediate results: tokens after each block, attention maps, logits.

capture(model, images)      all of them, as a Capture, with gradients if set; attention_maps: the maps alone
backward_by_blocks(...)     gradients of tokens and maps, from the last block to the first, one in memory at a time
predict_logits(...), watch_layer(...)   the logits alone, or the output of one layer; both also for ConvNets

Fused attention computes no maps, so AttentionCapture replaces it with an explicit softmax during the pass.

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
ALIKE = 1e-4  # how far a captured pass may differ from an ordinary one, relative to the largest logit
ALIKE_QUANTISED = 0.05  # the same tolerance for a model that rounds its activations to 8 bits


@contextmanager
def differentiable():
    """Enable gradients inside, even if the caller has disabled them with no_grad or inference_mode.

    It is a context manager and also a decorator: @differentiable().
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


@dataclass
class Attended:
    """The attention of one block, passed to `keep`.

    Attributes
    ----------
    maps : Tensor, shape (B, H, N, N)
        softmax(query @ key^T + bias). Rows are queries and sum to one.
    query, key : Tensor, shape (B, H, N, W), or None
        The query includes its scale. Both are None if the scores are not a product of queries and keys.
    bias : Tensor, shape (B or 1, H or 1, N, N), or None
        The term that the block adds to the scores, such as a relative position bias.
    """

    maps: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    bias: torch.Tensor | None


def whole_maps(block, attended):
    """Keep all maps of a block, (B, H, N, N): the default `keep` of `capture`."""
    return attended.maps


@dataclass
class Capture:
    """The results of one forward pass.

    Attributes
    ----------
    tokens : list of Tensor, each (B, N, D)
        L + 1 tensors: before the first block, then after each block.
    maps : list
        For each of the L blocks, what `keep` returned: by default (B, H, N, N), whose rows are queries and sum to one.
    logits : Tensor, shape (B, K)
        For a model without a head, its output as `ViTAdapter.read` describes it.
    grid : tuple of int
        (rows, columns) of the patches.
    adapter : ViTAdapter
        The adapter of the model.
    calls : list
        (args, kwargs) of the call of each block; the first argument holds the tokens.
    """

    tokens: list
    maps: list
    logits: torch.Tensor
    grid: tuple
    adapter: ViTAdapter
    calls: list


def capture(model, images, gradients=False, change=None, keep=whole_maps):
    """Run a model in eval mode and return its tokens, attention maps and logits.

    Hooks and training modes are restored afterwards, even after an error.

    Parameters
    ----------
    model : nn.Module
        A ViT, ours or from timm, transformers or torchvision.
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    gradients : bool, optional
        If True, logits, maps and tokens belong to one graph for `torch.autograd.grad`, even if the caller has
        disabled gradients.
    change : callable, optional
        (index of the block from 0, map) -> map. The pass continues with the returned map.
    keep : callable, optional
        (index of the block from 0, Attended) -> what to store in `maps`, for example a row or a mean. None computes
        no maps at all, which is fastest if you only need tokens and logits.

    Returns
    -------
    Capture

    Raises
    ------
    InputError
        If the model is not a supported ViT, if it does not accept these images, or if it does not attend as a plain ViT
        does. With `gradients`, also if the model is quantised or uses gradient checkpointing. For a model from
        a different library, also if its captured logits differ from an ordinary forward pass or from its adapter's.
    NoNumbers
        If maps or logits are not finite.
    """
    model = unwrapped(model)
    adapter, calls, outputs = adapt_vit(model), [], []
    adapter.check_images(images)
    if gradients:
        _check_kept(model)
    grid = adapter.grid(images)
    hooks = [block.register_forward_pre_hook(lambda module, *call: calls.append(call), with_kwargs=True)
             for block in adapter.blocks]
    hooks += [block.register_forward_hook(lambda module, args, output: outputs.append(tokens_of(output)))
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
    seen = Capture([calls[0][0][0], *outputs], recorder.kept if keep else [], logits, grid, adapter, calls)
    if adapter.library != "ours":
        _check_read(model, adapter, seen.tokens[-1], logits)
    if keep is None:
        return seen
    _check_maps(model, recorder, len(adapter.blocks), adapter.n_prefix + grid[0] * grid[1])
    if change is None and adapter.library != "ours":
        check_same_logits(model, images[:1], logits[:1])
    return seen


@dataclass
class Step:
    """One position of `backward_by_blocks`, from the head to the first block.

    Attributes
    ----------
    place : int
        Number of blocks before this point: L at the head, 0 before the first block.
    gradient : Tensor, shape (B, N, D)
        Gradient with respect to `seen.tokens[place]`.
    kept : object
        What `keep` returned for `blocks[place]`, the block just passed; None at the head.
    """

    place: int
    gradient: torch.Tensor
    kept: object = None


def backward_by_blocks(model, seen, answer, keep=None):
    """Backpropagate from the head to the first block with the graph of only one block in memory at a time.

    This is a generator: stop iterating as soon as you have what you need. Each block is computed again from its own
    input, and its gradient follows by the chain rule.

    Parameters
    ----------
    model : nn.Module
        The model that computed `seen`.
    seen : Capture
        The forward pass. Capturing with `keep=None` is cheapest.
    answer : callable
        Logits (B, K) -> the scalar to differentiate.
    keep : callable, optional
        (maps, gradient), both (B, H, N, N) -> what to keep of a block's attention and its gradient. By default, no map
        is computed.

    Yields
    ------
    Step
        One at the head, then one for each block, from the last to the first.

    Raises
    ------
    InputError
        If the model is quantised, was created in inference mode, or does not attend as a plain ViT does; or if the head
        or a block, computed alone, returns a different result from the forward pass.

    References
    ----------
    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    model, adapter = unwrapped(model), seen.adapter
    _check_differentiable(model)
    with differentiable(), evaluating(model):
        tokens = seen.tokens[-1].detach().requires_grad_()
        logits = adapter.read(tokens)
        _check_again(model, "what the head reads from the last tokens", logits, seen.logits, seen)
        gradient, = torch.autograd.grad(answer(logits), tokens)  # (B, N, D)
    yield Step(len(adapter.blocks), gradient)
    for place in reversed(range(len(adapter.blocks))):
        gradient, kept = _back_over(model, seen, place, gradient, keep)
        yield Step(place, gradient, kept)


@differentiable()
def _back_over(model, seen, place, gradient, keep):
    """Return (gradient before block `place`, what `keep` returned), from the gradient after the block."""
    (given, *args), kwargs = seen.calls[place]
    _check_again(model, f"the input of block {place + 1}", given, seen.tokens[place], seen)
    recorder = AttentionCapture() if keep else nullcontext()
    tokens = given.detach().requires_grad_()
    with evaluating(model), recorder:
        output = tokens_of(seen.adapter.blocks[place](tokens, *args, **kwargs))  # (B, N, D)
    _check_again(model, f"block {place + 1}, computed alone,", output, seen.tokens[place + 1], seen)
    if keep is None:
        return torch.autograd.grad(output, tokens, grad_outputs=gradient)[0], None
    _check_maps(model, recorder, 1, seen.adapter.n_prefix + seen.grid[0] * seen.grid[1])
    maps, = recorder.kept
    gradient, to_maps = torch.autograd.grad(output, (tokens, maps), grad_outputs=gradient)
    return gradient, keep(maps.detach(), to_maps)


def attention_maps(model, images):
    """Return the attention weights of every block and head, (L, B, H, N, N); rows are queries and sum to one.

    Parameters
    ----------
    model : nn.Module
        A ViT, ours or from timm, transformers or torchvision. For a model in half precision the maps are float32.
    images : Tensor, shape (B, C, height, width)
        Normalised images.

    Raises
    ------
    InputError
        For the same reasons as `capture`.
    """
    return at_least_float32(torch.stack(capture(model, images).maps))  # (L, B, H, N, N)


@torch.no_grad()
def predict_logits(model, images):
    """Return the model's logits, (B, K), computed in eval mode without gradients.

    Parameters
    ----------
    model : nn.Module
        A classifier: a ViT, a hybrid or a ConvNet.
    images : Tensor, shape (B, C, height, width)
        Normalised images.

    Raises
    ------
    InputError
        If the model does not accept these images.
    NoNumbers
        If the logits are not finite.
    """
    model = unwrapped(model)
    adapt(model).check_images(images)
    with evaluating(model):
        logits = logits_of(model(to_model(images, model)))
    check_finite_numbers(model, logits)
    return logits


def watch_layer(model, layer, images, run=None):
    """Return (pixels, output, result) in one graph for `torch.autograd.grad`.

    `pixels` are the images, `output` is the output of the layer, and `result` is `run(images)`.

    Parameters
    ----------
    model : nn.Module
        Any classifier.
    layer : nn.Module
        A layer of the model.
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    run : callable, optional
        What to run on the images; the model itself by default.

    Raises
    ------
    InputError
        If the model is quantised, was created in inference mode, or uses gradient checkpointing.
    """
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
    """A context that computes attention as an explicit softmax and collects what `keep` returns.

    It intercepts the torch functions that compute attention, not modules, so it works with any library.
    """

    def __init__(self, change=None, keep=whole_maps, least=2):
        super().__init__()
        self.least = least  # smallest number of tokens that counts as a map
        self.kept, self.sizes, self.finite = [], set(), True
        self.change, self.keep = change, keep
        self.product = None  # (query, key^T, their product) of the last product that could be scores

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self.attend_in_projection(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in MATMULS and self.is_map(result):
            self.product = (*args[:2], result)
        if func not in SOFTMAXES or not self.is_map(result):
            return result
        if self.product is None or self.product[2].shape != result.shape:
            return self.note(Attended(result, None, None, None))
        query, transposed, product = self.product
        scale, bias = _scale_and_bias(args[0] if args else kwargs["input"], product)
        return self.note(Attended(result, query * scale, transposed.transpose(-2, -1), bias))

    def is_map(self, result):
        return result.ndim == 4 and result.shape[-1] == result.shape[-2] >= self.least

    def note(self, attended):
        """Store what `keep` returns for a block, and return the map for the rest of the pass."""
        if self.change is not None:
            attended.maps = self.change(len(self.kept), attended.maps)
        self.sizes.add(tuple(attended.maps.shape[-2:]))
        self.finite = self.finite and bool(attended.maps.isfinite().all())
        self.kept.append(_without_the_rest(self.keep(len(self.kept), attended), attended.maps))
        self.product = None
        return attended.maps

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """Replace torch's scaled_dot_product_attention: three (B, H, N, W) -> (B, H, N, W)."""
        if query.shape[-2] != key.shape[-2]:  # a pooling head with a learned query
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        if is_causal or enable_gqa:
            raise InputError("a ViT has no causal or grouped-query attention; maps of this model cannot be captured")
        query = query / math.sqrt(query.shape[-1]) if scale is None else query * scale
        scores = query @ key.transpose(-2, -1)  # (B, H, N, N)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
            scores = scores + attn_mask
        maps = scores.softmax(dim=-1)
        del scores  # free the scores before `keep` runs
        return self.note(Attended(maps, query, key, attn_mask)) @ value

    def attend_in_projection(self, query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias,
                             bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, **others):
        """Replace torch's multi_head_attention_forward, tokens first: (N, B, D) -> (N, B, D), None."""
        if query is not key or key is not value or in_proj_weight is None or bias_k is not None or add_zero_attn \
                or others.get("attn_mask") is not None or others.get("key_padding_mask") is not None:
            raise InputError("a ViT has no cross-attention and no masked attention; maps of this model cannot be "
                             "captured")
        qkv = F.linear(query, in_proj_weight, in_proj_bias)  # (N, B, 3 D)
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 1, 3, 0, 4)  # 3 x (B, H, N, W)
        heads = self.attend(q, k, v)  # (B, H, N, W)
        return F.linear(heads.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias), None  # (N, B, D)


def _without_the_rest(kept, maps):
    """Copy a kept tensor if it is a view of part of the maps; a view would keep all maps in memory."""
    if not isinstance(kept, torch.Tensor) or kept.numel() >= maps.numel():
        return kept
    return kept.clone() if kept.untyped_storage().data_ptr() == maps.untyped_storage().data_ptr() else kept


def _check_kept(model):
    """Raise InputError for a model whose activations cannot be kept for gradients.

    Either the model has no gradients, or it is a timm model that recomputes its blocks in the backward pass.
    """
    _check_differentiable(model)
    if getattr(model, "grad_checkpointing", False):
        raise InputError(f"this {class_name(model)} uses gradient checkpointing, which discards the tokens of its "
                         f"blocks; call model.set_grad_checkpointing(False) first")


def _check_differentiable(model):
    """Raise InputError for a model without gradients: quantised, or created in inference mode."""
    if is_quantised(model):
        raise InputError(f"this {class_name(model)} is quantised, so it has no gradients; use attention or rollout, or "
                         f"the model before quantisation")
    if any(weight.is_inference() for weight in model.parameters()):
        raise InputError(f"this {class_name(model)} was created inside torch.inference_mode(), so its weights have no "
                         f"gradients; create or load it outside")


def _scale_and_bias(scores, product):
    """Return (scale, bias) with scores = scale * product + bias, (B, H, N, N); bias is None if it is zero."""
    if scores is product:
        return 1.0, None
    given, whole = scores.detach(), product.detach()
    largest = whole.abs().argmax()
    scale = (given.flatten()[largest] / whole.flatten()[largest]).item()
    size = (scale * whole).abs().max()  # not from the scores: a mask makes them infinite
    if (given - scale * whole).abs().max() <= 16 * torch.finfo(given.dtype).eps * size:
        return scale, None
    seen = given.isfinite()
    scale = ((given * whole)[seen].sum() / whole[seen].square().sum()).item()  # least squares: the smallest bias
    return scale, scores - scale * product


def _check_maps(model, recorder, n_blocks, n_tokens):
    """Raise InputError unless every block computed one finite map over n_tokens tokens."""
    if not recorder.kept:
        raise InputError(f"this {class_name(model)} computed no attention map that could be captured: it uses a "
                         f"special kernel, such as xFormers, FlashAttention or FlexAttention; build a transformers "
                         f"model with attn_implementation='sdpa', or set XFORMERS_DISABLED=1 before you load DINOv2 "
                         f"from the hub")
    if len(recorder.kept) != n_blocks or recorder.sizes != {(n_tokens, n_tokens)}:
        raise InputError(f"this model computed {len(recorder.kept)} attention maps over {sorted(recorder.sizes)} "
                         f"tokens; expected {n_blocks}, one per block, over {n_tokens} tokens; use a plain ViT")
    if not recorder.finite:
        raise NoNumbers(_no_numbers(model))


class NoNumbers(InputError):
    """An InputError for a model whose output contains NaN or infinity."""


def check_finite_numbers(model, *values):
    """Raise NoNumbers unless all values are finite, and InputError if one is not a tensor."""
    for value in values:
        if not isinstance(value, torch.Tensor):
            raise InputError(f"this {class_name(model)} returns a {type(value).__name__}; expected a tensor of logits "
                             f"or features; for a transformers model set model.config.return_dict = True")
    if not all(value.isfinite().all() for value in values):
        raise NoNumbers(_no_numbers(model))


def _no_numbers(model):
    return (f"this {class_name(model)} returns NaN or infinity for these images; use a model whose training converged, "
            f"or call .float() on a model in half precision")


def alike_within(model, dtype):
    """Return how far, relative to the largest logit, a captured pass may differ from an ordinary one."""
    return ALIKE_QUANTISED if is_quantised(model) else max(ALIKE, 8 * torch.finfo(dtype).eps)


def _check_again(model, what, found, expected, seen):
    """Raise InputError unless a part of the model reproduces its result of the captured pass."""
    apart, length = (at_least_float32(one.detach()).norm().item() for one in (found - expected, expected))
    if not apart <= alike_within(model, seen.logits.dtype) * length:
        raise InputError(f"{what} of this {class_name(model)} differs from the whole pass (by {apart:.1e}, for a norm "
                         f"of {length:.1e}), so its gradients cannot be computed block by block; use a plain ViT")


def check_same_logits(model, images, logits):
    """Raise InputError unless an ordinary forward pass returns the same logits."""
    with evaluating(model), torch.no_grad():
        own = logits_of(model(to_model(images.detach(), model)))
    if words := _apart(model, own, logits):
        raise InputError(f"with explicit attention, this {class_name(model)} returns different logits from an ordinary "
                         f"forward pass ({words}), so the maps would not be the model's own; use a plain ViT or Swin "
                         f"Transformer")


def _check_read(model, adapter, tokens, logits):
    """Raise InputError unless the adapter reads the model's own output from the last tokens."""
    with evaluating(model), torch.no_grad():
        read = adapter.read(tokens.detach())
    if words := _apart(model, read, logits):
        raise InputError(f"this {class_name(model)} does not read its last tokens as a {adapter.library} ViT with this "
                         f"head does ({words}); use a model whose head is not customised")


def _apart(model, own, logits):
    """Describe how two outputs differ; return "" if they differ only by rounding."""
    if own.shape != logits.shape:
        return f"shape {tuple(logits.shape)}, expected {tuple(own.shape)}"
    difference, scale = (own - logits.detach()).abs().max().item(), max(1.0, own.abs().max().item())
    return "" if difference <= alike_within(model, own.dtype) * scale else f"largest difference {difference:.1e}"
