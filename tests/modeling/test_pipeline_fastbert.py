"""The "fast-text-classification" pipeline answers as direct calls of the model do, whatever it is given."""

from __future__ import annotations

import itertools
import json
import logging
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset, KeyPairDataset

from fastbert_hf import FastTextClassificationPipeline
from fastbert_hf.modeling.categorical_tasks import SingleLabel
from fastbert_hf.modeling.pipeline_fastbert import BLOCK_TEXTS
from fastbert_hf.modeling.scheduler import BLOCK_BATCHES, CPU_BATCH_TOKENS

from ..common import NUM_LAYERS, tiny_model, tiny_texts, tiny_tokenizer


LABELS = {0: "bad", 1: "fair", 2: "good"}
TEXTS = tiny_texts(14)
PAIRS = [
    {"text": text, "text_pair": other}
    for text, other in zip(tiny_texts(9, seed=1), tiny_texts(9, seed=2), strict=True)
]
SPEED = 0.7
LONG_TEXT = "word7 word8 " * 10_000


@pytest.fixture(scope="module")
def model():
    model = tiny_model(seed=2)
    model.config.id2label = LABELS
    model.config.label2id = {label: index for index, label in LABELS.items()}
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def classifier(model, tokenizer):
    """Made without a speed."""
    return make_pipeline(model, tokenizer)


def make_pipeline(model, tokenizer, **kwargs) -> FastTextClassificationPipeline:
    return pipeline("fast-text-classification", model=model, tokenizer=tokenizer, device="cpu", **kwargs)


@pytest.fixture
def config_defaults(model):
    """The model's config, put back afterwards."""
    names = ("speed", "min_exit_layer", "max_layers")
    values = [getattr(model.config, name) for name in names]
    yield model.config
    for name, value in zip(names, values, strict=True):
        setattr(model.config, name, value)


class Direct:
    """What the model itself says of each input, called one by one."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def outputs(self, inputs, speed=SPEED, max_layers=None, **tokenizer_arguments):
        for item in inputs:
            texts = item if isinstance(item, dict) else {"text": item}
            encoding = self.tokenizer(**texts, return_tensors="pt", **tokenizer_arguments)
            with torch.no_grad():
                yield self.model(**encoding, speed=speed, max_layers=max_layers)

    def __call__(self, inputs, speed=SPEED, max_layers=None, **tokenizer_arguments) -> list[dict]:
        answers = []
        for output in self.outputs(inputs, speed, max_layers, **tokenizer_arguments):
            score, label = output.logits[0].softmax(-1).max(-1)
            answers.append(
                {"label": LABELS[label.item()], "score": score.item(), "exit_layer": output.exit_layer.item()}
            )
        return answers


@pytest.fixture(scope="module")
def direct(model, tokenizer):
    return Direct(model, tokenizer)


def assert_same_answers(actual, expected) -> None:
    actual = list(actual)
    assert len(actual) == len(expected)
    for answer, other in zip(actual, expected, strict=True):
        assert list(answer) == ["label", "score", "exit_layer"]
        assert answer["label"] == other["label"]
        assert answer["score"] == pytest.approx(other["score"], abs=1e-5)
        assert type(answer["exit_layer"]) is int
        assert answer["exit_layer"] == other["exit_layer"]


def exit_layers(answers) -> list[int]:
    return [answer["exit_layer"] for answer in answers]


def test_texts_of_these_tests_leave_at_different_exits(direct):
    assert len(set(exit_layers(direct(TEXTS)))) > 2
    assert len({answer["label"] for answer in direct(TEXTS)}) > 1
    assert len(set(exit_layers(direct(PAIRS)))) > 1


@pytest.mark.parametrize("speed", [0, 0.0, 0.5, 0.7, np.float32(0.8), 0.95, 1])
def test_speed_of_a_call(classifier, direct, speed):
    assert_same_answers(classifier(TEXTS, speed=speed), direct(TEXTS, float(speed)))


@pytest.mark.parametrize("speed", [0, 0.7])
def test_speed_of_the_config(classifier, direct, config_defaults, speed):
    config_defaults.speed = speed
    assert_same_answers(classifier(TEXTS), direct(TEXTS, speed))


@pytest.mark.parametrize(("call", "constructor"), [(0, 0.9), (0.9, 0), (0.95, 0.7)])
def test_call_wins_over_constructor(model, tokenizer, direct, call, constructor):
    classifier = make_pipeline(model, tokenizer, speed=constructor)
    assert_same_answers(classifier(TEXTS, speed=call), direct(TEXTS, call))
    assert_same_answers(classifier(TEXTS), direct(TEXTS, constructor))


@pytest.mark.parametrize(("constructor", "default"), [(0, 0.9), (0.9, 0)])
def test_constructor_wins_over_config(model, tokenizer, direct, config_defaults, constructor, default):
    config_defaults.speed = default
    assert_same_answers(make_pipeline(model, tokenizer, speed=constructor)(TEXTS), direct(TEXTS, constructor))


def test_call_at_speed_0_wins_over_config(classifier, config_defaults):
    config_defaults.speed = 0.9
    assert exit_layers(classifier(TEXTS, speed=0)) == [NUM_LAYERS] * len(TEXTS)
    assert exit_layers(classifier(TEXTS)) != [NUM_LAYERS] * len(TEXTS)


def test_depth_falls_as_speed_grows(classifier):
    depths = [exit_layers(classifier(TEXTS, speed=speed)) for speed in (0, 0.5, 0.7, 0.8, 0.95)]
    assert all(1 <= depth <= NUM_LAYERS for row in depths for depth in row)
    means = [sum(row) / len(row) for row in depths]
    assert means == sorted(means, reverse=True)
    assert means[0] == NUM_LAYERS
    assert means[-1] < 2


@pytest.mark.parametrize("speed", [math.nan, -1, 1.1, True, "0.5"])
def test_speed_that_is_no_number_from_0_to_1_is_refused(model, tokenizer, classifier, speed):
    for make in (lambda: TEXTS[0], lambda: TEXTS, lambda: iter(TEXTS)):
        with pytest.raises(ValueError, match=r"speed must be a number in \[0, 1\], got .*Example: speed=0.5"):
            list(classifier(make(), speed=speed))
    with pytest.raises(ValueError, match=r"speed must be a number in \[0, 1\], got"):
        make_pipeline(model, tokenizer, speed=speed)


@pytest.mark.parametrize(("speed", "max_layers"), [(0, 1), (0, 3), (SPEED, 1), (SPEED, NUM_LAYERS)])
def test_max_layers_of_a_call(classifier, direct, max_layers, speed):
    answers = classifier(TEXTS, speed=speed, max_layers=max_layers)
    assert_same_answers(answers, direct(TEXTS, speed, max_layers))
    assert max(exit_layers(answers)) == max_layers


def test_call_wins_over_constructor_and_constructor_over_config(model, tokenizer, config_defaults):
    config_defaults.max_layers = 1
    plain = make_pipeline(model, tokenizer, speed=0)
    limited = make_pipeline(model, tokenizer, speed=0, max_layers=2)
    assert set(exit_layers(plain(TEXTS))) == {1}
    assert set(exit_layers(limited(TEXTS))) == {2}
    assert set(exit_layers(limited(TEXTS, max_layers=3))) == {3}


@pytest.mark.parametrize("max_layers", [0, NUM_LAYERS + 1, 1.5, True, "2"])
def test_other_numbers_of_layers_are_refused(model, tokenizer, classifier, max_layers):
    expected = f"max_layers must be a whole number from 1 to {NUM_LAYERS}"
    with pytest.raises(ValueError, match=expected):
        classifier(TEXTS, max_layers=max_layers)
    with pytest.raises(ValueError, match=expected):
        make_pipeline(model, tokenizer, max_layers=max_layers)


def test_one_text_gives_a_list_of_one_answer(classifier, direct):
    answers = classifier(TEXTS[0], speed=SPEED)
    assert isinstance(answers, list)
    assert_same_answers(answers, direct(TEXTS[:1]))


def test_one_pair_gives_one_answer(classifier, direct):
    answer = classifier(PAIRS[0], speed=SPEED)
    assert isinstance(answer, dict)
    assert_same_answers([answer], direct(PAIRS[:1]))


@pytest.mark.parametrize("container", [list, tuple])
@pytest.mark.parametrize("inputs", [TEXTS, PAIRS, TEXTS[:1], PAIRS[:1]])
def test_sequences_give_a_list(classifier, direct, inputs, container):
    answers = classifier(container(inputs), speed=SPEED)
    assert isinstance(answers, list)
    assert_same_answers(answers, direct(inputs))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(iter, TEXTS), (lambda inputs: (item for item in inputs), PAIRS), (lambda inputs: map(str, inputs), TEXTS)],
)
def test_generators_and_iterators_give_an_iterator(classifier, direct, inputs, make):
    answers = classifier(make(inputs), speed=SPEED)
    assert not isinstance(answers, list)
    assert_same_answers(answers, direct(inputs))


def test_generators_are_answered_as_they_come(classifier, direct):
    read = []

    def texts():
        for text in TEXTS:
            read.append(text)
            yield text

    answers = iter(classifier(texts(), speed=SPEED, batch_size=2))
    assert_same_answers(itertools.islice(answers, 3), direct(TEXTS[:3]))
    assert len(read) < len(TEXTS)


def test_columns_and_data_sets_give_the_same_answers(classifier, direct):
    dataset = Dataset.from_dict({"text": TEXTS, "number": list(range(len(TEXTS)))})
    expected = direct(TEXTS)
    column = classifier(dataset["text"], speed=SPEED)
    assert isinstance(column, list)
    assert_same_answers(column, expected)
    assert_same_answers(classifier(dataset["text"][:3], speed=SPEED), expected[:3])
    assert_same_answers(classifier(KeyDataset(dataset, "text"), speed=SPEED), expected)
    assert_same_answers(classifier((row["text"] for row in dataset), speed=SPEED), expected)


def test_whole_data_sets_give_the_same_answers_whatever_else_they_hold(classifier, direct):
    dataset = Dataset.from_dict({"label": [1] * len(TEXTS), "text": TEXTS})
    for given in (dataset, dataset.to_iterable_dataset()):
        answers = classifier(given, speed=SPEED)
        assert not isinstance(answers, list)
        assert_same_answers(answers, direct(TEXTS))
    pairs = Dataset.from_list([{**pair, "idx": 5} for pair in PAIRS])
    assert_same_answers(classifier(pairs, speed=SPEED), direct(PAIRS))
    with pytest.raises(ValueError, match=r"no column 'text', but sentence.*classifier\(dataset\['sentence'\]\)"):
        classifier(Dataset.from_dict({"sentence": TEXTS}))


def test_data_sets_of_pairs_give_the_same_answers(classifier, direct):
    pairs = KeyPairDataset(Dataset.from_list(PAIRS), "text", "text_pair")
    assert_same_answers(classifier(pairs, speed=SPEED), direct(PAIRS))


@pytest.mark.parametrize("empty", [[], ()])
def test_no_texts_give_no_answers(classifier, empty):
    assert classifier(empty) == []
    assert classifier(empty, speed=SPEED, batch_size=4) == []


def test_empty_column_gives_no_answers(classifier):
    assert classifier(Dataset.from_dict({"text": []})["text"]) == []


@pytest.mark.parametrize("make", [lambda: (text for text in ()), lambda: iter([])])
def test_empty_generators_give_no_answers(classifier, make):
    assert list(classifier(make(), speed=SPEED)) == []


def test_texts_as_dicts_mix_with_plain_texts(classifier, direct):
    mixed = [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
    assert_same_answers(classifier(mixed, speed=SPEED), direct(TEXTS[:3]))


def test_second_text_of_none_is_no_second_text(classifier, direct):
    inputs = [TEXTS[0], {"text": TEXTS[1], "text_pair": None}]
    assert_same_answers(classifier(inputs, speed=SPEED), direct(TEXTS[:2]))


@pytest.mark.parametrize(
    ("batch_size", "inputs", "make"), [(1, TEXTS, list), (3, PAIRS, iter), (3, TEXTS, iter), (8, PAIRS, list)]
)
def test_batch_size_changes_no_answer(classifier, direct, inputs, batch_size, make):
    assert_same_answers(classifier(make(inputs), speed=SPEED, batch_size=batch_size), direct(inputs))


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, "8"])
def test_what_is_no_batch_size_is_refused(classifier, batch_size):
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
        list(classifier(TEXTS, batch_size=batch_size))


def test_batch_size_1_answers_each_text_before_the_next_is_read(classifier, direct):
    read = []
    stream = (read.append(text) or text for text in TEXTS)
    # The stock call looks at the first text before anything else.
    for number, answer in enumerate(classifier(stream, speed=SPEED, batch_size=1), start=1):
        assert len(read) == number
        assert_same_answers([answer], direct(TEXTS[number - 1 : number]))
    assert number == len(TEXTS)


def test_streams_are_read_a_bounded_number_of_tokens_ahead(classifier, tokenizer):
    read, tokens_of = [], {text: len(tokenizer(text)["input_ids"]) for text in TEXTS}
    stream = (read.append(text) or text for text in itertools.cycle(TEXTS))
    limit = (BLOCK_BATCHES + 1) * CPU_BATCH_TOKENS + BLOCK_TEXTS * max(tokens_of.values())
    for number, _ in enumerate(itertools.islice(classifier(stream, speed=1), 4000), start=1):
        if number % 50 == 0:
            assert sum(tokens_of[text] for text in read[number:]) < limit


def test_stream_that_raises_does_so_after_the_answers_before_it(classifier, direct):
    def stream():
        yield from TEXTS[:5]
        raise OSError("the source is gone")

    answers, got = classifier(stream(), speed=SPEED), []
    with pytest.raises(OSError, match="the source is gone"):
        for answer in answers:
            got.append(answer)
    assert_same_answers(got, direct(TEXTS[:5]))


@pytest.mark.parametrize(
    "bad", [5, None, ["word7", "word8"], {"text": "word7", "txt_pair": "word8"}, {"other": 1}, "word7 \ud800"]
)
def test_bad_text_in_a_stream_is_named_after_the_answers_before_it(classifier, direct, bad):
    answers, got = classifier(iter([*TEXTS[:5], bad, *TEXTS[5:]]), speed=SPEED), []
    with pytest.raises((ValueError, TypeError), match="input 5"):
        for answer in answers:
            got.append(answer)
    assert_same_answers(got, direct(TEXTS[:5]))


def test_pieces_of_a_cut_text_are_refused(classifier):
    with pytest.raises(ValueError, match="leave out return_overflowing_tokens"):
        classifier(["word7 " * 40], truncation=True, max_length=10, return_overflowing_tokens=True)


def test_arguments_about_padding_and_tensors_change_nothing(classifier, direct):
    answers = classifier(TEXTS, speed=SPEED, padding="max_length", return_tensors="pt", return_attention_mask=True)
    assert_same_answers(answers, direct(TEXTS))


def test_progress_bar_is_shown_on_request(classifier, capsys):
    classifier(TEXTS, speed=SPEED)
    assert "Classifying" not in capsys.readouterr().err
    classifier(TEXTS, speed=SPEED, progress_bar=True)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err
    list(classifier(iter(TEXTS), speed=SPEED, progress_bar=True))
    assert f"{len(TEXTS)}it" in capsys.readouterr().err


def test_threads_may_call_one_pipeline_at_different_speeds(classifier, direct):
    speeds = (0.0, 0.6, 0.7, 1.0)
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda speed: [classifier(TEXTS, speed=speed) for _ in range(4)], speeds)
        for speed, repeated in zip(speeds, answers, strict=True):
            expected = direct(TEXTS, speed)
            for got in repeated:
                assert_same_answers(got, expected)


@pytest.mark.parametrize("min_exit_layer", [1, 2, NUM_LAYERS])
def test_min_exit_layer_of_a_call_the_constructor_and_the_config(
    model, tokenizer, classifier, config_defaults, min_exit_layer
):
    expected = [max(min_exit_layer, layer) for layer in exit_layers(classifier(TEXTS, speed=1))]
    assert exit_layers(classifier(TEXTS, speed=1, min_exit_layer=min_exit_layer)) == expected
    assert exit_layers(make_pipeline(model, tokenizer, min_exit_layer=min_exit_layer)(TEXTS, speed=1)) == expected
    config_defaults.min_exit_layer = min_exit_layer
    assert exit_layers(classifier(TEXTS, speed=1)) == expected


@pytest.mark.parametrize(("top_k", "batch_size"), [(None, 4), (1, 4), (2, 1)])
def test_top_k_lists_labels_by_score_with_the_exit_layer(classifier, direct, top_k, batch_size):
    answers = classifier(TEXTS, speed=SPEED, top_k=top_k, batch_size=batch_size)
    for answer, output in zip(answers, direct.outputs(TEXTS), strict=True):
        scores, labels = output.logits[0].softmax(-1).sort(descending=True)
        assert len(answer) == (top_k or len(LABELS))
        assert [one["label"] for one in answer] == [LABELS[label] for label in labels.tolist()][:top_k]
        assert [one["score"] for one in answer] == pytest.approx(scores.tolist()[:top_k], abs=1e-5)
        assert [one["exit_layer"] for one in answer] == [output.exit_layer.item()] * len(answer)


@pytest.mark.parametrize("top_k", [None, 2])
def test_top_k_of_one_text(classifier, direct, top_k):
    answers = classifier(TEXTS[0], speed=SPEED, top_k=top_k)
    assert len(answers) == (top_k or len(LABELS))
    assert answers[0] == pytest.approx(direct(TEXTS[:1])[0], abs=1e-5)
    assert len(set(exit_layers(answers))) == 1


@pytest.mark.parametrize(
    ("name", "function"),
    [("none", lambda logits: logits), ("sigmoid", torch.sigmoid), ("softmax", lambda logits: logits.softmax(-1))],
)
def test_function_to_apply_turns_logits_into_scores(classifier, direct, name, function):
    answers = classifier(TEXTS, speed=SPEED, function_to_apply=name)
    for answer, output in zip(answers, direct.outputs(TEXTS), strict=True):
        assert answer["score"] == pytest.approx(function(output.logits[0]).max().item(), abs=1e-5)
        assert answer["label"] == LABELS[output.logits[0].argmax().item()]
        assert answer["exit_layer"] == output.exit_layer.item()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_tokenizer_cuts_to_max_length(classifier, direct, batch_size):
    arguments = {"truncation": True, "max_length": 5}
    answers = classifier(TEXTS, speed=SPEED, batch_size=batch_size, **arguments)
    assert_same_answers(answers, direct(TEXTS, **arguments))
    assert answers != classifier(TEXTS, speed=SPEED)


def test_a_very_long_text_is_cut_with_truncation(classifier, direct):
    cut = " ".join(LONG_TEXT.split()[:62])
    assert_same_answers(classifier(LONG_TEXT, speed=SPEED, truncation=True), direct([cut]))


def test_a_very_long_text_without_truncation_is_an_error_that_names_the_limit(classifier):
    with pytest.raises(ValueError, match=r"20002 tokens, but this model reads at most 64.*truncation=True"):
        classifier(LONG_TEXT, speed=SPEED)


def test_longest_text_that_fits_is_answered(classifier, direct):
    fits, too_long = " ".join(["word7"] * 62), " ".join(["word7"] * 63)
    assert_same_answers(classifier(fits, speed=SPEED), direct([fits]))
    with pytest.raises(ValueError, match="65 tokens, but this model reads at most 64"):
        classifier([TEXTS[0], too_long], speed=SPEED)


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved_pipeline")
    classifier.save_pretrained(folder)
    return folder


def test_saved_folder_points_to_no_custom_code(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "fastbert"
    assert not {"custom_pipelines", "auto_map"} & config.keys()
    assert not list(folder.glob("**/*.py"))


def test_stock_pipeline_answers_at_full_depth(folder, direct):
    stock = pipeline("text-classification", model=str(folder), device="cpu")
    expected = direct(TEXTS, 0)
    for answers in (stock(TEXTS), stock(TEXTS, batch_size=4)):
        assert [one["label"] for one in answers] == [one["label"] for one in expected]
        assert [one["score"] for one in answers] == pytest.approx([one["score"] for one in expected], abs=1e-5)


@pytest.mark.parametrize("task", ["fast-text-classification", "text-classification"])
def test_neither_pipeline_logs_that_the_model_is_not_supported(folder, task):
    records, handler = [], logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        pipeline(task, model=str(folder), device="cpu")
        assert not [record for record in records if "is not supported" in record.getMessage()]
        logger.error("errors are seen")
        assert len(records) > 0
    finally:
        logger.removeHandler(handler)


def test_the_task_says_how_an_answer_is_formatted(model, tokenizer, monkeypatch):
    classifier = make_pipeline(model, tokenizer)
    (expected,) = classifier(TEXTS[0], speed=0)
    monkeypatch.setattr(SingleLabel, "function_to_apply", "none")
    (answer,) = classifier(TEXTS[0], speed=0)
    assert answer["label"] == expected["label"]
    assert answer["score"] != pytest.approx(expected["score"])  # a logit


def test_saved_pipeline_answers_alike_when_loaded_again(folder, direct):
    reloaded = pipeline("fast-text-classification", model=str(folder), device="cpu")
    assert type(reloaded) is FastTextClassificationPipeline
    assert_same_answers(reloaded(TEXTS, speed=SPEED), direct(TEXTS))


def test_model_in_train_mode_answers_without_dropout(model, tokenizer):
    make_pipeline(model.train(), tokenizer)
    assert not any(module.training for module in model.modules())
