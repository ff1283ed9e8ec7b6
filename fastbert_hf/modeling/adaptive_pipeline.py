"""What the pipelines share: the dial of a call, its limits, its checks, and the stream of predictions."""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from difflib import get_close_matches
from functools import cache
from inspect import signature
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .dial_checks import check_setting, is_asked
from .dials import DIALS, check_dial, is_one, lookup_of, one_dial
from .encoded_texts import check_on_error, checked_speeds
from .exit_policies import check_speed, exit_range
from .families import max_text_tokens
from .modeling_outputs import Prediction
from .processing_cascade import CascadeProcessor, check_tokenizer, find_tokenizer, fingerprint, tokenizer_digest
from .served_answers import ServedAnswers
from .tokenization import call_arguments


# Texts that the tokenizer gets at a time.
BLOCK_TEXTS = 256
# Where no batch size was given: batches are cut by their tokens.
BY_TOKENS = "by tokens"
# What a call may say of how texts are read, where their answers are certified.
READING = ("truncation", "max_length", "text_pair", "allow_blank")
OF_TOKENIZER = " and the arguments of its tokenizer, such as truncation and max_length"
# What a call may ask for beside its dial.
ASKED = ("exit_policy", "patience", "min_exit_layer", "max_layers", "retention")


@cache
def stock_arguments(stock_class: type) -> frozenset[str]:
    """Return what a stock pipeline takes in a call."""
    taken = frozenset(signature(stock_class._sanitize_parameters).parameters)
    return taken.difference(("self", "tokenizer_kwargs"))


class LoadsWhatIsNamed:
    """
    True for `pipeline()`, which then loads a tokenizer by its name and lets no failure pass. It is false where
    `pipeline()` was given a loaded model and no name: then the model is asked.
    """

    def __bool__(self) -> bool:
        return not str(sys.exc_info()[1]).startswith("Impossible to guess which tokenizer to use")


class AdaptivePipeline:
    """
    What stands before a stock pipeline and makes it one of a FastBERT model: `speed`, `speedup` or `max_disagreement`,
    and the limits of a call.
    """

    task_name: str  # as `pipeline()` calls it
    of_task: str  # of the models' configs
    model_class_name: str
    stock_class: type
    passes_to_tokenizer = True  # whether a call takes arguments of the tokenizer
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
                f"{self.task_name} needs a FastBERT model, got one of type {model_type!r}. Wrap it with "
                f"{self.model_class_name}.from_classifier(name) and self-distil it first."
            )
        task = getattr(model.config, "task", self.of_task)  # a cascade has none
        if task != self.of_task:
            raise ValueError(
                f"{self.task_name} is for {self.of_task}, and this model is for {task}: "
                f'pipeline("fast-{task}", model=...)'
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
        **kwargs,
    ):
        self._refuse_unknown(kwargs)
        preprocess, _, postprocess = super()._sanitize_parameters(**kwargs)
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

    def _own_arguments(self) -> list[str]:
        """Return the arguments of a call that are not the stock pipeline's."""
        found = [*signature(AdaptivePipeline._sanitize_parameters).parameters]
        found += signature(type(self)._sanitize_parameters).parameters
        return [name for name in found if name not in ("self", "kwargs")]

    def _refuse_unknown(self, arguments: dict[str, Any]) -> None:
        """Raise an error if an argument is neither the pipeline's nor the tokenizer's, which would ignore it."""
        if not arguments:
            return
        tokenizers = getattr(self.tokenizer, "tokenizers", [self.tokenizer])
        stock = stock_arguments(self.stock_class)
        known = stock.union(*(call_arguments(type(tokenizer)) for tokenizer in tokenizers if self.passes_to_tokenizer))
        unknown = [name for name in arguments if name not in known]
        if unknown:
            own = list(dict.fromkeys(self._own_arguments()))
            own += [*sorted(stock), "batch_size", "num_workers"]
            near = get_close_matches(unknown[0], [*own, *sorted(known)], 1)
            raise TypeError(
                f"unexpected {', '.join(unknown)}{f' (did you mean {near[0]}?)' if near else ''}: the pipeline takes "
                f"{', '.join(own)}{self.passes_to_tokenizer * OF_TOKENIZER}."
            )
        if arguments.get("return_overflowing_tokens"):
            raise ValueError(
                "each text has one answer, not one for each of its pieces: leave out return_overflowing_tokens."
            )

    def _predictions(self, encoded, batch_size, preprocess_params, forward_params) -> Iterator[Prediction]:
        """Yield what the model says of each encoded text, and count it."""
        config = self.model.config
        arguments = {name: getattr(config, name) for name in config.call_defaults}
        arguments.update(forward_params, batch_size=None if batch_size == BY_TOKENS else batch_size)
        if arguments.get("max_disagreement") is not None:
            longest = self.check_reading(preprocess_params)
            encoded = encoded if longest is None else no_longer_than(longest, encoded)
        yield from self._counted(self.model.predict(encoded, **arguments), self._counted_speed(arguments))

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


class DialOfPieces:
    """
    The dial of a call that has one for each text, where a text is read in several pieces.

    Args:
        values (iterable of `float`): One for each text.
    """

    def __init__(self, values: Iterable[float]):
        self.values, self.waiting = iter(values), deque()

    def begin(self, position: int, pieces: int) -> None:
        """Note that so many pieces of the next text follow."""
        value = next(self.values, None)
        if value is None:
            raise ValueError(f"there are {position} speeds but more texts: give one number for all, or one for each.")
        self.waiting.extend([value] * pieces)

    def __iter__(self) -> Iterator[float]:
        while self.waiting:
            yield self.waiting.popleft()


def dial_of_pieces(arguments: dict[str, Any], texts: Any) -> DialOfPieces | None:
    """Put a [`DialOfPieces`] in place of a dial with one number for each text, and return it."""
    for name in DIALS:
        value = arguments.get(name)
        if value is None or is_one(value):
            continue
        if isinstance(value, Sized) and isinstance(texts, Sized) and len(value) != len(texts):
            raise ValueError(f"got {len(value)} {name}s for {len(texts)} texts: give one for all, or one for each.")
        arguments[name] = DialOfPieces(value)
        return arguments[name]
    return None


def error_of_text(error: Exception, position: int) -> Exception:
    """Return an error that names a piece of a text by its number as one that names the text."""
    return type(error)(re.sub(r"\btext \d+\b", f"text {position}", str(error)))


def given(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that are not `None`."""
    return {name: value for name, value in arguments.items() if value is not None}
