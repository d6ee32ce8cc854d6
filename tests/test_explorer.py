"""The page holds the numbers, says how far off they are, needs nothing but itself, and stays small."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from figure_checks import pixels, square_vit, vit
from other_models import shared

import explorer
from cnn_model import ConvNet
from explanations import explain
from explorer_page import BODY, SCRIPT, STYLE
from measurements import receptive_field
from pictures import prepare_image, statistics_of
from recording import attention_maps
from vit_model import InputError, create_vit_base

READY = Path(__file__).parent.parent / "benchmarks" / "figures" / "explorer.html"


def data_of(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page.html, re.S)[1])


def unpacked(part, n):
    values = np.frombuffer(base64.b64decode(part["values"]), np.uint8).reshape(-1, n, n)
    return values * np.frombuffer(base64.b64decode(part["factors"]), "<f4").reshape(-1, n, 1).astype(float)


def small_convnet():
    torch.manual_seed(0)
    return ConvNet(img_size=12, n_classes=5, widths=(3, 5), depths=(1, 1), stem_stride=1)


def test_the_page_holds_the_numbers_to_the_error_that_it_states(tmp_path):
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
        np.testing.assert_allclose(rolled[0, 1:], explain(model, fed, "rollout").heat[0].flatten(), atol=1 / 510 + 1e-6)
        heat = explain(model, fed, "relevance").heat[0].flatten().numpy()
        np.testing.assert_allclose(unpacked(part["relevance"], 10)[0][0, 1:], heat, atol=heat.max() / 250)
        probabilities = model(fed).softmax(dim=1)[0].detach()
        assert part["target"] == model.class_names[probabilities.argmax()]
        assert part["lens"]["rows"][-1][0] == pytest.approx(probabilities.max().item(), abs=1e-4)
        assert len(part["lens"]["rows"]) == 4
    assert 0 < worst <= page.quantisation_error + 1e-6 <= 1 / 509
    assert f"{page.quantisation_error:.2%} of the largest value" in page.html


def test_bytes_are_as_near_as_they_can_be():
    matrices = torch.tensor([[[0.0, 0.5, 0.5], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]]])
    packed, error = explorer.pack(matrices)
    np.testing.assert_allclose(unpacked(packed, 3), matrices, atol=0.5 / 510 + 1e-7)
    rows = np.abs(unpacked(packed, 3) - matrices.numpy()) / matrices.numpy().max(axis=2, keepdims=True)
    assert error == pytest.approx(rows.max(), abs=1e-6)
    assert np.isfinite(unpacked(explorer.pack(torch.zeros(1, 3, 3))[0], 3)).all()


def test_a_convnet_beside_it_shows_what_each_unit_sees():
    model, image = small_convnet(), prepare_image(pixels(12, 12), square_vit())[0]
    field = receptive_field(model, image, 2)  # of the unit in the middle, (12, 12)
    found = explorer.unit_fields(model, image, 2, (12, 12))
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
def test_models_of_other_libraries(name, tmp_path):
    theirs, ours, _ = shared(name, tmp_path)
    ours.mean, ours.std = statistics_of(theirs)
    first, second = (data_of(explorer.explore(model.float(), pixels(15, 15), None))["models"][0]
                     for model in (theirs, ours))
    n = first["tokens"]
    for key in ("attention", "rollout", "relevance"):
        a, b = (unpacked(one["images"][0][key], n) for one in (first, second))
        np.testing.assert_allclose(a, b, atol=b.max() / 250)


def test_a_grid_that_is_no_square_a_mean_and_no_head():
    described = data_of(explorer.explore(vit(pool="mean"), pixels(), None))["models"][0]
    assert (described["rows"], described["columns"], described["pool"]) == (2, 3, "mean")
    described = data_of(explorer.explore(vit(n_classes=0), pixels(), None))["models"][0]
    assert "relevance" not in described["images"][0]


def test_the_page_needs_nothing_but_itself():
    page = explorer.explore(square_vit(), pixels(12, 12), None, title="<b>a & b</b>").html
    assert not re.search(r"(src|href)=.?(https?:)?//", page)
    assert not re.search(r"https?://|import\s*\(|fetch\s*\(|XMLHttpRequest", page)
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in page
    assert "$" not in SCRIPT.replace("$COLOURS", "")


def test_what_stands_in_a_name_cannot_end_the_script():
    model = square_vit()
    model.class_names = ["</script><b>"] * 5
    page = explorer.explore(model, pixels(12, 12), None)
    assert page.html.count("</script>") == 2
    assert data_of(page)["models"][0]["images"][0]["target"] == "</script><b>"


def test_a_notebook_shows_the_page():
    page = explorer.explore(square_vit(), pixels(12, 12), None)
    frame = page._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert "<script" not in frame


def test_base_at_224_pixels_stays_below_ten_megabytes():
    torch.manual_seed(0)
    page = explorer.explore(create_vit_base(n_classes=5), pixels(224, 224), None)
    assert len(page.html) < 10e6
    assert data_of(page)["models"][0]["tokens"] == 197


def test_the_ready_page_is_of_this_script_and_small():
    page = READY.read_text(encoding="utf-8")
    assert READY.stat().st_size < 2**20
    assert STYLE in page
    assert SCRIPT.split("$COLOURS")[1] in page
    assert BODY.split("$TITLE")[1].split("$NOTE")[0] in page


def test_nothing_to_explore_is_refused():
    with pytest.raises(InputError, match="no image to explore"):
        explorer.explore(square_vit(), [], None)
    with pytest.raises(InputError, match="ConvNet has no attention maps"):
        explorer.explore(small_convnet(), pixels(12, 12), None)
