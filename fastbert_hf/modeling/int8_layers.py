"""Layers with int8 weights that round what they read to eight bits, too, with a scale for each token."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from torch import nn

from .compiled_layers import untraced
from .int8_products import (
    LARGEST_WEIGHT,
    LEVELS,
    MOST_INT32,
    PackedWeights,
    exact_levels,
    quantise_tokens,
    quantise_weights,
    round_rows,
)


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
        self._neighbours: Neighbours | None = None

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
        if tokens is not None and self._neighbours is not None:
            return self._neighbours.product(self, tokens, rows, levels)
        return self._packed.multiply([self], round_rows(rows, levels), bias)

    def dequantised(self) -> torch.Tensor:
        """Return the weights in float32."""
        return self.weight.float() * self.weight_scale[:, None]


class Neighbours:
    """
    What the int8 layers of one module know of each other. Query, key and value read the same tensor one after the
    other: it is rounded once, and multiplied with the weights of all three at once, which takes half the time for the
    tokens of one text. Which layers read together is seen at the first tensor that they read; nobody has to say.
    """

    def __init__(self) -> None:
        self._reading = Reading()
        # By layer: those that read with it, and their weights; `None` for those that read alone.
        self._groups: dict[Int8Linear, tuple[tuple[Int8Linear, ...], PackedWeights] | None] = {}

    def product(self, layer: Int8Linear, tokens: torch.Tensor, rows: torch.Tensor, levels: int) -> torch.Tensor:
        """Return the outputs of a layer for the rows of a tensor."""
        reading = self._reading
        asked = levels, 0 if tokens.is_inference() else tokens._version
        is_same = reading.tokens is not None and reading.tokens() is tokens and reading.asked == asked
        if not is_same or layer in reading.readers:  # one that reads it again may find other numbers there
            self._learn(reading)
            reading.begin(tokens, asked)
        reading.readers.append(layer)
        if layer in reading.products:
            return reading.products.pop(layer)
        if reading.rounded is None:
            reading.rounded = round_rows(rows, levels)
        group = self._groups.get(layer)
        if group is None:
            return layer._packed.multiply([layer], reading.rounded, layer.bias)
        layers, packed = group
        outputs = packed.multiply(layers, reading.rounded, packed.bias_of(layers))
        parts = outputs.split([own.out_features for own in layers], 1)
        reading.products = dict(zip(layers, parts, strict=True))
        return reading.products.pop(layer)

    def _learn(self, reading: Reading) -> None:
        """Keep who read a tensor together, and undo what was wrong about it."""
        if reading.products:  # computed for nobody
            layers, _ = self._groups[next(iter(reading.products))]
            self._groups |= dict.fromkeys(layers)
        readers = tuple(reading.readers)
        if not any(layer in self._groups for layer in readers):
            group = (readers, PackedWeights()) if len(readers) > 1 else None
            self._groups |= dict.fromkeys(readers, group)
            for layer in readers if group else ():
                layer._packed = PackedWeights()  # those of the group take its place

    def __deepcopy__(self, memo: dict) -> Neighbours:
        return Neighbours()

    def __reduce__(self) -> tuple:
        return Neighbours, ()


class Reading(threading.local):
    """
    What the neighbours of one module are doing in each thread: the tensor that they read, its rounded rows, and the
    products that were not asked for yet. It is kept no longer than that tensor.
    """

    tokens: weakref.ref | None = None
    asked: tuple[int, int] | None = None
    rounded: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __init__(self) -> None:
        self.readers: list[Int8Linear] = []
        self.products: dict[Int8Linear, torch.Tensor] = {}

    def begin(self, tokens: torch.Tensor, asked: tuple[int, int]) -> None:
        """Turn to another tensor."""
        self.tokens, self.asked, self.rounded = weakref.ref(tokens, self._forget), asked, None
        self.readers, self.products = [], {}

    def _forget(self, tokens: weakref.ref) -> None:
        if tokens is self.tokens:  # and not that of another one since
            self.tokens = self.rounded = None
            # Who was left out is still to be learnt, what was computed for them is not kept.
            self.products = dict.fromkeys(self.products)


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
            own, neighbours = [part for part in parent.children() if isinstance(part, Int8Linear)], Neighbours()
            for part in own if len(own) > 1 else ():
                part._neighbours = neighbours
    return replaced
