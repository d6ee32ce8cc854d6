"""TrainConfig and recipes: everything that a training needs except the images and the length, by name.

    recipe = RECIPES[choose_recipe("vit_nano", img_size=32, minutes=10)]

The fast recipes were chosen on the validation images of CIFAR-10 (JPEG) with 2 cores. benchmarks/RESULTS.md has what a
change gave, as far as it is measured (#factors), and what the recipes reach on the test images (#targets).
"""

import math
from dataclasses import dataclass, field, fields

from vit_bridge.data.augmentation import MIXINGS, Augmentation
from vit_bridge.errors import InputError, check_choice, check_int, pair
from vit_bridge.preprocessing import SMALL_SIDE
from vit_bridge.training.optimizers import OPTIMIZERS, SCHEDULES


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training.

    n_epochs            passes over the training images
    n_steps             ends the run after this many steps, whatever n_epochs says, perhaps inside an epoch
    learning_rate       the peak; it rises in the warm-up and then falls, step by step
    weight_decay        of matrices and kernels; biases, norms, positions and tokens have none
    warmup_epochs       None: a twentieth of the run
    seed                of dropout, step by step; None: drawn from torch's generator, or that of the state to resume
    optimizer           "adamw" or "muon", see make_optimizer
    schedule            "cosine" or "linear", see learning_rate_at
    lr_scales           {name of a parameter: what its learning rate is multiplied by}, 1 for the others; or None
    ema_decay           keeps an average of the weights (update_average), which is then evaluated; None: none
    progressive_resize  (scale, share): in the first `share` of the steps images are made smaller, to `scale` of their
                        side; big steps first in little time, as in Howard's fast.ai entry to DAWNBench (2018)
    resize_multiple     the smaller side is a multiple of this: the model's patch size
    clip_norm           the gradient's largest norm
    grad_accum_steps    parts in which a batch goes through the model, one after the other: the same step with less
                        memory (but see Trainer.batch_split_warning)
    amp                 "auto", "off", "bf16" or "fp16", see choose_precision
    compile             trains through torch.compile
    save_every          seconds between two calls of on_save
    grad_checkpointing  keeps no activations inside the layers, and computes them again in the backward pass: the same
                        steps, bit for bit in float32, in less memory and about a third more time

    Raises InputError for a value out of range.
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
            raise InputError(f"progressive_resize {self.progressive_resize} is out of range; expected (share of the "
                             f"side, share of the steps), each from 0 to 1")

    def count_steps(self, batches_per_epoch):
        """(steps, warm-up steps) of a run."""
        n_steps = self.n_epochs * batches_per_epoch if self.n_steps is None else self.n_steps
        check_int("n_steps", n_steps, 1)
        warmup = n_steps / 20 if self.warmup_epochs is None else self.warmup_epochs * batches_per_epoch
        return n_steps, min(n_steps, math.ceil(warmup))

    def image_size(self, size, step, n_steps):
        """(height, width) that images of this size have in a step."""
        if self.progressive_resize is None or step >= self.progressive_resize[1] * n_steps:
            return size
        scale, multiple = self.progressive_resize[0], self.resize_multiple
        return tuple(max(1, round(scale * side / multiple)) * multiple for side in size)


class Callback:
    """What the Trainer calls while it trains. A subclass overrides what it needs; state is a TrainState."""

    def on_batch(self, state):
        """Between two batches, of evaluation too. If it returns True, train() raises Stopped, with a state that can be
        resumed."""

    def on_epoch(self, state):
        """After every epoch; state.history is the history so far."""

    def on_save(self, state):
        """Between two batches, every save_every seconds of the first process's clock, with a state that can be
        resumed."""


@dataclass(frozen=True)
class Recipe:
    """A named TrainConfig, with the model, the images and the objective that go with it. The command line overrides it.

    train           a TrainConfig
    model           the name in models.registry.MODELS that it was chosen for; None: any
    small           whether it is meant for images of at most SMALL_SIDE pixels; None: for all
    minutes         the shortest budget that it is meant for, on 2 cores in float32
    smallest        the smallest side in pixels that its layers can take, after progressive_resize too
    model_options   arguments of build_model
    whiten          whether the first layer gets whitening filters (models.initialisation.whiten_first_layer)
    batch_size      images of a step
    augmentation    of small images in memory
    label_smoothing fraction of the target that is spread over all classes
    mixing          "none", "mixup" or "cutmix"
    command         that measures it on CIFAR-10 (JPEG); expected: its result, "" where not measured (spread: the
                    standard deviation over seeds, in points)
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
        """The recipe with these entries of asdict(), read back from JSON or not. Raises InputError for entries that
        this version does not know.

        Older versions wrote the fields of `train` beside the others.
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
            raise InputError(f"the recipe of this run is not one that this version knows ({error}); go on with the "
                             f"version that began it, or start a new run") from error

    def describe(self, small=True):
        """What it does, in one line; small: with images that are varied as `augmentation` says."""
        a, t = self.augmentation, self.train
        parts = [f"{name} {value}" for name, value in self.model_options.items()]
        parts += [f"batches of {self.batch_size}", f"{t.optimizer} at {t.learning_rate:g}", t.schedule,
                  f"label smoothing {self.label_smoothing:g}"]
        flip = "no flip" if a.flip == "none" else f"{a.flip} flip"
        parts += [f"shift {a.shift:g}", flip, *[f"cutout {a.cutout:g}"] * bool(a.cutout)] if small else []
        if t.progressive_resize:
            scale, share = t.progressive_resize
            parts.append(f"the first {share:.0%} of the steps at {scale:.0%} of the side")
        parts += [self.mixing] * (self.mixing != "none")
        parts += [f"average {t.ema_decay}"] * bool(t.ema_decay) + ["whitened first layer"] * self.whiten
        return ", ".join(parts)


FAST_TRAIN = dict(learning_rate=2e-3, optimizer="muon", schedule="linear")
FAST = dict(small=True, whiten=True, batch_size=128, augmentation=Augmentation(flip="alternating"))
SMALLER_FIRST = TrainConfig(**FAST_TRAIN, progressive_resize=(0.75, 0.6))
RECIPES = {
    "classic": Recipe(),  # as in most scripts
    "fine_tuning": Recipe(TrainConfig(learning_rate=5e-4)),
    "vit_nano_fast": Recipe(SMALLER_FIRST, "vit_nano", model_options=dict(pool="mean", init="mimetic"), **FAST,
                            command="python train_vit.py --data-dir CIFAR --minutes 10",
                            expected="75.0% of the test images (three seeds, spread 0.5), 2 cores with AVX2"),
    "hybrid_fast": Recipe(SMALLER_FIRST, "hybrid", **FAST,
                          model_options=dict(stem="pooled", patch_size=8, embed_dim=128, depth=2, n_heads=4,
                                             pool="mean", init="mimetic"),
                          command="python train_vit.py --data-dir CIFAR --minutes 10 --model hybrid",
                          expected="83.7% of the test images (three seeds, spread 0.3), 2 cores with AVX2; 86.1% "
                                   "after 30 minutes (one seed); 86.2% (three seeds, spread 0.2) after 10 with "
                                   "AVX512-BF16"),
    "convnet_fast": Recipe(SMALLER_FIRST, "convnet", smallest=16, **FAST,
                           model_options=dict(block="pooled", widths=(32, 64, 128)),
                           command="python train_vit.py --data-dir CIFAR --minutes 2 --model convnet"),
    "convnet_wide": Recipe(TrainConfig(**FAST_TRAIN), "convnet", minutes=8, smallest=9, **FAST,
                           model_options=dict(block="pooled", widths=(48, 96, 192)),
                           command="python train_vit.py --data-dir CIFAR --minutes 10 --model convnet",
                           expected="85.9% of the test images (three seeds, spread 0.3), 2 cores with AVX2"),
    "convnet_wider": Recipe(TrainConfig(**FAST_TRAIN), "convnet", minutes=16, smallest=9, **FAST,
                            model_options=dict(block="pooled", widths=(64, 128, 256)),
                            command="python train_vit.py --data-dir CIFAR --minutes 10 --model convnet --amp bf16",
                            expected="87.7% of the test images (one seed), 2 cores with AVX512-BF16"),
}
HALF_COUNTS = 2  # minutes in float32 that one in bfloat16 counts as: 2 cores with AVX512-BF16 are 1.4 to 2 times faster


def choose_recipe(model, img_size, minutes=None, start="new", precision=None):
    """The name in RECIPES for a model (its name) and a budget in minutes: of those that fit, the one with the most
    `minutes`. Without a budget that is the one with the most minutes of all.

    img_size   a side or (height, width) in pixels
    start      "new": all weights; "pretrained": weights that were trained before; "head": those with a new head, which
               alone is trained
    precision  the autocast type of the training; None: float32
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
