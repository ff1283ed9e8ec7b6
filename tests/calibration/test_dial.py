"""`speedup=`: the curve that calibration writes, how a call reads it, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, pipeline

from fastbert_hf import (
    CascadeForSequenceClassification,
    FastBertConfig,
    FastBertForSequenceClassification,
    SelfDistillationArguments,
    SelfDistillationTrainer,
    calibrate,
)
from fastbert_hf.evaluation import ExitRecord, record_exits, replay_at_speed
from fastbert_hf.modeling.dials import greatest_speedup, speed_for

from ..common import (
    spread_out,
    stock,
    tiny_model,
    tiny_rows,
    tiny_text_config,
    tiny_texts,
    tiny_tokenizer,
    training_settings,
)


def rows_of(number: int = 160) -> list[dict[str, list[int]]]:
    rows = tiny_rows(number, labels=False)
    return [{"input_ids": row["input_ids"][row["attention_mask"].bool()].tolist()} for row in rows]


def small_model() -> FastBertForSequenceClassification:
    """Return a model of two layers."""
    config = FastBertConfig(text_config=tiny_text_config("bert", num_layers=2), num_labels=3)
    return spread_out(FastBertForSequenceClassification(config))


@pytest.fixture(scope="module")
def calibrated():
    """A model, the record of its texts, and what calibration told of them."""
    model = tiny_model()
    record = record_exits(model, rows_of(), progress=False)
    return model, record, calibrate(model, record)


def cost(record: ExitRecord, model, speed, unit: str = "flops") -> float:
    replayed = replay_at_speed(record, model.config, speed)
    return (replayed.flops if unit == "flops" else replayed.exit_layer).double().mean().item()


@pytest.mark.parametrize("exit_policy", ["entropy", "confidence", "margin"])
@pytest.mark.parametrize("unit", ["flops", "layers"])
def test_what_is_asked_for_is_what_the_texts_cost(unit, exit_policy):
    model = tiny_model(exit_policy=exit_policy)
    record = record_exits(model, rows_of(400), progress=False)
    told = calibrate(model, record, unit=unit)
    full = cost(record, model, 0.0, unit)
    reachable = full / cost(record, model, 1.0, unit)
    assert told.greatest == pytest.approx(reachable, rel=1e-5) and (told.rows, told.unit) == (400, unit)
    for wanted in (1.0, 1.05, 1.2, 1.4, math.floor(100 * reachable) / 100):
        speed = speed_for(model.config.calibration, wanted)
        assert full / cost(record, model, speed, unit) == pytest.approx(wanted, rel=0.02), wanted
    assert speed_for(model.config.calibration, 1) == 0.0


def test_a_call_answers_as_at_the_speed_of_the_curve(calibrated):
    model, _, _ = calibrated
    rows, speed = rows_of(24), speed_for(model.config.calibration, 1.4)
    expected = list(model.predict(rows, speed=speed))
    assert len({answer.exit_layer for answer in expected}) > 1
    many = [[1.4] * 24, torch.full((24,), 1.4, dtype=torch.float64), (1.4 for _ in range(24))]
    for speedup in (1.4, *many):
        answers = list(model.predict(rows, speedup=speedup))
        assert [answer.exit_layer for answer in answers] == [answer.exit_layer for answer in expected]
    ids = torch.tensor([row["input_ids"] for row in rows if len(row["input_ids"]) == len(rows[0]["input_ids"])])
    for speedup in (1.4, [1.4] * len(ids), torch.full((len(ids),), 1.4)):
        assert torch.equal(model(ids, speedup=speedup).exit_layer, model(ids, speed=speed).exit_layer)
    mixed = list(model.predict(rows, speedup=[1, 1.4] * 12))
    assert [answer.exit_layer for answer in mixed[::2]] == [4] * 12
    assert [answer.exit_layer for answer in mixed[1::2]] == [answer.exit_layer for answer in expected[1::2]]


def test_the_pipeline_takes_the_last_word(calibrated):
    model, _, _ = calibrated
    texts, tokenizer = tiny_texts(12), tiny_tokenizer()

    def layers(classifier, **call) -> list[int]:
        return [answer["exit_layer"] for answer in classifier(texts, **call)]

    speed = speed_for(model.config.calibration, 1.3)
    plain = pipeline("fast-text-classification", model=model, tokenizer=tokenizer)
    expected, at_defaults = layers(plain, speed=speed), layers(plain)
    assert layers(plain, speedup=1.3) == layers(plain, speedup=[1.3] * 12) == expected != at_defaults
    fixed = pipeline("fast-text-classification", model=model, tokenizer=tokenizer, speedup=1.3)
    assert layers(fixed) == expected and layers(fixed, speed=0) == [4] * 12 and layers(fixed) == expected
    fast = pipeline("fast-text-classification", model=model, tokenizer=tokenizer, speed=1.0)
    assert layers(fast, speedup=1.3) == expected != layers(fast)
    with pytest.raises(ValueError, match="give speed or speedup, not both"):
        plain(texts, speed=0.5, speedup=1.3)
    with pytest.raises(ValueError, match="got 2 speedups for 12 texts"):
        plain(texts, speedup=[1.3, 1.3])
    assert layers(plain, speedup=torch.tensor(1.3)) == layers(plain, speedup=np.array(1.3)) == expected
    for arguments, message in (
        ({"speedup": [1.3] * 12}, "is for a call"),
        ({"speed": 0.5, "speedup": 1.3}, "not both"),
        ({"speedup": 99}, "must be a number from 1 to"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline("fast-text-classification", model=model, tokenizer=tokenizer, **arguments)


def test_what_is_wrong_with_one_of_many_costs_no_other_answer(calibrated):
    model, _, _ = calibrated
    rows = rows_of(3)
    for speedup in ([1.3, 99, 1.0], iter([1.3, 99, 1.0])):
        answers = list(model.predict(rows, speedup=speedup, on_error="return"))
        assert [answer.error is None for answer in answers] == [True, False, True]
        assert "text 1: speedup must be a number from 1 to" in str(answers[1].error)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="speedup must be one number, or a list with one for each row"):
        model(ids, speedup=iter([1.3]))
    with pytest.raises(ValueError, match="speedup must be a number from 1 to"):
        model(ids, speedup=[99])


def test_what_is_advertised_may_be_asked_for(calibrated):
    model, _, told = calibrated
    rows = rows_of(8)
    for speedup in (told.greatest, torch.full((8,), told.greatest), greatest_speedup(model.config.calibration)):
        assert len(list(model.predict(rows, speedup=speedup))) == 8


def test_it_is_saved_and_travels(calibrated, tmp_path):
    model, _, _ = calibrated
    model.save_pretrained(tmp_path)
    again = FastBertForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.calibration == model.config.calibration
    rows = rows_of(24)
    layers = [[a.exit_layer for a in of.predict(rows, speedup=1.4)] for of in (model, again)]
    assert layers[0] == layers[1]
    half = FastBertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert len(list(half.predict(rows, speedup=1.4))) == 24  # rounded, not trained


def test_texts_without_labels_do():
    model = tiny_model()
    told = calibrate(model, tiny_texts(120), tiny_tokenizer(), progress=False)
    assert told.rows == 120 and told.speeds.keys() <= {1.5, 2.0, 3.0, 4.0}
    assert all(speed_for(model.config.calibration, speedup) == speed for speedup, speed in told.speeds.items())


def test_a_cascade_has_a_dial_too():
    cascade = CascadeForSequenceClassification.from_members([small_model(), tiny_model()])
    rows = rows_of(200)
    record = record_exits(cascade, rows, progress=False)
    told = calibrate(cascade, record)
    wanted = math.floor(100 * told.greatest) / 100
    speed = speed_for(cascade.config.calibration, wanted)
    expected = [answer.exit_layer for answer in cascade.predict(rows, speed=speed)]
    assert [answer.exit_layer for answer in cascade.predict(rows, speedup=wanted)] == expected
    assert cost(record, cascade, 0.0) / cost(record, cascade, speed) == pytest.approx(wanted, rel=0.02)


def test_a_call_that_asks_for_something_else_is_refused(calibrated):
    model, _, _ = calibrated
    rows = rows_of(4)
    for call, message in (
        ({"exit_policy": "margin"}, "calibrated with exit_policy='entropy', and this call has exit_policy='margin'"),
        ({"min_exit_layer": 2}, r"calibrated with exits=\[\[1, 4\]\], and this call has exits=\[\[2, 4\]\]"),
        ({"max_layers": 3}, r"this call has exits=\[\[1, 3\]\] \(first and last, by min_exit_layer and max_layers\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(rows, speedup=1.3, **call)
    same = {"exit_policy": "entropy", "min_exit_layer": 1, "max_layers": 4, "retention": 1.0}
    assert list(model.predict(rows, speedup=1.3, **same))
    for speedup in (0.9, 1000, math.nan, "fast", True, None, [1.3, 0.5, 1.3, 1.3]):
        if speedup is not None:
            with pytest.raises(ValueError, match=r"speedup must be a number from 1 to 1\.\d+, which this model"):
                list(model.predict(rows, speedup=speedup))
    shortened = tiny_model(coarsening={"layers": [2], "retention": [0.5]})
    calibrate(shortened, rows_of(), progress=False)
    with pytest.raises(ValueError, match=r"retention=0\.7 changes what speedup means"):
        shortened.predict(rows, speedup=1.0, retention=0.7)
    with pytest.raises(ValueError, match=r"speedup=2\.0 needs a model that knows its speeds"):
        tiny_model().predict(rows, speedup=2.0)
    with pytest.raises(ValueError, match="needs a model that knows its speeds"):
        pipeline("fast-text-classification", model=tiny_model(), tokenizer=tiny_tokenizer(), speedup=2.0)


def test_a_config_whose_texts_cost_something_else_is_refused(calibrated, tmp_path):
    model, _, _ = calibrated
    model.save_pretrained(tmp_path)
    coarsening = {"layers": [1], "retention": [0.2]}
    shorter = FastBertForSequenceClassification.from_pretrained(tmp_path, coarsening=coarsening)
    with pytest.raises(ValueError, match="calibrated with coarsening"):
        shorter.predict(rows_of(4), speedup=1.2)
    cascade = CascadeForSequenceClassification.from_members([small_model(), tiny_model()])
    calibrate(cascade, rows_of(), progress=False)
    cascade.config.members[0].min_exit_layer = 2
    with pytest.raises(ValueError, match=r"calibrated with exits=\[\[1, 2\], \[1, 4\]\]"):
        cascade.predict(rows_of(4), speedup=1.1)


def test_a_config_with_limits_is_asked_with_them():
    model = tiny_model(max_layers=3)
    calibrate(model, rows_of(), unit="layers", progress=False)
    with pytest.raises(ValueError, match=r"calibrated with exits=\[\[1, 3\]\], and this call has exits=\[\[1, 4\]\]"):
        model.predict(rows_of(4), speedup=1.1)
    assert list(model.predict(rows_of(4), speedup=1.1, max_layers=3))
    classifier = pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer())
    assert classifier(tiny_texts(4), speedup=1.1)


def test_training_takes_the_calibration_out(tmp_path):
    model = tiny_model()
    calibrate(model, rows_of(), progress=False)
    arguments = SelfDistillationArguments(**training_settings(tmp_path, max_steps=1))
    SelfDistillationTrainer(model, arguments, train_dataset=tiny_rows(8)).train()
    assert model.config.calibration is None


def test_adapters_and_a_cascade_that_learns_are_refused():
    model = tiny_model()
    calibrate(model, rows_of(), progress=False)
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=model.exit_names()))
    assert list(model.predict(rows_of(4), speedup=1.2))  # they change nothing yet
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data += 0.1
    adapted.train().eval()  # as a training does
    with pytest.raises(ValueError, match="weights of this model have changed"):
        model.predict(rows_of(4), speedup=1.2)
    cascade = CascadeForSequenceClassification.from_members([small_model(), tiny_model()])
    calibrate(cascade, rows_of(), progress=False)
    ids = torch.tensor([[5, 6, 7]])
    assert cascade(ids, speedup=1.1)
    cascade(ids, labels=torch.tensor([0])).loss.backward()
    cascade.members[0].exits[0].out_proj.weight.data += 1.0
    with pytest.raises(ValueError, match="weights of this model have changed"):
        cascade(ids, speedup=1.1)


def test_other_weights_are_refused():
    model = tiny_model()
    calibrate(model, rows_of(), progress=False)
    model.train()
    model.exits[0].out_proj.weight.data += 1.0
    model.eval()
    with pytest.raises(ValueError, match="weights of this model have changed since it was calibrated"):
        model.predict(rows_of(4), speedup=1.2)
    assert list(model.predict(rows_of(4), speed=0.5))


def test_too_few_texts_and_other_records_are_refused(calibrated):
    model, record, _ = calibrated
    before = model.config.calibration
    with pytest.raises(ValueError, match="there are 99 texts, and at least 100 are needed"):
        calibrate(model, rows_of(99), progress=False)
    with pytest.raises(ValueError, match="the record was made with other weights than those of this model"):
        calibrate(small_model(), record)
    with pytest.raises(ValueError, match="the record has no FLOPs"):
        calibrate(model, ExitRecord(record.exit_logits))
    with pytest.raises(ValueError, match="unit must be one of flops, layers"):
        calibrate(model, record, unit="seconds")
    broken = ExitRecord(record.exit_logits.clone(), record.layer_flops, record.exit_flops)
    broken.exit_logits[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"the logits of rows \[3\] are not finite"):
        calibrate(model, broken)
    with pytest.raises(TypeError, match="model must be one with exits, got BertForSequenceClassification"):
        calibrate(stock(), rows_of())
    assert model.config.calibration is before


def test_a_cascade_with_tokenizers_of_its_own_is_calibrated_on_their_tokens():
    cascade = CascadeForSequenceClassification.from_members(
        [small_model(), tiny_model()], tokenizers=[tiny_tokenizer(), tiny_tokenizer()]
    )
    cascade.config.own_tokenizers = True
    assert calibrate(cascade, [rows_of(), rows_of()], progress=False).rows == 160


HOSTILE = (
    {},
    {"unit": "hours"},
    {"rows": -1},
    {"speeds": [0.0, math.nan]},
    {"speeds": [0.5, 0.1]},
    {"speeds": [0.0, 2.0]},
    {"speeds": [0.0] * 5000, "speed_ups": [1.0] * 5000},
    {"speed_ups": [1.0]},
    {"speed_ups": [1.0, math.inf]},
    {"asked": "everything"},
    {"weights": "abc"},
    {"weights": ["abc"]},
    {"weights": [None, None]},
)


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_a_config_that_calibration_did_not_write_is_refused(change, tmp_path):
    model = tiny_model()
    calibrate(model, rows_of(), progress=False)
    good = {**model.config.calibration, "speeds": [0.0, 1.0], "speed_ups": [1.0, 1.5]}
    model.config.calibration = {**good, **change} if change else change
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["calibration"] != good
    with pytest.raises(ValueError, match="calibration"):
        AutoConfig.from_pretrained(tmp_path)
