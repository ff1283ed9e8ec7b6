"""Words with a label each, as a model reads them: tokens, of which the first one of each word has its label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .modeling.tokenization import first_of_words


WORDS = "tokens"  # the column, as data sets on the Hub call it
NO_LABEL = -100


def encode_words(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[str]],
    labels: Sequence[Sequence[int | str]] | None,
    label2id: Mapping[str, int] | None = None,
    max_length: int | None = None,
    start: int = 0,
) -> dict[str, list]:
    """
    Return the columns of rows of words as a model reads them, `token_mask`, which is 1 at the first token of a word,
    and `labels` where there are some: the label of a word stands at its first token, and -100 at all others and at
    special tokens, as in the examples of Transformers.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast one, which knows the words of its tokens.
        rows (sequence of sequences of `str`): The words of each row.
        labels (sequence of sequences of `int` or `str`, *optional*): Their labels.
        label2id (`Mapping`, *optional*): The id of each label, where labels are names.
        max_length (`int`, *optional*): Longer rows are cut to so many tokens.
        start (`int`): Number of the first row, for errors.

    Raises:
        ValueError: If a row has no words, or not as many labels as words, or a label is not known.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not know which token is of which word: load the fast tokenizer, as in "
            "AutoTokenizer.from_pretrained(name, use_fast=True)."
        )
    for number, words in enumerate(rows, start=start):
        are_words = isinstance(words, Sequence) and not isinstance(words, str) and len(words) > 0
        if not are_words or not all(isinstance(word, str) for word in words):
            raise ValueError(f"the tokens of row {number} must be a list of words, got {words!r:.60}.")
    encoded = tokenizer(
        [list(words) for words in rows], is_split_into_words=True, truncation=True, max_length=max_length
    )
    columns = dict(encoded)
    columns["token_mask"] = token_masks(encoded, len(rows))
    if labels is not None:
        columns["labels"] = [
            of_tokens(encoded.word_ids(place), ids_of(own, words, label2id, start + place))
            for place, (own, words) in enumerate(zip(labels, rows, strict=True))
        ]
    return columns


def token_masks(encoded: Any, rows: int) -> list[list[int]]:
    """Return for each row of what a fast tokenizer gave a 1 for the first token of each word, and a 0 for others."""
    return [first_of_words(encoded.word_ids(place)) for place in range(rows)]


def ids_of(
    labels: Sequence[int | str], words: Sequence[str], label2id: Mapping[str, int] | None, number: int
) -> list[int]:
    """Return the ids of the labels of a row, one for each word."""
    if not isinstance(labels, Sequence) or isinstance(labels, str) or len(labels) != len(words):
        raise ValueError(f"row {number} has {len(words)} tokens, and needs as many labels, got {labels!r:.60}.")
    unknown = [label for label in labels if isinstance(label, str) and label not in (label2id or {})]
    if unknown:
        known = f"the labels are {', '.join(map(repr, label2id))}" if label2id else "give ids"
        raise ValueError(f"a label of row {number} is {unknown[0]!r}, which is not known: {known}.")
    return [label2id[label] if isinstance(label, str) else label for label in labels]


def of_tokens(word_ids: Sequence[int | None], labels: Sequence[Any]) -> list[int]:
    """Return the label of each token: that of its word for the first one, -100 for the others."""
    found, before = [], None
    for word in word_ids:
        found.append(NO_LABEL if word is None or word == before else labels[word])
        before = word
    return found
