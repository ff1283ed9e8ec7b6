"""The command `fastbert-hf score`, with a loop in place of Ray: what is read, written, told, and refused."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fastbert_hf_cli
from fastbert_hf.serving import block_scorer
from fastbert_hf.serving.block_scorer import BlockOutcome, BlockScorer

from ..common import stock, tiny_model, tiny_texts, tiny_tokenizer


TEXTS = tiny_texts(10)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(seed=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder, and blocks that are scored here, one after the other."""

    def score_here(blocks, actors, threads, **settings) -> Iterator[BlockOutcome]:
        actor = BlockScorer(**settings)
        for number, block in enumerate(blocks):
            yield actor.outcome(number, block)

    monkeypatch.setattr(block_scorer, "score_blocks", score_here)
    monkeypatch.setattr(block_scorer, "ray_running", lambda *_: nullcontext())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def score(here, model, capsys):
    """Run the command with some words; return what it prints."""

    def run(*words: object) -> str:
        fastbert_hf_cli.main(["score", *map(str, words), "--model", str(model)])
        return capsys.readouterr().out

    return run


def rejected(output: str) -> list[tuple]:
    table = pd.read_parquet(Path(output, "_rejected"))
    return [(Path(file).name, row, reason) for file, row, reason in table.iloc[:, :3].itertuples(index=False)]


def test_files_of_every_kind_are_answered_alike(score, here):
    rows = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]
    frame = pd.DataFrame(rows)
    frame.to_csv("a.csv", index=False)
    frame.to_csv("a.tsv", index=False, sep="\t")
    frame.to_parquet("a.parquet", row_group_size=4)
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("a.csv.gz").write_bytes(gzip.compress(Path("a.csv").read_bytes()))
    answers = []
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz"):
        told = score(name, f"out-{name}", "--speed", 0.7, "--block-rows", 3)
        assert f"Rows: 10. Answered: 10, in {here / f'out-{name}'}. Rejected: 0." in told
        assert len(list(Path(f"out-{name}").glob("part-00000-*"))) == 4
        answers.append(pd.read_parquet(f"out-{name}"))
    for table in answers:
        assert table[["id", "text"]].to_dict("records") == rows
        assert table["label"].tolist() == answers[0]["label"].tolist()
        assert table["exit_layer"].tolist() == answers[0]["exit_layer"].tolist()
        np.testing.assert_allclose(table["score"], answers[0]["score"], atol=1e-5)
    assert answers[0]["exit_layer"].nunique() > 1
    score("?.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz", "out", "--block-rows", 3)
    assert len(pd.read_parquet("out")) == 50


def test_columns_are_kept_left_out_and_named(score):
    Path("a.jsonl").write_text('{"label": 1, "a": "word5", "b": "word6", "n": {"x": [1]}}\n{"a": "word5", "new": 0}\n')
    texts = ("--text-column", "a", "--text-pair-column", "b")
    score("a.jsonl", "out1", *texts, "--prefix", "p_", "--block-rows", 1)
    table = pd.read_parquet("out1")
    assert table.columns.tolist() == ["label", "a", "b", "n", "p_label", "p_score", "p_exit_layer"]
    assert rejected("out1") == [
        ("a.jsonl", 1, "it has 'new', which no row of the first block has: name those to keep, with --columns")
    ]
    score("a.jsonl", "out2", *texts, "--columns", "n,b", "--block-rows", 1)
    assert pd.read_parquet("out2").columns.tolist() == ["b", "n", "label", "score", "exit_layer"]
    assert rejected("out2") == [("a.jsonl", 1, "it has no second text")]
    score("a.jsonl", "out3", *texts[:2], "--columns", "")
    assert pd.read_parquet("out3").columns.tolist() == ["label", "score", "exit_layer"]


def test_parquet_columns_come_out_as_they_went_in(score):
    table = pa.table(
        {
            "text": pa.array([*TEXTS[:2], None]).dictionary_encode(),
            "a.b": pa.array([{"x": [1, None]}, None, {"x": []}]),
            "when": pa.array([0, 1, 2], pa.timestamp("us")),
            "long": pa.array(["a", None, "c"], pa.large_string()),
        }
    )
    pq.write_table(table.replace_schema_metadata({"pandas": "{}"}), "a.parquet", row_group_size=2)
    score("a.parquet", "out", "--block-rows", 2)
    found = pq.read_table("out")
    assert found.select(table.column_names).cast(table.schema).equals(table.slice(0, 2))
    assert [found.schema.field(name).type for name in table.column_names] == table.schema.types
    assert rejected("out") == [("a.parquet", 2, "it has no text")]


def test_long_texts_are_errors_unless_they_are_cut(score):
    Path("a.csv").write_text("text\n" + "word7 " * 70 + "\n")
    assert "Answered: 0" in score("a.csv", "out1")
    assert "the text has 72 tokens, but this model reads at most 64" in rejected("out1")[0][2]
    assert "Answered: 1" in score("a.csv", "out2", "--truncate")
    assert "Answered: 1" in score("a.csv", "out3", "--max-length", 8)


def test_what_is_not_finished_is_done_by_the_same_command(score):
    for name in ("a.csv", "b.csv"):
        Path(name).write_text("text\n" + "word5\n" * 4 + "\n,\n")
    words = ("a.csv", "b.csv", "out", "--block-rows", 2)
    assert "Rows: 10. Answered: 8" in score(*words)
    kept = {path: path.stat().st_mtime_ns for path in Path("out").glob("part-00000-*")}
    for path in Path("out").glob("part-00001-*"):
        path.unlink()
    told = score(*words)
    assert "Rows: 10. Answered: 8" in told and "This run: 5 rows" in told
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert "This run" not in score(*words)
    part = Path("out", "part-00000-000000.parquet")
    lost = pq.read_table(part).slice(1)
    metadata = pq.read_metadata(part).metadata
    pq.write_table(lost.replace_schema_metadata(metadata), part)  # a row of it is lost
    told = score(*words)
    assert "Rows: 10. Answered: 8" in told and "This run: 2 rows" in told


def test_rejected_rows_are_in_the_order_of_the_file(score):
    Path("a.jsonl").write_text('{"text": null}\nnonsense\n{"text": null}\n{"text": "word5"}\n{"text": 1}\n')
    score("a.jsonl", "out")
    assert [row for _, row, _ in rejected("out")] == [0, 1, 2, 4]
    assert pd.read_parquet("out/_rejected")["text"].tolist()[1::2] == ["nonsense", '{"text": 1}']


def test_a_file_that_vanishes_leaves_the_others_and_is_told(score, monkeypatch):
    for name in ("a.csv", "b.csv", "c.csv"):
        Path(name).write_text("text\nword5\n")
    outcome = BlockScorer.outcome

    def outcome_without_b(*arguments):
        Path("b.csv").unlink(missing_ok=True)
        return outcome(*arguments)

    monkeypatch.setattr(BlockScorer, "outcome", outcome_without_b)
    with pytest.raises(
        SystemExit, match=r"1 of 3 blocks have no answers: .*b\.csv cannot be read: .*No such file.*put"
    ):
        score(".".join("abc"[0:1]) + ".csv", "b.csv", "c.csv", "out")
    assert len(list(Path("out").glob("part-*"))) == 2
    monkeypatch.undo()


def test_what_ends_all_blocks_ends_the_run_in_one_line(score, model):
    Path("a.csv").write_text("text\nword5\n")
    (Path("broken")).mkdir()
    shutil.copy(model / "config.json", "broken")
    with pytest.raises(SystemExit) as error:
        fastbert_hf_cli.main(["score", "a.csv", "out", "--model", "broken"])
    assert "\n" not in str(error.value) and "what is finished stays" in str(error.value)


def test_ctrl_c_tells_how_to_go_on(score, monkeypatch, capsys):
    def interrupted(*_, **settings):
        raise KeyboardInterrupt
        yield

    Path("a.csv").write_text("text\nword5\n")
    monkeypatch.setattr(block_scorer, "score_blocks", interrupted)
    monkeypatch.setattr("sys.argv", ["/bin/fastbert-hf", "score", "a b.csv", "out"])
    with pytest.raises(SystemExit) as error:
        score("a.csv", "out")
    assert error.value.code == 130
    assert capsys.readouterr().err.endswith(
        "stopped; what is finished stays, and the same command goes on from there: fastbert-hf score 'a b.csv' out\n"
    )


def error_of(*words: object) -> str:
    with pytest.raises(SystemExit) as error:
        fastbert_hf_cli.main(["score", *map(str, words)])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.csv", "out"], "there is no file or folder .*none.csv"),
        (["a.csv", "a.csv"], "the output a.csv is a file: choose a folder"),
        ([".", "out"], "the output out is inside the input .: choose a folder beside it"),
        (["full*", "full"], "the input .*y.csv is inside the output full: choose another folder"),
        (["a.csv", "out", "--actors", "0"], "--actors must be at least 1, got 0"),
        (["a.csv", "out", "--model", "no/such"], "the model no/such cannot be loaded: "),
        (["a.csv", "out", "--model", "stock"], "stock is a model of type 'bert', not one of FastBERT: wrap it"),
        (["a.csv", "out", "--speed", "2"], r"speed must be a number in \[0, 1\], got 2.0"),
        (["a.csv", "out", "--speedup", "50"], "speedup must be a number from 1 to 5.77"),
        (["a.csv", "out", "--max-disagreement", "1e-6"], "max_disagreement=1e-06 cannot be certified"),
        (["a.csv", "out", "--text-column", "txt"], "there is no column 'txt', only id, text: correct --text-column"),
        (["a.csv", "out", "--text-pair-column", "b"], "there is no column 'b', only id, text: correct --text-pair-c"),
        (["a.csv", "out", "--columns", "id,n"], "there is no column 'n', only id, text: correct --columns"),
        (["label.csv", "out"], "there is a column 'label' already, .* with --prefix predicted_"),
        (["n.jsonl", "out"], "the column 'text' is int64, not strings: correct --text-column, or convert it"),
        (["a.csv", "label.csv", "out"], "label.csv has no column 'id', unlike .*a.csv"),
        (["a.csv", "full"], "full has other files, such as x: choose a folder that is new or empty"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_before_any_work(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("id,text\n1,Fine.\n")
    Path("label.csv").write_text("label,text\n1,Fine.\n")
    Path("n.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "full").mkdir()
    for name in ("x", "y.csv"):
        (tmp_path / "full" / name).write_text("text")
    stock().config.save_pretrained("stock")
    assert re.search(message, error_of(*words))
    assert not list(tmp_path.rglob("_score.json"))


def test_another_model_or_another_input_is_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr("fastbert_hf.commands.score.score", lambda *_: None)
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    Path(tmp_path, "a.csv").write_text("id,text\n1,Fine.\n")
    words = [tmp_path / "a.csv", tmp_path / "out", "--model", model]
    fastbert_hf_cli.main(["score", *map(str, words)])
    fastbert_hf_cli.main(["score", *map(str, words), "--actors", "3"])
    assert "was begun with speed=None, and now it is 0.1: put that back" in error_of(*words, "--speed", "0.1")
    tiny_model(seed=1).save_pretrained(model)
    assert "was begun with model_files='" in error_of(*words)
    Path(tmp_path, "a.csv").write_text("id,text\n1,Other.\n")
    tiny_model().save_pretrained(model)
    assert "a.csv was changed: put that back to go on, or choose another folder" in error_of(*words)
