"""Look inside a Vision Transformer on your photograph: where it looks, and where its prediction comes from.

    python visualizations.py photo.jpg               one figure with all views, and an interactive page
    python visualizations.py selfcheck | explore | reconstruct     the other commands; each has --help

AttentionVisualizer holds the views of one model, as figures, as numbers and as a page (explore). The functions
visualize_..., compare_receptive_fields and plot_images draw several images or models.
Each map has its own colour scale, which ends at the 99th percentile: one patch may hold half of the weight.

Shapes:  B images, C channels, H, W height and width of an image, P patch side, L blocks, H heads, N tokens (prefix
         tokens, then patches), K classes, n filters, R random orders, S steps of a curve.
"""

import itertools
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.patches import Circle, Rectangle
from tqdm import tqdm

from vit_bridge.analysis.attention import (
    bias_by_offset,
    block_names,
    check_distilled,
    mean_distances,
    patches_of,
    position_similarity,
    rows_by_block,
    token_similarity,
    uniform_distances,
    window_groups,
)
from vit_bridge.analysis.capture import attention_maps, capture
from vit_bridge.analysis.explanations import (
    METHODS,
    area_under,
    cam_layer,
    compare_explanations,
    explain,
    feature_colours,
    logit_lens,
    patch_filters,
    token_norms,
)
from vit_bridge.analysis.receptive_field import radius_holding, receptive_field, unit_centre, untrained_copy
from vit_bridge.analysis.reconstruction import reconstruction_errors, reconstructions
from vit_bridge.analysis.selfcheck import selfcheck
from vit_bridge.analysis.windows import capture_windows, check_patch
from vit_bridge.cli import (
    Bounded,
    OneLineParser,
    Size,
    add_class_names,
    add_n_heads,
    int_at_least,
    positive,
    script,
    seed,
)
from vit_bridge.data.files import check_not_empty, files_at
from vit_bridge.data.images import (
    as_batch,
    as_picture,
    is_input,
    open_header,
    open_image,
    open_picture,
    prepare_each,
    prepare_image,
    prepare_images,
    remark_on,
    to_array,
)
from vit_bridge.data.shapes import TEST_START, make_shapes
from vit_bridge.errors import InputError, assume, check_index, check_int, join_words, pair
from vit_bridge.models.adapters import adapt, adapt_attention, adapt_vit, images_of_ours
from vit_bridge.models.beit import block_mask
from vit_bridge.models.protocol import ask, class_name
from vit_bridge.plots.charts import (
    CLOSE,
    COLOURS,
    DASHES,
    MARKERS,
    ORANGE,
    THICK,
    VERMILION,
    clip_at,
    clip_between,
    colour_bar,
    draw_map,
    extent_of,
    finish,
    hide_ticks,
    in_digits,
    looks_of,
    n_covered_by,
    new_figure,
    percent,
    proportion,
    set_heading,
    shared_bar,
    show_legend,
    spread,
    widths,
    wrapped,
)
from vit_bridge.plots.explorer import explore, is_page
from vit_bridge.plots.look import describe, draw_look, draw_panel, look, panels_of, share_colours
from vit_bridge.preprocessing import FitSize, Whole, describe_size
from vit_bridge.runtime import (
    OutOfMemory,
    at_least_float32,
    choose_device,
    class_probabilities,
    device_of,
    evaluating,
    explain_out_of_memory,
    to_model,
    unwrapped,
)
from vit_bridge.system import unless_empty, write_json, write_whole
from vit_bridge.weights.checkpoints import load
from vit_bridge.weights.pretrained import FIRST_LOOK, PUBLIC, WITH_CLASSES, WITHOUT_NETWORK, NotFetched
from vit_model import grid_of

TITLES = {"attention": "attention of the last block", "rollout": "attention rollout", "relevance": "relevance",
          "grad_cam": "Grad-CAM"}
SAME_FOR_EVERY_CLASS = ("attention", "rollout")  # these METHODS ignore the class; their weights sum to one
SHORT = {"register": "reg.", "distillation token": "dist."}  # short names for small panels


class AttentionVisualizer:
    """Views of a ViT: where it looks, and where its prediction comes from.

    By default, the views show what the classifier head reads: CLS or, with pool="mean", the mean of the patches. A Swin
    Transformer has no such row, so its views of attention need a `patch`, and its explanation is Grad-CAM.
    attention_maps, rollout, relevance, grad_cam and attention_distance return numbers; visualize_... return a Figure.

    Parameters
    ----------
    model : nn.Module
        A ViT or a Swin Transformer, ours or from timm, transformers or torchvision. It is moved to the device and stays
        there; its weights and its mode do not change.
    device : str, optional
        "auto" uses a CUDA GPU if there is one, otherwise an Apple GPU, otherwise the CPU.
    whole : Whole, optional
        By default, the model sees the centre of a photograph, as in validation. With
        `vit_bridge.preprocessing.Whole()`, it sees the whole photograph in its own proportions; set
        `model.any_size = True` first.

    Raises
    ------
    InputError
        If the model has no attention, or if the device does not exist.

    Notes
    -----
    `image` is a file, a PIL image, an array or a tensor (see data/images.py); `images` is a list of them or a
    normalised batch (B, C, height, width). `target` is a class number or name, by default the predicted class.
    `layer_idx` and `head_idx` are Python indices from 0, and `patch` is (row, column) from 0; figures count blocks and
    heads from 1. The blocks of a Swin Transformer count through all stages, and its `patch` is one of the first stage;
    later stages show the token that holds it. `save_path` ends in .png, .pdf or .svg; None writes no file.
    """

    def __init__(self, model, device="auto", whole=None):
        adapt_attention(model)
        device_of(model)  # refuses a model on the device "meta"
        self.model, self.whole = unwrapped(model).to(choose_device(device)), whole

    @property
    def adapter(self):
        """The adapter of the model as it is now: its head and class names may have changed."""
        return adapt_attention(self.model)

    # ---- Numbers

    def attention_maps(self, image):
        """Return the attention maps of an image, (L, H, N, N); rows are queries and sum to one."""
        return attention_maps(self.model, prepare_image(image, self.model, self.whole)[0])[:, 0].cpu()

    def rollout(self, image, discard_ratio=0.0):
        """Return the attention rollout of the tokens that the classifier head reads, (rows, columns)."""
        return self.explain(image, "rollout", discard_ratio=discard_ratio).saliency[0]

    def relevance(self, image, target=None):
        """Return the relevance for a class, by default the predicted one, (rows, columns)."""
        return self.explain(image, "relevance", target).saliency[0]

    def grad_cam(self, image, target=None, layer_idx=None):
        """Return Grad-CAM of the patch tokens after a block, for a class, (rows, columns).

        `layer_idx` is a Python index from 0. By default it is the last block whose patch tokens still reach the head.
        In a Swin Transformer it is a stage, and 0 is the patch embedding.
        """
        return self.explain(image, "grad_cam", target, layer_idx=layer_idx).saliency[0]

    def attention_distance(self, images):
        """Return how far the patches look in each head, in pixels, (L, H), as `mean_distances`.

        `images` is a list of images or a normalised batch (B, C, height, width); the distances are averaged over it.
        """
        return mean_distances(self.model, prepare_images(images, self.model, self.whole))

    def explain(self, image, method, target=None, **options):
        """Return the `explanations.Explanation` of one image."""
        return explain(self.model, prepare_image(image, self.model, self.whole)[0], method, target, **options)

    def selfcheck(self, images=None):
        """Check the formulas of this package on the model; by default, the images are noise."""
        return selfcheck(self.model, None if images is None else prepare_images(images, self.model, self.whole))

    # ---- Attention

    def visualize_attention(self, image, layer_idx=-1, head_idx=None, save_path=None, patch=None):
        """Draw the image, the attention of CLS to its patches, and this attention over the image.

        Parameters
        ----------
        image : str, Path, PIL image, array or Tensor
            Any kind of image that data/images.py accepts.
        layer_idx : int, optional
            Python index of the block: 0 is the first, -1 the last.
        head_idx : int, optional
            Python index of the head, from 0. By default the mean over the heads.
        save_path : str or Path, optional
            Where to write the figure.
        patch : tuple of int, optional
            (row, column) of a patch, from 0. Its attention is drawn instead of the attention of CLS. A Swin Transformer
            needs it.

        Returns
        -------
        Figure

        Raises
        ------
        InputError
            If an index is out of range, or if the image cannot be used.
        """
        images, picture = prepare_image(image, self.model, self.whole)
        blocks = rows_by_block(self.model, images, patch)
        layer = check_index("layer_idx", layer_idx, len(blocks))
        block, n_heads = blocks[layer], blocks[layer].weights.shape[1]
        head = f"mean of {n_heads} heads"
        if head_idx is None:
            row = block.weights[0].mean(dim=0)  # (N)
        else:
            head_idx = check_index("head_idx", head_idx, n_heads)
            row, head = block.weights[0, head_idx], f"head {head_idx + 1} of {n_heads}"
        grid = self.on_patches(row, block).numpy()  # (rows, columns)
        figure = new_figure(12, 1.3 + 3.4 * proportion(picture))
        left, middle, right = figure.subplots(1, 3)
        left.imshow(picture)
        left.set_title("the image, as the model sees it" + self.describe_prediction(images))
        top = top_weight(grid)
        scale = dict(cmap="viridis", vmin=0, vmax=top)
        mappable = draw_map(middle, picture, grid, block.token_size, **scale)
        shares = [f"{name} {share:.1%}" for name, share in self.on_others(row).items()]
        words = [f"colours end at {percent(top)}; largest {percent(grid.max())}",
                 ", ".join([f"all patches {grid.sum():.1%}", *shares]) if shares else ""]
        middle.set_title("\n".join(["attention to each patch", *filter(None, words)]))
        _draw_over(right, picture, grid, block.token_size, scale, interpolation="bilinear")
        right.set_title("the same map, smoothed,\nover the image")
        colour_bar(figure, mappable, right, "attention weight of a patch", percent)
        corner = self.corner_of(patch, images)
        for axes in (left, middle, right):
            hide_ticks(axes)
            _frame_token(axes, picture, self.adapter.patch_size if axes is left else block.token_size, corner)
        name = block_names(self.adapter)[layer]
        place = name if self.adapter.windowed else f"{name} of {len(blocks)}"
        set_heading(figure, f"{self.who_looks(patch)}: {place}, {head}", fontsize=14)
        return finish(figure, save_path)

    def visualize_all_heads(self, image, layers=None, save_path=None, patch=None):
        """Draw the attention of CLS to the patches, with a row for each block and a column for each head.

        Each panel has its own colour scale. The shares of the attention that go to CLS and to registers are below it.

        Parameters
        ----------
        image : str, Path, PIL image, array or Tensor
            Any kind of image that data/images.py accepts.
        layers : int or sequence of int, optional
            Python indices of the blocks, from 0. By default all blocks, or six of them from the first to the last.
        save_path : str or Path, optional
            Where to write the figure.
        patch : tuple of int, optional
            (row, column) of a patch, from 0. Its attention is drawn instead of the attention of CLS. A Swin Transformer
            needs it.
        """
        images, picture = prepare_image(image, self.model, self.whole)
        blocks = rows_by_block(self.model, images, patch)
        chosen = _chosen_blocks(layers, len(blocks))
        maps = [self.panels_of(blocks[layer].weights[0], blocks[layer]) for layer in chosen]
        names = block_names(self.adapter)
        title = f"{self.who_looks(patch)}, in {_counted(len(chosen), len(blocks))}{self.describe_prediction(images)}"
        figure = _draw_map_grid([picture] * len(chosen), maps, [names[layer].replace(", ", "\n") for layer in chosen],
                                [f"head {head + 1}" for head in range(max(map(len, maps)))], title,
                                self.attention_scale, self.adapter.patch_size, self.corner_of(patch, images))
        return finish(figure, save_path)

    def visualize_all_layers(self, image, save_path=None, patch=None):
        """Draw the image and the attention to its patches in every block, averaged over the heads.

        Each panel has its own colour scale. With `patch`, (row, column), the attention of this patch is drawn
        instead of the attention of CLS. A Swin Transformer needs it.
        """
        images, picture = prepare_image(image, self.model, self.whole)
        blocks = rows_by_block(self.model, images, patch)
        maps = [self.panels_of(block.weights[0].mean(dim=0, keepdim=True), block)[0] for block in blocks]
        n_columns = _columns_for(1 + len(maps), proportion(picture))
        n_rows = math.ceil((1 + len(maps)) / n_columns)
        side = min(2.0, 13 / n_columns)
        figure = new_figure(0.6 + side * n_columns, 2.0 + (side * proportion(picture) + 0.9) * n_rows)
        first, *others = figure.subplots(n_rows, n_columns, squeeze=False).flat
        first.imshow(picture)
        first.set_title("image", fontsize=11)
        for axes in others:
            axes.set_axis_off()
        corner = self.corner_of(patch, images)
        for axes, name, panel in zip(others, block_names(self.adapter), maps, strict=False):
            axes.set_axis_on()
            axes.set_title(name, fontsize=11)
            _draw_panel(axes, picture, panel, self.attention_scale, corner)
        hide_ticks(first)
        _frame_token(first, picture, self.adapter.patch_size, corner)
        shared_bar(figure, figure.axes, self.attention_scale.label, WEIGHTS.ends, WEIGHTS.extend)
        title = f"{self.who_looks(patch)}, in {_counted(len(maps), len(maps))}, mean over the heads"
        set_heading(figure, title + self.describe_prediction(images), fontsize=13)
        return finish(figure, save_path)

    # ---- Where the prediction comes from

    def visualize_rollout(self, image, discard_ratio=0.0, save_path=None):
        """Draw the image and its attention rollout."""
        return self.draw_explanation(image, "rollout", save_path, discard_ratio=discard_ratio)

    def visualize_relevance(self, image, target=None, save_path=None):
        """Draw the image and its gradient-weighted relevance for a class."""
        return self.draw_explanation(image, "relevance", save_path, target)

    def visualize_grad_cam(self, image, target=None, layer_idx=None, save_path=None):
        """Draw the image and its Grad-CAM for a class; `layer_idx` is a Python index from 0."""
        return self.draw_explanation(image, "grad_cam", save_path, target, layer_idx=layer_idx)

    def draw_explanation(self, image, method, save_path=None, target=None, **options):
        """Draw the image, the map of one of the METHODS, and this map over the image."""
        images, picture = prepare_image(image, self.model, self.whole)
        found = explain(self.model, images, method, target, **options)
        grid, same = found.saliency[0].numpy(), method in SAME_FOR_EVERY_CLASS
        number, top = percent if same else in_digits, clip_at(grid)
        cam = method == "grad_cam"
        token_size = self.cam_place(options.get("layer_idx"))[1] if cam else self.adapter.patch_size
        figure = new_figure(12, 1.4 + 3.4 * proportion(picture))
        left, middle, right = figure.subplots(1, 3)
        left.imshow(picture)
        left.set_title("the image, as the model sees it" + self.describe_prediction(images))
        scale = dict(cmap="viridis", vmin=0, vmax=top)
        mappable = draw_map(middle, picture, grid, token_size, **scale)
        words = [self.title_of(method, options), f"colours end at {number(top)}; largest {number(grid.max())}"]
        if same and self.adapter.prefix:
            others = " and ".join(dict.fromkeys(self.adapter.prefix))
            words.append(f"all patches {grid.sum():.1%}, the rest {others}")
        middle.set_title("\n".join(words))
        _draw_over(right, picture, grid, token_size, scale)
        right.set_title("the same map over the image")
        colour_bar(figure, mappable, middle, "weight of a patch" if same else "value of a patch", number)
        for axes in (left, middle, right):
            hide_ticks(axes)
        whose = "this map is the same for every class" if found.targets is not None else ""
        name = TITLES[method][0].upper() + TITLES[method][1:]
        set_heading(figure, f"{name}\n{whose if same else self.describe_class(found)}".rstrip(), fontsize=13)
        return finish(figure, save_path)

    def title_of(self, method, options):
        """Return the title of a map, with its block and its head if the method has these options."""
        n_blocks, head = len(self.adapter.blocks), options.get("head_idx")
        if method == "grad_cam":
            return f"Grad-CAM after {self.cam_place(options.get('layer_idx'))[0]}"
        if method == "attention" and options:
            layer = check_index("layer_idx", options.get("layer_idx", -1), n_blocks)
            title = f"attention of block {layer + 1} of {n_blocks}"
            if head is None:
                return title
            return title + (f"\nhead {head + 1}" if head >= 0 else f"\nhead {-head} from the end")
        return TITLES[method]

    def cam_place(self, layer_idx=None):
        """Return (where Grad-CAM takes its map, the height and width in pixels of a token there)."""
        adapter = self.adapter
        if not adapter.windowed:
            return f"block {cam_layer(adapter, layer_idx) + 1} of {len(adapter.blocks)}", adapter.patch_size
        depth = check_index("layer_idx", -1 if layer_idx is None else layer_idx, len(adapter.layers))
        place = f"stage {depth} of {len(adapter.stages)}" if depth else "the patch embedding"
        return place, adapter.patch_size_in(max(depth - 1, 0))

    def visualize_explanations(self, image, target=None, n_steps=16, save_path=None, n_draws=8):
        """Draw all methods on one image: their maps, their agreement, and whether they beat random order.

        Each map is scaled to a sum of one and has its own colour scale. The lower panels show Spearman's rank
        correlation of each pair of maps, and the probability of the class while patches are hidden or shown, most
        salient first. The random order is drawn n_draws times: the line is the mean, and the band is two standard
        deviations on each side.

        Parameters
        ----------
        image : str, Path, PIL image, array or Tensor
            Any kind of image that data/images.py accepts.
        target : int or str, optional
            The class to explain, by default the predicted one.
        n_steps : int, optional
            Number of steps of the curves.
        save_path : str or Path, optional
            Where to write the figure.
        n_draws : int, optional
            Number of random orders.
        """
        images, picture = prepare_image(image, self.model, self.whole)
        found = compare_explanations(self.model, images, target, n_steps=n_steps, n_draws=n_draws)
        names = list(found.saliencies)
        grids = [(saliency[0] / saliency[0].sum().clamp(min=1e-12)).numpy() for saliency in found.saliencies.values()]
        figure = new_figure(12.5, 8.0 + 2.5 * max(0.8, proportion(picture)) + 0.5 * len(found.refused))
        n_panels = 1 + len(names)
        cells = figure.add_gridspec(2, 3 * n_panels, height_ratios=(1.2 + 2.5 * max(0.8, proportion(picture)), 5.2))
        panels = [figure.add_subplot(cells[0, 3 * i:3 * i + 3]) for i in range(n_panels)]
        agreement, *curves = [figure.add_subplot(cells[1, i * n_panels:(i + 1) * n_panels]) for i in range(3)]
        panels[0].imshow(picture)
        panels[0].set_title("the image", fontsize=11)
        hide_ticks(panels[0])
        for axes, name, grid in zip(panels[1:], names, grids, strict=True):
            of_all = f"patches: {found.saliencies[name][0].sum():.1%} of the weight"
            token_size = self.cam_place()[1] if name == "grad_cam" else self.adapter.patch_size
            panel = MapPanel(grid, [of_all] * (name in SAME_FOR_EVERY_CLASS), token_size)
            _draw_panel(axes, picture, panel, SHARES_OF_MAP)
            axes.set_title(TITLES[name], fontsize=11)
        shared_bar(figure, panels, SHARES_OF_MAP.label, SHARES_OF_MAP.ends, SHARES_OF_MAP.extend)
        reasons = {}  # several methods may be left out for the same reason
        for name, reason in found.refused.items():
            reasons.setdefault(reason, []).append(TITLES[name])
        refused = [f"left out{f' ({join_words(left_out)})' if len(left_out) > 1 else ''}: {reason}"
                   for reason, left_out in reasons.items()]
        predicted = class_probabilities(self.model, images).argmax().item()
        also = ", the predicted class" if found.targets[0].item() == predicted else self.describe_prediction(images)
        words = [self.describe_class(found) + also, *refused]
        set_heading(figure, "\n".join(words), fontsize=13 if not refused else 10)
        _draw_agreement(agreement, found.correlations.numpy(), names)
        _draw_trust(curves[0], found.deletion, found.draws["deletion"],
                   "hiding the most salient patches first\n(a good map makes the probability fall early)")
        _draw_trust(curves[1], found.insertion, found.draws["insertion"],
                   "showing the most salient patches first\n(a good map makes the probability rise early)")
        return finish(figure, save_path)

    def visualize_logit_lens(self, image, n_classes=5, save_path=None):
        """Draw what the head would predict after every block.

        The lines are the n_classes classes most likely at the end, and classes that were most likely after some block,
        six lines at most. Raises InputError if n_classes is above six.
        """
        check_int("n_classes", n_classes, 1)
        if n_classes > len(COLOURS):
            raise InputError(f"n_classes {n_classes} is out of range; expected 1 to {len(COLOURS)}, the number of "
                             f"distinct colours; explanations.logit_lens returns the probabilities of all classes")
        images, picture = prepare_image(image, self.model, self.whole)
        lens = logit_lens(self.model, images)[:, 0]  # (L + 1, K)
        order = lens[-1].argsort(descending=True).tolist()
        on_the_way = [label for label in lens.argmax(dim=1).tolist() if label not in order[:n_classes]]
        shown = (order[:n_classes] + list(dict.fromkeys(on_the_way)))[:len(COLOURS)]
        figure = new_figure(11, 4.2)
        left, right = figure.subplots(1, 2, width_ratios=(1, 2.2))
        left.imshow(picture)
        hide_ticks(left)
        left.set_title("the image" + self.describe_prediction(images))
        blocks = np.arange(len(lens))
        covered = n_covered_by([(blocks, lens[:, label].numpy()) for label in shown], CLOSE)
        for place, (label, n_covered) in enumerate(zip(shown, covered, strict=True)):
            right.plot(blocks, 100 * lens[:, label], color=COLOURS[place], marker=MARKERS[place],
                       label=self.name_of(label), **widths(n_covered))
        right.set(xlabel="number of blocks passed", ylabel="probability (%)", ylim=(-2, 102))
        right.set_title("what the head would predict after each block")
        right.set_xticks(spread(len(lens), 13))
        show_legend(right, fontsize=10, title=THICK if any(covered) else None, title_fontsize=9)
        set_heading(figure, "Logit lens", fontsize=14)
        return finish(figure, save_path)

    # ---- Over images

    def visualize_attention_distance(self, images, save_path=None):
        """Draw how far patches look: a point for each head of each block, and a line for uniform attention.

        In a Swin Transformer the line is that of uniform attention within a whole window.

        Parameters
        ----------
        images : list of images or Tensor, shape (B, C, height, width)
            Images of any kind, or a normalised batch.
        save_path : str or Path, optional
            Where to write the figure.

        Notes
        -----
        In Dosovitskiy et al. 2021 (the ViT paper), Fig. 7 (right), some heads in the first blocks look nearby. Raghu et
        al. 2021, "Do Vision Transformers See Like Convolutional Neural Networks?", find such heads after large-scale
        pretraining such as on JFT-300M, but not after training on ImageNet alone.
        """
        by_size, n_images, distances, line = {}, 0, 0, 0  # whole photographs have several sizes
        for one in prepare_each(images, self.model, self.whole):
            by_size.setdefault(one.shape, []).append(one)
        for several in by_size.values():
            batch, n_images = torch.cat(several), n_images + len(several)
            distances = distances + len(several) * self.attention_distance(batch).numpy()  # (L, H)
            line = line + len(several) * np.array(uniform_distances(self.model, batch))  # (L)
        distances, line = distances / n_images, line / n_images
        figure = new_figure(8, 4.4)
        axes = figure.subplots()
        blocks = np.arange(1, len(distances) + 1)
        for head in range(distances.shape[1]):
            axes.plot(blocks, distances[:, head], "o", color=COLOURS[0], alpha=0.7,
                      label="one head" if head == 0 else None)
        axes.plot(blocks, np.nanmean(distances, axis=1), color=COLOURS[1], label="mean over the heads")
        uniform = dict(color="0.4", linestyle="--")
        if self.adapter.windowed:
            axes.plot(blocks, line, drawstyle="steps-mid", label="uniform attention in a whole window", **uniform)
        else:
            axes.axhline(line[0], label=f"uniform attention: {line[0]:.1f}", **uniform)
        shown = [blocks[i] for i in spread(len(blocks), 13)]
        axes.set(ylabel="mean distance (pixels)", ylim=(0, 1.15 * max(line.max(), np.nanmax(distances))))
        if self.adapter.windowed:
            names = block_names(self.adapter)
            axes.set_xticks(shown, [names[i - 1].replace(", ", "\n") for i in shown], fontsize=9)
        else:
            axes.set_xticks(shown)
            axes.set_xlabel("block")
        axes.legend(fontsize=10)
        axes.set_title(f"How far patches look: mean over {n_images} image{'s' * (n_images > 1)}")
        return finish(figure, save_path)

    def visualize_token_norms(self, image, save_path=None):
        """Draw the norm of each patch token after each block; outliers are framed.

        Outliers may be norm artefacts. Each panel has its own colour scale.
        """
        images, picture = prepare_image(image, self.model, self.whole)
        norms, artefacts = token_norms(capture(self.model, images, keep=None))  # (L, 1, rows, columns)
        chosen = spread(len(norms), 6)
        title = (f"Norms of the patch tokens after {_counted(len(chosen), len(norms))}; outliers framed: "
                 f"{int(artefacts[chosen].sum())}{self.describe_prediction(images)}")
        size = self.adapter.patch_size
        maps = [MapPanel(norms[layer, 0].numpy(), [f"{int(artefacts[layer].sum())} framed"], size) for layer in chosen]
        figure = _draw_map_grid([picture], [maps], [""], [f"block {i + 1}" for i in chosen], title, LENGTHS, size)
        for axes, layer in zip(figure.axes[1:], chosen, strict=False):
            for place in artefacts[layer, 0].nonzero().tolist():
                _frame_token(axes, picture, size, self.corner_of(place, images))
        return finish(figure, save_path)

    # ---- An interactive page

    def explore(self, images, save_path="attention.html", compare_with=None, **options):
        """Write one self-contained interactive HTML page of images, and return it as an ExplorerPage.

        `compare_with` is a second model, a ViT or a ConvNet; `options` go to `explorer.explore`, for example max_mb.
        """
        return explore(self.model, images, save_path, compare_with, **dict(whole=self.whole) | options)

    # ---- Text

    def on_patches(self, row, block):
        """Select the patches from weights of all tokens in one of the BlockRows: (..., N) -> (..., rows, columns)."""
        return patches_of(row, block.grid, self.adapter.n_prefix)

    def corner_of(self, patch, images):
        """Return the upper left corner (y, x) of a patch, in pixels, or None for no patch."""
        if patch is None:
            return None
        places = check_patch(patch, self.adapter.grid(images))
        return tuple(place * side for place, side in zip(places, self.adapter.patch_size, strict=True))

    def on_others(self, row):
        """Sum the weights (N) of the tokens before the patches: {"CLS": share, "registers": share}.

        The padding of windows, which are no tokens, has the rest.
        """
        shares = {}
        for name, share in zip(self.adapter.prefix, row.tolist(), strict=False):
            shares[name] = shares.get(name, 0) + share
        if (padding := 1 - row.sum().item()) > 1e-3 and self.adapter.windowed:
            shares["padding"] = padding
        many = self.adapter.prefix.count("register") > 1
        return {f"{name}s" if name == "register" and many else name: share for name, share in shares.items()}

    def panels_of(self, rows, block):
        """Turn weights of all tokens (n, N) in one of the BlockRows into n MapPanels."""
        return [MapPanel(self.on_patches(row, block).numpy(),
                         [f"{SHORT.get(name.removesuffix('s'), name)} {share:.0%}" if share >= 0.01 else
                          f"{SHORT.get(name.removesuffix('s'), name)} <1%"
                          for name, share in self.on_others(row).items()], block.token_size) for row in rows]

    def who_looks(self, patch=None):
        """Return the start of a heading, which names the token whose attention is shown."""
        if patch is not None:
            return f"Where the framed patch {tuple(patch)} looks"
        if self.adapter.pool == "cls":
            return "Where CLS looks"
        return f"Where {'patches' if self.adapter.pool == 'mean' else self.adapter.pool} look, on average"

    def name_of(self, label):
        """Return the name of a class, or its number if it has none."""
        names = self.adapter.class_names
        return names[label] if names else f"class {label}"

    def describe_prediction(self, images):
        """Return a line with the class predicted for the first image and its probability.

        The line is empty for a model without a head.
        """
        return self.describe_predictions(images[:1])[0]

    def describe_predictions(self, images):
        """Return a line with the predicted class and its probability for each image."""
        if not self.adapter.has_head:
            return [""] * len(images)
        probabilities, labels = class_probabilities(self.model, images).max(dim=1)  # (B), (B)
        return [f"\npredicted: {self.name_of(label)} ({probability:.0%})"
                for label, probability in zip(labels.tolist(), probabilities.tolist(), strict=True)]

    @property
    def attention_scale(self):
        """The MapScale of attention weights, with the other tokens of this model in its label."""
        kinds = list(self.on_others(torch.zeros(self.adapter.n_prefix))) if self.adapter.prefix else []
        if self.adapter.windowed:
            return replace(WEIGHTS, label=WEIGHTS.label.replace("its 99th percentile",
                                                                "the 99th percentile of the weights in the window"))
        if not kinds:
            return WEIGHTS
        lines = "last line below a panel is" if len(kinds) == 1 else f"last {len(kinds)} lines below a panel are"
        whom = " and to ".join(kind if kind == "CLS" else f"the {kind}" for kind in kinds)
        return replace(WEIGHTS, label=f"{WEIGHTS.label} The {lines} the attention to {whom}.")

    def describe_class(self, found):
        """Describe the explained class of an Explanation or Comparison of one image."""
        if found.targets is None:
            return "a model without a head"
        return f"class explained: {self.name_of(found.targets[0].item())} (probability {found.probabilities[0]:.0%})"


def visualize_attention_grid(model, images, save_path=None, whole=None):
    """Draw the attention of several images, one per row, averaged over the heads.

    Each row starts with the image and its predicted class. If there are more than six blocks, six are shown, from the
    first to the last. Each panel has its own colour scale.

    Parameters
    ----------
    model : nn.Module
        A ViT, ours or from timm, transformers or torchvision.
    images : list of images or Tensor, shape (B, 3, H, W)
        Images of any kind, or a normalised batch.
    save_path : str or Path, optional
        Where to write the figure.
    whole : Whole, optional
        As in AttentionVisualizer.

    Raises
    ------
    InputError
        If the model has no attention.
    """
    views = AttentionVisualizer(model, device_of(model), whole)
    fed = prepare_each(images, model, whole)
    rows = [rows_by_block(model, one) for one in fed]
    chosen = spread(len(rows[0]), 6)
    pictures = [as_picture(one, views.adapter.preprocessing) for one in fed]
    predicted = [textwrap.fill(views.describe_prediction(one).strip(), 14) for one in fed]
    maps = [[views.panels_of(blocks[layer].weights[0].mean(dim=0, keepdim=True), blocks[layer])[0] for layer in chosen]
            for blocks in rows]
    title = f"{views.who_looks()}, in {_counted(len(chosen), len(rows[0]))}, mean over the heads"
    figure = _draw_map_grid(pictures, maps, predicted, [f"block {layer + 1}" for layer in chosen], title,
                            views.attention_scale, views.adapter.patch_size)
    return finish(figure, save_path)


def visualize_distillation(model, image, save_path=None, layers=None, whole=None):
    """Draw where the class token and the distillation token of a DeiT look, and how similar they are in each block.

    The maps are means over the heads, each with its own colour scale. The curves show the cosine similarity of the two
    tokens, and of their rows of attention.

    Parameters
    ----------
    model : nn.Module
        A distilled ViT, ours or from timm or transformers.
    image : str, Path, PIL image, array or Tensor
        Any kind of image that data/images.py accepts.
    save_path : str or Path, optional
        Where to write the figure.
    layers : int or sequence of int, optional
        Python indices of the blocks, from 0. By default all blocks, or four of them from the first to the last.
    whole : Whole, optional
        As in AttentionVisualizer.

    Raises
    ------
    InputError
        If the model has no distillation token, or if an index is out of range.

    References
    ----------
    Touvron et al. 2021, "Training data-efficient image transformers", Sec. 4.
    """
    check_distilled(model)
    views = AttentionVisualizer(model, device_of(model), whole)
    images, picture = prepare_image(image, model, whole)
    tokens = capture(model, images, keep=lambda block, attended: attended.maps[0, :, :2].mean(dim=0)).maps  # L x (2, N)
    features, attention = token_similarity(model, images)  # (L + 1), (L)
    chosen = _chosen_blocks(layers, len(tokens), 4)
    block = rows_by_block(model, images[:1])[0]  # for its grid
    figure = new_figure(14, 1.9 + 4.6 * proportion(picture))
    cells = figure.add_gridspec(2, 2 + len(chosen), width_ratios=(*[1] * (1 + len(chosen)), 2.2))
    panels = [[figure.add_subplot(cells[row, column]) for column in range(1 + len(chosen))] for row in range(2)]
    axes = figure.add_subplot(cells[:, -1])
    for row, (line, name) in enumerate(zip(panels, ("CLS", "distillation\ntoken"), strict=True)):
        line[0].imshow(picture)
        line[0].set_title("" if row else "image", fontsize=11)
        line[0].set_ylabel(f"{name}\nlooks at", fontsize=11)
        hide_ticks(line[0])
        for cell, layer in zip(line[1:], chosen, strict=True):
            panel, = views.panels_of(at_least_float32(tokens[layer][[row]].cpu()), block)
            _draw_panel(cell, picture, panel, views.attention_scale)
            cell.set_title("" if row else f"block {layer + 1}", fontsize=11)
    scale = views.attention_scale
    shared_bar(figure, [cell for line in panels for cell in line], scale.label, scale.ends, scale.extend)
    passed = np.arange(len(features))
    axes.plot(passed, features, color=COLOURS[0], marker=MARKERS[0], label="of the two tokens")
    axes.plot(passed[1:] - 0.5, attention, color=COLOURS[3], marker=MARKERS[1], linestyle=DASHES[1],
              label="of their attention in a block,\nmean over the heads")
    axes.set(xlabel="number of blocks passed", ylabel="cosine similarity", ylim=(min(0, features.min(), attention.min())
                                                                                - 0.05, 1.05))
    axes.set_xticks(spread(len(features), 13))
    axes.grid(alpha=0.3)
    axes.set_title("Similarity of CLS and the distillation token\n(1 = same direction)", fontsize=11)
    axes.legend(fontsize=10)
    title = f"CLS and the distillation token, in {_counted(len(chosen), len(tokens))}, mean over the heads"
    set_heading(figure, title + views.describe_prediction(images), fontsize=13)
    return finish(figure, save_path)


# ---- Panels -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapScale:
    """How the maps of one figure are coloured, each on its own scale.

    Attributes
    ----------
    between : callable
        Map (rows, columns) -> (low, top), the ends of its scale.
    say : callable
        (low, top, largest value) -> the text below its panel.
    label : str
        Label of the colour bar.
    ends : tuple of str
        Labels of the two ends of the colour bar.
    extend : str
        The ends of the scale that values may exceed, as in matplotlib.
    """

    between: Callable
    say: Callable
    label: str
    ends: tuple = ("0", "99th percentile")
    extend: str = "max"


def top_weight(grid):
    """Return the top of the colour scale of attention weights (rows, columns).

    Tokens outside a window have a weight of exactly 0. They do not count: in a large image they are most of the map.
    """
    counted = grid[grid > 0]
    return clip_at(counted if counted.size else grid)


WEIGHTS = MapScale(
    lambda grid: (0, top_weight(grid)), lambda low, top, largest: f"to {percent(top)}\nmax {percent(largest)}",
    "Attention to each patch. Each panel has its own scale, up to its 99th percentile (“to”); “max” is its largest "
    "weight.")
SHARES_OF_MAP = MapScale(
    lambda grid: (0, clip_at(grid)), WEIGHTS.say,
    "Share of each patch in its map. Each panel has its own scale, up to its 99th percentile (“to”); “max” is its "
    "largest share.")
LENGTHS = MapScale(
    clip_between, lambda low, top, largest: f"{in_digits(low)} to {in_digits(top)}\nmax {in_digits(largest)}",
    "Norm of each patch token. Each panel has its own scale, from its 1st to its 99th percentile (the two numbers "
    "below it), or wider if the norms are nearly equal; “max” is its largest norm.",
    ("the lower number", "the higher number"), "both")


@dataclass(frozen=True)
class MapPanel:
    """A map (rows, columns), the texts below it, and the height and width in pixels of its tokens."""

    grid: np.ndarray
    notes: list
    token_size: tuple


def _draw_panel(axes, picture, panel, scale, corner=None):
    """Draw a MapPanel at the size of its picture, with its colour scale written below; frame the token at a corner."""
    low, top = scale.between(panel.grid)
    draw_map(axes, picture, panel.grid, panel.token_size, cmap="viridis", vmin=low, vmax=top)
    axes.set_xlabel("\n".join([scale.say(low, top, panel.grid.max()), *panel.notes]), fontsize=9)
    hide_ticks(axes)
    _frame_token(axes, picture, panel.token_size, corner)


def _draw_map_grid(pictures, maps, row_labels, column_labels, title, scale, patch_size, corner=None):
    """Draw a row for each picture (H, W, 3): the picture, then its maps.

    `maps` holds a list of MapPanels for each picture; if their lengths differ, each row has its own column labels. The
    token that holds the pixel `corner`, (y, x), is framed.
    """
    n_maps, n_notes = len(column_labels), 2 + max(len(panel.notes) for row in maps for panel in row)
    labelled = range(len(maps)) if len(set(map(len, maps))) > 1 else [0]
    side = max(0.8, min(1.7, 12.5 / (1 + n_maps)))
    heights = [side * proportion(picture) + 0.16 * n_notes + 0.2 * (len(labelled) > 1) for picture in pictures]
    beside = 0.08 * max(len(words) for label in row_labels for words in label.split("\n"))  # inches
    figure = new_figure(max(7.0, side * (1.2 + n_maps)) + beside, max(3.0, sum(heights) + 1.9))
    axes = figure.subplots(len(pictures), 1 + n_maps, squeeze=False, height_ratios=heights)
    for picture, line, row, row_label in zip(pictures, axes, maps, row_labels, strict=True):
        line[0].imshow(picture)
        line[0].set_ylabel(row_label, fontsize=10, rotation=0, ha="right", va="center")
        hide_ticks(line[0])
        _frame_token(line[0], picture, patch_size, corner)
        for panel in line[1 + len(row):]:
            panel.set_axis_off()
        for panel, shown in zip(line[1:], row, strict=False):
            _draw_panel(panel, picture, shown, scale, corner)
    for row in labelled:
        for panel, heading in zip(axes[row], ["image", *column_labels][:1 + len(maps[row])], strict=False):
            panel.set_title(heading, fontsize=10)
    shared_bar(figure, axes, scale.label, scale.ends, scale.extend)
    set_heading(figure, title, fontsize=14)
    return figure


def _chosen_blocks(layers, n_blocks, most=6):
    """Return the indices of the blocks given, one or several; by default at most six, from the first to the last."""
    layers = [] if layers is None else np.ravel(layers).tolist()
    return [check_index("layer", i, n_blocks) for i in layers or spread(n_blocks, most)]


def _counted(n_shown, n_blocks):
    """Describe how many of the blocks a figure shows."""
    if n_shown < n_blocks:
        return f"{n_shown} of {n_blocks} blocks"
    return f"all {n_blocks} blocks" if n_blocks > 1 else "the only block"


def _columns_for(n_panels, tall):
    """Return the number of columns with which n panels, `tall` times as high as wide, best fill a page."""
    def waste(n_columns):
        n_rows = math.ceil(n_panels / n_columns)
        height = n_rows * (min(2.0, 13 / n_columns) * tall + 0.9)
        return max(0, height - 11), n_columns * n_rows - n_panels

    return min(range(min(n_panels, 6), min(n_panels, 12) + 1), key=waste)


def _draw_over(axes, picture, grid, token_size, scale, **how):
    """Draw a map (rows, columns) over the grey picture (H, W, 3).

    The larger a value, the less of the picture shows through.
    """
    axes.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=1)
    opacity = 0.1 + 0.65 * np.clip(grid / scale["vmax"], 0, 1)
    draw_map(axes, picture, grid, token_size, alpha=opacity, **scale, **how)


def _frame_token(axes, picture, token_size, corner):
    """Frame the token that holds the pixel `corner`, (y, x), of a picture (H, W, 3); None frames nothing.

    Small tokens get thinner frames.
    """
    if corner is None:
        return
    (y, x), (height, width) = (place // side * side for place, side in zip(corner, token_size, strict=True)), token_size
    large = max(picture.shape[0] / height, picture.shape[1] / width) <= 16
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=VERMILION,
                             linewidth=2 if large else 1.2))


def _draw_agreement(axes, correlations, names):
    """Draw the matrix of rank correlations between methods, if there are several."""
    if len(names) == 1:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "only one method applies to this model,\nso there is no other map to agree with",
                  ha="center", va="center", fontsize=11)
        return
    axes.imshow(correlations, cmap="cividis", vmin=-1, vmax=1)
    for row, column in np.ndindex(correlations.shape):
        value = correlations[row, column]
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.2 else "black")
    words = [TITLES[name].replace("attention ", "attention\n", 1).replace(" block", "\nblock") for name in names]
    axes.set_xticks(range(len(names)), words, fontsize=9)
    axes.set_yticks(range(len(names)), words, fontsize=9)
    axes.set_title("agreement of the maps\n(Spearman: 1 = same ranking, 0 = unrelated)", fontsize=11)


def _draw_trust(axes, curves, draws, heading):
    """Draw curves {name: (S + 1, B)}, averaged over the images.

    Random order is dashed. The band shows its draws (R, S + 1, B): two standard deviations on each side.
    """
    draws = draws.mean(dim=2)  # (R, S + 1)
    means = {name: values.nanmean(dim=1) for name, values in curves.items()}  # (S + 1) each
    share = np.linspace(0, 100, len(next(iter(means.values()))))
    covered = n_covered_by([(share, values.numpy()) for values in means.values()], CLOSE)
    for place, ((name, values), n_covered) in enumerate(zip(means.items(), covered, strict=True)):
        control = name not in METHODS
        area, values = area_under(values), values.numpy()
        words = f"{TITLES.get(name, name)}: area {area:.2f}"
        if control and len(draws) > 1:
            reach = 2 * draws.std(dim=0).numpy()
            axes.fill_between(share, 100 * (values - reach).clip(min=0), 100 * (values + reach).clip(max=1),
                              color="0.35", alpha=0.2, linewidth=0)
            words += f" ± {2 * area_under(draws.T).std():.2f}\n({len(draws)} draws, ± 2 standard deviations)"
        axes.plot(share, 100 * values, color="0.35" if control else COLOURS[place],
                  linestyle=DASHES[1] if control else "-", linewidth=widths(n_covered)["linewidth"], label=words)
    axes.set(xlabel="patches (%)", ylabel="probability of the class (%)", ylim=(0, 102))
    axes.set_title(heading, fontsize=11)
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), title=THICK if any(covered) else None,
                title_fontsize=9)


# ---- What a model has learned -----------------------------------------------------------------------------


def visualize_patch_filters(model, n_filters=28, save_path=None):
    """Draw the principal components of the filters of the patch projection, strongest first.

    Each has its own scale, on which grey is zero. The number above it is its share of the sum of squares.

    Raises
    ------
    InputError
        If the first layer of the model is not a projection of patches, or if its images do not have 1 or 3 channels.

    References
    ----------
    Dosovitskiy et al. 2021 (the ViT paper), Fig. 7 (left).
    """
    filters, shares = patch_filters(model, n_filters)  # (n, C, P, P), (n)
    if filters.shape[1] not in (1, 3):
        raise InputError(f"the filters of this {class_name(model)} have {filters.shape[1]} channels; expected 1 or "
                         f"3, which can be drawn; explanations.patch_filters returns their values")
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
                    f"(above each: its share of the sum of squares; together {shares.sum():.0%})", fontsize=12)
    return finish(figure, save_path)


def visualize_features(model, images, save_path=None, whole=None):
    """Draw the patch tokens of several images as colours after a third, two thirds and all of the blocks.

    The colours are the first three principal components over all images. Within a row, similar colours mean similar
    features, including across images.

    Parameters
    ----------
    model : nn.Module
        A ViT, ours or from timm, transformers or torchvision.
    images : list of images or Tensor, shape (B, 3, H, W)
        Images of any kind, or a normalised batch.
    save_path : str or Path, optional
        Where to write the figure.
    whole : Whole, optional
        As in AttentionVisualizer.
    """
    fed = prepare_each(images, model, whole)
    seen = [capture(model, one, keep=None) for one in fed]
    first, n_blocks = seen[0].adapter.n_prefix, len(seen[0].tokens) - 1
    depths = spread(n_blocks + 1, 4)[1:]
    pictures = [as_picture(one, adapt(model).preprocessing) for one in fed]
    wide = [1 / proportion(picture) for picture in pictures]  # widths of panels of equal height
    side = min(2.2, max(1.3, 10 / sum(wide)))
    figure = new_figure(max(5.0, 1.0 + side * sum(wide)), 1.0 + (side + 0.1) * (1 + len(depths)))
    panels = figure.subplots(1 + len(depths), len(pictures), squeeze=False, width_ratios=wide)
    for axes, picture in zip(panels[0], pictures, strict=True):
        axes.imshow(picture)
    for line, depth in zip(panels[1:], depths, strict=True):
        line[0].set_ylabel(f"after block {depth}\nof {n_blocks}", fontsize=11)
        tokens = [one.tokens[depth][:, first:] for one in seen]  # (1, n, D) each
        colours = feature_colours(torch.cat(tokens, dim=1)[:, :, None])[0, :, 0]  # (n of all, 3)
        for axes, one, part, picture in zip(line, seen, colours.split([len(part[0]) for part in tokens]), pictures,
                                            strict=True):
            axes.imshow(part.unflatten(0, one.grid).numpy(), extent=extent_of(picture))
    for axes in panels.flat:
        hide_ticks(axes)
    set_heading(figure, "Patch tokens as colours: their first three principal components as red, green and blue\n"
                        "(within a row, similar colours mean similar features, including across images)", fontsize=12)
    return finish(figure, save_path)


def visualize_positions(model, save_path=None):
    """Draw the cosine similarity of position embeddings, as a small map of all patches for each patch.

    All maps share one colour scale, from the smallest similarity to 1. At most 8 x 8 patches have a map; rows and
    columns count from 0.

    Raises
    ------
    InputError
        If the model has no position embeddings.

    References
    ----------
    Dosovitskiy et al. 2021 (the ViT paper), Fig. 7 (centre).
    """
    similarity = position_similarity(model).cpu().numpy()  # (rows, columns, rows, columns)
    lowest = min(similarity.min(), 0.99)  # a valid scale even if all are equal
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
    set_heading(figure, "Similarity of each patch's position embedding to all others", fontsize=14)
    return finish(figure, save_path)


# ---- Windows of a Swin Transformer --------------------------------------------------------------------------


def visualize_windows(model, image, save_path=None, layers=None, whole=None):
    """Draw the windows of a Swin Transformer over an image: tokens attend to each other only within one window.

    Parameters
    ----------
    model : nn.Module
        A Swin Transformer, ours or from timm, transformers or torchvision.
    image : str, Path, PIL image, array or Tensor
        Any kind of image that data/images.py accepts.
    save_path : str or Path, optional
        Where to write the figure.
    layers : int or sequence of int, optional
        Python indices of the blocks, from 0. By default the first two of each stage: without a shift, and with it.
    whole : Whole, optional
        As in AttentionVisualizer.

    Raises
    ------
    InputError
        If the model is not a Swin Transformer, or if an index is out of range.

    References
    ----------
    Liu et al. 2021, "Swin Transformer", Fig. 2 and 4.
    """
    images, picture = prepare_image(image, model, whole)
    blocks, _ = capture_windows(model, images, keep=lambda block: replace(block, maps=None))
    names = block_names(adapt(model))
    stages = [block.stage for block in blocks]
    if layers is None:
        lines = [[stages.index(stage) + i for stage in sorted(set(stages)) if stages.count(stage) > i] for i in (0, 1)]
    else:
        lines = [_chosen_blocks(layers, len(blocks))]
    lines = [line for line in lines if line]
    n_columns = max(map(len, lines))
    side = max(2.3, min(3.4, 14 / n_columns))
    figure = new_figure(max(6.0, side * n_columns + 0.4), 0.6 + (side * proportion(picture) + 0.6) * len(lines))
    panels = figure.subplots(len(lines), n_columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    cut = False
    for row, line in zip(panels, lines, strict=True):
        for axes, i in zip(row, line, strict=False):
            axes.set_axis_on()
            axes.set_title(f"{names[i]}: {_described_windows(blocks[i])}", fontsize=10)
            cut = _draw_windows(axes, picture, blocks[i]) or cut
    words = "Tokens attend to each other only within one coloured window (sizes: height × width)"
    if cut:
        words += "\nHatched: windows that the shift or the edge of the image cuts, so they hold fewer tokens"
    set_heading(figure, words, fontsize=13)
    return finish(figure, save_path)


def _described_windows(block):
    """Describe the windows of a Windowed in tokens and pixels."""
    def sizes(pair, mark=" × "):
        pixels = [n * side for n, side in zip(pair, block.token_size, strict=True)]
        return mark.join(map(str, pair)), mark.join(map(str, pixels))

    (tokens, pixels), (by, pixels_by) = sizes(block.window), sizes(block.shift)
    if len(set(block.shift)) == 1 and len(set(block.token_size)) == 1:
        by, pixels_by = block.shift[0], block.shift[0] * block.token_size[0]
    shift = f"shifted by {by} tokens = {pixels_by} pixels" if any(block.shift) else "not shifted"
    if all(length >= side for length, side in zip(block.window, block.size, strict=True)):
        shift = "one window holds the whole map"
    return f"{' × '.join(map(str, block.size))} tokens\nwindows of {tokens} tokens = {pixels} pixels\n{shift}"


def _draw_windows(axes, picture, block):
    """Draw the groups of tokens of a Windowed over the grey picture; return whether any are smaller than a window."""
    _, groups = np.unique(window_groups(block).numpy(), return_inverse=True)
    groups, (height, width) = groups.reshape(block.size), block.token_size
    colours = np.array([to_rgb(colour) for colour in COLOURS])[_colouring(groups)]  # (h, w, 3)
    axes.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=1)
    draw_map(axes, picture, colours, block.token_size, alpha=0.38)
    borders = [[(x + 1, y), (x + 1, y + 1)] for y, x in np.argwhere(groups[:, 1:] != groups[:, :-1])]
    borders += [[(x, y + 1), (x + 1, y + 1)] for y, x in np.argwhere(groups[1:] != groups[:-1])]
    axes.add_collection(LineCollection([np.array(line) * (width, height) - 0.5 for line in borders], colors="black",
                                       linewidths=1.4))
    partial = np.argwhere(np.bincount(groups.ravel())[groups] < min(math.prod(block.window), groups.size))
    cells = [np.array([(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)]) * (width, height) - 0.5 for y, x in partial]
    axes.add_collection(PolyCollection(cells, facecolors="none", edgecolors="black", linewidths=0, hatch="////"))
    hide_ticks(axes)
    return len(cells) > 0


def _colouring(groups):
    """Return a colour number for each token (h, w) such that groups that touch have different ones, at corners too."""
    touch = set()
    for here, there in ((groups[:, 1:], groups[:, :-1]), (groups[1:], groups[:-1]), (groups[1:, 1:], groups[:-1, :-1]),
                        (groups[1:, :-1], groups[:-1, 1:])):
        touch |= set(zip(here.ravel().tolist(), there.ravel().tolist(), strict=True))
    colours = []
    for group in range(groups.max() + 1):
        taken = {colours[other] for pair in touch if group in pair for other in pair if other < group}
        colours.append(next(colour for colour in range(len(taken) + 1) if colour not in taken))
    return np.array(colours)[groups] % len(COLOURS)


def visualize_bias_tables(model, save_path=None, layers=None):
    """Draw the relative position bias of a Swin Transformer or a BEiT: a row for each table, an image for each head.

    An image shows what a head adds to the score of a key, by the offset of the key from the query, which is at the
    centre. Each table has its own colour scale, which is centred at zero. At most twelve heads are drawn.

    Parameters
    ----------
    model : nn.Module
        A Swin Transformer, ours or from timm, transformers or torchvision, or a BEiT, ours or from timm or
        transformers.
    save_path : str or Path, optional
        Where to write the figure.
    layers : int or sequence of int, optional
        Python indices of the tables, from 0. By default all, or six of them from the first to the last.

    Raises
    ------
    InputError
        If the model has no such tables, or if an index is out of range.

    References
    ----------
    Liu et al. 2021, "Swin Transformer", Eq. 4; Bao et al. 2022, "BEiT".
    """
    adapter = adapt(model)
    if not adapter.tables:
        raise InputError(f"this {class_name(model)} has no relative position bias; use a Swin Transformer with "
                         f"relative_bias=True, or a BEiT")
    chosen = _chosen_blocks(layers, len(adapter.tables))
    names, where = block_names(adapter), f" in {_counted(len(chosen), len(adapter.tables))}"
    if len(adapter.tables) != len(names):  # the first is shared
        names, where = ["all blocks", *names], ""
    tables = [bias_by_offset(*adapter.tables[i]).numpy() for i in chosen]
    n_columns = min(12, max(map(len, tables)))
    figure = new_figure(max(6.5, 2.6 + 1.05 * n_columns), 1.6 + 1.3 * len(chosen))
    panels = figure.subplots(len(chosen), n_columns, squeeze=False)
    for line, i, images in zip(panels, chosen, tables, strict=True):
        top, (down, right) = max(np.abs(images).max(), 1e-12), (side // 2 for side in images.shape[1:])
        for axes in line:
            axes.set_axis_off()
        for axes, head in zip(line, spread(len(images), n_columns), strict=False):
            axes.set_axis_on()
            mappable = axes.imshow(images[head], cmap="RdBu_r", vmin=-top, vmax=top,
                                   extent=(-right - 0.5, right + 0.5, down + 0.5, -down - 0.5))
            axes.set_title(f"head {head + 1}", fontsize=9)
            hide_ticks(axes)
        line[0].set_ylabel(names[i].replace(", ", "\n"), fontsize=10, rotation=0, ha="right", va="center")
        line[0].set_xticks(sorted({-right, 0, right}))
        line[0].set_yticks(sorted({-down, 0, down}))
        line[0].tick_params(labelsize=9)
        figure.colorbar(mappable, ax=line, ticks=[-top, 0, top], format=lambda value, place: in_digits(value),
                        fraction=0.05)
    figure.supxlabel("columns from the query to the key, in tokens (to the right: positive)", fontsize=11)
    figure.supylabel("rows from the query to the key\n(down: positive)", fontsize=11)
    set_heading(figure, f"Relative position bias{where}: what each head adds to a score, by the offset of the key from "
                        f"the query\n(red: more attention, blue: less; each row has its own scale)", fontsize=12)
    return finish(figure, save_path)


# ---- Patches ----------------------------------------------------------------------------------------------


def visualize_patch_embedding(image, patch_size=16, save_path=None, img_size=None, preprocessing=None):
    """Draw an image with its patch grid, and the patches as the sequence that a ViT reads.

    Parameters
    ----------
    image : str, Path, PIL image, array or Tensor
        Any kind of image that data/images.py accepts.
    patch_size : int or tuple of int, optional
        Side of a patch in pixels, or (height, width). If the image size is not a multiple of it, equal margins are cut
        off.
    save_path : str or Path, optional
        Where to write the figure.
    img_size : int or tuple of int, optional
        Side or (height, width) to which a picture is resized and cropped. By default, a picture whose shorter side
        exceeds 224 becomes 224 x 224; a smaller one keeps its size. Tensors always keep their size.
    preprocessing : Preprocessing, optional
        The normalisation to undo for a float tensor; by default the ImageNet normalisation.

    Raises
    ------
    InputError
        If the image is smaller than a patch, or has more than 4096 patches.
    """
    picture = _picture_to_cut(image, img_size, preprocessing)
    patch = pair(patch_size, "patch_size")
    picture, (rows, columns) = _cut_to_patches(picture, patch)
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


def _picture_to_cut(image, img_size, preprocessing):
    """Return the picture (H, W, 3) in 0..1 for visualize_patch_embedding, before it is cut."""
    if is_input(image):
        return to_array(as_batch(image, preprocessing.n_channels if preprocessing else 3), preprocessing)
    image = open_picture(image)
    if img_size is None and min(image.size) > 224:
        img_size = 224
    if img_size is not None:
        image = FitSize(img_size)(image)
    return np.asarray(image) / 255


def _cut_to_patches(picture, patch):
    """Crop the picture (H, W, 3) to whole patches; return it and the (rows, columns) of the patches."""
    height, width = picture.shape[:2]
    rows, columns = height // patch[0], width // patch[1]
    if not 1 <= rows * columns <= 4096:
        raise InputError(f"patches of {patch[0]}x{patch[1]} pixels cut an image of {height}x{width} pixels into "
                         f"{rows * columns} patches; expected 1 to 4096, choose another patch_size")
    top, left = (height - rows * patch[0]) // 2, (width - columns * patch[1]) // 2
    return picture[top:top + rows * patch[0], left:left + columns * patch[1]], (rows, columns)


# ---- Receptive fields -------------------------------------------------------------------------------------


def compare_receptive_fields(save_path="receptive_fields.png", models=None, images=None):
    """Draw the measured receptive fields of a CNN and a ViT, each before and after training.

    There is a row for each model and a column for each of four depths. All panels share one logarithmic colour scale;
    white pixels have exactly no influence. The circles hold 50% and 90% of the mass; the titles state their radii.

    Parameters
    ----------
    save_path : str or Path, optional
        Where to write the figure; None writes nothing.
    models : dict, optional
        Name -> trained model, a ConvNet or a ViT. By default convnet_shapes and vit_nano_shapes. Untrained twins are
        made from their configurations with seed 0; models from other libraries are only shown trained.
    images : Tensor, shape (B, 3, H, W), optional
        Images over which the gradients are averaged, normalised for all models. By default 32 drawn shapes, prepared
        for each model.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        For the same reasons as `load` and `receptive_field`, and if `models` is not a dict of models.
    """
    which = ""
    if models is None:
        shipped = {"ConvNet": "convnet_shapes", "ViT": "vit_nano_shapes"}
        models = {name: load(model) for name, model in shipped.items()}
        which = "".join(f"; {name}: {model}" for name, model in shipped.items())
    _check_named(models)
    rows = []
    for name, model in models.items():
        own_images = _shapes_for(model, 32) if images is None else images
        if adapt(model).library == "ours":
            rows.append((f"{name}, untrained", untrained_copy(model), own_images))
        rows.append((f"{name}, trained", model, own_images))
    figure = new_figure(11, 2.7 * len(rows) + 0.7)
    panels = figure.subplots(len(rows), 4, squeeze=False)
    scale = LogNorm(1e-6, 1e-1)
    for (name, model, own_images), line in zip(rows, panels, strict=True):
        adapt(model).check_images(own_images)
        for i, (depth, axes) in enumerate(zip(_four_depths(model), line, strict=True)):
            if depth is None:
                axes.set_axis_off()
                continue
            _draw_field(axes, model, own_images, depth, scale)
            if i == 0:
                axes.set_ylabel(name, fontsize=12)
    colorbar = figure.colorbar(ScalarMappable(scale, "viridis"), ax=panels, shrink=min(0.9, 3 / len(rows)), aspect=30,
                               extend="both")
    colorbar.set_label(wrapped("share of the gradient at each pixel (log scale; white is exactly 0)",
                               0.8 * figure.get_figheight(), 12), fontsize=12)
    over = "32 drawn shapes" if images is None else f"{len(images)} image{'s' * (len(images) > 1)}"
    set_heading(figure, "Which pixels one unit in the centre sees (axes and radii in pixels)\n"
                    f"Circles hold 50% (solid) and 90% (dashed) of the gradient\nMean over {over}{which}", fontsize=14)
    return finish(figure, save_path)


def _check_named(models):
    """Raise InputError unless models is a dict with at least one model."""
    if not isinstance(models, dict) or not models:
        raise InputError(f"models is {'empty' if isinstance(models, dict) else f'a {type(models).__name__}'}; expected "
                         f"name -> trained model, such as {{'ViT': model}}")


def _draw_field(axes, model, images, depth, scale):
    """Draw one receptive field with its two circles, or the reason why it cannot be measured."""
    adapter = adapt(model)
    start = "patch embedding" if adapter.projects_patches else "stem"
    place = f"after {adapter.unit} {depth} of {len(adapter.layers) - 1}" if depth else f"after the {start}"
    try:
        field = receptive_field(model, images, depth)  # (height, width)
    except InputError as error:  # such as weights of zero: the gradient is zero at every pixel
        axes.text(0.5, 0.5, wrapped(f"not measured: {str(error).split(', so')[0]}", 1.8, 9), ha="center", va="center",
                  fontsize=9, transform=axes.transAxes)
        axes.set_title(f"{place}\n", fontsize=11)
        hide_ticks(axes)
        return
    centre = unit_centre(model, field.shape, depth)
    half, most = (radius_holding(field, share, centre) for share in (0.5, 0.9))
    axes.imshow(np.ma.masked_equal(field.numpy(), 0), cmap="viridis", norm=scale)
    for radius, style in ((half, "-"), (most, "--")):
        axes.add_patch(Circle(centre[::-1], radius, fill=False, color=VERMILION, linewidth=1.8, linestyle=style))
    axes.set_title(f"{place}\n50%: {half:.1f}   90%: {most:.1f} px", fontsize=11)
    axes.set(xlim=(-0.5, field.shape[1] - 0.5), ylim=(field.shape[0] - 0.5, -0.5))
    axes.set_xticks([0, field.shape[1] - 1])
    axes.set_yticks([0, field.shape[0] - 1])
    axes.tick_params(labelsize=9)


def _four_depths(model):
    """Return the depths 0, 1, halfway and last; None for each that the model lacks."""
    last = len(adapt(model).layers) - 1
    depths = sorted({0, 1, (1 + last) // 2, last})
    return depths + [None] * (4 - len(depths))


def _shapes_for(model, n_images):
    """Draw shapes and prepare them for the model, (n_images, C, H, W)."""
    return prepare_images(list(make_shapes(n_images, max(*adapt(model).img_size, 8)).images), model)


def compare_reach(models, images, save_path=None, untrained=True):
    """Draw how far models look, by stage: their attention distance, and the radius of their receptive field.

    The radii are those of compare_receptive_fields. The blocks of a stage lie side by side within it. A ViT has no
    stages: its blocks are spread evenly over those of the other models.

    Parameters
    ----------
    models : dict
        Name -> model: ConvNets, Swin Transformers or ViTs.
    images : list of images or Tensor, shape (B, C, H, W)
        Images of any kind, prepared for each model, or a batch that is normalised for all of them.
    save_path : str or Path, optional
        Where to write the figure.
    untrained : bool, optional
        Whether our models also have an untrained twin, dashed, with the same configuration and seed 0.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        For the same reasons as `receptive_field`, and if `models` is not a dict of models.

    References
    ----------
    Dosovitskiy et al. 2021 (the ViT paper), Fig. 7 (right); Luo et al. 2016, "Understanding the Effective Receptive
    Field in Deep Convolutional Neural Networks".
    """
    _check_named(models)
    drawn = {}
    for name, model in models.items():
        drawn[name] = model, prepare_images(images, model)
        if untrained and adapt(model).library == "ours":
            drawn[f"{name}, untrained"] = untrained_copy(model), drawn[name][1]
    staged = [len(adapt(model).layers) - 1 for model in models.values() if not adapt(model).attends]
    figure, looks = new_figure(15, 4.8), looks_of(drawn)
    distance, half, most = figure.subplots(1, 3)
    for name, (model, own_images) in drawn.items():
        ends, middles = _places_in_stages(adapt(model), max(staged, default=0))
        fields = [receptive_field(model, own_images, depth + 1) for depth in range(len(ends))]
        centres = [unit_centre(model, field.shape, depth + 1) for depth, field in enumerate(fields)]
        for axes, share in ((half, 0.5), (most, 0.9)):
            radii = [radius_holding(field, share, centre) for field, centre in zip(fields, centres, strict=True)]
            axes.plot(ends, radii, label=name, **looks[name].line)
        if middles is not None:
            distances = mean_distances(model, own_images).numpy()  # (L, H)
            if not looks[name].hollow:
                distance.plot(middles, distances, ".", color=looks[name].colour, alpha=0.5)
            distance.plot(middles, np.nanmean(distances, axis=1), **looks[name].line)
    distance.set_title("attention distance of the blocks\n(points: heads; lines: means over the heads)", fontsize=11)
    half.set_title("receptive field of the centre unit:\nradius that holds 50% of the gradient", fontsize=11)
    most.set_title("receptive field of the centre unit:\nradius that holds 90% of the gradient", fontsize=11)
    last = round(half.dataLim.x1)
    for axes in (distance, half, most):
        axes.set(ylabel="pixels", xlim=(0, last + 0.1))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    unit = "stage" if staged else "block"
    distance.set_xticks([i + 0.5 for i in range(last)], [f"{unit} {i + 1}" for i in range(last)])
    for axes in (half, most):
        axes.set_xticks(range(1, last + 1), [f"{unit} {i + 1}" for i in range(last)])
        axes.set_xlabel(f"after this {unit}")
    distance.set_xlabel(f"in this {unit}")
    figure.legend(*half.get_legend_handles_labels(), loc="outside right center", fontsize=11)
    n_images = len(next(iter(drawn.values()))[1])
    over = f"{n_images} image{'s' * (n_images > 1)}"
    set_heading(figure, f"How far models look, in pixels (mean over {over})", fontsize=14)
    return finish(figure, save_path)


def _places_in_stages(adapter, n_stages):
    """Return where layers lie on an axis of stages: (ends of the stages or blocks, middles of the blocks or None).

    Blocks lie side by side in their stage; those of a ViT are spread over n_stages, if there are any.
    """
    ends = np.arange(1, len(adapter.layers))
    if adapter.windowed:
        return ends, [i + (j + 0.5) / len(stage) for i, stage in enumerate(adapter.stages) for j in range(len(stage))]
    if not adapter.attends:
        return ends, None
    step = n_stages / len(ends) if n_stages else 1
    return ends * step, (ends - 0.5) * step


# ---- A contact sheet --------------------------------------------------------------------------------------


def visualize_reconstruction(model, images, save_path=None, mask_ratios=None, seed=0):
    """Draw how a masked autoencoder fills in hidden patches, beside two controls that use no network.

    Each row shows an image, its visible patches, the model's reconstruction, an interpolation of the visible pixels,
    and their mean colour. A model of normalised pixels borrows the mean and the contrast of each hidden patch; the last
    column then shows what the borrowed means alone give. The number is the mean squared error of the hidden pixels, as
    in analysis.reconstruction.reconstruction_errors, with the same masks.

    Parameters
    ----------
    model : MaskedAutoencoder
    images : list of images or Tensor, shape (B, C, H, W)
        Images of any kind, or a normalised batch.
    save_path : str or Path, optional
        Where to write the figure.
    mask_ratios : sequence of float, optional
        Shares of the patches to hide, with one row for each image and share. By default the model's.
    seed : int, optional
        Seed of the masks.

    Raises
    ------
    InputError
        If the model does not reconstruct images, or if a ratio hides nothing or everything.

    References
    ----------
    He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", Fig. 2 to 4.
    """
    model = unwrapped(model)
    inputs = prepare_images(images, model)  # (B, C, H, W)
    found = [reconstructions(model, inputs, ratio, seed) for ratio in mask_ratios or (None,)]
    shown = images_of_ours(model)
    scale = torch.tensor(shown.std)[:, None, None] if model.preprocessing else 1.0  # (C, 1, 1)
    n_columns, n_rows = 2 + len(found[0].filled), len(inputs) * len(found)
    figure = new_figure(2.2 * n_columns, 0.9 + (2.1 * inputs.shape[2] / inputs.shape[3] + 0.35) * n_rows)
    panels = figure.subplots(n_rows, n_columns, squeeze=False)
    for row, (i, one) in zip(panels, itertools.product(range(len(inputs)), found), strict=True):
        hidden = one.hidden[i]  # (H, W)
        for axes, (name, filled) in zip(row, {"image": one.images, "visible": one.images,
                                              **one.filled}.items(), strict=True):
            hide_ticks(axes)
            axes.imshow(_with_hidden(filled[i], hidden if name == "visible" else None, shown))
            words = {"image": "the image", "visible": f"visible: {percent(1 - hidden.float().mean().item())}",
                     "model": "the model"}.get(name, name)
            if name in one.filled:
                wrong = ((filled - one.images)[i] * scale)[hidden.expand_as(one.images[i])].square().mean()
                words += f": {wrong:.4f}"
            axes.set_title(words, fontsize=10)
    unit = "pixels from 0 to 1" if model.preprocessing else "normalised pixels"
    set_heading(figure, "Hidden patches (blue-grey), filled in by the model and by controls\n"
                        f"mean squared error of the hidden pixels, smaller is better ({unit})", fontsize=13)
    if found[0].borrows:
        figure.supxlabel("The model predicts normalised patches: its pictures borrow the mean and the contrast of the "
                         "hidden patches, which it has not seen.", fontsize=9)
    return finish(figure, save_path)


def visualize_tokens(model, tokenizer, images, save_path=None, ratio=0.4, seed=0):
    """Draw the tokens that a MaskedTokenModel predicts for hidden patches, beside the true ones.

    Each row shows an image, its true tokens, its visible patches, and the predicted tokens in the hidden places. A
    token is drawn as the mean of the patches that it stands for.

    Parameters
    ----------
    model : MaskedTokenModel
    tokenizer : vit_bridge.training.tokenizer.PatchTokenizer
        The one that the model was trained with.
    images : Tensor, shape (B, C, H, W)
        Normalised images.
    save_path : str or Path, optional
        Where to write the figure.
    ratio : float, optional
        Share of the patches to hide.
    seed : int, optional
        Seed of the masks.

    Raises
    ------
    InputError
        If the model predicts other tokens than the tokenizer's, or if the ratio is out of range.

    References
    ----------
    Bao et al. 2022, "BEiT: BERT Pre-Training of Image Transformers", Fig. 1.
    """
    model = unwrapped(model)
    if not 0 < ratio < 1:
        raise InputError(f"ratio {ratio!r} must lie between 0 (hide no patch) and 1 (hide all patches)")
    if ask(model, "n_tokens") != tokenizer.n_tokens:
        raise InputError(f"a {class_name(model)} that predicts {ask(model, 'n_tokens')} tokens does not fit a "
                         f"tokenizer of {tokenizer.n_tokens}; pass the tokenizer that the model was trained with")
    size, patch = tuple(images.shape[2:]), tokenizer.patch_size
    grid = grid_of(size, patch)
    generator = torch.Generator().manual_seed(seed)
    n_hidden = max(1, round(ratio * grid[0] * grid[1]))
    mask = torch.stack([block_mask(grid, n_hidden, generator).flatten() for _ in images])  # (B, N)
    with torch.no_grad(), evaluating(model):
        guessed = model(to_model(images, model), mask.to(device_of(model))).argmax(dim=2).cpu()  # (B, N)
    true = tokenizer(images.to(tokenizer.centres.device)).cpu()  # (B, N)

    def drawn(ids):
        """Return images of tokens (B, C, H, W)."""
        pictures = tokenizer.pictures.cpu()[ids].flatten(2).transpose(1, 2)  # (B, C P P, N)
        return torch.nn.functional.fold(pictures, size, patch, stride=patch)

    hidden = mask.view(-1, *grid).repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)  # (B, H, W)
    columns = {"the image": images.cpu(), "visible": images.cpu(), f"all tokens ({tokenizer.n_tokens})": drawn(true),
               "predicted tokens": torch.where(hidden[:, None], drawn(guessed), images.cpu())}
    figure = new_figure(9, 0.9 + (2.2 * size[0] / size[1] + 0.35) * len(images))
    panels = figure.subplots(len(images), len(columns), squeeze=False)
    for i, row in enumerate(panels):
        for axes, (words, shown) in zip(row, columns.items(), strict=True):
            hide_ticks(axes)
            axes.imshow(_with_hidden(shown[i], hidden[i] if words == "visible" else None, images_of_ours(model)))
            if words.startswith("predicted"):
                right = (guessed == true)[i][mask[i]].float().mean().item()
                words = f"predicted: {percent(right)} right"
            axes.set_title(words, fontsize=10)
    set_heading(figure, f"Visual tokens, each drawn as the mean of its patches ({percent(ratio)} hidden, blue-grey)",
                fontsize=13)
    return finish(figure, save_path)


def _with_hidden(image, hidden, preprocessing):
    """Return an image (C, H, W) as an array for imshow, with the hidden pixels (H, W) blue-grey."""
    picture = np.array(as_picture(image, preprocessing), dtype=float)
    picture = picture / 255 if picture.max() > 1 else picture
    if hidden is not None:
        picture[hidden.numpy()] = HIDDEN
    return picture.clip(0, 1)


HIDDEN = (0.42, 0.5, 0.62)  # colour of a hidden patch, which stands out in grey images too


def plot_images(images, titles=None, columns=8, save_path=None, title=None, preprocessing=None):
    """Draw a contact sheet: images, each with a title above it.

    Parameters
    ----------
    images : list of images or Tensor, shape (N, 3, H, W)
        Images of any kind, or a batch.
    titles : sequence, optional
        One title for each image.
    columns : int, optional
        Maximum number of images in a row.
    save_path : str or Path, optional
        Where to write the figure.
    title : str, optional
        Heading of the sheet.
    preprocessing : Preprocessing, optional
        The normalisation to undo for float tensors; by default the ImageNet normalisation.

    Raises
    ------
    InputError
        If there are no images, if a single image is not in a list, or if images and titles differ in number.
    """
    if isinstance(images, (str, Path)) or (isinstance(images, np.ndarray) and images.shape[2:] in ((), (3,), (4,))):
        what = f"an array of shape {images.shape}" if isinstance(images, np.ndarray) else repr(str(images))
        raise InputError(f"got {what}, a single image; pass a list, such as [image]")
    pictures = [as_picture(image, preprocessing) for image in images]
    titles = [""] * len(pictures) if titles is None else [str(text) for text in titles]
    if not pictures or len(titles) != len(pictures):
        raise InputError(f"{len(pictures)} images and {len(titles)} titles do not match; pass at least one "
                         f"image, and one title for each or titles=None")
    check_int("columns", columns, 1)
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    lines = max(text.count("\n") + 1 if text else 0 for text in titles)
    figure = new_figure(max(1.5 * columns, 4), rows * (1.5 + 0.2 * lines) + (0.5 if title else 0))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.set_axis_off()
    for panel, picture, text in zip(panels, pictures, titles, strict=False):
        panel.imshow(picture)
        panel.set_title(text, fontsize=10, parse_math=False)  # class names may contain a $
    if title:
        set_heading(figure, title, fontsize=14)
    return finish(figure, save_path)


# ---- The commands -----------------------------------------------------------------------------------------


def _load(name, n_heads, **facts):
    facts = dict(facts, n_heads=n_heads)
    return _with_encoder_alone(load(name, **{key: value for key, value in facts.items() if value is not None}), name)


def _with_encoder_alone(model, name):
    """Return the model, or the encoder of one that learned without labels: the part to look inside."""
    if encoder := ask(model, "encoder"):
        print(f"{name} is a {class_name(model)}, which learned without labels; the views show its encoder.")
        return encoder()
    return model


def _accept_photographs(model):
    """Let a ViT take photographs whole; one whose positions fit a single grid, as a BEiT's, sees them cropped."""
    with suppress(InputError):
        model.any_size = True


def _run_selfcheck(options):
    """Print which checks hold on a model; exit with status 1 if one does not hold."""
    model = _load(options.pretrained, options.n_heads)
    adapt_vit(model)
    checks = selfcheck(model, prepare_images(_images_for(model, options.photos, 4), model))
    words = {True: "holds", False: "DOES NOT HOLD", None: "does not apply"}
    for check in checks:
        print(f"{words[check.holds]}: {check.name} ({check.found})")
    if any(check.holds is False for check in checks):
        raise SystemExit(1)


def _run_explore(options):
    """Write a page of whole photographs or of drawn shapes, and print a summary of it."""
    model = _load(options.pretrained, options.n_heads, class_names=options.class_names)
    other = _load(options.compare_with, options.compare_n_heads) if options.compare_with else None
    whole = Whole(options.max_tokens, options.img_size) if options.photos else None
    for one in (model, other):
        if whole and one is not None:
            _accept_photographs(one)
    replaced = is_page(options.output)
    page = explore(model, _images_for(model, options.photos, options.n_images), options.output, other,
                   [_short_name(name) for name in (options.pretrained, options.compare_with) if name], whole=whole,
                   max_mb=options.max_mb)
    for remark in page.remarks:
        print(remark)
    print(f"{page.path}: {page.megabytes:.1f} MB{', replaces the earlier page' if replaced else ''}; open it in any "
          f"browser. {'Photographs are shown whole, in' if whole else 'Drawn shapes are shown in'} "
          f"{page.describe_grids()}. A model predicts only the classes it was trained on.")


def _run_reconstruct(options):
    """Draw what a model trained without labels fills in, and print the errors."""
    model = load(options.checkpoint)
    ratios = options.mask_ratios or (0.5, 0.75, 0.9)
    inputs = prepare_images(options.photos, model)
    visualize_reconstruction(model, inputs, options.output, ratios, options.seed)
    for ratio in ratios:
        errors = reconstruction_errors(model, inputs, ratio, options.seed)
        print(f"{ratio:.0%} hidden, mean squared error of hidden pixels from 0 to 1: "
              + "; ".join(f"{name} {error:.4f}" for name, error in errors.items()))
    print(f"Written: {options.output}")


def _images_for(model, photos, n_images):
    """Return the photographs, or drawn shapes as pictures; they are normalised for each model later."""
    return photos or list(make_shapes(n_images, max(*adapt(model).img_size, 8), start=TEST_START).images)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        options = _command_parser().parse_args(argv)
        options.run(options)
        return
    parser = _look_parser()
    if not argv:
        parser.print_help()
        return
    _run_look(parser.parse_args(argv))


COMMANDS = ("selfcheck", "explore", "reconstruct")


def _command_parser():
    parser = OneLineParser(prog="visualizations.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, words in zip(COMMANDS[:2], (_run_selfcheck, _run_explore), ("check the formulas on a model",
                                                                          "write an interactive page"), strict=True):
        command = commands.add_parser(name, help=words)
        command.add_argument("photos", nargs="*", help="image files (default: drawn shapes)")
        command.add_argument("--pretrained", "--checkpoint", default="vit_nano_shapes", metavar="NAME",
                             help="the model: a name that `python train_vit.py inspect` lists, or a checkpoint file "
                                  "(default: %(default)s, trained on drawn shapes)")
        add_n_heads(command, of="the model")
        command.set_defaults(run=run)
    add_class_names(command)
    command.add_argument("--max-tokens", type=int_at_least(1), metavar="N", help="maximum number of patches of a "
                         "photograph (default: as many as the model was built for)")
    command.add_argument("--img-size", type=int_at_least(1), nargs="+", action=Size, metavar="PIXELS", help="side, or "
                         "height and width, to which photographs are stretched (default: their own proportions)")
    command.add_argument("--max-mb", type=positive(), default=50.0, metavar="MB", help="maximum size of the page; "
                         "photographs get as many patches as fit (default: %(default)g)")
    command.add_argument("--compare-with", metavar="NAME", help="a second model to compare with, a ViT or a ConvNet")
    add_n_heads(command, "--compare-n-heads", "the second model")
    command.add_argument("--output", default="attention.html", help="file of the page (default: %(default)s)")
    command.add_argument("--n-images", type=int_at_least(1), default=6, help="number of drawn shapes "
                         "(default: %(default)s)")
    command = commands.add_parser("reconstruct", help="draw how a model trained with `train_vit.py --pretrain mae` "
                                                      "fills in hidden patches")
    command.add_argument("photos", nargs="+", help="image files")
    command.add_argument("--checkpoint", required=True, metavar="FILE", help="the model, such as runs/mae/best.pt")
    command.add_argument("--mask-ratios", type=Bounded(float, 0, 1, "0 to 1"), nargs="+", metavar="F", help="shares of "
                         "the patches to hide (default: 0.5 0.75 0.9)")
    command.add_argument("--output", default="reconstruction.png", help="file of the figure (default: %(default)s)")
    command.add_argument("--seed", type=seed(), default=0, metavar="N", help="seed of the masks (default: %(default)s)")
    command.set_defaults(run=_run_reconstruct)
    return parser


# ---- python visualizations.py photo.jpg -------------------------------------------------------------------


def _look_parser():
    parser = OneLineParser(
        prog="visualizations.py", usage="python visualizations.py photo.jpg [more.jpg ...] [options]",
        description=f"Look inside a Vision Transformer on your photographs. Writes look.png, each of its panels as "
                    f"a file, and explorer.html, an interactive page; prints the findings. The model is "
                    f"{FIRST_LOOK} (about {PUBLIC[FIRST_LOOK].megabytes:.0f} MB, {PUBLIC[FIRST_LOOK].licence}); it is "
                    f"downloaded once.",
        epilog="Other commands, each with --help: `python visualizations.py explore` makes a page of several "
               "photographs or two models; `selfcheck` checks the formulas on a model. (Write ./explore for a "
               "photograph with that name.)")
    parser.add_argument("photos", nargs="+", metavar="photo.jpg", help="image files, or folders of them")
    parser.add_argument("--pretrained", "--checkpoint", metavar="NAME", help=f"a different model: a name that `python "
                        f"train_vit.py inspect` lists, such as {WITH_CLASSES}, whose predicted classes can be "
                        f"explained; or a checkpoint file (default: {FIRST_LOOK})")
    parser.add_argument("--output-dir", metavar="DIR", help="folder for the files; each of several "
                        "photographs gets a subfolder (default: look/ and the photograph's name)")
    parser.add_argument("--max-tokens", type=int_at_least(1), metavar="N", help="maximum number of patches; more show "
                        "more detail and take longer (default: as many as the model was built for)")
    parser.add_argument("--img-size", type=int_at_least(1), nargs="+", action=Size, metavar="PIXELS", help="side, or "
                        "height and width, to which photographs are stretched (default: their own proportions)")
    parser.add_argument("--crop", action="store_true", help="show the model only the centre, as in validation")
    parser.add_argument("--max-mb", type=positive(), default=50.0, metavar="M", help="maximum size of explorer.html; "
                        "the page gets as many patches as fit (default: %(default)g)")
    parser.add_argument("--label", help="label of the model in the figure and the page (default: its name)")
    add_class_names(parser)
    add_n_heads(parser, of="the model")
    return parser


def _run_look(options):
    started = time.monotonic()
    if options.crop and (options.max_tokens or options.img_size):
        raise InputError("--crop shows the centre at the model's own size; remove --max-tokens and --img-size, or "
                         "remove --crop")
    files = list(dict.fromkeys(file for path in options.photos for file in files_at(path)))
    for file in files:
        check_not_empty(file)
        try:
            open_header(file).close()
        except (OSError, ValueError, SyntaxError):
            open_image(file)  # raises the precise error before a model is downloaded
    remark_on(files)
    model, name = _model_to_look_with(options)
    given = options.pretrained or name
    adapter = adapt(model)
    if not adapter.any_size and not options.crop:
        assume(f"{name} takes images of {describe_size(adapter.img_size)} pixels only, because its positions fit one "
               f"grid, so it sees the centre of each photograph, as with --crop")
        options.crop = True
    whole = None if options.crop else Whole(options.max_tokens, options.img_size)
    if options.max_tokens and not adapter.has_attention:
        raise InputError(f"--max-tokens limits patches, and {name} is a ConvNet, which has none; use --img-size")
    with ExitStack() as stack:
        stack.enter_context(unless_empty(Path(options.output_dir or "look")))
        folders = [stack.enter_context(unless_empty(folder)) for folder in _folders(options.output_dir, files, name)]
        bar = stack.enter_context(tqdm(total=2 * len(files), leave=False, disable=None, bar_format="{desc} {bar} "
                                       "{elapsed}"))
        looks = []
        for file in files:
            bar.set_description_str(f"looking at {Path(file).name}")
            looks.append(_look_within_memory(model, file, whole))
            bar.update()
        if len(looks) > 1:
            share_colours(looks)
        for file, folder, one in zip(files, folders, looks, strict=True):
            bar.set_description_str(f"drawing {Path(file).name}")
            found = describe(one, options.label or given, options.crop)
            written, remarks = _write_look(model, one, file, folder, name, found, whole, options.max_mb)
            bar.update()
            with bar.external_write_mode():
                _print_look(one, file, given, folder, found, written, remarks)
    print(f"{'Took':12} {time.monotonic() - started:.0f} s")


def _model_to_look_with(options):
    """Return (model, its name in figure and page), ready for photographs of any size.

    Offline, a shipped model replaces the default, and its label states this.
    """
    facts = {name: value for name in ("n_heads", "class_names") if (value := getattr(options, name)) is not None}
    chosen = options.pretrained or FIRST_LOOK
    name = _short_name(chosen)
    try:
        model = _with_encoder_alone(load(chosen, **facts), name)
    except NotFetched as error:
        if options.pretrained:
            raise
        model = load(WITHOUT_NETWORK, **facts)
        name = f"{WITHOUT_NETWORK} (shipped; {FIRST_LOOK} could not be downloaded)"
        side = adapt(model).img_size[0]
        assume(f"{FIRST_LOOK} cannot be downloaded ({error.reason}), so the shipped {WITHOUT_NETWORK} is used, a ViT "
               f"for {side}-pixel images; choose a different model with --pretrained NAME or FILE")
    if adapt(model).attends:
        _accept_photographs(model)
    return model.to(choose_device()), options.label or name


def _short_name(model):
    """Return the name of a model for figure and page; for a file, its folder and file name."""
    return "/".join(Path(model).absolute().parts[-2:]) if os.path.exists(model) else model


def _look_within_memory(model, file, whole):
    try:
        with explain_out_of_memory(device_of(model)):
            return look(model, file, whole)
    except OutOfMemory as error:
        raise InputError(f"out of memory for {file!r} with this many patches; choose fewer with --max-tokens, or a "
                         f"smaller --img-size") from error


def _folders(output_dir, files, name):
    """Make a folder for the look at each file and return them.

    A folder with other files is left unchanged: InputError is raised if the user chose it; otherwise, the next free
    number is appended to its name. Also raises InputError if a folder is not writable.
    """
    folders = []
    for file in files:
        stem = Path(output_dir or "look")
        if output_dir is None or len(files) > 1:
            stem = stem / Path(file).stem
        folder, n = stem, 1
        while folder in folders or _holds_other(folder, file, name):
            if output_dir and folder not in folders:
                raise InputError(f"{folder} has files that this command did not write for {file!r} with {name}; choose "
                                 f"a new --output-dir, so that nothing is overwritten")
            n += 1
            folder = stem.with_name(f"{stem.name}-{n}")
        folders.append(folder)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".write-test").touch()
            (folder / ".write-test").unlink()
        except OSError as error:
            raise InputError(f"cannot write to {folder} ({error.strerror}); choose another --output-dir") from error
    return folders


def _holds_other(folder, file, name):
    """Return whether a folder contains files other than the look of this model at this photograph."""
    try:
        if json.loads((folder / "look.json").read_text(encoding="utf-8"))["of"] == _identity(file, name):
            return False
    except (OSError, ValueError, KeyError, TypeError):  # no record, or the record of a different program
        pass
    return folder.is_dir() and any(entry.name[0] != "." for entry in folder.iterdir())


def _identity(file, name):
    return dict(photograph=os.path.realpath(file), model=name)


def _write_look(model, one, file, folder, name, found, whole, max_mb):
    """Write all files of a look and return (their paths, remarks on the page).

    The page is made first, because it may raise InputError.
    """
    written, remarks = [], []
    if one.adapter.has_attention:
        page = explore(model, [file], folder / "explorer.html", names=[name], title=f"{Path(file).name}: {name}",
                       whole=whole, max_mb=max_mb)
        written.append(page.path)
        remarks = page.remarks
    heading = f"{Path(file).name}, {' × '.join(map(str, one.size))} pixels (height × width)"
    figures = dict(look=draw_look(one, name, heading))
    figures |= {panel.name: draw_panel(panel, one, name) for panel in panels_of(one) if panel.tiles}
    for stem, figure in figures.items():
        path = folder / f"{stem}.png"
        write_whole(path, lambda file, figure=figure: figure.savefig(file, format="png", dpi=150))
        written.append(path)
    record = dict(of=_identity(file, name), found=dict(found), files=[path.name for path in written])
    write_json(record, folder / "look.json")
    return sorted(written, key=lambda path: path.name != "look.png"), remarks


def _print_look(one, file, given, folder, found, written, remarks):
    print(f"{file}")
    for what, words in found:
        print(f"{what:12} {words}")
    print(f"{'Written':12} {folder}{os.sep}: " + ", ".join(f"{path.name} ({_in_bytes(path.stat().st_size)})"
                                                          for path in written))
    for remark in remarks:
        print(f"{'Page':12} {remark}")
    if not one.adapter.has_attention:
        print(f"{'Page':12} none: a CNN has no attention; to compare it with a ViT: python visualizations.py "
              f"explore {file} --compare-with {given}")


def _in_bytes(n):
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB"


if __name__ == "__main__":
    script(main)
