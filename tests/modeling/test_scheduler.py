"""The one loop over depth, members and batches, with an engine of a few lines that knows where each text leaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert_hf.modeling import scheduler
from fastbert_hf.modeling.encoded_texts import EncodedText
from fastbert_hf.modeling.exit_policies import ExitPolicy, exit_thresholds
from fastbert_hf.modeling.modeling_outputs import Prediction
from fastbert_hf.modeling.packed_batch import PackedBatch, pack_lists
from fastbert_hf.modeling.scheduler import Member, Trace, answer_rows, cut_batches
from tests.common import one_label


NUM_LAYERS = 4
SURE = 1000.0  # a logit whose softmax rounds to 1
CPU = torch.device("cpu")
ENTROPY = ExitPolicy("entropy", one_label())
LENGTHS = (9, 3, 17, 1, 9, 30, 2, 12, 5, 9, 21, 3, 3, 14, 40, 8)


class FakeEngine:
    """
    Gives every token its id and the number of layers that it ran through. The first token of a text names the first
    layer whose exit is sure of it, the other tokens are 0; exits answer 1 if they are sure, and know nothing if not.
    """

    def __init__(self, num_layers: int = NUM_LAYERS):
        self.num_layers, self.device, self.checks, self.session = num_layers, CPU, True, nullcontext
        self.calls: list[tuple[str, int, int]] = []  # ("layer", depth, tokens) or ("exit", depth, texts)

    def embed(self, packed_batch: PackedBatch, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, PackedBatch]:
        ids = inputs["input_ids"].float()
        self.calls.append(("embed", 0, packed_batch.total_tokens))
        assert ids.shape == (1, packed_batch.total_tokens) == packed_batch.position_ids.shape
        return torch.stack([ids, torch.zeros_like(ids)], -1), packed_batch

    def run_layer(
        self, depth: int, hidden_states: torch.Tensor, packed_batch: PackedBatch
    ) -> tuple[torch.Tensor, PackedBatch]:
        self.calls.append(("layer", depth, packed_batch.total_tokens))
        assert hidden_states.shape[1] == packed_batch.lengths.sum() == packed_batch.total_tokens
        return hidden_states + torch.tensor([0.0, 1.0]), packed_batch

    def exit_logits(self, depth: int, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        self.calls.append(("exit", depth, len(packed_batch.rows)))
        sure_at, layers_run = hidden_states[0, packed_batch.first_tokens].unbind(-1)
        if self.checks:
            assert (sure_at > 0).all()  # only the first token of a text
            assert (layers_run == depth).all()
        sure = SURE * (sure_at <= depth)
        return torch.stack([torch.zeros_like(sure), sure], -1)

    def tokens(self, depth: int) -> list[int]:
        """Return the tokens of each batch that ran through a layer."""
        return [number for what, where, number in self.calls if (what, where) == ("layer", depth)]

    def texts_asked(self) -> dict[int, int]:
        """Return of how many texts each exit was asked."""
        asked = {}
        for what, depth, number in self.calls:
            if what == "exit":
                asked[depth] = asked.get(depth, 0) + number
        return asked


def text_of(sure_at: int, length: int) -> dict[str, list[int]]:
    return {"input_ids": [sure_at] + [0] * (length - 1)}


def stream(texts: list[tuple[int, int]], speed: float | list[float] = 0.5) -> Iterator[EncodedText]:
    """Texts by the layer at which they leave and their length."""
    speeds = speed if isinstance(speed, list) else [speed] * len(texts)
    for position, (text, own_speed) in enumerate(zip(texts, speeds, strict=True)):
        yield EncodedText(position, [text_of(*text)], own_speed)


def answers_of(
    texts: Iterator[EncodedText],
    *engines: FakeEngine,
    batch_size: int | None = None,
    batch_tokens: int = 100,
    rebatch: bool = True,
    exit_policy: str = "entropy",
    **limits,
) -> Iterator[Prediction]:
    """What the scheduler answers with these engines as the members."""
    model = SimpleNamespace(training=False, device=CPU, config=SimpleNamespace(_attn_implementation="sdpa"))
    policy = ExitPolicy(exit_policy, one_label(), patience=2)

    def thresholds_at(speeds: torch.Tensor) -> list[torch.Tensor]:
        return [
            exit_thresholds(speeds, engine.num_layers, is_last_member=engine is engines[-1], **limits)
            for engine in engines
        ]

    return scheduler.answer_texts(model, engines, texts, thresholds_at, policy, batch_size, batch_tokens, rebatch)


def full_batch(texts: list[tuple[int, int]], speeds: torch.Tensor) -> Member:
    """The only member of a call whose texts are one batch."""
    engine, order = FakeEngine(), sorted(range(len(texts)), key=lambda row: texts[row][1])
    packed_batch = pack_lists(order, [texts[row][1] for row in order], CPU)
    ids = torch.tensor([[number for row in order for number in text_of(*texts[row])["input_ids"]]])
    thresholds = exit_thresholds(speeds, NUM_LAYERS)
    return Member(engine, thresholds, lambda rows: [engine.embed(packed_batch, {"input_ids": ids})])


def mixed_texts(times: int = 1) -> list[tuple[int, int]]:
    """Return texts of all lengths, as many of them for each exit."""
    return [(1 + index % NUM_LAYERS, length) for index, length in enumerate(LENGTHS * times)]


texts_of_any_kind = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 40)), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    texts_of_any_kind,
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=30, max_size=30),
    st.sampled_from([None, 1, 2, 7]),
    st.integers(1, 200),
    st.booleans(),
    st.integers(1, NUM_LAYERS),
    st.integers(1, NUM_LAYERS),
)
def test_every_text_leaves_at_its_exit_and_no_layer_or_exit_sees_it_afterwards(
    texts, speeds, batch_size, batch_tokens, rebatch, one, other
):
    engine, speeds, (first, last) = FakeEngine(), speeds[: len(texts)], sorted((one, other))
    limits = {"min_exit_layer": first, "max_layers": last}
    answers = list(
        answers_of(
            stream(texts, speeds),
            engine,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            rebatch=rebatch,
            **limits,
        )
    )
    expected = [
        last if speed == 0 else min(max(sure_at, first), last)
        for (sure_at, _), speed in zip(texts, speeds, strict=True)
    ]
    assert [answer.exit_layer for answer in answers] == expected
    assert [answer.exit_member for answer in answers] == [1] * len(texts)
    for answer, (sure_at, _), depth in zip(answers, texts, expected, strict=True):
        is_sure = sure_at <= depth
        assert answer.logits.tolist() == [0, SURE * is_sure]
        assert answer.uncertainty == (0 if is_sure else 1)
    for depth in range(1, NUM_LAYERS + 1):
        still_here = [length for (_, length), layer in zip(texts, expected, strict=True) if layer >= depth]
        assert sum(engine.tokens(depth)) == sum(still_here)
        # An exit that may answer nobody of a batch is not evaluated.
        nobody = depth < first or (depth < last and not any(speeds))
        assert engine.texts_asked().get(depth, 0) <= (0 if nobody else len(still_here))


def test_at_speed_0_the_last_exit_alone_is_evaluated_and_beside_faster_rows_only_where_they_are():
    engine = FakeEngine()
    assert {answer.exit_layer for answer in answers_of(stream(mixed_texts(), 0.0), engine)} == {NUM_LAYERS}
    assert engine.texts_asked() == {NUM_LAYERS: len(LENGTHS)}
    engine = FakeEngine()
    answers = list(answers_of(stream([(1, 5), (1, 5), (1, 5)], [1.0, 0.0, 0.0]), engine))
    assert [answer.exit_layer for answer in answers] == [1, NUM_LAYERS, NUM_LAYERS]
    assert engine.texts_asked() == {1: 3, NUM_LAYERS: 2}


def test_no_layer_runs_after_every_text_has_left():
    engine = FakeEngine()
    list(answers_of(stream([(2, 5)] * 7), engine))
    assert [call[:2] for call in engine.calls] == [("embed", 0), ("layer", 1), ("exit", 1), ("layer", 2), ("exit", 2)]


def test_rebatching_joins_small_batches_and_no_large_ones():
    apart, joined = FakeEngine(), FakeEngine()
    for engine in (apart, joined):
        list(answers_of(stream(mixed_texts(4)), engine, rebatch=engine is joined))
    assert joined.tokens(1) == apart.tokens(1)
    assert sum(joined.tokens(4)) == sum(apart.tokens(4))
    assert len(joined.tokens(4)) < len(apart.tokens(4))
    assert max(joined.tokens(2) + joined.tokens(3) + joined.tokens(4)) <= 100 + max(LENGTHS)
    for engine in (apart, joined):
        engine.calls.clear()
        list(answers_of(stream(mixed_texts(4), 0.0), engine, rebatch=engine is joined))
    assert joined.calls == apart.calls  # nobody left, so there is nothing to join


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 8))
def test_batches_hold_texts_of_similar_length_and_about_as_many_tokens(lengths, number):
    batches = cut_batches(dict(enumerate(lengths)), number)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert [lengths[row] for batch in batches for row in batch] == sorted(lengths)
    share = sum(lengths) / number
    assert all(sum(lengths[row] for row in batch) <= share + max(lengths) for batch in batches)


def test_one_wait_for_the_device_at_each_exit(monkeypatch):
    """`cpu()`, `item()` and `bool()` of what layers and exits computed would wait; one for each exit is needed."""
    member, waits = full_batch([(1, 3), (2, 4), (9, 5)], torch.full((3,), 0.5)), []
    for name in ("cpu", "item", "__bool__"):
        stock = getattr(torch.Tensor, name)

        def counted(tensor, *args, stock=stock, name=name, **kwargs):
            if tensor.is_floating_point():
                waits.append((member.engine.calls[-1][:2], name))
            return stock(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    member.engine.checks = False  # they wait, where a real engine does not
    assert answer_rows([member], ENTROPY).exit_layer.tolist() == [1, 2, NUM_LAYERS]
    # At the last exit all leave, whatever it says.
    assert waits == [(("exit", depth), "cpu") for depth in (1, 2, 3)]


def test_patience_remembers_each_text_through_leaving_and_rebatching():
    # Exits agree from the layer at which they are sure; before it they answer 0 as one.
    texts = mixed_texts(4)
    answers = list(answers_of(stream(texts), FakeEngine(7), exit_policy="patience", batch_tokens=64))
    # Two agreements in a row below the sure layer, else two after it.
    expected = [3 if sure_at >= 4 else max(sure_at + 2, 3) for sure_at, _ in texts]
    assert [answer.exit_layer for answer in answers] == expected
    assert {answer.uncertainty for answer in answers} == {0.0}


# Cascades


def cascade_stream(texts: list[tuple[int, int, int]], speeds: list[float]) -> Iterator[EncodedText]:
    """Texts of two members, each with tokens of its own: where each is sure of it, and its length for the first."""
    for position, ((small, large, length), speed) in enumerate(zip(texts, speeds, strict=True)):
        of_small = text_of(small, length) if speed > 0 else None
        yield EncodedText(position, [of_small, text_of(large, length + 1)], speed)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 30)), min_size=1, max_size=20),
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=20, max_size=20),
    st.integers(1, 150),
    st.booleans(),
)
def test_a_member_runs_on_what_those_before_it_left_open_alone(texts, speeds, batch_tokens, rebatch):
    small, large, speeds = FakeEngine(2), FakeEngine(4), speeds[: len(texts)]
    answers = list(answers_of(cascade_stream(texts, speeds), small, large, batch_tokens=batch_tokens, rebatch=rebatch))
    expected = []
    for (at_small, at_large, _), speed in zip(texts, speeds, strict=True):
        if speed > 0 and at_small <= 2:
            expected.append((1, at_small))
        else:
            layers = min(at_large, 4) if speed > 0 else 4
            expected.append((2, layers + (2 if speed > 0 else 0)))
    assert [(answer.exit_member, answer.exit_layer) for answer in answers] == expected
    asked = [length for (_, _, length), speed in zip(texts, speeds, strict=True) if speed > 0]
    gone_on = [length + 1 for (_, _, length), (member, _) in zip(texts, expected, strict=True) if member == 2]
    assert sum(small.tokens(1)) == sum(asked)
    assert sum(large.tokens(1)) == sum(gone_on)
    # The last exit of a member that is not the last one answers below the speed only.
    assert all(answer.uncertainty == 0 for answer in answers if answer.exit_member == 1)


def test_a_member_that_is_not_a_number_answers_in_no_other_members_place():
    small, large = FakeEngine(1), FakeEngine(1)
    small.exit_logits = lambda depth, states, batch: torch.full((len(batch.rows), 2), torch.nan)
    with pytest.raises(ValueError, match="the logits of text 0 are not finite"):
        list(answers_of(cascade_stream([(1, 1, 3)], [1.0]), small, large))
    assert large.calls == []


# Full depth, and layers that shorten the row


def test_a_trace_keeps_every_exit_and_state_in_packed_order():
    texts, trace = [(3, 4), (1, 2), (9, 3)], Trace(every_exit=True, every_state=True)
    answers = answer_rows([full_batch(texts, torch.zeros(3))], ENTROPY, trace=trace)
    assert answers.exit_layer.tolist() == [NUM_LAYERS] * 3
    assert answers.logits[:, 1].tolist() == [SURE, SURE, 0]
    said = torch.stack(trace.exit_logits, 1)[..., 1]  # [texts, L], shortest text first
    assert said.tolist() == [[SURE * (sure_at <= depth) for depth in range(1, 5)] for sure_at in (1, 9, 3)]
    assert [states[0, 0].tolist() for states in trace.hidden_states] == [[1.0, float(depth)] for depth in range(5)]


class HalvingEngine(FakeEngine):
    """Drops every second token of each text in its second layer, as a layer that merges tokens does."""

    def run_layer(
        self, depth: int, hidden_states: torch.Tensor, packed_batch: PackedBatch
    ) -> tuple[torch.Tensor, PackedBatch]:
        hidden_states, packed_batch = super().run_layer(depth, hidden_states, packed_batch)
        if depth == 2:
            kept = packed_batch.position_ids[0] % 2 == 0
            packed_batch = replace(
                packed_batch,
                lengths=(packed_batch.lengths + 1) // 2,
                position_ids=packed_batch.position_ids[:, kept],
            )
            hidden_states = hidden_states[:, kept]
        return hidden_states, packed_batch


@pytest.mark.parametrize("rebatch", [True, False])
def test_a_layer_may_shorten_its_texts(rebatch):
    texts, engine = mixed_texts(3), HalvingEngine()
    answers = list(answers_of(stream(texts), engine, rebatch=rebatch))
    assert [answer.exit_layer for answer in answers] == [sure_at for sure_at, _ in texts]
    assert sum(engine.tokens(2)) == sum(length for sure_at, length in texts if sure_at >= 2)
    assert sum(engine.tokens(3)) == sum((length + 1) // 2 for sure_at, length in texts if sure_at >= 3)


# Streams


def counted(texts: list[tuple[int, int]], read: list[EncodedText], error: Exception | None = None):
    for text in stream(texts):
        read.append(text)
        yield text
    if error is not None:
        raise error


def test_a_stream_is_read_a_bounded_number_of_tokens_ahead():
    read: list[EncodedText] = []
    answers = answers_of(counted([(2, 10)] * 400, read), FakeEngine(), batch_tokens=20)
    for number, _ in enumerate(answers, start=1):
        assert len(read) - number < scheduler.BLOCK_BATCHES * 20 / 10
    assert number == 400


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_batch_size_reads_so_many_texts_and_answers_them_before_the_next(batch_size):
    read, engine = [], FakeEngine()
    answers = answers_of(counted(mixed_texts(), read), engine, batch_size=batch_size, batch_tokens=20)
    for number, _ in enumerate(answers):
        assert len(read) == (number // batch_size + 1) * batch_size
    assert engine.tokens(1) == [
        sum(LENGTHS[start : start + batch_size]) for start in range(0, len(LENGTHS), batch_size)
    ]


def test_a_consumer_may_stop_early():
    read: list[EncodedText] = []
    source = counted(mixed_texts(), read)
    answers = answers_of(source, FakeEngine(), batch_size=4)
    assert [answer.exit_layer for answer in itertools.islice(answers, 6)] == [1, 2, 3, 4, 1, 2]
    answers.close()
    assert len(read) == 8
    assert next(source).position == 8


@pytest.mark.parametrize("broken_at", [0, 1, 5, 15])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_stream_that_raises_does_so_after_the_answers_before_it(broken_at, batch_size):
    texts = mixed_texts()[:broken_at]
    answers = answers_of(counted(texts, [], OSError("the source is gone")), FakeEngine(), batch_size=batch_size)
    assert [answer.exit_layer for answer in itertools.islice(answers, broken_at)] == [layer for layer, _ in texts]
    with pytest.raises(OSError, match="the source is gone"):
        next(answers)


def test_a_text_whose_logits_are_not_numbers_is_named_after_the_answers_before_it():
    engine = FakeEngine()
    stock = engine.exit_logits

    def broken(depth: int, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        logits = stock(depth, hidden_states, packed_batch)
        return logits.masked_fill((packed_batch.rows == 3)[:, None], torch.nan)

    engine.exit_logits = broken
    answers = answers_of(stream([(1, 5)] * 6), engine)
    assert [answer.exit_layer for answer in itertools.islice(answers, 3)] == [1, 1, 1]
    with pytest.raises(ValueError, match="the logits of text 3 are not finite"):
        next(answers)


# Memory that runs out

OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
]


def limited(tokens: int, error: Exception, depth: int = 1, failures: list[int] | None = None) -> FakeEngine:
    """Return an engine whose layer `depth` raises an error where a batch has more tokens."""
    engine = FakeEngine()
    stock: Callable = engine.run_layer

    def run_layer(number: int, hidden_states: torch.Tensor, packed_batch: PackedBatch):
        if number == depth and packed_batch.total_tokens > tokens:
            (failures if failures is not None else []).append(packed_batch.total_tokens)
            raise error
        return stock(number, hidden_states, packed_batch)

    engine.run_layer = run_layer
    return engine


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("options", [{}, {"batch_size": 16}, {"rebatch": False}])
def test_out_of_memory_halves_the_batch_and_loses_nothing(error, depth, options):
    texts = mixed_texts(3)
    answers = list(answers_of(stream(texts), limited(45, error, depth), batch_tokens=400, **options))
    assert [answer.exit_layer for answer in answers] == [sure_at for sure_at, _ in texts]


def test_out_of_memory_is_tried_again_with_half_and_stays_there(caplog):
    failures: list[int] = []
    engine = limited(60, MemoryError(), failures=failures)
    assert len(list(answers_of(stream([(4, 10)] * 200), engine))) == 200
    assert failures == [100]
    assert max(engine.tokens(1)) <= 60
    assert "going on with batches of half the size, about 50 tokens" in caplog.text


def test_one_text_that_does_not_fit_raises_what_was_raised():
    answers = answers_of(stream([(1, 3), (1, 4), (1, 9)]), limited(5, MemoryError("no room")))
    assert len(list(itertools.islice(answers, 2))) == 2
    with pytest.raises(MemoryError, match="no room"):
        next(answers)


def test_other_errors_are_not_retried():
    engine = limited(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(answers_of(stream(mixed_texts()), engine))
    assert [what for what, *_ in engine.calls] == ["embed", "embed"]  # and not once more
