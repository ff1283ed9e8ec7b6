"""The folder of a scoring: parts that are whole or not there, and what may go on in it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastbert_hf.serving.row_blocks import UnreadRow
from fastbert_hf.serving.scored_parts import PartCounts, PartFolder


COLUMNS = pa.schema([("text", pa.string()), ("exit_layer", pa.int64())])
SETTINGS = {"speed": 0.5, "columns": ["text"], "inputs": {"/a.csv": {"size": 3}, "/b.csv": {"size": 4}}}


def table(*texts: str) -> pa.Table:
    return pa.table({"text": pa.array(texts, pa.string()), "exit_layer": pa.array([2] * len(texts), pa.int64())})


def pieces(*sizes: tuple[int, int]):
    """Pieces of so many answered and so many other rows."""
    for answered, others in sizes:
        rows = [UnreadRow(number, "why", "a") for number in range(others)]
        yield table(*map(str, range(answered))), rows, 2 * answered


@pytest.fixture
def folder(tmp_path) -> PartFolder:
    folder = PartFolder(tmp_path / "new" / "out")
    with folder.locked():
        folder.begin(SETTINGS)
    return folder


def files(folder: PartFolder) -> set[str]:
    paths = (path for path in folder.path.rglob("*") if path.is_file())
    return {str(path.relative_to(folder.path)) for path in paths} - {".lock", "_score.json"}


def test_a_part_has_the_answered_rows_and_its_twin_the_others(folder):
    assert folder.counts("0-0") is None
    assert folder.write("0-0", COLUMNS, "/a.csv", pieces((3, 0), (0, 1), (2, 2))) == PartCounts(5, 3, 10)
    assert folder.write("0-1", COLUMNS, "/a.csv", pieces()) == PartCounts(0, 0, 0)
    assert files(folder) == {"part-0-0.parquet", "part-0-1.parquet", "_rejected/part-0-0.parquet"}
    assert folder.counts("0-0") == PartCounts(5, 3, 10) and folder.counts("0-1") == PartCounts(0, 0, 0)
    assert pq.read_schema(folder.part("0-1")).names == COLUMNS.names
    assert pd.read_parquet(folder.path)["text"].tolist() == ["0", "1", "2", "0", "1"]  # of the answered rows alone
    rejected = pd.read_parquet(folder.rejected_folder)
    assert rejected.to_dict("list") == {
        "file": ["/a.csv"] * 3,
        "row": [0, 0, 1],
        "reason": ["why"] * 3,
        "text": ["a"] * 3,
    }


def test_a_part_is_there_last_or_not_at_all(folder, monkeypatch):
    def failing():
        yield from pieces((1, 1))
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        folder.write("0-0", COLUMNS, "/a.csv", failing())
    assert files(folder) == set() and folder.counts("0-0") is None
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b)), replace(a, b)))
    folder.write("0-0", COLUMNS, "/a.csv", pieces((1, 1)))
    assert moved == [folder.rejected("0-0"), folder.part("0-0")]


def test_a_block_that_is_done_again_has_no_rejected_rows_of_before(folder):
    folder.write("0-0", COLUMNS, "/a.csv", pieces((1, 1)))
    assert folder.write("0-0", COLUMNS, "/a.csv", pieces((2, 0))) == folder.counts("0-0") == PartCounts(2, 0, 4)


def test_a_part_that_lost_its_end_is_not_finished(folder):
    folder.write("0-0", COLUMNS, "/a.csv", pieces((1, 0)))
    folder.part("0-0").write_bytes(folder.part("0-0").read_bytes()[:-1])
    assert folder.counts("0-0") is None


def test_what_a_killed_run_left_is_removed(folder):
    for name in (".part-0-0.parquet.host.1", ".part-0-0.tries", "_rejected/.part-0-0.parquet.host.1"):
        (folder.path / name).write_text("")
    folder.write("0-1", COLUMNS, "/a.csv", pieces((1, 1)))
    folder.begin(SETTINGS)
    assert files(folder) == {"part-0-1.parquet", "_rejected/part-0-1.parquet"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 0.6}, "was begun with speed=0.5, and now it is 0.6: put that back to go on, or choose"),
        ({"columns": ["text", "id"]}, r"was begun with columns=\['text'\], and now it is \['text', 'id'\]"),
        ({"new": 1}, "was begun with new=None, and now it is 1"),
        ({"inputs": {"/a.csv": {"size": 3}}}, "was begun with /b.csv, which is not among the inputs now"),
        ({"inputs": {**SETTINGS["inputs"], "/c": {}}}, "was begun without /c, which is among the inputs now"),
        ({"inputs": {**SETTINGS["inputs"], "/b.csv": {"size": 5}}}, "was begun before /b.csv was changed"),
        ({"inputs": dict(reversed(SETTINGS["inputs"].items()))}, "was begun with its inputs in another order"),
    ],
)
def test_other_settings_or_inputs_are_refused(folder, change, message):
    folder.begin(json.loads(json.dumps(SETTINGS)))
    with pytest.raises(ValueError, match=message):
        folder.begin({**SETTINGS, **change})


def test_a_folder_with_something_else_in_it_is_refused(folder, tmp_path):
    (tmp_path / "letter.txt").write_text("")
    with pytest.raises(ValueError, match=r"has other files, such as letter\.txt: choose a folder that is new"):
        PartFolder(tmp_path).begin(SETTINGS)
    (folder.path / "_score.json").write_text("{")
    with pytest.raises(ValueError, match=r"_score\.json cannot be read"):
        folder.begin(SETTINGS)


def test_two_runs_do_not_write_to_one_folder(folder):
    with folder.locked():
        with pytest.raises(ValueError, match=r"another run is writing to .*out: wait for it, or end it"):
            with PartFolder(folder.path).locked():
                pass
    with PartFolder(folder.path).locked():
        pass
