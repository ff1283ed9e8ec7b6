"""The "fast-text-classification" pipeline: text classification with a speed per call."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sized
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from types import GeneratorType
from typing import Any

from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextClassificationPipeline
from transformers.pipelines.text_classification import ClassificationFunction
from transformers.utils.logging import tqdm

from .dial_checks import check_setting, is_asked
from .dials import DIALS, check_dial, is_one, lookup_of, one_dial
from .encoded_texts import check_on_error, checked_speeds, read_blocks
from .exit_policies import check_speed, exit_range
from .families import max_text_tokens
from .modeling_outputs import Prediction
from .pipeline_inputs import checked_texts, encode_block, texts_of
from .processing_cascade import CascadeProcessor, check_tokenizer, find_tokenizer, fingerprint, tokenizer_digest
from .served_answers import ServedAnswers
from .tasks import task_of
from .tokenization import call_arguments


# Texts that the tokenizer gets at a time.
BLOCK_TEXTS = 256
# Where no batch size was given: batches are cut by their tokens.
BY_TOKENS = "by tokens"
# What a call may say of how texts are read, where their answers are certified.
READING = ("truncation", "max_length", "text_pair", "allow_blank")
# What a call may ask for beside its dial.
ASKED = ("exit_policy", "patience", "min_exit_layer", "max_layers", "retention")
# What an answer tells beside its label and score.
TOLD = ("exit_layer", "exit_member", "uncertainty", "position")
STOCK_ARGUMENTS = frozenset(signature(TextClassificationPipeline._sanitize_parameters).parameters).difference(
    ("self", "tokenizer_kwargs")
)
# Transformers warns of a default model, since one on the Hub may change. The one that lies in the package does not.
OWN_DEFAULT = f"No model was supplied, defaulted to {Path(__file__).parents[1] / 'default_model'} "
logging.getLogger("transformers.pipelines").addFilter(lambda record: not record.getMessage().startswith(OWN_DEFAULT))


class LoadsWhatIsNamed:
    """
    True for `pipeline()`, which then loads a tokenizer by its name and lets no failure pass. It is false where
    `pipeline()` was given a loaded model and no name: then the model is asked.
    """

    def __bool__(self) -> bool:
        return not str(sys.exc_info()[1]).startswith("Impossible to guess which tokenizer to use")


class FastTextClassificationPipeline(TextClassificationPipeline):
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

    _load_tokenizer = LoadsWhatIsNamed()
    _tokenizer_digest, _digested = None, None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | CascadeProcessor | str | None = None,
        **kwargs,
    ):
        model_type = model.config.model_type
        if not model_type.startswith("fastbert"):
            raise ValueError(
                f"fast-text-classification needs a FastBERT model, got one of type {model_type!r}. Wrap it with "
                "FastBertForSequenceClassification.from_classifier(name) and self-distil it first."
            )
        if isinstance(tokenizer, str):  # `pipeline()` loads it, but not while that error is handled
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        # Where each member has its own, what Transformers has loaded is that of the first.
        has_one_of_several = getattr(model.config, "own_tokenizers", False) and not hasattr(tokenizer, "tokenizers")
        if tokenizer is None or has_one_of_several:
            found = find_tokenizer(model)
            first = getattr(found, "tokenizers", [found])[0]
            # Another one was chosen by the caller, and is refused.
            tokenizer = found if tokenizer is None or fingerprint(tokenizer) == fingerprint(first) else tokenizer
        check_tokenizer(model, tokenizer)
        # One for each text is for a call.
        if kwargs.get("speed") is not None:
            check_speed(kwargs["speed"])
        name, value = one_dial({name: kwargs.get(name) for name in DIALS})
        if name is not None and name != "speed":
            check_dial(model.config, name, value, kwargs.get("confidence"))
            if not is_one(value):
                raise ValueError(f"{name}={value!r:.40} is for a call: give the pipeline one number.")
        kwargs.pop("local_files_only", None)  # read by `pipeline()`, and left there
        if model.engine_name != "torch" and kwargs.get("device") is None:
            kwargs["device"] = "cpu"  # where Transformers would take an accelerator
        self.served = ServedAnswers()
        super().__init__(model=model, tokenizer=tokenizer, **kwargs)
        # A model that comes straight from its training would answer with dropout.
        self.model.eval()

    def _sanitize_parameters(
        self,
        speed=None,
        min_exit_layer=None,
        max_layers=None,
        exit_policy=None,
        patience=None,
        retention=None,
        speedup=None,
        max_disagreement=None,
        confidence=None,
        on_error=None,
        return_uncertainty=None,
        progress_bar=None,
        text_pair=None,
        allow_blank=None,
        **kwargs,
    ):
        self._refuse_unknown(kwargs)
        preprocess, _, postprocess = super()._sanitize_parameters(**kwargs)
        if text_pair is not None and (isinstance(text_pair, bytes) or not isinstance(text_pair, Iterable)):
            raise TypeError(f"text_pair must be a text, or one for each text, got {text_pair!r:.40}.")
        preprocess.update(given(text_pair=text_pair, allow_blank=allow_blank))
        limits = given(min_exit_layer=min_exit_layer, max_layers=max_layers)
        if limits and hasattr(self.model.config, "members"):
            name, value = next(iter(limits.items()))
            raise ValueError(
                f"{name}={value!r} is not for a cascade, whose members each have their own layers: set it in the "
                f"config of a member before from_members([...]). Leave out {name}."
            )
        exit_range(self.model.config.num_hidden_layers, **limits)
        policy = given(exit_policy=exit_policy, patience=patience)
        if policy:
            of_constructor = getattr(self, "_forward_params", {})
            self.model.policy(policy.get("exit_policy", of_constructor.get("exit_policy")), patience)
            if exit_policy not in (None, "patience") and "patience" in of_constructor:
                policy["patience"] = None  # it is for another policy
        if retention is not None:
            self.model.check_retention(retention)
            policy["retention"] = retention
        values = {"speed": checked_speeds(speed), "speedup": speedup, "max_disagreement": max_disagreement}
        values = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in values.items()}
        dial = {}
        name, value = one_dial(values)
        if name is not None:
            dial = dict(values)  # also where the constructor or the config has another one
        if confidence is not None or name in ("speed", "speedup"):
            dial["confidence"] = confidence
        if name not in (None, "speed"):
            own = getattr(self, "_forward_params", {}).get("confidence") if confidence is None else confidence
            check_dial(self.model.config, name, value, own if name == "max_disagreement" else None)
        if on_error is not None:
            check_on_error(on_error)
        answers = given(on_error=on_error, return_uncertainty=return_uncertainty, progress_bar=progress_bar)
        return preprocess, {**dial, **limits, **policy, **answers}, postprocess

    def _refuse_unknown(self, arguments: dict[str, Any]) -> None:
        """Raise an error if an argument is neither the pipeline's nor the tokenizer's, which would ignore it."""
        if not arguments:
            return
        tokenizers = getattr(self.tokenizer, "tokenizers", [self.tokenizer])
        known = STOCK_ARGUMENTS.union(*(call_arguments(type(tokenizer)) for tokenizer in tokenizers))
        unknown = [name for name in arguments if name not in known]
        if unknown:
            own = [name for name in signature(self._sanitize_parameters).parameters if name != "kwargs"]
            own += [*sorted(STOCK_ARGUMENTS), "batch_size", "num_workers"]
            near = get_close_matches(unknown[0], [*own, *sorted(known)], 1)
            raise TypeError(
                f"unexpected {', '.join(unknown)}{f' (did you mean {near[0]}?)' if near else ''}: the pipeline takes "
                f"{', '.join(own)} and the arguments of its tokenizer, such as truncation and max_length."
            )
        if arguments.get("return_overflowing_tokens"):
            raise ValueError(
                "each text has one answer, not one for each of its pieces: leave out return_overflowing_tokens."
            )

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

    def _predictions(self, encoded, batch_size, preprocess_params, forward_params) -> Iterator[Prediction]:
        """Yield what the model says of each encoded text, and count it."""
        config = self.model.config
        arguments = {name: getattr(config, name) for name in config.call_defaults}
        arguments.update(forward_params, batch_size=None if batch_size == BY_TOKENS else batch_size)
        if arguments.get("max_disagreement") is not None:
            longest = self.check_reading(preprocess_params)
            encoded = encoded if longest is None else no_longer_than(longest, encoded)
        yield from self._counted(self.model.predict(encoded, **arguments), self._counted_speed(arguments))

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

    def predictions(self, encoded: Iterable, **kwargs) -> Iterator[Prediction]:
        """
        Yield the logits and the exit layer of each text, in order: a call does this next, and then makes labels of
        logits ([`postprocess`]). Where tokens are counted before texts are answered, as servers do, the three steps
        are taken one by one.

        Args:
            encoded (iterable): From [`encode`].
            kwargs: The dial, its limits and `on_error`, as in a call.
        """
        preprocess_params, forward_params, _ = self._sanitize_parameters(**kwargs)
        preprocess_params = {**self._preprocess_params, **preprocess_params}
        forward_params = {"on_error": "raise", **self._forward_params, **forward_params}
        return self._predictions(encoded, BY_TOKENS, preprocess_params, forward_params)

    def _counted_speed(self, arguments: dict[str, Any]) -> float | None:
        """Return the speed of a call whose answers are compared with those of the certificate, `None` of others."""
        name, value = one_dial({name: arguments.get(name) for name in DIALS})
        certification = self.model.config.certification
        if certification is None or name is None or not is_one(value):
            return None
        asked = {name: arguments.get(name) for name in ASKED if name in arguments}
        if not is_asked(self.model.config, certification["asked"], asked):
            return None
        speed = lookup_of(self.model.config, name, value, arguments.get("confidence"))(value)
        return float(speed) or None

    def _counted(self, answers: Iterator[Prediction], threshold: float | None) -> Iterator[Prediction]:
        """Yield answers as they are, and count those that are no errors, some at a time."""
        if threshold is None:
            yield from answers
            return
        block, reference = [], self.model.config.certification["reference"]
        try:
            for answer in answers:
                if answer.error is None:
                    block.append(answer)
                if len(block) >= BLOCK_TEXTS:
                    self.served.add(threshold, block, reference)
                    block = []
                yield answer
        finally:
            self.served.add(threshold, block, reference)

    def check_reading(self, reading: dict[str, Any]) -> int | None:
        """
        Raise a `ValueError` if texts are not read as they were when the model was certified. Return how many tokens
        a text may have to be read as then, `None` where longer ones are cut so, or it is not known.
        """
        certification = self.model.config.certification
        others = {name: value for name, value in reading.items() if name not in READING}
        if others:
            raise ValueError(
                f"max_disagreement was certified without {', '.join(others)}, and texts may be read otherwise with it."
            )
        if self._digested is not self.tokenizer:
            self._tokenizer_digest, self._digested = tokenizer_digest(self.tokenizer), self.tokenizer
        check_setting(certification, "max_disagreement", tokenizer=self._tokenizer_digest)
        # What a longer text would be cut to, or could have.
        tokenizers = getattr(self.tokenizer, "tokenizers", [self.tokenizer])
        members = getattr(self.model.config, "members", None) or [self.model.config]
        limits = [max_text_tokens(member.text_config) for member in members]
        if reading.get("truncation"):
            limits += [reading.get("max_length") or own.model_max_length for own in tokenizers]
        wanted = certification["setting"]["max_length"]
        if wanted is None or min(limits) <= wanted:
            check_setting(certification, "max_disagreement", max_length=min(limits))
            return None
        return wanted

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


def no_longer_than(longest: int, encoded: Iterable[Any]) -> Iterator[Any]:
    """Yield encoded texts as they are, and errors in place of those with more tokens."""
    for position, row in enumerate(encoded):
        parts = row if isinstance(row, (list, tuple)) else [row]
        tokens = 0 if isinstance(row, Exception) else max(len(part["input_ids"]) for part in parts)
        if tokens > longest:
            yield ValueError(
                f"input {position} has {tokens} tokens, and max_disagreement was certified for texts that are cut to "
                f"{longest}: cut them so, truncation=True, max_length={longest}"
            )
        else:
            yield row


def given(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that are not `None`."""
    return {name: value for name, value in arguments.items() if value is not None}
