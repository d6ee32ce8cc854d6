"""Which model for my images? The candidates of a practitioner, trained and tested on the same images.

    candidates_of         a linear probe and a fine-tuning of trained weights, and new models
    FolderImages          the loaders of the images, as each candidate needs them
    fitting_candidates    those that can predict the classes of the images
    compare_candidates    trains every candidate with several seeds, each with the recipe that train_vit.py chooses
    baselines, next_step  what to compare the accuracies with, and what to do after the comparison
    draw_candidates, candidate_table

statistics.describe_verdict() says who is ahead, and how certain that is.

Shapes:  n test images.
"""

import copy
import itertools
import math
import time
from dataclasses import dataclass
from statistics import mean

import torch
from torch import nn

from train_vit import (
    HEAD_EPOCHS,
    LINEAR_IMAGES,
    USUAL_MODELS,
    NotFinite,
    command,
    new_model,
    set_up_loader,
    steps_within,
    trainer_for,
)
from vit_bridge.analysis.cost import count_parameters, throughput
from vit_bridge.cli import counted
from vit_bridge.compare.statistics import (
    MIN_IMAGES,
    images_needed,
    mean_min_max,
    measured_noise,
    none_beats,
    rank_candidates,
    rank_speeds,
    seeds_that_learned,
)
from vit_bridge.compare.trials import SEEDS
from vit_bridge.data.loaders import get_data_loaders, get_test_loader
from vit_bridge.errors import InputError, join_words
from vit_bridge.models.adapters import adapt
from vit_bridge.models.protocol import ask, class_name
from vit_bridge.plots.charts import plot_bars
from vit_bridge.preprocessing import SMALL_SIDE, describe_size
from vit_bridge.runtime import OutOfMemory, choose_device, choose_precision, predictions
from vit_bridge.training.config import RECIPES, choose_recipe
from vit_bridge.training.linear_probe import Heads, feature_loaders, linear_classifier
from vit_bridge.weights.checkpoints import load
from vit_bridge.weights.heads import fit_head, listed
from vit_bridge.weights.pretrained import OURS, PUBLIC
from vit_model import freeze_backbone

DEFAULT_WEIGHTS = ("vit_nano_cifar10", "convnet_cifar10")
LINEAR, LARGEST = "linear classifier on pixels", "always the largest class"  # the baselines
NEW_MODELS = {"ViT": USUAL_MODELS[None][0], "hybrid": "hybrid", "ConvNet": "convnet"}  # for images up to SMALL_SIDE


# ---- Candidates -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A way to get a model, as train_vit.py offers it.

    Attributes
    ----------
    name : str
        What the report calls it.
    model : str
        The name of a new model in MODELS, or the name or file of trained weights.
    start : {"new", "pretrained", "head"}
        As in choose_recipe: train new weights, fine-tune trained ones, or train only a new head on trained ones.
    weights : Module, optional
        The trained model.
    """

    name: str
    model: str
    start: str = "new"
    weights: nn.Module | None = None

    @property
    def preprocessing(self):
        """How images for the trained weights must be prepared; None for a new model, which takes any."""
        return None if self.weights is None else adapt(self.weights).preprocessing

    def command(self, data_dir, img_size, minutes, recipe, options=()):
        """Return the command of train_vit.py that trains this candidate.

        Parameters
        ----------
        data_dir : path
        img_size : int or None
            None is the images' own.
        minutes : float
        recipe : str
            The recipe that was compared. A new model needs it: for more minutes, train_vit.py may choose a larger one.
        options : sequence of str, optional
            Further options of train_vit.py.
        """
        new = self.start == "new"
        words = ["--data-dir", data_dir, "--model" if new else "--pretrained", self.model, *options]
        words += ["--img-size", img_size] if new and img_size is not None else []
        words += ["--recipe", recipe] if new else []
        return command(*words, *(["--freeze-backbone"] if self.start == "head" else ["--minutes", f"{minutes:g}"]))


def candidates_of(pretrained=DEFAULT_WEIGHTS):
    """Return the candidates: from each model with attention a linear probe, from all a fine-tuning, and new models.

    Parameters
    ----------
    pretrained : sequence of str
        Names or files of trained weights, as for load(). Of a model that learned without labels, the encoder is used.

    Returns
    -------
    list of Candidate

    Raises
    ------
    InputError
        If weights cannot be loaded, or are listed twice.
    """
    found = []
    for name in pretrained:
        if list(pretrained).count(name) > 1:
            raise InputError(f"--pretrained lists {name} twice; list each name or file once")
        model = load(name)
        if encoder := ask(model, "encoder"):
            model = encoder()
        if adapt(model).has_attention:
            found.append(Candidate(f"linear probe of {name}", name, "head", model))
        found.append(Candidate(f"fine-tuned {name}", name, "pretrained", model))
    return [*found, *(Candidate(f"{kind} from scratch", name) for kind, name in NEW_MODELS.items())]


def describe_weights(candidate, class_names):
    """Describe what a candidate's weights were trained on, and whether that makes the comparison unfair.

    Returns
    -------
    origin : str
        One sentence.
    unfair : str
        "", or a sentence if some of these classes are among those of the weights, by name.
    """
    names = adapt(candidate.weights).class_names
    if candidate.model in OURS:
        origin = OURS[candidate.model][0]
    elif candidate.model in PUBLIC:
        origin = f"its authors' data ({PUBLIC[candidate.model].source})"
    else:
        origin = f"images of {len(names)} classes{listed(names)}" if names else "images that its file does not record"
    known = [name for name in map(str, class_names) if name in set(map(str, names or ()))]
    same = "the same classes" if len(known) == len(class_names) else f"classes of the same names{listed(known)}"
    return (f"{candidate.model} ({class_name(candidate.weights)}) was trained on {origin}.",
            f"{candidate.model} was trained on {same}. If these images were among its training images, the comparison "
            f"is unfair." if known else "")


# ---- Images -----------------------------------------------------------------------------------------------


class FolderImages:
    """The training, validation and test images of a folder or data set, in loaders for each preprocessing.

    Parameters
    ----------
    limit : int, optional
        Use at most this many images of each part, for a dry run.
    **data
        Arguments of get_data_loaders. Without img_size, new models get the images in their own size, but photographs
        in SMALL_SIDE x SMALL_SIDE pixels.

    Attributes
    ----------
    img_size : int or None
        The size that train_vit.py has to be told for a new model; None if it finds the same.
    skipped : list of str
        The image files that could not be read so far.
    """

    def __init__(self, limit=None, **data):
        self.limit, self.data, self.read = limit, dict(img_size=None) | data, {}
        if max(self.loaders()[0].size) > SMALL_SIDE:
            self.data["img_size"], self.read = SMALL_SIDE, {}

    def loaders(self, preprocessing=None):
        """Return (training, validation, test loader or None) of images for a trained model, or for new models."""
        shown = preprocessing
        key = shown and (shown.img_size, shown.mean, shown.std, shown.interpolation)
        if key not in self.read:
            data = self.data if shown is None else self.data | dict(img_size=shown.img_size, preprocessing=shown)
            loaders = (*get_data_loaders(**data), get_test_loader(**data))
            if self.limit is not None:
                loaders = [loader and loader.without_augmentation(self.limit) for loader in loaders]
                loaders[0].training = True
            self.read[key] = tuple(loaders)
        return self.read[key]

    @property
    def img_size(self):
        return self.data["img_size"]

    @property
    def skipped(self):
        return sorted({str(file) for loaders in self.read.values() for loader in loaders if loader is not None
                       for file in loader.skipped})


def baselines(loaders):
    """Return the accuracies of two baselines that need none of the candidates, and the accuracy without learning.

    Parameters
    ----------
    loaders : tuple
        Training, validation and test loader. If the last is None, the penalty of the linear classifier is chosen on
        the images on which it is tested, so its accuracy is slightly too high.

    Returns
    -------
    dict
        {name: accuracy} of a linear classifier on the pixels, and of predicting the largest class every time.
    float
        The second of these.
    """
    train_loader, val_loader, test_loader = loaders
    tested, counts = test_loader or val_loader, train_loader.class_counts
    linear = linear_classifier(train_loader.without_augmentation(LINEAR_IMAGES), val_loader, test_loader)
    guessing = tested.class_counts[counts.index(max(counts))] / tested.n_images
    return {LINEAR: linear["val_acc" if test_loader is None else "test_acc"], LARGEST: guessing}, guessing


# ---- Training ---------------------------------------------------------------------------------------------


def fitting_candidates(candidates, images, minutes, seeds=SEEDS, device="auto", amp="auto"):
    """Return the candidates that can predict the classes of these images, and a sentence about each of the others.

    The arguments are those of compare_candidates(). Raises InputError if there are fewer than two.
    """
    share = share_of(minutes, seeds, candidates)
    reasons = {one.name: _reason_against(one, images, share, choose_device(device), amp) for one in candidates}
    fitting = [one for one in candidates if not reasons[one.name]]
    return _two_or_more(fitting, candidates), [f"{name} is left out: {reason}" for name, reason in reasons.items()
                                               if reason]


def _two_or_more(found, candidates):
    """Return what was found for these candidates; raise InputError if it is for fewer than two."""
    if len(found) < 2:
        raise InputError(f"only {len(found)} of {len(candidates)} candidates can be trained on these images; choose "
                         f"another --img-size, or other weights with --pretrained")
    return found


def compare_candidates(candidates, images, minutes, seeds=SEEDS, device="auto", amp="auto", n_steps=None,
                       report=print):
    """Train each candidate with each seed on the same images, and test the weights after the last step.

    Parameters
    ----------
    candidates : list of Candidate
    images : FolderImages
        Tested are the test images or, if there are none, the validation images. No choice is made on either.
    minutes : float
        Time of all training runs together, divided equally among them. Linear probes are not counted: they train for
        HEAD_EPOCHS epochs, which take little time.
    n_steps : int, optional
        Train for this many steps instead.
    report : callable, optional
        Called with one line of text after each training run.

    Returns
    -------
    results : dict
        {name: result} with the recipe, img_size, parameters, ms (milliseconds per image; the same for a linear probe
        and a fine-tuning of the same weights), seconds (of all training runs with their tests) and rows, one for each
        seed. A row holds seed, n_steps, epochs, diverged, accuracy, and right, one boolean per image.
    left_out : list of str
        A sentence about each candidate that needs more memory than there is.

    Raises
    ------
    InputError
        If fewer than two candidates can be trained.
    """
    share, results, left_out = share_of(minutes, seeds, candidates), {}, []
    for one in candidates:
        try:
            results[one.name] = _train(one, images, share, seeds, choose_device(device), amp, n_steps, report)
        except OutOfMemory:
            left_out.append(f"{one.name} is left out: its training needs more memory than the device has")
            report(left_out[-1])
    for one, other in itertools.permutations([one for one in candidates if one.name in results and one.weights], 2):
        if one.weights is other.weights:  # the same network
            results[one.name]["ms"] = min(results[one.name]["ms"], results[other.name]["ms"])
    return _two_or_more(results, candidates), left_out


def share_of(minutes, seeds, candidates):
    """Return the minutes of one training run."""
    return minutes / len(seeds) / max(1, sum(one.start != "head" for one in candidates))


def _reason_against(candidate, images, minutes, device, amp):
    """Return why a candidate cannot predict the classes of these images; "" if it can."""
    try:
        loaders = images.loaders(candidate.preprocessing)
        recipe = RECIPES[_recipe(candidate, loaders[0], minutes, device, amp)]
        model = _first_model(candidate, recipe, loaders[0], 0)
        predictions(model, torch.zeros(2, loaders[0].preprocessing.n_channels, *loaders[0].size))
    except InputError as error:
        return str(error)
    return ""


def _recipe(candidate, loader, minutes, device, amp):
    """Return the name of the recipe that train_vit.py chooses for a candidate and a number of minutes."""
    precision = choose_precision(amp, device)
    minutes = None if candidate.start == "head" else minutes
    return choose_recipe(candidate.model, loader.img_size, minutes, candidate.start, precision)


def _first_model(candidate, recipe, loader, seed):
    """Set up the training loader for a recipe and a seed, and return the candidate's model before its training."""
    set_up_loader(loader, recipe, seed)
    if candidate.weights is None:
        return new_model(candidate.model, recipe, loader, seed=seed)
    model = copy.deepcopy(candidate.weights)
    fit_head(model, loader.class_names)
    return model


def _train(candidate, images, minutes, seeds, device, amp, n_steps, report):
    """Train a candidate with each seed and return its entry of compare_candidates()."""
    train_loader, val_loader, test_loader = images.loaders(candidate.preprocessing)
    name, started, rows = _recipe(candidate, train_loader, minutes, device, amp), time.perf_counter(), []
    recipe, given = RECIPES[name], (train_loader, test_loader or val_loader)
    if candidate.start == "head":  # the features are computed once, without augmentation
        backbone = freeze_backbone(_first_model(candidate, recipe, train_loader, seeds[0]))
        given = feature_loaders(backbone, given, device)
        n_steps = n_steps or HEAD_EPOCHS * len(given[0])
    for seed in seeds:
        model, given[0].seed = _first_model(candidate, recipe, train_loader, seed), seed
        trained = Heads(freeze_backbone(model)) if candidate.start == "head" else model
        trainer = trainer_for(recipe, model, device, trained=trained, seed=seed, amp=amp)
        row = dict(seed=seed, n_steps=0, epochs=0.0, diverged="")
        try:
            if n_steps is None:  # measured with the first seed
                one_batch = list(itertools.islice(val_loader, 1))  # these training runs do not validate
                n_steps = steps_within(60 * minutes, model, train_loader, one_batch, device, trainer.objective,
                                       trainer.config)
            row |= dict(n_steps=n_steps, epochs=round(n_steps / len(given[0]), 2))
            trainer.train(given[0], n_steps=n_steps, progress=False)
        except NotFinite as error:
            row["diverged"] = str(error)
        right = torch.cat([predictions(trained, inputs) == labels.cpu() for inputs, labels in given[1]])  # (n)
        right &= not row["diverged"]
        rows.append(row | dict(accuracy=right.double().mean().item(), right=right.tolist()))
        report(f"{candidate.name}, seed {seed}: {rows[-1]['accuracy']:.1%} of {len(right):,} images after "
               f"{counted(row['n_steps'], 'step')} ({counted(row['epochs'], 'epoch')})"
               + (f"; counts as 0%: {row['diverged']}" if row["diverged"] else ""))
    return dict(recipe=name, img_size=train_loader.img_size, parameters=count_parameters(model),
                ms=1e3 / throughput(model, batch_size=32, seconds=0.5, device=device),
                seconds=round(time.perf_counter() - started, 1), rows=rows)


# ---- What to do next --------------------------------------------------------------------------------------


def next_step(rows, costs, commands, guessing=0.0):
    """Return what to do after the comparison: the command that trains the best candidate, or what settles a tie.

    Parameters
    ----------
    rows : dict
        {name: one row for each seed}, as in compare_candidates().
    costs : dict
        {name: milliseconds per image}.
    commands : dict
        {name: command that trains the candidate}.
    guessing : float, optional
        The accuracy without learning.

    Returns
    -------
    list of str
        Lines of text.
    """
    ranking, _ = rank_candidates(rows, guessing)
    n = len(next(iter(rows.values()))[0]["right"])
    if n < MIN_IMAGES:
        return ["Next: repeat the comparison with more test images."]
    if ranking is None or none_beats(accuracies_of(rows), guessing, n):
        return ["Next: repeat the comparison with more --minutes, and check that the images show their classes."]
    if ranking.winner:
        return [f"Next: {commands[ranking.winner]}"]
    second = ranking.tied[0]
    lead = ranking.differences[second]
    needed = images_needed(lead, measured_noise({name: rows[name] for name in (ranking.best, second)}, len(rows)))
    cheap = rank_speeds({name: 1 / costs[name] for name in ranking.leaders}).leaders
    first = next(name for name in rows if name in cheap)
    return [f"Next: take the fastest of them, {first} ({costs[first]:.2g} ms per image; a difference of 10% does not "
            f"count): {commands[first]}",
            f"{ranking.best} and {second} differ by {100 * lead:.1f} points; " + (
                "more test images alone would not tell them apart." if needed == math.inf else
                f"about {max(float(f'{needed:.2g}'), n):,.0f} test images instead of {n:,} would tell them apart.")]


def accuracies_of(rows):
    """Return {name: [accuracy of each seed]}."""
    return {name: [row["accuracy"] for row in own] for name, own in rows.items()}


def caveats(results, controls, guessing=0.0):
    """Return sentences that warn about a comparison: training runs that failed, or no candidate above the baselines.

    Parameters
    ----------
    results : dict
        The result of compare_candidates().
    controls, guessing
        The results of baselines().
    """
    rows = {name: result["rows"] for name, result in results.items()}
    n, sentences, linear = len(next(iter(rows.values()))[0]["right"]), [], controls[LINEAR]
    for name, own in rows.items():
        diverged = sum(bool(row["diverged"]) for row in own)
        sentences += [f"{diverged} of {len(own)} training runs of {name} diverged and count as 0%."] * bool(diverged)
    if short := [name for name, own in rows.items() if own[0]["epochs"] < 1 and not own[0]["diverged"]]:
        sentences.append(f"{join_words(short)} trained for less than one epoch; use more --minutes.")
    if none_beats(accuracies_of(rows), guessing, n):
        sentences.append(f"No candidate beats guessing ({guessing:.1%}) by more than chance.")
    elif linear == 1:
        sentences.append(f"No candidate can beat the {LINEAR}, which classifies all {n:,} images correctly.")
    elif none_beats(accuracies_of(rows), linear, n):
        sentences.append(f"With {n:,} images, it cannot be shown that any candidate beats the {LINEAR} ({linear:.1%}).")
    else:
        left = rows
        for control, level in (("guessing", guessing), (f"the {LINEAR}", linear)):
            weak = [name for name in left if none_beats(accuracies_of({name: rows[name]}), level, n)]
            left = [name for name in left if name not in weak]
            sentences += [f"Not shown to beat {control} ({level:.1%}): {join_words(weak)}."] * bool(weak)
    return sentences


# ---- Figure and table -------------------------------------------------------------------------------------


def draw_candidates(results, controls, guessing=0.0):
    """Draw the accuracy of each candidate, from the lowest to the highest seed, beside its cost per image."""
    shown = {name: _shown(result["rows"], guessing) for name, result in results.items()}
    names = {name: f"{name}: {words}" if words else name for name, (_, words) in shown.items()}
    bars = {names[name]: [100 * value for value in mean_min_max(own)] for name, (own, _) in shown.items()}
    figure = plot_bars({"accuracy (%)\n(lines: lowest and highest seed)":
                        bars | {name: 100 * share for name, share in controls.items()},
                        "ms per image\n(batches of 32)":
                        {names[name]: result["ms"] for name, result in results.items()}})
    figure.axes[1].set_yticks([])  # the names are beside the first panel
    return figure


def candidate_table(results, controls, guessing=0.0):
    """Return (caption, rows) of the table of all candidates and baselines."""
    rows = next(iter(results.values()))["rows"]
    table = [["candidate", "mean", *(f"seed {row['seed']}" for row in rows), "recipe", "pixels", "parameters", "epochs",
              "seconds", "ms per image"]]
    for name, result in results.items():
        accuracies, words = _shown(result["rows"], guessing)
        table.append([name, words or f"{mean(accuracies):.1%}", *(f"{row['accuracy']:.1%}" for row in result["rows"]),
                      result["recipe"], describe_size(result["img_size"]), f"{result['parameters']:,}",
                      f"{result['rows'][0]['epochs']:g}", f"{result['seconds']:.0f}", f"{result['ms']:.2f}"])
    table += [[name, f"{share:.1%}", *[""] * (len(table[0]) - 2)] for name, share in controls.items()]
    return f"Accuracy on {len(rows[0]['right']):,} images; seconds of all seeds together, with their tests", table


def _shown(rows, guessing):
    """Return (the accuracies of a candidate's seeds that learned, "2 of 3 learned" or "" if all behave the same)."""
    accuracies = [row["accuracy"] for row in rows]
    learned = seeds_that_learned(accuracies, len(rows[0]["right"]), guessing)
    if learned is None:
        return accuracies, ""
    return list(itertools.compress(accuracies, learned)), f"{sum(learned)} of {len(rows)} learned"
