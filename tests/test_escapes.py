"""Texts of others in a terminal, in Markdown and in Python."""

from __future__ import annotations

import ast
import html
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fastbert_hf.escapes import as_markdown, as_python, printable


RENDER = MarkdownIt("gfm-like", {"linkify": False, "html": True})
NASTY = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "good\n\n# A heading\n\n- item",
    "\x1b[31mred\x1b]0;title\x07",
    "**bold** _soft_ __init__ ~~gone~~ `code` snake_case",
    "[click](https://example.org) ![image](x.png)",
    "&lt;b&gt; Q&A &amp;",
    "a\\*b C:\\new",
    "left\u202egnitset\u2066\u200b\ufeff\u2028\x85\x9b31m",
    "\ud800",
)
any_text = st.text(st.characters(codec=None, exclude_categories=()), max_size=40)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("very good", "very good"),
        ("very\n good\t", "very good"),
        ("非常好 é 👩\u200d💻 می\u200cخواهم", "非常好 é 👩\u200d💻 می\u200cخواهم"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\u202eb\u200bc", r"a\u202eb\u200bc"),
        ("\U000e0041\ud800", r"\U000e0041\ud800"),
        (3, "3"),
    ],
)
def test_what_steers_a_terminal_is_written_out_and_the_rest_left(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["LABEL_0", "good", "1.5", "org/name-1.0", "a|b", "Q&A", "non très", "#1"])
def test_ordinary_names_are_left_as_they_are(text):
    assert as_markdown(text) == text


def as_read(text: str) -> str:
    """What a reader sees of a label among others, in rendered Markdown that holds no element but its paragraph."""
    rendered = RENDER.render(f"Labels: {text}, end.")
    inside = re.fullmatch(r"<p>Labels: ([^<>]*), end\.</p>\n", rendered)
    assert inside, rendered
    return html.unescape(inside[1])


@settings(max_examples=200, deadline=None)
@given(text=any_text)
def test_markdown_shows_a_text_as_it_is(text):
    assert as_read(as_markdown(text)) == printable(text)


@pytest.mark.parametrize("text", NASTY)
def test_markdown_shows_markup_of_others_as_it_is(text):
    assert as_read(as_markdown(text)) == printable(text)
    assert printable(text).isprintable()


@settings(max_examples=200, deadline=None)
@given(text=any_text)
@example(text='He said "no|yes".\n\tC:\\new \x1b[31m')
def test_a_literal_of_python_is_the_text_in_one_line(text):
    literal = as_python(text)
    assert ast.literal_eval(literal) == text
    assert len(literal.splitlines()) == 1
