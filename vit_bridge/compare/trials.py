"""Trainings for the comparison: arms, learning rates chosen on validation images, and trials in files.

    Arm, train_arm      one way to train: a recipe of train_vit.py with changes to its model
    choose_rate         trains with several learning rates; the winner is never the edge of the grid
    Trial, read_trials  an arm trained with one seed in an experiment, stored in its own file

Shapes:  N images, S side of an image in pixels.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from train_vit import NotFinite, Trainer, new_model
from vit_bridge.compare.experiments import Experiment
from vit_bridge.data.augmentation import Augmentation
from vit_bridge.data.datasets import DatasetInfo
from vit_bridge.data.loaders import MemoryLoader
from vit_bridge.errors import InputError
from vit_bridge.models.registry import build_model
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.training.config import RECIPES
from vit_bridge.training.objectives import Classification
from vit_model import pair

SEEDS = (0, 1, 2)
MOST_RATES = 8  # a grid of learning rates that still grows then has no optimum worth looking for


# ---- One training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to train: a recipe of train_vit.py, and what differs from it.

    Attributes
    ----------
    recipe : str
        A key of RECIPES.
    options : dict
        Changes to the recipe's model_options.
    build : callable
        Builds the model from the recipe's name and the options: build_model, or a function like it.
    augmentation : Augmentation, optional
        Used instead of the recipe's.
    resized : bool
        Whether the first steps may use smaller images, as in the recipe. They would destroy details of one pixel.
    """

    recipe: str
    options: dict = field(default_factory=dict)
    build: Callable = build_model
    augmentation: Augmentation | None = None
    resized: bool = True

    def own_recipe(self):
        """Return the recipe with the changes."""
        recipe = RECIPES[self.recipe]
        train = recipe.train if self.resized else replace(recipe.train, progressive_resize=None)
        return replace(recipe, train=train, augmentation=self.augmentation or recipe.augmentation,
                       model_options=recipe.model_options | self.options)


def prepare_arm(arm, loader, seed, device="auto", amp="auto", start=None, objective=None):
    """Return the Trainer of an arm, and set up the loader for it.

    Parameters
    ----------
    arm : Arm
    loader : MemoryLoader
        The training images. It gets the recipe's batch size and augmentation, and the seed.
    seed : int
        Determines new weights, the order and the augmentation.
    device, amp : optional
        As for Trainer.
    start : Module, optional
        A model to train further. None: a new one.
    objective : Objective, optional
        None: the recipe's classification.
    """
    recipe = arm.own_recipe()
    loader.training, loader.batch_size, loader.seed = True, min(recipe.batch_size, loader.n_images), seed
    loader.set_augmentation(recipe.augmentation)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = start or new_model(recipe.model, recipe, loader, arm.build)
    if recipe.train.progressive_resize:
        model.any_size = True
    return Trainer(model, device, objective or Classification(recipe.label_smoothing), recipe.train, amp=amp,
                   resize_multiple=max(pair(getattr(model.config, "patch_size", 4))))


def train_arm(arm, loader, n_steps, learning_rate, seed, **options):
    """Train an arm and return the model; the options are those of prepare_arm."""
    trainer = prepare_arm(arm, loader, seed, **options)
    trainer.train(loader, n_steps=n_steps, learning_rate=learning_rate, seed=seed, progress=False)
    return trainer.model.eval()


def rates_around(arm):
    """Return half, once and twice the recipe's learning rate: where a grid starts."""
    rate = RECIPES[arm.recipe].train.learning_rate
    return rate / 2, rate, 2 * rate


def choose_rate(train, score, rates):
    """Train once with each learning rate and keep the model with the best score.

    While the best rate is the smallest or the largest one, half or twice this rate is tried, too.

    Parameters
    ----------
    train : callable
        train(learning_rate) returns a model.
    score : callable
        score(model) returns its validation accuracy.
    rates : tuple of float
        The first rates. A single one is not searched for.

    Returns
    -------
    tuple
        The model, the best rate (the smallest of several equally good ones), and {rate: score}. A training run that
        diverges has the score 0.

    Raises
    ------
    NotFinite
        If every training run diverges.
    """
    found, best, left = {}, None, list(rates)
    while left:
        rate = left.pop(0)
        try:
            model = train(rate)
            found[rate] = score(model)
            if best is None or found[rate] > found[best[1]]:
                best = model, rate
        except NotFinite:
            found[rate] = 0.0
            if not left and best is None:
                raise
        if not left and len(rates) > 1 and len(found) < MOST_RATES:
            left = [rate for edge, rate in ((min(found), best[1] / 2), (max(found), best[1] * 2)) if best[1] == edge]
    return *best, found


def loader_of(images, labels, class_names):
    """Return a loader of uint8 images (N, 3, S, S) and labels (N,), without augmentation."""
    info = DatasetInfo("drawn", Preprocessing(images.shape[-1], (0.5,) * 3, (0.25,) * 3, class_names=class_names))
    return MemoryLoader(images, labels, info, 64)


def part_of(loader, indices=slice(None), labels=None):
    """Return a new loader of the images at these indices, with these labels instead of their own if given."""
    labels = loader.labels[indices] if labels is None else labels
    return MemoryLoader(loader.images[indices], labels, loader.info, loader.batch_size)


def draw_indices(loader, n_images, seed):
    """Return n_images indices of a loader's images, in ascending order, drawn by the seed."""
    loader.seed = seed
    return loader.subset(n_images)


def count_correct(model, loader, device="auto"):
    """Return how many images of a loader a model classifies correctly, in float32, and how many there are."""
    found = Trainer(model, device, amp="off").evaluate(loader)
    return found["correct"], found["n"]


class TrainedExperiment(Experiment):
    """An experiment that trains: measure() returns the result of one trial, and the other methods take a list of them.

    Attributes
    ----------
    arms : dict
        {name: Arm}, in the order of tables and figures.
    on_images : bool
        Whether it uses a data set, with several numbers of training images.
    needs_speeds : bool
        Whether its trainings have equal minutes, so that measure() gets the speeds.
    """

    arms: dict
    on_images = False
    needs_speeds = False

    def plan(self, numbers):
        """Return (arm, number of images or None) of all trials, each after those whose choices it uses."""
        return [(arm, number) for number in (numbers if self.on_images else (None,)) for arm in self.arms]

    def owners(self, trial, numbers):
        """Return the trials whose choices a trial uses, by name; {} if it chooses itself, as that of the first seed."""
        first = replace(trial, seed=SEEDS[0])
        return {} if trial == first else dict(rate=first)

    def train(self, trial, chosen, loader, val_loader, n_steps, **run):
        """Train an arm on a loader; return choose_rate()'s result, or that of the rate which is chosen already."""
        arm = self.arms[trial.arm]

        def train(rate):
            return train_arm(arm, part_of(loader), n_steps, rate, trial.seed, **run)

        def score(model):
            correct, n = count_correct(model, val_loader, run.get("device", "auto"))
            return correct / n

        return choose_rate(train, score, (chosen["rate"]["learning_rate"],) if chosen else rates_around(arm))


# ---- Trials and their files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """An arm trained with one seed in an experiment.

    `n_images` and `dataset` belong to experiments on a data set; `dataset` is "" for the built-in shapes.
    """

    experiment: str
    arm: str
    seed: int
    n_images: int | None = None
    dataset: str = ""

    def path(self, folder):
        """Return the path of the trial's file."""
        arm = self.arm.replace(", ", "-").replace(" ", "-")
        words = [self.experiment, self.dataset, arm, self.n_images and str(self.n_images), str(self.seed)]
        return folder / ("-".join(filter(None, words)) + ".json")


def read_trials(names, folders):
    """Read the trials of these experiments: {experiment: [file contents]}.

    All trials of an experiment and data set come from one folder: the folder with the most trials, or the first of
    several with equally many. Raises InputError for a file that holds no trial.
    """
    trials = {}
    for name in names:
        groups = {}
        for folder in folders:
            found = [read_trial(path) for path in sorted(folder.glob(f"{name}-*.json"))]
            for dataset, own in by_dataset(found).items():
                groups[dataset] = max(groups.get(dataset, []), own, key=len)
        trials[name] = [trial for own in groups.values() for trial in own]
    return trials


def read_trial(path):
    """Read and check a trial's file; raise InputError if it holds no trial."""
    try:
        trial = json.loads(path.read_text(encoding="utf-8"))
        result = trial["result"]
        if not all(isinstance(value, str) for value in (trial["date"], trial["command"], result["arm"])):
            raise TypeError("date, command and arm must be strings")
        if not isinstance(result["learning_rate"], float):
            raise TypeError("the learning rate is not a float")
        counts = [result["seed"], *(result[key] for key in ("n", "n_images", "n_steps") if key in result),
                  *_counts(result.get("correct", 0)), *_counts(result.get("choices", 0))]
        if not all(type(count) is int and count >= 0 for count in counts) or result.get("n") == 0:
            raise ValueError(f"{counts} are not all numbers of images")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a result of cnn_vs_vit.py --train ({type(error).__name__}); remove it, or "
                         f"choose another folder with --results-dir") from error
    return trial


def _counts(value):
    """Return the numbers in a result: itself, or those of a list or a dict."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]


def by_dataset(trials):
    """Group file contents by data set; "" stands for the built-in shapes."""
    groups = {}
    for trial in trials:
        groups.setdefault(trial["result"].get("dataset", ""), []).append(trial)
    return groups


def by_arm(trials, order):
    """Group results by arm, in this order of names; raise InputError if there are none."""
    if not trials:
        raise InputError("there are no trials yet; run python cnn_vs_vit.py --train")
    return {arm: own for arm in order if (own := [trial for trial in trials if trial["arm"] == arm])}
