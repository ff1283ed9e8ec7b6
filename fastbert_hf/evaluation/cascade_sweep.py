"""What every speed of a cascade costs and gives, from one full-depth pass through each member."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from ..modeling.exit_policies import exit_uncertainties, first_exits
from ..modeling.modeling_cascade import CascadeForSequenceClassification
from .exit_record import ExitRecord, record_exits
from .flops import executed_flops, paper_flops
from .speed_sweep import SPEEDS, check_metric, task_metric


def record_members(
    cascade: CascadeForSequenceClassification,
    datasets: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
    data_collators: Callable | Sequence[Callable],
    batch_size: int = 64,
    progress: bool = True,
) -> list[ExitRecord]:
    """
    Runs every row through every member. Arguments as in [`record_exits`]; where every member has its own tokenizer,
    `datasets` and `data_collators` are one for each, of the same rows.

    Returns:
        `list` of [`ExitRecord`], one for each member.
    """
    number = len(cascade.members)
    if not cascade.config.own_tokenizers:
        datasets, data_collators = [datasets] * number, [data_collators] * number
    elif callable(data_collators) or not len(datasets) == len(data_collators) == number:
        raise ValueError(
            f"each of the {number} members has its own tokenizer: give a list of {number} datasets, of the same rows, "
            f"and one of {number} data collators."
        )
    parts = zip(cascade.members, datasets, data_collators, strict=True)
    return [record_exits(member, rows, collator, batch_size, progress) for member, rows, collator in parts]


def sweep_cascade(
    cascade: CascadeForSequenceClassification,
    records: Sequence[ExitRecord],
    speeds: Iterable[float] = SPEEDS,
    metric: str = "accuracy",
) -> pd.DataFrame:
    """
    One row for every speed, with the columns of [`sweep_speeds`]. The full model is the last member alone, to which
    `agreement` and the speed-ups compare; `mean_exit_layer` is the cost of the CascadeBERT paper, the layers executed
    in all members, and `member_1` to `member_n` are the shares of the texts that each answered.

    Args:
        cascade ([`CascadeForSequenceClassification`]): The model of the records.
        records (sequence of [`ExitRecord`]): From [`record_members`].
        speeds (iterable of `float`): As in [`sweep_speeds`].
        metric (`str`): As in [`sweep_speeds`].

    Returns:
        `pandas.DataFrame`
    """
    if len(records) != len(cascade.members) or len({len(record.lengths) for record in records}) > 1:
        raise ValueError(
            f"a cascade of {len(cascade.members)} members needs a record of each, of the same rows, got "
            f"{[len(record.lengths) for record in records]} rows: record_members(cascade, dataset, data_collator)"
        )
    for number, (member, record) in enumerate(zip(cascade.members, records, strict=True), start=1):
        if record.num_exits != len(member.exits):
            raise ValueError(
                f"the record of member {number} has {record.num_exits} exits, but the member {len(member.exits)}: "
                "give the records in the order of the members, as record_members returns them."
            )
    check_metric(metric, records[-1], stacklevel=3)
    policy, last = cascade.config.exit_policy, records[-1]
    uncertainties = [exit_uncertainties(record.exit_logits, policy) for record in records]
    full_answers = _answers(last, torch.full_like(last.lengths, cascade.exits_of(cascade.members[-1])[-1]))
    rows, full = [], {}
    for speed in (0.0, *speeds):
        left = _leave(cascade, records, uncertainties, speed)
        answers = left.pop("answers")
        shares = torch.bincount(left.pop("exit_member"), minlength=len(records) + 1)[1:].double() / len(answers)
        cost = {name: column.double().mean().item() for name, column in left.items()}
        full = full or cost  # the first speed is 0
        rows.append(
            {
                "policy": policy,
                "speed": speed,
                **task_metric(metric, last.labels, answers, last.exit_logits.shape[-1]),
                "agreement": (answers == full_answers).double().mean().item(),
                "mean_exit_layer": cost["exit_layer"],
                "layer_speed_up": full["exit_layer"] / cost["exit_layer"],
                "paper_flops": cost["paper_flops"],
                "paper_speed_up": full["paper_flops"] / cost["paper_flops"],
                "executed_flops": cost["executed_flops"],
                "executed_speed_up": full["executed_flops"] / cost["executed_flops"],
                **{f"member_{number}": share for number, share in enumerate(shares.tolist(), start=1)},
            }
        )
    return pd.DataFrame(rows[1:])


def _leave(
    cascade: CascadeForSequenceClassification,
    records: Sequence[ExitRecord],
    uncertainties: Sequence[torch.Tensor],
    speed: float,
) -> dict[str, torch.Tensor]:
    """What each text is answered, by which member, and what it has cost by then."""
    rows = len(records[0].lengths)
    left = {
        name: torch.zeros(rows, dtype=torch.long)
        for name in ("answers", "exit_member", "exit_layer", "paper_flops", "executed_flops")
    }
    members = list(enumerate(zip(cascade.members, records, uncertainties, strict=True), start=1))
    for number, (member, record, uncertainty) in members if speed > 0 else members[-1:]:
        exits = cascade.exits_of(member)
        asked = left["exit_member"] == 0
        layers = first_exits(uncertainty, speed, exits)
        options = {"students": speed > 0, "min_exit_layer": exits[0]}
        left["exit_layer"] += asked * layers
        left["paper_flops"] += asked * paper_flops(member, layers, **options)
        left["executed_flops"] += asked * executed_flops(member, layers, record.lengths, **options)
        sure = uncertainty.gather(1, (layers - 1)[:, None])[:, 0] < torch.tensor(float(speed), dtype=torch.float32)
        leaving = asked & (sure | (number == len(records)))
        left["answers"][leaving] = _answers(record, layers)[leaving]
        left["exit_member"][leaving] = number
    return left


def _answers(record: ExitRecord, exit_layer: torch.Tensor) -> torch.Tensor:
    """The label that each row is given at its exit layer, `[rows]`."""
    return record.exit_logits.argmax(-1).gather(1, (exit_layer - 1)[:, None])[:, 0]
