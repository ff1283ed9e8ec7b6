"""How many replicas a server needs: the slow loop, beside the speed that follows the load at once."""

from __future__ import annotations

import math
from typing import Any


# The share of its time that a replica shall be busy at the normal speed.
BUSY = 0.7


def replicas_for_demand(context: Any) -> tuple[int, dict[str, Any]]:
    """
    Return as many replicas as would be busy for a part of their time if every text that comes, the refused ones among
    them, was answered at the normal speed: a policy of Ray's autoscaler. The speed goes up within milliseconds, so
    that queues and busy replicas would not show what is missing. Ray sends this file to its controller as it is.

    Args:
        context (`ray.serve.config.AutoscalingContext`):
            With the metric `demand`, of which every replica was told for all of them.
    """
    demand = max((context.aggregated_metrics.get("demand") or {}).values(), default=0.0)
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(math.ceil(demand / BUSY), most)), {}
