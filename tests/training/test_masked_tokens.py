"""MaskedTokens and its tokenizer: the loss against its definition, fixed masks, planted clusters, exact resume."""

import copy
import pickle
import re

import pytest
import timm
import torch
from torch import nn
from toy_training import Call, copy_of, same, through_a_file, toy_batches, train_quietly, without_times

from train_vit import Stopped, Trainer
from vit_bridge.models import BEiT, ConvNet, MaskedTokenModel, SwinTransformer, VisionTransformer
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.training.objectives import MaskedTokens, Metrics
from vit_bridge.training.tokenizer import PatchTokenizer, TeacherFeatures, k_means, nearest_centres
from vit_model import InputError

TINY = dict(img_size=8, patch_size=2, embed_dim=12, depth=2, n_heads=3)
OWN = Preprocessing(8, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), class_names=["a", "b", "c"])


def images_of(n=12, size=(8, 8), seed=3):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def tokenizer_of(n_tokens=9, features=None):
    images = torch.cat([images for images, _ in toy_batches(4)])
    return PatchTokenizer(n_tokens, 2, features=features).fit(images)


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    return MaskedTokenModel(**TINY | dict(n_tokens=9) | options)


def trainer_of(seed=0, objective=None, model=None, **settings):
    return Trainer(model or model_of(seed), "cpu", objective or MaskedTokens(tokenizer_of()), amp="off", **settings)


# ---- The objective ----------------------------------------------------------------------------------------


def test_masked_tokens_is_the_mean_cross_entropy_over_hidden_patches():
    model, objective, images, asked = model_of(), MaskedTokens(tokenizer_of(), 0.3).train(), images_of(5), []
    model.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[1]))
    metrics = objective.new_metrics(torch.device("cpu"))
    loss = objective(model, (images, torch.zeros(5)), metrics)
    (mask,) = asked
    assert mask.sum(dim=1).tolist() == [5] * 5  # of 16 patches
    logits, ids = model(images, mask).detach(), objective.tokenizer(images)
    losses, hits, counts = [], [], torch.zeros(9)
    for i, j in mask.nonzero().tolist():
        losses.append(-logits[i, j].double().log_softmax(dim=0)[ids[i, j]])
        hits.append(logits[i, j].argmax() == ids[i, j])
        counts[ids[i, j]] += 1
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    found = metrics.compute()
    assert found == pytest.approx(dict(loss=loss.item(), token_acc=torch.stack(hits).float().mean().item(),
                                       commonest=(counts.max() / 25).item()))


def test_visible_patches_have_no_part_in_the_loss():
    """The loss changes with the tokens of hidden patches alone."""
    model, objective, images = model_of(), MaskedTokens(tokenizer_of()).eval(), images_of(3)
    mask, ids = objective.hide(images, 0), objective.tokenizer(images)
    given = {}
    objective.tokenizer.forward = lambda images: given["ids"]
    for places, changes in ((~mask, False), (mask, True)):
        given["ids"] = ids
        before = objective(model, (images,)).item()
        given["ids"] = torch.where(places, (ids + 1) % 9, ids)
        assert (objective(model, (images,)).item() != before) == changes


def test_evaluations_hide_the_same_patches_whatever_the_batches():
    objective, images, asked = MaskedTokens(tokenizer_of()), images_of(10), []
    trainer = trainer_of(objective=objective)
    trainer.model.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[1]))
    torch.manual_seed(1)
    first = trainer.evaluate([(images,)])
    torch.manual_seed(2)
    again = trainer.evaluate([(images[:4],), (images[4:9],), (images[9:],)])
    assert torch.equal(asked[0], torch.cat(asked[1:]))
    assert asked[0].unique(dim=0).shape[0] > 5
    assert asked[0].sum(dim=1).tolist() == [6] * 10
    assert first == pytest.approx(again, rel=1e-5)
    objective.train()
    torch.manual_seed(1)
    drawn = [objective.hide(images, 0) for _ in range(2)]
    assert not torch.equal(*drawn)
    torch.manual_seed(1)
    assert torch.equal(objective.hide(images, 7), drawn[0])


def test_a_batch_in_parts_gives_the_same_loss():
    model, objective, images = model_of().eval(), MaskedTokens(tokenizer_of()).train(), images_of(9)
    torch.manual_seed(0)
    whole = objective(model, (images,)).item()
    torch.manual_seed(0)
    parts = sum(len(part) / 9 * objective(model, (part,)).item() for part in images.split(4))
    assert whole == pytest.approx(parts, rel=1e-5)


def test_a_few_steps_lower_the_loss_and_the_history_has_its_columns(capsys):
    trainer = trainer_of()
    before = copy_of(trainer.objective.tokenizer)
    history = train_quietly(trainer, toy_batches(4), toy_batches(2), n_epochs=12)
    assert tuple(history)[:5] == ("train_loss", "train_token_acc", "val_loss", "val_token_acc", "val_commonest")
    assert history["train_loss"][-1] < 0.9 * history["train_loss"][0]
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert history["val_token_acc"][-1] > history["val_commonest"][-1]
    assert len(set(history["val_commonest"])) == 1  # the same patches of the same images
    assert same(copy_of(trainer.objective.tokenizer), before)
    assert trainer.objective.best_epoch(history) == 1 + min(
        range(12), key=lambda i: (history["val_loss"][i], -i))
    shown = trainer.objective.describe({name: values[-1] for name, values in history.items()})
    assert re.fullmatch(r"train loss \d\.\d{3} token acc \d+\.\d%   val loss \d\.\d{3} token acc \d+\.\d% "
                        r"commonest \d+\.\d%", shown)


@pytest.mark.parametrize("settings", [{}, dict(grad_accum_steps=2, ema_decay=0.9), dict(optimizer="muon")])
def test_masked_tokens_resume_from_anywhere_as_if_never_cut(settings):
    whole, calls = trainer_of(0, **settings), Call()
    history = train_quietly(whole, toy_batches(2), toy_batches(1), n_steps=5, on_batch=calls)
    for n in range(calls.count):
        cut = trainer_of(0, **settings)
        with pytest.raises(Stopped) as stop:
            train_quietly(cut, toy_batches(2), toy_batches(1), n_steps=5, on_batch=Call(n))
        saved = through_a_file(stop.value.state.state_dict())
        again = trainer_of(99, **settings)
        found = train_quietly(again, toy_batches(2), toy_batches(1), n_steps=5, resume=saved)
        assert same(copy_of(again.model), copy_of(whole.model)), n
        assert without_times(found) == without_times(history), n


@pytest.mark.parametrize("shared_bias", [False, True])
def test_all_parameters_of_the_model_learn(shared_bias):
    trainer = trainer_of(model=model_of(shared_bias=shared_bias))
    before = copy_of(trainer.model)
    train_quietly(trainer, toy_batches(2), n_epochs=1)
    after = copy_of(trainer.model)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize(("make", "value"), [
    (lambda: MaskedTokens(tokenizer_of(), 0), "ratio 0 must lie between"),
    (lambda: MaskedTokens(tokenizer_of(), 1.0), "ratio 1.0 must lie between"),
    (lambda: MaskedTokens(PatchTokenizer(9, 2)), "all centres of the tokenizer are 0; fit it first"),
    (lambda: trainer_of(model=model_of(n_tokens=8)), "a MaskedTokenModel that predicts 8 tokens does not fit"),
    (lambda: trainer_of(model=BEiT(**TINY, n_classes=3)), "a BEiT that predicts 0 tokens does not fit"),
    (lambda: trainer_of(model=nn.Linear(3, 3)), "a Linear that predicts 0 tokens does not fit a tokenizer of 9"),
    (lambda: train_quietly(trainer_of(model=model_of(patch_size=4)), toy_batches(1), n_epochs=1),
     "the mask is torch.bool of (7, 16); expected torch.bool of (7, 4)")])
def test_masked_tokens_refuses_what_does_not_fit_in_one_line(make, value):
    with pytest.raises(InputError, match=rf"\A[^\n]*{re.escape(value)}[^\n]*\Z"):
        make()


def test_masked_tokens_refuses_other_logits_in_one_line():
    objective, images = MaskedTokens(tokenizer_of()), images_of(2)
    with pytest.raises(InputError, match=r"\Athe model returns logits of \(2, 3\); expected \(2, 16, 9\)[^\n]*\Z"):
        objective(lambda images, mask: torch.zeros(2, 3), (images,))


def test_metrics_of_several_processes_add_up():
    objective, images = MaskedTokens(tokenizer_of()).eval(), images_of(8)
    model = model_of()
    both = [objective.new_metrics(torch.device("cpu")) for _ in range(2)]
    for metrics, part in zip(both, images.split(4), strict=True):
        objective(model, (part,), metrics)
    merged = type(both[0])(torch.device("cpu"))
    states = [metrics.state_dict() for metrics in both]
    merged.load_state_dict({name: sum(state[name] for state in states) for name in states[0]})
    assert isinstance(merged, Metrics)
    values = merged.compute()
    assert values["loss"] == pytest.approx(sum(metrics.compute()["loss"] for metrics in both) / 2)
    tokens = sum(metrics.sums["tokens"] for metrics in both)
    assert values["commonest"] == pytest.approx((tokens.max() / tokens.sum()).item())
    assert tokens.sum() == 8 * 6


# ---- k-means ----------------------------------------------------------------------------------------------


def planted(n_clusters=12, width=5, each=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 20 * torch.randn(n_clusters, width, generator=generator)
    labels = torch.arange(n_clusters).repeat_interleave(each)
    points = centres[labels] + 0.1 * torch.randn(len(labels), width, generator=generator)
    order = torch.randperm(len(labels), generator=generator)
    return points[order], labels[order]


@pytest.mark.parametrize("seed", range(5))
def test_k_means_recovers_planted_clusters(seed):
    points, labels = planted(seed=seed)
    centres = k_means(points, 12, seed)
    ids, distances = nearest_centres(points, centres)
    assert len({(one, other) for one, other in zip(ids.tolist(), labels.tolist(), strict=True)}) == 12
    for i in range(12):
        torch.testing.assert_close(centres[i], points[ids == i].mean(dim=0), rtol=1e-4, atol=1e-4)
    assert torch.equal(k_means(points, 12, seed), centres)
    assert distances.max() < 1


def test_nearest_centres_are_those_of_the_definition():
    points, centres = torch.randn(40_000, 3), torch.randn(7, 3)
    distances = (points[:, None] - centres).square().sum(dim=2)  # (n, K)
    ids, found = nearest_centres(points, centres)
    assert (ids == distances.argmin(dim=1)).float().mean() > 0.9999
    torch.testing.assert_close(found, distances.min(dim=1).values, rtol=1e-4, atol=1e-4)


def test_k_means_loses_no_centre():
    """Started with a centre that is nearest to no point, as in a start with every centre in one place."""
    points, _ = planted(6, each=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "searchsorted", lambda sums, value, right: torch.zeros(1, dtype=torch.long))
        start = k_means(points, 6, n_rounds=0)
        assert len(start.unique(dim=0)) == 2
        centres = k_means(points, 6)
    assert torch.bincount(nearest_centres(points, centres)[0], minlength=6).min() > 0
    assert len(nearest_centres(points, centres)[0].unique()) == 6


def test_rounds_lower_the_squared_distances():
    points = torch.randn(3_000, 4, generator=torch.Generator().manual_seed(0))
    costs = [nearest_centres(points, k_means(points, 20, n_rounds=n))[1].mean().item() for n in (0, 1, 3, 10, 30)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.85 * costs[0]


# ---- The tokenizer ----------------------------------------------------------------------------------------


def painted(n_tokens=6, patch=(2, 4), grid=(3, 5), n=8):
    """Images whose patches are copies of a few pictures, and the number of each patch's picture."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(n_tokens, 3, *patch, generator=generator)
    labels = torch.randint(n_tokens, (n, *grid), generator=generator)
    images = pictures[labels].permute(0, 3, 1, 4, 2, 5).reshape(n, 3, grid[0] * patch[0], grid[1] * patch[1])
    return images, labels.flatten(1), pictures


def test_tokenizer_recovers_planted_patches_and_their_pictures():
    images, labels, pictures = painted()
    tokenizer = PatchTokenizer(6, (2, 4)).fit(images)
    ids = tokenizer(images)
    assert (ids.shape, ids.dtype) == ((8, 15), torch.long)
    names = {label: token for label, token in zip(labels.flatten().tolist(), ids.flatten().tolist(), strict=True)}
    assert sorted(names.values()) == list(range(6))
    assert torch.equal(torch.tensor([names[i] for i in range(6)])[labels], ids)
    for label, token in names.items():
        torch.testing.assert_close(tokenizer.pictures[token], pictures[label])
        torch.testing.assert_close(tokenizer.centres[token].view(3, 2, 4), pictures[label])


def test_perplexity_counts_tokens_in_use():
    tokenizer = PatchTokenizer(8, 2)
    assert tokenizer.perplexity(torch.arange(8).repeat(5).view(5, 8)) == pytest.approx(8)
    assert tokenizer.perplexity(torch.full((3, 4), 5)) == pytest.approx(1)
    assert tokenizer.perplexity(torch.tensor([[0, 0, 0, 1]])) == pytest.approx(4 / 3**0.75)


def features_of(teacher, size=8):
    teacher.preprocessing = Preprocessing(size, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), class_names=["a", "b", "c"])
    return TeacherFeatures(teacher, OWN)


TEACHERS = {
    "vit": lambda: VisionTransformer(8, 2, 3, 3, 12, 1, 3),
    "larger vit": lambda: VisionTransformer(12, 3, 3, 3, 12, 1, 3),
    "convnet": lambda: ConvNet(8, 3, 3, (5, 7), (1, 1), 1),
    "swin": lambda: SwinTransformer(8, 1, 3, 3, 6, (2, 1), (1, 2), 3)}


@pytest.mark.parametrize("name", TEACHERS)
def test_features_of_a_teacher_are_its_last_layers_and_have_unit_length(name):
    torch.manual_seed(0)
    teacher = TEACHERS[name]().train()
    features = features_of(teacher, 12 if name == "larger vit" else 8)
    before, images, kept = copy_of(teacher), images_of(3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = features(images, (2, 2))
    assert not kept  # a graph of the teacher would take the memory of a second training
    assert found.shape[:2] == (3, 16)
    torch.testing.assert_close(found.norm(dim=2), torch.ones(3, 16))
    assert not found.requires_grad
    assert same(copy_of(teacher), before)
    if "vit" in name:  # its grid is that of the tokens, so nothing is resampled
        with torch.no_grad():
            x = teacher.patch_embed(features.prepare(images))
            x = teacher.blocks[0](teacher.add_prefix(x, features.prepare(images).shape[2:]))[:, 1:]
        torch.testing.assert_close(found, nn.functional.normalize(x, dim=2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TEACHERS)
def test_tokens_of_a_teachers_features_train_a_model(name):
    torch.manual_seed(0)
    tokenizer = tokenizer_of(features=features_of(TEACHERS[name](), 12 if name == "larger vit" else 8))
    before = copy_of(tokenizer)
    trainer = trainer_of(objective=MaskedTokens(tokenizer))
    history = train_quietly(trainer, toy_batches(2), toy_batches(1), n_epochs=4)
    assert history["train_loss"][-1] < history["train_loss"][0]
    assert same(copy_of(tokenizer), before)
    images = images_of(4)
    ids, points = tokenizer(images), tokenizer.features(images, (2, 2))
    expected = torch.cdist(points.flatten(0, 1).double(), tokenizer.centres.double()).argmin(dim=1).view(4, 16)
    assert torch.equal(ids, expected)
    assert 1 <= tokenizer.perplexity(ids) <= 9


def test_tokenizer_of_features_draws_the_mean_pixels_of_each_token():
    torch.manual_seed(0)
    tokenizer = PatchTokenizer(5, 2, features=features_of(TEACHERS["vit"]()))
    images = images_of(6)
    ids = tokenizer.fit(images)(images)
    patches = images.unflatten(3, (4, 2)).unflatten(2, (4, 2)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    for token in ids.unique().tolist():
        torch.testing.assert_close(tokenizer.pictures[token], patches[ids == token].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_a_teacher_of_timm_describes_patches():
    torch.manual_seed(0)
    teacher = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=3)
    teacher.pretrained_cfg = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    assert tokenizer_of(features=TeacherFeatures(teacher, OWN))(images_of(2)).shape == (2, 16)


@pytest.mark.parametrize("described", [False, True])
def test_tokenizer_copies_and_a_saved_state_give_the_same_tokens(described):
    def new():
        torch.manual_seed(0)
        return PatchTokenizer(9, 2, features=features_of(TEACHERS["convnet"]()) if described else None)

    images = images_of(4)
    tokenizer = new().fit(images, seed=3)
    again = new()
    again.load_state_dict(through_a_file(tokenizer.state_dict()))
    for twin in (again, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer)), new().fit(images, seed=3)):
        assert torch.equal(twin(images), tokenizer(images))
        assert torch.equal(twin.pictures, tokenizer.pictures)
    assert not [p for p in tokenizer.parameters() if p.requires_grad]


def grey():
    model = ConvNet(8, 1, 3, (5,), (1,), 1)
    model.preprocessing = Preprocessing(8, (0.5,), (0.5,))
    return TeacherFeatures(model, OWN)


@pytest.mark.parametrize(("make", "value"), [
    (lambda: PatchTokenizer(1, 2), "n_tokens 1 is out of range"), (lambda: PatchTokenizer(8, 0), "patch_size 0"),
    (lambda: PatchTokenizer(33, 4).fit(images_of(8)), "32 patches are too few for 33 tokens"),
    (lambda: PatchTokenizer(4, 3).fit(images_of(8)), "img_size 8x8 is not divisible by patch_size 3x3"),
    (lambda: PatchTokenizer(4, 2, in_channels=1).fit(images_of(8)), "expected (B, 1, height, width)"),
    (lambda: TeacherFeatures(nn.Linear(3, 3), OWN), "the class Linear is not supported"),
    (grey, "the teacher's images have 1 channels, but those of the training have 3")])
def test_tokenizer_refuses_what_does_not_fit_in_one_line(make, value):
    with pytest.raises(InputError, match=rf"\A[^\n]*{re.escape(value)}[^\n]*\Z"):
        make()
