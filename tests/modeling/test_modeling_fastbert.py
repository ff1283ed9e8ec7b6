from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    PreTrainedModel,
)

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification
from tests.common import (
    FAMILIES,
    NUM_LAYERS,
    SHAPE,
    assert_close,
    pad_token_id_of,
    ragged_batch,
    spread_out,
    tiny_model,
    tiny_stock_model,
    tiny_text_config,
)


# One for each kind of embeddings and layers; the others are RoBERTa under another name.
KINDS = ("bert", "ernie", "roberta", "electra", "distilbert", "albert", "modernbert")
READS_TOKEN_TYPES = tuple(family for family in KINDS if family not in ("distilbert", "modernbert"))
LENGTH_BEYOND_LIMIT = {"bert": 65, "distilbert": 65, "albert": 65, "roberta": 63, "data2vec-text": 63}


def wrapped(family: str, **kwargs) -> tuple[PreTrainedModel, FastBertForSequenceClassification]:
    """A stock encoder and the FastBERT model around a copy of it."""
    stock = tiny_stock_model(family)
    return stock, FastBertForSequenceClassification.from_backbone(stock, **kwargs)


def assert_equals_stock(actual: torch.Tensor, stock: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Equal at every token, and exactly zero at padding."""
    is_token = attention_mask.bool()
    assert_close(actual[is_token], stock[is_token])
    assert not actual[~is_token].any()


@pytest.mark.parametrize(
    ("family", "kernel"), [*((family, "sdpa") for family in FAMILIES), ("bert", "eager"), ("modernbert", "eager")]
)
@torch.no_grad()
def test_hidden_states_of_every_layer_equal_the_stock_encoders(family, kernel):
    stock, model = wrapped(family, attn_implementation=kernel)
    batch = ragged_batch(pad_token_id=pad_token_id_of(family))
    expected = stock(**batch, output_hidden_states=True)
    output = model.fastbert(**batch, output_hidden_states=True)
    assert_equals_stock(output.last_hidden_state, expected.last_hidden_state, batch["attention_mask"])
    assert len(output.hidden_states) == len(expected.hidden_states) == NUM_LAYERS + 1
    for actual, stock_states in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert_equals_stock(actual, stock_states, batch["attention_mask"])
    classified = model(**batch, output_hidden_states=True)
    for actual, states in zip(classified.hidden_states, output.hidden_states, strict=True):
        assert_close(actual, states)


@pytest.mark.parametrize("family", READS_TOKEN_TYPES)
@torch.no_grad()
def test_pairs_equal_the_stock_encoders(family):
    stock, model = wrapped(family)
    batch = ragged_batch(pad_token_id=pad_token_id_of(family), pairs=True)
    states = model.fastbert(**batch).last_hidden_state
    assert_equals_stock(states, stock(**batch).last_hidden_state, batch["attention_mask"])
    del batch["token_type_ids"]
    assert (model.fastbert(**batch).last_hidden_state - states).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["distilbert", "modernbert"])
@torch.no_grad()
def test_token_types_are_left_out_where_the_family_has_none(family):
    stock, model = wrapped(family)
    batch = ragged_batch(pad_token_id=pad_token_id_of(family), pairs=True)
    states = model.fastbert(**batch).last_hidden_state
    del batch["token_type_ids"]
    assert_equals_stock(states, stock(**batch).last_hidden_state, batch["attention_mask"])


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_inputs_embeds_equal_the_stock_encoders(family):
    stock, model = wrapped(family)
    batch = ragged_batch(pad_token_id=pad_token_id_of(family))
    embeds = stock.get_input_embeddings()(batch["input_ids"].flip(1))
    inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    states = model.fastbert(**inputs).last_hidden_state
    assert_equals_stock(states, stock(**inputs).last_hidden_state, batch["attention_mask"])


@pytest.mark.parametrize(("family", "rows"), [*zip(KINDS, itertools.cycle(("one", "each")))])
@torch.no_grad()
def test_explicit_positions_equal_the_stock_encoders(family, rows):
    stock, model = wrapped(family)
    batch = ragged_batch(pad_token_id=pad_token_id_of(family))
    shape = batch["input_ids"].shape if rows == "each" else batch["input_ids"][:1].shape
    position_ids = torch.randint(2, 60, shape, generator=torch.Generator().manual_seed(3))
    expected = stock(**batch, position_ids=position_ids).last_hidden_state
    states = model.fastbert(**batch, position_ids=position_ids).last_hidden_state
    assert_equals_stock(states, expected, batch["attention_mask"])
    assert (model.fastbert(**batch).last_hidden_state - states).abs().max() > 1e-2


@torch.no_grad()
def test_task_types_of_ernie_equal_the_stock_encoders():
    stock, model = wrapped("ernie")
    batch = ragged_batch()
    task_type_ids = torch.randint(0, 3, batch["input_ids"].shape, generator=torch.Generator().manual_seed(3))
    expected = stock(**batch, task_type_ids=task_type_ids).last_hidden_state
    states = model.fastbert(**batch, task_type_ids=task_type_ids).last_hidden_state
    assert_equals_stock(states, expected, batch["attention_mask"])
    assert (model.fastbert(**batch).last_hidden_state - states).abs().max() > 1e-2
    classifier = tiny_model("ernie")
    logits = classifier(**batch, task_type_ids=task_type_ids).logits
    assert (classifier(**batch).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_without_a_mask_every_token_is_read_as_in_the_stock_encoder(family):
    stock, model = wrapped(family)
    input_ids = ragged_batch((14,) * 5, pad_token_id=pad_token_id_of(family))["input_ids"]
    assert_close(model.fastbert(input_ids).last_hidden_state, stock(input_ids).last_hidden_state)


@torch.no_grad()
def test_padding_tokens_inside_a_text_keep_the_positions_that_roberta_gives_them():
    stock, model = wrapped("roberta")
    batch = ragged_batch((12, 7), pad_token_id=1)
    batch["input_ids"][:, 3] = 1
    states = model.fastbert(**batch).last_hidden_state
    assert_equals_stock(states, stock(**batch).last_hidden_state, batch["attention_mask"])


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_mask_with_a_gap_gives_the_stock_states_or_an_error(family):
    stock, model = wrapped(family)
    batch = ragged_batch(pad_token_id=pad_token_id_of(family))
    batch["attention_mask"][5, 3:9] = 0
    try:
        states = model.fastbert(**batch).last_hidden_state
    except ValueError as error:
        assert "attention_mask" in str(error)
    else:
        assert_equals_stock(states, stock(**batch).last_hidden_state, batch["attention_mask"])


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_left_padding_gives_the_answers_of_right_padding(family):
    model = tiny_model(family)
    right, left = (ragged_batch(pad_token_id=pad_token_id_of(family), padding_side=side) for side in ("right", "left"))
    right_states, left_states = (model.fastbert(**batch).last_hidden_state for batch in (right, left))
    is_right, is_left = right["attention_mask"].bool(), left["attention_mask"].bool()
    assert_close(left_states[is_left], right_states[is_right])
    assert not left_states[~is_left].any()
    assert_close(model(**left).logits, model(**right).logits)
    embeds = model.get_input_embeddings()(left["input_ids"])
    from_embeds = model.fastbert(inputs_embeds=embeds, attention_mask=left["attention_mask"]).last_hidden_state
    assert_close(from_embeds, left_states)


@pytest.mark.parametrize("family", KINDS)
def test_gradients_of_the_encoder_equal_the_stock_encoders(family):
    stock, model = wrapped(family)
    batch = ragged_batch(pad_token_id=pad_token_id_of(family))
    weights = torch.randn(*batch["input_ids"].shape, 32, generator=torch.Generator().manual_seed(3))
    weights *= batch["attention_mask"][..., None]
    for encoder in (stock, model.fastbert):
        (encoder(**batch).last_hidden_state * weights).mean().backward()
    expected = {name: value.grad for name, value in stock.named_parameters() if value.grad is not None}
    gradients = {name: value.grad for name, value in model.fastbert.backbone.named_parameters()}
    assert len(expected) == len(gradients)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name])
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@torch.no_grad()
def test_bfloat16_stays_close_to_float32(family):
    model = tiny_model(family)
    batch = ragged_batch()
    expected = model(**batch)
    output = model.to(torch.bfloat16)(**batch)
    assert output.logits.dtype == torch.bfloat16
    assert output.uncertainty.dtype == torch.float32
    assert_close(output.logits.float(), expected.logits, 0.2)
    probabilities = output.logits.double().softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1) / math.log(3)
    assert_close(output.uncertainty.double(), entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_float32_cross_entropy_of_the_answers(dtype):
    model = tiny_model().to(dtype)
    batch, labels = ragged_batch(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    output = model(**batch, labels=labels)
    expected = -output.logits.float().log_softmax(-1)[torch.arange(7), labels].mean()
    assert output.loss.dtype == torch.float32
    assert_close(output.loss, expected)
    assert model(**batch).loss is None
    output.loss.backward()
    trained = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert {name.split(".")[0] for name in trained} == {"fastbert", "exits"}
    assert {name.split(".")[1] for name in trained if name.startswith("exits")} == {str(NUM_LAYERS - 1)}


@torch.no_grad()
def test_return_dict_false_gives_a_tuple_of_what_is_there():
    model, batch = tiny_model(), ragged_batch()
    output = model(**batch)
    logits, exit_layer, uncertainty = model(**batch, return_dict=False)
    assert torch.equal(logits, output.logits)
    assert torch.equal(exit_layer, output.exit_layer)
    assert torch.equal(uncertainty, output.uncertainty)
    (states,) = model.fastbert(**batch, return_dict=False)
    assert torch.equal(states, model.fastbert(**batch).last_hidden_state)


@torch.no_grad()
def test_hidden_states_come_when_the_config_asks():
    model, batch = tiny_model(), ragged_batch()
    assert model(**batch).hidden_states is None
    assert model.fastbert(**batch).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == NUM_LAYERS + 1
    assert len(model.fastbert(**batch).hidden_states) == NUM_LAYERS + 1
    assert model(**batch, output_hidden_states=False).hidden_states is None


def students_of(model: FastBertForSequenceClassification) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(("exits.0.", "exits.1.", "exits.2."))}


@pytest.mark.parametrize(
    ("config", "shared_pooler_is_the_students"),
    [
        ({}, False),
        ({"exit_type": "linear", "share_exit_pooler": True}, False),
        ({"exit_type": "attention", "share_exit_pooler": True, "teacher_exit_type": "linear"}, True),
    ],
)
def test_only_students_ask_for_no_gradients_in_built_wrapped_and_loaded_models(
    tmp_path, config, shared_pooler_is_the_students
):
    wrapper = FastBertForSequenceClassification.from_backbone(tiny_stock_model(), **config)
    wrapper.save_pretrained(tmp_path)
    loaded = FastBertForSequenceClassification.from_pretrained(tmp_path)
    placed = FastBertForSequenceClassification.from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16)
    for model in (tiny_model(**config), wrapper, loaded, placed):
        frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
        shared = {name for name, _ in model.named_parameters() if name.startswith("shared_pooler.")}
        assert frozen == students_of(model) | (shared if shared_pooler_is_the_students else set())
        assert {id(value) for value in model.student_parameters()} == {
            id(value) for name, value in model.named_parameters() if name in frozen
        }


def test_building_a_model_leaves_the_given_text_config_to_its_owner():
    stock = BertModel(tiny_text_config("bert")).eval()
    batch = ragged_batch()
    with torch.no_grad():
        before = stock(**batch).last_hidden_state
        FastBertForSequenceClassification(FastBertConfig(text_config=stock.config))
        assert stock.config._attn_implementation == "sdpa"
        assert_close(stock(**batch).last_hidden_state, before)


@pytest.mark.parametrize("family", ["bert", "albert"])
@torch.no_grad()
def test_chunked_feed_forward_of_a_stock_config_changes_nothing(family):
    stock_config, config = tiny_text_config(family), tiny_text_config(family)
    stock_config.chunk_size_feed_forward = config.chunk_size_feed_forward = 2
    stock = spread_out(AutoModel.from_config(stock_config))
    batch = ragged_batch((9, 3, 30, 1))
    expected = stock(**batch).last_hidden_state
    built = FastBertForSequenceClassification(FastBertConfig(text_config=config))
    built.fastbert.backbone.load_state_dict(stock.state_dict(), strict=False)
    for model in (FastBertForSequenceClassification.from_backbone(stock), built.eval()):
        assert_equals_stock(model.fastbert(**batch).last_hidden_state, expected, batch["attention_mask"])
    assert stock_config.chunk_size_feed_forward == 2


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_input_embeddings_are_the_backbones_and_can_be_replaced(family):
    model = tiny_model(family)
    assert model.get_input_embeddings() is model.fastbert.backbone.get_input_embeddings()
    replacement = torch.nn.Embedding(7, 32)
    model.set_input_embeddings(replacement)
    assert model.fastbert.backbone.get_input_embeddings() is replacement


def training_gradients(model: FastBertForSequenceClassification) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    model.train()(**ragged_batch(), labels=torch.tensor([0, 1, 2, 0, 1, 2, 0])).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_gradient_checkpointing_runs_layers_twice_and_gives_the_same_gradients(family):
    model = tiny_model(family)
    calls = []
    inner = next(module for module in model.fastbert.layers()[1].modules() if isinstance(module, torch.nn.Linear))
    inner.register_forward_hook(lambda *_: calls.append(1))
    expected = training_gradients(model)
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    gradients = training_gradients(model)
    assert len(calls) == 3
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], 1e-6)
    model.gradient_checkpointing_disable()
    training_gradients(model)
    assert len(calls) == 4


def test_gradient_checkpointing_is_refused_for_albert_as_in_its_stock_class():
    for model in (tiny_stock_model("albert"), tiny_model("albert"), tiny_model("albert").fastbert):
        with pytest.raises(ValueError, match="does not support"):
            model.gradient_checkpointing_enable()


def test_single_label_problem_type_is_accepted():
    assert tiny_model(problem_type="single_label_classification")(**ragged_batch()).logits.shape == (7, 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        (
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "inputs_embeds": torch.zeros(2, 5, 32)},
            "exactly one of input_ids and inputs_embeds",
        ),
        ({"input_ids": torch.ones(5, dtype=torch.long)}, r"input_ids must be \[batch_size, sequence_length\].*\[5\]"),
        ({"inputs_embeds": torch.zeros(5, 32)}, r"input_ids must be \[batch_size, sequence_length\].*\[5, 32\]"),
        (
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 4)},
            r"attention_mask must be \[batch_size, sequence_length\] = \[2, 5\], got \[2, 4\]",
        ),
        (
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(1, 5)},
            r"attention_mask must be .* got \[1, 5\]",
        ),
        (
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 1, 5, 5)},
            r"attention_mask must be .* got \[2, 1, 5, 5\]",
        ),
        (
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.tensor([[1] * 5, [0] * 5])},
            r"rows \[1\] hold padding only",
        ),
        ({"input_ids": torch.ones(0, 5, dtype=torch.long)}, "the batch has no rows"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, r"rows \[0, 1\] hold padding only"),
        ({"input_ids": torch.ones(1, 5, dtype=torch.long), "output_attentions": True}, "output_attentions is not"),
    ],
)
def test_bad_inputs_are_named(inputs, message):
    model = tiny_model()
    for part in (model, model.fastbert):
        with pytest.raises(ValueError, match=message):
            part(**inputs)


def test_output_attentions_in_the_config_is_refused_at_the_call():
    model = tiny_model()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    for part in (model, model.fastbert):
        with pytest.raises(ValueError, match="output_attentions is not available"):
            part(**ragged_batch())


@pytest.mark.parametrize("family", LENGTH_BEYOND_LIMIT)
@torch.no_grad()
def test_longest_text_is_read_and_one_token_more_names_the_limit(family):
    model, too_long = tiny_model(family), LENGTH_BEYOND_LIMIT[family]
    pad_token_id = pad_token_id_of(family)
    assert model(**ragged_batch((too_long - 1, 3), pad_token_id=pad_token_id)).logits.isfinite().all()
    message = rf"a text has {too_long} tokens, but this model reads at most {too_long - 1}.*max_length={too_long - 1}"
    batch = ragged_batch((too_long, 3), pad_token_id=pad_token_id)
    for part in (model, model.fastbert):
        with pytest.raises(ValueError, match=message):
            part(**batch)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])


@pytest.mark.parametrize("family", ["bert", "roberta"])
@torch.no_grad()
def test_padding_beyond_the_limit_is_no_obstacle(family):
    model, pad_token_id = tiny_model(family), pad_token_id_of(family)
    batch = ragged_batch((9, 3), pad_token_id=pad_token_id)
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (40, 40), value=pad_token_id),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (40, 40)),
    }
    assert_close(model(**padded).logits, model(**batch).logits)


@torch.no_grad()
def test_modernbert_reads_texts_as_long_as_its_config_says_and_no_longer():
    stock, model = wrapped("modernbert")
    batch = ragged_batch((64, 3))
    assert_equals_stock(
        model.fastbert(**batch).last_hidden_state, stock(**batch).last_hidden_state, batch["attention_mask"]
    )
    with pytest.raises(ValueError, match="a text has 65 tokens, but this model reads at most 64"):
        model(**ragged_batch((65, 3)))


def test_default_backbone_is_bert_and_fresh_models_answer():
    config = FastBertConfig(text_config=BertConfig(**SHAPE, num_hidden_layers=2))
    output = FastBertForSequenceClassification(config).eval()(torch.tensor([[5, 6, 7]]))
    assert output.logits.shape == (1, 2)
    assert output.exit_layer.tolist() == [2]
    assert output.exit_layer.dtype == torch.long
