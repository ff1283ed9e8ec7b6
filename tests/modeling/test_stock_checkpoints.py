from __future__ import annotations

import itertools

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    ElectraForPreTraining,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    RobertaForMaskedLM,
)

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification
from fastbert_hf.modeling.packed_attention import PACKED_ATTENTION
from fastbert_hf.modeling.tasks import task_of
from tests.common import (
    FAMILIES,
    NUM_LAYERS,
    SHAPE,
    assert_close,
    assert_same_weights,
    copied_state,
    pad_token_id_of,
    ragged_batch,
    spread_out,
    tiny_model,
    tiny_stock_model,
    tiny_text_config,
)


KEPT_HEADS = tuple(family for family in FAMILIES if family != "modernbert")
LABELS = {0: "bad", 1: "so so", 2: "good"}


def stock_classifier(family: str = "bert", **config) -> PreTrainedModel:
    text_config = tiny_text_config(family)
    labels = {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}}
    for name, value in {**({} if "num_labels" in config else labels), **config}.items():
        setattr(text_config, name, value)
    return spread_out(AutoModelForSequenceClassification.from_config(text_config))


@torch.no_grad()
def logits_of(model: PreTrainedModel, **arguments) -> torch.Tensor:
    family = getattr(model.config, "text_config", model.config).model_type
    return model(**ragged_batch(pad_token_id=pad_token_id_of(family)), **arguments).logits


@pytest.mark.parametrize(("family", "source"), [*zip(KEPT_HEADS, itertools.cycle(("model", "folder")))])
def test_classifier_keeps_its_answers_and_labels(tmp_path, family, source):
    stock = stock_classifier(family)
    if source == "folder":
        stock.save_pretrained(tmp_path)
    model = FastBertForSequenceClassification.from_classifier(stock if source == "model" else tmp_path)
    assert_close(logits_of(model), logits_of(stock))
    assert_close(logits_of(model, speed=0), logits_of(stock))
    assert logits_of(stock).std(0).min() > 1e-2
    assert model.config.id2label == LABELS
    assert model.config.label2id == {"bad": 0, "so so": 1, "good": 2}
    assert model.config.teacher_exit_type == "linear"
    assert model.config.exit_type == "attention"
    assert not model.training


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bert", {"exit_type": "linear", "share_exit_pooler": True}),
        ("electra", {"share_exit_pooler": True}),
        ("distilbert", {"exit_type": "linear"}),
    ],
)
def test_classifier_keeps_its_answers_whatever_the_students_are(tmp_path, family, config):
    stock = stock_classifier(family)
    model = FastBertForSequenceClassification.from_classifier(stock, **config)
    assert_close(logits_of(model), logits_of(stock))
    model.save_pretrained(tmp_path)
    reloaded = FastBertForSequenceClassification.from_pretrained(tmp_path)
    assert_close(logits_of(reloaded), logits_of(stock))
    assert_same_weights(reloaded, model)


def test_only_students_of_a_wrapped_classifier_ask_for_no_gradients():
    model = FastBertForSequenceClassification.from_classifier(stock_classifier())
    for name, value in model.named_parameters():
        assert value.requires_grad == (not name.startswith(("exits.0.", "exits.1.", "exits.2.")))


@pytest.mark.parametrize(
    ("family", "wrap"),
    [
        ("bert", "from_classifier"),
        ("distilbert", "from_backbone"),
        ("albert", "from_classifier"),
        ("bert", "from_backbone"),
    ],
)
def test_callers_model_is_left_alone(family, wrap):
    stock = stock_classifier(family)
    expected, state, config = logits_of(stock), copied_state(stock), stock.config.to_dict()
    attention = stock.config._attn_implementation
    model = getattr(FastBertForSequenceClassification, wrap)(stock)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert stock.config._attn_implementation == attention != PACKED_ATTENTION
    assert stock.config.to_dict() == config
    assert copied_state(stock).keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in stock.state_dict().items())
    assert torch.equal(logits_of(stock), expected)
    assert all(parameter.requires_grad for parameter in stock.parameters())


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_callers_encoder_is_left_alone(family):
    stock = tiny_stock_model(family, attn_implementation="eager")
    batch = ragged_batch(pad_token_id=pad_token_id_of(family))
    with torch.no_grad():
        expected = stock(**batch).last_hidden_state
        FastBertForSequenceClassification.from_backbone(stock, attn_implementation="sdpa")
        assert stock.config._attn_implementation == "eager"
        assert torch.equal(stock(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("source", ["model", "folder"])
def test_head_of_modernbert_is_refused_with_the_reason(tmp_path, source):
    stock = stock_classifier("modernbert")
    stock.save_pretrained(tmp_path)
    message = r"stock classifier of 'modernbert' is not dense.*normalisation.*Supported are: bert, .*from_backbone\("
    with pytest.raises(ValueError, match=message):
        FastBertForSequenceClassification.from_classifier(stock if source == "model" else tmp_path)


@pytest.mark.parametrize(
    ("family", "stock_class"),
    [
        ("bert", BertForMaskedLM),
        ("bert", BertForNextSentencePrediction),
        ("roberta", RobertaForMaskedLM),
        ("electra", ElectraForPreTraining),
    ],
)
def test_checkpoint_without_a_classifier_is_refused_with_a_pointer_to_from_backbone(tmp_path, family, stock_class):
    stock = stock_class(tiny_text_config(family))
    stock.save_pretrained(tmp_path)
    message = r"has no fine-tuned classifier head \(its checkpoint lacks .*classifier.*from_backbone\("
    with pytest.raises(ValueError, match=message):
        FastBertForSequenceClassification.from_classifier(tmp_path)
    with pytest.raises(ValueError, match=rf"{stock_class.__name__} is not a sequence classifier.*from_backbone\("):
        FastBertForSequenceClassification.from_classifier(stock)


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ({"num_labels": 1, "problem_type": "regression"}, "model"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "folder"),
        ({"num_labels": 1}, "model"),
    ],
)
def test_classifier_of_another_problem_is_kept(tmp_path, config, source):
    stock = stock_classifier(**config)
    stock.save_pretrained(tmp_path)
    model = FastBertForSequenceClassification.from_classifier(stock if source == "model" else tmp_path)
    wanted = config.get("problem_type", "regression")
    assert task_of(model.config).name == wanted and model.config.num_labels == config["num_labels"]
    assert_close(logits_of(model), logits_of(stock))


def test_single_label_problem_type_of_a_classifier_is_kept():
    stock = stock_classifier(problem_type="single_label_classification")
    model = FastBertForSequenceClassification.from_classifier(stock)
    assert model.config.problem_type == "single_label_classification"
    assert_close(logits_of(model), logits_of(stock))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_labels": 3},
        {"num_labels": 5},
        {"teacher_exit_type": "attention"},
        {"problem_type": None},
        {"id2label": {0: "a"}},
    ],
)
def test_what_a_classifier_brings_itself_cannot_be_given(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"keeps the classifier's own head and its 3 labels: leave out {name}"):
        FastBertForSequenceClassification.from_classifier(stock_classifier(), **arguments)


@pytest.mark.parametrize("wrap", ["from_backbone", "from_classifier"])
def test_unknown_keyword_is_named(wrap):
    expected = r"unexpected speeed, wibble \(did you mean speed\?\): give fields of FastBertConfig \(task, .*id2label"
    with pytest.raises(TypeError, match=expected) as error:
        getattr(FastBertForSequenceClassification, wrap)(stock_classifier(), speeed=0.5, wibble=1)
    assert "base_config_key" not in str(error.value)


@pytest.mark.parametrize("wrap", ["from_backbone", "from_classifier"])
def test_fields_of_the_config_can_be_given(wrap):
    fields = {
        "exit_type": "linear",
        "share_exit_pooler": True,
        "exit_hidden_size": 24,
        "exit_num_attention_heads": 3,
        "exit_dropout": 0.25,
        "exit_policy": "patience",
        "speed": 0.75,
        "patience": 3,
        "max_layers": 2,
    }
    config = getattr(FastBertForSequenceClassification, wrap)(stock_classifier(), **fields).config
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("wrap", ["from_backbone", "from_classifier"])
@pytest.mark.parametrize("fields", [{"speed": 2.0}, {"exit_policy": "vote"}, {"max_layers": NUM_LAYERS + 1}])
def test_bad_fields_of_the_config_are_refused(wrap, fields):
    (name,) = fields
    with pytest.raises(ValueError, match=name):
        getattr(FastBertForSequenceClassification, wrap)(stock_classifier(), **fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_of_any_family_loads_from_a_folder_and_from_a_model_alike(tmp_path, family):
    stock = tiny_stock_model(family)
    stock.save_pretrained(tmp_path)
    batch = ragged_batch(pad_token_id=pad_token_id_of(family))
    with torch.no_grad():
        expected = stock(**batch).last_hidden_state[batch["attention_mask"].bool()]
        for source in (stock, tmp_path):
            model = FastBertForSequenceClassification.from_backbone(source, num_labels=4)
            states = model.fastbert(**batch).last_hidden_state
            assert_close(states[batch["attention_mask"].bool()], expected)
            assert model(**batch).logits.shape == (7, 4)
            assert not model.training
            assert model.config.text_config.model_type == family
            assert getattr(model.fastbert.backbone, "pooler", None) is None


def test_backbone_may_come_from_a_checkpoint_of_any_head(tmp_path):
    classifier, mlm = stock_classifier(), spread_out(BertForMaskedLM(tiny_text_config("bert")))
    for stock in (classifier, mlm):
        stock.save_pretrained(tmp_path / type(stock).__name__)
        for source in (stock, tmp_path / type(stock).__name__):
            model = FastBertForSequenceClassification.from_backbone(source, num_labels=4)
            weights = model.fastbert.backbone.state_dict()
            expected = {
                name: value for name, value in stock.bert.state_dict().items() if not name.startswith("pooler")
            }
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_backbone_of_a_classifier_gets_a_new_head_and_no_labels_of_the_old():
    model = FastBertForSequenceClassification.from_backbone(stock_classifier(), num_labels=5)
    assert model.config.id2label == {index: f"LABEL_{index}" for index in range(5)}
    assert model.teacher.out_proj.out_features == 5


def test_number_of_labels_is_two_unless_given_and_labels_can_be_named():
    stock = tiny_stock_model()
    assert FastBertForSequenceClassification.from_backbone(stock).config.num_labels == 2
    labels = {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}}
    model = FastBertForSequenceClassification.from_backbone(stock, **labels)
    assert model.config.id2label == LABELS
    assert model.teacher.out_proj.out_features == 3


def test_number_of_labels_that_contradicts_their_names_is_refused():
    names = {0: "a", 1: "b", 2: "c"}
    with pytest.raises(ValueError, match="num_labels=5, but id2label names 3 labels"):
        FastBertForSequenceClassification.from_backbone(tiny_stock_model(), num_labels=5, id2label=names)


def test_backbone_with_one_label_for_all_texts_is_refused():
    one = {"num_labels": 1, "problem_type": "single_label_classification"}
    with pytest.raises(ValueError, match=r"num_labels > 1|is too few for single_label_classification, which needs 2"):
        FastBertForSequenceClassification.from_backbone(tiny_stock_model(), **one)


@pytest.mark.parametrize("wrap", ["from_backbone", "from_classifier"])
def test_weights_are_float32_unless_a_dtype_is_given(tmp_path, wrap):
    stock_classifier().to(torch.bfloat16).save_pretrained(tmp_path)
    for arguments, dtype in (({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        model = getattr(FastBertForSequenceClassification, wrap)(tmp_path, **arguments)
        assert {value.dtype for value in model.parameters()} == {dtype}
        assert logits_of(model).dtype == dtype
        assert model.dtype == model.config.dtype == dtype


@pytest.mark.parametrize("wrap", ["from_backbone", "from_classifier"])
def test_dtype_given_with_a_loaded_model_is_honoured(wrap):
    model = getattr(FastBertForSequenceClassification, wrap)(stock_classifier(), dtype=torch.bfloat16)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("wrap", ["from_backbone", "from_classifier"])
def test_arguments_of_loading_are_refused_with_a_loaded_model(wrap):
    with pytest.raises(ValueError, match="loaded already: leave out revision, token, or give its name"):
        getattr(FastBertForSequenceClassification, wrap)(stock_classifier(), revision="main", token="none")


@pytest.mark.parametrize("wrap", ["from_backbone", "from_classifier"])
def test_loaded_bfloat16_model_stays_bfloat16(wrap):
    stock = stock_classifier().to(torch.bfloat16)
    model = getattr(FastBertForSequenceClassification, wrap)(stock)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert logits_of(model).dtype == torch.bfloat16


@pytest.mark.parametrize("wrap", ["from_backbone", "from_classifier"])
def test_unsupported_model_lists_the_supported_families(tmp_path, wrap):
    stock = MPNetModel(MPNetConfig(**{**SHAPE, "num_hidden_layers": 1}))
    stock.save_pretrained(tmp_path)
    for source in (stock, tmp_path):
        with pytest.raises(ValueError, match=r"'mpnet' is not supported. Supported are: bert, ernie, roberta"):
            getattr(FastBertForSequenceClassification, wrap)(source)


@pytest.mark.parametrize("wrap", ["from_backbone", "from_classifier"])
def test_fastbert_model_needs_no_wrapping(tmp_path, wrap):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        with pytest.raises(ValueError, match=r"FastBERT model already.*from_pretrained"):
            getattr(FastBertForSequenceClassification, wrap)(source)


@pytest.mark.parametrize("wrap", ["from_backbone", "from_classifier"])
def test_decoder_is_refused(wrap):
    stock = stock_classifier()
    stock.config.is_decoder = True
    with pytest.raises(ValueError, match="set is_decoder=False"):
        getattr(FastBertForSequenceClassification, wrap)(stock)


@pytest.mark.parametrize("source", ["model", "folder"])
def test_wrapped_backbone_saves_a_plain_config(tmp_path, source):
    stock = tiny_stock_model("roberta")
    stock.save_pretrained(tmp_path / "stock")
    model = FastBertForSequenceClassification.from_backbone(stock if source == "model" else tmp_path / "stock")
    model.save_pretrained(tmp_path / "fast")
    text = (tmp_path / "fast" / "config.json").read_text()
    assert PACKED_ATTENTION not in text
    reloaded = FastBertConfig.from_pretrained(tmp_path / "fast").text_config.to_dict()
    expected = stock.config.to_dict()
    changed = {name for name in expected if expected[name] != reloaded.get(name)}
    assert changed <= {"_name_or_path", "architectures", "dtype", "transformers_version"}


@pytest.mark.parametrize(
    ("family", "depth"), [("bert", 1), ("roberta", 3), ("electra", 3), ("distilbert", 1), ("modernbert", 3)]
)
def test_the_first_layers_of_an_encoder_can_be_kept(family, depth):
    stock = tiny_stock_model(family)
    model = FastBertForSequenceClassification.from_backbone(stock, num_labels=3, num_hidden_layers=depth)
    assert model.config.num_hidden_layers == len(model.exits) == depth
    assert stock.config.num_hidden_layers == NUM_LAYERS
    batch = ragged_batch(pad_token_id=pad_token_id_of(family))
    whole = FastBertForSequenceClassification.from_backbone(stock, num_labels=3)
    states = [
        part(**batch, output_hidden_states=True).hidden_states[: depth + 1]
        for part in (model.fastbert, whole.fastbert)
    ]
    # The last state of a pre-norm encoder is normalised.
    for own, expected in list(zip(*states, strict=True))[:-1]:
        assert_close(own, expected)


def test_the_groups_of_albert_cannot_be_cut():
    with pytest.raises(ValueError, match="an encoder of type albert with 2 groups of layers cannot be cut"):
        FastBertForSequenceClassification.from_backbone(tiny_stock_model("albert"), num_hidden_layers=2)


def test_a_cut_model_comes_back(tmp_path):
    model = FastBertForSequenceClassification.from_backbone(tiny_stock_model("modernbert"), num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    again = FastBertForSequenceClassification.from_pretrained(tmp_path)
    assert_close(logits_of(again), logits_of(model), 1e-6)


@pytest.mark.parametrize("depth", [0, -1, NUM_LAYERS + 1])
def test_a_number_of_layers_that_is_not_there_is_refused(depth):
    with pytest.raises(ValueError, match=f"num_hidden_layers must be from 1 to {NUM_LAYERS}.*got {depth}"):
        FastBertForSequenceClassification.from_backbone(tiny_stock_model(), num_hidden_layers=depth)


def test_a_backbone_in_a_folder_leaves_no_path_in_what_is_saved(tmp_path):
    tiny_stock_model().save_pretrained(tmp_path / "backbone")
    FastBertForSequenceClassification.from_backbone(tmp_path / "backbone").save_pretrained(tmp_path / "model")
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()


def test_the_name_of_a_backbone_on_the_hub_is_kept(tmp_path):
    backbone = tiny_stock_model()
    backbone.config._name_or_path = "google-bert/bert-base-uncased"
    FastBertForSequenceClassification.from_backbone(backbone).save_pretrained(tmp_path)
    loaded = FastBertForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.text_config._name_or_path == "google-bert/bert-base-uncased"
