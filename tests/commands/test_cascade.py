"""Cascades by command, on a tiny encoder and random rows."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, BertModel, BertTokenizer, Trainer, pipeline

from fastbert_hf import CascadeForSequenceClassification, CascadeProcessor, FastBertForSequenceClassification
from fastbert_hf.commands.cascade import main
from fastbert_hf.commands.cascade_options import CascadeOptions

from ..common import (
    VOCAB_SIZE,
    assert_close,
    spread_out,
    tiny_text_config,
    tiny_texts,
    tiny_tokenizer,
)


ROWS = 24
LABELS = ["no", "yes"]
LARGE = "linear_mean_shared-fine_tuning"
TAUGHT = f"{LARGE}-distillation_2"


@pytest.fixture(scope="module")
def small_backbone(tmp_path_factory):
    """A complete model of two layers, for which the words have other numbers."""
    folder = tmp_path_factory.mktemp("small")
    spread_out(BertModel(tiny_text_config("bert", num_layers=2)), seed=1).save_pretrained(folder)
    words = tiny_tokenizer().convert_ids_to_tokens(list(range(VOCAB_SIZE)))
    words = words[:5] + words[:4:-1]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=64).save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TEXTS = tiny_texts(ROWS)
DATA = [
    {"label": LABELS[index % 2], "text": text, "other": TEXTS[-index - 1], "difficulty": index // 2 % 2}
    for index, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def options(backbone, tmp_path_factory) -> list[str]:
    """A command line without the folder of its output. Beside its rows are the same ones with their difficulty."""
    folder = tmp_path_factory.mktemp("data")
    write(folder / "labelled.jsonl", DATA)
    write(folder / "rows.jsonl", [{name: row[name] for name in ("label", "text", "other")} for row in DATA])
    words = f"--model_name_or_path {backbone} --train_file {folder / 'rows.jsonl'} --use_cpu --num_folds 2"
    words += f" --validation_file {folder / 'rows.jsonl'} --seeds 1 --num_train_epochs 1 --learning_rate 0.001"
    return f"{words} --per_device_train_batch_size 8 --eval_speeds 0 0.3 0.6 0.8 1".split()


@pytest.fixture
def labelled(options) -> list[str]:
    """The options of rows that have their difficulty already."""
    return ["--train_file", options[options.index("--train_file") + 1].replace("rows.jsonl", "labelled.jsonl")]


@contextmanager
def recorded_trainings() -> Iterator[list]:
    """Give a list of what is trained, in order: the trainer, and its model as it was before."""
    seen, original = [], Trainer.train

    def remember(self, *args, **kwargs):
        seen.append((self, copy.deepcopy(self.model)))
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", remember)
        yield seen


@pytest.fixture
def trainings():
    with recorded_trainings() as seen:
        yield seen


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory) -> tuple[Path, str, list]:
    """A run of all stages: its folder, what it printed, and its trainings."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    with recorded_trainings() as seen, redirect_stdout(io.StringIO()) as printed:
        main([*options, "--output_dir", str(folder)])
    return folder, printed.getvalue(), seen


def table_of(printed: str, header: str) -> dict[str, list[float]]:
    """The numbers below a header, by what is left of them."""
    lines = printed.split(header)[1].split("\n\n")[0].splitlines()[1:]
    cells = [re.split(r" {2,}", line.strip()) for line in lines]
    return {name: [float(value.rstrip("%x")) for value in values] for name, *values in cells}


def folders(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "stages").iterdir())


def assert_table_is_what_the_cascade_does(printed: str, folder: Path, pairs: bool = False) -> None:
    """Every number of the table of speeds that the answers themselves can tell."""
    cascade = CascadeForSequenceClassification.from_pretrained(folder)
    processor = CascadeProcessor.from_pretrained(folder)
    texts = processor(TEXTS, [row["other"] for row in DATA] if pairs else None)
    full = [answer.logits.argmax().item() for answer in cascade.predict(texts, speed=0)]
    gold = [LABELS.index(row["label"]) for row in DATA]
    table = table_of(printed, "\n speed")
    assert list(table) == ["0", "0.3", "0.5", "0.6", "0.8", "1"]
    for speed, (accuracy, agreement, layers, fewer_layers, _, small, large) in table.items():
        answers = list(cascade.predict(texts, speed=float(speed)))
        labels = torch.tensor([answer.logits.argmax().item() for answer in answers])
        mean_layers = sum(answer.exit_layer for answer in answers) / ROWS
        shares = [sum(answer.exit_member == member for answer in answers) / ROWS for member in (1, 2)]
        for shown, share in (
            (accuracy, (labels == torch.tensor(gold)).double().mean().item()),
            (agreement, (labels == torch.tensor(full)).double().mean().item()),
            (small, shares[0]),
            (large, shares[1]),
        ):
            assert shown == pytest.approx(100 * share, abs=0.051)
        assert (layers, fewer_layers) == pytest.approx((mean_layers, 4 / mean_layers), abs=0.0051)
    assert table["0"][2:5] == [4, 1, 1] and table["0"][5:] == [0, 100]
    # The small member has half of the large one's layers, and nothing else leaves below its last one.
    assert table["1"][2:4] == [2, 2] and table["1"][5:] == [100, 0]
    assert table["1"][4] == pytest.approx(2, abs=0.05)


def assert_answers_are_the_cascades(printed: str, folder: Path, pairs: bool = False) -> None:
    classifier = pipeline("fast-text-classification", model=str(folder))
    shown = re.findall(r"^  (no|yes) \((\d+)%, (small|large), (\d) layers\)  (word.*)$", printed, re.MULTILINE)
    assert len(shown) == 4
    for (label, score, member, layers, text), row in zip(shown, DATA[:: ROWS // 4], strict=True):
        given = {"text": row["text"], **({"text_pair": row["other"]} if pairs else {})}
        answer = classifier(given, speed=0.5)
        answer = answer[0] if isinstance(answer, list) else answer
        assert text == " / ".join(given.values())
        assert (label, int(layers)) == (answer["label"], answer["exit_layer"])
        assert member == ("small", "large")[answer["exit_member"] - 1]
        assert int(score) == pytest.approx(100 * answer["score"], abs=0.51)


def test_all_stages_leave_a_cascade_that_answers(finished):
    out, printed, trainings = finished
    stages = out / "stages"
    assert_table_is_what_the_cascade_does(printed, out)
    quality = table_of(printed, "\nsmall member")
    assert list(quality) == ["after stage 2", "after stage 4"]
    assert all(len(values) == 3 and all(0 <= value <= 100 for value in values) for values in quality.values())
    assert quality["after stage 4"][1] == table_of(printed, "\n speed")["1"][0]
    shares = re.search(r"Hard rows: no (.*)%, yes (.*)%, all (.*)%\.", printed).groups()
    wrong = {row for path in stages.rglob("fold_*.json") for row in json.loads(path.read_text())["wrong"]}
    assert float(shares[2]) == pytest.approx(100 * len(wrong) / ROWS, abs=0.051)

    difficulty, large, taught, aware = folders(out)
    assert (difficulty, large, taught) == ("difficulty-linear_mean_2", LARGE, TAUGHT)
    assert aware.startswith(f"{TAUGHT}-difficulty_0.5_0.5_")
    kinds = [type(trainer).__name__ for trainer, _ in trainings]
    assert kinds == ["CheckedTrainer"] * 4 + ["DifficultyAwareTrainer"]
    depths = [model.config.num_hidden_layers for _, model in trainings]
    assert depths == [4, 2, 2, 2, 2]
    # The answers of the large member are in stage 2 alone.
    is_soft = [isinstance(trainer.train_dataset["labels"][0], list) for trainer, _ in trainings]
    assert is_soft == [False, True, False, False, False]
    last, start = trainings[-1]
    assert {row for row, hard in enumerate(last.train_dataset["difficulty"]) if hard} == wrong
    after_stage_2 = FastBertForSequenceClassification.from_pretrained(stages / taught / "model").state_dict()
    assert all(torch.equal(value, after_stage_2[name]) for name, value in start.state_dict().items())
    cascade = CascadeForSequenceClassification.from_pretrained(out)
    for member, stage in zip(cascade.members, (aware, large), strict=True):
        of_stage = FastBertForSequenceClassification.from_pretrained(stages / stage / "model").state_dict()
        assert all(torch.equal(value, of_stage[name]) for name, value in member.state_dict().items())

    assert_answers_are_the_cascades(printed, out)

    card = ModelCard.load(out / "README.md")
    for speed, (accuracy, *_) in table_of(printed, "\n speed").items():
        assert f"\n| {speed} | {accuracy:.1f}% |" in card.text
    assert f"Measured on {ROWS} texts" in card.text and "| difficulty_margin | 0.5 |" in card.text
    assert str(out.parent) not in str(card)


def test_finished_stages_are_not_repeated(run, error_of, options, finished, trainings, tmp_path):
    before, out = finished[1], tmp_path / "out"
    shutil.copytree(finished[0], out)
    options = [*options, "--output_dir", out]
    again = run(*options)
    assert not trainings
    tables = [
        printed[printed.index("\nsmall member") :].replace(str(finished[0]), str(out)) for printed in (before, again)
    ]
    assert tables[0] == tables[1]
    # Another margin needs no other labels of difficulty.
    run(*options, "--difficulty_margin", 0.1, "--difficulty_weight", 2)
    ((trainer, _),) = trainings
    assert (trainer.args.difficulty_margin, trainer.args.difficulty_weight) == (0.1, 2)
    assert len(folders(out)) == 5
    # One more round labels more rows as hard, and stage 4 learns from them.
    trainings.clear()
    run(*options, "--seeds", 1, 2)
    kinds = [type(trainer).__name__ for trainer, _ in trainings]
    assert kinds == ["CheckedTrainer"] * 2 + ["DifficultyAwareTrainer"]
    message = error_of(*options, "--learning_rate", 0.5)
    assert "learning_rate was 0.001 and is 0.5): give another output_dir" in message


def test_pairs_without_difficulty(run, options, trainings, tmp_path):
    words = "--no_difficulty --text_pair_column other --exit_type linear --exit_policy entropy".split()
    printed = run(*options, *words, "--output_dir", tmp_path / "out")
    assert_table_is_what_the_cascade_does(printed, tmp_path / "out", pairs=True)
    assert_answers_are_the_cascades(printed, tmp_path / "out", pairs=True)
    assert list(table_of(printed, "\nsmall member")) == ["after stage 2"]
    assert folders(tmp_path / "out") == ["linear_shared-fine_tuning", "linear_shared-fine_tuning-distillation_2"]
    assert len(trainings) == 2
    assert "Hard rows" not in printed and "Stage 3" not in printed
    config = CascadeForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert config.exit_policy == "entropy"
    assert "difficulty_margin" not in (tmp_path / "out" / "README.md").read_text()


def test_labelled_rows_are_used_as_they_are(run, options, labelled, backbone, trainings, tmp_path):
    printed = run(*options, *labelled, "--no_knowledge_distillation", "--output_dir", tmp_path / "out")
    assert "Hard rows: no 50.0%, yes 50.0%, all 50.0%." in printed and "Stage 3" not in printed
    kinds = [type(trainer).__name__ for trainer, _ in trainings]
    assert kinds == ["CheckedTrainer"] * 2 + ["DifficultyAwareTrainer"]
    assert trainings[2][0].train_dataset["difficulty"] == [row["difficulty"] for row in DATA]
    # Without a teacher both trainings of the small member start alike, from the pretrained layers.
    gold = [LABELS.index(row["label"]) for row in DATA]
    pretrained = AutoModel.from_pretrained(backbone).encoder.layer[1].output.dense.weight
    for trainer, start in trainings[1:]:
        assert trainer.train_dataset["labels"] == gold
        assert_close(start.fastbert.layers()[1].output.dense.weight, pretrained, 0)
    first, second = (start.state_dict() for _, start in trainings[1:])
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_complete_small_model_keeps_its_tokenizer(run, options, labelled, trainings, small_backbone, tmp_path):
    out = tmp_path / "out"
    printed = run(*options, *labelled, "--small_model_name_or_path", small_backbone, "--output_dir", out)
    assert_table_is_what_the_cascade_does(printed, out)
    assert CascadeForSequenceClassification.from_pretrained(out).config.own_tokenizers
    assert folders(out) == [LARGE, "small"]
    names = sorted(path.name for path in (out / "stages" / "small").iterdir())
    assert names[0] == LARGE and names[1].startswith(f"{LARGE}-difficulty_0.5_0.5_") and len(names) == 2
    large, *small = [trainer.train_dataset["input_ids"][0] for trainer, _ in trainings]
    assert small[0] == small[1] == [token if token < 5 else VOCAB_SIZE + 4 - token for token in large]
    # Nobody teaches a complete model.
    assert trainings[2][0].train_dataset["labels"] == [LABELS.index(row["label"]) for row in DATA]
    pretrained = AutoModel.from_pretrained(small_backbone).encoder.layer[1].output.dense.weight
    for _, start in trainings[1:]:
        assert_close(start.fastbert.layers()[1].output.dense.weight, pretrained, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--unlabeled_file", "more.tsv"],
            "there is no option --unlabeled_file more.tsv; did you mean --validation_file? --help",
        ),
        (["--seed", "one"], "argument --seed: invalid int value: 'one'; --help lists all arguments"),
        (["--exit_type", "round"], "--exit_type must be one of attention, linear, linear_mean, got 'round'"),
        (["--exit_policy", "patience"], "--exit_policy must be one of confidence, entropy, margin, got 'patience'"),
        (["--eval_speeds", "2"], "speed must be a number in [0, 1], got 2.0"),
        (["--max_train_samples", "0"], "--max_train_samples must be at least 1, got 0"),
        (
            ["--num_hidden_layers", "4"],
            "--num_hidden_layers must be from 1 to 3, fewer than the large member has",
        ),
        (
            ["--num_hidden_layers", "0"],
            "--num_hidden_layers must be from 1 to 3, fewer than the large member has",
        ),
        (["--num_folds", "1"], "--num_folds must be from 2 to 24, the number of training rows, got 1"),
        (["--seeds", "1", "1"], "--seeds must be different numbers, got 1 1"),
        (["--difficulty_margin", "1.5"], "difficulty_margin must be a number in [0, 1], got 1.5"),
        (["--difficulty_weight", "-1"], "difficulty_weight must be a finite number from 0 on, got -1.0"),
        (["--text_column", "body"], "has no column 'body'"),
        (["--train_file", "no.tsv"], "there is no file no.tsv: correct --train_file"),
        (["--dataset_name", "org/data"], "give --train_file or --dataset_name, not both"),
        (["--model_name_or_path", "no/such/folder"], "the model cannot be loaded"),
        (["--small_model_name_or_path", "no/such/folder"], "the model cannot be loaded"),
    ],
)
def test_wrong_options_end_with_one_line(error_of, options, words, message, tmp_path):
    assert message in error_of(*options, "--output_dir", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_a_small_member_ends_with_one_line(error_of, options, backbone, small_backbone, tmp_path):
    options = [*options, "--output_dir", tmp_path / "out"]
    members = ["--model_name_or_path", small_backbone, "--small_model_name_or_path", backbone]
    assert "members go from cheap to expensive" in error_of(*options, *members)
    write(tmp_path / "labelled.jsonl", [{**row, "difficulty": 2 * row["difficulty"]} for row in DATA])
    message = "the column 'difficulty' of the training data must be 0 (easy) or 1 (hard), got 2: label the rows with"
    assert message in error_of(*options, "--train_file", tmp_path / "labelled.jsonl")
    assert not (tmp_path / "out").exists()


def test_defaults_are_the_papers_rounds():
    options = CascadeOptions()
    assert (options.num_folds, options.seeds, options.num_hidden_layers) == (8, [1, 2, 3, 4, 5], 2)
    assert (options.difficulty_weight, options.difficulty_margin) == (0.5, 0.5)
