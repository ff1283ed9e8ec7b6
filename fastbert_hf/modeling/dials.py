"""What a call asks for, as the threshold of its exits: a `speed`, a `speedup`, or a `max_disagreement`."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .dial_checks import (
    HOW,
    HOW_TO_CERTIFY,
    check_asked,
    check_calibrated_weights,
    check_setting,
    setting_of,
)


# At most one of them is given.
DIALS = ("speed", "speedup", "max_disagreement")
# What cards and reports tell of a calibrated model.
SPEED_UPS = (1.5, 2.0, 3.0, 4.0)
RISKS = (0.01, 0.02, 0.05)
# Of a certificate, unless a call says another one.
CONFIDENCE = 0.9


def speed_of_call(
    model: PreTrainedModel, dials: Mapping[str, Any], streams: bool = False, confidence: float | None = None, **asked
) -> Any:
    """
    Return what the exits of a call of `forward` or `predict` are compared with: its speed, or that of its `speedup` or
    its `max_disagreement`.

    Args:
        model ([`FastBertForSequenceClassification`] or [`CascadeForSequenceClassification`]): That is called.
        dials (`dict`):
            `speed`, `speedup` and `max_disagreement` of the call, each a number, a sequence, a tensor, or `None`. At
            most one of them is given.
        streams (`bool`):
            Whether many may come one after the other. Each is looked up when it is asked for then, and what is wrong
            with one takes the place of its speed.
        confidence (`float`, *optional*): Of `max_disagreement`.
        asked: What else the call asks for, as [`asked_by`] takes it.

    Raises:
        ValueError: If several are given, the model was not calibrated, or for another use than this one.
    """
    name, value = one_dial(dials)
    if hasattr(value, "tolist"):  # tensors, NumPy arrays and NumPy numbers
        value = value.tolist()
    if confidence is not None and name != "max_disagreement":
        raise ValueError(f"confidence={confidence!r} is that of max_disagreement, which this call does not ask for.")
    if name is None or (name == "speed" and (not is_linear(model.config) or is_zero(value))):
        return dials["speed"]
    dial = f"{name}={value!r:.40}"
    look_up = lookup_of(model.config, name, value, confidence)
    if is_one(value):
        look_up(value)  # what is wrong with it comes first
    measured = model.config.certification if name == "max_disagreement" else model.config.calibration
    check_asked(model.config, measured["asked"], name, asked)
    is_certified = name == "max_disagreement"
    if is_certified:
        check_setting(measured, name, **setting_of(model))
    check_calibrated_weights(model, measured["weights"], dial, exactly=is_certified)
    if is_one(value):
        return look_up(value)
    if not streams and not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be one number, or a list with one for each row, got {value!r:.40}.")
    if not streams:
        return [look_up(one) for one in value]
    speeds = (value_or_error(look_up, one) for one in value)
    return list(speeds) if isinstance(value, (list, tuple)) else speeds


def one_dial(dials: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Return the name and the value of the one that is given, `None` where none is."""
    found = {name: value for name, value in dials.items() if value is not None}
    if len(found) > 1:
        several = " and ".join(f"{name}={value!r:.40}" for name, value in found.items())
        raise ValueError(f"give {' or '.join(found)}, not {'both' if len(found) == 2 else 'all'}, got {several}.")
    return next(iter(found.items()), (None, None))


def is_one(value: Any) -> bool:
    """Tell whether this is meant to be one value, not many."""
    return isinstance(value, str) or not isinstance(value, Iterable)


def is_zero(speed: Any) -> bool:
    """Tell whether this is the speed 0 alone, which means the same to every model."""
    return isinstance(speed, Real) and not isinstance(speed, bool) and speed == 0


def is_linear(config: PreTrainedConfig) -> bool:
    """Tell whether the speeds of a model were made linear in what they cost."""
    return config.calibration is not None and bool(config.calibration.get("linear", False))


def value_or_error(look_up: Callable[[Any], float], value: Any) -> float | ValueError:
    """Return the speed of one of many, or what is wrong with it."""
    try:
        return look_up(value)
    except ValueError as error:
        return error


def lookup_of(
    config: PreTrainedConfig, name: str, value: Any, confidence: float | None = None
) -> Callable[[Any], float]:
    """Return what looks up the threshold of one value of a dial, or raise a `ValueError` if a model has not that."""
    if name == "max_disagreement":
        return lambda value: certified_speed(config.certification, value, confidence)
    if name == "speed" and not is_linear(config):
        return float
    if config.calibration is None:
        raise ValueError(
            f"{name}={value!r:.40} needs a model that knows its speeds: calibrate it once, on a few hundred texts "
            f"without labels, and save it: {HOW}"
        )
    look_up = threshold_of_speed if name == "speed" else speed_for
    return lambda value: look_up(config.calibration, value)


def check_dial(config: PreTrainedConfig, name: str, value: Any, confidence: float | None = None) -> None:
    """Raise a `ValueError` if a model of this config cannot be asked for a dial, or not for this value."""
    if value is not None:
        look_up = lookup_of(config, name, value, confidence)
        if is_one(value):
            look_up(value)


def greatest_speedup(calibration: Mapping[str, Any]) -> float:
    """Return the greatest speed-up that may be asked for, with two decimals."""
    return math.floor(100 * calibration["speed_ups"][-1] + 1e-6) / 100


def speed_for(calibration: Mapping[str, Any], speedup: Any) -> float:
    """Return the speed at which the texts of the calibration cost `speedup` times less, or as nearly as they can."""
    known, speeds = calibration["speed_ups"], calibration["speeds"]
    if isinstance(speedup, bool) or not isinstance(speedup, Real) or not 1 <= speedup <= known[-1] * (1 + 1e-6):
        greatest = greatest_speedup(calibration)
        raise ValueError(
            f"speedup must be a number from 1 to {greatest:g}, which this model reaches at speed 1, got "
            f"{speedup!r:.40}. Example: speedup={min(2.0, greatest):g}"
        )
    above = min(bisect_left(known, speedup), len(known) - 1)
    below = max(above - 1, 0)
    nearest = below if speedup - known[below] < known[above] - speedup else above
    return float(speeds[nearest])


def threshold_of_speed(calibration: Mapping[str, Any], speed: Any) -> float:
    """
    Return the threshold of a linear speed: that at which texts cost no less than 1 - speed (1 - c), where c is the
    least that they can cost, at speed 1; all are shares of what they cost at speed 0.
    """
    if isinstance(speed, bool) or not isinstance(speed, Real) or not 0 <= speed <= 1:
        raise ValueError(f"speed must be a number in [0, 1], got {speed!r:.40}. Example: speed=0.5")
    # A little more, as a speed may have been in float32 on its way.
    place = bisect_right(linear_speeds(calibration), speed + 1e-7) - 1
    return float(calibration["speeds"][max(place, 0)])


def linear_speeds(calibration: Mapping[str, Any]) -> list[float]:
    """Return the linear speed of each point of a calibration: the share of what can be saved that it saves."""
    known = calibration["speed_ups"]
    most = 1 - 1 / known[-1]
    return [0.0 if most == 0 else min(math.ceil(1e9 * (1 - 1 / own) / most) / 1e9, 1.0) for own in known]


def threshold_of(config: PreTrainedConfig, speed: float) -> float:
    """Return the threshold of a speed: itself unless the speeds of a model are linear."""
    return threshold_of_speed(config.calibration, speed) if is_linear(config) else speed


def thresholds_of_speeds(config: PreTrainedConfig, speeds: torch.Tensor) -> torch.Tensor:
    """Return the thresholds of the speeds of rows, `[rows]`: the speeds themselves unless they are linear."""
    if not is_linear(config):
        return speeds
    thresholds = {speed: threshold_of_speed(config.calibration, speed) for speed in set(speeds.tolist())}
    return torch.tensor([thresholds[speed] for speed in speeds.tolist()])


def speed_of_threshold(config: PreTrainedConfig, threshold: float) -> float:
    """Return the greatest speed of a model whose threshold is not above this one: itself unless speeds are linear."""
    if not is_linear(config):
        return threshold
    place = max(bisect_right(config.calibration["speeds"], threshold) - 1, 0)
    return linear_speeds(config.calibration)[place]


def certified_speed(certification: Mapping[str, Any] | None, risk: Any, confidence: float | None = None) -> float:
    """
    Return the greatest speed at which a model is certified: with this confidence, no more than this share of the
    answers to texts like those of the certification differ from the full model's.

    Raises:
        ValueError: If there is none, or no certification.
    """
    confidence = CONFIDENCE if confidence is None else confidence
    if certification is None:
        raise ValueError(
            f"max_disagreement={risk!r:.40} needs a model that was certified, on some hundred texts without labels: "
            f"{HOW}, or {HOW_TO_CERTIFY}"
        )
    check_risk("max_disagreement", risk)
    found = certified_point(certification, risk, confidence)
    if found is None:
        raise not_certifiable("max_disagreement", risk, confidence, certification["rows"], certification["errors"][0])
    return found[0]


def certified_point(
    certification: Mapping[str, Any], risk: float, confidence: float = CONFIDENCE
) -> tuple[float, float, int] | None:
    """
    Return the cheapest speed that is certified, how many times less it costs, and its errors; `None` where none is.
    Where exits cost more than they save at all of them, that is speed 0, which has no errors.
    """
    risks = {float(level): of_level for level, of_level in certification["risks"].items()}
    if isinstance(confidence, bool) or not isinstance(confidence, Real) or confidence not in risks:
        known = ", ".join(f"{level:g}" for level in sorted(risks))
        raise ValueError(
            f"confidence={confidence!r:.40} was not certified, only {known}: choose one of these, or certify anew: "
            f"{HOW_TO_CERTIFY[:-1]}, confidence={confidence!r:.40})"
        )
    accepted = bisect_right(risks[confidence], risk)
    if accepted == 0:
        return None
    columns = (certification[name][:accepted] for name in ("speed_ups", "speeds", "errors"))
    speed_up, speed, errors = max([(1.0, 0.0, 0), *zip(*columns, strict=True)])
    return float(speed), speed_up, errors


def check_risk(name: str, risk: Any) -> None:
    """Raise a `ValueError` unless this is a share above 0 and below 1."""
    if isinstance(risk, bool) or not isinstance(risk, Real) or not 0 < risk < 1:
        raise ValueError(f"{name} must be a share of the answers, above 0 and below 1, got {risk!r:.40}: {name}=0.01")


def not_certifiable(name: str, risk: float, confidence: float, rows: int, errors: int) -> ValueError:
    """Return the error of a model that cannot be certified, which says how many texts would do."""
    needed = math.ceil(math.log(1 - confidence) / math.log1p(-max(risk, 1e-12)))
    reason = f"there were {rows}" if rows < needed else f"{errors} of {rows} differed at the lowest speed already"
    return ValueError(
        f"{name}={risk:g} cannot be certified with confidence {confidence:g}: it needs at least {needed:,} texts "
        f"without one disagreement, and {reason}. Certify with more texts, or ask for less."
    )
