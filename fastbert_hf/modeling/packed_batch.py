"""A batch of texts without padding, one row `[1, total_tokens, hidden]`, and the attention that keeps them apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from transformers import AttentionInterface


PACKED_ATTENTION = "fastbert_packed"
INNER_ATTENTIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class PackedBatch:
    """
    Which token of a packed row belongs to which text. The texts lie side by side, sorted by length, so that texts of
    equal length are neighbours and share one attention call. Never changes: finished texts leave by [`keep`].

    Args:
        rows (`torch.Tensor` of shape `[texts]`, CPU): Row of each packed text in the caller's batch.
        lengths (`torch.Tensor` of shape `[texts]`, CPU): Tokens of each packed text.
        position_ids (`torch.Tensor` of shape `[1, total_tokens]`): Place of each token in its own text, from 0.
        attn_implementation (`str`): One of `INNER_ATTENTIONS`.
        position_embeddings (`dict`, *optional*): Cosine and sine per attention type, for rotary families.
    """

    rows: torch.Tensor
    lengths: torch.Tensor
    position_ids: torch.Tensor
    attn_implementation: str = "sdpa"
    position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens of all texts together."""
        return self.position_ids.shape[1]

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """`(number of texts, tokens in each)` for every run of equally long neighbours."""
        groups: list[tuple[int, int]] = []
        for length in self.lengths.tolist():
            if groups and groups[-1][1] == length:
                groups[-1] = (groups[-1][0] + 1, length)
            else:
                groups.append((1, length))
        return groups

    @cached_property
    def first_tokens(self) -> torch.Tensor:
        """Place of each text's first token in the packed row, `[texts]`."""
        return (self.lengths.cumsum(0) - self.lengths).to(self.position_ids.device)

    def keep(self, kept: torch.Tensor, hidden_states: torch.Tensor) -> tuple[PackedBatch, torch.Tensor]:
        """
        Drops the finished texts.

        Args:
            kept (`torch.Tensor` of shape `[texts]`, bool, CPU): Which texts go on.
            hidden_states (`torch.Tensor` of shape `[1, total_tokens, hidden_size]`): Of all texts.

        Returns:
            `tuple`: the smaller batch and its hidden states.
        """
        tokens = kept.repeat_interleave(self.lengths).nonzero()[:, 0].to(self.position_ids.device)
        position_embeddings = self.position_embeddings and {
            kind: (cos[:, tokens], sin[:, tokens]) for kind, (cos, sin) in self.position_embeddings.items()
        }
        smaller = replace(
            self,
            rows=self.rows[kept],
            lengths=self.lengths[kept],
            position_ids=self.position_ids[:, tokens],
            position_embeddings=position_embeddings,
        )
        return smaller, hidden_states[:, tokens]

    @classmethod
    def join(cls, batches: list[PackedBatch]) -> PackedBatch:
        """Several batches side by side, in the order given."""
        first = batches[0]
        position_embeddings = first.position_embeddings and {
            kind: tuple(
                torch.cat(parts, 1)
                for parts in zip(*(batch.position_embeddings[kind] for batch in batches), strict=True)
            )
            for kind in first.position_embeddings
        }
        return replace(
            first,
            rows=torch.cat([batch.rows for batch in batches]),
            lengths=torch.cat([batch.lengths for batch in batches]),
            position_ids=torch.cat([batch.position_ids for batch in batches], 1),
            position_embeddings=position_embeddings,
        )


@dataclass(frozen=True)
class PaddedLayout:
    """
    Where the tokens of a packed batch stand in the caller's padded one.

    Args:
        token_index (`torch.Tensor` of shape `[total_tokens]`): Place of each token in the flattened padded batch.
        shape (`tuple`): `(batch_size, sequence_length)` of the padded batch.
    """

    token_index: torch.Tensor
    shape: tuple[int, int]

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """`[batch_size, sequence_length, ...]` (or one row for all) to `[1, total_tokens, ...]`."""
        padded = padded.expand(*self.shape, *padded.shape[2:])
        return padded.flatten(0, 1)[self.token_index].unsqueeze(0)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """`[1, total_tokens, ...]` to `[batch_size, sequence_length, ...]` with zeros where no token of ours is."""
        batch_size, sequence_length = self.shape
        padded = packed.new_zeros(batch_size * sequence_length, *packed.shape[2:])
        return padded.index_copy(0, self.token_index, packed[0]).unflatten(0, self.shape)


def pack_padded(attention_mask: torch.Tensor, attn_implementation: str = "sdpa") -> tuple[PackedBatch, PaddedLayout]:
    """
    Args:
        attention_mask (`torch.Tensor` of shape `[batch_size, sequence_length]`): Nonzero where a token of a text is.
        attn_implementation (`str`): One of `INNER_ATTENTIONS`.

    Returns:
        `tuple`: the [`PackedBatch`], whose positions count from a text's first token, so that padding on the left
        changes nothing, and its [`PaddedLayout`].
    """
    mask = attention_mask.bool()
    if mask.shape[0] == 0:
        raise ValueError("the batch has no rows: give at least one text.")
    lengths = mask.sum(1).cpu()
    if (lengths == 0).any():
        empty = (lengths == 0).nonzero()[:, 0].tolist()
        raise ValueError(
            f"rows {empty} hold padding only (attention_mask is 0 everywhere): leave them out, or give them at least "
            "one token."
        )
    rows = lengths.argsort(stable=True)
    device_rows = rows.to(mask.device)
    packed_rows, columns = mask[device_rows].nonzero(as_tuple=True)
    text_rows = device_rows[packed_rows]
    first_columns = mask.int().argmax(1)
    batch = PackedBatch(
        rows=rows,
        lengths=lengths[rows],
        position_ids=(columns - first_columns[text_rows]).unsqueeze(0),
        attn_implementation=attn_implementation,
    )
    return batch, PaddedLayout(text_rows * mask.shape[1] + columns, tuple(mask.shape))


def pack_lists(
    rows: list[int], lengths: list[int], device: torch.device, attn_implementation: str = "sdpa"
) -> PackedBatch:
    """
    A packed batch of texts that were never padded.

    Args:
        rows (`list[int]`): Row of each text in the caller's batch.
        lengths (`list[int]`): Tokens of each text, sorted.
        device (`torch.device`): Of the model.
        attn_implementation (`str`): One of `INNER_ATTENTIONS`.

    Returns:
        [`PackedBatch`]
    """
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    return PackedBatch(
        rows=torch.tensor(rows),
        lengths=torch.tensor(lengths),
        position_ids=position_ids.unsqueeze(0).to(device),
        attn_implementation=attn_implementation,
    )


def attend_within_texts(
    packed_batch: PackedBatch,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    first_token_only: bool = False,
) -> torch.Tensor:
    """
    Attention inside each text only.

    Args:
        packed_batch (`PackedBatch`): Where the texts are.
        query (`torch.Tensor` of shape `[1, heads, total_tokens, head_dim]`):
            Or `[1, heads, texts, head_dim]`, one query per text, with `first_token_only`.
        key, value (`torch.Tensor` of shape `[1, heads, total_tokens, head_dim]`).
        scaling (`float`, *optional*): Factor of the products, `head_dim ** -0.5` unless given.
        dropout (`float`): Dropout probability of the attention weights; 0 outside training.
        sliding_window (`int`, *optional*): Tokens i and j of a text see each other where |i - j| < `sliding_window`.
        first_token_only (`bool`): Whether only the first token of each text asks.

    Returns:
        `torch.Tensor` of shape `[1, queries, heads, head_dim]`.
    """
    groups = packed_batch.groups
    if len(groups) == 1:
        outputs = [_attend_in_group(packed_batch, groups[0], (query, key, value), scaling, dropout, sliding_window)]
    else:
        # torch.split: the backward of a slice would allocate the whole tensor for each group.
        tokens = [texts * length for texts, length in groups]
        queries = query.split([texts for texts, _ in groups] if first_token_only else tokens, 2)
        outputs = [
            _attend_in_group(packed_batch, group, tensors, scaling, dropout, sliding_window)
            for group, tensors in zip(
                groups, zip(queries, key.split(tokens, 2), value.split(tokens, 2), strict=True), strict=True
            )
        ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)


def _attend_in_group(
    packed_batch: PackedBatch,
    group: tuple[int, int],
    tensors: tuple[torch.Tensor, ...],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Of equally long neighbours, from `[1, heads, texts * n, head_dim]` to `[texts * n, heads, head_dim]`."""
    texts, length = group
    _, heads, _, head_dim = tensors[0].shape
    # To [texts, heads, n, head_dim], views of what the projections wrote.
    query, key, value = (tensor.view(heads, texts, -1, head_dim).transpose(0, 1) for tensor in tensors)
    mask = None
    if sliding_window is not None and length > sliding_window:
        places = torch.arange(length, device=query.device)
        mask = (places[:, None] - places).abs() < sliding_window  # [length, length]
    attend = ATTENTION_KERNELS[packed_batch.attn_implementation]
    return attend(query, key, value, mask, dropout, scaling).transpose(1, 2).flatten(0, 1)


def _sdpa(query, key, value, mask, dropout, scaling):
    return nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)


def _eager(query, key, value, mask, dropout, scaling):
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return nn.functional.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout) @ value


ATTENTION_KERNELS = dict(zip(INNER_ATTENTIONS, (_sdpa, _eager), strict=True))


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
    """The attention function that the backbone's layers call; `packed_batch` reaches it through their keywords."""
    if packed_batch is None:
        raise ValueError(
            "The backbone of a FastBERT model works on packed batches and cannot be called by itself. Call the "
            "model, or FastBertModel for its hidden states: model.fastbert(input_ids, "
            "attention_mask).last_hidden_state"
        )
    return attend_within_texts(packed_batch, query, key, value, scaling, dropout, sliding_window), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
