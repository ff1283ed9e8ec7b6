"""The trainings of `test_two_processes.py`: run here by each process of `torchrun`, and there by one alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from fastbert_hf import SelfDistillationArguments, SelfDistillationTrainer
from tests.common import copied_state, tiny_model, tiny_rows, training_settings, without_dropout


# SGD, as Adam would blow rounding errors up to whole steps; no clipping, which would hide a wrong scale.
SETTINGS = {"optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 0.0, "per_device_eval_batch_size": 3}
TRAININGS = {
    "stage_one": (Trainer, TrainingArguments, {}),
    "stage_one_with_checkpointing": (Trainer, TrainingArguments, {"gradient_checkpointing": True}),
    "stage_two": (SelfDistillationTrainer, SelfDistillationArguments, {}),
}


@dataclass
class ScriptArguments:
    results_dir: str
    use_cpu: bool = False


def train(name: str, output_dir: Path, batch_size: int, use_cpu: bool = True) -> dict:
    """Three steps and an evaluation of 10 rows, which do not divide by two processes of 3 rows each."""
    trainer_class, arguments_class, settings = TRAININGS[name]
    settings = training_settings(
        output_dir, per_device_train_batch_size=batch_size, **{**SETTINGS, "use_cpu": use_cpu}, **settings
    )
    model = without_dropout(tiny_model(exit_dropout=0))
    trainer = trainer_class(
        model, arguments_class(**settings), train_dataset=tiny_rows(), eval_dataset=tiny_rows(10, seed=1)
    )
    trainer.train()
    metrics = trainer.evaluate()
    return {
        "weights": copied_state(model),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "metrics": {key: value for key, value in metrics.items() if "second" not in key and "time" not in key},
        "predictions": trainer.predict(tiny_rows(10, seed=1)).predictions,
        "world_size": trainer.args.world_size,
    }


def main() -> None:
    (arguments,) = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()
    results_dir = Path(arguments.results_dir)
    for name in TRAININGS:
        result = train(name, results_dir / name, batch_size=4, use_cpu=arguments.use_cpu)
        torch.save(result, results_dir / f"{name}-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
