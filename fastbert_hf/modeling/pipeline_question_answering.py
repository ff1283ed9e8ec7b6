"""The "fast-question-answering" pipeline: where the answer to a question is in a passage, with a speed per call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import torch
from transformers import Pipeline
from transformers.utils.logging import tqdm

from .adaptive_pipeline import BY_TOKENS, AdaptivePipeline, DialOfPieces, dial_of_pieces, error_of_text
from .families import max_text_tokens
from .modeling_outputs import Prediction


MAX_ANSWER_LEN, DOC_STRIDE, MAX_SEQ_LEN = 15, 128, 384  # as in the stock pipeline of Transformers 4


class Window(NamedTuple):
    """A question with a part of its passage, as the model reads it."""

    inputs: dict[str, list[int]]
    offsets: list[tuple[int, int]]  # of each token in the passage
    in_passage: list[bool]


class SpanPipeline(Pipeline):
    """What a stock pipeline would be: how questions and passages are read, and what answers are made of logits."""

    _load_processor = _load_image_processor = _load_feature_extractor = False

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        doc_stride: int | None = None,
        max_answer_len: int | None = None,
        max_seq_len: int | None = None,
        max_question_len: int | None = None,
        handle_impossible_answer: bool | None = None,
    ):
        numbers = {
            "top_k": top_k,
            "doc_stride": doc_stride,
            "max_answer_len": max_answer_len,
            "max_seq_len": max_seq_len,
            "max_question_len": max_question_len,
        }
        for name, value in numbers.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}. Example: {name}=16")
        given = {name: value for name, value in numbers.items() if value is not None}
        preprocess = {name: given[name] for name in ("doc_stride", "max_seq_len", "max_question_len") if name in given}
        postprocess = {name: given[name] for name in ("top_k", "max_answer_len") if name in given}
        if handle_impossible_answer is not None:
            postprocess["handle_impossible_answer"] = handle_impossible_answer
        return preprocess, {}, postprocess

    def preprocess(
        self,
        asked: Mapping[str, str],
        doc_stride: int = DOC_STRIDE,
        max_seq_len: int = MAX_SEQ_LEN,
        max_question_len: int = 64,
    ) -> list[Window]:
        """Return a question with each part of its passage."""
        longest = min(max_seq_len, self.tokenizer.model_max_length, max_text_tokens(self.model.config.text_config))
        question = asked["question"]
        ids = self.tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(ids) > max_question_len:
            question = question[: ids[max_question_len - 1][1]]
        around = len(self.tokenizer(question, "")["input_ids"])
        room = longest - around
        if room < 1:
            raise ValueError(
                f"the question has {around} tokens and leaves no room for a passage in {longest}: give a smaller "
                "max_question_len, or a greater max_seq_len."
            )
        encoded = self.tokenizer(
            question,
            asked["context"],
            truncation="only_second",
            max_length=longest,
            stride=min(doc_stride, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        windows = []
        for number, offsets in enumerate(encoded["offset_mapping"]):
            names = [name for name in self.tokenizer.model_input_names if name in encoded and name != "attention_mask"]
            in_passage = [part == 1 for part in encoded.sequence_ids(number)]
            windows.append(Window({name: encoded[name][number] for name in names}, offsets, in_passage))
        return windows

    def postprocess(
        self,
        outputs: tuple[str, list[tuple[Window, Prediction]]],
        top_k: int = 1,
        max_answer_len: int = MAX_ANSWER_LEN,
        handle_impossible_answer: bool = False,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Return the best answers of all parts of a passage."""
        context, windows = outputs
        answers, none = [], 1.0
        for window, prediction in windows:
            starts, ends, no_answer = end_probabilities(window, prediction.logits)
            none = min(none, no_answer)
            answers += best_spans(window, starts, ends, top_k, max_answer_len, prediction.exit_layer)
        if handle_impossible_answer:
            deepest = max(prediction.exit_layer for _, prediction in windows)
            answers.append({"score": none, "start": 0, "end": 0, "exit_layer": deepest})
        answers = sorted(answers, key=lambda answer: answer["score"], reverse=True)
        answers = [
            {
                "score": answer["score"],
                "start": answer["start"],
                "end": answer["end"],
                "answer": context[answer["start"] : answer["end"]],
                "exit_layer": answer["exit_layer"],
            }
            for answer in without_repeats(answers)[:top_k]
        ]
        return answers[0] if len(answers) == 1 else answers

    def _forward(self, model_inputs, **kwargs):
        raise NotImplementedError("answers come from `predict`")


class FastQuestionAnsweringPipeline(AdaptivePipeline, SpanPipeline):
    """
    Answer questions by a part of a passage, with a [`FastBertForQuestionAnswering`]. Transformers 5 has no stock
    pipeline for that; arguments and answers are those of the one in Transformers 4. Beside them a call takes `speed`,
    `speedup` or `max_disagreement` and the limits of [`FastTextClassificationPipeline`], and every answer carries its
    `exit_layer`, that of the part of the passage in which it was found.

    Example:

    ```python
    >>> import fastbert_hf
    >>> from transformers import pipeline

    >>> reader = pipeline("fast-question-answering", model="org/fastbert-squad")
    >>> reader(question="Who wrote it?", context="Ada Lovelace wrote the notes.", speed=0.3)
    {'score': 0.97, 'start': 0, 'end': 12, 'answer': 'Ada Lovelace', 'exit_layer': 4}
    ```
    """

    task_name, of_task = "fast-question-answering", "question-answering"
    model_class_name = "FastBertForQuestionAnswering"
    passes_to_tokenizer = False
    stock_class = SpanPipeline

    def __call__(self, inputs: Any = None, *, question: Any = None, context: Any = None, **kwargs) -> Any:
        """
        Answer questions.

        Args:
            inputs (`dict`, or iterable of them, *optional*): `{"question": ..., "context": ...}`, one or many.
            question, context (`str` or `list` of `str`, *optional*):
                In place of `inputs`. One passage may serve several questions.
            speed (`float` or iterable of `float`, *optional*): In [0, 1], for this call, or one for each question.
            top_k (`int`, *optional*): Number of answers; a list of them where it is above 1.
            doc_stride (`int`, *optional*): Tokens by which parts of a long passage overlap; 128 unless given.
            max_seq_len (`int`, *optional*): Tokens of a question with a part; 384, or what the model reads.
            max_question_len (`int`, *optional*): Longer questions are cut to so many tokens; 64 unless given.
            max_answer_len (`int`, *optional*): Tokens of an answer at most; 15 unless given.
            handle_impossible_answer (`bool`, *optional*): Whether no answer, `""`, may be the best.
            kwargs: As in [`FastTextClassificationPipeline`], those about speed, depth and errors.

        Returns:
            `dict`, or a list of them where there are several questions or answers: `score`, `start`, `end` (in
            characters), `answer` and `exit_layer`.
        """
        if kwargs.get("batch_size") is None:
            kwargs["batch_size"] = BY_TOKENS if self._batch_size is None else self._batch_size
        return super().__call__(questions_of(inputs, question, context), **kwargs)

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        return next(self._answers([inputs], 1, preprocess_params, forward_params, postprocess_params), [])

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        return self._answers(inputs, batch_size, preprocess_params, forward_params, postprocess_params)

    def _answers(self, inputs, batch_size, preprocess_params, forward_params, postprocess_params):
        forward_params = dict(forward_params)
        shows = forward_params.pop("progress_bar", False)
        forward_params.pop("return_uncertainty", None)
        on_error = forward_params.pop("on_error", "raise")
        forward_params["on_error"] = "return"  # raised here, by the number of the question
        total = len(inputs) if isinstance(inputs, Sized) else None
        waiting: list[tuple[dict[str, str], list[Window] | Exception]] = []
        dial = dial_of_pieces(forward_params, inputs)
        encoded = self._encoded(inputs, waiting, dial, preprocess_params)
        predictions = self._predictions(encoded, batch_size, {"truncation": True, "windows": True}, forward_params)
        for position, (asked, windows, said) in enumerate(
            tqdm(by_question(predictions, waiting), total=total, desc="Answering", disable=not shows)
        ):
            error = next((prediction.error for prediction in said if prediction.error is not None), None)
            if error is None:
                yield self.postprocess((asked["context"], list(zip(windows, said, strict=True))), **postprocess_params)
                continue
            error = error_of_text(error, position)
            if on_error == "raise":
                raise error
            if on_error == "return":
                yield {"error": str(error), "position": position}

    def _encoded(
        self,
        inputs: Iterable,
        waiting: list,
        dial: DialOfPieces | None,
        preprocess_params: dict[str, Any],
    ) -> Iterator:
        """Yield what the model reads of each part of a passage, and note the rest."""
        for position, asked in enumerate(inputs):
            try:
                windows = self.preprocess(checked_question(asked), **preprocess_params)
            except Exception as error:
                failure = ValueError(f"input {position}: {error}")
                if dial is not None:
                    dial.begin(position, 1)
                waiting.append((asked, failure))
                yield failure
                continue
            if dial is not None:
                dial.begin(position, len(windows))
            waiting.append((asked, windows))
            yield from (window.inputs for window in windows)


def questions_of(inputs: Any, question: Any, context: Any) -> Any:
    """Return what a caller asks, one as a `dict`, many as a list or as they come."""
    if inputs is not None and (question is not None or context is not None):
        raise ValueError("give inputs, or question and context, not both.")
    if inputs is not None:
        return inputs if isinstance(inputs, (Mapping, list)) else (asked for asked in inputs)
    if isinstance(question, str) and isinstance(context, str):
        return {"question": question, "context": context}
    if not isinstance(question, (str, Sequence)) or not isinstance(context, (str, Sequence)):
        raise ValueError('give a question and its passage: reader(question="Who?", context="Ada did it.")')
    if isinstance(context, str):
        context = [context] * len(question)
    if isinstance(question, str) or len(question) != len(context):
        raise ValueError(f"there are {len(question)} questions and {len(context)} passages: give one for each.")
    return [{"question": own, "context": passage} for own, passage in zip(question, context, strict=True)]


def checked_question(asked: Any) -> Mapping[str, str]:
    """Return a question and its passage, or raise an error that says what is wrong."""
    if not isinstance(asked, Mapping) or not {"question", "context"} <= set(asked):
        raise ValueError(f'a question is {{"question": ..., "context": ...}}, got {asked!r:.60}.')
    for name in ("question", "context"):
        if not isinstance(asked[name], str) or not asked[name].strip():
            raise ValueError(f"the {name} must be a text with something in it, got {asked[name]!r:.40}.")
    return asked


def by_question(predictions: Iterable[Prediction], waiting: list) -> Iterator[tuple[Any, list, list[Prediction]]]:
    """Yield each question with the parts of its passage and what the model says of them."""
    said: list[Prediction] = []
    for prediction in predictions:
        said.append(prediction)
        asked, windows = waiting[0]
        if isinstance(windows, Exception) or len(said) == len(windows):
            waiting.pop(0)
            yield asked, windows, said
            said = []


def end_probabilities(window: Window, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return how likely an answer begins and ends at each token of the passage, and that there is none."""
    allowed = torch.tensor(window.in_passage)
    allowed[0] = True  # the first token stands for no answer
    starts, ends = logits.float().masked_fill(~allowed[:, None], -1e4).softmax(0).unbind(-1)
    no_answer = float(starts[0] * ends[0])
    inside = torch.tensor(window.in_passage)
    return starts * inside, ends * inside, no_answer


def best_spans(
    window: Window, starts: torch.Tensor, ends: torch.Tensor, top_k: int, max_answer_len: int, exit_layer: int
) -> list[dict[str, Any]]:
    """Return the likeliest answers of a part, which end where they begin or after, and are not too long."""
    products = (starts[:, None] * ends[None]).triu().tril(max_answer_len - 1)
    scores, places = products.flatten().topk(min(top_k, products.numel()))
    found = []
    for score, place in zip(scores.tolist(), places.tolist(), strict=True):
        first, last = divmod(place, len(starts))
        if 0 <= last - first < max_answer_len and window.in_passage[first] and window.in_passage[last]:
            start, end = window.offsets[first][0], window.offsets[last][1]
            found.append({"score": score, "start": start, "end": end, "exit_layer": exit_layer})
    return found


def without_repeats(answers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return answers without those that were there before, as parts of a passage overlap."""
    seen, kept = set(), []
    for answer in answers:
        place = answer["start"], answer["end"]
        if place not in seen:
            seen.add(place)
            kept.append(answer)
    return kept


__all__ = ["FastQuestionAnsweringPipeline"]
