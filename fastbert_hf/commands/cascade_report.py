"""What the command `cascade` prints of a cascade and of its small member."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..escapes import printable
from .cascade_options import CascadeOptions


if TYPE_CHECKING:
    import pandas as pd
    import torch
    from datasets import Dataset

    from ..evaluation import ExitRecord
    from ..modeling.tasks import Task


NUM_ANSWERS = 4  # shown at the end
# Columns of the printed table: the name in the table of `sweep_speeds`, the header, and the format.
SHOWN = (
    ("accuracy", "accuracy", "{:.1%}"),
    ("agreement", "agreement", "{:.1%}"),
    ("mean_exit_layer", "mean layers", "{:.2f}"),
    ("layer_speed_up", "fewer layers", "{:.2f}x"),
    ("executed_speed_up", "fewer FLOPs", "{:.2f}x"),
    ("member_1", "small", "{:.1%}"),
    ("member_2", "large", "{:.1%}"),
)


def print_quality(records: dict[str, ExitRecord], task: Task) -> None:
    """Print what the paper's Table 5 tells of the small member, after each of its trainings."""
    from ..evaluation.metrics import DifficultyInversionScore, ExpectedCalibrationError

    inversion, calibration = DifficultyInversionScore(), ExpectedCalibrationError()
    print("\nHow well confidence tells wrong answers (DIS, higher is better) and accuracy (ECE, lower is better):")
    print(f"\n{'small member':24}{'DIS':>8}{'accuracy':>10}{'ECE':>8}")
    for name, record in records.items():
        logits = record.exit_logits[:, -1]
        answers = {"predictions": logits, "references": record.labels}
        (score,), (error,) = inversion.compute(**answers).values(), calibration.compute(**answers).values()
        right = (task.predictions(logits) == record.labels).double().mean().item()
        print(f"{name:24}{score:>8.1%}{right:>10.1%}{error:>8.1%}")


def print_speeds(table: pd.DataFrame) -> None:
    """Print what each speed gives and costs."""
    print(f"\n{'speed':>6}{''.join(f'{header:>14}' for _, header, _ in SHOWN)}")
    for row in table.to_dict("records"):
        cells = [form.format(row[name]) for name, _, form in SHOWN]
        print(f"{row['speed']:>6g}{''.join(f'{cell:>14}' for cell in cells)}")


def print_answers(options: CascadeOptions, folder: Path, validation: Dataset, device: torch.device) -> None:
    """Print what the saved cascade answers to a few validation texts."""
    from transformers import pipeline

    classifier = pipeline("fast-text-classification", model=str(folder), device=device)
    columns = {"text": options.text_column, "text_pair": options.text_pair_column}
    shown = validation.select(range(0, len(validation), -(-len(validation) // NUM_ANSWERS)))
    texts = [{name: str(row[column]) for name, column in columns.items() if column} for row in shown]
    for text, answer in zip(texts, classifier(texts, truncation=True, max_length=options.max_length), strict=True):
        how = f"{answer['score']:.0%}, {('small', 'large')[answer['exit_member'] - 1]}, {answer['exit_layer']} layers"
        print(f"  {printable(answer['label'])} ({how})  {printable(' / '.join(text.values()))}")
