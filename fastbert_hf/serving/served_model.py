"""A model that answers requests: its pipeline, and what it tells of itself to who sends them."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedConfig
from transformers.pipelines.text_classification import ClassificationFunction

from ..modeling.dial_checks import HOW
from ..modeling.dials import DIALS, check_dial, lookup_of, one_dial, speed_of_threshold
from ..modeling.families import max_text_tokens
from ..modeling.modeling_outputs import Prediction
from ..modeling.pipeline_fastbert import FastTextClassificationPipeline
from .load_control import LoadControl, speeds_and_costs
from .loading import load_config, load_pipeline


logger = logging.getLogger("ray.serve")
# Tokens of the batches whose times tell what a batch and a token take, of texts of so many.
SIZES = (32, 256, 1024)
TEXT_TOKENS = 32
TURNS = 3
# What a model is asked once when it is loaded, to know what a request may ask for.
TRIED = {"speed": 0.0, "speedup": 1.0, "max_disagreement": 0.5}


@dataclass(frozen=True)
class ServerSettings:
    """
    What a server answers with. It may be changed while it runs.

    Args:
        model, int8, truncate, max_length: As in [`load_pipeline`].
        speed, speedup (`float`, *optional*):
            At which texts are answered where nothing waits; one of them. The model's own speed unless given.
        max_speed, max_speedup, max_disagreement (`float`, *optional*):
            What load may lead to, at most; one of them. As fast as the model can unless given.
        slo_ms (`float`): Milliseconds from a request to its answer, as is promised.
        max_batch_tokens (`int`): Of a batch without its last text.
    """

    model: str | None = None
    int8: bool = False
    truncate: bool = False
    max_length: int | None = None
    speed: float | None = None
    speedup: float | None = None
    max_speed: float | None = None
    max_speedup: float | None = None
    max_disagreement: float | None = None
    slo_ms: float = 100.0
    max_batch_tokens: int = 1024

    def __post_init__(self):
        if (
            isinstance(self.slo_ms, bool)
            or not isinstance(self.slo_ms, (int, float))
            or not 0 < self.slo_ms < math.inf
        ):
            raise ValueError(f"slo_ms must be a number of milliseconds above 0, got {self.slo_ms!r}: slo_ms=100")
        one_dial(self.normal())
        one_dial(self.greatest())

    def normal(self) -> dict[str, float | None]:
        """Return the dial where nothing waits."""
        return {"speed": self.speed, "speedup": self.speedup}

    def greatest(self) -> dict[str, float | None]:
        """Return the dial that load may lead to."""
        return {"speed": self.max_speed, "speedup": self.max_speedup, "max_disagreement": self.max_disagreement}

    def loads(self) -> tuple:
        """Return what a pipeline is loaded with. Where two settings have the same, one model does for both."""
        return self.model, self.int8, self.truncate, self.max_length


class Asked(NamedTuple):
    """A text of a request, and how it is to be answered."""

    text: str | dict[str, str]  # a pair: "text" and "text_pair"
    characters: int
    dial: tuple[str, float] | None = None  # "speed", "speedup" or "max_disagreement", and its value
    truncate: bool = False
    side: str = "right"  # where it is cut
    raw_scores: bool = False
    top_k: int | None = None


class Answered(NamedTuple):
    """The answer to a text, or why there is none."""

    labels: list[dict[str, Any]]
    tokens: int
    exit_layer: int
    error_type: str | None = None  # "Tokenizer" or "Backend"
    error: str | None = None

    @classmethod
    def failed(cls, error_type: str, error: str) -> Answered:
        """Return what is said of a text that has no answer."""
        return cls([], 0, 0, error_type, error)


@dataclass(frozen=True)
class Description:
    """
    What a model tells of itself to who sends it texts.

    Args:
        settings ([`ServerSettings`]): That it answers with.
        config (`PreTrainedConfig`): Of the model.
        dtype (`str`): Of its weights.
        max_tokens (`int`): Of a text.
        seconds (`tuple`): That a batch takes at speed 0, beside its tokens and for each of them.
        refusals (`dict`): For each dial why a request may not ask for it, `None` where it may.
        reload_error (`str`, *optional*): Why newer settings are not in use.
    """

    settings: ServerSettings
    config: PreTrainedConfig
    dtype: str
    max_tokens: int
    seconds: tuple[float, float]
    refusals: dict[str, str | None]
    reload_error: str | None = None

    def control(self) -> LoadControl:
        """Return what chooses the speed of each batch."""
        return control_of(self.config, self.settings, *self.seconds)

    def cost_of(self, name: str, value: float) -> float:
        """
        Return what a dial of a request costs, as a share of speed 0.

        Raises:
            ValueError: If the model cannot be asked for that.
        """
        if self.refusals[name] is not None:
            raise ValueError(self.refusals[name])
        check_dial(self.config, name, value)
        if name == "speed" and not 0 <= value <= 1:
            raise ValueError(f"speed must be a number in [0, 1], got {value!r:.40}. Example: speed=0.5")
        if self.config.calibration is None:
            return 1.0
        return float(np.interp(speed_of(self.config, name, value), *speeds_and_costs(self.config)))


class ServedModel:
    """
    Load a model, measure how long it takes here, and answer texts with it.

    Args:
        settings ([`ServerSettings`]): Which model, and how fast.
        other ([`ServedModel`], *optional*): That answers already, whose pipeline is taken where it is the same.

    Raises:
        ValueError, OSError: If there is no such model, or it cannot be asked for that.
    """

    def __init__(self, settings: ServerSettings, other: ServedModel | None = None):
        self.settings = settings
        if other is not None and other.settings.loads() == settings.loads():
            self.pipeline, self.cuts_left, self.seconds = other.pipeline, other.cuts_left, other.seconds
        else:
            self.pipeline = load_pipeline(*settings.loads())
            self.cuts_left = cutting_left(self.pipeline)
            self.seconds = measured_seconds(self.pipeline)
        model, tokenizer = self.pipeline.model, self.pipeline.tokenizer
        members = getattr(model.config, "members", None) or [model.config]
        tokenizers = getattr(tokenizer, "tokenizers", [tokenizer])
        limits = [max_text_tokens(member.text_config) for member in members]
        self.max_tokens = min([*limits, *(own.model_max_length for own in tokenizers)])
        self.refusals = {name: self._refusal(name, value) for name, value in TRIED.items()}
        if settings.max_disagreement is not None:
            self._check_certified(settings.max_disagreement)
        control_of(model.config, settings, *self.seconds)  # what is wrong with its speeds is told now

    def describe(self, reload_error: str | None = None) -> Description:
        """Return what who sends texts has to know."""
        model = self.pipeline.model
        dtype = str(model.dtype).removeprefix("torch.")
        return Description(
            self.settings, model.config, dtype, self.max_tokens, self.seconds, self.refusals, reload_error
        )

    def _check_certified(self, risk: float) -> None:
        """Raise a `ValueError` if texts would not be read as they were when the model was certified."""
        refusal = self._refusal("max_disagreement", risk)
        if refusal is not None:
            raise ValueError(refusal)
        for reading in (self._reading(False), self._reading(True)):
            longest = self.pipeline.check_reading(reading)
            if longest is not None:
                raise ValueError(
                    f"max_disagreement={risk:g} was certified for texts that are cut to {longest} tokens: give "
                    f"max_length={longest}, too"
                )

    def _refusal(self, name: str, value: float) -> str | None:
        """Return why the model cannot be asked for this, or `None` where it can."""
        try:
            check_dial(self.pipeline.model.config, name, value)
            list(self.pipeline.predictions(self.pipeline.encode(["a"]), **{name: value}))
        except (ValueError, TypeError) as error:
            return str(error)
        return None

    def _reading(self, truncate: bool) -> dict[str, Any]:
        """Return the arguments of the tokenizer."""
        settings = self.settings
        if not (truncate or settings.truncate or settings.max_length is not None):
            return {}
        return {"truncation": True, "max_length": settings.max_length or self.max_tokens}

    def answer(self, asked: Sequence[Asked], speed: float) -> list[Answered]:
        """Return the answers to some texts, of which those without a dial are answered at this speed."""
        encoded = self._encode(asked)
        answers: dict[int, Answered] = {}
        for place, text in enumerate(encoded):
            if isinstance(text, Exception):
                answers[place] = Answered.failed("Tokenizer", str(text))
            elif tokens_of(text) > self.max_tokens:
                message = (
                    f"a text has {tokens_of(text):,} tokens, and may have {self.max_tokens}: truncate=true cuts it"
                )
                answers[place] = Answered.failed("Tokenizer", message)
        # How texts are read is a part of what max_disagreement promises, and of nothing else.
        by_dial: dict[tuple[str, bool], list[int]] = {}
        for place, one in enumerate(asked):
            name = "speed" if one.dial is None else one.dial[0]
            if place not in answers:
                by_dial.setdefault((name, name == "max_disagreement" and one.truncate), []).append(place)
        for (name, truncate), places in by_dial.items():
            values = [speed if asked[place].dial is None else asked[place].dial[1] for place in places]
            # One for all is what the pipeline counts beside its certificate.
            dial = {name: values[0] if len(set(values)) == 1 else values}
            if name == "max_disagreement":
                dial |= self._reading(truncate)
            predictions = self._predictions([encoded[place] for place in places], **dial)
            for place, prediction in zip(places, predictions, strict=True):
                answers[place] = self._answered(asked[place], tokens_of(encoded[place]), prediction)
        return [answers[place] for place in range(len(asked))]

    def _predictions(self, encoded: list[Any], **asked: Any) -> list[Prediction]:
        """Return what the model says of some texts. What goes wrong with all of them is what is said of each."""
        try:
            return list(self.pipeline.predictions(encoded, **asked, on_error="return"))
        except Exception as error:  # whatever it is, the other texts of the batch are still answered
            logger.exception("texts have no answer")
            return [Prediction.failed(error)] * len(encoded)

    def _encode(self, asked: Sequence[Asked]) -> list[Any]:
        """Return what the model reads of each text, or why it reads nothing."""
        by_reading: dict[tuple[bool, str, bool], list[int]] = {}
        for place, one in enumerate(asked):
            # A batch may hold pairs of one request and single texts of another.
            kind = one.truncate, one.side, isinstance(one.text, str)
            by_reading.setdefault(kind, []).append(place)
        encoded: dict[int, Any] = {}
        for (truncate, side, _), places in by_reading.items():
            pipeline = self.cuts_left if side == "left" else self.pipeline
            texts = [asked[place].text for place in places]
            encoded.update(zip(places, pipeline.encode(texts, **self._reading(truncate)), strict=True))
        return [encoded[place] for place in range(len(asked))]

    def _answered(self, asked: Asked, tokens: int, prediction: Prediction) -> Answered:
        """Return the labels of a text with their scores, the greatest first."""
        if prediction.error is not None:
            return Answered.failed("Backend", f"Inference failed: {prediction.error}")
        outputs = {"logits": prediction.logits[None], "exit_layer": prediction.exit_layer}
        applied = ClassificationFunction.NONE if asked.raw_scores else None
        labels = self.pipeline.postprocess(outputs, applied, top_k=asked.top_k, _legacy=False)
        return Answered(labels, tokens, prediction.exit_layer)


def cutting_left(pipeline: FastTextClassificationPipeline) -> FastTextClassificationPipeline:
    """Return a pipeline of the same model whose tokenizer cuts the beginning of texts, which no call can ask for."""
    other = copy.copy(pipeline)
    other.tokenizer = copy.deepcopy(pipeline.tokenizer)
    for tokenizer in getattr(other.tokenizer, "tokenizers", [other.tokenizer]):
        tokenizer.truncation_side = "left"
    return other


def check_server_settings(settings: ServerSettings) -> None:
    """Raise a `ValueError` if there is no such model, or it has no such speeds; without its weights."""
    control_of(load_config(settings.model), settings, 0.01, 1e-4)


def control_of(
    config: PreTrainedConfig, settings: ServerSettings, seconds_per_batch: float, seconds_per_token: float
) -> LoadControl:
    """
    Return what chooses the speed of each batch.

    Raises:
        ValueError: If the model has no such speeds.
    """
    name, value = one_dial(settings.greatest())
    normal = speed_of(config, *one_dial(settings.normal()))
    own = one_dial({name: getattr(config, name, None) for name in DIALS})
    if config.calibration is None:
        if name is not None:
            asked = name if name == "max_disagreement" else f"max_{name}"
            raise ValueError(f"{asked}={value!r:.40} needs a model that was calibrated: {HOW}")
        # Nobody knows what other speeds would cost.
        speeds, costs = [normal if normal is not None else speed_of(config, *own) or 0.0], [1.0]
        normal = greatest = speeds[0]
    else:
        speeds, costs = speeds_and_costs(config)
        greatest = speeds[-1] if name is None else speed_of(config, name, value)
        if normal is None:
            normal = min(speed_of(config, *own) or 0.0, greatest)
    return LoadControl(
        speeds,
        costs,
        seconds_per_batch,
        seconds_per_token,
        settings.slo_ms / 1000,
        speed=normal,
        max_speed=greatest,
        most_tokens=settings.max_batch_tokens,
    )


def tokens_of(encoded: Any) -> int:
    """Return how many tokens a text has, the most of those that the members of a cascade read."""
    parts = encoded if isinstance(encoded, (list, tuple)) else [encoded]
    return max(len(part["input_ids"]) for part in parts)


def speed_of(config: PreTrainedConfig, name: str | None, value: float | None) -> float | None:
    """Return the speed that a dial means."""
    if name in (None, "speed"):
        return value
    return speed_of_threshold(config, lookup_of(config, name, value)(value))


def measured_seconds(pipeline: FastTextClassificationPipeline) -> tuple[float, float]:
    """
    Return what a batch takes at speed 0 beside its tokens, and what each token does: a line through the shortest times
    of some sizes, as other processes can only make them longer.
    """
    (text,) = pipeline.encode([" ".join(["a"] * (TEXT_TOKENS - 2))])
    own, taken = tokens_of(text), []
    for size in SIZES:
        texts = [text] * max(1, size // own)
        seconds = []
        for _ in range(1 + TURNS):
            start = perf_counter()
            list(pipeline.predictions(texts, speed=0.0))
            seconds.append(perf_counter() - start)
        taken.append((len(texts) * own, min(seconds[1:])))
    tokens, seconds = np.array(taken).T
    per_token, per_batch = np.polyfit(tokens, seconds, 1)
    return max(float(per_batch), 0.0), max(float(per_token), 1e-9)
