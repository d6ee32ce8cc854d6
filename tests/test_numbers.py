"""Every measured number on README and docs equals the cell it comes from. The table is page_numbers.py.

To add a page's numbers, write rows such as
    ("reaches {:.1%} of the test images", cell("weights-vit_nano-bf16-0", "test_acc"))    under `measured`, or
    ("Python 3.11", "pyproject.toml")                                                     under `stated`.
"""

import re
from pathlib import Path

import pytest
from page_numbers import PAGES

ROOT = Path(__file__).parent.parent
# What looks measured: a decimal fraction, a percentage, or a number with a unit.
LOOKS_MEASURED = re.compile(
    r"(?<![\w.,/-])\d[\d,]*(?:\.\d+(?:\s?%)?|\s?(?:%|(?:seconds?|s|minutes?|min|ms|hours?|MB|MiB|kB|GB|GiB|points?|times|"
    r"images/s|MFLOPs)\b))")


def words_of(page):
    """The text of a page with single spaces, without code blocks and the targets of its links."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return " ".join(text.split())


def filled(row):
    text, *values = row
    return " ".join(text.format(*values).split())


def without_known(words, known):
    """The words without the texts whose numbers have a source, longest first."""
    for text in sorted(known, key=len, reverse=True):
        words = words.replace(text, " ")
    return words


EXISTING = [page for page in PAGES if (ROOT / page).exists()]
MEASURED = [(page, row) for page in EXISTING for row in PAGES[page].measured]
STATED = [(page, row) for page in EXISTING for row in PAGES[page].stated]


def test_every_page_is_in_the_table():
    pages = {"README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))}
    assert pages <= set(PAGES)


@pytest.mark.parametrize(("page", "row"), MEASURED)
def test_number_equals_its_cell(page, row):
    assert filled(row) in words_of(page), f"{page} does not say: {filled(row)}"


@pytest.mark.parametrize(("page", "row"), STATED)
def test_stated_number_is_on_its_page(page, row):
    text, source = row
    assert source
    assert " ".join(text.split()) in words_of(page), f"{page} does not say: {text}"


@pytest.mark.parametrize("page", EXISTING)
def test_page_has_no_number_without_a_source(page):
    known = [filled(row) for row in PAGES[page].measured] + [" ".join(row[0].split()) for row in PAGES[page].stated]
    left = without_known(words_of(page), known)
    found = [left[max(0, m.start() - 40):m.end() + 20] for m in LOOKS_MEASURED.finditer(left)]
    assert not found, f"{page}: {len(found)} numbers without a source, such as: {found[:8]}"


def test_changed_digit_is_seen():
    row, words = ("{:.1%} of {:,} images", 0.822, 10_000), "It has 82.2% of 10,000 images."
    assert filled(row) in words
    assert filled(row) not in words.replace("82.2", "82.3")


@pytest.mark.parametrize(("words", "n"), [
    ("82.2% of them", 1), ("about 46 s on 2 cores", 1), ("took 3 minutes, 0.4 points", 2), ("Python 3.11", 1),
    ("224 x 224 pixels become 196 tokens", 0), ("vit_b_16 and S/14", 0), ("a line of 1,200 MB", 1),
])
def test_looks_measured(words, n):
    assert len(LOOKS_MEASURED.findall(words)) == n
