"""What `ExitTrainer` reports: its losses, and at every speed what the live model would answer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator, pipeline

from fastbert_hf import SelfDistillationArguments, SelfDistillationTrainer

from ..common import (
    NUM_LAYERS,
    assert_close,
    changed_parameters,
    copied_state,
    tiny_model,
    tiny_rows,
    tiny_texts,
    tiny_tokenizer,
    training_settings,
)
from .common import exit_logits_of, float64_divergences


STUDENTS = range(1, NUM_LAYERS)


def stage_two(tmp_path, model, rows=None, eval_rows=None, compute_metrics=None, **settings) -> SelfDistillationTrainer:
    return SelfDistillationTrainer(
        model,
        SelfDistillationArguments(**training_settings(tmp_path, **settings)),
        train_dataset=tiny_rows() if rows is None else rows,
        eval_dataset=eval_rows,
        compute_metrics=compute_metrics,
    )


@pytest.mark.parametrize(
    ("policy", "patience"),
    [("entropy", 1), ("confidence", 1), ("margin", 1), ("patience", 1), ("patience", 2), ("patience", 3)],
)
def test_evaluation_in_one_full_depth_pass_reports_what_adaptive_calls_give(tmp_path, policy, patience):
    model = tiny_model(seed=2, exit_policy=policy, patience=patience)
    rows = tiny_rows(22)
    names = ["0", "0.1", "0.34", "0.5", "0.65", "0.8", "1"]
    trainer = stage_two(
        tmp_path,
        model,
        eval_rows=rows,
        eval_speeds=[float(name) for name in names],
        per_device_eval_batch_size=4,
    )
    calls = {"embeddings": 0, "layers": 0}

    def count(part):
        calls[part] += 1

    handles = [model.fastbert.backbone.embeddings.register_forward_hook(lambda *call: count("embeddings"))]
    handles += [layer.register_forward_hook(lambda *call: count("layers")) for layer in model.fastbert.layers()]
    metrics = trainer.evaluate()
    for handle in handles:
        handle.remove()
    assert calls == {"embeddings": 6, "layers": 6 * NUM_LAYERS}

    batch = default_data_collator(rows)
    labels = batch.pop("labels")
    model.eval()
    depths = set()
    with torch.no_grad():
        teacher = model(**batch).logits.argmax(-1)
        for name in names:
            output = model(**batch, speed=float(name))
            answers = output.logits.argmax(-1)
            depths.update(output.exit_layer.tolist())
            expected = {
                f"eval_accuracy_speed_{name}": (answers == labels).float().mean().item(),
                f"eval_agreement_speed_{name}": (answers == teacher).float().mean().item(),
                f"eval_mean_exit_layer_speed_{name}": output.exit_layer.float().mean().item(),
            }
            assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert len(depths) > 1
    assert metrics["eval_agreement_speed_0"] == 1
    assert metrics["eval_mean_exit_layer_speed_0"] == NUM_LAYERS
    assert metrics["eval_mean_exit_layer_speed_1"] < NUM_LAYERS


@pytest.mark.parametrize(
    ("limits", "fastest", "slowest"),
    [
        ({"min_exit_layer": 3}, 3, NUM_LAYERS),
        ({"max_layers": 2}, 1, 2),
        ({"min_exit_layer": 2, "max_layers": 3, "exit_policy": "patience"}, 3, 3),
    ],
    ids=["min_exit_layer", "max_layers", "both"],
)
def test_limits_of_the_config_count_as_in_the_pipeline(tmp_path, limits, fastest, slowest):
    model, tokenizer, texts = tiny_model(seed=2, **limits), tiny_tokenizer(), tiny_texts(20)
    rows = Dataset.from_dict(tokenizer(texts))
    arguments = SelfDistillationArguments(**training_settings(tmp_path, eval_speeds=[0.0, 0.7, 1.0]))
    metrics = SelfDistillationTrainer(model, arguments, eval_dataset=rows, processing_class=tokenizer).evaluate()
    assert metrics["eval_mean_exit_layer_speed_1"] == fastest
    assert metrics["eval_mean_exit_layer_speed_0"] == slowest
    classifier = pipeline("fast-text-classification", model=model, tokenizer=tokenizer)
    for row in model.measured.speeds:
        exit_layers = [answer["exit_layer"] for answer in classifier(texts, speed=row["speed"])]
        assert row["mean_exit_layer"] == pytest.approx(sum(exit_layers) / len(texts))
        assert metrics[f"eval_mean_exit_layer_speed_{row['speed']:g}"] == row["mean_exit_layer"]


@pytest.mark.parametrize("reverse_kl", [False, True])
def test_evaluation_loss_is_the_sum_of_the_divergences_over_all_rows(tmp_path, reverse_kl):
    model = tiny_model()
    rows = tiny_rows(22)
    trainer = stage_two(tmp_path, model, eval_rows=rows, per_device_eval_batch_size=4, reverse_kl=reverse_kl)
    metrics = trainer.evaluate()
    expected = float64_divergences(exit_logits_of(model, rows), reverse_kl)
    for depth, divergence in enumerate(expected, start=1):
        assert metrics[f"eval_kl_exit_{depth}"] == pytest.approx(divergence, abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(sum(expected), abs=1e-5)
    assert f"eval_kl_exit_{NUM_LAYERS}" not in metrics


def test_evaluation_without_labels_reports_all_but_the_accuracy(tmp_path):
    model = tiny_model()
    settings = {"per_device_eval_batch_size": 4}
    with_labels = stage_two(tmp_path, model, eval_rows=tiny_rows(10), **settings).evaluate()
    without_labels = stage_two(tmp_path, model, eval_rows=tiny_rows(10, labels=False), **settings).evaluate()

    missing = {f"eval_accuracy_speed_{speed}" for speed in ("0.1", "0.5", "0.8")}
    assert with_labels.keys() - without_labels.keys() == missing
    shared = {key for key in without_labels if "speed_" in key or "kl_exit" in key or key == "eval_loss"}
    assert len(shared) == 2 * 3 + len(STUDENTS) + 1
    assert {key: without_labels[key] for key in shared} == pytest.approx({key: with_labels[key] for key in shared})


def test_custom_metrics_are_reported_at_every_speed(tmp_path):
    model = tiny_model()
    rows = tiny_rows(10)
    predictions = []

    def compute_metrics(prediction):
        predictions.append(prediction)
        return {"first_label": float((prediction.predictions.argmax(-1) == 0).mean())}

    trainer = stage_two(tmp_path, model, eval_rows=rows, compute_metrics=compute_metrics, eval_speeds=[0.0, 0.7])
    metrics = trainer.evaluate()

    batch = default_data_collator(rows)
    labels = batch.pop("labels")
    assert len(predictions) == 2
    for name, prediction in zip(("0", "0.7"), predictions, strict=True):
        with torch.no_grad():
            logits = model.eval()(**batch, speed=float(name)).logits
        assert_close(torch.from_numpy(prediction.predictions), logits)
        assert prediction.label_ids.tolist() == labels.tolist()
        expected = (logits.argmax(-1) == 0).float().mean().item()
        assert metrics[f"eval_first_label_speed_{name}"] == pytest.approx(expected)
    assert not any("accuracy" in key for key in metrics)


def test_evaluation_without_speeds_reports_only_the_divergences(tmp_path):
    metrics = stage_two(tmp_path, tiny_model(), eval_rows=tiny_rows(10), eval_speeds=[]).evaluate()
    assert not any("speed_" in key for key in metrics)
    assert {f"eval_kl_exit_{depth}" for depth in STUDENTS} <= metrics.keys()


def test_prediction_loss_only_still_reports_the_loss(tmp_path):
    model = tiny_model()
    rows = tiny_rows(8)
    metrics = stage_two(tmp_path, model, eval_rows=rows, prediction_loss_only=True).evaluate()
    expected = sum(float64_divergences(exit_logits_of(model, rows)))
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert not any("speed_" in key for key in metrics)


@pytest.mark.parametrize("labels", [True, False])
def test_predict_returns_the_logits_of_every_exit(tmp_path, labels):
    model = tiny_model()
    rows = tiny_rows(10, labels=labels)
    output = stage_two(tmp_path, model, per_device_eval_batch_size=4).predict(rows)
    assert output.predictions.shape == (10, NUM_LAYERS, 3)
    assert_close(torch.from_numpy(output.predictions), exit_logits_of(model, rows))
    assert (output.label_ids is not None) == labels
    assert "test_mean_exit_layer_speed_0.5" in output.metrics


def test_best_model_by_a_metric_at_one_speed_is_loaded_at_the_end(tmp_path):
    answers_seen, trained = [], []
    model = tiny_model()

    def compute_metrics(prediction):
        answers_seen.append(prediction)
        return {"accuracy": -float(len(answers_seen))}

    trainer = stage_two(
        tmp_path,
        model,
        eval_rows=tiny_rows(8),
        compute_metrics=compute_metrics,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy_speed_0.5",
    )
    model.teacher.register_forward_hook(lambda *call: trained.append(copied_state(model)))
    trainer.train()

    assert trainer.state.best_metric == -2
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    after_one_step, after_two_steps = trained[1], trained[3]
    assert not changed_parameters(model, after_one_step)
    assert changed_parameters(model, after_two_steps)


@pytest.mark.parametrize("metric", ["accuracy", "eval_accuracy", "accuracy_speed_0.4", "cross_entropy_exit_1"])
def test_a_best_metric_that_is_never_reported_is_refused_before_the_training(tmp_path, metric):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": metric, "eval_speeds": [0.5]}
    model = tiny_model()
    before = copied_state(model)
    with pytest.raises(ValueError, match=rf"={metric!r} is not what.*choose one such as 'loss', 'accuracy_speed_0.5'"):
        stage_two(tmp_path, model, eval_rows=tiny_rows(8), **settings).train()
    assert not changed_parameters(model, before)


@pytest.mark.parametrize("metric", ["loss", "eval_loss", "kl_exit_1", "eval_accuracy_speed_0.5"])
@pytest.mark.parametrize("several", [False, True])
def test_a_best_metric_that_is_reported_tells_the_best_model(tmp_path, metric, several):
    if several:
        metric = f"eval_other_{metric.removeprefix('eval_')}"
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": metric, "max_steps": 1}
    rows = tiny_rows(8)
    trainer = stage_two(tmp_path, tiny_model(), eval_rows={"other": rows} if several else rows, **settings)
    trainer.train()
    assert trainer.state.best_metric is not None


@pytest.mark.parametrize(("logging_steps", "accumulation"), [(1, 1), (2, 1), (2, 2)])
def test_logged_divergences_add_up_to_the_loss(tmp_path, logging_steps, accumulation):
    trainer = stage_two(
        tmp_path,
        tiny_model(),
        tiny_rows(64),
        eval_rows=tiny_rows(8),
        max_steps=4,
        logging_steps=logging_steps,
        gradient_accumulation_steps=accumulation,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    training_logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluation_logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(training_logs) == 4 // logging_steps
    assert len(evaluation_logs) == 4
    for prefix, logs in (("", training_logs), ("eval_", evaluation_logs)):
        for entry in logs:
            assert sum(entry[f"{prefix}kl_exit_{depth}"] for depth in STUDENTS) == pytest.approx(
                entry[f"{prefix}loss"], abs=1e-4
            )
            assert entry[f"{prefix}loss"] > 0.01


def test_a_second_training_logs_its_own_divergences(tmp_path):
    trainer = stage_two(tmp_path, tiny_model(), tiny_rows(64), max_steps=3, logging_steps=2, learning_rate=5e-3)
    trainer.train()
    trainer.train()
    first_log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert sum(first_log[f"kl_exit_{depth}"] for depth in STUDENTS) == pytest.approx(first_log["loss"], abs=1e-4)
