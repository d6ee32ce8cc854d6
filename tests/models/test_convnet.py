import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import Bottleneck, ResNet

from vit_bridge.models.convnet import BottleneckBlock, ConvNet, ConvolutionAsAttention, PooledStage, ResidualBlock
from vit_bridge.models.hybrid import ConvStem, HybridCNNViT, PooledStem
from vit_bridge.models.initialisation import whiten_first_layer, whitening_filters
from vit_bridge.models.registry import build_model
from vit_model import InputError, TransformerBlock, VisionTransformer, freeze_backbone, resize_positions

HYBRID = dict(n_classes=11, embed_dim=12, depth=2, n_heads=3, img_size=(20, 28), patch_size=4)  # 5 x 7 tokens
CONVNET = dict(n_classes=11, in_channels=2, widths=(3, 5, 7), depths=(2, 1, 1), stem_stride=2)


def randomised(model):
    """The model in eval mode with every parameter and running mean random, so that no zero hides anything."""
    torch.manual_seed(5)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim == 1:
            tensor.normal_(std=0.3)
    return model.eval()


def one_line_with(text):
    return rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z"


# ---- ConvNet


@pytest.fixture(scope="module", params=["residual", "bottleneck"])
def twins(request):
    """ConvNet with its default arguments and torchvision's ResNet-18, or both with bottlenecks as in ResNet-50 but
    fewer, with the same random weights."""
    theirs = resnet18() if request.param == "residual" else ResNet(Bottleneck, [2, 1, 3, 1])
    depths = (2, 2, 2, 2) if request.param == "residual" else (2, 1, 3, 1)
    ours, theirs = randomised(ConvNet(depths=depths, block=request.param).double()), theirs.double().eval()
    values = ours.state_dict().values()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    return ours, theirs


def test_convnet_has_the_parameters_of_resnet18():
    assert sum(p.numel() for p in ConvNet().parameters()) == 11_689_512


def test_convnet_is_torchvisions_resnet_number_for_number(twins):
    images = torch.randn(2, 3, 64, 64).double()
    logits, gradients = [], []
    for model in twins:
        logits.append(model(images))
        (logits[-1] * torch.linspace(-1, 1, 1000)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("size", [(64, 64), (37, 61), (7, 129)])
def test_convnet_takes_any_size_as_resnet_does(twins, size):
    images = torch.randn(1, 3, *size).double()
    with torch.no_grad():
        torch.testing.assert_close(*(model(images) for model in twins), rtol=1e-9, atol=1e-9)


def test_convolutions_start_he_normal_by_fan_out():
    torch.manual_seed(0)
    for convolution in (ConvNet().stages[3][1].conv2, ConvStem(32, 4, 3, 512).proj[3]):
        assert convolution.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
        assert convolution.weight.abs().max() > 3 * convolution.weight.std()  # normal, not uniform


def test_residual_block_matches_hand_computation():
    block = randomised(ResidualBlock(3, 5, stride=2))
    x = torch.randn(2, 3, 7, 11)

    def normalised(y, norm):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return (y - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]

    y = normalised(F.conv2d(x, block.conv1.weight, stride=2, padding=1), block.bn1).relu()
    y = normalised(F.conv2d(y, block.conv2.weight, padding=1), block.bn2)
    shortcut = normalised(F.conv2d(x[:, :, ::2, ::2], block.shortcut[0].weight), block.shortcut[1])
    torch.testing.assert_close(block(x), (y + shortcut).relu())


@pytest.mark.parametrize(("channels", "stride", "identity"), [(3, 1, True), (5, 1, False), (3, 2, False)])
def test_residual_block_projects_shortcut_only_where_shape_changes(channels, stride, identity):
    assert isinstance(ResidualBlock(3, channels, stride).shortcut, nn.Identity) is identity


@pytest.mark.parametrize(("in_channels", "stride", "identity"), [(20, 1, True), (5, 1, False), (20, 2, False)])
def test_bottleneck_gives_four_times_its_channels(in_channels, stride, identity):
    block = BottleneckBlock(in_channels, 5, stride)
    assert isinstance(block.shortcut, nn.Identity) is identity
    assert block.conv2.stride == (stride, stride)
    assert block(torch.randn(2, in_channels, 7, 4)).shape == (2, 20, -(-7 // stride), 4 // stride)


def test_convnet_of_bottlenecks_says_what_its_head_reads():
    model = ConvNet(**{**CONVNET, "block": "bottleneck"}).eval()
    features = model.forward_features(torch.randn(2, 2, 16, 16))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.n_features) == (2, 28)
    assert model.head.in_features == 28


@pytest.mark.parametrize(("stem_stride", "shape"), [(1, (11, 6)), (2, (6, 3)), (4, (3, 2))])
def test_convnet_features_are_the_map_at_total_stride(stem_stride, shape):
    model = ConvNet(**{**CONVNET, "stem_stride": stem_stride}).eval()
    assert model.forward_features(torch.randn(2, 2, 41, 23)).shape == (2, 7, *shape)


def test_convnet_forward_is_the_head_of_the_mean_map():
    model = randomised(ConvNet(**CONVNET))
    images = torch.randn(3, 2, 13, 19)
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.flatten(2).mean(dim=2))
    assert torch.equal(model(images), model.forward_head(features))
    assert torch.equal(model(images), model.head(model.forward_head(features, pre_logits=True)))


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
def test_convnet_refuses_to_take_batch_statistics_of_one_place(stem_stride):
    model = ConvNet(**{**CONVNET, "stem_stride": stem_stride})
    side = 4 * stem_stride
    with pytest.raises(InputError, match=one_line_with(f"one image of {side}x{side} pixels leaves one value")):
        model(torch.randn(1, 2, side, side))
    assert model(torch.randn(1, 2, side, side + 1)).shape == (1, 11)
    assert model(torch.randn(2, 2, side, side)).shape == (2, 11)
    assert model.eval()(torch.randn(1, 2, side, side)).shape == (1, 11)


def test_convnet_without_classes_gives_its_pooled_features():
    model = ConvNet(**{**CONVNET, "n_classes": 0}).eval()
    images = torch.randn(3, 2, 13, 19)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))
    assert model(images).shape == (3, 7)


# ---- HybridCNNViT


def test_hybrid_builds_and_runs_as_in_the_readme():
    model = HybridCNNViT(n_classes=10, embed_dim=384, depth=6).eval()
    assert (model.config.img_size, model.config.patch_size, model.config.n_heads) == (224, 16, 6)
    assert (len(model.blocks), model.patch_embed.grid_size) == (6, (14, 14))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 10)
        assert model.forward_features(torch.randn(1, 3, 224, 224)).shape == (1, 197, 384)


@pytest.mark.parametrize(("embed_dim", "heads"), [(32, 1), (64, 1), (128, 2), (192, 3), (768, 12)])
def test_hybrid_has_one_head_per_64_channels(embed_dim, heads):
    with torch.device("meta"):
        assert HybridCNNViT(embed_dim=embed_dim, depth=1).blocks[0].attn.n_heads == heads


def test_hybrid_is_a_vit_except_for_its_stem():
    model = HybridCNNViT(**HYBRID, pool="mean", position="sincos", dropout=0.1)
    assert isinstance(model, VisionTransformer)
    assert isinstance(model.patch_embed, ConvStem)
    assert [type(block) for block in model.blocks] == [TransformerBlock] * 2
    arguments = dict(vars(model.config))
    assert arguments.pop("stem") == "strided"
    vit = VisionTransformer(**arguments)
    for name in ("blocks", "norm", "head"):
        getattr(vit, name).load_state_dict(getattr(model, name).state_dict())
    vit.patch_embed = model.patch_embed
    images = torch.randn(2, 3, 20, 28)
    assert torch.equal(vit.eval()(images), model.eval()(images))


def test_conv_stem_matches_two_convolutions_by_hand():
    stem = randomised(ConvStem((12, 20), 4, 3, 14))
    first, norm, _, last = stem.proj
    images = torch.randn(2, 3, 12, 20)
    x = F.conv2d(images, first.weight, stride=2, padding=1)
    x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
    x = F.conv2d(x, last.weight, last.bias, stride=2, padding=1)
    assert x.shape == (2, 14, 3, 5)
    by_hand = torch.stack([x[:, :, row, column] for row in range(3) for column in range(5)], dim=1)
    torch.testing.assert_close(stem(images), by_hand)


@pytest.mark.parametrize(("patch_size", "channels"), [(2, [48]), (4, [24, 48]), (8, [12, 24, 48]),
                                                      (16, [6, 12, 24, 48]), (32, [3, 6, 12, 24, 48])])
def test_conv_stem_channels_double_up_to_embed_dim(patch_size, channels):
    stem = ConvStem((64, 96), patch_size, 5, 48)
    assert [m.out_channels for m in stem.proj if isinstance(m, nn.Conv2d)] == channels
    assert [m.num_features for m in stem.proj if isinstance(m, nn.BatchNorm2d)] == channels[:-1]
    assert isinstance(stem.proj[-1], nn.Conv2d)
    biased = [m.bias is not None for m in stem.proj if isinstance(m, nn.Conv2d)]
    assert biased == [False] * (len(channels) - 1) + [True]
    grid = (64 // patch_size, 96 // patch_size)
    assert stem.eval()(torch.zeros(2, 5, 64, 96)).shape == (2, grid[0] * grid[1], 48)
    assert (stem.grid_size, stem.n_patches) == (grid, grid[0] * grid[1])


def seen_by(stem, row, column):
    """First and last row and column of the pixels on which a token depends."""
    images = torch.randn(1, 3, *stem.img_size, requires_grad=True)
    stem(images)[0, row * stem.grid_size[1] + column].sum().backward()
    rows, columns = images.grad[0].abs().sum(dim=0).nonzero().T
    return rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()


@pytest.mark.parametrize("side", [2, 4, 8])
def test_conv_stem_tokens_see_two_patches_minus_a_pixel(side):
    stem = randomised(ConvStem((5 * side, 7 * side), side, 3, 64))
    top, bottom, left, right = seen_by(stem, 2, 3)
    assert (top, bottom) == (2 * side - (side - 1), 2 * side + side - 1)
    assert (left, right) == (3 * side - (side - 1), 3 * side + side - 1)
    assert right - left + 1 == 2 * side - 1
    assert seen_by(stem, 2, 4)[2] <= right


def test_resize_positions_moves_a_hybrid():
    model = randomised(HybridCNNViT(**HYBRID))
    assert resize_positions(model, (12, 44)) is model
    assert model.config.img_size == model.patch_embed.img_size == (12, 44)
    assert (model.patch_embed.grid_size, model.patch_embed.n_patches) == ((3, 11), 33)
    assert model.forward_features(torch.randn(2, 3, 12, 44)).shape == (2, 34, 12)
    with pytest.raises(InputError, match=one_line_with("20x28")):
        model(torch.randn(2, 3, 20, 28))


# ---- Both


@pytest.mark.parametrize(("model_class", "arguments"), [(HybridCNNViT, HYBRID), (ConvNet, CONVNET)])
def test_convnet_and_hybrid_copies_and_rebuilds_give_the_same_logits(model_class, arguments):
    model = randomised(model_class(**arguments))
    images = torch.randn(2, model.config.in_channels, 20, 28)
    again = model_class(**vars(model.config)).eval()
    again.load_state_dict(model.state_dict())
    for twin in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config == model.config
        assert torch.equal(twin(images), model(images))


@pytest.mark.parametrize(("model_class", "arguments"), [(HybridCNNViT, HYBRID), (ConvNet, CONVNET)])
def test_convnet_and_hybrid_forward_stores_nothing_on_any_module(model_class, arguments):
    model = randomised(model_class(**arguments))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    model(torch.randn(2, model.config.in_channels, 20, 28))
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert {name: v.keys() for name, v in before.items()} == {name: v.keys() for name, v in after.items()}
    assert all(after[name][key] is value for name, values in before.items() for key, value in values.items())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("model_class", "arguments"), [(HybridCNNViT, HYBRID), (ConvNet, CONVNET)])
def test_freeze_backbone_leaves_exactly_the_head(model_class, arguments):
    model = freeze_backbone(model_class(**arguments))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"head.weight", "head.bias"}
    assert model.head.weight.shape[0] == 11


# ---- Bad input


@pytest.mark.parametrize(("build", "value"), [
    (lambda: HybridCNNViT(**{**HYBRID, "patch_size": 12, "img_size": 24}), "patch_size 12"),
    (lambda: HybridCNNViT(**{**HYBRID, "patch_size": 1}), "patch_size 1"),
    (lambda: HybridCNNViT(**{**HYBRID, "patch_size": (4, 2)}), "(4, 2)"),
    (lambda: HybridCNNViT(**{**HYBRID, "patch_size": 16, "img_size": 32}), "embed_dim 12"),
    (lambda: HybridCNNViT(**{**HYBRID, "img_size": 30}), "30x30"),
    (lambda: HybridCNNViT(**{**HYBRID, "pool": "max"}), "'max'"),
    (lambda: HybridCNNViT(embed_dim=131, depth=1), "embed_dim 131"),
    (lambda: ConvStem(20, 4, 3, 13), "embed_dim 13"),
    (lambda: ConvStem(20, 8, 3, 12), "20x20"),
    (lambda: ConvNet(widths=(3, 5)), "(3, 5)"),
    (lambda: ConvNet(widths=(), depths=()), "()"),
    (lambda: ConvNet(widths=(3, 0), depths=(1, 1)), "widths 0"),
    (lambda: ConvNet(widths=(3, 5), depths=(1, 1.5)), "depths 1.5"),
    (lambda: ConvNet(stem_stride=3), "stem_stride 3"),
    (lambda: ConvNet(in_channels=0), "in_channels 0"),
    (lambda: ConvNet(n_classes=-1), "n_classes -1"),
    (lambda: ConvNet(img_size=(32, 0)), "img_size 0")])
def test_convnet_and_hybrid_refuse_bad_arguments_naming_the_value(build, value):
    with pytest.raises(InputError, match=one_line_with(value)):
        build()


@pytest.mark.parametrize(("model", "shape"), [
    (HybridCNNViT(**HYBRID), (2, 1, 20, 28)), (HybridCNNViT(**HYBRID), (3, 20, 28)),
    (ConvNet(**CONVNET), (2, 3, 20, 28)), (ConvNet(**CONVNET), (2, 20, 28))])
def test_convnet_and_hybrid_refuse_images_that_do_not_fit(model, shape):
    with pytest.raises(InputError, match=one_line_with(shape)):
        model(torch.zeros(shape))


@pytest.mark.parametrize(("call", "closest", "command"), [
    (lambda: build_model("resnet_18"), "resnet18", "python train_vit.py --help"),
    (lambda: build_model("hybrid", n_class=3), "n_classes", "help(HybridConfig)")])
def test_build_model_names_the_closest_choice_and_what_lists_all(call, closest, command):
    words = rf"the closest choices are {closest}, [^\n]*; list all \d+ with {re.escape(command)}\Z"
    with pytest.raises(InputError, match=words):
        call()


# ---- Pooled stages and whitening --------------------------------------------------------------------------


POOLED = dict(img_size=22, in_channels=2, n_classes=3, widths=(5, 7), depths=(1, 2), stem_stride=1, block="pooled")


def test_pooled_stage_matches_hand_computation():
    stage = randomised(PooledStage(3, 5, depth=1)).eval()
    x = torch.randn(2, 3, 7, 11)
    first, _, norm1, _, second, norm2, _ = stage
    y = F.max_pool2d(F.conv2d(x, first.weight, padding=1), 2)  # (2, 5, 3, 5)
    y = F.gelu((y - norm1.running_mean[:, None, None]) / (norm1.running_var + norm1.eps).sqrt()[:, None, None]
               * norm1.weight[:, None, None] + norm1.bias[:, None, None])
    y = F.conv2d(y, second.weight, padding=1)
    y = F.gelu((y - norm2.running_mean[:, None, None]) / (norm2.running_var + norm2.eps).sqrt()[:, None, None]
               * norm2.weight[:, None, None] + norm2.bias[:, None, None])
    torch.testing.assert_close(stage(x), y)
    assert y.shape == (2, 5, 3, 5)


def test_pooled_convnet_halves_at_every_stage():
    model = ConvNet(**POOLED).eval()
    assert model.forward_features(torch.randn(2, 2, 22, 27)).shape == (2, 7, 5, 6)  # 21 and 26, halved twice
    assert [type(stage) for stage in model.stages] == [PooledStage] * 2
    wide = ConvNet(**{**POOLED, "stem_stride": 4, "img_size": 88}).eval()
    assert wide.stem[0].weight.shape == (64, 2, 4, 4)
    assert wide.forward_features(torch.randn(1, 2, 88, 88)).shape == (1, 7, 5, 5)


def test_pooled_convnet_convolutions_start_as_the_identity():
    model = ConvNet(img_size=22, n_classes=3, widths=(29, 13), depths=(1, 1), stem_stride=1, block="pooled")
    convolutions = [module for module in model.stages.modules() if isinstance(module, nn.Conv2d)]
    assert [(conv.in_channels, conv.out_channels) for conv in convolutions] == [(24, 29), (29, 29), (29, 13), (13, 13)]
    for conv in convolutions:
        kept = min(conv.in_channels, conv.out_channels)
        x = torch.randn(2, conv.in_channels, 5, 7)
        torch.testing.assert_close(conv(x)[:, :kept], x[:, :kept])
    assert convolutions[0].weight[24:].abs().min() > 0
    assert convolutions[0].weight[24:].abs().max() <= (24 * 9) ** -0.5


def test_pooled_stem_gives_one_token_per_patch():
    model = HybridCNNViT(3, 12, 1, 3, (16, 24), 4, 2, stem="pooled").eval()
    assert isinstance(model.patch_embed, PooledStem)
    tokens = model.patch_embed(torch.randn(2, 2, 16, 24))
    assert tokens.shape == (2, 24, 12)
    assert model.patch_embed.grid_size == (4, 6)
    assert model(torch.randn(2, 2, 16, 24)).shape == (2, 3)
    assert HybridCNNViT(**vars(model.config)).config == model.config


def test_pooled_stem_tokens_are_centred_on_their_patch():
    torch.manual_seed(0)
    change = torch.zeros(7, 9)
    for _ in range(13):
        stem = PooledStem((56, 72), 8, 3, 12).eval()
        images = torch.zeros(2, 3, 56, 72)
        images[0, :, 24:32, 32:40] = torch.randn(3, 8, 8)  # the patch in the middle
        first, second = stem(images).detach()
        change += (first - second).abs().sum(1).view(7, 9)
    share = change / change.sum()
    centre = (share.sum(1) @ torch.arange(7.0)).item(), (share.sum(0) @ torch.arange(9.0)).item()
    assert centre == pytest.approx((3, 4), abs=0.25)


def test_whitening_filters_decorrelate_patches():
    torch.manual_seed(0)
    images = F.avg_pool2d(torch.randn(53, 3, 20, 20), 5, stride=1)  # (53, 3, 16, 16), neighbours alike
    filters = whitening_filters(images, 2, floor=0.0)  # (12, 3, 2, 2)
    outputs = F.conv2d(images, filters, stride=2).transpose(0, 1).flatten(1)  # (12, 53 * 64)
    torch.testing.assert_close(outputs @ outputs.T / outputs.shape[1], torch.eye(12), atol=1e-3, rtol=0)
    assert (filters.flatten(1).norm(dim=1).diff() >= 0).all()  # the larger the variance, the shorter; largest first
    raw = F.unfold(images, 2, stride=2).transpose(0, 1).flatten(1)  # the control
    assert (raw @ raw.T / raw.shape[1] - torch.eye(12)).abs().max() > 0.5


def test_whitening_filters_floor_keeps_small_directions_small():
    images = 1e-4 * torch.randn(53, 3, 16, 16)
    outputs = F.conv2d(images, whitening_filters(images, 2), stride=2)
    assert outputs.std() == pytest.approx(1e-4 / 0.1, rel=0.05)


@pytest.mark.parametrize("model", [ConvNet(**POOLED), HybridCNNViT(3, 12, 1, 3, 16, 4, 2, stem="pooled")])
def test_whiten_first_layer_freezes_filters_and_their_negatives(model):
    images = torch.randn(31, 2, 16, 16)
    layer, holds_negatives = whiten_first_layer(model, images).whitening_layer()
    assert holds_negatives
    assert torch.equal(layer.weight[:8], whitening_filters(images, 2))
    assert torch.equal(layer.weight[8:], -layer.weight[:8])
    assert not any(p.requires_grad for p in layer.parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if p is not layer.weight and p is not layer.bias)


@pytest.mark.parametrize("embed_dim", [60, 12])
def test_whiten_first_layer_leaves_a_patch_projection_trainable(embed_dim):
    images, model = torch.randn(97, 3, 12, 16), VisionTransformer((12, 16), 4, 3, 2, embed_dim, 1, 3)
    layer, holds_negatives = whiten_first_layer(model, images).whitening_layer()
    filters = whitening_filters(images, 4)
    assert (holds_negatives, len(filters)) == (False, 48)
    assert torch.equal(layer.weight[:48], filters[:embed_dim])
    if embed_dim > 48:
        assert layer.weight[48:].std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.weight.requires_grad
    assert layer is model.patch_embed.proj


def test_whiten_first_layer_leaves_other_models_unchanged():
    for model in (ConvNet(**CONVNET), HybridCNNViT(**HYBRID)):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert model.whitening_layer() is None
        whiten_first_layer(model, torch.randn(3, 3, 8, 8))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("make", "named"), [
    (lambda: ConvNet(**{**POOLED, "block": "dense"}), "block 'dense'"),
    (lambda: ConvNet(8, 3, 3, (2, 3, 5), (1, 1, 1), 1, "pooled"), "at least 9 pixels"),
    (lambda: ConvNet(16, 3, 3, (2, 3), (1, 1), 4, "pooled").config and ConvNet(15, 3, 3, (2, 3), (1, 1), 4, "pooled"),
     "img_size 15"),
    (lambda: HybridCNNViT(**HYBRID, stem="deep"), "stem 'deep'"),
    (lambda: PooledStem(24, 12, 3, 12), "patch_size 12 cannot be reached by halving")])
def test_convnet_and_hybrid_name_a_wrong_block_or_stem(make, named):
    with pytest.raises(InputError, match=named):
        make()


# ---- A convolution as attention ---------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "bias"), [(1, True), (3, True), (3, False), (5, True)])
def test_convolution_as_attention_equals_its_convolution(k, bias):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 5, k, padding=k // 2, bias=bias), torch.randn(2, 3, 7, 11)
    layer = ConvolutionAsAttention.from_conv(conv)
    y, attention = layer(x, return_attention=True)
    assert (y - conv(x)).abs().max() < 1e-5
    assert torch.equal(layer(x), y)
    assert attention.shape == (k * k, 7 * 11, (7 + k - 1) * (11 + k - 1))
    assert torch.allclose(attention.sum(dim=2), torch.ones(k * k, 77))


def test_convolution_as_attention_heads_each_see_one_neighbour():
    layer = ConvolutionAsAttention(3, 5, 3)
    _, attention = layer(torch.zeros(1, 3, 5, 7), return_attention=True)
    of_pixel = attention[:, 2 * 7 + 3].unflatten(1, (7, 9))  # row 2, column 3, in the padded map row 3, column 4
    for head, (row, column) in enumerate((row, column) for row in (2, 3, 4) for column in (3, 4, 5)):
        assert of_pixel[head, row, column] > 1 - 1e-6


def test_convolution_as_attention_softened_differs_and_learns():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 7, 11)
    layer = ConvolutionAsAttention.from_conv(conv, sharpness=0.5)
    assert (layer(x) - conv(x)).abs().max() > 0.1
    layer(x).square().sum().backward()
    assert layer.places.grad.abs().sum() > 0


@pytest.mark.parametrize(("settings", "words"), [
    (dict(stride=2, padding=1), "stride"), (dict(padding=0), "padding"), (dict(padding=2, dilation=2), "dilation"),
    (dict(padding=1, groups=3), "groups"), (dict(padding=1, padding_mode="reflect"), "padding_mode")])
def test_convolution_as_attention_refuses_unsupported_convolutions(settings, words):
    with pytest.raises(InputError, match=f"{words} .* cannot be written as attention"):
        ConvolutionAsAttention.from_conv(nn.Conv2d(3, 6, 3, **settings))


def test_convolution_as_attention_refuses_an_even_kernel():
    with pytest.raises(InputError, match="kernel_size 4 is even"):
        ConvolutionAsAttention(3, 5, 4)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_a_narrow_projection_are_those_of_float64(stride):
    """float64 does not use oneDNN, whose strided 1 x 1 convolution over few channels writes outside its memory."""
    torch.manual_seed(0)
    block = ResidualBlock(3, 5, stride)
    images = torch.randn(8, 3, 9, 7).contiguous(memory_format=torch.channels_last)
    gradients = []
    for kind in (torch.float32, torch.float64):
        block.zero_grad()
        block.to(kind)(images.to(kind)).square().mean().backward()
        gradients.append({name: p.grad.double() for name, p in block.named_parameters()})
    for name, wanted in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], wanted, rtol=1e-4, atol=1e-6, msg=name)
