"""Linear layers on a CPU, by whichever of the two matrix libraries that come with PyTorch is faster there."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from statistics import median

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry, register_flop_formula


if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(tokens_shape, weight_shape, *args, **kwargs) -> int:
        """So that FlopCounterMode counts these layers as it counts any other."""
        return 2 * math.prod(tokens_shape) * weight_shape[0]


# Below them an interception costs more than it gains: tokens times hidden_size squared, and weights of a layer.
LEAST_PRODUCTS = 4_000_000
LEAST_WEIGHTS = 1 << 16


class OneDnnLinears(TorchFunctionMode):
    """
    While it is entered, and in its thread alone, float32 linear layers are computed by oneDNN instead of MKL.
    The answers differ by rounding errors, and have no gradients.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear and not kwargs and _pays(*args[:2]):
            return _onednn_linear(*args)
        return func(*args, **kwargs) if kwargs else func(*args)


def faster_linears(hidden_states: torch.Tensor) -> AbstractContextManager:
    """
    What to enter before a layer runs: [`OneDnnLinears`] in inference mode on a CPU where oneDNN is faster, else
    nothing.
    """
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
    """Whether oneDNN beats MKL on this machine, by a measurement of some milliseconds, once in each process."""
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
    return median(seconds[_onednn_linear]) < median(seconds[nn.functional.linear])


def _pays(tokens: torch.Tensor, weight: torch.Tensor) -> bool:
    # Not for the small matrices of an adapter, nor for weights that are quantised, nor where torch.compile chooses.
    if torch.compiler.is_compiling():
        return False
    is_plain = type(weight) is nn.Parameter and weight.dtype is tokens.dtype is torch.float32
    return is_plain and weight.numel() >= LEAST_WEIGHTS


def _onednn_linear(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # The operator of torch.compile's CPU backend.
    return torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, "none", [], "")
