"""
Narrower feed-forward layers beside their controls, and with exits: writes the part "Width" of docs/results.md.

    python benchmarks/width_tables.py --data_dir $FASTBERT_DATA   # everything: some hours on two cores
    python benchmarks/width_tables.py --data_dir $FASTBERT_DATA --sets trec --only shares
    python benchmarks/width_tables.py --write_only  # from the numbers that are there

A finished run keeps its numbers in `docs/results/width/<name>.json` and is not repeated. Two processes may work at the
same time on different `--sets`; while the times of `frontier` are taken, nothing else should run.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

import axis_tables


def shares(*places) -> None:
    import width_runs

    width_runs.run_all(*places)


def frontier(sets: list[str], *folders) -> None:
    import width_frontier

    width_frontier.run_all(*folders)


if __name__ == "__main__":
    axis_tables.main(__doc__, "width", {"shares": shares, "frontier": frontier})
