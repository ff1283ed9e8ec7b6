"""How many replicas a server needs: the slow loop, beside the speed that follows the load at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


# The share of its time that a replica shall be busy at the normal speed.
BUSY = 0.7


def demand_policy(busy: float = BUSY) -> Callable[[Any], tuple[int, dict[str, Any]]]:
    """
    Return the policy of Ray's autoscaler: as many replicas as would be busy for this share of their time if every
    text that comes, the refused ones among them, was answered at the normal speed. The speed goes up within
    milliseconds, so queues and busy replicas would not show what is missing.

    Args:
        busy (`float`): In (0, 1].
    """

    # Defined here, so that Ray sends it as it is, and its controller need not import this package.
    def replicas_for_demand(context: Any) -> tuple[int, dict[str, Any]]:
        from math import ceil

        # Every replica was told of the demand of all.
        demand = max((context.aggregated_metrics.get("demand") or {}).values(), default=0.0)
        needed = ceil(demand / busy)
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(least, min(needed, most)), {}

    return replicas_for_demand
