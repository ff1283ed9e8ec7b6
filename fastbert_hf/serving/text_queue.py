"""The texts that wait for an answer, and the one loop that sends them on, at the speed that the load allows."""

from __future__ import annotations

import asyncio
import math
from bisect import insort
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

import numpy as np

from .load_control import LoadControl
from .served_model import Answered, Asked


# A request that takes long even where nothing waits is given so many times what it takes at the greatest speed.
TIMES_ITS_OWN = 2.0
# A text has about so many tokens for each character, until some were answered; the last batch counts for a tenth.
TOKENS_PER_CHARACTER = 0.25
NEWEST = 0.1
# How long what was asked for counts.
SECONDS_OF_DEMAND = 5.0
# What every text has beside its words, [CLS] and [SEP].
SPECIAL_TOKENS = 2


class Overloaded(Exception):
    """
    A request that could not be answered in time at any speed, and was refused before it waited.

    Args:
        seconds (`float`): After which it may come again.
    """

    def __init__(self, seconds: float):
        super().__init__("Model is overloaded")
        self.seconds = seconds


class Batch(NamedTuple):
    """What was answered together, for whoever counts."""

    texts: Sequence[Waiting]
    answers: Sequence[Answered]
    speed: float
    started: float
    ended: float


@dataclass(eq=False)
class Waiting:
    """A text on its way: what is asked, about how many tokens it has, its deadline, and who waits for its answer."""

    asked: Asked
    tokens: float
    cost: float | None  # as a share of what speed 0 costs, of a text that brings its own dial
    arrived: float
    deadline: float
    answer: asyncio.Future = field(repr=False)

    def weight(self, cost: float) -> float:
        """Return how many tokens it is worth among texts that are answered at this cost."""
        return self.tokens if self.cost is None else self.tokens * self.cost / cost


class TextQueue:
    """
    Send texts on in batches, those with the earliest deadline first. As many batches run at a time as there are
    servers (`control.servers`); what comes meanwhile waits.

    Args:
        control ([`LoadControl`]): Which texts are refused; how long each batch is, and at which speed it is answered.
        answer (`Callable`): Answers some texts. Those without a dial of their own get the speed that is given.
        count (`Callable`): Is told of every [`Batch`].
        most_tokens (`int`): Of a text.
    """

    def __init__(
        self,
        control: LoadControl,
        answer: Callable[[Sequence[Asked], float], Awaitable[Sequence[Answered]]],
        count: Callable[[Batch], None] = lambda batch: None,
        most_tokens: int = 512,
    ):
        self.answer, self.count = answer, count
        self.waiting: list[Waiting] = []
        self.tokens_per_character = TOKENS_PER_CHARACTER
        # Seconds of work per second, at the normal speed, and when that was last looked at.
        self.asked_for, self.asked_at = 0.0, monotonic()
        # When each batch that runs will probably have ended.
        self.running: dict[asyncio.Task, float] = {}
        self._changed = asyncio.Event()
        self.use(control, most_tokens)

    def use(self, control: LoadControl, most_tokens: int) -> None:
        """Go by another control from now on."""
        self.control, self.most_tokens = control, most_tokens
        # What a token costs that follows the load: of the batch before.
        self.cost = float(control.costs[0])
        self._changed.set()

    def tokens_of(self, characters: int) -> float:
        """Return about how many tokens a text has."""
        return min(SPECIAL_TOKENS + characters * self.tokens_per_character, self.most_tokens)

    async def answers(self, asked: Sequence[Asked], cost: float | None = None) -> list[Answered]:
        """
        Return the answers to the texts of one request. When this is cancelled, as nobody waits for them any more, they
        leave the queue.

        Args:
            asked: The texts.
            cost (`float`, *optional*): Of their own dial, as a share of what speed 0 costs.

        Raises:
            Overloaded: If they could not be answered in time.
        """
        now, control = monotonic(), self.control
        tokens = [self.tokens_of(one.characters) for one in asked]
        least = float(control.costs[-1])
        worth = sum(tokens) * (1.0 if cost is None else cost / least)
        self._count_demand(now, float(control.seconds(0, sum(tokens), control.costs[0])))
        deadline = now + max(control.time_to_answer, TIMES_ITS_OWN * float(control.seconds(1, worth, least)))
        before = sum(text.weight(least) for text in self.waiting if text.deadline <= deadline)
        late = control.seconds_late(now, self.free_at(now), before, worth, deadline)
        # Who has nothing to do tries all: what was believed to be too slow would never be seen to be fast enough.
        if late > 0 and (self.waiting or len(self.running) >= control.servers):
            raise Overloaded(late)
        loop = asyncio.get_running_loop()
        texts = [
            Waiting(one, number, cost, now, deadline, loop.create_future())
            for one, number in zip(asked, tokens, strict=True)
        ]
        for text in texts:
            insort(self.waiting, text, key=lambda other: other.deadline)
        self._changed.set()
        try:
            return await asyncio.gather(*(text.answer for text in texts))
        finally:  # cancelled, or one of them failed: nobody asks for the others any more
            for text in texts:
                text.answer.cancel()

    def demand(self) -> float:
        """Return how many servers at the normal speed would be busy with all that is asked for, the refused too."""
        self._count_demand(monotonic(), 0.0)
        return self.asked_for

    def _count_demand(self, now: float, seconds: float) -> None:
        """Count the work of a request in a mean over about the last [`SECONDS_OF_DEMAND`]."""
        self.asked_for *= math.exp((self.asked_at - now) / SECONDS_OF_DEMAND)
        self.asked_for += seconds / SECONDS_OF_DEMAND
        self.asked_at = now

    def free_at(self, now: float) -> float:
        """Return when the first of the servers will be free."""
        return now if len(self.running) < self.control.servers else min(self.running.values(), default=now)

    async def run(self) -> None:
        """Send on what comes until this is cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            self.waiting = [text for text in self.waiting if not text.answer.done()]
            while self.waiting and len(self.running) < self.control.servers:
                self._send()

    async def drain(self) -> None:
        """Wait until nothing waits and nothing runs."""
        while self.waiting or self.running:
            await asyncio.wait([asyncio.ensure_future(asyncio.sleep(0.01)), *self.running])

    def _send(self) -> None:
        """Take one batch from the queue and let it run."""
        control, now = self.control, monotonic()
        worth = [text.weight(self.cost) for text in self.waiting]
        number, speed = control.next_batch(now, [text.deadline for text in self.waiting], worth)
        texts, self.waiting = self.waiting[:number], self.waiting[number:]
        self.cost = float(np.interp(speed, control.speeds, control.costs))
        task = asyncio.create_task(self._answer(texts, speed, now))
        self.running[task] = now + control.seconds_of(sum(text.weight(self.cost) for text in texts), speed)

    async def _answer(self, texts: Sequence[Waiting], speed: float, started: float) -> None:
        """Wait for the answers of a batch, and tell them."""
        cost = self.cost
        try:
            answers = await self.answer([text.asked for text in texts], speed)
        except Exception as error:  # whatever it is, those who wait have to be told
            answers = [Answered.failed("Backend", f"Inference failed: {error}")] * len(texts)
        finally:
            del self.running[asyncio.current_task()]
            self._changed.set()
        ended = monotonic()
        for text, answer in zip(texts, answers, strict=True):
            if answer.tokens:
                text.tokens = answer.tokens
            if not text.answer.done():
                text.answer.set_result(answer)
        self._learn(texts, answers)
        self.control.observe(sum(text.weight(cost) for text in texts), speed, ended - started)
        self.count(Batch(texts, answers, speed, started, ended))

    def _learn(self, texts: Sequence[Waiting], answers: Sequence[Answered]) -> None:
        """Follow how many tokens a character is."""
        read = [
            (text.asked.characters, answer.tokens - SPECIAL_TOKENS)
            for text, answer in zip(texts, answers, strict=True)
            if SPECIAL_TOKENS < answer.tokens < self.most_tokens
        ]
        characters, tokens = sum(pair[0] for pair in read), sum(pair[1] for pair in read)
        if characters and tokens:
            self.tokens_per_character += NEWEST * (tokens / characters - self.tokens_per_character)
