"""The server over HTTP: its answers are those of the pipeline, and nothing that is sent harms anybody else."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from pathlib import Path

import pytest

from fastbert_hf import DEFAULT_MODEL_DIR
from fastbert_hf.serving.loading import load_pipeline

from .common import LocalModel, ask, running_server


pytest.importorskip("fastapi", reason="the server needs the extra ray")

from fastbert_hf.serving.served_model import ServerSettings
from fastbert_hf.serving.text_server import Limits


TEXT = "The plot is thin, but the cast makes it a joy."
LONG = "dull " * 2000
MOST_BYTES = 50_000
KEY = "a key"


@pytest.fixture(scope="module")
def model():
    # All the time in the world: these tests are about what is answered, not when.
    return LocalModel(ServerSettings(slo_ms=60_000))


@pytest.fixture(scope="module")
def port(model):
    with running_server(model, Limits(max_body_bytes=MOST_BYTES)) as (_, port):
        yield port


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def rounded(labels):
    return [{**label, "score": round(label["score"], 5)} for label in labels]


@pytest.mark.parametrize("dial", [{}, {"speed": 0}, {"speed": 1.0}, {"speedup": 2.5}, {"max_disagreement": 0.02}])
def test_answers_are_those_of_the_pipeline(port, pipeline, dial):
    texts = [TEXT, "Dreadful.", "", "It is what it is, and it is not much of anything at all, really."]
    status, answers, _ = ask(port, {"inputs": [[text] for text in texts], **dial})
    expected = pipeline(texts, top_k=None, **(dial or {"speed": 0.49}))
    assert status == 200
    assert [rounded(labels) for labels in answers] == [rounded(labels) for labels in expected]


def test_one_text_has_one_list_and_a_pair_is_one_text(port, pipeline):
    assert rounded(ask(port, {"inputs": TEXT})[1]) == rounded(pipeline(TEXT, top_k=None))
    assert ask(port, {"inputs": [TEXT]})[1] == ask(port, {"inputs": TEXT})[1]
    pair = pipeline({"text": TEXT, "text_pair": "Dreadful."}, top_k=None)
    assert rounded(ask(port, {"inputs": [TEXT, "Dreadful."]})[1]) == rounded(pair)
    mixed = ask(port, {"inputs": [[TEXT, "Dreadful."], [TEXT]]})[1]
    assert [rounded(labels) for labels in mixed] == [rounded(pair), rounded(pipeline(TEXT, top_k=None))]


def test_logits_the_best_labels_and_cut_texts(port, pipeline):
    (best,) = ask(port, {"inputs": TEXT, "top_k": 1})[1]
    assert best["label"] == "positive" and set(best) == {"label", "score", "exit_layer"}
    raw = ask(port, {"inputs": TEXT, "raw_scores": True})[1]
    assert rounded(raw) == rounded(pipeline(TEXT, top_k=None, function_to_apply="none"))
    words = "dull " * 600 + "wonderful " * 600
    for side, read in (("Right", "dull " * 510), ("left", "wonderful " * 510)):
        cut = ask(port, {"inputs": words, "truncate": True, "truncation_direction": side, "speed": 0})[1]
        assert rounded(cut) == rounded(pipeline(read, top_k=None, speed=0))


def test_what_the_model_is_and_what_it_counts(port):
    ask(port, {"inputs": TEXT})
    info = ask(port, path="/info")[1]
    assert info["max_input_length"] == 512 and info["num_layers"] == 6 and info["speed"] == 0.49
    assert info["model_type"]["classifier"]["label2id"] == {"negative": 0, "positive": 1}
    assert info["dials"] == {"speed": None, "speedup": None, "max_disagreement": None}
    assert ask(port, path="/health")[0] == 200
    lines = ask(port, path="/metrics")[1].splitlines()
    counts = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(counts['te_request_count{method="single"}']) >= 1
    assert float(counts["te_request_duration_count"]) >= 1
    assert sum(float(value) for name, value in counts.items() if name.startswith("fastbert_exit_layer_total")) >= 1
    assert {"te_queue_size", "fastbert_shed_total", "te_batch_next_tokens_sum", "fastbert_speed_sum"} <= set(counts)
    schema = ask(port, path="/openapi.json")[1]["paths"]["/predict"]["post"]
    assert {"200", "413", "422", "424", "429", "503"} <= set(schema["responses"])
    assert "inputs" in json.dumps(schema["requestBody"]) and ask(port, path="/docs")[0] == 200


WRONG = {
    "inputs": (
        None,
        1,
        True,
        {},
        {"text": "a"},
        [],
        [[]],
        [["a", "b", "c"]],
        ["a", "b", "c"],
        [["a"], "b"],
        [None],
        [[1]],
    ),
    "truncate": ("yes", 1, 0.0, [], {}),
    "truncation_direction": ("up", 1, None, [], {}, ""),
    "raw_scores": ("yes", 1, None, [], {}),
    "top_k": (0, -1, "1", True, 1.5, 2.0, [], {}),
    "speed": (-0.1, 1.1, "0.5", True, [], [0.5], {}, 10**400),
    "speedup": (0, 0.5, 1e9, -1, "2", True, [2.0], {}, 10**400),
    "max_disagreement": (0, 1, -1, "1", True, [0.1], {}, 1e-300),
}
FIELDS = [json.dumps({"inputs": TEXT, name: value}).encode() for name, values in WRONG.items() for value in values]
NUMBERS = [
    f'{{"inputs": "a", "{name}": {value}}}'.encode()
    for name, value in itertools.product(("speed", "speedup"), ("NaN", "Infinity", "-Infinity", "1e999"))
]
BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\x00",
    b"\xff\xfe{}",
    b"inputs=a",
    b"{'inputs': 'a'}",
    b'{"inputs": "a",}',
    b'{"inputs": "\\ud800"}',
    b'{"inputs": "\\udc00\\ud800"}',
    b'{"inputs": "\xed\xa0\x80"}',
    b"[" * 10_000,
    b'{"a":' * 8_000,
    b'{"inputs": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    b'{"inputs": "a"} {"inputs": "b"}',
    b'{"inputs": "a", "model": "org/other"}',
    b'{"inputs": "a", "trust_remote_code": true}',
    b'{"inputs": "a", "speed": 0.5, "speedup": 2}',
    b'{"inputs": "a", "speed": 0.5, "max_disagreement": 0.1}',
    b'{"inputs": "a", "__class__": "os.system"}',
    b'{"inputs": "a", "Inputs": "b"}',
    b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    json.dumps({"inputs": LONG}).encode(),
    json.dumps({"inputs": ["a", LONG]}).encode(),
    json.dumps({"inputs": "a" * 40_000}).encode(),
    json.dumps({"inputs": "a", "x" * 10_000: 1}).encode(),
]
SENT = [(body, 422) for body in (*FIELDS, *NUMBERS, *BODIES)]
SENT += [
    (b" " * (MOST_BYTES + 1), 413),
    (json.dumps({"inputs": [["a"]] * 33}).encode(), 413),
    (json.dumps({"inputs": [["a"]] * 5000}).encode(), 413),
]
# What looks bad and is a text like any other.
STRANGE = ["", " ", "\x00", "\U0010ffff", "a" * 20_000, "\n" * 5000, "؁" * 3000, "'; DROP TABLE texts; --", "<script>"]


def test_a_hundred_hostile_requests_get_their_codes_and_harm_nobody(port, pipeline):
    """While they come, another caller gets the right answers, and no memory is kept."""
    expected, wrong, stop = rounded(pipeline(TEXT, top_k=None)), [], threading.Event()

    def other_caller():
        while not stop.is_set():
            status, answer, _ = ask(port, {"inputs": TEXT})
            if status != 200 or rounded(answer) != expected:
                wrong.append((status, answer))

    assert len(SENT) >= 100
    caller = threading.Thread(target=other_caller)
    caller.start()
    try:
        for body, status in SENT:
            found, answer, _ = ask(port, body)
            assert found == status, (body[:80], found, answer)
            assert set(answer) == {"error", "error_type"} and len(answer["error"]) < 400, (body[:80], answer)
        for text in STRANGE:
            status, answer, _ = ask(port, {"inputs": text, "truncate": True})
            assert status == 200, (text[:20], answer)
        before = resident_bytes()
        for _ in range(20):
            assert ask(port, b" " * 5_000_000)[0] == 413
            assert sent_in_chunks(port, 5_000_000) == 413
        assert resident_bytes() - before < 60e6
    finally:
        stop.set()
        caller.join()
    assert not wrong


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def sent_in_chunks(port: int, size: int) -> int:
    """Return the status of a body whose length nobody said."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        part = b"%x\r\n" % 50_000 + b" " * 50_000 + b"\r\n"
        try:
            for _ in range(size // 50_000):
                connection.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was refused before all was sent
        return int(connection.recv(100).split()[1])


RAW = {
    "no HTTP": b"hello\r\n\r\n",
    "a negative length": b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\nx",
    "two lengths": b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "a length and chunks": b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: x\r\n\r\nx",
    "a huge header": b"GET /info HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    "another route": b"GET /../../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n",
    "another method": b"DELETE /predict HTTP/1.1\r\nHost: a\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_request_is_refused(port, name):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(RAW[name])
        answer = connection.recv(200)
    assert not answer or 400 <= int(answer.split()[1]) < 500, answer
    assert ask(port, {"inputs": TEXT})[0] == 200


def test_slow_clients_are_not_waited_for_and_hold_nobody_up(port, monkeypatch):
    monkeypatch.setattr("fastbert_hf.serving.text_server.SECONDS_TO_SEND", 0.5)
    start = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"
    slow = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(50)]
    try:
        for connection in slow:
            connection.sendall(start)
        started = time.monotonic()
        assert ask(port, {"inputs": TEXT})[0] == 200
        assert time.monotonic() - started < 5
        assert {int(connection.recv(100).split()[1]) for connection in slow} == {408}
    finally:
        for connection in slow:
            connection.close()


def test_who_hangs_up_harms_nobody(port):
    body = json.dumps({"inputs": [[TEXT]] * 32}).encode()
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert ask(port, {"inputs": TEXT})[0] == 200


def test_a_key_is_asked_for_where_there_is_one(model):
    with running_server(model, api_key=KEY) as (_, port):
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": KEY}, {"Authorization": "Bearer é"}):
            sent = {name: value.encode().decode("latin-1") for name, value in headers.items()}
            assert ask(port, {"inputs": TEXT}, headers=sent)[0] == 401
            assert ask(port, path="/metrics", headers=sent)[0] == ask(port, path="/info", headers=sent)[0] == 401
        assert ask(port, path="/health")[0] == 200
        assert ask(port, {"inputs": TEXT}, headers={"Authorization": f"Bearer {KEY}"})[0] == 200


def test_too_much_at_once_is_refused_with_when_to_come_again(model):
    # Nothing can be answered within a hundredth of a millisecond, unless nothing else waits.
    before = model.model
    model.model = type(before)(ServerSettings(slo_ms=0.01), before)
    try:
        with running_server(model) as (server, port):
            found, threads = [], []
            for _ in range(40):
                threads.append(threading.Thread(target=lambda: found.append(ask(port, {"inputs": [[TEXT]] * 8}))))
                threads[-1].start()
            for thread in threads:
                thread.join()
            refused = [(answer, headers) for status, answer, headers in found if status == 429]
            assert refused and {status for status, _, _ in found} <= {200, 429}
            assert all(answer["error_type"] == "Overloaded" for answer, _ in refused)
            assert all(int(headers["retry-after"]) >= 1 for _, headers in refused)
            server.drains = True
            assert ask(port, {"inputs": TEXT})[0] == ask(port, path="/health")[0] == 503
    finally:
        model.model = before


def test_more_requests_than_allowed_are_refused(model):
    with running_server(model, Limits(max_concurrent_requests=1)) as (_, port):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
            while ask(port, {"inputs": TEXT})[0] != 429:
                time.sleep(0.01)


def test_a_model_that_fails_is_told_and_its_batch_mates_are_answered(model, port, monkeypatch):
    predictions = model.model.pipeline.predictions

    def failing(encoded, **asked):
        if "speedup" in asked:
            raise RuntimeError("no memory")
        return predictions(encoded, **asked)

    monkeypatch.setattr(model.model.pipeline, "predictions", failing)
    status, answer, _ = ask(port, {"inputs": TEXT, "speedup": 2})
    assert status == 424 and answer["error_type"] == "Backend" and "no memory" in answer["error"]
    assert ask(port, {"inputs": TEXT})[0] == 200


BAD_SETTINGS = {
    "slo_ms": [0, -1, float("nan"), float("inf"), "1", True],
    "max_speed": [0.1, 2.0],
    "max_speedup": [1.0001, 100.0],
    "speedup": [100.0],
    "max_disagreement": [1e-9, 2],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_SETTINGS.items() for value in values]
)
def test_settings_that_cannot_be_are_refused(name, value):
    from fastbert_hf.serving.served_model import check_server_settings

    with pytest.raises(ValueError, match=r"\d|number"):
        check_server_settings(
            ServerSettings(**{name: value, **({"speed": 0.6} if name.startswith("max_speed") else {})})
        )


def test_load_never_leads_beyond_what_was_certified(model):
    from fastbert_hf.modeling.dials import certified_speed

    served = type(model.model)(ServerSettings(max_disagreement=0.02), model.model)
    control = served.describe().control()
    assert control.speeds[-1] == certified_speed(served.pipeline.model.config.certification, 0.02)
    assert control.speeds[0] == control.speeds[-1] < model.model.describe().control().speeds[-1]
    # Texts that are cut to another length are others than those of the certificate.
    with pytest.raises(ValueError, match="max_length=512"):
        type(model.model)(ServerSettings(max_disagreement=0.02, max_length=128))


def test_a_model_that_was_not_calibrated_has_one_speed(tmp_path):
    from fastbert_hf import FastBertForSequenceClassification

    model = FastBertForSequenceClassification.from_pretrained(DEFAULT_MODEL_DIR)
    model.config.calibration = model.config.certification = model.config.gates = None
    model.save_pretrained(tmp_path)
    load_pipeline().tokenizer.save_pretrained(tmp_path)
    local = LocalModel(ServerSettings(model=str(tmp_path), speed=0.3))
    control = local.model.describe().control()
    assert control.speeds.tolist() == [0.3]
    assert local.model.refusals["speed"] is None and "calibrate" in local.model.refusals["speedup"]
    with pytest.raises(ValueError, match="calibrated"):
        type(local.model)(ServerSettings(model=str(tmp_path), max_speed=0.5), local.model)
