"""What a model computes and costs, as numbers. The figures of visualizations.py draw what is returned here.

    attention_maps, select_attention, cls_attention_grid    where tokens look
    attention_distance, uniform_attention_distance          how far
    receptive_field, theoretical_receptive_field            which pixels one unit sees
    count_parameters, count_flops, throughput, peak_memory  what a model costs
    confusion_matrix, class_recalls, balanced_accuracy      which classes are taken for which
    linear_classifier, wilson_interval                      what an accuracy is to be read beside

No function here changes the model that it is given: weights, gradients, buffers, hooks and train or eval mode
are afterwards as they were, also after an error.

Letters:  B images, C channels, L blocks (depth), H heads, N tokens (CLS, registers, patches), D width, K classes,
          F features of the linear classifier.
"""

import copy
import math
import os
import statistics
import time
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cnn_model import ConvNet
from recording import (  # noqa: F401 - attention_maps is handed on
    anatomy_of,
    attention_maps,
    check_batch,
    device_of,
    differentiable,
    evaluating,
    logits_of,
    only,
    to_model,
    watch_layer,
)
from vit_model import InputError, VisionTransformer, check_choice, check_whole, grid_of, pair

# Strengths that linear_classifier tries, as multiples of the mean square of a feature.
RIDGES = (0.01, 0.1, 1.0, 10.0)


# ---- Attention --------------------------------------------------------------------------------------------


def select_attention(maps, layer_idx=-1, head_idx=None):
    """One layer's and head's map, (B, N, N), out of attention_maps' (L, B, H, N, N).

    Indices count from 0, negative ones from the end; head_idx=None is the mean over the heads. Raises
    InputError for an index out of range.
    """
    n_layers, _, n_heads = maps.shape[:3]
    attention = maps[check_index("layer_idx", layer_idx, n_layers)]  # (B, H, N, N)
    if head_idx is None:
        return attention.mean(dim=1)  # (B, N, N)
    return attention[:, check_index("head_idx", head_idx, n_heads)]  # (B, N, N)


def cls_attention_grid(attention, grid_size, n_prefix_tokens=1, pool="cls"):
    """What the tokens that the head reads take from each patch: maps (..., N, N) -> (..., rows, columns).

    grid_size        (rows, columns), as model.patch_embed.grid_size
    n_prefix_tokens  tokens before the patches, as model.n_prefix_tokens: CLS and the registers
    pool             as model.config.pool: "cls", what CLS takes; "mean", what a patch takes, mean over the patches

    The weights are left as they are: with what is taken from CLS and the registers they sum to one. Raises InputError
    where prefix and grid do not make N tokens.
    """
    rows, columns = grid_size
    if attention.shape[-1] != n_prefix_tokens + rows * columns:
        prefix = "CLS" if n_prefix_tokens == 1 else f"{n_prefix_tokens} tokens before them"
        raise InputError(f"a map over {attention.shape[-1]} tokens does not fit a grid of {rows}x{columns} patches "
                         f"and {prefix}, {n_prefix_tokens + rows * columns} tokens; give the grid_size and the "
                         f"n_prefix_tokens of its model")
    readers = attention[..., 0, :] if pool == "cls" else attention[..., n_prefix_tokens:, :].mean(dim=-2)  # (..., N)
    return readers[..., n_prefix_tokens:].unflatten(-1, (rows, columns))  # (..., rows, columns)


def patch_distances(grid_size, patch_size):
    """Pixels between the middles of all pairs of patches, (n, n), n = rows * columns, float64."""
    sides = zip(grid_size, pair(patch_size, "patch_size"), strict=True)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) * side for n, side in sides))  # (n, 2)
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")  # (n, n)


def attention_distance(maps, grid_size, patch_size, n_prefix_tokens=1, renormalise=True):
    """How far patches look, in pixels: the mean over them of sum_j A_ij distance_ij, (L, H) float64.

    maps         (L, B, H, N, N), as from attention_maps; the mean is over images and patches
    renormalise  True: what a patch gives to patches, itself among them, is scaled to a sum of one, so that CLS and the
                 registers do not count. False: they count as no distance

    ViT paper, Fig. 7 (right). Raises InputError where prefix and grid do not make N tokens.
    """
    n = grid_size[0] * grid_size[1]
    if maps.shape[-1] != n_prefix_tokens + n:
        raise InputError(f"maps over {maps.shape[-1]} tokens do not fit a grid of {grid_size[0]}x{grid_size[1]} "
                         f"patches and {n_prefix_tokens} tokens before them; expected {n_prefix_tokens + n} tokens")
    weights = maps[..., n_prefix_tokens:, n_prefix_tokens:].cpu().double()  # (L, B, H, n, n)
    distances = (weights * patch_distances(grid_size, patch_size)).sum(dim=-1)  # (L, B, H, n)
    if renormalise:
        distances = distances / weights.sum(dim=-1)
    return distances.mean(dim=(1, 3))  # (L, H)


def uniform_attention_distance(grid_size, patch_size):
    """The attention_distance of a patch that looks at all patches alike, in pixels: the control of the others."""
    return patch_distances(grid_size, patch_size).mean().item()


@torch.no_grad()
def position_similarity(model):
    """Cosine similarity of the position embeddings of all pairs of patches, (rows, columns, rows, columns).

    CLS is left out, registers have none. ViT paper, Fig. 7 (centre). Raises InputError for a model without position
    embeddings.
    """
    anatomy = None if isinstance(model, ConvNet) else anatomy_of(model)
    if anatomy is None or anatomy.positions is None:
        raise InputError(f"this {type(model).__name__} has no position embeddings; expected a VisionTransformer "
                         f"or HybridCNNViT with position 'learned' or 'sincos'")
    positions = F.normalize(anatomy.positions.float(), dim=-1)  # (n_patches, D)
    return (positions @ positions.T).reshape(2 * grid_of(anatomy.img_size, anatomy.patch_size))  # rows, columns, twice


@torch.no_grad()
def class_probabilities(model, images):
    """Softmax of the logits, (B, K), in eval mode. images: normalised, (B, C, height, width)."""
    with evaluating(model):
        return logits_of(model(to_model(images, model))).float().softmax(dim=-1)  # (B, K)


# ---- Receptive fields -------------------------------------------------------------------------------------


@differentiable()
def receptive_field(model, images, depth=None):
    """The effective receptive field of the centre unit: its share for each pixel, (height, width), sum 1, float64.

    The unit is the place (rows // 2, columns // 2) of the feature map, or of the grid of patch tokens, after
    `depth` blocks (ViT, hybrid) or stages (ConvNet); 0: after the patch embedding or the stem; None: the last.
    Its channels are summed, and of the gradient of that sum to the input pixels the absolute value is averaged
    over images and colours: Luo et al. 2016, "Understanding the Effective Receptive Field".

    images: normalised, (B, C, height, width); a ViT is ours, or timm's, transformers' or torchvision's. Raises
    InputError for images that the model does not take, for a depth out of range, and where the gradient is zero
    everywhere.
    """
    layer = layers_of(model)[check_depth(model, depth)]
    check_batch(images, model)
    pixels, features, _ = watch_layer(model, layer, images, getattr(model, "forward_features", None))
    features = only(features)
    if features.ndim == 3:
        grid = anatomy_of(model).grid(images)
        patches = features[:, -grid[0] * grid[1]:]  # (B, n_patches, D), without CLS and registers
        features = patches.transpose(1, 2).unflatten(2, grid)  # (B, D, rows, columns)
    rows, columns = features.shape[2:]
    unit = features[:, :, rows // 2, columns // 2].sum()
    gradient, = torch.autograd.grad(unit, pixels)  # (B, C, height, width)
    field = gradient.cpu().double().abs().mean(dim=(0, 1))  # (height, width)
    if not field.sum() > 0:
        raise InputError("the gradient of the centre unit is zero at every pixel, so it has no receptive field "
                         "on these images; give other images, or another depth")
    return field / field.sum()


def theoretical_receptive_field(model, depth=None):
    """(height, width) in pixels of the window that can reach one unit, at a depth as in receptive_field.

    Convolutions and pooling: r + (k - 1) * j for each kernel k at total stride j (Araujo et al. 2019, "Computing
    Receptive Fields of Convolutional Neural Networks", Eq. 2); it may be larger than the image. After an
    attention block: the whole image.
    """
    depth = check_depth(model, depth)
    if depth and not isinstance(model, ConvNet):
        return anatomy_of(model).img_size
    return tuple(walk_kernels(model, depth, axis)[0] for axis in (0, 1))


def unit_centre(model, img_size, depth=None):
    """(row, column) of the pixel below the middle of the unit that receptive_field takes; pixels count from 0.

    It may lie between two pixels: the middle of a patch of 4 pixels is 1.5 pixels from its first.
    """
    centre = []
    for axis, side in enumerate(pair(img_size)):
        depth, n_units = check_depth(model, depth), side
        for kernel, step, padding in kernels_of(model, depth, axis):
            n_units = (n_units + 2 * padding - kernel) // step + 1
        _, stride, first = walk_kernels(model, depth, axis)
        centre.append(first + n_units // 2 * stride)
    return tuple(centre)


def walk_kernels(model, depth, axis):
    """Along one axis (0: height, 1: width), in pixels: window of one unit, step between units, first middle."""
    window, stride, first = 1, 1, 0.0
    for kernel, step, padding in kernels_of(model, depth, axis):
        window += (kernel - 1) * stride
        first += ((kernel - 1) / 2 - padding) * stride
        stride *= step
    return window, stride, first


def kernels_of(model, depth, axis):
    """(size, step, padding) along one axis of each convolution and pooling up to a depth, in their order.

    A residual block is walked along its main path; its shortcut has the same stride and no larger window.
    """
    for layer in layers_of(model)[:depth + 1]:
        for name, module in layer.named_modules():
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d)) and "shortcut" not in name:
                yield tuple(size[axis] if isinstance(size, tuple) else size
                            for size in (module.kernel_size, module.stride, module.padding))


def radius_holding(field, share, centre=None):
    """The smallest radius in pixels around the centre within which `share` of the field's mass lies.

    field   (height, width), not negative, as from receptive_field
    share   in (0, 1], of the mass as it is
    centre  (row, column), as from unit_centre; None: the middle of the image

    Distances are between middles of pixels, so the field of a single pixel has radius 0.
    Raises InputError for a share out of range.
    """
    if not 0 < share <= 1:
        raise InputError(f"share {share} is out of range; expected 0 < share <= 1, such as 0.5 for half the mass")
    height, width = field.shape
    row, column = centre or ((height - 1) / 2, (width - 1) / 2)
    rows = torch.arange(height, dtype=torch.float64) - row
    columns = torch.arange(width, dtype=torch.float64) - column
    distances, order = torch.hypot(rows[:, None], columns[None, :]).flatten().sort()  # (height * width)
    mass = field.double().flatten()[order].cumsum(dim=0)  # (height * width)
    enough = mass >= share * mass[-1] * (1 - 1e-12)  # the sum is rounded
    return distances[enough.nonzero()[0, 0]].item()


def layers_of(model):
    """What makes the tokens or the first map, then the blocks (ViT, hybrid) or stages (ConvNet).

    Raises InputError for another kind of model than a ConvNet and the ViTs that recording.anatomy_of knows.
    """
    if isinstance(model, VisionTransformer):
        return [model.patch_embed, *model.blocks]
    if isinstance(model, ConvNet):
        return [model.stem, *model.stages]
    try:
        anatomy = anatomy_of(model)
    except InputError:
        raise InputError(f"a {type(model).__name__} has no known layers; expected a ConvNet, a VisionTransformer or "
                         f"HybridCNNViT, or a ViT of timm, transformers or torchvision") from None
    return [anatomy.projection, *anatomy.blocks]


def check_depth(model, depth):
    """depth, or the last where it is None. Raises InputError where the model is not that deep."""
    last = len(layers_of(model)) - 1
    if depth is None:
        return last
    if not isinstance(depth, int) or not 0 <= depth <= last:
        raise InputError(f"depth {depth!r} is out of range; this {type(model).__name__} has depths 0 to {last}")
    return depth


# ---- Costs ------------------------------------------------------------------------------------------------


def count_parameters(model, trainable_only=False):
    """Numbers in the model's parameters; with trainable_only=True those that an optimiser would change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def count_flops(model, img_size=None):
    """FLOPs of one forward pass of one image, a multiply-add counted as 2.

    img_size: a side or (height, width); None: the model's own. Counted are matrix products and convolutions, as
    torch.utils.flop_counter does: norms, softmax, activations, biases and additions are left out. As in published
    counts every token passes every block; a ViT whose head reads CLS alone saves most of its last one. Nothing is
    computed: the pass runs on shapes alone (device "meta").
    """
    size = pair(model.config.img_size if img_size is None else img_size)
    images = torch.empty(1, model.config.in_channels, *size, device="meta")
    tensors = {id(tensor): tensor.detach().to("meta") for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, tensors).eval()  # with those in the place of its own
    counter = FlopCounterMode(display=False)
    # MATH spells attention out as two matrix products, which every version of torch counts.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        twin.forward_head(twin.forward_features(images))
    return counter.get_total_flops()


def fitted_exponent(sizes, values):
    """The slope b of the line through log(value) = a + b log(size), by least squares: value grows as size^b.

    Raises InputError for fewer than two sizes, or a size or value that is not positive.
    """
    x, y = (torch.tensor(list(numbers), dtype=torch.float64) for numbers in (sizes, values))
    if len(x) < 2 or x.shape != y.shape or not (x > 0).all() or not (y > 0).all():
        raise InputError(f"no exponent follows from sizes {sizes} and values {values}; expected two or more positive "
                         f"sizes and a positive value for each")
    x, y = x.log(), y.log()
    x = x - x.mean()
    return (x @ y / (x @ x)).item()


def throughput(model, img_size=None, batch_size=32, seconds=1.0, train=False, device=None):
    """Images a second: batch_size over the median time of a pass, after two passes to warm up.

    img_size  a side or (height, width); None: the model's own
    seconds   how long to measure, at least three passes
    train     False: forward, in eval mode, without gradients. True: forward and backward, without an optimiser
    device    as in choose_device; None: where the model is

    Measured on a copy of the model with random images that lie on the device beforehand.
    """
    check_whole("batch_size", batch_size, 1)
    device = device_of(model) if device is None else choose_device(device)
    size = pair(model.config.img_size if img_size is None else img_size)
    images = torch.rand(batch_size, model.config.in_channels, *size, device=device,
                        generator=torch.Generator(device).manual_seed(0))
    model = copy.deepcopy(model).to(device).train(train)
    for _ in range(2):
        run_pass(model, images, train)
    times = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run_pass(model, images, train)
        times.append(time.perf_counter() - start)
    return batch_size / statistics.median(times)


def peak_memory(model, images, train=False):
    """Bytes that one pass needs beyond the weights and the images: the most that it holds at any one time.

    That is the activations and the working memory of the operations, with train=True (forward and backward) also
    the activations kept for the backward pass and the gradients of the weights; an optimiser's state comes on
    top. images: (B, C, height, width). Measured on a copy of the model: on CUDA, where the model is there, with
    torch.cuda.max_memory_allocated; else on the CPU, as the highest running sum of torch.profiler's allocations.
    """
    device = device_of(model) if device_of(model).type == "cuda" else torch.device("cpu")
    model, images = copy.deepcopy(model).to(device).train(train), images.to(device)
    run_pass(model, images, train)  # to warm up: libraries allocate their workspaces once
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run_pass(model, images, train)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler of torch 2.14 prints lines of its own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_pass(model, images, train)
    records = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    records.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in records), default=0)  # a release has negative bytes


def run_pass(model, images, train):
    """A forward pass, with train=True also the backward pass of a cross-entropy; waits until it is done."""
    with torch.set_grad_enabled(train):
        logits = model(images)  # (B, K)
        if train:
            labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            F.cross_entropy(logits, labels).backward()
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    elif images.device.type == "mps":
        torch.mps.synchronize()


# ---- Which classes are taken for which --------------------------------------------------------------------


def confusion_matrix(labels, predictions, n_classes):
    """How many images of each class were taken for each class, (K, K) int64: rows are true, columns predicted.

    labels, predictions: class numbers from 0, int64 (n). Raises InputError where they are not equally many, and for
    a number out of range.
    """
    if labels.shape != predictions.shape or labels.ndim != 1:
        raise InputError(f"labels of shape {tuple(labels.shape)} and predictions of shape {tuple(predictions.shape)} "
                         f"are no pairs; expected one of each for an image, (n)")
    labels, predictions = labels.cpu(), predictions.cpu()
    for name, values in (("labels", labels), ("predictions", predictions)):
        if len(values) and not 0 <= values.min() <= values.max() < n_classes:
            raise InputError(f"{name} from {values.min()} to {values.max()} are out of range; expected 0 to "
                             f"{n_classes - 1}, a number for each class of the model")
    pairs = labels * n_classes + predictions  # (n)
    return pairs.bincount(minlength=n_classes**2).reshape(n_classes, n_classes)  # (K, K)


def class_recalls(confusion):
    """The share of each class's images that were recognised, (K) float64; NaN for a class without images.

    confusion: (K, K), as from confusion_matrix.
    """
    return confusion.diagonal().double() / confusion.sum(dim=1)


def balanced_accuracy(confusion):
    """The mean of class_recalls over the classes that have images: rare classes count as much as frequent ones.

    Raises InputError where no class has images.
    """
    if not confusion.any():
        raise InputError("the confusion matrix counts 0 images; expected at least one, check the data")
    return class_recalls(confusion).nanmean().item()


# ---- What an accuracy is to be read beside ----------------------------------------------------------------


def wilson_interval(correct, n, z=1.96):
    """(low, high): where the accuracy lies when `correct` of n independent images were right.

    z=1.96 is 95 % confidence. Wilson 1927, "Probable Inference, the Law of Succession, and Statistical
    Inference". Raises InputError unless 0 <= correct <= n and n >= 1.
    """
    if n < 1 or not 0 <= correct <= n:
        raise InputError(f"{correct} correct of {n} is no count; expected 0 <= correct <= n and n of at least 1")
    share = correct / n
    middle = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, (middle - half) / (1 + z**2 / n)), min(1.0, (middle + half) / (1 + z**2 / n))


@torch.no_grad()
def linear_classifier(train_loader, val_loader, test_loader=None, max_images=20_000):
    """The control beside every trained accuracy: what pixels alone tell, without any layer of features.

    Ridge regression from pixels to one-hot classes, the images averaged down to at most 32 x 32; the strength,
    one of RIDGES, is the best on the validation images (the largest among equals), and the test images are read
    once, after that choice. A loader yields images (B, C, height, width), labels (B,), and has class_names.
    At most max_images training images, the first that the loader gives, are used.

    Returns a dict: val_acc and test_acc in 0..1, test_correct, test_n, ridge. Without a test_loader its three
    are None. Raises InputError where a loader gives no images.
    """
    n_classes = len(train_loader.class_names)
    gram, moments, n = None, None, 0
    for images, labels in train_loader:
        x = pixel_features(images[:max_images - n])  # (B, F)
        y = F.one_hot(labels[:len(x)], n_classes).to(x)  # (B, K)
        if gram is None:
            gram, moments = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], n_classes)
        gram.addmm_(x.T, x)  # (F, F), the sum of x^T x over the batches
        moments.addmm_(x.T, y)  # (F, K)
        n += len(x)
        if n >= max_images:
            break
    if n == 0:
        raise InputError("the training loader gave 0 images; expected at least one batch, check the data")
    gram, moments = gram.cpu().double(), moments.cpu().double()
    mean_square = max(gram.diagonal()[:-1].mean().item(), 1e-12)  # images of nothing but zeros have a solution too
    penalty = torch.full((len(gram),), mean_square, dtype=torch.float64)  # (F)
    penalty[-1] = 0  # the constant is free
    ridges = sorted(RIDGES, reverse=True)
    factors = (torch.linalg.cholesky(gram + torch.diag(ridge * penalty)) for ridge in ridges)  # each (F, F)
    weights = [torch.cholesky_solve(moments, factor) for factor in factors]  # each (F, K)
    correct, n = count_correct(weights, val_loader)
    best = max(range(len(ridges)), key=correct.__getitem__)
    result = dict(val_acc=correct[best] / n, test_acc=None, test_correct=None, test_n=None, ridge=ridges[best])
    if test_loader is not None:
        (test_correct,), n = count_correct([weights[best]], test_loader)
        result.update(test_acc=test_correct / n, test_correct=test_correct, test_n=n)
    return result


def pixel_features(images):
    """(B, C, height, width) -> (B, F): the pixels of at most 32 x 32, and a constant 1 at the end."""
    size = [min(side, 32) for side in images.shape[2:]]
    if images.device.type == "mps":  # which pools only to sizes that divide
        images = images.cpu()
    pixels = F.adaptive_avg_pool2d(images.float(), size).flatten(1)  # (B, F - 1)
    return F.pad(pixels, (0, 1), value=1.0)  # (B, F)


def count_correct(weights, loader):
    """(how many images each of the weight matrices (F, K) gets right, how many images there are)."""
    weights = torch.stack(weights).float()  # (classifiers, F, K)
    correct, n = torch.zeros(len(weights), dtype=torch.long), 0
    for images, labels in loader:
        answers = (pixel_features(images).cpu() @ weights).argmax(dim=-1)  # (classifiers, B)
        correct += (answers == labels.cpu()).sum(dim=1)
        n += len(labels)
    if n == 0:
        raise InputError("a validation or test loader gave 0 images; expected at least one batch, check the data")
    return correct.tolist(), n


# ---- What the functions above lean on ---------------------------------------------------------------------


def choose_device(device="auto"):
    """"auto" (cuda where there is one, else mps, else cpu) or "cpu", "cuda", "cuda:1", "mps", as a torch.device.

    Raises InputError for a name that torch does not know, and for a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device {device!r} is unknown; choose auto, cpu, cuda, cuda:N or mps") from None
    if chosen.type not in ("cpu", "cuda", "mps") or (chosen.type == "mps" and chosen.index):
        raise InputError(f"device '{chosen}' is unknown; choose auto, cpu, cuda, cuda:N or mps")
    n_gpus = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= n_gpus:
        raise InputError(f"device '{chosen}' is not there: torch sees {n_gpus} CUDA devices; choose auto or cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is not there: torch sees no Apple GPU; choose auto or cpu")
    return chosen


def choose_precision(amp, device):
    """The autocast type for a device, None for plain float32.

    amp: "auto", "off", "bf16" or "fp16". "auto" is bf16 on CUDA where it has it, else fp16 there; bf16 on a CPU
    that multiplies it in hardware (AMX, 2 to 3 times faster; AVX512-BF16, 1.4 to 2; without them far slower);
    float32 elsewhere.
    """
    check_choice("amp", amp, ("auto", "off", "bf16", "fp16"))
    if amp != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        return torch.bfloat16 if abilities.get("amx_bf16") or abilities.get("avx512_bf16") else None
    return None


def check_index(name, index, length):
    """index, counted from 0. Raises InputError where it is out of range."""
    if not isinstance(index, (int, np.integer)) or not -length <= index < length:
        raise InputError(f"{name} {index} is out of range; expected 0 to {length - 1}, or {-length} to -1 from "
                         f"the end")
    return int(index) % length
