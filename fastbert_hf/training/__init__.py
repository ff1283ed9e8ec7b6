"""Stage 2: teaching the students."""

from .arguments import SelfDistillationArguments
from .self_distillation_trainer import SelfDistillationTrainer, accuracy, student_divergences


__all__ = ["SelfDistillationArguments", "SelfDistillationTrainer", "accuracy", "student_divergences"]
