"""
Answer over HTTP, faster where more comes than can be answered: `fastbert-hf serve`.

It ends at SIGINT and SIGTERM, when what waits is answered, and takes up the settings of its file anew at SIGHUP.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .options import check_at_least_one, fail, one_line_errors


if TYPE_CHECKING:
    from ..serving.served_model import ServerSettings


def run(options: argparse.Namespace) -> None:
    """Serve until a signal ends it."""
    if importlib.util.find_spec("ray") is None:
        fail('the server needs its extra: pip install "fastbert-hf[ray]"')
    from ..serving.ray_cluster import start_ray
    from ..serving.served_model import check_server_settings
    from ..serving.text_server import Limits

    limits = ("max_client_batch_size", "max_body_bytes", "max_concurrent_requests")
    check_at_least_one(options, "replicas", "max_replicas", "threads", "max_batch_tokens", "port", *limits)
    if options.max_replicas is not None and options.max_replicas < options.replicas:
        fail(f"--max-replicas must be at least --replicas, got {options.max_replicas} and {options.replicas}")
    with one_line_errors():
        settings = settings_of_options(options)
        check_server_settings(settings)
        check_port(options.host, options.port)
        start_ray((options.max_replicas or options.replicas) * options.threads, options.address)
    # Ray reads its environment when it is imported.
    from ..serving.ray_front import answer_until_a_signal

    api_key = options.api_key or os.environ.get("FASTBERT_API_KEY") or None
    fixed = {name: getattr(options, name) for name in ("replicas", "max_replicas", "threads")}
    own_limits = Limits(**{name: getattr(options, name) for name in limits})
    settings_now = partial(settings_of_options, options)
    answer_until_a_signal(options.host, options.port, settings_now, own_limits, api_key, **fixed)


def settings_of_options(options: argparse.Namespace) -> ServerSettings:
    """
    Return the settings of the options, or of the file that they name.

    Raises:
        ValueError: If the file is no JSON, or has what there is not.
    """
    from ..serving.served_model import ServerSettings

    names = [field.name for field in fields(ServerSettings)]
    if options.settings is None:
        return ServerSettings(**{name: getattr(options, name) for name in names})
    try:
        found = json.loads(Path(options.settings).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{options.settings} is no JSON: {error}") from error
    unknown = [name for name in found if name not in names] if isinstance(found, dict) else [found]
    if unknown:
        raise ValueError(
            f"{options.settings} has {str(unknown[0])[:40]!r}: it must be an object with some of {', '.join(names)}"
        )
    return ServerSettings(**found)


def check_port(host: str, port: int) -> None:
    """Raise an `OSError` if nobody can listen there, which Ray would tell late and at length."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except (OSError, OverflowError) as error:
            raise OSError(f"cannot listen on {host}:{port} ({error}): choose another one with --port") from error
