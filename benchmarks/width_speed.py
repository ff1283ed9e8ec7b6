"""Time fast feed-forward layers, alone and in the whole encoder, against dense ones: runs of serving_speed.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from serving_runs import SHAPES as SERVING_SHAPES
from serving_runs import in_turn, ratios
from torch import nn
from transformers import BertConfig

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification, load_operators
from fastbert_hf.modeling import fast_feedforward
from fastbert_hf.modeling.engine import OneDnnLinears
from fastbert_hf.modeling.fast_feedforward import LeafTree, NeuronTrees
from fastbert_hf.modeling.feed_forward_settings import feed_forward_layers
from fastbert_hf.training.feed_forward_conversion import split_tokens, tree_of


# Hidden size, neurons and layers.
SHAPES = {"MiniLM": (384, 1536, 6), "BERT-base": (768, 3072, 12)}
TOKENS = (1, 32, 128, 1024)
SHARES = (0.5, 0.25, 0.125, 0.0625)


def inputs(count: int) -> int:
    """Return how many different inputs of so many tokens a turn has."""
    return max(2, min(8, 2048 // count))


def make_trees(hidden_size: int, neurons: int) -> dict[str, Callable[[], nn.Module]]:
    """Return what makes each kind of layer, by its name."""
    activation = nn.GELU()
    leaves = {
        f"{100 * share:g} %": partial(LeafTree, hidden_size, activation, **tree_of(share, neurons)) for share in SHARES
    }
    return {**leaves, "1x11": partial(NeuronTrees, hidden_size, activation, 1, 11)}


class Dense(nn.Sequential):
    """The feed-forward half of a BERT layer without its normalisation."""

    def __init__(self, hidden_size: int, neurons: int):
        super().__init__(nn.Linear(hidden_size, neurons), nn.GELU(), nn.Linear(neurons, hidden_size))


def without_operators(run: Callable[[], object]) -> Callable[[], object]:
    """Return the same run with PyTorch's own operators alone."""

    def run_without() -> object:
        uses, fast_feedforward.uses_operators = fast_feedforward.uses_operators, lambda *tensors: False
        try:
            return run()
        finally:
            fast_feedforward.uses_operators = uses

    return run_without


def rows_of(seconds: dict[str, list[float]], **about) -> list[dict]:
    """Return one row for every kind: how many times faster than the faster of the dense ones."""
    dense = min((name for name in seconds if name.startswith("dense")), key=lambda name: median(seconds[name]))
    rows = []
    for name, own in seconds.items():
        if not name.startswith("dense"):
            kind, _, how = name.rpartition(" ")
            each = 1e3 / inputs(about["tokens"])
            milliseconds = {"milliseconds": each * median(own), "dense_milliseconds": each * median(seconds[dense])}
            rows.append({**about, "kind": kind, "how": how, **milliseconds, **ratios(seconds[dense], own)})
    return rows


@torch.inference_mode()
def feed_forward_alone(shape: str, repeats: int) -> list[dict]:
    """
    Time as many feed-forward layers as the encoder has, one after the other, so that weights come from where they
    would come from there; and every time other tokens, so that they take other ways.
    """
    load_operators()
    hidden_size, neurons, number = SHAPES[shape]
    stacks = {name: [make().eval() for _ in range(number)] for name, make in make_trees(hidden_size, neurons).items()}
    dense, rows = [Dense(hidden_size, neurons).eval() for _ in range(number)], []
    for count in TOKENS:
        given = [torch.randn(1, count, hidden_size) for _ in range(inputs(count))]

        def run(stack: list[nn.Module], given: list[torch.Tensor] = given) -> None:
            for tokens in given:
                for layer in stack:
                    layer(tokens)

        def run_onednn() -> None:
            with OneDnnLinears():
                run(dense)

        sides = {"dense MKL": partial(run, dense), "dense oneDNN": run_onednn}
        for name, stack in stacks.items():
            sides[f"{name} compiled"] = partial(run, stack)
            sides[f"{name} PyTorch"] = without_operators(partial(run, stack))
        seconds = in_turn(sides, repeats, f"{shape}, {count} tokens")
        rows += rows_of(seconds, shape=shape, tokens=count)
    return rows


def even(layer: LeafTree, arguments: tuple[torch.Tensor, ...]) -> None:
    """Set the nodes of a layer so that its leaves have equally many of the tokens that it reads."""
    tokens = arguments[0].flatten(0, -2)
    directions = torch.randn(layer.node_weight.shape)
    weight, bias, _ = split_tokens(tokens, layer.depth, directions)
    layer.node_weight.copy_(weight)
    layer.node_bias.copy_(bias)


def model_of(shape: str, feed_forward: dict | None = None) -> FastBertForSequenceClassification:
    """Return a model of random weights."""
    torch.manual_seed(0)
    config = FastBertConfig(text_config=BertConfig(**SERVING_SHAPES[shape]), feed_forward=feed_forward)
    return FastBertForSequenceClassification(config).eval()


@torch.inference_mode()
def whole_encoder(shape: str, repeats: int) -> list[dict]:
    """Time all layers of a model, through its engine at full depth, on texts of at most 128 tokens."""
    load_operators()
    neurons = SHAPES[shape][1]
    models = {"dense": model_of(shape)}
    for share in SHARES:
        models[f"{100 * share:g} %"] = model_of(shape, {"form": "leaves", **tree_of(share, neurons)})
    models["1x11"] = model_of(shape, {"form": "neurons", "trees": 1, "depth": 11})
    rows = []
    generator = torch.Generator().manual_seed(0)

    def texts(count: int) -> list[dict[str, list[int]]]:
        lengths = [128] * (count // 128) if count >= 128 else [count]
        vocabulary = models["dense"].config.vocab_size
        return [
            {"input_ids": torch.randint(1000, vocabulary, (length,), generator=generator).tolist()}
            for length in lengths
        ]

    for model in models.values():
        trees = [tree for tree in feed_forward_layers(model.fastbert.backbone).values() if isinstance(tree, LeafTree)]
        hooks = [tree.register_forward_pre_hook(even) for tree in trees]
        list(model.predict(texts(2048), speed=0.0))
        for hook in hooks:
            hook.remove()
    for count in TOKENS:
        given = [texts(count) for _ in range(inputs(count))]

        def run(model: nn.Module, given: list = given) -> None:
            for batch in given:
                list(model.predict(batch, speed=0.0))

        sides = {}
        for name, model in models.items():
            sides[name if name == "dense" else f"{name} compiled"] = partial(run, model)
            if name != "dense":
                sides[f"{name} PyTorch"] = without_operators(partial(run, model))
        seconds = in_turn(sides, repeats, f"{shape}, {count} tokens")
        rows += rows_of(seconds, shape=shape, tokens=count)
    return rows
