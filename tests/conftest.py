"""No test reaches for a hub, and none spreads tiny matrices over several threads, which only costs time."""

import gc
import os

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where single files take up to a minute. They go first: one that began as the last would keep all workers waiting.
SLOW_FOLDERS = ("benchmarks", "commands", "engines", "examples", "sharing", "training")
SLOW_FILES = ("test_readme.py", "test_operators.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in SLOW_FOLDERS and item.path.name not in SLOW_FILES)


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Every training collects garbage; among all that is imported, that would take longer than the training."""
    gc.freeze()
    yield
    gc.unfreeze()
