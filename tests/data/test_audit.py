"""The audit of a folder before training: what it holds, and what would make its score wrong."""

import shutil

import pytest
import torch
from PIL import Image

from vit_bridge.data.audit import TAIL, audit_folder, same_files
from vit_bridge.data.loaders import get_data_loaders
from vit_bridge.errors import Assumption


def write_images(root, counts, ending=".png"):
    """Write images, all different: {"train/cat": 3, ...} puts three into root/train/cat."""
    for k, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (16, 16), (k, i, 0)).save(root / folder / f"{i:03d}{ending}")
    return root


def test_audit_says_what_is_there(tmp_path):
    root = write_images(tmp_path / "set", {"train/Zebra": 3, "train/ant": 4, "train/b ü": 2, "val/ant": 2, "notes": 1})
    write_images(root, {"train/ant": 5}, ".gif")
    for name in ("a.txt", "b.txt", "c.heic"):
        (root / "train/ant" / name).write_text("x")
    (root / "train/ant/all").symlink_to("..")
    write_images(tmp_path, {"pool": 2}, ".bmp")
    (root / "train/b ü/pool").symlink_to(tmp_path / "pool")
    (root / "val/ant/empty.jpg").write_bytes(b"")
    Image.new("RGB", (16, 16)).save(root / "train/loose.png")
    found = audit_folder(root)
    assert found.endings == {".png": 11, ".gif": 5, ".bmp": 2, ".jpg": 1}
    assert found.class_names == ["Zebra", "ant", "b ü"]
    assert found.counts == {"train": [3, 9, 4], "val": [0, 3, 0]}
    assert found.links == [str(root / "train/b ü/pool")]
    assert [path for path, _ in found.refused] == [str(root / "train/ant/all")]
    assert found.left_out == {".txt": 2, ".heic": 1}
    assert (found.loose, found.unused, found.empty) == (1, ["notes"], [str(root / "val/ant/empty.jpg")])
    assert str(found).replace(str(root), "set").splitlines() == [
        "set: 19 image files (11 .png, 5 .gif, 2 .bmp, 1 .jpg)",
        "  classes, in the order of the model's outputs (alphabetical): Zebra (3), ant (9), b ü (4)",
        "  train: 16 image files",
        "  val: 3 image files, none of Zebra, b ü",
        "  links followed: 1 (set/train/b ü/pool)",
        "  links and folders not followed: 1 (set/train/ant/all)",
        "  other files, ignored: 2 .txt, 1 .heic",
        "  images outside the class folders, ignored: 1",
        "  folders ignored, because they are not train, val or test: 1 (notes)",
        "  empty files: 1 (set/val/ant/empty.jpg)"]
    assert found.class_names == get_data_loaders(root, img_size=16, skip_corrupt=True)[0].class_names


def test_audit_of_a_plain_folder_is_short(tmp_path):
    root = write_images(tmp_path, {f"class{k:03d}": 2 for k in range(30)})
    found = audit_folder(root)
    assert str(found).count("\n") == 2
    assert "class006 (2), ... class029 (2); 30 in all" in str(found)
    assert (found.two_classes, found.two_parts, found.links, found.refused) == ([], [], [], [])


def test_audit_finds_the_same_image_in_two_classes_and_parts(tmp_path):
    root = write_images(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 2, "test/b": 2})
    pairs = [("train/a/000.png", "train/b/copy.png"), ("train/a/001.png", "val/a/copy.png"),
             ("val/a/000.png", "test/b/copy.png"), ("train/b/001.png", "train/b/copy2.png")]
    for source, copy in pairs:
        shutil.copy(root / source, root / copy)
    found = audit_folder(root)
    names = [[tuple(path.removeprefix(f"{root}/") for path in group) for group in groups]
             for groups in (found.two_classes, found.two_parts)]
    assert names == [[pairs[0], pairs[2]], [pairs[1], pairs[2]]]
    assert (f"  the same image in two classes, so at least one label is wrong: 2 (such as {root}/train/a/000.png "
            f"= {root}/train/b/copy.png)") in str(found)
    assert f"the score will be too high: 2 (such as {root}/train/a/001.png = {root}/val/a/copy.png)" in str(found)


def test_audit_names_one_path_of_each_class_and_part(tmp_path):
    root = write_images(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1})
    for copy in ("train/a/again.png", "train/b/copy.png", "val/a/copy.png"):
        shutil.copy(root / "train/a/000.png", root / copy)
    found = str(audit_folder(root))
    assert f"label is wrong: 1 (such as {root}/train/a/000.png = {root}/train/b/copy.png)" in found
    assert f"too high: 1 (such as {root}/train/a/000.png = {root}/val/a/copy.png)" in found


def test_audit_and_loaders_count_files_next_to_the_class_folders(tmp_path):
    root = write_images(tmp_path, {"a": 2, "b": 2})
    (root / "notes.txt").write_text("x")
    (root / "a/IMG_1.HEIC").write_text("x")
    assert audit_folder(root).left_out == {".txt": 1, ".heic": 1}
    with pytest.warns(Assumption, match=r"2 files in .*: 1 .heic, 1 .txt; convert .heic files to JPEG first"):
        get_data_loaders(root, img_size=16)


@pytest.mark.parametrize("seed", [0, 1])
def test_audit_looks_across_the_cut_for_validation(tmp_path, seed):
    root = write_images(tmp_path, {"a": 20, "b": 20})
    for i in range(20):
        shutil.copy(root / f"a/{i:03d}.png", root / f"a/copy{i:03d}.png")
    _, val = get_data_loaders(root, img_size=16, val_fraction=0.2, seed=seed)
    held_out = set(val.files)
    pairs = [{str(root / f"a/{i:03d}.png"), str(root / f"a/copy{i:03d}.png")} for i in range(20)]
    expected = [pair for pair in pairs if len(pair & held_out) == 1]
    found = audit_folder(root, 0.2, seed)
    assert sorted(map(sorted, found.two_parts)) == sorted(map(sorted, expected))
    assert expected
    assert not found.two_classes


def test_same_files_reads_no_more_than_it_needs(tmp_path, monkeypatch):
    contents = {"a": b"x" * 50_000, "b": b"x" * 50_000, "head": b"y" + b"x" * 49_999, "tail": b"x" * 49_999 + b"y",
                "long": b"x" * 50_001, "none": b"", "nothing": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dead").symlink_to("nowhere")
    read = []
    monkeypatch.setattr("builtins.open", lambda path, mode, real=open: read.append(path.name) or real(path, mode))
    groups, empty = same_files([tmp_path / name for name in [*contents, "dead"]])
    assert groups == [[tmp_path / "a", tmp_path / "b"]]
    assert empty == [tmp_path / "none", tmp_path / "nothing"]
    assert sorted(read) == ["a", "a", "b", "b", "head", "head", "tail"]  # of head and tail the end, then the whole
    assert TAIL < 49_999


def test_files_that_cannot_be_read_are_like_no_other(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"same")

    def denied(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    assert same_files([tmp_path / "a", tmp_path / "b"]) == ([], [])


def test_audit_draws_no_random_number_and_opens_no_image(tmp_path, monkeypatch):
    root = write_images(tmp_path, {"a": 5, "b": 5})
    monkeypatch.setattr(Image, "open", None)
    before = torch.get_rng_state()
    audit_folder(root)
    assert torch.equal(torch.get_rng_state(), before)
