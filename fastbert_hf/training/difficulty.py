"""Which training rows are hard for a model: those that it answers wrongly when it has not been trained on them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from tqdm.auto import tqdm
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..files import write_whole
from ..modeling.task_interface import Task
from ..modeling.tasks import task_of
from .checked_trainer import CheckedTrainer
from .difficulty_aware_trainer import check_one_label
from .settings_files import changes_the_model, check_settings, digest_of, digest_of_weights


# The arguments of every training here, in place of the caller's own; beside its seed and its folder.
REPLACED = {
    "disable_tqdm": True,
    "save_strategy": SaveStrategy.NO,
    "eval_strategy": IntervalStrategy.NO,
    "eval_on_start": False,
    "eval_do_concat_batches": True,
    "prediction_loss_only": False,
    "push_to_hub": False,
}
# The caller's own that are without effect, as no training here saves or evaluates; and how the names of others begin.
IGNORED = (*REPLACED, "seed", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")
IGNORED_BEGIN = ("eval_", "save_")


def label_difficulty(
    model_init: Callable[[], PreTrainedModel],
    args: TrainingArguments,
    dataset: Dataset,
    num_folds: int = 8,
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    processing_class: PreTrainedTokenizerBase | None = None,
    data_collator: DataCollator | None = None,
) -> Dataset:
    """
    Label each row as easy or hard for a model (CascadeBERT, Findings of EMNLP 2021, section 3.2). The rows are split
    at random into folds, the same for every seed. For each seed and fold a new model is trained on the other folds and
    answers the rows of this one. A row that is answered rightly under every seed is easy, any other is hard.

    These are `num_folds` times `len(seeds)` trainings. Each finished one leaves a small file in `args.output_dir`,
    such as `seed_1/fold_3_of_8.json`, with the numbers of the rows that were answered wrongly, and is not repeated:
    call again to continue after an interruption, or with more seeds.

    Args:
        model_init (`Callable`): Makes a new model, the same for the same seed; called after `set_seed(seed)`.
        args (`TrainingArguments`):
            Settings of each training, of which the seed and all that saves or evaluates are not used.
        dataset (`Dataset`): Tokenized rows with `labels`, the ids of classes.
        num_folds (`int`, *optional*, defaults to 8): K, from 2 to the number of rows.
        seeds (sequence of `int`, *optional*, defaults to 1 to 5): One model is trained for each of them and each fold.
        processing_class (`PreTrainedTokenizerBase`, *optional*): As in `Trainer`.
        data_collator (`DataCollator`, *optional*): As in `Trainer`.

    Returns:
        `Dataset`: The rows with the column `difficulty`, a `ClassLabel`: 0 is `easy`, 1 is `hard`.

    Example:

    ```python
    >>> def model_init():
    ...     return FastBertForSequenceClassification.from_backbone("bert-base-uncased", num_hidden_layers=2)

    >>> args = TrainingArguments("outputs/difficulty", learning_rate=1e-4, num_train_epochs=3)
    >>> texts = label_difficulty(model_init, args, texts, processing_class=tokenizer)
    >>> hard_shares(texts)
    {'0': 0.12, '1': 0.31, 'all': 0.2}
    ```
    """
    seeds = list(seeds)
    _check(dataset, num_folds, seeds)
    rows = dataset.with_format(None)
    folder = Path(args.output_dir)
    finished = any(folder.glob("seed_*/fold_*.json"))
    check_settings(folder, _settings(model_init, args, rows, num_folds), in_use=finished)
    folds = split_into_folds(len(rows), num_folds)
    difficulty = np.zeros(len(rows), dtype=np.int64)
    trainings = [(seed, number) for seed in seeds for number in range(1, num_folds + 1)]
    for seed, number in tqdm(trainings, desc="Labelling difficulty", unit="training", disable=args.disable_tqdm):
        path = folder / f"seed_{seed}" / f"fold_{number}_of_{num_folds}.json"
        if not path.exists():
            own_args = copy.copy(args)
            for name, value in {**REPLACED, "seed": seed, "output_dir": str(path.parent)}.items():
                setattr(own_args, name, value)
            set_seed(seed)
            others = np.sort(np.concatenate(folds[: number - 1] + folds[number:]))
            model = model_init()
            check_one_label(model)
            trainer = CheckedTrainer(
                model,
                own_args,
                data_collator=data_collator,
                train_dataset=rows.select(others),
                processing_class=processing_class,
                preprocess_logits_for_metrics=partial(_answers, task=task_of(model.config)),
            )
            # Without a progress bar the Trainer prints each log.
            trainer.remove_callback(PrinterCallback)
            right = _train_and_answer(trainer, rows.select(folds[number - 1]))
            if trainer.is_world_process_zero():
                content = {"rows": len(right), "wrong": folds[number - 1][~right].tolist()}
                write_whole(path, json.dumps(content) + "\n")
            trainer.accelerator.wait_for_everyone()
        difficulty[json.loads(path.read_text(encoding="utf-8"))["wrong"]] = 1
    return dataset.add_column("difficulty", difficulty, feature=ClassLabel(names=["easy", "hard"]))


def split_into_folds(num_rows: int, num_folds: int) -> list[np.ndarray]:
    """Return the numbers of the rows of each fold, always the same ones; the sizes of folds differ by at most one."""
    # Unlike the newer generators of NumPy, this one is promised never to change.
    order = np.random.RandomState(0).permutation(num_rows)
    return [np.sort(fold) for fold in np.array_split(order, num_folds)]


def hard_shares(dataset: Dataset, names: Sequence[str] | None = None) -> dict[str, float]:
    """
    Return the share of hard rows for each label, and for `"all"` rows.

    Args:
        dataset (`Dataset`): Rows with `labels` and `difficulty`, from [`label_difficulty`].
        names (sequence of `str`, *optional*): Names of the labels; their ids are shown unless given.
    """
    if len(dataset) == 0 or not {"labels", "difficulty"} <= set(dataset.column_names):
        raise ValueError(
            f"the shares need rows with 'labels' and 'difficulty', got {len(dataset)} rows with "
            f"{', '.join(dataset.column_names)}. Example: hard_shares(label_difficulty(model_init, args, dataset))"
        )
    labels, difficulty = (np.asarray(dataset[name][:]) for name in ("labels", "difficulty"))
    shares = {}
    for label in np.unique(labels).tolist():
        shares[str(label) if names is None else names[label]] = float(difficulty[labels == label].mean())
    return {**shares, "all": float(difficulty.mean())}


def _answers(logits: Any, labels: Any, task: Task) -> Any:
    """Return the answer to each row. A model may return more than its logits."""
    return task.predictions(logits[0] if isinstance(logits, tuple) else logits)


def _train_and_answer(trainer: CheckedTrainer, rows: Dataset) -> np.ndarray:
    """Train, and return for each of the rows whether it is answered rightly."""
    trainer.train()
    # Rows grouped by length would be answered in another order.
    trainer.args.train_sampling_strategy = "random"
    output = trainer.predict(rows)
    return output.predictions == output.label_ids


def _check(dataset: Dataset, num_folds: int, seeds: list[int]) -> None:
    """Raise a `ValueError` that shows the corrected call, unless the rows can be labelled."""
    if len(dataset) == 0:
        raise ValueError("the dataset has no rows: give tokenized rows with 'labels'.")
    for column, example in {
        "input_ids": "dataset.map(lambda row: tokenizer(row['text']))",
        "labels": "dataset.rename_column('label', 'labels')",
    }.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"the dataset has no column {column!r}, only {', '.join(dataset.column_names)}. Example: {example}"
            )
    if "difficulty" in dataset.column_names:
        raise ValueError(
            "the dataset has a column 'difficulty' already. To label it anew: dataset.remove_columns('difficulty')"
        )
    kind = str(getattr(dataset.features["labels"], "dtype", dataset.features["labels"]))
    if not kind.startswith(("int", "uint")):
        raise ValueError(f"labels must be the ids of classes, numbers such as 0 and 1, got {kind}.")
    if not 2 <= num_folds <= len(dataset):
        raise ValueError(
            f"num_folds must be from 2 to {len(dataset)}, the number of rows, got {num_folds}. The paper's is 8"
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more different numbers, got {seeds}. Example: seeds=(1, 2, 3, 4, 5)")


def _settings(
    model_init: Callable[[], PreTrainedModel], args: TrainingArguments, rows: Dataset, num_folds: int
) -> dict[str, Any]:
    """Return what the answers depend on."""
    defaults = TrainingArguments(args.output_dir, use_cpu=args.use_cpu).to_dict()
    given = {
        name: value
        for name, value in args.to_dict().items()
        if value != defaults.get(name)
        and changes_the_model(name)
        and name not in IGNORED
        and not name.startswith(IGNORED_BEGIN)
    }
    # The name of a model may stand for other weights elsewhere.
    set_seed(0)
    return {"num_folds": num_folds, "data": digest_of(rows), "model": digest_of_weights(model_init()), **given}
