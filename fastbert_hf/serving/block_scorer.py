"""
Score blocks of files with Ray Data: what an actor of `fastbert-hf score` does, and the driver that gives out blocks.

An actor reads a block, answers it and writes what became of it, so that nothing but names and counts goes from process
to process, however many rows there are.
"""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from resource import RUSAGE_SELF, getrusage
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from .ray_cluster import start_ray
from .ray_data import FastTextScorer, answer_columns, values_of
from .row_blocks import RowBlock, RowPiece, UnreadableFile, UnreadRow, read_block
from .row_files import RowFile
from .scored_parts import PartFolder


if TYPE_CHECKING:
    import numpy as np

# A block that ends its process so often will do so again: it needs more memory than there is.
MOST_TRIES = 3
# Bytes in which the system counts memory.
RUSAGE_UNIT = 1 if sys.platform == "darwin" else 1024
# What can be set in no other way, and before Ray is imported: it says nothing, and keeps little room for objects.
RAY_ENVIRONMENT = {
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 << 20),
}


class BlockOutcome(NamedTuple):
    """What became of a block. It alone goes back to who gave it out, whatever was in the block."""

    block: int
    pid: int
    rows: int = 0
    rejected: int = 0
    layers: int = 0
    memory: int = 0  # bytes that its process has held at most
    error: str = ""
    is_fatal: bool = False  # whether all other blocks would fail alike


class BlockScorer:
    """
    Read, answer and write blocks: an actor of `fastbert-hf score`.

    Args:
        output (`str`): Folder of a [`PartFolder`].
        columns (`pyarrow.Schema`): Columns to read.
        kept (`pyarrow.Schema`): Those of them that are written beside the answers.
        only_these (`bool`): As in [`read_block`].
        piece_rows (`int`): Rows that are held at a time.
        scorer (`dict`): Arguments of [`FastTextScorer`].
    """

    def __init__(
        self,
        output: str,
        columns: pa.Schema,
        kept: pa.Schema,
        only_these: bool,
        piece_rows: int,
        scorer: dict[str, Any],
    ):
        self.folder = PartFolder(output)
        self.columns, self.kept, self.only_these, self.piece_rows = columns, kept, only_these, piece_rows
        self.scorer_settings, self.scorer = scorer, None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """Return the [`BlockOutcome`] of a block, which comes as its number and as JSON."""
        (number,), (text,) = batch["number"].tolist(), batch["block"].tolist()
        block = json.loads(text)
        outcome = self.outcome(number, RowBlock(**{**block, "file": RowFile(**block["file"])}))
        return {name: [value] for name, value in outcome._asdict().items()}

    def outcome(self, number: int, block: RowBlock) -> BlockOutcome:
        """Score a block. What is wrong with its file concerns it alone; everything else would end the others, too."""
        outcome = BlockOutcome(number, os.getpid())
        try:
            self.count_try(block)
            if self.scorer is None:  # here, as what an actor raises at its start is told at length, and tried again
                self.scorer = FastTextScorer(**self.scorer_settings)
            try:
                counts = self.folder.write(block.name, self.schema(), block.file.path, self.scored(block))
                outcome = outcome._replace(**counts._asdict())
            except UnreadableFile as error:
                outcome = outcome._replace(error=str(error))
            self.folder.tries(block.name).unlink(missing_ok=True)
        except Exception as error:  # of the model, of the disk: the driver tells it
            kind = "" if isinstance(error, (ValueError, OSError, MemoryError)) else f"{type(error).__name__}: "
            outcome = outcome._replace(error=f"{kind}{error}".splitlines()[0], is_fatal=True)
        return outcome._replace(memory=getrusage(RUSAGE_SELF).ru_maxrss * RUSAGE_UNIT)

    def count_try(self, block: RowBlock) -> None:
        """Write down that a block is begun, and raise an error if that was so too often."""
        with open(self.folder.tries(block.name), "ab") as tries:
            tries.write(b".")
            if tries.tell() > MOST_TRIES:
                raise MemoryError(
                    f"the rows of {block.file.path} from {block.first_row} on ended their process {MOST_TRIES} times, "
                    "as rows do that need more memory than there is: give a smaller --block-rows and another folder"
                )

    def schema(self) -> pa.Schema:
        """Return the columns that are written."""
        config = self.scorer.pipeline.model.config
        return pa.schema([*self.kept, *answer_columns(config, self.scorer.prefix)])

    def scored(self, block: RowBlock) -> Iterator[tuple[pa.Table, list[UnreadRow], int]]:
        """Yield the pieces of a block as they are written: answered rows, other rows, and the sum of the layers."""
        for piece in read_block(block, self.columns, self.only_these, self.piece_rows):
            yield self.scored_piece(piece)

    def scored_piece(self, piece: RowPiece) -> tuple[pa.Table, list[UnreadRow], int]:
        """Return the answered rows of a piece, the other rows in their order, and the sum of the layers."""
        texts = values_of(piece.table[self.scorer.text_column])
        pair = self.scorer.text_pair_column
        answers = self.scorer.answers(texts, pair and values_of(piece.table[pair]))
        others = [
            UnreadRow(number, error, readable(text))
            for number, error, text in zip(piece.numbers, answers["error"].to_pylist(), texts, strict=True)
            if error is not None
        ]
        is_answered = answers["error"].is_null()
        answers = answers.drop_columns(["error"])
        columns = [*(piece.table[name] for name in self.kept.names), *answers.columns]
        table = pa.Table.from_arrays(columns, schema=self.schema()).filter(is_answered)
        return table, sorted(piece.unread + others), sum(table[f"{self.scorer.prefix}exit_layer"].to_pylist())


def readable(text: Any) -> str | None:
    """Return a text, or what stands in its place, as one that can be written."""
    return None if text is None else str(text).encode("utf-8", "backslashreplace").decode()


@contextmanager
def ray_running(num_cpus: int, threads: int, address: str | None = None) -> Iterator[None]:
    """
    Connect to Ray, or start it, so that it says nothing. Where it runs in this process already, it is left as it is.

    Args:
        num_cpus, address: As in [`start_ray`].
        threads (`int`): Cores that one of its machines must have.

    Raises:
        ValueError: If there is no such cluster, or none of its machines has so many cores.
    """
    was_running = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if not was_running:
        if address is not None:
            check_address(address)
        for name, value in RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with _no_stderr():  # where it would tell that it now tells less
            start_ray(num_cpus, address)
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        cores = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        if cores < threads:
            raise ValueError(f"no machine of this Ray cluster has {threads} cores, but {cores:g}: correct --threads")
        # There Ray prints of each process that has died how one might find out why.
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        if not was_running:
            ray.shutdown()


def check_address(address: str) -> None:
    """Raise a `ValueError` if nobody listens at `HOST:PORT`, where Ray would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(
            f"there is no Ray cluster at {address} ({error}): give HOST:PORT of one that runs, such as 127.0.0.1:6379"
        ) from error


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Let nothing of this process, its compiled parts included, reach the standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def score_blocks(blocks: Sequence[RowBlock], actors: int, threads: int, **settings: Any) -> Iterator[BlockOutcome]:
    """
    Yield the outcome of each block as it is finished.

    Args:
        blocks (`Sequence` of [`RowBlock`]): Those that are left.
        actors (`int`): Processes that each hold a model.
        threads (`int`): Cores of each.
        settings: Arguments of [`BlockScorer`].
    """
    import ray.data

    items = [{"number": number, "block": json.dumps(asdict(block))} for number, block in enumerate(blocks)]
    # One by one, so that whoever is free takes the next.
    outcomes = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        BlockScorer,
        fn_constructor_kwargs=settings,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(items)), max_tasks_in_flight_per_actor=2),
        num_cpus=threads,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    )
    for row in outcomes.iter_rows():
        yield BlockOutcome(**row)
