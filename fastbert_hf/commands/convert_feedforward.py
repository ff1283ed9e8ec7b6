"""
Convert the feed-forward layers of a fine-tuned classifier so that each token meets a share of the neurons, repair what
that costs by distillation, and teach its exits. Texts without labels are enough.

Any classifier of a supported family will do, or a FastBERT model. Without options it converts the model that comes
with the package on the texts of examples/data, to try it. An interrupted run goes on when it is started again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .options import ColumnOptions, check_at_least_one, fail, one_line_errors, parse_options


@dataclass
class ConvertFeedforwardOptions(ColumnOptions):
    """Which model on which texts, and how."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A fine-tuned classifier with its tokenizer; the package's own if none."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Texts: CSV, TSV or JSON lines, also .gz."})
    validation_file: str | None = field(default=None, metadata={"help": "Rows on which the speeds are measured."})
    output_dir: str = field(default="outputs/fast_feedforward", metadata={"help": "Folder of the finished model."})
    share: float = field(default=0.25, metadata={"help": "Part of the neurons that a token meets, in (0, 1]."})
    depth: int | None = field(
        default=None,
        metadata={
            "help": "Levels of decisions, which lead to 2 ** depth leaves; twice the neurons in all unless given."
        },
    )
    master_share: float = field(default=0.0, metadata={"help": "Part of the neurons that every token meets."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Of the distillation of the layers."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Of the distillation of the layers."})
    exit_num_train_epochs: float = field(default=3.0, metadata={"help": "Of the distillation of the exits."})
    exit_learning_rate: float = field(default=2e-4, metadata={"help": "Of the distillation of the exits."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows in a batch."})
    seed: int = field(default=42, metadata={"help": "Of the order of the texts."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})


def main(arguments: list[str] | None = None, example_data: Path | None = None) -> None:
    """
    Run the command.

    Args:
        arguments (`list[str]`, *optional*): The words of a command line; those of the program unless given.
        example_data (`Path`, *optional*): Folder of `train.tsv` and `test.tsv`, where no data is given.
    """
    options = parse_options(ConvertFeedforwardOptions, __doc__, arguments)
    train_file, validation_file = options.train_file, options.validation_file
    if train_file is None:
        if example_data is None:
            fail("give --train_file")
        train_file, validation_file = example_data / "train.tsv", validation_file or example_data / "test.tsv"
    for path in filter(None, (train_file, validation_file)):
        if not Path(path).is_file():
            fail(f"there is no file {path}")
    check_at_least_one(options, "per_device_train_batch_size", "max_length")

    from ..training import ExitTraining, FeedForwardConversion, train

    with one_line_errors(kinds=(ValueError, TypeError, OSError)):
        stages = [
            FeedForwardConversion(
                options.learning_rate, options.num_train_epochs, options.share, options.depth, options.master_share
            ),
            ExitTraining(options.exit_learning_rate, options.exit_num_train_epochs),
        ]
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


if __name__ == "__main__":
    main()
