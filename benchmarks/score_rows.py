"""
`fastbert-hf score` on one and on two cores, and what a process holds of many rows: writes docs/serving/score.json.

    python benchmarks/score_rows.py              # most of an hour, and nothing else beside it
    python benchmarks/score_rows.py --rows 2000 --memory_rows 1000 2000 --docs_dir /tmp/docs   # to try it

Texts are a few random words of the model's vocabulary, or the lines of a file again and again with another number at
their ends. Every thousandth row has no text. All is answered by the package's own model at its own speed.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).parent))

WORDS = (4, 10)
BAD_EVERY = 1000
ROWS = re.compile(r"Rows: ([\d,]+)\. Answered: ([\d,]+), in .*\. Rejected: ([\d,]+)")
RUN = re.compile(r"This run: [\d,]+ rows, ([\d.]+) seconds, .* processes of at most ([\d,]+) MiB")


@dataclass
class Arguments:
    rows: int = field(default=100_000, metadata={"help": "Rows that one and two processes score in turn."})
    memory_rows: list[int] = field(
        default_factory=lambda: [10_000, 100_000, 1_000_000],
        metadata={"help": "Rows of the runs whose memory is told; all rows of the last one are looked for."},
    )
    texts: str | None = field(default=None, metadata={"help": "File with a text on each line, in place of words."})
    repeats: int = field(default=3, metadata={"help": "Runs of each number of processes."})
    docs_dir: str = field(default="docs", metadata={"help": "Folder of serving/."})
    seed: int = field(default=0, metadata={"help": "Of the words."})


def write_rows(path: Path, rows: int, texts: str | None, seed: int) -> None:
    """Write a CSV file of so many rows."""
    from transformers import AutoTokenizer

    from fastbert_hf import DEFAULT_MODEL_DIR

    chosen = random.Random(seed)
    if texts is None:
        vocabulary = AutoTokenizer.from_pretrained(DEFAULT_MODEL_DIR).get_vocab()
        words = sorted(word for word in vocabulary if word.isascii() and word.isalpha())
        found = (" ".join(chosen.choices(words, k=chosen.randint(*WORDS))) for _ in range(rows))
    else:
        lines = [line for line in Path(texts).read_text(encoding="utf-8").splitlines() if line.strip()]
        found = (f"{lines[row % len(lines)]} {row}" for row in range(rows))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "text"])
        table.writerows([row] if row % BAD_EVERY == BAD_EVERY - 1 else [row, text] for row, text in enumerate(found))


def score(path: Path, actors: int) -> dict:
    """Score a file, and return what the command tells of that, and whether all rows are there once."""
    import pyarrow.dataset

    with TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "fastbert_hf_cli", "score", str(path), folder, "--actors", str(actors)]
        start = time.perf_counter()
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        whole_seconds = time.perf_counter() - start
        answered = pyarrow.dataset.dataset(folder, format="parquet").to_table(["id"])["id"]
        rejected = pyarrow.dataset.dataset(f"{folder}/_rejected", format="parquet").to_table(["row"])["row"]
        ids = sorted([*map(int, answered.to_pylist()), *rejected.to_pylist()])
    rows, *parts = (int(number.replace(",", "")) for number in ROWS.search(told).groups())
    seconds, memory = RUN.search(told).groups()
    return {
        "actors": actors,
        "rows": rows,
        "answered": parts[0],
        "rejected": parts[1],
        "each_row_once": ids == list(range(rows)),
        "seconds": float(seconds),
        "whole_seconds": round(whole_seconds, 1),
        "rows_per_second": round(rows / float(seconds), 1),
        "mib_of_a_process": int(memory.replace(",", "")),
    }


def measure(arguments: Arguments) -> dict:
    """Return what one and two processes take in turn, and what they hold of how many rows."""
    import rivals_measures

    with TemporaryDirectory() as folder:
        path = Path(folder, "rows.csv")
        write_rows(path, arguments.rows, arguments.texts, arguments.seed)
        runs = [score(path, actors) for _ in range(arguments.repeats) for actors in (1, 2)]
        memory = []
        for rows in arguments.memory_rows:
            write_rows(path, rows, arguments.texts, arguments.seed)
            memory.append(score(path, 2))
    rates = {actors: median(run["rows_per_second"] for run in runs if run["actors"] == actors) for actors in (1, 2)}
    versions = {name: importlib.metadata.version(name) for name in ("ray", "pyarrow")}
    about = {"words": WORDS if arguments.texts is None else None, "bad_every": BAD_EVERY, **versions}
    return {
        "settings": {**rivals_measures.machine(), **about},
        "runs": runs,
        "rows_per_second": rates,
        "ratio": round(rates[2] / rates[1], 3),
        "memory": memory,
    }


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments, description=__doc__.split("\n\n")[0]).parse_args_into_dataclasses()
    from fastbert_hf.files import write_whole

    found = measure(arguments)
    path = Path(arguments.docs_dir) / "serving" / "score.json"
    write_whole(path, json.dumps(found, indent=1) + "\n")
    print(f"{path} is written: two processes are {found['ratio']:.2f} times as fast as one.")
    for run in found["memory"]:
        print(f"{run['rows']:,} rows: {run['mib_of_a_process']:,} MiB a process")


if __name__ == "__main__":
    main()
