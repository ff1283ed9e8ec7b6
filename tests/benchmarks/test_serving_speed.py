"""docs/performance.md: the comparisons run, in turn, and the page says what was measured and what was missed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbert_hf.modeling.scheduler import CPU_BATCH_TOKENS

from ..common import assert_close, load_script


BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
TINY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}


@pytest.fixture(scope="module")
def runs():
    return load_script(BENCHMARKS / "serving_runs.py")


@pytest.fixture(scope="module")
def report():
    return load_script(BENCHMARKS / "serving_report.py")


@pytest.fixture
def texts(runs, monkeypatch):
    """Twelve reviews of the project's own, for models small enough to be timed here."""
    monkeypatch.setattr(runs, "SHAPES", {"BERT-base": TINY, "MiniLM": TINY})
    monkeypatch.setattr(runs, "TRAINED", {})
    return runs.read_reviews("", "MiniLM", 12)


@pytest.mark.parametrize("mean_depth", [1.5, 2.0, 3.0])
def test_texts_leave_by_chance_after_the_mean_depth_that_is_asked_for(runs, texts, mean_depth):
    model, tokenizer = runs.own_model("MiniLM"), runs.load_tokenizer()
    runs.leave_at_random(model.exits, mean_depth)
    answers = list(model.predict(tokenizer(texts * 40, **runs.CUT), speed=0.5))
    assert sum(answer.exit_layer for answer in answers) / len(answers) == pytest.approx(mean_depth, abs=0.25)


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_trained_model_leaves_by_its_own_exits(runs, share):
    texts, tokenizer = runs.read_reviews("", "MiniLM", 64), runs.load_tokenizer()
    model, speed = runs.model_that_leaves("MiniLM", share, texts)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    answers = list(model.predict(tokenizer(texts, **runs.CUT), speed=speed))
    assert sum(answer.exit_layer for answer in answers) / 64 == pytest.approx(share * 6, abs=0.3)
    stock, encoded = runs.stock_model("MiniLM"), tokenizer(texts[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        own_states = model.fastbert(**encoded).last_hidden_state * encoded["attention_mask"][..., None]
        states = stock.bert(**encoded).last_hidden_state * encoded["attention_mask"][..., None]
    assert_close(own_states, states)


def test_a_cascade_is_compared_with_the_layers_it_ran(runs, texts):
    result = runs.cascade_against_layers("MiniLM", 2, texts * 20, 1, 0.75)
    # 2 layers for three quarters of the texts and 2 + 4 for the rest, of 4.
    assert result["ideal"] == pytest.approx(4 / 3, abs=0.2)
    assert result["ratio"] == pytest.approx(result["speed_up"] / result["ideal"])


def test_sides_take_turns_and_the_first_turn_does_not_count(runs):
    calls = []
    seconds = runs.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, "turns")
    assert calls == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_every_comparison_with_stock_runs(runs, texts):
    results = [
        runs.against_stock_pipeline("MiniLM", texts, 1),
        runs.against_sorted_stock("MiniLM", texts, 1),
        runs.one_at_a_time("MiniLM", texts, 1),
        runs.against_stock_on_equal_lengths("MiniLM", texts * 4, 1),
        runs.bfloat16_against_float32("MiniLM", texts, 1),
        runs.with_and_without_rebatching("MiniLM", texts, 1, 0.5),
    ]
    for result in results:
        assert 0 < result["least"] <= result["ratio"] <= result["greatest"]
        assert all(rate > 0 for rate in result["texts_per_second"].values())


@pytest.mark.parametrize("single", [True, False])
def test_ideal_counts_the_layers_and_exits_that_ran(runs, texts, single):
    result = runs.against_ideal("MiniLM", texts * 4, 1, 0.5, single)
    # A little under 4 / 2, as exits cost something beside so narrow layers.
    assert 1.1 < result["ideal"] < 2.6
    assert result["ratio"] == pytest.approx(result["speed_up"] / result["ideal"])


def test_stock_answers_of_the_padded_side_are_those_of_each_text_alone(runs, texts):
    model = runs.stock_model("MiniLM")
    alone = runs.answer_padded(model, texts, 1, sort=False)
    assert runs.answer_padded(model, texts, 5, sort=True) == [
        alone[row] for row in sorted(range(12), key=lambda row: len(runs.load_tokenizer()(texts[row])["input_ids"]))
    ]


def test_page_says_what_was_missed_and_what_was_not_run(report, tmp_path):
    folder = tmp_path / "performance"
    folder.mkdir()
    settings = {
        "threads": 2,
        "machine": "x86_64, AVX512",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "reviews": "examples/data",
        "onednn_is_faster": False,
    }
    rates = {"texts_per_second": {"own": 30.0, "stock": 20.0}}
    for name, ratio in (("single_base", 1.5), ("single_minilm", 1.04)):
        result = {**rates, "ratio": ratio, "least": 1.0, "greatest": 1.6}
        (folder / f"{name}.json").write_text(json.dumps({"settings": settings, "result": result}))
    report.write(tmp_path)
    page = (tmp_path / "performance.md").read_text()
    lines = [line for line in page.splitlines() if "one text at a time, BERT-base" in line]
    assert "| at least 1.1 | 1.50 | 1.00 to 1.60 | 30, stock 20 |" in lines[0]
    assert "| at least 1.1 | **1.04** |" in page
    assert "| at least 1.8 | not run |" in page
    assert "float32 layers by MKL" in page
    assert "{{" not in page
    assert (tmp_path / "figures" / "flow.png").exists()


def test_page_of_the_project_is_what_its_numbers_give(report, tmp_path):
    docs = BENCHMARKS.parent / "docs"
    (tmp_path / "performance").symlink_to(docs / "performance")
    report.write(tmp_path)
    assert (tmp_path / "performance.md").read_text() == (docs / "performance.md").read_text()
    assert f"{CPU_BATCH_TOKENS:,} that `predict`" in (docs / "performance.md").read_text()


def test_unknown_names_are_refused_and_known_ones_listed():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(BENCHMARKS / "serving_speed.py")]
    listed = subprocess.run([*command, "--list_names"], env=environment, capture_output=True, text=True, timeout=120)
    assert "exits_stream" in listed.stdout
    refused = subprocess.run([*command, "--only", "all"], env=environment, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
    assert "unknown comparisons all; choose from stream_base" in refused.stderr
