"""`train`: both stages of FastBERT in one call, from texts to a model that answers at any speed."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from transformers import (
    Pipeline,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from ..evaluation.exit_record import record_exits
from ..evaluation.task_metrics import ALL_METRICS, METRICS
from ..modeling.exit_policies import check_speed
from ..modeling.modeling_fastbert import FastBertForSequenceClassification
from ..sharing.model_card import Measured, write_model_card
from .checkpoints import last_checkpoint
from .settings_files import changes_the_model, check_settings, digest_of, digest_of_weights
from .stages import Stage, is_finished, run_stage
from .starting_model import StartingModel


if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    from ..data import Splits


# What is a field of a stage, or done with the result.
NOT_OF_ALL_STAGES = {
    "learning_rate": "give it to a stage: stages=[FineTuning(learning_rate=2e-5), ExitTraining(learning_rate=2e-4)]",
    "num_train_epochs": "give it to a stage: stages=[FineTuning(num_train_epochs=3), ExitTraining()]",
    "temperature": "give it to a stage: stages=[ExitTraining(temperature=2.0)]",
    "push_to_hub": "push the result: trained.model.push_to_hub(name, tokenizer=trained.tokenizer)",
}
SHOWN_ON_THE_CARD = ("per_device_train_batch_size", "seed")


@dataclass(frozen=True)
class Trained:
    """
    What [`train`] returns.

    Args:
        model ([`FastBertForSequenceClassification`]): In eval mode, on the device of the training.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        table (`pandas.DataFrame`, *optional*):
            What each speed gave and cost on the rows of the evaluation, as [`sweep_speeds`] tells it; of several
            processes, the main one has it.
    """

    model: FastBertForSequenceClassification
    tokenizer: PreTrainedTokenizerBase
    table: pd.DataFrame | None = None

    def pipeline(self, **kwargs) -> Pipeline:
        """Return the pipeline of the model's task, such as `"fast-text-classification"`, with further arguments."""
        return pipeline(f"fast-{self.model.config.task}", model=self.model, tokenizer=self.tokenizer, **kwargs)


def train(
    model: str | os.PathLike | PreTrainedModel,
    train_rows: Any,
    eval_rows: Any = None,
    *,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    output_dir: str | os.PathLike | None = None,
    unlabeled: Any = None,
    stages: Sequence[Stage] | None = None,
    config: Mapping[str, Any] | None = None,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    max_length: int | None = None,
    eval_speeds: Sequence[float] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8),
    dataset_name: str | None = None,
    **training_arguments,
) -> Trained:
    """
    Train FastBERT on texts: fine-tune a pretrained encoder on their labels (stage 1) and teach its exits the answers
    of the last one (stage 2). A classifier that is fine-tuned already goes through stage 2 alone, which needs no
    labels.

    With an `output_dir`, an interrupted call goes on where its last checkpoint was when it is made again, and a
    finished one trains nothing. Other rows or settings are refused there.

    Rows are a `datasets.Dataset`, a DataFrame, the path of a .csv, .tsv, .json or .jsonl file, or a list of dicts;
    texts without labels also a list of strings. Labels are names or numbers, and the model takes over their names.

    Args:
        model (`str`, `PathLike` or `PreTrainedModel`):
            A pretrained encoder, a fine-tuned stock classifier, or a FastBERT model. A loaded one is left as it is.
        train_rows (rows): What is learned from.
        eval_rows (rows, *optional*):
            What every speed is tried on. Without labels, agreement with the full model stands in for accuracy.
        tokenizer (`str`, `PathLike` or `PreTrainedTokenizerBase`, *optional*): That of the model unless given.
        output_dir (`str` or `PathLike`, *optional*):
            Folder of the finished model, its tokenizer and its card. Nothing is kept unless given.
        unlabeled (rows, *optional*): Further texts for stage 2.
        stages (sequence of [`Stage`], *optional*):
            What is trained, and how: `[FineTuning(), ExitTraining()]`, or for a fine-tuned model `[ExitTraining()]`,
            unless given.
        config (`Mapping`, *optional*):
            Fields of [`FastBertConfig`], such as `{"exit_type": "linear", "speed": 0.3}`. Here an encoder is told its
            task, unless that is one label for each text: `{"problem_type": "multi_label_classification"}`, where a
            row's label is a list of names, or a string of them with commas between; `{"problem_type": "regression",
            "tolerance": 0.25}`, where it is a number; `{"task": "token-classification"}`, for words (`tokens`, or
            `text_column`) and their tags (`label_column`), lists or strings with spaces between.
        text_column, text_pair_column, label_column (`str`):
            Where texts and labels are in all rows. A column `text_pair` is the second text of pairs, unless another is
            named.
        max_length (`int`, *optional*): Longer texts are cut to this many tokens; by the model's limit unless given.
        eval_speeds (sequence of `float`): Of the table, beside 0 and the config's own.
        dataset_name (`str`, *optional*): The data set, as the Hub calls it, for the model card.
        training_arguments:
            Fields of `TrainingArguments` for every stage: `per_device_train_batch_size=16`, `seed=1`, `bf16=True`, ...

    Returns:
        [`Trained`]

    Example:

    ```python
    >>> stages = [FineTuning(learning_rate=2e-5, num_train_epochs=3), ExitTraining(learning_rate=2e-4)]
    >>> trained = train("bert-base-uncased", "train.csv", "dev.csv", stages=stages, output_dir="outputs/my-model")
    >>> trained.table[["speed", "accuracy", "mean_exit_layer"]]
    >>> trained.pipeline(speed=0.5)("I would go there again.")

    >>> trained = train("org/my-finetuned-bert", texts)  # a list of strings
    ```
    """
    from ..data import Splits, dataset_of

    if eval_rows is not None:
        from ..evaluation import sweep_speeds  # before all training: it needs an extra
    check_training_arguments(training_arguments)
    start = StartingModel.of(model, tokenizer, dict(config or {}))
    check_best_metric(training_arguments.get("metric_for_best_model"), start.task_name)
    stages = start.stages() if stages is None else stages
    if not stages or not isinstance(stages, Sequence) or not all(isinstance(stage, Stage) for stage in stages):
        raise ValueError(f"stages must be a list of stages, got {stages!r}. Example: [FineTuning(), ExitTraining()]")
    for speed in eval_speeds:
        check_speed(speed)
    with ExitStack() as stack:
        if output_dir is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="fastbert-")))
        else:
            folder = Path(output_dir)
        keeps = output_dir is not None or training_arguments.get("load_best_model_at_end")
        settings = {"save_strategy": "epoch" if keeps else "no", "save_total_limit": 1, **training_arguments}
        # All of them now, so that what is wrong with the last stage is not found after the first.
        arguments, *_ = [stage.make_arguments(folder, eval_rows is not None, **settings) for stage in stages]
        if output_dir is None and arguments.world_size > 1:
            raise ValueError("the processes share their stages through a folder: give one, as output_dir='outputs'")
        splits = Splits(*(None if rows is None else dataset_of(rows) for rows in (train_rows, eval_rows, unlabeled)))
        columns = {"text_column": text_column, "text_pair_column": text_pair_column, "label_column": label_column}
        with arguments.main_process_first():
            encoded, label2id = start.encoded(splits, stages, columns, max_length)
        run = _Run(folder, start, stages, encoded, label2id, settings)
        run.train(arguments)
        fastbert = start.model_class.from_pretrained(folder).to(arguments.device)
        table = fastbert.measured = None
        if arguments.process_index == 0:
            if encoded.validation is not None:
                size, shows = arguments.per_device_eval_batch_size, not arguments.disable_tqdm
                record = record_exits(fastbert, encoded.validation, batch_size=size, progress=shows)
                table = sweep_speeds(fastbert, record, sorted({0.0, *eval_speeds, fastbert.config.speed}))
                fastbert.measured = Measured(table, rows=len(encoded.validation), dataset=dataset_name)
            if output_dir is not None:
                of_all = {name: getattr(arguments, name) for name in SHOWN_ON_THE_CARD}
                for_card = {**settings_of(stages), **of_all}
                write_model_card(folder, fastbert, fastbert.measured, model_name=folder.name, training=for_card)
    return Trained(fastbert, start.tokenizer, table)


@dataclass(frozen=True)
class _Run:
    """The stages of a training in the folders of each, below that of the finished model."""

    folder: Path
    start: StartingModel
    stages: Sequence[Stage]
    rows: Splits
    label2id: dict[str, int]
    training_arguments: dict[str, Any]

    def train(self, arguments: TrainingArguments) -> None:
        """Run every stage that is not finished. `arguments` are those of the first one."""
        folders = [self.folder / f"stage{number}_{stage.name}" for number, stage in enumerate(self.stages, start=1)]
        in_use = is_finished(self.folder)
        in_use = in_use or any(is_finished(path / "model") or last_checkpoint(path) is not None for path in folders)
        check_settings(self.folder, self.settings(arguments), in_use)
        if is_finished(self.folder):
            if arguments.process_index == 0:
                print(f"\n{self.folder} holds this training, finished.")
            return
        before = None
        for number, (stage, folder) in enumerate(zip(self.stages, folders, strict=True), start=1):

            def make_trainer(output_dir: str, stage=stage, before=before, number=number) -> Trainer:
                if arguments.process_index == 0:
                    print(f"\nStage {number} of {len(self.stages)}: {stage.name}.", flush=True)
                    checkpoint = last_checkpoint(output_dir)
                    if checkpoint is not None:
                        print(f"Going on from {checkpoint}.", flush=True)
                set_seed(arguments.seed)
                if before is None:
                    model = self.start.load(stage, self.label2id)
                else:
                    model = self.start.model_class.from_pretrained(before)
                rows = self.rows_of(stage), self.rows.validation
                return stage.make_trainer(output_dir, model, *rows, self.start.tokenizer, **self.training_arguments)

            before = run_stage(folder, None, make_trainer, self.folder if number == len(folders) else None)

    def rows_of(self, stage: Stage) -> Dataset:
        """Return the rows that a stage learns from."""
        if self.rows.unlabeled is None or stage.needs_labels:
            return self.rows.train
        from datasets import concatenate_datasets

        rows = self.rows.train
        return concatenate_datasets(
            [rows.remove_columns("labels") if "labels" in rows.column_names else rows, self.rows.unlabeled]
        )

    def settings(self, arguments: TrainingArguments) -> dict[str, Any]:
        """Return what the finished model depends on."""
        keeps_best = self.training_arguments.get("load_best_model_at_end")
        rows = {"training rows": self.rows.train, "unlabeled rows": self.rows.unlabeled}
        if keeps_best:
            rows["validation rows"] = self.rows.validation
        # When there is an evaluation or a checkpoint matters only where one of them is chosen.
        ignored = () if keeps_best else ("eval_", "save_")
        model = self.start.model
        return {
            "model": digest_of_weights(model) if isinstance(model, PreTrainedModel) else str(model),
            "labels": list(self.label2id),
            **{name: digest_of(part) for name, part in rows.items() if part is not None},
            **settings_of(self.stages),
            **self.start.config,
            **{
                name: value
                for name, value in self.training_arguments.items()
                if changes_the_model(name) and not name.startswith(ignored)
            },
            # Given or not.
            **{name: getattr(arguments, name) for name in (*SHOWN_ON_THE_CARD, "warmup_steps")},
        }


def settings_of(stages: Sequence[Stage]) -> dict[str, Any]:
    """Return how each stage learns, in one table."""
    return {f"{stage.name} {name}": value for stage in stages for name, value in stage.settings().items()}


def check_best_metric(metric: str | None, task_name: str) -> None:
    """Raise a `ValueError` if the best model is to be told by a metric that this task has not, or does not report."""
    asked = (metric or "loss").removeprefix("eval_").partition("_speed_")[0]
    reported = next(iter(METRICS[task_name]))
    if asked in ALL_METRICS and asked != reported:
        raise ValueError(
            f"metric_for_best_model={metric!r} is measured in no stage: give {reported!r} or 'loss', or what the "
            f"exits give at one of their eval_speeds, as '{reported}_speed_0.5'."
        )


def check_training_arguments(training_arguments: Mapping[str, Any]) -> None:
    """Raise unless all of these are fields of `TrainingArguments` that may be the same in every stage."""
    known = [*inspect.signature(TrainingArguments).parameters, *inspect.signature(train).parameters]
    for name in training_arguments:
        if name in NOT_OF_ALL_STAGES:
            raise ValueError(f"{name} is no argument of all stages: {NOT_OF_ALL_STAGES[name]}.")
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {similar[0]!r}?" if similar else "give fields of TrainingArguments."
            raise TypeError(f"train() got an unexpected keyword argument {name!r}: {hint}")
