"""What the "fast-text-classification" pipeline does not take, and what its errors say."""

from __future__ import annotations

import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from ..common import tiny_model, tiny_text_config, tiny_texts, tiny_tokenizer


TEXTS = tiny_texts(4)
PAIRS = [{"text": TEXTS[0], "text_pair": TEXTS[1]}, {"text": TEXTS[2], "text_pair": TEXTS[3]}]


@pytest.fixture(scope="module")
def classifier():
    return pipeline("fast-text-classification", model=tiny_model(), tokenizer=tiny_tokenizer(), device="cpu")


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_empty_text_is_refused_where_the_caller_says_so(classifier, text):
    with pytest.raises(ValueError, match=r"input 0: got an empty text .*: leave empty texts out"):
        classifier(text, allow_blank=False)
    constructed = pipeline(
        "fast-text-classification", model=classifier.model, tokenizer=classifier.tokenizer, allow_blank=False
    )
    with pytest.raises(ValueError, match="got an empty text"):
        constructed(["word7", text])
    assert len(constructed(text, allow_blank=True)) == 1


@pytest.mark.parametrize("bad", [None, 5, 0.5, b"bytes"])
def test_what_is_no_text_is_refused(classifier, bad):
    with pytest.raises(TypeError, match=f"a text must be a string, got {type(bad).__name__} "):
        classifier(bad)


def test_bytes_error_says_how_to_decode_them(classifier):
    with pytest.raises(TypeError, match=r"bytes need text.decode\(\"utf-8\"\)"):
        classifier(b"bytes")


@pytest.mark.parametrize("bad", ["", "   ", None, 5, b"bytes"])
def test_one_bad_text_among_good_ones_is_refused(classifier, bad):
    is_empty = isinstance(bad, str)
    expected = "got an empty text" if is_empty else f"a text must be a string, got {type(bad).__name__} "
    for inputs, make, batch_size in (([bad, "word7"], list, 1), (["word7", "word8", bad], iter, 4)):
        with pytest.raises(ValueError if is_empty else TypeError, match=expected):
            list(classifier(make(inputs), batch_size=batch_size, allow_blank=False))


@pytest.mark.parametrize("place", ["text", "text_pair"])
def test_bad_text_in_a_pair_is_refused(classifier, place):
    for make in (lambda pair: pair, lambda pair: [pair], lambda pair: iter([pair])):
        with pytest.raises(ValueError, match="got an empty text"):
            list(classifier(make({**PAIRS[0], place: " "}), allow_blank=False))
        with pytest.raises(TypeError, match="a text must be a string, got int "):
            list(classifier(make({**PAIRS[0], place: 5})))


def test_bad_text_in_a_data_set_is_refused(classifier):
    dataset = Dataset.from_dict({"text": ["word7", ""]})
    with pytest.raises(ValueError, match="got an empty text"):
        list(classifier(KeyDataset(dataset, "text"), allow_blank=False))
    with pytest.raises(ValueError, match="got an empty text"):
        classifier(dataset["text"], allow_blank=False)


def test_pairs_as_lists_are_refused(classifier):
    with pytest.raises(ValueError, match="text_pair"):
        classifier([["word7", "word8"]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([TEXTS[0], PAIRS[0]], "input 1 is a pair, but"),
        ([PAIRS[0], PAIRS[1], TEXTS[0]], "input 2 is a single text, but"),
        ([PAIRS[0], {"text": TEXTS[0]}], "input 1 is a single text, but"),
    ],
)
def test_pairs_among_single_texts_are_refused(classifier, inputs, message):
    for make, batch_size in ((list, 1), (iter, 8)):
        with pytest.raises(ValueError, match=message):
            list(classifier(make(inputs), batch_size=batch_size))


def test_stock_model_is_refused():
    stock = AutoModelForSequenceClassification.from_config(tiny_text_config("bert"))
    expected = r"needs a FastBERT model, got one of type 'bert'.*from_classifier\(name\)"
    with pytest.raises(ValueError, match=expected):
        pipeline("fast-text-classification", model=stock, tokenizer=tiny_tokenizer())


def test_other_tasks_stay_unknown(classifier):
    with pytest.raises(KeyError, match="Unknown task faster-text-classification"):
        pipeline("faster-text-classification", model=classifier.model, tokenizer=classifier.tokenizer)
