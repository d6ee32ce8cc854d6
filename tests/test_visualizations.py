"""Figures: every accepted image gives the same picture, every panel is labelled, nothing is changed."""

import numpy as np
import pytest
import torch
from figure_checks import assert_no_text_clipped, data_of, texts
from matplotlib.figure import Figure
from PIL import Image

import visualizations as v
from cnn_model import ConvNet
from measurements import attention_maps
from vit_data import NORMALISATION, eval_transform
from vit_model import InputError, VisionTransformer

SIZE, PATCH, GRID = (14, 15), (7, 5), (2, 3)


def vit(**options):
    torch.manual_seed(0)
    settings = dict(img_size=SIZE, patch_size=PATCH, n_classes=5, embed_dim=22, depth=3, n_heads=2)
    return VisionTransformer(**{**settings, **options})


def square_vit():
    model = vit(img_size=12, patch_size=4)
    model.mean, model.std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    model.class_names = ["ant", "bee", "cat", "dog", "elk"]
    return model


def convnet():
    torch.manual_seed(0)
    return ConvNet(img_size=12, n_classes=5, widths=(3, 5), depths=(1, 1), stem_stride=1)


def pixels(height=14, width=15):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- Images


def kinds(array, tmp_path):
    Image.fromarray(array).save(tmp_path / "image.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    return {"path": tmp_path / "image.png", "text": str(tmp_path / "image.png"), "pil": Image.fromarray(array),
            "array": array, "float": array / 255, "float32": (array / 255).astype(np.float32),
            "rgba": np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
            "tensor": tensor, "batch": tensor[None]}


def test_every_kind_of_picture_gives_the_same(tmp_path):
    model, array = vit(), pixels()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALISATION["folder"])
    expected = (torch.from_numpy(array).permute(2, 0, 1)[None] / 255 - mean) / std
    for kind, image in kinds(array, tmp_path).items():
        images, picture = v.prepare_image(image, model)
        torch.testing.assert_close(images, expected, msg=kind)
        np.testing.assert_allclose(picture, array / 255, atol=1e-6, err_msg=kind)
        np.testing.assert_allclose(v.as_picture(image), array / 255, atol=1e-6, err_msg=kind)
    for image in (expected, expected[0], expected.double()):
        images, picture = v.prepare_image(image, model)
        torch.testing.assert_close(images, expected)
        np.testing.assert_allclose(picture, array / 255, atol=1e-6)


def test_grey_is_repeated():
    grey = pixels()[:, :, 0]
    images, picture = v.prepare_image(grey, vit())
    np.testing.assert_allclose(picture, np.repeat(grey[:, :, None], 3, axis=2) / 255, atol=1e-6)
    assert images.shape == (1, 3, *SIZE)


def test_pictures_are_fed_as_the_validation_images_are():
    model, photo = square_vit(), Image.fromarray(pixels(41, 53))
    images, picture = v.prepare_image(photo, model)
    torch.testing.assert_close(images[0], eval_transform(12, model.mean, model.std)(photo))
    assert picture.shape == (12, 12, 3)
    model.interpolation = "bicubic"
    bicubic, _ = v.prepare_image(photo, model)
    torch.testing.assert_close(bicubic[0], eval_transform(12, model.mean, model.std, "bicubic")(photo))
    assert not torch.allclose(bicubic, images, atol=0.01)
    images, picture = v.prepare_image(photo, vit())
    assert picture.shape == (*SIZE, 3)
    assert images.shape == (1, 3, *SIZE)


def test_a_tensor_is_shown_with_the_models_statistics():
    _, picture = v.prepare_image(torch.zeros(1, 3, 12, 12), square_vit())
    np.testing.assert_allclose(picture, np.broadcast_to([0.5, 0.4, 0.3], (12, 12, 3)), atol=1e-6)
    shown = v.as_picture(torch.ones(3, 2, 5), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.9))
    np.testing.assert_allclose(shown, np.broadcast_to([0.7, 0.65, 1.0], (2, 5, 3)), atol=1e-6)


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
    (None, "NoneType, which is no image"),
])
def test_what_is_no_image(image, text):
    with pytest.raises(InputError, match=text) as caught:
        v.prepare_image(image, vit())
    assert "\n" not in str(caught.value)


def test_a_model_of_another_number_of_channels():
    with pytest.raises(InputError, match="1 channels; expected 3"):
        v.prepare_image(pixels(), vit(in_channels=1))


# ---- Attention


def test_visualize_attention(tmp_path):
    model, image = square_vit().train(), pixels(12, 12)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "attention_map.png"
    figure = v.AttentionVisualizer(model, device="cpu").visualize_attention(
        image=image, layer_idx=-1, head_idx=None, save_path=path)
    assert isinstance(figure, Figure)
    assert Image.open(path).size == tuple(150 * figure.get_size_inches())
    assert "layer 2 (of 0 to 2), mean of 2 heads" in texts(figure)
    assert "attention weight of a patch" in texts(figure)
    images, picture = v.prepare_image(image, model)
    maps = attention_maps(model, images)  # (3, 1, 2, 10, 10)
    expected = maps[2, 0].mean(dim=0)[0, 1:].reshape(3, 3).numpy()
    shown, grid, _, smooth = data_of(figure)[:4]
    np.testing.assert_allclose(shown, picture, atol=1e-6)
    np.testing.assert_allclose(grid, expected, rtol=1e-6)
    np.testing.assert_allclose(smooth, expected, rtol=1e-6)
    assert f"of all weights: {maps[2, 0].mean(dim=0)[0, 1:].sum():.1%}" in texts(figure)
    model.eval()
    with torch.no_grad():
        probability, label = model(images).softmax(dim=1)[0].max(dim=0)
    assert f"predicted: {model.class_names[label]} ({probability:.0%})" in texts(figure)
    model.train()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_visualize_attention_keeps_the_mode():
    model = vit().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    figure = v.AttentionVisualizer(model, device="cpu").visualize_attention(torch.randn(1, 3, *SIZE), 1, -1)
    assert [module.training for module in model.modules()] == modes
    assert "layer 1 (of 0 to 2), head 1 (of 0 to 1)" in texts(figure)
    assert "predicted" not in texts(figure)
    assert data_of(figure)[1].shape == GRID


def test_all_heads_share_one_scale():
    model, image = vit(), pixels()
    figure = v.AttentionVisualizer(model, device="cpu").visualize_all_heads(image)
    grids = [drawn for panel in figure.axes for drawn in panel.images if drawn.get_array().shape == GRID]
    maps = attention_maps(model, v.prepare_image(image, model)[0])[:, 0, :, 0, 1:]  # (L, H, N - 1)
    assert len(grids) == 6
    for drawn, expected in zip(grids, maps.reshape(6, *GRID), strict=True):
        np.testing.assert_allclose(drawn.get_array(), expected)
        assert drawn.get_clim() == (0, pytest.approx(maps.max().item()))
    for word in ("layer 0", "layer 2", "head 1", "attention weight"):
        assert word in texts(figure)
    some = v.AttentionVisualizer(model, device="cpu").visualize_all_heads(image, layers=[-1])
    assert "layer 2" in texts(some)
    assert "layer 0" not in texts(some)


def test_attention_grid_of_several_images():
    model = square_vit()
    images = torch.randn(2, 3, 12, 12)
    figure = v.visualize_attention_grid(model, images)
    shown = data_of(figure)
    expected = attention_maps(model, images).mean(dim=2)[:, :, 0, 1:].reshape(3, 2, 3, 3)  # (L, B, rows, columns)
    for row in range(2):
        np.testing.assert_allclose(shown[4 * row], v.prepare_image(images[row], model)[1], atol=1e-6)
        for layer in range(3):
            np.testing.assert_allclose(shown[4 * row + 1 + layer], expected[layer, row])
    assert "layer 2" in texts(figure)
    with pytest.raises(InputError, match="no attention"):
        v.visualize_attention_grid(convnet(), images)


def test_attention_visualizer_refuses():
    with pytest.raises(InputError, match="ConvNet has no attention"):
        v.AttentionVisualizer(convnet())
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="'cuda' is not there"):
            v.AttentionVisualizer(vit(), device="cuda")
    visualizer = v.AttentionVisualizer(vit(), device="cpu")
    with pytest.raises(InputError, match="layer_idx 3"):
        visualizer.visualize_attention(pixels(), layer_idx=3)
    with pytest.raises(InputError, match="head_idx 2"):
        visualizer.visualize_attention(pixels(), head_idx=2)
    with pytest.raises(InputError, match="layer 7"):
        visualizer.visualize_all_heads(pixels(), layers=[7])


def test_the_call_of_the_introduction(tmp_path):
    image, model = torch.randn(1, 3, 224, 224), vit(img_size=224, patch_size=16, depth=1)
    v.AttentionVisualizer(model, device="cpu").visualize_attention(
        image=image, layer_idx=-1, head_idx=None, save_path=str(tmp_path / "attention_map.png"))
    figure = v.visualize_patch_embedding(image=image, patch_size=16, save_path=str(tmp_path / "patches.png"))
    assert (tmp_path / "attention_map.png").stat().st_size > 0
    assert (tmp_path / "patches.png").stat().st_size > 0
    assert "196 patches, each of 16 x 16 x 3 = 768 numbers" in texts(figure)


def test_visualize_positions():
    figure = v.visualize_positions(vit())
    assert len(data_of(figure)) == 6
    assert "cosine similarity" in texts(figure)
    for index, similarity in enumerate(data_of(figure)[:6]):
        assert similarity.argmax() == index
        assert similarity.max() == pytest.approx(1)
    with pytest.raises(InputError, match="no position embeddings"):
        v.visualize_positions(vit(position="none"))


# ---- Patches


def test_patches_are_those_of_the_image():
    array = pixels(14, 15)
    figure = v.visualize_patch_embedding(array, PATCH)
    shown = data_of(figure)
    np.testing.assert_allclose(shown[0], array / 255)
    assert len(shown) == 2 + 6
    for index, patch in enumerate(shown[2:]):
        row, column = divmod(index, 3)
        np.testing.assert_allclose(patch, array[7 * row:7 * row + 7, 5 * column:5 * column + 5] / 255)
    assert "6 patches, each of 7 x 5 x 3 = 105 numbers" in texts(figure)
    assert "all of them" in texts(figure)


def test_patch_figure_sizes():
    def size(*args, **kwargs):
        return data_of(v.visualize_patch_embedding(*args, **kwargs))[0].shape[:2]

    assert size(pixels(19, 23), 5) == (15, 20)  # two pixels cut above and below, one and two beside
    assert size(pixels(300, 400), 16) == (224, 224)
    assert size(pixels(300, 400), 16, img_size=(32, 48)) == (32, 48)
    np.testing.assert_allclose(data_of(v.visualize_patch_embedding(pixels(19, 23), 5))[0],
                               pixels(19, 23)[2:17, 1:21] / 255)
    for patch_size, text in ((20, "cut an image of 19x23 pixels into 0"), (0, "patch_size 0")):
        with pytest.raises(InputError, match=text):
            v.visualize_patch_embedding(pixels(19, 23), patch_size)
    with pytest.raises(InputError, match="into 50176"):
        v.visualize_patch_embedding(pixels(300, 400), 1)


# ---- Receptive fields


def test_compare_receptive_fields(tmp_path, monkeypatch):
    made = {"convnet_shapes": convnet(), "vit_nano_shapes": square_vit()}
    monkeypatch.setattr(v, "create_pretrained", made.__getitem__)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    figure = v.compare_receptive_fields()
    assert (tmp_path / "receptive_fields.png").stat().st_size > 0
    assert torch.equal(random_state, torch.get_rng_state())
    for word in ("ConvNet, untrained", "ConvNet, trained", "ViT, untrained", "ViT, trained", "pixels", "50%",
                 "90%", "after the stem", "after the patch embedding", "after stage 2 of 2",
                 "after block 3 of 3", "share"):
        assert word in texts(figure), word
    fields = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(fields) == 2 * 3 + 2 * 4
    assert len({field.get_clim() for field in fields}) == 1
    assert (~fields[6].get_array().mask).sum() == 4 * 4  # the ViT's first: one patch
    np.testing.assert_allclose([field.get_array().sum() for field in fields], 1)


def test_compare_receptive_fields_uses_the_models_given():
    model = square_vit()
    figure = v.compare_receptive_fields(save_path=None, models={"mine": model})
    assert "mine, untrained" in texts(figure)
    given = v.compare_receptive_fields(None, {"mine": model}, v.shapes_for(model, 32))
    for first, second in zip(data_of(figure), data_of(given), strict=True):
        np.testing.assert_array_equal(first, second)


def test_untrained_copy():
    model = square_vit()
    fresh = v.untrained_copy(model)
    assert fresh.config == model.config
    assert (fresh.mean, fresh.std) == (model.mean, model.std)
    torch.manual_seed(0)
    again = VisionTransformer(**vars(model.config))
    assert torch.equal(fresh.blocks[0].attn.qkv.weight, again.blocks[0].attn.qkv.weight)


def test_shapes_for_a_model():
    images = v.shapes_for(square_vit(), 2)
    assert images.shape == (2, 3, 12, 12)
    assert images[:, 0].max() <= 0.5 / 0.2 + 1e-6
    assert images[:, 0].min() >= -0.5 / 0.2 - 1e-6
    assert v.shapes_for(vit(), 2).shape == (2, 3, *SIZE)


# ---- A contact sheet


def test_plot_images():
    batch = torch.from_numpy(np.stack([pixels()] * 3)).permute(0, 3, 1, 2)
    figure = v.plot_images(batch, ["ant", "bee", 7], columns=2, title="sheet")
    assert len(data_of(figure)) == 3
    for shown in data_of(figure):
        np.testing.assert_allclose(shown, pixels() / 255)
    for word in ("ant", "bee", "7", "sheet"):
        assert word in texts(figure)
    for images, titles in (([], None), (batch, ["one"])):
        with pytest.raises(InputError, match=r"images and \d titles"):
            v.plot_images(images, titles)


# ---- Files


@pytest.mark.parametrize("name", ["missing/figure.png", "figure.xyz", "figure", "."])
def test_where_no_figure_can_be_saved(name, tmp_path):
    with pytest.raises(InputError, match="cannot save the figure") as caught:
        v.plot_images([pixels()], save_path=tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_no_global_state_of_pyplot():
    import matplotlib._pylab_helpers as helpers

    v.plot_images([pixels()])
    assert not helpers.Gcf.figs


def test_no_text_is_clipped():
    """All text lies on the page and is no smaller than 9 points."""
    photo, model = pixels(40, 40), square_vit()
    visualizer = v.AttentionVisualizer(model, device="cpu")
    figures = [visualizer.visualize_attention(photo), visualizer.visualize_all_heads(photo),
               v.AttentionVisualizer(vit(), device="cpu").visualize_all_heads(photo),
               v.visualize_attention_grid(model, torch.randn(2, 3, 12, 12)),
               v.visualize_positions(model), v.visualize_patch_embedding(photo, 4),
               v.compare_receptive_fields(None, {"ConvNet": convnet()}, torch.randn(3, 3, 12, 12)),
               v.plot_images([photo] * 3, ["a", "b", "c"], columns=2)]
    for figure in figures:
        assert_no_text_clipped(figure)


def test_a_model_that_reads_the_mean_is_said_to_look_with_its_patches():
    model = VisionTransformer(img_size=12, patch_size=4, embed_dim=12, depth=2, n_heads=3, n_classes=5, pool="mean")
    images = torch.randn(1, 3, 12, 12)
    figure = v.visualize_attention_grid(model, images)
    assert "Where patches look, on average" in texts(figure)
    expected = attention_maps(model, images).mean(dim=2)[:, 0, 1:, 1:].mean(dim=1).reshape(2, 3, 3)
    for layer in range(2):
        np.testing.assert_allclose(data_of(figure)[1 + layer], expected[layer], rtol=1e-5)
