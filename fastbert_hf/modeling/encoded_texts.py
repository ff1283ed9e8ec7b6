"""What a caller gives to be answered, read one text at a time and checked, each error naming its text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import repeat
from numbers import Integral
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from .exit_policies import check_speed
from .families import max_text_tokens, too_long


INPUT_SIZES = {
    "input_ids": "vocab_size",
    "token_type_ids": "type_vocab_size",
    "task_type_ids": "task_type_vocab_size",
    "token_mask": None,
}
HOW_TO_ENCODE = (
    "encode the texts first, as in model.predict(tokenizer(texts), speed=0.5), or give them to pipeline("
    '"fast-text-classification").'
)
# What `predict` and the pipeline do with a text that has no answer.
ON_ERROR = ("raise", "return", "skip")
NO_MORE = object()

Item = TypeVar("Item")


@dataclass(frozen=True)
class EncodedText:
    """A text as the members of a cascade read it; a single model counts as a cascade of one."""

    position: int  # in the caller's stream, from 0
    # For each member lists of numbers, by the names that the tokenizer gives them; None where it is not asked.
    of_members: list[dict[str, list[int]] | None]
    speed: float
    error: Exception | None = None  # why it cannot be read; no member is asked then

    def __len__(self) -> int:
        # What cannot be read counts, too: a stream of nothing else comes in blocks like any other.
        return max((len(inputs["input_ids"]) for inputs in self.of_members if inputs is not None), default=1)


def read_blocks(items: Iterable[Item], limit: int, weigh: Callable[[Item], int] | None = None) -> Iterator[list[Item]]:
    """
    Yield lists of items that together reach a limit, of their number or of their weights. What the source raises is
    raised after the items before it.
    """
    items, block, weight, failure = iter(items), [], 0, None
    while True:
        try:
            block.append(next(items))
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        weight += 1 if weigh is None else weigh(block[-1])
        if weight >= limit:
            yield block
            block, weight = [], 0
    if block:
        yield block
    if failure is not None:
        raise failure


class InputReader:
    """Checks the inputs of one stream, text by text, against what the backbone of a config reads."""

    def __init__(self, text_config: PreTrainedConfig):
        self.sizes = {name: size and getattr(text_config, size, None) for name, size in INPUT_SIZES.items()}
        self.limit, self.names = max_text_tokens(text_config), None

    def read(self, row: Mapping[str, Any], position: int) -> dict[str, list[int]]:
        """Return the inputs of a text, or raise a `ValueError` that says where it is and what is wrong with it."""
        inputs = lists_of(row, position, self.sizes)
        if len(inputs["input_ids"]) > self.limit:
            raise too_long(len(inputs["input_ids"]), self.limit, f"text {position}")
        self.names = self.names or list(inputs)
        if self.names != list(inputs):
            raise ValueError(
                f"text {position} has {', '.join(inputs)}, but those before it have {', '.join(self.names)}: "
                "encode all of them alike."
            )
        return inputs


def check_on_error(on_error: str) -> None:
    """Raise a `ValueError` unless `on_error` is one of `ON_ERROR`."""
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error={on_error!r} is not known; choose one of {', '.join(map(repr, ON_ERROR))}.")


def read_texts(
    encoded_texts: Iterable[Any] | Mapping[str, Any],
    speed: float | Iterable[float] | None,
    text_configs: Sequence[PreTrainedConfig],
    own_tokenizers: bool = False,
    on_error: str = "raise",
) -> Iterator[EncodedText]:
    """
    Yield the texts of a call of `predict`, one by one, as the backbone of every member reads them. What is wrong with
    a text is an error that names its position, and in a cascade the member. It is raised, or the text carries it,
    unless `on_error` is `"raise"`. An item that is an exception itself says what was wrong before it came here.
    """
    readers = list(map(InputReader, text_configs))
    if own_tokenizers and isinstance(encoded_texts, Mapping):
        raise ValueError(
            "every member of this cascade has its own tokenizer: give what its CascadeProcessor returns, or for each "
            f"text what each of the {len(readers)} tokenizers gave."
        )
    rows = encoded_texts if own_tokenizers else rows_of(encoded_texts)
    if isinstance(speed, Sized) and isinstance(rows, Sized) and len(speed) > len(rows):
        raise too_many_speeds(len(rows))
    speeds = iter(speed) if isinstance(speed, Iterable) else repeat(0.0 if speed is None else speed)
    position = -1
    for position, row in enumerate(rows):
        own_speed, error = next(speeds, NO_MORE), row if isinstance(row, Exception) else None
        if own_speed is NO_MORE:
            raise ValueError(f"there are {position} speeds but more texts: give one number for all, or one for each.")
        if error is None:
            try:
                text = read_text(row, position, own_speed, readers, own_tokenizers)
            except ValueError as failure:
                error = failure
        if error is not None:
            if on_error == "raise":
                raise error
            text = EncodedText(position, [], 0.0, error)
        yield text
    if isinstance(speed, Iterable) and next(speeds, NO_MORE) is not NO_MORE:
        raise too_many_speeds(position + 1)


def read_text(
    row: Any, position: int, speed: float, readers: Sequence[InputReader], own_tokenizers: bool
) -> EncodedText:
    """Return a text of a call of `predict`, checked. Raise a `ValueError` that names its position."""
    try:
        if isinstance(speed, ValueError):
            raise speed
        check_speed(speed)
    except ValueError as error:
        raise ValueError(f"text {position}: {error}") from None
    if not own_tokenizers:
        parts = [row] * len(readers)
    elif isinstance(row, Sequence) and not isinstance(row, str) and len(row) == len(readers):
        parts = row
    else:
        raise ValueError(
            f"text {position} must be what each of the {len(readers)} tokenizers of this cascade gave, as its "
            f"CascadeProcessor returns it, got {row!r:.40}."
        )
    of_members: list[dict[str, list[int]] | None] = []
    for number, (reader, part) in enumerate(zip(readers, parts, strict=True), start=1):
        try:
            # At speed 0 the last member answers alone.
            is_asked = speed > 0 or number == len(readers)
            of_members.append(reader.read(part, position) if is_asked else None)
        except ValueError as error:
            raise (ValueError(f"member {number}: {error}") if len(readers) > 1 else error) from None
    return EncodedText(position, of_members, float(speed))


def checked_speeds(speed: float | Iterable[float] | None) -> float | Iterable[float] | None:
    """Return the `speed` of a call of `predict`. Where there are many, each is checked when its text is read."""
    if hasattr(speed, "tolist"):  # tensors, NumPy arrays and NumPy numbers
        speed = speed.tolist()
    if speed is not None and (isinstance(speed, str) or not isinstance(speed, Iterable)):
        check_speed(speed)
    return speed


def too_many_speeds(texts: int) -> ValueError:
    """Return the error of a call with more speeds than texts."""
    return ValueError(f"there are {texts} texts but more speeds: give one number for all, or one for each.")


def rows_of(encoded_texts: Iterable[Mapping[str, Any]] | Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Return one mapping for each text, also of columns as the tokenizer returns them."""
    if not isinstance(encoded_texts, Iterable) or isinstance(encoded_texts, (str, bytes)):
        raise TypeError(f"predict takes encoded texts, got {encoded_texts!r:.40}: {HOW_TO_ENCODE}")
    if not isinstance(encoded_texts, Mapping):
        return encoded_texts
    found = {name: values for name, values in encoded_texts.items() if values is not None}
    if "input_ids" not in found:
        raise ValueError(f"there are no input_ids among {', '.join(map(repr, found)) or 'nothing'}: {HOW_TO_ENCODE}")
    columns = {name: found[name] for name in (*INPUT_SIZES, "attention_mask") if name in found}
    columns = {name: values.tolist() if hasattr(values, "tolist") else values for name, values in columns.items()}
    if not all(isinstance(values, Sequence) for values in columns.values()):
        raise ValueError(
            f"input_ids and the others must be lists, one for each text, got {encoded_texts!r:.60}: {HOW_TO_ENCODE}"
        )
    if len(columns["input_ids"]) > 0 and isinstance(columns["input_ids"][0], Integral):
        return [columns]
    numbers = {name: len(values) for name, values in columns.items()}
    if len(set(numbers.values())) > 1:
        raise ValueError(
            f"the columns differ in length, {numbers}, so text {min(numbers.values())} has not all of its inputs: "
            f"{HOW_TO_ENCODE}"
        )
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def lists_of(row: Mapping[str, Any], position: int, sizes: Mapping[str, int | None]) -> dict[str, list[int]]:
    """Return the inputs of one text as lists, checked and without padding."""
    if not isinstance(row, Mapping) or row.get("input_ids") is None:
        got = f"{row!r:.40}"
        if isinstance(row, Mapping):
            got = f"a mapping of {', '.join(repr(name) for name in row if row[name] is not None) or 'nothing'}"
        raise ValueError(f"text {position} has no input_ids (got {got}): {HOW_TO_ENCODE}")
    inputs = {name: row[name] for name in (*sizes, "attention_mask") if row.get(name) is not None}
    inputs = {name: values.tolist() if hasattr(values, "tolist") else values for name, values in inputs.items()}
    for name, values in inputs.items():
        if not isinstance(values, (list, tuple)):
            raise ValueError(
                f"the {name} of text {position} must be a list of whole numbers, got {values!r:.40}: {HOW_TO_ENCODE}"
            )
    lengths = {name: len(values) for name, values in inputs.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the inputs of text {position} differ in length: {lengths}.")
    mask = inputs.pop("attention_mask", None)
    if mask is not None:
        first, count = span_of(mask, position)
        if count < len(mask):
            inputs = {name: values[first : first + count] for name, values in inputs.items()}
    if not inputs["input_ids"]:
        raise ValueError(f"text {position} has no tokens: leave it out, or let the tokenizer add its special tokens.")
    for name, values in inputs.items():
        if not {int}.issuperset(map(type, values)):
            raise ValueError(
                f"the {name} of text {position} must be whole numbers, got {values!s:.40}: {HOW_TO_ENCODE}"
            )
        if sizes[name] is not None and not 0 <= min(values) <= max(values) < sizes[name]:
            raise ValueError(
                f"the {name} of text {position} must be from 0 to {sizes[name] - 1}, got {min(values)} to "
                f"{max(values)}: use the tokenizer that belongs to the model."
            )
    if "token_mask" in inputs and not {0, 1}.issuperset(inputs["token_mask"]):
        raise ValueError(
            f"the token_mask of text {position} must be of 1 for tokens of which a label is wanted and 0 for others, "
            f"got {inputs['token_mask']!s:.40}."
        )
    return inputs


def span_of(mask: Sequence[float], position: int) -> tuple[int, int]:
    """Return where the text inside a padded one begins and how many tokens it has, by its attention mask."""
    ones = mask.count(1)
    if ones + mask.count(0) < len(mask):
        raise ValueError(
            f"the attention_mask of text {position} must be of 1 for the text and 0 for padding, got {mask!s:.40}."
        )
    first = mask.index(1) if ones else 0
    if 0 in mask[first : first + ones]:
        raise ValueError(
            f"the attention_mask of text {position} has zeros inside the text: leave those tokens out of input_ids, "
            "or call the model itself."
        )
    return first, ones
