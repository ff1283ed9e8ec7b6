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


def server_parts(found: dict) -> dict[str, str]:
    """Return what the page says of the server."""
    settings, rates = found["settings"], list(next(iter(found["loads"].values())))
    header = ["in time (accuracy), of so many a second", *rates]
    lines = [
        [side, *(f"{row['in_time_per_second']:.0f} ({percent(row['accuracy_over_all'])})" for row in rows.values())]
        for side, rows in found["loads"].items()
    ]
    waits = [
        [side, *(f"{1000 * row['p50']:.0f} / {1000 * row['p99']:.0f}" for row in rows.values())]
        for side, rows in found["loads"].items()
    ]
    loads = f"{markdown(header, lines)}\n\n{markdown(['half / 99 % within, ms', *rates], waits)}"
    most = {side: max(row["in_time_per_second"] for row in rows.values()) for side, rows in found["loads"].items()}
    follows, stock = most["speed follows the load"], most["stock pipeline in Ray Serve"]
    answered, same = (sum(run[key] for run in found["equal"]) for key in ("answered", "same"))
    ours = ("speed follows the load", "the model's own speed", "speed 0")
    lost = sum(row["lost"] for side in ours for row in found["loads"][side].values())
    alone = ", ".join(f"{rate:.0f} at {name}" for name, rate in found["pipeline"].items())
    own = most["the model's own speed"]
    findings = (
        f"At most {follows:.0f} texts a second are in time where the speed follows the load, {own:.0f} at the model's "
        f"own speed, {most['speed 0']:.0f} at speed 0 and {stock:.0f} from the stock pipeline: {follows / stock:.1f} "
        "times as many. The pipeline by itself, one process and one thread on sentences that are all there, answers "
        f"{alone}. Of {answered:,} answers at the model's own speed, {same:,} are those of the pipeline, exit layer "
        f"and score (to 0.00001). Requests to it that were lost or answered twice: {lost}. What is left of the two "
        "cores goes to HTTP, the queue, Ray and the clients."
    )
    events = []
    for name, row in found["events"].items():
        refused = row["refused"] * row["offered"]
        events.append(f"| {name} | {row['offered']:,} | {row['lost']} | {refused:.0f} | {1000 * row['p99']:.0f} ms |")
    return {
        "server_settings": f"the package's own model on {settings['processor']}, {settings['instructions']}",
        "server_slo": f"{settings['slo_ms']:g}",
        "server_loads": loads,
        "server_findings": findings,
        "server_events": "\n".join(events),
    }


def score_parts(found: dict) -> dict[str, str]:
    """Return what the page says of files."""
    settings, memory = found["settings"], found["memory"]
    rows = "; ".join(f"{run['mib_of_a_process']:,} MiB for {run['rows']:,} rows" for run in memory)
    largest = memory[-1]
    return {
        "score_settings": f"{settings['processor']}, {settings['instructions']}",
        "score_rates": f"{found['rows_per_second']['1']:,.0f} and {found['rows_per_second']['2']:,.0f} rows a second",
        "score_ratio": f"{found['ratio']:.2f}",
        "score_memory": rows,
        "score_rows": (
            f"{largest['rows']:,} rows were {largest['answered']:,} answers and {largest['rejected']:,} rejected, "
            f"{'each' if largest['each_row_once'] else 'NOT each'} there once"
        ),
    }


def found_in(path: Path) -> dict | None:
    """Return what was measured, or `None` where nothing was."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write(docs_dir: Path) -> None:
    """Write the page and its figure."""
    found, server, score = (found_in(docs_dir / "serving" / f"{name}.json") for name in ("load", "server", "score"))
    template = (Path(__file__).parent / "serving_template.md").read_text(encoding="utf-8")
    parts = dict.fromkeys(re.findall(r"{{(\w+)}}", template), NOT_YET)
    if found is not None:
        settings, (full, normal) = found["settings"], found["runs"]
        parts |= {
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
    if server is not None:
        parts |= server_parts(server)
    if score is not None:
        parts |= score_parts(score)
    for name, text in parts.items():
        template = template.replace("{{" + name + "}}", text)
    write_whole(docs_dir / "serving.md", template)
