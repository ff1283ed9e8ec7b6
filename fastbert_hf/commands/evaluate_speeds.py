"""
Tell what each speed of a saved model costs and gives on your data: a table to choose from, and the paper's figures.

One full-depth pass answers for all speeds. Data without labels gives the agreement with the full model instead of an
accuracy. `--output` keeps 191 speeds from 0 to 1 as .csv, or with the measured times as .json; the printed table is
shorter.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .calibration_report import calibrate_folder, print_dial, print_policies, print_reliability
from .options import ColumnOptions, check_at_least_one, check_choice, fail, one_line_errors, parse_options


if TYPE_CHECKING:
    import pandas as pd

    from ..evaluation import ExitRecord
    from ..modeling.configuration_fastbert import FastBertConfig


@dataclass
class EvaluateSpeedsOptions(ColumnOptions):
    """Which model on which data."""

    model_name_or_path: str = field(default="", metadata={"help": "A saved FastBERT model with its tokenizer."})
    data_file: str = field(default="", metadata={"help": "CSV, TSV or JSON lines, also .gz."})
    max_samples: int | None = field(default=None, metadata={"help": "Only so many random rows."})
    policies: list[str] | None = field(
        default=None,
        metadata={"help": "Some of entropy, confidence, margin, patience, learned; the model's own if none."},
    )
    metric: str | None = field(
        default=None,
        metadata={
            "help": "accuracy (the first for one label), f1 (for several and for entities), matthews_correlation, "
            "macro_f1, r2 (for a regression) or pearson."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Rows in a batch of the full-depth pass."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})
    speeds: list[float] = field(
        default_factory=lambda: [step / 10 for step in range(11)], metadata={"help": "Speeds of the printed table."}
    )
    speedups: list[float] = field(
        default_factory=list, metadata={"help": "Of a calibrated model: speed-ups whose speeds are in the table, too."}
    )
    max_disagreements: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Of a calibrated model: shares of answers that may differ, whose certified speeds are, too."
        },
    )
    time_speeds: list[float] = field(default_factory=list, metadata={"help": "Speeds whose wall-clock is measured."})
    calibrate: bool = field(
        default=False,
        metadata={
            "help": "Write what the speeds cost and give on these texts into the model's config, for calls with "
            "speedup= and max_disagreement=."
        },
    )
    exit_policy: str | None = field(
        default=None,
        metadata={"help": "With --calibrate: the policy to write into the config; learned fits its gates."},
    )
    linear: bool = field(
        default=False, metadata={"help": "With --calibrate: make speed linear in what it costs, from now on."}
    )
    output: str | None = field(default=None, metadata={"help": "File for all speeds, .csv or .json."})
    figures_dir: str | None = field(
        default=None, metadata={"help": "Folder for Figures 3 to 6, the dial and reliability."}
    )


def check_evaluate_speeds_options(options: EvaluateSpeedsOptions) -> None:
    """End the program if an option is wrong, as far as that can be told without model and data."""
    from ..evaluation.task_metrics import ALL_METRICS
    from ..modeling.exit_policies import EXIT_POLICIES, check_speed

    for name in ("model_name_or_path", "data_file"):
        if not getattr(options, name):
            fail(f"give --{name}")
    if not Path(options.data_file).is_file():
        fail(f"there is no file {options.data_file}: correct --data_file")
    unknown = [policy for policy in options.policies or [] if policy not in EXIT_POLICIES]
    if unknown:
        fail(f"--policies must be some of {', '.join(EXIT_POLICIES)}, got {', '.join(unknown)}")
    if options.metric is not None:
        check_choice("metric", options.metric, ALL_METRICS)
    if options.calibrate and not Path(options.model_name_or_path, "config.json").is_file():
        fail(f"--calibrate writes into the folder of a model, and {options.model_name_or_path} is none: save it first")
    if options.exit_policy is not None:
        check_choice("exit_policy", options.exit_policy, EXIT_POLICIES)
    if not options.calibrate and (options.exit_policy is not None or options.linear):
        fail("--exit_policy and --linear are written into the model's config: give --calibrate, too")
    if options.output and Path(options.output).suffix not in (".csv", ".json"):
        fail(f"--output must end with .csv or .json, got {options.output}")
    check_at_least_one(options, "batch_size", "max_samples")
    with one_line_errors():
        for speed in (*options.speeds, *options.time_speeds):
            check_speed(speed)


def main(arguments: list[str] | None = None) -> None:
    """Run the command with the words of a command line, those of the program unless given."""
    options = parse_options(EvaluateSpeedsOptions, __doc__, arguments)
    check_evaluate_speeds_options(options)

    import torch
    from transformers import AutoTokenizer

    from ..calibration.dial import check_number
    from ..data import check_rows, encode, load_rows, sample
    from ..evaluation import record_exits, save_table, sweep_speeds, time_speeds
    from ..evaluation.speed_sweep import SPEEDS
    from ..evaluation.task_metrics import metric_of
    from ..modeling.configuration_fastbert import FastBertConfig
    from ..modeling.families import max_text_tokens
    from ..modeling.modeling_fastbert import CLASSIFIERS
    from ..modeling.tasks import task_of

    with one_line_errors("the model cannot be loaded"):
        config = FastBertConfig.from_pretrained(options.model_name_or_path)
    columns = {**options.columns(), "task": task_of(config).name}
    if config.task == "token-classification" and columns["text_column"] == "text":
        columns["text_column"] = "tokens"
    with one_line_errors():
        metric, _ = metric_of(config, options.metric)
        rows = load_rows(options.data_file)
        has_labels = options.label_column in rows.column_names
        check_rows(rows, "evaluation", **{**columns, "label_column": options.label_column if has_labels else None})
    rows = sample(rows, options.max_samples, seed=0)
    with one_line_errors("the model cannot be loaded"):
        model = CLASSIFIERS[config.task].from_pretrained(options.model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    if torch.cuda.is_available() and not options.use_cpu:
        model.to("cuda")
    label2id = {name: index for index, name in model.config.id2label.items()} if has_labels else None
    with one_line_errors():
        rows = encode(rows, tokenizer, label2id, "evaluation", **columns, max_length=options.max_length)

    if options.calibrate:
        with one_line_errors():
            check_number(len(rows))
    record = record_exits(model, rows, batch_size=options.batch_size)
    if options.calibrate:
        max_length = options.max_length or min(tokenizer.model_max_length, max_text_tokens(model.config.text_config))
        folder, policy = options.model_name_or_path, options.exit_policy
        found = calibrate_folder(model, record, folder, policy, options.linear, max_length)
    with one_line_errors():
        asked_for = asked_speeds(model.config, options)
        for policy in options.policies or []:
            model.policy(policy)  # whose gates may be missing
    with warnings.catch_warnings():
        if not has_labels:
            print(f"The data has no column {options.label_column!r}: {metric} needs labels.", file=sys.stderr)
            warnings.filterwarnings("ignore", message="the data has no labels")
        speeds = sorted({*SPEEDS, *options.speeds, *asked_for})
        table = sweep_speeds(model, record, speeds, options.policies, metric)
    table.attrs = {"model": options.model_name_or_path, "data": options.data_file, "rows": len(rows)}

    shown = [name for name in table.columns if not name.startswith(("exit_", "paper_flops", "executed_flops"))]
    print(f"\n{len(rows)} rows, {model.config.num_hidden_layers} layers\n")
    is_shown = table["speed"].isin([*options.speeds, *asked_for])
    print(table[is_shown][shown].to_string(index=False, float_format="{:.3f}".format))
    if options.time_speeds:
        times = time_speeds(model, rows, options.time_speeds)
        print(f"\nMeasured on {model.device}\n")
        print(times.to_string(index=False, float_format="{:.2f}".format))
        table.attrs["times"] = times.to_dict("records")
    print()
    if options.output:
        table.attrs |= {"calibration": model.config.calibration, "certification": model.config.certification}
        save_table(table, options.output)
        print(f"All speeds are in {options.output}.")
    if options.figures_dir:
        draw_figures(Path(options.figures_dir), model.config, record, table)
    if options.calibrate:
        print_policies(found)
    print_reliability(record, model.config)
    print_dial(model.config, options.model_name_or_path)


def asked_speeds(config: FastBertConfig, options: EvaluateSpeedsOptions) -> dict[float, str]:
    """Return the speeds of the speed-ups and certificates that were asked for, with what each of them is."""
    from ..modeling.dials import certified_speed, lookup_of, speed_for, speed_of_threshold

    found = {}
    for speedup in options.speedups:
        lookup_of(config, "speedup", speedup)  # or says what to do
        found[speed_of_threshold(config, speed_for(config.calibration, speedup))] = f"speedup={speedup:g}"
    for risk in options.max_disagreements:
        found[speed_of_threshold(config, certified_speed(config.certification, risk))] = f"max_disagreement={risk:g}"
    for speed, name in found.items():
        print(f"{name} is speed {speed:.6g}")
    return found


def draw_figures(folder: Path, config: FastBertConfig, record: ExitRecord, table: pd.DataFrame) -> None:
    """Draw Figures 3 to 6 of the FastBERT paper, reliability diagrams, and a dial, into a folder."""
    from ..evaluation import dial_figures, figures, reliability
    from ..modeling.exit_policies import exit_range
    from ..sharing.dial_tables import certificates_of

    policies = {policy: rows for policy, rows in table.groupby("policy", sort=False)}
    drawn, tables = {"trade_off": figures.plot_trade_off(policies)}, {}
    for policy in policies:
        if len(exit_range(config.num_hidden_layers, config.min_exit_layer, config.max_layers)) > 1:
            tables[policy] = reliability(record, config, policy)
        drawn[f"exit_layers_{policy}"] = figures.plot_exit_layers(record, config, policy=policy)
        drawn[f"uncertainty_{policy}"] = figures.plot_uncertainty_by_layer(record, config, policy=policy)
        if record.labels is not None and policy != "patience":
            drawn[f"accuracy_{policy}"] = figures.plot_accuracy_by_uncertainty(record, config, policy)
    if tables:
        drawn["reliability"] = dial_figures.plot_reliability(tables)
    if config.calibration is not None:
        certificates = {risk: found[1] for risk, found in certificates_of(config).items() if found is not None}
        drawn["dial"] = dial_figures.plot_dial(config, certificates)
    for name, figure in drawn.items():
        figures.save_figure(figure, folder / name)
    print(f"{len(drawn)} figures are in {folder}.")


if __name__ == "__main__":
    main()
