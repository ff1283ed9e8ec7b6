"""Blocks of a file are the file: for every kind, every number of rows of a block, and whatever stands in the file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastbert_hf.serving import row_blocks
from fastbert_hf.serving.row_blocks import RowBlock, UnreadableFile, cut_file, read_block
from fastbert_hf.serving.row_files import RowFile, find_row_files


STRINGS = pa.schema([("id", pa.string()), ("text", pa.string())])
TSV = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
BOM = "\ufeff"
# What separates, what only looks so, and what takes several bytes.
CHARACTERS = st.sampled_from('ab,"\n\r\t\\ é\u2028\x85\x0b\U0001f600')
VALUES = st.text(CHARACTERS, max_size=6)
SIZES = st.integers(1, 5)
FOLDER = tempfile.TemporaryDirectory()


def row_file(name: str, content: bytes | str) -> RowFile:
    """A file in a folder that is emptied when the tests end."""
    path = Path(tempfile.mkdtemp(dir=FOLDER.name), name)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    status = path.stat()
    kind = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".parquet": "parquet"}[
        Path(name.removesuffix(".gz")).suffix
    ]
    return RowFile(str(path), kind, name.endswith(".gz"), status.st_size, status.st_mtime_ns)


FOLDER = tempfile.TemporaryDirectory()


def read(
    file: RowFile, block_rows: int, columns: pa.Schema = STRINGS, piece_rows: int = 3, **settings
) -> tuple[list[tuple], list[tuple]]:
    """Return all rows of a file with their numbers, those that fit and the others, read block by block."""
    fitting, unread, next_row = [], [], 0
    for number, block in enumerate(cut_file(file, 7, block_rows)):
        assert (block.file_number, block.number, block.first_row) == (7, number, next_row)
        next_row += block.rows
        for piece in read_block(block, columns, piece_rows=piece_rows, **settings):
            assert 0 < len(piece.numbers) + len(piece.unread) <= piece_rows
            assert piece.table.schema == columns
            fitting += zip(piece.numbers, map(tuple, rows_of(piece.table)), strict=True)
            unread += piece.unread
    assert sorted([number for number, *_ in fitting + unread]) == list(range(next_row))
    return fitting, unread


def rows_of(table: pa.Table) -> list[list]:
    return [list(row.values()) for row in table.to_pylist()]


def numbered(rows: list) -> list[tuple]:
    return list(enumerate(map(tuple, rows)))


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(VALUES, VALUES), max_size=8),
    block_rows=SIZES,
    line_end=st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
    bom=st.sampled_from(["", BOM]),
    has_end=st.booleans(),
)
@example([('say "no",\nplease', "\r\n"), ("", "é\u2028")], 1, "\n", BOM, False)
def test_blocks_of_csv_are_the_rows_that_were_written(rows, block_rows, line_end, bom, has_end):
    written = io.StringIO(newline="")
    csv.writer(written, lineterminator=line_end, quoting=csv.QUOTE_ALL).writerows([("id", "text"), *rows])
    content = bom + (written.getvalue() if has_end else written.getvalue().removesuffix(line_end))
    assert read(row_file("a.csv", content), block_rows) == (numbered(rows), [])
    assert read(row_file("a.csv.gz", gzip.compress(content.encode())), block_rows) == (numbered(rows), [])


@settings(deadline=None)
@given(content=st.text(CHARACTERS, max_size=30), block_rows=SIZES, name=st.sampled_from(["a.csv", "a.tsv"]))
@example('"', 1, "a.csv")
@example('1,"never closed\n2,b', 1, "a.csv")
@example('1,2\n"\0', 1, "a.csv")
@example("1,2\n\0", 1, "a.csv")
def test_blocks_of_any_text_are_what_the_csv_module_reads(content, block_rows, name):
    kind = {} if name == "a.csv" else TSV
    header = "id,text\n" if name == "a.csv" else "id\ttext\n"
    records = [row for row in csv.reader(io.StringIO(content, newline=""), **kind) if row]
    # One more line is one more record, unless a quotation mark is open.
    *_, last = csv.reader([*io.StringIO(content, newline=""), "end"], **kind)
    is_closed = last == ["end"]
    good = [
        (number, tuple(row))
        for number, row in enumerate(records)
        if len(row) == 2 and (is_closed or number < len(records) - 1)
    ]
    fitting, unread = read(row_file(name, header + content), block_rows)
    assert fitting == good
    assert len(unread) == len(records) - len(good)
    if not is_closed:
        assert unread[-1].reason == "one of its quotation marks is never closed"


@settings(deadline=None)
@given(
    content=st.lists(
        st.sampled_from(
            [b"1,a\n", b"2,\xff\n", b'"3","b\n"\r\n', b'4,"\xe9,\n', b"\n", b"5\n", b"\xf0\x9f\x98\x80,c"]
        ),
        max_size=8,
    ),
    block_rows=SIZES,
)
def test_what_is_not_utf_8_is_told_in_its_row(content, block_rows):
    file = row_file("a.csv", b"id,text\n" + b"".join(content))
    fitting, unread = read(file, block_rows)
    assert (fitting, unread) == read(file, 1000, piece_rows=1000)
    text = b"".join(content).decode("utf-8", "surrogateescape")
    records = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    for number, reason, _ in unread:
        if "UTF-8" in reason:
            assert any("\udc80" <= character <= "\udcff" for value in records[number] for character in value)
    assert all(value.isprintable() or "\n" in value for _, row in fitting for value in row)


def test_rows_that_do_not_fit_the_header_are_told_with_their_numbers_and_what_they_say():
    content = b'id,text\n1\n\n2,a,"b\nc"\r\n3,ok\n4,caf\xe9\n5,"never\nclosed,"" here\n6,x'
    fitting, unread = read(row_file("a.csv", content), 2)
    assert fitting == [(2, ("3", "ok"))]
    assert unread == [
        (0, "it has 1 fields, and the header has 2", "1"),
        (1, "it has 3 fields, and the header has 2", "2,a,b\nc"),
        (3, "it is not in UTF-8", "4,caf\\xe9"),
        (4, "one of its quotation marks is never closed", '5,never\nclosed," here\n6,x'),
    ]


def test_columns_are_read_by_their_names():
    file = row_file("a.tsv", 'text\tother\tid\n"a\t1\t2\n')
    assert read(file, 1) == ([(0, ("2", '"a'))], [])


JSON_COLUMNS = pa.schema(
    [("id", pa.int64()), ("text", pa.string()), ("tags", pa.list_(pa.struct([("a", pa.string())])))]
)
GOOD_LINES = [
    '{"id": 1, "text": "a\u2028b\x85c"}',
    '{"text": "\\n\\u00e9", "tags": [{"a": "x"}, {}, null], "other": null}',
    '  {"id": -5, "id": 6}\r',
    "{}",
]
BAD_LINES = {
    "[1]": "it is no JSON object",
    '"text"': "it is no JSON object",
    '{"text": "a"': "it is no JSON: Expecting",
    '{"text": "a"}{"text": "b"}': "it is no JSON: Extra data",
    '{"id": "1"}': "its 'id' is \"1\", and not int64 as in the first block",
    '{"text": "\\ud800"}': "its 'text' has half of a pair of surrogates",
    '{"text": ["a", "b"]}': 'its \'text\' is ["a", "b"], and not string',
    '{"tags": [{"b": 1}]}': "its 'tags' is",
    '{"id": 1, "new": 0}': "it has 'new', which no row of the first block has",
    f'{{"id": {2**63}}}': "its 'id' is 9223372036854775808, and not int64",
    "[" * 100_000: "it is no JSON: ",
}


@settings(deadline=None)
@given(
    lines=st.lists(st.sampled_from([*GOOD_LINES, *BAD_LINES, "", " \t\r"]), max_size=8),
    block_rows=SIZES,
    bom=st.sampled_from(["", BOM]),
    has_end=st.booleans(),
)
def test_blocks_of_json_lines_are_its_lines(lines, block_rows, bom, has_end):
    content = bom + "\n".join(lines) + "\n" * has_end
    rows = [line for line in lines if line.strip()]
    fitting, unread = read(row_file("a.jsonl", content), block_rows, JSON_COLUMNS)
    good = {number: json.loads(line) for number, line in enumerate(rows) if line in GOOD_LINES}
    for number, (identity, text, tags) in fitting:
        row = good.pop(number)
        assert (identity, text) == (row.get("id"), row.get("text"))
        assert tags == ([{"a": "x"}, {"a": None}, None] if row.get("tags") else None)
    assert good == {}
    assert [number for number, *_ in unread] == [number for number, line in enumerate(rows) if line in BAD_LINES]
    for number, reason, text in unread:
        assert reason.startswith(BAD_LINES[rows[number]]) and text == rows[number].strip()
    again = read(row_file("a.jsonl.gz", gzip.compress(content.encode())), block_rows, JSON_COLUMNS)
    assert again == (fitting, unread)


def test_bytes_of_json_that_are_not_utf_8_are_told():
    _, unread = read(row_file("a.jsonl", b'{"text": "caf\xe9"}\n'), 1)
    assert unread == [(0, "it is not in UTF-8", '{"text": "caf\\xe9"}')]


def test_columns_that_were_not_chosen_may_be_whatever_they_are():
    line = '{"text": "a", "id": "1", "other": [1, "x"]}'
    assert read(row_file("a.jsonl", line), 1, only_these=True) == ([(0, ("1", "a"))], [])
    assert len(read(row_file("a.jsonl", line), 1)[1]) == 1


@settings(deadline=None)
@given(total=st.integers(0, 12), group=st.integers(1, 5), block_rows=st.integers(1, 14), piece_rows=st.integers(1, 5))
def test_blocks_of_parquet_are_its_rows_in_any_row_groups(total, group, block_rows, piece_rows):
    table = pa.table(
        {
            "id": pa.array(range(total)),
            "n.m": pa.array([{"a": [number]} for number in range(total)], pa.struct([("a", pa.list_(pa.int64()))])),
            "text": pa.array([None if number % 5 == 4 else f"t{number % 3}" for number in range(total)], pa.string()),
        }
    )
    stored = table.set_column(2, "text", table["text"].dictionary_encode())
    file = row_file("a.parquet", b"")
    pq.write_table(stored, file.path, row_group_size=group)
    (file,) = find_row_files([file.path])
    columns = table.schema.remove(0)  # without one of the columns, and with plain strings
    fitting, unread = read(file, block_rows, columns, piece_rows)
    assert (fitting, unread) == (numbered(rows_of(table.select(columns.names))), [])
    assert len(list(cut_file(file, 0, block_rows))) == max(1, -(-total // block_rows))


def test_long_texts_make_short_blocks(monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 100)
    rows = [(str(number), "x" * (60 if number == 3 else 20)) for number in range(8)]
    content = "id,text\n" + "".join(f"{number},{text}\n" for number, text in rows)
    file = row_file("a.csv", content)
    assert [block.rows for block in cut_file(file, 0, 6)] == [4, 4]
    assert read(file, 6) == (numbered(rows), [])
    table = pa.table(
        {"id": [str(number) for number in range(100)], "text": [f"{number:050}" for number in range(100)]}
    )
    pq.write_table(table, file.path + ".parquet", compression="none", use_dictionary=False)
    (file,) = find_row_files([file.path + ".parquet"])
    assert {block.rows for block in cut_file(file, 0, 50)} == {1}


def test_compressed_files_have_few_blocks(monkeypatch):
    monkeypatch.setattr(row_blocks, "GZIP_BLOCKS", 4)
    file = row_file("a.csv.gz", gzip.compress(b"id,text\n" + b"1,a\n" * 50))
    assert [block.rows for block in cut_file(file, 0, 2)] == [13, 13, 13, 11]
    assert [block.rows for block in cut_file(file, 0, 30)] == [30, 20]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.csv.gz"])
def test_a_file_without_rows_has_one_block(name):
    content = b"" if "json" in name else b"id,text\n\n\n"
    file = row_file(name, gzip.compress(content) if name.endswith("gz") else content)
    (block,) = cut_file(file, 0, 10)
    assert block.rows == 0 and list(read_block(block, STRINGS)) == []


def test_names_of_blocks_are_in_the_order_of_their_rows():
    file = row_file("a.csv", "id,text\n" + "1,a\n" * 3)
    assert [block.name for block in cut_file(file, 12, 1)] == ["00012-000000", "00012-000001", "00012-000002"]


def test_a_quotation_mark_that_is_never_closed_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("fastbert_hf.serving.row_files.LONGEST_VALUE", 200_000)
    file = row_file("a.csv", 'id,text\n1,a\n2,"' + "x" * 300_000)
    with pytest.raises(ValueError, match=r"a\.csv cannot be read, at or after its row 1: .*is a quotation mark never"):
        list(cut_file(file, 0, 1))


def test_a_compressed_file_that_is_cut_off_is_an_error():
    content = gzip.compress(os.urandom(50_000).hex().encode())
    with pytest.raises(ValueError, match="Compressed file ended before the end-of-stream marker"):
        list(cut_file(row_file("a.jsonl.gz", content[:-2000]), 0, 1))


def changed(file: RowFile) -> None:
    Path(file.path).write_text("id,text\n1,b\n2,c\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed, "cannot be read: it was changed after this run began"),
        (lambda file: os.utime(file.path, ns=(0, 0)), "cannot be read: it was changed after this run began"),
        (lambda file: os.unlink(file.path), "cannot be read: .*No such file"),
    ],
)
def test_a_file_that_changes_under_its_reader_is_not_read(change, message):
    file = row_file("a.csv", "id,text\n1,a\n2,b\n")
    (block,) = cut_file(file, 0, 5)
    change(file)
    with pytest.raises(UnreadableFile, match=message):
        list(read_block(block, STRINGS))


def test_a_file_that_changes_while_it_is_read_is_not_read():
    file = row_file("a.csv", "id,text\n1,a\n2,b\n")
    (block,) = cut_file(file, 0, 5)
    pieces = read_block(block, STRINGS, piece_rows=1)
    next(pieces)
    changed(file)
    with pytest.raises(UnreadableFile, match="it was changed after this run began"):
        list(pieces)


def test_rows_that_are_not_as_many_as_before_are_an_error():
    file = row_file("a.csv", "id,text\n1,a\n2,b\n")
    with pytest.raises(UnreadableFile, match="has 2 rows where it had 3, from row 0 on"):
        list(read_block(RowBlock(file, 0, 0, 8, 16, 0, 3), STRINGS))
