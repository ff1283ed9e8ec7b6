"""Fit the gates of the policy "learned": logistic regressions on a record of every exit, without labels."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..evaluation.exit_record import ExitRecord
from ..modeling.exit_gates import FEATURES, ExitGates, gate_features
from ..modeling.tasks import Task


try:
    from sklearn.linear_model import LogisticRegression
except ImportError as error:
    raise ImportError('gates need an extra: pip install "fastbert-hf[calibration]"') from error


# Of the weights of standardised features, by scikit-learn's C: chosen on dev texts.
STRENGTH = 0.1
# Of an exit that cannot differ, the bias whose sigmoid is 0 in float32.
NEVER = -1000.0


def fit_gates(
    record: ExitRecord, task: Task, full_answers: torch.Tensor, may_answer: torch.Tensor
) -> list[list[float]]:
    """
    Return a gate for each exit of a record: its weights of `FEATURES`, and a bias.

    Args:
        record ([`ExitRecord`]): Of at least two texts.
        task ([`Task`]): What the logits mean.
        full_answers (`torch.Tensor` of shape `[rows]`): What the full model answers.
        may_answer (`torch.Tensor` of shape `[L]`, bool): The exits that may answer, and so count for those after them.
    """
    gates = []
    for part in record.columns_of_members:
        state = ExitGates((), record.exit_logits.shape[-1]).start(len(record.exit_logits))
        for column in range(record.num_exits)[part]:
            logits = record.exit_logits[:, column]
            features, remembered = gate_features(task, logits, state)
            differs = task.predictions(logits) != full_answers
            is_full = column == record.num_exits - 1
            gates.append(_gate(torch.stack(features, 1), differs, is_full))
            state = remembered if may_answer[column] else state
    return gates


def _gate(features: torch.Tensor, differs: torch.Tensor, is_full: bool) -> list[float]:
    if is_full:
        return [*[0.0] * len(FEATURES), NEVER]
    number, rows = int(differs.sum()), len(differs)
    if number in (0, rows):  # no more can be said than that it was never, or always, so: Laplace's rule
        return [*[0.0] * len(FEATURES), math.log((number + 1) / (rows - number + 1))]
    values = features.double().numpy()
    means, deviations = values.mean(0), np.maximum(values.std(0), 1e-6)
    # Where all are equal, as of the first exit, which knows of none before.
    deviations[deviations <= 1e-6] = np.inf
    model = LogisticRegression(C=STRENGTH, max_iter=1000).fit((values - means) / deviations, differs.numpy())
    weights = model.coef_[0] / deviations
    bias = float(model.intercept_[0] - weights @ means)
    return [round(float(weight), 6) for weight in (*weights, bias)]
