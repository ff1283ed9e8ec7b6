"""What the tests of every example need: the script of their name, and a pretrained encoder."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from ..common import load_script, tiny_stock_model, tiny_tokenizer


EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture(scope="module")
def script(request) -> ModuleType:
    """The example that the test file is named after, as a module, so that it runs in this process."""
    return load_script(EXAMPLES / f"{Path(request.module.__file__).stem.removeprefix('test_')}.py")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """A tiny encoder with a tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("backbone")
    tiny_stock_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(script, monkeypatch, capsys) -> Callable[..., str]:
    """Runs the example with some words on its command line; returns what it prints."""

    def run_with(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
        script.main()
        return capsys.readouterr().out

    return run_with


@pytest.fixture
def error_of(run) -> Callable[..., str]:
    """Runs the example, which is to end with an error of one line; returns it."""

    def run_with(*words: object) -> str:
        with pytest.raises(SystemExit) as error:
            run(*words)
        assert "\n" not in str(error.value)
        return str(error.value)

    return run_with
