"""The "fast-text-classification" pipeline: text classification with a speed per call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

from torch.utils.data import Dataset
from transformers import TextClassificationPipeline
from transformers.pipelines.pt_utils import KeyDataset, KeyPairDataset
from transformers.pipelines.text_classification import ClassificationFunction
from transformers.utils.logging import tqdm

from .encoded_texts import read_blocks, rows_of
from .exit_policies import check_speed, exit_range
from .processing_cascade import CascadeProcessor, check_tokenizer
from .tasks import task_of


# Texts that the tokenizer gets at a time.
BLOCK_TEXTS = 256
# Where no batch size was given: batches are cut by their tokens.
BY_TOKENS = "by tokens"


class FastTextClassificationPipeline(TextClassificationPipeline):
    """
    `TextClassificationPipeline` for a FastBERT model. Everything is as there, and beside it:

    - `speed`, `min_exit_layer` and `max_layers`, to `pipeline(...)` or to a call; without them the model's config
      decides;
    - every answer carries its `exit_layer`, the number of layers that the text ran through;
    - it needs no `batch_size` to be fast ([`FastBertForSequenceClassification.predict`]); one that is given is kept;
    - an empty list, a `datasets` data set or a column of one, and any iterator are welcome; `progress_bar=True` shows
      how far a call is.

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
        if model_type not in ("fastbert", "fastbert_cascade"):
            raise ValueError(
                f"fast-text-classification needs a FastBERT model, got one of type {model_type!r}. Wrap it with "
                "FastBertForSequenceClassification.from_classifier(name) and self-distil it first."
            )
        if getattr(self.model.config, "own_tokenizers", False) and not hasattr(self.tokenizer, "tokenizers"):
            # What Transformers has loaded is that of the first member.
            self.tokenizer = CascadeProcessor.from_pretrained(
                self.model.name_or_path, revision=getattr(self.model.config, "_commit_hash", None)
            )
        check_tokenizer(self.model, self.tokenizer)

    def _sanitize_parameters(self, speed=None, min_exit_layer=None, max_layers=None, progress_bar=None, **kwargs):
        preprocess, _, postprocess = super()._sanitize_parameters(**kwargs)
        if speed is not None:
            check_speed(speed)
        limits = {"min_exit_layer": min_exit_layer, "max_layers": max_layers}
        for name, value in limits.items():
            if value is not None and name not in self.model.config.call_defaults:
                raise ValueError(
                    f"{name}={value!r} is not for a cascade, whose members each have their own layers: set it in the "
                    f"config of a member before from_members([...]). Leave out {name}."
                )
        exit_range(self.model.config.num_hidden_layers, **limits)
        forward = {"speed": speed, **limits, "progress_bar": progress_bar}
        return preprocess, {name: value for name, value in forward.items() if value is not None}, postprocess

    def __call__(self, inputs, **kwargs) -> list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """
        Classify texts.

        Args:
            inputs (`str`, `dict`, `list`, `Dataset` or iterator):
                A text, a pair as `{"text": ..., "text_pair": ...}`, or many of either. Texts must not be empty.
            speed (`float`, *optional*): In [0, 1], for this call; 0 runs every layer.
            min_exit_layer (`int`, *optional*): No text leaves before this layer.
            max_layers (`int`, *optional*): Every text has answered after this many layers.
            batch_size (`int`, *optional*):
                Reads and answers so many texts at a time. An iterator is read up to 16 batches ahead unless given;
                1 answers each text before the next is read.
            progress_bar (`bool`, *optional*): Whether to show one.
            kwargs:
                `top_k`, `function_to_apply` and arguments of the tokenizer, such as `truncation=True`. `num_workers`
                has no use here: a fast tokenizer takes every core by itself.

        Returns:
            As `TextClassificationPipeline`: a list for a text or a list, an iterator for a data set or an iterator.
            Each answer is `{"label": str, "score": float, "exit_layer": int}`.
        """
        if kwargs.get("batch_size") is None:
            # The stock call takes no batch size for 1.
            kwargs["batch_size"] = BY_TOKENS if self._batch_size is None else self._batch_size
        columns = getattr(inputs, "column_names", None)
        if columns is not None:
            inputs = texts_of(inputs, columns)
        if isinstance(inputs, Iterable) and not isinstance(inputs, (str, bytes, dict, Dataset)):
            is_sequence = isinstance(inputs, Sequence)  # lists, tuples, columns of `datasets`
            if is_sequence and len(inputs) == 0:
                return []
            inputs = list(inputs) if is_sequence else (text for text in inputs)
        return super().__call__(inputs, **kwargs)

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        return next(self._answers([inputs], 1, preprocess_params, forward_params, postprocess_params))

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        return self._answers(inputs, batch_size, preprocess_params, forward_params, postprocess_params)

    def _answers(self, inputs, batch_size, preprocess_params, forward_params, postprocess_params):
        total = len(inputs) if isinstance(inputs, Sized) else None
        if isinstance(inputs, Dataset) and total is not None:
            inputs = map(inputs.__getitem__, range(total))
        encoded = self._encode(inputs, BLOCK_TEXTS if batch_size == BY_TOKENS else batch_size, preprocess_params)
        config = self.model.config
        arguments = {name: getattr(config, name) for name in config.call_defaults}
        arguments.update(forward_params, batch_size=None if batch_size == BY_TOKENS else batch_size)
        shows_progress = arguments.pop("progress_bar", False)
        answers = self.model.predict(encoded, **arguments)
        for answer in tqdm(answers, total=total, desc="Classifying") if shows_progress else answers:
            outputs = {"logits": answer.logits[None], "exit_layer": answer.exit_layer}
            if hasattr(config, "members"):
                outputs["exit_member"] = answer.exit_member
            yield self.postprocess(outputs, **postprocess_params)

    def _encode(self, inputs, block_texts, tokenizer_kwargs):
        """Yield the stream's texts as the tokenizer encodes them, many at a time and without padding."""
        arguments = {**tokenizer_kwargs, "padding": False, "return_tensors": None, "return_attention_mask": False}
        for block in read_blocks(checked_texts(inputs), block_texts):
            texts, pairs = map(list, zip(*block, strict=True))
            rows = [
                list(rows_of(tokenizer(texts, None if pairs[0] is None else pairs, **arguments)))
                for tokenizer in getattr(self.tokenizer, "tokenizers", [self.tokenizer])
            ]
            if len(rows[0]) != len(texts):
                raise ValueError(
                    f"the tokenizer made {len(rows[0])} pieces of {len(texts)} texts, but each text has one answer: "
                    "leave out return_overflowing_tokens."
                )
            yield from rows[0] if len(rows) == 1 else zip(*rows, strict=True)

    def postprocess(self, model_outputs, function_to_apply=None, **kwargs):
        function_to_apply = function_to_apply or ClassificationFunction(task_of(self.model.config).function_to_apply)
        answers = super().postprocess(model_outputs, function_to_apply, **kwargs)
        exits = {name: model_outputs[name] for name in ("exit_layer", "exit_member") if name in model_outputs}
        for answer in answers if isinstance(answers, list) else [answers]:
            answer.update(exits)
        return answers


def texts_of(dataset: Any, columns: list[str]) -> Dataset | Iterator:
    """Return the texts, or pairs, of a `datasets` data set, whatever columns stand beside them."""
    if "text" not in columns:
        raise ValueError(
            f"the data set has no column 'text', but {', '.join(columns)}: give the column, as in "
            f"classifier(dataset[{columns[0]!r}]), or rename it."
        )
    names = [name for name in ("text", "text_pair") if name in columns]
    dataset = dataset.select_columns(names)
    if not isinstance(dataset, Sized):  # a stream
        return iter(dataset)
    return KeyDataset(dataset, "text") if len(names) == 1 else KeyPairDataset(dataset, *names)


def checked_texts(inputs: Iterable) -> Iterator[tuple[str, str | None]]:
    """
    Yield each input as `(text, text_pair)`. What is no text, or a pair among single texts or the other way round,
    raises an error that names its position.
    """
    first_kind = None
    for position, item in enumerate(inputs):
        if isinstance(item, dict):
            unknown = sorted(set(item) - {"text", "text_pair"})
            if unknown or "text" not in item:
                raise ValueError(
                    f"input {position} is a dict of {', '.join(map(repr, item))}: a text is a string or "
                    '{"text": ...}, a pair {"text": ..., "text_pair": ...}.'
                )
            text, pair = item["text"], item.get("text_pair")
        elif isinstance(item, list) and len(item) == 1 and isinstance(item[0], list) and len(item[0]) == 2:
            text, pair = item[0]  # the old form of a pair, which the stock pipeline still takes
        else:
            text, pair = item, None
        check_text(text, position)
        if pair is not None:
            check_text(pair, position)
        kind = "a single text" if pair is None else "a pair"
        first_kind = first_kind or kind
        if kind != first_kind:
            raise ValueError(
                f"input {position} is {kind}, but those before it are not: a classifier reads one or the other. Call "
                'it for each kind by itself, pairs as {"text": ..., "text_pair": ...}.'
            )
        yield text, pair


def check_text(text: Any, position: int) -> None:
    """Raise unless `text` is a string with something in it."""
    if isinstance(text, list):
        raise ValueError(
            f'input {position} is a list ({str(text)[:40]!r}): a pair is {{"text": ..., "text_pair": ...}}, many '
            "texts are one list of strings."
        )
    if not isinstance(text, str):
        raise TypeError(
            f"input {position}: a text must be a string, got {type(text).__name__} ({str(text)[:40]!r}). Pairs are "
            '{"text": ..., "text_pair": ...}; bytes need text.decode("utf-8") first.'
        )
    if not text.strip():
        raise ValueError(
            f"input {position}: got an empty text ({text!r}): leave empty texts out, as in "
            "[text for text in texts if text.strip()]."
        )
