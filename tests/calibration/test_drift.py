"""`drift`: texts like those of the certificate raise no alarm, and others do."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
from transformers import pipeline

from fastbert_hf import CascadeForSequenceClassification, calibrate
from fastbert_hf.calibration import certify, drift_of_answers
from fastbert_hf.calibration.drift import expected_answers
from fastbert_hf.evaluation import ExitRecord, record_exits, replay_at_speed
from fastbert_hf.modeling.dial_checks import GRID
from fastbert_hf.modeling.dials import speed_for
from fastbert_hf.modeling.modeling_outputs import Prediction
from fastbert_hf.modeling.served_answers import ServedAnswers

from ..common import stock, tiny_model, tiny_texts, tiny_tokenizer
from .common import made_up_record


def answers_to(record: ExitRecord, config, speed: float) -> list[Prediction]:
    found = replay_at_speed(record, config, speed)
    columns = (found.exit_layer.tolist(), found.uncertainty.tolist(), found.exit_member.tolist())
    return [Prediction(None, *row) for row in zip(*columns, strict=True)]


@pytest.fixture(scope="module")
def certified():
    model = tiny_model()
    certify(model, made_up_record(1000), max_disagreement=0.1)
    return model


@pytest.mark.parametrize("make", ["single", "cascade"])
@pytest.mark.parametrize("speed", [GRID[100], GRID[140], 1.0])
def test_what_is_expected_is_what_the_certificates_texts_were_answered(certified, make, speed):
    model, record = certified, made_up_record(1000)
    if make == "cascade":
        members = [stock(num_layers=1), tiny_model(min_exit_layer=2)]
        model = CascadeForSequenceClassification.from_members(members, [tiny_tokenizer()] * 2)
        rows = [dict(tiny_tokenizer()(text)) for text in tiny_texts(300)]
        record = record_exits(model, rows, progress=False)
        certify(model, record, max_disagreement=0.9)
    answers = answers_to(record, model.config, speed)
    expected = Counter()
    for place, number in expected_answers(model.config, speed).items():
        expected[place[:2]] += number
    kept = answers[::2] if len(answers) > 500 else answers  # so many are known of it
    assert Counter((answer.exit_member, answer.exit_layer) for answer in kept) == expected
    report = drift_of_answers(answers, model.config, speed)
    assert not report.has_drifted and report.look == 1
    assert report.exit_layer == pytest.approx(report.expected_exit_layer, rel=0.05)


def test_texts_alike_raise_no_alarm_too_often_and_others_do(certified):
    alarms, level, tries = 0, 0.2, 150
    for seed in range(tries):
        fresh = made_up_record(600, seed=seed + 1)
        alarms += drift_of_answers(answers_to(fresh, certified.config, 0.3), certified.config, 0.3, level).has_drifted
    assert alarms / tries <= level + 3 * (level * (1 - level) / tries) ** 0.5
    for noise in (0.6, 1.6):
        others = made_up_record(600, seed=7, noise=noise)
        report = drift_of_answers(answers_to(others, certified.config, 0.3), certified.config, 0.3)
        assert report.has_drifted and report.p_value < 1e-3
        assert (report.exit_layer < report.expected_exit_layer) == (noise > 1)  # exits that know less are surer


def test_each_look_costs_a_part_of_the_level(certified):
    answers = answers_to(made_up_record(600, seed=11, noise=1.3), certified.config, 0.3)
    first, third = (drift_of_answers(answers, certified.config, 0.3, look=look) for look in (1, 3))
    assert 0 < first.p_value < third.p_value == pytest.approx(min(1.0, 6 * first.p_value))


def test_a_pipeline_counts_what_it_answers():
    model, texts = tiny_model(), tiny_texts(400)
    calibrate(model, texts, tiny_tokenizer(), progress=False)
    classifier = pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer())
    empty = classifier.drift()
    assert (empty.answers, empty.p_value, empty.has_drifted) == (0, 1.0, False)
    speed = 0.9
    classifier(texts, speed=speed)
    classifier([], speed=speed)
    for text in texts[:5]:
        classifier(text, speed=speed)
    same = classifier.drift()
    assert (same.answers, same.look, same.has_drifted) == (405, 2, False)
    assert same.exit_layer == pytest.approx(same.expected_exit_layer, rel=0.1)
    # Not those at full depth, of one speed each, by another policy, or that have no answer.
    classifier(texts, speed=0)
    classifier(texts, speed=[speed] * 400)
    classifier(texts, speed=speed, exit_policy="margin")
    classifier(texts, speed=speed, max_layers=3)
    classifier([texts[0], 3], speed=speed, on_error="return")
    assert classifier.drift().answers == 406
    classifier([texts[0]] * 400, speed=speed)  # one text again and again
    assert classifier.drift(forget=True).has_drifted
    assert classifier.drift().look == 1
    assert pickle.loads(pickle.dumps(classifier.served)).looks == 1


def test_without_a_certificate_there_is_nothing_to_compare_with():
    classifier = pipeline("fast-text-classification", model=tiny_model(), tokenizer=tiny_tokenizer())
    classifier(tiny_texts(4), speed=0.5)
    with pytest.raises(ValueError, match="drift compares with the texts of a certificate, which this model has not"):
        classifier.drift()


@pytest.mark.parametrize("policy", ["entropy", "learned", "patience"])
def test_texts_alike_raise_no_alarm_at_any_speed(policy):
    """Also where uncertainties are far below, or of few values."""
    model, record = tiny_model(patience=2), made_up_record(2000)
    record = ExitRecord(5 * record.exit_logits, record.layer_flops, record.exit_flops)
    calibrate(model, record, exit_policy=policy)
    fresh = made_up_record(2000, seed=5)
    fresh = ExitRecord(5 * fresh.exit_logits, fresh.layer_flops, fresh.exit_flops)
    calibration = model.config.calibration
    wanted = [own for own in (1.1, 1.3, 1.5) if own <= calibration["speed_ups"][-1]]
    speeds = [0.5, *(speed_for(calibration, own) for own in wanted)]
    for speed in speeds:
        if speed > 0:
            report = drift_of_answers(answers_to(fresh, model.config, speed), model.config, speed, level=1e-4)
            assert not report.has_drifted, (policy, speed, report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 0}, "level must be a probability"),
        ({"level": 5}, "level must be a probability"),
        ({"level": float("nan")}, "level must be a probability"),
        ({"level": "a"}, "level must be a probability"),
        ({"look": 0}, "look a whole number"),
        ({"speed": 0}, "speed must be above 0"),
        ({"speed": 2}, "speed must be a number in"),
    ],
)
def test_wrong_looks_are_refused(certified, arguments, message):
    with pytest.raises(ValueError, match=message):
        drift_of_answers([], certified.config, **{"speed": 0.3, **arguments})


def test_a_speed_for_every_call_fills_no_memory_and_a_new_certificate_begins_anew():
    served, answer = ServedAnswers(), Prediction(None, 1, 0.1, 1)
    for number in range(1, 1001):
        served.add(number / 1000, [answer] * 60, "a")
    assert len(served.counts) == 64
    served.add(0.5, [answer], "b")
    assert list(served.counts.values()) == [1]
