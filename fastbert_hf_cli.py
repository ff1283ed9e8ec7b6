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
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="CSV, TSV, JSON lines and Parquet: files, folders, and patterns such as 'logs/*.csv'. Text files may be "
        "compressed (.csv.gz), and take longer then, as such a file can only be read from its beginning.",
    )
    parser.add_argument(
        "output", metavar="OUTPUT", help="Folder of the answers. What it has already is not made again."
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="Column of the text; text.")
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
    parser.add_argument("--actors", type=int, default=1, metavar="N", help="Processes that each hold a model; 1.")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="Cores of each; 1.")
    parser.add_argument(
        "--block-rows",
        type=int,
        default=10_000,
        metavar="N",
        help="Rows that are read, answered and written together; 10000. A run that was stopped repeats so many.",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="A running Ray cluster, whose machines all see the files by the same paths; one on this machine unless "
        "given.",
    )
    add_model(parser)
    add_dial(parser, "")


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="127.0.0.1, this machine alone.")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="8000.")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="Processes that each hold a model; 1.")
    parser.add_argument("--max-replicas", type=int, metavar="N", help="Start up to so many where more comes.")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="Cores of each; 1.")
    parser.add_argument("--max-batch-tokens", type=int, default=1024, metavar="N", help="Tokens of a batch; 1024.")
    parser.add_argument("--max-client-batch-size", type=int, default=32, metavar="N", help="Texts of a request; 32.")
    parser.add_argument("--max-body-bytes", type=int, default=2_000_000, metavar="N", help="Of a request; 2000000.")
    parser.add_argument(
        "--max-concurrent-requests", type=int, default=512, metavar="N", help="Of a replica; as many wait for it; 512."
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="What requests have to bring. FASTBERT_API_KEY is safer, as others see options.",
    )
    parser.add_argument(
        "--settings",
        metavar="FILE",
        help='JSON with the model and its speeds, such as {"model": NAME, "max_speed": 0.8}, in place of the '
        "options below. It is read again at every SIGHUP, and taken up without a pause.",
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="A running Ray cluster; one on this machine unless given."
    )
    add_model(parser)
    group = parser.add_argument_group("how fast it answers")
    group.add_argument("--slo-ms", type=float, default=100.0, metavar="MS", help="Milliseconds to an answer; 100.")
    normal, most = group.add_mutually_exclusive_group(), group.add_mutually_exclusive_group()
    normal.add_argument("--speed", type=float, metavar="S", help="Where nothing waits. The model's own unless given.")
    normal.add_argument("--speedup", type=float, metavar="X", help="In its place: so many times cheaper than speed 0.")
    most.add_argument("--max-speed", type=float, metavar="S", help="What load may lead to, at most; 1.")
    most.add_argument("--max-speedup", type=float, metavar="X", help="In its place: so many times cheaper.")
    most.add_argument(
        "--max-disagreement", type=float, metavar="SHARE", help="Or: so many answers may differ from speed 0."
    )


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="127.0.0.1, this machine alone.")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="7860.")
    parser.add_argument(
        "--example",
        action="append",
        dest="examples",
        metavar="TEXT",
        help="A text to try; may be given several times. Film reviews, for the package's own model, if none.",
    )
    add_model(parser)
    add_dial(parser, " when the page opens")


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
