"""The compiled operators: the same as PyTorch's own ones, to rounding, for every shape, in a process of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

import fastbert_hf


COMPARE = """
import itertools, json, torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN
import fastbert_hf
from fastbert_hf.modeling import fast_feedforward, int8_products
from fastbert_hf.modeling.fast_feedforward import LeafTree, NeuronTrees

generator = torch.Generator().manual_seed(1)
layers = [
    LeafTree(hidden, nn.functional.gelu, depth, leaf_size, master_size, gated)
    for hidden, depth, leaf_size, master_size, gated in (
        (384, 4, 192, 0, False), (37, 3, 5, 3, True), (16, 0, 9, 0, False), (100, 6, 65, 0, False),
        (768, 1, 33, 8, True),
    )
] + [
    NeuronTrees(hidden, activation, trees, depth, bias)
    for hidden, activation, trees, depth, bias in (
        (384, nn.functional.gelu, 1, 11, False), (37, nn.ReLU(), 3, 4, True), (16, ACT2FN["gelu"], 2, 0, False),
        (64, ACT2FN["gelu_new"], 2, 5, True), (5, nn.functional.gelu, 0, 3, True),
        (64, nn.GELU(), 1, 3, True), (64, nn.GELU(approximate="tanh"), 1, 3, True),
    )
]
for layer in layers:
    for name, parameter in layer.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
cases = list(itertools.product(layers, (0, 1, 2, 3, 7, 8, 64, 300)))
given = [torch.randn(tokens, next(iter(layer.parameters())).shape[-1] if isinstance(layer, NeuronTrees)
         else layer.node_weight.shape[1], generator=generator) for layer, tokens in cases]
# What int8 layers do around their product, for tokens of every size, and some that have none.
rounding = [(torch.randn(rows, width, generator=generator) * 10 ** torch.randn(rows, 1, generator=generator), levels)
            for rows, width in ((0, 8), (1, 5), (3, 16), (7, 37), (64, 384), (300, 1536)) for levels in (255, 127)]
rounding += [(torch.zeros(3, 20), 255), (torch.rand(9, 40) + 5, 255), (-torch.rand(9, 40) - 5, 127),
             (torch.tensor([[1.0] * 40 + [float("nan")], [1.0] * 41, [float("inf")] * 41]), 255)]

def rounded(tokens, levels):
    steps, scale, zero = int8_products.quantise_tokens(tokens, levels)
    fits = scale[:, 0].isfinite()
    outputs = steps[:, :33].float()
    sums = torch.linspace(-1, 1, outputs.shape[1])
    int8_products.scale_tokens(outputs, scale, zero, sums, sums + 1 if levels == 255 else None)
    return fits, steps[fits], scale[fits], zero[fits], outputs[fits]

with torch.no_grad():
    rounded_before = [rounded(*case) for case in rounding]
    before = [layer(tokens) for (layer, _), tokens in zip(cases, given)]
    fastbert_hf.load_operators()
    fastbert_hf.load_operators()
    measured = fast_feedforward.operators_are_faster
    chosen = [layer(tokens) for (layer, _), tokens in zip(cases, given)]
    choices = dict(fast_feedforward._FASTER)
    for (layer, _), tokens in zip(cases, given):
        layer(tokens)
    # Measured once for each shape and number of tokens, and not again.
    assert choices == fast_feedforward._FASTER and len(choices) == 5 * 5, len(choices)
    fast_feedforward.operators_are_faster = lambda layer, tokens: True
    with torch.profiler.profile() as profile:
        rounded_after = [rounded(*case) for case in rounding]
        after = [layer(tokens) for (layer, _), tokens in zip(cases, given)]
    used = {event.key for event in profile.key_averages() if event.key.startswith("fastbert_hf::")}
    alone = [torch.cat([layer(token[None]) for token in tokens]) if len(tokens) == 7 else None
             for (layer, _), tokens in zip(cases, given)]
fast_feedforward.operators_are_faster = lambda layer, tokens: False
with torch.no_grad():
    by_pytorch = [layer(tokens) for (layer, _), tokens in zip(cases, given)]
after += by_pytorch + chosen
before *= 3
fast_feedforward.operators_are_faster = lambda layer, tokens: True
with FlopCounterMode(display=False) as counter, torch.no_grad():
    layers[0](given[6])
assert counter.get_total_flops() == 2 * 64 * (4 * 384 + 2 * 192 * 384), counter.get_total_flops()
worst = max((ours - stock).abs().max().item() if len(stock) else 0 for ours, stock in zip(after, before))
of_one = max((ours - own).abs().max().item() for ours, own in zip(after, alone) if own is not None)
for ours, stock in zip(rounded_after, rounded_before):
    assert all(torch.equal(*pair) for pair in zip(ours[:4], stock[:4]))
    torch.testing.assert_close(ours[4], stock[4], rtol=1e-5, atol=1e-5)
assert rounded_after[-1][0].tolist() == [False, True, False]
# With gradients, in another precision or on a part of a tensor, PyTorch's own ones go on.
layer, tokens = layers[0], given[3]
layer(tokens).sum().backward()
assert layer.leaf_in.grad.any()
with torch.no_grad():
    half = layer.bfloat16()(tokens.bfloat16())
    part = layers[3].sparse(torch.randn(8, 200, generator=generator)[:, ::2])
assert half.dtype is torch.bfloat16 and half.isfinite().all() and part.isfinite().all()
print(json.dumps({"worst": worst, "of_one": of_one, "used": sorted(used)}))
"""


@pytest.mark.skipif(
    not (shutil.which("ninja") and shutil.which("c++")), reason="needs a C++ compiler and ninja to build the operators"
)
def test_operators_compute_what_pytorch_computes(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", COMPARE],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "TORCH_EXTENSIONS_DIR": str(tmp_path)},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    measured = json.loads(finished.stdout.splitlines()[-1])
    assert measured["worst"] < 1e-4 and measured["of_one"] < 1e-4
    assert measured["used"] == [
        "fastbert_hf::descend",
        "fastbert_hf::grouped_linear",
        "fastbert_hf::neuron_trees",
        "fastbert_hf::quantise_tokens",
        "fastbert_hf::scale_tokens_",
        "fastbert_hf::sort_by_leaf",
    ]


def test_without_a_compiler_the_error_says_what_is_missing(tmp_path, monkeypatch):
    for name, value in {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": "", "CXX": "no-such-compiler"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"a C\+\+ compiler.*Everything works without them"):
        fastbert_hf.load_operators()
