"""Entities of tags, against seqeval, and metrics that are made of sums, against scikit-learn, SciPy and seqeval."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, r2_score

from fastbert_hf.evaluation.entities import are_tags, entities_of
from fastbert_hf.evaluation.task_metrics import measured, metric_of, metrics_of
from fastbert_hf.modeling.tasks import task_of

from .common import TAGS, TASKS, made_up_config


TYPES = ("PER", "LOC", "MISC-A")


def rows_of_tags(prefixes: str) -> st.SearchStrategy[list[str]]:
    tags = ["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in TYPES)]
    return st.lists(st.sampled_from(tags), max_size=14)


def of_seqeval(tags: list[str]) -> set[tuple[str, int, int]]:
    return {(kind, int(first), int(last)) for kind, first, last in get_entities(tags)}


@settings(max_examples=400, deadline=None)
@given(st.one_of(rows_of_tags("BI"), rows_of_tags("BIES"), rows_of_tags("I")))
def test_entities_are_those_of_seqeval(tags):
    assert entities_of(tags) == of_seqeval(tags)


@settings(max_examples=100, deadline=None)
@given(rows_of_tags("BILU"))
def test_bilou_is_iobes_with_other_letters(tags):
    letters = str.maketrans("LU", "ES")
    same = [tag[0].translate(letters) + tag[1:] for tag in tags]
    assert entities_of(tags) == of_seqeval(same)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([], set()),
        (["O", "O"], set()),
        (["B-PER", "I-PER", "O", "B-LOC"], {("PER", 0, 1), ("LOC", 3, 3)}),
        (["I-PER", "I-PER"], {("PER", 0, 1)}),
        (["B-PER", "B-PER"], {("PER", 0, 0), ("PER", 1, 1)}),
        (["B-PER", "I-LOC"], {("PER", 0, 0), ("LOC", 1, 1)}),
        (["S-PER", "I-PER", "E-PER", "I-PER"], {("PER", 0, 0), ("PER", 1, 2), ("PER", 3, 3)}),
        (["PER", "PER", "O", "LOC"], {("PER", 0, 1), ("LOC", 3, 3)}),
        (["B-A-B", "I-A-B"], {("A-B", 0, 1)}),
    ],
)
def test_entities_by_hand(tags, expected):
    assert entities_of(tags) == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (TAGS, True),
        (["O"], True),
        (["O", "S-A", "U-A"], True),
        (["NOUN", "VERB"], False),
        (["O", "PER"], False),
        (["B-PER", "I-PER"], False),
        (["LABEL_0", "LABEL_1"], False),
        ([], False),
    ],
)
def test_tags_are_told_from_other_labels(labels, expected):
    assert are_tags(labels) == expected


def test_tokens_whose_labels_are_no_tags_have_no_entities_to_count():
    config = made_up_config("tokens")
    assert metric_of(config)[0] == "f1"
    config.id2label = {0: "NOUN", 1: "VERB", 2: "ADJ", 3: "ADV", 4: "DET"}
    assert list(metrics_of(config)) == ["accuracy"]
    assert metric_of(config)[0] == "accuracy"
    with pytest.raises(ValueError, match=r"metric='f1' is not known for token_classification; choose one of accuracy"):
        metric_of(config, "f1")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["", "F1", "bleu", 5])
def test_an_unknown_metric_is_refused(task, name):
    config = made_up_config(task)
    with pytest.raises(
        ValueError, match=rf"metric={name!r} is not known for .*; choose one of {metric_of(config)[0]}"
    ):
        metric_of(config, name)


def random_numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SEEDS = st.integers(0, 10_000)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 30), st.floats(-2, 2))
def test_metrics_of_several_labels_are_those_of_scikit_learn(seed, rows, shift):
    config = made_up_config("several_labels_with_thresholds")
    logits, labels = random_numbers(seed, rows, 3) + shift, (random_numbers(seed + 1, rows, 3) > 0.5).float()
    answers = (logits.sigmoid() > torch.tensor(config.label_thresholds)).long()
    expected = {
        "f1": f1_score(labels, answers, average="micro", zero_division=0),
        "macro_f1": f1_score(labels, answers, average="macro", zero_division=0),
        "accuracy": accuracy_score(labels, answers),
    }
    assert {name: measured(config, name, logits, labels) for name in expected} == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 30), st.integers(2, 5))
def test_metrics_of_single_labels_are_those_of_scikit_learn(seed, rows, num_labels):
    config = SimpleNamespace(num_labels=num_labels, problem_type=None, id2label=dict.fromkeys(range(num_labels), "a"))
    logits = random_numbers(seed, rows, num_labels)
    labels, answers = random_numbers(seed + 1, rows, num_labels).argmax(-1), logits.argmax(-1)
    average = "binary" if num_labels == 2 else "macro"
    expected = {
        "f1": f1_score(labels, answers, average=average, zero_division=0),
        "accuracy": accuracy_score(labels, answers),
    }
    if len(torch.cat([labels, answers]).unique()) > 1:  # scikit-learn warns of a single label
        expected["matthews_correlation"] = matthews_corrcoef(labels, answers)
    assert {name: measured(config, name, logits, labels) for name in expected} == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(3, 30), st.sampled_from(["one_number", "several_numbers"]), st.floats(-2000, 2000))
def test_metrics_of_numbers_are_those_of_scikit_learn_and_scipy(seed, rows, task, offset):
    config = made_up_config(task)
    logits = random_numbers(seed, rows, config.num_labels) + offset
    labels = logits + random_numbers(seed + 1, rows, config.num_labels)
    given_rows, gold = logits.double().numpy(), labels.double().numpy()
    labels = labels.squeeze(-1) if config.num_labels == 1 else labels
    correlations = [pearsonr(*columns)[0] for columns in zip(given_rows.T, gold.T, strict=True)]
    assert measured(config, "r2", logits, labels) == pytest.approx(r2_score(gold, given_rows), abs=1e-5)
    assert measured(config, "pearson", logits, labels) == pytest.approx(
        sum(correlations) / len(correlations), abs=1e-5
    )


@pytest.mark.parametrize("answers", [[2.0, 2.0, 2.0], [1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
def test_numbers_that_are_all_the_same_are_scored_as_scikit_learn_does(answers):
    config, logits, labels = made_up_config("one_number"), torch.tensor(answers)[:, None], [2.0, 2.0, 2.0]
    assert measured(config, "r2", logits, torch.tensor(labels)) == pytest.approx(r2_score(labels, answers))
    assert measured(config, "pearson", logits, torch.tensor(labels)) == 0


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.floats(0, 0.9))
def test_metrics_of_tokens_are_those_of_seqeval_and_scikit_learn(seed, rows, tokens, without):
    config = made_up_config("tokens")
    logits = random_numbers(seed, rows, tokens, len(TAGS))
    gold = (logits + random_numbers(seed + 1, rows, tokens, len(TAGS))).argmax(-1)
    has_none = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed)) < without
    assume(not has_none.all())
    labels = gold.masked_fill(has_none, -100)
    logits = torch.cat([logits, torch.full((rows, 3, len(TAGS)), -100.0)], 1)  # beyond the texts
    labels = torch.cat([labels, torch.full((rows, 3), -100)], 1)
    answered, wanted = [], []
    for own, label in zip(logits.argmax(-1).tolist(), labels.tolist(), strict=True):
        kept = [(TAGS[answer], TAGS[tag]) for answer, tag in zip(own, label, strict=True) if tag != -100]
        answered.append([answer for answer, _ in kept])
        wanted.append([tag for _, tag in kept])
    accuracy = accuracy_score([*chain(*wanted)], [*chain(*answered)])
    assert measured(config, "accuracy", logits, labels) == pytest.approx(accuracy)
    assert measured(config, "f1", logits, labels) == pytest.approx(entity_f1(wanted, answered, zero_division=0))


@pytest.mark.parametrize("task", TASKS)
def test_sums_of_parts_give_the_metric_of_all(task):
    config = made_up_config(task)
    shape = (40, 6, 5) if task == "tokens" else (40, config.num_labels)
    logits = random_numbers(0, *shape)
    other = random_numbers(1, *shape)
    labels = task_of(config).predictions(logits + other)
    for name, metric in metrics_of(config).items():
        counts = metric.counts(task_of(config), logits, labels, config)
        assert counts.shape[0] == 40
        sums = torch.stack([counts[:13].sum(0) + counts[13:].sum(0), counts[:13].sum(0)])
        scores = metric.score(sums)
        assert scores.shape == (2,)
        assert scores[0].item() == pytest.approx(measured(config, name, logits, labels))
        assert scores[1].item() == pytest.approx(measured(config, name, logits[:13], labels[:13]))
        assert -1 < scores[0] < 1
