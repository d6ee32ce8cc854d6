"""The Trainer: its steps, losses and averages, its reports, and what can go wrong."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from command_runs import ROOT
from torch import nn
from toy_training import (
    TINY,
    Call,
    assert_close,
    copy_of,
    same,
    small_net,
    toy_batches,
    toy_trainer,
    train_quietly,
)

import train_vit
from train_vit import NotFinite, Trainer, _set_train_mode, steps_within
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.deit import DistilledViT
from vit_bridge.runtime import check_compiler, choose_device, choose_precision
from vit_bridge.training.objectives import Classification, CrossEntropy, balancing_weights
from vit_bridge.training.optimizers import learning_rate_at
from vit_model import InputError, VisionTransformer, freeze_backbone


def test_trainer_history_has_one_entry_per_epoch():
    history = toy_trainer().train(toy_batches(), toy_batches(2), n_epochs=3, learning_rate=1e-3)
    assert tuple(history) == ("train_loss", "train_acc", "val_loss", "val_acc", "val_balanced_acc", "lr",
                                         "seconds", "images_per_second")
    assert {len(values) for values in history.values()} == {3}
    assert all(0 <= share <= 1 for share in history["train_acc"] + history["val_acc"] + history["val_balanced_acc"])


def test_trainer_learns_a_toy_task():
    history = toy_trainer().train(toy_batches(), toy_batches(), n_epochs=11, learning_rate=1e-2)
    assert history["val_acc"][-1] == 1.0


def test_trainer_repeats_itself_with_the_same_seed():
    weights = []
    for seed in (0, 0, 1):
        trainer = toy_trainer(seed)
        trainer.train(toy_batches(), n_epochs=1)
        weights.append(trainer.model.head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_trainer_history_is_nan_without_validation():
    history = toy_trainer().train(toy_batches(), n_epochs=1)
    assert all(math.isnan(history[name][0]) for name in ("val_loss", "val_acc", "val_balanced_acc"))


def test_trainer_stops_after_n_steps_inside_an_epoch():
    trainer = toy_trainer()
    trainer.train(toy_batches(1), n_epochs=1)
    history = trainer.train(toy_batches(5), n_steps=7)
    assert len(history["lr"]) == 2  # five steps, then two


def test_trainer_step_is_adamw_on_the_clipped_gradient():
    torch.manual_seed(0)
    model, by_hand = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    by_hand.load_state_dict(model.state_dict())
    (images, labels), = toy_batches(1)
    Trainer(model, "cpu", loss_fn=nn.CrossEntropyLoss(), clip_norm=0.01).train(
        [(images, labels)], n_epochs=1, learning_rate=0.1, weight_decay=0.5, warmup_epochs=0)
    nn.functional.cross_entropy(by_hand(images), labels).backward()
    norm = torch.cat([p.grad.flatten() for p in by_hand.parameters()]).norm()
    for name, p in by_hand.named_parameters():
        gradient = p.grad * 0.01 / (norm + 1e-6)
        decay = 0.5 if p.ndim == 2 else 0.0
        expected = p * (1 - 0.1 * decay) - 0.1 * gradient / (gradient.abs() + 1e-8)  # Adam's first step is a sign
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-5, atol=1e-6)


def test_trainer_leaves_a_frozen_backbone_and_its_statistics():
    model = freeze_backbone(ConvNet(8, 3, 3, (5,), (1,), 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Trainer(model, "cpu").train(toy_batches(), n_epochs=1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_set_train_mode_skips_frozen_modules():
    model = VisionTransformer(**TINY, dropout=0.1)
    _set_train_mode(model)
    assert all(module.training for module in model.modules())
    model.patch_embed.requires_grad_(False)  # like whitened filters
    _set_train_mode(model)
    assert {name for name, module in model.named_children() if not module.training} == {"patch_embed"}
    _set_train_mode(freeze_backbone(model))
    assert {name for name, module in model.named_children() if module.training} == {"head"}
    _set_train_mode(freeze_backbone(distilled := DistilledViT(**TINY, dropout=0.1)))
    assert {name for name, module in distilled.named_children() if module.training} == {"head", "head_dist"}
    for n_frozen, training in ((2, {1, 2, 3, 4}), (3, {4})):
        layers = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.1), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 7))
        layers[:n_frozen].requires_grad_(False)
        _set_train_mode(layers)
        assert {i for i, layer in enumerate(layers) if layer.training} == training


def test_evaluate_counts_every_image_once_and_restores_the_mode():
    trainer = toy_trainer()
    trainer.model.train()
    batches = [*toy_batches(2, 7), *toy_batches(1, 3)]
    score = trainer.evaluate(batches)
    trainer.model.eval()
    logits = torch.cat([trainer.model(images) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert (score["n"], score["correct"]) == (17, int((logits.argmax(1) == labels).sum()))
    assert score["acc"] == pytest.approx(score["correct"] / 17)
    assert score["loss"] == pytest.approx(trainer.objective.loss_fn(logits, labels).item(), rel=1e-5)
    trainer.model.train()
    trainer.evaluate(batches)
    assert trainer.model.training


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_follows_float32(amp):
    """fp16 uses the gradient scaler, on the CPU as on CUDA; it may skip the first steps to find its scale."""
    losses = {}
    for precision in ("off", amp):
        trainer = toy_trainer(amp=precision)
        losses[precision] = trainer.train(toy_batches(1), n_epochs=12, learning_rate=1e-2)["train_loss"]
        assert trainer.model.head.weight.dtype == torch.float32
    assert losses[amp][0] == pytest.approx(losses["off"][0], rel=0.01)  # before any step
    assert losses[amp][0] != losses["off"][0]
    assert losses[amp][-1] < 0.7 * losses[amp][0]


def test_choose_precision_uses_bf16_only_on_capable_cpus(monkeypatch):
    for abilities, expected in (({}, None), (dict(amx_bf16=True), torch.bfloat16),
                                (dict(avx512_bf16=True), torch.bfloat16), (dict(amx_bf16=False), None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=abilities: found, raising=False)
        assert choose_precision("auto", torch.device("cpu")) == expected


class Clock:
    """A clock that only the loaders advance."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Slow:
    """Batches that take a number of seconds on that clock."""

    def __init__(self, clock, batches, seconds):
        self.clock, self.batches, self.seconds = clock, batches, seconds

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.clock.now += self.seconds
            yield batch


def test_steps_within_fills_the_time_and_keeps_the_model(monkeypatch):
    """Measuring takes 1 + 1 steps and one batch of an evaluation, 2.5 seconds. An epoch takes 5 + 1 seconds.

    The other 40.5 seconds have room for 6 epochs, then 3 steps and an evaluation.
    """
    clock, trainer = Clock(), toy_trainer()
    monkeypatch.setattr("train_vit.time", clock)
    train_loader, val_loader = Slow(clock, toy_batches(5), 1.0), Slow(clock, toy_batches(2), 0.5)
    before = copy_of(trainer.model)
    assert steps_within(43.0, trainer.model, train_loader, val_loader, device="cpu") == 6 * 5 + 3
    assert same(copy_of(trainer.model), before)
    assert clock.now == 2.5
    train_quietly(trainer, train_loader, val_loader, n_steps=6 * 5 + 3)
    assert clock.now == 42.5
    assert steps_within(3.0, trainer.model, train_loader, val_loader, device="cpu") == 1


def test_trainer_stops_on_nan_validation_before_saving():
    kept, trainer = [], toy_trainer()
    with pytest.raises(NotFinite, match=r"validation loss is nan after step 1 of 3, learning rate 1e\+30;"):
        train_quietly(trainer, toy_batches(1), toy_batches(2), n_steps=3, learning_rate=1e30, warmup_epochs=0,
                      on_epoch=kept.append)
    assert kept == []


def test_on_save_runs_by_the_clock_with_a_resumable_state(monkeypatch):
    clock, states = Clock(), []
    monkeypatch.setattr("train_vit.time", clock)
    loader = Slow(clock, toy_batches(5), 1.0)
    whole, cut = toy_trainer(), toy_trainer(1)
    train_quietly(whole, loader, n_epochs=2, seed=0, save_every=2.5, on_save=lambda state: states.append(
        state.state_dict()))
    assert [state["step"] for state in states] == [2, 5, 8]  # after fetching 3, 6 and 9 batches
    train_quietly(cut, loader, n_epochs=2, seed=0, resume=states[1])
    assert same(copy_of(cut.model), copy_of(whole.model))


@pytest.mark.parametrize(("numbers", "value"), [
    (dict(n_epochs=0), "n_epochs 0"), (dict(n_steps=0), "n_steps 0"), (dict(n_epochs=1.5), "n_epochs 1.5"),
    (dict(learning_rate=math.nan), "learning_rate nan"), (dict(learning_rate=0), "learning_rate 0"),
    (dict(learning_rate=math.inf), "learning_rate inf"), (dict(weight_decay=-1), "weight_decay -1"),
    (dict(warmup_epochs=-1), "warmup_epochs -1")])
def test_trainer_refuses_nonsense_numbers(numbers, value):
    with pytest.raises(InputError, match=rf"\A{value} is out of range; [^\n]*\Z"):
        toy_trainer().train(toy_batches(), **numbers)


def test_trainer_names_labels_past_the_head():
    images, labels = toy_batches(1)[0]
    with pytest.raises(InputError, match="label 5 is out of range for a model with 3 classes"):
        toy_trainer().train([(images, labels.clamp(min=2) + 3)], n_epochs=1)


def test_trainer_refuses_a_loss_function_as_its_objective():
    with pytest.raises(InputError, match="CrossEntropyLoss is not an Objective"):
        Trainer(small_net(), "cpu", nn.CrossEntropyLoss())


def test_trainer_refuses_a_loader_without_images():
    with pytest.raises(InputError, match="yielded no images"):
        toy_trainer().train([], n_steps=3)


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99"])
def test_choose_device_refuses_impossible_devices(device):
    with pytest.raises(InputError, match=rf"\Adevice '{device}' is [^\n]*\Z"):
        choose_device(device)


def test_trainer_refuses_cuda_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("CUDA is there")
    with pytest.raises(InputError, match="'cuda' is not available"):
        Trainer(VisionTransformer(**TINY), device="cuda")


# ---- The loss, the average, the groups --------------------------------------------------------------------


def test_cross_entropy_with_class_weights_divides_by_image_count():
    logits, labels = torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [0.0, math.log(7)]]), torch.tensor([1, 0, 0])
    expected = (2 * -math.log(3 / 4) + 5 * math.log(2) + 5 * math.log(8)) / 3
    assert CrossEntropy(class_weights=[5, 2])(logits, labels).item() == pytest.approx(expected)


def test_cross_entropy_of_parts_adds_up_to_the_whole():
    loss_fn = CrossEntropy(0.1, class_weights=[5, 0.5, 2])
    logits, labels = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 2, 0, 1, 1])
    parts = sum(len(part) * loss_fn(logits[part], labels[part]) for part in torch.arange(7).split(3))
    torch.testing.assert_close(parts / 7, loss_fn(logits, labels))


def test_cross_entropy_without_class_weights_matches_torch():
    logits, labels = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 2, 0, 1, 1])
    torch.testing.assert_close(CrossEntropy(0.1)(logits, labels),
                               F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_cross_entropy_weighs_smoothing_by_the_label_alone():
    """Otherwise the best prediction for an image of a common class would be the rarest class."""
    logits, weights = torch.tensor([[3.0, 0.0, 1.0]]), [0.37, 3.7, 25.0]
    for label in range(3):
        alone = F.cross_entropy(logits, torch.tensor([label]), label_smoothing=0.1)
        torch.testing.assert_close(CrossEntropy(0.1, weights)(logits, torch.tensor([label])), weights[label] * alone)


def test_balancing_weights_let_all_classes_count_alike():
    assert balancing_weights([2, 3, 7]) == [12 / 6, 12 / 9, 12 / 21]
    assert sum(n * weight for n, weight in zip([2, 3, 7], balancing_weights([2, 3, 7]), strict=True)) / 12 == \
        pytest.approx(1)
    assert balancing_weights([5, 0, 2]) == [7 / 15, 0.0, 7 / 6]


def test_trainer_average_follows_every_step():
    torch.manual_seed(0)
    trainer, weights = Trainer(small_net(), "cpu"), []
    train_quietly(trainer, toy_batches(5), n_epochs=1, ema_decay=0.25,
                  on_batch=lambda state: weights.append(copy_of(state.model)))
    expected = weights[0]
    for step, now in enumerate(weights[1:]):
        kept = min(0.25, (1 + step) / (10 + step))
        expected = {name: kept * value + (1 - kept) * now[name] for name, value in expected.items()}
    assert len(weights) == 6
    assert_close(trainer.average.state_dict(), expected, 1e-6)


def test_trainer_evaluates_and_hands_on_the_average():
    trainer, trained = toy_trainer(), []
    history = train_quietly(trainer, toy_batches(), toy_batches(2), n_epochs=2, ema_decay=0.9,
                            on_epoch=lambda state: trained.append(state.trained))
    assert trained == [trainer.average] * 2
    assert history["val_loss"][-1] == trainer.evaluate(toy_batches(2), trainer.average)["loss"]
    assert history["val_loss"][-1] != trainer.evaluate(toy_batches(2))["loss"]
    train_quietly(trainer, toy_batches(2), n_epochs=1, on_epoch=lambda state: trained.append(state.trained))
    assert (trainer.average, trained[-1]) == (None, trainer.model)


def test_evaluate_averages_balanced_accuracy_over_classes_with_images():
    predicted, labels = torch.tensor([0, 0, 0, 1, 2, 1, 3, 3]), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    predicted, labels = torch.cat([predicted, torch.tensor([1, 1])]), torch.cat([labels, torch.tensor([3, 3])])
    logits = F.one_hot(predicted, 4).float()  # a model that returns its images
    score = Trainer(nn.Flatten(), "cpu").evaluate(list(zip(logits.split(3), labels.split(3), strict=True)))
    assert (score["n"], score["correct"], score["acc"]) == (10, 4, 0.4)
    assert score["balanced_acc"] == pytest.approx((3 / 5 + 1 / 3 + 0 / 2) / 3)  # class 2 has no images


def test_trainer_lr_scales_multiply_the_step_length():
    torch.manual_seed(0)
    trainer, factors = Trainer(small_net(), "cpu"), {"1.weight": 0.5, "1.bias": 0.0}
    before, rates = copy_of(trainer.model), []
    train_quietly(trainer, toy_batches(1), n_epochs=1, weight_decay=0.0, warmup_epochs=0, lr_scales=factors,
                  on_epoch=lambda state: rates.extend(group["lr"] for group in state.optimizer.param_groups))
    assert sorted(rates) == [0.0, 0.005, 0.01, 0.01]
    for name, p in trainer.model.named_parameters():  # Adam's first step is as long as the learning rate
        longest = (p - before[name]).abs().max().item()
        assert longest == pytest.approx(0.01 * factors.get(name, 1), rel=1e-3)


# ---- What it tells ----------------------------------------------------------------------------------------


class Epochs:
    """Five batches of a loader that records set_epoch() and has no set_position()."""
    batch_size = 7

    def __init__(self):
        self.calls = []

    def __len__(self):
        return 5

    def __iter__(self):
        return iter(toy_batches(5))

    def set_epoch(self, epoch):
        self.calls.append(("epoch", epoch))


class Positions(Epochs):
    """A Loader that records its positions."""

    def to(self, device):
        self.calls.append(("to", device.type))
        return self

    def set_position(self, epoch, batch=0):
        self.calls.append(("position", epoch, batch))

    def set_shard(self, rank, world_size):
        self.calls.append(("shard", rank, world_size))


@pytest.mark.parametrize(("kind", "expected"), [
    (Epochs, [("epoch", 0), ("epoch", 1)]),
    (Positions, [("to", "cpu"), ("shard", 0, 1), ("position", 0, 0), ("position", 1, 0)])])
def test_trainer_tells_a_loader_device_shard_and_position(kind, expected):
    loader = kind()
    train_quietly(Trainer(small_net(), "cpu"), loader, n_epochs=2)
    assert loader.calls == expected


def test_on_epoch_sees_the_history_so_far():
    seen = []
    history = train_quietly(toy_trainer(), toy_batches(), n_epochs=3,
                            on_epoch=lambda state: seen.append((state.step, list(state.history["lr"]))))
    assert seen == [(5 * n, history["lr"][:n]) for n in (1, 2, 3)]


def test_trainer_reports_seconds_speed_and_data_share():
    trainer = toy_trainer()
    history = train_quietly(trainer, toy_batches(), n_epochs=2)
    assert 0 < trainer.data_share < 0.5
    for seconds, speed in zip(history["seconds"], history["images_per_second"], strict=True):
        assert seconds * speed == pytest.approx(35)


# ---- What can go wrong ------------------------------------------------------------------------------------


def batches_with_nan_at(step, n_batches=5):
    batches = toy_batches(n_batches)
    batches[step] = (batches[step][0] * 1e38, batches[step][1])  # finite numbers whose sums overflow
    return batches


def test_trainer_stops_on_nan_with_the_weights_before_it():
    torch.manual_seed(0)
    trainer, weights = Trainer(small_net(), "cpu", amp="off"), []
    rate = learning_rate_at(2, 10, 5, 0.5)
    with pytest.raises(NotFinite, match=rf"\Athe loss or its gradient became NaN or infinite in step 3 of 10, at "
                                        rf"learning rate {rate:.3g}; [^\n]*\Z"):
        train_quietly(trainer, batches_with_nan_at(2), n_epochs=2, learning_rate=0.5, warmup_epochs=1, ema_decay=0.5,
                      on_batch=lambda state: weights.append((copy_of(state.model), copy_of(state.average))))
    assert len(weights) == 3
    assert same(copy_of(trainer.model), weights[2][0])
    assert not same(weights[1][0], weights[2][0])
    assert all(value.isfinite().all() for value in weights[2][1].values())


def test_trainer_stops_on_an_infinite_gradient():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, images):
            return self.weight.sqrt() + images.flatten(1)[:, :3]  # the slope at 0 is infinite, the value is not

    with pytest.raises(NotFinite, match="in step 1 of 2,"):
        train_quietly(Trainer(Root(), "cpu", amp="off"), toy_batches(2), n_epochs=1)


def test_trainer_skips_an_fp16_overflow_and_goes_on():
    torch.manual_seed(0)
    trainer, seen = Trainer(small_net(), "cpu", amp="fp16"), []
    history = train_quietly(trainer, batches_with_nan_at(2), n_epochs=1, on_batch=lambda state: seen.append(
        (copy_of(state.model), state.scaler.get_scale(), state.is_finite())))
    assert same(seen[2][0], seen[3][0])
    assert seen[3][1] == seen[2][1] / 2
    assert [sound for _, _, sound in seen[2:]] == [True, False, True, True]
    assert not same(seen[3][0], seen[4][0])
    assert math.isfinite(history["train_loss"][0])


def test_trainer_gives_up_on_endless_fp16_overflow():
    trainer, calls = Trainer(small_net(), "cpu", amp="fp16"), Call()
    with pytest.raises(NotFinite, match="in step 1 of 999,"):
        train_quietly(trainer, batches_with_nan_at(0, 1), n_steps=999, on_batch=calls)
    assert calls.count <= 2 * 18  # before a step, and before the end of its epoch; 2 ** 16 halved 17 times is below 1


class DoublingScaler:
    """A gradient scaler whose scales are powers of two: without rounding errors it must change nothing."""

    def __init__(self, *words, enabled=True):
        self.unscaled = False

    def scale(self, loss):
        self.unscaled = False
        return 1024 * loss

    def unscale_(self, optimizer):
        assert not self.unscaled
        self.unscaled = True
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad /= 1024

    def step(self, optimizer):
        if not self.unscaled:
            self.unscale_(optimizer)
        optimizer.step()

    def update(self):
        pass

    def is_enabled(self):
        return False


@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 1e9])
def test_trainer_clips_the_gradients_that_the_scaler_gives_back(clip_norm, monkeypatch):
    """Clipping must follow unscaling: a scaled gradient always looks too long."""
    weights = []
    for scaler in (torch.amp.GradScaler, DoublingScaler):
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)
        torch.manual_seed(0)
        trainer = Trainer(small_net(), "cpu", amp="off", clip_norm=clip_norm)
        train_quietly(trainer, toy_batches(4), n_epochs=1)
        weights.append(copy_of(trainer.model))
    assert same(*weights)


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.head, self.error = nn.Linear(1, 3), error

    def forward(self, images):
        raise self.error


NO_MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
             RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes"),
             RuntimeError("MPS backend out of memory")]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_trainer_out_of_memory_names_the_batch_and_remedy(error):
    for n_parts in (1, 3):
        trainer = Trainer(Failing(error), "cpu", grad_accum_steps=n_parts)
        with pytest.raises(InputError, match=r"\Aout of memory on cpu with a batch of 7 images[^\n]*\Z") as caught:
            train_quietly(trainer, toy_batches(1), n_epochs=1)
        assert f"try --grad-accum-steps {2 * n_parts} " in str(caught.value)
        assert caught.value.__cause__ is error
        with pytest.raises(InputError, match="batch of 7 images; try a smaller batch size"):
            trainer.evaluate(toy_batches(1))


def test_trainer_passes_other_errors_untouched():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    trainer = Trainer(Failing(error), "cpu")
    for call in (trainer.evaluate, lambda batches: train_quietly(trainer, batches)):
        with pytest.raises(RuntimeError) as caught:
            call(toy_batches(1))
        assert caught.value is error


def test_trainer_skips_an_empty_batch_but_counts_the_step():
    torch.manual_seed(0)
    trainer, weights, batches = Trainer(small_net(), "cpu"), [], toy_batches(5)
    batches[2] = (torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64))
    history = train_quietly(trainer, batches, [batches[2], *toy_batches(2)], n_epochs=1,
                            on_batch=lambda state: weights.append((state.step, copy_of(state.model))))
    assert [step for step, _ in weights] == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    assert same(weights[2][1], weights[3][1])
    assert not same(weights[3][1], weights[4][1])
    assert history["seconds"][0] * history["images_per_second"][0] == pytest.approx(28)
    assert math.isfinite(history["val_loss"][0])


def test_evaluate_refuses_a_loader_without_images():
    with pytest.raises(InputError, match="yielded no images to evaluate"):
        toy_trainer().evaluate([(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64))])


# ---- Through the compiler ---------------------------------------------------------------------------------


def test_trainer_compiles_training_but_not_evaluation(monkeypatch):
    torch.manual_seed(0)
    sizes, model = [], small_net()

    def compile_module(module):
        assert module is model
        return lambda images: (sizes.append(len(images)), module(images))[1]

    monkeypatch.setattr(torch, "compile", compile_module)
    monkeypatch.setattr(train_vit, "check_compiler", lambda device_type: None)
    train_quietly(Trainer(model, "cpu", compile=True, grad_accum_steps=2), toy_batches(2, 7), toy_batches(1, 5),
                  n_epochs=1)
    assert sizes == [4, 3, 4, 3]


def no_compiler(function):
    def fail(*args):
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found\n\nmore")
    return fail


def test_training_without_a_compiler_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    check_compiler.cache_clear()
    monkeypatch.setattr(torch, "compile", no_compiler)
    words = r"\Atorch.compile does not work here \(InvalidCxxCompiler: No working C\+\+ compiler found\); install"
    with pytest.raises(InputError, match=words):
        toy_trainer(compile=True).train(toy_batches(1), n_epochs=1, progress=False)
    with pytest.raises(InputError, match=words):
        train_vit.main(["--data-dir", str(tmp_path / "no photos"), "--compile", "--output-dir", str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command_without_a_compiler_ends_in_one_line(tmp_path):
    words = ["train_vit.py", "--dataset", "shapes", "--compile", "--steps", "2", "--output-dir", tmp_path / "run"]
    found = subprocess.run([sys.executable, *words], cwd=ROOT, env=os.environ | dict(CXX="/nonexistent"),
                           capture_output=True, text=True)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert found.stderr.startswith("train_vit.py: torch.compile does not work here (InvalidCxxCompiler: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif("TEST_COMPILE" not in os.environ, reason="half a minute of compiling; set TEST_COMPILE to run it")
def test_trainer_with_compile_matches_eager_training():
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(VisionTransformer(**TINY), "cpu", compile=compiled, amp="off")
        results.append(train_quietly(trainer, toy_batches(3), toy_batches(2), n_epochs=2, learning_rate=1e-3))
    for column in ("train_loss", "val_loss"):
        assert results[1][column] == pytest.approx(results[0][column], abs=1e-4)


# ---- Smaller images first ---------------------------------------------------------------------------------


class Sizes(nn.Module):
    """A module that records the sizes of its inputs."""

    def __init__(self):
        super().__init__()
        self.seen, self.scale = [], nn.Parameter(torch.ones(()))

    def forward(self, images):
        self.seen.append(tuple(images.shape[2:]))
        return self.scale * images.mean(dim=(2, 3))  # (b, 3)


def test_progressive_resize_shrinks_early_steps_but_never_evaluation():
    model = Sizes()
    trainer, batches = Trainer(model, "cpu"), toy_batches(5)
    train_quietly(trainer, batches, n_steps=10, progressive_resize=(0.75, 0.7), resize_multiple=1)
    assert model.seen == [(6, 6)] * 7 + [(8, 8)] * 3
    trainer.evaluate(batches[:1])
    assert model.seen[-1] == (8, 8)


def test_progressive_resize_antialiases_smaller_images():
    model, shown = Sizes(), []
    model.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    (images, labels), = toy_batches(1)
    train_quietly(Trainer(model, "cpu"), [(images, labels)], n_steps=1, progressive_resize=(0.5, 1.0))
    expected = F.interpolate(images, (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(shown[0], expected)


def test_steps_within_counts_small_and_large_image_steps(monkeypatch):
    """A step takes 1 second with small images and 3 with large ones: 0.5 * 1 + 0.5 * 3 = 2."""
    now, real = [0.0], Trainer.step

    def step(self, batch, n_all, state):
        now[0] += 1.0 if state.resized(batch[0]).shape[-1] == 4 else 3.0
        real(self, batch, n_all, state)

    monkeypatch.setattr("train_vit.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(Trainer, "step", step)
    model, loader = Sizes(), toy_batches(5)
    n_steps = steps_within(1000.0, model, loader, loader[:1], device="cpu", progressive_resize=(0.5, 0.5))
    assert 0.9 * 500 < n_steps <= 500
    assert steps_within(1000.0, model, loader, loader[:1], device="cpu") < 0.7 * n_steps


class Stream(torch.utils.data.IterableDataset):
    """An endless loader without a length."""

    def __iter__(self):
        while True:
            yield from toy_batches()


def test_trainer_takes_loaders_without_a_length():
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    history = train_quietly(toy_trainer(), loader, n_steps=3)
    assert len(history["lr"]) == 1
    assert toy_trainer().evaluate(batch for batch in toy_batches(2))["n"] > 0


def test_trainer_trains_a_timm_vit():
    """In timm the names of our protocol mean other things: no_weight_decay is a method."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, num_classes=3, depth=1)
    for optimizer in ("adamw", "muon"):
        history = train_quietly(Trainer(model, "cpu"), toy_batches(2), n_steps=2, optimizer=optimizer)
        assert math.isfinite(history["train_loss"][0])


def test_trainer_takes_an_objective_or_a_loss_function():
    with pytest.raises(InputError, match=r"\ATrainer got an objective and a loss_fn; [^\n]*\Z"):
        Trainer(small_net(), "cpu", objective=Classification(), loss_fn=F.cross_entropy)
