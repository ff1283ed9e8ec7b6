from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastbert_hf.modeling.packed_batch import PackedBatch, pack_lists, pack_padded
from tests.common import ragged_batch


LENGTHS = (5, 1, 9, 5, 12)
STARTS_IN_ORDER_OF_LENGTH = [0, 1, 6, 11, 20]


def mask_of(lengths: tuple[int, ...] = LENGTHS, padding_side: str = "right") -> torch.Tensor:
    return ragged_batch(lengths, padding_side=padding_side)["attention_mask"]


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_pad_puts_every_token_back_and_zeros_at_padding(padding_side):
    mask = mask_of(padding_side=padding_side)
    padded = random_tensor(*mask.shape, 4)
    _, padding = pack_padded(mask)
    packed = padding.unpad(padded)
    assert packed.shape == (1, sum(LENGTHS), 4)
    assert torch.equal(padding.pad(packed), padded * mask[..., None])


def test_texts_are_packed_in_order_of_length_and_equally_long_ones_in_the_callers():
    batch, padding = pack_padded(mask_of())
    assert batch.rows.tolist() == [1, 0, 3, 2, 4]
    assert batch.lengths.tolist() == [1, 5, 5, 9, 12]
    assert batch.groups == [(1, 1), (2, 5), (1, 9), (1, 12)]
    assert batch.first_tokens.tolist() == STARTS_IN_ORDER_OF_LENGTH
    row_of_token = padding.unpad(torch.arange(5)[:, None].expand(5, 12))
    assert row_of_token[0].tolist() == [1] + [0] * 5 + [3] * 5 + [2] * 9 + [4] * 12


@pytest.mark.parametrize("extra_left", [0, 3])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_positions_count_from_the_first_token_of_each_text(padding_side, extra_left):
    mask = torch.nn.functional.pad(mask_of(padding_side=padding_side), (extra_left, 2))
    positions = pack_padded(mask)[0].position_ids
    assert positions.tolist() == [[place for length in sorted(LENGTHS) for place in range(length)]]


def test_unpad_gives_one_row_to_all_texts():
    mask = mask_of()
    places = torch.arange(12)[None]
    batch, padding = pack_padded(mask)
    assert torch.equal(padding.unpad(places), padding.unpad(places.expand(5, 12)))
    assert torch.equal(padding.unpad(places), batch.position_ids)


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


def test_rows_of_padding_only_are_named():
    mask = mask_of()
    mask[[1, 3]] = 0
    with pytest.raises(ValueError, match=r"rows \[1, 3\] hold padding only"):
        pack_padded(mask)


def test_rows_of_a_larger_batch_keep_their_numbers_and_are_named_by_them():
    mask, rows = mask_of(), torch.tensor([7, 3, 9, 4, 11])
    assert pack_padded(mask, rows=rows)[0].rows.tolist() == [3, 7, 4, 9, 11]
    mask[[1, 3]] = 0
    with pytest.raises(ValueError, match=r"rows \[3, 4\] hold padding only"):
        pack_padded(mask, rows=rows)


def test_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match="the batch has no rows"):
        pack_padded(torch.ones(0, 5))


def test_lists_are_packed_as_the_padded_texts_are():
    from_mask, _ = pack_padded(mask_of())
    from_lists = pack_lists([1, 0, 3, 2, 4], sorted(LENGTHS), torch.device("cpu"))
    for name in ("rows", "lengths", "position_ids"):
        assert torch.equal(getattr(from_lists, name), getattr(from_mask, name))


def test_batches_stand_side_by_side_with_everything_that_belongs_to_them():
    batch = pack_padded(mask_of())[0]
    rotary = {"full_attention": (random_tensor(1, 32, 2, seed=1), random_tensor(1, 32, 2, seed=2))}
    batch = replace(batch, position_embeddings=rotary)
    states = random_tensor(1, 32, 4)
    is_first = torch.tensor([True, False, True, False, False])
    parts = [batch.keep(kept, states) for kept in (is_first, ~is_first)]
    joined, (first, second) = PackedBatch.join([part for part, _ in parts]), (part for part, _ in parts)
    assert joined.rows.tolist() == [1, 3, 0, 2, 4]
    assert joined.lengths.tolist() == [1, 5, 5, 9, 12]
    assert joined.groups == [(1, 1), (2, 5), (1, 9), (1, 12)]
    assert joined.total_tokens == 32
    assert torch.equal(joined.position_ids, torch.cat([first.position_ids, second.position_ids], 1))
    for index in (0, 1):
        own = [part.position_embeddings["full_attention"][index] for part in (first, second)]
        assert torch.equal(joined.position_embeddings["full_attention"][index], torch.cat(own, 1))
