"""Distillation: both losses against their definitions, a teacher that stays as it is, and runs with --teacher."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from command_runs import PowerCut, at_step, cut, prepared, run, tensors_in, train
from torch import nn
from toy_training import TINY, copy_of, memory_loader, same, toy_batches, train_quietly, without_times

import train_vit
from train_vit import Stopped, Trainer, parse
from vit_bridge.data.augmentation import Mixing
from vit_bridge.errors import Assumption
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.convnext import ConvNeXt
from vit_bridge.models.deit import DistilledViT
from vit_bridge.models.swin import SwinTransformer
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.training.objectives import (
    DEFAULT_DISTILLATION,
    DISTILLATIONS,
    Classification,
    Distillation,
    distillation_loss,
)
from vit_bridge.weights.checkpoints import load, read_checkpoint, save_model
from vit_model import InputError, VisionTransformer

NAMES = ["a", "b", "c"]
OWN = Preprocessing(8, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), class_names=NAMES)


def teacher_of(preprocessing=OWN, n_classes=3):
    """Return a ConvNet with batch norms whose statistics are not those of a new one."""
    torch.manual_seed(0)
    model = ConvNet(preprocessing.img_size, 3, n_classes, (5, 7), (1, 1), 1)
    model.train()
    model(torch.randn(16, 3, *preprocessing.size))
    nn.init.normal_(model.head.weight)
    model.preprocessing = preprocessing
    return model.eval()


def students():
    torch.manual_seed(1)
    return {"two heads": DistilledViT(**TINY), "one head": VisionTransformer(**TINY)}


def batch_of(n=7, size=8):
    torch.manual_seed(2)
    return torch.randn(n, 3, size, size), torch.randint(3, (n,))


# ---- The losses -------------------------------------------------------------------------------------------


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def expected_loss(heads, theirs, labels, kind, weight, temperature):
    """Eq. 2 and 3 of the paper in numpy: the first head learns the labels, the last one the teacher."""
    rows = np.arange(len(labels))
    from_labels = -np.log(softmax(heads[0])[rows, labels]).mean()
    if kind == "hard":
        taught = -np.log(softmax(heads[-1])[rows, theirs.argmax(axis=1)]).mean()
    else:
        p, q = softmax(theirs / temperature), softmax(heads[-1] / temperature)
        taught = temperature**2 * (p * (np.log(p) - np.log(q))).sum(axis=1).mean()
    return (1 - weight) * from_labels + weight * taught


@pytest.mark.parametrize(("kind", "weight", "temperature"), [
    ("hard", None, None), ("soft", None, None), ("soft", 0.7, 1.3), ("hard", 0.2, None)])
@pytest.mark.parametrize("name", ["two heads", "one head"])
def test_distillation_is_the_loss_of_the_paper(name, kind, weight, temperature):
    student, (images, labels) = students()[name], batch_of()
    objective = Distillation(teacher_of(), OWN, kind, weight, temperature, label_smoothing=0.0).train()
    objective.check_model(student)
    heads = student(images)
    heads = heads if isinstance(heads, tuple) else (heads,)
    theirs = objective.teacher(images)
    default = dict(hard=(0.5, 1), soft=(0.1, 3))[kind]  # the paper's
    expected = expected_loss([one.detach().double().numpy() for one in heads], theirs.double().numpy(), labels.numpy(),
                             kind, weight or default[0], temperature or default[1])
    assert objective(student, (images, labels)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_distillation_loss_has_the_gradient_of_its_definition(temperature):
    """Soft: T (softmax(z / T) - softmax(t / T)) / B. Hard: (softmax(z) - one-hot) / B."""
    torch.manual_seed(0)
    logits, theirs = torch.randn(5, 11, dtype=torch.float64, requires_grad=True), torch.randn(5, 11).double()
    (soft,) = torch.autograd.grad(distillation_loss(logits, theirs, "soft", temperature), logits)
    expected = temperature * ((logits / temperature).softmax(1) - (theirs / temperature).softmax(1)) / 5
    torch.testing.assert_close(soft, expected, rtol=1e-12, atol=1e-15)
    (hard,) = torch.autograd.grad(distillation_loss(logits, theirs, "hard"), logits)
    torch.testing.assert_close(hard, (logits.softmax(1) - F.one_hot(theirs.argmax(1), 11)) / 5, rtol=1e-12, atol=1e-15)


def test_each_head_learns_from_its_own_source():
    student, batch = students()["two heads"], batch_of()
    for weight, untaught in ((0, "head_dist"), (1, "head")):
        objective = Distillation(teacher_of(), OWN, weight=weight).train()
        objective.check_model(student)
        student.zero_grad()
        objective(student, batch).backward()
        still = [name for name in student.head_names if not student.get_submodule(name).weight.grad.any()]
        assert still == [untaught]


@pytest.mark.parametrize("name", ["two heads", "one head"])
def test_evaluation_uses_the_labels_alone(name):
    student, batch = students()[name].eval(), batch_of()
    objective = Distillation(teacher_of(), OWN).eval()
    objective.teacher.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    objective.check_model(student)
    plain = Classification().eval()
    plain.check_model(student)
    assert torch.equal(objective(student, batch), plain(student, batch))


# ---- The teacher ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTILLATIONS)
def test_training_leaves_the_teacher_as_it_was(kind):
    teacher = teacher_of()
    before = copy_of(teacher)
    objective = Distillation(teacher, OWN, kind)
    trainer = Trainer(students()["two heads"], "cpu", objective)
    modes = []
    teacher.register_forward_hook(lambda *_: modes.append({module.training for module in teacher.modules()}))
    weights = copy_of(trainer.model)
    train_quietly(trainer, toy_batches(2), toy_batches(1), n_epochs=2)
    assert modes == [{False}] * 4  # training batches alone
    assert same(copy_of(teacher), before)  # the statistics of its batch norms too
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not same(copy_of(trainer.model), weights)
    objective.train()
    assert objective.training
    assert not any(module.training for module in teacher.modules())


def spied(module, seen):
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    return module


def test_the_teacher_sees_the_images_of_the_student():
    """Augmented, mixed, in parts, and prepared as in its own training."""
    own = memory_loader(11, 7, training=True).preprocessing
    theirs = Preprocessing(8, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), class_names=NAMES)
    student, teacher, seen, shown = students()["one head"], teacher_of(theirs), [], []
    objective = Distillation(spied(teacher, shown), own, mixing=Mixing("mixup", 3))
    shown.clear()
    trainer = Trainer(spied(student, seen), "cpu", objective, grad_accum_steps=2)
    train_quietly(trainer, memory_loader(11, 7, training=True), n_epochs=2)
    assert len(shown) == len(seen) == 2 * 4
    for one, other in zip(seen, shown, strict=True):
        mean, std, their_mean, their_std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (
            own.mean, own.std, theirs.mean, theirs.std))
        torch.testing.assert_close(other, (one * std + mean - their_mean) / their_std)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(12, 20), (8, 8), (4, 4)])
def test_the_teacher_gets_its_own_size_and_normalisation(size, interpolation):
    theirs = Preprocessing(size, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), interpolation, NAMES)
    teacher, images = teacher_of(theirs), batch_of()[0]
    objective = Distillation(teacher, OWN)
    pixels = images * torch.tensor(OWN.std).view(-1, 1, 1) + torch.tensor(OWN.mean).view(-1, 1, 1)
    pixels = pixels if size == (8, 8) else F.interpolate(pixels, size, mode=interpolation, antialias=True)
    prepared = (pixels - torch.tensor(theirs.mean).view(-1, 1, 1)) / torch.tensor(theirs.std).view(-1, 1, 1)
    torch.testing.assert_close(objective.teach(images), teacher(prepared).detach(), rtol=1e-4, atol=1e-4)


def test_images_prepared_alike_reach_the_teacher_unchanged():
    seen = []
    objective = Distillation(spied(teacher_of(), seen), OWN)
    images = batch_of()[0]
    objective.teach(images)
    assert torch.equal(seen[-1], images)


def test_shrunken_images_are_enlarged_for_the_teacher():
    student, seen, shown = students()["one head"], [], []
    student.any_size = True
    trainer = Trainer(spied(student, seen), "cpu", Distillation(spied(teacher_of(), shown), OWN))
    train_quietly(trainer, toy_batches(4), n_epochs=1, progressive_resize=(0.5, 0.5))
    assert [images.shape[2] for images in seen] == [4, 4, 8, 8]
    assert {images.shape[2] for images in shown} == {8}


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_the_teacher_computes_in_the_precision_of_the_run(amp, dtype):
    teacher, seen = teacher_of(), []
    trainer = Trainer(students()["two heads"], "cpu", Distillation(teacher, OWN), amp=amp)
    teacher.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train_quietly(trainer, toy_batches(2), n_epochs=1)
    assert seen == [dtype] * 2
    assert trainer.objective.teach(toy_batches(1)[0][0]).dtype == torch.float32


def test_grad_checkpointing_of_a_student_leaves_the_steps_as_they_are():
    ends = []
    for settings in ({}, dict(grad_checkpointing=True)):
        trainer = Trainer(students()["two heads"], "cpu", Distillation(teacher_of(), OWN), amp="off", **settings)
        train_quietly(trainer, toy_batches(2), n_epochs=2, ema_decay=0.9)
        ends.append((copy_of(trainer.model), copy_of(trainer.average)))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[0][1], ends[1][1])


def timm_teacher():
    return timm.create_model("test_resnet", num_classes=3)  # it records 160 pixels and ImageNet's mean and std


def torchvision_teacher():
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=3)
    model.preprocessing = Preprocessing(32, (0.1,) * 3, (0.5,) * 3)
    return model


def unknown_teacher():
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 3))
    model.preprocessing = Preprocessing(8)
    return model


@pytest.mark.parametrize("build", [timm_teacher, torchvision_teacher, unknown_teacher])
def test_models_of_other_libraries_teach(build):
    torch.manual_seed(0)
    teacher = build()
    with pytest.warns(Assumption, match="assumed to be in the same order"):
        objective = Distillation(teacher, OWN, "soft")
    trainer = Trainer(students()["two heads"], "cpu", objective)
    train_quietly(trainer, toy_batches(1), n_epochs=1)
    cfg = getattr(teacher, "pretrained_cfg", None)
    assert objective.theirs.size == ((160, 160) if cfg else teacher.preprocessing.size)
    assert objective.teach(batch_of()[0]).shape == (7, 3)


@pytest.mark.parametrize("build", [
    lambda: ConvNet(8, 3, 3, (5,), (1,), 1), lambda: SwinTransformer(8, 1, 3, 3, 6, (2, 1), (1, 2), 3),
    lambda: ConvNeXt(8, 3, 3, (5, 7), (1, 1), 1), lambda: VisionTransformer(**TINY, pool="mean")],
    ids=["convnet", "swin", "convnext", "vit"])
def test_models_with_one_head_learn_from_a_teacher(build):
    torch.manual_seed(0)
    teacher = DistilledViT(**TINY)
    teacher.preprocessing = OWN
    trainer = Trainer(build(), "cpu", Distillation(teacher, OWN, "soft", 1.0))
    before = trainer.objective(trainer.model.train(), batch_of()).item()
    train_quietly(trainer, [batch_of()], n_epochs=20)
    assert trainer.objective.train()(trainer.model, batch_of()).item() < before


# ---- Classes ----------------------------------------------------------------------------------------------


def test_classes_in_another_order_give_the_same_loss():
    teacher, batch = teacher_of(), batch_of()
    student = students()["two heads"]
    order = [4, 2, 0, 3, 1]
    wider = teacher_of(n_classes=5)
    wider.load_state_dict(wider.state_dict() | {name: value for name, value in teacher.state_dict().items()
                                                if not name.startswith("head.")})
    with torch.no_grad():
        for name in ("weight", "bias"):
            rows = torch.cat([getattr(teacher.head, name), torch.randn_like(getattr(teacher.head, name))[:2]])
            getattr(wider.head, name).copy_(rows[order])
    names = [*NAMES, "other", "more"]
    wider.preprocessing = Preprocessing(8, OWN.mean, OWN.std, class_names=[names[i] for i in order])
    losses, texts = [], []
    for one in (teacher, wider):
        objective = Distillation(one, OWN, "soft").train()
        objective.check_model(student)
        losses.append(objective(student, batch).item())
        texts.append(objective.describe_teacher())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert "; its 3 classes, matched by name" in texts[0]
    assert "; 3 of its 5 classes, matched by name" in texts[1]
    assert texts[0].startswith("ConvNet with 1,472 parameters for images of 8 pixels; ")
    assert "; soft distillation, weight 0.1, temperature 3;" in texts[0]


def named(teacher, names):
    teacher.preprocessing = Preprocessing(8, OWN.mean, OWN.std, class_names=names)
    return teacher


def without_preprocessing():
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 3))


def grey():
    model = ConvNet(8, 1, 3, (5,), (1,), 1)
    model.preprocessing = Preprocessing(8, (0.5,), (0.5,), class_names=NAMES)
    return model


@pytest.mark.parametrize(("build", "expected"), [
    (lambda: named(teacher_of(), ["a", "b", "x"]),
     r"the teacher does not know 1 of the 3 classes \(c\); it knows 3 \(a, b, x\): fine-tune it"),
    (lambda: named(teacher_of(), ["a", "b", "c", "d"]), r"names 4 classes \(a, b, c, d\), but it has 3 logits"),
    (lambda: named(teacher_of(n_classes=4), None), r"the teacher has 4 classes without names, but the images have 3"),
    (grey, "the teacher's images have 1 channels, but those of the training have 3"),
    (without_preprocessing, "nothing records how images for this Sequential are prepared"),
    (lambda: named(ConvNet(8, 3, 0, (5,), (1,), 1), NAMES), "has no head"),
    (lambda: named(nn.Conv2d(3, 3, 1), NAMES), r"the teacher returns a tensor of \(1, 3, 8, 8\) for 1 images")])
def test_a_teacher_that_cannot_teach_is_refused_in_one_line(build, expected):
    with pytest.raises(InputError, match=expected) as error:
        Distillation(build(), OWN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("settings", "expected"), [
    (dict(kind="warm"), "distillation 'warm' is unknown; choose one of: hard, soft"),
    (dict(weight=1.5), "weight 1.5 must lie between 0"),
    (dict(kind="soft", temperature=0), "temperature 0 must be a positive number"),
    (dict(kind="hard", temperature=3.0), "temperature 3.0 has no effect on hard distillation")])
def test_distillation_refuses_values_out_of_range(settings, expected):
    with pytest.raises(InputError, match=expected):
        Distillation(teacher_of(), OWN, **settings)


def test_a_student_with_other_classes_is_refused():
    with pytest.warns(Assumption):
        objective = Distillation(teacher_of(), Preprocessing(8, OWN.mean, OWN.std))
    trainer = Trainer(VisionTransformer(**TINY | dict(n_classes=4)), "cpu", objective)
    with pytest.raises(InputError, match="the teacher has 3 classes, but the model has 4"):
        train_quietly(trainer, toy_batches(1), n_epochs=1)


# ---- Two heads, with and without a teacher ----------------------------------------------------------------


def test_two_heads_without_a_teacher_both_learn_the_labels():
    student, (images, labels) = students()["two heads"], batch_of()
    objective = Classification(class_weights=[0.5, 1, 2])
    objective.check_model(student)
    student.train()
    expected = sum(objective.loss_fn(logits, labels) for logits in student(images)) / 2
    torch.testing.assert_close(objective(student, (images, labels)), expected)
    student.eval()
    torch.testing.assert_close(objective(student, (images, labels)), objective.loss_fn(student(images), labels))
    trainer = Trainer(student, "cpu")
    history = train_quietly(trainer, toy_batches(), toy_batches(), n_epochs=8)
    assert history["val_acc"][-1] > 0.9


RUNS = {"no teacher": lambda: Classification(), "hard": lambda: Distillation(teacher_of(), OWN),
        "soft": lambda: Distillation(teacher_of(), OWN, "soft", mixing=Mixing("cutmix", 3))}


@pytest.mark.parametrize("settings", [{}, dict(grad_accum_steps=2, ema_decay=0.9), dict(optimizer="muon")])
@pytest.mark.parametrize("kind", RUNS)
def test_two_heads_resume_exactly(kind, settings):
    def trainer(seed):
        torch.manual_seed(seed)
        return Trainer(DistilledViT(**TINY, drop_path=0.3), "cpu", RUNS[kind](), amp="off", **settings)

    whole = trainer(0)
    history = train_quietly(whole, toy_batches(2), toy_batches(1), n_steps=5)
    with pytest.raises(Stopped) as stop:
        train_quietly(trainer(0), toy_batches(2), toy_batches(1), n_steps=5, on_batch=lambda state: state.step == 3)
    again = trainer(9)
    found = train_quietly(again, toy_batches(2), toy_batches(1), n_steps=5, resume=stop.value.state.state_dict())
    assert same(copy_of(again.model), copy_of(whole.model))
    assert whole.average is None or same(copy_of(again.average), copy_of(whole.average))
    assert without_times(found) == without_times(history)
    assert "dist_token" in copy_of(whole.model)


@pytest.mark.parametrize("kind", DISTILLATIONS)
def test_a_batch_in_parts_gives_the_same_loss(kind):
    student, (images, labels) = students()["two heads"], batch_of(9)
    objective = Distillation(teacher_of(), OWN, kind, class_weights=[0.5, 1, 2]).train()
    objective.check_model(student)
    parts = sum(len(part) / 9 * objective(student, (part, its)).item()
                for part, its in zip(images.split(4), labels.split(4), strict=True))
    assert objective(student, (images, labels)).item() == pytest.approx(parts, rel=1e-5)


# ---- The command ------------------------------------------------------------------------------------------


SIX = ["--steps", 6, "--batch-size", 8, "--model-ema", 0.9, "--class-weights", "--mixing", "cutmix", "--seed", 4]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "best.pt"
    torch.manual_seed(0)
    save_model(ConvNet(16, 3, 3, (5, 7), (1, 1), 1), path,
               Preprocessing(16, (0.4,) * 3, (0.3,) * 3, class_names=["green", "red", "blue"]))
    return path


@pytest.mark.parametrize("model", ["deit_nano", "vit_nano", "convnet"])
def test_train_vit_with_a_teacher_resumes_exactly(model, teacher_file, photos, untested, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(teacher_file.parent)
    words = ["--data-dir", photos, "--model", model, "--teacher", "best.pt", "--distillation", "soft", *SIX]
    train(tmp_path / "whole", *words)
    printed = capsys.readouterr().out
    assert f"Teacher {teacher_file}: ConvNet with " in printed
    assert "soft distillation, weight 0.1, temperature 3; 2 of its 3 classes, matched by name" in printed
    assert f"--teacher {teacher_file} --distillation soft" in printed
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        at_step(patch, 4, cut)
        with pytest.raises(PowerCut):
            train(tmp_path / "cut", *words[:4], "--teacher", teacher_file, *words[6:], "--save-minutes", "1e-9")
    train_vit.main(["--resume", str(tmp_path / "cut")])
    whole, resumed = (tensors_in(read_checkpoint(tmp_path / name / "last.pt")) for name in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert read_checkpoint(tmp_path / "cut" / "last.pt")["options"]["teacher"] == str(teacher_file)
    train(tmp_path / "plain", *words[:4], *SIX)
    other = tensors_in(read_checkpoint(tmp_path / "plain" / "last.pt"))
    assert not torch.equal(other["/state_dict/head.weight"], whole["/state_dict/head.weight"])


def test_a_teacher_does_not_change_the_first_weights(teacher_file, photos, tmp_path):
    runs = [prepared("--data-dir", photos, "--output-dir", tmp_path / name, *words)
            for name, words in (("a", ["--teacher", teacher_file]), ("b", []))]
    assert same(*(copy_of(run.model) for run in runs))


def test_resume_reports_a_missing_and_a_changed_teacher(teacher_file, photos, untested, tmp_path, monkeypatch, capsys):
    teacher = tmp_path / "teacher.pt"
    teacher.write_bytes(teacher_file.read_bytes())
    words = ["--data-dir", photos, "--teacher", teacher, "--distillation", "hard", *SIX]
    with monkeypatch.context() as patch:
        at_step(patch, 4, cut)
        with pytest.raises(PowerCut):
            train(tmp_path / "run", *words, "--save-minutes", "1e-9")
    teacher.unlink()
    code, error = run(["--resume", tmp_path / "run"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert f"the teacher of this run, {teacher}, is no longer there; put it back to resume the run" in error
    other = load(teacher_file)
    nn.init.zeros_(other.head.weight)
    save_model(other, teacher)
    code, error = run(["--resume", tmp_path / "run", "--distillation", "soft"], capsys)
    assert (code, "--distillation soft differs from the run's hard" in error) == (2, True)
    train_vit.main(["--resume", str(tmp_path / "run")])
    assert "Warning: the teacher weights or their classes have changed since the run started" in capsys.readouterr().out


@pytest.mark.slow
def test_train_vit_records_teacher_and_kind(teacher_file, photos, tmp_path):
    train(tmp_path / "run", "--data-dir", photos, "--model", "deit_nano", "--teacher", teacher_file, "--epochs", 1)
    result, config = (json.loads((tmp_path / "run" / name).read_text()) for name in ("result.json", "config.json"))
    recorded = dict(teacher=str(teacher_file), distillation=DEFAULT_DISTILLATION)
    assert result.items() >= recorded.items()
    assert config["options"].items() >= recorded.items()
    assert load(tmp_path / "run" / "best.pt").preprocessing.class_names == ["blue", "red"]


def test_a_pretrained_student_learns_from_a_teacher(teacher_file, photos, untested, tmp_path):
    train(tmp_path / "run", "--data-dir", photos, "--pretrained", "vit_nano_shapes", "--teacher", teacher_file,
          "--steps", 2, "--layer-decay", 0.8)
    assert load(tmp_path / "run" / "best.pt").config.n_classes == 2


def test_freeze_backbone_trains_both_heads_of_a_distilled_vit(photos, untested, tmp_path):
    torch.manual_seed(0)
    model = DistilledViT(24, 8, 3, 2, 12, 1, 3)
    save_model(model, tmp_path / "start.pt", Preprocessing(24, class_names=["blue", "red"]))
    train(tmp_path / "run", "--data-dir", photos, "--pretrained", tmp_path / "start.pt", "--freeze-backbone",
          "--epochs", 2)
    before, after = model.state_dict(), load(tmp_path / "run" / "best.pt").state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"{head}.{part}" for head in model.head_names for part in ("weight", "bias")}


def test_steps_within_counts_the_teachers_time():
    """The objective is the one of the run, so the measured steps include the teacher."""
    objective = Distillation(teacher_of(), OWN)
    asked = []
    objective.teacher.register_forward_hook(lambda *_: asked.append(True))
    train_vit.steps_within(0.1, students()["one head"], toy_batches(2), toy_batches(1), "cpu", objective)
    assert len(asked) >= 2


def test_parse_settles_the_kind_of_a_teacher():
    assert parse(["--teacher", "convnet_cifar10"]).distillation == DEFAULT_DISTILLATION
    assert parse([]).distillation is None
    assert parse(["--teacher", "convnet_cifar10"]).teacher == "convnet_cifar10"


def test_swin_trains_on_shrunken_images():
    """The windows of the first stage do not divide the smaller map, so it is padded."""
    torch.manual_seed(0)
    model = SwinTransformer(16, 1, 3, 3, 6, (2, 2), (1, 2), 4)
    batches = [(F.interpolate(images, (16, 16)), labels) for images, labels in toy_batches(4)]
    sizes, trainer = [], Trainer(model, "cpu")
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[2]))
    history = train_quietly(trainer, batches, n_epochs=2, progressive_resize=(0.6, 0.5), resize_multiple=1)
    assert sizes == [10] * 4 + [16] * 4
    assert history["train_loss"][1] < history["train_loss"][0]
