"""The part "Width" of docs/results.md: tables and a figure from the numbers of width_tables.py."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pandas as pd
import width_frontier
import width_runs
from matplotlib import rc_context
from matplotlib.figure import Figure
from report_cells import NOT_YET, markdown, percent

from fastbert_hf.evaluation.figures import COLOURS, MARKERS, STYLE


TITLES = {
    "tree": "**tree**",
    "dense": "dense, as many neurons",
    "random": "tree, random routing",
    "top_k": "each token's top neurons (computes all)",
    "1x11": "one tree of neurons, 1x11",
    "deleted": "layer deleted, bias only",
}


def load(folder: Path) -> dict[str, dict]:
    """Return the numbers of every finished run by its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def rows_of_shares() -> list[tuple[float, str]]:
    pairs = [(share, kind) for share in width_runs.SHARES for kind in width_runs.KINDS]
    return [*pairs, (width_runs.LONG_PATH, "1x11"), (width_runs.LONG_PATH, "dense"), (0.0, "deleted")]


def lost(results: dict[str, dict], kind: str, share: float, when: str, column: str = "accuracy") -> list[float | None]:
    """Return, for each set, the points lost on test against the full model; of agreement, what is not equal."""
    found = []
    for name in width_runs.SETS:
        result, full = results.get(width_runs.WidthRun(name, kind, share).name), results.get(f"{name}-full")
        if result is None or full is None:
            found.append(None)
        else:
            found.append(full["distilled"]["test"][column] - result[when]["test"][column])
    return found


def shares_table(results: dict[str, dict]) -> str:
    """Return accuracy on test after conversion and after distillation, for every share and kind."""
    full = [results.get(f"{name}-full") for name in width_runs.SETS]
    of_full = [NOT_YET if of is None else percent(of["distilled"]["test"]["accuracy"]) for of in full]
    lines = [["100 %", "the dense model", *of_full, "", "", ""]]
    for share, kind in rows_of_shares():
        # Beyond an eighth of the neurons, where all are near the full model, some controls may be left out.
        if share > 0.125 and kind in width_runs.KINDS[2:] and None in lost(results, kind, share, "distilled"):
            continue
        cells = [f"{100 * share:.3g} %", TITLES[kind]]
        for name in width_runs.SETS:
            result = results.get(width_runs.WidthRun(name, kind, share).name)
            both = [] if result is None else [result[when]["test"]["accuracy"] for when in ("converted", "distilled")]
            cells.append(" → ".join(map(percent, both)) or NOT_YET)
        for when, column in (("converted", "accuracy"), ("distilled", "accuracy"), ("distilled", "agreement")):
            values = lost(results, kind, share, when, column)
            if None in values:
                cells.append(NOT_YET)
            else:
                cells.append(percent(1 - mean(values)) if column == "agreement" else _points(values))
        lines.append(cells)
    header = ["neurons", "kind", *width_runs.SETS, "lost after conversion", "lost after distillation", "agreement"]
    return markdown(header, lines)


def frontier_of(results: dict[str, dict]) -> dict[str, dict]:
    """Return the sweeps by the name of their model, if that of the dense one is there."""
    sweeps = {
        width_frontier.name_of(share): results[f"frontier-{width_frontier.name_of(share)}"]
        for share in width_frontier.SHARES
        if f"frontier-{width_frontier.name_of(share)}" in results
    }
    return sweeps if "dense" in sweeps else {}


def frontier_table(results: dict[str, dict]) -> str:
    """Return what narrow layers, exits and both give where dev loses at most so much."""
    sweeps = frontier_of(results)
    rows = results.get("times", {}).get("rows", [])
    times = {(row["model"], row.get("part"), row.get("allowed")): row for row in rows}
    full = pd.DataFrame(sweeps["dense"]["test"]).iloc[0] if sweeps else None
    lines = []
    for name, sweep in sweeps.items():
        own = pd.DataFrame(sweep["test"]).iloc[0]
        cells = [title_of(sweep["share"]), percent(own["accuracy"])]
        cells.append(cell(full["executed_flops"] / own["executed_flops"], times.get((name, None, None))))
        for part in ("test", "dev"):
            for allowed in width_frontier.LOST:
                point = width_frontier.cheapest(sweeps, name, allowed, part)
                if point is None:
                    cells.append("none loses so little")
                    continue
                lost_there = "" if part == "test" else f", {_points([point['lost']])} lost"
                cells.append(cell(point["speed_up"], times.get((name, part, allowed))) + lost_there)
        lines.append(cells)
    header = ["", "accuracy", "at full depth"]
    header += [f"{100 * allowed:g} points lost on test" for allowed in width_frontier.LOST]
    header += [f"chosen on dev for {100 * allowed:g} points lost" for allowed in width_frontier.LOST]
    return markdown(header, lines) if lines else NOT_YET


def title_of(share: float | None) -> str:
    if share is None:
        return "exits alone"
    return "exits alone, trained on" if share == 1 else f"{100 * share:g} % of the neurons, with exits"


def cell(flops: float, measured: dict | None) -> str:
    """Return a speed-up in FLOPs, and in time where it was measured."""
    return f"{flops:.2f}x" + ("" if measured is None else f" ({measured['ratio']:.2f}x)")


def plot_frontier(results: dict[str, dict]) -> Figure | None:
    """Draw accuracy on test over executed FLOPs, a line for each width."""
    sweeps = frontier_of(results)
    if not sweeps:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        full = pd.DataFrame(sweeps["dense"]["test"]).iloc[0]
        for sweep, colour, marker in zip(sweeps.values(), COLOURS, MARKERS, strict=False):
            table = pd.DataFrame(sweep["test"])
            speed_ups = full["executed_flops"] / table["executed_flops"]
            axes.plot(speed_ups, 100 * table["accuracy"], color=colour, label=title_of(sweep["share"]))
            axes.plot(speed_ups[:1], 100 * table["accuracy"][:1], marker, color=colour, markersize=8)
        axes.set(xscale="log", xlabel="times fewer FLOPs than all layers and neurons", ylabel="accuracy on test, %")
        axes.set_xticks([1, 2, 3, 4, 6, 8, 12, 16], ["1", "2", "3", "4", "6", "8", "12", "16"])
        axes.minorticks_off()
        axes.set_ylim(bottom=100 * full["accuracy"] - 8)
        axes.legend(loc="lower left")
    return figure


def parts(results: dict[str, dict]) -> dict[str, str]:
    """Return what the template of results.md takes from here."""
    return {"width_shares": shares_table(results), "width_frontier": frontier_table(results), **numbers(results)}


def numbers(results: dict[str, dict]) -> dict[str, str]:
    """Return the numbers inside the sentences, by the names that they have in the template."""
    found = {}
    for kind in ("tree", "dense", "random", "top_k"):
        for share in width_runs.SHARES:
            found[f"lost_{kind}_{1 / share:g}"] = _points(lost(results, kind, share, "distilled"))
    found["lost_1x11"] = _points(lost(results, "1x11", width_runs.LONG_PATH, "distilled"))
    found["lost_12"] = _points(lost(results, "dense", width_runs.LONG_PATH, "distilled"))
    found["lost_deleted"] = _points(lost(results, "deleted", 0.0, "distilled"))
    found["lost_untrained"] = _points(lost(results, "tree", 0.125, "converted"))
    found["lost_dense_untrained"] = _points(lost(results, "dense", 0.125, "converted"))
    settings = next((result["settings"] for result in results.values() if "log" in result), None)
    found["width_steps"] = NOT_YET if settings is None else str(settings["steps"])
    sweeps, taken = frontier_of(results), results.get("times")
    found["frontier_steps"] = str(sweeps["0.25"]["steps"]) if "0.25" in sweeps else NOT_YET
    found["frontier_machine"] = NOT_YET if taken is None else f"{taken['threads']} threads, {taken['processor']}"
    allowed = width_frontier.LOST[0]
    points = {name: width_frontier.cheapest(sweeps, name, allowed, "test") for name in sweeps}
    names = {
        width_frontier.name_of(share): "dense" if share is None else f"{1 / share:g}"
        for share in width_frontier.SHARES
    }
    for name, part in names.items():
        found[f"frontier_{part}"] = f"{points[name]['speed_up']:.1f}x" if points.get(name) else NOT_YET
    speed_ups = {name: point["speed_up"] for name, point in points.items() if point}
    alone = [speed_ups[name] for name in speed_ups if name in ("dense", "1")]
    both = [speed_ups[name] for name in speed_ups if name not in ("dense", "1")]
    found["frontier_gain"] = f"{max(both) / max(alone):.2f}" if alone and both else NOT_YET
    taken = {
        row["model"]: row["ratio"]
        for row in results.get("times", {}).get("rows", [])
        if (row.get("part"), row.get("allowed")) == ("test", allowed)
    }
    for name, part in names.items():
        found[f"frontier_time_{part}"] = f"{taken[name]:.1f}x" if name in taken else NOT_YET
    return found


def _points(values: list[float | None]) -> str:
    """Return the mean in points, where every set was run."""
    return NOT_YET if None in values else f"{round(100 * mean(values), 1) + 0.0:.1f}"  # never -0.0
