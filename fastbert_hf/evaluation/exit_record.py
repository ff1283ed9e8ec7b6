"""What every exit says of every row, and what it costs: one full-depth pass, from which every speed follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.families import max_text_tokens
from ..modeling.processing_cascade import CascadeProcessor
from ..modeling.tasks import task_of
from ..rows import LABEL_NAMES, PADDED_WITH, SPAN_NAMES, PaddingCollator, encoded_rows
from .flops import executed_costs


@dataclass(frozen=True)
class ExitRecord:
    """
    The answers of every exit to every row, and their costs. [`replay`] tells from them what happens at other speeds.

    Args:
        exit_logits (`torch.Tensor` of shape `[rows, L, num_labels]`, float32):
            Of every exit on every row; for a cascade those of all members, one behind the other. Where tokens are
            labelled `[rows, L, tokens, num_labels]`, -100 where a row has no more tokens.
        layer_flops (`torch.Tensor` of shape `[rows, L]`, long, *optional*):
            What each layer costs for each row. The embeddings count in the first layer of a member.
        exit_flops (`torch.Tensor` of shape `[rows, L]`, long, *optional*): What each exit costs if it is evaluated.
        labels (`torch.Tensor` of shape `[rows]`, long, *optional*):
            Gold labels, where the data has them; a number for each label of several, or for each token, where the task
            has those: `[rows, num_labels]`, `[rows, tokens]`.
        member_layers (`tuple[int, ...]`, *optional*):
            Layers of each member of a cascade, which add up to L. One model of L layers unless given.
        weights (`tuple[str, ...]`, *optional*):
            Digest of the weights of each member that was recorded, empty where there is none. Unknown unless given.
    """

    exit_logits: torch.Tensor
    layer_flops: torch.Tensor | None = None
    exit_flops: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    member_layers: tuple[int, ...] = ()
    weights: tuple[str, ...] = ()

    def __post_init__(self):
        if self.exit_logits.dim() not in (3, 4) or self.exit_logits.shape[0] == 0:
            raise ValueError(
                "exit_logits must be [rows, L, num_labels], or [rows, L, tokens, num_labels], of at least one row, "
                f"got {list(self.exit_logits.shape)}."
            )
        rows, layers = self.exit_logits.shape[:2]
        has_many = self.labels is not None and self.labels.dim() == 2 and len(self.labels) == rows
        has_many = has_many and self.labels.shape[1] in self.exit_logits.shape[2:]
        for name, shape, meaning in (
            ("layer_flops", (rows, layers), "[rows, L]"),
            ("exit_flops", (rows, layers), "[rows, L]"),
            *(() if has_many else [("labels", (rows,), "[rows]")]),
        ):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} must be {meaning} = {list(shape)}, got {list(value.shape)}.")
        object.__setattr__(self, "member_layers", tuple(self.member_layers) or (layers,))
        object.__setattr__(self, "weights", tuple(self.weights))
        if sum(self.member_layers) != layers:
            raise ValueError(
                f"member_layers={self.member_layers} must add up to the {layers} exits of exit_logits. "
                f"Example: member_layers=({layers},)"
            )

    @classmethod
    def of_members(cls, records: Sequence[ExitRecord]) -> ExitRecord:
        """
        Return the record of a cascade from those of its members on the same rows.

        Args:
            records (sequence of [`ExitRecord`]): One for each member, in their order.
        """
        rows = [len(record.exit_logits) for record in records]
        if len(set(rows)) != 1:
            raise ValueError(f"the records of the members must be of the same rows, got {rows} rows.")
        labels = records[-1].labels
        for record in records:
            if (record.labels is None) != (labels is None) or (labels is not None and (record.labels != labels).any()):
                raise ValueError(
                    "the records of the members have different labels: record the same rows in the same order."
                )
        costs = {name: [getattr(record, name) for record in records] for name in ("layer_flops", "exit_flops")}
        return cls(
            exit_logits=torch.cat([record.exit_logits for record in records], 1),
            **{
                name: None if any(part is None for part in parts) else torch.cat(parts, 1)
                for name, parts in costs.items()
            },
            labels=labels,
            member_layers=tuple(layers for record in records for layers in record.member_layers),
            weights=tuple(digest for record in records for digest in record.weights or [""]),
        )

    @property
    def num_exits(self) -> int:
        """Return the number of exits, L, of all members together."""
        return self.exit_logits.shape[1]

    @property
    def columns_of_members(self) -> list[slice]:
        """Return where the exits of each member are along the second dimension."""
        return [slice(*ends) for ends in pairwise(accumulate(self.member_layers, initial=0))]

    def of_member(self, number: int) -> ExitRecord:
        """
        Return the record of one member of a cascade.

        Args:
            number (`int`): 1 to n.
        """
        if not 1 <= number <= len(self.member_layers):
            raise ValueError(f"number must be from 1 to {len(self.member_layers)} (the members), got {number}.")
        columns = self.columns_of_members[number - 1]
        return ExitRecord(
            self.exit_logits[:, columns],
            *(None if costs is None else costs[:, columns] for costs in (self.layer_flops, self.exit_flops)),
            self.labels,
            weights=self.weights[number - 1 : number],
        )

    def select(self, rows: torch.Tensor) -> ExitRecord:
        """
        Return the record of some rows.

        Args:
            rows (`torch.Tensor`): Their numbers, or a mask of shape `[rows]`.
        """
        parts = (self.exit_logits, self.layer_flops, self.exit_flops, self.labels)
        chosen = (None if part is None else part[rows] for part in parts)
        return ExitRecord(*chosen, self.member_layers, self.weights)


def record_exits(
    model: PreTrainedModel,
    dataset: Sequence[Any] | Sequence[Sequence[Any]],
    data_collator: Callable | Sequence[Callable] | None = None,
    batch_size: int = 64,
    progress: bool = True,
    tokenizer: PreTrainedTokenizerBase | CascadeProcessor | None = None,
) -> ExitRecord:
    """
    Run every row through every layer and every exit, once; of a cascade through every member.

    Args:
        model ([`FastBertForSequenceClassification`] or [`CascadeForSequenceClassification`]): Put into eval mode.
        dataset (`datasets.Dataset`, or sequence of `dict` or `str`):
            Texts, or rows with `text`, and `text_pair` if any; or tokenized rows, `input_ids` and what else the
            tokenizer gave. `labels` or `label` if any; other columns are left out. Where every member of a cascade has
            its own tokenizer, tokenized rows are a list of such data sets, of the same rows.
        data_collator (`Callable`, *optional*):
            Makes a padded batch; a list with one for each member where `dataset` is one. Rows are padded as the model
            needs it unless given.
        batch_size (`int`): Rows in a batch.
        progress (`bool`): Whether to show a progress bar.
        tokenizer (`PreTrainedTokenizerBase` or [`CascadeProcessor`], *optional*):
            The model's. Needed for texts, which are cut to what it and the model can read.

    Returns:
        [`ExitRecord`], on the CPU, in the order of the data set.

    Example:

    ```python
    >>> record = record_exits(model, [{"text": "Fine.", "label": 1}], tokenizer=tokenizer)
    ```
    """
    members = list(getattr(model, "members", [model]))
    tokenizers = getattr(tokenizer, "tokenizers", [tokenizer])  # a processor has one, or one for each member
    collators = data_collator if isinstance(data_collator, Sequence) else [data_collator] * len(members)
    if getattr(model.config, "own_tokenizers", False):
        datasets = _datasets_of_members(len(members), dataset, tokenizers, data_collator)
        tokenizers = [None] * len(members) if tokenizer is None else tokenizers
        parts = zip(datasets, tokenizers, members, strict=True)
        datasets = [_tokenized(rows, own, [member]) for rows, own, member in parts]
    else:
        datasets = [_tokenized(dataset, tokenizers[0], members)] * len(members)
    parts = zip(members, datasets, collators, strict=True)
    records = [_record_model(*part, batch_size, progress) for part in parts]
    return ExitRecord.of_members(records) if hasattr(model, "members") else records[0]


def as_record(
    model: PreTrainedModel,
    rows: Any,
    tokenizer: PreTrainedTokenizerBase | CascadeProcessor | None = None,
    **settings: Any,
) -> ExitRecord:
    """Return a record as it is, and that of texts or rows, which [`record_exits`] makes with these settings."""
    return rows if isinstance(rows, ExitRecord) else record_exits(model, rows, tokenizer=tokenizer, **settings)


def _datasets_of_members(number: int, dataset: Any, tokenizers: Sequence[Any], data_collator: Any) -> Sequence[Any]:
    """Return the rows of every member of a cascade, where each has its own tokenizer."""
    if tokenizers[0] is not None:
        datasets = [dataset] * len(tokenizers)
    else:
        datasets = [] if isinstance(dataset[0], (str, Mapping)) else dataset
    collators = [None] * number if data_collator is None else data_collator
    if callable(collators) or not len(datasets) == len(collators) == number:
        raise ValueError(
            f"each of the {number} members has its own tokenizer: give a list of {number} datasets, of the same rows, "
            f"and one of {number} data collators or none; or texts and "
            "tokenizer=CascadeProcessor.from_pretrained(folder)."
        )
    return datasets


def _tokenized(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, members: Sequence[PreTrainedModel]
) -> Sequence[Mapping[str, Any]]:
    """Return rows as members read them, which share the tokenizer."""
    configs = [member.config for member in members]
    limit = None
    if tokenizer is not None:
        limit = min(tokenizer.model_max_length, *(max_text_tokens(config.text_config) for config in configs))
    is_stream = isinstance(dataset, Iterable) and not hasattr(dataset, "__len__") and not hasattr(dataset, "features")
    rows = list(dataset) if is_stream else dataset
    rows = encoded_rows(rows, tokenizer, limit, configs[0].label2id, label_kind=configs[0].label_kind)
    rows = rows if hasattr(rows, "__len__") else list(rows)
    if len(rows) == 0:
        raise ValueError("the data set has no rows: give at least one.")
    return rows


def _record_model(
    model: PreTrainedModel,
    dataset: Sequence[Mapping[str, Any]],
    data_collator: Callable | None,
    batch_size: int,
    progress: bool,
) -> ExitRecord:
    model.eval()
    data_collator, task = data_collator or PaddingCollator.of(model), task_of(model.config)
    lengths = torch.tensor([sum(row.get("attention_mask", [1] * len(row["input_ids"]))) for row in dataset])
    order = lengths.argsort(stable=True)  # texts of similar length share a batch
    exit_logits, labels = [], []
    with torch.inference_mode(), tqdm(total=len(order), desc="Recording exits", disable=not progress) as bar:
        for rows in order.split(batch_size):
            batch = dict(data_collator([_read_columns(dataset[row]) for row in rows.tolist()]))
            gold = batch.pop("labels", None)
            if gold is not None:
                task.check_gold(gold)
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            logits = model(**inputs, output_exit_logits=True).exit_logits.float().cpu()
            exit_logits.append(task.labelled(logits, wanted_labels(batch, gold)))
            labels.append(gold)
            bar.update(len(rows))
    if any(gold is None for gold in labels) and any(gold is not None for gold in labels):
        raise ValueError("some rows have labels and others none: leave out these rows, or the labels of all.")
    back = order.argsort()
    return ExitRecord(
        task.layout.cat(exit_logits)[back].clone(),  # outside inference mode: a tensor like any other
        *executed_costs(model, lengths),
        labels=task.cat_labels(labels)[back] if labels[0] is not None else None,
        weights=(model.weights_digest(),),
    )


def wanted_labels(batch: Mapping[str, torch.Tensor], gold: torch.Tensor | None) -> torch.Tensor | None:
    """Return -100 for each token whose label nobody wants, by the mask of the rows or by their labels."""
    mask = batch.get("token_mask")
    return gold if mask is None else mask.long() * 100 - 100


def _read_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is read of a row; texts, for one, cannot be padded."""
    return {name: value for name, value in row.items() if name in (*PADDED_WITH, *LABEL_NAMES, *SPAN_NAMES)}
