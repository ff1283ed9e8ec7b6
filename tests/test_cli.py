"""The command `fastbert-hf`: its help loads nothing, its errors are one line, its words are those that there are."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastbert_hf_cli


ROOT = Path(__file__).parent.parent
WORDS = {
    "score": ["in.csv", "out"],
    "serve": [],
    "demo": [],
}


@pytest.mark.parametrize("words", [["--help"], *([word, "--help"] for word in fastbert_hf_cli.COMMANDS)], ids=" ".join)
def test_help_loads_nothing_and_is_there_at_once(words):
    code = f"""
import sys
import fastbert_hf_cli
try:
    fastbert_hf_cli.main({words!r})
except SystemExit as ended:
    assert not ended.code
for name in ("torch", "transformers", "fastbert_hf", "numpy", "ray"):
    assert name not in sys.modules, name
"""
    started = time.monotonic()
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("usage: fastbert-hf") and time.monotonic() - started < 1.0


def test_every_word_is_a_file_with_run():
    assert set(WORDS) == set(fastbert_hf_cli.COMMANDS)
    for word in fastbert_hf_cli.COMMANDS:
        assert callable(importlib.import_module(f"fastbert_hf.commands.{word}").run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["serve", "--max-speeed", "1"], "did you mean --max-speed?"),
        (["score", "in.csv"], "required: OUTPUT"),
        (["score", "a", "b", "--speed", "fast"], "invalid float value: 'fast'"),
        (["score", "a", "b", "--speed", "0.5", "--speedup", "2"], "not allowed with argument"),
        (["serve", "--port", "1e3"], "invalid int value: '1e3'"),
    ],
)
def test_a_wrong_word_is_one_line(words, message):
    with pytest.raises(SystemExit) as ended:
        fastbert_hf_cli.main(words)
    assert message in str(ended.value) and len(str(ended.value).splitlines()) == 1


@pytest.mark.parametrize("word", WORDS)
def test_underscores_are_dashes(word):
    options = fastbert_hf_cli.parser_of_all().parse_args([word, *WORDS[word], "--max_length=64"])
    assert options.command == word and options.max_length == 64


def test_a_word_that_begins_with_dashes_is_kept_as_a_value():
    options = fastbert_hf_cli.parser_of_all().parse_args(["score", "in.csv", "out", "--text-column=my_text"])
    assert options.text_column == "my_text"
