"""Tokens whose labels nobody wants: an exit need not be sure of them, and they change no other answer."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import pipeline

from fastbert_hf.evaluation import exit_uncertainties, record_exits, replay, replay_at_speed
from fastbert_hf.modeling.exit_policies import ExitPolicy, exit_thresholds

from ..common import NUM_LAYERS, assert_close
from .common import TASK_MODELS, encoded_texts, made_up_texts, padded, pieces_tokenizer, policies_of, task_gates


POLICIES = policies_of("tokens")
GENERATOR = torch.Generator().manual_seed(7)
TEXTS = [
    {**text, "token_mask": (torch.rand(len(text["input_ids"]), generator=GENERATOR) < 0.5).long().tolist()}
    for text in encoded_texts(20, seed=6, longest=40)
]
LENGTHS = [len(text["input_ids"]) for text in TEXTS]
NOTHING = {"input_ids": [5, 6, 7], "token_mask": [0, 0, 0]}


@cache
def model_of():
    return TASK_MODELS["tokens"](gates=task_gates("tokens"))


@cache
def record_of():
    return record_exits(model_of(), TEXTS, batch_size=6, progress=False)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_forward_predict_and_replay_say_the_same(policy, side):
    model, batch = model_of(), padded(TEXTS, side=side)
    mask = torch.zeros_like(batch["attention_mask"])
    mask[batch["attention_mask"].bool()] = torch.tensor([one for text in TEXTS for one in text["token_mask"]])
    exit_policy = ExitPolicy.of(model.config, policy)
    early = 0
    for speed in (0.0, 0.35, 0.62, 0.87, 1.0):
        answers = list(model.predict(TEXTS, speed=speed, exit_policy=policy))
        for formation in ({"batch_size": 1}, {"batch_tokens": 50}, {"rebatch": False}):
            others = model.predict(TEXTS, speed=speed, exit_policy=policy, **formation)
            assert [other.exit_layer for other in others] == [answer.exit_layer for answer in answers]
        output = model(**batch, token_mask=mask, speed=speed, exit_policy=policy)
        assert output.exit_layer.tolist() == [answer.exit_layer for answer in answers]
        thresholds = exit_thresholds(torch.full((len(TEXTS),), speed), NUM_LAYERS)
        replayed = replay(record_of(), thresholds, exit_policy)
        assert replayed.exit_layer.tolist() == output.exit_layer.tolist()
        for place, answer in enumerate(answers):
            assert_close(output.logits[place][batch["attention_mask"][place].bool()], answer.logits)
            wanted = torch.tensor(TEXTS[place]["token_mask"]).bool()
            assert_close(replayed.logits[place, : LENGTHS[place]][wanted], answer.logits[wanted])
            assert replayed.uncertainty[place].item() == pytest.approx(answer.uncertainty, abs=1e-5)
        early += sum(answer.exit_layer < NUM_LAYERS for answer in answers)
    assert early > 0


def test_at_speed_0_all_tokens_are_labelled_as_without_a_mask():
    without = model_of().predict([{"input_ids": text["input_ids"]} for text in TEXTS])
    for answer, other in zip(model_of().predict(TEXTS), without, strict=True):
        assert_close(answer.logits, other.logits)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("mean_entropy", "window_entropy")])
def test_with_fewer_tokens_no_text_is_less_sure(policy):
    model = model_of()
    everything = record_exits(model, [{"input_ids": text["input_ids"]} for text in TEXTS], progress=False)
    exit_policy = ExitPolicy.of(model.config, policy)
    of_all, of_some = (exit_uncertainties(record, exit_policy) for record in (everything, record_of()))
    if policy != "learned":  # whose weights may be of any sign
        assert (of_some <= of_all + 1e-6).all()
    assert (of_some - of_all).abs().max() > 1e-3


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "learned"])
def test_a_text_of_which_nothing_is_wanted_leaves_as_soon_as_it_may(policy):
    (answer,) = model_of().predict([NOTHING], speed=0.01, exit_policy=policy)
    assert answer.exit_layer == 1 and answer.uncertainty == 0
    assert answer.logits.isfinite().all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, 0], r"the inputs of text 0 differ in length"),
        ([0.5, 1.0, 1.0], r"token_mask of text 0 must be whole numbers"),
        ("101", r"token_mask of text 0 must be a list of whole numbers"),
        ([1, 7, -3], r"token_mask of text 0 must be .*0.*1"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        list(model_of().predict([{"input_ids": [5, 6, 7], "token_mask": mask}]))


def test_a_mask_of_another_shape_is_refused_by_forward():
    batch = padded(TEXTS)
    with pytest.raises(ValueError, match=r"token_mask"):
        model_of()(**batch, token_mask=torch.ones(len(TEXTS), 3, dtype=torch.long))


def test_labels_say_which_tokens_are_wanted_where_there_is_no_mask():
    rows = [
        {"input_ids": text["input_ids"], "labels": [1 if one else -100 for one in text["token_mask"]]}
        for text in TEXTS
    ]
    record = record_exits(model_of(), rows, progress=False)
    policy = ExitPolicy.of(model_of().config)
    assert_close(exit_uncertainties(record, policy), exit_uncertainties(record_of(), policy))


@pytest.mark.parametrize("task", ["single_label", "several_labels", "one_number"])
def test_models_of_whole_texts_do_not_read_a_mask(task):
    model = TASK_MODELS[task]()
    without = list(model.predict([{"input_ids": text["input_ids"]} for text in TEXTS], speed=0.7))
    for answer, other in zip(model.predict(TEXTS, speed=0.7), without, strict=True):
        assert answer.exit_layer == other.exit_layer
        assert_close(answer.logits, other.logits)


@pytest.mark.parametrize("as_words", [False, True])
def test_a_record_of_texts_says_what_the_pipeline_answers(as_words):
    model, tokenizer, texts = model_of(), pieces_tokenizer(40), made_up_texts(12, 15)
    tagger = pipeline("fast-token-classification", model=model, tokenizer=tokenizer, return_exit_layers=True)
    rows = [{"tokens": text.split()} for text in texts] if as_words else texts
    record = record_exits(model, rows, tokenizer=tokenizer, progress=False)
    asked = {"is_split_into_words": True} if as_words else {}
    for speed in (0.2, 0.5, 0.8):
        answers = tagger([row["tokens"] for row in rows] if as_words else rows, speed=speed, **asked)
        expected = replay_at_speed(record, model.config, speed).exit_layer.tolist()
        assert [answer["exit_layer"] for answer in answers] == expected
