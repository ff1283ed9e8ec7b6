from __future__ import annotations

import copy
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert_hf import FastBertForSequenceClassification
from tests.common import (
    FAMILIES,
    NUM_LAYERS,
    VOCAB_SIZE,
    assert_close,
    pad_token_id_of,
    ragged_batch,
    reference_exit_logits,
    tiny_model,
    tiny_stock_model,
)


SPEEDS = tuple(tenth / 10 for tenth in range(11))
POLICIES = ("entropy", "confidence", "margin", "patience")
# An uncertainty this near to a speed might fall on either side of it in float32.
TIE = 1e-6


@functools.cache
@torch.no_grad()
def decisive_model(family: str = "bert", **config) -> FastBertForSequenceClassification:
    """A model whose exits prefer no label and grow surer with depth, so that every speed divides its rows."""
    model = tiny_model(family, **config)
    exit_logits = full_depth(model, texts(100, family)).exit_logits
    for depth, exit_classifier in enumerate(model.exits, start=1):
        said = exit_logits[:, depth - 1]
        scale = (0.5 + depth / 2) / said.std(0).mean()
        exit_classifier.out_proj.weight *= scale
        exit_classifier.out_proj.bias.sub_(said.mean(0)).mul_(scale)
    return model


def texts(number: int, family: str = "bert", longest: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(1, longest + 1, (number,), generator=generator)
    return ragged_batch(tuple(lengths.tolist()), pad_token_id=pad_token_id_of(family))


def oracle_uncertainties(model: FastBertForSequenceClassification, exit_logits: torch.Tensor) -> np.ndarray:
    """The uncertainty of each exit on each row, `[rows, L]`, in float64 from the policies' definitions."""
    logits = exit_logits.double().numpy()
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    policy = model.config.exit_policy
    if policy == "entropy":
        return -(probabilities * np.log(probabilities)).sum(-1) / math.log(logits.shape[-1])
    ordered = np.sort(probabilities, -1)
    if policy == "confidence":
        return (1 - ordered[..., -1]) * logits.shape[-1] / (logits.shape[-1] - 1)
    if policy == "margin":
        return 1 - (ordered[..., -1] - ordered[..., -2])
    labels = logits.argmax(-1)
    uncertainties = np.ones(labels.shape)
    for row, said in enumerate(labels):
        agreements = 0
        for depth in range(1, len(said)):
            agreements = agreements + 1 if said[depth] == said[depth - 1] else 0
            uncertainties[row, depth] = 1 - min(agreements, model.config.patience) / model.config.patience
    return uncertainties


def oracle_exit(uncertainties: np.ndarray, speed: float, last_layer: int, ties_are_at_speed: bool) -> int:
    for depth in range(1, last_layer):
        distance = speed - uncertainties[depth - 1]
        if speed > 0 and not ties_are_at_speed:
            assert abs(distance) > TIE, "a tie: choose another seed"
        if distance > TIE:
            return depth
    return last_layer


def assert_answers_are_the_oracles(
    model: FastBertForSequenceClassification, batch: dict[str, torch.Tensor], speeds, max_layers: int | None = None
) -> list[int]:
    """Compares a call at each of the speeds with what the exits say at full depth, and returns all exit layers."""
    exit_logits = full_depth(model, batch).exit_logits
    uncertainties = oracle_uncertainties(model, exit_logits)
    is_patience = model.config.exit_policy == "patience"
    rows, taken = range(len(exit_logits)), []
    for speed in speeds:
        with torch.no_grad():
            output = model(**batch, speed=speed, max_layers=max_layers)
        row_speeds = [float(one) for one in ([speed or 0.0] * len(rows) if np.ndim(speed) == 0 else speed)]
        exits = [
            oracle_exit(uncertainties[row], row_speeds[row], max_layers or NUM_LAYERS, is_patience) for row in rows
        ]
        expected = torch.stack([exit_logits[row, depth - 1] for row, depth in enumerate(exits)])
        # At speed 0 a row hears its last exit alone, which agrees with nobody.
        uncertainty = [
            1.0 if is_patience and row_speeds[row] == 0 else uncertainties[row, exits[row] - 1] for row in rows
        ]
        assert output.exit_layer.tolist() == exits
        assert_close(output.logits, expected)
        assert output.logits.argmax(-1).tolist() == expected.argmax(-1).tolist()
        assert_close(output.uncertainty.double(), torch.tensor(uncertainty, dtype=torch.float64))
        assert output.uncertainty.dtype == torch.float32
        assert output.exit_layer.dtype == torch.long
        taken += exits
    return taken


@torch.no_grad()
def full_depth(model: FastBertForSequenceClassification, batch: dict[str, torch.Tensor]):
    return model(**batch, output_exit_logits=True)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bert", {}),
        ("bert", {"exit_type": "linear", "share_exit_pooler": True}),
        ("bert", {"teacher_exit_type": "linear", "share_exit_pooler": True}),
        ("roberta", {"share_exit_pooler": True, "num_labels": 2}),
        ("modernbert", {"exit_type": "linear", "num_labels": 7}),
    ],
)
def test_every_row_leaves_at_the_first_exit_below_its_speed(family, config, policy):
    model = decisive_model(family, exit_policy=policy, **config)
    taken = []
    for number in (1, 7, 64):
        taken += assert_answers_are_the_oracles(model, texts(number, family), SPEEDS)
    assert len(set(taken)) >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_leaves_at_the_first_exit_below_its_speed(family):
    model = decisive_model(family)
    taken = assert_answers_are_the_oracles(model, texts(20, family, 30), SPEEDS)
    assert len(set(taken)) >= 3


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("as_given", [list, tuple, np.array, torch.tensor])
def test_every_row_leaves_at_its_own_speed(policy, as_given):
    model = decisive_model(exit_policy=policy)
    batch = texts(32)
    speeds = [SPEEDS[row % len(SPEEDS)] for row in range(32)]
    taken = assert_answers_are_the_oracles(model, batch, [as_given(speeds)])
    assert len(set(taken)) >= 3


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("max_layers", range(1, NUM_LAYERS + 1))
def test_every_row_has_answered_after_max_layers(policy, max_layers):
    model = decisive_model(exit_policy=policy)
    batch = texts(32)
    speeds = (None, 0, 0.3, 0.7, 1.0, [SPEEDS[row % len(SPEEDS)] for row in range(32)])
    taken = assert_answers_are_the_oracles(model, batch, speeds, max_layers)
    assert max(taken) == max_layers


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exit_type", ["attention", "linear"])
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


@pytest.mark.parametrize("config", [{}, {"exit_type": "linear", "share_exit_pooler": True}])
@pytest.mark.parametrize("speed", [None, 0, 0.0, [0] * 7, torch.zeros(7)])
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


@pytest.mark.parametrize("max_layers", range(1, NUM_LAYERS + 1))
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


@pytest.mark.parametrize("policy", POLICIES)
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


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["bert", "modernbert"])
@torch.no_grad()
def test_mean_exit_layer_never_rises_with_speed(family, policy):
    model, batch = decisive_model(family, exit_policy=policy, num_labels=2), texts(40, family)
    exit_layers = [model(**batch, speed=speed).exit_layer for speed in np.linspace(0, 1, 21)]
    for slower, faster in pairwise(exit_layers):
        assert (faster <= slower).all()
    means = [layers.float().mean().item() for layers in exit_layers]
    assert means[0] == NUM_LAYERS
    assert len(set(means)) >= 3


@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert"])
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


def text_of(number: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * number + length)
    return torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist()


def padded(rows: list[list[int]], pad_token_id: int, left: list[int], right: int) -> dict[str, torch.Tensor]:
    """The texts as one batch, each with so much padding on its left, and at least `right` on its right."""
    width = max(len(row) + extra for row, extra in zip(rows, left, strict=True)) + right
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, (row, extra) in enumerate(zip(rows, left, strict=True)):
        input_ids[index, extra : extra + len(row)] = torch.tensor(row)
        attention_mask[index, extra : extra + len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@functools.cache
def answer_alone(family: str, policy: str, number: int, length: int, speed: float) -> tuple:
    model = decisive_model(family, exit_policy=policy)
    input_ids = torch.tensor([text_of(number, length)])
    if policy != "patience" and speed > 0:
        uncertainties = oracle_uncertainties(model, full_depth(model, {"input_ids": input_ids}).exit_logits)
        assert (abs(uncertainties - speed) > TIE).all(), "a tie: choose another seed"
    with torch.no_grad():
        output = model(input_ids, speed=speed)
    return output.logits[0], output.exit_layer.item(), output.uncertainty[0]


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_answer_of_a_text_depends_on_nothing_but_the_text(family):
    taken = set()

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.data())
    def check(data):
        policy = data.draw(st.sampled_from(POLICIES))
        rows = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), min_size=1, max_size=8))
        left = data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
        speeds = data.draw(st.lists(st.sampled_from(SPEEDS), min_size=len(rows), max_size=len(rows)))
        right = data.draw(st.integers(0, 9))
        batch = padded([text_of(*row) for row in rows], pad_token_id_of(family), left, right)
        with torch.no_grad():
            output = decisive_model(family, exit_policy=policy)(**batch, speed=speeds)
        for index, (row, speed) in enumerate(zip(rows, speeds, strict=True)):
            logits, exit_layer, uncertainty = answer_alone(family, policy, *row, speed)
            assert output.exit_layer[index].item() == exit_layer
            assert_close(output.logits[index], logits)
            assert_close(output.uncertainty[index], uncertainty)
            taken.add(exit_layer)

    check()
    assert len(taken) >= 3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_answers_follow_their_rows_through_permutation_and_selection(family):
    model, batch = decisive_model(family), texts(20, family, 30)
    output = model(**batch, speed=0.7)
    generator = torch.Generator().manual_seed(0)
    for number in (20, 11, 3):
        chosen = torch.randperm(20, generator=generator)[:number]
        answers = model(**{name: value[chosen] for name, value in batch.items()}, speed=0.7)
        assert answers.exit_layer.tolist() == output.exit_layer[chosen].tolist()
        assert_close(answers.logits, output.logits[chosen])
        assert_close(answers.uncertainty, output.uncertainty[chosen])
    assert len(set(output.exit_layer.tolist())) >= 2


@pytest.mark.parametrize("family", ["bert", "electra", "modernbert"])
@torch.no_grad()
def test_what_stands_at_padding_is_never_read(family):
    model = decisive_model(family)
    for padding_side in ("right", "left"):
        batch = ragged_batch((9, 3, 17, 1), padding_side=padding_side)
        expected = model(**batch, speed=0.7)
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 42)
        output = model(**batch, speed=0.7)
        assert output.exit_layer.tolist() == expected.exit_layer.tolist()
        assert_close(output.logits, expected.logits)


def test_pairs_leave_with_their_token_types():
    model, batch = decisive_model(), ragged_batch((9, 4, 17, 2, 30, 12), pairs=True)
    taken = assert_answers_are_the_oracles(model, batch, SPEEDS)
    assert len(set(taken)) >= 3


def test_threads_with_different_speeds_get_the_answers_they_get_alone():
    model = decisive_model()
    batches = [texts(number) for number in (16, 17, 18, 19)]
    speeds = (0.2, 0.5, 0.7, 1.0)

    def answers(index: int) -> list[tuple]:
        with torch.no_grad():
            outputs = [model(**batches[index], speed=speeds[index]) for _ in range(8)]
        return [(output.exit_layer.tolist(), output.logits) for output in outputs]

    alone = [answers(index)[0] for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answers, range(4)))
    for (exit_layer, logits), repeated in zip(alone, together, strict=True):
        for thread_exit_layer, thread_logits in repeated:
            assert thread_exit_layer == exit_layer
            assert_close(thread_logits, logits)
    assert len({tuple(exit_layer[:16]) for exit_layer, _ in alone}) >= 3


@pytest.mark.parametrize("speed", [0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_loss_and_gradient_belong_to_the_exits_taken(speed, policy):
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


@pytest.mark.parametrize("speed", [0, 0.3, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_weights_that_are_not_numbers_give_an_error_and_no_answer(speed, policy):
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


@pytest.mark.parametrize("max_layers", [0, NUM_LAYERS + 1, True, 1.5, -1])
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
