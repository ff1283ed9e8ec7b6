"""
FastBERT and its baselines as settings: which exits, what is taught in which order, and when a text leaves.

| recipe | exits | stages | policy |
|---|---|---|---|
| `fastbert` | attention | fine-tuning, self-distillation | entropy |
| `fastbert_joint_first` | attention | the objective of PABEE, then self-distillation | entropy |
| `fastbert_without_self_distillation` | attention | all exits and the backbone at once | entropy |
| `deebert` | linear | fine-tuning, cross entropy of the students | entropy |
| `pabee` | linear, one shared pooler | all exits and the backbone at once (weighted: deeper ones more) | patience |
| `bert_kl` | the last one alone | fine-tuning of the first k layers | none |
| `distilled_kl` | the last one alone | fine-tuning of all layers, whose answers the first k then learn | none |

FastBERT without adaptive inference (a fixed depth) is the model of `fastbert`, called with `max_layers` at speed 0.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from ..modeling.modeling_fastbert import FastBertForSequenceClassification
from .settings_files import changes_the_model, digest_of
from .stages import (
    Distillation,
    ExitTraining,
    FineTuning,
    Stage,
    StageSettings,
    copy_weights,
    run_stage,
)


@dataclass(frozen=True)
class Recipe:
    """
    A way to train an early-exit classifier.

    Args:
        stages (`tuple` of [`Stage`]): What is trained, in order. [`train_recipe`] sets how long and how fast.
        config (`dict`): Fields of [`FastBertConfig`] that differ from their defaults.
        fixed_depth (`bool`): Whether the model has only its first `num_hidden_layers` layers, and no dial.
        source (`str`): The paper.
    """

    stages: tuple[Stage, ...]
    config: dict[str, Any] = field(default_factory=dict)
    fixed_depth: bool = False
    source: str = "FastBERT, ACL 2020"

    def exits_that_matter(self, stage: Stage) -> str:
        """Return the structure of the exits that learned up to this stage, as a part of its folder's name."""
        students = self.config.get("exit_type", "attention")
        teacher = self.config.get("teacher_exit_type", students)
        shared = "_shared" * self.config.get("share_exit_pooler", False)
        if not stage.trains_students:
            return teacher + (shared if teacher == students else "")
        return students + shared + (f"_under_{teacher}" if teacher != students else "")


RECIPES = {
    "fastbert": Recipe((FineTuning(), ExitTraining(objective="self_distillation"))),
    "fastbert_joint_first": Recipe(
        (ExitTraining(objective="weighted_cross_entropy"), ExitTraining(objective="self_distillation")),
        source="FastBERT after the joint training of PABEE",
    ),
    "fastbert_without_self_distillation": Recipe(
        (ExitTraining(objective="joint_cross_entropy"),), source="FastBERT, ACL 2020, Table 3"
    ),
    "deebert": Recipe(
        (FineTuning(), ExitTraining(objective="frozen_cross_entropy")),
        {"exit_type": "linear"},
        source="DeeBERT, ACL 2020",
    ),
    "pabee": Recipe(
        (ExitTraining(objective="weighted_cross_entropy"),),
        {"exit_type": "linear", "share_exit_pooler": True, "exit_policy": "patience"},
        source="PABEE, NeurIPS 2020",
    ),
    "bert_kl": Recipe((FineTuning(),), {"exit_type": "linear"}, True, "CascadeBERT, EMNLP 2021, section 2.1"),
    "distilled_kl": Recipe(
        (FineTuning(), Distillation()),
        {"exit_type": "linear"},
        True,
        "FastBERT, ACL 2020, Table 2: the part of DistilBERT",
    ),
}

# Fields of the config that are in the name of a stage's folder, or that each recipe sets after the training.
NOT_IN_THE_SETTINGS = ("exit_type", "teacher_exit_type", "share_exit_pooler", "exit_policy")


def get_recipe(name: str) -> Recipe:
    """Return the recipe of a name, or raise a `ValueError` that lists the known ones."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not known; choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]


def train_recipe(
    recipe: Recipe,
    backbone: str | os.PathLike,
    output_dir: str | os.PathLike,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    whole_model: StageSettings,
    exits_alone: StageSettings,
    id2label: dict[int, str],
    num_hidden_layers: int | None = None,
    unlabeled_dataset: Dataset | None = None,
    **training_arguments,
) -> FastBertForSequenceClassification:
    """
    Run the stages of a recipe. Each is saved in a folder of `output_dir` named after the exits and the stages so far,
    with its log. A finished stage is not repeated, so recipes with one `output_dir` share what they have in common.

    Args:
        recipe ([`Recipe`]): A value of `RECIPES`, or one of your own.
        backbone (`str` or `PathLike`): Pretrained encoder.
        output_dir (`str` or `PathLike`): Folder of the stages, of one backbone and one data set.
        train_dataset, eval_dataset (`Dataset`): Tokenized rows with `labels`.
        tokenizer: The backbone's tokenizer.
        whole_model ([`StageSettings`]): For stages that train the backbone.
        exits_alone ([`StageSettings`]): For stages that train the students alone.
        id2label (`dict`): Names of the labels.
        num_hidden_layers (`int`, *optional*): k, for recipes of a fixed depth.
        unlabeled_dataset (`Dataset`, *optional*): Further tokenized rows for self-distillation, without labels.
        training_arguments: Further fields of `TrainingArguments`, for every stage.

    Returns:
        [`FastBertForSequenceClassification`], reloaded from its folder, in eval mode, on the device of the training.
    """
    if recipe.fixed_depth != (num_hidden_layers is not None):
        wanted = "num_hidden_layers=k, the layers that it keeps" if recipe.fixed_depth else "no num_hidden_layers"
        raise ValueError(f"this recipe takes {wanted}; got num_hidden_layers={num_hidden_layers}.")
    label2id = {name: index for index, name in id2label.items()}
    device = TrainingArguments(str(output_dir), **training_arguments).device
    model = None
    stages = [stage.with_settings(whole_model if stage.trains_backbone else exits_alone) for stage in recipe.stages]
    folders = stage_folders(recipe, output_dir, num_hidden_layers, unlabeled_dataset is not None)
    for number, (stage, folder) in enumerate(zip(stages, folders, strict=True), start=1):
        # The stages before the last one of a fixed depth train all layers.
        depth = num_hidden_layers if number == len(stages) else None
        rows = train_dataset
        if unlabeled_dataset is not None and not stage.needs_labels:
            rows = concatenate_datasets([train_dataset.remove_columns("labels"), unlabeled_dataset])

        def make_trainer(output_dir: str, stage=stage, before=model, depth=depth, rows=rows) -> Trainer:
            prepared = stage.prepare_rows(rows, before, tokenizer)
            set_seed(training_arguments.get("seed", 42))
            student = FastBertForSequenceClassification.from_backbone(
                backbone,
                num_hidden_layers=depth,
                id2label=id2label,
                label2id=label2id,
                min_exit_layer=depth,  # with a fixed depth, the exits below it learn nothing
                **recipe.config,
            )
            if before is not None:
                copy_weights(before, student)
            return stage.make_trainer(output_dir, student, prepared, eval_dataset, tokenizer, **training_arguments)

        settings = {
            "backbone": str(backbone),
            "labels": list(id2label.values()),
            "data": digest_of(rows),
            **stage.settings(),
            **{name: value for name, value in recipe.config.items() if name not in NOT_IN_THE_SETTINGS},
            **{name: value for name, value in training_arguments.items() if changes_the_model(name)},
        }
        model_dir = run_stage(folder, settings, make_trainer)
        model = FastBertForSequenceClassification.from_pretrained(model_dir).to(device)
    # The stage may have been trained for another recipe, which lets texts leave by another policy.
    model.config.exit_policy = recipe.config.get("exit_policy", "entropy")
    return model


def stage_folders(
    recipe: Recipe, output_dir: str | os.PathLike, num_hidden_layers: int | None = None, unlabeled: bool = False
) -> list[Path]:
    """Return where [`train_recipe`] keeps each stage: its `settings.json`, and its model and log in `model/`."""
    folders, done = [], []
    for number, stage in enumerate(recipe.stages, start=1):
        if num_hidden_layers is not None and number == len(recipe.stages):
            done.append(f"{stage.name}_{num_hidden_layers}")
        else:
            done.append(stage.name + "_unlabeled" * (unlabeled and not stage.needs_labels))
        folders.append(Path(output_dir) / "-".join([recipe.exits_that_matter(stage), *done]))
    return folders
