"""What the logs tell of the trees in training: with our trainers and with a stock one, against counts by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments

from fastbert_hf.modeling.fast_feedforward import LeafTree, NeuronTrees
from fastbert_hf.training import LeafUsage, SelfDistillationArguments, SelfDistillationTrainer
from fastbert_hf.training.checked_trainer import CheckedTrainer

from ..common import tiny_model, tiny_rows


NAMES = {"decision_entropy", "leaf_usage", "dead_leaves"}


def logged(layer: nn.Module, tokens: torch.Tensor) -> dict[str, float]:
    """Return what is logged after one forward pass of a layer."""
    callback, state = LeafUsage(), TrainerState()
    callback.on_train_begin(None, state, None, model=layer.train())
    layer(tokens)
    logs = {"loss": 1.0}
    callback.on_log(None, state, None, logs=logs)
    callback.on_train_end(None, state, None)
    assert not layer._forward_hooks
    return logs


@pytest.mark.parametrize(
    "layer", [LeafTree(4, nn.functional.gelu, depth=2, leaf_size=3), NeuronTrees(4, nn.functional.gelu, 2, 2)]
)
def test_leaves_are_counted(layer):
    """Tokens +e0 go right at every node and -e0 left, so two of four leaves share them evenly."""
    weight, bias = (
        (layer.node_weight, layer.node_bias) if isinstance(layer, LeafTree) else (layer.node_in, layer.node_in_bias)
    )
    with torch.no_grad():
        weight.zero_()
        bias.zero_()
        weight[..., 0] = 2.0
    tokens = torch.zeros(8, 4)
    tokens[:, 0] = torch.tensor([1.0, -1.0]).repeat(4)
    logs = logged(layer, tokens)
    right = 1 / (1 + math.exp(-2))
    bits = -(right * math.log2(right) + (1 - right) * math.log2(1 - right))
    assert logs["decision_entropy"] == pytest.approx(bits, abs=1e-5)
    assert logs["leaf_usage"] == pytest.approx(0.5) and logs["dead_leaves"] == 0.5


def test_only_training_is_counted():
    layer = LeafTree(4, nn.functional.gelu, depth=2, leaf_size=3)
    callback, state = LeafUsage(), TrainerState()
    callback.on_train_begin(None, state, None, model=layer)
    with torch.no_grad():
        layer.eval()(torch.randn(5, 4))
    logs = {"loss": 1.0}
    callback.on_log(None, state, None, logs=logs)
    assert logs == {"loss": 1.0}


@pytest.mark.parametrize("stock", [False, True])
def test_trainers_log_it(stock, tmp_path):
    model = tiny_model(feed_forward={"form": "leaves", "depth": 2, "leaf_size": 4})
    arguments = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    rows = tiny_rows(8)
    if stock:
        kinds = TrainingArguments(str(tmp_path), **arguments)
        trainer = Trainer(model, kinds, train_dataset=rows, callbacks=[LeafUsage()])
    else:
        trainer = CheckedTrainer(model, TrainingArguments(str(tmp_path), **arguments), train_dataset=rows)
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert len(steps) == 2
    assert all(log.keys() >= NAMES and 0 <= log["dead_leaves"] < 1 and 0 < log["leaf_usage"] <= 1 for log in steps)


@pytest.mark.parametrize("feed_forward", [None, {"form": "neurons", "trees": 1, "depth": 2}])
def test_nothing_is_logged_where_no_tree_learns(feed_forward, tmp_path):
    model = tiny_model(feed_forward=feed_forward)
    kinds = SelfDistillationArguments(str(tmp_path), max_steps=1, logging_steps=1, report_to="none", use_cpu=True)
    trainer = SelfDistillationTrainer(model, kinds, train_dataset=tiny_rows(4))
    assert not any(isinstance(callback, LeafUsage) for callback in trainer.callback_handler.callbacks)
