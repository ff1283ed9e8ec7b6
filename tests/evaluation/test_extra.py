"""What of the extra `evaluation` is loaded when. What is done without it: `tests/test_registration.py`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastbert_hf.evaluation


WITH_EXTRA = """
import sys, fastbert_hf.evaluation
print([name for name in ("matplotlib", "evaluate", "sklearn") if name in sys.modules])
import fastbert_hf.evaluation.speed_sweep
print([name for name in ("matplotlib.figure", "evaluate") if name in sys.modules])
"""


def test_tables_drawing_and_metrics_are_loaded_when_they_are_asked_for():
    outcome = subprocess.run([sys.executable, "-c", WITH_EXTRA], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.splitlines() == ["[]", "[]"]


def test_every_name_is_there_and_no_other():
    assert all(hasattr(fastbert_hf.evaluation, name) for name in fastbert_hf.evaluation.__all__)
    with pytest.raises(AttributeError, match=r"module 'fastbert_hf\.evaluation' has no attribute 'sweep_cascade'"):
        getattr(fastbert_hf.evaluation, "sweep_cascade")  # noqa: B009
