"""DifficultyAwareTrainer: fine-tuning that makes a classifier less sure of hard texts than of easy ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.tasks import task_of
from .arguments import StageArguments
from .checked_trainer import CheckedTrainer, base_model
from .objectives import difficulty_margin_loss


@dataclass
class DifficultyAwareArguments(StageArguments):
    """
    `TrainingArguments` with the fields of CascadeBERT's difficulty-aware regularisation (section 3.2).

    Args:
        difficulty_weight (`float`, *optional*, defaults to 0.5):
            The weight lambda of the regularisation beside the task loss.
        difficulty_margin (`float`, *optional*, defaults to 0.5):
            The margin epsilon in [0, 1] by which easy rows are to be more confident than hard ones. The paper chooses
            among 0.1, 0.3, 0.5 and 0.7 on validation data: 0.3 for MNLI, QNLI and QQP, 0.5 for MRPC, RTE and SST-2
            (Table 1).
        sample_pairs (`bool`, *optional*, defaults to `False`):
            Whether each easy row is compared with one random hard row of the batch, as in the authors' code, instead
            of with all.
    """

    difficulty_weight: float = field(default=0.5, metadata={"help": "Weight of the regularisation."})
    difficulty_margin: float = field(
        default=0.5, metadata={"help": "In [0, 1]: how much more confident easy rows are to be than hard ones."}
    )
    sample_pairs: bool = field(
        default=False, metadata={"help": "Compare each easy row with one random hard row instead of all."}
    )

    def __post_init__(self):
        if not 0 <= self.difficulty_weight < math.inf:
            raise ValueError(
                f"difficulty_weight must be a finite number from 0 on, got {self.difficulty_weight}. The paper's is "
                "0.5"
            )
        if not 0 <= self.difficulty_margin <= 1:
            raise ValueError(
                f"difficulty_margin must be a number in [0, 1], got {self.difficulty_margin}. Example: "
                "difficulty_margin=0.5"
            )
        super().__post_init__()


class DifficultyAwareTrainer(CheckedTrainer):
    """
    Fine-tune a classifier with the task loss and, weighted, [`difficulty_margin_loss`] (CascadeBERT, Findings of
    EMNLP 2021, section 3.2), so that its confidence tells which texts to hand on to a larger model. For a FastBERT
    model this is another stage 1, which regularises the teacher.

    Training rows need the column `difficulty`, from [`label_difficulty`]. Evaluation rows may have it: `eval_loss` is
    then that of the training, over all pairs of each batch, else the task loss alone. The unweighted mean of the
    regularisation is in the training's logs as `difficulty_loss`. The rest is as in [`CheckedTrainer`]: rows may be
    texts, and a training that becomes NaN ends with an error.

    With gradient accumulation the losses are means over each micro-batch, and pairs are made within it.

    Args:
        model (`PreTrainedModel`): A stock classifier or a [`FastBertForSequenceClassification`].
        args ([`DifficultyAwareArguments`], *optional*): Settings.
        kwargs: As in `Trainer`. `compute_loss_func` is the task loss, and is given the number of items in the
            micro-batch.

    Example:

    ```python
    >>> texts = label_difficulty(model_init, TrainingArguments("outputs/difficulty"), texts)
    >>> trainer = DifficultyAwareTrainer(model, DifficultyAwareArguments("outputs"), train_dataset=texts)
    >>> trainer.train()
    ```
    """

    own_columns = ("difficulty",)
    # Many stock classifiers take the number of items and then ignore it, so each loss here is a mean over its rows.
    loss_is_scaled_for_ga = False

    def __init__(self, model: PreTrainedModel | None = None, args: DifficultyAwareArguments | None = None, **kwargs):
        if args is None:
            args = DifficultyAwareArguments("trainer_output")
        if not isinstance(args, DifficultyAwareArguments):
            raise TypeError(
                f"args must be DifficultyAwareArguments, got {type(args).__name__}. Example: "
                "DifficultyAwareTrainer(model, DifficultyAwareArguments('outputs', difficulty_margin=0.3), "
                "train_dataset=...)"
            )
        super().__init__(model, args, **kwargs)
        check_one_label(base_model(self.model))
        self._difficulty_loss, self._steps = 0.0, 0

    def train(self, *args, **kwargs):
        self._difficulty_loss, self._steps = 0.0, 0
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        inputs = dict(inputs)
        difficulty = inputs.pop("difficulty", None)
        if difficulty is None and model.training:
            raise ValueError(
                "the training rows have no 'difficulty', so there is nothing to regularise with. Label them: "
                "train_dataset = label_difficulty(model_init, args, train_dataset)"
            )
        # Of this micro-batch, where the one given is that of all that are accumulated.
        items = None if self.compute_loss_func is None else self._get_num_items_in_batch([inputs], self.args.device)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
        if difficulty is not None:
            sample_pairs = self.args.sample_pairs and model.training
            task = task_of(self.accelerator.unwrap_model(model).config)
            regularisation = difficulty_margin_loss(
                outputs.logits, difficulty, self.args.difficulty_margin, sample_pairs, task
            )
            loss = loss + self.args.difficulty_weight * regularisation
            if model.training:
                self._difficulty_loss = self._difficulty_loss + regularisation.detach()
                self._steps += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._steps:
            logs["difficulty_loss"] = self.accelerator.reduce(self._difficulty_loss / self._steps, "mean").item()
            self._difficulty_loss, self._steps = 0.0, 0
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        if not self.label_names or any(inputs.get(name) is None for name in self.label_names):
            # There is no loss to compute: all that is left goes to the model.
            inputs = {name: value for name, value in inputs.items() if name != "difficulty"}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


def check_one_label(model: PreTrainedModel) -> None:
    """Raise a `ValueError` unless a model gives one label to each text: only then is a text easy or hard."""
    if task_of(model.config).name != "single_label_classification":
        raise ValueError(
            f"difficulty is of texts with one label each, and this model is for {task_of(model.config).name}: train "
            "it with Trainer."
        )
