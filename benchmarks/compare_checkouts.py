"""
Whether a change made answers slower: the same texts through the package as it was and as it is, in turn.

    git worktree add ../before main~1
    python benchmarks/compare_checkouts.py --before ../before --data_dir $FASTBERT_DATA
    python benchmarks/compare_checkouts.py --before ../before --only "single, MiniLM" --repeats 15

Each checkout has a process of its own, with equal threads, and the two take turns. A row says how many times faster
this checkout is: the median of the ratios within each turn, and the least and the greatest of them. Nothing else
should run beside it. Texts leave the models by chance, as in benchmarks/serving_speed.py; at full depth the smaller
one is the trained default model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).parent))

CUT = {"truncation": True, "max_length": 128}
SHARES = (0.5, 0.25)


@dataclass
class Arguments:
    before: str = field(metadata={"help": "Folder of the checkout to compare with."})
    data_dir: str = field(
        default=os.environ.get("FASTBERT_DATA", ""),
        metadata={"help": "Folder with zh/douban_book_review and en/sst2; the project's own reviews unless given."},
    )
    shapes: list[str] = field(default_factory=lambda: ["BERT-base", "MiniLM"], metadata={"help": "One or both."})
    only: list[str] = field(default_factory=list, metadata={"help": "Rows, by their names."})
    repeats: int = field(default=7, metadata={"help": "Turns of each row, after one that is not counted."})
    texts: int = field(default=256, metadata={"help": "Texts in a stream of the smaller model."})
    without_onednn: bool = field(
        default=False, metadata={"help": "MKL for both, where their measurements of the two may choose differently."}
    )


def build_rows(shape: str, texts: list[str]) -> dict[str, Callable[[], object]]:
    """Return what is timed with the models of a shape, by the names of the rows."""
    import torch
    from serving_runs import leave_at_random, own_model, own_pipeline

    from fastbert_hf import CascadeForSequenceClassification

    full, single = own_pipeline(own_model(shape)), texts[: max(len(texts) // 8, 1)]
    cut = {"input_ids": full.tokenizer(" ".join(texts))["input_ids"]}
    equal = [{"input_ids": cut["input_ids"][start : start + 40]} for start in range(0, 40 * len(texts), 40)]
    equal = [row for row in equal if len(row["input_ids"]) == 40]
    rows = {
        "stream": lambda: full(texts, speed=0, **CUT),
        "equal lengths": lambda: list(full.model.predict(equal, batch_size=32)),
        "single": lambda: [full(text, speed=0, **CUT) for text in single],
    }
    for share in SHARES:
        model = own_model(shape, hidden_act="gelu")  # a field of its own: never the trained model
        leave_at_random(model.exits, share * model.config.num_hidden_layers)
        fast = own_pipeline(model)
        rows[f"stream, {share:g} of the layers"] = lambda fast=fast: fast(texts, speed=0.5, **CUT)
        rows[f"single, {share:g} of the layers"] = lambda fast=fast: [fast(text, speed=0.5, **CUT) for text in single]
    members = [own_model(shape, num_hidden_layers=layers) for layers in (2, full.model.config.num_hidden_layers)]
    for member in members:
        member.config.min_exit_layer = member.config.num_hidden_layers
    cascade = own_pipeline(CascadeForSequenceClassification.from_members(members))
    rows["cascade"] = lambda: cascade(texts, speed=0.9, **CUT)
    half = own_model(shape, torch.bfloat16)
    encoded = full.tokenizer(texts, **CUT)
    rows["stream, bfloat16"] = lambda: list(half.predict(encoded))
    return {f"{name}, {shape}": run for name, run in rows.items()}


def work(data_dir: str, texts: int, shapes: list[str]) -> None:
    """Be the process of one checkout: read the name of a row from each line, and print the seconds that it took."""
    from serving_runs import read_reviews

    rows = {}
    for shape in shapes:
        count = texts // 4 if shape == "BERT-base" else texts
        rows.update(build_rows(shape, read_reviews(data_dir, shape, max(count, 1))))
    print(json.dumps(list(rows)), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        rows[line.strip()]()
        print(time.perf_counter() - start, flush=True)


class Side:
    """The process of one checkout."""

    def __init__(self, folder: Path, arguments: Arguments):
        command = [sys.executable, __file__, "--work", str(folder), str(int(arguments.without_onednn))]
        command += [arguments.data_dir, str(arguments.texts), *arguments.shapes]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.rows = json.loads(self.answer())

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a process ended before its answer: see what it printed above")
        return line

    def seconds(self, row: str) -> float:
        self.process.stdin.write(row + "\n")
        self.process.stdin.flush()
        return float(self.answer())


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments, description=__doc__.split("\n\n")[0]).parse_args_into_dataclasses()
    here = Path(__file__).resolve().parent.parent
    if not Path(arguments.before, "fastbert_hf").is_dir():
        raise SystemExit(f"{arguments.before} is no checkout of this project: it has no folder fastbert_hf")
    sides = [Side(Path(arguments.before).resolve(), arguments), Side(here, arguments)]
    unknown = sorted(set(arguments.only) - set(sides[1].rows))
    if unknown:
        raise SystemExit(f"unknown rows {', '.join(unknown)}; choose from {'; '.join(sides[1].rows)}")
    print(f"{'times faster than before':44}{'median':>8}{'least':>8}{'greatest':>10}", flush=True)
    for row in arguments.only or sides[1].rows:
        ratios = []
        for turn in range(arguments.repeats + 1):
            # Who comes first changes, as the second finds warm caches.
            order = sides if turn % 2 else sides[::-1]
            seconds = {id(side): side.seconds(row) for side in order}
            ratios += [seconds[id(sides[0])] / seconds[id(sides[1])]] * (turn > 0)
        print(f"{row:44}{median(ratios):>8.3f}{min(ratios):>8.3f}{max(ratios):>10.3f}", flush=True)
    for side in sides:
        side.process.stdin.close()
        side.process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        sys.path.insert(0, sys.argv[2])
        import fastbert_hf

        if sys.argv[3] == "1":
            import torch

            torch.backends.mkldnn.is_available = lambda: False
        assert Path(fastbert_hf.__file__).is_relative_to(sys.argv[2]), fastbert_hf.__file__
        # Its own measurements, which use its own internals.
        sys.path.insert(0, str(Path(sys.argv[2], "benchmarks")))
        work(sys.argv[4], int(sys.argv[5]), sys.argv[6:])
    else:
        main()
