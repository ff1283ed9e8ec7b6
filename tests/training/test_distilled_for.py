"""The trainer writes down which backbone and teacher the students belong to, and other trainings are told from it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from fastbert_hf import FastBertForSequenceClassification, SelfDistillationArguments, SelfDistillationTrainer
from fastbert_hf.modeling.teacher_digest import teacher_digest
from fastbert_hf.training import ExitTrainer, ExitTrainingArguments

from ..common import NUM_LAYERS, tiny_model, tiny_rows, training_settings
from .common import Interrupted, Stop


class Note(TrainerCallback):
    """Notes `distilled_for` at the beginning of each step."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append(self.model.config.distilled_for)


def exit_trainer(tmp_path, model, objective="self_distillation", **settings) -> ExitTrainer:
    settings = training_settings(tmp_path, objective=objective, **settings)
    return ExitTrainer(model, ExitTrainingArguments(**settings), train_dataset=tiny_rows())


def answer(model, speed=0.8):
    batch = default_data_collator(tiny_rows(8, labels=False))
    with torch.no_grad():
        return model.eval()(**batch, speed=speed)


@pytest.mark.parametrize("objective", ["self_distillation", "frozen_cross_entropy"])
def test_the_digest_of_a_frozen_teacher_is_there_from_the_first_step_on(tmp_path, objective):
    model = tiny_model(distilled_for="float32:0123456789abcdef")
    trainer, note = exit_trainer(tmp_path, model, objective), Note(model)
    trainer.add_callback(note)
    trainer.train()
    digest = teacher_digest(model)
    assert digest.startswith("float32:")
    assert note.seen == [digest] * 3 and model.config.distilled_for == digest
    answer(model)


def test_an_interrupted_training_leaves_students_that_answer(tmp_path):
    model = tiny_model(distilled_for="float32:0123456789abcdef")
    trainer = exit_trainer(tmp_path, model)
    trainer.add_callback(Stop(2))
    with pytest.raises(Interrupted):
        trainer.train()
    answer(model)


@pytest.mark.parametrize("checkpoints", [["checkpoint-1", "checkpoint-2"], []])
def test_a_teacher_that_learns_with_its_exits_is_written_down_with_what_is_saved(tmp_path, checkpoints):
    model = tiny_model(distilled_for="float32:0123456789abcdef").requires_grad_(True)
    saving = {"save_strategy": "steps" if checkpoints else "no", "save_steps": 1, "max_steps": 2}
    trainer = exit_trainer(tmp_path, model, "joint_cross_entropy", **saving)
    note = Note(model)
    trainer.add_callback(note)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    digests = []
    for name in (*checkpoints, "final"):
        saved = FastBertForSequenceClassification.from_pretrained(tmp_path / name)
        digests.append(saved.config.distilled_for)
        assert digests[-1] == teacher_digest(saved)
        answer(saved)
    assert len(set(digests)) == max(1, len(checkpoints)) and digests[-1] == teacher_digest(model)
    assert note.seen[0] is None


def test_a_model_of_the_stock_trainer_is_refused_at_speed_until_it_is_distilled_again(tmp_path):
    model = tiny_model()
    exit_trainer(tmp_path, model).train()
    model._freeze_students()
    model.fastbert.requires_grad_(True), model.teacher.requires_grad_(True)
    before = model.config.distilled_for
    Trainer(model, TrainingArguments(**training_settings(tmp_path)), train_dataset=tiny_rows()).train()
    assert model.config.distilled_for == before
    answer(model, speed=0)
    with pytest.raises(ValueError, match=r"SelfDistillationTrainer\(model"):
        answer(model)
    args = SelfDistillationArguments(**training_settings(tmp_path))
    SelfDistillationTrainer(model, args, train_dataset=tiny_rows(labels=False)).train()
    answer(model)


def test_a_checkpoint_resumed_into_another_model_is_that_of_its_own_teacher(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    model, other = tiny_model(), tiny_model(seed=1)
    exit_trainer(tmp_path, model, **settings).train()
    exit_trainer(tmp_path, other, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.config.distilled_for == model.config.distilled_for == teacher_digest(other)


def test_an_evaluation_alone_writes_nothing(tmp_path):
    model = tiny_model(distilled_for="float32:0123456789abcdef")
    exit_trainer(tmp_path, model).evaluate(tiny_rows(8))
    assert model.config.distilled_for == "float32:0123456789abcdef"


def test_nothing_is_said_of_adapters_which_may_be_merged_later(tmp_path):
    names = [f"exits.{index}" for index in range(NUM_LAYERS)]
    lora = LoraConfig(target_modules=["query"], modules_to_save=names, init_lora_weights=False)
    model = get_peft_model(tiny_model(distilled_for="float32:0123456789abcdef"), lora)
    exit_trainer(tmp_path, model).train()
    assert model.get_base_model().config.distilled_for is None
    answer(model.merge_and_unload())
