"""What the tests of every command need: the command of their name, run in this process, and a pretrained encoder."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from ..common import tiny_stock_model, tiny_tokenizer


@pytest.fixture(scope="module")
def command(request) -> ModuleType:
    """The command that the test file is named after."""
    return import_module(f"fastbert_hf.commands.{Path(request.module.__file__).stem.removeprefix('test_')}")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """A tiny encoder with a tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("backbone")
    tiny_stock_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(command, capsys) -> Callable[..., str]:
    """Run the command with some words on its command line; return what it prints."""

    def run_with(*words: object, **settings) -> str:
        command.main([*map(str, words)], **settings)
        return capsys.readouterr().out

    return run_with


@pytest.fixture
def error_of(run) -> Callable[..., str]:
    """Run the command, which is to end with an error of one line; return it."""

    def run_with(*words: object, **settings) -> str:
        with pytest.raises(SystemExit) as error:
            run(*words, **settings)
        assert "\n" not in str(error.value)
        return str(error.value)

    return run_with
