"""Int8 layers: exact sums, tokens rounded each by itself, and what a processor without VNNI does."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastbert_hf.modeling import int8_products
from fastbert_hf.modeling.int8_layers import Int8Embedding, Int8Linear, Neighbours
from fastbert_hf.modeling.int8_products import LEVELS, exact_levels, quantise_tokens, quantise_weights

from ..common import IN_A_FORK, tiny_model


needs_onednn = pytest.mark.skipif(exact_levels() is None, reason="oneDNN multiplies no bytes here")
SHAPES = ((1, 1), (5, 3), (48, 96), (384, 130))


def layer_of(inputs: int, outputs: int, bias: bool = True) -> tuple[nn.Linear, Int8Linear]:
    torch.manual_seed(inputs)
    linear = nn.Linear(inputs, outputs, bias)
    return linear, Int8Linear.of(linear)


def tokens_of(rows: int, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    spread = 10 ** torch.randn(rows, 1, generator=generator)  # tokens of different sizes
    return torch.randn(rows, inputs, generator=generator) * spread + torch.rand(rows, 1, generator=generator)


def wanted(layer: Int8Linear, tokens: torch.Tensor, levels: int) -> torch.Tensor:
    """What the layer should give, in whole numbers and float64."""
    greatest, least = tokens.amax(1, keepdim=True).clamp(min=0), tokens.amin(1, keepdim=True).clamp(max=0)
    scale = ((greatest - least) / levels).clamp(min=1e-30)
    zero = (-least / scale).round()
    steps = ((tokens / scale).round() + zero).clamp(0, levels) - zero
    products = steps.long() @ layer.weight.long().T
    outputs = products.double() * scale.double() * layer.weight_scale.double()
    return outputs if layer.bias is None else outputs + layer.bias.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 17, 200])
@torch.no_grad()
def test_sums_are_exact(shape, bias, rows):
    _, layer = layer_of(*shape, bias)
    tokens = tokens_of(rows, shape[0])
    expected = wanted(layer, tokens, exact_levels() or LEVELS[0])
    size = tokens.abs().amax(1, keepdim=True)
    assert ((layer(tokens).double() - expected).abs() / size).max() < 1e-5


@pytest.mark.parametrize("levels", LEVELS)
def test_tokens_are_off_by_half_a_step(levels):
    tokens = tokens_of(50, 64)
    steps, scale, zero = quantise_tokens(tokens, levels)
    assert steps.dtype is torch.uint8 and steps.max() == levels
    off = ((steps.float() - zero) * scale - tokens).abs() / scale
    # A whole step only where rounding of the greatest and of the least value add up.
    assert off.max() < 1.001 and off.flatten().kthvalue(off.numel() * 99 // 100).values < 0.501
    # 0 is met exactly, as in rows that an activation has cut.
    cut = tokens.relu()
    steps, scale, zero = quantise_tokens(cut, levels)
    assert (((steps.float() - zero) * scale)[cut == 0] == 0).all()


def test_weights_are_off_by_half_a_step_at_most():
    weight = torch.randn(20, 33)
    weight[3] = 0
    quantised, scale = quantise_weights(weight)
    assert quantised.dtype is torch.int8 and quantised.abs().max() == 127
    assert (quantised.float() * scale[:, None] - weight).abs().le(scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_a_row_gives_what_it_gives_alone_to_the_bit(shape):
    _, layer = layer_of(*shape)
    tokens = tokens_of(70, shape[0])
    whole = layer(tokens)
    for rows in (1, 2, 5, 33):
        assert torch.equal(torch.cat([layer(part) for part in tokens.split(rows)]), whole), rows
    assert torch.equal(layer(tokens.flip(0)).flip(0), whole)
    assert torch.equal(layer(tokens.view(7, 10, -1)).flatten(0, 1), whole)


@torch.inference_mode()
def test_it_is_near_the_layer_that_it_was():
    linear, layer = layer_of(384, 130)
    tokens = tokens_of(100, 384)
    off = (layer(tokens) - linear(tokens)).norm(dim=1) / linear(tokens).norm(dim=1)
    assert off.max() < 0.03


@torch.inference_mode()
def test_a_token_that_is_not_finite_spoils_itself_alone():
    _, layer = layer_of(48, 96)
    tokens = tokens_of(4, 48)
    clean = layer(tokens)
    for fault in (float("nan"), float("inf"), -float("inf")):
        broken = tokens.clone()
        broken[1, 40] = fault
        outputs = layer(broken)
        assert not outputs[1].isfinite().any()
        assert torch.equal(outputs[[0, 2, 3]], clean[[0, 2, 3]])


@torch.inference_mode()
def test_zeros_give_the_bias_and_no_rows_none():
    _, layer = layer_of(48, 96)
    assert torch.equal(layer(torch.zeros(2, 48)), layer.bias.expand(2, -1))
    assert layer(torch.zeros(0, 48)).shape == (0, 96)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.inference_mode()
def test_what_comes_in_says_what_goes_out(dtype):
    _, layer = layer_of(48, 96)
    tokens = tokens_of(9, 48).to(dtype)
    outputs = layer(tokens)
    assert outputs.dtype is dtype
    torch.testing.assert_close(outputs, layer(tokens.float()).to(dtype))


def test_rounding_lets_gradients_through():
    linear, layer = layer_of(48, 96)
    tokens = tokens_of(9, 48).requires_grad_()
    with torch.inference_mode():
        expected = layer(tokens)
    outputs = layer(tokens)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    outputs.square().sum().backward()
    rounded = nn.Linear(48, 96)
    rounded.weight.data, rounded.bias.data = layer.weight * layer.weight_scale[:, None], linear.bias.data
    (gradient,) = torch.autograd.grad(outputs.detach().mul(2).mul(rounded(tokens)).sum(), tokens)
    torch.testing.assert_close(tokens.grad, gradient, rtol=1e-4, atol=1e-3)
    assert layer.weight.grad is None and layer.bias.grad.any()


@torch.no_grad()
def test_changed_weights_are_packed_anew():
    _, layer = layer_of(48, 96)
    tokens, (other, _) = tokens_of(9, 48), quantise_weights(torch.randn(96, 48))
    before = layer(tokens)
    layer.weight.copy_(other)
    assert not torch.equal(layer(tokens), before)
    expected = wanted(layer, tokens, exact_levels() or LEVELS[0])
    torch.testing.assert_close(layer(tokens).double(), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_copies_pickles_and_threads_agree():
    _, layer = layer_of(384, 130)
    tokens = tokens_of(60, 384)
    expected = layer(tokens)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(tokens), expected)
    fresh = copy.deepcopy(layer)

    def answer(_) -> torch.Tensor:
        with torch.inference_mode():
            return fresh(tokens)

    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(outputs, expected) for outputs in pool.map(answer, range(32)))


def test_embeddings_give_rounded_rows():
    torch.manual_seed(0)
    embedding = nn.Embedding(50, 16, padding_idx=1)
    rounded = Int8Embedding.of(embedding)
    ids = torch.tensor([[3, 7, 1], [49, 0, 3]])
    assert (rounded(ids) - embedding(ids)).abs().max() < embedding.weight.abs().max() / 254 + 1e-6
    assert not rounded(ids)[0, 2].any() and torch.equal(rounded(ids)[0, 0], rounded(ids)[1, 2])
    assert rounded.state_dict().keys() == {"weight", "weight_scale"}


# Products of a byte and an int8, two of them added in 16 bits, overflow on processors without VNNI.
WITHOUT_VNNI = """
import json
import torch
from torch import nn
from fastbert_hf.modeling.int8_layers import Int8Linear
from fastbert_hf.modeling.int8_products import exact_levels

def measure(isa):
    os.environ["ONEDNN_MAX_CPU_ISA"] = isa  # oneDNN reads it when it multiplies for the first time
    torch.manual_seed(0)
    layer = Int8Linear.of(nn.Linear(256, 64))
    layer.weight.data = torch.full((64, 256), 127, dtype=torch.int8)
    tokens = torch.rand(40, 256, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        outputs = layer(tokens)
    expected = tokens.double().sum(1, keepdim=True) * 127 * layer.weight_scale.double() + layer.bias.double()
    print(json.dumps({"levels": exact_levels(), "off": ((outputs - expected).abs() / expected).max().item()}))

for isa in sys.argv[1:]:
    in_a_fork(measure, isa)
"""
PROCESSORS = ("AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "DEFAULT")


@pytest.fixture(scope="module")
def measured() -> dict[str, dict]:
    """Levels and greatest error on each processor."""
    finished = subprocess.run(
        [sys.executable, "-c", IN_A_FORK + WITHOUT_VNNI, *PROCESSORS],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return dict(zip(PROCESSORS, map(json.loads, finished.stdout.splitlines()), strict=True))


@needs_onednn
@pytest.mark.parametrize("isa", PROCESSORS)
def test_sums_do_not_overflow_on_older_processors(measured, isa):
    assert measured[isa]["levels"] in LEVELS and measured[isa]["off"] < 0.01
    if isa == "AVX2":
        assert measured[isa]["levels"] == 127


def memory_of_files() -> int:
    """Return how many bytes of files this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(sys.platform != "linux" or exact_levels() is None, reason="needs oneDNN on Linux")
def test_a_checkpoints_pages_are_given_back_once_weights_are_packed_and_come_again(tmp_path):
    weight, tokens = torch.randint(-127, 128, (4096, 4096), dtype=torch.int8), torch.randn(1, 4096)
    save_file({"weight": weight}, tmp_path / "weight.safetensors")
    layer = Int8Linear(4096, 4096, bias=False)
    layer.weight_scale.fill_(0.01)
    before = memory_of_files()
    layer.weight = load_file(tmp_path / "weight.safetensors")["weight"]
    assert torch.equal(layer.weight, weight)
    if memory_of_files() < before + 0.9 * weight.nbytes:
        pytest.skip("files are copied here, or lie in memory anyway")
    with torch.inference_mode():
        first = layer(tokens)
        assert memory_of_files() < before + 0.2 * weight.nbytes
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer(tokens), first)


@pytest.fixture
def counted(monkeypatch):
    """How often tokens were rounded and multiplied since it was asked last."""
    counts = {"quantise_tokens": 0, "multiply": 0}

    def counting(name):
        own = getattr(int8_products, name)

        def count(*given):
            counts[name] += 1
            return own(*given)

        return count

    for name in counts:
        monkeypatch.setattr(int8_products, name, counting(name))

    def since() -> tuple[int, ...]:
        found = tuple(counts.values())
        counts.update(dict.fromkeys(counts, 0))
        return found

    return since


@needs_onednn
def test_query_key_and_value_round_their_tokens_once_and_multiply_them_together(counted):
    model = tiny_model()
    model.use_int8_layers()
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = one.fastbert.layers()[0]
        attention = layer.attention.self
        parts = attention.query, attention.key, attention.value
        states = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            counted()
            together = [part(states) for part in parts]
            assert counted() == (1, 1)
            alone = [copy.deepcopy(part)(states) for part in parts]
            assert counted() == (3, 3) and all(map(torch.equal, together, alone))
        with torch.no_grad():
            before = attention.query(states)
            states.mul_(2)  # counted by PyTorch
            assert not torch.equal(attention.key(states), together[1])
            assert not torch.equal(attention.query(states), before)
        # Kept no longer than the tensor, and apart in a copy and in other layers.
        del states
        reading = attention.query._neighbours._of_thread.reading
        assert reading.rounded is None and not reading.products
        assert attention.query._neighbours is attention.value._neighbours
        assert attention.query._neighbours is not one.fastbert.layers()[1].attention.self.query._neighbours
    assert model.fastbert.layers()[0].attention.self.query._neighbours is not attention.query._neighbours


def neighbours_of(*shapes: tuple[int, bool]) -> list[Int8Linear]:
    parts = [layer_of(16, outputs, bias)[1] for outputs, bias in shapes]
    neighbours = Neighbours(parts)
    for part in parts:
        part._neighbours = neighbours
    return parts


@needs_onednn
@torch.no_grad()
def test_neighbours_notice_what_changed(counted):
    parts = neighbours_of((16, True), (24, False), (8, True))

    def read(chosen=parts):
        states = torch.randn(5, 16)
        found = [part(states) for part in chosen]
        counts = counted()
        assert all(map(torch.equal, found, [copy.deepcopy(part)(states) for part in chosen]))
        counted()
        return counts

    assert read() == read() == read(parts[1:]) == read(parts[:1]) == read(parts[::-1]) == (1, 1)
    parts[0].bias.add_(1)
    parts[2].bias.data.add_(1)
    assert read() == (1, 1)
    parts[1].weight = parts[1].weight.flip(0)
    parts[2].weight_scale.mul_(2)
    assert read() == (1, 1)
    states = torch.randn(5, 16)
    parts[1](states).add_(1)  # changes nothing of the others'
    assert torch.equal(parts[2](states), copy.deepcopy(parts[2])(states))
    del parts[1]
    counted()
    assert read() == (1, 2)  # the others by themselves


@needs_onednn
@torch.inference_mode()
def test_weights_of_inference_mode_are_packed_anew_when_they_are_loaded():
    # Such tensors do not count how often they were changed.
    for parts in (neighbours_of((16, True), (16, True), (16, True)), [layer_of(16, 16)[1]]):
        for part in parts:
            part(torch.randn(5, 16))
            part.load_state_dict({**part.state_dict(), "weight": part.weight.flip(0)})
        states = torch.randn(5, 16)
        for part in parts:
            assert torch.equal(part(states), copy.deepcopy(part)(states))


@needs_onednn
def test_threads_read_together():
    states = [torch.randn(length, 16) for length in (1, 5, 9, 17) * 8]
    for _ in range(10):
        parts = neighbours_of((16, True), (16, True), (16, True))
        alone = [copy.deepcopy(part) for part in parts]

        def read(own, parts=parts):
            with torch.inference_mode():
                return [part(own) for part in parts]

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(read, states))
        assert all(all(map(torch.equal, one, read(own, alone))) for own, one in zip(states, found, strict=True))


@needs_onednn
@torch.no_grad()
def test_a_model_goes_when_it_is_let_go():
    parts = neighbours_of((16, True), (16, True), (16, True))
    for part in parts:
        part(torch.randn(2, 16))
    gone = weakref.ref(parts[0])
    gc.disable()
    try:
        del part, parts
        assert gone() is None
    finally:
        gc.enable()
