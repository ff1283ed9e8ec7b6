"""Texts without an answer, in `predict` and in the pipeline: raised, returned in their places, or left out."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import pipeline

from fastbert_hf import CascadeForSequenceClassification

from ..common import stock, tiny_model, tiny_texts, tiny_tokenizer


SPEED = 0.7
TEXTS = tiny_texts(9)
# What cannot be answered, by its position, and what the pipeline says of it.
BAD_TEXTS = {
    0: (5, "input 0: a text must be a string, got int"),
    4: ("word7 \ud800", "input 4: character 6 is half of a pair of surrogates"),
    5: (" ", "input 5: got an empty text"),
    6: ("word7 " * 70, "text 6 has 72 tokens, but this model reads at most 64"),
    8: ({"text": "word7", "text_pair": "word8"}, "input 8 is a pair, but those before it are not"),
}
BAD_ROWS = {
    0: ("a string", "text 0 has no input_ids"),
    3: (ValueError("this one failed before"), "this one failed before"),
    4: ({"input_ids": [5.0]}, "the input_ids of text 4 must be whole numbers"),
    8: ({"input_ids": None}, "text 8 has no input_ids"),
}
FORMATIONS = ({}, {"batch_size": 1}, {"batch_size": 3}, {"batch_tokens": 16})


def mixed(good: list, bad: dict) -> list:
    return [bad[position][0] if position in bad else item for position, item in enumerate(good)]


def make_cascade() -> CascadeForSequenceClassification:
    return CascadeForSequenceClassification.from_members([stock("bert", 1, 1), stock("electra", 2, 2)])


@pytest.fixture(scope="module", params=["fastbert", "cascade"])
def model(request):
    return tiny_model(seed=2) if request.param == "fastbert" else make_cascade()


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [{"input_ids": tiny_tokenizer()(text)["input_ids"]} for text in TEXTS]


@pytest.fixture(scope="module")
def expected(model, rows) -> list:
    return list(model.predict(rows, speed=SPEED))


@pytest.mark.parametrize("formation", FORMATIONS)
def test_predict_returns_errors_in_the_places_of_their_texts(model, rows, expected, formation):
    answers = list(model.predict(iter(mixed(rows, BAD_ROWS)), speed=SPEED, on_error="return", **formation))
    assert len(answers) == len(rows)
    for position, (answer, other) in enumerate(zip(answers, expected, strict=True)):
        if position in BAD_ROWS:
            assert answer.logits is None and answer.exit_layer == 0 and answer.uncertainty != answer.uncertainty
            assert BAD_ROWS[position][1] in str(answer.error)
        else:
            assert answer.error is None
            assert (answer.exit_layer, answer.exit_member) == (other.exit_layer, other.exit_member)
            torch.testing.assert_close(answer.logits, other.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("formation", FORMATIONS)
def test_predict_skips_them(model, rows, expected, formation):
    speeds = [SPEED] * len(rows)
    answers = list(model.predict(mixed(rows, BAD_ROWS), speed=speeds, on_error="skip", **formation))
    kept = [answer for position, answer in enumerate(expected) if position not in BAD_ROWS]
    assert [answer.exit_layer for answer in answers] == [answer.exit_layer for answer in kept]
    assert all(answer.error is None for answer in answers)


@pytest.mark.parametrize("on_error", ["return", "skip"])
def test_predict_treats_logits_that_are_not_finite_and_bad_speeds_alike(rows, on_error):
    model = tiny_model(seed=2)
    rows = [{"input_ids": [min(number, 98) for number in row["input_ids"]]} for row in rows]
    rows[3] = {"input_ids": [7, 99]}
    with torch.no_grad():
        model.get_input_embeddings().weight[99] = float("nan")
    speeds = [SPEED] * 6 + [None] + [SPEED] * 2
    answers = list(model.predict(rows, speed=speeds, on_error=on_error))
    errors = {position: str(answer.error) for position, answer in enumerate(answers) if answer.error is not None}
    assert len(answers) == (9 if on_error == "return" else 7)
    if on_error == "return":
        assert set(errors) == {3, 6}
        assert "the logits of text 3 are not finite" in errors[3]
        assert "text 6: speed must be a number" in errors[6]


@pytest.mark.parametrize("on_error", ["raise", "return", "skip"])
def test_a_source_that_raises_does_so_whatever_becomes_of_texts(rows, on_error):
    def stream():
        yield from rows[:3]
        raise OSError("the source is gone")

    def texts():
        yield from TEXTS[:3]
        raise ValueError("the source is gone")

    model = tiny_model()
    classifier = pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer())
    for answers in (model.predict(stream(), on_error=on_error), classifier(texts(), on_error=on_error)):
        assert len(list(itertools.islice(answers, 3))) == 3
        with pytest.raises((OSError, ValueError), match="the source is gone"):
            next(answers)


def test_streams_without_one_good_text_are_answered_as_they_come():
    read = []
    stream = (read.append(position) or "no text" for position in range(4000))
    answers = tiny_model().predict(stream, on_error="return", batch_tokens=10)
    assert len(list(itertools.islice(answers, 400))) == 400
    assert len(read) < 800


def test_memory_that_runs_out_loses_no_error(rows):
    model = tiny_model(seed=2)
    expected = list(model.predict(rows, speed=SPEED))

    def limited(layer, args):
        if args[0].shape[1] > 14:
            raise MemoryError

    model.fastbert.layers()[1].register_forward_pre_hook(limited)
    answers = list(model.predict(mixed(rows, BAD_ROWS), speed=SPEED, on_error="return"))
    assert [answer.exit_layer for answer in answers] == [
        0 if position in BAD_ROWS else answer.exit_layer for position, answer in enumerate(expected)
    ]


@pytest.mark.parametrize("on_error", ["ignore", None, "Raise"])
def test_unknown_ways_are_refused_at_once(model, rows, on_error):
    with pytest.raises(ValueError, match=r"on_error=.* is not known; choose one of 'raise', 'return', 'skip'"):
        model.predict(rows, on_error=on_error)
    if on_error is not None:
        classifier = pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer())
        with pytest.raises(ValueError, match="on_error="):
            classifier(iter(TEXTS), on_error=on_error)
        with pytest.raises(ValueError, match="on_error="):
            pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer(), on_error=on_error)


# The pipeline


@pytest.fixture(scope="module")
def classifier(model):
    return pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer(), speed=SPEED)


@pytest.fixture(scope="module")
def told(classifier) -> list[dict]:
    return classifier(TEXTS)


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_the_pipeline_answers_all_others_and_says_where(classifier, told, batch_size):
    inputs, arguments = mixed(TEXTS, BAD_TEXTS), {"allow_blank": False, "batch_size": batch_size}
    answers = classifier(inputs, on_error="return", **arguments)
    assert [answer["position"] for answer in answers] == list(range(len(TEXTS)))
    for answer, other in zip(answers, told, strict=True):
        position = answer.pop("position")
        if position in BAD_TEXTS:
            assert set(answer) == {"error"} and BAD_TEXTS[position][1] in answer["error"]
        else:
            assert answer == pytest.approx({**other, "score": pytest.approx(other["score"], abs=1e-5)})
    skipped = list(classifier(iter(inputs), on_error="skip", **arguments))
    assert [answer["position"] for answer in skipped] == [1, 2, 3, 7]
    assert [answer["label"] for answer in skipped] == [told[position]["label"] for position in (1, 2, 3, 7)]


@pytest.mark.parametrize("position", BAD_TEXTS)
def test_the_pipeline_raises_after_all_answers_before_it(classifier, told, position):
    bad, message = BAD_TEXTS[position]
    answers, got = classifier(iter(mixed(TEXTS, {position: (bad, message)})), allow_blank=False), []
    if position == 0:
        answers = classifier(iter([bad, *TEXTS]))
    with pytest.raises((ValueError, TypeError), match=message):
        for answer in answers:
            got.append(answer["label"])
    assert got == [answer["label"] for answer in told[:position]]


def test_position_255_of_400_is_named_after_255_answers(classifier):
    """A text that only the tokenizer refuses, which gets 256 at a time."""
    inputs, got = ["word7 word8"] * 400, []
    inputs[255] = "word7 \udfff"
    with pytest.raises(ValueError, match="input 255: character 6 is half of a pair of surrogates"):
        for answer in classifier(iter(inputs)):
            got.append(answer)
    assert len(got) == 255
    assert [one["position"] for one in classifier(inputs, on_error="return") if "error" in one] == [255]


def test_lists_of_labels_and_single_texts(classifier):
    answers = classifier([TEXTS[0], 5], on_error="return", top_k=2)
    assert [one["position"] for one in answers[0]] == [0, 0] and answers[1]["position"] == 1
    assert classifier("word7 \ud800", on_error="skip") == []
    assert classifier("word7 \ud800", on_error="skip", top_k=None) == []
    (answer,) = classifier("word7 \ud800", on_error="return")
    assert set(answer) == {"error", "position"}
    pair = {"text": "word7", "text_pair": "\udc00"}
    assert "half of a pair of surrogates" in classifier(pair, on_error="return")["error"]
    assert "position" not in classifier(TEXTS[0])[0]


def test_the_constructor_may_say_so(classifier):
    skipping = pipeline(
        "fast-text-classification", model=classifier.model, tokenizer=classifier.tokenizer, on_error="skip"
    )
    assert [answer["position"] for answer in skipping([5, "word7", None])] == [1]
    with pytest.raises(TypeError, match="input 0: a text must be a string"):
        skipping([5, "word7"], on_error="raise")


def test_a_call_that_the_tokenizer_does_not_take_is_no_text_of_its_own(classifier):
    for on_error in ("raise", "return"):
        with pytest.raises(ValueError, match="sometimes is not a valid TruncationStrategy"):
            classifier(TEXTS, truncation="sometimes", on_error=on_error)
