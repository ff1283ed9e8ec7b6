from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, BertModel, BertTokenizer, Trainer, pipeline

from fastbert_hf import CascadeForSequenceClassification, FastBertForSequenceClassification

from ..common import (
    VOCAB_SIZE,
    assert_close,
    spread_out,
    tiny_text_config,
    tiny_texts,
    tiny_tokenizer,
)


SCRIPT = Path(__file__).parent.parent.parent / "examples" / "run_cascade.py"
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


@pytest.fixture
def rows():
    texts = tiny_texts(ROWS)
    return [
        {"label": LABELS[index % 2], "text": text, "other": texts[-index - 1], "difficulty": index // 2 % 2}
        for index, text in enumerate(texts)
    ]


@pytest.fixture
def arguments(tmp_path, backbone, rows):
    path = tmp_path / "rows.jsonl"
    write(tmp_path / "labelled.jsonl", rows)
    write(path, [{name: row[name] for name in ("label", "text", "other")} for row in rows])
    words = f"--model_name_or_path {backbone} --train_file {path} --validation_file {path} --use_cpu --num_folds 2"
    words += " --seeds 1 --num_train_epochs 1 --per_device_train_batch_size 8 --learning_rate 0.001"
    return f"{words} --eval_speeds 0 0.3 0.6 0.8 1 --output_dir {tmp_path / 'out'}".split()


@pytest.fixture
def trainings(monkeypatch):
    """What was trained on what, in order: the trainer, with its model as it was before."""
    seen, original = [], Trainer.train

    def remember(self, *args, **kwargs):
        seen.append((self, copy.deepcopy(self.model)))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", remember)
    return seen


def table_of(printed: str, header: str) -> dict[str, list[float]]:
    """The numbers below a header, by what is left of them."""
    lines = printed.split(header)[1].split("\n\n")[0].splitlines()[1:]
    cells = [re.split(r" {2,}", line.strip()) for line in lines]
    return {name: [float(value.rstrip("%x")) for value in values] for name, *values in cells}


def folders(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out" / "stages").iterdir())


def assert_table_is_what_the_cascade_does(printed: str, folder: Path, rows: list[dict], pairs: bool = False) -> None:
    """Every number of the table of speeds that the answers themselves can tell."""
    cascade = CascadeForSequenceClassification.from_pretrained(folder)
    texts = cascade.encode([row["text"] for row in rows], [row["other"] for row in rows] if pairs else None)
    full = [answer.logits.argmax().item() for answer in cascade.predict(texts, speed=0)]
    gold = [LABELS.index(row["label"]) for row in rows]
    table = table_of(printed, "\n speed")
    assert list(table) == ["0", "0.3", "0.5", "0.6", "0.8", "1"]
    for speed, (accuracy, agreement, layers, fewer_layers, _, small, large) in table.items():
        answers = list(cascade.predict(texts, speed=float(speed)))
        labels = torch.tensor([answer.logits.argmax().item() for answer in answers])
        mean_layers = sum(answer.exit_layer for answer in answers) / len(rows)
        shares = [sum(answer.exit_member == member for answer in answers) / len(rows) for member in (1, 2)]
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


def assert_answers_are_the_cascades(printed: str, folder: Path, rows: list[dict], pairs: bool = False) -> None:
    classifier = pipeline("fast-text-classification", model=str(folder))
    shown = re.findall(r"^  (no|yes) \((\d+)%, (small|large), (\d) layers\)  (word.*)$", printed, re.MULTILINE)
    assert len(shown) == 4
    for (label, score, member, layers, text), row in zip(shown, rows[:: ROWS // 4], strict=True):
        given = {"text": row["text"], **({"text_pair": row["other"]} if pairs else {})}
        answer = classifier(given, speed=0.5)
        answer = answer[0] if isinstance(answer, list) else answer
        assert text == " / ".join(given.values())
        assert (label, int(layers)) == (answer["label"], answer["exit_layer"])
        assert member == ("small", "large")[answer["exit_member"] - 1]
        assert int(score) == pytest.approx(100 * answer["score"], abs=0.51)


def test_all_stages_leave_a_cascade_that_answers(run, arguments, rows, trainings, tmp_path):
    printed = run(*arguments)
    out, stages = tmp_path / "out", tmp_path / "out" / "stages"
    assert_table_is_what_the_cascade_does(printed, out, rows)
    quality = table_of(printed, "\nsmall member")
    assert list(quality) == ["after stage 2", "after stage 4"]
    assert all(len(values) == 3 and all(0 <= value <= 100 for value in values) for values in quality.values())
    assert quality["after stage 4"][1] == table_of(printed, "\n speed")["1"][0]
    shares = re.search(r"Hard rows: no (.*)%, yes (.*)%, all (.*)%\.", printed).groups()
    wrong = {row for path in stages.rglob("fold_*.json") for row in json.loads(path.read_text())["wrong"]}
    assert float(shares[2]) == pytest.approx(100 * len(wrong) / ROWS, abs=0.051)

    difficulty, large, taught, aware = folders(tmp_path)
    assert (difficulty, large, taught) == ("difficulty-linear_mean_2", LARGE, TAUGHT)
    assert aware.startswith(f"{TAUGHT}-difficulty_0.5_0.5_")
    kinds = [type(trainer).__name__ for trainer, _ in trainings]
    assert kinds == ["Trainer"] * 4 + ["DifficultyAwareTrainer"]
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

    assert_answers_are_the_cascades(printed, out, rows)

    card = ModelCard.load(out / "README.md")
    for speed, (accuracy, *_) in table_of(printed, "\n speed").items():
        assert f"\n| {speed} | {accuracy:.1f}% |" in card.text
    assert f"Measured on {ROWS} texts" in card.text and "| difficulty_margin | 0.5 |" in card.text
    assert str(tmp_path) not in str(card)


def test_finished_stages_are_not_repeated(run, arguments, trainings, tmp_path):
    before = run(*arguments)
    trainings.clear()
    again = run(*arguments)
    assert not trainings
    tables = [printed[printed.index("\nsmall member") :] for printed in (before, again)]
    assert tables[0] == tables[1]
    # Another margin needs no other labels of difficulty.
    run(*arguments, "--difficulty_margin", 0.1, "--difficulty_weight", 2)
    ((trainer, _),) = trainings
    assert (trainer.args.difficulty_margin, trainer.args.difficulty_weight) == (0.1, 2)
    assert len(folders(tmp_path)) == 5
    # One more round labels more rows as hard, and stage 4 learns from them.
    trainings.clear()
    run(*arguments, "--seeds", 1, 2)
    assert [type(trainer).__name__ for trainer, _ in trainings] == ["Trainer", "Trainer", "DifficultyAwareTrainer"]
    with pytest.raises(SystemExit, match=r"learning_rate was 0.001 and is 0.5\): give another output_dir"):
        run(*arguments, "--learning_rate", 0.5)


def test_pairs_without_difficulty(run, arguments, rows, trainings, tmp_path):
    words = "--no_difficulty --text_pair_column other --exit_type linear --exit_policy entropy".split()
    printed = run(*arguments, *words)
    assert_table_is_what_the_cascade_does(printed, tmp_path / "out", rows, pairs=True)
    assert_answers_are_the_cascades(printed, tmp_path / "out", rows, pairs=True)
    assert list(table_of(printed, "\nsmall member")) == ["after stage 2"]
    assert folders(tmp_path) == ["linear_shared-fine_tuning", "linear_shared-fine_tuning-distillation_2"]
    assert len(trainings) == 2
    assert "Hard rows" not in printed and "Stage 3" not in printed
    config = CascadeForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert config.exit_policy == "entropy"
    assert "difficulty_margin" not in (tmp_path / "out" / "README.md").read_text()


def test_labelled_rows_are_used_as_they_are(run, arguments, rows, trainings, tmp_path):
    words = ["--train_file", tmp_path / "labelled.jsonl", "--no_knowledge_distillation"]
    printed = run(*arguments, *words)
    assert "Hard rows: no 50.0%, yes 50.0%, all 50.0%." in printed and "Stage 3" not in printed
    assert [type(trainer).__name__ for trainer, _ in trainings] == ["Trainer", "Trainer", "DifficultyAwareTrainer"]
    assert trainings[2][0].train_dataset["difficulty"] == [row["difficulty"] for row in rows]
    # Without a teacher both trainings of the small member start alike, from the pretrained layers.
    gold = [LABELS.index(row["label"]) for row in rows]
    pretrained = AutoModel.from_pretrained(arguments[1]).encoder.layer[1].output.dense.weight
    for trainer, start in trainings[1:]:
        assert trainer.train_dataset["labels"] == gold
        assert_close(start.fastbert.layers()[1].output.dense.weight, pretrained, 0)
    first, second = (start.state_dict() for _, start in trainings[1:])
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_complete_small_model_keeps_its_tokenizer(run, arguments, rows, trainings, small_backbone, tmp_path):
    words = ["--small_model_name_or_path", small_backbone, "--train_file", tmp_path / "labelled.jsonl"]
    printed = run(*arguments, *words)
    assert_table_is_what_the_cascade_does(printed, tmp_path / "out", rows)
    assert CascadeForSequenceClassification.from_pretrained(tmp_path / "out").config.own_tokenizers
    assert folders(tmp_path) == [LARGE, "small"]
    names = sorted(path.name for path in (tmp_path / "out" / "stages" / "small").iterdir())
    assert names[0] == LARGE and names[1].startswith(f"{LARGE}-difficulty_0.5_0.5_") and len(names) == 2
    large, *small = [trainer.train_dataset["input_ids"][0] for trainer, _ in trainings]
    assert small[0] == small[1] == [token if token < 5 else VOCAB_SIZE + 4 - token for token in large]
    # Nobody teaches a complete model.
    assert trainings[2][0].train_dataset["labels"] == [LABELS.index(row["label"]) for row in rows]
    pretrained = AutoModel.from_pretrained(small_backbone).encoder.layer[1].output.dense.weight
    for _, start in trainings[1:]:
        assert_close(start.fastbert.layers()[1].output.dense.weight, pretrained, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
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
def test_wrong_arguments_end_with_one_line(error_of, arguments, words, message, tmp_path):
    assert message in error_of(*arguments, *words)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_a_small_member_ends_with_one_line(
    error_of, arguments, backbone, small_backbone, rows, tmp_path
):
    members = ["--model_name_or_path", small_backbone, "--small_model_name_or_path", backbone]
    assert "members go from cheap to expensive" in error_of(*arguments, *members)
    write(tmp_path / "labelled.jsonl", [{**row, "difficulty": 2 * row["difficulty"]} for row in rows])
    labelled = ["--train_file", tmp_path / "labelled.jsonl"]
    message = "the column 'difficulty' of the training data must be 0 (easy) or 1 (hard), got 2: label the rows with"
    assert message in error_of(*arguments, *labelled)
    assert not (tmp_path / "out").exists()


def test_defaults_are_the_papers_rounds_and_the_reviews(script):
    arguments = script.ScriptArguments()
    assert (arguments.num_folds, arguments.seeds, arguments.num_hidden_layers) == (8, [1, 2, 3, 4, 5], 2)
    assert (arguments.difficulty_weight, arguments.difficulty_margin) == (0.5, 0.5)
    assert (script.DATA_DIR / "train.tsv").is_file() and (script.DATA_DIR / "test.tsv").is_file()


def test_help_loads_no_model_code():
    code = f"import runpy, sys; sys.argv = [{str(SCRIPT)!r}, '--help']; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
    code += "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally:\n    print([name for name in sys.modules if name in ('torch', 'fastbert_hf', 'datasets')])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--no_difficulty" in output and "--unlabeled_file" not in output and output.splitlines()[-1] == "[]"
