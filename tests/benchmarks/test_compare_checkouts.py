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


def test_two_checkouts_take_turns():
    done = compare(
        "--before", str(PROJECT), "--shapes", "MiniLM", "--only", "single, MiniLM", "--repeats", "2", "--texts", "16"
    )
    assert done.returncode == 0, done.stderr
    median, least, greatest = map(float, re.search(r"single, MiniLM +(\S+) +(\S+) +(\S+)", done.stdout).groups())
    assert 0 < least <= median <= greatest


@pytest.mark.parametrize("folder", ["examples", "no/such/folder"])
def test_what_is_no_checkout_is_refused(folder):
    done = compare("--before", folder)
    assert done.returncode != 0
    assert f"{folder} is no checkout of this project" in done.stderr
