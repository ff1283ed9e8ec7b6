"""What every speed costs and gives: a table for choosing one, counted from one full-depth pass, and measured times."""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..modeling.exit_policies import exit_range, exit_uncertainties, first_exits
from ..modeling.modeling_fastbert import FastBertForSequenceClassification
from .exit_record import ExitRecord
from .flops import executed_flops, paper_flops


# Finer near 0: exits that were taught by a teacher sure of its training texts are sure, too.
SPEEDS = (*(step / 1000 for step in range(100)), *(step / 100 for step in range(10, 101)))


# From gold labels, answers and the number of labels to a number.
TASK_METRICS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], float]] = {
    "accuracy": lambda labels, answers, num_labels: accuracy_score(labels, answers),
    "f1": lambda labels, answers, num_labels: f1_score(
        labels, answers, average="binary" if num_labels == 2 else "macro", zero_division=0
    ),
    "matthews_correlation": lambda labels, answers, num_labels: matthews_corrcoef(labels, answers),
}


def sweep_speeds(
    model: FastBertForSequenceClassification,
    record: ExitRecord,
    speeds: Iterable[float] = SPEEDS,
    policies: Sequence[str] | None = None,
    metric: str = "accuracy",
) -> pd.DataFrame:
    """
    One row for every policy and speed, within the config's `min_exit_layer` and `max_layers`.

    | column | meaning |
    |---|---|
    | `policy`, `speed` | what decides when a text leaves |
    | `accuracy`, `f1` or `matthews_correlation` | against the gold labels; left out where there are none |
    | `agreement` | share of the answers that are the teacher's |
    | `mean_exit_layer` | layers that a text ran through, on average |
    | `layer_speed_up` | L / `mean_exit_layer`: how many times fewer layers were executed |
    | `paper_flops`, `paper_speed_up` | mean per text, [`paper_flops`]; full depth divided by it |
    | `executed_flops`, `executed_speed_up` | mean per text, [`executed_flops`]; full depth divided by it |
    | `exit_1` to `exit_L` | share of the texts that left there |

    Args:
        model ([`FastBertForSequenceClassification`]): The model of the record.
        record ([`ExitRecord`]): From [`record_exits`].
        speeds (iterable of `float`):
            In [0, 1]; unless given, 0 to 0.1 in steps of a thousandth and on to 1 in steps of a hundredth.
        policies (sequence of `str`, *optional*): The config's own unless given.
        metric (`str`): `"accuracy"`, `"f1"` (binary for two labels, else macro) or `"matthews_correlation"`.

    Returns:
        `pandas.DataFrame`: it prints as a table; [`save_table`] keeps it.
    """
    describe = _Describer(model, record, metric)
    config, speeds = model.config, list(speeds)
    policies = [config.exit_policy] if policies is None else policies
    # As the pipeline, which keeps to the limits of the config.
    exits = exit_range(config.num_hidden_layers, config.min_exit_layer, config.max_layers)
    rows = []
    for policy in policies:
        # Of these alone: patience counts the agreements of exits that were evaluated.
        uncertainties = exit_uncertainties(record.exit_logits[:, exits[0] - 1 : exits[-1]], policy, config.patience)
        for speed in speeds:
            exit_layer = first_exits(uncertainties, speed) + exits[0] - 1
            rows.append({"policy": policy, "speed": speed, **describe(exit_layer, students=speed > 0)})
    return pd.DataFrame(rows)


def sweep_depths(
    model: FastBertForSequenceClassification, record: ExitRecord, metric: str = "accuracy"
) -> pd.DataFrame:
    """
    One row for every depth at which all texts leave together, as with `max_layers` at speed 0. Only the exit that
    answers is evaluated and counted (in the paper's "without adaptive inference" those below count, too). Arguments
    and columns as in [`sweep_speeds`], with `max_layers` in place of policy and speed.
    """
    describe = _Describer(model, record, metric)
    depths = range(1, record.num_exits + 1)
    rows = [
        {"max_layers": depth, **describe(torch.full_like(record.lengths, depth), students=False)} for depth in depths
    ]
    return pd.DataFrame(rows)


class _Describer:
    """The columns that follow from where each text leaves."""

    def __init__(self, model: FastBertForSequenceClassification, record: ExitRecord, metric: str):
        check_metric(metric, record, stacklevel=4)
        if record.num_exits != len(model.exits):
            raise ValueError(
                f"the record has {record.num_exits} exits and the model {len(model.exits)}: give the model that "
                "made it."
            )
        self.model, self.record, self.metric = model, record, metric
        self.answers = record.exit_logits.argmax(-1)  # [rows, L]
        full_depth = torch.full_like(record.lengths, record.num_exits)
        self.full = self._flops(full_depth, students=False)

    def _flops(self, exit_layer: torch.Tensor, students: bool) -> tuple[float, float]:
        first = self.model.config.min_exit_layer or 1
        paper = paper_flops(self.model, exit_layer, students, min_exit_layer=first)
        executed = executed_flops(self.model, exit_layer, self.record.lengths, students, min_exit_layer=first)
        return paper.double().mean().item(), executed.double().mean().item()

    def __call__(self, exit_layer: torch.Tensor, students: bool) -> dict[str, float]:
        num_exits, labels = self.record.num_exits, self.record.labels
        answers = self.answers.gather(1, (exit_layer - 1)[:, None])[:, 0]
        paper, executed = self._flops(exit_layer, students)
        mean_exit_layer = exit_layer.double().mean().item()
        shares = torch.bincount(exit_layer, minlength=num_exits + 1)[1:].double() / len(exit_layer)
        return {
            **task_metric(self.metric, labels, answers, self.record.exit_logits.shape[-1]),
            "agreement": (answers == self.answers[:, -1]).double().mean().item(),
            "mean_exit_layer": mean_exit_layer,
            "layer_speed_up": num_exits / mean_exit_layer,
            "paper_flops": paper,
            "paper_speed_up": self.full[0] / paper,
            "executed_flops": executed,
            "executed_speed_up": self.full[1] / executed,
            **{f"exit_{depth}": share for depth, share in enumerate(shares.tolist(), start=1)},
        }


def check_metric(metric: str, record: ExitRecord, stacklevel: int) -> None:
    """An error for an unknown metric, and a warning, on the caller's line, where there are no labels for it."""
    if metric not in TASK_METRICS:
        raise ValueError(f"metric={metric!r} is not known; choose one of {', '.join(TASK_METRICS)}.")
    if record.labels is None:
        warnings.warn(
            f"the data has no labels, so there is no {metric}: the table reports the agreement with the full model "
            "(give a 'labels' column for more).",
            stacklevel=stacklevel,
        )


def task_metric(metric: str, labels: torch.Tensor | None, answers: torch.Tensor, num_labels: int) -> dict[str, float]:
    """A metric of the task under its name, or nothing where there are no labels."""
    return {} if labels is None else {metric: float(TASK_METRICS[metric](labels, answers, num_labels))}


def time_speeds(
    model: PreTrainedModel,
    dataset: Sequence[Mapping[str, Any]],
    speeds: Sequence[float] = (0.0, 0.1, 0.5, 0.8),
    batch_size: int | None = None,
    repeats: int = 5,
    progress: bool = True,
) -> pd.DataFrame:
    """
    Wall-clock of `model.predict`, which the pipeline uses, without the tokenizer. The speeds take turns within each
    repeat, so that a machine's moods reach all of them, and each repeat compares them with its own full-depth pass.

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
    texts = [dataset[row] for row in range(len(dataset))]
    speeds = list(dict.fromkeys([0.0, *map(float, speeds)]))
    seconds = {speed: [] for speed in speeds}
    with tqdm(total=(repeats + 1) * len(speeds), desc="Timing", disable=not progress) as bar:
        for repeat in range(repeats + 1):
            for speed in speeds:
                start = time.perf_counter()
                for _ in model.predict(texts, speed=speed, batch_size=batch_size):
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
    What a dial gives at exactly one speed-up, so that dials with fine and coarse steps can be compared: the two
    neighbouring settings are found on dev data, and texts are split between them by chance, so that dev data reaches
    the speed-up. The expected accuracy is reported, or that of another mean over the texts.

    Args:
        chosen_on (`pandas.DataFrame`): The settings on dev data, from [`sweep_speeds`] or [`sweep_depths`].
        reported_on (`pandas.DataFrame`): The same settings, row by row, on test data.
        speed_up (`float`): At least 1.
        metric (`str`): Column of the result, a mean over the texts such as accuracy or agreement.
        column (`str`): Column of the speed-up.

    Returns:
        `dict` with the metric and the speed-up on test data, or `None` where the dial does not reach that far.
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
    """Writes a table as `.csv` or `.json`, whole or not at all. JSON keeps `table.attrs`, such as settings, too."""
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
    """A table that [`save_table`] wrote."""
    path = Path(path)
    if path.suffix == ".csv":
        return pd.read_csv(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    table = pd.DataFrame(content["rows"])
    table.attrs = content["settings"]
    return table


def write_whole(path: Path, text: str) -> None:
    """Writes under a temporary name and moves into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
