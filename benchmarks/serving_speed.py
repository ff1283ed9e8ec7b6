"""
Wall-clock of the packed engine against stock Transformers and against its own FLOPs: writes docs/performance.md.

    python benchmarks/serving_speed.py --data_dir $FASTBERT_DATA   # everything: about half an hour on two cores
    python benchmarks/serving_speed.py --only exits_stream peak_float32 --repeats 9
    python benchmarks/serving_speed.py --list_names
    python benchmarks/serving_speed.py --write_only  # from the numbers that are there

The sides of a comparison take turns in one process, with equal threads; medians and the range of the ratios within
each turn are kept in `docs/performance/<name>.json`, and those of other names stay as they are. Nothing else should
run beside it. Texts are real reviews from `--data_dir`, or the project's own where there are none.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).parent))


@dataclass
class Arguments:
    data_dir: str = field(
        default=os.environ.get("FASTBERT_DATA", ""),
        metadata={"help": "Folder with zh/douban_book_review and en/sst2; the project's own reviews unless given."},
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Names of comparisons; --list_names prints them."})
    repeats: int = field(default=5, metadata={"help": "Turns of each comparison, after one that is not counted."})
    texts: int = field(default=256, metadata={"help": "Texts in a stream; half as many for BERT-base at full depth."})
    docs_dir: str = field(default="docs", metadata={"help": "Folder of performance.md and performance/."})
    machine: str = field(
        default="",
        metadata={"help": "Folder in performance/ for another machine's numbers; of them the page has precision."},
    )
    list_names: bool = field(default=False, metadata={"help": "Print the names of the comparisons and leave."})
    write_only: bool = field(default=False, metadata={"help": "Measure nothing."})


NAMES = {
    "stream_base": "speed 0, a stream, BERT-base shape, against the stock pipeline",
    "stream_minilm": "the same, MiniLM shape",
    "sorted_base": "speed 0, BERT-base shape, against stock batches sorted by length",
    "sorted_minilm": "the same, MiniLM shape",
    "equal_base": "speed 0, all texts equally long, BERT-base shape",
    "equal_minilm": "the same, MiniLM shape",
    "single_base": "speed 0, one text at a time, BERT-base shape, against the stock pipeline",
    "single_minilm": "the same, MiniLM shape",
    "exits_stream": "exits on, a stream, both shapes, against the executed FLOPs",
    "exits_single": "exits on, one text at a time, both shapes, against the executed FLOPs",
    "cascade": "a cascade of random weights, a stream, against the layers executed",
    "pypi_stream": "exits on, a stream, against PyPI fastbert 0.2.2",
    "pypi_single": "exits on, one text at a time, against PyPI fastbert 0.2.2",
    "peak_float32": "packed layers against their matrix products, float32",
    "peak_bfloat16": "packed layers against their matrix products, bfloat16",
    "bfloat16": "speed 0, a stream, bfloat16 against float32",
    "rebatching": "exits on, a stream, survivors joined against apart",
    "layer_cost": "time of a layer for each token, by the tokens of its batch",
    "compiled": "speed 0, a stream, torch.compile of the layers",
    "growth": "seconds by the number of texts, their length, layers and classes",
    "width_layer": "fast feed-forward layers against dense ones",
    "width_encoder": "models with fast feed-forward layers against dense ones, speed 0",
    "length": "models whose texts become shorter against all tokens, speed 0, against the executed FLOPs",
    "int8": "int8 and bfloat16 against float32, speed 0: a stream, and short texts one at a time",
    "int8_exits": "the same with exits on, a stream",
    "int8_memory": "peak memory of int8 against float32",
    "memory": "peak memory of streams of 10,000 and 100,000 texts",
}


def measure(name: str, arguments: Arguments) -> object:
    import serving_runs as runs
    import torch

    repeats = arguments.repeats
    texts = {shape: runs.read_reviews(arguments.data_dir, shape, max(arguments.texts, 1024)) for shape in runs.SHAPES}
    streams = {shape: reviews[: arguments.texts] for shape, reviews in texts.items()}
    kind, _, shape = name.rpartition("_")
    if kind in ("stream", "sorted", "equal", "single") and shape in ("base", "minilm"):
        full_name = {"base": "BERT-base", "minilm": "MiniLM"}[shape]
        run = {
            "stream": runs.against_stock_pipeline,
            "sorted": runs.against_sorted_stock,
            "equal": runs.against_stock_on_equal_lengths,
            "single": runs.one_at_a_time,
        }[kind]
        if kind == "equal":
            return run(full_name, texts[full_name], repeats)
        shorter = {"base": 4 if kind == "single" else 2, "minilm": 2 if kind == "single" else 1}[shape]
        return run(full_name, streams[full_name][: arguments.texts // shorter], repeats)
    if name in ("exits_stream", "exits_single"):
        single = name == "exits_single"
        cases = {}
        for full_name in runs.SHAPES:
            for share in (0.5, 0.25):
                stream = streams[full_name]
                chosen = stream[: len(stream) // 4] if single else stream if full_name == "BERT-base" else stream * 2
                cases[f"{full_name}, {share:g}"] = runs.against_ideal(full_name, chosen, repeats, share, single)
        return cases
    if name == "cascade":
        return {
            f"{shape}, {share:g}": runs.cascade_against_layers(shape, 2, streams[shape] * factor, repeats, share)
            for shape, factor in (("BERT-base", 1), ("MiniLM", 4))
            for share in (0.6, 0.9)
        }
    if name in ("pypi_stream", "pypi_single"):
        single = name == "pypi_single"
        chosen = streams["BERT-base"][: arguments.texts // (8 if single else 4)]
        return {f"{share:g}": runs.against_pypi_fastbert(chosen, repeats, share, single) for share in (0.5, 0.25)}
    if name in ("peak_float32", "peak_bfloat16"):
        return runs.against_peak(getattr(torch, name.removeprefix("peak_")), 3 * repeats)
    if name == "bfloat16":
        return {shape: runs.bfloat16_against_float32(shape, streams[shape], repeats) for shape in runs.SHAPES}
    if name == "rebatching":
        cases = [(shape, share) for shape in runs.SHAPES for share in (0.5, 0.25)]
        return {
            f"{shape}, {share:g}": runs.with_and_without_rebatching(shape, streams[shape], 2 * repeats, share)
            for shape, share in cases
        }
    if name == "layer_cost":
        return runs.cost_of_a_layer(2 * repeats)
    if name == "compiled":
        return {
            shape: runs.compiled_against_plain(shape, streams[shape][: arguments.texts // 2], repeats)
            for shape in runs.SHAPES
        }
    if name in ("width_layer", "width_encoder"):
        import width_speed

        run = width_speed.feed_forward_alone if name == "width_layer" else width_speed.whole_encoder
        return [row for shape in width_speed.SHAPES for row in run(shape, repeats)]
    if name == "length":
        import length_speed

        return [row for shape in runs.SHAPES for row in length_speed.against_all_tokens(shape, repeats)]
    if name.startswith("int8"):
        import precision_speed

        if name == "int8_memory":
            return {shape: precision_speed.peak_memory(shape) for shape in runs.SHAPES}
        if name == "int8":
            shorter = {"BERT-base": 2, "MiniLM": 1}
            cases = [(shape, streams[shape][: arguments.texts // by]) for shape, by in shorter.items()]
            return [row for case in cases for row in precision_speed.against_float32(*case, repeats)]
        cases = [(shape, share) for shape in runs.SHAPES for share in (0.5, 0.25)]
        streams["MiniLM"] *= 2
        return [row for of, share in cases for row in precision_speed.with_exits(of, streams[of], repeats, share)]
    if name == "growth":
        return runs.growth(texts["MiniLM"], repeats)
    return runs.memory_of_streams()


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments, description=__doc__.split("\n\n")[0]).parse_args_into_dataclasses()
    if arguments.list_names:
        print("\n".join(f"{name:14} {what}" for name, what in NAMES.items()))
        return
    unknown = sorted(set(arguments.only) - set(NAMES))
    if unknown:
        raise SystemExit(f"unknown comparisons {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    for needed in ("zh/douban_book_review", "en/sst2") if arguments.data_dir else ():
        if not Path(arguments.data_dir, needed).is_dir():
            raise SystemExit(f"no folder {needed!r} in {arguments.data_dir!r}: leave out --data_dir")
    folder = Path(arguments.docs_dir, "performance", arguments.machine)
    if not arguments.write_only:
        import rivals_measures
        import torch
        import transformers

        from fastbert_hf.files import write_whole
        from fastbert_hf.modeling.engine import onednn_is_faster

        settings = {
            "repeats": arguments.repeats,
            "texts": arguments.texts,
            "reviews": "zh/douban_book_review and en/sst2" if arguments.data_dir else "examples/data",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "processor": rivals_measures.processor(),
            "instructions": rivals_measures.instructions(),
            "onednn_is_faster": onednn_is_faster(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.only or NAMES:
            result = {"settings": settings, "result": measure(name, arguments)}
            write_whole(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
            print(name, json.dumps(result["result"]), flush=True)

    import serving_report

    serving_report.write(Path(arguments.docs_dir))
    print(f"{Path(arguments.docs_dir, 'performance.md')} is written.")


if __name__ == "__main__":
    main()
