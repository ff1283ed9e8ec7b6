"""Fit the gates of the policy "learned": logistic regressions on a record of every exit, without labels."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..evaluation.exit_record import ExitRecord
from ..modeling.exit_gates import MOST_WEIGHT
from ..modeling.task_interface import Task


try:
    from sklearn.linear_model import LogisticRegression, PoissonRegressor
except ImportError as error:
    raise ImportError('gates need an extra: pip install "fastbert-hf[calibration]"') from error


# How large the weights of standardised features may be, as scikit-learn's C; and, as factors of their features, how
# far an exit's own weights may be from those that all share, and its own bias. Chosen by cross-validation on dev.
STRENGTH, OWN_WEIGHTS, OWN_BIAS = 0.3, 0.3**0.5, 3.0
LEAST_DEVIATION = 0.02
POISSON_PENALTY = 1e-3  # scikit-learn's alpha, of standardised features
# More texts add nothing to so few weights.
MOST_ROWS = 4000
# Of an exit that cannot differ, the bias whose sigmoid is 0 in float32.
NEVER = -1000.0


def fit_gates(
    record: ExitRecord, task: Task, full_logits: torch.Tensor, may_answer: torch.Tensor
) -> list[list[float]]:
    """
    Return a gate for each exit of a record: its weights of the task's `gate_features`, and a bias.

    Args:
        record ([`ExitRecord`]): Of at least two texts.
        task ([`Task`]): What the logits mean.
        full_logits (`torch.Tensor` of shape `[rows, ...]`): What the full model says.
        may_answer (`torch.Tensor` of shape `[L]`, bool): The exits that may answer, and so count for those after them.
    """
    rows = torch.arange(0, len(record.exit_logits), -(-len(record.exit_logits) // MOST_ROWS))
    record, full_logits = record.select(rows), full_logits[rows]
    features, targets = [], []
    for part in record.columns_of_members:
        state = task.start_gate(len(record.exit_logits), "cpu")
        for column in range(record.num_exits)[part]:
            logits = record.exit_logits[:, column]
            found, remembered = task.gate(logits, task.fit(state, logits, 0))
            features.append(found)
            targets.append(task.gate_target(logits, full_logits))
            state = remembered if may_answer[column] else state
    never = [*[0.0] * len(task.gate_features), NEVER]  # the last exit is the full model itself
    if len(features) == 1:
        return [never]
    fit = FITS[task.gate_link]
    gates = fit(torch.stack(features[:-1], 1).double().numpy(), torch.stack(targets[:-1], 1).numpy())
    return [*gates, never]


def regression(features: np.ndarray, differs: np.ndarray) -> list[list[float]]:
    """
    Return the weights and the bias of each exit by one logistic regression, in which an exit's weights are those that
    all share and a part of its own: few answers differ, and most of what tells them is the same at every exit.

    Args:
        features (array of shape `[rows, exits, features]`): What each exit said of each text.
        differs (array of shape `[rows, exits]`, bool): Whether it answered otherwise than the full model.
    """
    rows, exits, number = features.shape
    if differs.all() or not differs.any():  # no more can be said than that: Laplace's rule
        times = int(differs.any()) * rows
        return [[*[0.0] * number, round(math.log((times + 1) / (rows - times + 1)), 6)]] * exits
    # Of a feature that hardly varies, a weight would be huge.
    means, deviations = features.mean((0, 1)), np.maximum(features.std((0, 1)), LEAST_DEVIATION)
    shared = (features - means) / deviations  # [rows, exits, features]
    own = np.zeros((rows, exits, exits, number + 1))
    for place in range(exits):
        own[:, place, place, :number] = OWN_WEIGHTS * shared[:, place]
        own[:, place, place, number] = OWN_BIAS
    columns = np.concatenate([shared, own.reshape(rows, exits, -1)], 2).reshape(rows * exits, -1)
    fitted = LogisticRegression(C=STRENGTH, solver="newton-cholesky", max_iter=200).fit(columns, differs.reshape(-1))
    of_shared, of_own = fitted.coef_[0][:number], fitted.coef_[0][number:].reshape(exits, number + 1)
    weights = (of_shared + OWN_WEIGHTS * of_own[:, :number]) / deviations  # [exits, features]
    biases = fitted.intercept_[0] + OWN_BIAS * of_own[:, number] - weights @ means
    return np.concatenate([weights, biases[:, None]], 1).round(6).tolist()


def expected_values(features: np.ndarray, targets: np.ndarray) -> list[list[float]]:
    """
    Return the weights and the bias of each exit by a Poisson regression of its own, whose exponent is what is expected
    of the targets.

    Args:
        features (array of shape `[rows, exits, features]`): What each exit said of each text.
        targets (array of shape `[rows, exits]`): At least 0.
    """
    gates = []
    for own, wanted in zip(features.transpose(1, 0, 2), targets.T, strict=True):
        means, deviations = own.mean(0), np.maximum(own.std(0), LEAST_DEVIATION)
        if not wanted.any():
            gates.append([*[0.0] * own.shape[1], NEVER])
            continue
        fitted = PoissonRegressor(alpha=POISSON_PENALTY, max_iter=1000).fit((own - means) / deviations, wanted)
        weights = (fitted.coef_ / deviations).clip(-MOST_WEIGHT, MOST_WEIGHT)
        gates.append([*weights.round(6).tolist(), round(float(fitted.intercept_ - weights @ means), 6)])
    return gates


FITS = {"logit": regression, "log": expected_values}
