"""
Cut files of rows into blocks, and read each block by itself.

Where a file is cut depends on nothing but the file and the number of rows of a block, so that a later run finds the
same blocks. Text files are cut at the ends of records, other files at numbers of rows. What is compressed as a whole
can only be read from its beginning: every block of it leaves out the rows before its own, so these are few and long.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .row_files import (
    BROKEN,
    RowFile,
    as_lines,
    csv_records,
    header_of,
    is_unicode,
    json_fits,
    open_rows,
)


# A block ends here, too: what an actor holds does not grow with the length of the texts.
BLOCK_BYTES = 1 << 26
# Of a compressed file, at most. To leave out half of its rows, on average, takes little beside answering a hundredth.
GZIP_BLOCKS = 100
# The record that follows the last one of a text file, unless a quotation mark is open: then it is part of a value.
END = ["\0", "\0"]
DELIMITERS = {"csv": ",", "tsv": "\t"}
READ_BUFFER = 1 << 20


@dataclass(frozen=True)
class RowBlock:
    """
    Rows of a file that are read, answered and written together.

    Args:
        file ([`RowFile`]): Their file.
        file_number, number (`int`): Which file it is, and which block of the file, from 0.
        start, stop (`int`): Bytes of a text file, rows of a compressed or a Parquet file.
        first_row (`int`): Number of the first row in the file, from 0. Empty lines are no rows.
        rows (`int`): How many there are.
    """

    file: RowFile
    file_number: int
    number: int
    start: int
    stop: int
    first_row: int
    rows: int

    @property
    def name(self) -> str:
        """Its name among all blocks; they are in the order of the rows."""
        return f"{self.file_number:05d}-{self.number:06d}"


class UnreadRow(NamedTuple):
    """A row that does not fit the columns, by its number in the file, and why, and what it says."""

    row: int
    reason: str
    text: str


class RowPiece(NamedTuple):
    """Rows of a block, by their numbers in the file, and those that cannot be read."""

    numbers: Sequence[int]
    table: pa.Table
    unread: list[UnreadRow]


class UnreadableFile(Exception):
    """A file that is gone, was changed since it was cut, or is not what it seemed to be."""


def cut_file(file: RowFile, file_number: int, block_rows: int) -> Iterator[RowBlock]:
    """
    Yield the blocks of a file, at least one.

    Args:
        file ([`RowFile`]): With its columns, as [`columns_of`] has checked it.
        file_number (`int`): Which one it is.
        block_rows (`int`): Rows of a block, at most.

    Raises:
        ValueError: If the file is not what its name says.
    """
    first_row = 0
    try:
        if file.kind == "parquet":
            cuts = _parquet_cuts(file, block_rows)
        elif file.is_gzip:
            cuts = _gzip_cuts(file, block_rows)
        else:
            cuts = _byte_cuts(file, block_rows)
        for number, (start, stop, rows) in enumerate(cuts):
            yield RowBlock(file, file_number, number, start, stop, first_row, rows)
            first_row += rows
    except BROKEN as error:
        hint = "; is a quotation mark never closed?" if "field limit" in str(error) else ""
        raise ValueError(f"{file.path} cannot be read, at or after its row {first_row}: {error}{hint}") from error


def _parquet_cuts(file: RowFile, block_rows: int) -> Iterator[tuple[int, int, int]]:
    with pq.ParquetFile(file.path) as parquet:
        metadata = parquet.metadata
    total = metadata.num_rows
    size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    yield from _row_cuts(total, min(block_rows, BLOCK_BYTES * total // max(size, 1)))


def _gzip_cuts(file: RowFile, block_rows: int) -> Iterator[tuple[int, int, int]]:
    with open_rows(file.path, is_gzip=True) as stream:
        total = sum(1 for _ in _record_ends(stream, file.kind))
    total -= file.kind != "jsonl" and total > 0  # the header
    yield from _row_cuts(total, max(block_rows, math.ceil(total / GZIP_BLOCKS)))


def _row_cuts(total: int, rows: int) -> Iterator[tuple[int, int, int]]:
    for start in range(0, max(total, 1), max(rows, 1)):
        stop = min(start + max(rows, 1), total)
        yield start, stop, stop - start


def _byte_cuts(file: RowFile, block_rows: int) -> Iterator[tuple[int, int, int]]:
    with open_rows(file.path, is_gzip=False) as stream:
        start, rows, is_cut = stream.tell(), 0, False
        ends = _record_ends(stream, file.kind)
        if file.kind != "jsonl":
            start = next(ends, start)
        end = start
        for end in ends:
            rows += 1
            if rows == block_rows or end - start >= BLOCK_BYTES:
                yield start, end, rows
                start, rows, is_cut = end, 0, True
    if rows or not is_cut:
        yield start, end, rows


def _record_ends(stream: BinaryIO, kind: str) -> Iterator[int]:
    """Yield how many bytes come before the end of each record of a text file, header included."""
    position = stream.tell()
    if kind == "jsonl":
        for line in stream:
            position += len(line)
            if line.strip():
                yield position
        return

    def lines() -> Iterator[str]:
        nonlocal position
        # A character for each byte. Those that separate are the same in UTF-8, and no part of another character.
        for line in as_lines(stream, "latin-1"):
            position += len(line)
            yield line

    for _ in csv_records(lines(), kind):
        yield position


def read_block(
    block: RowBlock, columns: pa.Schema, only_these: bool = False, piece_rows: int = 10_000
) -> Iterator[RowPiece]:
    """
    Yield the rows of a block.

    Args:
        block ([`RowBlock`]): From [`cut_file`].
        columns (`pyarrow.Schema`): The columns to read, with their types; the file may have others.
        only_these (`bool`): Whether rows of JSON lines may have columns that are not among them, which are left out.
        piece_rows (`int`): Rows of a piece, at most.

    Raises:
        UnreadableFile: If that cannot be done any more.
    """
    file, rows = block.file, 0
    try:
        _check_unchanged(file)
        pieces = _parquet_pieces if file.kind == "parquet" else _text_pieces
        for piece in pieces(block, columns, only_these, piece_rows):
            rows += len(piece.numbers) + len(piece.unread)
            yield piece
        _check_unchanged(file)
    except (OSError, *BROKEN) as error:
        raise UnreadableFile(f"{file.path} cannot be read: {error}") from error
    if rows != block.rows:
        raise UnreadableFile(f"{file.path} has {rows} rows where it had {block.rows}, from row {block.first_row} on")


def _check_unchanged(file: RowFile) -> None:
    status = os.stat(file.path)
    if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
        raise OSError("it was changed after this run began")


def _parquet_pieces(block: RowBlock, columns: pa.Schema, only_these: bool, piece_rows: int) -> Iterator[RowPiece]:
    # Without `pre_buffer` a row group of any size is read page by page.
    with pq.ParquetFile(block.file.path, pre_buffer=False, buffer_size=READ_BUFFER) as parquet:
        groups, end, position = [], 0, 0
        for group in range(parquet.metadata.num_row_groups):
            begin, end = end, end + parquet.metadata.row_group(group).num_rows
            if begin < block.stop and end > block.start:
                position = position if groups else begin
                groups.append(group)
        names = None if set(parquet.schema_arrow.names) == set(columns.names) else columns.names
        for batch in parquet.iter_batches(piece_rows, row_groups=groups, columns=names, use_threads=False):
            begin, end = max(block.start, position), min(block.stop, position + len(batch))
            if begin < end:
                table = pa.Table.from_batches([batch.slice(begin - position, end - begin)])
                yield RowPiece(range(begin, end), table.select(columns.names).cast(columns), [])
            position += len(batch)
            if position >= block.stop:
                return


def _text_pieces(block: RowBlock, columns: pa.Schema, only_these: bool, piece_rows: int) -> Iterator[RowPiece]:
    file, row = block.file, block.first_row
    is_json = file.kind == "jsonl"
    header = [] if is_json else header_of(file.path, file.kind, file.is_gzip)
    with open_rows(file.path, file.is_gzip) as stream:
        if not file.is_gzip:
            stream.seek(block.start)
            stream = io.BytesIO(stream.read(block.stop - block.start))
        records = (line for line in stream if line.strip()) if is_json else _closed_records(stream, file.kind)
        if file.is_gzip:
            header_rows = 0 if is_json else 1
            records = islice(records, header_rows + block.start, header_rows + block.stop)
        while some := list(islice(records, piece_rows)):
            if is_json:
                found = _json_rows(some, columns, only_these)
            else:
                found = _csv_rows(some, header, columns, DELIMITERS[file.kind])
            yield _piece(found, row, columns)
            row += len(some)


def _piece(found: Iterable[dict[str, Any] | UnreadRow], row: int, columns: pa.Schema) -> RowPiece:
    """Return rows, of which the first has the number `row`, as a piece."""
    numbers, rows, unread = [], [], []
    for number, one in enumerate(found, row):
        if isinstance(one, UnreadRow):
            unread.append(one._replace(row=number))
        else:
            numbers.append(number)
            rows.append(one)
    arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in columns]
    return RowPiece(numbers, pa.Table.from_arrays(arrays, schema=columns), unread)


def _closed_records(stream: BinaryIO, kind: str) -> Iterator[tuple[list[str], bool]]:
    """Yield the records of a CSV or TSV file, and whether all of their quotation marks are closed."""
    has_ended, end = False, DELIMITERS[kind].join(END)

    def lines() -> Iterator[str]:
        nonlocal has_ended
        yield from as_lines(stream)
        has_ended = True
        yield end

    for record in csv_records(lines(), kind):
        if not has_ended:
            yield record, True
        elif record != END:
            yield [*record[:-1], record[-1].removesuffix(end)], False


def _csv_rows(
    records: Sequence[tuple[list[str], bool]], header: list[str], columns: pa.Schema, delimiter: str
) -> Iterator[dict[str, str] | UnreadRow]:
    for record, is_closed in records:
        if not is_closed:
            reason = "one of its quotation marks is never closed"
        elif len(record) != len(header):
            reason = f"it has {len(record)} fields, and the header has {len(header)}"
        elif not all(map(is_unicode, record)):
            reason = "it is not in UTF-8"
        else:
            yield dict(zip(header, record, strict=True))
            continue
        bytes_of_row = delimiter.join(record).encode("utf-8", "surrogateescape")
        yield UnreadRow(0, reason, bytes_of_row.decode("utf-8", "backslashreplace"))


def _json_rows(lines: Sequence[bytes], columns: pa.Schema, only_these: bool) -> Iterator[dict[str, Any] | UnreadRow]:
    types = {field.name: field.type for field in columns}
    for line in lines:
        try:
            row = json.loads(line.decode())
            reason = _misfit(row, types, only_these)
        except UnicodeDecodeError:
            reason = "it is not in UTF-8"
        except (ValueError, RecursionError) as error:
            reason = f"it is no JSON: {error}"
        yield UnreadRow(0, reason, line.decode("utf-8", "backslashreplace").strip()) if reason else row


def _misfit(row: Any, types: dict[str, pa.DataType], only_these: bool) -> str | None:
    """Return why a row of JSON lines does not fit the columns, `None` if it does."""
    if not isinstance(row, dict):
        return "it is no JSON object"
    for name, value in row.items():
        if name not in types:
            if value is not None and not only_these:
                return f"it has {name!r}, which no row of the first block has: name those to keep, with --columns"
        elif not json_fits(value, types[name]):
            if isinstance(value, str) and not is_unicode(value):
                return f"its {name!r} has half of a pair of surrogates, which stands for nothing"
            return f"its {name!r} is {json.dumps(value):.40}, and not {types[name]} as in the first block"
    return None
