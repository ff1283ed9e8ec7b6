"""What runs embeddings, layers and exits. `TorchEngine` runs the stock modules; others keep to the same protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from statistics import median
from typing import Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .compiled_layers import is_compiled
from .encoder_layer import is_hooked, run_layer
from .families import embed_tokens, encoder_layers, get_encoder_family, packed_position_ids, rotary_embeddings
from .int8_products import few_numbers_of_rows
from .packed_attention import PACKED_ATTENTION
from .packed_batch import PackedBatch, Padding
from .token_coarsening import Coarsening


class Engine(Protocol):
    """What the scheduler needs of a model. Nothing else of it is known there."""

    num_layers: int
    device: torch.device
    session: Callable[[], AbstractContextManager]  # in which all of these methods are called

    def embed(self, packed_batch: PackedBatch, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, PackedBatch]:
        """Return the embeddings, `[1, total_tokens, hidden_size]`, and the batch with what layers need of it."""

    def run_layer(
        self, depth: int, hidden_states: torch.Tensor, packed_batch: PackedBatch
    ) -> tuple[torch.Tensor, PackedBatch]:
        """Run the layer `depth`, from 1, and return its output with the batch that it belongs to."""

    def exit_logits(self, depth: int, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        """Return what the exit after the layer `depth` says of each text, `[texts, num_labels]`."""


class TorchEngine:
    """
    Runs a stock encoder and the exits of a model with PyTorch.

    Args:
        backbone (`PreTrainedModel`): The stock encoder, with the packed attention.
        exits (sequence of `nn.Module`): One for each layer; none for hidden states alone.
        shared_pooler (`nn.Module`, *optional*): The pooler that the exits share.
        inference (`bool`): Whether to run in inference mode. What comes out of it has no gradients.
        coarsening ([`Coarsening`], *optional*): What makes texts shorter on their way.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        exits: Sequence[nn.Module] = (),
        shared_pooler: nn.Module | None = None,
        inference: bool = False,
        coarsening: Coarsening | None = None,
    ):
        if backbone.config._attn_implementation != PACKED_ATTENTION:
            raise ValueError(
                f"the backbone's attention was changed to {backbone.config._attn_implementation!r}, with which the "
                "texts of a batch would read each other. Choose the kernel on the model instead: "
                "model.set_attn_implementation('sdpa')"
            )
        self.backbone, self.exits, self.shared_pooler, self.coarsening = backbone, exits, shared_pooler, coarsening
        self.layers, self.family = encoder_layers(backbone), get_encoder_family(backbone.config)
        self.num_layers, self.session = len(self.layers), torch.inference_mode if inference else nullcontext

    @property
    def device(self) -> torch.device:
        return self.backbone.device  # which replicas of DataParallel have not

    def embed(
        self, packed_batch: PackedBatch, inputs: dict[str, torch.Tensor], padding: Padding | None = None
    ) -> tuple[torch.Tensor, PackedBatch]:
        """As the protocol says. With its `padding`, hooks of the embeddings see the padded batch, in eval mode."""
        position_ids = inputs.get("position_ids")
        if position_ids is None:
            position_ids = packed_position_ids(self.backbone, packed_batch, inputs.get("input_ids"))
        inputs = {**inputs, "position_ids": position_ids}
        embeddings = self.backbone.embeddings
        if padding is not None and not embeddings.training and any(map(is_hooked, embeddings.modules())):
            padded = {name: padding.pad(value) for name, value in inputs.items()}
            hidden_states = padding.unpad(embed_tokens(self.backbone, padded))
        else:
            hidden_states = embed_tokens(self.backbone, inputs)
        position_embeddings = rotary_embeddings(self.backbone, hidden_states, position_ids)
        if position_embeddings is not None:
            packed_batch = replace(packed_batch, position_embeddings=position_embeddings)
        return hidden_states, packed_batch

    def run_layer(
        self, depth: int, hidden_states: torch.Tensor, packed_batch: PackedBatch
    ) -> tuple[torch.Tensor, PackedBatch]:
        layer = self.layers[depth - 1]
        shorten = None if self.coarsening is None else self.coarsening.at(depth)
        if shorten is not None:
            packed_batch = replace(packed_batch, received=[])
        if is_compiled(layer):
            return run_layer(self.family.seam, layer, hidden_states, packed_batch, shorten)
        with faster_linears(hidden_states) as linears:
            if shorten is not None or not (linears or makes_kernels(hidden_states)):
                return run_layer(self.family.seam, layer, hidden_states, packed_batch, shorten)
            more_states, more_rows = with_more_rows(hidden_states, packed_batch)
            outputs, _ = run_layer(self.family.seam, layer, more_states, more_rows)
            return outputs[:, : packed_batch.total_tokens], packed_batch

    def exit_logits(self, depth: int, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        hidden_states = self.final_norm(hidden_states)
        with LinearsOfMoreRows() if makes_kernels(hidden_states) else nullcontext():
            return self.exits[depth - 1](hidden_states, packed_batch, self.shared_pooler)

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise a layer's output as its reader gets it, where the encoder does so once at its end."""
        name = self.family.final_norm
        return hidden_states if name is None else self.backbone.get_submodule(name)(hidden_states)


def makes_kernels(hidden_states: torch.Tensor) -> bool:
    """
    Tell whether linear layers are in half precision on a CPU: oneDNN runs them, which makes a kernel for each number
    of rows that it meets, and that takes as long as several products. (Int8 layers see to it themselves.)
    """
    return (
        hidden_states.device.type == "cpu"
        and hidden_states.dtype in (torch.bfloat16, torch.float16)
        and torch.is_inference_mode_enabled()
    )


def with_more_rows(hidden_states: torch.Tensor, packed_batch: PackedBatch) -> tuple[torch.Tensor, PackedBatch]:
    """Put rows below those of a batch that belong to no text, so that few different numbers of rows are met."""
    more = few_numbers_of_rows(hidden_states.shape[1]) - hidden_states.shape[1]
    if more == 0:
        return hidden_states, packed_batch

    def with_more(states: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(states, (0, 0, 0, more))

    if packed_batch.position_embeddings is not None:
        rotary = {kind: tuple(map(with_more, pair)) for kind, pair in packed_batch.position_embeddings.items()}
        packed_batch = replace(packed_batch, position_embeddings=rotary)
    return with_more(hidden_states), packed_batch


class LinearsOfMoreRows(TorchFunctionMode):
    """Gives linear layers some rows more while it is entered, in its thread alone, and takes them away again."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear and not kwargs and args[0].dim() > 1:
            tokens, *weights = args
            rows = tokens.flatten(0, -2)
            more = few_numbers_of_rows(len(rows)) - len(rows)
            if more:
                outputs = func(nn.functional.pad(rows, (0, 0, 0, more)), *weights)
                return outputs[: len(rows)].unflatten(0, tokens.shape[:-1])
        return func(*args, **kwargs) if kwargs else func(*args)


# The smallest layers that are worth an interception: tokens times hidden_size squared, and weights.
LEAST_PRODUCTS = 4_000_000
LEAST_WEIGHTS = 1 << 16


class OneDnnLinears(TorchFunctionMode):
    """
    Computes float32 linear layers by oneDNN instead of MKL while it is entered, in its thread alone. The answers
    differ by rounding errors, and have no gradients.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear and not kwargs and _is_plain(*args[:2]):
            return _onednn_linear(*args)
        return func(*args, **kwargs) if kwargs else func(*args)


def faster_linears(hidden_states: torch.Tensor) -> AbstractContextManager:
    """Return what to enter before a layer runs: [`OneDnnLinears`] where that is faster, else nothing."""
    is_for_onednn = (
        hidden_states.numel() * hidden_states.shape[-1] >= LEAST_PRODUCTS
        and torch.is_inference_mode_enabled()
        and hidden_states.device.type == "cpu"
        and hidden_states.dtype is torch.float32
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
    )
    return OneDnnLinears() if is_for_onednn else nullcontext()


@cache
def onednn_is_faster() -> bool:
    """Measure whether oneDNN clearly beats MKL on this machine: some milliseconds, once in each process."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(768, 768, generator=generator) for _ in range(6)]  # more than a core's own cache holds
    tokens, bias = torch.rand(64, 768, generator=generator), torch.zeros(768)
    seconds = {_onednn_linear: [], nn.functional.linear: []}
    with torch.inference_mode():
        for _ in range(2):
            for linear, times in seconds.items():
                for weight in weights:
                    start = time.perf_counter()
                    linear(tokens, weight, bias)
                    times.append(time.perf_counter() - start)
    # Where they are about equal, the interception costs more than it gains, and every process would choose anew.
    return median(seconds[_onednn_linear]) < 0.85 * median(seconds[nn.functional.linear])


@cache
def beats_float32(dtype: torch.dtype) -> bool:
    """
    Measure whether products in half precision are about as fast as in float32 on this processor, or faster: some
    milliseconds, and more where they are emulated, once in each process.
    """
    generator = torch.Generator().manual_seed(0)
    weight, tokens = torch.rand(768, 768, generator=generator), torch.rand(64, 768, generator=generator)
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], dtype: []}
    with torch.inference_mode():
        given = {of: (tokens.to(of), weight.to(of)) for of in seconds}
        for of in seconds:  # the first call prepares
            nn.functional.linear(*given[of])
        for _ in range(5):
            for of, times in seconds.items():
                start = time.perf_counter()
                nn.functional.linear(*given[of])
                times.append(time.perf_counter() - start)
    # Where they are about equal, every process would choose anew.
    return median(seconds[dtype]) < 1.2 * median(seconds[torch.float32])


def _is_plain(tokens: torch.Tensor, weight: torch.Tensor) -> bool:
    # Not for the small matrices of an adapter, nor for weights that are quantised, nor where torch.compile chooses.
    if torch.compiler.is_compiling():
        return False
    is_plain = type(weight) is nn.Parameter and weight.dtype is tokens.dtype is torch.float32
    return is_plain and weight.numel() >= LEAST_WEIGHTS


def _onednn_linear(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # The operator of torch.compile's CPU backend.
    return torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, "none", [], "")
