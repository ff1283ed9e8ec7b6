"""Layers with int8 weights that round what they read to eight bits, too, with a scale for each token."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, Self

import torch
from torch import nn

from .compiled_layers import untraced
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


class Int8Weights(nn.Module):
    """
    Part of a layer with int8 weights: buffers, as they do not learn, with scales that stay in float32 whatever the
    model is cast to.
    """

    def _make_weights(self, rows: int, width: int, device: Any) -> None:
        self.register_buffer("weight", torch.empty(rows, width, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(rows, dtype=torch.float32, device=device))

    def _round(self, weight: torch.Tensor) -> None:
        if not weight.is_meta:
            self.weight, self.weight_scale = quantise_weights(weight.detach())

    def reset_parameters(self) -> None:
        """Do nothing: there are no int8 weights to start from."""

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype is not torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self


class Int8Linear(Int8Weights, nn.Linear):
    """
    A linear layer whose weights are int8 with a scale for each output, and which rounds each token that it reads to
    eight bits with a scale of its own, so that an answer never depends on its batch-mates. Sums are exact whole
    numbers: a row of a batch gives what it gives alone, to the bit.

    On processors without VNNI, tokens are rounded to seven bits. Where oneDNN cannot multiply, the same is computed in
    float32. Rounding lets gradients through unchanged; the weights do not learn.

    Args:
        in_features, out_features (`int`), bias (`bool`), device, dtype: As in `nn.Linear`; the dtype is the bias's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._make_weights(out_features, in_features, device)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._packed = PackedWeights()
        self._rounding: LastRounding | None = None  # that of neighbours

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear) -> Self:
        """Return what takes the place of a linear layer; its weights are rounded unless they are on `meta`."""
        weight, bias = linear.weight, linear.bias
        layer = cls(linear.in_features, linear.out_features, bias is not None, weight.device, weight.dtype)
        layer._round(weight)
        if bias is not None and not bias.is_meta:
            layer.bias.copy_(bias)
        return layer.train(linear.training)

    @untraced  # torch.compile cannot look into packed weights
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = tokens.reshape(-1, self.in_features).float()
        bias = None if self.bias is None else self.bias.float()
        if torch.is_grad_enabled() and (rows.requires_grad or (bias is not None and bias.requires_grad)):
            outputs = RoundedProduct.apply(rows, self)
            outputs = outputs if bias is None else outputs + bias
        else:
            outputs = self.product(rows, bias, tokens)
        return outputs.to(tokens.dtype).view(*tokens.shape[:-1], self.out_features)

    def product(
        self, rows: torch.Tensor, bias: torch.Tensor | None = None, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Return rounded tokens times weights, plus a bias: `[rows, out_features]` in float32. `tokens` is the tensor
        that rows were made of, if neighbours may read it, too.
        """
        levels = exact_levels() if rows.device.type == "cpu" else None
        if levels is None or self.in_features * levels * (LARGEST_WEIGHT + 1) >= MOST_INT32:
            steps, scale, zero = quantise_tokens(rows, levels or LEVELS[0])
            rounded = steps.float().sub_(zero).mul_(scale)
            with torch.autocast(rows.device.type, enabled=False):
                return nn.functional.linear(rounded, self.dequantised(), bias)
        if tokens is not None and self._rounding is not None:
            steps, scale, zero = self._rounding.of(tokens, rows, levels, id(self))
        else:
            steps, scale, zero = quantise_tokens(rows, levels, few_numbers_of_rows(len(rows)))
        outputs, sums = self._packed.multiply(steps, self.weight, self.weight_scale)
        outputs = outputs[: len(rows)]
        scale_tokens(outputs, scale, zero, sums, bias)
        return outputs

    def dequantised(self) -> torch.Tensor:
        """Return the weights in float32."""
        return self.weight.float() * self.weight_scale[:, None]


class LastRounding(threading.local):
    """
    What the neighbours in one module rounded last, in each thread: query, key and value read the same tensor one after
    the other, which is rounded once. It is kept no longer than that tensor.
    """

    tokens: weakref.ref | None = None
    asked: tuple[int, int] | None = None
    readers: frozenset[int] = frozenset()
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def of(
        self, tokens: torch.Tensor, rows: torch.Tensor, levels: int, reader: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what [`quantise_tokens`] makes of the rows of a tensor."""
        asked = levels, 0 if tokens.is_inference() else tokens._version
        is_same = self.tokens is not None and self.tokens() is tokens and self.asked == asked
        if not is_same or reader in self.readers:  # one that reads it again may find other numbers there
            self.result = quantise_tokens(rows, levels, few_numbers_of_rows(len(rows)))
            self.tokens, self.asked, self.readers = weakref.ref(tokens, self._forget), asked, frozenset()
        self.readers |= {reader}
        return self.result

    def __deepcopy__(self, memo: dict) -> LastRounding:
        return LastRounding()

    def __reduce__(self) -> tuple:
        return LastRounding, ()

    def _forget(self, tokens: weakref.ref) -> None:
        if tokens is self.tokens:  # and not that of another one since
            self.tokens = self.result = None


class RoundedProduct(torch.autograd.Function):
    """The product of an [`Int8Linear`], and the gradient of the tokens as if they had not been rounded."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(rows)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.dequantised(), None


class Int8Embedding(Int8Weights, nn.Embedding):
    """
    An embedding whose rows are int8 with a scale each.

    Args:
        num_embeddings, embedding_dim (`int`), padding_idx (`int`, *optional*), device: As in `nn.Embedding`.
        dtype (`torch.dtype`, *optional*): Of what comes out.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._make_weights(num_embeddings, embedding_dim, device)
        # In the dtype of the model, which those of the weights do not tell.
        self.register_buffer("dtype_of_output", torch.empty(0, device=device, dtype=dtype), persistent=False)

    @classmethod
    @torch.no_grad()
    def of(cls, embedding: nn.Embedding) -> Self:
        """Return what takes the place of an embedding, as [`Int8Linear.of`]."""
        weight, padding_idx = embedding.weight, embedding.padding_idx
        layer = cls(embedding.num_embeddings, embedding.embedding_dim, padding_idx, weight.device, weight.dtype)
        layer._round(weight)
        return layer.train(embedding.training)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.embedding(input_ids, self.weight)
        return (rows * self.weight_scale[input_ids].unsqueeze(-1)).to(self.dtype_of_output.dtype)


class PackedWeights:
    """The weights of a layer as oneDNN reads them, made when they are first needed. They are never saved."""

    def __init__(self) -> None:
        self._made: tuple | None = None

    def multiply(
        self, rows: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return uint8 rows times int8 weights times their scales, and the sums of these weights, in float32."""
        made = self._made
        key = tuple((own.data_ptr(), 0 if own.is_inference() else own._version) for own in (weight, weight_scale))
        if made is None or made[0] != key:
            packed, zeros = torch.ops.onednn.qlinear_prepack(weight, None), zeros_of(len(weight))
            sums = weight.sum(1, dtype=torch.int64).float() * weight_scale
            made = self._made = key, packed, weight_scale, zeros, sums
            let_pages_go(weight)
        _, packed, scale, zeros, sums = made
        return multiply(rows, packed, scale, zeros), sums

    def __deepcopy__(self, memo: dict) -> PackedWeights:
        return PackedWeights()

    def __reduce__(self) -> tuple:
        return PackedWeights, ()


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


def has_int8_layers(model: nn.Module) -> bool:
    """Tell whether any layer of a model has int8 weights."""
    return any(True for _ in int8_scales(model))


def int8_scales(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the scales of all int8 weights of a model."""
    return (part.weight_scale for part in model.modules() if isinstance(part, Int8Weights))


def put_int8_layers(model: nn.Module, modules_to_not_convert: Iterable[str] | None = None) -> list[str]:
    """
    Put int8 layers in place of the linear layers and the word embeddings of every backbone of a model.

    Args:
        model (`nn.Module`): With one encoder or several, each called `backbone`. Its exits stay as they are.
        modules_to_not_convert (iterable of `str`, *optional*):
            Modules that stay as they are: a part of their names between dots, as in `"layer.11"` or `"output.dense"`.

    Returns:
        `list` of `str`: The names of what was replaced.
    """
    if any(".base_layer." in f"{name}." or ".lora_" in name for name, _ in model.named_modules()):
        raise ValueError("the model has adapters, which int8 layers would round: convert it first, or merge them.")
    kept, replaced = list(modules_to_not_convert or ()), []
    for name, backbone in list(model.named_modules()):
        if name.rpartition(".")[2] != "backbone":
            continue
        words = backbone.get_input_embeddings()
        made: dict[nn.Module, nn.Module] = {}  # what layers share stays shared
        for inner, module in list(backbone.named_modules(remove_duplicate=False)):
            full_name = f"{name}.{inner}"
            is_linear = isinstance(module, nn.Linear) and not isinstance(module, Int8Linear)
            is_words = module is words and not isinstance(module, Int8Embedding)
            if not (is_linear or is_words) or any(f".{part}." in f".{full_name}." for part in kept):
                continue
            if module not in made:
                made[module] = (Int8Linear if is_linear else Int8Embedding).of(module)
            backbone.set_submodule(inner, made[module])
            replaced.append(full_name)
        for parent in backbone.modules():
            own, rounding = [part for part in parent.children() if isinstance(part, Int8Linear)], LastRounding()
            for part in own if len(own) > 1 else ():
                part._rounding = rounding
    return replaced
