"""`calibrate`: what every speed costs on a user's own texts, so that a call may ask for a speed-up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.exit_record import ExitRecord, as_record
from ..evaluation.replay import Replay, add_up, replay_at_speed, replay_every_speed
from ..evaluation.speed_choice import between, members_with_students
from ..modeling.dials import UNITS, asked_by, check_calibration, speed_for
from ..modeling.processing_cascade import CascadeProcessor


LEAST_ROWS = 100
# Points of a curve that are kept, at speed-ups whose ratios are equal: less than a percent apart.
POINTS = 512


@dataclass(frozen=True)
class Calibration:
    """
    What [`calibrate`] found.

    Args:
        rows (`int`): Number of texts.
        unit (`str`): What a speed-up counts: `"flops"` or `"layers"`.
        greatest (`float`): The greatest speed-up, at speed 1.
        speeds (`dict[float, float]`): The speeds at which 1.5, 2, 3 and 4 times less is spent, as far as they exist.
    """

    rows: int
    unit: str
    greatest: float
    speeds: dict[float, float]


def calibrate(
    model: PreTrainedModel,
    texts_or_rows: Any,
    tokenizer: PreTrainedTokenizerBase | CascadeProcessor | None = None,
    *,
    unit: str = "flops",
    batch_size: int = 64,
    progress: bool = True,
) -> Calibration:
    """
    Measure what every speed costs on texts like those that the model will answer, and write it into
    `model.config.calibration`, with which it is saved and pushed. A call may then ask for a `speedup`: how many times
    less shall be spent than at speed 0, on average over many such texts, or as nearly as the model can: with the
    policy `"patience"` there are few steps. No labels are needed.

    The exit policy and the limits `min_exit_layer` and `max_layers` are the config's; a call with others is refused.
    What a single text costs is still decided by how sure the exits are of it.

    Args:
        model ([`FastBertForSequenceClassification`] or [`CascadeForSequenceClassification`]): Put into eval mode.
        texts_or_rows ([`ExitRecord`], `datasets.Dataset`, or sequence of `dict` or `str`):
            At least 100 texts, some hundreds better, as [`record_exits`] takes them, or its record.
        tokenizer (`PreTrainedTokenizerBase` or [`CascadeProcessor`], *optional*): Needed for texts.
        unit (`str`):
            What a speed-up counts: `"flops"`, what the packed forward really computes, exits included, or `"layers"`.
        batch_size (`int`): Rows in a batch.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`Calibration`]

    Raises:
        ValueError: If there are too few texts, the record is of a model with other layers, or the students learnt from
            weights that changed since. That a record was made with these weights is for the caller to see to.

    Example:

    ```python
    >>> fastbert_hf.calibrate(model, texts, tokenizer).greatest
    5.775773
    >>> model.save_pretrained("outputs/calibrated")
    >>> pipeline("fast-text-classification", model=model, tokenizer=tokenizer)(texts, speedup=3.0)
    ```
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r:.40}.")
    members = members_with_students(model)
    if isinstance(texts_or_rows, (list, tuple)) and all(isinstance(row, (str, Mapping)) for row in texts_or_rows[:1]):
        check_number(len(texts_or_rows))
    record = as_record(model, texts_or_rows, tokenizer, batch_size=batch_size, progress=progress)
    check_number(len(record.exit_logits))
    if unit == "flops" and (record.layer_flops is None or record.exit_flops is None):
        raise ValueError('the record has no FLOPs: make it with record_exits(model, texts), or give unit="layers".')
    speeds, speed_ups = curve_of(record, model.config, unit)
    model.eval()
    calibration = {
        "rows": len(record.exit_logits),
        "unit": unit,
        "speeds": speeds,
        "speed_ups": speed_ups,
        "asked": asked_by(model.config, **own_limits(model.config)),
        "weights": [member.weights_digest() or None for member in members],
    }
    check_calibration(calibration, len(members))
    model.config.calibration = calibration
    found = {speedup: speed_for(calibration, speedup) for speedup in (1.5, 2.0, 3.0, 4.0) if speedup <= speed_ups[-1]}
    return Calibration(len(record.exit_logits), unit, speed_ups[-1], found)


def own_limits(config: PreTrainedConfig) -> dict[str, int | None]:
    """Return the limits of a single model's config, within which its pipeline answers; a cascade has none itself."""
    return {name: getattr(config, name, None) for name in ("min_exit_layer", "max_layers")}


def check_number(rows: int) -> None:
    """Raise a `ValueError` unless so many texts are enough."""
    if rows < LEAST_ROWS:
        raise ValueError(f"there are {rows} texts, and at least {LEAST_ROWS} are needed; some hundreds are better.")


def curve_of(record: ExitRecord, config: PreTrainedConfig, unit: str) -> tuple[list[float], list[float]]:
    """Return speeds in rising order, and how many times less each of them costs than speed 0."""

    def cost(replayed: Replay) -> torch.Tensor:
        return replayed.flops if unit == "flops" else replayed.exit_layer

    full = cost(replay_at_speed(record, config, 0.0)).sum().item()
    steps, replays = replay_every_speed(record, config)
    layers = torch.stack([replayed.exit_layer for replayed in replays], 1)
    costs = torch.stack(list(map(cost, replays)), 1)
    lower, totals = add_up(steps, layers, lambda rows, places: costs[rows, places])
    upper = torch.cat([lower[1:], torch.ones(1)]).tolist()
    points = [(0.0, 1.0)]
    # Close to 0, exits are evaluated at which hardly a text leaves: that may cost more than it saves.
    for below, above, total in zip(lower.tolist(), upper, totals.tolist(), strict=True):
        if full / total > points[-1][1]:
            points.append((between(below, above), full / total))
    if len(points) > POINTS:
        wanted = [points[-1][1] ** (number / (POINTS - 1)) for number in range(POINTS)]
        found = torch.tensor([speed_up for _, speed_up in points])
        nearest = {int((found - speed_up).abs().argmin()) for speed_up in wanted}
        points = [points[place] for place in sorted(nearest)]
    speeds, speed_ups = zip(*points, strict=True)
    return list(speeds), [math.floor(1e6 * speed_up) / 1e6 for speed_up in speed_ups]
