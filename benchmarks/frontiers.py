"""Accuracy over what it costs, of several models with exits: the cheapest point that loses little, table, figure."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from report_cells import percent

from fastbert_hf.evaluation.figures import COLOURS, MARKERS, STYLE


# Of the accuracy of the full model at full depth.
LOST = (0.005, 0.01)


def cheapest(full: dict, sweep: dict, lost: float, part: str = "dev") -> dict[str, float] | None:
    """
    Return the cheapest speed of a model that loses at most so much on dev, or on test, against the full model at full
    depth, with its numbers on test: what it loses, and how many times fewer FLOPs it executes.
    """
    whole = {of: pd.DataFrame(full[of]).iloc[0] for of in ("dev", "test")}
    table, test = pd.DataFrame(sweep[part]), pd.DataFrame(sweep["test"])
    allowed = table[table["accuracy"] >= whole[part]["accuracy"] - lost - 1e-9]
    if allowed.empty:
        return None
    row = test.loc[allowed["executed_flops"].idxmin()]
    speed_up = whole["test"]["executed_flops"] / row["executed_flops"]
    return {"speed": row["speed"], "speed_up": speed_up, "lost": whole["test"]["accuracy"] - row["accuracy"]}


def gain(full: dict, alone: list[dict], both: list[dict], lost: float) -> float | None:
    """Return how many times fewer FLOPs the best of `both` executes than that of `alone`, losing so much on test."""
    best = []
    for sweeps in (alone, both):
        points = [cheapest(full, sweep, lost, "test") for sweep in sweeps]
        best.append(max((point["speed_up"] for point in points if point), default=None))
    return None if None in best else best[1] / best[0]


def rows(full: dict, sweeps: Mapping[str, dict], titles: Mapping[str, str], times: list[dict]) -> list[list[str]]:
    """
    Return what each model gives at full depth and where test, or dev, loses at most so much.

    Args:
        full (`dict`): The sweep of the full model.
        sweeps (`Mapping`): Those of all models, by their names.
        titles (`Mapping`): What the names mean.
        times (`list` of `dict`): With `model`, `part`, `allowed` and `ratio`, as far as times were taken.
    """
    ratios = {(row["model"], row.get("part"), row.get("allowed")): row["ratio"] for row in times}
    flops, lines = full["test"]["executed_flops"][0], []
    for name, sweep in sweeps.items():
        own = pd.DataFrame(sweep["test"]).iloc[0]
        cells = [titles[name], percent(own["accuracy"])]
        cells.append(cell(flops / own["executed_flops"], ratios.get((name, None, None))))
        for part in ("test", "dev"):
            for allowed in LOST:
                point = cheapest(full, sweep, allowed, part)
                if point is None:
                    cells.append("none loses so little")
                    continue
                lost_there = "" if part == "test" else f", {round(100 * point['lost'], 1) + 0.0:.1f} lost"
                cells.append(cell(point["speed_up"], ratios.get((name, part, allowed))) + lost_there)
        lines.append(cells)
    return lines


def header() -> list[str]:
    """Return the names of the columns of `rows`."""
    names = ["", "accuracy", "at full depth"]
    names += [f"{100 * allowed:g} points lost on test" for allowed in LOST]
    return names + [f"chosen on dev for {100 * allowed:g} points lost" for allowed in LOST]


def cell(flops: float, time: float | None) -> str:
    """Return a speed-up in FLOPs, and in time where it was measured."""
    return f"{flops:.2f}x" + ("" if time is None else f" ({time:.2f}x)")


def plot(full: dict, sweeps: Mapping[str, dict], titles: Mapping[str, str], what: str) -> Figure:
    """Draw accuracy on test over executed FLOPs, a line for each model. `what` is what the full model has."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        whole = pd.DataFrame(full["test"]).iloc[0]
        for (name, sweep), colour, marker in zip(
            sweeps.items(), COLOURS[: len(sweeps)], MARKERS[: len(sweeps)], strict=True
        ):
            table = pd.DataFrame(sweep["test"])
            speed_ups = whole["executed_flops"] / table["executed_flops"]
            axes.plot(speed_ups, 100 * table["accuracy"], color=colour, label=titles[name])
            axes.plot(speed_ups[:1], 100 * table["accuracy"][:1], marker, color=colour, markersize=8)
        axes.set(xscale="log", xlabel=f"times fewer FLOPs than {what}", ylabel="accuracy on test, %")
        axes.set_xticks([1, 2, 3, 4, 6, 8, 12, 16], ["1", "2", "3", "4", "6", "8", "12", "16"])
        axes.minorticks_off()
        axes.set_ylim(bottom=100 * whole["accuracy"] - 8)
        axes.legend(loc="lower left")
    return figure
