"""The times of models with exits at the points of their frontiers, taken in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch
from frontiers import LOST, cheapest
from serving_runs import in_turn, ratios

from fastbert_hf import FastBertForSequenceClassification


def take_times(
    models: Mapping[str, FastBertForSequenceClassification],
    sweeps: Mapping[str, dict],
    full: str,
    rows: list[dict[str, list[int]]],
    repeats: int = 5,
) -> dict:
    """
    Time rows through `predict`, at full depth and at the cheapest speeds that lose little.

    Args:
        models (`Mapping`), sweeps (`Mapping`): The models and what their speeds give, by the same names.
        full (`str`): The name of the full model.
        rows (`list` of `dict`): Tokens.
        repeats (`int`): Turns.
    """

    def answer(model: FastBertForSequenceClassification, speed: float) -> list:
        return list(model.predict(rows, speed=speed))

    sides: dict[str, Callable[[], object]] = {}
    about = {}
    for name, model in models.items():
        sides[f"{name}, speed 0"] = partial(answer, model, 0.0)
        about[f"{name}, speed 0"] = {"model": name, "speed": 0.0}
        for part in ("dev", "test"):
            for lost in LOST:
                point = cheapest(sweeps[full], sweeps[name], lost, part)
                if point is not None:
                    side = f"{name}, {lost} on {part}"
                    sides[side] = partial(answer, model, point["speed"])
                    about[side] = {"model": name, "allowed": lost, "part": part, **point}
    seconds = in_turn(sides, repeats, "frontier")
    whole = seconds[f"{full}, speed 0"]
    found = [{**about[side], **ratios(whole, own), "seconds": median(own)} for side, own in seconds.items()]
    return {
        "rows": found,
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
