"""What the example scripts share: texts and labels from files or the Hub, checked before any work is put into them."""

from __future__ import annotations

import csv
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn


@dataclass
class TextColumns:
    """Where the texts and labels are."""

    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of the second text of a pair."})
    label_column: str = field(default="label", metadata={"help": "Column of the label, a string or a number."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})


@dataclass
class TextDataArguments(TextColumns):
    """Training data."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the data: a file that is not where its path says is looked for below it. "
            "The environment variable FASTBERT_DATA if none."
        },
    )
    train_file: str | None = field(default=None, metadata={"help": "CSV, TSV or JSON lines, also .gz."})
    validation_file: str | None = field(
        default=None, metadata={"help": "The same; a tenth of the training rows stands in where there is none."}
    )
    unlabeled_file: str | None = field(default=None, metadata={"help": "Further texts for stage 2, without labels."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many random rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many random rows."})


def fail(message: str) -> NoReturn:
    """Ends with one line."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")


def find_file(path: str, name: str, data_dir: str | None) -> str:
    """Where the file of the option `name` is: as its path says, else below the folder of the data."""
    if Path(path).is_file():
        return path
    if data_dir and Path(data_dir, path).is_file():
        return str(Path(data_dir, path))
    if Path(path).is_absolute():
        fail(f"there is no file {path}: correct --{name}")
    if data_dir:
        fail(f"there is no file {path}: correct --{name}, or --data_dir, as it is not below {data_dir} either")
    fail(f"there is no file {path}: correct --{name}, or name its folder with --data_dir or FASTBERT_DATA")


def check_files(script: TextDataArguments) -> None:
    """Which data, before a look into them. Puts the files where they were found into the arguments."""
    if script.train_file and script.dataset_name:
        fail("give --train_file or --dataset_name, not both")
    if not script.train_file and not script.dataset_name and (script.validation_file or script.unlabeled_file):
        fail("give --train_file or --dataset_name, too")
    if script.data_dir is not None and not Path(script.data_dir).is_dir():
        fail(f"there is no folder {script.data_dir!r}: correct --data_dir")
    data_dir = script.data_dir or os.environ.get("FASTBERT_DATA")
    for name in ("train_file", "validation_file", "unlabeled_file"):
        if getattr(script, name) is None:
            continue
        path = find_file(getattr(script, name), name, data_dir)
        if Path(path).stat().st_size == 0:
            fail(f"{path} is empty: give a --{name} with a header and rows")
        setattr(script, name, path)


def load_file(path: str):
    """A CSV, TSV or JSON file as a `Dataset` with its columns as they are."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind = Path(path.removesuffix(".gz")).suffix
    if kind in (".json", ".jsonl"):
        arguments = {"path": "json"}
    elif kind == ".csv":
        arguments = {"path": "csv", "keep_default_na": False}
    elif kind == ".tsv":
        arguments = {"path": "csv", "keep_default_na": False, "delimiter": "\t", "quoting": csv.QUOTE_NONE}
    else:
        fail(f"{path} ends with {kind or 'nothing'!r}: give .csv, .tsv, .json or .jsonl, also followed by .gz")
    try:
        return load_dataset(**arguments, data_files={"rows": path})["rows"]
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):
            fail(f"{path} has no rows below its header")
        reason = str(error.__cause__ or error).splitlines()[0]
        fail(f"{path} cannot be read as {kind[1:]}: {reason}")


def load_data(script: TextDataArguments, seed: int):
    """The training rows, the validation rows and the further texts of stage 2 (or `None`)."""
    if script.dataset_name:
        from datasets import load_dataset

        try:
            splits = load_dataset(script.dataset_name, script.dataset_config_name)
        except Exception as error:  # the library has no common class for what can go wrong on the way to a data set
            fail(f"the data set {script.dataset_name} cannot be loaded: {str(error).splitlines()[0]}")
        if "train" not in splits:
            fail(f"the data set {script.dataset_name} has no split 'train', only {', '.join(splits)}")
        train = splits["train"]
        validation = splits.get("validation", splits.get("test"))
        if script.validation_file:
            validation = load_file(script.validation_file)
    else:
        train = load_file(script.train_file)
        validation = load_file(script.validation_file) if script.validation_file else None
    if validation is None:
        if len(train) < 20:
            fail(f"{len(train)} training rows are too few to hold out a tenth of them: give --validation_file")
        print("No validation rows were given: a tenth of the training rows stands in for them.")
        held_out = train.train_test_split(test_size=0.1, seed=seed)
        train, validation = held_out["train"], held_out["test"]
    unlabeled = load_file(script.unlabeled_file) if script.unlabeled_file else None
    if script.max_train_samples and script.max_train_samples < len(train):
        train = train.shuffle(seed=seed).select(range(script.max_train_samples))
    if script.max_eval_samples and script.max_eval_samples < len(validation):
        validation = validation.shuffle(seed=seed).select(range(script.max_eval_samples))
    return train, validation, unlabeled


def check_data(script: TextColumns, labeled: tuple[str, ...], **parts) -> None:
    """Rows, columns and texts, and labels in the parts named in `labeled`, before any work is put into them."""
    texts = [column for column in (script.text_column, script.text_pair_column) if column]
    for name, rows in parts.items():
        if rows is None:
            continue
        if len(rows) == 0:
            fail(f"the {name} data has no rows")
        options = {script.text_column: "text_column", script.text_pair_column: "text_pair_column"}
        wanted = [*texts]
        if name in labeled:
            wanted.append(script.label_column)
            options[script.label_column] = "label_column"
        for column in wanted:
            if column not in rows.column_names:
                fail(
                    f"the {name} data has no column {column!r}, only {', '.join(rows.column_names)}: "
                    f"correct --{options[column]}"
                )
        for column in texts:
            empty = [row for row, text in enumerate(rows[column]) if text is None or not str(text).strip()]
            if empty:
                fail(
                    f"{len(empty)} rows of the {name} data have no text in {column!r} (the first is row {empty[0]}, "
                    "counted from 0): remove them"
                )


def label_names(script: TextColumns, train) -> list[str]:
    """The labels of the training rows: the names that the data set brings, else the sorted values."""
    feature = train.features[script.label_column]
    if getattr(feature, "names", None):
        return feature.names
    values = set(train[script.label_column])
    if None in values or "" in values:
        fail(f"the training data has rows without a label in {script.label_column!r}: remove them")
    if any(isinstance(value, float) for value in values):
        fail(f"the labels in {script.label_column!r} are fractions: give classes, as regression is not supported")
    if len(values) < 2:
        fail(f"the training data has {len(values)} label ({values.pop()!r}): give rows of at least two")
    return [str(value) for value in sorted(values)]


def encode(script: TextColumns, tokenizer, rows, label2id: dict[str, int] | None = None, name: str = ""):
    """Token ids, and `labels` where `label2id` is given."""
    if label2id is not None:
        column, names = rows[script.label_column], getattr(rows.features[script.label_column], "names", None)
        # Some data sets mark rows without a label with -1.
        values = [names[value] if names and value is not None and value >= 0 else str(value) for value in column]
        are_ids = all(value.isdecimal() and int(value) < len(label2id) for value in values)
        if are_ids and not set(values) <= label2id.keys():
            label2id = {value: int(value) for value in values}
        unknown = sorted(set(values) - label2id.keys())
        if unknown:
            count, known = sum(value in unknown for value in values), ", ".join(map(repr, label2id))
            fail(
                f"{count} rows of the {name} data have the label {', '.join(map(repr, unknown))}, which the model "
                f"does not learn (it knows {known}): add training rows with it, or remove these"
            )

    def tokenize(batch, indices):
        columns = [column for column in (script.text_column, script.text_pair_column) if column]
        texts = ([str(text) for text in batch[column]] for column in columns)
        encoded = tokenizer(*texts, truncation=True, max_length=script.max_length)
        if label2id is not None:
            encoded["labels"] = [label2id[values[index]] for index in indices]
        return encoded

    description = f"Tokenizing {name} data"
    return rows.map(tokenize, batched=True, with_indices=True, remove_columns=rows.column_names, desc=description)
