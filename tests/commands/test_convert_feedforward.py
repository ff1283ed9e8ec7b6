"""The command that converts feed-forward layers: a tiny run, and what it refuses before it."""

from __future__ import annotations

import pytest

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.commands.convert_feedforward import main

from ..common import tiny_model, tiny_texts, tiny_tokenizer


@pytest.fixture
def model_dir(tmp_path):
    tiny_model(num_labels=2).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def write_rows(path, number: int):
    lines = [f"{text}\tLABEL_{index % 2}" for index, text in enumerate(tiny_texts(number))]
    path.write_text("\n".join(["text\tlabel", *lines]) + "\n", encoding="utf-8")
    return path


def test_a_model_is_converted_and_told_of(model_dir, tmp_path, capsys):
    words = f"--model_name_or_path {model_dir} --output_dir {tmp_path / 'fast'} --share 0.25 --depth 1 --use_cpu"
    words += f" --train_file {write_rows(tmp_path / 'train.tsv', 64)} --validation_file"
    words += f" {write_rows(tmp_path / 'dev.tsv', 8)} --num_train_epochs 1 --exit_num_train_epochs 1"
    main(words.split())
    printed = capsys.readouterr().out
    assert "mean_exit_layer" in printed and f"its card are in {tmp_path / 'fast'}." in printed
    fast = FastBertForSequenceClassification.from_pretrained(tmp_path / "fast")
    assert fast.config.feed_forward["leaf_size"] == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give --train_file"),
        ("--train_file no.tsv", "there is no file no.tsv"),
        ("--train_file {train} --share 2", "share must be in"),
        ("--train_file {train} --depht 2", "did you mean --depth"),
        ("--train_file {train} --model_name_or_path no/folder", "cannot be loaded"),
    ],
)
def test_what_is_wrong_is_one_line(words, message, tmp_path, capsys):
    train = write_rows(tmp_path / "train.tsv", 8)
    with pytest.raises(SystemExit) as error:
        main(words.format(train=train).split())
    told = f"{error.value}{capsys.readouterr().err}"
    assert message in told and "Traceback" not in told
