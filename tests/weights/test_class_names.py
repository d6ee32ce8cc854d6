"""Class names: stored beside the weights in a file, or given by the caller."""

import argparse

import pytest
import torch

from vit_bridge.errors import Assumption, InputError
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.weights.checkpoints import load, save_model
from vit_bridge.weights.files import class_names_in
from vit_model import VisionTransformer

NAMES = ["owl", "hare", "fox"]


def tiny():
    torch.manual_seed(0)
    return VisionTransformer(8, 4, n_classes=3, embed_dim=8, depth=1, n_heads=1)


@pytest.mark.parametrize("entries", [
    dict(classes=NAMES), dict(class_names=tuple(NAMES)), dict(class_to_idx=dict(fox=2, hare=1, owl=0)),
    dict(idx_to_class={2: "fox", 1: "hare", 0: "owl"}), dict(id2label={"0": "owl", "1": "hare", "2": "fox"}),
    dict(hyper_parameters=dict(classes=NAMES)), dict(args=argparse.Namespace(class_names=NAMES))], ids=str)
def test_load_takes_the_names_beside_the_weights(entries, tmp_path):
    torch.save(dict(entries, state_dict=tiny().state_dict()), tmp_path / "m.pth")
    with pytest.warns(Assumption, match="class names: taken from '[a-z_2]+' in the file"):
        assert load(tmp_path / "m.pth").preprocessing.class_names == NAMES


@pytest.mark.parametrize("entries", [
    dict(classes=NAMES[:2]), dict(classes=["owl", "hare", "owl"]), dict(classes=[0, 1, 2]), dict(labels=torch.zeros(3)),
    dict(class_to_idx=dict(fox=3, hare=1, owl=0)), dict(classes="owl")], ids=str)
def test_names_that_fit_no_head_are_not_taken(entries):
    assert class_names_in(entries, 3) == ("", None)


def test_load_takes_given_names_where_nothing_records_them(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "m.pth")
    assert load(tmp_path / "m.pth", class_names=NAMES).preprocessing.class_names == NAMES
    with pytest.raises(InputError, match=r"class_names has 2 names \(owl, hare\), but the head of .* has 3 outputs"):
        load(tmp_path / "m.pth", class_names=NAMES[:2])
    save_model(tiny(), tmp_path / "ours.pt", Preprocessing(8, class_names=NAMES))
    assert load(tmp_path / "ours.pt", class_names=NAMES).preprocessing.class_names == NAMES
    with pytest.raises(InputError, match=r"class_names differ from the names in [^\n]*ours.pt, first at position \d: "):
        load(tmp_path / "ours.pt", class_names=NAMES[::-1])
