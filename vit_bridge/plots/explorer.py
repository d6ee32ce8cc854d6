"""Attention to play with: one self-contained HTML page, without server or network, of images and one or two models.

    explore(model, images, save_path, compare_with=None)    AttentionVisualizer.explore is the same

The page holds the attention of every layer and head, rollout and relevance for the predicted class, as bytes with a
factor for each row, and names the largest rounding error. Of a ConvNet it holds instead which patches of the image each
unit sees, depth by depth. explorer.html is the template.

Shapes:  L layers, H heads, N tokens (prefix tokens, then patches), n patches, K classes,
         m matrices, H, W height and width of an image, D channels.
"""

import base64
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
import torch
from PIL import Image

from vit_bridge.analysis.capture import capture, check_finite_numbers, differentiable, watch_layer
from vit_bridge.analysis.explanations import logit_lens, relevance_gained, rollout
from vit_bridge.data.images import is_input, prepare_image
from vit_bridge.errors import InputError, check_int
from vit_bridge.models.adapters import adapt, adapt_vit, check_pool
from vit_bridge.models.protocol import class_name
from vit_bridge.runtime import class_probabilities, unwrapped
from vit_bridge.system import write_whole

PAGE = Path(__file__).with_name("explorer.html")  # $NAME stands for data, colours and title
N_CLASSES = 6  # of the logit lens


@dataclass
class ExplorerPage:
    """A page: its HTML, where it was written (None: nowhere), the largest quantisation error. A notebook shows it."""
    html: str
    path: Path | None
    quantisation_error: float

    def _repr_html_(self):
        return (f'<iframe srcdoc="{html.escape(self.html, quote=True)}" width="100%" height="900" '
                f'style="border:0" title="attention explorer"></iframe>')


@differentiable()
def explore(model, images, save_path="attention.html", compare_with=None, names=None, title="Where a ViT looks"):
    """An ExplorerPage of images, written to save_path where that is given.

    images        one of what data/images.py takes, or a list of them; a float tensor is normalised for `model`, and the
                  second model is given it with its own normalisation instead
    compare_with  a second model beside it: a ViT, or a ConvNet, whose receptive field is shown at the same place
    names         of the model, and of the second one; None: their classes

    Raises InputError for a first model without attention, for images that cannot be used, and for images that the same
    model takes at different sizes.
    """
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if not images:
        raise InputError("there is no image to explore; give at least one")
    model = unwrapped(model)
    models = [model] if compare_with is None else [model, unwrapped(compare_with)]
    adapt_vit(model)
    names = list(names) if names else [class_name(one) for one in models]
    if len(names) != len(models):
        raise InputError(f"{len(names)} names were given for {len(models)} models; expected one for each")
    prepared = [[_prepare_for(image, one, model) for image in images] for one in models]
    described = [_describe(one, name, _check_one_size(name, [images for images, _ in own]))
                 for one, name, own in zip(models, names, prepared, strict=True)]
    pictures = [dict(name=_image_name(image, i), pngs=_pngs_of([picture for _, picture in own]))
                for i, (image, *own) in enumerate(zip(images, *prepared, strict=True), start=1)]
    error = max(part.pop("error") for one in described for part in one["images"])
    page = fill(dict(models=described, pictures=pictures), title, _note_of(described, pictures, error))
    if save_path is not None:
        write_whole(save_path, lambda file: file.write(page.encode()))
    return ExplorerPage(page, None if save_path is None else Path(save_path), error)


def _note_of(described, pictures, error):
    """The note at the foot of the page."""
    note = (f"Values are stored as bytes; the largest difference to the numbers themselves is {error:.2%} of the "
            f"largest value in a token's row. Relevance is shown without the 1 that each token has of "
            f"itself. All that is shown is in this file.")
    if len(described) > 1:
        note += " Layers and heads count up to the most that a model here has; one with fewer stays at its last."
    if any(len(one["pngs"]) > 1 for one in pictures):
        note += (" Each model's picture is what it is given, cut and resized as it needs it; the same place in both "
                 "pictures need not be quite the same place of a photograph.")
    return note


def fill(data, title, note):
    """The page with its data. What stands in a script may not end it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    colours = np.round(255 * matplotlib.colormaps["viridis"](np.linspace(0, 1, 64))[:, :3]).astype(int).tolist()
    page = Template(PAGE.read_text(encoding="utf-8"))
    return page.safe_substitute(TITLE=html.escape(title), NOTE=html.escape(note), DATA=text,
                                COLOURS=json.dumps(colours))


# ---- What a model does, as the page reads it --------------------------------------------------------------


def _describe(model, name, images):
    """A model and what it does with images, each (1, 3, H, W)."""
    if not adapt(model).attends:
        return _describe_convnet(model, name, images)
    adapter = adapt_vit(model)
    check_pool(adapter.pool)
    own = [_describe_image(model, adapter, one) for one in images]
    rows, columns = adapter.grid(images[0])
    maps = capture(model, images[0]).maps
    return dict(kind="vit", name=name, layers=len(maps), heads=maps[0].shape[1], tokens=maps[0].shape[-1],
                prefix=adapter.n_prefix, rows=rows, columns=columns, pool=adapter.pool, images=own)


def _describe_image(model, adapter, image):
    seen = capture(model, image, gradients=adapter.has_head)
    maps = torch.stack(seen.maps)  # (L, 1, H, N, N)
    parts = dict(attention=maps[:, 0].flatten(0, 1), rollout=rollout(maps))  # (L H, N, N), (1, N, N)
    text = _no_words()
    if adapter.has_head:
        label = seen.logits[0].argmax().item()
        gradients = torch.autograd.grad(seen.logits[0, label], seen.maps)
        parts["relevance"] = relevance_gained(maps, torch.stack(gradients))  # (1, N, N)
        text = words(logit_lens(model, image)[:, 0], adapter.class_names)
    check_finite_numbers(model, *parts.values())
    parts = {key: _pack(part) for key, part in parts.items()}
    return {key: part for key, (part, _) in parts.items()} | text | dict(error=max(e for _, e in parts.values()))


def _no_words():
    """words() of a model without a head."""
    return dict(prediction="", target="", lens=dict(classes=[], rows=[], says=[]))


def words(lens, class_names):
    """Prediction and logit lens, probabilities (L + 1, K), as the page shows them: the likeliest class after each
    block, and the probabilities there of the classes that are likeliest at the end."""
    named = class_names or [f"class {label}" for label in range(lens.shape[1])]
    shown = lens[-1].topk(min(N_CLASSES, lens.shape[1])).indices.tolist()
    best = lens.argmax(dim=1).tolist()
    says = [f"{named[label]} ({row[label]:.0%})" for label, row in zip(best, lens.tolist(), strict=True)]
    rows = [[round(value, 4) for value in row] for row in lens[:, shown].tolist()]
    return dict(prediction=says[-1], target=named[best[-1]],
                lens=dict(classes=[named[label] for label in shown], rows=rows, says=says))


def _pack(matrices):
    """({values, factors}, error): matrices (m, N, N) as bytes, each row from 0 to its largest value; and the largest
    difference that makes, relative to that value: 1 / 510 at most."""
    matrices = matrices.detach().cpu().double()
    factors = (matrices.amax(dim=2, keepdim=True) / 255).clamp(min=1e-30).float()  # (m, N, 1)
    values = (matrices / factors).round().clamp(0, 255)
    errors = (values * factors - matrices).abs() / matrices.amax(dim=2, keepdim=True).clamp(min=1e-30)
    packed = dict(values=base64.b64encode(values.to(torch.uint8).numpy().tobytes()).decode(),
                  factors=base64.b64encode(factors.numpy().astype("<f4").tobytes()).decode())
    return packed, errors.max().item()


# ---- A ConvNet beside it ----------------------------------------------------------------------------------


def _describe_convnet(model, name, images, side=8):
    """A ConvNet as the page reads it: for every depth the share of each patch of the image in the gradient of each
    unit, the image cut into side x side patches, or fewer where it has fewer pixels."""
    check_int("side", side, 1)
    n_depths = len(adapt(model).layers)
    rows, columns = (min(side, n) for n in images[0].shape[2:])
    own = []
    for image in images:
        fields = torch.stack([_unit_fields(model, image, depth, (rows, columns)) for depth in range(n_depths)])
        packed, error = _pack(fields)  # (depths, n, n)
        text, answer = _no_words(), class_probabilities(model, image).cpu()
        check_finite_numbers(model, fields, answer)
        if adapt(model).has_head:
            text = words(answer, adapt(model).class_names)
        own.append(dict(text, attention=packed, error=error))
    depths = ["the stem", *(f"stage {i}" for i in range(1, n_depths))]
    return dict(kind="cnn", name=name, layers=n_depths, heads=1, tokens=rows * columns, prefix=0, rows=rows,
                columns=columns, pool="mean", images=own, depths=depths)


def _unit_fields(model, image, depth, grid):
    """(n, n): row i is the share of every patch in the gradient of the unit at the middle of patch i, summed over its
    channels. analysis.receptive_field.receptive_field does so for the unit in the middle of the image."""
    rows = []
    pixels, features, _ = watch_layer(model, adapt(model).layers[depth], image)  # (1, 3, H, W), (1, D, rows, columns)
    for row in range(grid[0]):
        for column in range(grid[1]):
            y, x = (int((place + 0.5) / n * count) for place, n, count in zip((row, column), grid, features.shape[2:],
                                                                              strict=True))
            gradient, = torch.autograd.grad(features[0, :, y, x].sum(), pixels, retain_graph=True)
            field = torch.nn.functional.adaptive_avg_pool2d(gradient.abs().mean(dim=1), grid).flatten()  # (n)
            rows.append(field / field.sum().clamp(min=1e-30))
    return torch.stack(rows)  # (n, n)


# ---- Pictures ---------------------------------------------------------------------------------------------


def _prepare_for(image, model, first):
    """prepare_image. A float tensor is normalised for the first model; another gets it with its own normalisation, and
    the picture stays."""
    images, picture = prepare_image(image, model)  # (1, 3, H, W), (H, W, 3)
    if not is_input(image) or model is first:
        return images, picture
    mean, std, own_mean, own_std = (torch.tensor(values).view(-1, 1, 1) for one in (first, model)
                                    for values in (adapt(one).preprocessing.mean, adapt(one).preprocessing.std))
    return images * (std / own_std) + (mean - own_mean) / own_std, prepare_image(image, first)[1]


def _check_one_size(name, images):
    """The images, each (1, 3, H, W). Raises InputError unless they have one size."""
    sizes = list(dict.fromkeys(f"{image.shape[2]}x{image.shape[3]}" for image in images))
    if len(sizes) > 1:
        raise InputError(f"{name} is given images of {' and '.join(sizes)} pixels; expected one size for all images of "
                         f"a page, resize them or make a page for each size")
    return images


def _image_name(image, number):
    return Path(image).name if isinstance(image, (str, Path)) else f"image {number}"


def _as_png(picture):
    """A picture (H, W, 3) in 0..1 as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(np.round(255 * picture).astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _pngs_of(pictures):
    """A picture for each model, as data URIs; one where they are the same."""
    return list(dict.fromkeys(_as_png(picture) for picture in pictures))
