"""Answers in a passage: the model beside the stock one, and the pipeline beside what its logits say."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, pipeline

from fastbert_hf import FastBertConfig, FastBertForQuestionAnswering, calibrate
from fastbert_hf.evaluation import record_exits, replay_at_speed
from fastbert_hf.modeling.exit_policies import ExitPolicy
from fastbert_hf.modeling.tasks import task_class

from ..common import NUM_LAYERS, assert_close, random_gates, spread_out, tiny_text_config, tiny_texts, tiny_tokenizer


QUESTION, PASSAGE = tiny_texts(2)
LONG = " ".join(tiny_texts(30))


def tiny_reader(seed: int = 0, **config) -> FastBertForQuestionAnswering:
    torch.manual_seed(seed)
    config = FastBertConfig(text_config=tiny_text_config("bert"), task="question-answering", **config)
    return spread_out(FastBertForQuestionAnswering(config), seed)


def encoded(number: int = 12) -> list[dict]:
    texts = tiny_texts(number + 1)
    return [dict(tiny_tokenizer()(*pair, truncation=True)) for pair in itertools.pairwise(texts)]


def in_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    return dict(tiny_tokenizer().pad(rows, return_tensors="pt"))


@pytest.fixture(scope="module")
def reader():
    return pipeline("fast-question-answering", model=tiny_reader(), tokenizer=tiny_tokenizer(), device="cpu")


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "albert"])
def test_a_stock_reader_keeps_its_head(family, tmp_path):
    stock = spread_out(AutoModelForQuestionAnswering.from_config(tiny_text_config(family)), 0)
    model = FastBertForQuestionAnswering.from_classifier(stock)
    batch = {"input_ids": torch.randint(5, 30, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    batch["attention_mask"][1, 5:] = 0
    ends = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 2, 20])}
    wanted, found = stock(**batch, **ends), model(**batch, **ends)
    kept = batch["attention_mask"].bool()
    for name in ("start_logits", "end_logits"):
        assert_close(getattr(found, name)[kept], getattr(wanted, name)[kept])
        assert (getattr(found, name)[~kept] == -100).all()
    model.save_pretrained(tmp_path)
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert type(again) is FastBertForQuestionAnswering
    assert torch.equal(again(**batch).start_logits, found.start_logits)


def test_the_loss_is_that_of_the_stock_reader():
    stock = spread_out(AutoModelForQuestionAnswering.from_config(tiny_text_config("bert")), 0)
    batch = {"input_ids": torch.randint(5, 30, (3, 9))}
    ends = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 2, 8])}
    model = FastBertForQuestionAnswering.from_classifier(stock)
    assert_close(model(**batch, **ends).loss, stock(**batch, **ends).loss)
    with pytest.raises(ValueError, match="give the first and the last token of each answer"):
        model(**batch, labels=torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("policy", task_class(FastBertConfig(task="question-answering")).policies())
def test_live_answers_are_those_of_the_record(policy):
    gates = random_gates(0, NUM_LAYERS) if policy == "learned" else None
    model, rows = tiny_reader(exit_policy=policy, gates=gates), encoded()
    record = record_exits(model, rows, progress=False)
    for speed in (0.0, 0.3, 0.7, 0.95, 1.0):
        replayed = replay_at_speed(record, model.config, speed)
        for settings in ({}, {"batch_tokens": 24}, {"batch_size": 1}):
            live = list(model.predict(rows, speed=speed, **settings))
            assert [answer.exit_layer for answer in live] == replayed.exit_layer.tolist()
            for answer, logits, row in zip(live, replayed.logits, rows, strict=True):
                assert answer.logits.shape == (len(row["input_ids"]), 2)
                assert_close(answer.logits, logits[: len(row["input_ids"])])


def test_an_uncertainty_is_the_greater_one_of_both_ends():
    policy = ExitPolicy.of(tiny_reader().config)
    logits = torch.tensor([[[9.0, 1.0], [0.0, 1.0], [0.0, 1.0], [-100.0, -100.0]]])
    uncertainty, _ = policy.uncertainty(logits)
    assert uncertainty.item() == 1.0  # the end is any of three tokens
    uncertainty, _ = policy.uncertainty(logits[..., :1].expand(-1, -1, 2))
    assert 0 < uncertainty.item() < 0.02


def test_the_pipeline_finds_the_likeliest_span(reader):
    answer = reader(question=QUESTION, context=PASSAGE, speed=0, max_answer_len=3)
    inputs = tiny_tokenizer()(QUESTION, PASSAGE, return_tensors="pt", return_offsets_mapping=True)
    offsets, parts = inputs.pop("offset_mapping")[0].tolist(), inputs.sequence_ids(0)
    logits = reader.model(**inputs)
    allowed = torch.tensor([part == 1 for part in parts])
    allowed[0] = True
    starts, ends = (
        own[0].masked_fill(~allowed, -1e4).softmax(0).tolist() for own in (logits.start_logits, logits.end_logits)
    )
    places = [place for place, part in enumerate(parts) if part == 1]
    spans = [(starts[first] * ends[last], first, last) for first in places for last in places if 0 <= last - first < 3]
    score, first, last = max(spans)
    assert answer["score"] == pytest.approx(score, rel=1e-4)
    assert (answer["start"], answer["end"]) == (offsets[first][0], offsets[last][1])
    assert answer["answer"] == PASSAGE[answer["start"] : answer["end"]] and answer["exit_layer"] == NUM_LAYERS


def test_long_passages_are_read_in_parts(reader):
    answers = reader(question=QUESTION, context=LONG, speed=0, max_seq_len=32, doc_stride=8, top_k=40)
    assert len({(answer["start"], answer["end"]) for answer in answers}) == len(answers) == 40
    assert max(answer["end"] for answer in answers) > len(LONG) / 2  # parts beyond the first one are read
    assert all(answer["answer"] == LONG[answer["start"] : answer["end"]] for answer in answers)
    scores = [answer["score"] for answer in answers]
    assert scores == sorted(scores, reverse=True)


def test_many_questions_have_their_own_speeds_and_errors(reader):
    asked = [{"question": QUESTION, "context": LONG}, {"question": QUESTION, "context": PASSAGE}]
    many = reader(asked, speed=[1.0, 0.0], max_seq_len=32, doc_stride=8)
    assert many == [reader(asked[0], speed=1.0, max_seq_len=32, doc_stride=8), reader(asked[1], speed=0)]
    assert reader(question=[QUESTION] * 2, context=PASSAGE, speed=0) == [reader(asked[1], speed=0)] * 2
    assert list(reader(iter(asked), speed=0)) == reader(asked, speed=0)
    bad = [asked[0], {"question": QUESTION, "context": " "}, {"question": QUESTION}, asked[1]]
    returned = reader(bad, speed=0, on_error="return")
    assert [sorted(answer)[0] for answer in returned] == ["answer", "error", "error", "answer"]
    assert returned[1] == {
        "error": "input 1: the context must be a text with something in it, got ' '.",
        "position": 1,
    }
    assert reader(bad, speed=0, on_error="skip") == [returned[0], returned[3]]
    with pytest.raises(ValueError, match="input 1: the context must be a text"):
        reader(bad, speed=0)


def test_no_answer_may_be_the_best(reader):
    answers = reader(question=QUESTION, context=PASSAGE, speed=0, handle_impossible_answer=True, top_k=500)
    empty = [answer for answer in answers if answer["answer"] == ""]
    assert [(answer["start"], answer["end"]) for answer in empty] == [(0, 0)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"question": QUESTION}, "give a question and its passage"),
        ({"question": [QUESTION], "context": [PASSAGE] * 2}, "there are 1 questions and 2 passages"),
        ({"inputs": {}, "question": QUESTION, "context": PASSAGE}, "give inputs, or question and context, not both"),
        ({"question": QUESTION, "context": PASSAGE, "top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"question": QUESTION, "context": PASSAGE, "speed": 2}, "speed must be a number in"),
        ({"question": LONG, "context": PASSAGE, "max_seq_len": 12}, "leaves no room for a passage in 12"),
    ],
)
def test_wrong_calls_say_what_to_do(reader, call, message):
    with pytest.raises(ValueError, match=message):
        reader(**call)


def test_an_unknown_argument_is_named(reader):
    with pytest.raises(TypeError, match=r"unexpected doc_strid \(did you mean doc_stride\?\)"):
        reader(question=QUESTION, context=PASSAGE, doc_strid=3)


def test_three_ends_and_other_tasks_are_refused():
    with pytest.raises(ValueError, match="an answer has two ends, and num_labels=3"):
        FastBertForQuestionAnswering(FastBertConfig(task="question-answering", num_labels=3))
    with pytest.raises(ValueError, match="FastBertForQuestionAnswering is for task='question-answering'"):
        FastBertForQuestionAnswering(FastBertConfig())


def test_a_reader_is_calibrated():
    model, rows = tiny_reader(), encoded(100)
    found = calibrate(model, rows, unit="layers", progress=False)
    assert found.greatest > 1
    depths = [answer.exit_layer for answer in model.predict(rows, speedup=found.greatest)]
    assert sum(depths) / len(depths) == pytest.approx(NUM_LAYERS / found.greatest, rel=1e-5)
