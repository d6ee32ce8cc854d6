"""Files of a DeiT with two heads: both are fitted, matched, adapted and dropped together."""

import json
import re

import pytest
import timm
import torch
import transformers
from command_runs import make_folder, prepared, train
from timm.models import save_for_hf
from timm.models.deit import VisionTransformerDistilled
from torch import nn

import train_vit
from vit_bridge.errors import Assumption
from vit_bridge.models.deit import DistilledViT
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.weights.checkpoints import describe_checkpoint, load, load_checkpoint, save_model
from vit_bridge.weights.heads import fit_head
from vit_model import InputError, VisionTransformer, resample_positions

HEADS = ("head", "head_dist")
OURS = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, n_heads=2, n_classes=3)
TIMM = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3)
HF = dict(image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
          num_labels=3)


def one_line_with(text):
    return rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z"


def randomised(model, seed=5):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def trained(names=None, **options):
    """Return a model whose heads differ, and are marked by rows."""
    model = randomised(DistilledViT(**{**OURS, **options}))
    if names:
        model.preprocessing = Preprocessing(16, class_names=names)
    return model


def same_heads(model, source, rows):
    """Return whether both heads have these rows of the source's, zeros for None."""
    pairs = [(getattr(model, name), getattr(source, name)) for name in HEADS]
    return all(torch.equal(getattr(head, kind), torch.stack([
        torch.zeros_like(getattr(old, kind)[0]) if row is None else getattr(old, kind)[row] for row in rows]))
        for head, old in pairs for kind in ("weight", "bias"))


# ---- fit_head, save_model


@pytest.mark.parametrize(("names", "rows", "line"), [
    (["owl", "fox", "hare"], [0, 1, 2], "head: kept, because its 3 classes are those of the images"),
    (["hare", "emu", "owl", "elk"], [2, None, 0, None],
     "head: starts from the trained rows for hare and owl; 2 new (emu, elk); 1 of 3 dropped (fox)"),
    (["cat", "dog"], [None, None], "head: new, because none of its 3 classes (owl, fox, hare) is among the 2 classes "
                                   "of the images (cat, dog)")])
def test_fit_head_gives_both_heads_the_same_rows_and_says_so_once(names, rows, line):
    source, model = trained(["owl", "fox", "hare"]), trained(["owl", "fox", "hare"])
    assert not torch.equal(source.head.weight, source.head_dist.weight)
    assert fit_head(model, names) == line
    assert same_heads(model, source, rows)
    assert (model.config.n_classes, model.preprocessing.class_names) == (len(names), names)
    assert [logits.shape for logits in model.train()(torch.randn(2, 3, 16, 16))] == [(2, len(names))] * 2


def test_fit_head_removes_and_makes_both_heads():
    model = trained()
    fit_head(model, 0)
    assert all(isinstance(getattr(model, name), nn.Identity) for name in HEADS)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 24)
    assert fit_head(model, 4) == "head: new, because the weights have none"
    assert [getattr(model, name).weight.shape for name in HEADS] == [(4, 24)] * 2


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.int8])
def test_save_model_keeps_both_heads_and_load_replaces_them(dtype, tmp_path, recwarn):
    model = trained(["owl", "fox", "hare"])
    save_model(model, tmp_path / "m.pt", dtype=dtype)
    again = load(tmp_path / "m.pt")
    assert (type(again), again.config, again.preprocessing) == (DistilledViT, model.config, model.preprocessing)
    if dtype is None:
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())
    kept = load(tmp_path / "m.pt", n_classes=3, img_size=24)
    assert same_heads(kept, again, [0, 1, 2])
    assert torch.equal(kept.pos_embed, resample_positions(again.pos_embed, (4, 4), (6, 6)))
    assert not [warning for warning in recwarn if "resampled" not in str(warning.message)]
    with pytest.warns(Assumption, match="head: new, because the trained one has 3"):
        other = load(tmp_path / "m.pt", n_classes=5)
    assert other.train()(torch.randn(2, 3, 16, 16))[1].shape == (2, 5)
    assert same_heads(other, again, [None] * 5)
    assert load(tmp_path / "m.pt", n_classes=0)(torch.randn(2, 3, 16, 16)).shape == (2, 24)


def test_save_model_refuses_heads_of_different_sizes_or_layers(tmp_path):
    model = trained()
    model.head_dist = nn.Linear(24, 4)
    with pytest.raises(InputError, match=one_line_with("different numbers of classes: head 3 and head_dist 4")):
        save_model(model, tmp_path / "m.pt")
    model.head_dist = nn.Sequential(nn.Linear(24, 3))
    with pytest.raises(InputError, match=one_line_with("a head of class Sequential")):
        save_model(model, tmp_path / "m.pt")


@pytest.mark.parametrize("name", HEADS)
def test_a_second_head_without_bias_is_saved_with_one_of_zeros(name, tmp_path):
    model, images = trained(), torch.randn(2, 3, 16, 16)
    setattr(model, name, nn.Linear(24, 3, bias=False))
    save_model(model, tmp_path / "m.pt")
    assert torch.equal(load(tmp_path / "m.pt")(images), model(images))


# ---- load_checkpoint


@pytest.mark.parametrize(("names", "rows"), [
    (["fox", "hare", "owl"], [1, 2, 0]), (["owl", "emu", "hare"], [0, None, 2]), (["owl", "fox", "hare"], [0, 1, 2])])
def test_load_checkpoint_matches_the_rows_of_both_heads(names, rows, tmp_path):
    source, model = trained(["owl", "fox", "hare"]), trained(names)
    save_model(source, tmp_path / "m.pt")
    for name in HEADS:
        nn.init.zeros_(getattr(model, name).weight)
        nn.init.zeros_(getattr(model, name).bias)
    report = load_checkpoint(model, tmp_path / "m.pt")
    assert same_heads(model, source, rows)
    assert len([note for note in report.notes if note.startswith("head: ")]) == (rows != [0, 1, 2])
    assert report.dropped == {}


@pytest.mark.parametrize("n_classes", [0, 4])
def test_load_checkpoint_keeps_or_drops_both_heads(n_classes, tmp_path):
    theirs = randomised(VisionTransformerDistilled(**TIMM))
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    model = trained(n_classes=n_classes)
    before = [getattr(model, name).weight.clone() for name in HEADS] if n_classes else []
    report = load_checkpoint(model, tmp_path / "m.pth")
    assert sorted(report.dropped) == sorted(f"{name}.{kind}" for name in HEADS for kind in ("weight", "bias"))
    assert all(torch.equal(getattr(model, name).weight, weight) for name, weight in zip(HEADS, before, strict=False))
    notes = [note for note in report.notes if "has 3 classes, but the model's head has 4" in note]
    assert len(notes) == bool(n_classes)


def test_load_checkpoint_adds_the_biases_that_heads_lack(tmp_path):
    theirs = randomised(VisionTransformerDistilled(**TIMM))
    theirs.head.bias.data.zero_()
    theirs.head_dist.bias.data.zero_()
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not re.match(r"head\w*\.bias", name)}
    torch.save(state, tmp_path / "m.pth")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(load(tmp_path / "m.pth", n_heads=2)(images), theirs(images))


def teacher_state():
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**HF)).state_dict()


@pytest.mark.parametrize(("build", "lost", "missing"), [
    (lambda: VisionTransformerDistilled(**TIMM).state_dict(), "head_dist.", "head_dist.weight"),
    (lambda: VisionTransformerDistilled(**TIMM).state_dict(), "head.", "head.weight"),
    (teacher_state, "distillation_classifier.", "head_dist.weight"), (teacher_state, "cls_classifier.", "head.weight")])
def test_a_file_with_one_of_two_heads_says_what_is_missing(build, lost, missing, tmp_path):
    torch.save({name: tensor for name, tensor in build().items() if not name.startswith(lost)}, tmp_path / "m.pth")
    for take in (load, describe_checkpoint, lambda path: load_checkpoint(trained(), path)):
        with pytest.raises(InputError, match=one_line_with(missing)) as caught:
            take(tmp_path / "m.pth")
        assert re.search("missing|lacks", str(caught.value))


def test_files_of_one_and_of_two_heads_do_not_pass_for_each_other(tmp_path):
    torch.save(timm.models.VisionTransformer(**TIMM).state_dict(), tmp_path / "one.pth")
    torch.save(VisionTransformerDistilled(**TIMM).state_dict(), tmp_path / "two.pth")
    with pytest.raises(InputError, match=one_line_with("the file lacks dist_token")):
        load_checkpoint(trained(), tmp_path / "one.pth")
    with pytest.raises(InputError, match=one_line_with("it is a DistilledViT (timm's names of a distilled DeiT), but "
                                                       "the model is a VisionTransformer; use load(path)")):
        load_checkpoint(VisionTransformer(**OURS), tmp_path / "two.pth")
    for model, other in ((trained(), VisionTransformer(**OURS)), (VisionTransformer(**OURS), trained())):
        save_model(model, tmp_path / "ours.pt")
        with pytest.raises(InputError, match=one_line_with(f"holds a {type(model).__name__}, but the model is a")):
            load_checkpoint(other, tmp_path / "ours.pt")


@pytest.mark.parametrize("n_registers", [0, 2])
def test_the_state_dict_of_a_distilled_vit_opens_with_and_without_registers(n_registers, tmp_path):
    model = trained(n_registers=n_registers)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    again = DistilledViT(**OURS, n_registers=n_registers).eval()
    with pytest.warns(Assumption):
        load_checkpoint(again, tmp_path / "m.pth")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images), model(images))
    with pytest.warns(Assumption):
        loaded = load(tmp_path / "m.pth", n_heads=2)
    assert torch.equal(loaded(images), model(images))


# ---- What lies beside a file


def test_a_folder_of_transformers_opens_with_two_heads_and_its_classes(tmp_path):
    theirs = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(
        **{**HF, "id2label": dict(enumerate(["owl", "fox", "hare"]))}))
    randomised(theirs).save_pretrained(tmp_path)
    model, images = load(tmp_path), torch.randn(2, 3, 16, 16)
    assert (type(model), model.config.n_heads, model.config.norm_eps) == (DistilledViT, 2, 1e-12)
    assert model.preprocessing.class_names == ["owl", "fox", "hare"]
    torch.testing.assert_close(model(images), theirs(images).logits)


def test_a_folder_of_timm_opens_with_two_heads(tmp_path):
    theirs = randomised(VisionTransformerDistilled(**TIMM))
    theirs.pretrained_cfg = dict(architecture="deit_tiny_distilled_patch16_224", num_classes=3, mean=(0.1, 0.2, 0.3),
                                 std=(0.5, 0.6, 0.7), interpolation="bicubic", input_size=(3, 16, 16))
    save_for_hf(theirs, tmp_path, model_args={name: value for name, value in TIMM.items() if name != "num_classes"})
    model, images = load(tmp_path), torch.randn(2, 3, 16, 16)
    assert (type(model), model.config.n_heads, model.preprocessing.mean) == (DistilledViT, 2, (0.1, 0.2, 0.3))
    torch.testing.assert_close(model(images), theirs(images))
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(entries | dict(global_pool="avg", model_args={})))
    with pytest.raises(InputError, match=one_line_with("'avg'; DistilledViT supports only token")):
        load(tmp_path)


# ---- From the command line


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("animals") / "set", 24, classes=["fox", "hare", "owl"], n=4)


@pytest.mark.parametrize("pretrained", ["timm", "ours"])
def test_training_begins_with_both_trained_heads(pretrained, animals, tmp_path):
    source = trained(["owl", "fox", "hare"])
    if pretrained == "ours":
        save_model(source, tmp_path / "m.pt")
    else:
        torch.save(source.state_dict(), tmp_path / "m.pt")
    rows, options = ([1, 2, 0], []) if pretrained == "ours" else ([0, 1, 2], ["--n-heads", 2])
    made = prepared("--data-dir", animals, "--output-dir", tmp_path / "run", "--pretrained", tmp_path / "m.pt",
                    *options)
    assert same_heads(made.model, source, rows)
    assert made.model.preprocessing.class_names == ["fox", "hare", "owl"]


def test_train_fine_tunes_a_distilled_model_and_inspect_shows_it(animals, tmp_path, capsys):
    torch.save(trained().state_dict(), tmp_path / "m.pt")
    train(tmp_path / "run", "--data-dir", animals, "--pretrained", tmp_path / "m.pt", "--n-heads", 2, "--steps", 2,
          "--batch-size", 4)
    model = load(tmp_path / "run" / "best.pt")
    assert (type(model), model.preprocessing.class_names) == (DistilledViT, ["fox", "hare", "owl"])
    for name in HEADS:
        assert not torch.equal(getattr(model, name).weight, getattr(trained(), name).weight)
    capsys.readouterr()
    train_vit.main(["inspect", str(tmp_path / "run" / "best.pt")])
    assert "    model = DistilledViT(" in capsys.readouterr().out
