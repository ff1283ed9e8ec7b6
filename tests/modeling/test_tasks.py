"""What labels may be: ids, or the probabilities of all labels; several labels for one text are neither."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from ..common import assert_close, one_label, ragged_batch, tiny_model, tiny_rows, training_settings


CLASSIFICATION = one_label()
LOGITS = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 2.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exits", [None, 2])
def test_probabilities_are_learnt_whatever_their_dtype(dtype, exits):
    probabilities = torch.tensor([[0.2, 0.3, 0.5], [0.85, 0.1, 0.05]], dtype=dtype)
    logits = LOGITS if exits is None else torch.stack([LOGITS] * exits, 1)
    expected = -(probabilities.double() * LOGITS.double().log_softmax(-1)).sum(-1).mean()
    loss = CLASSIFICATION.mean_loss(logits, probabilities)
    assert_close(loss.double(), expected if exits is None else expected.expand(exits), 1e-6)


@pytest.mark.parametrize("num_labels", [2, 77, 1_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_model_gives_as_probabilities_is_accepted(num_labels, dtype):
    logits = torch.randn(64, num_labels, generator=torch.Generator().manual_seed(0)) * 3
    CLASSIFICATION.mean_loss(logits, logits.softmax(-1).to(dtype))


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ([1.0, 1.0, 0.0], r"\[1\.0, 1\.0, 0\.0\]"),
        ([0.0, 0.0, 0.0], r"\[0\.0, 0\.0, 0\.0\]"),
        ([0.5, 0.502, 0.0], r"\[0\.5, 0\.502, 0\.0\]"),
        ([1.5, -0.5, 0.0], r"\[1\.5, -0\.5, 0\.0\]"),
        ([float("nan"), 1.0, 0.0], r"\[nan, 1\.0, 0\.0\]"),
    ],
)
def test_float_labels_that_are_no_probabilities_are_refused_by_row(row, shown):
    with pytest.raises(ValueError, match=rf"row 1, {shown}, are no probabilities.*Several labels.*torch\.tensor\("):
        CLASSIFICATION.mean_loss(LOGITS, torch.tensor([[1.0, 0.0, 0.0], row]))


@pytest.mark.parametrize("labels", [[1.0, 0.0], [[1, 1, 0], [0, 1, 0]], [[1.0, 0.0], [0.0, 1.0]], [0, 1, 2]])
def test_labels_of_another_shape_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels of shape \[.*do not fit logits of shape \[2, 3\]: give one id"):
        CLASSIFICATION.mean_loss(LOGITS, torch.tensor(labels))


def test_several_labels_for_one_text_are_refused_by_model_and_trainer(tmp_path):
    model = tiny_model()
    labels = torch.tensor([[1.0, 1.0, 0.0]] * 7)
    with pytest.raises(ValueError, match=r"row 0, .* are no probabilities"):
        model(**ragged_batch(), labels=labels)
    rows = [{**row, "labels": labels[0]} for row in tiny_rows(8)]
    trainer = Trainer(model, TrainingArguments(**training_settings(tmp_path)), train_dataset=rows)
    with pytest.raises(ValueError, match=r"row 0, .* are no probabilities"):
        trainer.train()
