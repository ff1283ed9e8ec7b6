"""Which parameters of a model ask for gradients, as its objective needs it."""

from __future__ import annotations

from transformers import PreTrainedModel

from .checked_trainer import base_model
from .objectives import Objective


def choose_what_learns(model: PreTrainedModel | None, objective: Objective) -> None:
    """Let the students alone ask for gradients, or where the objective trains the teacher, too, the whole model."""
    if objective.freezes_teacher:
        freeze_all_but_students(model)
        return
    fastbert = checked_base_model(model)
    parts = (fastbert.fastbert, fastbert.teacher)
    learns = all(any(parameter.requires_grad for parameter in part.parameters()) for part in parts)
    if fastbert is not model or not learns:
        reason = "the model is wrapped by PEFT" if fastbert is not model else "one of them asks for no gradients"
        raise ValueError(
            f"This objective trains the backbone and the teacher, too, but {reason}. Give a model that can learn as a "
            "whole: model.requires_grad_(True)"
        )
    for parameter in fastbert.student_parameters():
        parameter.requires_grad = True


def freeze_all_but_students(model: PreTrainedModel | None) -> None:
    """Let the students alone ask for gradients: turn `requires_grad` off for the backbone and the teacher."""
    fastbert = checked_base_model(model)
    if fastbert is not model and not all(hasattr(module, "modules_to_save") for module in fastbert.student_modules()):
        raise ValueError(
            "The adapter would be saved without the students. Name every exit in its config: "
            f"modules_to_save={fastbert.exit_names()}"
        )
    # PEFT keeps the original of every module that it trains in full; only the copy learns.
    originals = {id(parameter) for name, parameter in model.named_parameters() if ".original_module." in name}
    model.requires_grad_(False)
    for parameter in fastbert.student_parameters():
        parameter.requires_grad = id(parameter) not in originals


def checked_base_model(model: PreTrainedModel | None) -> PreTrainedModel:
    """Return the FastBERT model itself, or raise a `ValueError` if it is none or has no students."""
    fastbert = base_model(model)
    if not hasattr(fastbert, "student_modules"):
        raise ValueError(
            f"model must be a FastBertForSequenceClassification, got {type(model).__name__}. Wrap yours: "
            "FastBertForSequenceClassification.from_classifier(name)"
        )
    if len(fastbert.students) == 0:
        raise ValueError("The backbone has one layer, so there are no students to teach.")
    return fastbert
