"""What the exits are taught: one small loss for each objective, as each paper defines it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def student_divergences(exit_logits: torch.Tensor, reverse_kl: bool = False, temperature: float = 1.0) -> torch.Tensor:
    """
    The divergence of each student from the teacher, averaged over the rows, in float32 (FastBERT, ACL 2020, Eq. 5 and
    6).

    Args:
        exit_logits (`torch.Tensor` of shape `[rows, L, num_labels]`): Of every exit; the last one is the teacher.
        reverse_kl (`bool`): KL(student || teacher) instead of KL(teacher || student).
        temperature (`float`):
            Divides all logits; the divergence is multiplied by its square, so that gradients keep their size (Hinton
            et al., 2015, section 2). The paper's is 1.

    Returns:
        `torch.Tensor` of shape `[L - 1]`; its sum is the loss. The teacher gets no gradient.
    """
    log_probabilities = (exit_logits.float() / temperature).log_softmax(-1)
    students = log_probabilities[:, :-1]
    teacher = log_probabilities[:, -1:].detach().expand_as(students)
    wanted, given = (students, teacher) if reverse_kl else (teacher, students)
    divergences = nn.functional.kl_div(given, wanted, reduction="none", log_target=True)
    return divergences.sum(-1).mean(0) * temperature**2


def exit_cross_entropies(exit_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    The cross entropy of each exit with the gold labels, averaged over the rows, in float32.

    Args:
        exit_logits (`torch.Tensor` of shape `[rows, exits, num_labels]`): Of some exits.
        labels (`torch.Tensor` of shape `[rows]`): Gold labels.

    Returns:
        `torch.Tensor` of shape `[exits]`.
    """
    labels = labels.view(-1, 1).expand(exit_logits.shape[:2])
    losses = nn.functional.cross_entropy(exit_logits.float().transpose(1, 2), labels, reduction="none")
    # As in the stock models, rows with the label -100 do not count.
    return losses.sum(0) / (labels[:, 0] != -100).sum()


def depth_weights(num_exits: int, device: torch.device | None = None) -> torch.Tensor:
    """The weight of each exit in PABEE's loss (NeurIPS 2020, Eq. 5): j / (1 + ... + L) for exit j."""
    depths = torch.arange(1, num_exits + 1, dtype=torch.float32, device=device)
    return depths / depths.sum()


@dataclass(frozen=True)
class Objective:
    """
    Args:
        losses (`Callable`):
            From the logits of every exit, `[rows, L, num_labels]`, the labels (or `None`) and the
            [`SelfDistillationArguments`] to one loss for each exit that learns, first to last. Their sum is minimised.
        name (`str`): What the logs call these losses: `name_exit_1`, ...
        freezes_teacher (`bool`): Whether the backbone and the teacher stay as they are, and only the students learn.
        needs_labels (`bool`): Whether rows without labels cannot be used.
    """

    losses: Callable[[torch.Tensor, torch.Tensor | None, Any], torch.Tensor]
    name: str
    freezes_teacher: bool
    needs_labels: bool = True


def _self_distillation(exit_logits, labels, args):
    return student_divergences(exit_logits, args.reverse_kl, args.temperature)


def _frozen_cross_entropy(exit_logits, labels, args):
    return exit_cross_entropies(exit_logits[:, :-1], labels)


def _joint_cross_entropy(exit_logits, labels, args):
    return exit_cross_entropies(exit_logits, labels)


def _weighted_cross_entropy(exit_logits, labels, args):
    return exit_cross_entropies(exit_logits, labels) * depth_weights(exit_logits.shape[1], exit_logits.device)


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
