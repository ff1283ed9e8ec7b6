"""What an exit answers and how sure it is of it: one row of a table for each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Task:
    """What the logits of an exit, `[..., num_labels]`, mean. No other code knows it."""

    name: str  # as `problem_type` has it
    # To the scores that an answer reports, at least in float32, and to the label ids that are answered, [...].
    probabilities: Callable[[torch.Tensor], torch.Tensor]
    predictions: Callable[[torch.Tensor], torch.Tensor]
    # With labels, to the loss of each row, [rows].
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    # With those of the teacher, `temperature` and `reverse`, to how far each answer of a student is from it, [...].
    divergence: Callable[..., torch.Tensor]
    # By the name of an exit policy, to a number in [0, 1], [...].
    uncertainties: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    function_to_apply: str  # by which the stock pipeline makes scores of logits
    least_labels: int  # fewer are an error

    def mean_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Return the loss averaged over the rows that have a label, in float32, or that of each of several exits.

        Args:
            logits (`torch.Tensor` of shape `[rows, num_labels]` or `[rows, exits, num_labels]`): Of one or more exits.
            labels (`torch.Tensor` of shape `[rows]` or `[rows, num_labels]`):
                Label ids, where -100 marks a row without a label, or probabilities.
        """
        if logits.dim() == 3:
            return torch.stack([self.mean_loss(of_exit, labels) for of_exit in logits.unbind(1)])
        labels = labels if labels.is_floating_point() else labels.view(-1)
        losses = self.loss(logits.float(), labels)
        return losses.mean() if labels.is_floating_point() else losses.sum() / (labels != -100).sum()


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    are_probabilities = labels.is_floating_point()
    if labels.shape != (logits.shape if are_probabilities else logits.shape[:1]):
        raise ValueError(
            f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}: give one id for "
            "each row, as torch.tensor([0, 2]), or the probabilities of all labels, as torch.tensor([[0.9, 0.1]])."
        )
    if are_probabilities:
        tolerance = max(1e-3, torch.finfo(labels.dtype).eps)  # those in bfloat16 are rounded
        labels = labels.to(logits.dtype)
        right = ((labels.sum(-1) - 1).abs() <= tolerance) & (labels >= 0).all(-1)
        if not right.all():
            row = right.logical_not().nonzero()[0].item()
            raise ValueError(
                f"the labels of row {row}, {[round(value, 4) for value in labels[row, :8].tolist()]}, are no "
                "probabilities, which add up to 1. Several labels for one text are not supported; for a single one "
                "give its id, as torch.tensor([0, 2])."
            )
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def _kullback_leibler(
    students: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0, reverse: bool = False
) -> torch.Tensor:
    # Softened logits make small gradients; the square gives them their size back (Hinton et al., 2015, section 2).
    given, wanted = ((logits.float() / temperature).log_softmax(-1) for logits in (students, teacher))
    given, wanted = (wanted, given) if reverse else (given, wanted)  # KL(student || teacher) if reverse
    divergences = nn.functional.kl_div(*torch.broadcast_tensors(given, wanted), reduction="none", log_target=True)
    return divergences.sum(-1) * temperature**2


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    probabilities = _softmax(logits)
    entropy = (torch.special.entr(probabilities).sum(-1) / math.log(logits.shape[-1])).clamp(0, 1)
    # The sum rounds below 1 for many numbers of labels, and an undecided text would be below the speed 1.
    return entropy.masked_fill(probabilities.amax(-1) == probabilities.amin(-1), 1)


def _confidence(logits: torch.Tensor) -> torch.Tensor:
    num_labels = logits.shape[-1]
    # Written so that equal probabilities round to exactly 1.
    return (1 - (_softmax(logits).amax(-1) * num_labels - 1) / (num_labels - 1)).clamp(0, 1)


def _margin(logits: torch.Tensor) -> torch.Tensor:
    best, second = _softmax(logits).topk(2).values.unbind(-1)
    return 1 - (best - second)


TASKS = {
    "single_label_classification": Task(
        name="single_label_classification",
        probabilities=_softmax,
        predictions=lambda logits: logits.argmax(-1),
        loss=_cross_entropy,
        divergence=_kullback_leibler,
        uncertainties={"entropy": _entropy, "confidence": _confidence, "margin": _margin},
        function_to_apply="softmax",
        least_labels=2,
    ),
}


def task_of(config: PreTrainedConfig) -> Task:
    """
    Return the task of a config: one label for each text where `problem_type` names none.

    Raises:
        ValueError: If there is no such task, or it has too few labels.
    """
    name = config.problem_type or "single_label_classification"
    task = TASKS.get(name)
    if task is None or config.num_labels < task.least_labels:
        raise ValueError(
            f"num_labels={config.num_labels} with problem_type={config.problem_type!r} is not supported: each text is "
            "classified into one of at least two labels. Example: num_labels=2, problem_type=None"
        )
    return task
