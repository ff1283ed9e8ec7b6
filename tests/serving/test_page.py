"""What the page shows, without a browser: answers are the pipeline's, and what others write stays text."""

import argparse
import copy
import csv
import io
import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
import transformers
from pyarrow import parquet
from transformers import pipeline

from fastbert_hf import CascadeForSequenceClassification
from fastbert_hf.commands import demo
from fastbert_hf.serving import page as page_module
from fastbert_hf.serving.loading import load_pipeline
from fastbert_hf.serving.page import EXAMPLES, build_page
from fastbert_hf.serving.page_actions import MOST_CHARACTERS, NONE, PageActions, Visit
from fastbert_hf.serving.page_answers import ManyTexts, OneText, joined_records, record_in_steps
from fastbert_hf.serving.page_dials import page_dials
from fastbert_hf.serving.page_figures import as_html, many_texts_figure, one_text_figure, percent, table
from fastbert_hf.serving.page_files import answered_csv, label_ids, likely_columns, read_upload
from tests.common import tiny_model, tiny_texts, tiny_tokenizer


ROOT = Path(__file__).parents[2]
TEXT = "The plot is thin, but the cast makes it a joy."
TEXTS = [*EXAMPLES, "Fine.", "a " * 40, "What a waste.", "I would see it again, and again."]
HOSTILE = '<img src=x onerror="window.hit=1"> ${alert(1)} {{constructor}} `id` [a](http://evil.example) \x1b[31m'
ASKED = ({"speed": 0.0}, {"speed": 0.3}, {"speed": 1.0}, {"speedup": 2.5}, {"max_disagreement": 0.02})


@pytest.fixture(scope="module")
def classifier():
    return load_pipeline()


@pytest.fixture(scope="module")
def actions(classifier):
    return PageActions(classifier)


def tiny_classifier(num_labels=3, **config):
    model = tiny_model("bert", num_labels=num_labels, **config)
    return pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer())


def tiny_cascade():
    members = [tiny_model("bert", seed=1, min_exit_layer=4), tiny_model("bert", seed=2)]
    cascade = CascadeForSequenceClassification.from_members(members, tokenizers=[tiny_tokenizer()])
    return pipeline("fast-text-classification", model=cascade, tokenizer=tiny_tokenizer())


def assert_same_answers(found, expected):
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert {**own, "score": None} == {**other, "score": None}
        assert own["score"] == pytest.approx(other["score"], abs=1e-5)


def sliders(actions, **asked):
    """Return what the page sends where a dial is set so: its title, and the values of all sliders."""
    ((name, value),) = asked.items()
    values = [value / dial.unit if dial.name == name else dial.value for dial in actions.dials]
    (title,) = (dial.title for dial in actions.dials if dial.name == name)
    return title, *values


# One text


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_answers_to_a_text_are_those_of_the_pipeline(classifier, asked):
    for text in TEXTS:
        assert_same_answers([OneText(classifier, text).answer(**asked).told], classifier(text, **asked))


@pytest.mark.parametrize("make", [tiny_cascade, lambda: tiny_classifier(min_exit_layer=2, max_layers=3)])
def test_answers_are_those_of_a_cascade_and_within_the_limits_of_a_config(make):
    classifier = make()
    for text in tiny_texts(6):
        one = OneText(classifier, text)
        for speed in (0.0, 0.4, 0.7, 0.95):
            answer = one.answer(speed=speed)
            assert_same_answers([answer.told], classifier([text], speed=speed))
            fates = Counter(said.fate for said in answer.exits)
            assert fates["left"] == 1
            assert fates["left"] + fates["went on"] + fates["not asked"] == answer.told["exit_layer"]


def test_pairs_are_answered_as_pairs(classifier):
    pair = {"text": "A man eats.", "text_pair": "Someone eats."}
    assert_same_answers([OneText(classifier, **pair).answer(speed=0.3).told], classifier([pair], speed=0.3))
    assert OneText(classifier, **pair).encoded != OneText(classifier, pair["text"]).encoded


def test_every_exit_tells_what_it_says_and_what_became_of_the_text(classifier):
    model = classifier.model
    logits = model(**classifier.tokenizer(TEXT, return_tensors="pt"), output_exit_logits=True).exit_logits[0]
    one = OneText(classifier, TEXT)
    answer = one.answer(speed=0.49)
    assert [said.fate for said in answer.exits] == ["went on", "went on", "left", "not run", "not run", "not run"]
    torch.testing.assert_close(torch.tensor([said.probabilities for said in answer.exits]), logits.softmax(-1))
    assert max(answer.taken.probabilities) == answer.told["score"]
    assert answer.taken.uncertainty < 0.49 <= min(said.uncertainty for said in answer.exits[:2])
    # Three of six layers, and three exits.
    assert 0.4 < answer.flops_saved < 0.5
    full = one.answer(speed=0.0)
    assert [said.fate for said in full.exits] == ["not asked"] * 5 + ["left"]
    assert full.flops_saved == 0


def test_a_slider_is_moved_without_the_model(classifier, actions, monkeypatch):
    visit, shown = Visit(), {}
    for asked in ASKED:
        shown[str(asked)], _ = actions.read_text(visit, TEXT, "", False, *sliders(actions, **asked))
    monkeypatch.setattr(type(classifier.model), "forward", None)
    for asked in ASKED:
        assert actions.move(visit, *sliders(actions, **asked)) == shown[str(asked)]
    assert len(set(shown.values())) >= 4


def test_times_are_measured_once_for_all_settings_that_run_the_same_layers(actions, monkeypatch):
    visit, at = Visit(), lambda speed: sliders(actions, speed=speed)
    waiting, _ = actions.read_text(visit, TEXT, "", False, *at(0.49))
    assert "being measured" in waiting
    measured = actions.measure(visit)
    assert "being measured" not in measured and "&nbsp;ms at speed 0" in measured
    own, full = visit.text.seconds[visit.text.answer(speed=0.49).path]
    assert 0 < own < full * 3
    # Speed 0.5 leaves at the same layer.
    assert "being measured" not in actions.move(visit, *at(0.5))
    assert "being measured" in actions.move(visit, *at(0.0))
    # Who has gone on to another text meanwhile is not shown the old one again.
    old, measure = visit.text, OneText.measure
    monkeypatch.setattr(OneText, "measure", lambda self, *path, **asked: setattr(visit, "text", None))
    assert visit.text is old and "fb" not in str(actions.measure(visit)) and measure is not OneText.measure


def test_a_text_that_is_too_long_may_be_cut(classifier, actions):
    long, at = "good " * 600, sliders(actions, speed=0.3)
    visit = Visit()
    shown, cut = actions.read_text(visit, long, "", False, *at)
    assert "602 tokens" in shown and "at most 512" in shown and cut["visible"] and visit.text is None
    actions.read_text(visit, long, "", True, *at)
    assert_same_answers([visit.text.answer(speed=0.3).told], classifier(long, speed=0.3, truncation=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [("  \n", "Type a text"), ("x" * (MOST_CHARACTERS + 1), "20,001 characters"), ("\ud800 joy", "half of a pair")],
)
def test_what_is_no_text_is_told_so(actions, text, message):
    visit = Visit()
    shown, _ = actions.read_text(visit, text, "", False, *sliders(actions, speed=0.3))
    assert message in shown and visit.text is None
    assert "Type a text" in actions.move(visit, *sliders(actions, speed=0.3))


def test_sessions_of_visitors_are_apart(actions):
    first = Visit()
    second = copy.deepcopy(first)  # as Gradio makes one for each
    actions.read_text(first, TEXT, "", False, *sliders(actions, speed=0.3))
    assert second.text is None and second.asked == {}


# Dials


def test_a_model_has_the_dials_that_it_was_calibrated_and_certified_for(classifier):
    dials, missing = page_dials(classifier)
    assert [dial.name for dial in dials] == ["speed", "speedup", "max_disagreement"] and missing == []
    speed, speedup, agreement = dials
    assert (speed.minimum, speed.maximum, speed.value) == (0, 1, 0.49)
    assert (speedup.minimum, speedup.maximum) == (1, 5.77)
    assert (agreement.minimum, agreement.maximum) == (0.3, 11.3) and agreement.asked(1.3) == {
        "max_disagreement": 0.013
    }
    for dial in dials:  # the ends can be asked for
        for shown in (dial.minimum, dial.maximum):
            classifier(TEXT, **dial.asked(shown))
    with pytest.raises(ValueError, match="at least 230|cannot be certified"):
        classifier(TEXT, **agreement.asked(agreement.minimum - 0.1))


def test_dials_that_are_missing_say_why():
    dials, missing = page_dials(tiny_classifier())
    assert [dial.name for dial in dials] == ["speed"]
    assert "fastbert_hf.calibrate" in missing[0] and "certif" in missing[1]


def test_sliders_begin_where_the_pipeline_is(classifier):
    dials, missing = page_dials(load_pipeline(max_disagreement=0.02))
    assert (dials[0].name, dials[0].value) == ("max_disagreement", 2.0)
    # What was certified for longer texts is not promised for these.
    dials, missing = page_dials(load_pipeline(speedup=3.0, max_length=64))
    assert (dials[0].name, dials[0].value) == ("speedup", 3.0) and "max_length=512" in missing[0]
    with pytest.raises(ValueError, match=r"has max_layers: set it there, as in model.config.max_layers = 2"):
        page_dials(pipeline("fast-text-classification", model=classifier.model, max_layers=2))


@pytest.mark.parametrize("shown", [None, "0.5", True, float("nan"), [0.5]])
def test_a_slider_is_a_number(actions, shown):
    with pytest.raises(Exception, match="Speed must be a number"):
        actions.move(Visit(text=object()), "Speed", shown, 2.0, 1.0)
    with pytest.raises(Exception, match="is none of Speed"):
        actions.move(Visit(text=object()), HOSTILE, 0.5, 2.0, 1.0)


# Files


def write_file(path, rows):
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            quoting = (
                {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if path.suffix == ".tsv" else {}
            )
            writer = csv.DictWriter(file, list(rows[0]), **quoting)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(texts=TEXTS):
    return [{"id": str(place), "text": text, "label": "negative"} for place, text in enumerate(texts)]


def run_file(actions, visit, path, at, columns=("text", NONE, "label"), cut=True):
    *steps, shown = actions.run_file(visit, path, *columns, cut, *at)
    assert all("texts" in step for step in steps)
    return shown


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
        names = ("label", "score", "exit_layer")
        assert_same_answers(
            [{name: kind(row[f"predicted_{name}"]) for name, kind in zip(names, (str, float, int))} for row in rows],
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
    texts = [f"{text} {other}" for text in TEXTS for other in TEXTS]
    records = [record for _, record, _ in record_in_steps(classifier, texts, cut=True)]
    assert [len(record.exit_logits) for record in records] == [81]
    labels = [place % 3 - 1 for place in range(len(texts))]  # -1 is not known
    many = ManyTexts(classifier, joined_records(records), labels)
    full = [answer["label"] for answer in classifier(texts, speed=0)]
    for speed, summary in many.curve[::25]:
        answers = classifier(texts, speed=speed)
        ids = [classifier.model.config.label2id[answer["label"]] for answer in answers]
        known = [own == label for own, label in zip(ids, labels) if label >= 0]
        assert (summary.rows, summary.labelled) == (81, 54)
        assert summary.accuracy == pytest.approx(sum(known) / len(known))
        assert summary.agreement == pytest.approx(sum(a["label"] == b for a, b in zip(answers, full)) / 81)
        layers = Counter(answer["exit_layer"] for answer in answers)
        assert summary.shares == pytest.approx([layers[layer] / 81 for layer in range(1, 7)])
        assert summary.mean_layers == pytest.approx(sum(answer["exit_layer"] for answer in answers) / 81)
    assert many.curve[0][1].speed_up == 1.0 and many.curve[-1][1].speed_up > 4
    assert many.speed_of(speed=0.3) == 0.3 and 0 < many.speed_of(speedup=3.0) < 1


def test_rows_without_an_answer_are_told_with_their_reasons(classifier, actions, tmp_path):
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
    assert label_ids([1, 0, None, 2], known) == [1, 0, -1, -1]
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
        ("rows.csv", b"text\n" + b"x" * 10_000_001, "has 10 MB. The page reads up to 10 MB"),
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
    bomb = tmp_path / "bomb.parquet"  # 2 kB on the disk, 200 MB in memory
    parquet.write_table(pa.table({"text": ["x" * 1_000_000] * 200}), bomb, compression="zstd")
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
    rows = [{"text": text, "text_pair": other} for text, other in zip(TEXTS, TEXTS[1:], strict=False)]
    path, visit = write_file(tmp_path / "rows.jsonl", [*rows, {"text": "alone"}]), Visit()
    run_file(actions, visit, path, sliders(actions, speed=0.3), columns=("text", "text_pair", NONE))
    texts = visit.file.texts
    assert_same_answers(texts.answers(texts.at(speed=0.3)), classifier(rows, speed=0.3))
    assert visit.file.reasons == {len(rows): "has no text in 'text_pair'"}


# What others write


class Tags(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.names, self.texts = set(), set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.texts.append(data)


def assert_harmless(html):
    found = Tags(html)
    known = {"div", "span", "b", "i", "em", "small", "p", "h1", "h4", "u", "s", "svg", "polyline", "table", "thead"}
    assert found.tags <= {*known, "tbody", "tr", "th", "td", "details", "summary"}
    assert not [name for name in found.names if name.startswith("on") or name in ("href", "src")]
    assert not set("{}$`\\\x1b") & set(html)
    return found


def test_labels_texts_and_columns_of_others_stay_text(tmp_path):
    labels = {0: HOSTILE, 1: "=cmd|' /C calc'!A0", 2: "-1"}
    classifier = tiny_classifier(id2label=labels, label2id={name: number for number, name in labels.items()})
    actions, visit = PageActions(classifier), Visit()
    for text in tiny_texts(4):
        one = OneText(classifier, f"{text} {HOSTILE}")
        assert_harmless(one_text_figure(one, {"speed": 0.5}))
    found = assert_harmless(page_module._title(classifier.model.config))
    assert "<img src=x onerror" in "".join(found.texts)
    rows = [{HOSTILE: f"{text} {HOSTILE}", "label": HOSTILE} for text in tiny_texts(4)]
    path = write_file(tmp_path / "rows.jsonl", [*rows, {"label": HOSTILE}])
    *_, shown = actions.open_file(visit, str(path))
    assert "<img src=x onerror" in "".join(assert_harmless(shown).texts)
    shown = run_file(actions, visit, path, ("Speed", 0.5), columns=(HOSTILE, NONE, "label"))
    assert "<img src=x onerror" in "".join(assert_harmless(shown).texts)
    *_, shown = actions.run_file(visit, path, f"no {HOSTILE}", NONE, NONE, True, "Speed", 0.5)
    assert_harmless(shown)
    answers = [{"label": label, "score": 0.5, "exit_layer": 1} for label in labels.values()]
    upload = read_upload(path)
    written = list(csv.reader(io.StringIO(answered_csv(upload, range(3), answers, {4: "why"}))))
    assert [row[2] for row in written[1:4]] == [HOSTILE, "'=cmd|' /C calc'!A0", "-1"]  # no formula
    assert [row[0] for row in written[1:5]] == [row[HOSTILE] for row in rows]  # as it was


def test_many_labels_and_layers_are_shown_without_losing_the_answer():
    classifier = tiny_classifier(num_labels=150)
    for text in tiny_texts(4):
        one = OneText(classifier, text)
        for speed in (0.0, 0.9, 0.95, 1.0):
            label = one.answer(speed=speed).told["label"]
            figure = one_text_figure(one, {"speed": speed})
            assert "145 others" in figure and figure.count(f">{label}<") == 2  # large, and with its colour
    summary = ManyTexts(classifier, OneText(classifier, "word9").recorded.record).curve
    assert many_texts_figure(summary[0][1], summary, 0.5, "speed 0.5", [4]).count("fb-bar") >= 4


def test_numbers_are_not_rounded_to_what_they_are_not():
    assert [percent(share) for share in (1, 0.9999, 0.0001, 0, 0.5)] == [
        f"{text}&nbsp;%" for text in ("100.0", "99.9", "0.1", "0.0", "50.0")
    ]
    assert percent(-0.021, 0) == "−2&nbsp;%"
    assert "…" in table(["text"], [["x" * 200]], "rows")


# The command, the extra, the Space


def test_nothing_is_imported_before_it_is_needed_and_a_missing_extra_is_named(tmp_path):
    script = """
import sys
import fastbert_hf, fastbert_hf.serving
assert not {"gradio", "pyarrow.parquet"} & set(sys.modules)
sys.modules["gradio"] = None
from fastbert_hf_cli import main
main(["demo"])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 1 and run.stderr.splitlines()[-1].endswith('its extra: pip install "fastbert-hf[demo]"')
    assert "Traceback" not in run.stderr


def test_command_and_space_show_the_page_of_the_model_that_they_name(monkeypatch, capsys):
    from fastbert_hf_cli import parser_of_all

    asked = []

    def show_page(classifier, examples=None, host=None, port=None):
        asked.append((classifier, examples, host, port))
        return SimpleNamespace(local_url="http://127.0.0.1:1/", block_thread=lambda: None)

    monkeypatch.setattr(page_module, "show_page", show_page)
    words = ["demo", "--port", "1234", "--speedup", "3", "--example", "a", "--example", "b", "--truncate"]
    demo.run(parser_of_all().parse_args(words))
    classifier, examples, host, port = asked[0]
    assert (examples, host, port) == (["a", "b"], "127.0.0.1", 1234)
    assert page_dials(classifier)[0][0].value == 3.0 and classifier._preprocess_params == {"truncation": True}
    with pytest.raises(SystemExit, match="no such model|no/model"):
        demo.run(argparse.Namespace(**{**vars(parser_of_all().parse_args(words)), "model": "no/model"}))
    with pytest.raises(SystemExit, match="speedup must be a number from 1 to 5.77"):
        demo.run(parser_of_all().parse_args(["demo", "--speedup", "30"]))

    monkeypatch.delenv("FASTBERT_MODEL", raising=False)
    runpy.run_path(str(ROOT / "examples" / "space" / "app.py"))
    assert asked[1][0].model.config.num_hidden_layers == 6 and asked[1][1:] == (None, None, None)
    assert capsys.readouterr().out.count("http://127.0.0.1:1/") == 2


def test_the_space_says_what_a_space_has_to():
    folder = ROOT / "examples" / "space"
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    fields = dict(line.split(": ", 1) for line in front.splitlines() if ": " in line)
    assert (fields["sdk"], fields["license"]) == ("gradio", "apache-2.0")
    assert (folder / fields["app_file"]).is_file() and len(fields["short_description"]) <= 60
    assert fields["sdk_version"].startswith("6.")
    assert "fastbert-hf[demo]" in (folder / "requirements.txt").read_text().splitlines()


def test_the_page_of_another_model_has_no_examples_of_films():
    texts = [
        [block.value for block in build_page(tiny, examples).blocks.values() if getattr(block, "label", "") == "Text"]
        for tiny, examples in ((tiny_classifier(), None), (tiny_classifier(), ["word9 word7"]))
    ]
    assert texts == [[""], ["word9 word7"]]
    assert transformers.__version__
