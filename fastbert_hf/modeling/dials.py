"""What a call asks for, as a speed: `speedup` by the curve that `calibrate` wrote into the config."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .teacher_digest import tells_of_training


UNITS = ("flops", "layers")
# Fields of a config's `calibration`.
FIELDS = ("rows", "unit", "speeds", "speed_ups", "asked", "weights")
# What a curve is of, beside the weights: a call that names another is refused.
ASKED = ("exit_policy", "patience", "min_exit_layer", "max_layers")
MOST_POINTS = 4096
HOW = "fastbert_hf.calibrate(model, texts, tokenizer)"


def check_calibration(calibration: Any) -> None:
    """Raise a `ValueError` unless `calibration` is what a config's may be: `None`, or what [`calibrate`] writes."""
    if calibration is None:
        return
    wrong = not isinstance(calibration, Mapping) or set(calibration) != set(FIELDS)
    if not wrong:
        speeds, speed_ups = calibration["speeds"], calibration["speed_ups"]
        wrong = (
            calibration["unit"] not in UNITS
            or type(calibration["rows"]) is not int
            or calibration["rows"] < 1
            or not is_rising(speeds, 0.0, 1.0)
            or not is_rising(speed_ups, 1.0, math.inf)
            or len(speeds) != len(speed_ups)
            or not isinstance(calibration["asked"], Mapping)
            or set(calibration["asked"]) != set(ASKED)
            or not isinstance(calibration["weights"], (list, tuple))
            or not all(weights is None or isinstance(weights, str) for weights in calibration["weights"])
        )
    if wrong:
        raise ValueError(
            f"calibration={calibration!r:.80} is not what calibrate writes, a dict of {', '.join(FIELDS)} with rising "
            f"speeds in [0, 1] and speed-ups from 1 on: set it to None, or make it anew with {HOW}"
        )


def is_rising(values: Any, least: float, greatest: float) -> bool:
    """Tell whether this is a list of finite numbers within these limits, none below the one before."""
    if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= MOST_POINTS:
        return False
    if not all(isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) for value in values):
        return False
    return least <= values[0] and values[-1] <= greatest and list(values) == sorted(values)


def speed_of_call(model: PreTrainedModel, speed: Any, speedup: Any, **asked: Any) -> Any:
    """
    Return the `speed` of a call of `forward` or `predict`: as it is, or that of its `speedup`.

    Args:
        model ([`FastBertForSequenceClassification`] or [`CascadeForSequenceClassification`]): That is called.
        speed, speedup (number, sequence, tensor or iterable, *optional*): At most one of them.
        asked: What else the call asks for: `ASKED`, and `retention`.

    Raises:
        ValueError: If both are given, the model was not calibrated, or for another use than this one.
    """
    if speedup is None:
        return speed
    if speed is not None:
        raise ValueError(f"give speed or speedup, not both, got speed={speed!r:.40} and speedup={speedup!r:.40}.")
    check_speedup(model.config, speedup)
    calibration = model.config.calibration
    check_asked(model.config, asked)
    found = [member.weights_digest() for member in getattr(model, "members", [model])]
    pairs = zip(found, calibration["weights"], strict=True)
    if any(own and wanted and tells_of_training(own, wanted) for own, wanted in pairs):
        raise ValueError(
            f"the weights of this model have changed since it was calibrated, and speedup={speedup!r:.40} would be "
            f"another one: {HOW}"
        )
    if hasattr(speedup, "tolist"):  # tensors, NumPy arrays and NumPy numbers
        speedup = speedup.tolist()
    if isinstance(speedup, str) or not isinstance(speedup, Iterable):
        return speed_for(calibration, speedup)
    speeds = (speed_for(calibration, one) for one in speedup)
    return list(speeds) if isinstance(speedup, (list, tuple)) else speeds


def check_speedup(config: PreTrainedConfig, speedup: Any) -> None:
    """Raise a `ValueError` if a model of this config cannot be asked for a `speedup`, or not for this number."""
    if speedup is None:
        return
    if config.calibration is None:
        raise ValueError(
            f"speedup={speedup!r:.40} needs a model that knows its speeds: calibrate it once, on a few hundred texts "
            f"without labels, and save it: {HOW}"
        )
    if isinstance(speedup, (str, Real)) or not (hasattr(speedup, "tolist") or isinstance(speedup, Iterable)):
        speed_for(config.calibration, speedup)


def check_asked(config: PreTrainedConfig, asked: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a call asks for something under which its `speedup` would be another one."""
    if asked.get("retention") is not None:
        raise ValueError(
            f"retention={asked['retention']} changes what speedup means, which was calibrated with the config's own: "
            "give one of them."
        )
    for name, wanted in config.calibration["asked"].items():
        given = asked.get(name)
        if given is None and name in ("exit_policy", "patience"):
            given = getattr(config, name, None)
        if name == "patience" and config.calibration["asked"]["exit_policy"] != "patience":
            continue
        if given != wanted:
            raise ValueError(
                f"speedup was calibrated with {name}={wanted!r}, and this call has {name}={given!r}: give "
                f"{name}={wanted!r}, or set it in the config and calibrate anew: {HOW}"
            )


def speed_for(calibration: Mapping[str, Any], speedup: Any) -> float:
    """Return the speed at which the texts of the calibration cost `speedup` times less, or as nearly as they can."""
    known, speeds = calibration["speed_ups"], calibration["speeds"]
    if isinstance(speedup, bool) or not isinstance(speedup, Real) or not 1 <= speedup <= known[-1] * (1 + 1e-9):
        raise ValueError(
            f"speedup must be a number from 1 to {math.floor(100 * known[-1]) / 100:g}, which this model reaches at "
            f"speed 1, got {speedup!r:.40}. Example: speedup={min(2.0, known[-1]):g}"
        )
    above = min(bisect_left(known, speedup), len(known) - 1)
    below = max(above - 1, 0)
    nearest = below if speedup - known[below] < known[above] - speedup else above
    return float(speeds[nearest])
