"""Both stages under `torchrun` with two CPU processes, against one process with batches twice as large."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ..common import NUM_LAYERS, assert_close, copied_state, student_names, tiny_model
from . import two_process_script
from .common import assert_moved
from .two_process_script import TRAININGS, train


ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing.:FutureWarning")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict]]:
    """What each process was left with, by training."""
    results_dir = tmp_path_factory.mktemp("two_processes")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-port", str(free_port())]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    finished = subprocess.run(
        [*launcher, two_process_script.__file__, "--results_dir", str(results_dir), "--use_cpu"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return {
        name: [torch.load(results_dir / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]
        for name in (*TRAININGS, "interrupted_stage")
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict]:
    """The same trainings in this process, with batches of 8."""
    return {name: train(name, tmp_path_factory.mktemp(name), batch_size=8) for name in TRAININGS}


@pytest.mark.parametrize("name", TRAININGS)
def test_both_processes_end_with_the_same_weights(results, name):
    first, second = results[name]
    assert first["world_size"] == second["world_size"] == 2
    assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())


@pytest.mark.parametrize("name", TRAININGS)
def test_each_stage_moves_its_own_part(results, name):
    model = tiny_model(exit_dropout=0)
    before, students = copied_state(model), student_names(model)
    model.load_state_dict(results[name][0]["weights"])
    assert_moved(model, before, students if name == "stage_two" else set(before) - students)


@pytest.mark.parametrize("name", TRAININGS)
def test_two_batches_of_4_equal_one_of_8(results, alone, name):
    assert alone[name]["world_size"] == 1
    start = copied_state(tiny_model(exit_dropout=0))
    assert max((value - start[key]).abs().max() for key, value in alone[name]["weights"].items()) > 1e-3
    for key, value in results[name][0]["weights"].items():
        assert_close(value, alone[name]["weights"][key], 1e-5)


@pytest.mark.parametrize("name", TRAININGS)
def test_predictions_and_logs_equal_those_of_one_process(results, alone, name):
    for result in results[name]:
        np.testing.assert_allclose(result["predictions"], alone[name]["predictions"], atol=1e-4)
    logs, expected = results[name][0]["logs"], alone[name]["logs"]
    assert len(logs) == len(expected) == 3
    for entry, expected_entry in zip(logs, expected, strict=True):
        losses = {key: value for key, value in entry.items() if key == "loss" or key.startswith("kl_exit")}
        assert len(losses) == (NUM_LAYERS if name == "stage_two" else 1)
        assert losses == pytest.approx({key: expected_entry[key] for key in losses}, abs=1e-4)


def test_an_interrupted_stage_goes_on_in_both_processes(results):
    for result in results["interrupted_stage"]:
        assert result["checkpoints"] == ["checkpoint-1", "checkpoint-2"]
        assert result["files"] == ["model/config.json", "model/log.json", "model/model.safetensors", "settings.json"]
        for key, value in results["stage_two"][0]["weights"].items():
            assert_close(result["weights"][key], value, 1e-6)


def test_metrics_of_stage_two_count_every_row_once(results, alone):
    assert "eval_accuracy_speed_0.8" in alone["stage_two"]["metrics"]
    for result in results["stage_two"]:
        assert result["metrics"] == pytest.approx(alone["stage_two"]["metrics"], abs=1e-4)
