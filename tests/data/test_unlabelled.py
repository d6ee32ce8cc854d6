"""Images without labels: folders of any depth, test images kept out, and the same split for the same seed."""

import warnings

import pytest
import torch
from PIL import Image

from vit_bridge.data.loaders import get_unlabelled_loaders
from vit_bridge.errors import Assumption, InputError


def fill(folder, names, side=12):
    for i, name in enumerate(names):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (i * 20 % 256, 0, 0)).save(path)


def files_of(loaders, root):
    return [sorted(str(file).removeprefix(f"{root}/").removesuffix(".png") for file in loader.files)
            for loader in loaders]


def test_a_flat_folder_is_split_into_training_and_validation(tmp_path):
    fill(tmp_path, [f"{i}" for i in range(10)])
    train, val = files_of(get_unlabelled_loaders(tmp_path, img_size=12, val_fraction=0.3), tmp_path)
    assert (len(train), len(val)) == (7, 3)
    assert {*train} | {*val} == {f"{i}" for i in range(10)}
    assert files_of(get_unlabelled_loaders(tmp_path, img_size=12, val_fraction=0.3), tmp_path) == [train, val]
    assert files_of(get_unlabelled_loaders(tmp_path, img_size=12, val_fraction=0.3, seed=1), tmp_path) != [train, val]


def test_folders_of_any_depth_are_one_set_and_labels_are_ignored(tmp_path):
    fill(tmp_path, ["cats/a", "cats/deep/b", "dogs/c", "d"])
    loaders = get_unlabelled_loaders(tmp_path, batch_size=2, img_size=12)
    train, val = files_of(loaders, tmp_path)
    assert {*train, *val} == {"cats/a", "cats/deep/b", "dogs/c", "d"}
    assert all(loader.class_names is None for loader in loaders)
    assert all((labels == 0).all() for loader in loaders for _, labels in loader)


@pytest.mark.parametrize("folders", [("train", "val"), ("train",), ("valid",), ()])
def test_test_images_are_never_used(tmp_path, folders):
    fill(tmp_path, [f"{folder}/x{i}" for folder in (*folders, "test") for i in range(4)]
         + ["loose0", "loose1", "loose2"] * ("train" not in folders))
    train, val = files_of(get_unlabelled_loaders(tmp_path, img_size=12), tmp_path)
    assert not any(name.startswith("test/") for name in train + val)
    if len(folders) == 2:
        assert (train, val) == ([f"train/x{i}" for i in range(4)], [f"val/x{i}" for i in range(4)])
    if folders == ("valid",):
        assert (train, val) == (["loose0", "loose1", "loose2"], [f"valid/x{i}" for i in range(4)])


@pytest.mark.parametrize(("files", "said"), [
    (["train/a", "train/b", "val/c", "test/d", "more/e", "f"],
     r"more/, test/ and 1 image outside train/; learning without labels uses train/ and val/ alone"),
    (["a", "b", "validation/c", "test/d"], r"test/; learning without labels uses all images outside test/")])
def test_images_that_are_not_used_are_named(tmp_path, files, said):
    fill(tmp_path, files)
    with pytest.warns(Assumption, match=rf"\Anot used in [^\n]*: {said}\Z"):
        train, val = files_of(get_unlabelled_loaders(tmp_path, img_size=12), tmp_path)
    assert (train, val) == ([name for name in files if name[:5] in ("a", "b", "train")], [files[2]])


@pytest.mark.parametrize("files", [["a", "deep/b", "c"], ["train/a", "train/b", "val/c"]])
def test_nothing_is_said_if_all_images_are_used(tmp_path, files):
    fill(tmp_path, files)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Assumption)
        get_unlabelled_loaders(tmp_path, img_size=12)


def test_an_absent_folder_is_refused_without_advice_on_classes(tmp_path):
    with pytest.raises(InputError, match=r"\Athere is no data folder '[^\n]*absent'; use a folder of images\Z"):
        get_unlabelled_loaders(tmp_path / "absent")


def test_the_drawn_shapes_are_named_if_there_is_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    get_unlabelled_loaders(img_size=8, n_images=20)
    assert "There is no ./data: using the built-in drawn shapes. For other data, set data_dir (a folder of images)" in \
        capsys.readouterr().out


def test_too_few_images_are_refused_in_one_line(tmp_path):
    fill(tmp_path, ["only"])
    with pytest.raises(InputError, match=r"has 1 image \(JPEG.*at least 2 are needed"):
        get_unlabelled_loaders(tmp_path)


def test_other_files_are_reported(tmp_path):
    fill(tmp_path, ["a", "b", "c"])
    (tmp_path / "notes.txt").write_text("x")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_unlabelled_loaders(tmp_path, img_size=12)
    assert any("1 .txt" in str(one.message) for one in caught)


def test_the_drawn_shapes_work_without_labels():
    train, val = get_unlabelled_loaders(dataset="shapes", img_size=32, n_images=60, batch_size=20)
    images, labels = next(iter(train))
    assert images.shape == (20, 3, 32, 32)
    assert labels.eq(torch.zeros(20)).all()
    assert train.class_names is val.class_names is None
