"""Models in processes of Ray Serve, as many as are needed: what answers a [`TextServer`]."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from time import monotonic
from typing import Any

from transformers.utils.logging import disable_progress_bar

from .autoscaling import replicas_for_demand
from .served_model import Answered, Asked, Description, ServedModel, ServerSettings


try:
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve._private import replica
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
    from ray.serve.exceptions import RayServeException
    from ray.serve.schema import LoggingConfig, ReplicaState
except ImportError as error:
    raise ImportError('the server needs its extra: pip install "fastbert-hf[ray]"') from error


logger = logging.getLogger("ray.serve")
NAME, DEPLOYMENT = "fastbert", "TextReplica"
LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
# A batch whose process ended goes to another one, so many times.
TRIES = 5
SECONDS_BETWEEN_TRIES = 0.2
# Between two looks at how many processes answer.
SECONDS_TO_LOOK = 0.5
# What was asked for so long ago says nothing about now.
SECONDS_OF_DEMAND = 10.0
# A process that ends is given so long for what it was asked.
SECONDS_TO_END = 30.0


def stay_on_this_machine() -> None:
    """
    Let nobody else reach this replica. Ray Serve opens a port of every replica to the whole network, for calls by gRPC
    between deployments, and unpickles what comes there. Nothing here calls so, and no setting of Ray closes it.
    """
    open_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: open_port(server, address.replace("[::]", "127.0.0.1"))


@serve.deployment(name=DEPLOYMENT)
class TextReplica:
    """One process with a model."""

    def __init__(self):
        disable_progress_bar()
        stay_on_this_machine()
        self.model: ServedModel | None = None
        self.reload_error: str | None = None
        self.demand, self.demanded_at = 0.0, monotonic()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """
        Answer with other settings ([`ServerSettings`]) from now on. Settings that cannot be used leave those before in
        use, which [`describe`] tells, as otherwise nothing would be answered any more.
        """
        try:
            self.model = await asyncio.to_thread(ServedModel, ServerSettings(**user_config), self.model)
            self.reload_error = None
        except (ValueError, TypeError, OSError) as error:
            if self.model is None:
                raise
            self.reload_error = str(error)
            logger.error("these settings cannot be used, and the last ones still are: %s", error)

    async def describe(self) -> Description:
        """Return what who sends texts has to know."""
        return self.model.describe(self.reload_error)

    async def answer(self, asked: Sequence[Asked], speed: float, demand: float) -> list[Answered]:
        """
        Return the answers to some texts.

        Args:
            asked, speed: As in [`ServedModel.answer`].
            demand (`float`): How many processes at the normal speed would be busy with what is asked of the server.
        """
        self.demand, self.demanded_at = demand, monotonic()
        return await asyncio.to_thread(self.model.answer, asked, speed)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what the autoscaler goes by."""
        is_new = monotonic() - self.demanded_at < SECONDS_OF_DEMAND
        return {"demand": self.demand if is_new else 0.0}


class RayModel:
    """
    The model of a [`TextServer`]: the replicas of an application of Ray Serve.

    Args:
        handle (`DeploymentHandle`): What `serve.run` returned.
    """

    def __init__(self, handle: Any):
        self.handle = handle
        self.servers = 1

    async def describe(self) -> Description:
        """Return what who sends texts has to know."""
        return await self.handle.describe.remote()

    async def answer(self, asked: Sequence[Asked], speed: float, demand: float = 0.0) -> Sequence[Answered]:
        """Return the answers to some texts. Where the process ends that had them, another one answers."""
        for tries_left in reversed(range(TRIES)):
            try:
                return await self.handle.answer.remote(asked, speed, demand)
            except (RayActorError, RayServeException) as error:
                if not tries_left:
                    raise
                logger.warning("a process ended with %d texts, which go to another one: %s", len(asked), error)
                await asyncio.sleep(SECONDS_BETWEEN_TRIES)
        raise AssertionError("unreachable")

    async def watch(self) -> None:
        """Follow how many processes answer, until this is cancelled."""
        while True:
            self.servers = await asyncio.to_thread(running_replicas)
            await asyncio.sleep(SECONDS_TO_LOOK)


def running_replicas() -> int:
    """Return how many replicas answer."""
    application = serve.status().applications.get(NAME)
    deployment = None if application is None else application.deployments.get(DEPLOYMENT)
    if deployment is None:
        return 0
    states = (ReplicaState.RUNNING, ReplicaState.UPDATING)
    return sum(deployment.replica_states.get(state, 0) for state in states)


def build(
    settings: ServerSettings | Mapping[str, Any] | None = None,
    replicas: int = 1,
    max_replicas: int | None = None,
    threads: int = 1,
) -> Any:
    """
    Return the application, for `serve.run` of Ray.

    Args:
        settings ([`ServerSettings`] or `dict`):
            Which model answers, and how fast: the `user_config` of the deployment. Where nothing else changes,
            replicas take it up while they go on answering.
        replicas (`int`): Processes that each hold a model.
        max_replicas (`int`, *optional*):
            Start up to so many where what comes would keep more than `replicas` busy at the normal speed.
        threads (`int`): Cores of each.
    """
    settings = settings if isinstance(settings, ServerSettings) else ServerSettings(**(settings or {}))
    size: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas is not None:
        policy = AutoscalingPolicy(policy_function=replicas_for_demand)
        size = {
            "autoscaling_config": AutoscalingConfig(min_replicas=replicas, max_replicas=max_replicas, policy=policy)
        }
    deployment = TextReplica.options(
        **size,
        user_config=asdict(settings),
        ray_actor_options={"num_cpus": threads},
        # One batch at a time, and what is asked beside it.
        max_ongoing_requests=4,
        graceful_shutdown_timeout_s=SECONDS_TO_END,
        health_check_period_s=2.0,
        logging_config=LOGGING,
        # With another version Ray would end the replicas and start new ones, where only settings have changed.
        version=hashlib.sha256(str(threads).encode()).hexdigest(),
        _internal=True,
    )
    return deployment.bind()
