"""Time models whose texts become shorter against those that read all tokens: a run of serving_speed.py."""

from __future__ import annotations

from functools import partial

import torch
from serving_runs import SHAPES, in_turn, ratios
from transformers import BertConfig

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification
from fastbert_hf.evaluation import executed_flops
from fastbert_hf.training import retention_schedule


TARGET = 0.5
KINDS = {"dropped": {"merge": "drop"}, "one coarse token": {"merge": "mean"}}
# Of a text, and how many texts make a stream.
TOKENS = {32: 128, 128: 48, 512: 12}


def model_of(shape: str, coarsening: dict | None = None) -> FastBertForSequenceClassification:
    """Return a model of random weights."""
    torch.manual_seed(0)
    config = FastBertConfig(text_config=BertConfig(**SHAPES[shape]), coarsening=coarsening)
    return FastBertForSequenceClassification(config).eval()


def against_all_tokens(shape: str, repeats: int) -> list[dict]:
    """Time streams of texts of about equal length at speed 0, and compare with the FLOPs that are executed."""
    models, rows = {"all": model_of(shape)}, []
    schedule = retention_schedule(models["all"].config.num_hidden_layers, TARGET)
    models |= {kind: model_of(shape, {**schedule, **settings}) for kind, settings in KINDS.items()}
    generator = torch.Generator().manual_seed(0)
    for tokens, number in TOKENS.items():
        number *= 1 if shape == "BERT-base" else 4
        # Real streams have texts of many lengths: from three quarters of this to all of it.
        lengths = torch.randint(3 * tokens // 4, tokens + 1, (number,), generator=generator)
        vocabulary = models["all"].config.vocab_size
        texts = [
            {"input_ids": torch.randint(1000, vocabulary, (length,), generator=generator).tolist()}
            for length in lengths.tolist()
        ]

        def run(model: FastBertForSequenceClassification, texts: list = texts) -> None:
            list(model.predict(texts, speed=0.0))

        seconds = in_turn({kind: partial(run, model) for kind, model in models.items()}, repeats, f"{shape}, {tokens}")
        depth = torch.full_like(lengths, models["all"].config.num_hidden_layers)
        flops = {
            kind: executed_flops(model, depth, lengths, students=False).double().mean().item()
            for kind, model in models.items()
        }
        for kind in KINDS:
            fewer = flops["all"] / flops[kind]
            times = ratios(seconds["all"], seconds[kind])
            of_ideal = {name: value / fewer for name, value in times.items()}
            rows.append({"shape": shape, "tokens": tokens, "kind": kind, "flops": fewer, "time": times, **of_ideal})
    return rows
