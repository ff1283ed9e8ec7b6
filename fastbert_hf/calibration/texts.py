"""The texts of a calibration: whose tokenizer reads them, how they are cut, and how they are known again."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from transformers import PreTrainedModel

from ..evaluation.exit_record import ExitRecord
from ..modeling.families import max_text_tokens
from ..modeling.processing_cascade import find_tokenizer


def own_tokenizer(model: PreTrainedModel, rows: Any, tokenizer: Any) -> Any:
    """Return the tokenizer of a call; where it has none and texts are given, the model's own if it knows one."""
    if tokenizer is not None or isinstance(rows, ExitRecord) or not is_text(first_of(rows)):
        return tokenizer
    return find_tokenizer(model)


def first_of(rows: Any) -> Any:
    """Return the first of some rows, `None` where that cannot be told without reading a stream."""
    return rows[0] if hasattr(rows, "__getitem__") and hasattr(rows, "__len__") and len(rows) > 0 else None


def is_text(row: Any) -> bool:
    """Tell whether a row is a text, and not one that is tokenized."""
    return isinstance(row, str) or (isinstance(row, Mapping) and "text" in row and "input_ids" not in row)


def limit_of(model: PreTrainedModel, rows: Any, tokenizer: Any, max_length: int | None) -> int | None:
    """Return to how many tokens texts are cut, `None` where it is not known."""
    if max_length is not None or tokenizer is None or isinstance(rows, ExitRecord) or not is_text(first_of(rows)):
        return max_length
    tokenizers = getattr(tokenizer, "tokenizers", [tokenizer])
    members = getattr(model, "members", [model])
    own = [own.model_max_length for own in tokenizers]
    return min(*own, *(max_text_tokens(member.config.text_config) for member in members))


def record_digest(record: ExitRecord) -> str:
    """Return a digest of what the exits said of the texts of a record, by which they are known again."""
    return sha256(record.exit_logits.numpy().tobytes()).hexdigest()[:16]
