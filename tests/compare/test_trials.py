"""Trainings use one recipe for all and choose by validation images, and their summaries stay cautious."""

import math

import pytest
import torch
from matplotlib.collections import PolyCollection
from torch import nn

import train_vit
from train_vit import NotFinite
from vit_bridge.analysis.cost import count_flops, count_parameters
from vit_bridge.compare import trials as le
from vit_bridge.data import shapes as shapes_module
from vit_bridge.data.augmentation import Augmentation
from vit_bridge.data.shapes import make_cues, make_mark, make_marks
from vit_bridge.models.registry import build_model
from vit_model import InputError

QUICK = le.TrialRecipe(n_steps=2, batch_size=8)
ON_CPU = dict(device="cpu", amp="off")


def loaders(n=40, img_size=16):
    made = [make_mark(count, img_size, start=start) for count, start in ((n, 0), (12, 1000), (14, 2000))]
    return tuple(le.loader_of(drawn.images, drawn.labels, drawn.class_names, QUICK, training=i == 0)
                 for i, drawn in enumerate(made))


@pytest.fixture
def small(monkeypatch):
    """Make the four kinds small, under the same names."""
    tiny = dict(vit_nano=dict(embed_dim=12, depth=1, n_heads=2), hybrid=dict(embed_dim=12, depth=1, n_heads=2),
                convnet=dict(widths=(3, 5), depths=(1, 1)))
    monkeypatch.setattr(le, "build_model", lambda name, **options: build_model(name, **tiny[name] | options))


class Answers:
    """A trainer whose model is its learning rate, with accuracies for the validation images only."""

    def __init__(self, rate, accuracies):
        self.model, self.accuracies = rate, accuracies

    def evaluate(self, loader):
        assert loader == "validation"
        return dict(acc=self.accuracies[self.model])


class Says(nn.Module):
    """A model that predicts these classes one after the other, whatever the images."""

    def __init__(self, answers, n_classes=2):
        super().__init__()
        self.answers, self.n_classes, self.weight = list(answers), n_classes, nn.Parameter(torch.zeros(1))

    def forward(self, images):
        given, self.answers = self.answers[:len(images)], self.answers[len(images):]
        return nn.functional.one_hot(torch.tensor(given), self.n_classes).float()


def test_cnn_to_vit_models_have_similar_parameter_counts():
    counts = {kind: count_parameters(build_model(name, n_classes=10, img_size=32, **options))
              for kind, (name, options) in le.CNN_TO_VIT_MODELS.items()}
    assert max(counts.values()) <= 1.1 * min(counts.values())


@pytest.mark.usefixtures("small")
def test_train_once_depends_only_on_its_seed():
    def weights(seed):
        train, val, _ = loaders()
        state = torch.get_rng_state()
        trainer = le.train_once("ViT", train, QUICK, 1e-3, seed, **ON_CPU)
        assert torch.equal(state, torch.get_rng_state())
        assert 0 <= trainer.evaluate(val)["acc"] <= 1
        return trainer.model.head.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_best_of_rates_picks_the_smallest_of_the_best(monkeypatch):
    accuracies = {1e-3: 0.7, 2e-3: 0.9, 4e-3: 0.9}
    monkeypatch.setattr(le, "train_once", lambda kind, train, recipe, rate, seed, **run: Answers(rate, accuracies))
    assert le.best_of_rates("ViT", None, "validation", QUICK, 0, tuple(accuracies)) == (2e-3, accuracies, 2e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_reach_and_cues_measure_a_trial(monkeypatch):
    for trial in (le.TRAINING_EXPERIMENTS["reach"].measure("Hybrid", 1, QUICK, 24, 20, (8, 20), 32, **ON_CPU),
                 le.TRAINING_EXPERIMENTS["cues"].measure("Hybrid", 1, QUICK, 25, 20, 16, **ON_CPU)):
        assert (trial["kind"], trial["seed"], trial["rate"] in le.RATES, len(trial["rates"])) == ("Hybrid", 1, True, 3)
    reach = le.TRAINING_EXPERIMENTS["reach"].measure("ViT", 0, QUICK, 24, 20, (8, 20), 32, **ON_CPU)
    assert [0 <= correct <= 20 for correct in reach["correct"]] == [True, True]
    cues = le.TRAINING_EXPERIMENTS["cues"].measure("ViT", 0, QUICK, 25, 20, 16, **ON_CPU)
    assert sum(cues["choices"].values()) == 20


def test_reach_counts_right_answers_at_each_distance(monkeypatch):
    monkeypatch.setattr(le, "make_marks", lambda n, side, **how: make_marks(min(n, 9), side, **how))
    model = Says([0, 1, 0, 1, 0, 0, 0, 1, 1, 1])  # where 0, 1, 0, 1, 0 are right, at each distance
    monkeypatch.setattr(le, "best_of_rates", lambda *words, **run: (model, {1e-3: 0.9}, 1e-3))
    trial = le.TRAINING_EXPERIMENTS["reach"].measure("ViT", 0, QUICK, n_test=5, distances=(8, 20), img_size=32)
    assert (trial["distances"], trial["correct"], trial["n"]) == ([8, 20], [5, 2], 5)


def test_cues_separates_answers_by_outline_and_texture(monkeypatch):
    _, outlines, textures = make_cues(8, 16, start=2 * 10**9, agree=False)
    neither = min({0, 1, 2} - {outlines[7].item(), textures[7].item()})
    model = Says([*outlines[:5].tolist(), *textures[5:7].tolist(), neither], n_classes=len(shapes_module.CUES))
    monkeypatch.setattr(le, "make_cues", lambda n, side, **how: make_cues(min(n, 8), side, **how))
    monkeypatch.setattr(le, "best_of_rates", lambda *words, **run: (model, {1e-3: 0.9}, 1e-3))
    trial = le.TRAINING_EXPERIMENTS["cues"].measure("ViT", 0, QUICK, n_test=8, img_size=16)
    assert trial["choices"] == dict(outline=5, texture=2, neither=1)
    assert trial["shape_bias"] == 5 / 7


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_reach_tests_on_new_images_without_shifts(monkeypatch):
    drawn, trained, make, train = [], [], shapes_module.make_marks, le.train_once
    monkeypatch.setattr(le, "make_marks", lambda n, side, **how: drawn.append(how) or make(n, side, **how))
    monkeypatch.setattr(le, "train_once", lambda kind, loader, recipe, *rest, **run: trained.append(
        (loader.augmentation, recipe.augmentation)) or train(kind, loader, recipe, *rest, **run))
    le.TRAINING_EXPERIMENTS["reach"].measure("ViT", 1, QUICK, 24, 20, (8, 20), 32, **ON_CPU)
    first, val, *tests = [(how["seed"], how["start"], how.get("distance")) for how in drawn]
    assert (first, val) == ((2, 0, None), (2, 10**9, None))
    assert tests == [(0, 2 * 10**9, 8), (0, 2 * 10**9, 20)]
    assert {one.shift for pair in trained for one in pair} == {0.0}


@pytest.mark.usefixtures("small")
def test_data_efficiency_tunes_on_validation_and_tests_once(monkeypatch):
    parts, asked, evaluate = loaders(), [], train_vit.Trainer.evaluate
    monkeypatch.setattr(train_vit.Trainer, "evaluate", lambda self, loader: asked.append(
        parts.index(loader)) or evaluate(self, loader))
    le.TRAINING_EXPERIMENTS["data"].measure("ViT", 0, 40, parts, QUICK, **ON_CPU)
    assert asked == [1, 1, 1, 2]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("n_images", [2, 4, 40])
def test_data_efficiency_trains_on_the_given_number_of_images(n_images, monkeypatch):
    seen, train = [], le.train_once

    def watched(kind, loader, *rest, **run):
        seen.append((loader.n_images, loader.training, loader.augmentation, loader.seed))
        return train(kind, loader, *rest, **run)

    monkeypatch.setattr(le, "train_once", watched)
    trial = le.TRAINING_EXPERIMENTS["data"].measure("ConvNet", 5, n_images, loaders(), QUICK, **ON_CPU)
    assert seen == [(n_images, True, Augmentation(), 5)] * 3
    assert (trial["n_images"], trial["n"]) == (n_images, 14)


# ---- Findings and figures


def reach_trials(levels):
    return [dict(kind=kind, seed=seed, distances=[8, 42], correct=[near, far], n=100)
            for kind, (near, far) in levels.items() for seed in le.SEEDS]


def test_reach_finding_follows_the_numbers():
    finding = le.TRAINING_EXPERIMENTS["reach"].finding
    assert finding(reach_trials(dict(ViT=(98, 97), ConvNet=(99, 55)))) == (
        "ConvNet loses 44 points of accuracy once the marks are farther apart than its own receptive field of 25 "
        "pixels.")
    assert finding(reach_trials(dict(ViT=(98, 97), ConvNet=(90, 55)))).startswith("ConvNet loses the most accuracy")
    assert finding(reach_trials(dict(ViT=(99, 55), ConvNet=(98, 97)))).startswith("ViT loses the most accuracy")
    assert "loses more than 5 points" in finding(reach_trials(dict(ViT=(98, 97), ConvNet=(99, 96))))
    alike = finding(reach_trials({"ViT": (99, 55), "Hybrid": (98, 97), "ConvNet": (99, 54)}))
    assert alike == "ConvNet and ViT lose up to 45 points as the marks move apart, and cannot be distinguished."
    partly = finding(reach_trials(dict(ViT=(51, 50), ConvNet=(99, 55))))
    assert partly.endswith("receptive field of 25 pixels. ViT did not learn the task.")
    assert "No model learned the task" in finding(reach_trials(dict(ViT=(50, 49), ConvNet=(52, 55))))


def cue_trial(kind, level):
    choices = dict(outline=round(100 * level), texture=round(100 - 100 * level)) if not math.isnan(level) else \
        dict(outline=0, texture=0)
    return dict(kind=kind, shape_bias=level, choices=choices | dict(neither=7))


def test_cues_finding_follows_the_numbers():
    def finding(**levels):
        return le.TRAINING_EXPERIMENTS["cues"].finding(
            [cue_trial(kind, level) for kind, level in levels.items() for _ in le.SEEDS])

    assert finding(ViT=0.8, ConvNet=0.1) == (
        "The outline decides 10% (ConvNet) to 80% (ViT) of the predictions that follow a cue; with every seed, the "
        "outline prevails in ViT, and the texture prevails in ConvNet.")
    assert "outline prevails in ConvNet, and the texture prevails in ViT" in finding(ViT=0.1, ConvNet=0.8)
    assert "every seed, the texture prevails in ViT and ConvNet" in finding(ViT=0.1, ConvNet=0.2)
    assert "no cue prevails" in finding(ViT=0.5, ConvNet=0.55)  # 0.55 of 100 predictions is chance
    assert "No model follows the outline or the texture" in finding(ViT=math.nan)
    assert finding(ViT=0.8, ConvNet=math.nan).endswith("with every seed, the outline prevails in ViT.")
    for levels in ((0.8, 0.7, 0.4), (0.8, math.nan, math.nan), (0.8,)):  # not with every seed, or one alone
        trials = [cue_trial("ViT", level) for level in levels]
        assert "no cue prevails with every seed" in le.TRAINING_EXPERIMENTS["cues"].finding(trials)


def data_trials(levels):
    return [dict(kind=kind, seed=seed, n_images=n_images, correct=correct + seed, n=1000)
            for kind, pairs in levels.items() for n_images, correct in zip((100, 9000), pairs, strict=True)
            for seed in le.SEEDS]


def test_data_efficiency_finding_follows_the_numbers():
    finding = le.TRAINING_EXPERIMENTS["data"].finding
    assert finding(data_trials(dict(ViT=(300, 800), ConvNet=(400, 801)))) == (
        "With 100 images, ConvNet is ahead of ViT by 10.0 points; with 9,000 images, ConvNet and ViT cannot be "
        "distinguished.")
    assert finding(data_trials(dict(ViT=(400, 900), ConvNet=(300, 800)))).endswith("images, ViT is ahead.")


def test_data_efficiency_tables_show_what_each_step_gains():
    accuracies, gains = le.TRAINING_EXPERIMENTS["data"].tables(data_trials(dict(ViT=(300, 800), ConvNet=(400, 801))))
    assert accuracies[1][1] == ["100", "30.1% (30.0 to 30.2)", "40.1% (40.0 to 40.2)"]
    assert gains[1][0] == ["training images", "ConvNet"]
    assert [row[1].split(" ± ")[0] for row in gains[1][1:]] == ["+10.0", "+0.1"]


def test_data_efficiency_finding_ranks_no_kind_alone():
    finding, trials = le.TRAINING_EXPERIMENTS["data"].finding, data_trials(dict(ViT=(300, 800), ConvNet=(400, 900)))
    assert finding([trial for trial in trials if trial["kind"] == "ViT"]).count("no other model to compare ViT") == 2
    cut = finding([trial for trial in trials if trial["kind"] == "ViT" or trial["n_images"] == 9000])
    assert cut == "With 100 images, there is no other model to compare ViT with; with 9,000 images, ConvNet is ahead."


def test_data_efficiency_finding_ties_a_single_seed():
    trials = [one for one in data_trials(dict(ViT=(300, 300), ConvNet=(900, 900))) if one["seed"] == 0]
    assert le.TRAINING_EXPERIMENTS["data"].finding(trials).count("cannot be distinguished") == 2
    one_number = [trial for trial in trials if trial["n_images"] == 100]
    assert le.TRAINING_EXPERIMENTS["data"].finding(one_number).count("images") == 1


@pytest.mark.parametrize(("name", "trials"), [
    ("reach", reach_trials(dict(ViT=(98, 97), ConvNet=(99, 55)))),
    ("cues", [cue_trial("ViT", level) | dict(seed=seed) for seed, level in enumerate((0.2, 0.4, math.nan))]),
    ("data", data_trials(dict(ViT=(300, 800), ConvNet=(400, 801))))])
def test_training_experiments_give_tables_and_banded_figures(name, trials):
    experiment = le.TRAINING_EXPERIMENTS[name]
    (figure,) = experiment.draw(trials).values()
    if name != "cues":
        bands = [part.get_paths()[0].vertices[:, 1] for part in figure.axes[0].collections
                 if isinstance(part, PolyCollection)]
        assert len(bands) == 2
        shares = sorted(100 * trial["correct"][0] / trial["n"] if name == "reach" else
                        100 * trial["correct"] / trial["n"] for trial in trials)
        assert max(map(max, bands)) == pytest.approx(shares[-1])
    assert "of 3 seeds" in " ".join(figure.get_suptitle().split())
    for caption, (heads, *rows) in experiment.tables(trials):
        assert caption
        assert rows
        assert {len(row) for row in rows} == {len(heads)}


def test_cues_draws_nothing_without_predictions_by_cue():
    trials = [cue_trial("ViT", math.nan) | dict(seed=0)]
    assert le.TRAINING_EXPERIMENTS["cues"].draw(trials) == {}
    assert "No model follows" in le.TRAINING_EXPERIMENTS["cues"].finding(trials)


def test_training_experiments_need_trials_for_a_finding():
    for experiment in le.TRAINING_EXPERIMENTS.values():
        with pytest.raises(InputError, match="no trials yet"):
            experiment.finding([])


def test_reach_finding_names_a_kind_that_learns_or_does_not():
    trials = reach_trials(dict(ConvNet=(99, 98)))
    trials += [dict(kind="ViT", seed=seed, distances=[8, 42], correct=correct, n=100)
               for seed, correct in enumerate(([99, 60], [50, 51], [98, 60]))]
    assert le.TRAINING_EXPERIMENTS["reach"].finding(trials) == (
        "ViT loses the most accuracy as the marks move apart: 38 points. ViT learned with only 2 of 3 seeds. These "
        "reach at least 79.0%, the others at most 50.5%.")


def test_best_of_rates_counts_a_diverged_training_as_zero(monkeypatch):
    def train(kind, loader, recipe, rate, *rest, **run):
        if rate > limit:
            raise NotFinite("loss or gradient are not finite")
        return Answers(rate, dict.fromkeys(le.RATES, 0.5))

    monkeypatch.setattr(le, "train_once", train)
    limit = 1e-3
    _, rates, best = le.best_of_rates("ViT", None, "validation", QUICK, 0)
    assert (rates, best) == ({5e-4: 0.5, 1e-3: 0.5, 2e-3: 0.0}, 5e-4)
    limit = 0
    with pytest.raises(NotFinite):
        le.best_of_rates("ViT", None, "validation", QUICK, 0)


# ---- Three seeds are three trainings, on images of their own where images are drawn


def settings_of_trainings(measure, monkeypatch):
    """Return what distinguishes the trainings of measure(seed), for each of SEEDS.

    That is the weights at the start, the labels in the order of the first epoch, and the seed of Trainer.train(), which
    draws dropout and augmentation.
    """
    found = []

    class Watched:
        def __init__(self, model, *device, **settings):
            self.model = model

        def train(self, loader, *, seed, **settings):
            loader.set_epoch(0)
            weights = torch.cat([own.flatten() for own in self.model.parameters()]).tolist()
            found.append((weights, [labels.tolist() for _, labels in loader], seed))

        def evaluate(self, loader):
            return dict(acc=0.5, correct=7, n=14)

    monkeypatch.setattr(le, "Trainer", Watched)
    for seed in le.SEEDS:
        measure(seed)
    return found


@pytest.mark.usefixtures("small")
def test_data_efficiency_trains_each_seed_on_its_own_part_in_its_own_order(monkeypatch):
    parts = loaders(n=60)
    found = settings_of_trainings(
        lambda seed: le.TRAINING_EXPERIMENTS["data"].measure("ViT", seed, 20, parts, QUICK, **ON_CPU), monkeypatch)
    for rate in range(3):
        weights, orders, seeds = zip(*found[rate::3], strict=True)
        assert [len({str(own) for own in part}) for part in (weights, orders)] == [3, 3]
        assert seeds == le.SEEDS


@pytest.mark.parametrize(("name", "draws", "answers"), [("cues", "make_cues", 5), ("reach", "make_marks", 2)])
def test_trials_draw_new_images_for_each_seed_and_test_all_on_the_same(name, draws, answers, monkeypatch):
    seen, make = {}, getattr(le, draws)

    def watched(n, side, **how):
        drawn = make(min(n, 8), side, **how)
        images = drawn[0] if isinstance(drawn, tuple) else drawn.images
        seen.setdefault((how.get("start", 0), how.get("distance")), []).append(images)
        return drawn

    monkeypatch.setattr(le, draws, watched)
    monkeypatch.setattr(le, "best_of_rates", lambda *words, **run: (Says([0] * 8, answers), {1e-3: 0.9}, 1e-3))
    for seed in le.SEEDS:
        sizes = dict(distances=(8,), img_size=32) if name == "reach" else dict(img_size=16)
        le.TRAINING_EXPERIMENTS[name].measure("ViT", seed, QUICK, n_test=8, **sizes)
    assert len(seen) == 3
    for (part, _), images in seen.items():
        assert len({str(own.tolist()) for own in images}) == (1 if part == 2 * 10**9 else 3)


def test_build_kind_scales_patches_and_keeps_sizes_alike():
    for kind in ("ViT", "Hybrid"):
        assert [le.build_kind(kind, 3, side).patch_embed.n_patches for side in (32, 64)] == [64, 64]
    counts = [count_parameters(le.build_kind(kind, 10, 64)) for kind in le.CNN_TO_VIT_MODELS]
    assert max(counts) <= 1.15 * min(counts)
    for kind in le.CNN_TO_VIT_MODELS:  # a step from 32 to 64 pixels costs each of them about as much more
        small, large = (count_flops(le.build_kind(kind, 10, side)) for side in (32, 64))
        assert large <= 1.15 * small
