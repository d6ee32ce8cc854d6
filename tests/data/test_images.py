"""All accepted kinds of images give the same result, and anything else is refused."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from figure_checks import SIZE, pixels, square_vit, vit
from other_models import shared
from PIL import Image

from vit_bridge.data.images import as_picture, open_picture, prepare_image, prepare_images
from vit_bridge.models.adapters import adapt
from vit_bridge.preprocessing import NORMALISATION, FitSize, Preprocessing, Whole, eval_transform
from vit_model import InputError, VisionTransformer


def statistics_of(model):
    """Return (mean, std) of the images that the model takes."""
    preprocessing = adapt(model).preprocessing
    return preprocessing.mean, preprocessing.std


def kinds(array, tmp_path):
    Image.fromarray(array).save(tmp_path / "image.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    return {"path": tmp_path / "image.png", "text": str(tmp_path / "image.png"), "pil": Image.fromarray(array),
            "array": array, "float": array / 255, "float32": (array / 255).astype(np.float32),
            "rgba": np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
            "tensor": tensor, "batch": tensor[None]}


def test_prepare_image_treats_every_kind_of_picture_alike(tmp_path):
    model, array = vit(), pixels()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALISATION["folder"])
    expected = (torch.from_numpy(array).permute(2, 0, 1)[None] / 255 - mean) / std
    for kind, image in kinds(array, tmp_path).items():
        images, picture = prepare_image(image, model)
        torch.testing.assert_close(images, expected, msg=kind)
        np.testing.assert_allclose(picture, array / 255, atol=1e-6, err_msg=kind)
        np.testing.assert_allclose(as_picture(image), array / 255, atol=1e-6, err_msg=kind)
    for image in (expected, expected[0], expected.double()):
        images, picture = prepare_image(image, model)
        torch.testing.assert_close(images, expected)
        np.testing.assert_allclose(picture, array / 255, atol=1e-6)


def test_prepare_image_repeats_grey_in_three_channels():
    grey = pixels()[:, :, 0]
    images, picture = prepare_image(grey, vit())
    np.testing.assert_allclose(picture, np.repeat(grey[:, :, None], 3, axis=2) / 255, atol=1e-6)
    assert images.shape == (1, 3, *SIZE)


def test_prepare_image_transforms_pictures_as_eval_transform_does():
    model, photo = square_vit(), Image.fromarray(pixels(41, 53))
    images, picture = prepare_image(photo, model)
    torch.testing.assert_close(images[0], eval_transform(model.preprocessing)(photo))
    assert picture.shape == (12, 12, 3)
    model.preprocessing = replace(model.preprocessing, interpolation="bicubic")
    bicubic, _ = prepare_image(photo, model)
    torch.testing.assert_close(bicubic[0], eval_transform(model.preprocessing)(photo))
    assert not torch.allclose(bicubic, images, atol=0.01)
    images, picture = prepare_image(photo, vit())
    assert picture.shape == (*SIZE, 3)
    assert images.shape == (1, 3, *SIZE)


def test_prepare_image_shows_a_tensor_with_the_models_statistics():
    _, picture = prepare_image(torch.zeros(1, 3, 12, 12), square_vit())
    np.testing.assert_allclose(picture, np.broadcast_to([0.5, 0.4, 0.3], (12, 12, 3)), atol=1e-6)
    shown = as_picture(torch.ones(3, 2, 5), Preprocessing((2, 5), (0.5, 0.4, 0.3), (0.2, 0.25, 0.9)))
    np.testing.assert_allclose(shown, np.broadcast_to([0.7, 0.65, 1.0], (2, 5, 3)), atol=1e-6)


def test_as_picture_turns_a_pil_image_upright():
    photo = Image.fromarray(pixels())
    photo.getexif()[0x0112] = 3  # orientation: upside down
    np.testing.assert_array_equal(as_picture(photo), pixels()[::-1, ::-1] / 255)


@pytest.mark.parametrize("mode", ["F", "I"])
@pytest.mark.parametrize("high", [1, 255])
def test_open_picture_refuses_modes_without_a_known_white(mode, high):
    with pytest.raises(InputError, match=rf"\Agot a PIL image of mode '{mode}' with values from {high} to [^\n]*\Z"):
        open_picture(Image.new(mode, (5, 5), high))


def test_open_picture_takes_rarer_pil_modes():
    grey = Image.fromarray(pixels()).convert("L")
    opaque = grey.convert("LA").convert("La")
    np.testing.assert_array_equal(open_picture(opaque), np.asarray(grey.convert("RGB")))
    sixteen = Image.fromarray(np.full((5, 5), 257 * 200, np.uint16))
    assert np.asarray(open_picture(sixteen)).max() == 200
    grey.close()
    with pytest.raises(InputError, match=r"\Athe PIL image cannot be read \(Operation on closed image\)[^\n]*\Z"):
        open_picture(grey)


def test_fit_size_cuts_the_centre_to_an_oblong_size():
    wide = np.zeros((14, 35, 3), np.uint8)
    wide[:, 10:25] = pixels()
    np.testing.assert_array_equal(FitSize(SIZE)(Image.fromarray(wide)), pixels())


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_prepare_image_takes_statistics_of_any_kind(kind):
    model = vit()
    model.preprocessing = Preprocessing(SIZE, kind([0.0, 0.5, 0.25]), kind([0.5, 0.25, 0.125]))
    assert statistics_of(model) == ((0.0, 0.5, 0.25), (0.5, 0.25, 0.125))
    assert type(statistics_of(model)[0]) is tuple
    _, picture = prepare_image(torch.zeros(3, *SIZE), model)
    np.testing.assert_array_equal(picture, np.broadcast_to([0.0, 0.5, 0.25], (*SIZE, 3)))


def show_to(model, mean, std):
    model.preprocessing = Preprocessing(SIZE, mean, std)
    return prepare_image(pixels(), model)


@pytest.mark.parametrize(("mean", "std", "words"), [
    (0.5, 0.2, r"mean 0\.5 [^\n]*expected a finite number for each channel"),
    ([0.5], [0.2], r"model\.preprocessing has a mean and std for 1 channels, [^\n]*expects 3; set model"),
    ((0.5,) * 3, (0.2, 0.0, 0.2), r"std \(0\.2, 0\.0[^\n]*expected a finite number above 0 for each channel"),
    ((0.5,) * 3, [0.2] * 4, r"mean \(0\.5, [^\n]* and std \(0\.2, [^\n]* have 3 and 4 numbers; pass one"),
    ((0.5, 0.5, np.nan), (0.2,) * 3, r"mean \(0\.5, 0\.5, nan\)"), ("dark", (0.2,) * 3, "mean 'dark'")])
def test_prepare_image_refuses_statistics_not_one_per_channel(mean, std, words):
    with pytest.raises(InputError, match=rf"\A{words}[^\n]*\Z"):
        show_to(vit(), mean, std)


def test_adapt_gives_one_channel_models_one_mean_and_std():
    model = vit(in_channels=1)
    assert statistics_of(model) == ((0.0,), (1.0,))  # nothing is known of it: its images are shown as they are
    model.preprocessing = Preprocessing(SIZE, [0.5], [0.25])
    assert statistics_of(model) == ((0.5,), (0.25,))
    model.preprocessing = Preprocessing(SIZE)
    with pytest.raises(InputError, match="mean and std for 3 channels, but the model expects 1"):
        statistics_of(model)


@pytest.mark.parametrize(("image", "text"), [
    (torch.zeros(1, 3, 15, 14), "15x14 pixels, expected 14x15"),
    (torch.zeros(2, 3, 14, 15), r"\(2, 3, 14, 15\), expected \(3, H, W\)"),
    (torch.zeros(14, 15), r"\(14, 15\), expected"),
    (torch.zeros(4, 14, 15), r"\(4, 14, 15\), expected"),
    (torch.zeros(3, 0, 15), r"\(3, 0, 15\), expected"),
    (torch.zeros(3, 14, 15, dtype=torch.int64), "Tensor of torch.int64"),
    (torch.full((3, 14, 15), torch.nan), "not finite"),
    (np.full((14, 15, 3), 1.5), "from 1.5 to 1.5, expected 0..1"),
    (np.full((14, 15, 3), np.nan), "from nan to nan"),
    (np.zeros((3, 14, 15)), "ndarray of float64"),
    (np.zeros((0, 15, 3)), "ndarray of float64"),
    (np.zeros((14, 15), dtype=np.int64), "ndarray of int64"),
    ("nowhere.png", "nowhere.png"),
    (None, "NoneType, which is not an image"),
])
def test_prepare_image_refuses_what_is_no_image(image, text):
    with pytest.raises(InputError, match=text) as caught:
        prepare_image(image, vit())
    assert "\n" not in str(caught.value)


def test_prepare_image_gives_one_channel_models_grey_pictures():
    grey = np.asarray(Image.fromarray(pixels()).convert("L"))
    images, shown = prepare_image(pixels(), vit(in_channels=1))
    np.testing.assert_array_equal(images[0, 0], np.float32(grey) / 255)
    np.testing.assert_array_equal(shown, images[0, 0].numpy()[:, :, None].repeat(3, axis=2))


def test_prepare_image_takes_tensors_of_any_channels_and_refuses_files_of_them(tmp_path):
    model, image = vit(in_channels=5), torch.randint(256, (5, *SIZE), dtype=torch.uint8)
    fed, shown = prepare_image(image, model)
    assert torch.equal(fed, image[None] / 255)
    np.testing.assert_array_equal(shown, fed[0, :3].permute(1, 2, 0))
    assert torch.equal(prepare_image(image.permute(1, 2, 0).numpy(), model)[0], fed)
    assert prepare_image(torch.rand(5, *SIZE), model)[0].shape == (1, 5, *SIZE)
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="cannot be read as 5 channels; expected 1, 3 or 4"):
        prepare_image(tmp_path / "a.png", model)


# ---- Other libraries


def test_adapt_knows_other_libraries_normalisation(tmp_path):
    timm_model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    assert statistics_of(timm_model) == ((0.5,) * 3, (0.5,) * 3)
    theirs, ours, _ = shared("transformers", tmp_path)
    assert statistics_of(theirs) == ((0.5,) * 3, (0.5,) * 3)
    assert statistics_of(ours) == NORMALISATION["folder"]
    theirs.preprocessing = Preprocessing(15, (0.1,) * 3, (0.2,) * 3)
    assert statistics_of(theirs) == ((0.1,) * 3, (0.2,) * 3)


def test_prepare_image_takes_any_size_if_the_model_does():
    model = vit()
    with pytest.raises(InputError, match="expected 14x15"):
        prepare_image(torch.randn(1, 3, 28, 15), model)
    model.any_size = True
    assert prepare_image(torch.randn(1, 3, 28, 15), model)[1].shape == (28, 15, 3)


def test_prepare_images_refuses_what_makes_no_batch():
    model = vit()
    model.any_size = True
    images = [torch.randn(3, 14, 15), torch.randn(3, 28, 15)]
    with pytest.raises(InputError, match=r"\Agot images of 14x15 and 28x15 pixels, expected one size[^\n]*\Z"):
        prepare_images(images, model)
    assert prepare_images(images[1:] * 2, model).shape == (2, 3, 28, 15)
    batch = torch.randn(2, 3, *SIZE)
    assert prepare_images(batch, model) is batch
    batch[1, 2, 3, 4] = torch.nan
    with pytest.raises(InputError, match="values that are not finite"):
        prepare_images(batch, model)
    with pytest.raises(InputError, match="there is no image"):
        prepare_images(batch[:0], model)


# ---- Whole photographs


@pytest.mark.parametrize(("image_size", "patch", "n", "grid"), [
    ((300, 451), 14, 1369, (30, 45)), ((512, 512), 16, 196, (14, 14)), ((4000, 3000), 16, 196, (16, 12)),
    ((300, 451), 4, 64, (6, 9)), ((3000, 20), 16, 196, (150, 1)), ((1, 1), 4, 64, (8, 8)), ((9, 5), 7, 1, (1, 1))])
def test_whole_keeps_the_proportions_within_the_patches(image_size, patch, n, grid):
    assert Whole().size_for(image_size, (patch, patch), n) == (grid[0] * patch, grid[1] * patch)


def test_whole_has_as_many_patches_as_asked_for_and_stretches_to_a_given_size():
    rows, columns = Whole(max_tokens=50).size_for((300, 451), (1, 1), 1369)
    assert (rows, columns) == (6, 8)
    assert Whole(img_size=(28, 42)).size_for((300, 451), (14, 14), 1369) == (28, 42)
    assert Whole().size_for((100, 100), (8, 4), 8) == (16, 16)  # patches that are no squares
    assert Whole(max_tokens=10**9).size_for((100, 400), (1, 4), 1) == (31_622, 126_488)  # at once
    with pytest.raises(InputError, match="max_tokens"):
        Whole(max_tokens=0)


def test_whole_photograph_reaches_every_edge():
    """The image is white along its edges, which a centre crop would remove."""
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:6], pixels[-6:], pixels[:, :6], pixels[:, -6:] = 255, 255, 255, 255
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=8, depth=1, n_heads=1)
    with pytest.raises(InputError, match="any_size"):
        prepare_image(pixels, model, Whole())
    model.any_size = True
    images, picture = prepare_image(pixels, model, Whole())
    assert picture.shape == (24, 40, 3)
    assert images.shape == (1, 3, 24, 40)
    assert min(picture[0].min(), picture[-1].min(), picture[:, 0].min(), picture[:, -1].min()) > 0.9
    assert model(images).shape == (1, 1000)
    assert prepare_image(pixels, model)[1].shape == (32, 32, 3)
