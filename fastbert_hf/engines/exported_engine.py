"""What runs an exported model: the graphs of a folder, behind the protocol that the scheduler knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling.families import packed_position_ids
from ..modeling.int8_products import LEVELS
from ..modeling.packed_batch import PackedBatch
from .backends import BACKENDS, Run
from .export_folder import EMBEDDINGS, PROBE, ExportFolder, exit_name, layers_name
from .graph_modules import ProbeGraph


class Graphs:
    """
    The graphs of a folder, loaded as they were written. Threads share them, and the folder may change later on.

    Args:
        folder (`Path`): Of an exported model.
        found ([`ExportFolder`]): What it says of itself.
        num_threads (`int`): Threads of a call.
        hidden_size (`int`): Of the model.
    """

    def __init__(self, folder: Path, found: ExportFolder, num_threads: int, hidden_size: int):
        self.folder, self.found, self.num_threads, self.hidden_size = folder, found, num_threads, hidden_size
        backend = BACKENDS[found.backend]
        self._loaded: dict[str, Run] = {
            name: backend.load(found.contents(folder, name), num_threads, hidden_size) for name in found.names
        }
        self._levels: np.ndarray | None = None

    def __reduce__(self) -> tuple:
        return Graphs, (self.folder, self.found, self.num_threads, self.hidden_size)

    def __deepcopy__(self, memo: dict) -> Graphs:
        return self  # it never changes

    def run(self, name: str, given: dict[str, torch.Tensor | np.ndarray]) -> list[torch.Tensor]:
        """Run a graph on tensors on the CPU, by their names."""
        arrays = {own: value.numpy() if isinstance(value, torch.Tensor) else value for own, value in given.items()}
        return [torch.from_numpy(value) for value in self._loaded[name](arrays)]

    @property
    def levels(self) -> np.ndarray:
        """To how many steps int8 layers round a token: the most with which this machine adds exactly."""
        if self._levels is None:
            self._levels = np.array(LEVELS[0], np.float32) if PROBE not in self.found.names else self._exact_levels()
        return self._levels

    def _exact_levels(self) -> np.ndarray:
        wanted = ProbeGraph.wanted()
        for levels in (np.array(own, np.float32) for own in LEVELS):
            # As many rows as a token has alone and as a batch has: other kernels may take them.
            found = [
                self.run(PROBE, {"hidden_states": torch.ones(1, rows, ProbeGraph.width), "levels": levels})[0]
                for rows in (1, 64)
            ]
            if all(torch.allclose(own, wanted.expand_as(own), rtol=1e-4) for own in found):
                return levels
        raise RuntimeError(
            f"{self.found.backend} adds products of bytes wrongly on this processor: export without quantize."
        )


def check_ids(given: dict[str, torch.Tensor], text_config: PreTrainedConfig) -> None:
    """Raise an `IndexError`, as PyTorch does, where an id has no embedding: other engines would answer something."""
    sizes = {"input_ids": "vocab_size", "token_type_ids": "type_vocab_size", "position_ids": "max_position_embeddings"}
    for name, size in sizes.items():
        least, greatest = given[name].aminmax()
        most = getattr(text_config, size, 0)
        if least < 0 or (most and greatest >= most):
            raise IndexError(f"{name} must be from 0 to {most - 1}, got {int(least)} to {int(greatest)}.")


class ExportedEngine:
    """
    Runs the graphs of an exported model; as [`TorchEngine`], behind the same protocol.

    Args:
        graphs ([`Graphs`]): Of a folder.
        backbone (`PreTrainedModel`): That was exported, for its config; its weights may be on `meta`.
    """

    device, session = torch.device("cpu"), torch.inference_mode

    def __init__(self, graphs: Graphs, backbone: PreTrainedModel):
        self.graphs, self.found, self.backbone = graphs, graphs.found, backbone
        self.num_layers, self.hidden_size = self.found.num_layers, graphs.hidden_size

    def embed(
        self, packed_batch: PackedBatch, inputs: dict[str, torch.Tensor], padding: object = None
    ) -> tuple[torch.Tensor, PackedBatch]:
        """Return the embeddings and the batch, as the protocol says."""
        if "input_ids" not in inputs:
            raise ValueError("an exported model reads input_ids, not inputs_embeds.")
        position_ids = inputs.get("position_ids")
        if position_ids is None:
            position_ids = packed_position_ids(self.backbone, packed_batch, inputs["input_ids"])
        zeros = {name: torch.zeros_like(position_ids) for name in ("token_type_ids", "task_type_ids")}
        given = {name: value.long() for name, value in {**zeros, **inputs, "position_ids": position_ids}.items()}
        check_ids(given, self.backbone.config)
        hidden_states, *turns = self.graphs.run(EMBEDDINGS, given)
        if turns:
            pairs = zip(turns[::2], turns[1::2], strict=True)
            packed_batch = replace(packed_batch, position_embeddings=dict(zip(self.found.rotary, pairs, strict=True)))
        return hidden_states, packed_batch

    def run_layer(
        self, depth: int, hidden_states: torch.Tensor, packed_batch: PackedBatch
    ) -> tuple[torch.Tensor, PackedBatch]:
        """
        Run the layer `depth`. A graph of several gives the outputs of all of them side by side, the next one first;
        the layers that follow have only to step on.
        """
        first, last = self._span(depth)
        if depth > first:
            return hidden_states[..., self.hidden_size :], packed_batch
        places, tokens, is_token = packed_batch.padded_form
        turns = [turn for pair in (packed_batch.position_embeddings or {}).values() for turn in pair]
        given = {"hidden_states": hidden_states, "places": places, "tokens": tokens, "is_token": is_token}
        given |= {"levels": self.graphs.levels, **{f"rotary_{number}": turn for number, turn in enumerate(turns)}}
        outputs = self.graphs.run(layers_name(first, last), given)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1), packed_batch

    def exit_logits(self, depth: int, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        """Return what the exit after the layer `depth` says, `[texts, num_labels]`."""
        places, _, is_token = packed_batch.padded_form
        given = {"hidden_states": hidden_states[..., : self.hidden_size].contiguous()}
        return self.graphs.run(exit_name(depth), {**given, "places": places, "is_token": is_token})[0]

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Raise a `ValueError`: no graph gives hidden states."""
        raise ValueError("an exported model has no output_hidden_states: ask the one that it was made of.")

    def _span(self, depth: int) -> tuple[int, int]:
        first = (depth - 1) // self.found.layers_per_stage * self.found.layers_per_stage + 1
        return first, min(first + self.found.layers_per_stage - 1, self.num_layers)
