"""Measure which int8 layers change a model's answers most: a run of precision_tables.py."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from contract_runs import load, trained_model
from distilled_runs import finished, keep
from precision_report import EMBEDDINGS, PARTS, SETS

from fastbert_hf import FastBertForSequenceClassification


# The first ones of each dev split.
DEV_ROWS = 500


def part_of(name: str) -> tuple[str, int]:
    """Return the part of `PARTS` that a module belongs to and its layer, from 1; 0 for the word embeddings."""
    if EMBEDDINGS in name:
        return EMBEDDINGS, 0
    part = next(part for part, of_name in PARTS.items() if of_name in name)
    return part, int(name.partition(".layer.")[2].partition(".")[0]) + 1


def log_probabilities(model: FastBertForSequenceClassification, rows) -> torch.Tensor:
    """Return those of the last exit, `[rows, num_labels]`."""
    return torch.stack([answer.logits for answer in model.predict(rows, speed=0.0)]).log_softmax(-1)


@torch.inference_mode()
def execute(name: str, data_dir: Path, models_dir: Path) -> dict:
    """Round one part of one layer at a time, and all of them, and return how far the answers are from float32."""
    splits, tokenizer, id2label = load(name, data_dir)
    model = trained_model(name, splits, tokenizer, id2label, data_dir, models_dir).float().eval()
    rows = splits["dev"].select(range(min(DEV_ROWS, len(splits["dev"])))).remove_columns("labels")
    wanted = log_probabilities(model, rows)
    all_names = copy.deepcopy(model).use_int8_layers()
    groups = {part_of(one): [other for other in all_names if part_of(other) == part_of(one)] for one in all_names}
    found = {}
    for (part, layer), names in [*groups.items(), (("all", 0), all_names)]:
        int8 = copy.deepcopy(model)
        int8.use_int8_layers([other for other in all_names if other not in names])
        own = log_probabilities(int8, rows)
        divergence = torch.nn.functional.kl_div(own, wanted, reduction="batchmean", log_target=True).item()
        agreement = (own.argmax(1) == wanted.argmax(1)).double().mean().item()
        found[f"{part}/{layer}"] = {"divergence": divergence, "agreement": agreement}
    return {"set": name, "rows": len(rows), "layers": model.config.num_hidden_layers, "parts": found}


def run_all(sets: list[str], data_dir: Path, work_dir: Path, results_dir: Path) -> None:
    """Do what is not finished, on the sets that have a target."""
    for name in sets or SETS:
        if finished(name, results_dir / "layers") is None:
            print(f"\n{name}", flush=True)
            keep(execute(name, data_dir, work_dir.parent / "contract"), name, results_dir / "layers")
