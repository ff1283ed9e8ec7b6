"""Compiled operators for what PyTorch has no fast one: optional, built on the machine that runs them."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch


@cache
def load_operators(verbose: bool = False) -> None:
    """
    Compile the operators of fast feed-forward and of int8 layers for this processor, and load them into this process.
    From then on such layers use them in inference, in float32 on the CPU; without them they compute the same with
    PyTorch's own. The first call takes some seconds; its result is kept in PyTorch's folder of extensions
    (`TORCH_EXTENSIONS_DIR`).

    Args:
        verbose (`bool`): Whether to show what the compiler says.

    Raises:
        `RuntimeError`: Without a C++ compiler or `ninja`.

    Example:

    ```python
    >>> import fastbert_hf

    >>> fastbert_hf.load_operators()
    ```
    """
    from torch.utils.cpp_extension import load

    flags = ["-O3", "-march=native", *(["-fopenmp"] if sys.platform == "linux" else [])]  # clang of macOS has none
    try:
        load(
            # Of its own for each kind of processor: several may share a home folder.
            f"fastbert_hf_operators_{torch.backends.cpu.get_cpu_capability().lower()}",
            [str(Path(__file__).with_name("operators.cpp"))],
            extra_cflags=flags,
            is_python_module=False,
            verbose=verbose,
        )
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            "the operators were not compiled: a C++ compiler (such as g++) and ninja (pip install ninja) are needed. "
            f"Everything works without them, only slower. The first lines of what was said: {str(error)[:500]}"
        ) from error
    _count_flops()


def _count_flops() -> None:
    """Let `FlopCounterMode` count the operators as it counts PyTorch's own products."""
    from torch.utils.flop_counter import register_flop_formula

    operators = torch.ops.fastbert_hf

    @register_flop_formula(operators.grouped_linear)
    def grouped_linear(tokens, order, counts, weight, bias, **kwargs) -> int:
        return 2 * tokens[0] * weight[1] * weight[2]

    @register_flop_formula(operators.sort_by_leaf)
    def sort_by_leaf(tokens, weight, bias, depth, **kwargs) -> int:
        return 2 * tokens[0] * tokens[1] * depth

    @register_flop_formula(operators.neuron_trees)
    def neuron_trees(tokens, weight, bias, table, out_bias, levels, activation, **kwargs) -> int:
        return 4 * tokens[0] * tokens[1] * weight[0] * levels

    @register_flop_formula(operators.descend)
    def descend(tokens, weight, bias, levels, **kwargs) -> int:
        return 2 * tokens[0] * tokens[1] * weight[0] * levels
