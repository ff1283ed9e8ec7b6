"""The arguments of the trainers: the paper's settings for stage 2, and what an evaluation speed may be."""

from __future__ import annotations

import json
import math

import pytest
from transformers import HfArgumentParser, TrainingArguments

from fastbert_hf import SelfDistillationArguments
from fastbert_hf.training import OBJECTIVES, ExitTrainingArguments


def test_defaults_are_the_settings_of_the_paper(tmp_path):
    args = SelfDistillationArguments(str(tmp_path), use_cpu=True)
    assert isinstance(args, TrainingArguments)
    assert (args.learning_rate, args.num_train_epochs, args.warmup_steps) == (2e-4, 5, 0.1)
    assert args.eval_speeds == [0.1, 0.5, 0.8]
    assert args.reverse_kl is False
    assert args.get_warmup_steps(1000) == 100


def test_default_speeds_are_not_shared_between_instances(tmp_path):
    SelfDistillationArguments(str(tmp_path), use_cpu=True).eval_speeds.append(0.9)
    assert SelfDistillationArguments(str(tmp_path), use_cpu=True).eval_speeds == [0.1, 0.5, 0.8]


@pytest.mark.parametrize("speeds", [[0], [1], [0.0, 1.0], (0.25,), []])
def test_speeds_in_the_unit_interval_are_accepted(tmp_path, speeds):
    assert SelfDistillationArguments(str(tmp_path), use_cpu=True, eval_speeds=speeds).eval_speeds == speeds


@pytest.mark.parametrize("speed", [-0.1, 1.1, math.nan, math.inf, True, "0.5", None, [0.5]])
@pytest.mark.parametrize("place", ["first", "last"])
def test_other_speeds_are_refused(tmp_path, speed, place):
    speeds = [speed, 0.5] if place == "first" else [0.5, speed]
    with pytest.raises(ValueError, match=r"speed must be a number in \[0, 1\], got .*Example: speed=0.5"):
        SelfDistillationArguments(str(tmp_path), use_cpu=True, eval_speeds=speeds)


def test_command_line_sets_every_field(tmp_path):
    words = f"--output_dir {tmp_path} --use_cpu --eval_speeds 0.2 1 --reverse_kl --learning_rate 1e-3"
    words += " --num_train_epochs 2 --warmup_steps 7"
    (args,) = HfArgumentParser(SelfDistillationArguments).parse_args_into_dataclasses(words.split())
    assert args.eval_speeds == [0.2, 1.0]
    assert args.reverse_kl is True
    assert (args.learning_rate, args.num_train_epochs, args.warmup_steps) == (1e-3, 2, 7)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_command_line_sets_the_objective(tmp_path, objective):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--objective", objective]
    (args,) = HfArgumentParser(ExitTrainingArguments).parse_args_into_dataclasses(words)
    assert args.objective == objective


def test_self_distillation_has_no_other_objective(tmp_path):
    assert SelfDistillationArguments(str(tmp_path), use_cpu=True).objective == "self_distillation"
    with pytest.raises(TypeError, match="unexpected keyword argument 'objective'"):
        SelfDistillationArguments(str(tmp_path), use_cpu=True, objective="joint_cross_entropy")
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--objective", "joint_cross_entropy"]
    with pytest.raises(ValueError, match="not used by the HfArgumentParser"):
        HfArgumentParser(SelfDistillationArguments).parse_args_into_dataclasses(words)


def test_command_line_without_the_fields_gives_the_defaults(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu"]
    (args,) = HfArgumentParser(SelfDistillationArguments).parse_args_into_dataclasses(words)
    assert args.eval_speeds == [0.1, 0.5, 0.8]
    assert args.reverse_kl is False
    assert args.learning_rate == 2e-4


def test_command_line_refuses_a_speed_above_1(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--eval_speeds", "0.5", "1.5"]
    with pytest.raises(ValueError, match=r"speed must be a number in \[0, 1\], got 1.5"):
        HfArgumentParser(SelfDistillationArguments).parse_args_into_dataclasses(words)


def test_json_file_brings_the_arguments_back(tmp_path):
    args = SelfDistillationArguments(str(tmp_path), use_cpu=True, eval_speeds=[0.3], reverse_kl=True)
    saved = json.loads(args.to_json_string())
    assert saved["eval_speeds"] == [0.3]
    file = tmp_path / "arguments.json"
    names = ("output_dir", "use_cpu", "eval_speeds", "reverse_kl", "learning_rate")
    file.write_text(json.dumps({name: saved[name] for name in names}))
    (loaded,) = HfArgumentParser(SelfDistillationArguments).parse_json_file(str(file))
    assert all(getattr(loaded, name) == getattr(args, name) for name in names)


@pytest.mark.parametrize("setting", [{"batch_eval_metrics": True}, {"eval_do_concat_batches": False}])
def test_evaluation_in_parts_is_refused(tmp_path, setting):
    with pytest.raises(ValueError, match="derived from the answers to all rows"):
        SelfDistillationArguments(str(tmp_path), use_cpu=True, **setting)
