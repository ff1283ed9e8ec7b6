"""From a stream of encoded texts to their answers, in order: blocks of texts, packed batches, layers, regrouping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from numbers import Integral

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .answers import Answer, in_order
from .encoded_texts import EncodedText, Text, read_blocks
from .exit_policies import check_speed
from .packed_batch import pack_lists
from .texts_in_flight import TextsInFlight


logger = logging.get_logger(__name__)

# Where a layer's time per token stops falling (docs/performance.md); that of accelerators is not measured yet.
CPU_BATCH_TOKENS = 1024
ACCELERATOR_BATCH_TOKENS = 16384
# Batches that are read, held and regrouped together.
BLOCK_BATCHES = 16


@dataclass(frozen=True)
class PredictionSettings:
    """
    Args:
        batch_size (`int`, *optional*): Texts that are read and answered at a time; by their tokens unless given.
        batch_tokens (`int`): Tokens of a packed batch, about.
        regroup (`bool`): Whether texts that go on may be joined to those of other batches.
    """

    batch_size: int | None
    batch_tokens: int
    regroup: bool

    @classmethod
    def of(
        cls, model: PreTrainedModel, batch_size: int | None, batch_tokens: int | None, regroup: bool
    ) -> PredictionSettings:
        """What a caller asked for, checked, with defaults for the model's device. The model must be in eval mode."""
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
        return cls(batch_size, batch_tokens, regroup)


def checked_speeds(speed: float | Iterable[float] | None) -> float | Iterable[float] | None:
    """The `speed` of a call of `predict`. Where there are many, each is checked when its text is read."""
    if hasattr(speed, "tolist"):  # tensors, NumPy arrays and NumPy numbers
        speed = speed.tolist()
    if speed is not None and (isinstance(speed, str) or not isinstance(speed, Iterable)):
        check_speed(speed)
    return speed


def predict(
    texts: Iterable[Text], answer_texts: Callable[[list[Text], int], list[Answer]], settings: PredictionSettings
) -> Iterator[Answer]:
    """
    The work of [`FastBertForSequenceClassification.predict`].

    Args:
        texts (iterable): Checked texts, whose `len` is their number of tokens.
        answer_texts (`Callable`): From texts that are in memory together and `batch_tokens` to their answers.
        settings ([`PredictionSettings`]): The caller's.
    """
    if settings.batch_size is None:
        blocks = read_blocks(texts, BLOCK_BATCHES * settings.batch_tokens, weigh=len)
    else:
        blocks = read_blocks(texts, settings.batch_size)
    batch_tokens = settings.batch_tokens
    for block in blocks:
        parts = [block]
        while parts:
            part = parts.pop(0)
            try:
                answers = answer_texts(part, batch_tokens)
            except (MemoryError, RuntimeError) as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                answers = None  # and the traceback, which holds what the attempt took, ends with this clause
            if answers is None:
                batch_tokens = max(batch_tokens // 2, 1)
                parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
                logger.warning(f"out of memory: going on with batches of half the size, about {batch_tokens} tokens.")
                continue
            for text, answer in zip(part, answers, strict=True):
                if answer.uncertainty != answer.uncertainty:
                    raise ValueError(
                        f"the logits of text {text.position} are not finite, so there is no answer: check the model's "
                        "weights for NaN and infinity."
                    )
                yield answer


def answer_block(
    model: PreTrainedModel, texts: list[EncodedText], exits: range, settings: PredictionSettings, batch_tokens: int
) -> list[Answer]:
    """The answers of texts that are in memory together, in their order."""
    leaving, layers = [], model.fastbert.layers()[: exits[-1]]
    with torch.inference_mode():
        num_batches = 1 if settings.batch_size else round(sum(map(len, texts)) / batch_tokens)
        batches = [embed_batch(model, texts, rows) for rows in cut_batches(texts, max(num_batches, 1))]
        for together in [batches] if settings.regroup else [[batch] for batch in batches]:
            for depth, layer in enumerate(layers, start=1):
                going_on = []
                while together:
                    left, rest = model.run_layer_and_exit(depth, layer, together.pop(0), exits)
                    leaving += left
                    going_on += [] if rest is None else [rest]
                if not going_on:
                    break
                together = join_small(going_on, batch_tokens)
        logits, uncertainty, exit_layer = (answers.cpu() for answers in in_order(leaving))
    # A copy outside inference mode is a tensor like any other.
    return list(map(Answer, logits.clone().unbind(), exit_layer.tolist(), uncertainty.tolist()))


def cut_batches(texts: list[EncodedText], num_batches: int) -> list[list[int]]:
    """The rows of each batch: texts of similar length together, about as many tokens in each batch."""
    rows = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    ends = list(accumulate(len(texts[row]) for row in rows))
    numbers = [(end - 1) * num_batches // ends[-1] for end in ends]
    return [[row for row, _ in batch] for _, batch in groupby(zip(rows, numbers, strict=True), lambda pair: pair[1])]


def embed_batch(model: PreTrainedModel, texts: list[EncodedText], rows: list[int]) -> TextsInFlight:
    """Packs some texts of a block and runs the embedding layer on them."""
    chosen = [texts[row] for row in rows]
    packed_batch = pack_lists(rows, list(map(len, chosen)), model.device, model.config._attn_implementation)
    inputs = {
        name: torch.tensor([list(chain.from_iterable(text.inputs[name] for text in chosen))]).to(model.device)
        for name in chosen[0].inputs
    }
    hidden_states, packed_batch = model.fastbert.embed_packed(packed_batch, inputs)
    return TextsInFlight(packed_batch, hidden_states, torch.tensor([text.speed for text in chosen]))


def join_small(batches: list[TextsInFlight], batch_tokens: int) -> list[TextsInFlight]:
    """Joins neighbours that fit into one batch, where one of them has too few tokens for efficient matrix products."""
    groups = [[batches[0]]]
    for batch in batches[1:]:
        tokens = sum(other.total_tokens for other in groups[-1])
        is_small = min(tokens, batch.total_tokens) < batch_tokens // 2
        if is_small and tokens + batch.total_tokens <= batch_tokens:
            groups[-1].append(batch)
        else:
            groups.append([batch])
    return [TextsInFlight.join(group) for group in groups]


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the machine or of an accelerator; torch does not always tell by the type."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    reasons = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(reason in str(error) for reason in reasons)
