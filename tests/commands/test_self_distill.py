"""Both stages of FastBERT by command, on a tiny encoder and rows whose first word tells the label."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    pipeline,
)

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.commands.self_distill import main
from fastbert_hf.training import ExitTrainer

from ..common import spread_out


WORDS = "good bad fine poor warm cold nice dull film food room we it was the not very and but never".split()
COMMON = ("--use_cpu", "--disable_tqdm", "True", "--per_device_train_batch_size", "8")
ONE_EPOCH = ("--num_train_epochs", 1, "--distill_num_train_epochs", 1)
EPOCHS = ("--num_train_epochs", 2, "--distill_num_train_epochs", 2)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """A tiny BERT classifier with a tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("backbone")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=3
    )
    spread_out(BertForSequenceClassification(config)).save_pretrained(folder)
    return folder


def rows(count: int, labels: tuple[str, ...] = ("no", "yes")) -> list[tuple[str, str, str]]:
    """Label, text and second text; the first word tells the label."""
    kinds = [index % len(labels) for index in range(count)]
    return [
        (labels[kind], f"{WORDS[kind]} {WORDS[2 + index % 17]} film", f"we {WORDS[index % 19]}")
        for index, kind in enumerate(kinds)
    ]


def write(path: Path, content: list[tuple], header: tuple[str, ...] = ("label", "text", "other")) -> str:
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    delimiter = "\t" if ".tsv" in path.name else ","
    with opened as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([header, *content])
    return str(path)


@pytest.fixture(scope="module")
def finished(backbone, tmp_path_factory) -> tuple[list[object], Path, str]:
    """A run from the beginning to the end: its options without the folder, the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    train = write(folder / "train.tsv.gz", rows(32))
    options = ["--model_name_or_path", backbone, "--train_file", train, "--validation_file", train, *EPOCHS]
    options += ["--eval_speeds", 0, 0.5, 1, "--speed", 0.3, *COMMON]
    with redirect_stdout(io.StringIO()) as printed:
        main([*map(str, options), "--output_dir", str(folder / "out")])
    return options, folder / "out", printed.getvalue()


def test_both_stages_leave_a_model_that_answers(finished, tmp_path):
    _, out, printed = finished
    assert printed.index("Stage 1") < printed.index("Stage 2") < printed.index("speed   accuracy")
    table = [line.split() for line in printed.splitlines() if line.strip().startswith(("0.00", "0.50", "1.00"))]
    assert [row[0] for row in table] == ["0.00", "0.50", "1.00"]
    assert table[0][2:] == ["3.00", "0.0%"]
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.label2id == {"no": 0, "yes": 1}
    assert model.config.speed == 0.3
    (answer,) = pipeline("fast-text-classification", model=str(out))("good film")
    assert answer.keys() == {"label", "score", "exit_layer"}
    assert not list(out.rglob("checkpoint-*")) and not list(out.rglob("part"))
    card = ModelCard.load(out / "README.md")
    for speed, accuracy, *_ in table:
        assert re.search(rf"^\| {float(speed):g} \| {accuracy} ", card.text, re.MULTILINE)
    assert "| self_distillation num_train_epochs | 2.0 |" in card.text
    assert "| fine_tuning learning_rate | 5e-05 |" in card.text
    assert str(out.parent) not in str(card)


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(run, error_of, finished, tmp_path):
    options, out, _ = finished
    shutil.copytree(out, tmp_path / "out")
    out = tmp_path / "out"
    before = (out / "model.safetensors").read_bytes()
    printed = run(*options, "--output_dir", out, "--eval_speeds", 0.25)
    assert "Stage" not in printed and "finished" in printed and " 0.25" in printed
    assert (out / "model.safetensors").read_bytes() == before
    message = error_of(*options, "--output_dir", out, "--learning_rate", 0.5)
    assert "learning_rate was 5e-05 and is 0.5" in message and "give another output_dir" in message
    (out / "settings.json").unlink()
    message = error_of(*options, "--output_dir", out)
    assert "holds a model without the settings of its training" in message


@pytest.mark.parametrize("changed", ["train_file", "unlabeled_file"])
def test_files_of_other_content_and_equal_size_are_refused(run, error_of, finished, tmp_path, backbone, changed):
    files = {"train_file": tmp_path / "train.csv", "unlabeled_file": tmp_path / "more.csv"}
    for path in files.values():
        write(path, rows(16))
    options = ["--model_name_or_path", backbone, "--output_dir", tmp_path / "out", *ONE_EPOCH, *COMMON]
    options += ["--validation_file", finished[0][3]]
    options += [word for name, path in files.items() for word in (f"--{name}", path)]
    run(*options)
    # All labels swapped, or other words of equal length.
    swaps = {"train_file": {"yes": "no", "no": "yes"}, "unlabeled_file": {"good": "fine", "cold": "room"}}
    path, swapped = files[changed], swaps[changed]
    size = path.stat().st_size
    path.write_text(re.sub(r"\w+", lambda word: swapped.get(word[0], word[0]), path.read_text()))
    assert path.stat().st_size == size
    name = {"train_file": "training rows", "unlabeled_file": "unlabeled rows"}[changed]
    message = error_of(*options)
    assert "holds a training with other settings" in message and f"{name} was '" in message


@pytest.mark.parametrize("stage", ["stage1_fine_tuning", "stage2_self_distillation"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(run, monkeypatch, finished, tmp_path, stage):
    options, whole, _ = finished
    evaluate, calls = ExitTrainer.evaluate, []

    def interrupted(self, *args, **kwargs):
        if Path(self.args.output_dir).name == stage:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("transformers.Trainer.evaluate", interrupted)
        run(*options, "--output_dir", tmp_path / "cut")
    assert [path.parent.name for path in (tmp_path / "cut").rglob("checkpoint-*")] == [stage]
    printed = run(*options, "--output_dir", tmp_path / "cut")
    assert f"Going on from {tmp_path / 'cut' / stage / 'checkpoint-'}" in printed
    states = (
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict() for folder in (whole, tmp_path / "cut")
    )
    expected, cut = states
    for name, value in expected.items():
        torch.testing.assert_close(cut[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["stock", "fastbert"])
def test_distill_only_keeps_the_teacher_and_needs_no_labels_to_train(run, tmp_path, backbone, kind):
    start = backbone
    if kind == "fastbert":
        start = tmp_path / "start"
        FastBertForSequenceClassification.from_classifier(backbone).save_pretrained(start)
        BertTokenizer.from_pretrained(backbone).save_pretrained(start)
    train = write(tmp_path / "texts.csv", [row[1:] for row in rows(16)], ("text", "other"))
    validation = write(tmp_path / "dev.csv", rows(8, ("0", "1")))
    out = tmp_path / "out"
    options = ("--model_name_or_path", start, "--train_file", train, "--validation_file", validation)
    run(*options, "--output_dir", out, "--distill_only", "True", "--distill_num_train_epochs", 1, *COMMON)
    stock = BertForSequenceClassification.from_pretrained(backbone)
    inputs = BertTokenizer.from_pretrained(out)("good film", return_tensors="pt")
    with torch.no_grad():
        answer = AutoModelForSequenceClassification.from_pretrained(out)(**inputs).logits
        torch.testing.assert_close(answer, stock(**inputs).logits, rtol=0, atol=1e-5)
    assert [path.name for path in out.glob("stage*")] == ["stage1_self_distillation"]
    assert "| fine_tuning" not in (out / "README.md").read_text()


def test_pairs_unlabeled_texts_and_a_json_file(run, monkeypatch, tmp_path, backbone):
    settings = {
        "model_name_or_path": str(backbone),
        "train_file": write(tmp_path / "train.csv", rows(32)),
        "validation_file": write(tmp_path / "dev.csv", rows(8)),
        "unlabeled_file": write(tmp_path / "more.csv", [row[1:] for row in rows(40)], ("text", "other")),
        "text_pair_column": "other",
        "output_dir": str(tmp_path / "out"),
        "max_train_samples": 16,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "distill_num_train_epochs": 1,
        "temperature": 2,
        "reverse_kl": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    seen, train = [], ExitTrainer.train
    monkeypatch.setattr(ExitTrainer, "train", lambda self, **kwargs: (seen.append(self), train(self, **kwargs))[1])
    run(path)
    (trainer,) = seen
    texts = trainer.train_dataset
    assert len(texts) == 16 + 40 and "labels" not in texts.column_names
    assert all(1 in row for row in texts["token_type_ids"])
    assert (trainer.args.temperature, trainer.args.reverse_kl, trainer.args.learning_rate) == (2, True, 1e-3)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("loss", False)


def test_a_data_set_is_found_by_its_name(run, error_of, tmp_path, backbone):
    folder = tmp_path / "reviews"
    folder.mkdir()
    write(folder / "train.csv", rows(24, ("no", "yes", "both")))
    write(folder / "test.csv", rows(6))
    options = ("--model_name_or_path", backbone, "--output_dir", tmp_path / "out", *ONE_EPOCH, *COMMON)
    run(*options, "--dataset_name", folder)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 3
    message = error_of(*options, "--dataset_name", "nobody/has-this")
    assert "the data set nobody/has-this cannot be loaded" in message


def test_the_smallest_training_and_any_metric_of_the_best_checkpoint_go_through(run, tmp_path, backbone):
    train = write(tmp_path / "train.csv", rows(4))
    options = ("--model_name_or_path", backbone, "--train_file", train, "--validation_file", train, *ONE_EPOCH)
    printed = run(*options, "--output_dir", tmp_path / "out", *COMMON)
    assert "0.80" in printed
    best = ("--save_strategy", "best", "--metric_for_best_model", "accuracy")
    assert "0.80" in run(*options, "--output_dir", tmp_path / "best", *best, *COMMON)


def test_a_push_that_will_fail_fails_before_the_training(error_of, finished, tmp_path):
    options = (*finished[0], "--output_dir", tmp_path / "out", "--push_to_hub")
    message = error_of(*options)
    assert (
        "--push_to_hub cannot reach its repository: Cannot reach https://huggingface.co/api/repos/create: " in message
    )
    assert "offline mode is enabled" in message and not (tmp_path / "out").exists()


def test_a_push_that_fails_after_the_training_leaves_the_model(error_of, monkeypatch, finished, tmp_path):
    """As where the network was lost on the way."""
    options, out, _ = finished
    shutil.copytree(out, tmp_path / "out")
    monkeypatch.setattr("fastbert_hf.commands.self_distill.repository_of", lambda folder, training: None)
    message = error_of(*options, "--output_dir", tmp_path / "out", "--push_to_hub")
    assert "it could not be pushed, which this command will try again without training" in message


def test_exits_of_a_model_that_has_them_cannot_be_chosen(error_of, finished, tmp_path):
    options, out, _ = finished
    options = (*options, "--model_name_or_path", out, "--distill_only", "True", "--output_dir", tmp_path / "out")
    message = error_of(*options, "--exit_type", "linear")
    assert "the model was built with exit_type='attention': leave out exit_type='linear'" in message
    assert not (tmp_path / "out").exists()


def test_bad_rows_and_options_are_named_before_any_training(error_of, tmp_path, backbone):
    train = write(tmp_path / "train.csv", rows(24))
    model = ("--model_name_or_path", backbone, "--output_dir", tmp_path / "out")
    fine = (*model, "--train_file", train, "--validation_file", train)

    def check(expected: str, *options, **settings) -> None:
        message = error_of(*options, *COMMON, **settings)
        assert expected in message, message
        assert not (tmp_path / "out").exists()

    check("there is no file nowhere.csv: correct --train_file", *model, "--train_file", "nowhere.csv")
    check("no column 'sentence', only label, text, other: correct text_column", *fine, "--text_column", "sentence")
    check("correct label_column", *fine, "--label_column", "gold")
    check("correct text_pair_column", *fine, "--text_pair_column", "second")
    check("give the encoder to start from", "--train_file", train, "--output_dir", tmp_path / "out")
    check("give the data to learn from", *model)
    check("the model cannot be loaded", *fine, "--model_name_or_path", tmp_path)
    check("--exit_type must be one of", *fine, "--exit_type", "round")
    check("--exit_policy must be one of", *fine, "--exit_policy", "luck")
    check("speed must be a number in [0, 1], got 2.0", *fine, "--eval_speeds", 2)
    check("--temperature must be above 0, got 0.0", *fine, "--temperature", 0)
    check("not both", *fine, "--dataset_name", "imdb")
    for name, content, expected in (
        ("fractions.csv", rows(24, ("0.5", "0.25")), "fractions"),
        ("one_label.csv", rows(24, ("yes",)), "1 label"),
    ):
        check(expected, *fine, "--train_file", write(tmp_path / name, content))
    unknown = write(tmp_path / "dev.csv", [*rows(8), ("perhaps", "good film", "x")])
    check("1 rows of the validation data have the label 'perhaps'", *fine, "--validation_file", unknown)
    # The row of the file, whichever rows are held out for validation or left out.
    some = [*rows(33), ("yes", " ", "x"), *rows(6)]
    blank = ("--train_file", write(tmp_path / "blank.csv", some))
    expected = "1 rows of the training data have no text in 'text' (the first is row 33, counted from 0): remove them"
    check(expected, *model, *blank)
    check(expected, *fine, *blank, "--max_train_samples", "4")
    for kind, label in (("listed", ["yes"]), ("named", {"yes": 1})):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for _, text, _ in rows(24)))
        check("each row of the training data has several values in 'label'", *model, "--train_file", path)
    check("learning_rate must be from 0 on, got -1.0. The default is 0.0002", *fine, "--distill_learning_rate", "-1")
    few = write(tmp_path / "few.csv", rows(19))
    check("19 training rows are too few to hold out a tenth of them", *model, "--train_file", few)
    assert "foo is not supported, only " in error_of(*fine, "--report_to", "foo", *COMMON)
