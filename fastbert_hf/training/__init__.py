"""Stage 2: teaching the students."""

from .arguments import SelfDistillationArguments
from .self_distillation_trainer import SelfDistillationTrainer, student_divergences


__all__ = ["SelfDistillationArguments", "SelfDistillationTrainer", "student_divergences"]
