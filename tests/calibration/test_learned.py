"""`calibrate(..., exit_policy="learned")`: gates that tell how likely an answer differs."""

from __future__ import annotations

import pytest
import torch

from fastbert_hf import (
    CascadeForSequenceClassification,
    FastBertConfig,
    FastBertForSequenceClassification,
    SelfDistillationArguments,
    SelfDistillationTrainer,
    calibrate,
)
from fastbert_hf.evaluation import ExitRecord, exit_uncertainties, record_exits, replay_at_speed
from fastbert_hf.modeling.dials import speed_for
from fastbert_hf.modeling.exit_policies import ExitPolicy

from ..common import (
    NUM_LAYERS,
    stock,
    tiny_model,
    tiny_rows,
    tiny_text_config,
    tiny_texts,
    tiny_tokenizer,
    training_settings,
)
from .common import made_up_record


def test_a_gate_estimates_how_many_answers_differ():
    model = tiny_model()
    calibrate(model, made_up_record(4000), exit_policy="learned")
    others = made_up_record(4000, seed=1)
    uncertainties = exit_uncertainties(others, ExitPolicy.of(model.config))
    differs = others.exit_logits.argmax(-1) != others.exit_logits[:, -1:].argmax(-1)
    for column in range(NUM_LAYERS - 1):
        order = uncertainties[:, column].argsort()
        for group in order.split(800):  # a fifth of the texts each
            estimated, found = (part[group, column].float().mean().item() for part in (uncertainties, differs))
            assert estimated == pytest.approx(found, abs=0.08)  # 0.02 is chance alone
    assert not uncertainties[:, -1].any()  # the full model is itself


def test_answers_below_a_threshold_differ_less_than_it_says():
    model = tiny_model()
    calibrate(model, made_up_record(4000), exit_policy="learned")
    others = made_up_record(4000, seed=1)
    full = replay_at_speed(others, model.config, 0.0).logits.argmax(-1)
    for speed in (0.02, 0.05, 0.2):
        found = replay_at_speed(others, model.config, speed)
        early = found.exit_layer < NUM_LAYERS
        differs = (found.logits.argmax(-1) != full)[early].float().mean().item()
        assert early.any() and differs < speed
        assert found.uncertainty[early].mean().item() == pytest.approx(differs, abs=0.02)


def test_gates_agree_more_where_exits_are_unlike():
    """The second exit is as sure as the others, and knows nothing; only what was fitted can tell."""
    model, record, others = tiny_model(), made_up_record(3000), made_up_record(3000, seed=1)
    for part in (record, others):
        part.exit_logits[:, 1] = 5 * torch.randn(3000, 3, generator=torch.Generator().manual_seed(2))
    found = calibrate(model, record)
    assert model.config.exit_policy == "entropy" and model.config.gates is None
    assert found.best_policy == "learned"
    assert set(found.agreements) == {"entropy", "confidence", "margin", "patience", "learned"}
    speed_up, agreement = 1.5, {}
    for policy in ("entropy", "learned"):
        calibrate(model, record, exit_policy=policy)
        answers = replay_at_speed(others, model.config, speed_for(model.config.calibration, speed_up)).logits
        agreement[policy] = (answers.argmax(-1) == others.exit_logits[:, -1].argmax(-1)).float().mean().item()
        assert agreement[policy] == pytest.approx(found.agreements[policy][speed_up], abs=0.03)
    assert agreement["learned"] > agreement["entropy"] + 0.02


def test_it_is_deterministic_and_written_at_once():
    models = [tiny_model(), tiny_model()]
    for model in models:
        calibrate(model, made_up_record(600), exit_policy="learned")
    assert models[0].config.gates == models[1].config.gates
    assert models[0].config.calibration == models[1].config.calibration
    assert models[0].config.certification == models[1].config.certification
    untouched = tiny_model()
    with pytest.raises(ValueError, match="'vote' is not known for this model; choose one of entropy"):
        calibrate(untouched, made_up_record(600), exit_policy="vote")
    with pytest.raises(ValueError, match="at least 100 are needed"):
        calibrate(untouched, made_up_record(99), exit_policy="learned")
    assert untouched.config.exit_policy == "entropy" and untouched.config.gates is None


def test_other_gates_than_those_of_the_calibration_are_refused():
    model = tiny_model()
    calibrate(model, made_up_record(600), exit_policy="learned")
    rows = [dict(tiny_tokenizer()(text)) for text in tiny_texts(4)]
    assert list(model.predict(rows, speedup=1.1))
    model.config.gates = [[2 * weight for weight in gate] for gate in model.config.gates]
    with pytest.raises(ValueError, match="speedup was calibrated with gates="):
        model.predict(rows, speedup=1.1)


def test_exits_that_never_or_always_differ_have_gates():
    model, record = tiny_model(), made_up_record(400)
    record.exit_logits[:, 0] = record.exit_logits[:, -1]
    record.exit_logits[:, 1] = record.exit_logits[:, -1].roll(1, -1)
    calibrate(model, record, exit_policy="learned")
    uncertainties = exit_uncertainties(record, ExitPolicy.of(model.config))
    assert (uncertainties[:, 0] < 0.03).all() and (uncertainties[:, 1] > 0.95).all()


def test_a_cascade_learns_gates_for_all_of_its_exits():
    members = [stock(num_layers=1, seed=3), tiny_model(seed=2)]
    cascade = CascadeForSequenceClassification.from_members(members, [tiny_tokenizer()] * 2)
    rows = [dict(tiny_tokenizer()(text)) for text in tiny_texts(300)]
    record = record_exits(cascade, rows, progress=False)
    found = calibrate(cascade, record, exit_policy="learned")
    assert len(cascade.config.gates) == 1 + NUM_LAYERS and "patience" not in found.agreements
    speeds = [number / 300 for number in range(300)]
    replayed = replay_at_speed(record, cascade.config, speeds)
    answers = list(cascade.predict(rows, speed=speeds))
    assert replayed.exit_layer.tolist() == [answer.exit_layer for answer in answers]


def test_models_of_one_layer_and_of_sure_exits_have_gates():
    model = tiny_model()
    one = FastBertForSequenceClassification(
        FastBertConfig(text_config=tiny_text_config("bert", num_layers=1), num_labels=3)
    ).eval()
    calibrate(one, made_up_record(200, num_exits=1), exit_policy="learned")
    assert one.config.gates == [[0.0, 0.0, 0.0, 0.0, -1000.0]]
    record = made_up_record(1000, noise=0.02)
    sure = ExitRecord(30 * record.exit_logits, record.layer_flops, record.exit_flops, record.labels)
    calibrate(model, sure, exit_policy="learned")
    assert max(abs(weight) for gate in model.config.gates[:-1] for weight in gate) < 1e4


def test_a_training_forgets_the_gates(tmp_path):
    model = tiny_model()
    calibrate(model, made_up_record(400), exit_policy="learned")
    arguments = SelfDistillationArguments(**training_settings(tmp_path, max_steps=1))
    SelfDistillationTrainer(model, arguments, train_dataset=tiny_rows(8)).train()
    assert model.config.gates is None and model.config.exit_policy == "entropy"
    assert model.config.calibration is None and model.config.certification is None


def test_a_call_without_a_speed_costs_as_much_as_before():
    model, record = tiny_model(speed=0.4), made_up_record()
    costs = []
    for arguments in ({}, {"exit_policy": "learned"}, {"exit_policy": "margin", "linear": True}, {"linear": False}):
        calibrate(model, record, **arguments)
        costs.append(replay_at_speed(record, model.config, model.config.speed).flops.sum().item())
    assert costs == pytest.approx([costs[0]] * 4, rel=0.02)
    assert model.config.speed != 0.4 and model.config.exit_policy == "margin"
