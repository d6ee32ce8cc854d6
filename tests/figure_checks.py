"""What the tests of figures share: small models, and checks of text, maps and colours."""

import io

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from vit_bridge.models.convnet import ConvNet
from vit_bridge.preprocessing import Preprocessing
from vit_model import VisionTransformer

SIZE, PATCH, GRID = (14, 15), (7, 5), (2, 3)


def vit(**options):
    torch.manual_seed(0)
    settings = dict(img_size=SIZE, patch_size=PATCH, n_classes=5, embed_dim=22, depth=3, n_heads=2)
    return VisionTransformer(**{**settings, **options})


def square_vit():
    model = vit(img_size=12, patch_size=4)
    model.preprocessing = Preprocessing(12, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3),
                                        class_names=["ant", "bee", "cat", "dog", "elk"])
    return model


def convnet():
    torch.manual_seed(0)
    return ConvNet(img_size=12, n_classes=5, widths=(3, 5), depths=(1, 1), stem_stride=1)


def pixels(height=14, width=15):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def texts(figure):
    """Return all text in a figure, its subfigures included."""
    return " | ".join(text.get_text() for text in figure.findobj(Text))


def data_of(figure):
    return [image.get_array() for axes in figure.axes for image in axes.images]


def assert_no_text_clipped(figure):
    """Check that all text lies on the page and is at least 9 points large."""
    figure.savefig(io.BytesIO(), dpi=figure.dpi)  # lays it out
    page = figure.bbox.padded(1)
    panels = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label,
                                                        *axes.texts)]
    headings = [text for part in (figure, *figure.subfigs) for text in part.texts]
    for text in filter(Text.get_text, panels + headings):
        assert text.get_fontsize() >= 9, text.get_text()
        box = text.get_window_extent()
        assert page.contains(box.x0, box.y0), text.get_text()
        assert page.contains(box.x1, box.y1), text.get_text()


def maps_of(figure):
    """Return the maps of a figure, one per panel, as 0 to 1 on their scales, (rows, columns) each."""
    images = [axes.images[-1] for axes in figure.axes if axes.images and not axes.texts]
    return [np.clip(image.norm(image.get_array()).filled(np.nan), 0, 1) for image in images
            if image.get_array().ndim == 2]


def share_with_contrast(*figures):
    """Return the share of panels whose middle 80% of patches span at least a tenth of the colours."""
    spans = [np.subtract(*np.nanquantile(shown, [0.9, 0.1])) for figure in figures for shown in maps_of(figure)]
    return float(np.mean([span >= 0.1 for span in spans]))


def seen_pixels(figure, colour):
    """Count the pixels of this colour in a figure drawn without its legends."""
    for axes in figure.axes:
        if axes.get_legend():
            axes.get_legend().remove()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=100)
    pixels = np.frombuffer(buffer.getvalue(), np.uint8).reshape(-1, 4)[:, :3]
    return int((np.abs(pixels - 255 * np.array(to_rgb(colour))).max(axis=1) < 25).sum())
