"""What a model costs: parameters, FLOPs, speed and memory.

Shapes:  B images, C channels, K classes."""

import copy
import os
import statistics
import time
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vit_bridge.errors import InputError, check_int
from vit_bridge.models.protocol import class_name
from vit_bridge.runtime import choose_device, device_of, dtype_of, is_quantised, to_model, unwrapped
from vit_model import pair


def count_parameters(model, trainable_only=False):
    """Numbers in the model's parameters, quantised ones too; with trainable_only=True those that an optimiser would
    change."""
    numbers = [p for p in model.parameters() if p.requires_grad or not trainable_only]
    if not trainable_only:  # quantised layers give their weights by methods
        numbers += [part() for module in model.modules() for part in (getattr(module, "weight", None),
                                                                      getattr(module, "bias", None)) if callable(part)]
    return sum(p.numel() for p in numbers if p is not None)


def count_flops(model, img_size=None):
    """FLOPs of one forward pass of one image, a multiply-add counted as 2.

    img_size: a side or (height, width); None: the model's own. Counted are matrix products and convolutions, as
    torch.utils.flop_counter does: norms, softmax, activations, biases and additions are left out. As in published
    counts, every token passes every block; in fact a ViT whose head reads only CLS saves most of the last one. Nothing
    is computed: the pass runs on shapes alone (device "meta"). Raises InputError for a quantised model.
    """
    model = unwrapped(model)
    if is_quantised(model):
        raise InputError(f"this {class_name(model)} is quantised, and products of whole numbers are not counted; count "
                         f"those of the model that it was made from")
    size = pair(model.config.img_size if img_size is None else img_size)
    images = torch.empty(1, model.config.in_channels, *size, device="meta", dtype=dtype_of(model))
    tensors = {id(tensor): tensor.detach().to("meta") for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, tensors).eval()  # with those instead of its own
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
    check_int("batch_size", batch_size, 1)
    device = device_of(model) if device is None else choose_device(device)
    config = unwrapped(model).config
    size = pair(config.img_size if img_size is None else img_size)
    images = torch.rand(batch_size, config.in_channels, *size, device=device, dtype=dtype_of(model),
                        generator=torch.Generator(device).manual_seed(0))
    model = copy.deepcopy(model).to(device).train(train)
    for _ in range(2):
        _run_pass(model, images, train)
    times = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        _run_pass(model, images, train)
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
    model, images = copy.deepcopy(model).to(device).train(train), to_model(images, model).to(device)
    _run_pass(model, images, train)  # to warm up: libraries allocate their workspaces once
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _run_pass(model, images, train)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler of torch 2.14 prints lines of its own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _run_pass(model, images, train)
    records = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    records.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in records), default=0)  # a release has negative bytes


def _run_pass(model, images, train):
    """A forward pass, with train=True also the backward pass of a cross-entropy; waits until it is done."""
    if train and is_quantised(model):
        raise InputError(f"this {class_name(unwrapped(model))} is quantised, and no gradient passes weights of whole "
                         f"numbers; measure it with train=False")
    with torch.set_grad_enabled(train):
        logits = model(images)  # (B, K)
        if train:
            labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            F.cross_entropy(logits, labels).backward()
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    elif images.device.type == "mps":
        torch.mps.synchronize()
