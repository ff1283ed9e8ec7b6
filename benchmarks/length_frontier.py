"""Length times depth on long texts: exits on shorter texts beside exits alone and shorter texts alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from distilled_runs import SEED
from frontier_times import take_times
from length_runs import LengthBench

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.evaluation import record_exits, sweep_speeds
from fastbert_hf.files import write_whole
from fastbert_hf.training import ExitTraining
from fastbert_hf.training.stages import run_stage


NAME = "imdb-512"
# The full model, and one of the table whose texts become shorter.
MODELS = ("full", "drop-2x")
EXIT_EPOCHS, EXIT_RATE = 1.0, 1e-3
SPEEDS = tuple(round(0.02 * step, 2) for step in range(51))
COLUMNS = ("speed", "accuracy", "executed_flops", "mean_exit_layer")
TIMED_ROWS = 256


def model_of(name: str, bench: LengthBench, work_dir: Path) -> FastBertForSequenceClassification:
    """Return one of the models with its exits, trained unless it is there."""
    model = bench.full
    if name != "full":
        model = FastBertForSequenceClassification.from_pretrained(work_dir / f"{NAME}-{name}").eval()

    def make_trainer(output_dir: str):
        arguments = {"per_device_train_batch_size": 8, "seed": SEED, "weight_decay": 0.01, "bf16": True}
        arguments |= {"logging_steps": 50, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        stage = ExitTraining(EXIT_RATE, EXIT_EPOCHS)
        return stage.make_trainer(output_dir, copy.deepcopy(model), bench.texts, None, bench.tokenizer, **arguments)

    settings = {"model": name, "learning_rate": EXIT_RATE, "num_train_epochs": EXIT_EPOCHS}
    path = run_stage(work_dir / f"{NAME}-frontier-{name}", settings, make_trainer)
    return FastBertForSequenceClassification.from_pretrained(path).eval()


def sweep(name: str, bench: LengthBench, work_dir: Path) -> dict:
    """Return what every speed gives and costs on dev and test."""
    model, tables = model_of(name, bench, work_dir), {}
    for part in ("dev", "test"):
        record = record_exits(model, bench.splits[part], progress=False)
        table = sweep_speeds(model, record, SPEEDS)
        tables[part] = {column: table[column].round(5).tolist() for column in COLUMNS}
    return {"model": name, "coarsening": model.config.coarsening, **tables}


def run_all(data_dir: Path, work_dir: Path, results_dir: Path) -> None:
    """Do what is not done."""
    bench, results = LengthBench(NAME, data_dir, work_dir), {}
    for name in MODELS:
        path = results_dir / f"frontier-{name}.json"
        if not path.exists():
            print(f"\n{path.stem}", flush=True)
            results_dir.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(sweep(name, bench, work_dir)) + "\n")
        results[name] = json.loads(path.read_text())
    path = results_dir / "times.json"
    if not path.exists():
        models = {name: model_of(name, bench, work_dir) for name in results}
        rows = [{"input_ids": ids} for ids in bench.splits["test"]["input_ids"][:TIMED_ROWS]]
        write_whole(path, json.dumps(take_times(models, results, "full", rows), indent=1) + "\n")
