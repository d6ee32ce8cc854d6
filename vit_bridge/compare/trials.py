"""CNN against ViT, compared by training both with one recipe; the test images are used only once.

    TRAINING_EXPERIMENTS[name]  "cues", "reach" and "data": like EXPERIMENTS, but measure() returns one trial and the
                                other methods take a list of trials
    Trial, read_trials          a trial is one kind of model trained with one seed, stored in its own file

Shapes:  N images, S side of an image in pixels, n test images; in Reach.finding, S seeds.
"""

import json
import math
from dataclasses import dataclass, field, replace
from statistics import mean

import torch

from train_vit import NotFinite, Trainer
from vit_bridge.analysis.cost import count_parameters
from vit_bridge.analysis.perturbations import cue_choices, shape_bias
from vit_bridge.analysis.receptive_field import theoretical_receptive_field
from vit_bridge.compare.experiments import Experiment
from vit_bridge.compare.statistics import (
    describe_leaders,
    describe_split,
    format_range,
    majority_with_every_seed,
    mean_min_max,
    rank_falls,
    rank_samples,
    seeds_that_learned,
    step_gains,
)
from vit_bridge.data.augmentation import Augmentation
from vit_bridge.data.datasets import DatasetInfo
from vit_bridge.data.loaders import MemoryLoader
from vit_bridge.data.shapes import CUES, make_cues, make_marks
from vit_bridge.errors import InputError, join_words
from vit_bridge.models.registry import build_model
from vit_bridge.plots.charts import plot_bars, plot_curves
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.runtime import predictions

# From the plain ViT to the CNN, with parameter counts within 10% of each other. From "ViT, mean pooling" to "Hybrid",
# two things change: a convolutional stem produces the tokens, and the head reads CLS again.
CNN_TO_VIT_MODELS = {
    "ViT": ("vit_nano", {}),
    "ViT, mean pooling": ("vit_nano", dict(pool="mean")),
    "Hybrid": ("hybrid", {}),
    "ConvNet": ("convnet", {}),
}
RATES = (5e-4, 1e-3, 2e-3)  # learning rates to choose from, by validation accuracy
SEEDS = (0, 1, 2)
TRAIN_FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the training images
DISTANCES = (8, 14, 20, 26, 32, 42)  # between the two marks, in pixels


@dataclass(frozen=True)
class TrialRecipe:
    """The training recipe of every model here. It fixes the number of steps, so fewer images are seen more often."""

    n_steps: int = 800
    batch_size: int = 64
    weight_decay: float = 0.05
    schedule: str = "linear"
    optimizer: str = "muon"
    augmentation: Augmentation = field(default_factory=Augmentation)


RECIPE = TrialRecipe()


def loader_of(images, labels, class_names, recipe, seed=0, training=False):
    """Return a loader of uint8 images (N, 3, S, S) and labels (N,), with the recipe's augmentation if training."""
    info = DatasetInfo("drawn", Preprocessing(images.shape[-1], (0.5,) * 3, (0.25,) * 3, class_names=class_names))
    return MemoryLoader(images, labels, info, recipe.batch_size, seed, training, augmentation=recipe.augmentation)


def build_kind(kind, n_classes, img_size):
    """Build a new model of CNN_TO_VIT_MODELS for images of this size.

    From 64 pixels on, the patch size and the stride of the ConvNet's stem double. At 64 pixels, the grid is therefore
    as small as at 32.
    """
    name, options = CNN_TO_VIT_MODELS[kind]
    coarser = {}
    if img_size >= 64 and img_size % 8 == 0:
        coarser = dict(stem_stride=2) if name == "convnet" else dict(patch_size=8)
    return build_model(name, n_classes=n_classes, img_size=img_size, **options, **coarser)


def train_once(kind, loader, recipe, learning_rate, seed, device="auto", amp="auto", progress=False):
    """Train a new model of CNN_TO_VIT_MODELS and return its Trainer."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build_kind(kind, len(loader.class_names), loader.img_size)
    loader.seed = seed
    trainer = Trainer(model, device, amp=amp)
    trainer.train(loader, n_steps=recipe.n_steps, learning_rate=learning_rate, weight_decay=recipe.weight_decay,
                  seed=seed, schedule=recipe.schedule, optimizer=recipe.optimizer, progress=progress)
    return trainer


def best_of_rates(kind, loader, val_loader, recipe, seed, rates=RATES, **run):
    """Train once with each learning rate and keep the model with the best validation accuracy.

    Returns
    -------
    tuple
        The model, {learning rate: validation accuracy} and the best learning rate (the lowest if several are equal). A
        training run that diverges counts as accuracy 0.

    Raises
    ------
    NotFinite
        If every training run diverges.
    """
    found = {}
    for rate in rates:
        try:
            trainer = train_once(kind, loader, recipe, rate, seed, **run)
            found[rate] = trainer.model, trainer.evaluate(val_loader)["acc"]
        except NotFinite:
            if rate == rates[-1] and not any(model for model, _ in found.values()):
                raise
            found[rate] = None, 0.0
    best = max((rate for rate in found if found[rate][0]), key=lambda rate: found[rate][1])
    return found[best][0], {rate: accuracy for rate, (_, accuracy) in found.items()}, best


# ---- 7. Reach ---------------------------------------------------------------------------------------------


class Reach(Experiment):
    title = "Reach"
    question = "Can the models compare two marks that are far apart?"

    def measure(self, kind, seed, recipe=RECIPE, n_images=20_000, n_test=1000, distances=DISTANCES, img_size=48, **run):
        """Train on two marks at all distances, and count how many of n_test predictions are right at each one."""
        recipe = replace(recipe, augmentation=Augmentation(0.0, "random"))  # shifts mirror the border: more marks
        drawn, val = (make_marks(n, img_size, seed=1 + seed, start=start)
                      for n, start in ((n_images, 0), (2000, 10**9)))
        loader = loader_of(drawn.images, drawn.labels, drawn.class_names, recipe, seed, True)
        val_loader = loader_of(val.images, val.labels, val.class_names, recipe)
        model, rates, rate = best_of_rates(kind, loader, val_loader, recipe, seed, **run)
        correct = []
        for distance in distances:
            test = make_marks(n_test, img_size, seed=0, start=2 * 10**9, distance=distance)
            images = torch.cat([images for images, _ in loader_of(test.images, test.labels, test.class_names, recipe)])
            correct.append(int((predictions(model, images) == test.labels).sum()))
        return dict(kind=kind, seed=seed, distances=list(distances), correct=correct, n=n_test, rates=rates, rate=rate,
                    parameters=count_parameters(model))

    def draw(self, trials, setup=None):
        points = {kind: [(distance, *mean_min_max([trial["correct"][i] / trial["n"] for trial in own]))
                         for i, distance in enumerate(own[0]["distances"])] for kind, own in _by_kind(trials).items()}
        return {"reach": plot_curves({"Are two marks of the same kind?": points}, "distance between the marks (pixels)",
                                     "accuracy (%)", percent=True, lines=[("guessing", 0.5)],
                                     title=_band_title(trials))}

    def finding(self, trials):
        accuracies = {kind: torch.tensor([trial["correct"] for trial in own]).double() / own[0]["n"]
                      for kind, own in _by_kind(trials).items()}  # kind -> (S, distances)
        n, split = trials[0]["n"], {}
        for kind, own in accuracies.items():
            by_seed, n_predictions = own.mean(dim=1).tolist(), n * own.shape[1]  # over all distances
            learned = seeds_that_learned(by_seed, n_predictions, 0.5)
            if learned is not None:
                split[kind] = describe_split(kind, by_seed, learned)
                accuracies[kind] = own[torch.tensor(learned)]
        falls = rank_falls(accuracies, n)
        if falls is None:
            return "No model learned the task in these steps, so the results show nothing about reach."
        largest, not_learned = falls.values[falls.best], [kind for kind in accuracies if kind not in falls.values]
        text = f"{falls.best} loses the most accuracy as the marks move apart: {100 * largest:.0f} points."
        if largest <= 0.05:
            text = "No model that learned the task loses more than 5 points as the marks move apart."
        elif falls.tied:
            text = (f"{join_words(falls.leaders)} lose up to {100 * largest:.0f} points as the marks move apart, and "
                    f"cannot be distinguished.")
        elif falls.best == "ConvNet" and _right_within(window := _convnet_window(), accuracies["ConvNet"], trials):
            text = (f"ConvNet loses {100 * largest:.0f} points of accuracy once the marks are farther apart than its "
                    f"own receptive field of {window} pixels.")
        text += f" {join_words(not_learned)} did not learn the task." if not_learned else ""
        return " ".join([text, *split.values()])

    def tables(self, trials):
        distances = trials[0]["distances"]
        return [("Accuracy at each distance: mean over the seeds (lowest to highest)", [
            ["", "seeds", *(f"{distance} px" for distance in distances)]] + [
            [kind, len(own), *(format_range([trial["correct"][i] / trial["n"] for trial in own])
                               for i in range(len(distances)))] for kind, own in _by_kind(trials).items()])]


def _right_within(window, accuracies, trials, least=0.95):
    """Return whether the mean accuracies (S, distances) are high wherever the marks lie within this window."""
    inside = torch.tensor([distance <= window for distance in trials[0]["distances"]])
    return bool((accuracies.mean(dim=0)[inside] >= least).all())


def _convnet_window(img_size=48):
    """Return the side in pixels of the window that a unit in the ConvNet's last layer sees."""
    return max(theoretical_receptive_field(build_kind("ConvNet", 2, img_size)))


# ---- 8. Outline against texture ---------------------------------------------------------------------------


class Cues(Experiment):
    title = "Outline or texture"
    question = "If outline and texture disagree, which one does a model follow?"

    def measure(self, kind, seed, recipe=RECIPE, n_images=10_000, n_test=1000, img_size=32, **run):
        """Train on images whose outline and texture show the same class, and test on images where they differ."""
        images, outlines, _ = make_cues(n_images, img_size, seed=1 + seed)
        val_images, val_outlines, _ = make_cues(1000, img_size, seed=1 + seed, start=10**9)
        loader = loader_of(images, outlines, CUES, recipe, seed, True)
        val_loader = loader_of(val_images, val_outlines, CUES, recipe)
        model, rates, rate = best_of_rates(kind, loader, val_loader, recipe, seed, **run)
        test, outlines, textures = make_cues(n_test, img_size, seed=0, start=2 * 10**9, agree=False)
        shown = torch.cat([images for images, _ in loader_of(test, outlines, CUES, recipe)])
        choices = cue_choices(predictions(model, shown), outlines, textures)
        return dict(kind=kind, seed=seed, choices=choices, shape_bias=shape_bias(choices), val_acc=rates[rate],
                    rates=rates, rate=rate)

    def draw(self, trials, setup=None):
        bars = {kind: mean_min_max(biases) for kind in _by_kind(trials) if (biases := _biases(trials, kind))}
        heading = "predictions that follow the outline,\nas a fraction of predictions that follow a cue"
        return {"shape_bias": plot_bars({heading: bars}, title=_band_title(trials, "Lines"))} if bars else {}

    def finding(self, trials):
        bias = {kind: mean(biases) for kind in _by_kind(trials) if (biases := _biases(trials, kind))}
        if not bias:
            return "No model follows the outline or the texture."
        low, high = min(bias, key=bias.get), max(bias, key=bias.get)
        span = f"{bias[low]:.0%} ({low})" + (f" to {bias[high]:.0%} ({high})" if high != low else "")
        sides = [(cue, [kind for kind in bias if _follows(cue, trials, kind)]) for cue in ("outline", "texture")]
        sides = ", and ".join(f"the {cue} prevails in {join_words(kinds)}" for cue, kinds in sides if kinds)
        follows = f"with every seed, {sides}" if sides else "no cue prevails with every seed of a model"
        return f"The outline decides {span} of the predictions that follow a cue; {follows}."

    def tables(self, trials):
        table = [["", "seeds", "outline, of outline + texture", "outline", "texture", "neither"]]
        for kind, own in _by_kind(trials).items():
            biases = _biases(trials, kind)
            table.append([kind, len(own), format_range(biases) if biases else "",
                          *(f"{mean(trial['choices'][cue] for trial in own):,.0f}"
                            for cue in ("outline", "texture", "neither"))])
        return [("Which cue the predictions follow when the two disagree: mean over the seeds", table)]


def _biases(trials, kind):
    """Return the shape bias of each seed that has one."""
    return [trial["shape_bias"] for trial in trials if trial["kind"] == kind and not math.isnan(trial["shape_bias"])]


def _follows(cue, trials, kind):
    """Return whether every seed follows this cue more often than the other."""
    return majority_with_every_seed([(trial["choices"][cue], trial["choices"]["outline"] + trial["choices"]["texture"])
                                     for trial in trials if trial["kind"] == kind])


# ---- 9. Data efficiency -----------------------------------------------------------------------------------


class DataEfficiency(Experiment):
    title = "Data efficiency"
    question = "How many training images does each model need?"

    def measure(self, kind, seed, n_images, loaders, recipe=RECIPE, **run):
        """Train on n_images of the training images, always for the same number of steps, and test.

        The seed selects the images. All validation images are used to choose the learning rate. `loaders` are three
        MemoryLoaders: training, validation and test.
        """
        train_loader, val_loader, test_loader = loaders
        train_loader.seed = seed
        part = train_loader.without_augmentation(n_images)
        part.training, part.batch_size = True, min(recipe.batch_size, n_images)
        part.set_augmentation(recipe.augmentation)
        model, rates, rate = best_of_rates(kind, part, val_loader, recipe, seed, **run)
        score = Trainer(model, run.get("device", "auto"), amp="off").evaluate(test_loader)
        return dict(kind=kind, seed=seed, n_images=n_images, correct=score["correct"], n=score["n"],
                    rates=rates, rate=rate, parameters=count_parameters(model))

    def draw(self, trials, setup=None):
        points = {kind: [] for kind in _by_kind(trials)}
        for n_images, accuracies in sorted(_accuracies(trials).items()):
            for kind, own in accuracies.items():
                points[kind].append((n_images, *mean_min_max(own)))
        heading = f"After the same number of steps: {trials[0].get('dataset') or 'drawn shapes'}"
        return {"data_efficiency": plot_curves({heading: points}, "training images", "test accuracy (%)", percent=True,
                                               log=("x",), title=_band_title(trials))}

    def finding(self, trials):
        by_number, n = _accuracies(trials), trials[0]["n"]
        ends = dict.fromkeys((min(by_number), max(by_number)))
        clauses = [f"with {number:,} images, {describe_leaders(rank_samples(by_number[number], n), points=not i)}"
                   for i, number in enumerate(ends)]
        return f"W{'; '.join(clauses)[1:]}."

    def tables(self, trials):
        """Return two tables: the accuracies, and the difference from each kind to the next."""
        kinds, n = list(_by_kind(trials)), trials[0]["n"]
        accuracies, gains = [["training images", *kinds]], [["training images", *kinds[1:]]]
        for n_images, own in sorted(_accuracies(trials).items()):
            accuracies.append([f"{n_images:,}", *(format_range(own[kind]) if kind in own else "" for kind in kinds)])
            steps = {kind: f"{100 * gain:+.1f} ± {100 * half:.1f}" if half < math.inf else f"{100 * gain:+.1f}"
                     for kind, gain, half in step_gains(own, n)}
            gains.append([f"{n_images:,}", *(steps.get(kind, "") for kind in kinds[1:])])
        return [("Test accuracy: mean over the seeds (lowest to highest)", accuracies),
                ("Points gained over the model to the left; ± is the range that seeds and test images can explain. Two "
                 "things change from ViT, mean pooling to Hybrid: the stem, and a head that reads CLS", gains)]


def _accuracies(trials):
    """Return {number of training images: {kind: [test accuracy of each seed]}}, without kinds that have no trial."""
    found = {}
    for kind, own in _by_kind(trials).items():
        for trial in own:
            found.setdefault(trial["n_images"], {}).setdefault(kind, []).append(trial["correct"] / trial["n"])
    return found


def numbers_of_images(fractions, n_images, n_classes):
    """Return the number of images for each fraction, at least one per class, largest first, without repeats."""
    return sorted({max(n_classes, round(fraction * n_images)) for fraction in fractions}, reverse=True)


# ---- Trials and their files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One kind of model trained with one seed in an experiment, perhaps with several learning rates.

    `n_images` and `dataset` belong to the experiment "data"; `dataset` is "" for the built-in shapes.
    """

    experiment: str
    kind: str
    seed: int
    n_images: int | None = None
    dataset: str = ""

    def path(self, folder):
        """Return the path of the trial's file."""
        kind = self.kind.replace(", ", "-").replace(" ", "-")
        words = [self.experiment, self.dataset, kind, self.n_images and str(self.n_images), str(self.seed)]
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
        if not all(isinstance(trial[key], str) for key in ("date", "command")):
            raise TypeError("date and command must be strings")
        _check_result(path.name.split("-")[0], trial["result"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a result of cnn_vs_vit.py --train ({type(error).__name__}); remove it, or "
                         f"choose another folder with --results-dir") from error
    return trial


def by_dataset(trials):
    """Group file contents by data set; "" stands for the built-in shapes."""
    groups = {}
    for trial in trials:
        groups.setdefault(trial["result"].get("dataset", ""), []).append(trial)
    return groups


def _check_result(name, result):
    """Raise KeyError, TypeError or ValueError unless `result` fits TRAINING_EXPERIMENTS[name].measure()."""
    if result["kind"] not in CNN_TO_VIT_MODELS:
        raise ValueError(f"kind {result['kind']!r} is unknown; expected one of {', '.join(CNN_TO_VIT_MODELS)}")
    if not isinstance(result["rate"], float):
        raise TypeError(f"the learning rate {result['rate']!r} is not a float")
    counts = [result["seed"]]
    if name == "cues":
        counts += [result["choices"][cue] for cue in ("outline", "texture", "neither")]
        math.isnan(result["shape_bias"])  # NaN if no prediction followed a cue
    elif name == "reach":
        counts += [result["n"], *(count for _, count in zip(result["distances"], result["correct"], strict=True))]
    else:
        counts += [result["n"], result["n_images"], result["correct"]]
    if not all(type(count) is int and count >= 0 for count in counts) or result.get("n") == 0:
        raise ValueError(f"{counts} are not all numbers of images")


def _by_kind(trials):
    """Group trials by kind, in the order of CNN_TO_VIT_MODELS; raise InputError if there are none."""
    if not trials:
        raise InputError("there are no trials yet; run python cnn_vs_vit.py --train")
    return {kind: own for kind in CNN_TO_VIT_MODELS if (own := [trial for trial in trials if trial["kind"] == kind])}


def _band_title(trials, what="Bands"):
    """Return the title that explains the bands, or lines, in a figure of trials."""
    return f"{what}: lowest to highest of {len({trial['seed'] for trial in trials})} seeds"


TRAINING_EXPERIMENTS = {"cues": Cues(), "reach": Reach(), "data": DataEfficiency()}
