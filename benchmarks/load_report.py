"""Writes docs/serving.md: a table for each normal speed, and a figure."""

from __future__ import annotations

import json
import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from report_cells import NOT_YET, markdown, percent

from fastbert_hf.evaluation.figures import COLOURS, STYLE, save_figure
from fastbert_hf.files import write_whole


COLUMNS = (
    "in time",
    "refused",
    "accuracy",
    "in the burst",
    "of the gap",
    "99 % within",
    "normal again after",
    "steps",
)


def table(run: dict) -> str:
    """Return what every policy gave."""
    lines = []
    for name, row in run["rows"].items():
        cells = [percent(row[key]) for key in ("in_time", "refused", "accuracy", "accuracy_in_burst", "recovered")]
        cells += [f"{1000 * row['p99']:.0f} ms", seconds(row["recovery"])] if "p99" in row else ["", ""]
        cells.append(percent(row["oscillation"]) if "oscillation" in row else "")
        lines.append([name, *cells])
    return markdown(["", *COLUMNS], lines)


def seconds(value: float) -> str:
    return "never" if value == float("inf") else f"{value:.2f} s"


def plot(found: dict) -> Figure:
    """Draw what arrives, and the accuracy and the longest wait of some policies, over time."""
    run, settings = found["runs"][-1], found["settings"]
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.0), layout="constrained")
        load, accuracy, wait = figure.subplots(3, sharex=True, height_ratios=(1, 2, 2))
        edges, start = [0.0], 0.0
        for length, _ in settings["phases"]:
            start += length
            edges.append(start)
        load.stairs([times for _, times in settings["phases"]], edges, color="#555555", fill=True, alpha=0.5)
        load.set(ylabel="times the\ncapacity")
        for (name, own), colour in zip(run["drawn"].items(), COLOURS, strict=False):
            label = name.replace("`", "")
            accuracy.plot(own["seconds"], [100 * value for value in own["accuracy"]], color=colour, label=label)
            wait.plot(own["seconds"], [1000 * value for value in own["longest_wait"]], color=colour)
        accuracy.set(ylabel="accuracy over all\nthat arrived, %", ylim=(0, 100))
        wait.axhline(1000 * settings["time_to_answer"], color="#555555", linestyle="--", linewidth=1)
        wait.set(ylabel="longest wait, ms", xlabel="seconds")
        accuracy.legend(loc="lower right")
    return figure


def write(docs_dir: Path) -> None:
    """Write the page and its figure."""
    path = docs_dir / "serving" / "load.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    template = (Path(__file__).parent / "serving_template.md").read_text(encoding="utf-8")
    parts = dict.fromkeys(re.findall(r"{{(\w+)}}", template), NOT_YET)
    if found is not None:
        settings, (full, normal) = found["settings"], found["runs"]
        parts = {
            "load_full": table(full),
            "load_normal": table(normal),
            "speed": f"{normal['speed']:g}",
            "capacity_full": f"{full['tokens_per_second']:,.0f}",
            "capacity_normal": f"{normal['tokens_per_second']:,.0f}",
            "settings": (
                f"{settings['processor']}, {settings['instructions']}, one thread: "
                f"{1000 * settings['seconds_per_batch']:.1f} ms for a batch and "
                f"{1e6 * settings['seconds_per_token']:.1f} µs for each token at speed 0"
            ),
            "recovered_full": percent(full["rows"]["`LoadControl`"]["recovered"]),
            "recovered_normal": percent(normal["rows"]["`LoadControl`"]["recovered"]),
            "time_to_answer": f"{1000 * settings['time_to_answer']:g}",
            "seeds": str(settings["seeds"]),
        }
        save_figure(plot(found), docs_dir / "figures" / "load")
    for name, text in parts.items():
        template = template.replace("{{" + name + "}}", text)
    write_whole(docs_dir / "serving.md", template)
