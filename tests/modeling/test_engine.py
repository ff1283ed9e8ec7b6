"""The torch engine's linear layers by oneDNN: the same numbers, only where nothing else is asked of them."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastbert_hf.modeling import engine, int8_products
from fastbert_hf.modeling.engine import OneDnnLinears, faster_linears, onednn_is_faster
from fastbert_hf.modeling.int8_products import few_numbers_of_rows
from tests.common import assert_close, ragged_batch, tiny_model


pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available(),
    reason="this build of PyTorch has no oneDNN",
)


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the tokens that oneDNN gets."""
    shapes, stock = [], engine._onednn_linear

    def counted(tokens, *args):
        shapes.append(tuple(tokens.shape))
        return stock(tokens, *args)

    monkeypatch.setattr(engine, "_onednn_linear", counted)
    return shapes


def linear(inputs: int = 300, outputs: int = 400, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 7, 300), (7, 300), (1, 300), (300,), (0, 300), (2, 3, 5, 300)])
def test_numbers_are_those_of_pytorch(calls, shape, bias):
    layer, tokens = linear(bias=bias), torch.randn(shape)
    with torch.inference_mode():
        expected = layer(tokens)
        with OneDnnLinears():
            actual = layer(tokens)
    assert calls == [shape]
    assert_close(actual, expected)


def test_numbers_of_views_are_those_of_pytorch(calls):
    layer, tokens = linear(), torch.randn(300, 9).t()
    with torch.inference_mode(), OneDnnLinears():
        assert_close(layer(tokens), tokens @ layer.weight.t() + layer.bias)
        assert_close(layer(torch.randn(9, 2, 300)[:, 0]).isfinite().float(), torch.ones(9, 400))
    assert len(calls) == 2


@pytest.mark.parametrize("layer", [linear(20, 30), linear().to(torch.bfloat16), linear().to(torch.float64)])
def test_small_layers_and_other_dtypes_are_left_alone(calls, layer):
    tokens = torch.randn(5, layer.in_features, dtype=layer.weight.dtype)
    with torch.inference_mode():
        expected = layer(tokens)
        with OneDnnLinears():
            assert torch.equal(layer(tokens), expected)
    assert calls == []


def test_weights_of_another_type_are_left_alone(calls):
    class Quantised(nn.Parameter):
        pass

    layer = linear()
    layer.weight = Quantised(layer.weight.detach())
    with torch.inference_mode(), OneDnnLinears():
        layer(torch.randn(5, 300))
    assert calls == []


def test_compiled_layers_are_left_to_the_compiler(calls):
    layer, tokens = linear(), torch.randn(5, 300)
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.inference_mode():
        expected = layer(tokens)
        with OneDnnLinears():
            assert_close(compiled(tokens), expected)
    assert calls == []


def test_it_is_entered_in_inference_mode_on_float32_of_some_size_alone(monkeypatch):
    monkeypatch.setattr(engine, "onednn_is_faster", lambda: True)
    large = torch.randn(1, 100, 400)

    def is_entered(hidden_states) -> bool:
        return isinstance(faster_linears(hidden_states), OneDnnLinears)

    assert not is_entered(large)
    with torch.no_grad():
        assert not is_entered(large)
    with torch.inference_mode():
        assert is_entered(large)
        assert not is_entered(large[:, :2])
        assert not is_entered(large.bfloat16())
        assert not is_entered(large.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_entered(large)
        monkeypatch.setattr(engine, "onednn_is_faster", lambda: False)
        assert isinstance(faster_linears(large), nullcontext)


def test_other_threads_do_not_enter_it(calls):
    layer, tokens = linear(), torch.randn(5, 300)

    def in_thread():
        with torch.inference_mode():
            layer(tokens)

    with torch.inference_mode(), OneDnnLinears():
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        assert calls == []
        layer(tokens)
    assert len(calls) == 1


def test_the_choice_is_made_once_and_by_measurement(monkeypatch):
    onednn_is_faster.cache_clear()
    try:
        first = onednn_is_faster()
        assert onednn_is_faster() is first
        assert onednn_is_faster.cache_info().misses == 1
        onednn_is_faster.cache_clear()
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert onednn_is_faster() is False
    finally:
        onednn_is_faster.cache_clear()


def test_few_different_numbers_of_rows_are_met_and_few_rows_are_added():
    rounded = {rows: few_numbers_of_rows(rows) for rows in range(1, 4097)}
    assert all(rows <= own < rows + max(8, rows / 16 + 1) for rows, own in rounded.items())
    assert all(rounded[own] == own for own in rounded.values() if own in rounded)
    assert len(set(rounded.values())) < 120


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("kind", ["bfloat16", "oneDNN", "int8"])
def test_linear_layers_meet_few_numbers_of_rows_and_answers_stay(family, kind, monkeypatch):
    model, met = tiny_model(family), set()
    if kind == "int8":
        model.use_int8_layers()
    batches = [ragged_batch(lengths) for lengths in ((5, 1, 7, 4, 10), (3, 9), (13,), (2, 2, 30), (17, 4, 6))]
    model = model.bfloat16() if kind == "bfloat16" else model
    wanted = [model(**batch, output_exit_logits=True).exit_logits for batch in batches]  # with gradients: as they come
    monkeypatch.setattr(
        engine, "faster_linears", lambda states: OneDnnLinears() if kind == "oneDNN" else nullcontext()
    )
    monkeypatch.setattr(engine, "LEAST_WEIGHTS", 1)

    def noted(function):
        return lambda rows, *args: met.add(rows.flatten(0, -2).shape[0]) or function(rows, *args)

    class Linears(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return (noted(func) if func is nn.functional.linear else func)(*args, **(kwargs or {}))

    for module, name in ((engine, "_onednn_linear"), (int8_products, "multiply")):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    with torch.inference_mode(), Linears() if kind == "bfloat16" else nullcontext():
        found = [model(**batch, output_exit_logits=True).exit_logits for batch in batches]
    assert met and all(rows % 8 == 0 for rows in met)
    for own, other in zip(found, wanted, strict=True):
        assert_close(own.float(), other.float(), 0.05 if kind == "bfloat16" else 1e-5)
