"""Who serves or trains a model needs nothing of the extra `evaluation`; who evaluates without it learns its name."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_package_and_its_trainer_load_no_evaluation():
    outcome = run("import sys, fastbert_hf, fastbert_hf.training; print('fastbert_hf.evaluation' in sys.modules)")
    assert outcome.stdout.strip() == "False", outcome.stderr


def test_evaluation_without_its_extra_says_what_to_install():
    outcome = run(
        "import sys; sys.modules.update(dict.fromkeys(['pandas', 'sklearn'])); import fastbert_hf.evaluation"
    )
    assert outcome.returncode == 1
    assert (
        'ImportError: fastbert_hf.evaluation needs its extra: pip install "fastbert-hf[evaluation]"' in outcome.stderr
    )


def test_evaluation_loads_no_drawing_until_it_is_asked():
    names = "('matplotlib.figure', 'evaluate')"
    outcome = run(f"import sys, fastbert_hf.evaluation; print([name for name in {names} if name in sys.modules])")
    assert outcome.stdout.strip() == "[]", outcome.stderr
