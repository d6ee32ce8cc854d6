"""The look at a photograph has the numbers of the analysis; its panels describe them and fit the page."""

import numpy as np
import pytest
import torch
from figure_checks import assert_no_text_clipped, convnet, data_of, pixels, square_vit, texts, vit
from matplotlib import colormaps
from other_models import SWINS, timm_vit
from timm.models.deit import VisionTransformerDistilled

from vit_bridge.analysis.attention import attention_distance
from vit_bridge.analysis.capture import attention_maps
from vit_bridge.analysis.explanations import explain
from vit_bridge.data.images import prepare_image
from vit_bridge.plots import look as module
from vit_bridge.plots.look import describe, draw_look, draw_panel, look, panels_of, share_colours
from vit_bridge.preprocessing import Whole


def any_size(model):
    model.any_size = True
    return model


def test_look_has_the_numbers_of_the_analysis():
    model, picture = any_size(square_vit()), pixels(24, 12)
    found = look(model, picture, Whole(max_tokens=8))
    images, shown = prepare_image(picture, model, Whole(max_tokens=8))
    maps = attention_maps(model, images)[-1, 0]  # (H, N, N)
    assert found.grid == (4, 2)
    assert found.size == (24, 12)
    assert np.array_equal(found.picture, shown)
    assert np.allclose(found.heads, maps[:, 0, 1:].unflatten(1, (4, 2)).detach(), atol=1e-6)
    assert np.allclose(found.elsewhere, maps[:, 0, 0].detach(), atol=1e-6)
    assert np.allclose(found.distances, attention_distance(maps[None, None], (4, 2), (4, 4))[0], atol=1e-6)
    explained = explain(model, images, "relevance")
    assert np.allclose(found.explanation, explained.saliency[0], atol=1e-6)
    label, probability = found.likeliest()[0]
    assert label == model.preprocessing.class_names[explained.targets.item()]
    assert probability == pytest.approx(explained.probabilities.item(), abs=1e-6)
    assert found.norms.shape == found.artefacts.shape == (4, 2)


def test_look_at_a_convnet_has_stages_and_grad_cam_but_no_heads():
    model = convnet()
    found = look(model, pixels(12, 12))
    images, _ = prepare_image(pixels(12, 12), model)
    assert [stage.shape[:2] for stage in found.stages] == [(12, 12), (12, 12), (6, 6)]
    assert np.allclose(found.explanation, explain(model, images, "grad_cam").saliency[0], atol=1e-6)
    assert found.heads is None
    assert [panel.name for panel in panels_of(found)] == ["photograph", "colours", "explanation", "stages"]


def test_look_at_a_swin_has_stages_and_grad_cam():
    model = SWINS["ours"]()
    found = look(model, pixels(56, 56))
    images, _ = prepare_image(pixels(56, 56), model)
    assert [stage.shape[:2] for stage in found.stages] == [(14, 14), (14, 14), (7, 7), (4, 4)]
    assert np.allclose(found.explanation, explain(model, images, "grad_cam").saliency[0], atol=1e-6)
    strip = panels_of(found)[-1]
    assert strip.tiles[0].label == "patches: 14 × 14"
    assert strip.sentence.endswith("so it is shown patch by patch, in the page.")


def test_share_colours_makes_equal_features_equal_across_photographs_of_different_size():
    model = any_size(vit(img_size=12, patch_size=4))
    looks = [look(model, pixels(24, 12), Whole(8)), look(model, pixels(12, 24), Whole(8))]
    looks[1].features = looks[0].features.transpose(0, 1)
    share_colours(looks)
    assert looks[0].colours.shape == (4, 2, 3)
    assert np.allclose(looks[0].colours, looks[1].colours.transpose(1, 0, 2))
    assert "including across the 2 photographs" in panels_of(looks[0])[1].sentence


def test_describe_says_what_was_found_in_numbers():
    found = look(any_size(square_vit()), pixels(24, 12), Whole(max_tokens=8))
    found.heads = np.full((2, 4, 2), 0.1) * np.array([1, 0.5])[:, None, None]  # 80% and 40% go to patches
    found.distances = [3.0, 7.0]
    found.artefacts = np.eye(4, 2, dtype=bool)
    said = dict(describe(found, "mine"))
    assert said["Model"].startswith("mine: ")
    assert "3 blocks of 2 heads, patches of 4 × 4 pixels" in said["Model"]
    assert said["Photograph"] == ("24 × 12 pixels (height × width); the model sees 16 × 8: 4 × 2 = 8 patches; "
                                  "nothing is cut off or stretched")
    assert "CLS pays 40% of its attention to itself (20% to 60%, depending on the head)" in said["Attention"]
    assert "head 1 looks nearest, 3 pixels away on average, and head 2 farthest, 7 pixels" in said["Reach"]
    assert said["Artefacts"].startswith("25.0% of the patches (2)")
    assert said["Artefacts"].endswith(f"{found.norms.max() / np.median(found.norms):.1f} times the median")
    assert "edges are cut off" in dict(describe(found, "mine", cropped=True))["Photograph"]


def test_stretch_is_measured_along_either_side():
    found = look(any_size(square_vit()), pixels(10, 10), Whole(img_size=(8, 16)))
    assert found.stretch == pytest.approx(1.0)
    assert "stretched by 100.0%" in dict(describe(found, "m"))["Photograph"]


def test_panels_without_a_head_say_so():
    found = look(vit(n_classes=0), pixels())
    assert found.likeliest() == []
    assert panels_of(found)[3].title == "No class to explain"
    assert "no head" in texts(draw_look(found, "m"))
    assert dict(describe(found, "m"))["Prediction"] == "none: this model has no head"
    assert dict(describe(found, "m"))["Artefacts"].startswith("none found; the largest token norm is ")


def test_mean_pooling_is_named(monkeypatch):
    found = look(vit(pool="mean"), pixels())
    assert "the patches look, on average," in panels_of(found)[-1].title
    assert "the patches pay" in dict(describe(found, "m"))["Attention"]


def test_two_readers_pay_and_small_shares_are_not_none():
    found = look(timm_vit(VisionTransformerDistilled).eval(), pixels())
    found.heads = np.array([[[0.4, 0.599]], [[0.5, 0.50001]]])
    said = dict(describe(found, "m"))["Attention"]
    assert "CLS and the distillation token pay <1% of their attention to CLS and the distillation token" in said
    assert "(0% to <1%, depending on the head)" in said
    assert [tile.label for tile in panels_of(found)[-1].tiles] == ["head 1 (<1%)", "head 2 (0%)"]
    found.heads = found.heads[:1]
    assert "the distillation token and the rest to the patches" in dict(describe(found, "m"))["Attention"]


def test_artefacts_are_framed_and_their_share_is_said(monkeypatch):
    found = look(vit(), pixels())
    found.artefacts = np.array([[False, True, False], [False, False, False]])
    panel = panels_of(found)[2]
    assert panel.tiles[0].framed == [(0, 1)]
    assert "16.7%" in panel.sentence
    figure = draw_panel(panel, found, "m")
    frame, = figure.axes[0].patches
    assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (4.5, -0.5, 5.0, 7.0)


def test_coloured_marks_what_the_map_marks_and_leaves_the_rest_grey():
    picture = np.full((4, 4, 3), (1.0, 0.5, 0.0))
    coloured = module._coloured(picture, np.array([[1.0, 1.0], [0.0, 0.0]]))
    assert np.allclose(coloured[0], 0.75 * np.array(colormaps["viridis"](1.0)[:3]) + 0.25 * 0.5)
    assert np.allclose(coloured[-1], 0.5)


@pytest.mark.parametrize("shape", [(8, 40), (12, 12), (40, 8)])
@pytest.mark.parametrize("n_heads", [3, 12, 24])
def test_draw_look_shows_every_head_and_clips_no_text(shape, n_heads):
    torch.manual_seed(0)
    model = any_size(vit(img_size=12, patch_size=2, embed_dim=48, depth=1, n_heads=n_heads))
    found = look(model, pixels(*shape), Whole(max_tokens=20))
    figure = draw_look(found, "a model of a rather long name, fine-tuned for something (package)", "photo.jpg")
    assert_no_text_clipped(figure)
    assert len(data_of(figure)) == 4 + n_heads
    written = texts(figure)
    for head in range(n_heads):
        assert f"head {head + 1} (" in written
    boxes = [axes.get_position() for axes in figure.axes]
    boxes += [text.get_window_extent().transformed(figure.transFigure.inverted()) for text in figure.texts
              if text.get_text()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_grad_cam_that_is_blank_is_said_and_not_drawn(monkeypatch):
    def refuse(*_, **__):
        raise module.InputError("it is blank")

    monkeypatch.setattr(module, "explain", refuse)
    found = look(convnet(), pixels(12, 12))
    assert found.explanation is None
    assert panels_of(found)[2].sentence == "It is blank."
    assert dict(describe(found, "m"))["Explanation"] == "none: it is blank"


def test_crop_of_a_photograph_of_the_models_size_cuts_nothing():
    found = look(square_vit(), pixels(12, 12))
    assert "nothing is cut off" in dict(describe(found, "mine", cropped=True))["Photograph"]
    found.size = (24, 12)
    assert "only the centre" in dict(describe(found, "mine", cropped=True))["Photograph"]
