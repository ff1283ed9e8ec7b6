"""Tools that explain answers, such as Captum's, say of a model what they say of the stock one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.modeling.families import ENCODER_FAMILIES, encoder_layers
from tests.common import FAMILIES, assert_close, pad_token_id_of, ragged_batch, stock, tiny_model


STEPS = 4
WITH_STOCK_HEADS = [family for family in FAMILIES if ENCODER_FAMILIES[family].head is not None]


def with_hook(layer: nn.Module, hook: Callable, call: Callable):
    handle = layer.register_forward_hook(hook)
    try:
        return call()
    finally:
        handle.remove()


def output_of(layer: nn.Module, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a layer gives inside a model."""
    seen = []
    with_hook(layer, lambda module, inputs, output: seen.append(output), lambda: model(**batch))
    return seen[0].detach()


def integrated_gradients(model: nn.Module, layer: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    Return what Captum's `LayerIntegratedGradients` returns: the model is called on `STEPS` copies of a batch, and in
    each of them a hook puts another mixture of the layer's output and of its output for a baseline.
    """
    baseline = output_of(layer, model, {**batch, "input_ids": torch.full_like(batch["input_ids"], 7)})
    given = output_of(layer, model, batch)
    steps = [(step + 0.5) / STEPS for step in range(STEPS)]
    mixtures = torch.cat([baseline + step * (given - baseline) for step in steps]).requires_grad_()
    copies = {name: value.repeat(STEPS, 1) for name, value in batch.items()}
    logits = with_hook(layer, lambda *_: mixtures, lambda: model(**copies).logits)
    (gradients,) = torch.autograd.grad(logits[:, 1].sum(), mixtures)
    return (given - baseline) * gradients.unflatten(0, (STEPS, -1)).mean(0)


@pytest.mark.parametrize("family", WITH_STOCK_HEADS)
def test_attributions_to_the_embeddings_are_those_of_the_stock_model(family):
    reference = stock(family)
    model = FastBertForSequenceClassification.from_classifier(reference)
    batch = ragged_batch((7, 4, 9, 4), pad_token_id=pad_token_id_of(family))
    backbones = model.fastbert.backbone, reference.base_model
    for part in (lambda backbone: backbone.embeddings, lambda backbone: backbone.get_input_embeddings()):
        actual, expected = (
            integrated_gradients(one, part(backbone), batch)
            for one, backbone in zip((model, reference), backbones, strict=True)
        )
        assert actual.shape == (4, 9, expected.shape[-1])
        assert expected.abs().max() > 1e-3
        assert_close(actual, expected)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_answers_with_hooked_embeddings_are_the_same(family):
    model = tiny_model(family)
    batch = ragged_batch(pad_token_id=pad_token_id_of(family), padding_side="left")
    batch["input_ids"][batch["attention_mask"] == 0] = 10**6  # never read
    seen, embeddings = [], model.fastbert.backbone.embeddings
    with torch.no_grad():
        expected = model(**batch, speed=0.7)
        output = with_hook(embeddings, lambda *args: seen.append(args[-1]), lambda: model(**batch, speed=0.7))
        states = with_hook(embeddings, lambda *_: None, lambda: model.fastbert(**batch).last_hidden_state)
        assert_close(states, model.fastbert(**batch).last_hidden_state)
    assert seen[0].shape[:2] == batch["input_ids"].shape
    assert output.exit_layer.tolist() == expected.exit_layer.tolist()
    assert_close(output.logits, expected.logits)


@pytest.mark.parametrize("family", WITH_STOCK_HEADS)
def test_attributions_to_a_layer_are_those_of_the_stock_model_for_one_text(family):
    reference = stock(family)
    model = FastBertForSequenceClassification.from_classifier(reference)
    actual, expected = (
        integrated_gradients(one, encoder_layers(backbone)[0], ragged_batch((7,)))
        for one, backbone in ((model, model.fastbert.backbone), (reference, reference.base_model))
    )
    assert actual.shape == (1, 7, 32)
    assert expected.abs().max() > 1e-3
    assert_close(actual, expected)


def test_a_layer_of_several_texts_says_how_they_are_explained():
    model, batch = tiny_model(), ragged_batch((7, 4, 9))
    with pytest.raises(ValueError, match=r"one text at a time, or hook its embeddings.*backbone\.embeddings"):
        integrated_gradients(model, model.fastbert.layers()[1], batch)
