"""
The sides of rivals.py: each answers a list of texts with one engine, and all have the same weights.

To add an engine, write a converter in rivals_engines.py and its row there. To add anything else, write a `Side` with
`prepare` and `logits`, and its row in `sides_of`.
"""

from __future__ import annotations

import copy
import csv
import gzip
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rivals_engines import ENGINES
from serving_runs import CUT, REVIEWS, load_tokenizer, model_that_leaves, own_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, TextClassificationPipeline
from transformers.modeling_outputs import SequenceClassifierOutput

import fastbert_hf
from fastbert_hf import FastBertForSequenceClassification, FastBertOnnx, FastBertOpenVino


SORTED_BATCHES = (1, 4, 8, 16, 32, 64)
PIPELINE_BATCHES = (1, 8, 32)
# Of the layers, in the model whose texts leave by chance.
SHARE = 1 / 3
# Scales of tokens that are fixed by texts of train.
STATIC = "static int8"
EXPORTED = {"onnx": FastBertOnnx, "openvino": FastBertOpenVino}
SHAPE_OF = {"minilm": "MiniLM", "base": "BERT-base"}
# Fewer for random weights, of which nothing but the time is asked.
CALIBRATION_TEXTS = {"minilm": 300, "base": 32}


@dataclass
class Rows:
    """Texts and their labels."""

    texts: list[str]
    labels: list[int]

    def first(self, number: int) -> Rows:
        """Return so many of them."""
        return Rows(self.texts[:number], self.labels[:number])


def read_rows(data_dir: str, data_set: str, split: str) -> Rows:
    """Read one split of a data set, in the order of its file."""
    with gzip.open(Path(data_dir, data_set, f"{split}.tsv.gz"), "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return Rows([row["text_a"] for row in rows], [int(row["label"]) for row in rows])


def shuffled(rows: Rows, seed: int = 0) -> Rows:
    """Return the rows in a random order, always the same."""
    order = np.random.default_rng(seed).permutation(len(rows.texts))
    return Rows([rows.texts[row] for row in order], [rows.labels[row] for row in order])


class ExitHead(nn.Module):
    """The last exit of a model, type `"attention"`, on padded batches and in plain PyTorch: of the same weights."""

    def __init__(self, exit_classifier: nn.Module):
        super().__init__()
        pooler = exit_classifier.pooler
        self.num_heads = pooler.num_heads
        self.projection, self.output, self.dense = pooler.exit_projection, pooler.exit_output, pooler.exit_dense
        self.query, self.key, self.value = pooler.exit_query, pooler.exit_key, pooler.exit_value
        self.out_proj = exit_classifier.out_proj

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden_states = self.projection(hidden_states).tanh()  # [batch, tokens, size]
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [batch, heads, tokens, head_dim]
            for states in (self.query(hidden_states[:, :1]), self.key(hidden_states), self.value(hidden_states))
        )
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(attention_mask[:, None, None] == 0, float("-inf")).softmax(-1)
        attended = (scores @ value).transpose(1, 2).flatten(2)[:, 0]  # [batch, size]
        return self.out_proj(self.dense(self.output(attended)).tanh())


class StockClassifier(BertForSequenceClassification):
    """The stock encoder with the last exit as its head: what a FastBERT model computes at speed 0."""

    def __init__(self, config: BertConfig, exit_classifier: nn.Module):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = ExitHead(copy.deepcopy(exit_classifier))

    @classmethod
    def of(cls, model: FastBertForSequenceClassification) -> StockClassifier:
        """Return one with the weights of a model."""
        backbone = model.fastbert.backbone
        config = BertConfig.from_dict(backbone.config.to_dict())
        config.id2label, config.label2id = model.config.id2label, model.config.label2id
        config._attn_implementation = "sdpa"
        stock = cls(config, model.exits[-1])
        stock.bert.load_state_dict(backbone.state_dict())
        return stock.eval()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, **kwargs):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden_states = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]
        return SequenceClassifierOutput(logits=self.classifier(hidden_states, attention_mask))


@dataclass
class Case:
    """
    A model and its texts, as all sides get them.

    Args:
        name (`str`): `"minilm"` or `"base"`.
        data_dir (`str`): Folder of the data sets.
        threads (`int`): For every engine.
        folder (`Path`): For files of converted models.
    """

    name: str
    data_dir: str
    threads: int
    folder: Path
    converted: dict[str, Path] = field(default_factory=dict)
    made: dict[str, FastBertForSequenceClassification] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        """Return the key of `SHAPES` in serving_runs.py."""
        return SHAPE_OF[self.name]

    @property
    def is_trained(self) -> bool:
        """Return whether answers mean anything."""
        return self.name == "minilm"

    def rows(self, split: str) -> Rows:
        """Return a split of the texts; those of train and of the untrained model in a random order."""
        rows = read_rows(self.data_dir, REVIEWS[self.shape], split)
        return rows if self.is_trained and split != "train" else shuffled(rows)

    @cached_property
    def tokenizer(self):
        return load_tokenizer()

    @cached_property
    def stock(self) -> StockClassifier:
        return StockClassifier.of(own_model(self.shape))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts."""
        options = {**CUT, "return_attention_mask": False, "return_token_type_ids": False}
        return self.tokenizer(texts, **options)["input_ids"]

    def calibration(self, same_length: bool = False) -> Iterator[dict[str, np.ndarray]]:
        """Yield what engines that need it may see: texts of train, one at a time, on request all equally long."""
        encoded = self.encode(self.rows("train").first(20_000).texts)
        if same_length:  # as many as a text of dev
            usual = int(np.median([len(ids) for ids in self.encode(self.rows("dev").texts)]))
            encoded = [ids for ids in encoded if len(ids) == usual]
        for ids in encoded[: CALIBRATION_TEXTS[self.name]]:
            yield {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}

    @cached_property
    def float32(self) -> FastBertForSequenceClassification:
        return self._own()

    @cached_property
    def int8(self) -> FastBertForSequenceClassification:
        fastbert_hf.load_operators()
        model = self._own()
        model.use_int8_layers()
        return model

    def exported(self, kind: str) -> FastBertForSequenceClassification:
        """Return the model as another engine runs it, `"onnx"`, `"onnx int8"`, ...; exits leave as in PyTorch."""
        if kind in self.made:
            return self.made[kind]
        backend, _, quantize = kind.partition(" ")
        folder = self.folder / kind.replace(" ", "_")
        settings = {"quantize": "int8" if quantize else None, "tokenizer": self.tokenizer, "progress": False}
        if quantize == STATIC:
            texts = self.rows("train").first(20_000).texts[: CALIBRATION_TEXTS[self.name]]
            settings["calibration_texts"] = texts
        fastbert_hf.export(own_model(self.shape), folder, backend, **settings)
        model = EXPORTED[backend].from_pretrained(folder, num_threads=self.threads)
        own_run = model.graphs.run
        by_chance = {
            f"exit_{depth:02d}": hook
            for depth, own in enumerate(self.float32.exits, start=1)
            for hook in own._forward_hooks.values()
        }

        def run(name: str, given: dict) -> list[torch.Tensor]:
            outputs = own_run(name, given)
            return [by_chance[name](None, None, outputs[0])] if name in by_chance else outputs

        model.graphs.run = run
        self.made[kind] = model
        return model

    def _own(self) -> FastBertForSequenceClassification:
        # At speed 0 the exits that answer by chance do not run.
        return own_model(self.shape) if self.is_trained else model_that_leaves(self.shape, SHARE, [])[0]

    def chosen_speed(self, model: FastBertForSequenceClassification) -> float:
        """Return the fastest speed that loses at most 0.5 points on dev, and leave the model as it was."""
        dev, before = self.rows("dev"), model.config.speed
        rows = [
            {"input_ids": ids, "label": label} for ids, label in zip(self.encode(dev.texts), dev.labels, strict=True)
        ]
        choice = fastbert_hf.choose_speed(model, rows, max_loss=0.5, tokenizer=self.tokenizer, progress=False)
        model.config.speed = before
        return choice.speed


class Side(ABC):
    """
    Answers texts with one engine. `batch_size` is set to the best of `batch_sizes` by whoever measures.

    Args:
        case ([`Case`]): What it answers with.
    """

    batch_sizes: tuple[int | None, ...] = SORTED_BATCHES
    # Its head is not that of the others, or its exits leave by chance: it can only be timed.
    only_times = False

    def __init__(self, case: Case):
        self.case, self.batch_size, self.notes = case, None, {}

    @abstractmethod
    def prepare(self) -> None:
        """Load or convert the model; whatever is raised here becomes the row of this side."""

    @abstractmethod
    def logits(self, texts: list[str]) -> np.ndarray:
        """Return the logits of texts, `[texts, num_labels]`, in their order."""

    def answer(self, texts: list[str]) -> list[int]:
        """Return the label ids of texts: what is timed."""
        return self.logits(texts).argmax(-1).tolist()

    def answer_one(self, text: str) -> int:
        """Return the label id of one text: what is timed one at a time."""
        return self.answer([text])[0]


class SortedSide(Side):
    """Answers padded batches of texts sorted by length, with what `convert` makes of a case."""

    def __init__(self, case: Case, convert: Callable):
        super().__init__(case)
        self.convert, self.run = convert, None

    def prepare(self) -> None:
        self.run, self.notes = self.convert(self.case)

    def logits(self, texts: list[str]) -> np.ndarray:
        encoded = self.case.encode(texts)
        order = sorted(range(len(texts)), key=lambda row: len(encoded[row]))
        parts = []
        for start in range(0, len(order), self.batch_size):
            rows = [encoded[row] for row in order[start : start + self.batch_size]]
            input_ids = np.zeros((len(rows), len(rows[-1])), np.int64)  # sorted: the last one is the longest
            attention_mask = np.zeros_like(input_ids)
            for place, ids in enumerate(rows):
                input_ids[place, : len(ids)] = ids
                attention_mask[place, : len(ids)] = 1
            parts.append(self.run(input_ids, attention_mask))
        logits = np.concatenate(parts)
        answers = np.empty_like(logits)
        answers[order] = logits
        return answers


class StockPipeline(Side):
    """The pipeline `text-classification` as users call it, in the order of the texts."""

    batch_sizes = PIPELINE_BATCHES

    def prepare(self) -> None:
        quiet = logging.getLogger("transformers.pipelines.base")
        quiet.disabled = True  # it does not know the class of the model
        self.pipeline = TextClassificationPipeline(model=self.case.stock, tokenizer=self.case.tokenizer, device="cpu")
        quiet.disabled = False

    def logits(self, texts: list[str]) -> np.ndarray:
        # With a list, a list of lists comes back.
        return _scores(self._call(texts, top_k=None, function_to_apply="none"), self.case.stock.config)

    def answer(self, texts: list[str]) -> list[int]:
        label2id = self.case.stock.config.label2id
        return [label2id[one["label"]] for one in self._call(texts)]

    def answer_one(self, text: str) -> int:
        return self.case.stock.config.label2id[self.pipeline(text, **CUT)[0]["label"]]

    def _call(self, texts: list[str], **options):
        return self.pipeline(texts, batch_size=self.batch_size, **CUT, **options)


class OwnPipeline(Side):
    """
    The pipeline of this package, which needs no batch size.

    Args:
        kind (`str`): `"float32"` or `"int8"` in PyTorch, or that of an exported model: `"onnx"`, `"onnx int8"`, ...
        speed (`str`): `"full"`, `"config"`, `"chosen"` on dev, or `"share"` of the layers, by chance.
    """

    batch_sizes = (None,)

    def __init__(self, case: Case, kind: str, speed: str):
        super().__init__(case)
        self.kind, self.asked, self.exit_layers = kind, speed, []
        self.only_times = speed == "share"

    def prepare(self) -> None:
        in_torch = self.kind in ("float32", "int8")
        model = getattr(self.case, self.kind) if in_torch else self.case.exported(self.kind)
        self.pipeline = fastbert_hf.FastTextClassificationPipeline(model, tokenizer=self.case.tokenizer, device="cpu")
        given = {"full": lambda: 0.0, "config": lambda: model.config.speed, "share": lambda: 0.5}
        self.speed = given.get(self.asked, lambda: self.case.chosen_speed(model))()
        self.notes["speed"] = self.speed

    def logits(self, texts: list[str]) -> np.ndarray:
        answers = self.pipeline(texts, speed=self.speed, top_k=None, function_to_apply="none", **CUT)
        return _scores(answers, self.pipeline.model.config)

    def answer(self, texts: list[str]) -> list[int]:
        label2id = self.pipeline.model.config.label2id
        answers = self.pipeline(texts, speed=self.speed, **CUT)
        self.exit_layers = [one["exit_layer"] for one in answers]
        return [label2id[one["label"]] for one in answers]

    def answer_one(self, text: str) -> int:
        (answer,) = self.pipeline(text, speed=self.speed, **CUT)
        self.exit_layers.append(answer["exit_layer"])
        return self.pipeline.model.config.label2id[answer["label"]]


class SentenceTransformers(Side):
    """
    `CrossEncoder` of sentence-transformers, which sorts texts by itself. It can load stock heads alone, so its head
    has random weights. How many threads it takes is its own affair. Its backends need optimum, of which optimum-onnx
    0.0.1 wants Transformers below 4.56.
    """

    batch_sizes = PIPELINE_BATCHES[1:]
    only_times = True

    def __init__(self, case: Case, backend: str):
        super().__init__(case)
        self.backend = backend

    def prepare(self) -> None:
        from sentence_transformers import CrossEncoder

        folder = self.case.folder / f"{self.case.name}-stock"
        if not folder.is_dir():
            stock = BertForSequenceClassification(self.case.stock.config)
            stock.bert.load_state_dict(self.case.stock.bert.state_dict(), strict=False)
            stock.save_pretrained(folder)
            self.case.tokenizer.save_pretrained(folder)
        self.model = CrossEncoder(str(folder), backend=self.backend, max_length=CUT["max_length"], device="cpu")

    def logits(self, texts: list[str]) -> np.ndarray:
        return self.model.predict([(text, "") for text in texts], batch_size=self.batch_size, show_progress_bar=False)


def _scores(answers: list[list[dict]], config) -> np.ndarray:
    logits = np.empty((len(answers), config.num_labels), np.float32)
    for row, answer in zip(logits, answers, strict=True):
        for one in answer:
            row[config.label2id[one["label"]]] = one["score"]
    return logits


def sides_of(case: Case) -> dict[str, Side]:
    """Return the sides of a comparison by their names, the one that all ratios are against first."""
    sides: dict[str, Side] = {"stock pipeline": StockPipeline(case)}
    sides |= {name: SortedSide(case, convert) for name, convert in ENGINES.items()}
    sides |= {f"sentence-transformers, {of}": SentenceTransformers(case, of) for of in ("onnx", "openvino")}
    kinds = {"ours float32": "float32", "ours int8": "int8"}
    kinds |= {f"ours, {backend}{kind}": backend + kind for backend in EXPORTED for kind in ("", " int8")}
    kinds[f"ours, openvino {STATIC}"] = f"openvino {STATIC}"
    speeds = {"": "full", ", speed of the config": "config", ", chosen on dev": "chosen"}
    if not case.is_trained:
        speeds = {"": "full", f", {SHARE:.0%} of the layers": "share"}
    for name, kind in kinds.items():
        sides |= {name + suffix: OwnPipeline(case, kind, speed) for suffix, speed in speeds.items()}
    return sides


def prepared(sides: dict[str, Side]) -> dict[str, str]:
    """Prepare sides, take those that cannot answer out of the `dict`, and return why, by their names."""
    failed = {}
    for name, side in list(sides.items()):
        try:
            with warnings.catch_warnings(), torch.inference_mode(False):
                warnings.simplefilter("ignore")
                side.prepare()
            for batch_size in (side.batch_sizes[0], side.batch_sizes[-1]):
                side.batch_size = batch_size
                side.answer(["Fine.", "A text of some more words than the other one.", "No."])
        except Exception as error:  # whatever an engine does, the others are measured
            failed[name] = f"{type(error).__name__}: {error}"[:600]
            del sides[name]
        print(f"{name}: {failed.get(name, 'ready')}", flush=True)
    return failed
