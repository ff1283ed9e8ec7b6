"""
Label which of your training rows are hard: those that a small model answers wrongly without training on them.

This is the labelling of CascadeBERT (section 3.2): with 8 folds and 5 seeds it trains 40 small models. Finished ones
are not repeated, so the same command goes on after an interruption. The output has the rows as they are and a column
`difficulty`, 0 for easy and 1 for hard.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..escapes import printable
from .options import (
    TrainFileOptions,
    check_at_least_one,
    check_choice,
    default_backbone,
    fail,
    find_files,
    one_line_errors,
    parse_options,
)


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class LabelDifficultyOptions(TrainFileOptions):
    """Which rows, judged by which model."""

    output_file: str = field(
        default="outputs/difficulty.jsonl", metadata={"help": "The labelled rows: .jsonl, .csv or .tsv."}
    )
    output_dir: str = field(default="outputs/difficulty", metadata={"help": "Folder of what each model answered."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained encoder; a small English one from PyPI if none."}
    )
    num_hidden_layers: int = field(default=2, metadata={"help": "The first k layers stand for the small model."})
    exit_type: str = field(default="linear_mean", metadata={"help": "attention, linear or linear_mean."})
    num_folds: int = field(default=8, metadata={"help": "K, the parts of the rows."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5], metadata={"help": "Of one round each."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of each training."})
    num_train_epochs: float = field(default=3, metadata={"help": "Of each training."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows in a training batch."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})


def load_rows_to_label(options: LabelDifficultyOptions) -> Dataset:
    """Return the training rows, or end the program if there is something wrong with them."""
    from ..data import check_rows, load_rows, sample

    path = options.train_file
    with one_line_errors():
        rows = load_rows(path)
        # Before rows are left out, so that the numbers in messages are those of the file.
        check_rows(rows, "training", **options.columns())
        rows = sample(rows, options.max_train_samples, seed=0)
    if "difficulty" in rows.column_names:
        fail(f"{path} has a column 'difficulty' already: remove it to label the rows anew")
    is_tsv = Path(options.output_file).suffix == ".tsv"
    if is_tsv and any(re.search("[\t\r\n]", str(cell)) for row in rows for cell in row.values()):
        fail("a text has a tab or a line break, which .tsv cannot hold: give --output_file as .jsonl or .csv")
    return rows


def rows_as_text(rows: Dataset, kind: str) -> str:
    """Return the content of a file with these rows, of the kind `.jsonl`, `.csv` or `.tsv`."""
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    table = [rows.column_names, *(list(row.values()) for row in rows)]
    if kind == ".tsv":
        return "".join("\t".join("" if value is None else str(value) for value in row) + "\n" for row in table)
    file = io.StringIO()
    # A lone carriage return would be left without quotes.
    csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).writerows(table)
    return file.getvalue()


def main(arguments: list[str] | None = None, example_data: Path | None = None) -> None:
    """
    Run the command.

    Args:
        arguments (`list[str]`, *optional*): The words of a command line; those of the program unless given.
        example_data (`Path`, *optional*): Folder of the `train.tsv` that is labelled if no file is named.
    """
    options = parse_options(LabelDifficultyOptions, __doc__, arguments)
    output_file = Path(options.output_file)
    if output_file.suffix not in (".jsonl", ".csv", ".tsv"):
        fail(f"--output_file must end with .jsonl, .csv or .tsv, got {options.output_file}")
    if options.train_file is None and example_data is None:
        fail("give the rows to label, as in --train_file train.tsv")
    options.train_file = options.train_file or str(example_data / "train.tsv")
    find_files(options, "train_file")
    check_at_least_one(options, "max_train_samples")

    from transformers import AutoModel, AutoTokenizer, TrainingArguments

    from ..data import encode, label_names
    from ..files import write_whole
    from ..modeling.answer_layouts import TextLayout
    from ..modeling.exit_classifiers import exit_types_of
    from ..modeling.modeling_fastbert import FastBertForSequenceClassification
    from ..training.difficulty import hard_shares, label_difficulty

    check_choice("exit_type", options.exit_type, exit_types_of(TextLayout()))
    rows = load_rows_to_label(options)
    backbone = options.model_name_or_path or default_backbone()
    with one_line_errors("the model cannot be loaded"):
        encoder = AutoModel.from_pretrained(backbone, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(backbone)
    layers = encoder.config.num_hidden_layers
    if not 1 <= options.num_hidden_layers <= layers:
        fail(f"--num_hidden_layers must be from 1 to {layers}, got {options.num_hidden_layers}")
    with one_line_errors():
        names = label_names(rows, options.label_column)
        label2id = {name: index for index, name in enumerate(names)}
        columns = options.columns()
        encoded = encode(rows, tokenizer, label2id, "training", **columns, max_length=options.max_length)

    def model_init():
        return FastBertForSequenceClassification.from_backbone(
            encoder,
            num_hidden_layers=options.num_hidden_layers,
            exit_type=options.exit_type,
            id2label=dict(enumerate(names)),
            label2id=label2id,
        )

    training = TrainingArguments(
        options.output_dir,
        learning_rate=options.learning_rate,
        num_train_epochs=options.num_train_epochs,
        warmup_steps=0.1,
        per_device_train_batch_size=options.per_device_train_batch_size,
        use_cpu=options.use_cpu,
        report_to="none",
    )
    with one_line_errors():
        labelled = label_difficulty(
            model_init, training, encoded, options.num_folds, options.seeds, processing_class=tokenizer
        )
    write_whole(
        output_file, rows_as_text(rows.add_column("difficulty", labelled["difficulty"][:]), output_file.suffix)
    )

    print(f"\n{'hard rows':24}{'rows':>8}{'share':>8}")
    counts = Counter(names[label] for label in labelled["labels"])
    for name, share in hard_shares(labelled, names).items():
        print(f"{printable(name):24}{counts.get(name, len(rows)):>8}{share:>8.1%}")
    print(f"\nThe labelled rows are in {options.output_file}. Tokenize them, keep the column, and fine-tune:")
    print("DifficultyAwareTrainer(model, DifficultyAwareArguments('outputs/model'), train_dataset=rows).train()")


if __name__ == "__main__":
    main()
