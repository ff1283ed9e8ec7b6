"""Calls of tokenizers: by one thread at a time, with the keywords that they take, and whether one can be a model's."""

from __future__ import annotations

import os
from collections.abc import Iterable, MutableMapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from inspect import Parameter, signature
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from transformers import BatchEncoding, PreTrainedConfig, PreTrainedTokenizerBase


# A fast tokenizer keeps what a call asks for, such as max_length, as its own state until the next one. The locks lie
# beside the tokenizers, which stay as easy to copy and to pickle as they were.
_LOCKS: MutableMapping[PreTrainedTokenizerBase, Any] = WeakKeyDictionary()
if hasattr(os, "register_at_fork"):  # not on Windows
    # A thread that holds a lock does not live on in the child.
    os.register_at_fork(after_in_child=_LOCKS.clear)

# Methods of tokenizers that name what a call may ask for, and what of it is not for a caller to give.
CALLS = ("__call__", "_encode_plus", "prepare_for_tokenization")
NOT_ASKED = ("self", "text", "text_target", "text_pair_target", "padding_strategy", "truncation_strategy")
# Rows of an embedding matrix for which a tokenizer may have no token, and the part of all that it must have.
SPARE_ROWS = 1024
LEAST_SHARE = 0.9


def call_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], text_pairs: Sequence[str] | None = None, **kwargs
) -> BatchEncoding:
    """Call a tokenizer. Threads may share it, whatever each of them asks for."""
    is_fast = getattr(tokenizer, "is_fast", False)  # others keep no state
    with _LOCKS.setdefault(tokenizer, RLock()) if is_fast else nullcontext():
        return tokenizer(texts, text_pairs, **kwargs)


@lru_cache
def call_arguments(tokenizer_class: type) -> frozenset[str]:
    """Return the keywords that the call of a tokenizer takes, those of its own class included."""
    methods = [vars(owner)[name] for owner in tokenizer_class.__mro__ for name in CALLS if name in vars(owner)]
    parameters = [parameter for method in methods for parameter in signature(method).parameters.values()]
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in kinds).difference(NOT_ASKED)


def check_vocabulary(tokenizer: Any, text_config: PreTrainedConfig) -> None:
    """
    Raise a `ValueError` if a tokenizer cannot be that of a backbone. It can be if it knows more than its special
    tokens, most of which the model must have; if its vocabulary, tokens added later apart, is not larger than the
    model's; and if it lacks at most a tenth of that, or 1,024 tokens: models have rows to spare. An added token that
    the model does not have is an error of the text in which it stands.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    size, rows = len(tokenizer), text_config.vocab_size
    special = [token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token]
    ids = tokenizer.convert_tokens_to_ids(special)
    lost = (None, tokenizer.unk_token_id)
    unknown = [token for token, own in zip(special, ids, strict=True) if own in lost or own >= rows]
    is_empty = size <= len(set(tokenizer.all_special_ids))
    is_small = size < LEAST_SHARE * rows and size < rows - SPARE_ROWS
    if is_empty or is_small or tokenizer.vocab_size > rows or 2 * len(unknown) > len(special):
        tokens = f"{size:,} tokens, all of them special ones" if is_empty else f"{size:,} tokens"
        tokens += f", {', '.join(unknown)} not among those of the model" if unknown else ""
        raise ValueError(
            f"this {type(tokenizer).__name__} is not the model's: it has {tokens}, and the model a vocabulary of "
            f"{rows:,}. A file may be missing, such as tokenizer.json. Save the right tokenizer beside the model, as "
            "in tokenizer.save_pretrained(folder), or give it as tokenizer=..."
        )


def first_of_words(words: Iterable[int | None]) -> list[int]:
    """Return a 1 for the first token of each word, and a 0 for the others and for special tokens."""
    found, before = [], None
    for word in words:
        found.append(int(word is not None and word != before))
        before = word
    return found
