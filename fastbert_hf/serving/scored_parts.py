"""
The folder of a scoring: a Parquet file for each finished block, those with the rows that have no answer in
`_rejected`, and `_score.json` with what was asked for.

A part is there whole or not at all, and after its rejected rows: where it is, its block is finished. Readers of
Parquet leave out names that begin with `_` or `.`, so that the folder reads as the answered rows.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import write_whole
from .row_blocks import UnreadRow


SETTINGS, REJECTED, LOCK = "_score.json", "_rejected", ".lock"
REJECTED_COLUMNS = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("text", pa.string())]
)
# Of a Parquet file, where it tells of itself: the layers that all of its texts ran through.
LAYERS = b"fastbert_hf.layers"


class PartCounts(NamedTuple):
    """What became of the rows of a block, or of all."""

    rows: int = 0  # with an answer
    rejected: int = 0
    layers: int = 0  # that those with an answer ran through, added up

    def plus(self, other: PartCounts) -> PartCounts:
        """Return the sums of both."""
        return PartCounts(*map(sum, zip(self, other, strict=True)))


class PartFolder:
    """
    The folder of a scoring.

    Args:
        path (`str` or `PathLike`): Where it is.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.rejected_folder = self.path / REJECTED

    def part(self, name: str) -> Path:
        """Return where the answered rows of a block are."""
        return self.path / f"part-{name}.parquet"

    def rejected(self, name: str) -> Path:
        """Return where the other rows of a block are, if there are any."""
        return self.rejected_folder / f"part-{name}.parquet"

    def tries(self, name: str) -> Path:
        """Return where it is counted how often a block was begun."""
        return self.path / f".part-{name}.tries"

    def check(self, settings: Mapping[str, Any]) -> bool:
        """
        Return whether a scoring was begun here, and may go on.

        Args:
            settings (`dict`): What is asked for, as JSON can say it. Of `"inputs"` that is what is known of each file.

        Raises:
            ValueError: If the folder has something else in it, or was begun with other settings.
        """
        others = sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))
        if not others:
            return False
        if SETTINGS not in others:
            raise ValueError(f"{self.path} has other files, such as {others[0]}: choose a folder that is new or empty")
        try:
            known = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path / SETTINGS} cannot be read ({error}): choose another folder") from error
        difference = first_difference(known, json.loads(json.dumps(settings)))
        if difference is not None:
            raise ValueError(f"{self.path} was begun {difference}: put that back to go on, or choose another folder")
        return True

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Prepare the folder for blocks, as [`check`] does; remove what a run has left that was killed."""
        if not self.check(settings):
            write_whole(self.path / SETTINGS, json.dumps(settings, indent=1) + "\n")
        self.rejected_folder.mkdir(exist_ok=True)
        for leftover in (*self.path.glob(".part-*"), *self.rejected_folder.glob(".part-*")):
            leftover.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from writing here. The system lets go of it, however the process ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another run is writing to {self.path}: wait for it, or end it") from None
            yield

    def counts(self, name: str) -> PartCounts | None:
        """Return what became of the rows of a block, as its files tell; `None` if it is not finished."""
        try:
            part = pq.read_metadata(self.part(name))
            rejected = pq.read_metadata(self.rejected(name)).num_rows if self.rejected(name).exists() else 0
        except FileNotFoundError:
            return None
        except pa.ArrowInvalid:  # the machine went down before all of it was on the disk
            return None
        return PartCounts(part.num_rows, rejected, int(part.metadata[LAYERS]))

    def write(
        self,
        name: str,
        columns: pa.Schema,
        file: str,
        pieces: Iterable[tuple[pa.Table, list[UnreadRow], int]],
    ) -> PartCounts:
        """
        Write the rows of a block, whole or not at all.

        Args:
            name (`str`): Of the block.
            columns (`pyarrow.Schema`): Of the answered rows.
            file (`str`): Where the rows come from.
            pieces (iterable): Of the block in turn: answered rows, other rows, and the sum of the layers.
        """
        counts = PartCounts()
        part, rejected = _Growing(self.part(name), columns), _Growing(self.rejected(name), REJECTED_COLUMNS)
        try:
            for table, others, layers in pieces:
                part.add(table)
                if others:
                    rejected.add(_rejected_table(file, others))
                counts = counts.plus(PartCounts(len(table), len(others), layers))
            part.add(columns.empty_table())
            if counts.rejected:
                rejected.finish()
            else:
                self.rejected(name).unlink(missing_ok=True)
            part.finish({LAYERS: str(counts.layers)})
        finally:
            part.discard()
            rejected.discard()
        return counts


class _Growing:
    """A Parquet file that gets its name when it is finished."""

    def __init__(self, path: Path, columns: pa.Schema):
        self.path, self.columns = path, columns
        self.growing = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
        self.writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.growing, self.columns)
        if len(table):
            self.writer.write_table(table)

    def finish(self, about: dict[bytes, str] | None = None) -> None:
        self.writer.add_key_value_metadata(about or {})
        self.writer.close()
        os.replace(self.growing, self.path)

    def discard(self) -> None:
        """Remove what was not finished."""
        if self.writer is not None:
            with suppress(OSError):  # a full disk is told of already
                self.writer.close()
            self.growing.unlink(missing_ok=True)


def _rejected_table(file: str, rows: list[UnreadRow]) -> pa.Table:
    columns = [[file] * len(rows), *zip(*rows, strict=True)]
    return pa.Table.from_arrays(
        [pa.array(values, field.type) for values, field in zip(columns, REJECTED_COLUMNS, strict=True)],
        schema=REJECTED_COLUMNS,
    )


def first_difference(known: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """Return in words how a run was begun and how it is asked for now; `None` if that is the same."""
    for name in dict.fromkeys((*known, *asked)):
        a, b = known.get(name), asked.get(name)
        if name != "inputs":
            if a != b:
                return f"with {name}={a!r}, and now it is {b!r}"
            continue
        for path in dict.fromkeys((*a, *b)):
            if path not in b:
                return f"with {path}, which is not among the inputs now"
            if path not in a:
                return f"without {path}, which is among the inputs now"
            if a[path] != b[path]:
                return f"before {path} was changed"
        if list(a) != list(b):  # parts are named by their numbers
            return "with its inputs in another order"
    return None
