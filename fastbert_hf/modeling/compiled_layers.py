"""torch.compile: each layer is compiled by itself. The loop that calls them is not: who leaves decides its shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from .families import encoder_layers


def untraced(function: Callable, check: Callable[[Any], None] | None = None) -> Callable:
    """
    Keep a function out of the graphs of a compiler, which then ends one graph before it and begins another after it.
    `check` is called with its first argument, in compiled code alone.
    """

    @torch.compiler.disable
    def apart(first, *args, **kwargs):
        if check is not None:
            check(first)
        return function(first, *args, **kwargs)

    @wraps(function)
    def wrapper(*args, **kwargs):
        return (apart if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return wrapper


def untraced_forward(forward: Callable) -> Callable:
    """Keep the forward of a model out of the graphs of a compiler, which asks for compiled layers in it."""
    return untraced(forward, check_layers)


def check_layers(model: nn.Module) -> None:
    """Raise a `ValueError` unless all layers of a model are compiled."""
    if not all(map(is_compiled, layers_of(model))):
        raise ValueError(
            "torch.compile cannot compile this model as a whole: the texts that leave decide the shapes of all that "
            "follows. Compile its layers in place, with the same arguments: model.compile(). "
            "TrainingArguments(torch_compile=True) is not needed then. Of a model that PEFT wraps, it is "
            "model.get_base_model().compile()."
        )


class CompilesLayers:
    """Part of a model: what `compile` compiles."""

    def compile(self, **kwargs: Any) -> None:
        """
        Compile every layer of the encoder in place, for any number of tokens. All that calls the model profits, the
        pipeline too.

        Args:
            kwargs: Those of `torch.compile`, such as `mode` and `backend`. `dynamic` is `True` unless given.
        """
        for layer in layers_of(self):
            layer.compile(**{"dynamic": True, **kwargs})


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of all encoders of a model, each once."""
    backbones = [module.backbone for module in model.modules() if hasattr(module, "backbone")]
    return list(dict.fromkeys(layer for backbone in backbones for layer in encoder_layers(backbone)))


def is_compiled(layer: nn.Module) -> bool:
    """Tell whether a layer was compiled in place, or lies in what torch.compile returned."""
    return layer._compiled_call_impl is not None or "_orig_mod" in layer._modules
