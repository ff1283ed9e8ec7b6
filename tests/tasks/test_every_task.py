"""What holds for a model of every task: answers, batches, records, losses, files, and weights that are broken."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModel, pipeline

from fastbert_hf import FastBertConfig, FastBertModel
from fastbert_hf.evaluation import ExitRecord, exit_uncertainties, record_exits, replay
from fastbert_hf.modeling.exit_policies import ExitPolicy, exit_thresholds

from ..common import (
    NUM_LAYERS,
    assert_close,
    assert_same_weights,
    pad_token_id_of,
    tiny_stock_model,
    tiny_texts,
    tiny_tokenizer,
)
from .common import (
    LABELS,
    OWN,
    TASK_MODELS,
    TASKS,
    class_of,
    encoded_texts,
    gold_of,
    padded,
    policies_of,
    stock_class_of,
    stock_task_model,
    task_gates,
    texts_of_logits,
    wrapped,
)


FAMILIES = ("bert", "roberta", "distilbert", "electra", "albert")
TASK_POLICIES = [(task, policy) for task in TASKS for policy in policies_of(task)]
SPEEDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
LIMITS = ((None, None), (2, None), (None, 3), (2, 3), (3, 3), (None, 1))
TEXTS = encoded_texts(24)
LENGTHS = [len(text["input_ids"]) for text in TEXTS]
BROKEN_TOKEN, GOOD_TEXT = 99, {"input_ids": [5, 6, 7]}


@cache
def model_of(task: str):
    """A model that no test changes, with gates."""
    return TASK_MODELS[task](gates=task_gates(task))


def assert_same_answers(answers: list, expected: list) -> None:
    assert [answer.exit_layer for answer in answers] == [answer.exit_layer for answer in expected]
    for answer, wanted in zip(answers, expected, strict=True):
        assert_close(answer.logits, wanted.logits)
        assert answer.uncertainty == pytest.approx(wanted.uncertainty, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_a_wrapped_classifier_answers_as_the_stock_one(task, family):
    stock = stock_task_model(task, family)
    model, batch = wrapped(task, stock), padded(TEXTS, pad_token_id_of(family))
    expected = texts_of_logits(stock(**batch).logits, LENGTHS)
    assert torch.cat(expected).std(0).min() > 1e-2 or torch.cat(expected).std() > 1e-2
    for output in (model(**batch), model(**batch, speed=0)):
        for own, wanted in zip(texts_of_logits(output.logits, LENGTHS), expected, strict=True):
            assert_close(own, wanted)
        assert output.exit_layer.tolist() == [NUM_LAYERS] * len(TEXTS)
    for answer, wanted in zip(model.predict(TEXTS), expected, strict=True):
        assert_close(answer.logits, wanted)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_a_head_of_another_structure_is_refused_and_a_new_one_can_be_put_there(task):
    with pytest.raises(ValueError, match=r"The stock classifier of 'modernbert' .*Use from_backbone\(\.\.\.\)"):
        wrapped(task, stock_task_model(task, "modernbert"))
    model = class_of(task).from_backbone(tiny_stock_model("modernbert"), **LABELS[task], **OWN[task])
    logits = model(**padded(TEXTS)).logits
    assert logits.shape[-1] == model.config.num_labels
    assert all(own.isfinite().all() for own in texts_of_logits(logits, LENGTHS))


@pytest.mark.parametrize("speed", [0.0, 0.6, [place / len(TEXTS) for place in range(len(TEXTS))]])
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_predict_answers_as_forward_whatever_texts_are_answered_together(task, speed):
    model, speeds = model_of(task), speed if isinstance(speed, list) else [speed] * len(TEXTS)
    expected = list(model.predict(TEXTS, speed=speed))
    for answer, length in zip(expected, LENGTHS, strict=True):
        assert answer.logits.shape == ((length,) if task == "tokens" else ()) + (model.config.num_labels,)
    for side in ("right", "left"):
        batch = padded(TEXTS, side=side)
        output = model(**batch, speed=speed)
        assert output.exit_layer.tolist() == [answer.exit_layer for answer in expected]
        for place, answer in enumerate(expected):
            is_token = batch["attention_mask"][place].bool()
            own = output.logits[place][is_token] if task == "tokens" else output.logits[place]
            assert_close(own, answer.logits)
            assert task != "tokens" or (output.logits[place][~is_token] == -100).all()
    for formation in ({"batch_size": 1}, {"batch_size": 5}, {"batch_tokens": 40}, {"batch_tokens": 90}):
        for rebatch in (True, False):
            assert_same_answers(list(model.predict(TEXTS, speed=speed, rebatch=rebatch, **formation)), expected)
    backwards = list(model.predict(iter(TEXTS[::-1]), speed=speeds[::-1]))
    assert_same_answers(backwards[::-1], expected)
    rows = [{name: column[place] for name, column in padded(TEXTS).items()} for place in range(len(TEXTS))]
    assert_same_answers(list(model.predict(rows, speed=speed)), expected)


@pytest.mark.parametrize("task", TASKS)
def test_texts_of_every_task_leave_at_several_exits(task):
    answers = [answer for speed in (0.4, 0.8, 1.0) for answer in model_of(task).predict(TEXTS, speed=speed)]
    assert len({answer.exit_layer for answer in answers}) > 1


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_the_logits_of_every_exit_are_what_it_answers_alone(task, side):
    model, batch = model_of(task), padded(TEXTS, side=side)
    exit_logits = model(**batch, output_exit_logits=True).exit_logits
    assert exit_logits.shape[:2] == (len(TEXTS), NUM_LAYERS)
    for depth in range(1, NUM_LAYERS + 1):
        assert_close(exit_logits[:, depth - 1], model(**batch, max_layers=depth).logits)
    recorded = [texts_of_logits(record_of(task).exit_logits[:, depth], LENGTHS) for depth in range(NUM_LAYERS)]
    for depth, of_texts in enumerate(recorded, start=1):
        for own, answer in zip(of_texts, model.predict(TEXTS, max_layers=depth), strict=True):
            assert_close(own, answer.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", TASKS)
def test_models_in_half_precision_answer_alone_as_together(task, dtype):
    model = deepcopy(model_of(task)).to(dtype)
    for speed in (0.0, 0.6):
        together = list(model.predict(TEXTS, speed=speed))
        assert all(answer.logits.isfinite().all() and 0 <= answer.uncertainty <= 1 for answer in together)
        alone = [answer for text in TEXTS for answer in model.predict([text], speed=speed)]
        assert [answer.exit_layer for answer in alone] == [answer.exit_layer for answer in together]
        for own, other in zip(alone, together, strict=True):
            assert_close(own.logits.float(), other.logits.float(), 0.1)


@pytest.mark.parametrize("arguments", [{}, {"top_k": None}, {"top_k": 2}, {"function_to_apply": "none"}], ids=str)
@pytest.mark.parametrize("task", [task for task in TASKS if task != "tokens"])
def test_at_speed_0_the_text_pipeline_is_the_stock_one(task, arguments):
    stock = stock_task_model(task)
    texts, settings = tiny_texts(8), {"tokenizer": tiny_tokenizer(), "device": "cpu"}
    expected = pipeline("text-classification", model=stock, **settings)(texts, **arguments)
    answers = pipeline("fast-text-classification", model=wrapped(task, stock), **settings)(texts, speed=0, **arguments)
    for own, wanted in zip(answers, expected, strict=True):
        own, wanted = (part if isinstance(part, list) else [part] for part in (own, wanted))
        assert [label["label"] for label in own] == [label["label"] for label in wanted]
        assert [label["score"] for label in own] == pytest.approx([label["score"] for label in wanted], abs=1e-5)


@cache
def record_of(task: str) -> ExitRecord:
    return record_exits(model_of(task), TEXTS, batch_size=7, progress=False)


@pytest.mark.parametrize(("task", "policy_name"), TASK_POLICIES)
def test_a_replay_says_what_predict_answers(task, policy_name):
    model, record, generator = model_of(task), record_of(task), torch.Generator().manual_seed(0)
    policy, early = ExitPolicy.of(model.config, policy_name), 0
    for number, (first, last) in enumerate(LIMITS * 2):
        speeds = torch.rand(len(TEXTS), generator=generator)
        speeds[::5] = SPEEDS[number % len(SPEEDS)]
        thresholds = exit_thresholds(speeds, NUM_LAYERS, first, last)
        uncertainties = exit_uncertainties(record, policy, thresholds > 0)
        # Rounding decides where a threshold is met to the last digits; whole numbers of agreements do not round.
        is_tie = ((uncertainties - speeds[:, None]).abs() < 1e-5).any(1) & (policy_name != "patience")
        replayed = replay(record, thresholds, policy)
        formation = {"batch_tokens": 64} if number % 2 else {}
        asked = {"speed": speeds.tolist(), "min_exit_layer": first, "max_layers": last, "exit_policy": policy_name}
        answers = list(model.predict(TEXTS, **asked, **formation))
        assert is_tie.sum() < len(TEXTS) / 2
        for place in (~is_tie).nonzero()[:, 0].tolist():
            answer = answers[place]
            assert replayed.exit_layer[place] == answer.exit_layer
            own = replayed.logits[place]
            assert_close(own[: LENGTHS[place]] if task == "tokens" else own, answer.logits)
            assert replayed.uncertainty[place].item() == pytest.approx(answer.uncertainty, abs=1e-5)
        early += (replayed.exit_layer < (last or NUM_LAYERS)).sum()
    assert early > 0


@pytest.mark.parametrize("task", TASKS)
def test_uncertainties_are_from_0_to_1(task):
    for name in policies_of(task):
        uncertainties = exit_uncertainties(record_of(task), ExitPolicy.of(model_of(task).config, name))
        assert ((uncertainties >= 0) & (uncertainties <= 1)).all()
        assert uncertainties.unique().numel() > 1


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_a_model_comes_back_from_its_folder(task, tmp_path):
    model = model_of(task)
    model.save_pretrained(tmp_path)
    expected = list(model.predict(TEXTS, speed=0.5))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is FastBertConfig
    for name in ("task", "problem_type", "tolerance", "label_thresholds", "id2label", "exit_type", "gates"):
        assert getattr(config, name) == getattr(model.config, name)
    for auto_class in (class_of(task), stock_class_of(task)):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is class_of(task)
        assert_same_weights(loaded, model)
        assert_same_answers(list(loaded.predict(TEXTS, speed=0.5)), expected)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is FastBertModel
    assert_same_weights(encoder, model.fastbert)


@pytest.mark.parametrize("family", ("bert", "distilbert"))
@pytest.mark.parametrize("task", TASKS)
def test_loss_and_gradients_are_those_of_the_stock_model(task, family):
    stock = stock_task_model(task, family)
    model, batch = wrapped(task, stock), padded(TEXTS)
    labels = gold_of(task, batch["attention_mask"])
    losses = [own(**batch, labels=labels).loss for own in (model, stock)]
    assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    compared = 0
    for name, parameter in model.fastbert.backbone.named_parameters():
        assert_close(parameter.grad, stock.base_model.get_parameter(name).grad)
        compared += bool(parameter.grad.any())
    assert compared > 20
    assert_close(model.teacher.out_proj.weight.grad, stock.classifier.weight.grad)
    assert all(parameter.grad is None for parameter in model.student_parameters())


def assert_no_answer(model, text: dict, policy: str, position: int = 0) -> None:
    for speed in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"the logits of text {position} are not finite, so there is no answer"):
            list(model.predict([GOOD_TEXT] * position + [text], speed=speed, exit_policy=policy))
        batch = padded([GOOD_TEXT] * position + [text])
        with torch.no_grad(), pytest.raises(ValueError, match=rf"rows \[{position}\] are not finite"):
            model(**batch, speed=speed, exit_policy=policy)


@pytest.mark.parametrize(("task", "policy"), TASK_POLICIES)
def test_a_text_that_the_weights_turn_into_nan_is_an_error_and_the_others_are_answered(task, policy):
    model = deepcopy(model_of(task))
    texts = [{"input_ids": [min(token, BROKEN_TOKEN - 1) for token in text["input_ids"]]} for text in TEXTS]
    expected = list(model.predict(texts, speed=0.7, exit_policy=policy))
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN_TOKEN] = float("nan")
    bad = {"input_ids": [5, 6, BROKEN_TOKEN, 7]}
    assert_no_answer(model, bad, policy, position=1)
    mixed = [*texts[:4], bad, *texts[4:]]
    answers = list(model.predict(mixed, speed=0.7, exit_policy=policy, on_error="return", batch_tokens=60))
    assert "text 4" in str(answers[4].error)
    assert_same_answers([*answers[:4], *answers[5:]], expected)
    skipped = list(model.predict(mixed, speed=0.7, exit_policy=policy, on_error="skip"))
    assert_same_answers(skipped, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("task", "policy"), TASK_POLICIES)
def test_a_teacher_that_is_not_finite_answers_nothing(task, policy, value):
    model = deepcopy(model_of(task))
    with torch.no_grad():
        for exit_classifier in model.exits:
            exit_classifier.out_proj.bias[0] = value
    assert_no_answer(model, TEXTS[0], policy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("task", "policy"), TASK_POLICIES)
def test_no_text_leaves_at_a_student_that_is_not_finite(task, policy, value):
    model = deepcopy(model_of(task))
    model.config.gates = [[-1.0] * 5] * NUM_LAYERS
    with torch.no_grad():
        model.students[1].out_proj.bias[0] = value
    answers = list(model.predict(TEXTS, speed=1.0, exit_policy=policy, min_exit_layer=2, on_error="return"))
    assert len(answers) == len(TEXTS)
    for answer in answers:
        assert answer.exit_layer != 2
        assert answer.error is not None or answer.logits.isfinite().all()
