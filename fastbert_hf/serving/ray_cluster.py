"""Ray on this machine alone, or a cluster that runs already."""

from __future__ import annotations

import importlib
import logging
import os


def start_ray(num_cpus: int, address: str | None = None) -> None:
    """
    Connect to a cluster, or start one of this machine that nobody else can reach. Ray must not have been imported
    before, as it reads its environment then.

    Args:
        num_cpus (`int`): Cores of the one that is started.
        address (`str`, *optional*): Of a cluster that runs.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If there is no cluster at that address.
    """
    # Ray would ask its makers' server whether it may report how it is used.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings = {"logging_level": logging.ERROR}
    if address is None:
        # Without it all of Ray's own ports would be open to the network; its name is historical.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        settings |= {"num_cpus": num_cpus, "include_dashboard": False}
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ImportError('this needs its extra: pip install "fastbert-hf[ray]"') from error
    try:
        ray.init(address=address or "local", **settings)
    except ConnectionError as error:
        raise ValueError(f"there is no Ray cluster at {address}: {str(error).splitlines()[0]}") from error
