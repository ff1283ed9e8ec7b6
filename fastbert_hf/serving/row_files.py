"""
Find files of rows, and tell which columns they have.

CSV and TSV are read as [`load_rows`] reads them: every value is a string as it is written, and in TSV a quotation mark
is a character like any other. The types of JSON lines are those of the first rows of each file.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq


# By the end of a file's name. All but Parquet may be compressed (`.csv.gz`).
KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
ENDINGS = f"{', '.join(KINDS)}, and .gz after any of the text files"
DIALECTS = {"csv": {}, "tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}
BOM, UTF_16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
# A value that is longer began with a quotation mark that is never closed.
LONGEST_VALUE = 1 << 24
STRINGS = (pa.string(), pa.large_string(), pa.string_view())
# What reading raises where a file is not what its name says, beside the errors of the system.
BROKEN = (EOFError, csv.Error, gzip.BadGzipFile, zlib.error, pa.ArrowException)


@dataclass(frozen=True)
class RowFile:
    """
    A file of rows.

    Args:
        path (`str`): Where it is, from the root.
        kind (`str`): A value of `KINDS`.
        is_gzip (`bool`): Whether it is compressed as a whole.
        size, modified (`int`): Bytes, and nanoseconds since 1970: whether it is still the same file.
    """

    path: str
    kind: str
    is_gzip: bool
    size: int
    modified: int


def find_row_files(inputs: Sequence[str]) -> list[RowFile]:
    """
    Return the files of rows that are meant, in the order of the inputs and below each by name. A file that is meant
    twice, through a link, too, is there once. Empty text files have no rows, and are left out.

    Args:
        inputs (`Sequence[str]`):
            Files, patterns such as `"logs/*.csv"`, and folders. Below a folder, files of other kinds are left out, and
            names that begin with `_` or `.`.

    Raises:
        ValueError, OSError: If an input means no file, or one of another kind.
    """
    found: dict[str, str] = {}
    for given in inputs:
        for path in _paths_of(given):
            found.setdefault(os.path.realpath(path), os.path.abspath(path))
    files = [_row_file(path) for path in found.values()]
    with_rows = [file for file in files if file.size > 0]
    if not with_rows:
        raise ValueError(f"{files[0].path} is empty: give files with rows")
    return with_rows


def _paths_of(given: str) -> list[str]:
    """Return the paths of the files that an input means."""
    if os.path.isdir(given):
        found = list(_files_below(given))
        if not found:
            raise ValueError(f"there is no file of rows below {given}: their names end with {ENDINGS}")
        return found
    if os.path.exists(given) or not glob.has_magic(given):
        return [given]
    matches = sorted(glob.glob(given, recursive=True))
    if not matches:
        raise FileNotFoundError(f"no file matches {given!r}")
    return [path for match in matches for path in ([match] if not os.path.isdir(match) else _files_below(match))]


def _files_below(folder: str) -> Iterator[str]:
    """Yield the files of rows below a folder, also through links, in an order that is always the same."""
    entered = set()

    def fail(error: OSError):
        raise error

    for path, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        entered.add(os.path.realpath(path))
        # A link may lead back to where it is.
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(("_", ".")) and os.path.realpath(os.path.join(path, name)) not in entered
        )
        for name in sorted(names):
            if _kind_of(name) is not None and not name.startswith(("_", ".")):
                yield os.path.join(path, name)


def _kind_of(name: str) -> tuple[str, bool] | None:
    """Return the kind of a file by its name, and whether it is compressed; `None` if it is of another kind."""
    inner = name.lower().removesuffix(".gz")
    kind, is_gzip = KINDS.get(os.path.splitext(inner)[1]), inner != name.lower()
    return None if kind is None or (is_gzip and kind == "parquet") else (kind, is_gzip)


def _row_file(path: str) -> RowFile:
    kind = _kind_of(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file or folder {path}")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is neither a file nor a folder")
    if kind is None:
        raise ValueError(f"{path} is of no kind that is known: give names that end with {ENDINGS}")
    status = os.stat(path)
    return RowFile(path, *kind, status.st_size, status.st_mtime_ns)


def open_rows(path: str, is_gzip: bool) -> BinaryIO:
    """Open a text file at its first byte after a byte order mark."""
    stream = gzip.open(path, "rb") if is_gzip else open(path, "rb")
    begin = stream.read(len(BOM))
    if begin[:2] in UTF_16:
        stream.close()
        raise ValueError(f"{path} is in UTF-16: convert it, as in iconv -f UTF-16 -t UTF-8")
    stream.seek(len(BOM) if begin == BOM else 0)
    return stream


def as_lines(stream: BinaryIO, encoding: str = "utf-8") -> io.TextIOWrapper:
    """Return the lines of a CSV or TSV file, with their ends. What is no UTF-8 becomes halves of characters."""
    return io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="")


def csv_records(lines: Iterable[str], kind: str) -> Iterator[list[str]]:
    """Yield the records of a CSV or TSV file, header included. Empty lines are none."""
    csv.field_size_limit(LONGEST_VALUE)  # of the whole process: there is no other place for it
    return filter(None, csv.reader(lines, **DIALECTS[kind]))


def header_of(path: str, kind: str, is_gzip: bool) -> list[str]:
    """Return the names in the header of a CSV or TSV file; none where there is nothing in the file."""
    with open_rows(path, is_gzip) as stream:
        names = next(csv_records(as_lines(stream), kind), [])
    for name in names:
        if not is_unicode(name):
            raise ValueError(f"the header of {path} is not in UTF-8: convert the file")
    return names


def columns_of(files: Sequence[RowFile], rows: int) -> pa.Schema:
    """
    Return the columns that some files have in common, in the order of the first one.

    Args:
        files (`Sequence` of [`RowFile`]): All of the same columns, in any order.
        rows (`int`): How many of the first rows of JSON lines tell which columns there are, and of which types.

    Raises:
        ValueError: If they differ, or a name is there twice.
    """
    known, first = None, None
    for file in files:
        own = _own_columns(file, rows)
        if own is None:
            continue
        repeated = [name for name, times in Counter(own.names).items() if times > 1]
        if repeated:
            raise ValueError(f"{file.path} has several columns with the name {repeated[0]!r}: rename them")
        known = own if known is None else _common_columns(known, own, first, file)
        first = first or file
    if known is None:
        raise ValueError(f"{files[0].path} has no rows and no header: give files with rows")
    # Without what Parquet files tell of themselves, such as an index of pandas, which would not hold for a part.
    return pa.schema([(field.name, _without_nulls(field.type)) for field in known])


def check_can_be_written(columns: pa.Schema) -> None:
    """Raise a `ValueError` if Parquet has no type for a column, such as that of objects without any key."""
    for field in columns:
        try:
            pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([field])).close()
        except pa.ArrowNotImplementedError as error:
            raise ValueError(
                f"the column {field.name!r} cannot be written ({error}): name those to keep, with --columns"
            ) from error


def _own_columns(file: RowFile, rows: int) -> pa.Schema | None:
    """Return the columns of a file, `None` where nothing in it tells."""
    try:
        if file.kind == "parquet":
            return pq.read_schema(file.path)
        if file.kind == "jsonl":
            return _json_columns(file, rows)
        names = header_of(file.path, file.kind, file.is_gzip)
        return pa.schema([(name, pa.string()) for name in names]) if names else None
    except BROKEN as error:
        raise ValueError(f"{file.path} cannot be read: {error}") from error


def _json_columns(file: RowFile, rows: int) -> pa.Schema | None:
    with open_rows(file.path, file.is_gzip) as stream:
        lines = list(islice((line for line in stream if line.strip()), rows))
    found = [row for row in map(json_or_none, lines) if isinstance(row, dict)]
    if lines and not found:
        raise ValueError(f"{file.path} has no JSON object in its first lines: give JSON lines, an object on each")
    return pa.schema(list(json_type(found))) if found else None


def json_or_none(line: bytes) -> Any:
    """Return what a line of JSON says, `None` if it is no JSON."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def json_type(values: Sequence[Any]) -> pa.DataType:
    """
    Return the type of some values of JSON, `null` where there are none. Where several would be needed, it is that of
    most of them: a few bad rows in the beginning shall not decide for all.
    """
    kinds = Counter(type(value) for value in values if value is not None)
    if not kinds:
        return pa.null()
    if set(kinds) == {int, float}:
        return pa.float64()
    ((kind, _),) = kinds.most_common(1)
    same = [value for value in values if type(value) is kind]
    if kind is dict:
        names = dict.fromkeys(name for value in same for name in value if is_unicode(name))
        return pa.struct([(name, json_type([value.get(name) for value in same])) for name in names])
    if kind is list:
        return pa.list_(json_type([item for value in same for item in value]))
    return {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}[kind]


def json_fits(value: Any, kind: pa.DataType) -> bool:
    """Tell whether a value of JSON is one of a type, as it is: Arrow would make `["a", "b"]` of `"ab"`."""
    if value is None:
        return True
    if pa.types.is_struct(kind):
        return isinstance(value, dict) and all(
            own is None or (kind.get_field_index(name) >= 0 and json_fits(own, kind.field(name).type))
            for name, own in value.items()
        )
    if pa.types.is_list(kind):
        return isinstance(value, list) and all(json_fits(item, kind.value_type) for item in value)
    if pa.types.is_string(kind):
        return isinstance(value, str) and is_unicode(value)
    if pa.types.is_boolean(kind):
        return isinstance(value, bool)
    if pa.types.is_integer(kind):
        return type(value) is int and -(2**63) <= value < 2**63
    # Whole numbers beyond would be rounded.
    return type(value) is float or (type(value) is int and abs(value) <= 2**53)


def is_unicode(text: str) -> bool:
    """Tell whether a text has no half of a pair of surrogates, which no file can hold."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _common_columns(known: pa.Schema, own: pa.Schema, first: RowFile, file: RowFile) -> pa.Schema:
    """Return the columns of the first files and of another one, or raise a `ValueError` that says how they differ."""
    if first.kind == file.kind == "jsonl":  # which leave out what is null
        try:
            return pa.unify_schemas([known, own], promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"{file.path} has other types than the files before it: {error}") from error
    missing, other = set(known.names) - set(own.names), set(own.names) - set(known.names)
    if missing or other:
        which = f"no column {min(missing)!r}" if missing else f"a column {min(other)!r}, too"
        raise ValueError(f"{file.path} has {which}, unlike {first.path}: score files of other columns by themselves")
    return pa.schema([(name, _common_type(known, own, name, first, file)) for name in known.names])


def _common_type(known: pa.Schema, own: pa.Schema, name: str, first: RowFile, file: RowFile) -> pa.DataType:
    a, b = known.field(name).type, own.field(name).type
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if are_strings(a) and are_strings(b):
        return pa.string()
    raise ValueError(
        f"the column {name!r} is {b} in {file.path}, but {a} in {first.path}: score files of other types by themselves"
    )


def are_strings(kind: pa.DataType) -> bool:
    """Tell whether values of a type are strings, however they are stored."""
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in STRINGS


def _without_nulls(kind: pa.DataType) -> pa.DataType:
    """Return a type that has strings where nothing but null was seen."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_nulls(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_nulls(kind.value_type)))
    return kind
