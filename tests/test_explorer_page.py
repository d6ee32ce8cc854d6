"""The page in a browser: every control, the keys, three widths, no errors. Without Chromium and Playwright: skipped."""

import shutil

import matplotlib
import numpy as np
import pytest
import torch
from figure_checks import pixels, square_vit, vit
from test_explorer import data_of, small_convnet, unpacked

from explorer import explore

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(file, its data) of a page with two images and a ConvNet beside the ViT."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    model = square_vit()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return path, data_of(explore(model, [pixels(12, 12), 255 - pixels(12, 12)], path, small_convnet()))


@pytest.fixture
def opened(chromium, written):
    page, errors = chromium.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
    page.goto(written[0].as_uri())
    page.wait_for_function("document.getElementById('say').textContent.length > 20")
    yield page
    assert errors == []
    page.close()


def said(page):
    return page.inner_text("#say")


def state(page):
    return page.evaluate("({...state})")


def test_it_begins_with_what_the_head_reads_in_the_last_layer(opened, written):
    part = written[1]["models"][0]["images"][0]["attention"]
    row = unpacked(part, 10)[4:6].mean(axis=0)[0, 1:]
    best = int(row.argmax())
    assert said(opened).startswith(f"CLS, the token that the head reads, looks most at row {best // 3}, column "
                                   f"{best % 3} ({100 * row[best]:.1f}%)")
    assert "in layer 2, mean of 2 heads" in said(opened)


def test_pointing_at_a_patch_shows_where_it_looks(opened, written):
    box = opened.locator("canvas.view").first.bounding_box()
    opened.mouse.move(box["x"] + box["width"] * 5 / 6, box["y"] + box["height"] / 6)
    assert state(opened)["patch"] == 2
    row = unpacked(written[1]["models"][0]["images"][0]["attention"], 10)[4:6].mean(axis=0)[3, 1:]
    assert f"The patch in row 0, column 2 looks most at row {row.argmax() // 3}" in said(opened)
    shown = opened.evaluate("[...shown(0, 2, -1, 2).values]")
    np.testing.assert_allclose(shown, row, atol=1e-6)


def test_who_looks_at_a_patch_is_a_column(opened, written):
    opened.select_option("#direction", "to")
    opened.evaluate("change({patch: 7})")
    column = unpacked(written[1]["models"][0]["images"][0]["attention"], 10)[1][1:, 8]
    np.testing.assert_allclose(opened.evaluate("[...shown(0, 0, 1, 7).values]"), column, atol=1e-6)
    assert "The patch in row 2, column 1 is looked at most by " in said(opened)


@pytest.mark.parametrize("method", ["rollout", "relevance"])
def test_the_other_methods(opened, written, method):
    opened.select_option("#method", method)
    expected = unpacked(written[1]["models"][0]["images"][0][method], 10)[0][0, 1:]
    np.testing.assert_allclose(opened.evaluate("[...shown(0, 0, -1, -1).values]"), expected, rtol=1e-5, atol=1e-6)
    assert {"rollout": "by rollout", "relevance": "speaks for"}[method] in said(opened)
    assert opened.is_disabled("#layer")
    assert opened.is_hidden("canvas.strip >> nth=0")


def test_every_control_and_key_changes_what_is_said(opened):
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
    opened.select_option("#layer", "0")
    opened.select_option("#head", "1")
    assert "in layer 0, head 1" in said(opened)
    opened.click("#images button >> nth=1")
    assert opened.get_attribute("#images button >> nth=1", "aria-pressed") == "true"
    opened.click("#reader")
    assert said(opened).startswith("CLS")


def test_the_strip_jumps_to_a_head(opened):
    box = opened.locator("canvas.strip").first.bounding_box()
    opened.locator("canvas.strip").first.click(position=dict(x=box["width"] * 0.75, y=box["height"] / 6))
    assert (state(opened)["layer"], state(opened)["head"]) == (0, 1)


def test_the_numbers_are_there_for_those_who_do_not_see_the_picture(opened):
    opened.locator("summary").first.click()
    rows = opened.locator("details >> nth=0").locator("tbody tr")
    assert rows.count() == 9
    assert "row " in rows.first.inner_text()
    assert opened.get_attribute("#say", "aria-live") == "polite"
    assert "Arrow keys choose a patch" in opened.get_attribute("canvas.view >> nth=0", "aria-label")


def test_the_view_is_saved(opened):
    with opened.expect_download() as download:
        opened.click("#save")
    assert download.value.suggested_filename == "attention.png"
    assert download.value.path().read_bytes()[:4] == b"\x89PNG"


def test_light_and_dark(opened):
    colours = [opened.evaluate("getComputedStyle(document.body).backgroundColor")]
    opened.click("#theme")
    colours.append(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(set(colours)) == 2


@pytest.mark.parametrize("width", [390, 820, 1280])
def test_nothing_sticks_out(opened, width):
    opened.set_viewport_size(dict(width=width, height=800))
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    view = opened.locator("canvas.view").first.bounding_box()
    assert view["x"] >= 0
    assert view["width"] > 250


def test_every_patch_has_the_colour_of_its_value(chromium, tmp_path):
    page = chromium.new_page()
    explore(vit(), pixels(), tmp_path / "page.html")  # 2 x 3 patches, so that no swapped axis stays unseen
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_function("document.getElementById('say').textContent.length > 20")
    page.evaluate("byId('opacity').value = 100; change({patch: -1, layer: 1, head: 0})")
    values = np.array(page.evaluate("[...shown(0, 1, 0, -1).values]"))
    found = page.evaluate("""() => { const view = panels[0].view, pen = view.getContext('2d');
        return [0, 1, 2, 3, 4, 5].map(i => [...pen.getImageData((i % 3 + .3) * view.width / 3,
            (Math.floor(i / 3) + .3) * view.height / 2, 1, 1).data.slice(0, 3)]); }""")
    expected = matplotlib.colormaps["viridis"](values / values.max())[:, :3] * 255
    np.testing.assert_allclose(found, expected, atol=6)  # 64 colours
    assert len({tuple(colour) for colour in found}) > 2
    page.close()


def test_a_click_keeps_a_patch_until_the_next(opened):
    view = opened.locator("canvas.view").first
    box = view.bounding_box()
    at = [(box["x"] + box["width"] * (i + 0.5) / 3, box["y"] + box["height"] / 2) for i in range(3)]
    opened.mouse.click(*at[0])
    opened.mouse.move(*at[2])
    assert state(opened)["patch"] == 3
    opened.mouse.click(*at[0])
    opened.mouse.move(*at[2])
    assert state(opened)["patch"] == 5


def test_two_vits_side_by_side_where_one_has_no_head(chromium, tmp_path):
    page, errors = chromium.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    first, second = square_vit(), vit(img_size=12, patch_size=6, n_classes=0)
    explore(first, pixels(12, 12), tmp_path / "page.html", second, names=["A", "B"])
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_function("document.getElementById('say').textContent.length > 20")
    assert page.evaluate("methods") == ["attention", "rollout"]
    page.evaluate("change({patch: 8})")  # of 3 x 3: the last; of 2 x 2 too
    assert page.evaluate("placeIn(DATA.models[1])") == 3
    assert page.locator("h2").all_inner_texts()[1].startswith("B; layer 2, mean of 2 heads")
    for key in "mmddcn":
        page.keyboard.press(key)
    assert errors == []
    page.close()


def test_a_depth_of_the_convnet_is_chosen_apart(opened):
    opened.select_option("#method", "relevance")
    box = opened.locator("canvas.strip").nth(1).bounding_box()
    opened.locator("canvas.strip").nth(1).click(position=dict(x=box["width"] / 2, y=box["height"] / 6))
    assert state(opened)["method"] == "relevance"
    assert opened.locator("h2").all_inner_texts()[1].endswith("after the stem")
