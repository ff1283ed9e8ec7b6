"""Stage 1: the stock `Trainer` fine-tunes the backbone and the teacher, and leaves the students alone."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from fastbert_hf import FastBertForSequenceClassification

from ..common import (
    NUM_LAYERS,
    assert_close,
    changed_parameters,
    copied_state,
    pad_token_id_of,
    student_names,
    tiny_model,
    tiny_rows,
    tiny_stock_model,
    training_settings,
    without_dropout,
)
from .common import SGD, assert_moved


def stage_one(tmp_path, model, rows=None, eval_rows=None, compute_metrics=None, **settings) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(**training_settings(tmp_path, **settings)),
        train_dataset=tiny_rows() if rows is None else rows,
        eval_dataset=eval_rows,
        compute_metrics=compute_metrics,
    )


def built(tmp_path, name: str) -> FastBertForSequenceClassification:
    """A model as each of the ways to get one gives it."""
    if name == "from_pretrained":
        # As stage 2 leaves it, with gradients for the students.
        tiny_model().requires_grad_(True).save_pretrained(tmp_path / "saved")
        return FastBertForSequenceClassification.from_pretrained(tmp_path / "saved")
    if name == "from_backbone":
        return FastBertForSequenceClassification.from_backbone(tiny_stock_model(add_pooling_layer=False), num_labels=3)
    return tiny_model()


class ForwardWithKeywords(FastBertForSequenceClassification):
    """As a user's subclass may be; `Trainer` takes a forward with keywords to scale its own loss."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_loss_is_the_cross_entropy_of_the_teacher(tmp_path):
    model = without_dropout(tiny_model(exit_dropout=0))
    rows = tiny_rows(8)
    batch = default_data_collator(rows)
    with torch.no_grad():
        teacher_logits = model(**batch, output_exit_logits=True).exit_logits[:, -1]
    log_probabilities = teacher_logits.double().log_softmax(-1)
    expected = -log_probabilities[torch.arange(8), batch["labels"]].mean().item()

    trainer = stage_one(tmp_path, model, rows, max_steps=1)
    trainer.train()

    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["constructor", "from_pretrained", "from_backbone"])
def test_students_alone_ask_for_no_gradients(tmp_path, name):
    model = built(tmp_path, name)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == student_names(model)


@pytest.mark.parametrize(
    ("family", "weight_decay"), [("bert", 0.0), ("bert", 0.1), ("albert", 0.1), ("modernbert", 0.1)]
)
def test_backbone_and_teacher_move_and_students_stay(tmp_path, family, weight_decay):
    model = tiny_model(family)
    before, students = copied_state(model), student_names(model)
    rows = tiny_rows(pad_token_id=pad_token_id_of(family))
    stage_one(tmp_path, model, rows, weight_decay=weight_decay, learning_rate=1e-3).train()

    assert_moved(model, before, {name for name, _ in model.named_parameters()} - students)


@pytest.mark.parametrize(
    ("teacher_exit_type", "pooler_moves"), [("attention", True), ("linear", False)], ids=["teacher's", "students'"]
)
def test_shared_pooler_moves_only_where_the_teacher_uses_it(tmp_path, teacher_exit_type, pooler_moves):
    model = tiny_model(share_exit_pooler=True, teacher_exit_type=teacher_exit_type)
    before = copied_state(model)
    stage_one(tmp_path, model, weight_decay=0.1).train()

    pooler = {f"shared_pooler.{name}" for name, _ in model.shared_pooler.named_parameters()}
    stays = student_names(model) if pooler_moves else student_names(model) | pooler
    assert_moved(model, before, {name for name, _ in model.named_parameters()} - stays)


@pytest.mark.parametrize("model_class", [FastBertForSequenceClassification, ForwardWithKeywords])
def test_four_accumulated_batches_of_8_equal_one_of_32(tmp_path, model_class):
    weights = []
    for batch_size, accumulation in ((8, 4), (32, 1)):
        model = without_dropout(tiny_model(exit_dropout=0))
        model.__class__ = model_class
        before = copied_state(model)
        stage_one(
            tmp_path,
            model,
            tiny_rows(64),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            remove_unused_columns=False,
            **SGD,
        ).train()
        weights.append(copied_state(model))
        moved = max((weights[-1][name] - before[name]).abs().max() for name in before)
        assert moved > 1e-3

    for name, value in weights[0].items():
        assert_close(value, weights[1][name], 1e-6)


def test_evaluation_gives_the_logits_of_the_teacher_to_compute_metrics(tmp_path):
    model = tiny_model()
    rows = tiny_rows(22)
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    trainer = stage_one(tmp_path, model, eval_rows=rows, compute_metrics=compute_metrics, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()

    batch = default_data_collator(rows)
    with torch.no_grad():
        expected = model(**batch)
    assert seen[0].predictions.shape == (22, 3)
    assert_close(torch.from_numpy(seen[0].predictions), expected.logits)
    accuracy = (expected.logits.argmax(-1) == batch["labels"]).float().mean().item()
    assert metrics["eval_accuracy"] == pytest.approx(accuracy)
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), abs=1e-5)


def test_best_model_is_loaded_at_the_end(tmp_path):
    scores = iter([3.0, 2.0, 1.0])
    trained = {}

    def compute_metrics(prediction):
        score = next(scores)
        trained[score] = copied_state(model)
        return {"score": score}

    model = tiny_model()
    trainer = stage_one(
        tmp_path,
        model,
        eval_rows=tiny_rows(8),
        compute_metrics=compute_metrics,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer.train()

    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert not changed_parameters(model, trained[3.0])
    assert changed_parameters(model, trained[1.0])


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path):
    model = tiny_model()
    before = copied_state(model)
    dtypes = set()
    model.fastbert.layers()[0].attention.self.query.register_forward_hook(
        lambda module, inputs, output: dtypes.add(output.dtype)
    )
    trainer = stage_one(tmp_path, model, bf16=True)
    trainer.train()

    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_moved(model, before, {name for name, _ in model.named_parameters()} - student_names(model))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.:FutureWarning")
def test_gradient_checkpointing_recomputes_the_layers_and_changes_no_weight(tmp_path):
    weights, calls = [], []
    for checkpointing in (False, True):
        model = without_dropout(tiny_model(exit_dropout=0))
        queries = []
        for layer in model.fastbert.layers():
            layer.attention.self.query.register_forward_hook(lambda *call, queries=queries: queries.append(1))
        stage_one(tmp_path, model, gradient_checkpointing=checkpointing, max_steps=2, **SGD).train()
        weights.append(copied_state(model))
        calls.append(len(queries))

    assert calls == [2 * NUM_LAYERS, 4 * NUM_LAYERS]
    for name, value in weights[0].items():
        assert_close(value, weights[1][name], 1e-6)


def test_students_are_not_evaluated_while_the_teacher_trains(tmp_path):
    model = tiny_model()
    evaluated = []
    for index, student in enumerate(model.students):
        student.register_forward_hook(lambda *call, index=index: evaluated.append(index))
    model.teacher.register_forward_hook(lambda *call: evaluated.append("teacher"))
    stage_one(tmp_path, model, max_steps=2).train()
    assert evaluated == ["teacher", "teacher"]


def test_fresh_model_trains_a_teacher_that_stage_two_accepts(tmp_path):
    torch.manual_seed(0)
    model = FastBertForSequenceClassification(tiny_model().config)
    assert not model.teacher.out_proj.bias.any()
    stage_one(tmp_path, model).train()
    assert model.teacher.out_proj.bias.any()
    assert not any(student.out_proj.bias.any() for student in model.students)
