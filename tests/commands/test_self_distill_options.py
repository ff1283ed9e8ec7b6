"""The command line of `self_distill`: options, a JSON file of them, and the quick start."""

from __future__ import annotations

import json

import pytest

from fastbert_hf.commands.self_distill_options import QUICK_START, parse_self_distill_options


def parsed(tmp_path, settings, *options: str):
    """Return the options that a JSON file and words after it give."""
    path = tmp_path / "settings.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return parse_self_distill_options("A command.", [str(path), *options])


def test_options_win_over_a_json_file(tmp_path):
    settings = {"train_file": "a.tsv", "validation_file": "b.tsv", "learning_rate": 1e-3, "num_train_epochs": 2}
    settings |= {"eval_speeds": [0, 0.5], "load_best_model_at_end": True, "report_to": ["none"]}
    settings |= {"lr_scheduler_kwargs": {"num_cycles": 2}, "save_total_limit": None}
    options, training = parsed(tmp_path, settings)
    assert (options.train_file, options.eval_speeds) == ("a.tsv", [0, 0.5])
    assert (training.learning_rate, training.num_train_epochs, training.load_best_model_at_end) == (1e-3, 2, True)
    assert (training.lr_scheduler_kwargs, training.save_total_limit) == ({"num_cycles": 2}, None)

    words = "--learning-rate 0.5 --eval_speeds 0.2 --load_best_model_at_end False --max_steps 2".split()
    options, training = parsed(tmp_path, settings, *words)
    assert (options.train_file, options.validation_file, options.eval_speeds) == ("a.tsv", "b.tsv", [0.2])
    assert (training.learning_rate, training.num_train_epochs, training.load_best_model_at_end) == (0.5, 2, False)
    assert training.max_steps == 2


def test_data_in_options_takes_the_place_of_a_json_files(tmp_path):
    files = {"train_file": "a.tsv", "validation_file": "b.tsv", "unlabeled_file": "c.tsv"}
    options, _ = parsed(tmp_path, files, "--dataset_name", "org/data")
    assert options.dataset_name == "org/data" and {getattr(options, name) for name in files} == {None}
    hub = {"dataset_name": "org/data", "dataset_config_name": "zh"}
    options, _ = parsed(tmp_path, hub, "--train_file", "a.tsv")
    assert options.train_file == "a.tsv" and {getattr(options, name) for name in hub} == {None}
    options, _ = parsed(tmp_path, files, "--train_file", "other.tsv")
    assert (options.train_file, options.validation_file) == ("other.tsv", "b.tsv")


def test_a_call_without_data_gets_the_settings_of_the_quick_start():
    options, training = parse_self_distill_options("A command.", ["--num_train_epochs", "1"])
    assert options.distill_num_train_epochs == QUICK_START["distill_num_train_epochs"]
    assert (training.output_dir, training.num_train_epochs) == ("outputs/quick_start", 1)
    # Names with hyphens are the same options.
    options, training = parse_self_distill_options("A command.", ["--train-file", "a.csv"])
    assert (options.train_file, options.validation_file) == ("a.csv", None)
    assert (options.distill_num_train_epochs, training.output_dir) == (5, "outputs/fastbert")


BAD_SETTINGS = {
    "not JSON": ("{", "settings.json is not JSON"),
    "no object": ([1], "settings.json must hold an object"),
    "an unknown argument": ({"learning_rat": 1}, "there is no argument 'learning_rat'; did you mean 'learning_rate'?"),
    "a word for a number": ({"max_length": "long"}, "'max_length' must be int, got \"long\""),
    "a number in a string": ({"learning_rate": "2e-5"}, "'learning_rate' must be float, got \"2e-5\""),
    "a fraction for a whole number": ({"max_steps": 1.5}, "'max_steps' must be int, got 1.5"),
    "a number for a switch": ({"distill_only": 1}, "'distill_only' must be bool, got 1"),
    "a word in a list of numbers": ({"eval_speeds": [0, "x"]}, "'eval_speeds' must be list[float], got [0, \"x\"]"),
    "nothing for a number": ({"max_length": None}, "'max_length' must be int, got null"),
    "an unknown strategy": ({"eval_strategy": "daily"}, "daily"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_in_a_json_file_are_named(tmp_path, name):
    settings, expected = BAD_SETTINGS[name]
    with pytest.raises(SystemExit) as error:
        parsed(tmp_path, settings)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lerning_rate", "1"], "unrecognized arguments: --lerning_rate 1; --help lists all arguments"),
        (["--max_steps", "two"], "--max_steps/--max-steps: invalid int value: 'two'"),
        (["--eval_strategy", "daily"], "daily"),
    ],
)
def test_bad_options_after_a_json_file_are_named(tmp_path, words, expected):
    with pytest.raises(SystemExit) as error:
        parsed(tmp_path, {"train_file": "a.tsv"}, *words)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_json_file_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match=r"there is no file no\.json"):
        parse_self_distill_options("A command.", ["no.json"])
