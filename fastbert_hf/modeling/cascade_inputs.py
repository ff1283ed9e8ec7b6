"""What the members of a cascade read: one tokenizer for all of them, or one for each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .encoded_texts import EncodedText, TextReader, rows_of, with_speeds
from .encoder_layouts import max_text_tokens
from .pretrained_fastbert import DOWNLOAD_ARGUMENTS


# Any of them is a tokenizer to `AutoTokenizer`; older ones have no config.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
MEMBER_FOLDER = "member_{}"


@dataclass(frozen=True)
class CascadeText:
    """
    One text as the members read it.

    Args:
        of_members (`list` of [`EncodedText`] or `None`): One for each member that may be asked.
    """

    of_members: list[EncodedText | None]

    def __len__(self) -> int:
        return max(len(text) for text in self.of_members if text is not None)

    @property
    def position(self) -> int:
        """In the caller's stream, from 0."""
        return self.of_members[-1].position

    @property
    def speed(self) -> float:
        """In [0, 1]."""
        return self.of_members[-1].speed


def read_cascade(
    encoded_texts: Iterable[Any] | Mapping[str, Any], speed: float | Iterable[float] | None, config: PreTrainedConfig
) -> Iterator[CascadeText]:
    """
    The texts of a caller, one by one, checked for every member that may be asked. What is wrong with a text names its
    position and the member.
    """
    readers = [TextReader(member.text_config) for member in config.members]
    if config.own_tokenizers and isinstance(encoded_texts, Mapping):
        raise ValueError(
            "every member of this cascade has its own tokenizer: give what cascade.encode(texts) returns, or for each "
            f"text what each of the {len(readers)} tokenizers gave."
        )
    rows = encoded_texts if config.own_tokenizers else rows_of(encoded_texts)
    for position, row, own_speed in with_speeds(rows, speed):
        if not config.own_tokenizers:
            parts = [row] * len(readers)
        elif isinstance(row, Sequence) and not isinstance(row, str) and len(row) == len(readers):
            parts = row
        else:
            raise ValueError(
                f"text {position} must be what each of the {len(readers)} tokenizers of this cascade gave, as "
                f"cascade.encode(texts) returns it, got {row!r:.40}."
            )
        of_members: list[EncodedText | None] = []
        for number, (reader, part) in enumerate(zip(readers, parts, strict=True), start=1):
            may_be_asked = own_speed > 0 or number == len(readers)
            try:
                of_members.append(reader.read(part, position, own_speed) if may_be_asked else None)
            except ValueError as error:
                raise ValueError(f"member {number}: {error}") from None
        yield CascadeText(of_members)


def inputs_of_members(
    shared: Mapping[str, torch.Tensor | None],
    member_inputs: Sequence[Mapping[str, torch.Tensor]] | None,
    config: PreTrainedConfig,
) -> list[dict[str, torch.Tensor]]:
    """The tensors of a call of `forward` for each member, checked to be of equally many rows."""
    number, given = len(config.members), {name: value for name, value in shared.items() if value is not None}
    if config.own_tokenizers == (member_inputs is None) or (member_inputs is not None and given):
        wanted = (
            "member_inputs alone, one dict for each" if config.own_tokenizers else "input_ids, and no member_inputs"
        )
        kind = "of its own" if config.own_tokenizers else "that it shares"
        raise ValueError(f"every member of this cascade has a tokenizer {kind}: give {wanted}.")
    inputs = [given] * number
    if member_inputs is not None:
        inputs = [{name: value for name, value in own.items() if value is not None} for own in member_inputs]
    unknown = sorted({name for own in inputs for name in own} - set(shared))
    if unknown:
        raise ValueError(f"the inputs of a member are {', '.join(shared)}, not {', '.join(unknown)}: leave them out.")
    if len(inputs) != number or any(own.get("input_ids") is None or own["input_ids"].dim() != 2 for own in inputs):
        raise ValueError(
            f"each of the {number} members needs input_ids of shape [batch_size, sequence_length], as its tokenizer "
            'gives them with padding=True, return_tensors="pt".'
        )
    rows = {len(value) for own in inputs for value in own.values()}
    if len(rows) > 1:
        raise ValueError(f"the inputs of one call are of equally many rows, got {sorted(rows)}.")
    if rows == {0}:
        raise ValueError("the batch has no rows: give at least one text.")
    return inputs


def check_order(models: Sequence[PreTrainedModel]) -> None:
    """Raises unless no member is cheaper than the one before: by the weights that each token meets in the layers."""
    costs = [
        sum(weight.numel() for layer in model.fastbert.layers() for weight in layer.parameters()) for model in models
    ]
    for number, (before, cost) in enumerate(pairwise(costs), start=2):
        if cost < before:
            raise ValueError(
                f"members go from cheap to expensive, but member {number} has {cost:,} weights in its layers and the "
                f"one before it {before:,}: change their order."
            )


def tokenizers_of(
    members: Sequence[str | os.PathLike | PreTrainedModel],
    models: Sequence[PreTrainedModel],
    tokenizers: Sequence[PreTrainedTokenizerBase | None] | None,
    **download,
) -> tuple[list[PreTrainedTokenizerBase] | None, bool]:
    """
    The tokenizers of a new cascade.

    Returns:
        `tuple`: one for each member, one for all, or `None` where it is not known; and whether each has its own.
    """
    if isinstance(tokenizers, PreTrainedTokenizerBase):
        raise ValueError("tokenizers is a list, one for each member: from_members([...], tokenizers=[...])")
    if tokenizers is None:
        tokenizers = [None] * len(models)
    if len(tokenizers) != len(models):
        raise ValueError(f"got {len(tokenizers)} tokenizers for {len(models)} members: give one for each, or none.")
    tokenizers = [
        load_tokenizer(member, **download) if given is None and not isinstance(member, PreTrainedModel) else given
        for member, given in zip(members, tokenizers, strict=True)
    ]
    known = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    # Where a text is cut decides what is read of it, too.
    limit = max(max_text_tokens(model.config.text_config) for model in models)
    if len({(fingerprint(tokenizer), min(tokenizer.model_max_length, limit)) for tokenizer in known}) > 1:
        if len(known) < len(models):
            raise ValueError(
                "some of the members' tokenizers are not known, and the others differ: give tokenizers=[...]."
            )
        return list(tokenizers), True
    sizes = [model.config.text_config.vocab_size for model in models]
    if len(known) < len(models) and len(set(sizes)) > 1:
        raise ValueError(f"the members read vocabularies of {sizes} tokens: give tokenizers=[...], one for each.")
    return [min(known, key=lambda tokenizer: tokenizer.model_max_length)] if known else None, False


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides which tokens a tokenizer makes of a text, and under which names."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        parts = json.loads(backend.to_str())
        # Set by the last call.
        parts.pop("truncation", None), parts.pop("padding", None)
    return json.dumps([parts, sorted(tokenizer.model_input_names)], sort_keys=True)


def load_tokenizer(
    name_or_path: str | os.PathLike, subfolder: str = "", config: PreTrainedConfig | None = None, **kwargs
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or repository, `None` where it has none."""
    arguments = {name: value for name, value in kwargs.items() if name in (*DOWNLOAD_ARGUMENTS, "trust_remote_code")}
    arguments.update(subfolder=subfolder, force_download=False)
    download = {name: value for name, value in arguments.items() if name != "trust_remote_code"}
    found = (
        cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **download)
        for name in TOKENIZER_FILES
    )
    return AutoTokenizer.from_pretrained(name_or_path, config=config, **arguments) if any(found) else None


def load_tokenizers(
    name_or_path: str | os.PathLike, config: PreTrainedConfig, **download
) -> list[PreTrainedTokenizerBase] | None:
    """The tokenizers that were saved with a cascade."""
    inside = download.pop("subfolder", None) or ""
    numbers = range(2, len(config.members) + 1) if config.own_tokenizers else ()
    folders = [inside, *(os.path.join(inside, MEMBER_FOLDER.format(number)) for number in numbers)]
    # Without a config of theirs AutoTokenizer would read the cascade's, and ask whether to run the code beside it.
    arguments = {**download, "config": PreTrainedConfig(), "trust_remote_code": False}
    tokenizers = [load_tokenizer(name_or_path, folder, **arguments) for folder in folders]
    missing = [
        folder or "the folder itself" for folder, tokenizer in zip(folders, tokenizers, strict=True) if not tokenizer
    ]
    if missing and config.own_tokenizers:
        raise OSError(
            f"{name_or_path} is a cascade whose members have their own tokenizers, but there is none in "
            f"{', '.join(missing)}: save it again with cascade.save_pretrained(folder)."
        )
    return None if missing else tokenizers


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises where a tokenizer to be saved beside a model would take the place of that of a cascade's first member."""
    if tokenizer is None or not getattr(model.config, "own_tokenizers", False):
        return
    if fingerprint(tokenizer) != fingerprint(model.known_tokenizers()[0]):
        raise ValueError(
            "every member of this cascade has its own tokenizer, which is saved with it, and the one given is not "
            "that of the first: leave tokenizer out."
        )


def save_tokenizers(folder: str | os.PathLike, tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
    """The first one in the folder itself, where everyone looks for a tokenizer, the others in folders of theirs."""
    for number, tokenizer in enumerate(tokenizers, start=1):
        tokenizer.save_pretrained(folder if number == 1 else os.path.join(folder, MEMBER_FOLDER.format(number)))
