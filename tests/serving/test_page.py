"""What the page shows, without a browser: answers are the pipeline's, and what others write stays text."""

import argparse
import copy
import csv
import io
import re
import runpy
import socket
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import pipeline

from fastbert_hf.commands import demo
from fastbert_hf.serving import page as page_module
from fastbert_hf.serving.loading import load_pipeline
from fastbert_hf.serving.page import build_page
from fastbert_hf.serving.page_actions import MOST_CHARACTERS, NONE, PageActions, Visit
from fastbert_hf.serving.page_answers import ManyTexts, OneText
from fastbert_hf.serving.page_dials import page_dials
from fastbert_hf.serving.page_figures import many_texts_figure, one_text_figure, percent, table
from fastbert_hf.serving.page_files import answered_csv, read_upload
from fastbert_hf_cli import parser_of_all
from tests.common import tiny_texts
from tests.serving.page_common import (
    ASKED,
    TEXTS,
    assert_same_answers,
    run_file,
    sliders,
    tiny_cascade,
    tiny_classifier,
    write_file,
)
from tests.test_structure import PACKAGE, import_graph, sources_of


ROOT = Path(__file__).parents[2]
TEXT = "The plot is thin, but the cast makes it a joy."
HOSTILE = '<img src=x onerror="window.hit=1"> ${alert(1)} {{constructor}} `id` [a](http://evil.example) \x1b[31m'


@pytest.fixture(scope="module")
def classifier():
    return load_pipeline()


@pytest.fixture(scope="module")
def actions(classifier):
    return PageActions(classifier)


# One text


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_answers_to_a_text_are_those_of_the_pipeline(classifier, asked):
    for text in TEXTS:
        assert_same_answers([OneText(classifier, text).answer(**asked).told], classifier(text, **asked))


@pytest.mark.parametrize(
    "make", [lambda: tiny_cascade(min_exit_layer=4), lambda: tiny_classifier(min_exit_layer=2, max_layers=3)]
)
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
    visit = Visit(text=object())
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
    with pytest.raises(ValueError, match="cannot be certified"):
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


@pytest.mark.parametrize("make", [tiny_classifier, tiny_cascade])
def test_many_labels_and_layers_are_shown_without_losing_the_answer(make):
    classifier = make(num_labels=150)
    for text in tiny_texts(12):
        one = OneText(classifier, text)
        for speed in (0.0, 0.9, 0.95, 1.0):  # eight exits may give eight answers
            label = one.answer(speed=speed).told["label"]
            figure = one_text_figure(one, {"speed": speed})
            assert "145 others" in figure and figure.count(f">{label}<") == 2  # large, and with its colour
    many = ManyTexts(classifier, one.recorded.record)
    figure = many_texts_figure(many.curve[0][1], many.curve, 0.5, "speed 0.5", many.record.member_layers)
    assert figure.count('class="fb-bar"') == many.record.num_exits and "Accuracy" not in figure


def test_numbers_are_not_rounded_to_what_they_are_not():
    assert [percent(share) for share in (1, 0.9999, 0.0001, 0, 0.5)] == [
        f"{text}&nbsp;%" for text in ("100.0", "99.9", "0.1", "0.0", "50.0")
    ]
    assert percent(-0.021, 0) == "−2&nbsp;%"
    assert "…" in table(["text"], [["x" * 200]], "rows")


# The command, the extra, the Space


def test_the_package_does_not_import_the_page_and_its_missing_extra_is_named(monkeypatch):
    graph, reached = import_graph(sources_of(PACKAGE)), {"fastbert_hf", "fastbert_hf.serving"}
    while more := set().union(*(graph[name] for name in reached)) - reached:
        reached |= more
    assert "fastbert_hf.serving.load_control" in reached and not [name for name in reached if ".page" in name]
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "fastbert_hf.serving.page")
    with pytest.raises(SystemExit, match=re.escape('its extra: pip install "fastbert-hf[demo]"')):
        demo.run(parser_of_all().parse_args(["demo"]))


def test_command_and_space_show_the_page_of_the_model_that_they_name(monkeypatch, capsys):
    asked = []

    def show_page(classifier, examples=None, host=None, port=None):
        asked.append((classifier, examples, host, port))
        return SimpleNamespace(local_url="http://127.0.0.1:1/", block_thread=lambda: None)

    monkeypatch.setattr(page_module, "show_page", show_page)
    words = ["demo", "--port", "0", "--speedup", "3", "--example", "a", "--example", "b", "--truncate"]
    demo.run(parser_of_all().parse_args(words))
    classifier, examples, host, port = asked[0]
    assert (examples, host, port) == (["a", "b"], "127.0.0.1", 0)
    assert page_dials(classifier)[0][0].value == 3.0 and classifier._preprocess_params == {"truncation": True}
    with pytest.raises(SystemExit, match="couldn't connect"):
        demo.run(argparse.Namespace(**{**vars(parser_of_all().parse_args(words)), "model": "no/model"}))
    with pytest.raises(SystemExit, match="speedup must be a number from 1 to 5"):
        demo.run(parser_of_all().parse_args(["demo", "--speedup", "30"]))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit, match="choose another one with --port"):
            demo.run(parser_of_all().parse_args(["demo", "--port", str(taken.getsockname()[1])]))

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
