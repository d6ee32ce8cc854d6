"""SwinTransformer against torchvision, timm and transformers on shared random weights, and against its definition."""

import ast
import copy
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
import torchvision
import transformers
from parity_checks import differences, randomised, relative_difference, renamed
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from torch import nn
from torch.export import export

from vit_bridge.analysis.cost import count_flops
from vit_bridge.inference import TOLERANCE, export_onnx
from vit_bridge.models import SwinTransformer, create_swin_base, create_swin_nano, create_swin_small, create_swin_tiny
from vit_bridge.models import relative as relative_module
from vit_bridge.models import swin as module
from vit_bridge.models.protocol import layer_groups
from vit_bridge.models.relative import RelativeAttention, relative_position_index, resample_bias_table
from vit_bridge.models.swin import (
    PatchMerging,
    WindowAttention,
    join_windows,
    shift_mask,
    split_windows,
    spread_windows,
    window_places,
)
from vit_bridge.training.optimizers import hidden_matrices, parameter_groups
from vit_model import InputError, freeze_backbone

SMALL = dict(img_size=32, patch_size=4, n_classes=5, embed_dim=8, depths=(2, 3), n_heads=(2, 1), window_size=4)


def small(seed=0, **options):
    return randomised(SwinTransformer(**{**SMALL, **options}), seed)


def images_for(model, size=None, n=2):
    size = model.patch_embed.img_size if size is None else size
    return torch.randn(n, model.config.in_channels, *size).double()


def window_attention(window, shift=(0, 0), relative_bias=True, seed=0):
    return randomised(WindowAttention(12, 3, window, shift, relative_bias=relative_bias), seed, std=0.5)


# ---- Against the libraries


def torchvision_model(c):
    model = torchvision.models.SwinTransformer(
        [c.patch_size] * 2, c.embed_dim, list(c.depths), list(c.n_heads), [c.window_size] * 2, c.mlp_ratio,
        stochastic_depth_prob=0.0, num_classes=c.n_classes)
    model.features[0][0] = nn.Conv2d(c.in_channels, c.embed_dim, c.patch_size, c.patch_size)
    return model


def timm_model(c):
    return TimmSwin(img_size=c.img_size, patch_size=c.patch_size, in_chans=c.in_channels, num_classes=c.n_classes,
                    embed_dim=c.embed_dim, depths=c.depths, num_heads=c.n_heads, window_size=c.window_size,
                    mlp_ratio=c.mlp_ratio)


def transformers_model(c):
    return transformers.SwinForImageClassification(transformers.SwinConfig(
        image_size=c.img_size, patch_size=c.patch_size, num_channels=c.in_channels, num_labels=c.n_classes,
        embed_dim=c.embed_dim, depths=list(c.depths), num_heads=list(c.n_heads), window_size=c.window_size,
        mlp_ratio=c.mlp_ratio, layer_norm_eps=c.norm_eps))


# Merging stands at the start of our stages and of timm's. The other two have it at the end of the stage before.
TORCHVISION_NAMES = [
    (r"^patch_embed\.proj\.", "features.0.0."), (r"^patch_norm\.", "features.0.2."),
    (r"mlp\.fc1\.", "mlp.0."), (r"mlp\.fc2\.", "mlp.3."),
    *((rf"^stages\.{i}\.downsample\.", f"features.{2 * i}.") for i in range(1, 4)),
    *((rf"^stages\.{i}\.blocks\.", f"features.{2 * i + 1}.") for i in range(4))]
TIMM_NAMES = [(r"^patch_norm\.", "patch_embed.norm."), (r"^stages\.", "layers."), (r"^head\.", "head.fc.")]
TRANSFORMERS_NAMES = [
    (r"^patch_embed\.proj\.", "swin.embeddings.patch_embeddings.projection."),
    (r"^patch_norm\.", "swin.embeddings.norm."), (r"^norm\.", "swin.layernorm."), (r"^head\.", "classifier."),
    *((rf"^stages\.{i}\.downsample\.", f"swin.encoder.layers.{i - 1}.downsample.") for i in range(1, 4)),
    (r"^stages\.", "swin.encoder.layers."), (r"norm1\.", "layernorm_before."), (r"norm2\.", "layernorm_after."),
    (r"attn\.qkv\.", "attention.{qkv}_proj."), (r"attn\.proj\.", "attention.o_proj."),
    (r"attn\.(relative_position_bias_table)", r"attention.relative_position_bias.\1")]
LIBRARIES = {"torchvision": (torchvision_model, TORCHVISION_NAMES), "timm": (timm_model, TIMM_NAMES),
             "transformers": (transformers_model, TRANSFORMERS_NAMES)}


def twin_of(library, ours):
    """The library's model with our weights. Only torchvision's file has the indices, which follow from the window."""
    make, pairs = LIBRARIES[library]
    theirs = make(ours.config).double().eval()
    missing, unexpected = theirs.load_state_dict(renamed(ours.state_dict(), pairs), strict=False)
    assert not unexpected
    assert all(name.endswith("relative_position_index") for name in missing)
    return theirs


def draw_config(seed, n_stages, window):
    """The arguments of a small SwinTransformer, drawn from the seed."""
    chance = random.Random(seed)
    n_heads = tuple(chance.choice([1, 2, 4]) for _ in range(n_stages))
    return dict(patch_size=4, in_channels=chance.randint(1, 4), n_classes=chance.randint(2, 9), window_size=window,
                embed_dim=4 * chance.randint(1, 4), n_heads=n_heads, mlp_ratio=chance.choice([1.5, 4.0]),
                depths=tuple(chance.randint(1, 3) for _ in range(n_stages)))


def check(library, seed, size, n_stages=2, window=4, img_size=None):
    ours = randomised(SwinTransformer(img_size or size, **draw_config(seed, n_stages, window)), seed)
    assert any("bias_table" in name for name, _ in ours.named_parameters())
    logits, gradient = differences(ours, twin_of(library, ours), images_for(ours, size), LIBRARIES[library][1])
    assert logits <= 1e-12
    assert gradient <= 1e-12


# torchvision's windows never shrink: where the map is smaller, it is padded. Ours shrink with img_size only, so a model
# built for large images does the same on small ones.
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [(32, 32), (40, 40), (44, 44), (56, 56), (56, 40), (32, 84)])
@pytest.mark.parametrize(("n_stages", "window"), [(2, 4), (3, 4), (3, 7), (2, 3)])
def test_swin_logits_and_gradients_equal_torchvisions(size, n_stages, window, seed):
    check("torchvision", seed + 10 * n_stages, size, n_stages, window, img_size=128)


# timm shifts the map before it pads it, where the paper's code and torchvision pad first. Both agree where the windows
# divide the map, or where one window covers it. Its windows shrink along each axis, as ours do.
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("size", "n_stages", "window"), [
    ((32, 32), 2, 4), ((32, 32), 3, 4), ((56, 56), 3, 7), ((56, 56), 2, 7), ((32, 64), 3, 4), ((64, 32), 3, 4),
    ((112, 28), 3, 7), ((20, 20), 2, 7)])
def test_swin_logits_and_gradients_equal_timms(size, n_stages, window, seed):
    check("timm", seed, size, n_stages, window)


# In transformers, a side that is not larger than the window stops the shift along both, so rectangles agree only if all
# sides of all maps are larger. Its bias tables do not shrink with the window, so no map may be smaller than the window.
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("size", "n_stages"), [((32, 32), 2), ((40, 40), 2), ((44, 44), 2), ((56, 56), 2),
                                                ((56, 40), 2), ((84, 104), 3)])
def test_swin_logits_and_gradients_equal_those_of_transformers(size, n_stages, seed):
    check("transformers", seed, size, n_stages)


@pytest.mark.parametrize(("create", "n_parameters"), [
    (create_swin_tiny, 28_288_354), (create_swin_small, 49_606_258), (create_swin_base, 87_768_224)])
def test_swin_has_the_published_parameters(create, n_parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in create().parameters()) == n_parameters


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_swin_tiny_at_224_equals_each_librarys(library):
    ours = randomised(create_swin_tiny(), 0, std=0.05)
    theirs, images = twin_of(library, ours), images_for(ours, n=1)
    with torch.no_grad():
        logits = theirs(images)
        assert relative_difference(ours(images), getattr(logits, "logits", logits)) <= 1e-12


def test_swin_uses_no_library_underneath():
    """The model's own code imports torch and this project alone."""
    roots = set()
    for one in (module, relative_module):
        for node in ast.walk(ast.parse(Path(one.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                roots |= {(getattr(node, "module", None) or node.names[0].name).split(".")[0]}
    assert roots <= {"dataclasses", "itertools", "torch", "vit_bridge", "vit_model"}


def test_swin_starts_as_timms_does():
    torch.manual_seed(0)
    ours, theirs = create_swin_nano(), TimmSwin(32, 2, embed_dim=32, depths=(2, 2, 2), num_heads=(1, 2, 4),
                                                window_size=4)
    state, wanted = renamed(ours.state_dict(), TIMM_NAMES), theirs.state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {name: t.shape for name, t in wanted.items()}
    for name, tensor in wanted.items():
        if not name.startswith("patch_embed.proj"):  # torch's own start in both
            assert state[name].mean().item() == pytest.approx(tensor.mean().item(), abs=0.01), name
            if tensor.ndim > 1 and tensor.numel() > 5_000 and "head" not in name:
                assert state[name].std().item() == pytest.approx(tensor.std().item(), rel=0.05), name


# ---- Windows


@pytest.mark.parametrize(("window", "size"), [((4, 4), (8, 12)), ((2, 3), (4, 9)), ((5, 1), (5, 3)), ((3, 3), (3, 3))])
def test_windows_are_the_slices_of_a_map_and_join_to_it(window, size):
    x, (rows, columns) = torch.randn(2, *size, 3), window
    windows = split_windows(x, window)
    slices = [x[:, top:top + rows, left:left + columns].flatten(1, 2) for top in range(0, size[0], rows)
              for left in range(0, size[1], columns)]
    assert torch.equal(windows, torch.stack(slices, dim=1))
    assert torch.equal(join_windows(windows, window, size), x)


def test_merging_joins_four_tokens_columns_first():
    merging = PatchMerging(2)
    with torch.no_grad():
        merging.reduction.weight.copy_(torch.eye(8)[:4])
    merging.norm = nn.Identity()
    x = torch.arange(2 * 4 * 6.0).view(1, 4, 6, 2)
    parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
    assert torch.equal(merging(x), torch.cat(parts, dim=3)[..., :4])
    merging.reduction.weight = nn.Parameter(torch.eye(8)[4:])
    assert torch.equal(merging(x), torch.cat(parts, dim=3)[..., 4:])
    odd = merging(x[:, :3, :5])
    assert odd.shape == (1, 2, 3, 4)
    assert not odd[:, :, 2].any()  # the right column of the last pair lies outside the map
    assert not odd[:, 1, :, 2:].any()  # and so does the lower row


@pytest.mark.parametrize(("size", "window", "shift"), [
    ((8, 8), (4, 4), (2, 2)), ((6, 9), (3, 3), (1, 1)), ((4, 12), (2, 4), (1, 2)), ((8, 4), (4, 4), (2, 0)),
    ((10, 15), (5, 5), (2, 2))])
def test_shift_mask_is_that_of_the_slices(size, window, shift):
    """The paper's code numbers nine regions by slices; in a shifted map, tokens of one region are neighbours."""
    regions, number = torch.zeros(1, *size, 1), 0
    for rows in (slice(0, -window[0]), slice(-window[0], -shift[0] or None), slice(-shift[0] or size[0], None)):
        for columns in (slice(0, -window[1]), slice(-window[1], -shift[1] or None), slice(-shift[1] or size[1], None)):
            regions[:, rows, columns] = number
            number += 1
    regions = split_windows(regions, window)[0, :, :, 0]
    expected = torch.where(regions[:, :, None] == regions[:, None], 0.0, -torch.inf)
    assert torch.equal(shift_mask(size, window, shift), expected)
    assert expected.isinf().any()


@pytest.mark.parametrize("grid", [(7, 7), (2, 5), (1, 3), (1, 1)])
def test_relative_position_index_counts_offsets_by_rows(grid):
    h, w = grid
    places = [(row, column) for row in range(h) for column in range(w)]
    expected = [[(a[0] - b[0] + h - 1) * (2 * w - 1) + a[1] - b[1] + w - 1 for b in places] for a in places]
    assert relative_position_index(grid).tolist() == expected


def test_relative_attention_adds_its_bias_to_the_scores():
    attention, x = randomised(RelativeAttention(12, 3, (2, 4)), 0, std=0.5), torch.randn(2, 8, 12).double()
    q, k, v = attention.qkv(x).view(2, 8, 3, 3, 4).permute(2, 0, 3, 1, 4)
    bias = torch.stack([attention.relative_position_bias_table[:, head][relative_position_index((2, 4))]
                        for head in range(3)])
    weights = (q @ k.transpose(2, 3) / 2 + bias).softmax(dim=3)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 8, 12))
    mixed, maps = attention(x, return_attention=True)
    torch.testing.assert_close(maps, weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention(x, n_query_tokens=3), expected[:, :3], rtol=1e-12, atol=1e-12)


def test_resampled_table_has_the_offsets_of_the_other_grid():
    table = torch.randn((2 * 3 - 1) * (2 * 5 - 1), 2)
    assert resample_bias_table(table, (3, 5), (3, 5)) is table
    assert resample_bias_table(table, (3, 5), (4, 2)).shape == (7 * 3, 2)
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(9.0), indexing="ij")
    plane = torch.stack([rows, columns], dim=2).flatten(0, 1)  # antisymmetric about the offset 0
    again = resample_bias_table(plane, (3, 5), (6, 9)).view(11, 17, 2)
    torch.testing.assert_close(again + again.flip(0, 1), torch.tensor([4.0, 8.0]).expand(11, 17, 2))


# ---- Window attention against masked attention over the whole map


def whole_map_attention(attention, x, shift):
    """Attention over all tokens of x (B, h, w, D), padded: maps (B, H, N, N) and the output, by brute force.

    A token attends to those of its window, and in a shifted map to those of them that were neighbours before the roll.
    """
    (h, w), (rows, columns), heads = x.shape[1:3], attention.grid_size, attention.n_heads
    whole = nn.functional.pad(x, (0, 0, 0, -w % columns, 0, -h % rows))
    H, W = whole.shape[1:3]
    tokens = whole.flatten(1, 2)
    q, k, v = attention.qkv(tokens).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) / q.shape[3]**0.5  # (B, H, N, N)
    places = [((row - shift[0]) % H, (column - shift[1]) % W) for row in range(H) for column in range(W)]
    for i, (row, column) in enumerate(places):  # where the token lies after the roll
        for j, (other_row, other_column) in enumerate(places):
            same = row // rows == other_row // rows and column // columns == other_column // columns
            near = (abs(i // W - j // W) < rows) and (abs(i % W - j % W) < columns)
            if not (same and near):
                scores[:, :, i, j] = -torch.inf
            elif attention.relative_position_bias_table is not None:
                offset = (row - other_row + rows - 1) * (2 * columns - 1) + column - other_column + columns - 1
                scores[:, :, i, j] += attention.relative_position_bias_table[offset]
    maps = scores.softmax(dim=3)
    mixed = attention.proj((maps @ v).transpose(1, 2).flatten(2)).unflatten(1, (H, W))
    inside = torch.arange(H * W).view(H, W)[:h, :w].flatten()
    return mixed[:, :h, :w], maps[:, :, inside][:, :, :, inside]


@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize(("size", "window", "shift"), [
    ((6, 6), (3, 3), (0, 0)), ((6, 6), (3, 3), (1, 1)), ((4, 8), (4, 4), (2, 2)), ((4, 6), (2, 3), (1, 1)),
    ((5, 7), (3, 3), (1, 1)), ((5, 4), (4, 4), (2, 2)), ((3, 3), (4, 4), (2, 2)), ((6, 5), (5, 2), (2, 1))])
@torch.no_grad()
def test_windows_are_masked_attention_over_the_whole_map(size, window, shift, relative_bias):
    attention = window_attention(window, shift, relative_bias)
    x, used = torch.randn(2, *size, 12).double(), attention.shift_in(size)
    assert used == [0 if length >= side else by for by, length, side in zip(shift, window, size, strict=True)]
    mixed, maps = whole_map_attention(attention, x, used)
    torch.testing.assert_close(attention(x), mixed, rtol=1e-11, atol=1e-11)  # the fused kernel
    again, windows = attention(x, return_attention=True)
    torch.testing.assert_close(again, mixed, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(windows.sum(dim=4), torch.ones(windows.shape[:4]).double())
    spread = spread_windows(windows, window, used, size)
    torch.testing.assert_close(spread, maps, rtol=1e-11, atol=1e-11)
    if not any(side % length for side, length in zip(size, window, strict=True)):
        torch.testing.assert_close(spread.sum(dim=3), torch.ones(spread.shape[:3]).double())
    else:
        assert (spread.sum(dim=3) < 1 - 1e-9).any()  # weights of the padding are left out


@pytest.mark.parametrize("pads_first", [True, False])
@pytest.mark.parametrize(("size", "window", "shift"), [((5, 7), (3, 3), (1, 1)), ((6, 4), (3, 4), (1, 0))])
def test_window_places_follow_the_padding_and_the_roll(size, window, shift, pads_first):
    H, W = (side + -side % length for side, length in zip(size, window, strict=True))
    places = torch.full((H, W), size[0] * size[1])
    for row in range(size[0]):
        for column in range(size[1]):
            wide, high = (W, H) if pads_first else (size[1], size[0])  # timm rolls the map without its padding
            places[(row - shift[0]) % high, (column - shift[1]) % wide] = row * size[1] + column
    expected = [places[top:top + window[0], left:left + window[1]].flatten() for top in range(0, H, window[0])
                for left in range(0, W, window[1])]
    assert torch.equal(window_places(size, window, shift, pads_first), torch.stack(expected))


def test_a_block_gives_the_maps_of_its_windows():
    model = small()
    block, x = model.stages[0].blocks[1], torch.randn(2, 8, 8, 8).double()
    after, maps = block(x, return_attention=True)
    torch.testing.assert_close(block(x), after, rtol=1e-12, atol=1e-12)
    assert maps.shape == (2, 4, 2, 16, 16)


def test_swin_without_shift_or_bias_is_swin_with_zeros_there():
    images = torch.randn(2, 3, 32, 32).double()
    model, unbiased = small(), small(relative_bias=False)
    unbiased.load_state_dict({name: p for name, p in model.state_dict().items() if "bias_table" not in name})
    assert not any("bias_table" in name for name, _ in unbiased.named_parameters())
    assert not torch.allclose(unbiased(images), model(images))
    unshifted = small(shift=False)
    unshifted.load_state_dict(model.state_dict())
    assert not torch.allclose(unshifted(images), model(images))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias_table"):
                parameter.zero_()
    torch.testing.assert_close(unbiased(images), model(images), rtol=1e-12, atol=1e-12)
    assert {block.attn.shift for stage in model.stages for block in stage.blocks} == {(0, 0), (2, 2)}
    assert {block.attn.shift for stage in unshifted.stages for block in stage.blocks} == {(0, 0)}


@pytest.mark.parametrize("shift", [False, True])
def test_windows_meet_only_with_the_shift(shift):
    """Without the shift, a change in one window changes no other; one stage of two blocks."""
    model = small(depths=(2,), n_heads=(2,), shift=shift)
    images = images_for(model, n=1)
    changed = images.clone()
    changed[..., :4, :4] += 1
    differ = (model.forward_features(images) != model.forward_features(changed)).any(dim=1)[0]  # (8, 8)
    assert differ[:4, :4].all()
    assert differ[4:, 4:].any() == shift


# ---- The model by itself


def test_swin_features_are_the_map_of_the_last_stage():
    model = small(depths=(1, 1, 1), n_heads=(1, 1, 1))
    for size, shape in (((32, 32), (2, 2)), ((20, 44), (2, 3)), ((4, 4), (1, 1))):
        assert model.forward_features(images_for(model, size)).shape == (2, model.n_features, *shape)
    assert model.n_features == 32
    with pytest.raises(InputError, match=r"\Aimg_size 30x32 is not divisible by patch_size 4x4[^\n]*\Z"):
        model(torch.zeros(2, 3, 30, 32).double())
    with pytest.raises(InputError, match=r"\Agot images of shape \(2, 1, 32, 32\)[^\n]*\Z"):
        model(torch.zeros(2, 1, 32, 32).double())


def test_swin_windows_shrink_to_the_maps_of_its_image_size():
    model = SwinTransformer((32, 88), 4, embed_dim=4, depths=(1, 1, 1), n_heads=(1, 1, 1), window_size=(4, 7))
    assert model.config.windows() == [(4, 7), (4, 7), (2, 6)]
    assert [stage.blocks[0].attn.grid_size for stage in model.stages] == model.config.windows()


def test_swin_without_classes_gives_its_pooled_features():
    model = small(n_classes=0)
    images = images_for(model)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(model(images), features)
    assert features.shape == (2, model.n_features)


def test_swin_copies_and_rebuilds_give_the_same_logits():
    model = small(depths=[2, 1], n_heads=[1, 2], window_size=(4, 2))
    again = SwinTransformer(**vars(model.config)).double().eval()
    again.load_state_dict(model.state_dict())
    images = images_for(model, (36, 28))
    for twin in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config == model.config
        assert torch.equal(twin(images), model(images))


def test_swin_groups_of_layers_and_of_optimisers():
    model = small()
    groups = layer_groups(model)
    assert {groups[name] for name in ("patch_embed.proj.weight", "patch_norm.weight")} == {0}
    assert [groups[f"stages.{i}.blocks.0.attn.qkv.weight"] for i in range(2)] == [1, 2]
    assert groups["stages.1.downsample.reduction.weight"] == 2
    assert {groups[name] for name in ("norm.weight", "head.weight", "head.bias")} == {3}
    decayed = {id(p) for group in parameter_groups(model, 0.1) if group["weight_decay"] for p in group["params"]}
    named = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert named == {name for name in dict(model.named_parameters()) if name.endswith(".weight") and "norm" not in name}
    muon = {name for name, p in model.named_parameters() if p in hidden_matrices(model)}
    assert muon == {name for name in named if not name.startswith(("patch_embed", "head"))}
    assert {name for name, p in freeze_backbone(model).named_parameters() if p.requires_grad} == {"head.weight",
                                                                                                "head.bias"}


def test_swin_drops_more_of_deeper_blocks():
    model = small(drop_path=0.4, depths=(2, 3))
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def attention_flops(h, w, C, M):
    """Eq. 2 of the paper, 4 h w C^2 + 2 M^2 h w C multiplications; each counts as 2 FLOPs."""
    return 2 * (4 * h * w * C**2 + 2 * M**2 * h * w * C)


def test_count_flops_counts_window_attention_by_equation_2():
    C, patches, merged = 8, 64, 16
    expected = 2 * patches * 3 * 16 * C  # patches of 4 x 4 pixels
    expected += 2 * (attention_flops(8, 8, C, 4) + 2 * 2 * patches * C * 4 * C)  # two blocks, the second shifted
    expected += 2 * merged * 4 * C * 2 * C  # merging
    expected += 3 * (attention_flops(4, 4, 2 * C, 4) + 2 * 2 * merged * 2 * C * 8 * C)
    assert count_flops(small()) == expected + 2 * 2 * C * 5
    assert count_flops(small(relative_bias=False, shift=False)) == count_flops(small())


def test_flops_of_swin_grow_with_the_number_of_tokens():
    """The head alone does not grow: 32 to 64 pixels quarter the rest exactly, where the windows divide all maps."""
    model, head = small(), 2 * 16 * 5
    assert count_flops(model, 64) - head == 4 * (count_flops(model, 32) - head)


@pytest.mark.parametrize(("arguments", "value"), [
    (dict(depths=(2, 2, 2)), "depths (2, 2, 2) and n_heads (2, 1)"), (dict(depths=(), n_heads=()), "depths ()"),
    (dict(depths=(2, 0)), "depths 0"), (dict(n_heads=(3, 1)), "embed_dim 8 is not divisible by n_heads 3"),
    (dict(n_heads=(2, 5)), "embed_dim 16 is not divisible by n_heads 5"), (dict(window_size=0), "window_size 0"),
    (dict(window_size=(4, 4, 4)), "window_size (4, 4, 4)"), (dict(img_size=30), "img_size 30x30"),
    (dict(patch_size=0), "patch_size 0"), (dict(drop_path=1.0), "drop_path 1.0"), (dict(dropout=-0.1), "dropout -0.1"),
    (dict(norm_eps=0), "norm_eps 0"), (dict(mlp_ratio=0), "mlp_ratio 0"), (dict(shift="yes"), "shift 'yes'"),
    (dict(relative_bias=None), "relative_bias None"), (dict(n_classes=-1), "n_classes -1"),
    (dict(in_channels=0), "in_channels 0"), (dict(embed_dim=0), "embed_dim 0"), (dict(depths=3), "depths 3"),
    (dict(mlp_ratio=0.01), "mlp_ratio 0.01")])
def test_swin_refuses_bad_arguments_naming_the_value(arguments, value):
    with pytest.raises(InputError, match=rf"\A[^\n]*{re.escape(value)}[^\n]*\Z"):
        SwinTransformer(**{**SMALL, **arguments})


def test_create_swin_refuses_unknown_arguments():
    with pytest.raises(InputError, match=r"\Aargument 'window' is unknown; [^\n]*window_size[^\n]*\Z"):
        create_swin_tiny(window=8)
    assert create_swin_nano(3, in_channels=1, depths=(1, 1, 1)).config.depths == (1, 1, 1)


# ---- Export and compilation: the roll of the shifted windows is part of the graph


def test_swin_exports_at_a_fixed_size():
    model = small()
    images = images_for(model, n=2)
    with torch.no_grad():
        torch.testing.assert_close(export(model, (images,)).module()(images), model(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [32, (20, 24)])
def test_swin_as_onnx_computes_what_the_model_does(size, tmp_path):
    pytest.importorskip("onnxscript")
    assert export_onnx(small(img_size=size), tmp_path / "swin.onnx") < TOLERANCE


@pytest.mark.slow
def test_compiled_swin_computes_the_same():
    model = small().float()
    images = images_for(model, (36, 28)).float()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(images), model(images), rtol=1e-4, atol=1e-4)
