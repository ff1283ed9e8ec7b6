"""What is in the wheel: the package and its default model, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .common import DEFAULT_MODEL_FILES


ROOT = Path(__file__).parent.parent
NEEDED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "fastbert_hf_cli.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that neither this folder nor what lies in it leaves a trace."""
    source = tmp_path_factory.mktemp("source")
    for name in ("fastbert_hf", "tests", "examples", "benchmarks", "model_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "outputs"))
    for name in NEEDED:
        shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    # What pip calls to build a wheel, without what it takes to start pip.
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(target)!r})"
    finished = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as content:
        return set(content.namelist())


def test_the_wheel_is_under_50_megabytes(wheel):
    assert wheel.stat().st_size < 50e6


def test_every_module_is_in_the_wheel(names):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastbert_hf").rglob("*.py")}
    assert modules and {name for name in names if name.endswith(".py")} == {*modules, "fastbert_hf_cli.py"}


def test_the_default_model_is_in_the_wheel_as_it_is_here(wheel):
    with zipfile.ZipFile(wheel) as content:
        for name in DEFAULT_MODEL_FILES:
            there = content.read(f"fastbert_hf/default_model/{name}")
            assert there == (ROOT / "fastbert_hf" / "default_model" / name).read_bytes()


def test_nothing_else_is_in_the_wheel(names):
    metadata = {name for name in names if re.match(r"fastbert_hf-[\w.]+\.dist-info/", name)}
    files = {"METADATA", "WHEEL", "RECORD", "top_level.txt", "LICENSE", "entry_points.txt"}
    assert {Path(name).name for name in metadata} == files
    others = {name for name in names - metadata if not name.endswith(".py")}
    expected = {f"fastbert_hf/default_model/{name}" for name in DEFAULT_MODEL_FILES}
    assert others == {
        *expected,
        "fastbert_hf/py.typed",
        "fastbert_hf/operators/operators.cpp",
        "fastbert_hf/sharing/model_card_template.md",
    }
