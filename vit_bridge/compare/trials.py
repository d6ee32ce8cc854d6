"""CNN against ViT by training them, with one recipe for all.

    TRAINING_EXPERIMENTS[name]  "cues", "reach" and "data": like EXPERIMENTS, but measure() gives one trial, and the
                                other methods take a list of them
    Trial, read_trials          a trial is one kind of model trained with one seed, kept in a file of its own
    compare_on_dataset          all kinds trained on the same images, several seeds each; summarise() says who is ahead

Learning rates are chosen on validation images from one grid; test images are read once.

Shapes:  N images, S side of an image in pixels, n test images; by seed: S seeds.
"""

import itertools
import json
import math
from dataclasses import dataclass, field, replace
from statistics import mean

import torch

from train_vit import NotFinite, Trainer, steps_within
from vit_bridge.analysis.cost import count_parameters
from vit_bridge.analysis.perturbations import cue_choices, shape_bias
from vit_bridge.compare.experiments import Experiment
from vit_bridge.compare.statistics import (
    MIN_IMAGES,
    describe_power,
    describe_ranking,
    describe_split,
    format_range,
    join_words,
    majority_with_every_seed,
    mean_min_max,
    measured_noise,
    none_beats,
    rank_falls,
    rank_samples,
    rank_trainings,
    seeds_that_learned,
    step_gains,
)
from vit_bridge.data.augmentation import Augmentation
from vit_bridge.data.datasets import DatasetInfo
from vit_bridge.data.loaders import MemoryLoader
from vit_bridge.data.shapes import CUES, make_cues, make_marks
from vit_bridge.errors import InputError
from vit_bridge.models.registry import build_model
from vit_bridge.plots.charts import plot_bars, plot_curves
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.runtime import predictions

# From the plain ViT to the CNN, locality added back step by step; parameter counts within 10% of each other.
CNN_TO_VIT_MODELS = {
    "ViT": ("vit_nano", {}),
    "ViT, mean pooling": ("vit_nano", dict(pool="mean")),
    "Hybrid": ("hybrid", {}),
    "ConvNet": ("convnet", {}),
}
RATES = (5e-4, 1e-3, 2e-3)  # the grid of learning rates
SEEDS = (0, 1, 2)
TRAIN_FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the training images
FEW_STEPS = 100  # fewer steps, or fewer training images, are named among the caveats
FEW_IMAGES = 1000
DISTANCES = (8, 14, 20, 26, 32, 42)  # between the marks, in pixels


@dataclass(frozen=True)
class TrialRecipe:
    """How every model is trained here. Steps, not epochs: fewer images are seen more often."""
    n_steps: int = 800
    batch_size: int = 64
    weight_decay: float = 0.05
    schedule: str = "linear"
    optimizer: str = "muon"
    augmentation: Augmentation = field(default_factory=Augmentation)


RECIPE = TrialRecipe()


def loader_of(images, labels, class_names, recipe, seed=0, training=False):
    """A loader of uint8 images (N, 3, S, S) and labels (N,), augmented as the recipe says if training."""
    info = DatasetInfo("drawn", Preprocessing(images.shape[-1], (0.5,) * 3, (0.25,) * 3, class_names=class_names))
    return MemoryLoader(images, labels, info, recipe.batch_size, seed, training, augmentation=recipe.augmentation)


def build_kind(kind, n_classes, img_size):
    """A new model of CNN_TO_VIT_MODELS for images of this side. From 64 pixels on, patches have twice the side and the
    ConvNet's stem twice the stride: the grid stays as small as at 32 pixels, and the cost of all grows alike."""
    name, options = CNN_TO_VIT_MODELS[kind]
    coarser = {}
    if img_size >= 64 and img_size % 8 == 0:
        coarser = dict(stem_stride=2) if name == "convnet" else dict(patch_size=8)
    return build_model(name, n_classes=n_classes, img_size=img_size, **options, **coarser)


def train_once(kind, loader, recipe, learning_rate, seed, device="auto", amp="auto", progress=False):
    """The Trainer of a model of CNN_TO_VIT_MODELS, after its training."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build_kind(kind, len(loader.class_names), loader.img_size)
    loader.seed = seed
    trainer = Trainer(model, device, amp=amp)
    trainer.train(loader, n_steps=recipe.n_steps, learning_rate=learning_rate, weight_decay=recipe.weight_decay,
                  seed=seed, schedule=recipe.schedule, optimizer=recipe.optimizer, progress=progress)
    return trainer


def best_of_rates(kind, loader, val_loader, recipe, seed, rates=RATES, **run):
    """(model, {rate: validation accuracy}, the best rate) after one training with each learning rate; of equal ones the
    lowest. A training that diverges has accuracy 0. Raises NotFinite if all of them diverge."""
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
    question = "Can a model compare two marks that lie far apart?"

    def measure(self, kind, seed, recipe=RECIPE, n_images=20_000, n_test=1000, distances=DISTANCES, img_size=48, **run):
        """Trained on two marks at all distances; counts the correct predictions of n_test at each of `distances`."""
        recipe = replace(recipe, augmentation=Augmentation(0.0, "random"))  # a border that mirrors would add marks
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
        return {"reach": plot_curves({"Two marks: the same, or different?": points}, "distance of the marks (pixels)",
                                     "images right (%)", percent=True, lines=[("guessing", 0.5)],
                                     title=_band_title(trials))}

    def finding(self, trials):
        accuracies = {kind: torch.tensor([trial["correct"] for trial in own]).double() / own[0]["n"]
                      for kind, own in _by_kind(trials).items()}  # kind -> (S, distances)
        n, split = trials[0]["n"], {}
        for kind, own in accuracies.items():
            by_seed, n_asked = own.mean(dim=1).tolist(), n * own.shape[1]  # over all distances
            learned = seeds_that_learned(by_seed, n_asked, 0.5)
            if learned is not None:
                split[kind] = describe_split(kind, by_seed, learned)
                accuracies[kind] = own[torch.tensor(learned)]
        falls = rank_falls(accuracies, n)
        if falls is None:
            return "No model learned the task in these steps, so nothing follows about reach."
        largest, not_learned = falls.values[falls.best], [kind for kind in accuracies if kind not in falls.values]
        text = f"{falls.best} loses most: {100 * largest:.0f} points with distance."
        if largest <= 0.05:
            text = "No model that learned the task loses more than 5 points as the marks move apart."
        elif falls.tied:
            text = f"{join_words(falls.leaders)} cannot be told apart: {100 * largest:.0f} points lost with distance."
        text += f" {join_words(not_learned)} did not learn the task." if not_learned else ""
        return " ".join([text, *(f"{words}." for words in split.values())])

    def tables(self, trials):
        distances = trials[0]["distances"]
        return [("Accuracy at each distance in pixels: mean of the seeds, lowest to highest", [
            ["", "seeds", *(f"{distance} px" for distance in distances)]] + [
            [kind, len(own), *(format_range([trial["correct"][i] / trial["n"] for trial in own])
                               for i in range(len(distances)))] for kind, own in _by_kind(trials).items()])]


# ---- 8. Outline against texture ---------------------------------------------------------------------------


class Cues(Experiment):
    title = "Outline or texture"
    question = "Where the two are at odds, by which does a model go?"

    def measure(self, kind, seed, recipe=RECIPE, n_images=10_000, n_test=1000, img_size=32, **run):
        """Trained on images whose outline and texture are of the same class, tested where they differ."""
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
        heading = "predictions by outline,\nof those by outline or texture"
        return {"shape_bias": plot_bars({heading: bars}, title=_band_title(trials, "lines"))} if bars else {}

    def finding(self, trials):
        bias = {kind: mean(biases) for kind in _by_kind(trials) if (biases := _biases(trials, kind))}
        if not bias:
            return "No model predicts by outline or by texture."
        low, high = min(bias, key=bias.get), max(bias, key=bias.get)
        span = f"{bias[low]:.0%} ({low})" + (f" to {bias[high]:.0%} ({high})" if high != low else "")
        sides = [(cue, [kind for kind in bias if _goes_by(cue, trials, kind)]) for cue in ("outline", "texture")]
        sides = "; ".join(f"{join_words(kinds)} by {cue}" for cue, kinds in sides if kinds)
        return (f"The outline decides {span} of the predictions by either cue. The same with every seed: "
                f"{sides or 'none'}.")

    def tables(self, trials):
        table = [["", "seeds", "by outline, of those by either", "by outline", "by texture", "by neither"]]
        for kind, own in _by_kind(trials).items():
            biases = _biases(trials, kind)
            table.append([kind, len(own), format_range(biases) if biases else "",
                          *(f"{mean(trial['choices'][cue] for trial in own):,.0f}"
                            for cue in ("outline", "texture", "neither"))])
        return [("Predictions where the cues are at odds, means of the seeds", table)]


def _biases(trials, kind):
    """The shape bias of each seed that has one."""
    return [trial["shape_bias"] for trial in trials if trial["kind"] == kind and not math.isnan(trial["shape_bias"])]


def _goes_by(cue, trials, kind):
    """Whether every seed goes by this cue more often than by the other."""
    return majority_with_every_seed([(trial["choices"][cue], trial["choices"]["outline"] + trial["choices"]["texture"])
                                     for trial in trials if trial["kind"] == kind])


# ---- 9. Data efficiency -----------------------------------------------------------------------------------


class DataEfficiency(Experiment):
    title = "Data efficiency"
    question = "How many images does each need, and what does each step from the ViT to the CNN buy?"

    def measure(self, kind, seed, n_images, loaders, recipe=RECIPE, **run):
        """Trained on n_images of the training images, drawn by the seed, for the same steps whatever their number; test
        accuracy at the learning rate that all the validation images chose.

        loaders: (training, validation, test), MemoryLoaders.
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
        heading = f"Test accuracy after the same steps: {trials[0].get('dataset') or 'drawn shapes'}"
        return {"data_efficiency": plot_curves({heading: points}, "training images", "images right (%)", percent=True,
                                               log=("x",), title=_band_title(trials))}

    def finding(self, trials):
        by_number, n = _accuracies(trials), trials[0]["n"]
        ends = dict.fromkeys((min(by_number), max(by_number)))
        return " ".join(f"With {n_images:,} images, {describe_ranking(rank_samples(by_number[n_images], n))}."
                        for n_images in ends)

    def tables(self, trials):
        """Accuracies, and what each step from the ViT to the ConvNet adds."""
        kinds, n = list(_by_kind(trials)), trials[0]["n"]
        accuracies, gains = [["training images", *kinds]], [["training images", *kinds[1:]]]
        for n_images, own in sorted(_accuracies(trials).items()):
            accuracies.append([f"{n_images:,}", *(format_range(own[kind]) if kind in own else "" for kind in kinds)])
            steps = {kind: f"{100 * gain:+.1f} ± {100 * half:.1f}" if half < math.inf else f"{100 * gain:+.1f}"
                     for kind, gain, half in step_gains(own, n)}
            gains.append([f"{n_images:,}", *(steps.get(kind, "") for kind in kinds[1:])])
        return [("Test accuracy: mean of the seeds, lowest to highest", accuracies),
                ("Points gained over the column before; ±: what seeds and images vary by", gains)]


def _accuracies(trials):
    """{number of training images: {kind: [the test accuracy of each seed]}}, for kinds that have any."""
    found = {}
    for kind, own in _by_kind(trials).items():
        for trial in own:
            found.setdefault(trial["n_images"], {}).setdefault(kind, []).append(trial["correct"] / trial["n"])
    return found


def numbers_of_images(fractions, n_images, n_classes):
    """How many of n_images each fraction is, at least one a class; without repetition, the largest first."""
    return sorted({max(n_classes, round(fraction * n_images)) for fraction in fractions}, reverse=True)


# ---- Trials and their files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One training of an experiment, or one for each learning rate. n_images and dataset are those of "data"; dataset
    is "" for the built-in shapes."""
    experiment: str
    kind: str
    seed: int
    n_images: int | None = None
    dataset: str = ""

    def path(self, folder):
        kind = self.kind.replace(", ", "-").replace(" ", "-")
        words = [self.experiment, self.dataset, kind, self.n_images and str(self.n_images), str(self.seed)]
        return folder / ("-".join(filter(None, words)) + ".json")


def read_trials(names, folders):
    """{experiment: [file contents]}. Those of an experiment and a data set come from one folder: the one that has most
    of them, or the first of equals. Raises InputError for a file that holds no trial."""
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
    """The contents of a trial's file, checked. Raises InputError for a file that holds none."""
    try:
        trial = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(trial[key], str) for key in ("date", "command")):
            raise TypeError("date and command are words")
        _check_result(path.name.split("-")[0], trial["result"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no result of cnn_vs_vit.py --train ({type(error).__name__}); remove it, or "
                         f"give another folder with --results-dir") from error
    return trial


def by_dataset(trials):
    """{data set: file contents}, "" for the built-in shapes."""
    groups = {}
    for trial in trials:
        groups.setdefault(trial["result"].get("dataset", ""), []).append(trial)
    return groups


def _check_result(name, result):
    """Raises KeyError, TypeError or ValueError unless `result` is what TRAINING_EXPERIMENTS[name].measure() gives."""
    if result["kind"] not in CNN_TO_VIT_MODELS:
        raise ValueError(f"{result['kind']!r} is none of {', '.join(CNN_TO_VIT_MODELS)}")
    if not isinstance(result["rate"], float):
        raise TypeError(f"the rate {result['rate']!r} is no number")
    counts = [result["seed"]]
    if name == "cues":
        counts += [result["choices"][cue] for cue in ("outline", "texture", "neither")]
        math.isnan(result["shape_bias"])  # NaN where no prediction was by either cue
    elif name == "reach":
        counts += [result["n"], *(count for _, count in zip(result["distances"], result["correct"], strict=True))]
    else:
        counts += [result["n"], result["n_images"], result["correct"]]
    if not all(type(count) is int and count >= 0 for count in counts) or result.get("n") == 0:
        raise ValueError(f"{counts} are no numbers of images")


def _by_kind(trials):
    """{kind: its trials}, in the order of CNN_TO_VIT_MODELS. Raises InputError without any trial."""
    if not trials:
        raise InputError("there are no trials yet; python cnn_vs_vit.py --train measures them")
    return {kind: own for kind in CNN_TO_VIT_MODELS if (own := [trial for trial in trials if trial["kind"] == kind])}


def _band_title(trials, what="bands"):
    """What bands, or lines, in a figure of trials show."""
    return f"{what}: from the lowest to the highest of {len({trial['seed'] for trial in trials})} seeds"


TRAINING_EXPERIMENTS = {"cues": Cues(), "reach": Reach(), "data": DataEfficiency()}


# ---- Which for my data? -----------------------------------------------------------------------------------


def compare_on_dataset(loaders, minutes, seeds=SEEDS, kinds=("ConvNet", "Hybrid", "ViT"), recipe=RECIPE,
                       device="auto", amp="auto", report=print):
    """Trains each kind for its share of the minutes, with each seed: {kind: [a row a seed]}. A row says image by image
    whether the prediction is right.

    loaders: (training, validation, test). Without test images (None), the validation images are used: nothing was
    chosen on them, as there is one learning rate and one time for all.
    """
    train_loader, val_loader, test_loader = loaders
    asked, rows = test_loader or val_loader, {kind: [] for kind in kinds}
    train_loader.batch_size = min(recipe.batch_size, train_loader.n_images)
    seconds = 60 * minutes / len(kinds) / len(seeds)
    for kind in kinds:  # raises before anything is trained
        build_kind(kind, len(train_loader.class_names), train_loader.img_size)
    for kind in kinds:
        model = build_kind(kind, len(train_loader.class_names), train_loader.img_size)
        one_batch = list(itertools.islice(val_loader, 1))  # the trainings do not evaluate
        n_steps = steps_within(seconds, model, train_loader, one_batch, device, optimizer=recipe.optimizer, amp=amp)
        for seed in seeds:
            own, diverged = replace(recipe, n_steps=n_steps), False
            try:
                model = train_once(kind, train_loader, own, RATES[1], seed, device, amp).model
                right = torch.cat([predictions(model, images) == labels.cpu() for images, labels in asked])
            except NotFinite as error:
                report(f"{kind}, seed {seed}: {error}; it counts as 0% accuracy")
                right, diverged = torch.zeros(asked.n_images, dtype=torch.bool), True
            rows[kind].append(dict(seed=seed, n_steps=n_steps, right=right.tolist(), diverged=diverged,
                                   accuracy=right.double().mean().item()))
            report(f"{kind}, seed {seed}: {rows[kind][-1]['accuracy']:.1%} of {len(right):,} images, {n_steps} steps")
    return rows


def split_kinds(rows, guessing=0.0):
    """{kind: [whether each seed learned]} of the kinds that learn or do not. rows: from compare_on_dataset();
    guessing: the accuracy without learning."""
    found = {kind: seeds_that_learned([row["accuracy"] for row in own], len(own[0]["right"]), guessing)
             for kind, own in rows.items()}
    return {kind: learned for kind, learned in found.items() if learned is not None}


def summarise(rows, costs=None, guessing=0.0):
    """Which model for these images, in words. rows: from compare_on_dataset(); costs: {kind: milliseconds an image};
    guessing: the accuracy without learning. A kind whose seeds learn or do not is named, and not ranked by its mean.

    Raises InputError for fewer than two kinds, or two seeds of one.
    """
    ranking, n, split = rank_trainings(rows), len(next(iter(rows.values()))[0]["right"]), split_kinds(rows, guessing)
    steady = {kind: own for kind, own in rows.items() if kind not in split}
    compared = len(steady) > 1
    if split and compared:
        ranking = rank_trainings(steady)
    text = f"{describe_ranking(ranking)}."
    if n < MIN_IMAGES:
        text = f"No winner: {n} images are too few to tell; at least {MIN_IMAGES} are needed."
    elif not compared:
        text = f"No winner: {join_words(steady) or 'none of them'} alone does the same with every seed."
    elif ranking.tied:
        text = f"No winner: {text}"
    if costs and compared and ranking.tied:
        cheapest = min(ranking.leaders, key=costs.get)
        text += f" {cheapest} is the cheapest of them, {costs[cheapest]:.2f} ms an image."
    for kind, learned in split.items():
        text += f" {describe_split(kind, [row['accuracy'] for row in rows[kind]], learned)}."
    if compared and n >= MIN_IMAGES:
        text += f" As measured: {describe_power(measured_noise(steady))}."
    for kind, own in rows.items():
        diverged = sum(row.get("diverged", False) for row in own)
        text += f" {diverged} of {len(own)} trainings of {kind} diverged, counted as 0% accuracy." if diverged else ""
    return text


def caveats(rows, controls, n_images):
    """Sentences on why these models may not be what they could be. rows: from compare_on_dataset(); controls:
    {name: accuracy} without a model; n_images: for training."""
    least, n = min(own[0]["n_steps"] for own in rows.values()), len(next(iter(rows.values()))[0]["right"])
    control, sentences = max(controls, key=controls.get), []
    if least < FEW_STEPS:
        sentences.append(f"Only {least} steps of one model fitted into its time; give more minutes.")
    if none_beats({kind: [row["accuracy"] for row in own] for kind, own in rows.items()}, controls[control], n):
        sentences.append(f"No model beats {control} by more than chance: they have not learned what is there, or there "
                         f"is nothing to learn.")
    if n_images < FEW_IMAGES:
        sentences.append(f"{n_images:,} training images are few: a pretrained model may do better than all three "
                         f"(train_vit.py --pretrained NAME).")
    return sentences
