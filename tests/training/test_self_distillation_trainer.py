"""Stage 2: `SelfDistillationTrainer` teaches the students what the teacher says and leaves the rest as it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification, SelfDistillationTrainer
from fastbert_hf import SelfDistillationArguments as Arguments

from ..common import (
    NUM_LAYERS,
    assert_close,
    changed_parameters,
    copied_state,
    pad_token_id_of,
    student_names,
    tiny_model,
    tiny_rows,
    tiny_text_config,
    tiny_texts,
    tiny_tokenizer,
    training_settings,
    without_dropout,
)
from .common import SGD, assert_moved, exit_logits_of, float64_divergences


STUDENTS = range(1, NUM_LAYERS)


def stage_two(tmp_path, model, rows=None, eval_rows=None, compute_metrics=None, **settings) -> SelfDistillationTrainer:
    return SelfDistillationTrainer(
        model,
        Arguments(**training_settings(tmp_path, **settings)),
        train_dataset=tiny_rows() if rows is None else rows,
        eval_dataset=eval_rows,
        compute_metrics=compute_metrics,
    )


@pytest.mark.parametrize("reverse_kl", [False, True])
def test_loss_is_the_sum_over_the_students(tmp_path, reverse_kl):
    model = without_dropout(tiny_model(exit_dropout=0))
    rows = tiny_rows(8)
    expected = float64_divergences(exit_logits_of(model, rows), reverse_kl)

    trainer = stage_two(tmp_path, model, rows, max_steps=1, reverse_kl=reverse_kl)
    assert trainer.compute_loss(model, default_data_collator(rows)).item() == pytest.approx(sum(expected), abs=1e-5)
    trainer.train()

    first_log = trainer.state.log_history[0]
    assert first_log["loss"] == pytest.approx(sum(expected), abs=1e-4)
    for depth, divergence in enumerate(expected, start=1):
        assert first_log[f"kl_exit_{depth}"] == pytest.approx(divergence, abs=1e-4)


@pytest.mark.parametrize(
    ("family", "exit_type", "weight_decay"),
    [
        ("bert", "attention", 0.0),
        ("bert", "attention", 0.1),
        ("bert", "linear", 0.1),
        ("albert", "attention", 0.1),
        ("modernbert", "linear", 0.1),
    ],
)
def test_every_student_parameter_moves_and_all_else_stays(tmp_path, family, exit_type, weight_decay):
    model = tiny_model(family, exit_type=exit_type)
    before, students = copied_state(model), student_names(model)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    assert buffers
    rows = tiny_rows(pad_token_id=pad_token_id_of(family))
    stage_two(tmp_path, model, rows, weight_decay=weight_decay).train()

    assert_moved(model, before, students)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_only_the_students_require_gradients(tmp_path):
    model = tiny_model()
    model.requires_grad_(True)
    stage_two(tmp_path, model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == student_names(model)


def test_students_are_in_train_mode_and_the_rest_in_eval_mode(tmp_path):
    model = tiny_model()
    modes = []

    def record(*call):
        rest = {module.training for part in (model.fastbert, model.teacher) for module in part.modules()}
        modes.append((rest, {module.training for student in model.students for module in student.modules()}))

    model.fastbert.backbone.embeddings.register_forward_hook(record)
    trainer = stage_two(tmp_path, model, eval_rows=tiny_rows(8), max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()

    training, evaluation = ({False}, {True}), ({False}, {False})
    assert modes == [training, evaluation, training, evaluation]


def test_backbone_and_teacher_record_no_graph(tmp_path):
    model = tiny_model()
    reads, answers = [], []
    for exit_classifier in model.exits:
        exit_classifier.register_forward_hook(lambda module, inputs, output: reads.append(inputs[0]))
        exit_classifier.register_forward_hook(lambda module, inputs, output: answers.append(output))
    stage_two(tmp_path, model, max_steps=1).train()
    assert [states.requires_grad for states in reads] == [False] * NUM_LAYERS
    assert [logits.requires_grad for logits in answers] == [True] * len(STUDENTS) + [False]


def test_labels_are_neither_needed_nor_used(tmp_path):
    labeled = tiny_rows()
    permutation = torch.randperm(len(labeled), generator=torch.Generator().manual_seed(1))
    shuffled = [{**row, "labels": labeled[other]["labels"]} for row, other in zip(labeled, permutation, strict=True)]
    assert [row["labels"] for row in shuffled] != [row["labels"] for row in labeled]

    weights = []
    for rows in (labeled, shuffled, tiny_rows(labels=False)):
        model = tiny_model()
        stage_two(tmp_path, model, rows).train()
        weights.append(copied_state(model))

    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


def test_unlabeled_data_set_with_other_columns_is_welcome(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = copied_state(model)
    dataset = Dataset.from_dict({"text": tiny_texts(32), "number": list(range(32))})
    dataset = dataset.map(lambda row: tokenizer(row["text"]))
    trainer = SelfDistillationTrainer(
        model,
        Arguments(**training_settings(tmp_path)),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert_moved(model, before, student_names(model))
    encoding = tokenizer(dataset["text"][:], padding=True, return_tensors="pt")
    with torch.no_grad():
        exit_layer = model(**encoding, speed=0.8).exit_layer
    assert metrics["eval_mean_exit_layer_speed_0.8"] == pytest.approx(exit_layer.float().mean().item())


@pytest.mark.parametrize("model_scales_its_own_loss", [False, True])
def test_four_accumulated_batches_of_8_equal_one_of_32(tmp_path, model_scales_its_own_loss):
    weights = []
    for batch_size, accumulation in ((8, 4), (32, 1)):
        model = without_dropout(tiny_model(exit_dropout=0))
        model.accepts_loss_kwargs = model_scales_its_own_loss
        before = copied_state(model)
        stage_two(
            tmp_path,
            model,
            tiny_rows(64),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **SGD,
        ).train()
        weights.append(copied_state(model))
        assert max((weights[-1][name] - before[name]).abs().max() for name in before) > 1e-3

    for name, value in weights[0].items():
        assert_close(value, weights[1][name], 1e-6)


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    model = tiny_model(exit_dropout=0.1)
    stage_two(tmp_path, model, **settings).train()
    resumed = tiny_model(seed=1, exit_dropout=0.1)
    stage_two(tmp_path, resumed, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not changed_parameters(resumed, copied_state(model))


def test_fresh_model_resumes_from_the_checkpoint_of_a_trained_one(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    model = tiny_model()
    stage_two(tmp_path, model, **settings).train()
    fresh = FastBertForSequenceClassification(model.config)
    stage_two(tmp_path, fresh, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not changed_parameters(fresh, copied_state(model))


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path):
    model = tiny_model()
    before = copied_state(model)
    dtypes = set()
    model.students[0].out_proj.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer = stage_two(tmp_path, model, eval_rows=tiny_rows(8), bf16=True)
    trainer.train()

    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_moved(model, before, student_names(model))
    expected = sum(float64_divergences(exit_logits_of(model, tiny_rows(8))))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=0.1)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.:FutureWarning")
def test_gradient_checkpointing_changes_nothing(tmp_path):
    weights = []
    for checkpointing in (False, True):
        model = tiny_model()
        stage_two(tmp_path, model, gradient_checkpointing=checkpointing).train()
        weights.append(copied_state(model))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_distilling_brings_every_student_nearer_to_the_teacher(tmp_path):
    model = tiny_model()
    rows = tiny_rows(32)
    before = float64_divergences(exit_logits_of(model, rows))
    trainer = stage_two(tmp_path, model, rows, max_steps=40, learning_rate=5e-3, logging_steps=20)
    trainer.train()
    after = float64_divergences(exit_logits_of(model, rows))
    assert all(late < 0.5 * early for late, early in zip(after, before, strict=True))


def test_pooler_shared_with_the_teacher_stays(tmp_path):
    model = tiny_model(share_exit_pooler=True)
    before = copied_state(model)
    modes = set()
    model.shared_pooler.register_forward_pre_hook(lambda module, inputs: modes.add(module.training))
    trainer = stage_two(tmp_path, model, weight_decay=0.1)
    assert not any(parameter.requires_grad for parameter in model.shared_pooler.parameters())
    trainer.train()

    assert modes == {False}
    out_proj = {f"exits.{i}.out_proj.{name}" for i in range(NUM_LAYERS - 1) for name in ("weight", "bias")}
    assert_moved(model, before, out_proj)


@pytest.mark.parametrize(("exit_type", "teacher_exit_type"), [("attention", "linear"), ("linear", "attention")])
def test_pooler_that_only_the_students_share_moves(tmp_path, exit_type, teacher_exit_type):
    model = tiny_model(share_exit_pooler=True, exit_type=exit_type, teacher_exit_type=teacher_exit_type)
    before = copied_state(model)
    trainer = stage_two(tmp_path, model, weight_decay=0.1)
    pooler = {f"shared_pooler.{name}" for name, _ in model.shared_pooler.named_parameters()}
    trainer.train()
    assert_moved(model, before, student_names(model) | pooler)


def test_pooler_that_only_the_students_share_is_in_train_mode(tmp_path):
    model = tiny_model(share_exit_pooler=True, exit_type="attention", teacher_exit_type="linear")
    modes = []
    model.shared_pooler.register_forward_pre_hook(
        lambda *call: modes.append({module.training for module in model.shared_pooler.modules()})
    )
    trainer = stage_two(tmp_path, model, max_steps=1)
    trainer.train()
    assert modes == [{True}] * len(STUDENTS)
    modes.clear()
    trainer.evaluate(tiny_rows(8))
    assert modes == [{False}] * len(STUDENTS)


def test_teacher_that_was_never_trained_is_refused(tmp_path):
    torch.manual_seed(0)
    config = FastBertConfig(text_config=tiny_text_config("bert"), num_labels=3)
    model = FastBertForSequenceClassification(config)
    before = copied_state(model)
    trainer = stage_two(tmp_path, model)
    with pytest.raises(ValueError, match=r"teacher is still at its random initialisation.*from_classifier\(name"):
        trainer.train()
    assert not changed_parameters(model, before)


@pytest.mark.parametrize("kind", [TrainingArguments, SimpleNamespace])
def test_arguments_of_another_class_are_refused(tmp_path, kind):
    args = kind(output_dir=str(tmp_path))
    expected = rf"args must be SelfDistillationArguments, got {kind.__name__}.*SelfDistillationArguments\('outputs'"
    with pytest.raises(TypeError, match=expected):
        SelfDistillationTrainer(tiny_model(), args)


@pytest.mark.parametrize("kind", ["stock", None])
def test_model_that_is_not_fastbert_is_refused(tmp_path, kind):
    model = AutoModelForSequenceClassification.from_config(tiny_text_config("bert")) if kind else None
    name = type(model).__name__
    expected = rf"must be a FastBertForSequenceClassification, got {name}.*from_classifier\(name\)"
    with pytest.raises(ValueError, match=expected):
        stage_two(tmp_path, model)


def test_fastbert_model_without_exits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a FastBertForSequenceClassification, got FastBertModel"):
        stage_two(tmp_path, tiny_model().fastbert)


def test_model_of_one_layer_is_refused(tmp_path):
    config = FastBertConfig(text_config=tiny_text_config("bert", num_layers=1))
    with pytest.raises(ValueError, match="one layer, so there are no students"):
        stage_two(tmp_path, FastBertForSequenceClassification(config))


def test_arguments_may_be_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = SelfDistillationTrainer(tiny_model())
    assert isinstance(trainer.args, Arguments)
    assert isinstance(trainer, Trainer)
    assert trainer.args.learning_rate == 2e-4


def test_trained_model_answers_without_dropout(tmp_path):
    model = tiny_model()
    stage_two(tmp_path, model).train()
    assert not any(module.training for module in model.modules())


def test_model_may_come_from_model_init(tmp_path):
    arguments = Arguments(**training_settings(tmp_path, max_steps=2))
    trainer = SelfDistillationTrainer(args=arguments, model_init=lambda: tiny_model(), train_dataset=tiny_rows(8))
    trainer.train()
    before = tiny_model().state_dict()
    assert_moved(trainer.model, before, student_names(trainer.model))
