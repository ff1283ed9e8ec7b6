from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastbert_hf.modeling.packed_batch import (
    INNER_ATTENTIONS,
    PACKED_ATTENTION,
    attend_within_texts,
    pack_padded,
    packed_attention,
)
from tests.common import assert_close, ragged_batch


LENGTHS = (5, 1, 9, 5, 12)
STARTS_IN_ORDER_OF_LENGTH = [0, 1, 6, 11, 20]
HEADS, HEAD_DIM = 2, 3


def mask_of(lengths: tuple[int, ...] = LENGTHS, padding_side: str = "right") -> torch.Tensor:
    return ragged_batch(lengths, padding_side=padding_side)["attention_mask"]


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_attention(query, key, value, sliding_window=None, scaling=None):
    """Attention of one text, `[tokens, heads, head_dim]` each, from the definition."""
    scores = torch.einsum("ihd,jhd->hij", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if sliding_window is not None:
        for i in range(query.shape[0]):
            for j in range(key.shape[0]):
                if abs(i - j) >= sliding_window:
                    scores[:, i, j] = float("-inf")
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("hij,jhd->ihd", weights, value)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_unpack_puts_every_token_back_and_zeros_at_padding(padding_side):
    mask = mask_of(padding_side=padding_side)
    padded = random_tensor(*mask.shape, 4)
    _, layout = pack_padded(mask)
    packed = layout.pack(padded)
    assert packed.shape == (1, sum(LENGTHS), 4)
    assert torch.equal(layout.unpack(packed), padded * mask[..., None])


def test_texts_are_packed_in_order_of_length_and_equally_long_ones_in_the_callers():
    batch, layout = pack_padded(mask_of())
    assert batch.rows.tolist() == [1, 0, 3, 2, 4]
    assert batch.lengths.tolist() == [1, 5, 5, 9, 12]
    assert batch.groups == [(1, 1), (2, 5), (1, 9), (1, 12)]
    assert batch.first_tokens.tolist() == STARTS_IN_ORDER_OF_LENGTH
    row_of_token = layout.pack(torch.arange(5)[:, None].expand(5, 12))
    assert row_of_token[0].tolist() == [1] + [0] * 5 + [3] * 5 + [2] * 9 + [4] * 12


@pytest.mark.parametrize("extra_left", [0, 3])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_positions_count_from_the_first_token_of_each_text(padding_side, extra_left):
    mask = torch.nn.functional.pad(mask_of(padding_side=padding_side), (extra_left, 2))
    positions = pack_padded(mask)[0].position_ids
    assert positions.tolist() == [[place for length in sorted(LENGTHS) for place in range(length)]]


def test_pack_gives_one_row_to_all_texts():
    mask = mask_of()
    places = torch.arange(12)[None]
    batch, layout = pack_padded(mask)
    assert torch.equal(layout.pack(places), layout.pack(places.expand(5, 12)))
    assert torch.equal(layout.pack(places), batch.position_ids)


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.bool, torch.float32])
def test_mask_may_be_of_any_dtype(dtype):
    batch, _ = pack_padded(mask_of().to(dtype))
    assert batch.lengths.tolist() == [1, 5, 5, 9, 12]
    assert batch.position_ids.tolist() == pack_padded(mask_of())[0].position_ids.tolist()


def test_keep_leaves_the_texts_that_go_on_and_everything_that_belongs_to_them():
    hidden_states = random_tensor(1, sum(LENGTHS), 4)
    cos, sin = random_tensor(1, sum(LENGTHS), 2, seed=1), random_tensor(1, sum(LENGTHS), 2, seed=2)
    batch = replace(pack_padded(mask_of())[0], position_embeddings={"full_attention": (cos, sin)})
    assert batch.first_tokens.tolist() == STARTS_IN_ORDER_OF_LENGTH

    smaller, kept_states = batch.keep(torch.tensor([False, True, False, True, True]), hidden_states)
    tokens = [*range(1, 6), *range(11, 20), *range(20, 32)]
    assert smaller.rows.tolist() == [0, 2, 4]
    assert smaller.lengths.tolist() == [5, 9, 12]
    assert smaller.groups == [(1, 5), (1, 9), (1, 12)]
    assert smaller.first_tokens.tolist() == [0, 5, 14]
    assert torch.equal(kept_states, hidden_states[:, tokens])
    assert torch.equal(smaller.position_ids, batch.position_ids[:, tokens])
    assert torch.equal(smaller.position_embeddings["full_attention"][0], cos[:, tokens])
    assert torch.equal(smaller.position_embeddings["full_attention"][1], sin[:, tokens])
    assert batch.lengths.tolist() == [1, 5, 5, 9, 12]


@pytest.mark.parametrize("kernel", INNER_ATTENTIONS)
@pytest.mark.parametrize("sliding_window", [None, 1, 2, 5, 8, 9, 100])
@pytest.mark.parametrize("scaling", [None, 0.3])
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


@pytest.mark.parametrize("kernel", INNER_ATTENTIONS)
def test_first_token_only_gives_what_full_attention_gives_to_first_tokens(kernel):
    batch, _ = pack_padded(mask_of(), kernel)
    query, key, value = (random_tensor(1, HEADS, sum(LENGTHS), HEAD_DIM, seed=seed) for seed in range(3))
    first = attend_within_texts(batch, query[:, :, batch.first_tokens], key, value, first_token_only=True)
    everything = attend_within_texts(batch, query, key, value)
    assert first.shape == (1, len(LENGTHS), HEADS, HEAD_DIM)
    assert_close(first, everything[:, batch.first_tokens], 1e-6)


@pytest.mark.parametrize("kernel", INNER_ATTENTIONS)
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


@pytest.mark.parametrize("kernel", INNER_ATTENTIONS)
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
        batch, layout = pack_padded(mask)
        states = layout.pack(padded).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        return layout.unpack(attend_within_texts(batch, states, states, states).flatten(2))

    assert_close(attend(mask[order], padded[order]), attend(mask, padded)[order], 1e-9)


def test_rows_of_padding_only_are_named():
    mask = mask_of()
    mask[[1, 3]] = 0
    with pytest.raises(ValueError, match=r"rows \[1, 3\] hold padding only"):
        pack_padded(mask)


def test_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match="the batch has no rows"):
        pack_padded(torch.ones(0, 5))


def test_attention_function_without_a_packed_batch_says_what_to_call_instead():
    states = torch.zeros(1, HEADS, 4, HEAD_DIM)
    with pytest.raises(ValueError, match=r"cannot be called by itself.*model\.fastbert\(input_ids, attention_mask\)"):
        packed_attention(None, states, states, states, None)


def test_packed_attention_is_registered_with_transformers():
    assert ALL_ATTENTION_FUNCTIONS[PACKED_ATTENTION] is packed_attention
