"""What a speed costs and gives: FLOPs, sweeps, metrics and figures (`pip install fastbert-hf[evaluation]`)."""

try:
    import pandas  # noqa: F401
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError('fastbert_hf.evaluation needs its extra: pip install "fastbert-hf[evaluation]"') from error

from .cascade_sweep import record_members, sweep_cascade
from .exit_record import ExitRecord, record_exits
from .flops import executed_flops, paper_flops
from .speed_sweep import at_speed_up, load_table, save_table, sweep_depths, sweep_speeds, time_speeds


__all__ = [
    "ExitRecord",
    "at_speed_up",
    "executed_flops",
    "load_table",
    "paper_flops",
    "record_exits",
    "record_members",
    "save_table",
    "sweep_cascade",
    "sweep_depths",
    "sweep_speeds",
    "time_speeds",
]
