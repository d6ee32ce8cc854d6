"""Training: a Trainer that knows no model, and the command line.

    python train_vit.py                                         the built-in shapes, about 2 minutes
    python train_vit.py --data-dir photos --minutes 10          a folder of images, a class a folder
    python train_vit.py --model convnet --epochs 20 --lr 1e-3   the same with a CNN
    python train_vit.py --dry-run                               two steps of everything, nothing kept

A run leaves runs/<name>/ with config.json, history.csv, result.json, best.pt, last.pt, curves.png and, where
the model has attention, attention.png. Checkpoints open with model_zoo.load_model.

Letters:  B images in a batch, C classes.
"""

import argparse
import copy
import csv
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch import nn
from tqdm import tqdm

from measurements import choose_device, count_parameters, evaluating, linear_classifier, wilson_interval
from model_zoo import MODELS, build_model, load_model, save_model
from visualizations import plot_training_curves, save_figure, visualize_attention_grid
from vit_data import choose_set, get_data_loaders, get_test_loader
from vit_model import InputError, VisionTransformer, check_choice, check_whole

HISTORY = ("train_loss", "train_acc", "val_loss", "val_acc", "lr", "seconds", "images_per_second")


# ---- Where and how to compute -----------------------------------------------------------------------------


def choose_precision(amp, device):
    """The autocast type for a device, None for plain float32.

    amp: "auto", "off", "bf16" or "fp16". "auto" is bf16 on CUDA where it has it, else fp16 there; bf16 on a CPU
    that multiplies it in hardware (AMX or AVX512-BF16, 2 to 3 times faster; without them it is far slower);
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


# ---- The Trainer ------------------------------------------------------------------------------------------


def learning_rate_at(step, n_steps, warmup_steps, peak):
    """The rate of step 0 .. n_steps - 1: a linear rise to the peak, then half a cosine towards 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, n_steps - warmup_steps)))


def parameter_groups(model, weight_decay):
    """The trainable parameters as two groups for an optimiser: with weight decay, and without.

    Without are vectors (biases, norms) and what is added to every image alike (positions and tokens: a first
    dimension of one).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise InputError("the model has no trainable parameter; unfreeze at least its head")
    plain = [p for p in trainable if p.ndim < 2 or p.shape[0] == 1]
    decayed = [p for p in trainable if not (p.ndim < 2 or p.shape[0] == 1)]
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]


def set_train_mode(model):
    """model.train(), but what is wholly frozen stays in eval mode: no dropout there, batch statistics kept."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
    if not all(p.requires_grad for p in model.parameters()):
        for child in model.children():
            if not any(p.requires_grad for p in child.parameters()):
                child.eval()  # also what has no parameters, such as the dropout after the positions


class Trainer:
    """Trains any module that maps images (B, ...) to logits (B, C).

    device    "auto", "cpu", "cuda", "cuda:N" or "mps"; the model is moved there
    loss_fn   (logits, labels) -> a scalar; None: cross-entropy with label smoothing 0.1. It serves training and
              evaluation alike, so that the two curves can be compared
    amp       "auto", "off", "bf16" or "fp16", as choose_precision has it
    clip_norm the gradient's largest norm

    After train(), `data_share` is the share of the training seconds that went to fetching and augmenting images;
    on CUDA only what the CPU waited for is counted.
    """

    def __init__(self, model, device="auto", loss_fn=None, amp="auto", clip_norm=1.0):
        self.device = choose_device(device)
        self.dtype = choose_precision(amp, self.device)
        self.model = model.to(self.device)
        self.loss_fn = loss_fn or nn.CrossEntropyLoss(label_smoothing=0.1)
        self.clip_norm = clip_norm
        self.data_share = 0.0

    def train(self, train_loader, val_loader=None, n_epochs=10, learning_rate=1e-3, weight_decay=0.05,
              warmup_epochs=None, n_steps=None, on_epoch=None, progress=True):
        """AdamW, the rate warmed up and then let down by a cosine, step by step.

        train_loader   gives (images, labels) batches, has len(); set_epoch(epoch) and to(device) are called where
                       it has them
        val_loader     evaluated after every epoch; None leaves NaN in its columns
        warmup_epochs  None: a twentieth of the run
        n_steps        ends the run after so many steps, whatever n_epochs says; the last epoch may be a part
        on_epoch       called as on_epoch(history) after every epoch
        progress       a bar with loss, accuracy, images a second and the time left

        Returns the history, a list for each of HISTORY with an entry an epoch: losses, accuracies from 0 to 1,
        the last learning rate, the seconds spent training and the images a second. Raises InputError for numbers
        out of range.
        """
        n_steps, warmup_steps = self.plan(train_loader, n_epochs, n_steps, warmup_epochs, learning_rate, weight_decay)
        optimizer = torch.optim.AdamW(parameter_groups(self.model, weight_decay), lr=learning_rate)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if hasattr(train_loader, "to"):
            train_loader.to(self.device)
        history = {name: [] for name in HISTORY}
        step, data_seconds = 0, 0.0
        with tqdm(total=n_steps, unit="step", disable=not progress, leave=False) as bar:
            for epoch in itertools.count():
                if hasattr(train_loader, "set_epoch"):
                    train_loader.set_epoch(epoch)
                set_train_mode(self.model)
                tally, epoch_started = Tally(self.device), time.perf_counter()
                batches = itertools.islice(train_loader, n_steps - step)
                while True:
                    fetch_started = time.perf_counter()
                    batch = next(batches, None)
                    data_seconds += time.perf_counter() - fetch_started
                    if batch is None:
                        break
                    rate = learning_rate_at(step, n_steps, warmup_steps, learning_rate)
                    self.step(batch, optimizer, scaler, rate, tally)
                    step += 1
                    bar.update()
                    if step % 10 == 0:
                        bar.set_postfix(epoch=epoch + 1, refresh=False, **tally.summary(epoch_started))
                if not tally.n:
                    raise InputError("the training loader gave no images; expected at least one batch")
                loss, accuracy = tally.means()
                seconds = time.perf_counter() - epoch_started
                val = self.evaluate(val_loader) if val_loader is not None else dict(loss=math.nan, acc=math.nan)
                entries = (loss, accuracy, val["loss"], val["acc"], rate, seconds, tally.n / seconds)
                for name, value in zip(HISTORY, entries, strict=True):
                    history[name].append(value)
                if on_epoch:
                    on_epoch(history)
                if step >= n_steps:
                    break
        self.data_share = data_seconds / sum(history["seconds"])
        return history

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

    def step(self, batch, optimizer, scaler, rate, tally):
        """One step of the optimiser on one batch (images, labels), at the given learning rate."""
        logits, labels = self.predict(batch)  # (B, C), (B)
        loss = self.loss_fn(logits, labels)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # clip true gradients, not scaled ones
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        tally.add(loss, logits, labels)

    def predict(self, batch):
        """(logits in float32, labels) of a batch, on the device. Raises InputError for labels past the head."""
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.model(images)  # (B, C)
        if labels.device.type == "cpu" and labels.max() >= logits.shape[1]:
            raise InputError(f"label {int(labels.max())} has no place among the model's {logits.shape[1]} classes; "
                             f"build the model with n_classes={int(labels.max()) + 1} or more")
        return logits.float(), labels

    @torch.no_grad()
    def evaluate(self, loader):
        """A loader's images in eval mode, each counted once: dict(loss, acc, correct, n), acc from 0 to 1."""
        if hasattr(loader, "to"):
            loader.to(self.device)
        tally = Tally(self.device)
        with evaluating(self.model):
            for batch in loader:
                logits, labels = self.predict(batch)
                tally.add(self.loss_fn(logits, labels), logits, labels)
        if not tally.n:
            raise InputError("the loader gave no images to evaluate; expected at least one batch")
        loss, accuracy = tally.means()
        return dict(loss=loss, acc=accuracy, correct=int(tally.correct), n=tally.n)


class Tally:
    """Sums of losses and hits, kept on the device so that counting does not wait for it."""

    def __init__(self, device):
        self.loss, self.correct, self.n = torch.zeros((), device=device), torch.zeros((), device=device), 0

    def add(self, loss, logits, labels):
        self.loss += loss.detach() * len(labels)
        self.correct += (logits.detach().argmax(dim=1) == labels).sum()
        self.n += len(labels)

    def means(self):
        return self.loss.item() / self.n, self.correct.item() / self.n

    def summary(self, started):
        loss, accuracy = self.means()
        return dict(loss=f"{loss:.3f}", acc=f"{accuracy:.1%}",
                    images_per_s=f"{self.n / (time.perf_counter() - started):.0f}")


def steps_within(seconds, model, train_loader, val_loader, **settings):
    """How many steps, with an evaluation after every epoch, fill so many seconds: measured on a copy of the model.

    settings go to the Trainer. The measurement itself takes about 3% of the time and is counted in.
    """
    started = time.perf_counter()
    trial = Trainer(copy.deepcopy(model), **settings)
    run = dict(learning_rate=1e-6, progress=False)
    trial.train(train_loader, n_steps=2, **run)  # the first steps are slower: memory, kernels, workers
    n_trial, trial_seconds = 0, 0.0
    while trial_seconds < max(1.0, 0.02 * seconds):
        history = trial.train(train_loader, n_steps=max(4, n_trial), **run)
        n_trial += max(4, n_trial)
        trial_seconds += sum(history["seconds"])
    step_seconds = trial_seconds / n_trial
    eval_started = time.perf_counter()
    batches = list(itertools.islice(val_loader, 4))
    trial.evaluate(batches)
    epoch_seconds = (time.perf_counter() - eval_started) * len(val_loader) / len(batches)
    left = max(0.0, seconds - (time.perf_counter() - started))
    epochs, rest = divmod(left, len(train_loader) * step_seconds + epoch_seconds)
    return max(1, int(epochs) * len(train_loader) + int(max(0.0, rest - epoch_seconds) / step_seconds))


# ---- The command line -------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the usage text, and exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def whole(least):
    """An argparse type: a whole number of at least `least`."""
    return Bounded(int, least, math.inf, f"a whole number of at least {least}")


def seed():
    """An argparse type: a seed for torch's generators."""
    return Bounded(int, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1")


def positive():
    """An argparse type: a number above 0."""
    return Bounded(float, math.ulp(0.0), sys.float_info.max, "a positive number")


class Bounded:
    """An argparse type: a number between two bounds, with its own words for what is expected."""

    def __init__(self, kind, low, high, expected):
        self.kind, self.low, self.high, self.expected = kind, low, high, expected

    def __call__(self, text):
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high:
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected {self.expected}")
        return value


def script(run):
    """Runs a script's main part: what a person gave wrong, or a disk, ends in one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # consoles that lack a letter of a folder's name
    try:
        run()
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def parse(argv=None):
    parser = OneLineParser(description=__doc__.split("\n\n")[0])
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", default="./data", help="a folder with a folder for each class, or a known set "
                                                           "(default: %(default)s, without which shapes are drawn)")
    data.add_argument("--dataset", default="auto", help="auto, shapes, folder, cifar10, cifar100, mnist, fashion-mnist")
    data.add_argument("--img-size", type=whole(1), help="side in pixels (default: small images keep theirs, else 224)")
    data.add_argument("--batch-size", type=whole(1), default=64, help="(default: %(default)s)")
    data.add_argument("--val-fraction", type=float, default=0.1, help="cut from the training images without val/")
    data.add_argument("--workers", type=whole(0), help="processes that read photographs (default: one for each core, "
                                                          "at most 8)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help=f"one of {', '.join(MODELS)} (default: vit_nano up to 64 pixels, else vit_tiny)")
    model.add_argument("--patch-size", type=whole(1), help="side in pixels (default: 4 up to 64 pixels, 8 up to 128, "
                                                           "16 above)")
    model.add_argument("--drop-path", type=float, help="stochastic depth of the last block (default: the model's own)")
    run = parser.add_argument_group("run")
    length = run.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=whole(1))
    length.add_argument("--steps", type=whole(1))
    length.add_argument("--minutes", type=positive(), help="measures the speed, then fixes the number of steps "
                                                           "(default: 2 minutes)")
    run.add_argument("--lr", type=positive(), default=2e-3, help="the peak of the learning rate (default: %(default)s)")
    run.add_argument("--weight-decay", type=Bounded(float, 0, sys.float_info.max, "0 or more"), default=0.05)
    run.add_argument("--warmup-epochs", type=Bounded(float, 0, sys.float_info.max, "0 or more"),
                     help="(default: a twentieth of the run)")
    run.add_argument("--label-smoothing", type=Bounded(float, 0, 1, "0 to 1"), default=0.1)
    run.add_argument("--seed", type=seed(), default=0)
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    run.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="mixed precision")
    run.add_argument("--output-dir", help="a new folder for this run (default: runs/<model>-<data>-<n>)")
    run.add_argument("--dry-run", action="store_true", help="two steps of everything; without --output-dir nothing "
                                                            "is kept")
    return parser.parse_args(argv)


def new_output_dir(wanted, model_name, dataset_name):
    """Makes the folder of a run. Raises InputError where it cannot, or where it already holds something."""
    folder = Path(wanted or "runs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if wanted is None:
            folder = first_new_folder(folder / f"{model_name}-{dataset_name}")
        elif any(folder.iterdir()):
            raise InputError(f"--output-dir {folder} already holds files; choose a new folder, so that no run is lost")
        (folder / ".write-test").touch()
        (folder / ".write-test").unlink()
    except OSError as error:
        raise InputError(f"cannot write to --output-dir {folder} ({error.strerror}); choose a folder that is "
                         f"writable") from error
    return folder


def first_new_folder(stem):
    """Makes <stem>-1, or -2, ...: the first that nobody else has made."""
    for n in itertools.count(1):
        folder = stem.with_name(f"{stem.name}-{n}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def write_history(history, path):
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("epoch", *history))
        rows.writerows((i + 1, *values) for i, values in enumerate(zip(*history.values(), strict=True)))


def write_json(entries, path):
    path.write_text(json.dumps(entries, indent=2) + "\n")


def percent(correct, n):
    """'87.5% (86.9 to 88.1)': an accuracy with its 95% Wilson interval."""
    low, high = wilson_interval(correct, n)
    return f"{correct / n:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def command_of(options, n_steps):
    """The command that repeats a run exactly: its options, with the number of steps in the place of time."""
    words, defaults = ["python", "train_vit.py"], parse([])
    for name, value in vars(options).items():
        if value != getattr(defaults, name) and name not in ("minutes", "epochs", "steps", "output_dir", "dry_run"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([*words, "--steps", str(n_steps)])


class Saver:
    """Writes last.pt, best.pt (by validation accuracy) and history.csv after every epoch, and prints its line."""

    def __init__(self, folder, model, loader):
        self.folder, self.model, self.best_acc = folder, model, -1.0
        self.labels = dict(class_names=loader.class_names, mean=loader.mean, std=loader.std,
                           interpolation=getattr(loader, "interpolation", None) or "bilinear")

    def __call__(self, history):
        epoch, acc = len(history["val_acc"]), history["val_acc"][-1]
        save_model(self.model, self.folder / "last.pt", **self.labels, epoch=epoch, val_acc=acc)
        if acc > self.best_acc:
            self.best_acc = acc
            save_model(self.model, self.folder / "best.pt", **self.labels, epoch=epoch, val_acc=acc)
        write_history(history, self.folder / "history.csv")
        line = {name: values[-1] for name, values in history.items()}
        tqdm.write("epoch {epoch:>3}  train loss {train_loss:.3f} acc {train_acc:.1%}   val loss {val_loss:.3f} "
                   "acc {val_acc:.1%}   {images_per_second:.0f} images/s".format(epoch=epoch, **line))


def train(options):
    """One run, from the images to result.json. Returns what is in result.json."""
    device = choose_device(options.device)
    torch.manual_seed(options.seed)
    drawn = choose_set(options.data_dir, options.dataset, None) == "shapes"
    few = dict(n_images=600) if options.dry_run and drawn else {}
    data = dict(data_dir=options.data_dir, batch_size=options.batch_size, img_size=options.img_size,
                dataset=options.dataset, val_fraction=options.val_fraction, seed=options.seed,
                workers=options.workers, **few)
    train_loader, val_loader = get_data_loaders(**data)
    name = options.model or ("vit_nano" if train_loader.img_size <= 64 else "vit_tiny")
    chosen = {key: value for key in ("patch_size", "drop_path") if (value := getattr(options, key)) is not None}
    model = build_model(name, n_classes=len(train_loader.class_names), img_size=train_loader.img_size, **chosen)
    settings = dict(device=device, amp=options.amp,
                    loss_fn=nn.CrossEntropyLoss(label_smoothing=options.label_smoothing))
    trainer = Trainer(model, **settings)
    folder = new_output_dir(options.output_dir, name, train_loader.dataset_name)
    print(f"{name}: {count_parameters(model):,} parameters; {train_loader.dataset_name}: {train_loader.n_images:,} "
          f"training and {val_loader.n_images:,} validation images of {train_loader.img_size} pixels, "
          f"{len(train_loader.class_names)} classes; {device}, {trainer.dtype or torch.float32}")

    started = time.perf_counter()
    batches = val_loader
    if options.dry_run:
        n_steps, batches = 2, list(itertools.islice(val_loader, 2))
    elif options.epochs or options.steps:
        n_steps = options.steps or options.epochs * len(train_loader)
    else:
        n_steps = steps_within(60 * (options.minutes or 2), model, train_loader, val_loader, **settings)
    repeat = command_of(options, n_steps)
    print(f"{n_steps} steps, {n_steps / len(train_loader):.1f} epochs; the same run again: {repeat}")
    config = dict(options=vars(options), model=name, model_config=vars(model.config), n_steps=n_steps, command=repeat)
    write_json(config, folder / "config.json")
    torch.manual_seed(options.seed)  # measuring the speed drew from it; --steps must find the same state
    history = trainer.train(train_loader, batches, n_steps=n_steps, learning_rate=options.lr,
                            weight_decay=options.weight_decay, warmup_epochs=options.warmup_epochs,
                            on_epoch=Saver(folder, model, train_loader), progress=sys.stderr.isatty())
    seconds = time.perf_counter() - started

    result = dict(model=name, dataset=train_loader.dataset_name, seed=options.seed, n_steps=n_steps,
                  parameters=count_parameters(model), val_acc=max(history["val_acc"]), seconds=round(seconds, 1),
                  images_per_second=round(sum(s * r for s, r in zip(history["seconds"], history["images_per_second"],
                                                                    strict=True)) / sum(history["seconds"]), 1),
                  data_share=round(trainer.data_share, 4), device=str(device),
                  precision=str(trainer.dtype or torch.float32), torch=torch.__version__,
                  torchvision=torchvision.__version__, command=repeat)
    write_json(result, folder / "result.json")  # before the test images are touched: a bad one loses nothing
    save_figure(plot_training_curves(history), folder / "curves.png")
    best = load_model(folder / "best.pt")
    result |= test_result(best, data, train_loader, val_loader, options, settings)
    write_json(result, folder / "result.json")
    draw(folder, history, best, val_loader, result)
    print(f"{seconds:.0f} s, {result['images_per_second']:.0f} images/s, {trainer.data_share:.1%} of the training time "
          f"for fetching and augmenting; {folder}/")
    return result


def test_result(model, data, train_loader, val_loader, options, settings):
    """Accuracy on the test images, read here and only here, beside a linear classifier's on the same images."""
    test_loader = get_test_loader(**data)
    split, loader = ("test", test_loader) if test_loader is not None else ("val", val_loader)
    if split == "val":
        print("There are no test images: the accuracies are those of the validation images, on which the best "
              "epoch was chosen.")
    if options.dry_run:
        loader, val_loader = list(itertools.islice(loader, 2)), list(itertools.islice(val_loader, 2))
    score = Trainer(model, **settings).evaluate(loader)
    linear = linear_classifier(train_loader, val_loader, loader if split == "test" else None,
                               max_images=300 if options.dry_run else 20_000)
    print(f"{split} accuracy {percent(score['correct'], score['n'])} of {score['n']:,} images, 95% Wilson interval; "
          f"a linear classifier on the pixels: {linear[f'{split}_acc']:.1%}; guessing: "
          f"{1 / len(train_loader.class_names):.1%}")
    return {f"{split}_acc": score["acc"], f"{split}_correct": score["correct"], f"{split}_n": score["n"],
            f"{split}_interval": wilson_interval(score["correct"], score["n"]),
            f"linear_{split}_acc": linear[f"{split}_acc"]}


def draw(folder, history, model, val_loader, result):
    """curves.png, and attention.png where the model has attention."""
    baseline = ("linear classifier", result.get("linear_test_acc", result.get("linear_val_acc")))
    save_figure(plot_training_curves(history, baseline=baseline), folder / "curves.png")
    if isinstance(model, VisionTransformer):
        apart = max(1, len(val_loader) // 4)  # folders come class by class, so take images from the whole of it
        images = [images[0] for images, _ in itertools.islice(val_loader, 0, 4 * apart, apart)]  # of (3, S, S)
        save_figure(visualize_attention_grid(model, torch.stack(images).cpu()), folder / "attention.png")


def main(argv=None):
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
