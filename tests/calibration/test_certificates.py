"""`certify` and `max_disagreement=`: what is promised, against MAPIE and by simulation, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from mapie.risk_control import control_fwer
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from peft import LoraConfig, get_peft_model
from scipy.stats import binom
from transformers import pipeline

from fastbert_hf import CascadeForSequenceClassification, FastBertForSequenceClassification, calibrate
from fastbert_hf.calibration import certify
from fastbert_hf.calibration.certificates import certification_of, read_certificate, upper_bounds
from fastbert_hf.evaluation import ExitRecord, record_exits, replay_at_speed
from fastbert_hf.modeling.dial_checks import CERTIFICATION, GRID, check_certification
from fastbert_hf.modeling.dials import certified_speed

from ..common import NUM_LAYERS, made_up_certification, stock, tiny_model, tiny_texts, tiny_tokenizer
from .common import made_up_record


def encoded(number: int = 24) -> list[dict]:
    return [dict(tiny_tokenizer()(text)) for text in tiny_texts(number)]


def errors_at(record: ExitRecord, config, speed: float, lost: bool = False) -> int:
    early, full = (replay_at_speed(record, config, at).logits.argmax(-1) for at in (speed, 0.0))
    differs = early != full
    return int((differs & (full == record.labels)).sum() if lost else differs.sum())


@pytest.fixture(scope="module")
def certified():
    """A model, the record of the certificate, and the certificate."""
    model, record = tiny_model(), made_up_record()
    return model, record, model.certify(record, max_disagreement=0.05)


@cache
def errors_by_speed(seed: int) -> dict[float, int]:
    """Of a made-up record, at every speed that a certificate may have."""
    model, record = tiny_model(), made_up_record(seed=seed)
    return {speed: errors_at(record, model.config, speed) for speed in GRID}


@pytest.mark.parametrize(("risk", "confidence"), [(0.01, 0.9), (0.02, 0.95), (0.05, 0.9), (0.1, 0.99), (0.003, 0.8)])
@pytest.mark.parametrize("seed", range(3))
def test_a_certificate_is_what_mapie_accepts(seed, risk, confidence):
    model, record = tiny_model(), made_up_record(seed=seed)
    rows = len(record.exit_logits)
    found = certification_of(model, model.config, record, "flops", confidence=confidence)
    errors = np.array([errors_by_speed(seed)[speed] for speed in found["speeds"]])
    assert errors.tolist() == found["errors"]
    # A little less, as MAPIE rounds the number of errors up again.
    p_values = compute_hoeffding_bentkus_p_value(np.maximum(errors - 1e-6, 0) / rows, rows, risk, binary=True)[:, 0]
    accepted = control_fwer(p_values, 1 - confidence, "fixed_sequence")
    certificate = read_certificate(model.config, found, risk, confidence)
    if len(accepted) == 0:
        assert certificate is None
    else:  # all of them hold together: the one that costs least
        points = [(found["speed_ups"][place], found["speeds"][place], errors[place]) for place in accepted]
        best = max((1.0, 0.0, 0), *points)
        assert (certificate.speed_up, certificate.speed, certificate.errors) == best


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.99])
def test_a_bound_is_not_above_a_share_exactly_where_the_binomial_tail_is_small_enough(confidence):
    rows = 700
    for errors in (0, 1, 5, 40, 699, 700):
        (bound,) = upper_bounds([errors], rows, confidence)
        for share in (0.001, 0.0033, 0.01, 0.05, 0.5, 0.999):
            if abs(share - bound) > 1e-6:
                assert (bound <= share) == (binom.cdf(errors, rows, share) <= 1 - confidence)
    assert upper_bounds([3, 0, 9], rows, confidence)[1] == upper_bounds([3], rows, confidence)[0]


def test_where_exits_cost_more_than_they_save_all_layers_answer():
    model, record = tiny_model(), made_up_record()
    costly = ExitRecord(record.exit_logits, record.layer_flops, 1000 * record.exit_flops)
    certificate = certify(model, costly, max_disagreement=0.02)
    assert (certificate.speed, certificate.speed_up, certificate.errors) == (0.0, 1.0, 0)
    answers = model.predict(encoded(), max_disagreement=0.02)
    assert [answer.exit_layer for answer in answers] == [NUM_LAYERS] * 24


def test_a_record_of_another_model_is_refused():
    record = made_up_record()
    other = ExitRecord(record.exit_logits[..., :2], record.layer_flops, record.exit_flops)
    for made_with in (certify, calibrate):
        arguments = {"max_disagreement": 0.05} if made_with is certify else {}
        with pytest.raises(ValueError, match="the record has 2 labels and the model 3"):
            made_with(tiny_model(), other, **arguments)
    rows = encoded(400)
    record = record_exits(tiny_model(), rows, progress=False)
    assert calibrate(tiny_model(), record.select(torch.arange(399))).rows == 399  # the same weights
    with pytest.raises(ValueError, match="the record was made with other weights than those of this model"):
        certify(tiny_model(seed=1), record, max_disagreement=0.9)
    cascades = [
        CascadeForSequenceClassification.from_members([stock(num_layers=1), tiny_model(seed=seed)]) for seed in (0, 1)
    ]
    record = record_exits(cascades[0], rows, progress=False)
    assert calibrate(cascades[0], record).rows == 400 and len(record.weights) == 2
    with pytest.raises(ValueError, match="the record was made with other weights than those of this model"):
        calibrate(cascades[1], record)
    for wrong in (0, -3, 2.5, "a", True):
        with pytest.raises(ValueError, match="max_length must be a whole number of at least 1"):
            certify(tiny_model(), record, max_disagreement=0.05, max_length=wrong)
        with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
            calibrate(tiny_model(), record, batch_size=wrong)


def test_what_a_certificate_says(certified):
    model, record, certificate = certified
    assert (certificate.loss, certificate.risk, certificate.confidence_level) == ("disagreement", 0.05, 0.9)
    assert certificate.rows == 2000 and certificate.unit == "flops"
    assert certificate.errors == errors_at(record, model.config, certificate.speed) <= 0.05 * 2000
    costs = [replay_at_speed(record, model.config, speed).flops.sum().item() for speed in (0.0, certificate.speed)]
    assert certificate.speed_up == pytest.approx(costs[0] / costs[1], rel=1e-5)
    assert certificate.speed_up > 1.2
    assert certificate.setting == {"dtype": "float32", "engine": "torch", "tokenizer": None, "max_length": None}
    assert certificate.asked["exit_policy"] == "entropy" and certificate.weights == [model.weights_digest(whole=True)]
    assert certificate.speed in GRID


def test_a_call_answers_as_at_the_certified_speed(certified):
    model, _, certificate = certified
    rows = encoded()
    expected = [answer.exit_layer for answer in model.predict(rows, speed=certificate.speed)]
    for risk in (0.05, [0.05] * 24, torch.full((24,), 0.05, dtype=torch.float64), (0.05 for _ in range(24))):
        assert [answer.exit_layer for answer in model.predict(rows, max_disagreement=risk)] == expected
    stricter = certified_speed(model.config.certification, 0.05, 0.99)
    assert stricter < certificate.speed
    layers = [answer.exit_layer for answer in model.predict(rows, max_disagreement=0.05, confidence=0.99)]
    assert layers == [answer.exit_layer for answer in model.predict(rows, speed=stricter)]
    ids = torch.tensor([[5, 6, 7]])
    assert model(ids, max_disagreement=0.05).exit_layer == model(ids, speed=certificate.speed).exit_layer


def test_answers_that_are_lost_are_fewer_than_those_that_differ():
    model, record = tiny_model(), made_up_record()
    differs = model.certify(record, max_disagreement=0.02)
    before = model.config.certification
    lost = model.certify(record, max_accuracy_drop=0.02, confidence=0.9)
    assert lost.loss == "accuracy_drop" and lost.speed > differs.speed
    assert lost.errors == errors_at(record, model.config, lost.speed, lost=True)
    assert model.config.certification is before  # which calls with max_disagreement read
    accuracies = [
        (replay_at_speed(record, model.config, speed).logits.argmax(-1) == record.labels).float().mean().item()
        for speed in (0.0, lost.speed)
    ]
    assert accuracies[0] - accuracies[1] <= lost.errors / lost.rows + 1e-6


def test_what_cannot_be_certified_says_how_many_texts_would_do():
    model = tiny_model()
    few = made_up_record(rows=200)
    with pytest.raises(ValueError, match="needs at least 230 texts without one disagreement, and there were 200"):
        certify(model, few, max_disagreement=0.01)
    with pytest.raises(ValueError, match="needs at least 299 texts"):
        certify(model, few, max_disagreement=0.01, confidence=0.95)
    certify(model, few, max_disagreement=0.1)
    with pytest.raises(
        ValueError, match=r"max_disagreement=0\.01 cannot be certified with confidence 0\.9: it needs at"
    ):
        model.predict(encoded(), max_disagreement=0.01)
    assert list(model.predict(encoded(), max_disagreement=0.1))
    # Sure of answers that are wrong: no speed is low enough.
    wrong = made_up_record()
    wrong.exit_logits[:, 0] = torch.eye(3)[(wrong.exit_logits[:, -1].argmax(-1) + 1) % 3] * 100
    with pytest.raises(ValueError, match="2000 of 2000 differed at the lowest speed already"):
        certify(model, wrong, max_disagreement=0.05)


@pytest.mark.parametrize("risk", [0, 1, -0.1, math.nan, math.inf, True, "0.01", None, [0.01]])
def test_a_share_that_is_none_is_refused(certified, risk):
    model, record, _ = certified
    with pytest.raises(ValueError, match="max_disagreement"):
        certify(model, record, max_disagreement=risk)
    if risk is not None and not isinstance(risk, list):
        with pytest.raises(ValueError, match="max_disagreement must be a share of the answers, above 0 and below 1"):
            model.predict(encoded(), max_disagreement=risk)


def test_wrong_calls_are_refused(certified):
    model, record, _ = certified
    rows = encoded()
    for confidence in (0.4, 1.0, math.nan, "high", True):
        with pytest.raises(ValueError, match=r"confidence must be from 0\.5 to below 1"):
            certify(model, record, max_disagreement=0.05, confidence=confidence)
    with pytest.raises(ValueError, match=r"confidence=0\.97 was not certified, only 0\.9, 0\.95, 0\.99"):
        model.predict(rows, max_disagreement=0.05, confidence=0.97)
    with pytest.raises(ValueError, match=r"confidence=0\.9 is that of max_disagreement"):
        model.predict(rows, speed=0.5, confidence=0.9)
    for dials in ({"speed": 0.5, "max_disagreement": 0.05}, {"speedup": 2.0, "max_disagreement": 0.05}):
        with pytest.raises(ValueError, match=r"give \w+ or max_disagreement, not both"):
            model.predict(rows, **dials)
    with pytest.raises(ValueError, match="give speed or speedup or max_disagreement, not all"):
        model.predict(rows, speed=0.5, speedup=2.0, max_disagreement=0.05)
    with pytest.raises(ValueError, match="give either max_disagreement or max_accuracy_drop"):
        certify(model, record, max_disagreement=0.05, max_accuracy_drop=0.05)
    with pytest.raises(ValueError, match="max_accuracy_drop needs texts with labels"):
        certify(model, made_up_record(labels=False), max_accuracy_drop=0.05)
    with pytest.raises(ValueError, match=r"max_disagreement=0\.05 needs a model that was certified"):
        tiny_model().predict(rows, max_disagreement=0.05)


def test_another_use_than_that_of_the_certificate_is_refused():
    model, record = tiny_model(), made_up_record()
    certify(model, record, max_disagreement=0.05)
    rows = encoded(4)
    for call, message in (
        ({"exit_policy": "margin"}, "max_disagreement was calibrated with exit_policy='entropy'"),
        ({"max_layers": 3}, r"this call has exits=\[\[1, 3\]\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(rows, max_disagreement=0.05, **call)
    half = FastBertForSequenceClassification(model.config)
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16).eval()
    with pytest.raises(ValueError, match="certified with dtype='float32', and here it is 'bfloat16'"):
        half.predict(rows, max_disagreement=0.05)
    assert list(model.predict(rows, max_disagreement=0.05))
    with torch.no_grad():  # neither by a training, nor where a sample of the weights would show it
        model.fastbert.backbone.embeddings.word_embeddings.weight[1::2] += 0.5
    with pytest.raises(ValueError, match="weights of this model have changed since it was calibrated"):
        model.predict(rows, max_disagreement=0.05)
    with torch.no_grad():
        model.fastbert.backbone.embeddings.word_embeddings.weight[1::2] -= 0.5
    certify(model, record, max_disagreement=0.05)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="here it is 'bfloat16'"):
        model.predict(rows, max_disagreement=0.05)
    config = LoraConfig(target_modules=["query"], modules_to_save=model.exit_names())
    adapted = get_peft_model(copy.deepcopy(model), config).get_base_model()
    with pytest.raises(ValueError, match="weights of this model have changed"):
        adapted.predict(rows, max_disagreement=0.05)
    with pytest.raises(ValueError, match="a model with adapters, or one that is quantised, cannot be certified"):
        certify(adapted, record, max_disagreement=0.05)
    assert not calibrate(adapted, record).certified and adapted.config.certification is None
    assert list(adapted.predict(rows, speedup=1.2))


def test_the_pipeline_checks_how_texts_are_read():
    model, texts = tiny_model(), tiny_texts(300)
    certify(model, texts, tiny_tokenizer(), max_disagreement=0.5, progress=False)
    setting = model.config.certification["setting"]
    assert setting["max_length"] == tiny_tokenizer().model_max_length or setting["max_length"] > 0
    classifier = pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer())
    speed = certified_speed(model.config.certification, 0.5)
    layers = [answer["exit_layer"] for answer in classifier(texts[:12], max_disagreement=0.5)]
    assert layers == [answer["exit_layer"] for answer in classifier(texts[:12], speed=speed)]
    fixed = pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer(), max_disagreement=0.5)
    assert layers == [answer["exit_layer"] for answer in fixed(texts[:12])]
    assert [answer["exit_layer"] for answer in fixed(texts[:12], speed=0)] == [NUM_LAYERS] * 12
    shorter = tiny_tokenizer()
    shorter.model_max_length = 4
    short = pipeline("fast-text-classification", model=model, tokenizer=shorter)
    for reading, other in (({"max_length": 4}, classifier), ({}, short)):
        with pytest.raises(ValueError, match="certified with max_length="):
            other(texts[:12], max_disagreement=0.5, truncation=True, **reading)
    assert layers == [answer["exit_layer"] for answer in classifier(texts[:12], max_disagreement=0.5, truncation=True)]
    rows = [{"input_ids": row["input_ids"][:8]} for row in encoded(300)]
    model.config.certification = None
    certify(model, rows, tiny_tokenizer(), max_disagreement=0.5, max_length=8)
    answers = classifier(["good", *texts[:2]], max_disagreement=0.5, on_error="return")
    assert "exit_layer" in answers[0] and "cut them so, truncation=True, max_length=8" in answers[1]["error"]
    assert classifier(texts[:2], max_disagreement=0.5, truncation=True, max_length=8)
    certify(model, texts, tiny_tokenizer(), max_disagreement=0.5, progress=False)
    with pytest.raises(ValueError, match="was certified without add_special_tokens"):
        classifier(texts[:12], max_disagreement=0.5, add_special_tokens=False)
    with pytest.raises(ValueError, match="max_length=4 tells how rows were cut that are tokenized already"):
        certify(model, texts, tiny_tokenizer(), max_disagreement=0.5, max_length=4)
    # The last word is the call's, and what it leaves out the constructor's.
    sure = pipeline(
        "fast-text-classification", model=model, tokenizer=tiny_tokenizer(), max_disagreement=0.6, confidence=0.99
    )
    for risk, dial in ((0.6, {}), (0.5, {"max_disagreement": 0.5})):
        expected = model.predict(encoded(12), max_disagreement=risk, confidence=0.99)
        found = sure(tiny_texts(12), **dial)
        assert [answer["exit_layer"] for answer in found] == [answer.exit_layer for answer in expected]
    assert [answer["exit_layer"] for answer in sure(texts[:12], speed=0)] == [NUM_LAYERS] * 12
    other = tiny_tokenizer()
    other.add_tokens(["unheard-of"])
    changed = pipeline("fast-text-classification", model=model, tokenizer=other)
    with pytest.raises(ValueError, match="certified with tokenizer="):
        changed(texts[:12], max_disagreement=0.5)
    with pytest.raises(ValueError, match="is for a call"):
        pipeline("fast-text-classification", model=model, tokenizer=other, max_disagreement=[0.5] * 12)


def test_threads_share_a_calibrated_model():
    model = tiny_model(seed=1)
    calibrate(model, tiny_texts(400), tiny_tokenizer(), exit_policy="learned", progress=False)
    rows = encoded(48)
    dials = [{"speedup": 1.2}, {"max_disagreement": 0.4}, {"speed": 0.3}, {"speed": 0}] * 4
    expected = [[answer.exit_layer for answer in model.predict(rows, **dial)] for dial in dials]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda dial: [answer.exit_layer for answer in model.predict(rows, **dial)], dials)
        assert list(found) == expected
    assert len(set(map(tuple, expected))) > 1


def test_it_is_saved_and_travels(certified, tmp_path):
    model, _, certificate = certified
    model.save_pretrained(tmp_path)
    again = FastBertForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.certification == model.config.certification
    assert certified_speed(again.config.certification, 0.05) == certificate.speed
    assert list(again.predict(encoded(4), max_disagreement=0.05))


def test_a_cascade_is_certified_against_its_last_member():
    cascade = CascadeForSequenceClassification.from_members(
        [stock(num_layers=1), tiny_model()], [tiny_tokenizer()] * 2
    )
    record = record_exits(cascade, encoded(300), progress=False)
    certificate = cascade.certify(record, max_disagreement=0.5)
    assert certificate.errors == errors_at(record, cascade.config, certificate.speed)
    assert len(certificate.weights) == 2
    rows = encoded()
    layers = [answer.exit_layer for answer in cascade.predict(rows, max_disagreement=0.5)]
    assert layers == [answer.exit_layer for answer in cascade.predict(rows, speed=certificate.speed)]


def test_the_texts_of_the_gates_are_not_those_of_a_certificate():
    model, record = tiny_model(), made_up_record()
    found = calibrate(model, record, exit_policy="learned")
    assert model.config.certification["rows"] == 1000  # the other half
    assert found.certified
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
    before = model.config.certification
    for same in (record, record.select(order), record.select(order[:500])):
        with pytest.raises(ValueError, match="of these are texts to which the gates of the exit policy were fitted"):
            certify(model, same, max_disagreement=0.05)
    with pytest.raises(ValueError, match="cannot be certified"):
        certify(model, made_up_record(20, seed=1), max_disagreement=0.05)
    assert model.config.certification is before  # a try that fails takes nothing away
    assert certify(model, made_up_record(seed=1), max_disagreement=0.05).rows == 2000


@pytest.fixture(scope="module")
def differs():
    """Which of many texts are answered differently at each speed, `[texts, speeds]`, as one more draws from them."""
    model, everything = tiny_model(), made_up_record(rows=8000)
    early = [replay_at_speed(everything, model.config, speed).logits.argmax(-1) for speed in GRID]
    return torch.stack(early, 1) != everything.exit_logits[:, -1].argmax(-1)[:, None]


def violations(differs: torch.Tensor, risk: float, confidence: float, tries: int, choose) -> float:
    """Return how often the share of errors at the chosen speed is above the risk among all texts."""
    shares, generator, found = differs.double().mean(0), torch.Generator().manual_seed(0), 0
    for _ in range(tries):
        errors = differs[torch.randint(len(differs), (800,), generator=generator)].sum(0).tolist()
        place = choose(errors, 800, risk, confidence)
        found += place is not None and shares[place].item() > risk
    return found / tries


def by_fixed_sequence(errors, rows, risk, confidence):
    accepted = [place for place, bound in enumerate(upper_bounds(errors, rows, confidence)) if bound <= risk]
    return accepted[-1] if accepted else None


def without_a_correction(errors, rows, risk, confidence):
    """The greatest speed at which any test is passed by itself: what must not be done."""
    return max((place for place, found in enumerate(errors) if found / rows <= risk), default=None)


@pytest.mark.parametrize(("risk", "confidence"), [(0.02, 0.9), (0.05, 0.95)])
def test_a_promise_is_broken_as_seldom_as_it_says_and_another_procedure_is_caught(differs, risk, confidence):
    tries = 400
    allowed = binom.ppf(0.999, tries, 1 - confidence) / tries
    assert violations(differs, risk, confidence, tries, by_fixed_sequence) <= allowed
    assert violations(differs, risk, confidence, tries, without_a_correction) > allowed


BROKEN = (
    *({name: None} for name in CERTIFICATION),
    {"rows": 0},
    {"rows": 2.5},
    {"rows": True},
    {"unit": "seconds"},
    {"speeds": []},
    {"speeds": [0.5, 0.1]},
    {"speeds": [0.1, 1.5]},
    {"speeds": [0.1, math.nan]},
    {"speeds": [0.1] * 5000},
    {"speeds": [0.1, 0.2, 0.3]},
    {"speed_ups": [1.0, -1.0]},
    {"speed_ups": [1.0, math.inf]},
    {"errors": [0, 501]},
    {"errors": [-1, 0]},
    {"errors": [0]},
    {"risks": {}},
    {"risks": {"0.9": [0.0, 0.0]}},
    {"risks": {"0.90": [0.01, 0.02]}},
    {"risks": {f"0.9{number}": [0.01, 0.02] for number in range(1, 99)}},
    {"weights": [None]},
    {"weights": ["zzz:0123456789abcdef"]},
    {"setting": {"dtype": None, "engine": None, "tokenizer": None, "max_length": None}},
    {"risks": {"0.9": [0.1]}},
    {"risks": {"0.9": [0.2, 0.1]}},
    {"risks": {"0.9": [0.1, 1.1]}},
    {"risks": {"0.9": [0.1, math.nan]}},
    {"risks": {"1.5": [0.1, 0.2]}},
    {"risks": {"nan": [0.1, 0.2]}},
    {"risks": {"sure": [0.1, 0.2]}},
    {"reference": "not base64!"},
    {"reference": ""},
    {"reference": "AA=="},
    {"reference": "////" * 4 * NUM_LAYERS},
    {"asked": []},
    {"weights": []},
    {"weights": ["none"]},
    {"setting": {}},
    {"setting": {"dtype": "float32"}},
)


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: str(change)[:40])
def test_a_config_that_certify_did_not_write_is_refused(change, tmp_path):
    model = tiny_model()
    model.config.certification = made_up_certification()
    check_certification(model.config.certification, 1, NUM_LAYERS)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["certification"].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="certification"):
        FastBertForSequenceClassification.from_pretrained(tmp_path)
    for other in ("certified", [1], 3, {}):
        with pytest.raises(ValueError, match="is not what certify writes"):
            check_certification(other)
