"""What a pipeline has answered so far, as counts: where texts left, and how sure their exits were."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from threading import Lock
from typing import Any, NamedTuple

from .dial_checks import GRID


# Of thresholds beyond these, nothing is counted.
MOST_THRESHOLDS = 64


class Served(NamedTuple):
    """What is counted of an answer."""

    threshold: float
    exit_member: int
    exit_layer: int  # layers of all members
    code: int  # of the uncertainty


class Place(NamedTuple):
    """Where a text left, and how sure the exit was."""

    exit_member: int
    exit_layer: int
    code: int


def uncertainty_code(uncertainty: float) -> int:
    """Return the number of speeds of `GRID` that an uncertainty is not below."""
    return bisect_right(GRID, uncertainty)


class ServedAnswers:
    """Counts of answers. Threads may share it."""

    def __init__(self):
        self.counts: Counter[Served] = Counter()
        self.thresholds: set[float] = set()
        self.looks = 0
        self.reference: str | None = None
        self._lock = Lock()

    def add(self, threshold: float, answers: list[Any], reference: str | None = None) -> None:
        """
        Count some answers, each with `exit_member`, `exit_layer` and `uncertainty`. What was counted beside another
        reference, of an older certificate, is forgotten.
        """
        found = Counter(
            Served(threshold, answer.exit_member, answer.exit_layer, uncertainty_code(answer.uncertainty))
            for answer in answers
        )
        with self._lock:
            if reference != self.reference:
                if self.reference is not None:
                    self._clear()
                self.reference = reference
            if threshold in self.thresholds or len(self.thresholds) < MOST_THRESHOLDS:
                self.thresholds.add(threshold)
                self.counts.update(found)

    def look(self) -> tuple[dict[Served, int], int]:
        """Return the counts so far, and how often they were looked at, this time included."""
        with self._lock:
            self.looks += 1
            return dict(self.counts), self.looks

    def forget(self) -> None:
        """Begin anew."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self.counts.clear()
        self.thresholds.clear()
        self.looks = 0

    def __getstate__(self) -> dict[str, Any]:  # locks cannot be copied
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())
