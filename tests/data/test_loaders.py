import gzip
import hashlib
import multiprocessing
import pickle
import struct
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

from vit_bridge.data.datasets import DATASETS, TORCHVISION_SETS, DatasetInfo, stratified_cut
from vit_bridge.data.images import open_image
from vit_bridge.data.loaders import MemoryLoader, PhotoDataset, PhotoLoader, get_data_loaders, get_test_loader
from vit_bridge.data.shapes import SHAPES, TEST_START, make_shapes
from vit_bridge.preprocessing import NORMALISATION, FitSize, Preprocessing, eval_transform
from vit_model import InputError

PLAIN = DatasetInfo("folder", Preprocessing(16, (0.5,) * 3, (0.25,) * 3, class_names=["a", "b"]))


def random_picture(width, height, seed):
    """Return a smooth random image, which JPEG and resizing hardly change."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_images(root, counts, size=(16, 16), suffix=".png"):
    """Write images, all different: {"train/cat": 3, ...} puts three into root/train/cat."""
    for k, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            random_picture(*size, seed=1000 * k + i).save(root / folder / f"{i:03d}{suffix}")
    return root


def memory_loader(n=50, side=16, **options):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)
    return MemoryLoader(images, torch.arange(n), PLAIN, batch_size=8, **options)


def one_pass(loader):
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(one_pass(first), one_pass(second), strict=True))


def error_of(function, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- What the loaders give --------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "my photos ü", {"train/cat": 12, "train/dög 2": 8, "test/cat": 3}, (90, 70), ".jpg")


@pytest.mark.parametrize("kind", ["shapes", "small folder", "photos"])
def test_loaders_give_the_expected_batches_and_attributes(kind, tmp_path, photos):
    if kind == "shapes":
        args, side, names = dict(dataset="shapes", n_images=40, img_size=24), 24, list(SHAPES)
    elif kind == "photos":
        args, side, names = dict(data_dir=photos, img_size=72), 72, ["cat", "dög 2"]
    else:
        root = write_images(tmp_path / "small", {"train/x": 12, "train/y": 8, "test/y": 3}, (20, 16))
        args, side, names = dict(data_dir=root, img_size=16), 16, ["x", "y"]
    train, val = get_data_loaders(batch_size=5, val_fraction=0.25, **args)
    test = get_test_loader(batch_size=5, val_fraction=0.25, **args)
    assert isinstance(train, PhotoLoader if kind == "photos" else MemoryLoader)
    n = train.n_images + val.n_images
    assert (n, val.n_images, test.n_images) == ((40, 10, 8) if kind == "shapes" else (20, 5, 3))
    for loader in (train, val, test):
        assert (loader.img_size, loader.class_names) == (side, names)
        assert loader.dataset_name == ("shapes" if kind == "shapes" else "folder")
        assert loader.preprocessing == Preprocessing(side, *NORMALISATION[loader.dataset_name], class_names=names)
        assert loader.preprocessing.interpolation == "bilinear"
        assert loader.to("cpu") is loader
        assert len(loader) == len(list(loader)) == -(-loader.n_images // 5)
        for images, labels in loader:
            assert images.dtype == torch.float32
            assert labels.dtype == torch.int64
            assert images.shape == (len(labels), 3, side, side)
        assert sorted(one_pass(loader)[1].tolist()) == sorted(loader.labels.tolist())


def photo_loader(photos, training=True, workers=0):
    files = sorted(str(path) for path in (photos / "train").rglob("*.jpg"))
    facts = DatasetInfo("folder", Preprocessing(72, *NORMALISATION["folder"], class_names=["a", "b"]))
    return PhotoLoader(files, torch.arange(20), facts, batch_size=8, seed=3, training=training, workers=workers)


@pytest.mark.parametrize("kind", ["memory", "photos"])
def test_loaders_randomness_depends_on_seed_and_epoch(kind, photos):
    def make(seed=3):
        loader = photo_loader(photos) if kind == "photos" else memory_loader(training=True)
        loader.seed = seed
        return loader

    loader = make()
    loader.set_epoch(1)
    images, labels = one_pass(loader)
    assert all(map(torch.equal, (images, labels), one_pass(loader)))  # again the same epoch
    counting = make()
    first, second = one_pass(counting), one_pass(counting)
    assert not torch.equal(first[1], second[1])
    assert torch.equal(second[0], images)  # without set_epoch the second pass is epoch 1
    other = make(seed=4)
    other.set_epoch(1)
    other_images, other_labels = one_pass(other)
    assert not torch.equal(other_labels, labels)
    if kind == "photos":  # each with its own label
        assert not torch.equal(other_images[other_labels.argsort()], images[labels.argsort()])  # and augmentation
    by_label = {epoch: images[labels.argsort()] for epoch, (images, labels) in enumerate((first, second))}
    assert not torch.equal(by_label[0], by_label[1])  # other augmentation, not only another order
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one_pass(make())
    if kind == "memory":
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("n", "batch_size", "batches"), [(17, 8, 2), (16, 8, 2), (18, 8, 3), (1, 8, 1), (3, 1, 3)])
def test_memory_loader_drops_only_a_last_batch_of_one(n, batch_size, batches):
    for training in (True, False):
        loader = memory_loader(n, training=training)
        loader.batch_size = batch_size
        expected = batches if training else -(-n // batch_size)
        assert len(loader) == len(list(loader)) == expected


def test_memory_loader_neither_shuffles_nor_augments_outside_training():
    loader = memory_loader(n=20)
    images, labels = one_pass(loader)
    assert labels.tolist() == list(range(20))
    torch.testing.assert_close(images, (loader.images / 255 - 0.5) / 0.25)


# ---- Augmentation in memory -------------------------------------------------------------------------------


def test_memory_loader_shifts_by_an_eighth_and_mirrors_half():
    across, down = torch.arange(32).expand(32, 32) * 4, torch.arange(32)[:, None].expand(32, 32) * 4
    images = torch.stack([across, down, down]).expand(4000, 3, 32, 32).to(torch.uint8)
    facts = DatasetInfo("folder", Preprocessing(32, (0.0,) * 3, (1.0,) * 3, class_names=["a"]))
    seen, _ = one_pass(MemoryLoader(images, torch.zeros(4000), facts, 500, training=True))
    across, down = (seen[:, :2] * 255 / 4).round().unbind(1)  # the column and the row that each pixel came from
    mirrored = across[:, 16, 20] < across[:, 16, 12]
    assert 0.45 < mirrored.float().mean() < 0.55
    left = torch.where(mirrored, across[:, 16, 15], across[:, 16, 16]) - 16
    for shift in (left, down[:, 16, 16] - 16):
        assert shift.unique().tolist() == list(range(-4, 5))
        assert shift.int().add(4).bincount().min() > 4000 / 9 * 0.8


def test_memory_loader_does_not_mirror_digits():
    ramp = (torch.arange(28) * 8).expand(200, 3, 28, 28).to(torch.uint8)
    digits = DatasetInfo("mnist", Preprocessing(28, (0.5,) * 3, (0.25,) * 3, class_names=["0"]))
    images, _ = one_pass(MemoryLoader(ramp, torch.zeros(200), digits, 50, training=True))
    assert (images[..., 20] > images[..., 8]).all()


def test_memory_loader_resizes_batches_as_eval_transform_does():
    for side in (8, 40, 96):
        facts = DatasetInfo("cifar10", Preprocessing(side, *NORMALISATION["cifar10"], class_names=["a"]))
        pictures = [random_picture(32, 32, seed) for seed in range(4)]
        images = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
        ours, _ = one_pass(MemoryLoader(images, torch.zeros(4), facts, 2))
        transform = eval_transform(facts.preprocessing)
        assert ours.shape == (4, 3, side, side)
        torch.testing.assert_close(ours, torch.stack([transform(p) for p in pictures]), atol=0.02, rtol=0)


# ---- The validation cut -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_stratified_cut_is_disjoint_complete_and_proportional(fraction):
    labels = torch.tensor([0] * 100 + [1] * 37 + [2] * 2 + [3] + [4] * 10)[torch.randperm(150)]
    train, val = stratified_cut(labels, fraction, seed=0)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(150))
    for label, count in enumerate(labels.bincount().tolist()):
        expected = min(max(int(count * fraction + 0.5), 1), count - 1)
        assert (labels[val] == label).sum() == expected
        assert (labels[train] == label).sum() == count - expected


def test_get_data_loaders_cut_depends_only_on_the_seed(tmp_path):
    root = write_images(tmp_path, {"x": 20, "y": 20}, (12, 12))
    args = dict(data_dir=root, img_size=12, val_fraction=0.3)
    images = one_pass(get_data_loaders(**args)[1])[0]
    again = one_pass(get_data_loaders(**args, batch_size=7, workers=1)[1])[0]
    assert torch.equal(images, again)
    larger = get_data_loaders(root, img_size=72, val_fraction=0.3)[0].loader.dataset.files
    smaller = get_data_loaders(root, img_size=80, val_fraction=0.3)[0].loader.dataset.files
    assert larger == smaller
    assert not torch.equal(images, one_pass(get_data_loaders(**args, seed=1)[1])[0])


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_get_data_loaders_uses_a_validation_folder_whole(tmp_path, name):
    root = write_images(tmp_path, {"train/x": 6, "train/y": 6, f"{name}/x": 3, f"{name}/y": 1})
    train, val = get_data_loaders(root, img_size=16)
    assert (train.n_images, val.n_images) == (12, 4)
    assert get_test_loader(root, img_size=16) is None


def test_get_test_loader_is_none_for_class_folders_alone(tmp_path):
    root = write_images(tmp_path, {"x": 5, "y": 5})
    train, val = get_data_loaders(root, img_size=16)
    assert (train.n_images, val.n_images) == (8, 2)
    assert get_test_loader(root, img_size=16) is None


def test_loaders_decode_only_the_images_of_their_split(tmp_path, monkeypatch):
    root = write_images(tmp_path, {"train/x": 5, "train/y": 5, "test/x": 4})
    opened = []
    real = open_image
    monkeypatch.setattr("vit_bridge.data.images.open_image",
                        lambda path, n=3: opened.append(Path(path)) or real(path, n))
    get_data_loaders(root, img_size=16)
    assert {path.parts[-3] for path in opened} == {"train"}
    opened.clear()
    assert get_test_loader(root, img_size=None).n_images == 4
    assert {path.parts[-3] for path in opened} == {"test"}


# ---- Photographs ------------------------------------------------------------------------------------------


def test_photo_loader_workers_change_nothing(photos):
    alone, helped = photo_loader(photos), photo_loader(photos, workers=2)
    for epoch in (0, 1):
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        assert same(alone, helped)
    next(iter(helped))  # a pass that is given up
    assert same(alone, helped)


@pytest.mark.slow
def test_photo_dataset_works_in_spawned_processes(photos):
    loader = photo_loader(photos)
    keys = [[(0, index) for index in range(4)]]
    spawned = DataLoader(loader.loader.dataset, batch_sampler=keys, num_workers=1, collate_fn=loader.loader.collate_fn,
                         multiprocessing_context=multiprocessing.get_context("spawn"))
    (images, _, _), = list(spawned)
    assert torch.equal(images, torch.stack([loader.loader.dataset[0, index][0] for index in range(4)]))


def test_photo_dataset_augments_each_place_differently(photos):
    dataset = photo_loader(photos).loader.dataset
    dataset.files[1] = dataset.files[0]
    assert not torch.equal(dataset[0, 0][0], dataset[0, 1][0])


def test_photo_dataset_leaves_the_callers_random_numbers_alone(photos):
    dataset = photo_loader(photos).loader.dataset
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    dataset[0, 1]
    assert torch.equal(torch.rand(3), expected)


def test_loaders_can_be_pickled(photos):
    for loader in (photo_loader(photos), memory_loader(training=True)):
        assert same(pickle.loads(pickle.dumps(loader)), loader)


def test_eval_transform_resizes_and_centre_crops_photographs():
    photo, v1 = random_picture(300, 400, 0), torchvision.transforms
    reference = v1.Compose([v1.Resize(256), v1.CenterCrop(224), v1.ToTensor(), v1.Normalize(*NORMALISATION["folder"])])
    torch.testing.assert_close(eval_transform(Preprocessing(224, *NORMALISATION["folder"]))(photo), reference(photo))


@pytest.mark.parametrize(("size", "img_size"), [((72, 72), 72), ((48, 32), 16), ((48, 32), 96), ((320, 192), 48)])
def test_eval_transform_shows_small_images_whole(size, img_size):
    picture = random_picture(*size, 0)
    side = min(size)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    whole = picture.crop((left, top, left + side, top + side)).resize((img_size, img_size), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1) / 255
    ours = eval_transform(Preprocessing(img_size, (0.0,) * 3, (1.0,) * 3))(picture)
    assert (ours - expected).abs().mean() < 0.01


def test_loaders_show_images_as_eval_transform_does(tmp_path):
    for size, img_size in (((30, 40), 24), ((90, 120), 72)):
        root = write_images(tmp_path / str(img_size), {"train/x": 2, "train/y": 2, "test/x": 2}, size)
        images, _ = one_pass(get_test_loader(root, img_size=img_size))
        transform = eval_transform(Preprocessing(img_size, *NORMALISATION["folder"]))
        expected = [transform(open_image(root / "test/x" / name)) for name in ("000.png", "001.png")]
        torch.testing.assert_close(images, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "n", "expected"), [((20, 24), 80, 24), ((20, 65), 8, 224), ((64, 64), 3, 64)])
def test_get_data_loaders_finds_the_size_of_a_folder(tmp_path, size, n, expected):
    root = write_images(tmp_path, {"x": n, "y": 2}, size)
    assert get_data_loaders(root, img_size=None)[0].img_size == expected


# ---- The caller's normalisation and interpolation ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["shapes", "small folder", "photos"])
@pytest.mark.parametrize("convert", [tuple, list, torch.tensor, np.array])
def test_loaders_apply_the_callers_mean_and_std(kind, convert, tmp_path):
    mean, std = (0.125, 0.25, 0.5), (0.5, 0.25, 2.0)
    if kind == "shapes":
        args = dict(dataset="shapes", n_images=40, img_size=8)
    else:
        side = 72 if kind == "photos" else 16
        args = dict(data_dir=write_images(tmp_path, {"train/x": 4, "train/y": 4, "test/y": 3}, (side, side)),
                    img_size=side)
    own, wanted = get_test_loader(**args), dict(preprocessing=Preprocessing(99, convert(mean), convert(std)))
    test = get_test_loader(**args, **wanted)
    for loader in (test, *get_data_loaders(**args, **wanted)):
        assert loader.preprocessing == Preprocessing(args["img_size"], mean, std, class_names=loader.class_names)
        assert loader.preprocessing.interpolation == "bilinear"
    if kind == "photos":
        files = test.loader.dataset.files
        pixels = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)  # (N, 3, S, S)
    else:
        pixels = test.images.numpy()
    for loader, (m, s) in ((test, (mean, std)), (own, NORMALISATION[own.dataset_name])):
        expected = (pixels / 255 - np.reshape(m, (3, 1, 1))) / np.reshape(s, (3, 1, 1))
        torch.testing.assert_close(one_pass(loader)[0], torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-5)
    images, _ = one_pass(get_data_loaders(**args, **wanted)[0])
    lowest, highest = ((limit - torch.tensor(mean)) / torch.tensor(std) for limit in (0, 1))
    assert (images.amin((0, 2, 3)) >= lowest - 1e-5).all()
    assert (images.amax((0, 2, 3)) <= highest + 1e-5).all()


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "img_size", "shorter"), [
    ((90, 120), 72, 82), ((300, 200), 96, 110), ((40, 30), 24, 24)])
def test_loaders_resize_files_as_torchvision_does(tmp_path, name, size, img_size, shorter):
    root = write_images(tmp_path, {"train/x": 2, "train/y": 2, "val/x": 2, "test/x": 2}, size)
    mode, v1, facts = torchvision.transforms.InterpolationMode(name), torchvision.transforms, NORMALISATION["folder"]
    reference = v1.Compose([v1.Resize(shorter, mode), v1.CenterCrop(img_size), v1.ToTensor(), v1.Normalize(*facts)])
    given = Preprocessing(img_size, *facts, interpolation=name)
    train, val = get_data_loaders(root, img_size=img_size, preprocessing=given)
    for loader, folder in ((val, "val"), (get_test_loader(root, img_size=img_size, preprocessing=given), "test")):
        assert loader.preprocessing.interpolation == name
        pictures = [Image.open(root / folder / "x" / file) for file in ("000.png", "001.png")]
        torch.testing.assert_close(one_pass(loader)[0], torch.stack([reference(picture) for picture in pictures]))
        ours = torch.stack([eval_transform(given)(picture) for picture in pictures])
        torch.testing.assert_close(one_pass(loader)[0], ours)
    assert train.preprocessing.interpolation == name
    if isinstance(train, PhotoLoader):
        assert train.loader.dataset.transform.transforms[0].interpolation == mode
    else:
        cut = v1.Compose([v1.Resize(shorter, mode), v1.CenterCrop(img_size), v1.PILToTensor()])
        assert torch.equal(train.images[0], cut(Image.open(root / "train/x/000.png")))


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [20, 40])
def test_memory_loader_resizes_as_torch_does(tmp_path, name, side):
    loader = get_test_loader(write_idx(tmp_path, "MNIST", 60), img_size=side,
                             preprocessing=Preprocessing(side, *NORMALISATION["mnist"], interpolation=name))
    resized = torch.nn.functional.interpolate(loader.images.float(), (side, side), mode=name, antialias=True)
    assert (resized.max() > 256) == (name == "bicubic" and side == 40)  # there it goes beyond what pixels can be
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in NORMALISATION["mnist"])
    torch.testing.assert_close(one_pass(loader)[0], (resized.clamp(0, 255) / 255 - mean) / std)


@pytest.mark.parametrize(("argument", "value"), [
    ("mean", (0.5, 0.5)), ("mean", 0.5), ("mean", "0.5"), ("mean", ("0.5",) * 3), ("mean", (0.5, 0.5, float("nan"))),
    ("mean", {}), ("mean", torch.eye(3)), ("std", (1, 1, 0)), ("std", (1, -1, 1)), ("std", (1, 1, float("inf"))),
    ("std", (1, 1, 1, 1)), ("std", None), ("mean", None), ("interpolation", "nearest"), ("interpolation", 3),
])
def test_preprocessing_names_a_bad_normalisation(argument, value):
    wanted = {"mean": (0.5, 0.25, 0.125), "std": (0.2, 0.3, 0.4), argument: value}
    message = error_of(Preprocessing, 8, **wanted)
    assert argument in message
    given = tuple(map(float, value)) if value in ((0.5, 0.5), (1, 1, 1, 1)) else value  # those that are numbers
    assert " ".join(repr(given).split()) in message


@pytest.mark.parametrize("n", [2, 5])
def test_loaders_refuse_channels_that_no_file_has(n, tmp_path):
    given = Preprocessing(8, (0.5,) * n, (0.25,) * n)
    root = write_images(tmp_path, {"train/x": 2, "train/y": 2, "test/x": 1})
    for args in (dict(dataset="shapes", n_images=20), dict(data_dir=root)):
        for function in (get_data_loaders, get_test_loader):
            assert f"in_channels {n} is out of range" in error_of(function, img_size=8, preprocessing=given, **args)
            assert f"in_channels {n} is out of range" in error_of(function, img_size=8, in_channels=n, **args)
            assert "in_channels 3 does not match preprocessing" in error_of(
                function, img_size=8, preprocessing=given, in_channels=3, **args)


def test_preprocessing_and_fit_square_refuse_unknown_interpolation():
    for unknown in ("nearest", "blob"):
        assert repr(unknown) in error_of(Preprocessing, 32, interpolation=unknown)
        assert repr(unknown) in error_of(FitSize, 32, unknown)


# ---- Image files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_open_image_reads_a_rotated_photograph_upright(tmp_path, orientation):
    upright = random_picture(60, 40, 0)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # how a camera stored it: PIL's Transpose
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(open_image(tmp_path / "turned.png"), upright)


def test_open_image_turns_every_mode_into_rgb(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    as_rgb = np.stack([grey] * 3, axis=2)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.tif")
    Image.fromarray(as_rgb).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    for name in ("8.png", "16.png", "16.tif", "palette.png"):
        image = open_image(tmp_path / name)
        assert image.mode == "RGB"
        assert np.array_equal(image, as_rgb), name
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # pure red
    cmyk.save(tmp_path / "cmyk.jpg")
    assert np.abs(np.array(open_image(tmp_path / "cmyk.jpg"), dtype=int) - [255, 0, 0]).max() < 10
    Image.new("1", (8, 8), 1).save(tmp_path / "bits.png")
    assert np.array(open_image(tmp_path / "bits.png")).min() == 255


def test_open_image_makes_transparent_pixels_white(tmp_path):
    rgba = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    rgba.putpixel((1, 0), (200, 0, 0, 0))
    rgba.save(tmp_path / "rgba.png")
    la = Image.new("LA", (2, 1), (100, 255))
    la.putpixel((1, 0), (100, 0))
    la.save(tmp_path / "la.png")
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=1)
    two = np.array([[[200, 0, 0], [0, 0, 9]]], dtype=np.uint8)
    Image.fromarray(two).save(tmp_path / "key.png", transparency=(0, 0, 9))
    for name, first in (("rgba", (200, 0, 0)), ("la", (100,) * 3), ("palette", (200, 0, 0)), ("key", (200, 0, 0))):
        image = open_image(tmp_path / f"{name}.png")
        assert [image.getpixel((0, 0)), image.getpixel((1, 0))] == [first, (255, 255, 255)], name


def test_get_data_loaders_ignores_hidden_and_other_files(tmp_path):
    root = write_images(tmp_path, {"x/deeper": 3, "y": 3, ".hidden": 2, "x/.cache": 2})
    (root / "x" / "._000.png").write_bytes(b"not an image")
    (root / "x" / "notes.txt").write_text("not an image")
    (root / "README").write_text("not a class")
    random_picture(16, 16, 5).save(root / "y" / "LOUD.PNG")
    train, val = get_data_loaders(root, img_size=16)
    assert (train.class_names, train.n_images + val.n_images) == (["x", "y"], 7)


# ---- Sets by name -----------------------------------------------------------------------------------------


def write_idx(root, name, count):
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", count), ("t10k", count // 2)):
        images = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(n) % 10
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
    return root


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_get_data_loaders_gives_mnist_three_equal_channels(tmp_path, name, folder):
    write_idx(tmp_path, folder, 60)
    for dataset in ("auto", name):
        train, val = get_data_loaders(tmp_path, dataset=dataset, img_size=None)
        test = get_test_loader(tmp_path, dataset=dataset, img_size=None)
        assert (train.n_images, val.n_images, test.n_images, train.img_size) == (50, 10, 30, 28)
        assert (train.dataset_name, len(train.class_names)) == (name, 10)
        assert (test.preprocessing.mean, test.preprocessing.std) == NORMALISATION[name]
        images, labels = one_pass(test)
        assert torch.equal(images[:, 0], images[:, 2])
        corner = (images[:, 0, 0, 0] * test.preprocessing.std[0] + test.preprocessing.mean[0]) * 255
        assert torch.equal(corner.round().long(), labels)
    assert get_data_loaders(tmp_path, img_size=40)[1].img_size == 40


def test_get_test_loader_unpacks_an_archive(tmp_path, monkeypatch):
    write_idx(tmp_path, "MNIST", 20)
    sums = []
    for file in sorted((tmp_path / "MNIST/raw").iterdir()):
        packed = gzip.compress(file.read_bytes())
        file.unlink()
        (tmp_path / "MNIST/raw" / f"{file.name}.gz").write_bytes(packed)
        sums.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", sums)
    assert get_test_loader(tmp_path, img_size=None).n_images == 10


@pytest.mark.parametrize(("name", "maker"), [("cifar10", torchvision.datasets.CIFAR10),
                                             ("cifar100", torchvision.datasets.CIFAR100)])
def test_get_data_loaders_reads_cifar(tmp_path, monkeypatch, name, maker):
    folder = tmp_path / maker.base_folder
    folder.mkdir()
    key, classes = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    for parts in ("train_list", "test_list"):
        written = []
        for file, _ in getattr(maker, parts):
            labels = [i % classes for i in range(2 * classes)]
            pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
            pixels[:, 1024] = labels  # the first pixel's green
            written.append([file, write(file, {"data": pixels, key: labels})])
        monkeypatch.setattr(maker, parts, written)
    meta = {**maker.meta, "md5": write(maker.meta["filename"], {maker.meta["key"]: [f"c{i}" for i in range(classes)]})}
    monkeypatch.setattr(maker, "meta", meta)
    train, val = get_data_loaders(tmp_path, img_size=None)
    images, labels = one_pass(get_test_loader(tmp_path, img_size=None))
    assert (train.dataset_name, train.img_size, train.class_names[-1]) == (name, 32, f"c{classes - 1}")
    assert val.n_images == (10 if name == "cifar10" else 100)
    green = (images[:, 1, 0, 0] * train.preprocessing.std[1] + train.preprocessing.mean[1]) * 255
    assert torch.equal(green.round().long(), labels)


@pytest.mark.parametrize("name", list(TORCHVISION_SETS))
def test_get_data_loaders_offline_names_files_and_folder(tmp_path, monkeypatch, name):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", offline)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", offline)
    message = error_of(get_data_loaders, tmp_path / "new", dataset=name)
    _, layout, files = TORCHVISION_SETS[name]
    assert name in message
    assert str(tmp_path / "new" / layout) in message
    assert files in message
    assert not (tmp_path / "new").exists()


def test_get_data_loaders_without_data_announces_shapes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train, _ = get_data_loaders(img_size=16, n_images=40)
    assert train.dataset_name == "shapes"
    assert get_test_loader("data", img_size=16, n_images=40).dataset_name == "shapes"
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert all(word in printed for word in ("./data", "shapes", "data_dir", "cifar10", "fashion-mnist"))
    assert "no data folder" in error_of(get_data_loaders, "./elsewhere")
    assert "no data folder" in error_of(get_data_loaders, dataset="folder")
    (tmp_path / "data").mkdir()
    assert "0 class folders" in error_of(get_data_loaders)


def test_get_data_loaders_prints_nothing_for_a_named_set(capsys):
    get_data_loaders(dataset="shapes", n_images=20, img_size=8)
    assert capsys.readouterr().out == ""


# ---- Shapes -----------------------------------------------------------------------------------------------


def test_shapes_loaders_never_share_images():
    train, val = get_data_loaders(dataset="shapes", n_images=100, img_size=16)
    test = get_test_loader(dataset="shapes", n_images=100, img_size=16)
    flat = torch.cat([train.images, val.images, test.images]).flatten(1)
    assert len(flat.unique(dim=0)) == 120
    assert torch.equal(test.images, make_shapes(20, 16, start=TEST_START).images)
    other_seed, _ = get_data_loaders(dataset="shapes", n_images=100, img_size=16, seed=9)
    assert not torch.equal(other_seed.images, train.images)  # another cut ...
    both = torch.cat([other_seed.images, train.images, val.images]).flatten(1)
    assert len(both.unique(dim=0)) == 100  # ... of the same images


@pytest.mark.parametrize(("img_size", "n"), [(8, 20_000), (32, 20_000), (64, 7_100), (224, 1_100), (2000, 500)])
def test_get_data_loaders_draws_fewer_shapes_at_larger_sizes(monkeypatch, img_size, n):
    asked = []
    monkeypatch.setattr("vit_bridge.data.datasets.make_shapes",
                        lambda n, S, start=0: asked.append((n, S, start)) or make_shapes(20, 8))
    get_data_loaders(dataset="shapes", img_size=img_size)
    get_test_loader(dataset="shapes", img_size=img_size)
    assert asked == [(n, img_size, 0), (n // 5, img_size, TEST_START)]


# ---- What cannot work -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("argument", "value"), [
    ("batch_size", 0), ("batch_size", 2.5), ("batch_size", None), ("img_size", 7), ("img_size", "32"), ("workers", -1),
    ("seed", -1), ("seed", True), ("n_images", 19), ("val_fraction", 0), ("val_fraction", 1.0),
    ("val_fraction", float("nan")), ("val_fraction", "0.1"), ("dataset", "imagenet"), ("dataset", None),
])
def test_get_data_loaders_names_a_bad_argument(argument, value):
    for function in (get_data_loaders, get_test_loader):
        message = error_of(function, **{"dataset": "shapes", argument: value})
        assert argument in message
        assert repr(value) in message


def test_get_data_loaders_answers_unknown_set_with_known_ones():
    message = error_of(get_data_loaders, dataset="cifar")
    assert all(name in message for name in DATASETS)


@pytest.mark.parametrize(("counts", "words"), [
    ({}, ["0 class folders"]),
    ({"x": 3}, ["1 class folder (x)", "at least 2"]),
    ({"x": 3, "y": 0}, ["'y'", "no images"]),
    ({"train/x": 3, "train/y": 0}, ["train/y", "no images"]),
    ({"train/x": 3, "train/y": 2, "val/z": 1}, ["val'", "'z'", "x, y"]),
    ({"train/x": 3, "train/y": 2, "test/z": 1}, ["test'", "'z'", "x, y"]),
    ({"train/x": 3, "train/y": 2, "val/x": 0}, ["val'", "no images"]),
    ({"test/x": 3, "test/y": 2}, ["test/", "no train/"]),
    ({"x": 1, "y": 1}, ["no class has 2 images"]),
])
def test_get_data_loaders_refuses_unusable_folders(tmp_path, counts, words):
    write_images(tmp_path, counts)
    message = error_of(get_data_loaders, tmp_path, img_size=16)
    assert all(word in message.replace(str(tmp_path) + "/", "") for word in words), message


def test_loaders_allow_missing_classes_in_val_and_test(tmp_path):
    root = write_images(tmp_path, {"train/x": 3, "train/y": 2, "val/y": 1, "test/y": 2})
    assert get_data_loaders(root, img_size=16)[1].labels.tolist() == [1]
    assert get_test_loader(root, img_size=16).labels.tolist() == [1, 1]


def test_get_data_loaders_takes_n_images_for_shapes_only(tmp_path):
    write_images(tmp_path, {"x": 3, "y": 3})
    message = error_of(get_data_loaders, tmp_path, n_images=100)
    assert "n_images 100" in message


@pytest.mark.slow
@pytest.mark.parametrize("content", ["empty", "text", "half"])
@pytest.mark.parametrize(("img_size", "workers"), [(16, 0), (72, 0), (72, 1), (None, 0)])
def test_loaders_name_a_broken_image_in_one_line(tmp_path, content, img_size, workers):
    size = (16, 16) if img_size in (16, None) else (80, 80)
    root = write_images(tmp_path, {"x": 3, "y": 3}, size, ".jpg")
    broken = root / "y" / "000.jpg"
    whole = broken.read_bytes()
    broken.write_bytes({"empty": b"", "text": b"not an image", "half": whole[: len(whole) // 2]}[content])
    assert str(broken) in error_of(open_image, broken)

    def set_augmentation():
        for loader in get_data_loaders(root, img_size=img_size, workers=workers):
            one_pass(loader)

    message = error_of(set_augmentation)
    assert str(broken) in message
    assert "Traceback" not in message


def test_open_image_names_a_missing_file():
    assert "'nowhere.jpg'" in error_of(open_image, "nowhere.jpg")


def test_photo_dataset_returns_an_error_as_a_value(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    facts = DatasetInfo("folder", Preprocessing(72, (0.5,) * 3, (0.5,) * 3, class_names=["a"]))
    item = PhotoDataset([str(tmp_path / "x.png")], [0], facts, False)[0, 0, 0]
    assert isinstance(item, InputError)
