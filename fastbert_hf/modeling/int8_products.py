"""Products of rounded tokens with int8 weights: how both are rounded, and how oneDNN multiplies them."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import nn

from .loaded_operators import operators_are_loaded


# The largest int8 whose negative is one, too.
LARGEST_WEIGHT = 127
# Steps between the least and the greatest value of a token: with 8 bits, and with 7. Products of two bytes are added
# in 16 bits on processors without VNNI, and overflow there unless one of them has a bit less.
LEVELS = (255, 127)
# From this on, sums are no 32-bit numbers any more.
MOST_INT32 = 2**31
# Of Linux: memory that will not be read soon.
MADV_PAGEOUT = 21
# Rows of zeros have no scale of their own.
SMALLEST_SCALE = 1e-30


def quantise_weights(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Return weights as int8, `[rows, width]`, and the float32 scale of each row, `[rows]`: \\( w \approx q s \\) with
    \\( s = \max |w| / 127 \\).
    """
    weight = weight.float()
    scale = weight.abs().amax(-1).div_(LARGEST_WEIGHT).clamp_min_(SMALLEST_SCALE)
    return torch.div(weight, scale[:, None]).round_().to(torch.int8), scale


def quantise_tokens(
    rows: torch.Tensor, levels: int = LEVELS[0], result_rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Round the hidden states of tokens, each by itself: \\( x \approx (q - z) s \\), where q goes from 0 to `levels` and
    0 is met exactly.

    Args:
        rows (`torch.Tensor` of shape `[rows, width]`): In float32.
        levels (`int`): 255 or 127.
        result_rows (`int`, *optional*): Rows of q, if it has more than there are tokens. They hold anything.

    Returns:
        `tuple` of three `torch.Tensor`: q as uint8, `[result_rows, width]`, then s and z in float32, `[rows, 1]` each.
        A row with NaN or infinity has a scale that is not finite.
    """
    result_rows = len(rows) if result_rows is None else result_rows
    if is_for_operators(rows):
        return torch.ops.fastbert_hf.quantise_tokens(rows, levels, SMALLEST_SCALE, result_rows)
    # For the tokens of one text each call here costs as much as its numbers: there are as few as can be.
    greatest, least = rows.amax(-1, keepdim=True).clamp_min_(0), rows.amin(-1, keepdim=True).clamp_max_(0)
    scale = greatest.sub_(least).div_(levels).clamp_min_(SMALLEST_SCALE)
    steps = scale.reciprocal()  # dividing takes several times as long on some processors
    zero = least.mul_(steps).round_().neg_()
    rounded = torch.mul(rows, steps).round_().add_(zero).clamp_max_(levels)
    if result_rows == len(rows):
        return rounded.byte(), scale, zero
    result = torch.empty(result_rows, rows.shape[1], dtype=torch.uint8, device=rows.device)
    result[: len(rows)] = rounded
    return result, scale, zero


def scale_tokens(
    rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, sums: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """
    Make of products with what [`quantise_tokens`] gave those with the tokens themselves, in place, and add a bias.

    Args:
        rows (`torch.Tensor` of shape `[rows, outputs]`): The products.
        scale, zero (`torch.Tensor` of shape `[rows, 1]`): As they came with the tokens.
        sums, bias (`torch.Tensor` of shape `[outputs]`): The sum of the weights of each output; its bias, if any.
    """
    if is_for_operators(rows) and (bias is None or bias.dtype is torch.float32):
        torch.ops.fastbert_hf.scale_tokens_(rows, scale, zero, sums, bias)
        return
    rows.addcmul_(zero, sums, value=-1).mul_(scale)
    if bias is not None:
        rows += bias


def few_numbers_of_rows(rows: int) -> int:
    """
    Return how many rows a product should have for so many tokens: some more, at most a sixteenth of many. oneDNN makes
    a kernel for each number that it meets, which takes as long as some hundred rows, and forgets them from about a
    thousand on. Where texts leave, hardly two batches have equal numbers of tokens.
    """
    step = max(8, 1 << max(rows.bit_length() - 5, 0))
    return -(-rows // step) * step


def is_for_operators(rows: torch.Tensor) -> bool:
    """Return whether the compiled operators were loaded and can take these float32 rows."""
    return operators_are_loaded() and rows.device.type == "cpu" and rows.is_contiguous()


def round_rows(rows: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what [`quantise_tokens`] makes of rows for a product, which then has few different numbers of them."""
    return quantise_tokens(rows, levels, few_numbers_of_rows(len(rows)))


class PackedWeights:
    """The weights of a layer, or of several that read the same, as oneDNN reads them. They are never saved."""

    def __init__(self) -> None:
        self._made: tuple | None = None

    def forget(self) -> None:
        """Let them be packed anew when they are needed."""
        self._made = None

    def multiply(
        self,
        layers: Sequence[nn.Module],
        rounded: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        biases: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        """
        Return the outputs of the layers side by side, `[rows, outputs]` in float32.

        Args:
            layers (sequence of `Int8Linear`): Always the same ones; their weights are packed when first needed.
            rounded (`tuple`): From [`round_rows`].
            biases (sequence of `torch.Tensor`): Of each layer, or `None`.
        """
        steps, scale, zero = rounded
        made, key = self._made, versions(part for own in layers for part in (own.weight, own.weight_scale))
        if made is None or made[0] != key:
            weight = side_by_side([own.weight for own in layers])
            weight_scale = side_by_side([own.weight_scale for own in layers])
            packed, zeros = torch.ops.onednn.qlinear_prepack(weight, None), zeros_of(len(weight))
            sums = weight.sum(1, dtype=torch.int64).float() * weight_scale
            made = self._made = key, packed, weight_scale, zeros, sums
            for own in layers:
                let_pages_go(own.weight)
        _, packed, weight_scale, zeros, sums = made
        outputs = multiply(steps, packed, weight_scale, zeros)[: len(scale)]
        scale_tokens(outputs, scale, zero, sums, bias_of(layers, biases))
        return outputs

    def __deepcopy__(self, memo: dict) -> PackedWeights:
        return PackedWeights()

    def __reduce__(self) -> tuple:
        return PackedWeights, ()


def bias_of(layers: Sequence[nn.Module], biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the biases of layers side by side, in float32, with zeros for a layer that has none."""
    if all(bias is None for bias in biases):
        return None
    filled = [
        own.weight_scale.new_zeros(own.out_features) if bias is None else bias.detach().float()
        for own, bias in zip(layers, biases, strict=True)
    ]
    return side_by_side(filled)


def versions(tensors: Iterable[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """Return what changes when tensors are replaced or changed in place."""
    return tuple((own.data_ptr(), 0 if own.is_inference() else own._version) for own in tensors)


def side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the outputs of several layers one after the other, and those of one as they are."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def let_pages_go(weight: torch.Tensor) -> None:
    """
    Tell Linux that weights will not be read soon, as packed ones are there: pages of a checkpoint file are then given
    back, and come again from there when they are read. Other systems are told nothing.
    """
    madvise = find_madvise()
    # Whole pages alone: the others are a neighbour's, too.
    first = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (weight.data_ptr() + weight.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if madvise is not None and size > 0:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), MADV_PAGEOUT)  # an older Linux refuses


@cache
def find_madvise() -> Callable | None:
    """Return the function of the C library that gives the system advice on memory, `None` if it is no Linux."""
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def multiply(rows: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return uint8 rows times packed weights times their scales, in float32."""
    return torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 0, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


@cache
def exact_levels() -> int | None:
    """
    Return the most levels with which oneDNN's products are exact on this processor, `None` if it has none that are.
    It is tried on the products that overflow first: less than a millisecond, once in a process.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return None
    try:
        with torch.inference_mode(), torch.device("cpu"):
            width, outputs = 256, 32
            weight = torch.full((outputs, width), LARGEST_WEIGHT, dtype=torch.int8)
            weight[1::2] = -LARGEST_WEIGHT
            wanted = weight.sum(1).float()
            packed, scale = torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(outputs, dtype=torch.float32)
            for levels in LEVELS:
                # As many rows as a token has alone and as a batch has: other kernels may take them.
                found = [
                    multiply(torch.full((rows, width), levels, dtype=torch.uint8), packed, scale, zeros_of(outputs))
                    for rows in (1, 64)
                ]
                if all(torch.equal(own, (levels * wanted).expand_as(own)) for own in found):
                    return levels
    except RuntimeError:  # a build that has the operator and not the kernel
        return None
    return None


def zeros_of(outputs: int) -> torch.Tensor:
    """Return the zero points of weights, which have none."""
    return torch.zeros(outputs, dtype=torch.long, device="cpu")
