"""A speed that follows the load, on a virtual clock: what is promised, what it is compared with, and bad settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fastbert_hf import DEFAULT_MODEL_DIR, FastBertConfig
from fastbert_hf.serving import LoadControl

from ..common import load_script


SPEEDS = np.linspace(0.0, 1.0, 21)
# What is saved first costs no accuracy; the last of it costs most.
COSTS = 1.0 - 0.8 * SPEEDS**0.7
ACCURACIES = 0.9 - 0.12 * SPEEDS**3
NORMAL = 0.1


@pytest.fixture(scope="module")
def simulation():
    return load_script(Path(__file__).parent.parent.parent / "benchmarks" / "load_simulation.py")


@pytest.fixture
def machine(simulation):
    return simulation.Machine(SPEEDS, COSTS, ACCURACIES, 0.004, 1 / 30_000, 0.1)


def burst_of(simulation, machine, load, seed=1):
    """Return texts at half of the capacity, then at `load` times as much, then at half again, and when that is."""
    phases = [(1.0, 0.5), (2.0, load), (2.0, 0.5)]
    return simulation.arrivals(phases, machine.tokens_per_second(NORMAL), seed), (1.0, 3.0)


def summary_of(simulation, machine, policy, load, seed=1):
    texts, burst = burst_of(simulation, machine, load, seed)
    served = simulation.simulate(machine, policy, texts, seed)
    return simulation.summary(machine, texts, served, burst, NORMAL), served


def test_little_load_is_answered_at_the_normal_speed(simulation, machine):
    found, served = summary_of(simulation, machine, machine.control(speed=NORMAL), 0.3)
    assert set(served.speeds) == {NORMAL} and found["in_time"] == 1 and found["refused"] == 0


# Where the greatest speed cannot answer all, the moment in which a lower one was still chosen costs refusals, which an
# oracle does not have.
@pytest.mark.parametrize(("load", "part"), [(2.0, 0.95), (10.0, 0.5)])
def test_what_is_accepted_is_in_time_and_as_good_as_can_be(simulation, machine, load, part):
    found, _ = summary_of(simulation, machine, machine.control(speed=NORMAL), load)
    fast, _ = summary_of(simulation, machine, simulation.Fixed(machine, 1.0), load)
    slow, _ = summary_of(simulation, machine, simulation.Fixed(machine, NORMAL), load)
    assert found["in_time"] >= 0.99 and found["recovery"] < 0.6
    assert found["refused"] < fast["refused"] + 0.02
    texts, _ = burst_of(simulation, machine, load)
    best = simulation.weighted(simulation.clairvoyant(machine, texts, NORMAL), texts)
    assert found["accuracy"] - fast["accuracy"] >= part * (best - fast["accuracy"])
    assert found["accuracy"] > slow["accuracy"] + 0.05
    if load < 3:  # a speed does it, so nobody is refused, and no feedback is ahead
        assert found["refused"] == 0
        for other in (simulation.Aimd, simulation.Pi):
            assert found["accuracy"] > summary_of(simulation, machine, other(machine, NORMAL), load)[0]["accuracy"]


def test_never_beyond_the_greatest_speed(simulation, machine):
    control = machine.control(speed=NORMAL, max_speed=0.42)
    found, served = summary_of(simulation, machine, control, 10.0)
    assert np.nanmax(served.speeds) == pytest.approx(0.42) and found["in_time"] >= 0.99


@pytest.mark.parametrize("times", [0.5, 2.0])
def test_it_learns_how_long_batches_take(simulation, machine, times):
    true = dataclasses.replace(
        machine,
        seconds_per_batch=times * machine.seconds_per_batch,
        seconds_per_token=times * machine.seconds_per_token,
    )
    control = machine.control(speed=NORMAL)
    found, _ = summary_of(simulation, true, control, 5.0)
    assert control.ratio == pytest.approx(times, rel=0.1) and found["in_time"] > 0.98


def test_without_refusals_a_queue_grows(simulation, machine):
    found, _ = summary_of(simulation, machine, simulation.Fixed(machine, NORMAL, refuses=False), 3.0)
    assert found["in_time"] < 0.5 and found["p99"] > 10 * machine.time_to_answer


def test_single_texts_wait_as_long_as_queueing_theory_says(simulation, monkeypatch):
    """Poisson arrivals, equal times of service: rho s / (2 (1 - rho)) on average (Pollaczek and Khinchine)."""
    monkeypatch.setattr(simulation, "NOISE", 0.0)
    service, load = 0.01, 0.7
    machine = simulation.Machine(SPEEDS, COSTS, ACCURACIES, service, 1e-12, 1e3, most_tokens=1)
    times = np.cumsum(np.random.default_rng(0).exponential(service / load, 20_000))
    texts = simulation.Arrivals(times, np.ones(len(times), int))
    served = simulation.simulate(machine, simulation.Fixed(machine, 0.0), texts)
    waited = (served.ends - times - service).mean()
    assert waited == pytest.approx(load * service / (2 * (1 - load)), rel=0.1)


def test_the_taut_string_serves_each_text_between_its_arrival_and_its_deadline(simulation):
    # By hand: 1 token a second until the burst at 10, whose 30 tokens are due at 15; then the rest alone.
    begins = np.array([0.0, 10.0, 10.0, 10.0, 20.0])
    rates = simulation.taut_string(begins, np.array([5.0, 10.0, 10.0, 10.0, 5.0]), 5.0)
    assert rates.tolist() == pytest.approx([1.0, 6.0, 6.0, 6.0, 1.0])
    generator = np.random.default_rng(2)
    begins, sizes = np.sort(generator.random(60)) * 10, generator.integers(1, 9, 60).astype(float)
    rates = simulation.taut_string(begins, sizes, 1.5)
    end = -np.inf
    for begin, size, rate in zip(begins, sizes, rates, strict=True):
        end = max(end, begin) + size / rate
        assert end <= begin + 1.5 + 1e-6
    # The greatest rate is that of the texts which must go through the narrowest place.
    narrow = [
        sizes[first : last + 1].sum() / (begins[last] + 1.5 - begins[first])
        for last in range(60)
        for first in range(last + 1)
    ]
    assert rates.max() == pytest.approx(max(narrow))


def test_a_calibrated_model_gives_its_speeds():
    config = FastBertConfig.from_pretrained(DEFAULT_MODEL_DIR)
    control = LoadControl.of_config(config, 0.002, 1e-5, 0.1, speed=config.speed)
    assert control.speeds[0] == config.speed and control.speeds[-1] == config.calibration["speeds"][-1]
    assert control.costs[-1] == pytest.approx(1 / config.calibration["speed_ups"][-1])
    assert control.next_batch(0.0, [0.1], [20]) == (1, config.speed)
    assert control.seconds_late(0.0, 0.0, 0, 20, 0.1) < 0 < control.seconds_late(0.0, 0.2, 0, 20, 0.1)
    config.calibration = None
    with pytest.raises(ValueError, match="calibrate once"):
        LoadControl.of_config(config, 0.002, 1e-5, 0.1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"speeds": [0.5, 0.0]}, "ascending"),
        ({"speeds": []}, "ascending"),
        ({"costs": [0.5, 1.0]}, "costs must"),
        ({"costs": [1.0, 0.0]}, "costs must"),
        ({"costs": [1.0, float("nan")]}, "costs must"),
        ({"seconds_per_token": 0.0}, "seconds_per_token"),
        ({"seconds_per_batch": -1.0}, "seconds_per_batch"),
        ({"time_to_answer": float("inf")}, "time_to_answer"),
        ({"speed": 0.9, "max_speed": 0.5}, "max_speed"),
        ({"max_speed": 2.0}, "max_speed"),
        ({"speed": float("nan")}, "max_speed"),
        ({"batch_share": 0.0}, "batch_share"),
        ({"reserve": 1.0}, "reserve"),
        ({"most_tokens": 0}, "most_tokens"),
    ],
)
def test_bad_settings(change, named):
    settings = {"speeds": [0.0, 1.0], "costs": [1.0, 0.2], "seconds_per_batch": 0.01, "seconds_per_token": 1e-4}
    with pytest.raises(ValueError, match=named):
        LoadControl(**{**settings, "time_to_answer": 0.1, **change})


def test_a_stall_is_forgotten(simulation, machine):
    control = machine.control(speed=NORMAL)
    control.observe(25, NORMAL, 0.4)  # eighty times as long
    for _ in range(50):
        control.observe(25, NORMAL, 0.4)
    refused = [control.seconds_late(now, now, 0, 25, now + 0.1) > 0 for now in np.arange(100) * 0.5]
    assert refused[0] and not any(refused[-50:])
    assert summary_of(simulation, machine, control, 2.0)[0]["in_time"] > 0.99


@pytest.mark.parametrize("seconds_per_batch", [0.02, 0.03])
def test_batches_that_cost_more_than_their_tokens(simulation, machine, seconds_per_batch):
    slow = dataclasses.replace(machine, seconds_per_batch=seconds_per_batch)
    control = slow.control(speed=NORMAL)
    assert control.seconds_late(0.0, 0.0, 0, 25, 0.1) < 0 and control.next_batch(0.0, [0.1], [25]) == (1, NORMAL)
    texts = simulation.arrivals([(3.0, 0.3)], slow.tokens_per_second(NORMAL))
    found = simulation.summary(slow, texts, simulation.simulate(slow, control, texts), (0.0, 3.0), NORMAL)
    assert found["in_time"] > 0.99 and found["refused"] < 0.05


def test_what_nobody_could_answer_changes_nothing_for_the_others(machine):
    control = machine.control(speed=NORMAL)
    assert control.seconds_late(0.0, 0.0, 0, 100_000, 0.1) > 0
    assert control.next_batch(0.0, [0.1], [20]) == (1, NORMAL)
    assert control.next_batch(1.0, [0.5, 1.1], [20, 20]) == (2, NORMAL)  # the first is late already
    assert control.next_batch(2.0, [0.5, 0.6], [20, 20])[1] == 1.0  # all are
    assert control.next_batch(3.0, [], []) == (0, NORMAL)
    for tokens, speed, seconds in ((0, 0.1, 1.0), (5, 0.1, 0.0), (5, 0.1, -1.0), (5, 0.1, np.nan), (5, np.nan, 1.0)):
        control.observe(tokens, speed, seconds)
    assert control.ratio == 1.0 and control.deviation == 0.0
    # A text that came too late for a full queue makes the others faster, for a while.
    assert control.seconds_late(4.0, 4.0, 30_000, 20, 4.1) > 0
    assert control.next_batch(4.05, [4.15], [20])[1] == 1.0 and control.next_batch(4.6, [4.7], [20])[1] == NORMAL


def test_the_oracle_mixes_speeds_where_one_is_worse(simulation, machine):
    bent = dataclasses.replace(machine, accuracies=np.where(SPEEDS < 0.5, 0.8, np.where(SPEEDS < 0.6, 0.9, 0.7)))
    texts, _ = burst_of(simulation, bent, 0.5)
    assert simulation.clairvoyant(bent, texts, 0.0).mean() == pytest.approx(0.9)
    costs, accuracies = simulation.best_accuracies(bent)
    assert (np.diff(costs) > 0).all() and (np.diff(np.diff(accuracies) / np.diff(costs)) < 1e-9).all()
