"""CNN against ViT, by training them: how far-apart marks are told, how many images are needed, which for my data.

    train_once      one model, one training: the same recipe for every model
    LEARNING[name]  "reach", "cues" and "data": measure() gives a cell, of one kind of model, one seed and, for "data",
                    one number of images; draw() and say() take many cells, as those of experiments.py take data
    judge           the three trained on somebody's own images, several seeds each; verdict() puts it into words

A cell is a file: what was measured stays when the next one is cut off. Learning rates are chosen on validation images,
of one grid that all models share, by the first seed and the most images; test images are read once, with the chosen
one.

Shapes:  N images, S seeds, n test images.
"""

import itertools
import math
from dataclasses import dataclass, field, replace
from statistics import mean

import torch

from train_vit import NotFinite, Trainer, steps_within
from vit_bridge.analysis.cost import count_parameters
from vit_bridge.analysis.metrics import wilson_interval
from vit_bridge.analysis.perturbations import cue_choices, shape_bias
from vit_bridge.compare.experiments import Experiment
from vit_bridge.compare.statistics import FEW, bands, compare_two, format_range, join_words, margin, mean_min_max
from vit_bridge.data.augmentation import Augmentation
from vit_bridge.data.datasets import DatasetInfo
from vit_bridge.data.loaders import MemoryLoader
from vit_bridge.data.shapes import CUES, make_cues, make_marks
from vit_bridge.errors import InputError
from vit_bridge.models.registry import build_model
from vit_bridge.plots.charts import plot_bars, plot_curves
from vit_bridge.runtime import predictions

# From the plain ViT to the CNN, locality added back step by step; parameters within 10% of each other.
CNN_TO_VIT_MODELS = {
    "ViT": ("vit_nano", {}),
    "ViT, mean pooling": ("vit_nano", dict(pool="mean")),
    "Hybrid": ("hybrid", {}),
    "ConvNet": ("convnet", {}),
}
RATES = (5e-4, 1e-3, 2e-3)  # the grid of learning rates
SEEDS = (0, 1, 2)
TRAIN_FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the training images
DISTANCES = (8, 14, 20, 26, 32, 42)  # in pixels, at which reach is tested
CENTRED = dict(mean=(0.5,) * 3, std=(0.25,) * 3)


@dataclass(frozen=True)
class Recipe:
    """How every model is trained here. Steps, not epochs: fewer images are seen more often."""
    n_steps: int = 800
    batch_size: int = 64
    weight_decay: float = 0.05
    schedule: str = "linear"
    optimizer: str = "muon"
    augmentation: Augmentation = field(default_factory=Augmentation)


RECIPE = Recipe()


def loader_of(images, labels, class_names, recipe, seed=0, training=False, name="drawn", mean=None, std=None):
    """A loader of uint8 images (N, 3, S, S) and labels (N,), varied as the recipe says where training."""
    facts = DatasetInfo(name, list(class_names), images.shape[-1], mean or CENTRED["mean"], std or CENTRED["std"])
    return MemoryLoader(images, labels, facts, recipe.batch_size, seed, training, augmentation=recipe.augmentation)


def build_kind(kind, n_classes, img_size):
    """A new model of STEPS_BETWEEN for images of this side. From 64 pixels on patches have twice the side and the stem
    of the ConvNet twice the stride, so that there are no more places than in 32 and the cost of all grows alike."""
    name, options = CNN_TO_VIT_MODELS[kind]
    coarser = {}
    if img_size >= 64 and img_size % 8 == 0:
        coarser = dict(stem_stride=2) if name == "convnet" else dict(patch_size=8)
    return build_model(name, n_classes=n_classes, img_size=img_size, **options, **coarser)


def train_once(kind, loader, recipe, rate, seed, device="auto", amp="auto", progress=False):
    """The Trainer of a model of STEPS_BETWEEN, after its training."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build_kind(kind, len(loader.class_names), loader.img_size)
    loader.seed = seed
    trainer = Trainer(model, device, amp=amp)
    trainer.train(loader, n_steps=recipe.n_steps, learning_rate=rate, weight_decay=recipe.weight_decay, seed=seed,
                  schedule=recipe.schedule, optimizer=recipe.optimizer, progress=progress)
    return trainer


def best_of_rates(kind, loader, val_loader, recipe, seed, rates=RATES, **run):
    """(model, {rate: validation accuracy}, the best rate) of one training with each rate; the least among equals. A
    training that comes to no finite numbers has accuracy 0; where all do, the last one's error is raised."""
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


# ---- 6. Reach ---------------------------------------------------------------------------------------------


def measure_reach(kind, seed, recipe=RECIPE, n_images=20_000, n_test=1000, distances=DISTANCES, img_size=48, **run):
    """Trained on two marks at all distances, tested at some: how many of n_test answers are right at each."""
    recipe = replace(recipe, augmentation=Augmentation(0.0, "random"))  # a border that mirrors would add marks
    drawn, val = (make_marks(n, img_size, seed=1 + seed, start=start) for n, start in ((n_images, 0), (2000, 10**9)))
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


def draw_reach(cells):
    points = {}
    for kind, own in by_kind(cells).items():
        points[kind] = [(distance, *mean_min_max([cell["correct"][i] / cell["n"] for cell in own]))
                        for i, distance in enumerate(own[0]["distances"])]
    return {"reach": plot_curves({"Two marks: the same, or different?": points}, "distance of the marks (pixels)",
                                 "images right (%)", percent=True, lines=[("guessing", 0.5)], title=bands(cells))}


def say_reach(cells):
    """Who loses most as the marks move apart, of those that have learned the task at some distance at all."""
    of_kinds = by_kind(cells)
    at, n, kinds = cells[0]["distances"], cells[0]["n"], list(of_kinds)
    shares = {kind: torch.tensor([cell["correct"] for cell in own]).double() / n
              for kind, own in of_kinds.items()}  # kind -> (seeds, distances)
    ends = join_words(f"{own[:, 0].mean():.0%} and {own[:, -1].mean():.0%} ({kind})" for kind, own in shares.items())
    parts = [f"Whether two marks are the same is answered rightly at {at[0]} and at {at[-1]} pixels in {ends} of the "
             f"cases; guessing gives 50%."]
    least = max(0.6, 0.5 + 3 * math.sqrt(0.25 / n))
    learned = [kind for kind in kinds if shares[kind].mean(dim=0).max() > least]
    if not learned:
        return parts[0] + " None has learned the task in these steps, so nothing follows about reach."
    falls = {kind: (shares[kind].cummax(dim=1).values - shares[kind]).amax(dim=1).tolist() for kind in learned}
    order = sorted(learned, key=lambda kind: mean(falls[kind]), reverse=True)
    most, biggest = order[0], mean(falls[order[0]])
    level = [kind for kind in order if biggest - mean(falls[kind]) <= margin(falls[most], falls[kind], n, 0.5 / n)]
    if biggest <= 0.05:
        parts.append(f"Of those that have learned it, {join_words(learned)}, none loses more than 5 points from a shorter "
                     f"distance to a longer.")
    elif len(level) == 1:
        parts.append(f"{most} loses most with distance, {100 * biggest:.0f} points.")
    else:
        parts.append(f"{most} loses {100 * biggest:.0f} points with distance, but {join_words(level)} cannot be told apart "
                     f"in that.")
    if len(learned) < len(kinds):
        parts.append(f"{join_words(kind for kind in kinds if kind not in learned)} did not learn the task at any distance.")
    return " ".join(parts)


def table_of_reach(cells):
    return [("Images right at each distance in pixels: mean of the seeds, lowest to highest", [
        ["", "seeds", *(f"{distance} px" for distance in cells[0]["distances"])]] + [
        [kind, len(own), *(format_range([cell["correct"][i] / cell["n"] for cell in own])
                           for i in range(len(cells[0]["distances"])))] for kind, own in by_kind(cells).items()])]


# ---- 5, second part: outline against texture --------------------------------------------------------------


def measure_cues(kind, seed, recipe=RECIPE, n_images=10_000, n_test=1000, img_size=32, **run):
    """Trained where outline and texture name the same class, then asked where they are of different ones."""
    images, outlines, _ = make_cues(n_images, img_size, seed=1 + seed)
    val_images, val_outlines, _ = make_cues(1000, img_size, seed=1 + seed, start=10**9)
    loader = loader_of(images, outlines, CUES, recipe, seed, True)
    model, rates, rate = best_of_rates(kind, loader, loader_of(val_images, val_outlines, CUES, recipe), recipe, seed,
                                       **run)
    test, outlines, textures = make_cues(n_test, img_size, seed=0, start=2 * 10**9, agree=False)
    shown = torch.cat([images for images, _ in loader_of(test, outlines, CUES, recipe)])
    choices = cue_choices(predictions(model, shown), outlines, textures)
    return dict(kind=kind, seed=seed, choices=choices, shape_bias=shape_bias(choices), val_acc=rates[rate],
                rates=rates, rate=rate)


def draw_cues(cells):
    bars = {kind: mean_min_max(biases_of(cells, kind)) for kind in kinds_of(cells) if biases_of(cells, kind)}
    heading = "answers by outline,\nof those by outline or texture"
    if not bars:
        return {}
    return {"shape_bias": plot_bars({heading: bars}, title=bands(cells, "lines"))}


def biases_of(cells, kind):
    """The shape bias of each seed that has one."""
    return [cell["shape_bias"] for cell in cells if cell["kind"] == kind and not math.isnan(cell["shape_bias"])]


def say_cues(cells):
    of_seeds = {kind: biases_of(cells, kind) for kind in kinds_of(cells)}
    bias = {kind: mean(values) for kind, values in of_seeds.items() if values}
    if not bias:
        return "No model answers by outline or by texture."
    values = join_words(f"{value:.0%} ({kind})" for kind, value in bias.items())
    parts = [f"{join_words(kinds)} {'goes' if len(kinds) == 1 else 'go'} by {cue} with every seed"
             for cue in ("outline", "texture") if (kinds := [kind for kind in of_seeds if goes_by(cue, cells, kind)])]
    leaning = f"{', '.join(parts)}." if parts else "None goes by the same cue with every seed."
    silent = [kind for kind in of_seeds if kind not in bias]
    leaning += f" {join_words(silent)} never answered by either." if silent else ""
    return f"Where outline and texture are at odds, the outline decides in {values} of the answers by either. {leaning}"


def table_of_cues(cells):
    table = [["", "seeds", "by outline, of those by either", "by outline", "by texture", "by neither"]]
    for kind, own in by_kind(cells).items():
        biases = biases_of(cells, kind)
        table.append([kind, len(own), format_range(biases) if biases else "",
                      *(f"{mean(cell['choices'][cue] for cell in own):,.0f}"
                        for cue in ("outline", "texture", "neither"))])
    return [("Answers where the cues are at odds, means of the seeds", table)]


def goes_by(cue, cells, kind):
    """Whether with two seeds or more, and every one, the answers by either cue are more by this one than chance gives:
    a Wilson interval on one side of a half."""
    of_seeds = [(cell["choices"][cue], cell["choices"]["outline"] + cell["choices"]["texture"]) for cell in cells
                if cell["kind"] == kind]
    return len(of_seeds) > 1 and all(n and wilson_interval(correct, n)[0] > 0.5 for correct, n in of_seeds)


# ---- 7. Data efficiency -----------------------------------------------------------------------------------


def measure_data(kind, seed, n_images, loaders, recipe=RECIPE, **run):
    """Trained on so many of the training images, drawn by the seed, the same steps whatever their number; test accuracy
    at the rate that the validation images, always all of them, chose.

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


def numbers_of_images(shares, n_images, n_classes):
    """How many of n_images each share is, at least one a class; each number once, the largest first."""
    return sorted({max(n_classes, round(share * n_images)) for share in shares}, reverse=True)


def draw_data(cells):
    points = {}
    for kind, own in by_kind(cells).items():
        points[kind] = [(n_images, *mean_min_max([cell["correct"] / cell["n"] for cell in own
                                            if cell["n_images"] == n_images]))
                        for n_images in sorted({cell["n_images"] for cell in own})]
    heading = f"Test accuracy after the same steps: {cells[0].get('dataset') or 'drawn shapes'}"
    return {"data_efficiency": plot_curves({heading: points}, "training images",
                                           "images right (%)", percent=True, log=("x",), title=bands(cells))}


def say_data(cells):
    """What each step from the ViT to the ConvNet brings at the fewest and at the most images."""
    parts, n = [], cells[0]["n"]
    numbers = sorted({cell["n_images"] for cell in cells})
    for which, n_images in [("With the fewest", numbers[0]), ("With the most", numbers[-1])][-len(numbers):]:
        at = {kind: [c["correct"] / c["n"] for c in own if c["n_images"] == n_images]
              for kind, own in by_kind(cells).items()}
        at = {kind: values for kind, values in at.items() if values}
        best, others = max(at, key=lambda kind: mean(at[kind])), []
        for kind, values in at.items():
            if kind != best and mean(at[best]) - mean(values) <= margin(at[best], values, n):
                others.append(kind)
        values = join_words(f"{mean(values):.1%} ({kind})" for kind, values in at.items())
        lead = f"{best} is ahead" if not others else f"{best} and {join_words(others)} cannot be told apart"
        missing = [kind for kind in kinds_of(cells) if kind not in at]
        if len(at) == 1:
            lead = "there is nothing to compare it with yet"
        lead += f" ({join_words(missing)} not measured yet)" if missing else ""
        steps = []
        for before, kind in itertools.pairwise(at):
            gain = mean(at[kind]) - mean(at[before])
            chance = " (no more than chance)" if abs(gain) <= margin(at[before], at[kind], n) else ""
            steps.append(f"{kind} {100 * gain:+.1f}{chance}")
        steps = f" Step by step, in points: {join_words(steps)}." if steps else ""
        parts.append(f"{which} images, {n_images:,}, {values}: {lead}.{steps}")
    return " ".join(parts)


def table_of_data(cells):
    numbers = sorted({cell["n_images"] for cell in cells})
    table = [["training images", *by_kind(cells)]]
    for n_images in numbers:
        shares = [[cell["correct"] / cell["n"] for cell in own if cell["n_images"] == n_images]
                  for own in by_kind(cells).values()]
        table.append([f"{n_images:,}", *(format_range(values) if values else "" for values in shares)])
    return [("Test images right: mean of the seeds, lowest to highest", table)]


# ---- Which for my data? -----------------------------------------------------------------------------------


def compare_on_dataset(loaders, minutes, seeds=SEEDS, kinds=("ConvNet", "Hybrid", "ViT"), recipe=RECIPE, device="auto", amp="auto",
          report=print):
    """Trains each kind for its share of the minutes, each seed anew: {kind: [a row a seed]}.

    loaders: (training, validation, test). Where there are no test images (None) the validation images are asked, which
    no choice was made on: one learning rate for all, one length by time. A row has answers, right or not, image by
    image.
    """
    train_loader, val_loader, test_loader = loaders
    asked, rows = test_loader or val_loader, {kind: [] for kind in kinds}
    train_loader.batch_size = min(recipe.batch_size, train_loader.n_images)
    seconds = 60 * minutes / len(kinds) / len(seeds)
    for kind in kinds:  # what cannot be built is said before anything is trained
        build_kind(kind, len(train_loader.class_names), train_loader.img_size)
    for kind in kinds:
        model = build_kind(kind, len(train_loader.class_names), train_loader.img_size)
        one_batch = list(itertools.islice(val_loader, 1))  # the trainings do not evaluate
        n_steps = steps_within(seconds, model, train_loader, one_batch, recipe.optimizer, device=device, amp=amp)
        for seed in seeds:
            own, diverged = replace(recipe, n_steps=n_steps), False
            try:
                model = train_once(kind, train_loader, own, RATES[1], seed, device, amp).model
                right = torch.cat([predictions(model, images) == labels.cpu() for images, labels in asked])
            except NotFinite as error:
                report(f"{kind}, seed {seed}: {error}; it counts as no image right")
                right, diverged = torch.zeros(asked.n_images, dtype=torch.bool), True
            rows[kind].append(dict(seed=seed, n_steps=n_steps, right=right.tolist(), diverged=diverged,
                                   accuracy=right.double().mean().item()))
            report(f"{kind}, seed {seed}: {rows[kind][-1]['accuracy']:.1%} of {len(right):,} images, {n_steps} steps")
    return rows


def summarise(rows, costs=None):
    """Which model for these images, in words: a winner only where its lead over both others is larger than what chance
    does. rows: as from judge(); costs: {kind: milliseconds an image}.

    Raises InputError for fewer than two kinds or two seeds.
    """
    if len(rows) < 2 or min(len(own) for own in rows.values()) < 2:
        raise InputError("a verdict needs two kinds of model and two seeds of each at least; give more minutes")
    levels = {kind: mean(row["accuracy"] for row in own) for kind, own in rows.items()}
    order = sorted(levels, key=levels.get, reverse=True)
    best, n = order[0], len(rows[order[0]][0]["right"])
    differences = {kind: compare_two(rows[best], rows[kind]) for kind in order[1:]}
    tied = [kind for kind, (difference, half) in differences.items() if difference <= half or n < FEW]
    values = join_words(f"{levels[kind]:.1%} ({kind})" for kind in order)
    seen = f"{len(rows[best])} seeds each, {n:,} images: {values}."
    for kind, own in rows.items():
        diverged = sum(row.get("diverged", False) for row in own)
        seen += f" {diverged} training{'s' * (diverged > 1)} of {kind} diverged and count" \
                f"{'s' * (diverged == 1)} as no image right." if diverged else ""
    if not tied:
        leads = join_words(f"{100 * d:.1f} points ({100 * (d - h):.1f} to {100 * min(1, d + h):.1f}) before {kind}"
                       for kind, (d, h) in differences.items())
        return f"{best}. {seen} It is {leads}: more than seeds and images vary by."
    level = [best, *tied]
    if n < FEW:
        return f"No winner: {n} images are too few to tell, {FEW} are the least. {seen}"
    lost = [kind for kind in order if kind not in level]
    leads = join_words(f"{kind} by {100 * differences[kind][0]:.1f} points, where chance gives up to "
                   f"{100 * min(1, differences[kind][1]):.1f}"
                   for kind in tied)
    text = f"No winner among {join_words(level)}. {seen} {best} leads {leads}"
    text += f"; {join_words(lost)} {'is' if len(lost) == 1 else 'are'} behind." if lost else "."
    if costs:
        cheapest = min(level, key=lambda kind: costs[kind])
        text += f" Of these {cheapest} costs least, {costs[cheapest]:.2f} ms an image."
    return text


# ---- What the functions above lean on ---------------------------------------------------------------------


def kinds_of(cells):
    """The kinds of the cells, in the order of STEPS_BETWEEN. Raises InputError where there is no cell."""
    if not cells:
        raise InputError("there are no cells yet; python cnn_vs_vit.py --full measures them")
    return [kind for kind in CNN_TO_VIT_MODELS if any(cell["kind"] == kind for cell in cells)]


def by_kind(cells):
    """{kind: its cells}."""
    return {kind: [cell for cell in cells if cell["kind"] == kind] for kind in kinds_of(cells)}


def check_result(name, result):
    """Raises KeyError, TypeError or ValueError where `result` is not what measure() of LEARNING[name] gives."""
    if result["kind"] not in CNN_TO_VIT_MODELS:
        raise ValueError(f"{result['kind']!r} is none of {', '.join(CNN_TO_VIT_MODELS)}")
    if not isinstance(result["rate"], float):
        raise TypeError(f"the rate {result['rate']!r} is no number")
    counts = [result["seed"]]
    if name == "cues":
        counts += [result["choices"][cue] for cue in ("outline", "texture", "neither")]
        math.isnan(result["shape_bias"])  # NaN where no answer was by either
    elif name == "reach":
        counts += [result["n"], *(count for _, count in zip(result["distances"], result["correct"], strict=True))]
    else:
        counts += [result["n"], result["n_images"], result["correct"]]
    if not all(type(count) is int and count >= 0 for count in counts) or result.get("n") == 0:
        raise ValueError(f"{counts} are no numbers of images")


LEARNING = {
    "cues": Experiment("Outline or texture", "Where the two are at odds, by which does a model go?", measure_cues,
                       draw_cues, say_cues, table=table_of_cues),
    "reach": Experiment("Reach", "Can a model compare two marks that lie far apart?", measure_reach, draw_reach,
                        say_reach, table=table_of_reach),
    "data": Experiment("Data efficiency", "How many images does each need, and what does each step from the ViT to the "
                       "CNN buy?", measure_data, draw_data, say_data, table=table_of_data),
}
