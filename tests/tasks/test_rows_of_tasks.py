"""Rows of each task from files: labels in every form, both stages by command, and what is wrong with rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from transformers import AutoTokenizer

import fastbert_hf
from fastbert_hf.commands import evaluate_speeds, self_distill
from fastbert_hf.data import encode, label_names
from fastbert_hf.span_rows import encode_passages
from fastbert_hf.word_rows import encode_words

from ..common import tiny_stock_model, tiny_texts, tiny_tokenizer


TAGS = ("O", "B-A")
COLOURS = ("red", "green", "blue")
WORDS = sorted({word for text in tiny_texts(30) for word in text.split()})
CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "configs" / "tasks").glob("*.json"))
QUICK = ("--use_cpu", "--disable_tqdm", "true", "--num_train_epochs", "1", "--distill_num_train_epochs", "1")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("encoder"))
    tiny_stock_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def made_up(task: str, number: int = 40) -> list[dict]:
    """Rows of a task as a file of JSON lines has them."""
    chosen, rows = random.Random(0), []
    words = WORDS[:12]
    for _ in range(number):
        own = chosen.choices(words, k=chosen.randint(3, 8))
        text = " ".join(own)
        rows.append(
            {
                "multi-label": {"text": text, "label": [word for word in words[:3] if word in own]},
                "regression": {"text": text, "label": own.count(words[0]) - 0.5 * own.count(words[1])},
                "token-classification": {
                    "tokens": own,
                    "label": ["B-A" if word in words[:4] else "O" for word in own],
                },
                "question-answering": {
                    "question": own[0],
                    "context": text,
                    "answers": {"text": [own[1]], "answer_start": [len(own[0]) + 1]},
                },
            }[task]
        )
    return rows


@pytest.mark.parametrize(
    ("task", "metric"),
    [("multi-label", "f1"), ("regression", "r2"), ("token-classification", "f1"), ("question-answering", "f1")],
)
def test_the_command_trains_every_task_and_its_model_answers(encoder, tmp_path, capsys, task, metric):
    train, output = tmp_path / "rows.jsonl", tmp_path / "model"
    train.write_text("\n".join(map(json.dumps, made_up(task))))
    settings = ("--task", task, "--train_file", str(train), "--model_name_or_path", encoder)
    settings += ("--tolerance", "0.5") if task == "regression" else ()
    self_distill.main([*settings, "--output_dir", str(output), *QUICK])
    told = capsys.readouterr().out
    assert f"{metric:>11}" in told and f"{output}" in told
    config = json.loads((output / "config.json").read_text())
    wanted = {"multi-label": "multi_label_classification", "regression": "regression"}.get(task)
    assert config.get("problem_type") == wanted
    tag = "text-classification" if wanted else task
    card = (output / "README.md").read_text()
    assert f"pipeline_tag: {tag}" in card and f'pipeline("fast-{tag}"' in card
    if task != "question-answering":
        evaluate_speeds.main(["--model_name_or_path", str(output), "--data_file", str(train), "--use_cpu"])
        assert metric in capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_made_settings_run_on_rows_of_our_own(encoder, tmp_path, path):
    settings = json.loads(path.read_text())
    rows, train = made_up(settings["task"]), tmp_path / "rows.jsonl"
    first = next(iter(rows[0]))  # of the texts
    renamed = {first: settings.get("text_column", first), "label": settings.get("label_column", "label")}
    rows = [{renamed.get(name, name): value for name, value in row.items()} for row in rows]
    if "text_pair_column" in settings:
        rows = [{**row, settings["text_pair_column"]: row[settings["text_column"]]} for row in rows]
    train.write_text("\n".join(map(json.dumps, rows)))
    replaced = ("--train_file", train, "--validation_file", train, "--model_name_or_path", encoder)
    words = [path, *replaced, "--output_dir", tmp_path / "out", "--max_steps", 2, "--max_length", 40, *QUICK[:3]]
    self_distill.main(list(map(str, words)))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_regression_needs_a_tolerance_to_compare_answers(encoder, tmp_path):
    train = tmp_path / "rows.jsonl"
    train.write_text("\n".join(map(json.dumps, made_up("regression"))))
    with pytest.raises(SystemExit, match="give --tolerance"):
        self_distill.main(["--task", "regression", "--train_file", str(train), "--model_name_or_path", encoder])


def test_train_tells_a_fine_tuned_model_by_its_task(encoder, tmp_path):
    rows = made_up("token-classification")
    quiet = {"use_cpu": True, "disable_tqdm": True, "num_train_epochs": 1}
    stages = fastbert_hf.training.FineTuning(num_train_epochs=1), fastbert_hf.training.ExitTraining(num_train_epochs=1)
    quiet.pop("num_train_epochs")
    config = {"task": "token-classification"}
    trained = fastbert_hf.train(encoder, rows, rows, config=config, stages=stages, output_dir=tmp_path / "a", **quiet)
    assert type(trained.model).__name__ == "FastBertForTokenClassification" and "f1" in trained.table
    answers = trained.pipeline()(" ".join(rows[0]["tokens"]), return_exit_layers=True)
    assert set(answers) == {"entities", "exit_layer"}
    again = fastbert_hf.train(str(tmp_path / "a"), rows, stages=stages[1:], output_dir=tmp_path / "b", **quiet)
    assert type(again.model) is type(trained.model)
    with pytest.raises(ValueError, match="metric_for_best_model='accuracy' is measured in no stage: give 'f1'"):
        fastbert_hf.train(encoder, rows, rows, config=config, metric_for_best_model="accuracy", **quiet)


@pytest.mark.parametrize(
    ("cells", "features"),
    [
        ([["red"], [], ["blue", "red"]], Sequence(Value("string"))),
        (["red", "", "blue, red"], Value("string")),
        ([[0], [], [2, 0]], Sequence(ClassLabel(names=list(COLOURS)))),
    ],
)
def test_several_labels_are_read_in_every_form(cells, features):
    rows = Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": cells}, features=Features({"text": Value("string"), "label": features})
    )
    names = label_names(rows, task="multi_label_classification")
    assert sorted(names) == (["blue", "red"] if "green" not in names else sorted(COLOURS))
    label2id = {name: index for index, name in enumerate(COLOURS)}
    encoded = encode(rows, tiny_tokenizer(), label2id, task="multi_label_classification")
    assert encoded["labels"][:] == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("task", "cells", "message"),
    [
        ("multi_label_classification", [["red"], ["pink"]], "row 1 of the training data has the label 'pink'"),
        ("regression", ["1.5", "high"], r"row 1 of the training data has 'high' in 'label': a regression needs"),
        ("regression", [1.5, None], r"row 1 of the training data has None in 'label'"),
        ("regression", [1.5, float("inf")], r"row 1 of the training data has inf in 'label'"),
        ("token_classification", ["red green", "red pink"], "row 1 of the training data has the label 'pink'"),
        ("token_classification", ["red green", "red"], r"row 1 has 2 tokens, and needs as many labels"),
    ],
)
def test_what_is_wrong_with_a_row_names_it(task, cells, message):
    rows = Dataset.from_dict({"text": ["a b", "c d"], "label": cells})
    label2id = {"number": 0} if task == "regression" else {name: index for index, name in enumerate(COLOURS)}
    with pytest.raises(ValueError, match=message):
        encode(rows, tiny_tokenizer(), label2id, task=task)


def test_the_first_token_of_a_word_has_its_label():
    tokenizer = tiny_tokenizer()
    pieces = f"{WORDS[0]}-{WORDS[1]}"
    assert len(tokenizer.tokenize(pieces)) == 3
    columns = encode_words(tokenizer, [["a", pieces, "b"]], [["X", "Y", "X"]], {"X": 0, "Y": 1})
    words, labels = tokenizer([["a", pieces, "b"]], is_split_into_words=True).word_ids(0), columns["labels"][0]
    for place, word in enumerate(words):
        is_first = word is not None and words.index(word) == place
        assert labels[place] == ((0, 1, 0)[word] if is_first else -100)
    with pytest.raises(ValueError, match="the tokens of row 3 must be a list of words, got 'a b'"):
        encode_words(tokenizer, ["a b"], None, start=3)


def test_answers_are_found_by_their_characters(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    words = WORDS[:4]
    passage, start = " ".join(words), len(words[0]) + 1
    answer = {"text": [f"{words[1]} {words[2]}"], "answer_start": [start]}
    nowhere = {"text": [], "answer_start": []}
    columns = encode_passages(tokenizer, [words[3]] * 2, [passage] * 2, [answer, nowhere])
    first, last = columns["labels"][0]
    assert tokenizer.decode(columns["input_ids"][0][first : last + 1]) == answer["text"][0]
    assert columns["labels"][1] == [0, 0]
    with pytest.raises(ValueError, match=r"the answer 'zebra' of row 5 is not in its passage at 0"):
        encode_passages(tokenizer, ["a"], [passage], [{"text": ["zebra"], "answer_start": [0]}], start=5)
    with pytest.raises(ValueError, match=r"the answers of row 0 must be as in SQuAD"):
        encode_passages(tokenizer, ["a"], [passage], ["zebra"])
