"""How the logits of an exit are laid out: one answer for each text, or one for each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence, Sized

import torch
from torch import nn

from .packed_batch import PADDED_TO, PackedBatch, Padding


# All logits of a place where no token is: as `Trainer` pads what it gathers, and labels that nobody reads.
NO_TOKEN = -100


class TextLayout:
    """Logits of shape `[texts, num_labels]`: nothing is to be done."""

    per_token = False

    def arrange(self, logits: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        """Return the logits of a packed batch by texts, of what the last Linear of an exit gives."""
        return logits

    def counted(self, logits: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        """Return the logits of the tokens whose labels somebody wants, as if there were no others."""
        return logits

    def cat(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the logits of several batches one below the other, or what a policy remembers of their texts."""
        return torch.cat(list(parts))

    def cat_labels(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the labels of several batches one below the other."""
        return torch.cat(list(parts))

    def to_caller(self, logits: torch.Tensor, padding: Padding) -> torch.Tensor:
        """Return the logits as the padded batch of a caller has its tokens, of rows in its order."""
        return logits

    def of_texts(self, logits: torch.Tensor, texts: Sequence[Sized]) -> Sequence[torch.Tensor]:
        """Return the logits of each text, whose length is that of its tokens."""
        return logits.unbind()


class TokenLayout(TextLayout):
    """
    Logits of shape `[texts, tokens, num_labels]`, where texts with fewer tokens than the longest one are filled up
    with `NO_TOKEN`. What is remembered of texts has their tokens in its last dimension but one, too.
    """

    per_token = True

    def arrange(self, logits, packed_batch):
        return self._by_text(logits.view(-1, logits.shape[-1]), packed_batch, NO_TOKEN)

    def counted(self, logits, packed_batch):
        if packed_batch.counted is None:
            return logits
        return logits.masked_fill(~self._by_text(packed_batch.counted[0, :, None], packed_batch, False), NO_TOKEN)

    @staticmethod
    def _by_text(values: torch.Tensor, packed_batch: PackedBatch, nothing: float) -> torch.Tensor:
        """Return what each token has, `[total_tokens, n]`, by texts: `[texts, tokens, n]`."""
        texts, longest = len(packed_batch.lengths), rounded_up(int(packed_batch.lengths.max()))
        first = torch.arange(0, texts * longest, longest).repeat_interleave(packed_batch.lengths)
        padded = values.new_full((texts * longest, values.shape[-1]), nothing)
        places = first.to(values.device) + packed_batch.text_places
        return padded.index_copy(0, places, values).unflatten(0, (texts, longest))

    def cat(self, parts):
        longest = rounded_up(max(part.shape[-2] for part in parts))
        return torch.cat([with_tokens(part, longest, NO_TOKEN) for part in parts])

    def cat_labels(self, parts):
        return self.cat([part.unsqueeze(-1) for part in parts]).squeeze(-1)

    def to_caller(self, logits, padding):
        is_token = torch.zeros(padding.shape[0] * padding.shape[1], dtype=torch.bool, device=logits.device)
        is_token = is_token.index_fill(0, padding.indices, True).view(padding.shape)
        places = (is_token.cumsum(1) - 1).clamp(min=0)  # of each token in its own text: [rows, columns]
        by_token = logits.movedim(-2, 1)  # [rows, tokens, ..., num_labels]
        moved = by_token[torch.arange(len(logits), device=logits.device)[:, None], places]
        is_empty = ~is_token.view(*is_token.shape, *[1] * (moved.dim() - 2))
        return moved.masked_fill(is_empty, NO_TOKEN).movedim(1, -2)

    def of_texts(self, logits, texts):
        return [of_text[: len(text)] for of_text, text in zip(logits.unbind(), texts, strict=True)]


def rounded_up(tokens: int) -> int:
    """Return a number of tokens at which sums over them are the same to the bit, whatever the longest text is."""
    return -(-tokens // PADDED_TO) * PADDED_TO


def with_tokens(values: torch.Tensor, tokens: int, value: float) -> torch.Tensor:
    """Cut or fill up the last dimension but one."""
    missing = tokens - values.shape[-2]
    if missing <= 0:
        return values[..., :tokens, :]
    return nn.functional.pad(values, (0, 0, 0, missing), value=value)
