"""Show texts that others wrote, such as labels and names, so that they do nothing: in a terminal, in Markdown."""

from __future__ import annotations

import re
import unicodedata
from typing import Any


# Control characters, halves of characters, line ends, and what joins or turns text without being seen.
UNSEEN = ("Cc", "Cs", "Zl", "Zp", "Cf")
# These two of them shape letters and emoji.
JOINERS = "\u200c\u200d"
# What Markdown reads as more than a character, in the middle of a line. An underscore inside a word is only that.
MARKUP = re.compile(r"[\\`*\[\]~$]|(?<![^\W_])_|_(?![^\W_])")
HTML = {"<": "&lt;", ">": "&gt;"}
ENTITY = re.compile(r"&(?=#?\w+;)")


def printable(text: Any) -> str:
    r"""
    Return a text in one line, with what would steer a terminal or turn the order of the letters as it is written in a
    program: `\x1b` for an escape.

    Args:
        text: Anything; its `str` is taken.
    """
    return "".join(map(_visible, " ".join(str(text).split())))


def as_markdown(text: Any) -> str:
    """
    Return a text in one line which Markdown shows as it is: no markup, no HTML, nothing that steers a terminal.

    Args:
        text: Anything; its `str` is taken.
    """
    escaped = MARKUP.sub(r"\\\g<0>", ENTITY.sub("&amp;", printable(text)))
    return "".join(HTML.get(character, character) for character in escaped)


def as_python(text: str) -> str:
    """Return a text as a string literal of Python, in one line and with escapes for what is not seen."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{"".join(map(_visible, quoted))}"'


def _visible(character: str) -> str:
    if unicodedata.category(character) not in UNSEEN or character in JOINERS:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
