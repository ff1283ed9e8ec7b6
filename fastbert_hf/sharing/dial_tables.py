"""What a calibrated model may be asked for, out of its config alone: for cards and reports."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.dials import certified_place, greatest_speedup, speed_for


SPEED_UPS = (1.5, 2.0, 3.0, 4.0)
RISKS = (0.01, 0.02, 0.05)


def certificates_of(config: PreTrainedConfig) -> dict[float, tuple[float, float] | None]:
    """Return by the share of answers that may differ the certified speed and speed-up, `None` where there is none."""
    certification, found = config.certification, {}
    for risk in RISKS if certification is not None else ():
        place = certified_place(certification, risk)
        found[risk] = None if place < 0 else (certification["speeds"][place], certification["speed_ups"][place])
    return found


def asked_rows(config: PreTrainedConfig) -> list[tuple[str, str, str]]:
    """Return rows of what a call may ask for: how it is written, the speed, and how many times less is spent."""
    rows = []
    if config.calibration is not None:
        for speedup in SPEED_UPS:
            if speedup <= greatest_speedup(config.calibration):
                speed = speed_for(config.calibration, speedup)
                rows.append((f"speedup={speedup:g}", f"{speed:.4g}", f"{speedup:.2f}"))
    for risk, certificate in certificates_of(config).items():
        if certificate is not None:
            rows.append((f"max_disagreement={risk:g}", f"{certificate[0]:.4g}", f"{certificate[1]:.2f}"))
    return rows
