"""Rows of texts become rows of tokens, and these become padded batches, whatever holds them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import DataCollatorWithPadding

from fastbert_hf.modeling.configuration_cascade import CascadeConfig
from fastbert_hf.modeling.configuration_fastbert import FastBertConfig
from fastbert_hf.rows import PaddingCollator, encoded_rows

from .common import (
    assert_close,
    pad_token_id_of,
    ragged_batch,
    tiny_model,
    tiny_text_config,
    tiny_texts,
    tiny_tokenizer,
)


TEXTS = ["word5 word6 word7", "word8", "word9 word10"]
LABEL2ID = {"bad": 0, "good": 1}


class OneByOne(torch.utils.data.Dataset):
    """Rows that are made when they are asked for, and how often that was."""

    def __init__(self, rows):
        self.rows, self.asked = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.asked += 1
        return self.rows[index]


def tokens(**columns) -> list[dict]:
    """Return the rows of TEXTS as a tokenizer makes them, with other columns beside them."""
    encoded = dict(tiny_tokenizer()(TEXTS), **columns)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


@pytest.mark.parametrize(
    "rows",
    [
        TEXTS,
        [{"text": text, "number": 5} for text in TEXTS],
        OneByOne([{"text": text} for text in TEXTS]),
        Dataset.from_dict({"number": [1, 2, 3], "text": TEXTS}),
        Dataset.from_dict({"text": TEXTS}).with_format("torch"),
        Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
        tiny_tokenizer()(TEXTS),
    ],
    ids=["strings", "dicts", "torch", "dataset", "formatted dataset", "stream", "tokenizer output"],
)
def test_texts_of_every_kind_are_tokenized_alike(rows):
    assert list(encoded_rows(rows, tiny_tokenizer())) == tokens()


@pytest.mark.parametrize("kind", [list, Dataset.from_list, OneByOne])
def test_tokenized_rows_are_returned_as_they_are(kind):
    rows = kind(tokens(text=TEXTS, label=[0, 1, 0]))
    assert encoded_rows(rows) is rows
    assert getattr(rows, "asked", 0) <= 1


def test_a_stream_that_datasets_did_not_make_is_left_to_its_owner():
    stream = iter(TEXTS)
    assert encoded_rows(stream) is stream


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_pairs_are_tokenized_together_and_cut(kind):
    rows = kind([{"text": "word5 word6 word7", "text_pair": "word8"}] * 1_001)
    encoded = encoded_rows(rows, tiny_tokenizer(), max_length=6)
    expected = {"input_ids": [2, 5, 6, 3, 8, 3], "token_type_ids": [0] * 4 + [1] * 2, "attention_mask": [1] * 6}
    assert len(encoded) == 1_001 and encoded[0] == encoded[1_000] == expected


@pytest.mark.parametrize("name", ["label", "labels"])
@pytest.mark.parametrize("kind", [list, Dataset.from_list])
@pytest.mark.parametrize("labels", [[1, 0, 1], ["good", "bad", "good"]])
def test_labels_become_ids(kind, name, labels):
    rows = kind([{"text": text, name: label} for text, label in zip(TEXTS, labels, strict=True)])
    assert list(encoded_rows(rows, tiny_tokenizer(), label2id=LABEL2ID)) == tokens(labels=[1, 0, 1])


@pytest.mark.parametrize(("names", "expected"), [(["good", "bad"], [1, 0, -1]), (["LABEL_0", "LABEL_1"], [0, 1, -1])])
def test_ids_of_a_column_with_names_are_those_of_the_model(names, expected):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = Dataset.from_dict({"text": TEXTS, "label": [0, 1, -1]}, features=features)
    assert list(encoded_rows(rows, tiny_tokenizer(), label2id=LABEL2ID)["labels"]) == expected


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_columns_that_a_trainer_asks_for_are_kept(kind):
    rows = kind([{"text": text, "difficulty": number, "other": 1} for number, text in enumerate(TEXTS)])
    encoded = encoded_rows(rows, tiny_tokenizer(), columns=["difficulty", "weight"])
    assert list(encoded) == tokens(difficulty=[0, 1, 2])
    batch = PaddingCollator(columns=("difficulty", "weight"))(list(encoded))
    assert batch["difficulty"].tolist() == [0, 1, 2] and "weight" not in batch


@pytest.mark.parametrize("max_length", [0, -3])
def test_a_greatest_length_of_no_tokens_is_refused(max_length):
    with pytest.raises(ValueError, match=f"max_length must be at least 1 token, got {max_length}"):
        encoded_rows(TEXTS, tiny_tokenizer(), max_length)


def test_frames_and_series_of_pandas_are_rows_of_texts():
    frame = pd.DataFrame({"text": TEXTS, "label": [0, 1, 0]}, index=[7, 7, 3])
    assert encoded_rows(frame, tiny_tokenizer()) == tokens(labels=[0, 1, 0])
    assert encoded_rows(frame["text"], tiny_tokenizer()) == tokens()


def test_probabilities_stay():
    rows = [{"text": TEXTS[0], "labels": [0.25, 0.75]}]
    assert encoded_rows(rows, tiny_tokenizer())[0]["labels"] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("rows", "error", "expected"),
    [
        (None, TypeError, r"got NoneType\. Example: "),
        ("a text", TypeError, r"got str\. Example: "),
        (DatasetDict(train=Dataset.from_dict({"text": TEXTS})), TypeError, r"of 'train'.*splits\[\"train\"\]"),
        ([{"sentence": "a"}], ValueError, r"got 'sentence'.*rename_column"),
        (Dataset.from_dict({"sentence": ["a"]}), ValueError, r"got 'sentence'.*rename_column"),
        (["word5", 5], ValueError, "row 1 must be a text or a dict, got 5"),
        ([{"text": "word5"}, {"text": None}], ValueError, "the text of row 1 must be a string, got None"),
        (Dataset.from_dict({"text": ["word5", None]}), ValueError, "the text of row 1 must be a string, got None"),
        (["word5"] * 1_001 + ["\ud800"], ValueError, "the text of row 1001 cannot be tokenized"),
        ([{"text": "a", "label": 1}, {"text": "a"}], ValueError, "row 1 has text, but row 0 has text, label"),
        (
            [{"text": "a", "label": "no"}],
            ValueError,
            "of row 0 is 'no', which is not known: the labels are 'bad', 'go",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_refused_by_position(rows, error, expected):
    with pytest.raises(error, match=expected):
        encoded_rows(rows, tiny_tokenizer(), label2id=LABEL2ID)


@pytest.mark.parametrize("rows", [TEXTS, Dataset.from_dict({"text": TEXTS})])
def test_texts_need_a_tokenizer(rows):
    with pytest.raises(ValueError, match="processing_class=tokenizer"):
        encoded_rows(rows)


# Batches


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_those_of_the_stock_collator(side, kind):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    rows = [dict(tokenizer(text, text)) for text in tiny_texts(5)]
    expected = DataCollatorWithPadding(tokenizer)(rows)
    batch = PaddingCollator(tokenizer.pad_token_id, side)(
        [{name: kind(value) for name, value in row.items()} for row in rows]
    )
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(batch[name], value)


def test_columns_that_no_model_reads_are_left_out():
    batch = PaddingCollator()([{"text": "a", "input_ids": [2, 3], "difficulty": 1, "spans": [[1, 2]]}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[2, 3]],
        "attention_mask": [[1, 1]],
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_padding_changes_no_answer(family, side):
    model = tiny_model(family)
    texts = ragged_batch(pad_token_id=pad_token_id_of(family))
    rows = [{"input_ids": ids[mask.bool()]} for ids, mask in zip(*texts.values(), strict=True)]
    collator = PaddingCollator(PaddingCollator.of(model).pad_token_id, side)
    assert collator.pad_token_id == pad_token_id_of(family)
    with torch.no_grad():
        assert_close(model(**collator(rows)).logits, model(**texts).logits)


def test_a_cascade_is_padded_as_its_members_are():
    member = FastBertConfig(text_config=tiny_text_config("roberta"))
    assert PaddingCollator.of(CascadeConfig(members=[member, member])) == PaddingCollator(1)


@pytest.mark.parametrize("name", ["labels", "label", "label_ids"])
@pytest.mark.parametrize(
    ("labels", "dtype"),
    [([1, 0], torch.long), ([torch.tensor(1), np.int64(0)], torch.long), ([[0.25, 0.75], [0.5, 0.5]], torch.float)],
)
def test_labels_are_stacked(name, labels, dtype):
    batch = PaddingCollator()([{"input_ids": [2], name: label} for label in labels])
    assert batch["labels"].dtype == dtype
    assert batch["labels"].tolist() == [label if isinstance(label, list) else int(label) for label in labels]


def test_rows_without_any_label_make_no_labels():
    assert "labels" not in PaddingCollator()([{"input_ids": [2], "label": None}] * 2)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "a"}], "no input_ids, only 'text'.*processing_class=tokenizer"),
        ([{"input_ids": [2, 3], "attention_mask": [1]}], "differ in length"),
        ([{"input_ids": [2], "token_type_ids": [0]}, {"input_ids": [2]}], "encode all of them alike"),
        ([{"input_ids": [2], "label": "good"}], r"'label' must be the ids.*'good'.*label2id"),
        ([{"input_ids": [2], "label": 1}, {"input_ids": [2]}], "'label' must be the ids.*None"),
        ([{"input_ids": [2], "labels": 1}, {"input_ids": [2], "labels": [0.5, 0.5]}], "'labels' must be the ids"),
    ],
)
def test_rows_that_make_no_batch_are_refused(rows, expected):
    with pytest.raises(ValueError, match=expected):
        PaddingCollator()(rows)


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="'right' or 'left', got 'top'"):
        PaddingCollator(padding_side="top")
