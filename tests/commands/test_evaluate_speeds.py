from __future__ import annotations

import json
import re
import shutil

import pytest

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.evaluation import load_table

from ..common import tiny_model, tiny_texts, tiny_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(id2label={0: "no", 1: "yes", 2: "so"}, num_labels=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "test.tsv"
    rows = [f"{('no', 'yes', 'so')[index % 3]}\t{text}" for index, text in enumerate(tiny_texts(40))]
    path.write_text("\n".join(["label\ttext", *rows]) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_the_table_is_printed_and_all_speeds_are_kept(run, tmp_path, model_dir, data_file, suffix):
    output = tmp_path / f"speeds{suffix}"
    arguments = ("--model_name_or_path", model_dir, "--data_file", data_file, "--output", output)
    printed = run(*arguments, "--policies", "entropy", "margin", "--speeds", 0, 0.125)
    table = load_table(output)
    assert len(table) == 2 * 192  # 0.125 is none of the 191
    lines = [line.split() for line in printed.splitlines() if line.strip().startswith(("entropy", "margin"))]
    assert [line[:2] for line in lines] == [
        ["entropy", "0.000"],
        ["entropy", "0.125"],
        ["margin", "0.000"],
        ["margin", "0.125"],
    ]
    assert float(lines[0][2]) == pytest.approx(table["accuracy"][0], abs=1e-3)
    if suffix == ".json":
        assert json.loads(output.read_text())["settings"]["rows"] == 40


def test_a_model_learns_what_its_speeds_cost(run, error_of, tmp_path, model_dir, data_file):
    folder, texts = tmp_path / "calibrated", tmp_path / "texts.tsv"
    shutil.copytree(model_dir, folder)
    texts.write_text("\n".join(["text", *tiny_texts(120)]) + "\n")
    before = json.loads((folder / "config.json").read_text())
    printed = run("--model_name_or_path", folder, "--data_file", texts, "--calibrate")
    after = json.loads((folder / "config.json").read_text())
    greatest = after.pop("calibration")["speed_ups"][-1]
    for config in (before, after):
        config.pop("calibration", None), config.pop("certification")
    assert after == before and f"may ask for a speedup up to {greatest:.2f}" in printed
    model = FastBertForSequenceClassification.from_pretrained(folder)
    assert list(model.predict([{"input_ids": [5, 6, 7]}], speedup=greatest))
    # The policy is written, too; what the figures show follows from it.
    arguments = ("--model_name_or_path", folder, "--data_file", texts)
    figures = tmp_path / "figures"
    printed = run(*arguments, "--calibrate", "--exit_policy", "learned", "--linear", "--figures_dir", figures)
    written = json.loads((folder / "config.json").read_text())
    assert written["exit_policy"] == "learned" and len(written["gates"]) == 4 and written["calibration"]["linear"]
    assert "The best policy here is" in printed and "max_disagreement=0.05" in printed
    assert "Answers of the exits by their uncertainty (learned)" in printed
    assert (figures / "dial.png").is_file() and (figures / "reliability.svg").is_file()
    printed = run(*arguments)  # what is in the config is told each time
    assert "may ask for a speedup up to" in printed and "Certified with confidence 0.9, on 60 texts" in printed
    printed = run(*arguments, "--speedups", 1.1, "--max_disagreements", 0.9, "--speeds", 0)
    assert "speedup=1.1 is speed 0." in printed and "max_disagreement=0.9 is speed" in printed
    shown = [line.split()[1] for line in printed.splitlines() if line.strip().startswith("learned ")]
    named = re.findall(r"is speed ([\d.]+)", printed)
    assert [float(speed) for speed in shown] == pytest.approx(sorted({0.0, *map(float, named)}), abs=1e-3)
    assert "speedup must be a number from 1 to" in error_of(*arguments, "--speedups", 99)
    assert "needs a model that was certified" in error_of(
        "--model_name_or_path", model_dir, "--data_file", texts, "--max_disagreements", 0.1
    )
    assert "give --calibrate, too" in error_of(*arguments, "--linear")
    arguments = ("--model_name_or_path", model_dir, "--data_file", data_file, "--calibrate")
    assert "there are 40 texts, and at least 100 are needed" in error_of(*arguments)


def test_figures_and_times_are_made_on_request(run, tmp_path, model_dir, data_file):
    figures = tmp_path / "figures"
    arguments = ("--model_name_or_path", model_dir, "--data_file", data_file, "--figures_dir", figures)
    printed = run(*arguments, "--time_speeds", 0.9, "--policies", "entropy", "patience")
    assert "texts_per_second" in printed
    assert {path.name for path in figures.glob("*.png")} == {
        "trade_off.png",
        "exit_layers_entropy.png",
        "exit_layers_patience.png",
        "uncertainty_entropy.png",
        "uncertainty_patience.png",
        "accuracy_entropy.png",
        "reliability.png",
    }
    assert {path.stem for path in figures.glob("*.svg")} == {path.stem for path in figures.glob("*.png")}


def test_data_without_labels_gives_agreement_and_says_that_accuracy_needs_them(command, capsys, tmp_path, model_dir):
    path = tmp_path / "texts.csv"
    path.write_text("\n".join(["text", *tiny_texts(20)]) + "\n")
    command.main(["--model_name_or_path", str(model_dir), "--data_file", str(path)])
    captured = capsys.readouterr()
    assert "The data has no column 'label': accuracy needs labels." in captured.err
    assert "agreement" in captured.out and "accuracy" not in captured.out


def test_max_samples_takes_some_rows(run, model_dir, data_file):
    arguments = ("--model_name_or_path", model_dir, "--data_file", data_file, "--max_samples", 7)
    assert "7 rows, 4 layers" in run(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_file", "no.tsv"], "there is no file no.tsv"),
        (["--data_file", ""], "give --data_file"),
        (["--model_name_or_path", ""], "give --model_name_or_path"),
        (["--model_name_or_path", "no/such/folder"], "the model cannot be loaded"),
        (["--policies", "hope"], "--policies must be some of entropy"),
        (
            ["--metric", "bleu"],
            "--metric must be one of accuracy, f1, matthews_correlation, macro_f1, r2, pearson, got 'bleu'",
        ),
        (["--speeds", "1.5"], r"speed must be a number in [0, 1], got 1.5"),
        (["--time_speeds", "-1"], r"speed must be a number in [0, 1], got -1"),
        (["--output", "table.txt"], "--output must end with .csv or .json"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--text_column", "body"], "has no column 'body', only label, text: correct text_column"),
    ],
)
def test_wrong_arguments_end_with_one_line(error_of, model_dir, data_file, arguments, message):
    common = ["--model_name_or_path", model_dir, "--data_file", data_file]
    assert message in error_of(*common, *arguments)
