"""What the classifiers return."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.modeling_outputs import ModelOutput


@dataclass
class FastBertSequenceClassifierOutput(ModelOutput):
    """
    Answers of a FastBERT model or of a cascade.

    Args:
        loss (`torch.Tensor`, *optional*): Of `logits`, where labels were given.
        logits (`torch.Tensor` of shape `[batch_size, num_labels]`): At the exit that each row took.
        exit_layer (`torch.Tensor` of shape `[batch_size]`, long):
            Layers that each row ran through, 1 to L; in all members of a cascade together.
        uncertainty (`torch.Tensor` of shape `[batch_size]`, float32):
            Of the exit taken, by the `exit_policy` of the call or the config.
        exit_member (`torch.Tensor` of shape `[batch_size]`, long, *optional*):
            The member of a cascade that answered, 1 to n.
        exit_logits (`torch.Tensor` of shape `[batch_size, L, num_labels]`, *optional*): Of every exit.
        hidden_states (`tuple` of `torch.Tensor`, *optional*):
            The embeddings and the output of each layer, `[batch_size, sequence_length, hidden_size]`, zero at padding.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_layer: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None
    exit_member: torch.Tensor | None = None
    exit_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class FastBertQuestionAnsweringOutput(ModelOutput):
    """
    Where the answers of a FastBERT model begin and end in their texts.

    Args:
        loss (`torch.Tensor`, *optional*): Of both ends, where they were given.
        start_logits, end_logits (`torch.Tensor` of shape `[batch_size, sequence_length]`):
            At the exit that each row took, -100 at padding.
        exit_layer, uncertainty, hidden_states: As in [`FastBertSequenceClassifierOutput`].
        exit_logits (`torch.Tensor` of shape `[batch_size, L, sequence_length, 2]`, *optional*): Of every exit.
    """

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    exit_layer: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None
    exit_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class Prediction(NamedTuple):
    """
    What `predict` says of one text.

    Args:
        logits (`torch.Tensor` of shape `[num_labels]`, or `[tokens, num_labels]`, CPU):
            At the exit that the text took.
        exit_layer (`int`): Layers that it ran through, 1 to L; in all members of a cascade together.
        uncertainty (`float`): Of the exit taken, by the `exit_policy` of the call or the config.
        exit_member (`int`): The member of a cascade that answered, 1 to n; 1 where there is no cascade.
        error (`Exception`, *optional*):
            Why the text has no answer, with `on_error="return"`. Its logits are `None` then, its uncertainty is NaN,
            and the rest 0.
    """

    logits: torch.Tensor | None
    exit_layer: int
    uncertainty: float
    exit_member: int = 1
    error: Exception | None = None

    @classmethod
    def failed(cls, error: Exception) -> Prediction:
        """Return what is said of a text that has no answer."""
        return cls(None, 0, math.nan, 0, error)
