"""Where in an image a prediction comes from, by every usual method, and how far to trust each map.

    explain(model, images, method)     one of METHODS, for a class; rollout, relevance and token_cam are the formulas
    logit_lens, token_norms, feature_colours, patch_filters     what tokens and the patch projection hold
    compare_explanations               all methods: their agreement, and deletion_insertion beside random order

A method that does not work on a model raises InputError with the reason. selfcheck.py checks the formulas on a model.

Shapes:  B images, L blocks, H heads, N tokens (prefix tokens, then patches), D width, K classes, n patches,
          C channels, P patch side, M methods, R random orders, S steps of a curve.
"""

import zlib
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F

from vit_bridge.analysis.attention import cls_attention_grid
from vit_bridge.analysis.capture import capture, check_finite_numbers, differentiable, predict_logits, watch_layer
from vit_bridge.errors import InputError, check_choice, check_index, check_int
from vit_bridge.models.adapters import adapt, adapt_vit, check_head, check_pool
from vit_bridge.models.protocol import class_name
from vit_bridge.runtime import at_least_float32, evaluating, logits_of, to_model, unwrapped

OUTLIER = 3.0  # a patch token whose norm is this many times the median counts as a register artefact


# ---- The formulas -----------------------------------------------------------------------------------------


def rollout(maps, discard_ratio=0.0):
    """How much of each input token is in each output token, (L, B, H, N, N) -> (B, N, N), rows sum to one.

    Each block is taken as half attention, mean over the heads, and half the residual: A = (mean_h A_h + I) / 2; the
    product goes from the last block to the first. Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers",
    Sec. 4. discard_ratio: the fraction of each block's weights, in [0, 1), the smallest, that is set to zero before I
    is added and the rows are scaled back to one. Raises InputError for a ratio out of range.
    """
    if not isinstance(discard_ratio, Real) or not 0 <= discard_ratio < 1:
        raise InputError(f"discard_ratio {discard_ratio!r} is out of range; expected 0 <= ratio < 1")
    mixing = maps.mean(dim=2)  # (L, B, N, N)
    n_tokens = mixing.shape[-1]
    if n_dropped := int(discard_ratio * n_tokens**2):
        flat = mixing.flatten(2)  # (L, B, N N)
        smallest = flat.topk(n_dropped, dim=2, largest=False).indices
        mixing = flat.scatter(2, smallest, 0.0).view_as(mixing)
    mixing = mixing + torch.eye(n_tokens, dtype=maps.dtype, device=maps.device)
    mixing = mixing / mixing.sum(dim=-1, keepdim=True)
    rolled = mixing[-1]
    for earlier in mixing[:-1].flip(0):
        rolled = rolled @ earlier
    return rolled  # (B, N, N)


def relevance(maps, gradients):
    """How much each input token speaks for a class in each output token: 2 x (L, B, H, N, N) -> (B, N, N).

    gradients: of the logit of the class with respect to the maps. Block by block, from the first, R <- R + A R, with A
    the mean over the heads of the positive part of map times gradient; R starts as I. Chefer, Gur and Wolf 2021,
    "Generic Attention-model Explainability", Eq. 5 and 6.
    """
    return relevance_gained(maps, gradients) + torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)


def relevance_gained(maps, gradients):
    """relevance without the I that each token has of itself, so that nothing small is rounded away beside 1."""
    speaking = (maps * gradients).clamp(min=0).mean(dim=2)  # (L, B, N, N): negative heads do not cancel others
    gained = torch.zeros_like(speaking[0])  # (B, N, N)
    for block in speaking:
        gained = gained + block + block @ gained
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
    seen = capture(model, images)
    maps = seen.maps[check_index("layer_idx", layer_idx, len(seen.maps))]  # (B, H, N, N)
    attention = maps.mean(dim=1) if head_idx is None else maps[:, check_index("head_idx", head_idx, maps.shape[1])]
    return _for_the_head(attention, seen)


def rollout_saliency(model, images, targets, discard_ratio=0.0):
    """rollout, of the head's token; the class does not matter."""
    seen = capture(model, images)
    return _for_the_head(rollout(torch.stack(seen.maps), discard_ratio), seen)


def relevance_saliency(model, images, targets):
    """relevance, of the head's token, for the class; without the I that each token has of itself."""
    check_head(model)
    seen = capture(model, images, gradients=True)
    gradients = torch.autograd.grad(chosen(seen.logits, targets), seen.maps)
    gained = relevance_gained(torch.stack(seen.maps), torch.stack(gradients))  # (B, N, N)
    check_finite_numbers(model, gained)
    return _for_the_head(gained, seen)


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
    seen = capture(model, images, gradients=True)
    n_blocks, unseen = len(seen.maps), not seen.adapter.reads_patches
    layer, read = cam_layer(seen.adapter, layer_idx), {"cls": "CLS"}.get(seen.adapter.pool, seen.adapter.pool)
    if unseen and n_blocks == 1:
        raise InputError(f"Grad-CAM after the only block is blank: the head reads {read} alone, and what the patch "
                         f"tokens are there goes nowhere; ask for relevance or attention")
    if unseen and layer == n_blocks - 1:
        raise InputError(f"Grad-CAM after the last block is blank: the head reads {read} alone, and what the patch "
                         f"tokens are there goes nowhere; choose a layer_idx from 0 to {n_blocks - 2}")
    gradient, = torch.autograd.grad(chosen(seen.logits, targets), seen.tokens[layer + 1])  # (B, N, D)
    first = seen.adapter.n_prefix
    return _not_blank(token_cam(seen.tokens[layer + 1][:, first:], gradient[:, first:]).unflatten(1, seen.grid))


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
    seen = capture(model, images)
    with evaluating(model):
        lens = torch.stack([at_least_float32(seen.adapter.read(tokens)).softmax(dim=1) for tokens in seen.tokens])
    check_finite_numbers(model, lens)
    return lens.cpu()


def token_norms(captured):
    """(norms, artefacts), both (L, B, rows, columns): the length of each patch token after each block, and whether it
    is OUTLIER times the median of its image and block or more, as tokens that the model uses for something else are
    (Darcet et al. 2024, "Vision Transformers Need Registers")."""
    first = captured.adapter.n_prefix
    tokens = at_least_float32(torch.stack(captured.tokens[1:]).detach().cpu())  # (L, B, N, D)
    norms = tokens[:, :, first:].norm(dim=3)  # (L, B, n)
    artefacts = norms >= OUTLIER * norms.median(dim=2, keepdim=True).values
    return norms.unflatten(2, captured.grid), artefacts.unflatten(2, captured.grid)


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


@torch.no_grad()
def deletion_insertion(model, images, saliency, targets, n_steps=16, batch_size=128, seed=0):
    """(deletion, insertion), each (S + 1, B): the probability of the target class while patches are hidden, the most
    salient first, and while they are shown on an empty image, the most salient first.

    saliency (B, rows, columns). Patches of equal saliency go in a random order, which depends on the seed and the image
    alone, so that a constant saliency is the control, random order. An image with NaN in its saliency has NaN. Hidden
    patches get the mean of the normalisation. A map that finds what the prediction depends on makes the first curve
    fall early and the second rise early; the mean of a curve is its area. Petsiuk, Das and
    Saenko 2018, "RISE", Sec. 4.1.
    """
    check_int("n_steps", n_steps, 1)
    images, saliency, n, grid = images.cpu(), saliency.cpu(), saliency[0].numel(), saliency.shape[1:]
    rows, columns = (torch.arange(side) * count // side for side, count in zip(images.shape[2:], grid, strict=True))
    ranks = _ranks_of(saliency.flatten(1), _random_orders(images, n, seed))  # (B, n), 0 the most salient
    no_map = saliency.flatten(1).isnan().any(dim=1)  # (B)
    curves = []
    for inserting in (False, True):
        curve = []
        for step in range(n_steps + 1):
            shown = ((ranks < round(step / n_steps * n)) == inserting).unflatten(1, grid)  # (B, rows, columns)
            changed = images * shown[:, rows[:, None], columns][:, None]  # (B, C, height, width)
            curve.append(_class_probability(model, changed, targets, batch_size))
        curves.append(torch.stack(curve).masked_fill(no_map, torch.nan))
    return tuple(curves)


def _ranks_of(saliency, orders):
    """The rank of each patch, 0 the most salient; ties as they come in `orders`: 2 x (B, n) -> (B, n)."""
    ranking = saliency.gather(1, orders).argsort(dim=1, descending=True, stable=True)  # (B, n) places in the orders
    return orders.gather(1, ranking).argsort(dim=1)


def _random_orders(images, n, seed):
    """A random order of n patches for each image, (B, n), out of the seed and the image's numbers, so that it is the
    same in every batch. images (B, C, height, width), on the CPU."""
    seeds = [zlib.crc32(image.float().contiguous().numpy(), seed % 2**32) for image in images]
    return torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(one)) for one in seeds])


def _class_probability(model, images, targets, batch_size):
    """The probability of each image's target class, (B), on the CPU."""
    model = unwrapped(model)
    with evaluating(model):
        parts = [logits_of(model(to_model(part, model))).cpu() for part in images.split(batch_size)]
    return at_least_float32(torch.cat(parts)).softmax(dim=1).gather(1, targets[:, None].cpu())[:, 0]


def rank_correlation(first, second):
    """Spearman's correlation of two maps of each image, 2 x (B, ...) -> (B), equal values sharing their mean rank; NaN
    where one map is the same everywhere."""
    ranks = []
    for values in (first.flatten(1).double(), second.flatten(1).double()):
        others = values[:, None]  # (B, 1, n)
        rank = (values[:, :, None] > others).double() + 0.5 * (values[:, :, None] == others).double()  # (B, n, n)
        rank = rank.sum(dim=2)  # (B, n)
        ranks.append(rank - rank.mean(dim=1, keepdim=True))
    a, b = ranks
    return (a * b).sum(dim=1) / ((a**2).sum(dim=1) * (b**2).sum(dim=1)).sqrt()  # (B)


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
    curves = {name: deletion_insertion(model, images, saliency, target, n_steps, seed=seed)
              for name, saliency in saliencies.items()}
    alike = torch.ones(next(iter(saliencies.values())).shape)
    pairs = [deletion_insertion(model, images, alike, target, n_steps, seed=seed + 1 + i) for i in range(n_draws)]
    draws = {what: torch.stack([pair[i] for pair in pairs]) for i, what in enumerate(("deletion", "insertion"))}
    deletion, insertion = ({name: pair[i] for name, pair in curves.items()} | {"random order": draws[what].mean(dim=0)}
                           for i, what in enumerate(draws))
    return Comparison(saliencies, refused, agreement(list(saliencies.values())), deletion, insertion, draws, target,
                      explained.probabilities)


# ---- What the methods share -------------------------------------------------------------------------------


def _for_the_head(matrix, seen):
    """What the tokens that the head reads hold of each patch, on average: (B, N, N) -> (B, rows, columns)."""
    check_pool(seen.adapter.pool)
    return cls_attention_grid(matrix, seen.grid, seen.adapter.n_prefix, seen.adapter.pool)


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
