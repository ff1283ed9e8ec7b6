"""
FastBERT and its rivals as settings: which exits, what is taught in which order, and when a text leaves.

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

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from ..evaluation.exit_record import record_exits
from ..evaluation.speed_sweep import write_whole
from ..modeling.modeling_fastbert import FastBertForSequenceClassification
from .arguments import SelfDistillationArguments
from .objectives import OBJECTIVES
from .self_distillation_trainer import SelfDistillationTrainer, accuracy


@dataclass(frozen=True)
class Recipe:
    """
    Args:
        stages (`tuple` of `str`):
            In order: `"fine_tuning"` (backbone and last exit, the stock `Trainer`), `"distillation"` (the first layers
            of that model learn its answers), or a key of [`OBJECTIVES`].
        config (`dict`): Fields of [`FastBertConfig`] that differ from their defaults.
        fixed_depth (`bool`): Whether the model has only its first `num_hidden_layers` layers, and no dial.
        source (`str`): The paper.
    """

    stages: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    fixed_depth: bool = False
    source: str = "FastBERT, ACL 2020"

    def exits_that_matter(self, stage: str) -> str:
        """The structure of the exits that learned up to this stage, as a part of its folder's name."""
        students = self.config.get("exit_type", "attention")
        teacher = self.config.get("teacher_exit_type", students)
        shared = "_shared" * self.config.get("share_exit_pooler", False)
        if stage in ("fine_tuning", "distillation"):
            return teacher + (shared if teacher == students else "")
        return students + shared + (f"_under_{teacher}" if teacher != students else "")


RECIPES = {
    "fastbert": Recipe(("fine_tuning", "self_distillation")),
    "fastbert_joint_first": Recipe(
        ("weighted_cross_entropy", "self_distillation"), source="FastBERT after the joint training of PABEE"
    ),
    "fastbert_without_self_distillation": Recipe(("joint_cross_entropy",), source="FastBERT, ACL 2020, Table 3"),
    "deebert": Recipe(("fine_tuning", "frozen_cross_entropy"), {"exit_type": "linear"}, source="DeeBERT, ACL 2020"),
    "pabee": Recipe(
        ("weighted_cross_entropy",),
        {"exit_type": "linear", "share_exit_pooler": True, "exit_policy": "patience"},
        source="PABEE, NeurIPS 2020",
    ),
    "bert_kl": Recipe(("fine_tuning",), {"exit_type": "linear"}, True, "CascadeBERT, EMNLP 2021, section 2.1"),
    "distilled_kl": Recipe(
        ("fine_tuning", "distillation"),
        {"exit_type": "linear"},
        True,
        "FastBERT, ACL 2020, Table 2: the part of DistilBERT",
    ),
}


# What is in the name of a stage's folder, and what leaves no trace in its model.
NAMED_BY_THE_FOLDER = ("exit_type", "teacher_exit_type", "share_exit_pooler", "exit_policy")
WITHOUT_EFFECT = ("use_cpu", "report_to", "logging_steps", "disable_tqdm", "per_device_eval_batch_size")


def get_recipe(name: str) -> Recipe:
    """The recipe of a name, or a `ValueError` that lists the known ones."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not known; choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]


@dataclass
class StageSettings:
    """
    Args:
        learning_rate (`float`): Initial learning rate.
        num_train_epochs (`float`): Passes over the training rows.
        temperature (`float`): Of self-distillation.
    """

    learning_rate: float
    num_train_epochs: float
    temperature: float = 1.0


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
    Runs the stages of a recipe. Each is saved in a folder of `output_dir` named after the exits and the stages so far,
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
    model, folders = None, stage_folders(recipe, output_dir, num_hidden_layers, unlabeled_dataset is not None)
    for stage, folder in zip(recipe.stages, folders, strict=True):
        depth = num_hidden_layers if stage == recipe.stages[-1] else None
        alone = stage in OBJECTIVES and OBJECTIVES[stage].freezes_teacher
        settings = exits_alone if alone else whole_model
        rows = train_dataset
        if stage == "self_distillation" and unlabeled_dataset is not None:
            rows = concatenate_datasets([train_dataset.remove_columns("labels"), unlabeled_dataset])
        _check_settings(
            folder,
            {
                "backbone": str(backbone),
                "labels": list(id2label.values()),
                "data": _digest(rows),
                "learning_rate": settings.learning_rate,
                "num_train_epochs": settings.num_train_epochs,
                **({"temperature": settings.temperature} if stage == "self_distillation" else {}),
                **{name: value for name, value in recipe.config.items() if name not in NAMED_BY_THE_FOLDER},
                **{name: value for name, value in training_arguments.items() if name not in WITHOUT_EFFECT},
            },
        )
        if not (folder / "model").exists():
            if stage == "distillation":
                rows = _with_answers_of(model.to(device), train_dataset, tokenizer)
            set_seed(training_arguments.get("seed", 42))
            student = FastBertForSequenceClassification.from_backbone(
                backbone,
                num_hidden_layers=depth,
                id2label=id2label,
                label2id=label2id,
                min_exit_layer=depth,  # with a fixed depth, the exits below it learn nothing
                **recipe.config,
            )
            if model is not None:
                _take_over(student, model)
            _train_stage(stage, student, folder, settings, rows, eval_dataset, tokenizer, training_arguments)
        model = FastBertForSequenceClassification.from_pretrained(folder / "model")
    # The stage may have been trained for another recipe, which lets texts leave by another policy.
    model.config.exit_policy = recipe.config.get("exit_policy", "entropy")
    return model.to(device)


def stage_folders(
    recipe: Recipe, output_dir: str | os.PathLike, num_hidden_layers: int | None = None, unlabeled: bool = False
) -> list[Path]:
    """Where [`train_recipe`] keeps each stage: its model in `model/`, with `log.json`, and its `settings.json`."""
    folders, done = [], []
    for stage in recipe.stages:
        if num_hidden_layers is not None and stage == recipe.stages[-1]:
            stage_name = f"{stage}_{num_hidden_layers}"
        else:
            stage_name = stage + "_unlabeled" * (unlabeled and stage == "self_distillation")
        done.append(stage_name)
        folders.append(Path(output_dir) / "-".join([recipe.exits_that_matter(stage), *done]))
    return folders


def _take_over(model: FastBertForSequenceClassification, before: FastBertForSequenceClassification) -> None:
    """What the stage before has left: the layers that are still there, and exits of the same structure."""
    layers = before.fastbert.state_dict()
    model.fastbert.load_state_dict({name: layers[name] for name in model.fastbert.state_dict()})
    parts = [*zip(model.students, before.students, strict=False), (model.teacher, before.teacher)]
    if model.shared_pooler is not None and before.shared_pooler is not None:
        parts.append((model.shared_pooler, before.shared_pooler))
    for part, old in parts:
        own, given = part.state_dict(), old.state_dict()
        if {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in given.items()}:
            part.load_state_dict(given)


def _with_answers_of(
    model: FastBertForSequenceClassification, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """The rows with the probabilities of the full model in place of their labels."""
    record = record_exits(model, rows, DataCollatorWithPadding(tokenizer))
    answers = record.exit_logits[:, -1].softmax(-1).tolist()
    return rows.remove_columns("labels").add_column("labels", answers)


def _train_stage(
    stage: str,
    model: FastBertForSequenceClassification,
    folder: Path,
    settings: StageSettings,
    rows: Dataset,
    eval_dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    training_arguments: dict[str, Any],
) -> None:
    arguments = {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.num_train_epochs,
        "warmup_steps": 0.1,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        **training_arguments,
    }
    data = {"train_dataset": rows, "eval_dataset": eval_dataset, "processing_class": tokenizer}
    if stage in OBJECTIVES:
        arguments = SelfDistillationArguments(objective=stage, temperature=settings.temperature, **arguments)
        trainer = SelfDistillationTrainer(model, arguments, **data)
    else:
        trainer = Trainer(model, TrainingArguments(**arguments), compute_metrics=accuracy, **data)
    trainer.train()
    part = folder / "part"
    trainer.save_model(str(part))
    if trainer.is_world_process_zero():
        (part / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))
        os.replace(part, folder / "model")
    trainer.accelerator.wait_for_everyone()


def _digest(rows: Dataset) -> str:
    """What tells these rows from others."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row["input_ids"], row.get("labels"))).encode())
    return digest.hexdigest()[:16]


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """A finished stage is used again only where it was trained as this run asks."""
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not (folder / "model").exists():
        write_whole(path, json.dumps(settings, indent=1) + "\n")
        return
    before = json.loads(path.read_text())
    names = sorted({*before, *settings})
    changed = [name for name in names if before.get(name) != settings.get(name)]
    if changed:
        differences = ", ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in changed)
        raise ValueError(f"{folder} holds this stage with other settings ({differences}): give another output_dir.")
