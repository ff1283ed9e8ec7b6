"""What the classifier returns, and how the answers of several exits become one batch again."""

from __future__ import annotations

from dataclasses import dataclass

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


class Answers:
    """The answers of a batch, added exit by exit as rows are done."""

    def __init__(self):
        self.parts: list[tuple[torch.Tensor, ...]] = []

    def add(self, rows: torch.Tensor, logits: torch.Tensor, uncertainty: torch.Tensor, depth: int) -> None:
        """
        Args:
            rows (`torch.Tensor` of shape `[texts]`, CPU): Rows of the caller's batch that leave here.
            logits (`torch.Tensor` of shape `[texts, num_labels]`): What the exit says of them.
            uncertainty (`torch.Tensor` of shape `[texts]`): How sure it is.
            depth (`int`): Layers that they ran through.
        """
        self.parts.append((rows, logits, uncertainty, torch.full_like(rows, depth)))

    def in_order(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where each row of the caller's batch stands among the answers; its logits, uncertainty and exit layer."""
        rows, logits, uncertainty, exit_layer = (torch.cat(parts) for parts in zip(*self.parts, strict=True))
        order = rows.argsort()
        device_order = order.to(logits.device)
        return device_order, logits[device_order], uncertainty[device_order], exit_layer[order].to(logits.device)
