"""A forward with a speed against an oracle of a few lines: the exits at full depth, in NumPy, one row at a time."""

from __future__ import annotations

import copy
import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.common import FAMILIES, NUM_LAYERS, assert_close, reference_exit_logits, tiny_model, tiny_stock_model

from .oracle import (
    POLICIES,
    SPEEDS,
    assert_answers_are_the_oracles,
    decisive_model,
    full_depth,
    oracle_uncertainties,
    texts,
)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *(("bert", {"exit_policy": policy}) for policy in POLICIES),
        ("bert", {"exit_type": "linear", "share_exit_pooler": True}),
        ("bert", {"teacher_exit_type": "linear", "share_exit_pooler": True, "exit_policy": "confidence"}),
        ("roberta", {"share_exit_pooler": True, "num_labels": 2, "exit_policy": "margin"}),
        ("modernbert", {"exit_type": "linear", "num_labels": 7, "exit_policy": "patience"}),
    ],
)
def test_every_row_leaves_at_the_first_exit_below_its_speed(family, config):
    model = decisive_model(family, **config)
    taken = []
    for number in (1, 7, 64):
        taken += assert_answers_are_the_oracles(model, texts(number, family), SPEEDS)
    assert len(set(taken)) >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_leaves_at_the_first_exit_below_its_speed(family):
    model = decisive_model(family)
    taken = assert_answers_are_the_oracles(model, texts(20, family, 30), SPEEDS[::2])
    assert len(set(taken)) >= 3


@pytest.mark.parametrize(
    ("policy", "as_given"), list(zip(POLICIES, (list, tuple, np.array, torch.tensor), strict=True))
)
def test_every_row_leaves_at_its_own_speed(policy, as_given):
    model = decisive_model(exit_policy=policy)
    speeds = [SPEEDS[row % len(SPEEDS)] for row in range(32)]
    taken = assert_answers_are_the_oracles(model, texts(32), [as_given(speeds)])
    assert len(set(taken)) >= 3


@pytest.mark.parametrize(
    ("policy", "limits"),
    [
        ("entropy", {"max_layers": 1}),
        ("entropy", {"min_exit_layer": 3}),
        ("confidence", {"max_layers": 2}),
        ("margin", {"min_exit_layer": 2, "max_layers": 3}),
        ("patience", {"max_layers": 3}),
        ("patience", {"min_exit_layer": 2}),
        ("patience", {"min_exit_layer": NUM_LAYERS}),
    ],
)
def test_no_row_leaves_before_min_exit_layer_or_after_max_layers(policy, limits):
    model = decisive_model(exit_policy=policy)
    speeds = (None, 0, 0.3, 0.7, 1.0, [SPEEDS[row % len(SPEEDS)] for row in range(32)])
    taken = assert_answers_are_the_oracles(model, texts(32), speeds, **limits)
    assert max(taken) == limits.get("max_layers", NUM_LAYERS)


@pytest.mark.parametrize("patience", [1, 3, 5])
def test_patience_of_any_length_follows_its_definition(patience):
    model = decisive_model(exit_policy="patience", patience=patience, num_labels=2)
    speeds = sorted({*SPEEDS, *(agreements / patience for agreements in range(patience + 1))})
    taken = assert_answers_are_the_oracles(model, texts(32), speeds)
    assert len(set(taken)) >= 3


@pytest.mark.parametrize("as_given", [np.float32, np.float64, torch.tensor])
def test_speed_may_be_any_kind_of_number(as_given):
    model, batch = decisive_model(), texts(16)
    taken = assert_answers_are_the_oracles(model, batch, [as_given(0.5)])
    assert len(set(taken)) >= 2


def test_full_depth_outputs_answer_with_the_last_exit():
    model, batch = decisive_model(), texts(16)
    full = full_depth(model, batch)
    assert full.exit_logits.shape == (16, NUM_LAYERS, 3)
    assert torch.equal(full.exit_logits[:, -1], full.logits)
    assert full.exit_layer.tolist() == [NUM_LAYERS] * 16
    expected = oracle_uncertainties(model, full.exit_logits)[:, -1]
    assert_close(full.uncertainty.double(), torch.tensor(expected))


@pytest.mark.parametrize(
    ("family", "exit_type"), [*zip(FAMILIES, itertools.cycle(("attention", "linear"))), ("bert", "linear_mean")]
)
@torch.no_grad()
def test_exit_logits_equal_each_exit_by_hand_on_the_stock_encoder_text_by_text(family, exit_type):
    stock = tiny_stock_model(family)
    model = tiny_model(family, exit_type=exit_type)
    model.fastbert.backbone.load_state_dict(stock.state_dict(), strict=False)
    batch = texts(6, family, 20)
    exit_logits, logits = full_depth(model, batch).exit_logits, model(**batch).logits
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        states = stock(batch["input_ids"][row : row + 1, :length], output_hidden_states=True).hidden_states
        for depth in range(1, NUM_LAYERS + 1):
            readable = states[depth][0]
            if family == "modernbert" and depth < NUM_LAYERS:
                readable = stock.final_norm(readable)
            assert_close(exit_logits[row, depth - 1], reference_exit_logits(model, depth, readable))
        assert_close(logits[row], reference_exit_logits(model, NUM_LAYERS, states[-1][0]))


def count_calls(modules) -> list[int]:
    """How often each module runs from now on."""
    calls = [0] * len(modules)

    def count(index):
        calls[index] += 1

    for index, module in enumerate(modules):
        module.register_forward_hook(lambda *_, index=index: count(index))
    return calls


@pytest.mark.parametrize(
    ("config", "speed"),
    [
        ({}, None),
        ({}, 0),
        ({}, torch.zeros(7)),
        ({"exit_type": "linear", "share_exit_pooler": True}, None),
        ({"exit_type": "linear", "share_exit_pooler": True}, [0] * 7),
    ],
)
@torch.no_grad()
def test_speed_zero_runs_the_teacher_and_no_student(config, speed):
    model, batch = tiny_model(**config), texts(7)
    expected = full_depth(model, batch).logits
    exits, layers = count_calls(model.exits), count_calls(model.fastbert.layers())
    shared = count_calls([model.shared_pooler] if config else [])
    output = model(**batch, speed=speed)
    assert_close(output.logits, expected)
    assert exits == [0] * (NUM_LAYERS - 1) + [1]
    assert layers == [1] * NUM_LAYERS
    assert shared == ([1] if config else [])


@pytest.mark.parametrize("max_layers", [1, 3])
@torch.no_grad()
def test_speed_zero_with_max_layers_runs_that_exit_alone_and_no_layer_after_it(max_layers):
    model, batch = tiny_model(), texts(7)
    expected = full_depth(model, batch).exit_logits[:, max_layers - 1]
    exits, layers = count_calls(model.exits), count_calls(model.fastbert.layers())
    output = model(**batch, max_layers=max_layers)
    assert_close(output.logits, expected)
    assert output.exit_layer.tolist() == [max_layers] * 7
    assert exits == [int(depth == max_layers) for depth in range(1, NUM_LAYERS + 1)]
    assert layers == [int(depth <= max_layers) for depth in range(1, NUM_LAYERS + 1)]


@pytest.mark.parametrize("policy", ["entropy", "patience"])
@torch.no_grad()
def test_rows_at_speed_zero_answer_as_alone_beside_faster_rows(policy):
    model, batch = decisive_model(exit_policy=policy), texts(16)
    is_fast = torch.arange(16) % 2 == 1
    for speed in (0.3, 0.6, 1.0):
        output = model(**batch, speed=torch.where(is_fast, speed, 0.0))
        slow, fast = model(**batch), model(**batch, speed=speed)
        for rows, expected in ((~is_fast, slow), (is_fast, fast)):
            assert output.exit_layer[rows].tolist() == expected.exit_layer[rows].tolist()
            assert_close(output.logits[rows], expected.logits[rows])
            assert_close(output.uncertainty[rows], expected.uncertainty[rows])
        assert set(slow.exit_layer.tolist()) == {NUM_LAYERS}
    assert min(fast.exit_layer.tolist()) < NUM_LAYERS


@torch.no_grad()
def test_no_student_runs_once_only_rows_at_speed_zero_are_left():
    model, batch = tiny_model(), texts(8)
    exits = count_calls(model.exits)
    speeds = [1.0] + [0.0] * 7
    assert model(**batch, speed=speeds).exit_layer.tolist() == [1] + [NUM_LAYERS] * 7
    assert exits == [1] + [0] * (NUM_LAYERS - 2) + [1]


@pytest.mark.parametrize(("family", "policy"), [*(("bert", policy) for policy in POLICIES), ("modernbert", "entropy")])
@torch.no_grad()
def test_mean_exit_layer_never_rises_with_speed(family, policy):
    model, batch = decisive_model(family, exit_policy=policy, num_labels=2), texts(40, family)
    exit_layers = [model(**batch, speed=speed).exit_layer for speed in np.linspace(0, 1, 11)]
    for slower, faster in pairwise(exit_layers):
        assert (faster <= slower).all()
    means = [layers.float().mean().item() for layers in exit_layers]
    assert means[0] == NUM_LAYERS
    assert len(set(means)) >= 3


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@torch.no_grad()
def test_each_layer_and_exit_sees_only_the_tokens_of_rows_still_going(family):
    model, batch = copy.deepcopy(decisive_model(family)), texts(24, family, 20)
    lengths = batch["attention_mask"].sum(1)
    seen = []
    for name, modules in (("layer", model.fastbert.layers()), ("exit", model.exits)):
        for depth, module in enumerate(modules, start=1):
            module.register_forward_pre_hook(
                lambda _, args, key=(name, depth): seen.append((*key, args[0].shape[1])), with_kwargs=False
            )
    shrinking = 0
    for speed in (0.3, 0.5, 0.7, 0.9, 1.0, [1.0] * 24):
        seen.clear()
        exit_layer = model(**batch, speed=speed).exit_layer
        expected = []
        for depth in range(1, exit_layer.max() + 1):
            tokens = lengths[exit_layer >= depth].sum().item()
            expected += [("layer", depth, tokens), ("exit", depth, tokens)]
        assert seen == expected
        shrinking += len({tokens for *_, tokens in seen}) > 2
    assert shrinking


@torch.no_grad()
def test_no_layer_runs_after_all_rows_are_done():
    model, batch = tiny_model(), texts(7)
    layers, exits = count_calls(model.fastbert.layers()), count_calls(model.exits)
    assert model(**batch, speed=1.0).exit_layer.tolist() == [1] * 7
    assert layers == exits == [1] + [0] * (NUM_LAYERS - 1)


@pytest.mark.parametrize(
    ("policy", "speed"), [("entropy", 0), ("confidence", 0.4), ("margin", 0.8), ("patience", 0.8), ("entropy", 1.0)]
)
def test_loss_and_gradient_belong_to_the_exits_taken(policy, speed):
    model, batch = tiny_model(exit_policy=policy), texts(7)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    output = model(**batch, speed=speed, labels=labels)
    assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    for exit_classifier in model.exits:
        exit_classifier.requires_grad_()
    output = model(**batch, speed=speed, labels=labels)
    output.loss.backward()
    reached = {depth for depth, exit in enumerate(model.exits, start=1) if (exit.out_proj.weight.grad is not None)}
    assert reached == set(output.exit_layer.tolist())


@pytest.mark.parametrize(
    ("policy", "speed"), [("entropy", 0), ("confidence", 0.3), ("margin", 1.0), ("patience", 0.3), ("patience", 0)]
)
def test_weights_that_are_not_numbers_give_an_error_and_no_answer(policy, speed):
    model, batch = tiny_model(exit_policy=policy), texts(5)
    with torch.no_grad():
        for exit_classifier in model.exits:
            exit_classifier.out_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"logits of rows \[0, 1, 2, 3, 4\] are not finite"):
        model(**batch, speed=speed)


@torch.no_grad()
def test_a_broken_exit_is_never_taken_and_later_exits_answer():
    model, batch = tiny_model(), texts(5)
    expected = full_depth(model, batch).exit_logits[:, 1]
    model.exits[0].out_proj.bias.fill_(math.nan)
    output = model(**batch, speed=1.0)
    assert output.exit_layer.tolist() == [2] * 5
    assert_close(output.logits, expected)


@torch.no_grad()
def test_error_names_the_rows_whose_inputs_are_broken():
    model, batch = tiny_model(), texts(5)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    embeds[[1, 3], 0] = math.inf
    inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    for speed in (0, 0.9, [0, 1, 0.5, 1, 0.2]):
        with pytest.raises(ValueError, match=r"logits of rows \[1, 3\] are not finite"):
            model(**inputs, speed=speed)


@pytest.mark.parametrize(
    "speed",
    [math.nan, math.inf, -0.1, 1.1, True, "0.5", [0.5, 0.5, math.nan], [0.5, 2, 0.5], torch.tensor([True] * 3)],
)
def test_bad_speed_is_refused(speed):
    with pytest.raises(ValueError, match=r"speed must be a number in \[0, 1\], got"):
        tiny_model()(**texts(3), speed=speed)


@pytest.mark.parametrize("speed", [[0.5], [0.5] * 4, torch.full((2,), 0.5), np.zeros(4)])
def test_wrong_number_of_speeds_is_refused(speed):
    with pytest.raises(ValueError, match=rf"got {len(speed)} speeds for a batch of 3 rows"):
        tiny_model()(**texts(3), speed=speed)


@pytest.mark.parametrize("max_layers", [0, NUM_LAYERS + 1, True])
def test_bad_max_layers_is_refused(max_layers):
    with pytest.raises(ValueError, match=rf"max_layers must be a whole number from 1 to {NUM_LAYERS}"):
        tiny_model()(**texts(3), max_layers=max_layers)


@pytest.mark.parametrize("wanted", ["output_exit_logits", "output_hidden_states"])
@pytest.mark.parametrize("limit", [{"speed": 0.5}, {"speed": [0, 0, 0.1]}, {"max_layers": 2}])
def test_full_depth_outputs_are_refused_together_with_a_limit(wanted, limit):
    with pytest.raises(ValueError, match="leave out speed and max_layers"):
        tiny_model()(**texts(3), **{wanted: True}, **limit)


def test_full_depth_outputs_are_fine_at_speed_zero():
    output = tiny_model()(**texts(3), speed=0, output_exit_logits=True, output_hidden_states=True)
    assert output.exit_logits.shape == (3, NUM_LAYERS, 3)
    assert len(output.hidden_states) == NUM_LAYERS + 1
