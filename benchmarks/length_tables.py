"""
Shorter texts beside their controls, and with exits: writes the part "Length" of docs/results.md.

    python benchmarks/length_tables.py --data_dir $FASTBERT_DATA   # everything: many hours on two cores
    python benchmarks/length_tables.py --data_dir $FASTBERT_DATA --sets rte --only ratios
    python benchmarks/length_tables.py --write_only  # from the numbers that are there

A finished run keeps its numbers in `docs/results/length/<name>.json` and is not repeated. Two processes may work at
the same time on different `--sets`; while the times of `frontier` are taken, nothing else should run.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

import axis_tables


def ratios(*places) -> None:
    import length_runs

    length_runs.run_all(*places)


def frontier(sets: list[str], *folders) -> None:
    import length_frontier

    length_frontier.run_all(*folders)


if __name__ == "__main__":
    axis_tables.main(__doc__, "length", {"ratios": ratios, "frontier": frontier})
