"""What holds for a model of every task: both stages of training, dials, metrics, int8 layers, adapters, its code."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from copy import deepcopy
from functools import cache, partial
from tempfile import TemporaryDirectory

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from fastbert_hf import (
    FastBertForTokenClassification,
    SelfDistillationArguments,
    SelfDistillationTrainer,
    calibrate,
    choose_speed,
    save_with_code,
)
from fastbert_hf.calibration.texts import MOST_SHARED, known_again, share_known
from fastbert_hf.evaluation import ExitRecord, record_exits, replay_at_speed, sweep_speeds
from fastbert_hf.modeling.int8_layers import Int8Linear
from fastbert_hf.rows import PaddingCollator
from fastbert_hf.training import task_metric
from fastbert_hf.training.checked_trainer import CheckedTrainer

from ..common import (
    NUM_LAYERS,
    assert_close,
    changed_parameters,
    copied_state,
    student_names,
    tiny_stock_model,
    training_settings,
)
from .common import (
    LABELS,
    OWN,
    TASK_MODELS,
    TASKS,
    class_of,
    encoded_texts,
    gold_of,
    metrics_of_task,
    padded,
    policies_of,
    rows_of,
    stock_task_model,
    wrapped,
)


# A process that cannot import the package.
ELSEWHERE = """
import json, sys
sys.modules["fastbert_hf"] = None
import torch
from transformers import AutoModelForTokenClassification
model = AutoModelForTokenClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
texts = json.loads(sys.argv[2])
answers = [list(model.predict(texts, speed=speed)) for speed in (0.0, 0.6)]
module = type(model).__module__.partition(".")[0]
print("\\n" + json.dumps([module, [[(own.logits.tolist(), own.exit_layer) for own in part] for part in answers]]))
"""
TASK_METRICS = [(task, metric) for task in TASKS for metric in metrics_of_task(task)]


def finite(metrics: dict) -> bool:
    return all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("trainer_class", [Trainer, CheckedTrainer])
@pytest.mark.parametrize("task", TASKS)
def test_stage_one_trains_the_backbone_and_the_teacher(task, trainer_class, tmp_path):
    model = class_of(task).from_backbone(tiny_stock_model(), **LABELS[task], **OWN[task])
    rows, before = rows_of(task, 20), copied_state(model)
    arguments = TrainingArguments(**training_settings(tmp_path, learning_rate=2e-3, max_steps=10))
    others = {"data_collator": PaddingCollator.of(model)} if trainer_class is Trainer else {}
    metrics = partial(task_metric, config=model.config)
    trainer = trainer_class(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics, **others)
    untrained = trainer.evaluate()
    trainer.train()
    trained = trainer.evaluate()
    name = metrics_of_task(task)[0]
    assert finite(trained) and f"eval_{name}" in trained
    assert trained["eval_loss"] < untrained["eval_loss"]
    changed = changed_parameters(model, before)
    assert not changed & student_names(model)
    assert any(name.startswith("fastbert.") for name in changed)
    assert f"exits.{NUM_LAYERS - 1}.out_proj.weight" in changed


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no_labels"])
@pytest.mark.parametrize("task", TASKS)
def test_stage_two_trains_the_students_with_labels_or_without(task, labels, tmp_path):
    model = wrapped(task, stock_task_model(task))
    rows, before = rows_of(task, 20, labels=labels), copied_state(model)
    settings = training_settings(tmp_path, learning_rate=2e-3, max_steps=10, eval_speeds=[0.3, 1.0])
    trainer = SelfDistillationTrainer(
        model, SelfDistillationArguments(**settings), train_dataset=rows, eval_dataset=rows
    )
    untrained = trainer.evaluate()
    trainer.train()
    trained = trainer.evaluate()
    assert finite(untrained) and finite(trained)
    assert trained["eval_loss"] < untrained["eval_loss"]
    assert {"eval_mean_exit_layer_speed_0.3", "eval_agreement_speed_1"} <= trained.keys()
    assert (f"eval_{metrics_of_task(task)[0]}_speed_1" in trained) == labels
    changed = changed_parameters(model, before)
    assert changed and not changed - student_names(model)
    assert trainer.predict(rows).predictions.shape[:2] == (20, NUM_LAYERS)
    # What is measured is what the model answers.
    model.eval()
    asked = rows_of(task, 20, labels=False)
    if labels and task == "tokens":  # those without a label do not count
        asked = [
            {**row, "token_mask": [int(label != -100) for label in own["labels"]]}
            for row, own in zip(asked, rows, strict=True)
        ]
    layers = [answer.exit_layer for answer in model.predict(asked, speed=0.3)]
    assert trained["eval_mean_exit_layer_speed_0.3"] == pytest.approx(sum(layers) / len(layers))


@pytest.mark.parametrize("task", TASKS)
def test_a_student_that_says_what_the_teacher_says_has_no_divergence(task):
    model = TASK_MODELS[task]()
    record = record_exits(model, encoded_texts(), progress=False)
    task_object = model.policy().task
    own = record.exit_logits[:, -1]
    assert_close(task_object.divergence(own, own, 2.0), torch.zeros(len(own)))
    assert (task_object.divergence(record.exit_logits[:, :-1], own[:, None]) > 1e-4).all()
    assert not task_object.differs(own, own).any()
    assert task_object.differs(record.exit_logits[:, 0], own).any()


@cache
def distilled(task: str):
    """A model whose students have learnt a little of its teacher."""
    with TemporaryDirectory() as folder:
        settings = training_settings(folder, learning_rate=5e-3, max_steps=30, logging_steps=30)
        model, rows = wrapped(task, stock_task_model(task), exit_hidden_size=16), rows_of(task, 120, labels=False)
        SelfDistillationTrainer(model, SelfDistillationArguments(**settings), train_dataset=rows).train()
    return model.eval()


@pytest.mark.parametrize("policy", ["own", "learned"])
@pytest.mark.parametrize("task", TASKS)
def test_a_calibrated_model_can_be_asked_for_a_speed_up_and_for_a_share_of_differing_answers(task, policy, tmp_path):
    texts, others = (
        [dict(text) for text in encoded_texts(260, seed, 14) if len(text["input_ids"]) > 3] for seed in (3, 4)
    )
    if task == "tokens":  # certificates are for tokens that are named
        for row in (*texts, *others):
            row["token_mask"] = [1] * len(row["input_ids"])
    model = deepcopy(distilled(task))
    asked = None if policy == "own" else policy
    calibration = calibrate(model, texts, exit_policy=asked, progress=False)
    assert model.config.exit_policy == (asked or TASK_MODELS[task]().config.exit_policy)
    assert set(calibration.agreements) == set(policies_of(task))
    assert all(0 <= share <= 1 for of_policy in calibration.agreements.values() for share in of_policy.values())
    assert calibration.greatest > 1
    model.save_pretrained(tmp_path)
    model = class_of(task).from_pretrained(tmp_path).eval()
    wanted = 1 + 0.7 * (calibration.greatest - 1)
    record = record_exits(model, texts, progress=False)
    full = replay_at_speed(record, model.config, 0.0)
    layers = torch.tensor([answer.exit_layer for answer in model.predict(texts, speedup=wanted)])
    assert layers.sum() < full.exit_layer.sum()
    certificate = model.certify(others, max_disagreement=0.9, confidence=0.9, progress=False)
    assert certificate.speed_up > 0
    answers = list(model.predict(texts, max_disagreement=0.9, confidence=0.9))
    task_object = model.policy().task
    differs = [
        task_object.differs(answer.logits, own[: len(text["input_ids"])] if task == "tokens" else own).item()
        for answer, own, text in zip(answers, full.logits, texts, strict=True)
    ]
    assert sum(differs) / len(texts) <= 0.9


@pytest.mark.parametrize("num_labels", [1, 2, 3])
@pytest.mark.parametrize("deviation", [0.25, 1.0])
def test_unrelated_texts_are_not_taken_for_known_ones(num_labels, deviation):
    generator = torch.Generator().manual_seed(0)
    first, second = (
        ExitRecord(
            deviation * torch.randn(1000, 4, num_labels, generator=generator),
            torch.randint(8, 40, (1000, 1), generator=generator).expand(-1, 4),
            torch.ones(1000, 4).long(),
        )
        for _ in range(2)
    )
    assert share_known(second, known_again(first)) < MOST_SHARED / 2
    assert share_known(first, known_again(first)) == 1


@pytest.mark.parametrize("task", TASKS)
def test_labels_tell_how_many_right_answers_are_lost(task):
    rows = rows_of(task, 120, seed=1)
    if task in ("one_number", "several_numbers"):  # so that some are within the tolerance
        model = TASK_MODELS[task](tolerance=2.0)
    else:
        model = TASK_MODELS[task]()
    certificate = model.certify(rows, max_accuracy_drop=0.5, progress=False)
    assert certificate.speed_up > 0


@pytest.mark.parametrize(("task", "metric"), TASK_METRICS)
def test_a_speed_is_chosen_and_swept_by_every_metric(task, metric):
    model = TASK_MODELS[task]()
    record = record_exits(model, rows_of(task, 80, seed=2), progress=False)
    table = sweep_speeds(model, record, (0.0, 0.2, 0.6, 1.0), policies_of(task)[:-1], metric=metric)
    assert table[metric].notna().all() and table[metric].nunique() > 1
    assert (table[table.speed == 0].agreement == 1).all()
    choice = choose_speed(model, record, max_loss=3, metric=metric)
    assert choice.metric == metric and choice.loss <= 3 + 1e-6
    assert model.config.speed == choice.speed
    expected = sweep_speeds(model, record, (choice.speed, 0.0), metric=metric)[metric].tolist()
    assert [choice.score, choice.full_score] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"metric='bleu' is not known.*choose one of .*" + metric):
        choose_speed(model, record, metric="bleu")
    assert choose_speed(model, rows_of(task, 20, labels=False), progress=False).metric == "agreement"


@pytest.mark.parametrize("task", TASKS)
def test_int8_layers_answer(task, tmp_path):
    texts, model = encoded_texts(), TASK_MODELS[task]()
    before = list(model.predict(texts))
    model.use_int8_layers()
    assert any(isinstance(part, Int8Linear) for part in model.modules())
    model.save_pretrained(tmp_path)
    loaded = class_of(task).from_pretrained(tmp_path).eval()
    for answer, again, plain in zip(model.predict(texts), loaded.predict(texts), before, strict=True):
        assert answer.logits.shape == plain.logits.shape
        assert 0 < (answer.logits - plain.logits).abs().max() < 1.0
        assert_close(answer.logits, again.logits)


@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_answers_and_learns(task):
    model, batch = TASK_MODELS[task](), padded(encoded_texts())
    with torch.no_grad():
        expected = model(**batch, speed=0.6)
    lora = LoraConfig(target_modules=["query", "value"], modules_to_save=model.exit_names())
    adapted = get_peft_model(model, lora).eval()
    with torch.no_grad():
        output = adapted(**batch, speed=0.6)
    assert_close(output.logits, expected.logits)
    assert torch.equal(output.exit_layer, expected.exit_layer)
    adapted.train()
    adapted(**batch, labels=gold_of(task, batch["attention_mask"])).loss.backward()
    learning = {name for name, weight in adapted.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert any("lora_B" in name for name in learning)
    assert any(f"exits.{NUM_LAYERS - 1}." in name for name in learning)


def test_a_model_of_tokens_answers_with_its_own_code_where_the_package_is_not(tmp_path):
    model, texts = TASK_MODELS["tokens"](), encoded_texts(6)
    save_with_code(model, tmp_path / "shared")
    config = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert "AutoModelForTokenClassification" in config["auto_map"]
    assert set(config["custom_pipelines"]) == {"fast-token-classification"}
    finished = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "shared"), json.dumps(texts)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    module, parts = json.loads(finished.stdout.splitlines()[-1])
    assert module == "transformers_modules"
    for speed, part in zip((0.0, 0.6), parts, strict=True):
        for answer, (logits, exit_layer) in zip(model.predict(texts, speed=speed), part, strict=True):
            assert_close(torch.tensor(logits), answer.logits)
            assert exit_layer == answer.exit_layer
    loaded = FastBertForTokenClassification.from_pretrained(tmp_path / "shared")
    assert type(loaded) is FastBertForTokenClassification
