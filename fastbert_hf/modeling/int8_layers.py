"""Layers with int8 weights that round what they read to eight bits, too, with a scale for each token."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
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


# Parts of one module that read the same tensor, by the names that Transformers gives them.
READ_TOGETHER = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj"))


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

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        self._forget_packed()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._forget_packed()  # tensors that were made in inference mode do not tell that they changed

    def _forget_packed(self) -> None:
        self._packed.forget()
        if self._neighbours is not None:
            self._neighbours.packed.forget()

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
        return self._packed.multiply([self], round_rows(rows, levels), [bias])

    def dequantised(self) -> torch.Tensor:
        """Return the weights in float32."""
        return self.weight.float() * self.weight_scale[:, None]


class Neighbours:
    """
    Int8 layers that read the same tensor one after the other, as query, key and value do: it is rounded once, and
    multiplied with the weights of all of them at once, which takes half the time for the tokens of one text. A tensor
    must not change between the first of them and the last; where PyTorch counts changes (not of tensors that were made
    in inference mode), that is noticed.

    Args:
        layers (sequence of [`Int8Linear`]): With as many inputs each.
    """

    def __init__(self, layers: Sequence[Int8Linear]):
        self.layers, self.packed, self._of_thread = [*map(weakref.ref, layers)], PackedWeights(), threading.local()

    def product(self, layer: Int8Linear, tokens: torch.Tensor, rows: torch.Tensor, levels: int) -> torch.Tensor:
        """Return the outputs of one of the layers for the rows of a tensor, with its bias."""
        reading = self._of_thread.__dict__.setdefault("reading", Reading())
        asked = levels, 0 if tokens.is_inference() else tokens._version
        if not reading.goes_on(tokens, asked, id(layer)):
            reading.begin(tokens, asked, round_rows(rows, levels))
            self._multiply(reading)
        reading.readers.add(id(layer))
        outputs = reading.products.pop(id(layer), None)
        return layer._packed.multiply([layer], reading.rounded, [layer.bias]) if outputs is None else outputs

    def _multiply(self, reading: Reading) -> None:
        layers = [own() for own in self.layers]
        if None in layers:  # one was replaced since: each reads by itself
            return
        outputs, start = self.packed.multiply(layers, reading.rounded, [own.bias for own in layers]), 0
        for own in layers:
            # Not by `split`, whose parts could not be changed in place.
            reading.products[id(own)] = outputs.narrow(1, start, own.out_features)
            start += own.out_features
            own._packed.forget()  # those of training

    def __getstate__(self) -> list[Int8Linear | None]:
        return [own() for own in self.layers]

    def __setstate__(self, layers: list[Int8Linear | None]) -> None:
        self.__init__([own for own in layers if own is not None])


class Reading:
    """
    What neighbours do in one thread: the tensor that they read, its rounded rows, who has read it, and the products
    that were not asked for yet. It is kept no longer than that tensor.
    """

    def __init__(self) -> None:
        self.tokens: weakref.ref | None = None
        self.asked: tuple[int, int] | None = None
        self.rounded: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.readers: set[int] = set()
        self.products: dict[int, torch.Tensor] = {}

    def goes_on(self, tokens: torch.Tensor, asked: tuple[int, int], reader: int) -> bool:
        """Tell whether this tensor is being read. One that reads it again may find other numbers there."""
        is_same = self.tokens is not None and self.tokens() is tokens and self.asked == asked
        return is_same and reader not in self.readers

    def begin(self, tokens: torch.Tensor, asked: tuple[int, int], rounded: tuple[torch.Tensor, ...]) -> None:
        """Turn to another tensor."""
        self.tokens, self.asked, self.rounded = weakref.ref(tokens, self._forget), asked, rounded
        self.readers, self.products = set(), {}

    def _forget(self, tokens: weakref.ref) -> None:
        if tokens is self.tokens:  # and not that of another one since
            self.tokens, self.rounded, self.products = None, None, {}


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
            for names in READ_TOGETHER:
                own = [getattr(parent, inner, None) for inner in names]
                if all(isinstance(part, Int8Linear) for part in own):
                    neighbours = Neighbours(own)
                    for part in own:
                        part._neighbours = neighbours
    return replaced
