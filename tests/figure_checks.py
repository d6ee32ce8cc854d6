"""What tests of figures ask of them."""

import io

from matplotlib.text import Text


def texts(figure):
    """All that is written in a figure, its subfigures included."""
    return " | ".join(text.get_text() for text in figure.findobj(Text))


def data_of(figure):
    return [image.get_array() for axes in figure.axes for image in axes.images]


def assert_no_text_clipped(figure):
    """All text lies on the page and is no smaller than 9 points."""
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
