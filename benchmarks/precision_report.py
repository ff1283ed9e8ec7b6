"""The part "Precision" of docs/results.md: a table from the numbers of precision_tables.py."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

from precision_runs import KINDS, SPEEDS
from report_cells import NOT_YET, markdown, percent


SETS = ("sst2", "mrpc", "trec", "banking77")  # those of which a target was set

# What is rounded together, by a part of the names of its modules.
PARTS = {
    "query, key, value": "attention.self.",
    "attention, output": "attention.output.dense",
    "feed-forward, up": "intermediate.dense",
    "feed-forward, down": ".output.dense",
}
EMBEDDINGS = "word_embeddings"


def load(folder: Path) -> list[dict]:
    """Return the numbers of every finished set."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def table(results: list[dict]) -> str:
    """Return accuracy, and the agreement with float32, of every set."""
    if not results:
        return NOT_YET
    header = ["set", *(f"{kind}, speed {speed:g}" for speed in SPEEDS for kind in KINDS)]
    lines = [[result["set"], *cells([result])] for result in results]
    lines.append(["**mean**", *(f"**{cell}**" for cell in cells(results))])
    return markdown(header, lines)


def cells(results: list[dict]) -> list[str]:
    """Return accuracy, and in brackets agreement, of every speed and kind: the means over some sets."""
    found = []
    for speed in SPEEDS:
        for kind in KINDS:
            own = [result["speeds"][f"{speed:g}"][kind] for result in results]
            agreement = "" if kind == "float32" else f" ({percent(mean(of['agreement'] for of in own))})"
            found.append(percent(mean(of["accuracy"] for of in own)) + agreement)
    return found


def numbers(results: list[dict]) -> dict[str, str]:
    """Return the numbers inside the sentences, by the names that they have in the template."""
    found = {}
    for kind, part in (("int8", "int8"), ("int8, 7 bits", "int7")):
        at_zero = [result["speeds"]["0"] for result in results]
        lost = {
            result["set"]: own["float32"]["accuracy"] - own[kind]["accuracy"]
            for result, own in zip(results, at_zero, strict=True)
        }
        agreement = {result["set"]: own[kind]["agreement"] for result, own in zip(results, at_zero, strict=True)}
        of_target = [name for name in SETS if name in lost]
        there = bool(lost)
        found[f"{part}_lost"] = f"{100 * mean(lost.values()) + 0.0:.2f}" if there else NOT_YET
        found[f"{part}_lost_most"] = f"{100 * max(lost.values()):.2f}" if there else NOT_YET
        found[f"{part}_lost_most_set"] = max(lost, key=lost.get) if there else NOT_YET
        found[f"{part}_agreement"] = percent(mean(agreement.values())) if there else NOT_YET
        found[f"{part}_agreement_least"] = percent(min(agreement.values())) if there else NOT_YET
        found[f"{part}_agreement_least_set"] = min(agreement, key=agreement.get) if there else NOT_YET
        whole = len(of_target) == len(SETS)
        found[f"{part}_lost_of_target"] = f"{100 * max(lost[of] for of in SETS):.2f}" if whole else NOT_YET
        found[f"{part}_agreement_of_target"] = percent(min(agreement[of] for of in SETS)) if whole else NOT_YET
    return found


def parts(results: list[dict], folder: Path) -> dict[str, str]:
    """Return what the template of results.md takes from here."""
    return {"precision": table(results), "precision_layers": layers_table(folder), **numbers(results)}


def layers_table(folder: Path) -> str:
    """Return the divergence of each part of each layer, as a share of that of all together, the mean of the sets."""
    results = [json.loads(path.read_text()) for path in sorted((folder / "layers").glob("*.json"))]
    if not results:
        return NOT_YET
    layers = range(1, max(result["layers"] for result in results) + 1)

    def share(part: str, layer: int) -> str:
        of_sets = [of["parts"][f"{part}/{layer}"]["divergence"] / of["parts"]["all/0"]["divergence"] for of in results]
        return f"{100 * mean(of_sets):.0f}"

    lines = [[part, *(share(part, layer) for layer in layers)] for part in PARTS]
    lines.append([f"word embeddings: {share(EMBEDDINGS, 0)}", *[""] * len(layers)])
    return markdown(["part", *(f"layer {layer}" for layer in layers)], lines)
