"""The files of a checkpoint: where they are, and what their headers say."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

# A modeling file does not import safetensors itself; this is its reader.
from transformers.modeling_utils import safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    has_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from .checkpoint_checks import WEIGHTS_FILE, shortened


# Bytes, in all files: a model of 1,000 layers with its exits needs 4 MB, and reading takes up to 20 times as much.
LARGEST_HEADERS = 5_000_000


def find_weights(
    name_or_path: str | os.PathLike, filename: str | None = None, variant: str | None = None, **download
) -> list[str]:
    """
    Return the safetensors files of a folder, file or repository, downloaded where they are not on this machine.

    `filename` is what the config names in place of model.safetensors, `download` says where files are.
    """
    subfolder = download.get("subfolder") or ""
    folder = os.path.join(name_or_path, subfolder)
    if os.path.isfile(name_or_path):
        if not str(name_or_path).endswith(".safetensors"):
            raise ValueError(f"{name_or_path} is not a safetensors file: give the folder of a checkpoint.")
        return [str(name_or_path)]
    if any(Path(folder).glob("shard-*-model-*.safetensors")):
        raise ValueError(
            f"{folder} is a distributed checkpoint (shard-*-model-*.safetensors), which FastBERT does not read: save "
            "it with model.save_pretrained(folder)."
        )
    names = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    if variant is not None:  # model.fp16.safetensors, model.safetensors.index.fp16.json
        names = [f".{variant}.".join(name.rsplit(".", 1)) for name in names]
    for name in [filename] if filename else names:
        path = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **download)
        if path is not None and name.endswith(".json"):
            check_index(path)
            files, _ = get_checkpoint_shard_files(name_or_path, path, **download)
            for file in files:
                if not os.path.isfile(file):
                    raise OSError(f"{path} names {file}, which does not exist: download or save the checkpoint again.")
            return files
        if path is not None:
            return [path]
    places = {name: download.get(name) for name in ("revision", "proxies", "token", "cache_dir")}
    offline = bool(download.get("local_files_only"))
    for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if has_file(name_or_path, os.path.join(subfolder, name), local_files_only=offline, **places):
            raise OSError(lines_that_convert(name_or_path, subfolder, name))
    raise OSError(
        f"{folder} has no {' and no '.join([filename] if filename else names)}: give a folder that "
        "model.save_pretrained(folder) wrote, or the id of such a repository."
    )


def read_shapes(files: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in safetensors files, whose headers are checked against the files' sizes."""
    return {name: shape for name, (shape, _) in read_headers(files).items()}


def read_headers(files: list[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and the dtype, as safetensors calls it, of every tensor, as [`read_shapes`]."""
    headers, bytes_left = {}, LARGEST_HEADERS
    for file in files:
        with open(file, "rb") as weights:
            length = int.from_bytes(weights.read(8), "little")
        if length > os.path.getsize(file) - 8 or length > bytes_left:
            raise OSError(
                f"{file} says that its header has {length:,} bytes, but the file has {os.path.getsize(file):,}, and "
                f"the headers of a checkpoint at most {LARGEST_HEADERS:,}: it was cut off, or is no safetensors file. "
                "Download or save it again."
            )
        bytes_left -= length
        try:
            # NumPy's mapping of the file takes no memory, PyTorch's asks for all of it.
            with safe_open(file, framework="np") as weights:
                slices = {name: weights.get_slice(name) for name in weights.keys()}
                headers.update({name: (tuple(own.get_shape()), own.get_dtype()) for name, own in slices.items()})
        except Exception as error:  # the library's own class of error has no name outside it
            raise OSError(f"{file} is no whole safetensors file ({error}). Download or save it again.") from error
    return headers


def check_index(path: str) -> None:
    """Raise unless an index maps weights to safetensors files in its own folder."""
    try:
        if os.path.getsize(path) > LARGEST_HEADERS:
            raise ValueError(f"more than {LARGEST_HEADERS:,} bytes")
        index = json.loads(Path(path).read_text(encoding="utf-8"))
        files, has_metadata = set(index["weight_map"].values()), isinstance(index["metadata"], dict)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{path} is no index of weights ({shortened(error)}): save the checkpoint again.") from error
    strange = [name for name in files if not re.fullmatch(WEIGHTS_FILE, str(name))]
    if strange or not files or not has_metadata:
        raise ValueError(
            f"{path} names {shortened(strange or files)} where only safetensors files of its own folder may be, as in "
            '"model-00001-of-00002.safetensors": save the checkpoint again with model.save_pretrained(folder).'
        )


def lines_that_convert(name_or_path: str | os.PathLike, subfolder: str, name: str) -> str:
    """Return why a .bin is not read, and how to convert it."""
    folder = f"{str(name_or_path)!r}" if os.path.isdir(name_or_path) else f"snapshot_download({str(name_or_path)!r})"
    return (
        f"{os.path.join(name_or_path, subfolder)} has its weights in {name} alone. FastBERT checkpoints are "
        "safetensors only, as a .bin can run code when it is opened. Convert it once, and load that folder:\n\n"
        "from pathlib import Path\nimport torch\nfrom huggingface_hub import snapshot_download\n"
        f"from safetensors.torch import save_file\nfolder, weights = Path({folder}, {subfolder!r}), {{}}\n"
        'for file in folder.glob("pytorch_model*.bin"):\n'
        "    weights.update(torch.load(file, weights_only=True))\n"
        f'save_file(weights, folder / "{SAFE_WEIGHTS_NAME}", metadata={{"format": "pt"}})\n'
    )
