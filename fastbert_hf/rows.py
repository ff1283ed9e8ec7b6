"""Rows of texts as a model reads them: tokenized where they are not yet, and padded batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .word_rows import WORDS, encode_words, token_masks


# What a row may hold for the model beside its labels, and what stands there at padding. None: the padding token.
PADDED_WITH = {
    "input_ids": None,
    "attention_mask": 0,
    "token_type_ids": 0,
    "task_type_ids": 0,
    "position_ids": 0,
    "token_mask": 0,
}
# As the collators of Transformers read them.
LABEL_NAMES = ("labels", "label", "label_ids")
SPAN_NAMES = ("start_positions", "end_positions")
TEXT_NAMES = ("text", "text_pair")
BATCH = 1_000  # texts that are tokenized together


def encoded_rows(
    rows: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    label2id: Mapping[str, int] | None = None,
    columns: Sequence[str] = (),
    label_kind: str = "ids",
) -> Any:
    """
    Return rows that have `input_ids`, tokenized where they hold texts. Of texts nothing but the tokens and the labels
    is kept, the latter as `labels`.

    Args:
        rows (`datasets.Dataset`, or sequence of `dict` or `str`):
            Tokenized rows, which are returned as they are. Or texts: rows with `text`, and `text_pair` where there are
            two, and `label` or `labels` if any; or strings. Where words are labelled, rows with `tokens`, a list of
            words, and `labels`, one for each. A DataFrame of such rows, a Series of texts, and what a
            tokenizer returns for several texts will do, too.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The model's tokenizer. Needed where there are texts.
        max_length (`int`, *optional*): Longer texts are cut to so many tokens; to the tokenizer's limit unless given.
        label2id (`Mapping`, *optional*): The id of each label, where the labels of texts are names.
        columns (sequence of `str`, *optional*): Further columns to keep, where the rows have them.
        label_kind (`str`): As in [`PaddingCollator`]. Where it is `"token_ids"`, texts get a `token_mask`, too.

    Returns:
        A `datasets.Dataset` for one, else a sequence of `dict`.

    Example:

    ```python
    >>> encoded_rows([{"text": "Fine.", "label": 1}], tokenizer)
    [{'input_ids': [2, 37, 3], 'token_type_ids': [0, 0, 0], 'attention_mask': [1, 1, 1], 'labels': 1}]
    ```
    """
    if isinstance(rows, Mapping) and "input_ids" in rows:  # columns, as the tokenizer returns them
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    if hasattr(rows, "iloc"):  # of pandas, which nothing here needs
        rows = rows.to_dict("records") if hasattr(rows, "columns") else rows.tolist()
    holds_rows = isinstance(rows, Iterable) or hasattr(rows, "__getitem__")
    if isinstance(rows, (str, bytes, Mapping)) or not holds_rows:
        splits = f" of {', '.join(map(repr, rows))}" if isinstance(rows, Mapping) else ""
        raise TypeError(
            f"rows must be a data set or a list of rows, got {type(rows).__name__}{splits}. Example: "
            '[{"text": "Fine.", "label": 1}], or one split of a DatasetDict: splits["train"]'
        )
    if hasattr(rows, "map") and hasattr(rows, "features"):  # of the library datasets, which nothing here needs
        return _encoded_dataset(rows, _Encoder(tokenizer, max_length, label2id, columns, label_kind))
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        return rows  # a stream of rows that its owner has prepared
    if len(rows) == 0 or _is_encoded(rows[0]):
        return rows
    encoder = _Encoder(tokenizer, max_length, label2id, columns, label_kind).checked()
    encoded: list[dict[str, Any]] = []
    for start in range(0, len(rows), BATCH):
        part = [rows[index] for index in range(start, min(start + BATCH, len(rows)))]
        part = [{"text": row} if isinstance(row, str) else row for row in part]
        inputs = encoder.inputs(_columns_of(part, start, columns), start)
        encoded += [dict(zip(inputs, values, strict=True)) for values in zip(*inputs.values(), strict=True)]
    return encoded


def _is_encoded(row: Any) -> bool:
    return isinstance(row, Mapping) and "input_ids" in row


def _encoded_dataset(rows: Any, encoder: _Encoder) -> Any:
    names = rows.column_names or list(next(iter(rows), ()))  # a stream may not know its columns
    if "input_ids" in names or not names:
        return rows
    _check_names(names)
    encoder = encoder.checked()
    label_name = next((name for name in LABEL_NAMES if name in names), None)
    class_names = getattr((rows.features or {}).get(label_name), "names", None) or []
    # The ids of such a column may be in another order than those of the model.
    has_names = bool(class_names) and set(class_names) <= set(encoder.label2id or ())

    def encode(columns: dict[str, list], indices: list[int]) -> dict[str, list]:
        columns = {name: list(columns[name]) for name in names}
        if has_names:
            columns[label_name] = [
                class_names[label] if isinstance(label, int) and label >= 0 else label for label in columns[label_name]
            ]
        return encoder.inputs(columns, indices[0])

    options = {"desc": "Tokenizing"} if hasattr(rows, "__len__") else {}
    return rows.with_format(None).map(
        encode, batched=True, batch_size=BATCH, with_indices=True, remove_columns=names, **options
    )


def _check_names(names: Iterable[str], place: str = "the rows") -> None:
    if "text" not in names and WORDS not in names:
        found = ", ".join(map(repr, names)) or "nothing"
        raise ValueError(
            f"{place} need 'input_ids', or 'text' to tokenize, got {found}. Name the column of the texts so, as in "
            "rows.rename_column('sentence', 'text'), or encode them: rows.map(lambda row: tokenizer(row['sentence']))"
        )


def _columns_of(rows: Sequence[Any], start: int, others: Sequence[str]) -> dict[str, list]:
    """Return the texts, labels and other columns of rows, which all of them must have."""
    used = (*TEXT_NAMES, WORDS, *LABEL_NAMES, *others)
    for position, row in enumerate(rows, start=start):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {position} must be a text or a dict, got {row!r:.40}. Example: "
                '{"text": "Fine.", "label": 1}; for pairs {"text": "Who?", "text_pair": "Me.", "label": 0}'
            )
        _check_names(row, f"row {position} and all others")
    names = [name for name in used if name in rows[0]]
    for position, row in enumerate(rows, start=start):
        own = [name for name in used if name in row]
        if own != names:
            raise ValueError(f"row {position} has {', '.join(own)}, but row {start} has {', '.join(names)}.")
    return {name: [row[name] for row in rows] for name in names}


@dataclass(frozen=True)
class _Encoder:
    """Turns columns of texts and labels into what the model reads."""

    tokenizer: PreTrainedTokenizerBase | None
    max_length: int | None
    label2id: Mapping[str, int] | None
    others: Sequence[str]
    label_kind: str = "ids"

    def checked(self) -> _Encoder:
        """Return it, or raise a `ValueError` if it cannot read texts."""
        if self.tokenizer is None:
            raise ValueError(
                "the rows are texts, so the model's tokenizer is needed, too. Example: tokenizer="
                "AutoTokenizer.from_pretrained(name); a trainer takes it as processing_class=tokenizer"
            )
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, got {self.max_length}. Example: max_length=128")
        return self

    def inputs(self, columns: Mapping[str, list], start: int) -> dict[str, list]:
        """Return the columns of the rows from number `start` on as the model reads them."""
        has_words = WORDS in columns and "text" not in columns
        texts = [] if has_words else [columns[name] for name in TEXT_NAMES if name in columns]
        for column in texts:
            for position, text in enumerate(column, start=start):
                if not isinstance(text, str):
                    raise ValueError(f"the text of row {position} must be a string, got {text!r:.40}: leave it out.")
        encoded = self._tokenized(texts, start) if texts else {}
        if texts and self.label_kind == "token_ids" and self.tokenizer.is_fast:
            encoded = {**encoded, "token_mask": token_masks(encoded, len(texts[0]))}
        encoded = dict(encoded)
        label_name = next((name for name in LABEL_NAMES if name in columns), None)
        if has_words:
            encoded = encode_words(
                self.tokenizer, columns[WORDS], columns.get(label_name), self.label2id, self.max_length, start
            )
        elif label_name is not None:
            encoded["labels"] = [self._label(value, start + row) for row, value in enumerate(columns[label_name])]
        return {**encoded, **{name: columns[name] for name in self.others if name in columns}}

    def _tokenized(self, texts: list[list[str]], start: int) -> Mapping[str, list]:
        options = {"truncation": True, "max_length": self.max_length}
        try:
            return self.tokenizer(*texts, **options)
        except Exception as error:
            # The tokenizer does not say which text it is, a lone surrogate for example.
            for position, row in enumerate(zip(*texts, strict=True), start=start):
                try:
                    self.tokenizer(*row, **options)
                except Exception:
                    raise ValueError(
                        f"the text of row {position} cannot be tokenized ({error}): leave it out, or correct it."
                    ) from error
            raise

    def _label(self, label: Any, position: int) -> Any:
        if not isinstance(label, str):
            return label
        if label not in (self.label2id or {}):
            known = f"the labels are {', '.join(map(repr, self.label2id))}" if self.label2id else "give its id"
            raise ValueError(f"the label of row {position} is {label!r}, which is not known: {known}.")
        return self.label2id[label]


@dataclass(frozen=True)
class PaddingCollator:
    """
    Make a padded batch of tokenized rows: what a model reads, and `labels`. All other columns, such as texts, are left
    out. No tokenizer is needed, as the model packs its batches and never reads the padding.

    Args:
        pad_token_id (`int`, *optional*, defaults to 0): What stands in `input_ids` at padding.
        padding_side (`str`, *optional*, defaults to `"right"`): `"right"` or `"left"`.
        columns (`tuple[str, ...]`, *optional*): Further columns to stack, where the rows have them: a number each.
        label_kind (`str`, *optional*, defaults to `"ids"`):
            What `labels` are: `"ids"` of labels, or a number for each of them; `"token_ids"`, one for each token of a
            row, padded with -100; `"numbers"` of a regression; or `"spans"`, the first and the last token of an
            answer, which may also be `start_positions` and `end_positions`.

    Example:

    ```python
    >>> PaddingCollator()([{"input_ids": [2, 7, 3], "text": "a", "labels": 1}, {"input_ids": [2, 3], "labels": 0}])
    {'input_ids': tensor([[2, 7, 3],
            [2, 3, 0]]), 'attention_mask': tensor([[1, 1, 1],
            [1, 1, 0]]), 'labels': tensor([1, 0])}
    ```
    """

    pad_token_id: int = 0
    padding_side: str = "right"
    columns: tuple[str, ...] = ()
    label_kind: str = "ids"

    def __post_init__(self):
        if self.padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {self.padding_side!r}.")

    @classmethod
    def of(cls, model: Any, **fields) -> PaddingCollator:
        """
        Return the collator of a model.

        Args:
            model (`PreTrainedModel` or `PreTrainedConfig`): A model or a config, also of a cascade with one tokenizer.
            fields: Further fields of the collator.
        """
        config = getattr(model, "config", model)
        config = (getattr(config, "members", None) or [config])[0]
        pad_token_id = getattr(getattr(config, "text_config", config), "pad_token_id", None)
        fields.setdefault("label_kind", getattr(config, "label_kind", "ids"))
        return cls(0 if pad_token_id is None else pad_token_id, **fields)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Return one batch.

        Args:
            rows (sequence of `Mapping`):
                `input_ids`, and what else the model reads, of each row, as lists, arrays or tensors; `labels`, or
                `label`: ids, or the probabilities of all labels.
        """
        inputs = [self._inputs(row) for row in rows]
        names = list(inputs[0])
        for row in inputs:
            if list(row) != names:
                raise ValueError(
                    f"one row of the batch has {', '.join(row)}, another {', '.join(names)}: encode all of them alike."
                )
        longest = max(len(row["input_ids"]) for row in inputs)
        batch = {name: torch.tensor([self._padded(name, row[name], longest) for row in inputs]) for name in names}
        batch.update({name: torch.tensor([row[name] for row in rows]) for name in self.columns if name in rows[0]})
        if self.label_kind == "spans":
            rows = [with_span(row) for row in rows]
        labels = self._token_labels(rows, batch) if self.label_kind == "token_ids" else self._labels(rows)
        return batch if labels is None else {**batch, "labels": labels}

    @staticmethod
    def _inputs(row: Mapping[str, Any]) -> dict[str, list[int]]:
        if not _is_encoded(row):
            names = ", ".join(map(repr, row)) if isinstance(row, Mapping) else f"{row!r:.40}"
            raise ValueError(
                f"a row has no input_ids, only {names}. Encode the texts first: rows.map(lambda row: "
                "tokenizer(row['text'])), or give a trainer their tokenizer: processing_class=tokenizer"
            )
        inputs = {name: row[name] for name in PADDED_WITH if row.get(name) is not None}
        inputs = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in inputs.items()}
        length = len(inputs["input_ids"])
        # Without a mask, padding would count as text.
        inputs = {"input_ids": inputs.pop("input_ids"), "attention_mask": [1] * length, **inputs}
        lengths = {name: len(value) for name, value in inputs.items()}
        if set(lengths.values()) != {length}:
            raise ValueError(f"the inputs of a row differ in length: {lengths}.")
        return inputs

    def _padded(self, name: str, values: list[int], longest: int) -> list[int]:
        padding = PADDED_WITH[name]
        padding = [self.pad_token_id if padding is None else padding] * (longest - len(values))
        return [*values, *padding] if self.padding_side == "right" else [*padding, *values]

    def _token_labels(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, torch.Tensor]) -> Any:
        name = next((name for name in LABEL_NAMES if name in rows[0]), None)
        if name is None or all(row.get(name) is None for row in rows):
            return None
        labels = torch.full(batch["input_ids"].shape, -100)
        is_token = batch["attention_mask"].bool()
        for place, row in enumerate(rows):
            own = row.get(name)
            if not isinstance(own, Sequence | torch.Tensor) or len(own) != len(row["input_ids"]):
                raise ValueError(
                    f"{name!r} must have an id for each of the {len(row['input_ids'])} tokens of a row, -100 for "
                    f"those without, got {own!r:.60}: encode words with their labels, as 'tokens' and 'labels'."
                )
            # A row may come padded.
            given = torch.as_tensor(own)[torch.as_tensor(self._inputs(row)["attention_mask"]).bool()]
            labels[place, is_token[place]] = given
        return labels

    def _labels(self, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
        name = next((name for name in LABEL_NAMES if name in rows[0]), None)
        values = [row.get(name) for row in rows]
        if name is None or all(value is None for value in values):
            return None
        values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
        kinds = {len(value) if isinstance(value, (list, tuple)) else type(value) for value in values}
        if all(isinstance(value, Integral) for value in values) and self.label_kind == "ids":
            return torch.tensor(values, dtype=torch.long)
        if self.label_kind == "numbers" and all(isinstance(value, Real) for value in values):
            return torch.tensor(values, dtype=torch.float)
        if len(kinds) > 1 or not all(isinstance(value, (list, tuple)) for value in values):
            strange = next((value for value in values if not isinstance(value, (Integral, list, tuple))), values)
            raise ValueError(
                f"{name!r} must be the ids of labels (or the probabilities of all labels) in every row, got "
                f"{strange!r:.60}. Example: [{{**row, 'labels': model.config.label2id[row['label']]}} for row in rows]"
            )
        return torch.tensor(values, dtype=torch.long if self.label_kind == "spans" else torch.float)


def with_span(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row whose `labels` are the ends of its answer, where it names them as stock data sets do."""
    ends = [row.get(name) for name in SPAN_NAMES]
    return row if None in ends else {**row, "labels": [int(end) for end in ends]}


__all__ = ["PaddingCollator", "encoded_rows"]
