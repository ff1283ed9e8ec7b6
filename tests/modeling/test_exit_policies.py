from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastbert_hf import CascadeConfig, FastBertConfig
from fastbert_hf.modeling.categorical_tasks import SingleLabel
from fastbert_hf.modeling.exit_gates import ExitGates
from fastbert_hf.modeling.exit_policies import (
    ExitPolicy,
    check_speed,
    config_thresholds,
    exit_range,
    exit_thresholds,
    leaves,
    row_speeds,
)
from tests.common import one_label, tiny_text_config


INF = math.inf


def exit_uncertainty(logits: torch.Tensor, name: str, patience: int = 1, state: torch.Tensor | None = None) -> tuple:
    """The uncertainty of one exit's answers, and what the policy remembers."""
    gates = ExitGates(torch.tensor([[0.5, -0.1, 0.2, 0.3, -1.0]])) if name == "learned" else None
    return ExitPolicy(name, one_label(logits.shape[-1]), patience, gates).uncertainty(logits, state)


def exit_uncertainties(exit_logits: torch.Tensor, name: str, patience: int = 1) -> torch.Tensor:
    """Of every exit, `[rows, L]`, from `[rows, L, num_labels]`."""
    state, uncertainties = None, []
    for logits in exit_logits.unbind(1):
        uncertainty, state = exit_uncertainty(logits, name, patience, state)
        uncertainties.append(uncertainty)
    return torch.stack(uncertainties, 1)


def logits_of(*probabilities: float) -> torch.Tensor:
    """One row of logits with these probabilities, shifted so that no softmax can be left out."""
    return torch.tensor([probabilities], dtype=torch.float64).log().float() + 3


def one_hot_logits(num_labels: int) -> torch.Tensor:
    logits = torch.zeros(1, num_labels)
    logits[0, num_labels // 2] = 200.0
    return logits


@pytest.mark.parametrize(
    ("policy", "probabilities", "expected"),
    [
        ("entropy", (0.5, 0.25, 0.25), 1.5 * math.log(2) / math.log(3)),
        ("entropy", (0.9, 0.1), -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)),
        ("entropy", (0.25, 0.25, 0.25, 0.25), 1.0),
        ("confidence", (0.5, 0.3, 0.2), 0.5 * 3 / 2),
        ("confidence", (0.1, 0.9), 0.1 * 2),
        ("margin", (0.5, 0.3, 0.2), 0.8),
        ("margin", (0.1, 0.9), 0.2),
        ("margin", (0.2, 0.4, 0.4), 1.0),
    ],
)
def test_uncertainty_is_the_value_computed_by_hand(policy, probabilities, expected):
    uncertainty, state = exit_uncertainty(logits_of(*probabilities), policy)
    assert uncertainty.item() == pytest.approx(expected, abs=1e-6)
    assert state is None


UNCERTAINTIES = ("entropy", "confidence", "margin")


@pytest.mark.parametrize("policy", UNCERTAINTIES)
def test_an_undecided_text_has_uncertainty_one_and_leaves_at_no_speed(policy):
    for num_labels in (*range(2, 1001), 100_000):
        for rows in (1, 3):
            uncertainty, _ = exit_uncertainty(torch.full((rows, num_labels), 0.7), policy)
            assert uncertainty.tolist() == [1.0] * rows, num_labels
            assert not leaves(uncertainty, row_speeds(1, rows)).any()


@pytest.mark.parametrize("policy", UNCERTAINTIES)
@pytest.mark.parametrize("num_labels", [2, 3, 77, 1000])
def test_uncertainty_is_zero_when_certain(policy, num_labels):
    assert exit_uncertainty(one_hot_logits(num_labels), policy)[0].item() == 0


@pytest.mark.parametrize("policy", UNCERTAINTIES)
@pytest.mark.parametrize("num_labels", [2, 8, 41, 1000])
def test_uncertainty_never_leaves_the_unit_interval(policy, num_labels):
    generator = torch.Generator().manual_seed(num_labels)
    scales = torch.tensor([0.0, 1e-7, 1e-4, 1e-2, 1.0, 30.0, 1e30])  # from undecided to certain
    logits = torch.randn(7, 40, num_labels, generator=generator) * scales[:, None, None]
    logits[:, :5, 0] = -math.inf
    uncertainty, _ = exit_uncertainty(logits.flatten(0, 1), policy)
    assert ((uncertainty >= 0) & (uncertainty <= 1)).all()


@pytest.mark.parametrize("policy", UNCERTAINTIES)
@pytest.mark.parametrize("num_labels", [2, 8, 1000])
def test_uncertainty_of_a_row_is_the_same_alone_and_in_a_record_of_all_exits(policy, num_labels):
    exit_logits = torch.randn(30, 4, num_labels, generator=torch.Generator().manual_seed(0)) * 2
    exit_logits[0] = 0.3
    of_exits, _ = exit_uncertainty(exit_logits[:, 2], policy)
    alone = [exit_uncertainty(row[2:3].clone(), policy)[0] for row in exit_logits]
    assert torch.equal(of_exits, torch.cat(alone))


@pytest.mark.parametrize("policy", UNCERTAINTIES)
def test_uncertainty_of_random_logits_is_in_the_unit_interval_and_ranks_sharper_logits_lower(policy):
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * 3
    uncertainty, sharper = (exit_uncertainty(logits * factor, policy)[0] for factor in (1, 2))
    assert ((uncertainty >= 0) & (uncertainty <= 1)).all()
    assert (sharper < uncertainty).all()


@pytest.mark.parametrize("policy", UNCERTAINTIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_uncertainty_is_computed_in_float32_whatever_the_dtype(policy, dtype):
    logits = (torch.randn(50, 77, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    uncertainty, _ = exit_uncertainty(logits, policy)
    expected, _ = exit_uncertainty(logits.float(), policy)
    assert uncertainty.dtype == torch.float32
    assert torch.equal(uncertainty, expected)


def test_patience_is_float32_for_bfloat16_logits():
    uncertainty, _ = exit_uncertainty(torch.zeros(2, 3, dtype=torch.bfloat16), "patience", 2)
    assert uncertainty.dtype == torch.float32


def test_patience_counts_agreements_in_a_row_and_starts_anew_when_the_label_changes():
    labels = [2, 2, 2, 2, 0, 0, 2]
    exit_logits = torch.nn.functional.one_hot(torch.tensor(labels), 3).float()[None]
    uncertainties = exit_uncertainties(exit_logits, "patience", patience=2)
    assert uncertainties.tolist() == [[1.0, 0.5, 0.0, 0.0, 1.0, 0.5, 1.0]]


def test_patience_keeps_a_count_for_every_row():
    first, second = torch.eye(3)[[0, 1, 2]], torch.eye(3)[[0, 2, 2]]
    uncertainty, state = exit_uncertainty(first, "patience", 4)
    assert uncertainty.tolist() == [1, 1, 1]
    assert state.tolist() == [[[0, 0]], [[1, 0]], [[2, 0]]]
    uncertainty, state = exit_uncertainty(second, "patience", 4, state)
    assert uncertainty.tolist() == [0.75, 1, 0.75]
    assert state.tolist() == [[[0, 1]], [[2, 0]], [[2, 1]]]
    uncertainty, state = exit_uncertainty(second[[2, 0]], "patience", 4, state[[2, 0]])
    assert uncertainty.tolist() == [0.5, 0.5]
    assert state.tolist() == [[[2, 2]], [[0, 2]]]


@pytest.mark.parametrize("patience", range(1, 13))
def test_patience_is_below_its_speed_exactly_from_the_agreements_that_the_speed_asks_for(patience):
    uncertainties = exit_uncertainties(torch.eye(3)[[1] * (patience + 2)][None], "patience", patience)
    for needed in range(1, patience + 1):
        speed = row_speeds((patience - needed + 1) / patience, 1)
        below = leaves(uncertainties[0], speed.expand(patience + 2))
        assert below.tolist() == [False] * needed + [True] * (patience + 2 - needed)


def test_patience_remembers_nothing_of_rows_that_an_exit_may_not_answer():
    policy = ExitPolicy("patience", one_label(), 4)
    state = policy.start(2)
    for asked in ([True, True], [True, False], [True, True]):
        uncertainty, state = policy.uncertainty(torch.eye(3)[[1, 1]], state, torch.tensor(asked))
    assert uncertainty.tolist() == [0.5, 0.75]


@pytest.mark.parametrize("policy", SingleLabel.policies())
@pytest.mark.parametrize("bad", [[math.nan, 0.0, 1.0], [0.0, math.nan, math.nan], [math.inf, 0.0, 1.0]])
def test_uncertainty_of_logits_that_are_not_finite_is_nan_and_below_no_speed(policy, bad):
    exit_logits = torch.stack([torch.tensor([bad, [9.0, 0.0, 0.0]])] * 3, 1)  # [2, 3, 3]
    uncertainties = exit_uncertainties(exit_logits, policy, patience=2)
    assert uncertainties[0].isnan().all()
    assert uncertainties[1].isfinite().all()
    assert not leaves(uncertainties, torch.ones(2, 3))[0].any()
    assert leaves(uncertainties, torch.ones(2, 3))[1].any()


def test_unknown_policy_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'vote' is not known.*entropy, confidence, margin, patience"):
        exit_uncertainty(torch.zeros(1, 2), "vote")


def test_a_text_leaves_strictly_below_its_threshold():
    uncertainty = torch.tensor([0.49, 0.5, 0.51, 0.0, 1.0, 1.0])
    threshold = torch.tensor([0.5, 0.5, 0.5, 0.0, 1.0, INF])
    for at_end in (False, True):
        assert leaves(uncertainty, threshold, at_end).tolist() == [True, False, False, False, False, True]


def test_nan_leaves_only_where_no_other_exit_answers():
    uncertainty, threshold = torch.full((3,), math.nan), torch.tensor([0.0, 1.0, INF])
    assert leaves(uncertainty, threshold).tolist() == [False, False, False]
    assert leaves(uncertainty, threshold, at_end=True).tolist() == [True, True, True]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, [[0.5, 0.5, 0.5, INF], [0, 0, 0, INF]]),
        ({"min_exit_layer": 3}, [[0, 0, 0.5, INF], [0, 0, 0, INF]]),
        ({"max_layers": 2}, [[0.5, INF, 0, 0], [0, INF, 0, 0]]),
        ({"min_exit_layer": 2, "max_layers": 2}, [[0, INF, 0, 0]] * 2),
        ({"is_last_member": False}, [[0.5] * 4, [0] * 4]),
        ({"is_last_member": False, "min_exit_layer": 4}, [[0, 0, 0, 0.5], [0] * 4]),
        ({"is_last_member": False, "max_layers": 3}, [[0.5, 0.5, 0.5, 0], [0] * 4]),
    ],
)
def test_thresholds_say_which_exit_may_answer_and_which_answers_all(limits, expected):
    thresholds = exit_thresholds(torch.tensor([0.5, 0.0]), 4, **limits)
    assert thresholds.dtype == torch.float32
    assert thresholds.tolist() == expected


def test_thresholds_of_a_config_are_those_of_every_member():
    limits = [{"min_exit_layer": 4}, {"min_exit_layer": 2, "max_layers": 3}]
    small, large = (FastBertConfig(text_config=tiny_text_config("bert"), num_labels=3, **own) for own in limits)
    speeds = torch.tensor([0.25, 0.0])
    of_small, of_large = config_thresholds(CascadeConfig(members=[small, large]), speeds)
    assert of_small.tolist() == [[0, 0, 0, 0.25], [0] * 4]
    assert of_large[:, :3].tolist() == [[0, 0.25, INF], [0, 0, INF]]
    (alone,) = config_thresholds(small, speeds)
    assert alone.tolist() == [[0, 0, 0, INF]] * 2


@pytest.mark.parametrize(
    "speed", [math.nan, math.inf, -math.inf, -0.1, 1.1, True, False, "0.5", None, [0.5], 0.5j, torch.tensor(0.5)]
)
def test_check_speed_refuses_what_is_no_number_in_the_unit_interval(speed):
    with pytest.raises(ValueError, match=r"speed must be a number in \[0, 1\], got"):
        check_speed(speed)


@pytest.mark.parametrize("speed", [0, 1, 0.0, 1.0, 0.3, np.float32(0.3), np.float64(0.3), np.int64(1)])
def test_check_speed_accepts_numbers_in_the_unit_interval(speed):
    assert check_speed(speed) is None


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        (None, [0, 0, 0]),
        (0.25, [0.25, 0.25, 0.25]),
        (1, [1, 1, 1]),
        (np.float32(0.25), [0.25, 0.25, 0.25]),
        (torch.tensor(0.25), [0.25, 0.25, 0.25]),
        ([0, 0.5, 1], [0, 0.5, 1]),
        ((0, 0.5, 1), [0, 0.5, 1]),
        (torch.tensor([0.0, 0.5, 1.0]), [0, 0.5, 1]),
        (torch.tensor([0.0, 0.5, 1.0], dtype=torch.bfloat16), [0, 0.5, 1]),
        (np.array([0.0, 0.5, 1.0]), [0, 0.5, 1]),
        (np.array([0, 1, 1]), [0, 1, 1]),
    ],
)
def test_row_speeds_gives_every_row_its_speed(speed, expected):
    speeds = row_speeds(speed, 3)
    assert speeds.tolist() == expected
    assert speeds.dtype == torch.float32
    assert speeds.device.type == "cpu"


@pytest.mark.parametrize("speed", [[0.5], [0.5] * 4, [], torch.tensor([0.5]), np.zeros(4)])
def test_row_speeds_refuses_a_wrong_number_of_speeds(speed):
    with pytest.raises(ValueError, match=rf"got {len(speed)} speeds for a batch of 3 rows"):
        row_speeds(speed, 3)


@pytest.mark.parametrize(
    "speed",
    [
        [0.5, math.nan, 0.5],
        [0.5, 0.5, 1.5],
        [True, 0.5, 0.5],
        [0.5, None, 0.5],
        ["0.5", 0.5, 0.5],
        torch.tensor([0.5, math.inf, 0.5]),
        torch.tensor([True, False, True]),
        torch.full((3, 1), 0.5),
        np.array([0.5, -0.5, 0.5]),
        "0.5",
        torch.tensor(math.nan),
        np.bool_(True),
        {"speed": 0.5},
    ],
)
def test_row_speeds_refuses_a_bad_speed_in_any_row(speed):
    with pytest.raises(ValueError, match=r"speed must be a number in \[0, 1\], got"):
        row_speeds(speed, 3)


@pytest.mark.parametrize("name", ["min_exit_layer", "max_layers"])
@pytest.mark.parametrize("value", [0, -1, 5, True, False, 1.5, 2.0, "2", math.nan, [2]])
def test_exit_range_refuses_what_is_no_number_of_layers(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a whole number from 1 to 4"):
        exit_range(4, **{name: value})


@pytest.mark.parametrize(
    ("min_exit_layer", "max_layers", "expected"),
    [(None, None, [1, 2, 3, 4]), (1, 4, [1, 2, 3, 4]), (2, None, [2, 3, 4]), (None, np.int64(2), [1, 2]), (3, 3, [3])],
)
def test_exit_range_holds_the_layers_that_may_answer(min_exit_layer, max_layers, expected):
    assert list(exit_range(4, min_exit_layer, max_layers)) == expected


def test_exit_range_refuses_a_first_exit_after_the_last():
    with pytest.raises(ValueError, match="min_exit_layer=3 is beyond max_layers=2"):
        exit_range(4, 3, 2)
