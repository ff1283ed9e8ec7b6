"""The trainings of `test_two_processes.py`: run here by each process of `torchrun`, and there by one alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from fastbert_hf import FastBertForSequenceClassification, SelfDistillationArguments, SelfDistillationTrainer
from fastbert_hf.training import run_stage
from tests.common import copied_state, tiny_model, tiny_rows, training_settings, without_dropout
from tests.training.common import SGD, Interrupted, Stop


# SGD, as Adam would blow rounding errors up to whole steps; no clipping, which would hide a wrong scale.
SETTINGS = {**SGD, "per_device_eval_batch_size": 3}
TRAININGS = {
    "stage_one": (Trainer, TrainingArguments, {}),
    "stage_one_with_checkpointing": (Trainer, TrainingArguments, {"gradient_checkpointing": True}),
    "stage_two": (SelfDistillationTrainer, SelfDistillationArguments, {}),
}


@dataclass
class ScriptArguments:
    results_dir: str
    use_cpu: bool = False


def trainer_of(name: str, output_dir: Path, batch_size: int, **settings) -> Trainer:
    """Return the trainer of three steps."""
    trainer_class, arguments_class, own_settings = TRAININGS[name]
    settings = {**SETTINGS, "per_device_train_batch_size": batch_size, **own_settings, **settings}
    return trainer_class(
        without_dropout(tiny_model(exit_dropout=0)),
        arguments_class(**training_settings(output_dir, **settings)),
        train_dataset=tiny_rows(),
        eval_dataset=tiny_rows(10, seed=1),
    )


def train(name: str, output_dir: Path, batch_size: int, use_cpu: bool = True) -> dict:
    """Three steps and an evaluation of 10 rows, which do not divide by two processes of 3 rows each."""
    trainer = trainer_of(name, output_dir, batch_size, use_cpu=use_cpu)
    trainer.train()
    metrics = trainer.evaluate()
    return {
        "weights": copied_state(trainer.model),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "metrics": {key: value for key, value in metrics.items() if "second" not in key and "time" not in key},
        "predictions": trainer.predict(tiny_rows(10, seed=1)).predictions,
        "world_size": trainer.args.world_size,
    }


def run_interrupted_stage(folder: Path, use_cpu: bool) -> dict:
    """The second stage by `run_stage`, interrupted before its last step and run again."""
    for stop_at in (2, 0):  # the second time it must not begin anew

        def make_trainer(output_dir: str, stop_at=stop_at) -> Trainer:
            settings = {"save_strategy": "steps", "save_steps": 1, "use_cpu": use_cpu}
            trainer = trainer_of("stage_two", output_dir, batch_size=4, **settings)
            trainer.add_callback(Stop(stop_at))
            return trainer

        try:
            model_dir = run_stage(folder, {"learning_rate": 0.02}, make_trainer)
        except Interrupted:
            # In a new launch, the checkpoint of the main process is there.
            torch.distributed.barrier()
            checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
    return {
        "checkpoints": checkpoints,
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()),
        "weights": copied_state(FastBertForSequenceClassification.from_pretrained(model_dir)),
    }


def main() -> None:
    (arguments,) = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()
    results_dir = Path(arguments.results_dir)
    for name in TRAININGS:
        result = train(name, results_dir / name, batch_size=4, use_cpu=arguments.use_cpu)
        torch.save(result, results_dir / f"{name}-{torch.distributed.get_rank()}.pt")
    result = run_interrupted_stage(results_dir / "stage", use_cpu=arguments.use_cpu)
    torch.save(result, results_dir / f"interrupted_stage-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
