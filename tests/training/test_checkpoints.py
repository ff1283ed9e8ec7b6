"""`last_checkpoint`: a checkpoint that was cut off at any of its files gives way to the one before it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastbert_hf.training import ExitTraining, run_stage
from fastbert_hf.training.checkpoints import last_checkpoint

from ..common import changed_parameters, copied_state, tiny_model, tiny_rows, tiny_tokenizer
from .common import Interrupted, Stop


def trainer_of(output_dir: str, stop_at: int | None = None):
    """A trainer of six steps that saves after every second one."""
    settings = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "per_device_train_batch_size": 8}
    settings |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trainer = ExitTraining(1e-3).make_trainer(
        output_dir, tiny_model(), tiny_rows(16), None, tiny_tokenizer(), **settings
    )
    if stop_at is not None:
        trainer.add_callback(Stop(stop_at))
    return trainer


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """The folder of a training that was interrupted after its checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Interrupted):
        run_stage(folder, {}, lambda output_dir: trainer_of(output_dir, stop_at=5))
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    return folder


@pytest.mark.parametrize("left", [0, 0.5, 0.99], ids=lambda left: f"left-{left}")
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_checkpoint_that_was_cut_off_gives_way_to_the_one_before(interrupted, tmp_path, name, left):
    folder = shutil.copytree(interrupted, tmp_path / "stage")
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    file = folder / "checkpoint-4" / name
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content))])
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")


def test_a_checkpoint_without_its_state_gives_way_to_the_one_before(interrupted, tmp_path):
    folder = shutil.copytree(interrupted, tmp_path / "stage")
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")


def test_folders_of_other_names_are_no_checkpoints(interrupted, tmp_path):
    for name in ("checkpoint-", "checkpoint-best", "checkpoint-9-old"):
        shutil.copytree(interrupted / "checkpoint-2", tmp_path / name)
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_training_goes_on_from_the_checkpoint_before_a_broken_one(interrupted, tmp_path):
    folder = shutil.copytree(interrupted, tmp_path / "stage")
    state = folder / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    trainers = []
    model_dir = run_stage(
        folder, {}, lambda output_dir: trainers.append(trainer_of(output_dir, stop_at=0)) or trainers[0]
    )
    whole = run_stage(tmp_path / "whole", {}, trainer_of)
    expected = copied_state(type(tiny_model()).from_pretrained(whole))
    assert changed_parameters(type(tiny_model()).from_pretrained(model_dir), expected) == set()
    assert not list(folder.glob("checkpoint-*"))
