"""
Trained models in int8 and bfloat16 beside float32: writes the part "Precision" of docs/results.md.

    python benchmarks/precision_tables.py --data_dir $FASTBERT_DATA   # some minutes, once the models are trained
    python benchmarks/precision_tables.py --write_only  # from the numbers that are there

The models are those of contract_tables.py, trained unless they are there. A finished set keeps its numbers in
`docs/results/precision/<set>.json` and is not repeated; `--only layers` measures which layers change the answers.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))


def run_sets(*places) -> None:
    import precision_runs

    precision_runs.run_all(*places)


def run_layers(*places) -> None:
    import precision_layers

    precision_layers.run_all(*places)


if __name__ == "__main__":
    from axis_tables import main

    main(__doc__, "precision", {"sets": run_sets, "layers": run_layers})
