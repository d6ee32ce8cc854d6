"""Rectangular images, and images of one or four channels, from the file to the batch."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from vit_bridge.data.augmentation import train_transform
from vit_bridge.data.images import grey, open_image
from vit_bridge.data.loaders import MemoryLoader, PhotoLoader, get_data_loaders, get_evaluation_loader, get_test_loader
from vit_bridge.errors import InputError
from vit_bridge.preprocessing import FitSize, Preprocessing, covering_size, resized_channels


def picture(height=30, width=50, seed=0, mode="RGB"):
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[:, :, 0], mode)


@pytest.fixture
def folder(tmp_path):
    """Write two classes of five images (30 x 50 pixels, two with transparency) and a test set."""
    for part, n in (("train", 5), ("test", 2)):
        for c, name in enumerate(("fox", "hare")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                picture(seed=10 * c + i, mode="RGBA" if i == 0 else "RGB").save(tmp_path / part / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize(("image", "size", "expected"), [
    ((30, 50), (24, 24), (24, 40)), ((50, 30), (24, 24), (40, 24)), ((30, 50), (24, 40), (24, 40)),
    ((30, 50), (40, 24), (40, 66)), ((10, 10), (3, 7), (7, 7)), ((7, 3), (7, 3), (7, 3))])
def test_covering_size_keeps_proportions_and_leaves_nothing_uncovered(image, size, expected):
    assert covering_size(image, size) == expected


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (24, 24)])
def test_fit_size_covers_small_images_and_cuts_the_middle(size):
    fitted = FitSize(size)(picture())
    expected = center_crop(resize(picture(), covering_size((30, 50), size)), size)
    assert fitted.size == size[::-1]
    assert np.array_equal(fitted, expected)


@pytest.mark.parametrize("size", [(96, 160), (112, 112)])
def test_fit_size_leaves_an_eighth_around_photographs(size):
    photograph = picture(280, 500)
    covered = [round(side * 256 / 224) for side in size]
    expected = center_crop(resize(photograph, covering_size((280, 500), covered)), size)
    assert np.array_equal(FitSize(size)(photograph), expected)


def test_fit_size_fits_tensors_as_it_fits_pictures():
    image = pil_to_tensor(picture())
    assert (FitSize((24, 40))(image).int() - pil_to_tensor(FitSize((24, 40))(picture()))).abs().max() <= 1


def test_grey_is_pillows_grey():
    image = picture()
    assert torch.equal(grey(pil_to_tensor(image)[None])[0], pil_to_tensor(image.convert("L")))


def test_open_image_reads_one_three_or_four_channels(tmp_path):
    image = picture(mode="RGBA")
    image.save(tmp_path / "a.png")
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(open_image(tmp_path / "a.png", 4), image)
    assert np.array_equal(open_image(tmp_path / "a.png"), white)
    assert np.array_equal(open_image(tmp_path / "a.png", 1), white.convert("L"))
    picture().save(tmp_path / "b.png")
    assert np.asarray(open_image(tmp_path / "b.png", 4))[:, :, 3].min() == 255


def test_preprocessing_with_channels_takes_the_mean_of_the_colours_or_repeats_them():
    shown = Preprocessing(8, (0.1, 0.2, 0.6), (0.2, 0.2, 0.5), class_names=["a"])
    one = shown.with_channels(1)
    assert one == Preprocessing(8, (sum((0.1, 0.2, 0.6)) / 3,), (sum((0.2, 0.2, 0.5)) / 3,), class_names=["a"])
    assert shown.with_channels(4).mean == (0.1, 0.2, 0.6, 0.1) == resized_channels((0.1, 0.2, 0.6), 4)
    assert shown.with_channels(3) is shown
    assert Preprocessing((8, 8)).img_size == 8
    assert Preprocessing([8, 9]).img_size == (8, 9)


@pytest.mark.parametrize("n_channels", [1, 3, 4])
@pytest.mark.parametrize("img_size", [(24, 40), (72, 40), 24])
def test_loaders_of_a_folder_give_these_sizes_and_channels(folder, img_size, n_channels):
    given = dict(data_dir=folder, img_size=img_size, in_channels=n_channels, batch_size=3)
    for loader in (*get_data_loaders(**given), get_test_loader(**given)):
        assert isinstance(loader, PhotoLoader if img_size == (72, 40) else MemoryLoader)
        assert loader.img_size == img_size
        assert {images.shape[1:] for images, _ in loader} == {(n_channels, *loader.size)}
    shown = loader.preprocessing
    fitted = FitSize(img_size)(open_image(loader.files[0], n_channels))
    images, _ = next(iter(loader))
    torch.testing.assert_close(images[0], shown.normalise(pil_to_tensor(fitted)[None])[0])
    again = get_evaluation_loader(folder, loader.class_names, 3, img_size, preprocessing=shown)
    assert torch.equal(next(iter(again))[0], images)


def test_loaders_of_shapes_give_rectangles_cut_from_squares_and_grey(tmp_path):
    colour, _ = get_data_loaders(dataset="shapes", img_size=(24, 40), n_images=20)
    assert colour.images.shape[2:] == (40, 40)
    plain, middle = colour.without_augmentation(), colour.images[:, :, 8:32]
    torch.testing.assert_close(next(iter(plain))[0], colour.preprocessing.normalise(middle))
    one, _ = get_data_loaders(dataset="shapes", img_size=(24, 40), n_images=20, in_channels=1)
    assert torch.equal(one.images, grey(colour.images))
    assert next(iter(one))[0].shape[1:] == (1, 24, 40)


@pytest.mark.parametrize(("n_channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_train_transform_gives_each_size_and_number_of_channels(n_channels, mode):
    vary = train_transform(Preprocessing((24, 40)).with_channels(n_channels))
    for seed in range(20):  # AutoAugment draws among many operations
        torch.manual_seed(seed)
        assert vary(picture(mode=mode)).shape == (n_channels, 24, 40)


def test_train_transform_crops_in_the_shape_of_the_result():
    crop = train_transform(Preprocessing((20, 60))).transforms[0]
    assert crop.ratio == pytest.approx((2.25, 4))


@pytest.mark.parametrize(("given", "words"), [
    (dict(img_size=(8, 16, 3)), "3 sides"), (dict(img_size=(8, 4)), "img_size 4"),
    (dict(in_channels=0), "in_channels 0"), (dict(in_channels=4), "1 or 3 channels")])
def test_get_data_loaders_refuses_sizes_and_channels_that_cannot_be(given, words):
    with pytest.raises(InputError, match=words):
        get_data_loaders(dataset="shapes", n_images=20, **given)
