"""The seam of a layer: its two halves are the whole layer, forwards and backwards, for every family."""

from __future__ import annotations

import pytest
import torch
from transformers import AlbertConfig, AutoModel

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.modeling.encoder_layer import run_layer
from fastbert_hf.modeling.families import get_encoder_family
from fastbert_hf.modeling.packed_batch import PackedBatch
from tests.common import (
    FAMILIES,
    SHAPE,
    assert_close,
    pad_token_id_of,
    ragged_batch,
    spread_out,
    tiny_model,
    without_dropout,
)


# ALBERT's stock class refuses gradient checkpointing, too.
CHECKPOINTED = tuple(family for family in FAMILIES if family != "albert")


def embedded(model: FastBertForSequenceClassification) -> tuple[torch.Tensor, PackedBatch]:
    """What comes to the first layer of a model: `[1, total_tokens, hidden_size]`, and whose tokens they are."""
    batch = ragged_batch(pad_token_id=pad_token_id_of(model.config.text_config.model_type))
    packed_batch, inputs, _ = model.fastbert.pack(**batch)
    with torch.no_grad():
        return model.engine().embed(packed_batch, inputs)


def whole(seam, layer, hidden_states, packed_batch):
    return run_layer(seam, layer, hidden_states, packed_batch)[0]


def in_halves(seam, layer, hidden_states, packed_batch):
    crossings = []

    def between(crossing, batch):
        assert batch is packed_batch and crossing.shape == hidden_states.shape
        crossings.append(crossing)
        return crossing, batch

    output, batch = run_layer(seam, layer, hidden_states, packed_batch, between)
    assert batch is packed_batch and len(crossings) == 1
    return output


def output_and_gradients(run, model, index: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """What a layer returns, and the gradients of its input and of its weights."""
    layer, seam = model.fastbert.layers()[index], get_encoder_family(model.config.text_config).seam
    hidden_states, packed_batch = embedded(model)
    hidden_states.requires_grad_()
    layer.zero_grad()
    output = run(seam, layer, hidden_states, packed_batch)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * weights).mean().backward()
    return (
        output.detach(),
        hidden_states.grad,
        {name: value.grad.clone() for name, value in layer.named_parameters() if value.grad is not None},
    )


def assert_halves_are_the_whole(model: FastBertForSequenceClassification) -> None:
    # The second layer of ModernBERT has another attention than the first.
    for index in (0, 1):
        expected_output, expected_gradient, expected_gradients = output_and_gradients(whole, model, index)
        output, gradient, gradients = output_and_gradients(in_halves, model, index)
        assert_close(output, expected_output)
        assert_close(gradient, expected_gradient)
        assert (
            gradients.keys()
            == expected_gradients.keys()
            == dict(model.fastbert.layers()[index].named_parameters()).keys()
        )
        for name in gradients:
            assert_close(gradients[name], expected_gradients[name])
        assert expected_gradient.abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_feed_forward_are_the_layer(family):
    assert_halves_are_the_whole(tiny_model(family))


def test_groups_of_several_layers_of_albert_are_parted_in_their_last():
    config = AlbertConfig(
        **SHAPE, num_hidden_layers=2, embedding_size=16, inner_group_num=2, max_position_embeddings=64
    )
    model = FastBertForSequenceClassification.from_backbone(spread_out(AutoModel.from_config(config)))
    assert_halves_are_the_whole(model)


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_halves_are_the_layer_with_gradient_checkpointing(family):
    model = without_dropout(tiny_model(family, exit_dropout=0))
    expected = output_and_gradients(whole, model, 1)
    model.train()
    model.gradient_checkpointing_enable()
    layer, calls = model.fastbert.layers()[1], []
    inner = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
    inner.register_forward_hook(lambda *_: calls.append(1))
    for run in (whole, in_halves):
        calls.clear()
        output, gradient, gradients = output_and_gradients(run, model, 1)
        assert len(calls) == 2  # once forwards, and once more on the way back
        assert_close(output, expected[0])
        assert_close(gradient, expected[1])
        for name in gradients:
            assert_close(gradients[name], expected[2][name])


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "modernbert"])
@torch.no_grad()
def test_what_stands_between_the_halves_changes_what_the_feed_forward_reads(family):
    model = tiny_model(family)
    layer, seam = model.fastbert.layers()[0], get_encoder_family(model.config.text_config).seam
    hidden_states, packed_batch = embedded(model)
    kept = torch.arange(len(packed_batch.rows)) % 2 == 0

    def between(crossing, batch):
        return batch.keep(kept, crossing)[::-1]

    output, batch = run_layer(seam, layer, hidden_states, packed_batch, between)
    # Feed-forward layers read token by token, so those of the other texts are not missed.
    expected_batch, expected = packed_batch.keep(kept, whole(seam, layer, hidden_states, packed_batch))
    assert batch.rows.tolist() == expected_batch.rows.tolist()
    assert_close(output, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_inference_mode_are_those_of_the_whole_layers(family):
    model, batch = tiny_model(family), ragged_batch(pad_token_id=pad_token_id_of(family))
    with torch.no_grad():
        expected = model(**batch, output_exit_logits=True).exit_logits
    with torch.inference_mode():
        assert_close(model(**batch, output_exit_logits=True).exit_logits, expected)


def forward_hook(layer, seen):
    layer.register_forward_hook(lambda *_: seen.append(1))


def forward_pre_hook(layer, seen):
    layer.register_forward_pre_hook(lambda *_: seen.append(1))


def other_forward(layer, seen):
    """As Accelerate does for layers that lie elsewhere."""
    stock = layer.forward
    layer.forward = lambda *args, **kwargs: seen.append(1) or stock(*args, **kwargs)


def other_class(layer, seen):
    """As somebody who writes a layer of their own does."""
    stock = type(layer)

    class Layer(stock):
        def forward(self, *args, **kwargs):
            seen.append(1)
            return super().forward(*args, **kwargs)

    layer.__class__ = Layer


@pytest.mark.parametrize("touch", [forward_hook, forward_pre_hook, other_forward, other_class])
def test_what_is_attached_to_a_layer_runs_in_inference_mode_too(touch):
    model, seen = tiny_model(), []
    expected = [answer.logits for answer in model.predict({"input_ids": [[5, 6, 7]]})]
    touch(model.fastbert.layers()[1], seen)
    answers = [answer.logits for answer in model.predict({"input_ids": [[5, 6, 7]]})]
    assert len(seen) == 1
    assert_close(answers[0], expected[0])


def test_hooks_of_all_modules_see_the_layers_in_inference_mode_too():
    model, seen = tiny_model(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        list(model.predict({"input_ids": [[5, 6, 7]]}))
    finally:
        handle.remove()
    assert all(layer in seen for layer in model.fastbert.layers())


def test_compiled_layers_run_in_inference_mode_too():
    model, calls = tiny_model(), []

    def backend(graph, inputs):
        calls.append(1)
        return graph.forward

    with torch.inference_mode():
        expected = model(**ragged_batch()).logits
        model.fastbert.layers()[1].compile(backend=backend)
        assert_close(model(**ragged_batch()).logits, expected)
    assert calls


def test_hooks_on_the_layers_inside_a_group_of_albert_run_in_inference_mode_too():
    model, seen = tiny_model("albert"), []
    for group in model.fastbert.backbone.encoder.albert_layer_groups:
        group.albert_layers[-1].register_forward_hook(lambda *_: seen.append(1))
    list(model.predict([{"input_ids": [5, 6, 7]}]))
    assert len(seen) == model.config.num_hidden_layers
