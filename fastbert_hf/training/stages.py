"""Stages of a training: what each of them teaches, and how one is run, resumed and kept."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import CONFIG_NAME

from ..evaluation.exit_record import record_exits
from ..evaluation.task_metrics import ALL_METRICS
from ..files import move_whole, write_whole
from ..modeling.tasks import task_of
from .arguments import ExitTrainingArguments, StageArguments
from .checked_trainer import CheckedTrainer, check_finite_weights
from .checkpoints import last_checkpoint
from .difficulty_aware_trainer import DifficultyAwareArguments, DifficultyAwareTrainer
from .exit_trainer import ExitTrainer, task_metric
from .objectives import OBJECTIVES
from .settings_files import check_settings


if TYPE_CHECKING:
    from datasets import Dataset

    from ..modeling.modeling_fastbert import FastBertForSequenceClassification


@dataclass(frozen=True)
class StageSettings:
    """
    How a stage learns.

    Args:
        learning_rate (`float`): Initial learning rate.
        num_train_epochs (`float`): Passes over the training rows.
        temperature (`float`): Of self-distillation.
    """

    learning_rate: float
    num_train_epochs: float
    temperature: float = 1.0


@dataclass(frozen=True)
class Stage:
    """
    One training of a FastBERT model. Its settings that are fields of its `arguments_class` go there.

    Args:
        learning_rate (`float`): Initial learning rate.
        num_train_epochs (`float`): Passes over the training rows.
    """

    learning_rate: float = 5e-5
    num_train_epochs: float = 3.0

    trainer_class = CheckedTrainer
    arguments_class = StageArguments
    name = ""  # a part of the name of its folder
    metrics = "|".join(["loss", *ALL_METRICS])  # what its evaluation measures, a pattern
    trains_backbone = True
    trains_students = False
    needs_labels = True

    @property
    def needs_teacher(self) -> bool:
        """Return whether it starts from a model whose last exit has learnt already."""
        return not self.trains_backbone

    def __post_init__(self):
        # Now, as the trainer of a late stage is made when those before it are trained.
        checks = {
            "learning_rate": ("from 0 on", self.learning_rate >= 0),
            "num_train_epochs": ("above 0", self.num_train_epochs > 0),
        }
        for name, (allowed, is_right) in checks.items():
            if not is_right:
                raise ValueError(
                    f"{name} must be {allowed}, got {getattr(self, name)}. The default is {getattr(type(self), name)}"
                )

    def with_settings(self, settings: StageSettings) -> Stage:
        """Return the same stage with other settings, as far as it has them."""
        own = {field.name for field in fields(self)}
        return replace(self, **{name: value for name, value in asdict(settings).items() if name in own})

    def settings(self) -> dict[str, Any]:
        """Return what its `settings.json` says of the stage itself."""
        return asdict(self)

    def prepare_rows(
        self, rows: Dataset, before: FastBertForSequenceClassification | None, tokenizer: PreTrainedTokenizerBase
    ) -> Dataset:
        """Return the rows that the stage learns from. `before` is the model of the stage before, if there is one."""
        return rows

    def make_arguments(
        self, output_dir: str | os.PathLike, evaluates: bool = True, **training_arguments
    ) -> TrainingArguments:
        """
        Return the arguments of the stage's trainer. It evaluates after each epoch and saves no checkpoint, unless
        `training_arguments` say otherwise.

        Args:
            output_dir (`str` or `PathLike`): Folder of the checkpoints.
            evaluates (`bool`): Whether there are rows for the evaluation.
            training_arguments: Further fields of `TrainingArguments`.
        """
        known = {field.name for field in fields(self.arguments_class)}
        arguments = {
            "warmup_steps": 0.1,
            "eval_strategy": "epoch",
            "save_strategy": "no",
            **{name: value for name, value in asdict(self).items() if name in known},
            **training_arguments,
            **self._best_model(training_arguments.get("metric_for_best_model")),
        }
        if not evaluates:
            arguments["eval_strategy"] = "no"
        return self.arguments_class(str(output_dir), **arguments)

    def _best_model(self, metric: str | None) -> dict[str, Any]:
        """Return what takes the place of a metric that other stages measure and this one does not: its loss."""
        if metric is None or re.fullmatch(self.metrics, metric.removeprefix("eval_")):
            return {}
        if not any(re.fullmatch(kind.metrics, metric.removeprefix("eval_")) for kind in (FineTuning, ExitTraining)):
            raise ValueError(
                f"metric_for_best_model={metric!r} is measured in no stage: give 'accuracy' or 'loss', or what the "
                "exits give at one of their eval_speeds, as 'accuracy_speed_0.5'."
            )
        return {"metric_for_best_model": "loss", "greater_is_better": False}

    def make_trainer(
        self,
        output_dir: str | os.PathLike,
        model: PreTrainedModel,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        **training_arguments,
    ) -> Trainer:
        """
        Return the trainer of the stage.

        Args:
            output_dir (`str` or `PathLike`): Folder of the checkpoints.
            model ([`FastBertForSequenceClassification`]): What learns.
            train_dataset, eval_dataset (`Dataset`): Tokenized rows; there may be none for the evaluation.
            tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
            training_arguments: As in [`make_arguments`].
        """
        return self.trainer_class(
            model,
            self.make_arguments(output_dir, eval_dataset is not None, **training_arguments),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=partial(task_metric, config=model.config),
        )


@dataclass(frozen=True)
class FineTuning(Stage):
    """Fine-tune the backbone and the last exit on labels, with the stock `Trainer`: stage 1 of FastBERT."""

    name = "fine_tuning"


@dataclass(frozen=True)
class Distillation(Stage):
    """Fine-tune the first layers of the model of the stage before to give the answers of all its layers."""

    name = "distillation"

    def prepare_rows(self, rows, before, tokenizer):
        return with_answers(before, rows, tokenizer)


@dataclass(frozen=True)
class DifficultyAwareFineTuning(Stage):
    """
    Fine-tune the backbone and the last exit to be less sure of hard rows than of easy ones. The rows need the column
    `difficulty`, from [`label_difficulty`].

    Args:
        learning_rate, num_train_epochs (`float`): As in every stage.
        difficulty_weight, difficulty_margin (`float`): As in [`DifficultyAwareArguments`].
    """

    difficulty_weight: float = 0.5
    difficulty_margin: float = 0.5

    trainer_class = DifficultyAwareTrainer
    arguments_class = DifficultyAwareArguments

    @property
    def name(self) -> str:
        return f"difficulty_{self.difficulty_weight:g}_{self.difficulty_margin:g}"


@dataclass(frozen=True)
class ExitTraining(Stage):
    """
    Teach the exits with [`ExitTrainer`]: stage 2 of FastBERT, or what a baseline has in its place.

    Args:
        learning_rate, num_train_epochs (`float`): As in every stage.
        objective (`str`): A key of [`OBJECTIVES`].
        temperature (`float`), reverse_kl (`bool`): As in [`ExitTrainingArguments`].
    """

    learning_rate: float = 2e-4
    num_train_epochs: float = 5.0
    objective: str = "self_distillation"
    temperature: float = 1.0
    reverse_kl: bool = False

    trainer_class = ExitTrainer
    arguments_class = ExitTrainingArguments
    metrics = r"loss|\w+_exit_\d+|\w+_speed_[\d.]+"
    trains_students = True

    @property
    def name(self) -> str:
        return self.objective

    @property
    def trains_backbone(self) -> bool:
        return not OBJECTIVES[self.objective].freezes_teacher

    @property
    def needs_labels(self) -> bool:
        return OBJECTIVES[self.objective].needs_labels

    def settings(self) -> dict[str, Any]:
        settings = {"learning_rate": self.learning_rate, "num_train_epochs": self.num_train_epochs}
        if not self.needs_labels:
            settings["temperature"] = self.temperature
            if self.reverse_kl:
                settings["reverse_kl"] = True
        return settings


def run_stage(
    folder: str | os.PathLike,
    settings: Mapping[str, Any] | None,
    make_trainer: Callable[[str], Trainer],
    model_dir: str | os.PathLike | None = None,
) -> Path:
    """
    Train a stage, unless it is finished, and return the folder of its model.

    An interrupted training goes on from its last complete checkpoint, if it saves checkpoints. The finished model is
    written whole or not at all, with its tokenizer and `log.json`, the log of the training; then the checkpoints are
    removed. With several processes, all of them call this: the main one writes, and the others wait for it.

    Args:
        folder (`str` or `PathLike`): Of the stage: `settings.json` and the checkpoints, and `model/` when finished.
        settings (`Mapping`, *optional*):
            What the model depends on. A folder that holds a training with other settings is refused. `None` where the
            caller checks the settings of several stages at once, with [`check_settings`].
        make_trainer (`Callable`):
            Makes the trainer from the path of its `output_dir`. Called only if there is something left to train.
        model_dir (`str` or `PathLike`, *optional*):
            Folder of the finished model in place of `folder/model`. It may hold other files.

    Example:

    ```python
    >>> def make_trainer(output_dir):
    ...     model = FastBertForSequenceClassification.from_backbone("bert-base-uncased", num_labels=2)
    ...     return FineTuning(learning_rate=2e-5).make_trainer(output_dir, model, train, validation, tokenizer)

    >>> model_dir = run_stage("outputs/fine_tuning", {"learning_rate": 2e-5}, make_trainer)
    >>> model = FastBertForSequenceClassification.from_pretrained(model_dir)
    ```
    """
    folder = Path(folder)
    model_dir = folder / "model" if model_dir is None else Path(model_dir)
    finished, checkpoint = is_finished(model_dir), last_checkpoint(folder)
    if settings is not None:
        check_settings(folder, settings, in_use=finished or checkpoint is not None)
    if finished:
        return model_dir
    trainer = make_trainer(str(folder))
    trainer.train(resume_from_checkpoint=checkpoint)
    check_finite_weights(trainer.model)
    # No process may still read a checkpoint when the main one removes them.
    trainer.accelerator.wait_for_everyone()
    part = folder / "part"
    if trainer.is_world_process_zero():
        shutil.rmtree(part, ignore_errors=True)
    trainer.save_model(str(part))
    if trainer.is_world_process_zero():
        # The settings are in settings.json; a pickle has no place beside weights that may be shared.
        (part / "training_args.bin").unlink(missing_ok=True)
        write_whole(part / "log.json", json.dumps(trainer.state.log_history, indent=1))
        move_whole(part, model_dir, last=CONFIG_NAME)
        for leftover in folder.glob("checkpoint-*"):
            shutil.rmtree(leftover)
    trainer.accelerator.wait_for_everyone()
    return model_dir


def is_finished(model_dir: str | os.PathLike) -> bool:
    """Return whether a folder holds a whole model: its config is written last."""
    return Path(model_dir, CONFIG_NAME).exists()


def with_answers(
    model: FastBertForSequenceClassification, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Return the rows with the probabilities that the full model gives them in place of their labels."""
    if task_of(model.config).layout.per_token:
        raise ValueError("the answers of a token classifier cannot be labels: distil it with ExitTraining.")
    record = record_exits(model, rows, tokenizer=tokenizer)
    answers = task_of(model.config).probabilities(record.exit_logits[:, -1])
    return rows.remove_columns("labels").add_column("labels", answers.tolist())


def copy_weights(source: FastBertForSequenceClassification, target: FastBertForSequenceClassification) -> None:
    """Copy the layers that `target` has, and the exits that have the same structure in both models."""
    layers = source.fastbert.state_dict()
    target.fastbert.load_state_dict({name: layers[name] for name in target.fastbert.state_dict()})
    parts = [*zip(source.students, target.students, strict=False), (source.teacher, target.teacher)]
    if source.shared_pooler is not None and target.shared_pooler is not None:
        parts.append((source.shared_pooler, target.shared_pooler))
    for given, own in parts:
        given_weights, own_weights = given.state_dict(), own.state_dict()
        shapes = [{name: value.shape for name, value in part.items()} for part in (given_weights, own_weights)]
        if shapes[0] == shapes[1]:
            own.load_state_dict(given_weights)
