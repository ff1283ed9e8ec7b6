"""Run the conversions behind "Width" in docs/results.md: which there are, how one is run, and what is kept of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from distilled_runs import SEED, Bench, finished, keep
from torch import nn

from fastbert_hf.modeling.fast_feedforward import NeuronTrees, descend
from fastbert_hf.training.feed_forward_conversion import (
    DenseLayer,
    from_dense,
    read_inputs,
    replace_each,
    split_tokens,
    tree_of,
    tune_layer,
)


SETS = ("sst2", "trec", "mrpc", "ag_news")
SHARES = (0.5, 0.25, 0.125, 0.0625)
LONG_PATH = 12 / 1536  # the neurons of a way through 1x11
KINDS = ("tree", "dense", "random", "top_k")
# From short trials on dev of sst2: the tree of 5e-5, 1e-4 and 2e-4, dense of the last two; the others follow them.
LEARNING_RATES = {"tree": 5e-5, "random": 5e-5, "dense": 1e-4, "top_k": 1e-4, "deleted": 1e-4, "1x11": 1e-4}
LAYER_STEPS = 50
STEPS = 200  # what time allowed
# Rows in a batch, so that it has about 400 tokens on every set.
BATCH_SIZE = {"sst2": 16, "trec": 32, "mrpc": 8, "ag_news": 8}


@dataclass(frozen=True)
class WidthRun:
    """
    One conversion and the distillation after it.

    Args:
        set (`str`): Data set.
        kind (`str`): One of `KINDS`, `"1x11"`, `"deleted"`, or `"full"` for the model that is converted.
        share (`float`): Part of the neurons that a token meets.
    """

    set: str
    kind: str
    share: float = 0.0

    @property
    def name(self) -> str:
        return "-".join(filter(None, [self.set, self.kind, self.share and f"{self.share:g}"]))


class TopNeurons(nn.Module):
    """
    For each token, the k neurons of a dense layer that matter most to it, by the size of activation times output
    weights: what a router that knew everything would choose. It saves nothing, as all of them are computed before.
    """

    def __init__(self, dense: DenseLayer, k: int):
        super().__init__()
        self.dense_up, self.dense_down, self.activation, self.k = dense.up, dense.down, dense.activation, k

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        neurons = self.activation(self.dense_up(tokens))
        sizes = neurons.detach().abs() * self.dense_down.weight.detach().norm(dim=0)
        places = sizes.topk(self.k, -1).indices
        return self.dense_down(torch.zeros_like(neurons).scatter(-1, places, neurons.gather(-1, places)))


@torch.no_grad()
def long_path(dense: DenseLayer, tokens: torch.Tensor, depth: int) -> NeuronTrees:
    """
    Return one tree of neurons in place of a dense layer: the neurons in it decide as 2-means does, and what each of
    them adds is fitted to what those before it on the way have left.
    """
    layer = NeuronTrees(tokens.shape[1], dense.activation, trees=1, depth=depth, bias=True)
    weight, bias, _ = split_tokens(tokens, depth + 1)
    scale = 2 / torch.nn.functional.linear(tokens, weight, bias).std(0)  # most are then far from 0, where GELU is bent
    layer.node_in[0], layer.node_in_bias[0] = weight * scale[:, None], bias * scale
    wanted = dense.outputs(tokens)
    layer.out_bias.copy_(wanted.mean(0))
    left, layer.node_out.data[0] = wanted - layer.out_bias, 0.0
    nodes, logits = descend(tokens, layer.node_in, layer.node_in_bias, depth + 1)
    for node, logit in zip(nodes[:, 0].unbind(1), logits[:, 0].unbind(1), strict=True):
        given = dense.activation(logit)
        products = torch.zeros_like(layer.node_out[0]).index_add_(0, node, given[:, None] * left)
        squares = torch.zeros(len(products)).index_add_(0, node, given.square())
        layer.node_out[0] += products / (squares + 1)[:, None]  # shrunk where few tokens come
        left = left - given[:, None] * layer.node_out[0, node]
    return layer


def make_layer(run: WidthRun, layer_steps: int) -> Callable[[DenseLayer, torch.Tensor], nn.Module]:
    """Return what makes the layer of a run of a dense one and of what that reads."""

    def make(dense: DenseLayer, tokens: torch.Tensor) -> nn.Module:
        neurons, hidden_size = dense.down.in_features, dense.down.out_features
        size = round(run.share * neurons)
        if run.kind == "deleted":
            layer = NeuronTrees(hidden_size, dense.activation, trees=0, bias=True)
            layer.out_bias.data = dense.outputs(tokens).mean(0).detach()
        elif run.kind == "1x11":
            layer = long_path(dense, tokens, depth=11)
        elif run.kind == "top_k":
            layer = TopNeurons(dense, size)
        elif run.kind == "dense":
            layer = from_dense(dense, tokens, 0, size)
        else:
            generator = torch.Generator().manual_seed(SEED)
            tree = tree_of(run.share, neurons)
            directions = torch.randn(2 ** tree["depth"] - 1, hidden_size, generator=generator)
            layer = from_dense(dense, tokens, **tree, node_weights=directions if run.kind == "random" else None)
        if run.kind != "1x11":  # which its fit has gone through level by level
            tune_layer(layer, dense, tokens, layer_steps)
        return layer

    return make


def runs_of(set_name: str) -> list[WidthRun]:
    """Return the runs of a set, those with the fewest neurons first, as they say the most."""
    pairs = [(kind, share) for share in (0.125, 0.0625) for kind in KINDS]
    pairs += [("1x11", LONG_PATH), ("dense", LONG_PATH)]
    pairs += [(kind, share) for kinds in (KINDS[:2], KINDS[2:]) for share in (0.25, 0.5) for kind in kinds]
    return [WidthRun(set_name, "full"), WidthRun(set_name, "deleted"), *(WidthRun(set_name, *pair) for pair in pairs)]


class WidthBench(Bench):
    """A data set with its full model and what that reads."""

    @cached_property
    def read(self) -> list[torch.Tensor]:
        return read_inputs(self.full, self.texts, self.tokenizer, seed=SEED, progress=False)

    def execute(self, run: WidthRun, parts: tuple[str, ...] = ("dev", "test"), **settings) -> dict:
        """Convert and distil the model of a run, and return its numbers."""
        used = {"steps": STEPS, "learning_rate": LEARNING_RATES.get(run.kind), "layer_steps": LAYER_STEPS, **settings}
        result = {
            "run": asdict(run),
            "settings": {**used, "batch_size": BATCH_SIZE[run.set], "seed": SEED},
            **self.about(),
        }
        if run.kind == "full":
            del result["settings"]
            return result | {"distilled": {part: self.measure(self.full, part) for part in parts}}
        model = copy.deepcopy(self.full)
        result["layers"] = replace_each(model, make_layer(run, used["layer_steps"]), self.read, progress=False)
        result["converted"] = {part: self.measure(model, part) for part in parts}
        result["log"] = self.distill(model, used["steps"], used["learning_rate"], BATCH_SIZE[run.set])
        result["distilled"] = {part: self.measure(model, part) for part in parts}
        return result


def run_all(sets: Sequence[str], data_dir: Path, work_dir: Path, results_dir: Path) -> None:
    """Do every run of some sets, or of all, that is not finished."""
    for set_name in sets or SETS:
        runs = [run for run in runs_of(set_name) if finished(run.name, results_dir) is None]
        bench = WidthBench(set_name, data_dir, work_dir) if runs else None
        for number, run in enumerate(runs, start=1):
            print(f"\n{run.name} ({number} of {len(runs)})", flush=True)
            keep(bench.execute(run), run.name, results_dir)
