"""
This package beside what users would take instead on a CPU, in one process: writes docs/performance/rivals_<name>.json.

    python benchmarks/rivals.py --data_dir $FASTBERT_DATA   # everything, one thread
    python benchmarks/rivals.py --only minilm --sides stock torch ours --texts 64 --test_texts 64 --repeats 2  # a try
    python benchmarks/rivals.py --threads 2 --label 2_threads
    python benchmarks/rivals.py --list_names
    python benchmarks/rivals.py --report_only  # the tables of what is there

The sides take turns with equal threads, tokenisation included, each at its best batch size (chosen on texts of dev)
and, but for the pipelines, sorted by length. Speeds are chosen on dev, texts for calibration come from train, and test
is only for the numbers. An engine that is not installed or fails is a row that says why. Nothing else should run
beside it.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).parent))


@dataclass
class Arguments:
    data_dir: str = field(
        default=os.environ.get("FASTBERT_DATA", ""),
        metadata={"help": "Folder with zh/douban_book_review and en/sst2, each with train, dev and test."},
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Names of comparisons; --list_names prints them."})
    sides: list[str] = field(
        default_factory=list, metadata={"help": "Beginnings of the names of sides; the stock pipeline is always one."}
    )
    threads: int = field(default=1, metadata={"help": "Of every engine, and of the tokenizer."})
    repeats: int = field(default=7, metadata={"help": "Turns of each comparison, after one that is not counted."})
    texts: int = field(default=512, metadata={"help": "Texts that are timed in a list; a quarter of them for base."})
    single_texts: int = field(default=100, metadata={"help": "Texts of dev that are answered one at a time."})
    test_texts: int = field(default=0, metadata={"help": "Texts for accuracy; 0 is all of test."})
    compiled: bool = field(
        default=False, metadata={"help": "Also time torch.compile, which takes minutes before its first answer."}
    )
    label: str = field(
        default="", metadata={"help": "Goes into the names of the files, after that of the comparison."}
    )
    docs_dir: str = field(default="docs", metadata={"help": "Folder of performance/."})
    seed: int = field(
        default=0, metadata={"help": "Of PyTorch and NumPy; texts and random weights have their own, 0."}
    )
    list_names: bool = field(default=False, metadata={"help": "Print the names of comparisons and sides, and leave."})
    report_only: bool = field(default=False, metadata={"help": "Measure nothing; print the tables of what is there."})


NAMES = {
    "minilm": "the package's own model: sst2 test sentences, accuracy, agreement, batch-mates, and times of a list",
    "minilm_single": "the same model, one text at a time",
    "base": "BERT-base shape with random weights, times of a list of reviews, with exits a third of the layers",
    "base_single": "the same, one text at a time",
}


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments, description=__doc__.split("\n\n")[0]).parse_args_into_dataclasses()
    if arguments.threads < 1:
        raise SystemExit(f"--threads {arguments.threads}: give at least 1")
    # Read when the libraries are loaded: a tokenizer would take every core.
    os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if arguments.threads == 1 else "true"
    import rivals_report

    folder = Path(arguments.docs_dir, "performance")
    if arguments.list_names:
        from rivals_engines import ENGINES

        print("\n".join(f"{name:14} {what}" for name, what in NAMES.items()))
        own = ["ours float32", "ours int8", "ours, onnx", "ours, openvino"]
        print("sides: " + "; ".join(["stock pipeline", *ENGINES, "sentence-transformers, onnx and openvino", *own]))
        return
    if arguments.report_only:
        print(rivals_report.tables(folder))
        return
    unknown = sorted(set(arguments.only) - set(NAMES))
    if unknown:
        raise SystemExit(f"unknown comparisons {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    for needed in ("zh/douban_book_review", "en/sst2"):
        if not Path(arguments.data_dir, needed, "test.tsv.gz").is_file():
            raise SystemExit(f"no {needed}/test.tsv.gz in {arguments.data_dir!r}: give --data_dir or FASTBERT_DATA")

    import rivals_measures

    from fastbert_hf.files import write_whole

    asked = arguments.only or list(NAMES)
    for model in ("minilm", "base"):
        names = [name for name in asked if name.split("_")[0] == model]
        if not names:
            continue
        for name, result in rivals_measures.measure(model, names, arguments):
            settings = {**asdict(arguments), **rivals_measures.machine(), "what": NAMES[name]}
            for place in ("data_dir", "docs_dir", "list_names", "report_only", "only"):
                del settings[place]
            settings["data"] = "zh/douban_book_review" if model == "base" else "en/sst2"
            path = folder / f"rivals_{'_'.join(filter(None, (name, arguments.label)))}.json"
            write_whole(path, json.dumps({"settings": settings, "result": result}, indent=1) + "\n")
            print(f"{path} is written.\n{rivals_report.table(path)}", flush=True)


if __name__ == "__main__":
    main()
