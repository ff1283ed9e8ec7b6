"""Time int8 and bfloat16 against float32: runs of serving_speed.py."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from serving_runs import CUT, in_turn, load_tokenizer, model_that_leaves, own_model, ratios

from fastbert_hf import FastBertForSequenceClassification, load_operators
from fastbert_hf.evaluation import executed_flops
from fastbert_hf.modeling import int8_products


# Tokens of texts that are answered one at a time, and how many of them make a turn.
SHORT = {8: 24, 16: 24, 32: 16, 128: 8}
KINDS = ("bfloat16", "int8", "int8, compiled")
# Of what a process takes beyond one that has only read the package, in a model of float32 and in one of int8.
PEAK = """
import json, sys, torch
from fastbert_hf import FastBertForSequenceClassification
def memory(name):  # KiB: VmHWM is the peak of this process, ru_maxrss may be that of the one that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = memory("VmRSS")
model = FastBertForSequenceClassification.from_pretrained(sys.argv[1]).eval()
rows = [{"input_ids": [101] + [2000 + place for place in range(length)]} for length in range(20, 84)]
list(model.predict(rows, speed=0.0))
print(json.dumps({"before": before, "after": memory("VmHWM")}))
"""


def sides_of(
    model: FastBertForSequenceClassification, answer: Callable[[FastBertForSequenceClassification], object]
) -> dict[str, Callable[[], object]]:
    """Return what each kind of a model does in a turn."""
    int8 = copy.deepcopy(model)
    int8.use_int8_layers()
    without_operators = patch.object(int8_products, "is_for_operators", lambda rows: False)
    return {
        "float32": partial(answer, model),
        "bfloat16": partial(answer, copy.deepcopy(model).bfloat16()),
        "int8": without_operators(partial(answer, int8)),
        "int8, compiled": partial(answer, int8),
    }


def rows_of(seconds: dict[str, list[float]], texts: int, **about) -> list[dict]:
    """Return how many times faster than float32 each kind is, and how many texts it answers in a second."""
    return [
        {**about, "kind": kind, **ratios(seconds["float32"], seconds[kind]), "texts_per_second": texts / min(own)}
        for kind, own in seconds.items()
        if kind != "float32"
    ]


@torch.inference_mode()
def against_float32(shape: str, texts: list[str], repeats: int) -> list[dict]:
    """Time a stream of reviews, exits off and on, and texts of some lengths one at a time, exits off."""
    load_operators()
    ids = [{"input_ids": row} for row in load_tokenizer()(texts, **CUT)["input_ids"]]

    def stream(model: FastBertForSequenceClassification, speed: float = 0.0) -> list:
        return list(model.predict(ids, speed=speed))

    model, rows = own_model(shape), []
    seconds = in_turn(sides_of(model, stream), repeats, f"{shape}, a stream")
    rows += rows_of(seconds, len(ids), shape=shape, case="a stream, speed 0")
    generator = torch.Generator().manual_seed(0)
    for tokens, number in SHORT.items():
        own = torch.randint(1000, model.config.vocab_size, (number, tokens), generator=generator).tolist()
        given = [[{"input_ids": row}] for row in own]

        def one_by_one(model: FastBertForSequenceClassification, given: list = given) -> None:
            for text in given:
                list(model.predict(text, speed=0.0))

        seconds = in_turn(sides_of(model, one_by_one), repeats, f"{shape}, {tokens} tokens")
        rows += rows_of(seconds, number, shape=shape, case=f"one text of {tokens} tokens, speed 0")
    return rows


def peak_memory(shape: str) -> dict[str, float]:
    """Return the KiB that loading and answering take, in float32 and in int8."""
    found = {}
    with TemporaryDirectory(prefix="fastbert-") as folder:
        model = own_model(shape)
        for kind in ("float32", "int8"):
            if kind == "int8":
                model.use_int8_layers()
            model.save_pretrained(f"{folder}/{kind}")
            finished = subprocess.run(
                [sys.executable, "-c", PEAK, f"{folder}/{kind}"], capture_output=True, text=True, check=True
            )
            measured = json.loads(finished.stdout.splitlines()[-1])
            found[kind] = measured["after"] - measured["before"]
    return {"kibibytes": found, "ratio": found["int8"] / found["float32"]}


@torch.inference_mode()
def with_exits(shape: str, texts: list[str], repeats: int, share: float) -> list[dict]:
    """
    Time a stream whose texts leave so that a share of the layers runs, in every kind, at the same exits; and how many
    times faster that is than all layers of the same kind, as a part of how many times fewer FLOPs are executed.
    """
    load_operators()
    model, speed = model_that_leaves(shape, share, texts)
    ids = [{"input_ids": row} for row in load_tokenizer()(texts, **CUT)["input_ids"]]
    lengths = torch.tensor([len(row["input_ids"]) for row in ids])
    executed: dict[float, list[int]] = {}

    def stream(model: FastBertForSequenceClassification, speed: float = speed) -> None:
        exit_layers = torch.tensor([answer.exit_layer for answer in model.predict(ids, speed=speed)])
        executed.setdefault(speed, []).append(executed_flops(model, exit_layers, lengths, students=speed > 0).sum())

    sides = sides_of(model, stream)
    whole = {f"{kind}, all layers": partial(run, speed=0.0) for kind, run in sides.items()}
    seconds = in_turn(sides | whole, repeats, f"{shape}, {share:g} of the layers")
    ideal = torch.stack(executed[0.0]).double().mean() / torch.stack(executed[speed]).double().mean()
    rows = rows_of(
        {kind: seconds[kind] for kind in sides},
        len(ids),
        shape=shape,
        case=f"a stream, {100 * share:g} % of the layers",
    )
    for row in rows:
        kind = row["kind"]
        speed_ups = [
            all_layers / own for all_layers, own in zip(seconds[f"{kind}, all layers"], seconds[kind], strict=True)
        ]
        row |= {"ideal": ideal.item(), "of_ideal": median(speed_ups) / ideal.item()}
    return rows
