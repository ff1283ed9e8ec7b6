"""The part "Tasks" of docs/results.md: tables from the numbers of task_tables.py."""

from __future__ import annotations

import json
from pathlib import Path

from report_cells import NOT_YET, markdown


TITLES = {
    "entities": ("label per token", "conll2003_ner", "entity F1"),
    "kinds_of_entities": ("several labels", "conll2003_ner, kinds of entities in a sentence", "micro F1"),
    "likeness": ("regression", "qqp_10k, likeness of the questions", "explained variance (R²)"),
}
OTHERS = ("settings", "full", "times")
SPEED_UPS = ("1.5", "2", "3")


def load(folder: Path) -> dict[str, dict]:
    """Return the numbers of every finished run, by its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def metric_of(numbers: dict) -> str:
    """Return the first metric of a run."""
    return next(iter(numbers["full"]["test"]))


def policies_of(numbers: dict) -> list[str]:
    """Return the exit policies that were compared."""
    return [name for name in numbers if name not in OTHERS]


def best_policy(numbers: dict, speed_up: str) -> str | None:
    """Return the policy that gives most on dev."""
    metric, reaching = metric_of(numbers), [name for name in policies_of(numbers) if speed_up in numbers[name]]
    found = {name: numbers[name][speed_up]["dev"][metric] for name in reaching}
    return max(found, key=found.get) if found else None


def cell(numbers: dict, policy: str | None, speed_up: str) -> str:
    """Return what is left on test, what that loses, and how many times fewer layers it executes there."""
    if policy is None or speed_up not in numbers[policy]:
        return "does not reach so far"
    metric, own = metric_of(numbers), numbers[policy][speed_up]["test"]
    lost = round(numbers["full"]["test"][metric] - own[metric], 1) + 0.0  # without a sign where it is nothing
    return f"{own[metric]:.1f} ({lost:.1f}) at {own['layer_speed_up']:.2f}x, {own['executed_speed_up']:.2f}x FLOPs"


def losses(results: dict[str, dict]) -> str:
    """Return the table of the best policies."""
    rows = []
    for name, (task, data, metric) in TITLES.items():
        if name not in results:
            rows.append([task, data, metric, NOT_YET, *[NOT_YET] * len(SPEED_UPS)])
            continue
        numbers = results[name]
        cells = []
        for speed_up in SPEED_UPS:
            policy = best_policy(numbers, speed_up)
            cells.append(f"{cell(numbers, policy, speed_up)}{f', `{policy}`' if policy else ''}")
        rows.append([task, data, metric, f"{numbers['full']['test'][metric_of(numbers)]:.1f}", *cells])
    header = ["task", "data", "metric", "full depth", *(f"{speed_up}x on dev" for speed_up in SPEED_UPS)]
    return markdown(header, rows)


def policies(results: dict[str, dict]) -> str:
    """Return the table of all policies at all speed-ups."""
    rows = [
        [TITLES[name][0], f"`{policy}`", *(cell(results[name], policy, speed_up) for speed_up in SPEED_UPS)]
        for name in TITLES
        if name in results
        for policy in policies_of(results[name])
    ]
    return (
        markdown(["task", "exit policy", *(f"{speed_up}x on dev" for speed_up in SPEED_UPS)], rows)
        if rows
        else NOT_YET
    )


def times(results: dict[str, dict]) -> str:
    """Return the table of measured times."""
    rows = []
    for name, (task, _, _) in TITLES.items():
        measured = results.get(name, {}).get("times")
        if measured is None:
            continue
        speed_ups = measured["speed_up"]
        machine = f"{measured['settings']['processor']}, {measured['settings']['instructions']}"
        own = [f"{speed_ups[speed_up]:.2f}x" if speed_up in speed_ups else "" for speed_up in SPEED_UPS]
        rows.append([task, f"`{measured['policy']}`", *own, f"{measured['texts_per_second']['1']:.0f}", machine])
    header = [
        "task",
        "exit policy",
        *(f"{speed_up}x" for speed_up in SPEED_UPS),
        "texts a second at speed 0",
        "processor",
    ]
    return markdown(header, rows) if rows else NOT_YET


def lost_at(results: dict[str, dict], name: str, speed_up: str) -> str:
    """Return what the best policy loses on test."""
    numbers = results.get(name)
    policy = numbers and best_policy(numbers, speed_up)
    if not policy:
        return NOT_YET
    metric = metric_of(numbers)
    return f"{numbers['full']['test'][metric] - numbers[policy][speed_up]['test'][metric]:.1f}"


def token_exits(found: dict | None) -> str:
    """Return the table of sentence-level exits beside token-level ones."""
    if found is None:
        return NOT_YET
    rows = []
    for sentence, token in zip(found["sentence"], found["token"], strict=True):
        threshold, cells = f"{sentence['threshold']:g}", []
        for kind, own in (("sentence", sentence), ("token", token)):
            clock = found.get("times", {}).get(kind, {}).get(threshold)
            clock = "" if clock is None else f", {clock:.2f}x in time"
            cells.append(f"{own['f1']:.1f}, {own['flops']:.2f}x FLOPs{clock}")
        rows.append([threshold, *cells])
    return markdown(["entropy below", "sentences leave", "tokens stop"], rows)


def parts(results: dict[str, dict]) -> dict[str, str]:
    """Return what the template names."""
    return {
        "task_losses": losses(results),
        "task_policies": policies(results),
        "task_times": times(results),
        "token_exits": token_exits(results.get("token_exits")),
        **{f"task_lost_{name}": lost_at(results, name, "2") for name in TITLES},
    }
