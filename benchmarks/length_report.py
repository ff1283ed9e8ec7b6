"""The part "Length" of docs/results.md: tables and a figure from the numbers of length_tables.py."""

from __future__ import annotations

import frontiers
import length_frontier
import length_runs
from matplotlib.figure import Figure
from report_cells import NOT_YET, markdown, percent


TITLES = {
    "drop": "**dropped** (PoWER-BERT)",
    "mean": "**one coarse token**, mean (FCA)",
    "weighted": "one coarse token, by attention (FCA)",
    "searched": "dropped, schedule searched for",
    "random": "random ones kept",
    "first": "the first ones kept",
    "truncate": "the text is cut",
}


def ratios_table(results: dict[str, dict]) -> str:
    """Return accuracy on test after distillation, for every set, kind and ratio that was run."""
    lines = []
    for name in length_runs.SETS:
        full = results.get(f"{name}-full")
        if full is None:
            continue
        tokens = full["tokens"]["test"]
        lines.append([name, f"all {tokens:.0f} tokens", percent(full["distilled"]["test"]["accuracy"]), "", ""])
        for kind in TITLES:
            cells = [cell(results, length_runs.LengthRun(name, kind, ratio)) for ratio in length_runs.RATIOS]
            if any(cells):
                lines.append([name, TITLES[kind], *cells])
    header = ["data set", "tokens", *(f"{ratio:g}x" for ratio in length_runs.RATIOS)]
    return markdown(header, lines) if lines else NOT_YET


def cell(results: dict[str, dict], run: length_runs.LengthRun) -> str:
    """Return the accuracy of a run, and what it lost."""
    if run.name not in results:
        return ""
    return f"{percent(results[run.name]['distilled']['test']['accuracy'])} ({points(lost(results, run))})"


def lost(results: dict[str, dict], run: length_runs.LengthRun) -> float | None:
    """Return what a run lost on test against the full model, `None` if one of them is not there."""
    own, full = results.get(run.name), results.get(f"{run.set}-full")
    if own is None or full is None:
        return None
    return full["distilled"]["test"]["accuracy"] - own["distilled"]["test"]["accuracy"]


def points(value: float | None) -> str:
    return NOT_YET if value is None else f"{round(100 * value, 1) + 0.0:.1f}"  # never -0.0


def frontier_of(results: dict[str, dict]) -> dict[str, dict]:
    """Return the sweeps by the name of their model, if that of the full one is there."""
    names = [name for name in length_frontier.MODELS if f"frontier-{name}" in results]
    return {name: results[f"frontier-{name}"] for name in names} if "full" in names else {}


def title_of(name: str) -> str:
    kind, _, ratio = name.partition("-")
    return "exits alone" if name == "full" else f"{ratio}, {TITLES[kind].replace('**', '')}; with exits"


def frontier_table(results: dict[str, dict]) -> str:
    """Return what shorter texts, exits and both give where test or dev loses at most so much."""
    sweeps = frontier_of(results)
    if not sweeps:
        return NOT_YET
    titles, times = {name: title_of(name) for name in sweeps}, results.get("times", {}).get("rows", [])
    return markdown(frontiers.header(), frontiers.rows(sweeps["full"], sweeps, titles, times))


def plot_frontier(results: dict[str, dict]) -> Figure | None:
    """Draw accuracy on test over executed FLOPs, a line for each length."""
    sweeps = frontier_of(results)
    if not sweeps:
        return None
    return frontiers.plot(sweeps["full"], sweeps, {name: title_of(name) for name in sweeps}, "all layers and tokens")


def parts(results: dict[str, dict]) -> dict[str, str]:
    """Return what the template of results.md takes from here."""
    return {"length_ratios": ratios_table(results), "length_frontier": frontier_table(results), **numbers(results)}


def numbers(results: dict[str, dict]) -> dict[str, str]:
    """Return the numbers inside the sentences, by the names that they have in the template."""
    found = {}
    for name in length_runs.SETS:
        short = name.replace("-", "_")
        for kind in TITLES:
            for ratio in length_runs.RATIOS:
                part = f"{ratio:g}".replace(".", "_")
                found[f"lost_{short}_{kind}_{part}"] = points(lost(results, length_runs.LengthRun(name, kind, ratio)))
    for part, name in (("length_steps", "imdb-512"), ("length_other_steps", "sst2")):
        run = results.get(length_runs.LengthRun(name, "drop", 2.0).name)
        found[part] = NOT_YET if run is None else str(run["settings"]["steps"])
    sweeps, taken = frontier_of(results), results.get("times")
    allowed = frontiers.LOST[0]
    for name in length_frontier.MODELS:
        part = name.replace("-", "_")
        point = frontiers.cheapest(sweeps["full"], sweeps[name], allowed, "test") if name in sweeps else None
        found[f"length_frontier_{part}"] = NOT_YET if point is None else f"{point['speed_up']:.1f}x"
        rows = [] if taken is None else taken["rows"]
        at_full = [row["ratio"] for row in rows if row["model"] == name and row.get("part") is None]
        found[f"length_time_{part}"] = f"{at_full[0]:.2f}x" if at_full else NOT_YET
    alone = [sweep for name, sweep in sweeps.items() if name == "full"]
    both = [sweep for name, sweep in sweeps.items() if name != "full"]
    gained = frontiers.gain(sweeps["full"], alone, both, allowed) if sweeps else None
    found["length_gain"] = NOT_YET if gained is None else f"{gained:.2f}"
    found["length_machine"] = NOT_YET if taken is None else f"{taken['threads']} threads, {taken['processor']}"
    return found
