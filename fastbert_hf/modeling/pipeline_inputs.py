"""What the pipeline is given to classify: texts and pairs out of lists, tables, data sets and streams, encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import repeat
from typing import Any, NamedTuple

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.pipelines.pt_utils import KeyDataset, KeyPairDataset

from .encoded_texts import NO_MORE, rows_of
from .tokenization import call_tokenizer


class Text(NamedTuple):
    """A text, or a pair, that a tokenizer is to read."""

    position: int  # among what the caller gives, from 0
    text: str
    text_pair: str | None = None


def texts_of(inputs: Any) -> Any:
    """
    Return what a caller gives as a list, a data set of PyTorch, or a generator; a single text as it is. Tables, such
    as a data set of `datasets` or a DataFrame, have a column `text`, and may have one named `text_pair`.
    """
    if hasattr(inputs, "column_names") or hasattr(inputs, "columns"):
        return texts_of_table(inputs)
    if isinstance(inputs, (str, bytes, dict, Dataset)) or not isinstance(inputs, Iterable):
        return inputs
    if isinstance(inputs, Sized):  # lists, tuples, Series, arrays, columns of `datasets`
        return list(inputs)
    return (text for text in inputs)


def texts_of_table(table: Any) -> list | Dataset | Iterator:
    """Return the texts, or pairs, of a table, whatever columns stand beside them."""
    columns = getattr(table, "column_names", None)
    columns = getattr(table, "columns", None) if columns is None else columns
    if isinstance(columns, Mapping):
        raise ValueError(
            f"these are the splits {', '.join(columns)} of a data set: give one of them, as in "
            f"classifier(dataset[{next(iter(columns), 'test')!r}])."
        )
    if columns is None:  # a stream that does not know its columns
        return ({"text": row["text"], "text_pair": row.get("text_pair")} if "text" in row else row for row in table)
    columns = list(columns)
    if not columns and isinstance(table, Sized) and len(table) == 0:
        columns, table = ["text"], (row for row in ())
    if "text" not in columns:
        raise ValueError(
            f"there is no column 'text', but {', '.join(map(str, columns)) or 'none at all'}: give the column, as in "
            f"classifier(dataset[{next(iter(columns), 'sentence')!r}]), or rename it."
        )
    names = [name for name in ("text", "text_pair") if name in columns]
    if not isinstance(table, Sized):  # a stream
        return ({name: row[name] for name in names} for row in table)
    if hasattr(table, "select_columns"):  # of `datasets`
        table = table.select_columns(names)
        return KeyDataset(table, "text") if len(names) == 1 else KeyPairDataset(table, *names)
    if len(names) == 1:
        return list(table["text"])
    return [dict(zip(names, row, strict=True)) for row in zip(*(table[name] for name in names), strict=True)]


def checked_texts(
    inputs: Iterable, text_pair: str | Iterable[str] | None = None, allow_blank: bool = True
) -> Iterator[Text | ValueError | TypeError]:
    """
    Yield each input as a text or a pair. What is neither, or a pair among single texts or the other way round, is an
    error in its place, which names its position.

    Args:
        inputs (iterable): Strings, or pairs as `{"text": ..., "text_pair": ...}`.
        text_pair (`str` or iterable of `str`, *optional*): The second texts, one for all inputs or one for each.
        allow_blank (`bool`): Whether a text may be empty, or of spaces alone.
    """
    has_one = text_pair is None or isinstance(text_pair, str)
    pairs, first_kind, position = repeat(text_pair) if has_one else iter(text_pair), None, -1
    for position, item in enumerate(inputs):
        own_pair = next(pairs, NO_MORE)
        if own_pair is NO_MORE:
            raise ValueError(f"there are {position} text_pairs but more texts: give one for all, or one for each.")
        try:
            checked = checked_text(item, position, own_pair, allow_blank)
            kind = "a single text" if checked.text_pair is None else "a pair"
            first_kind = first_kind or kind
            if kind != first_kind:
                raise ValueError(
                    f"input {position} is {kind}, but those before it are not: a classifier reads one or the other. "
                    'Call it for each kind by itself, pairs as {"text": ..., "text_pair": ...}.'
                )
        except (ValueError, TypeError) as error:
            checked = error
        yield checked
    if not has_one and next(pairs, NO_MORE) is not NO_MORE:
        raise ValueError(f"there are {position + 1} texts but more text_pairs: give one for all, or one for each.")


def checked_text(item: Any, position: int, text_pair: str | None, allow_blank: bool) -> Text:
    """Return an input as a text or a pair, or raise an error that names its position."""
    if isinstance(item, dict):
        unknown = sorted(map(str, set(item) - {"text", "text_pair"}))
        if unknown or "text" not in item:
            raise ValueError(
                f"input {position} is a dict of {', '.join(map(repr, item))}: a text is a string or "
                '{"text": ...}, a pair {"text": ..., "text_pair": ...}.'
            )
        text, own_pair = item["text"], item.get("text_pair")
    elif isinstance(item, list) and len(item) == 1 and isinstance(item[0], list) and len(item[0]) == 2:
        text, own_pair = item[0]  # the old form of a pair, which the stock pipeline still takes
    else:
        text, own_pair = item, None
    if own_pair is not None and text_pair is not None:
        raise ValueError(f"input {position} is a pair, and text_pair is given, too: leave out one of the two.")
    text_pair = text_pair if own_pair is None else own_pair
    for part in (text,) if text_pair is None else (text, text_pair):
        check_text(part, position, allow_blank)
    return Text(position, text, text_pair)


def check_text(text: Any, position: int, allow_blank: bool) -> None:
    """Raise unless `text` is a string, and one with something in it unless it may be blank."""
    if isinstance(text, list):
        raise ValueError(
            f'input {position} is a list ({str(text)[:40]!r}): a pair is {{"text": ..., "text_pair": ...}}, many '
            "texts are one list of strings."
        )
    if not isinstance(text, str):
        raise TypeError(
            f"input {position}: a text must be a string, got {type(text).__name__} ({str(text)[:40]!r}). Pairs are "
            '{"text": ..., "text_pair": ...}; bytes need text.decode("utf-8") first.'
        )
    if not allow_blank and not text.strip():
        raise ValueError(
            f"input {position}: got an empty text ({text!r}): leave empty texts out, as in "
            "[text for text in texts if text.strip()], or leave out allow_blank=False."
        )


def encode_block(
    tokenizers: Sequence[PreTrainedTokenizerBase], block: Sequence[Text | Exception], arguments: Mapping[str, Any]
) -> list[Any]:
    """
    Return what a model reads of each text of a block: what the tokenizer made of it, or each of several. Errors stay
    in their places, and where the tokenizer cannot read a text, there is another one.
    """
    texts = [item for item in block if not isinstance(item, Exception)]
    try:
        rows = iter(encode_texts(tokenizers, texts, arguments))
    except Exception as error:  # tokenizers raise errors of many types, none of which says where
        rows = iter(encode_one_by_one(tokenizers, texts, arguments, error))
    return [item if isinstance(item, Exception) else next(rows) for item in block]


def encode_texts(
    tokenizers: Sequence[PreTrainedTokenizerBase], texts: Sequence[Text], arguments: Mapping[str, Any]
) -> list[Any]:
    """Return a mapping for each text, or one of each tokenizer where there are several."""
    # As in the stock pipeline, a pair whose second text is empty is a single text.
    groups = [[text for text in texts if not text.text_pair], [text for text in texts if text.text_pair]]
    rows: dict[int, Any] = {}
    for group in filter(None, groups):
        pairs = [text.text_pair for text in group] if group[0].text_pair else None
        parts = [
            rows_of(call_tokenizer(tokenizer, [text.text for text in group], pairs, **arguments))
            for tokenizer in tokenizers
        ]
        encoded = parts[0] if len(parts) == 1 else zip(*parts, strict=True)
        rows.update(zip((text.position for text in group), encoded, strict=True))
    return [rows[text.position] for text in texts]


def encode_one_by_one(
    tokenizers: Sequence[PreTrainedTokenizerBase],
    texts: Sequence[Text],
    arguments: Mapping[str, Any],
    error: Exception,
) -> list[Any]:
    """Return what `encode_texts` makes of each text by itself. Raise `error` if it makes nothing of any text."""
    try:
        encode_texts(tokenizers, [Text(0, "a", texts[0].text_pair and "a")], arguments)
    except Exception:
        raise error from None
    rows = []
    for text in texts:
        try:
            rows += encode_texts(tokenizers, [text], arguments)
        except Exception as failure:
            rows.append(unreadable(text, failure))
    return rows


def unreadable(text: Text, failure: Exception) -> ValueError:
    """Return the error of a text that the tokenizer does not take."""
    for part in filter(None, (text.text, text.text_pair)):
        try:
            part.encode()
        except UnicodeEncodeError as error:
            return ValueError(
                f"input {text.position}: character {error.start} is half of a pair of surrogates "
                f"({part[error.start]!r}), which stands for nothing: replace it, as in "
                'text.encode("utf-8", "replace").decode().'
            )
    return ValueError(f"input {text.position}: the tokenizer cannot read {text.text!r:.40}: {failure}")
