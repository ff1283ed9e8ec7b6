"""Teaching the exits: stage 2 of FastBERT, and the objectives of its rivals; and fine-tuning that knows hard texts."""

from typing import TYPE_CHECKING, Any

from .arguments import SelfDistillationArguments
from .difficulty_aware_trainer import DifficultyAwareArguments, DifficultyAwareTrainer
from .objectives import (
    OBJECTIVES,
    Objective,
    depth_weights,
    difficulty_margin_loss,
    exit_cross_entropies,
    student_divergences,
)
from .self_distillation_trainer import SelfDistillationTrainer, accuracy


if TYPE_CHECKING:
    from .difficulty import hard_shares, label_difficulty


def __getattr__(name: str) -> Any:
    # They need the extra `evaluation`, which a training does without.
    if name in ("hard_shares", "label_difficulty"):
        from . import difficulty

        return getattr(difficulty, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "OBJECTIVES",
    "DifficultyAwareArguments",
    "DifficultyAwareTrainer",
    "Objective",
    "SelfDistillationArguments",
    "SelfDistillationTrainer",
    "accuracy",
    "depth_weights",
    "difficulty_margin_loss",
    "exit_cross_entropies",
    "hard_shares",
    "label_difficulty",
    "student_divergences",
]
