"""The ladder's networks have nearly equal FLOPs, and its findings follow the numbers."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vit_bridge.analysis.cost import count_flops
from vit_bridge.compare import ladder as ld
from vit_bridge.compare import trials as tr
from vit_bridge.compare.trials import SEEDS, Trial
from vit_bridge.data.shapes import make_mark
from vit_bridge.models.initialisation import whiten_first_layer

ON_CPU = dict(device="cpu", amp="off")


def built(name, n_classes=10, img_size=32):
    recipe = ld.RUNGS[name].own_recipe()
    return ld.RUNGS[name].build(recipe.model, n_classes=n_classes, img_size=img_size, **recipe.model_options)


def test_rungs_have_nearly_equal_flops():
    flops = {name: count_flops(built(name)) for name in ld.RUNGS}
    assert (round(min(flops.values()) / 1e6), round(max(flops.values()) / 1e6)) == (62, 73)
    assert list(ld.CHANGES) == list(ld.RUNGS)


@pytest.mark.parametrize(("name", "share"), [("ViT, convolutional stem", "12%"), ("hybrid", "76%")])
def test_convolutions_do_a_share_of_the_flops(name, share):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        built(name).eval()(torch.zeros(1, 3, 32, 32))
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert f"{convolutions / count_flops(built(name)):.0%}" == share
    assert "76% of the FLOPs" in ld.CHANGES["hybrid"]


@pytest.mark.parametrize("name", ["Swin, convolutional stem", "ConvNeXt, convolutional stem"])
def test_stemmed_models_start_with_the_stem_of_the_hybrid(name):
    torch.manual_seed(0)
    model = built(name).eval()
    layer, mirrored = model.whitening_layer()
    assert mirrored
    assert (layer.kernel_size, layer.out_channels) == ((2, 2), 24)
    whiten_first_layer(model, torch.randn(64, 3, 32, 32))
    images = torch.randn(3, 3, 24, 24)  # a smaller size, as in the first steps
    seen = []
    model.stages[0].register_forward_hook(lambda module, given, result: seen.append(given[0]))
    assert model(images).shape == (3, 10)
    assert seen[0].shape[2:] == (12, 12)
    stem = model.patch_embed if name.startswith("Swin") else model.stem[0]
    norm = model.patch_norm if name.startswith("Swin") else model.stem[1]
    tokens = stem.forward_map(images).permute(0, 2, 3, 1)
    expected = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias, norm.eps)
    assert torch.allclose(seen[0].permute(0, 2, 3, 1), expected, atol=1e-5)


def images(n=40, img_size=16):
    made = [make_mark(count, img_size, start=start) for count, start in ((n, 0), (12, 1000), (14, 2000))]
    return tuple(tr.loader_of(drawn.images, drawn.labels, drawn.class_names) for drawn in made)


SPEEDS = {name: 1000.0 for name in (*ld.RUNGS, "MAE")}
CHOSEN = dict(rate=dict(learning_rate=1e-3), teacher=dict(learning_rate=2e-3))


@pytest.mark.parametrize(("arm", "minutes"), [("ViT, mean pooling", [3]), (ld.LONG, [9]), (ld.TEACHER, [1.5, 1.5]),
                                              (ld.PRETRAINED, [1.5, 1.5])])
def test_ladder_divides_the_minutes(arm, minutes, monkeypatch):
    steps, model = [], built("ViT, mean pooling", 2, 16)

    def train_arm(arm, loader, n_steps, rate, seed, **options):
        steps.append((n_steps, arm.own_recipe().batch_size, loader.n_images))
        return model if arm is not ld.MAE else type("MAE", (), dict(encoder=lambda self: built(ld.PLAIN, 2, 16)))()

    monkeypatch.setattr(ld, "train_arm", train_arm)
    found = ld.Ladder().measure(Trial("ladder", arm, 1, 10), images(), SPEEDS, CHOSEN, 3, device="cpu")
    assert [n for n, _, _ in steps] == pytest.approx([60 * part * 1000 / min(size, n_images) for part, (
        _, size, n_images) in zip(minutes, steps, strict=True)], abs=1)
    n_images = {ld.TEACHER: [10, 40], ld.PRETRAINED: [40, 10]}.get(arm, [10])
    assert [n for _, _, n in steps] == n_images
    assert (found["minutes"], found["n_images"], found["n"]) == (max(3, sum(minutes)), 10, 14)


@pytest.mark.parametrize(("n_images", "n_steps"), [(4500, 468), (128, 468), (64, 937)])
def test_steps_of_a_minute_have_batches_of_at_most_all_images(n_images, n_steps):
    assert ld.steps_in(1, "ViT, mean pooling", SPEEDS, n_images) == n_steps


def test_ladder_chooses_on_validation_images(monkeypatch):
    """Of images(), 12 are validation images and 14 test images."""
    monkeypatch.setattr(ld, "train_arm", lambda *words, **options: built("ViT, mean pooling", 2, 16))
    for module in (ld, tr):
        monkeypatch.setattr(module, "count_correct", lambda model, loader, device: (loader.n_images - 10,
                                                                                     loader.n_images))
    found = ld.Ladder().measure(Trial("ladder", ld.PLAIN, 0, 10), images(), SPEEDS, {}, 3, device="cpu")
    assert set(found["rates"].values()) == {2 / 12}
    assert (found["correct"], found["n"]) == (4, 14)


def test_labelled_keeps_true_labels_and_predicts_the_others(monkeypatch):
    parts = images()
    teacher = built("ConvNet", 2, 16)
    monkeypatch.setattr(ld, "train_arm", lambda *words, **options: teacher)
    monkeypatch.setattr(ld, "predictions", lambda model, batch: torch.zeros(len(batch), dtype=torch.long))
    indices = tr.draw_indices(parts[0], 10, 0)
    loader = ld.labelled(parts[0], indices, 1, SPEEDS, 0, 1e-3)
    expected = torch.zeros(40, dtype=torch.long)
    expected[indices] = parts[0].labels[indices]
    assert torch.equal(loader.labels, expected)
    assert torch.equal(loader.images, parts[0].images)


def test_minutes_to_label_count_half_of_a_training_step():
    assert ld.minutes_to_label(45_000, dict(ConvNet=500.0)) == pytest.approx(0.75)


@pytest.mark.slow
def test_ladder_trains_every_arm():
    for arm in (*ld.RUNGS, *ld.BESIDE):
        found = ld.Ladder().measure(Trial("ladder", arm, 0, 20), images(), SPEEDS, CHOSEN, 1e-4, **ON_CPU)
        assert (found["arm"], found["n_steps"]) == (arm, 1)
        assert found["learning_rate"] == 1e-3


# ---- Findings


RATES = {"0.001": 0.7, "0.0005": 0.65}


def trials(levels, beside=()):
    found = [dict(arm=arm, seed=seed, n_images=number, correct=correct + 10 * seed, n=10_000, minutes=3, n_steps=9,
                  learning_rate=1e-3, rates=RATES if seed == 0 else {"0.001": 0.7}, parameters=5, flops=6e7)
             for arm, number, correct in ((arm, 100, correct) for arm, correct in levels.items()) for seed in SEEDS]
    return found + [dict(found[seed], arm=arm, n_images=number, correct=correct + 10 * seed)
                    for arm, number, correct in beside for seed in SEEDS]


LEVELS = dict(zip(ld.RUNGS, (6000, 6005, 7000, 7000, 6500, 7500, 7900), strict=True))
BESIDE = [(ld.TEACHER, 100, 6604), (ld.LONG, 100, 6010), (ld.PLAIN, 1000, 7800)]


def test_ladder_finding_separates_gains_losses_and_steps_that_buy_nothing():
    text = re.sub(r" ± \d\.\d", "", ld.Ladder().finding(trials(LEVELS, BESIDE)))
    assert text == (
        "Test accuracy with 100 images, in points over the network before. Gains: ViT, convolutional stem (+9.9); "
        "ConvNeXt, convolutional stem (+10.0); ConvNet (+4.0). Losses: Swin, convolutional stem (-5.0). No clear "
        "change: ViT, mean pooling (+0.1); hybrid (+0.0).\nSeveral steps at once. Gains: ViT, mean pooling → hybrid "
        "(+9.9); ViT, mean pooling → ConvNet (+18.9); hybrid → ConvNet (+9.0).\nIf the network stays (ViT, mean "
        "pooling), in points over it. Gains: labels from the ConvNet (+6.0); 1,000 labels (+17.9). No clear change: "
        "three times the minutes (+0.0).")
    assert "If the network stays" not in ld.Ladder().finding(trials(LEVELS))


def test_ladder_judges_no_step_without_two_networks_and_seeds():
    single = [trial for trial in trials(LEVELS) if trial["seed"] == 0]
    for few in (trials({"ConvNet": 6000}), single):
        assert "no step to compare" in ld.Ladder().finding(few)
        rungs = ld.Ladder().tables(few)[0][1]
        assert {row[-1] for row in rungs[1:]} == {""}
        assert not words_in(ld.Ladder().draw(few)["ladder"].axes[0]) & {"points", "change"}


def words_in(axes):
    return {word for text in axes.texts for word in text.get_text().split()}


def test_ladder_tables_and_figure_hold_every_arm():
    made = trials(LEVELS, BESIDE)
    rungs, across, beside, chosen = (rows for _, rows in ld.Ladder().tables(made))
    assert len(rungs) == 1 + len(ld.RUNGS)
    assert rungs[2][:3] == ["ViT, mean pooling", ld.CHANGES["ViT, mean pooling"], "60.0"]
    assert rungs[3][-1].startswith("+9.9 ± ")
    assert rungs[3][6] == len(SEEDS)
    assert [row[0] for row in beside[1:]] == [ld.PLAIN, ld.TEACHER, ld.LONG, "1,000 labels"]
    assert beside[1][2:5] == ["9", 3, "60.2% (60.1 to 60.2)"]
    assert beside[-1][1:-1] == ["more labels", "9", 3, "78.1% (78.0 to 78.2)"]
    assert beside[1][-1] == ""
    assert across[3][:2] == ["hybrid", "ConvNet"]
    assert across[3][2].startswith("+9.0 ± ")
    assert chosen[1] == ["ViT, CLS", "100", "65.0% at 0.0005; 70.0% at 0.001"]
    assert len(chosen) == 1 + len(LEVELS) + len(BESIDE)  # seed 0
    assert beside[-1][-1].startswith("+17.9 ± ")
    figure = ld.Ladder().draw(made)["ladder"]
    assert [len(axes.patches) for axes in figure.axes] == [7, 4]
    written = [[text.get_text().strip() for text in axes.texts] for axes in figure.axes]
    assert written[0][:5] == ["60.1", "60.2", "no clear change", "70.1", "+9.9 points"]
    assert written[1][:3] == ["60.2", "66.1", "+6.0 points"]
    assert figure.axes[1].get_yticklabels()[-1].get_text() == "1,000 labels"


def test_unfinished_ladder_does_not_show_few_labels_as_all():
    rows = ld.Ladder().tables(trials(LEVELS))[2][1]
    assert [row[0] for row in rows[1:]] == [ld.PLAIN]
    figure = ld.Ladder().draw(trials(LEVELS))["ladder"]
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["ViT,\nmean pooling"]
