"""Checkpoints of a `Trainer` in a folder: which of them were written to their end."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

from ..modeling.checkpoint_files import read_shapes


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    Return the newest checkpoint in a folder that was written to its end, if there is one.

    Args:
        folder (`str` or `PathLike`): The `output_dir` of a `Trainer`.
    """
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(folder).glob("checkpoint-*")}
    checkpoints = sorted((int(step[1]), path) for path, step in steps.items() if step)
    return next((str(path) for _, path in reversed(checkpoints) if is_whole(path)), None)


def is_whole(checkpoint: Path) -> bool:
    """
    Return whether a checkpoint can be resumed from: its state is whole, which `Trainer` writes last, and no file
    before it was cut off, as far as their beginnings and ends tell.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        read_shapes(list(map(str, checkpoint.glob("*.safetensors"))))
    except (OSError, ValueError):  # among them a text that is no UTF-8
        return False
    # What PyTorch saves is a zip file, whose directory is at its end.
    return all(map(zipfile.is_zipfile, [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]))
