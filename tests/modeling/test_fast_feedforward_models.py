"""Models with fast feed-forward layers: every family, saving, PEFT, exits, costs, and hostile configs."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, BertConfig

from fastbert_hf import (
    CascadeForSequenceClassification,
    FastBertConfig,
    FastBertForSequenceClassification,
)
from fastbert_hf.evaluation import executed_flops
from fastbert_hf.modeling.fast_feedforward import LeafTree, NeuronTrees
from fastbert_hf.modeling.feed_forward_settings import feed_forward_layers

from ..common import FAMILIES, assert_close, in_own_memory, pad_token_id_of, ragged_batch, tiny_model, tiny_stock_model


LEAVES = {"form": "leaves", "depth": 2, "leaf_size": 8, "master_size": 4}
NEURONS = {"form": "neurons", "trees": 2, "depth": 7, "bias": True}


def rows_of(batch):
    return [
        {"input_ids": ids[mask.bool()].tolist()}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_alike_in_any_formation(family, tmp_path):
    model = tiny_model(family, feed_forward=LEAVES)
    distinct = {id(layer) for layer in model.fastbert.layers()}
    assert len(feed_forward_layers(model.fastbert.backbone)) == len(distinct)
    batch = ragged_batch(pad_token_id=pad_token_id_of(family))
    speeds = (0.9, 0.7, 0.95, 0.5, 0.98, 0.3)
    outputs = (model(**batch, speed=speed) for speed in speeds)
    speed, output = next(
        found for found in zip(speeds, outputs, strict=True) if len(set(found[1].exit_layer.tolist())) > 1
    )
    for answers in (
        list(model.predict(rows_of(batch), speed=speed)),
        [next(model.predict([row], speed=speed)) for row in rows_of(batch)],
    ):
        assert [answer.exit_layer for answer in answers] == output.exit_layer.tolist()
        assert_close(torch.stack([answer.logits for answer in answers]), output.logits)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.feed_forward == LEAVES
    assert torch.equal(in_own_memory(again)(**batch, speed=speed).logits, output.logits)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "modernbert"])
def test_trees_of_neurons_learn_in_every_family(family):
    model = tiny_model(family, feed_forward=NEURONS).train()
    batch = ragged_batch(pad_token_id=pad_token_id_of(family))
    model(**batch, labels=torch.arange(7) % 3).loss.backward()
    for layer in feed_forward_layers(model.fastbert.backbone).values():
        met = (layer.node_out.grad != 0).any(-1)
        assert isinstance(layer, NeuronTrees) and met[:, 0].all() and not met.all()


def test_gates_have_no_trees_of_neurons():
    with pytest.raises(ValueError, match="have gates"):
        tiny_model("modernbert", feed_forward=NEURONS)


def test_some_layers_alone():
    model = tiny_model(feed_forward={**LEAVES, "layers": [2, 4]})
    assert [isinstance(layer.intermediate, LeafTree) for layer in model.fastbert.layers()] == [
        False,
        True,
        False,
        True,
    ]
    with pytest.raises(ValueError, match="share their weights"):
        tiny_model("albert", feed_forward={**LEAVES, "layers": [1]})


def test_what_it_costs_is_what_is_computed():
    model = tiny_model(feed_forward=LEAVES)
    batch = ragged_batch((9,))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(**batch)
    counted = executed_flops(model, output.exit_layer, torch.tensor([9]), students=False)
    # The attention products are outside of what the counter sees on a CPU.
    dense = tiny_model()
    with FlopCounterMode(display=False) as of_dense, torch.no_grad():
        dense(**batch)
    counted_dense = executed_flops(dense, output.exit_layer, torch.tensor([9]), students=False)
    assert counted_dense.item() - counted.item() == of_dense.get_total_flops() - counter.get_total_flops() > 0


def test_a_new_backbone_learns_with_them():
    model = FastBertForSequenceClassification.from_backbone(tiny_stock_model(), num_labels=3, feed_forward=LEAVES)
    assert model.config.feed_forward == LEAVES and len(feed_forward_layers(model.fastbert.backbone)) == 4
    model.train()(**ragged_batch(), labels=torch.arange(7) % 3).loss.backward()
    assert all(layer.leaf_in.grad.any() for layer in feed_forward_layers(model.fastbert.backbone).values())
    with pytest.raises(ValueError, match="convert_feed_forward"):
        FastBertForSequenceClassification.from_classifier("org/any", feed_forward=LEAVES)


def test_a_cascade_has_them_in_one_member(tmp_path):
    members = [tiny_model(feed_forward=LEAVES, seed=1), tiny_model(seed=2)]
    cascade = CascadeForSequenceClassification.from_members(members)
    cascade.save_pretrained(tmp_path)
    again = CascadeForSequenceClassification.from_pretrained(tmp_path)
    batch = ragged_batch()
    assert torch.equal(in_own_memory(again)(**batch, speed=0.7).logits, cascade(**batch, speed=0.7).logits)


def test_adapters_learn_beside_them():
    model = tiny_model(feed_forward=LEAVES)
    exits = [f"exits.{index}" for index in range(4)]
    adapted = get_peft_model(model, LoraConfig(target_modules=["query", "value"], modules_to_save=exits))
    adapted.train()(**ragged_batch(), labels=torch.arange(7) % 3).loss.backward()
    layer = next(iter(feed_forward_layers(model.fastbert.backbone).values()))
    assert layer.leaf_in.grad is None
    with pytest.raises(ValueError, match="Identity"):
        get_peft_model(tiny_model(feed_forward=LEAVES), LoraConfig(target_modules=["output.dense"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "leaves", "depth": 20, "leaf_size": 65536}, "parameters"),
        ({"form": "neurons", "trees": 65536}, "parameters"),  # of the default depth
        ({"form": "neurons", "depth": 10**9}, "depth"),
        ({"form": "nothing"}, "form is one of"),
        ("leaves", "must be a dict"),
    ],
)
def test_hostile_configs_build_nothing(settings, message):
    config = {"text_config": BertConfig().to_dict(), "feed_forward": settings}
    with pytest.raises(ValueError, match=message):
        FastBertConfig.from_dict(config)
