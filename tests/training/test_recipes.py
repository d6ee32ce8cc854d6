"""The training command and its recipes: which one is chosen, what overrides it, and that a run uses it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy_training import Calls

import train_vit
from train_vit import Trainer, _of_any_version, first_images, make_parser, parse
from vit_bridge.cli import script
from vit_bridge.data.augmentation import Augmentation, Mixing
from vit_bridge.data.datasets import DatasetInfo
from vit_bridge.data.loaders import MemoryLoader
from vit_bridge.inference import Mirrored
from vit_bridge.models.initialisation import whitening_filters
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.runtime import processes
from vit_bridge.training.config import RECIPES, TrainConfig
from vit_bridge.training.linear_probe import linear_classifier
from vit_bridge.training.objectives import Classification, ClassificationMetrics, CrossEntropy
from vit_model import VisionTransformer

QUICK = ["--dataset", "shapes", "--device", "cpu", "--dry-run"]


@pytest.fixture
def prepared(tmp_path):
    """Return a function from the words of a command to its Run, before the first step."""

    def prepare(*words):
        options = parse([*map(str, words), *QUICK, "--output-dir", str(tmp_path / "run")])
        del options.given
        with processes(options.device) as device:
            return train_vit.prepare(options, device)

    return prepare


@pytest.mark.parametrize(("words", "name"), [
    ([], "vit_nano_fast"), (["--model", "convnet"], "convnet_fast"), (["--model", "deit_nano"], "deit_nano_fast"),
    (["--model", "swin_nano"], "swin_nano_fast"), (["--model", "convnext_nano"], "convnext_nano_fast"),
    (["--recipe", "classic"], "classic"),
    (["--model", "hybrid", "--minutes", 10], "hybrid_fast"), (["--model", "vit_tiny"], "classic"),
    (["--pretrained", "vit_nano_shapes"], "fine_tuning"),
    (["--pretrained", "vit_nano_shapes", "--freeze-backbone"], "classic")])
def test_prepare_chooses_prints_and_applies_the_recipe(words, name, prepared, capsys):
    run = prepared(*words)
    printed = capsys.readouterr().out
    assert f"Recipe {name}: {run.recipe.describe()}" in printed
    assert re.search(rf"to repeat this run: .* --recipe {name}\b", printed)
    assert replace(run.recipe, augmentation=RECIPES[name].augmentation) == RECIPES[name]
    frozen = "--freeze-backbone" in words
    assert run.recipe.augmentation == (Augmentation(0.0, "none") if frozen else RECIPES[name].augmentation)
    assert run.train_loader.batch_size == run.val_loader.batch_size == RECIPES[name].batch_size
    for option, value in RECIPES[name].model_options.items():
        assert getattr(run.model.config, option) == value


def test_prepare_lets_given_options_override_the_recipe(prepared):
    run = prepared("--batch-size", 7, "--lr", 0.5, "--optimizer", "adamw", "--schedule", "cosine", "--shift", 0.25,
                   "--flip", "none", "--cutout", 0.5, "--mixing", "mixup",
                   "--label-smoothing", 0.2, "--weight-decay", 0,
                   "--model-ema", 0.5, "--patch-size", 8)
    assert isinstance(run.trainer.objective.mixing, Mixing)
    expected = TrainConfig(learning_rate=0.5, weight_decay=0.0, ema_decay=0.5, progressive_resize=(0.75, 0.6))
    assert run.recipe.train == expected
    assert run.trainer.config == replace(expected, seed=0, resize_multiple=8)
    assert run.train_loader.augmentation == Augmentation(0.25, "none", 0.5)
    assert (run.train_loader.batch_size, run.recipe.label_smoothing, run.model.config.patch_size) == (7, 0.2, 8)
    assert run.trainer.objective.loss_fn.label_smoothing == 0.2


def test_train_vit_refuses_an_unknown_recipe_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        script(lambda: train_vit.main(["--recipe", "soup"]))
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert "recipe 'soup' is unknown; the closest choices are" in error
    assert f"; list all {len(RECIPES)} with python train_vit.py --help" in error


@pytest.mark.parametrize("model", ["vit_nano", "hybrid", "convnet", "deit_nano", "swin_nano", "convnext_nano"])
def test_prepare_whitens_the_first_layer_with_training_images(model, prepared):
    run = prepared("--model", model)
    layer, _ = run.model.whitening_layer()
    filters = whitening_filters(first_images(run.train_loader, train_vit.WHITENED_BY), layer.kernel_size[0])
    n = min(len(filters), len(layer.weight))
    torch.testing.assert_close(layer.weight[:n], filters[:n])


def test_first_images_rounds_up_to_whole_batches():
    images = torch.randint(0, 256, (53, 3, 8, 8), dtype=torch.uint8)
    info = DatasetInfo("folder", Preprocessing(8, (0.5,) * 3, (0.5,) * 3, class_names=["a"]))
    loader = MemoryLoader(images, torch.zeros(53), info, 10, 0, True)
    assert [len(first_images(loader, n)) for n in (1, 20, 21, 999)] == [10, 20, 30, 53]


def test_of_any_version_keeps_what_an_older_run_used():
    old = dict(lr=None, batch_size=64, model="hybrid", pretrained=None, freeze_backbone=False)
    assert _of_any_version(old)["recipe"] == "classic"
    assert _of_any_version(old)["schedule"] is None
    assert _of_any_version(old)["batch_size"] == 64
    assert _of_any_version(old | dict(pretrained="a.pt"))["recipe"] == "fine_tuning"
    assert _of_any_version(old | dict(pretrained="a.pt", freeze_backbone=True))["recipe"] == "classic"
    newer = _of_any_version(dict(recipe="convnet_fast", seed=7))  # newer than recipes and older than --n-heads
    assert (newer["recipe"], newer["seed"], newer["n_heads"]) == ("convnet_fast", 7, None)
    assert newer.keys() == vars(make_parser().parse_args([])).keys()


@pytest.mark.slow
def test_train_vit_result_names_recipe_minutes_and_mirrored_accuracy(tmp_path):
    train_vit.main([*QUICK, "--minutes", "3", "--output-dir", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["recipe"], result["minutes"]) == ("vit_nano_fast", 3)
    assert 0 <= result["test_mirrored_acc"] <= 1


# ---- What recipes use --------------------------------------------------------------------------------------


def test_mirrored_averages_the_probabilities_of_both_views():
    torch.manual_seed(0)
    model, images = VisionTransformer(8, 4, 3, 5, 12, 1, 3), torch.randn(3, 3, 8, 8)
    both = (model(images).softmax(1) + model(images.flip(3)).softmax(1)) / 2
    torch.testing.assert_close(Mirrored(model)(images).exp(), both)
    torch.testing.assert_close(Mirrored(model)(images.flip(3)), Mirrored(model)(images))


def test_cross_entropy_weighs_soft_labels_by_their_shares():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    first, second = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 0, 2])
    shares = 0.3 * nn.functional.one_hot(first, 3) + 0.7 * nn.functional.one_hot(second, 3)
    expected = 0.3 * CrossEntropy()(logits, first) + 0.7 * CrossEntropy()(logits, second)
    torch.testing.assert_close(CrossEntropy()(logits, shares), expected)
    weighted, weights = CrossEntropy(class_weights=[1, 5, 2])(logits, shares), torch.tensor([1.0, 5.0, 2.0])
    losses = -(shares * logits.log_softmax(1)).sum(1) * (shares @ weights)
    torch.testing.assert_close(weighted, losses.mean())


def test_classification_metrics_judge_mixed_images_by_their_larger_part():
    metrics = ClassificationMetrics(torch.device("cpu"))
    metrics.update(torch.tensor(1.0), torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([[0.6, 0.4], [0.4, 0.6]]))
    assert metrics.compute() == dict(loss=1.0, acc=0.5, balanced_acc=0.5, correct=1, n=2)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_trainer_with_mixing_resumes_as_if_never_cut(kind):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(7, 3, 8, 8, generator=generator), torch.randint(3, (7,), generator=generator))
               for _ in range(3)]
    run = dict(n_steps=6, seed=3, progress=False)
    ends, states = [], []
    for resume in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(VisionTransformer(8, 4, 3, 3, 12, 1, 3), "cpu", Classification(mixing=Mixing(kind, 3)))
        trainer.train(batches, callbacks=[Calls(on_epoch=lambda state: states.append(state.state_dict()))],
                      resume=states[0] if resume else None, **run)
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    torch.manual_seed(0)
    plain = Trainer(VisionTransformer(8, 4, 3, 3, 12, 1, 3), "cpu")
    plain.train(batches, **run)
    assert not torch.equal(plain.model.head.weight, ends[0]["head.weight"])


@pytest.mark.parametrize(("words", "side"), [
    (["--recipe", "vit_nano_fast"], 24),
    (["--pretrained", "vit_nano_shapes", "--recipe", "vit_nano_fast"], 24),
    (["--pretrained", "vit_nano_shapes", "--freeze-backbone", "--recipe", "vit_nano_fast", "--mixing", "mixup"], 32),
    (["--model", "hybrid"], 24), (["--model", "deit_nano"], 24), (["--model", "convnext_nano"], 24),
    (["--model", "swin_nano"], 32), (["--patch-size", 16], 32)])
def test_prepare_chooses_a_smaller_size_the_patch_divides(words, side, prepared):
    run = prepared(*words)
    assert run.trainer.config.image_size((32, 32), 0, 10) == (side, side)
    assert run.trainer.objective.mixing is None
    run.trainer.train(run.loaders[0], n_steps=1, progress=False)


@pytest.mark.slow
def test_linear_classifier_learns_from_unaugmented_images(tmp_path, capsys, monkeypatch):
    seen, learn = [], linear_classifier

    def watched(train_loader, *loaders):
        seen.append(torch.cat([images for images, _ in train_loader]))
        return learn(train_loader, *loaders)

    monkeypatch.setattr(train_vit, "linear_classifier", watched)
    for i, words in enumerate((["--cutout", "2", "--shift", "0.5"], ["--cutout", "0", "--shift", "0"])):
        train_vit.main([*QUICK, *words, "--model", "convnet", "--output-dir", str(tmp_path / str(i))])
    assert torch.equal(*seen)
    assert seen[0].abs().sum() > 0
    printed = capsys.readouterr().out
    assert re.search(r"Trained in \d+ s. Best validation accuracy [\d.]+% in epoch 1 of 1\.\nTesting the best", printed)
    assert re.search(r"averaged: [\d.]+%\. `predict` does not average them\.", printed)
    assert "without attention.png: this model has no attention" in printed
