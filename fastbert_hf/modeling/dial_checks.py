"""What `calibrate` and `certify` may write into a config, and the use of a model that it is of."""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .exit_policies import exit_range
from .teacher_digest import is_adapted, is_digest, tells_of_training


UNITS = ("flops", "layers")
# Fields of a config's `calibration` and `certification`.
CALIBRATION = ("rows", "unit", "speeds", "speed_ups", "asked", "weights")
OPTIONAL = ("linear", "texts")
CERTIFICATION = ("rows", "unit", "speeds", "speed_ups", "errors", "risks", "reference", "asked", "weights", "setting")
# What a certificate is of, beside what a call asks for.
SETTING = ("dtype", "engine", "tokenizer", "max_length")
MOST_POINTS = 4096
MOST_LEVELS = 16
# The speeds at which a certificate may hold. They are the same for all models and texts: fixed before looking.
GRID = tuple(float(f"{10 ** (step / 40 - 4):.4g}") for step in range(161))
# What is meant by a name in an error.
HINTS = {"exits": " (first and last, by min_exit_layer and max_layers)"}
# Fields of a config that say which answers count as the same, where a task has them.
OF_ANSWERS = ("tolerance", "label_thresholds")
HOW = "fastbert_hf.calibrate(model, texts, tokenizer)"
HOW_TO_CERTIFY = "model.certify(texts, tokenizer, max_disagreement=0.01)"


def check_calibration(calibration: Any, num_members: int = 1) -> None:
    """
    Raise a `ValueError` unless `calibration` is what the config of a model, or of a cascade of so many, may have:
    `None`, or what [`calibrate`] writes.
    """
    if calibration is None:
        return
    if (
        not isinstance(calibration, Mapping)
        or set(calibration).difference(OPTIONAL) != set(CALIBRATION)
        or not is_curve(calibration, num_members)
        or not isinstance(calibration.get("linear", False), bool)
        or decoded(calibration.get("texts", "")) is None
    ):
        raise ValueError(
            f"calibration={calibration!r:.80} is not what calibrate writes, a dict of {', '.join(CALIBRATION)} with "
            f"rising speeds in [0, 1] and speed-ups from 1 on: set it to None, or make it anew with {HOW}"
        )


def check_certification(certification: Any, num_members: int = 1, num_exits: int = 1) -> None:
    """Raise a `ValueError` unless `certification` is `None`, or what [`certify`] writes. As [`check_calibration`]."""
    if certification is None:
        return
    wrong = (
        not isinstance(certification, Mapping)
        or set(certification) != set(CERTIFICATION)
        or not is_curve(certification, num_members)
        or None in certification["weights"]
        or not isinstance(certification["setting"], Mapping)
        or set(certification["setting"]) != set(SETTING)
        or not all(isinstance(certification["setting"][name], str) for name in ("dtype", "engine"))
        or not is_reference(certification["reference"], num_exits)
        or not isinstance(certification["risks"], Mapping)
        or not 1 <= len(certification["risks"]) <= MOST_LEVELS
    )
    if not wrong:
        points, errors, rows = len(certification["speeds"]), certification["errors"], certification["rows"]
        wrong = not is_rising(errors, 0, rows, any_order=True) or len(errors) != points
        for level, risks in certification["risks"].items():
            wrong = wrong or not is_level(level) or not is_rising(risks, 0.0, 1.0) or len(risks) != points
            # No promise is better than what was seen.
            wrong = wrong or any(risk < own / rows for risk, own in zip(risks, errors, strict=True))
    if wrong:
        raise ValueError(
            f"certification={certification!r:.80} is not what certify writes, a dict of {', '.join(CERTIFICATION)} "
            f"with rising speeds and risks in [0, 1]: set it to None, or make it anew with {HOW_TO_CERTIFY}"
        )


def is_curve(found: Mapping[str, Any], num_members: int) -> bool:
    """Tell whether there is a speed-up for each speed, of texts, a unit, a use, and weights of so many members."""
    weights = found["weights"]
    return (
        found["unit"] in UNITS
        and type(found["rows"]) is int
        and found["rows"] >= 1
        and is_rising(found["speeds"], 0.0, 1.0)
        and is_rising(found["speed_ups"], 0.0, math.inf, any_order="risks" in found)
        and (found["speed_ups"][0] >= 1 or "risks" in found)
        and len(found["speeds"]) == len(found["speed_ups"])
        and isinstance(found["asked"], Mapping)
        and isinstance(weights, (list, tuple))
        and len(weights) == num_members
        and all(digest is None or is_digest(digest) for digest in weights)
    )


def is_rising(values: Any, least: float, greatest: float, any_order: bool = False) -> bool:
    """Tell whether this is a list of finite numbers within these limits, none below the one before."""
    if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= MOST_POINTS:
        return False
    if not all(isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) for value in values):
        return False
    in_order = any_order or list(values) == sorted(values)
    return least <= min(values) and max(values) <= greatest and in_order


def is_level(level: Any) -> bool:
    """Tell whether this is a confidence level as it is written in a config, such as `"0.9"`."""
    try:
        return isinstance(level, str) and 0.5 <= float(level) < 1 and repr(float(level)) == level
    except ValueError:
        return False


def is_reference(reference: Any, num_exits: int) -> bool:
    """Tell whether this is the base64 of a float32 in [0, 1] for each of so many exits, for any number of texts."""
    found = decoded(reference)
    if not found or len(found) % (4 * num_exits):
        return False
    return all(0 <= value <= 1 for (value,) in struct.iter_unpack("<f", found))


def decoded(text: Any) -> bytes | None:
    """Return what base64 says, `None` where it is none."""
    try:
        return base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except (binascii.Error, ValueError):
        return None


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
        **{name: value for name in OF_ANSWERS if (value := getattr(config, name, None)) is not None},
        **({"gates": [list(map(float, gate)) for gate in config.gates or ()]} if policy == "learned" else {}),
    }


def without_tuple(value: Any) -> Any:
    """Return a value as it is read again from JSON, which has no tuples."""
    return list(value) if isinstance(value, tuple) else value


def own_limits(config: PreTrainedConfig) -> dict[str, int | None]:
    """Return the limits of a single model's config, within which its pipeline answers; a cascade has none itself."""
    return {name: getattr(config, name, None) for name in ("min_exit_layer", "max_layers")}


def check_asked(config: PreTrainedConfig, wanted: Mapping[str, Any], dial: str, asked: Mapping[str, Any]) -> None:
    """
    Raise a `ValueError` if a call asks for something under which its `dial`, such as `"speedup"`, would be another
    one than what was `wanted`: the field `asked` of a calibration or certification.
    """
    asked = dict(asked)
    retention = asked.pop("retention", None)
    if retention is not None and any(asked_by(config)["coarsening"]):
        raise ValueError(
            f"retention={retention} changes what {dial} means, which was calibrated with the config's own: give one "
            "of them."
        )
    for name, value in asked_by(config, **asked).items():
        if value != wanted.get(name):
            raise ValueError(
                f"{dial} was calibrated with {name}={wanted.get(name)!r:.80}, and this call has {name}={value!r:.80}"
                f"{HINTS.get(name, '')}: ask for the same, or set it in the config and calibrate anew: {HOW}"
            )


def is_asked(config: PreTrainedConfig, wanted: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Tell whether [`check_asked`] has nothing against what a call asks for."""
    try:
        check_asked(config, wanted, "speed", asked)
    except ValueError:
        return False
    return True


def check_calibrated_weights(model: PreTrainedModel, wanted: Any, dial: str, exactly: bool = False) -> None:
    """
    Raise a `ValueError` if a model was trained after its calibration. Rounded weights pass for the same ones, unless
    they are to be the same `exactly`: then it must be certain that they are, too.
    """
    for member, digest in zip(getattr(model, "members", [model]), wanted, strict=True):
        if digest is None:
            continue
        found = member.weights_digest(whole=exactly)
        if exactly:
            changed = found != digest
        else:
            changed = tells_of_training(found, digest) if found else is_adapted(member)
        if changed:
            how = HOW_TO_CERTIFY if exactly else HOW
            raise ValueError(
                f"the weights of this model have changed since it was calibrated, and {dial} would be another one: "
                f"{how}"
            )


def setting_of(model: PreTrainedModel) -> dict[str, str]:
    """Return what a certificate is of, as far as a model itself tells it."""
    device = model.device.type
    autocast = torch.is_autocast_enabled(device) if torch.amp.is_autocast_available(device) else False
    dtype = torch.get_autocast_dtype(device) if autocast else model.dtype
    return {"dtype": str(dtype).removeprefix("torch."), "engine": model.engine_name}


def check_setting(certification: Mapping[str, Any], dial: str, **found: Any) -> None:
    """Raise a `ValueError` if something is not as it was when a model was certified, as far as that is known."""
    for name, value in found.items():
        wanted = certification["setting"][name]
        if wanted is not None and value != wanted:
            raise ValueError(
                f"{dial} was certified with {name}={wanted!r}, and here it is {value!r}: answers may differ. Use the "
                f"same, or certify anew: {HOW_TO_CERTIFY}"
            )
