"""Charts: numbers in, a matplotlib Figure out.

plot_curves, plot_training_curves           one quantity against another, with bands; the history of a training run
plot_bars, plot_matrices, plot_confusion    bars with intervals, heat maps, a confusion matrix

Every function returns its Figure and writes a file only if save_path is given (.png, .pdf, .svg, ...). A model has
the same colour and marker in all of them (looks_of). visualizations.py draws the views of images and models.

Shapes:  K classes, n points of a line.
"""

import io
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vit_bridge.errors import InputError, first_line

# Okabe and Ito 2008, "Color Universal Design": distinct with every common kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
MARKERS = "osD^vPXh"
DASHES = ("-", (0, (4, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
CLOSE = 0.006  # as a fraction of the axis: lines at most this far apart hide each other
THICK = "thick: hidden behind another line"
LEVELS = (":", "--")  # horizontal lines
MOST_INSIDE = 6  # entries of a legend that find room inside a panel
CLIP = 0.99  # the quantile of a map's values at which its colour scale ends

# A word in the name of a model -> colour and marker of its family in every figure. The first match counts, so
# HybridCNNViT is a hybrid. Three further colours come from Tol's "muted" scheme, which is distinct from the six above.
FAMILIES = {"hybrid": (GREEN, "s"), "convnext": (ORANGE, "P"), "resnet": (PURPLE, "v"), "convnet": (VERMILION, "D"),
            "cnn": (VERMILION, "D"), "swin": ("#882255", "X"), "deit": ("#332288", "h"), "beit": ("#999933", "*"),
            "vit, mean pooling": (SKY, "^"), "vit": (BLUE, "o")}
CONTROLS = ("untrained", "random")  # words that mark an untrained twin: the same colour, hollow and dashed


# ---- Colours of models -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """The style of a model's line and bar."""

    colour: str
    marker: str
    dash: str | tuple
    hollow: bool

    @property
    def line(self):
        return dict(color=self.colour, marker=self.marker, linestyle=self.dash,
                    markerfacecolor="white" if self.hollow else self.colour)

    @property
    def bar(self):
        return dict(facecolor="white" if self.hollow else self.colour, edgecolor=self.colour, linewidth=1.5,
                    hatch="///" if self.hollow else None)


def looks_of(names):
    """Assign each name in a figure its Look: {name: Look}.

    A model of one of FAMILIES has its family's colour and marker in every figure; an untrained twin is hollow and
    dashed. Further models of the same family get different markers and dashes. Names that match no family share the
    remaining colours.
    """
    families = {name: next((word for word in FAMILIES if word in name.lower()), None) for name in names}
    taken = {FAMILIES[word][0] for word in families.values() if word}
    free = [colour for colour in (ORANGE, PURPLE, SKY, BLUE, VERMILION, GREEN) if colour not in taken] or COLOURS
    looks, used, n_others = {}, set(), 0
    for name, word in families.items():
        hollow = any(control in name.lower() for control in CONTROLS)
        if word:
            colour, marker = FAMILIES[word]
        else:
            colour, marker = free[n_others % len(free)], MARKERS[n_others % len(MARKERS)]
            n_others += 1
        n_same = 0
        while (colour, marker, hollow) in used and n_same < len(MARKERS):
            n_same += 1
            marker = MARKERS[(MARKERS.find(marker) + 1) % len(MARKERS)]
        used.add((colour, marker, hollow))
        looks[name] = Look(colour, marker, DASHES[1] if hollow and not n_same else DASHES[n_same % len(DASHES)], hollow)
    return looks


def n_covered_by(curves, close):
    """Count for each of several curves, 2 x (n), how many later curves cover it.

    A curve covers an earlier one if they are at most `close` apart at more than half of their common points.
    """
    def runs_over(upper, lower):
        shared, i, j = np.intersect1d(lower[0], upper[0], return_indices=True)
        return 2 * np.count_nonzero(np.abs(lower[1][i] - upper[1][j]) <= close) > len(shared)

    return [sum(runs_over(upper, lower) for upper in curves[i + 1:]) for i, lower in enumerate(curves)]


def widths(n_covered):
    """Return the line width and marker size of a line that n other lines cover.

    It is wider than those lines, so it stays visible on both sides.
    """
    return dict(linewidth=2 + 1.8 * min(n_covered, 5), markersize=5 + 3 * min(n_covered, 5))


# ---- Lines ------------------------------------------------------------------------------------------------


def plot_curves(panels, xlabel, ylabel, save_path=None, title=None, log=(), percent=False, lines=()):
    """Plot one quantity against another, with one panel for each heading.

    Parameters
    ----------
    panels : dict
        Heading -> {name: points}. Points are (x, y) or, with a band, (x, y, low, high). A name has the same colour and
        marker in every panel. More than three panels make two rows.
    xlabel, ylabel : str
        Axis labels of all panels, with units.
    save_path : str or Path, optional
        Where to write the figure.
    title : str, optional
        Heading of the figure.
    log : sequence of str, optional
        The logarithmic axes: "x", "y" or both.
    percent : bool, optional
        If True, y is a fraction from 0 to 1 and is shown in per cent.
    lines : sequence, optional
        (label, y) of horizontal lines in every panel, such as chance.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        If there is nothing to draw.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    if not names:
        raise InputError(f"panels {panels!r} contain no curves; expected heading -> {{name: [(x, y), ...]}}")
    n_rows = 1 if len(panels) <= 3 else 2
    n_columns = math.ceil(len(panels) / n_rows)
    figure = new_figure(2.2 + 4.6 * n_columns, 4.4 * n_rows + (0.3 if title else 0))
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    for panel in grid.flat[len(panels):]:
        panel.remove()
    axes = grid.flat[:len(panels)]
    scale, looks = 100 if percent else 1, looks_of(names)
    every = np.array([point[1] for curves in panels.values() for points in curves.values() for point in points])
    shown = np.log if "y" in log else np.asarray
    close = CLOSE * (np.ptp(shown(every)) if "y" in log else 1 if percent else every.max())
    hidden = False
    for panel, (heading, curves) in zip(axes, panels.items(), strict=True):
        drawn = {name: np.array(sorted(points), dtype=float).T for name, points in curves.items()}  # (2 or 4, n) each
        covered = n_covered_by([(x, shown(y)) for x, y, *_ in drawn.values()], close)
        hidden = hidden or any(covered)
        for (name, (x, y, *band)), n_covered in zip(drawn.items(), covered, strict=True):
            panel.plot(x, scale * y, label=name, **looks[name].line, **widths(n_covered))
            if band:
                panel.fill_between(x, scale * band[0], scale * band[1], alpha=0.2, linewidth=0,
                                   color=looks[name].colour)
        for i, (label, level) in enumerate(lines):
            panel.axhline(scale * level, color="black", linestyle=LEVELS[i % len(LEVELS)], linewidth=1.5, label=label)
        panel.set(title=heading, xlabel=xlabel)
        panel.grid(alpha=0.3)
        for axis in log:
            getattr(panel, f"set_{axis}scale")("log")
        if "x" in log:
            ticks = sorted({point[0] for points in curves.values() for point in points})
            panel.set_xticks(ticks, [f"{tick:,.0f}" if tick == round(tick) else f"{tick:g}" for tick in ticks])
            panel.minorticks_off()
        elif all(point[0] == round(point[0]) for points in curves.values() for point in points):
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if percent:
            panel.set_ylim(0, 104)
    if not percent and "y" not in log:
        grid[0, 0].set_ylim(bottom=0)  # shared by all panels, so only once all are drawn
    for panel in grid[:, 0]:
        panel.set_ylabel(ylabel)
    handles = {line.get_label(): line for panel in reversed(axes) for line in panel.lines}
    order = [*names, *(label for label, _ in lines)]
    where, loc = (axes[-1], "best") if len(order) <= MOST_INSIDE else (figure, "outside right upper")
    where.legend([handles[label] for label in order], order, fontsize=11, title=THICK if hidden else None,
                 title_fontsize=10, loc=loc)
    if title:
        set_heading(figure, title, fontsize=14)
    return finish(figure, save_path)


def plot_training_curves(history, save_path=None, baseline=None):
    """Plot loss, accuracy and learning rate over the epochs.

    Parameters
    ----------
    history : dict
        Lists of equal length, one entry per epoch: train_loss, val_loss, lr and, after a training with labels,
        train_acc and val_acc (from 0 to 1). Other keys are ignored.
    save_path : str or Path, optional
        Where to write the figure.
    baseline : tuple, optional
        (name, accuracy) of a horizontal line in the accuracy panel, such as a linear classifier.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        If the lists are empty or differ in length.
    """
    labelled = "val_acc" in history
    epochs = _epochs_of(history, ("train_loss", "val_loss", "lr", *(("train_acc", "val_acc") if labelled else ())))
    marker = "o" if len(epochs) <= 40 else None
    figure = new_figure(13 if labelled else 9, 4.2)
    loss, *accuracies, rate = figure.subplots(1, 3 if labelled else 2)
    for part, label, colour, style in (("train", "training", BLUE, "-"), ("val", "validation", VERMILION, "--")):
        line = dict(color=colour, linestyle=style, marker=marker, markersize=4, linewidth=2, label=label)
        loss.plot(epochs, history[f"{part}_loss"], **line)
        for accuracy in accuracies:
            accuracy.plot(epochs, [100 * share for share in history[f"{part}_acc"]], **line)
    if baseline is not None:
        name, share = baseline
        accuracy.axhline(100 * share, color="black", linestyle=":", linewidth=2, label=f"{name}: {share:.1%}")
    rate.plot(epochs, history["lr"], color=GREEN, marker=marker, markersize=4, linewidth=2)
    loss.set(title="Loss", ylabel="loss (nats)" if labelled else "loss of hidden patches")
    for accuracy in accuracies:
        accuracy.set(title="Accuracy", ylabel="accuracy (%)")
    rate.set(title="Learning rate", ylabel="learning rate")
    for axes in (loss, *accuracies):
        show_legend(axes, fontsize=11)
    _label_epochs(figure.axes)
    return finish(figure, save_path)


def _epochs_of(history, names):
    """Return 1, 2, ... for the entries of a history. Raises InputError unless these lists match."""
    lengths = {name: len(history.get(name, [])) for name in names}
    if len(set(lengths.values())) > 1 or not lengths["lr"]:
        raise InputError(f"the history has lists of lengths {lengths}; expected one entry per epoch in each, as in "
                         f"the history that Trainer.train returns")
    return range(1, lengths["lr"] + 1)


def _label_epochs(panels):
    """Label the x axis with whole epochs, and start the y axis at zero."""
    for axes in panels:
        axes.set(xlabel="epoch", xlim=None if len(axes.lines[0].get_xdata()) > 1 else (0.5, 1.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)


# ---- Bars and matrices ------------------------------------------------------------------------------------


def plot_bars(panels, save_path=None, title=None, same_scale=False):
    """Plot horizontal bars, one panel for each quantity.

    Parameters
    ----------
    panels : dict
        Title of the panel, with the unit -> {name: value}. A value with an interval is (value, low, high). A name has
        the same colour in every panel.
    save_path : str or Path, optional
        Where to write the figure.
    title : str, optional
        Heading of the figure.
    same_scale : bool, optional
        Whether bars of equal length mean equal values in all panels.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        If there is nothing to draw.
    """
    names = list(dict.fromkeys(name for bars in panels.values() for name in bars))
    if not names:
        raise InputError(f"panels {panels!r} contain no bars; expected panel title -> {{name: value}}")
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(1 + 4 * columns, rows * (0.7 + 0.5 * len(names)) + (0.5 if title else 0))
    axes, looks = figure.subplots(rows, columns, squeeze=False).flatten(), looks_of(names)
    for panel in axes[len(panels):]:
        panel.set_axis_off()
    for panel, (heading, bars) in zip(axes, panels.items(), strict=False):
        _draw_bars(panel, bars, looks)
        panel.set_title(heading, fontsize=12)
        panel.set_ylim(len(names) - 0.5, -0.5)
    if same_scale:
        longest = max(panel.get_xlim()[1] for panel in axes[:len(panels)])
        for panel in axes[:len(panels)]:
            panel.set_xlim(0, longest)
    if title:
        set_heading(figure, title, fontsize=14)
    return finish(figure, save_path)


def _draw_bars(axes, bars, looks):
    """Draw one panel of plot_bars, from top to bottom, with values and intervals beside the bars."""
    triples = [value if isinstance(value, (tuple, list)) else (value, value, value) for value in bars.values()]
    values, lows, highs = np.array(triples, dtype=float).reshape(-1, 3).T
    places = range(len(bars))
    for place, value, name in zip(places, values, bars, strict=True):
        axes.barh(place, value, height=0.65, **looks[name].bar)
    for place, value, low, high in zip(places, values, lows, highs, strict=True):
        text = _short_number(value)
        if low < high:
            axes.errorbar(value, place, xerr=[[max(0, value - low)], [max(0, high - value)]], color="black", capsize=4)
            text += f" ({_short_number(low)} to {_short_number(high)})"
        axes.annotate(text, (max(value, high), place), xytext=(6, 0), textcoords="offset points", va="center",
                      fontsize=11)
    axes.set_yticks(places, list(bars), fontsize=11, parse_math=False)
    axes.set_xticks([])
    axes.set_xlim(0, (2.0 if (lows < highs).any() else 1.35) * max(highs.max(), values.max()) or 1)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def plot_matrices(matrices, titles, label, xlabel="", ylabel="", save_path=None, most=None, centred=False, title=None,
                  columns=5):
    """Plot non-negative matrices as heat maps on one colour scale that starts at 0.

    Parameters
    ----------
    matrices : sequence of array, each (rows, columns)
        The values.
    titles : sequence of str
        One title for each matrix.
    label : str
        What the colours mean, with the unit.
    xlabel, ylabel : str, optional
        Axis labels.
    save_path : str or Path, optional
        Where to write the figure.
    most : float, optional
        End of the colour scale; the largest value by default.
    centred : bool, optional
        If True, rows and columns are numbered from the middle.
    title : str, optional
        Heading of the figure.
    columns : int, optional
        Maximum number of panels in a row.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        Unless there is at least one matrix and a title for each.
    """
    if not len(matrices) or len(matrices) != len(titles):
        raise InputError(f"{len(matrices)} matrices and {len(titles)} titles do not match; pass at least one matrix, "
                         f"and one title for each")
    most = max(float(matrix.max()) for matrix in matrices) if most is None else most
    rows = math.ceil(len(matrices) / columns)
    columns = math.ceil(len(matrices) / rows)
    figure = new_figure(max(4.5, 3.4 * columns + 1), 3.5 * rows + 0.4 + (0.4 if title else 0))
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(matrices):]:
        axes.set_axis_off()
    for axes, matrix, heading in zip(panels.flat, matrices, titles, strict=False):
        height, width = matrix.shape
        edges = (-width / 2, width / 2, height / 2, -height / 2) if centred else None  # numbers from the middle
        mappable = axes.imshow(np.asarray(matrix), cmap="viridis", vmin=0, vmax=most, extent=edges)
        axes.set_title(heading, fontsize=12)
        axes.set_xlabel(xlabel, fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    for axes in panels[:, 0]:
        axes.set_ylabel(ylabel, fontsize=11)
    figure.colorbar(mappable, ax=panels, label=label)
    if title:
        set_heading(figure, title, fontsize=14)
    return finish(figure, save_path)


def plot_confusion(confusion, class_names, save_path=None, title=None):
    """Plot a confusion matrix; the colours are shares of each row.

    Parameters
    ----------
    confusion : array, shape (K, K)
        Counts of images. Rows are true classes, and columns are predicted classes.
    class_names : sequence of str
        K names. Counts are written for up to 20 classes, and names for up to 40.
    save_path : str or Path, optional
        Where to write the figure.
    title : str, optional
        Heading of the figure.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        If the counts do not have one row and one column for each class.
    """
    counts, K = np.asarray(confusion), len(class_names)
    if counts.shape != (K, K):
        raise InputError(f"counts of shape {counts.shape} do not fit {K} class names; expected ({K}, {K})")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (K, K)
    side = min(4.5 + 0.45 * K, 13.5)
    figure = new_figure(side + 1.5, side)
    axes = figure.subplots()
    mappable = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    hide_ticks(axes)
    if K <= 40:
        names = [name if len(name) <= 18 else f"{name[:17]}…" for name in class_names]
        font = dict(fontsize=11 if K <= 20 else 9, parse_math=False)
        axes.set_xticks(range(K), names, rotation=90, **font)
        axes.set_yticks(range(K), names, **font)
    for (row, column), count in np.ndenumerate(counts) if K <= 20 else ():
        axes.text(column, row, count, ha="center", va="center", fontsize=11 if counts.max() < 1000 else 9,
                  color="white" if shares[row, column] < 0.43 else "black")
    axes.set(title=title or "Confusion matrix", xlabel="predicted class", ylabel="true class")
    figure.colorbar(mappable, label="share of the images of the true class")
    return finish(figure, save_path)


def _short_number(value):
    """Format a number with three significant digits and commas: 0.123, 4.57, 81.2, 459,562."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


# ---- Figures ----------------------------------------------------------------------------------------------


class ShownFigure(Figure):
    """A Figure that a notebook displays if it is the value of the last line of a cell.

    Without this, a figure that pyplot does not manage is displayed only after pyplot has been imported.
    """

    def _repr_png_(self):
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def new_figure(width, height):
    """Make an empty Figure of this size in inches; it lays out its own panels and needs no display."""
    figure = ShownFigure(figsize=(width, height), layout="compressed")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def set_heading(figure, text, fontsize=14):
    """Set the heading of a figure, wrapped to its width."""
    figure.suptitle(wrapped(text, figure.get_figwidth(), fontsize), fontsize=fontsize)


def wrapped(text, inches, fontsize):
    """Wrap text to lines of at most this many inches."""
    n_letters = max(8, int(inches * 72 / (0.62 * fontsize)))
    return "\n".join(textwrap.fill(line, n_letters) for line in text.split("\n"))


def finish(figure, save_path):
    """Save the figure if there is a save_path, and return it.

    Text other than tick labels is not parsed as maths, because names of classes, models and files may contain a $.
    """
    for axes in figure.axes:
        legend = axes.get_legend()
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *(legend.texts if legend else ())):
            text.set_parse_math(False)
    for part in (figure, *figure.subfigs):
        for text in (*part.texts, *(text for legend in part.legends for text in legend.texts)):
            text.set_parse_math(False)
    if save_path is not None:
        save_figure(figure, save_path)
    return figure


def save_figure(figure, save_path):
    """Write the figure as .png, .pdf, .svg, ... Raises InputError if it cannot be written."""
    if not Path(save_path).suffix:
        raise InputError(f"cannot save the figure as {str(save_path)!r}: the name has no extension; choose one that "
                         f"ends in .png, .pdf or .svg")
    try:
        figure.savefig(save_path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot save the figure as {str(save_path)!r} ({first_line(error)}); choose an "
                         f"existing, writable folder and a name that ends in .png") from error


def show_legend(axes, **options):
    """Draw a legend of all lines, including names that begin with an underscore, which matplotlib omits."""
    axes.legend(axes.lines, [line.get_label() for line in axes.lines], **options)


def hide_ticks(axes):
    """Remove ticks and tick labels."""
    axes.set_xticks([])
    axes.set_yticks([])


# ---- Selection -------------------------------------------------------------------------------------------


def spread(n, most):
    """Choose at most `most` of the indices 0 .. n - 1, evenly from the first to the last."""
    return sorted({round(i * (n - 1) / max(min(n, most) - 1, 1)) for i in range(min(n, most))})


# ---- Colour scales ----------------------------------------------------------------------------------------


def clip_at(grid, quantile=CLIP):
    """Return the top of a colour scale that starts at 0: a quantile of the map (rows, columns).

    If the scale ended at the maximum, a single patch with half of the attention would make all others dark.
    """
    values = np.asarray(grid, dtype=float)
    return max(float(np.nanquantile(values, quantile, method="lower")), 1e-12)


def clip_between(grid, quantile=CLIP):
    """Return (low, top) of a colour scale for norms (rows, columns), which are far from 0.

    Both ends leave out the same fraction. The scale spans at least a twentieth of its top, so near-equal norms look
    equal.
    """
    values = np.asarray(grid, dtype=float)
    low, top = (float(np.nanquantile(values, share, method="lower")) for share in (1 - quantile, quantile))
    return min(low, top - max(0.05 * abs(top), 1e-12)), top


def in_digits(value, n_digits=2):
    """Format a number with n significant digits and no exponent: 0.41, 12, 0.00031, 1,200."""
    rounded = float(f"{value:.{n_digits}g}")
    return np.format_float_positional(rounded, trim="-") if abs(value) < 1000 else f"{value:,.0f}"


def percent(share, n_digits=2):
    """Format a share from 0 to 1 in per cent; below 0.001% as '<0.001%'."""
    return "<0.001%" if 0 < share < 1e-5 else f"{in_digits(100 * share, n_digits)}%"


def colour_bar(figure, mappable, axes, label, number=in_digits):
    """Draw the colour bar of one map; `number` formats its ticks: in_digits or percent."""
    bar = figure.colorbar(mappable, ax=axes, extend="max", format=FuncFormatter(lambda value, place: number(value, 4)))
    bar.set_label(wrapped(f"{label}; colours end at the 99th percentile: larger values all have the top colour",
                          0.8 * figure.get_figheight(), 10))
    return bar


def shared_bar(figure, axes, label, ends=("0", "its top"), extend="max"):
    """Draw one colour bar below several maps that have their own scales; `ends` are the labels of its ends."""
    bar = figure.colorbar(ScalarMappable(cmap="viridis"), ax=axes, location="bottom", extend=extend, ticks=[0, 1],
                          shrink=0.5, aspect=40)
    bar.ax.set_xticklabels(ends)
    bar.set_label(wrapped(label, 0.9 * figure.get_figwidth(), 10), fontsize=10)
    return bar


# ---- Sizes of panels --------------------------------------------------------------------------------------


def proportion(picture):
    """Return the height of a picture relative to its width, clipped to what fits a figure."""
    return min(2.5, max(0.4, picture.shape[0] / picture.shape[1]))


def extent_of(picture):
    """Return the imshow `extent` with which a coarser map covers a picture."""
    height, width = picture.shape[:2]
    return (-0.5, width - 0.5, height - 0.5, -0.5)


def draw_map(axes, picture, grid, token_size, **style):
    """Draw a map (rows, columns, ...) of tokens of this (height, width) in pixels over a picture (H, W, 3).

    The last tokens may reach over the edge of the picture.
    """
    (rows, columns), (height, width), (left, right, bottom, top) = grid.shape[:2], token_size, extent_of(picture)
    mappable = axes.imshow(grid, extent=(-0.5, columns * width - 0.5, rows * height - 0.5, -0.5), **style)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    return mappable
