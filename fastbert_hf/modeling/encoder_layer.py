"""One stock layer on a packed batch: whole, or in its two halves with something between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .families import Seam
from .packed_batch import PackedBatch


# What stands between the halves: from what crosses the seam and its batch to the same of fewer tokens.
Between = Callable[[torch.Tensor, PackedBatch], tuple[torch.Tensor, PackedBatch]]


def attention_arguments(layer: nn.Module, packed_batch: PackedBatch) -> dict[str, Any]:
    """Return the keywords that a stock layer passes on to its attention."""
    arguments: dict[str, Any] = {"packed_batch": packed_batch}
    if packed_batch.position_embeddings is not None:
        arguments["position_embeddings"] = packed_batch.position_embeddings[layer.attention_type]
    return arguments


def run_layer(layer: nn.Module, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
    """Run one whole stock layer, where checkpointing, hooks and adapters live: `[1, total_tokens, hidden_size]`."""
    return layer(hidden_states, None, **attention_arguments(layer, packed_batch))


def run_halves(
    seam: Seam,
    layer: nn.Module,
    hidden_states: torch.Tensor,
    packed_batch: PackedBatch,
    between: Between | None = None,
) -> tuple[torch.Tensor, PackedBatch]:
    """
    Run one layer as attention and feed-forward, and return its output with the batch that it belongs to. Without
    anything between the halves this equals [`run_layer`].
    """

    def halves(states: torch.Tensor) -> tuple[torch.Tensor, PackedBatch]:
        crossing, batch = seam.attention(layer, states, attention_arguments(layer, packed_batch)), packed_batch
        if between is not None:
            crossing, batch = between(crossing, batch)
        return seam.feed_forward(layer, crossing), batch

    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return layer._gradient_checkpointing_func(halves, hidden_states)
    return halves(hidden_states)
