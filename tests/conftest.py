"""
No test reaches for a hub, and none spreads tiny matrices over several threads, which only costs time. So does looking
for garbage among all that is imported, here and in the processes that tests start.
"""

import gc
import os
import tempfile
from pathlib import Path

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where single files take up to a minute. They go first: one that began as the last would keep all workers waiting.
SLOW_FOLDERS = ("benchmarks", "commands", "engines", "examples", "serving", "sharing", "training")
SLOW_FILES = ("test_default_model.py", "test_hub.py", "test_operators.py", "test_readme.py")

# How many new objects let Python look for garbage, and how often it looks among old ones.
GARBAGE = (100_000, 50, 50)
# What every Python process runs first. Imports take a quarter less, and the end of a process a second less.
SITE_CUSTOMIZE = f"""
import atexit, gc
gc.set_threshold(*{GARBAGE})
atexit.register(gc.freeze)
"""
gc.set_threshold(*GARBAGE)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker of xdist has the environment of its parent
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        Path(folder.name, "sitecustomize.py").write_text(SITE_CUSTOMIZE)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = folder.name if not before else folder.name + os.pathsep + before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in SLOW_FOLDERS and item.path.name not in SLOW_FILES)


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Every training collects garbage; among all that is imported, that would take longer than the training."""
    gc.freeze()
    yield
    gc.collect()  # what the tests of this file left
    gc.unfreeze()


@pytest.fixture(scope="session")
def quick_export():
    """For tests that export: the operators of PyTorch's exporter are read once, not for every graph."""
    from .common import read_operators_once  # with PyTorch, which is imported under the settings above

    read_operators_once()
