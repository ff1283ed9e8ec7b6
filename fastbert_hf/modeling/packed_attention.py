"""Attention inside each text of a packed batch, and its kernels."""

from __future__ import annotations

from functools import partial, singledispatch

import torch
from torch import nn
from transformers import AttentionInterface

from .compiled_layers import untraced
from .packed_batch import PackedBatch


PACKED_ATTENTION = "fastbert_packed"


@singledispatch
def attend_within_texts(
    packed_batch: PackedBatch,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    queries_per_text: int | None = None,
) -> torch.Tensor:
    """
    Attend inside each text only, and return `[1, queries, heads, head_dim]`. What stands for a packed batch where a
    graph is made of a layer registers its own way.

    Args:
        packed_batch (`PackedBatch`): Where the texts are.
        query, key, value (`torch.Tensor` of shape `[1, heads, total_tokens, head_dim]`):
            With `queries_per_text` there are so many queries for each text. Tokens behind those of the batch belong
            to no text, and get zeros.
        scaling (`float`, *optional*): Factor of the products, `head_dim ** -0.5` unless given.
        dropout (`float`): Dropout probability of the attention weights; 0 outside training.
        sliding_window (`int`, *optional*): Positions i and j see each other where |i - j| < `sliding_window`.
        queries_per_text (`int`, *optional*): How many queries each text has, if it is not one for each of its tokens.
    """
    groups, tokens = packed_batch.groups, packed_batch.group_tokens
    attend = ATTENTION_KERNELS[packed_batch.attn_implementation]
    if packed_batch.received is not None and queries_per_text is None:
        attend = partial(attend_and_note, packed_batch.received)
    sizes = packed_batch.sizes if packed_batch.size_aware else None
    columns = (query, key, value, packed_batch.position_ids, sizes)
    more = key.shape[2] - packed_batch.total_tokens
    if len(groups) == 1 and more == 0:
        return _attend_in_group(attend, groups[0], columns, sliding_window, dropout, scaling).unsqueeze(0)
    # torch.split: the backward of a slice would allocate the whole tensor for each group.
    of_queries = tokens if queries_per_text is None else [texts * queries_per_text for texts, _ in groups]

    def parts_of(states: torch.Tensor, of: list[int]) -> tuple[torch.Tensor, ...]:
        return states.split([*of, more] if more else of, 2)[: len(groups)]

    parts = [parts_of(query, of_queries), parts_of(key, tokens), parts_of(value, tokens)]
    parts += [
        packed_batch.position_ids.split(tokens, 1),
        [None] * len(groups) if sizes is None else sizes.split(tokens, 1),
    ]
    outputs = [
        _attend_in_group(attend, group, own, sliding_window, dropout, scaling)
        for group, own in zip(groups, zip(*parts, strict=True), strict=True)
    ]
    if more:
        outputs.append(outputs[0].new_zeros(more, *outputs[0].shape[1:]))
    return torch.cat(outputs).unsqueeze(0)


def _attend_in_group(attend, group, columns, sliding_window, dropout, scaling) -> torch.Tensor:
    """Attend in equally long neighbours: from `[1, heads, texts * n, head_dim]` to `[texts * n, heads, head_dim]`."""
    *tensors, positions, sizes = columns
    (texts, length), (_, heads, _, head_dim) = group, tensors[0].shape
    # To [texts, heads, n, head_dim], views of what the projections wrote.
    views = (tensor.view(heads, texts, -1, head_dim).transpose(0, 1) for tensor in tensors)
    mask = None
    if sliding_window is not None and length > sliding_window:
        places = positions.view(texts, 1, length)
        mask = (places.unsqueeze(-1) - places.unsqueeze(-2)).abs() < sliding_window  # [texts, 1, length, length]
    if sizes is not None:
        often = sizes.view(texts, 1, 1, length).to(tensors[0].dtype).log()
        mask = often if mask is None else torch.where(mask, often, float("-inf"))
    return attend(*views, mask, dropout, scaling).transpose(1, 2).flatten(0, 1)


# Numbers of attention maps that are formed at a time in a layer that merges tokens. On a CPU they then stay in a
# core's own cache, which makes such a layer up to three times faster.
NUMBERS_OF_MAPS = {"cpu": 1 << 19}
NUMBERS_ELSEWHERE = 1 << 23


def attend_and_note(received: list[torch.Tensor], query, key, value, mask, dropout, scaling) -> torch.Tensor:
    """
    Attend, and note what each token received from the others of its text: attention probabilities, mean over heads
    and summed over queries without its own, `[texts, n]`.
    """
    texts, heads, length, _ = query.shape
    maps_at_once = max(NUMBERS_OF_MAPS.get(query.device.type, NUMBERS_ELSEWHERE) // length**2, 1)
    texts_at_once, heads_at_once = max(maps_at_once // heads, 1), min(maps_at_once, heads)
    outputs, noted = [], []
    for start in range(0, texts, texts_at_once):
        of_texts = slice(start, start + texts_at_once)
        own_mask = mask if mask is None or len(mask) == 1 else mask[of_texts]
        of_heads, sums = [], 0
        for first in range(0, heads, heads_at_once):
            own = of_texts, slice(first, first + heads_at_once)
            weights = attention_weights(query[own], key[own], own_mask, scaling)
            of_heads.append(nn.functional.dropout(weights.to(query.dtype), dropout) @ value[own])
            sums = sums + (weights.sum(2) - weights.diagonal(dim1=2, dim2=3)).sum(1)
        outputs.append(of_heads[0] if len(of_heads) == 1 else torch.cat(of_heads, 1))
        noted.append(sums / heads)
    received.append(torch.cat(noted))
    return torch.cat(outputs)


def attention_weights(query, key, mask, scaling) -> torch.Tensor:
    """Return attention probabilities, at least in float32. A mask is of what may be seen, or of what is added."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))


def _sdpa(query, key, value, mask, dropout, scaling):
    return nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)


def _eager(query, key, value, mask, dropout, scaling):
    weights = attention_weights(query, key, mask, scaling).to(query.dtype)
    return nn.functional.dropout(weights, dropout) @ value


# What `attn_implementation` can be; the first one is the default.
ATTENTION_KERNELS = {"sdpa": _sdpa, "eager": _eager}


@untraced
def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_batch: PackedBatch | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attend as the backbone's layers ask for it; `packed_batch` reaches this function through their keywords."""
    if packed_batch is None:
        raise ValueError(
            "The backbone of a FastBERT model works on packed batches and cannot be called by itself. Call the "
            "model, or FastBertModel for its hidden states: model.fastbert(input_ids, "
            "attention_mask).last_hidden_state"
        )
    return attend_within_texts(packed_batch, query, key, value, scaling, dropout, sliding_window), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
