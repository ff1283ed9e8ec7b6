"""Texts on their way up the layers, and how those that go on are drawn from one batch and joined with another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .packed_batch import PackedBatch


@dataclass(frozen=True)
class TextsInFlight:
    """
    Texts that have run through the same layers. Never changes: a layer makes another one.

    Args:
        packed_batch (`PackedBatch`): Where the texts are.
        hidden_states (`torch.Tensor` of shape `[1, total_tokens, hidden_size]`): After the layers so far.
        speeds (`torch.Tensor` of shape `[texts]`, CPU): The speed of each text.
        state (`torch.Tensor` of shape `[texts, 2]`, *optional*): What the exit policy remembers of each.
    """

    packed_batch: PackedBatch
    hidden_states: torch.Tensor
    speeds: torch.Tensor
    state: torch.Tensor | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens of all texts together."""
        return self.packed_batch.total_tokens

    def keep(self, kept: torch.Tensor) -> TextsInFlight:
        """Those that go on: `kept` is a mask of shape `[texts]` on the CPU."""
        packed_batch, hidden_states = self.packed_batch.keep(kept, self.hidden_states)
        # Indices made on the CPU: a boolean mask on the device would make the CPU wait for it.
        state = self.state if self.state is None else self.state[kept.nonzero()[:, 0].to(self.state.device)]
        return replace(
            self, packed_batch=packed_batch, hidden_states=hidden_states, speeds=self.speeds[kept], state=state
        )

    @classmethod
    def join(cls, parts: list[TextsInFlight]) -> TextsInFlight:
        """Several as one, in the order given."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            PackedBatch.join([part.packed_batch for part in parts]),
            torch.cat([part.hidden_states for part in parts], 1),
            torch.cat([part.speeds for part in parts]),
            None if parts[0].state is None else torch.cat([part.state for part in parts]),
        )
