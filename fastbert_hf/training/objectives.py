"""What the exits are taught: one small loss for each objective, as each paper defines it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling.categorical_tasks import SingleLabel
from ..modeling.task_interface import Task


# For callers that have no config at hand.
CLASSIFICATION = SingleLabel()


def student_divergences(
    exit_logits: torch.Tensor, reverse_kl: bool = False, temperature: float = 1.0, task: Task = CLASSIFICATION
) -> torch.Tensor:
    """
    Return the divergence of each student from the teacher, averaged over the rows, in float32 (FastBERT, ACL 2020,
    Eq. 5 and 6).

    Args:
        exit_logits (`torch.Tensor` of shape `[rows, L, num_labels]`, or `[rows, L, tokens, num_labels]`):
            Of every exit; the last one is the teacher.
        reverse_kl (`bool`): KL(student || teacher) instead of KL(teacher || student).
        temperature (`float`):
            Divides all logits; the divergence is multiplied by its square, so that gradients keep their size (Hinton
            et al., 2015, section 2). The paper's is 1.
        task ([`Task`]): Of the model.

    Returns:
        `torch.Tensor` of shape `[L - 1]`; its sum is the loss. The teacher gets no gradient.
    """
    students, teacher = exit_logits[:, :-1], exit_logits[:, -1:].detach()
    return task.divergence(students, teacher, temperature=temperature, reverse=reverse_kl).mean(0)


def depth_weights(num_exits: int, device: torch.device | None = None) -> torch.Tensor:
    """Return the weight of each exit in PABEE's loss (NeurIPS 2020, Eq. 5): j / (1 + ... + L) for exit j."""
    depths = torch.arange(1, num_exits + 1, dtype=torch.float32, device=device)
    return depths / depths.sum()


def difficulty_margin_loss(
    logits: torch.Tensor,
    difficulty: torch.Tensor,
    margin: float = 0.5,
    sample_pairs: bool = False,
    task: Task = CLASSIFICATION,
) -> torch.Tensor:
    """
    Return by how much easy rows fail to be more confident than hard rows by a margin: max(0, margin - (c_easy -
    c_hard)), averaged over all pairs of an easy and a hard row (CascadeBERT, Findings of EMNLP 2021, Eq. 4 to 6). The
    confidence c is the highest probability. In float32, or in float64 where the logits are.

    With the sign of Eq. 6 as printed, the loss would raise the confidence of hard rows. Section 3.2 says that it is to
    fall, and the authors' code does so: `MarginRankingLoss(margin)` of easy, hard and +1. Pairs of equal difficulty
    would add the margin, without a gradient, and are left out.

    Args:
        logits (`torch.Tensor` of shape `[rows, num_labels]`): Of one batch.
        difficulty (`torch.Tensor` of shape `[rows]`): 0 for easy rows, 1 for hard ones.
        margin (`float`): The epsilon of Eq. 5, a difference of probabilities.
        sample_pairs (`bool`):
            Pairs each easy row with one hard row, drawn with replacement, as the authors' code does, instead of with
            all of them. The expected loss is the same.
        task ([`Task`]): Of the model.

    Returns:
        `torch.Tensor` without dimensions; 0, with a gradient of 0, where all rows are easy or all are hard.
    """
    if difficulty.shape != logits.shape[:1] or not ((difficulty == 0) | (difficulty == 1)).all():
        raise ValueError(
            f"difficulty must be 0 (easy) or 1 (hard) for each of the {len(logits)} rows, got "
            f"{difficulty.tolist()}. Example: torch.tensor([0, 1, 0])"
        )
    confidence = task.probabilities(logits).amax(-1)  # [rows]
    easy, hard = confidence[difficulty == 0], confidence[difficulty == 1]
    if sample_pairs and len(hard) > 0:
        gaps = easy - hard[torch.randint(len(hard), easy.shape, device=hard.device)]  # [easy]
    else:
        gaps = easy[:, None] - hard  # [easy, hard]
    # A mean would be NaN where there is no pair.
    return (margin - gaps).clamp(min=0).sum() / max(1, gaps.numel())


@dataclass(frozen=True)
class Objective:
    """
    What the exits are taught, and what learns by it.

    Args:
        losses (`Callable`):
            From the logits of every exit, `[rows, L, num_labels]`, the labels (or `None`), the
            [`ExitTrainingArguments`] and the [`Task`] to one loss for each exit that learns, first to last. Their sum
            is minimised.
        name (`str`): What the logs call these losses: `name_exit_1`, ...
        freezes_teacher (`bool`): Whether the backbone and the teacher stay as they are, and only the students learn.
        needs_labels (`bool`): Whether it learns from labels. Otherwise it learns the answers of the teacher.
    """

    losses: Callable[[torch.Tensor, torch.Tensor | None, Any, Task], torch.Tensor]
    name: str
    freezes_teacher: bool
    needs_labels: bool = True


def _self_distillation(exit_logits, labels, args, task):
    return student_divergences(exit_logits, args.reverse_kl, args.temperature, task)


def _frozen_cross_entropy(exit_logits, labels, args, task):
    return task.mean_loss(exit_logits[:, :-1], labels)


def _joint_cross_entropy(exit_logits, labels, args, task):
    return task.mean_loss(exit_logits, labels)


def _weighted_cross_entropy(exit_logits, labels, args, task):
    return task.mean_loss(exit_logits, labels) * depth_weights(exit_logits.shape[1], exit_logits.device)


OBJECTIVES = {
    # FastBERT, ACL 2020, Eq. 5 and 6.
    "self_distillation": Objective(_self_distillation, "kl", freezes_teacher=True, needs_labels=False),
    # DeeBERT, ACL 2020, section 3.2: the second stage of its fine-tuning.
    "frozen_cross_entropy": Objective(_frozen_cross_entropy, "cross_entropy", freezes_teacher=True),
    # FastBERT without self-distillation, Table 3: all classifiers learn in the fine-tuning.
    "joint_cross_entropy": Objective(_joint_cross_entropy, "cross_entropy", freezes_teacher=False),
    # PABEE, NeurIPS 2020, Eq. 5.
    "weighted_cross_entropy": Objective(_weighted_cross_entropy, "weighted_cross_entropy", freezes_teacher=False),
}
