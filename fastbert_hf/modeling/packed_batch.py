"""A batch of texts without padding, one row `[1, total_tokens, hidden]`: which token is whose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch


@dataclass(frozen=True)
class PackedBatch:
    """
    Which token of a packed row belongs to which text. The texts lie side by side, sorted by length, so that texts of
    equal length are neighbours and share one attention call. Never changes: finished texts leave by [`keep`].

    Args:
        rows (`torch.Tensor` of shape `[texts]`, CPU): Row of each packed text in the caller's batch.
        lengths (`torch.Tensor` of shape `[texts]`, CPU): Tokens of each packed text.
        position_ids (`torch.Tensor` of shape `[1, total_tokens]`): Place of each token in its own text, from 0.
        attn_implementation (`str`): A key of `ATTENTION_KERNELS`.
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
    def group_tokens(self) -> list[int]:
        """Tokens of every run of equally long neighbours together."""
        return [texts * length for texts, length in self.groups]

    @cached_property
    def first_tokens(self) -> torch.Tensor:
        """Place of each text's first token in the packed row, `[texts]`."""
        return (self.lengths.cumsum(0) - self.lengths).to(self.position_ids.device)

    def keep(self, kept: torch.Tensor, hidden_states: torch.Tensor) -> tuple[PackedBatch, torch.Tensor]:
        """Keep some texts, by a mask `[texts]` on the CPU, and return the smaller batch with its hidden states."""
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
        """Put several batches side by side, in the order given."""
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
class Padding:
    """Where the tokens of a packed batch stand in the caller's padded one."""

    indices: torch.Tensor  # [total_tokens], place of each token in the flattened padded batch
    shape: tuple[int, int]  # (batch_size, sequence_length) of the padded batch

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """Turn `[batch_size, sequence_length, ...]` (or one row for all) into `[1, total_tokens, ...]`."""
        padded = padded.expand(*self.shape, *padded.shape[2:])
        return padded.flatten(0, 1)[self.indices].unsqueeze(0)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """Turn `[1, total_tokens, ...]` into `[batch_size, sequence_length, ...]`, with zeros at padding."""
        batch_size, sequence_length = self.shape
        padded = packed.new_zeros(batch_size * sequence_length, *packed.shape[2:])
        return padded.index_copy(0, self.indices, packed[0]).unflatten(0, self.shape)


def pack_padded(
    attention_mask: torch.Tensor, attn_implementation: str = "sdpa", rows: torch.Tensor | None = None
) -> tuple[PackedBatch, Padding]:
    """
    Return the packed batch of a padded one, and where its tokens stand there. Positions count from a text's first
    token, so that padding on the left changes nothing.

    Args:
        attention_mask (`torch.Tensor` of shape `[batch_size, sequence_length]`): Nonzero where a token of a text is.
        attn_implementation (`str`): As in [`PackedBatch`].
        rows (`torch.Tensor` of shape `[batch_size]`, CPU, *optional*):
            What the caller's rows are called, where these are some of a larger batch. Counted from 0 unless given.
    """
    mask = attention_mask.bool()
    if mask.shape[0] == 0:
        raise ValueError("the batch has no rows: give at least one text.")
    lengths = mask.sum(1).cpu()
    if rows is None:
        rows = torch.arange(len(lengths))
    if (lengths == 0).any():
        empty = rows[lengths == 0].tolist()
        raise ValueError(
            f"rows {empty} hold padding only (attention_mask is 0 everywhere): leave them out, or give them at least "
            "one token."
        )
    order = lengths.argsort(stable=True)
    device_order = order.to(mask.device)
    packed_rows, columns = mask[device_order].nonzero(as_tuple=True)
    text_rows = device_order[packed_rows]
    first_columns = mask.int().argmax(1)
    batch = PackedBatch(
        rows=rows[order],
        lengths=lengths[order],
        position_ids=(columns - first_columns[text_rows]).unsqueeze(0),
        attn_implementation=attn_implementation,
    )
    return batch, Padding(text_rows * mask.shape[1] + columns, tuple(mask.shape))


def pack_lists(
    rows: list[int], lengths: list[int], device: torch.device, attn_implementation: str = "sdpa"
) -> PackedBatch:
    """Return a packed batch of texts that were never padded, from their rows and numbers of tokens, fewest first."""
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    return PackedBatch(
        rows=torch.tensor(rows),
        lengths=torch.tensor(lengths),
        position_ids=position_ids.unsqueeze(0).to(device),
        attn_implementation=attn_implementation,
    )
