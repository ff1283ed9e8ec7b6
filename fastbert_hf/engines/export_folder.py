"""The folder of an exported model: what lies in it, and the check that it is whole."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from ..files import write_whole
from ..modeling.checkpoint_checks import shortened
from ..modeling.teacher_digest import is_digest
from .backends import BACKENDS


# Written last: where it is, all is there.
STAGES_FILE = "stages.json"
FORMAT = 1
QUANTIZED = (None, "int8")
# Bytes of stages.json, which names some files: 1,000 layers make 300 KB.
LARGEST_LIST = 1_000_000
EMBEDDINGS = "embeddings"
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
        backend (`str`): A key of `BACKENDS`.
        quantize (`str`, *optional*): `"int8"`, or `None` for float32.
        layers_per_stage (`int`): Layers in each graph.
        num_layers (`int`): All layers.
        rotary (`list` of `str`): Types of attention with rotary embeddings of their own.
        positions (`str`): How the family counts them; see [`EncoderFamily`].
        max_length (`int`): Tokens of the longest text that the model reads.
        weights (`str`): Digest of the weights that were exported, as calibrations know them; empty if it had none.
        static (`bool`): Whether scales of tokens are fixed, from texts, and not each token's own.
        files (`dict`): The SHA-256 of each file of a graph.
        format (`int`): Of this description.
    """

    backend: str
    quantize: str | None
    layers_per_stage: int
    num_layers: int
    rotary: list[str]
    positions: str
    max_length: int
    weights: str
    files: dict[str, str]
    static: bool = False
    format: int = FORMAT

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
    def read(cls, folder: str | os.PathLike, num_layers: int) -> Self:
        """
        Read `stages.json`, and check that every file that it names is there and as it was written.

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
        if found.num_layers != num_layers:
            raise ValueError(
                f"{folder / STAGES_FILE} is of {found.num_layers} layers, and the config beside it of {num_layers}: "
                "export again."
            )
        for name, digest in found.files.items():
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}, which {STAGES_FILE} names: export again.")
            if file_digest(folder / name) != digest:
                raise ValueError(f"{folder / name} is not what was written there: export or download it again.")
        return found


def _described(folder: Path) -> ExportFolder:
    """Return what `stages.json` says, if it can be of an export."""
    path = folder / STAGES_FILE
    wrong = f"{path} is not what fastbert_hf.export writes"
    if path.stat().st_size > LARGEST_LIST:
        raise ValueError(f"{wrong}, as it has {path.stat().st_size:,} bytes: export again.")
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        described = ExportFolder(**found)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, TypeError) as error:
        raise ValueError(f"{wrong} ({shortened(str(error))}): export again.") from error
    if described.format != FORMAT:
        raise ValueError(
            f"{path} has format {shortened(described.format)}, and this version reads {FORMAT}: export again."
        )
    numbers = (described.layers_per_stage, described.num_layers)
    right = (
        isinstance(described.backend, str)
        and described.backend in BACKENDS
        and described.quantize in QUANTIZED
        and all(type(number) is int and 1 <= number <= 1_000 for number in numbers)
        and isinstance(described.rotary, list)
        and all(isinstance(kind, str) for kind in (*described.rotary, described.positions))
        and type(described.max_length) is int
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
