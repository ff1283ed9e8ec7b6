from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification
from fastbert_hf.modeling import packed_attention
from fastbert_hf.modeling.packed_attention import PACKED_ATTENTION
from tests.common import assert_close, pad_token_id_of, ragged_batch, tiny_model, tiny_stock_model, tiny_text_config


KERNELS = ("sdpa", "eager")
FAMILIES_OF_BOTH_KINDS = ("bert", "modernbert")  # with learned positions and with rotary ones
NOT_AVAILABLE = "is not available inside packed batches; choose one of sdpa, eager"


@pytest.fixture
def kernels_used(monkeypatch) -> set[str]:
    """The kernels that ran since the test began."""
    used = set()

    def recording(name, kernel):
        def attend(*arguments):
            used.add(name)
            return kernel(*arguments)

        return attend

    kernels = {name: recording(name, kernel) for name, kernel in packed_attention.ATTENTION_KERNELS.items()}
    monkeypatch.setattr(packed_attention, "ATTENTION_KERNELS", kernels)
    return used


@torch.no_grad()
def answers(model: FastBertForSequenceClassification) -> torch.Tensor:
    batch = ragged_batch(pad_token_id=pad_token_id_of(model.config.text_config.model_type))
    return model(**batch, output_exit_logits=True).exit_logits


def assert_kernel(model, kernel: str) -> None:
    assert model.config._attn_implementation == kernel
    backbone = model.fastbert.backbone if hasattr(model, "fastbert") else model.backbone
    attention_configs = {
        id(module.config): module.config for module in backbone.modules() if hasattr(module, "config")
    }
    assert {config._attn_implementation for config in attention_configs.values()} == {PACKED_ATTENTION}


@pytest.mark.parametrize("family", FAMILIES_OF_BOTH_KINDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_loading_with_a_kernel_uses_it_and_keeps_the_answers(tmp_path, family, kernel, kernels_used):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    expected = answers(model)
    kernels_used.clear()
    for loader in (FastBertForSequenceClassification, AutoModelForSequenceClassification):
        loaded = loader.from_pretrained(tmp_path, attn_implementation=kernel)
        assert_kernel(loaded, kernel)
        assert_close(answers(loaded), expected)
    assert kernels_used == {kernel}


def test_sdpa_is_the_kernel_unless_another_is_asked_for(tmp_path, kernels_used):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    stock = tiny_stock_model(attn_implementation="eager")
    wrapped = FastBertForSequenceClassification.from_backbone(stock)
    for one in (model, FastBertForSequenceClassification.from_pretrained(tmp_path), wrapped):
        assert_kernel(one, "sdpa")
        answers(one)
    assert kernels_used == {"sdpa"}


@pytest.mark.parametrize("family", FAMILIES_OF_BOTH_KINDS)
def test_setting_a_kernel_uses_it_and_keeps_the_answers(family, kernels_used):
    model = tiny_model(family)
    expected = answers(model)
    for part in (model, model.fastbert):
        for kernel in ("eager", "sdpa"):
            part.set_attn_implementation(kernel)
            kernels_used.clear()
            assert_kernel(model, kernel)
            assert_close(answers(model), expected)
            assert kernels_used == {kernel}


@pytest.mark.parametrize("choice", [{"": "eager"}, {"text_config": "eager"}])
def test_setting_a_kernel_by_a_dict_keeps_the_packed_backbone(choice, kernels_used):
    model = tiny_model()
    model.set_attn_implementation(choice)
    assert_kernel(model, "eager")
    answers(model)
    assert kernels_used == {"eager"}


@pytest.mark.parametrize("kernel", KERNELS)
def test_wrapping_with_a_kernel_uses_it(kernel, kernels_used):
    model = FastBertForSequenceClassification.from_backbone(tiny_stock_model(), attn_implementation=kernel)
    assert_kernel(model, kernel)
    answers(model)
    assert kernels_used == {kernel}


def test_encoder_alone_takes_a_kernel(tmp_path, kernels_used):
    tiny_model().save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert_kernel(encoder, "eager")
    encoder(**ragged_batch())
    assert kernels_used == {"eager"}


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention", "nonsense", PACKED_ATTENTION])
def test_setting_another_kernel_is_refused_and_changes_nothing(kernel):
    model = tiny_model()
    expected = answers(model)
    for part in (model, model.fastbert):
        with pytest.raises(ValueError, match=f"attn_implementation='{kernel}' {NOT_AVAILABLE}"):
            part.set_attn_implementation(kernel)
    assert_kernel(model, "sdpa")
    assert torch.equal(answers(model), expected)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "nonsense"])
def test_building_loading_and_wrapping_with_another_kernel_is_refused(tmp_path, kernel):
    tiny_model().save_pretrained(tmp_path)
    config = FastBertConfig(text_config=tiny_text_config("bert"), attn_implementation=kernel)
    builders = (
        lambda: FastBertForSequenceClassification(config),
        lambda: FastBertForSequenceClassification.from_pretrained(tmp_path, attn_implementation=kernel),
        lambda: AutoModel.from_pretrained(tmp_path, attn_implementation=kernel),
        lambda: FastBertForSequenceClassification.from_backbone(tiny_stock_model(), attn_implementation=kernel),
    )
    for build in builders:
        with pytest.raises(ValueError, match=f"attn_implementation='{kernel}' {NOT_AVAILABLE}"):
            build()


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model, kernel: setattr(model.fastbert.backbone.config, "_attn_implementation", kernel),
        lambda model, kernel: model.fastbert.backbone.set_attn_implementation(kernel),
        lambda model, kernel: setattr(model.config, "_attn_implementation", kernel),
    ],
)
def test_backbone_changed_behind_the_models_back_is_refused_at_the_next_call(change, kernel):
    model = tiny_model()
    answers(model)
    change(model, kernel)
    for part in (model, model.fastbert):
        with pytest.raises(ValueError, match=f"attention was changed to '{kernel}'.*model.set_attn_implementation"):
            part(**ragged_batch())


@pytest.mark.parametrize("family", FAMILIES_OF_BOTH_KINDS)
def test_backbone_called_by_itself_says_what_to_call_instead(family):
    model = tiny_model(family)
    message = r"cannot be called by itself.*model\.fastbert\(input_ids, attention_mask\)\.last_hidden_state"
    with pytest.raises(ValueError, match=message):
        model.fastbert.backbone(**ragged_batch(pad_token_id=pad_token_id_of(family)))


def test_kernel_of_one_model_is_not_the_kernel_of_another(kernels_used):
    first, second = tiny_model(), tiny_model()
    first.set_attn_implementation("eager")
    assert_kernel(first, "eager")
    assert_kernel(second, "sdpa")
    answers(second)
    assert kernels_used == {"sdpa"}


@pytest.mark.parametrize("family", FAMILIES_OF_BOTH_KINDS)
@torch.no_grad()
def test_kernels_agree_to_double_precision(family):
    model, batch = tiny_model(family).double(), ragged_batch()
    expected = model(**batch).logits
    model.set_attn_implementation("eager")
    assert_close(model(**batch).logits, expected, 1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_early_exits_are_the_same_with_every_kernel(kernel):
    model, batch = tiny_model("modernbert"), ragged_batch()
    expected = [model(**batch, speed=speed) for speed in (0.5, 0.7, 0.9)]
    model.set_attn_implementation(kernel)
    taken = set()
    for speed, reference in zip((0.5, 0.7, 0.9), expected, strict=True):
        output = model(**batch, speed=speed)
        assert output.exit_layer.tolist() == reference.exit_layer.tolist()
        assert_close(output.logits, reference.logits)
        taken |= set(output.exit_layer.tolist())
    assert len(taken) >= 3
