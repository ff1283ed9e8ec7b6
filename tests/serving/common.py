"""A server in this process, with its model in a thread of it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

from fastbert_hf.serving.served_model import ServedModel, ServerSettings
from fastbert_hf.serving.text_server import Limits, Listener, TextServer


class LocalModel:
    """What answers the texts of a server: a model in this process."""

    servers = 1

    def __init__(self, settings: ServerSettings):
        self.model = ServedModel(settings)

    async def describe(self):
        return self.model.describe()

    async def answer(self, asked, speed, demand):
        return await asyncio.to_thread(self.model.answer, asked, speed)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def running_server(
    model: Any, limits: Limits | None = None, api_key: str | None = None
) -> Iterator[tuple[TextServer, int]]:
    """Let a server answer in a thread, and return it and its port."""
    server, port = TextServer(model, limits or Limits(), api_key), free_port()
    listener = Listener(server.app, "127.0.0.1", port)
    ready = threading.Event()

    async def answer():
        await server.start()
        ready.set()
        await listener.serve()

    thread = threading.Thread(target=asyncio.run, args=(answer(),), daemon=True)
    thread.start()
    assert ready.wait(60)
    while not listener.started:
        thread.join(0.01)
        assert thread.is_alive()
    try:
        yield server, port
    finally:
        listener.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def ask(
    port: int,
    body: Any = None,
    path: str = "/predict",
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, Any, dict[str, str]]:
    """Return status, body and headers of an answer. A body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if body is None else "POST"), path, sent, headers or {})
        response = connection.getresponse()
        text = response.read().decode()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.status, json.loads(text) if is_json else text, dict(response.headers)
    finally:
        connection.close()
