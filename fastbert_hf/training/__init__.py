"""Teaching the exits: stage 2 of FastBERT, and the objectives of its rivals."""

from .arguments import SelfDistillationArguments
from .objectives import OBJECTIVES, Objective, depth_weights, exit_cross_entropies, student_divergences
from .self_distillation_trainer import SelfDistillationTrainer, accuracy


__all__ = [
    "OBJECTIVES",
    "Objective",
    "SelfDistillationArguments",
    "SelfDistillationTrainer",
    "accuracy",
    "depth_weights",
    "exit_cross_entropies",
    "student_divergences",
]
