"""Public CNNs: each library's own model, random throughout and in its own names, opens and answers as there."""

import re

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import load_file
from timm.models.resnet import BasicBlock, Bottleneck
from torchvision.models.convnext import CNBlockConfig

from vit_bridge.analysis.explanations import METHODS, explain
from vit_bridge.models import ConvNet, ConvNeXt, VisionTransformer
from vit_bridge.weights.checkpoints import describe_checkpoint, load, load_checkpoint, save_model
from vit_model import InputError

WIDTHS, DEPTHS, CLASSES = (6, 10, 14, 18), (1, 2, 1, 1), 5


def one_line_with(text):
    return rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z"


def randomised(model):
    """In float64 and eval mode, every parameter and statistic random numbers of float32, which any file holds."""
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
    """As narrow as timm makes them: 64 channels come from the stem."""
    return timm.models.ResNet(block, DEPTHS, channels=(64, 6, 8, 10), num_classes=CLASSES, **options)


def timm_convnext(**options):
    return timm.models.ConvNeXt(num_classes=CLASSES, depths=DEPTHS, dims=WIDTHS, **options)


def transformers_resnet(kind):
    scale = 4 if kind == "bottleneck" else 1
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=6, hidden_sizes=[scale * width for width in WIDTHS], depths=list(DEPTHS), layer_type=kind,
        num_labels=CLASSES))


def transformers_convnext():
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(
        hidden_sizes=list(WIDTHS), depths=list(DEPTHS), num_labels=CLASSES, layer_norm_eps=1e-6))


def official(state):
    """ConvNeXt's names in its paper's code, which no package writes."""
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
    """The names of the ResNets for CIFAR-10 in github.com/kuangliu/pytorch-cifar."""
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
    "transformers ConvNext": (transformers_convnext, None, ConvNeXt),
}


def write(build, names, folder):
    """(the library's model, the path of its file)."""
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
    "ResNeXt": (lambda: timm_resnet(Bottleneck, cardinality=2, base_width=32), "a ResNeXt: its 3 x 3 convolutions"),
    "wide ResNet": (lambda: timm_resnet(Bottleneck, base_width=128), "a wide ResNet"),
    "ResNet-D": (lambda: timm_resnet(BasicBlock, stem_type="deep", avg_down=True), "ResNet-D"),
    "SE": (lambda: timm_resnet(BasicBlock, block_args=dict(attn_layer="se")), "weigh their channels"),
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
    with pytest.raises(InputError, match=one_line_with("is for another architecture")):
        load_checkpoint(model, tmp_path / "m.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_cnn_with_missing_blocks_is_no_whole_one(tmp_path):
    state = timm_resnet(BasicBlock).state_dict()
    torch.save({name: tensor for name, tensor in state.items() if not name.startswith("layer2.0.")}, tmp_path / "m.pth")
    with pytest.raises(InputError, match=one_line_with("no whole CNN")):
        load(tmp_path / "m.pth")


# ---- Used as any model of ours


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
        with pytest.raises(InputError, match=one_line_with("has no attention maps; give a ViT, or ask for Grad-CAM")):
            explain(again, images, method)
