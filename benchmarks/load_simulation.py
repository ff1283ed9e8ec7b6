"""A server on a virtual clock: texts arrive whether or not it keeps up, and a policy chooses batches and speeds."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fastbert_hf.serving import LoadControl


# Of the time that a batch takes: lognormal, with this deviation.
NOISE = 0.05


class Policy(Protocol):
    """What a server asks: [`fastbert_hf.serving.LoadControl`] is one."""

    def next_batch(self, now: float, deadlines: list[float], tokens: list[int]) -> tuple[int, float]: ...

    def seconds_late(self, now: float, free_at: float, waiting: int, tokens: int, deadline: float) -> float: ...

    def observe(self, tokens: int, speed: float, seconds: float) -> None: ...


@dataclass(frozen=True)
class Machine:
    """
    What answers texts, in truth; a policy has to find out.

    Args:
        speeds, costs, accuracies (`np.ndarray`): What each speed costs, as a share of speed 0, and what it gives.
        seconds_per_batch, seconds_per_token (`float`): At speed 0.
        time_to_answer (`float`): What was promised.
        most_tokens (`int`): Of a batch.
    """

    speeds: np.ndarray
    costs: np.ndarray
    accuracies: np.ndarray
    seconds_per_batch: float
    seconds_per_token: float
    time_to_answer: float
    most_tokens: int = 1024

    def cost(self, speed: float) -> float:
        return float(np.interp(speed, self.speeds, self.costs))

    def accuracy(self, speed: float) -> float:
        return float(np.interp(speed, self.speeds, self.accuracies))

    def tokens_per_second(self, speed: float) -> float:
        """Return how many tokens are answered in a second where there is always a full batch."""
        of_token = self.seconds_per_batch / self.most_tokens + self.seconds_per_token * self.cost(speed)
        return 1 / of_token

    def control(self, **settings) -> LoadControl:
        """Return what chooses among its speeds, with its times known."""
        times = (self.seconds_per_batch, self.seconds_per_token, self.time_to_answer)
        return LoadControl(self.speeds, self.costs, *times, most_tokens=self.most_tokens, **settings)


@dataclass(frozen=True)
class Arrivals:
    """When texts arrive, in seconds, and how many tokens each has."""

    times: np.ndarray
    tokens: np.ndarray


def arrivals(
    phases: list[tuple[float, float]], tokens_per_second: float, seed: int = 0, mean_tokens: float = 25.0
) -> Arrivals:
    """
    Draw texts that arrive independently of each other (Poisson).

    Args:
        phases (`list` of pairs): For so many seconds, so many times the capacity.
        tokens_per_second (`float`): The capacity.
    """
    generator, times, start = np.random.default_rng(seed), [], 0.0
    for seconds, load in phases:
        number = generator.poisson(seconds * load * tokens_per_second / mean_tokens)
        times.append(start + np.sort(generator.random(number)) * seconds)
        start += seconds
    times = np.concatenate(times)
    # A gamma distribution is about as skewed as the lengths of sentences are.
    tokens = np.clip(np.rint(generator.gamma(4.0, mean_tokens / 4.0, len(times))), 3, 128).astype(int)
    return Arrivals(times, tokens)


@dataclass
class Served:
    """What became of each text, as arrays: NaN where it was refused."""

    ends: np.ndarray
    speeds: np.ndarray
    batches: list[tuple[float, float]] = field(default_factory=list)  # when each began, and its speed


def simulate(machine: Machine, policy: Policy, texts: Arrivals, seed: int = 0) -> Served:
    """Let a policy serve texts, one batch at a time."""
    generator, number = np.random.default_rng(seed), len(texts.times)
    served = Served(np.full(number, np.nan), np.full(number, np.nan))
    times, tokens = texts.times.tolist(), texts.tokens.tolist()
    queue: deque[int] = deque()
    free_at, waiting, following = 0.0, 0, 0

    def arrive(until: float) -> None:
        nonlocal waiting, following
        while following < number and times[following] <= until:
            own, now = tokens[following], times[following]
            if policy.seconds_late(now, free_at, waiting, own, now + machine.time_to_answer) <= 0:
                queue.append(following)
                waiting += own
            following += 1

    while following < number or queue:
        if not queue:
            arrive(times[following])
            continue
        now = max(free_at, times[queue[0]])
        deadlines = [times[text] + machine.time_to_answer for text in queue]
        chosen, speed = policy.next_batch(now, deadlines, [tokens[text] for text in queue])
        batch = [queue.popleft() for _ in range(chosen)]
        size = sum(tokens[text] for text in batch)
        expected = machine.seconds_per_batch + size * machine.cost(speed) * machine.seconds_per_token
        seconds = expected * generator.lognormal(0.0, NOISE)
        free_at, waiting = now + expected, waiting - size  # nobody knows how long it will take
        served.ends[batch], served.speeds[batch] = now + seconds, speed
        served.batches.append((now, speed))
        arrive(now + seconds)  # while it runs
        free_at = now + seconds
        policy.observe(size, speed, seconds)
    return served


class Fixed:
    """
    One speed whatever comes. Refuses what it could not answer in time, or nothing.

    Args:
        machine ([`Machine`]), speed (`float`): Where it runs, and how.
        refuses (`bool`): Otherwise the queue grows.
    """

    def __init__(self, machine: Machine, speed: float, refuses: bool = True):
        self.control, self.refuses = machine.control(speed=speed, max_speed=speed), refuses
        self.next_batch, self.observe = self.control.next_batch, self.control.observe

    def seconds_late(self, *asked) -> float:
        return self.control.seconds_late(*asked) if self.refuses else 0.0


class Feedback:
    """
    Moves the cost by how long the oldest text has waited; refuses as [`LoadControl`] does.

    Args:
        machine ([`Machine`]): Where it runs.
        target (`float`): The part of the time to answer that the oldest text of a batch should have waited.
    """

    def __init__(self, machine: Machine, speed: float, target: float):
        self.machine, self.target = machine, target
        self.control = machine.control(speed=speed)
        self.seconds_late, self.observe = self.control.seconds_late, self.control.observe
        self.most, self.least = self.control.costs[0], self.control.costs[-1]
        self.cost = self.most

    def next_batch(self, now: float, deadlines: list[float], tokens: list[int]) -> tuple[int, float]:
        waited = now - (deadlines[0] - self.machine.time_to_answer)
        self.change(waited / self.machine.time_to_answer - self.target)
        size = self.control.tokens_of_batch(self.cost)
        number = bisect_left(np.cumsum(tokens).tolist(), size) + 1
        speed = np.interp(-self.cost, -self.control.costs, self.control.speeds)
        return min(number, len(tokens)), float(speed)

    def change(self, too_long: float) -> None:
        raise NotImplementedError


class Aimd(Feedback):
    """Additive increase of the cost, multiplicative decrease, as TCP does with its window."""

    def __init__(self, machine: Machine, speed: float, target: float = 0.4, step: float = 0.02, factor: float = 0.7):
        super().__init__(machine, speed, target)
        self.step, self.factor = step, factor

    def change(self, too_long: float) -> None:
        cost = self.cost * self.factor if too_long > 0 else self.cost + self.step
        self.cost = min(max(cost, self.least), self.most)


class Pi(Feedback):
    """A proportional-integral controller of the logarithm of the cost, held where it can go no further."""

    def __init__(self, machine: Machine, speed: float, target: float = 0.4, gain: float = 2.0, integral: float = 0.2):
        super().__init__(machine, speed, target)
        self.gain, self.integral, self.sum = gain, integral, 0.0

    def change(self, too_long: float) -> None:
        range_of = np.log(self.most / self.least)
        self.sum = min(max(self.sum + self.integral * too_long, 0.0), range_of)
        steps = min(max(self.sum + self.gain * too_long, 0.0), range_of)
        self.cost = self.most * np.exp(-steps)


def clairvoyant(machine: Machine, texts: Arrivals, speed: float) -> np.ndarray:
    """
    Return the accuracy of each text if everything were known beforehand, batches had no ends and every speed between
    two could be chosen: 0 where a text is refused. As few are refused as can be; the others get the costs that are
    best together, those of the shortest path between what has arrived and what is due (as a taut string).
    """
    # Its batches are full, and as long as the others'; the last text goes beyond by so much on average.
    beyond = (texts.tokens**2).sum() / (2 * texts.tokens.sum())
    sizes = np.array([machine.control().tokens_of_batch(cost) for cost in machine.costs]) + beyond
    of_token = machine.seconds_per_batch / sizes + machine.seconds_per_token * machine.costs
    fastest = 1 / of_token.min()
    found, taken, backlog, last = np.zeros(len(texts.times)), [], 0.0, 0.0
    for text, (now, tokens) in enumerate(zip(texts.times, texts.tokens, strict=True)):
        backlog = max(0.0, backlog - (now - last) * fastest)
        last = now
        if backlog <= machine.time_to_answer * fastest:  # however long it is, as long texts are not worth less
            backlog += tokens
            taken.append(text)
    rates = taut_string(texts.times[taken], texts.tokens[taken].astype(float), machine.time_to_answer)
    order = np.argsort(of_token)
    costs = np.minimum(np.interp(1 / rates, of_token[order], machine.costs[order]), machine.cost(speed))
    found[taken] = np.interp(costs, *best_accuracies(machine))
    return found


def best_accuracies(machine: Machine) -> tuple[np.ndarray, np.ndarray]:
    """Return costs in ascending order, and the best that texts can have for each on average, at one speed or two."""
    order = np.argsort(machine.costs, kind="stable")
    corners: list[tuple[float, float]] = []
    for cost, accuracy in zip(machine.costs[order], np.maximum.accumulate(machine.accuracies[order]), strict=True):
        while corners and corners[-1][0] == cost:
            corners.pop()
        while len(corners) > 1:
            (first, low), (second, middle) = corners[-2:]
            if (middle - low) * (cost - first) > (accuracy - low) * (second - first):
                break
            corners.pop()
        corners.append((cost, accuracy))
    costs, accuracies = np.array(corners).T
    return costs, accuracies


def taut_string(begins: np.ndarray, sizes: np.ndarray, time_to_answer: float) -> np.ndarray:
    """Return the tokens a second at which each text is served on the shortest path between arrival and deadline."""
    total = np.concatenate([[0.0], np.cumsum(sizes)])
    # No text is served before it came (from above), and each is by its deadline (from below).
    times = np.concatenate([begins, begins + time_to_answer])
    bounds = np.concatenate([total[:-1], total[1:]])
    is_upper = np.concatenate([np.ones(len(begins), bool), np.zeros(len(begins), bool)])
    order = np.lexsort((~is_upper, times))
    times, bounds, is_upper = times[order], bounds[order], is_upper[order]
    rates, start, at, done, place = np.empty(len(sizes)), begins[0], 0, 0.0, 0
    while done < total[-1] - 1e-6:
        least, most, corner = -np.inf, np.inf, None
        low, high = None, None
        for at in range(place, len(times)):
            span = times[at] - start
            if span <= 0:
                continue
            slope = (bounds[at] - done) / span
            if is_upper[at]:
                if slope < least:
                    corner = low
                    break
                if slope <= most:
                    most, high = slope, at
            else:
                if slope > most:
                    corner = high
                    break
                if slope >= least:
                    least, low = slope, at
        if corner is None:
            corner = low
        slope = max((bounds[corner] - done) / (times[corner] - start), 1e-9)
        first, last = np.searchsorted(total, [done + 1e-6, bounds[corner] + 1e-6])
        rates[max(first - 1, 0) : max(last - 1, 0)] = slope
        start, done = times[corner], bounds[corner]
        while place < len(times) and times[place] <= start:
            place += 1
    return rates


def weighted(values: np.ndarray, texts: Arrivals, chosen: np.ndarray | slice = slice(None)) -> float:
    """Return the mean of what texts have, or some of them, weighted by their tokens."""
    return float(np.average(values[chosen], weights=texts.tokens[chosen]))


def summary(
    machine: Machine, texts: Arrivals, served: Served, burst: tuple[float, float], speed: float
) -> dict[str, float]:
    """
    Return what a policy gave. Accuracy and what was refused are weighted by tokens: a short text is let in where a
    long one is not, which would make policies look better than the oracle that serves more.

    Args:
        burst (pair of `float`): When the greatest load begins and ends.
        speed (`float`): Where nothing waits.
    """
    taken = ~np.isnan(served.ends)
    waited = served.ends[taken] - texts.times[taken]
    in_time = np.zeros(len(taken))
    in_time[taken] = waited <= machine.time_to_answer
    accuracies = np.interp(np.nan_to_num(served.speeds), machine.speeds, machine.accuracies) * in_time
    in_burst = (texts.times >= burst[0]) & (texts.times < burst[1])
    begins, speeds = np.array(served.batches).reshape(-1, 2).T
    costs = np.interp(speeds, machine.speeds, machine.costs)
    most, least = machine.cost(speed), machine.costs[-1]
    slow_again = begins[(begins >= burst[1]) & (costs >= most - 0.05 * (most - least))]
    steady = (begins >= burst[0]) & (begins < burst[1])
    return {
        "in_time": float(in_time[taken].mean()) if taken.any() else 0.0,
        "p99": float(np.quantile(waited, 0.99)) if taken.any() else 0.0,
        "refused": weighted(~taken, texts),
        "accuracy": weighted(accuracies, texts),
        "accuracy_in_burst": weighted(accuracies, texts, in_burst),
        "recovery": float(slow_again[0] - burst[1]) if len(slow_again) else float("inf"),
        "oscillation": float(np.abs(np.diff(costs[steady])).mean() / (most - least)) if steady.sum() > 1 else 0.0,
    }
