import argparse
import errno
import os
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from vit_bridge.models.adapters import adapt
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.models.registry import build_model
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.weights.checkpoints import (
    _likely_heads,
    describe_checkpoint,
    load,
    load_checkpoint,
    read_checkpoint,
    save_model,
)
from vit_model import InputError, VisionTransformer, resample_positions, resize_positions, sincos_positions

VIT = dict(n_classes=3, img_size=(10, 15), patch_size=5, embed_dim=12, depth=2, n_heads=3)
SQUARE = {**VIT, "img_size": 15}
HYBRID = dict(n_classes=3, img_size=(8, 12), patch_size=4, embed_dim=12, depth=1, n_heads=3)
CONVNET = dict(n_classes=3, img_size=(8, 12), widths=(3, 5), depths=(1, 2))
SMALL = [(VisionTransformer, VIT), (VisionTransformer, {**VIT, "position": "sincos", "pool": "mean"}),
         (VisionTransformer, {**VIT, "position": "none", "n_classes": 0}), (HybridCNNViT, HYBRID),
         (ConvNet, CONVNET)]
OPTIONS = [{}, dict(n_registers=2), dict(layer_scale=0.5), dict(qk_norm=True), dict(position="none"),
           dict(n_registers=2, layer_scale=0.5, qk_norm=True, n_classes=0, mlp_ratio=1.75, patch_size=(5, 3),
                img_size=(15, 9))]


def randomised(model_class, arguments, seed=5):
    """Return a model in eval mode whose state dict is random, except for fixed positions."""
    torch.manual_seed(seed)
    model = model_class(**arguments).eval()
    for name, tensor in model.state_dict().items():
        if arguments.get("position") != "sincos" or name != "pos_embed":
            tensor.copy_(torch.rand(tensor.shape) * 7)
    return model


def images_for(model):
    return torch.rand(2, model.config.in_channels, *model.config.img_size)


def one_line_with(text):
    return rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z"


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in other)


def same_bits(model, before):
    return same(model.state_dict(), before)


def load_all(model, path, names):
    """Call load_checkpoint; its report must name every tensor of the file exactly once."""
    report = load_checkpoint(model, path)
    assert sorted([*report.used, *report.dropped]) == sorted(names)
    assert report.path == str(path)
    return report


def raw(path, model):
    """Write and return a bare state dict."""
    state = bits(model)
    torch.save(state, path)
    return state


def refuse_to_load(model, path, text):
    """Check that loading is refused in one line with the path and the text, and changes nothing."""
    before = bits(model)
    with pytest.raises(InputError, match=one_line_with(path)) as caught:
        load_checkpoint(model, path)
    assert text in str(caught.value)
    assert same_bits(model, before)


# ---- There and back


@pytest.mark.parametrize(("model_class", "arguments"), SMALL)
def test_load_returns_a_saved_model_unchanged(model_class, arguments, tmp_path):
    model = randomised(model_class, arguments)
    shown = Preprocessing(model.config.img_size, (0.1, 0.2, 0.3), [0.5, 0.7, 1.1], class_names=["a", "b", "c"])
    save_model(model.train(), tmp_path / "m.pt", shown)
    assert model.preprocessing is None
    loaded = load(tmp_path / "m.pt")
    assert type(loaded) is model_class
    assert same_bits(loaded, bits(model))
    assert loaded.config == model.config
    assert not any(module.training for module in loaded.modules())
    images = images_for(model)
    assert torch.equal(loaded(images), model.eval()(images))
    assert loaded.preprocessing == shown
    entries = read_checkpoint(tmp_path / "m.pt")  # whose keys files of all versions have
    assert {name: entries[name] for name in ("class_names", "mean", "std", "interpolation", "img_size")} == dict(
        class_names=["a", "b", "c"], mean=[0.1, 0.2, 0.3], std=[0.5, 0.7, 1.1], interpolation="bilinear",
        img_size=model.config.img_size)
    assert os.listdir(tmp_path) == ["m.pt"]


def test_save_model_keeps_loaded_preprocessing_and_none_stays_none(tmp_path):
    save_model(randomised(*SMALL[0]), tmp_path / "bare.pt")
    loaded = load(tmp_path / "bare.pt")
    assert loaded.preprocessing is None
    save_model(loaded, tmp_path / "full.pt", Preprocessing((10, 15), [0.5], [0.25], class_names=["a", "b", "c"]))
    full = load(tmp_path / "full.pt")
    save_model(full, tmp_path / "same.pt")
    assert load(tmp_path / "same.pt").preprocessing == full.preprocessing
    save_model(full, tmp_path / "again.pt", replace(full.preprocessing, mean=[0.125]))
    assert load(tmp_path / "again.pt").preprocessing == Preprocessing((10, 15), [0.125], [0.25],
                                                                      class_names=["a", "b", "c"])


def test_load_opens_older_files_with_partial_preprocessing(tmp_path):
    """Older versions wrote class names without a mean, and a mean without names."""
    model = randomised(*SMALL[0])
    save_model(model, tmp_path / "m.pt")
    entries = read_checkpoint(tmp_path / "m.pt")
    assert [entries[name] for name in ("class_names", "mean", "std", "interpolation")] == [None] * 4
    torch.save(entries | dict(class_names=["a", "b", "c"]), tmp_path / "names.pt")
    assert load(tmp_path / "names.pt").preprocessing == Preprocessing((10, 15), class_names=["a", "b", "c"])
    torch.save(entries | dict(mean=(0.5,) * 3, std=torch.tensor([0.25] * 3)), tmp_path / "mean.pt")
    assert load(tmp_path / "mean.pt").preprocessing == Preprocessing((10, 15), (0.5,) * 3, (0.25,) * 3)


def test_load_restores_interpolation_and_defaults_to_bilinear(tmp_path):
    model = randomised(*SMALL[0])
    model.preprocessing = Preprocessing((10, 15), interpolation="bicubic")
    save_model(model, tmp_path / "own.pt")
    assert load(tmp_path / "own.pt").preprocessing.interpolation == "bicubic"
    save_model(load(tmp_path / "own.pt"), tmp_path / "again.pt")
    assert load(tmp_path / "again.pt").preprocessing.interpolation == "bicubic"
    save_model(model, tmp_path / "given.pt", replace(model.preprocessing, interpolation="bilinear"))
    assert load(tmp_path / "given.pt").preprocessing.interpolation == "bilinear"
    entries = read_checkpoint(tmp_path / "own.pt")
    del entries["interpolation"]
    torch.save(entries, tmp_path / "older.pt")
    assert load(tmp_path / "older.pt").preprocessing.interpolation == "bilinear"
    save_model(randomised(*SMALL[0]), tmp_path / "unknown.pt")
    assert adapt(load(tmp_path / "unknown.pt")).preprocessing.interpolation == "bilinear"


def test_preprocessing_takes_names_from_numpy_and_no_string(tmp_path):
    model = randomised(*SMALL[0])
    names = [f"class {i}" for i in range(model.config.n_classes)]
    model.preprocessing = Preprocessing(model.config.img_size, class_names=np.array(names))
    save_model(model, tmp_path / "m.pt")
    assert load(tmp_path / "m.pt").preprocessing.class_names == names
    with pytest.raises(InputError, match="class_names 'abc' is one string"):
        Preprocessing(8, class_names="abc")


def test_save_model_refuses_a_mean_outside_preprocessing(tmp_path):
    with pytest.raises(InputError, match=r"\Asave_model got mean=\(0\.5,\); pass it in preprocessing=[^\n]*\Z"):
        save_model(randomised(*SMALL[0]), tmp_path / "m.pt", mean=(0.5,))


def test_save_model_keeps_further_entries(tmp_path):
    save_model(randomised(*SMALL[0]), tmp_path / "m.pt", accuracy=0.75, trainer=dict(step=7, rates=[0.1]))
    entries = read_checkpoint(tmp_path / "m.pt")
    assert (entries["accuracy"], entries["trainer"]) == (0.75, dict(step=7, rates=[0.1]))


@pytest.mark.parametrize("mean", [torch.tensor([0.5, 0.25]), np.array([0.5, 0.25]), (np.float64(0.5), 0.25)],
                         ids=["tensor", "array", "tuple"])
def test_save_model_stores_any_mean_as_plain_numbers(mean, tmp_path):
    save_model(randomised(*SMALL[0]), tmp_path / "m.pt", Preprocessing((10, 15), mean, (1, 1)))
    for values in (load(tmp_path / "m.pt").preprocessing.mean, read_checkpoint(tmp_path / "m.pt")["mean"]):
        assert list(values) == [0.5, 0.25]
        assert [type(value) for value in values] == [float, float]


@pytest.mark.parametrize("name", ["vit_nano", "hybrid", "convnet"])
def test_save_model_in_float16_is_small_and_loads_float32(name, tmp_path):
    model = build_model(name, n_classes=10)
    save_model(model, tmp_path / "m.pt", dtype=torch.float16)
    assert (tmp_path / "m.pt").stat().st_size < 2**20
    loaded = load(tmp_path / "m.pt")
    for key, value in model.state_dict().items():
        ours = loaded.state_dict()[key]
        assert ours.dtype == value.dtype
        assert torch.equal(ours, value.half().to(value.dtype))
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["vit_nano", "hybrid", "convnet"])
def test_save_model_in_int8_rounds_each_row_to_its_own_scale(name, tmp_path):
    torch.manual_seed(0)
    model = build_model(name, n_classes=10)
    with torch.no_grad():
        model.head.weight[3] *= 1000  # one large row must not spoil the others
    save_model(model, tmp_path / "m.pt", dtype=torch.int8)
    assert (tmp_path / "m.pt").stat().st_size < 1.3 * sum(p.numel() for p in model.parameters())
    loaded = load(tmp_path / "m.pt").state_dict()
    for key, value in model.state_dict().items():
        assert loaded[key].dtype == value.dtype
        if value.ndim < 2 or len(value) == 1:
            assert torch.equal(loaded[key], value)
        else:
            steps = value.flatten(1).abs().amax(dim=1) / 127  # of each row
            assert ((loaded[key] - value).flatten(1).abs().amax(dim=1) <= 0.501 * steps).all()
    report = load_checkpoint(build_model(name, n_classes=10), tmp_path / "m.pt")
    assert not report.dropped


def test_checkpoint_whose_scales_do_not_fit_is_refused_in_one_line(tmp_path):
    save_model(build_model("vit_nano", n_classes=10), tmp_path / "m.pt", dtype=torch.int8)
    entries = torch.load(tmp_path / "m.pt", weights_only=True)
    for scales in (dict(entries["int8_scales"], nowhere=torch.ones(1)), {"head.weight": torch.ones(3, 1)}, [1], None):
        torch.save(dict(entries, int8_scales=scales), tmp_path / "m.pt")
        with pytest.raises(InputError, match="int8_scales do not fit"):
            load(tmp_path / "m.pt")
    torch.save(dict(int8_scales=entries["int8_scales"]), tmp_path / "m.pt")
    with pytest.raises(InputError, match="int8_scales do not fit"):
        load(tmp_path / "m.pt")


@pytest.mark.parametrize(("model_class", "arguments"), SMALL[:2] + SMALL[3:])
def test_save_model_keeps_a_replaced_head(model_class, arguments, tmp_path):
    model = randomised(model_class, arguments)
    model.head = nn.Linear(model.head.in_features, 7)
    save_model(model, tmp_path / "m.pt")
    loaded, images = load(tmp_path / "m.pt"), images_for(model)
    assert loaded.config.n_classes == 7
    assert torch.equal(loaded(images), model(images))


def test_save_model_keeps_a_removed_head(tmp_path):
    model = randomised(*SMALL[0])
    model.head = nn.Identity()
    save_model(model, tmp_path / "m.pt")
    images = images_for(model)
    assert torch.equal(load(tmp_path / "m.pt")(images), model(images))


def test_save_model_keeps_a_resized_model(tmp_path):
    model = resize_positions(randomised(*SMALL[0]), (20, 35))
    save_model(model, tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt")
    assert read_checkpoint(tmp_path / "m.pt")["img_size"] == loaded.config.img_size == (20, 35)
    assert same_bits(loaded, bits(model))


def test_resize_positions_updates_the_size_in_preprocessing(tmp_path):
    save_model(randomised(*SMALL[0]), tmp_path / "m.pt", Preprocessing((10, 15), class_names=["a", "b", "c"]))
    model = resize_positions(load(tmp_path / "m.pt"), (20, 35))
    assert model.preprocessing == Preprocessing(model.config.img_size, class_names=["a", "b", "c"])
    assert model.config.img_size == (20, 35)


@pytest.mark.parametrize(("model_class", "arguments"), SMALL)
def test_load_checkpoint_fills_a_model_of_the_same_architecture(model_class, arguments, tmp_path):
    model, other = randomised(model_class, arguments), model_class(**arguments)
    save_model(model, tmp_path / "m.pt")
    report = load_all(other, tmp_path / "m.pt", bits(model))
    assert (report.format, report.dropped, report.notes) == ("ours", {}, ())
    assert same_bits(other, bits(model))
    assert other.training


@pytest.mark.parametrize(("model_class", "arguments", "value"), [
    (VisionTransformer, {**VIT, "depth": 3}, "blocks.2"),
    (VisionTransformer, {**VIT, "embed_dim": 24}, "architecture"),
    (VisionTransformer, {**VIT, "n_heads": 2}, "n_heads"),
    (VisionTransformer, {**VIT, "pool": "mean"}, "pool"),
    (VisionTransformer, {**VIT, "position": "sincos"}, "position"),
    (VisionTransformer, {**VIT, "position": "none"}, "pos"),
    (HybridCNNViT, HYBRID, "HybridCNNViT"), (ConvNet, CONVNET, "ConvNet")])
def test_load_checkpoint_refuses_another_model_and_leaves_ours_alone(model_class, arguments, value, tmp_path):
    model = randomised(model_class, arguments)
    before = bits(model)
    save_model(VisionTransformer(**VIT), tmp_path / "m.pt")
    with pytest.raises(InputError, match=one_line_with(value)):
        load_checkpoint(model, tmp_path / "m.pt")
    assert same_bits(model, before)


def test_load_checkpoint_refuses_another_stem_stride(tmp_path):
    save_model(ConvNet(**CONVNET, stem_stride=1), tmp_path / "m.pt")
    with pytest.raises(InputError, match=one_line_with("stem_stride")):
        load_checkpoint(ConvNet(**CONVNET, stem_stride=2), tmp_path / "m.pt")


@pytest.mark.parametrize("n_classes", [5, 0])
@pytest.mark.parametrize(("model_class", "arguments"), SMALL[:2] + SMALL[3:])
def test_load_checkpoint_keeps_models_head_for_another_class_count(model_class, arguments, n_classes,
                                                                            tmp_path):
    model = randomised(model_class, arguments)
    other = randomised(model_class, {**arguments, "n_classes": n_classes}, seed=7)
    save_model(model, tmp_path / "m.pt")
    before = bits(other)
    report = load_all(other, tmp_path / "m.pt", bits(model))
    assert set(report.dropped) == {"head.weight", "head.bias"}
    assert same_bits(other, {**{k: v for k, v in bits(model).items() if not k.startswith("head.")},
                             **{k: v for k, v in before.items() if k.startswith("head.")}})
    said = ("head: the model keeps its own, which is untrained, because the file's head has 3 classes, but the "
            "model's head has 5")
    assert report.notes == ((said,) if n_classes else ())
    assert ("the model has no head, or one that is not an nn.Linear" in str(report)) == (not n_classes)


def test_load_checkpoint_keeps_models_head_when_file_has_none(tmp_path):
    state = raw(tmp_path / "m.pt", randomised(VisionTransformer, {**SQUARE, "n_classes": 0}))
    model = randomised(VisionTransformer, SQUARE, seed=7)
    head = model.head.weight.clone()
    report = load_all(model, tmp_path / "m.pt", state)
    assert torch.equal(model.head.weight, head)
    assert report.notes == ("head: the file has none, so the model keeps its own, which is untrained",)


def test_load_checkpoint_keeps_the_models_head_without_bias_where_the_file_has_one(tmp_path):
    torch.save(bits(randomised(VisionTransformer, SQUARE)), tmp_path / "m.pt")
    model = randomised(VisionTransformer, SQUARE, seed=7)
    model.head = nn.Linear(12, 3, bias=False)
    weight = model.head.weight.detach().clone()
    report = load_checkpoint(model, tmp_path / "m.pt")
    assert torch.equal(model.head.weight, weight)
    assert "has a bias, but the model's head has none" in report.notes[0]


def test_load_checkpoint_takes_a_head_without_bias_as_one_of_zeros(tmp_path):
    state = bits(randomised(VisionTransformer, SQUARE))
    del state["head.bias"]
    torch.save(state, tmp_path / "m.pt")
    model = randomised(VisionTransformer, SQUARE, seed=7)
    report = load_checkpoint(model, tmp_path / "m.pt")
    assert torch.equal(model.head.weight, state["head.weight"])
    assert not model.head.bias.any()
    assert (set(report.used), report.notes) == (set(state), ())


@pytest.mark.parametrize("options", [{}, dict(n_registers=2), dict(position="sincos")], ids=str)
@pytest.mark.parametrize(("old", "new"), [((15, 15), (20, 35)), ((10, 15), (35, 20))])
def test_load_checkpoint_resamples_another_resolution_and_says_so(old, new, options, tmp_path):
    model = randomised(VisionTransformer, {**VIT, "img_size": old, **options})
    other = VisionTransformer(**{**VIT, "img_size": new, **options})
    save_model(model, tmp_path / "m.pt")
    report = load_all(other, tmp_path / "m.pt", bits(model))
    grids = [f"{size[0] // 5}x{size[1] // 5}" for size in (old, new)]
    said = f"positions: resampled from a grid of {grids[0]} to {grids[1]} patches"
    assert report.notes == (() if options.get("position") else (said,))
    if not options:
        grid_old, grid_new = (tuple(side // 5 for side in size) for size in (old, new))
        assert torch.equal(other.pos_embed, resample_positions(model.pos_embed, grid_old, grid_new))
    assert same_bits(other, bits(resize_positions(model, new)))


def test_load_checkpoint_learns_an_oblong_grid_from_the_model(tmp_path):
    model = randomised(VisionTransformer, VIT)
    state, other = raw(tmp_path / "m.pt", model), VisionTransformer(**VIT)
    assert load_all(other, tmp_path / "m.pt", state).notes == ()
    assert same_bits(other, state)
    refuse_to_load(VisionTransformer(**SQUARE), tmp_path / "m.pt", "7 positions")
    with pytest.raises(InputError, match=one_line_with("7 positions")):
        describe_checkpoint(tmp_path / "m.pt")


# ---- Positions of a file that is not ours


def prefixed(state, n, seed=11):
    """Return the state dict with n more random positions before the others."""
    torch.manual_seed(seed)
    return {**state, "pos_embed": torch.cat([torch.rand(1, n, 12), state["pos_embed"]], dim=1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("side", [15, 35])
def test_load_checkpoint_folds_cls_position_into_cls_token(side, dtype, tmp_path):
    options = dict(n_registers=2, layer_scale=0.5)
    model, n = VisionTransformer(**{**SQUARE, **options, "img_size": side}), side // 5
    state = prefixed(bits(randomised(VisionTransformer, {**SQUARE, **options})), 1)
    state |= dict(register_tokens=state.pop("reg_token"), mask_token=torch.zeros(1, 12))
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    torch.save(state, tmp_path / "m.pt")
    report = load_all(model, tmp_path / "m.pt", state)
    state = {name: tensor.float() for name, tensor in state.items()}  # added in the model's precision
    assert report.format == "DINOv2"
    assert torch.equal(model.cls_token, state["cls_token"] + state["pos_embed"][:, :1])
    assert torch.equal(model.pos_embed, resample_positions(state["pos_embed"][:, 1:], (3, 3), (n, n)))
    assert torch.equal(model.reg_token, state["register_tokens"])
    assert "CLS was added" in report.notes[0]
    assert len(report.notes) == 1 + (side > 15)


def test_load_checkpoint_folds_register_positions_into_register_tokens(tmp_path):
    model = VisionTransformer(**SQUARE, n_registers=2)
    state = prefixed(bits(randomised(VisionTransformer, {**SQUARE, "n_registers": 2})), 3)
    torch.save(state, tmp_path / "m.pt")
    report = load_all(model, tmp_path / "m.pt", state)
    assert torch.equal(model.cls_token, state["cls_token"] + state["pos_embed"][:, :1])
    assert torch.equal(model.reg_token, state["reg_token"] + state["pos_embed"][:, 1:3])
    assert torch.equal(model.pos_embed, state["pos_embed"][:, 3:])
    assert len(report.notes) == 2


@pytest.mark.parametrize("side", [15, 35])
def test_load_checkpoint_gives_cls_zeros_where_positions_lack_it(side, tmp_path):
    model = VisionTransformer(**{**VIT, "img_size": side})
    state = bits(randomised(VisionTransformer, SQUARE))
    state["pos_embed"] = state["pos_embed"][:, 1:]
    torch.save(state, tmp_path / "m.pt")
    report = load_all(model, tmp_path / "m.pt", state)
    assert not model.pos_embed[:, 0].any()
    n = side // 5
    assert torch.equal(model.pos_embed[:, 1:], resample_positions(state["pos_embed"], (3, 3), (n, n)))
    assert [note for note in report.notes if "zeros" in note]


def test_load_checkpoint_notes_ambiguous_positions_and_obeys_grid_size(tmp_path):
    wide = {**VIT, "img_size": (15, 25)}  # 3 x 5 patches and CLS make 16 positions, as 4 x 4 patches without CLS do
    state = raw(tmp_path / "m.pt", randomised(VisionTransformer, wide))
    for options in ({}, dict(grid_size=(3, 5)), dict(grid_size=[3, 5])):
        model = VisionTransformer(**wide)
        report = load_checkpoint(model, tmp_path / "m.pt", **options)
        assert same_bits(model, state)
        assert [note for note in report.notes if "grid_size=" in note] == ([] if options else [
            "positions: 16 fit 3x5 patches and 1 prefix token or 4x4 patches and 0 prefix tokens; the first is used; "
            "to choose another, pass grid_size= to load_checkpoint"])
    model = VisionTransformer(**wide)
    load_checkpoint(model, tmp_path / "m.pt", grid_size=(4, 4))
    assert torch.equal(model.pos_embed[:, 1:], resample_positions(state["pos_embed"], (4, 4), (3, 5)))
    other = randomised(VisionTransformer, wide, seed=7)
    before = bits(other)
    with pytest.raises(InputError, match=one_line_with("do not fit the grid 5x7 with 1 or 0 prefix tokens")):
        load_checkpoint(other, tmp_path / "m.pt", grid_size=(5, 7))
    assert same_bits(other, before)


def test_load_checkpoint_takes_grid_size_for_an_oblong_file(tmp_path):
    state = raw(tmp_path / "m.pt", randomised(VisionTransformer, VIT))
    model = VisionTransformer(**SQUARE)
    report = load_checkpoint(model, tmp_path / "m.pt", grid_size=(2, 3))
    assert report.notes == ("positions: resampled from a grid of 2x3 to 3x3 patches",)
    assert torch.equal(model.pos_embed, resample_positions(state["pos_embed"], (2, 3), (3, 3)))


def test_load_checkpoint_keeps_fixed_and_learned_positions_apart(tmp_path):
    arguments = {**SQUARE, "position": "sincos"}
    state = raw(tmp_path / "fixed.pt", randomised(VisionTransformer, arguments))
    for side, grid in ((15, (3, 3)), (35, (7, 7))):
        model = VisionTransformer(**{**arguments, "img_size": side})
        load_all(model, tmp_path / "fixed.pt", state)
        assert torch.equal(model.pos_embed, sincos_positions(grid, 12))
        assert torch.equal(model.cls_token, state["cls_token"])
    raw(tmp_path / "learned.pt", randomised(VisionTransformer, SQUARE))
    refuse_to_load(VisionTransformer(**arguments), tmp_path / "learned.pt", "position='learned'")
    refuse_to_load(VisionTransformer(**{**SQUARE, "position": "none"}), tmp_path / "fixed.pt", "position='learned'")


# ---- Bare state dicts, and what scripts put around them


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_load_checkpoint_takes_a_bare_state_dict_exactly(options, tmp_path):
    arguments = {**SQUARE, **options}
    state, model = raw(tmp_path / "m.pt", randomised(VisionTransformer, arguments)), VisionTransformer(**arguments)
    report = load_all(model, tmp_path / "m.pt", state)
    assert same_bits(model, state)
    assert report.dropped == {}
    assert model.training


@pytest.mark.parametrize("options", OPTIONS[1:4], ids=str)
@pytest.mark.parametrize("in_the_file", [True, False])
def test_load_checkpoint_names_an_option_only_one_side_has(options, in_the_file, tmp_path):
    plain, special = SQUARE, {**SQUARE, **options}
    raw(tmp_path / "m.pt", randomised(VisionTransformer, special if in_the_file else plain))
    [(name, value)] = options.items()
    wanted = {"n_registers": value if in_the_file else 0, "layer_scale": 1e-5 if in_the_file else None,
              "qk_norm": in_the_file}[name]
    refuse_to_load(randomised(VisionTransformer, plain if in_the_file else special), tmp_path / "m.pt",
                   f"build the model with {name}={wanted}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_load_checkpoint_converts_other_precisions_to_float32(name, dtype, tmp_path):
    state = {key: value.to(dtype) for key, value in bits(randomised(VisionTransformer, SQUARE)).items()}
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, tmp_path / name)
    model = VisionTransformer(**SQUARE)
    load_all(model, tmp_path / name, state)
    assert same_bits(model, {key: value.float() for key, value in state.items()})
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("model_class", "arguments"), SMALL[3:])
def test_load_checkpoint_takes_hybrid_and_convnet_state_dicts(model_class, arguments, tmp_path):
    state = raw(tmp_path / "m.pt", randomised(model_class, arguments))
    model = model_class(**arguments)
    assert load_all(model, tmp_path / "m.pt", state).format == f"state dict of a {model_class.__name__}"
    assert same_bits(model, state)
    known = model_class is ConvNet
    refuse_to_load(randomised(VisionTransformer, VIT), tmp_path / "m.pt",
                   "it is a ConvNet" if known else "no known format")
    raw(tmp_path / "v.pt", randomised(VisionTransformer, VIT))
    refuse_to_load(randomised(model_class, arguments), tmp_path / "v.pt",
                   "it is a VisionTransformer" if known else f"do not belong to a {model_class.__name__}")


def named(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


WRAPPINGS = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 7},
    "model": lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}, "args": argparse.Namespace(lr=0.1)},
    "teacher": lambda s: {"student": {name: 2 * value for name, value in s.items()}, "teacher": s},
    "model_ema": lambda s: {"model": {name: 2 * value for name, value in s.items()}, "model_ema": s},
    "state_dict_ema": lambda s: {"state_dict": {name: 2 * value for name, value in s.items()}, "state_dict_ema": s},
    "module": lambda s: {"module": s, "lr_scheduler": None}, "model_state_dict": lambda s: {"model_state_dict": s},
    "ema": lambda s: {"model": {name: 2 * value for name, value in s.items()}, "ema": s},
    "module.": lambda s: named("module.", s), "_orig_mod.": lambda s: named("_orig_mod.", s),
    "state_dict / model.": lambda s: {"state_dict": named("model.", s), "hyper_parameters": {"lr": 0.1}},
    "module. / _orig_mod.": lambda s: named("module._orig_mod.", s),
    "model / state_dict / module.": lambda s: {"model": {"state_dict": named("module.", s)}}}


@pytest.mark.parametrize("around", WRAPPINGS)
@pytest.mark.parametrize(("model_class", "arguments"), [SMALL[0], *SMALL[3:]])
def test_load_checkpoint_unwraps_a_state_dict_and_says_so(model_class, arguments, around, tmp_path):
    state, model = bits(randomised(model_class, arguments)), model_class(**arguments)
    torch.save(WRAPPINGS[around](state), tmp_path / "m.pt")
    report = load_all(model, tmp_path / "m.pt", state)
    assert same_bits(model, state)
    two = [name for name in WRAPPINGS[around](state) if name in ("student", "teacher", "model", "model_ema", "ema",
                                                                 "state_dict", "state_dict_ema")]
    said = [f"of the models under {' and '.join(map(repr, two))}, {around!r} was used"] * (len(two) > 1)
    assert report.notes == (f"the weights are under {around}", *said)
    assert report.choices == tuple(said)


@pytest.mark.parametrize(("model_class", "arguments"), [SMALL[0], *SMALL[3:]])
def test_load_checkpoint_takes_an_averaged_model_without_its_counter(model_class, arguments, tmp_path):
    first, second, model = (randomised(model_class, arguments, seed) for seed in (5, 7, 11))
    averaged = AveragedModel(first)
    averaged.update_parameters(first)
    averaged.update_parameters(second)
    torch.save(averaged.state_dict(), tmp_path / "m.pt")
    report = load_all(model, tmp_path / "m.pt", ["n_averaged", *bits(model)])
    assert list(report.dropped) == ["n_averaged"]
    assert torch.equal(model.head.weight, averaged.module.head.weight)
    torch.testing.assert_close(model.head.weight, (first.head.weight + second.head.weight) / 2)
    assert same_bits(model, bits(averaged.module))


def test_load_checkpoint_fills_inside_compiled_and_distributed_models(tmp_path):
    model = randomised(VisionTransformer, VIT)
    save_model(model, tmp_path / "m.pt")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for wrap in (torch.compile, nn.parallel.DistributedDataParallel,
                     lambda inner: torch.compile(nn.parallel.DistributedDataParallel(inner))):
            inner = VisionTransformer(**VIT)
            load_checkpoint(wrap(inner), tmp_path / "m.pt")
            assert same_bits(inner, bits(model))
    finally:
        torch.distributed.destroy_process_group()


def test_load_checkpoint_refuses_a_foreign_model(tmp_path):
    save_model(randomised(VisionTransformer, VIT), tmp_path / "m.pt")
    with pytest.raises(InputError, match=one_line_with("a Linear cannot be filled from a checkpoint")):
        load_checkpoint(nn.Linear(2, 3), tmp_path / "m.pt")


def test_load_checkpoint_refuses_safetensors_files_without_the_package(tmp_path, monkeypatch):
    save_file(bits(randomised(VisionTransformer, VIT)), tmp_path / "m.safetensors")
    load_checkpoint(VisionTransformer(**VIT), tmp_path / "m.safetensors")
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    refuse_to_load(VisionTransformer(**VIT), tmp_path / "m.safetensors", "pip install safetensors")


# ---- What a file is


def built_as_said(path):
    """Run the lines that describe_checkpoint prints; return their model and report."""
    lines = [line.strip() for line in str(describe_checkpoint(path)).splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    names = dict(VisionTransformer=VisionTransformer, HybridCNNViT=HybridCNNViT, ConvNet=ConvNet)
    exec(lines[0], names)
    return names["model"], eval(lines[1], {**names, "load_checkpoint": load_checkpoint})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_describe_checkpoint_lines_rebuild_a_bare_state_dicts_model(options, tmp_path):
    model = randomised(VisionTransformer, {**SQUARE, **options})
    state = raw(tmp_path / "m.pt", model)
    built, report = built_as_said(tmp_path / "m.pt")
    assert same_bits(built, state)
    assert report.dropped == {}
    assert describe_checkpoint(tmp_path / "m.pt").n_parameters == sum(p.numel() for p in model.parameters())
    assert built.config.embed_dim // built.config.n_heads == (4 if options.get("qk_norm") else 12)


@pytest.mark.parametrize(("model_class", "arguments"), [
    *SMALL, (VisionTransformer, {**VIT, "n_registers": 2, "norm_eps": 1e-5, "drop_path": 0.1}),
    (HybridCNNViT, {**HYBRID, "depth": 12, "n_heads": 12}),
    (ConvNet, {**CONVNET, "img_size": 16, "stem_stride": 1})])
def test_describe_checkpoint_lines_rebuild_a_model_of_ours(model_class, arguments, tmp_path):
    model = randomised(model_class, arguments)
    save_model(model, tmp_path / "m.pt")
    built, report = built_as_said(tmp_path / "m.pt")
    assert type(built) is model_class
    assert (built.config, report.notes, report.dropped) == (model.config, (), {})
    assert same_bits(built, bits(model))


@pytest.mark.parametrize(("embed_dim", "n_heads"), [(12, 1), (64, 1), (192, 3), (384, 6)])
def test_describe_checkpoint_guesses_unknown_heads_and_says_so(embed_dim, n_heads, tmp_path):
    raw(tmp_path / "m.pt", VisionTransformer(**{**SQUARE, "embed_dim": embed_dim, "n_heads": 2, "depth": 1}))
    description = describe_checkpoint(tmp_path / "m.pt")
    assert description.config.n_heads == n_heads
    guess = f"the file does not record their number; {n_heads} is a guess ({embed_dim // n_heads} channels each)"
    assert guess in str(description)


def test_likely_heads_gives_the_heads_of_published_widths():
    assert [_likely_heads(width) for width in (768, 1024, 1280)] == [12, 16, 16]


def test_load_report_counts_and_names_in_words(tmp_path):
    state = bits(randomised(VisionTransformer, SQUARE))
    torch.save({**state, "mask_token": torch.zeros(1, 12)}, tmp_path / "m.pt")
    report = load_all(VisionTransformer(**{**SQUARE, "n_classes": 7}), tmp_path / "m.pt", [*state, "mask_token"])
    assert str(report).splitlines() == [
        f"{tmp_path / 'm.pt'}: timm's names (timm, DeiT, DINO, MAE's encoder); 30 tensors loaded, 3 dropped",
        "  dropped: mask_token (the token for masked patches in pretraining)",
        "  dropped: head.weight and 1 more (has 3 classes, but the model's head has 7)",
        "  head: the model keeps its own, which is untrained, because the file's head has 3 classes, but the model's "
        "head has 7",
        "  heads: the file does not record their number; the model's 3 are correct only if the weights were trained "
        "with 3"]


@pytest.mark.parametrize(("options", "known"), [({}, False), (dict(qk_norm=True), True)])
def test_load_report_says_when_heads_are_unknown(options, known, tmp_path):
    raw(tmp_path / "m.pt", VisionTransformer(**SQUARE, **options))
    save_model(VisionTransformer(**SQUARE, **options), tmp_path / "ours.pt")
    reports = [load_checkpoint(VisionTransformer(**SQUARE, **options), tmp_path / name) for name in ("m.pt", "ours.pt")]
    assert [report.heads == "" for report in reports] == [known, True]


# ---- Places that cannot be written


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the bytes of a complete checkpoint of a small model."""
    path = tmp_path_factory.mktemp("whole") / "m.pt"
    save_model(randomised(VisionTransformer, VIT), path,
               Preprocessing((10, 15), [0.5], [0.25], class_names=["a", "b", "c"]))
    return path.read_bytes()


@pytest.mark.parametrize("target", ["missing/m.pt", "folder", "file/m.pt"])
def test_save_model_refuses_an_unwritable_target_leaving_nothing(target, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=one_line_with(tmp_path / target)):
        save_model(randomised(*SMALL[0]), tmp_path / target)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["file", "folder"]


def save_half(entries, file):
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_half_as_torch_does(entries, file):
    file.write(b"half")
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nframe #0: somewhere")


def refuse_to_replace(source, target):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize(("module", "name", "failing"), [
    (torch, "save", save_half), (torch, "save", save_half_as_torch_does), (os, "replace", refuse_to_replace)])
def test_save_model_failing_keeps_the_previous_file(module, name, failing, whole, tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    path.write_bytes(whole)
    monkeypatch.setattr(module, name, failing)
    with pytest.raises(InputError, match=one_line_with(path)):
        save_model(VisionTransformer(**VIT), path)
    assert os.listdir(tmp_path) == ["m.pt"]
    assert path.read_bytes() == whole


def test_save_model_of_unpicklable_entry_keeps_the_previous_file(whole, tmp_path):
    (tmp_path / "m.pt").write_bytes(whole)
    with pytest.raises(Exception, match="pickle"):
        save_model(VisionTransformer(**VIT), tmp_path / "m.pt", note=lambda: None)
    assert os.listdir(tmp_path) == ["m.pt"]
    assert (tmp_path / "m.pt").read_bytes() == whole


def test_save_model_refuses_class_names_that_misfit_the_head(tmp_path):
    model = build_model("convnet", n_classes=2)
    model.preprocessing = Preprocessing(32, class_names=["a", "b"])
    model.head = torch.nn.Linear(model.head.in_features, 3)
    with pytest.raises(InputError, match=r"\A2 class_names do not fit a head of 3 classes[^\n]*\Z"):
        save_model(model, tmp_path / "m.pt")
    save_model(model, tmp_path / "m.pt", Preprocessing(32, class_names=["a", "b", "c"]))
    model.head = torch.nn.Sequential(model.head)
    with pytest.raises(InputError, match=r"\Aa head of class Sequential cannot be saved[^\n]*\Z"):
        save_model(model, tmp_path / "n.pt")
