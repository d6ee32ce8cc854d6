"""The Trainer: randomness depends on seed and step, and a resumed run ends as an uninterrupted one does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from toy_training import (
    TINY,
    Call,
    Drawing,
    convnet,
    copy_of,
    memory_loader,
    same,
    through_a_file,
    toy_batches,
    toy_trainer,
    train_quietly,
    vit_with_sincos,
    without_times,
)

from train_vit import Stopped, Trainer
from vit_bridge.training.objectives import CrossEntropy
from vit_model import InputError, VisionTransformer

# ---- Chance -----------------------------------------------------------------------------------------------


def drawn_by(*loaders, start=0, **settings):
    model = Drawing()
    torch.manual_seed(start)
    train_quietly(Trainer(model, "cpu"), *loaders, **settings)
    return model.drawn


def test_trainer_draws_depend_only_on_seed_and_step():
    drawn = drawn_by(toy_batches(3), n_epochs=2)
    assert len(set(drawn)) == 6
    assert drawn_by(toy_batches(3), toy_batches(1), start=1, n_epochs=2) == drawn
    assert drawn_by(toy_batches(2), n_steps=6, on_batch=lambda state: torch.rand(3).sum() < 0) == drawn
    assert not set(drawn) & set(drawn_by(toy_batches(3), n_epochs=2, seed=8))


def test_trainer_without_a_seed_uses_torchs_generator():
    drawn = drawn_by(toy_batches(3), n_epochs=1, seed=None)
    assert drawn_by(toy_batches(3), n_epochs=1, seed=None) == drawn
    assert not set(drawn) & set(drawn_by(toy_batches(3), n_epochs=1, seed=None, start=1))


def test_trainer_restores_torchs_generator():
    torch.manual_seed(3)
    trainer, before = Trainer(VisionTransformer(**TINY, dropout=0.5), "cpu"), torch.get_rng_state()
    train_quietly(trainer, toy_batches(2), toy_batches(1), n_epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(Stopped):
        train_quietly(trainer, toy_batches(2), n_epochs=2, on_batch=lambda state: state.step == 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_trainer_dropout_follows_the_seed():
    weights = []
    for seed in (7, 7, 8):
        trainer = Trainer(copy.deepcopy(toy_trainer().model), "cpu")
        trainer.model.dropout.p = 0.5
        train_quietly(trainer, toy_batches(2), n_epochs=1, seed=seed)
        weights.append(copy_of(trainer.model))
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


def test_trainer_resumes_with_the_seed_that_was_drawn():
    trainers, states = [], []
    for resumed in (False, True):
        trainer = Trainer(copy.deepcopy(toy_trainer().model), "cpu")
        trainer.model.dropout.p = 0.5
        torch.manual_seed(resumed)  # otherwise the second run would draw the same seed
        train_quietly(trainer, toy_batches(3), n_epochs=2, seed=None, resume=states[0] if resumed else None,
                      on_epoch=lambda state: states.append(state.state_dict()))
        trainers.append(trainer)
    assert same(copy_of(trainers[0].model), copy_of(trainers[1].model))


# ---- To stop and to go on ---------------------------------------------------------------------------------


def vit_with_chance():
    model = VisionTransformer(**TINY, dropout=0.3)
    model.blocks[0].drop_path.rate = 0.5
    return model


def steep_loss(logits, labels):
    return 3 * F.cross_entropy(logits, labels)


KINDS = {  # model, arguments of Trainer, arguments of train()
    "chance": (vit_with_chance, dict(grad_accum_steps=2, loss_fn=CrossEntropy(0.1, [0.5, 1, 2])), dict(ema_decay=0.9)),
    "batchnorm": (convnet, {}, dict(ema_decay=0.9)),
    "fp16": (vit_with_sincos, dict(amp="fp16", loss_fn=steep_loss), {})}


def loaders_of(kind):
    """Return two batches to train on and two to evaluate."""
    if kind == "list":
        return toy_batches(2, 5), toy_batches(2, 3)
    return memory_loader(11, 7, training=True), memory_loader(5, 3)


def build(kind, seed):
    torch.manual_seed(seed)
    make, settings, arguments = KINDS[kind]
    return Trainer(make(), "cpu", **dict(amp="off") | settings), dict(n_steps=5, **arguments)


@pytest.mark.parametrize(("kind", "data"), [("chance", "list"), ("chance", "memory"), ("batchnorm", "list"),
                                            ("batchnorm", "memory"), ("fp16", "list")])
def test_resume_from_anywhere_ends_as_the_uncut_run(kind, data):
    """The run has two and a half epochs of two steps, each with an evaluation of two batches."""
    trainer, arguments = build(kind, 0)
    calls, scales = Call(), []
    history = train_quietly(trainer, *loaders_of(data), on_batch=calls, **arguments,
                            on_epoch=lambda state: scales.append(state.scaler.get_scale()))
    weights, average = copy_of(trainer.model), trainer.average and copy_of(trainer.average)
    assert calls.count == (2 + 1 + 2) + (2 + 1 + 2) + (1 + 1 + 2)
    if kind == "fp16":
        assert 65536 > scales[0] == scales[-1]  # the first steps overflowed in fp16 and were skipped, the last did not
    steps = []
    for n in range(calls.count):
        trainer, arguments = build(kind, 0)
        with pytest.raises(Stopped, match=r"\Astopped after step \d+\Z") as stop:
            train_quietly(trainer, *loaders_of(data), on_batch=Call(n), **arguments)
        steps.append(stop.value.state.step)
        saved = through_a_file(stop.value.state.state_dict())
        trainer, arguments = build(kind, 99)
        again = train_quietly(trainer, *loaders_of(data), resume=saved, **arguments)
        assert same(copy_of(trainer.model), weights), n
        assert average is None or same(copy_of(trainer.average), average), n
        assert without_times(again) == without_times(history), n
    assert steps == [0, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5, 5, 5]


def test_state_dict_stays_unchanged_and_resumes_twice():
    kept, (trainer, arguments) = [], build("chance", 0)
    history = train_quietly(trainer, *loaders_of("list"), **arguments,
                            on_epoch=lambda state: kept.append(state.state_dict()))
    for seed in (99, 98):
        again, arguments = build("chance", seed)
        found = train_quietly(again, *loaders_of("list"), resume=kept[0], **arguments)
        assert same(copy_of(again.model), copy_of(trainer.model))
        assert without_times(found) == without_times(history)
    assert [len(entries["history"]["lr"]) for entries in kept] == [1, 2, 3]


def test_resume_of_a_finished_run_changes_nothing():
    kept, (trainer, arguments) = [], build("chance", 0)
    history = train_quietly(trainer, *loaders_of("list"), **arguments,
                            on_epoch=lambda state: kept.append(state.state_dict()))
    again, arguments = build("chance", 99)
    assert train_quietly(again, *loaders_of("list"), resume=kept[-1], **arguments) == history
    assert same(copy_of(again.average), copy_of(trainer.average))


def test_resume_refuses_the_state_of_another_training():
    trainer, arguments = build("chance", 0)
    with pytest.raises(Stopped) as stop:
        train_quietly(trainer, *loaders_of("list"), on_batch=Call(2), **arguments)
    saved = stop.value.state.state_dict()
    torch.manual_seed(0)
    deeper = Trainer(VisionTransformer(**TINY | dict(depth=2)), "cpu")
    others = [(deeper, saved, arguments), (trainer, saved, dict(n_steps=5)), (trainer, {}, arguments),
              (trainer, saved, dict(arguments, lr_scales={"head.weight": 0.5}))]
    for other, entries, settings in others:
        with pytest.raises(InputError, match=r"\Athe training state does not fit this run \([^\n]{9,200}\); "
                                             r"resume with the arguments of the run that saved it\Z"):
            train_quietly(other, toy_batches(2), resume=entries, **settings)
