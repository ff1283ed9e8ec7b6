"""Answer faster instead of letting a queue grow: the speed of each batch, and which texts are refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
from transformers import PreTrainedConfig

from ..modeling.dial_checks import HOW
from ..modeling.dials import is_linear, linear_speeds


# What the last batch counts for in the mean of how long batches take (a mean of about the last ten).
NEWEST = 0.1
# So many mean deviations above the mean, a batch hardly ever is (as TCP waits for an answer, RFC 6298, with four).
DEVIATIONS = 2.0
# A batch that took longer than so many times what was expected, as one during which the machine stood still, counts as
# that.
LONGEST = 4.0
# For so many times to answer after a text was refused, more of them are expected.
REFUSING = 5.0


def speeds_and_costs(config: PreTrainedConfig) -> tuple[list[float], list[float]]:
    """
    Return the speeds of a calibrated model in ascending order, and what each costs as a share of speed 0.

    Raises:
        ValueError: If the model was not calibrated.
    """
    if config.calibration is None:
        raise ValueError(f"a speed that follows the load needs to know what speeds cost, calibrate once: {HOW}")
    calibration = config.calibration
    speeds = linear_speeds(calibration) if is_linear(config) else calibration["speeds"]
    # Of points that are one speed to a call, the last is what it is answered at.
    cheapest = dict(zip(speeds, calibration["speed_ups"], strict=True))
    return list(cheapest), [1 / speed_up for speed_up in cheapest.values()]


class LoadControl:
    r"""
    Choose before each batch how long it is, and the lowest speed at which every text that waits is answered in time.
    Where even the greatest speed would not do, a new text is refused before it waits. It is arithmetic alone: there is
    no clock, no queue and no thread in it.

    A batch of T tokens at a speed that costs the share c of speed 0 is expected to take
    \\( k (b + T c s) \\) seconds, where k follows what batches took ([`observe`]). All texts that wait are laid out
    in batches, the earliest deadline first, and the speed is the lowest at which each batch ends before the first of
    its deadlines. For a while after a text was refused it is the greatest.

    Args:
        speeds (`Sequence[float]`): In ascending order: those that may be chosen.
        costs (`Sequence[float]`): What each costs, as a share of speed 0, on average over many texts.
        seconds_per_batch (`float`): b, what a batch takes beside its tokens.
        seconds_per_token (`float`): s, of a token at speed 0.
        time_to_answer (`float`): Seconds from the arrival of a text to its answer, as was promised.
        speed (`float`): Where nothing waits. The lowest of `speeds` unless given.
        max_speed (`float`): Never beyond it. The greatest of `speeds` unless given.
        most_tokens (`int`): Of a batch without its last text.
        batch_share (`float`): The part of the time to answer that a batch may take, as a new text has to wait for it.
        reserve (`float`): The part of the time to answer that is kept free for what was not foreseen.
        servers (`int`): How many answer at the same time, each a batch of its own. It may be set anew at any time.

    Raises:
        ValueError: If a number is out of its range, or a cost is greater than that of a lower speed.
    """

    def __init__(
        self,
        speeds: Sequence[float],
        costs: Sequence[float],
        seconds_per_batch: float,
        seconds_per_token: float,
        time_to_answer: float,
        speed: float | None = None,
        max_speed: float | None = None,
        most_tokens: int = 1024,
        batch_share: float = 0.25,
        reserve: float = 0.1,
        servers: int = 1,
    ):
        speeds, costs = np.asarray(speeds, dtype=float), np.asarray(costs, dtype=float)
        if not len(speeds) or speeds.shape != costs.shape or not (np.diff(speeds) > 0).all():
            raise ValueError(
                f"speeds must be numbers in ascending order with a cost for each, got speeds={speeds}, costs={costs}"
            )
        if not (0 < costs).all() or not (np.diff(costs) <= 0).all():
            raise ValueError(f"costs must be above 0, and none greater than that of a lower speed, got {costs}")
        for name, value in (("seconds_per_token", seconds_per_token), ("time_to_answer", time_to_answer)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {value!r}: {name}=0.1")
        if not 0 <= seconds_per_batch < math.inf:
            raise ValueError(f"seconds_per_batch must be a number from 0 on, got {seconds_per_batch!r}: 0.005")
        if not 0 < batch_share <= 1 or not 0 <= reserve < 1 or most_tokens < 1:
            raise ValueError(
                "batch_share must be above 0 and at most 1, reserve from 0 to below 1, most_tokens at least 1, got "
                f"{batch_share!r}, {reserve!r} and {most_tokens!r}: batch_share=0.25, reserve=0.1, most_tokens=1024"
            )
        speed, max_speed = speeds[0] if speed is None else speed, speeds[-1] if max_speed is None else max_speed
        if not speeds[0] <= speed <= max_speed <= speeds[-1]:
            raise ValueError(
                f"speed and max_speed must be in [{speeds[0]:g}, {speeds[-1]:g}], and speed not above max_speed, got "
                f"{speed!r} and {max_speed!r}"
            )
        chosen = np.unique([speed, *speeds[(speed < speeds) & (speeds < max_speed)], max_speed])
        self.speeds, self.costs = chosen, np.interp(chosen, speeds, costs)
        self.seconds_per_batch, self.seconds_per_token = seconds_per_batch, seconds_per_token
        self.time_to_answer, self.most_tokens = time_to_answer, most_tokens
        self.batch_share, self.reserve, self.servers = batch_share, reserve, servers
        # How many times longer than expected batches take, and how much that differs.
        self.ratio, self.deviation = 1.0, 0.0
        self.refused_at = -math.inf

    @classmethod
    def of_config(cls, config: PreTrainedConfig, *args, **kwargs) -> Self:
        """
        Return one that chooses among the speeds of a calibrated model; the other arguments are those of the class.

        Raises:
            ValueError: If the model was not calibrated.
        """
        return cls(*speeds_and_costs(config), *args, **kwargs)

    def seconds(self, batches: int | np.ndarray, tokens: int | np.ndarray, cost: float) -> float | np.ndarray:
        """Return how long batches with so many tokens in all will take at a cost, on the safe side."""
        expected = batches * self.seconds_per_batch + tokens * cost * self.seconds_per_token
        return (self.ratio + DEVIATIONS * self.deviation) * expected

    def seconds_of(self, tokens: int, speed: float) -> float:
        """Return how long a batch of so many tokens will take at a speed, on the safe side."""
        return float(self.seconds(1, tokens, np.interp(speed, self.speeds, self.costs)))

    def tokens_of_batch(self, cost: float) -> int:
        """
        Return how many tokens a batch should have at a cost: it takes a part of the time to answer, but at least as
        long for its tokens as it takes without any.
        """
        without = self.seconds(1, 0, cost)
        left = max(self.batch_share * self.time_to_answer - without, without)
        return max(1, min(self.most_tokens, int(left / self.seconds(0, 1, cost))))

    def next_batch(self, now: float, deadlines: Sequence[float], tokens: Sequence[int]) -> tuple[int, float]:
        """
        Return how many of the texts that wait make the next batch, and its speed.

        Args:
            now (`float`): Seconds on a clock that only goes on (`time.monotonic`), when the batch will start.
            deadlines (`Sequence[float]`): Of the texts that wait, on the same clock, in ascending order.
            tokens (`Sequence[int]`): Of each.
        """
        if not len(tokens):
            return 0, float(self.speeds[0])
        time_left = np.asarray(deadlines, dtype=float) - now - self.reserve * self.time_to_answer
        tokens = np.asarray(tokens)
        fastest = len(self.speeds) - 1
        # Those that are late at any speed are nobody's measure.
        in_time = self.ends(fastest, tokens) <= time_left
        # While texts are refused, what time is left is better given to them than to those that wait.
        is_refusing = 0 <= now - self.refused_at < REFUSING * self.time_to_answer
        # The speeds from `high` on are fast enough, or there is none.
        low, high = fastest if is_refusing or not in_time.any() else 0, fastest
        while low < high:
            middle = (low + high) // 2
            is_fast_enough = (self.ends(middle, tokens) <= time_left)[in_time].all()
            low, high = (low, middle) if is_fast_enough else (middle + 1, high)
        # The text that fills a batch is its last, so that as few batches are needed as if all were full to the token.
        number = int(np.searchsorted(np.cumsum(tokens), self.tokens_of_batch(self.costs[high]))) + 1
        return min(number, len(tokens)), float(self.speeds[high])

    def ends(self, place: int, tokens: np.ndarray) -> np.ndarray:
        """Return in how many seconds each text is answered at one of the speeds, batch by batch."""
        cost, up_to = self.costs[place], np.cumsum(tokens)
        size = self.tokens_of_batch(cost)
        batches = (up_to - tokens) // size
        # Of the batches before it, each server answers as many as the others.
        rounds = batches // self.servers + 1
        filled = np.minimum(np.maximum((batches + 1) * size, up_to), up_to[-1])
        return self.seconds(rounds, np.maximum(filled - (batches + 1 - rounds) * size, tokens), cost)

    def seconds_late(self, now: float, free_at: float, waiting: int, tokens: int, deadline: float) -> float:
        """
        Return by how many seconds a new text would miss its deadline if all were answered at the greatest speed. It is
        refused if that is above 0, and may come again after so many seconds. Its deadline is to be the latest, as it
        is where all texts have the same time to be answered.

        Args:
            now, free_at, deadline (`float`):
                On one clock: `free_at` is when the first of the batches that run ends (`seconds_of`).
            waiting, tokens (`int`): Tokens of those that wait already; of the new text.
        """
        cost, latest = self.costs[-1], deadline - self.reserve * self.time_to_answer
        size = self.tokens_of_batch(cost)
        batches = waiting // size
        rounds = batches // self.servers + 1
        # Those that come after it fill its batch.
        filled = max((batches + 1) * size, waiting + tokens) - (batches + 1 - rounds) * size
        late = max(now, free_at) + self.seconds(rounds, filled, cost) - latest
        if late > 0 and now + self.seconds(1, tokens, cost) <= latest:  # and not because of what it is
            self.refused_at = now
        if late > 0 and not waiting and free_at <= now:
            # Nothing is at work, so nothing would ever tell that batches do not take so long any more.
            self.learn(1.0)
        return float(late)

    def observe(self, tokens: int, speed: float, seconds: float) -> None:
        """Learn from how long a batch took. What is no time, or no batch, is left out."""
        if tokens > 0 and 0 < seconds < math.inf and math.isfinite(speed):
            cost = float(np.interp(speed, self.speeds, self.costs))
            self.learn(seconds / (self.seconds_per_batch + tokens * cost * self.seconds_per_token))

    def learn(self, ratio: float) -> None:
        """Follow how many times longer than expected batches take."""
        ratio = min(ratio, LONGEST * self.ratio)
        self.deviation += NEWEST * (abs(ratio - self.ratio) - self.deviation)
        self.ratio += NEWEST * (ratio - self.ratio)
