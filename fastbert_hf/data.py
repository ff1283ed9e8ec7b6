"""
Read texts and labels from files or from the Hub, check them, and encode them for a model.

```python
>>> train = load_rows("train.tsv")
>>> check_rows(train, label_column="label")
>>> label2id = {name: index for index, name in enumerate(label_names(train))}
>>> train = encode(train, tokenizer, label2id)
```
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase


try:
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError
except ImportError as error:
    raise ImportError('fastbert_hf.data needs its extra: pip install "fastbert-hf[data]"') from error


# Texts are read as they are: "NA" is a word, and in a TSV file a quotation mark is a character like any other.
FILE_KINDS = {
    ".csv": {"path": "csv", "keep_default_na": False},
    ".tsv": {"path": "csv", "keep_default_na": False, "delimiter": "\t", "quoting": csv.QUOTE_NONE},
    ".json": {"path": "json"},
    ".jsonl": {"path": "json"},
}
MIN_ROWS_TO_HOLD_OUT = 20


def load_rows(path: str | os.PathLike) -> Dataset:
    """
    Read a file of rows, with all of its columns.

    Args:
        path (`str` or `PathLike`):
            A `.csv` or `.tsv` file with a header, or a `.json` or `.jsonl` file with an object on each line. Each may
            be compressed (`.tsv.gz`).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: give a file with a header and rows")
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in FILE_KINDS:
        raise ValueError(
            f"{path} ends with {kind or 'nothing'!r}: give .csv, .tsv, .json or .jsonl, also followed by .gz"
        )
    try:
        return load_dataset(**FILE_KINDS[kind], data_files={"rows": str(path)})["rows"]
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{path} has no rows below its header") from error
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as {kind[1:]}: {reason}") from error


def load_hub_rows(name: str, config_name: str | None = None) -> tuple[Dataset, Dataset | None]:
    """
    Load the split `train` of a data set on the Hub, and its split `validation`, or else `test`, or else `None`.

    Args:
        name (`str`): Name of the data set, or a folder that `datasets.load_dataset` can read.
        config_name (`str`, *optional*): Configuration of the data set.
    """
    try:
        splits = load_dataset(name, config_name)
    except Exception as error:  # the library has no common class for what can go wrong on the way to a data set
        raise ValueError(f"the data set {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    if "train" not in splits:
        raise ValueError(f"the data set {name} has no split 'train', only {', '.join(splits)}")
    return splits["train"], splits.get("validation", splits.get("test"))


def hold_out(rows: Dataset, seed: int = 42) -> tuple[Dataset, Dataset]:
    """Split off a random tenth of the training rows for validation; return the other rows and this tenth."""
    if len(rows) < MIN_ROWS_TO_HOLD_OUT:
        raise ValueError(f"{len(rows)} training rows are too few to hold out a tenth of them: give validation rows")
    parts = rows.train_test_split(test_size=0.1, seed=seed)
    return parts["train"], parts["test"]


def sample(rows: Dataset, max_rows: int | None, seed: int = 42) -> Dataset:
    """Return at most `max_rows` random rows, or all rows as they are for `None`."""
    if max_rows is None or max_rows >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(max_rows))


def check_rows(
    rows: Dataset,
    name: str = "training",
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str | None = None,
) -> None:
    """
    Raise a `ValueError` if there are no rows, if a column is missing, or if a row has no text.

    Args:
        rows (`Dataset`): From [`load_rows`] or [`load_hub_rows`].
        name (`str`): What the rows are, for the message.
        text_column (`str`): Column of the text.
        text_pair_column (`str`, *optional*): Column of the second text, for pairs.
        label_column (`str`, *optional*): Column of the label, where the rows need one. [`label_names`] and [`encode`]
            check its values.
    """
    if len(rows) == 0:
        raise ValueError(f"the {name} data has no rows")
    texts = {"text_column": text_column, "text_pair_column": text_pair_column}
    for argument, column in {**texts, "label_column": label_column}.items():
        if column is not None and column not in rows.column_names:
            raise ValueError(
                f"the {name} data has no column {column!r}, only {', '.join(rows.column_names)}: correct {argument}"
            )
    for column in filter(None, texts.values()):
        empty = [row for row, text in enumerate(rows[column]) if text is None or not str(text).strip()]
        if empty:
            raise ValueError(
                f"{len(empty)} rows of the {name} data have no text in {column!r} (the first is row {empty[0]}, "
                "counted from 0): remove them"
            )


def label_names(rows: Dataset, label_column: str = "label") -> list[str]:
    """
    Return the names of the labels, in the order of their ids: those of the column's `ClassLabel`, or else the sorted
    values of the column.

    Args:
        rows (`Dataset`): The training rows.
        label_column (`str`): Column of the label, a string or a whole number.
    """
    feature = rows.features[label_column]
    if getattr(feature, "names", None):
        return feature.names
    values = set(rows[label_column])
    if None in values or "" in values:
        raise ValueError(f"the training data has rows without a label in {label_column!r}: remove them")
    if any(isinstance(value, float) for value in values):
        raise ValueError(f"the labels in {label_column!r} are fractions: give classes, as regression is not supported")
    if len(values) < 2:
        raise ValueError(f"the training data has {len(values)} label ({values.pop()!r}): give rows of at least two")
    return [str(value) for value in sorted(values)]


def encode(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    label2id: dict[str, int] | None = None,
    name: str = "training",
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    max_length: int = 128,
) -> Dataset:
    """
    Turn texts into token ids, and names of labels into the ids of `labels`. All other columns are left out.

    Args:
        rows (`Dataset`): From [`load_rows`] or [`load_hub_rows`].
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        label2id (`dict`, *optional*): The id of each label. Without it, the rows get no `labels`.
        name (`str`): What the rows are, for messages.
        text_column (`str`): Column of the text.
        text_pair_column (`str`, *optional*): Column of the second text, for pairs.
        label_column (`str`): Column of the label: names or ids of `label2id`.
        max_length (`int`): Longer texts are cut to this many tokens.
    """
    columns = [column for column in (text_column, text_pair_column) if column]
    labels = None if label2id is None else _label_ids(rows, label2id, name, label_column)

    def tokenize(batch, indices):
        texts = ([str(text) for text in batch[column]] for column in columns)
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        if labels is not None:
            encoded["labels"] = [labels[index] for index in indices]
        return encoded

    description = f"Tokenizing {name} data"
    return rows.map(tokenize, batched=True, with_indices=True, remove_columns=rows.column_names, desc=description)


def _label_ids(rows: Dataset, label2id: dict[str, int], name: str, label_column: str) -> list[int]:
    """Return the id of each row's label, which the column has by its name or by its id."""
    class_names = getattr(rows.features[label_column], "names", None)
    # Some data sets mark rows without a label with -1.
    values = [
        class_names[value] if class_names and value is not None and value >= 0 else str(value)
        for value in rows[label_column]
    ]
    are_ids = all(value.isdecimal() and int(value) < len(label2id) for value in values)
    if are_ids and not set(values) <= label2id.keys():
        label2id = {value: int(value) for value in values}
    unknown = sorted(set(values) - label2id.keys())
    if unknown:
        count, known = sum(value in unknown for value in values), ", ".join(map(repr, label2id))
        raise ValueError(
            f"{count} rows of the {name} data have the label {', '.join(map(repr, unknown))}, which the model does "
            f"not learn (it knows {known}): add training rows with it, or remove these"
        )
    return [label2id[value] for value in values]
