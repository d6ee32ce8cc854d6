"""The page holds the numbers, states its error, is self-contained, and stays small."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from explorer_parts import (
    blob,
    data_of,
    fields_of,
    kept_maps,
    small_convnet,
    small_swin,
    uneven,
    vector,
    window_maps,
)
from figure_checks import pixels, square_vit, vit
from other_models import shared
from PIL import Image

from vit_bridge.analysis.capture import Attended, attention_maps, capture
from vit_bridge.analysis.explanations import explain
from vit_bridge.analysis.receptive_field import receptive_field
from vit_bridge.analysis.windows import capture_windows
from vit_bridge.data.images import prepare_image
from vit_bridge.models.adapters import adapt
from vit_bridge.models.swin import create_swin_tiny
from vit_bridge.plots import explorer
from vit_bridge.preprocessing import Preprocessing, Whole
from vit_model import InputError, create_vit_base

PAGE = explorer.PAGE.read_text(encoding="utf-8")
STYLE, SCRIPT = (PAGE.split(f"<{tag}>")[1].split(f"</{tag}>")[0] for tag in ("style", "script"))
BODY = re.split(r"\$[A-Z]+", PAGE.split("<body ")[1].split("<script")[0])  # what stands between the names
READY = Path(__file__).parents[2] / "benchmarks" / "figures" / "explorer.html"


def picture_in(uri):
    """Return the picture (H, W, 3), uint8, of a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def test_explore_page_holds_numbers_within_its_stated_error(tmp_path):
    model, images = square_vit(), [pixels(12, 12), pixels(40, 30)]
    page = explorer.explore(model, images, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page.html
    data = data_of(page)
    described = data["models"][0]
    assert (described["layers"], described["heads"], described["prefix"]) == (3, 2, ["CLS"])
    assert (data["bits"], page.bits) == (16, 16)
    worst = relative = 0
    for i, (image, part) in enumerate(zip(images, described["images"], strict=True)):
        fed = prepare_image(image, model)[0]
        maps = attention_maps(model, fed)[:, 0].numpy()
        found, rest = kept_maps(data, image=i)
        differences = np.abs(found - maps).max(axis=3)
        worst, relative = max(worst, differences.max()), max(relative, (differences / maps.max(axis=3)).max())
        sums = torch.logsumexp(model_scores(model, fed), dim=3).numpy()  # up to what all rows of a head may share
        np.testing.assert_allclose(np.diff(np.reshape(rest, (3, 2, 10))), np.diff(sums), atol=2e-4)
        for method in ("rollout", "relevance"):
            expected = explain(model, fed, method).saliency[0].flatten()
            np.testing.assert_allclose(vector(data, method, image=i), expected, rtol=1e-5, atol=1e-8)
        probabilities = model(fed).softmax(dim=1)[0].detach()
        assert part["target"] == model.preprocessing.class_names[probabilities.argmax()]
        assert part["lens"]["rows"][-1][0] == pytest.approx(probabilities.max().item(), abs=1e-4)
        assert len(part["lens"]["rows"]) == 4
    assert worst == pytest.approx(page.weight_error, rel=0.05)
    assert relative == pytest.approx(page.quantisation_error, rel=0.05)
    assert 0 < page.quantisation_error < 1 / 510
    assert f"by at most {100 * page.weight_error:.2g} percentage points" in page.html
    assert f"by at most {100 * page.quantisation_error:.2g}%, and" in page.html


def model_scores(model, fed):
    """(L, H, N, N), shifted as the page does it: the mean key of each head is taken off."""
    kept = capture(model, fed, keep=lambda block, attended: (attended.query[0], attended.key[0])).maps
    return torch.stack([query @ (key - key.mean(dim=1, keepdim=True)).mT for query, key in kept]).detach()


def keep(maps=None, query=None, key=None, bias=None, bits=8, readers=None):
    """Return (attention of one block as the page computes it, (H, N, N); its part; Kept)."""
    maps = (query @ key.mT + (0 if bias is None else bias)).softmax(dim=-1) if maps is None else maps
    kept = explorer.Kept(bits)
    part, kept.errors = explorer._keep_block(Attended(maps, query, key, bias), readers, kept)
    image = dict(rows=1, columns=maps.shape[-1], attention=dict(layers=[part]))
    data = dict(bits=bits, blobs=list(kept.blobs.texts), models=[dict(prefix=[], images=[image])])
    return kept_maps(data)[0][0], part, kept


def random_scores(heads=3, n=20, width=8, shift=0.0):
    torch.manual_seed(0)
    return [2 * torch.randn(1, heads, n, width) + shift for _ in range(2)]


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_keep_block_rounds_queries_and_keys_around_their_means(shift):
    query, key = random_scores(shift=shift)
    maps = (query.double() @ key.double().mT).softmax(dim=-1)[0].numpy()
    for bits, most in ((8, 0.2), (16, 1e-3)):
        found, _, kept = keep(torch.from_numpy(maps)[None], query.double(), key.double(), bits=bits)
        assert np.abs(found - maps).max() == pytest.approx(kept.weight_error, rel=1e-3)
        relative = (np.abs(found - maps).max(axis=2) / maps.max(axis=2)).flatten()
        np.testing.assert_allclose(kept.errors, relative, rtol=1e-2, atol=1e-6)
        assert kept.errors.max() < most  # also where a common vector is far larger than what differs


def test_keep_block_rounds_each_channel_to_its_own_step():
    query, key = random_scores()
    scale = torch.tensor([1e-3, 1e3, 1, 1, 1, 1, 1, 1e2])
    plain, scaled = (keep(None, query * by, key / by)[2].weight_error for by in (1, scale))
    assert scaled == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("shape", [(20, 20), (1, 1, 20, 20), (1, 3, 20, 20), (1, 1, 1, 20)])
def test_keep_block_keeps_a_bias(shape):
    query, key = random_scores()
    bias = 3 * torch.randn(shape) + 50
    bias.view(-1)[7] = -torch.inf  # a mask
    maps = (query @ key.mT + bias).softmax(dim=-1)[0]
    found, part, kept = keep(None, query, key, bias, bits=16)
    assert part["biased"] == (3 if shape == (1, 3, 20, 20) else 1)
    np.testing.assert_allclose(found, maps, atol=1e-3)
    assert (found[maps.numpy() == 0] == 0).all()
    assert 0 < kept.weight_error < 1e-3
    assert keep(None, query, key, bias)[2].weight_error > kept.weight_error  # of 8 bits


def test_keep_block_keeps_maps_that_are_no_product():
    query, key = random_scores()
    maps = (query @ key.mT).softmax(dim=-1)
    maps[0, 0, 0] = torch.eye(20)[3]
    found, part, _ = keep(maps, bits=16)
    assert (part["width"], part["biased"]) == (0, 3)
    np.testing.assert_allclose(found, maps[0], atol=1e-3)
    assert keep(maps)[2].errors.max() < 0.1


def test_keep_block_keeps_the_mean_row_and_column_where_the_head_reads_many():
    query, key = random_scores()
    maps = (query @ key.mT).softmax(dim=-1)[0]
    readers = torch.cat([torch.zeros(2), torch.full((18,), 1 / 18)])
    _, part, kept = keep(None, query, key, bits=16, readers=readers)
    floats = blob(dict(blobs=list(kept.blobs.texts)), part["floats"], "<f4")
    row, column = floats[-2 * 3 * 20:].reshape(2, 3, 20)
    np.testing.assert_allclose(row, maps[:, 2:].mean(dim=1), atol=1e-4)
    np.testing.assert_allclose(column, maps[:, :, 2:].mean(dim=2), atol=1e-4)


def test_bytes_round_to_the_nearest():
    matrices = torch.tensor([[[0.0, 0.5, 0.5], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]]])
    values, factors, error = explorer._bytes_of(matrices)
    np.testing.assert_allclose(values * factors, matrices, atol=0.5 / 510 + 1e-7)
    rows = (values * factors - matrices).abs() / matrices.amax(dim=2, keepdim=True)
    assert error == pytest.approx(rows.max().item(), abs=1e-6)
    assert explorer._bytes_of(torch.zeros(1, 3, 3))[0].isfinite().all()


def test_explore_shows_what_each_convnet_unit_sees():
    model, image = small_convnet(), prepare_image(pixels(12, 12), square_vit())[0]
    field = receptive_field(model, image, 2)  # of the unit in the middle, (12, 12)
    found = explorer._unit_fields(model, image, 2, (12, 12))
    rows = model.forward_features(image).shape[2]
    place = (rows // 2) * (12 // rows) + 12 // rows // 2
    np.testing.assert_allclose(found[place * 12 + place].view(12, 12), field, atol=1e-6)
    page = explorer.explore(square_vit(), pixels(12, 12), None, model, names=["A", "B"])
    data = data_of(page)
    vit_part, cnn = data["models"]
    assert (vit_part["kind"], cnn["kind"], cnn["depths"]) == ("vit", "cnn", ["the stem", "stage 1", "stage 2"])
    fields = fields_of(data, 1)
    sums = fields.sum(axis=2)
    assert (np.minimum(abs(sums - 1), sums) < 0.01).all()  # a unit that the ReLU has silenced sees nothing
    assert sums.mean() > 0.5


@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers", "timm, registers"])
def test_explore_of_other_libraries_matches_ours(name, tmp_path):
    theirs, ours, _ = shared(name, tmp_path)
    ours.preprocessing = adapt(theirs).preprocessing
    first, second = (data_of(explorer.explore(model.float(), pixels(15, 15), None)) for model in (theirs, ours))
    np.testing.assert_allclose(kept_maps(first)[0], kept_maps(second)[0], atol=1e-3)
    for name in ("rollout", "relevance"):
        b = vector(second, name)
        np.testing.assert_allclose(vector(first, name), b, atol=b.max() / 250)


def test_explore_takes_oblong_grids_mean_pooling_and_no_head():
    described = data_of(explorer.explore(vit(pool="mean"), pixels(), None))["models"][0]
    assert (described["images"][0]["rows"], described["images"][0]["columns"]) == (2, 3)
    assert (described["pool"], described["reads"]) == ("mean", None)
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
    assert "cropped and resized as required" in page.html
    page = explorer.explore(square_vit(), pixels(12, 12), None, second)
    one, = data_of(page)["pictures"][0]["pngs"]
    np.testing.assert_array_equal(picture_in(one), pixels(12, 12))
    assert "cropped and resized as required" not in page.html


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
    a, b = (kept_maps(data, 1)[0] if adapt(second).attends else fields_of(data, 1) for data in (from_tensor,
                                                                                               from_picture))
    np.testing.assert_allclose(a, b, atol=b.max() / 250)


def test_explore_takes_images_of_several_sizes_whole():
    model, photos = square_vit(), [pixels(40, 80), pixels(90, 30)]
    with pytest.raises(InputError, match="accepts only images of 12x12 pixels"):
        explorer.explore(model, photos, None, whole=Whole())
    model.any_size = True
    data = data_of(explorer.explore(model, [*photos, torch.zeros(3, 16, 8)], None, small_convnet(), whole=Whole()))
    grids = [(one["rows"], one["columns"]) for one in data["models"][0]["images"]]
    assert grids == [(2, 4), (3, 1), (4, 2)]
    for i, (photo, (rows, columns)) in enumerate(zip(photos, grids, strict=False)):
        fed = prepare_image(photo, model, Whole())[0]
        assert tuple(fed.shape[2:]) == (4 * rows, 4 * columns)
        np.testing.assert_allclose(kept_maps(data, image=i)[0], attention_maps(model, fed)[:, 0], atol=1e-4)
        assert picture_in(data["pictures"][i]["pngs"][0]).shape[:2] == (4 * rows, 4 * columns)
    first, second = (len(picture["pngs"]) for picture in data["pictures"][:2])
    assert (first, second) == (1, 2)  # the ConvNet sees them whole too, by pixels and not by patches
    assert picture_in(data["pictures"][1]["pngs"][1]).shape == (20, 7, 3)


def test_explore_keeps_large_pictures_as_jpeg():
    rng = np.random.default_rng(0)
    small, large = rng.random((60, 60, 3)), rng.random((200, 300, 3))
    assert explorer._as_uri(small).startswith("data:image/png")
    smooth = np.linspace(0, 1, 300)[None, :, None] * np.ones((400, 1, 3)) + 0.02 * rng.standard_normal((400, 300, 3))
    uri = explorer._as_uri(smooth.clip(0, 1))
    assert uri.startswith("data:image/jpeg")
    assert np.abs(picture_in(uri) / 255 - smooth.clip(0, 1)).mean() < 0.02
    assert explorer._as_uri(large).startswith("data:image/jpeg")


def test_explore_keeps_the_same_bytes_once():
    data = data_of(explorer.explore(square_vit(), [pixels(12, 12)] * 2, None))
    first, second = data["models"][0]["images"]
    assert first["attention"] == second["attention"]


# ---- A page that fits


def wide_vit(img_size=32):
    """Make a ViT whose page takes about 1.5 kB per patch in 8 bits."""
    model = vit(img_size=img_size, patch_size=2, embed_dim=128)
    model.any_size = True
    return model


def test_explore_uses_8_bits_for_a_large_page(monkeypatch):
    small = explorer.explore(wide_vit(), pixels(32, 32), None)
    monkeypatch.setattr(explorer, "FINE_UP_TO", len(small.html) - 1)
    large = explorer.explore(wide_vit(), pixels(32, 32), None)
    assert (small.bits, large.bits) == (16, 8)
    assert len(large.html) < 0.65 * len(small.html)
    assert small.quantisation_error < large.quantisation_error < 0.05
    assert "queries and keys of 8 bits" in large.html
    assert small.remarks == large.remarks == []
    fitted = explorer.explore(wide_vit(), pixels(32, 32), None, max_mb=len(small.html) / 1e6 - 0.001)
    assert fitted.html == large.html  # before there are fewer patches


def test_explore_takes_fewer_patches_for_max_mb():
    page = explorer.explore(wide_vit(), [pixels(32, 32), pixels(40, 80)], None, whole=Whole(), max_mb=0.3)
    assert 0.2e6 < len(page.html.encode()) <= 0.3e6
    grids = [one["rows"] * one["columns"] for one in data_of(page)["models"][0]["images"]]
    assert 16 < max(grids) < 256
    said, = page.remarks
    assert said == f"To keep this page within 0.3 MB, its images have at most {max(grids)} patches instead of 256."
    assert said in page.html


@pytest.mark.parametrize(("options", "words"), [
    (dict(whole=Whole(), max_mb=0.05), "more than max_mb 0.05, even with only 16 patches per image"),
    (dict(max_mb=0.3), "size of its images is fixed; set a larger max_mb, use fewer images, or use photographs with"),
    (dict(whole=Whole(img_size=32), max_mb=0.3), "the size of its images is fixed"),
    (dict(max_mb=0), "max_mb 0 is out of range"), (dict(max_mb="3"), "max_mb '3' is out of range"),
    (dict(max_mb=float("nan")), "max_mb nan is out of range")])
def test_explore_refuses_a_max_mb_that_cannot_be_kept(options, words, tmp_path):
    with pytest.raises(InputError, match=re.escape(words)):
        explorer.explore(wide_vit(), pixels(32, 32), tmp_path / "page.html", **options)
    assert not (tmp_path / "page.html").exists()


def test_explore_overwrites_nothing_but_pages(tmp_path):
    path = tmp_path / "page.html"
    first = explorer.explore(square_vit(), pixels(12, 12), path)
    second = explorer.explore(square_vit(), 255 - pixels(12, 12), path)
    assert path.read_text(encoding="utf-8") == second.html != first.html
    for content in (b"", b"<!doctype html><p>my own page", bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not a page that explore wrote, so it is not overwritten"):
            explorer.explore(square_vit(), pixels(12, 12), path)
        assert path.read_bytes() == content
    with pytest.raises(InputError, match="which is a folder; pass the name of a file in it"):
        explorer.explore(square_vit(), pixels(12, 12), tmp_path)


@pytest.mark.filterwarnings("ignore")  # torch.ao is to move
def test_explore_says_what_is_left_out():
    model = square_vit()
    torch.ao.quantization.quantize_dynamic(model.blocks, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    page = explorer.explore(model, pixels(12, 12), None)
    assert "relevance" not in data_of(page)["models"][0]["images"][0]
    said, = page.remarks
    assert said.startswith("Relevance is omitted: this VisionTransformer is quantised")
    assert said.split("; ")[0] in page.html


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
    swin = small_swin(img_size=12)
    torch.nn.init.constant_(swin.stages[0].blocks[0].attn.qkv.weight, value)
    for models in ((broken, None), (sound, broken), (sound, other), (swin, None), (sound, swin)):
        with pytest.raises(InputError, match=r"\Athis \w+ returns NaN or infinity for these images; [^\n]*\Z"):
            explorer.explore(models[0], pixels(12, 12), tmp_path / "page.html", models[1])
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(ValueError, match="not JSON compliant"):
        explorer.fill(dict(value=value), "", "")


def test_explore_page_displays_in_a_notebook(tmp_path, monkeypatch):
    page = explorer.explore(square_vit(), pixels(12, 12), None)
    frame = page._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert "<script" not in frame
    monkeypatch.setattr(explorer, "EMBED_UP_TO", len(page.html) - 1)
    assert "Set <code>save_path</code>" in page._repr_html_()
    monkeypatch.chdir(tmp_path)
    shown = explorer.explore(square_vit(), pixels(12, 12), "my page.html")._repr_html_()
    assert 'href="my page.html"' in shown
    assert '<iframe src="my page.html"' in shown
    assert len(shown) < 600


@pytest.mark.slow
def test_explore_keeps_vit_base_below_ten_megabytes():
    torch.manual_seed(0)
    page = explorer.explore(create_vit_base(n_classes=5), pixels(224, 224), None)
    assert len(page.html) < 10e6
    assert data_of(page)["models"][0]["images"][0]["rows"] == 14
    assert page.bits == 8  # with 16 it would have 10.09 MB


def test_explore_keeps_the_mean_row_of_a_few_patches_too():
    model = vit(img_size=12, patch_size=4, pool="mean")
    model.any_size = True
    data = data_of(explorer.explore(model, [pixels(40, 40), pixels(40, 120)], None, whole=Whole(max_tokens=3)))
    described = data["models"][0]
    assert [(one["rows"], one["columns"]) for one in described["images"]] == [(1, 1), (1, 3)]
    assert described["reads"] is None
    for i, n in enumerate((2, 4)):
        maps, rests = kept_maps(data, image=i)
        for own, rest in zip(maps, rests, strict=True):
            row, column = rest[-2 * 2 * n:].reshape(2, 2, n)
            np.testing.assert_allclose(row, own[:, 1:].mean(axis=1), atol=1e-5)
            np.testing.assert_allclose(column, own[:, :, 1:].mean(axis=2), atol=1e-5)


# ---- Swin Transformers

SWIN = dict(embed_dim=8, depths=(2, 3, 2))  # of stages with 1, 2 and 4 heads
SWINS = {
    "ours": small_swin,
    "timm": lambda: timm.models.SwinTransformer((36, 28), 2, window_size=4, num_classes=5, num_heads=(1, 2, 4), **SWIN),
    "torchvision": lambda: torchvision.models.SwinTransformer([2, 2], num_heads=[1, 2, 4], window_size=[4, 4],
                                                              num_classes=5, **SWIN),
    "transformers": lambda: transformers.SwinForImageClassification(transformers.SwinConfig(
        image_size=36, patch_size=2, window_size=4, num_labels=5, num_heads=(1, 2, 4), **SWIN)),
}


def swin_images(n=1, size=(36, 28)):
    return list(torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", SWINS)
def test_explore_page_holds_the_windows_of_a_swin_within_its_stated_error(name):
    model, images = uneven(SWINS[name]()), swin_images(2)
    page = explorer.explore(model, images, None)
    data = data_of(page)
    described = data["models"][0]
    assert (described["kind"], described["layers"], described["stages"]) == ("swin", 7, [2, 3, 2])
    assert (described["heads"], page.bits, page.grids) == (4, 8, [(18, 14)] * 2)
    worst = relative = 0
    for i, image in enumerate(images):
        blocks, logits = capture_windows(model, image[None])
        found, layers = window_maps(data, image=i), described["images"][i]["attention"]["layers"]
        for own, block, layer in zip(found, blocks, layers, strict=True):
            assert (layer["rows"], layer["columns"]) == block.size
            assert [layer["stage"], layer["window"], layer["shift"]] == [block.stage, *map(list, (block.window,
                                                                                                 block.shift))]
            maps = block.whole()[0].double().numpy()  # (H, N, N)
            differences = np.abs(own - maps).max(axis=2)
            worst, relative = max(worst, differences.max()), max(relative, (differences / maps.max(axis=2)).max())
            assert own.sum(axis=2) == pytest.approx(maps.sum(axis=2), abs=0.04)  # less than 1 where there is padding
        probabilities = logits.softmax(dim=1)[0]
        assert described["images"][i]["lens"]["rows"][0][0] == pytest.approx(probabilities.max().item(), abs=1e-4)
    assert {layer["rows"] for layer in layers} == {18, 9, 5}
    assert any(layer["shift"] != [0, 0] for layer in layers)
    assert worst == pytest.approx(page.weight_error, rel=0.05)
    assert relative == pytest.approx(page.quantisation_error, rel=0.05)
    assert 0 < page.quantisation_error < 1 / 509
    assert f"its error is at most {page.quantisation_error:.2%} of the largest weight in a row" in page.html
    assert "softmax(q kᵀ + bias)" not in page.html.split("<footer>")[1].split("</footer>")[0]


def test_explore_compares_a_swin_with_other_models():
    swin, image = small_swin(img_size=24), pixels(24, 24)
    other, cnn = vit(img_size=24, patch_size=8), small_convnet(img_size=24)
    pages = {}
    for first, second in ((swin, other), (other, swin), (swin, cnn), (swin, swin)):
        page = explorer.explore(first, image, None, second)
        data = data_of(page)
        pages[tuple(one["kind"] for one in data["models"])] = page
        for i, model in enumerate((first, second)):
            fed = prepare_image(image, model)[0]
            if model is swin:
                for own, block in zip(window_maps(data, i), capture_windows(swin, fed)[0], strict=True):
                    np.testing.assert_allclose(own, block.whole()[0], atol=1 / 509)
            elif model is other:
                np.testing.assert_allclose(kept_maps(data, i)[0], attention_maps(other, fed)[:, 0], atol=1e-4)
            else:
                assert fields_of(data, i).shape == (3, 64, 64)
    assert {kinds: page.bits for kinds, page in pages.items()} == {
        ("swin", "vit"): 16, ("vit", "swin"): 16, ("swin", "cnn"): 8, ("swin", "swin"): 8}
    for kinds, page in pages.items():
        assert ("softmax(q kᵀ + bias)" in page.html.split("<footer>")[1].split("</footer>")[0]) == ("vit" in kinds)
        assert ("Receptive fields of the ConvNet" in page.html) == ("cnn" in kinds)
        assert "Attention within windows is stored as bytes" in page.html


def test_explore_gives_a_model_of_another_kind_patches_in_proportion():
    swin, other, cnn = small_swin(img_size=24), vit(img_size=24, patch_size=8), small_convnet()  # 144 and 9 patches
    limits = [explorer._limit_for(*models, 64) for models in ((swin, swin), (other, swin), (swin, other), (cnn, swin))]
    assert limits == [64, 4, 1024, None]
    assert explorer._limit_for(other, swin, None) is None
    assert explorer._limit_for(other, swin, 3) == 1


def test_explore_shows_a_swin_images_of_other_sizes():
    model = small_swin()
    page = explorer.explore(model, [pixels(20, 20), pixels(50, 40)], None, whole=Whole(img_size=(20, 26)))
    assert page.grids == [(10, 13)] * 2
    for image, size in ((pixels(50, 40), (36, 28)), (swin_images(1, (14, 30))[0], (14, 30))):
        fed = prepare_image(image, model)[0]
        assert tuple(fed.shape[2:]) == size
        found = window_maps(data_of(explorer.explore(model, image, None)))
        for own, block in zip(found, capture_windows(model, fed)[0], strict=True):
            np.testing.assert_allclose(own, block.whole()[0], atol=1 / 509)


def test_explore_reduces_the_patches_of_a_swin_for_max_mb():
    model, photo = small_swin(), pixels(50, 40)
    fewer = explorer._with_fewer(Whole(), [model], [photo], used=252, size=0.2e6, most=0.1e6)
    assert fewer == Whole(max_tokens=124)
    with pytest.raises(InputError, match="the size of its images is fixed"):
        explorer.explore(model, photo, None, max_mb=0.03)
    with pytest.raises(InputError, match="the size of its images is fixed"):
        explorer.explore(uneven(SWINS["timm"]()), swin_images(), None, max_mb=0.03)


@pytest.mark.slow
def test_explore_keeps_swin_tiny_below_three_megabytes():
    page = explorer.explore(uneven(create_swin_tiny(5), 0.1), pixels(224, 224), None)
    assert len(page.html) < 3e6
    assert page.grids == [(56, 56)]


def test_explorer_ready_page_is_current_and_small():
    page = READY.read_text(encoding="utf-8")
    assert READY.stat().st_size < 3e6
    assert STYLE in page
    assert SCRIPT.split("$COLOURS")[1] in page
    assert all(part in page for part in BODY)


def test_explore_refuses_no_images_and_a_lone_convnet():
    with pytest.raises(InputError, match="no image to explore"):
        explorer.explore(square_vit(), [], None)
    with pytest.raises(InputError, match="ConvNet has no attention maps"):
        explorer.explore(small_convnet(), pixels(12, 12), None)
