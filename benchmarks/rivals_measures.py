"""What rivals.py measures: the best batch size of each side, times in turn, accuracy, and what batch-mates change."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rivals_runs import Case, OwnPipeline, Rows, Side, prepared, sides_of
from serving_runs import in_turn, ratios


STOCK, REFERENCE = "stock pipeline", "torch float32"
# Texts of dev that batch sizes are tried on, at most, and how often.
TRIED_TEXTS, TRIES = 256, 2
# Texts of dev that are answered alone and in one call.
ALONE_TEXTS = 64
PACKAGES = ["torch", "transformers", "tokenizers", "numpy", "torchao", "onnx", "onnxscript", "onnxruntime", "openvino"]
PACKAGES += ["nncf", "sentence-transformers", "optimum", "optimum-onnx", "optimum-intel"]
# What holds a library to less than the processor can do.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def machine() -> dict:
    """Return the processor, its instructions, and the versions of all engines."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": processor(),
        "instructions": instructions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "load": os.getloadavg()[0],
        "versions": versions,
    }


def processor() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def instructions() -> str:
    """Return what the processor multiplies with, as docs call it."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_supported():
        return "AVX-512 with VNNI" if torch.cpu._is_vnni_supported() else "AVX-512"
    return "AVX2" if torch.cpu._is_avx2_supported() else platform.machine()


def measure(model: str, names: list[str], arguments) -> Iterator[tuple[str, dict]]:
    """Yield each comparison of one model by its name, all with the same prepared sides."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)
    with TemporaryDirectory(prefix="fastbert-rivals-") as folder:
        case = Case(model, arguments.data_dir, arguments.threads, Path(folder))
        sides = sides_of(case)
        if not arguments.compiled:
            sides = {name: side for name, side in sides.items() if not name.endswith("compiled")}
        if arguments.sides:
            kept = (STOCK, *arguments.sides)
            sides = {name: side for name, side in sides.items() if name.startswith(kept)}
        failed = prepared(sides)
        if STOCK not in sides:
            raise RuntimeError(f"the stock pipeline, which all is compared with, does not run: {failed[STOCK]}")
        for name in names:
            if name.endswith("_single"):
                result = one_at_a_time(case, sides, arguments)
            else:
                result = of_a_list(case, sides, arguments)
            yield name, {**result, "failed": failed}


def of_a_list(case: Case, sides: dict[str, Side], arguments) -> dict:
    """Measure everything that is said of a list of texts."""
    number = arguments.texts if case.is_trained else max(arguments.texts // 4, 8)
    dev, test = case.rows("dev"), case.rows("test")
    if arguments.test_texts:
        test = test.first(arguments.test_texts)
    tried = choose_batch_sizes(sides, dev.texts[: min(number if case.is_trained else number // 2, TRIED_TEXTS)])
    rows = {name: {"side": name, "batch_size": side.batch_size, **side.notes} for name, side in sides.items()}
    for name, values in qualities(case, sides, dev, test if case.is_trained else test.first(number)).items():
        rows[name] |= values
    # By chance: a file may be in some order of its own.
    timed = [test.texts[row] for row in np.random.default_rng(0).permutation(len(test.texts))[:number]]
    seconds = in_turn({name: _answers(side, timed) for name, side in sides.items()}, arguments.repeats, case.name)
    add_times(rows, seconds, len(timed))
    add_depths(rows, sides)
    lengths = [len(ids) for ids in case.encode(timed)]
    about = {"timed_texts": len(timed), "mean_tokens": sum(lengths) / len(lengths), "test_texts": len(test.texts)}
    return {**about, "rows": list(rows.values()), "batch_sizes_tried": tried}


def one_at_a_time(case: Case, sides: dict[str, Side], arguments) -> dict:
    """Time single texts, the first of dev."""
    number = arguments.single_texts if case.is_trained else max(arguments.single_texts // 4, 4)
    texts = case.rows("dev").texts[:number]
    for side in sides.values():
        side.batch_size = 1 if 1 in side.batch_sizes else side.batch_sizes[0]
        if isinstance(side, OwnPipeline):
            side.exit_layers = []  # every text of every turn adds its own

    def each(side: Side):
        return lambda: [side.answer_one(text) for text in texts]

    seconds = in_turn({name: each(side) for name, side in sides.items()}, arguments.repeats, f"{case.name}, single")
    rows = {name: {"side": name, **side.notes} for name, side in sides.items()}
    add_times(rows, seconds, number)
    add_depths(rows, sides)
    return {"timed_texts": number, "rows": list(rows.values())}


def _answers(side: Side, texts: list[str]):
    return lambda: side.answer(texts)


def choose_batch_sizes(sides: dict[str, Side], texts: list[str]) -> dict[str, dict[str, float]]:
    """Give each side its fastest batch size on these texts, and return the texts per second of all that were tried."""
    tried: dict[str, dict[str, float]] = {}
    for name, side in sides.items():
        if len(side.batch_sizes) == 1:
            side.batch_size = side.batch_sizes[0]
            continue
        seconds: dict[int, list[float]] = {batch_size: [] for batch_size in side.batch_sizes}
        # Each in turn, and the first turn does not count, so that no size has the warmer memory.
        for turn in range(TRIES + 1):
            for batch_size, times in seconds.items():
                side.batch_size, start = batch_size, time.perf_counter()
                side.answer(texts)
                if turn:
                    times.append(time.perf_counter() - start)
        side.batch_size = min(seconds, key=lambda batch_size: median(seconds[batch_size]))
        tried[name] = {str(size): round(len(texts) / median(times), 1) for size, times in seconds.items()}
        print(f"{name}: batches of {side.batch_size}", tried[name], flush=True)
    return tried


def qualities(case: Case, sides: dict[str, Side], dev: Rows, test: Rows) -> dict[str, dict]:
    """
    Return the accuracy (%) on test, the share of answers (%) that equal those of the stock model in float32, and the
    greatest difference between a logit of a text that is answered alone and among others.
    """
    from rivals_engines import torch_float32
    from rivals_runs import SortedSide

    reference = SortedSide(case, torch_float32)
    reference.prepare()
    reference.batch_size = 16
    full, found = np.array(reference.answer(test.texts)), {}
    for name, side in sides.items():
        found[name] = values = {}
        if side.only_times:
            continue
        answers = np.array(side.answer(test.texts))
        values["agreement"] = 100 * float((answers == full).mean())
        if case.is_trained:
            values["accuracy"] = 100 * float((answers == np.array(test.labels)).mean())
            of_dev = np.array(side.answer(dev.texts))
            values["dev_accuracy"] = 100 * float((of_dev == np.array(dev.labels)).mean())
        texts, best = dev.texts[:ALONE_TEXTS], side.batch_size
        together = side.logits(texts)
        side.batch_size = best and 1
        alone = np.concatenate([side.logits([text]) for text in texts])
        side.batch_size = best
        if best == 1:  # the next one: batches of one have no mates
            side.batch_size = side.batch_sizes[-1]
            together, side.batch_size = side.logits(texts), best
        values["batch_difference"] = float(np.abs(alone - together).max())
        values["answers_changed_by_batch"] = int((alone.argmax(-1) != together.argmax(-1)).sum())
        print(name, values, flush=True)
    return found


def add_times(rows: dict[str, dict], seconds: dict[str, list[float]], texts: int) -> None:
    """Add to the rows their texts per second and how many times those of the stock pipeline these are."""
    for name, own in seconds.items():
        rows[name]["texts_per_second"] = texts / median(own)
        rows[name]["milliseconds_per_text"] = 1e3 * median(own) / texts
        rows[name] |= ratios(seconds[STOCK], own)


def add_depths(rows: dict[str, dict], sides: dict[str, Side]) -> None:
    """Add to the rows of this package the layers that the timed texts ran through, on average."""
    for name, side in sides.items():
        if isinstance(side, OwnPipeline):
            rows[name]["mean_exit_layer"] = sum(side.exit_layers) / len(side.exit_layers)
