"""A small Hugging Face Hub on the loopback interface, and processes in which the real client talks to it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


PROJECT = Path(__file__).resolve().parents[1]
# Every new repository of the Hub begins with a commit of this file.
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"

REPO, REVISION = r"/(?P<repo_id>[^/]+/[^/]+)", r"/(?P<revision>[^/]+)"
ROUTES = {
    "validate_card": ("POST", r"/api/validate-yaml"),
    "create_repo": ("POST", r"/api/repos/create"),
    "model_info": ("GET", rf"/api/models{REPO}(/revision{REVISION})?"),
    "list_tree": ("GET", rf"/api/models{REPO}/tree{REVISION}(/(?P<folder>.+))?"),
    "create_branch": ("POST", rf"/api/models{REPO}/branch/(?P<branch>[^/]+)"),
    "preupload": ("POST", rf"/api/models{REPO}/preupload{REVISION}"),
    "commit": ("POST", rf"/api/models{REPO}/commit{REVISION}"),
    "lfs_batch": ("POST", rf"{REPO}\.git/info/lfs/objects/batch"),
    "lfs_upload": ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    "resolve": ("GET", rf"{REPO}/resolve{REVISION}/(?P<path>.+)"),
}
READS = {"validate_card", "model_info", "list_tree", "resolve"}


@dataclass
class StoredFile:
    """A file of a commit. `lfs`: whether its content came through the LFS endpoints."""

    content: bytes
    lfs: bool = False

    @property
    def oid(self) -> str:
        """What the client compares with its own copy: SHA-256 of an LFS file, else the hash that git gives it."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class Repository:
    """Commits and the branches that point to them. A commit is all its files by path."""

    def __init__(self):
        self.commits: dict[str, dict[str, StoredFile]] = {}
        self.branches: dict[str, str] = {}
        self.add_commit("main", {".gitattributes": StoredFile(GIT_ATTRIBUTES)})

    def add_commit(self, branch: str, files: dict[str, StoredFile]) -> str:
        sha = os.urandom(20).hex()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def find(self, revision: str) -> str:
        """The commit that a branch or a commit hash names."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


class HubError(Exception):
    """An answer other than 200. The client makes its own exceptions of `code`."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}


class HubServer:
    """
    A Hub for models, in memory. What it keeps is open to inspection, also after it has stopped: `repositories`,
    `lfs_uploads` (content by SHA-256) and `requests` (method, path and status). Who writes needs `token`; reading is
    free. Not handled: private repositories, data sets and Spaces, tags, pull requests, ranges, Xet.

    Example:

    ```python
    >>> with HubServer() as hub:
    ...     answer = run_with_hub(hub, tmp_path / "home", some_function, "org/name")
    >>> hub.files("org/name")["config.json"].content
    ```
    """

    token = "hf_token_of_the_tests"

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.lfs_uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # Where an upload goes is signed, as the client sends no token there.
        self.signature = os.urandom(8).hex()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def stop(self) -> None:
        """From here on nobody answers at the endpoint. May be called again."""
        self._server.shutdown()
        self._server.server_close()

    def repository(self, repo_id: str) -> Repository:
        if repo_id not in self.repositories:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.repositories[repo_id]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, StoredFile]:
        repository = self.repository(repo_id)
        return repository.commits[repository.find(revision)]

    def card(self, repo_id: str, revision: str = "main") -> dict[str, Any]:
        """Metadata of the model card; empty without one."""
        readme = self.files(repo_id, revision).get("README.md")
        return card_metadata(readme.content.decode()) if readme else {}


def card_metadata(readme: str) -> dict[str, Any]:
    """What stands between the two lines of dashes at the top of a README."""
    block = re.match(r"\s*---\r?\n(.*?)^---\s*$", readme, re.DOTALL | re.MULTILINE)
    metadata = (yaml.safe_load(block[1]) or {}) if block else {}
    if not isinstance(metadata, dict):
        raise yaml.YAMLError("the metadata of a model card must be a mapping")
    return metadata


class HubHandler(BaseHTTPRequestHandler):
    """One method for each of `ROUTES`. It returns what is sent as JSON, or sends the answer itself."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    # Headers and body leave in two writes; without this the second waits for the client's acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, *arguments) -> None:
        """Says nothing: `HubServer.requests` has it all."""

    def handle(self) -> None:
        # A process that ends lets go of its connections without a word.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def answer_request(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for name, (its_method, pattern) in ROUTES.items():
                match = re.fullmatch(pattern, url.path)
                if match and method == its_method:
                    self.check_access(name)
                    groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    answer = getattr(self, name)(**groups)
                    if answer is not None:
                        self.send(200, json.dumps(answer).encode())
                    return
            raise HubError(404, f"This Hub has no {self.command} {url.path}")
        except HubError as error:
            self.send(error.status, json.dumps({"error": str(error)}).encode(), error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer_request

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def check_access(self, name: str) -> None:
        if name == "lfs_upload":
            if self.query.get("signature") != self.hub.signature:
                raise HubError(403, "Signature does not match")
        elif name not in READS and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise HubError(401, "Invalid credentials in Authorization header")

    def validate_card(self):
        try:
            metadata = card_metadata(json.loads(self.body)["content"])
        except yaml.YAMLError as error:
            return self.send(400, json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode())
        return {"errors": [], "warnings": [] if metadata else [{"message": "empty or missing yaml metadata"}]}

    def create_repo(self):
        request = json.loads(self.body)
        repo_id = f"{request['organization'] or 'tester'}/{request['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            return self.send(409, json.dumps(answer).encode())
        self.hub.repositories[repo_id] = Repository()
        return answer

    def create_branch(self, repo_id, branch):
        repository = self.hub.repository(repo_id)
        if branch in repository.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repository.branches[branch] = repository.find(json.loads(self.body).get("startingPoint", "main"))
        return {}

    def model_info(self, repo_id, revision="main"):
        card = self.hub.card(repo_id, revision)
        return {
            "id": repo_id,
            "sha": self.hub.repository(repo_id).find(revision),
            "private": False,
            "cardData": card,
            "siblings": [{"rfilename": path} for path in self.hub.files(repo_id, revision)],
            **{name: card[name] for name in ("library_name", "pipeline_tag", "tags") if name in card},
        }

    def list_tree(self, repo_id, revision, folder=""):
        prefix, entries = f"{folder}/" if folder else "", []
        for path, file in self.hub.files(repo_id, revision).items():
            if path.startswith(prefix) and (self.query["recursive"] == "true" or "/" not in path[len(prefix) :]):
                size = len(file.content)
                lfs = {"lfs": {"oid": file.oid, "size": size, "pointerSize": 130}} if file.lfs else {}
                entries.append({"type": "file", "path": path, "oid": file.oid, "size": size, **lfs})
        if not entries:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        return entries

    def preupload(self, repo_id, revision):
        there, files = self.hub.files(repo_id, revision), []
        for file in json.loads(self.body)["files"]:
            # The Hub goes by .gitattributes, too, but all that they list is binary.
            mode = "lfs" if b"\0" in base64.b64decode(file["sample"]) else "regular"
            oid = there[file["path"]].oid if file["path"] in there else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def lfs_batch(self, repo_id):
        self.hub.repository(repo_id)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.lfs_uploads:
                upload = f"{self.hub.endpoint}/lfs/{entry['oid']}?signature={self.hub.signature}"
                entry["actions"] = {"upload": {"href": upload}}
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not match its SHA-256")
        self.hub.lfs_uploads[oid] = self.body
        return {}

    def commit(self, repo_id, revision):
        repository = self.hub.repository(repo_id)
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if "create_pr" in self.query:
            raise HubError(400, "This Hub has no pull requests")
        files = dict(self.hub.files(repo_id, revision))
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs_uploads:
                    raise HubError(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = StoredFile(self.hub.lfs_uploads[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key != "header":
                raise HubError(400, f"This Hub cannot commit a {key}")
        sha = repository.add_commit(revision, files)
        return {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha}

    def resolve(self, repo_id, revision, path):
        sha = self.hub.repository(repo_id).find(revision)
        file = self.hub.files(repo_id, sha).get(path)
        headers = {"X-Repo-Commit": sha}
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{file.oid}"'
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        self.send(200, file.content, headers)


# What each process runs. It notes every address that it connects to.
IN_PROCESS = """
import importlib, json, sys
hosts = set()
def note(event, args):
    if event == "socket.connect":
        hosts.add(str(args[1][0]))
sys.addaudithook(note)
module, name, *args = sys.argv[1:]
answer = getattr(importlib.import_module(module), name)(*args)
print(json.dumps({"answer": answer, "hosts": sorted(hosts)}))
"""


def run_with_hub(
    hub: HubServer, home: Path, function: Callable, *args, offline: bool = False, token: str | None = HubServer.token
) -> Any:
    """
    What `function(*args)` returns in a fresh process whose Hub is `hub`. Fails where the function does, and where that
    process reached beyond the loopback interface; offline, for anything at all.

    Args:
        hub (`HubServer`): May have stopped.
        home (`Path`): `HF_HOME` of the process. A cache is filled there, and found there by the next process.
        function (`Callable`): At the top level of a module below `tests`; what it returns must be JSON.
        args: Strings and paths, which arrive as strings.
        offline (`bool`, *optional*, defaults to `False`): Whether to set `HF_HUB_OFFLINE`.
        token (`str`, *optional*): Whom the client speaks for. `None` for nobody.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_"))
        and not name.lower().endswith("_proxy")
    }
    environment |= {
        # The client reads these once, when it is imported, which is why it runs in processes of its own.
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    if token is not None:
        environment["HF_TOKEN"] = token
    finished = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, function.__module__, function.__name__, *map(str, args)],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    result = json.loads(finished.stdout.splitlines()[-1])
    assert set(result["hosts"]) <= (set() if offline else {"127.0.0.1"}), result["hosts"]
    return result["answer"]
