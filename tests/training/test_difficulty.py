"""Which rows are hard for a model: labelled as in CascadeBERT, resumed after an interruption, and counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from fastbert_hf.training import DifficultyAwareArguments, DifficultyAwareTrainer, hard_shares, label_difficulty
from fastbert_hf.training.difficulty import split_into_folds

from ..common import tiny_model, tiny_texts, tiny_tokenizer, training_settings


def encoded_rows(number: int = 20, seed: int = 0) -> Dataset:
    """Tokenized texts of two labels that can be learnt in part: which one is at random."""
    labels = torch.randint(2, (number,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({**tiny_tokenizer()(tiny_texts(number, seed)), "labels": labels})


def small_model() -> torch.nn.Module:
    """What `set_seed` says of its new head, on a backbone that is always the same."""
    # Drawn first, as the rest sets a seed of its own.
    head = torch.randn(2, 32) / 4
    model = tiny_model(num_labels=2, exit_type="linear")
    model.teacher.out_proj.weight.data.copy_(head)
    return model


def labelling_arguments(folder, **settings) -> TrainingArguments:
    settings = {"learning_rate": 1e-3, "per_device_eval_batch_size": 4, **settings}
    return TrainingArguments(**training_settings(folder, **settings))


def label(folder, rows=None, num_folds=3, seeds=(1, 2), model_init=small_model, **settings) -> Dataset:
    rows, args = encoded_rows() if rows is None else rows, labelling_arguments(folder, **settings)
    return label_difficulty(model_init, args, rows, num_folds, seeds, processing_class=tiny_tokenizer())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Dataset]:
    """The folder that an undisturbed labelling leaves, and its rows."""
    folder = tmp_path_factory.mktemp("labelled")
    return folder, label(folder)


@pytest.fixture
def labelled(finished) -> Dataset:
    return finished[1]


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of the folder that an undisturbed labelling leaves."""
    return Path(shutil.copytree(finished[0], tmp_path / "labelled"))


def label_slowly(folder, rows: Dataset, num_folds: int, seeds: tuple[int, ...], **settings) -> list[int]:
    """Section 3.2 of the paper, row by row."""
    wrong = {row: 0 for row in range(len(rows))}
    for seed in seeds:
        for fold in split_into_folds(len(rows), num_folds):
            set_seed(seed)
            model = small_model()
            trainer = Trainer(
                model,
                labelling_arguments(folder, seed=seed, **settings),
                train_dataset=rows.select([row for row in range(len(rows)) if row not in fold]),
                data_collator=DataCollatorWithPadding(tiny_tokenizer()),
            )
            trainer.train()
            model.eval()
            for row in fold.tolist():
                with torch.no_grad():
                    answer = model(torch.tensor([rows[row]["input_ids"]])).logits.argmax().item()
                wrong[row] += answer != rows[row]["labels"]
    return [int(wrong[row] > 0) for row in range(len(rows))]


@pytest.fixture
def trainings(monkeypatch) -> list[tuple[int, int]]:
    """The seed and the number of rows of every training that is started."""
    started, original = [], Trainer.train

    def count(self, *args, **kwargs):
        started.append((self.args.seed, len(self.train_dataset)))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", count)
    return started


def test_labels_are_those_of_the_paper_done_row_by_row(tmp_path, labelled):
    assert labelled["difficulty"][:] == label_slowly(tmp_path, encoded_rows(), 3, (1, 2))
    assert set(labelled["difficulty"]) == {0, 1}


def test_rows_grouped_by_length_keep_their_own_labels(tmp_path):
    settings = {"num_folds": 2, "seeds": (1,), "train_sampling_strategy": "group_by_length"}
    labelled = label(tmp_path / "labels", **settings)
    assert labelled["difficulty"][:] == label_slowly(tmp_path, encoded_rows(), **settings)
    assert set(labelled["difficulty"]) == {0, 1}


def test_difficulty_is_a_column_that_collates_beside_those_that_were_there(labelled):
    assert labelled.features["difficulty"] == ClassLabel(names=["easy", "hard"])
    assert labelled.remove_columns("difficulty")[:] == encoded_rows()[:]
    batch = DataCollatorWithPadding(tiny_tokenizer())([labelled[row] for row in range(3)])
    assert batch["difficulty"].tolist() == labelled["difficulty"][:3]


def test_easy_rows_are_answered_rightly_under_every_seed(folder, labelled):
    alone = [np.array(label(folder, seeds=(seed,))["difficulty"]) for seed in (1, 2)]
    assert (alone[0] != alone[1]).any()
    assert labelled["difficulty"][:] == (alone[0] | alone[1]).tolist()


def test_each_training_leaves_a_small_file_and_nothing_else(tmp_path, capsys, labelled, trainings):
    evaluating = {"eval_strategy": "epoch", "eval_on_start": True}
    evaluating |= {"prediction_loss_only": True, "eval_do_concat_batches": False}
    saving = {"save_strategy": "epoch", "load_best_model_at_end": True, "push_to_hub": True}
    assert label(tmp_path, **evaluating, **saving)["difficulty"][:] == labelled["difficulty"][:]
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    names = [f"seed_{seed}/fold_{fold}_of_3.json" for seed in (1, 2) for fold in (1, 2, 3)]
    assert files == [*names, "settings.json"]
    contents = [json.loads((tmp_path / name).read_text()) for name in names]
    wrong = {row for content in contents for row in content["wrong"]}
    assert wrong == {row for row, hard in enumerate(labelled["difficulty"]) if hard}
    for content, fold in zip(contents, 2 * split_into_folds(20, 3), strict=True):
        assert content["rows"] == len(fold)
        assert set(content["wrong"]) <= set(fold.tolist())
    assert trainings == [(seed, rows) for seed in (1, 2) for rows in (13, 13, 14)]
    printed = capsys.readouterr()
    assert printed.out == "" and "Labelling" not in printed.err


def test_progress_counts_the_trainings(tmp_path, capsys):
    label(tmp_path, seeds=(1,), disable_tqdm=False)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.replace("\r", "\n").splitlines() if line.strip()]
    assert "3/3" in lines[-1]
    # The trainings show nothing of their own.
    assert all(line.startswith("Labelling difficulty") for line in lines) and printed.out == ""


def test_an_interrupted_labelling_goes_on(tmp_path, monkeypatch, labelled, trainings):
    counted = Trainer.train

    def stop(self, *args, **kwargs):
        if len(trainings) == 4:
            raise KeyboardInterrupt
        return counted(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            label(tmp_path)
    assert len(list(tmp_path.rglob("fold_*.json"))) == 4
    assert label(tmp_path)["difficulty"][:] == labelled["difficulty"][:]
    assert len(trainings) == 6


def test_nothing_is_repeated_and_seeds_can_be_added(folder, labelled, trainings):
    # What does not change the answers may differ.
    saving = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True, "eval_delay": 1}
    again = label(folder, per_device_eval_batch_size=7, logging_steps=2, **saving)
    assert again["difficulty"][:] == labelled["difficulty"][:]
    assert not trainings
    label(folder, seeds=(2, 3))
    assert [seed for seed, _ in trainings] == [3, 3, 3]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_folds": 2}, "num_folds was 3 and is 2"),
        ({"rows": encoded_rows(seed=1)}, "data was '.*' and is '.*'"),
        ({"learning_rate": 0.5}, "learning_rate was 0.001 and is 0.5"),
        ({"weight_decay": 0.1}, "weight_decay was None and is 0.1"),
        ({"model_init": lambda: tiny_model(num_labels=2, seed=1)}, "model was '.*' and is '.*'"),
    ],
)
def test_a_folder_of_other_settings_is_refused(folder, changed, message, trainings):
    with pytest.raises(ValueError, match=rf"other settings \({message}\): give another output_dir"):
        label(folder, **changed)
    assert not trainings


def test_a_folder_without_finished_trainings_takes_other_settings(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            label(tmp_path, learning_rate=0.5)
    assert len(label(tmp_path, seeds=(1,))) == 20


@pytest.mark.parametrize(("num_rows", "num_folds"), [(20, 2), (20, 3), (20, 8), (20, 20), (1000, 8)])
def test_folds_partition_the_rows(num_rows, num_folds):
    folds, again = (split_into_folds(num_rows, num_folds) for _ in range(2))
    assert len(folds) == num_folds
    assert sorted(np.concatenate(folds).tolist()) == list(range(num_rows))
    sizes = [len(fold) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    assert all(np.array_equal(fold, other) for fold, other in zip(folds, again, strict=True))
    # At random: neighbours do not share a fold.
    if num_rows == 1000:
        together = sum((np.diff(fold) == 1).sum() for fold in folds)
        assert 80 < together < 170


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_folds": 1}, "num_folds must be from 2 to 20, the number of rows, got 1"),
        ({"num_folds": 21}, "num_folds must be from 2 to 20, the number of rows, got 21"),
        ({"seeds": ()}, r"seeds must be one or more different numbers, got \[\]"),
        ({"seeds": (1, 2, 1)}, r"seeds must be one or more different numbers, got \[1, 2, 1\]"),
        ({"rows": encoded_rows().select([])}, "the dataset has no rows"),
        (
            {"rows": encoded_rows().rename_column("labels", "label")},
            "no column 'labels', only .*Example: dataset",
        ),
        ({"rows": encoded_rows().remove_columns("input_ids")}, "no column 'input_ids', only .*Example: dataset"),
        ({"rows": encoded_rows().add_column("difficulty", [0] * 20)}, r"already.*remove_columns\('difficulty'\)"),
        (
            {"rows": encoded_rows().remove_columns("labels").add_column("labels", [0.5] * 20)},
            "labels must be the ids of classes, numbers such as 0 and 1, got float",
        ),
    ],
)
def test_what_cannot_be_labelled_is_refused_before_any_training(tmp_path, arguments, message, trainings):
    with pytest.raises(ValueError, match=message):
        label(tmp_path, **arguments)
    assert not trainings and not list(tmp_path.iterdir())


def test_hard_shares_of_each_label_and_of_all():
    rows = Dataset.from_dict({"labels": [0, 0, 2, 2, 2, 2], "difficulty": [0, 1, 1, 0, 0, 0]})
    assert hard_shares(rows) == {"0": 0.5, "2": 0.25, "all": pytest.approx(1 / 3)}
    assert hard_shares(rows.with_format("torch"), ["no", "so", "yes"]) == hard_shares(rows, ("no", "so", "yes"))
    assert list(hard_shares(rows, ["no", "so", "yes"])) == ["no", "yes", "all"]


@pytest.mark.parametrize("missing", ["labels", "difficulty", "rows"])
def test_hard_shares_need_labelled_rows(missing):
    rows = Dataset.from_dict({"labels": [0, 1], "difficulty": [0, 1]})
    rows = rows.select([]) if missing == "rows" else rows.remove_columns(missing)
    with pytest.raises(ValueError, match=r"need rows with 'labels' and 'difficulty', got [02] rows with"):
        hard_shares(rows)


def test_labelled_rows_train_the_trainer(tmp_path, labelled):
    arguments = DifficultyAwareArguments(**training_settings(tmp_path))
    trainer = DifficultyAwareTrainer(
        small_model(), arguments, train_dataset=labelled, processing_class=tiny_tokenizer()
    )
    trainer.train()
    assert all(entry["difficulty_loss"] >= 0 for entry in trainer.state.log_history if "loss" in entry)
