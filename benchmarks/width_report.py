"""The part "Width" of docs/results.md: tables and a figure from the numbers of width_tables.py."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import frontiers
import width_frontier
import width_runs
from matplotlib.figure import Figure
from report_cells import NOT_YET, markdown, percent


TITLES = {
    "tree": "**tree**",
    "dense": "dense, as many neurons",
    "random": "tree, random routing",
    "top_k": "each token's top neurons (computes all)",
    "1x11": "one tree of neurons, 1x11",
    "deleted": "layer deleted, bias only",
}

# Of the models of the frontier: there are as many lines as colours.
NOT_DRAWN = ("random-0.25", "top_k-0.25", "deleted")


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
    sweeps = {name: results[f"frontier-{name}"] for name in width_frontier.MODELS if f"frontier-{name}" in results}
    return sweeps if "dense" in sweeps else {}


def frontier_table(results: dict[str, dict]) -> str:
    """Return what narrow layers, exits and both give where dev loses at most so much."""
    sweeps = frontier_of(results)
    if not sweeps:
        return NOT_YET
    times = results.get("times", {}).get("rows", [])
    return markdown(frontiers.header(), frontiers.rows(sweeps["dense"], sweeps, titles_of(sweeps), times))


def titles_of(sweeps: dict[str, dict]) -> dict[str, str]:
    return {name: title_of(name) for name in sweeps}


def title_of(name: str) -> str:
    kind, share = width_frontier.MODELS[name]
    if kind == "full":
        return "exits alone" if name == "dense" else "exits alone, trained on"
    of = f"{100 * share:g} % of the neurons"
    titles = {
        "tree": f"a tree with {of}, with exits",
        "dense": f"a dense layer of {of}, with exits",
        "random": f"a tree with {of}, random routing, with exits",
        "top_k": f"each token's top {100 * share:g} % of the neurons, with exits",
        "deleted": "no feed-forward layer, with exits",
    }
    return titles[kind]


def plot_frontier(results: dict[str, dict]) -> Figure | None:
    """Draw accuracy on test over executed FLOPs, a line for each width."""
    sweeps = frontier_of(results)
    if not sweeps:
        return None
    drawn = {name: sweep for name, sweep in sweeps.items() if name not in NOT_DRAWN}
    return frontiers.plot(sweeps["dense"], drawn, titles_of(drawn), "all layers and neurons")


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
    for share in (0.25, 0.125):
        found[f"lost_untrained_{1 / share:g}"] = _points(lost(results, "tree", share, "converted"))
    settings = next((result["settings"] for result in results.values() if "log" in result), None)
    found["width_steps"] = NOT_YET if settings is None else str(settings["steps"])
    sweeps, taken = frontier_of(results), results.get("times")
    found["frontier_steps"] = str(sweeps["0.25"]["steps"]) if "0.25" in sweeps else NOT_YET
    found["frontier_machine"] = NOT_YET if taken is None else f"{taken['threads']} threads, {taken['processor']}"
    allowed = frontiers.LOST[0]
    points = {name: frontiers.cheapest(sweeps["dense"], sweeps[name], allowed, "test") for name in sweeps}
    names = {
        **{"dense": "dense", "1": "1", "0.25": "4", "0.125": "8", "deleted": "deleted"},
        **{"narrow-0.25": "dense_4", "narrow-0.125": "dense_8", "random-0.25": "random_4", "random-0.125": "random_8"},
        **{"top_k-0.25": "top_k_4", "top_k-0.125": "top_k_8"},
    }
    for name, part in names.items():
        there = "nothing that loses so little" if name in sweeps else NOT_YET
        found[f"frontier_{part}"] = f"{points[name]['speed_up']:.1f}x" if points.get(name) else there
    alone = [sweeps[name] for name in sweeps if name in ("dense", "1")]
    both = [sweeps[name] for name in sweeps if name in ("0.25", "0.125")]
    gained = frontiers.gain(sweeps["dense"], alone, both, allowed) if sweeps else None
    found["frontier_gain"] = NOT_YET if gained is None else f"{gained:.2f}"
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
