"""Write files and folders whole or not at all, so that an interruption leaves nothing that is half written."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a text file under a temporary name and rename it. Makes the folders above it where they are missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def move_whole(part: str | os.PathLike, folder: str | os.PathLike, last: str) -> None:
    """
    Move every file of one folder into another, and remove the first. Other files in `folder` stay.

    Args:
        part (`str` or `PathLike`): Folder of finished files.
        folder (`str` or `PathLike`): Where they belong; made if it is missing.
        last (`str`): Name of the file that is moved last. Where it exists, all files are there.
    """
    part, folder = Path(part), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(part.iterdir(), key=lambda path: path.name == last):
        os.replace(path, folder / path.name)
    part.rmdir()
