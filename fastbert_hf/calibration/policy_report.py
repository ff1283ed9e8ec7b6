"""Which exit policy agrees most with the full model at equal costs, without labels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..evaluation.exit_record import ExitRecord
from ..evaluation.replay import raw_thresholds, replay_at_speed
from ..modeling.tasks import task_of
from .curves import agreement_at, curve_of
from .gates import fit_gates


def with_fields(config: PreTrainedConfig, **fields: Any) -> PreTrainedConfig:
    """Return a copy of a config with other fields, whose own members are copies, too."""
    config = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def halves(record: ExitRecord) -> tuple[ExitRecord, ExitRecord]:
    """Return two halves of a record, always the same ones: one for fitting, one for looking."""
    rows = len(record.exit_logits)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    parts = order[: rows // 2], order[rows // 2 :]
    return tuple(record.select(part.sort().values) for part in parts)


def fitted_gates(record: ExitRecord, config: PreTrainedConfig) -> list[list[float]]:
    """Return gates for the exits of a model, within the limits of its config."""
    task = task_of(config)
    full = replay_at_speed(record, with_fields(config, exit_policy=task.exit_policy, calibration=None), 0.0)
    may_answer = (raw_thresholds(record, config, 1.0) > 0)[0]  # alike for all rows
    return fit_gates(record, task, full.logits, may_answer)


def compare_policies(
    record: ExitRecord, config: PreTrainedConfig, policies: Sequence[str], unit: str, speed_ups: Sequence[float]
) -> dict[str, dict[float, float]]:
    """
    Return by policy and speed-up the share of the answers that are the full model's, on average over two halves of a
    record, where both reach that far. The gates of each half were fitted to the other one.

    Args:
        record ([`ExitRecord`]): From [`record_exits`].
        config ([`FastBertConfig`] or [`CascadeConfig`]): Of the model of the record, with its limits.
        policies (sequence of `str`): Names of exit policies.
        unit (`str`): What a speed-up counts.
        speed_ups (sequence of `float`): At which they are compared.
    """
    first, second = halves(record)
    found: dict[str, dict[float, float]] = {}
    for policy in policies:
        curves = []
        for half, other in ((first, second), (second, first)):
            gates = fitted_gates(other, config) if policy == "learned" else None
            own = with_fields(config, gates=gates, exit_policy=policy, calibration=None)
            curves.append(curve_of(half, own, unit))
        pairs = {speed_up: [agreement_at(curve, speed_up) for curve in curves] for speed_up in speed_ups}
        found[policy] = {speed_up: sum(pair) / 2 for speed_up, pair in pairs.items() if None not in pair}
    return found


def best_of(agreements: dict[str, dict[float, float]]) -> str:
    """Return the policy that agrees most on average; at a speed-up that it does not reach, nothing agrees."""
    return max(agreements, key=lambda policy: sum(agreements[policy].values()))
