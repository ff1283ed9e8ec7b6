from __future__ import annotations

import pytest

from fastbert_hf.training.recipes import RECIPES

from ..common import tiny_texts


@pytest.fixture
def arguments(tmp_path, backbone):
    path = tmp_path / "train.tsv"
    rows = [f"{('no', 'yes')[index % 2]}\t{text}" for index, text in enumerate(tiny_texts(40))]
    path.write_text("\n".join(["label\ttext", *rows]) + "\n")
    words = f"--model_name_or_path {backbone} --train_file {path} --validation_file {path} --use_cpu"
    words += f" --num_train_epochs 1 --exits_num_train_epochs 1 --output_dir {tmp_path / 'out'}"
    return words.split()


def test_recipes_run_by_their_names_and_get_a_line(run, arguments, tmp_path):
    recipes = ("fastbert", "pabee", "bert_kl")
    printed = run(*arguments, "--recipes", *recipes, "--num_hidden_layers", 2)
    lines = [line.split() for line in printed[printed.index("accuracy on the validation rows") :].splitlines()]
    table = {line[0]: line[1:] for line in lines if line and line[0] in RECIPES}
    assert tuple(table) == recipes
    assert table["bert_kl"][1:5] == ["(all", "2", "of", "its"]
    for name in ("fastbert", "pabee"):
        assert len(table[name]) == 5 and all(cell.endswith("%") or cell == "-" for cell in table[name])
    # At least one agreement is needed, so nothing leaves after the first of four layers.
    assert table["pabee"][4] == "-" and table["fastbert"][4] != "-"
    assert (tmp_path / "out" / "attention-fine_tuning-self_distillation" / "model" / "config.json").exists()


def test_exits_can_be_others_than_the_recipes_own(run, arguments, tmp_path):
    run(*arguments, "--recipes", "deebert", "--exit_type", "linear_mean")
    assert (tmp_path / "out" / "linear_mean-fine_tuning-frozen_cross_entropy").exists()


def test_the_list_needs_no_data(run):
    printed = run("--list_recipes")
    assert [line.split()[0] for line in printed.splitlines()] == list(RECIPES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipes", "magic"], f"recipe 'magic' is not known; choose one of {', '.join(RECIPES)}"),
        (["--exit_type", "round"], "--exit_type must be one of attention, linear, linear_mean, got 'round'"),
        (["--text_column", "body"], "has no column 'body'"),
        (["--num_hidden_layers", "9"], "--num_hidden_layers must be from 1 to 4, got 9"),
        (["--temperature", "0"], "--temperature must be above 0, got 0.0"),
        (["--dataset_name", "org/data"], "give --train_file or --dataset_name, not both"),
        (["--validation_file", "no.tsv"], "there is no file no.tsv: correct --validation_file"),
        (["--model_name_or_path", "no/such/folder"], "the model cannot be loaded"),
    ],
)
def test_wrong_arguments_end_with_one_line(error_of, arguments, words, message):
    assert message in error_of(*arguments, *words)
