"""How many tokens each layer keeps: a schedule from one number, or one that is searched for on texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.exit_record import record_exits
from ..evaluation.replay import replay_at_speed
from ..modeling.encoder_layer import Between
from ..modeling.engine import TorchEngine
from ..modeling.exit_policies import check_speed
from ..modeling.families import max_text_tokens
from ..modeling.packed_batch import PackedBatch
from ..modeling.scheduler import ActiveBatch, Trace, run_layers
from ..modeling.tasks import task_of
from ..modeling.token_coarsening import check_coarsening
from ..rows import PaddingCollator, encoded_rows


# Rows on which the search sees how deep texts go.
ROWS_OF_DEPTHS = 512
# Of a text's ranks, over how many the weights of the search fall from one to zero.
SOFTNESS = 0.05
TARGET_WEIGHT = 100.0


def check_target(target: float) -> None:
    """Raise a `ValueError` unless `target` may be the part of the tokens of all layers that is left."""
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise ValueError(
            f"target must be in (0, 1], the part of all tokens of all layers that is left, got {target!r:.40}. "
            "Example: target=0.5"
        )


def retention_schedule(num_layers: int, target: float, layers: Sequence[int] | None = None) -> dict[str, list]:
    """
    Return `layers` and `retention` of a `config.coarsening` in which every layer that makes texts shorter keeps the
    same share of what it gets, so that the mean retention over all layers is `target`.

    Args:
        num_layers (`int`): Layers of the model.
        target (`float`): In (0, 1].
        layers (sequence of `int`, *optional*):
            Those that make texts shorter, from 1. Every second one unless given, as scores take time; all, where these
            are too few.
    """
    check_target(target)
    chosen = chosen_layers(num_layers, target, layers)
    return as_settings(with_mean(even_shares(num_layers, chosen), target), chosen)


def chosen_layers(
    num_layers: int, target: float, layers: Sequence[int] | None, reach: torch.Tensor | None = None
) -> list[int]:
    """Return the layers that make texts shorter, and raise a `ValueError` if that would be too late for the target."""
    reach = torch.ones(num_layers) if reach is None else reach
    if layers is None:
        layers = list(range(2, num_layers, 2)) or [1]
        if target < 0.05 + read_whole(layers, reach):
            layers = list(range(1, num_layers + 1))
    check_coarsening({"layers": layers, "retention": [1.0] * len(layers)}, num_layers)
    if target <= read_whole(layers, reach):
        raise ValueError(
            f"target={target} cannot be reached, as texts run through {layers[0] - 1} of {num_layers} layers before "
            f"the first of layers={list(layers)}. Example: layers={list(range(1, num_layers + 1))}"
        )
    return list(layers)


def read_whole(layers: Sequence[int], reach: torch.Tensor) -> float:
    """Return the part of all tokens that is met before texts become shorter."""
    return (reach[: layers[0] - 1].sum() / reach.sum()).item()


def even_shares(num_layers: int, layers: Sequence[int]) -> torch.Tensor:
    """Return the share of the tokens in each layer, `[L]`, if some of them halve a text and the others keep it."""
    return torch.tensor([0.5 if depth in layers else 1.0 for depth in range(1, num_layers + 1)]).cumprod(0)


def search_retention(
    model: PreTrainedModel,
    rows: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    target: float = 0.5,
    layers: Sequence[int] | None = None,
    speed: float = 0.0,
    steps: int = 60,
    batch_size: int = 16,
    learning_rate: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, list]:
    """
    Search how many tokens each layer needs, so that `target` of them are left on the way of a text, and return
    `layers` and `retention` of a `config.coarsening`.

    As in PoWER-BERT (Goyal et al., ICML 2020, section 3.3), whose procedure FCA-BERT takes over, every token gets a
    soft weight by its rank in attention received, and the lengths of the layers, the sums of these weights, are a
    penalty beside the loss. What differs: the weights of a layer are a soft step over the ranks, and where it falls
    is learnt; they say how often the layers above count a token in their attention, so that 0 is a dropped one (states
    times a weight, as there, are undone by the next norm); the loss is the divergence from the model's own answers,
    so that no labels are needed; and the penalty holds the lengths at the target. The model itself does not change.

    Args:
        model ([`FastBertForSequenceClassification`]): Fine-tuned.
        rows (rows): Some hundreds of texts like those that it will read, or their tokens.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Needed for texts.
        target (`float`), layers (sequence of `int`, *optional*): As in [`retention_schedule`].
        speed (`float`):
            At which the model will be used. Above 0 its exits must be trained: a layer's length then counts as much as
            there are texts that reach it, and the answer of an exit as much as there are that leave there.
        steps (`int`), batch_size (`int`), learning_rate (`float`), seed (`int`): Of the search.
        progress (`bool`): Whether to show a progress bar.

    Example:

    ```python
    >>> found = search_retention(model, texts, tokenizer, target=0.5)
    >>> stages = [TokenCoarsening(coarsening={**found, "merge": "mean"}), ExitTraining()]
    ```
    """
    check_target(target)
    check_speed(speed)
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r:.40}.")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be above 0, got {learning_rate!r:.40}. The default is 0.05.")
    if not hasattr(model, "exits"):
        raise TypeError(
            f"model must be one with exits, got {type(model).__name__}. Wrap yours: "
            "FastBertForSequenceClassification.from_classifier(name)"
        )
    if model.config.coarsening is not None:
        raise ValueError("the model's texts become shorter already: load the one that it was made of.")
    limit = max_text_tokens(model.config.text_config)
    limit = limit if tokenizer is None else min(limit, tokenizer.model_max_length)
    rows = encoded_rows(rows, tokenizer, limit, model.config.label2id)
    if len(rows) == 0:
        raise ValueError("there are no rows: give some hundreds of texts like those that the model will read.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    reach = reach_of_layers(model, [rows[row] for row in order[:ROWS_OF_DEPTHS]], speed, progress)
    chosen = chosen_layers(len(reach), target, layers, reach)
    leaving = reach - torch.cat([reach[1:], torch.zeros(1)])
    soft = SoftRetention(with_mean(even_shares(len(reach), chosen), target, reach), chosen).to(model.device)
    optimizer = torch.optim.Adam(soft.parameters(), lr=learning_rate)
    collator, divergence, scale = PaddingCollator.of(model), task_of(model.config).divergence, None
    was_training, learnt = model.training, [weight.requires_grad for weight in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        engine = TorchEngine(model.fastbert.backbone, model.exits, model.shared_pooler, coarsening=soft)
        with torch.enable_grad(), tqdm(total=steps, desc="Searching retention", disable=not progress) as bar:
            for step in range(steps):
                places = [(step * batch_size + place) % len(order) for place in range(min(batch_size, len(order)))]
                batch = collator([rows[order[place]] for place in places])
                batch.pop("labels", None)
                batch = {name: value.to(model.device) for name, value in batch.items()}
                with torch.no_grad():
                    wanted = exit_logits(model.engine(), model, batch)
                errors = divergence(exit_logits(engine, model, batch), wanted).mean(1).cpu()  # [L]
                length = (soft.shares().cpu() * reach).sum() / reach.sum()
                error = (errors * leaving).sum()
                scale = max(error.item(), 1e-12) if scale is None else scale  # so that no unit of answers matters
                loss = error / scale + TARGET_WEIGHT * (length / target - 1).square()
                if not loss.isfinite():
                    raise ValueError(
                        f"the loss of the search is {loss.item()} at step {step + 1}: check the model's weights for "
                        f"NaN and infinity, or lower learning_rate={learning_rate}."
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
    finally:
        model.train(was_training)
        for weight, learns in zip(model.parameters(), learnt, strict=True):
            weight.requires_grad_(learns)
    shares = with_mean(soft.shares().detach().cpu(), target, reach)
    if abs((shares * reach).sum() / reach.sum() - target) > 0.01:
        raise ValueError(f"the search went astray with learning_rate={learning_rate}: lower it, or give more steps.")
    return as_settings(shares, chosen)


class SoftRetention(nn.Module):
    """
    Takes the place of [`Coarsening`] in an engine: no token leaves, but it counts less the less attention it received.

    Args:
        shares (`torch.Tensor` of shape `[L]`): To begin with, the part of a text's tokens that each layer keeps.
        layers (sequence of `int`): Those that make texts shorter, from 1.
    """

    def __init__(self, shares: torch.Tensor, layers: Sequence[int]):
        super().__init__()
        self.layers, self.num_layers = list(layers), len(shares)
        of_those_before = shares.float() / torch.cat([torch.ones(1), shares[:-1].float()])
        chosen = of_those_before[[depth - 1 for depth in self.layers]]
        self.logits = nn.Parameter(chosen.clamp(1e-3, 1 - 1e-3).logit())

    def shares(self) -> torch.Tensor:
        """Return the part of a text's tokens that each layer keeps, `[L]`."""
        places = torch.tensor(self.layers, device=self.logits.device) - 1
        kept = torch.ones(self.num_layers, device=self.logits.device)
        return kept.index_copy(0, places, self.logits.sigmoid()).cumprod(0)

    def at(self, depth: int) -> Between | None:
        """Return what a layer does between attention and feed-forward."""
        return partial(self.soften, depth) if depth in self.layers else None

    def soften(self, depth: int, states: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, PackedBatch]:
        """Return the states as they are, and a batch in which they count by their ranks."""
        share, weights = self.shares()[depth - 1], []
        for scores in batch.received:  # [texts, n] each
            texts, length = scores.shape
            first = torch.full_like(scores[:, :1], float("inf"))
            order = torch.cat([first, scores[:, 1:]], 1).detach().argsort(dim=1, descending=True, stable=True)
            ranks = torch.arange(length, device=scores.device).expand(texts, -1)
            weight = ((share * length - ranks - 0.5) / (SOFTNESS * length)).sigmoid()
            weight = torch.where(ranks == 0, torch.ones_like(weight), weight)
            weights.append(torch.empty_like(weight).scatter(1, order, weight).flatten())
        sizes = torch.cat(weights).unsqueeze(0)
        if batch.sizes is not None:
            sizes = sizes * batch.sizes
        return states, replace(batch, sizes=sizes.clamp(min=1e-6), size_aware=True, received=None)


def exit_logits(engine: TorchEngine, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what every exit says of every row of a padded batch, `[L, rows, num_labels]`."""
    packed_batch, inputs, padding = model.fastbert.pack(**batch)
    hidden_states, packed_batch = engine.embed(packed_batch, inputs, padding)
    thresholds = torch.zeros(len(packed_batch.rows), engine.num_layers)
    trace = Trace(every_exit=True)
    run_layers(engine, None, [ActiveBatch(hidden_states, packed_batch, thresholds)], [engine.num_layers], trace=trace)
    return torch.stack(trace.exit_logits)


def reach_of_layers(model: PreTrainedModel, rows: Sequence[Any], speed: float, progress: bool) -> torch.Tensor:
    """Return the part of some encoded rows that reaches each layer at a speed, `[L]`."""
    num_layers = model.config.num_hidden_layers
    if speed == 0:
        return torch.ones(num_layers)
    if model.config.distilled_for is None:
        raise ValueError(
            f"speed={speed} needs exits that are trained: train them before, with ExitTraining(), or search with "
            "speed=0, where every text runs through all layers."
        )
    answers = replay_at_speed(record_exits(model, rows, progress=progress), model.config, speed)
    return answers.layers_run.float().mean(0).clamp(min=1e-3)


def with_mean(shares: torch.Tensor, target: float, reach: torch.Tensor | None = None) -> torch.Tensor:
    """Return the power of falling shares, `[L]`, of which the mean, weighted by `reach`, is `target`."""
    reach = torch.ones(len(shares)) if reach is None else reach
    low, high = 0.0, 1e4
    for _ in range(100):
        power = (low + high) / 2
        mean = (shares.double() ** power * reach).sum() / reach.sum()
        low, high = (power, high) if mean > target else (low, power)
    return shares.double() ** low


def as_settings(shares: torch.Tensor, layers: Sequence[int]) -> dict[str, list]:
    """Return `layers` and `retention` of a `config.coarsening` with these shares, `[L]`."""
    retention = [max(round(share, 4), 1e-4) for share in shares.tolist()]
    return {"layers": list(layers), "retention": [retention[depth - 1] for depth in layers]}
