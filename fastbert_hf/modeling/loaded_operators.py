"""Whether the compiled operators of `fastbert_hf.load_operators()` are there."""

from __future__ import annotations

from functools import cache

import torch


def operators_are_loaded() -> bool:
    """Return whether this process has loaded the operators."""
    return _are_loaded(len(torch.ops.loaded_libraries))


@cache
def _are_loaded(libraries: int) -> bool:
    # PyTorch looks for an operator that is not there as long as it takes to multiply a text's tokens with a layer, so
    # it is asked again only once another library was loaded.
    return hasattr(torch.ops.fastbert_hf, "quantise_tokens")
