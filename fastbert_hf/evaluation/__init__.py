"""
What a speed costs and gives: records of every exit, replay, FLOPs, the choice of a speed, sweeps, metrics, figures.

Tables, metrics and figures need an extra: `pip install "fastbert-hf[evaluation]"`.
"""

from importlib import import_module
from typing import Any

from .exit_record import ExitRecord, record_exits
from .flops import executed_flops, paper_flops
from .replay import Replay, exit_uncertainties, replay, replay_at_speed, speed_thresholds
from .speed_choice import SpeedChoice, choose_speed


# Loaded when they are asked for, as they need the extra.
_SWEEPS = ("at_speed_up", "load_table", "save_table", "sweep_depths", "sweep_speeds", "time_speeds")
_RELIABILITY = ("reliability", "reliability_error")
_LATER = {**dict.fromkeys(_SWEEPS, "speed_sweep"), **dict.fromkeys(_RELIABILITY, "reliability_tables")}

__all__ = [
    "ExitRecord",
    "Replay",
    "SpeedChoice",
    "at_speed_up",
    "choose_speed",
    "executed_flops",
    "exit_uncertainties",
    "load_table",
    "paper_flops",
    "record_exits",
    "reliability",
    "reliability_error",
    "replay",
    "replay_at_speed",
    "save_table",
    "speed_thresholds",
    "sweep_depths",
    "sweep_speeds",
    "time_speeds",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)
