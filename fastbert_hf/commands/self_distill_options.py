"""The options of the command `self_distill`: from the command line, from a JSON file, and those of the quick start."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from huggingface_hub.dataclasses import type_validator
from transformers import HfArgumentParser, TrainingArguments

from ..label_kinds import of_passages
from .options import (
    DataOptions,
    OneLineParser,
    check_choice,
    check_data_options,
    default_backbone,
    fail,
    one_line_errors,
)


QUICK_START = {
    "output_dir": "outputs/quick_start",
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 3.0,
    "distill_num_train_epochs": 4.0,
    "speed": 0.1,
}
# What `--help` shows of `TrainingArguments`, beside the fields of `StageOneOptions` that are new.
COMMON = ("learning_rate", "num_train_epochs", "max_steps", "seed", "bf16", "use_cpu", "disable_tqdm")
COMMON += ("load_best_model_at_end", "metric_for_best_model", "push_to_hub", "hub_model_id")
DATA = ("train_file", "validation_file", "unlabeled_file")
ONE_LABEL = "single_label_classification"
# What `--task` says, as fields of a config.
TASKS: dict[str | None, dict[str, str]] = {
    None: {},
    "text-classification": {},
    "multi-label": {"problem_type": "multi_label_classification"},
    "regression": {"problem_type": "regression"},
    "token-classification": {"task": "token-classification"},
    "question-answering": {"task": "question-answering"},
}
HUB_DATA = ("dataset_name", "dataset_config_name")


@dataclass
class SelfDistillOptions(DataOptions):
    """What to train on which data."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained encoder; with --distill_only a fine-tuned classifier."}
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": "What the model answers: text-classification, multi-label (labels with commas between), "
            "regression (a number), token-classification (words and tags, lists or with spaces between) or "
            "question-answering (question, context and answers as in SQuAD). The model's own, or one label for each "
            "text, unless given."
        },
    )
    tolerance: float | None = field(
        default=None, metadata={"help": "For a regression: numbers so close are the same answer."}
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

    def exits(self) -> dict[str, str]:
        """Return the fields of [`FastBertConfig`] that the options set."""
        settings = {"exit_type": self.exit_type, "exit_policy": self.exit_policy, "tolerance": self.tolerance}
        return {**TASKS[self.task], **{name: value for name, value in settings.items() if value is not None}}

    def columns(self) -> dict[str, Any]:
        columns = super().columns()
        if self.task == "question-answering":
            columns = of_passages(columns)
        if self.task == "token-classification" and columns["text_column"] == "text":
            columns["text_column"] = "tokens"
        return columns

    def task_name(self) -> str:
        """Return the name of the [`Task`], by which rows are checked."""
        asked = TASKS[self.task]
        return asked.get("problem_type", asked.get("task", ONE_LABEL)).replace("-", "_")


@dataclass
class StageOneOptions(TrainingArguments):
    """`TrainingArguments` with other defaults."""

    _argument_group_name = "of TrainingArguments"

    output_dir: str = field(default="outputs/fastbert", metadata={"help": "Folder of the model and its stages."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch size per device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size per device in evaluation."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Below 1 a share of all steps, else their number."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep in each stage."})


class SelfDistillParser(OneLineParser):
    """
    The parser of the command, whose `--help` leaves out most of `TrainingArguments`.

    Args:
        doc (`str`): Docstring of the command, whose first paragraph `--help` shows.
    """

    def __init__(self, doc: str):
        kinds = (SelfDistillOptions, StageOneOptions)
        usage = "%(prog)s [settings.json] [options]"
        description = doc.split("\n\n")[0].strip()
        super().__init__(kinds, all_help="--help all", usage=usage, description=description, add_help=False)
        help_of_help = "Show this; `--help all` shows every field of TrainingArguments, too."
        self.add_argument("-h", "--help", nargs="?", choices=["all"], action=_Help, help=help_of_help)

    def error(self, message: str) -> NoReturn:
        misplaced = re.search(r"(\S+\.json)\b", message)
        if misplaced:
            fail(
                f"{message.rstrip('.')}; a file of settings comes before all options: {self.prog} {misplaced[1]} --..."
            )
        super().error(message)


class _Help(argparse.Action):
    """Show the options, those that are seldom asked for only on request."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        own = {setting.name for setting in fields(SelfDistillOptions)}
        shown = {*own, *StageOneOptions.__annotations__, *COMMON, self.dest}
        for action in parser._actions:
            if action is not self:
                action.option_strings = action.option_strings[:1]  # not again with hyphens
            if values != "all" and action.dest not in shown:
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


def parse_self_distill_options(
    doc: str, arguments: list[str] | None = None
) -> tuple[SelfDistillOptions, StageOneOptions]:
    """
    Return the options of a command line, which may begin with a JSON file of options; those after it win.

    Args:
        doc (`str`): Docstring of the command, whose first paragraph `--help` shows.
        arguments (`list[str]`, *optional*): The words of the command line; those of the program unless given.
    """
    parser = SelfDistillParser(doc)
    words = list(sys.argv[1:] if arguments is None else arguments)
    from_file = read_settings(Path(words.pop(0)), parser) if words and words[0].endswith(".json") else {}
    # A name that is in the namespace already gets no default, so what is still None was not given.
    names = [argument.name for kind in parser.dataclass_types for argument in fields(kind) if argument.init]
    given = parser.parse_args(words, argparse.Namespace(**dict.fromkeys(names)))
    given = {name: value for name, value in vars(given).items() if value is not None}
    # Data in the options replaces data of the other kind in the file.
    replaced = DATA if "dataset_name" in given else HUB_DATA if "train_file" in given else ()
    settings = {**{name: value for name, value in from_file.items() if name not in replaced}, **given}
    if not settings.keys() & {"train_file", "dataset_name"}:
        settings = {**QUICK_START, **settings}
    try:
        return parser.parse_dict(settings)
    except ValueError as error:
        fail(" ".join(str(error).split()))


def read_settings(path: Path, parser: HfArgumentParser) -> dict[str, Any]:
    """Return the options in a JSON file, after a check of their names and types."""
    if not path.is_file():
        fail(f"there is no file {path}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"{path} is not JSON: {error}")
    if not isinstance(settings, dict):
        fail(f'{path} must hold an object, as in {{"learning_rate": 2e-5}}, got {json.dumps(settings)[:40]}')
    kinds = {}
    for options in parser.dataclass_types:
        hints = get_type_hints(options)
        kinds.update((option.name, hints[option.name]) for option in fields(options) if option.init)
    for name, value in settings.items():
        if name not in kinds:
            similar = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean {similar[0]!r}? " if similar else ""
            fail(f"{path}: there is no argument {name!r}; {hint}--help all lists all arguments")
        if not is_of_type(value, kinds[name]):
            kind = kinds[name].__name__ if isinstance(kinds[name], type) else kinds[name]
            fail(f"{path}: {name!r} must be {kind}, got {json.dumps(value, ensure_ascii=False)}")
    return settings


def is_of_type(value: Any, kind: Any) -> bool:
    """Return whether a value from JSON is of the type of an option. A whole number is a `float`, too."""
    for candidate in (value, json.loads(json.dumps(value), parse_int=float)):
        try:
            type_validator("", candidate, kind)
            return True
        except TypeError:
            continue
    return False


def check_self_distill_options(options: SelfDistillOptions, example_data: Path | None = None) -> None:
    """
    End the program if an option is wrong, as far as that can be told without a look into the data.

    Args:
        options ([`SelfDistillOptions`]): Those of the quick start are completed.
        example_data (`Path`, *optional*): Folder of the quick start's `train.tsv` and `test.tsv`.
    """
    from ..modeling.answer_layouts import TextLayout, TokenLayout
    from ..modeling.exit_classifiers import exit_types_of
    from ..modeling.exit_policies import FREE_POLICIES, check_speed

    if options.model_name_or_path is None and options.has_data():
        fail("give the encoder to start from, as in --model_name_or_path bert-base-uncased")
    check_data_options(options, example_data)
    check_choice("task", options.task, [name for name in TASKS if name is not None])
    layout = TokenLayout() if options.task in ("token-classification", "question-answering") else TextLayout()
    check_choice("exit_type", options.exit_type, exit_types_of(layout))
    check_choice("exit_policy", options.exit_policy, FREE_POLICIES)
    if options.task == "regression" and options.tolerance is None:
        fail("give --tolerance, within which two numbers count as the same answer, as in --tolerance 0.25")
    if not options.temperature > 0:
        fail(f"--temperature must be above 0, got {options.temperature}")
    with one_line_errors():
        for speed in (options.speed, *options.eval_speeds):
            check_speed(speed)
    if options.model_name_or_path is None:
        options.model_name_or_path = default_backbone()
