"""`drift`: whether the texts that were answered are unlike those of the certificate."""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..modeling.dial_checks import GRID
from ..modeling.exit_policies import config_thresholds
from ..modeling.served_answers import Served, ServedAnswers


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
    and within the limits of the certificate. A change that moves neither where texts leave nor how sure the exits are
    is not seen.

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
        speed (`float`): In (0, 1]; what the uncertainties were compared with.
        level (`float`), look (`int`): As in [`drift`] and [`Drift`].
    """
    served = ServedAnswers()
    served.add(float(speed), list(answers))
    return compare(served.counts, config, level, look)


def compare(counts: Mapping[Served, int], config: PreTrainedConfig, level: float, look: int) -> Drift:
    """Return how the counts of answers differ from what is expected of the texts of a certificate."""
    if config.certification is None:
        raise ValueError(
            "drift compares with the texts of a certificate, which this model has not: "
            "fastbert_hf.calibrate(model, texts, tokenizer)"
        )
    by_speed: dict[float, Counter[tuple[int, int, int]]] = defaultdict(Counter)
    for served, number in counts.items():
        by_speed[served.threshold][served.exit_member, served.exit_layer, served.code] += number
    by_speed = {speed: found for speed, found in by_speed.items() if found.total() >= LEAST_ANSWERS}
    p_values, answers, layers, expected_layers = [], 0, 0.0, 0.0
    for speed, found in by_speed.items():
        expected = expected_answers(config, speed)
        number = found.total()
        answers += number
        layers += sum(layer * times for (_, layer, _), times in found.items())
        expected_layers += number * sum(layer * share for (_, layer, _), share in expected.items())
        rows = reference_rows(config)
        for cell in (lambda key: key[:2], lambda key: key[2]):
            p_values.append(two_samples(grouped(found, cell), grouped(expected, cell, rows)))
    # The looks share the level as 1/2, 1/6, 1/12, ..., which add up to 1.
    p_value = min([1.0, *(own * len(p_values) * look * (look + 1) for own in p_values)])
    number = max(answers, 1)
    return Drift(answers, look, p_value, p_value < level, layers / number, expected_layers / number)


def expected_answers(config: PreTrainedConfig, speed: float) -> dict[tuple[int, int, int], float]:
    """
    Return by exit member, exit layer and how sure the exit is the share of the certificate's texts that are answered
    so at a speed. Of texts whose uncertainty lies between the same two speeds of `GRID` as this one, a part leaves.
    """
    codes = codes_of(config)  # [rows, L]
    thresholds = config_thresholds(config, torch.tensor([speed], dtype=torch.float32))
    place = int(np.searchsorted(GRID, speed * (1 - 1e-6)))  # the first of GRID that is not below the speed
    before, after = GRID[place - 1] if place > 0 else 0.0, GRID[min(place, len(GRID) - 1)]
    part = (speed - before) / (after - before) if after > before else 1.0
    is_open, shares = np.ones(len(codes)), Counter()
    column = layers = 0
    for member, of_member in enumerate(thresholds, start=1):
        own = of_member[0].tolist()
        last = max((depth for depth, threshold in enumerate(own, start=1) if threshold > 0), default=0)
        for depth, threshold in enumerate(own, start=1):
            code = codes[:, column]
            column += 1
            if threshold <= 0:
                continue
            leaving = np.where(code < place, 1.0, np.where(code == place, min(part, 1.0), 0.0))
            leaving = is_open * (1.0 if np.isinf(threshold) else leaving)
            for row_code, share in zip(code.tolist(), leaving.tolist(), strict=True):
                if share > 0:
                    shares[member, layers + depth, row_code] += share / len(codes)
            is_open = is_open - leaving
        layers += last
    return dict(shares)


def codes_of(config: PreTrainedConfig) -> np.ndarray:
    """Return how sure every exit was of the certificate's texts, `[rows, L]`: the speeds of `GRID` not above."""
    codes = np.frombuffer(base64.b64decode(config.certification["reference"]), np.uint8)
    return codes.reshape(-1, config.num_hidden_layers)


def reference_rows(config: PreTrainedConfig) -> int:
    """Return of how many texts it is known how sure the exits were."""
    return len(codes_of(config))


def grouped(counts: Mapping[tuple, float], cell: Any, times: float = 1.0) -> Counter:
    """Return the counts of cells."""
    found = Counter()
    for key, number in counts.items():
        found[cell(key)] += times * number
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
