"""benchmarks/compare_checkouts.py: the same texts through two checkouts, in turn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..common import load_script


PROJECT = Path(__file__).parent.parent.parent
SCRIPT = PROJECT / "benchmarks" / "compare_checkouts.py"
TINY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}


# Another checkout, as far as the script can tell, which takes half a second for each text.
BEFORE = {
    "fastbert_hf/__init__.py": """
class CascadeForSequenceClassification:
    from_members = staticmethod(lambda members: None)
""",
    "benchmarks/serving_runs.py": """
import time
from types import SimpleNamespace

def read_reviews(data_dir, shape, count):
    return ["a text"] * count

def leave_at_random(exits, mean_depth):
    pass

def own_model(*arguments, **fields):
    return SimpleNamespace(exits=[], config=SimpleNamespace(num_hidden_layers=4))

def own_pipeline(model):
    def answer(text, **how):
        time.sleep(0.5)

    answer.tokenizer, answer.model = lambda texts, **how: {"input_ids": [1, 2, 3]}, model
    return answer
""",
}


def compare(*options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "FASTBERT_DATA": ""}
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_every_row_answers_its_texts(monkeypatch):
    script, runs = load_script(SCRIPT), load_script(PROJECT / "benchmarks" / "serving_runs.py")
    monkeypatch.setattr(runs, "SHAPES", {"MiniLM": TINY})
    monkeypatch.setattr(runs, "TRAINED", {})
    texts = runs.read_reviews("", "MiniLM", 12)
    rows = script.build_rows("MiniLM", texts)
    assert len(rows) == 9
    for name, run in rows.items():
        expected = 1 if name.startswith("single") else len(texts)
        assert len(run()) == expected or name.startswith("equal"), name


def test_two_checkouts_take_turns(tmp_path):
    for name, source in BEFORE.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(source)
    done = compare(
        "--before", str(tmp_path), "--shapes", "MiniLM", "--only", "single, MiniLM", "--repeats", "2", "--texts", "8"
    )
    assert done.returncode == 0, done.stderr
    median, least, greatest = map(float, re.search(r"single, MiniLM +(\S+) +(\S+) +(\S+)", done.stdout).groups())
    assert 0 < least <= median <= greatest
    assert median > 2  # each side ran its own code


@pytest.mark.parametrize("folder", ["examples", "no/such/folder"])
def test_what_is_no_checkout_is_refused(folder):
    done = compare("--before", folder)
    assert done.returncode != 0
    assert f"{folder} is no checkout of this project" in done.stderr
