"""The "fast-text-classification" pipeline: text classification with a speed per call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset
from transformers import TextClassificationPipeline

from .exit_policies import check_max_layers, check_speed


class FastTextClassificationPipeline(TextClassificationPipeline):
    """
    `TextClassificationPipeline` for a FastBERT model. Everything is as there, and beside it:

    - `speed` and `max_layers`, to `pipeline(...)` or to a call; without them the model's config decides;
    - every answer carries its `exit_layer`, the number of layers that the text ran through;
    - an empty list, a column of a `datasets` data set and any iterator are welcome.

    Example:

    ```python
    >>> import fastbert_hf
    >>> from transformers import pipeline

    >>> classifier = pipeline("fast-text-classification", model="org/fastbert-chnsenticorp", speed=0.5)
    >>> classifier("I would go there again.")
    [{'label': 'positive', 'score': 0.98, 'exit_layer': 2}]
    >>> classifier([{"text": "A man eats.", "text_pair": "Someone eats."}], speed=0)
    ```
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # A model that comes straight from its training would answer with dropout.
        self.model.eval()
        model_type = self.model.config.model_type
        if model_type != "fastbert":
            raise ValueError(
                f"fast-text-classification needs a FastBERT model, got one of type {model_type!r}. Wrap it with "
                "FastBertForSequenceClassification.from_classifier(name) and self-distil it first."
            )

    def _sanitize_parameters(self, speed=None, max_layers=None, **kwargs):
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if speed is not None:
            check_speed(speed)
            forward["speed"] = speed
        if max_layers is not None:
            check_max_layers(max_layers, self.model.config.num_hidden_layers)
            forward["max_layers"] = max_layers
        return preprocess, forward, postprocess

    def __call__(self, inputs, **kwargs) -> list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """
        Classifies texts.

        Args:
            inputs (`str`, `dict`, `list`, `Dataset` or iterator):
                A text, a pair as `{"text": ..., "text_pair": ...}`, or many of either. Texts must not be empty.
            speed (`float`, *optional*): In [0, 1], for this call; 0 runs every layer.
            max_layers (`int`, *optional*): Every text has answered after this many layers.
            kwargs:
                `top_k`, `function_to_apply`, `batch_size` and arguments of the tokenizer, such as `truncation=True`.

        Returns:
            As `TextClassificationPipeline`: a list for a text or a list, an iterator for a data set or an iterator.
            Each answer is `{"label": str, "score": float, "exit_layer": int}`.
        """
        if isinstance(inputs, (str, dict, Dataset)):
            return super().__call__(inputs, **kwargs)
        if isinstance(inputs, Sequence) and not isinstance(inputs, bytes):  # lists, tuples, columns of `datasets`
            inputs = list(one_kind(inputs))
            return super().__call__(inputs, **kwargs) if inputs else []
        if isinstance(inputs, Iterable) and not isinstance(inputs, bytes):
            return super().__call__((text for text in one_kind(inputs)), **kwargs)
        check_text(inputs)
        return super().__call__(inputs, **kwargs)

    def preprocess(self, inputs, **tokenizer_kwargs):
        if isinstance(inputs, dict) and inputs.get("text_pair", "") is None:
            inputs = {name: text for name, text in inputs.items() if name != "text_pair"}
        for text in inputs.values() if isinstance(inputs, dict) else [inputs]:
            # The old form of a pair, [[text, text_pair]], is left to the stock pipeline.
            if not isinstance(text, list):
                check_text(text)
        return super().preprocess(inputs, **tokenizer_kwargs)

    def _forward(self, model_inputs, speed=None, max_layers=None):
        config = self.model.config
        return self.model(
            **model_inputs,
            speed=config.speed if speed is None else speed,
            max_layers=config.max_layers if max_layers is None else max_layers,
        )

    def postprocess(self, model_outputs, **kwargs):
        answers = super().postprocess(model_outputs, **kwargs)
        exit_layer = model_outputs["exit_layer"].item()
        for answer in answers if isinstance(answers, list) else [answers]:
            answer["exit_layer"] = exit_layer
        return answers


def one_kind(inputs: Iterable) -> Iterator:
    """The same inputs, with a `ValueError` at the first that is a pair among single texts or the other way round."""
    first = None
    for index, text in enumerate(inputs):
        kind = "a pair" if isinstance(text, dict) and text.get("text_pair") is not None else "a single text"
        if first is not None and kind != first:
            raise ValueError(
                f"input {index} is {kind}, but those before it are not: a classifier reads one or the other. Call it "
                "for "
                'each kind by itself, pairs as {"text": ..., "text_pair": ...}.'
            )
        first = kind
        yield text


def check_text(text: Any) -> None:
    """Raises unless `text` is a string with something in it."""
    if not isinstance(text, str):
        raise TypeError(
            f"a text must be a string, got {type(text).__name__} ({str(text)[:40]!r}). Pairs are "
            '{"text": ..., "text_pair": ...}; bytes need text.decode("utf-8") first.'
        )
    if not text.strip():
        raise ValueError(
            f"got an empty text ({text!r}): leave empty texts out, as in [text for text in texts if text.strip()]."
        )
