"""The tables of docs/results.md that compare cascades."""

from __future__ import annotations

import pandas as pd
from paper_runs import CASCADE_SETS, RIVAL_ROWS

from fastbert_hf.evaluation import at_speed_up


SPEED_UPS = (2.0, 3.0, 4.0)
NOT_YET = "not run"
CASCADES = (
    "2 + 6 layers",
    "2 + 6 layers, DAR",
    "1 + 6 layers",
    "1 + 2 + 6 layers, DAR",
    "FastBERT 2 + 6 layers, DAR",
)
BESIDE = {
    "FastBERT": ("fastbert", ""),
    "DeeBERT (mean of the tokens)": ("deebert", "mean"),
    "PABEE (mean of the tokens)": ("pabee", "mean"),
    "BERT-kL": ("bert_kl", None),
    "static student": ("distilled_kl", None),
}
SMALL = ("fine-tuned", "fine-tuned, DAR", "distilled", "distilled, DAR")


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def at_speed_ups(dev: pd.DataFrame, test: pd.DataFrame) -> list[float | None]:
    """Accuracy on test where dev executes exactly so many times fewer layers."""
    points = [at_speed_up(dev, test, speed_up) for speed_up in SPEED_UPS]
    return [point and point["accuracy"] for point in points]


def cascades(results) -> list[list[str]]:
    """A row for each set and model: accuracy at full depth and at equal speed-ups; and the averages over the sets."""
    accuracies: dict[str, dict[str, list[float | None]]] = {}
    rows = []
    for name in CASCADE_SETS:
        result = results.get(name, "cascade", 1, RIVAL_ROWS)
        dials = {label: results.dial(name, recipe, variant, 1) for label, (recipe, variant) in BESIDE.items()}
        for label in CASCADES:
            splits = result and result["cascades"][label]
            dials[f"cascade, {label}"] = splits and tuple(pd.DataFrame(splits[split]) for split in ("dev", "test"))
        for label, dial in dials.items():
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
    return rows


def cells(accuracies: list[float | None]) -> list[str]:
    return [percent(value) if value is not None else "not reached" for value in accuracies]


def regularisation(results) -> list[list[str]]:
    """The columns of the paper's Table 5 for the small member, trained in each way."""
    rows = []
    for name in CASCADE_SETS:
        result = results.get(name, "cascade", 1, RIVAL_ROWS)
        if result is None:
            rows.append([name, NOT_YET, "", "", "", ""])
            continue
        hard = percent(result["hard_shares"]["all"])
        for label in SMALL:
            values = result["small"][label]["test"]
            names = ("difficulty_inversion_score", "accuracy", "expected_calibration_error")
            rows.append([name, label, *(percent(values[name]) for name in names), hard])
    return rows
