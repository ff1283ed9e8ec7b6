"""Texts that become shorter on their way: what is kept and merged, what never changes, and what a call may ask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbert_hf import CascadeForSequenceClassification, FastBertConfig, FastBertForSequenceClassification
from fastbert_hf.evaluation import record_exits
from fastbert_hf.evaluation.flops import executed_flops
from fastbert_hf.evaluation.replay import replay_at_speed
from fastbert_hf.modeling import packed_attention
from fastbert_hf.modeling.packed_attention import attend_within_texts
from fastbert_hf.modeling.packed_batch import PackedBatch, pack_lists
from fastbert_hf.modeling.token_coarsening import Coarsening, take

from ..common import FAMILIES, assert_close, ragged_batch, spread_out, tiny_model, tiny_rows


SCHEDULE = {"layers": [1, 2, 4], "retention": [0.8, 0.5, 0.3]}
KINDS = [
    {"merge": "drop"},
    {"merge": "mean"},
    {"merge": "mean", "size_aware": False},
    {"merge": "weighted", "clusters": 3},
    {"merge": "mean", "clusters": 2, "size_aware": False},
]


def batch_of(lengths: list[int]) -> PackedBatch:
    return pack_lists(list(range(len(lengths))), sorted(lengths), torch.device("cpu"))


def shortened(coarsening: Coarsening, lengths: list[int], depth: int = 1) -> tuple:
    """States, scores and batch before the coarsening, and states and batch after it."""
    generator = torch.Generator().manual_seed(3)
    batch = batch_of(lengths)
    states = torch.randn(1, batch.total_tokens, 8, generator=generator, dtype=torch.double)
    received = [torch.rand(texts, length, generator=generator) for texts, length in batch.groups]
    return states, received, batch, *coarsening.shorten(depth, states, replace(batch, received=received))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_token_is_in_one_unit_and_the_lengths_are_those_of_the_schedule(kind):
    coarsening = Coarsening({1: 0.5}, **kind)
    *_, new_states, new = shortened(coarsening, [1, 2, 5, 5, 8, 21])
    coarse = 0 if kind["merge"] == "drop" else kind.get("clusters", 1)
    expected = [max(min(n, -(-n // 2)), min(n, 1 + coarse)) for n in (1, 2, 5, 5, 8, 21)]
    assert new.lengths.tolist() == expected and new_states.shape[1] == sum(expected) == new.total_tokens
    assert new.text_lengths.tolist() == [1, 2, 5, 5, 8, 21]
    units = new.unit_of[0].split([1, 2, 5, 5, 8, 21])
    sizes = new.sizes[0].split(expected)
    for own, own_sizes, length, short in zip(units, sizes, (1, 2, 5, 5, 8, 21), expected, strict=True):
        if kind["merge"] == "drop":
            assert sorted(own[own >= 0].tolist()) == list(range(short)) and (own_sizes == 1).all()
        else:
            assert own.bincount(minlength=short).tolist() == own_sizes.tolist() and own_sizes.sum() == length
        assert own[0] == 0  # the first token stays where it is


def test_the_best_stay_in_their_order_and_the_rest_is_their_mean():
    coarsening = Coarsening({1: 0.5})
    states, (scores,), _, new_states, new = shortened(coarsening, [8])
    best = scores[0, 1:].topk(2).indices.sort().values + 1
    kept = torch.cat([torch.tensor([0]), best])
    rest = torch.tensor([place for place in range(8) if place not in kept.tolist()])
    assert torch.equal(new_states[0, :3], states[0, kept])
    assert_close(new_states[0, 3], states[0, rest].mean(0), 1e-12)
    assert new.sizes.tolist() == [[1, 1, 1, 5]] and torch.equal(new.position_ids[0, :3], kept)
    assert new.position_ids[0, 3] == rest[scores[0, rest].argmax()]
    # Each token gets the state of its unit.
    assert torch.equal(new.unpack(new_states)[0, rest], new_states[0, [3] * 5])
    # A second time, the coarse one counts five times.
    again, other = Coarsening({2: 0.25}).shorten(2, new_states, replace(new, received=[torch.zeros(1, 4)]))
    assert other.sizes.tolist() == [[1, 7]]
    assert_close(again[0, 1], states[0, 1:].mean(0), 1e-12)
    assert other.unit_of.tolist() == [[0] + [1] * 7]


def test_weights_are_shares():
    """As in the paper, but weighted means keep their size: the original divides once more by the number of tokens."""
    for kind in KINDS[1:]:
        coarsening = Coarsening({1: 0.3}, **kind)
        batch = batch_of([10, 10, 17])
        received = [torch.rand(texts, length) for texts, length in batch.groups]
        ones = torch.ones(1, batch.total_tokens, 4)
        new_states, _ = coarsening.shorten(1, ones, replace(batch, received=received))
        assert_close(new_states, torch.ones_like(new_states))


def test_equal_tokens_merged_by_size_leave_attention_as_it_was():
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4, generator=generator, dtype=torch.double)
    key[..., 4, :], value[..., 4, :] = key[..., 3, :], value[..., 3, :]
    before = attend_within_texts(batch_of([5]), query, key, value)
    batch = replace(batch_of([4]), sizes=torch.tensor([[1, 1, 1, 2]]), size_aware=True)
    after = attend_within_texts(batch, *(tensor[..., :4, :] for tensor in (query, key, value)))
    assert_close(after, before[:, :4], 1e-12)
    # With a window, too.
    windowed = attend_within_texts(batch, *(tensor[..., :4, :] for tensor in (query, key, value)), sliding_window=2)
    assert windowed.isfinite().all() and not torch.allclose(windowed, after)


def test_what_is_received_is_what_the_maps_say():
    generator = torch.Generator().manual_seed(0)
    batch = batch_of([3, 3, 6])
    query, key, value = torch.randn(3, 1, 2, 12, 4, generator=generator)
    received = []
    output = attend_within_texts(replace(batch, received=received), query, key, value)
    assert_close(output, attend_within_texts(batch, query, key, value))
    first, second = received
    maps = (query[0, :, 6:] @ key[0, :, 6:].transpose(1, 2) / 2).softmax(-1).mean(0)
    assert_close(second[0], maps.sum(0) - maps.diagonal())
    assert first.shape == (2, 3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_answers_depend_on_their_own_text_alone(family, kind):
    model = tiny_model(family, coarsening={**SCHEDULE, **kind}, exit_type="linear_mean")
    batch = ragged_batch(pad_token_id=model.config.pad_token_id or 0)
    with torch.no_grad():
        together = model(**batch).logits
        mask = batch["attention_mask"].bool()
        alone = [
            model(**{name: column[row][mask[row]][None] for name, column in batch.items()}).logits
            for row in range(len(mask))
        ]
        padding = {"input_ids": model.config.pad_token_id or 0}
        wider = {
            name: torch.nn.functional.pad(column, (4, 0), value=padding.get(name, 0)) for name, column in batch.items()
        }
        assert_close(model(**wider).logits, together)
    assert_close(torch.cat(alone), together)
    rows = [{"input_ids": column[own].tolist()} for column, own in zip(batch["input_ids"], mask, strict=True)]
    predicted = torch.stack([answer.logits for answer in model.predict(rows, batch_tokens=40)])
    only_ids = model(batch["input_ids"], batch["attention_mask"]).logits.detach()
    assert_close(predicted, only_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_retention_is_the_model_without(family):
    model = tiny_model(family)
    batch = ragged_batch(pad_token_id=model.config.pad_token_id or 0)
    with torch.no_grad():
        before = model(**batch, output_exit_logits=True).exit_logits
        model.config.coarsening = {"layers": [1, 2], "retention": [1.0, 1.0]}
        assert torch.equal(model(**batch, output_exit_logits=True).exit_logits, before)
        model.config.coarsening = {**SCHEDULE}
        assert torch.equal(model(**batch, output_exit_logits=True, retention=1.0).exit_logits, before)
        assert not torch.allclose(model(**batch).logits, before[:, -1])
        # So high that no token of these texts is merged, with the maps formed nevertheless.
        model.config.coarsening = {"layers": [1, 2], "retention": [0.999, 0.998]}
        assert_close(model(**batch, output_exit_logits=True).exit_logits, before)


def test_retention_scales_the_schedule():
    def schedule(retention):
        return Coarsening.of(SCHEDULE, retention).retention

    assert schedule(None) == {1: 0.8, 2: 0.5, 4: 0.3}
    assert schedule(0.3) == pytest.approx(schedule(None))
    assert schedule(0.65) == pytest.approx({1: 0.9, 2: 0.75, 4: 0.65})
    assert min(schedule(0.01).values()) == pytest.approx(0.01)
    assert Coarsening.of(SCHEDULE, 1.0) is None and Coarsening.of(None) is None
    # A schedule that keeps everything becomes one where the call asks for less.
    assert Coarsening.of({"layers": [2], "retention": [1.0]}, 0.5).retention == {2: 0.5}
    assert Coarsening.of({"layers": [2], "retention": [1.0]}) is None


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_exits_replay_and_cost(kind):
    model = tiny_model(coarsening={**SCHEDULE, **kind})
    rows = tiny_rows(24)
    rows = [{"input_ids": row["input_ids"][row["attention_mask"].bool()].tolist()} for row in rows]
    record = record_exits(model, rows, progress=False)
    for speed in (0.0, 0.4, 0.8):
        answers = list(model.predict(rows, speed=speed))
        replayed = replay_at_speed(record, model.config, speed)
        assert [answer.exit_layer for answer in answers] == replayed.exit_layer.tolist()
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    depth = torch.full_like(lengths, model.config.num_hidden_layers)
    model.set_attn_implementation("eager")  # of fused kernels the counter does not know all
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        list(model.predict(rows, speed=0.0))
    charged = executed_flops(model, depth, lengths, students=False).sum().item()
    assert charged == counter.get_total_flops()
    assert charged < executed_flops(tiny_model(), depth, lengths, students=False).sum().item()


def test_gradients_reach_every_layer():
    for kind in KINDS:
        model = tiny_model(coarsening={**SCHEDULE, **kind}).train()
        batch = ragged_batch()
        model(**batch, labels=torch.zeros(7, dtype=torch.long)).loss.backward()
        for layer in model.fastbert.layers():
            assert all(weight.grad.any() for name, weight in layer.named_parameters() if "key.bias" not in name)


def test_hidden_states_of_all_tokens():
    model = tiny_model(coarsening=SCHEDULE)
    batch = ragged_batch()
    states = model(**batch, output_hidden_states=True).hidden_states
    assert all(state.shape == states[0].shape for state in states)
    mask = batch["attention_mask"].bool()
    assert all(state[~mask].eq(0).all() and state[mask].any(-1).all() for state in states)
    drop = {**SCHEDULE, "merge": "drop"}
    dropped = tiny_model(coarsening=drop)
    last = dropped(**batch, output_hidden_states=True).hidden_states[-1]
    lengths = mask.sum(1)
    assert last.any(-1).sum(1).tolist() == Coarsening.of(drop).units(4, lengths, lengths).tolist()


def test_saved_and_in_a_cascade(tmp_path):
    model = tiny_model(coarsening=SCHEDULE)
    model.save_pretrained(tmp_path)
    loaded = FastBertForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.coarsening == SCHEDULE
    batch = ragged_batch()
    assert_close(loaded(**batch).logits, model(**batch).logits)
    small = spread_out(tiny_model(seed=1), 1)
    cascade = CascadeForSequenceClassification.from_members([small, model]).eval()
    assert_close(cascade(**batch).logits, model(**batch).logits)
    assert_close(cascade(**batch, retention=1.0).logits, model(**batch, retention=1.0).logits)
    masks = batch["attention_mask"].bool()
    rows = [{"input_ids": ids[mask].tolist()} for ids, mask in zip(batch["input_ids"], masks, strict=True)]
    answers = list(cascade.predict(rows, speed=0.5, retention=0.6))
    assert all(answer.logits.isfinite().all() for answer in answers)


def test_half_precision():
    model = tiny_model(coarsening=SCHEDULE)
    batch = ragged_batch()
    with torch.no_grad():
        full = model(**batch).logits
        half = model.bfloat16()(**batch).logits
    assert half.isfinite().all() and (half.float() - full).abs().max() < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1]}, "layers and retention"),
        ({"layers": [2, 1], "retention": [0.5, 0.4]}, "rising order"),
        ({"layers": [9], "retention": [0.5]}, "from 1 to 4"),
        ({"layers": [1, 2], "retention": [0.4, 0.5]}, "none greater"),
        ({"layers": [1], "retention": [0.0]}, r"\(0, 1\]"),
        ({"layers": [1], "retention": [float("nan")]}, r"\(0, 1\]"),
        ({**SCHEDULE, "merge": "max"}, "one of mean, weighted, drop"),
        ({**SCHEDULE, "clusters": 0}, "from 1 to 512"),
        ({**SCHEDULE, "size_aware": 1}, "True or False"),
        ({**SCHEDULE, "keep": 3}, "no field 'keep'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    config = tiny_model().config
    with pytest.raises(ValueError, match=message):
        FastBertConfig(text_config=config.text_config, coarsening=settings)


def test_bad_retention_is_refused():
    model, batch = tiny_model(coarsening=SCHEDULE), ragged_batch()
    for value in (0, -1, 1.5, float("nan"), "half", True):
        with pytest.raises(ValueError, match="retention must be a number in"):
            model(**batch, retention=value)
        with pytest.raises(ValueError, match="retention must be a number in"):
            model.predict([{"input_ids": [1]}], retention=value)
    with pytest.raises(ValueError, match="has no meaning"):
        tiny_model()(**batch, retention=0.5)
    assert tiny_model()(**batch, retention=1).logits.isfinite().all()


def test_take_reads_the_places_of_each_text():
    states = torch.arange(12.0).view(2, 3, 2)
    assert take(states, torch.tensor([[2], [0]])).tolist() == [[[4.0, 5.0]], [[6.0, 7.0]]]


@pytest.mark.parametrize("numbers", [1, 200, 900, 4000])
def test_maps_in_pieces_say_what_whole_ones_say(numbers, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, 4, 9, 8, generator=generator) for _ in range(3))
    mask = torch.rand(5, 1, 1, 9, generator=generator).log()
    whole, pieces = [], []
    expected = packed_attention.attend_and_note(whole, query, key, value, mask, 0.0, None)
    monkeypatch.setitem(packed_attention.NUMBERS_OF_MAPS, "cpu", numbers)
    assert_close(packed_attention.attend_and_note(pieces, query, key, value, mask, 0.0, None), expected)
    assert_close(pieces[0], whole[0])
