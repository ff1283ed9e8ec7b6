"""Markdown tables of what rivals.py measured."""

from __future__ import annotations

import json
from pathlib import Path


COLUMNS = {
    "side": "side",
    "batch_size": "batch size",
    "ratio": "times the stock pipeline",
    "texts_per_second": "texts a second",
    "accuracy": "accuracy (%)",
    "agreement": "as float32 (%)",
    "batch_difference": "changed by batch-mates",
    "mean_exit_layer": "layers",
}


def table(path: Path) -> str:
    """Return the table of one comparison, fastest side first, and what failed."""
    measured = json.loads(Path(path).read_text(encoding="utf-8"))
    settings, result = measured["settings"], measured["result"]
    rows = sorted(result["rows"], key=lambda row: -row["ratio"])
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = [
        f"{settings['what'][0].upper()}{settings['what'][1:]}. {settings['instructions']}, threads: "
        f"{settings['threads']}, texts: {result['timed_texts']}, turns: {settings['repeats']}.",
        "",
        "| " + " | ".join(COLUMNS[key] for key in keys) + " |",
        "|" + " --- |" * len(keys),
    ]
    lines += ["| " + " | ".join(cell(key, row) for key in keys) + " |" for row in rows]
    lines += [f"\nNot measured: {name} ({why.splitlines()[0]})" for name, why in result["failed"].items()]
    return "\n".join(lines) + "\n"


def cell(key: str, row: dict) -> str:
    """Return a cell of a row, empty where there is no number."""
    value = row.get(key)
    if value is None:
        return ""
    if key == "ratio":
        return f"{value:.2f} ({row['least']:.2f} to {row['greatest']:.2f})"
    if key == "side":
        return f"{value} (speed {row['speed']:.3g})" if row.get("speed") else value
    digits = {"batch_difference": ".1e", "mean_exit_layer": ".2f", "batch_size": "d"}
    return format(value, digits.get(key, ".1f"))


def tables(folder: Path) -> str:
    """Return the tables of all comparisons in a folder."""
    return "\n".join(table(path) for path in sorted(Path(folder).glob("rivals_*.json")))
