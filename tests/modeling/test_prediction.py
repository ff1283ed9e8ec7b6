"""
`model.predict` gives every text of a list or stream the answer that the model itself gives it, in order.

How batches are formed, joined, and halved where memory runs out: `test_scheduler.py`.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import fastbert_hf
from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.modeling.encoded_texts import read_blocks
from tests.common import FAMILIES, NUM_LAYERS, assert_close, pad_token_id_of, ragged_batch, tiny_model


LENGTHS = (9, 3, 17, 1, 9, 30, 2, 12, 5, 9, 21, 3, 3, 14, 40, 8)
# At this speed texts leave the model of these tests at every exit.
SPEED = 0.85
OWN_REVIEWS = Path(__file__).parent.parent.parent / "examples" / "data" / "test.tsv"
# What makes batches differ: text by text, three at a time, tiny and small batches, with and without rebatching.
FORMATIONS = (
    {"batch_tokens": 32},
    {"batch_size": 1},
    {"batch_tokens": 100, "rebatch": False},
    {"batch_size": 3},
    {"batch_tokens": 1},
    {},
)


def encoded_texts(family: str = "bert", lengths=LENGTHS, pairs: bool = False) -> list[dict[str, list[int]]]:
    batch = ragged_batch(lengths, pad_token_id_of(family), pairs=pairs)
    return [
        {name: batch[name][row, :length].tolist() for name in batch if name != "attention_mask"}
        for row, length in enumerate(lengths)
    ]


def own_answers(model, rows, speed=0.0, **limits) -> list[tuple[torch.Tensor, int, float]]:
    """What `forward` says of each text by itself."""
    speeds = speed if isinstance(speed, list) else [speed] * len(rows)
    answers = []
    for row, text_speed in zip(rows, speeds, strict=True):
        with torch.no_grad():
            output = model(**{name: torch.tensor([ids]) for name, ids in row.items()}, speed=text_speed, **limits)
        answers.append((output.logits[0], output.exit_layer.item(), output.uncertainty.item()))
    return answers


def assert_same(actual, expected) -> None:
    actual = list(actual)
    assert len(actual) == len(expected)
    for answer, (logits, exit_layer, uncertainty) in zip(actual, expected, strict=True):
        assert answer.exit_layer == exit_layer
        assert_close(answer.logits, logits)
        assert answer.uncertainty == pytest.approx(uncertainty, abs=1e-5)


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=1)


@pytest.fixture(scope="module")
def expected(model):
    """What the model says of the texts at `SPEED`."""
    return own_answers(model, encoded_texts(), SPEED)


@pytest.fixture
def layer_calls(model):
    """`(depth, tokens)` of every layer that runs."""
    calls = []

    def counter(depth: int):
        return lambda layer, args: calls.append((depth, args[0].shape[1]))

    hooks = [
        layer.register_forward_pre_hook(counter(depth)) for depth, layer in enumerate(model.fastbert.layers(), start=1)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("family", "formation"),
    [
        *(("bert", formation) for formation in FORMATIONS),
        *zip(FAMILIES[1:], itertools.cycle(FORMATIONS)),
        *zip(FAMILIES[1:], itertools.cycle((*FORMATIONS[2:], *FORMATIONS[:2]))),
    ],
)
def test_answers_of_every_family_are_those_of_the_model_itself(family, formation):
    model, rows = tiny_model(family), encoded_texts(family)
    expected = own_answers(model, rows, 0.7)
    assert len({exit_layer for _, exit_layer, _ in expected}) > 1
    assert_same(model.predict(rows, speed=0.7, **formation), expected)


@pytest.mark.parametrize(
    ("policy", "limits", "speed"),
    [
        ("entropy", {"min_exit_layer": 2, "max_layers": 2}, 0.5),
        ("entropy", {"max_layers": 3}, 0),
        ("confidence", {"min_exit_layer": 2}, 0.5),
        ("confidence", {}, 1.0),
        ("margin", {"max_layers": 3}, 0.5),
        ("margin", {"min_exit_layer": 2}, 1.0),
        ("patience", {"min_exit_layer": 2}, 0.5),
        ("patience", {"max_layers": 3}, 1.0),
        ("patience", {}, 0),
    ],
)
def test_answers_follow_policy_speed_and_limits(policy, limits, speed):
    model, rows = tiny_model(exit_policy=policy, patience=1), encoded_texts()
    expected = own_answers(model, rows, speed, **limits)
    for formation in FORMATIONS[:3]:
        assert_same(model.predict(rows, speed=speed, **limits, **formation), expected)


@pytest.mark.parametrize("exit_type", ["attention", "linear", "linear_mean"])
def test_answers_of_every_exit_type_and_of_pairs(exit_type):
    model, rows = tiny_model(exit_type=exit_type), encoded_texts(pairs=True)
    assert_same(model.predict(rows, speed=SPEED, batch_tokens=32), own_answers(model, rows, SPEED))


def test_every_text_may_have_its_own_speed(model, layer_calls):
    rows = encoded_texts(lengths=LENGTHS * 3)
    speeds = (
        torch.empty(48, dtype=torch.float64).uniform_(0.75, 0.95, generator=torch.Generator().manual_seed(0)).tolist()
    )
    expected = own_answers(model, rows, speeds)
    assert len({exit_layer for _, exit_layer, _ in expected}) == NUM_LAYERS
    for given_speeds in (speeds, tuple(speeds), iter(speeds), torch.tensor(speeds)):
        layer_calls.clear()
        assert_same(model.predict(rows, speed=given_speeds, batch_tokens=100), expected)
        depths = [depth for depth, _ in layer_calls]
        assert depths.count(NUM_LAYERS) < depths.count(1)  # so some were joined


def test_speeds_that_end_before_the_texts_are_an_error_after_their_answers(model):
    answers = model.predict(encoded_texts(), speed=[0.5] * 3, batch_size=2)
    assert len(list(itertools.islice(answers, 3))) == 3
    with pytest.raises(ValueError, match="there are 3 speeds but more texts"):
        next(answers)


@pytest.mark.parametrize("make_speeds", [list, tuple, iter, torch.tensor])
@pytest.mark.parametrize("make", [list, iter, lambda rows: {"input_ids": [row["input_ids"] for row in rows]}])
def test_speeds_that_are_more_than_the_texts_are_an_error(model, make, make_speeds):
    answers = model.predict(make(encoded_texts()), speed=make_speeds([0.5] * 17))
    with pytest.raises(ValueError, match="there are 16 texts but more speeds: give one number for all, or one for"):
        list(answers)
    with pytest.raises(ValueError, match="more speeds"):
        next(model.predict(encoded_texts(), speed=[0.5] * 17))  # before the first answer, where it can be told


@pytest.mark.parametrize(
    "speeds", [[0.0, None, 1.0], [0.0, "1", 1.0], [0.0, float("nan"), 1.0], [[0.0], [1.0], [1.0]]]
)
def test_a_speed_that_is_none_names_its_text(model, speeds):
    number = 0 if isinstance(speeds[0], list) else 1
    answers = model.predict(encoded_texts()[:3], speed=speeds, batch_size=1)
    assert len(list(itertools.islice(answers, number))) == number
    with pytest.raises(ValueError, match=f"text {number}: speed must be a number in .0, 1., got"):
        next(answers)


def test_fractions_are_speeds(model, expected):
    speed = Fraction(17, 20)
    assert_same(model.predict(encoded_texts(), speed=speed), expected)
    assert_same(model.predict(encoded_texts(), speed=[speed] * len(LENGTHS)), expected)


@pytest.mark.parametrize(
    "make",
    [
        list,
        iter,
        lambda rows: (row for row in rows),
        Dataset.from_list,
        lambda rows: Dataset.from_list([{**row, "label": 1, "text": "other"} for row in rows]),
        lambda rows: Dataset.from_list(rows).with_format("torch"),
        lambda rows: {"input_ids": [row["input_ids"] for row in rows]},
        lambda rows: [{"input_ids": torch.tensor(row["input_ids"])} for row in rows],
        lambda rows: [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows],
        lambda rows: [{**row, "attention_mask": [1.0] * len(row["input_ids"])} for row in rows],
        lambda rows: [{**row, "attention_mask": None, "token_type_ids": None} for row in rows],
        lambda rows: {"input_ids": [row["input_ids"] for row in rows], "attention_mask": None},
        lambda rows: [
            {"input_ids": [*row["input_ids"], 0], "attention_mask": [*[1.0] * len(row["input_ids"]), 0.0]}
            for row in rows
        ],
        lambda rows: [
            {"input_ids": [0, 0, *row["input_ids"], 0], "attention_mask": [0, 0, *[1] * len(row["input_ids"]), 0]}
            for row in rows
        ],
        lambda rows: ragged_batch(LENGTHS),
        lambda rows: ragged_batch(LENGTHS, padding_side="left"),
    ],
)
def test_texts_may_come_in_many_forms(model, expected, make):
    assert_same(model.predict(make(encoded_texts()), speed=SPEED, batch_tokens=64), expected)


def test_one_encoded_text_gives_one_answer(model):
    rows = encoded_texts(lengths=(7,))
    assert_same(model.predict(rows[0], speed=SPEED), own_answers(model, rows, SPEED))


@pytest.mark.parametrize("nothing", [[], iter([]), {"input_ids": []}])
def test_no_texts_give_no_answers(model, nothing):
    assert list(model.predict(nothing, speed=0.5)) == []


def test_logits_are_tensors_like_any_other(model):
    (answer,) = model.predict(encoded_texts(lengths=(7,)), speed=0.5)
    assert not answer.logits.is_inference()
    assert not answer.logits.requires_grad
    assert answer.logits.shape == (3,)
    assert type(answer.exit_layer) is int
    assert type(answer.uncertainty) is float


def test_gradients_are_as_they_were_after_and_between_answers(model):
    for _ in model.predict(encoded_texts(), speed=0.5, batch_size=4):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


# What runs


def test_no_student_is_evaluated_at_speed_zero_nor_before_min_exit_layer(model):
    evaluated = []
    hooks = [
        exit_classifier.register_forward_hook(lambda *_, depth=depth: evaluated.append(depth))
        for depth, exit_classifier in enumerate(model.exits, start=1)
    ]
    try:
        list(model.predict(encoded_texts()))
        assert set(evaluated) == {NUM_LAYERS}
        evaluated.clear()
        answers = list(model.predict(encoded_texts(), speed=1.0, min_exit_layer=3))
        assert set(evaluated) == {3}
        assert {answer.exit_layer for answer in answers} == {3}
    finally:
        for hook in hooks:
            hook.remove()


def test_no_layer_sees_padding_or_a_text_that_has_left(model, layer_calls):
    answers = list(model.predict(encoded_texts(), speed=SPEED, batch_tokens=48))
    for depth in range(1, NUM_LAYERS + 1):
        expected = sum(length for length, answer in zip(LENGTHS, answers, strict=True) if answer.exit_layer >= depth)
        assert sum(tokens for called, tokens in layer_calls if called == depth) == expected


# What cannot be read

BAD_TEXTS = {
    "a string": ("some text", r"text 3 has no input_ids \(got 'some text'\): encode the texts first"),
    "no ids": ({"text": "some text"}, r"text 3 has no input_ids \(got a mapping of 'text'\)"),
    "no tokens": ({"input_ids": []}, "text 3 has no tokens"),
    "padding only": ({"input_ids": [0, 0], "attention_mask": [0, 0]}, "text 3 has no tokens"),
    "too long": ({"input_ids": [5] * 65}, "text 3 has 65 tokens, but this model reads at most 64"),
    "beyond the vocabulary": ({"input_ids": [5, 100]}, "the input_ids of text 3 must be from 0 to 99, got 5 to 100"),
    "below zero": ({"input_ids": [5, -1]}, "the input_ids of text 3 must be from 0 to 99, got -1 to 5"),
    "fractions": ({"input_ids": [5.0, 6.5]}, "the input_ids of text 3 must be whole numbers, got"),
    "a batch": ({"input_ids": [[5, 6]]}, "the input_ids of text 3 must be whole numbers, got"),
    "a type beyond": (
        {"input_ids": [5, 6], "token_type_ids": [0, 2]},
        "the token_type_ids of text 3 must be from 0 to 1",
    ),
    "lengths that differ": ({"input_ids": [5, 6], "attention_mask": [1]}, "the inputs of text 3 differ in length"),
    "a gap": (
        {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]},
        "the attention_mask of text 3 has zeros inside the text",
    ),
    "no ids at all": (
        {"input_ids": None, "token_type_ids": [0]},
        "text 3 has no input_ids .got a mapping of 'token_type_ids",
    ),
    "one number": ({"input_ids": 5}, "the input_ids of text 3 must be a list of whole numbers, got 5"),
    "a mask of one number": ({"input_ids": [5], "attention_mask": 1}, "the attention_mask of text 3 must be a list"),
    "a mask of nan": (
        {"input_ids": [5, 6], "attention_mask": [float("nan")] * 2},
        "the attention_mask of text 3 must be of 1 for the text and 0 for padding, got .nan, nan.",
    ),
    "half a mask": ({"input_ids": [5, 6], "attention_mask": [0.5, 1.0]}, "the attention_mask of text 3 must be of 1"),
    "a mask of words": (
        {"input_ids": [5, 6], "attention_mask": ["1", "1"]},
        "the attention_mask of text 3 must be of",
    ),
    "a gap of floats": (
        {"input_ids": [5, 6, 7], "attention_mask": [1.0, 0.0, 1.0]},
        "the attention_mask of text 3 has zeros inside the text",
    ),
    "an error": (KeyError("what was wrong"), "what was wrong"),
    "other inputs": (
        {"input_ids": [5, 6], "token_type_ids": [0, 1]},
        "text 3 has input_ids, token_type_ids, but those before it have input_ids",
    ),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_bad_text_is_named_after_the_answers_before_it(model, expected, name):
    bad, message = BAD_TEXTS[name]
    rows = encoded_texts()
    for batch_size in (None, 2):
        answers = model.predict([*rows[:3], bad, *rows[4:]], speed=SPEED, batch_size=batch_size)
        assert_same(itertools.islice(answers, 3), expected[:3])
        with pytest.raises(KeyError if isinstance(bad, KeyError) else ValueError, match=message):
            next(answers)


def test_a_text_whose_logits_are_not_numbers_is_named_after_the_answers_before_it():
    model = tiny_model()
    rows = [{"input_ids": [min(id, 98) for id in row["input_ids"]]} for row in encoded_texts()]
    rows[3] = {"input_ids": [7, 99]}
    with torch.no_grad():
        model.get_input_embeddings().weight[99] = float("nan")
    answers = model.predict(rows, speed=SPEED)
    assert len(list(itertools.islice(answers, 3))) == 3
    with pytest.raises(ValueError, match="the logits of text 3 are not finite"):
        next(answers)


@pytest.mark.parametrize("name", ["batch_size", "batch_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_what_is_no_size_is_refused_at_once(model, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1"):
        model.predict(encoded_texts(), **{name: value})


@pytest.mark.parametrize("speed", [-0.1, 1.1, float("nan"), True, "fast"])
def test_what_is_no_speed_is_refused_at_once_or_at_its_text(model, speed):
    with pytest.raises(ValueError, match=r"speed must be a number in \[0, 1\]"):
        model.predict(encoded_texts(), speed=speed)
    with pytest.raises(ValueError, match=r"speed must be a number in \[0, 1\]"):
        list(model.predict(encoded_texts()[:2], speed=[0.5, speed]))


def test_wrong_columns_say_how_to_encode(model):
    with pytest.raises(ValueError, match=r"no input_ids among 'text'.*model\.predict\(tokenizer\(texts\)"):
        list(model.predict({"text": ["some text"]}))
    with pytest.raises(ValueError, match="no input_ids among nothing"):
        list(model.predict({"input_ids": None}))
    with pytest.raises(ValueError, match=r"columns differ in length, .*, so text 1 has not all of its inputs"):
        list(model.predict({"input_ids": [[5], [6]], "token_type_ids": [[0]]}))
    with pytest.raises(ValueError, match="must be lists, one for each text"):
        list(model.predict({"input_ids": 5}))


@pytest.mark.parametrize("texts", ["some text", b"bytes", None, 5])
def test_what_is_no_encoded_texts_says_how_to_encode(model, texts):
    with pytest.raises(TypeError, match=r"predict takes encoded texts, got .*model\.predict\(tokenizer\(texts\)"):
        list(model.predict(texts))


def test_a_model_in_training_mode_is_refused(model):
    model.train()
    try:
        with pytest.raises(ValueError, match=r"model\.eval\(\)"):
            model.predict(encoded_texts())
    finally:
        model.eval()


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(model, expected):
    def limited(layer, args):
        if args[0].shape[1] > 45:
            raise MemoryError

    hook = model.fastbert.layers()[2].register_forward_pre_hook(limited)
    try:
        assert_same(model.predict(encoded_texts(), speed=SPEED), expected)
    finally:
        hook.remove()


# Threads, and the same answer in every batch


def test_threads_with_different_speeds_get_the_answers_they_get_alone(model):
    rows, speeds = encoded_texts(lengths=LENGTHS * 2), (0.0, 0.8, 0.85, 0.95)

    def answers(speed: float) -> list:
        return [list(model.predict(rows, speed=speed, batch_tokens=64)) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answers, speeds))
    for speed, repeated in zip(speeds, together, strict=True):
        expected = own_answers(model, rows, speed)
        for got in repeated:
            assert_same(got, expected)


def reviews(number: int) -> list[str]:
    """Real texts where they are, else the project's own."""
    if os.environ.get("FASTBERT_DATA"):
        path, column, opens = Path(os.environ["FASTBERT_DATA"], "en", "sst2", "test.tsv.gz"), "text_a", gzip.open
    else:
        path, column, opens = OWN_REVIEWS, "text", open
    with opens(path, "rt", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [row[column] for row in itertools.islice(rows, number)]


def test_real_texts_have_the_same_answer_in_every_batch_formation():
    model = FastBertForSequenceClassification.from_pretrained(fastbert_hf.DEFAULT_MODEL_DIR).eval()
    tokenizer = AutoTokenizer.from_pretrained(fastbert_hf.DEFAULT_MODEL_DIR)
    rows, speed = tokenizer(reviews(160), truncation=True, max_length=128), model.config.speed
    expected = list(model.predict(rows, speed=speed, batch_size=1))
    assert len({answer.exit_layer for answer in expected}) == 6
    for formation in ({}, {"rebatch": False}, {"batch_size": 7}, {"batch_tokens": 4000}):
        for answer, other in zip(model.predict(rows, speed=speed, **formation), expected, strict=True):
            if answer.exit_layer == other.exit_layer:
                assert_close(answer.logits, other.logits, 1e-4)
            else:  # rounding alone may part them
                earlier = min(answer, other, key=lambda one: one.exit_layer)
                assert abs(earlier.uncertainty - speed) < 1e-5


def test_bfloat16_answers_in_any_batch_like_the_model_itself():
    model, rows = tiny_model().to(torch.bfloat16), encoded_texts()
    for (logits, *_), answer in zip(own_answers(model, rows), model.predict(rows, batch_tokens=50), strict=True):
        assert answer.logits.dtype is torch.bfloat16
        assert_close(answer.logits.float(), logits.float(), 0.15)


# Blocks


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 20), max_size=40), st.integers(1, 50))
def test_blocks_hold_every_item_once_and_end_as_soon_as_they_are_full(items, limit):
    blocks = list(read_blocks(items, limit, weigh=lambda item: item))
    assert list(itertools.chain(*blocks)) == items
    for block in blocks:
        assert sum(block[:-1]) < limit
    assert all(sum(block) >= limit for block in blocks[:-1])
