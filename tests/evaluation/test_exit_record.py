from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from pandas.testing import assert_frame_equal
from transformers import DataCollatorWithPadding

from fastbert_hf import CascadeForSequenceClassification, CascadeProcessor
from fastbert_hf.evaluation import ExitRecord, executed_flops, record_exits, sweep_depths, sweep_speeds

from ..common import (
    NUM_LAYERS,
    assert_close,
    other_tokenizer,
    stock,
    tiny_model,
    tiny_rows,
    tiny_texts,
    tiny_tokenizer,
)


def encoded_rows(labels: bool = True, number: int = 12) -> list[dict]:
    tokenizer = tiny_tokenizer()
    rows = [dict(tokenizer(text)) for text in tiny_texts(number)]
    return [{**row, "labels": index % 3} for index, row in enumerate(rows)] if labels else rows


def costs_of(record: ExitRecord, depth: int) -> torch.Tensor:
    """All layers and exits up to a depth, `[rows]`."""
    return record.layer_flops[:, :depth].sum(1) + record.exit_flops[:, :depth].sum(1)


def costs(model, lengths: list[int]) -> list[int]:
    """What texts of these lengths cost that run through every layer and every exit."""
    return executed_flops(model, torch.full((len(lengths),), NUM_LAYERS), torch.tensor(lengths)).tolist()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_record_holds_every_exit_of_every_row_in_the_order_of_the_data(batch_size):
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(), encoded_rows()
    record = record_exits(model, rows, DataCollatorWithPadding(tokenizer), batch_size, progress=False)
    assert record.labels.tolist() == [row["labels"] for row in rows]
    assert record.num_exits == NUM_LAYERS
    assert record.member_layers == (NUM_LAYERS,)
    assert costs_of(record, NUM_LAYERS).tolist() == costs(model, [len(row["input_ids"]) for row in rows])
    for row, exit_logits in zip(rows, record.exit_logits, strict=True):
        alone = model(torch.tensor([row["input_ids"]]), output_exit_logits=True).exit_logits[0]
        assert_close(exit_logits, alone.detach())


def test_rows_without_labels_give_a_record_without():
    record = record_exits(tiny_model(), encoded_rows(False), DataCollatorWithPadding(tiny_tokenizer()), progress=False)
    assert record.labels is None
    assert record.select(torch.tensor([0, 2])).labels is None


def test_padding_in_the_rows_costs_nothing():
    model, rows = tiny_model(), tiny_rows(number=6)
    record = record_exits(model, rows, lambda batch: torch.utils.data.default_collate(batch), progress=False)
    assert costs_of(record, NUM_LAYERS).tolist() == costs(model, [int(row["attention_mask"].sum()) for row in rows])


def test_recording_leaves_no_dropout_on():
    model = tiny_model(exit_dropout=0.5).train()
    collator = DataCollatorWithPadding(tiny_tokenizer())
    first, second = (record_exits(model, encoded_rows(), collator, progress=False) for _ in range(2))
    assert torch.equal(first.exit_logits, second.exit_logits)


def assert_same_record(record: ExitRecord, expected: ExitRecord) -> None:
    assert_close(record.exit_logits, expected.exit_logits)
    for name in ("layer_flops", "exit_flops", "labels", "member_layers"):
        value, wanted = getattr(record, name), getattr(expected, name)
        assert value == wanted if wanted is None or isinstance(wanted, tuple) else torch.equal(value, wanted), name


def with_texts() -> list[dict]:
    """The rows of `encoded_rows` with their texts, and a column that nobody knows."""
    return [
        {"text": text, "source": {"page": 1}, **row} for text, row in zip(tiny_texts(12), encoded_rows(), strict=True)
    ]


RAW = [{"text": row["text"], "label": row["labels"]} for row in with_texts()]
ROWS = {
    "texts beside tokens": (with_texts(), None, None),
    "texts beside tokens, the tokenizer's collator": (with_texts(), DataCollatorWithPadding(tiny_tokenizer()), None),
    "without a collator": (encoded_rows(), None, None),
    "a data set of tokens and texts": (Dataset.from_list(with_texts()), None, None),
    "raw rows": (RAW, None, tiny_tokenizer()),
    "labels by name": ([{**row, "label": f"LABEL_{row['label']}"} for row in RAW], None, tiny_tokenizer()),
    "a data set of raw rows": (Dataset.from_list(RAW), None, tiny_tokenizer()),
    "a stream of rows": (None, None, None),
}


@pytest.mark.parametrize(("rows", "collator", "tokenizer"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_rows_are_tokenized_and_padded_where_they_are_not(rows, collator, tokenizer, family):
    model = tiny_model(family)
    rows = iter(encoded_rows()) if rows is None else rows
    expected = record_exits(model, encoded_rows(), DataCollatorWithPadding(tiny_tokenizer()), progress=False)
    record = record_exits(model, rows, collator, batch_size=5, progress=False, tokenizer=tokenizer)
    assert_same_record(record, expected)


def test_a_stream_of_texts_is_read_to_its_end():
    model, tokenizer, texts = tiny_model(), tiny_tokenizer(), tiny_texts(5)
    record = record_exits(model, iter(texts), progress=False, tokenizer=tokenizer)
    assert_same_record(record, record_exits(model, texts, progress=False, tokenizer=tokenizer))


@pytest.mark.parametrize("label", [1.0, float("nan")])
def test_labels_that_are_fractions_are_refused(label):
    rows = [{**row, "label": label} for row in encoded_rows(labels=False, number=3)]
    with pytest.raises(ValueError, match=f"'label' must be the ids of labels.*got {label}"):
        record_exits(tiny_model(), rows, progress=False)


def test_texts_alone_are_enough():
    model = tiny_model()
    expected = record_exits(model, encoded_rows(False), progress=False)
    assert_same_record(record_exits(model, tiny_texts(12), progress=False, tokenizer=tiny_tokenizer()), expected)


def test_texts_are_cut_to_what_the_model_reads():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30  # as of many a checkpoint
    record = record_exits(tiny_model(), ["word7 " * 200], progress=False, tokenizer=tokenizer)
    assert costs_of(record, NUM_LAYERS).tolist() == costs(tiny_model(), [64])


@pytest.mark.parametrize("own_tokenizers", [False, True])
def test_members_of_a_cascade_take_texts_and_a_processor(own_tokenizers):
    tokenizers = [tiny_tokenizer(), other_tokenizer()] if own_tokenizers else [tiny_tokenizer()]
    members = [stock(num_layers=1, seed=1), stock(seed=2)]
    cascade = CascadeForSequenceClassification.from_members(members, tokenizers * (3 - len(tokenizers)))
    assert cascade.config.own_tokenizers == own_tokenizers
    of_members = [[{**tokenizer(row["text"]), "labels": row["label"]} for row in RAW] for tokenizer in tokenizers]
    tokenized = of_members if own_tokenizers else of_members[0]
    expected = record_exits(cascade, tokenized, progress=False)
    assert_same_record(record_exits(cascade, RAW, progress=False, tokenizer=CascadeProcessor(tokenizers)), expected)
    if own_tokenizers:
        with pytest.raises(ValueError, match="each of the 2 members has its own tokenizer"):
            record_exits(cascade, RAW, progress=False, tokenizer=tokenizers[0])
    else:
        assert_same_record(record_exits(cascade, RAW, progress=False, tokenizer=tokenizers[0]), expected)


def test_texts_without_a_tokenizer_are_refused_with_what_to_give():
    with pytest.raises(ValueError, match="the rows are texts, so the model's tokenizer is needed"):
        record_exits(tiny_model(), ["word7"], progress=False)


def test_sweeps_take_texts_and_a_tokenizer():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    record = record_exits(model, RAW, progress=False, tokenizer=tokenizer)
    for sweep in (sweep_speeds, sweep_depths):
        assert_frame_equal(sweep(model, RAW, tokenizer=tokenizer), sweep(model, record))


def random_record(rows: int = 4, members: tuple[int, ...] = (3,), labels: bool = True) -> ExitRecord:
    layers = sum(members)
    layer_flops, exit_flops = (torch.arange(rows * layers).reshape(rows, layers) + start for start in (0, 100))
    gold = torch.arange(rows) % 2 if labels else None
    return ExitRecord(torch.randn(rows, layers, 2), layer_flops, exit_flops, gold, members)


def test_selection_keeps_rows_together():
    record = random_record(members=(1, 2))
    for rows in (torch.tensor([1, 3]), torch.tensor([False, True, False, True])):
        chosen = record.select(rows)
        for name in ("exit_logits", "layer_flops", "exit_flops", "labels"):
            assert torch.equal(getattr(chosen, name), getattr(record, name)[[1, 3]])
        assert chosen.member_layers == (1, 2)


def test_records_of_members_are_joined_and_taken_apart():
    parts = [random_record(members=(2,)), random_record(members=(3,))]
    record = ExitRecord.of_members(parts)
    assert record.member_layers == (2, 3)
    assert record.num_exits == 5
    for number, part in enumerate(parts, start=1):
        member = record.of_member(number)
        for name in ("exit_logits", "layer_flops", "exit_flops", "labels"):
            assert torch.equal(getattr(member, name), getattr(part, name))
        assert member.member_layers == part.member_layers


def test_parts_of_a_record_that_are_not_there_stay_away():
    record = ExitRecord.of_members([ExitRecord(torch.randn(4, 2, 2)), random_record(labels=False)])
    for part in (record, record.of_member(1), record.select(torch.tensor([0]))):
        assert (part.layer_flops, part.exit_flops, part.labels) == (None, None, None)


@pytest.mark.parametrize("number", [0, 3])
def test_members_that_are_not_there_are_refused(number):
    with pytest.raises(ValueError, match=rf"number must be from 1 to 2 \(the members\), got {number}"):
        random_record(members=(1, 2)).of_member(number)


def test_records_of_other_rows_are_not_joined():
    with pytest.raises(ValueError, match=r"of the same rows, got \[4, 3\] rows"):
        ExitRecord.of_members([random_record(), random_record(3)])
    for other in (random_record().select(torch.tensor([1, 0, 2, 3])), random_record(labels=False)):
        with pytest.raises(ValueError, match="different labels: record the same rows in the same order"):
            ExitRecord.of_members([random_record(), other])


@pytest.mark.parametrize("label", [-1, -100, 3])
def test_labels_that_the_model_does_not_have_are_refused(label):
    rows = [{**row, "labels": label} for row in encoded_rows(False)]
    with pytest.raises(ValueError, match=f"labels must be from 0 to 2, got {label} to {label}.*leave out the column"):
        record_exits(tiny_model(), rows, DataCollatorWithPadding(tiny_tokenizer()), progress=False)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_rows_of_which_some_have_no_label_are_refused(batch_size):
    rows = [{**row, "labels": None if index else 1} for index, row in enumerate(encoded_rows(False))]
    with pytest.raises(ValueError, match=r"some rows have labels and others none|must be the ids of labels"):
        record_exits(tiny_model(), rows, batch_size=batch_size, progress=False)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="the data set has no rows"):
        record_exits(tiny_model(), [], DataCollatorWithPadding(tiny_tokenizer()))


LOGITS = torch.randn(4, 3, 2)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"exit_logits": torch.randn(4, 3)}, r"exit_logits must be \[rows, L, num_labels\].*got \[4, 3\]"),
        ({"exit_logits": torch.randn(0, 3, 2)}, "at least one row"),
        ({"exit_logits": LOGITS, "layer_flops": torch.ones(4, 2)}, r"layer_flops must be \[rows, L\] = \[4, 3\]"),
        (
            {"exit_logits": LOGITS, "exit_flops": torch.ones(4)},
            r"exit_flops must be \[rows, L\] = \[4, 3\], got \[4\]",
        ),
        ({"exit_logits": LOGITS, "labels": torch.ones(4, 1)}, r"labels must be \[rows\] = \[4\], got \[4, 1\]"),
        (
            {"exit_logits": LOGITS, "member_layers": (1, 3)},
            r"member_layers=\(1, 3\) must add up to the 3 exits of exit_logits\. Example: member_layers=\(3,\)",
        ),
    ],
)
def test_misshapen_parts_are_refused_by_name(parts, message):
    with pytest.raises(ValueError, match=message):
        ExitRecord(**parts)
