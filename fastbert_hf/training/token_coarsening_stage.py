"""TokenCoarsening: the stage that makes texts shorter on their way and teaches the model to answer as before."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from ..modeling.token_coarsening import check_coarsening
from .backbone_distillation_trainer import BackboneDistillationArguments, BackboneDistillationTrainer
from .stages import Stage


@dataclass(frozen=True)
class TokenCoarsening(Stage):
    """
    Give a fine-tuned model a `config.coarsening`, and teach it to give again what it gave when it read every token in
    every layer ([`BackboneDistillationTrainer`]). No labels are needed. The students come after it: [`ExitTraining`].

    Args:
        learning_rate, num_train_epochs (`float`): As in every stage.
        target (`float`):
            The part of all tokens of all layers that is left, in (0, 1], shared out by [`retention_schedule`].
        merge (`str`), clusters (`int`), size_aware (`bool`): As in [`Coarsening`].
        coarsening (`dict`, *optional*): The whole setting, in place of all these.

    Example:

    ```python
    >>> stages = [TokenCoarsening(target=0.5), ExitTraining()]
    >>> trained = train("org/my-finetuned-bert", texts, stages=stages, output_dir="outputs/short")
    ```
    """

    learning_rate: float = 5e-5
    num_train_epochs: float = 2.0
    target: float = 0.5
    merge: str = "mean"
    clusters: int = 1
    size_aware: bool = True
    coarsening: dict[str, Any] | None = None

    trainer_class = BackboneDistillationTrainer
    arguments_class = BackboneDistillationArguments
    name = "token_coarsening"
    metrics = "loss"
    needs_labels = False
    needs_teacher = True

    def __post_init__(self):
        super().__post_init__()
        check_target(self.target)
        check_coarsening(self.settings_for(1), 1 if self.coarsening is None else 10_000)

    def settings_for(self, num_layers: int) -> dict[str, Any]:
        """Return the `config.coarsening` of a model with so many layers."""
        if self.coarsening is not None:
            return copy.deepcopy(self.coarsening)
        schedule = retention_schedule(num_layers, self.target)
        return {**schedule, "merge": self.merge, "clusters": self.clusters, "size_aware": self.size_aware}

    def make_trainer(self, output_dir, model, train_dataset, eval_dataset, tokenizer, **training_arguments):
        arguments = self.make_arguments(output_dir, eval_dataset is not None, **training_arguments)
        if model.config.coarsening is not None:
            raise ValueError(
                f"the model's texts become shorter already (config.coarsening={model.config.coarsening}): load the "
                "one that it was made of."
            )
        settings = self.settings_for(model.config.num_hidden_layers)
        check_coarsening(settings, model.config.num_hidden_layers)
        unshortened = copy.deepcopy(model)
        model.config.coarsening = settings
        return self.trainer_class(
            model,
            arguments,
            teacher=unshortened,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )


def check_target(target: float) -> None:
    """Raise a `ValueError` unless `target` may be the part of the tokens of all layers that is left."""
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise ValueError(
            f"target must be in (0, 1], the part of all tokens of all layers that is left, got {target!r:.40}. "
            "Example: target=0.5"
        )


def retention_schedule(num_layers: int, target: float) -> dict[str, list]:
    """
    Return `layers` and `retention` with which texts lose the same share of their tokens in every layer, so that the
    mean retention over the layers is `target`.

    Args:
        num_layers (`int`): Layers of the model.
        target (`float`): In (0, 1].
    """
    check_target(target)
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        mean = sum(share**layer for layer in range(1, num_layers + 1)) / num_layers
        low, high = (share, high) if mean < target else (low, share)
    layers = list(range(1, num_layers + 1))
    return {"layers": layers, "retention": [max(round(high**layer, 4), 1e-4) for layer in layers]}
