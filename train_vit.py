"""The Trainer and its training loop, and the commands built on them.

    python train_vit.py --data-dir photos --pretrained deit_tiny_patch16_224      train on a folder of images
    python train_vit.py --resume runs/NAME                                       continue an interrupted run
    python train_vit.py predict --checkpoint runs/NAME/best.pt a.jpg b.jpg        also: evaluate, export, inspect
    history = Trainer(model).train(train_loader, val_loader, n_epochs=10)        in Python

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

from visualizations import plot_images, visualize_attention_grid, visualize_reconstruction, visualize_tokens
from vit_bridge.analysis.cost import count_parameters
from vit_bridge.analysis.metrics import class_recalls, percent, wilson_interval
from vit_bridge.analysis.reconstruction import BORROWED, reconstruction_errors
from vit_bridge.cli import (
    Bounded,
    HelpFormatter,
    OneLineParser,
    Size,
    add_class_names,
    add_n_heads,
    counted,
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
    get_unlabelled_loaders,
    length_of,
    n_batches,
)
from vit_bridge.errors import InputError, check_choice, closest_names
from vit_bridge.inference import Mirrored, batches_of, check_has_head, export_onnx, predict, ranked, score
from vit_bridge.models.adapters import adapt, adapt_unlabelled
from vit_bridge.models.initialisation import whiten_first_layer
from vit_bridge.models.protocol import ask, class_name, is_ours
from vit_bridge.models.registry import MODELS, build_model
from vit_bridge.plots.charts import plot_confusion, plot_training_curves, save_figure
from vit_bridge.preprocessing import SMALL_SIDE, describe_size
from vit_bridge.runtime import (
    OutOfMemory,
    check_compiler,
    choose_device,
    choose_precision,
    device_of,
    dtype_of,
    evaluating,
    explain_out_of_memory,
    is_quantised,
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
from vit_bridge.training.linear_probe import Heads, feature_loaders, linear_classifier
from vit_bridge.training.objectives import (
    DEFAULT_DISTILLATION,
    DISTILLATIONS,
    Classification,
    Distillation,
    InPrecision,
    MaskedPixels,
    MaskedTokens,
    Objective,
    balancing_weights,
)
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
from vit_bridge.training.tokenizer import PatchTokenizer, TeacherFeatures
from vit_bridge.weights.checkpoints import describe_checkpoint, load
from vit_bridge.weights.files import read_file
from vit_bridge.weights.heads import fit_head
from vit_bridge.weights.pretrained import PRETRAINED, describe_pretrained
from vit_model import freeze_backbone, pair

__all__ = ["Trainer", "get_data_loaders", "predict"]
CHECK_EVERY = 10  # steps between checks that loss and gradient are finite; each check makes the CPU wait for the GPU


class NotFinite(InputError):
    """The loss or its gradient is no longer finite."""


class Stopped(Exception):
    """A callback stopped the training; `state` is a TrainState from which it can resume."""

    def __init__(self, state):
        super().__init__(f"stopped after step {state.step}")
        self.state = state


# ---- The Trainer ------------------------------------------------------------------------------------------


class Trainer:
    """A training loop for any module: it minimises an objective, by default cross-entropy.

    Parameters
    ----------
    model : Module
        Moved to the device. torch's wrappers are removed, but a torch.compile wrapper stays in use.
    device : str or torch.device
        "auto", "cpu", "cuda", "cuda:N" or "mps".
    objective : Objective, optional
        None: Classification, with label smoothing 0.1, for training and evaluation alike, so that the two curves can
        be compared.
    config : TrainConfig, optional
        Settings of the training.
    loss_fn : callable, optional
        (logits, labels) -> a scalar, the mean over the images; short for objective=Classification(loss_fn=loss_fn).
    **overrides
        Fields of the TrainConfig to change. Those passed to train() override both.

    Attributes
    ----------
    average : Module or None
        After train(): the model with the moving average of the weights, if config.ema_decay is set.
    data_share : float
        After train(): the fraction of the training time spent fetching and augmenting images. On CUDA this counts only
        what the CPU waited for.

    Raises
    ------
    InputError
        If the model, the device or a setting cannot be used.

    Notes
    -----
    The randomness inside a step, such as dropout, depends only on the seed and the step; the order and the augmentation
    of this project's loaders depend only on their seed and the epoch. A TrainState holds everything else. On a CPU a
    resumed run therefore ends exactly as if it had never been interrupted. An exception is a DataLoader with
    shuffle=True: it draws its order from torch's global generator, so the resumed run sees a different order.

    Under torchrun each process has its own Trainer and its shard of every batch. DistributedDataParallel averages the
    gradients, weighted so that the step equals the step of a single process with the whole batch.

    Examples
    --------
    >>> history = Trainer(model).train(train_loader, val_loader, n_epochs=10)
    """

    def __init__(self, model, device="auto", objective=None, config=None, *, loss_fn=None, **overrides):
        if objective is not None and loss_fn is not None:
            raise InputError("Trainer got an objective and a loss_fn; pass only one, because an objective has its own "
                             "loss")
        self.config = replace(config or TrainConfig(), **overrides)
        self.device = choose_device(device)
        self.dtype = choose_precision(self.config.amp, self.device)
        self.model = trainable(model).to(self.device)
        self.compiled = compiled_part(model)
        if not isinstance(objective, Objective | None):
            raise InputError(f"{type(objective).__name__} is not an Objective; pass a function of logits and labels as "
                             f"loss_fn=")
        self.objective = (objective or Classification(loss_fn=loss_fn)).to(self.device)
        self.objective.check_model(self.model)
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.parallel, self.average, self.data_share, self.recomputed = None, None, 0.0, {}
        self.callbacks, self.saved_at = (), 0.0

    def train(self, train_loader, val_loader=None, n_epochs=None, learning_rate=None, *, callbacks=(), resume=None,
              progress=True, **overrides):
        """Train the model: the learning rate rises in the warm-up and then falls, step by step.

        Parameters
        ----------
        train_loader : Loader, DataLoader or list
            Batches of images (B, C, H, W) and labels (B). With n_steps any iterable works.
        val_loader : Loader, DataLoader or list, optional
            Evaluated after every epoch. Without it the validation columns hold NaN.
        n_epochs, learning_rate, **overrides
            Fields of the TrainConfig, for this run.
        callbacks : list of Callback
        resume : dict, optional
            state_dict() of an earlier TrainState. Pass all other arguments as before; see the notes on Trainer.
        progress : bool
            Show a bar with loss, accuracy, images per second and the time left.

        Returns
        -------
        dict
            The history, {column: one value per epoch}: the objective's columns, the last learning rate ("lr"), the
            seconds spent training and the images per second.

        Raises
        ------
        InputError
            If a setting or the data cannot be used.
        NotFinite
            If the loss or its gradient becomes NaN or infinite; with fp16, if no scale of the gradient avoids it.
        OutOfMemory
            If a batch does not fit into memory.
        Stopped
            If a callback stops the training.
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
            # this copies the first process's weights to all others, so it comes before TrainState copies the average
            forward = nn.parallel.DistributedDataParallel(
                self.model, device_ids=[self.device] if self.device.type == "cuda" else None)
        self.parallel, self.dtype = forward, choose_precision(config.amp, self.device)
        self.objective.dtype = self.dtype
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
        """Train for the rest of an epoch, starting at batch state.batch."""
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
            n_all = self.pause(state, n_own)  # may save or stop here
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
        state.check_finite()  # waits for the GPU, so its time belongs to the training
        state.seconds += time.perf_counter() - started

    def step(self, batch, n_all, state):
        """Take one step of the optimiser, with this process's shard of a batch of n_all images.

        The gradient is taken of the mean loss over all n_all images: each part's loss is weighted by its images.
        """
        state.optimizer.zero_grad(set_to_none=True)
        n_own, total = len(batch[0]), 0.0
        if n_own == 0:  # no images, but the other processes wait for this process's gradients
            batch = tuple(tensor.new_zeros(1, *tensor.shape[1:]) for tensor in batch)
            self.model.eval()  # so that the dummy image does not change the statistics of batch normalisation
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
        state.scaler.unscale_(state.optimizer)  # so that the true gradient is clipped
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

    def end_epoch(self, val_loader, state):
        """Evaluate the model and add the epoch to the history."""
        metrics = state.metrics.merge()
        if not metrics.n:
            raise InputError("the training loader yielded no images; expected at least one batch")
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
        """Return the objective's metrics over all images of a loader, in eval mode.

        Parameters
        ----------
        loader : Loader, DataLoader or list
        model : Module, optional
            The model to evaluate instead of the Trainer's own, on the same device.
        state : TrainState, optional
            The training that this evaluation is part of, which may save or stop between two batches.

        Returns
        -------
        dict
            For classification dict(loss, acc, balanced_acc, correct, n), with accuracies from 0 to 1. balanced_acc is
            the mean of the accuracies of the classes that have images.

        Raises
        ------
        InputError
            If the loader has no images.
        """
        model = self.model if model is None else model
        loader = self.own_loader(loader)
        if self.world_size > 1:
            for buffer in model.buffers():  # all processes use the first one's batch normalisation statistics
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
            raise InputError("the loader yielded no images to evaluate; expected at least one batch")
        return metrics.compute()

    def pause(self, state, n_own=0):
        """Save or stop between two batches, if one of the processes wants to.

        Returns how many images all processes together have in the next batch, of which n_own are this process's.
        """
        stop = any([callback.on_batch(state) for callback in self.callbacks])  # a list, so that all are called
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

    def batch_split_warning(self):
        """Return a warning if splitting the batches changes the training, otherwise ""."""
        n_parts = self.config.grad_accum_steps
        if self.world_size == 1 and n_parts == 1:
            return ""
        modules = list(self.model.modules())
        reasons = []
        if any(isinstance(module, _BatchNorm) for module in modules):
            reasons.append("batch normalisation uses the statistics of each part alone")
        rates = [module.p for module in modules if isinstance(module, _DropoutNd)]
        if any(rates + [getattr(module, "rate", 0) for module in modules if type(module).__name__ == "DropPath"]):
            reasons.append("dropout is drawn separately for each part")
        if self.objective.mixing is not None:
            reasons.append("images are mixed within each part")
        masks, names_tokens = ask(self.model, "masks"), ask(self.model, "n_tokens") > 0
        if (self.world_size > 1 and (masks or names_tokens)) or (masks and self.device.type != "cpu"):
            reasons.append("the hidden patches are drawn separately for each part")
        if self.dtype is not None:
            reasons.append(f"sums in {str(self.dtype).removeprefix('torch.')} are rounded separately for each part")
        ways = [f"over {self.world_size} processes"] * (self.world_size > 1) + [f"in {n_parts} parts"] * (n_parts > 1)
        return (f"batches are split {' and '.join(ways)}, so the losses differ from the losses with whole batches: "
                f"{'; '.join(reasons)}") if reasons else ""

    def layers(self, grad_checkpointing):
        """Return the layers to recompute in the backward pass, or raise InputError if the model does not name them."""
        if not grad_checkpointing:
            return []
        try:
            return adapt_unlabelled(self.model).layers
        except InputError as error:
            raise InputError(f"grad_checkpointing needs a model whose layers are known: {error}") from None

    def own_loader(self, batches):
        """Return the batches as a Loader that yields this process's shard of each on its device."""
        loader = as_loader(batches, self.objective.check)
        loader.to(self.device)
        loader.set_shard(self.rank, self.world_size)
        return loader

    def all_reduce_sum(self, *numbers):
        """Return each number summed over the processes.

        The numbers stay on the CPU, so with CUDA the process group needs gloo too: "cpu:gloo,cuda:nccl".
        """
        if self.world_size == 1:
            return numbers
        numbers = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(numbers)
        return numbers.tolist()


class TrainState:
    """The state of a training run: model, optimiser, gradient scaler, averaged weights and counters.

    Attributes
    ----------
    config : TrainConfig
        Settings of this run.
    n_steps, warmup_steps : int
        Number of steps of the run, and of the warm-up at its start.
    forward : callable
        The model as the objective calls it.
    step, batch : int
        Steps completed, in the whole run and in the unfinished epoch.
    history : dict
        History of the finished epochs.
    metrics, seconds
        Metrics and training time of the unfinished epoch.
    lr : float
        Learning rate of the last step.
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
        self.first_nonfinite_step = torch.tensor(-1, device=trainer.device)  # -1: none
        self.step, self.batch, self.lr, self.seconds, self.data_seconds = 0, 0, 0.0, 0.0, 0.0

    @property
    def trained(self):
        """The module to evaluate and save: the average, if there is one, otherwise the model."""
        return self.model if self.average is None else self.average

    def resized(self, images):
        """Return images (B, C, H, W) at the size of the next step."""
        size = tuple(images.shape[2:])
        wanted = self.config.image_size(size, self.step, self.n_steps)
        return images if wanted == size else F.interpolate(images, wanted, mode="bilinear", antialias=True)

    def state_dict(self):
        """Return the state as tensors on the CPU, numbers and text."""
        counters = {name: getattr(self, name) for name in ("step", "batch", "lr", "seconds", "data_seconds")}
        average = None if self.average is None else self.average.state_dict()
        return on_cpu(dict(counters, seed=self.config.seed, model=self.model.state_dict(), average=average,
                           metrics=self.metrics.state_dict(), optimizer=self.optimizer.state_dict(),
                           scaler=self.scaler.state_dict(), history=copy.deepcopy(self.history)))

    def load_state_dict(self, entries):
        """Restore a state, including one from an older version; raise InputError if it does not fit."""
        entries = {OLD_NAMES["training"].get(name, name): value for name, value in entries.items()}
        try:
            if (entries["average"] is None) != (self.average is None):
                raise ValueError("only one of the two has averaged weights")
            self.model.load_state_dict(entries["model"])
            if self.average is not None:
                self.average.load_state_dict(entries["average"])
            optimizer = renamed(entries["optimizer"], "optimizer")
            self.optimizer.load_state_dict(copy.deepcopy(optimizer))  # otherwise it would modify these tensors
            self.scaler.load_state_dict(entries["scaler"])
            if self.first:  # these are sums over all processes, which will be summed again
                self.metrics.load_state_dict(entries["metrics"])
            self.history = {name: list(entries["history"][name]) for name in self.history}
            for name in ("step", "batch", "lr", "seconds", "data_seconds"):
                setattr(self, name, entries[name])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"the training state does not fit this run ({' '.join(str(error).split())[:200]}); "
                             f"resume with the arguments of the run that saved it") from error

    def track_finite(self, finite):
        """Record the first step whose loss or gradient was not finite.

        A gradient scaler skips those steps, so with a scaler a finite step clears the record.
        """
        kept = torch.where(self.first_nonfinite_step >= 0, self.first_nonfinite_step, self.step)
        clear = -1 if self.scaler.is_enabled() else self.first_nonfinite_step
        self.first_nonfinite_step = torch.where(finite, clear, kept)

    def is_finite(self):
        """Return whether the loss and its gradient have been finite in all steps that count."""
        return self.first_nonfinite_step.item() < 0

    def check_finite(self):
        """Raise NotFinite if the loss or its gradient was not finite, unless the scaler may still recover."""
        if self.is_finite() or (self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            return
        step = self.first_nonfinite_step.item()
        advice = "try a lower learning rate or a longer warm-up" if step else \
            "this was the first step, so check the model's weights and outputs"
        raise NotFinite(f"the loss or its gradient became NaN or infinite in step {step + 1} of {self.n_steps}, at "
                        f"learning rate {self.lr:.3g}; {advice}")


def trainable(model):
    """Return the model inside torch's wrappers; raise InputError if it cannot be trained."""
    n = len(getattr(model, "device_ids", None) or ())
    if n > 1:
        raise InputError(f"the model is wrapped in a DataParallel over {n} GPUs; pass the model itself, and start one "
                         f"process per GPU with torchrun --nproc-per-node={n}")
    model = unwrapped(model)
    device_of(model)  # refuses a model on the device "meta"
    if is_quantised(model):
        raise InputError(f"this {class_name(model)} is quantised, and integer weights cannot be trained; train the "
                         f"original model, and quantise it afterwards")
    if dtype_of(model) == torch.float16:
        raise InputError(f"the weights of this {class_name(model)} are float16, which is too coarse for an optimiser's "
                         f"small steps; train model.float() with amp='fp16', which computes in float16")
    return model


def compiled_part(model):
    """Return the torch.compile wrapper around a model, or None if there is none."""
    inside = unwrapped(model)
    while model is not inside:
        if "_orig_mod" in model._modules:
            return model
        model = model.module
    return None


def _set_train_mode(model):
    """Set train mode, but leave modules that are entirely frozen in eval mode.

    They then apply no dropout and keep their batch normalisation statistics. If only the heads are trained, or the last
    layer of another library's model, layers without parameters, such as the dropout after the positions, stay in eval
    mode too.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
    layers = {name: list(child.parameters()) for name, child in model.named_children()}
    heads = ask(model, "head_names") if is_ours(model) else [name for name in layers if layers[name]][-1:]
    before_head = [*model.parameters(recurse=False), *chain(*(layers[name] for name in layers if name not in heads))]
    if before_head and not any(p.requires_grad for p in before_head):
        for name, child in model.named_children():
            if not layers[name]:
                child.eval()


def steps_within(seconds, model, train_loader, val_loader, device="auto", objective=None, config=None, **overrides):
    """Return how many steps fit into a time, including an evaluation after every epoch.

    The speed is measured on a copy of the model. The measurement counts towards the time: it takes about 3% of it, or
    two steps and one batch of an evaluation if those take longer.

    Parameters
    ----------
    seconds : float
        Time for training and evaluation. If there are several processes, each must pass the same value.
    model, device, objective, config, **overrides
        As for Trainer.
    train_loader, val_loader : Loader, DataLoader or list
        Both must have a length.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    InputError
        If a loader has no length or no batches.
    """
    started = time.perf_counter()
    n_train, n_val = (n_batches(as_loader(one), "a number of steps instead of a time")
                      for one in (train_loader, val_loader))
    config = replace(config or TrainConfig(), **overrides | dict(learning_rate=1e-6, save_every=math.inf))
    trial = Trainer(copy.deepcopy(model), device, objective, config)
    trial.train(train_loader, n_steps=1, progress=False)  # the first step is slower: it starts workers
    parts = [(1.0, None)]  # fractions of the steps, and their progressive_resize
    if config.progressive_resize is not None:
        scale, share = config.progressive_resize
        parts = [(share, (scale, 1.0)), (1 - share, None)]
    step_seconds = 0.0
    for share, resize in parts:
        n_trial, trial_seconds = 0, 0.0
        while trial_seconds < max(1.0, 0.02 * seconds) / len(parts):
            history = trial.train(train_loader, n_steps=max(1, n_trial), progressive_resize=resize, progress=False)
            n_trial += max(1, n_trial)
            # all processes must make the same decision
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

WHITENED_BY = 2000  # images from which the filters of a whitened first layer are computed
MINUTES = 2  # length of a run if no option sets it
USUAL_MODELS = {None: ("vit_nano", "vit_tiny"), "mae": ("mae_nano", "mae_tiny"),
                "beit": ("beit_nano_pretraining", "beit_tiny_pretraining")}  # for small and for larger images
TOKENIZED, TOKENIZED_NUMBERS = 2000, 50_000_000  # most images, and pixels of them, from which a tokenizer is fitted
HEAD_EPOCHS = 100  # length of a run with --freeze-backbone, whose epochs take moments
RECONSTRUCTED, N_DRAWN = 256, 4  # validation images that are reconstructed, and drawn, after a run without labels
LINEAR_IMAGES = 20_000  # largest number of images used to fit the linear classifier, the test's baseline
UNEVEN = 2  # classes are called uneven if the largest has at least this many times as many images as the smallest


@dataclass(frozen=True)
class Run:
    """A training run that is ready to start. All processes compute; only the first one writes.

    Attributes
    ----------
    options : Namespace
        From parse(); for a resumed run, the options that it started with.
    device : torch.device
    folder, lock
        The folder of the results, and the open lock file that keeps other runs out of it.
    data : dict
        Arguments of get_data_loaders, used for the test images too.
    train_loader, val_loader : Loader
        Loaders of the images.
    name : str
        Name of the model.
    recipe : Recipe
        The recipe, after the options have overridden parts of it.
    model, trained : Module
        The whole model, and the part of it that is trained: all of it, or its Heads.
    loaders : tuple
        Loaders on which `trained` is trained and evaluated: train_loader and val_loader, or loaders of features.
    trainer : Trainer
        The Trainer of `trained`.
    entries : dict
        Further entries of last.pt: options, n_steps, command, ...
    resume : dict or None
        Training state of a resumed run.
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
    """Carry out a training run, from the images to result.json.

    The folder then contains config.json, history.csv, result.json, best.pt, last.pt, curves.png and, if the model has
    attention, attention.png. weights.checkpoints.load opens the checkpoints.

    Parameters
    ----------
    options : Namespace
        From parse().

    Returns
    -------
    dict or None
        The contents of result.json, on the first process.
    """
    with processes(device_to_resume(options)) as device, Interrupts() as interrupts:
        folder, lock, saved = _open_run(options)
        known = {name: value for name, value in vars(options).items() if name != "given"}
        if saved:
            known = options_to_resume(options.given, _of_any_version(saved["options"]))
            if result := broadcast_object(_complete_result(folder)):
                print(f"The run is complete; its results are in {folder}/result.json.")
                return result
            print(f"Resuming {folder}.")
        run = prepare(argparse.Namespace(**known), device, folder, lock, saved)
        history, seconds = fit(run, interrupts)
        return finish(run, history, seconds)


def _open_run(options):
    """Return (folder, lock, entries from read_run()) of the run to resume, or three Nones."""
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
    """Return a Run: load the images, choose the recipe, build the model and the Trainer, and count the steps.

    `folder`, `lock` and `saved` come from _open_run.
    """
    started = time.perf_counter()
    if options.output_dir and not folder and holds_run(Path(options.output_dir)):
        raise InputError(f"--output-dir {options.output_dir} already holds files of a run; resume it with "
                         f"--resume {options.output_dir}, or choose a new folder")
    if options.compile:
        check_compiler(device.type)
    teacher = _load_teacher(options, saved) if options.teacher else None  # before the seed, so it changes no weights
    torch.manual_seed(options.seed)
    start = _pretrained_model(options, folder, saved) if options.pretrained else None
    data = _data_arguments(options, start)
    train_loader, val_loader = load_data(data, labelled=not options.pretrain)
    if train_loader.dataset_name == "folder" and process_number() == 0 and not saved and not options.pretrain:
        print(audit_folder(options.data_dir, options.val_fraction, options.seed), flush=True)
    name = _model_name(options, max(train_loader.size))
    recipe = _choose_run_recipe(options, saved, name, train_loader, device)
    data["batch_size"] = train_loader.batch_size = val_loader.batch_size = recipe.batch_size
    train_loader.set_augmentation(recipe.augmentation)
    if isinstance(train_loader, MemoryLoader):
        recipe = replace(recipe, augmentation=train_loader.augmentation)  # digits are never mirrored
    files = dict(validation_files=_fingerprint(val_loader), training_files=_fingerprint(train_loader),
                 test_files=None if options.pretrain else _test_fingerprint(data),
                 teacher_weights=_fingerprint_of_weights(teacher))
    if options.dry_run:
        val_loader = val_loader.without_augmentation(2 * recipe.batch_size)
    class_names = train_loader.class_names
    model = start
    if start is None:
        model = new_model(name, recipe, train_loader)
    else:
        print(fit_head(start, class_names))
    objective = _make_objective(options, recipe, train_loader, teacher, model)
    objective.check_model(model)  # before the run has a folder
    if saved:
        for change in changes_since(saved, class_names, train_loader.n_images, n_processes(), **files):
            print(f"Warning: {change}.")
    if process_number() == 0 and not folder:
        folder = new_output_dir(options.output_dir, name, train_loader.dataset_name)
        lock = lock_folder(folder)
    folder = broadcast_object(folder)
    loaders, trained = (train_loader, val_loader), model
    if options.freeze_backbone:
        loaders, trained = feature_loaders(freeze_backbone(model), loaders, device), Heads(model)
    trainer = _make_trainer(options, recipe, model, trained, objective, device)
    _describe_run(options, name, recipe, model, train_loader, val_loader, trainer)
    spent = broadcast_object(time.perf_counter() - started) if options.freeze_backbone else 0.0  # for the features
    n_steps = saved["n_steps"] if saved else _count_steps(options, trainer, loaders, spent)
    entries = dict(options=_lasting(options), n_steps=n_steps, n_images=train_loader.n_images,
                   command=_command_of(vars(options), n_steps), n_processes=n_processes(),
                   recipe=asdict(recipe), **files)
    print(f"{counted(n_steps, 'step')}, {n_steps / len(loaders[0]):.1f} epochs; to repeat this run: "
          f"{entries['command']}")
    if process_number() == 0:
        write_json(dict(entries, model=name, model_config=vars(model.config), class_names=class_names),
                   folder / CONFIG)
    return Run(options, device, folder, lock, data, train_loader, val_loader, name, recipe, model, trained, loaders,
               trainer, entries, saved and saved.get("training"))


def _lasting(options):
    """Return the options as a dict, with an absolute data_dir so that a resume works from any folder."""
    data_dir = Path(options.data_dir).expanduser()
    return dict(vars(options), data_dir=str(data_dir.resolve()) if data_dir.exists() else options.data_dir)


# ---- Images and model


def chosen(options, *names):
    """Return {name: value} for those of the named options that are set."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _data_arguments(options, start):
    """Return the arguments of get_data_loaders; a pretrained model supplies the preprocessing."""
    data = dict(data_dir=options.data_dir, img_size=options.img_size, dataset=options.dataset,
                in_channels=options.in_channels, val_fraction=options.val_fraction, seed=options.seed,
                workers=options.num_workers, skip_corrupt=options.skip_corrupt)
    if options.dry_run and choose_set(options.data_dir, options.dataset, None) == "shapes":
        data["n_images"] = 600
    if start is not None:
        shown = adapt(start).preprocessing
        data |= dict(img_size=shown.img_size, preprocessing=shown)
    return data


def load_data(data, labelled=True):
    """Return (training loader, validation loader); the first process goes first, as it may download."""
    first, one_by_one = process_number() == 0, choose_set(data["data_dir"], data["dataset"], None) in TORCHVISION_SETS
    if one_by_one and not first:
        broadcast_object(None)
    loaders = (get_data_loaders if labelled else get_unlabelled_loaders)(**data)
    if one_by_one and first:
        broadcast_object(None)
    return loaders


def _pretrained_model(options, folder, saved):
    """Return the model to start from; a resumed run has it in its last.pt."""
    if saved and "training" in saved:
        return load(folder / LAST)
    model = load(options.pretrained, **chosen(options, "img_size", "in_channels", "drop_path", "n_heads",
                                              "class_names"))
    if encoder := ask(model, "encoder"):
        print(f"{options.pretrained} is a {class_name(model)}, which learned without labels; the run starts from its "
              f"encoder.")
        return encoder()
    return model


def _model_name(options, img_size):
    """Return the model's name in MODELS, or the name of the pretrained file or its run."""
    if not options.pretrained:
        return options.model or USUAL_MODELS[options.pretrain][img_size > SMALL_SIDE]
    path = Path(options.pretrained)
    return path.parent.name or "best" if path.name in (BEST, LAST) else path.stem


def set_up_loader(loader, recipe, seed):
    """Give a training loader the batch size and the augmentation of a recipe, and a seed."""
    loader.training, loader.batch_size, loader.seed = True, recipe.batch_size, seed
    loader.set_augmentation(recipe.augmentation)


def new_model(name, recipe, train_loader, build=build_model, seed=None):
    """Return a new model for the loader's images and classes, whitened if the recipe specifies it.

    The seed draws its weights and leaves torch's generator as it is; None uses torch's generator.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        model = build(name, n_classes=len(train_loader.class_names or ()), img_size=train_loader.img_size,
                      in_channels=train_loader.preprocessing.n_channels, **recipe.model_options)
        if recipe.whiten and model.whitening_layer() is not None:
            whiten_first_layer(model, first_images(train_loader, WHITENED_BY))
    return model


def trainer_for(recipe, model, device="auto", objective=None, trained=None, **settings):
    """Return the Trainer of a model by a recipe.

    Parameters
    ----------
    recipe : Recipe
    model : Module
        Accepts images of any size from now on, if the recipe's first steps use smaller ones.
    device : optional
        As for Trainer.
    objective : Objective, optional
        None: the recipe's classification.
    trained : Module, optional
        What is trained instead of the whole model.
    **settings
        Fields of TrainConfig that replace those of the recipe.
    """
    if recipe.train.progressive_resize:
        model.any_size = True
    if objective is None:
        mixing = None if recipe.mixing == "none" else Mixing(recipe.mixing, model.config.n_classes)
        objective = Classification(recipe.label_smoothing, mixing=mixing)
    patch = pair(getattr(model.config, "patch_size", 4))
    return Trainer(model if trained is None else trained, device, objective, recipe.train,
                   resize_multiple=max(patch), **settings)


def first_images(loader, n_images):
    """Return the first n_images images of a training loader, rounded up to whole batches: (B, C, H, W)."""
    loader.set_position(0)
    return torch.cat([images for images, _ in itertools.islice(loader, -(-n_images // loader.batch_size))])


# ---- Recipe, Trainer and steps


def _choose_run_recipe(options, saved, name, train_loader, device):
    """Return the recipe, with parts of it overridden by the options.

    It is the recipe of the resumed run, the one in the options, or the one that choose_recipe picks.
    """
    if saved and "recipe" in saved:
        return Recipe.from_dict(saved["recipe"])
    size = train_loader.size
    if not options.recipe:
        kind = "head" if options.freeze_backbone else "pretrained" if options.pretrained else "new"
        precision = choose_precision(options.amp, device)
        options.recipe = choose_recipe(name, train_loader.img_size, _budget(options), kind, precision)
    check_choice("recipe", options.recipe, tuple(RECIPES), "python train_vit.py --help")
    recipe = RECIPES[options.recipe]
    if recipe.model not in (None, name) and not options.pretrained:
        raise InputError(f"--recipe {options.recipe} is for --model {recipe.model}, but the model is {name}; use "
                         f"--model {recipe.model} or a different recipe")
    if min(size) < recipe.smallest:
        raise InputError(f"--recipe {options.recipe} needs images of at least {recipe.smallest} pixels, but these "
                         f"have {min(size)}; choose a larger --img-size or a different recipe")
    pixels = chosen(options, "shift", "flip", "cutout")
    if pixels and not isinstance(train_loader, MemoryLoader):
        raise InputError(f"--{next(iter(pixels))} is for small images in memory, of at most {SMALL_SIDE} pixels; "
                         f"photographs are cropped, mirrored and recoloured as they are read: leave it out, or set "
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
    if options.pretrained:  # the model exists already
        recipe = replace(recipe, model_options={}, whiten=False)
    if options.pretrain:
        recipe = replace(recipe, label_smoothing=0.0, mixing="none")
    if options.freeze_backbone:  # features are computed once, without augmentation
        recipe = replace(recipe, train=replace(recipe.train, progressive_resize=None), mixing="none",
                         augmentation=Augmentation(0.0, "none"))
    return recipe


def _load_teacher(options, saved):
    """Return the teacher of a run; raise InputError if it cannot be loaded."""
    if saved and options.teacher not in PRETRAINED and not Path(options.teacher).exists():
        raise InputError(f"the teacher of this run, {options.teacher}, is no longer there; put it back to resume the "
                         f"run, or start a new run from its weights with --pretrained")
    try:
        teacher = load(options.teacher)
    except InputError as error:
        raise InputError(f"--teacher: {error}") from error
    encoder = ask(teacher, "encoder")
    return encoder() if encoder and options.pretrain else teacher  # a tokenizer needs features and no head


def _fit_tokenizer(model, train_loader, teacher):
    """Return a PatchTokenizer of pixels, or of a teacher's features, and print how many tokens are in use.

    It depends only on the images and their order, so that a resumed run finds the same one.
    """
    n_images = min(TOKENIZED, max(1, TOKENIZED_NUMBERS // math.prod((model.config.in_channels, *train_loader.size))))
    images = first_images(train_loader.without_augmentation(n_images), n_images)
    features = teacher and TeacherFeatures(teacher, train_loader.preprocessing)
    tokenizer = PatchTokenizer(model.n_tokens, model.patch_embed.patch_size, model.config.in_channels, features)
    tokenizer.fit(images)
    print(f"Tokenizer: {model.n_tokens} tokens, by k-means of the {'features' if teacher else 'pixels'} of patches of "
          f"{counted(len(images), 'image')}; perplexity {tokenizer.perplexity(tokenizer(images)):.0f}, the number of "
          f"tokens in use if all were equally frequent")
    return tokenizer


def _make_objective(options, recipe, train_loader, teacher, model):
    """Return the objective of a run: without labels MaskedPixels or MaskedTokens, otherwise one with labels."""
    if options.pretrain == "mae":
        return MaskedPixels()
    if options.pretrain == "beit":
        return MaskedTokens(_fit_tokenizer(model, train_loader, teacher))
    settings = dict(label_smoothing=recipe.label_smoothing,
                    class_weights=balancing_weights(train_loader.class_counts) if options.class_weights else None,
                    mixing=None if recipe.mixing == "none" else Mixing(recipe.mixing, len(train_loader.class_names)))
    if teacher is None:
        return Classification(**settings)
    return Distillation(teacher, train_loader.preprocessing, options.distillation, **settings)


def _make_trainer(options, recipe, model, trained, objective, device):
    """Return the Trainer of a run, with the recipe and the options about precision, memory and speed."""
    scales = layer_lr_scales(trained, options.layer_decay) if options.layer_decay else None
    return trainer_for(recipe, model, device, objective, trained, seed=options.seed, lr_scales=scales,
                       grad_accum_steps=options.grad_accum_steps, amp=options.amp, compile=options.compile,
                       grad_checkpointing=options.grad_checkpointing, save_every=60 * options.save_minutes,
                       **chosen(options, "warmup_epochs"))


def _budget(options):
    """Return the length in minutes, or None if it is set in epochs or steps."""
    in_steps = options.epochs or options.steps or (options.freeze_backbone and not options.minutes)
    return None if in_steps else options.minutes or MINUTES


def _count_steps(options, trainer, loaders, spent):
    """Return the number of steps of a new run; `spent` seconds of its minutes are already used."""
    if options.dry_run:
        return 2
    minutes = _budget(options)
    if minutes is None:
        return options.steps or (options.epochs or HEAD_EPOCHS) * len(loaders[0])
    print(f"Measuring the speed, to find how many steps fit into {counted(minutes, 'minute')} of training and "
          f"validation ...", flush=True)
    n_steps = steps_within(max(1.0, 60 * minutes - spent), trainer.model, *loaders, trainer.device, trainer.objective,
                           trainer.config)
    if n_steps < len(loaders[0]):
        print(f"Warning: a run of {counted(minutes, 'minute')} is too short to use each image once ({n_steps} of "
              f"{counted(len(loaders[0]), 'step')}); use more --minutes, a smaller --img-size or a smaller model.")
    return n_steps


def _describe_run(options, name, recipe, model, train, val, trainer):
    """Print the model, the data and the recipe, with warnings; `train` and `val` are the loaders of the images."""
    frozen = f", {count_parameters(trainer.model):,} of them trained" if options.freeze_backbone else ""
    print(f"{name}: {count_parameters(model):,} parameters{frozen}; "
          f"{_data_name(train, options.data_dir)}: {train.n_images:,} training and "
          f"{counted(val.n_images, 'validation image')} of {_describe_images(train)}, "
          f"{f'{len(train.class_names)} classes' if train.class_names else 'labels ignored'}; {trainer.device}, "
          f"{str(trainer.dtype or torch.float32).removeprefix('torch.')}")
    print(f"Recipe {options.recipe}: {recipe.describe(isinstance(train, MemoryLoader))}")
    if options.teacher and not options.pretrain:
        print(f"Teacher {options.teacher}: {trainer.objective.describe_teacher()}")
    if train.class_names and (text := _unevenness(train.class_names, train.class_counts)):
        weighted = "--class-weights gives every class the same weight" if options.class_weights else \
            "look at the balanced accuracy, or give every class the same weight with --class-weights"
        print(f"{text}; {weighted}.")
    if text := trainer.batch_split_warning():
        print(f"Warning: {text}.")


def _data_name(loader, data_dir):
    """Return the name of a loader's data as a reader knows it: for a folder of images, the folder's name."""
    return loader.dataset_name if loader.dataset_name != "folder" else Path(data_dir).resolve().name or str(data_dir)


def _describe_images(loader):
    """Return size and channels of a loader's images as text: "32 pixels", "96x160 pixels and 1 channel"."""
    n = loader.preprocessing.n_channels
    return f"{describe_size(loader.img_size)} pixels" + ("" if n == 3 else f" and {n} channel{'s' * (n > 1)}")


def _unevenness(class_names, class_counts):
    """Return the images per class as text if they differ by a factor of UNEVEN or more, otherwise ""."""
    by_size = sorted(zip(class_counts, class_names, strict=True), reverse=True)
    if by_size[0][0] < UNEVEN * by_size[-1][0]:
        return ""
    shown = by_size if len(by_size) <= 10 else [*by_size[:5], *by_size[-5:]]
    return "Classes differ in size: " + ", ".join(f"{name} {n:,}" for n, name in shown) \
        + (f" (the largest and smallest of {len(by_size)})" if len(by_size) > 10 else "")


# ---- The training itself


class StopOnSignal(Callback):
    """A Callback that stops the training between two batches after Ctrl-C or SIGTERM."""

    def __init__(self, interrupts):
        self.interrupts = interrupts

    def on_batch(self, state):
        """Return whether a signal has arrived."""
        return self.interrupts.caught is not None


def fit(run, interrupts):
    """Train, and return (history, seconds of the run).

    Raises
    ------
    Interrupted
        After a signal, with the command that resumes the run.
    InputError
        If the training fails, with what is saved and the command that resumes the run.
    """
    saver, n_steps = None, run.entries["n_steps"]
    if process_number() == 0:
        saver = Saver(run.folder, run.model, run.train_loader.preprocessing, run.entries, run.trainer.objective,
                      run.resume)
    resume = command("--resume", run.folder)
    interrupts.held = True
    try:
        history = run.trainer.train(*run.loaders, n_steps=n_steps, resume=run.resume, progress=sys.stderr.isatty(),
                                    callbacks=[StopOnSignal(interrupts), *filter(None, [saver])])
    except Stopped as stop:
        sound = stop.state.is_finite() or stop.state.scaler.is_enabled()  # a scaler skips steps that are not finite
        if saver and sound:
            saver.on_save(stop.state)
        broadcast_object(None)  # wait until all is written: when one process ends, the launcher ends the others
        text = f"saved at step {stop.state.step} of {n_steps}; resume with: {resume}"
        raise Interrupted(interrupts.caught or signal.SIGTERM,
                          text if sound else "the loss or its gradient was no longer finite, so this state was not "
                                             f"saved; resume the last saved state with: {resume}") from None
    except InputError as error:
        raise InputError(f"{error}. {_what_is_saved(error, run.folder, saver, n_steps, resume)}") from error
    interrupts.held = False
    interrupts.advice = f"the training has finished, but the test has not; resume with: {resume}"
    if interrupts.caught:
        raise Interrupted(interrupts.caught, interrupts.advice)
    broadcast_object(None)  # the first process has written best.pt
    return history, saver.elapsed if saver else 0.0


def _what_is_saved(error, folder, saver, n_steps, resume):
    """Return what the run has on disk after an error, and the command that resumes it."""
    last = folder / LAST
    saved = f"The last good checkpoint is {last}" if last.is_file() else f"Nothing was saved yet in {folder}"
    if saver and last.is_file():
        saved += f", step {saver.saved_step} of {n_steps}"
    if isinstance(error, NotFinite):
        return saved
    parts = f" --grad-accum-steps {error.grad_accum_steps}" if isinstance(error, OutOfMemory) else ""
    return f"{saved}; resume with: {resume}{parts}"


# ---- After the training

RESULT_COLUMNS = ("val_acc", "val_loss")  # in result.json
CRITERIA = dict(val_acc="validation accuracy", val_balanced_acc="balanced validation accuracy",
                val_loss="validation loss")  # criteria of objectives, as they are printed


def finish(run, history, seconds):
    """Test the best model and write figures and result.json; return its contents on the first process."""
    best, first = load(run.folder / BEST), process_number() == 0
    result = _training_result(run, history, seconds)
    if first:
        write_json(result, run.folder / "result.json")  # before the test, so that a bad test image does not lose it
        save_figure(plot_training_curves(history), run.folder / "curves.png")
    if run.options.pretrain:
        skipped = _skipped_by_all(run.train_loader, run.val_loader)
        return finish_pretraining(run, best.to(run.device), history, result, skipped) if first else None
    loader, split = get_test_loader(**run.data), "test"
    if loader is not None and run.entries["test_files"] not in (None, _fingerprint(loader)):
        print(f"Warning: the test images have changed since the training started; testing on the "
              f"{counted(loader.n_images, 'image')} now in the folder.")
    if loader is None:
        loader, split = run.val_loader, "val"
        print("There are no test images, so the accuracies below are on the validation images. The best epoch was "
              "chosen on them, so they are slightly optimistic. Fitting a linear classifier for comparison ...",
              flush=True)
    else:
        print("Testing the best model, and fitting a linear classifier for comparison ...", flush=True)
    if run.options.dry_run:
        loader = loader.without_augmentation(2 * run.recipe.batch_size)
    trainer = Trainer(best, run.device, run.trainer.objective, run.trainer.config)
    score, mirrored = trainer.evaluate(loader), None
    if run.recipe.augmentation.flip != "none":
        mirrored = result[f"{split}_mirrored_acc"] = trainer.evaluate(loader, Mirrored(best))["acc"]
    skipped = _skipped_by_all(run.train_loader, run.val_loader, loader)
    if not first:
        return None
    result |= _compare_with_linear(run, score, split, loader)
    skipped |= set(run.train_loader.skipped)
    result |= dict(skipped=len(skipped))
    report_skipped(sorted(skipped))
    draw(run, best, history, ("linear classifier", result[f"linear_{split}_acc"]))
    write_json(result, run.folder / "result.json")  # last, because it marks the run as complete
    if mirrored is not None:
        print(f"Accuracy if the probabilities for an image and its mirror image are averaged: {mirrored:.1%}. "
              f"`predict` does not average them.")
    print(f"{result['images_per_second']:.0f} images/s; fetching and augmenting took {run.trainer.data_share:.1%} of "
          f"the training time. Results: {run.folder}/"
          + ("" if best.attends else " (without attention.png: its attention stays within windows)"
             if ask(best, "windowed") else " (without attention.png: this model has no attention)"))
    return result


def finish_pretraining(run, model, history, result, skipped):
    """Draw what a model that learned without labels predicts, and return the contents of result.json."""
    report_skipped(sorted(skipped))
    run.val_loader.set_shard(0, 1)  # only the first process computes this
    images = _spread_images(run.val_loader, RECONSTRUCTED)
    few = images[::max(1, len(images) // N_DRAWN)][:N_DRAWN].cpu()
    objective = run.trainer.objective
    if ask(model, "masks"):
        found = reconstruction_errors(model, images)
        print(f"Mean squared error of hidden pixels, on {counted(len(images), 'validation image')} (pixels from 0 to "
              "1): " + "; ".join(f"{name} {error:.4f}" for name, error in found.items()))
        if BORROWED in found:
            print("The model borrows the mean and the contrast of each hidden patch, which it has not seen; compare it "
                  "with the borrowed mean.")
        figure, file = visualize_reconstruction(model, few), "reconstruction.png"
    else:
        best = objective.best_epoch(history) - 1
        found = {name: history[f"val_{name}"][best] for name in ("token_acc", "commonest")}
        print(f"Tokens of hidden patches: {found['token_acc']:.1%} predicted; always the commonest: "
              f"{found['commonest']:.1%}")
        figure, file = visualize_tokens(model, objective.tokenizer, few), "tokens.png"
    save_figure(figure, run.folder / file)
    result |= dict(pretraining=found, skipped=len(skipped))
    write_json(result, run.folder / "result.json")  # last, because it marks the run as complete
    advice = command("--pretrained", run.folder / BEST, "--data-dir", "LABELLED")
    print(f"Results: {run.folder}/" + ("" if run.options.dry_run else f". To use what it learned: {advice}"))
    return result


def _skipped_by_all(*loaders):
    """Return the files that the loaders of any process skipped, because they cannot be read."""
    skipped = [each.skipped for each in loaders]
    return {file for part in all_gather_object(skipped) for files in part for file in files}


def _spread_images(loader, n_images):
    """Return up to n_images images (B, C, H, W), spread over the set, because folders are read class by class."""
    kept, n_before, apart = [], 0, math.ceil(loader.n_images / n_images)
    for images, _ in loader:
        kept.append(images[-n_before % apart::apart])
        n_before += len(images)
    return torch.cat(kept)


def _training_result(run, history, seconds):
    """Print a summary of the training, and return its entries of result.json."""
    objective, trainer = run.trainer.objective, run.trainer
    epoch = objective.best_epoch(history)
    best = history[objective.criterion][epoch - 1]
    n_equal = history[objective.criterion].count(best)
    print(f"Trained in {seconds:.0f} s. Best {CRITERIA.get(objective.criterion, objective.criterion)} "
          f"{best:{objective.columns[objective.criterion]}} in epoch {epoch} of {len(history['lr'])}"
          + (f" (the last of {n_equal} equally good epochs)." if n_equal > 1 else "."), flush=True)
    speed = sum(s * r for s, r in zip(history["seconds"], history["images_per_second"], strict=True))
    return dict(model=run.name, dataset=run.train_loader.dataset_name, seed=run.options.seed, recipe=run.options.recipe,
                teacher=run.options.teacher, distillation=run.options.distillation,
                minutes=_budget(run.options), n_steps=run.entries["n_steps"], parameters=count_parameters(run.model),
                **{name: history[name][epoch - 1] for name in objective.columns if name in RESULT_COLUMNS},
                seconds=round(seconds, 1),
                images_per_second=round(speed / sum(history["seconds"]), 1), data_share=round(trainer.data_share, 4),
                device=str(run.device), precision=str(trainer.dtype or torch.float32), torch=torch.__version__,
                torchvision=torchvision.__version__, command=run.entries["command"])


def _compare_with_linear(run, score, split, loader):
    """Print the accuracies of the model and of a linear classifier, and return both as entries of the result."""
    train_loader, val_loader = run.train_loader, run.val_loader
    for each in (val_loader, loader):
        each.set_shard(0, 1)  # only the first process computes what follows
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
    print(f"{split} accuracy {percent(score['correct'], score['n'])} on {counted(score['n'], 'image')} (95% Wilson "
          f"interval){balanced}; linear classifier on the pixels: {linear[f'{split}_acc']:.1%}; {chance}")
    return {f"{split}_acc": score["acc"], f"{split}_correct": score["correct"], f"{split}_n": score["n"],
            f"{split}_balanced_acc": score["balanced_acc"],
            f"{split}_interval": wilson_interval(score["correct"], score["n"]),
            f"linear_{split}_acc": linear[f"{split}_acc"], f"largest_class_{split}_acc": largest}


def draw(run, model, history, baseline):
    """Write curves.png and, if the model has attention, attention.png."""
    save_figure(plot_training_curves(history, baseline=baseline), run.folder / "curves.png")
    if model.attends:
        val_loader = run.val_loader
        apart = max(1, len(val_loader) // 4)  # spread over the set, because folders are read class by class
        batches = itertools.islice(val_loader, 0, 4 * apart, apart)
        images = [images[0] for images, _ in batches if len(images)]  # of (C, H, W)
        save_figure(visualize_attention_grid(model, torch.stack(images).cpu()), run.folder / "attention.png")


def _of_any_version(options):
    """Return a run's saved options with the defaults of options that did not exist yet.

    A run older than recipes gets the recipe whose values it used.
    """
    name = "fine_tuning" if options.get("pretrained") and not options.get("freeze_backbone") else "classic"
    return vars(make_parser().parse_args([])) | dict(recipe=name) | options


def _complete_result(folder):
    """Return the contents of a folder's result.json if it includes the test, otherwise None."""
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    return result if result.keys() & {"linear_test_acc", "linear_val_acc", "pretraining"} else None


def describe_skipped(files):
    """Return lines about image files that were skipped; the first five are named."""
    more = [f"... and {len(files) - 5} more, {len(files)} in all."] if len(files) > 5 else []
    return [*(f"Skipped, because it cannot be read: {file}" for file in files[:5]), *more]


def report_skipped(files):
    """Print which image files were skipped, if there were any."""
    for line in describe_skipped(files):
        print(line)


# ---- The arguments of a run -------------------------------------------------------------------------------


WORKERS_HELP = "processes that read photographs, 0 for none (default: one per core, at most 8)"
AMP_HELP = "mixed precision (default: auto, bf16 or fp16 if the hardware computes fast in it, otherwise float32)"
DEVICE_HELP = "auto, cpu, cuda, cuda:N or mps (default: %(default)s)"
DESCRIPTION = """\
Train a model on a folder with one subfolder of images per class, or without
labels on any folder of images.

examples:
  python train_vit.py --data-dir photos --pretrained deit_tiny_patch16_224
  python train_vit.py --data-dir photos --model vit_tiny --minutes 30
  python train_vit.py --data-dir unlabelled --pretrain mae --minutes 20
  python train_vit.py --resume runs/NAME

commands for a trained model, each with --help:
  evaluate   measure its accuracy on a folder of images
  predict    name the classes of images
  export     write it as an ONNX file
  inspect    describe a file, or list the pretrained models"""


def make_parser():
    """Return the parser of a training run: first the everyday options, then all others in groups."""
    parser = OneLineParser(
        prog="train_vit.py", description=DESCRIPTION, formatter_class=HelpFormatter, add_help=False,
        usage="python train_vit.py [options]\n       python train_vit.py COMMAND [options]",
        epilog="models:\n" + textwrap.fill(", ".join(MODELS), 78, initial_indent="  ", subsequent_indent="  "))
    group = parser.add_argument_group("everyday options")
    group.add_argument("--data-dir", default="./data", metavar="FOLDER", help="folder with one subfolder of images "
                       "per class; with --pretrain, any folder of images; or a known data set (default: %(default)s; "
                       "if it does not exist, drawn shapes)")
    group.add_argument("--pretrained", metavar="NAME|PATH", help="start from trained weights: a name that `inspect` "
                       "lists, a checkpoint, or a folder written by transformers or timm (default: new weights)")
    group.add_argument("--pretrain", choices=tuple(filter(None, USUAL_MODELS)), help="learn without labels, by "
                       "predicting hidden patches (default: learn from labels)")
    group.add_argument("--model", metavar="NAME", help="model to train from new weights; all are listed below "
                       "(default: vit_nano for images up to 64 pixels, otherwise vit_tiny; with --pretrain, the model "
                       "of that size for it)")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=positive(), metavar="M", help="length in minutes, converted to steps by "
                        "measuring the speed first (default: 2; with --freeze-backbone, 100 epochs)")
    length.add_argument("--epochs", type=int_at_least(1), metavar="N", help="length in passes over the training images "
                        "(default: 2 minutes; with --freeze-backbone, 100 epochs)")
    group.add_argument("--output-dir", metavar="FOLDER", help="new folder for the results (default: "
                       "runs/<model>-<data>-<n>)")
    group.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="continue the run in this folder exactly "
                       "where it stopped; without RUN, the run in --output-dir, or a new one there")
    group.add_argument("--seed", type=seed(), default=0, metavar="N", help="seed of the weights, the validation split, "
                       "the order and the augmentation (default: %(default)s)")
    group.add_argument("--device", default="auto", help=DEVICE_HELP)
    group.add_argument("--dry-run", action="store_true", help="test the command with two steps of training; without "
                       "--output-dir the results are deleted")
    _add_help(group)

    group = parser.add_argument_group("data and augmentation")
    group.add_argument("--dataset", default="auto", metavar="NAME", help=f"{', '.join(DATASETS)} (default: "
                       "%(default)s, detected in --data-dir)")
    group.add_argument("--img-size", type=int_at_least(1), nargs="+", action=Size, metavar="PIXELS",
                       help="side, or height and width, in pixels (default: the size of the pretrained model; small "
                       "images keep their size; otherwise 224)")
    group.add_argument("--in-channels", type=int_at_least(1), metavar="N", help="1 for grey, 3 for colour, 4 for "
                       "colour with transparency (default: as in the pretrained model, otherwise 3)")
    group.add_argument("--val-fraction", type=float, default=0.1, metavar="F", help="fraction of the training images "
                       "held out for validation if there is no val folder (default: %(default)s)")
    group.add_argument("--skip-corrupt", action="store_true", help="skip image files that cannot be read, and report "
                       "them")
    group.add_argument("--shift", type=Bounded(float, 0, 0.5, "0 to 0.5"), metavar="F", help="largest random shift of "
                       "small images, as a fraction of the side (default: the recipe's)")
    group.add_argument("--flip", choices=FLIPS, help="mirroring of small images (default: the recipe's)")
    group.add_argument("--cutout", type=Bounded(float, 0, 2, "a share of the image's side, 0 to 2: 0.25 is 8 of 32 "
                                                             "pixels"), metavar="F",
                       help="side of a hidden square, as a fraction of the side of a small image (default: the "
                       "recipe's)")
    group.add_argument("--mixing", choices=MIXINGS, help="combine pairs of images and their labels (default: the "
                       "recipe's)")

    group = parser.add_argument_group("model and pretrained weights")
    group.add_argument("--patch-size", type=int_at_least(1), metavar="PIXELS", help="side of a patch in pixels "
                       "(default: the recipe's; otherwise 4 for images up to 64 pixels, 8 up to 128, 16 above)")
    group.add_argument("--freeze-backbone", action="store_true", help="train only the head, on features of the "
                       "pretrained model that are computed once, without augmentation")
    add_n_heads(group)
    add_class_names(group)

    group = parser.add_argument_group("length, optimiser and learning rate",
                                      "Options you do not set come from the recipe.")
    steps = group.add_argument("--steps", type=int_at_least(1), metavar="N", help="length in steps, instead of "
                               "--minutes or --epochs")
    length._group_actions.append(steps)  # listed here, but still exclusive with --minutes and --epochs
    group.add_argument("--recipe", metavar="NAME", help=f"named settings: {', '.join(RECIPES)} (default: chosen by "
                       f"model, image size and minutes, and printed)")
    group.add_argument("--batch-size", type=int_at_least(1), metavar="N", help="images per step, over all processes "
                       "(default: the recipe's)")
    group.add_argument("--optimizer", choices=OPTIMIZERS, help="rule that updates the weights (default: the "
                       "recipe's)")
    group.add_argument("--lr", type=positive(), metavar="LR", help="peak learning rate (default: the recipe's)")
    group.add_argument("--schedule", choices=SCHEDULES, help="how the learning rate falls (default: the recipe's)")
    group.add_argument("--warmup-epochs", type=Bounded(float, 0, sys.float_info.max, "0 or more"), metavar="N",
                       help="epochs in which the learning rate rises (default: 5%% of the run)")
    group.add_argument("--layer-decay", type=Bounded(float, 0.01, 1, "0.01 to 1"), metavar="F", help="each layer's "
                       "learning rate as a fraction of the next layer's, such as 0.75 for fine-tuning (default: 1)")

    group = parser.add_argument_group("loss and regularisation")
    group.add_argument("--teacher", type=_located, metavar="NAME|PATH", help="learn from this trained model too: a "
                       "checkpoint, or a name that `inspect` lists. With labels it must know the classes; with "
                       "--pretrain beit the tokens come from its features (default: none)")
    group.add_argument("--distillation", choices=tuple(DISTILLATIONS), help="what to learn from the teacher: the class "
                       f"that it predicts, or its probabilities (default: {DEFAULT_DISTILLATION})")
    group.add_argument("--class-weights", action="store_true", help="give every class the same weight in the loss, and "
                       "choose the best epoch by balanced accuracy")
    group.add_argument("--label-smoothing", type=Bounded(float, 0, 1, "0 to 1"), metavar="F", help="fraction of the "
                       "target that is spread evenly over all classes (default: the recipe's)")
    group.add_argument("--weight-decay", type=Bounded(float, 0, sys.float_info.max, "0 or more"), metavar="F",
                       help="decay of matrices and kernels in each step, times the learning rate (default: the "
                       "recipe's)")
    group.add_argument("--drop-path", type=float, metavar="P", help="stochastic depth: probability of skipping the "
                       "last block, lower for earlier ones (default: the model's)")
    group.add_argument("--model-ema", type=Bounded(float, 0, 1, "0 to 1"), nargs="?", const=0.999, metavar="DECAY",
                       help="keep a moving average of the weights, and evaluate it (decay if no number follows: 0.999; "
                       "default: the recipe's)")

    group = parser.add_argument_group("checkpoints and resuming (see also --output-dir and --resume)")
    group.add_argument("--save-minutes", type=positive(), default=3, metavar="M", help="minutes between two "
                       "checkpoints within an epoch (default: %(default)s)")

    group = parser.add_argument_group("devices, memory and speed (see also --device)")
    group.add_argument("--num-workers", "--workers", type=int_at_least(0), metavar="N", help=WORKERS_HELP)
    group.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help=AMP_HELP)
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    group.add_argument("--grad-accum-steps", "--accumulate", type=int_at_least(1), default=1, metavar="N",
                       help="number of parts into which a batch is split, to save memory (default: %(default)s)")
    group.add_argument("--grad-checkpointing", action="store_true", help="recompute the layers in the backward pass, "
                       "to save memory at the cost of one more forward pass")
    return parser


def _located(name):
    """Return the absolute path of a model's file or folder, or the name of a pretrained model unchanged."""
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser it accepts unknown users
    return str(path.resolve()) if path.exists() and name not in PRETRAINED else name


def parse(argv=None):
    """Return the options of a training run; `given` holds {name: value} of the options on the command line."""
    options = make_parser().parse_args(argv)
    unset = object()
    blank = argparse.Namespace(**dict.fromkeys(vars(options), unset))
    words = vars(make_parser().parse_args(argv, blank))
    options.given = {name: value for name, value in words.items() if value is not unset}
    if options.recipe:
        check_choice("recipe", options.recipe, tuple(RECIPES), "python train_vit.py --help")
    if options.pretrain:
        unfit = ("pretrained", "class_weights", "class_names", "mixing", "label_smoothing", "freeze_backbone",
                 "distillation", *["teacher"] * (options.pretrain == "mae"))
        for name in unfit:
            if name in options.given:
                raise InputError(f"--{name.replace('_', '-')} cannot be combined with --pretrain {options.pretrain}, "
                                 f"which learns without labels from new weights; leave one of them out")
    kinds = {name: name.split("_")[0] for name, entry in MODELS.items() if entry.unlabelled}  # of --pretrain
    if options.model in MODELS and kinds.get(options.model) != options.pretrain and not options.resume:
        fit = [name for name, kind in kinds.items() if kind == options.pretrain]
        learns = f"is for --pretrain {kinds[options.model]}" if options.model in kinds else "learns from labels"
        raise InputError(f"--model {options.model} {learns}, not for --pretrain {options.pretrain}; leave --model out, "
                         f"or choose one of {', '.join(fit)}" if options.pretrain else
                         f"--model {options.model} learns without labels; add --pretrain {kinds[options.model]}")
    if options.resume and options.dry_run:
        raise InputError("--dry-run starts a new run and cannot resume one; leave out --resume")
    if options.freeze_backbone and options.layer_decay:
        raise InputError("--layer-decay cannot be combined with --freeze-backbone, which trains only the last layer; "
                         "leave one of them out")
    if options.freeze_backbone and not options.pretrained and not options.resume:
        raise InputError("--freeze-backbone needs trained weights to freeze; add --pretrained NAME or PATH")
    if options.freeze_backbone and options.grad_checkpointing:
        raise InputError("--grad-checkpointing cannot be combined with --freeze-backbone, which needs no backward pass "
                         "through the layers; leave one of them out")
    if options.freeze_backbone and options.teacher:
        raise InputError("--teacher cannot be combined with --freeze-backbone, which trains on features instead of "
                         "images; leave one of them out")
    if options.distillation and not options.teacher and not options.resume:
        raise InputError(f"--distillation {options.distillation} needs a teacher; add --teacher NAME or PATH, or leave "
                         f"it out")
    if options.teacher and not options.distillation and not options.pretrain:
        options.distillation = DEFAULT_DISTILLATION
    for name in ("model", "patch_size"):
        if options.pretrained and getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} cannot be combined with "
                             f"--pretrained, which fixes the model; leave it out")
    if options.n_heads and not options.pretrained and not options.resume:
        raise InputError(f"--n-heads {options.n_heads} is for the file of --pretrained; add --pretrained, or leave "
                         f"--n-heads out")
    return options


def _as_words(options):
    """Return the options that differ from the defaults, as words of a command."""
    defaults, words = vars(make_parser().parse_args([])), []
    for name, value in options.items():
        if value != defaults[name]:
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def command(*words):
    """Return a command of this script as it would be typed, with torchrun if there are several processes."""
    start = ["python"] if n_processes() == 1 else ["torchrun", f"--nproc-per-node={n_processes()}"]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([*start, "train_vit.py", *map(str, words)])


def _command_of(options, n_steps):
    """Return the command that repeats a run exactly, with the number of steps instead of minutes."""
    left_out = ("minutes", "epochs", "steps", "output_dir", "resume", "save_minutes", "dry_run")
    return command(*_as_words({name: value for name, value in options.items() if name not in left_out}),
                   "--steps", n_steps)


# ---- python train_vit.py evaluate -------------------------------------------------------------------------

# What the images of a loader are, by DatasetLoader.split: (word before their number, noun, remark).
SPLITS = {
    "test": ("", "test image", ""),
    "val": ("", "validation image", ", because there are no test images; if the best epoch was chosen on them, the "
                                    "accuracy is slightly optimistic"),
    "held out": ("", "validation image", "; the best epoch was chosen on them, so the accuracy is slightly optimistic"),
    "all": ("all ", "image", "; if the model was trained on some of them, the accuracy is too high"),
}


def evaluate_command(argv=None):
    """Run `train_vit.py evaluate`."""
    parser = _make_command_parser("evaluate", "--checkpoint FILE [options]", """\
Measure the accuracy of a model on a set of images, and write a confusion
matrix and the worst mistakes into a folder.

The images are the first of these that exist: the test images; the validation
images; the images of this folder that the training run held out; all images.

example:
  python train_vit.py evaluate --checkpoint runs/NAME/best.pt --data-dir photos""")
    group = _add_checkpoint(parser)
    group.add_argument("--data-dir", default=DEFAULT_DATA_DIR, metavar="FOLDER", help="folder with one subfolder "
                       "of images per class, or a known data set (default: %(default)s; if it does not exist, drawn "
                       "shapes)")
    group.add_argument("--output-dir", metavar="FOLDER", help="new folder for the results (default: "
                       "runs/evaluation-<data>-<n>)")
    group.add_argument("--dataset", default="auto", metavar="NAME", help=f"{', '.join(DATASETS)} (default: "
                       f"%(default)s, detected in --data-dir)")
    group.add_argument("--skip-corrupt", action="store_true", help="skip image files that cannot be read, and report "
                       "them")
    _add_help(group)
    _add_file_options(parser)
    group = _add_device(parser)
    group.add_argument("--batch-size", type=int_at_least(1), default=64, metavar="N", help="images per forward pass "
                       "(default: %(default)s)")
    group.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help=AMP_HELP)
    group.add_argument("--num-workers", "--workers", type=int_at_least(0), metavar="N", help=WORKERS_HELP)
    evaluate(parser.parse_args(argv))


def evaluate(options):
    """Evaluate a checkpoint, write the results into a folder, and return what is in its result.json."""
    device = choose_device(options.device)
    model = load(options.checkpoint, **chosen(options, "n_heads", "class_names"))
    check_has_head(model)
    loader = _evaluation_loader(model, options)
    with unless_empty(new_output_dir(options.output_dir, "evaluation", loader.dataset_name)) as folder:
        found = score(model, loader, device, options.amp)
    print(_describe_score(found, loader, options.data_dir))
    report_skipped(sorted(map(str, loader.skipped)))
    heading = f"accuracy {percent(found.correct, found.n)}\n{counted(found.n, 'image')}"
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
    """Return a loader of the images to score a model on, preprocessed as in its training."""
    shown = adapt(model).preprocessing
    shown_as = dict(workers=options.num_workers, preprocessing=model.preprocessing, skip_corrupt=options.skip_corrupt,
                    in_channels=adapt(model).in_channels)
    images = (options.data_dir, shown.class_names, options.batch_size, shown.img_size, options.dataset)
    cut, known = _training_cut(options.checkpoint, options.data_dir)
    loader = get_evaluation_loader(*images, **shown_as, **cut)
    if loader.split == "held out" and known not in (None, _fingerprint(loader)):
        print("The images of the folder have changed since the training, so it is unknown which were held out of it.")
        loader = get_evaluation_loader(*images, **shown_as)
    return loader


def _training_cut(checkpoint, data_dir):
    """Return (loader arguments, fingerprint of the held-out images) of the run that trained on this folder.

    They are ({}, None) if the checkpoint does not record that it was trained on this folder.
    """
    entries = read_file(checkpoint) if Path(checkpoint).is_file() else {}  # the training of a named model is unknown
    training = entries.get("options") or {}
    folders = [Path(folder).expanduser().resolve() for folder in (data_dir, training.get("data_dir", data_dir))]
    if "data_dir" not in training or folders[0] != folders[1]:
        return {}, None
    cut = {name: training[name] for name in ("val_fraction", "seed") if name in training}
    return dict(cut, held_out=True), entries.get("validation_files")


def _test_fingerprint(data):
    """Return the fingerprint of the names of the current test images, or None if there are no such files."""
    if choose_set(data["data_dir"], data["dataset"], None) != "folder":
        return None
    folder = FolderSet(data["data_dir"])
    if "test" not in folder.folders:
        return None
    return _fingerprint_of(folder.images("test", folder.class_names("train"))[0])


def _fingerprint(loader):
    """Return a checksum of the names of a loader's files, skipped ones included, or None if it has no files."""
    return None if loader.files is None else _fingerprint_of({*map(str, loader.files), *map(str, loader.skipped)})


def _fingerprint_of_weights(model):
    """Return a checksum of a model's weights and preprocessing, or None without a model."""
    if model is None:
        return None
    checksum = hashlib.sha256(repr(model.preprocessing).encode(errors="surrogateescape"))
    for name, tensor in model.state_dict().items():
        checksum.update(name.encode())
        checksum.update(tensor.contiguous().numpy().tobytes())
    return checksum.hexdigest()


def _fingerprint_of(files):
    names = sorted(map(str, files))
    ends = "\n".join("/".join(Path(name).parts[-2:]) for name in names)
    return hashlib.sha256(ends.encode(errors="surrogateescape")).hexdigest()


def _describe_score(found, loader, data_dir):
    """Return a Score as lines of text."""
    n_seen = (found.confusion.sum(dim=1) > 0).sum().item()
    before, noun, remark = SPLITS.get(loader.split, ("", "image", ""))
    lines = [f"{_data_name(loader, data_dir)}: {before}{counted(found.n, noun)}{remark}"]
    if loader.skipped:
        lines.append(f"skipped: {counted(len(loader.skipped), 'image file')} that cannot be read")
    lines += [f"accuracy           {percent(found.correct, found.n)}, {found.correct:,} correct (95% Wilson interval)",
              f"balanced accuracy  {found.balanced_accuracy:.1%}, the mean of the recalls of {n_seen} classes"]
    if n_seen < len(found.class_names):
        lines[-1] += f"; the other {len(found.class_names) - n_seen} have no images here"
    if found.top5 is not None:
        lines.append(f"top-5 accuracy     {found.top5:.1%}")
    places, heading = range(len(found.class_names)), "recall of each class:"
    if n_seen > 20:
        places = class_recalls(found.confusion).argsort(stable=True)[:20].tolist()  # classes without images come last
        heading = "the 20 classes with the lowest recall:"
    classes = _per_class(found)
    shown = [classes[place] for place in places if classes[place][1]]
    width = max(len(name) for name, _, _ in shown)
    return "\n".join([*lines, heading, *(f"  {name:{width}}  {correct / n:6.1%}  {correct:,} of {n:,}"
                                         for name, n, correct in shown)])


def _per_class(found):
    """Return (name, images, correct predictions) of each class of a Score."""
    return list(zip(found.class_names, found.confusion.sum(dim=1).tolist(), found.confusion.diagonal().tolist(),
                    strict=True))


def _write_rows(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _write_mistakes(found, loader, folder):
    """Write mistakes.csv and, if there are mistakes, mistakes.png."""
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
    """Return 'true: predicted 98%' in lines that fit above a small image."""
    true, predicted = (textwrap.fill(_drawable(name), 14, max_lines=2, placeholder="…") for name in (true, predicted))
    return f"{true}:\n{predicted}\n{probability:.0%}"


def _drawable(name):
    """Return a name in which characters that the font of the figures lacks are written like U+9CE5."""
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return "".join(sign if font.get_char_index(ord(sign)) else f"U+{ord(sign):04X}" for sign in name)


# ---- python train_vit.py predict --------------------------------------------------------------------------


def predict_command(argv=None):
    """Run `train_vit.py predict`."""
    parser = _make_command_parser("predict", "--checkpoint FILE IMAGE [IMAGE ...] [options]", """\
Name the most probable classes of images, one line per file. Files that cannot
be read are named on stderr; the others are classified, and the exit code is 2.

example:
  python train_vit.py predict --checkpoint runs/NAME/best.pt a.jpg folder""")
    group = _add_checkpoint(parser)
    group.add_argument("images", nargs="+", metavar="IMAGE", help="image file, or a folder with image files at any "
                       "depth; hidden files are ignored")
    group.add_argument("--top", type=int_at_least(1), default=3, metavar="N", help="number of classes to name "
                       "(default: %(default)s)")
    group.add_argument("--json", action="store_true", help='print a JSON list of {"file", "predictions": [{"class", '
                       '"probability"}]} or {"file", "error"}')
    _add_help(group)
    _add_file_options(parser)
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
    """Yield {"file", "predictions"} or {"file", "error"} for each file, reading a batch at a time."""
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
    """Return a file as the model's input, (1, C, H, W)."""
    check_not_empty(file)
    return prepare_image(file, model)[0]


def _in_words(predictions):
    return ", ".join(f"{entry['class']} {entry['probability']:.1%}" for entry in predictions)


# ---- python train_vit.py export ---------------------------------------------------------------------------


def export_command(argv=None):
    """Run `train_vit.py export`."""
    parser = _make_command_parser("export", "--checkpoint FILE [options]", """\
Write a model as one ONNX file, for programs without PyTorch, and compare its
logits with the model's. This needs the packages onnx and onnxscript.

example:
  python train_vit.py export --checkpoint runs/NAME/best.pt""")
    group = _add_checkpoint(parser)
    group.add_argument("--output", metavar="FILE", help="new file (default: the checkpoint's name with .onnx)")
    _add_help(group)
    _add_file_options(parser)
    options = parser.parse_args(argv)
    path = Path(options.output or Path(options.checkpoint).with_suffix(".onnx"))
    if path.exists():
        raise InputError(f"{path} already exists; choose a different name with --output, or remove the file")
    model = load(options.checkpoint, **chosen(options, "n_heads", "class_names"))
    difference = export_onnx(model, path)
    height, width = pair(model.config.img_size)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; images (batch, {model.config.in_channels}, {height}, {width}) "
          f"to logits (batch, {model.config.n_classes}); largest difference from the model {difference:.1e} of the "
          f"largest logit")


# ---- python train_vit.py inspect --------------------------------------------------------------------------


def inspect_command(argv=None):
    """Run `train_vit.py inspect`."""
    parser = _make_command_parser("inspect", "[FILE] [options]", """\
Describe a checkpoint: what it is, and whether and how it would load. Without a
file, list the pretrained models.

examples:
  python train_vit.py inspect
  python train_vit.py inspect runs/NAME/best.pt""")
    group = parser.add_argument_group("options")
    group.add_argument("file", nargs="?", metavar="FILE", help="checkpoint of this project, of timm, torchvision, "
                       "transformers, Google (.npz), DeiT, DINO or MAE, or a folder of transformers or timm")
    add_n_heads(group)
    _add_help(group)
    options = parser.parse_args(argv)
    if options.file in PRETRAINED and not Path(options.file).exists():
        raise InputError(f"{options.file} is the name of a pretrained model; expected a file. "
                         f"load({options.file!r}) builds that model")
    print(describe_checkpoint(options.file, **chosen(options, "n_heads")) if options.file else describe_pretrained())


# ---- What the commands share ------------------------------------------------------------------------------


def _make_command_parser(name, words, description):
    return OneLineParser(prog=f"train_vit.py {name}", usage=f"python train_vit.py {name} {words}", add_help=False,
                         description=description, formatter_class=HelpFormatter)


def _add_help(group):
    group.add_argument("-h", "--help", action="help", help="show this text and exit")


def _add_checkpoint(parser):
    """Add the group of everyday options, with --checkpoint, and return it."""
    group = parser.add_argument_group("everyday options")
    group.add_argument("--checkpoint", required=True, metavar="FILE", help="best.pt of a run, which records "
                       "classes, image size and normalisation; a pretrained model's name, or a file or folder of "
                       "another library")
    return group


def _add_file_options(parser):
    """Add the group of options that describe a file of another library."""
    group = parser.add_argument_group("files of other libraries")
    add_n_heads(group)
    add_class_names(group)


def _add_device(parser):
    """Add the group of options about devices, with --device, and return it."""
    group = parser.add_argument_group("devices, memory and speed")
    group.add_argument("--device", default="auto", help=DEVICE_HELP)
    return group


COMMANDS = dict(evaluate=evaluate_command, predict=predict_command, export=export_command,
                inspect=inspect_command)


def main(argv=None):
    """Train a model, or run the command that is the first word of argv."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
        return
    if argv and argv[0][:1] != "-":
        close = closest_names(argv[0], COMMANDS, 1)
        found = f"--data-dir {argv[0]}" if Path(argv[0]).is_dir() else close[0] if close else ""
        raise InputError(f"command {argv[0]!r} is unknown; " + (
            f"did you mean {found}?" if found else f"expected {', '.join(COMMANDS)}, or training options"))
    options = parse(argv)
    if options.dry_run and options.output_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            options.output_dir = folder
            train(options)
        print("Dry run: all parts ran; its files were deleted.")
    else:
        train(options)


if __name__ == "__main__":
    script(main)
