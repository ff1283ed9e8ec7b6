"""What a caller gives to be answered, read one text at a time and checked, each error naming its text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from numbers import Integral
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from .exit_policies import check_speed
from .families import max_text_tokens, too_long


INPUT_SIZES = {"input_ids": "vocab_size", "token_type_ids": "type_vocab_size", "task_type_ids": "task_type_vocab_size"}
HOW_TO_ENCODE = (
    "encode the texts first, as in model.predict(tokenizer(texts), speed=0.5), or give them to pipeline("
    '"fast-text-classification").'
)

Item = TypeVar("Item")


@dataclass(frozen=True)
class EncodedText:
    """A text as the members of a cascade read it; a single model counts as a cascade of one."""

    position: int  # in the caller's stream, from 0
    # For each member lists of numbers, by the names that the tokenizer gives them; None where it is not asked.
    of_members: list[dict[str, list[int]] | None]
    speed: float

    def __len__(self) -> int:
        return max(len(inputs["input_ids"]) for inputs in self.of_members if inputs is not None)


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
        self.sizes = {name: getattr(text_config, size, None) for name, size in INPUT_SIZES.items()}
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


def read_texts(
    encoded_texts: Iterable[Any] | Mapping[str, Any],
    speed: float | Iterable[float] | None,
    text_configs: Sequence[PreTrainedConfig],
    own_tokenizers: bool = False,
) -> Iterator[EncodedText]:
    """
    Yield the texts of a call of `predict`, one by one, as the backbone of every member reads them. What is wrong with
    a text raises a `ValueError` that names its position, and in a cascade the member.
    """
    readers, is_cascade = list(map(InputReader, text_configs)), len(text_configs) > 1
    if own_tokenizers and isinstance(encoded_texts, Mapping):
        raise ValueError(
            "every member of this cascade has its own tokenizer: give what its CascadeProcessor returns, or for each "
            f"text what each of the {len(readers)} tokenizers gave."
        )
    rows = encoded_texts if own_tokenizers else rows_of(encoded_texts)
    speeds = iter(speed) if isinstance(speed, Iterable) else repeat(0.0 if speed is None else speed)
    for position, row in enumerate(rows):
        own_speed = next(speeds, None)
        if own_speed is None:
            raise ValueError(f"there are {position} speeds but more texts: give one number for all, or one for each.")
        check_speed(own_speed)
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
                is_asked = own_speed > 0 or number == len(readers)
                of_members.append(reader.read(part, position) if is_asked else None)
            except ValueError as error:
                raise (ValueError(f"member {number}: {error}") if is_cascade else error) from None
        yield EncodedText(position, of_members, own_speed)


def checked_speeds(speed: float | Iterable[float] | None) -> float | Iterable[float] | None:
    """Return the `speed` of a call of `predict`. Where there are many, each is checked when its text is read."""
    if hasattr(speed, "tolist"):  # tensors, NumPy arrays and NumPy numbers
        speed = speed.tolist()
    if speed is not None and (isinstance(speed, str) or not isinstance(speed, Iterable)):
        check_speed(speed)
    return speed


def rows_of(encoded_texts: Iterable[Mapping[str, Any]] | Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Return one mapping for each text, also of columns as the tokenizer returns them."""
    if not isinstance(encoded_texts, Iterable) or isinstance(encoded_texts, (str, bytes)):
        raise TypeError(f"predict takes encoded texts, got {encoded_texts!r:.40}: {HOW_TO_ENCODE}")
    if not isinstance(encoded_texts, Mapping):
        return encoded_texts
    columns = {name: values for name, values in encoded_texts.items() if name in (*INPUT_SIZES, "attention_mask")}
    if "input_ids" not in columns:
        raise ValueError(f"there are no input_ids among {', '.join(map(repr, encoded_texts))}: {HOW_TO_ENCODE}")
    columns = {name: values.tolist() if hasattr(values, "tolist") else values for name, values in columns.items()}
    if len(columns["input_ids"]) > 0 and isinstance(columns["input_ids"][0], Integral):
        return [columns]
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def lists_of(row: Mapping[str, Any], position: int, sizes: Mapping[str, int | None]) -> dict[str, list[int]]:
    """Return the inputs of one text as lists, checked and without padding."""
    if not isinstance(row, Mapping) or "input_ids" not in row:
        got = f"a mapping of {', '.join(map(repr, row))}" if isinstance(row, Mapping) else f"{row!r:.40}"
        raise ValueError(f"text {position} has no input_ids (got {got}): {HOW_TO_ENCODE}")
    inputs = {name: row[name] for name in (*sizes, "attention_mask") if row.get(name) is not None}
    inputs = {name: values.tolist() if hasattr(values, "tolist") else values for name, values in inputs.items()}
    lengths = {name: len(values) for name, values in inputs.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the inputs of text {position} differ in length: {lengths}.")
    mask = inputs.pop("attention_mask", None)
    if mask is not None and 0 in mask:
        first, count = mask.index(1) if 1 in mask else 0, sum(mask)
        if mask[first : first + count] != [1] * count:
            raise ValueError(
                f"the attention_mask of text {position} has zeros inside the text: leave those tokens out of "
                "input_ids, or call the model itself."
            )
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
    return inputs
