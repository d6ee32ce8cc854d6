"""What one model does with images, drawn: where it looks, where its answer comes from, and how it comes about.

    AttentionVisualizer         the views of one model; each also as numbers
    AttentionVisualizer.explore the same to play with, as one HTML page
    visualize_attention_grid    several images, a row each, layer by layer

A Figure names the class that is predicted, where the classes have names, and its probability. Maps that are compared
share one colour scale. What an image may be stands in pictures.py; the numbers come from recording.py and
explanations.py.

Letters:  B images, L blocks, H heads, N tokens (prefix tokens, then patches), K classes.
"""

import math
import textwrap

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle

from charts import COLOURS, VERMILION, finish, hide_ticks, new_figure, set_heading, show_legend
from explanations import (
    METHODS,
    cam_layer,
    check_pool,
    compare_explanations,
    explain,
    logit_lens,
    selfcheck,
    token_norms,
)
from explorer import explore
from measurements import (
    attention_distance,
    check_index,
    choose_device,
    class_probabilities,
    cls_attention_grid,
    select_attention,
    uniform_attention_distance,
)
from pictures import as_picture, extent_of, prepare_image, prepare_images, proportion, spread, statistics_of
from recording import anatomy_of, attention_maps, record
from vit_model import InputError, check_whole

TITLES = {"attention": "attention of the last block", "rollout": "attention rollout", "relevance": "relevance",
          "grad_cam": "Grad-CAM"}


class AttentionVisualizer:
    """Views of a ViT: ours, or one of timm, transformers or torchvision. Without further words they are of what the
    head reads: the CLS token, or with pool="mean" the patches on average. Layer i is the block with the number i, from
    0; layers of tokens have one more, as tokens stand before the first block too.

    attention_maps, rollout, relevance, grad_cam, attention_distance give numbers; visualize_... a Figure.

    The model is moved to the device ("auto": CUDA where there is one) and stays there; its weights and its mode
    remain as they are. Raises InputError for a model without attention and for a device that is not there.
    """

    def __init__(self, model, device="auto"):
        anatomy_of(model)
        self.model = model.to(choose_device(device))

    @property
    def anatomy(self):
        """recording.anatomy_of the model as it is now; its head and its class names may have been changed."""
        return anatomy_of(self.model)

    # ---- Numbers

    def attention_maps(self, image):
        """(L, H, N, N); rows are queries and sum to one."""
        return attention_maps(self.model, prepare_image(image, self.model)[0])[:, 0].cpu()

    def rollout(self, image, discard_ratio=0.0):
        """(rows, columns): explanations.rollout of what the head reads."""
        return self.explain(image, "rollout", discard_ratio=discard_ratio).heat[0]

    def relevance(self, image, target=None):
        """(rows, columns): explanations.relevance for a class, None: that which is predicted."""
        return self.explain(image, "relevance", target).heat[0]

    def grad_cam(self, image, target=None, layer_idx=None):
        """(rows, columns): Grad-CAM of the patch tokens after a block, for a class. See explanations.cam_heat."""
        return self.explain(image, "grad_cam", target, layer_idx=layer_idx).heat[0]

    def attention_distance(self, images):
        """(L, H) in pixels: how far patches look, over images: a list of them, or a normalised batch (B, C, height,
        width)."""
        seen = record(self.model, prepare_images(images, self.model))
        return attention_distance(torch.stack(seen.maps), seen.grid, seen.anatomy.patch_size, seen.anatomy.n_prefix)

    def explain(self, image, method, target=None, **options):
        """An explanations.Explanation of one image."""
        return explain(self.model, prepare_image(image, self.model)[0], method, target, **options)

    def selfcheck(self, images=None):
        """explanations.selfcheck of the model; images: normalised, None: noise."""
        return selfcheck(self.model, None if images is None else prepare_images(images, self.model))

    # ---- Attention

    def visualize_attention(self, image, layer_idx=-1, head_idx=None, save_path=None, patch=None):
        """The image, the weights with which CLS attends to its patches, and those weights over the image.

        layer_idx counts from 0, or from the end where negative; head_idx too, None is the mean over the heads.
        patch: (row, column), from 0: what this patch attends to, in the place of CLS.
        Raises InputError for an index out of range or an image that cannot be used.
        """
        images, picture = prepare_image(image, self.model)
        maps = attention_maps(self.model, images).cpu()  # (L, 1, H, N, N)
        attention = select_attention(maps, layer_idx, head_idx)[0]  # (N, N)
        grid = self.looks_at(attention, images, patch).numpy()  # (rows, columns)
        figure = new_figure(12, 1.1 + 3.4 * proportion(picture))
        left, middle, right = figure.subplots(1, 3)
        left.imshow(picture)
        left.set_title("the image, as the model sees it" + self.describe_prediction(images))
        mappable = middle.imshow(grid, cmap="viridis", vmin=0, vmax=grid.max(), extent=extent_of(picture))
        only_cls = self.anatomy.n_prefix == 1 and getattr(self.model, "cls_token", True) is not None
        rest = "CLS" if only_cls else "tokens that are no patch"
        middle.set_title("weight of each patch" + (f"\n(in all {grid.sum():.1%}; the rest goes to {rest})"
                                                   if self.anatomy.n_prefix else ""))
        right.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=1)
        right.imshow(grid, cmap="viridis", vmin=0, vmax=grid.max(), alpha=0.6, extent=extent_of(picture),
                     interpolation="bilinear")
        right.set_title("the same over the image,\nsmoothed")
        figure.colorbar(mappable, ax=right, label="attention weight of a patch")
        for axes in (left, middle, right):
            hide_ticks(axes)
            if patch is not None:
                frame_patch(axes, picture, grid.shape, patch)
        n_layers, _, n_heads = maps.shape[:3]
        layer = check_index("layer_idx", layer_idx, n_layers)
        head = f"mean of {n_heads} heads"
        if head_idx is not None:
            head = f"head {check_index('head_idx', head_idx, n_heads)} (of 0 to {n_heads - 1})"
        who = self.who_looks(patch)
        set_heading(figure, f"{who}: layer {layer} (of 0 to {n_layers - 1}), {head}", fontsize=14)
        return finish(figure, save_path)

    def visualize_all_heads(self, image, layers=None, save_path=None, patch=None):
        """The weights of the patches for CLS, a row for each layer and a column for each head, on one scale.

        layers: indices as layer_idx above; None: all, or six from the first to the last where there are more.
        patch: (row, column), in the place of CLS.
        """
        images, picture = prepare_image(image, self.model)
        maps = attention_maps(self.model, images).cpu()[:, 0]  # (L, H, N, N)
        grids = self.looks_at(maps, images, patch)  # (L, H, rows, columns)
        n_layers, n_heads = grids.shape[:2]
        layers = [] if layers is None else np.ravel(layers).tolist()
        chosen = [check_index("layer", i, n_layers) for i in layers or spread(n_layers, 6)]
        who = self.who_looks(patch)
        some = f" ({len(chosen)} of {n_layers} layers)" if len(chosen) < n_layers else ""
        figure = draw_map_grid([picture] * len(chosen), grids[chosen], [f"layer {layer}" for layer in chosen],
                               [f"head {head}" for head in range(n_heads)],
                               f"{who}{some}{self.describe_prediction(images)}", patch=patch)
        return finish(figure, save_path)

    def visualize_all_layers(self, image, save_path=None, patch=None):
        """A strip of all layers, mean over the heads, on one scale."""
        images, picture = prepare_image(image, self.model)
        maps = attention_maps(self.model, images).cpu()[:, 0].mean(dim=1)  # (L, N, N)
        grids = self.looks_at(maps, images, patch)  # (L, rows, columns)
        columns = min(6, len(grids))
        n_rows = math.ceil(len(grids) / columns)
        figure = new_figure(1.0 + 2.0 * columns, 1.2 + 2.1 * proportion(picture) * n_rows)
        panels = figure.subplots(n_rows, columns, squeeze=False).flat
        for axes in panels:
            axes.set_axis_off()
        for layer, (axes, grid) in enumerate(zip(figure.axes, grids.numpy(), strict=False)):
            axes.set_axis_on()
            hide_ticks(axes)
            mappable = axes.imshow(grid, cmap="viridis", vmin=0, vmax=grids.max().item(), extent=extent_of(picture))
            axes.set_title(f"layer {layer}", fontsize=11)
            if patch is not None:
                frame_patch(axes, picture, grid.shape, patch)
        figure.colorbar(mappable, ax=figure.axes, label="attention weight of a patch")
        who = self.who_looks(patch)
        set_heading(figure, f"{who}, mean over the heads{self.describe_prediction(images)}", fontsize=13)
        return finish(figure, save_path)

    # ---- Where the answer comes from

    def visualize_rollout(self, image, discard_ratio=0.0, save_path=None):
        """The image, and its attention rollout over it."""
        return self.draw_explanation(image, "rollout", save_path, discard_ratio=discard_ratio)

    def visualize_relevance(self, image, target=None, save_path=None):
        """The image, and gradient-weighted relevance over it, for a class."""
        return self.draw_explanation(image, "relevance", save_path, target)

    def visualize_grad_cam(self, image, target=None, layer_idx=None, save_path=None):
        """The image, and Grad-CAM over it, for a class."""
        return self.draw_explanation(image, "grad_cam", save_path, target, layer_idx=layer_idx)

    def draw_explanation(self, image, method, save_path=None, target=None, **options):
        images, picture = prepare_image(image, self.model)
        found = explain(self.model, images, method, target, **options)
        grid = found.heat[0].numpy()
        figure = new_figure(12, 1.2 + 3.4 * proportion(picture))
        left, middle, right = figure.subplots(1, 3)
        left.imshow(picture)
        left.set_title("the image, as the model sees it" + self.describe_prediction(images))
        scale = dict(cmap="viridis", vmin=0, vmax=max(grid.max(), 1e-12), extent=extent_of(picture))
        mappable = middle.imshow(grid, **scale)
        middle.set_title(self.title_of(method, options))
        right.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=1)
        right.imshow(grid, alpha=0.6, **scale)
        right.set_title("the same over the image")
        figure.colorbar(mappable, ax=middle, label="value of a patch")
        for axes in (left, middle, right):
            hide_ticks(axes)
        same = method in ("attention", "rollout")
        set_heading(figure, "this map is the same for every class" if same else self.describe_class(found), fontsize=13)
        return finish(figure, save_path)

    def title_of(self, method, options):
        """What a map is, with its layer and its head where the method has a choice."""
        n_blocks, head = len(self.anatomy.blocks), options.get("head_idx")
        if method == "grad_cam":
            return f"Grad-CAM after layer {cam_layer(self.anatomy, options.get('layer_idx'))} (of 0 to {n_blocks - 1})"
        if method == "attention" and options:
            layer = check_index("layer_idx", options.get("layer_idx", -1), n_blocks)
            return f"attention of layer {layer} (of 0 to {n_blocks - 1})" + ("" if head is None else f"\nhead {head}")
        return TITLES[method]

    def visualize_explanations(self, image, target=None, n_steps=16, save_path=None, n_draws=8):
        """All methods on one image: their maps, how far they agree, and what each is worth beside random order.

        Maps are scaled to a sum of one and share a scale. Below: Spearman's rank correlation of each pair; the
        probability of the class while patches are hidden, and while they are shown, the hottest first. Random order is
        drawn n_draws times: the line is the mean, the band two standard deviations of the draws to each side.
        """
        images, picture = prepare_image(image, self.model)
        found = compare_explanations(self.model, images, target, n_steps=n_steps, n_draws=n_draws)
        names = list(found.heats)
        grids = [(heat[0] / heat[0].sum().clamp(min=1e-12)).numpy() for heat in found.heats.values()]
        figure = new_figure(12.5, 7.0 + 2.5 * max(0.8, proportion(picture)) + 0.5 * len(found.refused))
        n_panels = 1 + len(names)
        cells = figure.add_gridspec(2, 3 * n_panels, height_ratios=(2.5 * max(0.8, proportion(picture)), 5.2))
        panels = [figure.add_subplot(cells[0, 3 * i:3 * i + 3]) for i in range(n_panels)]
        agreement, *curves = [figure.add_subplot(cells[1, i * n_panels:(i + 1) * n_panels]) for i in range(3)]
        panels[0].imshow(picture)
        panels[0].set_title("the image", fontsize=11)
        scale = PowerNorm(0.5, 0, max(grid.max() for grid in grids))  # weak and strong maps on one scale
        for axes, name, grid in zip(panels[1:], names, grids, strict=True):
            mappable = axes.imshow(grid, cmap="viridis", norm=scale, extent=extent_of(picture))
            axes.set_title(TITLES[name], fontsize=11)
        for axes in panels:
            hide_ticks(axes)
        figure.colorbar(mappable, ax=panels, label="share, root scale")
        refused = [f"left out: {reason}" for reason in found.refused.values()]
        words = [self.describe_class(found) + self.describe_prediction(images), *refused]
        set_heading(figure, "\n".join(words), fontsize=13 if not refused else 10)
        draw_agreement(agreement, found.correlations.numpy(), names)
        draw_trust(curves[0], found.deletion, found.draws["deletion"],
                   "hiding the hottest patches first\n(falls early: the map matters)")
        draw_trust(curves[1], found.insertion, found.draws["insertion"],
                   "showing the hottest patches first\n(rises early: the map matters)")
        return finish(figure, save_path)

    def visualize_logit_lens(self, image, n_classes=5, save_path=None):
        """What the head would say after every block: the probabilities of the n_classes that are likeliest at the end,
        and of those that were anywhere, six in all at most. Raises InputError for more than six n_classes."""
        check_whole("n_classes", n_classes, 1)
        if n_classes > len(COLOURS):
            raise InputError(f"n_classes {n_classes} is out of range; expected 1 to {len(COLOURS)}, which can be "
                             f"told apart; explanations.logit_lens gives the numbers of all")
        images, picture = prepare_image(image, self.model)
        lens = logit_lens(self.model, images)[:, 0]  # (L + 1, K)
        order = lens[-1].argsort(descending=True).tolist()
        on_the_way = [label for label in lens.argmax(dim=1).tolist() if label not in order[:n_classes]]
        shown = (order[:n_classes] + list(dict.fromkeys(on_the_way)))[:len(COLOURS)]
        figure = new_figure(11, 4.2)
        left, right = figure.subplots(1, 2, width_ratios=(1, 2.2))
        left.imshow(picture)
        hide_ticks(left)
        left.set_title("the image" + self.describe_prediction(images))
        for place, (label, colour) in enumerate(zip(shown, COLOURS, strict=False)):
            right.plot(range(len(lens)), 100 * lens[:, label], color=colour, marker="osD^vPX*"[place % 8],
                       label=self.name_of(label))
        right.set(xlabel="blocks that the tokens have passed", ylabel="probability (%)", ylim=(0, 102))
        right.set_title("what the head says when it reads earlier tokens")
        right.set_xticks(spread(len(lens), 13))
        show_legend(right, fontsize=10)
        set_heading(figure, "Logit lens", fontsize=14)
        return finish(figure, save_path)

    # ---- Over images

    def visualize_attention_distance(self, images, save_path=None):
        """How far patches look, a point for each head of each block, beside the line of uniform attention.

        images: a list of them, or a normalised batch (B, C, height, width). ViT paper, Fig. 7 (right).
        """
        images = prepare_images(images, self.model)
        distances = self.attention_distance(images).numpy()  # (L, H)
        grid = self.anatomy.grid(images)
        line = uniform_attention_distance(grid, self.anatomy.patch_size)
        figure = new_figure(8, 4.4)
        axes = figure.subplots()
        blocks = np.arange(len(distances))
        for head in range(distances.shape[1]):
            axes.plot(blocks, distances[:, head], "o", color=COLOURS[0], alpha=0.7,
                      label="a head" if head == 0 else None)
        axes.plot(blocks, distances.mean(axis=1), color=COLOURS[1], label="mean over the heads")
        axes.axhline(line, color="0.4", linestyle="--", label=f"uniform attention: {line:.1f}")
        axes.set(xlabel="layer", ylabel="mean distance (pixels)", ylim=(0, 1.15 * max(line, distances.max())))
        axes.set_xticks(spread(len(distances), 13))
        axes.legend(fontsize=10)
        axes.set_title(f"How far patches look, over {len(images)} image{'s' * (len(images) > 1)}")
        return finish(figure, save_path)

    def visualize_token_norms(self, image, save_path=None):
        """The length of each patch token, layer by layer, on one scale; register artefacts are framed."""
        images, picture = prepare_image(image, self.model)
        norms, artefacts = token_norms(record(self.model, images))  # (L, 1, rows, columns)
        chosen = spread(len(norms), 6)
        title = (f"Length of the patch tokens; {int(artefacts[chosen].sum())} register artefacts (framed) in these "
                 f"{len(chosen)} of {len(norms)} layers{self.describe_prediction(images)}")
        figure = draw_map_grid([picture], norms[chosen].transpose(0, 1), [""], [f"layer {i}" for i in chosen], title,
                               "length of a token")
        for axes, layer in zip(figure.axes[1:], chosen, strict=False):
            for place in artefacts[layer, 0].nonzero().tolist():
                frame_patch(axes, picture, norms.shape[2:], place)
        return finish(figure, save_path)

    # ---- To play with

    def explore(self, images, save_path="attention.html", compare_with=None, **options):
        """One self-contained HTML page of images, as explorer.explore makes it: an ExplorerPage, which a notebook
        shows. compare_with: a second model beside this one, a ViT or a ConvNet."""
        return explore(self.model, images, save_path, compare_with, **options)

    # ---- Words

    def looks_at(self, attention, images, patch):
        """What a patch, or where it is None what the head reads, takes from each patch: (..., N, N) -> (..., rows,
        columns)."""
        grid, first = self.anatomy.grid(images), self.anatomy.n_prefix
        if patch is None:
            check_pool(self.anatomy.pool)
            return cls_attention_grid(attention, grid, first, self.anatomy.pool)
        if not isinstance(patch, (tuple, list)) or len(patch) != 2:
            raise InputError(f"patch {patch!r} is no place; expected (row, column), such as (0, {grid[1] - 1})")
        row, column = (check_index("patch", place, n) for place, n in zip(patch, grid, strict=True))
        return attention[..., first + row * grid[1] + column, first:].unflatten(-1, grid)

    def who_looks(self, patch=None):
        if patch is not None:
            return f"Where the framed patch {tuple(patch)} looks"
        return "Where CLS looks" if self.anatomy.pool == "cls" else "Where patches look, on average"

    def name_of(self, label):
        names = self.anatomy.class_names
        return names[label] if names else f"class {label}"

    def describe_prediction(self, images):
        """A line with the class predicted for the first image and its probability; empty for a model without a head."""
        return self.describe_predictions(images[:1])[0]

    def describe_predictions(self, images):
        """Such a line for each image."""
        if not self.anatomy.has_head:
            return [""] * len(images)
        probabilities, labels = class_probabilities(self.model, images).max(dim=1)  # (B), (B)
        return [f"\npredicted: {self.name_of(label)} ({probability:.0%})"
                for label, probability in zip(labels.tolist(), probabilities.tolist(), strict=True)]

    def describe_class(self, found):
        """In words, the class of an Explanation or Comparison of one image."""
        if found.targets is None:
            return "a model without a head"
        return f"class explained: {self.name_of(found.targets[0].item())} (probability {found.probabilities[0]:.0%})"


def visualize_attention_grid(model, images, save_path=None):
    """Several images, a row each, with the class predicted: the weights of the patches for what the head reads, mean
    over the heads.

    images: a list of them, or a normalised batch (B, 3, H, W). Six layers are shown, from the first to the last, where
    there are more. Raises InputError for a model without attention.
    """
    images = prepare_images(images, model)
    views = AttentionVisualizer(model, next(model.parameters()).device)
    maps = attention_maps(model, images).cpu().mean(dim=2)  # (L, B, N, N)
    grids = views.looks_at(maps, images, None).transpose(0, 1)  # (B, L, rows, columns)
    chosen = spread(grids.shape[1], 6)
    pictures = [as_picture(image, *statistics_of(model)) for image in images]
    labels = [f"layer {layer}" for layer in chosen]
    predicted = [textwrap.fill(words.strip(), 14) for words in views.describe_predictions(images)]
    figure = draw_map_grid(pictures, grids[:, chosen], predicted, labels,
                           f"{views.who_looks()}, mean over the heads")
    return finish(figure, save_path)


# ---- Panels -----------------------------------------------------------------------------------------------


def draw_map_grid(pictures, grids, row_labels, column_labels, title, label="attention weight of a patch", patch=None):
    """A Figure with a row for each picture (H, W, 3): the picture, then its maps, grids (rows of the figure,
    maps in a row, rows, columns), all on one colour scale; a patch (row, column) is framed."""
    n_rows, n_maps = grids.shape[:2]
    scale = dict(cmap="viridis", vmin=0, vmax=grids.max().item())
    side = max(0.8, min(1.6, 12 / n_maps))
    height = side * max(0.5, proportion(pictures[0])) * n_rows + 1.0
    beside = 0.08 * max(len(words) for label in row_labels for words in label.split("\n"))  # inches
    figure = new_figure(max(6.5, side * (n_maps + 2)) + beside, max(3.0, height))
    axes = figure.subplots(n_rows, 1 + n_maps, squeeze=False)
    for picture, line, row_grids, row_label in zip(pictures, axes, grids, row_labels, strict=True):
        line[0].imshow(picture)
        line[0].set_ylabel(row_label, fontsize=10, rotation=0, ha="right", va="center")
        for panel, grid in zip(line[1:], row_grids.numpy(), strict=True):
            mappable = panel.imshow(grid, extent=extent_of(picture), **scale)
        for panel in line if patch is not None else ():
            frame_patch(panel, picture, grids.shape[2:], patch)
    for panel, heading in zip(axes[0], ["image", *column_labels], strict=True):
        panel.set_title(heading, fontsize=11)
    for panel in axes.flat:
        hide_ticks(panel)
    figure.colorbar(mappable, ax=axes, label=label)
    set_heading(figure, title, fontsize=14)
    return figure


def frame_patch(axes, picture, grid, patch):
    """A frame around one patch of a picture (H, W, 3) that a grid (rows, columns) cuts."""
    height, width = (side / count for side, count in zip(picture.shape[:2], grid, strict=True))
    row, column = (place % count for place, count in zip(patch, grid, strict=True))
    axes.add_patch(Rectangle((column * width - 0.5, row * height - 0.5), width, height, fill=False,
                             edgecolor=VERMILION, linewidth=2))


def draw_agreement(axes, correlations, names):
    axes.imshow(correlations, cmap="cividis", vmin=-1, vmax=1)
    for row, column in np.ndindex(correlations.shape):
        value = correlations[row, column]
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.2 else "black")
    words = [TITLES[name].replace("attention ", "attention\n", 1).replace(" block", "\nblock") for name in names]
    axes.set_xticks(range(len(names)), words, fontsize=9)
    axes.set_yticks(range(len(names)), words, fontsize=9)
    axes.set_title("how alike the maps rank the patches\n(Spearman: 1 the same, 0 unrelated)", fontsize=11)


def draw_trust(axes, curves, draws, heading):
    """Curves {name: (S + 1, B)}, the mean over the images; random order dashed, in the band of its draws (R, S + 1, B):
    two standard deviations to each side."""
    draws = draws.mean(dim=2)  # (R, S + 1)
    for place, (name, values) in enumerate(curves.items()):
        values = values.nanmean(dim=1).numpy()
        control = name not in METHODS
        share = np.linspace(0, 100, len(values))
        words = f"{TITLES.get(name, name)}: area {values.mean():.2f}"
        if control and len(draws) > 1:
            reach = 2 * draws.std(dim=0).numpy()
            axes.fill_between(share, 100 * (values - reach).clip(min=0), 100 * (values + reach).clip(max=1),
                              color="0.35", alpha=0.2, linewidth=0)
            words += f" ± {2 * draws.mean(dim=1).std():.2f}\n({len(draws)} draws, ± 2 standard deviations)"
        axes.plot(share, 100 * values, color="0.35" if control else COLOURS[place], linestyle="--" if control else "-",
                  label=words)
    axes.set(xlabel="patches (%)", ylabel="probability of the class (%)", ylim=(0, 102))
    axes.set_title(heading, fontsize=11)
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16))
