"""LoRA on the backbone: an adapter that carries the exits goes through both stages and back."""

from __future__ import annotations

import ast
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, default_data_collator

from fastbert_hf import FastBertForSequenceClassification, SelfDistillationArguments, SelfDistillationTrainer

from ..common import (
    NUM_LAYERS,
    assert_close,
    changed_parameters,
    copied_state,
    student_names,
    tiny_model,
    tiny_rows,
    training_settings,
)
from .common import assert_moved


EXITS = [f"exits.{index}" for index in range(NUM_LAYERS)]
TEACHER = f"exits.{NUM_LAYERS - 1}."
STUDENTS = tuple(f"exits.{index}." for index in range(NUM_LAYERS - 1))
POOLER_OF_THE_STUDENTS = {"share_exit_pooler": True, "exit_type": "attention", "teacher_exit_type": "linear"}


def lora_model(task_type: str | None = None, modules_to_save: list[str] | None = None, **config) -> PeftModel:
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4,
        lora_dropout=0.0,
        target_modules=["query", "value"],
        modules_to_save=EXITS if modules_to_save is None else modules_to_save,
        task_type=task_type,
    )
    return get_peft_model(tiny_model(**config), lora)


def stage_one(tmp_path, model, **settings) -> None:
    settings = training_settings(tmp_path, weight_decay=0.1, learning_rate=1e-2, **settings)
    Trainer(model, TrainingArguments(**settings), train_dataset=tiny_rows()).train()


def stage_two(tmp_path, model, **settings) -> SelfDistillationTrainer:
    args = SelfDistillationArguments(**training_settings(tmp_path, weight_decay=0.1, **settings))
    trainer = SelfDistillationTrainer(model, args, train_dataset=tiny_rows(), eval_dataset=tiny_rows(10))
    trainer.train()
    return trainer


def names_of_trained_copies(model: PeftModel, exits: str | tuple[str, ...]) -> set[str]:
    copies = {name for name, _ in model.named_parameters() if ".modules_to_save." in name}
    return {name for name in copies if name.removeprefix("base_model.model.").startswith(exits)}


def answers(model) -> list[torch.Tensor]:
    batch = default_data_collator(tiny_rows(12, labels=False, seed=1))
    model.eval()
    with torch.no_grad():
        outputs = [model(**batch, speed=speed) for speed in (0.0, 0.75, 0.9)]
        exit_logits = model(**batch, output_exit_logits=True).exit_logits
    layers = [output.exit_layer for output in outputs]
    assert len(torch.cat(layers).unique()) > 1
    return [exit_logits, *(output.logits for output in outputs), *layers]


def assert_same_answers(actual, expected, tolerance: float = 1e-5) -> None:
    for one, other in zip(answers(actual), answers(expected), strict=True):
        assert_close(one, other, tolerance)


@pytest.mark.parametrize("exit_type", ["attention", "linear"])
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_lora_touches_the_attention_of_the_backbone_alone(task_type, exit_type):
    model = lora_model(task_type, exit_type=exit_type)
    lora = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    prefix = "base_model.model.fastbert.backbone.encoder.layer"
    assert lora == {f"{prefix}.{i}.attention.self.{part}" for i in range(NUM_LAYERS) for part in ("query", "value")}


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_new_adapter_answers_as_the_model_below_it(task_type):
    assert_same_answers(lora_model(task_type), tiny_model(), 1e-6)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_stage_one_trains_lora_and_teacher(tmp_path, task_type):
    model = lora_model(task_type)
    before = copied_state(model)
    stage_one(tmp_path, model)
    lora = {name for name in before if ".lora_" in name}
    assert_moved(model, before, lora | names_of_trained_copies(model, TEACHER))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.:FutureWarning")
def test_stage_one_trains_lora_with_gradient_checkpointing(tmp_path):
    model = lora_model()
    before = copied_state(model)
    stage_one(tmp_path, model, gradient_checkpointing=True)
    assert {name for name in before if ".lora_" in name} <= changed_parameters(model, before)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_stage_two_moves_only_the_students(tmp_path, task_type):
    model = lora_model(task_type)
    stage_one(tmp_path, model)
    before = copied_state(model)
    trainer = stage_two(tmp_path, model)
    students = names_of_trained_copies(model, STUDENTS)
    assert len(students) == len(student_names(tiny_model()))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == students
    assert_moved(model, before, students)
    assert 1 <= trainer.evaluate()["eval_mean_exit_layer_speed_0.8"] <= NUM_LAYERS


def test_stage_two_keeps_backbone_and_teacher_in_eval_mode(tmp_path):
    model = lora_model()
    base = model.get_base_model()
    modes = []

    def record(*call):
        rest = {module.training for part in (base.fastbert, base.teacher) for module in part.modules()}
        modes.append((rest, {module.training for student in base.students for module in student.modules()}))

    base.fastbert.backbone.embeddings.register_forward_hook(record)
    stage_two(tmp_path, model)
    assert modes == [({False}, {True})] * 3


def test_stage_two_lowers_the_divergence_of_every_student(tmp_path):
    model = lora_model()
    args = SelfDistillationArguments(
        **training_settings(tmp_path, max_steps=40, learning_rate=5e-3, logging_steps=40, eval_speeds=[])
    )
    trainer = SelfDistillationTrainer(model, args, train_dataset=tiny_rows(), eval_dataset=tiny_rows())
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for depth in range(1, NUM_LAYERS):
        assert after[f"eval_kl_exit_{depth}"] < 0.5 * before[f"eval_kl_exit_{depth}"]


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_saved_adapter_gives_the_same_answers_on_a_fresh_base(tmp_path, task_type):
    model = lora_model(task_type)
    stage_one(tmp_path, model)
    stage_two(tmp_path, model, learning_rate=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    assert (answers(model)[0] - answers(tiny_model())[0]).abs().max() > 0.1

    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    assert_same_answers(loaded, model, 1e-6)


def test_checkpoint_of_the_trainer_holds_the_adapter(tmp_path):
    model = lora_model()
    stage_two(tmp_path, model, save_strategy="steps", save_steps=3)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-3")
    assert_same_answers(loaded, model, 1e-6)


@pytest.mark.parametrize("named", [[EXITS[-1]], EXITS[1:], EXITS[:1] + EXITS[2:]])
def test_students_that_the_adapter_would_not_save_are_refused(tmp_path, named):
    model = lora_model(modules_to_save=named)
    args = SelfDistillationArguments(**training_settings(tmp_path))
    with pytest.raises(ValueError, match=r"saved without the students.*modules_to_save=\['exits.0', .*'exits.3'\]"):
        SelfDistillationTrainer(model, args, train_dataset=tiny_rows())


def test_pooler_that_only_the_students_share_must_be_named_too(tmp_path):
    model = lora_model(**POOLER_OF_THE_STUDENTS)
    args = SelfDistillationArguments(**training_settings(tmp_path))
    with pytest.raises(ValueError, match=r"saved without the students.*'shared_pooler'"):
        SelfDistillationTrainer(model, args, train_dataset=tiny_rows())


def test_named_pooler_of_the_students_moves_and_is_saved(tmp_path):
    model = lora_model(modules_to_save=[*EXITS, "shared_pooler"], **POOLER_OF_THE_STUDENTS)
    before = copied_state(model)
    stage_two(tmp_path, model, learning_rate=1e-2)
    students = names_of_trained_copies(model, (*STUDENTS, "shared_pooler."))
    assert any("shared_pooler" in name for name in students)
    assert_moved(model, before, students)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(**POOLER_OF_THE_STUDENTS), tmp_path / "adapter")
    assert_same_answers(loaded, model, 1e-6)


def test_untrained_teacher_below_an_adapter_is_refused(tmp_path):
    torch.manual_seed(0)
    fresh = FastBertForSequenceClassification(tiny_model().config)
    model = get_peft_model(fresh, LoraConfig(target_modules=["query"], modules_to_save=EXITS))
    with pytest.raises(ValueError, match="teacher is still at its random initialisation"):
        stage_two(tmp_path, model)


def test_adapter_around_another_model_is_refused(tmp_path):
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    args = SelfDistillationArguments(**training_settings(tmp_path))
    with pytest.raises(ValueError, match="must be a FastBertForSequenceClassification"):
        SelfDistillationTrainer(model, args, train_dataset=tiny_rows())


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_merged_model_answers_alike_and_goes_through_a_plain_stage_two(tmp_path, task_type):
    model = lora_model(task_type)
    stage_one(tmp_path, model)
    expected = answers(model)
    merged = model.merge_and_unload()
    assert type(merged) is FastBertForSequenceClassification
    assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_parameters())
    for one, other in zip(answers(merged), expected, strict=True):
        assert_close(one, other, 1e-5)

    before = copied_state(merged)
    stage_two(tmp_path, merged)
    assert_moved(merged, before, student_names(merged))
    merged.save_pretrained(tmp_path / "merged")
    assert_same_answers(FastBertForSequenceClassification.from_pretrained(tmp_path / "merged"), merged, 1e-6)


@pytest.mark.parametrize("share_exit_pooler", [False, True])
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_random_teacher_that_the_config_does_not_name_is_refused_with_a_config_that_works(
    tmp_path, task_type, share_exit_pooler
):
    def new_model(modules_to_save: list[str] | None) -> PeftModel:
        torch.manual_seed(0)
        fresh = FastBertForSequenceClassification(tiny_model(share_exit_pooler=share_exit_pooler).config)
        lora = LoraConfig(target_modules=["query"], task_type=task_type, modules_to_save=modules_to_save)
        return get_peft_model(fresh, lora)

    with pytest.raises(ValueError, match="random initialisation and asks for no gradients") as refusal:
        stage_one(tmp_path, new_model(None))
    names = ast.literal_eval(re.search(r"LoraConfig\(\.\.\., modules_to_save=(\[.*?\])\)", str(refusal.value))[1])
    model = new_model(names)
    before = copied_state(model)
    stage_one(tmp_path, model)
    teacher = (TEACHER, "shared_pooler.") if share_exit_pooler else TEACHER
    moved = changed_parameters(model, before)
    assert {name for name in moved if ".lora_" not in name} <= names_of_trained_copies(model, teacher)
    assert {name for name in names_of_trained_copies(model, teacher) if "out_proj" in name} <= moved
    stage_two(tmp_path, model)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_trained_teacher_may_stay_as_it_is(tmp_path, task_type):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["query"], task_type=task_type))
    before = copied_state(model)
    stage_one(tmp_path, model)
    assert changed_parameters(model, before) == {name for name in before if ".lora_" in name}


def test_frozen_random_teacher_may_be_evaluated_and_learnt_past():
    model = FastBertForSequenceClassification(tiny_model().config)
    model.teacher.requires_grad_(False)
    batch = default_data_collator(tiny_rows(4))
    model.eval()(**batch)
    model.train()(**batch, max_layers=2)
    with pytest.raises(ValueError, match=r"model\.teacher\.requires_grad_\(True\)"):
        model(**batch)
