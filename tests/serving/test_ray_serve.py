"""The command `fastbert-hf serve`, as a user starts it: processes that are killed, settings that change, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fastbert_hf.serving.loading import load_pipeline

from .common import ask, free_port


pytest.importorskip("ray", reason="the server needs the extra ray")

TEXTS = ["The plot is thin, but the cast makes it a joy.", "Dreadful.", "It is what it is.", "I laughed a lot."]
REPLICA = "ray::ServeReplica:fastbert:TextReplica"
PATIENCE = 120


class Command:
    """A server as another process, in a folder with its settings."""

    def __init__(self, folder: Path, *options: str):
        self.settings, self.log, self.port = folder / "settings.json", folder / "log", free_port()
        self.use(slo_ms=30_000)
        words = ["serve", "--port", str(self.port), "--settings", str(self.settings), *options]
        environment = {**os.environ, "FASTBERT_API_KEY": ""}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fastbert_hf_cli", *words], stdout=log, stderr=log, env=environment
            )
        self.wait_for("Answering on")

    def use(self, **settings) -> None:
        self.settings.write_text(json.dumps(settings))

    def wait_for(self, *words: str, since: int = 0) -> None:
        """Wait until one of these is in the log."""
        self.wait_until(lambda: any(word in self.log.read_text()[since:] for word in words))

    def wait_until(self, condition) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def reload(self, **settings) -> None:
        since = len(self.log.read_text())
        self.use(**settings)
        self.process.send_signal(signal.SIGHUP)
        self.wait_for("Answering with", "cannot be used", since=since)

    def replicas(self) -> list[psutil.Process]:
        """Return the processes that have a model."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        # Their names end with what they do just now.
        return [child for child in children if is_running(child) and " ".join(child.cmdline()).startswith(REPLICA)]

    def info(self) -> dict:
        return ask(self.port, path="/info")[1]


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


class Callers:
    """Some who ask all the time, and remember what they got."""

    def __init__(self, port: int, number: int = 4):
        self.port, self.found, self.stop = port, [], threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(own,)) for own in range(number)]

    def _ask(self, own: int) -> None:
        place = own
        while not self.stop.is_set():
            place = (place + 1) % len(TEXTS)
            try:
                status, answer, _ = ask(self.port, {"inputs": TEXTS[place]})
            except OSError as error:
                status, answer = type(error).__name__, None
            self.found.append((place, status, answer))

    def __enter__(self) -> Callers:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *failure) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def wait_for_more(self, number: int = 20) -> None:
        """Wait until so many more were answered."""
        wanted, end = len(self.found) + number, time.monotonic() + PATIENCE
        while len(self.found) < wanted:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    command = Command(tmp_path_factory.mktemp("server"), "--replicas", "2")
    yield command
    if command.process.poll() is None:
        command.process.terminate()
        command.process.wait(60)


@pytest.fixture(scope="module")
def expected():
    answers = load_pipeline()(TEXTS, top_k=None)
    return [
        [(label["label"], round(label["score"], 4), label["exit_layer"]) for label in labels] for labels in answers
    ]


def labels_of(answer):
    return [(label["label"], round(label["score"], 4), label["exit_layer"]) for label in answer]


def assert_all_answered(found, expected):
    assert {status for _, status, _ in found} == {200}
    assert all(labels_of(answer) == expected[place] for place, _, answer in found)


def test_it_is_reached_from_this_machine_alone(server):
    family = psutil.Process(server.process.pid)
    listening = [
        connection.laddr
        for process in [family, *family.children(recursive=True)]
        if is_running(process)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert server.port in {address.port for address in listening}
    assert {address.ip for address in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_killed_process_loses_nothing(server, expected):
    server.wait_until(lambda: len(server.replicas()) == 2)
    before = {process.pid for process in server.replicas()}
    with Callers(server.port) as callers:
        callers.wait_for_more()
        server.replicas()[0].kill()
        callers.wait_for_more(100)
        server.wait_until(lambda: len(server.replicas()) == 2)
    assert_all_answered(callers.found, expected)
    assert len({process.pid for process in server.replicas()} - before) == 1


def test_settings_change_without_a_lost_request(server, expected):
    processes = {process.pid for process in server.replicas()}
    with Callers(server.port) as callers:
        callers.wait_for_more()
        server.reload(slo_ms=20_000, max_speed=0.7)
        callers.wait_for_more()
        server.reload(slo_ms=20_000, model="no/such-model")
        callers.wait_for_more()
    assert_all_answered(callers.found, expected)
    info = server.info()
    assert info["max_speed"] == 0.7 and info["slo_ms"] == 20_000
    with Callers(server.port) as callers:
        callers.wait_for_more()
        server.reload(slo_ms=20_000, speed=0.0)
        callers.wait_for_more()
    assert {status for _, status, _ in callers.found} == {200}
    assert {label["exit_layer"] for _, _, answer in callers.found[-4:] for label in answer} == {6}
    assert {process.pid for process in server.replicas()} == processes, "they go on with other settings"


def test_it_ends_when_what_waits_is_answered(server):
    family = psutil.Process(server.process.pid).children(recursive=True)
    with Callers(server.port) as callers:
        callers.wait_for_more()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
        callers.wait_for_more()
    statuses = [status for _, status, _ in callers.found]
    # A pipe breaks where a reset comes while the caller still writes.
    not_let_in = {"ConnectionRefusedError", "ConnectionResetError", "BrokenPipeError"}
    assert set(statuses) <= {200, 503, "RemoteDisconnected", *not_let_in}
    assert 503 in statuses and statuses[-1] == "ConnectionRefusedError"
    # Nobody is cut off: who was let in is answered, and who comes later is told.
    assert statuses.count("RemoteDisconnected") == 0
    assert server.process.returncode == 0
    end = time.monotonic() + 30
    while any(is_running(process) for process in family):
        assert time.monotonic() < end, [process.cmdline() for process in family if is_running(process)]
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--replicas", "0"], "replicas must be at least 1"),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas must be at least --replicas"),
        (["--slo-ms", "0"], "slo_ms must be"),
        (["--max-speed", "3"], "speed"),
        (["--model", "no/such-model"], "no/such-model"),
        (["--settings", "nowhere.json"], "nowhere.json"),
        (["--port", "1", "--host", "192.0.2.77"], "--port"),
        (["--speed", "0.1", "--speedup", "2"], "not allowed with"),
    ],
)
def test_a_wrong_option_is_one_line(words, message, monkeypatch):
    import fastbert_hf_cli

    monkeypatch.setattr(sys, "argv", ["fastbert-hf", "serve", *words])
    with pytest.raises(SystemExit) as ended:
        fastbert_hf_cli.main()
    assert message in str(ended.value) and len(str(ended.value).splitlines()) == 1
