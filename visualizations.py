"""Figures for lessons and slides: numbers in, a matplotlib Figure out.

    AttentionVisualizer           where a model looks: one map, or all heads of all layers
    visualize_attention_grid      the same for several images, layer by layer
    visualize_patch_embedding     an image as a sequence of patches
    visualize_positions           how alike the position embeddings of two patches are
    compare_receptive_fields      which pixels one unit of a CNN and of a ViT sees, before and after training
    plot_images                   a contact sheet

The charts of charts.py are handed on from here.

Every function returns its Figure and writes a file only where save_path is given (.png, .pdf, .svg, ...). The
numbers come from measurements.py; nothing is computed here but the layout.

An image may be
    a picture: a path, a PIL image, an array (H, W, 3) or (H, W), uint8 or float in 0..1, or a uint8 tensor
    (3, H, W) or (1, 3, H, W);
    a model's input: a float tensor (3, H, W) or (1, 3, H, W), normalised. It is shown with the normalisation
    undone, values outside 0..1 clipped.
The normalisation is that of the model (its mean and std), or ImageNet's where nothing else is known.

Letters:  N tokens, P patch side, H, W height and width.
"""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.patches import Circle, Rectangle
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as image_functional

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
)
from cnn_model import ConvNet
from measurements import (
    attention_maps,
    check_index,
    choose_device,
    class_probabilities,
    cls_attention_grid,
    layers_of,
    position_similarity,
    radius_holding,
    receptive_field,
    select_attention,
    unit_centre,
    where_it_looks,
)
from model_zoo import create_pretrained
from recording import anatomy_of
from vit_data import NORMALISATION, FitSquare, make_shapes, open_image, to_rgb
from vit_model import InputError, PatchEmbedding, check_whole, pair

# ---- Attention --------------------------------------------------------------------------------------------


class AttentionVisualizer:
    """Figures of what the CLS token of a model attends to; with pool="mean", what its patches do on average.

    The model is moved to the device ("auto": CUDA where there is one) and stays there; its weights and its mode
    remain as they are. Where it has class_names, the figures name the class that it predicts.

    Raises InputError for a model without attention and for a device that is not there.
    """

    def __init__(self, model, device="auto"):
        anatomy_of(model)
        self.model = model.to(choose_device(device))

    def visualize_attention(self, image, layer_idx=-1, head_idx=None, save_path=None):
        """The image, the weights with which CLS attends to its patches, and those weights over the image.

        layer_idx counts from 0, or from the end where negative; head_idx too, None is the mean over the heads.
        Raises InputError for an index out of range or an image that cannot be used.
        """
        images, picture = prepare_image(image, self.model)
        maps = attention_maps(self.model, images).cpu()  # (L, 1, H, N, N)
        attention = select_attention(maps, layer_idx, head_idx)[0]  # (N, N)
        grid = cls_attention_grid(attention, *token_layout(self.model)).numpy()  # (rows, columns)
        figure = new_figure(12, 1.1 + 3.4 * proportion(picture))
        left, middle, right = figure.subplots(1, 3)
        left.imshow(picture)
        left.set_title("the image, as the model sees it" + self.describe_prediction(images))
        mappable = middle.imshow(grid, cmap="viridis", vmin=0, vmax=grid.max(), extent=extent_of(picture))
        middle.set_title(f"weight of each patch\n(of all weights: {grid.sum():.1%})")
        right.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=1)
        right.imshow(grid, cmap="viridis", vmin=0, vmax=grid.max(), alpha=0.6, extent=extent_of(picture),
                     interpolation="bilinear")
        right.set_title("the same over the image,\nsmoothed")
        figure.colorbar(mappable, ax=right, label="attention weight of a patch")
        for axes in (left, middle, right):
            hide_ticks(axes)
        n_layers, _, n_heads = maps.shape[:3]
        layer = check_index("layer_idx", layer_idx, n_layers)
        head = f"mean of {n_heads} heads"
        if head_idx is not None:
            head = f"head {check_index('head_idx', head_idx, n_heads)} (of 0 to {n_heads - 1})"
        figure.suptitle(f"{where_it_looks(self.model)}: layer {layer} (of 0 to {n_layers - 1}), {head}", fontsize=14)
        return finish(figure, save_path)

    def visualize_all_heads(self, image, layers=None, save_path=None):
        """The weights of the patches for CLS, a row for each layer and a column for each head, on one scale.

        layers: indices as layer_idx above; None: all, or six from the first to the last where there are more.
        """
        images, picture = prepare_image(image, self.model)
        maps = attention_maps(self.model, images).cpu()[:, 0]  # (L, H, N, N)
        grids = cls_attention_grid(maps, *token_layout(self.model))  # (L, H, rows, columns)
        n_layers, n_heads = grids.shape[:2]
        chosen = spread(n_layers, 6) if layers is None else [check_index("layer", i, n_layers) for i in layers]
        figure = draw_map_grid([picture] * len(chosen), grids[chosen], [f"layer {layer}" for layer in chosen],
                               [f"head {head}" for head in range(n_heads)], where_it_looks(self.model))
        return finish(figure, save_path)

    def describe_prediction(self, images):
        """A line with the class predicted and its probability; empty where the classes have no names."""
        class_names = getattr(self.model, "class_names", None)
        probabilities = class_probabilities(self.model, images)[0]  # (n_classes)
        if not class_names or len(class_names) != len(probabilities):
            return ""
        probability, label = probabilities.max(dim=0)
        return f"\npredicted: {class_names[label]} ({probability:.0%})"


def visualize_attention_grid(model, images, save_path=None):
    """Several images, a row each: the weights of the patches for what the head reads, mean over the heads.

    images: normalised, (B, 3, H, W). Six layers are shown, from the first to the last, where there are more.
    Raises InputError for a model without attention.
    """
    maps = attention_maps(model, images).cpu().mean(dim=2)  # (L, B, N, N)
    grids = cls_attention_grid(maps, *token_layout(model)).transpose(0, 1)  # (B, L, rows, columns)
    chosen = spread(grids.shape[1], 6)
    pictures = [as_picture(image, *statistics_of(model)) for image in images]
    labels = [f"layer {layer}" for layer in chosen]
    figure = draw_map_grid(pictures, grids[:, chosen], [""] * len(pictures), labels,
                           f"{where_it_looks(model)}, mean over the heads")
    return finish(figure, save_path)


def token_layout(model):
    """(grid_size, n_prefix_tokens, pool), as cls_attention_grid asks for them."""
    return model.patch_embed.grid_size, model.n_prefix_tokens, model.config.pool


def draw_map_grid(pictures, grids, row_labels, column_labels, title):
    """A Figure with a row for each picture (H, W, 3): the picture, then its maps, grids (rows of the figure,
    maps in a row, rows, columns), all on one colour scale."""
    n_rows, n_maps = grids.shape[:2]
    scale = dict(cmap="viridis", vmin=0, vmax=grids.max().item())
    side = max(0.8, min(1.6, 12 / n_maps))
    height = side * max(0.5, proportion(pictures[0])) * n_rows + 1.0
    figure = new_figure(max(6.5, side * (n_maps + 2)), max(3.0, height))
    axes = figure.subplots(n_rows, 1 + n_maps, squeeze=False)
    for picture, line, row_grids, label in zip(pictures, axes, grids, row_labels, strict=True):
        line[0].imshow(picture)
        line[0].set_ylabel(label, fontsize=11)
        for panel, grid in zip(line[1:], row_grids.numpy(), strict=True):
            mappable = panel.imshow(grid, extent=extent_of(picture), **scale)
    for panel, label in zip(axes[0], ["image", *column_labels], strict=True):
        panel.set_title(label, fontsize=11)
    for panel in axes.flat:
        hide_ticks(panel)
    figure.colorbar(mappable, ax=axes, label="attention weight of a patch")
    figure.suptitle(title, fontsize=14)
    return figure


def visualize_positions(model, save_path=None):
    """How alike the position embeddings are: one small map a patch, its cosine similarity to all patches.

    ViT paper, Fig. 7 (centre). At most 8 x 8 of the patches have a map. Raises InputError for a model without
    position embeddings.
    """
    similarity = position_similarity(model).cpu().numpy()  # (rows, columns, rows, columns)
    rows, columns = (spread(n, 8) for n in similarity.shape[:2])
    figure = new_figure(2.5 + 0.75 * len(columns), 1.5 + 0.75 * len(rows) * proportion(similarity))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            mappable = axes[i, j].imshow(similarity[row, column], cmap="cividis", vmin=-1, vmax=1)
            hide_ticks(axes[i, j])
            if j == 0:
                axes[i, j].set_ylabel(row, fontsize=11)
            if i == len(rows) - 1:
                axes[i, j].set_xlabel(column, fontsize=11)
    figure.colorbar(mappable, ax=axes, label="cosine similarity")
    figure.supxlabel("column of the patch")
    figure.supylabel("row of the patch")
    figure.suptitle("Position embeddings: similarity of one patch to all", fontsize=14)
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

    models     name -> trained model; None: the ConvNet and the ViT that create_pretrained has. The untrained
               ones are made anew from their configurations, from seed 0
    images     over which the gradients are averaged, (B, 3, H, W), normalised for all the models; None: 32 drawn
               shapes, at the size and in the normalisation of each model

    A row for each model, a column for each of four depths. One colour scale throughout, and it is logarithmic;
    white pixels have exactly no influence. The radii, of the circles too, hold 50% and 90% of the mass as it
    is. Raises InputError as create_pretrained and measurements.receptive_field do.
    """
    if models is None:
        models = {"ConvNet": create_pretrained("convnet_shapes"), "ViT": create_pretrained("vit_nano_shapes")}
    rows = []
    for name, model in models.items():
        own_images = shapes_for(model, 32) if images is None else images
        rows += [(f"{name}, untrained", untrained_copy(model), own_images),
                 (f"{name}, trained", model, own_images)]
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
    figure.suptitle("Which pixels one unit in the centre sees (axes and radii in pixels)\n"
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
    start = "patch embedding" if isinstance(layers[0], PatchEmbedding) else "stem"
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
    height, width = pair(model.config.img_size)
    images = make_shapes(n_images, max(height, width, 8)).images  # (n_images, 3, S, S)
    images = image_functional.center_crop(images, [height, width])  # (n_images, 3, H, W)
    return normalise(images, *statistics_of(model))


# ---- A contact sheet --------------------------------------------------------------------------------------


def plot_images(images, titles=None, columns=8, save_path=None, title=None, mean=None, std=None):
    """A contact sheet: images of any kind, or a batch (N, 3, H, W), with a title above each.

    Raises InputError where there are no images, or another number of titles.
    """
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
        figure.suptitle(title, fontsize=14)
    return finish(figure, save_path)


# ---- Images -----------------------------------------------------------------------------------------------


def prepare_image(image, model):
    """(what the model is fed, what it looks like): a tensor (1, 3, H, W) and an array (H, W, 3) in 0..1.

    A picture is resized and its centre cut to the model's img_size, as the validation images are; a float
    tensor must have that size. Raises InputError for an image that cannot be used.
    """
    if model.config.in_channels != 3:
        raise InputError(f"the model takes images of {model.config.in_channels} channels; expected 3, build it "
                         f"with in_channels=3 to give it pictures")
    size, (mean, std) = pair(model.config.img_size), statistics_of(model)
    if is_input(image):
        images = as_batch(image)
        if tuple(images.shape[2:]) != size:
            raise InputError(f"got a tensor of {images.shape[2]}x{images.shape[3]} pixels, expected "
                             f"{size[0]}x{size[1]}; resize it, or give a picture, which is resized here")
    else:
        picture = fit_picture(open_picture(image), size, getattr(model, "interpolation", None) or "bilinear")
        images = normalise(image_functional.pil_to_tensor(picture).unsqueeze(0), mean, std)  # (1, 3, H, W)
    return images, undo_normalisation(images, mean, std)


def as_picture(image, mean=None, std=None):
    """An image of any kind as an array (H, W, 3) in 0..1, at its own size."""
    if is_input(image):
        return undo_normalisation(as_batch(image), mean, std)
    return np.asarray(open_picture(image)) / 255


def is_input(image):
    """Whether the image is a model's input, a float tensor, and not a picture."""
    return isinstance(image, torch.Tensor) and image.is_floating_point()


def as_batch(image):
    """A tensor (3, H, W) or (1, 3, H, W) as (1, 3, H, W) on the CPU. Raises InputError for another shape, NaN
    or infinity."""
    if tuple(image.shape[:-2]) not in ((3,), (1, 3)) or image.numel() == 0:
        raise InputError(f"got a tensor of shape {tuple(image.shape)}, expected (3, H, W) or (1, 3, H, W); give "
                         f"one image, such as images[0]")
    batch = image.detach().cpu().reshape(1, *image.shape[-3:])  # (1, 3, H, W)
    if is_input(batch) and not batch.isfinite().all():
        raise InputError("the image has values that are not finite; expected a normalised float tensor, check how "
                         "it was made")
    return batch.float() if is_input(batch) else batch


def open_picture(image):
    """A picture of any kind as an upright PIL image in RGB. Raises InputError for what is no picture."""
    if isinstance(image, (str, Path)):
        return open_image(image)
    if isinstance(image, Image.Image):
        try:
            return to_rgb(ImageOps.exif_transpose(image))
        except OSError as error:
            raise InputError(f"the PIL image cannot be read ({error}); replace its file by a sound one") from error
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        return image_functional.to_pil_image(as_batch(image)[0])
    if isinstance(image, np.ndarray) and image.size and (image.ndim == 2 or image.shape[2:] in ((3,), (4,))):
        if np.issubdtype(image.dtype, np.floating):
            low, high = image.min(), image.max()
            if not (low >= 0 and high <= 1):
                raise InputError(f"got a float array with values from {low:.3g} to {high:.3g}, expected 0..1; "
                                 f"scale it, or give a normalised image as a torch tensor")
            image = (image * 255).round().astype(np.uint8)
        if image.dtype == np.uint8:
            return to_rgb(Image.fromarray(image))
    kind = type(image).__name__
    if hasattr(image, "shape"):
        kind = f"{kind} of {image.dtype} and shape {tuple(image.shape)}"
    raise InputError(f"got a {kind}, which is no image; expected a path, a PIL image, an array (H, W, 3) or "
                     f"(H, W), uint8 or float in 0..1, or a tensor (3, H, W)")


def fit_picture(image, size, interpolation="bilinear"):
    """A PIL image resized and its centre cut to size, (height, width), as the validation images are.

    Where the size is no square, which those always are, the picture just covers it.
    """
    height, width = size
    if height == width:
        return FitSquare(height, interpolation)(image)
    return ImageOps.fit(image, (width, height), Image.Resampling[interpolation.upper()])


def statistics_of(model):
    """(mean, std) of the images that the model was trained on, or ImageNet's where it has none."""
    mean, std = getattr(model, "mean", None), getattr(model, "std", None)
    return NORMALISATION["folder"] if mean is None or std is None else (mean, std)


def normalise(images, mean, std):
    """uint8 (B, 3, H, W) -> normalised float32, the same shape."""
    return image_functional.normalize(images.float() / 255, list(mean), list(std))


def undo_normalisation(images, mean=None, std=None):
    """A normalised tensor (1, 3, H, W) as an array (H, W, 3), clipped to 0..1; ImageNet's statistics for None."""
    imagenet_mean, imagenet_std = NORMALISATION["folder"]
    mean = torch.tensor(imagenet_mean if mean is None else tuple(mean)).view(3, 1, 1)
    std = torch.tensor(imagenet_std if std is None else tuple(std)).view(3, 1, 1)
    return (images[0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()  # (H, W, 3)


# ---- Panels -----------------------------------------------------------------------------------------------


def spread(n, most):
    """At most `most` of the indices 0 .. n - 1, evenly from the first to the last."""
    return sorted({round(i * (n - 1) / max(min(n, most) - 1, 1)) for i in range(min(n, most))})


def proportion(picture):
    """Height over width, kept within what a figure bears."""
    return min(2.5, max(0.4, picture.shape[0] / picture.shape[1]))


def extent_of(picture):
    """The frame in which a coarser map lies over the picture, for imshow."""
    height, width = picture.shape[:2]
    return (-0.5, width - 0.5, height - 0.5, -0.5)
