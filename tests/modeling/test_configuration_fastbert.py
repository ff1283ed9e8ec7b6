from __future__ import annotations

import math

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    AutoConfig,
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLNetConfig,
)

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification
from tests.common import FAMILIES, NUM_LAYERS, SHAPE, made_up_certification, random_gates, tiny_text_config


OWN_FIELDS = {
    "task": "text-classification",
    "exit_type": "linear",
    "teacher_exit_type": "attention",
    "share_exit_pooler": True,
    "exit_hidden_size": 24,
    "exit_num_attention_heads": 3,
    "exit_dropout": 0.25,
    "exit_policy": "patience",
    "speed": 0.75,
    "patience": 3,
    "min_exit_layer": 1,
    "max_layers": 2,
    "tolerance": None,
    "label_thresholds": None,
    "feed_forward": {"form": "leaves", "depth": 2, "leaf_size": 8, "layers": [1, 3]},
    "coarsening": {"layers": [1, 3], "retention": [0.7, 0.5], "merge": "weighted", "clusters": 2, "size_aware": False},
    "distilled_for": "float32:0123456789abcdef",
    "calibration": {
        "rows": 200,
        "unit": "layers",
        "speeds": [0.0, 0.5, 1.0],
        "speed_ups": [1.0, 1.5, 2.0],
        "asked": {"exit_policy": "patience", "patience": 3, "exits": [[1, 2]], "coarsening": [None]},
        "weights": ["float32:0123456789abcdef"],
    },
    "gates": random_gates(0, NUM_LAYERS),
    "certification": made_up_certification(),
}
LABELS = {"id2label": {0: "bad", 1: "so so", 2: "good"}, "label2id": {"bad": 0, "so so": 1, "good": 2}}


def test_defaults_are_the_papers_and_the_documented_ones():
    config = FastBertConfig()
    assert type(config.text_config) is BertConfig
    assert config.num_hidden_layers == 12
    assert config.hidden_size == 768
    assert {name: getattr(config, name) for name in OWN_FIELDS} == {
        "task": "text-classification",
        "exit_type": "attention",
        "teacher_exit_type": "attention",
        "share_exit_pooler": False,
        "exit_hidden_size": 128,
        "exit_num_attention_heads": 2,
        "exit_dropout": 0.1,
        "exit_policy": "entropy",
        "speed": 0.5,
        "patience": 2,
        "min_exit_layer": None,
        "max_layers": None,
        "tolerance": None,
        "label_thresholds": None,
        "feed_forward": None,
        "coarsening": None,
        "distilled_for": None,
        "gates": None,
        "calibration": None,
        "certification": None,
    }


def test_own_fields_are_all_that_the_config_adds():
    added = set(FastBertConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    assert added == {"text_config", *OWN_FIELDS}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_survives_saving_and_reloading(tmp_path, family):
    text_config = tiny_text_config(family)
    FastBertConfig(text_config=text_config, **OWN_FIELDS, **LABELS).save_pretrained(tmp_path)
    for reloaded in (FastBertConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(reloaded) is FastBertConfig
        assert {name: getattr(reloaded, name) for name in OWN_FIELDS} == OWN_FIELDS
        assert {name: getattr(reloaded, name) for name in LABELS} == LABELS
        assert type(reloaded.text_config) is type(text_config)
        assert reloaded.text_config.to_dict() == tiny_text_config(family).to_dict()


def test_config_of_a_model_survives_saving_and_reloading(tmp_path):
    config = FastBertConfig(text_config=tiny_text_config("modernbert"), **OWN_FIELDS, **LABELS)
    FastBertForSequenceClassification(config).save_pretrained(tmp_path)
    reloaded = FastBertForSequenceClassification.from_pretrained(tmp_path).config
    assert {name: getattr(reloaded, name) for name in OWN_FIELDS} == OWN_FIELDS
    assert {name: getattr(reloaded, name) for name in LABELS} == LABELS
    assert reloaded.text_config.local_attention == 8


def test_dict_round_trip_keeps_every_field():
    config = FastBertConfig(text_config=tiny_text_config("electra"), **OWN_FIELDS, **LABELS)
    assert FastBertConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("exit_type", ["attention", "linear"])
def test_teacher_is_of_the_students_type_unless_named(exit_type):
    assert FastBertConfig(exit_type=exit_type).teacher_exit_type == exit_type
    assert FastBertConfig(exit_type=exit_type, teacher_exit_type="linear").teacher_exit_type == "linear"


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_and_width_are_the_backbones(family):
    config = FastBertConfig(text_config=tiny_text_config(family))
    assert (config.num_hidden_layers, config.hidden_size) == (NUM_LAYERS, SHAPE["hidden_size"])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_asked_of_a_stock_config_is_the_backbones(family):
    text_config = tiny_text_config(family)
    config = FastBertConfig(text_config=text_config)
    for name in ("vocab_size", "pad_token_id", "num_attention_heads", "intermediate_size", "max_position_embeddings"):
        assert getattr(config, name, None) == getattr(text_config, name, None)
        assert name not in config.to_dict() and name not in config.to_diff_dict()


@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "pad_token_id"])
def test_what_is_the_backbones_cannot_be_set_beside_it(name):
    message = rf"{name}=3 is the backbone's.*FastBertConfig\(text_config=BertConfig\({name}=3\)\)"
    with pytest.raises(ValueError, match=message):
        FastBertConfig(**{name: 3})
    config = FastBertConfig()
    with pytest.raises(ValueError, match=message):
        setattr(config, name, 3)
    assert getattr(config, name) == getattr(BertConfig(), name)


def test_backbone_may_be_given_as_a_dict():
    config = FastBertConfig(text_config={"model_type": "roberta", "num_hidden_layers": 3})
    assert type(config.text_config) is RobertaConfig
    assert config.num_hidden_layers == 3


def test_number_of_labels_makes_the_label_names():
    assert FastBertConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_what_trainer_must_not_collect_is_named():
    ignored = FastBertConfig().keys_to_ignore_at_inference
    assert {"exit_layer", "uncertainty", "exit_logits", "hidden_states"} <= set(ignored)
    assert "logits" not in ignored


@pytest.mark.parametrize("text_config", [tiny_text_config("bert"), ModernBertConfig(), BertConfig(dtype="bfloat16")])
def test_building_a_config_leaves_the_given_text_config_alone(text_config):
    text_config._attn_implementation = "eager"
    before = text_config.to_dict()
    FastBertConfig(text_config=text_config)
    assert text_config._attn_implementation == "eager"
    assert text_config.to_dict() == before


@pytest.mark.parametrize("text_config", [MPNetConfig(), GPT2Config(), XLNetConfig(), DebertaV2Config()])
def test_unsupported_backbone_lists_the_supported_families(text_config):
    supported = "bert, ernie, roberta, xlm-roberta, camembert, data2vec-text, electra, distilbert, albert, modernbert"
    message = f"'{text_config.model_type}' is not supported. Supported are: {supported}"
    with pytest.raises(ValueError, match=message):
        FastBertConfig(text_config=text_config)


@pytest.mark.parametrize("config_class", [BertConfig, RobertaConfig])
@pytest.mark.parametrize("name", ["is_decoder", "add_cross_attention"])
def test_decoder_is_refused(config_class, name):
    with pytest.raises(ValueError, match=f"set {name}=False"):
        FastBertConfig(text_config=config_class(**{name: True}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"exit_type": "mlp"},
            "exit_type='mlp' is not known for single_label_classification; choose",
        ),
        (
            {"teacher_exit_type": "mlp"},
            "teacher_exit_type='mlp' is not known for single_label_classification; choose",
        ),
        (
            {"exit_policy": "vote"},
            "exit_policy='vote' is not known for single_label_classification; choose one of entropy, confidence,",
        ),
        ({"exit_hidden_size": 0}, "exit_hidden_size must be at least 1, got 0"),
        ({"exit_num_attention_heads": 0}, "exit_num_attention_heads must be at least 1, got 0"),
        ({"exit_num_attention_heads": 3}, "exit_hidden_size=128 is not a multiple of exit_num_attention_heads=3"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"exit_dropout": 1.0}, r"exit_dropout must be in \[0, 1\), got 1.0"),
        ({"exit_dropout": -0.1}, r"exit_dropout must be in \[0, 1\), got -0.1"),
        ({"exit_dropout": math.nan}, r"exit_dropout must be in \[0, 1\), got nan"),
        ({"speed": 1.5}, r"speed must be a number in \[0, 1\], got 1.5"),
        ({"speed": -0.5}, r"speed must be a number in \[0, 1\], got -0.5"),
        ({"speed": math.nan}, r"speed must be a number in \[0, 1\], got nan"),
        ({"max_layers": 0}, "max_layers must be a whole number from 1 to 12"),
        ({"max_layers": 13}, "max_layers must be a whole number from 1 to 12"),
        ({"id2label": {0: "a", 7: "b"}}, "has no label 1: it must name every id from 0 to 1"),
        ({"id2label": {0: "a", 1: None}}, "id2label calls label 1 None, but a label is a text"),
        ({"distilled_for": "float32:0123"}, "distilled_for must be None or a dtype and 16 digits.*got 'float32:0123'"),
    ],
)
def test_field_out_of_its_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FastBertConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"exit_hidden_size": "128"},
        {"exit_num_attention_heads": 2.0},
        {"patience": 1.5},
        {"patience": True},
        {"speed": True},
        {"speed": "0.5"},
        {"exit_dropout": "0.1"},
        {"share_exit_pooler": "yes"},
        {"max_layers": 2.5},
        {"exit_policy": 1},
    ],
)
def test_field_of_the_wrong_type_names_itself(fields):
    (name,) = fields
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
        FastBertConfig(**fields)


@pytest.mark.parametrize("fields", [{"speed": 0}, {"speed": 1}, {"max_layers": 12}, {"exit_dropout": 0}])
def test_ends_of_the_ranges_are_allowed(fields):
    (name,) = fields
    assert getattr(FastBertConfig(**fields), name) == fields[name]


def test_config_of_a_stock_checkpoint_names_from_backbone_and_from_classifier(tmp_path):
    tiny_text_config("roberta").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'roberta' checkpoint.*from_backbone\(name.*\.from_classifier\(name\)"):
        FastBertConfig.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:.rope_scaling.:FutureWarning")
def test_error_inside_of_transformers_says_what_failed():
    config = {"model_type": "fastbert", "text_config": {"model_type": "bert", "rope_scaling": "x"}}
    message = r"the config cannot be read \(AttributeError: .*\): load the config that was saved with the weights"
    with pytest.raises(ValueError, match=message):
        FastBertConfig.from_dict(config)
