"""
`fastbert-hf serve` under load: beside a fixed speed, a plain application of Ray Serve and the pipeline alone.

    python benchmarks/server_load.py --data_dir $FASTBERT_DATA   # six minutes, and nothing else beside it
    python benchmarks/server_load.py --write_only

All of it runs on this machine, the clients too. `benchmarks/load_tables.py --write_only` puts the numbers into
docs/serving.md, as this does at its end.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from transformers import HfArgumentParser


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

SLO_MS = 100
REPLICAS = 2
RATES = (50, 100, 200, 400)
SECONDS = 6.0
# Before each measurement, so that what is compiled and learnt at first is.
WARM_SECONDS = 3.0
PORT = 8321
# Texts per second while a process is killed, or settings change.
STEADY = 80
STEADY_SECONDS = 12.0
OWN_SPEED = 0.49
SIDES = {
    "speed follows the load": [],
    "the model's own speed": ["--speed", str(OWN_SPEED), "--max-speed", str(OWN_SPEED)],
    "speed 0": ["--speed", "0", "--max-speed", "0"],
    "stock pipeline in Ray Serve": None,
    "the same, batches by tokens": None,
}


@dataclass
class Arguments:
    data_dir: str = field(default=os.environ.get("FASTBERT_DATA", ""), metadata={"help": "Folder with en/sst2."})
    docs_dir: str = field(default="docs", metadata={"help": "Folder of serving.md and serving/."})
    write_only: bool = field(default=False, metadata={"help": "Measure nothing."})


def sentences(data_dir: Path) -> tuple[list[str], list[str]]:
    """Return the test sentences of SST-2 with their labels."""
    with gzip.open(data_dir / "en" / "sst2" / "test.tsv.gz", "rt", encoding="utf-8") as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines][1:]
    return [text for _, text in rows], [("negative", "positive")[int(label)] for label, _ in rows]


@contextmanager
def server(side: str, settings: Path | None = None):
    """Start a server, and end it."""
    options = SIDES[side]
    if options is None:
        words = [str(HERE / "stock_server.py"), *(["--tokens"] if "tokens" in side else [])]
    else:
        own = ["--settings", str(settings)] if settings else options
        words = ["-m", "fastbert_hf_cli", "serve", "--slo-ms", str(SLO_MS), *own]
    words += ["--port", str(PORT), "--replicas", str(REPLICAS)]
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log)
        try:
            end = time.monotonic() + 120
            while "Answering on" not in Path(log.name).read_text():
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{side} does not start: {Path(log.name).read_text()[-2000:]}")
                time.sleep(0.1)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(90)


def client(texts: list[str], rate: float, seconds: float, seed: int = 0) -> subprocess.Popen:
    """Start who asks."""
    words = ["--port", str(PORT), "--rate", str(rate), "--seconds", str(seconds), "--seed", str(seed)]
    process = subprocess.Popen(
        [sys.executable, str(HERE / "open_loop.py"), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdin.write("\n".join(texts))
    process.stdin.close()
    return process


def answers_of(process: subprocess.Popen) -> list[dict]:
    """Return what who asks was told, one row for each request."""
    *rows, last = map(json.loads, process.stdout)
    process.wait()
    assert last["sent"] == len(rows), "each request has one answer, none is lost and none doubled"
    return rows


def summary(rows: list[dict], labels: list[str], seconds: float) -> dict:
    """Return what the answers of one load amount to."""
    answered = [row for row in rows if row["status"] == 200]
    times = np.array([row["seconds"] for row in answered] or [np.nan])
    in_time = [row for row in answered if row["seconds"] <= SLO_MS / 1000]
    right = sum(row["label"] == labels[row["number"]] for row in in_time)
    statuses = Counter(str(row["status"]) for row in rows)
    return {
        "offered": len(rows),
        "answered_per_second": len(answered) / seconds,
        "in_time_per_second": len(in_time) / seconds,
        "accuracy_over_all": right / len(rows),
        "p50": float(np.percentile(times, 50)),
        "p99": float(np.percentile(times, 99)),
        "refused": statuses["429"] / len(rows),
        "lost": sum(number for status, number in statuses.items() if status not in ("200", "429")),
        "layers": float(np.mean([row["exit_layer"] for row in answered if row["exit_layer"]] or [np.nan])),
    }


def measure(data_dir: Path) -> dict:
    """Measure every side under every load, and what is lost where processes end and settings change."""
    import rivals_measures
    import torch

    from fastbert_hf.serving.loading import load_pipeline

    texts, labels = sentences(data_dir)
    found: dict = {
        "settings": {"slo_ms": SLO_MS, "replicas": REPLICAS, "seconds": SECONDS, **rivals_measures.machine()}
    }
    torch.set_num_threads(1)
    classifier = load_pipeline(speed=OWN_SPEED)
    expected = classifier(texts)
    found["pipeline"] = {}
    for name, speed in (("the model's own speed", OWN_SPEED), ("speed 0", 0.0), ("speed 1", 1.0)):
        started = time.perf_counter()
        classifier(texts, speed=speed)
        found["pipeline"][name] = len(texts) / (time.perf_counter() - started)
    found["loads"] = {}
    for side in SIDES:
        with server(side):
            answers_of(client(texts, 50, WARM_SECONDS, seed=9))
            of_side = {}
            for rate in RATES:
                rows = answers_of(client(texts, rate, SECONDS))
                of_side[str(rate)] = summary(rows, labels, SECONDS)
                print(side, rate, of_side[str(rate)], flush=True)
                if side == "the model's own speed":
                    found.setdefault("equal", []).append(equal_to(expected, rows))
                time.sleep(1.0)
            found["loads"][side] = of_side
    found["events"] = events(texts, labels)
    return found


def equal_to(expected: list[dict], rows: list[dict]) -> dict:
    """Return how many answers are those of the pipeline."""
    answered = [row for row in rows if row["status"] == 200]
    same = sum(
        row["label"] == expected[row["number"]]["label"]
        and row["exit_layer"] == expected[row["number"]]["exit_layer"]
        and abs(row["score"] - expected[row["number"]]["score"]) < 1e-5
        for row in answered
    )
    return {"answered": len(answered), "same": same}


def events(texts: list[str], labels: list[str]) -> dict:
    """Return what a steady load is told while a process is killed, and while the model and its speeds change."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.json"
        settings.write_text(json.dumps({"slo_ms": SLO_MS}))
        with server("speed follows the load", settings) as process:
            answers_of(client(texts, 50, WARM_SECONDS, seed=9))
            asking = client(texts, STEADY, STEADY_SECONDS)
            time.sleep(STEADY_SECONDS / 3)
            replica_of(process).kill()
            found["a process is killed"] = summary(answers_of(asking), labels, STEADY_SECONDS)
            wait_for_replicas()
            for name, changed in (
                ("its speeds change", {"slo_ms": SLO_MS, "max_speed": 0.7}),
                ("its model changes", {"slo_ms": SLO_MS, "int8": True}),
            ):
                asking = client(texts, STEADY, STEADY_SECONDS)
                time.sleep(STEADY_SECONDS / 3)
                settings.write_text(json.dumps(changed))
                process.send_signal(signal.SIGHUP)
                found[name] = summary(answers_of(asking), labels, STEADY_SECONDS)
                print(name, found[name], flush=True)
    return found


def replica_of(process: subprocess.Popen) -> psutil.Process:
    """Return one of the processes with a model."""
    children = psutil.Process(process.pid).children(recursive=True)
    # Its name ends with what it does just now.
    name = "ray::ServeReplica:fastbert:TextReplica"
    return next(child for child in children if " ".join(child.cmdline()).startswith(name))


def wait_for_replicas() -> None:
    """Wait until as many answer as at first."""
    for _ in range(600):
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics") as answer:
            if f"fastbert_servers {REPLICAS}.0" in answer.read().decode():
                return
        time.sleep(0.1)


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments, description=__doc__.split("\n\n")[0]).parse_args_into_dataclasses()
    docs_dir = Path(arguments.docs_dir)
    if not arguments.write_only:
        if not Path(arguments.data_dir, "en", "sst2").is_dir():
            raise SystemExit(f"no folder 'en/sst2' in {arguments.data_dir!r}: set FASTBERT_DATA or give --data_dir")
        from fastbert_hf.files import write_whole

        write_whole(
            docs_dir / "serving" / "server.json", json.dumps(measure(Path(arguments.data_dir)), indent=1) + "\n"
        )

    import load_report

    load_report.write(docs_dir)
    print(f"{docs_dir / 'serving.md'} is written.")


if __name__ == "__main__":
    main()
