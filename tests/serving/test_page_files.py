"""Files that visitors of the page give and take: rows are answered as by the pipeline, bad ones told with reasons."""

import csv
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from fastbert_hf.serving import page_answers
from fastbert_hf.serving.loading import load_pipeline
from fastbert_hf.serving.page_actions import NONE, PageActions, Visit
from fastbert_hf.serving.page_answers import ManyTexts, joined_records, record_in_steps
from fastbert_hf.serving.page_figures import as_html, percent
from fastbert_hf.serving.page_files import label_ids, likely_columns, read_upload
from tests.serving.page_common import ASKED, TEXTS, assert_same_answers, labelled, run_file, sliders, write_file


@pytest.fixture(scope="module")
def classifier():
    return load_pipeline()


@pytest.fixture(scope="module")
def actions(classifier, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield PageActions(classifier)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_rows_of_a_file_are_answered_as_by_the_pipeline(classifier, actions, tmp_path, suffix):
    path = write_file(tmp_path / f"rows{suffix}", labelled())
    for asked in ASKED:
        visit = Visit()
        shown = run_file(actions, visit, path, sliders(actions, **asked))
        written = actions.write_answers(visit, *sliders(actions, **asked))["value"]
        rows = list(csv.DictReader(Path(written).open(newline="")))
        assert [{name: row[name] for name in ("id", "text", "label")} for row in rows] == labelled()
        expected = classifier(TEXTS, **asked)
        kinds = {"label": str, "score": float, "exit_layer": int}
        assert_same_answers(
            [{name: kind(row[f"predicted_{name}"]) for name, kind in kinds.items()} for row in rows],
            expected,
        )
        right = sum(answer["label"] == "negative" for answer in expected) / len(expected)
        layers = sum(answer["exit_layer"] for answer in expected) / len(expected)
        assert f"<b>{percent(right)}</b>" in shown and f"{layers:.2f}<i>of 6</i>" in shown
        visit.forget()
        assert not Path(written).exists()


def test_another_setting_is_replayed_and_takes_the_place_of_the_last_answers(actions, tmp_path, monkeypatch):
    path, visit = write_file(tmp_path / "rows.csv", labelled()), Visit()
    fresh = run_file(actions, Visit(), path, sliders(actions, speedup=3.0))
    run_file(actions, visit, path, sliders(actions, speed=0.2))
    first = actions.write_answers(visit, *sliders(actions, speed=0.2))["value"]
    monkeypatch.setattr(type(actions.classifier.model), "forward", None)
    shown, download = actions.move_file(visit, *sliders(actions, speedup=3.0))
    assert shown == fresh and download == {"interactive": False, "__type__": "update"}
    second = actions.write_answers(visit, *sliders(actions, speedup=3.0))["value"]
    assert Path(second).name == "answers_speedup_3.csv" and Path(second).exists() and not Path(first).exists()
    visit.forget()


def test_summary_and_curve_are_counted_from_the_answers(classifier):
    texts = [f"{text[:16]} {other[:16]}" for text in TEXTS for other in TEXTS]
    records = [record for _, record, _ in record_in_steps(classifier, texts, cut=True)]
    assert [len(record.exit_logits) for record in records] == [64, 17]
    labels = [place % 3 - 1 for place in range(len(texts))]  # -1 is not known
    many = ManyTexts(classifier, joined_records(records), labels)
    full = [answer["label"] for answer in classifier(texts, speed=0)]
    for speed, summary in many.curve[::50]:
        answers = classifier(texts, speed=speed)
        ids = [classifier.model.config.label2id[answer["label"]] for answer in answers]
        known = [own == label for own, label in zip(ids, labels, strict=True) if label >= 0]
        assert (summary.rows, summary.labelled) == (81, 54)
        assert summary.accuracy == pytest.approx(sum(known) / len(known))
        agreeing = sum(answer["label"] == label for answer, label in zip(answers, full, strict=True))
        assert summary.agreement == pytest.approx(agreeing / 81)
        layers = Counter(answer["exit_layer"] for answer in answers)
        assert summary.shares == pytest.approx([layers[layer] / 81 for layer in range(1, 7)])
        assert summary.mean_layers == pytest.approx(sum(answer["exit_layer"] for answer in answers) / 81)
    assert many.curve[0][1].speed_up == 1.0 and many.curve[-1][1].speed_up > 4
    assert many.speed_of(speed=0.3) == 0.3 and 0 < many.speed_of(speedup=3.0) < 1


def test_rows_without_an_answer_are_told_with_their_reasons(classifier, actions, tmp_path, monkeypatch):
    monkeypatch.setattr(page_answers, "TEXTS_AT_A_TIME", 1)
    path, visit = tmp_path / "rows.csv", Visit()
    path.write_bytes(
        b"text,label\nFine.,positive\n  ,positive\na,b,c\n" + b"good " * 600 + b",other\nno \xff,negative\n"
    )
    shown = run_file(actions, visit, path, sliders(actions, speed=0.3), cut=False)
    reasons = visit.file.reasons
    assert visit.file.places == [0] and sorted(reasons) == [1, 2, 3, 4]
    assert "no text in 'text'" in reasons[1] and "3 values, and the header 2" in reasons[2]
    assert reasons[3] == "602 tokens, but this model reads at most 512" and "UTF-8" in reasons[4]
    assert "4 rows without an answer" in shown and as_html(reasons[3]) in shown
    rows = list(csv.DictReader(Path(actions.write_answers(visit, *sliders(actions, speed=0.3))["value"]).open()))
    assert [bool(row["predicted_error"]) for row in rows] == [False, True, True, True, True]
    assert [row["predicted_label"] for row in rows] == [classifier("Fine.", speed=0.3)[0]["label"], "", "", "", ""]
    visit.forget()


def test_labels_that_the_model_does_not_know_do_not_count(actions, tmp_path):
    at, visit = sliders(actions, speed=0.3), Visit()
    rows = labelled()
    rows[0]["label"], rows[1]["label"] = "neutral", ""
    shown = run_file(actions, visit, write_file(tmp_path / "rows.csv", rows), at)
    assert "2 rows have no label that the model knows" in shown and "7 labels" in shown
    shown = run_file(actions, visit, tmp_path / "rows.csv", at, columns=("text", NONE, "id"))
    assert "None of the labels in &#x27;id&#x27;" in shown and "Accuracy" not in shown and "Agreement" in shown
    shown = run_file(actions, visit, tmp_path / "rows.csv", at, columns=("text", NONE, NONE))
    assert "Accuracy" not in shown
    known = {"negative": 0, "positive": 1}
    assert label_ids(["Positive", "negative ", None, "2"], known) == [1, 0, -1, -1]
    assert label_ids([1, 0, None], known) == [1, 0, -1]
    assert label_ids(["1", "0", "2"], known) == [-1, -1, -1]  # ids of other labels
    assert label_ids(["a", "A"], {"a": 0, "A": 1}) == [0, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"text\nFine.\n", r"ends with '.txt'. Give one of .csv"),
        ("rows.csv", b"", "is empty"),
        ("rows.csv", b"text,label\n", "has no rows"),
        ("rows.csv", b"text,text\na,b\n", "several columns with the name 'text'"),
        ("rows.csv", b"te\xffxt\na\n", "cannot be read as CSV: the header of it is not in UTF-8"),
        ("rows.csv", "text\nFine.\n".encode("utf-16"), "UTF-16"),
        ("rows.csv", b'text,label\n"never closed', "its first row has 1 values"),
        ("rows.jsonl", b"[1, 2]\nnothing\n", "its first row is no JSON object"),
        ("rows.parquet", b"PAR1 nothing", "cannot be read as PARQUET"),
        ("rows.csv", b"text\n" + b"x" * 10_000_001, "is larger than the 10 MB"),
    ],
)
def test_what_cannot_be_read_is_told_so(actions, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_upload(path)
    assert str(tmp_path) not in str(error.value)
    *_, shown = actions.open_file(Visit(), str(path))
    assert as_html(error.value) in shown
    *_, shown = actions.run_file(Visit(), str(path), "text", NONE, NONE, True, *sliders(actions, speed=0.3))
    assert as_html(error.value) in shown


def test_files_are_read_with_bounds(tmp_path):
    path = write_file(tmp_path / "rows.csv", labelled())
    upload = read_upload(path, most_rows=4)
    assert (len(upload.rows), upload.is_cut) == (4, True) and not read_upload(path, most_rows=9).is_cut
    bomb = tmp_path / "bomb.parquet"  # 70 MB in memory
    parquet.write_table(pa.table({"text": ["x" * 1_000_000] * 70}), bomb, compression="zstd")
    assert bomb.stat().st_size < 100_000
    with pytest.raises(ValueError, match="there is too much in it"):
        read_upload(bomb)


def test_columns_are_found_by_their_names_or_what_is_in_them(actions, tmp_path):
    path = write_file(tmp_path / "rows.jsonl", [{"Label": 1, "id": 7, "words": "a longer text"}, {"id": 8}])
    upload = read_upload(path)
    assert upload.columns == ["Label", "id", "words"] and likely_columns(upload) == ("words", None, "Label")
    visit = Visit()
    for columns, message in ((("no", NONE, NONE), "no column &#x27;no&#x27;"), ((NONE, NONE, NONE), "no column")):
        *_, shown = actions.run_file(visit, path, *columns, True, *sliders(actions, speed=0.3))
        assert message in shown and visit.file is None
    text, pair, label, run, _, shown = actions.open_file(visit, str(path))
    assert (text["value"], pair["value"], label["value"]) == ("words", NONE, "Label") and run["interactive"]
    assert "The first of 2 rows" in shown
    *_, run, _, shown = actions.open_file(visit, None)
    assert not run["interactive"] and "Give a file" in shown


def test_pairs_of_a_file_are_answered_as_pairs(classifier, actions, tmp_path):
    rows = [{"text": text, "text_pair": other} for text, other in pairwise(TEXTS)]
    path, visit = write_file(tmp_path / "rows.jsonl", [*rows, {"text": "alone"}]), Visit()
    run_file(actions, visit, path, sliders(actions, speed=0.3), columns=("text", "text_pair", NONE))
    texts = visit.file.texts
    assert_same_answers(texts.answers(texts.at(speed=0.3)), classifier(rows, speed=0.3))
    assert visit.file.reasons == {len(rows): "has no text in 'text_pair'"}
