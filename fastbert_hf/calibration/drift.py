"""`drift`: whether the texts that were answered are unlike those of the certificate."""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..modeling.dials import threshold_of
from ..modeling.exit_policies import check_speed, config_thresholds, leaves
from ..modeling.served_answers import Place, Served, ServedAnswers, uncertainty_code


try:
    from scipy.stats import chi2_contingency
except ImportError as error:
    raise ImportError('drift needs an extra: pip install "fastbert-hf[calibration]"') from error


# Answers at one speed below which nothing is compared.
LEAST_ANSWERS = 50
# Cells of a test are put together until so many of both samples are expected in each.
LEAST_EXPECTED = 5
BINS = 8


@dataclass(frozen=True)
class Drift:
    """
    What [`drift`] found.

    Args:
        answers (`int`): That were compared.
        look (`int`): How often was looked so far, this time included.
        p_value (`float`):
            How likely so great a difference is where the texts are drawn as those of the certificate were, in any of
            all looks together. 1 where there are too few answers.
        has_drifted (`bool`):
            Whether it is below the level that was asked for: then the certificate should no longer be believed.
        exit_layer, expected_exit_layer (`float`):
            Means of these answers, and of those to the certificate's texts at the same speeds.
    """

    answers: int
    look: int
    p_value: float
    has_drifted: bool
    exit_layer: float
    expected_exit_layer: float


def drift(pipeline: Any, level: float = 0.05, forget: bool = False) -> Drift:
    """
    Compare the answers of a pipeline so far with those to the texts of its model's certificate: the exit layers, and
    how sure the exits were, by chi-square tests of two samples. It may be called as often as one likes: all looks
    together raise a false alarm with a probability of at most `level`.

    Answers are counted of calls with one `speed`, `speedup` or `max_disagreement` above 0 for all texts, by the policy
    and within the limits of the certificate, at up to 64 speeds. The same text again and again is a change, too; one
    that moves neither where texts leave nor how sure the exits are is not seen.

    Args:
        pipeline ([`FastTextClassificationPipeline`]): With a model that was calibrated or certified.
        level (`float`): Probability of a false alarm.
        forget (`bool`): Whether to begin anew after this look.

    Returns:
        [`Drift`]

    Raises:
        ValueError: If the model has no certificate.

    Example:

    ```python
    >>> classifier(texts, max_disagreement=0.01)
    >>> classifier.drift().has_drifted
    False
    ```
    """
    check_drift(pipeline.model.config, level)
    counts, look = pipeline.served.look()
    found = compare(counts, pipeline.model.config, level, look)
    if forget:
        pipeline.served.forget()
    return found


def drift_of_answers(
    answers: Iterable[Any], config: PreTrainedConfig, speed: float, level: float = 0.05, look: int = 1
) -> Drift:
    """
    As [`drift`], for what `predict` answered at one speed, with the number of this look, from 1.

    Args:
        answers (iterable of [`Prediction`]): Without errors.
        config ([`FastBertConfig`] or [`CascadeConfig`]): With a certificate.
        speed (`float`): Above 0, up to 1.
        level (`float`), look (`int`): As in [`drift`] and [`Drift`].
    """
    check_drift(config, level)
    check_speed(speed)
    if speed == 0 or not isinstance(look, Integral) or isinstance(look, bool) or look < 1:
        raise ValueError(f"speed must be above 0 and look a whole number of at least 1, got {speed!r} and {look!r}.")
    served = ServedAnswers()
    served.add(threshold_of(config, float(speed)), list(answers))
    return compare(served.counts, config, level, look)


def check_drift(config: PreTrainedConfig, level: Any) -> None:
    """Raise a `ValueError` if there is nothing to compare with, or no such level."""
    if config.certification is None:
        raise ValueError(
            "drift compares with the texts of a certificate, which this model has not: "
            "fastbert_hf.calibrate(model, texts, tokenizer)"
        )
    if isinstance(level, bool) or not isinstance(level, Real) or not 0 < level < 1:
        raise ValueError(f"level must be a probability above 0 and below 1, got {level!r:.40}. Example: level=0.05")


def compare(counts: Mapping[Served, int], config: PreTrainedConfig, level: float, look: int) -> Drift:
    """Return how the counts of answers differ from what the texts of the certificate would have been answered."""
    by_speed: dict[float, Counter[Place]] = defaultdict(Counter)
    for served, number in counts.items():
        by_speed[served.threshold][Place(*served[1:])] += number
    by_speed = {speed: found for speed, found in by_speed.items() if found.total() >= LEAST_ANSWERS}
    p_values, answers, layers, expected_layers = [], 0, 0.0, 0.0
    for speed, found in by_speed.items():
        expected, number = expected_answers(config, speed), found.total()
        answers += number
        layers += sum(place.exit_layer * times for place, times in found.items())
        mean = sum(place.exit_layer * times for place, times in expected.items()) / expected.total()
        expected_layers += number * mean
        for cell in (lambda place: place[:2], lambda place: place.code):
            p_values.append(two_samples(grouped(found, cell), grouped(expected, cell)))
    # The looks share the level as 1/2, 1/6, 1/12, ..., which add up to 1.
    p_value = min([1.0, *(own * len(p_values) * look * (look + 1) for own in p_values)])
    number = max(answers, 1)
    return Drift(answers, look, p_value, p_value < level, layers / number, expected_layers / number)


def expected_answers(config: PreTrainedConfig, threshold: float) -> Counter[Place]:
    """Return how many of the certificate's texts leave where, and how sure the exits are of them, at a threshold."""
    uncertainties = torch.from_numpy(reference_of_config(config))  # [rows, L]
    thresholds = torch.cat(config_thresholds(config, torch.full((len(uncertainties),), threshold)), 1)
    leaving = leaves(uncertainties, thresholds) & (thresholds > 0)
    column = leaving.int().argmax(1)  # of the exit taken
    members = getattr(config, "members", None) or [config]
    numbers = [number for number, member in enumerate(members, 1) for _ in range(member.num_hidden_layers)]
    depths = [depth for member in members for depth in range(1, member.num_hidden_layers + 1)]
    # Before this member: up to the last exit that may answer in each.
    last = [
        max((depths[c] for c in range(len(depths)) if numbers[c] == number and thresholds[0, c] > 0), default=0)
        for number in range(1, len(members) + 1)
    ]
    taken = uncertainties.gather(1, column[:, None])[:, 0].tolist()
    return Counter(
        Place(numbers[place], sum(last[: numbers[place] - 1]) + depths[place], uncertainty_code(own))
        for place, own in zip(column.tolist(), taken, strict=True)
    )


def reference_of_config(config: PreTrainedConfig) -> np.ndarray:
    """Return how sure every exit was of the certificate's texts, float32 of shape `[rows, L]`."""
    values = np.frombuffer(base64.b64decode(config.certification["reference"]), "<f4").astype(np.float32)
    return values.reshape(-1, config.num_hidden_layers)


def grouped(counts: Mapping[Place, int], cell: Callable[[Place], Any]) -> Counter:
    """Return the counts of cells."""
    found = Counter()
    for place, number in counts.items():
        found[cell(place)] += number
    return found


def two_samples(first: Counter, second: Counter) -> float:
    """Return the p-value of a chi-square test that two samples of ordered cells are drawn alike."""
    cells = sorted({*first, *second})
    table = np.array([[first[cell] for cell in cells], [second[cell] for cell in cells]], dtype=float)
    shares = table.sum(1) / table.sum()
    merged, column = [], np.zeros(2)
    most = max(table.sum() / BINS, LEAST_EXPECTED / shares.min())
    for own in table.T:
        column = column + own
        if column.sum() >= most:
            merged.append(column)
            column = np.zeros(2)
    if column.any():
        merged = [*merged[:-1], merged[-1] + column] if merged else [column]
    return 1.0 if len(merged) < 2 else float(chi2_contingency(np.array(merged).T, correction=False).pvalue)
