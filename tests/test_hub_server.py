"""What the Hub of these tests refuses, as the real one does."""

from __future__ import annotations

import hashlib
import http.client
import json

import pytest

from .hub_server import HubServer


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/repos/create", {"name": "name", "organization": "org"}, 401),
        ("GET", "/api/models/org/nowhere", {}, 404),
        ("PUT", f"/lfs/{'0' * 64}", {}, 403),
        ("PUT", f"/lfs/{'0' * 64}?signature=SIGNATURE", {}, 400),
        ("PUT", f"/lfs/{hashlib.sha256(b'{}').hexdigest()}?signature=SIGNATURE", {}, 200),
        ("POST", "/api/validate-yaml", {"content": "---\nlicense: mit\n---\n"}, 200),
        ("POST", "/api/validate-yaml", {"content": "---\nlicense: [mit\n---\n"}, 400),
        ("GET", "/api/datasets/org/name", {}, 404),
    ],
)
def test_server_refuses_what_the_hub_refuses(method, path, body, status):
    with HubServer() as hub:
        connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=10)
        connection.request(method, path.replace("SIGNATURE", hub.signature), json.dumps(body))
        assert connection.getresponse().status == status
        connection.close()
        assert hub.repositories == {}
        assert len(hub.lfs_uploads) == (method == "PUT" and status == 200)
