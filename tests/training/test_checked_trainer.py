"""A training that becomes NaN ends with an error, and goes on only from checkpoints of its own model."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, TrainingArguments

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification
from fastbert_hf.training import ExitTrainer, ExitTrainingArguments
from fastbert_hf.training.checked_trainer import CheckedTrainer, check_finite_weights

from ..common import (
    NUM_LAYERS,
    SHAPE,
    changed_parameters,
    copied_state,
    spread_out,
    tiny_model,
    tiny_rows,
    tiny_text_config,
    training_settings,
)


SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def trainer_of(tmp_path, model, **settings) -> ExitTrainer:
    args = ExitTrainingArguments(**training_settings(tmp_path, **settings))
    return ExitTrainer(model, args, train_dataset=tiny_rows(), eval_dataset=tiny_rows(8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    trainer_of(folder, tiny_model(), **SAVED).train()
    return folder / "checkpoint-2"


def changed_copy(checkpoint, folder, change):
    """Copy a checkpoint whose weights `change` turns into others."""
    copied = folder / "checkpoint-2"
    copied.mkdir()
    for file in checkpoint.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    for file in copied.glob("*model.safetensors"):
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return copied


@pytest.mark.parametrize("objective", ["self_distillation", "joint_cross_entropy"])
@pytest.mark.parametrize(
    "shows",
    [
        {"logging_steps": 3},
        {"logging_strategy": "no"},
        {"logging_strategy": "no", "save_strategy": "steps", "save_steps": 3},
        {"logging_strategy": "no", "eval_strategy": "steps", "eval_steps": 3},
    ],
    ids=["log", "end", "save", "evaluation"],
)
def test_a_training_that_becomes_nan_ends_with_an_error(tmp_path, shows, objective):
    model = tiny_model()
    trainer = trainer_of(tmp_path, model, learning_rate=1e30, objective=objective, max_steps=4, **shows)
    with pytest.raises(ValueError, match=r"NaN.*learning_rate|not finite.*weights"):
        trainer.train()
    assert trainer.state.global_step == (4 if shows == {"logging_strategy": "no"} else 3)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_logs_that_are_nan_for_another_reason_end_nothing(tmp_path):
    trainer = trainer_of(tmp_path, tiny_model())
    trainer.compute_metrics = None
    trainer.metrics_at_speed = lambda prediction: {"correlation": math.nan}
    assert math.isnan(trainer.evaluate()["eval_correlation_speed_0.5"])


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = tiny_model()
    trainer = trainer_of(tmp_path, model)
    with torch.no_grad():
        model.students[0].out_proj.bias[0] = math.inf
    with pytest.raises(ValueError, match=r"infinite: exits\.0\.out_proj\.bias \(of 42"):
        trainer.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_weights_that_do_not_learn_are_not_looked_at():
    model = tiny_model()
    model.students[0].out_proj.bias.data[0] = math.nan  # frozen, as the model is built
    check_finite_weights(model)
    with pytest.raises(ValueError, match=r"the training ended with weights that are NaN"):
        check_finite_weights(model.requires_grad_(True))


def test_evaluation_of_exits_that_answer_nan_names_them(tmp_path):
    model = tiny_model()
    trainer = trainer_of(tmp_path, model)
    model.students[1].out_proj.bias.data[0] = math.nan
    with pytest.raises(ValueError, match=r"exits \[2\] answer some rows with NaN"):
        trainer.evaluate()


def test_a_checkpoint_with_nan_is_refused_before_the_first_step(tmp_path, checkpoint):
    broken = changed_copy(
        checkpoint,
        tmp_path,
        lambda weights: {n: w * math.nan if n.startswith("exits.1.out") else w for n, w in weights.items()},
    )
    trainer = trainer_of(tmp_path, tiny_model(), **SAVED)
    with pytest.raises(ValueError, match=r"checkpoint-2 holds weights that are NaN or infinite: exits\.1\.out_proj"):
        trainer.train(resume_from_checkpoint=str(broken))
    assert trainer.state.global_step == 0


def without_exit(weights):
    return {name: weight for name, weight in weights.items() if "exits.1." not in name}


def with_other(weights):
    return {**weights, "exits.9.out_proj.bias": torch.ones(3)}


def with_other_shape(weights):
    return {**weights, "exits.1.out_proj.bias": torch.ones(4)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without_exit, r"it lacks exits\.1\.\S+, exits\.1\.\S+, exits\.1\.\S+ and 11 more\. Resume"),
        (with_other, r"it also holds exits\.9\.out_proj\.bias\. Resume"),
        (with_other_shape, r"it has other shapes of exits\.1\.out_proj\.bias\. Resume"),
    ],
)
@pytest.mark.parametrize("resume", ["path", "last"])
def test_a_checkpoint_with_other_weights_is_refused_by_name(tmp_path, checkpoint, change, expected, resume):
    broken = changed_copy(checkpoint, tmp_path, change)
    model = tiny_model()
    before = copied_state(model)
    trainer = trainer_of(tmp_path, model, **SAVED)
    with pytest.raises(ValueError, match=f"no checkpoint of this model: {expected}"):
        trainer.train(resume_from_checkpoint=str(broken) if resume == "path" else True)
    assert not changed_parameters(model, before)


@pytest.mark.parametrize(
    ("num_layers", "fault"), [(3, r"also holds exits\.3\."), (5, r"lacks \S*\.layer\.4\.")], ids=["fewer", "more"]
)
def test_a_checkpoint_of_another_depth_is_refused(tmp_path, checkpoint, num_layers, fault):
    config = FastBertConfig(text_config=tiny_text_config("bert", num_layers), num_labels=3)
    trainer = trainer_of(tmp_path, spread_out(FastBertForSequenceClassification(config)), **SAVED)
    with pytest.raises(ValueError, match=f"no checkpoint of this model: it {fault}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def lora_model() -> PreTrainedModel:
    names = [f"exits.{index}" for index in range(NUM_LAYERS)]
    return get_peft_model(tiny_model(), LoraConfig(target_modules=["query"], modules_to_save=names))


def test_a_checkpoint_of_an_adapter_is_checked_alike(tmp_path):
    trainer_of(tmp_path, lora_model(), objective="self_distillation", **SAVED).train()
    trainer_of(tmp_path, lora_model(), **SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "other").mkdir()
    broken = changed_copy(tmp_path / "checkpoint-2", tmp_path / "other", without_exit)
    with pytest.raises(ValueError, match=r"no checkpoint of this model: it lacks base_model\.model\.exits\.1\."):
        trainer_of(tmp_path, lora_model(), **SAVED).train(resume_from_checkpoint=str(broken))


def test_stock_models_are_checked_alike(tmp_path):
    config = BertConfig(**SHAPE, num_hidden_layers=2, max_position_embeddings=64, num_labels=3)
    args = TrainingArguments(**training_settings(tmp_path, learning_rate=1e30, max_steps=4))
    trainer = CheckedTrainer(BertForSequenceClassification(config), args, train_dataset=tiny_rows())
    with pytest.raises(ValueError, match=r"weights that are NaN or infinite: bert\.embeddings"):
        trainer.train()
