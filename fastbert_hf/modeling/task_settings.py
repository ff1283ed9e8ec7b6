"""What a config may say that only some tasks read."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from .task_interface import Task


def check_task_settings(config: Any, task: type[Task]) -> None:
    """Raise a `ValueError` if a config has a field that is for another task, or that cannot be."""
    config.label_thresholds = copy.copy(config.label_thresholds)
    for name, owner in OWNERS.items():
        value = getattr(config, name)
        if value is not None and task.name != owner:
            raise ValueError(f"{name}={value!r:.60} is for {owner}, and this model is for {task.name}: leave it out.")
    if config.coarsening is not None and task.layout.per_token:
        raise ValueError(
            f"coarsening merges tokens, and {task.name} has an answer for each of them: leave out coarsening."
        )
    check_tolerance(config.tolerance)
    thresholds = config.label_thresholds
    is_right = isinstance(thresholds, Sequence) and not isinstance(thresholds, str)
    if thresholds is not None and not (is_right and all(map(is_share, thresholds))):
        raise ValueError(
            f"label_thresholds={thresholds!r:.80} must be a probability above 0 and below 1 for each label. Example: "
            "label_thresholds=[0.5, 0.3]"
        )
    if thresholds is not None and len(thresholds) != config.num_labels:
        raise ValueError(
            f"label_thresholds has {len(thresholds)} numbers for {config.num_labels} labels: give one for each."
        )


def check_tolerance(tolerance: float | None) -> None:
    """Raise a `ValueError` unless this is a finite number of at least 0, or `None`."""
    is_number = isinstance(tolerance, Real) and not isinstance(tolerance, bool) and math.isfinite(tolerance)
    if tolerance is not None and not (is_number and tolerance >= 0):
        raise ValueError(
            f"tolerance={tolerance!r:.40} must be a number of at least 0, in the units of the labels. Example: "
            "tolerance=0.25"
        )


def is_share(value: Any) -> bool:
    """Tell whether this is a number between 0 and 1."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < value < 1


OWNERS = {"tolerance": "regression", "label_thresholds": "multi_label_classification"}
