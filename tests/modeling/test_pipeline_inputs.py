"""Where the pipeline finds its texts: tables, data sets, pairs, blank texts; and what else a call may ask for."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from fastbert_hf import CascadeForSequenceClassification, FastBertForSequenceClassification

from ..common import NUM_LAYERS, stock, tiny_model, tiny_texts, tiny_tokenizer


TEXTS, OTHERS = tiny_texts(8), tiny_texts(8, seed=1)
SPEED = 0.7


def make_pipeline(model, **kwargs):
    return pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer(), **kwargs)


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=2)


@pytest.fixture(scope="module")
def classifier(model):
    return make_pipeline(model, speed=SPEED)


@pytest.fixture(scope="module")
def expected(classifier) -> list[dict]:
    answers = classifier(TEXTS)
    assert len({answer["exit_layer"] for answer in answers}) > 1
    return answers


@pytest.fixture(scope="module")
def of_pairs(classifier) -> list[dict]:
    return classifier([{"text": text, "text_pair": other} for text, other in zip(TEXTS, OTHERS, strict=True)])


# Tables and data sets


@pytest.mark.parametrize(
    "make",
    [
        lambda texts: pd.DataFrame({"number": range(len(texts)), "text": texts}),
        lambda texts: pd.DataFrame({"text": texts})["text"],
        lambda texts: pd.Series(texts, index=range(100, 100 + len(texts))),
        np.array,
        lambda texts: dict.fromkeys(texts).keys(),
    ],
)
def test_tables_and_columns_in_memory_give_a_list(classifier, expected, make):
    answers = classifier(make(TEXTS))
    assert type(answers) is list and answers == expected


def test_tables_of_pairs_give_the_answers_of_pairs(classifier, of_pairs):
    columns = {"label": [0] * len(TEXTS), "text_pair": OTHERS, "text": TEXTS}
    for table in (pd.DataFrame(columns), Dataset.from_dict(columns), Dataset.from_dict(columns).to_iterable_dataset()):
        assert list(classifier(table)) == of_pairs


def test_streams_that_do_not_know_their_columns_are_read_by_name(classifier, expected, of_pairs):
    pairs = [{"text_pair": other, "text": text, "label": 1} for text, other in zip(TEXTS, OTHERS, strict=True)]
    for rows, answers in ((pairs, of_pairs), ([{"text": text, "label": 1} for text in TEXTS], expected)):
        stream = IterableDataset.from_generator(lambda rows=rows: iter(rows))
        assert stream.column_names is None
        assert list(classifier(stream)) == answers
    with pytest.raises(ValueError, match="input 0 is a dict of 'sentence'"):
        list(classifier(IterableDataset.from_generator(lambda: iter([{"sentence": "word7"}]))))


@pytest.mark.parametrize(
    ("make", "type_of_answers"),
    [
        (lambda: Dataset.from_dict({"text": []}), "iterator"),
        (lambda: Dataset.from_dict({"text": ["word7"]}).select([]), "iterator"),
        (lambda: Dataset.from_dict({"text": [], "text_pair": []}), "iterator"),
        (lambda: Dataset.from_dict({}), "iterator"),
        (lambda: KeyDataset(Dataset.from_dict({"text": []}), "text"), "iterator"),
        (lambda: IterableDataset.from_generator(lambda: iter([])), "iterator"),
        (lambda: iter([]), "iterator"),
        (lambda: pd.DataFrame({"text": []}), "list"),
        (lambda: pd.Series([], dtype=object), "list"),
        (lambda: np.array([]), "list"),
        (list, "list"),
    ],
)
def test_what_is_empty_has_no_answers(classifier, make, type_of_answers):
    answers = classifier(make())
    assert (answers == []) if type_of_answers == "list" else (next(answers, "none") == "none")
    with pytest.raises(TypeError, match="unexpected spede"):
        classifier(make(), spede=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DatasetDict(dev=Dataset.from_dict({"text": TEXTS}), test=Dataset.from_dict({"text": TEXTS})),
            r"these are the splits dev, test of a data set: give one of them, as in classifier\(dataset\['dev'\]\)",
        ),
        (lambda: DatasetDict(), "these are the splits  of a data set"),
        (
            lambda: pd.DataFrame({"sentence": TEXTS, 5: 1}),
            r"no column 'text', but sentence, 5: give the column, as in classifier\(dataset\['sentence'\]\)",
        ),
        (lambda: pd.DataFrame(index=range(3)), "no column 'text', but none at all"),
        (lambda: Dataset.from_dict({"sentence": []}), "no column 'text', but sentence"),
    ],
)
def test_tables_without_texts_say_what_to_give(classifier, make, message):
    with pytest.raises(ValueError, match=message):
        classifier(make())


def test_what_is_missing_in_a_table_is_named(classifier):
    for missing in (None, float("nan"), pd.NA):
        with pytest.raises(TypeError, match="input 1: a text must be a string, got"):
            classifier(pd.DataFrame({"text": ["word7", missing]}))


# Pairs


def test_second_texts_by_keyword(classifier, of_pairs):
    (answer,) = classifier(TEXTS[0], text_pair=OTHERS[0])
    assert answer == pytest.approx({**of_pairs[0], "score": pytest.approx(of_pairs[0]["score"], abs=1e-5)})
    assert classifier(TEXTS, text_pair=OTHERS) == of_pairs
    assert classifier(pd.Series(TEXTS), text_pair=pd.Series(OTHERS)) == of_pairs
    assert list(classifier(iter(TEXTS), text_pair=iter(OTHERS))) == of_pairs
    one_for_all = classifier([{"text": text, "text_pair": "word8"} for text in TEXTS])
    assert classifier(TEXTS, text_pair="word8") == one_for_all
    assert make_pipeline(classifier.model, speed=SPEED, text_pair="word8")(TEXTS) == one_for_all


def test_second_texts_that_do_not_fit_are_refused(classifier):
    with pytest.raises(ValueError, match="got 7 text_pairs for 8 texts: give one for all, or one for each"):
        classifier(TEXTS, text_pair=OTHERS[:7])
    with pytest.raises(ValueError, match="there are 7 text_pairs but more texts"):
        list(classifier(iter(TEXTS), text_pair=OTHERS[:7]))
    with pytest.raises(ValueError, match="there are 7 texts but more text_pairs"):
        list(classifier(iter(TEXTS[:7]), text_pair=iter(OTHERS)))
    with pytest.raises(ValueError, match="input 0 is a pair, and text_pair is given, too"):
        classifier({"text": "word7", "text_pair": "word8"}, text_pair="word9")
    with pytest.raises(TypeError, match="input 1: a text must be a string, got int"):
        classifier(TEXTS[:2], text_pair=["word7", 5])
    with pytest.raises(TypeError, match="text_pair must be a text, or one for each text, got 5"):
        classifier(TEXTS[0], text_pair=5)


def test_blank_texts_and_pairs_are_answered_as_the_stock_pipeline_answers_them():
    own = make_pipeline(FastBertForSequenceClassification.from_classifier(stock(num_layers=2)), speed=0)
    other = pipeline("text-classification", model=stock(num_layers=2), tokenizer=tiny_tokenizer(), device="cpu")
    pairs = [("word7", "word8"), ("word7", ""), ("word7", " "), ("", "word8"), ("", ""), ("word9", "")]
    for inputs in (["word7", "", "  ", "word8 word9"], [{"text": one, "text_pair": two} for one, two in pairs]):
        answers, stock_answers = own(inputs), [other(one) for one in inputs]
        for answer, stock_answer in zip(answers, stock_answers, strict=True):
            stock_answer = stock_answer[0] if isinstance(stock_answer, list) else stock_answer
            assert answer["label"] == stock_answer["label"]
            assert answer["score"] == pytest.approx(stock_answer["score"], abs=1e-5)
        assert len({answer["score"] for answer in answers}) > 2
    for text, text_pair in pairs:
        assert own(text, text_pair=text_pair)[0]["score"] == pytest.approx(
            other(text, text_pair=text_pair)[0]["score"], abs=1e-5
        )


# A speed for each text, and what else a call may ask for


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, iter, pd.Series])
def test_every_text_may_have_its_own_speed(classifier, make):
    speeds = list(itertools.islice(itertools.cycle([0.0, 0.7, 1.0]), len(TEXTS)))
    expected = [classifier(text, speed=speed)[0]["exit_layer"] for text, speed in zip(TEXTS, speeds, strict=True)]
    assert len(set(expected)) > 2
    dataset = Dataset.from_dict({"text": TEXTS})
    for inputs in (TEXTS, iter(TEXTS), dataset, pd.Series(TEXTS)):
        assert [answer["exit_layer"] for answer in classifier(inputs, speed=make(speeds))] == expected
    assert classifier(TEXTS[0], speed=[1.0]) == classifier(TEXTS[0], speed=1.0)


@pytest.mark.parametrize("speeds", [[0.5] * 7, [0.5] * 9, [], torch.zeros(9)])
def test_other_numbers_of_speeds_are_refused_before_any_work(classifier, speeds):
    with pytest.raises(ValueError, match=f"got {len(speeds)} speeds for 8 texts: give one for all, or one for each"):
        classifier(TEXTS, speed=speeds)


def test_wrong_speeds_name_their_text(model, classifier):
    with pytest.raises(ValueError, match="text 1: speed must be a number"):
        classifier(TEXTS[:2], speed=[0.5, 2])
    with pytest.raises(ValueError, match="there are 2 speeds but more texts"):
        list(classifier(iter(TEXTS), speed=iter([0.5] * 2)))
    with pytest.raises(ValueError, match="speed must be a number"):
        make_pipeline(model, speed=[0.5] * 8)


@pytest.mark.parametrize("top_k", [{}, {"top_k": None}])
def test_uncertainty_is_told_on_request(model, classifier, top_k):
    predictions = list(model.predict(tiny_tokenizer()(TEXTS), speed=SPEED))
    for told in (
        classifier(TEXTS, return_uncertainty=True, **top_k),
        make_pipeline(model, speed=SPEED, return_uncertainty=True)(TEXTS, **top_k),
    ):
        told = [answer[-1] if top_k else answer for answer in told]
        assert [list(answer) for answer in told] == [["label", "score", "exit_layer", "uncertainty"]] * 8
        for answer, prediction in zip(told, predictions, strict=True):
            assert answer["uncertainty"] == pytest.approx(prediction.uncertainty, abs=1e-6)
    assert "uncertainty" not in classifier(TEXTS, return_uncertainty=False)[0]


@pytest.mark.parametrize("asked", [{"exit_policy": "margin"}, {"exit_policy": "patience", "patience": 1}])
def test_the_policy_of_a_call_is_that_of_a_config(model, classifier, asked):
    configured = tiny_model(seed=2, **asked)
    encoded = tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = configured(**encoded, speed=SPEED)
        output = model(**encoded, speed=SPEED, **asked)
        assert not torch.equal(model(**encoded, speed=SPEED).exit_layer, expected.exit_layer)
    assert torch.equal(output.exit_layer, expected.exit_layer)
    assert torch.equal(output.uncertainty, expected.uncertainty)
    layers = expected.exit_layer.tolist()
    predicted = list(model.predict(tiny_tokenizer()(TEXTS), speed=SPEED, **asked))
    assert [answer.exit_layer for answer in predicted] == layers
    assert [answer.uncertainty for answer in predicted] == pytest.approx(expected.uncertainty.tolist(), abs=1e-5)
    assert [answer["exit_layer"] for answer in classifier(TEXTS, **asked)] == layers
    constructed = make_pipeline(model, speed=SPEED, **asked)
    assert [answer["exit_layer"] for answer in constructed(TEXTS)] == layers
    assert constructed(TEXTS, exit_policy="entropy") == classifier(TEXTS)
    assert model.config.exit_policy == "entropy"


def test_patience_of_a_call():
    model = tiny_model(seed=2, exit_policy="patience", patience=1)
    classifier = make_pipeline(model, speed=0.1)
    assert min(answer["exit_layer"] for answer in classifier(TEXTS)) < NUM_LAYERS
    assert {answer["exit_layer"] for answer in classifier(TEXTS, patience=NUM_LAYERS)} == {NUM_LAYERS}
    constructed = make_pipeline(tiny_model(seed=2), speed=0.1, exit_policy="patience")
    assert constructed(TEXTS, patience=1) == classifier(TEXTS)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"exit_policy": "margins"}, "exit_policy='margins' is not known"),
        ({"exit_policy": ""}, "exit_policy='' is not known"),
        ({"patience": 2}, "patience=2 has no meaning with exit_policy='entropy': leave it out, or give"),
        ({"exit_policy": "patience", "patience": 0}, "patience must be a whole number of at least 1, got 0"),
        ({"exit_policy": "patience", "patience": True}, "patience must be a whole number of at least 1, got True"),
        ({"exit_policy": "patience", "patience": 1.5}, "patience must be a whole number of at least 1, got 1.5"),
    ],
)
def test_policies_that_no_model_has(model, classifier, asked, message):
    encoded = tiny_tokenizer()(TEXTS[:1], return_tensors="pt")
    for call in (
        lambda: model(**encoded, **asked),
        lambda: model.predict(encoded, **asked),
        lambda: classifier(iter(TEXTS), **asked),
        lambda: make_pipeline(model, **asked),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_cascade_takes_its_own_policies():
    members = [stock("bert", 1, 1), stock("electra", 2, 2)]
    cascade = CascadeForSequenceClassification.from_members(members)
    margin = CascadeForSequenceClassification.from_members(members, exit_policy="margin")
    encoded = tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output, expected = cascade(**encoded, speed=SPEED, exit_policy="margin"), margin(**encoded, speed=SPEED)
    assert torch.equal(output.exit_member, expected.exit_member)
    assert torch.equal(output.uncertainty, expected.uncertainty)
    classifier = make_pipeline(cascade, speed=SPEED)
    answers = classifier(TEXTS, exit_policy="margin")
    assert [answer["exit_member"] for answer in answers] == expected.exit_member.tolist()
    for asked in ({"exit_policy": "patience"}, {"patience": 2}):
        for call in (
            lambda asked=asked: classifier(TEXTS, **asked),
            lambda asked=asked: make_pipeline(cascade, **asked),
        ):
            with pytest.raises(ValueError, match="is not for a cascade; its policies are confidence, entropy, margin"):
                call()
    with pytest.raises(ValueError, match="exit_policy='patience' is not for a cascade"):
        cascade.predict(encoded, exit_policy="patience")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("spede", "speed"),
        ("max_layer", "max_layers"),
        ("trunkation", "truncation"),
        ("onerror", "on_error"),
        ("batchsize", "batch_size"),
        ("topk", "top_k"),
    ],
)
def test_unknown_arguments_are_refused_with_the_nearest_name(model, classifier, name, near):
    for call in (lambda: classifier(TEXTS, **{name: 1}), lambda: make_pipeline(model, **{name: 1})):
        with pytest.raises(
            TypeError, match=rf"unexpected {name} \(did you mean {near}\?\): the pipeline takes speed, "
        ):
            call()
    with pytest.raises(TypeError, match=r"unexpected zzz: the pipeline takes speed, .* top_k, .* such as truncation"):
        classifier(TEXTS, zzz=1)


def test_arguments_of_the_stock_pipeline_are_known(model):
    classifier = make_pipeline(
        model, batch_size=2, num_workers=0, top_k=None, function_to_apply="none", local_files_only=True
    )
    answers = classifier(TEXTS, truncation=True, max_length=9, padding=True, split_special_tokens=True, top_k=2)
    assert [len(answer) for answer in answers] == [2] * 8


def test_the_model_of_the_package_needs_no_warning():
    records, handler, logger = [], logging.Handler(), logging.getLogger("transformers.pipelines")
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    try:
        assert pipeline("fast-text-classification")("a joy")[0]["label"] == "positive"
        assert records == []
        logger.warning("No model was supplied, defaulted to org/another and revision main.")
        assert len(records) == 1
    finally:
        logger.removeHandler(handler)
