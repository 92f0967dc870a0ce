"""Tables as text, Markdown and HTML, and pages that need nothing else."""

import re

import pytest

from i2vgen.files import pages
from i2vgen.files.tables import Table

SMALL = Table("title", ("", "x", "long"), (("a", "1", "2"), ("bcd", "10", "3")))


def test_columns_are_aligned():
    lines = str(SMALL).splitlines()
    assert lines[0] == "title"
    assert lines[1:] == ["      x  long", "a     1     2", "bcd  10     3"]


def test_columns_of_words_stand_left_and_no_line_ends_in_spaces():
    table = Table("", ("n", "says"), (("10", "a"), ("1", "longer")), words=(1,))
    assert str(table).splitlines() == [" n  says", "10  a", " 1  longer"]


def test_a_table_without_rows_is_its_header():
    assert str(Table("", ("a", "b"), ())) == "a  b"


def test_markdown():
    assert SMALL.markdown().splitlines() == [
        "|  | x | long |", "| --- | ---: | ---: |", "| a | 1 | 2 |", "| bcd | 10 | 3 |",
    ]  # fmt: skip


@pytest.fixture
def page():
    table = Table("<T>", ("<h>", "x"), (("a & b", "1"),))
    figure = pages.Figure((("<alt>", b"png"),), name="<name>", told="\n<told>", wrong="<wrong>")
    sections = [pages.of_table(table, "<text>"), pages.Section(figures=[figure, pages.Figure((("", b"p"),))])]
    return pages.render("<title>", "<about>", sections, settings={"<key>": "<value>"})


def test_whatever_is_told_is_escaped(page):
    for word in ("T", "h", "text", "alt", "name", "told", "wrong", "title", "about", "key", "value"):
        assert f"&lt;{word}&gt;" in page and (word in ("title", "h") or f"<{word}>" not in page), word
    assert "a &amp; b" in page


def test_a_page_holds_what_it_was_given_and_asks_for_nothing(page):
    assert page.startswith("<!doctype html>") and page.endswith("</html>\n")
    assert page.count("<figure>") == 2 and page.count("<figcaption>") == 1
    assert '<td class="words">a &amp; b</td><td>1</td>' in page
    assert 'src="data:image/png;base64,cG5n"' in page  # b"png"
    assert re.findall(r"(?:src|href)=.(?!data:)|url\(|https?:", page) == []


def test_without_settings_no_footer():
    assert "<footer>" not in pages.render("t", "a", [])
