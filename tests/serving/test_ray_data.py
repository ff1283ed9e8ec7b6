"""Rows by the batch and by the file: each is answered as the pipeline answers it, or rejected, once, whatever dies."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pytest
import torch
from transformers import pipeline

import fastbert_hf_cli
from fastbert_hf import CascadeForSequenceClassification
from fastbert_hf.serving.block_scorer import MOST_TRIES, BlockScorer
from fastbert_hf.serving.ray_cluster import start_ray
from fastbert_hf.serving.ray_data import FastTextScorer
from fastbert_hf.serving.row_blocks import cut_file
from fastbert_hf.serving.row_files import find_row_files
from fastbert_hf.serving.scored_parts import PartFolder

from ..common import stock, tiny_model, tiny_texts, tiny_tokenizer


TEXTS = [
    "A delight from start to finish.",
    "Dull,\nand far too long.",
    "",
    "Nothing about it is bad.",
    "Fine: \u2028 \u00e9.",
]
TEXTS += [f"The {word} was not what I had hoped for." for word in ("plot", "music", "end", "cast", "light", "sound")]
ANSWERS = ["label", "score", "exit_layer"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")

ROWS, BLOCK_ROWS = 840, 20
WORKER = "BlockScorer"


@pytest.fixture(scope="module")
def classifier():
    return pipeline("fast-text-classification", speed=0.5)


@pytest.fixture(scope="module")
def expected(classifier) -> dict[str, tuple]:
    """What the pipeline answers, by the text."""
    return {text: tuple(answer.values()) for text, answer in zip(TEXTS, classifier(TEXTS), strict=True)}


@pytest.fixture(scope="module")
def scorer() -> FastTextScorer:
    return FastTextScorer(speed=0.5)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cascade")
    CascadeForSequenceClassification.from_members([stock("bert", 1, 1), stock("electra", 2, 2)]).save_pretrained(
        folder
    )
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ray():
    start_ray(2)
    module = importlib.import_module("ray")
    yield module
    module.shutdown()


def assert_answered(text: str, answer: tuple, expected: dict[str, tuple]) -> None:
    label, score, exit_layer = answer
    assert (label, exit_layer) == (expected[text][0], expected[text][2])
    assert score == pytest.approx(expected[text][1], abs=1e-5)


# Batches


def test_a_table_keeps_its_columns_and_gets_the_answers_of_the_pipeline(scorer, expected):
    table = pa.table({"n": range(len(TEXTS)), "text": pa.array(TEXTS, pa.large_string()).dictionary_encode()})
    answered = scorer(table)
    assert answered.column_names == ["n", "text", *ANSWERS, "error"]
    assert answered.select(["n", "text"]) == table and answered["error"].null_count == len(TEXTS)
    for text, *answer in zip(TEXTS, *(answered[name].to_pylist() for name in ANSWERS), strict=True):
        assert_answered(text, tuple(answer), expected)


@pytest.mark.parametrize("texts", [np.array(TEXTS), np.array([None, *TEXTS, math.nan], dtype=object)])
def test_arrays_of_numpy_are_answered_alike(scorer, expected, texts):
    batch = {"text": texts, "n": np.arange(len(texts))}
    answered = scorer(batch)
    assert list(answered) == ["text", "n", *ANSWERS, "error"] and answered["n"] is batch["n"]
    for text, *answer, error in zip(texts, *(answered[name].to_pylist() for name in [*ANSWERS, "error"]), strict=True):
        if isinstance(text, str):
            assert error is None
            assert_answered(text, tuple(answer), expected)
        else:
            assert error == "it has no text" and answer == [None] * 3


def test_a_row_without_an_answer_tells_why_and_changes_no_other(scorer, expected):
    bad = {
        5: "its text is no string, but int (5)",
        "word " * 600: "the text has 602 tokens, but this model reads at most 512",
        "half \ud800": "character 5 is half of a pair of surrogates",
        b"bytes": "its text is no string, but bytes",
        ("a", "b"): "its text is no string, but tuple",
    }
    mixed = [text for pair in zip(bad, TEXTS, strict=False) for text in pair]
    found = scorer.answers(mixed).to_pylist()
    for text, answer in zip(mixed, found, strict=True):
        if text in bad:
            assert answer.pop("error").startswith(bad[text]) and set(answer.values()) == {None}
        else:
            assert_answered(text, tuple(answer[name] for name in ANSWERS), expected)


def test_bytes_of_a_table_that_are_not_utf_8_are_an_error_of_their_row(scorer):
    texts = pa.array([b"Fine.", b"caf\xe9", None])
    broken = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    errors = scorer(pa.table({"text": broken}))["error"].to_pylist()
    assert errors[0] is None and "half of a pair" in errors[1] and errors[2] == "it has no text"


def test_pairs_need_both_texts(classifier):
    scorer = FastTextScorer(text_pair_column="b", prefix="p_", speed=0.5)
    table = pa.table({"text": ["A man eats.", None, "x", "y"], "b": ["He eats.", "z", None, ""]})
    found = scorer(table).to_pylist()
    assert [row["p_error"] for row in found] == [None, "it has no text", "it has no second text", None]
    for row in (found[0], found[3]):
        (answer,) = classifier([{"text": row["text"], "text_pair": row["b"]}])
        assert row["p_label"] == answer["label"] and row["p_score"] == pytest.approx(answer["score"], abs=1e-5)
    assert scorer(table.slice(0, 0)).column_names == ["text", "b", "p_label", "p_score", "p_exit_layer", "p_error"]


def test_a_cascade_tells_which_member_answered(cascade):
    scorer = FastTextScorer(cascade, speed=0.7)
    texts = tiny_texts(12)
    found = scorer.answers([None, *texts])
    members = [answer["exit_member"] for answer in scorer.pipeline(texts)]
    assert found["exit_member"].to_pylist() == [None, *members] and set(members) == {1, 2}


def test_logits_that_are_no_numbers_are_errors(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        next(model.teacher.parameters()).fill_(math.nan)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = FastTextScorer(tmp_path, speed=0.0)({"text": np.array(["word5", "word6"])})
    assert all("the logits of the text are not finite" in error for error in found["error"].to_pylist())
    assert found["label"].to_pylist() == [None, None]


def test_names_that_would_be_there_twice_or_are_not_there_are_errors(scorer):
    with pytest.raises(ValueError, match=r"there is a column 'label' already, .* with prefix='predicted_'"):
        scorer({"text": np.array(["a"]), "label": np.array([1])})
    with pytest.raises(ValueError, match="the batch has no column 'text', only a, b: correct text_column"):
        scorer(pa.table({"a": [1], "b": [2]}))
    with pytest.raises(ValueError, match="every row has one answer, or its error: leave out top_k"):
        FastTextScorer(top_k=2)


def test_actors_of_ray_data_answer_batches(ray, expected):
    rows = [{"n": number, "text": TEXTS[number % len(TEXTS)] if number % 13 else None} for number in range(60)]
    answered = ray.data.from_items(rows, override_num_blocks=3).map_batches(
        FastTextScorer,
        fn_constructor_kwargs={"speed": 0.5},
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        batch_size=16,
    )
    found = answered.take_all()
    assert sorted(row["n"] for row in found) == list(range(60))
    for row in found:
        if row["n"] % 13:
            assert row["error"] is None
            assert_answered(rows[row["n"]]["text"], tuple(row[name] for name in ANSWERS), expected)
        else:
            assert row["error"] == "it has no text" and row["exit_layer"] is None


# Blocks


@pytest.fixture
def block_scorer(tmp_path, scorer):
    """What an actor does, here, and the blocks of a file."""
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,Fine.\n2\n3,Dull.\n")
    files = find_row_files([str(path)])
    folder = PartFolder(tmp_path / "out")
    with folder.locked():
        folder.begin({})
    columns = pa.schema([("id", pa.string()), ("text", pa.string())])
    actor = BlockScorer(str(folder.path), columns, columns.remove(1), False, 10, {"speed": 0.5})
    actor.scorer = scorer
    return actor, list(cut_file(files[0], 0, 2)), folder


def test_a_file_that_is_gone_is_told_and_ends_nothing_else(block_scorer):
    actor, (first, second), folder = block_scorer
    outcome = actor.outcome(7, first)
    assert (outcome.block, outcome.rows, outcome.rejected, outcome.error) == (7, 1, 1, "") and outcome.memory > 2**20
    os.unlink(first.file.path)
    outcome = actor.outcome(8, second)
    assert "No such file" in outcome.error and not outcome.is_fatal
    assert folder.counts(first.name) is not None and folder.counts(second.name) is None
    assert not list(folder.path.glob(".part-*"))


def test_what_is_wrong_with_the_model_or_the_disk_would_be_so_for_every_block(block_scorer, monkeypatch):
    actor, (first, _), folder = block_scorer
    monkeypatch.setattr(folder.__class__, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    outcome = actor.outcome(0, first)
    assert outcome.is_fatal and outcome.error == "[Errno 28] No space left"
    actor.scorer, actor.scorer_settings = None, {"model": str(folder.path)}
    assert actor.outcome(0, first).is_fatal


def test_a_block_that_ends_its_process_again_and_again_ends_the_run(block_scorer):
    actor, (first, _), folder = block_scorer
    for _ in range(MOST_TRIES):
        actor.count_try(first)  # and then the process is gone
    outcome = actor.outcome(0, first)
    assert outcome.is_fatal and "from 0 on ended their process 3 times" in outcome.error
    folder.begin({})  # of the next run
    assert actor.outcome(0, first).rows == 1


# The command


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with rows of two kinds, of which every 50th is bad."""
    folder = tmp_path_factory.mktemp("in")
    rows = [(str(number), TEXTS[number % len(TEXTS)]) for number in range(ROWS)]
    with (folder / "a.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "text"])
        table.writerows(row if int(row[0]) % 50 else row[:1] for row in rows[: ROWS // 2])
    with (folder / "b.jsonl").open("w") as file:
        for identity, text in rows[ROWS // 2 :]:
            file.write(json.dumps({"text": text if int(identity) % 50 else None, "id": identity}) + "\n")
    return folder


def parts_of(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}


def wait_for(condition, seconds: float = 180.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)
    return found


def workers(process: psutil.Process) -> list[psutil.Process]:
    """Return the actors below a process."""
    found = []
    for child in process.children(recursive=True):
        try:
            found += [child] if WORKER in " ".join(child.cmdline()) else []
        except psutil.NoSuchProcess:
            pass
    return found


def test_a_run_goes_on_when_its_driver_and_then_an_actor_are_killed(ray, inputs, expected, tmp_path, capsys):
    output = tmp_path / "out"
    words = ["score", str(inputs), str(output), "--speed", "0.5", "--block-rows", str(BLOCK_ROWS)]
    driver = subprocess.Popen([sys.executable, "-m", "fastbert_hf_cli", *words], stderr=subprocess.DEVNULL)
    wait_for(lambda: len(parts_of(output)) >= 3)
    assert driver.poll() is None
    actors = workers(psutil.Process(driver.pid))
    driver.kill()
    driver.wait()
    assert len(actors) == 1
    assert psutil.wait_procs(actors, timeout=20)[1] == []  # they end with it
    before = parts_of(output)
    assert 3 <= len(before) < ROWS // BLOCK_ROWS

    killed = []

    def kill_an_actor():
        wait_for(lambda: len(parts_of(output)) > len(before))
        killed.append(workers(psutil.Process())[0])
        killed[0].kill()

    killer = threading.Thread(target=kill_an_actor)
    killer.start()
    fastbert_hf_cli.main([*words, "--actors", "2"])
    killer.join()
    assert len(killed) == 1
    printed = capsys.readouterr().out
    rejected = [number for number in range(ROWS) if number % 50 == 0]
    assert f"Rows: {ROWS}. Answered: {ROWS - len(rejected)}, in {output}. Rejected: {len(rejected)}, in" in printed
    assert 0 < int(re.search(r"This run: (\d+) rows", printed)[1]) <= ROWS - 3 * BLOCK_ROWS + 1
    assert parts_of(output).items() >= before.items()  # none was done again

    table = pd.read_parquet(output)
    assert table.columns.tolist() == ["id", "text", *ANSWERS]
    assert table["id"].tolist() == [str(number) for number in range(ROWS) if number not in rejected]
    for row in table.itertuples(index=False):
        assert row.text == TEXTS[int(row.id) % len(TEXTS)]
        assert_answered(row.text, row[2:], expected)
    assert f"Exit layer: {table['exit_layer'].mean():.2f} on average." in printed
    others = pd.read_parquet(output / "_rejected")
    assert [Path(file).name for file in others["file"]] == ["a.csv"] * 9 + ["b.jsonl"] * 8
    assert others["row"].tolist() == [number % (ROWS // 2) for number in rejected]
    assert set(others["reason"]) == {"it has 1 fields, and the header has 2", "it has no text"}

    fastbert_hf_cli.main(words)  # nothing is left to do
    assert "This run" not in capsys.readouterr().out and parts_of(output).items() >= before.items()


WITHOUT_EXTRA = """
import sys
import fastbert_hf.serving
print([name for name in ("ray", "pyarrow") if name in sys.modules])
sys.modules["pyarrow"] = None
try:
    import fastbert_hf.serving.ray_data
except ImportError as error:
    print(error)
"""


def test_ray_and_arrow_are_needed_by_those_alone_who_score_tables():
    outcome = subprocess.run([sys.executable, "-c", WITHOUT_EXTRA], capture_output=True, text=True)
    assert outcome.stdout.splitlines() == [
        "[]",
        'fastbert_hf.serving.ray_data needs its extra: pip install "fastbert-hf[ray]"',
    ]
