"""Trainings side by side: the same recipe for all, choices by validation images, and verdicts that hold back."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from matplotlib.collections import PolyCollection
from torch import nn

import train_vit
from train_vit import NotFinite
from vit_bridge.analysis.cost import count_flops, count_parameters
from vit_bridge.compare import statistics as statistics_module
from vit_bridge.compare import trials as le
from vit_bridge.data import shapes as shapes_module
from vit_bridge.data.augmentation import Augmentation
from vit_bridge.data.shapes import make_cues, make_mark, make_marks
from vit_bridge.models.registry import build_model
from vit_model import InputError

QUICK = le.Recipe(n_steps=2, batch_size=8)
ON_CPU = dict(device="cpu", amp="off")


def loaders(n=40, img_size=16):
    made = [make_mark(count, img_size, start=start) for count, start in ((n, 0), (12, 1000), (14, 2000))]
    return tuple(le.loader_of(drawn.images, drawn.labels, drawn.class_names, QUICK, training=i == 0)
                 for i, drawn in enumerate(made))


@pytest.fixture
def small(monkeypatch):
    """The four kinds, of the same names, in small."""
    tiny = dict(vit_nano=dict(embed_dim=12, depth=1, n_heads=2), hybrid=dict(embed_dim=12, depth=1, n_heads=2),
                convnet=dict(widths=(3, 5), depths=(1, 1)))
    monkeypatch.setattr(le, "build_model", lambda name, **options: build_model(name, **tiny[name] | options))


class Answers:
    """A trainer whose model is its learning rate, and which has an accuracy on the validation images alone."""

    def __init__(self, rate, accuracies):
        self.model, self.accuracies = rate, accuracies

    def evaluate(self, loader):
        assert loader == "validation"
        return dict(acc=self.accuracies[self.model])


class Says(nn.Module):
    """A model that gives these answers, class numbers, one after the other, whatever the images."""

    def __init__(self, answers, n_classes=2):
        super().__init__()
        self.answers, self.n_classes, self.weight = list(answers), n_classes, nn.Parameter(torch.zeros(1))

    def forward(self, images):
        given, self.answers = self.answers[:len(images)], self.answers[len(images):]
        return nn.functional.one_hot(torch.tensor(given), self.n_classes).float()


def test_the_steps_from_vit_to_convnet_have_parameters_within_10_percent():
    counts = {kind: count_parameters(build_model(name, n_classes=10, img_size=32, **options))
              for kind, (name, options) in le.CNN_TO_VIT_MODELS.items()}
    assert max(counts.values()) <= 1.1 * min(counts.values())


@pytest.mark.usefixtures("small")
def test_a_training_is_a_function_of_its_seed():
    def weights(seed):
        train, val, _ = loaders()
        state = torch.get_rng_state()
        trainer = le.train_once("ViT", train, QUICK, 1e-3, seed, **ON_CPU)
        assert torch.equal(state, torch.get_rng_state())
        assert 0 <= trainer.evaluate(val)["acc"] <= 1
        return trainer.model.head.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_the_rate_is_the_best_on_the_validation_images_and_the_least_among_equals(monkeypatch):
    accuracies = {1e-3: 0.7, 2e-3: 0.9, 4e-3: 0.9}
    monkeypatch.setattr(le, "train_once", lambda kind, train, recipe, rate, seed, **run: Answers(rate, accuracies))
    assert le.best_of_rates("ViT", None, "validation", QUICK, 0, tuple(accuracies)) == (2e-3, accuracies, 2e-3)


@pytest.mark.usefixtures("small")
def test_cells_of_reach_and_cues(monkeypatch):
    for cell in (le.measure_reach("Hybrid", 1, QUICK, 24, 20, (8, 20), 32, **ON_CPU),
                 le.measure_cues("Hybrid", 1, QUICK, 25, 20, 16, **ON_CPU)):
        assert (cell["kind"], cell["seed"], cell["rate"] in le.RATES, len(cell["rates"])) == ("Hybrid", 1, True, 3)
    reach = le.measure_reach("ViT", 0, QUICK, 24, 20, (8, 20), 32, **ON_CPU)
    assert [0 <= correct <= 20 for correct in reach["correct"]] == [True, True]
    cues = le.measure_cues("ViT", 0, QUICK, 25, 20, 16, **ON_CPU)
    assert sum(cues["choices"].values()) == 20


def test_the_right_answers_are_counted_at_each_distance(monkeypatch):
    monkeypatch.setattr(le, "make_marks", lambda n, side, **how: make_marks(min(n, 9), side, **how))
    model = Says([0, 1, 0, 1, 0, 0, 0, 1, 1, 1])  # where 0, 1, 0, 1, 0 are right, at each distance
    monkeypatch.setattr(le, "best_of_rates", lambda *words, **run: (model, {1e-3: 0.9}, 1e-3))
    cell = le.measure_reach("ViT", 0, QUICK, n_test=5, distances=(8, 20), img_size=32)
    assert (cell["distances"], cell["correct"], cell["n"]) == ([8, 20], [5, 2], 5)


def test_answers_by_outline_are_told_from_those_by_texture(monkeypatch):
    _, outlines, textures = make_cues(8, 16, start=2 * 10**9, agree=False)
    neither = min({0, 1, 2} - {outlines[7].item(), textures[7].item()})
    model = Says([*outlines[:5].tolist(), *textures[5:7].tolist(), neither], n_classes=len(shapes_module.CUES))
    monkeypatch.setattr(le, "make_cues", lambda n, side, **how: make_cues(min(n, 8), side, **how))
    monkeypatch.setattr(le, "best_of_rates", lambda *words, **run: (model, {1e-3: 0.9}, 1e-3))
    cell = le.measure_cues("ViT", 0, QUICK, n_test=8, img_size=16)
    assert cell["choices"] == dict(outline=5, texture=2, neither=1)
    assert cell["shape_bias"] == 5 / 7


@pytest.mark.usefixtures("small")
def test_reach_is_asked_of_images_that_were_not_trained_on_and_nothing_adds_or_hides_a_mark(monkeypatch):
    drawn, trained, make, train = [], [], shapes_module.make_marks, le.train_once
    monkeypatch.setattr(le, "make_marks", lambda n, side, **how: drawn.append(how) or make(n, side, **how))
    monkeypatch.setattr(le, "train_once", lambda kind, loader, recipe, *rest, **run: trained.append(
        (loader.augmentation, recipe.augmentation)) or train(kind, loader, recipe, *rest, **run))
    le.measure_reach("ViT", 1, QUICK, 24, 20, (8, 20), 32, **ON_CPU)
    first, val, *tests = [(how["seed"], how["start"], how.get("distance")) for how in drawn]
    assert (first, val) == ((2, 0, None), (2, 10**9, None))
    assert tests == [(0, 2 * 10**9, 8), (0, 2 * 10**9, 20)]
    assert {one.shift for pair in trained for one in pair} == {0.0}


@pytest.mark.usefixtures("small")
def test_a_rate_is_chosen_on_validation_images_and_the_test_images_are_read_once(monkeypatch):
    parts, asked, evaluate = loaders(), [], train_vit.Trainer.evaluate
    monkeypatch.setattr(train_vit.Trainer, "evaluate", lambda self, loader: asked.append(parts.index(loader)) or evaluate(
        self, loader))
    le.measure_data("ViT", 0, 40, parts, QUICK, **ON_CPU)
    assert asked == [1, 1, 1, 2]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("n_images", [2, 4, 40])
def test_a_cell_of_data_trains_on_so_many_of_the_images(n_images, monkeypatch):
    seen, train = [], le.train_once

    def watched(kind, loader, *rest, **run):
        seen.append((loader.n_images, loader.training, loader.augmentation, loader.seed))
        return train(kind, loader, *rest, **run)

    monkeypatch.setattr(le, "train_once", watched)
    cell = le.measure_data("ConvNet", 5, n_images, loaders(), QUICK, **ON_CPU)
    assert seen == [(n_images, True, Augmentation(), 5)] * 3
    assert (cell["n_images"], cell["n"]) == (n_images, 14)


# ---- Sentences and figures


def reach_cells(levels):
    return [dict(kind=kind, seed=seed, distances=[8, 42], correct=[near, far], n=100)
            for kind, (near, far) in levels.items() for seed in le.SEEDS]


def test_the_reach_sentence_turns_with_the_numbers():
    first = le.say_reach(reach_cells(dict(ViT=(98, 97), ConvNet=(99, 55))))
    assert "98% and 97% (ViT) and 99% and 55% (ConvNet)" in first
    assert "ConvNet loses most with distance, 44 points" in first
    assert "ViT loses most" in le.say_reach(reach_cells(dict(ViT=(99, 55), ConvNet=(98, 97))))
    both = le.say_reach(reach_cells(dict(ViT=(98, 97), ConvNet=(99, 96))))
    assert "ViT and ConvNet, none loses more than 5 points" in both
    alike = le.say_reach(reach_cells({"ViT": (99, 55), "Hybrid": (98, 97), "ConvNet": (99, 54)}))
    assert "ConvNet loses 45 points with distance, but ConvNet and ViT cannot be told apart in that" in alike
    partly = le.say_reach(reach_cells(dict(ViT=(51, 50), ConvNet=(99, 55))))
    assert partly.endswith("ConvNet loses most with distance, 44 points. ViT did not learn the task at any distance.")
    dip = [dict(cell, distances=[8, 20, 42], correct=[99, 51, 98]) for cell in reach_cells(dict(ViT=(1, 1)))]
    assert "ViT loses most with distance, 48 points" in le.say_reach(dip)
    once = reach_cells(dict(ViT=(99, 97), ConvNet=(99, 55)))[::3]
    assert "cannot be told apart" in le.say_reach(once)
    assert "None has learned the task" in le.say_reach(reach_cells(dict(ViT=(50, 49), ConvNet=(52, 55))))


def cue_cell(kind, level):
    choices = dict(outline=round(100 * level), texture=round(100 - 100 * level)) if not math.isnan(level) else \
        dict(outline=0, texture=0)
    return dict(kind=kind, shape_bias=level, choices=choices | dict(neither=7))


def test_the_cue_sentence_turns_with_the_numbers():
    def sentence(**levels):
        return le.say_cues([cue_cell(kind, level) for kind, level in levels.items() for _ in le.SEEDS])

    assert "ViT goes by outline with every seed, ConvNet goes by texture" in sentence(ViT=0.8, ConvNet=0.1)
    assert "ConvNet goes by outline with every seed, ViT goes" in sentence(ViT=0.1, ConvNet=0.8)
    assert "ViT and ConvNet go by texture with every seed" in sentence(ViT=0.1, ConvNet=0.2)
    assert "None goes by the same cue" in sentence(ViT=0.5, ConvNet=0.55)  # 0.55 of 100 answers is chance
    assert "No model answers by outline or by texture" in sentence(ViT=math.nan)
    assert sentence(ViT=0.8, ConvNet=math.nan).endswith("every seed. ConvNet never answered by either.")
    for levels in ((0.8, 0.7, 0.4), (0.8, math.nan, math.nan), (0.8,)):  # not with every seed, or one alone
        cells = [cue_cell("ViT", level) for level in levels]
        assert le.say_cues(cells).endswith("None goes by the same cue with every seed.")


def data_cells(levels):
    return [dict(kind=kind, seed=seed, n_images=n_images, correct=correct + seed, n=1000)
            for kind, pairs in levels.items() for n_images, correct in zip((100, 9000), pairs, strict=True)
            for seed in le.SEEDS]


def test_the_data_sentence_turns_with_the_numbers():
    first = le.say_data(data_cells(dict(ViT=(300, 800), ConvNet=(400, 801))))
    assert "With the fewest images, 100, 30.1% (ViT) and 40.1% (ConvNet): ConvNet is ahead" in first
    assert "With the most images, 9,000, 80.1% (ViT) and 80.2% (ConvNet): ConvNet and ViT cannot be told apart" in first
    assert "ConvNet is ahead. Step by step, in points: ConvNet +10.0. With the most" in first
    assert first.endswith("Step by step, in points: ConvNet +0.1 (no more than chance).")
    assert "ViT is ahead" in le.say_data(data_cells(dict(ViT=(400, 900), ConvNet=(300, 800))))


def test_a_kind_alone_is_ahead_of_nobody():
    cells = data_cells(dict(ViT=(300, 800), ConvNet=(400, 900)))
    alone = le.say_data([cell for cell in cells if cell["kind"] == "ViT"])
    assert alone.count("there is nothing to compare it with yet") == 2
    cut = [cell for cell in cells if cell["kind"] == "ViT" or cell["n_images"] == 9000]
    assert "30.1% (ViT): there is nothing to compare it with yet (ConvNet not measured yet)." in le.say_data(cut)
    assert "ConvNet is ahead. Step" in le.say_data(cut)


def test_what_is_measured_once_is_not_told_apart():
    cells = [cell for cell in data_cells(dict(ViT=(300, 300), ConvNet=(900, 900))) if cell["seed"] == 0]
    assert "cannot be told apart" in le.say_data(cells)


@pytest.mark.parametrize(("draw", "cells"), [
    (le.draw_reach, reach_cells(dict(ViT=(98, 97), ConvNet=(99, 55)))),
    (le.draw_cues, [dict(kind="ViT", shape_bias=level, seed=0) for level in (0.2, 0.4, math.nan)]),
    (le.draw_data, data_cells(dict(ViT=(300, 800), ConvNet=(400, 801))))])
def test_cells_become_figures_with_bands(draw, cells):
    (figure,) = draw(cells).values()
    axes = figure.axes[0]
    if draw is not le.draw_cues:
        bands = [part.get_paths()[0].vertices[:, 1] for part in axes.collections if isinstance(part, PolyCollection)]
        assert len(bands) == 2
        shares = sorted(100 * cell["correct"][0] / cell["n"] if draw is le.draw_reach else
                        100 * cell["correct"] / cell["n"] for cell in cells)
        assert max(map(max, bands)) == pytest.approx(shares[-1])
    assert "of 3 seeds" in figure.get_suptitle() or draw is le.draw_cues


def test_without_answers_by_either_cue_there_is_no_figure():
    cells = [dict(kind="ViT", shape_bias=math.nan, seed=0)]
    assert le.draw_cues(cells) == {}
    assert "No model answers" in le.say_cues(cells)


def test_what_cannot_be_built_is_said_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(le, "train_once", None)
    with pytest.raises(InputError, match="not divisible by patch_size"):
        le.compare_on_dataset(loaders(img_size=18), 1, **ON_CPU)


def test_without_cells_there_is_nothing_to_say():
    with pytest.raises(InputError, match="no cells yet"):
        le.say_reach([])


# ---- Verdicts


def rows_of(shares, n=400, seeds=3, spread=0.0, generator=None):
    """Rows of judge(): each kind right in so many images by chance, the same images hard for all."""
    generator = generator or random.Random(0)
    hard = [generator.random() for _ in range(n)]
    rows = {}
    for kind, share in shares.items():
        rows[kind] = []
        for seed in range(seeds):
            level = share + spread * generator.gauss(0, 1)
            right = [0.5 * h + 0.5 * generator.random() < level for h in hard]
            rows[kind].append(dict(seed=seed, n_steps=1, right=right, accuracy=sum(right) / n))
    return rows


def test_a_clear_lead_is_named_with_its_interval():
    text = le.summarise(rows_of(dict(ConvNet=0.9, Hybrid=0.6, ViT=0.5)))
    assert text.startswith("ConvNet. 3 seeds each, 400 images: ")
    assert "before Hybrid" in text
    assert "before ViT" in text
    assert le.summarise(rows_of(dict(ConvNet=0.5, Hybrid=0.6, ViT=0.9))).startswith("ViT. ")


def test_a_lead_within_the_noise_is_no_winner_and_the_cheapest_is_named():
    rows = rows_of(dict(ConvNet=0.71, Hybrid=0.70, ViT=0.3))
    text = le.summarise(rows, dict(ConvNet=2.0, Hybrid=0.5, ViT=0.1))
    assert text.startswith("No winner among ")
    assert "ViT is behind" in text
    assert "Of these Hybrid costs least, 0.50 ms" in text


def test_seeds_that_differ_much_hide_a_lead():
    clear = rows_of(dict(ConvNet=0.75, Hybrid=0.6, ViT=0.6), n=2000)
    noisy = {kind: [dict(row, accuracy=row["accuracy"] + by) for row, by in zip(own, (-0.2, 0, 0.2), strict=True)]
             for kind, own in clear.items()}
    assert le.summarise(clear).startswith("ConvNet. ")
    assert le.summarise(noisy).startswith("No winner among ConvNet")


def test_where_nothing_differs_hardly_ever_a_winner_is_named():
    generator = random.Random(7)
    named = sum(not le.summarise(rows_of(dict(ConvNet=0.7, Hybrid=0.7, ViT=0.7), 200, spread=0.02, generator=generator))
                .startswith("No winner") for _ in range(200))
    assert named <= 10  # 5% of 200


def test_images_alone_can_hide_a_lead():
    """Seeds that are all alike: what is left are the images, of which 30 do not tell 10 points apart."""
    def rows(n, share):
        right = [i < round(share * n) for i in range(n)]
        return [dict(seed=seed, right=right, accuracy=sum(right) / n) for seed in range(3)]

    for n, start in ((30, "No winner among ConvNet"), (3000, "ConvNet. ")):
        assert le.summarise(dict(ConvNet=rows(n, 0.8), Hybrid=rows(n, 0.7), ViT=rows(n, 0.7))).startswith(start)
    difference, half = statistics_module.compare_two(rows(30, 0.8), rows(30, 0.7))
    assert difference == pytest.approx(0.1)
    batch_split_warning = torch.tensor([0.0] * 27 + [1.0] * 3 + [1.0, -1.0])  # image by image, and one more for each side
    assert half == pytest.approx(statistics_module.t_quantile(31) * (batch_split_warning.var().item() / 32) ** 0.5, rel=1e-6)


def test_trainings_that_diverged_are_told():
    rows = rows_of(dict(ConvNet=0.9, Hybrid=0.6, ViT=0.5))
    assert "diverged" not in le.summarise(rows)
    rows["ViT"][1] |= dict(diverged=True, right=[False] * 400, accuracy=0.0)
    assert "1 training of ViT diverged and counts as no image right." in le.summarise(rows)
    rows["ViT"][2]["diverged"] = True
    assert "2 trainings of ViT diverged and count as no image right." in le.summarise(rows)


def test_a_verdict_needs_two_of_each():
    with pytest.raises(InputError, match="two seeds"):
        le.summarise(rows_of(dict(ConvNet=0.9, ViT=0.1), seeds=1))
    with pytest.raises(InputError, match="two kinds"):
        le.summarise(rows_of(dict(ConvNet=0.9)))


def student_tail(t, df, step=1e-3, end=400.0):
    """P(T > t) for Student's t, by the trapezoid rule; of df = 1, whose tail is too long for that, by its formula."""
    if df == 1:
        return 0.5 - math.atan(t) / math.pi
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    x = torch.arange(t, end, step, dtype=torch.float64)
    return (constant * torch.trapezoid((1 + x**2 / df) ** (-(df + 1) / 2), x)).item()


@pytest.mark.parametrize("df", sorted(statistics_module.CONFIDENCE))
def test_the_quantiles_are_students(df):
    assert student_tail(statistics_module.CONFIDENCE[df], df) == pytest.approx(0.05 / 3 / 2, rel=2e-3)


def test_quantiles_of_other_degrees_of_freedom_are_wider():
    assert [statistics_module.t_quantile(df) for df in (1, 2, 2.9, 5, 7, 400)] == [38.19, 7.649, 7.649, 3.534, 3.287, 2.428]


def test_an_interval_of_equal_parts_has_their_degrees_of_freedom_together():
    assert statistics_module.half_width([(0.25, 2), (0.25, 2)]) == pytest.approx(statistics_module.CONFIDENCE[4] * 0.5**0.5)
    assert statistics_module.half_width([(1.0, 120), (0.0, 2)]) == pytest.approx(statistics_module.CONFIDENCE[120])


def test_few_images_that_agree_prove_little():
    rows = {kind: [dict(seed=seed, right=[right] * 2, accuracy=float(right)) for seed in range(3)]
            for kind, right in (("ConvNet", True), ("ViT", False))}
    text = le.summarise(rows)
    assert text.startswith("No winner: 2 images are too few to tell, 20 are the least")
    cells = [dict(kind=kind, seed=seed, n_images=9, correct=correct, n=50)
             for kind, correct in (("ViT", 44), ("ConvNet", 45)) for seed in le.SEEDS]
    assert "cannot be told apart" in le.say_data(cells)
    assert le.say_data(cells).count("images") == 1


def test_numbers_of_images_come_once():
    assert le.numbers_of_images((0.01, 0.03, 0.1, 1.0), 90, 10) == [90, 10]


def test_a_training_that_diverges_loses_only_itself(monkeypatch):
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
    monkeypatch.setattr(le, "steps_within", lambda *words, **run: 1)
    lines = []
    rows = le.compare_on_dataset(loaders(), 1, report=lines.append, recipe=QUICK, **ON_CPU)
    assert {(row["accuracy"], row["diverged"]) for own in rows.values() for row in own} == {(0.0, True)}
    assert "counts as no image right" in lines[0]


@pytest.mark.usefixtures("small")
def test_judge_trains_each_kind_with_each_seed_within_its_share_of_the_time(monkeypatch):
    asked = []
    monkeypatch.setattr(le, "steps_within", lambda seconds, *rest, **run: asked.append(seconds) or 2)
    lines = []
    trained, train = [], le.train_once
    monkeypatch.setattr(le, "train_once", lambda kind, loader, recipe, rate, *rest, **run: trained.append(
        (recipe, rate)) or train(kind, loader, recipe, rate, *rest, **run))
    rows = le.compare_on_dataset(loaders(), 3, recipe=QUICK, report=lines.append, **ON_CPU)
    assert trained == [(QUICK, le.RATES[1])] * 9  # one recipe for all
    assert asked == [20, 20, 20]
    assert list(rows) == ["ConvNet", "Hybrid", "ViT"]
    assert {len(row["right"]) for own in rows.values() for row in own} == {14}
    assert [row["seed"] for own in rows.values() for row in own] == [0, 1, 2] * 3
    assert len(lines) == 9
    train_loader, val, _ = loaders()
    rows = le.compare_on_dataset((train_loader, val, None), 3, recipe=QUICK, report=lines.append, **ON_CPU)
    assert {len(row["right"]) for own in rows.values() for row in own} == {12}
    for own in rows.values():
        assert all(row["accuracy"] == pytest.approx(sum(row["right"]) / 12) for row in own)


@pytest.mark.usefixtures("small")
def test_judge_counts_right_answers_and_the_verdict_names_who_has_most(monkeypatch):
    train, val, _ = loaders()
    drawn = make_mark(60, 16, start=2000)
    test = le.loader_of(drawn.images, drawn.labels, drawn.class_names, QUICK)
    right = dict(ConvNet=[True] * 60, Hybrid=[True] * 20 + [False] * 40, ViT=[False] * 60)

    def train_once(kind, *words):
        answers = [label if knows else 1 - label for label, knows in zip(drawn.labels.tolist(), right[kind],
                                                                         strict=True)]
        return SimpleNamespace(model=Says(answers))

    monkeypatch.setattr(le, "train_once", train_once)
    monkeypatch.setattr(le, "steps_within", lambda *words, **run: 1)
    rows = le.compare_on_dataset((train, val, test), 1, recipe=QUICK, report=lambda line: None, **ON_CPU)
    assert {kind: [row["right"] for row in own] for kind, own in rows.items()} == {
        kind: [answers] * 3 for kind, answers in right.items()}
    assert [own[0]["accuracy"] for own in rows.values()] == pytest.approx([1, 1 / 3, 0])
    assert le.summarise(rows).startswith("ConvNet. 3 seeds each, 60 images: 100.0% (ConvNet), 33.3% (Hybrid) and 0.0%")


def test_larger_images_have_larger_patches_and_the_three_stay_alike():
    for kind in ("ViT", "Hybrid"):
        assert [le.build_kind(kind, 3, side).patch_embed.n_patches for side in (32, 64)] == [64, 64]
    counts = [count_parameters(le.build_kind(kind, 10, 64)) for kind in le.CNN_TO_VIT_MODELS]
    assert max(counts) <= 1.15 * min(counts)
    for kind in le.CNN_TO_VIT_MODELS:  # a step from 32 to 64 pixels costs each of them about as much more
        small, large = (count_flops(le.build_kind(kind, 10, side)) for side in (32, 64))
        assert large <= 1.15 * small
