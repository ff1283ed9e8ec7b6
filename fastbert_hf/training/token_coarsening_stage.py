"""TokenCoarsening: the stage that makes texts shorter on their way and teaches the model to answer as before."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import write_whole
from ..modeling.exit_policies import check_speed
from ..modeling.families import max_text_tokens
from ..modeling.token_coarsening import check_coarsening
from ..rows import encoded_rows
from .backbone_distillation_trainer import BackboneDistillationArguments, BackboneDistillationTrainer
from .retention_search import check_target, retention_schedule, search_retention
from .settings_files import digest_of, digest_of_weights
from .stages import FineTuning, Stage


RETRAINING = ("distillation", "labels")


@dataclass(frozen=True)
class TokenCoarsening(Stage):
    """
    Give a fine-tuned model a `config.coarsening`, and teach it to answer with fewer tokens. The students come after
    it: [`ExitTraining`].

    Args:
        learning_rate, num_train_epochs (`float`): As in every stage.
        target (`float`):
            The part of all tokens of all layers that is left, in (0, 1], shared out by [`retention_schedule`].
        layers (sequence of `int`, *optional*): As in [`retention_schedule`].
        merge (`str`), clusters (`int`), size_aware (`bool`): As in [`Coarsening`].
        coarsening (`dict`, *optional*): The whole setting, in place of all these.
        retraining (`str`):
            `"distillation"`: to give again what it gave when it read every token in every layer
            ([`BackboneDistillationTrainer`]), for which no labels are needed; `"labels"`: as in [`FineTuning`], which
            is what PoWER-BERT and FCA-BERT do.
        search (`bool`): Whether [`search_retention`] shares out the target.
        speed (`float`): As in [`search_retention`].

    Example:

    ```python
    >>> stages = [TokenCoarsening(target=0.5), ExitTraining()]
    >>> trained = train("org/my-finetuned-bert", texts, stages=stages, output_dir="outputs/short")
    ```
    """

    learning_rate: float = 1e-4
    num_train_epochs: float = 2.0
    target: float = 0.5
    layers: tuple[int, ...] | None = None
    merge: str = "mean"
    clusters: int = 1
    size_aware: bool = True
    coarsening: dict[str, Any] | None = None
    retraining: str = "distillation"
    search: bool = False
    speed: float = 0.0

    name = "token_coarsening"
    needs_teacher = True

    @property
    def needs_labels(self) -> bool:
        return self.retraining == "labels"

    @property
    def metrics(self) -> str:
        return FineTuning.metrics if self.needs_labels else "loss"

    @property
    def trainer_class(self) -> type:
        return FineTuning.trainer_class if self.needs_labels else BackboneDistillationTrainer

    @property
    def arguments_class(self) -> type:
        return FineTuning.arguments_class if self.needs_labels else BackboneDistillationArguments

    def __post_init__(self):
        super().__post_init__()
        check_target(self.target)
        check_speed(self.speed)
        if self.retraining not in RETRAINING:
            raise ValueError(f"retraining is one of {', '.join(RETRAINING)}, not {self.retraining!r:.40}.")
        if self.search and self.coarsening is not None:
            raise ValueError(
                "search=True has nothing to search where coarsening gives the schedule: give one of them."
            )
        if self.speed > 0 and not self.search:
            raise ValueError(f"speed={self.speed} is for the search alone: leave it out, or give search=True, too.")
        if self.layers is not None:
            layers = list(self.layers)
            check_coarsening({"layers": layers, "retention": [1.0] * len(layers)}, 10_000)
            object.__setattr__(self, "layers", tuple(layers))
        any_schedule = retention_schedule(1, self.target)
        check_coarsening(self.settings_for(any_schedule), 1 if self.coarsening is None else 10_000)

    def settings_for(self, schedule: dict[str, list]) -> dict[str, Any]:
        """Return the `config.coarsening` with these `layers` and `retention`."""
        if self.coarsening is not None:
            return copy.deepcopy(self.coarsening)
        return {**schedule, "merge": self.merge, "clusters": self.clusters, "size_aware": self.size_aware}

    def schedule_for(
        self, model: PreTrainedModel, rows: Any, tokenizer: PreTrainedTokenizerBase, arguments: Any
    ) -> dict[str, list]:
        """Return `layers` and `retention`; what a search found stays beside the checkpoints, for resuming."""
        if not self.search or self.coarsening is not None:
            return retention_schedule(model.config.num_hidden_layers, self.target, self.layers)
        path, asked = Path(arguments.output_dir, "retention.json"), {**self.settings(), "seed": arguments.seed}
        limit = max_text_tokens(model.config.text_config)
        limit = limit if tokenizer is None else min(limit, tokenizer.model_max_length)
        rows = encoded_rows(rows, tokenizer, limit, model.config.label2id)
        asked |= {"model": digest_of_weights(model), "rows": digest_of(rows)}
        with arguments.main_process_first(local=False):
            found = json.loads(path.read_text()) if path.exists() else {}
            if found.get("asked") != asked:
                shows = not arguments.disable_tqdm and arguments.process_index == 0
                settings = {"target": self.target, "layers": self.layers, "speed": self.speed, "progress": shows}
                schedule = search_retention(model.to(arguments.device), rows, seed=arguments.seed, **settings)
                found = {"asked": asked, "schedule": schedule}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, json.dumps(found, indent=1))
        return found["schedule"]

    def settings(self) -> dict[str, Any]:
        return json.loads(json.dumps(super().settings()))  # as files give them back: lists, no tuples

    def make_trainer(self, output_dir, model, train_dataset, eval_dataset, tokenizer, **training_arguments):
        arguments = self.make_arguments(output_dir, eval_dataset is not None, **training_arguments)
        if model.config.coarsening is not None:
            raise ValueError(
                f"the model's texts become shorter already (config.coarsening={model.config.coarsening}): load the "
                "one that it was made of."
            )
        settings = self.settings_for(self.schedule_for(model, train_dataset, tokenizer, arguments))
        check_coarsening(settings, model.config.num_hidden_layers)
        unshortened = None if self.needs_labels else copy.deepcopy(model)
        model.config.coarsening = settings
        if unshortened is None:
            return super().make_trainer(
                output_dir, model, train_dataset, eval_dataset, tokenizer, **training_arguments
            )
        return self.trainer_class(
            model,
            arguments,
            teacher=unshortened,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )
