"""`calibrate`: what every speed costs and gives on a user's own texts, so that a call may ask for what it wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.exit_record import ExitRecord, as_record
from ..evaluation.replay import Replay, replay_at_speed
from ..evaluation.speed_choice import members_with_students
from ..modeling.dial_checks import UNITS, asked_by, check_calibration, own_limits
from ..modeling.dials import RISKS, SPEED_UPS, is_linear, speed_for, speed_of_threshold
from ..modeling.processing_cascade import CascadeProcessor
from .certificates import certification_of, read_certificate
from .curves import curve_of, points_of
from .policy_report import best_of, compare_policies, fitted_gates, halves, with_fields
from .texts import check_batch_size, check_record, known_again, limit_of, own_tokenizer


# Fewer tell too little.
LEAST_ROWS = 100
# Points of a curve that are kept, at speed-ups whose ratios are equal: less than two percent apart.
POINTS = 128


@dataclass(frozen=True)
class Calibration:
    """
    What [`calibrate`] found.

    Args:
        rows (`int`): Number of texts.
        unit (`str`): What a speed-up counts: `"flops"` or `"layers"`.
        greatest (`float`): The greatest speed-up, at speed 1.
        speeds (`dict[float, float]`):
            What `speed` has to be so that 1.5, 2, 3 and 4 times less is spent, as far as that exists.
        certified (`dict[float, float]`):
            By how many answers may differ, 0.01, 0.02 and 0.05 of them, the speed-up that is certified with a
            confidence of 0.9, as far as there is one.
        agreements (`dict[str, dict[float, float]]`):
            Of each exit policy, by the speed-up, the share of the answers that are the full model's. Of the policy
            `"learned"` on texts to which its gates were not fitted. To choose a policy here and to certify it on the
            same texts is to look twice: where it matters, certify on others.
        best_policy (`str`): The exit policy that agrees most, on average over these speed-ups.
    """

    rows: int
    unit: str
    greatest: float
    speeds: dict[float, float]
    certified: dict[float, float] = field(default_factory=dict)
    agreements: dict[str, dict[float, float]] = field(default_factory=dict)
    best_policy: str = ""


def calibrate(
    model: PreTrainedModel,
    texts_or_rows: Any,
    tokenizer: PreTrainedTokenizerBase | CascadeProcessor | None = None,
    *,
    exit_policy: str | None = None,
    unit: str = "flops",
    linear: bool = False,
    max_length: int | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Calibration:
    """
    Measure what every speed costs and gives on texts like those that the model will answer, and write it into the
    model's config, with which it is saved and pushed. A call may then ask for a `speedup`: how many times less shall
    be spent than at speed 0, on average over many such texts, or as nearly as the model can: with the policy
    `"patience"` there are few steps. Or for `max_disagreement`: the share of the answers that may differ from the full
    model's, with a certificate ([`certify`]); of a model with adapters, or one that is quantised, there is none. No
    labels are needed.

    The limits `min_exit_layer` and `max_layers` are the config's; a call with others is refused. What a single text
    costs is still decided by how sure the exits are of it.

    Args:
        model ([`FastBertForSequenceClassification`] or [`CascadeForSequenceClassification`]): Put into eval mode.
        texts_or_rows ([`ExitRecord`], `datasets.Dataset`, or sequence of `dict` or `str`):
            At least 100 texts, some hundreds better, as [`record_exits`] takes them, or its record. A certificate for
            0.01 needs at least 230, twice as many with the policy `"learned"`.
        tokenizer (`PreTrainedTokenizerBase` or [`CascadeProcessor`], *optional*):
            The model's own, if it knows one, unless given.
        exit_policy (`str`, *optional*):
            Written into the config; the config's own unless given. `"learned"` fits a gate to each exit, on one half
            of the texts; certificates are of the other half. With another policy the same speed means something else:
            `config.speed` becomes the one that costs as much as before.
        unit (`str`):
            What a speed-up counts: `"flops"`, what the packed forward really computes, exits included, or `"layers"`.
        linear (`bool`):
            Whether `speed` shall be linear in what it costs from now on: the share 1 - speed (1 - c), where c is the
            share that speed 1 costs. `config.speed` becomes the one that costs as much as before.
        max_length (`int`, *optional*): To how many tokens the texts were cut, where rows are given that are tokenized.
        batch_size (`int`): Rows in a batch.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`Calibration`]

    Raises:
        ValueError: If there are too few texts, the record is of another model, or the students learnt from weights
            that changed since.

    Example:

    ```python
    >>> fastbert_hf.calibrate(model, texts, tokenizer).greatest
    5.775773
    >>> model.save_pretrained("outputs/calibrated")
    >>> pipeline("fast-text-classification", model=model, tokenizer=tokenizer)(texts, speedup=3.0)
    ```
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r:.40}.")
    members, config = members_with_students(model), model.config
    if exit_policy is not None and exit_policy not in config.exit_policies:
        raise ValueError(
            f"exit policy {exit_policy!r:.40} is not known for this model; choose one of "
            f"{', '.join(config.exit_policies)}."
        )
    if isinstance(texts_or_rows, (list, tuple)) and all(isinstance(row, (str, Mapping)) for row in texts_or_rows[:1]):
        check_number(len(texts_or_rows))
    check_batch_size(batch_size)
    tokenizer = own_tokenizer(model, texts_or_rows, tokenizer)
    max_length = limit_of(model, texts_or_rows, tokenizer, max_length)
    record = as_record(model, texts_or_rows, tokenizer, batch_size=batch_size, progress=progress)
    check_record(model, record)
    check_number(len(record.exit_logits))
    if unit == "flops" and (record.layer_flops is None or record.exit_flops is None):
        raise ValueError('the record has no FLOPs: make it with record_exits(model, texts), or give unit="layers".')
    check_finite(record)
    model.eval()
    own_policy = config.exit_policy if exit_policy is None else exit_policy
    agreements = compare_policies(record, config, config.exit_policies, unit, SPEED_UPS)
    gates, held_out, fitted_to = config.gates, record, (config.calibration or {}).get("texts", "")
    if own_policy == "learned":
        fitted, held_out = halves(record)
        gates, fitted_to = fitted_gates(fitted, config), known_again(fitted)
    # All is made before any of it is written.
    changed = with_fields(config, gates=gates, exit_policy=own_policy, calibration=None)
    speeds, speed_ups = points_of(curve_of(record, changed, unit), POINTS)
    calibration = {
        "rows": len(record.exit_logits),
        "unit": unit,
        "speeds": speeds,
        "speed_ups": speed_ups,
        "asked": asked_by(changed, **own_limits(changed)),
        "weights": [member.weights_digest() or None for member in members],
        "texts": fitted_to if gates is not None else "",
        "linear": bool(linear),
    }
    check_calibration(calibration, len(members))
    certification = None  # where nothing would tell later whether the weights are the same
    if None not in calibration["weights"]:
        certification = certification_of(model, changed, held_out, unit, tokenizer, max_length)
    spent = replay_at_speed(record, config, config.speed)
    was_linear = is_linear(config)
    had_policy = config.exit_policy
    config.gates, config.exit_policy = gates, own_policy
    config.calibration, config.certification = calibration, certification
    if linear != was_linear or own_policy != had_policy:
        config.speed = as_costly(config, record, spent, unit)
    certificates = {risk: read_certificate(config, certification, risk) for risk in RISKS if certification}
    return Calibration(
        rows=len(record.exit_logits),
        unit=unit,
        greatest=speed_ups[-1],
        speeds={
            wanted: speed_of_threshold(config, speed_for(calibration, wanted))
            for wanted in SPEED_UPS
            if wanted <= speed_ups[-1]
        },
        certified={risk: found.speed_up for risk, found in certificates.items() if found is not None},
        agreements=agreements,
        best_policy=best_of(agreements),
    )


def as_costly(config: PreTrainedConfig, record: ExitRecord, spent: Replay, unit: str) -> float:
    """Return the speed that costs as much as what was spent on a record by another policy, or as nearly as it can."""
    full = replay_at_speed(record, config, 0.0)
    costs = [part.flops if unit == "flops" else part.exit_layer for part in (full, spent)]
    wanted = (costs[0].sum() / costs[1].sum()).item()
    speed_up = min(max(wanted, 1.0), config.calibration["speed_ups"][-1])
    return speed_of_threshold(config, speed_for(config.calibration, speed_up))


def check_number(rows: int) -> None:
    """Raise a `ValueError` unless so many texts are enough."""
    if rows < LEAST_ROWS:
        raise ValueError(f"there are {rows} texts, and at least {LEAST_ROWS} are needed; some hundreds are better.")


def check_finite(record: ExitRecord) -> None:
    """Raise a `ValueError` if an exit says NaN or infinity of a text."""
    broken = ~record.exit_logits.isfinite().flatten(1).all(1)
    if broken.any():
        raise ValueError(
            f"the logits of rows {broken.nonzero()[:, 0].tolist()} are not finite, so there is nothing to learn of "
            "them: check the model's weights and inputs for NaN and infinity."
        )
