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

A run leaves runs/NAME/ with config.json, history.csv, result.json, best.pt, last.pt, curves.png and, where the model
has attention, attention.png. Checkpoints open with model_zoo.load_model.

Letters:  S side of an image in pixels.
"""

import argparse
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torchvision

from augmentation import FLIPS, MIXINGS, Augmentation
from cnn_model import ConvNet, whiten_first_layer, whitening_layer
from command_line import (
    Bounded,
    Interrupted,
    Interrupts,
    OneLineParser,
    n_processes,
    new_output_dir,
    of_all,
    of_first,
    percent,
    positive,
    process_number,
    processes,
    script,
    seed,
    whole,
    write_json,
)
from inference import Mirrored, evaluate_command, export_command, fingerprint, predict, predict_command
from measurements import choose_precision, count_parameters, linear_classifier, wilson_interval
from model_zoo import MODELS, PRETRAINED, build_model, create_pretrained, load_model
from optimizers import OPTIMIZERS, SCHEDULES
from recipes import RECIPES, Recipe, choose_recipe
from run_folder import (
    BEST,
    CONFIG,
    LAST,
    Saver,
    changes_since,
    device_to_resume,
    folder_to_resume,
    holds_run,
    lock_folder,
    options_to_resume,
    read_run,
)
from trainer import CrossEntropy, NotFinite, OutOfMemory, Stopped, Trainer, balancing_weights, steps_within
from transfer import feature_loaders, layer_factors
from visualizations import plot_training_curves, save_figure, visualize_attention_grid
from vit_data import SMALL_SIDE, TORCHVISION_SETS, MemoryLoader, choose_set, get_data_loaders, get_test_loader
from vit_model import InputError, VisionTransformer, allow_any_size, check_choice, freeze_backbone, pair

__all__ = ["Trainer", "get_data_loaders", "predict"]

COMMANDS = dict(evaluate=evaluate_command, predict=predict_command, export=export_command)
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
    data.add_argument("--img-size", type=whole(1), help="side in pixels (default: that of the pretrained model; small "
                                                        "images keep theirs, else 224)")
    data.add_argument("--batch-size", type=whole(1), help="images of a step, over all processes")
    data.add_argument("--val-fraction", type=float, default=0.1, help="cut from the training images without val/")
    data.add_argument("--workers", type=whole(0), help="processes that read photographs (default: one for each core, "
                                                       "at most 8)")
    data.add_argument("--skip-corrupt", action="store_true", help="leave out image files that cannot be read, and say "
                                                                  "how many")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help=f"one of {', '.join(MODELS)} (default: vit_nano up to 64 pixels, else vit_tiny)")
    model.add_argument("--patch-size", type=whole(1), help="side in pixels (default: 4 up to 64 pixels, 8 up to 128, "
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
    length.add_argument("--epochs", type=whole(1))
    length.add_argument("--steps", type=whole(1))
    length.add_argument("--minutes", type=positive(), help="measures the speed, then fixes the number of steps "
                                                           "(default: 2 minutes; with --freeze-backbone 100 epochs)")
    run.add_argument("--class-weights", action="store_true", help="let every class count alike, however many images it "
                     "has; the best epoch is then that of the best balanced accuracy")
    run.add_argument("--accumulate", type=whole(1), default=1, help="parts in which a batch goes through the model, "
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
            self.folder = of_first(self.folder)
            self.saved = read_run(self.folder)
            self.result = of_first(complete_result(self.folder))
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
        self.folder = of_first(self.folder)
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
        self.train_loader.use(self.recipe.augmentation)
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
                of_first(None)
            loaders = get_data_loaders(**self.data)
            if self.first:
                of_first(None)
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
        if text := trainer.differences(self.recipe_arguments()["mixing"]):
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
        spent = of_first(time.perf_counter() - self.started) if options.freeze_backbone else 0.0  # on the features
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
                rate_factors=layer_factors(self.trained, options.layer_decay) if options.layer_decay else None,
                on_batch=self.is_interrupted, on_epoch=self.saver and self.saver.on_epoch,
                on_save=self.saver and self.saver.save, save_every=60 * options.save_minutes,
                progress=sys.stderr.isatty())
        except Stopped as stop:
            kept = stop.state.is_sound() or stop.state.scaler.is_enabled()  # a scaler skips steps that are not
            if self.saver and kept:
                self.saver.save(stop.state)
            of_first(None)  # where one process ends the launcher ends the others: not before all is written
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
        of_first(None)  # the first process has written best.pt

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
        skipped = {file for part in of_all(skipped) for files in part for file in files}
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
            if hasattr(whole_loader, "set_share"):
                whole_loader.set_share(0, 1)
                whole_loader.set_epoch(0)  # wherever the training began or ended
        val_loader = list(itertools.islice(self.val_loader, 2)) if dry else self.val_loader
        plain = self.train_loader.plain(300 if dry else LINEAR_IMAGES)
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
