"""No test reaches for a hub, and none spreads tiny matrices over several threads, which only costs time."""

import gc
import os

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Every training collects garbage; among all that is imported, that would take longer than the training."""
    gc.freeze()
    yield
    gc.unfreeze()
