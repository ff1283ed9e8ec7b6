"""
The figures of the page, as HTML that follows the colours of its theme and the width of its window: `page_style.py` has
how they look. All that comes from models and visitors goes through [`as_html`].
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..escapes import printable
from .page_answers import ExitSaid, OneText, Summary, TextAnswer


# Labels with a colour of their own; all others together are one.
MOST_LABELS = 5
# The page's templates would read these as their own.
TEMPLATE_SIGNS = {ord(sign): f"&#{ord(sign)};" for sign in "{}$`\\"}
LONGEST_CELL = 160
FATES = {"left": "leaves here", "went on": "goes on", "not asked": "not asked", "not run": "not run"}


def as_html(text: Any, longest: int | None = None) -> str:
    """Return a text which HTML shows as it is, in one line."""
    text = printable(text)
    if longest is not None and len(text) > longest:
        text = f"{text[: longest - 1]}…"
    return html.escape(text).translate(TEMPLATE_SIGNS)


def percent(share: float, decimals: int = 1) -> str:
    """Return a share as a percentage that never says 100 of what is less, nor 0 of what is more."""
    text = f"{100 * share:.{decimals}f}"
    least = 10**-decimals
    if float(text) == 100 and share < 1:
        text = f"{100 - least:.{decimals}f}"
    elif float(text) == 0 and share > 0:
        text = f"{least:.{decimals}f}"
    return f"{text}&nbsp;%".replace("-", "−")


def milliseconds(seconds: float) -> str:
    """Return a time with two or three digits."""
    value = 1000 * seconds
    return f"{value:.0f}&nbsp;ms" if value >= 10 else f"{value:.1f}&nbsp;ms"


def notice(text: str) -> str:
    """Return what stands where there is nothing to show yet."""
    return f'<div class="fb fb-notice">{as_html(text)}</div>'


def hints(lines: Sequence[str], summary: str = "") -> str:
    """Return what a visitor has to know, line by line; what is only for some of them behind a summary."""
    found = "".join(f'<p class="fb-hint">{as_html(line)}</p>' for line in lines)
    return f'<details class="fb-hint"><summary>{as_html(summary)}</summary>{found}</details>' if summary else found


def progress(done: int, total: int) -> str:
    """Return how far a file is."""
    return (
        f'<div class="fb fb-notice fb-progress" role="status"><b>{done:,} of {total:,} texts</b>'
        f'<span><i style="width:{100 * done / total:.1f}%"></i></span></div>'
    )


def stacked(parts: Sequence[str]) -> str:
    """Return parts of a page one below the other."""
    return f'<div class="fb">{"".join(parts)}</div>'


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """Return numbers: each a name, a value and an explanation, which are HTML."""
    return "".join(
        f'<div class="fb-tile"><span>{name}</span><b>{value}</b><small>{more}</small></div>'
        for name, value, more in items
    )


def one_text_figure(text: OneText, asked: Mapping[str, float]) -> str:
    """Return all that the page says of one text where a call asks for this."""
    answer = text.answer(**asked)
    colours = _colours(answer, text.recorded.config.num_labels)
    top = f"{_answer_card(answer, text.recorded.record.member_layers, colours)}{_cost_tiles(text, answer)}"
    return stacked([f'<div class="fb-top">{top}</div>', _exits_figure(text, answer, colours)])


def _answer_card(answer: TextAnswer, member_layers: Sequence[int], colours: Sequence[str]) -> str:
    taken, label, layers = answer.taken, answer.told["label"], answer.told["exit_layer"]
    steps = "".join("<i></i>" if said.fate == "not run" else '<i class="fb-on"></i>' for said in answer.exits)
    where = f"left after layer {layers} of {len(answer.exits)}"
    if taken.member is not None:
        where = f"answered by model {taken.member} of {len(member_layers)}, after {_layers(layers)}"
    size = ' class="fb-long"' if len(label) > 14 else ""
    return (
        f'<div class="fb-card fb-answer"><div class="fb-label" style="--c:{colours[taken.answer]}"><span></span>'
        f"<b{size}>{as_html(label, 60)}</b><em>{percent(answer.told['score'])}</em></div>"
        f'<div class="fb-depth"><div class="fb-steps" aria-hidden="true">{steps}</div><span>{where}</span></div></div>'
    )


def _layers(number: int) -> str:
    return f"{number} layer{'s' * (number != 1)}"


def _cost_tiles(text: OneText, answer: TextAnswer) -> str:
    saved, seconds, items = answer.flops_saved, text.seconds.get(answer.path), []
    if saved is not None:
        more = f"{1 / (1 - saved):.2f}× fewer than at speed 0"
        more = "every layer is run" if saved == 0 else more if saved > 0 else "exits cost, too"
        items.append(("FLOPs saved", percent(saved, 0), more))
    if seconds is None:
        items.append(("Time", '<span class="fb-wait">…</span>', "being measured"))
    else:
        own, full = seconds
        times = f" ({full / own:.1f}×)" if full / own >= 1.05 else ""
        items.append(
            ("Time", milliseconds(own), "of the model" if saved == 0 else f"{milliseconds(full)} at speed 0{times}")
        )
    return tiles(items)


def _colours(answer: TextAnswer, labels: int) -> list[str]:
    """Return the colour of each label: the same for every text where the model has few."""
    if labels == 2:
        return ["var(--fb-2)", "var(--fb-1)"]
    if labels <= MOST_LABELS:
        return [f"var(--fb-{number})" for number in range(1, labels + 1)]
    # What exits answer, the last one first, and then what they find likely: the same at every speed, as far as there
    # is room for what is answered at this one.
    answers = [said.answer for said in reversed(answer.exits)]
    likely = sorted(range(labels), key=lambda label: -sum(said.probabilities[label] for said in answer.exits))
    shown = list(dict.fromkeys([*answers, *likely]))[:MOST_LABELS]
    if answer.taken.answer not in shown:
        shown[-1] = answer.taken.answer
    colours = ["var(--fb-others)"] * labels
    for number, label in enumerate(shown, start=1):
        colours[label] = f"var(--fb-{number})"
    return colours


def _exits_figure(text: OneText, answer: TextAnswer, colours: Sequence[str]) -> str:
    config, exits = text.recorded.config, answer.exits
    shown = [label for label in range(config.num_labels) if "others" not in colours[label]]
    shown.sort(key=colours.__getitem__)
    legend = [f'<span style="--c:{colours[label]}">{as_html(config.id2label[label], 28)}</span>' for label in shown]
    if len(shown) < config.num_labels:
        legend.append(f'<span style="--c:var(--fb-others)">{config.num_labels - len(shown)} others</span>')
    threshold = next((said.threshold for said in exits if 0 < said.threshold < math.inf), None)
    rule = "none but the last is asked" if threshold is None else f"leaves below {threshold:.3g}"
    rows = "".join(_exit_row(said, shown, colours, config.id2label, threshold or 0.0) for said in exits)
    faded = ""
    if any(said.fate in ("not asked", "not run") for said in exits):
        faded = "<p>Faded exits are not computed at this setting. They show what they would say.</p>"
    members = " fb-members" if len(text.recorded.record.member_layers) > 1 else ""
    return (
        f'<div class="fb-card fb-exits{members}" role="table" aria-label="What every exit says">'
        f'<div class="fb-caption"><h4>What every exit says</h4><div class="fb-legend">{"".join(legend)}</div></div>'
        '<div class="fb-head" role="row"><span role="columnheader">exit</span>'
        '<span role="columnheader">probabilities</span><span role="columnheader">uncertainty '
        f"({as_html(text.recorded.policy.name)}): {rule}</span></div>{rows}{faded}</div>"
    )


def _exit_row(
    said: ExitSaid, shown: Sequence[int], colours: Sequence[str], id2label: Mapping[int, str], threshold: float
) -> str:
    parts = [(id2label[label], said.probabilities[label], colours[label]) for label in shown]
    if len(shown) < len(said.probabilities):
        parts.append(("others", max(1 - sum(share for _, share, _ in parts), 0.0), "var(--fb-others)"))
    bars = "".join(
        f'<i style="--c:{colour};width:{100 * share:.2f}%" title="{as_html(name, 60)}: {percent(share)}">'
        f"<b>{percent(share, 0)}</b></i>"
        for name, share, colour in parts
        if share >= 0.001
    )
    # Where the last exit answers in any case, there is no threshold.
    rule = f'<u style="left:{100 * said.threshold:.2f}%"></u>' if 0 < said.threshold < math.inf else ""
    sure = " fb-sure" if said.uncertainty < threshold else ""
    width = 100 * min(max(said.uncertainty, 0.0), 1.0)
    member = "" if said.member is None else f"model {said.member}: "
    return (
        f'<div class="fb-exit fb-{said.fate.replace(" ", "-")}" role="row"><span role="rowheader" class="fb-name">'
        f"<b>Layer {said.layer}</b><small>{member}{FATES[said.fate]}</small></span>"
        f'<span role="cell" class="fb-stack">{bars}</span><span role="cell" class="fb-meter{sure}">'
        f'<span class="fb-track">{rule}<i style="width:{width:.2f}%"></i></span><b>{said.uncertainty:.2f}</b></span>'
        "</div>"
    )


def many_texts_figure(
    summary: Summary, curve: Sequence[tuple[float, Summary]], speed: float, setting: str, member_layers: Sequence[int]
) -> str:
    """
    Return what a dial gives over the texts of a file: numbers, where texts leave, and every speed.

    Args:
        summary ([`Summary`]): At the setting.
        curve (sequence of `float` and [`Summary`]): At every speed.
        speed (`float`): Where the setting is among the speeds.
        setting (`str`): The setting in words.
        member_layers (sequence of `int`): Layers of each model.
    """
    items = []
    if summary.accuracy is not None:
        full = curve[0][1].accuracy
        missing = "" if summary.labelled == summary.rows else f", {summary.labelled:,} labels"
        items.append(("Accuracy", percent(summary.accuracy), f"{percent(full)} with all layers{missing}"))
    items.append(("Agreement", percent(summary.agreement), "with all layers"))
    total = sum(member_layers)
    items.append(("Layers run", f"{summary.mean_layers:.2f}<i>of {total}</i>", "on average"))
    if summary.speed_up is not None:
        items.append(("FLOPs", f"{summary.speed_up:.2f}×", "fewer than at speed 0"))
    heading = f'<p class="fb-heading"><b>{summary.rows:,} texts</b> · {as_html(setting)}</p>'
    figures = f'<div class="fb-pair">{_histogram(summary, member_layers)}{_curve(curve, speed)}</div>'
    return f'{heading}<div class="fb-tiles">{tiles(items)}</div>{figures}'


def _histogram(summary: Summary, member_layers: Sequence[int]) -> str:
    highest = max(summary.shares)
    bars = "".join(
        f'<div class="fb-bar" title="{_layers(layer)}: {percent(share)}"><b>{percent(share, 0) if share else ""}</b>'
        f'<i style="--h:{share / highest:.3f}"></i><span>{layer}</span></div>'
        for layer, share in enumerate(summary.shares, start=1)
    )
    dense = " fb-dense" if len(summary.shares) > 8 else ""
    what = "layers run, in all models" if len(member_layers) > 1 else "exit layer"
    return (
        f'<div class="fb-card"><h4>Where texts leave</h4><div class="fb-bars{dense}" role="img" '
        f'aria-label="Share of the texts by {what}">{bars}</div><p class="fb-axis">{what}</p></div>'
    )


def _curve(curve: Sequence[tuple[float, Summary]], speed: float) -> str:
    lines, heading = [("agreement", "agreement with all layers", "var(--fb-2)")], "Agreement over speed"
    if curve[0][1].accuracy is not None:
        lines, heading = [("accuracy", "accuracy", "var(--fb-1)"), *lines], "Accuracy over speed"
    values = [getattr(point, name) for name, *_ in lines for _, point in curve]
    # At least five points high, so that a small loss does not look like a large one.
    low = max(math.floor(20 * min(min(values), max(values) - 0.05)) / 20, 0.0)
    high = min(math.ceil(20 * max(values)) / 20, 1.0)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / step <= 5.001)
    ticks = [round(low + step * number, 6) for number in range(int((high - low) / step + 1.001))]
    height = {tick: 100 * (tick - low) / (high - low) for tick in ticks}
    grid = "".join(f'<u style="bottom:{height[tick]:.2f}%"><span>{percent(tick, 0)}</span></u>' for tick in ticks)
    nearest = min(curve, key=lambda point: abs(point[0] - speed))[1]
    drawn, marks, legend = "", "", ""
    for name, title, colour in lines:
        points = [(100 * at, 100 * (high - getattr(point, name)) / (high - low)) for at, point in curve]
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
        drawn += f'<polyline points="{path}" style="stroke:{colour}"/>'
        place = 100 * (getattr(nearest, name) - low) / (high - low)
        marks += f'<i style="--c:{colour};left:{100 * speed:.2f}%;bottom:{place:.2f}%"></i>'
        legend += f'<span style="--c:{colour}">{title}</span>'
    times = {at: "" if point.speed_up is None else f"{point.speed_up:.1f}×" for at, point in curve}
    below = "".join(
        f'<span style="left:{100 * at:g}%">{at:g}<small>{times[at]}</small></span>'
        for at in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    return (
        f'<div class="fb-card"><h4>{heading}</h4><div class="fb-legend">{legend}</div>'
        f'<div class="fb-plot" role="img" aria-label="{heading}">{grid}'
        f'<s style="left:{100 * speed:.2f}%"></s>'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>{marks}'
        f'<div class="fb-ticks">{below}</div></div>'
        '<p class="fb-axis">speed, and below it how many times fewer FLOPs</p></div>'
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """Return rows as a table that scrolls inside its own frame where it is too wide. Long values are cut."""
    names = [as_html(name, 40) for name in columns]
    head = "".join(f"<th>{name}</th>" for name in names)
    body = ""
    for row in rows:
        cells = [as_html("" if value is None else value, LONGEST_CELL) for value in row]
        named = zip(names, cells, strict=True)
        body += "".join(["<tr>", *(f'<td data-name="{name}">{cell}</td>' for name, cell in named), "</tr>"])
    return (
        f'<div class="fb-card fb-table"><h4>{as_html(caption)}</h4><div><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></div>"
    )
