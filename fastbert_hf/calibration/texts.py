"""The texts of a calibration: whose tokenizer reads them, how they are cut, and how they are known again."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from hashlib import sha256
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedModel

from ..evaluation.exit_record import ExitRecord
from ..modeling.answer_layouts import NO_TOKEN
from ..modeling.families import max_text_tokens
from ..modeling.processing_cascade import find_tokenizer
from ..modeling.teacher_digest import tells_of_training


def own_tokenizer(model: PreTrainedModel, rows: Any, tokenizer: Any) -> Any:
    """Return the tokenizer of a call; where it has none and texts are given, the model's own if it knows one."""
    if tokenizer is not None or isinstance(rows, ExitRecord) or not is_text(first_of(rows)):
        return tokenizer
    return find_tokenizer(model)


def first_of(rows: Any) -> Any:
    """Return the first of some rows, `None` where that cannot be told without reading a stream."""
    is_list = hasattr(rows, "__getitem__") and hasattr(rows, "__len__") and not isinstance(rows, Mapping)
    return rows[0] if is_list and len(rows) > 0 else None


def is_text(row: Any) -> bool:
    """Tell whether a row is a text, and not one that is tokenized."""
    return isinstance(row, str) or (isinstance(row, Mapping) and "text" in row and "input_ids" not in row)


def limit_of(model: PreTrainedModel, rows: Any, tokenizer: Any, max_length: int | None) -> int | None:
    """Return to how many tokens texts are cut, `None` where it is not known."""
    if max_length is not None and (
        not isinstance(max_length, Integral) or isinstance(max_length, bool) or max_length < 1
    ):
        raise ValueError(f"max_length must be a whole number of at least 1, got {max_length!r:.40}.")
    if isinstance(rows, ExitRecord) or not is_text(first_of(rows)):
        return max_length
    if max_length is not None:
        raise ValueError(
            f"max_length={max_length} tells how rows were cut that are tokenized already. Texts are cut to what the "
            "tokenizer and the model can read: set tokenizer.model_max_length, and leave out max_length."
        )
    tokenizers = getattr(tokenizer, "tokenizers", [tokenizer])
    members = getattr(model, "members", [model])
    own = [own.model_max_length for own in tokenizers]
    return min(*own, *(max_text_tokens(member.config.text_config) for member in members))


def check_record(model: PreTrainedModel, record: ExitRecord) -> None:
    """Raise a `ValueError` if a record was made with other weights than those of a model, as far as that is known."""
    for member, digest in zip(getattr(model, "members", [model]), record.weights, strict=False):
        found = member.weights_digest()
        if digest and found and tells_of_training(found, digest):
            raise ValueError(
                "the record was made with other weights than those of this model: record it anew with "
                "record_exits(model, texts, tokenizer=tokenizer)."
            )


def check_batch_size(batch_size: Any) -> None:
    """Raise a `ValueError` unless so many rows can be a batch."""
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r:.40}.")


# Of a record, the texts by which it is known again, and the bytes of each; further ones are left out.
MOST_KNOWN, BYTES = 4000, 3
# Texts that were seen before, as a share, from which on they are taken for the same: some texts are common.
MOST_SHARED = 0.1


def known_again(record: ExitRecord) -> str:
    """Return by what the texts of a record are known again, in any order and batches, as base64."""
    return base64.b64encode(b"".join(sorted(marks_of(record))[:MOST_KNOWN])).decode()


def marks_of(record: ExitRecord) -> set[bytes]:
    """Return a mark of each text: of how long it is, and what the last exit says of it, roughly."""
    lengths = torch.zeros(len(record.exit_logits), 1) if record.layer_flops is None else record.layer_flops[:, -1:]
    # Where an exit says a single number, what all of them say.
    logits = record.exit_logits if record.exit_logits.shape[2:] == (1,) else record.exit_logits[:, -1]
    said = torch.cat([(100 * logits).flatten(1).round().double(), lengths.double()], 1).numpy()
    # Where tokens are labelled, those that a text has not.
    return {sha256(row[row != 100 * NO_TOKEN].tobytes()).digest()[:BYTES] for row in said}


def share_known(record: ExitRecord, known: str) -> float:
    """Return which share of the texts of a record is known from another one, by what [`known_again`] made of that."""
    decoded = base64.b64decode(known)
    marks = {decoded[place : place + BYTES] for place in range(0, len(decoded), BYTES)}
    own = marks_of(record)
    return len(own & marks) / len(own)
