"""Where tasks meet exported graphs and cascades: what works, and what is refused."""

from __future__ import annotations

import pytest
from transformers import AutoModelForSequenceClassification

from fastbert_hf import CascadeForSequenceClassification, export
from fastbert_hf.evaluation import record_exits, replay_at_speed

from ..common import assert_close, tiny_tokenizer
from .common import TASK_MODELS, encoded_texts


@pytest.mark.parametrize("task", ["several_labels_with_thresholds", "one_number"])
def test_an_exported_model_answers_as_before(task, tmp_path, quick_export):
    model, rows = TASK_MODELS[task](), encoded_texts()
    export(model, tmp_path, backend="onnx", tokenizer=tiny_tokenizer(), progress=False)
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for speed in (0.0, 0.97, 1.0):
        expected, answers = (list(own.predict(rows, speed=speed)) for own in (model, exported))
        assert [answer.exit_layer for answer in answers] == [answer.exit_layer for answer in expected]
        for answer, own in zip(answers, expected, strict=True):
            assert_close(answer.logits, own.logits)


def test_models_of_tokens_are_not_exported(tmp_path):
    with pytest.raises(ValueError, match="FastBertForTokenClassification cannot be exported: graphs answer for whole"):
        export(TASK_MODELS["tokens"](), tmp_path / "out", backend="onnx", tokenizer=tiny_tokenizer())


def test_a_cascade_of_several_labels_answers_as_its_record_says(tmp_path):
    members = [TASK_MODELS["several_labels"](), TASK_MODELS["several_labels"](seed=1)]
    CascadeForSequenceClassification.from_members(members).save_pretrained(tmp_path)
    cascade = CascadeForSequenceClassification.from_pretrained(tmp_path).eval()
    rows = encoded_texts()
    record = record_exits(cascade, rows, progress=False)
    members_seen = set()
    for speed in (0.0, 0.9, 0.97, 1.0):
        replayed = replay_at_speed(record, cascade.config, speed)
        answers = list(cascade.predict(rows, speed=speed))
        assert [answer.exit_layer for answer in answers] == replayed.exit_layer.tolist()
        assert [answer.exit_member for answer in answers] == replayed.exit_member.tolist()
        members_seen |= {answer.exit_member for answer in answers}
    assert members_seen == {1, 2}


def test_a_cascade_of_regressions_is_refused():
    with pytest.raises(ValueError, match="member 1 is for regression, and a cascade needs one label or several"):
        CascadeForSequenceClassification.from_members([TASK_MODELS["one_number"](), TASK_MODELS["one_number"](seed=1)])
