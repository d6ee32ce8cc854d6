"""What a model costs: parameters, FLOPs, throughput and memory.

count_parameters, count_flops     exact counts
throughput, peak_memory     measurements
fitted_exponent     the power law of a cost against size

Shapes:  B images, C channels, K classes.
"""

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
    """Return the number of parameters of a model, quantised ones included.

    Parameters
    ----------
    model : nn.Module
        Any model.
    trainable_only : bool, optional
        If True, count only the parameters that an optimiser would change.
    """
    numbers = [p for p in model.parameters() if p.requires_grad or not trainable_only]
    if not trainable_only:  # in quantised layers, weight and bias are methods
        numbers += [part() for module in model.modules() if callable(getattr(module, "weight", None))
                    for part in (module.weight, module.bias)]
    return sum(p.numel() for p in numbers if p is not None)


def count_flops(model, img_size=None):
    """Return the FLOPs of one forward pass on one image; a multiply-add counts as 2.

    Parameters
    ----------
    model : nn.Module
        One of our models.
    img_size : int or tuple of int, optional
        Side of the image in pixels, or (height, width). The model's own size by default.

    Raises
    ------
    InputError
        If the model is quantised.

    Notes
    -----
    Matrix products and convolutions count, as in `torch.utils.flop_counter`; norms, softmax, activations, biases and
    additions do not. As in published counts, every token passes through every block, although a ViT whose head reads
    only CLS skips most of the last block. Nothing is computed: the pass runs on shapes alone (device "meta").
    """
    model = unwrapped(model)
    if is_quantised(model):
        raise InputError(f"this {class_name(model)} is quantised, and integer products are not counted; count the "
                         f"FLOPs of the model before quantisation")
    size = pair(model.config.img_size if img_size is None else img_size)
    images = torch.empty(1, model.config.in_channels, *size, device="meta", dtype=dtype_of(model))
    tensors = {id(tensor): tensor.detach().to("meta") for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, tensors).eval()  # a copy without memory for its weights
    counter = FlopCounterMode(display=False)
    # MATH computes attention as two matrix products, which every version of torch counts.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        twin.forward_head(twin.forward_features(images))
    return counter.get_total_flops()


def fitted_exponent(sizes, values):
    """Return the exponent b of a power law, value ~ size^b.

    The exponent is the least-squares slope of log(value) = a + b log(size).

    Raises
    ------
    InputError
        If there are fewer than two sizes, or if a size or a value is not positive.
    """
    x, y = (torch.tensor(list(numbers), dtype=torch.float64) for numbers in (sizes, values))
    if len(x) < 2 or x.shape != y.shape or not (x > 0).all() or not (y > 0).all():
        raise InputError(f"no exponent can be fitted to sizes {sizes} and values {values}; expected at least two "
                         f"positive sizes and a positive value for each")
    x, y = x.log(), y.log()
    x = x - x.mean()
    return (x @ y / (x @ x)).item()


def throughput(model, img_size=None, batch_size=32, seconds=1.0, train=False, device=None):
    """Return the images per second: batch_size divided by the median time of a pass.

    Parameters
    ----------
    model : nn.Module
        One of our models. A copy of it is measured, on random images that are already on the device.
    img_size : int or tuple of int, optional
        Side of the images in pixels, or (height, width). The model's own size by default.
    batch_size : int, optional
        Number of images in one pass.
    seconds : float, optional
        How long to measure, after two passes to warm up. At least three passes are timed.
    train : bool, optional
        If False, measure the forward pass in eval mode without gradients; if True, forward and backward passes without
        an optimiser.
    device : str, optional
        As in `choose_device`. By default the model's own device.
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
    """Return the peak memory in bytes of one pass, beyond the weights and the images.

    Parameters
    ----------
    model : nn.Module
        Any model. A copy of it is measured.
    images : Tensor, shape (B, C, height, width)
        Normalised images.
    train : bool, optional
        If True, measure forward and backward passes. The optimiser's state is not included.

    Notes
    -----
    The peak includes activations and the working memory of the operations; with `train`, also the activations kept for
    the backward pass and the gradients of the weights. On CUDA, it is measured with `torch.cuda.max_memory_allocated`;
    otherwise, on the CPU, as the highest running sum of the allocations that `torch.profiler` records.
    """
    device = device_of(model) if device_of(model).type == "cuda" else torch.device("cpu")
    model, images = copy.deepcopy(model).to(device).train(train), to_model(images, model).to(device)
    _run_pass(model, images, train)  # warm-up: libraries allocate their workspaces once
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _run_pass(model, images, train)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler of torch 2.14 prints log lines
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _run_pass(model, images, train)
    records = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    records.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in records), default=0)  # a release has negative bytes


def _run_pass(model, images, train):
    """Run a forward pass and, with train=True, the backward pass of a cross-entropy; wait until it ends."""
    if train and is_quantised(model):
        raise InputError(f"this {class_name(unwrapped(model))} is quantised, so it has no gradients; measure it with "
                         f"train=False")
    with torch.set_grad_enabled(train):
        logits = model(images)  # (B, K)
        if train:
            labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            F.cross_entropy(logits, labels).backward()
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    elif images.device.type == "mps":
        torch.mps.synchronize()
