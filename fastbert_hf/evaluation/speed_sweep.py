"""What every speed costs and gives: a table for choosing one, counted from one full-depth pass, and measured times."""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import write_whole
from ..modeling.exit_policies import ExitPolicy, exit_thresholds
from ..modeling.processing_cascade import CascadeProcessor
from ..modeling.tasks import task_of
from .exit_record import ExitRecord, as_record
from .flops import paper_costs
from .replay import Replay, exit_uncertainties, replay, speed_thresholds
from .task_metrics import measured, metric_of


try:
    import pandas as pd
except ImportError as error:
    raise ImportError('fastbert_hf.evaluation needs its extra: pip install "fastbert-hf[evaluation]"') from error


# Finer near 0: exits that were taught by a teacher sure of its training texts are sure, too.
SPEEDS = (*(step / 1000 for step in range(100)), *(step / 100 for step in range(10, 101)))


def sweep_speeds(
    model: PreTrainedModel,
    record: ExitRecord | Any,
    speeds: Iterable[float] = SPEEDS,
    policies: Sequence[str] | None = None,
    metric: str | None = None,
    tokenizer: PreTrainedTokenizerBase | CascadeProcessor | None = None,
) -> pd.DataFrame:
    """
    Make a table with one row for every policy and speed, within the config's `min_exit_layer` and `max_layers`.

    | column | meaning |
    |---|---|
    | `policy`, `speed` | what decides when a text leaves |
    | `accuracy`, `f1` or another metric | against the gold labels; left out where there are none |
    | `agreement` | share of the answers that are those of the full model |
    | `mean_exit_layer` | layers that a text ran through, on average; in all members of a cascade |
    | `layer_speed_up` | how many times fewer layers were executed than by the full model |
    | `paper_flops`, `paper_speed_up` | mean per text, [`paper_flops`]; the full model's divided by it |
    | `executed_flops`, `executed_speed_up` | mean per text, [`executed_flops`]; the full model's divided by it |
    | `exit_1` to `exit_L` | share of the texts that left there; not for a cascade |
    | `member_1` to `member_n` | share of the texts that each member of a cascade answered |

    The full model is every layer of a single model, and the last member alone of a cascade.

    Args:
        model ([`FastBertForSequenceClassification`] or [`CascadeForSequenceClassification`]):
            The model of the record.
        record ([`ExitRecord`], or rows or texts): From [`record_exits`], or what it takes.
        speeds (iterable of `float`):
            In [0, 1]; unless given, 0 to 0.1 in steps of a thousandth and on to 1 in steps of a hundredth.
        policies (sequence of `str`, *optional*): The config's own unless given.
        metric (`str`, *optional*):
            `"accuracy"`, which it is unless given, `"f1"` (binary for two labels, else macro) or
            `"matthews_correlation"`. Of several labels `"f1"` (of all together; the default), `"macro_f1"` or
            `"accuracy"` of whole answers; of a regression `"r2"` (the default) or `"pearson"`; of tokens `"f1"` of
            entities (the default, where labels are such tags) or `"accuracy"`.
        tokenizer (`PreTrainedTokenizerBase` or [`CascadeProcessor`], *optional*): Needed for texts.

    Returns:
        `pandas.DataFrame`: it prints as a table; [`save_table`] keeps it.
    """
    record = as_record(model, record, tokenizer)
    columns_of, config = _Columns(model, record, metric), model.config
    allowed = config.exit_policies
    speeds, policies = list(speeds), [config.exit_policy] if policies is None else list(policies)
    for policy in policies:
        if policy not in allowed:
            raise ValueError(
                f"exit policy {policy!r} is not known for this model; choose one of {', '.join(allowed)}."
            )
    rows = []
    for policy in policies:
        exit_policy = ExitPolicy.of(config, policy)
        # Any speed above 0 asks the same exits, and at speed 0 nobody compares uncertainties.
        uncertainties = exit_uncertainties(record, exit_policy, speed_thresholds(record, config, 1.0) > 0)
        for speed in speeds:
            replayed = replay(record, speed_thresholds(record, config, speed, policy), exit_policy, uncertainties)
            rows.append({"policy": policy, "speed": speed, **columns_of(replayed)})
    return pd.DataFrame(rows)


def sweep_depths(
    model: PreTrainedModel,
    record: ExitRecord | Any,
    metric: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> pd.DataFrame:
    """
    Make a table with one row for every depth at which all texts leave together, as with `max_layers` at speed 0. Only
    the exit that answers is evaluated and counted (in the paper's "without adaptive inference" those below count,
    too).

    Args:
        model ([`FastBertForSequenceClassification`]): The model of the record.
        record ([`ExitRecord`], or rows or texts): As in [`sweep_speeds`].
        metric (`str`, *optional*): As in [`sweep_speeds`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Needed for texts.

    Returns:
        `pandas.DataFrame` with the columns of [`sweep_speeds`], and `max_layers` in place of policy and speed.
    """
    if hasattr(model, "members"):
        raise ValueError(
            "the depths of a cascade are those of its members: give one of them and its part of the record, as in "
            "sweep_depths(cascade.members[0], record.of_member(1))."
        )
    record = as_record(model, record, tokenizer)
    columns_of, policy = _Columns(model, record, metric), ExitPolicy.of(model.config)
    no_speed = torch.zeros(len(record.exit_logits))
    rows = []
    for depth in range(1, record.num_exits + 1):
        thresholds = exit_thresholds(no_speed, record.num_exits, max_layers=depth)
        rows.append({"max_layers": depth, **columns_of(replay(record, thresholds, policy))})
    return pd.DataFrame(rows)


class _Columns:
    """The columns of a table that follow from where each text leaves, beside those of the full model."""

    def __init__(self, model: PreTrainedModel, record: ExitRecord, metric: str | None):
        metric, _ = metric_of(model.config, metric)
        if record.layer_flops is None or record.exit_flops is None:
            raise ValueError("the record has no costs: record_exits(model, dataset) makes one that has.")
        if record.labels is None:
            warnings.warn(
                f"the data has no labels, so there is no {metric}: the table reports the agreement with the full "
                "model (give a 'labels' column for more).",
                stacklevel=3,
            )
        self.record, self.metric, self.config, self.task = record, metric, model.config, task_of(model.config)
        members = list(getattr(model, "members", [model]))
        self.is_cascade = len(members) > 1
        layers, exits = zip(*map(paper_costs, members), strict=True)
        self.paper_layers, self.paper_exits = torch.cat(layers), torch.cat(exits)  # [L] each
        thresholds = speed_thresholds(record, model.config, 0.0)
        if not self.is_cascade:
            # Callers may go beyond the limits of the config; those of a member are a part of the cascade.
            thresholds = exit_thresholds(torch.zeros(len(thresholds)), record.num_exits)
        full = replay(record, thresholds, ExitPolicy.of(model.config))
        self.full_logits, self.full_costs = full.logits, self._costs(full)

    def _costs(self, replayed: Replay) -> dict[str, float]:
        paper = (replayed.layers_run * self.paper_layers + replayed.exits_run * self.paper_exits).sum(1)
        costs = {"layer": replayed.exit_layer, "paper": paper, "executed": replayed.flops}
        return {name: column.double().mean().item() for name, column in costs.items()}

    def __call__(self, replayed: Replay) -> dict[str, float]:
        labels, costs = self.record.labels, self._costs(replayed)
        speed_ups = {name: full / costs[name] for name, full in self.full_costs.items()}
        number = len(self.record.member_layers) if self.is_cascade else self.record.num_exits
        places, name = (replayed.exit_member, "member") if self.is_cascade else (replayed.exit_layer, "exit")
        shares = torch.bincount(places, minlength=number + 1)[1:].double() / len(places)
        return {
            **({} if labels is None else {self.metric: measured(self.config, self.metric, replayed.logits, labels)}),
            "agreement": 1 - self.task.differs(replayed.logits, self.full_logits).double().mean().item(),
            "mean_exit_layer": costs["layer"],
            "layer_speed_up": speed_ups["layer"],
            "paper_flops": costs["paper"],
            "paper_speed_up": speed_ups["paper"],
            "executed_flops": costs["executed"],
            "executed_speed_up": speed_ups["executed"],
            **{f"{name}_{place}": share for place, share in enumerate(shares.tolist(), start=1)},
        }


def time_speeds(
    model: PreTrainedModel,
    dataset: Sequence[Mapping[str, Any]],
    speeds: Sequence[float] = (0.0, 0.1, 0.5, 0.8),
    batch_size: int | None = None,
    repeats: int = 5,
    progress: bool = True,
) -> pd.DataFrame:
    """
    Measure the wall-clock time of `model.predict` within the config's limits, as the pipeline uses it, without the
    tokenizer. The speeds take
    turns within each repeat, so that whatever else the machine does slows down all of them, and each repeat compares
    them with its own full-depth pass.

    Args:
        model ([`FastBertForSequenceClassification`] or [`CascadeForSequenceClassification`]): Put into eval mode.
        dataset (sequence of `dict`): Tokenized rows.
        speeds (sequence of `float`): In [0, 1]; full depth is always measured beside them.
        batch_size (`int`, *optional*): Texts that are answered at a time; by their tokens unless given.
        repeats (`int`): Rounds over all speeds, after one that is not counted.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `pandas.DataFrame`: `speed`, `texts_per_second` (median over the repeats), `time_speed_up` (median of the
        ratios to full depth), and `time_speed_up_min` and `time_speed_up_max`.
    """
    if len(dataset) == 0 or repeats < 1:
        raise ValueError(f"give at least one row and one repeat, got {len(dataset)} rows and repeats={repeats}.")
    model.eval()
    own = {name: getattr(model.config, name) for name in model.config.call_defaults if name != "speed"}
    limits = {name: value for name, value in own.items() if value is not None}
    texts = [dataset[row] for row in range(len(dataset))]
    speeds = list(dict.fromkeys([0.0, *map(float, speeds)]))
    seconds = {speed: [] for speed in speeds}
    with tqdm(total=(repeats + 1) * len(speeds), desc="Timing", disable=not progress) as bar:
        for repeat in range(repeats + 1):
            for speed in speeds:
                start = time.perf_counter()
                for _ in model.predict(texts, speed=speed, batch_size=batch_size, **limits):
                    pass
                if repeat > 0:
                    seconds[speed].append(time.perf_counter() - start)
                bar.update()
    table = []
    for speed in speeds:
        ratios = [full / own for full, own in zip(seconds[0.0], seconds[speed], strict=True)]
        table.append(
            {
                "speed": speed,
                "texts_per_second": len(dataset) / statistics.median(seconds[speed]),
                "time_speed_up": statistics.median(ratios),
                "time_speed_up_min": min(ratios),
                "time_speed_up_max": max(ratios),
            }
        )
    return pd.DataFrame(table)


def at_speed_up(
    chosen_on: pd.DataFrame,
    reported_on: pd.DataFrame,
    speed_up: float,
    metric: str = "accuracy",
    column: str = "layer_speed_up",
) -> dict[str, float] | None:
    """
    Return what a table of settings gives at exactly one speed-up, so that fine and coarse steps can be compared. The
    two neighbouring settings are found on dev data. Each text gets one of them by chance, in the proportion at which
    dev data reaches the speed-up. The expected accuracy is returned, or that of another mean over the texts.

    Args:
        chosen_on (`pandas.DataFrame`): The settings on dev data, from [`sweep_speeds`] or [`sweep_depths`].
        reported_on (`pandas.DataFrame`): The same settings, row by row, on test data.
        speed_up (`float`): At least 1.
        metric (`str`): Column of the result, a mean over the texts such as accuracy or agreement.
        column (`str`): Column of the speed-up.

    Returns:
        `dict` with the metric and the speed-up on test data, or `None` where no setting reaches that far.
    """
    if len(chosen_on) != len(reported_on):
        raise ValueError(f"both tables need the same settings, got {len(chosen_on)} and {len(reported_on)} rows.")
    cost, wanted = 1 / chosen_on[column].to_numpy(), 1 / speed_up
    cheaper, dearer = np.flatnonzero(cost <= wanted + 1e-9), np.flatnonzero(cost >= wanted - 1e-9)
    if len(cheaper) == 0 or len(dearer) == 0:
        return None
    low, high = cheaper[cost[cheaper].argmax()], dearer[cost[dearer].argmin()]
    share = 0.0 if cost[high] <= cost[low] else (wanted - cost[low]) / (cost[high] - cost[low])
    values, costs = reported_on[metric].to_numpy(), 1 / reported_on[column].to_numpy()
    return {
        metric: float((1 - share) * values[low] + share * values[high]),
        column: float(1 / ((1 - share) * costs[low] + share * costs[high])),
    }


def save_table(table: pd.DataFrame, path: str | os.PathLike) -> None:
    """Write a table as `.csv` or `.json`, whole or not at all. JSON keeps `table.attrs`, such as settings, too."""
    path = Path(path)
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"a table is saved as .csv or .json, got {str(path)!r}.")
    if path.suffix == ".csv":
        text = table.to_csv(index=False)
    else:
        rows = json.loads(table.to_json(orient="records", double_precision=15))
        text = json.dumps({"settings": table.attrs, "rows": rows}, indent=1) + "\n"
    write_whole(path, text)


def load_table(path: str | os.PathLike) -> pd.DataFrame:
    """Read a table that [`save_table`] wrote."""
    path = Path(path)
    if path.suffix == ".csv":
        return pd.read_csv(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    table = pd.DataFrame(content["rows"])
    table.attrs = content["settings"]
    return table
