"""One stock layer on a packed batch: whole, or in its two halves with something between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .families import Seam
from .packed_batch import PackedBatch


# Called between the halves: from what crosses the seam and its batch to the same of fewer tokens.
Between = Callable[[torch.Tensor, PackedBatch], tuple[torch.Tensor, PackedBatch]]


def run_layer(
    seam: Seam, layer: nn.Module, states: torch.Tensor, packed_batch: PackedBatch, between: Between | None = None
) -> tuple[torch.Tensor, PackedBatch]:
    """
    Run one stock layer and return its output, `[1, total_tokens, hidden_size]`, with the batch that it belongs to.
    The layer itself is called where gradients, hooks or a compiler may be at work. In inference mode its two halves
    are, which gives the same and skips the inspection of a signature that Transformers makes in every layer.
    """
    arguments: dict[str, Any] = {"packed_batch": packed_batch}
    if packed_batch.position_embeddings is not None:
        arguments["position_embeddings"] = packed_batch.position_embeddings[layer.attention_type]
    if between is None and not (torch.is_inference_mode_enabled() and all(map(is_untouched, seam.opened(layer)))):
        return as_one_row(layer(states, None, **arguments), packed_batch), packed_batch

    def halves(states: torch.Tensor) -> tuple[torch.Tensor, PackedBatch]:
        crossing, batch = seam.attention(layer, states, arguments), packed_batch
        if between is not None:
            crossing, batch = between(crossing, batch)
        return seam.feed_forward(layer, crossing), batch

    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return layer._gradient_checkpointing_func(halves, states)
    return halves(states)


def as_one_row(states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
    """
    Return what a layer gave as `[1, total_tokens, hidden_size]`. Tools that explain answers call the model on many
    copies of a text, and their hooks give `[copies, tokens, hidden_size]` where they saw `[1, tokens, hidden_size]`.
    """
    if len(states) == 1:
        return states
    if packed_batch.groups != [tuple(states.shape[:2])]:
        raise ValueError(
            f"a hook made {list(states.shape)} of a layer's output, which is [1, {packed_batch.total_tokens}, "
            "hidden_size]: the tokens of all texts, without padding, shortest text first. Give the model one text at "
            "a time, or hook its embeddings, which see the padded batch then: model.fastbert.backbone.embeddings"
        )
    return states.flatten(0, 1).unsqueeze(0)


def is_hooked(module: nn.Module) -> bool:
    """Tell whether a call of the module alone runs something beside it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def is_untouched(layer: nn.Module) -> bool:
    """Tell whether a call of the layer would do nothing but the forward that Transformers wrote."""
    hooked = is_hooked(layer) or _global_forward_hooks or _global_forward_pre_hooks
    changed = "forward" in vars(layer) or not type(layer).__module__.startswith("transformers.models.")
    return not (hooked or changed or layer._compiled_call_impl)
