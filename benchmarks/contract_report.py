"""The part "Speed as a contract" of docs/results.md: tables and a figure from the numbers of contract_tables.py."""

from __future__ import annotations

from statistics import mean, median

import contract_measures
import contract_runs
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from report_cells import NOT_YET, markdown, percent

from fastbert_hf.evaluation.figures import COLOURS, MARKERS, STYLE


TITLES = {
    "entropy": "entropy (FastBERT)",
    "confidence": "confidence",
    "temperature": "entropy, a temperature for each exit",
    "energy": "normalised energy (the signal of COSEE)",
    "ensemble": "geometric ensemble of the exits so far",
    "ensemble_uncertainty": "its uncertainty alone",
    "learned": "**learned gates**",
}


def known_sets(results: dict[str, dict]) -> dict[str, dict]:
    return {name: results[name] for name in contract_runs.SETS if name in results}


def difference(result: dict, policy: str, metric: str, place: int) -> float | None:
    """Return how many points a policy is ahead of entropy."""
    own, entropy = (result["policies"][name][metric][place] for name in (policy, "entropy"))
    return None if own is None or entropy is None else 100 * (own - entropy)


def signed(value: float | None) -> str:
    return NOT_YET if value is None else f"{round(value, 2) + 0.0:+.2f}"


def policies_table(results: dict[str, dict]) -> str:
    """Return how far each policy is ahead of entropy at equal costs, on average over the sets, and where least."""
    sets = known_sets(results)
    if not sets:
        return NOT_YET
    lines = []
    for policy, title in TITLES.items():
        cells = []
        for place in range(len(contract_measures.COMPARED)):
            for metric in ("accuracy", "agreement"):
                found = [difference(result, policy, metric, place) for result in sets.values()]
                cells.append(signed(mean(value for value in found if value is not None)))
        worst = []
        for place in (1, 2):
            found = {name: difference(result, policy, "accuracy", place) for name, result in sets.items()}
            found = {name: value for name, value in found.items() if value is not None}
            name = min(found, key=found.get)
            worst.append("" if policy == "entropy" else f"{signed(found[name])} ({name})")
        lines.append([title, *cells, *worst])
    header = ["policy"]
    for speed_up in contract_measures.COMPARED:
        header += [f"accuracy, {speed_up:g}x", f"agreement, {speed_up:g}x"]
    return markdown([*header, "worst set, 3x", "worst set, 4x"], lines)


def sets_table(results: dict[str, dict]) -> str:
    """Return of each set what entropy and the gates give, and how far their uncertainty is from what differs."""
    lines = []
    for name, result in known_sets(results).items():
        policies = result["policies"]
        cells = []
        for place in (1, 2):
            for policy in ("entropy", "learned"):
                value = policies[policy]["accuracy"][place]
                cells.append("" if value is None else percent(value))
        seeds = policies["learned"]["seeds"]
        spread = max(
            max(values) - min(values)
            for values in (
                [seed["accuracy"][place] for seed in seeds if seed["accuracy"][place] is not None] or [0.0]
                for place in (1, 2)
            )
        )
        offs = (policies["entropy"]["off"], mean(seed["off"] for seed in seeds))
        rows = result["rows"]
        lines.append(
            [
                name,
                f"{rows['dev']:,} / {rows['test']:,}",
                percent(result["full_accuracy"]),
                *cells,
                f"{100 * spread:.1f}",
                *(f"{100 * off:.1f}" for off in offs),
            ]
        )
    header = ["data set", "dev / test", "full", "entropy, 3x", "learned, 3x", "entropy, 4x", "learned, 4x"]
    return (
        markdown([*header, "spread of seeds", "entropy is off by", "learned is off by"], lines) if lines else NOT_YET
    )


def dial_table(results: dict[str, dict]) -> str:
    """Return what was got of the speed-ups that were asked for, over the sets."""
    sets, lines = known_sets(results), []
    for policy in ("entropy", "learned"):
        for place, wanted in enumerate(contract_measures.SPEED_UPS):
            got = [result["dial"][policy][place] for result in sets.values()]
            got = [value for value in got if value is not None]
            if got:
                within = sum(0.9 <= value <= 1.1 for value in got)
                cells = (f"{median(got):.3f}", f"{min(got):.3f}", f"{max(got):.3f}", f"{within} of {len(got)}")
                lines.append([policy, f"{wanted:g}", *cells])
    header = ["policy", "asked for", "got, median", "least", "greatest", "within 0.9 to 1.1"]
    return markdown(header, lines) if lines else NOT_YET


def certificates_table(results: dict[str, dict]) -> str:
    """Return how often certificates are broken, and what they cost."""
    lines = []
    for name, result in known_sets(results).items():
        for policy, promises in result.get("certificates", {}).items():
            for promise, found in promises.items():
                risk, confidence = promise.split(", ")
                lines.append(
                    [
                        name,
                        policy,
                        f"{found['texts']:,}",
                        risk,
                        confidence,
                        f"{100 * found['broken']:.1f} % (at most {100 * (1 - float(confidence)):.0f})",
                        f"{100 * found['broken_without_correction']:.1f} %",
                        f"{found['speed_up']:.2f}x",
                        f"{found['speed_up_of_an_oracle']:.2f}x",
                    ]
                )
    header = ["data set", "policy", "texts", "share", "confidence", "broken", "broken without correction"]
    return markdown([*header, "certified", "an oracle"], lines) if lines else NOT_YET


def plot_reliability(results: dict[str, dict]) -> Figure | None:
    """Draw what uncertainties mean on the sets of Table 2: entropy beside the gates."""
    sets = {name: result for name, result in known_sets(results).items() if name in contract_runs.SETS[:8]}
    if not sets:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.4), layout="constrained")
        for axes, policy in zip(figure.subplots(1, 2, sharey=True), ("entropy", "learned"), strict=True):
            axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
            for index, (name, result) in enumerate(sets.items()):
                found = result["policies"][policy]
                found = found["seeds"][0] if policy == "learned" else found
                line = {"color": COLOURS[index], "marker": MARKERS[index], "clip_on": False}
                label = name if policy == "entropy" else None
                axes.plot(*zip(*found["reliability"], strict=True), label=label, **line)
            axes.set(xlabel=f"Uncertainty ({policy})", xlim=(0, 1), ylim=(0, 1))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            if policy == "entropy":
                axes.set_ylabel("Answers that differ from the full model's")
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def numbers(results: dict[str, dict]) -> dict[str, str]:
    """Return the numbers inside the sentences, by the names that they have in the template."""
    names = (
        "gain_3",
        "gain_4",
        "worst",
        "worst_set",
        "worst_agreement",
        "off_learned",
        "off_entropy",
        "got_least",
        "got_greatest",
        "got_within",
    )
    names += ("seconds", "broken", "uncorrected", "price")
    sets = known_sets(results)
    if not sets:
        return {f"contract_{name}": NOT_YET for name in names}
    gains = [
        {name: difference(result, "learned", "accuracy", place) for name, result in sets.items()} for place in (1, 2)
    ]
    gains = [{name: value for name, value in found.items() if value is not None} for found in gains]
    worst, worst_set, place = min(
        (value, name, place) for place, found in enumerate(gains, start=1) for name, value in found.items()
    )
    offs = [
        mean(result["policies"]["entropy"]["off"] for result in sets.values()),
        mean(seed["off"] for result in sets.values() for seed in result["policies"]["learned"]["seeds"]),
    ]
    got = [
        [value for value in column if value is not None]
        for policy in ("entropy", "learned")
        for column in zip(*(result["dial"][policy] for result in sets.values()), strict=True)
    ]
    medians, every = [median(column) for column in got], [value for column in got for value in column]
    promises = [
        found
        for result in sets.values()
        for of_policy in result.get("certificates", {}).values()
        for found in of_policy.values()
    ]
    uncorrected = [found["broken_without_correction"] for found in promises]
    found = {
        "gain_3": f"{mean(gains[0].values()):.2f}",
        "gain_4": f"{mean(gains[1].values()):.2f}",
        "worst": f"{max(-worst, 0):.2f}",
        "worst_set": f"{worst_set} at {contract_measures.COMPARED[place]:g}x",
        "worst_agreement": f"{difference(sets[worst_set], 'learned', 'agreement', place):.2f}",
        "off_learned": f"{100 * offs[1]:.1f}",
        "off_entropy": f"{100 * offs[0]:.1f}",
        "got_least": f"{min(medians):.2f}",
        "got_greatest": f"{max(medians):.2f}",
        "got_within": f"{sum(0.9 <= value <= 1.1 for value in every)} of {len(every)}",
        "seconds": f"{max(result['seconds'] for result in sets.values()):.1f}",
    }
    if promises:
        found |= {
            "broken": f"{100 * max(found['broken'] for found in promises):.1f}",
            "uncorrected": f"{100 * min(uncorrected):.0f} to {100 * max(uncorrected):.0f}",
            "price": f"{100 * mean(own['speed_up'] / own['speed_up_of_an_oracle'] for own in promises):.0f} %",
        }
    return {f"contract_{name}": found.get(name, NOT_YET) for name in names}


def parts(results: dict[str, dict]) -> dict[str, str]:
    """Return the tables by their names in the template."""
    return {
        "contract_policies": policies_table(results),
        "contract_sets": sets_table(results),
        "contract_dial": dial_table(results),
        "contract_certificates": certificates_table(results),
        **numbers(results),
    }
