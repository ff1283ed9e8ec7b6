"""The "fast-token-classification" pipeline: a label for each token, or entities, with a speed per call."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TokenClassificationPipeline
from transformers.utils.logging import tqdm

from .adaptive_pipeline import BY_TOKENS, AdaptivePipeline, DialOfPieces, dial_of_pieces, error_of_text
from .answer_layouts import NO_TOKEN
from .modeling_outputs import Prediction
from .pipeline_inputs import texts_of
from .tokenization import first_of_words


FIRST_TOKENS = "first_tokens"  # of which a label is wanted
# What there is of a piece beside what the model reads, all but the first from stock `preprocess`.
ABOUT = (
    FIRST_TOKENS,
    "special_tokens_mask",
    "offset_mapping",
    "sentence",
    "is_last",
    "word_ids",
    "word_to_chars_map",
)


class Piece(NamedTuple):
    """A text, or with `stride` a part of one, as the stock pipeline encodes it; or why there is none."""

    inputs: dict[str, Any]
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        return self.error is not None or self.inputs["is_last"]


class FastTokenClassificationPipeline(AdaptivePipeline, TokenClassificationPipeline):
    """
    `TokenClassificationPipeline` for a [`FastBertForTokenClassification`]. Everything is as there, `stride`, offsets
    and all values of `aggregation_strategy` included, and beside it:

    - `speed`, `speedup` or `max_disagreement`, `min_exit_layer`, `max_layers`, `exit_policy` and `patience`, to
      `pipeline(...)` or to a call; without them the model's config decides. A text leaves when its least certain token
      is sure;
    - every entity carries the `exit_layer` of its text, the number of layers that the text ran through; with `stride`
      that of the part that it was found in. Texts of which nothing is told have none: `return_exit_layers=True` gives
      `{"entities": [...], "exit_layer": ...}` for each text;
    - it needs no `batch_size` to be fast; `progress_bar=True` shows how far a call is, and `on_error` says what
      becomes of a text that has no answer: `"raise"`, `"return"` (`{"error": ..., "position": ...}` in its
      place) or `"skip"`.

    Example:

    ```python
    >>> import fastbert_hf
    >>> from transformers import pipeline

    >>> tagger = pipeline("fast-token-classification", model="org/fastbert-conll", aggregation_strategy="simple")
    >>> tagger("Ada lives in Turin.", speed=0.3)
    [{'entity_group': 'PER', 'score': 0.99, 'word': 'Ada', 'start': 0, 'end': 3, 'exit_layer': 4}, ...]
    ```
    """

    task_name, of_task = "fast-token-classification", "token-classification"
    model_class_name = "FastBertForTokenClassification"
    stock_class = TokenClassificationPipeline
    passes_to_tokenizer = False

    def _sanitize_parameters(self, return_exit_layers=None, **kwargs):
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if return_exit_layers is not None:
            forward["return_exit_layers"] = return_exit_layers
        return preprocess, forward, postprocess

    def __call__(self, inputs: Any, **kwargs) -> Any:
        """
        Label the tokens of texts.

        Args:
            inputs (`str`, `list`, `Dataset`, `DataFrame` or iterator):
                A text or many; of a table the column `text`; with `is_split_into_words=True` lists of words.
            speed (`float` or iterable of `float`, *optional*):
                In [0, 1], for this call, or one for each text; 0 runs every layer.
            return_exit_layers (`bool`, *optional*): Whether each text has a dict of `entities` and its `exit_layer`.
            kwargs:
                The other arguments of the stock pipeline, such as `aggregation_strategy`, `ignore_labels`, `stride`;
                and those of [`FastTextClassificationPipeline`] that are about speed, depth and errors.
        """
        if kwargs.get("batch_size") is None:
            kwargs["batch_size"] = BY_TOKENS if self._batch_size is None else self._batch_size
        if not kwargs.get("is_split_into_words"):
            inputs = texts_of(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        return next(self._answers([inputs], 1, preprocess_params, forward_params, postprocess_params), [])

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        return self._answers(inputs, batch_size, preprocess_params, forward_params, postprocess_params)

    def _answers(self, inputs, batch_size, preprocess_params, forward_params, postprocess_params):
        forward_params = dict(forward_params)
        shows = {name: forward_params.pop(name, False) for name in ("progress_bar", "return_exit_layers")}
        forward_params.pop("return_uncertainty", None)
        on_error = forward_params.pop("on_error", "raise")
        forward_params["on_error"] = "return"  # raised here, by the number of the text
        total = len(inputs) if isinstance(inputs, Sized) else None
        waiting: deque[Piece] = deque()
        reading = {"truncation": True} | ({"stride": True} if "tokenizer_params" in preprocess_params else {})
        dial = dial_of_pieces(forward_params, inputs)
        encoded = self._encoded(inputs, waiting, dial, preprocess_params)
        answers = self._predictions(encoded, batch_size, reading, forward_params)
        texts = tqdm(by_text(answers, waiting), total=total, desc="Tagging", disable=not shows["progress_bar"])
        for position, (pieces, predictions) in enumerate(texts):
            error = next((prediction.error for prediction in predictions if prediction.error is not None), None)
            if error is not None:
                error = error_of_text(error, position)
                if on_error == "raise":
                    raise error
                if on_error == "return":
                    yield {"error": str(error), "position": position}
                continue
            entities = self._entities(pieces, predictions, postprocess_params)
            depth = max(prediction.exit_layer for prediction in predictions)
            yield {"entities": entities, "exit_layer": depth} if shows["return_exit_layers"] else entities

    def _entities(
        self, pieces: list[Piece], predictions: list[Prediction], postprocess_params: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the entities of a text, each with the exit layer of its piece, joined as the stock pipeline does."""
        of_text = {name: pieces[0].inputs.get(name) for name in ("sentence", "word_to_chars_map")}
        found = []
        for piece, prediction in zip(pieces, predictions, strict=True):
            outputs = {**with_logits(piece, prediction), **of_text}
            entities = self.postprocess([outputs], **postprocess_params)
            found += [{**entity, "exit_layer": prediction.exit_layer} for entity in entities]
        return self.aggregate_overlapping_entities(found) if len(pieces) > 1 else found

    def _pieces(self, text: Any, **preprocess_params) -> Iterator[dict[str, Any]]:
        """Yield what stock `preprocess` does, and of which tokens a label is wanted: the first ones of words."""
        tokenizer, found = self.tokenizer, []
        if not tokenizer.is_fast:  # nothing tells its words: all but special tokens
            for inputs in self.preprocess(text, **preprocess_params):
                yield {**inputs, FIRST_TOKENS: (1 - inputs["special_tokens_mask"][0]).tolist()}
            return

        def noted(*arguments, **settings):
            found.append(tokenizer(*arguments, **settings))
            return found[-1]

        noted.is_fast, noted.model_max_length = True, tokenizer.model_max_length
        own = copy.copy(self)  # whose tokenizer notes what it gives, in this thread alone
        own.tokenizer = noted
        for number, inputs in enumerate(self.stock_class.preprocess(own, text, **preprocess_params)):
            words = found[0].word_ids(number)
            yield {**inputs, FIRST_TOKENS: first_of_words(words)}

    def _encoded(
        self,
        inputs: Iterable,
        waiting: deque[Piece],
        dial: DialOfPieces | None,
        preprocess_params: dict[str, Any],
    ) -> Iterator[dict[str, list[int]] | Exception]:
        """Yield what the model reads of each piece, and note the rest of it."""
        for position, text in enumerate(inputs):
            try:
                pieces = [Piece(inputs) for inputs in self._pieces(text, **preprocess_params)]
            except Exception as error:  # of the tokenizer, which does not say where
                pieces = [Piece({}, ValueError(f"input {position}: {error}"))]
            if dial is not None:
                dial.begin(position, len(pieces))
            for piece in pieces:
                waiting.append(piece)
                if piece.error is not None:
                    yield piece.error
                else:
                    read = {name: piece.inputs[name][0].tolist() for name in piece.inputs if name not in ABOUT}
                    yield {**read, "token_mask": piece.inputs[FIRST_TOKENS]}


def by_text(answers: Iterable[Prediction], waiting: deque[Piece]) -> Iterator[tuple[list[Piece], list[Prediction]]]:
    """Yield the pieces of each text with what the model says of them."""
    pieces, predictions = [], []
    for prediction in answers:
        pieces.append(waiting.popleft())
        predictions.append(prediction)
        if pieces[-1].is_last:
            yield pieces, predictions
            pieces, predictions = [], []


def with_logits(piece: Piece, prediction: Prediction) -> dict[str, Any]:
    """Return what stock `postprocess` reads of a piece. Padding, which no model saw, has no logits."""
    inputs = dict(piece.inputs)
    logits, tokens = prediction.logits, inputs["input_ids"].shape[1]
    if len(logits) < tokens:  # of the pieces of a text, which the tokenizer made equally long
        is_token = inputs["attention_mask"][0].bool()
        padded = nn.functional.pad(logits, (0, 0, 0, tokens - len(logits)), value=NO_TOKEN)
        padded[is_token] = logits
        padded[~is_token] = NO_TOKEN
        logits = padded
    return {**inputs, "logits": logits.to(torch.float32)[None]}


__all__ = ["FastTokenClassificationPipeline"]
