"""The speed that is chosen, against every speed there is, one by one."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn
from transformers import PreTrainedModel, pipeline

import fastbert_hf
from fastbert_hf import CascadeForSequenceClassification, CascadeProcessor, choose_speed
from fastbert_hf.evaluation import (
    ExitRecord,
    Replay,
    SpeedChoice,
    exit_uncertainties,
    record_exits,
    replay_at_speed,
    sweep_speeds,
)
from fastbert_hf.evaluation.speed_choice import between
from fastbert_hf.evaluation.task_metrics import METRICS
from fastbert_hf.modeling.exit_policies import ExitPolicy

from ..common import one_label, other_tokenizer, stock, tiny_model, tiny_texts, tiny_tokenizer


NUM_TEXTS = 12
# From gold labels, answers and the number of labels to a number, as scikit-learn has them.
SCORES = {
    "accuracy": lambda labels, answers, num_labels: accuracy_score(labels, answers),
    "f1": lambda labels, answers, num_labels: f1_score(
        labels, answers, average="binary" if num_labels == 2 else "macro", zero_division=0
    ),
    "matthews_correlation": lambda labels, answers, num_labels: matthews_corrcoef(labels, answers),
}
LIMITS = ({}, {"min_exit_layer": 2}, {"max_layers": 3}, {"min_exit_layer": 2, "max_layers": 3})


def model_with_exits(*arguments, **config) -> PreTrainedModel:
    """A model whose exits cost far less than its layers, as those of real ones."""
    return tiny_model(*arguments, exit_type="linear", **config)


def raw_rows(number: int = NUM_TEXTS) -> list[dict]:
    return [{"text": text, "label": row % 2} for row, text in enumerate(tiny_texts(number))]


@cache
def recorded(kind: str, num_labels: int) -> tuple[PreTrainedModel, ExitRecord]:
    """A model and the record of texts whose gold labels are mostly what it says."""
    model = model_with_exits(num_labels=num_labels)
    if kind == "cascade":
        members = [model, model_with_exits("electra", 2, num_labels)]
        model = CascadeForSequenceClassification.from_members(members, [tiny_tokenizer()] * 2)
    record = record_exits(model, raw_rows(), progress=False, tokenizer=tiny_tokenizer())
    gold = record.exit_logits[:, -1].argmax(-1)
    return model, replace(record, labels=torch.where(torch.arange(NUM_TEXTS) % 5 == 0, record.labels, gold))


def every_speed(record: ExitRecord, policy: ExitPolicy) -> list[float]:
    """0, 1, and a speed between each two neighbouring uncertainties."""
    edges = np.unique([0.0, *exit_uncertainties(record, policy).double().flatten().tolist(), 1.0])
    return [0.0, *((edges[1:] + edges[:-1]) / 2).tolist(), 1.0]


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["model", "cascade"]),
    policy=st.sampled_from(["entropy", "confidence", "margin", "patience"]),
    metric=st.sampled_from(["accuracy", "f1", "matthews_correlation", "agreement"]),
    num_labels=st.sampled_from([2, 3]),
    limits=st.sampled_from(LIMITS),
    max_loss=st.sampled_from([0.0, 0.5, 10.0, 20.0, 40.0, 1000.0]),
    has_costs=st.booleans(),
)
def test_no_speed_is_faster_that_loses_as_little(kind, policy, metric, num_labels, limits, max_loss, has_costs):
    model, record = recorded(kind, num_labels)
    model.config.exit_policy = "margin" if kind == "cascade" and policy == "patience" else policy
    for config in model.config.members if kind == "cascade" else [model.config]:
        config.min_exit_layer, config.max_layers = limits.get("min_exit_layer"), limits.get("max_layers")
    record = record if has_costs else replace(record, layer_flops=None, exit_flops=None)
    choice = choose_speed(model, record, max_loss, metric=metric)
    assert model.config.speed == choice.speed

    speeds = [*every_speed(record, ExitPolicy.of(model.config)), choice.speed]
    replays = [replay_at_speed(record, model.config, speed) for speed in speeds]
    gold = replays[0].logits.argmax(-1) if metric == "agreement" else record.labels

    def score(replayed: Replay) -> float:
        answers = replayed.logits.argmax(-1)
        return SCORES["accuracy" if metric == "agreement" else metric](gold, answers, num_labels)

    losses = 100 * (score(replays[0]) - np.array(list(map(score, replays))))
    costs = [(replayed.flops if has_costs else replayed.exit_layer).sum().item() for replayed in replays]
    assert losses[-1] <= max_loss + 1e-6
    assert costs[-1] == min(np.array(costs)[losses <= max_loss + 1e-6])

    full, chosen = replays[0], replays[-1]
    assert choice == SpeedChoice(
        speed=speeds[-1],
        metric=metric,
        score=pytest.approx(score(chosen)),
        full_score=pytest.approx(score(full)),
        loss=pytest.approx(losses[-1], abs=1e-9),
        agreement=pytest.approx((chosen.logits.argmax(-1) == full.logits.argmax(-1)).double().mean().item()),
        mean_exit_layer=pytest.approx(chosen.exit_layer.double().mean().item()),
        layer_speed_up=pytest.approx((full.exit_layer.sum() / chosen.exit_layer.sum()).item()),
        executed_speed_up=pytest.approx(costs[0] / costs[-1]) if has_costs else None,
        rows=NUM_TEXTS,
    )


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12),
    num_labels=st.integers(2, 4),
    metric=st.sampled_from(list(SCORES)),
)
def test_metrics_of_sums_are_those_of_the_answers(pairs, num_labels, metric):
    labels, answers = torch.tensor(pairs).clamp(max=num_labels - 1).unbind(1)
    own, logits = METRICS["single_label_classification"][metric], nn.functional.one_hot(answers, num_labels).float()
    value = own.score(own.counts(one_label(num_labels), logits, labels, None).sum(0)).item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single label
        assert value == pytest.approx(SCORES[metric](labels, answers, num_labels))


def test_the_pipeline_answers_at_the_chosen_speed():
    model, tokenizer = model_with_exits(min_exit_layer=2), tiny_tokenizer()
    choice = fastbert_hf.choose_speed(model, raw_rows(), max_loss=30, tokenizer=tokenizer, progress=False)
    answers = pipeline("fast-text-classification", model=model, tokenizer=tokenizer)(tiny_texts(NUM_TEXTS))
    assert np.mean([answer["exit_layer"] for answer in answers]) == choice.mean_exit_layer
    right = [answer["label"] == f"LABEL_{row['label']}" for answer, row in zip(answers, raw_rows(), strict=True)]
    assert np.mean(right) == pytest.approx(choice.score)
    assert choice.layer_speed_up > 1 and (choice.metric, choice.rows) == ("accuracy", NUM_TEXTS)


def test_a_grid_of_speeds_cannot_do_better():
    model = model_with_exits()
    record = record_exits(model, raw_rows(), progress=False, tokenizer=tiny_tokenizer())
    for max_loss in (0.0, 5.0, 10.0):
        choice = choose_speed(model, record, max_loss)
        table = sweep_speeds(model, record)
        kept = table[100 * (table["accuracy"][0] - table["accuracy"]) <= max_loss + 1e-9]
        assert choice.executed_speed_up >= kept["executed_speed_up"].max() - 1e-9


@pytest.mark.parametrize(
    ("rows", "tokenizer"),
    [
        (raw_rows(), tiny_tokenizer()),
        (Dataset.from_list(raw_rows()), tiny_tokenizer()),
        ([{**tiny_tokenizer()(row["text"]), "labels": row["label"]} for row in raw_rows()], None),
    ],
)
def test_rows_are_taken_as_records_take_them(rows, tokenizer):
    model = model_with_exits()
    expected = choose_speed(model, record_exits(model, raw_rows(), progress=False, tokenizer=tiny_tokenizer()), 10)
    assert choose_speed(model, rows, 10, tokenizer, progress=False) == expected


def test_texts_without_labels_are_compared_with_the_full_model():
    model = model_with_exits()
    choice = choose_speed(model, tiny_texts(NUM_TEXTS), 50, tiny_tokenizer(), progress=False)
    assert choice.metric == "agreement" and choice.score == choice.agreement >= 0.5
    assert choice.full_score == 1 and 0 < choice.speed == model.config.speed


def test_a_cascade_with_a_tokenizer_for_each_member_takes_its_processor():
    tokenizers = [tiny_tokenizer(), other_tokenizer()]
    cascade = CascadeForSequenceClassification.from_members([stock(num_layers=1), stock(seed=2)], tokenizers)
    choice = choose_speed(cascade, raw_rows(), 1000, CascadeProcessor(tokenizers), progress=False)
    assert cascade.config.speed == choice.speed > 0
    assert choice.mean_exit_layer < 2


def by_hand(uncertainties: list[list[float]], right: list[list[bool]]) -> tuple[ExitRecord, PreTrainedModel]:
    """A record of two labels, label 1 being right, with these uncertainties by the policy `margin`."""
    answers, sure = torch.tensor(right).long(), 1 - torch.tensor(uncertainties)
    probabilities = torch.stack([(1 - sure) / 2, (1 + sure) / 2], -1)
    probabilities = torch.where(answers[..., None] == 1, probabilities, probabilities.flip(-1))
    model = tiny_model(num_labels=2, exit_policy="margin")
    return ExitRecord(probabilities.log(), labels=torch.ones(len(answers), dtype=torch.long)), model


def test_the_speed_has_no_more_decimals_than_it_needs_and_keeps_off_the_edges():
    record, model = by_hand([[0.1, 0.1, 0.1, 0.1], [0.7, 0.7, 0.7, 0.1]], [[True] * 4, [False, False, False, True]])
    # Above 0.7 the second text goes wrong, above 0.1 the first one leaves.
    assert choose_speed(model, record).speed == 0.4
    record, model = by_hand([[0.99999] * 4], [[True] * 4])
    assert choose_speed(model, record).speed == 1
    record, model = by_hand([[0.2, 0.2, 0.2, 0.1], [0.2004, 0.7, 0.7, 0.1]], [[True] * 4, [False, True, True, True]])
    assert choose_speed(model, record).speed == 0.2002


@settings(max_examples=200, deadline=None)
@given(edges=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2, unique=True), near=st.booleans())
def test_a_speedbetween_two_edges_liesbetween_them_as_the_model_compares(edges, near):
    lower, upper = sorted(edges)
    upper = float(np.nextafter(np.float32(lower), np.float32(1))) if near else upper
    assert lower < float(np.float32(between(lower, upper))) <= upper


def test_a_text_that_is_sure_of_itself_leaves_at_any_speed_above_0():
    """Of a cascade, with as many layers as at speed 0, but cheaper ones."""
    cascade = CascadeForSequenceClassification.from_members([stock(num_layers=2), tiny_model()], exit_policy="margin")
    unsure, sure, wrong = [0.0, 0.1, 0.0], [0.0, 200.0, 0.0], [0.1, 0.0, 0.0]
    record = ExitRecord(
        torch.tensor([[wrong, wrong, unsure, sure, sure, sure]]),
        layer_flops=torch.tensor([[1, 1, 9, 9, 9, 9]]),
        exit_flops=torch.ones(1, 6, dtype=torch.long),
        labels=torch.tensor([1]),
        member_layers=(2, 4),
    )
    choice = choose_speed(cascade, record)
    assert 0 < choice.speed and choice.mean_exit_layer == 4
    assert choice.executed_speed_up == (4 * 9 + 1) / (2 + 1 + 2 * 9 + 2)


def test_speed_0_is_chosen_where_every_other_loses_too_much():
    record, model = by_hand([[0.5, 0.5, 0.5, 0.1]] * 2, [[False, False, False, True]] * 2)
    choice = choose_speed(model, record)
    assert (choice.speed, model.config.speed, choice.loss, choice.layer_speed_up) == (0, 0, 0, 1)


def test_a_loss_of_exactly_as_much_is_allowed():
    uncertainties = [[0.1] * 4] + [[0.5, 0.5, 0.5, 0.1]] * 199
    record, model = by_hand(uncertainties, [[False, False, False, True]] + [[True] * 4] * 199)
    assert choose_speed(model, record, 0.5).mean_exit_layer == 1
    assert choose_speed(model, record, 0.4999).speed == 0


def test_broken_logits_are_refused_by_their_rows():
    record, model = by_hand([[0.5] * 4] * 3, [[True] * 4] * 3)
    record.exit_logits[1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the logits of rows \[1\] are not finite"):
        choose_speed(model, record)
    model.config.max_layers = 2  # which no text goes beyond
    assert choose_speed(model, record).mean_exit_layer == 1


@pytest.mark.parametrize("kind", ["model", "cascade"])
def test_students_of_another_teacher_are_refused(kind):
    model = tiny_model(distilled_for=f"float32:{'0' * 16}")
    model = CascadeForSequenceClassification.from_members([model, tiny_model()]) if kind == "cascade" else model
    with pytest.raises(ValueError, match="trained after the students"):
        choose_speed(model, ["word7"], tokenizer=tiny_tokenizer(), progress=False)
    assert model.config.speed == 0.5


def test_a_stock_model_is_refused():
    with pytest.raises(TypeError, match=r"one with exits, got BertFor.*FastBertForSequenceClassification\.from_cl"):
        choose_speed(stock(), ["word7"], tokenizer=tiny_tokenizer(), progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_loss": -1}, r"max_loss must be a number of points, at least 0, got -1\. Example: max_loss=0.5"),
        ({"max_loss": float("nan")}, "max_loss must be a number"),
        ({"max_loss": "0.5"}, "max_loss must be a number"),
        ({"max_loss": True}, "max_loss must be a number"),
        ({"metric": "bleu"}, "metric='bleu' is not known; choose one of agreement, accuracy, f1"),
        ({"metric": "f1"}, "the data has no labels, which f1 needs: give some, or metric='agreement'"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused(arguments, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        choose_speed(model, ExitRecord(torch.randn(4, 4, 3)), **arguments)
    assert model.config.speed == 0.5
