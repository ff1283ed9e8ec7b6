"""Run texts through layers and exits until each is answered: batches, the one loop, members, rebatching, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, chain, groupby
from numbers import Integral
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .encoded_texts import EncodedText, read_blocks
from .engine import Engine
from .exit_policies import ExitPolicy, leaves
from .modeling_outputs import Prediction
from .packed_batch import PackedBatch, pack_lists


logger = logging.get_logger(__name__)

# Where a layer's time per token stops falling (docs/performance.md); that of accelerators is not measured yet.
CPU_BATCH_TOKENS = 1024
ACCELERATOR_BATCH_TOKENS = 16384
# Batches that are read, held and rebatched together.
BLOCK_BATCHES = 16


class ActiveBatch(NamedTuple):
    """Texts that have run through the same layers and have not left yet. Each layer returns a new one."""

    hidden_states: torch.Tensor  # [1, total_tokens, hidden_size], after the layers so far
    packed_batch: PackedBatch
    thresholds: torch.Tensor  # [texts, L], on the CPU: of every exit for each text
    state: torch.Tensor | None = None  # [texts, ...], what the exit policy remembers of each

    def keep(self, kept: torch.Tensor) -> ActiveBatch:
        """Return those that go on: `kept` is a mask of shape `[texts]` on the CPU."""
        packed_batch, hidden_states = self.packed_batch.keep(kept, self.hidden_states)
        # Indices made on the CPU: a boolean mask on the device would make the CPU wait for it.
        state = self.state if self.state is None else self.state[kept.nonzero()[:, 0].to(self.state.device)]
        return ActiveBatch(hidden_states, packed_batch, self.thresholds[kept], state)

    @classmethod
    def join(cls, batches: list[ActiveBatch], policy: ExitPolicy | None) -> ActiveBatch:
        """Return several as one, in the order given."""
        if len(batches) == 1:
            return batches[0]
        return cls(
            torch.cat([batch.hidden_states for batch in batches], 1),
            PackedBatch.join([batch.packed_batch for batch in batches]),
            torch.cat([batch.thresholds for batch in batches]),
            None if batches[0].state is None else policy.task.layout.cat([batch.state for batch in batches]),
        )


class ExitOutput(NamedTuple):
    """What one exit answers to the texts that leave there."""

    rows: torch.Tensor  # [texts], on the CPU: in the caller's batch
    logits: torch.Tensor  # [texts, num_labels], or [texts, tokens, num_labels]
    uncertainty: torch.Tensor  # [texts]
    depth: int  # the layer of the exit, from 1

    def keep(self, kept: torch.Tensor) -> ExitOutput:
        """Return some of them: `kept` is a mask of shape `[texts]` on the CPU."""
        places = kept.nonzero()[:, 0].to(self.logits.device)
        return ExitOutput(self.rows[kept], self.logits[places], self.uncertainty[places], self.depth)


class Answers(NamedTuple):
    """The answers to all rows of a call, in their order."""

    logits: torch.Tensor  # [rows, num_labels], at the exit that each row took
    exit_layer: torch.Tensor  # [rows], layers that each row ran through, in all members
    uncertainty: torch.Tensor  # [rows], of the exit taken
    exit_member: torch.Tensor  # [rows], the member that answered, from 1

    def check_finite(self) -> None:
        """Raise a `ValueError` if a row has no answer, as its logits are not finite."""
        if self.uncertainty.isnan().any():
            raise ValueError(
                f"the logits of rows {self.uncertainty.isnan().nonzero()[:, 0].tolist()} are not finite, so there is "
                "no answer: check the model's weights and inputs for NaN and infinity."
            )


@dataclass
class Trace:
    """What a full-depth pass of one batch keeps on its way, packed as the batch is."""

    every_exit: bool = False  # whether to evaluate every exit on every text
    every_state: bool = False  # whether to keep the embeddings and the output of every layer, not only of the last
    exit_logits: list[torch.Tensor] = field(default_factory=list)  # [texts, num_labels] each
    hidden_states: list[torch.Tensor] = field(default_factory=list)  # [1, total_tokens, hidden_size] each

    def keep_state(self, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> None:
        """Note the embeddings or a layer's output, for each token of the texts."""
        hidden_states = packed_batch.unpack(hidden_states)
        self.hidden_states = [*self.hidden_states, hidden_states] if self.every_state else [hidden_states]


class Member(NamedTuple):
    """One model of a call; a cascade has several."""

    engine: Engine
    thresholds: torch.Tensor  # [rows, L], of its exits for every row of the call
    # From the rows that it runs on, [texts], to their embeddings and packed batches.
    embed: Callable[[torch.Tensor], list[tuple[torch.Tensor, PackedBatch]]]


def answer_rows(
    members: Sequence[Member], policy: ExitPolicy, batch_tokens: int = 0, trace: Trace | None = None
) -> Answers:
    """Answer every row of a call: what a member leaves open goes on to the next one. See [`run_layers`]."""
    num_rows = len(members[0].thresholds)
    is_open, layers_before = torch.ones(num_rows, dtype=torch.bool), torch.zeros(num_rows, dtype=torch.long)
    outputs, depths, of_members = [], [], []
    before = accumulate((engine.num_layers for engine, _, _ in members), initial=0)  # exits of the members before
    for number, ((engine, thresholds, embed), first) in enumerate(zip(members, before, strict=False), start=1):
        # A member runs up to the last exit that may answer, and not at all on rows that none of them may.
        may_answer = thresholds > 0 if number == 1 else (thresholds > 0) & is_open[:, None]  # [rows, L]
        rows = may_answer.any(1).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        exits = [depth for depth, is_asked in enumerate(may_answer.any(0).tolist(), start=1) if is_asked]
        with engine.session():
            batches = [
                ActiveBatch(states, batch, thresholds[batch.rows], policy.start(len(batch.rows), states.device))
                for states, batch in embed(rows)
            ]
            own = run_layers(engine, policy, batches, exits, batch_tokens, trace, first)
        outputs += own
        depths += [output.depth for output in own for _ in range(len(output.rows))]
        of_members += [number] * (len(depths) - len(of_members))
        if number < len(members):
            for output in own:
                is_open[output.rows] = False
            layers_before[rows[is_open[rows]]] += exits[-1]
    answered = torch.cat([output.rows for output in outputs])
    columns = [
        policy.task.layout.cat([output.logits for output in outputs]),
        torch.tensor(depths) + layers_before[answered],
        torch.cat([output.uncertainty for output in outputs]),
        torch.tensor(of_members),
    ]
    if num_rows > 1:  # back into the order of the rows
        order = answered.argsort()
        columns = [column[order.to(column.device)] for column in columns]
    return Answers(*(column.to(columns[0].device) for column in columns))


def run_layers(
    engine: Engine,
    policy: ExitPolicy,
    batches: list[ActiveBatch],
    exits: Sequence[int],
    batch_tokens: int = 0,
    trace: Trace | None = None,
    exits_before: int = 0,
) -> list[ExitOutput]:
    """
    Run batches through layers and exits until every text has left: the one loop over depth.

    Args:
        engine ([`Engine`]), policy ([`ExitPolicy`]): What runs layers and exits, and makes uncertainties of logits.
        batches (`list[ActiveBatch]`): Emptied on the way, so that a batch is gone once a layer has read it.
        exits (sequence of `int`): The layers whose exits may answer a text; at the last of them all end.
        batch_tokens (`int`): Tokens of a batch up to which small ones are joined; 0 joins none.
        trace ([`Trace`], *optional*): Filled on the way.
        exits_before (`int`): Number of exits of the members before.

    Returns:
        `list[ExitOutput]`: Texts in none of them ran through all these layers and are left to the next member.
    """
    left: list[ExitOutput] = []
    if trace is not None:
        trace.keep_state(batches[0].hidden_states, batches[0].packed_batch)
    for depth in range(1, exits[-1] + 1):
        active = []
        while batches:
            batch = batches.pop(0)
            hidden_states, packed_batch = engine.run_layer(depth, batch.hidden_states, batch.packed_batch)
            rest = ActiveBatch(hidden_states, packed_batch, batch.thresholds, batch.state)
            if trace is not None:
                trace.keep_state(hidden_states, packed_batch)
            if depth in exits or trace is not None:
                output, rest = ask_exit(engine, policy, rest, depth, depth == exits[-1], trace, exits_before)
                left += [] if output is None else [output]
            active += [] if rest is None else [rest]
        if not active:
            break
        batches = join_small(active, batch_tokens, policy)
    return left


def ask_exit(
    engine: Engine,
    policy: ExitPolicy,
    batch: ActiveBatch,
    depth: int,
    at_end: bool,
    trace: Trace | None,
    exits_before: int,
) -> tuple[ExitOutput | None, ActiveBatch | None]:
    """Evaluate an exit if it may answer a text. Return what it answers and what goes on, `None` if that is no text."""
    threshold = batch.thresholds[:, depth - 1]
    is_asked, is_traced = bool(threshold.any()), trace is not None and trace.every_exit
    if not is_asked and not is_traced:
        return None, batch
    logits = engine.exit_logits(depth, batch.hidden_states, batch.packed_batch)  # [texts, num_labels]
    if is_traced:
        trace.exit_logits.append(logits)
    if not is_asked:
        return None, batch
    asked = None if batch.state is None else threshold > 0
    counted = policy.task.layout.counted(logits, batch.packed_batch)
    uncertainty, state = policy.uncertainty(counted, batch.state, asked, exits_before + depth)
    output = ExitOutput(batch.packed_batch.rows, logits, uncertainty, depth)
    if at_end and threshold.isinf().all():
        return output, None
    # The one wait for the device in each layer: how many texts go on decides the shapes of the next.
    leaving = leaves(uncertainty.cpu(), threshold, at_end)
    if leaving.all():
        return output, None
    batch = batch._replace(state=state)
    return (output.keep(leaving), batch.keep(~leaving)) if leaving.any() else (None, batch)


def join_small(batches: list[ActiveBatch], batch_tokens: int, policy: ExitPolicy | None) -> list[ActiveBatch]:
    """Join neighbours that fit into one batch, where one of them has too few tokens for efficient matrix products."""
    groups = [[batches[0]]]
    for batch in batches[1:]:
        tokens, own = sum(other.packed_batch.total_tokens for other in groups[-1]), batch.packed_batch.total_tokens
        if min(tokens, own) < batch_tokens // 2 and tokens + own <= batch_tokens:
            groups[-1].append(batch)
        else:
            groups.append([batch])
    return [ActiveBatch.join(group, policy) for group in groups]


def answer_texts(
    model: PreTrainedModel,
    engines: Sequence[Engine],
    texts: Iterable[EncodedText],
    thresholds_at: Callable[[torch.Tensor], list[torch.Tensor]],
    policy: ExitPolicy,
    batch_size: int | None,
    batch_tokens: int | None,
    rebatch: bool,
    on_error: str = "raise",
) -> Iterator[Prediction]:
    """
    Answer a stream of checked texts in their order, with the engines of every member of a model. `thresholds_at` goes
    from the speeds of texts, `[texts]`, to the thresholds of every member. The rest is as in the model's `predict`.
    """
    if model.training:
        raise ValueError("predict needs a model in eval mode, or it would answer with dropout: model.eval()")
    for name, value, example in (("batch_size", batch_size, 32), ("batch_tokens", batch_tokens, 4096)):
        is_integer = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (is_integer and value >= 1):
            raise ValueError(
                f"{name} must be a whole number of at least 1, or None, which is fast by itself, got {value!r}. "
                f"Example: {name}={example}"
            )
    if batch_tokens is None:
        batch_tokens = CPU_BATCH_TOKENS if model.device.type == "cpu" else ACCELERATOR_BATCH_TOKENS
    if batch_size is None:
        blocks = read_blocks(texts, BLOCK_BATCHES * batch_tokens, weigh=len)
    else:
        blocks = read_blocks(texts, batch_size)

    def answer(block: list[EncodedText], tokens: int) -> list[Prediction]:
        own_tokens = 0 if batch_size else tokens  # a batch size that was asked for is one batch
        embedders = [partial(embed_rows, model, own, block, n, own_tokens) for n, own in enumerate(engines)]
        thresholds = thresholds_at(torch.tensor([text.speed for text in block], dtype=torch.float32))
        members = list(map(Member, engines, thresholds, embedders))
        answers = answer_rows(members, policy, tokens if rebatch else 0)
        logits, *columns = (column.cpu() for column in answers)
        # A copy outside inference mode is a tensor like any other.
        of_texts = policy.task.layout.of_texts(logits.clone(), block)
        return list(map(Prediction, of_texts, *(column.tolist() for column in columns)))

    return answer_blocks(blocks, answer, batch_tokens, on_error)


def answer_blocks(
    blocks: Iterable[list[EncodedText]],
    answer: Callable[[list[EncodedText], int], list[Prediction]],
    batch_tokens: int,
    on_error: str = "raise",
) -> Iterator[Prediction]:
    """
    Answer block by block. Where memory runs out, a block is halved, and all further batches are half as large. Texts
    without an answer are errors, or are left out or in their place, as `on_error` says.
    """
    for block in blocks:
        parts = [block]
        while parts:
            part = parts.pop(0)
            readable = [text for text in part if text.error is None]
            try:
                predictions = answer(readable, batch_tokens) if readable else []
            except (MemoryError, RuntimeError) as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                predictions = None  # tried again outside of this clause, whose traceback keeps tensors alive
            if predictions is None:
                batch_tokens = max(batch_tokens // 2, 1)
                parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
                logger.warning(f"out of memory: going on with batches of half the size, about {batch_tokens} tokens.")
                continue
            answers = iter(predictions)
            for text in part:
                prediction = next(answers) if text.error is None else Prediction.failed(text.error)
                if text.error is None and math.isnan(prediction.uncertainty):
                    error = ValueError(
                        f"the logits of text {text.position} are not finite, so there is no answer: check the model's "
                        "weights for NaN and infinity."
                    )
                    if on_error == "raise":
                        raise error
                    prediction = Prediction.failed(error)
                if prediction.error is None or on_error == "return":
                    yield prediction


def embed_rows(
    model: PreTrainedModel,
    engine: Engine,
    texts: list[EncodedText],
    member: int,
    batch_tokens: int,
    rows: torch.Tensor,
) -> list[tuple[torch.Tensor, PackedBatch]]:
    """Pack some texts of a block as a member reads them, batch by batch, and run its embedding layer on each."""
    inputs = {row: texts[row].of_members[member] for row in rows.tolist()}
    lengths = {row: len(own["input_ids"]) for row, own in inputs.items()}
    num_batches = round(sum(lengths.values()) / batch_tokens) if batch_tokens else 1
    batches = []
    for batch in cut_batches(lengths, max(num_batches, 1)):
        own_lengths = [lengths[row] for row in batch]
        packed_batch = pack_lists(batch, own_lengths, engine.device, model.config._attn_implementation)
        columns = {
            name: torch.tensor([list(chain.from_iterable(inputs[row][name] for row in batch))]).to(engine.device)
            for name in inputs[batch[0]]
        }
        counted = columns.pop("token_mask", None)
        if counted is not None:
            packed_batch = replace(packed_batch, counted=counted.bool())
        batches.append(engine.embed(packed_batch, columns))
    return batches


def cut_batches(lengths: dict[int, int], num_batches: int) -> list[list[int]]:
    """Return the rows of each batch: texts of similar length together, about as many tokens in each batch."""
    rows = sorted(lengths, key=lengths.get)
    ends = list(accumulate(lengths[row] for row in rows))
    numbers = [(end - 1) * num_batches // ends[-1] for end in ends]
    return [[row for row, _ in batch] for _, batch in groupby(zip(rows, numbers, strict=True), lambda pair: pair[1])]


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out, of the machine or of an accelerator; torch does not always say so by the type."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    reasons = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(reason in str(error) for reason in reasons)
