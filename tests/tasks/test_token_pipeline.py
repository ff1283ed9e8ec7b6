"""The pipeline of tokens: at speed 0 that of Transformers, with its arguments, and beside them speeds and errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset
from transformers import pipeline

from fastbert_hf import FastTokenClassificationPipeline, calibrate
from fastbert_hf.modeling.tokenization import first_of_words

from ..common import NUM_LAYERS
from .common import TAGS, TASK_MODELS, balanced, made_up_texts, pieces_tokenizer, stock_task_model, wrapped


STRATEGIES = ("none", "simple", "first", "average", "max")
TEXTS = made_up_texts(8, 15)
LONG = made_up_texts(5, 60, seed=1)
BAD_WORD = "word7"


@pytest.fixture(scope="module")
def tokenizer():
    return pieces_tokenizer(24)


@pytest.fixture(scope="module")
def model():
    """Students and a teacher that say all tags; the stock model has the same teacher."""
    return balanced(wrapped("tokens", stock_task_model("tokens"), exit_hidden_size=16, speed=0.3))


@pytest.fixture(scope="module")
def stock_tagger(model, tokenizer):
    stock = stock_task_model("tokens")
    stock.classifier.load_state_dict(model.teacher.out_proj.state_dict())
    return pipeline("token-classification", model=stock, tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="module")
def tagger(model, tokenizer):
    return pipeline("fast-token-classification", model=model, tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="module")
def encoded(tokenizer):
    """What the pipeline gives to the model: of each word the first token counts."""
    rows = tokenizer(TEXTS, truncation=True)
    masks = [first_of_words(rows.word_ids(row)) for row in range(len(TEXTS))]
    return {**rows, "token_mask": masks}


def assert_same_entities(entities: list[dict], expected: list[dict], exit_layer: int | None = NUM_LAYERS) -> None:
    assert len(entities) == len(expected)
    for own, wanted in zip(entities, expected, strict=True):
        own, wanted = dict(own), dict(wanted)
        depth = own.pop("exit_layer")
        assert wanted.pop("exit_layer", depth) == depth
        assert depth == exit_layer or exit_layer is None
        assert own.pop("score") == pytest.approx(wanted["score"], abs=1e-5)
        assert own == {name: value for name, value in wanted.items() if name != "score"}


def assert_same(answers: list[list[dict]], expected: list[list[dict]], exit_layer: int | None = NUM_LAYERS) -> None:
    assert len(answers) == len(expected)
    for entities, wanted in zip(answers, expected, strict=True):
        assert_same_entities(entities, wanted, exit_layer)


@pytest.mark.parametrize("ignored", [None, [], ["O", "B-PER"], ["PER"]])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_at_speed_0_entities_are_those_of_the_stock_pipeline(tagger, stock_tagger, strategy, ignored):
    settings = {"aggregation_strategy": strategy} | ({} if ignored is None else {"ignore_labels": ignored})
    expected = stock_tagger(TEXTS, **settings)
    assert sum(map(len, expected)) > len(TEXTS)
    assert_same(tagger(TEXTS, speed=0, **settings), expected)
    assert_same_entities(tagger(TEXTS[3], speed=0, **settings), stock_tagger(TEXTS[3], **settings))
    for entities, text in zip(expected, TEXTS, strict=True):
        for entity in entities:
            assert text[entity["start"] : entity["end"]].strip()


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("stride", [0, 5])
def test_at_speed_0_long_texts_are_read_in_parts_as_by_the_stock_pipeline(tagger, stock_tagger, strategy, stride):
    settings = {"aggregation_strategy": strategy, "stride": stride}
    expected = stock_tagger(LONG, **settings)
    read = max(entity["end"] for entity in stock_tagger(LONG[-1], aggregation_strategy=strategy, ignore_labels=[]))
    assert max(entity["end"] for entity in expected[-1]) > read
    assert_same(tagger(LONG, speed=0, **settings), expected)
    assert_same(list(tagger(stream(LONG), speed=0, batch_size=2, **settings)), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_at_speed_0_words_are_read_as_by_the_stock_pipeline(tagger, stock_tagger, strategy):
    words = [text.split() for text in TEXTS]
    settings = {"aggregation_strategy": strategy, "is_split_into_words": True}
    for inputs in (words, words[5]):
        for delimiter in ({}, {"delimiter": "--"}):
            expected = stock_tagger(inputs, **settings, **delimiter)
            assert_same(tagger(inputs, speed=0, **settings, **delimiter), expected)


def test_lists_streams_and_single_texts_have_the_same_entities(tagger):
    expected = tagger(TEXTS, aggregation_strategy="simple")
    settings = {"aggregation_strategy": "simple"}
    assert_same(list(tagger((text for text in TEXTS), **settings)), expected, None)
    assert_same([tagger(text, **settings) for text in TEXTS], expected, None)
    for batch_size in (1, 3, 100):
        assert_same(tagger(TEXTS, batch_size=batch_size, **settings), expected, None)
        layers = [[entity["exit_layer"] for entity in text] for text in tagger(TEXTS, batch_size=batch_size)]
        assert layers == [[entity["exit_layer"] for entity in text] for text in tagger(TEXTS)]


@pytest.mark.parametrize(
    "make", [tuple, iter, lambda texts: map(str, texts), lambda texts: Dataset.from_dict({"t": texts})["t"]]
)
def test_every_iterable_of_texts_is_read(tagger, make):
    assert_same(list(tagger(make(TEXTS))), tagger(TEXTS), None)


def test_nothing_and_empty_texts_have_no_entities(tagger, stock_tagger):
    assert tagger([]) == []  # an error in Transformers
    assert tagger("") == stock_tagger("") == []
    assert tagger(["", TEXTS[3], " "], ignore_labels=[])[::2] == [[], []]
    assert list(tagger(text for text in ())) == []


@pytest.mark.parametrize("speed", [0.0, 0.3, 0.6, 1.0])
def test_entities_and_exit_layers_are_those_that_the_model_says(tagger, model, encoded, speed):
    answers = tagger(TEXTS, speed=speed, ignore_labels=[], return_exit_layers=True)
    for answer, said in zip(answers, model.predict(encoded, speed=speed), strict=True):
        assert answer["exit_layer"] == said.exit_layer
        assert {entity["exit_layer"] for entity in answer["entities"]} == {said.exit_layer}
        tags = [TAGS[label] for label in said.logits.argmax(-1).tolist()]
        assert [entity["entity"] for entity in answer["entities"]] == tags[1:-1]


def test_a_speed_of_each_text_a_stream_of_speeds_and_the_speed_of_the_config(tagger, model, tokenizer, encoded):
    speeds = [0.0, 0.3, 0.9, 1.0, 0.0, 1.0, 0.5, 1.0]
    expected = [answer.exit_layer for answer in model.predict(encoded, speed=speeds)]
    assert len(set(expected)) > 1
    for given in (speeds, iter(speeds), torch.tensor(speeds)):
        answers = tagger(TEXTS, speed=given, return_exit_layers=True)
        assert [answer["exit_layer"] for answer in answers] == expected
    own = [answer["exit_layer"] for answer in tagger(TEXTS, return_exit_layers=True)]
    assert own == [answer.exit_layer for answer in model.predict(encoded, speed=model.config.speed)]
    constructed = pipeline("fast-token-classification", model=model, tokenizer=tokenizer, speed=1.0, max_layers=2)
    layers = [answer["exit_layer"] for answer in constructed(TEXTS, return_exit_layers=True)]
    assert layers == [answer.exit_layer for answer in model.predict(encoded, speed=1.0, max_layers=2)]


STRIDED = {"aggregation_strategy": "simple", "stride": 4, "return_exit_layers": True}


def test_a_speed_of_each_text_is_that_of_all_its_parts(tagger):
    speeds = [0.0, 1.0, 0.5, 0.0, 1.0]
    expected = [tagger(text, speed=speed, **STRIDED) for text, speed in zip(LONG, speeds, strict=True)]
    answers = tagger(LONG, speed=speeds, **STRIDED)
    assert [answer["exit_layer"] for answer in answers] == [answer["exit_layer"] for answer in expected]
    assert_same(*([answer["entities"] for answer in part] for part in (answers, expected)), None)


def test_an_entity_has_the_exit_layer_of_the_part_that_it_was_found_in(tagger, model, tokenizer):
    text = LONG[-1]
    parts = tokenizer(text, truncation=True, return_overflowing_tokens=True, stride=0)
    masks = [first_of_words(parts.word_ids(number)) for number in range(len(parts["input_ids"]))]
    inputs = [{"input_ids": part, "token_mask": mask} for part, mask in zip(parts["input_ids"], masks, strict=True)]
    for speed in torch.linspace(0.1, 1.0, 19).tolist():
        depths = [answer.exit_layer for answer in model.predict(inputs, speed=speed)]
        if len(set(depths)) > 1:
            break
    assert len(set(depths)) > 1
    settings = {"aggregation_strategy": "simple", "ignore_labels": [], "stride": 0, "speed": speed}
    answer = tagger(text, return_exit_layers=True, **settings)
    assert answer["exit_layer"] == max(depths)
    assert {entity["exit_layer"] for entity in answer["entities"]} == set(depths)


@pytest.fixture(scope="module")
def broken_tagger(tokenizer):
    model = TASK_MODELS["tokens"]()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(BAD_WORD)] = float("nan")
    return pipeline("fast-token-classification", model=model, tokenizer=tokenizer, device="cpu")


GOOD = [" ".join(word for word in text.split() if not word.startswith(BAD_WORD)) for text in TEXTS[:5]]
MIXED = [GOOD[0], 5, GOOD[1], f"word8 {BAD_WORD} word9", GOOD[2], None, *GOOD[3:]]
BAD_PLACES = (1, 3, 5)


def stream(items: list):
    yield from items


@pytest.mark.parametrize("make", [list, stream])
@pytest.mark.parametrize("formation", [{}, {"batch_size": 1}, {"batch_size": 3}])
def test_a_text_without_an_answer_is_raised_or_returned_or_skipped(broken_tagger, make, formation):
    expected = broken_tagger(GOOD)
    returned = list(broken_tagger(make(MIXED), on_error="return", **formation))
    assert_same([answer for answer in returned if isinstance(answer, list)], expected, None)
    failures = [returned[place] for place in BAD_PLACES]
    assert [failure["position"] for failure in failures] == list(BAD_PLACES)
    assert "input 1" in failures[0]["error"] and "input 5" in failures[2]["error"]
    assert "text 3 are not finite" in failures[1]["error"]
    assert_same(list(broken_tagger(make(MIXED), on_error="skip", **formation)), expected, None)
    answers, before = iter(broken_tagger(stream(MIXED), on_error="raise", **formation)), []
    with pytest.raises(ValueError, match=r"input 1: .*must be an untokenized string"):
        before.extend(answers)
    assert_same(before, expected[:1], None)
    with pytest.raises(ValueError, match=r"the logits of text 2 are not finite"):
        list(broken_tagger(make([*GOOD[:2], MIXED[3]]), **formation))
    with pytest.raises(ValueError, match=r"on_error='stop' is not known; choose one of 'raise', 'return', 'skip'"):
        broken_tagger(GOOD, on_error="stop")


def test_of_texts_in_parts_an_error_names_the_text(broken_tagger):
    long_text = " ".join(word for word in LONG[-1].split() if not word.startswith(BAD_WORD))
    texts = [long_text, GOOD[0], f"{long_text} {BAD_WORD} {long_text}", GOOD[1]]
    returned = broken_tagger(texts, on_error="return", **STRIDED)
    assert [place for place, answer in enumerate(returned) if "error" in answer] == [2]
    assert returned[2]["position"] == 2 and "text 2 are not finite" in returned[2]["error"]
    skipped = broken_tagger(texts, on_error="skip", **STRIDED)
    assert [answer["exit_layer"] for answer in skipped] == [returned[place]["exit_layer"] for place in (0, 1, 3)]
    with pytest.raises(ValueError, match=r"text 2 are not finite"):
        broken_tagger(texts, **STRIDED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"aggregation_stratgy": "simple"}, r"unexpected aggregation_stratgy \(did you mean aggregation_strategy\?\)"),
        ({"sped": 0.5}, r"unexpected sped \(did you mean speed\?\): the pipeline takes .*speed, "),
        ({"return_exit_layer": True}, r"unexpected return_exit_layer \(did you mean return_exit_layers\?\)"),
        ({"top_k": 3}, r"unexpected top_k.*: the pipeline takes "),
        ({"text_pair": "word8"}, r"unexpected text_pair"),
        ({"truncation": True}, r"unexpected truncation"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_nearest_name(tagger, model, tokenizer, arguments, message):
    with pytest.raises(TypeError, match=message):
        tagger(TEXTS, **arguments)
    with pytest.raises(TypeError, match=message):
        pipeline("fast-token-classification", model=model, tokenizer=tokenizer, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speed": 2}, r"speed must be a number in \[0, 1\], got 2"),
        ({"speed": float("nan")}, r"speed must be a number in \[0, 1\], got nan"),
        ({"speed": [0.5]}, r"\b1 speeds"),
        ({"speed": [0.5] * 9}, r"\b9 speeds|more speeds"),
        ({"exit_policy": "certainty"}, r"exit_policy='certainty' is not known for token_classification; choose one"),
        ({"retention": 0.5}, r"retention"),
        ({"max_layers": 9}, r"max_layers must be a whole number from 1 to 4"),
        ({"speedup": 2.0}, r"speedup"),
        ({"aggregation_strategy": "simple", "stride": 24}, r"`stride` must be less than"),
    ],
)
def test_what_a_call_cannot_ask_for_is_refused(tagger, arguments, message):
    with pytest.raises(ValueError, match=message):
        tagger(TEXTS, **arguments)


def test_a_calibrated_model_takes_the_other_dials(model, tokenizer):
    texts = made_up_texts(300, 12, seed=2)
    calibrate(model, texts, tokenizer, progress=False)
    tagger = pipeline("fast-token-classification", model=model, tokenizer=tokenizer, return_exit_layers=True)
    greatest = model.config.calibration["speed_ups"][-1]
    depths = [
        sum(answer["exit_layer"] for answer in tagger(texts, **dial))
        for dial in ({"speedup": 1.0}, {"speedup": greatest}, {"max_disagreement": 0.9})
    ]
    assert depths[1] < depths[0] == NUM_LAYERS * len(texts)
    assert depths[2] <= depths[0]
    assert tagger.served is not None


def test_a_saved_pipeline_comes_back(tagger, tmp_path):
    tagger.save_pretrained(tmp_path)
    loaded = pipeline("fast-token-classification", model=str(tmp_path), aggregation_strategy="first")
    assert type(loaded) is FastTokenClassificationPipeline
    for speed, count in itertools.product((0.0, 0.5), (1, 8)):
        expected = tagger(TEXTS[:count], speed=speed, aggregation_strategy="first")
        assert_same(loaded(TEXTS[:count], speed=speed), expected, None)
