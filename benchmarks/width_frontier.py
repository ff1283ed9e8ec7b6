"""Width times depth on sst2: exits on narrower backbones beside exits alone and narrower backbones alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import paper_runs
from frontier_times import take_times

from fastbert_hf import DEFAULT_MODEL_DIR, FastBertForSequenceClassification, load_operators, train
from fastbert_hf.commands.train_default_model import MARKUP, SENTENCE_END
from fastbert_hf.data import load_rows
from fastbert_hf.evaluation import record_exits, sweep_speeds
from fastbert_hf.evaluation.speed_sweep import SPEEDS
from fastbert_hf.files import write_whole
from fastbert_hf.training import ExitTraining, FeedForwardConversion


# The share of the neurons, and of narrower models the depth of the tree, `None` for the default: 0 is a dense layer of
# as many neurons, which is the control. "dense" is the model that comes with the package, "1" the same with its exits
# trained on as the others' are.
MODELS: dict[str, tuple[float, int | None]] = {
    "dense": (1.0, None),
    "1": (1.0, None),
    "0.25": (0.25, None),
    "0.125": (0.125, None),
    "narrow-0.25": (0.25, 0),
    "narrow-0.125": (0.125, 0),
}
STEPS = 500  # what time allowed
# From trials on dev of sst2, and that of the package's own model.
CONVERSION_RATE, EXIT_RATE = 5e-5, 1e-3
LENGTHS = (40, 400)  # characters: whole sentences and long phrases, as dev and test have them
COLUMNS = ("speed", "accuracy", "agreement", "mean_exit_layer", "executed_flops")


def model_of(name: str, data_dir: Path, work_dir: Path) -> FastBertForSequenceClassification:
    """Return a model with its exits, trained unless it is there."""
    folder, (share, depth) = work_dir / f"frontier-{name}", MODELS[name]
    if name == "dense":
        folder = DEFAULT_MODEL_DIR
    elif not (folder / "config.json").exists():
        texts = texts_to_learn_from(data_dir)
        stages = [ExitTraining(EXIT_RATE, 1)]
        if share < 1:
            stages = [FeedForwardConversion(CONVERSION_RATE, 1, share=share, depth=depth), *stages]
        settings = {"max_steps": STEPS, "per_device_train_batch_size": 32, "seed": 1, "weight_decay": 0.01}
        train(DEFAULT_MODEL_DIR, texts, stages=stages, output_dir=folder, report_to="none", use_cpu=True, **settings)
    return FastBertForSequenceClassification.from_pretrained(folder).eval()


def texts_to_learn_from(data_dir: Path) -> list[str]:
    """Return the longer phrases of sst2, and as many sentences of film reviews, as the package's model learnt from."""
    phrases = paper_runs.load_splits(data_dir / "en" / "sst2")["train"]["text_a"]
    reviews = load_rows(data_dir / "en" / "imdb" / "train.tsv.gz")["text_a"]
    sentences = [sentence for review in reviews for sentence in SENTENCE_END.split(MARKUP.sub(" ", review))]
    longer = [[text for text in texts if LENGTHS[0] <= len(text) <= LENGTHS[1]] for texts in (phrases, sentences)]
    for texts in longer:
        random.Random(1).shuffle(texts)
    return [*longer[0], *longer[1][: len(longer[0])]]


def sweep(name: str, data_dir: Path, work_dir: Path) -> dict:
    """Return what every speed gives and costs on dev and test."""
    model, splits = model_of(name, data_dir, work_dir), paper_runs.load_splits(data_dir / "en" / "sst2")
    tables = {}
    for part in ("dev", "test"):
        rows = splits[part].rename_columns({"text_a": "text"})
        record = record_exits(model, rows, tokenizer=tokenizer(), progress=False)
        table = sweep_speeds(model, record, SPEEDS)
        tables[part] = {column: table[column].round(5).tolist() for column in COLUMNS}
    return {"model": name, "steps": STEPS, **tables}


def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEFAULT_MODEL_DIR)


def run_all(data_dir: Path, work_dir: Path, results_dir: Path) -> None:
    """Do what is not done. Times are taken anew where they lack a model."""
    results = {}
    for name in MODELS:
        path = results_dir / f"frontier-{name}.json"
        if not path.exists():
            print(f"\n{path.stem}", flush=True)
            results_dir.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(sweep(name, data_dir, work_dir)) + "\n")
        results[name] = json.loads(path.read_text())
    path = results_dir / "times.json"
    timed = {row["model"] for row in json.loads(path.read_text())["rows"]} if path.exists() else set()
    if timed != set(MODELS):
        load_operators()
        models = {name: model_of(name, data_dir, work_dir) for name in MODELS}
        texts = list(paper_runs.load_splits(data_dir / "en" / "sst2")["test"]["text_a"])
        rows = [{"input_ids": ids} for ids in tokenizer()(texts)["input_ids"]]
        write_whole(path, json.dumps(take_times(models, results, "dense", rows), indent=1) + "\n")
