"""The Trainer: it trains any module that maps images to logits, and knows no model.

    history = Trainer(model).train(train_loader, val_loader, n_epochs=10)

What chance decides in a step (order, augmentation, dropout) is a function of (seed, step), and a TrainState holds all
else that a training has become. One that goes on from a saved state therefore ends as one that was never cut.

Under torchrun every process has a Trainer of its own and a share of every batch; gradients are averaged by
DistributedDataParallel, weighted so that the step is that of one process with the whole batch.

Letters:  B images in a batch, C classes, R processes.
"""

import copy
import itertools
import math
import time
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm

from augmentation import mix_seed
from measurements import choose_device, choose_precision, evaluating
from optimizers import SCHEDULES, learning_rate_at, make_optimizer, update_average
from vit_model import InputError, check_choice, check_whole

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


class CrossEntropy(nn.Module):
    """Cross-entropy of logits (B, C) and labels (B), or shares of the classes (B, C): the mean over the images, each
    weighted by its class.

    class_weights: C numbers, or None for 1. torch's own divides by the sum of a batch's weights, and weighs what label
    smoothing adds by all classes; this divides by the number of images, so that parts of a batch add up to the whole,
    and weighs all of an image's loss by its own class.
    """

    def __init__(self, label_smoothing=0.0, class_weights=None):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", None if class_weights is None else torch.as_tensor(class_weights).float())

    def forward(self, logits, labels):
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)  # (B)
        if self.class_weights is not None:
            losses = losses * (labels @ self.class_weights if labels.ndim == 2 else self.class_weights[labels])
        return losses.mean()


def balancing_weights(class_counts):
    """Weights by which all classes count alike: N / (C n_c), 0 for a class without images; their mean over the N
    images is 1 where every class has some."""
    total, n_classes = sum(class_counts), len(class_counts)
    return [total / (n_classes * n) if n else 0.0 for n in class_counts]


class OutOfMemory(InputError):
    """Memory does not suffice; `accumulate` is a number of parts that may be enough."""

    def __init__(self, text, accumulate):
        super().__init__(text)
        self.accumulate = accumulate


@contextmanager
def memory_explained(device, batch_size, accumulate=1, training=False):
    """Inside, an error of memory becomes an OutOfMemory that names the batch and what to do; others stay."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        kinds, words = (torch.OutOfMemoryError, MemoryError), str(error).lower()
        if not isinstance(error, kinds) and "out of memory" not in words and "allocate memory" not in words:
            raise
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        advice = "a smaller batch size takes less"
        if training:
            advice = (f"--accumulate {2 * accumulate} (in Python accumulate={2 * accumulate}) takes the same steps in "
                      f"smaller parts, and {advice}")
        raise OutOfMemory(f"{device} has not memory enough for a batch of {batch_size} images{parts}; {advice}",
                          2 * accumulate) from error


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
        check_whole("accumulate", accumulate, 1)
        self.device = choose_device(device)
        self.dtype = choose_precision(amp, self.device)
        self.model = model.to(self.device)
        self.loss_fn = loss_fn or CrossEntropy(label_smoothing=0.1)
        if isinstance(self.loss_fn, nn.Module):
            self.loss_fn.to(self.device)
        self.clip_norm, self.accumulate, self.compile = clip_norm, accumulate, compile
        parallel = dist.is_available() and dist.is_initialized()
        self.rank, self.n_ranks = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
        self.parallel, self.average, self.data_share = None, None, 0.0

    def train(self, train_loader, val_loader=None, n_epochs=10, learning_rate=1e-3, weight_decay=0.05,
              warmup_epochs=None, n_steps=None, *, seed=None, rate_factors=None, ema_decay=None, resume=None,
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
        check_whole("seed", seed, 0)
        forward = self.model
        if self.n_ranks > 1:
            # it gives all processes the first one's weights, before a copy of them is made for the average
            forward = nn.parallel.DistributedDataParallel(
                self.model, device_ids=[self.device] if self.device.type == "cuda" else None)
        self.parallel = forward
        state = TrainState(self, weight_decay, rate_factors, ema_decay, optimizer)
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
        check_whole("n_epochs", n_epochs, 1)
        if not 0 < learning_rate < math.inf:
            raise InputError(f"learning_rate {learning_rate} is out of range; expected a positive number such as 1e-3")
        if not 0 <= weight_decay < math.inf:
            raise InputError(f"weight_decay {weight_decay} is out of range; expected 0 or a positive number")
        if warmup_epochs is not None and not 0 <= warmup_epochs < math.inf:
            raise InputError(f"warmup_epochs {warmup_epochs} is out of range; expected 0 or a positive number")
        if n_steps is None:
            n_steps = n_epochs * len(train_loader)
        check_whole("n_steps", n_steps, 1)
        warmup = n_steps / 20 if warmup_epochs is None else warmup_epochs * len(train_loader)
        return n_steps, min(n_steps, math.ceil(warmup))

    def train_epoch(self, loader, state, run, bar):
        """The batches of an epoch that are left, from where the state stands."""
        set_train_mode(self.model)
        batches = batches_from(loader, len(state.history["lr"]), state.batch)
        batches = itertools.islice(batches, run.n_steps - state.step)
        while True:
            started = time.perf_counter()
            with memory_explained(self.device, getattr(loader, "batch_size", "its")):
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
                with memory_explained(self.device, len(labels), self.accumulate, training=True):
                    self.step(images, labels, n_all, state, run)
            state.step, state.batch = state.step + 1, state.batch + 1
            bar.update()
            if state.step % 10 == 0 and not bar.disable:
                summary = state.tally.summary(state.seconds + time.perf_counter() - resumed)
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
        n_all, stops, saves = self.sums(n_own, stop, due and state.is_sound())
        if stops or saves:
            tally = state.tally.of_all(self)
        if stops:
            state.tally = tally
            raise Stopped(state)
        if saves:
            state.tally = tally if self.rank == 0 else Tally(self.device)
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
            with nullcontext() if last or self.n_ranks == 1 else self.parallel.no_sync():
                logits, answers = self.logits_of(part, run.forward)  # (b, C), (b)
                loss = self.loss_fn(logits, answers)
                share = (len(answers) if n_own else 0) * self.n_ranks / n_all
                state.scaler.scale(loss * share).backward()
            total += loss.detach() * share
            if n_own:  # the loss of a step that the scaler skips may be no number: it is left out of the sum
                state.tally.add(loss.nan_to_num(0.0, 0.0, 0.0), logits, answers)
        if n_own == 0:
            set_train_mode(self.model)
        state.scaler.unscale_(state.optimizer)  # clip true gradients, not scaled ones
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        state.watch(norm.isfinite() & total.isfinite())
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
        tally = state.tally.of_all(self)
        if not tally.n:
            raise InputError("the training loader gave no images; expected at least one batch")
        val = dict(loss=math.nan, acc=math.nan, balanced_acc=math.nan)
        if val_loader is not None:
            val = self.evaluate(val_loader, state.average, state, run)
            if not math.isfinite(val["loss"]):
                raise NotFinite(f"the validation loss is {val['loss']} after step {state.step} of {run.n_steps}, "
                                f"learning rate {state.rate:.3g}; try a lower learning rate or a longer warm-up")
        entries = (tally.loss.item() / tally.n, tally.correct / tally.n, val["loss"], val["acc"], val["balanced_acc"],
                   state.rate, state.seconds, tally.n / state.seconds)
        for name, value in zip(HISTORY, entries, strict=True):
            state.history[name].append(value)
        state.batch, state.seconds, state.tally = 0, 0.0, Tally(self.device)

    @torch.no_grad()
    def evaluate(self, loader, model=None, state=None, run=None):
        """A loader's images in eval mode, each counted once: dict(loss, acc, balanced_acc, correct, n), accuracies
        from 0 to 1; the balanced one is the mean of those of the classes that have images.

        model: another than the Trainer's own, on its device. state, run: of the training that this belongs to.
        """
        model = self.model if model is None else model
        self.give_share(loader)
        if self.n_ranks > 1:
            for buffer in model.buffers():  # batch statistics are those of the first process everywhere
                dist.broadcast(buffer, 0)
        tally = Tally(self.device)
        with evaluating(model):
            for batch in loader:
                images, labels = self.share_of(batch, loader)
                if run is not None:
                    self.pause(state, run)
                if len(labels):
                    with memory_explained(self.device, len(labels)):
                        logits, labels = self.logits_of((images, labels), model)
                        tally.add(self.loss_fn(logits, labels), logits, labels)
        tally = tally.of_all(self)
        if not tally.n:
            raise InputError("the loader gave no images to evaluate; expected at least one batch")
        return dict(loss=tally.loss.item() / tally.n, acc=tally.correct / tally.n, balanced_acc=tally.balanced,
                    correct=tally.correct, n=tally.n)

    def logits_of(self, batch, forward):
        """(logits in float32, labels) of a batch, on the device. Raises InputError for labels past the head."""
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = forward(images)  # (b, C)
        if labels.ndim == 1 and labels.device.type == "cpu" and labels.max() >= logits.shape[1]:
            raise InputError(f"label {int(labels.max())} has no place among the model's {logits.shape[1]} classes; "
                             f"build the model with n_classes={int(labels.max()) + 1} or more")
        return logits.float(), labels

    def differences(self, mixing=None):
        """In words, where this training, with the mixing that train() will get, differs from one process with whole
        batches; "" where it does not."""
        if self.n_ranks == 1 and self.accumulate == 1:
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
        ways = [f"over {self.n_ranks} processes"] * (self.n_ranks > 1)
        ways += [f"in {self.accumulate} parts"] * (self.accumulate > 1)
        split = f"batches split {' and '.join(ways)}"
        return f"{split}: the losses will not be those of whole batches, as {'; '.join(reasons)}" if reasons else ""

    # ---- Several processes ----

    def give_share(self, loader):
        """Moves a loader to the device, and tells it its share of the batches, where it can take one."""
        if hasattr(loader, "to"):
            loader.to(self.device)
        if hasattr(loader, "set_share"):
            loader.set_share(self.rank, self.n_ranks)

    def share_of(self, batch, loader):
        """This process's part of a batch: every R-th image, unless the loader gave no other."""
        if self.n_ranks == 1 or hasattr(loader, "set_share"):
            return batch
        return tuple(tensor[self.rank::self.n_ranks] for tensor in batch)

    def sums(self, *numbers):
        """Each number summed over the processes, whose group needs gloo beside nccl: "cpu:gloo,cuda:nccl"."""
        if self.n_ranks == 1:
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

    def __init__(self, trainer, weight_decay, rate_factors=None, ema_decay=None, optimizer="adamw"):
        self.model, self.ema_decay, self.first = trainer.model, ema_decay, trainer.rank == 0
        self.optimizer = make_optimizer(optimizer, self.model, weight_decay, rate_factors)
        self.scaler = torch.amp.GradScaler(trainer.device.type, enabled=trainer.dtype == torch.float16)
        self.average = None if ema_decay is None else copy.deepcopy(self.model).requires_grad_(False)
        self.history = {name: [] for name in HISTORY}
        self.tally = Tally(trainer.device)
        self.first_bad = torch.tensor(-1, device=trainer.device)  # the step since which something is not finite
        self.step, self.batch, self.rate, self.seconds, self.data_seconds = 0, 0, 0.0, 0.0, 0.0

    @property
    def trained(self):
        return self.model if self.average is None else self.average

    def state_dict(self):
        """Plain tensors, numbers and text, on the CPU."""
        counters = {name: getattr(self, name) for name in ("step", "batch", "rate", "seconds", "data_seconds")}
        average = None if self.average is None else self.average.state_dict()
        return on_cpu(dict(counters, model=self.model.state_dict(), average=average, tally=self.tally.state_dict(),
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
                self.tally.load_state_dict(entries["tally"])
            self.history = {name: list(entries["history"][name]) for name in HISTORY}
            for name in ("step", "batch", "rate", "seconds", "data_seconds"):
                setattr(self, name, entries[name])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"the training state does not fit this training ({' '.join(str(error).split())[:200]}); "
                             f"resume with the arguments that it was saved from") from error

    def watch(self, sound):
        """Notes the step since which something is not finite. With a scaler, which skips such steps, a sound step
        clears the note."""
        kept = torch.where(self.first_bad >= 0, self.first_bad, self.step)
        clear = -1 if self.scaler.is_enabled() else self.first_bad
        self.first_bad = torch.where(sound, clear, kept)

    def is_sound(self):
        return self.first_bad.item() < 0

    def check(self, n_steps):
        """Raises InputError where loss or gradient were not finite, unless the scaler may still mend it."""
        if self.is_sound() or (self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            return
        raise NotFinite(f"loss or gradient are not finite since step {self.first_bad.item() + 1} of {n_steps}, "
                        f"learning rate {self.rate:.3g}; try a lower learning rate or a longer warm-up")


def on_cpu(entries):
    """The same nested dicts and lists, with copies of their tensors on the CPU: the training goes on in its own."""
    if isinstance(entries, torch.Tensor):
        return entries.detach().to("cpu", copy=True)
    if isinstance(entries, dict):
        return {key: on_cpu(value) for key, value in entries.items()}
    return [on_cpu(value) for value in entries] if isinstance(entries, list | tuple) else entries


class Tally:
    """Sums of losses and hits, kept on the device so that counting does not wait for it.

    classes (2, C): images and hits of each class.
    """

    def __init__(self, device):
        self.loss, self.n, self.classes = torch.zeros((), device=device), 0, None

    def add(self, loss, logits, labels):
        """loss: the mean over the images; labels (B), or the shares of the classes (B, C), of which the largest."""
        labels = labels.argmax(dim=1) if labels.ndim == 2 else labels
        if self.classes is None:
            self.classes = torch.zeros(2, logits.shape[1], device=logits.device)  # (2, C)
        hits = (logits.detach().argmax(dim=1) == labels).float()  # (b)
        self.classes[0].index_add_(0, labels, torch.ones_like(hits))
        self.classes[1].index_add_(0, labels, hits)
        self.loss += loss.detach() * len(labels)
        self.n += len(labels)

    @property
    def correct(self):
        return 0 if self.classes is None else int(self.classes[1].sum())

    @property
    def balanced(self):
        n, hits = self.classes.cpu().double()  # (C), (C)
        return (hits[n > 0] / n[n > 0]).mean().item()

    def of_all(self, trainer):
        """The tally of all processes together."""
        if trainer.n_ranks == 1:
            return self
        tallies, total = [None] * trainer.n_ranks, Tally(trainer.device)
        dist.all_gather_object(tallies, self.state_dict())
        for entries in tallies:
            total.loss, total.n = total.loss + entries["loss"], total.n + entries["n"]
            if entries["classes"] is not None:
                classes = entries["classes"].to(trainer.device)
                total.classes = classes if total.classes is None else total.classes + classes
        return total

    def summary(self, seconds):
        return dict(loss=f"{self.loss.item() / max(1, self.n):.3f}", acc=f"{self.correct / max(1, self.n):.1%}",
                    images_per_s=f"{self.n / seconds:.0f}")

    def state_dict(self):
        """Plain numbers and a tensor on the CPU."""
        return dict(loss=self.loss.item(), n=self.n, classes=None if self.classes is None else self.classes.cpu())

    def load_state_dict(self, entries):
        device = self.loss.device
        self.loss, self.n = torch.tensor(entries["loss"], device=device), entries["n"]
        self.classes = None if entries["classes"] is None else entries["classes"].to(device)


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
            trial_seconds += trial.sums(sum(history["seconds"]))[0] / trial.n_ranks  # so all processes decide alike
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
