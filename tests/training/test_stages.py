"""`run_stage`: a stage is trained once, resumed where it stopped, kept whole, and refused with other settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.files import move_whole, write_whole
from fastbert_hf.training import DifficultyAwareFineTuning, Distillation, ExitTraining, FineTuning, StageSettings
from fastbert_hf.training.checked_trainer import CheckedTrainer
from fastbert_hf.training.checkpoints import last_checkpoint
from fastbert_hf.training.settings_files import changes_the_model, check_settings
from fastbert_hf.training.stages import (
    Stage,
    copy_weights,
    is_finished,
    run_stage,
    with_answers,
)

from ..common import assert_close, copied_state, tiny_model, tiny_texts, tiny_tokenizer
from .common import Interrupted, Stop


FINE_TUNING = FineTuning(1e-3, 2)
SETTINGS = FINE_TUNING.settings()
ARGUMENTS = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "per_device_train_batch_size": 8}


def rows(number: int = 24) -> Dataset:
    labels = [index % 3 for index in range(number)]
    return Dataset.from_dict({**tiny_tokenizer()(tiny_texts(number)), "labels": labels})


def stage_run(folder: Path, stage: Stage = FINE_TUNING, stop_at: int | None = None, **kwargs) -> Path:
    """Run a stage of six steps on the tiny model, interrupted at a step if one is given."""

    def make_trainer(output_dir: str) -> Trainer:
        arguments = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", **ARGUMENTS}
        trainer = stage.make_trainer(output_dir, tiny_model(), rows(), rows(8), tiny_tokenizer(), **arguments)
        if stop_at is not None:
            trainer.add_callback(Stop(stop_at))
        return trainer

    return run_stage(folder, SETTINGS, make_trainer, **kwargs)


def never(output_dir: str) -> Trainer:
    raise AssertionError("a finished stage was trained again")


def weights(model_dir: Path) -> dict[str, torch.Tensor]:
    return copied_state(FastBertForSequenceClassification.from_pretrained(model_dir))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    return stage_run(tmp_path_factory.mktemp("stage"))


def test_a_finished_stage_holds_its_model_tokenizer_log_and_settings_alone(uninterrupted):
    folder = uninterrupted.parent
    assert uninterrupted == folder / "model"
    assert {path.name for path in folder.iterdir()} == {"model", "settings.json"}
    assert json.loads((folder / "settings.json").read_text()) == SETTINGS
    names = {"config.json", "model.safetensors", "log.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in uninterrupted.iterdir()} == names
    assert json.loads((uninterrupted / "log.json").read_text())[-1]["step"] == 6
    assert AutoTokenizer.from_pretrained(uninterrupted)("word7").input_ids == tiny_tokenizer()("word7").input_ids


def test_a_finished_stage_is_not_trained_again(uninterrupted):
    assert run_stage(uninterrupted.parent, SETTINGS, never) == uninterrupted
    assert is_finished(uninterrupted)


@pytest.mark.parametrize("stage", [FINE_TUNING, ExitTraining(1e-3, 2)], ids=lambda stage: stage.name)
def test_an_interrupted_stage_goes_on_from_its_last_checkpoint(tmp_path, stage):
    with pytest.raises(Interrupted):
        stage_run(tmp_path / "interrupted", stage, stop_at=5)
    assert not is_finished(tmp_path / "interrupted" / "model")
    # A checkpoint that was not written to its end does not count.
    (tmp_path / "interrupted" / "checkpoint-5").mkdir()
    assert last_checkpoint(tmp_path / "interrupted") == str(tmp_path / "interrupted" / "checkpoint-4")
    model_dir = stage_run(tmp_path / "interrupted", stage, stop_at=0)  # it does not begin anew
    assert not list((tmp_path / "interrupted").glob("checkpoint-*"))
    log = json.loads((model_dir / "log.json").read_text())
    assert log[-1]["step"] == 6 and log[-1]["train_runtime"] > 0
    expected = weights(stage_run(tmp_path / "whole", stage))
    assert all(torch.equal(value, expected[name]) for name, value in weights(model_dir).items())


def test_an_interrupted_save_leaves_no_model_and_is_repeated(tmp_path, monkeypatch):
    def stop(self, output_dir=None, _internal_call=False):
        if Path(output_dir).name == "part":
            Path(output_dir).mkdir()
            Path(output_dir, "leftover.txt").touch()
            raise Interrupted
        return save_model(self, output_dir, _internal_call)

    save_model = Trainer.save_model
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_model", stop)
        with pytest.raises(Interrupted):
            stage_run(tmp_path)
    assert not is_finished(tmp_path / "model")
    model_dir = stage_run(tmp_path)
    assert "leftover.txt" not in {path.name for path in model_dir.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "settings.json"}


def test_the_model_may_go_beside_other_files(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    assert stage_run(tmp_path / "stage", model_dir=tmp_path) == tmp_path
    assert (tmp_path / "notes.md").read_text() == "mine"
    assert weights(tmp_path)
    assert {path.name for path in (tmp_path / "stage").iterdir()} == {"settings.json"}
    assert run_stage(tmp_path / "stage", SETTINGS, never, model_dir=tmp_path) == tmp_path


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_and_each_difference_is_named(tmp_path, finished):
    folder = tmp_path / "stage"
    write_whole(folder / "settings.json", json.dumps({"learning_rate": 0.001, "seed": 1, "bf16": True}))
    if finished:
        write_whole(folder / "model" / "config.json", "{}")
    else:
        write_whole(folder / "checkpoint-2" / "trainer_state.json", "{}")
    expected = (
        r"stage holds a training with other settings \(bf16 was True and is None, learning_rate was 0.001 and is "
    )
    expected += r"0.5, warmup was None and is 3\): give another output_dir, or delete the folder"
    with pytest.raises(ValueError, match=expected):
        run_stage(folder, {"learning_rate": 0.5, "seed": 1, "warmup": 3}, never)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"learning_rate": 1, "size of train_file": 812}',
            "by an earlier version, which knew its files by their sizes",
        ),
        ('{"learning_rate": 1, "see', r"settings\.json is no JSON \(Unterminated string"),
    ],
)
def test_settings_that_tell_nothing_say_what_to_do(tmp_path, content, message):
    write_whole(tmp_path / "model" / "config.json", "{}")
    write_whole(tmp_path / "settings.json", content)
    with pytest.raises(ValueError, match=rf"{message}.*: give another output_dir, or delete the folder"):
        run_stage(tmp_path, {"learning_rate": 1}, never)


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    def broken(output_dir: str) -> Trainer:
        model = tiny_model()
        trainer = Trainer(model, TrainingArguments(output_dir, **ARGUMENTS), train_dataset=rows(8))
        trainer.train = lambda **kwargs: model.teacher.out_proj.weight.data.fill_(float("nan"))
        return trainer

    with pytest.raises(ValueError, match=r"weights that are NaN or infinite: exits\.3\.out_proj\.weight"):
        run_stage(tmp_path, {}, broken)
    assert not is_finished(tmp_path / "model")


@pytest.mark.parametrize("stage", [FineTuning(), ExitTraining()], ids=lambda stage: stage.name)
def test_a_share_of_warm_up_leaves_a_step_to_learn(tmp_path, stage):
    def steps(number: int, **settings) -> int:
        return stage.make_arguments(tmp_path, **settings, **ARGUMENTS).get_warmup_steps(number)

    assert [steps(number) for number in (1, 2, 10, 11, 100)] == [0, 1, 1, 2, 10]
    assert [steps(1, warmup_steps=share) for share in (0, 0.9)] == [0, 0]
    # A number of steps is what its owner wants.
    assert steps(3, warmup_steps=7) == 7


def test_a_folder_without_results_takes_other_settings(tmp_path):
    check_settings(tmp_path, {"learning_rate": 0.5}, in_use=False)
    check_settings(tmp_path, {"learning_rate": 1.0, "labels": ("a", "b")}, in_use=False)
    check_settings(tmp_path, {"learning_rate": 1.0, "labels": ["a", "b"]}, in_use=True)
    with pytest.raises(ValueError, match=r"learning_rate was 1\.0 and is 2\.0"):
        check_settings(tmp_path, {"learning_rate": 2.0, "labels": ["a", "b"]}, in_use=True)


def test_a_model_of_unknown_settings_is_refused(tmp_path):
    write_whole(tmp_path / "model" / "config.json", "{}")
    with pytest.raises(ValueError, match=r"without the settings of its training.*give another output_dir"):
        run_stage(tmp_path, SETTINGS, never)
    # Unless the caller has checked them elsewhere.
    assert run_stage(tmp_path, None, never) == tmp_path / "model"


def test_arguments_that_change_nothing_are_no_settings():
    names = (
        "use_cpu",
        "logging_steps",
        "report_to",
        "per_device_eval_batch_size",
        "dataloader_num_workers",
        "run_name",
    )
    assert not any(map(changes_the_model, names))
    names = ("learning_rate", "seed", "bf16", "load_best_model_at_end", "dataloader_drop_last", "save_steps")
    assert all(map(changes_the_model, names))


@pytest.mark.parametrize(
    ("stage", "name", "trains_backbone", "trains_students", "needs_labels"),
    [
        (FineTuning(), "fine_tuning", True, False, True),
        (Distillation(), "distillation", True, False, True),
        (DifficultyAwareFineTuning(difficulty_margin=0.3), "difficulty_0.5_0.3", True, False, True),
        (ExitTraining(), "self_distillation", False, True, False),
        (ExitTraining(objective="frozen_cross_entropy"), "frozen_cross_entropy", False, True, True),
        (ExitTraining(objective="joint_cross_entropy"), "joint_cross_entropy", True, True, True),
    ],
)
def test_stages_know_what_they_train(stage, name, trains_backbone, trains_students, needs_labels):
    assert stage.name == name
    assert (stage.trains_backbone, stage.trains_students) == (trains_backbone, trains_students)
    assert stage.needs_labels == needs_labels


def test_settings_reach_the_arguments_of_the_trainer(tmp_path):
    stage = ExitTraining(reverse_kl=True).with_settings(StageSettings(0.5, 7, temperature=2.0))
    trainer = stage.make_trainer(tmp_path, tiny_model(), rows(8), None, tiny_tokenizer(), **ARGUMENTS, seed=3)
    args = trainer.args
    assert (args.learning_rate, args.num_train_epochs, args.temperature, args.seed) == (0.5, 7, 2.0, 3)
    assert args.reverse_kl and args.objective == "self_distillation"
    assert args.eval_strategy == args.save_strategy == "no"
    assert stage.settings() == {"learning_rate": 0.5, "num_train_epochs": 7, "temperature": 2.0, "reverse_kl": True}
    joint = ExitTraining(objective="joint_cross_entropy").with_settings(StageSettings(0.5, 7))
    assert joint.settings() == FineTuning(0.5, 7).settings() == {"learning_rate": 0.5, "num_train_epochs": 7}
    hard = DifficultyAwareFineTuning(0.5, 7, difficulty_weight=2.0, difficulty_margin=0.1)
    trainer = hard.make_trainer(tmp_path, tiny_model(), rows(8), rows(8), tiny_tokenizer(), **ARGUMENTS)
    assert (trainer.args.difficulty_weight, trainer.args.difficulty_margin) == (2.0, 0.1)
    assert type(FineTuning().make_trainer(tmp_path, tiny_model(), rows(8), None, None, **ARGUMENTS)) is CheckedTrainer


def test_answers_take_the_place_of_labels():
    model = tiny_model()
    answered = with_answers(model, rows(5), tiny_tokenizer())
    assert answered.remove_columns("labels")[:] == rows(5).remove_columns("labels")[:]
    with torch.no_grad():
        expected = model(**tiny_tokenizer()(tiny_texts(5), padding=True, return_tensors="pt")).logits.softmax(-1)
    assert_close(torch.tensor(answered["labels"][:]), expected)


def test_weights_of_equal_structure_are_copied():
    source, target = tiny_model(), tiny_model(seed=1, exit_type="linear", teacher_exit_type="attention")
    students = copied_state(target.students)
    copy_weights(source, target)
    own, given = target.state_dict(), source.state_dict()
    same = {name for name in own if name in given and torch.equal(own[name], given[name])}
    assert {name for name in own if name.startswith(("fastbert.", "exits.3."))} == same
    assert all(torch.equal(value, students[name]) for name, value in target.students.state_dict().items())


def test_a_file_is_moved_last_and_others_stay(tmp_path):
    part, folder = tmp_path / "part", tmp_path / "folder"
    for name in ("a.json", "config.json", "z.json"):
        write_whole(part / name, name)
    write_whole(folder / "other.json", "other")
    (folder / "z.json").mkdir()  # which cannot be replaced by a file
    with pytest.raises(OSError):
        move_whole(part, folder, last="config.json")
    assert not (folder / "config.json").exists()
    (folder / "z.json").rmdir()
    move_whole(part, folder, last="config.json")
    assert {path.name for path in folder.iterdir()} == {"a.json", "config.json", "other.json", "z.json"}
    assert not part.exists()


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path):
    write_whole(tmp_path / "a.txt", "whole")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a.txt", "half\ud800")
    assert (tmp_path / "a.txt").read_text() == "whole"
