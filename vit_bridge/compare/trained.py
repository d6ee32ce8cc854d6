"""The experiments that train their models: each model by its own recipe, with learning rates chosen for each task.

    TRAINED["ladder"]  from a plain ViT to a ConvNet, step by step (ladder.py)
    TRAINED["data"]    how many training images a model needs
    TRAINED["reach"]   whether a model learns to compare marks that are far apart
    TRAINED["cues"]    whether a model follows outline or texture

Shapes:  N images, S side of an image in pixels, n test images, M side of a mark.
"""

import math
from functools import partial
from statistics import mean

import torch

from train_vit import NotFinite
from vit_bridge.analysis.cost import count_parameters
from vit_bridge.analysis.perturbations import cue_choices, shape_bias
from vit_bridge.analysis.receptive_field import theoretical_receptive_field
from vit_bridge.cli import counted
from vit_bridge.compare.ladder import RUNGS, Ladder
from vit_bridge.compare.statistics import (
    describe_leaders,
    format_range,
    is_or_are,
    majority_with_every_seed,
    mean_min_max,
    rank_samples,
)
from vit_bridge.compare.trials import (
    SEEDS,
    Arm,
    TrainedExperiment,
    by_arm,
    choose_rate,
    count_correct,
    draw_indices,
    loader_of,
    part_of,
    rates_around,
    scorer,
    train_arm,
)
from vit_bridge.data.augmentation import Augmentation
from vit_bridge.data.shapes import CUES, MARKS, M, make_corners, make_cues
from vit_bridge.errors import join_words
from vit_bridge.plots.charts import plot_bars, plot_curves
from vit_bridge.runtime import predictions

VAL_START, TEST_START = 10**9, 2 * 10**9  # first numbers of drawn validation and test images


# ---- Data efficiency --------------------------------------------------------------------------------------


DATA_ARMS = {"ViT": RUNGS["ViT, mean pooling"], "hybrid": Arm("hybrid_fast"), "ConvNet": RUNGS["ConvNet"]}


class DataEfficiency(TrainedExperiment):
    """Each model trains until its validation accuracy stops rising, for every number of images.

    The rule is the same for all. The first seed chooses the learning rate with `first_steps` steps. Then the number of
    steps doubles until the validation accuracy rises by less than RISE. With the final number of steps, the learning
    rate is chosen once more.
    """

    title = "Data efficiency"
    question = "How many training images does each model need?"
    arms = DATA_ARMS
    keys = ("correct", "n", "n_images", "n_steps", "learning_rate", "still_rising")
    on_images = True
    RISE = 0.01

    def measure(self, trial, loaders, chosen, first_steps=250, most_steps=4000, **run):
        """Train one arm with one seed, and test it; the seed draws the images."""
        images, val_loader, test_loader = loaders
        part = part_of(images, draw_indices(images, trial.n_images, trial.seed))
        n_steps = chosen["rate"]["n_steps"] if chosen else first_steps

        def train(rate, n_steps):
            return train_arm(self.arms[trial.arm], part, n_steps, rate, trial.seed, **run)

        score = scorer(val_loader, **run)
        rates = (chosen["rate"]["learning_rate"],) if chosen else rates_around(self.arms[trial.arm])
        model, rate, tried = choose_rate(partial(train, n_steps=n_steps), score, rates)
        lengths = {n_steps: tried[rate]}
        while not chosen and 2 * n_steps <= most_steps:
            try:
                longer = train(rate, 2 * n_steps)
                lengths[2 * n_steps] = score(longer)
            except NotFinite:  # the shorter model stays
                lengths[2 * n_steps] = 0.0
            if lengths[2 * n_steps] < lengths[n_steps] + self.RISE:
                break
            model, n_steps = longer, 2 * n_steps
        if not chosen and n_steps > first_steps:
            final = model, rate
            model, rate, tried = choose_rate(lambda one: final[0] if one == final[1] else train(one, n_steps), score,
                                             (rate, rate / 2, 2 * rate))
        correct, n = count_correct(model, test_loader, run.get("device", "auto"))
        return dict(arm=trial.arm, seed=trial.seed, n_images=trial.n_images, correct=correct, n=n, learning_rate=rate,
                    rates=tried, n_steps=n_steps, lengths=lengths, still_rising=2 * n_steps > most_steps,
                    parameters=count_parameters(model))

    def draw(self, trials, setup=None):
        points = {arm: [] for arm in by_arm(trials, self.arms)}
        for n_images, accuracies in sorted(self.accuracies(trials).items()):
            for arm, own in accuracies.items():
                points[arm].append((n_images, *mean_min_max(own)))
        heading = f"Trained until validation stops rising: {trials[0].get('dataset') or 'drawn shapes'}"
        return {"data_efficiency": plot_curves({heading: points}, "training images", "test accuracy (%)", percent=True,
                                               log=("x",), title=title_of_bands(trials))}

    def finding(self, trials):
        by_number, n = self.accuracies(trials), trials[0]["n"]
        clauses = [f"with {number:,} images, {describe_leaders(rank_samples(own, n), points=True)}"
                   for number, own in sorted(by_number.items())]
        return f"W{'; '.join(clauses)[1:]}."

    def tables(self, trials):
        arms = list(by_arm(trials, self.arms))
        accuracies, lengths = [["training images", *arms]], [["training images", *arms]]
        for number, own in sorted(self.accuracies(trials).items()):
            accuracies.append([f"{number:,}", *(_with_missing(own[arm]) if arm in own else "" for arm in arms)])
            first = {arm: next((one for one in trials if (one["arm"], one["n_images"]) == (arm, number)), None)
                     for arm in arms}
            lengths.append([f"{number:,}", *(f"{one['n_steps']:,}{' (still rising)' if one['still_rising'] else ''} at "
                                             f"{one['learning_rate']:g}" if one else "" for one in first.values())])
        return [("Test accuracy: mean over the seeds (lowest to highest)", accuracies),
                (f"Steps after which validation rises by less than {100 * self.RISE:.0f} point when they are doubled, "
                 f"and the learning rate", lengths)]

    def accuracies(self, trials):
        """Return {number of training images: {arm: [test accuracy of each seed]}}."""
        found = {}
        for arm, own in by_arm(trials, self.arms).items():
            for trial in own:
                found.setdefault(trial["n_images"], {}).setdefault(arm, []).append(trial["correct"] / trial["n"])
        return found


def _with_missing(accuracies):
    """Return the range of accuracies as text, with the number of seeds if some are missing."""
    n = len(accuracies)
    return format_range(accuracies) + (f", {counted(n, 'seed')}" if n < len(SEEDS) else "")


# ---- Reach ------------------------------------------------------------------------------------------------


UNSHIFTED = Augmentation(0.0, "random")  # a shift mirrors the border, which adds marks
WINDOWS = {"ConvNet, 2 stages": (64, 128), "ConvNet, 3 stages": (40, 80, 160), "ConvNet, 4 stages": (24, 48, 96, 192)}
SUMS = ("the number of marks of a kind", "the sum of the marks, weighted by kind and row")
REACH_ARMS = {
    "ViT": Arm("vit_nano_fast", augmentation=UNSHIFTED, first_smaller=False),
    "Swin": Arm("swin_nano_fast", augmentation=UNSHIFTED, first_smaller=False),
    "hybrid": Arm("hybrid_fast", augmentation=UNSHIFTED, first_smaller=False),
    **{name: Arm("convnet_fast", dict(widths=widths, depths=(1,) * len(widths)), augmentation=UNSHIFTED,
                 first_smaller=False) for name, widths in WINDOWS.items()}}


class Reach(TrainedExperiment):
    """Four marks at the corners of a square; the class says whether equal marks share a row or a column."""

    title = "Reach"
    question = "Does a model learn to compare marks that are far apart?"
    arms = REACH_ARMS
    keys = ("correct", "n", "distances", "sums", "window")
    DISTANCES = (8, 12, 16, 20, 23, 26)
    SOLVED = 0.95

    def measure(self, trial, chosen, n_steps=500, n_images=20_000, n_val=2000, n_test=1000, distances=DISTANCES,
                img_size=32, **run):
        """Train on squares of all sizes, and count how many of n_test predictions are right at each size."""
        train_set, val_set = (make_corners(n, img_size, seed=1 + trial.seed, start=start)
                              for n, start in ((n_images, 0), (n_val, VAL_START)))
        model, rate, tried = self.train(trial, chosen, *(loader_of(one.images, one.labels, one.class_names)
                                                         for one in (train_set, val_set)), n_steps, **run)
        correct, sums = [], []
        for distance in distances:
            test = make_corners(n_test, img_size, start=TEST_START, distance=distance)
            loader = loader_of(test.images, test.labels, test.class_names)
            correct.append(count_correct(model, loader, run.get("device", "auto"))[0])
            sums.append([best_threshold(values, test.labels) for values in mark_sums(test.images).T])
        window = None if model.attends or model.windowed else max(theoretical_receptive_field(model))
        return dict(arm=trial.arm, seed=trial.seed, distances=list(distances), correct=correct, sums=sums,
                    n=n_test, learning_rate=rate, rates=tried, n_steps=n_steps, window=window,
                    parameters=count_parameters(model))

    def draw(self, trials, setup=None):
        panels = {}
        for own in by_arm(trials, self.arms).values():
            points = [(distance, *mean_min_max([trial["correct"][i] / trial["n"] for trial in own]))
                      for i, distance in enumerate(own[0]["distances"])]
            panels.setdefault("with attention" if own[0]["window"] is None else "without attention", {})[
                self.label(own[0])] = points
        single = mean(max(own) for own in trials[0]["sums"])
        return {"reach": plot_curves(panels, "distance between the marks (pixels)", "accuracy (%)", percent=True,
                                     lines=[("guessing", 0.5), ("a sum over single marks", single)],
                                     title=f"Are equal marks in rows or in columns?\n{title_of_bands(trials)}")}

    def finding(self, trials):
        right, failing = [], []
        for own in by_arm(trials, self.arms).values():
            worst = [min(trial["correct"][i] / trial["n"] for trial in own) for i in range(len(own[0]["distances"]))]
            failed = [str(distance) for distance, accuracy in zip(own[0]["distances"], worst, strict=True)
                      if accuracy < self.SOLVED]
            if failed:
                where = f"{join_words(failed)} pixels" if len(failed) < len(worst) else "every distance"
                failing.append(f"{self.label(own[0])} at {where}")
            else:
                right.append(self.label(own[0]))
        return " ".join([f"With every seed, {is_or_are(right or ['no network'])} right in at least {self.SOLVED:.0%} "
                         f"of the images at every distance.",
                         *[f"Below {self.SOLVED:.0%} with some seed: {'; '.join(failing)}."] * bool(failing)])

    def tables(self, trials):
        distances = trials[0]["distances"]
        rows = [["", "seeds", *(f"{distance} px" for distance in distances)]]
        rows += [[self.label(own[0]), len(own), *(format_range([trial["correct"][i] / trial["n"] for trial in own])
                                                  for i in range(len(distances)))]
                 for own in by_arm(trials, self.arms).values()]
        rows += [[f"the best threshold on {what}", "", *(f"{own[i]:.1%}" for own in trials[0]["sums"])]
                 for i, what in enumerate(SUMS)]
        return [("Accuracy at each distance: mean over the seeds (lowest to highest)", rows)]

    def label(self, trial):
        """Return the name of an arm without a comma, with the window of a ConvNet in pixels."""
        name = trial["arm"].replace(", ", " of ")
        return name if trial["window"] is None else f"{name} (window {trial['window']})"


def mark_sums(images):
    """Return the SUMS of uint8 images (N, 3, S, S), as a detector of single marks finds them: (N, len(SUMS))."""
    windows = images[:, 0].float().div(255).unfold(1, M, 1).unfold(2, M, 1)  # (N, S - M + 1, S - M + 1, M, M)
    first, second = ((windows == mark).all(dim=(3, 4)).long() for mark in MARKS)  # (N, S - M + 1, S - M + 1)
    rows = torch.arange(first.shape[1])[:, None]
    return torch.stack([first.sum(dim=(1, 2)), ((first - second) * rows).sum(dim=(1, 2))], dim=1)


def best_threshold(values, labels):
    """Return the accuracy of the best threshold on values (n) for two classes, chosen on these very labels."""
    accuracies = [((values >= threshold).long() == labels).double().mean().item()
                  for threshold in (*values.unique().tolist(), values.max().item() + 1)]
    return max(*accuracies, 1 - min(accuracies))


# ---- Outline against texture ------------------------------------------------------------------------------


CUE_ARMS = {
    **{f"ViT, patches of {side}": Arm("vit_nano_fast", dict(patch_size=side), first_smaller=False, whiten=False)
       for side in (2, 4, 8)},
    "hybrid": Arm("hybrid_fast", first_smaller=False),
    "ConvNet": Arm("convnet_fast", first_smaller=False)}


class Cues(TrainedExperiment):
    """Images whose outline and texture show the same class in training, and different classes in the test.

    Each seed pairs other outlines with other textures.
    """

    title = "Outline or texture"
    question = "If outline and texture disagree, which one does a model follow, and does the patch size decide it?"
    arms = CUE_ARMS
    keys = ("choices", "shape_bias", "by_rate", "val_acc")

    def measure(self, trial, chosen, n_steps=800, n_images=10_000, n_val=1000, n_test=1000, img_size=32, **run):
        """Train on images whose outline and texture show the same class, and test on images where they differ."""
        train_set, val_set = (make_cues(n, img_size, seed=1 + trial.seed, start=start, pairing=trial.seed)
                              for n, start in ((n_images, 0), (n_val, VAL_START)))
        test, outlines, textures = make_cues(n_test, img_size, start=TEST_START, agree=False, pairing=trial.seed)
        found = {}

        def look(rate, model):
            shown = torch.cat([predictions(model, images) for images, _ in loader_of(test, outlines, tuple(CUES))])
            found[rate] = cue_choices(shown, outlines, textures)

        _, rate, tried = self.train(trial, chosen, *(loader_of(images, outlines, tuple(CUES))
                                                     for images, outlines, _ in (train_set, val_set)), n_steps, look,
                                    **run)
        return dict(arm=trial.arm, seed=trial.seed, choices=found[rate], shape_bias=shape_bias(found[rate]),
                    by_rate={one: shape_bias(choices) for one, choices in found.items()}, val_acc=tried[rate],
                    learning_rate=rate, rates=tried, n_steps=n_steps)

    def draw(self, trials, setup=None):
        bars = {arm: mean_min_max(biases) for arm in by_arm(trials, self.arms) if (biases := self.biases(trials, arm))}
        heading = "predictions that follow the outline,\nas a fraction of predictions that follow a cue"
        return {"shape_bias": plot_bars({heading: bars}, title=title_of_bands(trials, "Lines"))} if bars else {}

    def finding(self, trials):
        arms = [arm for arm in by_arm(trials, self.arms) if self.biases(trials, arm)]
        if not arms:
            return "No model follows the outline or the texture."
        shares = join_words(f"{mean(self.biases(trials, arm)):.0%} ({arm})" for arm in arms)
        sides = [(cue, [arm for arm in arms if self.follows(cue, trials, arm)]) for cue in ("outline", "texture")]
        sides = ", and ".join(f"the {cue} prevails in {join_words(own)}" for cue, own in sides if own)
        return (f"The outline decides {shares} of the predictions that follow a cue. "
                f"{f'With every seed, {sides}' if sides else 'No cue prevails with every seed of a model'}.")

    def tables(self, trials):
        table = [["", "seeds", "outline, of outline + texture", "with each rate tried", "outline", "texture", "neither",
                  "both agree"]]
        for arm, own in by_arm(trials, self.arms).items():
            biases, by_rate = self.biases(trials, arm), max((trial["by_rate"] for trial in own), key=len)
            table.append([arm, len(own), format_range(biases) if biases else "",
                          "; ".join(f"{share:.0%} at {float(rate):g}" for rate, share in by_rate.items()
                                    if not math.isnan(share)),
                          *(f"{mean(trial['choices'][cue] for trial in own):,.0f}"
                            for cue in ("outline", "texture", "neither")),
                          f"{mean(trial['val_acc'] for trial in own):.1%}"])
        return [("Which cue the predictions follow when the two disagree: mean over the seeds. The last column is the "
                 "accuracy on validation images where they agree", table)]

    def biases(self, trials, arm):
        """Return the shape bias of each seed that has one."""
        return [trial["shape_bias"] for trial in trials
                if trial["arm"] == arm and not math.isnan(trial["shape_bias"])]

    def follows(self, cue, trials, arm):
        """Return whether every seed follows this cue more often than the other."""
        return majority_with_every_seed([
            (trial["choices"][cue], trial["choices"]["outline"] + trial["choices"]["texture"])
            for trial in trials if trial["arm"] == arm])


def title_of_bands(trials, what="Bands"):
    """Return the title that explains the bands, or lines, in a figure of trials."""
    return f"{what}: lowest to highest of {len({trial['seed'] for trial in trials})} seeds"


TRAINED = {"ladder": Ladder(), "data": DataEfficiency(), "reach": Reach(), "cues": Cues()}
