"""The policy "learned": what a gate weighs, what it remembers, and which gates a config may have."""

from __future__ import annotations

import math

import pytest
import torch

from fastbert_hf import CascadeForSequenceClassification, FastBertConfig, FastBertForSequenceClassification
from fastbert_hf.modeling.exit_gates import NUMBERS, ExitGates, check_gates
from fastbert_hf.modeling.exit_policies import ExitPolicy

from ..common import (
    NUM_LAYERS,
    assert_close,
    one_label,
    random_gates,
    stock,
    tiny_model,
    tiny_text_config,
    tiny_texts,
    tiny_tokenizer,
)


TASK = one_label(3)


def learned_model(seed: int = 0, **fields) -> FastBertForSequenceClassification:
    return tiny_model(seed=seed, exit_policy="learned", gates=random_gates(seed, NUM_LAYERS), **fields)


def encoded(number: int = 12) -> list[dict]:
    return [dict(tiny_tokenizer()(text)) for text in tiny_texts(number)]


def test_what_a_gate_weighs_by_hand():
    said = torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.6, 0.3]], [[0.6, 0.3, 0.1]]]).log()  # three exits, one text
    state = TASK.start_gate(1, "cpu")
    expected = [
        (0.7, math.log(0.7 / 0.2), 0.0, 0.0),
        (0.6, math.log(0.6 / 0.3), 0.2, 0.0),
        (0.6, math.log(0.6 / 0.3), (0.7 + 0.1) / 2, 1 / 2),
    ]
    for logits, (best, lead, earlier, agreement) in zip(said, expected, strict=True):
        probabilities = logits.exp()[0].tolist()
        assert max(probabilities) == pytest.approx(best)
        entropy = -sum(p * math.log(p) for p in probabilities) / math.log(3)
        features, state = TASK.gate(logits, state)
        assert features[0].tolist() == pytest.approx([entropy, lead, earlier, agreement], abs=1e-6)
    gates = ExitGates(torch.tensor([[1.0, 2.0, 3.0, 4.0, -5.0], [0.5, -0.5, 1.5, 2.5, 0.25]]))
    uncertainty, state = gates.uncertainty(TASK, said[0], TASK.start_gate(1, "cpu"), 1)
    entropy = TASK.uncertainty("entropy", said[0]).item()
    assert uncertainty.item() == pytest.approx(1 / (1 + math.exp(-(entropy + 2 * math.log(3.5) - 5))))
    uncertainty, _ = gates.uncertainty(TASK, said[2], state, 2)
    odds = 0.5 * TASK.uncertainty("entropy", said[2]).item() - 0.5 * math.log(2) + 1.5 * 0.7 + 2.5 + 0.25
    assert uncertainty.item() == pytest.approx(1 / (1 + math.exp(-odds)))
    assert len(TASK.gate_features) + 1 == NUMBERS


def test_rows_that_an_exit_may_not_answer_keep_what_is_remembered():
    policy = ExitPolicy("learned", TASK, gates=ExitGates(torch.tensor(random_gates(0, 3))))
    first, second = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    state = policy.start(4)
    _, after_all = policy.uncertainty(first, state, None, 1)
    _, remembered = policy.uncertainty(first, state, torch.tensor([True, False, True, False]), 1)
    assert torch.equal(remembered[::2], after_all[::2]) and not remembered[1::2].any()
    asked_later, _ = policy.uncertainty(second, remembered, None, 2)
    from_the_start, _ = policy.uncertainty(second, state, None, 2)
    assert torch.equal(asked_later[1::2], from_the_start[1::2])
    assert not torch.equal(asked_later[::2], from_the_start[::2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_weighed_in_float32(dtype):
    policy = ExitPolicy("learned", TASK, gates=ExitGates(torch.tensor(random_gates(1, 2))))
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for own, wanted in zip(policy.uncertainty(logits), policy.uncertainty(logits.float()), strict=True):
        assert torch.equal(own, wanted) and own.dtype is torch.float32


@pytest.mark.parametrize("make", ["single", "cascade"])
def test_answers_do_not_depend_on_how_texts_are_batched(make):
    model = learned_model()
    if make == "cascade":
        model = CascadeForSequenceClassification.from_members(
            [stock(num_layers=1), tiny_model(seed=2)], [tiny_tokenizer()] * 2
        )
        model.config.gates = random_gates(3, 1 + NUM_LAYERS)
        model.config.exit_policy = "learned"
    rows = encoded(24)
    speeds = [number / 24 for number in range(24)]
    expected = list(model.predict(rows, speed=speeds, batch_size=1))
    assert len({answer.exit_layer for answer in expected}) > 1
    for arguments in ({}, {"batch_size": 24}, {"batch_tokens": 40}, {"batch_tokens": 40, "rebatch": False}):
        answers = list(model.predict(rows, speed=speeds, **arguments))
        assert [answer.exit_layer for answer in answers] == [answer.exit_layer for answer in expected]
        for own, wanted in zip(answers, expected, strict=True):
            assert_close(torch.tensor(own.uncertainty), torch.tensor(wanted.uncertainty))
    mixed = list(model.predict(rows, speed=[speed * (number % 2) for number, speed in enumerate(speeds)]))
    assert [answer.exit_layer for answer in mixed[1::2]] == [answer.exit_layer for answer in expected[1::2]]


def test_gates_are_saved_and_travel_with_a_model_and_a_cascade(tmp_path):
    model = learned_model()
    model.save_pretrained(tmp_path / "single")
    again = FastBertForSequenceClassification.from_pretrained(tmp_path / "single")
    assert again.config.gates == model.config.gates and again.config.exit_policy == "learned"
    cascade = CascadeForSequenceClassification.from_members([stock(), tiny_model(seed=2)], [tiny_tokenizer()] * 2)
    cascade.config.gates = random_gates(3, cascade.config.num_hidden_layers)
    cascade.config.exit_policy = "learned"
    assert {member.exit_policy for member in cascade.config.members} == {"confidence"}
    cascade.save_pretrained(tmp_path / "cascade")
    loaded = CascadeForSequenceClassification.from_pretrained(tmp_path / "cascade")
    rows = encoded()
    for own, other in ((model, again), (cascade, loaded)):
        answers, others = list(own.predict(rows, speed=0.5)), list(other.predict(rows, speed=0.5))
        assert [answer.exit_layer for answer in answers] == [answer.exit_layer for answer in others]


def test_a_policy_without_gates_says_how_to_get_them():
    with pytest.raises(ValueError, match=r'needs gates, which this model has not: fastbert_hf.calibrate\(.*"learned"'):
        FastBertConfig(text_config=tiny_text_config("bert"), exit_policy="learned")
    with pytest.raises(ValueError, match="needs gates, which this model has not"):
        tiny_model().predict(encoded(), exit_policy="learned")
    model = tiny_model(gates=random_gates(0, NUM_LAYERS))
    assert len(list(model.predict(encoded(), speed=0.5, exit_policy="learned"))) == 12
    with pytest.raises(ValueError, match="gates are for 'learned' alone"):
        ExitPolicy("learned", TASK)


@pytest.mark.parametrize(
    "gates",
    [
        "gates",
        {},
        3,
        [],
        random_gates(0, NUM_LAYERS - 1),
        random_gates(0, NUM_LAYERS + 1),
        [[0.0] * 4] * NUM_LAYERS,
        [[0.0] * 6] * NUM_LAYERS,
        [[math.nan] * 5] * NUM_LAYERS,
        [[math.inf] * 5] * NUM_LAYERS,
        [[1e9] * 5] * NUM_LAYERS,
        [["0"] * 5] * NUM_LAYERS,
        [[True] * 5] * NUM_LAYERS,
        ["12345"] * NUM_LAYERS,
        [None] * NUM_LAYERS,
    ],
)
def test_gates_that_calibrate_would_not_write_are_refused(gates):
    with pytest.raises(Exception, match="gates"):
        FastBertConfig(text_config=tiny_text_config("bert"), gates=gates)
    with pytest.raises(ValueError, match="are not what calibrate writes"):
        check_gates(gates, NUM_LAYERS, "entropy")
