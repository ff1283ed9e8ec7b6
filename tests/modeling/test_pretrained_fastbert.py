"""What was saved loads, whatever its family, exits, size, dtype and place. Others: `test_hostile_checkpoints.py`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Self, get_type_hints

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaForMaskedLM,
    TorchAoConfig,
    XLMRobertaConfig,
)

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification, FastBertModel
from fastbert_hf.modeling.checkpoint_checks import estimated_parameters
from fastbert_hf.modeling.weight_checks import check_weights
from tests.common import (
    FAMILIES,
    NUM_LAYERS,
    assert_close,
    assert_same_weights,
    copied_to_cache,
    ragged_batch,
    spread_out,
    tiny_model,
    tiny_text_config,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A good checkpoint of 4 layers and 3 labels."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model().save_pretrained(folder)
    return folder


def assert_same_answers(actual: FastBertForSequenceClassification, expected: FastBertForSequenceClassification):
    batch = ragged_batch(pad_token_id=expected.config.text_config.pad_token_id)
    with torch.no_grad():
        for arguments in ({"output_exit_logits": True}, {"speed": 0.8}, {"max_layers": 2}):
            reference, output = expected(**batch, **arguments), actual(**batch, **arguments)
            assert set(output) == set(reference)
            assert torch.equal(output.exit_layer, reference.exit_layer)
            # Where in memory the same weights lie decides the last bit of a product.
            for name in reference:
                assert_close(output[name], reference[name], 1e-6)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *((family, {}) for family in FAMILIES),
        ("bert", {"exit_type": "linear", "share_exit_pooler": True, "exit_policy": "patience"}),
        ("electra", {"teacher_exit_type": "linear", "share_exit_pooler": True, "exit_policy": "margin"}),
        ("modernbert", {"exit_type": "linear", "exit_policy": "confidence", "num_labels": 5}),
    ],
)
def test_save_and_reload_gives_the_same_answers(tmp_path, family, config):
    model = tiny_model(family, **config)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(reloaded) is FastBertForSequenceClassification
    assert not reloaded.training
    assert_same_weights(reloaded, model)
    assert_same_answers(reloaded, model)


def test_saved_folder_holds_safetensors_and_a_config_without_custom_code(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    text = (tmp_path / "config.json").read_text()
    for word in ("auto_map", "custom_pipelines", "fastbert_packed"):
        assert word not in text
    config = json.loads(text)
    assert config["model_type"] == "fastbert"
    assert config["architectures"] == ["FastBertForSequenceClassification"]
    assert config["text_config"]["model_type"] == "bert"


@pytest.mark.parametrize(
    ("family", "mlm_class", "prefix"),
    [("bert", BertForMaskedLM, "bert"), ("roberta", RobertaForMaskedLM, "roberta")],
)
def test_weights_of_a_masked_language_model_survive_wrapping_saving_and_reloading(tmp_path, family, mlm_class, prefix):
    mlm = spread_out(mlm_class(tiny_text_config(family)))
    mlm.save_pretrained(tmp_path / "mlm")
    model = FastBertForSequenceClassification.from_backbone(tmp_path / "mlm", num_labels=5)
    model.save_pretrained(tmp_path / "fast")
    reloaded = FastBertForSequenceClassification.from_pretrained(tmp_path / "fast")
    expected = getattr(mlm, prefix).state_dict()
    for wrapper in (model, reloaded):
        weights = wrapper.fastbert.backbone.state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert_same_answers(reloaded, model)


def test_dtype_of_a_checkpoint_is_kept_and_can_be_chosen(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    reloaded = FastBertForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
    assert {value.dtype for value in reloaded.parameters()} == {torch.bfloat16}
    assert_same_answers(reloaded, model)
    chosen = FastBertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert {value.dtype for value in chosen.parameters()} == {torch.float32}


def test_device_map_cpu_loads_the_same_model(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    reloaded = FastBertForSequenceClassification.from_pretrained(tmp_path, device_map="cpu")
    assert {value.device.type for value in reloaded.parameters()} == {"cpu"}
    assert_same_answers(reloaded, model)


def test_loading_a_stock_checkpoint_names_from_backbone(tmp_path):
    BertModel(tiny_text_config("bert")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'bert' checkpoint, not of a FastBERT model.*from_backbone\(name"):
        FastBertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("saving", "loading"),
    [({"max_shard_size": "50KB"}, {}), ({}, {"subfolder": "checkpoint"}), ({"variant": "fp32"}, {"variant": "fp32"})],
)
def test_checkpoint_in_every_place_loads(tmp_path, saving, loading):
    tiny_model().save_pretrained(tmp_path / "checkpoint", **saving)
    assert ("max_shard_size" in saving) == (tmp_path / "checkpoint" / "model.safetensors.index.json").exists()
    assert {path.suffix for path in (tmp_path / "checkpoint").iterdir()} == {".json", ".safetensors"}
    path = tmp_path if "subfolder" in loading else str(tmp_path / "checkpoint")
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(path, **loading), tiny_model())


@pytest.mark.parametrize(
    ("exit_type", "teacher_exit_type", "share_exit_pooler"),
    [
        ("attention", "attention", True),
        ("attention", "linear", False),
        ("linear", "attention", False),
        ("linear", "linear", True),
        ("linear_mean", "attention", True),
        ("linear_mean", "linear", False),
    ],
)
def test_checkpoint_of_every_kind_of_exits_loads(tmp_path, exit_type, teacher_exit_type, share_exit_pooler):
    types = {"exit_type": exit_type, "teacher_exit_type": teacher_exit_type, "share_exit_pooler": share_exit_pooler}
    model = tiny_model(num_labels=5, exit_hidden_size=24, **types)
    model.save_pretrained(tmp_path)
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path), model)


def test_weights_given_in_other_ways_load(whole, tmp_path, monkeypatch):
    model, config = tiny_model(), AutoConfig.from_pretrained(whole)
    load = FastBertForSequenceClassification.from_pretrained
    assert_same_weights(load(None, config=config, state_dict=model.state_dict()), model)
    with monkeypatch.context() as patches:
        patches.setattr("transformers.integrations.peft.is_peft_available", lambda: False)
        assert_same_weights(load(whole / "model.safetensors", config=config), model)
    assert_same_weights(load(whole, config=whole / "config.json"), model)
    assert_same_weights(load(pretrained_model_name_or_path=whole, dtype="auto", force_download=True), model)
    loaded, info = load(whole, output_loading_info=True)
    assert_same_weights(loaded, model)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    renamed = {name.replace("exits.", "classifiers."): value for name, value in model.state_dict().items()}
    shutil.copy(whole / "config.json", tmp_path)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(load(tmp_path, key_mapping={"^classifiers": "exits"}), model)


@pytest.mark.parametrize("load", [FastBertForSequenceClassification.from_pretrained, FastBertModel.from_pretrained])
def test_type_of_what_is_loaded_is_known_to_type_checkers(load):
    assert get_type_hints(load)["return"] is Self


# As torchao 0.18 and bitsandbytes 0.50 save a Linear.
PACKED = {
    "torchao": lambda name, shape: {
        f"{name}._weight_qdata": shape,
        f"{name}._weight_scale": (shape[0], 1),
        f"{name}._weight_zero_point": (shape[0], 1),
    },
    "bitsandbytes, 8 bits": lambda name, shape: {
        f"{name}.weight": shape,
        f"{name}.SCB": shape[:1],
        f"{name}.weight_format": (),
    },
    "bitsandbytes, 4 bits": lambda name, shape: {
        f"{name}.weight": (math.prod(shape) // 2, 1),
        f"{name}.weight.absmax": (math.prod(shape) // 64,),
        f"{name}.weight.quant_map": (16,),
        f"{name}.weight.quant_state.bitsandbytes__nf4": (90,),
    },
}


@pytest.mark.parametrize("kind", PACKED)
def test_weights_in_parts_are_those_of_the_model_where_it_is_quantised(kind):
    wanted = {name: tuple(weight.shape) for name, weight in tiny_model().state_dict().items()}
    shapes = {}
    for name, shape in wanted.items():
        module, _, own = name.rpartition(".")
        is_linear = own == "weight" and len(shape) == 2 and "embeddings" not in name
        shapes |= PACKED[kind](module, shape) if is_linear else {name: shape}
    arguments = {"prefix": "fastbert.", "is_quantised": True}
    check_weights(shapes, wanted, **arguments)
    lost = {name: shape for name, shape in shapes.items() if ".layer.1.output.dense." not in name}
    with pytest.raises(ValueError, match=r"they lack backbone\.encoder\.layer\.1\.output\.dense\.weight,"):
        check_weights(lost, wanted, **arguments)
    with pytest.raises(ValueError, match=r"they also hold exits\.4\.bias\."):
        check_weights({**shapes, "exits.4.bias": (3,)}, wanted, **arguments)
    other = {**shapes, "fastbert.backbone.embeddings.word_embeddings.weight": (7, 32)}
    with pytest.raises(ValueError, match=r"word_embeddings\.weight of shape \[7, 32\] instead of \[100, 32\]"):
        check_weights(other, wanted, **arguments)


def test_torchao_checkpoint_comes_back(whole, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = FastBertForSequenceClassification.from_pretrained(whole, quantization_config=settings)
    model.save_pretrained(tmp_path)
    assert_same_answers(AutoModelForSequenceClassification.from_pretrained(tmp_path), model)
    weights = load_file(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    lost = {name: weight for name, weight in weights.items() if ".layer.1.output.dense." not in name}
    save_file(lost, tmp_path / "model.safetensors", metadata)
    with pytest.raises(ValueError, match=r"they lack backbone\.encoder\.layer\.1\.output\.dense\.weight,"):
        FastBertForSequenceClassification.from_pretrained(tmp_path)


def test_other_labels_need_ignore_mismatched_sizes(whole):
    load = FastBertForSequenceClassification.from_pretrained
    with pytest.raises(ValueError, match=r"exits.0.out_proj.weight of shape \[3, 128\] instead of \[7, 128\]"):
        load(whole, num_labels=7)
    assert load(whole, num_labels=7, ignore_mismatched_sizes=True).teacher.out_proj.out_features == 7


def test_config_that_is_given_is_left_as_it_is(whole):
    config = FastBertConfig.from_pretrained(whole)
    before = config.to_dict(), config._attn_implementation, config.text_config._attn_implementation
    FastBertForSequenceClassification.from_pretrained(whole, config=config)
    assert (config.to_dict(), config._attn_implementation, config.text_config._attn_implementation) == before


def test_encoder_of_a_checkpoint_without_exits_loads_into_both_models(tmp_path):
    encoder = tiny_model().fastbert
    encoder.save_pretrained(tmp_path)
    for loaded in (
        FastBertModel.from_pretrained(tmp_path),
        FastBertForSequenceClassification.from_pretrained(tmp_path).fastbert,
    ):
        state = loaded.state_dict()
        assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())


def test_repository_in_the_cache_loads_offline(whole, tmp_path):
    commit = copied_to_cache(whole, tmp_path, "org/tiny").name
    for load in (AutoModelForSequenceClassification, FastBertForSequenceClassification):
        for revision in (None, "main", commit):
            assert_same_weights(load.from_pretrained("org/tiny", cache_dir=tmp_path, revision=revision), tiny_model())
        with pytest.raises(OSError):
            load.from_pretrained("org/tiny", cache_dir=tmp_path, revision="unknown")


LARGE_SHAPE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
FULL_SIZE = {
    "bert-base": BertConfig(),
    "bert-large with 10,000 labels": BertConfig(**LARGE_SHAPE, num_labels=10_000),
    "xlm-roberta-large": XLMRobertaConfig(**LARGE_SHAPE, vocab_size=250_002),
    "albert-xxlarge": AlbertConfig(),
    "distilbert": DistilBertConfig(),
    "electra-small": ElectraConfig(),
    "modernbert-large": ModernBertConfig(**{**LARGE_SHAPE, "num_hidden_layers": 28, "intermediate_size": 2624}),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_config_passes_with_a_fair_estimate_of_its_size(tmp_path, name):
    text_config = FULL_SIZE[name]
    config = FastBertConfig(text_config=text_config, num_labels=text_config.num_labels)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).text_config.to_dict() == text_config.to_dict()
    with torch.device("meta"):
        model = FastBertForSequenceClassification(config)
    # Weights may hold half of what is estimated.
    assert 0.9 < estimated_parameters(config.to_dict()) / model.num_parameters() < 1.8


@pytest.mark.parametrize("family", FAMILIES)
def test_config_of_every_family_passes_with_its_exact_sizes(family):
    text_config = tiny_text_config(family)
    assert FastBertConfig(text_config=text_config, max_layers=NUM_LAYERS, speed=1, exit_dropout=0).speed == 1
    with pytest.raises(ValueError, match="max_layers must be a whole number from 1 to 4"):
        FastBertConfig(text_config=text_config, max_layers=NUM_LAYERS + 1)
