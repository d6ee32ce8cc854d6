"""Where in an image a prediction comes from, by every usual method, and how far to trust each map.

    explain(model, images, method)     one of METHODS, for a class; rollout, relevance and token_cam are the formulas
    logit_lens, token_norms, feature_colours, patch_filters     what tokens and the patch projection hold
    norm_artefacts                     which patch tokens are far longer than all others
    compare_explanations               all methods: their agreement, and deletion_insertion beside random order

A method that does not work on a model raises InputError with the reason. selfcheck.py checks the formulas on a model.

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
from vit_bridge.models.adapters import adapt, adapt_vit, check_head, check_pool, reading_weights
from vit_bridge.models.protocol import class_name
from vit_bridge.runtime import at_least_float32, evaluating, logits_of, to_model, unwrapped

# ---- The formulas -----------------------------------------------------------------------------------------


def rollout(maps, discard_ratio=0.0):
    """How much of each input token is in each output token, (L, B, H, N, N) -> (B, N, N), rows sum to one.

    Each block is taken as half attention, mean over the heads, and half the residual: A = (mean_h A_h + I) / 2; the
    product goes from the last block to the first. Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers",
    Sec. 4. discard_ratio: the fraction of each block's weights, in [0, 1), the smallest, that is set to zero before I
    is added and the rows are scaled back to one. Raises InputError for a ratio out of range.
    """
    carried = Rollout(discard_ratio)
    for block in maps:
        carried.take(block)
    return carried.rolled  # (B, N, N)


class Rollout:
    """rollout, block by block: `rolled` (B, N, N) is that of the blocks taken so far, from the first on. It is a `keep`
    for capture(), which keeps nothing else. Raises InputError for a ratio out of range."""

    def __init__(self, discard_ratio=0.0):
        if not isinstance(discard_ratio, Real) or not 0 <= discard_ratio < 1:
            raise InputError(f"discard_ratio {discard_ratio!r} is out of range; expected 0 <= ratio < 1")
        self.discard_ratio, self.rolled = discard_ratio, None

    def __call__(self, block, attended):
        self.take(attended.maps)

    def take(self, maps):
        """The maps of the next block, (B, H, N, N)."""
        mixing = at_least_float32(maps).mean(dim=1)  # (B, N, N)
        n_tokens = mixing.shape[-1]
        if n_dropped := int(self.discard_ratio * n_tokens**2):
            flat = mixing.flatten(1)  # (B, N N)
            flat.scatter_(1, flat.topk(n_dropped, dim=1, largest=False).indices, 0.0)
        mixing.diagonal(dim1=1, dim2=2).add_(1)
        mixing /= mixing.sum(dim=-1, keepdim=True)
        self.rolled = mixing if self.rolled is None else mixing @ self.rolled


def relevance(maps, gradients):
    """How much each input token speaks for a class in each output token: 2 x (L, B, H, N, N) -> (B, N, N).

    gradients: of the logit of the class with respect to the maps. Block by block, from the first, R <- R + A R, with A
    the mean over the heads of the positive part of map times gradient; R starts as I. Chefer, Gur and Wolf 2021,
    "Generic Attention-model Explainability", Eq. 5 and 6.
    """
    return relevance_gained(maps, gradients) + torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)


def relevance_gained(maps, gradients):
    """relevance without the I that each token has of itself, so that nothing small is rounded away beside 1."""
    gained = None
    for attention, gradient in zip(maps, gradients, strict=True):
        block = (attention * gradient).clamp(min=0).mean(dim=1)  # (B, N, N): negative heads do not cancel others
        gained = block if gained is None else gained + block + block @ gained
    return gained


def token_cam(features, gradients):
    """Grad-CAM of places: 2 x (B, n, D) -> (B, n). Channels are weighted by their gradient's mean over the places, and
    negative sums become zero. Selvaraju et al. 2017, "Grad-CAM", Eq. 1 and 2."""
    weights = gradients.mean(dim=1, keepdim=True)  # (B, 1, D)
    return (features * weights).sum(dim=2).clamp(min=0)  # (B, n)


# ---- The methods on a model -------------------------------------------------------------------------------


@dataclass
class Explanation:
    """saliency (B, rows, columns), not negative, NaN for an image whose Grad-CAM is blank while those of others are
    not; targets (B), the explained classes, and their probabilities (B); both None for a model without a head."""
    saliency: torch.Tensor
    targets: torch.Tensor | None
    probabilities: torch.Tensor | None


@differentiable()
def explain(model, images, method="relevance", target=None, **options):
    """An Explanation by one of METHODS.

    images   normalised, (B, C, height, width)
    target   a class, by number or name, one for all images or one for each (B); None: the class that is predicted.
             Attention and rollout are the same for every class
    options  rollout: discard_ratio; grad_cam: layer_idx; attention: layer_idx and head_idx

    It works also where the caller has switched gradients off. Raises InputError for images that the model does not
    take, and where the method cannot work on the model, with the reason.
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
    """The attention of the head's token to each patch in one block; the class does not matter."""
    row = select_attention(attention_rows(model, images), layer_idx, head_idx)  # (B, N)
    adapter = adapt_vit(model)
    return patches_of(row, adapter.grid(images), adapter.n_prefix)


def rollout_saliency(model, images, targets, discard_ratio=0.0):
    """rollout, of the head's token; the class does not matter."""
    check_pool(adapt_vit(model).pool)
    carried = Rollout(discard_ratio)
    seen = capture(model, images, keep=carried)
    return cls_attention_grid(carried.rolled, seen.grid, seen.adapter.n_prefix, seen.adapter.pool)


def relevance_saliency(model, images, targets):
    """relevance, of the head's token, for the class; without the I that each token has of itself.

    Only that token's row of the matrix is computed, from the last block to the first: r <- r + r A.
    """
    check_head(model)
    check_pool(adapt_vit(model).pool)
    seen = capture(model, images, keep=None)
    first, pool = seen.adapter.n_prefix, seen.adapter.pool
    tokens = seen.tokens[0]  # (B, N, D)
    start = reading_weights(pool, first, tokens.shape[1]).to(at_least_float32(tokens[0, :, 0]))  # (N)
    start = start.expand(len(tokens), 1, -1)  # (B, 1, N)
    gained = torch.zeros_like(start)  # apart from start, so that nothing small is rounded away beside 1
    for step in backward_by_blocks(model, seen, partial(chosen, targets=targets), keep=speaking):
        if step.kept is not None:
            gained = gained + (start + gained) @ step.kept
    check_finite_numbers(model, gained)
    return patches_of(gained[:, 0], seen.grid, first)


def speaking(maps, gradient):
    """A `keep` for backward_by_blocks: how much each token of a block speaks for the class in each, 2 x (B, H, N, N) ->
    (B, N, N), the mean over the heads of the positive part of map times gradient."""
    return at_least_float32((maps * gradient).clamp_(min=0).mean(dim=1))


def cam_saliency(model, images, targets, layer_idx=None):
    """Grad-CAM of the patch tokens after a block, or of the places after a stage of a ConvNet.

    layer_idx: counts from 0, or from the end; None: the last whose places the head can still see, which is the last
    but one where it reads no patch. Raises InputError where the map would be blank for every image: because nothing of
    the places reaches the head, or because nothing at any place speaks for the class. Where it is blank for some images
    these have NaN.
    """
    check_head(model)
    if not adapt(model).attends:
        return _not_blank(_convolutional_cam(model, images, targets, -1 if layer_idx is None else layer_idx))
    adapter = adapt_vit(model)
    n_blocks, unseen = len(adapter.blocks), not adapter.reads_patches
    layer, read = cam_layer(adapter, layer_idx), {"cls": "CLS"}.get(adapter.pool, adapter.pool)
    if unseen and n_blocks == 1:
        raise InputError(f"Grad-CAM after the only block is blank: the head reads {read} alone, and what the patch "
                         f"tokens are there goes nowhere; ask for relevance or attention")
    if unseen and layer == n_blocks - 1:
        raise InputError(f"Grad-CAM after the last block is blank: the head reads {read} alone, and what the patch "
                         f"tokens are there goes nowhere; choose a layer_idx from 0 to {n_blocks - 2}")
    seen = capture(model, images, keep=None)
    steps = backward_by_blocks(model, seen, partial(chosen, targets=targets))
    gradient = next(step.gradient for step in steps if step.place == layer + 1)  # (B, N, D)
    places = [tokens[:, adapter.n_prefix:] for tokens in (seen.tokens[layer + 1], gradient)]  # 2 x (B, n, D)
    return _not_blank(token_cam(*places).unflatten(1, seen.grid))


def cam_layer(adapter, layer_idx=None):
    """The index of the block after which cam_saliency takes the tokens of a ViT."""
    n_blocks = len(adapter.blocks)
    if layer_idx is not None:
        return check_index("layer_idx", layer_idx, n_blocks)
    return n_blocks - 1 if adapter.reads_patches else n_blocks - 2


def _not_blank(saliency):
    """Grad-CAM (B, rows, columns), with NaN for an image where it is zero everywhere, as that is no map. Raises
    InputError where it is so in every image."""
    blank = ~(saliency > 0).flatten(1).any(dim=1)  # (B)
    if blank.all():
        raise InputError("Grad-CAM is blank: at no place do the weighted channels speak for the class here; choose "
                         "another layer_idx, or another method")
    return saliency.masked_fill(blank[:, None, None], torch.nan)


def _convolutional_cam(model, images, targets, layer_idx):
    """Grad-CAM after a stage of a ConvNet: (B, rows, columns) of its feature map."""
    layers = adapt(model).layers
    layer = layers[check_index("layer_idx", layer_idx, len(layers))]
    _, features, logits = watch_layer(model, layer, images)  # (B, D, rows, columns), (B, K)
    gradient, = torch.autograd.grad(chosen(logits, targets), features)  # (B, D, rows, columns)
    places = [part.flatten(2).transpose(1, 2) for part in (features, gradient)]  # 2 x (B, n, D)
    return token_cam(*places).unflatten(1, features.shape[2:])


METHODS = {"attention": attention_saliency, "rollout": rollout_saliency, "relevance": relevance_saliency,
           "grad_cam": cam_saliency}
OPTIONS = {"attention": ("layer_idx", "head_idx"), "rollout": ("discard_ratio",), "relevance": (),
           "grad_cam": ("layer_idx",)}


# ---- What tokens hold -------------------------------------------------------------------------------------


@torch.no_grad()
def logit_lens(model, images):
    """What the head would predict from the tokens after each block: probabilities (L + 1, B, K), the first before
    the first block. nostalgebraist 2020, "interpreting GPT: the logit lens". Raises InputError without a head."""
    check_head(model)
    seen = capture(model, images, keep=None)
    with evaluating(model):
        lens = torch.stack([at_least_float32(seen.adapter.read(tokens)).softmax(dim=1) for tokens in seen.tokens])
    check_finite_numbers(model, lens)
    return lens.cpu()


def token_norms(captured):
    """(norms, artefacts), both (L, B, rows, columns): the length of each patch token after each block, and whether
    norm_artefacts takes it for one."""
    first = captured.adapter.n_prefix
    norms = torch.stack([at_least_float32(tokens.detach())[:, first:].norm(dim=2).cpu()
                         for tokens in captured.tokens[1:]])  # (L, B, n)
    norms = norms.unflatten(2, captured.grid)
    masks = [norm_artefacts(one).mask for one in norms.flatten(0, 1)]
    return norms, torch.stack(masks).view(norms.shape)


@dataclass
class Artefacts:
    """mask (rows, columns): which patch tokens are artefacts; share: how many of all; threshold: the norm above which
    they lie, None where there are none; ratio: the largest norm over the median, whether or not it is an artefact."""
    mask: torch.Tensor
    share: float
    threshold: float | None
    ratio: float


VERY_STRONG = 10  # difference of BIC from which evidence is called so: Kass and Raftery 1995, "Bayes Factors", Sec. 3.2


def norm_artefacts(norms):
    """The Artefacts of one map of norms (rows, columns): the few tokens, far longer than the rest, that a model uses
    for something else than their patch (Darcet et al. 2024, "Vision Transformers Need Registers").

    No threshold is given: the norms tell. Two normal distributions are fitted to their logarithms. There are artefacts
    only where all of this holds:

    two kinds    the evidence for two and against one is very strong: their BIC is lower by VERY_STRONG, as chance alone
                 now and then makes two peaks of a few tokens. And their joint density has two peaks that the valley
                 between them tells apart at half the height of the lower one; its lowest point is the threshold
    few          at most a tenth of the tokens, rounded up, lie above it, where Darcet et al. find some 2%
    scattered    a typical one of these (the median) has at most one more of the others among its neighbours, eight or
                 fewer at an edge, than chance gives. Else they lie together, as a region of the picture does, and are
                 content
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
    """Where the density of two normal distributions, fitted to values (n), is lowest between its two peaks; None where
    that is not below half the lower peak, and where the evidence for two and not one is less than very strong."""
    n, mean, spread = len(values), values.mean(), values.std(correction=0)
    if not spread > 1e-9:
        return None
    x = ((values - mean) / spread).sort().values
    weights, means, widths, likelihood = _fit_two(x, steps)
    of_one = -0.5 * n * (math.log(2 * math.pi) + 1)  # of variance 1
    gained = 2 * (likelihood - of_one) - (5 - 2) * math.log(n)  # how much lower BIC is, of five numbers and of two
    if gained <= VERY_STRONG:
        return None
    between = torch.linspace(means.min().item(), means.max().item(), 1001).double()
    density = (weights / widths * torch.exp(-0.5 * ((between[:, None] - means) / widths)**2)).sum(dim=1)
    lowest = density[1:-1].argmin().item() + 1
    if not density[lowest] < 0.5 * min(density[:lowest].max(), density[lowest + 1:].max()):
        return None
    return (mean + spread * between[lowest]).item()


def _fit_two(x, steps):
    """(weights, means, standard deviations), each (2), and the log-likelihood of the best of several fits of two normal
    distributions to sorted values x (n) of variance 1. Each fit is an expectation maximisation that begins with a cut:
    at the middle, below the largest tenth and hundredth, and at the largest gap. No distribution is narrower than a
    twentieth of the whole, so that none shrinks to a single value."""
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
    """The three directions in which features (B, rows, columns, D) differ most, over all images together, as red, green
    and blue: (B, rows, columns, 3) in 0..1. Alike in colour is alike in content, across the images too. Each direction
    is scaled from its 2nd to its 98th percentile; its sign is that which makes the skew positive. Where there are fewer
    than three, as of two patches, the rest is 0.5."""
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
    """(filters (n, C, P, P), shares (n)): the principal components of the patch projection's filters, the strongest
    first, and how much of their squares each holds. ViT paper, Fig. 7 (left). Raises InputError where the first layer
    is no projection of whole patches, as in a hybrid."""
    adapter = adapt_vit(model)
    projection = adapter.projection
    if not adapter.projects_patches:
        raise InputError(f"the first layer of this {class_name(model)} is a {type(projection).__name__}, no "
                         f"projection of patches; its filters have no principal components to look at")
    check_int("n_filters", n_filters, 1)
    weight = projection.weight.detach().cpu().double()  # (D, C, P, P)
    _, strengths, components = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    shares = strengths**2 / (strengths**2).sum()
    return components[:n_filters].unflatten(1, weight.shape[1:]), shares[:n_filters]


# ---- How far to trust a map -------------------------------------------------------------------------------


def deletion_insertion(model, images, saliency, targets, n_steps=16, batch_size=128, seed=0):
    """(deletion, insertion), each (S + 1, B): the probability of the target class while patches are hidden, the most
    salient first, and while they are shown on a blurred image, the most salient first.

    saliency (B, rows, columns). Patches of equal saliency go in a random order, which depends on the seed and the image
    alone, so that a constant saliency is the control, random order. An image with NaN in its saliency has NaN. Hidden
    patches get the mean of the normalisation; `blurred` is what insertion starts from. A map that finds what the
    prediction depends on makes the first curve fall early and the second rise early: area_under tells. Petsiuk, Das and
    Saenko 2018, "RISE", Sec. 4.1.
    """
    check_int("n_steps", n_steps, 1)
    with _progress(2 * (n_steps + 1) * len(images)) as bar:
        return _curves(model, images, saliency, targets, n_steps, batch_size, seed, bar)


@torch.no_grad()
def _curves(model, images, saliency, targets, n_steps, batch_size, seed, bar):
    images, saliency, n, grid = images.cpu(), saliency.cpu(), saliency[0].numel(), saliency.shape[1:]
    rows, columns = (torch.arange(side) * count // side for side, count in zip(images.shape[2:], grid, strict=True))
    ranks = _ranks_of(saliency.flatten(1), _random_orders(images, n, seed))  # (B, n), 0 the most salient
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
    """Images (B, C, height, width) out of which the details are gone, and no edges are put in: RISE's Gaussian of 11 x
    11 pixels and a standard deviation of 5, where the shorter side is above 224 pixels larger in proportion. Beyond its
    edge an image goes on as its last pixels."""
    larger = max(1.0, min(images.shape[2:]) / 224)
    reach = round(5 * larger)  # pixels to each side
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / (5 * larger))**2).to(images)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)  # (C, 1, 1, 2 reach + 1)
    for _ in range(2):  # along one side, then along the other
        images = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="replicate"), kernel, groups=images.shape[1])
        images = images.transpose(2, 3)
    return images


def area_under(curves):
    """The area under each curve, its steps at equal distances from 0 to 1, by trapezoids: (S + 1, ...) -> (...)."""
    return torch.trapezoid(curves, dx=1 / (len(curves) - 1), dim=0)


def mean_and_error(values):
    """(mean, standard error of the mean) of the values that are not NaN; the error of fewer than two is NaN."""
    values = values[~values.isnan()].double()
    return values.mean().item(), values.std().item() / len(values)**0.5 if len(values) > 1 else float("nan")


def _progress(n_images):
    """A progress bar over this many images: on a terminal or in Jupyter, after 5 seconds."""
    from tqdm.auto import tqdm  # where it is used: in Jupyter without ipywidgets its import warns

    return tqdm(total=n_images, desc="hiding and showing patches", unit="image", delay=5, leave=False, disable=None)


def _ranks_of(saliency, orders):
    """The rank of each patch, 0 the most salient; ties as they come in `orders`: 2 x (B, n) -> (B, n)."""
    ranking = saliency.gather(1, orders).argsort(dim=1, descending=True, stable=True)  # (B, n) places in the orders
    return orders.gather(1, ranking).argsort(dim=1)


def _random_orders(images, n, seed):
    """A random order of n patches for each image, (B, n), out of the seed and the image's numbers, so that it is the
    same in every batch. images (B, C, height, width), on the CPU."""
    seeds = [zlib.crc32(image.float().contiguous().numpy(), seed % 2**32) for image in images]
    return torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(one)) for one in seeds])


def _class_probability(model, images, targets, batch_size, bar):
    """The probability of each image's target class, (B), on the CPU."""
    model, parts = unwrapped(model), []
    with evaluating(model):
        for part in images.split(batch_size):
            parts.append(logits_of(model(to_model(part, model))).cpu())
            bar.update(len(part))
    return at_least_float32(torch.cat(parts)).softmax(dim=1).gather(1, targets[:, None].cpu())[:, 0]


def rank_correlation(first, second):
    """Spearman's correlation of two maps of each image, 2 x (B, ...) -> (B), equal values sharing their mean rank; NaN
    where one map is the same everywhere."""
    a, b = (_centred_ranks(values.flatten(1).double().contiguous()) for values in (first, second))
    return (a * b).sum(dim=1) / ((a**2).sum(dim=1) * (b**2).sum(dim=1)).sqrt()  # (B)


def _centred_ranks(values):
    """The rank of each value (B, n) less the mean rank, equal values sharing their mean; NaN beside a NaN."""
    in_order = values.sort(dim=1).values
    below, up_to = (torch.searchsorted(in_order, values, side=side) for side in ("left", "right"))
    ranks = (below + up_to).double() / 2  # (B, n)
    ranks = ranks.masked_fill(values.isnan().any(dim=1, keepdim=True), torch.nan)
    return ranks - ranks.mean(dim=1, keepdim=True)


def agreement(saliencies):
    """rank_correlation of each pair of maps, the mean over the images that have both: M of (B, ...) -> (M, M)."""
    return torch.stack([torch.stack([rank_correlation(a, b).nanmean() for b in saliencies]) for a in saliencies])


@dataclass
class Comparison:
    """What compare_explanations gives.

    saliencies            method -> (B, rows, columns), NaN for an image for which the method has no map
    refused               method -> why it has no map for any image
    correlations          (M, M), means over the images
    deletion, insertion   method -> (S + 1, B), NaN as in saliencies; and "random order", the mean of the draws
    draws                 "deletion" and "insertion" -> (R, S + 1, B), of each random order
    targets, probabilities   (B)
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
        """"deletion" and "insertion" -> method -> (B), image by image the area of the method less the mean area of its
        random orders: in deletion a good map is below zero, in insertion above. NaN as in saliencies."""
        control = {what: area_under(draws.transpose(0, 1)).mean(dim=0) for what, draws in self.draws.items()}  # (B)
        return {what: {name: area_under(getattr(self, what)[name]) - control[what] for name in self.saliencies}
                for what in control}

    @property
    def leads(self):
        """"deletion" and "insertion" -> method -> (mean of the differences over the images that have a map, its
        standard error; NaN where there is but one such image)."""
        return {what: {name: mean_and_error(values) for name, values in methods.items()}
                for what, methods in self.differences.items()}

    @property
    def blank(self):
        """Method -> the number of images for which it has no map, where there are such."""
        counts = {name: int(saliency.flatten(1).isnan().any(dim=1).sum()) for name, saliency in self.saliencies.items()}
        return {name: count for name, count in counts.items() if count}


def compare_explanations(model, images, target=None, methods=tuple(METHODS), n_steps=16, seed=0, n_draws=8):
    """A Comparison of the methods on images (B, C, height, width), normalised.

    Beside them stands random order, n_draws times for each image, from the seed: how far the draws differ says which
    lead of a method means anything. Each method and each draw takes 2 (n_steps + 1) passes of the images; for a large
    model n_draws may be lower.

    Raises InputError for images that the model does not take, for a model without a head, and where no method
    works.
    """
    check_int("n_draws", n_draws, 1)
    check_int("n_steps", n_steps, 1)
    saliencies, refused, explained = {}, {}, None
    if not len(methods):
        raise InputError(f"methods {methods!r} name none; expected at least one of {', '.join(METHODS)}")
    for method in methods:
        check_choice("method", method, METHODS)
    if not adapt(model).has_head:
        raise InputError(f"this {class_name(model)} has no head, so there is no answer that hiding patches could "
                         f"change; give one with a head")
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


# ---- What the methods share -------------------------------------------------------------------------------


def choose_targets(logits, target, class_names=None):
    """Class numbers (B), on the device of the logits (B, K), out of numbers or names. Raises InputError for a class
    that is not there, and for another number of them than one or B."""
    if logits.ndim != 2:
        raise InputError(f"the model gives {tuple(logits.shape)} for a batch of images; expected logits (B, K)")
    B, K = logits.shape
    if target is None:
        return logits.argmax(dim=1)
    given = target.tolist() if isinstance(target, (torch.Tensor, np.ndarray)) else target
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(given) not in (1, B):
        raise InputError(f"{len(given)} targets were given for {B} images; expected one, or one for each")
    labels = [class_names.index(one) if class_names and one in class_names else one for one in given]
    for one in labels:
        if isinstance(one, bool) or not isinstance(one, (int, np.integer)) or not 0 <= one < K:
            raise InputError(f"target {one!r} is out of range; expected a class from 0 to {K - 1}"
                             + (f", or a name such as {class_names[0]!r}" if class_names else ""))
    return torch.tensor(labels, device=logits.device).expand(B)


def chosen(logits, targets):
    """The sum of the target classes' logits, to take gradients of; images do not mix, so each has its own."""
    return logits.gather(1, targets[:, None]).sum()
