"""Which files are meant, and which columns they have: folders, patterns, links, and what cannot be read."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert_hf.serving.row_files import (
    are_strings,
    check_can_be_written,
    columns_of,
    find_row_files,
    json_fits,
    json_type,
)


CSV = "id,text\n1,Fine.\n"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*inputs: object) -> list[str]:
    return [os.path.relpath(file.path) for file in find_row_files([*map(str, inputs)])]


def write(path: Path, content: str | bytes = CSV) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def columns(*files: Path, rows: int = 100) -> pa.Schema:
    return columns_of(find_row_files([*map(str, files)]), rows)


def test_folders_are_searched_in_the_order_of_names(here):
    for name in ("in/b.tsv", "in/a.csv", "in/deep/c.jsonl", "in/deep/D.JSON.GZ", "in/x.parquet", "in/notes.txt"):
        write(here / name)
    for name in ("in/_made.csv", "in/.hidden.csv", "in/_rejected/y.csv", "in/x.parquet.gz"):
        write(here / name)
    assert names("in") == ["in/a.csv", "in/b.tsv", "in/x.parquet", "in/deep/D.JSON.GZ", "in/deep/c.jsonl"]
    assert names("in/b*", "in")[:3] == ["in/b.tsv", "in/a.csv", "in/x.parquet"]
    assert names("in/_made.csv", "in/_*") == ["in/_made.csv", "in/_rejected/y.csv"]  # who names it means it
    (file,) = find_row_files(["in/deep/D.JSON.GZ"])
    assert (file.kind, file.is_gzip, file.size) == ("jsonl", True, len(CSV))


def test_each_file_is_there_once_through_whatever_link(here):
    write(here / "in" / "a.csv")
    (here / "in" / "again").symlink_to(here / "in", target_is_directory=True)
    (here / "link.csv").symlink_to(here / "in" / "a.csv")
    assert names("in", "in/a.csv", "link.csv", "in/../in/a.csv") == ["in/a.csv"]
    assert names("link.csv", "in") == ["link.csv"]


def test_names_with_brackets_are_names_first(here):
    write(here / "a[1].csv")
    write(here / "a1.csv")
    assert names("a[1].csv") == ["a[1].csv"]
    assert names("a[0-9].csv") == ["a1.csv"]


def test_empty_files_have_no_rows(here):
    write(here / "a.csv", "")
    write(here / "b.csv")
    assert names(".") == ["b.csv"]
    with pytest.raises(ValueError, match=r"a\.csv is empty"):
        names("a.csv")


@pytest.mark.parametrize(
    ("given_input", "message"),
    [
        ("none.csv", "there is no file or folder .*none.csv"),
        ("none/*.csv", "no file matches 'none/"),
        ("empty", "there is no file of rows below empty: their names end with .csv"),
        ("notes.txt", "notes.txt is of no kind that is known"),
        ("broken", "there is no file or folder .*broken/link.csv"),
        ("/dev/null", "/dev/null is neither a file nor a folder"),
    ],
)
def test_what_means_no_file_is_an_error(here, given_input, message):
    (here / "empty").mkdir()
    (here / "broken").mkdir()
    (here / "broken" / "link.csv").symlink_to("gone.csv")
    write(here / "notes.txt")
    with pytest.raises((ValueError, OSError), match=message):
        names(given_input)


def test_values_of_csv_and_tsv_are_strings(here):
    assert columns(write(here / "a.csv", '\ufeff"id","te""xt",\n1,2,3\n')) == pa.schema(
        [(name, pa.string()) for name in ("id", 'te"xt', "")]
    )
    assert columns(write(here / "a.tsv", '\n\n"id\ttext"\r\n')).names == ['"id', 'text"']
    assert columns(write(here / "b.csv.gz", gzip.compress(CSV.encode(), mtime=0))).names == ["id", "text"]


def test_columns_of_parquet_keep_their_types_and_forget_their_index(here):
    text = pa.array(["a", "b"]).dictionary_encode()
    table = pa.table({"text": text, "n": [{"a": [1]}, None], "nothing": pa.nulls(2)})
    pq.write_table(table.replace_schema_metadata({"pandas": "{}"}), here / "a.parquet")
    found = columns(here / "a.parquet")
    assert found.metadata is None and found.names == table.column_names
    assert found.types == [text.type, pa.struct([("a", pa.list_(pa.int64()))]), pa.string()]


def test_json_lines_may_leave_out_columns_and_disagree_in_a_row(here):
    lines = [{"n": 1, "tags": []}, {"text": 5}, {"m": {"x": None}}, {"text": "a"}, {"text": "b"}, {"n": 2.5}]
    a = write(here / "a.jsonl", "\ufeff" + "\n\nnonsense\n[1]\n".join(map(json.dumps, lines)))
    b = write(here / "b.jsonl", json.dumps({"tags": ["x"], "other": True}))
    own = {"n": pa.float64(), "tags": pa.list_(pa.string()), "text": pa.string()}
    own["m"] = pa.struct([("x", pa.string())])
    assert columns(a) == pa.schema(own)
    assert columns(b, a) == pa.schema({"tags": own["tags"], "other": pa.bool_(), **own})
    assert columns(a, rows=1) == pa.schema({"n": pa.int64(), "tags": own["tags"]})  # no other row is looked at
    assert columns(a, b, rows=1).types == [pa.int64(), own["tags"], pa.bool_()]
    assert columns(a, write(here / "c.jsonl", '{"n": 0.5}'), rows=1) == pa.schema(
        {"n": pa.float64(), "tags": own["tags"]}
    )


def test_columns_of_several_files_are_the_same_in_any_order(here):
    a, b = write(here / "a.csv"), write(here / "b.tsv", "text\tid\nFine.\t1\n")
    pq.write_table(pa.table({"text": pa.array(["x"], pa.large_string()), "id": pa.nulls(1)}), here / "c.parquet")
    assert columns(a, b, here / "c.parquet") == pa.schema([("id", pa.string()), ("text", pa.string())])
    for content, message in (
        ("text\nFine.\n", "c.csv has no column 'id', unlike .*a.csv"),
        ("id,text,more\n", "c.csv has a column 'more', too, unlike .*a.csv"),
    ):
        with pytest.raises(ValueError, match=message):
            columns(a, write(here / "c.csv", content))
    pq.write_table(pa.table({"text": ["x"], "id": [1]}), here / "d.parquet")
    with pytest.raises(ValueError, match=r"the column 'id' is int64 in .*d.parquet, but string in .*a.csv"):
        columns(a, here / "d.parquet")
    with pytest.raises(ValueError, match=r"f.jsonl has other types than the files before it: .* n "):
        columns(write(here / "e.jsonl", '{"n": 1}'), write(here / "f.jsonl", '{"n": "x"}'))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,text\n", "a.csv has several columns with the name 'text'"),
        ("a.csv", "\n\n", "a.csv has no rows and no header"),
        ("a.csv", CSV.encode("utf-16"), "a.csv is in UTF-16: convert it, as in iconv"),
        ("a.csv", b"id,caf\xe9\n", "the header of .*a.csv is not in UTF-8"),
        ("a.json", '[{"text": "a"}]', "a.json has no JSON object in its first lines"),
        ("a.json", '{\n"text": "a"\n}', "a.json has no JSON object in its first lines"),
        ("a.parquet", b"PAR1 but not really PAR1", "a.parquet cannot be read: "),
        ("a.csv.gz", CSV, "a.csv.gz cannot be read: Not a gzipped file"),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)[:12], "a.csv.gz cannot be read: Compressed file ended"),
    ],
)
def test_files_that_are_not_what_they_seem_are_errors(here, name, content, message):
    with pytest.raises(ValueError, match=message):
        columns(write(here / name, content))


def test_what_parquet_cannot_hold_is_an_error():
    check_can_be_written(pa.schema([("a", pa.string())]))
    with pytest.raises(ValueError, match=r"the column 'b' cannot be written .* with --columns"):
        check_can_be_written(pa.schema([("a", pa.string()), ("b", pa.struct([]))]))


@settings(deadline=None)
@given(st.lists(JSON, min_size=1, max_size=4))
def test_what_fits_a_type_comes_back_as_it_was(values):
    kind = json_type(values)
    fitting = [value for value in values if json_fits(value, kind)]
    found = pa.array(fitting, kind).to_pylist()
    assert all(same(value, own) for value, own in zip(fitting, found, strict=True))
    if len(set(map(type, values))) == 1 and not isinstance(values[0], (dict, list, int)):
        assert fitting == values


def same(value: object, found: object) -> bool:
    """Whether a value is the same but for keys without a value, and for whole numbers among others."""
    if isinstance(value, dict):
        own = found or {}
        return set(value) >= {name for name in own if own[name] is not None} and all(
            same(item, own.get(name)) for name, item in value.items()
        )
    if isinstance(value, list):
        return len(value) == len(found) and all(map(same, value, found))
    return value == found and isinstance(value, bool) == isinstance(found, bool)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("abc", pa.list_(pa.string())),
        (True, pa.float64()),
        (True, pa.int64()),
        ([], pa.struct([("a", pa.int64())])),
        ({"b": 1}, pa.struct([("a", pa.int64())])),
        (2**63, pa.int64()),
        (2**53 + 1, pa.float64()),
        (1.0, pa.int64()),
        ("\ud800", pa.string()),
        ([{"a": "x"}], pa.list_(pa.struct([("a", pa.int64())]))),
    ],
)
def test_what_arrow_would_change_does_not_fit(value, kind):
    assert not json_fits(value, kind)


def test_strings_are_strings_however_they_are_stored():
    assert are_strings(pa.dictionary(pa.int8(), pa.large_string())) and are_strings(pa.string_view())
    assert not are_strings(pa.binary()) and not are_strings(pa.dictionary(pa.int8(), pa.int64()))
