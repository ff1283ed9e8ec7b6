"""What every exit says of every row: one full-depth pass, from which all speeds and policies follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from ..modeling.modeling_fastbert import FastBertForSequenceClassification


@dataclass(frozen=True)
class ExitRecord:
    """
    Args:
        exit_logits (`torch.Tensor` of shape `[rows, L, num_labels]`, float32): Of every exit on every row.
        lengths (`torch.Tensor` of shape `[rows]`, long): Tokens of each text.
        labels (`torch.Tensor` of shape `[rows]`, long, *optional*): Gold labels, where the data has them.
    """

    exit_logits: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor | None = None

    def __post_init__(self):
        rows = self.exit_logits.shape[0]
        if self.exit_logits.dim() != 3 or rows == 0:
            raise ValueError(
                f"exit_logits must be [rows, L, num_labels] of at least one row, got {list(self.exit_logits.shape)}."
            )
        for name in ("lengths", "labels"):
            value = getattr(self, name)
            if value is not None and value.shape != (rows,):
                raise ValueError(f"{name} must be [rows] = [{rows}], got {list(value.shape)}.")

    @property
    def num_exits(self) -> int:
        """L."""
        return self.exit_logits.shape[1]

    def select(self, rows: torch.Tensor) -> ExitRecord:
        """The record of some rows, by number or by a mask of shape `[rows]`."""
        return ExitRecord(
            self.exit_logits[rows], self.lengths[rows], None if self.labels is None else self.labels[rows]
        )


def record_exits(
    model: FastBertForSequenceClassification,
    dataset: Sequence[Mapping[str, Any]],
    data_collator: Callable[[list[Mapping[str, Any]]], Mapping[str, torch.Tensor]],
    batch_size: int = 64,
    progress: bool = True,
) -> ExitRecord:
    """
    Runs every row through every layer and every exit, once.

    Args:
        model ([`FastBertForSequenceClassification`]): Put into eval mode.
        dataset (sequence of `dict`): Tokenized rows, `input_ids` and what else the tokenizer gave; `labels` if any.
        data_collator (`Callable`): Makes a padded batch, as `DataCollatorWithPadding(tokenizer)`.
        batch_size (`int`): Rows in a batch.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`ExitRecord`], on the CPU, in the order of the data set.
    """
    if len(dataset) == 0:
        raise ValueError("the data set has no rows: give at least one.")
    model.eval()
    lengths = torch.tensor([sum(row.get("attention_mask", [1] * len(row["input_ids"]))) for row in dataset])
    order = lengths.argsort(stable=True)  # texts of similar length share a batch
    exit_logits, labels = [], []
    with torch.inference_mode(), tqdm(total=len(order), desc="Recording exits", disable=not progress) as bar:
        for rows in order.split(batch_size):
            batch = dict(data_collator([dataset[row] for row in rows.tolist()]))
            gold = batch.pop("labels", None)
            if gold is not None and (gold.min() < 0 or gold.max() >= model.config.num_labels):
                raise ValueError(
                    f"labels must be from 0 to {model.config.num_labels - 1}, got {gold.min()} to {gold.max()}: for "
                    "data without gold labels leave out the column 'labels'."
                )
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            exit_logits.append(model(**inputs, output_exit_logits=True).exit_logits.float().cpu())
            labels.append(gold)
            bar.update(len(rows))
    back = order.argsort()
    return ExitRecord(
        exit_logits=torch.cat(exit_logits)[back].clone(),
        lengths=lengths,
        labels=torch.cat(labels)[back] if labels[0] is not None else None,
    )
