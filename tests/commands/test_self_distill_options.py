"""The command line of `self_distill`: options, a JSON file of them, and the quick start."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from fastbert_hf.commands.self_distill import shared_arguments
from fastbert_hf.commands.self_distill_options import QUICK_START, SelfDistillOptions, parse_self_distill_options
from fastbert_hf.training import ExitTraining, FineTuning


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
        (["--lerning_rate", "1"], "no option --lerning_rate 1; did you mean --learning_rate? --help all lists all"),
        (["--lerning-rate=1"], "no option --lerning-rate=1; did you mean --learning_rate?"),
        (["train.csv"], "no option train.csv; their names begin with --; --help all lists all arguments"),
        (["--max_steps", "two"], "--max_steps/--max-steps: invalid int value: 'two'"),
        (["--eval_strategy", "daily"], "daily"),
        # A second one, and one after a switch that would take it for its value.
        (
            ["--seed", "1", "more.json"],
            "no option more.json; their names begin with --; a file of settings comes before",
        ),
        (["--bf16", "more.json"], "got more.json but expected one of yes/no, "),
        (["--bf16", "more.json"], "; a file of settings comes before all options: "),
    ],
)
def test_bad_options_after_a_json_file_are_named(tmp_path, words, expected):
    with pytest.raises(SystemExit) as error:
        parsed(tmp_path, {"train_file": "a.tsv"}, *words)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_json_file_after_options_is_told_where_it_belongs():
    with pytest.raises(SystemExit, match=r"comes before all options: \S+ settings\.json --\.\.\."):
        parse_self_distill_options("A command.", ["--seed", "1", "settings.json"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--use_cpu"], {"use_cpu": True, "warmup_steps": 0.1, "seed": 42}),
        # Also where the default of a stage is another than that of TrainingArguments.
        (["--use_cpu", "--warmup_steps", "0", "--save_strategy", "no"], {"warmup_steps": 0, "save_strategy": "no"}),
        (
            ["--use_cpu", "--bf16", "--weight_decay", "0.1", "--seed", "7"],
            {"bf16": True, "weight_decay": 0.1, "seed": 7},
        ),
    ],
)
def test_training_arguments_reach_both_stages(tmp_path, words, expected):
    _, training = parse_self_distill_options("A command.", words)
    shared = shared_arguments(training)
    assert "learning_rate" not in shared and len(shared) < 15
    for stage in (FineTuning(), ExitTraining()):
        arguments = stage.make_arguments(tmp_path, **shared)
        assert {name: getattr(arguments, name) for name in expected} == expected


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_self_distill_options("What it does.\n\nMore of it.", list(words))
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_is_short_and_shows_the_other_arguments_on_request(capsys):
    short, long = help_of(capsys, "--help"), help_of(capsys, "--help", "all")
    assert help_of(capsys, "-h") == short
    options = {name: set(re.findall(r"^  (--\w+)", text, re.MULTILINE)) for name, text in (("", short), ("all", long))}
    own = {f"--{option.name}" for option in fields(SelfDistillOptions)}
    assert own | {"--learning_rate", "--output_dir", "--use_cpu", "--push_to_hub"} <= options[""]
    assert "--adam_beta1" not in short and len(short.splitlines()) < 130
    trainers = {f"--{option.name}" for option in fields(TrainingArguments) if option.init}
    assert own | trainers <= options["all"]
    assert "What it does." in short and "More of it" not in short and "--help all" in short
    assert max(map(short.index, own)) < short.index("--output_dir")  # its own come first


def test_a_json_file_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match=r"there is no file no\.json"):
        parse_self_distill_options("A command.", ["no.json"])
