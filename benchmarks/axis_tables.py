"""The command behind width_tables.py and length_tables.py: what to run, where its numbers and models are kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


@dataclass
class Arguments:
    data_dir: str = field(
        default=os.environ.get("FASTBERT_DATA", ""), metadata={"help": "Folder with en/<set>/*.tsv.gz."}
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Some of the parts; all unless given."})
    sets: list[str] = field(default_factory=list, metadata={"help": "Only these data sets."})
    docs_dir: str = field(default="docs", metadata={"help": "Folder of results.md and results/."})
    work_dir: str = field(default="outputs", metadata={"help": "Folder of the folder of the trained models."})
    threads: int = field(default=0, metadata={"help": "Threads of PyTorch; its own choice unless given."})
    write_only: bool = field(default=False, metadata={"help": "Train nothing."})


def main(doc: str, axis: str, parts: dict[str, Callable[[list[str], Path, Path, Path], None]]) -> None:
    """
    Run what is asked for and write docs/results.md.

    Args:
        doc (`str`): Of the program; its first paragraph is the help.
        axis (`str`): `"width"` or `"length"`, the name of the folders.
        parts (`dict`): By its name what a part runs: on the sets that are named, or all, with the folders of the data,
            of the trained models and of the numbers.
    """
    (arguments,) = HfArgumentParser(Arguments, description=doc.split("\n\n")[0]).parse_args_into_dataclasses()
    unknown = sorted(set(arguments.only) - set(parts))
    if unknown:
        raise SystemExit(f"unknown parts {', '.join(unknown)}; choose from {', '.join(parts)}")
    work_dir, docs_dir = Path(arguments.work_dir, axis), Path(arguments.docs_dir)
    if not arguments.write_only:
        if not Path(arguments.data_dir, "en").is_dir():
            raise SystemExit(f"no folder 'en' in {arguments.data_dir!r}: set FASTBERT_DATA or give --data_dir")
        if arguments.threads:
            import torch

            torch.set_num_threads(arguments.threads)
        for name in arguments.only or parts:
            parts[name](arguments.sets, Path(arguments.data_dir), work_dir, docs_dir / "results" / axis)

    import paper_report

    paper_report.write(docs_dir, work_dir)
    print(f"\n{docs_dir / 'results.md'} is written.")
