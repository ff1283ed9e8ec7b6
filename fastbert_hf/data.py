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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .rows import encoded_rows
from .span_rows import encode_passages
from .word_rows import WORDS


try:
    from datasets import ClassLabel, Dataset, Value, load_dataset
    from datasets.exceptions import DatasetGenerationError

    from .label_kinds import BETWEEN_WORDS, LABEL_KINDS, LabelKind, parts
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
ONE_LABEL = "single_label_classification"


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


def dataset_of(rows: Any) -> Dataset:
    """
    Return rows as a data set.

    Args:
        rows (`Dataset`, path, DataFrame or Series of pandas, or iterable of `dict` or `str`):
            A data set is returned as it is, a file is read by [`load_rows`], and strings become the column `text`.
    """
    if isinstance(rows, Dataset):
        return rows
    if isinstance(rows, (str, os.PathLike)):
        return load_rows(rows)
    if hasattr(rows, "iloc") and hasattr(rows, "columns"):
        return _as_table(Dataset.from_pandas, rows, preserve_index=False)
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        splits = f" of {', '.join(map(repr, rows))}" if isinstance(rows, Mapping) else ""
        raise TypeError(
            f"rows must be a data set, a list of rows or the path of a file, got {type(rows).__name__}{splits}. "
            'Example: [{"text": "Fine.", "label": "good"}], or one split of a DatasetDict: splits["train"]'
        )
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    strange = next((number for number, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    if strange is not None:
        raise TypeError(
            f"row {strange} must be a text or a dict, got {rows[strange]!r:.40}. Example: "
            '{"text": "Fine.", "label": "good"}'
        )
    return _as_table(Dataset.from_list, rows)


def _as_table(make_dataset: Callable[..., Dataset], rows: Any, **settings) -> Dataset:
    try:
        return make_dataset(rows, **settings)
    except (TypeError, ValueError) as error:  # of pyarrow
        raise ValueError(
            f"the rows make no table ({error}): give the values of each column one type, as in "
            '{"text": "Fine.", "label": str(label)}'
        ) from error


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
    task: str = ONE_LABEL,
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
        task (`str`): Name of the [`Task`].
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
        if task in LABEL_KINDS and LABEL_KINDS[task].reads == "words":
            _check_words(rows, name, column)
            continue
        if not isinstance(rows.features[column], Value):
            raise ValueError(
                f"each row of the {name} data has several values in {column!r} ({str(rows[0][column])[:40]}), not one "
                f"text: join them, or correct {'text_pair_column' if column == text_pair_column else 'text_column'}"
            )
        empty = [row for row, text in enumerate(rows[column]) if text is None or not str(text).strip()]
        if empty:
            raise ValueError(
                f"{len(empty)} rows of the {name} data have no text in {column!r} (the first is row {empty[0]}, "
                "counted from 0): remove them"
            )


def _check_words(rows: Dataset, name: str, column: str) -> None:
    empty = [row for row, cell in enumerate(rows[column]) if not parts(cell, BETWEEN_WORDS)]
    if empty:
        raise ValueError(
            f"{len(empty)} rows of the {name} data have no words in {column!r} (the first is row {empty[0]}, counted "
            "from 0): remove them"
        )


def label_names(rows: Dataset, label_column: str = "label", task: str = ONE_LABEL) -> list[str]:
    """
    Return the names of the labels, in the order of their ids: those of the column's `ClassLabel`, or else the sorted
    values of the column.

    Args:
        rows (`Dataset`): The training rows.
        label_column (`str`): Column of the label, a string or a whole number; of several labels a list of them, or a
            string with commas between; a number for a regression; of words a list of tags, or a string with spaces
            between.
        task (`str`): Name of the [`Task`].
    """
    if task in LABEL_KINDS:
        return LABEL_KINDS[task].names(rows, label_column)
    _check_labels(rows, "training", label_column)
    names = getattr(rows.features[label_column], "names", None)
    if names:
        return names
    values = set(rows[label_column])
    if None in values or "" in values:
        raise ValueError(f"the training data has rows without a label in {label_column!r}: remove them")
    if any(isinstance(value, float) for value in values):
        raise ValueError(
            f"the labels in {label_column!r} are fractions: give classes, or learn the numbers themselves, with "
            'problem_type="regression"'
        )
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
    max_length: int | None = 128,
    task: str = ONE_LABEL,
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
        max_length (`int`, *optional*): Longer texts are cut to this many tokens; `None`: by the tokenizer's limit.
        task (`str`): Name of the [`Task`].
    """
    kind = LABEL_KINDS.get(task, LabelKind(label_names, _label_ids))
    if kind.reads == "passages":
        given = None if label2id is None else kind.ids(rows, label2id, name, label_column)
        passages = encode_passages(tokenizer, rows[text_column], rows[text_pair_column], given, max_length)
        return Dataset.from_dict(passages)
    if kind.reads == "words":
        words = Dataset.from_dict({WORDS: [parts(cell, BETWEEN_WORDS) for cell in rows[text_column]]})
        if label2id is not None:
            words = words.add_column("labels", kind.ids(rows, label2id, name, label_column))
        return encoded_rows(words, tokenizer, max_length)
    names = {text_column: "text", **({text_pair_column: "text_pair"} if text_pair_column else {})}
    texts = rows.select_columns(list(names)).rename_columns(names)
    for column in names.values():
        if texts.features[column].dtype not in ("string", "large_string"):  # numbers, as a file of codes has them
            texts = texts.cast_column(column, Value("string"))
    if label2id is not None:
        texts = texts.add_column("labels", kind.ids(rows, label2id, name, label_column))
    return encoded_rows(texts, tokenizer, max_length)


class Splits(NamedTuple):
    """
    The rows of a training, as texts or as token ids.

    Args:
        train (`Dataset`): Training rows.
        validation (`Dataset`, *optional*): Validation rows.
        unlabeled (`Dataset`, *optional*): Further training texts without labels.
    """

    train: Dataset
    validation: Dataset | None = None
    unlabeled: Dataset | None = None

    def encoded(
        self,
        tokenizer: PreTrainedTokenizerBase,
        label2id: dict[str, int],
        train_has_labels: bool = True,
        validation_has_labels: bool = True,
        **settings,
    ) -> Splits:
        """
        Return the rows as token ids, and the names of labels as ids.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
            label2id (`dict`): The id of each label.
            train_has_labels, validation_has_labels (`bool`): Whether the labels of these rows are kept, too.
            settings: Columns and greatest length, as in [`encode`].
        """

        def of(rows: Dataset | None, name: str, has_labels: bool) -> Dataset | None:
            if rows is None:
                return None
            return encode(rows, tokenizer, label2id if has_labels else None, name, **settings)

        # The validation rows come first, as they are fewer and as likely to have a label that is not known.
        validation = of(self.validation, "validation", validation_has_labels)
        return Splits(of(self.train, "training", train_has_labels), validation, of(self.unlabeled, "unlabeled", False))


def _label_ids(rows: Dataset, label2id: dict[str, int], name: str, label_column: str) -> list[int]:
    """Return the id of each row's label, which the column has by its name or by its id."""
    _check_labels(rows, name, label_column)
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


def _check_labels(rows: Dataset, name: str, label_column: str) -> None:
    """Raise a `ValueError` unless each row has one label."""
    if not isinstance(rows.features[label_column], (Value, ClassLabel)):
        raise ValueError(
            f"each row of the {name} data has several values in {label_column!r} ({str(rows[0][label_column])[:40]}): "
            'give one label for each text, or learn several, with problem_type="multi_label_classification"'
        )
