"""`calibrate(..., linear=True)`: a speed that is linear in what it costs."""

from __future__ import annotations

import pytest
import torch
from transformers import pipeline

from fastbert_hf import calibrate, choose_speed
from fastbert_hf.evaluation import record_exits, replay_at_speed, sweep_speeds
from fastbert_hf.modeling.dials import speed_of_threshold, thresholds_of_speeds

from ..common import NUM_LAYERS, tiny_model, tiny_texts, tiny_tokenizer
from .common import made_up_record


def encoded(number: int = 24) -> list[dict]:
    return [dict(tiny_tokenizer()(text)) for text in tiny_texts(number)]


@pytest.fixture(scope="module")
def linear():
    model, record = tiny_model(), made_up_record()
    calibrate(model, record, linear=True)
    return model, record


def test_half_of_the_speed_saves_half_of_what_can_be_saved(linear):
    model, record = linear
    full, least = (replay_at_speed(record, model.config, speed).flops.sum().item() for speed in (0.0, 1.0))
    for speed in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
        cost = replay_at_speed(record, model.config, speed).flops.sum().item()
        assert cost / full == pytest.approx(1 - speed * (1 - least / full), rel=0.02), speed
    table = sweep_speeds(model, record, [0.0, 0.25, 0.5, 1.0])
    costs = table["executed_flops"].tolist()
    assert costs[0] - costs[1] == pytest.approx((costs[0] - costs[-1]) / 4, rel=0.1)


def test_a_model_answers_as_its_replay_says():
    model = tiny_model()
    rows = encoded(200)
    record = record_exits(model, rows, progress=False)
    calibrate(model, record, linear=True)
    for speed in (0.0, 0.2, 0.5, 1.0):
        layers = [answer.exit_layer for answer in model.predict(rows, speed=speed)]
        assert layers == replay_at_speed(record, model.config, speed).exit_layer.tolist()
        assert layers == [answer.exit_layer for answer in model.predict(rows, speed=iter([speed] * 200))]
    speeds = [number / 200 for number in range(200)]
    layers = [answer.exit_layer for answer in model.predict(rows, speed=speeds)]
    assert layers == replay_at_speed(record, model.config, speeds).exit_layer.tolist()
    classifier = pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer())
    expected = [answer.exit_layer for answer in model.predict(encoded(12), speed=model.config.speed)]
    assert [answer["exit_layer"] for answer in classifier(tiny_texts(12))] == expected


def test_thresholds_and_speeds_are_inverse(linear):
    model, _ = linear
    known = model.config.calibration["speeds"]
    for threshold in known[1:]:
        speed = speed_of_threshold(model.config, threshold)
        assert thresholds_of_speeds(model.config, torch.tensor([speed])).item() == pytest.approx(threshold)
    plain = tiny_model()
    assert speed_of_threshold(plain.config, 0.3) == 0.3
    assert thresholds_of_speeds(plain.config, torch.tensor([0.3])).tolist() == torch.tensor([0.3]).tolist()


def test_a_chosen_speed_is_a_linear_one():
    model, record = tiny_model(), made_up_record()
    plain = choose_speed(model, record, max_loss=2.0)
    calibrate(model, record, linear=True)
    chosen = choose_speed(model, record, max_loss=2.0)
    assert model.config.speed == chosen.speed != plain.speed
    assert chosen.executed_speed_up == pytest.approx(plain.executed_speed_up, rel=0.02)
    assert chosen.executed_speed_up == pytest.approx(
        1 / (1 - chosen.speed * (1 - 1 / model.config.calibration["speed_ups"][-1])), rel=0.02
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_chosen_linear_speed_loses_no_more_than_it_may(seed):
    model, record = tiny_model(), made_up_record(600, seed=seed)
    calibrate(model, record, linear=True)
    for max_loss in (0.1, 0.3, 1.0, 3.0):
        assert choose_speed(model, record, max_loss=max_loss).loss <= max_loss + 1e-9


def test_another_policy_has_thresholds_and_what_is_told_can_be_asked_for():
    model, record = tiny_model(), made_up_record()
    told = calibrate(model, record, linear=True)
    for speedup, speed in told.speeds.items():
        spent = [replay_at_speed(record, model.config, own).flops.sum().item() for own in (0.0, speed)]
        assert spent[0] / spent[1] == pytest.approx(speedup, rel=0.02)
    plain = tiny_model(exit_policy="margin")
    tables = [sweep_speeds(own, record, [0.0, 0.3, 0.8], ["margin"]) for own in (model, plain)]
    assert tables[0]["executed_flops"].tolist() == tables[1]["executed_flops"].tolist()
    certificate = model.certify(made_up_record(seed=1), max_disagreement=0.05)
    assert 0 < certificate.speed < 1 and list(model.predict(encoded(4), speed=certificate.speed))


def test_a_linear_speed_is_of_the_use_that_was_calibrated(linear):
    model, _ = linear
    rows = encoded(4)
    with pytest.raises(ValueError, match="speed was calibrated with exit_policy='entropy', and this call has"):
        model.predict(rows, speed=0.5, exit_policy="margin")
    assert [answer.exit_layer for answer in model.predict(rows, speed=0, exit_policy="margin")] == [NUM_LAYERS] * 4
    with pytest.raises(ValueError, match="speed must be a number in"):
        model.predict(rows, speed=1.5)
    assert list(model.predict(rows, speedup=1.5))
    calibrate(model, made_up_record(), linear=False)
    assert list(model.predict(rows, speed=0.5, exit_policy="margin"))
