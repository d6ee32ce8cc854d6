"""Folders with links, circular ones too: each image is used once, and refused links are reported."""

import os
import warnings

import pytest
from PIL import Image

from vit_bridge.data.datasets import FolderSet
from vit_bridge.data.files import Found, files_at, find_images, image_endings
from vit_bridge.data.loaders import get_data_loaders, get_evaluation_loader, get_test_loader
from vit_bridge.errors import Assumption, InputError


def write_images(root, counts):
    """Write images, all different: {"train/cat": 3, ...} puts three into root/train/cat."""
    for k, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (16, 16), (k, i, 0)).save(root / folder / f"{i:03d}.png")
    return root


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


@pytest.fixture
def zoo(tmp_path):
    return write_images(tmp_path / "set", {"fox": 10, "hare": 10})


def loaders(root):
    """Return ((training loader, validation loader), the warnings)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pair = get_data_loaders(root, img_size=16)
    assert all(warning.category is Assumption for warning in said)
    return pair, [str(warning.message) for warning in said]


@pytest.mark.parametrize(("where", "target", "reason"), [
    ("fox/all", "..", "contains it"), ("fox/latest", ".", "contains it"), ("fox/x", "../hare", "in the data set"),
    ("fox/deep/up", "../..", "contains it"), ("fox/deep/loop", ".", "contains it"), ("hare/0", "../fox/001.png", ""),
    ("hare/0.png", "../fox/001.png", "in the data set"), ("hare/0.png", "001.png", "in the data set"),
    ("fox/far", "../../..", "contains it"), ("foxes", "fox", "in the data set"), ("all", ".", "contains it"),
    ("all", "..", "contains it"), ("fox/twice", "../fox/../fox", "contains it"), ("gone", "nowhere", "dead link"),
    ("fox/gone", "nowhere", "dead link"), ("fox/self", "self", "dead link")])
def test_links_into_the_set_are_refused_and_said(zoo, where, target, reason):
    link(zoo / where, target)
    (train, val), said = loaders(zoo)
    files = [*train.files, *val.files]
    assert (train.class_names, len(files), len(set(files))) == (["fox", "hare"], 20, 20)
    assert [train.class_counts, val.class_counts] == [[9, 9], [1, 1]]
    if where == "hare/0":  # not an image by its name
        assert said == [f"1 file in {str(zoo)!r} is ignored (not in an image format that Pillow can read here): 1 "
                        f"without an extension"]
        return
    assert len(said) == 1
    assert said[0].startswith(f"{str(zoo / where)!r} is ignored: it is a ")
    assert reason in said[0]


def test_many_refused_links_are_named_thrice_and_counted(zoo):
    for i in range(7):
        link(zoo / f"fox/all{i}", "..")
    for i in range(2):
        link(zoo / f"hare/gone{i}", f"nowhere{i}")
    _, said = loaders(zoo)
    assert len(said) == 4
    assert said[3] == (f"6 more paths in {str(zoo)!r} are ignored: 4 because each is a link to ..., a folder that "
                       f"contains it or another part of the data set; 2 because each is a dead link to ...")


def test_links_to_elsewhere_are_followed_once(zoo, tmp_path):
    pool = write_images(tmp_path / "pool", {"owl": 4, "owl/deep": 3, "more": 5})
    link(zoo / "owl", "../pool/owl")  # a class folder
    link(zoo / "fox/more", pool / "more")
    link(zoo / "hare/more", pool / "more")  # a second visit
    link(zoo / "hare/one.png", pool / "more/000.png")
    link(zoo / "hare/pool", pool)  # holds a class folder
    link(zoo / "hare/owls", pool / "owl/deep")  # lies in one
    link(pool / "more/again", ".")
    link(pool / "more/back", zoo / "hare")
    (train, val), said = loaders(zoo)
    assert train.class_names == ["fox", "hare", "owl"]
    assert [a + b for a, b in zip(train.class_counts, val.class_counts, strict=True)] == [15, 10, 7]
    assert str(zoo / "fox/more/000.png") in {*train.files, *val.files}
    assert len(said) == 4
    found = FolderSet(zoo).everything()
    assert {path.removeprefix(f"{zoo}/") for path, _ in found.refused} == {
        "fox/more/again", "fox/more/back", "hare/more", "hare/one.png", "hare/pool", "hare/owls"}
    assert found.links == [str(zoo / "owl"), str(zoo / "fox/more")]


def test_images_that_are_links_to_a_store_are_taken_once_each(tmp_path):
    store = write_images(tmp_path / "set", {".store": 6}) / ".store"
    for i, place in enumerate(["train/a/0.png", "train/a/1.png", "train/b/0.png", "train/b/1.png", "val/a/x.png"]):
        link(tmp_path / "set" / place, store / f"{i:03d}.png")
    link(tmp_path / "set/val/b/leak.png", store / "000.png")
    link(tmp_path / "set/val/b/own.png", store / "005.png")
    (train, val), said = loaders(tmp_path / "set")
    assert (train.class_counts, val.class_counts) == ([2, 2], [1, 1])
    assert len(said) == 1
    assert "leak.png" in said[0]
    assert "train/a/0.png" in said[0]


def test_a_linked_folder_leaves_out_what_a_link_has_led_to(zoo, tmp_path):
    pool = write_images(tmp_path / "pool", {".": 4})
    link(zoo / "fox/first.png", pool / "002.png")
    link(zoo / "fox/pool", pool)
    (train, val), said = loaders(zoo)
    assert len([file for file in train.files + val.files if "pool" in file]) == 3
    assert said == [f"{str(zoo / 'fox/pool/002.png')!r} is ignored: it is already used as "
                    f"{str(zoo / 'fox/first.png')!r}"]


def test_links_to_hidden_images_of_a_class_are_taken(zoo):
    (zoo / "fox/000.png").rename(zoo / "fox/.kept.png")
    link(zoo / "fox/000.png", ".kept.png")
    write_images(zoo, {"fox/.cache": 2})
    link(zoo / "fox/x.png", ".cache/001.png")
    link(zoo / "fox/cache", ".cache")
    (train, val), said = loaders(zoo)
    assert train.n_images + val.n_images == 22
    assert len(said) == 1
    assert "fox/cache/001.png" in said[0]


def test_parts_do_not_lead_into_each_other(tmp_path):
    root = write_images(tmp_path / "set", {"train/fox": 4, "train/hare": 4, "val/fox": 2, "val/hare": 2, "test/fox": 2})
    link(root / "val/fox/more", "../../train/fox")
    link(root / "test/fox/more", "../../val")
    link(root / "test/hare", "../val/hare")
    (train, val), said = loaders(root)
    assert (train.n_images, val.class_counts) == (8, [2, 2])
    assert len(said) == 3
    with pytest.warns(Assumption, match="ignored: it is a link"):
        assert get_test_loader(root, img_size=16).class_counts == [2, 0]
    with pytest.warns(Assumption, match="ignored: it is a link"):
        assert get_evaluation_loader(root, ["fox", "hare"], img_size=16).class_counts == [2, 0]


@pytest.mark.parametrize(("name", "target"), [("val", "train"), ("val", "."), ("test", "val"), ("val", "train/fox"),
                                              ("validation", "../set/train"), ("val", "nowhere"), ("test", "gone")])
def test_a_part_that_is_another_is_refused(tmp_path, name, target):
    counts = {"train/fox": 4, "train/hare": 4} | ({"val/fox": 2} if target == "val" else {})
    root = write_images(tmp_path / "set", counts)
    link(root / name, target)
    for read in (get_data_loaders, lambda root: get_evaluation_loader(root, ["fox", "hare"])):
        with pytest.raises(InputError, match=r"lead to the same images|is a dead link to [^\n]*\Z"):
            read(root)


def test_a_part_may_be_a_link_to_elsewhere(tmp_path):
    root = write_images(tmp_path / "set", {"train/fox": 4, "train/hare": 4})
    write_images(tmp_path / "other", {"fox": 2, "hare": 3})
    link(root / "val", "../other")
    assert loaders(root)[0][1].class_counts == [2, 3]


def test_parts_by_other_names_are_no_classes(tmp_path):
    root = write_images(tmp_path, {"Train/fox": 4, "Train/hare": 4, "Test/fox": 1})
    with pytest.raises(InputError, match=r"has the folders Test, Train, which look like parts of a data set"):
        get_data_loaders(root)


def test_the_order_of_files_is_that_of_os_walk(tmp_path):
    root = write_images(tmp_path, {"a": 3, "a/z": 2, "a/b": 2, "a/b/c": 1, "a/b c ü": 1})
    expected = []
    for parent, folders, names in os.walk(root / "a"):
        folders.sort()
        expected += [os.path.join(parent, name) for name in sorted(names)]
    assert find_images(root / "a").files == expected


def test_what_is_no_image_is_counted_by_ending(zoo):
    for name in ("a.txt", "b.TXT", "c.heic", "README", "Thumbs.db", ".DS_Store", "._000.png", "d.pdf", "e.mpg"):
        (zoo / "fox" / name).write_bytes(b"x")
    os.mkfifo(zoo / "fox/pipe.png")
    (zoo / "hare/folder.png").mkdir()
    write_images(zoo, {"__MACOSX": 2, "fox/@eaDir": 1})
    Image.new("RGB", (16, 16)).save(zoo / "loose.png")
    (train, val), said = loaders(zoo)
    assert train.n_images + val.n_images == 20
    assert train.class_names == ["fox", "hare"]
    assert find_images(zoo / "fox").left_out == {".txt": 2, ".heic": 1, "": 1, ".db": 1, ".pdf": 1, ".mpg": 1}
    assert "2 .txt, 1 without an extension, 1 .db, 1 .heic, 1 .mpg, 1 .pdf" in said[3]
    assert [words for words in ("__MACOSX", "@eaDir", "pipe.png") if not any(words in line for line in said)] == []
    assert said[4] == f"1 image in {str(zoo)!r} is ignored (outside the class folders)"


def test_every_format_of_pillow_is_taken(zoo):
    picture = Image.new("RGB", (16, 16), "red")
    for i, ending in enumerate((".gif", ".jfif", ".jpe", ".webp", ".TIF", ".ico", ".jp2", ".bmp", ".tga", ".ppm")):
        picture.save(zoo / "fox" / f"new{i}{ending}")
    assert {".gif", ".jfif", ".webp", ".png", ".jpg", ".tiff"} <= set(image_endings())
    assert (".avif" in image_endings()) == (".avif" in Image.registered_extensions())
    assert not {".pdf", ".eps", ".mpg", ".h5"} & set(image_endings())
    (train, val), said = loaders(zoo)
    assert train.n_images + val.n_images == 30
    assert not said


def test_a_folder_that_cannot_be_listed_is_no_empty_one(zoo, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("hare"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"hare' cannot be listed \(Permission denied\)"):
        get_data_loaders(zoo)


def test_predict_takes_each_file_of_a_folder_once(zoo):
    link(zoo / "fox/all", "..")
    link(zoo / "again", "hare")
    with pytest.warns(Assumption, match="contains it|already in the data set"):
        files = files_at(str(zoo))
    assert len(files) == len(set(files)) == 20
    assert files_at(str(zoo / "fox/000.png")) == [str(zoo / "fox/000.png")]
    assert Found().files == []
