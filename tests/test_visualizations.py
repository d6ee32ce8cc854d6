"""Figures: every kind of image gives the same picture, every panel is labelled, nothing changes."""

import numpy as np
import pytest
import torch
from figure_checks import GRID, SIZE, assert_no_text_clipped, convnet, data_of, pixels, square_vit, texts, vit
from other_models import shared
from PIL import Image

import visualizations as v
from vit_bridge.analysis.attention import mean_distances
from vit_bridge.analysis.capture import capture
from vit_bridge.analysis.explanations import feature_colours
from vit_bridge.analysis.receptive_field import radius_holding, receptive_field, unit_centre, untrained_copy
from vit_bridge.analysis.selfcheck import Check
from vit_bridge.cli import script
from vit_bridge.models.convnext import ConvNeXt
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.models.swin import SwinTransformer
from vit_model import InputError, VisionTransformer


def test_visualize_positions_draws_cosine_similarities():
    figure = v.visualize_positions(vit())
    assert len(data_of(figure)) == 6
    assert "cosine similarity" in texts(figure)
    for index, similarity in enumerate(data_of(figure)[:6]):
        assert similarity.argmax() == index
        assert similarity.max() == pytest.approx(1)
    lowest = min(similarity.min() for similarity in data_of(figure)[:6])
    assert all(axes.images[0].get_clim() == (lowest, 1) for axes in figure.axes[:6])
    with pytest.raises(InputError, match="no position embeddings"):
        v.visualize_positions(vit(position="none"))


# ---- Patches


def test_visualize_patch_embedding_draws_the_images_patches():
    array = pixels(14, 15)
    figure = v.visualize_patch_embedding(array, (7, 5))
    shown = data_of(figure)
    np.testing.assert_allclose(shown[0], array / 255)
    assert len(shown) == 2 + 6
    for index, patch in enumerate(shown[2:]):
        row, column = divmod(index, 3)
        np.testing.assert_allclose(patch, array[7 * row:7 * row + 7, 5 * column:5 * column + 5] / 255)
    assert "6 patches, each of 7 x 5 x 3 = 105 numbers" in texts(figure)
    assert "all of them" in texts(figure)


def test_visualize_patch_embedding_crops_to_whole_patches():
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


def test_compare_receptive_fields_draws_untrained_and_trained_models(tmp_path, monkeypatch):
    made = {"convnet_shapes": convnet(), "vit_nano_shapes": square_vit()}
    monkeypatch.setattr(v, "load", made.__getitem__)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    figure = v.compare_receptive_fields()
    assert (tmp_path / "receptive_fields.png").stat().st_size > 0
    assert torch.equal(random_state, torch.get_rng_state())
    for word in ("ConvNet, untrained", "ConvNet, trained", "ViT, untrained", "ViT, trained", "pixels", "50%",
                 "90%", "after the stem", "after the patch embedding", "after stage 2 of 2",
                 "after block 3 of 3", "share of the gradient",
                 "Mean over 32 drawn shapes; ConvNet: convnet_shapes; ViT: vit_nano_shapes"):
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
    given = v.compare_receptive_fields(None, {"mine": model}, v._shapes_for(model, 32))
    assert "Mean over 32 images" in texts(given)
    assert "vit_nano" not in texts(given)
    for first, second in zip(data_of(figure), data_of(given), strict=True):
        np.testing.assert_array_equal(first, second)


def test_compare_receptive_fields_draws_other_libraries_trained_only(tmp_path):
    theirs, ours, images = shared("timm", tmp_path)
    figure = v.compare_receptive_fields(None, {"theirs": theirs}, images)
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel() and axes.images] == ["theirs, trained"]
    assert "after the patch embedding" in texts(figure)
    untrained, trained = (data_of(v.compare_receptive_fields(None, {"ours": ours}, images))[i:i + 4] for i in (0, 4))
    for shown, expected, other in zip(data_of(figure), trained, untrained, strict=False):
        np.testing.assert_allclose(shown.filled(0), expected.filled(0), rtol=1e-8)
        assert not np.allclose(shown.filled(0), other.filled(0))


def test_untrained_copy_keeps_the_config_with_fresh_weights():
    model = square_vit()
    fresh = untrained_copy(model)
    assert fresh.config == model.config
    assert fresh.preprocessing == model.preprocessing
    torch.manual_seed(0)
    again = VisionTransformer(**vars(model.config))
    assert torch.equal(fresh.blocks[0].attn.qkv.weight, again.blocks[0].attn.qkv.weight)


def test_shapes_for_fits_the_model():
    images = v._shapes_for(square_vit(), 2)
    assert images.shape == (2, 3, 12, 12)
    assert images[:, 0].max() <= 0.5 / 0.2 + 1e-6
    assert images[:, 0].min() >= -0.5 / 0.2 - 1e-6
    assert v._shapes_for(vit(), 2).shape == (2, 3, *SIZE)


@pytest.mark.parametrize(("models", "words"), [({}, "empty"), ([1], "a list"), (vit(), "a VisionTransformer")])
def test_compare_receptive_fields_refuses_models_without_names(models, words):
    with pytest.raises(InputError, match=rf"\Amodels is {words}; expected name -> trained model, [^\n]*\Z"):
        v.compare_receptive_fields(None, models)


@pytest.mark.parametrize("windowed", [True, False])
def test_compare_reach_draws_distances_and_radii(windowed):
    swin = SwinTransformer(img_size=12, patch_size=2, n_classes=5, embed_dim=4, depths=(2, 1), n_heads=(1, 2),
                           window_size=3)
    models = {"ConvNet": convnet(), "ViT": square_vit()} | (dict(Swin=swin) if windowed else {})
    images = torch.randn(2, 3, 12, 12)
    figure = v.compare_reach(models, images)
    distance, _, most = figure.axes
    lines = {line.get_label(): line for line in most.lines}
    assert list(lines) == [name for one in models for name in (one, f"{one}, untrained")]
    for depth, radius in enumerate(lines["ConvNet"].get_ydata(), start=1):
        field = receptive_field(models["ConvNet"], images, depth)
        assert radius == radius_holding(field, 0.9, unit_centre(models["ConvNet"], (12, 12), depth))
    np.testing.assert_allclose(lines["ViT"].get_xdata(), [2 / 3, 4 / 3, 2])
    means = [line for line in distance.lines if line.get_color() == lines["ViT"].get_color()
             and len(line.get_xdata()) == 3 and line.get_marker() == "o"]
    np.testing.assert_allclose(means[0].get_ydata(), mean_distances(models["ViT"], images).mean(dim=1))
    if windowed:
        swins = [line for line in distance.lines if line.get_color() == lines["Swin"].get_color()]
        np.testing.assert_allclose(swins[-1].get_xdata(), [0.25, 0.75, 1.5])
    assert_no_text_clipped(figure)
    with pytest.raises(InputError, match="models is empty"):
        v.compare_reach({}, images)


def test_compare_receptive_fields_takes_the_family():
    """The sum of the channels of a new LayerNorm is constant, so after ConvNeXt's stem it has no gradient."""
    options = dict(img_size=12, patch_size=2, n_classes=5, embed_dim=4, depths=(1, 1), n_heads=(1, 1), window_size=3)
    models = {"Swin": SwinTransformer(**options),
              "ConvNeXt": ConvNeXt(img_size=12, n_classes=5, widths=(4, 6), depths=(1, 1), stem_stride=2)}
    figure = v.compare_receptive_fields(None, models, torch.randn(2, 3, 12, 12))
    for words in ("after the patch embedding", "after stage 2 of 2", "Swin, untrained", "ConvNeXt, trained"):
        assert words in texts(figure)
    assert_no_text_clipped(figure)


# ---- A contact sheet


def test_plot_images_draws_images_with_titles():
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
    for image, words in ((pixels(), r"an array of shape \(14, 15, 3\)"), (pixels()[:, :, 0], "an array"),
                         ("a.png", "'a.png'")):
        with pytest.raises(InputError, match=rf"\Agot {words}[^\n]*, a single image; pass a list[^\n]*\Z"):
            v.plot_images(image)
    v.plot_images([pixels()], title="$\\x$").canvas.draw()  # as maths an error


# ---- Files


@pytest.mark.parametrize("name", ["missing/figure.png", "figure.xyz", "figure", "."])
def test_plot_images_says_when_it_cannot_save(name, tmp_path):
    with pytest.raises(InputError, match="cannot save the figure") as caught:
        v.plot_images([pixels()], save_path=tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_plot_images_leaves_no_pyplot_state():
    import matplotlib._pylab_helpers as helpers

    v.plot_images([pixels()])
    assert not helpers.Gcf.figs


def test_figures_clip_no_text():
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


# ---- What a model has learned


def test_visualize_patch_filters_draws_principal_components():
    figure = v.visualize_patch_filters(vit(), 9)
    assert len(data_of(figure)) == 9
    assert "the first 9 principal components" in texts(figure)
    assert_no_text_clipped(figure)
    with pytest.raises(InputError, match="not a projection of patches"):
        v.visualize_patch_filters(HybridCNNViT(embed_dim=22, depth=2, n_heads=2, img_size=12, patch_size=4))


@pytest.mark.parametrize("n_channels", [1, 2, 4, 5])
def test_visualize_patch_filters_takes_one_or_three_channels(n_channels):
    model = vit(in_channels=n_channels)
    if n_channels == 1:
        assert data_of(v.visualize_patch_filters(model, 1))[0].shape == (7, 5)
        return
    with pytest.raises(InputError, match=rf"\A[^\n]*have {n_channels} channels; expected 1 or 3[^\n]*patch_filters"):
        v.visualize_patch_filters(model)


def test_visualize_features_colours_several_images():
    model, images = vit(), torch.randn(4, 3, *SIZE)
    figure = v.visualize_features(model, images)
    shown, tokens = data_of(figure), capture(model, images).tokens
    for depth in (1, 2, 3):
        expected = feature_colours(tokens[depth][:, 1:].unflatten(1, GRID))  # (B, rows, columns, 3)
        np.testing.assert_allclose(shown[4 * depth:4 * depth + 4], expected, rtol=1e-5)
        assert figure.axes[4 * depth].get_ylabel() == f"after block {depth}\nof 3"
    assert [one.shape for one in shown] == [(*SIZE, 3)] * 4 + [(*GRID, 3)] * 12
    assert_no_text_clipped(figure)


@pytest.mark.slow
def test_attention_visualizer_runs_the_introduction_example(tmp_path):
    image, model = torch.randn(1, 3, 224, 224), vit(img_size=224, patch_size=16, depth=1)
    v.AttentionVisualizer(model, device="cpu").visualize_attention(
        image=image, layer_idx=-1, head_idx=None, save_path=str(tmp_path / "attention_map.png"))
    figure = v.visualize_patch_embedding(image=image, patch_size=16, save_path=str(tmp_path / "patches.png"))
    assert (tmp_path / "attention_map.png").stat().st_size > 0
    assert (tmp_path / "patches.png").stat().st_size > 0
    assert "196 patches, each of 16 x 16 x 3 = 768 numbers" in texts(figure)


# ---- The commands


def test_selfcheck_prints_what_holds(capsys):
    v.main(["selfcheck"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert all(line.startswith("holds: ") for line in lines)


def test_selfcheck_ends_with_1_where_something_does_not_hold(monkeypatch, capsys):
    monkeypatch.setattr(v, "selfcheck", lambda model, images: [Check("one", True, "0"), Check("two", False, "7")])
    with pytest.raises(SystemExit) as stop:
        v.main(["selfcheck"])
    assert stop.value.code == 1
    assert "DOES NOT HOLD: two (7)" in capsys.readouterr().out


def test_explore_writes_a_page(tmp_path, capsys):
    Image.fromarray(pixels(40, 50)).save(tmp_path / "photo.png")
    words = ["explore", str(tmp_path / "photo.png"), "--output", str(tmp_path / "page.html"), "--compare-with",
             "convnet_shapes"]
    v.main(words)
    assert "photo.png" in (tmp_path / "page.html").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert "page.html: " in said
    assert "MB; open it in any browser. Photographs are shown whole, in 7 x 9 patches. A model predicts" in said
    v.main([*words, "--max-tokens", "30"])
    said = capsys.readouterr().out
    assert "MB, replaces the earlier page; open it" in said
    assert "shown whole, in 5 x 6 patches" in said


def test_explore_shows_drawn_shapes_at_their_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(v, "load", lambda name: vit())
    v.main(["explore", "--n-images", "1", "--output", str(tmp_path / "page.html")])
    assert "Drawn shapes are shown in 2 x 3 patches. A model predicts" in capsys.readouterr().out


def test_explore_says_which_size_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(v, "load", lambda name, class_names: vit(img_size=32, patch_size=2, embed_dim=128))
    Image.fromarray(pixels(40, 50)).save(tmp_path / "photo.png")
    words = ["explore", str(tmp_path / "photo.png"), "--output", str(tmp_path / "page.html"), "--class-names", *"abcde"]
    v.main([*words, "--max-mb", "0.3"])
    said = capsys.readouterr().out
    assert said.startswith("To keep this page within 0.3 MB, its images have at most ")
    assert (tmp_path / "page.html").stat().st_size <= 0.3e6
    with pytest.raises(InputError, match="the size of its images is fixed"):
        v.main([*words, "--max-mb", "0.3", "--img-size", "32", "32"])
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(InputError, match="is not a page that explore wrote"):
        v.main(words)
    assert (tmp_path / "page.html").read_text() == "mine"


@pytest.mark.parametrize(("words", "expected"), [
    (["lok"], "no image file 'lok'"), (["explore", "nowhere.jpg"], "no image file 'nowhere.jpg'"),
    (["explore", "."], "'.' is a folder; use the path of an image file in it"),
    (["explore", "--pretrained", "convnet_shapes"], "ConvNet has no attention maps"),
    (["explore", "--max-mb", "0"], "--max-mb: 0 is out of range"),
    (["explore", "--n-images", "0"], "--n-images: 0 is out of range")])
def test_visualizations_reports_bad_options_in_one_line(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script(lambda: v.main(words))
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert expected in error
    assert list(tmp_path.iterdir()) == []
