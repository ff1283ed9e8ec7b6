"""The images: what they copy is there and let through, and what they run is understood."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import fastbert_hf_cli


ROOT = Path(__file__).parent.parent
# A line that ends with a backslash goes on.
LINES = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()


def stages() -> dict[str, list[str]]:
    """Return the instructions of each image."""
    found: dict[str, list[str]] = {}
    for line in LINES:
        if line.startswith("FROM "):
            found[line.split(" AS ")[1]] = []
        elif line and not line.startswith("#") and found:
            found[list(found)[-1]].append(line)
    return found


def test_what_is_copied_is_there_and_not_ignored():
    let_through = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        path for line in LINES if line.startswith("COPY ") and "--from" not in line for path in line.split()[1:-1]
    ]
    assert copied
    for path in copied:
        assert (ROOT / path).exists(), path
        assert any(fnmatch(path, pattern) or path.startswith(f"{pattern}/") for pattern in let_through), path


def test_nobody_runs_as_root_and_all_tell_of_their_health():
    for name in ("server", "reader"):
        words = [line.split()[0] for line in stages()[name]]
        assert words.count("USER") == 1 and words.count("HEALTHCHECK") == 1
        assert words.index("USER") < words.index("ENTRYPOINT")
        # What is installed belongs to root, so that who breaks in cannot change it.
        assert "RUN" not in words[words.index("USER") :]


def test_the_server_starts_with_options_that_there_are():
    (entry,) = (line for line in stages()["server"] if line.startswith("ENTRYPOINT"))
    program, *words = json.loads(entry.removeprefix("ENTRYPOINT "))
    options = fastbert_hf_cli.parser_of_all().parse_args([*words, "--model", "/model"])
    assert program == "fastbert-hf" and (options.command, options.host, options.port) == ("serve", "0.0.0.0", 8000)
    assert "EXPOSE 8000" in stages()["server"] and "8000/health" in "\n".join(stages()["server"])
