"""The policy "learned": a small gate at each exit tells how likely its answer differs from the full model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from .task_interface import Task


# Of each gate: a weight for each of a task's four features, and a bias.
NUMBERS = 5
MOST_WEIGHT = 1e4
HOW = 'fastbert_hf.calibrate(model, texts, tokenizer, exit_policy="learned")'


@dataclass(frozen=True, eq=False)
class ExitGates:
    """
    The gates of all exits of a model, or of all members of a cascade one behind the other.

    Args:
        weights (`torch.Tensor` of shape `[exits, features + 1]`):
            Of each exit a weight for each of the task's `gate_features`, and a bias.
    """

    weights: torch.Tensor

    def uncertainty(
        self, task: Task, logits: torch.Tensor, state: torch.Tensor, place: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return how likely the answers of an exit differ from the full model's (of a regression how far they are
        expected to be), float32 of shape `[rows]`, and what is remembered of the rows from here on.

        Args:
            task ([`Task`]), logits (`torch.Tensor` of shape `[rows, ...]`): What the exit says, and means.
            state (`torch.Tensor` of shape `[rows, ...]`): From the exit before.
            place (`int`): Number of the exit, from 1; those of all members of a cascade are counted.
        """
        features, state = task.gate(logits, state)
        weights = self.weights[place - 1].to(logits.device, non_blocking=True)
        # No product with a matrix, which is rounded as the number of its rows wants it.
        return task.gate_uncertainty((features * weights[:-1]).sum(-1) + weights[-1]), state


def check_gates(gates: Any, num_exits: int, policy: str) -> None:
    """
    Raise a `ValueError` unless `gates` is what a config with so many exits and this exit policy may have: `None`, or
    what [`calibrate`] writes.
    """
    if gates is None:
        if policy == "learned":
            raise ValueError(f'exit_policy="learned" needs gates, which this model has not: {HOW}')
        return
    is_right = isinstance(gates, Sequence) and not isinstance(gates, str) and len(gates) == num_exits
    if not is_right or not all(map(is_gate, gates)):
        raise ValueError(
            f"gates={gates!r:.80} are not what calibrate writes, {NUMBERS} finite numbers for each of "
            f"{num_exits} exits: set them to None, or make them anew with {HOW}"
        )


def is_gate(gate: Any) -> bool:
    """Tell whether this is a weight for each feature, and a bias."""
    if not isinstance(gate, Sequence) or len(gate) != NUMBERS:
        return False
    return all(
        isinstance(weight, Real) and not isinstance(weight, bool) and abs(weight) <= MOST_WEIGHT for weight in gate
    )
