"""What a replay of recorded exits says, against the answers that the models themselves give."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithPadding, pipeline

from fastbert_hf import CascadeForSequenceClassification, FastBertForSequenceClassification
from fastbert_hf.evaluation import (
    ExitRecord,
    Replay,
    executed_flops,
    exit_uncertainties,
    record_exits,
    replay,
    replay_at_speed,
)
from fastbert_hf.modeling.exit_policies import ExitPolicy, exit_thresholds
from fastbert_hf.modeling.tasks import task_of

from ..common import NUM_LAYERS, assert_close, random_gates, stock, tiny_model, tiny_texts, tiny_tokenizer


NUM_TEXTS = 12
SPEEDS = st.one_of(st.just(0.0), st.integers(0, 100).map(lambda hundredths: hundredths / 100))
LIMITS = st.sampled_from([(None, None), (2, None), (None, 3), (2, 3), (3, 3), (4, 4), (None, 1), (1, 2)])


def encoded() -> list[dict]:
    return [dict(tiny_tokenizer()(text)) for text in tiny_texts(NUM_TEXTS)]


def recorded(model) -> ExitRecord:
    return record_exits(model, encoded(), DataCollatorWithPadding(tiny_tokenizer()), progress=False)


@cache
def single(seed: int) -> tuple[FastBertForSequenceClassification, ExitRecord]:
    model = tiny_model(("bert", "modernbert", "electra")[seed % 3], seed, exit_type=("attention", "linear")[seed % 2])
    return model, recorded(model)


@cache
def cascade(seed: int) -> tuple[CascadeForSequenceClassification, ExitRecord]:
    """Two or three members; texts can leave early in some of them."""
    parts = [stock(num_layers=1 + seed % 2, seed=seed), tiny_model(seed=seed), tiny_model("electra", seed + 1)]
    model = CascadeForSequenceClassification.from_members(
        parts if seed % 3 else parts[1:], [tiny_tokenizer()] * (3 if seed % 3 else 2)
    )
    return model, recorded(model)


def far_from_a_tie(record: ExitRecord, policy: ExitPolicy, speeds: torch.Tensor) -> bool:
    """Whether no text leaves or stays by rounding alone. Agreements are whole numbers, which do not round."""
    if policy.name == "patience":
        return True
    return bool(((exit_uncertainties(record, policy) - speeds[:, None]).abs() > 1e-5).all())


def assert_same_answers(replayed: Replay, answers: list, policy: ExitPolicy) -> None:
    logits = torch.stack([answer.logits for answer in answers])
    assert replayed.exit_layer.tolist() == [answer.exit_layer for answer in answers]
    assert replayed.exit_member.tolist() == [answer.exit_member or 1 for answer in answers]
    assert torch.equal(policy.task.predictions(replayed.logits), policy.task.predictions(logits))
    assert_close(replayed.logits, logits)
    assert_close(replayed.uncertainty, torch.tensor([answer.uncertainty for answer in answers]))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 5),
    name=st.sampled_from(["entropy", "confidence", "margin", "patience", "learned"]),
    patience=st.integers(1, 3),
    limits=LIMITS,
    speeds=st.one_of(SPEEDS, st.lists(SPEEDS, min_size=NUM_TEXTS, max_size=NUM_TEXTS)),
)
def test_a_replay_says_what_a_model_answers(seed, name, patience, limits, speeds):
    (model, record), (first, last) = single(seed), limits
    model.config.gates = random_gates(seed, NUM_LAYERS)
    model.config.exit_policy, model.config.patience = name, patience
    policy = ExitPolicy.of(model.config)
    of_rows = torch.tensor(speeds).expand(NUM_TEXTS)
    assume(far_from_a_tie(record, policy, of_rows))
    replayed = replay(record, exit_thresholds(of_rows, NUM_LAYERS, first, last), policy)
    answers = list(model.predict(encoded(), speed=speeds, min_exit_layer=first, max_layers=last))
    assert_same_answers(replayed, answers, policy)
    lengths = torch.tensor([len(row["input_ids"]) for row in encoded()])
    costs = [executed_flops(model, replayed.exit_layer, lengths, students, first or 1) for students in (False, True)]
    assert torch.equal(replayed.flops, torch.where(of_rows > 0, costs[1], costs[0]))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 5),
    name=st.sampled_from(["entropy", "confidence", "margin", "learned"]),
    limits=st.tuples(LIMITS, LIMITS),
    speeds=st.one_of(SPEEDS, st.lists(SPEEDS, min_size=NUM_TEXTS, max_size=NUM_TEXTS)),
)
def test_a_replay_says_what_a_cascade_answers(seed, name, limits, speeds):
    model, record = cascade(seed)
    model.config.gates = random_gates(seed, model.config.num_hidden_layers)
    model.config.exit_policy = name
    for member, (first, last) in zip(model.members[-2:], limits, strict=True):
        member.config.min_exit_layer, member.config.max_layers = first, last
    policy = ExitPolicy.of(model.config)
    assume(far_from_a_tie(record, policy, torch.tensor(speeds).expand(NUM_TEXTS)))
    answers = list(model.predict(encoded(), speed=speeds))
    assert_same_answers(replay_at_speed(record, model.config, speeds), answers, policy)


@pytest.mark.parametrize("policy", ["entropy", "patience"])
@pytest.mark.parametrize("limits", [{"min_exit_layer": 3}, {"max_layers": 2}, {"min_exit_layer": 2, "max_layers": 3}])
def test_a_replay_keeps_to_the_limits_of_the_config_as_the_pipeline_does(policy, limits):
    model = tiny_model(seed=2, exit_policy=policy, **limits)
    record = recorded(model)
    classifier = pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer())
    for speed in (0.0, 0.8, 1.0):
        layers = [answer["exit_layer"] for answer in classifier(tiny_texts(NUM_TEXTS), speed=speed)]
        assert replay_at_speed(record, model.config, speed).exit_layer.tolist() == layers


# Of one label, of equal ones, and broken.
SURE, UNSURE, BROKEN = [9.0, 0.0], [1.0, 1.0], [float("nan"), 0.0]


def by_hand(exit_logits: list, thresholds: list, members: tuple[int, ...] = (), policy: str = "entropy") -> Replay:
    """A layer costs its number and an exit ten times as much; members begin with number 1 again."""
    exit_logits = torch.tensor(exit_logits)
    rows, exits = exit_logits.shape[:2]
    numbers = torch.cat([torch.arange(1, layers + 1) for layers in members or (exits,)]).expand(rows, -1)
    record = ExitRecord(exit_logits, numbers, 10 * numbers, member_layers=members)
    return replay(record, torch.tensor(thresholds), ExitPolicy(policy, task_of(tiny_model().config)))


INF = float("inf")


def test_every_exit_of_every_row_has_a_threshold_of_its_own():
    replayed = by_hand(
        [[SURE, UNSURE, SURE], [SURE, UNSURE, UNSURE], [SURE, SURE, SURE]],
        [[0.0, 0.5, INF], [0.5, 0.5, INF], [0.0, INF, INF]],
    )
    assert replayed.exit_layer.tolist() == [3, 1, 2]
    # All three layers and the last two exits; one of each; two layers and the second exit.
    assert replayed.flops.tolist() == [1 + 2 + 3 + 20 + 30, 1 + 10, 1 + 2 + 20]
    assert replayed.exits_run.tolist() == [[False, True, True], [True, False, False], [False, True, False]]


def test_a_member_runs_up_to_the_last_exit_that_may_answer_and_not_at_all_if_none_may():
    replayed = by_hand(
        [[UNSURE] * 5, [SURE] * 5, [UNSURE, UNSURE, UNSURE, SURE, SURE]],
        [[0.5, 0.5, 0.0, 0.5, INF], [0.0, 0.0, 0.0, 0.0, INF], [0.0, 0.5, 0.0, 0.5, INF]],
        members=(3, 2),
    )
    assert replayed.exit_layer.tolist() == [2 + 2, 2, 2 + 1]
    assert replayed.exit_member.tolist() == [2, 2, 2]
    assert replayed.flops.tolist() == [1 + 2 + 10 + 20 + 1 + 2 + 10 + 20, 1 + 2 + 20, 1 + 2 + 20 + 1 + 10]


def test_patience_counts_exits_that_may_answer_and_begins_anew_in_each_member():
    thresholds = [[0.5, 0.0, 0.5, INF], [0.5, 0.5, 0.0, INF]]
    assert by_hand([[SURE] * 4] * 2, thresholds, (2, 2), "patience").exit_layer.tolist() == [1 + 2, 2]
    assert by_hand([[SURE] * 4] * 2, thresholds, (4,), "patience").exit_layer.tolist() == [3, 2]


def test_broken_logits_leave_where_their_member_ends():
    replayed = by_hand([[BROKEN, BROKEN, SURE]] * 2, [[0.5, 0.5, INF], [0.0, 0.0, INF]], members=(2, 1))
    assert replayed.exit_layer.tolist() == [2, 1]
    assert replayed.exit_member.tolist() == [1, 2]
    assert replayed.uncertainty.isnan().tolist() == [True, False]
    # The exit of the first layer may not answer, so its broken logits do not matter.
    assert by_hand([[BROKEN, SURE]], [[0.0, INF]]).exit_layer.tolist() == [2]


def test_a_record_without_costs_has_no_flops():
    model = tiny_model()
    record = ExitRecord(torch.randn(5, NUM_LAYERS, 3))
    assert replay_at_speed(record, model.config, 0.5).flops is None


def test_a_row_that_no_exit_answers_is_refused():
    with pytest.raises(
        ValueError, match=r"no exit answers row 1, whose thresholds are \[0.5, 0.5\]: give .* infinity"
    ):
        by_hand([[SURE, SURE], [UNSURE, UNSURE]], [[0.5, 0.5], [0.5, 0.5]])


def test_thresholds_of_other_exits_are_refused():
    with pytest.raises(ValueError, match=r"thresholds must be \[rows, L\] = \[1, 2\], .* got \[1, 3\]"):
        by_hand([[SURE, SURE]], [[0.5, 0.5, INF]])


@pytest.mark.parametrize("shape", [(5, 2, 3), (5, NUM_LAYERS + 1, 3)])
def test_the_record_of_another_model_is_refused(shape):
    with pytest.raises(ValueError, match=f"the record has {shape[1]} exits and the model {NUM_LAYERS}"):
        replay_at_speed(ExitRecord(torch.randn(shape)), tiny_model().config, 0.5)


def test_the_record_of_members_in_another_order_is_refused():
    members = [stock(num_layers=1), stock(num_layers=2)]
    model = CascadeForSequenceClassification.from_members(members, [tiny_tokenizer()] * 2)
    with pytest.raises(ValueError, match=r"the record has 2 \+ 1 exits and the model 1 \+ 2"):
        replay_at_speed(ExitRecord(torch.randn(5, 3, 3), member_layers=(2, 1)), model.config, 0.5)


@pytest.mark.parametrize(
    ("speed", "message"),
    [(1.5, r"speed must be a number in \[0, 1\], got 1.5"), ([0.5], "got 1 speeds for a batch of 5")],
)
def test_speeds_that_are_none_are_refused(speed, message):
    with pytest.raises(ValueError, match=message):
        replay_at_speed(ExitRecord(torch.randn(5, NUM_LAYERS, 3)), tiny_model().config, speed)
