"""Which parts of an image a prediction comes from, by four methods, and how far to trust each map.

explain(model, images, method)     one of METHODS; rollout, relevance and token_cam are the formulas
logit_lens, token_norms, norm_artefacts, feature_colours, patch_filters     what tokens and filters contain
compare_explanations               all methods: their agreement, and deletion and insertion against random order

A method that does not apply to a model raises InputError with the reason. selfcheck.py checks the formulas.

Shapes:  B images, L blocks, H heads, N tokens (prefix tokens, then patches), D width, K classes, n patches,
          C channels, P patch side, M methods, R random orders, S steps of a curve.
"""

import math
import zlib
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F

from vit_bridge.analysis.attention import (
    attention_rows,
    cls_attention_grid,
    patches_of,
    select_attention,
)
from vit_bridge.analysis.capture import (
    backward_by_blocks,
    capture,
    check_finite_numbers,
    differentiable,
    predict_logits,
    watch_layer,
)
from vit_bridge.errors import InputError, check_choice, check_index, check_int
from vit_bridge.models.adapters import adapt, adapt_attention, adapt_vit, check_head, check_pool, reading_weights
from vit_bridge.models.protocol import class_name
from vit_bridge.runtime import at_least_float32, evaluating, logits_of, to_model, tokens_of, unwrapped

# ---- The formulas -----------------------------------------------------------------------------------------


def rollout(maps, discard_ratio=0.0):
    """Return how much of each input token is in each output token, (B, N, N); rows sum to one.

    Each block counts as half attention, averaged over the heads, and half residual: A = (mean_h A_h + I) / 2.
    The result is the product of all blocks, the last on the left.

    Parameters
    ----------
    maps : Tensor or list, shape (L, B, H, N, N)
        Attention maps; rows are queries.
    discard_ratio : float, optional
        Fraction of the weights of each block, the smallest ones, that are set to zero before I is added, in [0, 1).
        The rows are then rescaled to sum to one.

    Raises
    ------
    InputError
        If `discard_ratio` is out of range.

    References
    ----------
    Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", Sec. 4.
    """
    carried = Rollout(discard_ratio)
    for block in maps:
        carried.take(block)
    return carried.rolled  # (B, N, N)


class Rollout:
    """Attention rollout, block by block, as a `keep` for capture that stores nothing else.

    `rolled` (B, N, N) is the rollout of the blocks so far. Raises InputError if the ratio is out of range.
    """

    def __init__(self, discard_ratio=0.0):
        if not isinstance(discard_ratio, Real) or not 0 <= discard_ratio < 1:
            raise InputError(f"discard_ratio {discard_ratio!r} is out of range; expected 0 <= ratio < 1")
        self.discard_ratio, self.rolled = discard_ratio, None

    def __call__(self, block, attended):
        self.take(attended.maps)

    def take(self, maps):
        """Add the maps of the next block, (B, H, N, N)."""
        mixing = at_least_float32(maps).mean(dim=1)  # (B, N, N)
        n_tokens = mixing.shape[-1]
        if n_dropped := int(self.discard_ratio * n_tokens**2):
            flat = mixing.flatten(1)  # (B, N N)
            flat.scatter_(1, flat.topk(n_dropped, dim=1, largest=False).indices, 0.0)
        mixing.diagonal(dim1=1, dim2=2).add_(1)
        mixing /= mixing.sum(dim=-1, keepdim=True)
        self.rolled = mixing if self.rolled is None else mixing @ self.rolled


def relevance(maps, gradients):
    """Return how much each input token supports a class in each output token, (B, N, N).

    R starts as I. Each block, from the first on, adds A R. A is the mean over the heads of the positive part of map
    times gradient.

    Parameters
    ----------
    maps : Tensor or list, shape (L, B, H, N, N)
        Attention maps; rows are queries.
    gradients : Tensor or list, shape (L, B, H, N, N)
        Gradients of the class logit with respect to the maps.

    References
    ----------
    Chefer, Gur and Wolf 2021, "Generic Attention-model Explainability", Eq. 5 and 6.
    """
    return relevance_gained(maps, gradients) + torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)


def relevance_gained(maps, gradients):
    """Compute relevance without the initial I.

    If added to the 1 on the diagonal of I, small values would be lost to rounding.
    """
    gained = None
    for attention, gradient in zip(maps, gradients, strict=True):
        block = (attention * gradient).clamp(min=0).mean(dim=1)  # (B, N, N): negative heads do not cancel others
        gained = block if gained is None else gained + block + block @ gained
    return gained


def token_cam(features, gradients):
    """Compute Grad-CAM over positions: features and gradients, 2 x (B, n, D) -> (B, n).

    Channels are weighted by the mean of their gradient over the positions; negative sums become zero. Selvaraju et al.
    2017, "Grad-CAM", Eq. 1 and 2.
    """
    weights = gradients.mean(dim=1, keepdim=True)  # (B, 1, D)
    return (features * weights).sum(dim=2).clamp(min=0)  # (B, n)


# ---- The methods on a model -------------------------------------------------------------------------------


@dataclass
class Explanation:
    """A saliency map for each image.

    Attributes
    ----------
    saliency : Tensor, shape (B, rows, columns)
        Non-negative. NaN for an image whose Grad-CAM is blank, if another image's is not.
    targets : Tensor, shape (B,), or None
        The explained classes; None for a model without a head.
    probabilities : Tensor, shape (B,), or None
        Their probabilities; None for a model without a head.
    """

    saliency: torch.Tensor
    targets: torch.Tensor | None
    probabilities: torch.Tensor | None


@differentiable()
def explain(model, images, method="relevance", target=None, **options):
    """Explain the predictions of a model by one of METHODS.

    This works even if the caller has disabled gradients.

    Parameters
    ----------
    model : nn.Module
        A ViT, ours or from timm, transformers or torchvision; for Grad-CAM also a CNN or a Swin Transformer.
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    method : str, optional
        "attention", "rollout", "relevance" or "grad_cam".
    target : int, str or sequence, optional
        The class to explain, by number or name: one for all images, or one for each. By default the predicted class.
        Attention and rollout are the same for every class.
    **options
        rollout: discard_ratio. grad_cam: layer_idx. attention: layer_idx and head_idx. Indices are Python indices: 0 is
        the first block or head, -1 the last.

    Returns
    -------
    Explanation

    Raises
    ------
    InputError
        If the model does not accept these images, or if the method does not apply to this model (with the reason).
    """
    check_choice("method", method, METHODS)
    for name in options:
        check_choice(f"option of {method}", name, OPTIONS[method])
    if not adapt(model).has_head:
        saliency = METHODS[method](model, images, None, **options)
        return Explanation(at_least_float32(saliency.detach().cpu()), None, None)
    logits = predict_logits(model, images)  # (B, K)
    targets = choose_targets(logits, target, adapt(model).class_names)
    saliency = at_least_float32(METHODS[method](model, images, targets, **options).detach().cpu())
    probabilities = at_least_float32(logits).softmax(dim=1).gather(1, targets[:, None])[:, 0].cpu()
    return Explanation(saliency, targets.cpu(), probabilities)


def attention_saliency(model, images, targets, layer_idx=-1, head_idx=None):
    """Return the attention in one block from what the classifier head reads to each patch; no class plays a part."""
    row = select_attention(attention_rows(model, images), layer_idx, head_idx)  # (B, N)
    adapter = adapt_vit(model)
    return patches_of(row, adapter.grid(images), adapter.n_prefix)


def rollout_saliency(model, images, targets, discard_ratio=0.0):
    """Return the attention rollout of what the classifier head reads; no class plays a part."""
    check_pool(adapt_vit(model).pool)
    carried = Rollout(discard_ratio)
    seen = capture(model, images, keep=carried)
    return cls_attention_grid(carried.rolled, seen.grid, seen.adapter.n_prefix, seen.adapter.pool)


def relevance_saliency(model, images, targets):
    """Return the relevance of each patch for the target class in what the classifier head reads, without the first I.

    Only the row of what the head reads is computed, from the last block to the first: r <- r + r A.
    """
    check_head(model)
    check_pool(adapt_vit(model).pool)
    seen = capture(model, images, keep=None)
    first, pool = seen.adapter.n_prefix, seen.adapter.pool
    tokens = seen.tokens[0]  # (B, N, D)
    start = reading_weights(pool, first, tokens.shape[1]).to(at_least_float32(tokens[0, :, 0]))  # (N)
    start = start.expand(len(tokens), 1, -1)  # (B, 1, N)
    gained = torch.zeros_like(start)  # kept separate from start, as in relevance_gained
    for step in backward_by_blocks(model, seen, partial(chosen, targets=targets), keep=speaking):
        if step.kept is not None:
            gained = gained + (start + gained) @ step.kept
    check_finite_numbers(model, gained)
    return patches_of(gained[:, 0], seen.grid, first)


def speaking(maps, gradient):
    """Keep how much each token of a block supports the class: a `keep` for backward_by_blocks.

    The result is the mean over the heads of the positive part of map times gradient, 2 x (B, H, N, N) -> (B, N, N).
    """
    return at_least_float32((maps * gradient).clamp_(min=0).mean(dim=1))


def cam_saliency(model, images, targets, layer_idx=None):
    """Return Grad-CAM of the patch tokens after a block, or of the feature map after a stage of a CNN or Swin.

    The map of an image is NaN if it would be blank.

    Parameters
    ----------
    model : nn.Module
        A ViT, CNN or Swin Transformer with a head.
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    targets : Tensor, shape (B,)
        The classes to explain.
    layer_idx : int, optional
        Python index of the block or stage: 0 is the first block of a ViT, or the stem of a CNN or Swin. By default the
        last one whose patches still reach the head. If the head reads no patch, this is the second-to-last block.

    Raises
    ------
    InputError
        If the map would be blank for every image.
    """
    check_head(model)
    if not adapt(model).attends:
        return _not_blank(_convolutional_cam(model, images, targets, -1 if layer_idx is None else layer_idx))
    adapter = adapt_vit(model)
    n_blocks, unseen = len(adapter.blocks), not adapter.reads_patches
    layer, read = cam_layer(adapter, layer_idx), {"cls": "CLS"}.get(adapter.pool, adapter.pool)
    if unseen and n_blocks == 1:
        raise InputError(f"Grad-CAM after the only block is blank: the head reads only {read}, so the patch tokens "
                         f"there have no effect; use relevance or attention")
    if unseen and layer == n_blocks - 1:
        raise InputError(f"Grad-CAM after the last block is blank: the head reads only {read}, so the patch tokens "
                         f"there have no effect; choose a layer_idx from 0 to {n_blocks - 2}")
    seen = capture(model, images, keep=None)
    steps = backward_by_blocks(model, seen, partial(chosen, targets=targets))
    gradient = next(step.gradient for step in steps if step.place == layer + 1)  # (B, N, D)
    places = [tokens[:, adapter.n_prefix:] for tokens in (seen.tokens[layer + 1], gradient)]  # 2 x (B, n, D)
    return _not_blank(token_cam(*places).unflatten(1, seen.grid))


def cam_layer(adapter, layer_idx=None):
    """Return the index, from 0, of the block after which cam_saliency takes the tokens of a ViT."""
    n_blocks = len(adapter.blocks)
    if layer_idx is not None:
        return check_index("layer_idx", layer_idx, n_blocks)
    return n_blocks - 1 if adapter.reads_patches else n_blocks - 2


def _not_blank(saliency):
    """Replace blank Grad-CAM maps (zero everywhere), (B, rows, columns), with NaN.

    Raises InputError if the maps of all images are blank.
    """
    blank = ~(saliency > 0).flatten(1).any(dim=1)  # (B)
    if blank.all():
        raise InputError("Grad-CAM is blank: the weighted channels do not support the class at any position; "
                         "choose a different layer_idx or method")
    return saliency.masked_fill(blank[:, None, None], torch.nan)


def _convolutional_cam(model, images, targets, layer_idx):
    """Compute Grad-CAM after a stage of a ConvNet or Swin Transformer: (B, rows, columns) of its feature map."""
    adapter = adapt(model)
    adapter.check_images(images)
    depth = check_index("layer_idx", layer_idx, len(adapter.layers))
    _, output, logits = watch_layer(model, adapter.layers[depth], images)  # the layer's own shape, (B, K)
    features = tokens_of(output)
    gradient, = torch.autograd.grad(chosen(logits_of(logits), targets), features)
    maps = [adapter.as_map(part, images, depth) for part in (features, gradient)]  # 2 x (B, D, rows, columns)
    places = [part.flatten(2).transpose(1, 2) for part in maps]  # 2 x (B, n, D)
    return token_cam(*places).unflatten(1, maps[0].shape[2:])


METHODS = {"attention": attention_saliency, "rollout": rollout_saliency, "relevance": relevance_saliency,
           "grad_cam": cam_saliency}
OPTIONS = {"attention": ("layer_idx", "head_idx"), "rollout": ("discard_ratio",), "relevance": (),
           "grad_cam": ("layer_idx",)}


# ---- What tokens contain ----------------------------------------------------------------------------------


@torch.no_grad()
def logit_lens(model, images):
    """Return what the head would predict from the tokens after each block.

    Parameters
    ----------
    model : nn.Module
        A ViT with a head.
    images : Tensor, shape (B, C, height, width)
        Normalised images.

    Returns
    -------
    Tensor, shape (L + 1, B, K)
        Probabilities; index 0 is before the first block.

    Raises
    ------
    InputError
        If the model has no head.

    References
    ----------
    nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    check_head(model)
    seen = capture(model, images, keep=None)
    with evaluating(model):
        lens = torch.stack([at_least_float32(seen.adapter.read(tokens)).softmax(dim=1) for tokens in seen.tokens])
    check_finite_numbers(model, lens)
    return lens.cpu()


def token_norms(captured):
    """Return (norms, artefacts), both (L, B, rows, columns), of the patch tokens after each block.

    `norm_artefacts` determines which tokens are artefacts.
    """
    first = captured.adapter.n_prefix
    norms = torch.stack([at_least_float32(tokens.detach())[:, first:].norm(dim=2).cpu()
                         for tokens in captured.tokens[1:]])  # (L, B, n)
    norms = norms.unflatten(2, captured.grid)
    masks = [norm_artefacts(one).mask for one in norms.flatten(0, 1)]
    return norms, torch.stack(masks).view(norms.shape)


@dataclass
class Artefacts:
    """The patch tokens with much larger norms than the others.

    Attributes
    ----------
    mask : Tensor, shape (rows, columns)
        Which tokens are artefacts.
    share : float
        Their fraction of all patch tokens.
    threshold : float or None
        The norm above which a token is an artefact; None if there are none.
    ratio : float
        The largest norm divided by the median norm, with or without artefacts.
    """

    mask: torch.Tensor
    share: float
    threshold: float | None
    ratio: float


VERY_STRONG = 10  # difference of BIC: Kass and Raftery 1995, "Bayes Factors", Sec. 3.2


def norm_artefacts(norms):
    """Find norm artefacts: the few tokens with much larger norms than the others.

    A model uses these tokens for something other than the content of their patch.

    Parameters
    ----------
    norms : Tensor, shape (rows, columns)
        Norms of the patch tokens of one image.

    Returns
    -------
    Artefacts

    Notes
    -----
    The threshold is derived from the norms. Two normal distributions are fitted to their logarithms. There are
    artefacts only if all of these conditions hold:

    - Two kinds: the evidence for two distributions is very strong (their BIC is lower by VERY_STRONG), and the joint
      density has two peaks with a valley below half the lower peak. The bottom of the valley is the threshold.
    - Few: at most a tenth of the tokens, rounded up, lie above it. Darcet et al. find about 2%.
    - Scattered: the median artefact has at most one more artefact among its eight or fewer neighbours than chance
      predicts. Otherwise the tokens lie together, like a region of the image, and count as content.

    References
    ----------
    Darcet et al. 2024, "Vision Transformers Need Registers".
    """
    norms = norms.detach().cpu().double()
    median = norms.median().item()
    none = Artefacts(torch.zeros(norms.shape, dtype=torch.bool), 0.0, None, norms.max().item() / max(median, 1e-30))
    logs = norms.clamp(min=1e-30).log()  # (rows, columns)
    threshold = _valley(logs.flatten())
    if threshold is None:
        return none
    mask = logs > threshold
    share = mask.double().mean().item()
    kernel, n_long = torch.ones(1, 1, 3, 3).double(), int(mask.sum())
    long, all_of_them = (F.conv2d(one[None, None].double(), kernel, padding=1)[0, 0] - 1
                         for one in (mask, torch.ones_like(mask)))  # neighbours
    beyond_chance = long - all_of_them * (n_long - 1) / (mask.numel() - 1)
    if n_long > math.ceil(0.1 * mask.numel()) or beyond_chance[mask].median() > 1:
        return none
    return replace(none, mask=mask, share=share, threshold=math.exp(threshold))


def _valley(values, steps=200):
    """Return the minimum between the two peaks of a density fitted to values (n), or None.

    The density is a mixture of two normal distributions. None means that the minimum is not below half the lower peak,
    or that the evidence for two distributions is not very strong.
    """
    n, mean, spread = len(values), values.mean(), values.std(correction=0)
    if not spread > 1e-9:
        return None
    x = ((values - mean) / spread).sort().values
    weights, means, widths, likelihood = _fit_two(x, steps)
    of_one = -0.5 * n * (math.log(2 * math.pi) + 1)  # log-likelihood of one distribution, with variance 1
    gained = 2 * (likelihood - of_one) - (5 - 2) * math.log(n)  # reduction of BIC: 5 parameters against 2
    if gained <= VERY_STRONG:
        return None
    between = torch.linspace(means.min().item(), means.max().item(), 1001).double()
    density = (weights / widths * torch.exp(-0.5 * ((between[:, None] - means) / widths)**2)).sum(dim=1)
    lowest = density[1:-1].argmin().item() + 1
    if not density[lowest] < 0.5 * min(density[:lowest].max(), density[lowest + 1:].max()):
        return None
    return (mean + spread * between[lowest]).item()


def _fit_two(x, steps):
    """Fit a mixture of two normal distributions to sorted values x (n) of variance 1.

    Returns (weights, means, standard deviations), each (2), and the log-likelihood of the best of several fits. Each
    fit is an expectation maximisation that starts from a cut: in the middle, below the largest tenth, below the largest
    hundredth, or at the largest gap. The standard deviation of a component is at least a twentieth of the total, so no
    component collapses to one value.
    """
    n = len(x)
    cuts = torch.tensor([n // 2, n - -(-n // 10), n - -(-n // 100), x.diff().argmax().item() + 1])
    upper = (torch.arange(n) >= cuts[:, None]).double()  # (fits, n)
    belongs, before = torch.stack([1 - upper, upper], dim=2), -math.inf  # (fits, n, 2)
    for _ in range(steps):
        mass = belongs.sum(dim=1).clamp(min=1e-12)  # (fits, 2)
        weights, means = mass / n, (belongs * x[:, None]).sum(dim=1) / mass
        apart = (x[:, None] - means[:, None])**2  # (fits, n, 2)
        variances = ((belongs * apart).sum(dim=1) / mass).clamp(min=0.05**2)
        logs = (weights.log() - 0.5 * (2 * math.pi * variances).log())[:, None] - 0.5 * apart / variances[:, None]
        total = logs.logsumexp(dim=2)  # (fits, n)
        belongs, likelihoods = (logs - total[..., None]).exp(), total.sum(dim=1)
        if (likelihoods - before).max() < 1e-3:
            break
        before = likelihoods
    best = likelihoods.argmax()
    return weights[best], means[best], variances[best].sqrt(), likelihoods[best].item()


def feature_colours(features):
    """Map features to colours by their first three principal components, over all images together.

    Similar colours mean similar features, including across images. Each component is scaled from its 2nd to its 98th
    percentile, with the sign that makes its skew positive.

    Parameters
    ----------
    features : Tensor, shape (B, rows, columns, D)
        Patch tokens or feature maps.

    Returns
    -------
    Tensor, shape (B, rows, columns, 3)
        Red, green and blue in 0..1. If there are fewer than three components, the remaining channels are 0.5.
    """
    flat = features.detach().cpu().double().flatten(0, 2)  # (B n, D)
    centred = flat - flat.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    parts = centred @ directions[:3].T  # (B n, 3), or fewer
    parts = parts * torch.where((parts**3).sum(dim=0) < 0, -1.0, 1.0)
    low, high = parts.quantile(torch.tensor([0.02, 0.98]).double(), dim=0)
    colours = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return F.pad(colours, (0, 3 - colours.shape[1]), value=0.5).view(*features.shape[:3], 3)


@torch.no_grad()
def patch_filters(model, n_filters=28):
    """Return the principal components of the filters of the patch projection, strongest first.

    Parameters
    ----------
    model : nn.Module
        A ViT or a Swin Transformer.
    n_filters : int, optional
        Maximum number of components.

    Returns
    -------
    filters : Tensor, shape (n, C, P, P)
    shares : Tensor, shape (n,)
        The fraction of the sum of squares that each component holds.

    Raises
    ------
    InputError
        If the first layer is not a projection of whole patches, for example in a hybrid.

    References
    ----------
    Dosovitskiy et al. 2021 (the ViT paper), Fig. 7 (left).
    """
    adapter = adapt_attention(model)
    projection = adapter.projection
    if not adapter.projects_patches:
        raise InputError(f"the first layer of this {class_name(model)} is a {type(projection).__name__}, not a "
                         f"projection of patches; use a ViT that cuts images into patches")
    check_int("n_filters", n_filters, 1)
    weight = projection.weight.detach().cpu().double()  # (D, C, P, P)
    _, strengths, components = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    shares = strengths**2 / (strengths**2).sum()
    return components[:n_filters].unflatten(1, weight.shape[1:]), shares[:n_filters]


# ---- How far to trust a map -------------------------------------------------------------------------------


def deletion_insertion(model, images, saliency, targets, n_steps=16, batch_size=128, seed=0):
    """Return the deletion and insertion curves of a saliency map, each (S + 1, B).

    The curves are the probability of the target class while patches are hidden (deletion) or shown on a blurred image
    (insertion), most salient first. If a map finds what the prediction depends on, deletion falls early and insertion
    rises early; `area_under` measures this.

    Parameters
    ----------
    model : nn.Module
        A classifier.
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    saliency : Tensor, shape (B, rows, columns)
        The map. Patches of equal saliency have a random order that depends only on the seed and the image, so a
        constant map yields random order, the control. If a map contains NaN, its image's curves are NaN.
    targets : Tensor, shape (B,)
        The classes whose probability is measured.
    n_steps : int, optional
        Number of steps of each curve, S.
    batch_size : int, optional
        Images in one pass.
    seed : int, optional
        Seed of the random orders.

    Returns
    -------
    deletion, insertion : Tensor, shape (S + 1, B)

    Notes
    -----
    Hidden patches are filled with the mean of the normalisation. Insertion starts from `blurred` images.

    References
    ----------
    Petsiuk, Das and Saenko 2018, "RISE", Sec. 4.1.
    """
    check_int("n_steps", n_steps, 1)
    with _progress(2 * (n_steps + 1) * len(images)) as bar:
        return _curves(model, images, saliency, targets, n_steps, batch_size, seed, bar)


@torch.no_grad()
def _curves(model, images, saliency, targets, n_steps, batch_size, seed, bar):
    images, saliency, n, grid = images.cpu(), saliency.cpu(), saliency[0].numel(), saliency.shape[1:]
    rows, columns = (torch.arange(side) * count // side for side, count in zip(images.shape[2:], grid, strict=True))
    ranks = _ranks_of(saliency.flatten(1), _random_orders(images, n, seed))  # (B, n), 0 is the most salient
    no_map = saliency.flatten(1).isnan().any(dim=1)  # (B)
    curves = []
    for inserting, rest in ((False, torch.zeros_like(images)), (True, blurred(images))):
        curve = []
        for step in range(n_steps + 1):
            shown = ((ranks < round(step / n_steps * n)) == inserting).unflatten(1, grid)  # (B, rows, columns)
            changed = torch.where(shown[:, rows[:, None], columns][:, None], images, rest)  # (B, C, height, width)
            curve.append(_class_probability(model, changed, targets, batch_size, bar))
        curves.append(torch.stack(curve).masked_fill(no_map, torch.nan))
    return tuple(curves)


def blurred(images):
    """Blur images (B, C, height, width) so that details vanish and no edges appear.

    The kernel is RISE's Gaussian of 11 x 11 pixels with standard deviation 5. It grows in proportion if the shorter
    side exceeds 224 pixels. The border pixels are repeated beyond the image.
    """
    larger = max(1.0, min(images.shape[2:]) / 224)
    reach = round(5 * larger)  # pixels to each side
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / (5 * larger))**2).to(images)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)  # (C, 1, 1, 2 reach + 1)
    for _ in range(2):  # along the width, then along the height
        images = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="replicate"), kernel, groups=images.shape[1])
        images = images.transpose(2, 3)
    return images


def area_under(curves):
    """Integrate curves from 0 to 1 by the trapezoidal rule: (S + 1, ...) -> (...)."""
    return torch.trapezoid(curves, dx=1 / (len(curves) - 1), dim=0)


def mean_and_error(values):
    """Return (mean, standard error of the mean) of the values that are not NaN.

    The error is NaN for fewer than two values.
    """
    values = values[~values.isnan()].double()
    return values.mean().item(), values.std().item() / len(values)**0.5 if len(values) > 1 else float("nan")


def _progress(n_images):
    """Create a progress bar over n_images; it appears after 5 seconds, in a terminal or in Jupyter."""
    from tqdm.auto import tqdm  # imported late: it warns in Jupyter without ipywidgets

    return tqdm(total=n_images, desc="hiding and showing patches", unit="image", delay=5, leave=False, disable=None)


def _ranks_of(saliency, orders):
    """Rank the patches from 0, the most salient; `orders` breaks ties: 2 x (B, n) -> (B, n)."""
    ranking = saliency.gather(1, orders).argsort(dim=1, descending=True, stable=True)  # (B, n) positions in the orders
    return orders.gather(1, ranking).argsort(dim=1)


def _random_orders(images, n, seed):
    """Draw a random order of n patches for each image, (B, n), from the seed and the image's pixels.

    An image therefore gets the same order in every batch. The images (B, C, height, width) are on the CPU.
    """
    seeds = [zlib.crc32(image.float().contiguous().numpy(), seed % 2**32) for image in images]
    return torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(one)) for one in seeds])


def _class_probability(model, images, targets, batch_size, bar):
    """Return the probability of each image's target class, (B), on the CPU."""
    model, parts = unwrapped(model), []
    with evaluating(model):
        for part in images.split(batch_size):
            parts.append(logits_of(model(to_model(part, model))).cpu())
            bar.update(len(part))
    return at_least_float32(torch.cat(parts)).softmax(dim=1).gather(1, targets[:, None].cpu())[:, 0]


def rank_correlation(first, second):
    """Return Spearman's rank correlation of two maps of each image, 2 x (B, ...) -> (B).

    Equal values share their mean rank. The result is NaN if one of the maps is constant.
    """
    a, b = (_centred_ranks(values.flatten(1).double().contiguous()) for values in (first, second))
    return (a * b).sum(dim=1) / ((a**2).sum(dim=1) * (b**2).sum(dim=1)).sqrt()  # (B)


def _centred_ranks(values):
    """Rank values (B, n) and subtract the mean; ties share their mean rank, and NaN stays NaN."""
    in_order = values.sort(dim=1).values
    below, up_to = (torch.searchsorted(in_order, values, side=side) for side in ("left", "right"))
    ranks = (below + up_to).double() / 2  # (B, n)
    ranks = ranks.masked_fill(values.isnan().any(dim=1, keepdim=True), torch.nan)
    return ranks - ranks.mean(dim=1, keepdim=True)


def agreement(saliencies):
    """Return the rank correlation of each pair of maps, averaged over images: M x (B, ...) -> (M, M)."""
    return torch.stack([torch.stack([rank_correlation(a, b).nanmean() for b in saliencies]) for a in saliencies])


@dataclass
class Comparison:
    """The result of compare_explanations.

    Attributes
    ----------
    saliencies : dict
        Method -> (B, rows, columns); NaN for an image for which the method has no map.
    refused : dict
        Method -> the reason why it has no map for any image.
    correlations : Tensor, shape (M, M)
        Rank correlations, averaged over the images.
    deletion, insertion : dict
        Method -> (S + 1, B), with NaN as in `saliencies`; "random order" holds the mean of the draws.
    draws : dict
        "deletion" and "insertion" -> (R, S + 1, B), one curve for each random order.
    targets, probabilities : Tensor, shape (B,)
        The explained classes and their probabilities.
    """

    saliencies: dict
    refused: dict
    correlations: torch.Tensor
    deletion: dict
    insertion: dict
    draws: dict
    targets: torch.Tensor
    probabilities: torch.Tensor

    @property
    def differences(self):
        """Area of each method minus the mean area of the random orders, image by image.

        "deletion" and "insertion" -> method -> (B), with NaN as in `saliencies`. A good map is below zero in deletion
        and above zero in insertion.
        """
        control = {what: area_under(draws.transpose(0, 1)).mean(dim=0) for what, draws in self.draws.items()}  # (B)
        return {what: {name: area_under(getattr(self, what)[name]) - control[what] for name in self.saliencies}
                for what in control}

    @property
    def leads(self):
        """Mean and standard error of the differences over the images that have a map.

        "deletion" and "insertion" -> method -> (mean, error); the error is NaN if there is only one such image.
        """
        return {what: {name: mean_and_error(values) for name, values in methods.items()}
                for what, methods in self.differences.items()}

    @property
    def blank(self):
        """Number of images without a map, for each method with at least one."""
        counts = {name: int(saliency.flatten(1).isnan().any(dim=1).sum()) for name, saliency in self.saliencies.items()}
        return {name: count for name, count in counts.items() if count}


def compare_explanations(model, images, target=None, methods=tuple(METHODS), n_steps=16, seed=0, n_draws=8):
    """Compare explanation methods with each other and with random order, on the same images.

    Parameters
    ----------
    model : nn.Module
        A classifier with a head.
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    target : int, str or sequence, optional
        As in `explain`.
    methods : sequence of str, optional
        Names from METHODS.
    n_steps : int, optional
        Number of steps of each curve.
    seed : int, optional
        Seed of the random orders.
    n_draws : int, optional
        Number of random orders for each image. Their spread shows how large a lead must be to count as
        more than chance.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        If the model does not accept these images, if it has no head, or if no method applies to it.

    Notes
    -----
    Each method and each draw takes 2 (n_steps + 1) passes over the images; choose fewer draws for a large model.
    """
    check_int("n_draws", n_draws, 1)
    check_int("n_steps", n_steps, 1)
    saliencies, refused, explained = {}, {}, None
    if not len(methods):
        raise InputError(f"methods {methods!r} is empty; expected at least one of {', '.join(METHODS)}")
    for method in methods:
        check_choice("method", method, METHODS)
    if not adapt(model).has_head:
        raise InputError(f"this {class_name(model)} has no head, so hiding patches cannot change a prediction; use a "
                         f"model with a head")
    target = choose_targets(predict_logits(model, images), target, adapt(model).class_names).cpu()
    for method in methods:
        try:
            explained = explain(model, images, method, target)
        except InputError as error:
            refused[method] = str(error)
            continue
        saliencies[method] = explained.saliency
    if not saliencies:
        raise InputError(f"none of {', '.join(methods)} works on this model: {next(iter(refused.values()))}")
    alike = torch.ones(next(iter(saliencies.values())).shape)
    orders = [(saliency, seed) for saliency in saliencies.values()]
    orders += [(alike, seed + 1 + i) for i in range(n_draws)]
    with _progress(2 * (n_steps + 1) * len(images) * len(orders)) as bar:
        found = [_curves(model, images, saliency, target, n_steps, 128, own_seed, bar) for saliency, own_seed in orders]
    curves, pairs = dict(zip(saliencies, found, strict=False)), found[len(saliencies):]
    draws = {what: torch.stack([pair[i] for pair in pairs]) for i, what in enumerate(("deletion", "insertion"))}
    deletion, insertion = ({name: pair[i] for name, pair in curves.items()} | {"random order": draws[what].mean(dim=0)}
                           for i, what in enumerate(draws))
    return Comparison(saliencies, refused, agreement(list(saliencies.values())), deletion, insertion, draws, target,
                      explained.probabilities)


# ---- Shared by the methods --------------------------------------------------------------------------------


def choose_targets(logits, target, class_names=None):
    """Turn class numbers or names into class numbers (B), on the device of the logits (B, K).

    Raises InputError for a class that does not exist, or unless there is one target or one for each image.
    """
    if logits.ndim != 2:
        raise InputError(f"the model returns shape {tuple(logits.shape)} for a batch of images; expected logits (B, K)")
    B, K = logits.shape
    if target is None:
        return logits.argmax(dim=1)
    given = target.tolist() if isinstance(target, (torch.Tensor, np.ndarray)) else target
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(given) not in (1, B):
        raise InputError(f"{len(given)} targets were passed for {B} images; pass one, or one for each image")
    labels = [class_names.index(one) if class_names and one in class_names else one for one in given]
    for one in labels:
        if isinstance(one, bool) or not isinstance(one, (int, np.integer)) or not 0 <= one < K:
            raise InputError(f"target {one!r} is out of range; expected a class from 0 to {K - 1}"
                             + (f", or a name such as {class_names[0]!r}" if class_names else ""))
    return torch.tensor(labels, device=logits.device).expand(B)


def chosen(logits, targets):
    """Sum the logits of the target classes, for gradients.

    Images do not interact, so each image gets the gradient of its own logit.
    """
    return logits.gather(1, targets[:, None]).sum()
