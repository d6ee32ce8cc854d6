"""The ladder: from a plain ViT to a ConvNet, step by step, with nearly equal FLOPs and equal minutes.

    RUNGS       the networks; each differs from the one before in what CHANGES says
    BESIDE      what can be done without changing the network
    Ladder      the experiment; its figure follows Liu et al. 2022, "A ConvNet for the 2020s", Fig. 2

Shapes:  B images, C channels, D width of a token, h, w height and width of a map.
"""

import copy
import math
from dataclasses import replace
from itertools import pairwise
from statistics import mean, median

import torch
from torch import nn

from vit_bridge.analysis.cost import count_flops, count_parameters
from vit_bridge.compare.statistics import format_range, gains_over
from vit_bridge.compare.trials import (
    SEEDS,
    Arm,
    TrainedExperiment,
    by_arm,
    choose_rate,
    count_correct,
    draw_indices,
    part_of,
    prepare_arm,
    rates_around,
    scorer,
    train_arm,
)
from vit_bridge.data.loaders import MemoryLoader
from vit_bridge.errors import InputError
from vit_bridge.models.convnext import ChannelNorm, ConvNeXt
from vit_bridge.models.hybrid import HybridCNNViT, PooledStem
from vit_bridge.models.registry import MODELS
from vit_bridge.models.swin import SwinTransformer
from vit_bridge.plots.charts import finish, looks_of, new_figure, set_heading
from vit_bridge.runtime import predictions
from vit_bridge.training.config import RECIPES
from vit_bridge.training.objectives import MaskedPixels
from vit_bridge.weights.heads import fit_head

MINUTES = 5  # of training, for every rung
LONGER = 3  # times the minutes
ROUNDS, ROUND_SECONDS = 5, 1.0  # of the measurement of speed


# ---- The networks -----------------------------------------------------------------------------------------


class StemmedSwin(SwinTransformer):
    """A Swin Transformer whose tokens come from a PooledStem.

    Parameters
    ----------
    *args, **options
        As for SwinTransformer.
    channels : int, optional
        Channels of the stem.
    """

    def __init__(self, *args, channels=32, **options):
        super().__init__(*args, **options)
        c = self.config
        self.patch_embed = PooledStem(c.img_size, c.patch_size, c.in_channels, c.embed_dim, channels)
        self.patch_embed.any_size = True

    def whitening_layer(self):
        """Return the layer to whiten, and whether it holds each filter together with its negative."""
        return self.patch_embed.whiten, True


class StemmedConvNeXt(ConvNeXt):
    """A ConvNeXt whose first map comes from a PooledStem.

    Parameters
    ----------
    *args, **options
        As for ConvNeXt.
    channels : int, optional
        Channels of the stem.
    """

    def __init__(self, *args, channels=32, **options):
        super().__init__(*args, **options)
        c = self.config
        self.stem = nn.Sequential(PooledMap(c.img_size, c.stem_stride, c.in_channels, c.widths[0], channels),
                                  ChannelNorm(c.widths[0], c.norm_eps))

    def whitening_layer(self):
        """Return the layer to whiten, and whether it holds each filter together with its negative."""
        return self.stem[0].whiten, True


class PooledMap(PooledStem):
    """A PooledStem that returns a map instead of tokens: (B, C, height, width) -> (B, D, h, w), for any size."""

    def __init__(self, *args):
        super().__init__(*args)
        self.any_size = True

    def forward(self, images):
        """Return the map of images (B, C, height, width)."""
        return self.forward_map(images)


class StemmedViT(HybridCNNViT):
    """A ViT whose tokens come from a PooledStem, as many as from its patches.

    Parameters
    ----------
    *args, **options
        As for HybridCNNViT.
    channels : int, optional
        Channels of the stem. Few, so that the stem costs little beside the blocks.
    """

    def __init__(self, *args, channels=12, **options):
        super().__init__(*args, **options)
        c = self.config
        self.patch_embed = PooledStem(c.img_size, c.patch_size, c.in_channels, c.embed_dim, channels)


STEMMED = {"hybrid": StemmedViT, "swin_nano": StemmedSwin, "convnext_nano": StemmedConvNeXt}


def build_with_stem(name, **options):
    """Build a model of STEMMED: the registered model of this name, with a PooledStem."""
    return STEMMED[name](**MODELS[name].arguments | options)


BLOCKS = dict(embed_dim=96, depth=4, n_heads=3)  # of vit_nano
RUNGS = {
    "ViT, CLS": Arm("vit_nano_fast", dict(pool="cls")),
    "ViT, mean pooling": Arm("vit_nano_fast"),
    "ViT, convolutional stem": Arm("hybrid_fast", BLOCKS | dict(patch_size=4), build_with_stem),
    "hybrid": Arm("hybrid_fast", BLOCKS),
    # Swin's own recipe has no smaller images; here it has them like all others, so that only the network changes.
    "Swin, convolutional stem": Arm("swin_nano_fast", build=build_with_stem, first_smaller=(0.75, 0.6)),
    "ConvNeXt, convolutional stem": Arm("convnext_nano_fast", dict(widths=(40, 80, 160)), build_with_stem),
    "ConvNet": Arm("convnet_fast", dict(widths=(42, 84, 168))),
}
CHANGES = {
    "ViT, CLS": "patches, global attention, the head reads CLS",
    "ViT, mean pooling": "the head reads the mean of the patches",
    "ViT, convolutional stem": "a small stem of convolutions makes the 64 tokens; the same four blocks",
    "hybrid": "three stages of wider convolutions (76% of the FLOPs) make 16 tokens; the same four blocks follow",
    "Swin, convolutional stem": "one stage of convolutions, then three stages of attention in windows",
    "ConvNeXt, convolutional stem": "depthwise convolutions instead of attention, in wider stages",
    "ConvNet": "full convolutions and pooling instead of ConvNeXt's blocks",
}
PLAIN = "ViT, mean pooling"  # the network of the bars beside the ladder
TEACHER, PRETRAINED, LONG = "labels from the ConvNet", "pre-trained with MAE", "three times the minutes"
BESIDE = {
    TEACHER: "the ConvNet trains for half of the minutes and labels the other images; the ViT learns from all of them",
    PRETRAINED: "half of the minutes train a MAE on all images without labels",
    LONG: "the same images again",
}
MORE = "all labels"  # PLAIN with the larger number of images
STEPS = tuple(pairwise(RUNGS))  # (before, after)
ACROSS = ((PLAIN, "hybrid"), (PLAIN, "ConvNet"), ("hybrid", "ConvNet"))  # several steps at once
OTHER_MEANS = tuple((PLAIN, arm) for arm in (*BESIDE, MORE))
MAE = Arm("mae_nano_fast")


# ---- The experiment ---------------------------------------------------------------------------------------


class Ladder(TrainedExperiment):
    """The ladder for few images; beside it, PLAIN by other means: those of BESIDE, and all images."""

    title = "From a ViT to a CNN"
    question = "Which step closes the gap between a plain ViT and a CNN?"
    arms = RUNGS | dict.fromkeys(BESIDE, RUNGS[PLAIN])
    keys = ("correct", "n", "n_images", "n_steps", "learning_rate", "rates", "minutes", "parameters", "flops")
    on_images = True
    needs_speeds = True
    fixed_numbers = True

    def plan(self, numbers):
        """Return (arm, number of images) of all trials, each after those whose choices it uses."""
        if len(numbers) < 2:
            raise InputError(f"the ladder compares two numbers of training images, but --train-fractions gives only "
                             f"{numbers[0]:,}; use other fractions, such as 0.1 1, more images, or choose other "
                             f"experiments with --only")
        few, most = numbers[-2:]
        return [*((arm, few) for arm in RUNGS), (PLAIN, most), *((arm, few) for arm in BESIDE)]

    def owners(self, trial, numbers):
        """Return the trials whose choices a trial uses, as {"rate": Trial, "teacher": Trial}; {} if it chooses."""
        first, most = replace(trial, seed=SEEDS[0]), numbers[-1]
        if trial.arm == TEACHER:  # its student sees all images
            return dict(rate=replace(first, arm=PLAIN, n_images=most), teacher=replace(first, arm="ConvNet"))
        if trial.arm == LONG:
            return dict(rate=replace(first, arm=PLAIN))
        return {} if trial == first else dict(rate=first)

    def measure(self, trial, loaders, speeds, chosen, minutes=MINUTES, **run):
        """Train one arm with one seed, and test it.

        Parameters
        ----------
        trial : Trial
            Its seed draws the images, the weights and the order.
        loaders : tuple of MemoryLoader
            Training, validation and test images.
        speeds : dict
            The result of measure_speeds().
        chosen : dict
            The results of the owners of this trial.
        minutes : float, optional
            Training time of an arm, with that of its teacher or of its pre-training.
        **run
            `device` and `amp`, as for Trainer.
        """
        images, val_loader, test_loader = loaders
        name = trial.arm if trial.arm in RUNGS else PLAIN
        own = {TEACHER: minutes / 2, PRETRAINED: minutes / 2, LONG: LONGER * minutes}.get(trial.arm, minutes)
        indices = draw_indices(images, trial.n_images, trial.seed)
        part, start = part_of(images, indices), None
        if trial.arm == TEACHER:
            part = labelled(images, indices, minutes / 2, speeds, trial.seed, chosen["teacher"]["learning_rate"], **run)
            own -= minutes_to_label(images.n_images - len(indices), speeds)
        elif trial.arm == PRETRAINED:
            start = pretrained(images, minutes / 2, speeds, trial.seed, **run)
        n_steps = steps_in(own, name, speeds, part.n_images)

        def train(rate):
            return train_arm(RUNGS[name], part, n_steps, rate, trial.seed, start=copy.deepcopy(start), **run)

        score = scorer(val_loader, **run)
        rates = (chosen["rate"]["learning_rate"],) if chosen else rates_around(RUNGS[name])
        model, rate, tried = choose_rate(train, score, rates)
        correct, n = count_correct(model, test_loader, run.get("device", "auto"))
        return dict(arm=trial.arm, seed=trial.seed, n_images=trial.n_images, correct=correct, n=n, learning_rate=rate,
                    rates=tried, minutes=max(own, minutes), n_steps=n_steps, parameters=count_parameters(model),
                    flops=count_flops(model))

    def measure_speeds(self, images, rounds=ROUNDS, seconds=ROUND_SECONDS, **run):
        """Return {rung or "MAE": images per second}: medians over rounds in which all take turns."""
        ready = {}
        for name, arm in (RUNGS | {"MAE": MAE}).items():
            loader, objective = (without_labels(images), MaskedPixels()) if arm is MAE else (part_of(images), None)
            ready[name] = prepare_arm(arm, loader, 0, objective=objective, **run), loader
        speeds = {name: [] for name in ready}
        for i in range(rounds + 1):
            for name, (trainer, loader) in ready.items():
                wanted = 0 if i == 0 else seconds * speeds[name][-1] / loader.batch_size
                n_steps = 5 * max(1, round(wanted / 5))  # three steps out of five may use smaller images
                history = trainer.train(loader, n_steps=n_steps, learning_rate=1e-6, progress=False)
                speeds[name].append(history["images_per_second"][0])
        return {name: round(median(values[1:]), 1) for name, values in speeds.items()}

    def draw(self, trials, setup=None):
        """Draw a bar for each network, and for each way to leave the network as it is, with a line for each seed."""
        few, most = numbers_of(trials)
        samples, gains = samples_of(trials), gains_of(trials)
        shown = {f"step by step, {few:,} training images": [*RUNGS],
                 f"{PLAIN}: the network stays": [PLAIN, *BESIDE, MORE]}
        figure = new_figure(10.5, 4.6)
        panels = figure.subplots(1, 2, sharex=True)
        looks = looks_of([*RUNGS])
        for axes, (heading, arms), pairs in zip(panels, shown.items(), (STEPS, OTHER_MEANS), strict=True):
            before = {after: before for before, after in pairs}
            arms = [arm for arm in arms if arm in samples]
            for i, arm in enumerate(arms):
                accuracies = [100 * value for value in samples[arm]]
                axes.barh(i, mean(accuracies), color=looks[arm if arm in RUNGS else PLAIN].colour, alpha=0.6)
                axes.plot(accuracies, [i] * len(accuracies), "k|", markersize=9)
                axes.annotate(f"  {mean(accuracies):.1f}", (max(accuracies), i), va="center", fontsize=9)
                if found := gains.get((before.get(arm), arm)):
                    words = f"{100 * found[0]:+.1f} points" if is_clear(*found) else "no clear change"
                    axes.annotate(f"  {words}", (0, i), va="center", fontsize=9)
            axes.margins(x=0.12)
            axes.set_yticks(range(len(arms)), [shown_as(arm, most).replace(", ", ",\n") for arm in arms], fontsize=9)
            axes.invert_yaxis()
            axes.set_title(heading, fontsize=11)
            axes.set_xlabel("test accuracy (%)")
        flops = [trial["flops"] / 1e6 for trial in trials]
        set_heading(figure, f"From a ViT to a CNN: {trials[0]['minutes']:g} minutes of training each, "
                            f"{min(flops):.0f} to {max(flops):.0f} MFLOPs; lines are seeds")
        return {"ladder": finish(figure, None)}

    def finding(self, trials):
        gains, (few, most) = gains_of(trials), numbers_of(trials)
        steps, across, beside = (
            describe_gains({words.format(*(shown_as(arm, most) for arm in pair)): gains[pair] for pair in pairs
                            if pair in gains})
            for pairs, words in ((STEPS, "{1}"), (ACROSS, "{0} → {1}"), (OTHER_MEANS, "{1}")))
        if not steps:
            return "No two neighbouring networks are measured with several seeds, so there is no step to compare."
        return (f"Test accuracy with {few:,} images, in points over the network before. {steps}"
                + (f"\nSeveral steps at once. {across}" if across else "")
                + (f"\nIf the network stays ({PLAIN}), in points over it. {beside}" if beside else ""))

    def tables(self, trials):
        few, most = numbers_of(trials)
        samples = samples_of(trials)
        gains = {pair: format_gain(*gain) for pair, gain in gains_of(trials).items()}
        steps = {pair[1]: gains.get(pair, "") for pair in STEPS}
        first = {(trial["arm"], trial["n_images"]): trial for trial in reversed(trials)}
        rows = [["", "what changes", "MFLOPs", "parameters", "steps", "learning rate", "seeds", "test accuracy",
                 "gain"]]
        for arm in RUNGS:
            if arm in samples:
                one = first[arm, few]
                rows.append([arm, CHANGES[arm], f"{one['flops'] / 1e6:.1f}", f"{one['parameters']:,}",
                             f"{one['n_steps']:,}", f"{one['learning_rate']:g}", len(samples[arm]),
                             format_range(samples[arm]), steps.get(arm, "")])
        beside = [["", "what is done", "steps", "seeds", "test accuracy", "gain"]]
        beside += [[shown_as(arm, most), {MORE: "more labels", PLAIN: "", **BESIDE}[arm],
                    f"{first[(PLAIN, most) if arm == MORE else (arm, few)]['n_steps']:,}", len(samples[arm]),
                    format_range(samples[arm]), gains.get((PLAIN, arm), "")]
                   for arm in (PLAIN, *BESIDE, MORE) if arm in samples]
        chosen = [["", "training images", "validation accuracy with each learning rate tried"]]
        chosen += [[trial["arm"], f"{trial['n_images']:,}", describe_rates(trial["rates"])]
                   for own in by_arm(trials, self.arms).values() for trial in own if len(trial["rates"]) > 1]
        across = [["from", "to", "gain"], *([*pair, gains[pair]] for pair in ACROSS if pair in gains)]
        return [(f"{few:,} training images; ± is the range that seeds and test images can explain", rows),
                ("Several steps at once", across),
                (f"The network stays: {PLAIN}, {few:,} labels", beside),
                ("The first seed chooses the learning rate", chosen)]


def numbers_of(trials):
    """Return the smallest and the largest number of images of the trials."""
    by_arm(trials, RUNGS)  # an error if there are none
    numbers = [trial["n_images"] for trial in trials]
    return min(numbers), max(numbers)


def shown_as(arm, most):
    """Return the name of an arm in figures and tables; MORE is the larger number of labels."""
    return f"{most:,} labels" if arm == MORE else arm


def samples_of(trials):
    """Return {arm: [test accuracy of each seed]} of RUNGS, BESIDE and MORE."""
    return {arm: values for arm in (*RUNGS, *BESIDE, MORE) if (values := accuracies_of(trials, arm))}


def gains_of(trials):
    """Return {(before, after): (gain, half of its interval)}, as fractions; a single seed has no interval."""
    gains = gains_over(samples_of(trials), trials[0]["n"], (*STEPS, *ACROSS, *OTHER_MEANS))
    return {pair: (gain, half) for pair, (gain, half) in gains.items() if math.isfinite(half)}


def is_clear(gain, half):
    """Return whether seeds and test images cannot explain a gain."""
    return abs(gain) > half


def format_gain(gain, half):
    """Return a gain in points, such as "+3.7 ± 2.5"."""
    return f"{100 * gain:+.1f} ± {100 * half:.1f}"


def describe_rates(rates):
    """Return {learning rate: validation accuracy} as text, in ascending order of the rates."""
    return "; ".join(f"{accuracy:.1%} at {float(rate):g}" for rate, accuracy in sorted(
        rates.items(), key=lambda pair: float(pair[0])))


def describe_gains(gains):
    """Return a sentence for each kind of gain: clear ones, clear losses, and no clear change."""
    sides = {"Gains": [], "Losses": [], "No clear change": []}
    for name, (gain, half) in gains.items():
        side = "No clear change" if not is_clear(gain, half) else "Gains" if gain > 0 else "Losses"
        sides[side].append(f"{name} ({format_gain(gain, half)})")
    return " ".join(f"{side}: {'; '.join(names)}." for side, names in sides.items() if names)


def accuracies_of(trials, arm):
    """Return the test accuracy of each seed of an arm with few images; MORE is PLAIN with all of them."""
    few, most = numbers_of(trials)
    if arm == MORE and few == most:
        return []
    wanted = (PLAIN, most) if arm == MORE else (arm, few)
    return [trial["correct"] / trial["n"] for trial in trials if (trial["arm"], trial["n_images"]) == wanted]


def labelled(images, indices, minutes, speeds, seed, learning_rate, **run):
    """Train a ConvNet on the images at `indices`; return all images, the others with the classes that it predicts."""
    n_steps = steps_in(minutes, "ConvNet", speeds, len(indices))
    teacher = train_arm(RUNGS["ConvNet"], part_of(images, indices), n_steps, learning_rate, seed, **run)
    labels = torch.cat([predictions(teacher, batch) for batch, _ in images.without_augmentation()])
    return part_of(images, labels=labels.to(images.labels.device).index_copy(0, indices, images.labels[indices]))


def minutes_to_label(n_images, speeds):
    """Return how long the ConvNet takes to label images: half as long as to train on them, which is a little more."""
    return n_images / (2 * speeds["ConvNet"]) / 60


def pretrained(images, minutes, speeds, seed, **run):
    """Train a MAE on the images without their labels; return its encoder with a new head."""
    model = train_arm(MAE, without_labels(images), steps_in(minutes, "MAE", speeds, images.n_images),
                      RECIPES[MAE.recipe].train.learning_rate, seed, objective=MaskedPixels(), **run)
    encoder = model.encoder()
    fit_head(encoder, images.class_names)
    return encoder


def without_labels(images):
    """Return a loader of the images for training without labels."""
    info = replace(images.info, preprocessing=replace(images.preprocessing, class_names=None))
    return MemoryLoader(images.images, images.labels, info, images.batch_size)


def steps_in(minutes, name, speeds, n_images):
    """Return how many steps a rung, or the MAE, makes in these minutes; a batch has at most all n_images images."""
    arm = (RUNGS | {"MAE": MAE})[name]
    return max(1, int(60 * minutes * speeds[name] / min(arm.own_recipe().batch_size, n_images)))
