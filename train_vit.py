"""The training command, for one's own images.

    python train_vit.py                                         the built-in shapes, about 2 minutes
    python train_vit.py --data-dir photos --minutes 10          a folder of images, a class a folder
    python train_vit.py --model convnet --epochs 20 --lr 1e-3   the same with a CNN
    python train_vit.py --data-dir photos --pretrained deit_tiny_patch16_224    fine-tuning
    python train_vit.py --resume runs/NAME                      goes on with a run that was cut
    torchrun --nproc-per-node=2 train_vit.py ...                several GPUs, or processes
    python train_vit.py --dry-run                               two steps of everything, nothing kept

    python train_vit.py evaluate --checkpoint runs/NAME/best.pt --data-dir photos
    python train_vit.py predict --checkpoint runs/NAME/best.pt a.jpg b.jpg
    python train_vit.py export --checkpoint runs/NAME/best.pt
    python train_vit.py inspect FILE                            what a checkpoint is, and how it would load

A run leaves runs/NAME/ with config.json, history.csv, result.json, best.pt, last.pt, curves.png and, where the model
has attention, attention.png. Checkpoints open with vit_bridge.weights.checkpoints.load_model.

Shapes:  S side of an image in pixels.
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
from dataclasses import asdict, replace
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
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from visualizations import plot_images, visualize_attention_grid
from vit_bridge.analysis.cost import count_parameters
from vit_bridge.analysis.metrics import class_recalls, percent, wilson_interval
from vit_bridge.cli import Bounded, OneLineParser, int_at_least, positive, script, seed
from vit_bridge.data.augmentation import FLIPS, MIXINGS, Augmentation, mix_seed
from vit_bridge.data.datasets import DATASETS, DEFAULT_DATA_DIR, TORCHVISION_SETS, choose_set
from vit_bridge.data.images import prepare_image
from vit_bridge.data.loaders import MemoryLoader, get_data_loaders, get_evaluation_loader, get_test_loader
from vit_bridge.errors import InputError, check_choice, check_int
from vit_bridge.inference import Mirrored, batches_of, check_has_head, export_onnx, predict, ranked, score
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.registry import MODELS, build_model, whiten_first_layer, whitening_layer
from vit_bridge.plots.charts import plot_confusion, plot_training_curves, save_figure
from vit_bridge.preprocessing import SMALL_SIDE
from vit_bridge.runtime import (
    OutOfMemory,
    choose_device,
    choose_precision,
    evaluating,
    explain_out_of_memory,
    processes,
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
from vit_bridge.training.config import RECIPES, Recipe, choose_recipe
from vit_bridge.training.linear_probe import feature_loaders, linear_classifier
from vit_bridge.training.objectives import ClassificationMetrics, CrossEntropy, balancing_weights
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
    Saver,
    changes_since,
    device_to_resume,
    folder_to_resume,
    holds_run,
    lock_folder,
    on_cpu,
    options_to_resume,
    read_run,
)
from vit_bridge.weights.checkpoints import describe_checkpoint, load_model, one_side, read_checkpoint
from vit_bridge.weights.pretrained import PRETRAINED, create_pretrained, describe_pretrained
from vit_model import VisionTransformer, allow_any_size, freeze_backbone, pair

__all__ = ["Trainer", "get_data_loaders", "predict"]
HISTORY = ("train_loss", "train_acc", "val_loss", "val_acc", "val_balanced_acc", "lr", "seconds", "images_per_second")
CHECK_EVERY = 10  # steps between two looks at whether all is finite, where looking makes the CPU wait for a GPU


class NotFinite(InputError):
    """Loss or gradient ceased to be finite numbers."""


class Stopped(Exception):
    """A training was asked to stop; `state`, a TrainState, says where it stands."""

    def __init__(self, state):
        super().__init__(f"stopped after step {state.step}")
        self.state = state


# ---- The recipe of a step ---------------------------------------------------------------------------------


def set_train_mode(model):
    """model.train(), but what is wholly frozen stays in eval mode: no dropout there, batch statistics kept. Where
    nothing but the last layer is trained, so do layers without parameters, such as the dropout after the positions."""
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


# ---- The Trainer ------------------------------------------------------------------------------------------


class Trainer:
    """Trains any module that maps images (B, ...) to logits (B, C).

    device     "auto", "cpu", "cuda", "cuda:N" or "mps"; the model is moved there
    loss_fn    (logits, labels) -> a scalar, the mean over the images; None: cross-entropy with label smoothing 0.1. It
               serves training and evaluation alike, so that the two curves can be compared
    amp        "auto", "off", "bf16" or "fp16", as choose_precision has it
    clip_norm  the gradient's largest norm
    accumulate every batch goes through the model in so many parts, one after the other: the same step with less memory
               (but see differences())
    compile    trains through torch.compile

    After train(), `data_share` is the share of the training seconds that went to fetching and augmenting images;
    on CUDA only what the CPU waited for is counted. `average` is the average of the weights, where one was asked for.
    """

    def __init__(self, model, device="auto", loss_fn=None, amp="auto", clip_norm=1.0, accumulate=1, compile=False):
        check_int("accumulate", accumulate, 1)
        self.device = choose_device(device)
        self.dtype = choose_precision(amp, self.device)
        self.model = model.to(self.device)
        self.loss_fn = loss_fn or CrossEntropy(label_smoothing=0.1)
        if isinstance(self.loss_fn, nn.Module):
            self.loss_fn.to(self.device)
        self.clip_norm, self.accumulate, self.compile = clip_norm, accumulate, compile
        parallel = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
        self.parallel, self.average, self.data_share = None, None, 0.0

    def train(self, train_loader, val_loader=None, n_epochs=10, learning_rate=1e-3, weight_decay=0.05,
              warmup_epochs=None, n_steps=None, *, seed=None, lr_scales=None, ema_decay=None, resume=None,
              on_batch=None, on_epoch=None, on_save=None, save_every=180.0, progress=True, optimizer="adamw",
              schedule="cosine", mixing=None, low=None):
        """The learning rate is warmed up and then let down, step by step.

        train_loader   gives (images, labels) batches, has len(); set_position(epoch, batch) or set_epoch(epoch),
                       set_share(rank, n_ranks) and to(device) are called where it has them
        val_loader     evaluated after every epoch; None leaves NaN in its columns
        warmup_epochs  None: a twentieth of the run
        n_steps        ends the run after so many steps, whatever n_epochs says; the last epoch may be a part
        seed           of dropout, step by step; None: one number drawn from torch's generator, which is otherwise left
                       as it was
        rate_factors   as parameter_groups has it
        ema_decay      keeps an average of the weights (update_average), which is then what is evaluated; None: none
        resume         what state_dict() of an earlier TrainState gave: the training goes on from there, exactly,
                       given the same arguments
        on_batch       called as on_batch(state) between two batches, of evaluation too; if it returns True, Stopped
                       is raised, with a state that can be resumed
        on_epoch       called as on_epoch(state) after every epoch; state.history is the history so far
        on_save        called as on_save(state) between two batches, every save_every seconds (of the first process's
                       clock), with a state that can be resumed
        progress       a bar with loss, accuracy, images a second and the time left
        optimizer      "adamw", or "muon", as make_optimizer has them
        schedule       "cosine" or "linear", as learning_rate_at has them
        mixing         (images, labels) -> (images, answers (B, C)), such as Mixing; the accuracy is then of the class
                       with the larger share
        low            (side, share): for this share of the steps images are made smaller, to side x side pixels, which
                       the model must take; big steps first in little time, as in Howard's fast.ai entry to DAWNBench
                       (2018). None: never

        Returns the history, a list for each of HISTORY with an entry an epoch: losses, accuracies from 0 to 1 (the
        balanced one is the mean of the classes'), the last learning rate, the seconds spent training and the images a
        second. Raises InputError for numbers out of range, where loss or gradient are not finite (with fp16: where no
        scale of the gradient helps), and where memory does not suffice.
        """
        check_choice("schedule", schedule, SCHEDULES)
        n_steps, warmup_steps = self.plan(train_loader, n_epochs, n_steps, warmup_epochs, learning_rate, weight_decay)
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        check_int("seed", seed, 0)
        forward = self.model
        if self.world_size > 1:
            # it gives all processes the first one's weights, before a copy of them is made for the average
            forward = nn.parallel.DistributedDataParallel(
                self.model, device_ids=[self.device] if self.device.type == "cuda" else None)
        self.parallel = forward
        state = TrainState(self, weight_decay, lr_scales, ema_decay, optimizer)
        if resume is not None:
            state.load_state_dict(resume)
        if self.compile:
            forward = torch.compile(forward)
        self.give_share(train_loader)
        run = Run(n_steps, warmup_steps, learning_rate, seed, forward, on_batch, on_save, save_every, schedule,
                  mixing, low)
        with (torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
              tqdm(total=n_steps, initial=state.step, unit="step", disable=not progress or self.rank > 0,
                   leave=False) as bar):
            while state.step < n_steps or state.batch:
                self.train_epoch(train_loader, state, run, bar)
                self.end_epoch(val_loader, state, run)
                if on_epoch:
                    on_epoch(state)
        self.average = state.average
        self.data_share = state.data_seconds / sum(state.history["seconds"])
        return state.history

    @staticmethod
    def plan(train_loader, n_epochs, n_steps, warmup_epochs, learning_rate, weight_decay):
        """(n_steps, warmup_steps) of a run, after a look at every number."""
        check_int("n_epochs", n_epochs, 1)
        if not 0 < learning_rate < math.inf:
            raise InputError(f"learning_rate {learning_rate} is out of range; expected a positive number such as 1e-3")
        if not 0 <= weight_decay < math.inf:
            raise InputError(f"weight_decay {weight_decay} is out of range; expected 0 or a positive number")
        if warmup_epochs is not None and not 0 <= warmup_epochs < math.inf:
            raise InputError(f"warmup_epochs {warmup_epochs} is out of range; expected 0 or a positive number")
        if n_steps is None:
            n_steps = n_epochs * len(train_loader)
        check_int("n_steps", n_steps, 1)
        warmup = n_steps / 20 if warmup_epochs is None else warmup_epochs * len(train_loader)
        return n_steps, min(n_steps, math.ceil(warmup))

    def train_epoch(self, loader, state, run, bar):
        """The batches of an epoch that are left, from where the state stands."""
        set_train_mode(self.model)
        batches = batches_from(loader, len(state.history["lr"]), state.batch)
        batches = itertools.islice(batches, run.n_steps - state.step)
        while True:
            started = time.perf_counter()
            with explain_out_of_memory(self.device, getattr(loader, "batch_size", "its")):
                batch = next(batches, None)
            fetched = time.perf_counter()
            images, labels = self.share_of(batch, loader) if batch is not None else (None, ())
            n_all = self.pause(state, run, len(labels))
            if batch is None:
                break
            resumed = time.perf_counter()
            state.rate = learning_rate_at(state.step, run.n_steps, run.warmup_steps, run.peak, run.schedule)
            if n_all:
                torch.manual_seed(mix_seed(run.seed, state.step, self.rank))
                with explain_out_of_memory(self.device, len(labels), self.accumulate, training=True):
                    self.step(images, labels, n_all, state, run)
            state.step, state.batch = state.step + 1, state.batch + 1
            bar.update()
            if state.step % 10 == 0 and not bar.disable:
                summary = state.metrics.summary(state.seconds + time.perf_counter() - resumed)
                bar.set_postfix(epoch=len(state.history["lr"]) + 1, refresh=False, **summary)
            state.data_seconds += fetched - started
            state.seconds += fetched - started + time.perf_counter() - resumed
        started = time.perf_counter()
        state.check(run.n_steps)  # which waits for a GPU to finish: that belongs to the training's time
        state.seconds += time.perf_counter() - started

    def pause(self, state, run, n_own=0):
        """Between two batches: stops or saves where one process wishes it, all of them alike. Returns how many images
        all processes have in their next batch, given this one's."""
        stop = bool(run.on_batch and run.on_batch(state))
        due = self.rank == 0 and run.on_save is not None and time.perf_counter() - run.saved_at >= run.save_every
        n_all, stops, saves = self.sums(n_own, stop, due and state.is_finite())
        if stops or saves:
            metrics = state.metrics.all_gather_object(self)
        if stops:
            state.metrics = metrics
            raise Stopped(state)
        if saves:
            state.metrics = metrics if self.rank == 0 else ClassificationMetrics(self.device)
            if run.on_save:
                run.on_save(state)
            run.saved_at = time.perf_counter()
        return int(n_all)

    def step(self, images, labels, n_all, state, run):
        """One step of the optimiser on this process's share of a batch of n_all images.

        The gradient is that of the mean loss over all n_all: each part's loss counts by its images.
        """
        state.optimizer.zero_grad(set_to_none=True)
        n_own, total = len(labels), 0.0
        if n_own == 0:  # there is nothing to learn from, but the other processes wait for this one's gradients
            images, labels = images.new_zeros(1, *images.shape[1:]), labels.new_zeros(1)
            self.model.eval()  # a made-up image leaves no trace in batch statistics
        size = math.ceil(len(labels) / self.accumulate)
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            part = run.sized(part[0], state.step), part[1]
            part = run.mixing(*part) if run.mixing else part
            with nullcontext() if last or self.world_size == 1 else self.parallel.no_sync():
                logits, answers = self.logits_of(part, run.forward)  # (b, C), (b)
                loss = self.loss_fn(logits, answers)
                share = (len(answers) if n_own else 0) * self.world_size / n_all
                state.scaler.scale(loss * share).backward()
            total += loss.detach() * share
            if n_own:  # the loss of a step that the scaler skips may be no number: it is left out of the sum
                state.metrics.add(loss.nan_to_num(0.0, 0.0, 0.0), logits, answers)
        if n_own == 0:
            set_train_mode(self.model)
        state.scaler.unscale_(state.optimizer)  # clip true gradients, not scaled ones
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        state.track_finite(norm.isfinite() & total.isfinite())
        if self.device.type == "cpu" or state.step % CHECK_EVERY == 0:
            state.check(run.n_steps)
        for group in state.optimizer.param_groups:
            group["lr"] = state.rate * group["rate_factor"]
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.average is not None:
            update_average(state.average, self.model, state.step, state.ema_decay)

    def end_epoch(self, val_loader, state, run):
        """Evaluates, and adds the epoch to the history."""
        metrics = state.metrics.all_gather_object(self)
        if not metrics.n:
            raise InputError("the training loader gave no images; expected at least one batch")
        val = dict(loss=math.nan, acc=math.nan, balanced_acc=math.nan)
        if val_loader is not None:
            val = self.evaluate(val_loader, state.average, state, run)
            if not math.isfinite(val["loss"]):
                raise NotFinite(f"the validation loss is {val['loss']} after step {state.step} of {run.n_steps}, "
                                f"learning rate {state.rate:.3g}; try a lower learning rate or a longer warm-up")
        entries = (metrics.loss.item() / metrics.n, metrics.correct / metrics.n, val["loss"], val["acc"], val["balanced_acc"],
                   state.rate, state.seconds, metrics.n / state.seconds)
        for name, value in zip(HISTORY, entries, strict=True):
            state.history[name].append(value)
        state.batch, state.seconds, state.metrics = 0, 0.0, ClassificationMetrics(self.device)

    @torch.no_grad()
    def evaluate(self, loader, model=None, state=None, run=None):
        """A loader's images in eval mode, each counted once: dict(loss, acc, balanced_acc, correct, n), accuracies
        from 0 to 1; the balanced one is the mean of those of the classes that have images.

        model: another than the Trainer's own, on its device. state, run: of the training that this belongs to.
        """
        model = self.model if model is None else model
        self.give_share(loader)
        if self.world_size > 1:
            for buffer in model.buffers():  # batch statistics are those of the first process everywhere
                dist.broadcast(buffer, 0)
        metrics = ClassificationMetrics(self.device)
        with evaluating(model):
            for batch in loader:
                images, labels = self.share_of(batch, loader)
                if run is not None:
                    self.pause(state, run)
                if len(labels):
                    with explain_out_of_memory(self.device, len(labels)):
                        logits, labels = self.logits_of((images, labels), model)
                        metrics.add(self.loss_fn(logits, labels), logits, labels)
        metrics = metrics.all_gather_object(self)
        if not metrics.n:
            raise InputError("the loader gave no images to evaluate; expected at least one batch")
        return dict(loss=metrics.loss.item() / metrics.n, acc=metrics.correct / metrics.n, balanced_acc=metrics.balanced,
                    correct=metrics.correct, n=metrics.n)

    def logits_of(self, batch, forward):
        """(logits in float32, labels) of a batch, on the device. Raises InputError for labels past the head."""
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = forward(images)  # (b, C)
        if labels.ndim == 1 and labels.device.type == "cpu" and labels.max() >= logits.shape[1]:
            raise InputError(f"label {int(labels.max())} has no place among the model's {logits.shape[1]} classes; "
                             f"build the model with n_classes={int(labels.max()) + 1} or more")
        return logits.float(), labels

    def batch_split_warning(self, mixing=None):
        """In words, where this training, with the mixing that train() will get, differs from one process with whole
        batches; "" where it does not."""
        if self.world_size == 1 and self.accumulate == 1:
            return ""
        modules = list(self.model.modules())
        reasons = []
        if any(isinstance(module, _BatchNorm) for module in modules):
            reasons.append("batch statistics are taken of each part alone")
        rates = [module.p for module in modules if isinstance(module, _DropoutNd)]
        if any(rates + [getattr(module, "rate", 0) for module in modules if type(module).__name__ == "DropPath"]):
            reasons.append("dropout is drawn for each part")
        if mixing is not None:
            reasons.append("images are mixed within each part")
        if self.dtype is not None:
            reasons.append(f"sums in {str(self.dtype).removeprefix('torch.')} are rounded part by part")
        ways = [f"over {self.world_size} processes"] * (self.world_size > 1)
        ways += [f"in {self.accumulate} parts"] * (self.accumulate > 1)
        split = f"batches split {' and '.join(ways)}"
        return f"{split}: the losses will not be those of whole batches, as {'; '.join(reasons)}" if reasons else ""

    # ---- Several processes ----

    def give_share(self, loader):
        """Moves a loader to the device, and tells it its share of the batches, where it can take one."""
        if hasattr(loader, "to"):
            loader.to(self.device)
        if hasattr(loader, "set_shard"):
            loader.set_shard(self.rank, self.world_size)

    def share_of(self, batch, loader):
        """This process's part of a batch: every R-th image, unless the loader gave no other."""
        if self.world_size == 1 or hasattr(loader, "set_shard"):
            return batch
        return tuple(tensor[self.rank::self.world_size] for tensor in batch)

    def sums(self, *numbers):
        """Each number summed over the processes, whose group needs gloo beside nccl: "cpu:gloo,cuda:nccl"."""
        if self.world_size == 1:
            return numbers
        numbers = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(numbers)
        return numbers.tolist()


class Run:
    """What a call of Trainer.train() keeps from its arguments."""

    def __init__(self, n_steps, warmup_steps, peak, seed, forward, on_batch, on_save, save_every, schedule, mixing,
                 low):
        self.n_steps, self.warmup_steps, self.peak, self.seed, self.forward = n_steps, warmup_steps, peak, seed, forward
        self.schedule, self.mixing, self.low = schedule, mixing, low
        self.on_batch, self.on_save, self.save_every, self.saved_at = on_batch, on_save, save_every, time.perf_counter()

    def sized(self, images, step):
        """images (B, C, height, width) as this step has them."""
        if self.low is None or step >= self.low[1] * self.n_steps:
            return images
        side = self.low[0]
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True)  # (B, C, side, side)


class TrainState:
    """Where a training stands: model, optimiser, scaler, average and counters.

    step      steps done; `batch` of them in the epoch that is not finished
    history   of the finished epochs; tally, seconds: of the unfinished one
    trained   the module that is evaluated and kept: the average of the weights where there is one, else the model
    """

    def __init__(self, trainer, weight_decay, lr_scales=None, ema_decay=None, optimizer="adamw"):
        self.model, self.ema_decay, self.first = trainer.model, ema_decay, trainer.rank == 0
        self.optimizer = make_optimizer(optimizer, self.model, weight_decay, lr_scales)
        self.scaler = torch.amp.GradScaler(trainer.device.type, enabled=trainer.dtype == torch.float16)
        self.average = None if ema_decay is None else copy.deepcopy(self.model).requires_grad_(False)
        self.history = {name: [] for name in HISTORY}
        self.metrics = ClassificationMetrics(trainer.device)
        self.first_nonfinite_step = torch.tensor(-1, device=trainer.device)  # the step since which something is not finite
        self.step, self.batch, self.rate, self.seconds, self.data_seconds = 0, 0, 0.0, 0.0, 0.0

    @property
    def trained(self):
        return self.model if self.average is None else self.average

    def state_dict(self):
        """Plain tensors, numbers and text, on the CPU."""
        counters = {name: getattr(self, name) for name in ("step", "batch", "rate", "seconds", "data_seconds")}
        average = None if self.average is None else self.average.state_dict()
        return on_cpu(dict(counters, model=self.model.state_dict(), average=average, tally=self.metrics.state_dict(),
                           optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                           history=copy.deepcopy(self.history)))

    def load_state_dict(self, entries):
        """Raises InputError where the entries are of another model or optimiser."""
        try:
            if (entries["average"] is None) != (self.average is None):
                raise ValueError("of one and not of the other an average was kept")
            self.model.load_state_dict(entries["model"])
            if self.average is not None:
                self.average.load_state_dict(entries["average"])
            self.optimizer.load_state_dict(copy.deepcopy(entries["optimizer"]))  # it would take the tensors themselves
            self.scaler.load_state_dict(entries["scaler"])
            if self.first:  # the processes' tallies are added up, and this one is of all of them
                self.metrics.load_state_dict(entries["tally"])
            self.history = {name: list(entries["history"][name]) for name in HISTORY}
            for name in ("step", "batch", "rate", "seconds", "data_seconds"):
                setattr(self, name, entries[name])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"the training state does not fit this training ({' '.join(str(error).split())[:200]}); "
                             f"resume with the arguments that it was saved from") from error

    def track_finite(self, sound):
        """Notes the step since which something is not finite. With a scaler, which skips such steps, a sound step
        clears the note."""
        kept = torch.where(self.first_nonfinite_step >= 0, self.first_nonfinite_step, self.step)
        clear = -1 if self.scaler.is_enabled() else self.first_nonfinite_step
        self.first_nonfinite_step = torch.where(sound, clear, kept)

    def is_finite(self):
        return self.first_nonfinite_step.item() < 0

    def check(self, n_steps):
        """Raises InputError where loss or gradient were not finite, unless the scaler may still mend it."""
        if self.is_finite() or (self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            return
        raise NotFinite(f"loss or gradient are not finite since step {self.first_nonfinite_step.item() + 1} of {n_steps}, "
                        f"learning rate {self.rate:.3g}; try a lower learning rate or a longer warm-up")


def batches_from(loader, epoch, batch):
    """The batches of an epoch from the given one on."""
    if batch and batch >= len(loader):
        return iter(())
    if hasattr(loader, "set_position"):
        loader.set_position(epoch, batch)
        return iter(loader)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    return itertools.islice(loader, batch, None)


def steps_within(seconds, model, train_loader, val_loader, optimizer="adamw", low=None, **settings):
    """How many steps, with an evaluation after every epoch, fill so many seconds: measured on a copy of the model.

    settings go to the Trainer. The measurement itself is counted in: about 3% of the time, or two steps and
    an evaluation's batch where those take longer. Of several processes each must give the same `seconds`.
    """
    started = time.perf_counter()
    trial = Trainer(copy.deepcopy(model), **settings)
    run = dict(learning_rate=1e-6, progress=False, optimizer=optimizer)
    trial.train(train_loader, n_steps=1, **run)  # the first step is slower: memory, kernels, workers
    parts = [(1.0, None)] if low is None else [(low[1], (low[0], 1.0)), (1 - low[1], None)]  # shares of the steps
    step_seconds = 0.0
    for share, sizes in parts:
        n_trial, trial_seconds = 0, 0.0
        while trial_seconds < max(1.0, 0.02 * seconds) / len(parts):
            history = trial.train(train_loader, n_steps=max(1, n_trial), low=sizes, **run)
            n_trial += max(1, n_trial)
            trial_seconds += trial.sums(sum(history["seconds"]))[0] / trial.world_size  # so all processes decide alike
        step_seconds += share * trial_seconds / n_trial
    trial.give_share(val_loader)
    eval_started = time.perf_counter()
    batches = list(itertools.islice(val_loader, 4 if step_seconds < 0.01 * seconds else 1))
    trial.evaluate(batches)
    epoch_seconds = (time.perf_counter() - eval_started) * len(val_loader) / len(batches)
    left = max(0.0, seconds - (time.perf_counter() - started))
    epochs, rest = divmod(left, len(train_loader) * step_seconds + epoch_seconds)
    n_steps = max(1, int(epochs) * len(train_loader) + int(max(0.0, rest - epoch_seconds) / step_seconds))
    return int(trial.sums(n_steps if trial.rank == 0 else 0)[0])


WHITENED_BY = 2000  # images from which a first layer is whitened
MINUTES = 2  # of a training whose length is not given
HEAD_EPOCHS = 100  # of --freeze-backbone, whose epochs take a moment
LINEAR_IMAGES = 20_000  # at most, from which the linear classifier beside a test learns
UNEVEN = 2  # classes are called uneven where the largest has so many times the images of the smallest


# ---- The arguments ----------------------------------------------------------------------------------------


def make_parser():
    parser = OneLineParser(
        prog="train_vit.py", description="Trains a model on images.",
        epilog="train_vit.py evaluate, predict and export, each with --help, take a checkpoint that a run left.")
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", default="./data", help="a folder with a folder for each class, or a known set "
                                                           "(default: %(default)s, without which shapes are drawn)")
    data.add_argument("--dataset", default="auto", help="auto, shapes, folder, cifar10, cifar100, mnist, fashion-mnist")
    data.add_argument("--img-size", type=int_at_least(1), help="side in pixels (default: that of the pretrained model; small "
                                                        "images keep theirs, else 224)")
    data.add_argument("--batch-size", type=int_at_least(1), help="images of a step, over all processes")
    data.add_argument("--val-fraction", type=float, default=0.1, help="cut from the training images without val/")
    data.add_argument("--workers", type=int_at_least(0), help="processes that read photographs (default: one for each core, "
                                                       "at most 8)")
    data.add_argument("--skip-corrupt", action="store_true", help="leave out image files that cannot be read, and say "
                                                                  "how many")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help=f"one of {', '.join(MODELS)} (default: vit_nano up to 64 pixels, else vit_tiny)")
    model.add_argument("--patch-size", type=int_at_least(1), help="side in pixels (default: 4 up to 64 pixels, 8 up to 128, "
                                                           "16 above)")
    model.add_argument("--drop-path", type=float, help="stochastic depth of the last block (default: the model's own)")
    model.add_argument("--pretrained", metavar="NAME|PATH", help=f"start from the weights of one of "
                       f"{', '.join(PRETRAINED)}, or of a checkpoint file")
    model.add_argument("--freeze-backbone", action="store_true", help="train the head alone, on features that are "
                                                                      "computed once, without augmentation")
    model.add_argument("--layer-decay", type=Bounded(float, 0.01, 1, "0.01 to 1"), help="each layer's learning rate "
                       "is this times that of the layer after it (fine-tuning: about 0.75)")
    recipe = parser.add_argument_group("recipe", "What is not given is as the recipe has it.")
    recipe.add_argument("--recipe", help=f"one of {', '.join(RECIPES)} (default: chosen by model, image size and "
                                         f"minutes, and printed)")
    recipe.add_argument("--optimizer", choices=OPTIMIZERS)
    recipe.add_argument("--lr", type=positive(), help="the peak of the learning rate")
    recipe.add_argument("--weight-decay", type=Bounded(float, 0, sys.float_info.max, "0 or more"))
    recipe.add_argument("--schedule", choices=SCHEDULES, help="how the learning rate falls")
    recipe.add_argument("--warmup-epochs", type=Bounded(float, 0, sys.float_info.max, "0 or more"),
                        help="(default: a twentieth of the run)")
    recipe.add_argument("--label-smoothing", type=Bounded(float, 0, 1, "0 to 1"))
    recipe.add_argument("--shift", type=Bounded(float, 0, 0.5, "0 to 0.5"), help="share of the side by which small "
                                                                                 "images are shifted at most")
    recipe.add_argument("--flip", choices=FLIPS, help="how small images are mirrored")
    recipe.add_argument("--cutout", type=Bounded(float, 0, 2, "a share of the image's side, 0 to 2: 0.25 is 8 of 32 "
                                                              "pixels"),
                        help="share of the side of a small image that a hidden square has")
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
    run.add_argument("--accumulate", type=int_at_least(1), default=1, help="parts in which a batch goes through the model, "
                                                                    "for less memory (default: %(default)s)")
    run.add_argument("--seed", type=seed(), default=0)
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    run.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="mixed precision")
    run.add_argument("--compile", action="store_true", help="train through torch.compile")
    run.add_argument("--output-dir", help="a new folder for this run (default: runs/<model>-<data>-<n>)")
    run.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="go on with the run in this folder, "
                     "exactly where it was cut; alone, with the one in --output-dir, begun where there is none")
    run.add_argument("--save-minutes", type=positive(), default=3, help="between two writings of last.pt inside an "
                                                                        "epoch (default: %(default)s)")
    run.add_argument("--dry-run", action="store_true", help="two steps of everything; without --output-dir nothing "
                                                            "is kept")
    return parser


def parse(argv=None):
    """The options of a training; `given` among them holds those that stand on the command line, by name."""
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
        raise InputError("--layer-decay has no place beside --freeze-backbone, which trains the last layer alone; "
                         "leave one of them out")
    if options.freeze_backbone and not options.pretrained and not options.resume:
        raise InputError("--freeze-backbone freezes what was trained before; give --pretrained NAME or PATH too")
    for name in ("model", "patch_size"):
        if options.pretrained and getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} has no place beside --pretrained, "
                             f"whose model is what it was trained as; leave it out")
    return options


def as_words(options):
    """The options that differ from the defaults, as words of a command."""
    defaults, words = vars(make_parser().parse_args([])), []
    for name, value in options.items():
        if value != defaults[name]:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def command(*words):
    """A command as one would type it, with the launcher of several processes where this is one of several."""
    start = ["python"] if n_processes() == 1 else ["torchrun", f"--nproc-per-node={n_processes()}"]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([*start, "train_vit.py", *map(str, words)])


def command_of(options, n_steps):
    """The command that repeats a run exactly: its options, with the number of steps in the place of time."""
    left_out = ("minutes", "epochs", "steps", "output_dir", "resume", "save_minutes", "dry_run")
    return command(*as_words({name: value for name, value in options.items() if name not in left_out}),
                   "--steps", n_steps)


# ---- A training -------------------------------------------------------------------------------------------


def train(options):
    """One run, from the images to result.json. Returns what is in result.json, on the first process.

    options: as parse() gives them.
    """
    with processes(device_to_resume(options)) as device, Interrupts() as interrupts:
        run = TrainingRun(options, device, interrupts)
        if run.result is None:
            run.prepare()
            run.fit()
            run.finish()
        return run.result


class TrainingRun:
    """The training command, part by part. Of several processes the first alone writes; every process computes.

    options   those of the run: given now, or when a run that goes on was begun
    saved     what read_run() gives of a run that goes on, else None
    folder    of the run; its lock is held from the moment that it is known
    result    what is in result.json, once all is done
    """

    def __init__(self, options, device, interrupts):
        self.device, self.interrupts, self.started = device, interrupts, time.perf_counter()
        self.first = process_number() == 0
        self.folder = self.saved = self.lock = self.result = None
        if options.resume:
            if self.first:
                self.folder = folder_to_resume(options.resume, options.output_dir)
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = lock_folder(self.folder)
            self.folder = broadcast_object(self.folder)
            self.saved = read_run(self.folder)
            self.result = broadcast_object(complete_result(self.folder))
        known = {name: value for name, value in vars(options).items() if name != "given"}
        if self.saved:
            known = options_to_resume(options.given, before_recipes(self.saved["options"]))
        if self.saved and not self.result:
            print(f"Going on with {self.folder}.")
        if self.result:
            print(f"The run is complete; its results are in {self.folder}/result.json.")
        self.options = argparse.Namespace(**known)

    def prepare(self):
        """Images, model and Trainer, the folder, and the number of steps."""
        options = self.options
        if options.output_dir and not self.folder and holds_run(Path(options.output_dir)):
            raise InputError(f"--output-dir {options.output_dir} already holds files of a run; go on with that by "
                             f"--resume {options.output_dir}, or choose a new folder")
        torch.manual_seed(options.seed)
        start = self.pretrained_model() if options.pretrained else None
        self.train_loader, self.val_loader = self.load_data(start)
        class_names, img_size = self.train_loader.class_names, self.train_loader.img_size
        self.name = options.model or ("vit_nano" if img_size <= SMALL_SIDE else "vit_tiny")
        self.choose(img_size)
        if start is None:
            self.model = build_model(self.name, n_classes=len(class_names), img_size=img_size, **self.recipe.options)
            if self.recipe.whiten and whitening_layer(self.model) is not None:
                whiten_first_layer(self.model, first_images(self.train_loader, WHITENED_BY))
        else:
            path = Path(options.pretrained)
            self.name = path.parent.name or "best" if path.name in (BEST, LAST) else path.stem
            self.model = fit_head(start, class_names)
        if self.recipe.low:
            allow_any_size(self.model)
        weights = balancing_weights(self.train_loader.class_counts) if options.class_weights else None
        self.settings = dict(device=self.device, amp=options.amp, accumulate=options.accumulate,
                             compile=options.compile, loss_fn=CrossEntropy(self.recipe.label_smoothing, weights))
        if self.saved:
            for change in changes_since(self.saved, class_names, self.train_loader.n_images, n_processes()):
                print(f"Warning: {change}.")
        if self.first and not self.folder:
            self.folder = new_output_dir(options.output_dir, self.name, self.train_loader.dataset_name)
            self.lock = lock_folder(self.folder)
        self.folder = broadcast_object(self.folder)
        self.loaders, self.trained = (self.train_loader, self.val_loader), self.model
        if options.freeze_backbone:
            self.loaders = feature_loaders(freeze_backbone(self.model), self.loaders, self.device)
            self.trained = self.model.head
        self.trainer = Trainer(self.trained, **self.settings)
        self.describe()
        self.n_steps = self.saved["n_steps"] if self.saved else self.count_steps()
        repeat = command_of(vars(options), self.n_steps)
        print(f"{self.n_steps} steps, {self.n_steps / len(self.loaders[0]):.1f} epochs; the same run again: {repeat}")
        data_dir = Path(options.data_dir).expanduser()  # so that it is found from another folder too
        lasting = dict(vars(options), data_dir=str(data_dir.resolve()) if data_dir.exists() else options.data_dir)
        self.config = dict(options=lasting, n_steps=self.n_steps, n_images=self.train_loader.n_images, command=repeat,
                           n_processes=n_processes(), validation_files=fingerprint(self.val_loader),
                           recipe=asdict(self.recipe))
        if self.first:
            model_config = dict(vars(self.model.config), n_classes=len(class_names))
            write_json(dict(self.config, model=self.name, model_config=model_config, class_names=class_names),
                       self.folder / CONFIG)

    def choose(self, img_size):
        """Sets `recipe`, that which the run began with or a new one, and has the loaders follow it."""
        if self.saved and "recipe" in self.saved:
            self.recipe = Recipe.saved(self.saved["recipe"])
        else:
            self.recipe = self.new_recipe(img_size)
        self.data["batch_size"] = self.recipe.batch_size
        for loader in (self.train_loader, self.val_loader):
            loader.batch_size = self.recipe.batch_size
        self.train_loader.set_augmentation(self.recipe.augmentation)
        if self.in_memory:
            self.recipe = replace(self.recipe, augmentation=self.train_loader.augmentation)

    def new_recipe(self, img_size):
        """The recipe asked for, or that for these images and minutes, with what the options override."""
        options = self.options
        if not options.recipe:
            start = "head" if options.freeze_backbone else "pretrained" if options.pretrained else "new"
            precision = choose_precision(options.amp, self.device)
            options.recipe = choose_recipe(self.name, img_size, self.budget(), start, precision)
        check_choice("recipe", options.recipe, RECIPES)
        recipe = RECIPES[options.recipe]
        if recipe.model not in (None, self.name) and not options.pretrained:
            raise InputError(f"--recipe {options.recipe} is for --model {recipe.model}, and the model is {self.name}; "
                             f"give both, or another recipe")
        if img_size < recipe.smallest:
            raise InputError(f"--recipe {options.recipe} needs images of at least {recipe.smallest} pixels, these have "
                             f"{img_size}; choose a larger --img-size or another recipe")
        pixels = self.chosen("shift", "flip", "cutout")
        if pixels and not self.in_memory:
            raise InputError(f"--{next(iter(pixels))} is for small images in memory; those of more "
                             f"than {SMALL_SIDE} pixels are cropped, flipped and recoloured as they are read: leave it "
                             f"out, or give --img-size {SMALL_SIDE}")
        given = self.chosen("batch_size", "optimizer", "weight_decay", "schedule", "label_smoothing", "mixing",
                            "model_ema")
        if options.lr:
            given["learning_rate"] = options.lr
        recipe = replace(recipe, augmentation=replace(recipe.augmentation, **pixels),
                         options=recipe.options | self.chosen("patch_size", "drop_path"), **given)
        if options.pretrained:  # which is a model already
            recipe = replace(recipe, options={}, whiten=False)
        if options.freeze_backbone:  # its features are computed once, of each image as it is
            recipe = replace(recipe, augmentation=Augmentation(0.0, "none"), low=None, mixing="none")
        return recipe

    @property
    def in_memory(self):
        return isinstance(self.train_loader, MemoryLoader)

    def budget(self):
        """In minutes; None where the length is one of epochs or steps."""
        options = self.options
        in_steps = options.epochs or options.steps or (options.freeze_backbone and not options.minutes)
        return None if in_steps else options.minutes or MINUTES

    def recipe_arguments(self):
        """What the recipe tells Trainer.train."""
        patch = max(pair(getattr(self.model.config, "patch_size", 4)))
        return self.recipe.training(len(self.train_loader.class_names), self.train_loader.img_size, patch)

    def pretrained_model(self):
        """The model to start from: a run that goes on has it in last.pt, wherever it came from."""
        if self.saved and "training" in self.saved:
            return create_pretrained(str(self.folder / LAST))
        return create_pretrained(self.options.pretrained, **self.chosen("img_size", "drop_path"))

    def chosen(self, *names):
        """The options of these names that are given, as arguments."""
        return {name: value for name in names if (value := getattr(self.options, name)) is not None}

    def load_data(self, start):
        """(training loader, validation loader), normalised and resized as the pretrained model wants it."""
        options = self.options
        kind = choose_set(options.data_dir, options.dataset, None)
        self.data = dict(data_dir=options.data_dir, img_size=options.img_size,
                         dataset=options.dataset, val_fraction=options.val_fraction, seed=options.seed,
                         workers=options.workers, skip_corrupt=options.skip_corrupt,
                         **(dict(n_images=600) if options.dry_run and kind == "shapes" else {}))
        if start is not None:
            self.data |= dict(img_size=max(pair(start.img_size)), mean=start.mean, std=start.std,
                              interpolation=start.interpolation)
        if kind in TORCHVISION_SETS:  # which may have to be downloaded, once
            if not self.first:
                broadcast_object(None)
            loaders = get_data_loaders(**self.data)
            if self.first:
                broadcast_object(None)
            return loaders
        return get_data_loaders(**self.data)

    def describe(self):
        """Prints what is trained on what, and what is to be known of it."""
        train, val, trainer = self.train_loader, self.val_loader, self.trainer
        frozen = f", {count_parameters(self.trained):,} of them trained" if self.options.freeze_backbone else ""
        print(f"{self.name}: {count_parameters(self.model):,} parameters{frozen}; {train.dataset_name}: "
              f"{train.n_images:,} training and {val.n_images:,} validation images of {train.img_size} pixels, "
              f"{len(train.class_names)} classes; {self.device}, {trainer.dtype or torch.float32}")
        print(f"Recipe {self.options.recipe}: {self.recipe.describe(self.in_memory)}")
        if text := unevenness(train.class_names, train.class_counts):
            weighted = "--class-weights lets them count alike" if self.options.class_weights else \
                "look at the balanced accuracy; --class-weights would let all classes count alike"
            print(f"{text}: {weighted}.")
        if text := trainer.batch_split_warning(self.recipe_arguments()["mixing"]):
            print(f"Warning: {text}.")

    def count_steps(self):
        """The number of steps of a new run."""
        options = self.options
        if options.dry_run:
            return 2
        if options.freeze_backbone and not (options.steps or options.minutes):
            return (options.epochs or HEAD_EPOCHS) * len(self.loaders[0])
        if options.epochs or options.steps:
            return options.steps or options.epochs * len(self.loaders[0])
        spent = broadcast_object(time.perf_counter() - self.started) if options.freeze_backbone else 0.0  # on the features
        minutes = options.minutes or MINUTES
        print(f"Measuring the speed, for the number of steps in {minutes:g} minutes of training and validation ...",
              flush=True)
        n_steps = steps_within(max(1.0, 60 * minutes - spent), self.trained, *self.loaders,
                               self.recipe.optimizer, self.recipe_arguments()["low"], **self.settings)
        if n_steps < len(self.loaders[0]):
            print(f"Warning: {minutes:g} minutes are too few to see each image once ({n_steps} of "
                  f"{len(self.loaders[0])} steps); a smaller --img-size or model, or more minutes, would help.")
        return n_steps

    def fit(self):
        """The training. Raises Interrupted, with the command to go on, where a signal stopped it."""
        options, resume, loaders = self.options, self.saved and self.saved.get("training"), self.loaders
        self.saver = None
        if self.first:
            facts = ("class_names", "mean", "std", "interpolation")
            self.saver = Saver(self.folder, self.model, {name: getattr(self.train_loader, name) for name in facts},
                               self.config, options.freeze_backbone, self.criterion(), resume)
        if options.dry_run:
            loaders = loaders[0], list(itertools.islice(loaders[1], 2))
        go_on = command("--resume", self.folder)
        self.interrupts.held = True
        try:
            self.history = self.trainer.train(
                *loaders, n_steps=self.n_steps, warmup_epochs=options.warmup_epochs, seed=options.seed, resume=resume,
                **self.recipe_arguments(),
                lr_scales=layer_lr_scales(self.trained, options.layer_decay) if options.layer_decay else None,
                on_batch=self.is_interrupted, on_epoch=self.saver and self.saver.on_epoch,
                on_save=self.saver and self.saver.save, save_every=60 * options.save_minutes,
                progress=sys.stderr.isatty())
        except Stopped as stop:
            kept = stop.state.is_finite() or stop.state.scaler.is_enabled()  # a scaler skips steps that are not
            if self.saver and kept:
                self.saver.save(stop.state)
            broadcast_object(None)  # where one process ends the launcher ends the others: not before all is written
            text = f"kept at step {stop.state.step} of {self.n_steps}; go on with: {go_on}"
            raise Interrupted(self.interrupts.caught or signal.SIGTERM,
                              text if kept else "loss or gradient were no longer finite, so this state was not kept; "
                                                f"go on from the one before with: {go_on}") from None
        except InputError as error:
            raise InputError(f"{error}. {self.what_is_kept(error, go_on)}") from error
        self.interrupts.held = False
        self.interrupts.advice = f"the training is done, its test is not; go on with: {go_on}"
        if self.interrupts.caught:
            raise Interrupted(self.interrupts.caught, self.interrupts.advice)
        broadcast_object(None)  # the first process has written best.pt

    def is_interrupted(self, state):
        return self.interrupts.caught is not None

    def criterion(self):
        """The entry of the history by which the best epoch is chosen."""
        return "val_balanced_acc" if self.options.class_weights else "val_acc"

    def what_is_kept(self, error, go_on):
        """In words, what the run has on the disk after an error, and how to go on."""
        last = self.folder / LAST
        kept = f"The last good checkpoint is {last}" if last.is_file() else f"Nothing was kept yet in {self.folder}"
        if self.saver and last.is_file():
            kept += f", step {self.saver.saved_step} of {self.n_steps}"
        if isinstance(error, NotFinite):
            return kept
        return f"{kept}; go on with: {go_on}" + (f" --accumulate {error.accumulate}" if isinstance(error, OutOfMemory)
                                                  else "")

    def finish(self):
        """The test, the pictures and result.json."""
        best = load_model(self.folder / BEST)
        speed = sum(s * r for s, r in zip(self.history["seconds"], self.history["images_per_second"], strict=True))
        scores = self.history[self.criterion()]
        best_epoch = max(range(len(scores)), key=lambda i: (scores[i], i)) + 1  # as Saver has it
        seconds = self.saver.elapsed if self.first else 0.0
        result = dict(model=self.name, dataset=self.train_loader.dataset_name, seed=self.options.seed,
                      recipe=self.options.recipe, minutes=self.budget(), n_steps=self.n_steps,
                      parameters=count_parameters(self.model),
                      val_acc=self.history["val_acc"][best_epoch - 1], seconds=round(seconds, 1),
                      images_per_second=round(speed / sum(self.history["seconds"]), 1),
                      data_share=round(self.trainer.data_share, 4), device=str(self.device),
                      precision=str(self.trainer.dtype or torch.float32), torch=torch.__version__,
                      torchvision=torchvision.__version__, command=self.config["command"])
        if self.first:
            write_json(result, self.folder / "result.json")  # before the test: a bad image there loses nothing
            save_figure(plot_training_curves(self.history), self.folder / "curves.png")
        print(f"Trained in {seconds:.0f} s. Best {self.criterion()} {max(scores):.1%}, epoch {best_epoch} of "
              f"{len(scores)}.", flush=True)
        loader, split = get_test_loader(**self.data), "test"
        if loader is None:
            loader, split = self.val_loader, "val"
            print("There are no test images: the accuracies are those of the validation images, on which the best "
                  "epoch was chosen. A linear classifier comes now, to compare with ...", flush=True)
        else:
            print("Its test comes now, and a linear classifier to compare with ...", flush=True)
        if self.options.dry_run:
            loader = list(itertools.islice(loader, 2))
        trainer = Trainer(best, **self.settings)
        score = trainer.evaluate(loader)
        if self.recipe.augmentation.flip != "none":
            result[f"{split}_mirrored_acc"] = trainer.evaluate(loader, Mirrored(best))["acc"]
        skipped = [getattr(each, "skipped", {}) for each in (self.train_loader, self.val_loader, loader)]
        skipped = {file for part in all_gather_object(skipped) for files in part for file in files}
        if not self.first:
            return
        result |= self.compare(score, split, loader)
        skipped |= set(self.train_loader.skipped)
        self.result = result | dict(skipped=len(skipped))
        report_skipped(sorted(skipped))
        self.draw(best)
        write_json(self.result, self.folder / "result.json")  # last: with it the run is complete
        mirrored = result.get(f"{split}_mirrored_acc")
        if mirrored is not None:
            print(f"Each image shown mirrored too: {mirrored:.1%}.")
        print(f"{result['images_per_second']:.0f} images/s, {self.trainer.data_share:.1%} of the training time for "
              f"fetching and augmenting; {self.folder}/"
              + (" (without attention.png: this model has no attention)" if not attends(best) else ""))

    def compare(self, score, split, loader):
        """The accuracy beside a linear classifier's on the same images, printed, and as entries of the result."""
        dry, loaders = self.options.dry_run, (self.train_loader, self.val_loader, loader)
        for whole_loader in loaders:
            if hasattr(whole_loader, "set_shard"):
                whole_loader.set_shard(0, 1)
                whole_loader.set_epoch(0)  # wherever the training began or ended
        val_loader = list(itertools.islice(self.val_loader, 2)) if dry else self.val_loader
        plain = self.train_loader.without_augmentation(300 if dry else LINEAR_IMAGES)
        linear = linear_classifier(plain, val_loader, loader if split == "test" else None)
        self.train_loader.skipped.update(plain.skipped)
        names, counts = self.train_loader.class_names, self.train_loader.class_counts
        chance, largest = f"guessing: {1 / len(names):.1%}", None
        balanced = ""
        if unevenness(names, counts) and hasattr(loader, "class_counts"):
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

    def draw(self, model):
        """curves.png, and attention.png where the model has attention."""
        result = self.result
        baseline = ("linear classifier", result.get("linear_test_acc", result.get("linear_val_acc")))
        save_figure(plot_training_curves(self.history, baseline=baseline), self.folder / "curves.png")
        if attends(model):
            apart = max(1, len(self.val_loader) // 4)  # folders come class by class, so take images from all of it
            batches = itertools.islice(self.val_loader, 0, 4 * apart, apart)
            images = [images[0] for images, _ in batches if len(images)]  # of (3, S, S)
            save_figure(visualize_attention_grid(model, torch.stack(images).cpu()), self.folder / "attention.png")


def attends(model):
    return isinstance(model, VisionTransformer)


def first_images(loader, n_images):
    """At least so many images of a training loader, if it has them, as a model will see them: (B, 3, S, S)."""
    loader.set_epoch(0)
    return torch.cat([images for images, _ in itertools.islice(loader, -(-n_images // loader.batch_size))])


def fit_head(model, class_names):
    """The model with a head for these classes: its own where it was trained on the same ones, else one of zeros, as in
    section 3.2 of the ViT paper."""
    if model.class_names != class_names:
        width = model.config.widths[-1] if isinstance(model, ConvNet) else model.config.embed_dim
        model.head = torch.nn.Linear(width, len(class_names))
        torch.nn.init.zeros_(model.head.weight)
        torch.nn.init.zeros_(model.head.bias)
    model.class_names = class_names
    return model


def before_recipes(options):
    """A run's saved options; those of one that was begun before there were recipes with the recipe that it had."""
    if "recipe" in options:
        return options
    name = "fine_tuning" if options.get("pretrained") and not options.get("freeze_backbone") else "classic"
    return vars(make_parser().parse_args([])) | dict(recipe=name) | options


def complete_result(folder):
    """What is in a folder's result.json, where the test stands in it; else None."""
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    return result if result.keys() & {"linear_test_acc", "linear_val_acc"} else None


def unevenness(class_names, class_counts):
    """In words, how many images the classes have, where they differ much; else ""."""
    by_size = sorted(zip(class_counts, class_names, strict=True), reverse=True)
    if by_size[0][0] < UNEVEN * by_size[-1][0]:
        return ""
    shown = by_size if len(by_size) <= 10 else [*by_size[:5], *by_size[-5:]]
    return "Classes differ in size: " + ", ".join(f"{name} {n:,}" for n, name in shown) \
        + (f" (the largest and smallest of {len(by_size)})" if len(by_size) > 10 else "")


def report_skipped(files):
    """Prints which image files were left out, where there were some."""
    for file in files[:5]:
        print(f"Left out, as it cannot be read: {file}")
    if len(files) > 5:
        print(f"... and {len(files) - 5} more, {len(files)} in all.")


# ---- The commands -----------------------------------------------------------------------------------------
# ---- python train_vit.py evaluate -------------------------------------------------------------------------

# What the parts of a set are worth as a test, by Loader.split.
SPLITS = {
    "test": "test images",
    "val": "validation images, as there are no test images: a training on this folder chose its best epoch on them",
    "held out": "validation images, held out of the training; its best epoch was chosen on them",
    "all": "images, all of the folder: a test only if the model was trained on none of them",
}


def evaluate_command(argv=None):
    parser = OneLineParser(prog="train_vit.py evaluate", description="Scores a checkpoint on a set: accuracy, "
                           "confusion matrix and the worst mistakes, printed and kept in a folder. Taken are the test "
                           "images, where there are none the validation images, else all; but of the folder that the "
                           "checkpoint was trained on only those held out.")
    add_checkpoint(parser)
    parser.add_argument("--data-dir", default=DEFAULT_DATA_DIR, help="as for the training: a folder with a folder for "
                        "each class, or a known set (default: %(default)s, without which shapes are drawn)")
    parser.add_argument("--dataset", default="auto", help=f"{', '.join(DATASETS)} (default: %(default)s)")
    parser.add_argument("--batch-size", type=int_at_least(1), default=64, help="(default: %(default)s)")
    add_device(parser)
    parser.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
                        help="mixed precision (default: %(default)s)")
    parser.add_argument("--workers", type=int_at_least(0), help="processes that read photographs (default: one for each core, "
                                                         "at most 8)")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave out image files that cannot be read")
    parser.add_argument("--output-dir", help="a new folder for the results (default: runs/evaluation-<data>-<n>)")
    evaluate(parser.parse_args(argv))


def evaluate(options):
    """The evaluation of a checkpoint, from the images to result.json. Returns what is in result.json."""
    device = choose_device(options.device)
    model = load_model(options.checkpoint)
    check_has_head(model)
    loader = evaluation_loader(model, options)
    with unless_empty(new_output_dir(options.output_dir, "evaluation", loader.dataset_name)) as folder:
        found = score(model, loader, device, options.amp)
    print(describe_score(found, loader))
    heading = f"accuracy {percent(found.correct, found.n)}\n{found.n:,} images"
    names = list(map(drawable, found.class_names))
    save_figure(plot_confusion(found.confusion, names, title=heading), folder / "confusion.png")
    write_rows(folder / "confusion.csv", ["true \\ predicted", *found.class_names],
               ([name, *counts] for name, counts in zip(found.class_names, found.confusion.tolist(), strict=True)))
    write_mistakes(found, loader, folder)
    result = dict(checkpoint=options.checkpoint, data_dir=options.data_dir, dataset=loader.dataset_name,
                  split=loader.split, n=found.n, correct=found.correct, accuracy=found.accuracy,
                  interval=found.interval, balanced_accuracy=found.balanced_accuracy, top5=found.top5,
                  classes=[dict(name=name, n=n, correct=correct) for name, n, correct in per_class(found)],
                  skipped=loader.skipped, device=str(device), torch=torch.__version__,
                  precision=str(choose_precision(options.amp, device) or torch.float32))
    write_json(result, folder / "result.json")
    print(f"{folder}/ has {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return result


def evaluation_loader(model, options):
    """The images to score a model on, shown to it as those of its training."""
    img_size = one_side(pair(model.img_size))
    if not isinstance(img_size, int):
        raise InputError(f"the model takes images of {img_size[0]}x{img_size[1]} pixels; expected a square, as the "
                         f"loaders give; use inference.score with batches of your own")
    shown = dict(workers=options.workers, mean=model.mean, std=model.std, interpolation=model.interpolation,
                 skip_corrupt=options.skip_corrupt)
    images = (options.data_dir, model.class_names, options.batch_size, img_size, options.dataset)
    cut, known = training_cut(options.checkpoint, options.data_dir)
    loader = get_evaluation_loader(*images, **shown, **cut)
    if loader.split == "held out" and known not in (None, fingerprint(loader)):
        print("The images of the folder have changed since the training: which were held out of it cannot be told.")
        loader = get_evaluation_loader(*images, **shown)
    return loader


def training_cut(checkpoint, data_dir):
    """(arguments of get_evaluation_loader, fingerprint of the images held out), if the checkpoint tells that it was
    trained on a part of this folder; else nothing."""
    entries = read_checkpoint(checkpoint)
    training = entries.get("options") or {}
    folders = [Path(folder).expanduser().resolve() for folder in (data_dir, training.get("data_dir", data_dir))]
    if "data_dir" not in training or folders[0] != folders[1]:
        return {}, None
    cut = {name: training[name] for name in ("val_fraction", "seed") if name in training}
    return dict(cut, held_out=True), entries.get("validation_files")


def fingerprint(loader):
    """Of the names of a loader's files, with those left out: a sum that is the same for the same ones. None for sets
    that are not files."""
    if loader.files is None:
        return None
    names = sorted({*map(str, loader.files), *map(str, loader.skipped)})
    ends = "\n".join("/".join(Path(name).parts[-2:]) for name in names)
    return hashlib.sha256(ends.encode(errors="surrogateescape")).hexdigest()


def describe_score(found, loader):
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
    classes = per_class(found)
    shown = [classes[place] for place in places if classes[place][1]]
    width = max(len(name) for name, _, _ in shown)
    return "\n".join([*lines, heading, *(f"  {name:{width}}  {correct / n:6.1%}  {correct:,} of {n:,}"
                                         for name, n, correct in shown)])


def per_class(found):
    """(name, images, how many of them were right) for each class of a Score."""
    return list(zip(found.class_names, found.confusion.sum(dim=1).tolist(), found.confusion.diagonal().tolist(),
                    strict=True))


def write_rows(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_mistakes(found, loader, folder):
    """mistakes.csv and, where there are any, mistakes.png."""
    worst, names = found.mistakes, found.class_names
    true, predicted = ([names[label] for label in labels.tolist()] for labels in (worst.labels, worst.predictions))
    probabilities = worst.probabilities.tolist()
    write_rows(folder / "mistakes.csv", ["file", "true", "predicted", "probability"],
               zip([file or "" for file in worst.files], true, predicted, probabilities, strict=True))
    if probabilities:
        titles = list(map(mistake_title, true, predicted, probabilities))
        heading = f"{len(titles)} of {found.n - found.correct:,} mistakes,\nthe most confident first\n(true: predicted)"
        save_figure(plot_images(worst.images, titles, columns=6, title=heading, mean=loader.mean, std=loader.std),
                    folder / "mistakes.png")


def mistake_title(true, predicted, probability):
    """'true: predicted 98%' in lines that fit above a small picture."""
    true, predicted = (textwrap.fill(drawable(name), 14, max_lines=2, placeholder="…") for name in (true, predicted))
    return f"{true}:\n{predicted}\n{probability:.0%}"


def drawable(name):
    """A name with what the font of the figures has no sign for written as U+9CE5, say."""
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return "".join(sign if font.get_char_index(ord(sign)) else f"U+{ord(sign):04X}" for sign in name)


# ---- python train_vit.py predict --------------------------------------------------------------------------


def predict_command(argv=None):
    parser = OneLineParser(prog="train_vit.py predict", description="The likeliest classes of image files, a line "
                           "each. Files that cannot be read are named on stderr; the others are answered, and the "
                           "exit code is 2.")
    add_checkpoint(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file, or a folder: all image files in "
                        "it, at any depth, but hidden ones")
    parser.add_argument("--top", type=int_at_least(1), default=3, help="classes to name at most (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help='print a JSON list of {"file", "predictions": [{"class", '
                        '"probability"}]} or {"file", "error"}')
    add_device(parser)
    options = parser.parse_args(argv)
    model = load_model(options.checkpoint).to(choose_device(options.device))
    check_has_head(model)
    files = [file for path in options.images for file in files_at(path)]
    width, entries, n_failed = min(80, max(map(len, files))), [], 0
    for entry in answers_for(model, files, options.top):
        if "error" in entry:
            n_failed += 1
            print(f"{parser.prog}: {entry['error']}", file=sys.stderr)
        elif not options.json:
            print(f"{entry['file']:{width}}  {in_words(entry['predictions'])}")
        if options.json:
            entries.append(entry)
    if options.json:
        print(json.dumps(entries, indent=2))
    if n_failed:
        sys.exit(2)


def files_at(path):
    """The image files of a folder, at any depth, sorted, without hidden ones; what is none, or has none, itself."""
    files = []
    for parent, subfolders, names in os.walk(path, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        files += [os.path.join(parent, name) for name in sorted(names)
                  if name[0] != "." and name.lower().endswith(IMG_EXTENSIONS)]
    return files or [path]


def answers_for(model, files, top):
    """Yields {"file", "predictions"} or {"file", "error"} for each of the files, which are read a batch at a time."""
    for batch in batches_of(files):
        inputs, entries = [], []
        for file in batch:
            entries.append(dict(file=file))
            try:
                inputs.append(read_input(file, model))
            except InputError as error:
                entries[-1]["error"] = str(error)
        answers = iter(ranked(model, inputs, top) if inputs else ())
        for entry in entries:
            if "error" not in entry:
                entry["predictions"] = [{"class": name, "probability": share} for name, share in next(answers)]
            yield entry


def read_input(file, model):
    """A file as the model's input, (1, 3, H, W)."""
    if os.path.isdir(file):
        raise InputError(f"folder {file!r} has no image files ({', '.join(IMG_EXTENSIONS)}); give another, or files")
    return prepare_image(file, model)[0]


def in_words(predictions):
    return ", ".join(f"{entry['class']} {entry['probability']:.1%}" for entry in predictions)


# ---- python train_vit.py export ---------------------------------------------------------------------------


def export_command(argv=None):
    parser = OneLineParser(prog="train_vit.py export", description="Writes a checkpoint as one ONNX file, checked "
                           "against the model, for programs without PyTorch. Needs the packages onnx and onnxscript.")
    add_checkpoint(parser)
    parser.add_argument("--output", metavar="FILE", help="(default: the checkpoint's name with .onnx)")
    options = parser.parse_args(argv)
    path = Path(options.output or Path(options.checkpoint).with_suffix(".onnx"))
    if path.exists():
        raise InputError(f"{path} exists already; choose another name with --output, or remove it")
    model = load_model(options.checkpoint)
    difference = export_onnx(model, path)
    height, width = pair(model.config.img_size)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; images (batch, {model.config.in_channels}, {height}, {width}) "
          f"to logits (batch, {model.config.n_classes}); largest difference from the model {difference:.1e} of the "
          f"largest logit")


# ---- python train_vit.py inspect --------------------------------------------------------------------------


def inspect_command(argv=None):
    parser = OneLineParser(prog="train_vit.py inspect", description="What a checkpoint is, and whether and how it would "
                           "load; without a file the pretrained models are listed.")
    parser.add_argument("file", nargs="?", help="a checkpoint of this project, or of timm, torchvision, transformers, "
                        "Google's npz, DeiT, DINO or MAE")
    options = parser.parse_args(argv)
    if options.file in PRETRAINED and not Path(options.file).exists():
        raise InputError(f"{options.file} is the name of a pretrained model; expected a file. "
                         f"create_pretrained({options.file!r}) makes that model")
    print(describe_checkpoint(options.file) if options.file else describe_pretrained())


# ---- What the commands share ------------------------------------------------------------------------------


def add_checkpoint(parser):
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="as a training wrote it: best.pt; it "
                        "tells the classes, the image size and the normalisation")


def add_device(parser):
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
