"""The part "Width" of docs/results.md: what each control is, and what the tables say of numbers that are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastbert_hf.modeling.fast_feedforward import LeafTree, NeuronTrees
from fastbert_hf.training.feed_forward_conversion import DenseLayer, measure_layer

from ..common import load_script, ragged_batch, tiny_model


BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def runs():
    return load_script(BENCHMARKS / "width_runs.py")


@pytest.fixture(scope="module")
def report(runs):
    return load_script(BENCHMARKS / "width_report.py")


@pytest.fixture(scope="module")
def dense() -> DenseLayer:
    torch.manual_seed(0)
    return DenseLayer(nn.Linear(16, 64), nn.Linear(64, 16), nn.GELU())


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    centres = 3 * torch.randn(16, 16, generator=generator)
    return centres[torch.randint(16, (10_000,), generator=generator)] + torch.randn(10_000, 16, generator=generator)


@pytest.fixture(scope="module")
def made(runs, dense, tokens) -> dict[str, nn.Module]:
    """The layer of every kind, an eighth of the neurons where that means something."""
    kinds = (*runs.KINDS, "deleted")
    return {kind: runs.make_layer(runs.WidthRun("sst2", kind, 0.125), 0)(dense, tokens[:9000]) for kind in kinds}


def test_controls_are_what_they_are_called(made, dense, tokens):
    tree, narrow, random = made["tree"], made["dense"], made["random"]
    assert isinstance(tree, LeafTree) and (tree.depth, tree.leaf_size) == (3, 8)
    assert (narrow.depth, narrow.leaf_size) == (0, 8) and (random.depth, random.leaf_size) == (3, 8)
    assert not torch.allclose(random.node_weight, tree.node_weight)
    assert torch.bincount(random.leaves_of(tokens[:9000])).min() > 500  # as full as those of the tree
    assert (made["deleted"](tokens[:5]) == dense.outputs(tokens[:9000]).mean(0)).all()
    kept = dense.down.weight.norm(dim=0) * dense.neurons(tokens[:50]).abs()
    expected = dense.neurons(tokens[:50]) * torch.zeros_like(kept).scatter(1, kept.topk(8).indices, 1.0)
    torch.testing.assert_close(made["top_k"](tokens[:50]), dense.down(expected))


def test_trees_are_nearer_than_what_they_are_compared_with(made, dense, tokens):
    errors = {kind: measure_layer(layer, dense, tokens[9000:])["error"] for kind, layer in made.items()}
    assert errors["tree"] < errors["random"] < errors["dense"] < errors["deleted"] == pytest.approx(1, abs=0.01)


def test_the_long_path_has_a_neuron_at_every_node(runs, dense, tokens):
    layer = runs.long_path(dense, tokens[:9000], depth=8)
    assert isinstance(layer, NeuronTrees) and (layer.trees, layer.depth) == (1, 8)
    narrow = runs.make_layer(runs.WidthRun("sst2", "dense", 9 / 64), 0)(dense, tokens[:9000])
    errors = [measure_layer(of, dense, tokens[9000:])["error"] for of in (layer, narrow)]
    assert errors[0] < errors[1]


def test_nothing_that_was_not_run_gets_a_number(report):
    parts = report.parts({})
    assert set(report.numbers({}).values()) == {"not run"}
    body = parts["width_shares"].splitlines()[2:]
    assert all(line.count("not run") >= 4 for line in body) and parts["width_frontier"] == "not run"


def test_points_are_lost_against_the_full_model(report, runs):
    def measured(accuracy: float) -> dict:
        return {part: {"accuracy": accuracy, "agreement": 1.0, "executed_flops": 1.0} for part in ("dev", "test")}

    results = {}
    for name, full in zip(runs.SETS, (0.90, 0.96, 0.80, 0.90), strict=True):
        results[f"{name}-full"] = {"distilled": measured(full)}
        results[f"{name}-tree-0.25"] = {"converted": measured(full - 0.03), "distilled": measured(full - 0.004)}
    assert report.numbers(results)["lost_tree_4"] == "0.4"
    (line,) = (line for line in report.shares_table(results).splitlines() if line.startswith("| 25 % | **tree**"))
    assert "| 87.0 → 89.6 |" in line and line.endswith("| 3.0 | 0.4 | 100.0 |")


def test_the_cheapest_speed_is_chosen_on_dev_and_told_of_test(report):
    def sweep(accuracies: list[float], flops: list[float]) -> dict:
        table = {"speed": [0.0, 0.5, 1.0], "accuracy": accuracies, "executed_flops": flops}
        return {"dev": table, "test": {**table, "accuracy": [value - 0.1 for value in accuracies]}}

    results = {"dense": sweep([0.9, 0.897, 0.8], [100, 50, 20]), "0.25": sweep([0.896, 0.89, 0.7], [50, 20, 10])}
    dense, narrow, frontiers = results["dense"], results["0.25"], report.frontiers
    assert frontiers.cheapest(dense, dense, 0.005)["speed_up"] == 2
    point = frontiers.cheapest(dense, narrow, 0.01)
    assert (point["speed"], point["speed_up"]) == (0.5, 5) and point["lost"] == pytest.approx(0.01)
    assert frontiers.cheapest(dense, narrow, 0.001) is None
    assert frontiers.gain(dense, [dense], [narrow], 0.01) == pytest.approx(2.5)
    assert frontiers.gain(dense, [dense], [narrow], 0.001) is None


def test_kept_neurons_are_those_of_the_control(runs, tmp_path):
    frontier = load_script(BENCHMARKS / "width_frontier.py")
    model, dense = frontier.keep_top(tiny_model(), 0.25), tiny_model()
    state = torch.randn(9, 32)
    for layer, own in zip(dense.fastbert.layers(), model.fastbert.layers(), strict=True):
        whole = DenseLayer(layer.intermediate.dense, layer.output.dense, layer.intermediate.intermediate_act_fn)
        neurons = own.intermediate(state)
        assert ((neurons != 0).sum(1) == 16).all()
        torch.testing.assert_close(own.output.dense(neurons), runs.TopNeurons(whole, 16)(state))
    # It is saved as the stock model whose weights it has.
    model.save_pretrained(tmp_path)
    again = frontier.FastBertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == dense.state_dict().keys()
    expected = model(**ragged_batch()).logits
    assert not torch.allclose(again(**ragged_batch()).logits, expected)
    torch.testing.assert_close(frontier.keep_top(again, 0.25)(**ragged_batch()).logits, expected)


@pytest.mark.parametrize("kind", ["random", "deleted"])
def test_controls_of_the_frontier_are_models_that_load(kind, tmp_path):
    frontier = load_script(BENCHMARKS / "width_frontier.py")
    conversion, *_ = frontier.stages_of(kind, 0.25 if kind == "random" else 0.0)
    generator = torch.Generator().manual_seed(3)
    rows = [{"input_ids": torch.randint(5, 100, (12,), generator=generator).tolist()} for _ in range(60)]
    model = tiny_model()
    conversion.make_trainer(tmp_path / "work", model, rows, None, None, use_cpu=True, report_to="none")
    model.save_pretrained(tmp_path / "model")
    again = frontier.FastBertForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(again(**ragged_batch()).logits, model.eval()(**ragged_batch()).logits)
    assert again.config.feed_forward["form"] == {"random": "leaves", "deleted": "neurons"}[kind]
