import ast
import errno
import io
import os
import pickle
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import model_zoo
from cnn_model import ConvNet, HybridCNNViT
from model_zoo import (
    MODELS,
    PRETRAINED,
    PRETRAINED_FOLDER,
    build_model,
    create_pretrained,
    load_checkpoint,
    load_model,
    save_model,
)
from vit_model import InputError, VisionTransformer, resize_positions

MODULES = sorted(Path(model_zoo.__file__).parent.glob("*.py"))
ALIKE = {"vit_nano": 459_562, "hybrid": 497_818, "convnet": 481_170}
VIT = dict(n_classes=3, img_size=(10, 15), patch_size=5, embed_dim=12, depth=2, n_heads=3)
HYBRID = dict(n_classes=3, img_size=(8, 12), patch_size=4, embed_dim=12, depth=1, n_heads=3)
CONVNET = dict(n_classes=3, img_size=(8, 12), widths=(3, 5), depths=(1, 2))
SMALL = [(VisionTransformer, VIT), (VisionTransformer, {**VIT, "position": "sincos", "pool": "mean"}),
         (VisionTransformer, {**VIT, "position": "none", "n_classes": 0}), (HybridCNNViT, HYBRID),
         (ConvNet, CONVNET)]


def randomised(model_class, arguments):
    """A model in eval mode in which every number of the state dict is random."""
    torch.manual_seed(5)
    model = model_class(**arguments).eval()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) * 7)
    return model


def images_for(model):
    return torch.rand(2, model.config.in_channels, *model.config.img_size)


def one_line_with(text):
    return rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z"


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_bits(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


# ---- Models by name


@pytest.mark.parametrize("name", MODELS)
def test_every_name_builds_a_model_that_runs(name):
    with torch.device("meta"):
        model = build_model(name, n_classes=7)
        images = torch.empty(2, 3, model.config.img_size, model.config.img_size)
        assert type(model) is MODELS[name][0]
        assert model(images).shape == (2, 7)
        assert build_model(name).head.out_features == 1000


def test_resnet18_of_the_table_is_convnet_with_its_defaults():
    with torch.device("meta"):
        assert build_model("resnet18").config == ConvNet().config


@pytest.mark.parametrize("name", ALIKE)
def test_three_small_models_have_the_parameters_that_the_comment_says(name):
    assert sum(p.numel() for p in build_model(name, n_classes=10).parameters()) == ALIKE[name]
    assert build_model(name).config.img_size == 32
    assert f"{ALIKE[name]:,}" in Path(model_zoo.__file__).read_text(encoding="utf-8")


def test_three_small_models_are_within_a_tenth_of_each_other():
    assert max(ALIKE.values()) <= 1.1 * min(ALIKE.values())


@pytest.mark.parametrize(("img_size", "patch", "stride"), [
    (32, 4, 1), (64, 4, 1), (72, 8, 2), (128, 8, 2), (144, 16, 4), (224, 16, 4),
    ((32, 96), 8, 2), ((64, 28), 4, 1)])
def test_patch_and_stem_fit_the_image(img_size, patch, stride):
    with torch.device("meta"):
        for name in ("vit_nano", "vit_base", "hybrid", "hybrid_small"):
            assert build_model(name, img_size=img_size).config.patch_size == patch
        for name in ("convnet", "resnet18"):
            assert build_model(name, img_size=img_size).config.stem_stride == stride


def test_a_patch_that_is_given_stays_and_so_do_the_defaults_without_a_size():
    assert build_model("vit_nano", img_size=112, patch_size=7).config.patch_size == 7
    assert build_model("convnet", img_size=224, stem_stride=1).config.stem_stride == 1
    assert build_model("vit_nano").config.patch_size == 4


@pytest.mark.parametrize(("build", "value"), [
    (lambda: build_model("resnet19"), "'resnet19'"), (lambda: build_model("vit_nano", widths=(3,)), "'widths'"),
    (lambda: build_model("convnet", depth=8), "'depth'"), (lambda: build_model("hybrid", dept=1), "'dept'"),
    (lambda: build_model("vit_nano", img_size=30), "30x30"), (lambda: build_model("hybrid", patch_size=12), "12"),
    (lambda: create_pretrained("vit_nano"), "'vit_nano'"), (lambda: create_pretrained("../x"), "'../x'")])
def test_an_unknown_name_or_argument_is_refused_in_one_line(build, value):
    with pytest.raises(InputError, match=one_line_with(value)):
        build()


def test_an_unknown_model_is_told_the_known_ones():
    with pytest.raises(InputError, match=", ".join(MODELS)):
        build_model("vit")


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_models_load_ready_to_use(name):
    if not (PRETRAINED_FOLDER / f"{name}.pt").exists():
        pytest.skip(f"{name}.pt is not there yet")
    model = create_pretrained(name)
    assert not model.training
    assert len(model.class_names) == model.head.out_features
    assert len(model.mean) == len(model.std) == model.config.in_channels
    assert model.img_size == model.config.img_size
    side = model.img_size
    assert model(torch.zeros(2, 3, side, side)).isfinite().all()


def test_pretrained_weights_that_are_missing_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(model_zoo, "PRETRAINED_FOLDER", tmp_path)
    with pytest.raises(InputError, match=one_line_with("hybrid_shapes.pt")):
        create_pretrained("hybrid_shapes")


# ---- There and back


@pytest.mark.parametrize(("model_class", "arguments"), SMALL)
def test_a_saved_model_comes_back_the_same(model_class, arguments, tmp_path):
    model = randomised(model_class, arguments)
    save_model(model.train(), tmp_path / "m.pt", ["a", "b", "c"], mean=(0.1, 0.2, 0.3), std=[0.5, 0.7, 1.1])
    loaded = load_model(tmp_path / "m.pt")
    assert type(loaded) is model_class
    assert same_bits(loaded, bits(model))
    assert loaded.config == model.config
    assert not any(module.training for module in loaded.modules())
    images = images_for(model)
    assert torch.equal(loaded(images), model.eval()(images))
    assert (loaded.class_names, loaded.mean, loaded.std) == (["a", "b", "c"], [0.1, 0.2, 0.3], [0.5, 0.7, 1.1])
    assert loaded.img_size == model.config.img_size
    assert os.listdir(tmp_path) == ["m.pt"]


def test_what_is_not_known_is_none_and_what_was_loaded_is_saved_again(tmp_path):
    save_model(randomised(*SMALL[0]), tmp_path / "bare.pt")
    loaded = load_model(tmp_path / "bare.pt")
    assert (loaded.class_names, loaded.mean, loaded.std) == (None, None, None)
    save_model(loaded, tmp_path / "full.pt", class_names=["a", "b", "c"], mean=[0.5], std=[0.25])
    save_model(load_model(tmp_path / "full.pt"), tmp_path / "again.pt", mean=[0.125])
    again = load_model(tmp_path / "again.pt")
    assert (again.class_names, again.mean, again.std) == (["a", "b", "c"], [0.125], [0.25])


def test_further_entries_are_kept(tmp_path):
    save_model(randomised(*SMALL[0]), tmp_path / "m.pt", accuracy=0.75, trainer=dict(step=7, rates=[0.1]))
    entries = model_zoo.read_checkpoint(tmp_path / "m.pt")
    assert (entries["accuracy"], entries["trainer"]) == (0.75, dict(step=7, rates=[0.1]))


@pytest.mark.parametrize("mean", [torch.tensor([0.5, 0.25]), np.array([0.5, 0.25]), (np.float64(0.5), 0.25)],
                         ids=["tensor", "array", "tuple"])
def test_a_mean_of_any_kind_comes_back_as_plain_numbers(mean, tmp_path):
    save_model(randomised(*SMALL[0]), tmp_path / "m.pt", mean=mean)
    loaded = load_model(tmp_path / "m.pt")
    assert loaded.mean == [0.5, 0.25]
    assert [type(value) for value in loaded.mean] == [float, float]


@pytest.mark.parametrize("name", ALIKE)
def test_a_file_in_float16_is_under_a_mebibyte_and_loads_as_float32(name, tmp_path):
    model = build_model(name, n_classes=10)
    save_model(model, tmp_path / "m.pt", dtype=torch.float16)
    assert (tmp_path / "m.pt").stat().st_size < 2**20
    loaded = load_model(tmp_path / "m.pt")
    for key, value in model.state_dict().items():
        ours = loaded.state_dict()[key]
        assert ours.dtype == value.dtype
        assert torch.equal(ours, value.half().to(value.dtype))
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("model_class", "arguments"), SMALL[:2] + SMALL[3:])
def test_a_replaced_head_survives(model_class, arguments, tmp_path):
    model = randomised(model_class, arguments)
    model.head = nn.Linear(model.head.in_features, 7)
    save_model(model, tmp_path / "m.pt")
    loaded, images = load_model(tmp_path / "m.pt"), images_for(model)
    assert loaded.config.n_classes == 7
    assert torch.equal(loaded(images), model(images))


def test_a_removed_head_survives(tmp_path):
    model = randomised(*SMALL[0])
    model.head = nn.Identity()
    save_model(model, tmp_path / "m.pt")
    images = images_for(model)
    assert torch.equal(load_model(tmp_path / "m.pt")(images), model(images))


def test_a_resized_model_survives(tmp_path):
    model = resize_positions(randomised(*SMALL[0]), (20, 35))
    save_model(model, tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt")
    assert loaded.img_size == loaded.config.img_size == (20, 35)
    assert same_bits(loaded, bits(model))


def test_a_loaded_model_that_is_resized_says_its_new_size(tmp_path):
    save_model(randomised(*SMALL[0]), tmp_path / "m.pt")
    model = resize_positions(load_model(tmp_path / "m.pt"), (20, 35))
    assert model.img_size == model.config.img_size == (20, 35)


@pytest.mark.parametrize(("model_class", "arguments"), SMALL)
def test_load_checkpoint_fills_a_model_of_the_same_architecture(model_class, arguments, tmp_path):
    model, other = randomised(model_class, arguments), model_class(**arguments)
    save_model(model, tmp_path / "m.pt")
    assert load_checkpoint(other, tmp_path / "m.pt") is other
    assert same_bits(other, bits(model))
    assert other.training


@pytest.mark.parametrize(("model_class", "arguments", "value"), [
    (VisionTransformer, {**VIT, "n_classes": 5}, "class count"),
    (VisionTransformer, {**VIT, "n_classes": 0}, "head."),
    (VisionTransformer, {**VIT, "img_size": 20}, "pos_embed"),
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


def test_load_checkpoint_refuses_another_stem_stride_though_every_shape_fits(tmp_path):
    save_model(ConvNet(**CONVNET, stem_stride=1), tmp_path / "m.pt")
    with pytest.raises(InputError, match=one_line_with("stem_stride")):
        load_checkpoint(ConvNet(**CONVNET, stem_stride=2), tmp_path / "m.pt")


# ---- Files that are not checkpoints of ours


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def torch_bytes(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a whole checkpoint of a small model."""
    path = tmp_path_factory.mktemp("whole") / "m.pt"
    save_model(randomised(VisionTransformer, VIT), path, ["a", "b", "c"], [0.5], [0.25])
    return path.read_bytes()


def refuse(path, contents=None):
    """Both ways of loading must refuse the file in one line that names it, and leave the model alone."""
    if contents is not None:
        path.write_bytes(contents)
    model = randomised(VisionTransformer, VIT)
    before = bits(model)
    for load in (load_model, lambda path: load_checkpoint(model, path)):
        with pytest.raises(InputError, match=one_line_with(path)):
            load(path)
    assert same_bits(model, before)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    refuse(tmp_path / "none.pt")
    refuse(tmp_path)


@pytest.mark.parametrize("contents", [
    b"", b"\x80", b"accuracy 0.93\n", b"{}", bytes(1000), "Größe\n".encode("latin-1"), b"PK\x03\x04",
    b"\x80\x02}q\x00.", b"a0", b"0", b"\x80\x02R", b"\x8e", b"\x89PNG\r\n\x1a\n" + bytes(64),
    torch_bytes([1, 2]), torch_bytes("text"), torch_bytes({}), torch_bytes(nn.Linear(2, 3)),
    torch_bytes(nn.Linear(2, 3).state_dict()),
    torch_bytes({"format": "vit-bridge 0"}), torch_bytes({"format": "vit-bridge 1"}), pickle.dumps([1, 2], 2)],
    ids=lambda contents: f"{len(contents)} bytes")
def test_files_of_another_kind_are_refused(contents, tmp_path):
    refuse(tmp_path / "m.pt", contents)


def test_random_bytes_are_refused(tmp_path):
    generator = torch.Generator().manual_seed(7)
    for n in range(101):
        contents = bytes(torch.randint(256, (n,), generator=generator).tolist())
        refuse(tmp_path / "m.pt", contents if n % 2 else b"\x80\x02" + contents)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_checkpoint_is_refused(share, whole, tmp_path):
    refuse(tmp_path / "m.pt", whole[:int(share * len(whole))])


def test_a_checkpoint_with_a_damaged_byte_is_refused_or_loads(whole, tmp_path):
    start, generator = whole.index(b"data.pkl"), torch.Generator().manual_seed(7)
    for place in (start + torch.randint(2500, (199,), generator=generator)).tolist():
        (tmp_path / "m.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 7]) + whole[place + 1:])
        for load in (load_model, lambda path: load_checkpoint(VisionTransformer(**VIT), path)):
            try:
                load(tmp_path / "m.pt")
            except InputError as error:
                assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("wrap", [
    lambda trap: pickle.dumps(trap, 2), torch_bytes,
    lambda trap: torch_bytes({"format": "vit-bridge 1", "x": trap}),
    lambda trap: torch_bytes(trap, _use_new_zipfile_serialization=False)],
    ids=["pickle", "torch.save", "checkpoint", "torch.save as of old"])
def test_code_in_a_file_is_not_executed(wrap, tmp_path):
    trap = tmp_path / "sprung"
    refuse(tmp_path / "m.pt", wrap(Trap(trap)))
    assert not trap.exists()
    with suppress(RuntimeError):  # for the bare pickle, after the trap
        torch.load(tmp_path / "m.pt", weights_only=False)
    assert trap.exists()  # so the trap was live


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_torch_load_is_with_weights_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("torch", "pickle"):
            assert not {name.name for name in node.names} & {"load", "loads", "Unpickler"}
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
            assert ast.unparse(node.func) == "torch.load"
            assert {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only") == "True"


def changed(whole, **changes):
    """The checkpoint with entries changed; those changed to `...` are removed."""
    entries = {**torch.load(io.BytesIO(whole), weights_only=True), **changes}
    return torch_bytes({key: value for key, value in entries.items() if value is not ...})


@pytest.mark.parametrize("key", ["format", "model_class", "config", "state_dict", "img_size", "class_names",
                                 "mean", "std"])
def test_a_checkpoint_with_an_entry_missing_is_refused(key, whole, tmp_path):
    refuse(tmp_path / "m.pt", changed(whole, **{key: ...}))


@pytest.mark.parametrize("change", [
    dict(format="vit-bridge 2"), dict(format=["vit-bridge 1"]), dict(model_class="VisionTransformer2"),
    dict(model_class="nn.Linear"), dict(model_class=["VisionTransformer"]), dict(model_class=None),
    dict(config=None), dict(config=[1]), dict(config=dict(VIT, heads=3)), dict(config=dict(VIT, embed_dim=-12)),
    dict(config=dict(VIT, patch_size=(5, 5, 5))), dict(config=dict(VIT, depth=7)), dict(config={5: 5}),
    dict(state_dict=None), dict(state_dict=[1]), dict(state_dict={}), dict(state_dict={5: 5})], ids=str)
def test_a_checkpoint_with_an_entry_that_cannot_be_is_refused(change, whole, tmp_path):
    refuse(tmp_path / "m.pt", changed(whole, **change))


@pytest.mark.parametrize("change", [
    {"blocks.7.extra": torch.zeros(2)}, {5: torch.zeros(2)}, {"head.bias": torch.zeros(5)}, {"head.bias": 3},
    {"cls_token": [1.0] * 12}, {"norm.weight": None}, {"norm.weight": torch.zeros(1)}], ids=str)
def test_a_checkpoint_with_weights_that_do_not_fit_is_refused(change, whole, tmp_path):
    state = torch.load(io.BytesIO(whole), weights_only=True)["state_dict"]
    refuse(tmp_path / "m.pt", changed(whole, state_dict={**state, **change}))


def test_a_checkpoint_with_a_tensor_missing_is_refused(whole, tmp_path):
    state = torch.load(io.BytesIO(whole), weights_only=True)["state_dict"]
    del state["blocks.1.norm2.bias"]
    refuse(tmp_path / "m.pt", changed(whole, state_dict=state))


# ---- Places that cannot be written


@pytest.mark.parametrize("target", ["missing/m.pt", "folder", "file/m.pt"])
def test_an_unwritable_target_is_refused_and_leaves_nothing(target, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=one_line_with(tmp_path / target)):
        save_model(randomised(*SMALL[0]), tmp_path / target)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["file", "folder"]


def save_half(entries, path):
    Path(path).write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_half_as_torch_does(entries, path):
    Path(path).write_bytes(b"half")
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nframe #0: somewhere")


def refuse_to_replace(source, target):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize(("module", "name", "failing"), [
    (torch, "save", save_half), (torch, "save", save_half_as_torch_does), (os, "replace", refuse_to_replace)])
def test_a_failed_save_keeps_the_previous_file_whole(module, name, failing, whole, tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    path.write_bytes(whole)
    monkeypatch.setattr(module, name, failing)
    with pytest.raises(InputError, match=one_line_with(path)):
        save_model(VisionTransformer(**VIT), path)
    assert os.listdir(tmp_path) == ["m.pt"]
    assert path.read_bytes() == whole


def test_an_entry_that_cannot_be_pickled_leaves_no_part_of_a_file(whole, tmp_path):
    (tmp_path / "m.pt").write_bytes(whole)
    with pytest.raises(Exception, match="pickle"):
        save_model(VisionTransformer(**VIT), tmp_path / "m.pt", note=lambda: None)
    assert os.listdir(tmp_path) == ["m.pt"]
    assert (tmp_path / "m.pt").read_bytes() == whole


def test_class_names_that_do_not_fit_a_new_head_are_not_saved(tmp_path):
    model = build_model("convnet", n_classes=2)
    model.class_names = ["a", "b"]
    model.head = torch.nn.Linear(model.head.in_features, 3)
    with pytest.raises(InputError, match=r"\A2 class_names do not fit a head of 3 classes[^\n]*\Z"):
        save_model(model, tmp_path / "m.pt")
    save_model(model, tmp_path / "m.pt", class_names=["a", "b", "c"])
    model.head = torch.nn.Sequential(model.head)
    with pytest.raises(InputError, match=r"\Aa head of class Sequential cannot be saved[^\n]*\Z"):
        save_model(model, tmp_path / "n.pt")
