"""The "fast-text-classification" pipeline: text classification with a speed per call."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from types import GeneratorType
from typing import Any

from torch.utils.data import Dataset
from transformers import TextClassificationPipeline
from transformers.pipelines.text_classification import ClassificationFunction
from transformers.utils.logging import tqdm

from .adaptive_pipeline import BLOCK_TEXTS, BY_TOKENS, AdaptivePipeline, given
from .dials import DIALS
from .encoded_texts import read_blocks
from .pipeline_inputs import checked_texts, encode_block, texts_of
from .tasks import task_of


# What an answer tells beside its label and score.
TOLD = ("exit_layer", "exit_member", "uncertainty", "position")
# Transformers warns of a default model, since one on the Hub may change. The one that lies in the package does not.
OWN_DEFAULT = f"No model was supplied, defaulted to {Path(__file__).parents[1] / 'default_model'} "
logging.getLogger("transformers.pipelines").addFilter(lambda record: not record.getMessage().startswith(OWN_DEFAULT))


class FastTextClassificationPipeline(AdaptivePipeline, TextClassificationPipeline):
    """
    `TextClassificationPipeline` for a FastBERT model. Everything is as there, and beside it:

    - `speed`, `speedup` or `max_disagreement`, `min_exit_layer`, `max_layers`, `exit_policy`, `patience` and
      `retention`, to `pipeline(...)` or to a call; without them the model's config decides;
    - every answer carries its `exit_layer`, the number of layers that the text ran through;
    - it needs no `batch_size` to be fast ([`FastBertForSequenceClassification.predict`]); one that is given is kept;
    - an empty list, a `datasets` data set or a column of one, a DataFrame or a Series, and any iterator are welcome;
      `progress_bar=True` shows how far a call is, and `on_error` says what becomes of a text that has no answer;
    - a loaded model needs no `tokenizer=` if it knows its own; one that cannot be the model's is refused, and so are
      arguments that nobody knows.

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

    task_name, of_task = "fast-text-classification", "text-classification"
    model_class_name = "FastBertForSequenceClassification"
    stock_class = TextClassificationPipeline

    def _sanitize_parameters(self, text_pair=None, allow_blank=None, **kwargs):
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if text_pair is not None and (isinstance(text_pair, bytes) or not isinstance(text_pair, Iterable)):
            raise TypeError(f"text_pair must be a text, or one for each text, got {text_pair!r:.40}.")
        return {**preprocess, **given(text_pair=text_pair, allow_blank=allow_blank)}, forward, postprocess

    def __call__(self, inputs, **kwargs) -> list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """
        Classify texts.

        Args:
            inputs (`str`, `dict`, `list`, `Dataset`, `DataFrame` or iterator):
                A text, a pair as `{"text": ..., "text_pair": ...}`, or many of either. Of a `datasets` data set or a
                DataFrame the columns `text` and, where it is there, `text_pair` are read. A blank text is answered
                as any other.
            text_pair (`str` or iterable of `str`, *optional*):
                The second text of a pair: one for all texts, or one for each.
            speed (`float` or iterable of `float`, *optional*):
                In [0, 1], for this call, or one for each text; 0 runs every layer.
            min_exit_layer (`int`, *optional*): No text leaves before this layer.
            max_layers (`int`, *optional*): Every text has answered after this many layers.
            exit_policy (`str`, *optional*), patience (`int`, *optional*): As in [`FastBertConfig`], for this call.
            speedup (`float` or iterable of `float`, *optional*):
                In place of `speed`, for a model that was calibrated ([`calibrate`]): how many times less than at speed
                0 a text shall cost, on average over many.
            max_disagreement (`float` or iterable of `float`, *optional*):
                In place of both, for a model that was calibrated or certified ([`certify`]): the share of the answers
                that may differ from those at speed 0, over many texts like those of the certificate.
            confidence (`float`, *optional*): Of `max_disagreement`; 0.9 unless given.
            retention (`float`, *optional*):
                For a model that makes texts shorter (`config.coarsening`): the share of a text's tokens that is left
                in the end, in (0, 1]. 1 leaves all.
            batch_size (`int`, *optional*):
                Reads and answers so many texts at a time. An iterator is read up to 16 batches ahead unless given;
                1 answers each text before the next is read.
            allow_blank (`bool`, *optional*): `False` makes blank texts an error.
            on_error (`str`, *optional*):
                What becomes of a text that cannot be read or answered. `"raise"`, which is the default: an error that
                names its position, after the answers of all texts before it. `"return"`: `{"error": ...}` in its
                place. `"skip"`: no answer. With the last two every answer carries its `position`.
            return_uncertainty (`bool`, *optional*): Whether every answer carries its `uncertainty`, too.
            progress_bar (`bool`, *optional*): Whether to show one.
            kwargs:
                `top_k`, `function_to_apply` and arguments of the tokenizer, such as `truncation=True`. `num_workers`
                has no use here: a fast tokenizer takes every core by itself.

        Returns:
            As `TextClassificationPipeline`: a list for a text, a list, a Series or a DataFrame, an iterator for a
            data set or an iterator. Each answer is `{"label": str, "score": float, "exit_layer": int}`.
        """
        if kwargs.get("batch_size") is None:
            # The stock call takes no batch size for 1.
            kwargs["batch_size"] = BY_TOKENS if self._batch_size is None else self._batch_size
        texts = texts_of(inputs)
        if isinstance(texts, str) and "top_k" not in kwargs:
            texts = [texts]  # whose answer is a list, too
        gives_list = isinstance(texts, list)
        if isinstance(texts, (list, Dataset)) and isinstance(texts, Sized) and len(texts) == 0:
            # The stock call looks at the first of a list, even where there is none.
            texts = (text for text in ())
        answers = super().__call__(texts, **kwargs)
        is_empty_stream = isinstance(texts, GeneratorType) and isinstance(answers, list) and not gives_list
        return iter(answers) if is_empty_stream else answers

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        return next(self._answers([inputs], 1, preprocess_params, forward_params, postprocess_params), [])

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        return self._answers(inputs, batch_size, preprocess_params, forward_params, postprocess_params)

    def _answers(self, inputs, batch_size, preprocess_params, forward_params, postprocess_params):
        config = self.model.config
        forward_params, shows = dict(forward_params), {}
        for name in ("progress_bar", "return_uncertainty"):
            shows[name] = forward_params.pop(name, False)
        # Skipped here, as answers carry the positions of their texts.
        on_error = forward_params.pop("on_error", "raise")
        forward_params["on_error"] = "return" if on_error == "skip" else on_error
        total = len(inputs) if isinstance(inputs, Sized) else None
        many = {f"{name}s": forward_params.get(name) for name in DIALS}
        for name, value in {**many, "text_pairs": preprocess_params.get("text_pair")}.items():
            if total is not None and isinstance(value, Sized) and not isinstance(value, str) and len(value) != total:
                raise ValueError(f"got {len(value)} {name} for {total} texts: give one for all, or one for each.")
        if isinstance(inputs, Dataset) and total is not None:
            inputs = map(inputs.__getitem__, range(total))
        encoded = self._encode(inputs, BLOCK_TEXTS if batch_size == BY_TOKENS else batch_size, **preprocess_params)
        answers = self._predictions(encoded, batch_size, preprocess_params, forward_params)
        progress = tqdm(answers, total=total, desc="Classifying") if shows["progress_bar"] else answers
        # Each look into a config of Transformers takes microseconds.
        has_members, applied = hasattr(config, "members"), postprocess_params.get("function_to_apply")
        if applied is None:
            applied = ClassificationFunction(task_of(config).function_to_apply)
        postprocess_params = {**postprocess_params, "function_to_apply": applied}
        for position, answer in enumerate(progress):
            if answer.error is not None:
                if on_error == "return":
                    yield {"error": str(answer.error), "position": position}
                continue
            outputs = {"logits": answer.logits[None], "exit_layer": answer.exit_layer}
            if has_members:
                outputs["exit_member"] = answer.exit_member
            if shows["return_uncertainty"]:
                outputs["uncertainty"] = answer.uncertainty
            if on_error != "raise":
                outputs["position"] = position
            yield self.postprocess(outputs, **postprocess_params)

    def encode(self, texts: Iterable, **kwargs) -> list[Any]:
        """
        Return what the model reads of each text, for [`predictions`]: a call does this first. A text that cannot be
        read is an error in its place.

        Args:
            texts (iterable): Texts, or pairs as `{"text": ..., "text_pair": ...}`.
            kwargs: `text_pair`, `allow_blank` and arguments of the tokenizer, as in a call.
        """
        preprocess_params, _, _ = self._sanitize_parameters(**kwargs)
        return list(self._encode(texts, BLOCK_TEXTS, **{**self._preprocess_params, **preprocess_params}))

    def _encode(self, inputs, block_texts, text_pair=None, allow_blank=True, **tokenizer_kwargs):
        """Yield the stream's texts as the tokenizer encodes them, many at a time and without padding."""
        arguments = {**tokenizer_kwargs, "padding": False, "return_tensors": None, "return_attention_mask": False}
        tokenizers = getattr(self.tokenizer, "tokenizers", [self.tokenizer])
        for block in read_blocks(checked_texts(inputs, text_pair, allow_blank), block_texts):
            yield from encode_block(tokenizers, block, arguments)

    def postprocess(self, model_outputs, function_to_apply=None, **kwargs):
        function_to_apply = function_to_apply or ClassificationFunction(task_of(self.model.config).function_to_apply)
        answers = super().postprocess(model_outputs, function_to_apply, **kwargs)
        told = {name: model_outputs[name] for name in TOLD if name in model_outputs}
        for answer in answers if isinstance(answers, list) else [answers]:
            answer.update(told)
        return answers
