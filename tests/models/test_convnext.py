import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torchvision.models import convnext_tiny
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.convnext import ConvNeXt as TorchvisionConvNeXt

from vit_bridge.models import (
    ConvNeXt,
    build_model,
    create_convnext_base,
    create_convnext_small,
    create_convnext_tiny,
)
from vit_bridge.models.convnext import ConvNeXtBlock
from vit_bridge.models.protocol import layer_groups
from vit_bridge.training.optimizers import hidden_matrices, parameter_groups
from vit_model import InputError, freeze_backbone

WIDTHS, DEPTHS = (6, 10, 10, 14), (2, 1, 3, 1)  # two stages of one width: the second halves the map nevertheless
SMALL = dict(img_size=32, n_classes=5, widths=WIDTHS, depths=DEPTHS)


def randomised(model):
    """In float64 and eval mode, every parameter random, so that no zero hides anything."""
    torch.manual_seed(3)
    for parameter in model.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def one_line_with(text):
    return rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z"


def renamed(state, pairs):
    return {next((re.sub(pattern, new, name) for pattern, new in pairs if re.fullmatch(pattern, name)), name): tensor
            for name, tensor in state.items()}


# ---- Against the libraries


def timm_model(in_channels):
    return timm.models.ConvNeXt(in_chans=in_channels, num_classes=5, depths=DEPTHS, dims=WIDTHS)


def under_timm_names(w):
    return renamed(w, [(r"norm\.(\w+)", r"head.norm.\1"), (r"head\.(\w+)", r"head.fc.\1"),
                       (r"(.*)\.ls\.gamma", r"\1.gamma")])


def torchvision_model(in_channels):
    settings = [CNBlockConfig(*row) for row in zip(WIDTHS, (*WIDTHS[1:], None), DEPTHS, strict=True)]
    model = TorchvisionConvNeXt(settings, num_classes=5)
    model.features[0][0] = nn.Conv2d(in_channels, WIDTHS[0], 4, 4)
    return model


def under_torchvision_names(w):
    state = renamed(w, [(r"norm\.(\w+)", r"classifier.0.\1"), (r"head\.(\w+)", r"classifier.2.\1"),
                        (r"stem\.(\d)\.(\w+)", r"features.0.\1.\2")])
    places = {"conv_dw": "block.0", "norm": "block.2", "mlp.fc1": "block.3", "mlp.fc2": "block.5"}
    named = {}
    for name, tensor in state.items():
        if found := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.*)\.(\w+)", name):
            stage, block, part, kind = found.groups()
            name = f"features.{2 * int(stage) + 1}.{block}.{places.get(part)}.{kind}"
            if part == "ls":
                name, tensor = f"features.{2 * int(stage) + 1}.{block}.layer_scale", tensor[:, None, None]
        elif found := re.fullmatch(r"stages\.(\d)\.downsample\.(.*)", name):
            name = f"features.{2 * int(found[1])}.{found[2]}"
        named[name] = tensor
    return named


def transformers_model(in_channels):
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(
        num_channels=in_channels, hidden_sizes=list(WIDTHS), depths=list(DEPTHS), num_labels=5, layer_norm_eps=1e-6))


def under_transformers_names(w):
    block = r"stages\.(\d)\.blocks\.(\d+)\."
    inside = r"convnext.encoder.stages.\1.layers.\2."
    return renamed(w, [
        (r"stem\.0\.(\w+)", r"convnext.embeddings.patch_embeddings.\1"),
        (r"stem\.1\.(\w+)", r"convnext.embeddings.layernorm.\1"),
        (r"stages\.(\d)\.downsample\.(.*)", r"convnext.encoder.stages.\1.downsampling_layer.\2"),
        (block + r"conv_dw\.(\w+)", inside + r"dwconv.\3"), (block + r"norm\.(\w+)", inside + r"layernorm.\3"),
        (block + r"mlp\.fc(\d)\.(\w+)", inside + r"pwconv\3.\4"),
        (block + r"ls\.gamma", inside + "layer_scale_parameter"),
        (r"norm\.(\w+)", r"convnext.layernorm.\1"), (r"head\.(\w+)", r"classifier.\1")])


LIBRARIES = {"timm": (timm_model, under_timm_names), "torchvision": (torchvision_model, under_torchvision_names),
             "transformers": (transformers_model, under_transformers_names)}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("in_channels", "size"), [(3, (64, 64)), (2, (39, 97))])
def test_convnext_is_that_of_the_libraries_number_for_number(library, in_channels, size):
    make, under_their_names = LIBRARIES[library]
    ours = randomised(ConvNeXt(**SMALL, in_channels=in_channels))
    theirs = make(in_channels).double().eval()
    theirs.load_state_dict(under_their_names(ours.state_dict()))
    images = torch.randn(2, in_channels, *size).double()
    logits = ours(images), theirs(images)
    logits = [getattr(output, "logits", output) for output in logits]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)
    for each in logits:
        (each * torch.linspace(-1, 1, 5)).sum().backward()
    wanted = under_their_names({name: p.grad for name, p in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        assert (parameter.grad - wanted[name]).norm() <= 1e-9 * parameter.grad.norm(), name


@pytest.mark.parametrize(("name", "n_parameters"), [
    ("convnext_tiny", 28_589_128), ("convnext_small", 50_223_688), ("convnext_base", 88_591_464),
    ("convnext_large", 197_767_336), ("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032),
    ("resnet101", 44_549_160), ("resnet152", 60_192_808)])
def test_named_cnns_have_the_published_parameters(name, n_parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(name).parameters()) == n_parameters


@pytest.mark.parametrize(("create", "n_parameters"), [
    (create_convnext_tiny, 28_589_128), (create_convnext_small, 50_223_688), (create_convnext_base, 88_591_464)])
def test_create_convnext_builds_the_papers_sizes(create, n_parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in create().parameters()) == n_parameters
    with pytest.raises(InputError, match=one_line_with("argument 'width' is unknown")):
        create(width=8)


def test_convnext_drops_more_of_deeper_blocks_as_torchvision_does():
    ours = ConvNeXt(drop_path=0.1)
    theirs = convnext_tiny(weights=None)  # its own rate is 0.1
    rates = [module.p for module in theirs.modules() if type(module).__name__ == "StochasticDepth"]
    assert [block.drop_path.rate for stage in ours.stages for block in stage.blocks] == pytest.approx(rates)
    assert rates[-1] == pytest.approx(0.1)


def test_convnext_starts_as_torchvisions_does():
    torch.manual_seed(0)
    ours, theirs = ConvNeXt(), convnext_tiny(weights=None)
    state, wanted = under_torchvision_names(ours.state_dict()), theirs.state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {name: t.shape for name, t in wanted.items()}
    for name, tensor in wanted.items():
        assert state[name].mean().item() == pytest.approx(tensor.mean().item(), abs=2e-3), name
        if tensor.ndim > 1 and tensor.numel() > 10_000:
            assert state[name].std().item() == pytest.approx(tensor.std().item(), rel=0.05), name


# ---- By itself


def test_convnext_block_matches_hand_computation():
    block = randomised(ConvNeXtBlock(4))
    x = torch.randn(2, 4, 5, 9).double()
    rows = torch.stack([F.conv2d(x[:, i:i + 1], block.conv_dw.weight[i:i + 1], block.conv_dw.bias[i:i + 1], padding=3)
                        for i in range(4)], dim=2)[:, 0].movedim(1, 3)  # (B, h, w, C)
    mean, variance = rows.mean(dim=3, keepdim=True), rows.var(dim=3, keepdim=True, unbiased=False)
    rows = (rows - mean) / (variance + 1e-6).sqrt() * block.norm.weight + block.norm.bias
    rows = F.gelu(rows @ block.mlp.fc1.weight.T + block.mlp.fc1.bias) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    torch.testing.assert_close(block(x), x + (rows * block.ls.gamma).movedim(3, 1))


def test_fresh_convnext_blocks_are_nearly_the_identity():
    block, x = ConvNeXtBlock(8), torch.randn(2, 8, 5, 5)
    assert 0 < (block(x) - x).abs().max() < 1e-6


@pytest.mark.parametrize(("stem_stride", "shape"), [(1, (5, 2)), (2, (2, 1))])
def test_convnext_features_are_the_map_at_total_stride(stem_stride, shape):
    model = ConvNeXt(**SMALL, stem_stride=stem_stride).eval()
    assert model.forward_features(torch.randn(2, 3, 41, 23)).shape == (2, 14, *shape)


def test_convnext_without_classes_gives_its_pooled_features():
    model = randomised(ConvNeXt(**{**SMALL, "n_classes": 0}))
    images = torch.randn(3, 3, 32, 40).double()
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(model(images), features)
    assert features.shape == (3, model.n_features)


def test_convnext_copies_and_rebuilds_give_the_same_logits():
    model = randomised(ConvNeXt(**{**SMALL, "widths": [4, 6], "depths": [1, 2], "layer_scale": None}))
    again = ConvNeXt(**vars(model.config)).double().eval()
    again.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 16, 24).double()
    for twin in (again, copy.deepcopy(model)):
        assert twin.config == model.config
        assert torch.equal(twin(images), model(images))


def test_convnext_groups_of_layers_and_of_optimisers():
    model = ConvNeXt(**SMALL)
    groups = layer_groups(model)
    assert groups["stem.0.weight"] == 0
    assert [groups[f"stages.{i}.blocks.0.conv_dw.weight"] for i in range(4)] == [1, 2, 3, 4]
    assert {groups[name] for name in ("norm.weight", "head.weight", "head.bias")} == {5}
    decayed = {id(p) for group in parameter_groups(model, 0.1) if group["weight_decay"] for p in group["params"]}
    assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if id(p) in decayed} == {"weight"}
    assert not any("norm" in name or ".ls." in name or "downsample.0" in name
                   for name, p in model.named_parameters() if id(p) in decayed)
    assert id(model.stages[0].blocks[0].conv_dw.weight) in decayed
    muon = {name for name, p in model.named_parameters() if p in hidden_matrices(model)}
    assert muon == {name for name, p in model.named_parameters()
                    if re.search(r"fc\d\.weight|downsample\.1\.weight", name)}
    assert {name for name, p in freeze_backbone(model).named_parameters() if p.requires_grad} == {"head.weight",
                                                                                                "head.bias"}


@pytest.mark.parametrize(("arguments", "value"), [
    (dict(widths=(3, 5)), "(3, 5)"), (dict(widths=3), "widths 3"), (dict(widths=(3, 0, 1, 1)), "widths 0"),
    (dict(drop_path=1.0), "drop_path 1.0"),
    (dict(layer_scale=-1), "layer_scale -1"), (dict(norm_eps=0), "norm_eps 0"), (dict(stem_stride=0), "stem_stride 0"),
    (dict(img_size=31), "images of 31x31"), (dict(n_classes=-1), "n_classes -1"), (dict(in_channels=0), "in_channels")])
def test_convnext_refuses_bad_arguments_naming_the_value(arguments, value):
    with pytest.raises(InputError, match=one_line_with(value)):
        ConvNeXt(**{**SMALL, **arguments})


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (3, 32, 32), (2, 3, 32, 31)])
def test_convnext_refuses_images_that_do_not_fit(shape):
    with pytest.raises(InputError, match=one_line_with("x".join(map(str, shape[2:])) if shape[-1] == 31 else shape)):
        ConvNeXt(**SMALL)(torch.zeros(shape))
