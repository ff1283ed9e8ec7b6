"""Files that visitors of the page give and take: rows, read with bounds, and their answers as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pyarrow import parquet

from .row_files import BROKEN, KINDS, as_lines, csv_records, header_of, is_unicode, json_or_none, open_rows


MOST_BYTES = 10_000_000
MOST_ROWS = 5_000
# A Parquet file may be far smaller than what is in it.
MOST_BYTES_IN_MEMORY = 60_000_000
TEXT_COLUMNS = ("text", "sentence", "review", "content", "body", "comment", "premise", "question")
PAIR_COLUMNS = ("text_pair",)
LABEL_COLUMNS = ("label", "labels", "category", "class", "sentiment")
# Columns of the answers are told apart from those of the file.
PREFIX = "predicted_"


@dataclass(frozen=True)
class UploadedRows:
    """
    The rows of a file.

    Args:
        columns (`list[str]`): Their names, in the order of the file.
        rows (`list[dict[str, Any]]`): One for each row, an empty one where it cannot be read.
        reasons (`dict[int, str]`): Why a row cannot be read, by its number from 0.
        is_cut (`bool`): Whether the file has more rows than these.
    """

    columns: list[str]
    rows: list[dict[str, Any]]
    reasons: dict[int, str] = field(default_factory=dict)
    is_cut: bool = False

    def texts(self, *columns: str) -> tuple[list[str | dict[str, str]], list[int], dict[int, str]]:
        """
        Return the texts of a column, or the pairs of two, the numbers of their rows, and why other rows have none.
        """
        texts, places, reasons = [], [], dict(self.reasons)
        for place, row in enumerate(self.rows):
            wrong = [reason for name in columns if (reason := _why_no_text(row.get(name), name))]
            if wrong:
                reasons.setdefault(place, wrong[0])
            if place not in reasons:
                parts = [str(row[name]) for name in columns]
                texts.append(parts[0] if len(parts) == 1 else dict(zip(("text", "text_pair"), parts, strict=True)))
                places.append(place)
        return texts, places, reasons


def _why_no_text(value: Any, column: str) -> str | None:
    if isinstance(value, (dict, list)):
        return f"has several values in {column!r}, not one text"
    if value is None or not str(value).strip():
        return f"has no text in {column!r}"
    return None if is_unicode(str(value)) else f"is not in UTF-8 in {column!r}"


def read_upload(path: str | Path, most_rows: int = MOST_ROWS) -> UploadedRows:
    """
    Read the first rows of a file, as `fastbert-hf score` reads them.

    Args:
        path (`str` or `Path`): A `.csv` or `.tsv` file with a header, JSON lines, or Parquet.
        most_rows (`int`): Further rows are left out.

    Raises:
        ValueError: If it is none of these, too large, empty, or cannot be read at all.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise ValueError(f"This file ends with {suffix or 'nothing'!r}. Give one of {', '.join(KINDS)}.")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"This file is larger than the {MOST_BYTES // 1_000_000} MB that the page reads.")
    if path.stat().st_size == 0:
        raise ValueError("This file is empty.")
    readers = {"csv": _read_table, "tsv": _read_table, "jsonl": _read_json_lines, "parquet": _read_parquet}
    kind, name = KINDS[suffix], suffix[1:].upper()
    try:
        columns, rows, reasons = readers[kind](path, kind, most_rows + 1)
    except (*BROKEN, OSError, ValueError) as error:
        # What is raised names the path at which the file lies here.
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(str(path), "it")
        raise ValueError(f"This file cannot be read as {name}: {reason:.200}") from None
    repeated = next((name for name in columns if columns.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"This file has several columns with the name {repeated!r}.")
    if not rows:
        raise ValueError("This file has no rows.")
    if len(reasons) == len(rows):
        raise ValueError(f"This file cannot be read as {name}: its first row {reasons[0]}.")
    reasons = {place: reason for place, reason in reasons.items() if place < most_rows}
    return UploadedRows(columns, rows[:most_rows], reasons, len(rows) > most_rows)


def _read_table(path: Path, kind: str, number: int) -> tuple[list[str], list[dict[str, Any]], dict[int, str]]:
    columns, rows, reasons = header_of(str(path), kind, is_gzip=False), [], {}
    with open_rows(str(path), is_gzip=False) as stream:
        for place, fields in enumerate(islice(csv_records(as_lines(stream), kind), 1, number + 1)):
            if len(fields) != len(columns):
                reasons[place] = f"has {len(fields)} values, and the header {len(columns)} columns"
            rows.append({} if place in reasons else dict(zip(columns, fields, strict=True)))
    return columns, rows, reasons


def _read_json_lines(path: Path, kind: str, number: int) -> tuple[list[str], list[dict[str, Any]], dict[int, str]]:
    columns, rows, reasons = {}, [], {}
    with open_rows(str(path), is_gzip=False) as stream:
        for place, line in enumerate(islice((line for line in stream if line.strip()), number)):
            row = json_or_none(line)
            if not isinstance(row, dict):
                row, reasons[place] = {}, "is no JSON object"
            columns.update(dict.fromkeys(row))
            rows.append(row)
    return list(columns), rows, reasons


def _read_parquet(path: Path, kind: str, number: int) -> tuple[list[str], list[dict[str, Any]], dict[int, str]]:
    rows, used = [], 0
    with parquet.ParquetFile(path) as file:
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        declared = sum(group.total_byte_size for group in groups)
        for batch in file.iter_batches(batch_size=64):
            used += batch.nbytes
            if max(declared, used) > MOST_BYTES_IN_MEMORY:
                raise ValueError("there is too much in it for this page")
            rows += batch.to_pylist()
            if len(rows) >= number:
                break
        return file.schema_arrow.names, rows[:number], {}


def likely_columns(upload: UploadedRows) -> tuple[str, str | None, str | None]:
    """
    Return the column that probably has the texts, by its name or else its longest values, that of the second texts of
    pairs, and that of the labels, `None` where none seems to be.
    """
    by_name = {name.lower(): name for name in reversed(upload.columns)}
    text, pair, label = (
        next((by_name[name] for name in names if name in by_name), None)
        for names in (TEXT_COLUMNS, PAIR_COLUMNS, LABEL_COLUMNS)
    )
    if text is None:
        others = [name for name in upload.columns if name not in (pair, label)] or upload.columns
        text = max(others, key=lambda name: sum(len(str(row.get(name) or "")) for row in upload.rows[:100]))
    return text, pair, label


def label_ids(values: Sequence[Any], label2id: Mapping[str, int]) -> list[int]:
    """Return the id of each label, which a file may have by name or by id, and -1 where the model does not know it."""
    names = ["" if value is None else str(value).strip() for value in values]
    given = set(filter(None, names))
    if not given & label2id.keys() and all(name.isdecimal() and int(name) < len(label2id) for name in given):
        return [int(name) if name else -1 for name in names]
    folded = {name.casefold(): number for name, number in label2id.items()}
    if len(folded) < len(label2id):  # labels that differ by their case alone
        return [label2id.get(name, -1) for name in names]
    return [folded.get(name.casefold(), -1) for name in names]


def answered_csv(
    upload: UploadedRows, places: Sequence[int], answers: Sequence[Mapping[str, Any]], reasons: Mapping[int, str]
) -> str:
    """
    Return all rows of a file with their answers, as CSV.

    Args:
        upload ([`UploadedRows`]): The rows. Their values are written as they were read.
        places (sequence of `int`): The rows that have an answer.
        answers (sequence of mappings): Their answers, as the pipeline gives them.
        reasons (mapping of `int` to `str`): Why other rows have none.
    """
    names = {f"{PREFIX}{name}": name for name in (answers[0] if answers else ("label", "score", "exit_layer"))}
    kept = [name for name in upload.columns if name not in {*names, f"{PREFIX}error"}]
    by_place, buffer = dict(zip(places, answers, strict=True)), io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*kept, *names, f"{PREFIX}error"])
    for place, row in enumerate(upload.rows):
        answer = by_place.get(place, {})
        said = [inert(answer.get(name, "")) for name in names.values()]
        writer.writerow([*(_cell(row.get(name)) for name in kept), *said, reasons.get(place, "")])
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def inert(value: Any) -> Any:
    """Return a value that no spreadsheet takes for a formula, which a model's label might look like."""
    if not isinstance(value, str) or value[:1] not in ("=", "+", "-", "@", "\t", "\r"):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
