"""
The tables and figures of the FastBERT paper in our size, and FastBERT beside its baselines: writes docs/results.md.

    python benchmarks/paper_tables.py --data_dir $FASTBERT_DATA   # everything: many hours
    python benchmarks/paper_tables.py --data_dir $FASTBERT_DATA --only table_2  # one part
    python benchmarks/paper_tables.py --data_dir $FASTBERT_DATA --only baselines --sets trec mrpc
    python benchmarks/paper_tables.py --write_only  # from the numbers that are there

A finished training keeps its numbers in `docs/results/<name>.json` and is not repeated; an interrupted one goes on
with the first stage that is not finished. Stages that several recipes share are trained once. Two processes may work
at the same time on different `--sets`. While `cascade_times` runs, nothing else should.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).parent))

PARTS = ("table_2", "table_3", "baselines", "crossed", "tried", "cascades", "cascade_times")


@dataclass
class Arguments:
    data_dir: str = field(
        default=os.environ.get("FASTBERT_DATA", ""), metadata={"help": "Folder with en/<set>/*.tsv.gz."}
    )
    only: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"Some of {', '.join(PARTS)}."})
    sets: list[str] = field(default_factory=list, metadata={"help": "Only these data sets."})
    seeds: list[int] = field(default_factory=list, metadata={"help": "Only these seeds."})
    docs_dir: str = field(default="docs", metadata={"help": "Folder of results.md, results/ and figures/."})
    work_dir: str = field(default="outputs/paper", metadata={"help": "Folder of the trained models."})
    write_only: bool = field(default=False, metadata={"help": "Train nothing."})


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments, description=__doc__.split("\n\n")[0]).parse_args_into_dataclasses()
    unknown = sorted(set(arguments.only) - set(PARTS))
    if unknown:
        raise SystemExit(f"unknown parts {', '.join(unknown)}; choose from {', '.join(PARTS)}")

    import cascade_runs
    import paper_runs

    docs_dir = Path(arguments.docs_dir)
    results_dir = docs_dir / "results"
    if not arguments.write_only:
        if not Path(arguments.data_dir, "en").is_dir():
            raise SystemExit(f"no folder 'en' in {arguments.data_dir!r}: set FASTBERT_DATA or give --data_dir")
        runs = [run for part in arguments.only for run in paper_runs.PARTS[part]()]
        unknown = sorted(set(arguments.sets) - {run.set for run in runs})
        if unknown:
            known = ", ".join(dict.fromkeys(run.set for run in runs))
            raise SystemExit(f"no runs of {', '.join(unknown)} in these parts; choose from {known}")
        runs = [run for run in runs if not arguments.sets or run.set in arguments.sets]
        runs = [run for run in runs if not arguments.seeds or run.seed in arguments.seeds]
        for number, run in enumerate(runs, start=1):
            if paper_runs.finished(run, results_dir) is None:
                print(f"\n{run.name} ({number} of {len(runs)})", flush=True)
                execute = cascade_runs.EXECUTE.get(run.recipe, paper_runs.execute)
                result = execute(run, Path(arguments.data_dir), Path(arguments.work_dir))
                paper_runs.keep(result, run, results_dir)

    import paper_report

    paper_report.write(docs_dir, Path(arguments.work_dir))
    print(f"\n{docs_dir / 'results.md'} is written.")


if __name__ == "__main__":
    main()
