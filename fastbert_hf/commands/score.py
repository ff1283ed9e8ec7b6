"""
Answer every row of files of any size: `fastbert-hf score`.

Files are cut into blocks, which Ray gives to processes that each hold a model. A finished block is a Parquet file in
the output folder, so that the same command goes on where another one ended, however it did. Rows without an answer
are in `_rejected` there, with their reasons.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from ..escapes import printable
from ..modeling.dials import DIALS, check_dial, one_dial
from ..modeling.exit_policies import check_speed
from .options import check_at_least_one, fail, one_line_errors


if TYPE_CHECKING:
    import pyarrow as pa

    from ..serving.block_scorer import BlockOutcome
    from ..serving.row_blocks import RowBlock
    from ..serving.row_files import RowFile
    from ..serving.scored_parts import PartCounts, PartFolder

# Files of a model that have no part in its answers.
ABOUT = (".md", ".png")
ERRORS = (ValueError, TypeError, OSError, ImportError)
GO_ON = "what is finished stays, and the same command goes on from there"
PUT_RIGHT = "what is finished stays; put that right, and the same command goes on from there"
# Columns that an error names.
MOST_NAMES = 20
INTERRUPTED = 130


class Columns(NamedTuple):
    """Which columns are read, and which of them are written beside the answers."""

    read: pa.Schema
    kept: pa.Schema
    are_chosen: bool


def run(options: argparse.Namespace) -> None:
    """Score the rows that are left, and check that all have an answer or a reason."""
    for package in ("pyarrow", "ray"):
        if importlib.util.find_spec(package) is None:
            fail('scoring files needs its extra: pip install "fastbert-hf[ray]"')
    check_at_least_one(options, "actors", "threads", "block_rows", "max_length")
    with one_line_errors(kinds=ERRORS):
        from ..serving.row_files import columns_of, find_row_files
        from ..serving.scored_parts import PartFolder

        config = model_config(options)
        files = find_row_files(options.inputs)
        check_output(options.output, options.inputs, files)
        columns = chosen_columns(options, columns_of(files, options.block_rows), config)
        folder = PartFolder(os.path.abspath(options.output))
        settings = score_settings(options, config, files, columns)
        try:
            with folder.locked():
                folder.check(settings)
                blocks = blocks_of(files, options.block_rows)
                folder.begin(settings)
                score(options, folder, blocks, columns)
        except KeyboardInterrupt:
            print(f"\nstopped; {GO_ON}: {command()}", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None


def model_config(options: argparse.Namespace) -> PreTrainedConfig:
    """Return the config of the model, once it is known that it can be asked for what the options ask."""
    from ..serving.loading import load_config

    config = load_config(options.model)
    name, value = one_dial(dials_of(options))
    if name == "speed":
        check_speed(value)
    if name is not None:
        check_dial(config, name, value)
    return config


def dials_of(options: argparse.Namespace) -> dict[str, float | None]:
    """Return what the model is asked for."""
    return {name: getattr(options, name) for name in DIALS}


def check_output(output: str, inputs: Sequence[str], files: Sequence[RowFile]) -> None:
    """Raise a `ValueError` if the output is no folder, or if answers would be among the inputs, now or later."""
    if os.path.isfile(output):
        raise ValueError(f"the output {output} is a file: choose a folder")
    folder = os.path.realpath(output)
    for given in filter(os.path.isdir, inputs):
        if is_below(folder, os.path.realpath(given)):
            raise ValueError(f"the output {output} is inside the input {given}: choose a folder beside it")
    for file in files:
        if is_below(os.path.realpath(file.path), folder):
            raise ValueError(f"the input {file.path} is inside the output {output}: choose another folder")


def is_below(path: str, folder: str) -> bool:
    """Tell whether a path leads into a folder, or is that folder."""
    return os.path.commonpath([path, folder]) == folder


def chosen_columns(options: argparse.Namespace, columns: pa.Schema, config: PreTrainedConfig) -> Columns:
    """Return which columns are read and written, or raise a `ValueError` if one is missing or would be there twice."""
    import pyarrow as pa

    from ..serving.ray_data import answer_columns, check_free_names
    from ..serving.row_files import are_strings, check_can_be_written

    texts = {"--text-column": options.text_column, "--text-pair-column": options.text_pair_column}
    texts = {option: name for option, name in texts.items() if name is not None}
    wanted = columns.names if options.columns is None else list(filter(None, options.columns.split(",")))
    for option, name in [*texts.items(), *(("--columns", name) for name in wanted)]:
        if name not in columns.names:
            known = ", ".join(columns.names[:MOST_NAMES]) + (", ..." if len(columns) > MOST_NAMES else "")
            raise ValueError(f"there is no column {name!r}, only {known}: correct {option}")
    for option, name in texts.items():
        kind = columns.field(name).type
        if not are_strings(kind) and not pa.types.is_null(kind):
            raise ValueError(f"the column {name!r} is {kind}, not strings: correct {option}, or convert it")
    check_free_names(wanted, answer_columns(config, options.prefix).names, "--prefix predicted_")
    read = pa.schema([field for field in columns if field.name in {*wanted, *texts.values()}])
    kept = pa.schema([field for field in read if field.name in wanted])
    check_can_be_written(kept)
    return Columns(read, kept, options.columns is not None)


def score_settings(
    options: argparse.Namespace, config: PreTrainedConfig, files: Sequence[RowFile], columns: Columns
) -> dict[str, Any]:
    """Return what the answers depend on, as it is compared with that of an earlier run."""
    names = ("text_column", "text_pair_column", "int8", "max_length", "truncate", "prefix", "block_rows")
    return {
        "model": model_name(options),
        "model_files": model_digest(options, config),
        **dials_of(options),
        **{name: getattr(options, name) for name in names},
        "columns": columns.kept.names,
        "inputs": {file.path: {"size": file.size, "modified": file.modified} for file in files},
    }


def model_name(options: argparse.Namespace) -> str | None:
    """Return the model by a name that means the same in every process."""
    is_folder = options.model is not None and os.path.isdir(options.model)
    return os.path.abspath(options.model) if is_folder else options.model


def model_digest(options: argparse.Namespace, config: PreTrainedConfig) -> str | None:
    """Return a digest of the files of a model, or of one on the Hub its revision."""
    from ..serving.loading import DEFAULT_MODEL_DIR

    folder = Path(options.model or DEFAULT_MODEL_DIR)
    if not folder.is_dir():
        return config._commit_hash
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in ABOUT):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def blocks_of(files: Sequence[RowFile], block_rows: int) -> list[RowBlock]:
    """Return the blocks of all files."""
    from ..serving.row_blocks import cut_file

    blocks = []
    size = sum(file.size for file in files)
    with tqdm(total=size, desc="Looking for rows", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for number, file in enumerate(files):
            before = bar.n
            for block in cut_file(file, number, block_rows):
                blocks.append(block)
                bar.update(0 if file.kind == "parquet" or file.is_gzip else block.stop - block.start)
            bar.update(before + file.size - bar.n)
    return blocks


def score(options: argparse.Namespace, folder: PartFolder, blocks: Sequence[RowBlock], columns: Columns) -> None:
    """Score the blocks that are not finished, and tell what became of all rows."""
    before = {block.name: counts for block in blocks if (counts := finished(folder, block)) is not None}
    progress = Progress(blocks, before)
    start = time.perf_counter()
    if progress.left:
        score_left(options, folder, columns, progress)
    seconds = time.perf_counter() - start
    total, unfinished = totals(folder, blocks)
    if unfinished:
        troubles = progress.troubles or [f"block {unfinished[0]} is missing in {folder.path}"]
        more = f" (and {len(troubles) - 1} more like it)" if len(troubles) > 1 else ""
        fail(f"{len(unfinished)} of {len(blocks)} blocks have no answers: {troubles[0]}{more}; {PUT_RIGHT}")
    print_summary(folder, total, progress, seconds)


class Progress:
    """
    How far a run is.

    Args:
        blocks (`Sequence` of [`RowBlock`]): All blocks.
        before (`dict` of [`PartCounts`]): What became of those that were finished before, by their names.
    """

    def __init__(self, blocks: Sequence[RowBlock], before: Mapping[str, PartCounts]):
        self.left = [block for block in blocks if block.name not in before]
        self.done = sum(counts.rows + counts.rejected for counts in before.values())
        self.rows = self.done + sum(block.rows for block in self.left)
        self.now, self.rejected = 0, 0
        self.troubles: list[str] = []  # with files that could not be read
        self.pids: set[int] = set()
        self.memory = 0  # bytes

    def add(self, outcome: BlockOutcome) -> None:
        """Note what became of a block."""
        self.pids.add(outcome.pid)
        self.memory = max(self.memory, outcome.memory)
        if outcome.error:
            self.troubles.append(outcome.error)
        self.now += outcome.rows + outcome.rejected
        self.rejected += outcome.rejected


def score_left(options: argparse.Namespace, folder: PartFolder, columns: Columns, progress: Progress) -> None:
    """Score the blocks that are left, and show how far that is."""
    from ..serving.block_scorer import ray_running, score_blocks

    actors = min(options.actors, len(progress.left))
    settings = {
        "output": str(folder.path),
        "columns": columns.read,
        "kept": columns.kept,
        "only_these": columns.are_chosen,
        "piece_rows": options.block_rows,
        "scorer": scorer_settings(options),
    }
    pause = 0.2 if sys.stderr.isatty() else 30.0  # in a log, every look is a line
    with ray_running(actors * options.threads, options.threads, options.address):
        from ray.exceptions import RayError

        bar = tqdm(total=progress.rows, initial=progress.done, unit=" rows", unit_scale=True, mininterval=pause)
        try:
            with bar:
                for outcome in score_blocks(progress.left, actors, options.threads, **settings):
                    if outcome.is_fatal:
                        fail(f"{outcome.error}; {PUT_RIGHT}")
                    progress.add(outcome)
                    bar.set_postfix(rejected=progress.rejected, refresh=False)
                    bar.update(outcome.rows + outcome.rejected)
        except RayError as error:
            reason = [line for line in str(error).splitlines() if line.strip()][-1]
            fail(f"Ray ended the run ({reason.strip()}); {GO_ON}")


def scorer_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of [`FastTextScorer`]."""
    names = ("text_column", "text_pair_column", "prefix", "int8", "truncate", "max_length")
    dials = {name: value for name, value in dials_of(options).items() if value is not None}
    return {"model": model_name(options), **{name: getattr(options, name) for name in names}, **dials}


def finished(folder: PartFolder, block: RowBlock) -> PartCounts | None:
    """Return what became of the rows of a block, as its files tell; `None` unless that are all of its rows."""
    counts = folder.counts(block.name)
    return counts if counts is not None and counts.rows + counts.rejected == block.rows else None


def totals(folder: PartFolder, blocks: Sequence[RowBlock]) -> tuple[PartCounts, list[str]]:
    """Return what became of all rows of finished blocks, and the names of the others."""
    from ..serving.scored_parts import PartCounts

    total, unfinished = PartCounts(), []
    for block in blocks:
        counts = finished(folder, block)
        if counts is None:
            unfinished.append(block.name)
        else:
            total = total.plus(counts)
    return total, unfinished


def print_summary(folder: PartFolder, total: PartCounts, progress: Progress, seconds: float) -> None:
    """Print where the answers are, how many, and what they took."""
    where = f", in {folder.rejected_folder}" if total.rejected else ""
    answered = f"Rows: {total.rows + total.rejected:,}. Answered: {total.rows:,}, in {folder.path}."
    print(printable(f"{answered} Rejected: {total.rejected:,}{where}."))
    if total.rows:
        print(f"Exit layer: {total.layers / total.rows:.2f} on average.")
    if progress.now:
        rate = f"{progress.now / seconds:,.1f} rows a second"
        processes = f"{len(progress.pids)} processes of at most {progress.memory / 2**20:,.0f} MiB"
        print(f"This run: {progress.now:,} rows, {seconds:.1f} seconds, {rate}, {processes}.")


def command() -> str:
    """Return the words of the command line, as they can be typed again."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
