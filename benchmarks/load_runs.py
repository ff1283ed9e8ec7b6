"""Run what is behind "A speed that follows the load" in docs/serving.md."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import mean, median

import distilled_runs
import numpy as np
import rivals_measures
import torch
from load_simulation import Aimd, Fixed, Machine, Pi, arrivals, clairvoyant, simulate, summary, weighted

from fastbert_hf import DEFAULT_MODEL_DIR, FastBertForSequenceClassification
from fastbert_hf.evaluation import record_exits, sweep_speeds
from fastbert_hf.serving import LoadControl


# Seconds, and times the capacity at the normal speed.
PHASES = ((10.0, 1.0), (10.0, 5.0), (10.0, 10.0), (20.0, 1.0))
BURST = (10.0, 30.0)
# Tokens of the batches whose times tell what a batch and a token take.
SIZES = (32, 256, 1024)
TURNS = 15
MEAN_TOKENS = 25.0
SECONDS_DRAWN = 0.25
DRAWN = ("the normal speed", "the greatest speed", "`LoadControl`")


def seconds_of(model: FastBertForSequenceClassification) -> dict[str, float]:
    """Measure what a batch takes at speed 0, beside its tokens and for each of them: a line through medians."""
    generator, medians = torch.Generator().manual_seed(0), []
    for size in SIZES:
        texts = max(1, size // int(MEAN_TOKENS))
        lengths = [size // texts] * texts
        rows = [{"input_ids": torch.randint(1000, 20_000, (own,), generator=generator).tolist()} for own in lengths]
        seconds = []
        for _ in range(TURNS):
            start = time.perf_counter()
            list(model.predict(rows, speed=0.0))
            seconds.append(time.perf_counter() - start)
        medians.append((sum(lengths), median(seconds)))
    tokens, taken = np.array(medians).T
    per_token, per_batch = np.polyfit(tokens, taken, 1)
    return {"seconds_per_batch": max(float(per_batch), 0.0), "seconds_per_token": float(per_token)}


def machine_of(
    model: FastBertForSequenceClassification, data_dir: Path, times: dict[str, float], time_to_answer: float
) -> Machine:
    """Return what answers, with what the speeds of the calibration give and cost on test."""
    splits, _, _ = distilled_runs.load("sst2", data_dir)
    assert not model.config.calibration.get("linear"), "the machine's speeds are thresholds"
    speeds = model.config.calibration["speeds"]
    table = sweep_speeds(model, record_exits(model, splits["test"], progress=False), speeds)
    costs = np.minimum.accumulate((table["executed_flops"] / table["executed_flops"].iloc[0]).to_numpy())
    return Machine(np.array(speeds), costs, table["accuracy"].to_numpy(), **times, time_to_answer=time_to_answer)


def run(machine: Machine, model: FastBertForSequenceClassification, speed: float, seeds: int) -> dict:
    """Return what every policy gives, on average over the draws, and of the first draw what happened when."""
    times = (machine.seconds_per_batch, machine.seconds_per_token, machine.time_to_answer)
    policies = {
        "the normal speed, nothing refused": lambda: Fixed(machine, speed, refuses=False),
        "the normal speed": lambda: Fixed(machine, speed),
        "the greatest speed": lambda: Fixed(machine, machine.speeds[-1]),
        "AIMD": lambda: Aimd(machine, speed),
        "PI": lambda: Pi(machine, speed),
        "`LoadControl`": lambda: LoadControl.of_config(model.config, *times, speed=speed),
    }
    found: dict[str, list[dict]] = {name: [] for name in policies}
    best, drawn = [], {}
    for seed in range(seeds):
        texts = arrivals(list(PHASES), machine.tokens_per_second(speed), seed, MEAN_TOKENS)
        oracle = clairvoyant(machine, texts, speed)
        in_burst = (texts.times >= BURST[0]) & (texts.times < BURST[1])
        best.append(
            {
                "accuracy": weighted(oracle, texts),
                "refused": weighted(oracle == 0, texts),
                "accuracy_in_burst": weighted(oracle, texts, in_burst),
            }
        )
        for name, policy in policies.items():
            served = simulate(machine, policy(), texts, seed)
            found[name].append(summary(machine, texts, served, BURST, speed))
            if seed == 0 and name in DRAWN:
                drawn[name] = over_time(machine, texts, served)
    rows = {name: {key: mean(own[key] for own in of) for key in of[0]} for name, of in found.items()}
    rows["who knows the future"] = {"in_time": 1.0, **{key: mean(own[key] for own in best) for key in best[0]}}
    fast, oracle = rows["the greatest speed"]["accuracy"], rows["who knows the future"]["accuracy"]
    for row in rows.values():
        row["recovered"] = (row["accuracy"] - fast) / (oracle - fast) if oracle > fast else 0.0
    return {"speed": speed, "tokens_per_second": machine.tokens_per_second(speed), "rows": rows, "drawn": drawn}


def over_time(machine: Machine, texts, served) -> dict[str, list[float]]:
    """Return the accuracy over all that arrived, and the longest wait, of each quarter of a second."""
    edges = np.arange(0.0, texts.times[-1], SECONDS_DRAWN)
    place = np.digitize(texts.times, edges) - 1
    waited = served.ends - texts.times
    in_time = np.nan_to_num(waited, nan=np.inf) <= machine.time_to_answer
    accuracies = np.interp(np.nan_to_num(served.speeds), machine.speeds, machine.accuracies) * in_time
    arrived = np.maximum(np.bincount(place, texts.tokens, len(edges)), 1)
    longest = np.zeros(len(edges))
    np.maximum.at(longest, place, np.nan_to_num(waited))
    return {
        "seconds": edges.round(3).tolist(),
        "accuracy": (np.bincount(place, accuracies * texts.tokens, len(edges)) / arrived).round(4).tolist(),
        "longest_wait": longest.round(4).tolist(),
    }


def measure(data_dir: Path, time_to_answer: float, seeds: int) -> dict:
    """Measure the machine and the package's model, and run every policy at two normal speeds."""
    torch.set_num_threads(1)  # as one of several replicas has
    model = FastBertForSequenceClassification.from_pretrained(DEFAULT_MODEL_DIR).eval()
    times = seconds_of(model)
    machine = machine_of(model, data_dir, times, time_to_answer)
    return {
        "settings": {
            **times,
            **rivals_measures.machine(),
            "time_to_answer": time_to_answer,
            "seeds": seeds,
            "phases": PHASES,
            "mean_tokens": MEAN_TOKENS,
        },
        "runs": [run(machine, model, speed, seeds) for speed in (0.0, model.config.speed)],
    }
