"""The experiments that train: what they measure, and findings that follow the numbers."""

import math

import pytest
import torch
from matplotlib.collections import PolyCollection
from torch import nn

from train_vit import NotFinite
from vit_bridge.compare import trained as td
from vit_bridge.compare import trials as tr
from vit_bridge.compare.trials import SEEDS, Arm, Trial
from vit_bridge.data.shapes import CUES, make_corners, make_cues, make_mark
from vit_bridge.models.registry import build_model

ON_CPU = dict(device="cpu", amp="off")
TINY = Arm("vit_nano_fast", dict(embed_dim=12, depth=1, n_heads=2), first_smaller=False)
CHOSEN = dict(rate=dict(learning_rate=1e-3, n_steps=1))


class Says(nn.Module):
    """A model that predicts these classes one after the other, whatever the images."""

    attends, windowed = True, False

    def __init__(self, answers, n_classes=2):
        super().__init__()
        self.answers, self.n_classes, self.weight = list(answers), n_classes, nn.Parameter(torch.zeros(1))

    def forward(self, images):
        given, self.answers = self.answers[:len(images)], self.answers[len(images):]
        return nn.functional.one_hot(torch.tensor(given), self.n_classes).float()


def loaders(n=40, img_size=16):
    made = [make_mark(count, img_size, start=start) for count, start in ((n, 0), (12, 1000), (14, 2000))]
    return tuple(tr.loader_of(drawn.images, drawn.labels, drawn.class_names) for drawn in made)


def answering(monkeypatch, answers, n_classes=2):
    """Make every training return a model that gives these answers."""
    def train(self, trial, chosen, loader, val_loader, n_steps, look=lambda rate, model: None, **run):
        model = Says(answers, n_classes)
        look(1e-3, model)
        return model, 1e-3, {1e-3: 0.9}

    monkeypatch.setattr(tr.TrainedExperiment, "train", train)


# ---- Measuring


def test_reach_counts_correct_predictions_at_each_distance(monkeypatch):
    answering(monkeypatch, [0, 1, 0, 1, 0, 0, 0, 1, 1, 1])  # where 0, 1, 0, 1, 0 are right, at each distance
    found = td.Reach().measure(Trial("reach", "ViT", 1), {}, n_images=9, n_val=4, n_test=5, distances=(8, 20),
                               img_size=32, device="cpu")
    assert (found["distances"], found["correct"], found["n"]) == ([8, 20], [5, 2], 5)
    assert [numbers for numbers, _ in found["sums"]] == [pytest.approx(0.6)] * 2  # three of five have the first class


def test_reach_sums_over_single_marks_solve_at_most_three_quarters():
    """Every image has two marks of each kind. Weighted by row, they cancel out unless the marks of a row are equal."""
    drawn = make_corners(200, 32, start=8, distance=20)
    numbers, by_row = td.mark_sums(drawn.images).T
    assert numbers.tolist() == [2] * 200
    assert td.best_threshold(numbers, drawn.labels) == 0.5
    assert set(by_row.tolist()) == {-40, 0, 40}  # twice the distance if a row's marks are equal
    assert td.best_threshold(by_row, drawn.labels) == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize(("distance", "period", "accuracy"), [
    (8, 2, 0.5), (23, 2, 1.0), (26, 2, 0.5), (26, 4, 1.0), (16, 4, 0.5), (16, 8, 0.5), (24, 4, 0.5),
    (24, 8, 0.5), (24, 16, 1.0)])
def test_reach_has_shortcuts_where_the_rows_of_the_square_lie_differently_on_a_grid(distance, period, accuracy):
    """Then the number of marks of a kind in the upper halves of the grid's cells determines the class."""
    drawn = make_corners(200, 32, start=8, distance=distance)
    windows = drawn.images[:, 0].float().div(255).unfold(1, td.M, 1).unfold(2, td.M, 1)
    marks = (windows == td.MARKS[0]).all(dim=(3, 4))  # (N, rows, columns)
    in_upper_halves = marks[:, torch.arange(marks.shape[1]) % period < period / 2].sum(dim=(1, 2))  # (N)
    assert td.best_threshold((in_upper_halves == 1).long(), drawn.labels) == pytest.approx(accuracy)


def columns_in_windows(model, side):
    """Return which columns of pixels can change each column of the last map: (W, S), by where a NaN shows."""
    seen = []
    for column in range(side):
        images = torch.zeros(1, 3, side, side, dtype=torch.float64)
        images[..., column] = math.nan
        seen.append(model.forward_features(images).isnan().flatten(0, 2).any(dim=0))  # (W)
    return torch.stack(seen, dim=1)


@pytest.mark.parametrize(("distance", "touched"), [(20, True), (23, True), (26, False)])
def test_narrow_windows_touch_two_marks_up_to_23_pixels_apart(distance, touched):
    """Elsewhere the ConvNet with two stages only averages over single marks."""
    arm = td.REACH_ARMS["ConvNet, 2 stages"].own_recipe()
    model = build_model(arm.model, n_classes=2, img_size=32, **arm.model_options).double().eval()
    windows = columns_in_windows(model, 32)
    for first in range(32 - td.M - distance + 1):
        both = (windows[:, at:at + td.M].any(dim=1) for at in (first, first + distance))
        assert torch.logical_and(*both).any().item() == touched


@pytest.mark.parametrize(("values", "labels", "accuracy"), [
    ([0, 1, 2, 3], [0, 0, 1, 1], 1.0), ([0, 1, 2, 3], [1, 1, 0, 0], 1.0), ([0, 1, 2, 2], [1, 0, 1, 1], 0.75),
    ([0, 1, 2], [1, 0, 1], 2 / 3)])
def test_best_threshold_tries_both_directions(values, labels, accuracy):
    assert td.best_threshold(torch.tensor(values), torch.tensor(labels)) == pytest.approx(accuracy)


def test_reach_draws_training_validation_and_test_images_apart(monkeypatch):
    drawn, make = [], td.make_corners
    monkeypatch.setattr(td, "make_corners", lambda n, side, **how: drawn.append(how) or make(n, side, **how))
    answering(monkeypatch, [0] * 40)
    td.Reach().measure(Trial("reach", "ViT", 1), {}, n_images=9, n_val=4, n_test=5, distances=(8, 20), img_size=32,
                       device="cpu")
    starts = [(how.get("seed", 0), how["start"], how.get("distance")) for how in drawn]
    assert starts == [(2, 0, None), (2, td.VAL_START, None), (0, td.TEST_START, 8), (0, td.TEST_START, 20)]


def test_reach_keeps_its_marks_whole():
    for arm in td.REACH_ARMS.values():
        recipe = arm.own_recipe()
        assert (recipe.augmentation.shift, recipe.train.progressive_resize) == (0.0, None)


def test_cues_separates_predictions_by_outline_and_texture(monkeypatch):
    _, outlines, textures = make_cues(8, 16, start=td.TEST_START, agree=False)
    neither = min({0, 1, 2} - {outlines[7].item(), textures[7].item()})
    answering(monkeypatch, [*outlines[:5].tolist(), *textures[5:7].tolist(), neither], len(CUES))
    found = td.Cues().measure(Trial("cues", "ConvNet", 0), {}, n_images=9, n_val=4, n_test=8, img_size=16)
    assert found["choices"] == dict(outline=5, texture=2, neither=1)
    assert found["shape_bias"] == 5 / 7
    assert set(found["by_rate"]) == set(found["rates"])
    assert found["by_rate"][found["learning_rate"]] == 5 / 7


def test_data_efficiency_doubles_the_steps_until_validation_stops_rising(monkeypatch):
    scores = {1: 0.5, 2: 0.6, 4: 0.65, 8: 0.655, 16: 0.9}  # validation accuracies by steps
    trained = []
    monkeypatch.setattr(td, "train_arm", lambda arm, part, n_steps, rate, seed, **run: trained.append(
        (part.n_images, n_steps, rate, seed)) or n_steps)
    for module in (td, tr):
        monkeypatch.setattr(module, "count_correct", lambda model, loader, device: (
            (scores[model] * 1000, 1000) if loader.n_images == 12 else (7, 14)))  # of 12 validation images, or of 14
    monkeypatch.setattr(td, "count_parameters", lambda model: 0)
    experiment, images = td.DataEfficiency(), loaders()
    found = experiment.measure(Trial("data", "ViT", 0, 30), images, {}, first_steps=1, most_steps=16)
    rate = found["learning_rate"]
    assert found["lengths"] == {1: 0.5, 2: 0.6, 4: 0.65, 8: 0.655}
    assert (found["n_steps"], found["still_rising"], found["correct"], found["n"]) == (4, False, 7, 14)
    assert set(found["rates"].values()) == {0.65}
    doubled, again = trained[-5:-2], trained[-2:]
    assert doubled == [(30, 2, rate, 0), (30, 4, rate, 0), (30, 8, rate, 0)]
    assert again == [(30, 4, rate / 2, 0), (30, 4, 2 * rate, 0)]
    found = experiment.measure(Trial("data", "ViT", 0, 30), images, {}, first_steps=1, most_steps=4)
    assert (found["n_steps"], found["still_rising"]) == (4, True)
    trained.clear()
    found = experiment.measure(Trial("data", "ViT", 2, 30), images, dict(rate=dict(learning_rate=0.1, n_steps=8)))
    assert trained == [(30, 8, 0.1, 2)]


def test_data_efficiency_keeps_the_shorter_model_if_the_longer_training_diverges(monkeypatch):
    def train_arm(arm, part, n_steps, rate, seed, **run):
        if n_steps > 2:
            raise NotFinite("it diverged")
        return n_steps

    monkeypatch.setattr(td, "train_arm", train_arm)
    for module in (td, tr):
        monkeypatch.setattr(module, "count_correct", lambda model, loader, device: (model, 10))
    monkeypatch.setattr(td, "count_parameters", lambda model: 0)
    found = td.DataEfficiency().measure(Trial("data", "ViT", 0, 30), loaders(), {}, first_steps=1, most_steps=16)
    assert (found["n_steps"], found["lengths"], found["correct"]) == (2, {1: 0.1, 2: 0.2, 4: 0.0}, 2)


def test_drawn_experiments_choose_on_validation_images(monkeypatch):
    monkeypatch.setattr(tr, "train_arm", lambda *words, **options: None)
    monkeypatch.setattr(tr, "count_correct", lambda model, loader, device: (loader.n_images - 10, loader.n_images))
    train_loader, val_loader, _ = loaders()
    _, _, rates = td.Reach().train(Trial("reach", "ViT", 0), {}, train_loader, val_loader, 1)
    assert set(rates.values()) == {2 / 12}


@pytest.mark.slow
def test_experiments_train_an_arm(monkeypatch):
    for name, arguments in (("reach", dict(n_steps=1, n_images=8, n_val=4, n_test=4, distances=(8,), img_size=16)),
                            ("cues", dict(n_steps=1, n_images=10, n_val=5, n_test=5, img_size=16))):
        monkeypatch.setattr(type(td.TRAINED[name]), "arms", dict(ViT=TINY))
        found = td.TRAINED[name].measure(Trial(name, "ViT", 1), {}, **arguments, **ON_CPU)
        assert len(found["rates"]) >= 3
        assert td.TRAINED[name].measure(Trial(name, "ViT", 1), CHOSEN, **arguments, **ON_CPU)["rates"].keys() == {1e-3}
    monkeypatch.setattr(td.DataEfficiency, "arms", dict(ViT=TINY))
    found = td.DataEfficiency().measure(Trial("data", "ViT", 0, 20), loaders(), {}, first_steps=1, most_steps=2,
                                        **ON_CPU)
    assert (found["n_images"], found["n"]) == (20, 14)


# ---- Findings, tables and figures


def reach_trials(levels):
    return [dict(arm=arm, seed=seed, distances=[8, 42], correct=[near, far], n=100, sums=[[0.5, 0.75]] * 2,
                 window=23 if arm.startswith("ConvNet") else None)
            for arm, (near, far) in levels.items() for seed in SEEDS]


def test_reach_finding_lists_the_solved_distances():
    trials = reach_trials({"ViT": (98, 97), "ConvNet, 2 stages": (99, 55), "Swin": (94, 96), "hybrid": (60, 50)})
    assert td.TRAINED["reach"].finding(trials) == (
        "With every seed, ViT is right in at least 95% of the images at every distance. Below 95% with some seed: Swin "
        "at 8 pixels; hybrid at every distance; ConvNet of 2 stages (window 23) at 42 pixels.")
    trials[1]["correct"] = [94, 99]  # one seed of the ViT
    assert td.TRAINED["reach"].finding(trials).startswith("With every seed, no network is right")
    assert "some seed: ViT at 8 pixels; Swin" in td.TRAINED["reach"].finding(trials)


def cue_trial(arm, level):
    choices = dict(outline=round(100 * level), texture=round(100 - 100 * level)) if not math.isnan(level) else \
        dict(outline=0, texture=0)
    return dict(arm=arm, shape_bias=level, by_rate={"0.001": level}, choices=choices | dict(neither=7), val_acc=0.9)


def test_cues_finding_follows_the_numbers():
    def finding(**levels):
        names = dict(ViT="ViT, patches of 4", ConvNet="ConvNet")
        return td.TRAINED["cues"].finding([cue_trial(names[arm], level) for arm, level in levels.items()
                                           for _ in SEEDS])

    assert finding(ViT=0.8, ConvNet=0.1) == (
        "The outline decides 80% (ViT, patches of 4) and 10% (ConvNet) of the predictions that follow a cue. With "
        "every seed, the outline prevails in ViT, patches of 4, and the texture prevails in ConvNet.")
    assert "No cue prevails" in finding(ViT=0.5, ConvNet=0.55)  # 0.55 of 100 predictions is chance
    assert "No model follows the outline or the texture" in finding(ViT=math.nan)
    mixed = [cue_trial("ConvNet", level) for level in (0.8, 0.7, 0.4)]
    assert "No cue prevails" in td.TRAINED["cues"].finding(mixed)
    assert td.TRAINED["cues"].draw([cue_trial("ConvNet", math.nan) | dict(seed=0)]) == {}


def data_trials(levels):
    return [dict(arm=arm, seed=seed, n_images=n_images, correct=correct + seed, n=1000, n_steps=4000,
                 learning_rate=1e-3, still_rising=False)
            for arm, pairs in levels.items() for n_images, correct in zip((100, 9000), pairs, strict=True)
            for seed in SEEDS]


def test_data_efficiency_finding_follows_the_numbers():
    finding = td.TRAINED["data"].finding(data_trials(dict(ViT=(300, 800), ConvNet=(400, 801))))
    assert finding == ("With 100 images, ConvNet is ahead of ViT by 10.0 points; with 9,000 images, ConvNet and ViT "
                       "cannot be distinguished.")


def test_data_efficiency_tables_hold_steps_and_rates():
    trials = data_trials(dict(ViT=(300, 800), ConvNet=(400, 801)))
    trials[0]["still_rising"] = True
    accuracies, lengths = (rows for _, rows in td.TRAINED["data"].tables(trials))
    assert accuracies[1] == ["100", "30.1% (30.0 to 30.2)", "40.1% (40.0 to 40.2)"]
    accuracies, _ = (rows for _, rows in td.TRAINED["data"].tables(trials[1:]))
    assert accuracies[1] == ["100", "30.1% (30.1 to 30.2), 2 seeds", "40.1% (40.0 to 40.2)"]
    assert lengths[1] == ["100", "4,000 (still rising) at 0.001", "4,000 at 0.001"]


@pytest.mark.parametrize(("name", "trials"), [
    ("reach", reach_trials({"ViT": (98, 97), "ConvNet, 2 stages": (99, 55)})),
    ("cues", [cue_trial("ConvNet", level) | dict(seed=seed) for seed, level in enumerate((0.2, 0.4, math.nan))]),
    ("data", data_trials(dict(ViT=(300, 800), ConvNet=(400, 801))))])
def test_trained_experiments_give_tables_and_banded_figures(name, trials):
    experiment = td.TRAINED[name]
    (figure,) = experiment.draw(trials).values()
    if name != "cues":
        bands = [part for axes in figure.axes for part in axes.collections if isinstance(part, PolyCollection)]
        assert len(bands) == 2
    assert "of 3 seeds" in " ".join(figure.get_suptitle().split())
    for caption, (heads, *rows) in experiment.tables(trials):
        assert caption
        assert rows
        assert {len(row) for row in rows} == {len(heads)}
