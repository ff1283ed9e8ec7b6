"""What the page shows of texts: each runs through every layer once, and what any speed gives is replayed from that."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..evaluation.exit_record import ExitRecord, record_exits
from ..evaluation.replay import Replay, exit_uncertainties, raw_thresholds, replay
from ..modeling.dial_checks import own_limits
from ..modeling.dials import speed_of_threshold
from ..modeling.encoded_texts import read_texts
from ..modeling.exit_policies import ExitPolicy
from ..modeling.pipeline_fastbert import FastTextClassificationPipeline
from .page_dials import threshold_of_call


# Texts that run through the model between two looks at whether to stop.
TEXTS_AT_A_TIME = 64
# The speeds of a curve: more points than a screen could tell apart.
CURVE = tuple(step / 100 for step in range(101))
# A time is the median of so many measurements, fewer where they would take longer than this.
REPEATS, LONGEST_SECONDS = 7, 1.5


class TooLong(ValueError):
    """A text has more tokens than the model reads."""


class RecordedTexts:
    """
    Texts that ran through every layer once.

    Args:
        classifier ([`FastTextClassificationPipeline`]): Whose model answered.
        record ([`ExitRecord`]): Of these texts.
    """

    def __init__(self, classifier: FastTextClassificationPipeline, record: ExitRecord):
        self.classifier, self.record = classifier, record
        self.config = classifier.model.config
        self.policy = ExitPolicy.of(self.config)
        # The same at every speed above 0, and nobody compares them at speed 0.
        self.uncertainties = exit_uncertainties(record, self.policy, raw_thresholds(record, self.config, 1.0) > 0)
        self.full = self.at_threshold(0.0)

    def at(self, **asked: float) -> Replay:
        """Return what becomes of the texts where a call asks for this: `speed=0.5`."""
        return self.at_threshold(threshold_of_call(self.classifier, **asked))

    def at_threshold(self, threshold: float) -> Replay:
        """Return what becomes of the texts where uncertainties are compared with this."""
        return replay(
            self.record, raw_thresholds(self.record, self.config, threshold), self.policy, self.uncertainties
        )

    def answers(self, replayed: Replay) -> list[dict[str, Any]]:
        """Return what the pipeline would answer to every text: label, score, exit layer, and member of a cascade."""
        scores, labels = self.policy.task.probabilities(replayed.logits).max(-1)
        columns = {
            "label": [self.config.id2label[label] for label in labels.tolist()],
            "score": scores.tolist(),
            "exit_layer": replayed.exit_layer.tolist(),
        }
        if hasattr(self.config, "members"):
            columns["exit_member"] = replayed.exit_member.tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def readable_texts(
    classifier: FastTextClassificationPipeline, texts: Sequence[Any], cut: bool
) -> tuple[list[Any], dict[int, Exception]]:
    """
    Return what the model reads of each text, and the errors of those that it cannot read, by their places.

    Args:
        classifier ([`FastTextClassificationPipeline`]): Its tokenizer reads them.
        texts (sequence): Texts, or pairs as `{"text": ..., "text_pair": ...}`.
        cut (`bool`): Whether to cut texts that are too long, also where the pipeline does not.
    """
    config = classifier.model.config
    encoded = classifier.encode(texts, **({"truncation": True} if cut else {}))
    text_configs = [member.text_config for member in getattr(config, "members", None) or [config]]
    read = read_texts(encoded, None, text_configs, getattr(config, "own_tokenizers", False), on_error="return")
    errors = {}
    for text, row in zip(read, encoded, strict=True):
        if text.error is not None:
            # Their places are those in a block, not in a file.
            reason = re.sub(r"^(?:text|input) \d+:? *(?:has )?", "", str(text.error).split(": let the tokenizer")[0])
            kind = ValueError if isinstance(row, Exception) else TooLong
            errors[text.position] = kind(reason)
    return [row for place, row in enumerate(encoded) if place not in errors], errors


def record_encoded(classifier: FastTextClassificationPipeline, encoded: Sequence[Any]) -> ExitRecord:
    """Return the record of texts as [`readable_texts`] returns them."""
    own_tokenizers = getattr(classifier.model.config, "own_tokenizers", False)
    rows = [list(of_member) for of_member in zip(*encoded, strict=True)] if own_tokenizers else list(encoded)
    return record_exits(classifier.model, rows, batch_size=32, progress=False)


def record_in_steps(
    classifier: FastTextClassificationPipeline, texts: Sequence[Any], cut: bool
) -> Iterator[tuple[int, ExitRecord | None, dict[int, Exception]]]:
    """
    Record many texts, some at a time, so that a caller may stop in between.

    Args:
        classifier ([`FastTextClassificationPipeline`]): Whose model runs.
        texts (sequence), cut (`bool`): As in [`readable_texts`].

    Yields:
        After each step how many texts are done, the record of those of the step that have an answer, `None` where
        there is none, and the errors of the others by their places among all texts.
    """
    for start in range(0, len(texts), TEXTS_AT_A_TIME):
        block = texts[start : start + TEXTS_AT_A_TIME]
        encoded, errors = readable_texts(classifier, block, cut)
        record = record_encoded(classifier, encoded) if encoded else None
        if record is not None and not record.exit_logits.isfinite().all():
            raise ValueError("the model answers with numbers that are not finite: check its weights.")
        yield start + len(block), record, {start + place: error for place, error in errors.items()}


def joined_records(records: Sequence[ExitRecord]) -> ExitRecord:
    """Return one record of the texts of several, made by the same model."""
    first = records[0]
    parts = {
        name: [getattr(record, name) for record in records] for name in ("exit_logits", "layer_flops", "exit_flops")
    }
    return ExitRecord(
        **{name: None if part[0] is None else torch.cat(part) for name, part in parts.items()},
        member_layers=first.member_layers,
        weights=first.weights,
    )


@dataclass(frozen=True)
class ExitSaid:
    """
    What one exit says of a text, or would say, and what becomes of the text there.

    Args:
        layer (`int`): From 1.
        member (`int`, *optional*): From 1, of a cascade.
        fate (`str`): `"left"`, `"went on"`, `"not asked"` or `"not run"`.
        probabilities (`list[float]`): Of each label.
        uncertainty (`float`): Of these.
        threshold (`float`): Texts leave below it: 0 where it may not answer, infinity where it answers in any case.
    """

    layer: int
    member: int | None
    fate: str
    probabilities: list[float]
    uncertainty: float
    threshold: float

    @property
    def answer(self) -> int:
        """Return the label that it finds most probable."""
        return self.probabilities.index(max(self.probabilities))


@dataclass(frozen=True)
class TextAnswer:
    """
    What becomes of a text at one setting.

    Args:
        told (`dict[str, Any]`): What the pipeline would answer.
        exits (`list[ExitSaid]`): What every exit says.
        flops_saved (`float`, *optional*): Share of the FLOPs of speed 0; below 0 where exits cost more than they save.
        path (`tuple[bool, ...]`): Which exits are evaluated. Settings of the same path cost the same.
    """

    told: dict[str, Any]
    exits: list[ExitSaid]
    flops_saved: float | None
    path: tuple[bool, ...]

    @property
    def taken(self) -> ExitSaid:
        """Return the exit at which the text leaves."""
        return next(said for said in self.exits if said.fate == "left")


@dataclass
class OneText:
    """
    A text, its record, and how long its answer takes.

    Args:
        classifier ([`FastTextClassificationPipeline`]): Answers it.
        text (`str`), text_pair (`str`, *optional*): The text, and the second one of a pair.
        cut (`bool`): Whether to cut it where it is too long.

    Raises:
        TooLong: If it has more tokens than the model reads.
        ValueError: If it cannot be read or answered.
    """

    classifier: FastTextClassificationPipeline
    text: str
    text_pair: str | None = None
    cut: bool = False
    # By the path of an answer: what it takes, and what speed 0 takes.
    seconds: dict[tuple[bool, ...], tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self):
        item = {"text": self.text, "text_pair": self.text_pair} if self.text_pair else self.text
        self.encoded, errors = readable_texts(self.classifier, [item], self.cut)
        if errors:
            raise errors[0]
        record = record_encoded(self.classifier, self.encoded)
        if not record.exit_logits.isfinite().all():
            raise ValueError("the model answers this text with numbers that are not finite: check its weights.")
        self.recorded = RecordedTexts(self.classifier, record)

    def answer(self, **asked: float) -> TextAnswer:
        """Return what becomes of the text where a call asks for this."""
        recorded, threshold = self.recorded, threshold_of_call(self.classifier, **asked)
        replayed, full = recorded.at_threshold(threshold), recorded.full
        saved = None if replayed.flops is None else 1 - replayed.flops.item() / full.flops.item()
        path = tuple(replayed.exits_run[0].tolist())
        return TextAnswer(recorded.answers(replayed)[0], self._exits(threshold, replayed), saved, path)

    def _exits(self, threshold: float, replayed: Replay) -> list[ExitSaid]:
        recorded = self.recorded
        thresholds = raw_thresholds(recorded.record, recorded.config, threshold)[0].tolist()
        probabilities = recorded.policy.task.probabilities(recorded.record.exit_logits[0]).tolist()
        uncertainties = recorded.uncertainties[0].tolist()
        layers_run, exits_run = replayed.layers_run[0].tolist(), replayed.exits_run[0].tolist()
        taken = max(place for place, is_run in enumerate(exits_run) if is_run)
        layers = recorded.record.member_layers
        places = [(member, layer) for member, own in enumerate(layers, 1) for layer in range(1, own + 1)]
        said = []
        for place, (member, layer) in enumerate(places):
            fate = "left" if place == taken else "went on" if exits_run[place] else "not asked"
            fate = fate if layers_run[place] else "not run"
            of_exit = (probabilities[place], uncertainties[place], thresholds[place])
            said.append(ExitSaid(layer, member if len(layers) > 1 else None, fate, *of_exit))
        return said

    def measure(self, path: tuple[bool, ...], **asked: float) -> None:
        """Measure the model's time for the text where a call asks for this, which goes this path, and at speed 0."""
        model = self.classifier.model
        limits = {name: value for name, value in own_limits(model.config).items() if value is not None}
        if "max_disagreement" in asked:
            asked["confidence"] = self.classifier._forward_params.get("confidence")
        calls, seconds, begin = (asked, {"speed": 0.0}), [], time.perf_counter()
        while len(seconds) <= REPEATS and (len(seconds) < 2 or time.perf_counter() - begin < LONGEST_SECONDS):
            seconds.append([])
            for call in calls:  # in turn, so that what else the machine does slows down both
                start = time.perf_counter()
                list(model.predict(self.encoded, **call, **limits))
                seconds[-1].append(time.perf_counter() - start)
        # The first of them warms up.
        self.seconds[path] = tuple(statistics.median(column) for column in zip(*seconds[1:], strict=True))


@dataclass(frozen=True)
class Summary:
    """What a dial gives and costs over many texts. Accuracy is that of the texts whose labels are known, if any."""

    rows: int
    accuracy: float | None
    agreement: float
    mean_layers: float
    speed_up: float | None  # times fewer FLOPs than at speed 0
    shares: list[float]  # of the texts that ran through 1 to L layers
    labelled: int = 0


class ManyTexts(RecordedTexts):
    """
    The texts of a file, recorded.

    Args:
        classifier ([`FastTextClassificationPipeline`]): Answered them.
        record ([`ExitRecord`]): Of the texts that have an answer.
        labels (sequence of `int`, *optional*): Of each of them, -1 where it is not known.
    """

    def __init__(
        self, classifier: FastTextClassificationPipeline, record: ExitRecord, labels: Sequence[int] | None = None
    ):
        super().__init__(classifier, record)
        self.labels = None if labels is None else torch.tensor(labels)
        if self.labels is not None and (self.labels < 0).all():
            self.labels = None
        self.full_answers = self.policy.task.predictions(self.full.logits)
        self.curve = [
            (speed, self.summary_of(self.at_threshold(threshold_of_call(classifier, speed=speed)))) for speed in CURVE
        ]

    def summary_of(self, replayed: Replay) -> Summary:
        """Return what a replay gives and costs."""
        answers, accuracy, labelled = self.policy.task.predictions(replayed.logits), None, 0
        if self.labels is not None:
            is_known = self.labels >= 0
            labelled = int(is_known.sum())
            accuracy = (answers == self.labels)[is_known].double().mean().item()
        counts = torch.bincount(replayed.exit_layer, minlength=self.record.num_exits + 1)[1:]
        return Summary(
            rows=len(answers),
            accuracy=accuracy,
            agreement=(answers == self.full_answers).double().mean().item(),
            mean_layers=replayed.exit_layer.double().mean().item(),
            speed_up=None if replayed.flops is None else (self.full.flops.sum() / replayed.flops.sum()).item(),
            shares=(counts.double() / len(answers)).tolist(),
            labelled=labelled,
        )

    def speed_of(self, **asked: float) -> float:
        """Return where a dial is among the speeds."""
        return speed_of_threshold(self.config, threshold_of_call(self.classifier, **asked))
