"""The one way to run a model over images: device, precision, eval mode, and what to do when memory runs out.

Shapes:  B images in a batch, N images, C channels, K classes.
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
        abilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.11 does not say
        return torch.bfloat16 if abilities.get("amx_bf16") or abilities.get("avx512_bf16") else None
    return None


def unwrapped(module):
    """The model itself, inside the wrappers of torch: torch.compile, DataParallel, DistributedDataParallel and
    AveragedModel, one inside the other too."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
            module = module.module
        elif "_orig_mod" in getattr(module, "_modules", ()):  # torch.compile's
            module = module._orig_mod
        else:
            return module


def is_quantised(model):
    """Whether the model has layers of integer weights, as torch.ao.quantization makes them: no gradient passes them."""
    return any(".quantized" in type(module).__module__ for module in model.modules())


def logits_of(output):
    """A model's output as logits: transformers wraps them in an object, others in a dict. A tuple stays one. Of a base
    model of transformers, which has no head, its tokens after the last norm, (B, N, D)."""
    if isinstance(output, Mapping):
        return output.get("logits", output.get("last_hidden_state", output))
    return output if isinstance(output, tuple) else getattr(output, "logits", output)


def tokens_of(output):
    """A block's output as tokens: some libraries wrap them in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def evaluating(model):
    """Inside, the whole model is in eval mode, and what is compiled in it runs as it is written, so that hooks see it;
    afterwards each of its modules is in the mode it was in."""
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
    """The device of the model's first parameter or buffer; the CPU where it has none. Raises InputError for a model
    on the device "meta", which has shapes and no numbers."""
    device = next((one.device for one in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    if device.type == "meta":
        raise InputError("the model is on the device 'meta' and has shapes, but no weights; build it on the CPU, or "
                         "load its weights")
    return device


def dtype_of(model):
    """The precision of the model's first floating-point parameter or buffer; torch's default where it has none."""
    numbers = (one.dtype for one in chain(model.parameters(), model.buffers()) if one.is_floating_point())
    return next(numbers, torch.get_default_dtype())


def to_model(images, model):
    """Images on the device and in the precision of the model."""
    return images.to(device_of(model), dtype_of(model))


def at_least_float32(values):
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


@torch.no_grad()
def class_probabilities(model, images):
    """Softmax of the logits, (B, K), in eval mode. images: normalised, (B, C, height, width)."""
    model = unwrapped(model)
    with evaluating(model):
        return logits_of(model(to_model(images, model))).float().softmax(dim=-1)  # (B, K)


@torch.no_grad()
def predictions(model, images, batch_size=128):
    """The class that the model predicts for each image: int64 (N,), on the CPU."""
    model = unwrapped(model)
    with evaluating(model):
        answers = [logits_of(model(to_model(part, model))).argmax(dim=1).cpu() for part in images.split(batch_size)]
    return torch.cat(answers)  # (N)


@cache
def check_compiler(device_type):
    """Compiles one small function by torch.compile. Raises InputError where that fails, as without a C++ compiler."""
    fresh = random.random()  # so that what was compiled once is not found again
    try:
        torch.compile(lambda x: x * fresh + x.sin())(torch.ones(8, device=device_type))
    except Exception as error:  # whatever the parts behind torch.compile raise
        cause = next((line for line in str(error).splitlines() if "Error:" in line or "Compiler" in line), str(error))
        raise InputError(f"torch.compile does not work here ({' '.join(cause.split())[:150]}); install a C++ compiler, "
                         f"such as g++, or train without --compile (in Python compile=False)") from error


class OutOfMemory(InputError):
    """Out of memory; `grad_accum_steps` is a number of parts that may be enough."""

    def __init__(self, text, grad_accum_steps):
        super().__init__(text)
        self.grad_accum_steps = grad_accum_steps


@contextmanager
def explain_out_of_memory(device, batch_size=None, grad_accum_steps=1, training=False):
    """Inside, an out-of-memory error becomes an OutOfMemory that names the batch and what to do; others stay."""
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
    """layer.forward, but its activations are not kept: the backward pass computes them again, from the layer's input
    (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").

    Nothing else changes: dropout is drawn alike, and batch statistics count once. compiled: it is used inside
    torch.compile, which writes batch statistics once by itself.
    """
    norms = [module for module in layer.modules() if isinstance(module, _BatchNorm)]
    contexts = dict(context_fn=partial(_contexts_of, norms)) if norms and not compiled else {}
    return partial(checkpoint, layer.forward, use_reentrant=False, **contexts)


def _contexts_of(norms):
    """What is entered by the first forward pass, and by the second."""
    return nullcontext(), _statistics_kept(norms)


@contextmanager
def _statistics_kept(norms):
    """Afterwards batch norms have the running statistics that they had before."""
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def replaced_forwards(forwards):
    """Inside, modules compute what `forwards`, {module: function}, says; afterwards what they did before."""
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
    """Gives the device to compute on; of several processes each its own, and they are joined as long as this is
    entered. Only the first one prints.

    Raises InputError for a device that is not there, and where another process ended before its time.
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
            raise InputError(f"another process ended before its time ({str(error).splitlines()[0][:150]}); what ended "
                             f"it stands beside this, and a training goes on with --resume and its folder") from None
    dist.destroy_process_group()
