"""What commands share that change the backbone of a fine-tuned classifier, repair what that costs and teach exits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .options import ColumnOptions, check_at_least_one, fail, one_line_errors


if TYPE_CHECKING:
    from ..training.stages import Stage


@dataclass
class ConversionOptions(ColumnOptions):
    """Which model on which texts, and how long."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A fine-tuned classifier with its tokenizer; the package's own if none."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Texts: CSV, TSV or JSON lines, also .gz."})
    validation_file: str | None = field(default=None, metadata={"help": "Rows on which the speeds are measured."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Of the repair of the changed layers."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Of the repair of the changed layers."})
    exit_num_train_epochs: float = field(default=3.0, metadata={"help": "Of the distillation of the exits."})
    exit_learning_rate: float = field(default=2e-4, metadata={"help": "Of the distillation of the exits."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows in a batch."})
    seed: int = field(default=42, metadata={"help": "Of the order of the texts."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})


def convert(options: ConversionOptions, make_stage: Callable[[], Stage], example_data: Path | None) -> None:
    """
    Run the stage and teach the exits, and print what each speed gives.

    Args:
        options ([`ConversionOptions`]): With an `output_dir`.
        make_stage (`Callable`): Makes the stage that changes the backbone; what it refuses ends the program.
        example_data (`Path`, *optional*): Folder of `train.tsv` and `test.tsv`, where no data is given.
    """
    train_file, validation_file = options.train_file, options.validation_file
    if train_file is None:
        if example_data is None:
            fail("give --train_file")
        train_file, validation_file = example_data / "train.tsv", validation_file or example_data / "test.tsv"
    for path in filter(None, (train_file, validation_file)):
        if not Path(path).is_file():
            fail(f"there is no file {path}")
    check_at_least_one(options, "per_device_train_batch_size", "max_length")

    from ..training import ExitTraining, train

    with one_line_errors(kinds=(ValueError, TypeError, OSError)):
        stages = [make_stage(), ExitTraining(options.exit_learning_rate, options.exit_num_train_epochs)]
        trained = train(
            options.model_name_or_path or Path(__file__).parents[1] / "default_model",
            train_file,
            validation_file,
            stages=stages,
            output_dir=options.output_dir,
            **options.columns(),
            max_length=options.max_length,
            per_device_train_batch_size=options.per_device_train_batch_size,
            seed=options.seed,
            use_cpu=options.use_cpu,
            report_to="none",
        )
    if trained.table is not None:
        columns = [name for name in ("speed", "accuracy", "agreement", "mean_exit_layer") if name in trained.table]
        print(f"\n{trained.table[columns].to_string(index=False)}\n")
    print(f"The model, its tokenizer and its card are in {options.output_dir}.")
