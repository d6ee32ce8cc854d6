"""Loaders that resume within an epoch, shard batches, skip corrupt files, or evaluate a trained model."""

import os
import pickle
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vit_bridge.data.datasets import DatasetInfo, FolderSet, decode_images
from vit_bridge.data.images import open_image
from vit_bridge.data.loaders import (
    MemoryLoader,
    PhotoLoader,
    as_loader,
    get_data_loaders,
    get_evaluation_loader,
    get_test_loader,
)
from vit_bridge.data.shapes import SHAPES
from vit_bridge.preprocessing import FitSize, Preprocessing
from vit_model import InputError

N, BATCH, S = 17, 5, 13  # batches of 5, 5, 5 and 2 images
FACTS = DatasetInfo("folder", Preprocessing(S, (0.5,) * 3, (0.25,) * 3, class_names=["a", "b"]))
KINDS = pytest.mark.parametrize("kind", ["memory", "resized", "photos"])


def write_images(root, counts, size=(19, 23)):
    """Write images, all different: {"train/cat": 3, ...} puts three into root/train/cat."""
    for k, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.random.default_rng([k, i]).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i:03d}.png")
    return root


def make_loader(kind, root, training=True, n=N, workers=0, **options):
    """Return a loader of n images whose labels are their indices in the data set."""
    if kind == "photos":
        write_images(root, {"x": n})
        files = sorted(str(path) for path in (root / "x").iterdir())
        return PhotoLoader(files, torch.arange(n), FACTS, BATCH, 3, training, workers, **options)
    side = S if kind == "memory" else 11
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return MemoryLoader(images, torch.arange(n), FACTS, BATCH, 3, training)


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch[0], other[0])
        assert torch.equal(batch[1], other[1])


def labels_of(loader):
    return [labels.tolist() for _, labels in loader]


def names_of(files, root):
    return [Path(file).relative_to(root).as_posix() for file in files]


def error_of(function, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def spoil(*paths):
    for path in paths:
        path.write_bytes(b"no image")


# ---- From within an epoch ---------------------------------------------------------------------------------


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_set_position_gives_the_rest_of_a_pass(kind, training, tmp_path):
    loader = make_loader(kind, tmp_path, training)
    loader.set_epoch(2)
    whole = list(loader)
    assert len(whole) == 4
    for batch in range(5):
        fresh = make_loader(kind, tmp_path, training)
        fresh.set_position(2, batch)
        assert len(fresh) == 4
        assert_same(list(fresh), whole[batch:])
        assert_same(list(fresh), whole)  # only the next pass begins later
    loader.set_position(3)
    assert (labels_of(loader) == labels_of(whole)) == (not training)


@pytest.mark.parametrize("kind", ["memory", "photos"])
def test_set_position_skips_earlier_batches_without_reading_them(kind, tmp_path, monkeypatch):
    loader, seen = make_loader(kind, tmp_path, training=False), []
    if kind == "photos":
        monkeypatch.setattr("vit_bridge.data.loaders.open_image",
                            lambda path, n: seen.append(Path(path).stem) or open_image(path, n))
    else:
        real = loader.normalised
        loader.normalised = lambda images: seen.extend(f"{i:03d}" for i in range(15, 15 + len(images))) or real(images)
    loader.set_position(0, 3)
    assert labels_of(loader) == [[15, 16]]
    assert seen == ["015", "016"]


def test_set_epoch_begins_at_the_first_batch_again(tmp_path):
    loader = make_loader("memory", tmp_path, training=False)
    loader.set_position(1, 3)
    loader.set_epoch(1)
    assert labels_of(loader)[0] == [0, 1, 2, 3, 4]


def test_set_position_and_set_shard_name_bad_values(tmp_path):
    loader = make_loader("memory", tmp_path)
    assert "batch 5 " in error_of(loader.set_position, 0, 5)
    assert "expected 0 to 4" in error_of(loader.set_position, 0, 5)
    assert "batch -1" in error_of(loader.set_position, 0, -1)
    assert "epoch None" in error_of(loader.set_position, None)
    assert "world_size 0" in error_of(loader.set_shard, 0, 0)
    assert "rank 3" in error_of(loader.set_shard, 3, 3)
    assert "rank -1" in error_of(loader.set_shard, -1, 3)
    assert len(list(loader)) == 4  # nothing of it was taken over


# ---- Shares -----------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_set_shard_splits_each_batch_between_ranks(kind, training, tmp_path):
    whole, shares = make_loader(kind, tmp_path, training), [make_loader(kind, tmp_path, training) for _ in range(3)]
    for rank, share in enumerate(shares):
        share.set_shard(rank, 3)
        assert (len(share), share.n_images) == (4, N)
    for _ in range(2):  # epochs 0 and 1
        batches, parts = list(whole), [list(share) for share in shares]
        for rank in range(3):
            assert_same(parts[rank], [(images[rank::3], labels[rank::3]) for images, labels in batches])
        images, labels = parts[2][3]  # the last batch has two images and three ranks
        assert (images.shape, images.dtype) == ((0, 3, S, S), torch.float32)
        assert (labels.shape, labels.dtype) == ((0,), torch.int64)
        assert sorted(int(label) for part in parts for _, labels in part for label in labels) == list(range(N))
    whole.set_position(7, 2)
    shares[1].set_position(7, 2)
    assert_same(list(shares[1]), [(images[1::3], labels[1::3]) for images, labels in whole])


@pytest.mark.parametrize("kind", ["list", "DataLoader"])
def test_a_list_and_a_dataloader_become_loaders(kind):
    """They start at any batch and give shards, and the epoch is passed to the sampler."""
    images, labels = torch.randn(N, 3, S, S), torch.arange(N)
    batches, epochs = list(zip(images.split(BATCH), labels.split(BATCH), strict=True)), []
    if kind == "DataLoader":
        sampler = torch.utils.data.SequentialSampler(range(N))
        sampler.set_epoch = epochs.append
        dataset = torch.utils.data.TensorDataset(images, labels)
        batches = torch.utils.data.DataLoader(dataset, BATCH, sampler=sampler)
    loader = as_loader(batches).to("cpu")
    assert as_loader(loader) is loader
    assert (len(loader), loader.batch_size) == (4, BATCH if kind == "DataLoader" else None)
    loader.set_position(2, 1)
    assert labels_of(loader) == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16]]
    loader.set_position(3, 4)
    assert labels_of(loader) == []
    loader.set_shard(1, 3)
    assert labels_of(loader) == [[1, 4], [6, 9], [11, 14], [16]]
    assert epochs == ([2, 3] if kind == "DataLoader" else [])


def test_a_distributed_sampler_is_not_sharded_again():
    dataset = torch.utils.data.TensorDataset(torch.arange(N)[:, None], torch.arange(N))
    sampler = torch.utils.data.distributed.DistributedSampler(dataset, 2, 1, shuffle=False, drop_last=True)
    loader = as_loader(torch.utils.data.DataLoader(dataset, BATCH, sampler=sampler)).to("cpu")
    loader.set_shard(1, 2)
    assert labels_of(loader) == [[1, 3, 5, 7, 9], [11, 13, 15]]


def test_photo_loader_workers_respect_shard_and_position(tmp_path):
    alone, helped = make_loader("photos", tmp_path), make_loader("photos", tmp_path, workers=2)
    for loader in (alone, helped):
        loader.set_shard(2, 3)
    assert_same(list(helped), list(alone))
    for loader in (alone, helped):
        loader.set_position(4, 2)
    batches = list(helped)
    assert_same(batches, list(alone))
    assert [len(labels) for _, labels in batches] == [1, 0]


# ---- Once, plainly ----------------------------------------------------------------------------------------


@KINDS
def test_without_augmentation_gives_each_image_once_in_order(kind, tmp_path):
    n = 11  # batches of 5, 5 and 1: in training the last is left out
    loader, expected = make_loader(kind, tmp_path, n=n), list(make_loader(kind, tmp_path, training=False, n=n))
    loader.set_shard(1, 2)
    loader.set_position(3, 1)
    plain = loader.without_augmentation()
    assert (len(loader), len(plain), plain.n_images) == (2, 3, n)
    assert labels_of(plain) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10]]
    assert_same(list(plain), expected)
    assert (plain.files, plain.preprocessing) == (loader.files, loader.preprocessing)
    assert len(list(loader)) == 1  # where it was to begin is still to come


@KINDS
def test_without_augmentation_draws_n_images_from_the_whole_set(kind, tmp_path):
    loader = make_loader(kind, tmp_path, n=11)
    everything = torch.cat([images for images, _ in loader.without_augmentation()])
    part = loader.without_augmentation(7)
    images, labels = (torch.cat(tensors) for tensors in zip(*part, strict=True))
    places = labels.tolist()  # which are the places in the set here
    assert part.n_images == len(set(places)) == 7
    assert places == sorted(places)
    assert places != list(range(7))
    assert part.files == (loader.files and [loader.files[place] for place in places])
    assert torch.equal(images, everything[places])
    assert torch.cat([labels for _, labels in loader.without_augmentation(7)]).tolist() == places
    assert loader.without_augmentation(12).n_images == 11


# ---- Corrupt files ----------------------------------------------------------------------------------------


def test_memory_loader_leaves_out_corrupt_files(tmp_path):
    root = write_images(tmp_path, {"train/x": 11, "train/y": 7, "test/y": 3})
    sound = [names_of(loader.files, root) for loader in get_data_loaders(root, img_size=S, val_fraction=0.3)]
    broken = [sound[0][0], sound[0][-1], sound[1][1], "test/y/001.png"]
    spoil(*(root / name for name in broken))
    args = dict(img_size=S, val_fraction=0.3, skip_corrupt=True)
    train, val = get_data_loaders(root, **args)
    for loader, files in zip((train, val, get_test_loader(root, **args)),
                             (*sound, ["test/y/000.png", "test/y/001.png", "test/y/002.png"]), strict=True):
        kept = [name for name in files if name not in broken]
        assert names_of(loader.files, root) == kept
        assert loader.n_images == len(loader.images) == len(loader.labels) == len(kept)
        assert loader.labels.tolist() == [int("/y/" in name) for name in kept]
        assert names_of(loader.skipped, root) == [name for name in files if name in broken]
        assert all("damaged, or not an image" in reason for reason in loader.skipped.values())
        assert loader.without_augmentation().skipped == loader.skipped
        expected = np.stack([FitSize(S)(open_image(file)) for file in loader.files])  # (N, S, S, 3)
        assert np.array_equal(loader.images.permute(0, 2, 3, 1), expected)
    assert train.class_counts == [8 - 1, 5 - 1]  # of 11 and 7, 3 and 2 went to validation
    assert val.class_counts == [3 - 1, 2]


def test_decode_images_keeps_order_around_corrupt_files(tmp_path):
    root = write_images(tmp_path, {"x": 257, "y": 263}, (8, 8))
    spoil(root / "x/003.png", root / "y/262.png", *(root / "y" / f"{i:03d}.png" for i in range(7)))
    files, _ = FolderSet(root).images("train", ["x", "y"])
    images, skipped = decode_images(files, Preprocessing(8), True)
    assert (len(images), len(skipped)) == (520 - 9, 9)
    kept = [file for file in files if file not in skipped]
    for i in (0, 2, 3, 255, 256, 257, 510):
        assert np.array_equal(images[i].permute(1, 2, 0), open_image(kept[i]))


@pytest.mark.parametrize("workers", [0, 2])
def test_photo_loader_leaves_out_corrupt_files_when_met(tmp_path, workers):
    loader = make_loader("photos", tmp_path, training=False, workers=workers, skip_corrupt=True)
    whole = list(make_loader("photos", tmp_path, training=False))
    spoil(*(Path(loader.files[i]) for i in (2, 15, 16)))
    assert loader.skipped == {}
    batches = iter(loader)
    images, labels = next(batches)
    assert list(loader.skipped) == [loader.files[2]]
    assert "damaged, or not an image" in loader.skipped[loader.files[2]]
    assert labels.tolist() == [0, 1, 3, 4]
    assert torch.equal(images, whole[0][0][[0, 1, 3, 4]])
    assert_same([next(batches), next(batches)], whole[1:3])
    images, labels = next(batches)  # both of its images are corrupt
    assert (images.shape, images.dtype) == ((0, 3, S, S), torch.float32)
    assert (labels.shape, labels.dtype) == ((0,), torch.int64)
    assert set(loader.skipped) == {loader.files[i] for i in (2, 15, 16)}
    assert (loader.n_images, len(loader)) == (N, 4)


@pytest.mark.parametrize("img_size", [None, S, 67])
def test_get_data_loaders_skips_corrupt_files_only_when_asked(tmp_path, img_size):
    root = write_images(tmp_path, {"x": 5, "y": 3, "z": 2})
    spoil(root / "x/000.png", root / "y/002.png")
    message = error_of(lambda: [list(loader) for loader in get_data_loaders(root, img_size=img_size)])
    assert str(root) in message
    assert "--skip-corrupt" in message
    assert "skip_corrupt=True" in message
    train, val = get_data_loaders(root, img_size=img_size, skip_corrupt=True)
    assert sum(len(labels) for loader in (train, val) for _, labels in loader) == 8
    assert set(names_of({**train.skipped, **val.skipped}, root)) == {"x/000.png", "y/002.png"}
    assert train.img_size == (img_size or 24)


def test_get_data_loaders_refuses_a_set_without_readable_images(tmp_path):
    root = write_images(tmp_path, {"x": 2, "y": 3})
    spoil(*root.rglob("*.png"))
    message = error_of(get_data_loaders, root, img_size=S, skip_corrupt=True)
    assert "none of the 3 image files" in message
    assert str(root / "x") in message
    assert "none of the 5 image files" in error_of(get_data_loaders, root, img_size=None, skip_corrupt=True)


def test_open_image_error_pickles_and_suggests_no_skipping(tmp_path):
    spoil(tmp_path / "x.png")
    message = error_of(open_image, tmp_path / "x.png")
    assert repr(str(tmp_path / "x.png")) in message
    assert message.endswith("replace or remove it")
    with pytest.raises(InputError) as caught:
        open_image(tmp_path / "x.png")
    again = pickle.loads(pickle.dumps(caught.value))  # as it comes from a worker process
    assert (str(again), again.path, again.reason) == (message, str(tmp_path / "x.png"), caught.value.reason)


def test_loaders_skip_nothing_of_a_sound_set(tmp_path):
    root = write_images(tmp_path, {"x": 3, "y": 2})
    for loader in (*get_data_loaders(root, img_size=S), *get_data_loaders(root, img_size=67, skip_corrupt=True),
                   *get_data_loaders(dataset="shapes", n_images=23, img_size=8)):
        list(loader)
        assert loader.skipped == {}


# ---- Worker processes and signals -------------------------------------------------------------------------


def test_photo_loader_workers_leave_signals_to_the_main_process(tmp_path):
    loader = make_loader("photos", tmp_path, workers=2)
    list(loader)
    workers = loader.loader._iterator._workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # from another process than the main one
    assert len(list(loader)) == 4
    assert loader.loader._iterator._workers is workers  # the same ones
    for worker in workers:
        worker.terminate()  # as the end of Python does with those that are left
        worker.join(10)
        assert worker.exitcode is not None


# ---- What a loader tells ----------------------------------------------------------------------------------


@pytest.mark.parametrize("img_size", [S, 67])
def test_loaders_tell_files_and_class_counts(tmp_path, img_size):
    root = write_images(tmp_path, {"train/b": 3, "train/a": 2, "train/c": 7, "val/c": 2, "test/b": 1})
    train, val = get_data_loaders(root, img_size=img_size)
    assert (train.class_names, train.class_counts) == (["a", "b", "c"], [2, 3, 7])
    assert (val.class_counts, get_test_loader(root, img_size=img_size).class_counts) == ([0, 0, 2], [0, 1, 0])
    assert names_of(train.files, root)[:3] == ["train/a/000.png", "train/a/001.png", "train/b/000.png"]
    assert [Path(file).parent.name for file in train.files] == [train.class_names[label] for label in train.labels]
    assert names_of(val.files, root) == ["val/c/000.png", "val/c/001.png"]
    assert (train.split, get_test_loader(root, img_size=img_size).split) == (None, "test")


def test_shapes_have_no_files():
    train, val = get_data_loaders(dataset="shapes", n_images=30, img_size=8)
    assert (train.files, val.files, train.split) == (None, None, None)
    assert [sum(pair) for pair in zip(train.class_counts, val.class_counts, strict=True)] == [3] * 10


# ---- Scoring a trained model ------------------------------------------------------------------------------


@pytest.mark.parametrize(("folders", "held_out", "split", "files"), [
    (["train/a", "train/b", "val/a", "test/b"], True, "test", ["test/b/000.png", "test/b/001.png"]),
    (["test/a"], False, "test", ["test/a/000.png", "test/a/001.png"]),
    (["train/a", "train/b", "valid/b"], True, "val", ["valid/b/000.png", "valid/b/001.png"]),
    (["validation/a", "a"], False, "val", ["validation/a/000.png", "validation/a/001.png"]),
    (["train/b"], False, "all", ["train/b/000.png", "train/b/001.png"]),
    (["b"], False, "all", ["b/000.png", "b/001.png"]),
    (["train/a"], True, "held out", None),
    (["b"], True, "held out", None),
])
@pytest.mark.parametrize("img_size", [None, 67])
def test_get_evaluation_loader_chooses_the_images_to_score(tmp_path, folders, held_out, split, files, img_size):
    root = write_images(tmp_path, dict.fromkeys(folders, 2))
    loader = get_evaluation_loader(root, ("a", "b"), img_size=img_size, held_out=held_out)
    assert (loader.split, loader.class_names, loader.img_size) == (split, ["a", "b"], img_size or 24)
    assert isinstance(loader, PhotoLoader if img_size else MemoryLoader)
    if files:
        assert names_of(loader.files, root) == files
    assert loader.n_images == (1 if split == "held out" else 2)
    letters = {"ab".index(Path(file).parent.name) for file in loader.files}
    assert set(loader.labels.tolist()) == letters


def test_get_evaluation_loader_labels_follow_the_models_class_names(tmp_path):
    root = write_images(tmp_path, {"a": 2, "b": 3, "c": 1})
    assert get_evaluation_loader(root, ["c", "never seen", "b", "a"], img_size=S).class_counts == [1, 0, 3, 2]
    message = error_of(get_evaluation_loader, root, ["a", "d", "c"])
    assert "the model does not have the class 'b', a folder in" in message
    assert "a, d, c" in message
    for nameless in (None, []):
        assert f"class_names {nameless}" in error_of(get_evaluation_loader, root, nameless)
    assert "no data folder" in error_of(get_evaluation_loader, root / "nowhere", ["a"])


@pytest.mark.parametrize("folder", ["", "train/"])
def test_get_evaluation_loader_held_out_is_the_validation_cut(tmp_path, folder):
    root = write_images(tmp_path, {f"{folder}a": 13, f"{folder}b": 11, f"{folder}c": 7})
    cut = dict(val_fraction=0.3, seed=5)
    _, val = get_data_loaders(root, img_size=S, **cut)
    held_out = get_evaluation_loader(root, val.class_names, img_size=S, held_out=True, **cut)
    assert held_out.files == val.files
    assert_same(list(held_out), list(val))
    for file in (root / folder / "a").iterdir():  # a class that is gone moves neither labels nor cut
        file.unlink()
    (root / folder / "a").rmdir()
    fewer = get_evaluation_loader(root, val.class_names, img_size=S, held_out=True, **cut)
    assert fewer.files == [file for file, label in zip(val.files, val.labels, strict=True) if label]
    assert fewer.class_counts == [0, *val.class_counts[1:]]
    other = get_evaluation_loader(root, val.class_names, img_size=S, held_out=True, val_fraction=0.3, seed=6)
    assert other.files != fewer.files


def test_get_evaluation_loader_gives_a_known_sets_test_images():
    args = dict(dataset="shapes", n_images=100, img_size=8)
    for names in (SHAPES, None):
        loader = get_evaluation_loader("./data", names, held_out=True, **args)
        assert (loader.split, loader.files) == ("test", None)
        assert_same(list(loader), list(get_test_loader(**args)))
    message = error_of(get_evaluation_loader, "./data", ["cat", "dog"], **args)
    assert "'shapes'" in message
    assert f"first at position 1: {SHAPES[0]!r} instead of 'cat' ({len(SHAPES)} names, and 2)" in message
    swapped = [*SHAPES[:-2], SHAPES[-1], SHAPES[-2]]
    assert f"at position {len(SHAPES) - 1}: " in error_of(get_evaluation_loader, "./data", swapped, **args)


def test_get_evaluation_loader_asks_for_a_folder_of_images_in_classes(tmp_path, monkeypatch):
    root = write_images(tmp_path / "photos", {"": 2, "cat": 2, "dog": 2})
    message = error_of(get_evaluation_loader, root / "cat", ["cat", "dog"])
    assert message.endswith(f"did you mean its parent, {str(root)!r}?")
    shutil.move(root / "cat", root / "new")
    message = error_of(get_evaluation_loader, root / "new", ["cat", "dog", "emu"])
    assert message.endswith(f"evaluate needs {root / 'new/cat'}/, {root / 'new/dog'}/, ...; for images without known "
                            f"classes, use predict")
    monkeypatch.chdir(tmp_path)
    assert error_of(get_evaluation_loader, "./data", ["cat", "dog"]).startswith("there is no folder './data'; set "
                                                                                "--data-dir (")


def test_get_data_loaders_suggests_the_parent_of_a_class_folder(tmp_path):
    root = write_images(tmp_path, {"cat": 2, "dog": 2})
    assert error_of(get_data_loaders, root / "cat").endswith(f"or did you mean its parent, {str(root)!r}?")
    shutil.rmtree(root / "dog")
    assert "at least 2 are needed" in error_of(get_data_loaders, root / "cat")


def test_get_evaluation_loader_heeds_its_other_arguments(tmp_path):
    root = write_images(tmp_path, {"test/a": 3})
    spoil(root / "test/a/001.png")
    args = dict(batch_size=1, preprocessing=Preprocessing(99, (0.25,) * 3, (0.5,) * 3, "bicubic"))
    loader = get_evaluation_loader(root, ["a"], skip_corrupt=True, **args)
    assert len(loader) == 2
    assert loader.preprocessing == Preprocessing(loader.img_size, (0.25,) * 3, (0.5,) * 3, "bicubic", ["a"])
    assert names_of(loader.skipped, root) == ["test/a/001.png"]
    assert "--skip-corrupt" in error_of(get_evaluation_loader, root, ["a"], **args)
    assert "batch_size 0" in error_of(get_evaluation_loader, root, ["a"], batch_size=0)
    assert "n_images 99" in error_of(get_evaluation_loader, root, ["a"], n_images=99)
