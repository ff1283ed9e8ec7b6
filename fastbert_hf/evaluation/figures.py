"""
The figures of the FastBERT paper (ACL 2020, Figures 3 to 7) for any model and data: each function returns a
`matplotlib.figure.Figure`, [`save_figure`] writes it as PNG and SVG.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart; lines differ in their markers, too,
so that they survive a print in grey.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling.dials import threshold_of
from ..modeling.exit_policies import ExitPolicy
from .exit_record import ExitRecord
from .flops import paper_costs, paper_flops
from .replay import exit_uncertainties, replay_at_speed, speed_thresholds
from .task_metrics import ALL_METRICS


try:
    import pandas as pd
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter
except ImportError as error:
    raise ImportError('fastbert_hf.evaluation needs its extra: pip install "fastbert-hf[evaluation]"') from error


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.hashsalt": "fastbert_hf",
}


def plot_trade_off(tables: Mapping[str, pd.DataFrame], speed_up: str = "paper_speed_up") -> Figure:
    """
    Draw Figure 3: speed and accuracy, speed and speed-up, speed-up and accuracy, with one line for each data set.

    Args:
        tables (mapping of `str` to `pandas.DataFrame`): The name of each data set and its [`sweep_speeds`] table.
        speed_up (`str`): The column of the speed-up: `"paper_speed_up"`, `"layer_speed_up"` or `"executed_speed_up"`.
    """
    if not tables or len(tables) > len(COLOURS):
        raise ValueError(f"give 1 to {len(COLOURS)} tables, got {len(tables)}.")
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        by_speed, speed_ups, trade_off = figure.subplots(1, 3)
        for index, (name, table) in enumerate(tables.items()):
            metric = next((column for column in (*ALL_METRICS, "agreement") if column in table), None)
            if metric is None:
                raise ValueError(f"the table of {name!r} has no column of {', '.join(ALL_METRICS)} or agreement.")
            line = {
                "color": COLOURS[index],
                "marker": MARKERS[index],
                # Evenly along the line: a marker on each of two hundred points would be a band.
                "markevery": (0.02 * (index % 6), 0.12),
            }
            by_speed.plot(table["speed"], table[metric], label=name, **line)
            speed_ups.plot(table["speed"], table[speed_up], **line)
            ordered = table.sort_values(speed_up)
            trade_off.plot(ordered[speed_up], ordered[metric], **line)
        by_speed.set(xlabel="Speed", ylabel=_title(metric), title="(a) Speed and accuracy")
        speed_ups.set(xlabel="Speed", ylabel=_title(speed_up) + " (×)", title="(b) Speed and speed-up")
        speed_ups.set_ylim(bottom=0)
        trade_off.set(xlabel=_title(speed_up) + " (×)", ylabel=_title(metric), title="(c) Speed-up and accuracy")
        for axes in (by_speed, trade_off):
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for axes in (by_speed, speed_ups):
            axes.set_xlim(0, 1)
        figure.legend(loc="outside lower center", ncols=min(len(tables), 8))
    return figure


def plot_speeds(
    curve: Sequence[Mapping[str, float]], marked: Sequence[Mapping[str, float]], metric: str, num_layers: int
) -> Figure:
    """
    Draw one model's trade-off: a metric of the task over the layers executed, with some speeds marked.

    Args:
        curve (sequence of mappings): Rows of a [`sweep_speeds`] table, for the line.
        marked (sequence of mappings): The same, for the marks, which carry their speed.
        metric (`str`): Column of the vertical axis.
        num_layers (`int`): L, the end of the horizontal axis.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        ordered = sorted(curve, key=lambda row: row["mean_exit_layer"])
        axes.plot(*([row[name] for row in ordered] for name in ("mean_exit_layer", metric)), color=COLOURS[0])
        labelled_at = -1.0
        for row in sorted(marked, key=lambda row: row["mean_exit_layer"]):
            place = (row["mean_exit_layer"], row[metric])
            axes.plot(*place, color=COLOURS[1], marker="o", zorder=3)
            # Names of marks that nearly coincide would cover each other.
            if place[0] - labelled_at > 0.06 * num_layers:
                axes.annotate(
                    f"{row['speed']:g}", place, (0, -12), textcoords="offset points", ha="center", fontsize=8
                )
                labelled_at = place[0]
        axes.set(xlabel=f"Layers executed on average, of {num_layers}", ylabel=_title(metric))
        axes.set_title(f"{_title(metric)} by layers executed; marks carry their speed")
        axes.set_xlim(0.8, num_layers + 0.2)
        axes.margins(y=0.15)
        if metric in ("accuracy", "f1"):
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def plot_accuracy_by_uncertainty(
    record: ExitRecord,
    config: PreTrainedConfig,
    policy: str | None = None,
    exits: Sequence[int] | None = None,
    intervals: int = 10,
) -> Figure:
    """
    Draw Figure 4, the reason why early exit works: the lower the uncertainty, the higher the accuracy. Marks are as
    large as the share of the texts in their interval; intervals with fewer than 5 texts are left out.

    Args:
        record ([`ExitRecord`]): With labels.
        config ([`FastBertConfig`]): Of the model of the record.
        policy (`str`, *optional*): One of `EXIT_POLICIES`; the config's own unless given.
        exits (sequence of `int`, *optional*): Layers, 1 to L; the first, the middle and the last one unless given.
        intervals (`int`): Intervals of uncertainty between 0 and 1.
    """
    if record.labels is None:
        raise ValueError("accuracy needs labels, and the record has none: record data with a 'labels' column.")
    exits = sorted({1, (record.num_exits + 1) // 2, record.num_exits}) if exits is None else exits
    exit_policy = ExitPolicy.of(config, policy)
    uncertainties = exit_uncertainties(record, exit_policy)
    right = torch.stack([exit_policy.task.is_right(said, record.labels) for said in record.exit_logits.unbind(1)], 1)
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.8), layout="constrained")
        axes = figure.subplots()
        for index, layer in enumerate(exits):
            places = (uncertainties[:, layer - 1] * intervals).long().clamp(max=intervals - 1)
            counts = torch.bincount(places, minlength=intervals)
            correct = torch.bincount(places, weights=right[:, layer - 1].double(), minlength=intervals)
            shown = (counts >= 5).numpy()
            centres = (np.arange(intervals) + 0.5) / intervals
            accuracy = (correct / counts.clamp(min=1)).numpy()
            share = (counts / counts.sum()).numpy()
            colour, marker = COLOURS[index], MARKERS[index]
            axes.plot(centres[shown], accuracy[shown], color=colour, linewidth=1.2, zorder=2)
            axes.scatter(
                *(centres[shown], accuracy[shown]),
                s=14 + 260 * share[shown],
                color=colour,
                marker=marker,
                edgecolor="white",
                linewidth=0.6,
                zorder=3,
            )
            axes.plot([], [], color=colour, marker=marker, label=_exit_name(layer, record.num_exits))
        axes.set(
            xlabel=f"Uncertainty ({exit_policy.name})", ylabel="Accuracy in the interval", xlim=(0, 1), ylim=(0, 1.04)
        )
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(loc="lower left")
        axes.set_title("Accuracy by uncertainty (mark size: share of the texts)")
    return figure


def plot_exit_layers(
    record: ExitRecord,
    config: PreTrainedConfig,
    speeds: Sequence[float] = (0.3, 0.5, 0.8),
    policy: str | None = None,
) -> Figure:
    """
    Draw Figure 5: the share of the texts that leave after each layer, at some speeds.

    Args:
        record ([`ExitRecord`]): Labels are not needed.
        config ([`FastBertConfig`] or [`CascadeConfig`]):
            Of the model of the record. Texts leave within its `min_exit_layer` and `max_layers`.
        speeds (sequence of `float`): In [0, 1].
        policy (`str`, *optional*): One of `EXIT_POLICIES`; the config's own unless given.
    """
    _check_number_of_speeds(speeds)
    exit_policy = ExitPolicy.of(config, policy)
    layers = np.arange(1, record.num_exits + 1)
    width = 0.8 / len(speeds)
    with rc_context(STYLE):
        figure = Figure(figsize=(max(5.2, 0.55 * record.num_exits), 3.4), layout="constrained")
        axes = figure.subplots()
        for index, speed in enumerate(speeds):
            exit_layer = replay_at_speed(record, config, speed, exit_policy).exit_layer
            share = torch.bincount(exit_layer, minlength=record.num_exits + 1)[1:] / len(exit_layer)
            label = f"{speed:g} ({exit_layer.double().mean().item():.2f})"
            places = layers + (index - (len(speeds) - 1) / 2) * width
            axes.bar(places, share.numpy(), width * 0.92, color=COLOURS[index], label=label)
        axes.set(xlabel="Layers executed", ylabel="Share of the texts", title="Where texts leave")
        axes.set_xticks(layers)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        # Below the axes: any place among the bars can be taken.
        figure.legend(loc="outside lower center", ncols=min(len(speeds), 4), title="Speed (mean layers executed)")
    return figure


def plot_uncertainty_by_layer(
    record: ExitRecord,
    config: PreTrainedConfig,
    speeds: Sequence[float] = (0.0, 0.3, 0.5, 0.8),
    policy: str | None = None,
) -> Figure:
    """
    Draw Figure 6: the uncertainty of the texts that reach each exit, at some speeds. Boxes span the middle half of the
    texts, whiskers the middle nine tenths; the dashed line is the threshold, under which texts leave. Exits that the
    config's limits leave out have no box.

    Args:
        record, config, speeds, policy: As in [`plot_exit_layers`].
    """
    _check_number_of_speeds(speeds)
    exit_policy = ExitPolicy.of(config, policy)
    may_answer = speed_thresholds(record, config, 1.0) > 0  # the same exits at any speed above 0
    uncertainties = exit_uncertainties(record, exit_policy, may_answer)
    with rc_context(STYLE):
        figure = Figure(figsize=(max(9, 0.9 * record.num_exits), 3.3), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(speeds), sharey=True))
        for axes, speed, letter in zip(panels, speeds, "abcdefgh", strict=False):
            is_shown = may_answer & replay_at_speed(record, config, speed, exit_policy).layers_run  # [rows, L]
            for layer in range(1, record.num_exits + 1):
                reached = uncertainties[is_shown[:, layer - 1], layer - 1].numpy()
                if len(reached) == 0:
                    continue
                axes.boxplot(
                    [reached],
                    positions=[layer],
                    widths=0.6,
                    whis=(5, 95),
                    showfliers=False,
                    patch_artist=True,
                    boxprops={"facecolor": "#9CC9E3", "edgecolor": COLOURS[0]},
                    medianprops={"color": COLOURS[1], "linewidth": 1.6},
                    whiskerprops={"color": COLOURS[0]},
                    capprops={"color": COLOURS[0]},
                )
            if speed > 0:
                threshold = threshold_of(config, speed) if exit_policy.name == config.exit_policy else speed
                axes.axhline(threshold, color="black", linestyle="--", linewidth=1)
            axes.set(xlabel="Layer", title=f"({letter}) speed {speed:g}", xlim=(0.3, record.num_exits + 0.7))
            axes.set_ylim(0, 1.02)
            _number_layers(axes, record.num_exits)
        panels[0].set_ylabel(f"Uncertainty ({exit_policy.name})")
    return figure


def plot_training(
    model: PreTrainedModel,
    fine_tuning: Sequence[Mapping[str, Any]],
    distillation: Sequence[Mapping[str, Any]],
    speed: float = 0.5,
) -> Figure:
    """
    Draw Figure 7: accuracy and FLOPs (paper count) after each epoch of fine-tuning and of self-distillation. During
    fine-tuning every text runs through all layers; afterwards at one speed.

    Args:
        model ([`FastBertForSequenceClassification`]): Its shape counts.
        fine_tuning, distillation (sequences of `dict`): `trainer.state.log_history` of the two stages.
        speed (`float`): One of the `eval_speeds` of the second stage, above 0.
    """
    if not speed > 0:
        raise ValueError(f"speed must be above 0, where texts leave early, got {speed}. Example: speed=0.5")
    key = f"eval_accuracy_speed_{speed:g}"
    # By their epochs: an evaluation after the last one repeats it.
    tuned = {entry["epoch"]: entry for entry in fine_tuning if "eval_accuracy" in entry}
    distilled = {entry["epoch"]: entry for entry in distillation if key in entry}
    if not tuned or not distilled:
        raise ValueError(
            f"the logs have no eval_accuracy after fine-tuning or no {key} after distillation: train with "
            f"eval_strategy='epoch' and eval_speeds that include {speed:g}."
        )
    num_layers, last = len(model.exits), max(tuned)
    full = paper_flops(model, torch.tensor(num_layers), students=False).item()
    # Above speed 0 a layer with its exit costs as much as the next: the mean exit layer tells the mean cost.
    layer, student = (costs[0].item() for costs in paper_costs(model))
    skipped = ((model.config.min_exit_layer or 1) - 1) * student
    epochs = [*tuned, *(last + epoch for epoch in distilled)]
    accuracy = [entry["eval_accuracy"] for entry in tuned.values()] + [entry[key] for entry in distilled.values()]
    flops = [full] * len(tuned)
    flops += [
        entry[f"eval_mean_exit_layer_speed_{speed:g}"] * (layer + student) - skipped for entry in distilled.values()
    ]
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 4.4), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        for axes, values, colour, marker in ((top, accuracy, 0, "o"), (bottom, np.array(flops) / 1e9, 1, "s")):
            axes.plot(epochs, values, color=COLOURS[colour], marker=marker)
            axes.axvspan(last + 0.5, epochs[-1] + 0.5, color="#F2F2F2", zorder=0)
            axes.set_xlim(min(epochs) - 0.5, epochs[-1] + 0.5)
        # At least five points below, so that a small loss does not look like a large one.
        top.set(ylabel="Accuracy", ylim=(max(0, min(accuracy) - 0.05), min(1, max(accuracy) + 0.02)))
        top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        top.yaxis.set_major_locator(MultipleLocator(0.02 if max(accuracy) - min(accuracy) < 0.1 else 0.1))
        bottom.set(ylabel="GFLOPs per text\n(paper count)", xlabel="Epoch")
        bottom.set_ylim(bottom=0)
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        place = {"transform": top.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 9}
        top.text((min(epochs) + last) / 2, 1.02, "fine-tuning (all layers)", **place)
        top.text((last + 1 + epochs[-1]) / 2, 1.02, f"self-distillation (speed {speed:g})", **place)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> list[Path]:
    """
    Write `path.png` and `path.svg`, each whole or not at all.

    Args:
        figure (`Figure`): From one of the functions above.
        path (`str` or `PathLike`): Without a suffix.

    Returns:
        `list[Path]`: The two files.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, options in (("png", {"dpi": 180}), ("svg", {"metadata": {"Date": None}})):
        written.append(path.with_name(f"{path.name}.{kind}"))
        _save_whole(figure, written[-1], format=kind, **options)
    return written


def save_png(figure: Figure, path: str | os.PathLike) -> None:
    """Write one PNG, whole or not at all, small enough for a model card."""
    _save_whole(figure, Path(path), format="png", dpi=120)


def _save_whole(figure: Figure, path: Path, **options) -> None:
    part = path.with_name(f".{path.name}.part")
    with rc_context(STYLE):
        figure.savefig(part, **options)
    os.replace(part, path)


def _check_number_of_speeds(speeds: Sequence[float]) -> None:
    if not 1 <= len(speeds) <= len(COLOURS):
        raise ValueError(f"give 1 to {len(COLOURS)} speeds, got {len(speeds)}.")


def _title(column: str) -> str:
    names = {"paper_speed_up": "Speed-up, paper count", "layer_speed_up": "Speed-up, layers executed"}
    return names.get(column, column.replace("_", " ").replace("speed up", "speed-up").capitalize())


def _exit_name(layer: int, num_exits: int) -> str:
    return f"teacher (layer {layer})" if layer == num_exits else f"student after layer {layer}"


def _number_layers(axes: Axes, num_exits: int) -> None:
    step = max(1, num_exits // 6)
    axes.set_xticks(range(step if step > 1 else 1, num_exits + 1, step))
    axes.set_xticklabels([str(layer) for layer in range(step if step > 1 else 1, num_exits + 1, step)])
