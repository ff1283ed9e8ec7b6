"""Show numbers and tables as the written reports do."""

from __future__ import annotations

from statistics import mean, stdev


NOT_YET = "not run"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def spread(values: list[float]) -> str:
    """Return mean and standard deviation in percent; one value alone has no deviation."""
    text = percent(mean(values))
    return f"{text} ± {percent(stdev(values))}" if len(values) > 1 else text


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
