"""The process that listens: HTTP before a queue, and models in other processes behind it."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import Any

from ray import serve

from ..escapes import printable
from .ray_serve import LOGGING, NAME, SECONDS_TO_END, RayModel, build
from .served_model import ServerSettings, check_server_settings
from .text_server import Limits, Listener, TextServer


# For so long what comes is refused with 503, before nobody listens any more: who balances loads looks elsewhere.
SECONDS_OF_REFUSALS = 2.0
SECONDS_BETWEEN_LOOKS = 0.02


def answer_until_a_signal(
    host: str,
    port: int,
    settings: Callable[[], ServerSettings],
    limits: Limits,
    api_key: str | None = None,
    **size: Any,
) -> None:
    """
    Start models and answer over HTTP. SIGINT and SIGTERM end that, when what waits is answered; SIGHUP takes up
    settings anew.

    Args:
        host (`str`), port (`int`): Where to listen.
        settings (`Callable`): Returns the settings, at the start and at every SIGHUP.
        limits ([`Limits`]), api_key (`str`, *optional*): Of the [`TextServer`].
        size: `replicas`, `max_replicas` and `threads`, as in [`build`].
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # Requests come to this process, not to one of Ray's.
    serve.start(proxy_location="Disabled", logging_config=LOGGING)
    try:
        model = RayModel(serve.run(build(settings(), **size), name=NAME, route_prefix=None))
        asyncio.run(listen(TextServer(model, limits, api_key), host, port, settings, size))
    finally:
        serve.shutdown()


async def listen(
    server: TextServer, host: str, port: int, settings: Callable[[], ServerSettings], size: dict[str, Any]
) -> None:
    """Answer until a signal ends it."""
    listener = Listener(server.app, host, port, SECONDS_TO_END)
    await server.start()
    watch = asyncio.create_task(server.model.watch())
    loop, tasks = asyncio.get_running_loop(), set()

    def at(number: int, action: Callable) -> None:
        def start() -> None:
            task = loop.create_task(action())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        loop.add_signal_handler(number, start)

    async def end() -> None:
        print("Answering what waits, then ending.", flush=True)
        server.drains = True
        await asyncio.sleep(SECONDS_OF_REFUSALS)
        listener.should_exit = True

    async def reload() -> None:
        try:
            newer = settings()
            await asyncio.to_thread(check_server_settings, newer)
            await asyncio.to_thread(serve.run, build(newer, **size), name=NAME, route_prefix=None)
            await server.start()
            error = server.description.reload_error
        except (ValueError, OSError, RuntimeError) as failure:
            error = str(failure)
        if error is None:
            print(f"Answering with {printable(newer)}", flush=True)
        else:
            print(f"These settings cannot be used, and the last ones still are: {printable(error)}", flush=True)

    at(signal.SIGINT, end)
    at(signal.SIGTERM, end)
    at(signal.SIGHUP, reload)
    listening = asyncio.create_task(listener.serve())
    while not listener.started and not listening.done():
        await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"Answering on {address} ({address}/docs tells how to ask); Ctrl-C ends it.", flush=True)
    try:
        await listening
    finally:
        watch.cancel()
