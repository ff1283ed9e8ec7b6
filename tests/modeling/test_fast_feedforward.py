"""Fast feed-forward layers: the sparse path against the masked one, what is read, known layers, and bad settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.bert.modeling_bert import BertLayer

from fastbert_hf.modeling.fast_feedforward import LeafTree, NeuronTrees
from fastbert_hf.modeling.feed_forward_settings import check_feed_forward, make_feed_forward

from ..common import tiny_text_config


HIDDEN = 16
LEAVES = [
    LeafTree(HIDDEN, nn.functional.gelu, depth, leaf_size=5, master_size=master, gated=gated)
    for depth in (0, 1, 3, 7)
    for master in (0, 3)
    for gated in (False, True)
]
TREES = [
    NeuronTrees(HIDDEN, nn.functional.gelu, trees, depth, bias=bias)
    for trees, depth in ((1, 0), (5, 0), (2, 3), (1, 11), (3, 8))
    for bias in (False, True)
]


def filled(layer: nn.Module, dtype: torch.dtype = torch.double) -> nn.Module:
    """The layer with weights of a size that makes decisions and outputs differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return layer.to(dtype).eval()


def tokens(number: int, dtype: torch.dtype = torch.double) -> torch.Tensor:
    return torch.randn(number, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("number", [0, 1, 40])
@pytest.mark.parametrize("layer", [*LEAVES, *TREES], ids=repr)
def test_sparse_path_equals_the_masked_dense_one(layer, number):
    filled(layer)
    results = []
    for path in (layer.dense, layer.sparse):
        layer.zero_grad(set_to_none=False)
        given = tokens(number).requires_grad_()
        output = path(given)
        (output * torch.arange(output.numel()).view_as(output).sin()).sum().backward()
        gradients = {
            name: torch.zeros(()) if p.grad is None else p.grad.clone() for name, p in layer.named_parameters()
        }
        results.append((output.detach(), torch.zeros(()) if given.grad is None else given.grad, gradients))
    (dense, dense_input, dense_weights), (sparse, sparse_input, sparse_weights) = results
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)
    assert (sparse_input - dense_input).abs().sum() < 1e-10
    for name, gradient in dense_weights.items():
        assert (gradient - sparse_weights[name]).abs().sum() < 1e-9, name


@pytest.mark.parametrize("layer", [*LEAVES, *TREES], ids=repr)
def test_a_token_does_not_depend_on_others(layer):
    filled(layer)
    given = tokens(40)
    with torch.no_grad():
        together = layer(given.view(2, 20, HIDDEN)).view(40, HIDDEN)
        alone = torch.cat([layer(token[None]) for token in given])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def read_rows(layer: nn.Module, given: torch.Tensor) -> dict[str, int]:
    """How many neurons of each weight had a part in the output, by their gradients."""
    layer.zero_grad()
    layer.sparse(given).sum().backward()
    return {
        # The neurons of leaves are columns of `leaf_in`.
        name: int((p.grad != 0).any(1 if name == "leaf_in" else -1).sum())
        for name, p in layer.named_parameters()
        if p.grad is not None
    }


def test_a_token_meets_as_many_neurons_as_are_promised():
    for trees, depth in ((1, 11), (3, 8), (2, 3), (5, 0)):
        read = read_rows(filled(NeuronTrees(HIDDEN, nn.functional.gelu, trees, depth)), tokens(1))
        assert read["node_in"] == read["node_out"] == trees * (depth + 1)
    layer = filled(LeafTree(HIDDEN, nn.functional.gelu, depth=4, leaf_size=7, gated=True))
    assert read_rows(layer, tokens(1))["leaf_in"] == 14


@pytest.mark.parametrize("layer", [*LEAVES, *TREES], ids=repr)
def test_what_is_counted_is_what_is_computed(layer):
    filled(layer, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(tokens(24, torch.float32))
    # embedding_bag, which adds up the output rows of a token, is not among what the counter knows.
    summed = layer.trees * (layer.depth + 1) * HIDDEN if isinstance(layer, NeuronTrees) else 0
    master = sum(part.weight.numel() for part in layer.modules() if isinstance(part, nn.Linear))
    assert counter.get_total_flops() == 2 * 24 * (layer.macs_per_token + master - summed)


def test_neurons_beside_the_way_change_nothing():
    layer = filled(NeuronTrees(HIDDEN, nn.functional.gelu, 2, 9))
    given = tokens(1)
    layer.sparse(given).sum().backward()
    on_the_way = (layer.node_out.grad != 0).any(-1)
    with torch.no_grad():
        before = layer(given)
        for weight in (layer.node_in, layer.node_in_bias, layer.node_out):
            weight[~on_the_way] = float("nan")
        assert torch.equal(layer(given), before)
    layer = filled(LeafTree(HIDDEN, nn.functional.gelu, depth=4, leaf_size=7))
    leaf = int(layer.leaves_of(given))
    with torch.no_grad():
        before = layer(given)
        for weight in (layer.leaf_in, layer.leaf_in_bias, layer.leaf_out, layer.leaf_out_bias):
            weight[torch.arange(16) != leaf] = float("nan")
        assert torch.equal(layer(given), before)


def test_depth_zero_is_the_layer_of_bert():
    config = tiny_text_config("bert")
    config._attn_implementation = "eager"
    stock = BertLayer(config).eval()
    given = torch.randn(2, 9, 32)
    expected = stock(given)
    up, down = stock.intermediate.dense, stock.output.dense
    leaves = LeafTree(32, nn.functional.gelu, depth=0, leaf_size=64)
    trees = NeuronTrees(32, nn.functional.gelu, trees=64, depth=0, bias=True)
    with torch.no_grad():
        leaves.leaf_in[0], leaves.leaf_in_bias[0] = up.weight.T, up.bias
        leaves.leaf_out[0], leaves.leaf_out_bias[0] = down.weight.T, down.bias
        trees.node_in[:, 0], trees.node_in_bias[:, 0], trees.node_out[:, 0] = up.weight, up.bias, down.weight.T
        trees.out_bias.copy_(down.bias)
    stock.output.dense = nn.Identity()
    for layer in (leaves, trees):
        stock.intermediate = layer
        torch.testing.assert_close(stock(given), expected, rtol=0, atol=1e-6)
    no_tree = NeuronTrees(32, nn.functional.gelu, trees=0, bias=True)
    nn.init.ones_(no_tree.out_bias)
    assert (no_tree(given) == 1).all()


def test_soft_training_mixes_all_leaves_and_hardens():
    layer = filled(LeafTree(HIDDEN, nn.functional.gelu, depth=2, leaf_size=3, routing="soft")).train()
    given = tokens(11)
    probabilities, _ = layer.probabilities(given)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(11, dtype=torch.double))
    expected = 0
    for leaf in range(4):
        neurons = nn.functional.gelu(given @ layer.leaf_in[leaf] + layer.leaf_in_bias[leaf])
        output = neurons @ layer.leaf_out[leaf] + layer.leaf_out_bias[leaf]
        expected = expected + probabilities[:, [leaf]] * output
    torch.testing.assert_close(layer(given), expected, rtol=0, atol=1e-12)
    # Decisions that are certain make it what evaluation computes.
    with torch.no_grad():
        layer.node_weight.mul_(1e4)
        torch.testing.assert_close(layer.dense(given), layer.eval()(given), rtol=0, atol=1e-9)


@pytest.mark.parametrize("loss", ["hardening", "balance"])
def test_auxiliary_losses_reach_the_nodes(loss):
    layer = filled(LeafTree(HIDDEN, nn.functional.gelu, depth=3, leaf_size=3, routing="soft", **{loss: 0.1}))
    with torch.no_grad():
        layer.node_bias.add_(1)
    given, optimizer = tokens(200), torch.optim.SGD([layer.node_weight, layer.node_bias], lr=1.0)

    def measured() -> float:
        probabilities, to_right = layer.probabilities(given)
        if loss == "hardening":
            return (torch.special.entr(to_right) + torch.special.entr(1 - to_right)).sum(1).mean().item()
        return probabilities.mean(0).max().item()

    before = measured()
    for _ in range(30):
        optimizer.zero_grad()
        (layer.train()(given) * 0).sum().backward()  # nothing else is learnt
        optimizer.step()
    assert measured() < 0.9 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [LEAVES[-3], TREES[-3]], ids=repr)
def test_half_precision(layer, dtype):
    filled(layer, torch.float32)
    given = tokens(20, torch.float32).to(dtype)
    with torch.no_grad():
        exact, half = layer.to(dtype).float()(given.float()), layer.to(dtype)(given)
    # A decision near 0 may fall otherwise.
    assert (
        half.dtype == dtype and ((half.float() - exact).abs().amax(1) < 0.1 * exact.abs().max()).float().mean() > 0.8
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("leaves", "must be a dict"),
        ({"depth": 3}, "whose form is one of"),
        ({"form": ["leaves"]}, "whose form is one of"),
        ({"form": "leaves", "trees": 3}, "no field 'trees'"),
        ({"form": "leaves", "depth": 21}, "from 0 to 20, got 21"),
        ({"form": "leaves", "depth": True}, "got True"),
        ({"form": "leaves", "leaf_size": 0}, "from 1 to"),
        ({"form": "leaves", "routing": "warm"}, "'hard' or 'soft'"),
        ({"form": "leaves", "hardening": -1}, "at least 0"),
        ({"form": "leaves", "layers": [0]}, "from 1 to 4"),
        ({"form": "leaves", "layers": [1, 1]}, "different numbers"),
        ({"form": "neurons", "depth": 2.0}, "got 2.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_feed_forward(settings, num_layers=4)


def test_gates_are_for_leaves():
    with pytest.raises(ValueError, match="have gates"):
        make_feed_forward({"form": "neurons"}, HIDDEN, nn.functional.gelu, gated=True)
