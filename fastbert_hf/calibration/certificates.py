"""`certify`: at which speed no more than a given share of the answers differs, by fixed-sequence testing."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.exit_record import ExitRecord, as_record
from ..evaluation.replay import exit_uncertainties, raw_thresholds
from ..evaluation.speed_choice import members_with_students
from ..modeling.dial_checks import GRID, asked_by, check_certification, own_limits, setting_of
from ..modeling.dials import CONFIDENCE, certified_point, check_risk, not_certifiable, speed_of_threshold
from ..modeling.exit_policies import ExitPolicy
from ..modeling.processing_cascade import CascadeProcessor, tokenizer_digest
from ..modeling.tasks import task_of
from .curves import curve_of
from .texts import MOST_SHARED, check_batch_size, check_record, limit_of, own_tokenizer, share_known


try:
    from scipy.stats import beta
except ImportError as error:
    raise ImportError('certificates need an extra: pip install "fastbert-hf[calibration]"') from error


LEVELS = (0.9, 0.95, 0.99)
# Numbers that are kept of how sure the exits were, for `drift`, and texts.
MOST_KEPT, MOST_KEPT_TEXTS = 18_000, 500


@dataclass(frozen=True)
class Certificate:
    """
    What [`certify`] promises: with this confidence, no more than this share of the answers is lost on texts that are
    drawn as those of the certification were, at this speed and at every lower one, all together. It says nothing of
    other texts, and nothing of a single answer.

    Args:
        loss (`str`): `"disagreement"` with the full model's answer, or `"accuracy_drop"`.
        risk (`float`): The greatest share.
        confidence_level (`float`): Of the promise, over the choice of the texts of the certification.
        rows (`int`): Number of these texts.
        errors (`int`): Answers that were lost among them, at this speed.
        speed (`float`):
            For calls with `speed=`: of the speeds for which all of this holds, the one that costs least. 0 where exits
            cost more than they save at all of them.
        speed_up (`float`): How many times less was spent on these texts than at speed 0.
        unit (`str`): What the speed-up counts: `"flops"` or `"layers"`.
        asked (`dict`): The exit policy and the limits of the call.
        setting (`dict`): The dtype, the engine, the tokenizer's digest and the greatest length, as far as it is known.
        weights (`list` of `str`): A digest of the weights of each member.
    """

    loss: str
    risk: float
    confidence_level: float
    rows: int
    errors: int
    speed: float
    speed_up: float
    unit: str
    asked: dict[str, Any] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)
    weights: list[str | None] = field(default_factory=list)


def certify(
    model: PreTrainedModel,
    texts_or_rows: Any,
    tokenizer: PreTrainedTokenizerBase | CascadeProcessor | None = None,
    *,
    max_disagreement: float | None = None,
    max_accuracy_drop: float | None = None,
    confidence: float = CONFIDENCE,
    max_length: int | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Certificate:
    """
    Find the greatest speed at which, with a given confidence, no more than a given share of the answers differs from
    the full model's (or is lost): fixed-sequence testing over speeds that were fixed before, with exact binomial
    tails (Angelopoulos et al., Learn then Test, 2021, section 2.3).

    The texts must be drawn as those will be that the model answers, and must be none that it, or the gates of its exit
    policy, learnt from. What is found of the disagreement, at every speed, replaces `model.config.certification`, for
    calls that ask for `max_disagreement`.

    Args:
        model ([`FastBertForSequenceClassification`] or [`CascadeForSequenceClassification`]): Put into eval mode.
        texts_or_rows ([`ExitRecord`], `datasets.Dataset`, or sequence of `dict` or `str`):
            As [`record_exits`] takes them, or its record.
        tokenizer (`PreTrainedTokenizerBase` or [`CascadeProcessor`], *optional*):
            The model's own, if it knows one, unless given.
        max_disagreement (`float`, *optional*): The greatest share of answers that differ from the full model's.
        max_accuracy_drop (`float`, *optional*):
            In its place, for texts with labels: the greatest share of answers that are wrong where the full model's
            are right. The accuracy drops by no more than that, and by less where the early answer alone is right.
        confidence (`float`): Between 0.5 and 1.
        max_length (`int`, *optional*): To how many tokens the texts were cut, where rows are given that are tokenized.
        batch_size (`int`): Rows in a batch.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`Certificate`]

    Raises:
        ValueError:
            If not exactly one of the shares is given, there are no labels for the second one, or nothing can be
            certified: it says how many texts would do.

    Example:

    ```python
    >>> model.certify(texts, tokenizer, max_disagreement=0.01, confidence=0.95).speed_up
    2.23
    ```
    """
    asked_for = {"max_disagreement": max_disagreement, "max_accuracy_drop": max_accuracy_drop}
    asked_for = {name: risk for name, risk in asked_for.items() if risk is not None}
    if len(asked_for) != 1:
        raise ValueError("give either max_disagreement or max_accuracy_drop. Example: max_disagreement=0.01")
    ((name, risk),) = asked_for.items()
    check_risk(name, risk)
    if isinstance(confidence, bool) or not isinstance(confidence, Real) or not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be from 0.5 to below 1, got {confidence!r:.40}. Example: confidence=0.95")
    confidence = float(confidence)
    members_with_students(model)
    check_batch_size(batch_size)
    tokenizer = own_tokenizer(model, texts_or_rows, tokenizer)
    max_length = limit_of(model, texts_or_rows, tokenizer, max_length)
    record = as_record(model, texts_or_rows, tokenizer, batch_size=batch_size, progress=progress)
    config = model.config
    check_certifiable(model)
    check_record(model, record)
    known = share_known(record, (config.calibration or {}).get("texts", ""))
    if config.exit_policy == "learned" and known > MOST_SHARED:
        raise ValueError(
            f"{known:.0%} of these are texts to which the gates of the exit policy were fitted: certify with others. "
            "calibrate has kept one half of them for its own certificates."
        )
    model.eval()
    unit = "layers" if record.layer_flops is None else "flops"
    if name == "max_accuracy_drop" and record.labels is None:
        raise ValueError("max_accuracy_drop needs texts with labels; without, ask for max_disagreement.")
    loss = "disagreement" if name == "max_disagreement" else "accuracy_drop"
    settings = (unit, tokenizer, max_length, confidence)
    found = certification_of(model, config, record, *settings, lost_answers=loss == "accuracy_drop")
    certificate = read_certificate(config, found, risk, confidence, loss)
    if certificate is None:
        raise not_certifiable(name, risk, confidence, found["rows"], found["errors"][0])
    if loss == "disagreement":
        config.certification = found
    return certificate


def check_certifiable(model: PreTrainedModel) -> None:
    """Raise a `ValueError` if nothing would tell later whether the weights of a model are still the same."""
    if not all(member.weights_digest(whole=True) for member in getattr(model, "members", [model])):
        raise ValueError(
            "a model with adapters, or one that is quantised, cannot be certified: its parameters do not tell what it "
            "computes, so another one would pass for it. Merge adapters first, as in model.merge_and_unload()."
        )


def upper_bounds(errors: list[int], rows: int, confidence: float) -> list[float]:
    """
    Return for each speed of a sequence the least share that fixed-sequence testing accepts, with this confidence,
    there and at all speeds before: the greatest of the exact upper bounds so far (Clopper and Pearson, 1934). A bound
    is not above a share exactly where the binomial tail of so few errors is not above 1 - confidence.
    """
    counts = np.asarray(errors)
    bounds = np.where(counts < rows, beta.ppf(confidence, counts + 1, np.maximum(rows - counts, 1e-9)), 1.0)
    # Rounded upwards, so that nothing is promised that was not tested.
    return (np.ceil(np.maximum.accumulate(bounds) * 1e8) / 1e8).clip(max=1.0).round(8).tolist()


def certification_of(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    record: ExitRecord,
    unit: str,
    tokenizer: Any = None,
    max_length: int | None = None,
    confidence: float = CONFIDENCE,
    lost_answers: bool = False,
) -> dict[str, Any]:
    """
    Return what is known of the errors at all speeds of `GRID`, as a config keeps it.

    Args:
        model, record, tokenizer, max_length: As in [`certify`].
        config ([`FastBertConfig`] or [`CascadeConfig`]): With the policy and the limits.
        unit (`str`): What speed-ups count.
        confidence (`float`): A level beside 0.9, 0.95 and 0.99.
        lost_answers (`bool`): Whether answers count that are wrong where the full model's are right.
    """

    task = task_of(config)

    def is_lost(logits: torch.Tensor, full_logits: torch.Tensor) -> torch.Tensor:
        return task.differs(logits, full_logits) & task.is_right(full_logits, record.labels)

    curve = curve_of(record, config, unit, is_lost if lost_answers else None)
    rows = [(speed, *curve.at(speed)) for speed in GRID]
    # Of speeds in a row at which all texts leave alike, the last one.
    rows = [row for row, after in zip(rows, [*rows[1:], None], strict=True) if after is None or row[1:] != after[1:]]
    speeds, speed_ups, errors = map(list, zip(*rows, strict=True))
    members = list(getattr(model, "members", [model]))
    certification = {
        "rows": curve.rows,
        "unit": unit,
        "speeds": speeds,
        "speed_ups": [math.floor(1e6 * speed_up) / 1e6 for speed_up in speed_ups],
        "errors": errors,
        "risks": {repr(level): upper_bounds(errors, curve.rows, level) for level in sorted({*LEVELS, confidence})},
        "reference": reference_of(record, config),
        "asked": asked_by(config, **own_limits(config)),
        "weights": [member.weights_digest(whole=True) for member in members],
        "setting": {**setting_of(model), "tokenizer": tokenizer_digest(tokenizer), "max_length": max_length},
    }
    check_certification(certification, len(members), record.num_exits)
    return certification


def read_certificate(
    config: PreTrainedConfig,
    certification: Mapping[str, Any],
    risk: float,
    confidence: float = CONFIDENCE,
    loss: str = "disagreement",
) -> Certificate | None:
    """Return the certificate of a share for a model of this config, `None` where there is none."""
    found = certified_point(certification, risk, confidence)
    if found is None:
        return None
    threshold, speed_up, errors = found
    return Certificate(
        loss=loss,
        risk=risk,
        confidence_level=confidence,
        rows=certification["rows"],
        errors=errors,
        speed=speed_of_threshold(config, threshold),
        speed_up=speed_up,
        unit=certification["unit"],
        **{name: certification[name] for name in ("asked", "setting", "weights")},
    )


def reference_of(record: ExitRecord, config: PreTrainedConfig) -> str:
    """Return how sure every exit was of some of the texts, as base64 of a float32 for each text and exit."""
    may_answer = raw_thresholds(record, config, 1.0) > 0
    uncertainties = exit_uncertainties(record, ExitPolicy.of(config), may_answer)
    rows = max(min(MOST_KEPT_TEXTS, MOST_KEPT // record.num_exits), 1)
    kept = uncertainties[:: -(-len(uncertainties) // rows)].clamp(0, 1)
    return base64.b64encode(kept.numpy().astype("<f4").tobytes()).decode()
