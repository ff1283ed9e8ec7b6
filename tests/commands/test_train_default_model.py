"""The command that made the default model, on a handful of sentences."""

from __future__ import annotations

import copy
import gzip
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import pipeline

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.commands import train_default_model
from fastbert_hf.commands.train_default_model import DefaultModelOptions, load_default_model_data, main
from fastbert_hf.modeling.teacher_digest import teacher_digest


GOOD = ("a warm and funny film", "what a joy from start to end", "the cast is wonderful")
BAD = ("a dull and endless film", "what a waste of an evening", "the plot makes no sense")


def write_rows(path: Path, rows: list[tuple[int, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("label\ttext_a\n" + "".join(f"{label}\t{text}\n" for label, text in rows))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "en"
    rows = [*((1, text) for text in GOOD), *((0, text) for text in BAD)]
    for split in ("train", "dev", "test"):
        write_rows(folder / "sst2" / f"{split}.tsv.gz", rows * 2)
    write_rows(folder / "imdb" / "train.tsv.gz", [(0, "I laughed.<br />Then I cried! Did you?"), (1, "A film. Good.")])
    return folder.parent


@pytest.fixture(scope="module")
def trained(data_dir, backbone, tmp_path_factory) -> tuple[Path, FastBertForSequenceClassification]:
    """The folder that the command leaves, and the model that it has measured."""
    output = tmp_path_factory.mktemp("output")
    arguments = ["--data_dir", data_dir, "--output_dir", output / "model", "--work_dir", output / "stages"]
    measured, save = [], train_default_model.save_in_half_precision

    def remember(model, tokenizer, folder):
        measured.append(copy.deepcopy(model))
        save(model, tokenizer, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastbert_hf.commands.train_default_model.default_backbone", lambda: str(backbone))
        patch.setattr(train_default_model, "save_in_half_precision", remember)
        main([*map(str, arguments)])
    return output / "model", *measured


@pytest.fixture
def folder(trained) -> Path:
    return trained[0]


def test_reviews_are_whole_and_in_sentences_without_labels_and_markup(data_dir):
    reviews = load_default_model_data(DefaultModelOptions(data_dir=str(data_dir)))["reviews"]
    assert reviews.column_names == ["text_a"]
    assert list(reviews["text_a"]) == [
        "I laughed. Then I cried! Did you?",
        "A film. Good.",
        "I laughed.",
        "Then I cried!",
        "Did you?",
        "A film.",
        "Good.",
    ]


def test_the_model_is_saved_in_half_precision_and_loads_in_single(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}
        assert file.metadata() == {"format": "pt"}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "float32"
    assert FastBertForSequenceClassification.from_pretrained(folder).dtype == torch.float32
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".part")]
    answer = pipeline("fast-text-classification", model=str(folder))("a joy")[0]
    assert answer["label"] in ("negative", "positive")


def test_what_is_measured_is_what_is_saved(trained):
    folder, measured = trained
    saved = FastBertForSequenceClassification.from_pretrained(folder)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in measured.state_dict().items())
    # The exits belong to the rounded teacher.
    assert saved.config.distilled_for == teacher_digest(saved) is not None


def test_the_default_speed_is_the_fastest_that_loses_nothing():
    table = pd.DataFrame({"speed": [0, 0.2, 0.4, 0.6, 0.8], "accuracy": [0.8, 0.9, 0.7, 0.8, 0.7]})
    assert train_default_model.fastest_without_loss(table) == 0.6


def test_the_default_speed_loses_nothing_on_dev_and_is_in_the_card(folder):
    speed = json.loads((folder / "config.json").read_text())["speed"]
    card = ModelCard.load(folder / "README.md")
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+)% ", card.text, re.MULTILINE)
    # Dev and test are the same rows here.
    accuracies = {float(speed): float(accuracy) for speed, accuracy in rows}
    assert accuracies[speed] >= accuracies[0]
    assert f"The default speed, {speed:g}," in card.text
    assert 'pipeline("fast-text-classification")\n' in card.text
    assert "12 phrases of SST-2" in card.text and "7 texts of IMDb without labels" in card.text


def test_a_missing_file_is_one_line(data_dir, tmp_path):
    with pytest.raises(SystemExit, match=r"there is no file .*sst2/train\.tsv\.gz: correct --data_dir"):
        load_default_model_data(DefaultModelOptions(data_dir=str(tmp_path)))
