"""Arms train by the recipes of train_vit.py, and learning rates are never those of a grid's edge."""

import pytest
import torch

from train_vit import NotFinite
from vit_bridge.compare import trials as tr
from vit_bridge.data.augmentation import Augmentation
from vit_bridge.data.shapes import make_mark
from vit_bridge.models.registry import build_model
from vit_bridge.system import write_json
from vit_bridge.training.config import RECIPES
from vit_model import InputError

ON_CPU = dict(device="cpu", amp="off")
TINY = tr.Arm("vit_nano_fast", dict(embed_dim=12, depth=1, n_heads=2))


def loader(n=24, img_size=16, start=0):
    drawn = make_mark(n, img_size, start=start)
    return tr.loader_of(drawn.images, drawn.labels, drawn.class_names)


# ---- Arms


def test_arm_changes_only_what_it_says():
    recipe = tr.Arm("hybrid_fast", dict(depth=1)).own_recipe()
    assert recipe.model_options == RECIPES["hybrid_fast"].model_options | dict(depth=1)
    assert recipe.train == RECIPES["hybrid_fast"].train
    assert recipe.augmentation == RECIPES["hybrid_fast"].augmentation
    plain = tr.Arm("hybrid_fast", augmentation=Augmentation(0.0), first_smaller=False).own_recipe()
    assert plain.train.progressive_resize is None
    assert tr.Arm("swin_nano_fast", first_smaller=(0.5, 0.6)).own_recipe().train.progressive_resize == (0.5, 0.6)
    assert plain.augmentation == Augmentation(0.0)


def test_train_arm_depends_only_on_its_seed():
    def weights(seed):
        state = torch.get_rng_state()
        model = tr.train_arm(TINY, loader(), 2, 1e-3, seed, **ON_CPU)
        assert torch.equal(state, torch.get_rng_state())
        return model.head.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_prepare_arm_trains_as_train_vit_does():
    images = loader()
    trainer = tr.prepare_arm(TINY, images, 5, **ON_CPU)
    recipe = RECIPES["vit_nano_fast"]
    assert (trainer.config.optimizer, trainer.config.progressive_resize) == ("muon", recipe.train.progressive_resize)
    assert (trainer.objective.loss_fn.label_smoothing, trainer.config.resize_multiple) == (recipe.label_smoothing, 4)
    assert (images.augmentation, images.seed, images.training) == (recipe.augmentation, 5, True)
    assert images.batch_size == recipe.batch_size
    filters = trainer.model.patch_embed.proj.weight.flatten(1)
    assert torch.allclose(filters[0] @ filters[1], torch.zeros(()), atol=1e-4)  # whitened: orthogonal


def test_train_arm_continues_from_a_start():
    start = build_model("vit_nano", n_classes=2, img_size=16, embed_dim=12, depth=1, n_heads=2)
    before = start.head.weight.clone()
    assert tr.train_arm(TINY, loader(), 1, 1e-3, 0, start=start, **ON_CPU) is start
    assert not torch.equal(before, start.head.weight)


# ---- Learning rates


@pytest.mark.parametrize(("scores", "best", "tried"), [
    ({1: 0.5, 2: 0.6, 4: 0.5}, 2, [1, 2, 4]),
    ({1: 0.5, 2: 0.6, 4: 0.7, 8: 0.8, 16: 0.1}, 8, [1, 2, 4, 8, 16]),
    ({1: 0.9, 2: 0.6, 4: 0.5, 0.5: 0.8}, 1, [1, 2, 4, 0.5]),
    ({1: 0.5, 2: 0.5, 4: 0.5, 0.5: 0.4}, 1, [1, 2, 4, 0.5])])  # of equally good ones, the first
def test_choose_rate_goes_on_beyond_the_edge(scores, best, tried):
    model, rate, found = tr.choose_rate(lambda rate: f"model {rate}", lambda model: scores[float(model[6:])], (1, 2, 4))
    assert (model, rate, list(found)) == (f"model {best}", best, tried)
    assert found == {rate: scores[rate] for rate in tried}


def test_choose_rate_does_not_search_for_a_given_rate():
    assert tr.choose_rate(lambda rate: rate, lambda model: 0.3, (2,)) == (2, 2, {2: 0.3})


def test_choose_rate_stops_a_grid_that_never_ends():
    _, rate, found = tr.choose_rate(lambda rate: rate, lambda rate: rate, (1, 2, 4))
    assert (rate, len(found)) == (2 ** (tr.MOST_RATES - 1), tr.MOST_RATES)


def test_choose_rate_counts_a_diverged_training_as_zero():
    def train(rate):
        if rate >= bad:
            raise NotFinite("the loss is NaN")
        return rate

    bad = 2
    assert tr.choose_rate(train, lambda rate: rate / 10, (1, 2, 4)) == (1, 1, {1: 0.1, 2: 0, 4: 0, 0.5: 0.05})
    bad = 0
    with pytest.raises(NotFinite):
        tr.choose_rate(train, lambda rate: rate, (1, 2, 4))


def test_rates_around_have_the_recipes_in_the_middle():
    assert tr.rates_around(tr.Arm("convnext_nano_fast")) == (8e-3, 4e-3, 16e-3)


# ---- Images


def test_draw_indices_depends_on_the_seed_and_part_of_takes_them():
    images = loader(40)
    first = tr.draw_indices(images, 10, 3)
    assert torch.equal(first, tr.draw_indices(images, 10, 3))
    assert not torch.equal(first, tr.draw_indices(images, 10, 4))
    part = tr.part_of(images, first)
    assert torch.equal(part.images, images.images[first])
    assert torch.equal(part.labels, images.labels[first])
    assert tr.part_of(images, labels=1 - images.labels).labels[0] == 1 - images.labels[0]


def test_count_correct_counts(monkeypatch):
    class First(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return torch.tensor([[1.0, 0.0]]).expand(len(images), 2) + self.weight

    images = loader(30)
    assert tr.count_correct(First(), images, "cpu") == (int((images.labels == 0).sum()), 30)


# ---- Files


def trial(**changes):
    result = dict(arm="ViT", seed=0, correct=3, n=4, n_images=8, n_steps=2, learning_rate=1e-3) | changes
    return dict(date="2026-01-01", command="python cnn_vs_vit.py", result=result)


@pytest.mark.parametrize("changes", [dict(correct=-1), dict(correct=[1, 2.5]), dict(n=0), dict(learning_rate=1),
                                     dict(correct=[3, 11]), dict(dataset=["x"]),
                                     dict(choices=dict(outline="1")), dict(arm=3), dict(seed=None)])
def test_read_trial_refuses_what_is_no_trial(changes, tmp_path):
    path = tmp_path / "data-ViT-0.json"
    write_json(trial(), path)
    assert tr.read_trial(path) == trial()
    write_json(trial(**changes), path)
    with pytest.raises(InputError, match=r"data-ViT-0.json is not a result of cnn_vs_vit.py --train"):
        tr.read_trial(path)


def test_read_trials_takes_the_folder_with_most_trials(tmp_path):
    for folder, n in (("a", 1), ("b", 2)):
        for seed in range(n):
            one = tr.Trial("reach", "ViT, large", seed)
            path = one.path(tmp_path / folder)
            path.parent.mkdir(exist_ok=True)
            write_json(trial(arm=folder, seed=seed), path)
    assert path.name == "reach-ViT-large-1.json"
    found = tr.read_trials(["reach", "cues"], [tmp_path / "a", tmp_path / "b"])
    assert [one["result"]["arm"] for one in found["reach"]] == ["b", "b"]
    assert found["cues"] == []
    (tmp_path / "b" / "reach-ViT-large-1 (1).json").write_text(path.read_text())
    with pytest.raises(InputError, match=r"reach-ViT-large-1 \(1\)\.json and reach-ViT-large-1\.json hold the same"):
        tr.read_trials(["reach"], [tmp_path / "b"])


def test_by_arm_keeps_the_order_and_needs_trials():
    trials = [dict(arm="b"), dict(arm="a"), dict(arm="b")]
    assert tr.by_arm(trials, ["a", "b", "c"]) == {"a": [trials[1]], "b": [trials[0], trials[2]]}
    with pytest.raises(InputError, match="no trials yet"):
        tr.by_arm([], ["a"])
