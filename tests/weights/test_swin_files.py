"""Files of Swin Transformers: each library's own model, with random weights, opens and gives the same logits."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from command_runs import make_folder, train
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.models.swin_transformer import checkpoint_filter_fn
from torch import nn

import train_vit
from vit_bridge.errors import Assumption
from vit_bridge.models.swin import SwinTransformer
from vit_bridge.preprocessing import IMAGENET_MEAN
from vit_bridge.weights.checkpoints import describe_checkpoint, load, load_checkpoint, save_model
from vit_model import InputError

PATCH, D, DEPTHS, HEADS, WINDOW, SIDE, CLASSES = 2, 12, (1, 2, 2), (1, 2, 3), 3, 24, 5  # grids of 12, 6 and 3
OURS = dict(img_size=SIDE, patch_size=PATCH, n_classes=CLASSES, embed_dim=D, depths=DEPTHS, n_heads=HEADS,
            window_size=WINDOW)
TIMM = dict(img_size=SIDE, patch_size=PATCH, num_classes=CLASSES, embed_dim=D, depths=DEPTHS, num_heads=HEADS,
            window_size=WINDOW)
HF = dict(image_size=SIDE, patch_size=PATCH, num_labels=CLASSES, embed_dim=D, depths=list(DEPTHS),
          num_heads=list(HEADS), window_size=WINDOW)


def one_line_with(text):
    return rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z"


def randomised(model):
    """Return the model in float64 with random parameters that float32 can hold."""
    torch.manual_seed(5)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return model


def images_of(size):
    torch.manual_seed(7)
    return torch.randn(3, 3, *((size, size) if isinstance(size, int) else size), dtype=torch.float64)


@dataclass
class Sample:
    """A file, images, the source's answer to them, and the arguments of our model."""
    path: object
    names: list
    images: torch.Tensor
    logits: torch.Tensor
    arguments: dict
    dropped: int = 0


# ---- The formats: each writes a file of its kind into a folder


def timm_swin(**options):
    return randomised(timm.models.SwinTransformer(**{**TIMM, **options}))


def microsoft(state):
    """Return timm's state dict as the paper's code writes it: merging at the end of a stage, and the buffers."""
    named = {re.sub(r"layers\.(\d)\.downsample", lambda place: f"layers.{int(place[1]) - 1}.downsample",
                    name).replace("head.fc", "head"): tensor for name, tensor in state.items()}
    return {**named, "layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.long),
            "layers.1.blocks.1.attn_mask": torch.zeros(4, 9, 9)}


def from_timm(folder, names=dict, dropped=0, arguments=None, **options):
    model = timm_swin(**options)
    state = names(model.state_dict())
    torch.save({"model": state}, folder / "m.pth")
    images = images_of(options.get("img_size", SIDE))
    return Sample(folder / "m.pth", list(state), images, model(images), {**OURS, **(arguments or {})}, dropped)


def from_torchvision(folder, size=SIDE):
    model = randomised(torchvision.models.SwinTransformer([PATCH] * 2, D, list(DEPTHS), list(HEADS), [WINDOW] * 2,
                                                          num_classes=CLASSES))
    torch.save(model.state_dict(), folder / "m.pth")
    images = images_of(size)
    return Sample(folder / "m.pth", list(model.state_dict()), images, model(images), OURS, sum(DEPTHS))


def from_transformers(folder, name, old_names, size=SIDE, dropped=0, **options):
    config = transformers.SwinConfig(**{**HF, **options})
    model, n_classes = randomised(getattr(transformers, name)(config)), CLASSES
    path = folder / "m.pt"
    if old_names:
        model.save_pretrained(folder)
        path = folder / "model.safetensors"
        assert any("attention.self.query" in key for key in load_file(path))
    else:
        torch.save(model.state_dict(), path)
        assert any("attention.q_proj" in key for key in model.state_dict())
    names, images = list(load_file(path) if old_names else model.state_dict()), images_of(size)
    if name == "SwinForImageClassification":
        answer = model(images).logits
    else:
        answer, n_classes = model.base_model(images).last_hidden_state.mean(dim=1), 0
    return Sample(path, names, images, answer, {**OURS, "n_classes": n_classes}, dropped)


def from_ours(folder):
    model = randomised(SwinTransformer(**OURS))
    torch.save(model.state_dict(), folder / "m.pth")
    return Sample(folder / "m.pth", list(model.state_dict()), images_of(SIDE), model(images_of(SIDE)), OURS)


@dataclass(frozen=True)
class Source:
    """What a format is checked against, and a function that writes its file, as a Sample."""
    against: str
    write: Callable


def case(write, *positional, **options):
    return Source(AGAINST[write], lambda folder: write(folder, *positional, **options))


AGAINST = {from_timm: "timm", from_torchvision: "torchvision", from_transformers: "transformers", from_ours: "ours"}


SMALL = dict(img_size=16, window_size=4)  # grids of 8, 4 and 2, so the last window has 2 x 2 tokens
SOURCES = {
    "timm's Swin": case(from_timm),
    "timm's Swin, smaller windows": case(from_timm, **SMALL, arguments=SMALL),
    "timm's Swin, rectangular images": case(from_timm, img_size=(24, 48), arguments=dict(img_size=(24, 48))),
    "timm's Swin, no head": case(from_timm, num_classes=0, arguments=dict(n_classes=0)),
    "timm's Swin, mlp_ratio 3": case(from_timm, mlp_ratio=3, arguments=dict(mlp_ratio=3)),
    "microsoft's Swin": case(from_timm, microsoft, 2),
    "microsoft's Swin, smaller windows": case(from_timm, microsoft, 2, **SMALL, arguments=SMALL),
    "microsoft's Swin, ImageNet-22k": case(from_timm, microsoft, 2, num_classes=21_841,
                                           arguments=dict(n_classes=21_841)),
    "torchvision's Swin": case(from_torchvision),
    "torchvision's Swin, padded": case(from_torchvision, (22, 26)),
    **{f"transformers Swin with head{padded}, {which} names": case(
        from_transformers, "SwinForImageClassification", which == "old", **size)
       for which in ("old", "new") for padded, size in (("", {}), (", padded", dict(size=(28, 32))))},
    **{f"transformers Swin, {which} names": case(from_transformers, "SwinModel", which == "old")
       for which in ("old", "new")},
    **{f"transformers Swin for masked images, {which} names": case(
        from_transformers, "SwinForMaskedImageModeling", which == "old", dropped=3, encoder_stride=8)
       for which in ("old", "new")},
    "our names of a SwinTransformer": case(from_ours),
}


@torch.no_grad()
def difference(name, folder):
    """Return (largest relative difference of the logits, LoadReport, Sample) of a source."""
    sample = SOURCES[name].write(folder)
    model = SwinTransformer(**sample.arguments).double().eval()
    report = load_checkpoint(model, sample.path)
    logits = model(sample.images)
    assert logits.shape == sample.logits.shape
    return float((logits - sample.logits).abs().max() / sample.logits.abs().max()), report, sample


# ---- The tests


@torch.no_grad()
@pytest.mark.parametrize("name", SOURCES)
def test_files_of_swin_open_and_answer_as_in_their_library(name, tmp_path):
    largest, report, sample = difference(name, tmp_path)
    assert largest < 1e-12
    assert sorted([*report.used, *report.dropped]) == sorted(sample.names)
    assert len(report.dropped) == sample.dropped
    model = load(sample.path).double()
    wanted = SwinTransformer(**sample.arguments).config
    assert model.config.windows() == wanted.windows()
    for option in ("in_channels", "n_classes", "embed_dim", "depths", "n_heads", "window_size", "patch_size",
                   "mlp_ratio", "norm_eps", "relative_bias"):
        assert getattr(model.config, option) == getattr(wanted, option), option
    assert (model.config.img_size == wanted.img_size) != ("rectangular" in name)
    assert (model(sample.images) - sample.logits).abs().max() < 1e-12 * sample.logits.abs().max()
    assert (model.preprocessing.mean, model.preprocessing.interpolation) == (IMAGENET_MEAN, "bicubic")
    save_model(model.float(), tmp_path / "ours.pt")
    again = load(tmp_path / "ours.pt")
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    found = describe_checkpoint(sample.path)
    assert (found.model_class, found.config) == ("SwinTransformer", model.config)
    assert f"    model = SwinTransformer(img_size={model.config.img_size}, patch_size=2, " in str(found)


@torch.no_grad()
def test_a_swin_for_grey_images_opens(tmp_path):
    model = timm_swin(in_chans=1)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    images = images_of(SIDE)[:, :1]
    ours = load(tmp_path / "m.pth").double()
    assert ours.config.in_channels == 1
    torch.testing.assert_close(ours(images), model(images), rtol=1e-12, atol=1e-12)
    assert load(tmp_path / "m.pth", in_channels=3).patch_embed.proj.weight.shape[1] == 3


@torch.no_grad()
def test_microsofts_names_are_those_that_timm_translates(tmp_path):
    sample = SOURCES["microsoft's Swin"].write(tmp_path)
    theirs = timm.models.SwinTransformer(**TIMM).double().eval()
    state = torch.load(sample.path, weights_only=True)
    theirs.load_state_dict(checkpoint_filter_fn(state, theirs), strict=True)
    assert torch.equal(theirs(sample.images), sample.logits)


@pytest.mark.parametrize("name", ["timm's Swin", "torchvision's Swin", "microsoft's Swin"])
def test_load_says_that_a_swins_image_size_is_assumed(name, tmp_path):
    sample = SOURCES[name].write(tmp_path)
    with pytest.warns(Assumption, match=one_line_with("assumed: img_size=24, ImageNet's mean and std, bicubic")):
        load(sample.path)
    with pytest.warns(Assumption) as caught:
        load(sample.path, img_size=(48, 24))
    assert not [warning for warning in caught if "assumed: img_size" in str(warning.message)]


@pytest.mark.parametrize(("window", "size"), [(7, 224), (12, 384), (8, 256)])
def test_the_assumed_size_of_a_swin_is_the_one_of_the_papers_code(window, size, tmp_path):
    model = timm.models.SwinTransformer(img_size=size, window_size=window, embed_dim=4, depths=(1, 1, 1, 1),
                                        num_heads=(1, 1, 1, 1), num_classes=2)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    config = load(tmp_path / "m.pth").config
    assert (config.img_size, config.window_size) == (size, window)


def test_load_says_where_timm_pads_otherwise(tmp_path):
    for size, differs in ((20, True), (16, False)):
        torch.save(timm_swin(img_size=size, window_size=4).state_dict(), tmp_path / "m.pth")
        with pytest.warns(Assumption) as caught:
            load(tmp_path / "m.pth")
        assert any("timm pads maps after it shifts them" in str(warning.message) for warning in caught) == differs


def test_load_says_where_transformers_does_not_shift(tmp_path):
    """24 x 12 pixels: the map of the second stage has 6 x 3 tokens, and windows have 3 x 3."""
    torch.manual_seed(5)
    for size, differs in (([24, 12], True), ([24, 24], False)):
        theirs = transformers.SwinForImageClassification(transformers.SwinConfig(**{
            **HF, "image_size": size, "depths": [1, 2], "num_heads": [1, 2]})).eval()
        theirs.save_pretrained(tmp_path)
        with pytest.warns(Assumption) as caught:
            model = load(tmp_path)
        assert model.config.img_size == (tuple(size) if differs else 24)
        assert any("transformers shifts its windows along neither" in str(one.message) for one in caught) == differs
        images = images_of(tuple(size)).float()
        with torch.no_grad():
            assert torch.allclose(model(images), theirs(images).logits, rtol=1e-4, atol=1e-4) != differs


def test_load_assumes_the_shift_that_a_state_dict_does_not_show(tmp_path):
    model = randomised(SwinTransformer(**OURS, shift=False)).float()
    torch.save(model.state_dict(), tmp_path / "m.pth")
    with pytest.warns(Assumption, match="shift=True"):
        assert load(tmp_path / "m.pth").config.shift
    again, images = load(tmp_path / "m.pth", shift=False, img_size=SIDE), images_of(SIDE).float()
    assert torch.equal(again(images), model(images))


# ---- Other windows


def papers_table(table, side, new):
    """Return a table as the paper's utils.load_pretrained resamples it."""
    images = table.permute(1, 0).view(1, table.shape[1], 2 * side - 1, 2 * side - 1)
    images = F.interpolate(images, size=(2 * new - 1, 2 * new - 1), mode="bicubic")
    return images.view(table.shape[1], (2 * new - 1) ** 2).permute(1, 0)


TABLE = "stages.{}.blocks.0.attn.relative_position_bias_table"


@pytest.mark.parametrize(("options", "sides"), [
    (dict(window_size=4), (4, 4, 3)), (dict(window_size=2), (2, 2, 2)), (dict(img_size=16), (3, 3, 2)),
    (dict(img_size=48, window_size=6), (6, 6, 6))])
def test_load_resamples_the_tables_for_other_windows_as_the_papers_code(options, sides, tmp_path):
    sample = SOURCES["microsoft's Swin"].write(tmp_path)
    state = load(sample.path).state_dict()
    with pytest.warns(Assumption) as caught:
        model = load(sample.path, **options)
    assert model.config.windows() == [(side, side) for side in sides]
    for i, side in enumerate(sides):
        wanted = state[TABLE.format(i)] if side == WINDOW else papers_table(state[TABLE.format(i)], WINDOW, side)
        assert torch.equal(model.state_dict()[TABLE.format(i)], wanted)
    text = " ".join(str(warning.message) for warning in caught)
    for side in {*sides} - {WINDOW}:
        assert f"bias tables: resampled from windows of 3x3 to {side}x{side} tokens" in text
    save_model(model, tmp_path / "ours.pt")
    other = SwinTransformer(**OURS)
    report = load_checkpoint(other, tmp_path / "ours.pt")
    assert [note for note in report.notes if note.startswith("bias tables: resampled from windows")]


def test_load_checkpoint_keeps_the_tables_of_rectangular_windows(tmp_path):
    theirs = timm_swin(img_size=(24, 16), window_size=(3, 2))
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    ours = SwinTransformer(**{**OURS, "img_size": (24, 16), "window_size": (3, 2)}).double().eval()
    report = load_checkpoint(ours, tmp_path / "m.pth")
    torch.testing.assert_close(ours(images_of((24, 16))), theirs(images_of((24, 16))), rtol=1e-12, atol=1e-12)
    assert not [note for note in report.notes if "resampled" in note]
    with pytest.raises(InputError, match=one_line_with("tables have 15, 15, 15 offsets, which do not belong")):
        load(tmp_path / "m.pth")
    with pytest.raises(InputError, match=one_line_with("has 15 offsets, which belong to no square window")):
        load_checkpoint(SwinTransformer(**OURS), tmp_path / "m.pth")
    save_model(ours.float(), tmp_path / "ours.pt")
    assert load(tmp_path / "ours.pt").config == ours.config
    load_checkpoint(SwinTransformer(**OURS), tmp_path / "ours.pt")


# ---- What lies beside a file


def test_a_folder_of_transformers_gives_a_swin_its_size_window_and_classes(tmp_path):
    theirs = randomised(transformers.SwinForImageClassification(transformers.SwinConfig(**{
        **HF, "image_size": 32, "id2label": {i: f"kind {i}" for i in range(CLASSES)}})))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(Assumption) as caught:
        model = load(tmp_path)
    assert (model.config.img_size, model.config.windows()) == (32, [(3, 3), (3, 3), (3, 3)])
    assert model.preprocessing.class_names == [f"kind {i}" for i in range(CLASSES)]
    assert not [warning for warning in caught if "img_size" in str(warning.message)]
    path = tmp_path / "config.json"
    entries = json.loads(path.read_text())
    for change, words in ((dict(layer_norm_eps=1e-6), "specifies layer_norm_eps=1e-06"),
                          (dict(hidden_act="relu"), "'relu', but SwinTransformer uses 'gelu'"),
                          (dict(model_type="swinv2"), "'swinv2', but the tensors belong to a SwinTransformer"),
                          (dict(window_size=2), "do not belong to images of 32x32 pixels and windows of 2x2 tokens"),
                          (dict(num_channels=4), "specifies in_channels=4, but the tensors")):
        path.write_text(json.dumps(entries | change))
        with pytest.raises(InputError, match=one_line_with(words)):
            load(tmp_path)


def test_a_folder_of_timm_gives_a_rectangular_swin_its_size_and_window(tmp_path):
    theirs = timm_swin(img_size=(24, 16), window_size=(3, 2))
    theirs.pretrained_cfg = dict(architecture="swin_tiny_patch4_window7_224", num_classes=CLASSES, mean=(0.1, 0.2, 0.3),
                                 std=(0.5, 0.6, 0.7), interpolation="bicubic", input_size=(3, 24, 16))
    save_for_hf(theirs, tmp_path, model_args=dict(img_size=(24, 16), window_size=(3, 2), num_heads=HEADS))
    model = load(tmp_path).double()
    assert (model.config.img_size, model.config.window_size) == ((24, 16), (3, 2))
    assert model.preprocessing.mean == (0.1, 0.2, 0.3)
    torch.testing.assert_close(model(images_of((24, 16))), theirs(images_of((24, 16))), rtol=1e-12, atol=1e-12)
    entries = json.loads((tmp_path / "config.json").read_text())
    entries["model_args"]["always_partition"] = True
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=one_line_with("specifies always_partition=True")):
        load(tmp_path)


# ---- What cannot be held


def timm_state(build, **options):
    return build(**{**TIMM, **options}).state_dict()


def without(state, pattern):
    return {name: tensor for name, tensor in state.items() if not re.search(pattern, name)}


REFUSED = {
    "timm's V2": (lambda: timm_state(timm.models.SwinTransformerV2), "a Swin Transformer V2"),
    "timm's V2 by Reich": (lambda: timm.models.SwinTransformerV2Cr(
        img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2)).state_dict(),
        "a Swin Transformer V2"),
    "torchvision's V2": (lambda: torchvision.models.SwinTransformer(
        [2, 2], 8, [1, 1], [1, 1], [2, 2], block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2).state_dict(), "a Swin Transformer V2"),
    "transformers' V2": (lambda: transformers.Swinv2Model(transformers.Swinv2Config(**HF)).state_dict(),
                         "a Swin Transformer V2"),
    "SwinMLP": (lambda: {**without(microsoft(timm_swin().state_dict()), r"\.attn\."),
                         "layers.0.blocks.0.spatial_mlp.weight": torch.zeros(9, 9, 1)}, "a SwinMLP"),
    "microsoft's absolute positions": (lambda: {**microsoft(timm_swin().state_dict()),
                                                "absolute_pos_embed": torch.zeros(1, 144, D)}, "absolute positions"),
    "transformers' absolute positions": (lambda: transformers.SwinForImageClassification(transformers.SwinConfig(
        **HF, use_absolute_embeddings=True)).state_dict(), "absolute positions"),
    "no tables": (lambda: without(timm_swin().state_dict(), "relative_position_bias_table"), "without tables"),
    "videos": (lambda: {**timm_swin().state_dict(), "patch_embed.proj.weight": torch.zeros(D, 3, 2, 2, 2)},
               "whose patches have 3 dimensions"),
    "windows of no image": (lambda: {**timm_swin().state_dict(), **{
        f"layers.2.blocks.{j}.attn.relative_position_bias_table": torch.zeros(49, 3) for j in range(2)}},
        "tables have 25, 25, 49 offsets, which do not belong to images of 32x32 pixels and windows of 3x3 tokens"),
    "a missing block": (lambda: without(timm_swin().state_dict(), r"layers\.1\.blocks\.0\."),
                        "not a complete SwinTransformer: blocks are missing"),
    "a missing tensor": (lambda: without(timm_swin().state_dict(), r"layers\.1\.downsample\.norm\.bias"),
                         "the file lacks stages.1.downsample.norm.bias"),
    "no biases of queries": (lambda: timm_state(timm.models.SwinTransformer, qkv_bias=False), "the file lacks stages"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_relatives_of_swin_are_refused_with_the_reason(kind, tmp_path):
    build, reason = REFUSED[kind]
    state = build()
    for content in (state, {"model": {f"module.{name}": tensor for name, tensor in state.items()}}):
        torch.save(content, tmp_path / "m.pth")
        for take in (load, describe_checkpoint):
            with pytest.raises(InputError, match=one_line_with(reason)) as caught:
                take(tmp_path / "m.pth")
            assert str(tmp_path / "m.pth") in str(caught.value)


def test_a_saved_swin_v2_of_transformers_is_refused(tmp_path):
    transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**HF)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=one_line_with("a Swin Transformer V2, with scaled cosine attention")):
        load(tmp_path)


@pytest.mark.parametrize(("options", "words"), [
    (dict(n_heads=(1, 1, 1)), "has shape (25, 2) in the file, but (25, 1) in the model"),
    (dict(relative_bias=False), "build the model with relative_bias=True"), (dict(depths=(1, 2, 1)), "the file has"),
    (dict(depths=(2, 2, 2)), "the file lacks"), (dict(embed_dim=24), "has shape")])
def test_load_checkpoint_refuses_another_swin_and_changes_nothing(options, words, tmp_path):
    sample = SOURCES["torchvision's Swin"].write(tmp_path)
    model = SwinTransformer(**{**OURS, **options})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=one_line_with(words)):
        load_checkpoint(model, sample.path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_swin_without_shift_or_tables_is_saved_and_does_not_pass_for_another(tmp_path):
    model = SwinTransformer(**OURS, shift=False, relative_bias=False)
    save_model(model, tmp_path / "ours.pt")
    again = load(tmp_path / "ours.pt", n_classes=2)
    assert (again.config.shift, again.config.relative_bias, again.config.n_classes) == (False, False, 2)
    with pytest.raises(InputError, match=one_line_with("shift is False in the file, but True in the model")):
        load_checkpoint(SwinTransformer(**OURS, relative_bias=False), tmp_path / "ours.pt")
    with pytest.raises(InputError, match=one_line_with("build the model with relative_bias=False")):
        load_checkpoint(SwinTransformer(**OURS, shift=False), tmp_path / "ours.pt")


DAMAGES = {"missing": None, "flat": torch.flatten, "empty": lambda tensor: tensor[:0], "one number": torch.sum,
           "whole numbers": torch.Tensor.long, "not finite": lambda tensor: tensor * float("nan")}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["microsoft's Swin", "torchvision's Swin", "transformers Swin with head, new names"])
def test_a_damaged_file_of_swin_is_refused_in_one_line(name, damage, tmp_path):
    sample = SOURCES[name].write(tmp_path)
    content = torch.load(sample.path, weights_only=True)
    state = content.get("model", content)
    matrices = [key for key, tensor in state.items() if tensor.ndim == 2 and "index" not in key]
    for key in (matrices[0], next(key for key in matrices if "table" in key), matrices[-2]):
        broken = {other: tensor for other, tensor in state.items() if other != key}
        if damage != "missing":
            broken[key] = DAMAGES[damage](state[key])
        torch.save(broken, tmp_path / "m.pth")
        for take in (load, lambda path: load_checkpoint(SwinTransformer(**OURS), path)):
            with pytest.raises(InputError, match=one_line_with("m.pth")):
                take(tmp_path / "m.pth")


# ---- Used as any of our models


def test_a_public_swin_is_inspected_and_gets_a_new_head(tmp_path, capsys):
    sample = SOURCES["microsoft's Swin"].write(tmp_path)
    train_vit.main(["inspect", str(sample.path)])
    out = capsys.readouterr().out
    assert "microsoft's Swin; " in out
    assert "dropped: layers.1.blocks.1.attn_mask (the mask of the shifted windows" in out
    assert "assumed: img_size=24" in out
    model = load(sample.path, n_classes=3)
    assert not model.head.weight.any()
    assert model(torch.randn(2, 3, SIDE, SIDE)).shape == (2, 3)
    assert isinstance(load(sample.path, n_classes=0).head, nn.Identity)


@pytest.mark.parametrize("frozen", [[], ["--freeze-backbone"]], ids=["all", "frozen"])
def test_train_fine_tunes_a_swin_of_another_library(frozen, tmp_path):
    sample = SOURCES["microsoft's Swin"].write(tmp_path)
    start = load(sample.path).state_dict()
    train(tmp_path / "run", "--data-dir", make_folder(tmp_path / "set", 30), "--pretrained", sample.path, "--steps", 2,
          "--batch-size", 8, *frozen)
    model = load(tmp_path / "run" / "best.pt")
    assert (type(model), model.preprocessing.class_names) == (SwinTransformer, ["blue", "red"])
    moved = {key for key, tensor in model.state_dict().items()
             if tensor.shape != start[key].shape or not torch.equal(tensor, start[key])}
    assert (moved == {"head.weight", "head.bias"}) == bool(frozen)
    assert moved >= {"head.weight", "head.bias"}
