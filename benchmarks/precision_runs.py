"""Run what is behind "Precision" in docs/results.md: trained models in int8 and bfloat16 beside float32."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest.mock import patch

import torch
from contract_runs import SETS, load, trained_model
from distilled_runs import finished, keep

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.modeling import int8_layers


SPEEDS = (0.0, 0.5)
# The first ones of each test split.
TEST_ROWS = 2000
# Bits of the tokens: seven is what processors without VNNI use.
BITS = {"int8": 8, "int8, 7 bits": 7}
KINDS = ("float32", "bfloat16", *BITS)


def measure(model: FastBertForSequenceClassification, rows, speed: float) -> dict[str, torch.Tensor]:
    """Return the labels and the exit layers of the answers."""
    answers = list(model.predict(rows, speed=speed))
    labels = torch.stack([answer.logits for answer in answers]).argmax(1)
    return {"labels": labels, "exit_layer": torch.tensor([answer.exit_layer for answer in answers])}


def execute(name: str, data_dir: Path, models_dir: Path) -> dict:
    """Answer the test texts of a set in every precision, and return the numbers."""
    splits, tokenizer, id2label = load(name, data_dir)
    model = trained_model(name, splits, tokenizer, id2label, data_dir, models_dir).float().eval()
    test = splits["test"].select(range(min(TEST_ROWS, len(splits["test"]))))
    labels, rows = torch.tensor(test["labels"]), test.remove_columns("labels")
    int8 = copy.deepcopy(model)
    int8.use_int8_layers()
    result = {"set": name, "rows": len(rows), "layers": model.config.num_hidden_layers, "speeds": {}}
    for speed in SPEEDS:
        answers = {
            "float32": measure(model, rows, speed),
            "bfloat16": measure(copy.deepcopy(model).bfloat16(), rows, speed),
        }
        for kind, bits in BITS.items():
            with patch.object(int8_layers, "exact_levels", lambda levels=2**bits - 1: levels):
                answers[kind] = measure(int8, rows, speed)
        result["speeds"][f"{speed:g}"] = {
            kind: {
                "accuracy": (own["labels"] == labels).double().mean().item(),
                "agreement": (own["labels"] == answers["float32"]["labels"]).double().mean().item(),
                "mean_exit_layer": own["exit_layer"].double().mean().item(),
            }
            for kind, own in answers.items()
        }
    return result


def run_all(sets: list[str], data_dir: Path, work_dir: Path, results_dir: Path) -> None:
    """Do what is not finished. The models are those of "Speed as a contract"."""
    unknown = sorted(set(sets) - set(SETS))
    if unknown:
        raise SystemExit(f"no runs of {', '.join(unknown)}; choose from {', '.join(SETS)}")
    for name in sets or sorted(SETS, key="imdb".__eq__):  # the longest texts last
        if finished(name, results_dir) is None:
            print(f"\n{name}", flush=True)
            keep(execute(name, data_dir, work_dir.parent / "contract"), name, results_dir)
