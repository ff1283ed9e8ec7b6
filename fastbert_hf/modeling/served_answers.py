"""What a pipeline has answered so far, as counts: where texts left, and how sure their exits were."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from threading import Lock
from typing import Any, NamedTuple

from .dial_checks import GRID


class Served(NamedTuple):
    """What is counted of an answer."""

    threshold: float
    exit_member: int
    exit_layer: int  # layers of all members
    code: int  # speeds of GRID that the uncertainty is not below


class ServedAnswers:
    """Counts of answers. Threads may share it."""

    def __init__(self):
        self.counts: Counter[Served] = Counter()
        self.looks = 0
        self._lock = Lock()

    def add(self, threshold: float, answers: list[Any]) -> None:
        """Count some answers, each with `exit_member`, `exit_layer` and `uncertainty`."""
        found = Counter(
            Served(threshold, answer.exit_member, answer.exit_layer, bisect_right(GRID, answer.uncertainty))
            for answer in answers
        )
        with self._lock:
            self.counts.update(found)

    def look(self) -> tuple[dict[Served, int], int]:
        """Return the counts so far, and how often they were looked at, this time included."""
        with self._lock:
            self.looks += 1
            return dict(self.counts), self.looks

    def forget(self) -> None:
        """Begin anew."""
        with self._lock:
            self.counts.clear()
            self.looks = 0

    def __getstate__(self) -> dict[str, Any]:  # locks cannot be copied
        return {"counts": self.counts, "looks": self.looks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())
