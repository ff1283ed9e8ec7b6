"""What each task makes of logits, against the same written as loops over texts, labels and tokens in float64."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from fastbert_hf.evaluation import exit_uncertainties, record_exits
from fastbert_hf.modeling.exit_policies import ExitPolicy

from ..common import NUM_LAYERS, assert_close
from .common import TASK_MODELS, TASKS, encoded_texts, policies_of, task_gates


TEXTS = encoded_texts(20, seed=5, longest=30)
NUMBERS = ("one_number", "several_numbers")
WINDOW, MOST_LEAD = 5, 20.0


@cache
def logits_of(task: str) -> tuple[object, object, list[list[torch.Tensor]]]:
    """Return a model, its record, and of each text what each exit says, in float64 and without padding."""
    model = TASK_MODELS[task](gates=task_gates(task), patience=2)
    record = record_exits(model, TEXTS, progress=False)
    of_texts = []
    for logits, text in zip(record.exit_logits.double(), TEXTS, strict=True):
        of_texts.append([own[: len(text["input_ids"])] if task == "tokens" else own for own in logits])
    return model, record, of_texts


def decisions(task: str, model, logits: torch.Tensor) -> list[list[float]]:
    """Return the probabilities of the choices of each decision of a text."""
    if task == "single_label":
        return [logits.softmax(-1).tolist()]
    if task == "tokens":
        return logits.softmax(-1).tolist()
    thresholds = model.config.label_thresholds or [0.5] * len(logits)
    shifted = [value - math.log(t / (1 - t)) for value, t in zip(logits.tolist(), thresholds, strict=True)]
    yes = [1 / (1 + math.exp(-value)) for value in shifted]
    return [[1 - own, own] for own in yes]


def entropy(choices: list[float]) -> float:
    return -sum(own * math.log(own) for own in choices if own > 0) / math.log(len(choices))


def lead(choices: list[float]) -> float:
    first, second = sorted(choices)[:-3:-1]
    return min(math.log(first / second), MOST_LEAD)


def of_text(policy: str, parts: list[list[float]]) -> float:
    """Return the uncertainty of a text by a policy without a memory."""
    entropies = list(map(entropy, parts))
    if policy == "entropy":
        return max(entropies)
    if policy == "mean_entropy":
        return sum(entropies) / len(entropies)
    if policy == "confidence":
        return max((1 - max(own)) * len(own) / (len(own) - 1) for own in parts)
    if policy == "margin":
        return max(1 - (sorted(own)[-1] - sorted(own)[-2]) for own in parts)
    assert policy == "window_entropy"
    windows = [entropies[max(place - WINDOW // 2, 0) : place + WINDOW // 2 + 1] for place in range(len(entropies))]
    return max(sum(own) / len(own) for own in windows)


def same(task: str, model, logits: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two answers are the same."""
    if task in NUMBERS:
        return bool(((logits - other).abs() <= model.config.tolerance).all())
    answers = [[own.index(max(own)) for own in decisions(task, model, part)] for part in (logits, other)]
    return answers[0] == answers[1]


def patience(task: str, model, exits: list[torch.Tensor]) -> list[float]:
    """Return the uncertainties of the exits of a text: of its decisions, the one that agrees for the shortest time."""
    wanted, found, agreements = model.config.patience, [], None
    for depth, logits in enumerate(exits):
        number = 1 if task == "single_label" else len(logits)
        if depth == 0:
            agreements = [0] * number
        else:
            before = exits[depth - 1]
            for place in range(number):
                if task in NUMBERS:
                    agrees = abs(logits[place] - before[place]) <= model.config.tolerance
                else:
                    own, last = (decisions(task, model, part)[place] for part in (logits, before))
                    agrees = own.index(max(own)) == last.index(max(last))
                agreements[place] = agreements[place] + 1 if agrees else 0
        found.append(max(wanted - min(agreements), 0) / wanted)
    return found


def learned(task: str, model, exits: list[torch.Tensor]) -> list[float]:
    """Return what the gates say of the exits of a text."""
    found = []
    for depth, logits in enumerate(exits):
        *weights, bias = model.config.gates[depth]
        if task in NUMBERS:
            values, earlier = logits.tolist(), [own.tolist() for own in exits[:depth]]
            change = [abs(value - earlier[-1][place]) for place, value in enumerate(values)] if depth else [0.0]
            means = [sum(own) / depth for own in zip(*earlier, strict=True)]
            distance = [abs(value - mean) for value, mean in zip(values, means, strict=True)] if depth else [0.0]
            features = [max(change), max(distance)]
            features += [sum(value**power for value in values) / len(values) for power in (1, 2)]
            total = sum(weight * feature for weight, feature in zip(weights, features, strict=True)) + bias
            found.append(min(1.0, math.exp(total)))
            continue
        parts = decisions(task, model, logits)
        before = [decisions(task, model, own) for own in exits[:depth]]
        probability, agreement = [], []
        for place, own in enumerate(parts):
            answer = own.index(max(own))
            earlier = [part[place] for part in before]
            probability.append(sum(part[answer] for part in earlier) / max(depth, 1))
            agreement.append(sum(part.index(max(part)) == answer for part in earlier) / max(depth, 1))
        features = [max(map(entropy, parts)), min(map(lead, parts)), min(probability), min(agreement)]
        total = sum(weight * feature for weight, feature in zip(weights, features, strict=True)) + bias
        found.append(1 / (1 + math.exp(-total)))
    return found


@pytest.mark.parametrize(("task", "policy"), [(task, policy) for task in TASKS for policy in policies_of(task)])
def test_uncertainties_are_those_of_loops(task, policy):
    model, record, of_texts = logits_of(task)
    found = exit_uncertainties(record, ExitPolicy.of(model.config, policy))
    loops = {"patience": patience, "learned": learned}
    expected = [
        loops[policy](task, model, exits)
        if policy in loops
        else [of_text(policy, decisions(task, model, logits)) for logits in exits]
        for exits in of_texts
    ]
    assert_close(found.double(), torch.tensor(expected).double(), 2e-5)
    assert torch.tensor(expected).std() > 0.01


@pytest.mark.parametrize("task", TASKS)
def test_answers_that_differ_are_those_of_loops(task):
    model, record, of_texts = logits_of(task)
    task_object, full = model.policy().task, record.exit_logits[:, -1]
    for depth in range(NUM_LAYERS):
        differs = task_object.differs(record.exit_logits[:, depth], full).tolist()
        assert differs == [not same(task, model, exits[depth], exits[-1]) for exits in of_texts]
    assert 0 < task_object.differs(record.exit_logits[:, :-1], full[:, None]).float().mean() <= 1


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("task", TASKS)
def test_divergences_are_those_of_loops(task, temperature, reverse):
    model, record, of_texts = logits_of(task)
    found = model.policy().task.divergence(
        record.exit_logits[:, 0], record.exit_logits[:, -1], temperature, reverse=reverse
    )
    expected = []
    for exits in of_texts:
        if task in NUMBERS:
            expected.append(float((exits[0] - exits[-1]).square().mean()))
            continue
        if task.startswith("several_labels"):
            thresholds = torch.tensor(model.config.label_thresholds or [0.5] * 3).double()
            shifted = [own - thresholds.logit() for own in (exits[0], exits[-1])]
            pairs = [torch.stack([torch.zeros_like(own), own], -1) for own in shifted]
        else:
            pairs = [own.view(-1, own.shape[-1]) for own in (exits[0], exits[-1])]
        student, teacher = ((own / temperature).softmax(-1) for own in pairs)
        wanted, given = (student, teacher) if reverse else (teacher, student)
        of_decisions = (wanted * (wanted / given).log()).sum(-1) * temperature**2
        expected.append(float(of_decisions.mean() if task == "tokens" else of_decisions.sum()))
    assert_close(found.double(), torch.tensor(expected).double(), 2e-5)


@pytest.mark.parametrize("task", ["several_labels", "several_labels_with_thresholds"])
def test_a_label_is_answered_above_its_threshold(task):
    model, record, _ = logits_of(task)
    thresholds = torch.tensor(model.config.label_thresholds or [0.5] * 3)
    answers = model.policy().task.predictions(record.exit_logits)
    assert torch.equal(answers, (record.exit_logits.sigmoid() > thresholds).long())
    assert 0.1 < answers.float().mean() < 0.9
