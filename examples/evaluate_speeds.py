"""
What each speed of a saved model costs and gives on your data: a table to choose from, and the paper's figures.

    python examples/evaluate_speeds.py --model_name_or_path outputs/quick_start --data_file examples/data/test.tsv

    # compare policies by Matthews correlation, measure wall-clock, keep all speeds and draw figures
    python examples/evaluate_speeds.py --model_name_or_path outputs/quick_start --data_file examples/data/test.tsv \\
        --policies entropy margin --metric matthews_correlation --time_speeds 0.3 0.5 \\
        --output outputs/speeds.csv --figures_dir outputs/figures

One full-depth pass answers for all speeds. Data without labels gives the agreement with the full model instead of an
accuracy. `--output` keeps 191 speeds from 0 to 1 as .csv, or with the measured times as .json; the printed table is
shorter.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from text_data import TextColumns, check_data, encode, fail, load_file
from transformers import HfArgumentParser


@dataclass
class ScriptArguments(TextColumns):
    """Which model on which data."""

    model_name_or_path: str = field(default="", metadata={"help": "A saved FastBERT model with its tokenizer."})
    data_file: str = field(default="", metadata={"help": "CSV, TSV or JSON lines, also .gz."})
    max_samples: int | None = field(default=None, metadata={"help": "Only so many random rows."})
    policies: list[str] | None = field(
        default=None, metadata={"help": "Some of entropy, confidence, margin and patience; the model's own if none."}
    )
    metric: str = field(default="accuracy", metadata={"help": "accuracy, f1 or matthews_correlation."})
    batch_size: int = field(default=32, metadata={"help": "Rows in a batch of the full-depth pass."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})
    speeds: list[float] = field(
        default_factory=lambda: [step / 10 for step in range(11)], metadata={"help": "Speeds of the printed table."}
    )
    time_speeds: list[float] = field(default_factory=list, metadata={"help": "Speeds whose wall-clock is measured."})
    output: str | None = field(default=None, metadata={"help": "File for all speeds, .csv or .json."})
    figures_dir: str | None = field(default=None, metadata={"help": "Folder for Figures 3 to 6, as PNG and SVG."})


def check_arguments(script: ScriptArguments) -> None:
    """Everything that is wrong without a look into model and data."""
    from fastbert_hf.modeling.exit_policies import EXIT_POLICIES, check_speed

    for name in ("model_name_or_path", "data_file"):
        if not getattr(script, name):
            fail(f"give --{name}")
    if not Path(script.data_file).is_file():
        fail(f"there is no file {script.data_file}: correct --data_file")
    unknown = [policy for policy in script.policies or [] if policy not in EXIT_POLICIES]
    if unknown:
        fail(f"--policies must be some of {', '.join(EXIT_POLICIES)}, got {', '.join(unknown)}")
    if script.output and Path(script.output).suffix not in (".csv", ".json"):
        fail(f"--output must end with .csv or .json, got {script.output}")
    for name in ("batch_size", "max_samples"):
        if getattr(script, name) is not None and getattr(script, name) < 1:
            fail(f"--{name} must be at least 1, got {getattr(script, name)}")
    try:
        for speed in (*script.speeds, *script.time_speeds):
            check_speed(speed)
    except ValueError as error:
        fail(str(error))


def main() -> None:
    parser = HfArgumentParser(ScriptArguments, description=__doc__.split("\n\n")[0].strip())
    (script,) = parser.parse_args_into_dataclasses()
    check_arguments(script)

    import torch
    from transformers import AutoTokenizer, DataCollatorWithPadding

    from fastbert_hf import FastBertForSequenceClassification
    from fastbert_hf.evaluation import record_exits, save_table, sweep_speeds, time_speeds
    from fastbert_hf.evaluation.speed_sweep import SPEEDS, TASK_METRICS

    if script.metric not in TASK_METRICS:
        fail(f"--metric must be one of {', '.join(TASK_METRICS)}, got {script.metric!r}")
    rows = load_file(script.data_file)
    has_labels = script.label_column in rows.column_names
    check_data(script, ("evaluation",) if has_labels else (), evaluation=rows)
    if script.max_samples is not None and script.max_samples < len(rows):
        rows = rows.shuffle(seed=0).select(range(script.max_samples))
    try:
        model = FastBertForSequenceClassification.from_pretrained(script.model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    except (OSError, ValueError) as error:
        fail(f"the model cannot be loaded: {str(error).splitlines()[0]}")
    label2id = {name: index for index, name in model.config.id2label.items()} if has_labels else None
    if torch.cuda.is_available() and not script.use_cpu:
        model.to("cuda")
    rows = encode(script, tokenizer, rows, label2id, "evaluation")
    collator = DataCollatorWithPadding(tokenizer)

    record = record_exits(model, rows, collator, script.batch_size)
    with warnings.catch_warnings():
        if not has_labels:
            print(f"The data has no column {script.label_column!r}: {script.metric} needs labels.", file=sys.stderr)
            warnings.filterwarnings("ignore", message="the data has no labels")
        speeds = sorted({*SPEEDS, *script.speeds})
        table = sweep_speeds(model, record, speeds, script.policies, script.metric)
    table.attrs = {"model": script.model_name_or_path, "data": script.data_file, "rows": len(rows)}

    shown = [name for name in table.columns if not name.startswith(("exit_", "paper_flops", "executed_flops"))]
    print(f"\n{len(rows)} rows, {record.num_exits} layers\n")
    print(table[table["speed"].isin(script.speeds)][shown].to_string(index=False, float_format="{:.3f}".format))
    if script.time_speeds:
        times = time_speeds(model, rows, script.time_speeds)
        print(f"\nMeasured on {model.device}\n")
        print(times.to_string(index=False, float_format="{:.2f}".format))
        table.attrs["times"] = times.to_dict("records")
    print()
    if script.output:
        save_table(table, script.output)
        print(f"All speeds are in {script.output}.")
    if script.figures_dir:
        draw(script, model, record, table)


def draw(script: ScriptArguments, model, record, table) -> None:
    """Figures 3 to 6 of the FastBERT paper."""
    from fastbert_hf.evaluation import figures

    patience = model.config.patience
    policies = {policy: rows for policy, rows in table.groupby("policy", sort=False)}
    drawn = {"trade_off": figures.plot_trade_off(policies)}
    for policy in policies:
        arguments = {"policy": policy, "patience": patience}
        drawn[f"exit_layers_{policy}"] = figures.plot_exit_layers(record, **arguments)
        drawn[f"uncertainty_{policy}"] = figures.plot_uncertainty_by_layer(record, **arguments)
        if record.labels is not None and policy != "patience":
            drawn[f"accuracy_{policy}"] = figures.plot_accuracy_by_uncertainty(record, policy)
    for name, figure in drawn.items():
        figures.save_figure(figure, Path(script.figures_dir) / name)
    print(f"{len(drawn)} figures are in {script.figures_dir}.")


if __name__ == "__main__":
    main()
