"""
Metrics of exits as `evaluate.Metric` classes, which need no hub: create one and call `compute`.

All take `predictions`, probabilities or logits of shape `[rows, num_labels]`. Where nothing is negative and every row
sums to 1 within a hundredth, they are taken for probabilities (rounded ones and half precision too), else for logits.

The answer of a row is the first of its greatest numbers. Its confidence is that number itself where probabilities are
given, which are never normalised again, and its softmax in float64 where logits are, whatever the order of the labels.
So rows with the same greatest probability, or the same logits in any order, are equally confident: rounding breaks no
tie.
"""

from __future__ import annotations

import numpy as np
import torch

from ..modeling.categorical_tasks import SingleLabel


try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError('fastbert_hf.evaluation needs its extra: pip install "fastbert-hf[evaluation]"') from error


CLASSIFICATION = SingleLabel()
CASCADEBERT = """\
@inproceedings{li-etal-2021-cascadebert-accelerating,
    title = "{C}ascade{BERT}: Accelerating Inference of Pre-trained Language Models via Calibrated Complete Models Cascade",
    author = "Li, Lei and Lin, Yankai and Chen, Deli and Ren, Shuhuai and Li, Peng and Zhou, Jie and Sun, Xu",
    booktitle = "Findings of the Association for Computational Linguistics: EMNLP 2021",
    year = "2021",
}"""  # noqa: E501

SCORES = datasets.Sequence(datasets.Value("float64"))
PREDICTIONS_AND_LABELS = """
Args:
    predictions (array of shape `[rows, num_labels]`): Probabilities or logits.
    references (array of shape `[rows]`): Gold labels, from 0 to `num_labels - 1`."""


class DifficultyInversionScore(evaluate.Metric):
    """
    Measure how consistently a classifier is less confident where it is wrong (CascadeBERT, EMNLP Findings 2021, Eq. 1
    to 3): the share of the pairs of a wrong and a right answer in which the wrong one is not the more confident.

    The paper's Eq. 1 prints the comparison of confidences the other way round, which its Eq. 2 would never count; the
    text and its Figure 3 (higher is better) say what is meant.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Difficulty Inversion Score: how well confidence tells right answers from wrong ones.",
            citation=CASCADEBERT,
            inputs_description=f"""{PREDICTIONS_AND_LABELS}
Returns:
    `difficulty_inversion_score`, in [0, 1], higher is better; NaN where all answers are right, or all wrong.
""",
            features=datasets.Features({"predictions": SCORES, "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        confidence, right = _confidence_and_success(predictions, references)
        wrong = ~right
        right_confidence = np.sort(confidence[right])
        pairs = wrong.sum() * right.sum()
        # For each wrong answer, the right ones that are less confident.
        inversions = np.searchsorted(right_confidence, confidence[wrong], side="left").sum()
        return {"difficulty_inversion_score": float(1 - inversions / pairs) if pairs else float("nan")}


class ExpectedCalibrationError(evaluate.Metric):
    """
    Measure how far confidence is from accuracy (CascadeBERT, EMNLP Findings 2021, Appendix B, Eq. 7): the difference
    of the two in each of 10 equally wide bins of confidence, weighted by the answers in it. A bin holds its upper edge
    and not its lower one.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Expected Calibration Error: how far the confidence is from the accuracy.",
            citation=CASCADEBERT,
            inputs_description=f"""{PREDICTIONS_AND_LABELS}
    num_bins (`int`, defaults to 10): Bins of equal width over [0, 1].
Returns:
    `expected_calibration_error`, in [0, 1], lower is better.
""",
            features=datasets.Features({"predictions": SCORES, "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references, num_bins: int = 10) -> dict[str, float]:
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
        confidence, right = _confidence_and_success(predictions, references)
        # A product with num_bins could round 0.07 * 100 beyond its bin; a quotient is the number that 0.07 is.
        bins = np.searchsorted(np.arange(1, num_bins) / num_bins, confidence, side="left")
        gaps = np.bincount(bins, weights=right.astype(float) - confidence, minlength=num_bins)
        return {"expected_calibration_error": float(np.abs(gaps).sum() / len(right))}


class FullModelAgreement(evaluate.Metric):
    """Measure on which share of the rows the early answer is that of the full model. Needs no labels."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Agreement of early answers with those of the full model.",
            citation="",
            inputs_description="""
Args:
    predictions (array of shape `[rows, num_labels]`): Probabilities or logits of the early answers.
    references (array of shape `[rows, num_labels]`): Those of the full model.
Returns:
    `full_model_agreement`, in [0, 1].
""",
            features=datasets.Features({"predictions": SCORES, "references": SCORES}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        early, full = _scores(predictions, "predictions"), _scores(references, "references")
        if early.shape != full.shape:
            raise ValueError(
                f"predictions are {list(early.shape)} and references {list(full.shape)}: give both as [rows, "
                "num_labels] of the same rows."
            )
        return {"full_model_agreement": float((_answers(early) == _answers(full)).mean())}


def _scores(values, name: str) -> np.ndarray:
    widths = {len(row) for row in values}
    if len(widths) != 1 or widths.pop() < 2:
        raise ValueError(
            f"{name} must be [rows, num_labels] with at least one row and two labels, all rows equally long."
        )
    scores = np.asarray(values, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"{name} hold NaN or infinity: check the model's weights and inputs.")
    return scores


def _confidence_and_success(predictions, references) -> tuple[np.ndarray, np.ndarray]:
    """Return how confident each answer is, float64 of shape `[rows]`, and whether it is right, bool."""
    scores, labels = _scores(predictions, "predictions"), np.asarray(references)
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(
            f"references must be labels from 0 to {scores.shape[1] - 1}, got {labels.min()} to {labels.max()}."
        )
    right = _answers(scores) == labels
    if (scores >= 0).all() and np.allclose(scores.sum(-1), 1, rtol=0, atol=1e-2):
        return np.minimum(scores.max(-1), 1), right  # a rounded one can be above 1
    # Sorted, as the order of the summands decides how their sum is rounded.
    return CLASSIFICATION.probabilities(torch.from_numpy(np.sort(scores, -1))).numpy().max(-1), right


def _answers(scores: np.ndarray) -> np.ndarray:
    """Return the label of each row of logits or probabilities, `[rows]`."""
    return CLASSIFICATION.predictions(torch.from_numpy(scores)).numpy()
