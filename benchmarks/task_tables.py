"""
Several labels, regression and a label for each token at 1.5x, 2x and 3x: writes the part "Tasks" of docs/results.md.

    python benchmarks/task_tables.py --data_dir $FASTBERT_DATA   # everything: about two hours on two cores
    python benchmarks/task_tables.py --data_dir $FASTBERT_DATA --sets entities --only train
    python benchmarks/task_tables.py --write_only  # from the numbers that are there

A finished run keeps its numbers in `docs/results/tasks/<name>.json` and is not repeated. While `times` is measured,
nothing else should run.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

import axis_tables


def train(*places) -> None:
    import task_runs

    task_runs.run_all(*places)


def times(*places) -> None:
    import task_runs

    task_runs.time_all(*places)


if __name__ == "__main__":
    axis_tables.main(__doc__, "tasks", {"train": train, "times": times})
