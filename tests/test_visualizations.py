"""Figures: every accepted image gives the same picture, every panel is labelled, nothing is changed."""

import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
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


def texts(figure):
    """All that is written in a figure, its subfigures included."""
    return " | ".join(text.get_text() for text in figure.findobj(Text))


def data_of(figure):
    return [image.get_array() for axes in figure.axes for image in axes.images]


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


# ---- Curves, bars, contact sheets


def history(n=3):
    return dict(train_loss=[2.0, 1.0, 0.5][:n], val_loss=[2.1, 1.2, 0.9][:n], train_acc=[0.1, 0.4, 0.6][:n],
                val_acc=[0.1, 0.3, 0.5][:n], lr=[1e-3, 5e-4, 1e-4][:n], seconds=[1, 1, 1], images_per_second=[])


@pytest.mark.parametrize("n", [1, 3])
def test_plot_training_curves(n, tmp_path):
    figure = v.plot_training_curves(history(n), tmp_path / "curves.pdf", baseline=("linear classifier", 0.25))
    loss, accuracy, rate = figure.axes
    assert list(loss.lines[1].get_ydata()) == history(n)["val_loss"]
    assert list(accuracy.lines[0].get_ydata()) == pytest.approx([100 * share for share in history(n)["train_acc"]])
    assert list(accuracy.lines[2].get_ydata()) == [25, 25]
    assert list(rate.lines[0].get_ydata()) == history(n)["lr"]
    assert list(rate.lines[0].get_xdata()) == list(range(1, n + 1))
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    assert "linear classifier: 25.0%" in texts(figure)


@pytest.mark.parametrize("broken", [{}, dict(lr=[]), dict(val_acc=[0.1])])
def test_a_history_that_cannot_be_drawn(broken):
    with pytest.raises(InputError, match="lists of lengths"):
        v.plot_training_curves({**history(), **broken} if broken else {})


def test_plot_histories():
    figure = v.plot_histories({"ViT": history(), "CNN": history(2)})
    loss, accuracy = figure.axes
    assert list(loss.lines[0].get_ydata()) == history()["train_loss"]
    assert list(accuracy.lines[1].get_ydata()) == pytest.approx([10, 30])
    assert {"ViT", "CNN"} == {text.get_text() for text in accuracy.get_legend().get_texts()}
    for histories, text in (({}, "0 histories"), ({"ViT": {}}, "lists of lengths")):
        with pytest.raises(InputError, match=text):
            v.plot_histories(histories)


def test_plot_matrices():
    matrices = [torch.rand(3, 5), torch.rand(3, 5)]
    figure = v.plot_matrices(matrices, ["one", "two"], "share", xlabel="key", ylabel="query")
    for axes, matrix in zip(figure.axes, matrices, strict=False):
        np.testing.assert_allclose(axes.images[0].get_array(), matrix)
        assert axes.images[0].get_clim() == (0, pytest.approx(torch.stack(matrices).max().item()))
    for word in ("one", "two", "share", "key", "query"):
        assert word in texts(figure)
    with pytest.raises(InputError, match="2 matrices and 1 titles"):
        v.plot_matrices(matrices, ["one"], "share")


def test_plot_confusion():
    confusion = torch.tensor([[8, 2, 0], [0, 0, 0], [1, 3, 0]])
    figure = v.plot_confusion(confusion, ["ant", "a name of more than 18 letters", "$a_b$"], title="12 images")
    (shares,) = data_of(figure)[:1]
    np.testing.assert_allclose(shares, [[0.8, 0.2, 0], [0, 0, 0], [0.25, 0.75, 0]])
    axes = figure.axes[0]
    assert axes.images[0].get_clim() == (0, 1)
    places = {(int(text.get_position()[1]), int(text.get_position()[0])): text for text in axes.texts}
    assert {place: int(text.get_text()) for place, text in places.items()} == {
        (row, column): confusion[row, column].item() for row in range(3) for column in range(3)}
    assert (places[0, 0].get_color(), places[0, 1].get_color()) == ("black", "white")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["ant", "a name of more th…", "$a_b$"]
    for word in ("true class", "predicted class", "share", "12 images"):
        assert word in texts(figure)
    with pytest.raises(InputError, match=r"shape \(3, 3\) do not fit 2 class names"):
        v.plot_confusion(confusion, ["ant", "bee"])


@pytest.mark.parametrize(("n_classes", "n_counts", "n_names"), [(20, 400, 20), (21, 0, 21), (41, 0, 0), (1000, 0, 0)])
def test_plot_confusion_of_many_classes(n_classes, n_counts, n_names):
    figure = v.plot_confusion(torch.eye(n_classes, dtype=torch.int64), list(map(str, range(n_classes))))
    axes = figure.axes[0]
    assert (len(axes.texts), len(axes.get_xticks()), len(axes.get_yticks())) == (n_counts, n_names, n_names)


def test_plot_bars():
    figure = v.plot_bars({"parameters (millions)": {"ViT": 0.4596, "CNN": 0.481},
                          "accuracy (%)": {"CNN": (88.0, 86.5, 89.25), "ViT": (81.0, 80, 82)}}, title="both")
    first, second = figure.axes
    assert [bar.get_width() for bar in first.patches] == [0.4596, 0.481]
    assert first.patches[0].get_facecolor() == second.patches[1].get_facecolor()
    for word in ("0.460", "88.0 (86.5 to 89.2)", "parameters (millions)", "accuracy (%)", "both", "ViT"):
        assert word in texts(figure), word
    for panels in ({}, {"empty": {}}):
        with pytest.raises(InputError, match="hold no bars"):
            v.plot_bars(panels)


@pytest.mark.parametrize(("value", "text"), [(459562, "459,562"), (100, "100"), (81.25, "81.2"), (4.567, "4.57"),
                                             (0.1234, "0.123"), (0, "0.00")])
def test_short_number(value, text):
    assert v.short_number(value) == text


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
               v.plot_training_curves(history(), baseline=("linear classifier", 0.2)),
               v.plot_histories({"ViT": history()}),
               v.plot_matrices([torch.rand(7, 7)], ["attention of 7 tokens"], "share", "key", "query"),
               v.plot_bars({"accuracy (%)": {"a model of a long name": (88.0, 86.5, 89.25)}}),
               v.plot_confusion(torch.full((2, 2), 99_999), ["a name of more than 18 letters"] * 2),
               v.plot_confusion(torch.full((20, 20), 99_999), ["a name of more than 18 letters"] * 20),
               v.plot_images([photo] * 3, ["a", "b", "c"], columns=2)]
    for figure in figures:
        figure.savefig(io.BytesIO(), dpi=figure.dpi)  # lays it out
        page = figure.bbox.padded(1)
        panels = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label,
                                                            *axes.texts)]
        headings = [text for part in (figure, *figure.subfigs) for text in part.texts]
        for text in filter(Text.get_text, panels + headings):
            assert text.get_fontsize() >= 9, text.get_text()
            box = text.get_window_extent()
            assert page.contains(box.x0, box.y0), text.get_text()
            assert page.contains(box.x1, box.y1), text.get_text()


def test_a_model_that_reads_the_mean_is_said_to_look_with_its_patches():
    model = VisionTransformer(img_size=12, patch_size=4, embed_dim=12, depth=2, n_heads=3, n_classes=5, pool="mean")
    images = torch.randn(1, 3, 12, 12)
    figure = v.visualize_attention_grid(model, images)
    assert "Where patches look, on average" in texts(figure)
    expected = attention_maps(model, images).mean(dim=2)[:, 0, 1:, 1:].mean(dim=1).reshape(2, 3, 3)
    for layer in range(2):
        np.testing.assert_allclose(data_of(figure)[1 + layer], expected[layer], rtol=1e-5)
