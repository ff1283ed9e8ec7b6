"""The answer to a text depends on nothing but the text: not on batch-mates, order, padding, or other threads."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.common import VOCAB_SIZE, assert_close, pad_token_id_of, ragged_batch

from .oracle import (
    POLICIES,
    SPEEDS,
    TIE,
    assert_answers_are_the_oracles,
    decisive_model,
    full_depth,
    oracle_uncertainties,
    texts,
)


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


@pytest.mark.parametrize("family", ["roberta", "modernbert"])
def test_answer_of_a_text_depends_on_nothing_but_the_text(family):
    taken = set()

    @settings(max_examples=25, deadline=None, derandomize=True)
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


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
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


@pytest.mark.parametrize("family", ["bert", "modernbert"])
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
            outputs = [model(**batches[index], speed=speeds[index]) for _ in range(4)]
        return [(output.exit_layer.tolist(), output.logits) for output in outputs]

    alone = [answers(index)[0] for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answers, range(4)))
    for (exit_layer, logits), repeated in zip(alone, together, strict=True):
        for thread_exit_layer, thread_logits in repeated:
            assert thread_exit_layer == exit_layer
            assert_close(thread_logits, logits)
    assert len({tuple(exit_layer[:16]) for exit_layer, _ in alone}) >= 3
