"""What every speed costs on the texts of a record, and how many answers differ there from the full model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from ..evaluation.exit_record import ExitRecord
from ..evaluation.replay import Replay, add_up, replay_at_speed, replay_every_speed
from ..evaluation.speed_choice import between
from ..modeling.tasks import task_of


class Curve(NamedTuple):
    """Of the speeds above 0 the intervals (lower, upper] in which no text changes its exit: `[intervals]` each."""

    lower: torch.Tensor
    upper: torch.Tensor
    costs: torch.Tensor  # of all texts together
    errors: torch.Tensor  # answers that are errors, long
    full_cost: int  # of all texts at speed 0
    rows: int

    def at(self, speed: float) -> tuple[float, int]:
        """Return how many times less a speed above 0 costs, and how many answers differ there."""
        place = max(int(torch.searchsorted(self.lower, torch.tensor(speed, dtype=self.lower.dtype))) - 1, 0)
        return self.full_cost / self.costs[place].item(), int(self.errors[place])


def curve_of(
    record: ExitRecord,
    config: PreTrainedConfig,
    unit: str = "flops",
    is_error: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    uncertainties: torch.Tensor | None = None,
) -> Curve:
    """
    Return what happens at every speed, by the policy and within the limits of a config.

    Args:
        record ([`ExitRecord`]): From [`record_exits`].
        config ([`FastBertConfig`] or [`CascadeConfig`]): Of the model of the record.
        unit (`str`): What costs are: `"flops"` or `"layers"`.
        is_error (`Callable`):
            From logits and those of the full model, `[rows, ...]` each, to which answers are errors: all that differ
            unless given.
        uncertainties (`torch.Tensor` of shape `[rows, L]`, *optional*): As in [`replay_every_speed`].
    """
    full, task = replay_at_speed(record, config, 0.0), task_of(config)
    is_error = is_error or task.differs

    def cost(replayed: Replay) -> torch.Tensor:
        return replayed.flops if unit == "flops" else replayed.exit_layer

    def errors(replayed: Replay) -> torch.Tensor:
        return is_error(replayed.logits, full.logits).long()

    steps, replays = replay_every_speed(record, config, uncertainties)
    layers, costs, differs = (  # [rows, L + 1] each
        torch.stack([part(replayed) for replayed in replays], 1)
        for part in (lambda replayed: replayed.exit_layer, cost, errors)
    )
    both = torch.stack([costs, differs], -1)
    lower, totals = add_up(steps, layers, lambda rows, places: both[rows, places])
    upper = torch.cat([lower[1:], torch.ones(1)])
    return Curve(lower, upper, *totals.unbind(-1), cost(full).sum().item(), len(layers))


def points_of(curve: Curve, most: int) -> tuple[list[float], list[float]]:
    """
    Return speeds in rising order, and how many times less each of them costs than speed 0. Of more than so many points
    those are kept whose speed-ups are the nearest to such with equal ratios.
    """
    points = [(0.0, 1.0)]
    # Close to 0, exits are evaluated at which hardly a text leaves: that may cost more than it saves.
    for below, above, total in zip(curve.lower.tolist(), curve.upper.tolist(), curve.costs.tolist(), strict=True):
        if curve.full_cost / total > points[-1][1]:
            points.append((between(below, above), curve.full_cost / total))
    if len(points) > most:
        wanted = [points[-1][1] ** (number / (most - 1)) for number in range(most)]
        found = torch.tensor([speed_up for _, speed_up in points])
        nearest = {int((found - speed_up).abs().argmin()) for speed_up in wanted}
        points = [points[place] for place in sorted(nearest)]
    speeds, speed_ups = zip(*points, strict=True)
    return list(speeds), [math.floor(1e6 * speed_up) / 1e6 for speed_up in speed_ups]


def agreement_at(curve: Curve, speed_up: float) -> float | None:
    """
    Return the share of the answers that are no errors at exactly this speed-up, where each text gets one of the two
    neighbouring speeds by chance. `None` where no speed reaches that far.
    """
    shares = torch.cat([torch.ones(1), curve.costs / curve.full_cost]).double()
    agreements = torch.cat([torch.ones(1), 1 - curve.errors / curve.rows]).double()
    wanted = 1 / speed_up
    if not shares.min() <= wanted <= 1:
        return None
    cheaper, dearer = (shares <= wanted).nonzero()[:, 0], (shares >= wanted).nonzero()[:, 0]
    low, high = cheaper[shares[cheaper].argmax()], dearer[shares[dearer].argmin()]
    gap = (shares[high] - shares[low]).item()
    part = 0.0 if gap == 0 else (wanted - shares[low].item()) / gap
    return ((1 - part) * agreements[low] + part * agreements[high]).item()
