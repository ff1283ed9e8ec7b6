"""The folder of an exported model: what lies in it, and the check that it is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..files import move_whole, write_whole
from ..modeling.checkpoint_checks import shortened
from ..modeling.families import get_encoder_family, max_text_tokens, rotary_types
from ..modeling.teacher_digest import is_digest
from .backends import BACKENDS


# Written last: where it is, all is there.
STAGES_FILE = "stages.json"
FORMAT = 1
QUANTIZED = (None, "int8")
# Bytes of stages.json, which names some files: 1,000 layers make 300 KB.
LARGEST_LIST = 1_000_000
# A tokenizer that knows no limit says one of 10^30.
MOST_TOKENS = 1_000_000_000
EMBEDDINGS = "embeddings"
READER = "fastbert_reader.py"
# What an older export may have left.
GRAPH_FILE = re.compile(r"(embeddings|layers_[\d_]+|exit_\d+|probe)\.(onnx|xml|bin)|fastbert_reader\.py")
# A graph that tells whether this machine adds products of bytes exactly; see `exact_levels` of the int8 layers.
PROBE = "probe"


def layers_name(first: int, last: int) -> str:
    """Return what the graph of some layers is called."""
    return f"layers_{first:02d}" if first == last else f"layers_{first:02d}_{last:02d}"


def exit_name(depth: int) -> str:
    """Return what the graph of an exit is called."""
    return f"exit_{depth:02d}"


@dataclass(frozen=True)
class ExportFolder:
    """
    What `stages.json` says of a folder.

    Args:
        model (`dict`): What the graphs have of their config; see [`model_of`].
        backend (`str`): A key of `BACKENDS`.
        quantize (`str`, *optional*): `"int8"`, or `None` for float32.
        layers_per_stage (`int`): Layers in each graph.
        reading (`dict`): How the tokenizer reads texts; see [`reading_of`].
        weights (`str`): Digest of the weights that were exported, as calibrations know them; empty if it had none.
        static (`bool`): Whether scales of tokens are fixed, from texts, and not each token's own.
        files (`dict`): The SHA-256 of each file of a graph.
        format (`int`): Of this description.
    """

    model: dict[str, Any]
    backend: str
    quantize: str | None
    layers_per_stage: int
    reading: dict[str, Any]
    weights: str
    files: dict[str, str]
    static: bool = False
    format: int = FORMAT

    @property
    def num_layers(self) -> int:
        """All layers."""
        return self.model["num_hidden_layers"]

    @property
    def rotary(self) -> list[str]:
        """Types of attention with rotary embeddings of their own."""
        return self.model["rotary"]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and last layer of each graph of layers."""
        firsts = range(1, self.num_layers + 1, self.layers_per_stage)
        return [(first, min(first + self.layers_per_stage - 1, self.num_layers)) for first in firsts]

    @property
    def names(self) -> list[str]:
        """What all graphs are called."""
        layers = [layers_name(*span) for span in self.spans]
        exits = [exit_name(depth) for depth in range(1, self.num_layers + 1)]
        probe = [PROBE] if self.quantize and BACKENDS[self.backend].reads_levels else []
        return [EMBEDDINGS, *layers, *exits, *probe]

    @property
    def digest(self) -> str:
        """A digest of all graphs, as certificates know them."""
        dtype = "int8" if self.quantize else "float32"
        return f"{dtype}:{sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()[:16]}"

    def write(self, folder: Path) -> None:
        """Write `stages.json`."""
        write_whole(folder / STAGES_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: str | os.PathLike, config: PreTrainedConfig) -> Self:
        """
        Read `stages.json`, and check that it is of a config. Files are checked when they are loaded ([`contents`]).

        Raises:
            ValueError: If the folder is another one, half written, or broken.
        """
        folder = Path(folder)
        if not (folder / STAGES_FILE).is_file():
            raise ValueError(
                f"{folder} has no {STAGES_FILE}, so it is no exported model, or was not written to its end: "
                "fastbert_hf.export(model, folder)"
            )
        found = _described(folder)
        for name, value in model_of(config).items():
            if found.model.get(name) != value:
                raise ValueError(
                    f"the graphs of {folder} have {name}={shortened(found.model.get(name))}, and the config says "
                    f"{shortened(value)}: export again, or leave the config as it was written."
                )
        return found

    def contents(self, folder: Path, graph: str) -> list[bytes]:
        """Return the content of the files of a graph, if it is what was written there."""
        read = []
        for name in (graph + suffix for suffix in BACKENDS[self.backend].suffixes):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}, which {STAGES_FILE} names: export again.")
            read.append((folder / name).read_bytes())
            if sha256(read[-1]).hexdigest() != self.files[name]:
                raise ValueError(f"{folder / name} is not what was written there: export or download it again.")
        return read


def model_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what graphs have of a config, and what would be wrong with another one."""
    family = get_encoder_family(config.text_config)
    shapes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "pad_token_id")
    return {
        "model_type": config.text_config.model_type,
        **{name: getattr(config, name) for name in (*shapes, "num_labels", "coarsening", "feed_forward")},
        "positions": family.positions,
        "rotary": rotary_types(config.text_config),
        "max_length": max_text_tokens(config.text_config),
    }


def reading_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return how a tokenizer cuts texts, and whether it tells the texts of a pair apart."""
    return {
        "max_length": min(tokenizer.model_max_length, MOST_TOKENS),
        "truncation_side": tokenizer.truncation_side,
        "token_types": "token_type_ids" in tokenizer.model_input_names,
    }


def is_export(folder: Path) -> bool:
    """Tell whether a folder holds an exported model, whole or not."""
    if (folder / STAGES_FILE).exists():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("model_type") in {f"fastbert_{name}" for name in BACKENDS}


def check_folder_is_free(folder: Path) -> None:
    """Raise a `ValueError` if an exported model would take the place of something else."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give a folder, as in export(model, 'outputs/onnx').")
    if (folder / "config.json").exists() and not is_export(folder):
        raise ValueError(f"{folder} holds another checkpoint, which an export would overwrite: give another folder.")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """
    Give a folder to write an exported model into, whose files take the place of those of an older one at the end:
    `stages.json` goes first and comes last. Where anything fails before that, the old one stays.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))  # on the same file system
    try:
        yield part
        written = {file.name for file in part.iterdir()}
        (folder / STAGES_FILE).unlink(missing_ok=True)
        for file in folder.iterdir():
            if GRAPH_FILE.fullmatch(file.name) and file.name not in written:
                file.unlink()
        move_whole(part, folder, last=STAGES_FILE)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _described(folder: Path) -> ExportFolder:
    """Return what `stages.json` says, if it can be of an export."""
    path = folder / STAGES_FILE
    wrong = f"{path} is not what fastbert_hf.export writes"
    if path.stat().st_size > LARGEST_LIST:
        raise ValueError(f"{wrong}, as it has {path.stat().st_size:,} bytes: export again.")
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        described = ExportFolder(**found)
    except (ValueError, RecursionError, TypeError) as error:  # what json raises is a ValueError
        raise ValueError(f"{wrong} ({shortened(str(error))}): export again.") from error
    if described.format != FORMAT:
        raise ValueError(
            f"{path} has format {shortened(described.format)}, and this version reads {FORMAT}: export again."
        )
    model = described.model if isinstance(described.model, dict) else {}
    numbers = (described.layers_per_stage, model.get("num_hidden_layers"))
    right = (
        isinstance(described.backend, str)
        and described.backend in BACKENDS
        and described.quantize in QUANTIZED
        and all(type(number) is int and 1 <= number <= 1_000 for number in numbers)
        and isinstance(described.reading, dict)
        and type(described.static) is bool
        and (described.weights == "" or is_digest(described.weights))
        and isinstance(described.files, dict)
    )
    if right:
        wanted = {name + suffix for name in described.names for suffix in BACKENDS[described.backend].suffixes}
        digests = described.files.values()
        right = set(described.files) == wanted and all(
            isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) for digest in digests
        )
    if not right:
        raise ValueError(f"{wrong}, {shortened(found)}: export again.")
    return described


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
