"""ExitTrainer teaches the exits; SelfDistillationTrainer teaches them what the teacher says: stage 2 of FastBERT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers.modelcard import TrainingSummary
from transformers.trainer_utils import EvalLoopOutput

from ..evaluation.exit_record import ExitRecord, wanted_labels
from ..evaluation.replay import replay_at_speed
from ..evaluation.task_metrics import measured, metric_of
from ..modeling.tasks import Task, task_of
from ..modeling.teacher_digest import teacher_digest
from ..sharing.model_card import Measured, as_list, write_model_card
from .arguments import ExitTrainingArguments, SelfDistillationArguments
from .checked_trainer import CheckedTrainer, base_model
from .objectives import OBJECTIVES
from .what_learns import choose_what_learns


def task_metric(prediction: EvalPrediction, config: PreTrainedConfig) -> dict[str, float]:
    """Return the first metric of a model's task, such as its accuracy, for the `compute_metrics` of a trainer."""
    logits, labels = map(torch.from_numpy, (prediction.predictions, prediction.label_ids))
    return {metric_of(config)[0]: measured(config, None, logits, labels)}


class ExitTrainer(CheckedTrainer):
    """
    Teach the exits of a model what `args.objective` says, and report what each speed would give.

    Self-distillation and `"frozen_cross_entropy"` train the students alone: the backbone and the teacher are frozen
    (`requires_grad`) and stay in eval mode. The other objectives train the whole model.

    The evaluation makes one full-depth pass. For each of `args.eval_speeds` it reports `mean_exit_layer`, `agreement`
    with the teacher and, where there are labels, what `compute_metrics` returns for the answers at that speed, as
    `eval_accuracy_speed_0.5`. The limits of the config, `min_exit_layer` and `max_layers`, count as they do in the
    pipeline. `eval_loss` is the sum of the losses of the exits; each of them is in the logs of training and evaluation
    as well, such as `kl_exit_1` to `kl_exit_{L-1}` for self-distillation. `predict` returns the logits of every exit,
    `[rows, L, num_labels]`.

    Rows may be tokens of any length, or texts if `processing_class` is the model's tokenizer: strings, or rows with
    `text`, `text_pair` for pairs, and `label`. A training that ends in NaN raises an error, and saves nothing of it.
    The config of what is saved remembers, as `distilled_for`, which backbone and teacher the exits belong to.

    Args:
        model ([`FastBertForSequenceClassification`]):
            With a trained teacher, if it is frozen. A PEFT model around one works, too.
        args ([`ExitTrainingArguments`], *optional*): Settings.
        compute_metrics (`Callable`, *optional*):
            From an `EvalPrediction` with the logits at one speed, `[rows, num_labels]`, and the labels to a dict.
            The first metric of the task ([`sweep_speeds`]), such as accuracy, unless given.
        kwargs: As in `Trainer`.

    Example:

    ```python
    >>> args = ExitTrainingArguments("outputs", objective="joint_cross_entropy", learning_rate=2e-5)
    >>> trainer = ExitTrainer(model, args, train_dataset=labelled_texts)
    >>> trainer.train()
    ```
    """

    arguments_class = ExitTrainingArguments
    # The loss is a mean over each micro-batch.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: ExitTrainingArguments | None = None,
        *,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **kwargs,
    ):
        if args is None:
            args = self.arguments_class("trainer_output")
        if not isinstance(args, self.arguments_class):
            name = self.arguments_class.__name__
            raise TypeError(
                f"args must be {name}, got {type(args).__name__}. Example: {type(self).__name__}(model, "
                f"{name}('outputs', num_train_epochs=5), train_dataset=...)"
            )
        # Under another name than `objective`, where Transformers notes the results of a hyperparameter search.
        self.exit_objective = OBJECTIVES[args.objective]
        if model is not None or kwargs.get("model_init") is None:
            choose_what_learns(model, self.exit_objective)
        kwargs["callbacks"] = [_Beginning(self), *(kwargs.get("callbacks") or ())]
        super().__init__(model, args, **kwargs)
        self.metrics_at_speed = compute_metrics or self._task_metric
        self._has_own_optimizer = any(part is not None for part in kwargs.get("optimizers", ()))
        self._losses, self._steps = 0.0, 0

    @property
    def task(self) -> Task:
        """What the model answers."""
        return task_of(base_model(self.model).config)

    def _task_metric(self, prediction: EvalPrediction) -> dict[str, float]:
        return task_metric(prediction, base_model(self.model).config)

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        if self.args.load_best_model_at_end:  # what was measured last may be another checkpoint
            base_model(self.model).measured = None
        self._remember_teacher()
        self.model.eval()
        return output

    def begin_training(self) -> None:
        """Check the model that is about to be trained, be it from `model_init` or read from a checkpoint."""
        fastbert = base_model(self.model)
        # New exits have biases of zero, which the first training step changes.
        if self.exit_objective.freezes_teacher and not fastbert.teacher.out_proj.bias.any():
            raise ValueError(
                "The teacher is still at its random initialisation, so there is nothing to learn from it. Fine-tune "
                "first, with the stock Trainer (for more than one step, which may be all warm-up, at a learning rate "
                "of 0), or wrap a fine-tuned classifier: FastBertForSequenceClassification.from_classifier(name)"
            )
        self._check_best_metric()
        self._losses, self._steps = 0.0, 0
        fastbert.measured = None
        if self.exit_objective.freezes_teacher:
            self._remember_teacher()
        else:
            fastbert.config.distilled_for = None

    def _check_best_metric(self) -> None:
        """Raise a `ValueError` if the best model is to be told by a metric that no evaluation will report."""
        metric = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        for name in self.eval_dataset if isinstance(self.eval_dataset, dict) else ():
            metric = metric.removeprefix(f"{name}_")
        at_speeds = tuple(f"_speed_{speed:g}" for speed in self.args.eval_speeds)
        of_exits = f"{self.exit_objective.name}_exit_"
        is_reported = metric == "loss" or metric.startswith(of_exits) or metric.endswith(at_speeds)
        if not is_reported and self.args.eval_strategy != "no":
            examples = ["loss", *(f"accuracy{at_speed}" for at_speed in at_speeds)]
            raise ValueError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} is not what the evaluation reports, which "
                f"is a loss and what each of eval_speeds gives: choose one such as {', '.join(map(repr, examples))}."
            )

    def _remember_teacher(self) -> None:
        # Adapters may be merged later, which makes other weights of the same model: then nothing is said.
        fastbert = base_model(self.model)
        fastbert.config.distilled_for = teacher_digest(fastbert)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_in_train:
            self._remember_teacher()
        super().save_model(output_dir, _internal_call)

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, float]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        **kwargs,
    ):
        """
        Search as [`Trainer.hyperparameter_search`] does. The quantity is `eval_loss` unless `compute_objective` names
        another: the sum of all metrics would add depths to accuracies.
        """
        return super().hyperparameter_search(hp_space, compute_objective or _loss_of, **kwargs)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        model = super().call_model_init(trial)
        choose_what_learns(model, self.exit_objective)
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        fastbert = base_model(self.accelerator.unwrap_model(model))
        training = model.training
        if self.exit_objective.freezes_teacher:
            fastbert.eval()
            for module in fastbert.student_modules():
                module.train(training)
        outputs = model(**{**inputs, "labels": None}, output_exit_logits=True)
        if not training and self.exit_objective.needs_labels and inputs.get("labels") is None:
            return (None, outputs) if return_outputs else None
        # Of tokens those that have labels, as nobody asks for the others.
        outputs.exit_logits = self.task.labelled(outputs.exit_logits, wanted_labels(inputs, inputs.get("labels")))
        losses = self.exit_losses(outputs.exit_logits, inputs.get("labels"))
        if training:
            self._losses = self._losses + losses.detach()
            self._steps += 1
        return (losses.sum(), outputs) if return_outputs else losses.sum()

    def exit_losses(self, exit_logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """
        Return the loss of every exit that learns; their sum is minimised.

        Args:
            exit_logits (`torch.Tensor` of shape `[rows, L, num_labels]`): Of every exit.
            labels (`torch.Tensor` of shape `[rows]`, *optional*): Gold labels.
        """
        if self.exit_objective.needs_labels and labels is None:
            raise ValueError(
                f"objective={self.args.objective!r} learns from labels, but the rows have none: give them a 'labels' "
                "column, or learn the answers of the teacher, which needs none: objective='self_distillation'."
            )
        return self.exit_objective.losses(exit_logits, labels, self.args, self.task)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._steps:
            mean = self.accelerator.reduce(self._losses / self._steps, "mean")
            logs.update(self._named(mean))
            self._losses, self._steps = 0.0, 0
        super().log(logs, start_time)

    def _named(self, losses: torch.Tensor) -> dict[str, float]:
        name = self.exit_objective.name
        return {f"{name}_exit_{depth}": loss for depth, loss in enumerate(losses.tolist(), start=1)}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        # What is gathered is padded along the dimension after the rows, which are tokens where those are labelled.
        return loss, outputs.exit_logits.float().movedim(1, -2), inputs.get("labels")

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        # Trainer asks for the loss only where it has no `compute_metrics`; ours need no labels, so they are made here.
        prediction_loss_only = self.args.prediction_loss_only
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if output.predictions is not None:
            exit_logits = torch.from_numpy(output.predictions).movedim(-2, 1)
            output = output._replace(predictions=exit_logits.numpy())
            has_answers = ~self.task.has_nan(exit_logits).any(0)  # [L]
            if not has_answers.all():
                raise ValueError(
                    f"exits {(~has_answers).nonzero()[:, 0].add(1).tolist()} answer some rows with NaN: check the "
                    "weights of the model, which a training with too high a learning_rate leaves so."
                )
            metrics, speeds = self.speed_metrics(exit_logits, output.label_ids)
            if metric_key_prefix.startswith("eval"):  # with a prefix for each of several data sets
                split = metric_key_prefix.removeprefix("eval").removeprefix("_") or None
                base_model(self.model).measured = Measured(speeds, rows=len(exit_logits), split=split)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def speed_metrics(
        self, exit_logits: torch.Tensor, label_ids: np.ndarray | None
    ) -> tuple[dict[str, float], list[dict[str, float]]]:
        """
        Return what one full-depth pass tells of the exits and of every speed in `args.eval_speeds`, as metrics; and a
        row for each of these speeds and for speed 0, as the model card shows them.

        Args:
            exit_logits (`torch.Tensor` of shape `[rows, L, num_labels]`): Of every exit.
            label_ids (`np.ndarray` of shape `[rows]`, *optional*): Gold labels.
        """
        metrics = {}
        if label_ids is not None:
            self.task.check_gold(torch.from_numpy(label_ids))
        if label_ids is not None or not self.exit_objective.needs_labels:
            losses = self.exit_losses(exit_logits, None if label_ids is None else torch.from_numpy(label_ids))
            metrics = {"loss": losses.sum().item(), **self._named(losses)}
        record, config = ExitRecord(exit_logits), base_model(self.model).config
        of_teacher, speeds = exit_logits[:, -1], []
        for speed in dict.fromkeys([*self.args.eval_speeds, 0.0]):
            replay = replay_at_speed(record, config, speed)
            at_speed = {
                "mean_exit_layer": replay.exit_layer.float().mean().item(),
                "agreement": 1 - self.task.differs(replay.logits, of_teacher).float().mean().item(),
            }
            of_task = {}
            if label_ids is not None:
                of_task = self.metrics_at_speed(EvalPrediction(replay.logits.numpy(), label_ids))
            if speed in self.args.eval_speeds:
                at_this = {**at_speed, **of_task}
                metrics.update({f"{name}_speed_{speed:g}": value for name, value in at_this.items()})
            speed_up = config.num_hidden_layers / at_speed["mean_exit_layer"]
            speeds.append({**of_task, "speed": speed, **at_speed, "layer_speed_up": speed_up})
        return metrics, sorted(speeds, key=lambda row: row["speed"])

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Write the model card into `args.output_dir`: what the last evaluation measured at each speed, and the settings
        of this training. Arguments as in `Trainer`. The card of an adapter is PEFT's own.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        fastbert = base_model(self.model)
        if fastbert is not self.model:
            super().create_model_card(**given)
            return
        if not self.is_world_process_zero():
            return
        summary = TrainingSummary.from_trainer(self, **given)
        datasets = as_list(summary.dataset_tags or summary.dataset)
        measured = getattr(fastbert, "measured", None)
        write_model_card(
            self.args.output_dir,
            fastbert,
            measured and replace(measured, dataset=datasets[0] if datasets else None),
            model_name=summary.model_name,
            repo_id=self.hub_model_id or self.args.hub_model_id,
            base_model=summary.finetuned_from,
            datasets=datasets,
            language=summary.language,
            license=summary.license,
            tags=summary.tags,
            training=self._settings_for_card(summary.hyperparameters) if self.state.global_step > 0 else None,
        )

    def _settings_for_card(self, hyperparameters: dict[str, Any]) -> dict[str, Any]:
        settings = {"objective": self.args.objective, **hyperparameters}
        if not self.exit_objective.needs_labels:
            settings["temperature"] = self.args.temperature
        # In the summary this is a sentence.
        settings["optimizer"] = self.args.optim.value
        if self._has_own_optimizer:
            for name in ("optimizer", "learning_rate", "lr_scheduler_type", "lr_scheduler_warmup_steps"):
                settings.pop(name, None)
        return settings


class _Beginning(TrainerCallback):
    """Tells an [`ExitTrainer`] that its training begins."""

    def __init__(self, trainer: ExitTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_training()


def _loss_of(metrics: dict[str, float]) -> float:
    return metrics["eval_loss"]


class SelfDistillationTrainer(ExitTrainer):
    """
    Teach the students to give the answers of the teacher: stage 2 of FastBERT. Everything else stays as it is. Labels
    are not used; texts without labels are welcome.

    This is [`ExitTrainer`] with its objective fixed; see there for what the evaluation reports.

    Args:
        model ([`FastBertForSequenceClassification`]): With a trained teacher. A PEFT model around one works, too.
        args ([`SelfDistillationArguments`], *optional*): Settings.
        kwargs: As in [`ExitTrainer`].

    Example:

    ```python
    >>> trainer = SelfDistillationTrainer(model, SelfDistillationArguments("outputs"), train_dataset=texts)
    >>> trainer.train()
    ```
    """

    arguments_class = SelfDistillationArguments
