from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithPadding

from fastbert_hf.evaluation import ExitRecord, record_exits

from ..common import NUM_LAYERS, assert_close, tiny_model, tiny_rows, tiny_texts, tiny_tokenizer


def encoded_rows(labels: bool = True, number: int = 12) -> list[dict]:
    tokenizer = tiny_tokenizer()
    rows = [dict(tokenizer(text)) for text in tiny_texts(number)]
    return [{**row, "labels": index % 3} for index, row in enumerate(rows)] if labels else rows


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_record_holds_every_exit_of_every_row_in_the_order_of_the_data(batch_size):
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(), encoded_rows()
    record = record_exits(model, rows, DataCollatorWithPadding(tokenizer), batch_size, progress=False)
    assert record.labels.tolist() == [row["labels"] for row in rows]
    assert record.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    assert record.num_exits == NUM_LAYERS
    for row, exit_logits in zip(rows, record.exit_logits, strict=True):
        alone = model(torch.tensor([row["input_ids"]]), output_exit_logits=True).exit_logits[0]
        assert_close(exit_logits, alone.detach())


def test_rows_without_labels_give_a_record_without():
    record = record_exits(tiny_model(), encoded_rows(False), DataCollatorWithPadding(tiny_tokenizer()), progress=False)
    assert record.labels is None
    assert record.select(torch.tensor([0, 2])).labels is None


def test_padding_in_the_rows_is_not_counted_as_tokens():
    rows = tiny_rows(number=6)
    record = record_exits(tiny_model(), rows, lambda batch: torch.utils.data.default_collate(batch), progress=False)
    assert record.lengths.tolist() == [int(row["attention_mask"].sum()) for row in rows]


def test_recording_leaves_no_dropout_on():
    model = tiny_model(exit_dropout=0.5).train()
    collator = DataCollatorWithPadding(tiny_tokenizer())
    first, second = (record_exits(model, encoded_rows(), collator, progress=False) for _ in range(2))
    assert torch.equal(first.exit_logits, second.exit_logits)


def test_selection_keeps_rows_together():
    record = ExitRecord(torch.randn(4, 3, 2), torch.tensor([5, 6, 7, 8]), torch.tensor([0, 1, 0, 1]))
    for rows in (torch.tensor([1, 3]), torch.tensor([False, True, False, True])):
        chosen = record.select(rows)
        assert torch.equal(chosen.exit_logits, record.exit_logits[[1, 3]])
        assert chosen.lengths.tolist() == [6, 8]
        assert chosen.labels.tolist() == [1, 1]


@pytest.mark.parametrize("label", [-1, -100, 3])
def test_labels_that_the_model_does_not_have_are_refused(label):
    rows = [{**row, "labels": label} for row in encoded_rows(False)]
    with pytest.raises(ValueError, match=f"labels must be from 0 to 2, got {label} to {label}.*leave out the column"):
        record_exits(tiny_model(), rows, DataCollatorWithPadding(tiny_tokenizer()), progress=False)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="the data set has no rows"):
        record_exits(tiny_model(), [], DataCollatorWithPadding(tiny_tokenizer()))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((torch.randn(4, 3), torch.ones(4)), r"exit_logits must be \[rows, L, num_labels\].*got \[4, 3\]"),
        ((torch.randn(0, 3, 2), torch.ones(0)), "at least one row"),
        ((torch.randn(4, 3, 2), torch.ones(5)), r"lengths must be \[rows\] = \[4\], got \[5\]"),
        ((torch.randn(4, 3, 2), torch.ones(4), torch.ones(4, 1)), r"labels must be \[rows\] = \[4\], got \[4, 1\]"),
    ],
)
def test_misshapen_parts_are_refused_by_name(parts, message):
    with pytest.raises(ValueError, match=message):
        ExitRecord(*parts)
