from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AlbertConfig, BertConfig

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification
from fastbert_hf.evaluation import executed_flops, paper_flops

from ..common import FAMILIES, NUM_LAYERS, pad_token_id_of, ragged_batch, tiny_model


CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def bert_base(**config) -> FastBertForSequenceClassification:
    with torch.device("meta"):
        return FastBertForSequenceClassification(FastBertConfig(text_config=BertConfig(), **config))


def counted(model: FastBertForSequenceClassification, **inputs) -> tuple[int, torch.Tensor]:
    """What torch counts over the real forward, and where the rows left."""

    def attention(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(query, key, value)

    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention}) as counter:
        output = model(**inputs)
    return counter.get_total_flops(), output.exit_layer


def test_paper_count_of_bert_base_is_the_papers():
    model = bert_base()
    assert paper_flops(model, torch.tensor(12), students=False) == 21_785_247_744
    assert paper_flops(model, torch.tensor([6, 2])).tolist() == [11_123_490_816, 3_707_830_272]


def test_paper_count_does_not_depend_on_the_number_of_labels():
    assert paper_flops(bert_base(num_labels=77), torch.tensor(6)) == 11_123_490_816


def test_paper_count_grows_with_the_padded_length():
    model, exit_layer = tiny_model(), torch.tensor([[1, 2], [3, 4]])
    short, long = (paper_flops(model, exit_layer, sequence_length=length) for length in (64, 128))
    assert short.shape == exit_layer.shape
    # All but the one dense layer on the pooled token of each exit.
    pooled = 2 * 128 * 128 * exit_layer
    assert torch.equal(long - pooled, 2 * (short - pooled))


def test_paper_count_without_students_has_one_exit():
    model, layers = bert_base(), torch.arange(1, 13)
    exits = paper_flops(model, layers) - paper_flops(model, layers, students=False)
    assert torch.equal(exits, 41_975_808 * (layers - 1))


@pytest.mark.parametrize(
    ("family", "exit_type"),
    # What a layer costs and what an exit costs have nothing to do with each other.
    [*((family, "attention") for family in FAMILIES), ("bert", "linear"), ("electra", "linear_mean")],
)
def test_executed_count_is_what_torch_counts_over_the_adaptive_forward(family, exit_type):
    model = tiny_model(family, exit_type=exit_type)
    batch = ragged_batch(pad_token_id=pad_token_id_of(family))
    lengths, left = batch["attention_mask"].sum(1), set()
    for speed in (0.0, 0.6, 0.8, 1.0):
        total, exit_layer = counted(model, **batch, speed=speed)
        left |= set(exit_layer.tolist())
        assert executed_flops(model, exit_layer, lengths, students=speed > 0).sum() == total
    assert len(left) > 1


@pytest.mark.parametrize("config", [{"share_exit_pooler": True}, {"teacher_exit_type": "linear"}])
def test_executed_count_knows_shared_poolers_and_teachers_of_another_type(config):
    model, batch = tiny_model(**config), ragged_batch()
    lengths = batch["attention_mask"].sum(1)
    for speed in (0.0, 0.8):
        total, exit_layer = counted(model, **batch, speed=speed)
        assert executed_flops(model, exit_layer, lengths, students=speed > 0).sum() == total


def test_executed_count_of_a_fixed_depth_has_one_exit():
    model, batch = tiny_model(), ragged_batch()
    for depth in range(1, NUM_LAYERS + 1):
        total, exit_layer = counted(model, **batch, max_layers=depth)
        assert executed_flops(model, exit_layer, batch["attention_mask"].sum(1), students=False).sum() == total


@pytest.mark.parametrize("min_exit_layer", range(1, NUM_LAYERS + 1))
def test_executed_count_leaves_out_the_exits_before_the_first_that_may_answer(min_exit_layer):
    model, batch, left = tiny_model(), ragged_batch(), set()
    lengths = batch["attention_mask"].sum(1)
    for speed in (0.0, 0.6, 0.8, 1.0):
        total, exit_layer = counted(model, **batch, speed=speed, min_exit_layer=min_exit_layer)
        left |= set(exit_layer.tolist())
        options = {"students": speed > 0, "min_exit_layer": min_exit_layer}
        assert executed_flops(model, exit_layer, lengths, **options).sum() == total
    assert min(left) == min_exit_layer


def test_paper_count_leaves_out_the_exits_before_the_first_that_may_answer():
    model, layers = bert_base(), torch.arange(1, 13)
    for first in (1, 2, 7, 12):
        flops = paper_flops(model, layers[first - 1 :], min_exit_layer=first)
        assert torch.equal(
            paper_flops(model, layers[first - 1 :]) - flops, torch.full_like(flops, 41_975_808 * (first - 1))
        )
        # At speed 0 no student is asked, wherever the first may answer.
        without = paper_flops(model, layers, students=False)
        assert torch.equal(paper_flops(model, layers, students=False, min_exit_layer=first), without)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counts_take_answers_from_a_device():
    exit_layer = torch.tensor([1, 2])
    assert torch.equal(paper_flops(tiny_model(), exit_layer.cuda()), paper_flops(tiny_model(), exit_layer))


def test_executed_count_does_not_depend_on_the_kernel():
    model, batch = tiny_model(), ragged_batch()
    model.set_attn_implementation("eager")
    total, exit_layer = counted(model, **batch, speed=0.8)
    assert executed_flops(model, exit_layer, batch["attention_mask"].sum(1)).sum() == total


def test_repeated_layers_of_albert_count_each_time():
    with torch.device("meta"):
        text_config = AlbertConfig(hidden_size=64, intermediate_size=128, num_attention_heads=2)
        model = FastBertForSequenceClassification(FastBertConfig(text_config=text_config))
    flops = paper_flops(model, torch.arange(1, 13))
    assert torch.equal(flops, flops[0] * torch.arange(1, 13))


@pytest.mark.parametrize("saved", [["shared_pooler"], ["exit_dense", "out_proj"], ["exits.0", "exits.3"]])
def test_what_an_adapter_keeps_a_copy_of_is_run_and_counted_once(saved):
    model, batch = tiny_model(share_exit_pooler="shared_pooler" in saved), ragged_batch()
    expected = paper_flops(model, torch.arange(1, 5))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["query"], r=1, modules_to_save=saved))
    adapter = 128 * 2 * (32 + 32) * torch.arange(1, 5)  # of 128 tokens, from 32 to 1 and back
    assert torch.equal(paper_flops(wrapped, torch.arange(1, 5)), expected + adapter)
    total, exit_layer = counted(wrapped, **batch, speed=0.8)
    assert executed_flops(wrapped, exit_layer, batch["attention_mask"].sum(1)).sum() == total


@pytest.mark.parametrize("exit_layer", [0, NUM_LAYERS + 1])
def test_layers_that_the_model_does_not_have_are_refused(exit_layer):
    with pytest.raises(ValueError, match=rf"exit_layer must be from 1 to {NUM_LAYERS}, got \[{exit_layer}\]"):
        paper_flops(tiny_model(), torch.tensor([exit_layer]))
