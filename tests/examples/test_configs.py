from __future__ import annotations

import csv
import gzip
import json
import os
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ErnieConfig,
    ErnieForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    pipeline,
)

from fastbert_hf.commands.self_distill import main
from fastbert_hf.commands.self_distill_options import parse_self_distill_options


EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SCRIPT = EXAMPLES / "run_self_distill.py"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.json"))
DATA_DIR = os.environ.get("FASTBERT_DATA")
LIMITS = ("--max_steps", 2, "--max_train_samples", 80, "--max_eval_samples", 24, "--use_cpu", "--disable_tqdm", "True")
LABELS = {"zh": ["0", "1"], "en": ["Business", "Sci/Tech", "Sports", "World"]}

# Sentences of the tests' own, about which each label says what it says in the data set.
REVIEWS = {
    "0": ["纸张太薄，读了几页就放下了", "等了很久没有人来，再也不去了", "价格不低，质量却很差"],
    "1": ["一口气读完，还想再读一遍", "窗外就是湖，早饭也很丰富", "送货快，用起来很顺手"],
}
NEWS = {
    "Business": [
        "The bakery chain sold its ovens and bought a mill.",
        "Shares of the ferry company rose before noon.",
    ],
    "Sci/Tech": [
        "A telescope the size of a shoe box found a comet.",
        "The new chip counts bees as they leave the hive.",
    ],
    "Sports": ["The goalkeeper scored from her own half.", "Rain stopped the final after two sets."],
    "World": [
        "Two neighbours agreed on a bridge over the border river.",
        "The island held its first vote in ten years.",
    ],
}
QUESTIONS = {
    "0": [("怎么种番茄？", "番茄汤怎么做？"), ("去海边坐几路车？", "海边现在下雨吗？")],
    "1": [("怎么种番茄？", "番茄应该怎样种？"), ("去海边坐几路车？", "哪路公交车到海边？")],
}


def settings_of(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def own_data(config: Path, folder: Path) -> Path:
    """A folder of data with the files that the settings name, in the form of the real ones."""
    content = {"roberta_ag_news": NEWS, "ernie_lcqmc": QUESTIONS}.get(config.stem, REVIEWS)
    header = ["label", "text_a", "text_b"] if content is QUESTIONS else ["label", "text_a"]
    rows = [
        [label, *([text] if isinstance(text, str) else text)]
        for index in range(48)
        for label in content
        for text in content[label][index % 2 :: 2]
    ]
    for name in ("train_file", "validation_file"):
        if name in settings_of(config):
            path = folder / settings_of(config)[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt", encoding="utf-8") as file:
                file.write("".join("\t".join(row) + "\n" for row in [header, *rows]))
    return folder


def texts_of(config: Path, data_dir: Path) -> list[str]:
    """The first training texts."""
    with gzip.open(data_dir / settings_of(config)["train_file"], "rt", encoding="utf-8", newline="") as file:
        rows = [row for _, row in zip(range(500), csv.reader(file, "excel-tab", quoting=csv.QUOTE_NONE), strict=False)]
    return [text for row in rows[1:] for text in row[1:]]


def tiny_checkpoint(config: Path, texts: list[str], folder: Path) -> Path:
    """
    A tiny random checkpoint of the family, with the head for masked words, the limits and the tokenizer files that the
    one on the Hub has.
    """
    folder.mkdir()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    torch.manual_seed(0)
    if config.stem.startswith("roberta"):
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(texts, vocab_size=400, special_tokens=special, show_progress=False)
        tokenizer.save_model(str(folder))  # vocab.json and merges.txt
        places = {"type_vocab_size": 1, "max_position_embeddings": 130, "pad_token_id": 1}
        shape = {**shape, **places, "vocab_size": tokenizer.get_vocab_size()}
        model = RobertaForMaskedLM(RobertaConfig(**shape, bos_token_id=0, eos_token_id=2))
    else:
        characters = sorted({character for text in texts for character in text.lower() if not character.isspace()})
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
        (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
        shape = {**shape, "vocab_size": len(vocabulary), "max_position_embeddings": 128}
        if config.stem.startswith("ernie"):
            ernie = {"type_vocab_size": 4, "task_type_vocab_size": 3, "use_task_id": True}
            model = ErnieForMaskedLM(ErnieConfig(**shape, **ernie))
        else:
            model = BertForMaskedLM(BertConfig(**shape))
    model.save_pretrained(folder)
    return folder


def words(config: Path, data_dir: Path, tmp_path: Path, *options) -> list[str]:
    """The command line behind the script's name."""
    backbone = tiny_checkpoint(config, texts_of(config, data_dir), tmp_path / "backbone")
    given = (config, "--model_name_or_path", backbone, "--output_dir", tmp_path / "out", *LIMITS, *options)
    return [str(word) for word in given]


def assert_answers(config: Path, folder: Path) -> None:
    """The saved model answers in the fast pipeline, with the labels of the data set."""
    classifier = pipeline("fast-text-classification", model=str(folder))
    labels = LABELS["en" if config.stem == "roberta_ag_news" else "zh"]
    assert [classifier.model.config.id2label[index] for index in range(len(labels))] == labels
    text = {"bert_wwm": "很好", "roberta": "A new bridge.", "ernie": {"text": "怎么种？", "text_pair": "怎样种？"}}
    (kind,) = [kind for kind in text if config.stem.startswith(kind)]
    (answer,) = classifier([text[kind]], speed=0.5)
    assert answer["label"] in labels and 1 <= answer["exit_layer"] <= 3


@pytest.fixture
def trainers(monkeypatch) -> list[Trainer]:
    """The trainer of every stage that is trained, in order."""
    seen, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, **kwargs: (seen.append(self), train(self, **kwargs))[1])
    return seen


def decoded(trainer: Trainer) -> list[str]:
    """Return the training rows as the model reads them."""
    return [trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset]


def assert_trained(config: Path, trainers: list[Trainer]) -> None:
    """Two steps in each stage, at the paper's rates, on pairs where the data set has pairs."""
    assert [trainer.state.global_step for trainer in trainers] == [2, 2]
    assert [trainer.args.learning_rate for trainer in trainers] == [2e-5, 2e-4]
    texts_in_row = 2 if config.stem == "ernie_lcqmc" else 1
    separator = trainers[0].processing_class.sep_token  # ends each text
    assert {row.count(separator) for row in decoded(trainers[0])} == {texts_in_row}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_settings_are_known_arguments_with_the_values_of_the_paper(config):
    arguments, stage_one = parse_self_distill_options("A command.", [str(config)])
    known = {argument.name for kind in (type(arguments), type(stage_one)) for argument in fields(kind)}
    settings = settings_of(config)
    assert settings.keys() <= known
    assert arguments.model_name_or_path == settings["model_name_or_path"]
    assert (stage_one.learning_rate, stage_one.num_train_epochs, stage_one.warmup_steps) == (2e-5, 3, 0.1)
    assert (arguments.distill_learning_rate, arguments.distill_num_train_epochs) == (2e-4, 5)
    assert (arguments.max_length, stage_one.per_device_train_batch_size) == (128, 32)
    assert arguments.exit_type in (None, "attention") and arguments.temperature == 1
    assert stage_one.metric_for_best_model == "accuracy" and stage_one.load_best_model_at_end
    assert stage_one.output_dir == f"outputs/{config.stem}"
    files = [settings[name] for name in ("train_file", "validation_file") if name in settings]
    assert files and not any(Path(name).is_absolute() for name in files)


def test_the_table_lists_every_file_and_its_backbone():
    table = (EXAMPLES / "configs" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\S+\.json)` \| `(\S+)` \|", table, re.MULTILINE))
    assert rows == {path.name: settings_of(path)["model_name_or_path"] for path in CONFIGS}
    assert len(rows) == 4


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_two_steps_on_rows_of_our_own(monkeypatch, tmp_path, trainers, config):
    monkeypatch.delenv("FASTBERT_DATA", raising=False)
    data_dir = own_data(config, tmp_path / "data")
    main(words(config, data_dir, tmp_path, "--data_dir", data_dir))
    assert_trained(config, trainers)
    rows = decoded(trainers[0])
    assert not any(trainers[0].processing_class.unk_token in row for row in rows)
    if config.stem == "ernie_lcqmc":
        assert any(row.replace(" ", "").startswith("[CLS]怎么种番茄") for row in rows)
    assert_answers(config, tmp_path / "out")


@pytest.mark.skipif(not DATA_DIR, reason="needs the real data sets in FASTBERT_DATA")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_two_steps_on_the_real_rows(tmp_path, trainers, config):
    if not Path(DATA_DIR, settings_of(config)["train_file"]).is_file():
        pytest.skip(f"FASTBERT_DATA has no {settings_of(config)['train_file']}")
    main(words(config, Path(DATA_DIR), tmp_path))
    assert_trained(config, trainers)
    assert len(trainers[0].train_dataset) == 80 and len(trainers[0].eval_dataset) == 24
    assert_answers(config, tmp_path / "out")


def test_the_command_of_the_table_runs(monkeypatch, capsys, tmp_path):
    (config,) = [path for path in CONFIGS if path.stem == "bert_wwm_book_review"]
    data_dir = own_data(config, tmp_path / "data")
    monkeypatch.setenv("FASTBERT_DATA", str(data_dir))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words(config, data_dir, tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = [line.split()[0] for line in capsys.readouterr().out.splitlines() if re.match(r" +\d\.\d\d ", line)]
    assert table == ["0.00", "0.10", "0.50", "0.80"]
