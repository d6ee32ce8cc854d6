"""The page in a browser: every control and key, three widths, no errors. Skipped without Chromium."""

import base64
import io
import shutil
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from explorer_parts import data_of, kept_maps, small_convnet, vector
from figure_checks import pixels, square_vit, vit
from PIL import Image

import vit_model
from vit_bridge.analysis.capture import attention_maps
from vit_bridge.analysis.explanations import explain, logit_lens
from vit_bridge.data.images import prepare_image
from vit_bridge.plots.explorer import explore
from vit_bridge.preprocessing import Whole

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def marked(model):
    """Double the weights of a model, so that its attention is far from even."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(file, its data) of a page with two images and a ConvNet beside the ViT."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    return path, data_of(explore(marked(square_vit()), [pixels(12, 12), 255 - pixels(12, 12)], path, small_convnet()))


@pytest.fixture
def visit(chromium):
    """Return a function file -> opened page, and check that no page had an error or sent a request."""
    pages, errors = [], []

    def go(path):
        page = chromium.new_page(viewport=dict(width=1280, height=900))
        pages.append(page)
        page.on("console", lambda one: errors.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-state=ready]")
        return page

    yield go
    for page in pages:
        page.close()
    assert errors == []


@pytest.fixture
def opened(visit, written):
    return visit(written[0])


def said(page):
    return page.inner_text("#say")


def state(page):
    return page.evaluate("({...state})")


def headings(page):
    return page.locator("h2").all_inner_texts()


def canvas_of(page, number):
    """Return the pixels (H, W, 3), uint8, of a panel's view."""
    uri = page.evaluate(f"panels[{number}].view.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def test_explorer_starts_with_cls_in_the_last_block(opened, written):
    row = kept_maps(written[1])[0][2].mean(axis=0)[0, 1:]
    best = int(row.argmax())
    assert said(opened).startswith(f"CLS, the token that the head reads, looks most at row {best // 3}, column "
                                   f"{best % 3} ({100 * row[best]:.1f}%)")
    assert "in block 3 of 3, mean of 2 heads" in said(opened)


def test_explorer_shows_where_a_pointed_patch_looks(opened, written):
    box = opened.locator("canvas.view").first.bounding_box()
    opened.mouse.move(box["x"] + box["width"] * 5 / 6, box["y"] + box["height"] / 6)
    assert state(opened)["patch"] == 2
    row = kept_maps(written[1])[0][2].mean(axis=0)[3, 1:]
    assert f"The patch in row 0, column 2 looks most at row {row.argmax() // 3}" in said(opened)
    shown = opened.evaluate("[...shown(0, 2, -1, 2).values]")
    np.testing.assert_allclose(shown, row, atol=1e-6)


def test_explorer_shows_who_looks_at_a_patch(opened, written):
    opened.select_option("#direction", "to")
    opened.evaluate("change({patch: 7})")
    column = kept_maps(written[1])[0][0, 1, 1:, 8]
    np.testing.assert_allclose(opened.evaluate("[...shown(0, 0, 1, 7).values]"), column, atol=1e-5)
    assert "The patch in row 2, column 1 is looked at most by " in said(opened)


@pytest.mark.parametrize("method", ["rollout", "relevance"])
def test_explorer_shows_rollout_and_relevance(opened, written, method):
    opened.select_option("#method", method)
    expected = vector(written[1], method)
    np.testing.assert_allclose(opened.evaluate("[...shown(0, 0, -1, -1).values]"), expected, rtol=1e-5, atol=1e-6)
    assert {"rollout": "by rollout", "relevance": "evidence for the class"}[method] in said(opened)
    for control in ("#layer", "#head", "#direction", "#ends"):
        assert opened.is_disabled(control)
    assert opened.evaluate("byId('direction').selectedOptions[0].textContent") == "what reaches the output"
    opened.evaluate("change({patch: 5})")
    place = 1 + int((expected > expected[5]).sum())
    assert " The patch in row 1, column 2 contributes " in said(opened)
    assert said(opened).endswith(f", rank {place} of 9.")
    opened.keyboard.press("d")
    assert state(opened)["direction"] == "from"
    assert opened.is_hidden("canvas.strip >> nth=0")


def test_explorer_responds_to_every_control_and_key(opened):
    opened.locator("canvas.view").first.focus()
    seen = [said(opened)]
    for key, part in (("ArrowRight", dict(patch=4)), ("ArrowRight", dict(patch=5)), ("ArrowRight", dict(patch=5)),
                      ("ArrowUp", dict(patch=2)), ("ArrowUp", dict(patch=2)), ("ArrowLeft", dict(patch=1)),
                      ("ArrowDown", dict(patch=4)), ("c", dict(patch=-1)), ("[", dict(layer=1)), ("]", dict(layer=2)),
                      ("]", dict(layer=2)), (".", dict(head=0)), (".", dict(head=1)), (".", dict(head=1)),
                      (",", dict(head=0)), ("m", dict(method="rollout")), ("m", dict(method="relevance")),
                      ("m", dict(method="attention")), ("d", dict(direction="to")), ("d", dict(direction="from")),
                      ("n", dict(image=1)), ("n", dict(image=0))):
        opened.keyboard.press(key)
        assert state(opened) | part == state(opened), key
        seen.append(said(opened))
    assert len(set(seen)) > 10
    opened.select_option("#layer", index=0)
    opened.select_option("#head", index=2)  # after the mean
    assert "in block 1 of 3, head 2 of 2" in said(opened)
    opened.click("#images button >> nth=1")
    assert opened.get_attribute("#images button >> nth=1", "aria-pressed") == "true"
    opened.click("#reader")
    assert said(opened).startswith("CLS")


def test_explorer_strip_jumps_to_a_head(opened):
    box = opened.locator("canvas.strip").first.bounding_box()
    opened.locator("canvas.strip").first.click(position=dict(x=box["width"] * 0.75, y=box["height"] / 6))
    assert (state(opened)["layer"], state(opened)["head"]) == (0, 1)


def test_explorer_offers_numbers_and_labels_to_screen_readers(opened):
    opened.locator("article summary").first.click()
    rows = opened.locator("article details >> nth=0").locator("tbody tr")
    assert rows.count() == 9
    assert "row " in rows.first.inner_text()
    assert opened.get_attribute("#say", "aria-live") == "polite"
    assert "Arrow keys choose a patch" in opened.get_attribute("canvas.view >> nth=0", "aria-label")


def test_explorer_saves_the_view_as_an_image(opened):
    with opened.expect_download() as download:
        opened.click("#save")
    assert download.value.suggested_filename == "attention.png"
    saved = np.asarray(Image.open(download.value.path()).convert("RGB"))
    views = [canvas_of(opened, 0), canvas_of(opened, 1)]
    height, width = views[0].shape[:2]
    assert saved.shape[1] == 16 + 2 * (width + 16)
    for i, view in enumerate(views):
        left = 16 + i * (width + 16)
        np.testing.assert_array_equal(saved[36:36 + height, left:left + width], view)
        assert saved[:30, left:left + width].min() < 100  # its title
    assert saved[36 + height:].min() < 100  # what is said


def test_explorer_panels_show_their_own_pictures(visit, tmp_path):
    models, photo = [vit(img_size=72, patch_size=24), small_convnet()], pixels(150, 150)
    explore(models[0], photo, tmp_path / "page.html", models[1])
    page = visit(tmp_path / "page.html")
    page.evaluate("byId('opacity').value = 0; show()")
    for i, (model, k) in enumerate(zip(models, (7, 43), strict=True)):  # k pixels of the screen for each
        found = canvas_of(page, i)[k // 4::k, k // 4::k]  # where no line of the grid is
        rows = slice(0, found.shape[0] // 3)  # above the patch that is framed
        np.testing.assert_array_equal(found[rows], np.round(255 * prepare_image(photo, model)[1])[rows])


def test_explorer_handles_registers_mean_pooling_and_oblong_grids(visit, tmp_path):
    model = marked(vit(pool="mean", n_registers=2))  # 2 x 3 patches after 3 tokens
    explore(model, pixels(), tmp_path / "page.html")
    page, fed = visit(tmp_path / "page.html"), prepare_image(pixels(), model)[0]
    maps = attention_maps(model, fed)[:, 0].numpy()  # (L, H, N, N)
    for layer, head in ((2, None), (1, 0), (0, 1)):
        number = -1 if head is None else head
        found = page.evaluate(f"[...shown(0, {layer}, {number}, -1).values]")
        saliency = explain(model, fed, "attention", layer_idx=layer, head_idx=head).saliency[0].flatten()
        np.testing.assert_allclose(found, saliency, atol=2e-3 * saliency.max())
    before = maps[2].mean(axis=0)[3:, :3].mean(axis=0)
    np.testing.assert_allclose(page.evaluate("[...shown(0, 2, -1, -1).prefix]"), before, atol=1e-5)
    shares = f"{before[0]:.1%} goes to CLS and {before[1:].sum():.1%} to 2 registers"
    assert f"Of its attention, {shares}, not to patches." in said(page)
    np.testing.assert_allclose(page.evaluate("[...shown(0, 1, 0, 4).values]"), maps[1, 0, 7, 3:], atol=2e-3)
    page.evaluate("change({direction: 'to'})")
    np.testing.assert_allclose(page.evaluate("[...shown(0, 1, 0, -1).values]"), maps[1, 0, 3:, 3:].mean(axis=1),
                               atol=2e-3)
    assert said(page).endswith("Each value is the share of that patch’s attention that goes to a patch, on average.")
    page.evaluate("change({direction: 'from'})")
    for method in ("rollout", "relevance"):
        page.select_option("#method", method)
        saliency = explain(model, fed, method).saliency[0].flatten()
        values = page.evaluate("[...shown(0, 0, -1, -1).values]")
        np.testing.assert_allclose(values, saliency, atol=5e-3 * saliency.max())


def test_explorer_shows_the_logit_lens_of_the_model(opened, written):
    cells = [[cell.inner_text() for cell in row.locator("th, td").all()]
             for row in opened.locator("article >> nth=0").locator(".scroll table tr").all()]
    model = marked(square_vit())
    lens = logit_lens(model, prepare_image(pixels(12, 12), model)[0])[:, 0]
    order = lens[-1].argsort(descending=True).tolist()
    assert cells[0] == ["blocks passed", "prediction", *[model.preprocessing.class_names[i] for i in order]]
    assert len(cells) == 5
    for depth, (row, values) in enumerate(zip(cells[1:], lens, strict=True)):
        best = int(values.argmax())
        assert row[:2] == [str(depth), f"{model.preprocessing.class_names[best]} ({values[best]:.0%})"]
        np.testing.assert_allclose([int(cell[:-1]) for cell in row[2:]], 100 * values[order], atol=0.51)
    answer = opened.locator("article >> nth=1").locator(".scroll table tr").nth(1).locator("td").all_inner_texts()
    assert len(answer) == 6
    assert answer[0] == "probability"
    assert f"({answer[1]})" in headings(opened)[1]


def test_explorer_switches_between_light_and_dark(opened):
    colours = [opened.evaluate("getComputedStyle(document.body).backgroundColor")]
    opened.click("#theme")
    colours.append(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(set(colours)) == 2


@pytest.mark.parametrize("width", [390, 820, 1280])
def test_explorer_fits_every_window_width(opened, width):
    opened.set_viewport_size(dict(width=width, height=800))
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    view = opened.locator("canvas.view").first.bounding_box()
    assert view["x"] >= 0
    assert view["width"] > 250


@pytest.mark.parametrize("width", [320, 390])
def test_explorer_fits_long_names_in_narrow_windows(visit, tmp_path, width):
    model, long = square_vit(), "a_name_without_a_space" * 8
    model.preprocessing = replace(model.preprocessing, class_names=[long] * 5)
    explore(model, pixels(12, 12), tmp_path / "page.html", names=[f"/home/somebody/{long}.pt"], title=long)
    page = visit(tmp_path / "page.html")
    page.set_viewport_size(dict(width=width, height=800))
    for method in ("attention", "relevance"):
        page.select_option("#method", method)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert long in said(page)


def test_explorer_colours_each_patch_by_its_value(visit, tmp_path):
    explore(vit(), pixels(), tmp_path / "page.html")  # 2 x 3 patches, so that no swapped axis stays unseen
    page = visit(tmp_path / "page.html")
    page.evaluate("byId('opacity').value = 100; change({patch: -1, layer: 1, head: 0})")
    values = np.array(page.evaluate("[...shown(0, 1, 0, -1).values]"))
    view = canvas_of(page, 0)
    found = [view[int((i // 3 + 0.3) * view.shape[0] / 2), int((i % 3 + 0.3) * view.shape[1] / 3)] for i in range(6)]
    end = np.sort(values)[4]  # as charts.clip_at: the 99th percentile of six, the lower of the two beside it
    expected = matplotlib.colormaps["viridis"](np.minimum(values / end, 1))[:, :3] * 255
    assert page.inner_text(".scale span") == f"{end:.1%} and above (the largest is {values.max():.1%})"
    np.testing.assert_allclose(found, expected, atol=6)  # 64 colours
    assert len({tuple(colour) for colour in found}) > 2


@pytest.mark.parametrize(("ends", "expected"), [
    ("own", lambda ends: ends), ("layer", lambda ends: np.broadcast_to(ends.max(axis=1, keepdims=True), ends.shape)),
    ("all", lambda ends: np.full(ends.shape, ends.max()))])
def test_explorer_ends_the_colours_of_small_maps_where_it_says(opened, written, ends, expected):
    opened.select_option("#ends", ends)
    opened.evaluate("change({head: 0, layer: 1, patch: 5})")
    rows = kept_maps(written[1])[0][:, :, 6, 1:]  # (L, H, n)
    wanted = expected(np.sort(rows, axis=2)[:, :, 7])  # (L, H)
    assert opened.inner_text(".scale span").startswith(f"{wanted[1, 0]:.1%}")
    uri = opened.evaluate("panels[0].strip.toDataURL()")
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")).astype(float)
    k, width, height, left, top = opened.evaluate("Object.values(stripOf(main))")
    for layer in range(3):
        for head in range(2):
            y, x = (top + layer * height + 1 + k // 2 + k * np.arange(3), left + head * width + 1 + k // 2
                    + k * np.arange(3))
            found = strip[np.ix_(y, x)].reshape(9, 3)
            colours = matplotlib.colormaps["viridis"](np.minimum(rows[layer, head] / wanted[layer, head], 1))
            np.testing.assert_allclose(found, colours[:, :3] * 255, atol=6)


BIAS = 2 * torch.randn(1, 2, 10, 10, generator=torch.Generator().manual_seed(0))
BIAS[:, :, :, 4] = -torch.inf  # a mask


@pytest.mark.parametrize("attend", [
    lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=BIAS[:, :, :q.shape[2]]),
    lambda q, k, v: (q @ k.mT / q.shape[-1]**0.5 + BIAS[:, :, :q.shape[2]]).softmax(dim=-1) @ v])
def test_explorer_computes_rows_with_a_bias(visit, tmp_path, monkeypatch, attend):
    monkeypatch.setattr(vit_model, "attend", lambda q, k, v, return_attention=False, bias=None: (
        attend(q, k, v), None))
    model = marked(square_vit())
    explore(model, pixels(12, 12), tmp_path / "page.html")
    maps = attention_maps(model, prepare_image(pixels(12, 12), model)[0])[:, 0].numpy()
    assert (maps[..., 4] == 0).all()
    page = visit(tmp_path / "page.html")
    for layer, head, patch in ((0, 0, 2), (2, 1, 8)):
        for direction, expected in (("from", maps[layer, head, 1 + patch]), ("to", maps[layer, head, :, 1 + patch])):
            page.evaluate(f"change({{direction: '{direction}'}})")
            found = page.evaluate(f"[...shown(0, {layer}, {head}, {patch}).values]")
            np.testing.assert_allclose(found, expected[1:], atol=1e-3)


def test_explorer_shows_images_of_several_sizes(visit, tmp_path):
    model, photos = marked(square_vit()), [pixels(40, 80), pixels(90, 30)]
    model.any_size = True
    explore(model, photos, tmp_path / "page.html", whole=Whole())
    page = visit(tmp_path / "page.html")
    page.evaluate("change({patch: 7, kept: true})")  # of 2 x 4: the last
    for photo in photos:
        fed = prepare_image(photo, model, Whole())[0]
        rows, columns = (side // 4 for side in fed.shape[2:])
        assert page.inner_text(".facts") == f"{rows} rows and {columns} columns of patches of 4 × 4 pixels"
        view = canvas_of(page, 0)
        assert abs(view.shape[0] / view.shape[1] - rows / columns) < 0.01
        assert state(page)["patch"] == rows * columns - 1  # at the same place of the next
        expected = attention_maps(model, fed)[2, 0].mean(dim=0)[-1, 1:]
        np.testing.assert_allclose(page.evaluate(f"[...shown(0, 2, -1, {rows * columns - 1}).values]"), expected,
                                   atol=1e-4)
        page.set_viewport_size(dict(width=820, height=600))
        assert page.locator("canvas.view").bounding_box()["height"] <= 0.86 * 600
        page.keyboard.press("n")


def test_explorer_says_what_a_browser_lacks(chromium, written):
    page = chromium.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(written[0].as_uri())
    page.wait_for_function("byId('say').textContent.includes('DecompressionStream; use Chrome or Edge 80')")
    assert page.is_hidden("#controls")
    page.close()


def test_explorer_says_that_a_file_is_cut_off(chromium, written, tmp_path):
    text = written[0].read_text(encoding="utf-8")
    for length in (len(text) // 3, text.index('application/json">') + 5000):
        (tmp_path / "cut.html").write_text(text[:length], encoding="utf-8")
        page = chromium.new_page()
        page.goto((tmp_path / "cut.html").as_uri())
        assert "If this line stays, the file is incomplete" in said(page)
        assert page.is_hidden("#controls")
        page.close()


def test_explorer_click_keeps_a_patch_until_the_next(opened):
    view = opened.locator("canvas.view").first
    box = view.bounding_box()
    at = [(box["x"] + box["width"] * (i + 0.5) / 3, box["y"] + box["height"] / 2) for i in range(3)]
    opened.mouse.click(*at[0])
    opened.mouse.move(*at[2])
    assert state(opened)["patch"] == 3
    opened.mouse.click(*at[0])
    opened.mouse.move(*at[2])
    assert state(opened)["patch"] == 5


def test_explorer_forgets_an_unclicked_patch_with_the_pointer(opened):
    view = opened.locator("canvas.view").first
    box = view.bounding_box()
    inside, outside = (box["x"] + box["width"] / 6, box["y"] + box["height"] / 2), (box["x"] + 5, box["y"] - 30)
    opened.mouse.move(*inside)
    assert state(opened)["patch"] == 3
    opened.mouse.move(*outside)
    assert state(opened)["patch"] == -1
    assert said(opened).startswith("CLS")
    opened.mouse.click(*inside)
    opened.mouse.move(*outside)
    assert (state(opened)["patch"], state(opened)["kept"]) == (3, True)
    opened.mouse.click(*inside)
    assert (state(opened)["patch"], state(opened)["kept"]) == (-1, False)


def test_explorer_accepts_brackets_typed_with_modifier_keys(opened):
    press = """options => document.body.dispatchEvent(new KeyboardEvent('keydown', {bubbles: true, ...options}))"""
    opened.evaluate(press, dict(key="[", ctrlKey=True, altKey=True, modifierAltGraph=True))  # Windows
    assert state(opened)["layer"] == 1
    opened.evaluate(press, dict(key="[", modifierAltGraph=True))  # Linux
    assert state(opened)["layer"] == 0
    opened.evaluate(press, dict(key="]", altKey=True))  # a Mac
    assert state(opened)["layer"] == 1
    for held in ("ctrlKey", "metaKey"):
        opened.evaluate(press, {"key": "[", held: True})
    for held in ("ctrlKey", "metaKey", "altKey"):
        opened.evaluate(press, {"key": "d", held: True})
    assert (state(opened)["layer"], state(opened)["direction"]) == (1, "from")


def test_explorer_compares_two_vits_one_without_a_head(visit, tmp_path):
    first, second = square_vit(), vit(img_size=12, patch_size=6, n_classes=0)
    explore(first, pixels(12, 12), tmp_path / "page.html", second, names=["A", "B"])
    page = visit(tmp_path / "page.html")
    assert page.evaluate("methods") == ["attention", "rollout"]
    page.evaluate("change({patch: 8})")  # of 3 x 3: the last; of 2 x 2 too
    assert page.evaluate("placeIn(DATA.models[1])") == 3
    assert headings(page)[1].startswith("B; block 3 of 3, mean of 2 heads")
    assert page.is_hidden("#depth")
    for i, expected in ((0, True), (1, False)):
        panel = page.locator("article").nth(i)
        assert panel.get_by_text("logit lens").is_visible() is expected
        assert panel.locator(".scroll table").is_visible() is expected
    for key in "mmddcn":
        page.keyboard.press(key)


def test_explorer_reaches_every_layer_and_head_of_both_models(visit, tmp_path):
    first = vit(img_size=12, patch_size=4, depth=2)
    second = vit(img_size=12, patch_size=4, depth=4, embed_dim=24, n_heads=3)
    explore(first, pixels(12, 12), tmp_path / "page.html", second, names=["A", "B"])
    page = visit(tmp_path / "page.html")
    assert [page.locator(f"#{id} option").count() for id in ("layer", "head")] == [4, 4]
    assert page.locator("#layer option").all_inner_texts() == [f"{block} of 4" for block in (1, 2, 3, 4)]
    assert page.locator("#head option").all_inner_texts()[1:] == ["1", "2", "3"]
    assert page.locator("#head option").first.inner_text() == "mean of all"
    page.select_option("#layer", index=3)
    page.select_option("#head", index=3)  # after the mean
    assert [one.split("; ")[-1] for one in headings(page)] == ["block 2 of 2, head 2 of 2", "block 4 of 4, head 3 of 3"]
    seen = []
    for key in "[[[[]]]]],,,,...":
        page.keyboard.press(key)
        seen.append((state(page)["layer"], state(page)["head"]))
    assert seen == [(2, 2), (1, 2), (0, 2), (0, 2), (1, 2), (2, 2), (3, 2), (3, 2), (3, 2),
                    (3, 1), (3, 0), (3, -1), (3, -1), (3, 0), (3, 1), (3, 2)]
    assert page.input_value("#layer") == "3"
    assert page.input_value("#head") == "2"
    assert "a model with fewer shows its last one" in page.inner_text("footer")


def test_explorer_reaches_every_depth_of_a_deeper_convnet(visit, tmp_path):
    explore(vit(img_size=12, patch_size=4, depth=1), pixels(12, 12), tmp_path / "page.html", small_convnet())
    page = visit(tmp_path / "page.html")
    depths = [headings(page)[1].split("after ")[-1]]
    for key in "[[]":
        page.keyboard.press(key)
        depths.append(headings(page)[1].split("after ")[-1])
    assert depths == ["stage 2", "stage 1", "the stem", "stage 1"]


@pytest.mark.parametrize("method", ["rollout", "relevance"])
def test_explorer_keys_change_convnet_depth_under_every_method(opened, method):
    opened.select_option("#method", method)
    opened.locator("canvas.view").first.focus()
    for key, end in (("[", "stage 1"), ("[", "the stem"), ("[", "the stem"), ("]", "stage 1")):
        opened.keyboard.press(key)
        assert headings(opened)[1].endswith("after " + end)
    assert state(opened)["layer"] == 2
    opened.select_option("#depth", "2")
    assert headings(opened)[1].endswith("after stage 2")
    opened.select_option("#depth", "-1")
    opened.select_option("#method", "attention")
    opened.select_option("#depth", "0")
    assert (state(opened)["layer"], state(opened)["depth"]) == (2, 0)
    opened.select_option("#layer", index=1)
    assert headings(opened)[1].endswith("after stage 1")
    assert opened.input_value("#depth") == "-1"


def test_explorer_chooses_convnet_depth_separately(opened):
    opened.select_option("#method", "relevance")
    box = opened.locator("canvas.strip").nth(1).bounding_box()
    opened.locator("canvas.strip").nth(1).click(position=dict(x=box["width"] / 2, y=box["height"] / 6))
    assert state(opened)["method"] == "relevance"
    assert headings(opened)[1].endswith("after the stem")


def test_explorer_names_the_convnet_unit_shown(opened):
    assert "what the unit in the middle (row" in headings(opened)[1]
    opened.locator("canvas.view").first.focus()
    opened.keyboard.press("ArrowRight")
    assert "what the unit at this position sees" in headings(opened)[1]
    opened.keyboard.press("d")
    assert "which units see the chosen position" in headings(opened)[1]
