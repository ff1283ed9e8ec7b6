"""The sliders of the page: what a model may be asked for, from where to where."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..modeling.dial_checks import own_limits
from ..modeling.dials import CONFIDENCE, DIALS, greatest_speedup, one_dial, speed_of_call
from ..modeling.pipeline_fastbert import FastTextClassificationPipeline


# Settings of a pipeline that change nothing of what a page replays. Others belong into the model's config.
HARMLESS = {*DIALS, "confidence", "on_error", "progress_bar", "return_uncertainty"}


@dataclass(frozen=True)
class PageDial:
    """
    A slider.

    Args:
        name (`str`): One of `DIALS`.
        title, label (`str`): What visitors read.
        minimum, maximum, step, value (`float`): As the slider shows them.
        unit (`float`): What a call is asked for where the slider shows 1: a share is shown in percent.
    """

    name: str
    title: str
    label: str
    minimum: float
    maximum: float
    step: float
    value: float
    unit: float = 1.0

    def asked(self, shown: Any) -> dict[str, float]:
        """Return what a call is asked for where the slider shows this number: `{"speed": 0.5}`."""
        if isinstance(shown, bool) or not isinstance(shown, (int, float)) or not math.isfinite(shown):
            raise ValueError(f"{self.title} must be a number, got {shown!r:.40}.")
        # The sliders' steps are hundredths and tenths, which products of floats are not.
        return {self.name: round(shown * self.unit, 6)}

    def at(self, value: float) -> PageDial:
        """Return the slider where it shows what a call asks for, or as nearly as it can."""
        shown = min(max(round(value / self.unit, 2), self.minimum), self.maximum)
        return replace(self, value=shown)


def page_dials(classifier: FastTextClassificationPipeline) -> tuple[list[PageDial], list[str]]:
    """
    Return the sliders for a model, that of the pipeline's dial first, and why others are missing.

    Raises:
        ValueError: If the pipeline is asked for what a page cannot show.
    """
    own = classifier._forward_params
    others = sorted(set(own) - HARMLESS)
    if others:
        raise ValueError(
            f"a page answers by the config of its model, and this pipeline has {', '.join(others)}: set it there, as "
            f"in model.config.{others[0]} = {own[others[0]]!r:.40}"
        )
    dials, missing = {"speed": _speed(classifier)}, []
    for name, title, make in (("speedup", "speed-up", _speedup), ("max_disagreement", "agreement", _agreement)):
        try:
            dials[name] = make(classifier)
        except ValueError as error:
            missing.append(f"No {title}: {error}")
    first, value = one_dial({name: own.get(name) for name in DIALS})
    if first is not None:
        dials[first] = dials[first].at(value)
    return sorted(dials.values(), key=lambda dial: dial.name != first), missing


def _speed(classifier: FastTextClassificationPipeline) -> PageDial:
    dial = PageDial("speed", "Speed", "Speed: 0 runs every layer", 0, 1, 0.01, 0)
    return dial.at(classifier.model.config.speed)


def _speedup(classifier: FastTextClassificationPipeline) -> PageDial:
    threshold_of_call(classifier, speedup=1.0)
    calibration = classifier.model.config.calibration
    greatest = greatest_speedup(calibration)
    if greatest < 1.01:
        raise ValueError("speed 1 costs as much as speed 0.")
    what = "FLOPs" if calibration["unit"] == "flops" else "layers"
    label = f"Speed-up: times fewer {what}, on average"
    return PageDial("speedup", "Speed-up", label, 1, greatest, 0.01, min(2.0, greatest))


def _agreement(classifier: FastTextClassificationPipeline) -> PageDial:
    certification = classifier.model.config.certification
    level = float(classifier._forward_params.get("confidence") or CONFIDENCE)
    risks = [] if certification is None else certification["risks"].get(str(level), [])
    least, most = (math.ceil(1000 * risk) / 10 for risk in (risks[0], risks[-1])) if risks else (1.0, 1.0)
    threshold_of_call(classifier, max_disagreement=least / 100)
    if classifier.check_reading(classifier._preprocess_params) is not None:
        longest = certification["setting"]["max_length"]
        raise ValueError(
            f"it was certified for texts that are cut to {longest} tokens: load with max_length={longest}."
        )
    if least >= most:
        raise ValueError(f"{least:g} % is all that it was certified for.")
    label = "Agreement: at most so many percent of the answers differ from those of all layers"
    dial = PageDial("max_disagreement", "Agreement", label, least, most, 0.1, least, unit=0.01)
    return dial.at(0.01)


def threshold_of_call(classifier: FastTextClassificationPipeline, **asked: float) -> float:
    """Return with what uncertainties are compared where a call asks for this: `speedup=2.0`."""
    confidence = classifier._forward_params.get("confidence") if "max_disagreement" in asked else None
    dials = {**dict.fromkeys(DIALS), **asked}
    return float(speed_of_call(classifier.model, dials, confidence=confidence, **own_limits(classifier.model.config)))
