import json
import math
import re
from dataclasses import FrozenInstanceError, asdict

import pytest
import torch

from vit_bridge.models.registry import MODELS, build_model
from vit_bridge.training.config import RECIPES, Recipe, TrainConfig, choose_recipe
from vit_bridge.training.run_folder import renamed
from vit_model import InputError


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_its_model_and_describes_itself(name):
    recipe = RECIPES[name]
    assert recipe.model is None or recipe.model in MODELS
    name = recipe.model or "vit_nano"
    labels = {} if MODELS[name].unlabelled else dict(n_classes=3)
    model = build_model(name, img_size=32, **labels, **recipe.model_options).eval()
    features = model.encoder() if MODELS[name].unlabelled else model
    assert features(torch.zeros(1, 3, 32, 32)).shape == (1, 3 if labels else model.n_features)
    text = recipe.describe()
    assert "\n" not in text
    assert f"batches of {recipe.batch_size}" in text
    assert f"{recipe.train.optimizer} at {recipe.train.learning_rate:g}" in text
    assert all(f"{option} {value}" in text for option, value in recipe.model_options.items())


@pytest.mark.parametrize(("arguments", "name"), [
    (("vit_nano", 32, 10.0), "vit_nano_fast"), (("convnet", 64, 2.0), "convnet_fast"),
    (("convnet", 32, 10.0), "convnet_wide"), (("hybrid", 28, 10.0), "classic"), (("hybrid", 32), "hybrid_fast"),
    (("convnet", 15, 2.0), "classic"), (("convnet", 12, 10.0), "convnet_wide"), (("convnet", 8), "classic"),
    (("vit_nano", 224, 10.0), "classic"), (("vit_tiny", 32, 10.0), "classic"), (("resnet18", 224), "classic"),
    (("convnet", 32), "convnet_wider"), (("convnet", 32, 10.0, "new", torch.bfloat16), "convnet_wider"),
    (("convnet", 32, 5.0, "new", torch.bfloat16), "convnet_wide"),
    (("convnet", 32, 2.0, "new", torch.bfloat16), "convnet_fast"),
    (("vit_nano", 32, 10.0, "pretrained"), "fine_tuning"), (("vit_nano", 32, 10.0, "head"), "classic")])
def test_choose_recipe_fits_model_images_and_start(arguments, name):
    assert choose_recipe(*arguments) == name


def test_choose_recipe_takes_the_longest_that_fits(monkeypatch):
    for minutes in (2, 30, 8):
        monkeypatch.setitem(RECIPES, f"m{minutes}", Recipe(model="vit_tiny", minutes=minutes))
    chosen = [choose_recipe("vit_tiny", 32, minutes) for minutes in (1, 2, 9.5, 31, None)]
    assert chosen == ["classic", "m2", "m8", "m30", "m30"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_a_round_trip_through_json(name):
    entries = asdict(RECIPES[name])
    assert Recipe.from_dict(entries) == Recipe.from_dict(json.loads(json.dumps(entries))) == RECIPES[name]


def test_recipe_reads_older_versions_and_refuses_unknown_entries():
    old = dict(model="convnet", small=True, minutes=0.0, smallest=16,
               options=dict(block="pooled", widths=[32, 64, 128]), batch_size=128, optimizer="muon",
               learning_rate=0.002, weight_decay=0.05, schedule="linear",
               label_smoothing=0.1, augmentation=dict(shift=0.125, flip="alternating", cutout=0.0), mixing="none",
               low=[0.75, 0.6], model_ema=None, whiten=True, command=RECIPES["convnet_fast"].command, expected="")
    assert Recipe.from_dict(renamed(old, "recipe")) == RECIPES["convnet_fast"]
    with pytest.raises(InputError, match=r"\Athis version does not support the recipe of this run [^\n]*colour"):
        Recipe.from_dict(renamed(old | dict(colour="blue"), "recipe"))


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].smallest > 1])
def test_recipe_smallest_images_fit_its_model(name):
    recipe = RECIPES[name]
    side = recipe.smallest
    model = build_model(recipe.model, n_classes=3, img_size=side, **recipe.model_options).eval()
    for size in ((side, side), recipe.train.image_size((side, side), 0, 100)):
        assert model(torch.zeros(1, 3, *size)).shape == (1, 3)


def test_recipe_is_immutable():
    with pytest.raises(FrozenInstanceError):
        RECIPES["classic"].batch_size = 3


@pytest.mark.parametrize(("name", "value"), [
    ("n_epochs", 0), ("n_epochs", 2.5), ("n_steps", 0), ("learning_rate", 0), ("learning_rate", math.nan),
    ("learning_rate", math.inf), ("weight_decay", -0.1), ("warmup_epochs", -1), ("seed", -1), ("optimizer", "sgd"),
    ("schedule", "step"), ("progressive_resize", (24, 0.6)), ("grad_accum_steps", 0), ("amp", "fp8")])
def test_train_config_refuses_bad_values(name, value):
    with pytest.raises(InputError, match=rf"\A{re.escape(f'{name} {value!r}')}[^\n]*\Z"):
        TrainConfig(**{name: value})


def test_recipe_refuses_an_unknown_mixing():
    with pytest.raises(InputError, match="mixing 'both'"):
        Recipe(mixing="both")


@pytest.mark.parametrize(("warmup_epochs", "expected"), [(None, 1), (0, 0), (0.5, 3), (2, 10), (99, 15)])
def test_train_config_warms_up_for_a_twentieth_or_as_asked(warmup_epochs, expected):
    assert TrainConfig(n_epochs=3, warmup_epochs=warmup_epochs).count_steps(5) == (15, expected)


def test_train_config_shrinks_early_images_to_a_multiple():
    config = TrainConfig(progressive_resize=(0.75, 0.6), resize_multiple=4)
    assert [config.image_size((32, 20), step, 10) for step in (0, 5, 6, 9)] == [(24, 16)] * 2 + [(32, 20)] * 2
    assert TrainConfig().image_size((32, 20), 0, 10) == (32, 20)
