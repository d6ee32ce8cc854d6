"""benchmarks/pictures.py: it draws every figure that the pages show, and its files stay small."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_model import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "benchmarks" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_pictures_draws_every_figure_of_the_pages(pictures):
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    shown = set(re.findall(r"figures/(\w+)\.(?:png|html)", text))
    assert shown <= set(pictures.NAMES)
    files = {path.stem for path in (ROOT / "benchmarks" / "figures").iterdir()}
    assert files == set(pictures.NAMES)


def test_figures_are_small_enough_for_a_page(pictures):
    sizes = {path.name: path.stat().st_size for path in (ROOT / "benchmarks" / "figures").glob("*.png")}
    assert max(sizes.values()) < 300_000, sizes
    assert sum(sizes.values()) < 3_200_000


@pytest.mark.parametrize("name", ["few_or_many", "ladder", "reach", "shape_bias", "patches_changed", "processes"])
def test_pictures_draws_a_chart_from_its_cells(pictures, name, tmp_path):
    pictures.main([name, "--output-dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]
    with Image.open(tmp_path / f"{name}.png") as image:
        assert 400 < image.width <= pictures.WIDTH


def test_figure_of_few_or_many_shows_test_accuracies_of_three_seeds(pictures, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "plot_curves", lambda panels, *words, **options: drawn.append(panels))
    pictures.draw_few_or_many()
    ((curves,),) = (panels.values() for panels in drawn)
    accuracies = [pictures.cell(f"pretraining-hybrid-4500-0.008-{seed}")["test_acc"] for seed in (0, 1, 2)]
    assert curves["hybrid"][1] == pytest.approx((4500, sum(accuracies) / 3, min(accuracies), max(accuracies)))
    assert [[n for n, *_ in points] for points in curves.values()] == [[450, 4500, 45_000]] * 3


def test_pictures_says_which_figures_need_weights(pictures, tmp_path):
    with pytest.raises(InputError, match="look is drawn with ViT-S/14; set its checkpoint with --weights FILE"):
        pictures.main(["look", "--output-dir", str(tmp_path)])
    with pytest.raises(InputError, match="NAME"):
        pictures.main(["lok", "--output-dir", str(tmp_path)])


def test_only_pictures_of_few_colours_get_a_palette(pictures, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)  # as many colours as pixels
    for name, pixels, mode in (("chart", noise // 255 * 255, "P"), ("photograph", noise, "RGB")):
        pictures.save_small(Image.fromarray(pixels), tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as saved:
            assert saved.mode == mode


def test_palette_keeps_white_and_rare_colours(pictures):
    pixels = np.full((64, 64, 3), 255, dtype=np.uint8)
    pixels[:32, :, 0], pixels[:32, :, 1] = np.arange(64), np.arange(32)[:, None]  # 2,048 colours
    pixels[40, 40] = (0, 255, 0)
    kept = np.asarray(pictures.in_256_colours(Image.fromarray(pixels)).convert("RGB")).astype(int)
    assert (kept[33] == 255).all()
    assert np.abs(kept[40, 40] - (0, 255, 0)).max() < 30
    assert np.abs(kept - pixels).mean() < 3
