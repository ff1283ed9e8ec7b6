"""Metrics of each task that need no more than sums over the texts, so that those of all speeds follow from few."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..modeling.task_interface import Task
from ..modeling.tasks import task_of
from .entities import are_tags, entities_of


class TaskMetric(NamedTuple):
    """A metric of answers against gold labels, of which more is better."""

    # From a task, logits [rows, ...], labels [rows, ...] and the config to what it adds up, [rows, ...].
    counts: Callable[[Task, torch.Tensor, torch.Tensor, PreTrainedConfig], torch.Tensor]
    score: Callable[[torch.Tensor], torch.Tensor]  # from such sums, [..., ...], to the metric, [...]


def of_all(is_right: torch.Tensor) -> torch.Tensor:
    """Return `[rows, 2]`: whether each of some is right, and that it counts."""
    return torch.stack([is_right, torch.ones_like(is_right)], -1).long()


def share(sums: torch.Tensor) -> torch.Tensor:
    """Return the share that is right."""
    right, number = sums.double().unbind(-1)
    return right / number


def right_answers(task: Task, logits: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    """Count texts, and those whose whole answer is right."""
    return of_all(task.is_right(logits, labels))


def of_labels(task: Task, logits: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    """Count for each label how often it is answered rightly, answered, and gold: `[rows, 3, num_labels]`."""
    answers = nn.functional.one_hot(task.predictions(logits), logits.shape[-1])
    gold = nn.functional.one_hot(labels, logits.shape[-1])
    return torch.stack([answers * gold, answers, gold], 1)


def of_several_labels(task: Task, logits: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    """As [`of_labels`], where a text has several."""
    answers, gold = task.predictions(logits), labels.long()
    return torch.stack([answers * gold, answers, gold], 1)


def of_entities(task: Task, logits: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    """Count of each text the entities that are answered rightly, answered, and gold, on the tokens with labels."""
    names = [config.id2label[label] for label in range(config.num_labels)]

    @cache
    def entities(tags: tuple[int, ...]) -> set:
        return entities_of([names[tag] for tag in tags])

    counts = []
    for answered, gold in zip(task.predictions(logits).tolist(), labels.tolist(), strict=True):
        pairs = [(own, label) for own, label in zip(answered, gold, strict=True) if label != -100]
        found, wanted = map(entities, zip(*pairs, strict=True)) if pairs else (set(), set())
        counts.append([len(found & wanted), len(found), len(wanted)])
    return torch.tensor(counts)


def right_tokens(task: Task, logits: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    """Count tokens with labels, and those that are answered rightly."""
    is_counted = labels != -100
    right = (task.predictions(logits) == labels) & is_counted
    return torch.stack([right.sum(-1), is_counted.sum(-1)], -1)


def overlaps(task: Task, logits: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    """Return F1 of the tokens of each answer against the gold ones, and a 1."""
    first, last = task.decided(logits).unbind(-1)
    both = torch.minimum(last, labels[:, 1]) - torch.maximum(first, labels[:, 0]) + 1
    tokens = (last - first + 1).clamp(min=0) + labels[:, 1] - labels[:, 0] + 1
    scores = 2 * both.clamp(min=0).double() / tokens
    return torch.stack([scores, torch.ones_like(scores)], -1)


def moments(task: Task, logits: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    """Return what the variances and covariances of answers and labels follow from: `[rows, 6, outputs]`, float64."""
    given, gold = logits.double(), labels.double().view(len(labels), -1)
    return torch.stack([torch.ones_like(given), given, gold, given**2, gold**2, given * gold], 1)


def f1(sums: torch.Tensor) -> torch.Tensor:
    """Return F1 of what was answered rightly, answered, and gold: 0 where there is nothing."""
    right, answered, gold = sums.unbind(-1)
    return 2 * right.double() / (answered + gold).clamp(min=1)


def binary_or_macro_f1(sums: torch.Tensor) -> torch.Tensor:
    """Return F1 of the second of two labels, else the mean over the labels that are there."""
    seen = sums[..., 1, :] + sums[..., 2, :]
    of_each = f1(sums.movedim(-2, -1))
    return of_each[..., 1] if seen.shape[-1] == 2 else of_each.sum(-1) / (seen > 0).sum(-1)


def macro_f1(sums: torch.Tensor) -> torch.Tensor:
    """Return the mean of F1 over the labels."""
    return f1(sums.movedim(-2, -1)).mean(-1)


def matthews_correlation(sums: torch.Tensor) -> torch.Tensor:
    """Return Matthews' correlation coefficient, 0 where answers or labels are all the same."""
    right, answered, gold = sums.double().unbind(-2)
    rows = gold.sum(-1)
    covariance = right.sum(-1) * rows - (answered * gold).sum(-1)
    spread = (rows**2 - answered.square().sum(-1)) * (rows**2 - gold.square().sum(-1))
    return torch.where(spread > 0, covariance / spread.clamp(min=1).sqrt(), 0.0)


def r2(sums: torch.Tensor) -> torch.Tensor:
    """Return the share of the labels' variance that answers explain, averaged over the outputs."""
    rows, _, gold, given_squares, gold_squares, products = sums.unbind(-2)
    variance, errors = gold_squares - gold**2 / rows, given_squares - 2 * products + gold_squares
    # Of labels that are all the same there is nothing to explain: as in scikit-learn.
    is_constant = variance <= 1e-12 * gold_squares.clamp(min=1e-12)
    explained = 1 - errors / variance.masked_fill(is_constant, 1.0)
    return explained.where(~is_constant, (errors <= 1e-12 * gold_squares.clamp(min=1e-12)).double()).mean(-1)


def pearson(sums: torch.Tensor) -> torch.Tensor:
    """Return the correlation of answers and labels, averaged over the outputs; 0 where either is constant."""
    rows, given, gold, given_squares, gold_squares, products = sums.unbind(-2)
    spread = (given_squares - given**2 / rows) * (gold_squares - gold**2 / rows)
    covariance = products - given * gold / rows
    return torch.where(spread > 0, covariance / spread.clamp(min=1e-24).sqrt(), 0.0).mean(-1)


# Of each task, the first one being what is reported unless another one is asked for.
METRICS: dict[str, dict[str, TaskMetric]] = {
    "single_label_classification": {
        "accuracy": TaskMetric(right_answers, share),
        "f1": TaskMetric(of_labels, binary_or_macro_f1),
        "matthews_correlation": TaskMetric(of_labels, matthews_correlation),
    },
    "multi_label_classification": {
        "f1": TaskMetric(of_several_labels, lambda sums: f1(sums.sum(-1))),  # of all labels together
        "macro_f1": TaskMetric(of_several_labels, macro_f1),
        "accuracy": TaskMetric(right_answers, share),  # of whole answers
    },
    "regression": {"r2": TaskMetric(moments, r2), "pearson": TaskMetric(moments, pearson)},
    "token_classification": {
        "f1": TaskMetric(of_entities, f1),  # of entities
        "accuracy": TaskMetric(right_tokens, share),  # of tokens
    },
    "question_answering": {"f1": TaskMetric(overlaps, share), "accuracy": TaskMetric(right_answers, share)},
}
ALL_METRICS = tuple(dict.fromkeys(name for metrics in METRICS.values() for name in metrics))


def metrics_of(config: PreTrainedConfig) -> dict[str, TaskMetric]:
    """Return the metrics that a model has, by name. Tokens whose labels are no tags of entities have no F1."""
    metrics = METRICS[task_of(config).name]
    if are_tags(list(config.id2label.values())):
        return metrics
    return {name: metric for name, metric in metrics.items() if metric.counts is not of_entities}


def metric_of(config: PreTrainedConfig, name: str | None = None) -> tuple[str, TaskMetric]:
    """Return a metric by its name, the first one of the task unless given, or raise a `ValueError`."""
    metrics = metrics_of(config)
    name = next(iter(metrics)) if name is None else name
    if name not in metrics:
        raise ValueError(
            f"metric={name!r:.40} is not known for {task_of(config).name}; choose one of {', '.join(metrics)}."
        )
    return name, metrics[name]


def measured(config: PreTrainedConfig, name: str | None, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return a metric of the answers to some rows."""
    metric = metric_of(config, name)[1]
    return metric.score(metric.counts(task_of(config), logits, labels, config).sum(0)).item()
