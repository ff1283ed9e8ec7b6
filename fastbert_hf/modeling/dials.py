"""What a call asks for, as a speed: `speedup` by the curve that `calibrate` wrote into the config."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .exit_policies import exit_range
from .teacher_digest import is_adapted, is_digest, tells_of_training


UNITS = ("flops", "layers")
# Fields of a config's `calibration`.
FIELDS = ("rows", "unit", "speeds", "speed_ups", "asked", "weights")
MOST_POINTS = 4096
# What is meant by a name in an error.
HINTS = {"exits": " (first and last, by min_exit_layer and max_layers)"}
HOW = "fastbert_hf.calibrate(model, texts, tokenizer)"


def check_calibration(calibration: Any, num_members: int = 1) -> None:
    """
    Raise a `ValueError` unless `calibration` is what the config of a model, or of a cascade of so many, may have:
    `None`, or what [`calibrate`] writes.
    """
    if calibration is None:
        return
    wrong = not isinstance(calibration, Mapping) or set(calibration) != set(FIELDS)
    if not wrong:
        speeds, speed_ups, weights = (calibration[name] for name in ("speeds", "speed_ups", "weights"))
        wrong = (
            calibration["unit"] not in UNITS
            or type(calibration["rows"]) is not int
            or calibration["rows"] < 1
            or not is_rising(speeds, 0.0, 1.0)
            or not is_rising(speed_ups, 1.0, math.inf)
            or len(speeds) != len(speed_ups)
            or not isinstance(calibration["asked"], Mapping)
            or not isinstance(weights, (list, tuple))
            or len(weights) != num_members
            or not all(digest is None or is_digest(digest) for digest in weights)
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


def speed_of_call(model: PreTrainedModel, speed: Any, speedup: Any, streams: bool = False, **asked: Any) -> Any:
    """
    Return the `speed` of a call of `forward` or `predict`: as it is, or that of its `speedup`.

    Args:
        model ([`FastBertForSequenceClassification`] or [`CascadeForSequenceClassification`]): That is called.
        speed, speedup (number, sequence, tensor or iterable, *optional*): At most one of them.
        streams (`bool`):
            Whether many speed-ups may come one after the other. Each is looked up when it is asked for then, and what
            is wrong with one takes the place of its speed.
        asked: What else the call asks for, as [`asked_by`] takes it.

    Raises:
        ValueError: If both are given, the model was not calibrated, or for another use than this one.
    """
    if speedup is None:
        return speed
    if speed is not None:
        raise ValueError(f"give speed or speedup, not both, got speed={speed!r:.40} and speedup={speedup!r:.40}.")
    if hasattr(speedup, "tolist"):  # tensors, NumPy arrays and NumPy numbers
        speedup = speedup.tolist()
    check_speedup(model.config, speedup)
    check_asked(model.config, asked)
    check_calibrated_weights(model, speedup)
    calibration = model.config.calibration
    if is_one(speedup):
        return speed_for(calibration, speedup)
    if not streams and not isinstance(speedup, (list, tuple)):
        raise ValueError(f"speedup must be one number, or a list with one for each row, got {speedup!r:.40}.")
    if not streams:
        return [speed_for(calibration, one) for one in speedup]
    speeds = (speed_or_error(calibration, one) for one in speedup)
    return list(speeds) if isinstance(speedup, (list, tuple)) else speeds


def is_one(speedup: Any) -> bool:
    """Tell whether this is meant to be one speed-up, not many."""
    return isinstance(speedup, str) or not isinstance(speedup, Iterable)


def check_speedup(config: PreTrainedConfig, speedup: Any) -> None:
    """Raise a `ValueError` if a model of this config cannot be asked for a `speedup`, or not for this number."""
    if speedup is None:
        return
    if config.calibration is None:
        raise ValueError(
            f"speedup={speedup!r:.40} needs a model that knows its speeds: calibrate it once, on a few hundred texts "
            f"without labels, and save it: {HOW}"
        )
    if is_one(speedup):
        speed_for(config.calibration, speedup)


def asked_by(
    config: PreTrainedConfig,
    exit_policy: str | None = None,
    patience: int | None = None,
    min_exit_layer: int | None = None,
    max_layers: int | None = None,
) -> dict[str, Any]:
    """
    Return what a curve is of, beside the weights: the policy of a call, the first and the last exit that may answer in
    every member, and how texts become shorter in it. Limits of a call are those of a single model.
    """
    policy = config.exit_policy if exit_policy is None else exit_policy
    members = getattr(config, "members", None)
    limits = [(min_exit_layer, max_layers)]
    if members is not None:
        limits = [(member.min_exit_layer, member.max_layers) for member in members]
    members = [config] if members is None else members
    exits = [
        exit_range(member.num_hidden_layers, *of_member) for member, of_member in zip(members, limits, strict=True)
    ]
    return {
        "exit_policy": policy,
        "patience": (config.patience if patience is None else patience) if policy == "patience" else None,
        "exits": [[own.start, own.stop - 1] for own in exits],
        "coarsening": [
            member.coarsening and {name: without_tuple(value) for name, value in member.coarsening.items()}
            for member in members
        ],
    }


def without_tuple(value: Any) -> Any:
    """Return a tuple as a list, as files give it back, and anything else as it is."""
    return list(value) if isinstance(value, tuple) else value


def check_asked(config: PreTrainedConfig, asked: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a call asks for something under which its `speedup` would be another one."""
    asked = dict(asked)
    retention = asked.pop("retention", None)
    if retention is not None and any(asked_by(config)["coarsening"]):
        raise ValueError(
            f"retention={retention} changes what speedup means, which was calibrated with the config's own: give one "
            "of them."
        )
    given, wanted = asked_by(config, **asked), config.calibration["asked"]
    for name, value in given.items():
        if value != wanted.get(name):
            raise ValueError(
                f"speedup was calibrated with {name}={wanted.get(name)!r:.80}, and this call has {name}={value!r:.80}"
                f"{HINTS.get(name, '')}: ask for the same, or set it in the config and calibrate anew: {HOW}"
            )


def check_calibrated_weights(model: PreTrainedModel, speedup: Any) -> None:
    """Raise a `ValueError` if a model was trained after its calibration. Rounded weights pass for the same ones."""
    for member, wanted in zip(getattr(model, "members", [model]), model.config.calibration["weights"], strict=True):
        if wanted is None:
            continue
        found = member.weights_digest()
        if tells_of_training(found, wanted) if found else is_adapted(member):
            raise ValueError(
                f"the weights of this model have changed since it was calibrated, and speedup={speedup!r:.40} would "
                f"be another one: {HOW}"
            )


def greatest_speedup(calibration: Mapping[str, Any]) -> float:
    """Return the greatest speed-up that may be asked for, with two decimals."""
    return math.floor(100 * calibration["speed_ups"][-1] + 1e-6) / 100


def speed_or_error(calibration: Mapping[str, Any], speedup: Any) -> float | ValueError:
    """Return the speed of one of many speed-ups, or what is wrong with it."""
    try:
        return speed_for(calibration, speedup)
    except ValueError as error:
        return error


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
