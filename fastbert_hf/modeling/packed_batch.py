"""A batch of texts without padding, one row `[1, total_tokens, hidden]`: which token is whose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch


# Sums over a text's tokens come out the same to the bit whatever its batch-mates are, as vectors of any processor are
# cut at the same places and what is added is zero.
PADDED_TO = 16


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
        text_lengths (`torch.Tensor` of shape `[texts]`, CPU, *optional*):
            Tokens of each text before some of them were merged; `None` where none were, as for all that follow.
        sizes (`torch.Tensor` of shape `[1, total_tokens]`, *optional*): How many tokens each is made of.
        size_aware (`bool`): Whether attention counts each token as often as its size says.
        unit_of (`torch.Tensor` of shape `[1, sum(text_lengths)]`, *optional*):
            For each token of the texts the place in its text of the one that it is a part of; -1 if it was dropped.
        received (`list`, *optional*):
            Where attention notes what each token received, `[texts, tokens]` for each of the groups, in a layer that
            merges tokens by it.
        counted (`torch.Tensor` of shape `[1, total_tokens]`, bool, *optional*):
            Of which tokens somebody wants the label, where tokens are labelled; all unless given.
    """

    rows: torch.Tensor
    lengths: torch.Tensor
    position_ids: torch.Tensor
    attn_implementation: str = "sdpa"
    position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    text_lengths: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    size_aware: bool = False
    unit_of: torch.Tensor | None = None
    received: list[torch.Tensor] | None = None
    counted: torch.Tensor | None = None

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

    @cached_property
    def text_places(self) -> torch.Tensor:
        """Place of each token in its own text, `[total_tokens]`, whatever positions the caller gave."""
        first = self.first_tokens.cpu().repeat_interleave(self.lengths)
        return (torch.arange(self.total_tokens) - first).to(self.position_ids.device)

    @cached_property
    def padded_form(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Where the tokens would be in a padded batch, for engines that attend in one, on the CPU: the place of each
        text's tokens in the packed row, `[texts, columns]`, those of padding at 0; the place of each packed token in
        that padded form, flattened, `[total_tokens]`; and whether there is a token, `[texts, columns]`. There are as
        many columns as the longest text has tokens, and some more: a multiple of `PADDED_TO`.
        """
        columns = torch.arange(-(-int(self.lengths.max()) // PADDED_TO) * PADDED_TO)
        is_token = columns < self.lengths[:, None]
        first = (self.lengths.cumsum(0) - self.lengths)[:, None]
        return (first + columns).masked_fill_(~is_token, 0), is_token.flatten().nonzero()[:, 0], is_token

    def mean_of_texts(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Return the mean of each text's tokens, `[texts, hidden_size]`, out of `[1, total_tokens, hidden_size]`. A
        merged token counts as many as it is made of.
        """
        if self.sizes is not None:
            hidden_states = hidden_states * self.sizes.unsqueeze(-1).to(hidden_states.dtype)
        groups = hidden_states[0].split(self.group_tokens)
        sums = [
            tokens.unflatten(0, (texts, -1)).mean(1) * (1 if self.sizes is None else length)
            for tokens, (texts, length) in zip(groups, self.groups, strict=True)
        ]
        if self.sizes is None:
            return torch.cat(sums)
        of_texts = [
            own.view(texts, -1).sum(1)
            for own, (texts, _) in zip(self.sizes[0].split(self.group_tokens), self.groups, strict=True)
        ]
        return torch.cat(sums) / torch.cat(of_texts).unsqueeze(1).to(hidden_states.dtype)

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
            counted=None if self.counted is None else self.counted[:, tokens],
        )
        if self.sizes is not None:
            originals = kept.repeat_interleave(self.text_lengths).nonzero()[:, 0].to(self.position_ids.device)
            smaller = replace(
                smaller,
                text_lengths=self.text_lengths[kept],
                sizes=self.sizes[:, tokens],
                unit_of=self.unit_of[:, originals],
            )
        return smaller, hidden_states[:, tokens]

    def follow(self, new_unit: torch.Tensor) -> torch.Tensor:
        """Return `unit_of` after another merging, which makes each token of the batch a part of `new_unit`."""
        if self.unit_of is None:
            return new_unit.unsqueeze(0)
        new = new_unit[self._places_of_units()]
        return new.where(self.unit_of >= 0, self.unit_of)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """
        Give each token of the texts the state of what it is a part of, zeros if it was dropped: from `[1,
        total_tokens, ...]` to `[1, sum(text_lengths), ...]`.
        """
        if self.unit_of is None:
            return states
        dropped = (self.unit_of < 0).view(1, -1, *[1] * (states.dim() - 2))
        return states[:, self._places_of_units()[0]].masked_fill(dropped, 0)

    def _places_of_units(self) -> torch.Tensor:
        first = self.first_tokens.cpu().repeat_interleave(self.text_lengths).to(self.unit_of.device)
        return self.unit_of.clamp(min=0) + first

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
            text_lengths=None if first.sizes is None else torch.cat([batch.text_lengths for batch in batches]),
            sizes=None if first.sizes is None else torch.cat([batch.sizes for batch in batches], 1),
            unit_of=None if first.sizes is None else torch.cat([batch.unit_of for batch in batches], 1),
            counted=None if first.counted is None else torch.cat([batch.counted for batch in batches], 1),
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
