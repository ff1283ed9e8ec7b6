"""Both stages of FastBERT in one call, `train`, and what it is made of: stages, trainers of the exits, objectives."""

from typing import TYPE_CHECKING, Any

from .arguments import ExitTrainingArguments, SelfDistillationArguments
from .backbone_distillation_trainer import BackboneDistillationArguments, BackboneDistillationTrainer
from .both_stages import Trained, train
from .difficulty_aware_trainer import DifficultyAwareArguments, DifficultyAwareTrainer
from .exit_trainer import ExitTrainer, SelfDistillationTrainer, task_metric
from .feed_forward_conversion import convert_feed_forward
from .feed_forward_stage import FeedForwardConversion
from .leaf_usage import LeafUsage
from .objectives import OBJECTIVES, Objective, depth_weights, difficulty_margin_loss, student_divergences
from .retention_search import retention_schedule, search_retention
from .stages import (
    DifficultyAwareFineTuning,
    Distillation,
    ExitTraining,
    FineTuning,
    StageSettings,
    run_stage,
)
from .token_coarsening_stage import TokenCoarsening


if TYPE_CHECKING:
    from .difficulty import hard_shares, label_difficulty


def __getattr__(name: str) -> Any:
    # They need `datasets`, which a training does without.
    if name in ("hard_shares", "label_difficulty"):
        from . import difficulty

        return getattr(difficulty, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "OBJECTIVES",
    "BackboneDistillationArguments",
    "BackboneDistillationTrainer",
    "DifficultyAwareArguments",
    "DifficultyAwareFineTuning",
    "DifficultyAwareTrainer",
    "Distillation",
    "ExitTrainer",
    "ExitTraining",
    "ExitTrainingArguments",
    "FeedForwardConversion",
    "FineTuning",
    "LeafUsage",
    "Objective",
    "SelfDistillationArguments",
    "SelfDistillationTrainer",
    "StageSettings",
    "TokenCoarsening",
    "Trained",
    "convert_feed_forward",
    "depth_weights",
    "difficulty_margin_loss",
    "hard_shares",
    "label_difficulty",
    "retention_schedule",
    "run_stage",
    "search_retention",
    "student_divergences",
    "task_metric",
    "train",
]
