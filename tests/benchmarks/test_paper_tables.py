"""docs/results.md: which runs it has, what is chosen on dev and reported on test, and what an interruption costs."""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModel, BertTokenizer

from fastbert_hf.training.recipes import RECIPES

from ..common import load_script, spread_out, tiny_text_config


BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
DOCS = BENCHMARKS.parent / "docs"
DATA_DIR = os.environ.get("FASTBERT_DATA")
needs_data = pytest.mark.skipif(not DATA_DIR, reason="needs the real data sets in FASTBERT_DATA")


@pytest.fixture(scope="module")
def runs():
    return load_script(BENCHMARKS / "paper_runs.py")


@pytest.fixture(scope="module")
def cascades(runs):
    return load_script(BENCHMARKS / "cascade_runs.py")


@pytest.fixture(scope="module")
def report(runs):
    return load_script(BENCHMARKS / "paper_report.py")


@pytest.fixture(scope="module")
def tables(runs, report):
    return load_script(BENCHMARKS / "paper_tables.py")


def points(layers: list[float], accuracy: list[float]) -> dict[str, list[float]]:
    return {
        "speed": [index / (len(layers) - 1) for index in range(len(layers))],
        "accuracy": accuracy,
        "mean_exit_layer": layers,
        "layer_speed_up": [6 / depth for depth in layers],
        "paper_speed_up": [6 / depth for depth in layers],
        "executed_speed_up": [6 / depth for depth in layers],
    }


def result(run, dev: list[float], test: list[float], layers: tuple[float, ...] = (6, 4, 3, 2, 1)) -> dict:
    splits = {
        split: {
            "entropy": points(list(layers), accuracy),
            "patience": points(list(layers[:3]), accuracy[:3]),
            "depth": points([1, 2, 3, 4, 5, 6], [*reversed(accuracy), accuracy[0]][:6]),
        }
        for split, accuracy in (("dev", dev), ("test", test))
    }
    rows = {"train": 100, "dev": 10, "test": 20}
    return {"run": {}, "rows": rows, "unseen_rows": 20, "unseen": None, **splits, "logs": []}


def test_every_run_has_its_own_name_and_a_known_recipe(runs, cascades):
    everything = {run for part in runs.PARTS.values() for run in part()}
    assert len({run.name for run in everything}) == len(everything)
    assert {run.recipe for run in everything} == {*RECIPES, *cascades.EXECUTE}
    for run in everything:
        whole_model, exits_alone = run.settings()
        assert whole_model.learning_rate > 0 and exits_alone.learning_rate > 0
        assert (run.depth is not None) == (run.recipe in RECIPES and RECIPES[run.recipe].fixed_depth)
    assert {run.set for run in runs.cascade_runs() if run.recipe == "cascade"} == set(runs.CASCADE_SETS)
    assert {run.set for run in runs.table_2_runs()} == set(runs.TABLE_2_SETS)
    baselines = runs.baseline_runs()
    assert {(run.set, run.seed) for run in baselines} == {
        (name, seed) for name in runs.BASELINE_SETS for seed in (1, 2)
    }
    assert all(run.max_rows == 3000 for run in baselines)


def test_a_speed_is_chosen_on_dev_and_reported_on_test(report):
    # On dev the third speed loses 0.4 points and the fourth 0.6; on test both lose more.
    parts = result(None, [0.9, 0.899, 0.896, 0.894, 0.8], [0.8, 0.79, 0.78, 0.7, 0.6])
    chosen = report.chosen_speed(parts, 0.005)
    assert chosen["speed"] == 0.5
    assert chosen["layer_speed_up"] == 2
    assert chosen["lost"] == pytest.approx(0.02)
    assert report.chosen_speed(parts, 0.0)["speed"] == 0


def test_the_dial_of_patience_goes_on_with_fixed_depths(report):
    parts = result(None, [0.9, 0.8, 0.7, 0.6, 0.5], [0.9, 0.8, 0.7, 0.6, 0.5])
    table = report.settings(parts["dev"], "patience")
    assert table["mean_exit_layer"].tolist() == [6, 4, 3, 1, 2]
    assert report.settings(parts["dev"], "entropy")["mean_exit_layer"].tolist() == [6, 4, 3, 2, 1]


def test_models_of_each_depth_make_one_dial(report, runs, tmp_path):
    for depth in report.DEPTHS:
        run = runs.Run("trec", "bert_kl", 1, 3000, depth=depth)
        parts = result(None, [0.5] * 5, [0.5 + depth / 10] * 5)
        runs.keep(parts, run, tmp_path)
    results = report.Results(tmp_path)
    assert results.dial("trec", "bert_kl", None, 1) is None  # the full model is missing
    full = runs.Run("trec", "fastbert", 1, 3000)
    runs.keep(result(None, [0.5] * 5, [0.95] * 5), full, tmp_path)
    _, test = results.dial("trec", "bert_kl", None, 1)
    assert test["accuracy"].tolist() == pytest.approx([0.6, 0.7, 0.8, 0.9, 0.95])
    assert test["layer_speed_up"].tolist() == pytest.approx([6, 3, 2, 1.5, 1])
    # 4x is 1.5 layers: half of the texts by one model, half by the other.
    assert results.reached("trec", "bert_kl", None, 1)[4.0]["accuracy"] == pytest.approx(0.65)


def test_dev_chooses_between_the_exits_of_a_baseline(report, runs, tmp_path):
    better_on_dev = result(None, [0.9] * 5, [0.1] * 5)
    better_on_test = result(None, [0.8] * 5, [0.9] * 5)
    runs.keep(better_on_dev, runs.Run("trec", "deebert", 1, 3000, ""), tmp_path)
    runs.keep(better_on_test, runs.Run("trec", "deebert", 1, 3000, "mean"), tmp_path)
    assert report.Results(tmp_path).best_variant("deebert", ("mean", "")) == ""
    # A set that only the other one has run on, and where all is easy, says nothing.
    runs.keep(result(None, [1.0] * 5, [1.0] * 5), runs.Run("sst2", "deebert", 1, 3000, "mean"), tmp_path)
    assert report.Results(tmp_path).best_variant("deebert", ("mean", "")) == ""


def test_baselines_are_averaged_over_the_sets_that_all_of_them_have(report, runs, tmp_path):
    for seed, accuracy in ((1, 0.8), (2, 0.9)):
        for recipe, variant in (("fastbert", ""), ("deebert", "mean"), ("pabee", "mean")):
            run = runs.Run("trec", recipe, seed, 3000, variant)
            runs.keep(result(None, [accuracy] * 5, [accuracy] * 5), run, tmp_path)
        for recipe in ("bert_kl", "distilled_kl"):
            for depth in report.DEPTHS:
                parts = result(None, [accuracy] * 5, [accuracy] * 5)
                runs.keep(parts, runs.Run("trec", recipe, seed, 3000, depth=depth), tmp_path)
    text = report.baselines(report.Results(tmp_path))
    assert "Averages over trec:" in text
    assert "| FastBERT | 85.0 ± 7.1 | 85.0 ± 7.1 | 85.0 ± 7.1 | 85.0 ± 7.1 |" in text
    assert "| sst2 | FastBERT | not run |" in text


def test_nothing_that_was_not_run_gets_a_number(report, tmp_path):
    results = report.Results(tmp_path)
    own = (report.table_2, report.table_3, report.baselines, report.crossed, report.tried)
    cascades = report.cascade_report
    for part in (*own, cascades.cascades, cascades.regularisation, cascades.times):
        body = part(results).splitlines()[2:]
        assert not any(character.isdigit() for line in body for character in line.split("not run")[-1])
        assert "not run" in part(results)
    assert set(report.report_findings.numbers(results).values()) == {"not run"}
    assert report.report_findings.broken_claims(results) == []


WORDS = "good bad fine poor warm cold nice dull".split()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    """A tiny encoder of as many layers as that of the tables has, which knows the words of `write_set`."""
    folder = str(tmp_path_factory.mktemp("backbone"))
    spread_out(AutoModel.from_config(tiny_text_config("bert", 6))).save_pretrained(folder)
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "film", *map(str, range(60))]
    BertTokenizer(vocab={word: index for index, word in enumerate(known)}, model_max_length=64).save_pretrained(folder)
    return folder


def write_set(folder: Path, rows: int = 60) -> None:
    folder.mkdir(parents=True)
    lines = [f"{index % 2}\t{WORDS[index % 2]} {WORDS[2 + index % 6]} film {index}" for index in range(rows)]
    for split in ("train", "test"):
        with gzip.open(folder / f"{split}.tsv.gz", "wt") as file:
            file.write("\n".join(["label\ttext_a", *lines[: rows if split == "train" else 10]]) + "\n")


def test_splits_are_the_same_for_every_seed_and_know_the_unseen_rows(runs, tmp_path):
    write_set(tmp_path / "en" / "toy")
    splits, again = (runs.load_splits(tmp_path / "en" / "toy", max_rows=20) for _ in range(2))
    sizes = {name: len(rows) for name, rows in splits.items()}
    assert sizes == {"train": 20, "unlabeled": 34, "dev": 6, "test": 10}
    assert not set(splits["train"]["text_a"]) & set(splits["unlabeled"]["text_a"])
    assert splits["train"]["text_a"] == again["train"]["text_a"]
    assert not set(splits["train"]["text_a"]) & set(splits["dev"]["text_a"])
    new = runs.unseen(splits["train"], splits["test"])
    known = set(splits["train"]["text_a"])
    assert new.tolist() == [text not in known for text in splits["test"]["text_a"]]


def test_dev_stands_in_for_a_missing_test(runs, tmp_path):
    folder = tmp_path / "en" / "toy"
    write_set(folder)
    (folder / "test.tsv.gz").rename(folder / "dev.tsv.gz")
    splits = runs.load_splits(folder)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 54, "dev": 6, "test": 10}


def test_a_folder_without_the_set_is_refused(runs, tmp_path):
    with pytest.raises(SystemExit, match=r"no train\.tsv\.gz"):
        runs.load_splits(tmp_path)


def start(tables, monkeypatch, tmp_path, *words: str) -> None:
    (tmp_path / "en").mkdir(exist_ok=True)
    folders = ["--docs_dir", str(tmp_path / "docs"), "--work_dir", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", "--data_dir", str(tmp_path), *folders, *words])
    tables.main()


def test_an_interrupted_table_goes_on_and_loses_no_finished_row(tables, runs, report, backbone, monkeypatch, tmp_path):
    write_set(tmp_path / "en" / "toy")
    monkeypatch.setattr(runs, "MODEL_DIR", backbone)
    short = runs.StageSettings(1e-3, 1)
    monkeypatch.setitem(runs.WHOLE_MODEL, "toy", (short, short))
    monkeypatch.setitem(runs.EXITS_ALONE, "toy", (short, short))
    wanted = [runs.Run("toy", "fastbert", 1), runs.Run("toy", "deebert", 1, variant="mean")]
    monkeypatch.setitem(runs.PARTS, "tried", lambda: wanted)
    executed, original = [], runs.execute

    def execute(run, *folders):
        executed.append(run.name)
        if len(executed) == 2:
            raise KeyboardInterrupt
        return original(run, *folders)

    monkeypatch.setattr(runs, "execute", execute)
    with pytest.raises(KeyboardInterrupt):
        start(tables, monkeypatch, tmp_path, "--only", "tried")
    first = tmp_path / "docs" / "results" / f"{wanted[0].name}.json"
    before = first.read_bytes()
    start(tables, monkeypatch, tmp_path, "--only", "tried")
    assert executed == [wanted[0].name, wanted[1].name, wanted[1].name]
    assert first.read_bytes() == before
    kept = json.loads(first.read_text())
    assert kept["rows"] == {"train": 54, "dev": 6, "test": 10}
    assert kept["unseen_rows"] < 10 and kept["unseen"] is not None
    table = pd.DataFrame(kept["test"]["entropy"])
    assert table["speed"].tolist() == list(runs.SPEEDS)
    # The two share one fine-tuned model.
    other = json.loads((tmp_path / "docs" / "results" / f"{wanted[1].name}.json").read_text())
    assert other["test"]["depth"]["accuracy"][-1] == kept["test"]["depth"]["accuracy"][-1]
    assert other["logs"][0] == kept["logs"][0]
    assert (tmp_path / "docs" / "results.md").exists()


def test_cascades_are_trained_measured_and_written(runs, cascades, report, backbone, monkeypatch, tmp_path):
    write_set(tmp_path / "en" / "toy")
    short = runs.StageSettings(1e-3, 1)
    monkeypatch.setitem(runs.WHOLE_MODEL, "toy", (short, short))
    monkeypatch.setitem(runs.EXITS_ALONE, "toy", (short, short))
    members = sys.modules["cascade_members"]
    for module in (runs, members):
        monkeypatch.setattr(module, "MODEL_DIR", backbone)
    monkeypatch.setattr(members, "NUM_FOLDS", 2)
    monkeypatch.setattr(members, "SEEDS", (1,))
    monkeypatch.setitem(members.MARGINS, "toy", 0.3)
    for name, value in {"PAPER_MARGINS": (0.3,), "TRAINING_SEEDS": (1,), "REPEATS": 1}.items():
        monkeypatch.setattr(cascades, name, value)
    monkeypatch.setattr(report.cascade_report, "CASCADE_SETS", ("toy",))
    results_dir, trained = tmp_path / "results", {}
    for recipe in ("cascade", "regularisation", "cascade_times"):
        run = runs.Run("toy", recipe, 1, 3000)
        runs.keep(cascades.EXECUTE[recipe](run, tmp_path, tmp_path / "work"), run, results_dir)
        files = [*(tmp_path / "work").rglob("model.safetensors"), *(tmp_path / "work").rglob("fold_*.json")]
        trained[recipe] = {str(file): file.stat().st_mtime_ns for file in files}
    # Large and its two stages, 1 and 2 distilled layers, DAR, its student, two folds; then two fine-tuned ones.
    assert [len(models) for models in trained.values()] == [8, 10, 10]
    assert trained["cascade"].items() <= trained["regularisation"].items() == trained["cascade_times"].items()
    results = report.Results(results_dir)
    dials = results.get("toy", "cascade", 1, 3000)["cascades"]
    assert list(dials) == list(cascades.CASCADES)
    for label, dial in dials.items():
        assert dial["test"]["layer_speed_up"][0] == 1
        shares = [values for name, values in dial["test"].items() if name.startswith("member_")]
        assert len(shares) == len(cascades.CASCADES[label].names)
        assert [sum(values) for values in zip(*shares, strict=True)] == pytest.approx([1] * len(runs.SPEEDS))
    found = results.get("toy", "regularisation", 1, 3000)
    assert [case["margin"] for case in found["cases"]] == [None, 0.3]
    assert "0.3 (dev) | 1 |" in report.cascade_report.regularisation(results)
    assert "| toy | cascade, 2 + 6 layers |" in report.cascade_report.cascades(results)
    times = results.get("toy", "cascade_times", 1, 3000)["times"]
    for points in times.values():
        for point in points:
            assert point["layer_speed_up"] >= 1 and point["time_speed_up_min"] <= point["time_speed_up_max"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "table_9"], "unknown parts table_9; choose from table_2"),
        (["--data_dir", "no/such/folder"], "set FASTBERT_DATA or give --data_dir"),
        (["--sets", "sst3"], "no runs of sst3 in these parts; choose from sst2, "),
    ],
)
def test_wrong_arguments_end_with_one_line(tables, monkeypatch, tmp_path, words, message):
    with pytest.raises(SystemExit, match=message):
        start(tables, monkeypatch, tmp_path, *words)


@needs_data
def test_real_sets_have_their_sizes(runs):
    sizes = {"trec": (4906, 546, 500), "rte": (2241, 249, 277), "mrpc": (3668, 408, 1725)}
    for name, expected in sizes.items():
        splits = runs.load_splits(Path(DATA_DIR) / "en" / name)
        assert tuple(len(splits[split]) for split in ("train", "dev", "test")) == expected


@pytest.fixture(scope="module")
def committed(report):
    return report.Results(DOCS / "results")


def test_the_committed_page_is_that_of_the_committed_numbers(report, committed):
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    assert report.text_of(committed, list(report.CAPTIONS)) == text
    assert "{{" not in text and "not run" not in text


def test_sentences_about_the_results_have_no_numbers_of_their_own():
    template = (BENCHMARKS / "results_template.md").read_text(encoding="utf-8")
    found = [part for part in template.split("\n\n") if part.startswith(("What was", "With complete members"))]
    assert len(found) == 16
    # What the paper has, two sums that are written out, and the least confidence of two labels.
    written = {"1.1", "2.7", "1.4", "1.33", "1.17", "0.5"}
    assert {number for part in found for number in re.findall(r"\d+\.\d+", part)} == written


def test_what_the_sentences_claim_holds(report, committed):
    text = " ".join((DOCS / "results.md").read_text(encoding="utf-8").split())
    claims = report.report_findings.claims(committed)
    assert [sentence for sentence in claims if sentence not in text] == []
    assert report.report_findings.broken_claims(committed) == []


def test_a_sentence_that_new_numbers_contradict_is_named(report, committed):
    results, findings = copy.deepcopy(committed), report.report_findings
    results.get("mrpc", "cascade", 1, 3000)["cascades"]["1 + 6 layers"]["test"]["accuracy"] = [0.99] * 191
    assert findings.broken_claims(results) == [
        "none is ahead of FastBERT, on none of the four sets and at no speed-up"
    ]
    for case in results.get("sst2", "regularisation", 1, 3000)["cases"][1:]:
        for training in case["trainings"]:
            training["test"]["difficulty_inversion_score"] = 0.9
            training["test"]["expected_calibration_error"] = 0.5
    assert findings.broken_claims(results)[1:] == [
        "On test that does not hold",
        "test keeps a gain on mnli_watson alone",
        "so it gets better on all but mnli_watson",
    ]


def test_a_record_for_the_figures_is_kept_out_of_the_folder_of_its_training(report, tmp_path):
    name = f"{report.FIGURE_SET}-all-fastbert-seed1"
    folder = tmp_path / "work" / f"{report.FIGURE_SET}-all-seed1"
    folder.mkdir(parents=True)
    parts = {"exit_logits": torch.randn(50, 6, 2), "lengths": torch.full((50,), 5), "labels": torch.arange(50) % 2}
    torch.save(parts, folder / f"{name}.record.pt")
    report.keep_figure_record(tmp_path / "work", tmp_path / "results")
    drawn = report.draw(report.Results(tmp_path / "results"), tmp_path / "figures")
    assert drawn == ["figure_4", "figure_5", "figure_6"]
    assert {path.name for path in (tmp_path / "figures").glob("*.svg")} == {f"{name}.svg" for name in drawn}


def test_the_readmes_table_is_that_of_the_committed_numbers(report):
    table = report.speeds_to_choose(report.Results(DOCS / "results"))
    assert table in (DOCS.parent / "README.md").read_text(encoding="utf-8")
