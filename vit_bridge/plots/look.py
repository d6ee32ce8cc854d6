"""A look inside a model at one photograph: what `python visualizations.py photo.jpg` draws and prints.

look(model, image, whole)          compute a Look: features, attention by head, token norms, explanation
share_colours(looks)               compute feature colours over several photographs together
panels_of(look), draw_look, draw_panel     its panels, each with a sentence on how to read it, and their figures
describe(look, name)               the findings as lines of text

Shapes:  H heads, D width, K classes, h, w height and width of the photograph. Sizes are in pixels in images, and in
         inches in figures.
"""

import math
import textwrap
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.patches import Rectangle
from torchvision.transforms.v2.functional import get_size

from vit_bridge.analysis.attention import attention_distance, cls_attention_grid, uniform_attention_distance
from vit_bridge.analysis.capture import capture, watch_layer
from vit_bridge.analysis.explanations import explain, feature_colours, token_norms
from vit_bridge.data.images import is_input, open_picture, prepare_image
from vit_bridge.errors import InputError
from vit_bridge.models.adapters import ModelAdapter, adapt, check_pool
from vit_bridge.plots.charts import VERMILION, ShownFigure, clip_at, extent_of, finish, hide_ticks
from vit_bridge.runtime import at_least_float32, logits_of, unwrapped

SIDE, BIG, TALL = 2.6, 4.1, 4.6  # width of the right column, width and maximum height of the large panels
STRIP = 2.2  # maximum height of a map in the strip of heads or stages
GAP, MARGIN = 0.3, 0.3
TITLE, SENTENCE, LABEL = 12, 10, 10  # points
BOLD = 0.66  # width of a letter in a title, relative to its height
N_LIKELIEST = 5


# ---- Computing a look ------------------------------------------------------------------------------------


@dataclass
class Look:
    """What a model computes for one photograph.

    Attributes
    ----------
    adapter : ModelAdapter
        The adapter of the model.
    n_parameters : int
        Number of parameters of the model.
    picture : array, shape (height, width, 3)
        The model's input, in 0..1.
    size : tuple of int
        (h, w) of the photograph, upright.
    grid : tuple of int
        (rows, columns) of the patches of a ViT, or of the last feature map of a ConvNet or Swin Transformer.
    features : Tensor, shape (rows, columns, D)
        Features after the last block or stage; each position is scaled to mean 0 and variance 1.
    colours : array, shape (rows, columns, 3)
        The features as colours, computed over `together` photographs.
    probabilities : Tensor, shape (K,), or None
        Predicted probabilities; None for a model without a head.
    explanation : array, shape (rows, columns), or None
        Saliency for the most likely class. If it is None, `refused` holds the reason.
    heads : array, shape (H, rows, columns), or None
        Attention to the patches in the last block, of the token that the classifier head reads; None for a
        ConvNet or Swin Transformer.
    distances : list of float
        Mean attention distance of each head in the last block, in pixels; `uniform` is the distance of uniform
        attention.
    norms, artefacts : array, shape (rows, columns), or None
        Norm of each patch token after the last block, and whether it is an artefact.
    stages : list of array, each (rows, columns, 3)
        Features of a ConvNet or Swin Transformer after the stem and each stage, as colours.
    """

    adapter: ModelAdapter
    n_parameters: int
    picture: np.ndarray
    size: tuple
    grid: tuple
    features: torch.Tensor
    colours: np.ndarray | None = None
    together: int = 1
    probabilities: torch.Tensor | None = None
    explanation: np.ndarray | None = None
    refused: str = ""
    heads: np.ndarray | None = None
    distances: list = field(default_factory=list)
    uniform: float = 0.0
    norms: np.ndarray | None = None
    artefacts: np.ndarray | None = None
    stages: list = field(default_factory=list)

    @property
    def stretch(self):
        """Relative change of the aspect ratio of the photograph; 0 if it is not distorted."""
        (h, w), (height, width) = self.size, self.picture.shape[:2]
        return max(height * w / (width * h), width * h / (height * w)) - 1

    @property
    def elsewhere(self):
        """Share of each head's attention that goes to tokens other than patches, (H)."""
        return np.maximum(0, 1 - self.heads.sum(axis=(1, 2)))

    def likeliest(self, n=N_LIKELIEST):
        """Return [(class, probability)], most likely first; empty for a model without a head."""
        if self.probabilities is None:
            return []
        best = self.probabilities.topk(min(n, len(self.probabilities)))
        names = self.adapter.class_names
        return [(str(names[label]) if names else f"class {label}", probability)
                for label, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def look(model, image, whole=None):
    """Look at one image with a model.

    Parameters
    ----------
    model : nn.Module
        A ViT, a ConvNet or a Swin Transformer.
    image : str, Path, PIL image, array or Tensor
        Any kind of image that data/images.py accepts.
    whole : Whole, optional
        The model sees the whole photograph, as in `prepare_image`. By default it sees only the centre.

    Returns
    -------
    Look

    Raises
    ------
    InputError
        If the image cannot be used, or if the head does not read a weighted mean of tokens.
    """
    model = unwrapped(model)
    adapter = adapt(model)
    photograph = image if is_input(image) else open_picture(image, adapter.in_channels)
    images, picture = prepare_image(photograph, model, whole)
    about = dict(adapter=adapter, picture=picture, size=tuple(get_size(photograph)),
                 n_parameters=sum(weight.numel() for weight in model.parameters()))
    found, logits = (_look_at_tokens if adapter.attends else _look_at_stages)(model, images, about)
    if adapter.has_head:
        found.probabilities = at_least_float32(logits.detach()[0].cpu()).softmax(dim=0)
        try:
            saliency = explain(model, images, "relevance" if adapter.attends else "grad_cam").saliency
            found.explanation = saliency[0].numpy()
        except InputError as error:
            found.refused = str(error)
    else:
        found.refused = "this model has no head, so it predicts no class to explain"
    share_colours([found])
    return found


def _look_at_tokens(model, images, about):
    """Return (Look, logits) of a ViT."""
    adapter = about["adapter"]
    check_pool(adapter.pool)
    grid, first, last = adapter.grid(images), adapter.n_prefix, len(adapter.blocks) - 1

    def keep(block, attended):
        """Keep (attention to the patches that the classifier head reads, distance of each head) of the last block."""
        if block < last:
            return None
        maps = at_least_float32(attended.maps)  # (1, H, N, N)
        distances = [attention_distance(maps[None, :, [head]], grid, adapter.patch_size, first).item()
                     for head in range(maps.shape[1])]  # head by head: they are computed in float64
        return cls_attention_grid(maps[0], grid, first, adapter.pool).cpu().numpy(), distances

    seen = capture(model, images, keep=keep)
    norms, artefacts = token_norms(replace(seen, tokens=seen.tokens[-2:]))  # (1, 1, rows, columns)
    heads, distances = seen.maps[-1]
    tokens = seen.tokens[-1][0, first:].detach()  # (n, D)
    found = Look(**about, grid=grid, features=_scaled(tokens).unflatten(0, grid), heads=heads, distances=distances,
                 uniform=uniform_attention_distance(grid, adapter.patch_size), norms=norms[0, 0].numpy(),
                 artefacts=artefacts[0, 0].numpy())
    return found, seen.logits


def _look_at_stages(model, images, about):
    """Return (Look, logits) of a ConvNet or Swin Transformer."""
    maps, adapter = [], about["adapter"]
    for depth, layer in enumerate(adapter.layers):
        _, output, logits = watch_layer(model, layer, images)
        features = adapter.as_map(output, images, depth).detach()[0]  # (D, rows, columns)
        maps.append(_scaled(features.permute(1, 2, 0)))  # (rows, columns, D)
    stages = [feature_colours(one[None])[0].numpy() for one in maps]
    return Look(**about, grid=tuple(maps[-1].shape[:2]), features=maps[-1], stages=stages), logits_of(logits)


def _scaled(features):
    """Scale features (..., D) to mean 0 and variance 1 at each position, as the last norm of a ViT does.

    Otherwise a few tokens with very large norms would determine the colours.
    """
    features = at_least_float32(features.cpu())
    return F.layer_norm(features, features.shape[-1:])


def share_colours(looks):
    """Compute the feature colours of several looks of one model together.

    Similar colours then mean similar features, including across photographs.
    """
    flat = torch.cat([one.features.flatten(0, 1) for one in looks])  # (all positions, D)
    colours = feature_colours(flat[None, None])[0, 0]  # (all positions, 3)
    parts = colours.split([math.prod(one.grid) for one in looks])
    for one, part in zip(looks, parts, strict=True):
        one.colours, one.together = part.unflatten(0, one.grid).numpy(), len(looks)


# ---- Text -------------------------------------------------------------------------------------------------


def describe(look, name, cropped=False):
    """Return the findings as (label, text) pairs, in the order in which they are printed."""
    lines = [("Model", f"{name}: {_described_model(look)}"), ("Photograph", _described_fit(look, cropped))]
    likeliest = ", ".join(f"{label} {probability:.1%}" for label, probability in look.likeliest())
    lines.append(("Prediction", likeliest or "none: this model has no head"))
    if look.probabilities is not None and look.refused:
        lines.append(("Explanation", f"none: {look.refused}"))
    if look.heads is None:
        return lines
    if look.adapter.n_prefix:
        shares, rest = look.elsewhere, _prefix(look)
        whose = "its" if look.adapter.pool == "cls" else "their"
        least, most = _share(shares.min()), _share(shares.max())
        span = f" ({least} to {most}, depending on the head)" if least != most else ""
        lines.append(("Attention", f"in the last block, {_reader(look)} {_verb(look, 'pay')} {_share(shares.mean())} "
                                   f"of {whose} attention to {rest}{span} and the rest to the patches"))
    near, far = np.argmin(look.distances), np.argmax(look.distances)
    lines.append(("Reach", f"in that block, head {near + 1} looks nearest, {look.distances[near]:.0f} pixels away on "
                           f"average, and head {far + 1} farthest, {look.distances[far]:.0f} pixels; uniform attention "
                           f"would average {look.uniform:.0f}"))
    n, longest = int(look.artefacts.sum()), look.norms.max() / np.median(look.norms)
    words = f"{look.artefacts.mean():.1%} of the patches ({n:,}), framed in the figure" if n else \
        "none found"
    lines.append(("Artefacts", f"{words}; the largest token norm is {longest:.1f} times the median"))
    return lines


def _described_model(look):
    adapter = look.adapter
    n = len(adapter.layers) - 1
    words = f"{_large(look.n_parameters)} parameters, {n} {adapter.unit}{'s' * (n > 1)}"
    if look.heads is not None:
        words += f" of {len(look.heads)} heads, patches of {_size(adapter.patch_size)} pixels"
    return words


def _described_fit(look, cropped):
    words = f"{_size(look.size)} pixels (height × width); the model sees {_size(look.picture.shape[:2])}"
    if look.heads is not None:
        words += f": {_size(look.grid)} = {math.prod(look.grid):,} patches"
    if cropped and look.size != look.picture.shape[:2]:
        return f"{words}; only the centre, as in validation: the edges are cut off"
    stretched = f", stretched by {look.stretch:.1%}" if look.stretch >= 5e-4 else " or stretched"
    return f"{words}; nothing is cut off{stretched}"


def _large(number):
    return f"{number / 1e6:.1f} million" if number >= 999_500 else f"{number:,}"


def _size(sides):
    return " × ".join(map(str, sides))


def _reader(look):
    """Name the token whose attention is shown."""
    return {"cls": "CLS", "mean": "the patches"}.get(look.adapter.pool, look.adapter.pool)


def _verb(look, verb):
    return f"{verb}s" if look.adapter.pool == "cls" else verb


def _share(share):
    """Format a share in whole per cent; a small positive one as '<1%'."""
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def _prefix(look):
    """Name the tokens that are not patches, as targets of CLS, such as "itself and 4 registers"."""
    counts = {name: look.adapter.prefix.count(name) for name in look.adapter.prefix}
    alone = {"CLS": "itself" if look.adapter.pool == "cls" else "CLS"}
    return " and ".join(alone.get(name, f"the {name}") if n == 1 else f"{n} {name}s" for name, n in counts.items())


# ---- Panels -----------------------------------------------------------------------------------------------


@dataclass
class Tile:
    """A map coloured from bottom to top, or colours, over the whole photograph.

    `values` has shape (rows, columns) or (rows, columns, 3); `framed` lists the positions (row, column) to frame.
    """

    values: np.ndarray
    label: str = ""
    bottom: float = 0.0
    top: float = 1.0
    framed: tuple = ()


@dataclass
class Panel:
    """One view in the figure.

    `name` is the stem of its file name. A panel without tiles contains only text.
    """

    name: str
    title: str
    sentence: str
    tiles: list


def panels_of(look):
    """Return the Panels: the photograph, its features as colours, the side column, and the strip below."""
    height, width = look.picture.shape[:2]
    cells = f", cut into {_size(look.grid)} patches" if look.heads is not None else ""
    photograph = Panel("photograph", "The photograph", f"The whole input of the model: {height} × {width} "
                       f"pixels{cells}.", [Tile(look.picture)])
    places, where = ("patches", "Patch") if look.heads is not None else ("positions", "Last-stage")
    across = f", including across the {look.together} photographs" if look.together > 1 else ""
    colours = Panel("colours", f"{where} features as colours", f"{places.capitalize()} of similar colour have "
                    f"similar features{across}; red, green and blue are the three directions in which the features "
                    f"differ most.", [Tile(look.colours)])
    if look.heads is None:
        return [photograph, colours, _explanation_panel(look), _stages_panel(look)]
    return [photograph, colours, _norms_panel(look), _explanation_panel(look), _heads_panel(look)]


def _heads_panel(look):
    tiles = [Tile(grid, f"head {head}" + (f" ({_share(share)})" if look.adapter.n_prefix else ""), top=clip_at(grid))
             for head, (grid, share) in enumerate(zip(look.heads, look.elsewhere, strict=True), start=1)]
    instead = _prefix(look).replace("itself", "CLS itself")
    share = f"; the number in brackets is the share that goes to {instead}" if look.adapter.n_prefix else ""
    who = {"cls": "CLS looks", "mean": "the patches look, on average,"}.get(look.adapter.pool, f"{_reader(look)} look")
    return Panel("heads", f"Where {who} in the last block, head by head", f"Bright patches get the most attention; "
                 f"each head has its own colour scale, which ends at its 99th percentile{share}.", tiles)


def _norms_panel(look):
    bottom, top = look.norms.min(), clip_at(look.norms)
    places = [tuple(place) for place in np.argwhere(look.artefacts)]
    found = (f"the framed {look.artefacts.mean():.1%} may be artefacts, which hold something other than their patch"
             if places else "no token has a much larger norm than the others: no sign of artefacts")
    return Panel("norms", "Token norms", f"Dark is {bottom:.3g}, bright is {top:.3g} or more; "
                 f"{found}.", [Tile(look.norms, bottom=bottom, top=max(top, bottom + 1e-9), framed=places)])


def _explanation_panel(look):
    if look.explanation is None:
        title = "No class to explain" if look.probabilities is None else "No explanation"
        return Panel("explanation", title, f"{look.refused[:1].upper()}{look.refused[1:]}.", [])
    (label, probability), = look.likeliest(1)
    places, method = ("patches", "relevance") if look.heads is not None else ("positions", "Grad-CAM")
    return Panel("explanation", f"Evidence for the class “{label}”", f"Yellow {places} support this class most, "
                 f"as measured by {method}, and grey ones do not; its probability is {_share(probability)}.",
                 [Tile(_coloured(look.picture, look.explanation))])


def _stages_panel(look):
    names = ["patches" if look.adapter.windowed else "stem", *(f"stage {i}" for i in range(1, len(look.stages)))]
    tiles = [Tile(colours, f"{name}: {_size(colours.shape[:2])}")
             for name, colours in zip(names, look.stages, strict=True)]
    rest = ("the attention of a Swin Transformer stays within windows, so it is shown patch by patch, in the page"
            if look.adapter.windowed else "a CNN has no attention to show")
    return Panel("stages", "Features after each stage as colours", f"From stage to stage there are fewer positions, "
                 f"and each one sees more of its surroundings; {rest}.", tiles)


def _coloured(picture, grid):
    """Lay a map (rows, columns) over the grey picture (height, width, 3).

    The picture stays grey at positions where the map is 0. The colours grow stronger up to the map's 99th percentile.
    """
    light = torch.from_numpy(grid / clip_at(grid)).clamp(0, 1).float()[None, None]
    light = F.interpolate(light, picture.shape[:2], mode="bilinear")[0, 0].numpy()  # (height, width)
    strength = 0.75 * light[:, :, None]
    return strength * colormaps["viridis"](light)[:, :, :3] + (1 - strength) * picture.mean(axis=2, keepdims=True)


# ---- Drawing ----------------------------------------------------------------------------------------------


def draw_look(look, name, heading="", save_path=None):
    """Draw all panels in one Figure; `name` is the model's name, and `heading` describes the photograph."""
    photograph, colours, *side, strip = panels_of(look)
    ratio = look.picture.shape[0] / look.picture.shape[1]
    grown = 1.3 if sum(bool(panel.tiles) for panel in side) > 1 else 1.0  # beside two small maps
    big = max(min(grown * BIG, grown * TALL / ratio), SIDE)  # narrower columns for a tall photograph
    width = 2 * big + SIDE + 2 * GAP
    title = _words(name, 15, width, BOLD)
    below = [line for line in _words(heading, 11, width).split("\n") if line]
    top = MARGIN + _height(title, 15) + _height("\n".join(below), 11) + 0.15
    placed = [_Placed(photograph, ratio, MARGIN, top, big, grown * TALL),
              _Placed(colours, ratio, MARGIN + big + GAP, top, big, grown * TALL)]
    left, band = MARGIN + 2 * (big + GAP), max(one.bottom for one in placed)
    words = sum(_Placed(panel, ratio, 0, 0, SIDE, 0).bottom for panel in side) + 0.15 * (len(side) - 1)
    n_maps = max(1, sum(bool(panel.tiles) for panel in side))
    room, y = max(1.4, (band - top - words) / n_maps), top
    for panel in side:
        placed.append(_Placed(panel, ratio, left, y, SIDE, room))
        y = placed[-1].bottom + 0.15
    band = max(one.bottom for one in placed)
    placed.append(_Placed(strip, ratio, MARGIN, band + 0.25, width, STRIP))
    figure = ShownFigure(figsize=(width + 2 * MARGIN, placed[-1].bottom + MARGIN), facecolor="white")
    _write(figure, MARGIN, MARGIN, title, 15, weight="bold")
    _write(figure, MARGIN, MARGIN + _height(title, 15), "\n".join(below), 11, color="0.35")
    for one in placed:
        one.draw(figure, look.picture)
    return finish(figure, save_path)


def draw_panel(panel, look, name, save_path=None):
    """Draw one panel in its own Figure, with the model's name above it."""
    ratio, width = look.picture.shape[0] / look.picture.shape[1], 8.0 if len(panel.tiles) < 2 else 12.0
    placed = _Placed(panel, ratio, MARGIN, MARGIN + 0.3, width, 7.0 if len(panel.tiles) < 2 else 3.5)
    figure = ShownFigure(figsize=(width + 2 * MARGIN, placed.bottom + MARGIN), facecolor="white")
    _write(figure, MARGIN, MARGIN, _words(name, SENTENCE, width), SENTENCE, color="0.35")
    placed.draw(figure, look.picture)
    return finish(figure, save_path)


class _Placed:
    """A panel at its position on a page, in inches from the upper left.

    It consists of a title, rows of tiles and a sentence.
    """

    def __init__(self, panel, ratio, left, top, width, tallest):
        self.panel, self.left, self.top = panel, left, top
        self.title, self.sentence = _words(panel.title, TITLE, width, BOLD), _words(panel.sentence, SENTENCE, width)
        n = len(panel.tiles)
        label = max((len(tile.label) for tile in panel.tiles), default=0) * 0.6 * LABEL / 72
        most = min(8 if ratio < 1.3 else 12, int((width + 0.12) / (label + 0.12)))
        self.columns = math.ceil(n / math.ceil(n / most)) if n else 0
        room = (width - 0.12 * (self.columns - 1)) / max(self.columns, 1)
        self.tile = (min(room, tallest / ratio), min(room * ratio, tallest))  # (width, height)
        self.pitch = max(self.tile[0], label) + 0.12
        self.labels = 0.22 if any(tile.label for tile in panel.tiles) else 0.0
        self.first = top + _height(self.title, TITLE) + 0.05
        n_rows = math.ceil(n / self.columns) if n else 0
        self.end = self.first + n_rows * (self.labels + self.tile[1]) + 0.1 * max(n_rows - 1, 0)
        self.bottom = self.end + 0.07 + _height(self.sentence, SENTENCE)

    def draw(self, figure, picture):
        (page_width, page_height), (width, height) = figure.get_size_inches(), self.tile
        _write(figure, self.left, self.top, self.title, TITLE, weight="bold")
        for i, tile in enumerate(self.panel.tiles):
            row, column = divmod(i, self.columns)
            left = self.left + column * self.pitch
            top = self.first + row * (self.labels + height + 0.1)
            _write(figure, left, top, tile.label, LABEL)
            bottom = page_height - top - self.labels - height
            axes = figure.add_axes((left / page_width, bottom / page_height, width / page_width, height / page_height))
            axes.imshow(tile.values, cmap="viridis", vmin=tile.bottom, vmax=tile.top, extent=extent_of(picture),
                        aspect="auto")
            _frame(axes, picture, tile)
            hide_ticks(axes)
            axes.spines[:].set_visible(False)
        _write(figure, self.left, self.end + 0.07, self.sentence, SENTENCE, color="0.2")


def _frame(axes, picture, tile):
    """Draw the frames of a tile."""
    height, width = (side / n for side, n in zip(picture.shape[:2], tile.values.shape[:2], strict=True))
    for row, column in tile.framed:
        axes.add_patch(Rectangle((column * width - 0.5, row * height - 0.5), width, height, fill=False,
                                 edgecolor=VERMILION, linewidth=1.5))


def _write(figure, left, top, text, size, **style):
    page_width, page_height = figure.get_size_inches()
    figure.text(left / page_width, 1 - top / page_height, text, fontsize=size, va="top", ha="left", linespacing=1.25,
                **style)


def _words(text, size, width, letter=0.52):
    """Wrap text of this size in points to a width in inches; `letter` is a letter's width relative to its height."""
    return textwrap.fill(text, max(8, int(width * 72 / (letter * size))))


def _height(text, size):
    return (text.count("\n") + 1) * 1.3 * size / 72 if text else 0.0
