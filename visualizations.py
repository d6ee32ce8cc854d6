"""Figures for lessons and slides: numbers in, a matplotlib Figure out.

    python visualizations.py selfcheck                       what holds of a model's views, method by method
    python visualizations.py explore PHOTO ... --pretrained NAME     a page to play with

    visualize_patch_embedding     an image as a sequence of patches
    visualize_patch_filters       what the patch projection looks for
    visualize_positions           how alike the position embeddings of two patches are
    visualize_features            what patch tokens hold, as colours, over several images
    compare_receptive_fields      which pixels one unit of a CNN and of a ViT sees, before and after training
    plot_images                   a contact sheet

The charts of charts.py and the views of attention_views.py, AttentionVisualizer among them, are handed on from here.

Every function returns its Figure and writes a file only where save_path is given (.png, .pdf, .svg, ...), but for
compare_receptive_fields, which writes receptive_fields.png unless it is given another save_path, or None. The numbers
come from measurements.py and explanations.py; nothing is computed here but the layout.

Letters:  B images, P patch side, H, W height and width.
"""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.patches import Circle, Rectangle
from torchvision.transforms.v2 import functional as image_functional

from attention_views import AttentionVisualizer, visualize_attention_grid  # noqa: F401 - handed on
from charts import (  # noqa: F401 - some are handed on
    BLUE,
    COLOURS,
    GREEN,
    ORANGE,
    VERMILION,
    finish,
    hide_ticks,
    new_figure,
    plot_bars,
    plot_confusion,
    plot_curves,
    plot_histories,
    plot_matrices,
    plot_training_curves,
    save_figure,
    set_heading,
)
from cnn_model import ConvNet
from command_line import OneLineParser, script, whole
from drawn_shapes import TEST_START
from explanations import feature_colours, patch_filters, selfcheck
from explorer import explore
from measurements import layers_of, position_similarity, radius_holding, receptive_field, unit_centre
from model_zoo import create_pretrained
from pictures import (
    as_batch,
    as_picture,
    fit_picture,
    input_of,
    is_input,
    normalise,
    open_picture,
    prepare_images,
    proportion,
    spread,
    statistics_of,
    undo_normalisation,
)
from recording import anatomy_of, record
from vit_data import make_shapes
from vit_model import InputError, PatchEmbedding, VisionTransformer, check_whole, pair

# ---- What a model has learned -----------------------------------------------------------------------------


def visualize_patch_filters(model, n_filters=28, save_path=None):
    """The principal components of the filters with which patches become tokens, the strongest first.

    Each has a scale of its own, grey is zero; below it the share of the squares that it holds. ViT paper, Fig. 7
    (left). Raises InputError for a model whose first layer is no projection of patches, and unless its images have 1
    or 3 channels.
    """
    filters, shares = patch_filters(model, n_filters)  # (n, C, P, P), (n)
    if filters.shape[1] not in (1, 3):
        raise InputError(f"the filters of this {type(model).__name__} have {filters.shape[1]} channels; expected 1 or "
                         f"3, which can be drawn; explanations.patch_filters gives the numbers of all")
    columns = min(7, len(filters))
    n_rows = math.ceil(len(filters) / columns)
    figure = new_figure(1.2 * columns + 0.6, 1.45 * n_rows + 1.1)
    panels = figure.subplots(n_rows, columns, squeeze=False).flat
    for axes in panels:
        axes.set_axis_off()
    for axes, one, share in zip(figure.axes, filters, shares.tolist(), strict=False):
        axes.imshow((0.5 + one / one.abs().max() / 2).permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"{share:.1%}", fontsize=10)
    set_heading(figure, f"Filters of the patch projection: the first {len(filters)} principal components\n"
                    f"(shares of all; these together {shares.sum():.0%})", fontsize=12)
    return finish(figure, save_path)


def visualize_features(model, images, save_path=None):
    """Patch tokens of several images as colours: their three main directions after three blocks, over all images.

    images: a list of them, or a normalised batch (B, 3, H, W). Alike in colour is alike in content, across the images,
    within one row.
    """
    images = prepare_images(images, model)
    seen = record(model, images)
    first = seen.anatomy.n_prefix
    depths = spread(len(seen.tokens), 4)[1:]
    colours = [feature_colours(seen.tokens[depth][:, first:].unflatten(1, seen.grid)) for depth in depths]
    pictures = [as_picture(image, *statistics_of(model)) for image in images]
    figure = new_figure(1.0 + 1.6 * len(pictures), 1.0 + 1.6 * proportion(pictures[0]) * (1 + len(depths)))
    panels = figure.subplots(1 + len(depths), len(pictures), squeeze=False)
    for axes, picture in zip(panels[0], pictures, strict=True):
        axes.imshow(picture)
    for line, depth, rows in zip(panels[1:], depths, colours, strict=True):
        line[0].set_ylabel(f"after block {depth}\n(of {len(seen.tokens) - 1})", fontsize=11)
        for axes, one in zip(line, rows.numpy(), strict=True):
            axes.imshow(one)
    for axes in panels.flat:
        hide_ticks(axes)
    set_heading(figure, "Patch tokens as colours: their three main directions as red, green and blue", fontsize=12)
    return finish(figure, save_path)


def visualize_positions(model, save_path=None):
    """How alike the position embeddings are: one small map a patch, its cosine similarity to all patches.

    ViT paper, Fig. 7 (centre); all maps share one scale, from the least similarity to 1. At most 8 x 8 of the patches
    have a map. Raises InputError for a model without position embeddings.
    """
    similarity = position_similarity(model).cpu().numpy()  # (rows, columns, rows, columns)
    lowest = min(similarity.min(), 0.99)  # a scale also where all are alike
    rows, columns = (spread(n, 8) for n in similarity.shape[:2])
    figure = new_figure(2.5 + 0.75 * len(columns), 1.5 + 0.75 * len(rows) * proportion(similarity))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            mappable = axes[i, j].imshow(similarity[row, column], cmap="cividis", vmin=lowest, vmax=1)
            hide_ticks(axes[i, j])
            if j == 0:
                axes[i, j].set_ylabel(row, fontsize=11)
            if i == len(rows) - 1:
                axes[i, j].set_xlabel(column, fontsize=11)
    figure.colorbar(mappable, ax=axes, label="cosine similarity")
    figure.supxlabel("column of the patch")
    figure.supylabel("row of the patch")
    set_heading(figure, "Position embeddings: similarity of one patch to all", fontsize=14)
    return finish(figure, save_path)


# ---- Patches ----------------------------------------------------------------------------------------------


def visualize_patch_embedding(image, patch_size=16, save_path=None, img_size=None, mean=None, std=None):
    """An image with the grid of its patches, and the patches as the sequence that a ViT reads.

    image      of any kind; a float tensor is shown with the normalisation mean, std undone
    img_size   a picture is resized and its centre cut to this side or (height, width); None: a picture with a
               shorter side above 224 to 224 x 224, a smaller one keeps its size. Tensors keep theirs
    Sides that are no whole number of patches lose the rest, half of it at each edge. Raises InputError for an
    image smaller than a patch, or of more than 4096 patches.
    """
    picture = picture_to_cut(image, img_size, mean, std)
    patch = pair(patch_size, "patch_size")
    picture, (rows, columns) = cut_to_patches(picture, patch)
    n = rows * columns
    figure = new_figure(11, 6.6)
    top, bottom = figure.subfigures(2, 1, height_ratios=(2.6, 1))
    whole, numbered = top.subplots(1, 2)
    whole.imshow(picture)
    whole.set_title(f"the image: {picture.shape[0]} x {picture.shape[1]} pixels, 3 colours")
    numbered.imshow(picture)
    lines = dict(color="white", linewidth=max(0.3, min(1.5, 20 / max(rows, columns))))
    numbered.vlines(np.arange(1, columns) * patch[1] - 0.5, -0.5, picture.shape[0] - 0.5, **lines)
    numbered.hlines(np.arange(1, rows) * patch[0] - 0.5, -0.5, picture.shape[1] - 0.5, **lines)
    numbered.set_title(f"cut into {rows} x {columns} = {n} patches")
    chosen = spread(n, 12)
    boxes = bottom.subplots(1, len(chosen), squeeze=False)[0]
    for axes, index in zip(boxes, chosen, strict=True):
        row, column = divmod(index, columns)
        y, x = row * patch[0], column * patch[1]
        axes.imshow(picture[y:y + patch[0], x:x + patch[1]], vmin=0, vmax=1)
        axes.set_title(index + 1, fontsize=12)
        numbered.add_patch(Rectangle((x - 0.5, y - 0.5), patch[1], patch[0], fill=False, edgecolor=ORANGE,
                                     linewidth=2.5, zorder=3))
    for axes in (whole, numbered, *boxes):
        hide_ticks(axes)
    which = "all of them" if len(chosen) == n else f"{len(chosen)} of them, framed above"
    bottom.suptitle(f"read row by row as a sequence ({which})", fontsize=12)
    numbers = patch[0] * patch[1] * 3
    top.suptitle(f"{n} patches, each of {patch[0]} x {patch[1]} x 3 = {numbers} numbers", fontsize=14)
    return finish(figure, save_path)


def picture_to_cut(image, img_size, mean, std):
    """The picture (H, W, 3) in 0..1 of visualize_patch_embedding, before the cut to whole patches."""
    if is_input(image):
        return undo_normalisation(as_batch(image), mean, std)
    image = open_picture(image)
    if img_size is None and min(image.size) > 224:
        img_size = 224
    if img_size is not None:
        image = fit_picture(image, pair(img_size))
    return np.asarray(image) / 255


def cut_to_patches(picture, patch):
    """The middle of the picture (H, W, 3) that holds whole patches, and their (rows, columns)."""
    height, width = picture.shape[:2]
    rows, columns = height // patch[0], width // patch[1]
    if not 1 <= rows * columns <= 4096:
        raise InputError(f"patches of {patch[0]}x{patch[1]} cut an image of {height}x{width} pixels into "
                         f"{rows * columns}; expected 1 to 4096 of them, choose another patch_size")
    top, left = (height - rows * patch[0]) // 2, (width - columns * patch[1]) // 2
    return picture[top:top + rows * patch[0], left:left + columns * patch[1]], (rows, columns)


# ---- Receptive fields -------------------------------------------------------------------------------------


def compare_receptive_fields(save_path="receptive_fields.png", models=None, images=None):
    """Measured receptive fields of CNN and ViT beside each other, each before and after training.

    models     name -> trained model, a ConvNet or a ViT; None: the ConvNet and the ViT that create_pretrained has. The
               untrained ones are made anew from their configurations, from seed 0; a ViT of another library, whose
               beginning is not known here, is shown trained alone
    images     over which the gradients are averaged, (B, 3, H, W), normalised for all the models; None: 32 drawn
               shapes, at the size and in the normalisation of each model

    A row for each model, a column for each of four depths. One colour scale throughout, and it is logarithmic;
    white pixels have exactly no influence. The radii, of the circles too, hold 50% and 90% of the mass as it
    is. Raises InputError as create_pretrained and measurements.receptive_field do, and for models without names.
    """
    if models is None:
        models = {"ConvNet": create_pretrained("convnet_shapes"), "ViT": create_pretrained("vit_nano_shapes")}
    if not isinstance(models, dict) or not models:
        raise InputError(f"models is {'empty' if isinstance(models, dict) else f'a {type(models).__name__}'}; expected "
                         f"name -> trained model, such as {{'ViT': model}}")
    rows = []
    for name, model in models.items():
        own_images = shapes_for(model, 32) if images is None else images
        if isinstance(model, (VisionTransformer, ConvNet)):
            rows.append((f"{name}, untrained", untrained_copy(model), own_images))
        rows.append((f"{name}, trained", model, own_images))
    figure = new_figure(11, 2.7 * len(rows) + 0.7)
    panels = figure.subplots(len(rows), 4, squeeze=False)
    scale = LogNorm(1e-6, 1e-1)
    for (name, model, own_images), line in zip(rows, panels, strict=True):
        for i, (depth, axes) in enumerate(zip(four_depths(model), line, strict=True)):
            if depth is None:
                axes.set_axis_off()
                continue
            mappable = draw_field(axes, model, own_images, depth, scale)
            if i == 0:
                axes.set_ylabel(name, fontsize=12)
    colorbar = figure.colorbar(mappable, ax=panels, shrink=min(0.9, 3 / len(rows)), aspect=30, extend="both")
    colorbar.set_label("share of each pixel (log scale; white: exactly 0)", fontsize=12)
    set_heading(figure, "Which pixels one unit in the centre sees (axes and radii in pixels)\n"
                    "circles hold 50% (solid) and 90% (dashed) of the gradient", fontsize=14)
    return finish(figure, save_path)


def draw_field(axes, model, images, depth, scale):
    """One receptive field with its two circles; returns what a colour bar needs."""
    field = receptive_field(model, images, depth)  # (height, width)
    centre = unit_centre(model, field.shape, depth)
    half, most = (radius_holding(field, share, centre) for share in (0.5, 0.9))
    mappable = axes.imshow(np.ma.masked_equal(field.numpy(), 0), cmap="viridis", norm=scale)
    for radius, style in ((half, "-"), (most, "--")):
        axes.add_patch(Circle(centre[::-1], radius, fill=False, color=VERMILION, linewidth=1.8, linestyle=style))
    layers = layers_of(model)
    unit = "stage" if isinstance(model, ConvNet) else "block"
    start = "patch embedding" if isinstance(layers[0], (PatchEmbedding, torch.nn.Conv2d)) else "stem"
    place = f"after {unit} {depth} of {len(layers) - 1}" if depth else f"after the {start}"
    axes.set_title(f"{place}\n50%: {half:.1f}   90%: {most:.1f} px", fontsize=11)
    axes.set(xlim=(-0.5, field.shape[1] - 0.5), ylim=(field.shape[0] - 0.5, -0.5))
    axes.set_xticks([0, field.shape[1] - 1])
    axes.set_yticks([0, field.shape[0] - 1])
    axes.tick_params(labelsize=9)
    return mappable


def four_depths(model):
    """0, 1, one halfway and the last, as far as the model has them; None for each that it lacks."""
    last = len(layers_of(model)) - 1
    depths = sorted({0, 1, (1 + last) // 2, last})
    return depths + [None] * (4 - len(depths))


def untrained_copy(model):
    """A new model of the same configuration, from seed 0, with the same normalisation; torch's own random
    state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        fresh = type(model)(**vars(model.config))
    fresh.mean, fresh.std = statistics_of(model)
    return fresh.eval()


def shapes_for(model, n_images):
    """Drawn shapes at the size and in the normalisation of the model, (n_images, 3, H, W)."""
    height, width = input_of(model)[1]
    images = make_shapes(n_images, max(height, width, 8)).images  # (n_images, 3, S, S)
    images = image_functional.center_crop(images, [height, width])  # (n_images, 3, H, W)
    return normalise(images, *statistics_of(model))


# ---- A contact sheet --------------------------------------------------------------------------------------


def plot_images(images, titles=None, columns=8, save_path=None, title=None, mean=None, std=None):
    """A contact sheet: a list of images of any kind, or a batch (N, 3, H, W), with a title above each.

    Raises InputError where there are no images, for one that is in no list, and for another number of titles.
    """
    if isinstance(images, (str, Path)) or (isinstance(images, np.ndarray) and images.shape[2:] in ((), (3,), (4,))):
        what = f"an array of shape {images.shape}" if isinstance(images, np.ndarray) else repr(str(images))
        raise InputError(f"got {what}, one image; expected several, give a list, such as [image]")
    pictures = [as_picture(image, mean, std) for image in images]
    titles = [""] * len(pictures) if titles is None else [str(text) for text in titles]
    if not pictures or len(titles) != len(pictures):
        raise InputError(f"{len(pictures)} images and {len(titles)} titles do not make a sheet; expected at least "
                         f"one image and a title for each, or titles=None")
    check_whole("columns", columns, 1)
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    lines = max(text.count("\n") + 1 if text else 0 for text in titles)
    figure = new_figure(max(1.5 * columns, 4), rows * (1.5 + 0.2 * lines) + (0.5 if title else 0))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.set_axis_off()
    for panel, picture, text in zip(panels, pictures, titles, strict=False):
        panel.imshow(picture)
        panel.set_title(text, fontsize=10, parse_math=False)  # names of classes may hold a $
    if title:
        set_heading(figure, title, fontsize=14)
    return finish(figure, save_path)


# ---- The commands -----------------------------------------------------------------------------------------


def run_selfcheck(options):
    """Prints what holds of a model; ends with 1 where something does not."""
    model = create_pretrained(options.pretrained)
    anatomy_of(model)
    checks = selfcheck(model, prepare_images(images_for(model, options.photos, 4), model))
    words = {True: "holds", False: "DOES NOT HOLD", None: "does not apply"}
    for check in checks:
        print(f"{words[check.holds]}: {check.name} ({check.found})")
    if any(check.holds is False for check in checks):
        raise SystemExit(1)


def run_explore(options):
    model = create_pretrained(options.pretrained)
    other = create_pretrained(options.compare_with) if options.compare_with else None
    names = [options.pretrained, *[options.compare_with] * bool(options.compare_with)]
    page = explore(model, images_for(model, options.photos, options.n_images), options.output, other, names)
    sizes = dict.fromkeys(input_of(one)[1] for one in (model, other) if one is not None)
    shape = "square" if all(height == width for height, width in sizes) else "to that shape"
    print(f"{page.path}: {len(page.html) / 2**20:.1f} MiB, to be opened in any browser. Images are shown as "
          f"{'each' if other else 'the'} model sees them, {' and '.join('{} x {}'.format(*size) for size in sizes)} "
          f"pixels, cut {shape} from their middle; a model knows no classes but its own.")


def images_for(model, photos, n_images):
    """The photographs given, or drawn shapes, as pictures: each model normalises them for itself."""
    return photos or list(make_shapes(n_images, max(*input_of(model)[1], 8), start=TEST_START).images)


def main(argv=None):
    parser = OneLineParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, words in (("selfcheck", run_selfcheck, "the closed forms, on a model"),
                             ("explore", run_explore, "a page to play with")):
        command = commands.add_parser(name, help=words)
        command.add_argument("photos", nargs="*", help="image files (default: drawn shapes)")
        command.add_argument("--pretrained", "--checkpoint", default="vit_nano_shapes", metavar="NAME",
                             help="the model: a name of model_zoo.py, or a checkpoint (default: %(default)s, which "
                                  "knows ten drawn shapes and nothing else)")
        command.set_defaults(run=run)
    command.add_argument("--compare-with", metavar="NAME", help="a second model beside it, a ViT or a ConvNet")
    command.add_argument("--output", default="attention.html", help="where the page is written (default: %(default)s)")
    command.add_argument("--n-images", type=whole(1), default=6, help="of drawn shapes (default: %(default)s)")
    options = parser.parse_args(argv)
    options.run(options)


if __name__ == "__main__":
    script(main)
