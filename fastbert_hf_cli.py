"""
The command `fastbert-hf`.

This file alone stands beside the package: it knows the options of every command, so that `--help` and a wrong option
are answered at once, where importing `fastbert_hf`, and with it torch, takes seconds.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and to which `--max_length` is `--max-length`."""

    def parse_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        options, unknown = self.parse_known_args([with_dashes(word) for word in args], namespace)
        if unknown:
            named = options.parser if "parser" in options else self
            similar = difflib.get_close_matches(unknown[0].partition("=")[0], named._option_string_actions, n=1)
            named.error(f"there is no option {' '.join(unknown)}{f'; did you mean {similar[0]}?' if similar else ''}")
        return options

    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"{self.prog}: {message.rstrip('.')}; {self.prog} --help lists all options")


def with_dashes(word: str) -> str:
    """Return a word of the command line with the name of its option written with dashes."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else word


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add which model answers, and how texts are read."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model", metavar="NAME", help="A folder, or a name on the Hub. Unless given the small one of the package."
    )
    group.add_argument(
        "--int8", action="store_true", help="Round the weights to int8 while loading, which is faster on most CPUs."
    )
    group.add_argument("--max-length", type=int, metavar="TOKENS", help="Cut texts to this many tokens.")
    group.add_argument(
        "--truncate",
        action="store_true",
        help="Cut texts that are too long for the model, which are errors otherwise.",
    )


def add_dial(parser: argparse.ArgumentParser, normally: str) -> None:
    """Add what a model is asked for; one of three."""
    group = parser.add_argument_group(f"what it is asked for{normally}").add_mutually_exclusive_group()
    group.add_argument(
        "--speed", type=float, metavar="S", help="From 0, every layer, to 1. The model's own unless given."
    )
    group.add_argument("--speedup", type=float, metavar="X", help="So many times cheaper than at speed 0, on average.")
    group.add_argument(
        "--max-disagreement", type=float, metavar="SHARE", help="The share of answers that may differ from speed 0."
    )


def add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="Files, folders, and patterns such as 'logs/*.csv'."
    )
    parser.add_argument(
        "output", metavar="OUTPUT", help="Folder of the answers. What it has already is not made again."
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="Column of the text.")
    parser.add_argument("--text-pair-column", metavar="NAME", help="Column of the second text of a pair.")
    parser.add_argument(
        "--columns", metavar="A,B,...", help="Columns to keep beside the answers; all of them unless given."
    )
    parser.add_argument(
        "--prefix",
        default="",
        metavar="WORD",
        help="Put before the names of the columns label, score and exit_layer, as 'predicted_'.",
    )
    parser.add_argument("--actors", type=int, default=1, metavar="N", help="Processes that each hold a model.")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="Threads of each.")
    parser.add_argument(
        "--block-rows",
        type=int,
        default=20_000,
        metavar="N",
        help="Rows that are read, answered and written together.",
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="A running Ray cluster; one on this machine unless given."
    )
    add_model(parser)
    add_dial(parser, "")


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="127.0.0.1, this machine alone.")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="8000.")
    add_model(parser)
    add_dial(parser, " where nothing waits")


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="127.0.0.1, this machine alone.")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="7860.")
    add_model(parser)


class Command(NamedTuple):
    """A word after `fastbert-hf`. `fastbert_hf.commands.WORD.run` does it with the parsed options."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]


COMMANDS = {
    "score": Command("Answer files of any number of rows, on several cores or machines.", add_score),
    "serve": Command("Answer over HTTP, faster where more comes than can be answered.", add_serve),
    "demo": Command("Show in the browser what each speed gives and saves.", add_demo),
}


def parser_of_all() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="fastbert-hf", description="BERT-family classifiers that spend on each text what it needs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help, description=command.help)
        own.set_defaults(parser=own)
        command.add_options(own)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the words of a command line say; those of the program unless given."""
    options = parser_of_all().parse_args(sys.argv[1:] if arguments is None else arguments)
    importlib.import_module(f"fastbert_hf.commands.{options.command}").run(options)


if __name__ == "__main__":
    main()
