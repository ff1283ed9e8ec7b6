"""The queue of a server: batches in the order of deadlines, refusals, callers that go away, a model that fails."""

from __future__ import annotations

import asyncio

import pytest

from fastbert_hf.serving.load_control import LoadControl
from fastbert_hf.serving.served_model import Answered, Asked
from fastbert_hf.serving.text_queue import Overloaded, TextQueue


def control(**settings) -> LoadControl:
    """Two speeds, of which the greater costs a quarter, and a second to answer."""
    return LoadControl([0.0, 1.0], [1.0, 0.25], 0.001, 1e-4, **{"time_to_answer": 1.0, **settings})


def texts(*characters: int) -> list[Asked]:
    return [Asked("a" * number, number) for number in characters]


class Model:
    """Answers with the length of each text when it is let."""

    def __init__(self, seconds: float = 0.0, tokens_per_character: float = 0.25):
        self.batches, self.seconds, self.error = [], seconds, None
        self.tokens_per_character = tokens_per_character
        self.at_work = self.most_at_work = 0

    async def answer(self, asked, speed):
        self.batches.append((speed, [one.text for one in asked]))
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        await asyncio.sleep(self.seconds)
        self.at_work -= 1
        if self.error is not None:
            raise self.error
        tokens = [2 + int(len(one.text) * self.tokens_per_character) for one in asked]
        return [
            Answered([{"label": str(len(one.text))}], number, 1) for one, number in zip(asked, tokens, strict=True)
        ]


def run(test, model, own_control=None, **settings):
    """Run a coroutine beside the loop of a queue."""
    counted = []

    async def both():
        queue = TextQueue(own_control or control(), model.answer, counted.append, **settings)
        loop = asyncio.create_task(queue.run())
        try:
            return await asyncio.wait_for(test(queue), 10)
        finally:
            assert not loop.done() or not loop.exception()
            loop.cancel()

    return asyncio.run(both()), counted


def labels(answers):
    return [answer.labels[0]["label"] for answer in answers]


def test_every_request_gets_its_own_answers_in_their_order():
    model = Model(0.01)

    async def ask(queue):
        return await asyncio.gather(*(queue.answers(texts(number, 2 * number, 1)) for number in range(1, 30)))

    answered, counted = run(ask, model)
    assert [labels(answers) for answers in answered] == [[str(n), str(2 * n), "1"] for n in range(1, 30)]
    assert sum(len(batch.texts) for batch in counted) == 29 * 3
    assert len(counted) < 29, "what comes together is answered together"
    assert model.most_at_work == 1


def test_as_many_batches_run_as_there_are_servers():
    model = Model(0.02)

    async def ask(queue):
        queue.control.servers = 3
        return await asyncio.gather(*(queue.answers(texts(900)) for _ in range(9)))

    run(ask, model, control(most_tokens=100), most_tokens=512)
    assert model.most_at_work == 3 and len(model.batches) == 9


def test_what_cannot_be_in_time_is_refused_and_the_rest_is_answered():
    model = Model(0.05)

    async def ask(queue):
        return await asyncio.gather(*(queue.answers(texts(400)) for _ in range(60)), return_exceptions=True)

    answered, _ = run(ask, model, control(time_to_answer=0.05))
    refused = [answer for answer in answered if isinstance(answer, Overloaded)]
    assert 0 < len(refused) < 60 and all(error.seconds > 0 for error in refused)
    assert all(labels(answer) == ["400"] for answer in answered if not isinstance(answer, Overloaded))


def test_a_request_that_takes_long_by_itself_is_not_refused_where_nothing_waits():
    async def ask(queue):
        return await queue.answers(texts(*[2000] * 32))

    answered, _ = run(ask, Model(), control(time_to_answer=0.001))
    assert labels(answered) == ["2000"] * 32


def test_a_model_that_is_believed_too_slow_is_still_asked():
    """As where it was measured while the machine did something else."""
    model = Model()

    async def ask(queue):
        for _ in range(60):
            await queue.answers(texts(40))
        return await asyncio.gather(*(queue.answers(texts(40)) for _ in range(8)))

    slow = LoadControl([0.0, 1.0], [1.0, 0.25], 5.0, 0.1, 0.1)
    assert len(run(ask, model, slow)[0]) == 8 and slow.ratio < 0.1


def test_much_is_answered_at_a_greater_speed_than_little():
    model = Model(0.005)

    async def ask(queue):
        await queue.answers(texts(10))
        await asyncio.gather(*(queue.answers(texts(200)) for _ in range(150)), return_exceptions=True)
        await asyncio.sleep(6 * queue.control.time_to_answer)
        await queue.answers(texts(10))

    run(ask, model, control(time_to_answer=0.2))
    speeds = [speed for speed, _ in model.batches]
    assert speeds[0] == 0.0 and max(speeds) == 1.0 and speeds[-1] == 0.0


def test_a_dial_of_its_own_counts_for_what_it_costs():
    async def ask(queue):
        with pytest.raises(Overloaded):
            await asyncio.gather(*(queue.answers(texts(1000), 1.0) for _ in range(100)))
        return queue.demand()

    run(ask, Model(), control(time_to_answer=0.1))

    async def cheap(queue):
        return await asyncio.gather(*(queue.answers(texts(1000), 0.001) for _ in range(20)))

    assert len(run(cheap, Model(), control(time_to_answer=0.1))[0]) == 20


def test_who_goes_away_leaves_the_queue():
    model = Model(0.05)

    async def ask(queue):
        first = asyncio.create_task(queue.answers(texts(1)))
        await asyncio.sleep(0.01)
        gone = asyncio.create_task(queue.answers(texts(2, 3)))
        stays = asyncio.create_task(queue.answers(texts(4)))
        await asyncio.sleep(0.01)
        gone.cancel()
        return labels(await first), labels(await stays)

    assert run(ask, model)[0] == (["1"], ["4"])
    assert [len(batch) for _, batch in model.batches] == [1, 1]


def test_a_batch_that_fails_fails_alone():
    model = Model()

    async def ask(queue):
        model.error = RuntimeError("no memory")
        (failed,) = await queue.answers(texts(1))
        model.error = None
        return failed, labels(await queue.answers(texts(2)))

    (failed, answered), _ = run(ask, model)
    assert failed.error_type == "Backend" and "no memory" in failed.error and answered == ["2"]


def test_how_many_tokens_a_character_is_is_learnt():
    async def ask(queue):
        for _ in range(60):
            await queue.answers(texts(100))
        return queue.tokens_of(100), queue.tokens_of(10_000)

    (tokens, most), _ = run(ask, Model(tokens_per_character=1.0), most_tokens=300)
    assert tokens == pytest.approx(102, rel=0.05) and most == 300


def test_the_demand_follows_what_is_asked_for():
    async def ask(queue):
        for _ in range(20):
            await queue.answers(texts(400))
        return queue.demand()

    demand, _ = run(ask, Model(), control())
    # 102 tokens of 1e-4 seconds, 20 times, in a mean over five seconds.
    assert demand == pytest.approx(20 * 102 * 1e-4 / 5, rel=0.2)


def test_all_that_waits_is_answered_before_the_end():
    model = Model(0.02)

    async def ask(queue):
        asked = [asyncio.create_task(queue.answers(texts(5))) for _ in range(5)]
        await asyncio.sleep(0)
        await queue.drain()
        return [labels(await one) for one in asked]

    assert run(ask, model)[0] == [["5"]] * 5
