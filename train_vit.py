"""The Trainer, and the commands around it: train, evaluate, predict, export, inspect; each has --help.

    python train_vit.py                                         the built-in shapes, about 2 minutes
    python train_vit.py --data-dir photos --minutes 10          a folder of images, a class a folder
    python train_vit.py --resume runs/NAME                      goes on with a run that was interrupted
    python train_vit.py predict --checkpoint runs/NAME/best.pt a.jpg b.jpg
    history = Trainer(model).train(train_loader, val_loader, n_epochs=10)       in Python

Shapes:  B images in a batch, K classes, C channels, H, W height and width.
"""

import argparse
import copy
import csv
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib import font_manager
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm

from visualizations import plot_images, visualize_attention_grid
from vit_bridge.analysis.cost import count_parameters
from vit_bridge.analysis.metrics import class_recalls, percent, wilson_interval
from vit_bridge.cli import (
    Bounded,
    OneLineParser,
    Size,
    add_class_names,
    add_n_heads,
    int_at_least,
    positive,
    script,
    seed,
)
from vit_bridge.data.audit import audit_folder
from vit_bridge.data.augmentation import FLIPS, MIXINGS, Augmentation, Mixing, mix_seed
from vit_bridge.data.datasets import DATASETS, DEFAULT_DATA_DIR, TORCHVISION_SETS, FolderSet, choose_set
from vit_bridge.data.files import check_not_empty, files_at
from vit_bridge.data.images import prepare_image, remark_on
from vit_bridge.data.loaders import (
    Loader,
    MemoryLoader,
    as_loader,
    get_data_loaders,
    get_evaluation_loader,
    get_test_loader,
    length_of,
    n_batches,
)
from vit_bridge.errors import InputError, check_choice
from vit_bridge.inference import Mirrored, batches_of, check_has_head, export_onnx, predict, ranked, score
from vit_bridge.models.adapters import adapt
from vit_bridge.models.initialisation import whiten_first_layer
from vit_bridge.models.protocol import class_name
from vit_bridge.models.registry import MODELS, build_model
from vit_bridge.plots.charts import plot_confusion, plot_training_curves, save_figure
from vit_bridge.preprocessing import SMALL_SIDE, describe_size
from vit_bridge.runtime import (
    OutOfMemory,
    at_least_float32,
    check_compiler,
    choose_device,
    choose_precision,
    device_of,
    dtype_of,
    evaluating,
    explain_out_of_memory,
    is_quantised,
    logits_of,
    processes,
    recomputed,
    replaced_forwards,
    unwrapped,
)
from vit_bridge.system import (
    Interrupted,
    Interrupts,
    all_gather_object,
    broadcast_object,
    n_processes,
    new_output_dir,
    process_number,
    unless_empty,
    write_json,
)
from vit_bridge.training.config import RECIPES, Callback, Recipe, TrainConfig, choose_recipe
from vit_bridge.training.linear_probe import feature_loaders, linear_classifier
from vit_bridge.training.objectives import Classification, Objective, balancing_weights
from vit_bridge.training.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    layer_lr_scales,
    learning_rate_at,
    make_optimizer,
    update_average,
)
from vit_bridge.training.run_folder import (
    BEST,
    CONFIG,
    LAST,
    OLD_NAMES,
    Saver,
    changes_since,
    device_to_resume,
    folder_to_resume,
    holds_run,
    lock_folder,
    on_cpu,
    options_to_resume,
    read_run,
    renamed,
)
from vit_bridge.weights.checkpoints import describe_checkpoint, load
from vit_bridge.weights.files import read_file
from vit_bridge.weights.heads import fit_head
from vit_bridge.weights.pretrained import PRETRAINED, describe_pretrained
from vit_model import freeze_backbone, pair

__all__ = ["Trainer", "get_data_loaders", "predict"]
WORKERS_HELP = "processes that read photographs (default: one for each core, at most 8)"
CHECK_EVERY = 10  # steps between two looks at whether all is finite, where looking makes the CPU wait for a GPU
WHITENED_BY = 2000  # images from which a first layer is whitened
MINUTES = 2  # of a training without a given length
HEAD_EPOCHS = 100  # of --freeze-backbone, whose epochs take a moment
LINEAR_IMAGES = 20_000  # at most, from which the linear classifier beside a test learns
UNEVEN = 2  # classes are called uneven if the largest has this many times the images of the smallest


class NotFinite(InputError):
    """Loss or gradient is no longer finite."""


class Stopped(Exception):
    """A training was asked to stop; `state`, a TrainState, says where it stands."""

    def __init__(self, state):
        super().__init__(f"stopped after step {state.step}")
        self.state = state


# ---- The Trainer ------------------------------------------------------------------------------------------


class Trainer:
    """Trains a module on what an objective minimises, by default cross-entropy of its logits (B, K).

    model       any module; of one inside torch's wrappers (unwrapped) the model itself, through torch.compile if that
                is one of them
    device      "auto", "cpu", "cuda", "cuda:N" or "mps"; the model is moved there
    objective   an Objective; None: Classification, with label smoothing 0.1
    config      a TrainConfig; further arguments override its fields, those of train() override both
    loss_fn     (logits, labels) -> a scalar, the mean over the images: short for Classification(loss_fn=...)

    The same objective serves training and evaluation, so that the two curves can be compared. After train(),
    `data_share` is the fraction of the training time spent on fetching and augmenting images; on CUDA it counts only
    what the CPU waited for. `average` is the model with the average of the weights, where config.ema_decay asks for it.

    All randomness of a step (order, augmentation, dropout) is a function of (seed, step), and a TrainState holds
    everything else: a training resumed from it ends as if it had never been interrupted. Under torchrun each process
    has a Trainer and a shard of every batch; DistributedDataParallel averages the gradients, weighted so that the step
    is that of one process with the whole batch.
    """

    def __init__(self, model, device="auto", objective=None, config=None, *, loss_fn=None, **overrides):
        if objective is not None and loss_fn is not None:
            raise InputError("Trainer got an objective and a loss_fn; expected one of them: an objective has its loss")
        self.config = replace(config or TrainConfig(), **overrides)
        self.device = choose_device(device)
        self.dtype = choose_precision(self.config.amp, self.device)
        self.model = trainable(model).to(self.device)
        self.compiled = compiled_part(model)
        if not isinstance(objective, Objective | None):
            raise InputError(f"{type(objective).__name__} is not an Objective; give a function of logits and labels as "
                             f"loss_fn=")
        self.objective = (objective or Classification(loss_fn=loss_fn)).to(self.device)
        self.objective.check_model(self.model)
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.parallel, self.average, self.data_share, self.recomputed = None, None, 0.0, {}
        self.callbacks, self.saved_at = (), 0.0

    def train(self, train_loader, val_loader=None, n_epochs=None, learning_rate=None, *, callbacks=(), resume=None,
              progress=True, **overrides):
        """One run: the learning rate rises in the warm-up and then falls, step by step.

        train_loader   a Loader, a torch DataLoader or a list: batches (images, labels); with n_steps given any iterable
        val_loader     such a loader, evaluated after every epoch; None leaves NaN in its columns
        n_epochs, learning_rate, overrides   fields of the TrainConfig, for this run
        callbacks      a list of Callback
        resume         state_dict() of an earlier TrainState: the training goes on from there, exactly, given the same
                       arguments
        progress       a bar with loss, accuracy, images a second and the time left

        Returns the history, {column: a list with an entry an epoch}: the objective's columns, then the last learning
        rate ("lr"), the seconds spent training and the images a second. Raises InputError for numbers out of range,
        NotFinite where loss or gradient are not finite (with fp16: where no scale of the gradient helps), OutOfMemory,
        and Stopped where a callback asks for it.
        """
        for name, value in (("n_epochs", n_epochs), ("learning_rate", learning_rate)):
            if value is not None:
                overrides[name] = value
        config = replace(self.config, **overrides)
        if config.seed is None:
            drawn = int(torch.randint(2**62, ()))
            config = replace(config, seed=drawn if resume is None else resume.get("seed", drawn))
        if config.compile:
            check_compiler(self.device.type)
        self.objective.looked = ()
        train_loader = self.own_loader(train_loader)
        forward = self.model
        if self.world_size > 1:
            # it gives all processes the first one's weights, before a copy of them is made for the average
            forward = nn.parallel.DistributedDataParallel(
                self.model, device_ids=[self.device] if self.device.type == "cuda" else None)
        self.parallel, self.dtype = forward, choose_precision(config.amp, self.device)
        fixed = config.n_steps is not None and config.warmup_epochs is None  # the loader may then have no length
        length = None if fixed else n_batches(train_loader, "n_steps=, and no warmup_epochs=")
        compiled = config.compile or self.compiled is not None
        self.recomputed = {layer: recomputed(layer, compiled) for layer in self.layers(config.grad_checkpointing)}
        state = TrainState(self, config, length)
        if resume is not None:
            state.load_state_dict(resume)
        if self.compiled is not None:
            forward = self.compiled.dynamo_ctx(forward)  # with the options that it was compiled with
        elif config.compile:
            forward = torch.compile(forward)
        state.forward = InPrecision(forward, self.device, self.dtype, dtype_of(self.model))
        self.callbacks, self.saved_at = callbacks, time.perf_counter()
        with (torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
              tqdm(total=state.n_steps, initial=state.step, unit="step", disable=not progress or self.rank > 0,
                   leave=False) as bar):
            while state.step < state.n_steps or state.batch:
                self.train_epoch(train_loader, state, bar)
                self.end_epoch(val_loader, state)
                for callback in callbacks:
                    callback.on_epoch(state)
        self.average = state.average
        self.data_share = state.data_seconds / sum(state.history["seconds"])
        return state.history

    def train_epoch(self, loader, state, bar):
        """The rest of an epoch, from the batch that the state names."""
        _set_train_mode(self.model)
        self.objective.train()
        n_given = length_of(loader)
        loader.set_position(len(state.history["lr"]), state.batch if n_given is None else min(state.batch, n_given))
        batches = itertools.islice(loader, state.n_steps - state.step)
        while True:
            started = time.perf_counter()
            with explain_out_of_memory(self.device, loader.batch_size):
                batch = next(batches, None)
            fetched = time.perf_counter()
            n_own = 0 if batch is None else len(batch[0])
            n_all = self.pause(state, n_own)
            if batch is None:
                break
            resumed = time.perf_counter()
            state.lr = learning_rate_at(state.step, state.n_steps, state.warmup_steps, state.config.learning_rate,
                                        state.config.schedule)
            if n_all:
                torch.manual_seed(mix_seed(state.config.seed, state.step, self.rank))
                with (explain_out_of_memory(self.device, n_own, state.config.grad_accum_steps, training=True),
                      replaced_forwards(self.recomputed)):
                    self.step(batch, n_all, state)
            state.step, state.batch = state.step + 1, state.batch + 1
            bar.update()
            if state.step % 10 == 0 and not bar.disable and state.metrics.n:
                values = {f"train_{name}": value for name, value in state.metrics.compute().items()}
                speed = state.metrics.n / (state.seconds + time.perf_counter() - resumed)
                bar.set_postfix_str(f"epoch {len(state.history['lr']) + 1}, {self.objective.describe(values)}, "
                                    f"{speed:.0f} images/s", refresh=False)
            state.data_seconds += fetched - started
            state.seconds += fetched - started + time.perf_counter() - resumed
        started = time.perf_counter()
        state.check_finite()  # waits for the GPU: that belongs to the time of the training
        state.seconds += time.perf_counter() - started

    def step(self, batch, n_all, state):
        """One step of the optimiser on this process's shard of a batch of n_all images.

        The gradient is that of the mean loss over all n_all: each part's loss counts by its images.
        """
        state.optimizer.zero_grad(set_to_none=True)
        n_own, total = len(batch[0]), 0.0
        if n_own == 0:  # nothing to learn from, but the other processes wait for this one's gradients
            batch = tuple(tensor.new_zeros(1, *tensor.shape[1:]) for tensor in batch)
            self.model.eval()  # a made-up image leaves no trace in batch statistics
        size = math.ceil(len(batch[0]) / state.config.grad_accum_steps)
        parts = list(zip(*(tensor.split(size) for tensor in batch), strict=True))
        for i, (images, *targets) in enumerate(parts):
            last = i == len(parts) - 1
            part = (state.resized(images), *targets)
            with nullcontext() if last or self.world_size == 1 else self.parallel.no_sync():
                loss = self.objective(state.forward, part, state.metrics if n_own else None)
                share = (len(images) if n_own else 0) * self.world_size / n_all
                state.scaler.scale(loss * share).backward()
            total += loss.detach() * share
        if n_own == 0:
            _set_train_mode(self.model)
        state.scaler.unscale_(state.optimizer)  # clip true gradients, not scaled ones
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), state.config.clip_norm)
        state.track_finite(norm.isfinite() & total.isfinite())
        if self.device.type == "cpu" or state.step % CHECK_EVERY == 0:
            state.check_finite()
        for group in state.optimizer.param_groups:
            group["lr"] = state.lr * group["lr_scale"]
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.average is not None:
            update_average(state.average, self.model, state.step, state.config.ema_decay)

    def pause(self, state, n_own=0):
        """Between two batches: stops or saves on all processes if one of them wants to. Returns how many images all
        processes have in their next batch, given this one's."""
        stop = any([callback.on_batch(state) for callback in self.callbacks])  # a list: all of them are called
        due = self.rank == 0 and time.perf_counter() - self.saved_at >= state.config.save_every
        n_all, stops, saves = self.all_reduce_sum(n_own, stop, due and state.is_finite())
        if stops or saves:
            metrics = state.metrics.merge()
        if stops:
            state.metrics = metrics
            raise Stopped(state)
        if saves:
            state.metrics = metrics if self.rank == 0 else self.objective.new_metrics(self.device, True)
            for callback in self.callbacks:
                callback.on_save(state)
            self.saved_at = time.perf_counter()
        return int(n_all)

    def end_epoch(self, val_loader, state):
        """Evaluates, and adds the epoch to the history."""
        metrics = state.metrics.merge()
        if not metrics.n:
            raise InputError("the training loader gave no images; expected at least one batch")
        values = {f"train_{name}": value for name, value in metrics.compute().items()}
        if val_loader is not None:
            val = self.evaluate(val_loader, state.average, state)
            if not math.isfinite(val["loss"]):
                raise NotFinite(f"the validation loss is {val['loss']} after step {state.step} of {state.n_steps}, "
                                f"learning rate {state.lr:.3g}; try a lower learning rate or a longer warm-up")
            values |= {f"val_{name}": value for name, value in val.items()}
        values |= dict(lr=state.lr, seconds=state.seconds, images_per_second=metrics.n / state.seconds)
        for name, column in state.history.items():
            column.append(values.get(name, math.nan))
        state.batch, state.seconds, state.metrics = 0, 0.0, self.objective.new_metrics(self.device, True)

    @torch.no_grad()
    def evaluate(self, loader, model=None, state=None):
        """A loader's images in eval mode, each counted once: what the objective's metrics compute. For classification
        that is dict(loss, acc, balanced_acc, correct, n), accuracies from 0 to 1; the balanced one is the mean of those
        of the classes that have images.

        model: None: the Trainer's own; another one must be on its device. state: of the training that this is part of.
        """
        model = self.model if model is None else model
        loader = self.own_loader(loader)
        if self.world_size > 1:
            for buffer in model.buffers():  # batch statistics are those of the first process everywhere
                dist.broadcast(buffer, 0)
        metrics = self.objective.new_metrics(self.device)
        forward = InPrecision(model, self.device, self.dtype, dtype_of(model))
        with evaluating(model), evaluating(self.objective):
            for batch in loader:
                if state is not None:
                    self.pause(state)
                if len(batch[0]):
                    with explain_out_of_memory(self.device, len(batch[0])):
                        self.objective(forward, batch, metrics)
        metrics = metrics.merge()
        if not metrics.n:
            raise InputError("the loader gave no images to evaluate; expected at least one batch")
        return metrics.compute()

    def batch_split_warning(self):
        """A warning where this training differs from one process with whole batches; "" where it does not."""
        n_parts = self.config.grad_accum_steps
        if self.world_size == 1 and n_parts == 1:
            return ""
        modules = list(self.model.modules())
        reasons = []
        if any(isinstance(module, _BatchNorm) for module in modules):
            reasons.append("batch statistics are taken of each part alone")
        rates = [module.p for module in modules if isinstance(module, _DropoutNd)]
        if any(rates + [getattr(module, "rate", 0) for module in modules if type(module).__name__ == "DropPath"]):
            reasons.append("dropout is drawn for each part")
        if self.objective.mixing is not None:
            reasons.append("images are mixed within each part")
        if self.dtype is not None:
            reasons.append(f"sums in {str(self.dtype).removeprefix('torch.')} are rounded part by part")
        ways = [f"over {self.world_size} processes"] * (self.world_size > 1) + [f"in {n_parts} parts"] * (n_parts > 1)
        split = f"batches split {' and '.join(ways)}"
        return f"{split}: the losses will not be those of whole batches, as {'; '.join(reasons)}" if reasons else ""

    def layers(self, grad_checkpointing):
        """The layers that are computed again in the backward pass. Raises InputError for a model that names none."""
        if not grad_checkpointing:
            return []
        try:
            return adapt(self.model).layers
        except InputError as error:
            raise InputError(f"grad_checkpointing needs a model whose layers are known: {error}") from None

    def own_loader(self, batches):
        """The batches as a Loader, with this process's shard of each on its device."""
        loader = as_loader(batches, self.objective.check)
        loader.to(self.device)
        loader.set_shard(self.rank, self.world_size)
        return loader

    def all_reduce_sum(self, *numbers):
        """Each number summed over the processes, whose group needs gloo beside nccl: "cpu:gloo,cuda:nccl"."""
        if self.world_size == 1:
            return numbers
        numbers = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(numbers)
        return numbers.tolist()


class TrainState:
    """Where a training stands: model, optimiser, scaler, average and counters.

    config    the TrainConfig of the run of n_steps steps, with a rising learning rate in the first warmup_steps
    forward   the model as the objective calls it
    step      steps done; `batch` of them in the epoch that is not finished
    history   of the finished epochs; metrics, seconds: of the unfinished one
    lr        the learning rate of the last step
    """

    def __init__(self, trainer, config, batches_per_epoch):
        self.model, self.config, self.first = trainer.model, config, trainer.rank == 0
        self.n_steps, self.warmup_steps = config.count_steps(batches_per_epoch)
        self.forward = None
        self.optimizer = make_optimizer(config.optimizer, self.model, config.weight_decay, config.lr_scales)
        self.scaler = torch.amp.GradScaler(trainer.device.type, enabled=trainer.dtype == torch.float16)
        self.average = None if config.ema_decay is None else copy.deepcopy(self.model).requires_grad_(False)
        self.history = {name: [] for name in (*trainer.objective.columns, "lr", "seconds", "images_per_second")}
        self.metrics = trainer.objective.new_metrics(trainer.device, skip_nonfinite=True)
        self.first_nonfinite_step = torch.tensor(-1, device=trainer.device)  # -1: all is finite
        self.step, self.batch, self.lr, self.seconds, self.data_seconds = 0, 0, 0.0, 0.0, 0.0

    @property
    def trained(self):
        """The module that is evaluated and kept: the average of the weights where there is one, else the model."""
        return self.model if self.average is None else self.average

    def resized(self, images):
        """images (B, C, height, width) at the size of the next step."""
        size = tuple(images.shape[2:])
        wanted = self.config.image_size(size, self.step, self.n_steps)
        return images if wanted == size else F.interpolate(images, wanted, mode="bilinear", antialias=True)

    def state_dict(self):
        """Plain tensors, numbers and text, on the CPU."""
        counters = {name: getattr(self, name) for name in ("step", "batch", "lr", "seconds", "data_seconds")}
        average = None if self.average is None else self.average.state_dict()
        return on_cpu(dict(counters, seed=self.config.seed, model=self.model.state_dict(), average=average,
                           metrics=self.metrics.state_dict(), optimizer=self.optimizer.state_dict(),
                           scaler=self.scaler.state_dict(), history=copy.deepcopy(self.history)))

    def load_state_dict(self, entries):
        """Takes entries of older versions too. Raises InputError for those of another model or optimiser."""
        entries = {OLD_NAMES["training"].get(name, name): value for name, value in entries.items()}
        try:
            if (entries["average"] is None) != (self.average is None):
                raise ValueError("of one and not of the other an average was kept")
            self.model.load_state_dict(entries["model"])
            if self.average is not None:
                self.average.load_state_dict(entries["average"])
            optimizer = renamed(entries["optimizer"], "optimizer")
            self.optimizer.load_state_dict(copy.deepcopy(optimizer))  # it would take the tensors themselves
            self.scaler.load_state_dict(entries["scaler"])
            if self.first:  # the processes' metrics are added up, and these are of all of them
                self.metrics.load_state_dict(entries["metrics"])
            self.history = {name: list(entries["history"][name]) for name in self.history}
            for name in ("step", "batch", "lr", "seconds", "data_seconds"):
                setattr(self, name, entries[name])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"the training state does not fit this training ({' '.join(str(error).split())[:200]}); "
                             f"resume with the arguments that it was saved from") from error

    def track_finite(self, finite):
        """Notes the step since which something is not finite. With a scaler, which skips such steps, a finite step
        clears the note."""
        kept = torch.where(self.first_nonfinite_step >= 0, self.first_nonfinite_step, self.step)
        clear = -1 if self.scaler.is_enabled() else self.first_nonfinite_step
        self.first_nonfinite_step = torch.where(finite, clear, kept)

    def is_finite(self):
        return self.first_nonfinite_step.item() < 0

    def check_finite(self):
        """Raises NotFinite where loss or gradient were not finite, unless the scaler may still recover."""
        if self.is_finite() or (self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            return
        step = self.first_nonfinite_step.item()
        advice = "try a lower learning rate or a longer warm-up" if step else \
            "no step was made before, so look at the model's weights and at what it computes"
        raise NotFinite(f"loss or gradient are not finite since step {step + 1} of {self.n_steps}, learning rate "
                        f"{self.lr:.3g}; {advice}")


class InPrecision:
    """A model as an objective calls it: computed under autocast to dtype (None: as it is), from inputs in
    input_dtype, that of its weights; its output, or the logits in it, in float32."""

    def __init__(self, model, device, dtype, input_dtype):
        self.model, self.device_type, self.dtype, self.input_dtype = model, device.type, dtype, input_dtype

    def __call__(self, *inputs):
        inputs = [one.to(self.input_dtype) if one.is_floating_point() else one for one in inputs]
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            output = logits_of(self.model(*inputs))
        if isinstance(output, tuple):
            return tuple(at_least_float32(one) if isinstance(one, torch.Tensor) else one for one in output)
        return output.float() if isinstance(output, torch.Tensor) else output


def trainable(model):
    """The model inside torch's wrappers. Raises InputError for one that cannot be trained, or not in this way."""
    n = len(getattr(model, "device_ids", None) or ())
    if n > 1:
        raise InputError(f"the model is in a DataParallel over {n} GPUs; expected the model itself, and a process for "
                         f"each GPU: torchrun --nproc-per-node={n}")
    model = unwrapped(model)
    device_of(model)  # which refuses one on the device "meta"
    if is_quantised(model):
        raise InputError(f"this {class_name(model)} is quantised, and weights of whole numbers do not learn; train the "
                         f"model that it was made from, and quantise it afterwards")
    if dtype_of(model) == torch.float16:
        raise InputError(f"the weights of this {class_name(model)} are float16, too coarse for an optimiser's steps; "
                         f"train model.float(), and compute in float16 with amp='fp16'")
    return model


def compiled_part(model):
    """The wrapper of torch.compile among those of a model, or None."""
    inside = unwrapped(model)
    while model is not inside:
        if "_orig_mod" in model._modules:
            return model
        model = model.module
    return None


def _set_train_mode(model):
    """model.train(), but modules that are wholly frozen stay in eval mode: no dropout there, batch statistics kept. If
    only the last layer is trained, so do layers without parameters, such as the dropout after the positions."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
    own, layers = list(model.parameters(recurse=False)), [list(child.parameters()) for child in model.children()]
    before_head = [*own, *chain(*list(filter(None, layers))[:-1])]
    if before_head and not any(p.requires_grad for p in before_head):
        for child, parameters in zip(model.children(), layers, strict=True):
            if not parameters:
                child.eval()


def steps_within(seconds, model, train_loader, val_loader, device="auto", objective=None, config=None, **overrides):
    """How many steps, with an evaluation after every epoch, fill this many seconds: measured on a copy of the model.

    The other arguments are the Trainer's. The measurement counts too: it takes about 3% of the time, or two steps and
    one batch of an evaluation where those take longer. Of several processes each must give the same `seconds`.
    """
    started = time.perf_counter()
    n_train, n_val = (n_batches(as_loader(one), "a number of steps in place of a time")
                      for one in (train_loader, val_loader))
    config = replace(config or TrainConfig(), **overrides | dict(learning_rate=1e-6, save_every=math.inf))
    trial = Trainer(copy.deepcopy(model), device, objective, config)
    trial.train(train_loader, n_steps=1, progress=False)  # the first step is slower: memory, kernels, workers
    parts = [(1.0, None)]  # fractions of the steps, and how they resize
    if config.progressive_resize is not None:
        scale, share = config.progressive_resize
        parts = [(share, (scale, 1.0)), (1 - share, None)]
    step_seconds = 0.0
    for share, resize in parts:
        n_trial, trial_seconds = 0, 0.0
        while trial_seconds < max(1.0, 0.02 * seconds) / len(parts):
            history = trial.train(train_loader, n_steps=max(1, n_trial), progressive_resize=resize, progress=False)
            n_trial += max(1, n_trial)
            # so that all processes decide alike
            trial_seconds += trial.all_reduce_sum(sum(history["seconds"]))[0] / trial.world_size
        step_seconds += share * trial_seconds / n_trial
    eval_started = time.perf_counter()
    val_batches = as_loader(val_loader, trial.objective.check).to(trial.device)
    batches = list(itertools.islice(val_batches, 4 if step_seconds < 0.01 * seconds else 1))
    trial.evaluate(batches)
    epoch_seconds = (time.perf_counter() - eval_started) * n_val / len(batches)
    left = max(0.0, seconds - (time.perf_counter() - started))
    epochs, rest = divmod(left, n_train * step_seconds + epoch_seconds)
    n_steps = max(1, int(epochs) * n_train + int(max(0.0, rest - epoch_seconds) / step_seconds))
    return int(trial.all_reduce_sum(n_steps if trial.rank == 0 else 0)[0])


# ---- A training run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A training that is ready to start. Of several processes all compute, and only the first writes.

    options          as parse() gives them; of a resumed run those that it began with
    device           to compute on
    folder, lock     where the results go; the open lock keeps other runs out
    data             arguments of get_data_loaders, for the test images too
    train_loader, val_loader   of the images
    name, recipe     of the model; how it is trained, with what the options override
    model, trained   the whole model; the part that is trained, which is all of it or its head
    loaders          what `trained` is trained and evaluated on: the images, or features of them
    trainer          of `trained`
    entries          further entries of last.pt: options, n_steps, command, ...
    resume           the training state of a resumed run, or None
    """
    options: argparse.Namespace
    device: torch.device
    folder: Path
    lock: object
    data: dict
    train_loader: Loader
    val_loader: Loader
    name: str
    recipe: Recipe
    model: nn.Module
    trained: nn.Module
    loaders: tuple
    trainer: Trainer
    entries: dict
    resume: dict | None


def train(options):
    """One run, from the images to result.json. Returns what is in result.json, on the first process.

    The folder gets config.json, history.csv, result.json, best.pt, last.pt, curves.png and, if the model has attention,
    attention.png. vit_bridge.weights.checkpoints.load opens the checkpoints.

    options: as parse() gives them.
    """
    with processes(device_to_resume(options)) as device, Interrupts() as interrupts:
        folder, lock, saved = _open_run(options)
        known = {name: value for name, value in vars(options).items() if name != "given"}
        if saved:
            known = options_to_resume(options.given, _of_any_version(saved["options"]))
            if result := broadcast_object(_complete_result(folder)):
                print(f"The run is complete; its results are in {folder}/result.json.")
                return result
            print(f"Going on with {folder}.")
        run = prepare(argparse.Namespace(**known), device, folder, lock, saved)
        history, seconds = fit(run, interrupts)
        return finish(run, history, seconds)


def _open_run(options):
    """(folder, its lock, what read_run() gives of it) of the run that --resume names; None for each without
    --resume."""
    if not options.resume:
        return None, None, None
    folder = lock = None
    if process_number() == 0:
        folder = folder_to_resume(options.resume, options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    folder = broadcast_object(folder)
    return folder, lock, read_run(folder)


def prepare(options, device, folder=None, lock=None, saved=None):
    """Images, recipe, model, folder, Trainer and the number of steps, as a Run. folder, lock, saved: from _open_run."""
    started = time.perf_counter()
    if options.output_dir and not folder and holds_run(Path(options.output_dir)):
        raise InputError(f"--output-dir {options.output_dir} already holds files of a run; go on with that by "
                         f"--resume {options.output_dir}, or choose a new folder")
    if options.compile:
        check_compiler(device.type)
    torch.manual_seed(options.seed)
    start = _pretrained_model(options, folder, saved) if options.pretrained else None
    data = _data_arguments(options, start)
    train_loader, val_loader = load_data(data)
    if train_loader.dataset_name == "folder" and process_number() == 0 and not saved:
        print(audit_folder(options.data_dir, options.val_fraction, options.seed), flush=True)
    name = _model_name(options, max(train_loader.size))
    recipe = _choose_run_recipe(options, saved, name, train_loader, device)
    data["batch_size"] = train_loader.batch_size = val_loader.batch_size = recipe.batch_size
    train_loader.set_augmentation(recipe.augmentation)
    if isinstance(train_loader, MemoryLoader):
        recipe = replace(recipe, augmentation=train_loader.augmentation)  # digits are never mirrored
    files = dict(validation_files=_fingerprint(val_loader), training_files=_fingerprint(train_loader),
                 test_files=_test_fingerprint(data))
    if options.dry_run:
        val_loader = val_loader.without_augmentation(2 * recipe.batch_size)
    class_names = train_loader.class_names
    model = start
    if start is None:
        model = new_model(name, recipe, train_loader)
    else:
        print(fit_head(start, class_names))
    if recipe.train.progressive_resize:
        model.any_size = True
    if saved:
        for change in changes_since(saved, class_names, train_loader.n_images, n_processes(), **files):
            print(f"Warning: {change}.")
    if process_number() == 0 and not folder:
        folder = new_output_dir(options.output_dir, name, train_loader.dataset_name)
        lock = lock_folder(folder)
    folder = broadcast_object(folder)
    loaders, trained = (train_loader, val_loader), model
    if options.freeze_backbone:
        loaders, trained = feature_loaders(freeze_backbone(model), loaders, device), model.head
    trainer = _make_trainer(options, recipe, model, trained, train_loader, device)
    _describe_run(options, name, recipe, model, train_loader, val_loader, trainer)
    spent = broadcast_object(time.perf_counter() - started) if options.freeze_backbone else 0.0  # on the features
    n_steps = saved["n_steps"] if saved else _count_steps(options, trainer, loaders, spent)
    entries = dict(options=_lasting(options), n_steps=n_steps, n_images=train_loader.n_images,
                   command=_command_of(vars(options), n_steps), n_processes=n_processes(),
                   recipe=asdict(recipe), **files)
    print(f"{n_steps} steps, {n_steps / len(loaders[0]):.1f} epochs; the same run again: {entries['command']}")
    if process_number() == 0:
        write_json(dict(entries, model=name, model_config=vars(model.config), class_names=class_names),
                   folder / CONFIG)
    return Run(options, device, folder, lock, data, train_loader, val_loader, name, recipe, model, trained, loaders,
               trainer, entries, saved and saved.get("training"))


def _lasting(options):
    """The options as a dict, with the folder of the images as it is found from another folder too."""
    data_dir = Path(options.data_dir).expanduser()
    return dict(vars(options), data_dir=str(data_dir.resolve()) if data_dir.exists() else options.data_dir)


# ---- Images and model


def chosen(options, *names):
    """The options of these names that are given, as arguments."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _data_arguments(options, start):
    """Arguments of get_data_loaders; images get the preprocessing of the pretrained model, if there is one."""
    data = dict(data_dir=options.data_dir, img_size=options.img_size, dataset=options.dataset,
                in_channels=options.in_channels, val_fraction=options.val_fraction, seed=options.seed,
                workers=options.num_workers, skip_corrupt=options.skip_corrupt)
    if options.dry_run and choose_set(options.data_dir, options.dataset, None) == "shapes":
        data["n_images"] = 600
    if start is not None:
        shown = adapt(start).preprocessing
        data |= dict(img_size=shown.img_size, preprocessing=shown)
    return data


def load_data(data):
    """(training loader, validation loader). The first process goes first, as there may be something to download."""
    first, one_by_one = process_number() == 0, choose_set(data["data_dir"], data["dataset"], None) in TORCHVISION_SETS
    if one_by_one and not first:
        broadcast_object(None)
    loaders = get_data_loaders(**data)
    if one_by_one and first:
        broadcast_object(None)
    return loaders


def _pretrained_model(options, folder, saved):
    """The model to start from; that of a resumed run is in its last.pt, wherever it came from."""
    if saved and "training" in saved:
        return load(folder / LAST)
    return load(options.pretrained, **chosen(options, "img_size", "in_channels", "drop_path", "n_heads",
                                              "class_names"))


def _model_name(options, img_size):
    """What the model is called: its name in MODELS, or that of the pretrained one's file or run."""
    if not options.pretrained:
        return options.model or ("vit_nano" if img_size <= SMALL_SIDE else "vit_tiny")
    path = Path(options.pretrained)
    return path.parent.name or "best" if path.name in (BEST, LAST) else path.stem


def new_model(name, recipe, train_loader):
    """A model for the loader's images and classes, its first layer whitened where the recipe says so."""
    model = build_model(name, n_classes=len(train_loader.class_names), img_size=train_loader.img_size,
                        in_channels=train_loader.preprocessing.n_channels, **recipe.model_options)
    if recipe.whiten and model.whitening_layer() is not None:
        whiten_first_layer(model, first_images(train_loader, WHITENED_BY))
    return model


def first_images(loader, n_images):
    """At least n_images images of a training loader, if it has as many, as a model will see them: (B, C, H, W)."""
    loader.set_position(0)
    return torch.cat([images for images, _ in itertools.islice(loader, -(-n_images // loader.batch_size))])


# ---- Recipe, Trainer and steps


def _choose_run_recipe(options, saved, name, train_loader, device):
    """The recipe of a resumed run; for a new run the one asked for, or the one for these images and minutes, with what
    the options override."""
    if saved and "recipe" in saved:
        return Recipe.from_dict(saved["recipe"])
    size = train_loader.size
    if not options.recipe:
        kind = "head" if options.freeze_backbone else "pretrained" if options.pretrained else "new"
        precision = choose_precision(options.amp, device)
        options.recipe = choose_recipe(name, train_loader.img_size, _budget(options), kind, precision)
    check_choice("recipe", options.recipe, RECIPES)
    recipe = RECIPES[options.recipe]
    if recipe.model not in (None, name) and not options.pretrained:
        raise InputError(f"--recipe {options.recipe} is for --model {recipe.model}, and the model is {name}; give "
                         f"both, or another recipe")
    if min(size) < recipe.smallest:
        raise InputError(f"--recipe {options.recipe} needs images of at least {recipe.smallest} pixels, these have "
                         f"{min(size)}; choose a larger --img-size or another recipe")
    pixels = chosen(options, "shift", "flip", "cutout")
    if pixels and not isinstance(train_loader, MemoryLoader):
        raise InputError(f"--{next(iter(pixels))} is for small images in memory; those of more than {SMALL_SIDE} "
                         f"pixels are cropped, flipped and recoloured as they are read: leave it out, or give "
                         f"--img-size {SMALL_SIDE}")
    train = chosen(options, "optimizer", "weight_decay", "schedule")
    if options.lr is not None:
        train["learning_rate"] = options.lr
    if options.model_ema is not None:
        train["ema_decay"] = options.model_ema
    recipe = replace(recipe, train=replace(recipe.train, **train),
                     augmentation=replace(recipe.augmentation, **pixels),
                     model_options=recipe.model_options | chosen(options, "patch_size", "drop_path"),
                     **chosen(options, "batch_size", "label_smoothing", "mixing"))
    if options.pretrained:  # which is a model already
        recipe = replace(recipe, model_options={}, whiten=False)
    if options.freeze_backbone:  # its features are computed once, of each image as it is
        recipe = replace(recipe, train=replace(recipe.train, progressive_resize=None), mixing="none",
                         augmentation=Augmentation(0.0, "none"))
    return recipe


def _make_trainer(options, recipe, model, trained, train_loader, device):
    """The Trainer of a run: the recipe, with the precision and the grad_accum_steps of the options."""
    weights = balancing_weights(train_loader.class_counts) if options.class_weights else None
    mixing = None if recipe.mixing == "none" else Mixing(recipe.mixing, len(train_loader.class_names))
    config = replace(recipe.train, seed=options.seed, **chosen(options, "warmup_epochs"),
                     resize_multiple=max(pair(getattr(model.config, "patch_size", 4))),
                     lr_scales=layer_lr_scales(trained, options.layer_decay) if options.layer_decay else None,
                     grad_accum_steps=options.grad_accum_steps, amp=options.amp, compile=options.compile,
                     grad_checkpointing=options.grad_checkpointing,
                     save_every=60 * options.save_minutes)
    return Trainer(trained, device, Classification(recipe.label_smoothing, weights, mixing), config)


def _budget(options):
    """In minutes; None if the length is given in epochs or steps."""
    in_steps = options.epochs or options.steps or (options.freeze_backbone and not options.minutes)
    return None if in_steps else options.minutes or MINUTES


def _count_steps(options, trainer, loaders, spent):
    """The number of steps of a new run. spent: seconds of its minutes that are used already."""
    if options.dry_run:
        return 2
    minutes = _budget(options)
    if minutes is None:
        return options.steps or (options.epochs or HEAD_EPOCHS) * len(loaders[0])
    print(f"Measuring the speed, for the number of steps in {minutes:g} minutes of training and validation ...",
          flush=True)
    n_steps = steps_within(max(1.0, 60 * minutes - spent), trainer.model, *loaders, trainer.device, trainer.objective,
                           trainer.config)
    if n_steps < len(loaders[0]):
        print(f"Warning: {minutes:g} minutes are too few to see each image once ({n_steps} of {len(loaders[0])} "
              f"steps); a smaller --img-size or model, or more minutes, would help.")
    return n_steps


def _describe_run(options, name, recipe, model, train, val, trainer):
    """Prints what is trained on what, with warnings. train, val: the loaders of the images."""
    frozen = f", {count_parameters(trainer.model):,} of them trained" if options.freeze_backbone else ""
    print(f"{name}: {count_parameters(model):,} parameters{frozen}; {train.dataset_name}: "
          f"{train.n_images:,} training and {val.n_images:,} validation images of {_describe_images(train)}, "
          f"{len(train.class_names)} classes; {trainer.device}, {trainer.dtype or torch.float32}")
    print(f"Recipe {options.recipe}: {recipe.describe(isinstance(train, MemoryLoader))}")
    if text := _unevenness(train.class_names, train.class_counts):
        weighted = "--class-weights lets them count alike" if options.class_weights else \
            "look at the balanced accuracy; --class-weights would let all classes count alike"
        print(f"{text}: {weighted}.")
    if text := trainer.batch_split_warning():
        print(f"Warning: {text}.")


def _describe_images(loader):
    """Size and channels of a loader's images in words: "32 pixels", "96x160 pixels and 1 channel"."""
    n = loader.preprocessing.n_channels
    return f"{describe_size(loader.img_size)} pixels" + ("" if n == 3 else f" and {n} channel{'s' * (n > 1)}")


def _unevenness(class_names, class_counts):
    """A warning about how many images the classes have, if they differ much; else ""."""
    by_size = sorted(zip(class_counts, class_names, strict=True), reverse=True)
    if by_size[0][0] < UNEVEN * by_size[-1][0]:
        return ""
    shown = by_size if len(by_size) <= 10 else [*by_size[:5], *by_size[-5:]]
    return "Classes differ in size: " + ", ".join(f"{name} {n:,}" for n, name in shown) \
        + (f" (the largest and smallest of {len(by_size)})" if len(by_size) > 10 else "")


# ---- The training itself


class StopOnSignal(Callback):
    """Stops the training between two batches once Ctrl-C or SIGTERM was caught."""

    def __init__(self, interrupts):
        self.interrupts = interrupts

    def on_batch(self, state):
        return self.interrupts.caught is not None


def fit(run, interrupts):
    """(history, seconds of the run) of the training. Raises Interrupted, with the command to go on, where a signal
    stopped it."""
    saver, n_steps = None, run.entries["n_steps"]
    if process_number() == 0:
        saver = Saver(run.folder, run.model, run.train_loader.preprocessing, run.entries, run.trainer.objective,
                      run.options.freeze_backbone, run.resume)
    go_on = command("--resume", run.folder)
    interrupts.held = True
    try:
        history = run.trainer.train(*run.loaders, n_steps=n_steps, resume=run.resume, progress=sys.stderr.isatty(),
                                    callbacks=[StopOnSignal(interrupts), *filter(None, [saver])])
    except Stopped as stop:
        kept = stop.state.is_finite() or stop.state.scaler.is_enabled()  # a scaler skips steps that are not
        if saver and kept:
            saver.on_save(stop.state)
        broadcast_object(None)  # where one process ends the launcher ends the others: not before all is written
        text = f"kept at step {stop.state.step} of {n_steps}; go on with: {go_on}"
        raise Interrupted(interrupts.caught or signal.SIGTERM,
                          text if kept else "loss or gradient were no longer finite, so this state was not kept; "
                                            f"go on from the one before with: {go_on}") from None
    except InputError as error:
        raise InputError(f"{error}. {_what_is_kept(error, run.folder, saver, n_steps, go_on)}") from error
    interrupts.held = False
    interrupts.advice = f"the training is done, its test is not; go on with: {go_on}"
    if interrupts.caught:
        raise Interrupted(interrupts.caught, interrupts.advice)
    broadcast_object(None)  # the first process has written best.pt
    return history, saver.elapsed if saver else 0.0


def _what_is_kept(error, folder, saver, n_steps, go_on):
    """What the run has on the disk after an error, and how to go on."""
    last = folder / LAST
    kept = f"The last good checkpoint is {last}" if last.is_file() else f"Nothing was kept yet in {folder}"
    if saver and last.is_file():
        kept += f", step {saver.saved_step} of {n_steps}"
    if isinstance(error, NotFinite):
        return kept
    parts = f" --grad-accum-steps {error.grad_accum_steps}" if isinstance(error, OutOfMemory) else ""
    return f"{kept}; go on with: {go_on}{parts}"


# ---- After the training


def finish(run, history, seconds):
    """Test, figures and result.json. Returns what is in result.json, on the first process."""
    best, first = load(run.folder / BEST), process_number() == 0
    result = _training_result(run, history, seconds)
    if first:
        write_json(result, run.folder / "result.json")  # before the test: a bad image there loses nothing
        save_figure(plot_training_curves(history), run.folder / "curves.png")
    loader, split = get_test_loader(**run.data), "test"
    if loader is not None and run.entries["test_files"] not in (None, _fingerprint(loader)):
        print(f"Warning: the test images are others than when the training began; tested on the {loader.n_images:,} "
              f"that are there now.")
    if loader is None:
        loader, split = run.val_loader, "val"
        print("There are no test images: the accuracies are those of the validation images, on which the best epoch "
              "was chosen. A linear classifier comes now, to compare with ...", flush=True)
    else:
        print("Its test comes now, and a linear classifier to compare with ...", flush=True)
    if run.options.dry_run:
        loader = loader.without_augmentation(2 * run.recipe.batch_size)
    trainer = Trainer(best, run.device, run.trainer.objective, run.trainer.config)
    score, mirrored = trainer.evaluate(loader), None
    if run.recipe.augmentation.flip != "none":
        mirrored = result[f"{split}_mirrored_acc"] = trainer.evaluate(loader, Mirrored(best))["acc"]
    skipped = [each.skipped for each in (run.train_loader, run.val_loader, loader)]
    skipped = {file for part in all_gather_object(skipped) for files in part for file in files}
    if not first:
        return None
    result |= _compare_with_linear(run, score, split, loader)
    skipped |= set(run.train_loader.skipped)
    result |= dict(skipped=len(skipped))
    report_skipped(sorted(skipped))
    draw(run, best, history, ("linear classifier", result[f"linear_{split}_acc"]))
    write_json(result, run.folder / "result.json")  # last: with it the run is complete
    if mirrored is not None:
        print(f"Each image shown mirrored too: {mirrored:.1%}.")
    print(f"{result['images_per_second']:.0f} images/s, {run.trainer.data_share:.1%} of the training time for fetching "
          f"and augmenting; {run.folder}/"
          + (" (without attention.png: this model has no attention)" if not best.attends else ""))
    return result


def _training_result(run, history, seconds):
    """The entries of result.json about the training, printed in short."""
    objective, trainer = run.trainer.objective, run.trainer
    epoch = objective.best_epoch(history)
    best = history[objective.criterion][epoch - 1]
    print(f"Trained in {seconds:.0f} s. Best {objective.criterion} {best:{objective.columns[objective.criterion]}}, "
          f"epoch {epoch} of {len(history['lr'])}.", flush=True)
    speed = sum(s * r for s, r in zip(history["seconds"], history["images_per_second"], strict=True))
    return dict(model=run.name, dataset=run.train_loader.dataset_name, seed=run.options.seed, recipe=run.options.recipe,
                minutes=_budget(run.options), n_steps=run.entries["n_steps"], parameters=count_parameters(run.model),
                val_acc=history["val_acc"][epoch - 1], seconds=round(seconds, 1),
                images_per_second=round(speed / sum(history["seconds"]), 1), data_share=round(trainer.data_share, 4),
                device=str(run.device), precision=str(trainer.dtype or torch.float32), torch=torch.__version__,
                torchvision=torchvision.__version__, command=run.entries["command"])


def _compare_with_linear(run, score, split, loader):
    """The accuracy beside a linear classifier's on the same images, printed, and as entries of the result."""
    train_loader, val_loader = run.train_loader, run.val_loader
    for each in (val_loader, loader):
        each.set_shard(0, 1)  # the first process alone computes what follows
    plain = train_loader.without_augmentation(300 if run.options.dry_run else LINEAR_IMAGES)
    linear = linear_classifier(plain, val_loader, loader if split == "test" else None)
    train_loader.skipped.update(plain.skipped)
    names, counts = train_loader.class_names, train_loader.class_counts
    chance, largest, balanced = f"guessing: {1 / len(names):.1%}", None, ""
    if _unevenness(names, counts):
        place = counts.index(max(counts))
        largest = loader.class_counts[place] / sum(loader.class_counts)
        balanced = f", balanced {score['balanced_acc']:.1%}"
        chance = f"always {names[place]}: {largest:.1%}, balanced {1 / len(names):.1%}"
    print(f"{split} accuracy {percent(score['correct'], score['n'])} of {score['n']:,} images, 95% Wilson interval"
          f"{balanced}; a linear classifier on the pixels: {linear[f'{split}_acc']:.1%}; {chance}")
    return {f"{split}_acc": score["acc"], f"{split}_correct": score["correct"], f"{split}_n": score["n"],
            f"{split}_balanced_acc": score["balanced_acc"],
            f"{split}_interval": wilson_interval(score["correct"], score["n"]),
            f"linear_{split}_acc": linear[f"{split}_acc"], f"largest_class_{split}_acc": largest}


def draw(run, model, history, baseline):
    """curves.png, and attention.png where the model has attention."""
    save_figure(plot_training_curves(history, baseline=baseline), run.folder / "curves.png")
    if model.attends:
        val_loader = run.val_loader
        apart = max(1, len(val_loader) // 4)  # folders come class by class, so take images from all of it
        batches = itertools.islice(val_loader, 0, 4 * apart, apart)
        images = [images[0] for images, _ in batches if len(images)]  # of (C, H, W)
        save_figure(visualize_attention_grid(model, torch.stack(images).cpu()), run.folder / "attention.png")


def _of_any_version(options):
    """A run's saved options, with the defaults of those that came later; of a run that is older than recipes, with the
    recipe that it had."""
    name = "fine_tuning" if options.get("pretrained") and not options.get("freeze_backbone") else "classic"
    return vars(make_parser().parse_args([])) | dict(recipe=name) | options


def _complete_result(folder):
    """The contents of a folder's result.json if the test is in it; else None."""
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    return result if result.keys() & {"linear_test_acc", "linear_val_acc"} else None


def report_skipped(files):
    """Prints which image files were left out, where there were some."""
    for file in files[:5]:
        print(f"Left out, as it cannot be read: {file}")
    if len(files) > 5:
        print(f"... and {len(files) - 5} more, {len(files)} in all.")


# ---- The arguments of a run -------------------------------------------------------------------------------


def make_parser():
    parser = OneLineParser(
        prog="train_vit.py", description="Trains a model on images.",
        epilog="train_vit.py evaluate, predict, export and inspect, each with --help, take a checkpoint.")
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", default="./data", help="a folder with a folder for each class, or a known set "
                                                           "(default: %(default)s, without which shapes are drawn)")
    data.add_argument("--dataset", default="auto", help="auto, shapes, folder, cifar10, cifar100, mnist, fashion-mnist")
    data.add_argument("--img-size", type=int_at_least(1), nargs="+", action=Size, metavar="PIXELS",
                      help="side, or height and width (default: that of the pretrained model; small images keep "
                           "theirs, else 224)")
    data.add_argument("--in-channels", type=int_at_least(1), metavar="N", help="1: grey images, 3: colour, 4: with "
                      "transparency (default: that of the pretrained model, else 3)")
    data.add_argument("--batch-size", type=int_at_least(1), help="images of a step, over all processes")
    data.add_argument("--val-fraction", type=float, default=0.1, help="cut from the training images without val/")
    data.add_argument("--num-workers", "--workers", type=int_at_least(0), help=WORKERS_HELP)
    data.add_argument("--skip-corrupt", action="store_true", help="leave out image files that cannot be read, and say "
                                                                  "how many")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help=f"one of {', '.join(MODELS)} (default: vit_nano up to 64 pixels, else vit_tiny)")
    model.add_argument("--patch-size", type=int_at_least(1), help="side in pixels (default: 4 up to 64 pixels, 8 up "
                                                                  "to 128, 16 above)")
    model.add_argument("--drop-path", type=float, help="stochastic depth of the last block (default: the model's own)")
    model.add_argument("--pretrained", metavar="NAME|PATH", help=f"start from the weights of one of "
                       f"{', '.join(PRETRAINED)}, of a checkpoint file, or of a folder that transformers or timm wrote")
    add_n_heads(model)
    add_class_names(model)
    model.add_argument("--freeze-backbone", action="store_true", help="train the head alone, on features that are "
                                                                      "computed once, without augmentation")
    model.add_argument("--layer-decay", type=Bounded(float, 0.01, 1, "0.01 to 1"), help="each layer's learning rate "
                       "is this times that of the layer after it (fine-tuning: about 0.75)")
    recipe = parser.add_argument_group("recipe", "Options you do not set come from the recipe.")
    recipe.add_argument("--recipe", help=f"one of {', '.join(RECIPES)} (default: chosen by model, image size and "
                                         f"minutes, and printed)")
    recipe.add_argument("--optimizer", choices=OPTIMIZERS)
    recipe.add_argument("--lr", type=positive(), help="the peak of the learning rate")
    recipe.add_argument("--weight-decay", type=Bounded(float, 0, sys.float_info.max, "0 or more"))
    recipe.add_argument("--schedule", choices=SCHEDULES, help="how the learning rate falls")
    recipe.add_argument("--warmup-epochs", type=Bounded(float, 0, sys.float_info.max, "0 or more"),
                        help="(default: a twentieth of the run)")
    recipe.add_argument("--label-smoothing", type=Bounded(float, 0, 1, "0 to 1"))
    recipe.add_argument("--shift", type=Bounded(float, 0, 0.5, "0 to 0.5"), help="fraction of the side by which small "
                                                                                 "images are shifted at most")
    recipe.add_argument("--flip", choices=FLIPS, help="how small images are mirrored")
    recipe.add_argument("--cutout", type=Bounded(float, 0, 2, "a share of the image's side, 0 to 2: 0.25 is 8 of 32 "
                                                              "pixels"),
                        help="side of a hidden square, as a fraction of that of a small image")
    recipe.add_argument("--mixing", choices=MIXINGS, help="two images in one")
    recipe.add_argument("--model-ema", type=Bounded(float, 0, 1, "0 to 1"), nargs="?", const=0.999, metavar="DECAY",
                        help="keep a moving average of the weights, and evaluate that (decay without a number: 0.999)")
    run = parser.add_argument_group("run")
    length = run.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int_at_least(1))
    length.add_argument("--steps", type=int_at_least(1))
    length.add_argument("--minutes", type=positive(), help="measures the speed, then fixes the number of steps "
                                                           "(default: 2 minutes; with --freeze-backbone 100 epochs)")
    run.add_argument("--class-weights", action="store_true", help="let every class count alike, however many images it "
                     "has; the best epoch is then that of the best balanced accuracy")
    run.add_argument("--grad-accum-steps", "--accumulate", type=int_at_least(1), default=1, help="parts in which a "
                     "batch goes through the model, for less memory (default: %(default)s)")
    run.add_argument("--seed", type=seed(), default=0)
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    run.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="mixed precision")
    run.add_argument("--compile", action="store_true", help="train through torch.compile")
    run.add_argument("--grad-checkpointing", action="store_true", help="keep no activations inside the layers: the "
                     "backward pass computes them again, in less memory and about a third more time")
    run.add_argument("--output-dir", help="a new folder for this run (default: runs/<model>-<data>-<n>)")
    run.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="go on with the run in this folder, "
                     "exactly where it was cut; alone, with the one in --output-dir, begun where there is none")
    run.add_argument("--save-minutes", type=positive(), default=3, help="between two writings of last.pt inside an "
                                                                        "epoch (default: %(default)s)")
    run.add_argument("--dry-run", action="store_true", help="two steps of everything; without --output-dir nothing "
                                                            "is kept")
    return parser


def parse(argv=None):
    """The options of a training; its field `given` holds those from the command line, by name."""
    options = make_parser().parse_args(argv)
    unset = object()
    blank = argparse.Namespace(**dict.fromkeys(vars(options), unset))
    words = vars(make_parser().parse_args(argv, blank))
    options.given = {name: value for name, value in words.items() if value is not unset}
    if options.recipe:
        check_choice("recipe", options.recipe, tuple(RECIPES))
    if options.resume and options.dry_run:
        raise InputError("--dry-run is a run of its own and cannot go on with another; leave out --resume")
    if options.freeze_backbone and options.layer_decay:
        raise InputError("--layer-decay cannot be combined with --freeze-backbone, which trains only the last layer; "
                         "leave one of them out")
    if options.freeze_backbone and not options.pretrained and not options.resume:
        raise InputError("--freeze-backbone freezes what was trained before; give --pretrained NAME or PATH too")
    if options.freeze_backbone and options.grad_checkpointing:
        raise InputError("--grad-checkpointing has nothing to compute again with --freeze-backbone, which trains only "
                         "the last layer; leave one of them out")
    for name in ("model", "patch_size"):
        if options.pretrained and getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} cannot be combined with "
                             f"--pretrained, whose model is fixed; leave it out")
    if options.n_heads and not options.pretrained and not options.resume:
        raise InputError(f"--n-heads {options.n_heads} is for the file of --pretrained, which was not given; give both")
    return options


def _as_words(options):
    """The options that differ from the defaults, as words of a command."""
    defaults, words = vars(make_parser().parse_args([])), []
    for name, value in options.items():
        if value != defaults[name]:
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def command(*words):
    """A command as one would type it, with the launcher of several processes where this is one of several."""
    start = ["python"] if n_processes() == 1 else ["torchrun", f"--nproc-per-node={n_processes()}"]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([*start, "train_vit.py", *map(str, words)])


def _command_of(options, n_steps):
    """The command that repeats a run exactly: its options, with the number of steps instead of minutes."""
    left_out = ("minutes", "epochs", "steps", "output_dir", "resume", "save_minutes", "dry_run")
    return command(*_as_words({name: value for name, value in options.items() if name not in left_out}),
                   "--steps", n_steps)


# ---- python train_vit.py evaluate -------------------------------------------------------------------------

# What kind of test the images of a loader are, by DatasetLoader.split.
SPLITS = {
    "test": "test images",
    "val": "validation images, as there are no test images: a training on this folder chose its best epoch on them",
    "held out": "validation images, held out of the training; its best epoch was chosen on them",
    "all": "images, all of the folder: a test only if the model was trained on none of them",
}


def evaluate_command(argv=None):
    parser = OneLineParser(prog="train_vit.py evaluate", description="Scores a checkpoint on a set: accuracy, "
                           "confusion matrix and the worst mistakes, printed and kept in a folder. It takes the test "
                           "images; without those the validation images; else all, but of the folder that the "
                           "checkpoint was trained on only those held out.")
    _add_checkpoint(parser)
    parser.add_argument("--data-dir", default=DEFAULT_DATA_DIR, help="as for the training: a folder with a folder for "
                        "each class, or a known set (default: %(default)s, without which shapes are drawn)")
    parser.add_argument("--dataset", default="auto", help=f"{', '.join(DATASETS)} (default: %(default)s)")
    parser.add_argument("--batch-size", type=int_at_least(1), default=64, help="(default: %(default)s)")
    _add_device(parser)
    parser.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
                        help="mixed precision (default: %(default)s)")
    parser.add_argument("--num-workers", "--workers", type=int_at_least(0), help=WORKERS_HELP)
    parser.add_argument("--skip-corrupt", action="store_true", help="leave out image files that cannot be read")
    parser.add_argument("--output-dir", help="a new folder for the results (default: runs/evaluation-<data>-<n>)")
    evaluate(parser.parse_args(argv))


def evaluate(options):
    """The evaluation of a checkpoint, from the images to result.json. Returns what is in result.json."""
    device = choose_device(options.device)
    model = load(options.checkpoint, **chosen(options, "n_heads", "class_names"))
    check_has_head(model)
    loader = _evaluation_loader(model, options)
    with unless_empty(new_output_dir(options.output_dir, "evaluation", loader.dataset_name)) as folder:
        found = score(model, loader, device, options.amp)
    print(_describe_score(found, loader))
    report_skipped(sorted(map(str, loader.skipped)))
    heading = f"accuracy {percent(found.correct, found.n)}\n{found.n:,} images"
    names = list(map(_drawable, found.class_names))
    save_figure(plot_confusion(found.confusion, names, title=heading), folder / "confusion.png")
    _write_rows(folder / "confusion.csv", ["true \\ predicted", *found.class_names],
               ([name, *counts] for name, counts in zip(found.class_names, found.confusion.tolist(), strict=True)))
    _write_mistakes(found, loader, folder)
    result = dict(checkpoint=options.checkpoint, data_dir=options.data_dir, dataset=loader.dataset_name,
                  split=loader.split, n=found.n, correct=found.correct, accuracy=found.accuracy,
                  interval=found.interval, balanced_accuracy=found.balanced_accuracy, top5=found.top5,
                  classes=[dict(name=name, n=n, correct=correct) for name, n, correct in _per_class(found)],
                  skipped=loader.skipped, device=str(device), torch=torch.__version__,
                  precision=str(choose_precision(options.amp, device) or torch.float32))
    write_json(result, folder / "result.json")
    print(f"{folder}/ has {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return result


def _evaluation_loader(model, options):
    """The images to score a model on, preprocessed as those of its training."""
    shown = adapt(model).preprocessing
    shown_as = dict(workers=options.num_workers, preprocessing=model.preprocessing, skip_corrupt=options.skip_corrupt,
                    in_channels=adapt(model).in_channels)
    images = (options.data_dir, shown.class_names, options.batch_size, shown.img_size, options.dataset)
    cut, known = _training_cut(options.checkpoint, options.data_dir)
    loader = get_evaluation_loader(*images, **shown_as, **cut)
    if loader.split == "held out" and known not in (None, _fingerprint(loader)):
        print("The images of the folder have changed since the training, so which were held out of it is unknown.")
        loader = get_evaluation_loader(*images, **shown_as)
    return loader


def _training_cut(checkpoint, data_dir):
    """(arguments of get_evaluation_loader, fingerprint of the images held out), if the checkpoint says that it was
    trained on a part of this folder; else ({}, None)."""
    entries = read_file(checkpoint) if Path(checkpoint).is_file() else {}  # a name: nothing is known of its training
    training = entries.get("options") or {}
    folders = [Path(folder).expanduser().resolve() for folder in (data_dir, training.get("data_dir", data_dir))]
    if "data_dir" not in training or folders[0] != folders[1]:
        return {}, None
    cut = {name: training[name] for name in ("val_fraction", "seed") if name in training}
    return dict(cut, held_out=True), entries.get("validation_files")


def _test_fingerprint(data):
    """The _fingerprint of the test images as they are now, without a look at them; None where there are none, or no
    files."""
    if choose_set(data["data_dir"], data["dataset"], None) != "folder":
        return None
    folder = FolderSet(data["data_dir"])
    if "test" not in folder.folders:
        return None
    return _fingerprint_of(folder.images("test", folder.class_names("train"))[0])


def _fingerprint(loader):
    """A checksum of the names of a loader's files, including those left out. None for sets that are not files."""
    return None if loader.files is None else _fingerprint_of({*map(str, loader.files), *map(str, loader.skipped)})


def _fingerprint_of(files):
    names = sorted(map(str, files))
    ends = "\n".join("/".join(Path(name).parts[-2:]) for name in names)
    return hashlib.sha256(ends.encode(errors="surrogateescape")).hexdigest()


def _describe_score(found, loader):
    """A Score in lines of text."""
    n_seen = (found.confusion.sum(dim=1) > 0).sum().item()
    lines = [f"{loader.dataset_name}: {found.n:,} {SPLITS.get(loader.split, 'images')}"]
    if loader.skipped:
        lines.append(f"left out: {len(loader.skipped)} image files that cannot be read")
    lines += [f"accuracy           {percent(found.correct, found.n)}, {found.correct:,} right; 95% Wilson interval",
              f"balanced accuracy  {found.balanced_accuracy:.1%}, the mean of the recalls of {n_seen} classes"]
    if n_seen < len(found.class_names):
        lines[-1] += f"; the other {len(found.class_names) - n_seen} have no images here"
    if found.top5 is not None:
        lines.append(f"top-5 accuracy     {found.top5:.1%}")
    places, heading = range(len(found.class_names)), "recall of each class:"
    if n_seen > 20:
        places = class_recalls(found.confusion).argsort(stable=True)[:20].tolist()  # those without images are last
        heading = "recall of the 20 classes with the lowest:"
    classes = _per_class(found)
    shown = [classes[place] for place in places if classes[place][1]]
    width = max(len(name) for name, _, _ in shown)
    return "\n".join([*lines, heading, *(f"  {name:{width}}  {correct / n:6.1%}  {correct:,} of {n:,}"
                                         for name, n, correct in shown)])


def _per_class(found):
    """(name, images, how many of them were right) for each class of a Score."""
    return list(zip(found.class_names, found.confusion.sum(dim=1).tolist(), found.confusion.diagonal().tolist(),
                    strict=True))


def _write_rows(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _write_mistakes(found, loader, folder):
    """mistakes.csv and, where there are any, mistakes.png."""
    worst, names = found.mistakes, found.class_names
    true, predicted = ([names[label] for label in labels.tolist()] for labels in (worst.labels, worst.predictions))
    probabilities = worst.probabilities.tolist()
    _write_rows(folder / "mistakes.csv", ["file", "true", "predicted", "probability"],
               zip([file or "" for file in worst.files], true, predicted, probabilities, strict=True))
    if probabilities:
        titles = list(map(_mistake_title, true, predicted, probabilities))
        heading = f"{len(titles)} of {found.n - found.correct:,} mistakes,\nthe most confident first\n(true: predicted)"
        save_figure(plot_images(worst.images, titles, columns=6, title=heading, preprocessing=loader.preprocessing),
                    folder / "mistakes.png")


def _mistake_title(true, predicted, probability):
    """'true: predicted 98%' in lines that fit above a small picture."""
    true, predicted = (textwrap.fill(_drawable(name), 14, max_lines=2, placeholder="…") for name in (true, predicted))
    return f"{true}:\n{predicted}\n{probability:.0%}"


def _drawable(name):
    """A name whose characters that the font of the figures lacks are written as U+9CE5, say."""
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return "".join(sign if font.get_char_index(ord(sign)) else f"U+{ord(sign):04X}" for sign in name)


# ---- python train_vit.py predict --------------------------------------------------------------------------


def predict_command(argv=None):
    parser = OneLineParser(prog="train_vit.py predict", description="The likeliest classes of image files, a line "
                           "each. Files that cannot be read are named on stderr; the others are predicted, and the "
                           "exit code is 2.")
    _add_checkpoint(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file, or a folder: all image files in "
                        "it, at any depth, but hidden ones")
    parser.add_argument("--top", type=int_at_least(1), default=3, help="classes to name at most (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help='print a JSON list of {"file", "predictions": [{"class", '
                        '"probability"}]} or {"file", "error"}')
    _add_device(parser)
    options = parser.parse_args(argv)
    model = load(options.checkpoint, **chosen(options, "n_heads", "class_names")).to(choose_device(options.device))
    check_has_head(model)
    files = [file for path in options.images for file in files_at(path)]
    remark_on(files)
    width, entries, n_failed = min(80, max(map(len, files))), [], 0
    for entry in _predict_files(model, files, options.top):
        if "error" in entry:
            n_failed += 1
            print(f"{parser.prog}: {entry['error']}", file=sys.stderr)
        elif not options.json:
            print(f"{entry['file']:{width}}  {_in_words(entry['predictions'])}")
        if options.json:
            entries.append(entry)
    if options.json:
        print(json.dumps(entries, indent=2))
    if n_failed:
        sys.exit(2)


def _predict_files(model, files, top):
    """Yields {"file", "predictions"} or {"file", "error"} for each of the files, which are read a batch at a time."""
    for batch in batches_of(files):
        inputs, entries = [], []
        for file in batch:
            entries.append(dict(file=file))
            try:
                inputs.append(_read_input(file, model))
            except InputError as error:
                entries[-1]["error"] = str(error)
        found = iter(ranked(model, inputs, top) if inputs else ())
        for entry in entries:
            if "error" not in entry:
                entry["predictions"] = [{"class": name, "probability": p} for name, p in next(found)]
            yield entry


def _read_input(file, model):
    """A file as the model's input, (1, 3, H, W)."""
    check_not_empty(file)
    return prepare_image(file, model)[0]


def _in_words(predictions):
    return ", ".join(f"{entry['class']} {entry['probability']:.1%}" for entry in predictions)


# ---- python train_vit.py export ---------------------------------------------------------------------------


def export_command(argv=None):
    parser = OneLineParser(prog="train_vit.py export", description="Writes a checkpoint as one ONNX file, checked "
                           "against the model, for programs without PyTorch. Needs the packages onnx and onnxscript.")
    _add_checkpoint(parser)
    parser.add_argument("--output", metavar="FILE", help="(default: the checkpoint's name with .onnx)")
    options = parser.parse_args(argv)
    path = Path(options.output or Path(options.checkpoint).with_suffix(".onnx"))
    if path.exists():
        raise InputError(f"{path} exists already; choose another name with --output, or remove it")
    model = load(options.checkpoint, **chosen(options, "n_heads", "class_names"))
    difference = export_onnx(model, path)
    height, width = pair(model.config.img_size)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; images (batch, {model.config.in_channels}, {height}, {width}) "
          f"to logits (batch, {model.config.n_classes}); largest difference from the model {difference:.1e} of the "
          f"largest logit")


# ---- python train_vit.py inspect --------------------------------------------------------------------------


def inspect_command(argv=None):
    parser = OneLineParser(prog="train_vit.py inspect", description="What a checkpoint is, and whether and how it "
                           "would load; without a file the pretrained models are listed.")
    parser.add_argument("file", nargs="?", help="a checkpoint of this project, or of timm, torchvision, transformers, "
                        "Google's npz, DeiT, DINO or MAE; or a folder that transformers or timm wrote")
    add_n_heads(parser)
    options = parser.parse_args(argv)
    if options.file in PRETRAINED and not Path(options.file).exists():
        raise InputError(f"{options.file} is the name of a pretrained model; expected a file. "
                         f"load({options.file!r}) makes that model")
    print(describe_checkpoint(options.file, **chosen(options, "n_heads")) if options.file else describe_pretrained())


# ---- What the commands share ------------------------------------------------------------------------------


def _add_checkpoint(parser):
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="as a training wrote it: best.pt; it "
                        "holds the classes, the image size and the normalisation. One of another library, and a folder "
                        "that transformers or timm wrote, will do too")
    add_n_heads(parser)
    add_class_names(parser)


def _add_device(parser):
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")


COMMANDS = dict(evaluate=evaluate_command, predict=predict_command, export=export_command,
                inspect=inspect_command)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
        return
    if argv and argv[0][:1] != "-":
        raise InputError(f"command {argv[0]!r} is unknown; expected {', '.join(COMMANDS)}, or options of a training")
    options = parse(argv)
    if options.dry_run and options.output_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            options.output_dir = folder
            train(options)
        print("Dry run: all parts ran, nothing was kept.")
    else:
        train(options)


if __name__ == "__main__":
    script(main)
