"""Choose a model's speed: the fastest one that loses no more than may be lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.dials import is_linear, speed_of_threshold
from ..modeling.exit_policies import config_thresholds
from ..modeling.processing_cascade import CascadeProcessor
from ..modeling.tasks import task_of
from .exit_record import ExitRecord, record_exits
from .replay import Replay, add_up, replay_at_speed, replay_every_speed
from .task_metrics import metric_of, metrics_of, of_all, share


@dataclass(frozen=True)
class SpeedChoice:
    """
    The speed that [`choose_speed`] chose, and what it costs and gives on the data of the choice.

    Args:
        speed (`float`): In [0, 1]; 0 where no other loses so little.
        metric (`str`): What was not to be lost.
        score, full_score (`float`): The metric at this speed, and at speed 0.
        loss (`float`): The difference of the two in points, hundredths of the metric.
        agreement (`float`): Share of the answers that are those at speed 0.
        mean_exit_layer (`float`): Layers that a text ran through, on average; in all members of a cascade.
        layer_speed_up (`float`): How many times fewer layers were executed than at speed 0.
        executed_speed_up (`float`, *optional*): How many times fewer FLOPs, if the record has them.
        rows (`int`): Number of texts.
    """

    speed: float
    metric: str
    score: float
    full_score: float
    loss: float
    agreement: float
    mean_exit_layer: float
    layer_speed_up: float
    executed_speed_up: float | None
    rows: int


def choose_speed(
    model: PreTrainedModel,
    texts_or_rows: Any,
    max_loss: float = 0.5,
    tokenizer: PreTrainedTokenizerBase | CascadeProcessor | None = None,
    metric: str | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> SpeedChoice:
    """
    Write the fastest speed that loses at most so much into `model.config.speed`, which the pipeline then uses.

    Every speed that makes a difference on these texts is compared, from one full-depth pass: under the exit policy and
    within the `min_exit_layer` and `max_layers` of the config, as the pipeline answers. The fastest speed is the one
    with the fewest FLOPs (the fewest layers, where a record has no FLOPs). What is lost on a few hundred texts tells
    only roughly what is lost on others, so ask for less than you can afford.

    Args:
        model ([`FastBertForSequenceClassification`] or [`CascadeForSequenceClassification`]): Put into eval mode.
        texts_or_rows ([`ExitRecord`], `datasets.Dataset`, or sequence of `dict` or `str`):
            Texts that the model was not trained on, with labels or without, as [`record_exits`] takes them, or its
            record.
        max_loss (`float`): Points, hundredths of the metric, that may be lost against speed 0.
        tokenizer (`PreTrainedTokenizerBase` or [`CascadeProcessor`], *optional*): Needed for texts.
        metric (`str`, *optional*):
            One of those of [`sweep_speeds`], or `"agreement"` with the answers at speed 0, which needs no labels. The
            first one of the task where there are labels (accuracy, or F1, or the explained variance), agreement where
            there are none, unless given.
        batch_size (`int`): Rows in a batch.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`SpeedChoice`]

    Raises:
        ValueError: If an argument is not one of these, or the students learnt from weights that changed since.

    Example:

    ```python
    >>> fastbert_hf.choose_speed(model, dev_rows, max_loss=0.5, tokenizer=tokenizer).speed
    0.36
    ```
    """
    if isinstance(max_loss, bool) or not isinstance(max_loss, Real) or not max_loss >= 0:
        raise ValueError(f"max_loss must be a number of points, at least 0, got {max_loss!r}. Example: max_loss=0.5")
    if metric not in (None, "agreement", *metrics_of(model.config)):
        known = ", ".join(("agreement", *metrics_of(model.config)))
        raise ValueError(f"metric={metric!r} is not known; choose one of {known}.")
    members_with_students(model)  # refused before all work
    record = texts_or_rows
    if not isinstance(record, ExitRecord):
        record = record_exits(model, texts_or_rows, batch_size=batch_size, progress=progress, tokenizer=tokenizer)
    if record.labels is None and metric not in (None, "agreement"):
        raise ValueError(f"the data has no labels, which {metric} needs: give some, or metric='agreement'.")
    own = "agreement" if record.labels is None else metric_of(model.config)[0]
    choice = _fastest(record, model.config, metric or own, max_loss)
    model.config.speed = choice.speed
    return choice


def members_with_students(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Return the members of a cascade, or a model alone, and raise unless their students may answer."""
    members = list(getattr(model, "members", [model]))
    if not all(hasattr(member, "exits") for member in members):
        raise TypeError(
            f"model must be one with exits, got {type(model).__name__}. Wrap yours and distil it: "
            "FastBertForSequenceClassification.from_classifier(name)"
        )
    task_of(model.config).check_comparable()
    for member, thresholds in zip(members, config_thresholds(model.config, torch.ones(1)), strict=True):
        member.checked_thresholds(thresholds)
    return members


class _Data:
    """
    A record, and what to make of it.

    Args:
        record ([`ExitRecord`]), config ([`FastBertConfig`] or [`CascadeConfig`]): Of one model.
        metric (`str`): A metric of its task, or `"agreement"` with these logits of the full model.
        full_logits (`torch.Tensor` of shape `[rows, ...]`): What the full model says.
    """

    def __init__(self, record: ExitRecord, config: PreTrainedConfig, metric: str, full_logits: torch.Tensor):
        self.record, self.config, self.task, self.full_logits = record, config, task_of(config), full_logits
        self.metric = None if metric == "agreement" else metric_of(config, metric)[1]

    def counts(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what the metric adds up, `[rows, ...]`."""
        if self.metric is None:
            return of_all(~self.task.differs(logits, self.full_logits))
        return self.metric.counts(self.task, logits, self.record.labels, self.config)

    def scores(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the metric of such sums."""
        return share(sums) if self.metric is None else self.metric.score(sums)

    def score(self, logits: torch.Tensor) -> float:
        """Return the metric of some answers."""
        return self.scores(self.counts(logits).sum(0)).item()


def _fastest(record: ExitRecord, config: PreTrainedConfig, metric: str, max_loss: float) -> SpeedChoice:
    full = replay_at_speed(record, config, 0.0)
    data = _Data(record, config, metric, full.logits)
    full_score, speed = data.score(full.logits), 0.0
    lower, upper, costs, scores = _every_speed(data)
    # Close to 0, exits are evaluated at which hardly a text leaves: that may cost more than it saves.
    allowed = (100 * (full_score - scores) <= max_loss + 1e-9) & (costs < _costs(full).sum())
    # Where speeds are linear, there are no other thresholds than those of the calibration.
    known = config.calibration["speeds"][1:] if is_linear(config) else []
    places = (torch.searchsorted(lower, torch.tensor(known)) - 1).clamp(min=0).tolist()
    if is_linear(config):
        reached = torch.zeros_like(allowed)
        reached[places] = True
        allowed &= reached
    if allowed.any():
        fastest = allowed & (costs == costs[allowed].min())
        best = scores.where(fastest, -math.inf).argmax()
        speed = between(lower[best].item(), upper[best].item())
        if is_linear(config):
            there = [threshold for threshold, place in zip(known, places, strict=True) if place == best]
            speed = speed_of_threshold(config, max(there))

    chosen = replay_at_speed(record, config, speed)
    score = data.score(chosen.logits)
    layers, full_layers = (replayed.exit_layer.double().mean().item() for replayed in (chosen, full))
    return SpeedChoice(
        speed=speed,
        metric=metric,
        score=score,
        full_score=full_score,
        loss=100 * (full_score - score),
        agreement=1 - data.task.differs(chosen.logits, full.logits).double().mean().item(),
        mean_exit_layer=layers,
        layer_speed_up=full_layers / layers,
        executed_speed_up=None if full.flops is None else full.flops.sum().item() / chosen.flops.sum().item(),
        rows=len(full.logits),
    )


def _every_speed(data: _Data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Return the intervals (lower, upper] of the speeds above 0, in each of which no text changes its exit, and what all
    texts together cost there and score: `[intervals]` each.
    """
    steps, replays = replay_every_speed(data.record, data.config)
    layers, counts, costs = (  # [rows, L + 1, ...] each
        torch.stack([part(replayed) for replayed in replays], 1)
        for part in (lambda replayed: replayed.exit_layer, lambda replayed: data.counts(replayed.logits), _costs)
    )
    lower, costs_there = add_up(steps, layers, lambda rows, places: costs[rows, places])
    _, sums = add_up(steps, layers, lambda rows, places: counts[rows, places])
    return lower, torch.cat([lower[1:], torch.ones(1)]), costs_there, data.scores(sums)


def _costs(replayed: Replay) -> torch.Tensor:
    """Return what each text costs, `[rows]`: FLOPs, or layers where they are not known."""
    return replayed.exit_layer if replayed.flops is None else replayed.flops


def between(lower: float, upper: float) -> float:
    """Return a speed in (lower, upper] with as few decimals as possible, away from both edges. 1 is no edge."""
    margin = (upper - lower) / 4
    for decimals in range(1, 10):
        speed = round((lower + upper) / 2, decimals)
        is_away = lower + margin <= speed <= (1 if upper == 1 else upper - margin)
        # Compared as the model does, in float32.
        if is_away and lower < torch.tensor(speed).item() <= upper:
            return speed
    return upper
