from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert_hf.evaluation.metrics import DifficultyInversionScore, ExpectedCalibrationError, FullModelAgreement


def difficulty_inversion_score(predictions, references) -> float:
    return DifficultyInversionScore().compute(predictions=predictions, references=references)[
        "difficulty_inversion_score"
    ]


def calibration_error(predictions, references, **kwargs) -> float:
    metric = ExpectedCalibrationError()
    return metric.compute(predictions=predictions, references=references, **kwargs)["expected_calibration_error"]


def agreement(predictions, references) -> float:
    return FullModelAgreement().compute(predictions=predictions, references=references)["full_model_agreement"]


def random_answers(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.dirichlet([1, 1, 1], rows), generator.integers(0, 3, rows)


def test_difficulty_inversion_score_by_hand():
    # Right with 0.9 and 0.6, wrong with 0.7 and 0.55: of the four pairs, 0.7 against 0.6 is inverted.
    predictions = [[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.55, 0.45]]
    assert difficulty_inversion_score(predictions, [0, 0, 0, 1]) == pytest.approx(0.75)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 25), seed=st.integers(0, 10_000))
def test_difficulty_inversion_score_equals_the_sum_over_all_pairs(rows, seed):
    predictions, references = random_answers(rows, seed)
    confidence, wrong = predictions.max(-1), predictions.argmax(-1) != references
    pairs = [(i, j) for i, j in itertools.product(range(rows), repeat=2) if wrong[i] and not wrong[j]]
    score = difficulty_inversion_score(predictions, references)
    if not pairs:
        assert math.isnan(score)
    else:
        assert score == pytest.approx(1 - sum(confidence[i] > confidence[j] for i, j in pairs) / len(pairs))


@pytest.mark.parametrize("references", [[0, 0], [1, 1]])
def test_difficulty_inversion_score_without_a_pair_is_not_a_number(references):
    assert math.isnan(difficulty_inversion_score([[0.9, 0.1], [0.6, 0.4]], references))


def test_expected_calibration_error_by_hand():
    # Bin (0.9, 1]: confidences 0.95 and 1.0, one right. Bin (0.6, 0.7]: 0.7, right.
    predictions = [[0.95, 0.05], [0.0, 1.0], [0.7, 0.3]]
    expected = 2 / 3 * abs(0.5 - 0.975) + 1 / 3 * abs(1 - 0.7)
    assert calibration_error(predictions, [0, 0, 0]) == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), num_bins=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_expected_calibration_error_equals_a_loop_over_the_bins(rows, num_bins, seed):
    predictions, references = random_answers(rows, seed)
    confidence, right = predictions.max(-1), predictions.argmax(-1) == references
    expected = 0.0
    for index in range(num_bins):
        inside = (confidence > index / num_bins) & (confidence <= (index + 1) / num_bins)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(predictions, references, num_bins=num_bins) == pytest.approx(expected)


def test_a_calibrated_classifier_has_no_error():
    predictions = [[0.75, 0.25]] * 4
    assert calibration_error(predictions, [0, 0, 0, 1]) == pytest.approx(0)


# The first row is wrong, the second one right.
@pytest.mark.parametrize(
    "predictions",
    [
        [[0.6, 0.3, 0.1], [0.6, 0.2, 0.2]],
        [[0.6, 0.2, 0.2], [0.6, 0.2, 0.2]],
        [[0.6, 0.2, 0.2], [0.6, 0.3, 0.1]],
        [[0.6, 0.4, 0.0], [0.6, 0.399, 0.0]],  # rounded
    ],
)
def test_equal_probabilities_are_a_tie_in_which_nothing_is_inverted(predictions):
    assert difficulty_inversion_score(predictions, [1, 0]) == 1
    # Both in the bin (0.5, 0.6], of which half is right.
    assert calibration_error(predictions, [1, 0]) == pytest.approx(0.1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), labels=st.integers(2, 9))
def test_the_same_logits_in_any_order_are_a_tie(seed, labels):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=labels) * 3
    rows = [generator.permutation(logits) for _ in range(6)]
    references = [(np.argmax(row) + (number < 3)) % labels for number, row in enumerate(rows)]
    assert difficulty_inversion_score(rows, references) == 1


@pytest.mark.parametrize(("edge", "num_bins"), [(6, 10), (14, 25), (55, 100)])  # 14 / 25 * 25 is more than 14
def test_a_confidence_on_an_edge_is_in_the_bin_below(edge, num_bins):
    # The answer at the edge is right, that a hair above it wrong. In one bin they would make up for each other.
    confidence = edge / num_bins
    predictions = [[value, 1 - value] for value in (confidence, np.nextafter(confidence, 1))]
    assert calibration_error(predictions, [0, 1], num_bins=num_bins) == pytest.approx(0.5)


def test_a_confidence_is_at_most_1():
    assert calibration_error([[1.004, 0.0]], [1]) == 1


@pytest.mark.parametrize("metric", [difficulty_inversion_score, calibration_error])
def test_logits_and_their_probabilities_are_the_same_answers(metric):
    logits = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) * 2
    references = torch.randint(4, (60,), generator=torch.Generator().manual_seed(1))
    assert metric(logits, references) == pytest.approx(metric(logits.softmax(-1), references), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_of_half_precision_are_probabilities(dtype):
    probabilities = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    references = torch.randint(4, (60,), generator=torch.Generator().manual_seed(1))
    rounded = probabilities.to(dtype).float()
    assert calibration_error(rounded, references) == pytest.approx(
        calibration_error(probabilities, references), abs=0.03
    )


def test_agreement_counts_equal_answers():
    early, full = [[1.0, 2.0], [3.0, 1.0], [0.0, 5.0]], [[0.4, 0.6], [0.3, 0.7], [0.1, 0.9]]
    assert agreement(early, full) == pytest.approx(2 / 3)


GOOD = [[0.9, 0.1], [0.2, 0.8]]


@pytest.mark.parametrize("metric", [difficulty_inversion_score, calibration_error])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([1, 0], [1, 0], "don't match the expected format"),
        (GOOD, [1], "Mismatch in the number of predictions"),
        ([[0.9, 0.1], [0.2, 0.7, 0.1]], [0, 1], "all rows equally long"),
        ([[1.0], [1.0]], [0, 0], "two labels"),
        ([], [], "at least one row"),
        (GOOD, [0, 2], "from 0 to 1, got 0 to 2"),
        (GOOD, [-1, 1], "from 0 to 1, got -1 to 1"),
        ([[math.nan, 0.1], [0.2, 0.8]], [0, 1], "NaN or infinity"),
    ],
)
def test_misshapen_input_is_refused_by_name(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metric(predictions, references)


def test_agreement_refuses_answers_of_other_shapes():
    with pytest.raises(ValueError, match=r"predictions are \[2, 2\] and references \[2, 3\]"):
        agreement(GOOD, [[0.1, 0.2, 0.7], [0.1, 0.2, 0.7]])


def test_calibration_error_needs_a_bin():
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        calibration_error(GOOD, [0, 1], num_bins=0)


def test_batches_can_be_added_one_by_one():
    predictions, references = random_answers(30, 0)
    metric = ExpectedCalibrationError()
    for start in range(0, 30, 10):
        metric.add_batch(
            predictions=predictions[start : start + 10].tolist(), references=references[start : start + 10].tolist()
        )
    assert metric.compute()["expected_calibration_error"] == pytest.approx(calibration_error(predictions, references))
