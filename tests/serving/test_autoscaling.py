"""How many replicas are asked for: those that the demand at the normal speed would keep busy."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastbert_hf.serving.autoscaling import replicas_for_demand


def replicas(demands: dict[str, float] | None, least: int = 1, most: int = 10) -> int:
    metrics = {} if demands is None else {"demand": demands}
    context = SimpleNamespace(
        aggregated_metrics=metrics, capacity_adjusted_min_replicas=least, capacity_adjusted_max_replicas=most
    )
    return replicas_for_demand(context)[0]


@pytest.mark.parametrize(
    ("demands", "expected"),
    [
        (None, 1),
        ({}, 1),
        ({"a": 0.0}, 1),
        ({"a": 0.7}, 1),
        ({"a": 0.71}, 2),
        ({"a": 3.0, "b": 2.9}, 5),  # each was told of the demand of all, one a moment later
        ({"a": 100.0}, 10),
    ],
)
def test_the_demand_says_how_many(demands, expected):
    assert replicas(demands) == expected
    assert replicas(demands, least=3) == max(3, expected)


def test_the_controller_of_ray_needs_nothing_of_this_package():
    config = pytest.importorskip("ray.serve.config")
    policy = config.AutoscalingPolicy(policy_function=replicas_for_demand)
    code = f"""
import pickle, sys
from types import SimpleNamespace
sys.modules["fastbert_hf"] = sys.modules["torch"] = None
policy = pickle.loads({policy.get_serialized_policy_def()!r})
context = SimpleNamespace(
    aggregated_metrics={{"demand": {{"a": 2.0}}}}, capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=4
)
print(policy(context)[0])
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout.strip() == "3", finished.stderr[-2000:]
