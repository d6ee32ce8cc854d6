"""Files of other trainers: the model is found, and everything outside it is dropped with a reason."""

import re
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from vit_bridge.errors import Assumption
from vit_bridge.models.convnet import ConvNet
from vit_bridge.weights.checkpoints import describe_checkpoint, load, load_checkpoint
from vit_model import InputError, VisionTransformer

OURS = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, n_heads=4, n_classes=3)
TIMM = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=4, num_classes=3)
HF = dict(image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)


def randomised(model, seed=5):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def named(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def opened(path, **options):
    """Return (model, the warning)."""
    with pytest.warns(Assumption) as caught:
        model = load(path, n_heads=4, **options)
    [warning] = [w for w in caught if issubclass(w.category, Assumption)]
    return model, str(warning.message)


class Lit(nn.Module):
    """The parts of a Lightning module: the model, a loss with a buffer, metrics."""

    def __init__(self, model, name="net"):
        super().__init__()
        setattr(self, name, model)
        self.criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]))
        self.val_acc = nn.Module()
        self.val_acc.register_buffer("correct", torch.tensor(3))
        self.val_acc.register_buffer("total", torch.tensor(5))


def lightning(module, path):
    torch.save({"epoch": 3, "global_step": 90, "pytorch-lightning_version": "2.5.0", "loops": {"fit_loop": {}},
                "state_dict": OrderedDict(module.state_dict()), "optimizer_states": [{"state": {0: {}}}],
                "hyper_parameters": {"lr": np.float64(0.1)}, "callbacks": {"best": torch.tensor(0.9)}}, path)


LIBRARIES = {
    "timm": lambda: timm.models.VisionTransformer(**TIMM),
    "torchvision": lambda: torchvision.models.VisionTransformer(16, 4, 2, 4, 24, 96, num_classes=3),
    "transformers": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(
        **HF, id2label=dict(enumerate("abc")), label2id=dict(zip("abc", range(3), strict=True))))}


@pytest.mark.parametrize("name", ["net", "vit", "backbone", "encoder", "model", "my_model"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_load_finds_the_model_in_a_lightning_file(library, name, tmp_path):
    theirs = randomised(LIBRARIES[library]())
    lightning(Lit(theirs, name), tmp_path / "m.ckpt")
    model, words = opened(tmp_path / "m.ckpt")
    answer = theirs(images())
    torch.testing.assert_close(model(images()), getattr(answer, "logits", answer))
    assert "dropped outside the model: criterion.pos_weight and 2 more" in words
    report = describe_checkpoint(tmp_path / "m.ckpt").report
    assert report.dropped == dict.fromkeys(["criterion.pos_weight", "val_acc.correct", "val_acc.total"],
                                           f"outside the model, which is under '{name}.'")
    assert f"the weights are under state_dict / {name}." in report.notes


@pytest.mark.parametrize("around", ["net", "network", "weights"])
def test_load_finds_the_model_under_another_name(around, tmp_path):
    theirs = randomised(timm.models.VisionTransformer(**TIMM))
    torch.save({around: theirs.state_dict(), "acc": 0.93, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
               tmp_path / "m.pth")
    torch.testing.assert_close(opened(tmp_path / "m.pth")[0](images()), theirs(images()))


@pytest.mark.parametrize(("student", "teacher"), [
    ("student.", "teacher."), ("model.", "ema_model.module."), ("student_backbone.", "teacher_backbone."),
    ("net.", "net_ema."), ("", "ema.")])
def test_load_takes_the_average_of_two_models_and_says_so(student, teacher, tmp_path):
    one, two = (randomised(timm.models.VisionTransformer(**TIMM), seed) for seed in (3, 5))
    torch.save({**named(student, one.state_dict()), **named(teacher, two.state_dict())}, tmp_path / "m.pth")
    model, words = opened(tmp_path / "m.pth")
    torch.testing.assert_close(model(images()), two(images()))
    assert f"of the models under {student!r} and {teacher!r}, {teacher!r} was used, usually the" in words


@pytest.mark.parametrize("larger", [dict(depth=3), dict(embed_dim=48)], ids=str)
def test_load_refuses_a_student_and_a_teacher_of_different_shapes(larger, tmp_path):
    one, two = (timm.models.VisionTransformer(**TIMM | settings).state_dict() for settings in ({}, larger))
    for content in (named("student.", one) | named("teacher.", two), dict(student=one, teacher=two)):
        torch.save(content, tmp_path / "m.pth")
        with pytest.raises(InputError, match=r"\A[^\n]*different shapes, under 'student\.?' and 'teacher\.?'[^\n]*\Z"):
            load(tmp_path / "m.pth")


@pytest.mark.parametrize("prefixes", [("a.", "b."), ("generator.vit.", "discriminator.vit."), ("ema_a.", "ema_b.")])
def test_load_refuses_two_models_that_are_as_good(prefixes, tmp_path):
    one, two = (randomised(timm.models.VisionTransformer(**TIMM), seed) for seed in (3, 5))
    flat = {**named(prefixes[0], one.state_dict()), **named(prefixes[1], two.state_dict())}
    nested = {prefixes[0][:-1]: one.state_dict(), prefixes[1][:-1]: two.state_dict()}
    for content in (flat, nested):
        torch.save(content, tmp_path / "m.pth")
        for run in (load, describe_checkpoint, lambda path: load_checkpoint(VisionTransformer(**OURS), path)):
            with pytest.raises(InputError, match=r"\A[^\n]*holds 2 models, under [^\n]*; save [^\n]*\Z") as caught:
                run(tmp_path / "m.pth")
            assert all(prefix[:-1] in str(caught.value) for prefix in prefixes)


def test_load_takes_one_model_that_stands_there_twice(tmp_path):
    theirs = randomised(timm.models.VisionTransformer(**TIMM))
    torch.save({**named("net.", theirs.state_dict()), **named("loss.net.", theirs.state_dict())}, tmp_path / "m.pth")
    torch.testing.assert_close(opened(tmp_path / "m.pth")[0](images()), theirs(images()))


@pytest.mark.parametrize("head", ["head", "fc", "classifier"])
@pytest.mark.parametrize("backbone", ["timm", "transformers"])
def test_load_takes_the_head_beside_a_backbone(backbone, head, tmp_path):
    theirs, linear = timm.models.VisionTransformer(**{**TIMM, "num_classes": 0}), nn.Linear(24, 3)
    if backbone == "transformers":
        theirs = transformers.ViTModel(transformers.ViTConfig(**HF), add_pooling_layer=False)
    module = Lit(randomised(theirs), "vit")
    setattr(module, head, randomised(linear))
    lightning(module, tmp_path / "m.ckpt")
    model, words = opened(tmp_path / "m.ckpt")
    features = theirs(images())
    features = features if backbone == "timm" else features.last_hidden_state[:, 0]
    torch.testing.assert_close(model(images()), linear(features))
    assert (f"{head}, outside the model, was used as its head" in words) == ((backbone, head) != ("transformers",
                                                                                                  "classifier"))


def resnet():
    return timm.models.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), channels=(64, 6, 8, 10), num_classes=3)


HEADS = {
    "after a dropout, beside": ("backbone", "vit", "head.1"), "after a dropout": ("", "vit", "head.1"),
    "another name": ("", "vit", "classifier.1"), "in a Sequential of two": ("", "vit", "head.1.0"),
    "of a ResNet": ("", "resnet", "fc.1"), "of a ResNet, beside": ("backbone", "resnet", "head"),
    "of a ResNet, after a dropout": ("net", "resnet", "classifier.2")}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_load_takes_the_head_where_people_put_it(kind, bias, tmp_path):
    prefix, build, name = HEADS[kind]
    theirs = randomised(timm.models.VisionTransformer(**TIMM) if build == "vit" else resnet())
    theirs.reset_classifier(0)
    linear = randomised(nn.Linear(theirs.num_features, 3, bias=bias))
    torch.save(named(f"{prefix}." if prefix else "", theirs.state_dict()) | named(f"{name}.", linear.state_dict()),
               tmp_path / "m.pth")
    with pytest.warns(Assumption) as caught:
        model = load(tmp_path / "m.pth", **dict(n_heads=4) if build == "vit" else {})
    torch.testing.assert_close(model(images()), linear(theirs(images())))
    assert (f"{name}, outside the model, was used as its head" in str(caught[0].message)) == bool(prefix)


def test_load_takes_the_head_beside_a_model_before_its_own(tmp_path):
    theirs, linear = randomised(timm.models.VisionTransformer(**TIMM)), randomised(nn.Linear(24, 5))
    torch.save(named("backbone.", theirs.state_dict()) | named("head.", linear.state_dict()), tmp_path / "m.pth")
    model, words = opened(tmp_path / "m.pth")
    theirs.reset_classifier(0)
    torch.testing.assert_close(model(images()), linear(theirs(images())))
    assert "head, outside the model, was used as its head, and its own was dropped" in words


@pytest.mark.parametrize("head", [nn.Linear(3, 5), nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 5))], ids=str)
def test_load_refuses_a_head_on_top_of_the_models_own(head, tmp_path):
    theirs = timm.models.VisionTransformer(**TIMM)
    torch.save(named("backbone.", theirs.state_dict()) | named("head.", head.state_dict()), tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"\A[^\n]*has two heads, head\.[^\n]* and [^\n]*head\.weight inside[^\n]*\Z"):
        load(tmp_path / "m.pth")


@pytest.mark.parametrize("head", [
    nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 3)), nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 3)),
    nn.Linear(48, 3)], ids=str)
def test_load_names_a_head_that_it_drops(head, tmp_path):
    theirs = timm.models.VisionTransformer(**{**TIMM, "num_classes": 0})
    torch.save(named("backbone.", theirs.state_dict()) | named("head.", head.state_dict()), tmp_path / "m.pth")
    model, words = opened(tmp_path / "m.pth")
    assert model.config.n_classes == 0
    assert "dropped from a head: head." in words


@pytest.mark.parametrize(("name", "shape"), [
    ("blocks.1.extra", (5,)), ("attn_pool.latent", (1, 1, 24)), ("norm_pre.bias", (24,)), ("head2.weight", (3, 24)),
    ("pos_embed_rel", (3,))])
@pytest.mark.parametrize("prefix", ["", "net."])
def test_load_refuses_what_is_left_over_inside_the_model(name, shape, prefix, tmp_path):
    state = {**VisionTransformer(**OURS).state_dict(), name: torch.zeros(shape)}
    torch.save({**named(prefix, state), "criterion.pos_weight": torch.ones(3)}, tmp_path / "m.pth")
    for run in (load, lambda path: load_checkpoint(VisionTransformer(**OURS), path)):
        with pytest.raises(InputError, match=rf"\A{re.escape(str(tmp_path))}[^\n]*\Z"):
            run(tmp_path / "m.pth")


def test_load_drops_a_loss_beside_a_model_without_prefix(tmp_path):
    theirs = randomised(timm.models.VisionTransformer(**TIMM))
    torch.save({**theirs.state_dict(), "criterion.weight": torch.ones(3), "train_accuracy.total": torch.tensor(3)},
               tmp_path / "m.pth")
    model, words = opened(tmp_path / "m.pth")
    torch.testing.assert_close(model(images()), theirs(images()))
    assert "dropped outside the model: criterion.weight and 1 more" in words


def test_load_refuses_another_architecture_under_a_prefix(tmp_path):
    swin = timm.models.SwinTransformerV2(img_size=32, patch_size=4, num_classes=3, embed_dim=4, depths=(1, 1),
                                         num_heads=(1, 1), window_size=4)
    for prefix in ("net.", "model.", "module.model."):
        torch.save(named(prefix, swin.state_dict()), tmp_path / "m.pth")
        with pytest.raises(InputError, match=r"\A[^\n]*m\.pth is a Swin Transformer V2[^\n]*\Z"):
            load(tmp_path / "m.pth")


def test_load_checkpoint_finds_a_convnet_under_a_prefix(tmp_path):
    arguments = dict(n_classes=3, img_size=8, widths=(3, 5), depths=(1, 2))
    source, other = ConvNet(**arguments), ConvNet(**arguments)
    lightning(Lit(source), tmp_path / "m.ckpt")
    report = load_checkpoint(other, tmp_path / "m.ckpt")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in source.state_dict().items())
    assert list(report.dropped) == ["criterion.pos_weight", "val_acc.correct", "val_acc.total"]
    torch.save({**named("a.", source.state_dict()), **named("b.", randomised(other).state_dict())}, tmp_path / "m.ckpt")
    with pytest.raises(InputError, match=r"holds 2 models, under 'a\.' and 'b\.'"):
        load_checkpoint(other, tmp_path / "m.ckpt")
