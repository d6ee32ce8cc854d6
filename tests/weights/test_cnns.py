"""Public CNNs: each library's own model, with random weights, loads and gives the same logits."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import transformers
from command_runs import prepared, train
from safetensors.torch import load_file
from timm.models.resnet import BasicBlock, Bottleneck
from torchvision.models.convnext import CNBlockConfig

import train_vit
from train_vit import Trainer
from vit_bridge.analysis.explanations import METHODS, explain
from vit_bridge.analysis.receptive_field import theoretical_receptive_field
from vit_bridge.errors import Assumption
from vit_bridge.models import ConvNet, ConvNeXt, VisionTransformer
from vit_bridge.preprocessing import IMAGENET_MEAN
from vit_bridge.weights import checkpoints, pretrained
from vit_bridge.weights.checkpoints import describe_checkpoint, load, load_checkpoint, save_model
from vit_bridge.weights.pretrained import PUBLIC
from vit_model import InputError, freeze_backbone

WIDTHS, DEPTHS, CLASSES = (6, 10, 14, 18), (1, 2, 1, 1), 5


def one_line_with(text):
    return rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z"


def randomised(model):
    """Return the model in float64 and eval mode, with random weights that float32 can hold."""
    torch.manual_seed(5)
    for name, tensor in model.double().state_dict().items():
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape) + 0.5 if name.endswith("running_var") else torch.randn(tensor.shape) * 0.4
            tensor.copy_(values)
    return model.eval()


# ---- The libraries' models, and what their files are called and hold


def torchvision_resnet(block):
    return torchvision.models.resnet.ResNet(block, list(DEPTHS), num_classes=CLASSES)


def torchvision_convnext():
    settings = [CNBlockConfig(*row) for row in zip(WIDTHS, (*WIDTHS[1:], None), DEPTHS, strict=True)]
    return torchvision.models.convnext.ConvNeXt(settings, num_classes=CLASSES)


def timm_resnet(block, **options):
    """Return the narrowest timm ResNet, which still has 64 channels after the stem."""
    return timm.models.ResNet(block, DEPTHS, channels=(64, 6, 8, 10), num_classes=CLASSES, **options)


def timm_convnext(**options):
    return timm.models.ConvNeXt(**{"num_classes": CLASSES, **options}, depths=DEPTHS, dims=WIDTHS)


def transformers_resnet(kind):
    scale = 4 if kind == "bottleneck" else 1
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=6, hidden_sizes=[scale * width for width in WIDTHS], depths=list(DEPTHS), layer_type=kind,
        num_labels=CLASSES))


def transformers_convnext():
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(
        hidden_sizes=list(WIDTHS), depths=list(DEPTHS), num_labels=CLASSES, layer_norm_eps=1e-6))


def official(state):
    """Return a state dict with the names of the ConvNeXt paper's code, which no package writes."""
    pairs = [(r"stem\.", "downsample_layers.0."), (r"stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
             (r"stages\.(\d)\.blocks\.", r"stages.\1."), (r"\.conv_dw\.", ".dwconv."), (r"\.mlp\.fc", ".pwconv"),
             (r"head\.norm\.", "norm."), (r"head\.fc\.", "head.")]
    named = {}
    for name, tensor in state.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        named[name] = tensor
    return named


def small_images(state):
    """Return the state dict with the names of github.com/kuangliu/pytorch-cifar."""
    return {re.sub(r"^fc\.", "linear.", name).replace("downsample", "shortcut"): tensor
            for name, tensor in state.items()}


FILES = {
    "torchvision, basic": (lambda: torchvision_resnet(torchvision.models.resnet.BasicBlock), dict, ConvNet),
    "torchvision, bottleneck": (lambda: torchvision_resnet(torchvision.models.resnet.Bottleneck), dict, ConvNet),
    "timm, basic": (lambda: timm_resnet(BasicBlock), dict, ConvNet),
    "timm, bottleneck": (lambda: timm_resnet(Bottleneck), dict, ConvNet),
    "timm, grey": (lambda: timm_resnet(BasicBlock, in_chans=1), dict, ConvNet),
    "transformers, basic": (lambda: transformers_resnet("basic"), None, ConvNet),
    "transformers, bottleneck": (lambda: transformers_resnet("bottleneck"), None, ConvNet),
    "torchvision's ConvNeXt": (torchvision_convnext, dict, ConvNeXt),
    "timm's ConvNeXt": (timm_convnext, dict, ConvNeXt),
    "timm's ConvNeXt of 1 x 1 convolutions": (lambda: timm_convnext(conv_mlp=True), dict, ConvNeXt),
    "timm's ConvNeXt without layer scale": (lambda: timm_convnext(ls_init_value=None), dict, ConvNeXt),
    "facebookresearch's ConvNeXt": (timm_convnext, official, ConvNeXt),
    "facebookresearch's ConvNeXt, ImageNet-22k": (lambda: timm_convnext(num_classes=21_841), official, ConvNeXt),
    "transformers ConvNext": (transformers_convnext, None, ConvNeXt),
    "transformers ConvNext, names in memory": (transformers_convnext, dict, ConvNeXt),
}


def write(build, names, folder):
    """Return (the library's model, the path of its file)."""
    theirs = randomised(build())
    if names is None:
        theirs.float().save_pretrained(folder)
        theirs.double()
        torch.save(load_file(folder / "model.safetensors"), folder / "m.pth")
        return theirs, folder / "m.pth"
    torch.save(names(theirs.state_dict()), folder / "m.pth")
    return theirs, folder / "m.pth"


def logits_of(theirs, images):
    answer = theirs(images)
    return getattr(answer, "logits", answer)


@torch.no_grad()
@pytest.mark.parametrize("kind", FILES)
def test_public_cnns_open_and_answer_as_in_their_library(kind, tmp_path):
    build, names, model_class = FILES[kind]
    theirs, path = write(build, names, tmp_path)
    model = load(path)
    assert type(model) is model_class
    assert model.config.depths == DEPTHS
    images = torch.randn(2, model.config.in_channels, 64, 96).double()
    torch.testing.assert_close(model.double()(images), logits_of(theirs, images), rtol=1e-9, atol=1e-9)
    again = model_class(**vars(model.config)).double().eval()
    report = load_checkpoint(again, path)
    assert len(report.used) == len(torch.load(path))
    assert torch.equal(again(images), model(images))
    described = describe_checkpoint(path)
    assert (described.model_class, described.config) == (model_class.__name__, model.config)
    assert described.n_parameters == sum(p.numel() for p in theirs.parameters())


@torch.no_grad()
def test_cnns_without_a_head_or_counters_of_batches_open_too(tmp_path):
    theirs = randomised(timm_resnet(BasicBlock))
    state = {name: tensor for name, tensor in theirs.state_dict().items()
             if not name.startswith("fc.") and not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "m.pth")
    model, images = load(tmp_path / "m.pth"), torch.randn(2, 3, 64, 64).double()
    assert model.config.n_classes == 0
    features = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model.double()(images), features, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_resnets_for_small_images_open_with_a_stem_of_three_by_three(tmp_path):
    theirs = randomised(timm_resnet(BasicBlock))
    theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False).double(), torch.nn.Identity()
    torch.save(small_images(theirs.state_dict()), tmp_path / "m.pth")
    model, images = load(tmp_path / "m.pth"), torch.randn(2, 3, 32, 32).double()
    assert (model.config.stem_stride, model.config.img_size) == (1, 32)
    torch.testing.assert_close(model.double()(images), theirs(images), rtol=1e-9, atol=1e-9)


# ---- What cannot be held


REFUSED = {
    "ResNeXt": (lambda: timm_resnet(Bottleneck, cardinality=2, base_width=32), "a ResNeXt, whose 3 x 3 convolutions"),
    "wide ResNet": (lambda: timm_resnet(Bottleneck, base_width=128), "a wide ResNet"),
    "ResNet-D": (lambda: timm_resnet(BasicBlock, stem_type="deep", avg_down=True), "ResNet-D"),
    "SE": (lambda: timm_resnet(BasicBlock, block_args=dict(attn_layer="se")), "weight their channels"),
    "GroupNorm": (lambda: timm_resnet(BasicBlock, norm_layer=lambda n, **_: torch.nn.GroupNorm(2, n)), "batch norm"),
    "ResNetV2": (lambda: timm.models.ResNetV2((1,), channels=(128,), stem_chs=32, num_classes=3), "a ResNet V2"),
    "ConvNeXt V2": (lambda: timm_convnext(use_grn=True, ls_init_value=None), "a ConvNeXt V2"),
    "overlapping stem": (lambda: timm_convnext(stem_type="overlap"), "stem has several convolutions"),
    "kernels": (lambda: timm_convnext(kernel_sizes=5), "kernels of 5 x 5"),
    "norm first": (lambda: timm_convnext(head_norm_first=True), "normalises before it pools"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_relatives_of_the_cnns_are_refused_with_the_reason(kind, tmp_path):
    build, reason = REFUSED[kind]
    torch.save(build().state_dict(), tmp_path / "m.pth")
    for take in (load, describe_checkpoint):
        with pytest.raises(InputError, match=one_line_with(reason)) as caught:
            take(tmp_path / "m.pth")
        assert str(tmp_path / "m.pth") in str(caught.value)


@pytest.mark.parametrize("model", [
    VisionTransformer(16, 4, 3, 5, 12, 1, 3), ConvNeXt(32, 3, 5, (4, 6), (1, 1)),
    ConvNet(32, 3, CLASSES, (4, 6, 8), (1, 1, 1)), ConvNet(32, 3, CLASSES, (64, 6, 8, 10), (1, 2, 1, 2))])
def test_load_checkpoint_refuses_a_cnn_of_another_kind(model, tmp_path):
    torch.save(timm_resnet(BasicBlock).state_dict(), tmp_path / "m.pth")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=one_line_with("is for a different architecture")):
        load_checkpoint(model, tmp_path / "m.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_cnn_with_missing_blocks_is_no_whole_one(tmp_path):
    state = timm_resnet(BasicBlock).state_dict()
    torch.save({name: tensor for name, tensor in state.items() if not name.startswith("layer2.0.")}, tmp_path / "m.pth")
    with pytest.raises(InputError, match=one_line_with("not a complete ConvNet")):
        load(tmp_path / "m.pth")


# ---- What lies beside a file


def test_a_folder_of_transformers_opens_with_its_classes_and_size(tmp_path):
    for build, model_class in ((transformers_convnext, ConvNeXt), (lambda: transformers_resnet("basic"), ConvNet)):
        theirs = build()
        theirs.config.id2label = {i: f"kind {i}" for i in range(CLASSES)}
        folder = tmp_path / model_class.__name__
        theirs.save_pretrained(folder)
        model = load(folder)
        assert type(model) is model_class
        assert model.preprocessing.class_names == [f"kind {i}" for i in range(CLASSES)]


@pytest.mark.parametrize(("build", "change", "words"), [
    (lambda: transformers_resnet("basic"), dict(downsample_in_first_stage=True), "downsample_in_first_stage"),
    (lambda: transformers_resnet("bottleneck"), dict(downsample_in_bottleneck=True), "downsample_in_bottleneck"),
    (lambda: transformers_resnet("basic"), dict(hidden_act="silu"), "'silu', but ConvNet uses 'relu'"),
    (transformers_convnext, dict(hidden_act="relu"), "'relu', but ConvNeXt uses 'gelu'"),
    (transformers_convnext, dict(model_type="convnextv2"), "'convnextv2', but the tensors belong to a ConvNeXt")])
def test_a_config_that_no_tensor_shows_is_refused(build, change, words, tmp_path):
    build().save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(entries | change))
    with pytest.raises(InputError, match=one_line_with(words)):
        load(tmp_path)


def test_a_config_of_timm_gives_what_it_says_and_refuses_smoothing(tmp_path):
    torch.save(timm_resnet(BasicBlock).state_dict(), tmp_path / "pytorch_model.bin")
    shown = dict(input_size=[3, 96, 160], mean=[0.25, 0.5, 0.75], std=[0.5, 0.5, 0.5], interpolation="bicubic")
    entries = dict(architecture="resnet18", num_classes=CLASSES, global_pool="avg", pretrained_cfg=shown)
    (tmp_path / "config.json").write_text(json.dumps(entries))
    model = load(tmp_path)
    assert (model.config.img_size, model.preprocessing.mean, model.preprocessing.interpolation) == (
        (96, 160), (0.25, 0.5, 0.75), "bicubic")
    (tmp_path / "config.json").write_text(json.dumps(entries | dict(architecture="resnetblur18")))
    with pytest.raises(InputError, match=one_line_with("'resnetblur18', which blurs its maps")):
        load(tmp_path)


@pytest.mark.parametrize("arguments", [dict(output_stride=8), dict(aa_layer="blurpool"), dict(norm_layer="groupnorm")])
def test_a_config_of_timm_refuses_a_resnet_that_computes_otherwise(arguments, tmp_path):
    torch.save(timm_resnet(BasicBlock).state_dict(), tmp_path / "pytorch_model.bin")
    entries = dict(architecture="resnet18", num_classes=CLASSES, global_pool="avg")
    for given in (dict(output_stride=32, aa_layer=None, norm_layer="batchnorm2d"), arguments):
        (tmp_path / "config.json").write_text(json.dumps(entries | dict(model_args=given)))
        if given is arguments:
            with pytest.raises(InputError, match=one_line_with(f"specifies {next(iter(given))}=")):
                load(tmp_path)
        else:
            load(tmp_path)


@pytest.mark.parametrize(("build", "words"), [
    (lambda: timm_resnet(BasicBlock), "resnetblur"),
    (lambda: transformers_resnet("basic"), "downsample_in_first_stage")])
def test_load_says_what_the_names_of_a_resnet_do_not_show(build, words, tmp_path):
    theirs = build()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.warns(Assumption, match=one_line_with(words)):
        model = load(tmp_path)
    with pytest.warns(Assumption, match=one_line_with(words)):
        load_checkpoint(model, tmp_path)
    config = dict(architecture="resnet18", num_classes=CLASSES, global_pool="avg")
    if words != "resnetblur":
        config = theirs.config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(Assumption) as caught:
        load(tmp_path)
    assert not [warning for warning in caught if words in str(warning.message)]


@pytest.mark.parametrize("kind", ["timm, basic", "timm's ConvNeXt"])
def test_what_a_cnns_file_does_not_say_is_said_to_be_assumed(kind, tmp_path):
    build, names, _ = FILES[kind]
    _, path = write(build, names, tmp_path)
    with pytest.warns(Assumption, match=one_line_with("assumed: img_size=224, ImageNet's mean and std")):
        load(path)


# ---- Used as any of our models


@pytest.mark.parametrize("kind", ["timm, bottleneck", "timm's ConvNeXt"])
def test_public_cnns_save_and_explain(kind, tmp_path):
    build, names, _ = FILES[kind]
    _, path = write(build, names, tmp_path)
    model = load(path, img_size=64, n_classes=3)
    assert model.preprocessing.img_size == model.config.img_size == 64
    torch.nn.init.normal_(model.head.weight)
    save_model(model, tmp_path / "ours.pt")
    again = load(tmp_path / "ours.pt")
    assert again.config == model.config
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), model(images))
    assert explain(again, images, "grad_cam").saliency.shape == (2, 2, 2)
    for method in set(METHODS) - {"grad_cam"}:
        with pytest.raises(InputError, match=one_line_with("has no attention maps; use a ViT, or Grad-CAM")):
            explain(again, images, method)


# ---- By name, from the command line; no network


ENTRIES = {"resnet18": (ConvNet, dict(widths=(8, 8, 12, 16), depths=(1, 1, 1, 1), img_size=32)),
           "resnet50": (ConvNet, dict(widths=(4, 4, 6, 8), depths=(1, 1, 1, 1), img_size=32)),
           "convnext_tiny": (ConvNeXt, dict(widths=(8, 12, 16, 20), depths=(1, 1, 2, 1), img_size=32))}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put small random CNNs with these public names into torch.hub's folder."""
    folder, entries, models = tmp_path / "hub" / "checkpoints", {}, {}
    folder.mkdir(parents=True)
    for name, (model_class, config) in ENTRIES.items():
        entries[name] = replace(PUBLIC[name], checksum=None, config=config)
        models[name] = randomised(model_class(**entries[name].arguments)).float()
        state = models[name].state_dict()
        names = to_torchvision_resnet if model_class is ConvNet else to_torchvision_convnext
        torch.save(names(state), folder / entries[name].url.rsplit("/", 1)[1])
    for module in (pretrained, checkpoints):
        monkeypatch.setattr(module, "PUBLIC", entries)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return models


def to_torchvision_resnet(state):
    pairs = [(r"^stem\.0", "conv1"), (r"^stem\.1", "bn1"), (r"^head", "fc"), (r"shortcut", "downsample")]
    named = {}
    for name, tensor in state.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        named[re.sub(r"^stages\.(\d)", lambda found: f"layer{int(found[1]) + 1}", name)] = tensor
    return named


def to_torchvision_convnext(state):
    places = {"conv_dw": "block.0", "norm": "block.2", "mlp.fc1": "block.3", "mlp.fc2": "block.5"}
    named = {}
    for name, tensor in state.items():
        name = re.sub(r"^stem\.", "features.0.", re.sub(r"^head\.", "classifier.2.", re.sub(
            r"^norm\.", "classifier.0.", name)))
        name = re.sub(r"^stages\.(\d)\.downsample", lambda found: f"features.{2 * int(found[1])}", name)
        if found := re.match(r"stages\.(\d)\.blocks\.(\d)\.(.*)\.(\w+)$", name):
            stage, block, part, kind = found.groups()
            place = f"{places.get(part)}.{kind}" if part != "ls" else "layer_scale"
            name, tensor = f"features.{2 * int(stage) + 1}.{block}.{place}", tensor.view(-1, 1, 1) if part == "ls" \
                else tensor
        named[name] = tensor
    return named


@pytest.mark.parametrize("name", ENTRIES)
def test_load_gives_a_public_cnn_ready_to_use(name, hub):
    model = load(name)
    state = hub[name].state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert model.config == hub[name].config
    assert (len(model.preprocessing.class_names), model.preprocessing.mean) == (1000, IMAGENET_MEAN)
    assert load(name, img_size=48).preprocessing.img_size == 48
    with pytest.raises(InputError, match=one_line_with("stem_stride=1 does not match")):
        load(name, stem_stride=1)


@pytest.mark.parametrize("name", ENTRIES)
def test_train_fine_tunes_a_public_cnn(name, hub, photos, untested, tmp_path):
    words = ["--data-dir", photos, "--pretrained", name, "--layer-decay", 0.5, "--steps", 2, "--batch-size", 8]
    made = prepared(*words[:-4], "--output-dir", tmp_path / "prepared")
    assert (made.entries["options"]["recipe"], made.name) == ("fine_tuning", name)
    scales = made.trainer.config.lr_scales
    assert [scales[key] for key in ("stem.0.weight", "head.weight")] == [0.5 ** 5, 1.0]
    train(tmp_path / "run", *words)
    model, start = load(tmp_path / "run" / "best.pt"), hub[name].state_dict()
    assert (type(model), model.preprocessing.class_names) == (type(hub[name]), ["blue", "red"])
    moved = {key for key, tensor in model.state_dict().items()
             if tensor.shape != start[key].shape or not torch.equal(tensor, start[key])}
    assert moved >= {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ENTRIES)
def test_linear_probe_of_a_public_cnn_keeps_its_backbone_and_statistics(name, hub, photos, untested, tmp_path):
    train(tmp_path / "run", "--data-dir", photos, "--pretrained", name, "--freeze-backbone", "--epochs", 2)
    model, start = load(tmp_path / "run" / "best.pt"), hub[name].state_dict()
    assert {key for key, tensor in model.state_dict().items() if tensor.shape != start[key].shape
            or not torch.equal(tensor, start[key])} == {"head.weight", "head.bias"}
    assert model.head.weight.any()


def test_trainer_keeps_the_statistics_of_a_frozen_cnn(hub, photos):
    model = freeze_backbone(load("resnet18", n_classes=2))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    Trainer(model, "cpu").train([(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))], n_steps=2, progress=False)
    assert {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])} == {
        "head.weight", "head.bias"}


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_predict_and_inspect_know_the_public_cnns(name, hub, photos, capsys):
    train_vit.main(["predict", "--checkpoint", name, str(photos / "red" / "1.jpg")])
    assert re.search(r"1\.jpg +\S.* \d+\.\d%", capsys.readouterr().out)
    train_vit.main(["inspect"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{name} "))
    assert "BSD-3-Clause, torchvision, IMAGENET1K_V1" in row
    path = next(Path(torch.hub.get_dir()).rglob(f"{name}*.pth"))
    train_vit.main(["inspect", str(path)])
    assert f"    model = {type(hub[name]).__name__}(" in capsys.readouterr().out


def test_fields_of_a_public_convnext_grow_by_stage(hub):
    model = load("convnext_tiny")
    assert [theoretical_receptive_field(model, depth) for depth in range(5)] == [
        (side, side) for side in (4, 4 + 6 * 4, 28 + 4 + 6 * 8, 80 + 8 + 2 * 6 * 16, 280 + 16 + 6 * 32)]
