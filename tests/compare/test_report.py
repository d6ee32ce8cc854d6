import base64
import re
from html.parser import HTMLParser

import pytest

from vit_bridge.compare.report import Section, write_report
from vit_bridge.plots.charts import plot_bars
from vit_model import InputError


class Tags(HTMLParser):
    """A parser that checks that every tag is closed, and keeps the tags with their attributes."""
    void = ("meta", "img", "!doctype")

    def __init__(self, page):
        super().__init__()
        self.open, self.found, self.text = [], [], []
        self.feed(page)
        assert self.open == ["html"] or not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(tmp_path):
    figure = plot_bars({"Speed <fast>": {"A & B": 3.0}}, title='Bars "quoted"',
                       save_path=tmp_path / "bars.png")
    write_report(tmp_path / "report.html", "Title <1>", "Intro & more", [
        Section("First", "Why?", "A < B", {"bars": figure}, [("A table", [["model", "x"], ["<ViT>", 5]])], "A note"),
        Section("Second")])
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_write_report_makes_one_self_contained_page(page):
    tags = Tags(page).found
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == 1
    assert base64.b64decode(images[0]["src"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert images[0]["alt"] == 'Bars "quoted"; Speed <fast>'
    assert not [tag for tag, _ in tags if tag in ("script", "link", "iframe")]
    assert not re.search(r"(https?:)?//", re.sub(r'src="data:[^"]*"', "", page))
    assert [attributes["href"] for tag, attributes in tags if tag == "a"] == ["#part1", "#part2"]
    assert {attributes["id"] for tag, attributes in tags if tag == "section"} == {"part1", "part2"}


def test_write_report_escapes_its_text(page):
    text = "".join(Tags(page).text)
    for words in ("Title <1>", "Intro & more", "1. First", "Why?", "A < B", "A table", "<ViT>", "A note", "2. Second"):
        assert words in text


def test_write_report_refuses_a_missing_folder(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        write_report(tmp_path / "missing" / "report.html", "T", "I", [])


def test_write_report_keeps_the_lines_of_a_note(tmp_path):
    write_report(tmp_path / "report.html", "T", "I", [Section("S", note="a < b\nc")])
    assert "a &lt; b<br>\nc</p>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_write_report_aligns_sentences_to_the_left(tmp_path):
    sentence = "a cell with more characters than a number has, such as this one"
    table = "C", [["", "x", "y"], ["a", sentence, 5]]
    write_report(tmp_path / "report.html", "T", "I", [Section("S", tables=[table])])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<th></th><th class="words">x</th><th>y</th>' in page
    assert f'<td>a</td><td class="words">{sentence}</td><td>5</td>' in page
