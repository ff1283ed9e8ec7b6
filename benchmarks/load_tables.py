"""
A speed that follows the load beside fixed speeds, feedback and an oracle: writes docs/serving.md.

    python benchmarks/load_tables.py --data_dir $FASTBERT_DATA   # a minute, and nothing else beside it
    python benchmarks/load_tables.py --write_only

How long batches of the package's own model take is measured here; all else happens on a virtual clock.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).parent))


@dataclass
class Arguments:
    data_dir: str = field(default=os.environ.get("FASTBERT_DATA", ""), metadata={"help": "Folder with en/sst2."})
    docs_dir: str = field(default="docs", metadata={"help": "Folder of serving.md and serving/."})
    seeds: int = field(default=5, metadata={"help": "Draws of the arrivals."})
    time_to_answer: float = field(default=0.1, metadata={"help": "Seconds that were promised."})
    write_only: bool = field(default=False, metadata={"help": "Measure nothing."})


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments, description=__doc__.split("\n\n")[0]).parse_args_into_dataclasses()
    docs_dir = Path(arguments.docs_dir)
    if not arguments.write_only:
        if not Path(arguments.data_dir, "en", "sst2").is_dir():
            raise SystemExit(f"no folder 'en/sst2' in {arguments.data_dir!r}: set FASTBERT_DATA or give --data_dir")
        import load_runs

        from fastbert_hf.files import write_whole

        found = load_runs.measure(Path(arguments.data_dir), arguments.time_to_answer, arguments.seeds)
        (docs_dir / "serving").mkdir(parents=True, exist_ok=True)
        write_whole(docs_dir / "serving" / "load.json", json.dumps(found) + "\n")

    import load_report

    load_report.write(docs_dir)
    print(f"{docs_dir / 'serving.md'} is written.")


if __name__ == "__main__":
    main()
