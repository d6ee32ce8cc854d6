"""Closed-form checks of attention, rollout, relevance, Grad-CAM and the logit lens on one model.

selfcheck     runs all checks on one model

Shapes:  B images, C channels, L blocks, H heads, N tokens, D width, n patches.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vit_bridge.analysis.attention import attention_distance, uniform_attention_distance
from vit_bridge.analysis.capture import NoNumbers, alike_within, capture, differentiable, predict_logits
from vit_bridge.analysis.explanations import (
    cam_layer,
    choose_targets,
    chosen,
    explain,
    logit_lens,
    relevance_gained,
    rollout,
)
from vit_bridge.errors import InputError
from vit_bridge.models.adapters import adapt_vit, reading_weights
from vit_bridge.runtime import (
    at_least_float32,
    device_of,
    dtype_of,
    evaluating,
    is_quantised,
    logits_of,
    to_model,
    tokens_of,
    unwrapped,
)


@dataclass
class Check:
    """The result of one check.

    Attributes
    ----------
    name : str
        The property that should hold.
    holds : bool or None
        Whether it holds; None if it does not apply to this model.
    found : str
        The measured difference, or the reason why the check does not apply.
    """

    name: str
    holds: bool | None
    found: str


@differentiable()
def selfcheck(model, images=None, seed=0):
    """Check the formulas of this package on a model.

    Parameters
    ----------
    model : nn.Module
        A ViT, ours or from timm, transformers or torchvision.
    images : Tensor, shape (B, C, height, width), optional
        Normalised images. By default four images of normal noise.
    seed : int, optional
        Seed of the noise and of the finite differences.

    Returns
    -------
    list of Check
        A single failed check for a model that returns NaN or infinity.

    Notes
    -----
    The checks of attention cover the captured logits, row sums, the row that the classifier head reads, the token of
    each patch, and the distance of uniform attention. The checks of rollout cover row sums and uniform attention.
    Gradients of the maps are compared with finite differences, relevance with a different order of the products, and
    Grad-CAM with one shift of all patch tokens. The last row of the logit lens must be the prediction.

    Models are checked in the precision of their weights, without autocast. In half precision the tolerances are wider,
    in proportion to the rounding.
    """
    try:
        return _closed_forms(unwrapped(model), images, seed)
    except NoNumbers as error:
        return [Check("logits and attention maps are finite", False, str(error))]


def _closed_forms(model, images, seed):
    """Run the checks of selfcheck. Raises NoNumbers for a model that returns NaN or infinity."""
    adapter = adapt_vit(model)
    if images is None:
        size = (4, adapter.in_channels, *adapter.img_size)
        images = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    rounding = max(1.0, torch.finfo(dtype_of(model)).eps / torch.finfo(torch.float32).eps)
    with torch.autocast(device_of(model).type, enabled=False):
        checks = _check_attention_and_rollout(model, images, rounding)
        if not adapter.has_head:
            return [*checks, Check("relevance, Grad-CAM, logit lens", None, "this model has no head")]
        if is_quantised(model):
            return [*checks, Check("relevance, Grad-CAM", None, "this model is quantised, so it has no gradients")]
        checks += [_check_map_gradients(model, images[:1], seed), _check_relevance(model, images, rounding),
                   _check_grad_cam(model, images, rounding), _check_last_gradient(model, images[:1])]
        difference = logit_lens(model, images)[-1] - predict_logits(model, images).cpu().float().softmax(dim=1)
        return [*checks, within("the logit lens ends in the model's own prediction", difference.abs().max(),
                                1e-5 * rounding)]


def _check_attention_and_rollout(model, images, rounding):
    """Run the checks that do not depend on a class."""
    hooks = _count_hooks(model)
    seen = capture(model, images, keep=_over_the_heads)
    kept = [mean for mean, _ in seen.maps]
    n_blocks, n_tokens, first = len(kept), kept[0].shape[-1], seen.adapter.n_prefix
    checks = [_check_own_logits(model, images, seen, hooks)]
    checks.append(within("attention rows sum to one", max(off for _, off in seen.maps), 1e-5 * rounding))
    checks += [_check_head_row(model, images, kept[-1], seen), _check_places(model, images)]
    rolled = rollout(torch.stack(kept)[:, :, None].cpu().double())  # the mean over the heads, as a single head
    checks.append(within("rollout rows sum to one", (rolled.sum(dim=-1) - 1).abs().max(),
                         1e-9 if rounding == 1 else 1e-6 * rounding))
    uniform = capture(model, images[:1], change=_uniform_attention, keep=_over_the_heads)
    even = torch.stack([mean for mean, _ in uniform.maps])[:, :, None].float()  # (L, 1, 1, N, N)
    expected = 2.0**-n_blocks * torch.eye(n_tokens) + (1 - 2.0**-n_blocks) / n_tokens
    checks.append(within(f"rollout of uniform attention is 2^-{n_blocks} I + (1 - 2^-{n_blocks}) J / {n_tokens}",
                         (rollout(even)[0].cpu() - expected).abs().max(), 1e-6 * rounding))
    distance = attention_distance(even, seen.grid, seen.adapter.patch_size, first)
    line = uniform_attention_distance(seen.grid, seen.adapter.patch_size)
    checks.append(within(f"attention distance of uniform attention is {line:.2f} pixels",
                         (distance - line).abs().max(), 1e-4 * line * rounding))
    return checks


def within(name, difference, most):
    """Return a Check that a difference is small enough."""
    return Check(name, bool(difference <= most), f"largest difference {float(difference):.1e}, at most {most:.0e}")


def _over_the_heads(block, attended):
    """Keep the mean over the heads, (B, N, N), and the largest error of a row sum: a `keep` for capture."""
    return at_least_float32(attended.maps).mean(dim=1), (attended.maps.sum(dim=-1) - 1).abs().max().item()


def _uniform_attention(block, attention):
    return torch.full_like(attention, 1 / attention.shape[-1])


def _count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _check_own_logits(model, images, seen, hooks):
    """Check that the captured logits equal those of an ordinary forward pass, and that no hooks remain."""
    own = predict_logits(model, images)
    check = within("logits are the same when captured", (own - seen.logits).abs().max(),
                   alike_within(model, own.dtype) * max(1.0, own.abs().max().item()))
    left = _count_hooks(model) - hooks
    return check if not left else Check(check.name, False, f"{left} hooks remain")


def _check_head_row(model, images, attention, seen):
    """Check the attention saliency against the row that the classifier head reads, from maps (B, N, N)."""
    name = "attention to a patch is its weight in the row that the head reads"
    try:
        saliency = explain(model, images, "attention").saliency  # (B, rows, columns)
    except InputError as error:
        return Check(name, None, str(error))
    attention, first = at_least_float32(attention).cpu(), seen.adapter.n_prefix  # (B, N, N)
    weights, worst = reading_weights(seen.adapter.pool, first, attention.shape[-1]), 0.0
    for row, column in np.ndindex(*seen.grid):
        expected = attention[:, :, first + row * seen.grid[1] + column].mul(weights.to(attention)).sum(dim=1)  # (B)
        worst = max(worst, (saliency[:, row, column] - expected).abs().max().item())
    return within(name, worst, 1e-6)


def _check_places(model, images):
    """Check which token changes when the upper right or the lower left patch of the image changes."""
    name = "changing one patch of the image changes the token at its position"
    adapter = adapt_vit(model)
    if not adapter.projects_patches:
        return Check(name, None, "the tokens come from overlapping convolutions")
    (height, width), (rows, columns) = adapter.patch_size, adapter.grid(images)
    changed = images[:1].repeat(3, 1, 1, 1)  # (3, C, height, width)
    changed[1, :, :height, -width:] += 1
    changed[2, :, -height:, :width] += 1
    tokens = capture(model, changed, keep=None).tokens[0]
    moved = (tokens[1:] - tokens[:1]).abs().amax(dim=2)  # (2, N)
    moved = moved > 1e-3 * moved.amax(dim=1, keepdim=True)
    expected = [[adapter.n_prefix + columns - 1], [adapter.n_prefix + (rows - 1) * columns]]
    found = [place.nonzero()[:, 0].tolist() for place in moved]
    return Check(name, found == expected, f"for two corners: tokens {found}, expected {expected}")


def _check_relevance(model, images, rounding):
    """Check relevance against the full matrix, computed from the first block to the last.

    The check uses the first image and the gradients of all maps at once.
    """
    name = "relevance is the same when computed from the first block to the last"
    try:
        found = explain(model, images, "relevance")
    except InputError as error:
        return Check(name, None, str(error))
    seen = capture(model, images[:1], gradients=True)
    answer = chosen(seen.logits, found.targets[:1].to(seen.logits.device))
    gradients = torch.autograd.grad(answer, seen.maps)
    gained, first = relevance_gained([one.detach() for one in seen.maps], gradients), seen.adapter.n_prefix  # (1, N, N)
    weights = reading_weights(seen.adapter.pool, first, gained.shape[-1]).to(gained)  # (N)
    row = weights @ gained[..., first:]  # (1, n)
    return alike(name, found.saliency[:1], row.unflatten(1, seen.grid), rounding)


def _check_grad_cam(model, images, rounding):
    """Check Grad-CAM against the gradient with respect to one shift of all patch tokens.

    This gradient is the sum of the tokens' gradients; Grad-CAM uses their mean.
    """
    name = "Grad-CAM weights the patch tokens by the effect of one shift of all of them"
    try:
        found = explain(model, images, "grad_cam")
    except InputError as error:
        return Check(name, None, str(error))
    seen = capture(model, images, keep=None)
    first, layer = seen.adapter.n_prefix, cam_layer(seen.adapter)
    patches = seen.tokens[layer + 1][:, first:]  # (B, n, D)
    shift = Shift(first, torch.zeros_like(patches[:, :1]).requires_grad_())
    hook = seen.adapter.blocks[layer].register_forward_hook(shift)
    try:
        with evaluating(model):
            logits = logits_of(model(to_model(images, model).clone()))  # the clone is no inference tensor
    finally:
        hook.remove()
    gradient, = torch.autograd.grad(chosen(logits, found.targets.to(logits.device)), shift.amount)  # (B, 1, D)
    weighted = (patches * gradient / patches.shape[1]).sum(dim=2).clamp(min=0)  # (B, n)
    return alike(name, found.saliency.nan_to_num(), weighted.unflatten(1, seen.grid), rounding)


@dataclass
class Shift:
    """A forward hook that adds the same amount, (B, 1, D), to all patch tokens of a block."""

    first: int
    amount: torch.Tensor

    def __call__(self, module, args, output):
        tokens = tokens_of(output)
        moved = torch.cat([tokens[:, :self.first], tokens[:, self.first:] + self.amount], dim=1)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved


def alike(name, saliency, expected, rounding):
    """Return a Check that two maps (B, rows, columns) agree, relative to their largest value."""
    expected = at_least_float32(expected.detach()).cpu()
    if not expected.any():
        return Check(name, None, "every gradient is zero, for example because the head's weights are still zero")
    return within(name, (saliency - expected).abs().max() / expected.max(), 1e-4 if rounding == 1 else 0.1)


def _check_map_gradients(model, images, seed, step=1e-2):
    """Check the gradient with respect to each block's map against finite differences.

    Only one map is changed at a time. This detects gradients in the wrong order and maps that the logits ignore.
    """
    name = "gradients of the attention maps match finite differences, block by block"
    if torch.finfo(dtype_of(model)).eps > 1e-6:
        return Check(name, None, "half precision is too coarse for finite differences; call .float() first")
    plain = capture(model, images, gradients=True)
    target = choose_targets(plain.logits, None)
    gradients = torch.autograd.grad(chosen(plain.logits, target), plain.maps)
    generator, worst = torch.Generator().manual_seed(seed), 0.0
    for block, gradient in enumerate(gradients):
        noise = torch.randn(gradient.shape, generator=generator).to(gradient)
        direction = gradient / gradient.norm().clamp(min=1e-30) + noise / noise.norm()
        ends = [chosen(capture(model, images, change=Nudge(block, sign * step * direction)).logits, target).item()
                for sign in (1, -1)]
        expected = (gradient * direction).sum().item()
        scale = max(abs(expected), gradient.norm().item(), 1e-6)
        worst = max(worst, abs((ends[0] - ends[1]) / (2 * step) - expected) / scale)
    return within(name, worst, 0.05)


@dataclass
class Nudge:
    """A `change` for capture that adds an amount to the map of one block."""

    block: int
    amount: torch.Tensor

    def __call__(self, block, attention):
        return attention + self.amount if block == self.block else attention


def _check_last_gradient(model, images):
    """Check at which depth the gradients of patch tokens end.

    If the head reads no patch, patch tokens have no gradient after the last block, but they have one before it.
    """
    seen = capture(model, images, gradients=True)
    if seen.adapter.reads_patches:
        return Check("patch tokens have no gradient after the last block", None,
                     f"the head reads {seen.adapter.pool}, so the patch tokens have a gradient")
    gradients = torch.autograd.grad(seen.logits.square().sum(), seen.tokens[-2:])
    first = seen.adapter.n_prefix
    before, after = (gradient[:, first:].abs().max().item() for gradient in gradients)
    if before == after == 0:
        return Check("patch tokens have no gradient after the last block", None, "every gradient is zero, "
                     "for example because the head's weights are still zero")
    return Check("patch tokens have no gradient after the last block, but have one before it", after == 0 < before,
                 f"largest after {after:.1e}, before {before:.1e}")
