"""
Speed as a contract: the learned gates beside their rivals, what a speed-up that is asked for becomes on test, and how
often a certificate is broken. Adds to docs/results.md.

    python benchmarks/contract_tables.py --data_dir $FASTBERT_DATA  # everything: some hours of training
    python benchmarks/contract_tables.py --data_dir $FASTBERT_DATA --sets sst2 trec
    python benchmarks/contract_tables.py --write_only  # from the numbers that are there

What a set gave is kept in `docs/results/contract/<set>.json` and not measured again; models and records are kept in
the work folder. Two processes may work at the same time on different `--sets`.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))


def run_sets(sets: list[str], data_dir: Path, work_dir: Path, results_dir: Path) -> None:
    """Train the model of each set, record its exits, and measure."""
    import contract_measures
    import contract_runs
    import distilled_runs

    unknown = sorted(set(sets) - set(contract_runs.SETS))
    if unknown:
        raise SystemExit(f"no runs of {', '.join(unknown)}; choose from {', '.join(contract_runs.SETS)}")
    for name in sets or contract_runs.SETS:
        if distilled_runs.finished(name, results_dir) is not None:
            continue
        print(f"\n{name}", flush=True)
        model, records = contract_runs.records_of(name, data_dir, work_dir)
        dev, test = records["dev"], records["test"]
        full = (test.exit_logits[:, -1].argmax(-1) == test.labels).double().mean().item()
        result = {
            "set": name,
            "rows": {part: len(record.exit_logits) for part, record in records.items()},
            "labels": model.config.num_labels,
            "full_accuracy": full,
            "policies": contract_measures.policies(model.config, dev, test),
            "dial": contract_measures.dial(model, dev, test),
            "seconds": contract_measures.seconds_to_calibrate(model, dev),
        }
        if name in contract_runs.CERTIFIED_SETS:
            result["certificates"] = contract_measures.certificates(model.config, dev, test)
        distilled_runs.keep(result, name, results_dir)


if __name__ == "__main__":
    from axis_tables import main

    main(__doc__, "contract", {"sets": run_sets})
