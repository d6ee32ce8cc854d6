"""The page holds the numbers, says how far off they are, needs nothing but itself, and stays small."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from explorer_parts import data_of, small_convnet, unpacked
from figure_checks import pixels, square_vit, vit
from other_models import shared
from PIL import Image

from vit_bridge.analysis.capture import attention_maps
from vit_bridge.analysis.explanations import explain
from vit_bridge.analysis.receptive_field import receptive_field
from vit_bridge.data.images import prepare_image
from vit_bridge.models.adapters import adapt
from vit_bridge.plots import explorer
from vit_bridge.preprocessing import Preprocessing
from vit_model import InputError, create_vit_base

PAGE = explorer.PAGE.read_text(encoding="utf-8")
STYLE, SCRIPT = (PAGE.split(f"<{tag}>")[1].split(f"</{tag}>")[0] for tag in ("style", "script"))
BODY = PAGE.split("<body>")[1].split("<script")[0]
READY = Path(__file__).parents[2] / "benchmarks" / "figures" / "explorer.html"


def picture_in(uri):
    """The picture (H, W, 3), uint8, of a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def test_explore_page_holds_numbers_within_its_stated_error(tmp_path):
    model, images = square_vit(), [pixels(12, 12), pixels(40, 30)]
    page = explorer.explore(model, images, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page.html
    described = data_of(page)["models"][0]
    assert (described["layers"], described["heads"], described["tokens"], described["prefix"]) == (3, 2, 10, 1)
    worst = 0
    for image, part in zip(images, described["images"], strict=True):
        fed = prepare_image(image, model)[0]
        maps = attention_maps(model, fed)[:, 0].flatten(0, 1).numpy()
        worst = max(worst, np.abs(unpacked(part["attention"], 10) - maps).max())
        rolled = unpacked(part["rollout"], 10)[0]
        expected = explain(model, fed, "rollout").saliency[0].flatten()
        np.testing.assert_allclose(rolled[0, 1:], expected, atol=1 / 510 + 1e-6)
        saliency = explain(model, fed, "relevance").saliency[0].flatten().numpy()
        np.testing.assert_allclose(unpacked(part["relevance"], 10)[0][0, 1:], saliency, atol=saliency.max() / 250)
        probabilities = model(fed).softmax(dim=1)[0].detach()
        assert part["target"] == model.preprocessing.class_names[probabilities.argmax()]
        assert part["lens"]["rows"][-1][0] == pytest.approx(probabilities.max().item(), abs=1e-4)
        assert len(part["lens"]["rows"]) == 4
    assert 0 < worst <= page.quantisation_error + 1e-6 <= 1 / 509
    assert f"{page.quantisation_error:.2%} of the largest value" in page.html


def test_pack_rounds_to_the_nearest_byte():
    matrices = torch.tensor([[[0.0, 0.5, 0.5], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]]])
    packed, error = explorer._pack(matrices)
    np.testing.assert_allclose(unpacked(packed, 3), matrices, atol=0.5 / 510 + 1e-7)
    rows = np.abs(unpacked(packed, 3) - matrices.numpy()) / matrices.numpy().max(axis=2, keepdims=True)
    assert error == pytest.approx(rows.max(), abs=1e-6)
    assert np.isfinite(unpacked(explorer._pack(torch.zeros(1, 3, 3))[0], 3)).all()


def test_explore_shows_what_each_convnet_unit_sees():
    model, image = small_convnet(), prepare_image(pixels(12, 12), square_vit())[0]
    field = receptive_field(model, image, 2)  # of the unit in the middle, (12, 12)
    found = explorer._unit_fields(model, image, 2, (12, 12))
    rows = model.forward_features(image).shape[2]
    place = (rows // 2) * (12 // rows) + 12 // rows // 2
    np.testing.assert_allclose(found[place * 12 + place].view(12, 12), field, atol=1e-6)
    page = explorer.explore(square_vit(), pixels(12, 12), None, model, names=["A", "B"])
    vit_part, cnn = data_of(page)["models"]
    assert (vit_part["kind"], cnn["kind"], cnn["depths"]) == ("vit", "cnn", ["the stem", "stage 1", "stage 2"])
    fields = unpacked(cnn["images"][0]["attention"], 64)
    sums = fields.sum(axis=2)
    assert (np.minimum(abs(sums - 1), sums) < 0.01).all()  # a unit that the ReLU has silenced sees nothing
    assert sums.mean() > 0.5


@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers", "timm, registers"])
def test_explore_of_other_libraries_matches_ours(name, tmp_path):
    theirs, ours, _ = shared(name, tmp_path)
    ours.preprocessing = adapt(theirs).preprocessing
    first, second = (data_of(explorer.explore(model.float(), pixels(15, 15), None))["models"][0]
                     for model in (theirs, ours))
    n = first["tokens"]
    for key in ("attention", "rollout", "relevance"):
        a, b = (unpacked(one["images"][0][key], n) for one in (first, second))
        np.testing.assert_allclose(a, b, atol=b.max() / 250)


def test_explore_takes_oblong_grids_mean_pooling_and_no_head():
    described = data_of(explorer.explore(vit(pool="mean"), pixels(), None))["models"][0]
    assert (described["rows"], described["columns"], described["pool"]) == (2, 3, "mean")
    described = data_of(explorer.explore(vit(n_classes=0), pixels(), None))["models"][0]
    assert "relevance" not in described["images"][0]


def test_explore_page_needs_nothing_but_itself():
    page = explorer.explore(square_vit(), pixels(12, 12), None, title="<b>a & b</b>").html
    assert not re.search(r"(src|href)=.?(https?:)?//", page)
    assert not re.search(r"https?://|import\s*\(|fetch\s*\(|XMLHttpRequest", page)
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in page
    assert "$" not in SCRIPT.replace("$COLOURS", "")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_explore_works_with_gradients_switched_off(mode):
    model, image, other = square_vit(), prepare_image(pixels(12, 12), square_vit())[0][0], small_convnet()
    expected = [explorer.explore(model, image, None).html, explorer.explore(model, image, None, other).html]
    with mode():
        image = image.clone()  # in inference mode a tensor that gradients cannot go through
        assert [explorer.explore(model, image, None).html, explorer.explore(model, image, None, other).html] == expected
        assert torch.is_grad_enabled() is False


def test_explore_shows_each_model_its_own_picture():
    first, second, photo = vit(img_size=72, patch_size=24), small_convnet(), pixels(150, 150)
    page = explorer.explore(first, [photo, pixels(12, 12)], None, second)
    found = data_of(page)["pictures"][0]["pngs"]
    assert len(found) == 2  # above 64 pixels an eighth is cut off, below nothing
    for uri, model in zip(found, (first, second), strict=True):
        np.testing.assert_array_equal(picture_in(uri), np.round(255 * prepare_image(photo, model)[1]))
    assert "cut and resized as it needs it" in page.html
    page = explorer.explore(square_vit(), pixels(12, 12), None, second)
    one, = data_of(page)["pictures"][0]["pngs"]
    np.testing.assert_array_equal(picture_in(one), pixels(12, 12))
    assert "cut and resized as it needs it" not in page.html


@pytest.mark.parametrize("second", [small_convnet(), vit(img_size=12, patch_size=6)])
def test_explore_renormalises_a_tensor_for_the_second_model(second):
    first = square_vit()
    second.preprocessing = Preprocessing(12, [0.1, 0.2, 0.3], [0.6, 0.7, 0.8])
    tensor = prepare_image(pixels(12, 12), first)[0]
    from_tensor, from_picture = (data_of(explorer.explore(first, image, None, second))
                                 for image in (tensor, pixels(12, 12)))
    assert from_tensor["pictures"] == from_picture["pictures"]
    for one, other in zip(from_tensor["models"], from_picture["models"], strict=True):
        assert one["images"][0]["prediction"] == other["images"][0]["prediction"]
        np.testing.assert_allclose(one["images"][0]["lens"]["rows"], other["images"][0]["lens"]["rows"], atol=2e-4)
        a, b = (unpacked(part["images"][0]["attention"], part["tokens"]) for part in (one, other))
        np.testing.assert_allclose(a, b, atol=b.max() / 250)


def test_explore_refuses_mixed_sizes_but_takes_another_size():
    model, images = square_vit(), [torch.zeros(3, 12, 12), torch.zeros(3, 16, 8)]
    model.any_size = True
    with pytest.raises(InputError, match="VisionTransformer is given images of 12x12 and 16x8 pixels; expected one"):
        explorer.explore(model, images, None)
    described = data_of(explorer.explore(model, images[1:] * 2, None))["models"][0]
    assert (described["rows"], described["columns"], described["tokens"]) == (4, 2, 9)


def test_words_name_the_likeliest_of_all_classes():
    lens = torch.tensor([[0.05, 0.05, 0.0, 0.0, 0.0, 0.0, 0.1, 0.8], [0.3, 0.1, 0.08, 0.07, 0.26, 0.09, 0.06, 0.04]])
    words = explorer.words(lens, list("abcdefgh"))
    assert words["lens"]["says"] == ["h (80%)", "a (30%)"]  # h is none of the six
    assert words["lens"]["classes"] == ["a", "e", "b", "f", "c", "d"]
    assert words["lens"]["rows"] == [[0.05, 0.0, 0.05, 0.0, 0.0, 0.0], [0.3, 0.26, 0.1, 0.09, 0.08, 0.07]]
    assert (words["prediction"], words["target"]) == ("a (30%)", "a")
    assert explorer.words(lens[:1, :2], None)["lens"]["says"] == ["class 0 (5%)"]


def test_explore_escapes_names_in_the_script():
    model = square_vit()
    model.preprocessing = Preprocessing(12, class_names=["</script><b>"] * 5)
    page = explorer.explore(model, pixels(12, 12), None)
    assert page.html.count("</script>") == 2
    assert data_of(page)["models"][0]["images"][0]["target"] == "</script><b>"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_explore_refuses_nan_and_infinity(value, tmp_path):
    sound, broken, other = square_vit(), square_vit(), small_convnet()
    for model in (broken, other):
        torch.nn.init.constant_(next(model.parameters()), value)
    for models in ((broken, None), (sound, broken), (sound, other)):
        with pytest.raises(InputError, match=r"\Athis \w+ gives NaN or infinity for these images, [^\n]*\Z"):
            explorer.explore(models[0], pixels(12, 12), tmp_path / "page.html", models[1])
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(ValueError, match="not JSON compliant"):
        explorer.fill(dict(value=value), "", "")


def test_explore_page_displays_in_a_notebook():
    page = explorer.explore(square_vit(), pixels(12, 12), None)
    frame = page._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert "<script" not in frame


@pytest.mark.slow
def test_explore_keeps_vit_base_below_ten_megabytes():
    torch.manual_seed(0)
    page = explorer.explore(create_vit_base(n_classes=5), pixels(224, 224), None)
    assert len(page.html) < 10e6
    assert data_of(page)["models"][0]["tokens"] == 197


def test_explorer_ready_page_is_current_and_small():
    page = READY.read_text(encoding="utf-8")
    assert READY.stat().st_size < 2**20
    assert STYLE in page
    assert SCRIPT.split("$COLOURS")[1] in page
    assert BODY.split("$TITLE")[1].split("$NOTE")[0] in page


def test_explore_refuses_no_images_and_a_lone_convnet():
    with pytest.raises(InputError, match="no image to explore"):
        explorer.explore(square_vit(), [], None)
    with pytest.raises(InputError, match="ConvNet has no attention maps"):
        explorer.explore(small_convnet(), pixels(12, 12), None)
