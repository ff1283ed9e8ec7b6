"""Arguments of the trainings that teach the exits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from ..modeling.exit_policies import check_speed
from .objectives import OBJECTIVES


@dataclass
class StageArguments(TrainingArguments):
    """`TrainingArguments` with which even a training of one step learns, and without a warning on every machine."""

    def __post_init__(self):
        super().__post_init__()
        if not torch.accelerator.is_available():  # nothing to copy to, and PyTorch would only warn of it
            self.dataloader_pin_memory = False

    def get_warmup_steps(self, num_training_steps: int) -> int:
        steps = super().get_warmup_steps(num_training_steps)
        # A share is rounded up, and a single step would be all warm-up, at a learning rate of 0.
        return min(steps, num_training_steps - 1) if self.warmup_steps < 1 else steps


@dataclass
class ExitTrainingArguments(StageArguments):
    """
    `TrainingArguments` for [`ExitTrainer`]. The defaults are the settings of stage 2 in the FastBERT paper.

    Args:
        learning_rate (`float`, *optional*, defaults to 2e-4): Ten times that of the paper's stage 1.
        num_train_epochs (`float`, *optional*, defaults to 5): Passes over the training texts.
        warmup_steps (`float`, *optional*, defaults to 0.1): Below 1 a share of all steps, else a number of steps.
        eval_speeds (`list[float]`, *optional*, defaults to `[0.1, 0.5, 0.8]`):
            Speeds at which the evaluation reports, all derived from one full-depth pass.
        reverse_kl (`bool`, *optional*, defaults to `False`):
            Whether self-distillation minimises KL(student || teacher), as the paper's Eq. 5 prints it, instead of
            KL(teacher || student), as the authors' code computes it.
        temperature (`float`, *optional*, defaults to 1.0):
            Divides the logits of teacher and students in self-distillation. The paper has none.
        objective (`str`, *optional*, defaults to `"self_distillation"`):
            What the exits learn, a key of [`OBJECTIVES`]. `"self_distillation"` is stage 2 of FastBERT: the answers of
            the teacher. The others are those of the baselines and learn from labels: `"frozen_cross_entropy"` (the
            second stage of DeeBERT), `"joint_cross_entropy"` (all exits and the backbone at once) and
            `"weighted_cross_entropy"` (the same, but deeper exits count more: PABEE).
    """

    learning_rate: float = field(default=2e-4, metadata={"help": "Initial learning rate of the exits."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Passes over the training texts."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Below 1 a share of all steps, else a number of steps."}
    )
    eval_speeds: list[float] = field(
        default_factory=lambda: [0.1, 0.5, 0.8], metadata={"help": "Speeds in [0, 1] at which the evaluation reports."}
    )
    reverse_kl: bool = field(
        default=False, metadata={"help": "Minimise KL(student || teacher) instead of KL(teacher || student)."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits of teacher and students."})
    objective: str = field(default="self_distillation", metadata={"help": f"One of {', '.join(OBJECTIVES)}."})

    def __post_init__(self):
        for speed in self.eval_speeds:
            check_speed(speed)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} is not known; choose one of {', '.join(OBJECTIVES)}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a number above 0, got {self.temperature}. The paper's is 1.0")
        if self.batch_eval_metrics or not self.eval_do_concat_batches:
            raise ValueError(
                "batch_eval_metrics=True and eval_do_concat_batches=False are not supported: the speeds are derived "
                "from the answers to all rows. Leave both out."
            )
        super().__post_init__()


@dataclass
class SelfDistillationArguments(ExitTrainingArguments):
    """[`ExitTrainingArguments`] for [`SelfDistillationTrainer`], whose objective is always self-distillation."""

    objective: str = field(default="self_distillation", init=False)
