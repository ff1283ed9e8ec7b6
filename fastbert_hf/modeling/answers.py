"""What the classifier returns, and how the answers of several exits become one batch again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers.modeling_outputs import ModelOutput


@dataclass
class FastBertSequenceClassifierOutput(ModelOutput):
    """
    Answers of [`FastBertForSequenceClassification`].

    Args:
        loss (`torch.Tensor`, *optional*): Cross entropy of `logits`, where labels were given.
        logits (`torch.Tensor` of shape `[batch_size, num_labels]`): At the exit that each row took.
        exit_layer (`torch.Tensor` of shape `[batch_size]`, long): Layers that each row ran through, 1 to L.
        uncertainty (`torch.Tensor` of shape `[batch_size]`, float32): Of the exit taken, by the config's
            `exit_policy`.
        exit_logits (`torch.Tensor` of shape `[batch_size, L, num_labels]`, *optional*): Of every exit.
        hidden_states (`tuple` of `torch.Tensor`, *optional*):
            The embeddings and the output of each layer, `[batch_size, sequence_length, hidden_size]`, zero at padding.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_layer: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None
    exit_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class CascadeSequenceClassifierOutput(ModelOutput):
    """
    Answers of [`CascadeForSequenceClassification`].

    Args:
        loss (`torch.Tensor`, *optional*): Cross entropy of `logits`, where labels were given.
        logits (`torch.Tensor` of shape `[batch_size, num_labels]`): Of the member that answered.
        exit_layer (`torch.Tensor` of shape `[batch_size]`, long): Layers that each row ran through in all members.
        uncertainty (`torch.Tensor` of shape `[batch_size]`, float32): Of the answer, by the config's `exit_policy`.
        exit_member (`torch.Tensor` of shape `[batch_size]`, long): The member that answered, 1 to n.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_layer: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None
    exit_member: torch.Tensor | None = None


class Answer(NamedTuple):
    """
    What `predict` says of one text.

    Args:
        logits (`torch.Tensor` of shape `[num_labels]`, CPU): At the exit that the text took.
        exit_layer (`int`): Layers that it ran through, 1 to L; in all members of a cascade together.
        uncertainty (`float`): Of the exit taken, by the config's `exit_policy`.
        exit_member (`int`, *optional*): The member of a cascade that answered, 1 to n.
    """

    logits: torch.Tensor
    exit_layer: int
    uncertainty: float
    exit_member: int | None = None


@dataclass(frozen=True)
class Leaving:
    """
    The answers of the texts that left at one exit.

    Args:
        rows (`torch.Tensor` of shape `[texts]`, CPU): Rows of the caller's batch.
        logits (`torch.Tensor` of shape `[texts, num_labels]`): What the exit says of them.
        uncertainty (`torch.Tensor` of shape `[texts]`): How sure it is.
        exit_layer (`int`): Layers that they ran through.
    """

    rows: torch.Tensor
    logits: torch.Tensor
    uncertainty: torch.Tensor
    exit_layer: int

    def keep(self, kept: torch.Tensor) -> Leaving:
        """Some of them: `kept` is a mask of shape `[texts]` on the CPU."""
        places = kept.nonzero()[:, 0].to(self.logits.device)
        return replace(self, rows=self.rows[kept], logits=self.logits[places], uncertainty=self.uncertainty[places])


def in_order(answers: list[Leaving]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits, uncertainty and exit layer of every row of the caller's batch, on the logits' device."""
    if len(answers) == 1 and len(answers[0].rows) == 1:
        exit_layer = torch.tensor([answers[0].exit_layer], device=answers[0].logits.device)
        return answers[0].logits, answers[0].uncertainty, exit_layer
    order = torch.cat([leaving.rows for leaving in answers]).argsort()
    exit_layer = torch.cat([torch.full_like(leaving.rows, leaving.exit_layer) for leaving in answers])
    logits = torch.cat([leaving.logits for leaving in answers])
    order = order.to(logits.device)
    uncertainty = torch.cat([leaving.uncertainty for leaving in answers])
    return logits[order], uncertainty[order], exit_layer.to(logits.device)[order]
