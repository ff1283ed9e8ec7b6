"""The commands that change the backbone of a classifier: a tiny run of each, and what they refuse before it."""

from __future__ import annotations

import pytest

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.commands import coarsening, convert_feedforward
from fastbert_hf.training import retention_schedule

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


@pytest.fixture
def words(model_dir, tmp_path):
    words = f"--model_name_or_path {model_dir} --output_dir {tmp_path / 'fast'} --use_cpu"
    words += f" --train_file {write_rows(tmp_path / 'train.tsv', 64)} --validation_file"
    words += f" {write_rows(tmp_path / 'dev.tsv', 8)} --num_train_epochs 1 --exit_num_train_epochs 1"
    return words.split()


def test_feed_forward_layers_are_converted_and_told_of(words, tmp_path, capsys):
    convert_feedforward.main([*words, "--share", "0.25", "--depth", "1"])
    printed = capsys.readouterr().out
    assert "mean_exit_layer" in printed and f"its card are in {tmp_path / 'fast'}." in printed
    fast = FastBertForSequenceClassification.from_pretrained(tmp_path / "fast")
    assert (fast.config.feed_forward["leaf_size"], fast.config.feed_forward["master_size"]) == (8, 8)


@pytest.mark.parametrize("retraining", ["distillation", "labels"])
def test_texts_become_shorter_and_are_told_of(retraining, words, tmp_path, capsys):
    coarsening.main([*words, *f"--target 0.6 --merge drop --retraining {retraining}".split()])
    assert "mean_exit_layer" in capsys.readouterr().out
    short = FastBertForSequenceClassification.from_pretrained(tmp_path / "fast")
    assert short.config.coarsening == {
        **retention_schedule(4, 0.6),
        "merge": "drop",
        "clusters": 1,
        "size_aware": True,
    }
    assert short.config.distilled_for


def test_a_search_finds_where(words, tmp_path):
    coarsening.main([*words, *"--search --target 0.5 --layers 1 2 3".split()])
    short = FastBertForSequenceClassification.from_pretrained(tmp_path / "fast")
    assert short.config.coarsening["retention"] != retention_schedule(4, 0.5, [1, 2, 3])["retention"]


@pytest.mark.parametrize("main", [convert_feedforward.main, coarsening.main])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give --train_file"),
        ("--train_file no.tsv", "there is no file no.tsv"),
        ("--train_file {train} --seet 2", "did you mean --seed"),
        ("--train_file {train} --model_name_or_path no/folder", "cannot be loaded"),
    ],
)
def test_what_is_wrong_is_one_line(main, words, message, tmp_path, capsys):
    train = write_rows(tmp_path / "train.tsv", 8)
    with pytest.raises(SystemExit) as error:
        main(words.format(train=train).split())
    told = f"{error.value}{capsys.readouterr().err}"
    assert message in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (convert_feedforward.main, "--share 2", "share must be in"),
        (coarsening.main, "--target 2", "target must be in"),
        (coarsening.main, "--merge max", "one of mean, weighted, drop"),
        (coarsening.main, "--retraining hope", "one of distillation, labels"),
        (coarsening.main, "--speed 0.5", "for the search alone"),
        (coarsening.main, "--search --speed 0.5", "needs exits that are trained"),
    ],
)
def test_what_the_stage_refuses_is_one_line(main, words, message, model_dir, tmp_path, capsys):
    train = write_rows(tmp_path / "train.tsv", 8)
    with pytest.raises(SystemExit) as error:
        main(f"--train_file {train} --model_name_or_path {model_dir} --use_cpu {words}".split())
    told = f"{error.value}{capsys.readouterr().err}"
    assert message in told and "Traceback" not in told
