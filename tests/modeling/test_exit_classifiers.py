from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, LoraModel
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification
from fastbert_hf.modeling.answer_layouts import TextLayout
from fastbert_hf.modeling.exit_classifiers import EXIT_TYPES, ExitClassifier, exit_types_of
from fastbert_hf.modeling.packed_batch import pack_padded
from tests.common import (
    FAMILIES,
    NUM_LAYERS,
    assert_close,
    ragged_batch,
    reference_exit_logits,
    spread_out,
    tiny_model,
    tiny_text_config,
)


OF_TEXTS = exit_types_of(TextLayout())


LENGTHS = (4, 1, 7, 4, 10)


def packed_states(padding_side: str = "right") -> tuple:
    """Random hidden states of a ragged batch: padded and packed, and the batch and padding that packed them."""
    batch = ragged_batch(LENGTHS, padding_side=padding_side)
    packed_batch, padding = pack_padded(batch["attention_mask"])
    padded = torch.randn(*batch["input_ids"].shape, 32, generator=torch.Generator().manual_seed(0))
    return padded, padding.unpad(padded), packed_batch, padding


def texts_in_packed_order(hidden_states: torch.Tensor, packed_batch) -> tuple[torch.Tensor, ...]:
    return hidden_states[0].split(packed_batch.lengths.tolist())


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_exit_equals_the_papers_structure_on_each_text_alone(heads):
    model = tiny_model(exit_num_attention_heads=heads)
    _, hidden_states, packed_batch, _ = packed_states()
    for depth in (1, NUM_LAYERS):
        logits = model.exits[depth - 1](hidden_states, packed_batch)
        texts = texts_in_packed_order(hidden_states, packed_batch)
        assert_close(logits, torch.stack([reference_exit_logits(model, depth, text) for text in texts]))


def as_adapter(linear: nn.Linear) -> nn.Module:
    adapted = LoraModel(nn.ModuleDict({"key": linear}), LoraConfig(target_modules=["key"]), "default").model["key"]
    nn.init.normal_(adapted.lora_B["default"].weight, std=0.1)
    return adapted


def offloaded(linear: nn.Linear) -> nn.Module:
    return cpu_offload(linear, execution_device="cpu")


def with_output_hook(linear: nn.Linear) -> nn.Module:
    linear.register_forward_hook(lambda module, inputs, outputs: 2 * outputs)
    return linear


@pytest.mark.parametrize("change", [as_adapter, offloaded, with_output_hook, weight_norm])
def test_attention_exit_follows_what_a_changed_key_layer_computes(change):
    model = tiny_model()
    pooler, (_, hidden_states, packed_batch, _) = model.exits[1].pooler, packed_states()
    pooler.exit_key = change(pooler.exit_key)
    with torch.no_grad():
        wanted = copy.deepcopy(model)
        bias = pooler.exit_key(torch.zeros(1, 128))
        plain = nn.Linear(128, 128)
        plain.weight.copy_((pooler.exit_key(torch.eye(128)) - bias).T)
        plain.bias.copy_(bias[0])
        wanted.exits[1].pooler.exit_key = plain
        logits = model.exits[1](hidden_states, packed_batch)
        texts = texts_in_packed_order(hidden_states, packed_batch)
        assert_close(logits, torch.stack([reference_exit_logits(wanted, 2, text) for text in texts]))


@pytest.mark.parametrize(
    ("family", "exit_type"), [*((family, "linear") for family in FAMILIES), ("bert", "linear_mean")]
)
def test_linear_exit_equals_the_familys_stock_head_on_each_first_token_or_mean(family, exit_type):
    model = tiny_model(family, exit_type=exit_type)
    _, hidden_states, packed_batch, _ = packed_states()
    logits = model.exits[1](hidden_states, packed_batch)
    texts = texts_in_packed_order(hidden_states, packed_batch)
    assert_close(logits, torch.stack([reference_exit_logits(model, 2, text) for text in texts]))


@pytest.mark.parametrize("exit_type", OF_TEXTS)
def test_multiply_accumulates_are_half_of_what_torch_counts(exit_type):
    model = tiny_model(exit_type=exit_type)
    pooler, (_, hidden_states, packed_batch, _) = model.exits[1].pooler, packed_states()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pooler(hidden_states, replace(packed_batch, attn_implementation="eager"))  # whose products it sees
    assert 2 * pooler.macs(packed_batch.lengths).sum() == counter.get_total_flops()


def test_attention_exit_has_the_papers_sizes():
    config = FastBertConfig(text_config=tiny_text_config("bert"), num_labels=5)
    shapes = {name: list(value.shape) for name, value in ExitClassifier(config, "attention").named_parameters()}
    assert shapes == {
        "pooler.exit_projection.weight": [128, 32],
        "pooler.exit_projection.bias": [128],
        **{
            f"pooler.exit_{part}.{name}": shape
            for part in ("query", "key", "value", "output", "dense")
            for name, shape in (("weight", [128, 128]), ("bias", [128]))
        },
        "out_proj.weight": [5, 128],
        "out_proj.bias": [5],
    }


@pytest.mark.parametrize("exit_type", ["linear", "linear_mean"])
def test_linear_exit_keeps_the_hidden_width(exit_type):
    config = FastBertConfig(text_config=tiny_text_config("bert"), num_labels=5)
    shapes = {name: list(value.shape) for name, value in ExitClassifier(config, exit_type).named_parameters()}
    assert shapes == {
        "pooler.exit_dense.weight": [32, 32],
        "pooler.exit_dense.bias": [32],
        "out_proj.weight": [5, 32],
        "out_proj.bias": [5],
    }


@pytest.mark.parametrize(
    ("family", "exit_type"),
    [*(("bert", exit_type) for exit_type in OF_TEXTS), ("electra", "linear"), ("distilbert", "linear_mean")],
)
def test_gradient_reaches_every_parameter_of_an_exit_and_its_input(family, exit_type):
    config = FastBertConfig(text_config=tiny_text_config(family), num_labels=3, exit_dropout=0)
    exit_classifier = ExitClassifier(config, exit_type)
    _, hidden_states, packed_batch, _ = packed_states()
    hidden_states.requires_grad_()
    logits = exit_classifier(hidden_states, packed_batch)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1])).backward()
    untouched = {name for name, value in exit_classifier.named_parameters() if not value.grad.any()}
    # A softmax does not change when all its scores move by the same number.
    assert untouched <= {"pooler.exit_key.bias"}
    reached = hidden_states.grad[0].any(-1)
    reads_all_tokens = exit_type != "linear"
    assert reached[packed_batch.first_tokens].all()
    assert reached.all() == reads_all_tokens


@pytest.mark.parametrize("exit_type", OF_TEXTS)
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_exit_reads_nothing_but_its_own_text(exit_type, padding_side):
    model = tiny_model(exit_type=exit_type)
    padded, hidden_states, packed_batch, padding = packed_states(padding_side)
    before = model.exits[0](hidden_states, packed_batch)
    padded[packed_batch.rows[2]] += 1
    after = model.exits[0](padding.unpad(padded), packed_batch)
    changed = (before - after).abs().amax(-1) > 1e-3
    assert changed.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("exit_type", OF_TEXTS)
def test_exit_dropout_acts_in_training_only(exit_type):
    model = tiny_model(exit_type=exit_type, exit_dropout=0.5)
    _, hidden_states, packed_batch, _ = packed_states()
    torch.manual_seed(0)
    answers = {
        training: [model.exits[0].train(training)(hidden_states, packed_batch) for _ in range(2)]
        for training in (True, False)
    }
    assert torch.equal(*answers[False])
    assert (answers[True][0] - answers[True][1]).abs().max() > 1e-3
    assert (answers[True][0] - answers[False][0]).abs().max() > 1e-3


@pytest.mark.parametrize("exit_type", OF_TEXTS)
def test_exit_without_dropout_answers_in_training_as_in_evaluation(exit_type):
    model = tiny_model(exit_type=exit_type, exit_dropout=0)
    _, hidden_states, packed_batch, _ = packed_states()
    in_training = model.exits[0].train()(hidden_states, packed_batch)
    assert_close(in_training, model.exits[0].eval()(hidden_states, packed_batch))


@pytest.mark.parametrize(("exit_type", "pooler"), [(name, EXIT_TYPES[name]) for name in OF_TEXTS])
def test_shared_pooler_serves_every_exit_and_each_keeps_its_last_linear(exit_type, pooler):
    model = tiny_model(exit_type=exit_type, share_exit_pooler=True)
    assert type(model.shared_pooler) is pooler
    assert all(exit_classifier.pooler is None for exit_classifier in model.exits)
    assert len({id(exit_classifier.out_proj) for exit_classifier in model.exits}) == NUM_LAYERS
    _, hidden_states, packed_batch, _ = packed_states()
    for depth in range(1, NUM_LAYERS + 1):
        logits = model.exits[depth - 1](hidden_states, packed_batch, model.shared_pooler)
        texts = texts_in_packed_order(hidden_states, packed_batch)
        assert_close(logits, torch.stack([reference_exit_logits(model, depth, text) for text in texts]))


@pytest.mark.parametrize(("exit_type", "teacher_exit_type"), [("attention", "linear"), ("linear", "attention")])
def test_teacher_of_another_type_keeps_a_pooler_of_its_own(exit_type, teacher_exit_type):
    model = tiny_model(exit_type=exit_type, teacher_exit_type=teacher_exit_type, share_exit_pooler=True)
    assert type(model.shared_pooler) is EXIT_TYPES[exit_type]
    assert type(model.teacher.pooler) is EXIT_TYPES[teacher_exit_type]
    assert all(student.pooler is None for student in model.students)
    _, hidden_states, packed_batch, _ = packed_states()
    for depth in range(1, NUM_LAYERS + 1):
        logits = model.exits[depth - 1](hidden_states, packed_batch, model.shared_pooler)
        texts = texts_in_packed_order(hidden_states, packed_batch)
        assert_close(logits, torch.stack([reference_exit_logits(model, depth, text) for text in texts]))


@pytest.mark.parametrize("num_labels", [2, 77])
def test_exit_has_one_logit_per_label(num_labels):
    config = FastBertConfig(text_config=tiny_text_config("bert"), num_labels=num_labels)
    _, hidden_states, packed_batch, _ = packed_states()
    exit_classifier = spread_out(ExitClassifier(config, "attention"))
    assert exit_classifier(hidden_states, packed_batch).shape == (len(LENGTHS), num_labels)


@pytest.mark.parametrize("config", [{}, {"exit_type": "linear_mean"}, {"share_exit_pooler": True}])
def test_exits_start_wide_enough_for_their_logits_to_differ_and_the_backbone_as_its_family_does(config):
    torch.manual_seed(0)
    text_config = tiny_text_config("bert")
    model = FastBertForSequenceClassification(FastBertConfig(text_config=text_config, num_labels=3, **config))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        is_exit = name.startswith(("exits.", "shared_pooler."))
        expected = (2 / sum(parameter.shape)) ** 0.5 if is_exit else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.25), name
    logits = model.eval()(**ragged_batch(LENGTHS), output_exit_logits=True).exit_logits
    assert logits.std() > 0.05
