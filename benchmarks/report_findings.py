"""What the sentences of docs/results.md say in numbers, and whether the claims that they make hold."""

from __future__ import annotations

import json
from statistics import mean, stdev

from cascade_report import BASELINES, CALIBRATION, SPEED_UPS, at_speed_ups, chosen_margin, dials_of
from cascade_runs import CASCADES
from paper_runs import BASELINE_ROWS, CASCADE_SETS, TABLE_2_SETS
from report_cells import NOT_YET, percent

from fastbert_hf.evaluation import at_speed_up


DIS, ACCURACY, ECE = CALIBRATION
HARD_SET = "mnli_watson"  # on which the cascades do best
OF_2_AND_6 = [label for label in CASCADES if "2 + 6 layers" in label and not label.startswith("1 +")]
WITH_EXITS, WITH_EXITS_BY_ENTROPY = OF_2_AND_6[-2:]
MORE_TEXTS = ("sst2", "trec", "banking77")  # with many texts beyond those that have labels


class NotRun(LookupError):
    """A run that a number comes from is not finished."""


def numbers(results) -> dict[str, str]:
    """Return the numbers inside the sentences, by the names that they have in the template."""
    found = {}
    for name, number in NUMBERS.items():
        try:
            found[name] = number(results)
        except NotRun:
            found[name] = NOT_YET
    return found


def claims(results) -> dict[str, bool]:
    """Return the claims that the sentences make, word by word, and whether they hold."""
    leads = {name: min(_leads(results, (name,))) for name in CASCADE_SETS}
    gains = {name: _change(results, name, DIS, "test") for name in CASCADE_SETS}
    chosen = {name: _change(results, name, DIS, "test", of_dev=True) for name in CASCADE_SETS}
    errors = {name: _change(results, name, ECE, "test") for name in CASCADE_SETS}
    unlabeled = [_gain_of_unlabeled(results, name) for name in MORE_TEXTS]
    return {
        "cascades of 2 + 6 layers are ahead of DeeBERT, PABEE and BERT-kL on average": min(
            _leads(results, CASCADE_SETS)
        )
        > 0,
        "most of all on mnli_watson": max(leads, key=leads.get) == HARD_SET,
        "none is ahead of FastBERT, on none of the four sets and at no speed-up": not any(
            _beats_fastbert(results, name) for name in CASCADE_SETS
        ),
        "its own margins raise the mean DIS on all four sets": all(
            _change(results, name, DIS, "dev") > 0 for name in CASCADE_SETS
        ),
        "On test that does not hold": max(gains.values()) < min(_deviations(results)),
        "test keeps a gain on mnli_watson alone": [name for name in chosen if chosen[name] > 0] == [HARD_SET],
        "so it gets better on all but mnli_watson": [name for name in errors if errors[name] >= 0] == [HARD_SET],
        "It helps where there are many, most at 4x": all(0 < max(gain) == gain[-1] for gain in unlabeled),
    }


def broken_claims(results) -> list[str]:
    """Return the claims that the finished runs do not support, none while some are missing."""
    try:
        return [sentence for sentence, holds in claims(results).items() if not holds]
    except NotRun:
        return []


def _get(results, *run, **fields) -> dict:
    result = results.get(*run, **fields)
    if result is None:
        raise NotRun(run)
    return result


def _reached(results, name: str) -> dict[str, list[float | None]]:
    """Return the accuracy of every model on test at each speed-up that it reaches."""
    dials = dials_of(results, name)
    if None in dials.values():
        raise NotRun(name)
    return {label: at_speed_ups(*dial) for label, dial in dials.items()}


def _at_4x(results, names: tuple[str, ...]) -> tuple[float, float]:
    """Return the accuracy at 4x of the best cascade and of FastBERT, on average over some sets."""
    reached, means = [_reached(results, name) for name in names], {}
    for label in reached[0]:
        of_sets = [of_set[label][-1] for of_set in reached]
        if None not in of_sets:
            means[label] = mean(of_sets)
    return max(value for label, value in means.items() if label not in BASELINES), means["FastBERT"]


def _leads(results, names: tuple[str, ...]) -> list[float]:
    """Return how far each cascade of 2 + 6 layers is ahead of each of three baselines, on average over some sets."""
    reached = [_reached(results, name) for name in names]
    baselines = [label for label in BASELINES if label.startswith(("DeeBERT", "PABEE", "BERT-kL"))]
    return [
        mean(of_set[f"cascade, {label}"][index] - of_set[baseline][index] for of_set in reached)
        for label in OF_2_AND_6
        for baseline in baselines
        for index in range(len(SPEED_UPS))
        if all(of_set[f"cascade, {label}"][index] is not None for of_set in reached)
    ]


def _beats_fastbert(results, name: str) -> bool:
    reached = _reached(results, name)
    of_cascades = [reached[f"cascade, {label}"] for label in CASCADES]
    return any(
        value is not None and value > own
        for values in of_cascades
        for value, own in zip(values, reached["FastBERT"], strict=True)
    )


def _dev_at_4x(results, label: str) -> str:
    """Return the accuracy on dev of FastBERT or of a cascade, where dev executes four times fewer layers."""
    dial = dials_of(results, HARD_SET)[label]
    if dial is None:
        raise NotRun(label)
    return percent(at_speed_up(dial[0], dial[0], SPEED_UPS[-1])["accuracy"])


def _trainings(results, name: str, margin: float | None) -> list[dict]:
    cases = _get(results, name, "regularisation", 1, BASELINE_ROWS)["cases"]
    return next(case["trainings"] for case in cases if case["margin"] == margin)


def _margin(results, name: str, of_dev: bool = False) -> float:
    """Return the paper's margin for a set, or the one that dev would choose."""
    result = _get(results, name, "regularisation", 1, BASELINE_ROWS)
    return chosen_margin(result) if of_dev else result["settings"]["difficulty_margin"]


def _change(results, name: str, column: str, split: str, of_dev: bool = False) -> float:
    """Return by how many points a margin changes the mean of the trainings."""
    without, with_margin = (
        mean(training[split][column] for training in _trainings(results, name, margin))
        for margin in (None, _margin(results, name, of_dev))
    )
    return 100 * (with_margin - without)


def _deviations(results) -> list[float]:
    """Return how far the DIS on test of trainings of different seeds is apart, in points, without and with margin."""
    return [
        100 * stdev(training["test"][DIS] for training in _trainings(results, name, margin))
        for name in CASCADE_SETS
        for margin in (None, _margin(results, name))
    ]


def _time_ratios(results, label: str) -> list[float]:
    points = [
        point
        for name in CASCADE_SETS
        for point in _get(results, name, "cascade_times", 1, BASELINE_ROWS)["times"][label]
    ]
    return [point["time_speed_up"] / point["layer_speed_up"] for point in points]


def _time_ratios_of_bert_base(results) -> str:
    path = results.folder.parent / "performance" / "cascade.json"
    if not path.exists():
        raise NotRun(path)
    cases = json.loads(path.read_text(encoding="utf-8"))["result"]
    return " and ".join(f"{case['ratio']:.2f}" for name, case in cases.items() if name.startswith("BERT-base"))


def _gain_of_unlabeled(results, name: str) -> list[float]:
    """Return by how much texts without labels raise the accuracy at each speed-up."""
    with_them, without = (results.reached(name, "fastbert", variant, 1) for variant in ("unlabeled", ""))
    if None in (with_them, without):
        raise NotRun(name)
    return [with_them[speed_up]["accuracy"] - without[speed_up]["accuracy"] for speed_up in without]


def _more_texts(results, name: str) -> str:
    return f"{_get(results, name, 'fastbert', 1, BASELINE_ROWS, 'unlabeled')['rows']['unlabeled']:,}"


def _points(value: float) -> str:
    return f"{round(value, 1) + 0:.1f}"  # -0.0 is 0.0


def _span(values: list[float], decimals: int = 1) -> str:
    return f"{min(values):.{decimals}f} to {max(values):.{decimals}f}"


def _on_each_set(values: dict[str, str]) -> str:
    *others, last = (f"{value} on {name}" for name, value in values.items())
    return f"{', '.join(others)} and {last}"


def _changes(results, column: str, split: str) -> str:
    return _on_each_set({name: _points(_change(results, name, column, split)) for name in CASCADE_SETS})


def _hard_rows(results) -> str:
    shares = {
        name: _get(results, name, "regularisation", 1, BASELINE_ROWS)["hard_shares"]["all"] for name in CASCADE_SETS
    }
    return _on_each_set({name: f"{percent(share)} %" for name, share in shares.items()})


def _exit_of_fastbert(results, depth: int) -> str:
    return percent(_get(results, HARD_SET, "fastbert", 1, BASELINE_ROWS)["test"]["depth"]["accuracy"][depth - 1])


def _dev_rows(results) -> str:
    rows = [_get(results, name, "fastbert", 1)["rows"]["dev"] for name in TABLE_2_SETS]
    return f"{min(rows):,} to {max(rows):,}"


NUMBERS = {
    "dev_rows": _dev_rows,
    "more_texts_of_mrpc": lambda results: _more_texts(results, "mrpc"),
    "cascade_at_4x": lambda results: percent(_at_4x(results, (HARD_SET,))[0]),
    "fastbert_at_4x": lambda results: percent(_at_4x(results, (HARD_SET,))[1]),
    "cascade_mean_at_4x": lambda results: percent(_at_4x(results, CASCADE_SETS)[0]),
    "fastbert_mean_at_4x": lambda results: percent(_at_4x(results, CASCADE_SETS)[1]),
    "small_on_gold": lambda results: percent(
        mean(training["test"][ACCURACY] for training in _trainings(results, HARD_SET, None))
    ),
    "exit_2_of_fastbert": lambda results: _exit_of_fastbert(results, 2),
    "dev_fastbert": lambda results: _dev_at_4x(results, "FastBERT"),
    "dev_exits": lambda results: _dev_at_4x(results, f"cascade, {WITH_EXITS}"),
    "dev_exits_by_entropy": lambda results: _dev_at_4x(results, f"cascade, {WITH_EXITS_BY_ENTROPY}"),
    "test_exits": lambda results: percent(_reached(results, HARD_SET)[f"cascade, {WITH_EXITS}"][-1]),
    "test_exits_by_entropy": lambda results: percent(
        _reached(results, HARD_SET)[f"cascade, {WITH_EXITS_BY_ENTROPY}"][-1]
    ),
    "dev_1_layer": lambda results: _dev_at_4x(results, "cascade, 1 + 6 layers"),
    "dev_1_and_2_layers": lambda results: _dev_at_4x(results, "cascade, 1 + 2 + 6 layers, DAR"),
    "hard_rows": _hard_rows,
    "dis_span": lambda results: _span([_change(results, name, DIS, "dev") for name in CASCADE_SETS]),
    "dis_on_dev": lambda results: _changes(results, DIS, "dev"),
    "dis_on_test": lambda results: _changes(results, DIS, "test"),
    "dis_deviations": lambda results: _span(_deviations(results)),
    "dis_kept": lambda results: _points(_change(results, HARD_SET, DIS, "test", of_dev=True)),
    "ece_on_test": lambda results: _changes(results, ECE, "test"),
    "accuracy_change": lambda results: _points(
        max(abs(_change(results, name, ACCURACY, "test")) for name in CASCADE_SETS)
    ),
    "times_complete": lambda results: _span(_time_ratios(results, "2 + 6 layers, DAR"), 2),
    "times_with_exits": lambda results: _span(_time_ratios(results, WITH_EXITS), 2),
    "times_of_bert_base": _time_ratios_of_bert_base,
}
