"""What would be answered at any speed: a record of every exit, replayed by the rule of the live model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ..modeling.dials import thresholds_of_speeds
from ..modeling.exit_policies import ExitPolicy, config_thresholds, leaves, row_speeds
from .exit_record import ExitRecord


@dataclass(frozen=True)
class Replay:
    """
    What `predict` would answer to every row, and what that costs.

    Args:
        exit_layer (`torch.Tensor` of shape `[rows]`, long): Layers that each row runs through, in all members.
        exit_member (`torch.Tensor` of shape `[rows]`, long): The member that answers, 1 to n; 1 for a single model.
        logits (`torch.Tensor` of shape `[rows, num_labels]`): At the exit that the row takes.
        uncertainty (`torch.Tensor` of shape `[rows]`, float32): Of this exit.
        layers_run (`torch.Tensor` of shape `[rows, L]`, bool): The layers that each row runs through.
        exits_run (`torch.Tensor` of shape `[rows, L]`, bool): The exits that are evaluated for it.
        flops (`torch.Tensor` of shape `[rows]`, long, *optional*): What these cost, if the record has the costs.
    """

    exit_layer: torch.Tensor
    exit_member: torch.Tensor
    logits: torch.Tensor
    uncertainty: torch.Tensor
    layers_run: torch.Tensor
    exits_run: torch.Tensor
    flops: torch.Tensor | None = None


def replay_at_speed(
    record: ExitRecord, config: PreTrainedConfig, speed: float | list | torch.Tensor, policy: ExitPolicy | None = None
) -> Replay:
    """
    Tell what the pipeline would answer to every row of a record at a speed.

    Args:
        record ([`ExitRecord`]): From [`record_exits`].
        config ([`FastBertConfig`] or [`CascadeConfig`]):
            Of the model of the record, with its limits `min_exit_layer` and `max_layers`.
        speed (`float`, sequence or tensor of as many numbers as rows): In [0, 1], for all rows or one per row.
        policy ([`ExitPolicy`], *optional*): The config's own unless given.

    Returns:
        [`Replay`]

    Example:

    ```python
    >>> record = record_exits(model, rows, tokenizer=tokenizer)
    >>> replay_at_speed(record, model.config, speed=0.5).exit_layer.double().mean()
    ```
    """
    policy = policy or ExitPolicy.of(config)
    return replay(record, speed_thresholds(record, config, speed, policy.name), policy)


def replay(
    record: ExitRecord, thresholds: torch.Tensor, policy: ExitPolicy, uncertainties: torch.Tensor | None = None
) -> Replay:
    """
    Tell where every row of a record leaves, what it is answered and what that costs.

    Args:
        record ([`ExitRecord`]): From [`record_exits`].
        thresholds (`torch.Tensor` of shape `[rows, L]`):
            Of every exit for every row: 0 where it may not answer, infinity where it answers in any case. A member of
            a cascade whose thresholds for a row are all 0 does not run on it.
        policy ([`ExitPolicy`]): How the logits of an exit become an uncertainty.
        uncertainties (`torch.Tensor` of shape `[rows, L]`, *optional*):
            `exit_uncertainties(record, policy, thresholds > 0)`, from callers that replay a record many times.

    Returns:
        [`Replay`]
    """
    if thresholds.shape != record.exit_logits.shape[:2]:
        raise ValueError(
            f"thresholds must be [rows, L] = {list(record.exit_logits.shape[:2])}, one for every exit of the record, "
            f"got {list(thresholds.shape)}. Example: speed_thresholds(record, model.config, speed=0.5)"
        )
    may_answer = thresholds > 0  # [rows, L]
    if uncertainties is None:
        uncertainties = exit_uncertainties(record, policy, may_answer)
    # How many exits of the same member may answer from here on: a layer runs as long as there is one. If one is left,
    # it is the member's last, at which NaN leaves, too.
    left = torch.cat([may_answer[:, part].flip(1).cumsum(1).flip(1) for part in record.columns_of_members], 1)
    leaving = torch.where(left == 1, leaves(uncertainties, thresholds, at_end=True), leaves(uncertainties, thresholds))
    leaving &= may_answer
    if not leaving.any(1).all():
        row = int((~leaving.any(1)).nonzero()[0])
        raise ValueError(
            f"no exit answers row {row}, whose thresholds are {thresholds[row].tolist()}: give the last exit that may "
            "answer it the threshold infinity."
        )
    exit_taken = leaving.int().argmax(1)  # [rows]
    is_reached = torch.arange(record.num_exits) <= exit_taken[:, None]  # [rows, L]
    layers_run, exits_run = is_reached & (left > 0), is_reached & may_answer
    members = torch.arange(1, len(record.member_layers) + 1).repeat_interleave(torch.tensor(record.member_layers))
    flops = None
    if record.layer_flops is not None and record.exit_flops is not None:
        flops = (record.layer_flops * layers_run + record.exit_flops * exits_run).sum(1)
    return Replay(
        exit_layer=layers_run.sum(1),
        exit_member=members[exit_taken],
        logits=record.exit_logits[torch.arange(len(exit_taken)), exit_taken],
        uncertainty=uncertainties[torch.arange(len(exit_taken)), exit_taken],
        layers_run=layers_run,
        exits_run=exits_run,
        flops=flops,
    )


def speed_thresholds(
    record: ExitRecord, config: PreTrainedConfig, speed: float | list | torch.Tensor, policy: str | None = None
) -> torch.Tensor:
    """
    Return the threshold of every exit for every row at a speed, within the limits of the config.

    Args:
        record ([`ExitRecord`]): From [`record_exits`].
        config ([`FastBertConfig`] or [`CascadeConfig`]): Of the model of the record.
        speed (`float`, sequence or tensor of as many numbers as rows): In [0, 1], for all rows or one per row.
        policy (`str`, *optional*):
            Of the uncertainties, the config's own unless given. Where speeds are linear in their costs, they are so
            for the config's own; for another one they are thresholds.

    Returns:
        `torch.Tensor`: float32 of shape `[rows, L]`; the members of a cascade are one behind the other.
    """
    speeds = row_speeds(speed, len(record.exit_logits))
    if policy in (None, config.exit_policy):
        speeds = thresholds_of_speeds(config, speeds)
    return raw_thresholds(record, config, speeds)


def raw_thresholds(record: ExitRecord, config: PreTrainedConfig, threshold: float | torch.Tensor) -> torch.Tensor:
    """As [`speed_thresholds`], from what uncertainties are compared with, where speeds are linear in their costs."""
    layers = tuple(member.num_hidden_layers for member in getattr(config, "members", None) or [config])
    if record.exit_logits.shape[-1] != config.num_labels:
        raise ValueError(
            f"the record has {record.exit_logits.shape[-1]} labels and the model {config.num_labels}: give the model "
            "that made it, or record it anew with record_exits(model, dataset)."
        )
    if record.member_layers != layers:
        raise ValueError(
            f"the record has {' + '.join(map(str, record.member_layers))} exits and the model "
            f"{' + '.join(map(str, layers))}: give the model that made it, or record it anew with "
            "record_exits(model, dataset)."
        )
    return torch.cat(config_thresholds(config, row_speeds(threshold, len(record.exit_logits))), 1)


def exit_uncertainties(record: ExitRecord, policy: ExitPolicy, may_answer: torch.Tensor | None = None) -> torch.Tensor:
    """
    Return the uncertainty of every exit on every row, exit by exit as in the live model.

    Args:
        record ([`ExitRecord`]): From [`record_exits`].
        policy ([`ExitPolicy`]): What it remembers of a row begins anew in each member.
        may_answer (`torch.Tensor` of shape `[rows, L]`, bool, *optional*):
            The exits that may answer each row, which alone count for policies with a memory. All unless given.

    Returns:
        `torch.Tensor`: float32 of shape `[rows, L]`.
    """
    columns = []
    for part in record.columns_of_members:
        state = policy.start(len(record.exit_logits))
        for column in range(record.num_exits)[part]:
            asked = None if may_answer is None else may_answer[:, column]
            uncertainty, state = policy.uncertainty(record.exit_logits[:, column], state, asked, column + 1)
            columns.append(uncertainty)
    return torch.stack(columns, 1)


def replay_every_speed(
    record: ExitRecord, config: PreTrainedConfig, uncertainties: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[Replay]]:
    """
    Return all that happens at speeds above 0: a text changes its exit where the speed passes one of its own
    uncertainties, and only there. Speeds are thresholds here, also of a model whose own are linear in their costs.

    Args:
        record ([`ExitRecord`]): From [`record_exits`].
        config ([`FastBertConfig`] or [`CascadeConfig`]): Of the model of the record, with its policy and limits.
        uncertainties (`torch.Tensor` of shape `[rows, L]`, *optional*): In place of the policy's own.

    Returns:
        `tuple` of `torch.Tensor` of shape `[rows, L]`, the uncertainties of each text in rising order, and `list` of L
        + 1 [`Replay`]: up to the first of them, between each two, and at speed 1.

    Raises:
        ValueError: If the logits of a row are not finite.
    """
    policy, thresholds = ExitPolicy.of(config), raw_thresholds(record, config, 1.0)
    if uncertainties is None:
        uncertainties = exit_uncertainties(record, policy, thresholds > 0)
    broken = (uncertainties.isnan() & (thresholds > 0)).any(1)
    if broken.any():
        raise ValueError(
            f"the logits of rows {broken.nonzero()[:, 0].tolist()} are not finite, so there is no answer: check the "
            "model's weights and inputs for NaN and infinity."
        )
    steps = uncertainties.where(thresholds > 0, 1.0).sort(1).values
    speeds = torch.cat([steps, torch.ones(len(steps), 1)], 1).clamp(min=torch.finfo(steps.dtype).tiny)
    replays = [
        replay(record, raw_thresholds(record, config, of_rows), policy, uncertainties) for of_rows in speeds.unbind(1)
    ]
    return steps, replays


def add_up(
    steps: torch.Tensor, layers: torch.Tensor, value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the speeds at which a text changes its exit, in rising order from 0, `[intervals]`, and the sums over the
    texts above each of them, up to the next, `[intervals, ...]`.

    Args:
        steps (`torch.Tensor` of shape `[rows, L]`): From [`replay_every_speed`].
        layers (`torch.Tensor` of shape `[rows, L + 1]`): The exit layers of its replays.
        value (`Callable`): From rows and the numbers of their replays, `[n]` each, to what is added up, `[n, ...]`.
    """
    rows, before = (layers[:, 1:] != layers[:, :-1]).nonzero(as_tuple=True)  # [changes] of all texts
    lower, places = torch.cat([torch.zeros(1), steps[rows, before]]).unique(return_inverse=True)
    changes = value(rows, before + 1) - value(rows, before)
    by_place = changes.new_zeros(len(lower), *changes.shape[1:]).index_add_(0, places[1:], changes)
    every_row = torch.arange(len(layers))
    return lower, value(every_row, torch.zeros_like(every_row)).sum(0) + by_place.cumsum(0)
