"""A forward pass with everything kept: the tokens after each block, the attention map of each head, the logits.

    capture(model, images)          all three, as a Capture; with gradients on request. `keep` reduces each block's
                                    attention as it is computed, so that one block's maps are in memory at a time
    backward_by_blocks(model, seen, answer)   gradients of the tokens and of the maps, a block at a time, last to first
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


@contextmanager
def differentiable():
    """Computes gradients inside, even where the caller has switched them off (no_grad, inference_mode). It decorates a
    function: @differentiable()."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


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
    each of the L blocks, else (B, H, N, N), rows are queries and sum to one; logits (B, K), or what a model without a
    head gives, as ViTAdapter.read has it; grid (rows, columns) of the patches; adapter of the model; calls: the (args,
    kwargs) with which each block was called, the tokens first."""
    tokens: list
    maps: list
    logits: torch.Tensor
    grid: tuple
    adapter: ViTAdapter
    calls: list


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
    another library's model whose captured logits differ from those of a plain pass, or from what its adapter reads from
    its last tokens; NoNumbers where maps or logits are not finite.
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
        _check_logits(model, images[:1], logits[:1])
    return seen


@dataclass
class Step:
    """Where backward_by_blocks has come to: after `place` blocks, which is L at the head and 0 before the first block;
    gradient (B, N, D), of the answer with respect to seen.tokens[place]; kept: what `keep` made of block `place`, the
    one just passed, None at the head."""
    place: int
    gradient: torch.Tensor
    kept: object = None


def backward_by_blocks(model, seen, answer, keep=None):
    """The backward pass from the head to the first block, with the graph of one block in memory at a time: a Step at
    the head, and one for each block, from the last to the first. Who has seen enough stops asking.

    seen    the Capture of a pass; with keep=None that costs least
    answer  a function logits (B, K) -> a number, of which the gradients are taken
    keep    a function (maps, gradient), both (B, H, N, N) -> what is kept of a block's attention and of the gradient
            with respect to it. None: no map is computed

    Each block is computed again from its own input (as in Chen et al. 2016, "Training Deep Nets with Sublinear Memory
    Cost"), and the chain rule passes the gradient on. Raises InputError for a model that is quantised or was made in
    inference mode, for one that does not attend as a plain ViT does, and where the head or a block, computed alone,
    does not give again what it gave in the pass.
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
    """(gradient, kept) before block `place`, from the gradient after it."""
    (given, *args), kwargs = seen.calls[place]
    _check_again(model, f"what block {place + 1} is given", given, seen.tokens[place], seen)
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
        self.kept.append(_without_the_rest(self.keep(len(self.kept), attended), attended.maps))
        self.product = None
        return attended.maps

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """As torch's scaled_dot_product_attention: (B, H, N, W) each -> (B, H, N, W)."""
        if query.shape[-2] != key.shape[-2]:  # a pooling head's, where a learned token asks for the others
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        if is_causal or enable_gqa:
            raise InputError("causal or grouped attention is not what a ViT has; its maps are not computed here")
        query = query / math.sqrt(query.shape[-1]) if scale is None else query * scale
        scores = query @ key.transpose(-2, -1)  # (B, H, N, N)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
            scores = scores + attn_mask
        maps = scores.softmax(dim=-1)
        del scores  # so that maps are not held twice while they are kept
        return self.note(Attended(maps, query, key, attn_mask)) @ value

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


def _without_the_rest(kept, maps):
    """What is kept, copied where it is a view of a part of the maps, which would hold all of them in memory."""
    if not isinstance(kept, torch.Tensor) or kept.numel() >= maps.numel():
        return kept
    return kept.clone() if kept.untyped_storage().data_ptr() == maps.untyped_storage().data_ptr() else kept


def _is_map(result):
    return result.ndim == 4 and result.shape[-1] == result.shape[-2] > 1


def _check_kept(model):
    """Raises InputError for a model that keeps nothing for gradients: one that has none, or one of timm whose blocks
    are computed again in the backward pass."""
    _check_differentiable(model)
    if getattr(model, "grad_checkpointing", False):
        raise InputError(f"this {class_name(model)} computes its blocks again in the backward pass, where nobody "
                         f"watches; call model.set_grad_checkpointing(False) first")


def _check_differentiable(model):
    """Raises InputError for a model that has no gradients: one that is quantised, or one made in inference mode."""
    if is_quantised(model):
        raise InputError(f"this {class_name(model)} is quantised, and no gradient passes weights of whole numbers; ask "
                         f"for attention or rollout, or give the model that it was made from")
    if any(weight.is_inference() for weight in model.parameters()):
        raise InputError(f"this {class_name(model)} was made inside torch.inference_mode(), and its weights take no "
                         f"part in gradients; make or load it outside")


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
    if not recorder.kept:
        raise InputError(f"no attention map was seen in this {class_name(model)}: it attends in a kernel of its own, "
                         f"such as xFormers, FlashAttention or FlexAttention; of transformers build it with "
                         f"attn_implementation='sdpa', of the hub's DINOv2 set XFORMERS_DISABLED=1 before it is loaded")
    if len(recorder.kept) != n_blocks or recorder.sizes != {(n_tokens, n_tokens)}:
        raise InputError(f"{len(recorder.kept)} attention maps of {sorted(recorder.sizes)} tokens were seen, "
                         f"expected {n_blocks}, one a block, of {n_tokens} tokens; this model does not attend as a "
                         f"plain ViT does")
    if not recorder.finite:
        raise NoNumbers(_no_numbers(model))


class NoNumbers(InputError):
    """A model's output holds NaN or infinity."""


def check_finite_numbers(model, *values):
    """Raises NoNumbers unless all these values of a model are finite, and InputError where one is no tensor."""
    for value in values:
        if not isinstance(value, torch.Tensor):
            raise InputError(f"this {class_name(model)} gives a {type(value).__name__}, expected a tensor of logits or "
                             f"features; of transformers, set model.config.return_dict = True")
    if not all(value.isfinite().all() for value in values):
        raise NoNumbers(_no_numbers(model))


def _no_numbers(model):
    return (f"this {class_name(model)} gives NaN or infinity for these images, and nothing can be seen in that; give a "
            f"model whose training went well, or call .float() on one in half precision")


def alike_within(model, dtype):
    """How far, as a part of the largest logit, a captured pass may differ from a plain one with logits of a dtype."""
    return ALIKE_QUANTISED if is_quantised(model) else max(ALIKE, 8 * torch.finfo(dtype).eps)


def _check_again(model, what, found, expected, seen):
    """Raises InputError unless a part of the model gives again what it gave in the pass that was seen."""
    apart, length = (at_least_float32(one.detach()).norm().item() for one in (found - expected, expected))
    if not apart <= alike_within(model, seen.logits.dtype) * length:
        raise InputError(f"{what} of this {class_name(model)} differs from what it was in the whole pass (by "
                         f"{apart:.1e}, where its length is {length:.1e}); its gradients cannot be taken block by "
                         f"block")


def _check_logits(model, images, logits):
    """Raises InputError unless the model gives these logits in a plain pass, too."""
    with evaluating(model), torch.no_grad():
        own = logits_of(model(to_model(images.detach(), model)))
    if words := _apart(model, own, logits):
        raise InputError(f"with explicit attention this {class_name(model)} gives other logits than in a plain pass "
                         f"({words}); its maps would not be those it uses")


def _check_read(model, adapter, tokens, logits):
    """Raises InputError unless the adapter reads from the tokens after the last block what the model gives."""
    with evaluating(model), torch.no_grad():
        read = adapter.read(tokens.detach())
    if words := _apart(model, read, logits):
        raise InputError(f"this {class_name(model)} makes something else of the tokens after its last block than a "
                         f"{adapter.library} ViT with this head ({words}); it is not known here")


def _apart(model, own, logits):
    """How far two outputs of a model differ, in words; "" where only by rounding."""
    if own.shape != logits.shape:
        return f"shape {tuple(logits.shape)}, expected {tuple(own.shape)}"
    difference, scale = (own - logits.detach()).abs().max().item(), max(1.0, own.abs().max().item())
    return "" if difference <= alike_within(model, own.dtype) * scale else f"largest difference {difference:.1e}"
