"""Fewer tokens in the upper layers: those that receive little attention are merged, or dropped, as FCA-BERT does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch

from .encoder_layer import Between
from .packed_batch import PackedBatch


MERGES = ("mean", "weighted", "drop")
FIELDS = ("layers", "retention", "merge", "clusters", "size_aware")
EXAMPLE = 'coarsening={"layers": [2, 4], "retention": [0.6, 0.4]}'


@dataclass(frozen=True)
class Coarsening:
    r"""
    Which layers make texts shorter, and how (Fine- and Coarse-Granularity Hybrid Self-Attention, Zhao et al., ACL
    2022; dropping is PoWER-BERT, Goyal et al., ICML 2020). Between attention and feed-forward of such a layer, a text
    keeps its first token and those that received the most attention; the rest become coarse tokens behind them.

    Args:
        retention (`dict[int, float]`):
            By the number of a layer, from 1: the share of the text's own tokens, in (0, 1], that it has from there on,
            coarse ones included, rounded up.
        merge (`str`):
            `"mean"`, `"weighted"` by the softmax of the attention received, or `"drop"`, which leaves no coarse token.
        clusters (`int`): Coarse tokens of a text. Each is made of neighbours.
        size_aware (`bool`):
            Whether a coarse token counts as many as it is made of: the logarithm of their number is added to its
            attention logits (as in Token Merging, Bolya et al., ICLR 2023), and means weigh it by the number.
    """

    retention: dict[int, float]
    merge: str = "mean"
    clusters: int = 1
    size_aware: bool = True

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None, retention: float | None = None) -> Coarsening | None:
        """
        Return what a checked config's `coarsening` says, `None` where no layer makes a text shorter.

        Args:
            settings (`Mapping`, *optional*): Of the config.
            retention (`float`, *optional*):
                The share of the tokens that is left in the end, in (0, 1], in place of the schedule's own. What each
                layer removes changes in proportion; 1 removes nothing.
        """
        if settings is None:
            return None
        schedule = dict(zip(settings["layers"], settings["retention"], strict=True))
        if retention is not None:
            removed, wanted = 1 - min(schedule.values()), 1 - retention
            if removed == 0:
                schedule = dict.fromkeys(schedule, retention)
            else:
                schedule = {depth: 1 - (1 - share) * wanted / removed for depth, share in schedule.items()}
        if min(schedule.values()) == 1:
            return None
        others = {name: settings[name] for name in FIELDS[2:] if name in settings}
        return cls({depth: share for depth, share in sorted(schedule.items()) if share < 1}, **others)

    def at(self, depth: int) -> Between | None:
        """Return what shortens texts in a layer, `None` where nothing does."""
        return partial(self.shorten, depth) if depth in self.retention else None

    def units(self, depth: int, text_lengths: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return how many tokens texts have after the attention of a layer, of their own and those before it."""
        if depth not in self.retention:
            return lengths
        coarse = 0 if self.merge == "drop" else self.clusters
        # In double, and a rounding error below: 0.3 of 10 tokens are 3.
        wanted = (text_lengths.double() * self.retention[depth] - 1e-9).ceil().long()
        return torch.minimum(lengths, wanted.clamp(min=1 + coarse))

    def shorten(self, depth: int, states: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, PackedBatch]:
        """Return the shorter texts of a layer, `[1, fewer tokens, hidden_size]`, and their batch."""
        text_lengths = batch.lengths if batch.text_lengths is None else batch.text_lengths
        units = self.units(depth, text_lengths, batch.lengths)
        scores = torch.cat([own.flatten() for own in batch.received[-len(batch.groups) :]])  # [total_tokens]
        sizes = torch.ones_like(batch.position_ids[0]) if batch.sizes is None else batch.sizes[0]
        runs = [
            (len(list(own)), length, new)
            for (length, new), own in groupby(zip(batch.lengths.tolist(), units.tolist(), strict=True))
        ]
        tokens = [texts * length for texts, length, _ in runs]
        places = torch.arange(batch.total_tokens, device=states.device)
        merged, kept_places, new_sizes, new_units = [], [], [], []
        parts = zip(runs, *(column.split(tokens) for column in (states[0], scores, sizes, places)), strict=True)
        for (texts, length, new), own_states, own_scores, own_sizes, own_places in parts:
            shape = (texts, length)
            if new == length:
                merged.append(own_states), kept_places.append(own_places), new_sizes.append(own_sizes)
                new_units.append(torch.arange(length, device=states.device).repeat(texts))
                continue
            shorter = self._merge(own_states.view(*shape, -1), own_scores.view(shape), own_sizes.view(shape), new)
            merged.append(shorter[0].flatten(0, 1))
            kept_places.append(own_places.view(shape).gather(1, shorter[1]).flatten())
            new_sizes.append(shorter[2].flatten())
            new_units.append(shorter[3].flatten())
        places = torch.cat(kept_places)
        smaller = replace(
            batch,
            lengths=units,
            text_lengths=text_lengths,
            position_ids=batch.position_ids[:, places],
            position_embeddings=batch.position_embeddings
            and {kind: (cos[:, places], sin[:, places]) for kind, (cos, sin) in batch.position_embeddings.items()},
            sizes=torch.cat(new_sizes).unsqueeze(0),
            size_aware=self.size_aware and self.merge != "drop",
            unit_of=batch.follow(torch.cat(new_units)),
            received=None,
        )
        return torch.cat(merged).unsqueeze(0), smaller

    def _merge(
        self, states: torch.Tensor, scores: torch.Tensor, sizes: torch.Tensor, new: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Shorten equally long texts, `[texts, n, hidden_size]`, to `new` tokens. Return their states, the place of the
        token that stands for each, its size, and the new token of each old one, -1 for none.
        """
        (texts, length), coarse = scores.shape, 0 if self.merge == "drop" else self.clusters
        first = torch.full_like(scores[:, :1], float("inf"))
        order = torch.cat([first, scores[:, 1:]], 1).detach().argsort(dim=1, descending=True, stable=True)
        kept, rest = (part.sort(1).values for part in order.split([new - coarse, length - new + coarse], 1))
        new_of_old = torch.full_like(kept[:, :1], -1).expand(texts, length).clone()
        new_of_old.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
        kept_states, kept_sizes = take(states, kept), sizes.gather(1, kept)
        if coarse == 0:
            return kept_states, kept, kept_sizes, new_of_old
        # Neighbours of the rest share a coarse token, nearly equally many each.
        cluster = torch.arange(rest.shape[1], device=rest.device) * coarse // rest.shape[1]  # [rest]
        new_of_old.scatter_(1, rest, (kept.shape[1] + cluster).expand_as(rest))
        rest_sizes, rest_scores = sizes.gather(1, rest), scores.gather(1, rest)
        weights = rest_sizes.to(states.dtype) if self.size_aware else torch.ones_like(rest_scores, dtype=states.dtype)
        if self.merge == "weighted":
            weights = weights * rest_scores.float().softmax(1).to(states.dtype)
        belongs = torch.nn.functional.one_hot(cluster, coarse).T.to(states.dtype)  # [coarse, rest]
        shares = belongs * weights.unsqueeze(1)  # [texts, coarse, rest]
        shares = shares / shares.sum(-1, keepdim=True)
        # The one that received the most attention lends its place.
        best = (belongs * rest_scores.detach().unsqueeze(1) + (belongs - 1) * 1e9).argmax(-1)
        return (
            torch.cat([kept_states, shares @ take(states, rest)], 1),
            torch.cat([kept, rest.gather(1, best)], 1),
            torch.cat([kept_sizes, (belongs.to(rest_sizes.dtype) * rest_sizes.unsqueeze(1)).sum(-1)], 1),
            new_of_old,
        )


def take(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return some tokens of each text, `[texts, k, hidden_size]`, by their places, `[texts, k]`."""
    return states.gather(1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def check_retention(retention: Any, *settings: Mapping[str, Any] | None) -> None:
    """Raise a `ValueError` unless `retention` may be that of a call of models with these `coarsening`."""
    is_number = isinstance(retention, (int, float)) and not isinstance(retention, bool)
    if retention is not None and not (is_number and 0 < retention <= 1):
        raise ValueError(
            f"retention must be a number in (0, 1], the share of a text's tokens that is left in the end, got "
            f"{retention!r:.40}; 1 leaves all. Example: retention=0.5"
        )
    if retention not in (None, 1) and not any(settings):
        raise ValueError(
            f"retention={retention} has no meaning for a model that reads every token in every layer: leave it out, "
            f"or say in the config where texts become shorter, as in {EXAMPLE}"
        )


def check_coarsening(settings: Any, num_layers: int) -> None:
    """Raise a `ValueError` unless `settings` is what `config.coarsening` may be: `None`, or a dict of its fields."""
    if settings is None:
        return
    if not isinstance(settings, Mapping) or not {"layers", "retention"} <= set(settings):
        raise ValueError(f"coarsening={settings!r:.80} must be a dict with layers and retention. Example: {EXAMPLE}")
    unknown = sorted(set(settings) - set(FIELDS))
    if unknown:
        raise ValueError(f"coarsening has no field {unknown[0]!r:.40}, only {', '.join(FIELDS)}. Example: {EXAMPLE}")
    layers, shares = settings["layers"], settings["retention"]
    if not (
        isinstance(layers, (list, tuple))
        and len(layers) > 0
        and all(type(number) is int and 1 <= number <= num_layers for number in layers)
        and sorted(set(layers)) == list(layers)
    ):
        raise ValueError(
            f"layers of coarsening must be numbers from 1 to {num_layers} in rising order, got {layers!r:.80}. "
            f"Example: {EXAMPLE}"
        )
    if not (
        isinstance(shares, (list, tuple))
        and len(shares) == len(layers)
        and all(type(share) in (int, float) and math.isfinite(share) and 0 < share <= 1 for share in shares)
        and sorted(shares, reverse=True) == list(shares)
    ):
        raise ValueError(
            f"retention of coarsening must be one number in (0, 1] for each of the layers {list(layers)}, none "
            f"greater than the one before, got {shares!r:.80}. Example: {EXAMPLE}"
        )
    if settings.get("merge", "mean") not in MERGES:
        raise ValueError(f"merge of coarsening is one of {', '.join(MERGES)}, not {settings['merge']!r:.40}.")
    clusters = settings.get("clusters", 1)
    if type(clusters) is not int or not 1 <= clusters <= 512:
        raise ValueError(f"clusters of coarsening must be a whole number from 1 to 512, got {clusters!r:.40}.")
    if type(settings.get("size_aware", True)) is not bool:
        raise ValueError(f"size_aware of coarsening is True or False, not {settings['size_aware']!r:.40}.")
