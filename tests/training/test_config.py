import json
from dataclasses import FrozenInstanceError, asdict

import pytest
import torch

from vit_bridge.models.registry import MODELS, build_model
from vit_bridge.training.config import RECIPES, Recipe, choose_recipe
from vit_model import InputError


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_its_model_and_says_what_it_does(name):
    recipe = RECIPES[name]
    assert recipe.model is None or recipe.model in MODELS
    model = build_model(recipe.model or "vit_nano", n_classes=3, img_size=32, **recipe.options).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    text = recipe.describe()
    assert "\n" not in text
    assert f"batches of {recipe.batch_size}" in text
    assert f"{recipe.optimizer} at {recipe.learning_rate:g}" in text
    assert all(f"{option} {value}" in text for option, value in recipe.options.items())


@pytest.mark.parametrize(("arguments", "name"), [
    (("vit_nano", 32, 10.0), "vit_nano_fast"), (("convnet", 64, 2.0), "convnet_fast"),
    (("convnet", 32, 10.0), "convnet_wide"), (("hybrid", 28, 10.0), "classic"), (("hybrid", 32), "hybrid_fast"),
    (("convnet", 15, 2.0), "classic"), (("convnet", 12, 10.0), "convnet_wide"), (("convnet", 8), "classic"),
    (("vit_nano", 224, 10.0), "classic"), (("vit_tiny", 32, 10.0), "classic"), (("resnet18", 224), "classic"),
    (("convnet", 32), "convnet_wider"), (("convnet", 32, 10.0, "new", torch.bfloat16), "convnet_wider"),
    (("convnet", 32, 5.0, "new", torch.bfloat16), "convnet_wide"),
    (("convnet", 32, 2.0, "new", torch.bfloat16), "convnet_fast"),
    (("vit_nano", 32, 10.0, "pretrained"), "fine_tuning"), (("vit_nano", 32, 10.0, "head"), "classic")])
def test_the_recipe_fits_model_images_and_start(arguments, name):
    assert choose_recipe(*arguments) == name


def test_of_those_that_fit_the_one_for_most_minutes_is_chosen(monkeypatch):
    for minutes in (2, 30, 8):
        monkeypatch.setitem(RECIPES, f"m{minutes}", Recipe("vit_tiny", minutes=minutes))
    chosen = [choose_recipe("vit_tiny", 32, minutes) for minutes in (1, 2, 9.5, 31, None)]
    assert chosen == ["classic", "m2", "m8", "m30", "m30"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_was_saved_is_the_same(name):
    entries = asdict(RECIPES[name])
    assert Recipe.saved(entries) == Recipe.saved(json.loads(json.dumps(entries))) == RECIPES[name]


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].smallest > 1])
def test_the_smallest_images_of_a_recipe_and_their_smaller_ones_go_through_its_model(name):
    recipe = RECIPES[name]
    side = recipe.smallest
    model = build_model(recipe.model, n_classes=3, img_size=side, **recipe.options).eval()
    low = recipe.training(3, side)["low"]
    for size in (side, low[0] if low else side):
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 3)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        RECIPES["classic"].batch_size = 3


@pytest.mark.parametrize("arguments", [dict(optimizer="sgd"), dict(schedule="step"), dict(mixing="both")])
def test_a_wrong_recipe_is_named(arguments):
    (name, value), = arguments.items()
    with pytest.raises(InputError, match=f"{name} {value!r}"):
        Recipe(**arguments)
