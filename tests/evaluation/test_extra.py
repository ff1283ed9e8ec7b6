"""Who serves, trains or records needs nothing of the extra `evaluation`; who asks for more learns its name."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastbert_hf.evaluation


NEED_EXTRA = (
    "from fastbert_hf.evaluation import sweep_speeds",
    "fastbert_hf.evaluation.load_table",
    "from fastbert_hf.evaluation.speed_sweep import SPEEDS",
    "from fastbert_hf.evaluation import figures",
    "import fastbert_hf.evaluation.metrics",
)
WITHOUT_EXTRA = f"""
import sys
sys.modules.update(dict.fromkeys(["datasets", "evaluate", "matplotlib", "pandas", "sklearn"]))
import fastbert_hf.training
from fastbert_hf import choose_speed
from fastbert_hf.evaluation import ExitRecord, executed_flops, paper_flops, record_exits, replay, replay_at_speed
for code in {NEED_EXTRA}:
    try:
        exec(code)
    except ImportError as error:
        print(error)
"""
WITH_EXTRA = """
import sys, fastbert_hf.evaluation
print([name for name in ("matplotlib", "evaluate", "sklearn") if name in sys.modules])
import fastbert_hf.evaluation.speed_sweep
print([name for name in ("matplotlib.figure", "evaluate") if name in sys.modules])
"""


def printed_by(code: str) -> list[str]:
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout.splitlines()


def test_training_and_records_need_no_extra_and_the_rest_says_what_to_install():
    message = 'fastbert_hf.evaluation needs its extra: pip install "fastbert-hf[evaluation]"'
    assert printed_by(WITHOUT_EXTRA) == [message] * len(NEED_EXTRA)


def test_tables_drawing_and_metrics_are_loaded_when_they_are_asked_for():
    assert printed_by(WITH_EXTRA) == ["[]", "[]"]


def test_every_name_is_there_and_no_other():
    assert all(hasattr(fastbert_hf.evaluation, name) for name in fastbert_hf.evaluation.__all__)
    with pytest.raises(AttributeError, match=r"module 'fastbert_hf\.evaluation' has no attribute 'sweep_cascade'"):
        getattr(fastbert_hf.evaluation, "sweep_cascade")  # noqa: B009
