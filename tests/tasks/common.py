"""A tiny model of each task, its stock counterpart, and its gold labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification, FastBertForTokenClassification
from fastbert_hf.evaluation.task_metrics import metrics_of
from fastbert_hf.modeling.tasks import task_class

from ..common import NUM_LAYERS, VOCAB_SIZE, spread_out, tiny_text_config


TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
OF_TAGS = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: number for number, tag in enumerate(TAGS)}}
# What a stock config says of each task.
LABELS: dict[str, dict[str, Any]] = {
    "single_label": {"num_labels": 3},
    "several_labels": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "several_labels_with_thresholds": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "one_number": {"num_labels": 1, "problem_type": "regression"},
    "several_numbers": {"num_labels": 2, "problem_type": "regression"},
    "tokens": OF_TAGS,
}
# What ours says beside that.
OWN: dict[str, dict[str, Any]] = {
    "single_label": {},
    "several_labels": {},
    "several_labels_with_thresholds": {"label_thresholds": [0.2, 0.5, 0.7]},
    "one_number": {"tolerance": 0.4},
    "several_numbers": {"tolerance": 0.8},
    "tokens": {},
}
TASKS = tuple(LABELS)


def class_of(task: str) -> type:
    """Return the model class of a task."""
    return FastBertForTokenClassification if task == "tokens" else FastBertForSequenceClassification


def stock_class_of(task: str) -> type:
    """Return the Auto class of Transformers for a task."""
    return AutoModelForTokenClassification if task == "tokens" else AutoModelForSequenceClassification


def tiny_task_model(task: str, family: str = "bert", seed: int = 0, **config) -> PreTrainedModel:
    """Return a model of a task, in eval mode, whose exits disagree."""
    torch.manual_seed(seed)
    # Exits of 128 would cost more than layers of 32.
    settings = {"task": class_of(task).task, "exit_hidden_size": 16, **LABELS[task], **OWN[task], **config}
    model = class_of(task)(FastBertConfig(text_config=tiny_text_config(family), **settings))
    return balanced(spread_out(model, seed))


@torch.no_grad()
def balanced(model: PreTrainedModel) -> PreTrainedModel:
    """Make what each exit says differ from text to text, around 0, so that it gives many answers."""
    batch = padded(encoded_texts(48, seed=9, longest=20))
    logits = model(**batch, output_exit_logits=True).exit_logits
    if logits.dim() == 4:  # [rows, L, tokens, num_labels]
        logits = logits.transpose(1, 2)[batch["attention_mask"].bool()]
    for exit_classifier, mean, deviation in zip(model.exits, logits.mean(0), logits.std(0), strict=True):
        exit_classifier.out_proj.weight /= deviation[:, None]
        exit_classifier.out_proj.bias.sub_(mean).div_(deviation)
    return model


TASK_MODELS: dict[str, Callable[..., PreTrainedModel]] = {task: partial(tiny_task_model, task) for task in TASKS}


def stock_task_model(task: str, family: str = "bert", seed: int = 0, **fields) -> PreTrainedModel:
    """Return a fine-tuned stock model of a task, as far as a test can tell."""
    config = tiny_text_config(family)
    for name, value in {**LABELS[task], **fields}.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return spread_out(stock_class_of(task).from_config(config), seed)


def wrapped(task: str, stock: PreTrainedModel, **config) -> PreTrainedModel:
    """Return the model around a stock one of the task."""
    return class_of(task).from_classifier(stock, **{**OWN[task], **config})


def gold_of(task: str, attention_mask: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return labels of a padded batch; of the tokens some have none."""
    generator, rows = torch.Generator().manual_seed(seed), len(attention_mask)
    if task == "tokens":
        labels = torch.randint(len(TAGS), attention_mask.shape, generator=generator)
        has_none = (torch.rand(attention_mask.shape, generator=generator) < 0.3) | (attention_mask == 0)
        return labels.masked_fill(has_none, -100)
    number = LABELS[task]["num_labels"]
    if task.startswith("several_labels"):
        return torch.randint(2, (rows, number), generator=generator).float()
    if task in ("one_number", "several_numbers"):
        return torch.randn(rows, number, generator=generator).squeeze(-1)
    return torch.randint(number, (rows,), generator=generator)


def encoded_texts(number: int = 16, seed: int = 0, longest: int = 50) -> list[dict[str, list[int]]]:
    """Return texts of very different lengths, most of them short, as a tokenizer gives them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (1 + (longest - 1) * torch.rand(number, generator=generator) ** 2).long().tolist()
    return [{"input_ids": torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist()} for length in lengths]


def rows_of(task: str, number: int = 16, seed: int = 0, labels: bool = True, longest: int = 12) -> list[dict]:
    """Return tokenized rows, with gold labels or without."""
    rows = encoded_texts(number, seed, longest)
    if not labels:
        return rows
    gold = [gold_of(task, torch.ones(1, len(row["input_ids"])), seed + place)[0] for place, row in enumerate(rows)]
    return [{**row, "labels": own.tolist()} for row, own in zip(rows, gold, strict=True)]


def padded(rows: list[dict[str, list[int]]], pad_token_id: int = 0, side: str = "right") -> dict[str, torch.Tensor]:
    """Return texts as a padded batch."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": torch.full((len(rows), longest), pad_token_id)}
    batch["attention_mask"] = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        own = slice(0, length) if side == "right" else slice(longest - length, longest)
        batch["input_ids"][place, own] = torch.tensor(row["input_ids"])
        batch["attention_mask"][place, own] = 1
    return batch


def policies_of(task: str) -> tuple[str, ...]:
    """Return the exit policies that a task has."""
    return task_class(made_up_config(task)).policies()


def metrics_of_task(task: str) -> tuple[str, ...]:
    """Return the metrics that a task has."""
    return tuple(metrics_of(made_up_config(task)))


def made_up_config(task: str) -> PreTrainedConfig:
    """Return a config of a task."""
    settings = {"task": class_of(task).task, **LABELS[task], **OWN[task]}
    return FastBertConfig(text_config=tiny_text_config("bert"), **settings)


def task_gates(task: str, seed: int = 0, num_exits: int = NUM_LAYERS) -> list[list[float]]:
    """Return gates whose uncertainties are spread over [0, 1], also those of a regression, which are `e` to a sum."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randn(num_exits, 5, generator=generator) * 0.7
    if made_up_config(task).problem_type == "regression":
        gates[:, -1] -= 1.0
    return gates.tolist()


def texts_of_logits(logits: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """Return the logits of each text, without those of padding, of right-padded ones."""
    if logits.dim() == 2:
        return [*logits]
    return [of_text[:length] for of_text, length in zip(logits, lengths, strict=True)]


WORDS = [f"word{number}" for number in range(75)]
PIECES = [f"##{letter}" for letter in "abcdefghijklmnopqrst"]


def pieces_tokenizer(limit: int) -> BertTokenizer:
    """Return a tokenizer whose words can be several tokens, and which gives so many at once."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES]
    return BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, model_max_length=limit)


def made_up_texts(number: int, longest: int, seed: int = 0) -> list[str]:
    """Texts of words, some of which are several tokens, with a sign here and there, and no two spaces alike."""
    generator = torch.Generator().manual_seed(seed)

    def one_of(choices: list[str]) -> str:
        return choices[torch.randint(len(choices), (1,), generator=generator).item()]

    texts = []
    for place in range(number):
        length = 1 + place * (longest - 1) // max(number - 1, 1)
        words = [one_of(WORDS) + one_of(["", "", "a", "bc", "dq"]) for _ in range(length)]
        texts.append("".join(word + one_of([" ", "  ", " \t"]) for word in words))
    return texts
