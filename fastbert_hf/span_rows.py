"""Questions with passages and answers, as a model reads them: tokens, and the first and last one of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def encode_passages(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    passages: Sequence[str],
    answers: Sequence[Mapping[str, Any]] | None = None,
    max_length: int | None = None,
    start: int = 0,
) -> dict[str, list]:
    """
    Return the columns of questions with their passages as a model reads them, and where there are answers `labels`:
    the first and the last token of the first answer, both 0 where there is none, or it is in a part that was cut.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast one, which knows where its tokens are.
        questions, passages (sequence of `str`): Of each row. Passages are cut, questions are not.
        answers (sequence of `Mapping`, *optional*):
            As in SQuAD: `{"text": ["Ada"], "answer_start": [17]}`, in characters of the passage.
        max_length (`int`, *optional*): Longer rows are cut to so many tokens.
        start (`int`): Number of the first row, for errors.

    Raises:
        ValueError: If a question leaves no room for its passage, or an answer is not where it should be.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not know where its tokens are: load the fast tokenizer.")
    longest = tokenizer.model_max_length if max_length is None else max_length
    for number, question in enumerate(questions, start=start):
        if len(tokenizer(question, "")["input_ids"]) >= longest:
            raise ValueError(f"the question of row {number} leaves no room for a passage in {longest} tokens.")
    encoded = tokenizer(list(questions), list(passages), truncation="only_second", max_length=longest)
    columns = dict(encoded)
    if answers is not None:
        columns["labels"] = [
            ends_of(encoded, place, passage, answer, start + place)
            for place, (passage, answer) in enumerate(zip(passages, answers, strict=True))
        ]
    return columns


def ends_of(encoded: Any, place: int, passage: str, answer: Any, number: int) -> list[int]:
    """Return the first and the last token of an answer in a row of an encoded batch."""
    if not isinstance(answer, Mapping) or not {"text", "answer_start"} <= set(answer):
        raise ValueError(
            f"the answers of row {number} must be as in SQuAD, {{'text': ['Ada'], 'answer_start': [17]}}, got "
            f"{answer!r:.60}."
        )
    texts, starts = list(answer["text"]), list(answer["answer_start"])
    if not texts:
        return [0, 0]
    first, last = starts[0], starts[0] + len(texts[0]) - 1
    if not texts[0] or passage[first : last + 1] != texts[0]:
        raise ValueError(f"the answer {texts[0]!r:.40} of row {number} is not in its passage at {first}.")
    ends = [encoded.char_to_token(place, character, sequence_index=1) for character in (first, last)]
    return [0, 0] if None in ends else ends
