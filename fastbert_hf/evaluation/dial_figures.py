"""Figures of what `calibrate` and `certify` promise: the dial with its certificates, and reliability diagrams."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from transformers import PreTrainedConfig

from .figures import COLOURS, MARKERS, STYLE
from .reliability_tables import reliability_error


def plot_reliability(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """
    Draw what uncertainties mean: the share of answers that differ from the full model's, over the mean uncertainty of
    each bin. On the dashed line, an uncertainty is the probability that an answer differs.

    Args:
        tables (mapping of `str` to `pandas.DataFrame`): The name of each policy and its [`reliability`] table.
    """
    if not tables or len(tables) > len(COLOURS):
        raise ValueError(f"give 1 to {len(COLOURS)} tables, got {len(tables)}.")
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
        for index, (name, table) in enumerate(tables.items()):
            label = f"{name} (off by {100 * reliability_error(table):.1f} points)"
            line = {"color": COLOURS[index], "marker": MARKERS[index], "label": label, "clip_on": False}
            axes.plot(table["uncertainty"], table["differs"], **line)
        axes.set(xlabel="Uncertainty", ylabel="Answers that differ from the full model's", xlim=(0, 1), ylim=(0, 1))
        axes.set_title("What an uncertainty means")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        figure.legend(loc="outside lower center", ncols=1)
    return figure


def plot_dial(config: PreTrainedConfig, risks: Mapping[float, float]) -> Figure:
    """
    Draw a calibrated model's dial: how many times less each speed costs, with the certified points marked.

    Args:
        config ([`FastBertConfig`] or [`CascadeConfig`]): Of a calibrated model.
        risks (mapping of `float` to `float`): By the share of answers that may differ, the certified speed-up.
    """
    calibration = config.calibration
    if calibration is None:
        raise ValueError("this model was not calibrated: fastbert_hf.calibrate(model, texts, tokenizer)")
    speeds, speed_ups = calibration["speeds"], calibration["speed_ups"]
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.plot(speed_ups, speeds, color=COLOURS[0])
        for index, (risk, speed_up) in enumerate(sorted(risks.items()), start=1):
            label = f"at most {100 * risk:g} % differ: {speed_up:.2f}×"
            axes.axvline(speed_up, color=COLOURS[index], linestyle=("--", ":", "-.")[index % 3], label=label)
        unit = "executed FLOPs" if calibration["unit"] == "flops" else "layers"
        axes.set(xlabel=f"Times fewer {unit}", ylabel=f"Threshold ({config.exit_policy})", title="The dial")
        axes.set_xlim(left=1)
        axes.set_ylim(0, 1.02)
        if risks:
            axes.legend(title="Certified with confidence 0.9")
    return figure
