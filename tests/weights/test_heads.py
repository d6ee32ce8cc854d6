"""The head of trained weights for other classes, or for the same classes in another order."""

import re

import pytest
import timm
import torch
import transformers
from command_runs import make_folder, prepared
from torch import nn

from vit_bridge.data.shapes import SHAPES
from vit_bridge.errors import Assumption
from vit_bridge.models.convnet import ConvNet
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.weights.checkpoints import load, load_checkpoint, save_model
from vit_bridge.weights.heads import first_difference, fit_head
from vit_model import VisionTransformer

CONVNET = dict(img_size=8, in_channels=3, widths=(4, 6), depths=(1, 1), stem_stride=1)


def trained(names, n_classes=3):
    """Return a small model whose head has i + 1 in all of row i, and bias 10 (i + 1)."""
    model = ConvNet(**CONVNET, n_classes=n_classes)
    if n_classes:
        with torch.no_grad():
            model.head.weight.copy_(torch.arange(1.0, n_classes + 1)[:, None].expand(-1, 6))
            model.head.bias.copy_(10 * torch.arange(1.0, n_classes + 1))
    model.preprocessing = Preprocessing(8, (0.1,) * 3, (0.2,) * 3, "bicubic", names)
    return model


CASES = {
    "the same": (["owl", "fox", "hare"], ["owl", "fox", "hare"], [1, 2, 3],
                 "head: kept, because its 3 classes are those of the images"),
    "another order": (["owl", "fox", "hare"], ["fox", "hare", "owl"], [2, 3, 1],
                      "head: starts from the trained rows for fox, hare and owl"),
    "a new one": (["owl", "fox", "hare"], ["emu", "fox", "hare", "owl"], [0, 2, 3, 1],
                  "head: starts from the trained rows for fox, hare and owl; 1 new (emu)"),
    "one less": (["owl", "fox", "hare"], ["hare", "owl"], [3, 1],
                 "head: starts from the trained rows for hare and owl; 1 of 3 dropped (fox)"),
    "another": (["owl", "fox", "hare"], ["emu", "fox", "owl"], [0, 2, 1],
                "head: starts from the trained rows for fox and owl; 1 new (emu); 1 of 3 dropped (hare)"),
    "none of them": (["owl", "fox", "hare"], ["cat", "dog", "emu"], [0, 0, 0],
                     "head: new, because none of its 3 classes (owl, fox, hare) is among the 3 classes of the images "
                     "(cat, dog, emu)"),
    "text and numbers": ([0, 1, 2], ["2", "0", "1"], [3, 1, 2],
                         "head: starts from the trained rows for 2, 0 and 1"),
    "one name twice, the same": (["crane", "owl", "crane"], ["crane", "owl", "crane"], [1, 2, 3],
                                 "head: kept, because its 3 classes are those of the images"),
    "one name twice": (["crane", "owl", "crane"], ["owl", "crane", "hare"], [2, 0, 0],
                       "head: starts from the trained rows for owl; 2 new (crane, hare); 2 of 3 dropped (crane, crane)"
                       "; names that occur more than once could not be matched (crane)"),
    "one folder twice": (["crane", "owl", "hare"], ["crane", "crane", "hare"], [0, 0, 3],
                         "head: starts from the trained rows for hare; 2 new (crane, crane); 2 of 3 dropped (crane, "
                         "owl); names that occur more than once could not be matched (crane)"),
    "no names": (None, ["fox", "hare", "owl"], [1, 2, 3],
                 "head: kept, with its 3 rows; their classes have no names, so they are assumed to be in the order of "
                 "the images' classes (fox, hare, owl); if not, set class_names= or --class-names"),
    "no names, another width": (None, ["fox", "hare"], [0, 0],
                                "head: new, because the trained one has 3 classes, not 2 (fox, hare)"),
    "a number": (["owl", "fox", "hare"], 3, [1, 2, 3], "head: kept, with its 3 rows unchanged"),
    "another number": (["owl", "fox", "hare"], 2, [0, 0],
                       "head: new, because the trained one has 3 classes (owl, fox, hare), not 2"),
}


@pytest.mark.parametrize("name", CASES)
def test_fit_head_matches_rows_by_the_names_of_the_classes(name):
    theirs, wanted, rows, line = CASES[name]
    model = trained(theirs)
    assert fit_head(model, wanted) == line
    assert model.head.weight.tolist() == [[row] * 6 for row in rows]
    assert model.head.bias.tolist() == [10 * row for row in rows]
    names = (theirs if name == "a number" else None) if isinstance(wanted, int) else wanted
    assert model.preprocessing == Preprocessing(8, (0.1,) * 3, (0.2,) * 3, "bicubic", names)
    assert model.config.n_classes == len(rows)
    assert all(parameter.requires_grad for parameter in model.head.parameters())


def test_fit_head_counts_many_matched_rows():
    names = [f"c{i}" for i in range(7)]
    assert fit_head(trained(names, 7), names[::-1]) == \
        "head: starts from the trained rows for 7 classes (c6, c5, c4, c3, c2, ...)"


def test_first_difference_names_the_position_and_both_classes():
    assert first_difference(SHAPES, [*SHAPES[:8], *SHAPES[:7:-1]]) == \
        f"first at position 9: {SHAPES[8]!r} instead of {SHAPES[9]!r} (10 names, and 10)"
    assert first_difference(["a"], ["a", "b"]) == "first at position 2: no name instead of 'b' (1 names, and 2)"
    assert first_difference(["a", "b"], ["a"]) == "first at position 2: 'b' instead of no name (2 names, and 1)"


def test_fit_head_makes_a_head_where_there_is_none_and_none_for_zero():
    model = trained(None, n_classes=0)
    assert fit_head(model, ["a", "b"]) == "head: new, because the weights have none"
    assert not model.head.weight.any()
    assert fit_head(model, 0) == "head: none, because n_classes is 0; the head with 2 classes was dropped"
    assert isinstance(model.head, nn.Identity)
    model.head = nn.Sequential(nn.Linear(6, 3))
    assert fit_head(model, ["a", "b"]) == "head: new, because a Sequential is not a single linear layer"


def test_fit_head_keeps_a_head_without_bias():
    model = trained(["a", "b", "c"])
    model.head = nn.Linear(6, 3, bias=False)
    rows = model.head.weight.detach().clone()
    fit_head(model, ["c", "a", "b"])
    assert model.head.bias is None
    assert torch.equal(model.head.weight, rows[[2, 0, 1]])


def test_a_head_without_bias_is_saved_with_one_of_zeros(tmp_path):
    model = trained(["a", "b", "c"])
    model.head = nn.Linear(6, 3, bias=False)
    save_model(model, tmp_path / "m.pt")
    again, images = load(tmp_path / "m.pt"), torch.randn(2, 3, 8, 8)
    assert torch.equal(again(images), model.eval()(images))


# ---- In load_checkpoint, a training, and load


@pytest.mark.parametrize(("names", "rows", "words"), [
    (["owl", "hare", "fox"], [3, 2, 1], "head: starts from the trained rows for owl, hare and fox"),
    (["fox", "hare", "owl"], [1, 2, 3], None),
    (["owl", "emu", "fox"], [3, 7, 1], "head: starts from the trained rows for owl and fox; 1 new (emu)"),
    (["cat", "dog", "emu"], [7, 7, 7], "head: the model keeps its own, which is untrained, because the file's head is "
                                       "for different classes from the model's, first at position 1: 'fox' instead of "
                                       "'cat'")])
def test_load_checkpoint_matches_rows_by_the_names_of_the_classes(names, rows, words, tmp_path, recwarn):
    save_model(trained(["fox", "hare", "owl"]), tmp_path / "m.pt")
    model = trained(names)
    nn.init.constant_(model.head.weight, 7.0)
    nn.init.constant_(model.head.bias, 70.0)
    report = load_checkpoint(model, tmp_path / "m.pt")
    assert model.head.weight.tolist() == [[row] * 6 for row in rows]
    assert model.head.bias.tolist() == [10 * row for row in rows]
    assert model.preprocessing.class_names == names
    notes = [note for note in report.notes if note.startswith("head: ")]
    assert (len(notes), len(recwarn)) == ((0, 0) if words is None else (1, 1))
    assert words is None or words in notes[0]


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("animals") / "set", 24, classes=["fox", "hare", "owl"], n=4)


def timm_file(folder):
    torch.manual_seed(3)
    model = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), folder / "flowers.pth")
    return folder / "flowers.pth", model.head.weight


def transformers_folder(folder):
    torch.manual_seed(3)
    names = ["owl", "fox", "hare"]  # in another order than the folders'
    model = transformers.ViTForImageClassification(transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}))
    model.save_pretrained(folder / "hf")
    return folder / "hf", model.classifier.weight[[1, 2, 0]]


@pytest.mark.parametrize("frozen", [[], ["--freeze-backbone"]], ids=["all", "frozen"])
@pytest.mark.parametrize(("make", "words"), [
    (timm_file, "kept, with its 3 rows; their classes have no names"),
    (transformers_folder, "starts from the trained rows for fox, hare and owl")])
def test_training_begins_with_the_trained_head_and_says_so(make, words, frozen, animals, tmp_path, capsys):
    path, rows = make(tmp_path)
    with pytest.warns(Assumption):
        made = prepared("--data-dir", animals, "--output-dir", tmp_path / "run", "--pretrained", path, *frozen)
    assert torch.equal(made.model.head.weight, rows)
    assert torch.equal(next(made.trained.parameters()) if frozen else made.model.head.weight, rows)
    assert made.model.preprocessing.class_names == ["fox", "hare", "owl"]
    out = capsys.readouterr().out
    assert len(re.findall(r"^head: ", out, re.MULTILINE)) == 1
    assert re.search(rf"^head: {words}", out, re.MULTILINE)


def test_load_says_what_becomes_of_the_head(tmp_path):
    path, rows = timm_file(tmp_path)
    for n_classes, words in ((3, "head: kept, with its 3 rows"), (4, "head: new, because the trained one has 3"),
                             (0, "head: none, because n_classes is 0; the head with 3 classes")):
        with pytest.warns(Assumption, match=words):
            model = load(path, n_classes=n_classes)
        assert model.config.n_classes == n_classes
    with pytest.warns(Assumption):
        assert torch.equal(load(path, n_classes=3).head.weight, rows)


def test_load_keeps_a_head_whose_classes_are_named_in_silence(tmp_path, recwarn):
    model = VisionTransformer(8, 4, 3, 2, 12, 1, 3)
    save_model(model, tmp_path / "m.pt", Preprocessing(8, class_names=["a", "b"]))
    kept = load(tmp_path / "m.pt", n_classes=2)
    assert torch.equal(kept.head.weight, model.head.weight)
    assert kept.preprocessing.class_names == ["a", "b"]
    assert not list(recwarn)
