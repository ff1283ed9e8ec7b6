"""Write the tables of docs/results.md that compare cascades."""

from __future__ import annotations

from statistics import mean

import pandas as pd
from cascade_runs import CASCADES
from paper_runs import BASELINE_ROWS, CASCADE_SETS
from report_cells import NOT_YET, markdown, percent, spread

from fastbert_hf.evaluation import at_speed_up


SPEED_UPS = (2.0, 3.0, 4.0)
# What cascades are compared with: recipe and variant.
BASELINES = {
    "FastBERT": ("fastbert", ""),
    "DeeBERT (mean of the tokens)": ("deebert", "mean"),
    "PABEE (mean of the tokens)": ("pabee", "mean"),
    "BERT-kL": ("bert_kl", None),
    "static student": ("distilled_kl", None),
}
# The columns of the paper's Table 5.
CALIBRATION = ("difficulty_inversion_score", "accuracy", "expected_calibration_error")


def at_speed_ups(dev: pd.DataFrame, test: pd.DataFrame) -> list[float | None]:
    """Return the accuracy on test where dev executes exactly so many times fewer layers."""
    points = [at_speed_up(dev, test, speed_up) for speed_up in SPEED_UPS]
    return [point and point["accuracy"] for point in points]


def dials_of(results, name: str) -> dict[str, tuple[pd.DataFrame, pd.DataFrame] | None]:
    """Return the settings of each model on dev and on test of a set, `None` where it was not run."""
    dials = {label: results.dial(name, recipe, variant, 1) for label, (recipe, variant) in BASELINES.items()}
    result = results.get(name, "cascade", 1, BASELINE_ROWS)
    for label in CASCADES:
        splits = result and result["cascades"][label]
        dials[f"cascade, {label}"] = splits and tuple(pd.DataFrame(splits[split]) for split in ("dev", "test"))
    return dials


def cascades(results) -> str:
    """Compare the accuracy of each model at full depth and at equal speed-ups, on each set and on average."""
    accuracies: dict[str, dict[str, list[float | None]]] = {}
    rows = []
    for name in CASCADE_SETS:
        for label, dial in dials_of(results, name).items():
            if dial is None:
                rows.append([name, label, NOT_YET, *[""] * len(SPEED_UPS)])
                continue
            reached = at_speed_ups(*dial)
            accuracies.setdefault(label, {})[name] = reached
            full = dial[1].loc[dial[1]["layer_speed_up"].sub(1).abs().idxmin(), "accuracy"]
            rows.append([name, label, percent(full), *cells(reached)])
    complete = [name for name in CASCADE_SETS if all(name in of_set for of_set in accuracies.values())]
    if len(complete) > 1:
        for label, of_set in accuracies.items():
            columns = zip(*(of_set[name] for name in complete), strict=True)
            means = [None if None in column else sum(column) / len(column) for column in columns]
            rows.append([f"mean of {len(complete)}", label, "", *cells(means)])
    return markdown(["data set", "model", "full depth", *(f"{speed_up:g}x" for speed_up in SPEED_UPS)], rows)


def cells(accuracies: list[float | None]) -> list[str]:
    return [percent(value) if value is not None else "not reached" for value in accuracies]


def regularisation(results) -> str:
    """Compare the small member of each set without the regularisation and with each margin."""
    rows = []
    for name in CASCADE_SETS:
        result = results.get(name, "regularisation", 1, BASELINE_ROWS)
        if result is None:
            rows.append([name, "fine-tuned", NOT_YET, *[""] * (2 + len(CALIBRATION))])
        for case in result["cases"] if result else ():
            margin = "without" if case["margin"] is None else f"{case['margin']:g}"
            if case["margin"] == chosen_margin(result):
                margin += " (dev)"
            rows.append([name, "fine-tuned", margin, *calibration(case["trainings"])])
        result = results.get(name, "cascade", 1, BASELINE_ROWS)
        if result is not None:
            margin = f"{result['settings']['difficulty_margin']:g}"
            for label, member in (("without", "distilled"), (margin, "distilled, DAR")):
                rows.append([name, "distilled", label, *calibration([result["small"][member]])])
    header = ["data set", "small member", "margin", "trainings", "DIS on dev", "DIS on test", "accuracy", "ECE"]
    return markdown(header, rows)


def calibration(trainings: list[dict[str, dict[str, float]]]) -> list[str]:
    on_dev = spread([values["dev"][CALIBRATION[0]] for values in trainings])
    on_test = [spread([values["test"][column] for values in trainings]) for column in CALIBRATION]
    return [str(len(trainings)), on_dev, *on_test]


def chosen_margin(result: dict) -> float:
    """Return the margin with the highest DIS on dev."""
    cases = [case for case in result["cases"] if case["margin"] is not None]
    return max(cases, key=lambda case: mean(part["dev"][CALIBRATION[0]] for part in case["trainings"]))["margin"]


def times(results) -> str:
    """Compare the wall-clock speed-up of trained cascades with that in layers executed."""
    rows = []
    for name in CASCADE_SETS:
        result = results.get(name, "cascade_times", 1, BASELINE_ROWS)
        if result is None:
            rows.append([name, NOT_YET, *[""] * 4])
            continue
        for label, points in result["times"].items():
            for point in points:
                layers, median = point["layer_speed_up"], point["time_speed_up"]
                span = f"{point['time_speed_up_min']:.2f} to {point['time_speed_up_max']:.2f}"
                cells = [f"{point['speed']:g}", f"{layers:.2f}x", f"{median:.2f}x ({span})", f"{median / layers:.2f}"]
                rows.append([name, label, *cells])
    return markdown(["data set", "cascade", "speed", "in layers", "in time", "time / layers"], rows)
