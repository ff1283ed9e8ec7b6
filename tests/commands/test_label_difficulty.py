from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import Trainer

from ..common import tiny_texts


ROWS = 24


@pytest.fixture
def train_file(tmp_path):
    path = tmp_path / "train.tsv"
    rows = [f"{('no', 'yes')[index % 2]}\t{index}\t{text}" for index, text in enumerate(tiny_texts(ROWS))]
    path.write_text("\n".join(["label\tnumber\ttext", *rows]) + "\n")
    return path


@pytest.fixture
def arguments(tmp_path, backbone, train_file):
    words = f"--model_name_or_path {backbone} --train_file {train_file} --use_cpu --num_folds 2 --seeds 1 2"
    words += f" --num_train_epochs 1 --output_dir {tmp_path / 'answers'} --output_file {tmp_path / 'out.jsonl'}"
    return words.split()


def read(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    with path.open(newline="") as file:
        return list(csv.DictReader(file, **quoting))


def wrong_rows(folder: Path) -> set[int]:
    return {row for path in folder.rglob("fold_*.json") for row in json.loads(path.read_text())["wrong"]}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_the_rows_come_back_with_their_difficulty(run, arguments, train_file, tmp_path, kind):
    output = tmp_path / f"new/out.{kind}"
    printed = run(*arguments, "--output_file", output)
    given, labelled = read(train_file), read(output)
    hard = [int(row.pop("difficulty")) for row in labelled]
    assert [{name: str(value) for name, value in row.items()} for row in labelled] == given
    assert {row for row, is_hard in enumerate(hard) if is_hard} == wrong_rows(tmp_path / "answers")
    assert 0 < sum(hard) and set(hard) <= {0, 1}
    assert [path.name for path in output.parent.iterdir()] == [output.name]

    table = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.endswith("%")}
    assert list(table) == ["no", "yes", "all"]
    assert table["all"] == [str(ROWS), f"{sum(hard) / ROWS:.1%}"]
    assert table["yes"] == [str(ROWS // 2), f"{sum(hard[1::2]) / (ROWS // 2):.1%}"]
    assert "DifficultyAwareTrainer(" in printed.splitlines()[-1]


def test_the_first_layers_with_the_chosen_exit_judge(run, monkeypatch, arguments, tmp_path):
    models, original = [], Trainer.train

    def remember(self, *args, **kwargs):
        models.append((self.model, self.args.learning_rate, self.args.per_device_train_batch_size))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", remember)
    words = "--num_hidden_layers 3 --exit_type linear --learning_rate 0.01 --per_device_train_batch_size 4".split()
    run(*arguments, *words)
    assert len(models) == 4
    for model, learning_rate, batch_size in models:
        assert (model.config.num_hidden_layers, model.config.exit_type) == (3, "linear")
        assert model.config.id2label == {0: "no", 1: "yes"}
        assert (learning_rate, batch_size) == (0.01, 4)
    # Finished trainings are not repeated, whatever the output is.
    run(*arguments, *words, "--output_file", tmp_path / "other.csv")
    assert len(models) == 4


def test_defaults_are_a_small_member_and_the_papers_rounds(command):
    options = command.LabelDifficultyOptions()
    assert (options.num_hidden_layers, options.exit_type) == (2, "linear_mean")
    assert (options.num_folds, options.seeds) == (8, [1, 2, 3, 4, 5])
    assert (options.learning_rate, options.num_train_epochs) == (1e-4, 3)


def test_without_a_file_the_example_rows_are_labelled(run, error_of, arguments, train_file, tmp_path):
    arguments = [word for word in arguments if word not in ("--train_file", str(train_file))]
    assert "give the rows to label, as in --train_file train.tsv" in error_of(*arguments)
    run(*arguments, "--max_train_samples", 10, example_data=train_file.parent)
    assert len(read(tmp_path / "out.jsonl")) == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_file", "rows.txt"], "--output_file must end with .jsonl, .csv or .tsv, got rows.txt"),
        (["--exit_type", "round"], "--exit_type must be one of attention, linear, linear_mean, got 'round'"),
        (["--text_column", "body"], "has no column 'body'"),
        (["--num_hidden_layers", "9"], "--num_hidden_layers must be from 1 to 4, got 9"),
        (["--num_folds", "1"], "num_folds must be from 2 to 24, the number of rows, got 1"),
        (["--seeds", "1", "1"], "seeds must be one or more different numbers, got [1, 1]"),
        (["--train_file", "no.tsv"], "there is no file no.tsv: correct --train_file"),
        (["--data_dir", "nowhere"], "there is no folder 'nowhere': correct --data_dir"),
        (["--model_name_or_path", "no/such/folder"], "the model cannot be loaded"),
    ],
)
def test_wrong_arguments_end_with_one_line(error_of, arguments, words, message, tmp_path):
    assert message in error_of(*arguments, *words)
    assert not (tmp_path / "answers").exists()


def test_other_settings_in_the_same_folder_end_with_one_line(run, arguments):
    run(*arguments)
    with pytest.raises(SystemExit, match=r"learning_rate was 0.0001 and is 0.5"):
        run(*arguments, "--learning_rate", 0.5)


@pytest.mark.parametrize("text", ["word7\tword8", "word7\nword8", "word7\rword8"])
def test_texts_that_a_tsv_file_cannot_hold_are_refused_before_any_training(run, arguments, tmp_path, text):
    rows = [{"label": index % 2, "text": text} for index in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*arguments, "--train_file", tmp_path / "train.jsonl", "--output_file", tmp_path / "out.tsv"]
    with pytest.raises(SystemExit, match=r"a tab or a line break, which .tsv cannot hold: give --output_file as"):
        run(*words)
    assert not (tmp_path / "answers").exists()
    run(*words, "--output_file", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        assert {row["text"] for row in csv.DictReader(file)} == {text}


def test_rows_that_have_a_difficulty_are_refused(run, arguments, tmp_path):
    Dataset.from_list([{"label": 0, "text": "word7", "difficulty": 1}] * 4).to_json(tmp_path / "train.jsonl")
    with pytest.raises(SystemExit, match="has a column 'difficulty' already: remove it to label the rows anew"):
        run(*arguments, "--train_file", tmp_path / "train.jsonl")
