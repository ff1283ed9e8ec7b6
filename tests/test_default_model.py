"""The model that comes with the package: there before any training, small, quick to load, as good as its card says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoTokenizer, DataCollatorWithPadding, pipeline

from fastbert_hf import DEFAULT_MODEL_DIR, FastBertForSequenceClassification
from fastbert_hf.data import load_rows
from fastbert_hf.evaluation import record_exits, replay_at_speed, sweep_speeds
from fastbert_hf.modeling.dials import certified_speed, speed_for

from .common import CUT_NETWORK, DEFAULT_MODEL_FILES


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FIRST_LINES = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]

LOAD_WITHOUT_NETWORK = """
import gc, json, time
try:
    socket.create_connection(("127.0.0.1", 9))
except OSError:
    guarded = len(reached)
import torch
import fastbert_hf
from transformers import pipeline
gc.set_threshold(700, 10, 10)  # as users have it
start = time.process_time()
classifier = pipeline("fast-text-classification", speed=0.5)
seconds = time.process_time() - start
answer = classifier("The plot is thin, but the cast makes it a joy.")
dtype = str(classifier.model.dtype)
print(json.dumps({"seconds": seconds, "reached": reached[guarded:], "answer": answer, "dtype": dtype}))
"""


@pytest.fixture(scope="module")
def without_network() -> dict:
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    finished = subprocess.run(
        [sys.executable, "-c", CUT_NETWORK + LOAD_WITHOUT_NETWORK],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def classifier():
    return pipeline("fast-text-classification")


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return ModelCard.load(DEFAULT_MODEL_DIR / "README.md")


def measured(card: ModelCard) -> dict[str, float]:
    """The results of the card's `model-index`."""
    (model,) = card.data.to_dict()["model-index"]
    (result,) = model["results"]
    return {metric["name"]: metric["value"] for metric in result["metrics"]}


def table_rows(card: ModelCard) -> list[dict[str, str]]:
    """The rows of the card's table of speeds."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in card.text.split("## What each speed costs")[1].split("## Training")[0].splitlines()
        if line.startswith("| ")
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_first_lines_of_the_readme_answer_as_they_say():
    lines, comment = re.fullmatch(r"(.*)  # (\[.*?\])\n", FIRST_LINES, re.DOTALL).groups()
    *statements, call = lines.splitlines()
    names = {}
    exec("\n".join(statements), names)
    (answer,) = eval(call, names)
    (said,) = eval(comment)
    assert said == {**answer, "score": pytest.approx(answer["score"], abs=0.006)}
    assert answer["label"] == "positive" and answer["exit_layer"] < 6
    assert 'pipeline("fast-text-classification", speed=0.5)' in lines


def test_it_loads_without_network_in_under_two_seconds(without_network):
    # Of the processor, so that other processes on it make no difference; the first load, with what it imports late.
    assert without_network["seconds"] < 2
    assert without_network["reached"] == []
    assert without_network["answer"][0]["label"] == "positive"
    assert without_network["dtype"] == "torch.float32"


def test_its_files_are_small_and_in_half_precision_under_configs_of_float32():
    weights = DEFAULT_MODEL_DIR / "model.safetensors"
    assert sum(path.stat().st_size for path in DEFAULT_MODEL_DIR.iterdir()) <= 48e6
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}
    config = json.loads((DEFAULT_MODEL_DIR / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "float32"


def test_its_files_say_nothing_of_the_machine_that_made_them():
    assert {path.name for path in DEFAULT_MODEL_DIR.iterdir()} == DEFAULT_MODEL_FILES
    for path in DEFAULT_MODEL_DIR.glob("*.json"):
        if path.name != "tokenizer.json":
            assert not re.search(r'"/\w+/', path.read_text())


def test_its_labels_have_names(classifier):
    assert classifier.model.config.id2label == {0: "negative", 1: "positive"}


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("A warm, funny and beautifully made film.", "positive"),
        ("A tedious mess that forgets its own story.", "negative"),
        ("I could not stop laughing, in the best way.", "positive"),
        ("The plot makes no sense and the acting is dreadful.", "negative"),
        ("It is a joy from beginning to end.", "positive"),
        ("Dull, loud and far too long.", "negative"),
    ],
)
def test_it_answers_sensibly_at_any_speed(classifier, text, label):
    for speed in (0, 0.5, None):
        assert classifier(text, **({} if speed is None else {"speed": speed}))[0]["label"] == label


def test_its_card_is_that_of_the_template_and_survives_a_reload(card, tmp_path):
    card.save(tmp_path / "again.md")
    assert (tmp_path / "again.md").read_bytes() == (DEFAULT_MODEL_DIR / "README.md").read_bytes()
    assert card.data.library_name == "fastbert_hf"
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    for part in ("## What each speed costs and gives", "## Limits", "## Training", "(speed_accuracy.png)"):
        assert part in card.text


def test_its_card_lies_with_the_template_in_the_folder_of_the_cards():
    cards = ROOT / "model_cards"
    assert (cards / "default_model.md").read_bytes() == (DEFAULT_MODEL_DIR / "README.md").read_bytes()
    template = ROOT / "fastbert_hf" / "sharing" / "model_card_template.md"
    assert (cards / "template.md").read_bytes() == template.read_bytes()
    for link in re.findall(r"\]\(([\w.]+\.png)\)", (cards / "default_model.md").read_text()):
        assert (cards / link).read_bytes() == (DEFAULT_MODEL_DIR / link).read_bytes()


def test_it_reaches_what_was_asked_of_it(card):
    speed = FastBertForSequenceClassification.config_class.from_pretrained(DEFAULT_MODEL_DIR).speed
    results = measured(card)
    assert results["accuracy at speed 0"] >= 0.90
    assert results[f"accuracy at speed {speed:g}"] >= 0.895
    (row,) = [row for row in table_rows(card) if row["speed"] == f"{speed:g}"]
    assert float(row["fewer layers"].removesuffix("x")) >= 2


def test_its_card_tells_what_real_data_says(card):
    if "FASTBERT_DATA" not in os.environ:
        pytest.skip("FASTBERT_DATA does not name the folder of the real data sets")
    rows = load_rows(Path(os.environ["FASTBERT_DATA"], "en/sst2/test.tsv.gz"))
    model = FastBertForSequenceClassification.from_pretrained(DEFAULT_MODEL_DIR, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_MODEL_DIR)
    encoded = [
        {**tokenizer(text, truncation=True, max_length=128), "labels": int(label)}
        for text, label in zip(rows["text_a"], rows["label"], strict=True)
    ]
    record = record_exits(model, encoded, DataCollatorWithPadding(tokenizer), progress=False)
    said = table_rows(card)
    table = sweep_speeds(model, record, [float(row["speed"]) for row in said])
    assert f"{len(rows):,} texts" in card.text
    for row, now in zip(said, table.to_dict("records"), strict=True):
        # Another machine rounds otherwise: one or two texts may change sides.
        assert float(row["accuracy"].removesuffix("%")) / 100 == pytest.approx(now["accuracy"], abs=0.002)
        assert float(row["layers"]) == pytest.approx(now["mean_exit_layer"], abs=0.02)
        assert float(row["fewer FLOPs"].removesuffix("x")) == pytest.approx(now["executed_speed_up"], rel=0.02)
    # What may be asked for was measured on dev.
    config, full = model.config, replay_at_speed(record, model.config, 0.0)
    for speedup in (1.5, 2.0, 3.0, 4.0):
        spent = replay_at_speed(record, config, speed_for(config.calibration, speedup)).flops.sum()
        assert (full.flops.sum() / spent).item() == pytest.approx(speedup, rel=0.05)
    for risk in (0.02, 0.05):
        early = replay_at_speed(record, config, certified_speed(config.certification, risk))
        differs = early.logits.argmax(-1) != full.logits.argmax(-1)
        assert differs.float().mean().item() <= risk + 0.002


def test_it_may_be_asked_for_a_speed_up_and_for_an_agreement(classifier, card):
    texts = ["A joy.", "The plot is thin, but the cast makes it a joy.", "Not bad at all, if a little long."] * 8
    layers = [
        [answer["exit_layer"] for answer in classifier(texts, **dial)]
        for dial in ({"speedup": 1}, {"max_disagreement": 0.01}, {"speedup": 3.0})
    ]
    assert layers[0] == [6] * 24
    assert sum(layers[0]) > sum(layers[1]) > sum(layers[2])
    assert "| max_disagreement=0.01 | " in card.text and "Any `speedup` up to 5.7" in card.text


def test_the_readme_says_what_it_knows_and_what_not(card, classifier):
    said = r"([\d.]+) % of SST-2's .*? ([\d.]+) % with ([\d.]+) times fewer .*? only (\d+) % of the reviews"
    full, early, fewer, elsewhere = re.search(said, " ".join(README.split())).groups()
    rows = {row["speed"]: row for row in table_rows(card)}
    assert rows["0"]["accuracy"] == f"{full}%"
    chosen = rows[f"{classifier.model.config.speed:g}"]
    assert (chosen["accuracy"], round(float(chosen["fewer layers"][:-1]), 1)) == (f"{early}%", float(fewer))
    reviews = load_rows(ROOT / "examples" / "data" / "test.tsv")
    labels = [answer["label"] for answer in classifier(list(reviews["text"]), speed=0)]
    right = sum(label == gold for label, gold in zip(labels, reviews["label"], strict=True))
    assert f"{right / len(reviews):.0%}" == f"{elsewhere}%"
