"""What a calibrated model may be asked for, out of its config alone: for cards and reports."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling.dial_checks import check_calibrated_weights
from ..modeling.dials import RISKS, SPEED_UPS, certified_point, greatest_speedup, speed_for


def certificates_of(config: PreTrainedConfig) -> dict[float, tuple[float, float] | None]:
    """Return by the share of answers that may differ the certified speed and speed-up, `None` where there is none."""
    certification, found = config.certification, {}
    for risk in RISKS if certification is not None else ():
        point = certified_point(certification, risk)
        found[risk] = None if point is None else point[:2]
    return found


def asked_rows(model: PreTrainedModel) -> list[tuple[str, str, str]]:
    """
    Return rows of what a call may ask for: how it is written, the speed, and how many times less is spent. None where
    calls would be refused, as the weights changed since.
    """
    rows, config = [], model.config
    for measured, exactly in ((config.calibration, False), (config.certification, True)):
        try:
            if measured is not None:
                check_calibrated_weights(model, measured["weights"], "", exactly)
        except ValueError:
            return []
    if config.calibration is not None:
        for speedup in SPEED_UPS:
            if speedup <= greatest_speedup(config.calibration):
                speed = speed_for(config.calibration, speedup)
                rows.append((f"speedup={speedup:g}", f"{speed:.4g}", f"{speedup:.2f}"))
    for risk, certificate in certificates_of(config).items():
        if certificate is not None:
            rows.append((f"max_disagreement={risk:g}", f"{certificate[0]:.4g}", f"{certificate[1]:.2f}"))
    return rows
