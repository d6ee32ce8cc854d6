"""Recipes: everything that a training is told but the images and the length, by name.

    recipe = choose_recipe("vit_nano", img_size=32, minutes=10)

The fast ones are chosen on the validation images of CIFAR-10 (JPEG) with 2 cores; what a factor gave is in
benchmarks/RESULTS.md#factors as far as it is measured, what the whole reaches on the test images in #targets.
"""

from dataclasses import dataclass, field

from vit_bridge.data.augmentation import MIXINGS, Augmentation, Mixing
from vit_bridge.errors import check_choice
from vit_bridge.preprocessing import SMALL_SIDE
from vit_bridge.training.optimizers import OPTIMIZERS, SCHEDULES


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. What the command line gives overrides it.

    model           the name in models.registry.MODELS that it was found for; None: any
    small           whether it is meant for images of at most SMALL_SIDE pixels; None: for all
    minutes         from how many it is meant, on 2 cores in float32
    smallest        the least side in pixels that its layers can take, at the smaller size too
    options         arguments of build_model
    batch_size      images of a step
    optimizer, learning_rate, weight_decay, schedule    as Trainer.train has them; the warm-up is a twentieth of a run
    label_smoothing share of the answer that is spread over all classes
    augmentation    of small images in memory
    mixing          "none", "mixup" or "cutmix"
    low             (share of the side, share of the steps): images are so much smaller for so long at first; None:
                    never
    model_ema       decay of the average of the weights, or None
    whiten          whether the first layer gets whitening filters (cnn_model.whiten_first_layer)
    command         that shows what it is worth on CIFAR-10 (JPEG); expected: what came of it, "" where not measured
                    (spread: the standard deviation over seeds, in points)
    """
    model: str | None = None
    small: bool | None = None
    minutes: float = 0.0
    smallest: int = 1
    options: dict = field(default_factory=dict)
    batch_size: int = 64
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    schedule: str = "cosine"
    label_smoothing: float = 0.1
    augmentation: Augmentation = field(default_factory=Augmentation)
    mixing: str = "none"
    low: tuple[float, float] | None = None
    model_ema: float | None = None
    whiten: bool = False
    command: str = ""
    expected: str = ""

    def __post_init__(self):
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("mixing", self.mixing, MIXINGS)

    def training(self, n_classes, img_size, patch_size=4):
        """The arguments of Trainer.train that it decides, for images of this side; the smaller images' side is a
        multiple of the patch's."""
        low = self.low and (max(1, round(self.low[0] * img_size / patch_size)) * patch_size, self.low[1])
        return dict(low=low, learning_rate=self.learning_rate, weight_decay=self.weight_decay, optimizer=self.optimizer,
                    schedule=self.schedule, ema_decay=self.model_ema,
                    mixing=None if self.mixing == "none" else Mixing(self.mixing, n_classes))

    @classmethod
    def saved(cls, entries):
        """The recipe of which asdict() gave the entries, on their way through JSON or not."""
        options = {name: tuple(value) if isinstance(value, list) else value
                   for name, value in entries["options"].items()}
        return cls(**entries | dict(augmentation=Augmentation(**entries["augmentation"]), options=options,
                                    low=entries["low"] and tuple(entries["low"])))

    def describe(self, small=True):
        """What it does, in one line; small: with images that are varied as `augmentation` says."""
        a = self.augmentation
        parts = [f"{name} {value}" for name, value in self.options.items()]
        parts += [f"batches of {self.batch_size}", f"{self.optimizer} at {self.learning_rate:g}", self.schedule,
                  f"label smoothing {self.label_smoothing:g}"]
        flip = "no flip" if a.flip == "none" else f"{a.flip} flip"
        parts += [f"shift {a.shift:g}", flip, *[f"cutout {a.cutout:g}"] * bool(a.cutout)] if small else []
        parts += [f"the first {self.low[1]:.0%} of the steps at {self.low[0]:.0%} of the side"] if self.low else []
        parts += [self.mixing] * (self.mixing != "none")
        parts += [f"average {self.model_ema}"] * bool(self.model_ema) + ["whitened first layer"] * self.whiten
        return ", ".join(parts)


FAST = dict(small=True, low=(0.75, 0.6), batch_size=128, optimizer="muon", schedule="linear",
            augmentation=Augmentation(flip="alternating"))
RECIPES = {
    "classic": Recipe(),  # as in most scripts
    "fine_tuning": Recipe(learning_rate=5e-4),
    "vit_nano_fast": Recipe("vit_nano", options=dict(pool="mean", init="mimetic"), whiten=True, **FAST,
                            command="python train_vit.py --data-dir CIFAR --minutes 10",
                            expected="75.0% of the test images (three seeds, spread 0.5), 2 cores with AVX2"),
    "hybrid_fast": Recipe("hybrid", options=dict(stem="pooled", patch_size=8, embed_dim=128, depth=2, n_heads=4,
                                                 pool="mean", init="mimetic"), whiten=True, **FAST,
                          command="python train_vit.py --data-dir CIFAR --minutes 10 --model hybrid",
                          expected="83.7% of the test images (three seeds, spread 0.3), 2 cores with AVX2; 86.1% "
                                   "after 30 minutes (one seed); 86.2% (three seeds, spread 0.2) after 10 with "
                                   "AVX512-BF16"),
    "convnet_fast": Recipe("convnet", smallest=16, options=dict(block="pooled", widths=(32, 64, 128)), whiten=True,
                           **FAST,
                           command="python train_vit.py --data-dir CIFAR --minutes 2 --model convnet"),
    "convnet_wide": Recipe("convnet", minutes=8, smallest=9, options=dict(block="pooled", widths=(48, 96, 192)),
                           whiten=True, **FAST | dict(low=None),
                           command="python train_vit.py --data-dir CIFAR --minutes 10 --model convnet",
                           expected="85.9% of the test images (three seeds, spread 0.3), 2 cores with AVX2"),
    "convnet_wider": Recipe("convnet", minutes=16, smallest=9, options=dict(block="pooled", widths=(64, 128, 256)),
                            whiten=True, **FAST | dict(low=None),
                            command="python train_vit.py --data-dir CIFAR --minutes 10 --model convnet --amp bf16",
                            expected="87.7% of the test images (one seed), 2 cores with AVX512-BF16"),
}
HALF_COUNTS = 2  # so many minutes in float32 is one in bfloat16: 2 cores with AVX512-BF16 train 1.4 to 2 times as fast


def choose_recipe(model, img_size, minutes=None, start="new", precision=None):
    """The name in RECIPES for a model (its name), a side in pixels and a budget in minutes: of those that fit the one
    meant for most minutes. Without minutes the budget is taken to be long: the one for most minutes of all.

    start      "new": all weights; "pretrained": weights that were trained before; "head": those with a new head, which
               alone is trained
    precision  the autocast type of the training; None: float32
    """
    if minutes is not None and precision is not None:
        minutes = HALF_COUNTS * minutes
    if start != "new":
        return "fine_tuning" if start == "pretrained" else "classic"
    fitting = {name: recipe for name, recipe in RECIPES.items()
               if recipe.model == model and recipe.small in (None, img_size <= SMALL_SIDE)
               and img_size >= recipe.smallest
               and img_size % recipe.options.get("patch_size", 1) == 0
               and (minutes is None or recipe.minutes <= minutes)}
    return max(fitting, key=lambda name: fitting[name].minutes, default="classic")
