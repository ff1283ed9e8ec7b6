"""`train`: from texts to a model that answers, in one call; refused, and what it takes and gives back."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, BertForSequenceClassification, Trainer

import fastbert_hf
from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.training import ExitTraining, FineTuning, Trained

from ..common import (
    assert_close,
    assert_same_weights,
    copied_state,
    stock,
    student_names,
    tiny_model,
    tiny_stock_model,
    tiny_texts,
    tiny_tokenizer,
)
from .common import assert_moved


QUIET = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "per_device_train_batch_size": 8, "seed": 1}
STAGES = [FineTuning(1e-3, 2), ExitTraining(1e-3, 1)]
LABELS = ("no", "so", "yes")


def rows(number: int = 24, labels: tuple = LABELS, seed: int = 0) -> list[dict]:
    texts = tiny_texts(number, seed)
    return [{"text": text, "label": labels[index % len(labels)]} for index, text in enumerate(texts)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A pretrained encoder and its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny_stock_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A fine-tuned stock classifier of two layers and its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("classifier")
    names = dict(enumerate(LABELS))
    stock(id2label=names, label2id={name: index for index, name in names.items()}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(encoder, tmp_path_factory) -> tuple[Trained, Path]:
    """What a call with an `output_dir` returns, and that folder, which is to stay as it is."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    trained = fastbert_hf.train(
        str(encoder), rows(), rows(8, seed=1), stages=STAGES, output_dir=folder, config={"speed": 0.3}, **QUIET
    )
    return trained, folder


@pytest.fixture
def trainers(monkeypatch) -> list[Trainer]:
    """The trainer of every stage that is trained, in order."""
    seen, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, **kwargs: (seen.append(self), train(self, **kwargs))[1])
    return seen


def test_both_stages_leave_a_model_that_answers_and_a_table_of_its_speeds(finished):
    trained, folder = finished
    model = trained.model
    assert not model.training and model.config.id2label == dict(enumerate(LABELS))
    # Also those that were not asked for: full depth, and the model's own.
    assert {0.0, 0.3, 0.5} <= set(trained.table["speed"])
    assert {"accuracy", "mean_exit_layer"} <= set(trained.table.columns)
    assert trained.table["mean_exit_layer"][0] == 4
    (answer,) = trained.pipeline(speed=0.5)("word7 word9")
    assert answer["label"] in LABELS and 1 <= answer["exit_layer"] <= 4
    assert {path.name for path in folder.iterdir()} >= {"config.json", "README.md", "tokenizer.json", "settings.json"}
    assert "| self_distillation learning_rate | 0.001 |" in (folder / "README.md").read_text()
    assert_same_weights(FastBertForSequenceClassification.from_pretrained(folder), model)
    assert AutoTokenizer.from_pretrained(folder)("word7").input_ids == tiny_tokenizer()("word7").input_ids


def test_a_finished_call_trains_nothing_and_says_so(finished, encoder, trainers, tmp_path, capsys):
    trained, folder = finished
    folder = shutil.copytree(folder, tmp_path / "out")
    # What leaves no trace in the model may change, and so may the form of the rows.
    settings = {**QUIET, "logging_steps": 7, "save_strategy": "no", "warmup_steps": 0.1, "config": {"speed": 0.3}}
    again = fastbert_hf.train(
        str(encoder),
        Dataset.from_list(rows()),
        pd.DataFrame(rows(8, seed=1)),
        stages=STAGES,
        output_dir=folder,
        **settings,
    )
    assert not trainers and f"{folder} holds this training, finished" in capsys.readouterr().out
    assert_same_weights(again.model, trained.model)
    pd.testing.assert_frame_equal(again.table, trained.table)


def swapped(row: dict) -> dict:
    return {**row, "label": {"no": "yes", "yes": "no"}.get(row["label"], row["label"])}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_rows": [swapped(row) for row in rows()]}, r"training rows was '\w+' and is '\w+'"),
        ({"train_rows": rows(seed=3)}, "training rows was"),
        (
            {"train_rows": rows(labels=("nay", "so", "yes"))},
            r"labels was \['no', 'so', 'yes'\] and is \['nay', 'so', ",
        ),
        ({"unlabeled": tiny_texts(4)}, "unlabeled rows was None and is"),
        (
            {"stages": [FineTuning(1e-3, 2), ExitTraining(1e-3, 7)]},
            "self_distillation num_train_epochs was 1 and is 7",
        ),
        ({"stages": [FineTuning(1e-3, 2)]}, "self_distillation learning_rate was 0.001 and is None"),
        ({"config": {"speed": 0.7}}, r"speed was 0\.3 and is 0\.7"),
        ({"seed": 2}, "seed was 1 and is 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_other_rows_or_settings_are_refused_in_the_same_folder(finished, encoder, changed, message):
    settings = {"train_rows": rows(), "stages": STAGES, "config": {"speed": 0.3}, **QUIET, **changed}
    with pytest.raises(ValueError, match=rf"holds a training with other settings \(.*{message}.*give another output"):
        fastbert_hf.train(str(encoder), output_dir=finished[1], **settings)


def test_a_folder_that_knows_its_files_by_size_alone_says_what_to_do(encoder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "settings.json").write_text(json.dumps({"learning_rate": 5e-5, "size of train_file": 812}))
    message = r"by an earlier version, which knew its files by their sizes alone.*give another output_dir, or delete"
    with pytest.raises(ValueError, match=message):
        fastbert_hf.train(str(encoder), rows(), output_dir=tmp_path, **QUIET)


def test_a_classifier_goes_through_stage_two_alone_on_texts_without_labels(classifier, trainers):
    trained = fastbert_hf.train(classifier, tiny_texts(16), **QUIET)
    assert [trainer.args.num_train_epochs for trainer in trainers] == [5] and trained.table is None
    stock_model = BertForSequenceClassification.from_pretrained(classifier)
    inputs = tiny_tokenizer()(tiny_texts(5), padding=True, return_tensors="pt")
    with torch.no_grad():
        assert_close(trained.model(**inputs).logits, stock_model(**inputs).logits)
    assert trained.model.config.id2label == dict(enumerate(LABELS))
    fresh = FastBertForSequenceClassification.from_classifier(classifier).state_dict()
    moved = {name for name, value in trained.model.state_dict().items() if not torch.equal(value, fresh[name])}
    assert moved and moved <= student_names(trained.model)


def test_a_folder_gets_a_card_where_nothing_was_measured(classifier, tmp_path):
    trained = fastbert_hf.train(classifier, tiny_texts(8), stages=STAGES[1:], output_dir=tmp_path / "out", **QUIET)
    assert trained.table is None and trained.model.measured is None
    assert "self_distillation learning_rate" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["encoder", "classifier", "untrained head", "fastbert", "untrained fastbert"])
def test_loaded_models_are_taken_and_left_alone(trainers, kind):
    make = {
        "encoder": tiny_stock_model,
        "classifier": lambda: stock(num_layers=4),
        "untrained head": lambda: BertForSequenceClassification(stock(num_layers=4).config),
        "fastbert": tiny_model,
        "untrained fastbert": lambda: FastBertForSequenceClassification.from_backbone(
            tiny_stock_model(), num_labels=3
        ),
    }
    model = make[kind]()
    before = copied_state(model)
    labels = LABELS if kind in ("encoder", "untrained head") else ("0", "1", "2")
    trained = fastbert_hf.train(model, rows(8, labels), tokenizer=tiny_tokenizer(), max_steps=1, **QUIET)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    stages = 2 if kind in ("encoder", "untrained head", "untrained fastbert") else 1
    assert len(trainers) == stages
    assert trained.model is not model and trained.model.config.num_labels == 3
    if labels is LABELS:
        assert trained.model.config.id2label == dict(enumerate(LABELS))


def test_a_model_that_its_last_training_left_frozen_is_fine_tuned_as_a_whole():
    model = tiny_model()
    before = copied_state(model)
    model.requires_grad_(False)
    numbers = rows(8, ("0", "1", "2"))
    trained = fastbert_hf.train(model, numbers, tokenizer=tiny_tokenizer(), stages=STAGES[:1], max_steps=1, **QUIET)
    assert_moved(trained.model, before, set(before) - student_names(model))


def test_rows_may_be_a_file_pairs_and_of_other_columns(encoder, trainers, tmp_path):
    pairs = [{**row, "text_pair": "word9"} for row in rows(8)]
    fastbert_hf.train(encoder, pairs, stages=STAGES[:1], max_steps=1, **QUIET)
    assert all(1 in row for row in trainers[-1].train_dataset["token_type_ids"])
    named = [{"sentence": row["text"], "gold": row["label"], "note": "x"} for row in rows(8)]
    pd.DataFrame(named).to_csv(tmp_path / "train.csv", index=False)
    columns = {"text_column": "sentence", "label_column": "gold", "max_length": 4}
    trained = fastbert_hf.train(encoder, tmp_path / "train.csv", stages=STAGES[:1], max_steps=1, **columns, **QUIET)
    assert max(map(len, trainers[-1].train_dataset["input_ids"])) == 4
    assert trained.model.config.id2label == dict(enumerate(LABELS))


def test_texts_without_labels_join_stage_two_alone(encoder, trainers):
    fastbert_hf.train(encoder, rows(8), unlabeled=tiny_texts(10, seed=2), max_steps=1, **QUIET)
    assert [len(trainer.train_dataset) for trainer in trainers] == [8, 18]
    assert ["labels" in trainer.train_dataset.column_names for trainer in trainers] == [True, False]


def test_one_step_is_enough_to_learn(encoder):
    """A share of warm-up is rounded up, which would make all of a single step warm-up, at a learning rate of 0."""
    stages = [FineTuning(1e-3, 1), ExitTraining(1e-3, 1)]
    trained = fastbert_hf.train(encoder, rows(4), stages=stages, **QUIET)
    assert trained.model.teacher.out_proj.bias.any()
    assert all(student.out_proj.bias.any() for student in trained.model.students)


@cache
def one_model() -> FastBertForSequenceClassification:
    return tiny_model()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"learning_rate": 1e-3},
            ValueError,
            r"learning_rate is no argument of all stages: give it to a stage: stages=",
        ),
        ({"push_to_hub": True}, ValueError, r"push the result: trained\.model\.push_to_hub"),
        ({"per_device_train_batchsize": 8}, TypeError, "did you mean 'per_device_train_batch_size'"),
        ({"output_dri": "x"}, TypeError, r"unexpected keyword argument 'output_dri': did you mean 'output_dir'\?"),
        ({"config": {"exit_typ": "linear"}}, TypeError, "unexpected exit_typ"),
        ({"config": {"speed": 2}}, ValueError, r"speed must be a number in \[0, 1\], got 2"),
        (
            {"config": {"exit_type": "linear"}},
            ValueError,
            "built with exit_type='attention': leave out exit_type='lin",
        ),
        ({"tokenizer": None}, ValueError, "it does not say where its tokenizer is: give tokenizer=name"),
        ({"tokenizer": "no/such"}, ValueError, "the model cannot be loaded: "),
        ({"metric_for_best_model": "f1"}, ValueError, "metric_for_best_model='f1' is measured in no stage: give 'acc"),
        ({"text_column": "body"}, ValueError, "no column 'body', only text, label: correct text_column"),
        ({"stages": [FineTuning()], "label_column": "gold"}, ValueError, "no column 'gold'.*correct label_column"),
        ({"eval_rows": rows(3, ("?",))}, ValueError, r"3 rows of the validation data have the label '\?'"),
        ({"stages": []}, ValueError, r"stages must be a list of stages, got \[\]. Example: \[FineTuning\(\), "),
        ({"stages": FineTuning()}, ValueError, r"stages must be a list of stages, got FineTuning\("),
        ({"stages": [FineTuning]}, ValueError, "stages must be a list of stages, got "),
        ({"eval_speeds": [0.5, 2]}, ValueError, r"speed must be a number in \[0, 1\], got 2"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1 token, got 0"),
        ({"stages": [ExitTraining(temperature=0)]}, ValueError, "temperature must be a number above 0, got 0"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_before_any_training(trainers, tmp_path, settings, error, message):
    settings = {"tokenizer": tiny_tokenizer(), "output_dir": tmp_path / "out", **QUIET, **settings}
    with pytest.raises(error, match=message):
        fastbert_hf.train(one_model(), rows(8, ("0", "1", "2")), **settings)
    assert not trainers and not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"learning_rate": -1.0}, {"num_train_epochs": 0}, {"learning_rate": float("nan")}])
def test_a_stage_that_cannot_learn_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be (above 0|from 0 on), got "):
        ExitTraining(**wrong)


@pytest.mark.parametrize("metric", ["accuracy", "eval_accuracy_speed_0.5"])
def test_each_stage_keeps_its_best_checkpoint_by_what_it_measures(encoder, trainers, metric):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": metric, **QUIET}
    fastbert_hf.train(encoder, rows(16), rows(8, seed=1), stages=STAGES, **settings)
    by = [(trainer.args.metric_for_best_model, trainer.state.best_metric is not None) for trainer in trainers]
    assert by == [(metric, True), ("loss", True)][:: 1 if metric == "accuracy" else -1]
