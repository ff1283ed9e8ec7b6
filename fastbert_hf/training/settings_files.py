"""`settings.json`: what a training depends on, so that its folder is not taken for that of another one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ..files import write_whole


if TYPE_CHECKING:
    from datasets import Dataset


# Fields of `TrainingArguments` that do not change the trained model, and how the names of others begin.
WITHOUT_EFFECT = ("disable_tqdm", "output_dir", "per_device_eval_batch_size", "report_to", "run_name", "use_cpu")
WITHOUT_EFFECT_BEGIN = ("dataloader_num", "dataloader_p", "do_", "hub_", "log", "push_")


def check_settings(folder: str | os.PathLike, settings: Mapping[str, Any], in_use: bool) -> None:
    """
    Write the settings of a training into `settings.json`; or, if the folder is in use, check that they are the same.

    Args:
        folder (`str` or `PathLike`): Of the training.
        settings (`Mapping`): What its results depend on.
        in_use (`bool`): Whether the folder holds results or checkpoints.

    Raises:
        ValueError: If the folder is in use and its settings are others, or not known. Names each difference.
    """
    path = Path(folder, "settings.json")
    settings = json.loads(json.dumps(settings, default=str))
    if not in_use:
        write_whole(path, json.dumps(settings, indent=1) + "\n")
        return
    if not path.exists():
        raise ValueError(
            f"{folder} holds a model without the settings of its training (settings.json): give another output_dir."
        )
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): give another output_dir, or delete the folder.") from error
    if any(name.startswith("size of ") for name in before):
        raise ValueError(
            f"{folder} holds a training by an earlier version, which knew its files by their sizes alone, so nobody "
            "can tell whether they are the same: give another output_dir, or delete the folder. A finished model in "
            "it can be used as it is."
        )
    changed = [name for name in sorted({*before, *settings}) if before.get(name) != settings.get(name)]
    if changed:
        differences = ", ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in changed)
        raise ValueError(
            f"{folder} holds a training with other settings ({differences}): give another output_dir, or delete the "
            "folder."
        )


def changes_the_model(argument: str) -> bool:
    """Return whether a trained model depends on a field of `TrainingArguments`."""
    return argument not in WITHOUT_EFFECT and not argument.startswith(WITHOUT_EFFECT_BEGIN)


def digest_of(rows: Dataset) -> str:
    """Return what tells the token ids and labels of these rows from others."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row["input_ids"], row.get("labels"))).encode())
    return digest.hexdigest()[:16]


def digest_of_weights(model: PreTrainedModel) -> str:
    """Return what tells a model of these weights from others."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]
