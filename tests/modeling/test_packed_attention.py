"""Attention inside the texts of a packed batch, against its definition on each text alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from fastbert_hf.modeling.packed_attention import (
    ATTENTION_KERNELS,
    PACKED_ATTENTION,
    attend_within_texts,
    packed_attention,
)
from fastbert_hf.modeling.packed_batch import pack_padded
from tests.common import assert_close, ragged_batch


LENGTHS = (5, 1, 9, 5, 12)
HEADS, HEAD_DIM = 2, 3


def mask_of(lengths: tuple[int, ...] = LENGTHS, padding_side: str = "right") -> torch.Tensor:
    return ragged_batch(lengths, padding_side=padding_side)["attention_mask"]


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_attention(query, key, value, sliding_window=None, scaling=None, positions=None):
    """Attention of one text, `[tokens, heads, head_dim]` each, from the definition."""
    scores = torch.einsum("ihd,jhd->hij", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    positions = range(len(query)) if positions is None else positions
    if sliding_window is not None:
        for i in range(query.shape[0]):
            for j in range(key.shape[0]):
                if abs(positions[i] - positions[j]) >= sliding_window:
                    scores[:, i, j] = float("-inf")
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("hij,jhd->ihd", weights, value)


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
@pytest.mark.parametrize(
    ("sliding_window", "scaling"), [(None, None), (None, 0.3), (1, None), (5, 0.3), (8, None), (9, None), (100, 0.3)]
)
def test_attention_and_its_gradients_are_those_of_each_text_alone(kernel, sliding_window, scaling):
    batch, _ = pack_padded(mask_of(), kernel)
    query, key, value = (random_tensor(1, HEADS, sum(LENGTHS), HEAD_DIM, seed=seed) for seed in range(3))
    weights = random_tensor(1, sum(LENGTHS), HEADS, HEAD_DIM, seed=3)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    attended = attend_within_texts(batch, query, key, value, scaling=scaling, sliding_window=sliding_window)
    gradients = torch.autograd.grad((attended * weights).sum(), inputs)

    texts = zip(*(tensor[0].transpose(0, 1).split(batch.lengths.tolist()) for tensor in inputs), strict=True)
    expected = torch.cat([reference_attention(*text, sliding_window, scaling) for text in texts])[None]
    assert_close(attended, expected, 1e-6)
    for actual, reference in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        assert_close(actual, reference, 1e-6)


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
def test_a_window_counts_positions_and_not_places_in_the_row(kernel):
    # Every third token was merged into its neighbour: its position is missing, and the others keep theirs.
    batch, _ = pack_padded(mask_of(), kernel)
    positions = [[place for place in range(20) if place % 3 != 2][:length] for length in batch.lengths.tolist()]
    batch = replace(batch, position_ids=torch.tensor([[place for own in positions for place in own]]))
    query, key, value = (random_tensor(1, HEADS, sum(LENGTHS), HEAD_DIM, seed=seed) for seed in range(3))
    attended = attend_within_texts(batch, query, key, value, sliding_window=4)
    split = (tensor[0].transpose(0, 1).split(batch.lengths.tolist()) for tensor in (query, key, value))
    expected = [reference_attention(*text, 4, positions=own) for *text, own in zip(*split, positions, strict=True)]
    assert_close(attended, torch.cat(expected)[None], 1e-6)


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
def test_one_query_per_text_gives_what_full_attention_gives_to_first_tokens(kernel):
    batch, _ = pack_padded(mask_of(), kernel)
    query, key, value = (random_tensor(1, HEADS, sum(LENGTHS), HEAD_DIM, seed=seed) for seed in range(3))
    first = attend_within_texts(batch, query[:, :, batch.first_tokens], key, value, queries_per_text=1)
    everything = attend_within_texts(batch, query, key, value)
    assert first.shape == (1, len(LENGTHS), HEADS, HEAD_DIM)
    assert_close(first, everything[:, batch.first_tokens], 1e-6)


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
@pytest.mark.parametrize("lengths", [LENGTHS, (4,)])
def test_tokens_behind_those_of_the_batch_are_read_by_no_text_and_get_zeros(kernel, lengths):
    batch, _ = pack_padded(mask_of(lengths), kernel)
    given = [random_tensor(1, HEADS, sum(lengths) + 3, HEAD_DIM, seed=seed) for seed in range(3)]
    for tensor in given:
        tensor[:, :, sum(lengths) :] = float("nan")
    outputs = attend_within_texts(batch, *given)
    expected = attend_within_texts(batch, *(tensor[:, :, : sum(lengths)] for tensor in given))
    assert torch.equal(outputs[:, : sum(lengths)], expected)
    assert torch.equal(outputs[:, sum(lengths) :], torch.zeros(1, 3, HEADS, HEAD_DIM, dtype=outputs.dtype))


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
def test_dropout_falls_on_the_attention_weights_and_keeps_their_mean(kernel):
    torch.manual_seed(0)
    lengths = (40,) * 50
    batch, _ = pack_padded(mask_of(lengths), kernel)
    query, key = (random_tensor(1, HEADS, 2000, HEAD_DIM, seed=seed) for seed in range(2))
    value = torch.ones(1, HEADS, 2000, HEAD_DIM, dtype=torch.float64)
    without, dropped = (attend_within_texts(batch, query, key, value, dropout=rate) for rate in (0.0, 0.5))
    assert_close(without, torch.ones_like(without), 1e-6)
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert dropped.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_eager_attention_rounds_as_the_stock_one(dtype):
    batch, _ = pack_padded(mask_of((9, 9, 9)), "eager")
    packed = [random_tensor(1, HEADS, 27, HEAD_DIM, seed=seed).to(dtype) * 3 for seed in range(3)]
    attended = attend_within_texts(batch, *packed)
    texts = (tensor.view(HEADS, 3, 9, HEAD_DIM).transpose(0, 1) for tensor in packed)
    expected, _ = eager_attention_forward(torch.nn.Identity(), *texts, None)
    assert attended.dtype == dtype
    assert torch.equal(attended, expected.flatten(0, 1)[None])


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
def test_bfloat16_attention_stays_bfloat16(kernel):
    batch, _ = pack_padded(mask_of(), kernel)
    query, key, value = (random_tensor(1, HEADS, 32, HEAD_DIM, seed=seed).bfloat16() for seed in range(3))
    attended = attend_within_texts(batch, query, key, value, sliding_window=3)
    expected = attend_within_texts(batch, query.float(), key.float(), value.float(), sliding_window=3)
    assert attended.dtype == torch.bfloat16
    assert_close(attended.float(), expected, 0.05)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_rows_come_back_in_the_callers_order_whatever_it_is(lengths, random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    mask = mask_of(tuple(lengths))
    padded = random_tensor(*mask.shape, HEADS * HEAD_DIM)

    def attend(mask, padded):
        batch, padding = pack_padded(mask)
        states = padding.unpad(padded).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        return padding.pad(attend_within_texts(batch, states, states, states).flatten(2))

    assert_close(attend(mask[order], padded[order]), attend(mask, padded)[order], 1e-9)


def test_attention_function_without_a_packed_batch_says_what_to_call_instead():
    states = torch.zeros(1, HEADS, 4, HEAD_DIM)
    with pytest.raises(ValueError, match=r"cannot be called by itself.*model\.fastbert\(input_ids, attention_mask\)"):
        packed_attention(None, states, states, states, None)


def test_packed_attention_is_registered_with_transformers():
    assert ALL_ATTENTION_FUNCTIONS[PACKED_ATTENTION] is packed_attention
