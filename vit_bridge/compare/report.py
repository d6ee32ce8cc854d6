"""A self-contained HTML page of findings, figures and tables that works offline and on a phone.

    write_report    writes the page
    Section         a title with its question, finding, figures and tables
"""

import base64
import html
from dataclasses import dataclass, field

from vit_bridge.system import write_whole

SCREEN_DPI = 110  # pixels of the page for an inch of a figure
WORDS = 40  # characters; a column with a longer cell holds sentences, and is aligned to the left
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --page: Canvas; }
body { font: 17px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.3rem; margin-top: 2.5rem; }
nav a { margin-right: 1rem; white-space: nowrap; }
.finding { font-size: 1.1rem; border-left: 4px solid #0072b2; padding: .1rem 0 .1rem 1rem; margin: 1rem 0; }
.note { opacity: .8; font-size: .9rem; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; overflow-x: auto; } figcaption { font-size: .9rem; opacity: .8; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
@media (max-width: 44rem) { figure img { max-width: none; width: 44rem; }
  figcaption::after { content: " (scroll sideways to see all of it)"; } }
.table { overflow-x: auto; background:
  linear-gradient(to right, var(--page) 30%, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--page) 30%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--line), transparent) left / 1rem 100% no-repeat scroll,
  linear-gradient(to left, var(--line), transparent) right / 1rem 100% no-repeat scroll; }
.table + .table { margin-top: 1.2rem; } caption { text-align: left; padding: .3rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child, th.words, td.words { text-align: left; } thead th { background: var(--soft); }
"""


@dataclass
class Section:
    """A section of the report.

    Parameters
    ----------
    title, question, finding : str
        The heading, the question, and what was observed; the finding may have several lines.
    figures : dict
        {file name without extension: Figure}.
    tables : list
        (caption, rows); the first row holds the column headings.
    note : str
        Where the numbers come from; may have several lines, too.
    """

    title: str
    question: str = ""
    finding: str = ""
    figures: dict = field(default_factory=dict)
    tables: list = field(default_factory=list)
    note: str = ""


def write_report(path, title, introduction, sections):
    """Write the sections as one HTML page, completely or not at all.

    The page contains the figures' PNG files, <name>.png, which must be in its folder already.
    """
    links = " ".join(f'<a href="#part{i}">{html.escape(section.title)}</a>' for i, section in enumerate(sections, 1))
    parts = "\n".join(_section_html(section, i, path.parent) for i, section in enumerate(sections, 1))
    page = (f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n"
            f"<style>{STYLE}</style>\n<body>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(introduction)}</p>\n"
            f"<nav>{links}</nav>\n{parts}\n</body>\n</html>\n")
    write_whole(path, lambda file: file.write(page.encode()))


def _section_html(section, number, folder):
    parts = [f'<section id="part{number}">', f"<h2>{number}. {html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(section.question)}</p>"] * bool(section.question)
    parts += [f'<p class="finding">{_lines_html(section.finding)}</p>'] * bool(section.finding)
    parts += [_figure_html(folder / f"{name}.png", figure) for name, figure in section.figures.items()]
    parts += [_table_html(caption, rows) for caption, rows in section.tables]
    parts += [f'<p class="note">{_lines_html(section.note)}</p>'] * bool(section.note)
    return "\n".join([*parts, "</section>"])


def _lines_html(text):
    return html.escape(text).replace("\n", "<br>\n")


def _figure_html(path, figure):
    """Return HTML with a figure's file embedded; the figure's titles become the alternative text."""
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    words = html.escape("; ".join(" ".join(text.split()) for text in titles if text), quote=True)
    data, width = base64.b64encode(path.read_bytes()).decode(), round(SCREEN_DPI * figure.get_figwidth())
    return f'<figure><img alt="{words}" width="{width}" src="data:image/png;base64,{data}"><figcaption>' \
           f"{html.escape(path.name)}</figcaption></figure>"


def _table_html(caption, rows):
    rows = [[str(cell) for cell in row] for row in rows]
    classes = [' class="words"' if max(map(len, column)) > WORDS else "" for column in zip(*rows, strict=True)]
    head, *lines = ["".join(f"<{tag}{words}>{html.escape(cell)}</{tag}>"
                            for words, cell in zip(classes, row, strict=True))
                    for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)]
    return (f'<div class="table"><table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>'
            + "".join(f"<tr>{line}</tr>" for line in lines) + "</tbody></table></div>")
