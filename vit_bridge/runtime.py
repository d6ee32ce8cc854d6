"""The shared code for running a model on images: device, precision, eval mode and out-of-memory errors.

Main names: choose_device, choose_precision, evaluating, class_probabilities, explain_out_of_memory, processes.

Shapes:  B images in a batch, N images, C channels, K classes, D features.
"""

import os
import random
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import cache, partial
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from vit_bridge.errors import InputError, check_choice
from vit_bridge.system import n_processes, process_number


def choose_device(device="auto"):
    """Return the torch.device to compute on.

    Parameters
    ----------
    device : str or torch.device, optional
        "auto" (CUDA if available, then an Apple GPU, then the CPU), "cpu", "cuda", "cuda:N" or "mps".

    Raises
    ------
    InputError
        If the name is unknown or the device is not available.
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
        raise InputError(f"device '{chosen}' is not available: torch sees {n_gpus} CUDA devices; choose auto or cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is not available: torch sees no Apple GPU; choose auto or cpu")
    return chosen


def choose_precision(amp, device):
    """Return the autocast dtype for a device, or None for float32.

    Parameters
    ----------
    amp : {"auto", "off", "bf16", "fp16"}
        "auto" is bf16 on CUDA devices that support it and fp16 on others. On a CPU it is bf16 if the CPU multiplies it
        in hardware, otherwise float32: bf16 is 2 to 3 times faster with AMX, 1.4 to 2 times faster with AVX512-BF16,
        and far slower without them. On other devices it is float32.
    device : torch.device
    """
    check_choice("amp", amp, ("auto", "off", "bf16", "fp16"))
    if amp != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu":
        abilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.11 has no such function
        return torch.bfloat16 if abilities.get("amx_bf16") or abilities.get("avx512_bf16") else None
    return None


def unwrapped(module):
    """Return the model inside torch's wrappers, even nested ones.

    The wrappers are torch.compile, DataParallel, DistributedDataParallel and AveragedModel.
    """
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
            module = module.module
        elif "_orig_mod" in getattr(module, "_modules", ()):  # set by torch.compile
            module = module._orig_mod
        else:
            return module


def is_quantised(model):
    """Return whether the model has layers with integer weights, as torch.ao.quantization creates.

    No gradient flows through these layers.
    """
    return any(".quantized" in type(module).__module__ for module in model.modules())


def logits_of(output):
    """Return the logits of a model's output, which some libraries wrap in an object or a dict.

    Tuples are returned unchanged. A base model of transformers has no head: its tokens after the last norm, (B, N, D),
    are returned.
    """
    if isinstance(output, Mapping):
        return output.get("logits", output.get("last_hidden_state", output))
    return output if isinstance(output, tuple) else getattr(output, "logits", output)


def tokens_of(output):
    """Return the tokens of a block's output, which some libraries wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def evaluating(model):
    """Keep the whole model in eval mode, and restore the mode of each module afterwards.

    Compiled parts run uncompiled inside, so that hooks see their layers.
    """
    modes = {module: module.training for module in model.modules()}
    compiled = any(module._compiled_call_impl or "_orig_mod" in module._modules for module in modes)
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def device_of(model):
    """Return the device of the model's first parameter or buffer, or the CPU if it has none.

    Raises InputError for a model on the device "meta", which has shapes but no values.
    """
    device = next((one.device for one in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    if device.type == "meta":
        raise InputError("the model is on the device 'meta' and has shapes, but no weights; build it on the CPU, or "
                         "load its weights")
    return device


def dtype_of(model):
    """Return the dtype of the model's first floating-point parameter or buffer, or torch's default dtype."""
    numbers = (one.dtype for one in chain(model.parameters(), model.buffers()) if one.is_floating_point())
    return next(numbers, torch.get_default_dtype())


def to_model(images, model):
    """Return images on the device and in the dtype of the model."""
    return images.to(device_of(model), dtype_of(model))


def at_least_float32(values):
    """Return values as float32 if they are float16 or bfloat16, otherwise unchanged."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


@torch.no_grad()
def class_probabilities(model, images):
    """Return the softmax of the logits, (B, K), computed in eval mode.

    images: normalised, (B, C, height, width).
    """
    model = unwrapped(model)
    with evaluating(model):
        return logits_of(model(to_model(images, model))).float().softmax(dim=-1)  # (B, K)


@torch.no_grad()
def predictions(model, images, batch_size=128):
    """Return the predicted class of each image: int64 (N,), on the CPU."""
    model = unwrapped(model)
    with evaluating(model):
        classes = [logits_of(model(to_model(part, model))).argmax(dim=1).cpu() for part in images.split(batch_size)]
    return torch.cat(classes)  # (N)


@cache
def check_compiler(device_type):
    """Raise InputError if torch.compile cannot compile one small function, for example without g++."""
    fresh = random.random()  # a new constant, so that no earlier result is reused
    try:
        torch.compile(lambda x: x * fresh + x.sin())(torch.ones(8, device=device_type))
    except Exception as error:  # the tools behind torch.compile raise many types
        cause = next((line for line in str(error).splitlines() if "Error:" in line or "Compiler" in line), str(error))
        raise InputError(f"torch.compile does not work here ({' '.join(cause.split())[:150]}); install a C++ compiler, "
                         f"such as g++, or train without --compile (in Python compile=False)") from error


class OutOfMemory(InputError):
    """Out of memory. `grad_accum_steps` is a number of gradient-accumulation steps that may be enough."""

    def __init__(self, text, grad_accum_steps):
        super().__init__(text)
        self.grad_accum_steps = grad_accum_steps


@contextmanager
def explain_out_of_memory(device, batch_size=None, grad_accum_steps=1, training=False):
    """Turn an out-of-memory error inside into an OutOfMemory that states the batch size and a remedy.

    Other errors pass unchanged.

    Parameters
    ----------
    device : torch.device
        For the message.
    batch_size : int, optional
        Images in a batch.
    grad_accum_steps : int, optional
        Parts into which the batch is already split.
    training : bool, optional
        Whether to suggest more gradient-accumulation steps.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        kinds, words = (torch.OutOfMemoryError, MemoryError), str(error).lower()
        if not isinstance(error, kinds) and "out of memory" not in words and "allocate memory" not in words:
            raise
        batch = f" with a batch of {batch_size} images" if batch_size else ""
        parts = f" in {grad_accum_steps} parts" if grad_accum_steps > 1 else ""
        more = 2 * grad_accum_steps
        advice = f"--grad-accum-steps {more} (in Python grad_accum_steps={more}) or " if training else ""
        raise OutOfMemory(f"out of memory on {device}{batch}{parts}; try {advice}a smaller batch size",
                          more) from error


def recomputed(layer, compiled=False):
    """Return layer.forward with gradient checkpointing.

    Its activations are not stored: the backward pass computes them again from the layer's input. Nothing else changes:
    dropout draws the same masks, and batch norms update their running statistics once.

    Parameters
    ----------
    layer : nn.Module
    compiled : bool, optional
        Whether the function runs inside torch.compile, which by itself updates the statistics only once.

    References
    ----------
    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    norms = [module for module in layer.modules() if isinstance(module, _BatchNorm)]
    contexts = dict(context_fn=partial(_contexts_of, norms)) if norms and not compiled else {}
    return partial(checkpoint, layer.forward, use_reentrant=False, **contexts)


def _contexts_of(norms):
    """Return the contexts of the first forward pass and of the second, as torch's checkpoint needs them."""
    return nullcontext(), _statistics_kept(norms)


@contextmanager
def _statistics_kept(norms):
    """Restore the running statistics of batch norms afterwards."""
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def replaced_forwards(forwards):
    """Replace the forward functions of modules inside, given as {module: function}."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


@contextmanager
def processes(device="auto"):
    """Join the processes of one command, and yield this process's device.

    With several processes, each uses its own GPU, and only the first one prints. A single process joins nothing.

    Raises InputError if the device is not available, or if another process stopped early.
    """
    device = choose_device(device)
    if n_processes() == 1:
        yield device
        return
    if device.type == "cuda":
        device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if process_number() else nullcontext():
        try:
            yield device
        except RuntimeError as error:
            if "gloo" not in str(error) and not isinstance(error, dist.DistError):
                raise
            raise InputError(f"another process stopped early ({str(error).splitlines()[0][:150]}); see its own message "
                             f"for the reason, and continue a training run with --resume and its folder") from None
    dist.destroy_process_group()
