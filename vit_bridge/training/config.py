"""The settings of a training run, and named recipes: everything except the images and the length.

TrainConfig holds the settings, RECIPES the named ones, and Callback the methods that the Trainer calls.

    recipe = RECIPES[choose_recipe("vit_nano", img_size=32, minutes=10)]
"""

import math
from dataclasses import dataclass, field, fields, replace

from vit_bridge.data.augmentation import MIXINGS, Augmentation
from vit_bridge.errors import InputError, check_choice, check_int, pair
from vit_bridge.preprocessing import SMALL_SIDE
from vit_bridge.training.optimizers import OPTIMIZERS, SCHEDULES


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run.

    Parameters
    ----------
    n_epochs : int
        Passes over the training images.
    n_steps : int, optional
        Stop after this many steps instead, whatever n_epochs says, even in the middle of an epoch.
    learning_rate : float
        Peak learning rate: it rises linearly during the warm-up, then falls step by step.
    weight_decay : float
        Decoupled weight decay of matrices and kernels. Biases, norms, positions and tokens have none.
    warmup_epochs : float, optional
        Epochs in which the learning rate rises. None: 5% of the run.
    seed : int, optional
        Seed of the randomness in a step, such as dropout. None: the resumed run's seed, or one drawn from torch.
    optimizer : {"adamw", "muon"}
        See make_optimizer.
    schedule : {"cosine", "linear"}
        How the learning rate falls; see learning_rate_at.
    lr_scales : dict, optional
        {parameter name: factor on its learning rate}; parameters not listed have 1.
    ema_decay : float, optional
        Keep a moving average of the weights with this decay, and evaluate the average. See update_average.
    progressive_resize : (float, float), optional
        (scale, share): shrink images to `scale` of their side in the first `share` of the steps, which makes those
        steps cheaper. From Howard's fast.ai entry to DAWNBench (2018).
    resize_multiple : int
        Shrunken sides are rounded to a multiple of this, the model's patch size.
    clip_norm : float
        Largest norm of the gradient of all weights together; a larger gradient is scaled down.
    grad_accum_steps : int
        Parts in which a batch passes through the model, one after the other. The step is the same but needs less
        memory; Trainer.batch_split_warning states the exceptions.
    amp : {"auto", "off", "bf16", "fp16"}
        Mixed precision; see choose_precision.
    compile : bool
        Train through torch.compile.
    save_every : float
        Seconds between two calls of Callback.on_save.
    grad_checkpointing : bool
        Store no activations inside the layers; the backward pass computes them again. The steps stay the same, bit for
        bit in float32. Each step needs less memory, but one more forward pass through the layers.

    Raises
    ------
    InputError
        If a value is out of range.
    """

    n_epochs: int = 10
    n_steps: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float | None = None
    seed: int | None = None
    optimizer: str = "adamw"
    schedule: str = "cosine"
    lr_scales: dict | None = None
    ema_decay: float | None = None
    progressive_resize: tuple[float, float] | None = None
    resize_multiple: int = 4
    clip_norm: float = 1.0
    grad_accum_steps: int = 1
    amp: str = "auto"
    compile: bool = False
    save_every: float = 180.0
    grad_checkpointing: bool = False

    def __post_init__(self):
        for name, least in (("n_epochs", 1), ("resize_multiple", 1), ("grad_accum_steps", 1)):
            check_int(name, getattr(self, name), least)
        for name, least in (("n_steps", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("amp", self.amp, ("auto", "off", "bf16", "fp16"))
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate {self.learning_rate} is out of range; expected a positive number such as "
                             f"1e-3")
        for name in ("weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name} {value} is out of range; expected 0 or a positive number")
        if self.progressive_resize is not None and not all(0 <= share <= 1 for share in self.progressive_resize):
            raise InputError(f"progressive_resize {self.progressive_resize} is out of range; expected "
                             f"(fraction of the side, fraction of the steps), each from 0 to 1")

    def count_steps(self, batches_per_epoch):
        """Return (steps, warm-up steps) of a run."""
        n_steps = self.n_epochs * batches_per_epoch if self.n_steps is None else self.n_steps
        check_int("n_steps", n_steps, 1)
        warmup = n_steps / 20 if self.warmup_epochs is None else self.warmup_epochs * batches_per_epoch
        return n_steps, min(n_steps, math.ceil(warmup))

    def image_size(self, size, step, n_steps):
        """Return the (height, width) at which images of this size are trained in a step."""
        if self.progressive_resize is None or step >= self.progressive_resize[1] * n_steps:
            return size
        scale, multiple = self.progressive_resize[0], self.resize_multiple
        return tuple(max(1, round(scale * side / multiple)) * multiple for side in size)


class Callback:
    """Methods that the Trainer calls while it trains; override the ones you need. `state` is a TrainState."""

    def on_batch(self, state):
        """Run between two batches, of training and of evaluation.

        Return True to stop: train() then raises Stopped with a state that can be resumed.
        """

    def on_epoch(self, state):
        """Run after every epoch; state.history is the history so far."""

    def on_save(self, state):
        """Run between two batches, every save_every seconds, with a state that can be resumed."""


@dataclass(frozen=True)
class Recipe:
    """A named TrainConfig, and the model, augmentation and loss to use with it.

    Options on the command line override it.

    Parameters
    ----------
    train : TrainConfig
    model : str, optional
        Name in models.registry.MODELS of the model that the recipe is for. None: any model.
    small : bool, optional
        True: only for images of at most SMALL_SIDE pixels. False: only for larger images. None: for all sizes.
    minutes : float
        Shortest time, in minutes on 2 CPU cores in float32, for which choose_recipe picks the recipe.
    smallest : int
        Smallest side in pixels that the model's layers accept, counted before progressive_resize shrinks it.
    model_options : dict
        Arguments of build_model.
    whiten : bool
        Whether the first layer starts with whitening filters (models.initialisation.whiten_first_layer).
    batch_size : int
        Images per step.
    augmentation : Augmentation
        Augmentation of small images in memory; for photographs see data.augmentation.train_transform.
    label_smoothing : float
        Fraction of the target that is spread evenly over all classes.
    mixing : {"none", "mixup", "cutmix"}
    command, expected : str
        The command that measures the recipe and the test accuracy it reached; "" if not measured.

    Raises
    ------
    InputError
        If `mixing` is unknown.
    """

    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=2e-3))
    model: str | None = None
    small: bool | None = None
    minutes: float = 0.0
    smallest: int = 1
    model_options: dict = field(default_factory=dict)
    whiten: bool = False
    batch_size: int = 64
    augmentation: Augmentation = field(default_factory=Augmentation)
    label_smoothing: float = 0.1
    mixing: str = "none"
    command: str = ""
    expected: str = ""

    def __post_init__(self):
        check_choice("mixing", self.mixing, MIXINGS)

    @classmethod
    def from_dict(cls, entries):
        """Return the recipe with these entries, which asdict() made.

        JSON may have turned tuples into lists, and older versions wrote the fields of `train` alongside the others.

        Raises
        ------
        InputError
            If this version does not support an entry.
        """
        entries = dict(entries)
        try:
            train = entries.pop("train", None) or {each.name: entries.pop(each.name) for each in fields(TrainConfig)
                                                   if each.name in entries}
            resize = train.get("progressive_resize")
            model_options = {name: tuple(value) if isinstance(value, list) else value
                             for name, value in entries.pop("model_options").items()}
            return cls(TrainConfig(**dict(train, progressive_resize=resize and tuple(resize))),
                       augmentation=Augmentation(**entries.pop("augmentation")), model_options=model_options, **entries)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"this version does not support the recipe of this run ({error}); resume with the version "
                             f"that started the run, or start a new run") from error

    def describe(self, small=True):
        """Return the recipe in one line of text; `small` adds the augmentation of small images."""
        a, t = self.augmentation, self.train
        parts = [f"{name} {value}" for name, value in self.model_options.items()]
        parts += [f"batches of {self.batch_size}", f"{t.optimizer} at {t.learning_rate:g}", t.schedule]
        parts += [f"label smoothing {self.label_smoothing:g}"] * bool(self.label_smoothing)
        flip = "no flip" if a.flip == "none" else f"{a.flip} flip"
        parts += [f"shift {a.shift:g}", flip, *[f"cutout {a.cutout:g}"] * bool(a.cutout)] if small else []
        if t.progressive_resize:
            scale, share = t.progressive_resize
            parts.append(f"the first {share:.0%} of the steps at {scale:.0%} of the image side")
        parts += [self.mixing] * (self.mixing != "none")
        parts += [f"average {t.ema_decay}"] * bool(t.ema_decay) + ["whitened first layer"] * self.whiten
        return ", ".join(parts)


FAST_TRAIN = dict(learning_rate=2e-3, optimizer="muon", schedule="linear")
FAST = dict(small=True, whiten=True, batch_size=128, augmentation=Augmentation(flip="alternating"))
SMALLER_FIRST = TrainConfig(**FAST_TRAIN, progressive_resize=(0.75, 0.6))

# Each recipe opens with the command that measures it and the test accuracy it reached, as in benchmarks/RESULTS.md: the
# tables "shapes" (classic), "few-images" (fine_tuning), "family" (DeiT, Swin, ConvNeXt), "pretraining" (MAE, BEiT) and
# "targets" (the others), all but the first on CIFAR-10 (JPEG). The spread is the standard deviation over the seeds, in
# points. The fast recipes were chosen on the validation images of CIFAR-10 (JPEG) on 2 CPU cores; the table "factors"
# shows the effect of each change to them.
RECIPES = {
    "classic": Recipe(
        command="python train_vit.py --recipe classic",
        expected="66.2% on the built-in shapes in 2 minutes (three seeds, spread 8.0), 2 cores, float32"),
    "fine_tuning": Recipe(
        command="python benchmarks/few_images.py --data-dir CIFAR",
        expected="62.8% from 450 training images of five classes (three seeds, spread 2.6), 2 cores, float32",
        train=TrainConfig(learning_rate=5e-4)),
    "vit_nano_fast": Recipe(
        command="python train_vit.py --data-dir CIFAR --minutes 10",
        expected="75.0% (three seeds, spread 0.5), 2 cores, float32",
        train=SMALLER_FIRST, model="vit_nano", model_options=dict(pool="mean", init="mimetic"), **FAST),
    "deit_nano_fast": Recipe(
        command="python benchmarks/family.py --data-dir CIFAR run",
        expected="75.9% in 5 minutes (three seeds, spread 0.5), 2 cores, float32; with a hard teacher "
                 "75.6% (three seeds, spread 0.2)",
        train=replace(SMALLER_FIRST, learning_rate=1e-3), model="deit_nano",
        model_options=dict(init="mimetic"), **FAST),
    "swin_nano_fast": Recipe(
        command="python benchmarks/family.py --data-dir CIFAR run",
        expected="69.5% in 5 minutes (three seeds, spread 0.0), 2 cores, float32",
        train=TrainConfig(**FAST_TRAIN | dict(learning_rate=1e-3)), model="swin_nano", **FAST),
    "convnext_nano_fast": Recipe(
        command="python benchmarks/family.py --data-dir CIFAR run",
        expected="75.8% in 5 minutes (three seeds, spread 0.5), 2 cores, float32",
        train=replace(SMALLER_FIRST, learning_rate=8e-3), model="convnext_nano", smallest=16, **FAST),
    "mae_nano_fast": Recipe(
        command="python benchmarks/pretraining.py --data-dir CIFAR run",
        expected="54.1% with a linear probe on 4,500 labels, after 10 minutes without labels (three seeds, spread "
                 "0.6), 2 cores",
        train=TrainConfig(**FAST_TRAIN), model="mae_nano", model_options=dict(pool="mean", init="mimetic"),
        **FAST | dict(batch_size=256)),
    "beit_nano_fast": Recipe(
        command="python benchmarks/pretraining.py --data-dir CIFAR run",
        expected="48.4% with a linear probe on 4,500 labels, after 10 minutes without labels (one seed), 2 cores",
        train=TrainConfig(**FAST_TRAIN), model="beit_nano_pretraining", model_options=dict(init="mimetic"), **FAST),
    "hybrid_fast": Recipe(
        command="python train_vit.py --data-dir CIFAR --minutes 10 --model hybrid",
        expected="83.7% (three seeds, spread 0.3), 2 cores, float32; 86.2% (three seeds, spread 0.2) with AVX512-BF16, "
                 "bfloat16; 86.1% (one seed) in 30 minutes, float32",
        train=SMALLER_FIRST, model="hybrid",
        model_options=dict(stem="pooled", patch_size=8, embed_dim=128, depth=2, n_heads=4, pool="mean", init="mimetic"),
        **FAST),
    "convnet_fast": Recipe(
        command="python train_vit.py --data-dir CIFAR --minutes 2 --model convnet",
        expected="",  # not measured
        train=SMALLER_FIRST, model="convnet", smallest=16, model_options=dict(block="pooled", widths=(32, 64, 128)),
        **FAST),
    "convnet_wide": Recipe(
        command="python train_vit.py --data-dir CIFAR --minutes 10 --model convnet",
        expected="85.9% (three seeds, spread 0.3), 2 cores, float32",
        train=TrainConfig(**FAST_TRAIN), model="convnet", minutes=8, smallest=9,
        model_options=dict(block="pooled", widths=(48, 96, 192)), **FAST),
    "convnet_wider": Recipe(
        command="python train_vit.py --data-dir CIFAR --minutes 10 --model convnet --amp bf16",
        expected="87.7% (one seed), 2 cores with AVX512-BF16, bfloat16",
        train=TrainConfig(**FAST_TRAIN), model="convnet", minutes=16, smallest=9,
        model_options=dict(block="pooled", widths=(64, 128, 256)), **FAST),
}
HALF_COUNTS = 2  # a minute in half precision counts as this many in float32; measured: 1.4 to 2 with AVX512-BF16


def choose_recipe(model, img_size, minutes=None, start="new", precision=None):
    """Return the name of the recipe for a model and a budget: the applicable recipe with the largest `minutes`.

    Parameters
    ----------
    model : str
        Name of the model.
    img_size : int or (int, int)
        Side, or (height, width), in pixels.
    minutes : float, optional
        Length of the training run. None: no limit.
    start : {"new", "pretrained", "head"}
        Train new weights, fine-tune trained ones, or train only a new head on trained ones.
    precision : torch.dtype, optional
        Autocast type of the training run. None: float32.
    """
    if minutes is not None and precision is not None:
        minutes = HALF_COUNTS * minutes
    if start != "new":
        return "fine_tuning" if start == "pretrained" else "classic"
    size = pair(img_size)
    fitting = {name: recipe for name, recipe in RECIPES.items()
               if recipe.model == model and recipe.small in (None, max(size) <= SMALL_SIDE)
               and min(size) >= recipe.smallest
               and not any(side % recipe.model_options.get("patch_size", 1) for side in size)
               and (minutes is None or recipe.minutes <= minutes)}
    return max(fitting, key=lambda name: fitting[name].minutes, default="classic")
