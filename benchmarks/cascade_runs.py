"""Measure the cascades behind docs/results.md: their dials, what the regularisation does, and their times."""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pandas as pd
import torch
import transformers
from cascade_members import MARGINS, NUM_FOLDS, SEEDS, WEIGHT, Experiment
from paper_runs import COLUMNS, Run
from tqdm import tqdm

from fastbert_hf import CascadeForSequenceClassification, FastBertForSequenceClassification
from fastbert_hf.evaluation import ExitRecord, sweep_speeds
from fastbert_hf.evaluation.metrics import DifficultyInversionScore, ExpectedCalibrationError
from fastbert_hf.training import hard_shares


SPLITS = ("dev", "test")


@dataclass(frozen=True)
class Members:
    """
    What a cascade is made of.

    Args:
        names (`tuple` of `str`): Its members, as [`members_of`] calls them.
        exit_policy (`str`): How the cascade tells that it is sure.
        leave_early (`bool`): Whether a text can also leave inside a member.
    """

    names: tuple[str, ...]
    exit_policy: str = "confidence"
    leave_early: bool = False


CASCADES = {
    "2 + 6 layers": Members(("distilled", "large")),
    "2 + 6 layers, DAR": Members(("distilled, DAR", "large")),
    "1 + 6 layers": Members(("distilled, 1 layer", "large")),
    "1 + 2 + 6 layers, DAR": Members(("distilled, 1 layer", "distilled, DAR", "large")),
    "FastBERT 2 + 6 layers, DAR": Members(("FastBERT", "large"), leave_early=True),
    "FastBERT 2 + 6 layers, DAR, entropy": Members(("FastBERT", "large"), "entropy", leave_early=True),
}
# The margins among which the paper chooses, and the trainings of each.
PAPER_MARGINS = (0.1, 0.3, 0.5, 0.7)
TRAINING_SEEDS = (1, 2, 3)
TIMED = ("2 + 6 layers, DAR", "FastBERT 2 + 6 layers, DAR")
TIMED_SPEED_UPS = (2.0, 3.0)
TIMED_TEXTS = 2000  # at most
REPEATS = 5


def cascade(run: Run, data_dir: Path, work_dir: Path) -> dict:
    """Train the members, label the difficulty, train the small member with it, and return the numbers."""
    experiment = Experiment.of(run, data_dir, work_dir)
    models = members_of(experiment)
    records = {name: {split: experiment.record(model, split) for split in SPLITS} for name, model in models.items()}
    return {
        **about(experiment),
        "small": {name: {split: calibration(records[name][split]) for split in SPLITS} for name in experiment.small},
        "cascades": {label: dials(models, records, members) for label, members in CASCADES.items()},
    }


def regularisation(run: Run, data_dir: Path, work_dir: Path) -> dict:
    """Train the fine-tuned small member without the regularisation and with each margin, several times each."""
    experiment = Experiment.of(run, data_dir, work_dir)
    cases = []
    for margin in (None, *PAPER_MARGINS):
        models = [experiment.regularised(margin, seed) for seed in TRAINING_SEEDS]
        trainings = [{split: calibration(experiment.record(model, split)) for split in SPLITS} for model in models]
        cases.append({"margin": margin, "trainings": trainings})
    return {**about(experiment), "training_seeds": TRAINING_SEEDS, "cases": cases}


def cascade_times(run: Run, data_dir: Path, work_dir: Path) -> dict:
    """
    Time the pipeline on test texts, at the speeds that reach a speed-up in layers on dev: the ratio to speed 0 in
    time, within each repeat, beside that in layers executed.
    """
    experiment = Experiment.of(run, data_dir, work_dir)
    models = members_of(experiment)
    texts, found = texts_of(experiment)[:TIMED_TEXTS], {}
    for label in TIMED:
        model = joined(models, CASCADES[label])
        dev = pd.DataFrame(dial(model, [experiment.record(models[name], "dev") for name in CASCADES[label].names]))
        speeds = [dev["speed"][i] for i in (dev["layer_speed_up"].ge(s - 1e-6).idxmax() for s in TIMED_SPEED_UPS)]
        speeds = [speed for speed in speeds if speed > 0]  # idxmax of nothing is the first row, speed 0
        classifier = transformers.pipeline("fast-text-classification", model=model, tokenizer=experiment.tokenizer)
        found[label] = time_pipeline(classifier, texts, [float(speed) for speed in speeds])
    return {**about(experiment), "threads": torch.get_num_threads(), "repeats": REPEATS, "times": found}


EXECUTE = {"cascade": cascade, "regularisation": regularisation, "cascade_times": cascade_times}


def members_of(experiment: Experiment) -> dict[str, FastBertForSequenceClassification]:
    return {"large": experiment.large, **experiment.small, "FastBERT": experiment.with_student()}


def about(experiment: Experiment) -> dict:
    """Return what a result says of itself."""
    run, (settings, _) = experiment.run, experiment.run.settings()
    return {
        "run": {"set": run.set, "recipe": run.recipe, "seed": run.seed, "max_rows": run.max_rows},
        "settings": {
            "learning_rate": settings.learning_rate,
            "num_train_epochs": settings.num_train_epochs,
            "num_folds": NUM_FOLDS,
            "seeds": SEEDS,
            "difficulty_weight": WEIGHT,
            "difficulty_margin": MARGINS[run.set],
        },
        "rows": {split: len(part) for split, part in experiment.splits.items()},
        "labels": len(experiment.id2label),
        "hard_shares": hard_shares(experiment.labelled, list(experiment.id2label.values())),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cores": os.cpu_count(),
    }


def calibration(record: ExitRecord) -> dict[str, float]:
    """Return how right, how consistent and how calibrated the last exit is: the columns of the paper's Table 5."""
    logits, labels = record.exit_logits[:, -1], record.labels
    values = {"accuracy": (logits.argmax(-1) == labels).double().mean().item()}
    for metric in (DifficultyInversionScore(), ExpectedCalibrationError()):
        values.update(metric.compute(predictions=logits.double().softmax(-1).numpy(), references=labels.numpy()))
    return values


def joined(models: dict[str, FastBertForSequenceClassification], members: Members) -> CascadeForSequenceClassification:
    """Return a cascade of copies of some members."""
    copies = [copy.deepcopy(models[name]) for name in members.names]
    for member in copies:
        member.config.min_exit_layer = None if members.leave_early else member.config.num_hidden_layers
    return CascadeForSequenceClassification.from_members(copies, exit_policy=members.exit_policy)


def dials(
    models: dict[str, FastBertForSequenceClassification],
    records: dict[str, dict[str, ExitRecord]],
    members: Members,
) -> dict[str, dict[str, list[float]]]:
    """Return what every speed of a cascade gives on each split, from the records of its members."""
    model = joined(models, members)
    return {split: dial(model, [records[name][split] for name in members.names]) for split in SPLITS}


def dial(model: CascadeForSequenceClassification, records: list[ExitRecord]) -> dict[str, list[float]]:
    """Return columns of what every speed of a cascade gives."""
    table = sweep_speeds(model, ExitRecord.of_members(records))
    names = [*COLUMNS, *(name for name in table.columns if name.startswith("member_"))]
    return {name: table[name].round(5).tolist() for name in names}


def texts_of(experiment: Experiment) -> list[str] | list[dict[str, str]]:
    """Return the test texts as the pipeline takes them."""
    test = experiment.texts["test"]
    if "text_b" not in test.column_names:
        return [str(text) for text in test["text_a"]]
    return [{"text": str(a), "text_pair": str(b)} for a, b in zip(test["text_a"], test["text_b"], strict=True)]


def time_pipeline(classifier, texts: list, speeds: list[float]) -> list[dict[str, float]]:
    """Return for each speed how many times fewer layers are executed than at speed 0, and how many times faster."""
    seconds, layers = {speed: [] for speed in (0.0, *speeds)}, {}
    with tqdm(total=(REPEATS + 1) * len(seconds), desc="Timing") as bar:
        for _ in range(REPEATS + 1):
            for speed in seconds:
                start = time.perf_counter()
                answers = classifier(texts, speed=speed, truncation=True, max_length=128)
                seconds[speed].append(time.perf_counter() - start)
                layers[speed] = sum(answer["exit_layer"] for answer in answers) / len(answers)
                bar.update()
    found = []
    for speed in speeds:
        # The first turn of all is not counted.
        ratios = [full / own for full, own in zip(seconds[0.0][1:], seconds[speed][1:], strict=True)]
        found.append(
            {
                "speed": speed,
                "layer_speed_up": layers[0.0] / layers[speed],
                "time_speed_up": median(ratios),
                "time_speed_up_min": min(ratios),
                "time_speed_up_max": max(ratios),
            }
        )
    return found
