"""The policy "learned": a small gate at each exit tells how likely its answer differs from the full model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from .tasks import Task


# What a gate weighs, of an exit's answer to a text: its entropy; how far its logit is above the second best; the
# probability that the exits before gave it, on average; the share of them that answered the same.
FEATURES = ("entropy", "lead", "earlier_probability", "agreement")
MOST_LEAD = 20.0  # beyond, softmax is 1 in float32
MOST_WEIGHT = 1e4
HOW = 'fastbert_hf.calibrate(model, texts, tokenizer, exit_policy="learned")'


@dataclass(frozen=True, eq=False)
class ExitGates:
    """
    The gates of all exits of a model, or of all members of a cascade one behind the other.

    Args:
        weights (`torch.Tensor` of shape `[exits, 5]`): Of each exit a weight for each of `FEATURES`, and a bias.
        num_labels (`int`): Number of labels.
    """

    weights: torch.Tensor
    num_labels: int

    def start(self, texts: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """
        Return what is remembered of texts before their first exit, `[texts, 2, num_labels]`: the probabilities and the
        answers of the exits so far, added up.
        """
        return torch.zeros(texts, 2, self.num_labels, device=device)

    def uncertainty(
        self, task: Task, logits: torch.Tensor, state: torch.Tensor, place: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return how likely the answers of an exit differ from the full model's, float32 of shape `[rows]`, and what is
        remembered of the rows from here on.

        Args:
            task ([`Task`]), logits (`torch.Tensor` of shape `[rows, num_labels]`): What the exit says, and means.
            state (`torch.Tensor` of shape `[rows, 2, num_labels]`): From the exit before.
            place (`int`): Number of the exit, from 1; those of all members of a cascade are counted.
        """
        features, state = gate_features(task, logits, state)
        weights = self.weights[place - 1].to(logits.device, non_blocking=True)
        # No product with a matrix, which is rounded as the number of its rows wants it.
        return ((features * weights[:-1]).sum(-1) + weights[-1]).sigmoid(), state


def gate_features(task: Task, logits: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `FEATURES` of the answers of an exit, `[rows, 4]`, and what is remembered of the rows from here on."""
    logits = logits.float()
    probabilities, answers = task.probabilities(logits), task.predictions(logits)[:, None]
    best, second = logits.topk(2).values.unbind(-1)
    entropy = torch.special.entr(probabilities).sum(-1) / math.log(logits.shape[-1])
    # Of the answer, by the exits so far: [rows, 2].
    earlier = state.gather(2, answers[:, None].expand(-1, 2, -1)).squeeze(2)
    earlier = earlier / state[:, 1].sum(-1, keepdim=True).clamp_(min=1)
    votes = torch.zeros_like(probabilities).scatter_(1, answers, 1.0)
    own = torch.stack([entropy, (best - second).clamp_(max=MOST_LEAD)], -1)
    return torch.cat([own, earlier], -1), state + torch.stack([probabilities, votes], 1)


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
            f"gates={gates!r:.80} are not what calibrate writes, {len(FEATURES) + 1} finite numbers for each of "
            f"{num_exits} exits: set them to None, or make them anew with {HOW}"
        )


def is_gate(gate: Any) -> bool:
    """Tell whether this is a weight for each feature, and a bias."""
    if not isinstance(gate, Sequence) or len(gate) != len(FEATURES) + 1:
        return False
    return all(
        isinstance(weight, Real) and not isinstance(weight, bool) and abs(weight) <= MOST_WEIGHT for weight in gate
    )
