"""What a config of a task, its labels, its checkpoints and its pipelines cannot be: errors name it, and what can."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

from fastbert_hf import (
    CascadeForSequenceClassification,
    FastBertConfig,
    FastBertForSequenceClassification,
    FastBertForTokenClassification,
    SelfDistillationArguments,
    SelfDistillationTrainer,
)
from fastbert_hf.evaluation import choose_speed, record_exits

from ..common import stock, tiny_model, tiny_stock_model, tiny_text_config, tiny_tokenizer, training_settings
from .common import (
    OF_TAGS,
    TASK_MODELS,
    TASKS,
    class_of,
    encoded_texts,
    padded,
    rows_of,
    stock_task_model,
)


NAN, INF = float("nan"), float("inf")
SEVERAL = {"problem_type": "multi_label_classification", "num_labels": 3}
NUMBER = {"problem_type": "regression", "num_labels": 1}
TOKENS = {"task": "token-classification", **OF_TAGS}
THRESHOLDS = r"must be a probability above 0 and below 1 for each label\. Example: label_thresholds=\[0\.5, 0\.3\]"
TOLERANCE = r"must be a number of at least 0.*Example: tolerance=0\.25"
# What a config says, and what the error does: the value, and what is allowed.
BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"task": "translation"}, r"task='translation' is not known; choose one of text-classification, token-class"),
    ({"task": ""}, r"task=''"),
    ({"task": "TOKEN-CLASSIFICATION"}, r"task='TOKEN-CLASSIFICATION' is not known; choose one of"),
    ({"task": "token_classification"}, r"task='token_classification' is not known; choose one of"),
    ({"task": 5}, r"task.*\b5\b|expected str"),
    ({"task": ["token-classification"]}, r"task.*expected str|task=\["),
    ({"task": None}, r"task.*None"),
    ({"problem_type": "ranking"}, r"problem_type='ranking' is not known; choose one of single_label_classification, "),
    ({"problem_type": "x" * 500}, r"problem_type='x{20,60}"),
    ({"problem_type": ["regression"]}, r"problem_type"),
    ({"problem_type": 3}, r"problem_type"),
    ({"num_labels": 1, "problem_type": "single_label_classification"}, r"requires `num_labels > 1`.*num_labels=2"),
    ({"task": "token-classification", "num_labels": 1}, r"num_labels=1 is too few for token_classification"),
    *[({**NUMBER, "tolerance": value}, TOLERANCE) for value in (NAN, INF, -INF, -0.1, -1)],
    *[({**NUMBER, "tolerance": value}, r"tolerance") for value in ("0.5", [0.5], {}, True)],
    (
        {"tolerance": 0.5},
        r"tolerance=0\.5 is for regression, and this model is for single_label_classification: l",
    ),
    ({**SEVERAL, "tolerance": 0}, r"tolerance=0 is for regression, and this model is for multi_label_classification"),
    ({**TOKENS, "tolerance": 0.1}, r"tolerance=0\.1 is for regression, and this model is for token_classification"),
    ({**SEVERAL, "label_thresholds": [0.5, 0.5]}, r"label_thresholds has 2 numbers for 3 labels: give one for each"),
    ({**SEVERAL, "label_thresholds": [0.5] * 4}, r"label_thresholds has 4 numbers for 3 labels: give one for each"),
    ({**SEVERAL, "label_thresholds": []}, r"label_thresholds has 0 numbers for 3 labels: give one for each"),
    *[
        ({**SEVERAL, "label_thresholds": [0.5, value, 0.5]}, THRESHOLDS)
        for value in (0, 1, 1.5, -0.5, NAN, INF, "0.5", None, True, [0.5])
    ],
    *[({**SEVERAL, "label_thresholds": value}, r"label_thresholds") for value in ("0.5", 0.5, {"a": 0.5})],
    ({"label_thresholds": [0.5, 0.5]}, r"label_thresholds=\[0\.5, 0\.5\] is for multi_label_classification, and this"),
    ({**NUMBER, "label_thresholds": [0.5]}, r"label_thresholds=\[0\.5\] is for multi_label_classification, and this"),
    ({**TOKENS, "label_thresholds": [0.5] * 5}, r"label_thresholds=.* is for multi_label_classification, and this"),
    *[
        ({name: value}, rf"{name}='{value}' is not known for .*; choose one of attention, linear, linear_mean\.")
        for name in ("exit_type", "teacher_exit_type")
        for value in ("token_dense", "token_linear")
    ],
    *[
        ({**TOKENS, name: value}, rf"{name}='{value}' is not known for .*; choose one of token_dense, token_linear\.")
        for name in ("exit_type", "teacher_exit_type")
        for value in ("attention", "linear", "linear_mean")
    ],
    *[
        ({**NUMBER, "exit_policy": name}, rf"exit_policy='{name}' is not known for regression; choose one of patience")
        for name in ("entropy", "confidence", "margin", "mean_entropy", "window_entropy")
    ],
    ({"exit_policy": "mean_entropy"}, r"exit_policy='mean_entropy' is not known for single_label_classification; "),
    ({"exit_policy": "window_entropy"}, r"exit_policy='window_entropy' is not known for single_label_classification"),
    ({**SEVERAL, "exit_policy": "window_entropy"}, r"'window_entropy' is not known for multi_label_classification; c"),
    ({**NUMBER, "exit_policy": "learned"}, r'exit_policy="learned" needs gates, which this model has not'),
    (
        {**TOKENS, "coarsening": {"layers": [2], "retention": [0.5]}},
        r"coarsening merges tokens, and token_classification has an answer for each of them: leave out coarsening",
    ),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS)
def test_a_config_that_cannot_be_is_refused_when_it_is_made_and_when_it_is_read(fields, message, tmp_path):
    text_config = tiny_text_config("bert")
    refusals = (ValueError, TypeError, StrictDataclassError)  # the last one of wrong types
    with pytest.raises(refusals, match=message):
        FastBertConfig(text_config=text_config, **fields)
    least = {"model_type": "fastbert", "text_config": text_config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps({**least, **fields}))
    with pytest.raises(refusals, match="|".join(fields)):
        FastBertConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("fields", [SEVERAL, {"num_labels": 3}, TOKENS, {**NUMBER, "tolerance": 0}])
def test_the_same_configs_without_that_are_made(fields):
    config = FastBertConfig(text_config=tiny_text_config("bert"), **fields)
    assert {name: getattr(config, name) for name in fields} == fields


TEXTS = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
FOR_SEVERAL = r"do not fit logits of shape \[2, 3\]: give a 0 or a 1 for each label"
FOR_NUMBERS = r"labels of shape .* do not fit outputs of shape \[2, \d\]: give a number for each output"
FOR_TOKENS = r"labels of shape .* do not fit logits of shape \[2, 3, 5\]: give an id for each token"
BAD_LABELS: list[tuple[str, Any, str]] = [
    ("single_label", [[1, 0, 0], [0, 1, 0]], r"labels of shape \[.*: give one id for each row"),
    ("single_label", [1.0, 2.0], r"labels of shape \[2\] do not fit logits of shape \[2, 3\]: give one id for each r"),
    ("single_label", [1], r"labels of shape \[1\] do not fit logits of shape \[2, 3\]: give one id for each row"),
    ("single_label", [[1.0, 1.0, 0.0]] * 2, r"the labels of row 0, \[1\.0, 1\.0, 0\.0\], are no probabilities"),
    ("several_labels", [1, 2], FOR_SEVERAL),
    ("several_labels", [[1.0, 0.0]] * 2, FOR_SEVERAL),
    ("several_labels", [[1.0, 0.0, 1.0]], FOR_SEVERAL),
    (
        "several_labels",
        [[0.0, 1.0, 1.0], [2.0, 0.0, 1.0]],
        r"the labels of row 1, \[2\.0, 0\.0, 1\.0\], are not all",
    ),
    ("several_labels", [[0.0, -100.0, 1.0], [1.0, 0.0, 1.0]], r"the labels of row 0, .* are not all from 0 to 1"),
    ("several_labels", [[0.0, NAN, 1.0], [1.0, 0.0, 1.0]], r"the labels of row 0, .*nan.* are not all from 0 to 1"),
    ("one_number", [[0.5, 0.5]] * 2, FOR_NUMBERS),
    ("one_number", [0.5], FOR_NUMBERS),
    ("several_numbers", [0.5, 0.5], FOR_NUMBERS),
    ("several_numbers", [[0.5, 0.5, 0.5]] * 2, FOR_NUMBERS),
    ("one_number", [0.5, NAN], r"labels.*nan"),
    ("one_number", [INF, 0.5], r"labels.*inf"),
    ("tokens", [1, 2], FOR_TOKENS),
    ("tokens", [[1, 2]] * 2, FOR_TOKENS),
    ("tokens", [[1.0, 2.0, 3.0]] * 2, r"give an id for each token, -100 for those that have none"),
    ("tokens", [[1, 2, 3]], FOR_TOKENS),
    ("tokens", [[1, 2, 5], [0, -100, -100]], r"Target 5"),
    ("tokens", [[1, 2, -1], [0, -100, -100]], r"Target -1"),
    ("single_label", [3, 0], r"Target 3"),
]


@pytest.mark.parametrize(("task", "labels", "message"), BAD_LABELS)
def test_labels_that_do_not_fit_are_refused_by_the_loss(task, labels, message):
    model = TASK_MODELS[task]()
    # Ids out of range are PyTorch's own error, as in stock models: to look for them would wait for the device.
    with pytest.raises(IndexError if "Target" in message else (ValueError, TypeError), match=message):
        model(**padded(TEXTS), labels=torch.tensor(labels))


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("single_label", 3, r"labels must be from 0 to 2, got 3 to 3: for data without gold labels leave out"),
        ("single_label", -100, r"labels must be from 0 to 2, got -100 to -100"),
        (
            "several_labels",
            [0.5, 1.0, 0.0],
            r"labels must be 0 or 1 for each of the 3 labels, got \[0\.5, 1",
        ),
        ("several_labels", 1, r"labels"),
        ("one_number", "good", r"labels.*good"),
        ("one_number", NAN, r"labels.*nan"),
        ("several_numbers", 0.5, r"labels"),
        ("several_numbers", [0.5] * 3, r"labels"),
        ("tokens", 1, r"'labels' must have an id for each of the 3 tokens of a row, -100 for those without, got 1"),
        ("tokens", [1, 2], r"'labels' must have an id for each of the 3 tokens of a row.* got \[1, 2\]"),
        ("tokens", [1, 2, 5], r"labels must be from 0 to 4, got 1 to 5"),
    ],
)
def test_gold_labels_that_do_not_fit_are_refused_by_a_record(task, labels, message):
    rows = [{"input_ids": [5, 6, 7], "labels": labels}]
    with pytest.raises((ValueError, TypeError), match=message):
        record_exits(TASK_MODELS[task](), rows, progress=False)


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_which_one_has_no_labels_are_refused(task):
    rows = [*rows_of(task, 3), *rows_of(task, 1, labels=False)]
    with pytest.raises((ValueError, TypeError), match="labels"):
        record_exits(TASK_MODELS[task](), rows, progress=False)


@pytest.mark.parametrize(
    ("words", "labels", "message"),
    [
        (["word7", "word8"], ["O"], r"row 0 has 2 tokens, and needs as many labels, got \['O'\]"),
        (
            ["word7", "word8"],
            ["O", "B-ORG"],
            r"a label of row 0 is 'B-ORG', which is not known: the labels are 'O'",
        ),
        ([], [], r"the tokens of row 0 must be a list of words, got \[\]"),
        ("word7", ["O"], r"the tokens of row 0 must be a list of words, got 'word7'"),
        (["word7", 5], ["O", "O"], r"the tokens of row 0 must be a list of words, got"),
        (["word7"], "O", r"row 0 has 1 tokens, and needs as many labels, got 'O'"),
        (["word7", "word8"], [0, 9], r"labels must be from 0 to 4, got 0 to 9"),
    ],
)
def test_words_whose_labels_do_not_fit_are_refused(words, labels, message):
    with pytest.raises((ValueError, TypeError), match=message):
        record_exits(
            TASK_MODELS["tokens"](), [{"tokens": words, "labels": labels}], tokenizer=tiny_tokenizer(), progress=False
        )


@pytest.mark.parametrize("task", ["one_number", "several_numbers", "tokens"])
def test_a_cascade_of_numbers_or_tokens_is_refused(task):
    for members in ([stock_task_model(task, seed=seed) for seed in (0, 1)], [TASK_MODELS[task]()] * 2):
        with pytest.raises((ValueError, TypeError), match=r"cascade|classifier"):
            CascadeForSequenceClassification.from_members(members)
    with pytest.raises(ValueError, match=r"member 2 .*problem_type|cascade|labels"):
        CascadeForSequenceClassification.from_members(
            [stock(num_labels=1 if "one" in task else 5), TASK_MODELS[task]()]
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {"tokens": TASK_MODELS["tokens"](), "text": tiny_model()}
    for name, model in found.items():
        model.save_pretrained(tmp_path_factory.mktemp(name) / name)
        found[name] = tmp_path_factory.getbasetemp()
    return {name: next(folder.glob(f"{name}*/{name}")) for name, folder in found.items()}


@pytest.mark.parametrize(
    ("name", "loads", "told"),
    [
        ("tokens", (AutoModelForSequenceClassification, FastBertForSequenceClassification), "token-classification"),
        ("text", (AutoModelForTokenClassification, FastBertForTokenClassification), "text-classification"),
    ],
)
def test_a_checkpoint_of_the_other_kind_is_refused(folders, name, loads, told):
    own, right = {"tokens": ("Sequence", "Token"), "text": ("Token", "Sequence")}[name]
    for load in loads:
        with pytest.raises(
            ValueError,
            match=rf"FastBertFor{own}Classification is for .*{told}.*: use FastBertFor{right}Classification",
        ):
            load.from_pretrained(folders[name])


def test_a_pipeline_of_the_other_kind_is_refused(folders):
    for name, task in (("tokens", "text"), ("text", "token")):
        model = {"tokens": TASK_MODELS["tokens"], "text": tiny_model}[name]()
        with pytest.raises(ValueError, match=rf"fast-{task}-classification is for {task}-classification, and this"):
            pipeline(f"fast-{task}-classification", model=model, tokenizer=tiny_tokenizer())
        with pytest.raises(ValueError, match=r"FastBertFor\w+Classification is for task="):
            pipeline(f"fast-{task}-classification", model=str(folders[name]), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"fast-token-classification needs a FastBERT model, got one of type 'bert'"):
        pipeline("fast-token-classification", model=stock_task_model("tokens"), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("task", TASKS)
def test_a_stock_model_of_the_other_kind_is_refused(task):
    other = "single_label" if task == "tokens" else "tokens"
    with pytest.raises(ValueError, match=r"BertFor\w+Classification is not a (sequence|token) classifier"):
        class_of(task).from_classifier(stock_task_model(other))
    with pytest.raises(ValueError, match=r"is for task=.*: leave out task='question-answering'"):
        class_of(task).from_backbone(tiny_stock_model(), task="question-answering")


@pytest.mark.parametrize("task", TASKS)
def test_what_a_call_may_not_ask_of_a_task_is_refused(task):
    model, texts = TASK_MODELS[task](), encoded_texts(3)
    bad = {"tokens": "span", "single_label": "mean_entropy"}.get(task, "window_entropy")
    known = re.escape(model.config.exit_policies[0])
    for call in (lambda: model.predict(texts, exit_policy=bad), lambda: model(**padded(texts), exit_policy=bad)):
        with pytest.raises(ValueError, match=rf"exit_policy='{bad}' is not known for .*; choose one of.*{known}"):
            call()
    with pytest.raises(ValueError, match=r"retention"):
        model.predict(texts, retention=0.5)
    with pytest.raises(ValueError, match=r"the data has no labels, which"):
        choose_speed(model, texts, metric="r2" if "number" in task else "accuracy", progress=False)


@pytest.mark.parametrize("task", TASKS)
def test_gold_labels_that_do_not_fit_are_refused_by_an_evaluation(task, tmp_path):
    arguments = SelfDistillationArguments(**training_settings(tmp_path))
    trainer = SelfDistillationTrainer(TASK_MODELS[task](), arguments, train_dataset=rows_of(task, 4))
    with pytest.raises((ValueError, TypeError), match=r"label"):
        trainer.evaluate([{**row, "labels": [0.5] * 7} for row in rows_of(task, 4)])
