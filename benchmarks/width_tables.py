"""
Narrower feed-forward layers beside their controls, and with exits: writes the part "Width" of docs/results.md.

    python benchmarks/width_tables.py --data_dir $FASTBERT_DATA   # everything: about three hours on two cores
    python benchmarks/width_tables.py --data_dir $FASTBERT_DATA --sets trec --only shares
    python benchmarks/width_tables.py --write_only  # from the numbers that are there

A finished run keeps its numbers in `docs/results/width/<name>.json` and is not repeated. Two processes may work at the
same time on different `--sets`; while the times of `frontier` are taken, nothing else should run.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).parent))

PARTS = ("shares", "frontier")


@dataclass
class Arguments:
    data_dir: str = field(
        default=os.environ.get("FASTBERT_DATA", ""), metadata={"help": "Folder with en/<set>/*.tsv.gz."}
    )
    only: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"Some of {', '.join(PARTS)}."})
    sets: list[str] = field(default_factory=list, metadata={"help": "Only these data sets."})
    docs_dir: str = field(default="docs", metadata={"help": "Folder of results.md and results/."})
    work_dir: str = field(default="outputs/width", metadata={"help": "Folder of the trained models."})
    threads: int = field(default=0, metadata={"help": "Threads of PyTorch; its own choice unless given."})
    write_only: bool = field(default=False, metadata={"help": "Train nothing."})


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments, description=__doc__.split("\n\n")[0]).parse_args_into_dataclasses()
    unknown = sorted(set(arguments.only) - set(PARTS))
    if unknown:
        raise SystemExit(f"unknown parts {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    if not arguments.write_only:
        if not Path(arguments.data_dir, "en").is_dir():
            raise SystemExit(f"no folder 'en' in {arguments.data_dir!r}: set FASTBERT_DATA or give --data_dir")

        import torch
        import width_frontier
        import width_runs

        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        folders = (Path(arguments.data_dir), Path(arguments.work_dir), Path(arguments.docs_dir, "results", "width"))
        if "shares" in arguments.only:
            width_runs.run_all(arguments.sets or width_runs.SETS, *folders)
        if "frontier" in arguments.only:
            width_frontier.run_all(*folders)

    import paper_report

    paper_report.write(Path(arguments.docs_dir), Path(arguments.work_dir))
    print(f"\n{Path(arguments.docs_dir, 'results.md')} is written.")


if __name__ == "__main__":
    main()
