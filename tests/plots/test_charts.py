"""Charts draw the given numbers, label every panel and clip no text."""

import io

import numpy as np
import pytest
import torch
from figure_checks import assert_no_text_clipped, data_of, seen_pixels, texts
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from PIL import Image

from vit_bridge.plots import charts as c
from vit_model import InputError


def history(n=3):
    return dict(train_loss=[2.0, 1.0, 0.5][:n], val_loss=[2.1, 1.2, 0.9][:n], train_acc=[0.1, 0.4, 0.6][:n],
                val_acc=[0.1, 0.3, 0.5][:n], lr=[1e-3, 5e-4, 1e-4][:n], seconds=[1, 1, 1], images_per_second=[])


@pytest.mark.parametrize("n", [1, 3])
def test_plot_training_curves_draws_the_history(n, tmp_path):
    figure = c.plot_training_curves(history(n), tmp_path / "curves.pdf", baseline=("linear classifier", 0.25))
    loss, accuracy, rate = figure.axes
    assert list(loss.lines[1].get_ydata()) == history(n)["val_loss"]
    assert list(accuracy.lines[0].get_ydata()) == pytest.approx([100 * share for share in history(n)["train_acc"]])
    assert list(accuracy.lines[2].get_ydata()) == [25, 25]
    assert list(rate.lines[0].get_ydata()) == history(n)["lr"]
    assert list(rate.lines[0].get_xdata()) == list(range(1, n + 1))
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    assert "linear classifier: 25.0%" in texts(figure)


@pytest.mark.parametrize("broken", [{}, dict(lr=[]), dict(val_acc=[0.1])])
def test_plot_training_curves_refuses_a_broken_history(broken):
    with pytest.raises(InputError, match="lists of lengths"):
        c.plot_training_curves({**history(), **broken} if broken else {})


def test_plot_matrices_draws_values_on_one_scale():
    matrices = [torch.rand(3, 5), torch.rand(3, 5)]
    figure = c.plot_matrices(matrices, ["one", "two"], "share", xlabel="key", ylabel="query")
    for axes, matrix in zip(figure.axes, matrices, strict=False):
        np.testing.assert_allclose(axes.images[0].get_array(), matrix)
        assert axes.images[0].get_clim() == (0, pytest.approx(torch.stack(matrices).max().item()))
    for word in ("one", "two", "share", "key", "query"):
        assert word in texts(figure)
    with pytest.raises(InputError, match="2 matrices and 1 titles"):
        c.plot_matrices(matrices, ["one"], "share")


def test_plot_confusion_shows_shares_counts_and_names():
    confusion = torch.tensor([[8, 2, 0], [0, 0, 0], [1, 3, 0]])
    figure = c.plot_confusion(confusion, ["ant", "a name of more than 18 letters", "$a_b$"], title="12 images")
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
        c.plot_confusion(confusion, ["ant", "bee"])


@pytest.mark.parametrize(("n_classes", "n_counts", "n_names"), [(20, 400, 20), (21, 0, 21), (41, 0, 0), (1000, 0, 0)])
def test_plot_confusion_drops_counts_and_names_of_many_classes(n_classes, n_counts, n_names):
    figure = c.plot_confusion(torch.eye(n_classes, dtype=torch.int64), list(map(str, range(n_classes))))
    axes = figure.axes[0]
    assert (len(axes.texts), len(axes.get_xticks()), len(axes.get_yticks())) == (n_counts, n_names, n_names)


def test_plot_bars_can_share_one_scale():
    panels = {"label": {"cat": 1.0, "dog": 0.0}, "teacher": {"cat": 0.3, "dog": 0.2}}
    own, shared = ([axes.get_xlim()[1] for axes in c.plot_bars(panels, same_scale=same).axes] for same in (False, True))
    assert own[1] < own[0]
    assert shared == [own[0], own[0]]


def test_plot_bars_draws_values_with_ranges():
    figure = c.plot_bars({"parameters (millions)": {"ViT": 0.4596, "CNN": 0.481},
                          "accuracy (%)": {"CNN": (88.0, 86.5, 89.25), "ViT": (81.0, 80, 82)}}, title="both")
    first, second = figure.axes
    assert [bar.get_width() for bar in first.patches] == [0.4596, 0.481]
    assert first.patches[0].get_facecolor() == second.patches[1].get_facecolor()
    for word in ("0.460", "88.0 (86.5 to 89.2)", "parameters (millions)", "accuracy (%)", "both", "ViT"):
        assert word in texts(figure), word
    for panels in ({}, {"empty": {}}):
        with pytest.raises(InputError, match="contain no bars"):
            c.plot_bars(panels)


@pytest.mark.parametrize(("value", "text"), [(459562, "459,562"), (100, "100"), (81.25, "81.2"), (4.567, "4.57"),
                                             (0.1234, "0.123"), (0, "0.00")])
def test_short_number_keeps_at_least_three_digits(value, text):
    assert c._short_number(value) == text


# ---- Curves


BANDED = {"ViT": [(8, 0.9, 0.85, 0.95), (2, 0.5, 0.4, 0.7)], "CNN": [(2, 0.6, 0.6, 0.6), (8, 0.8, 0.7, 0.9)]}


def test_plot_curves_draws_points_bands_and_lines():
    figure = c.plot_curves({"one": BANDED, "two": {"CNN": [(3, 0.25)]}}, "images", "right (%)", percent=True,
                           log=("x",), lines=[("guessing", 0.1)], title="both")
    first, second = figure.axes
    assert list(first.lines[0].get_xdata()) == [2, 8]  # in order
    assert list(first.lines[0].get_ydata()) == pytest.approx([50, 90])
    assert first.lines[1].get_color() == second.lines[0].get_color()
    band = next(part for part in first.collections if isinstance(part, PolyCollection)).get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (pytest.approx(40), pytest.approx(95))
    assert list(first.lines[2].get_ydata()) == pytest.approx([10, 10])
    assert first.get_xscale() == "log"
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["2", "8"]
    for word in ("one", "two", "images", "right (%)", "both", "guessing", "ViT"):
        assert word in texts(figure)
    with pytest.raises(InputError, match="contain no curves"):
        c.plot_curves({"empty": {}}, "x", "y")


def test_plot_curves_puts_many_panels_in_two_rows():
    figure = c.plot_curves({heading: BANDED for heading in "abcde"}, "images", "right (%)")
    rows = [axes.get_subplotspec().rowspan.start for axes in figure.axes]
    assert rows == [0, 0, 0, 1, 1]
    assert [axes.get_ylabel() for axes in figure.axes] == ["right (%)", "", "", "right (%)", ""]


def test_plot_curves_panels_share_an_axis_with_all_points():
    figure = c.plot_curves({"low": {"A": [(0, 2), (1, 5)]}, "high": {"A": [(0, 3), (1, 11)]}}, "depth", "radius")
    assert {axes.get_ylim()[0] for axes in figure.axes} == {0}
    assert min(axes.get_ylim()[1] for axes in figure.axes) >= 11


def test_plot_matrices_numbers_cells_from_the_middle():
    figure = c.plot_matrices([torch.rand(5, 5)] * 7, list("abcdefg"), "share", most=1, centred=True, title="shifts")
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 7
    assert panels[0].images[0].get_clim() == (0, 1)
    assert panels[0].images[0].get_extent() == [-2.5, 2.5, 2.5, -2.5]


def test_charts_write_names_literally():
    names = ["$\\x$", "_a"]
    curves = c.plot_curves({"$\\x$": {name: [(1, 2)] for name in names}}, "$\\x$", "$\\x$")
    training = c.plot_training_curves(history(), baseline=("_$\\x$", 0.25))
    figures = [curves, training, c.plot_bars({"$\\x$": dict.fromkeys(names, 1)}, title="$\\x$"),
               c.plot_matrices([torch.rand(2, 2)], ["$\\x$"], "$\\x$"),
               c.plot_confusion(torch.eye(2), names, title="$\\x$")]
    for figure in figures:
        figure.canvas.draw()  # as maths $\x$ is an error
        assert "$\\x$" in texts(figure)
    assert [text.get_text() for text in curves.axes[-1].get_legend().get_texts()] == names
    assert training.axes[1].get_legend().get_texts()[2].get_text() == "_$\\x$: 25.0%"


@pytest.mark.slow
def test_charts_clip_no_text():
    for figure in (c.plot_training_curves(history(), baseline=("linear classifier", 0.2)),
                   c.plot_matrices([torch.rand(7, 7)], ["attention of 7 tokens"], "share", "key", "query"),
                   c.plot_matrices([torch.rand(7, 7)] * 6, ["a model,\nrandom weights"] * 6, "share", "key", "query"),
                   c.plot_bars({"accuracy (%)": {"a model of a long name": (88.0, 86.5, 89.25)}}),
                   c.plot_confusion(torch.full((2, 2), 99_999), ["a name of more than 18 letters"] * 2),
                   c.plot_confusion(torch.full((20, 20), 99_999), ["a name of more than 18 letters"] * 20),
                   c.plot_curves({"a panel": BANDED}, "images", "right (%)", percent=True, title="a title of all"),
                   c.plot_curves({heading: BANDED for heading in "abcd"}, "images", "right (%)", title="of all")):
        assert_no_text_clipped(figure)


def test_clip_at_leaves_one_sink_above_the_scale_and_even_values_at_its_top():
    grid = np.full((20, 20), 0.001)
    grid[0, 0] = 0.6
    assert c.clip_at(grid) == pytest.approx(0.001)
    assert c.clip_at(np.full((8, 8), 1 / 64)) == pytest.approx(1 / 64)
    assert c.clip_at(np.zeros((2, 2))) > 0


def test_clip_between_leaves_out_both_ends_and_widens_even_lengths():
    lengths = np.arange(1000.0).reshape(25, 40) + 100
    assert c.clip_between(lengths) == (pytest.approx(109), pytest.approx(1089))
    low, top = c.clip_between(40 + 1e-3 * np.random.default_rng(0).random((8, 8)))
    assert (low, top) == (pytest.approx(38, rel=1e-3), pytest.approx(40, rel=1e-3))


@pytest.mark.parametrize(("value", "words"), [(0.0041, "0.41%"), (0.123, "12%"), (1, "100%"), (3.4e-5, "0.0034%"),
                                              (9e-6, "<0.001%"), (0, "0%")])
def test_percent_has_two_digits_and_no_power(value, words):
    assert c.percent(value) == words


# ---- Colours of models


def test_a_model_has_one_look_in_all_figures():
    curves = {name: [(1, 0.5), (2, 0.75)] for name in ("ConvNet", "Hybrid", "ViT, mean pooling", "ViT")}
    bars = {"accuracy (%)": {"ViT": 1.0, "another": 3.0, "HybridCNNViT": 2.0, "convnet_shapes": 2.0}}
    lines = {line.get_label(): line for line in c.plot_curves({"one": curves}, "x", "y").axes[0].lines}
    boxes = [box.get_facecolor() for box in c.plot_bars(bars).axes[0].patches]
    for name, box, colour in (("ViT", boxes[0], c.BLUE), ("Hybrid", boxes[2], c.GREEN),
                              ("ConvNet", boxes[3], c.VERMILION)):
        assert lines[name].get_color() == colour
        assert box[:3] == to_rgb(colour)
    assert to_rgb(lines["ViT, mean pooling"].get_color()) not in [box[:3] for box in boxes]
    assert boxes[1][:3] not in [to_rgb(colour) for colour in (c.BLUE, c.GREEN, c.VERMILION)]


@pytest.mark.parametrize(("name", "family"), [
    ("vit_nano_cifar10", "vit"), ("ViT-B/16", "vit"), ("convnext_tiny", "convnext"), ("ResNet-50", "resnet"),
    ("CNN", "convnet"), ("deit_small", "deit"), ("Swin-T", "swin"), ("BEiT", "beit"), ("hybrid_shapes", "hybrid")])
def test_names_of_models_find_their_family(name, family):
    assert (c.looks_of([name])[name].colour, c.looks_of([name])[name].marker) == c.FAMILIES[family]


def test_looks_of_tells_twins_and_models_of_one_family_apart():
    looks = c.looks_of(["ViT", "ViT, random weights", "vit_tiny", "vit_base", "trained", "guessing"])
    assert len({looks[name].colour for name in ("ViT", "ViT, random weights", "vit_tiny", "vit_base")}) == 1
    assert (looks["ViT"].hollow, looks["ViT, random weights"].hollow) == (False, True)
    assert len({(look.colour, look.marker, look.hollow) for look in looks.values()}) == 6
    assert len({str(looks[name].dash) for name in ("ViT", "vit_tiny", "vit_base")}) == 3
    many = c.looks_of([f"vit_{i}" for i in range(40)])
    assert len(many) == 40


def test_families_have_colours_of_their_own():
    looks = {(colour, marker) for colour, marker in c.FAMILIES.values()}
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(looks)


@pytest.mark.parametrize("options", [{}, dict(log=("y",)), dict(percent=True)])
def test_lines_that_coincide_are_all_seen(options):
    points = [(1, 0.2), (2, 0.5), (3, 0.4)]
    names = ("ViT", "Hybrid", "ConvNet")
    alone = {name: seen_pixels(c.plot_curves({"one": {name: points}}, "x", "y", **options), c.looks_of([name])[
        name].colour) for name in names}
    figure = c.plot_curves({"one": {name: [(x, y + 1e-4 * i) for x, y in points] for i, name in enumerate(names)}},
                           "x", "y", **options)
    for name in names:
        assert seen_pixels(figure, c.looks_of([name])[name].colour) > 0.3 * alone[name]
    apart = c.plot_curves({"one": {"ViT": points, "Hybrid": [(x, y + 0.3) for x, y in points]}}, "x", "y", **options)
    assert {line.get_linewidth() for line in apart.axes[0].lines} == {2}


def test_n_covered_by_counts_curves_that_share_most_points():
    x = np.arange(4)
    curves = [(x, np.array([0, 0, 1, 2.0])), (x, np.array([0, 0, 1, 5.0])), (x, np.array([2, 1, 1, 2.0])),
              (x[:1], np.array([2.0]))]
    assert c.n_covered_by(curves, 0.01) == [1, 0, 1, 0]
    assert c.n_covered_by([(x, x), (x + 10, x)], 0.01) == [0, 0]


# ---- In a notebook


def test_figures_show_themselves_in_a_notebook():
    for figure in (c.plot_training_curves(history()), c.new_figure(2, 1)):
        png = Image.open(io.BytesIO(figure._repr_png_()))
        assert (png.format, png.size) == ("PNG", tuple(100 * figure.get_size_inches()))


def test_legend_says_what_a_thick_line_means_where_there_is_one():
    points = [(0, 1), (1, 2)]
    one = c.plot_curves({"": {"ViT": points, "ConvNet": [(0, 3), (1, 1)]}}, "x", "y")
    two = c.plot_curves({"": {"ViT": points, "ConvNet": points}}, "x", "y")
    assert one.axes[0].get_legend().get_title().get_text() == ""
    assert two.axes[0].get_legend().get_title().get_text() == c.THICK


def test_a_long_legend_stands_beside_the_panels():
    """Its names may hold a $, which is not parsed as maths."""
    few, many = (c.plot_curves({"": {f"${i}$": [(0, i), (1, i)] for i in range(n)}}, "x", "y") for n in (6, 7))
    assert few.axes[0].get_legend() is not None
    assert few.legends == []
    assert many.axes[0].get_legend() is None
    assert [text.get_parse_math() for text in many.legends[0].texts] == [False] * 7
