"""What several tests of trainings share: interruptions, which weights move, and the paper's loss in float64."""

from __future__ import annotations

import torch
from transformers import TrainerCallback, default_data_collator

from ..common import changed_parameters


SGD = {"optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 0.0}


class Interrupted(Exception):
    """What [`Stop`] raises. A `KeyboardInterrupt` that a test does not expect would end the other tests, too."""


class Stop(TrainerCallback):
    """Interrupt a training before a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


def assert_moved(model: torch.nn.Module, before: dict[str, torch.Tensor], expected: set[str]) -> None:
    """
    Check that the parameters in `expected` moved, and no others. The bias of the keys in an attention may stay: it
    shifts all scores of a query alike, so its gradient is zero, and only rounding moves it.
    """
    moved = changed_parameters(model, before)
    assert moved - expected == set()
    assert {name for name in expected - moved if not name.endswith("key.bias")} == set()


def exit_logits_of(model, rows) -> torch.Tensor:
    """Return the logits of every exit on some rows, `[rows, L, num_labels]`."""
    batch = default_data_collator(rows)
    batch.pop("labels", None)
    with torch.no_grad():
        return model.eval()(**batch, output_exit_logits=True).exit_logits


def float64_divergences(exit_logits: torch.Tensor, reverse_kl: bool = False) -> list[float]:
    """Return Eq. 5 of the FastBERT paper in float64: the divergence of each student, averaged over the rows."""
    probabilities = exit_logits.double().exp() / exit_logits.double().exp().sum(-1, keepdim=True)
    teacher = probabilities[:, -1]
    divergences = []
    for student in probabilities[:, :-1].unbind(1):
        wanted, given = (student, teacher) if reverse_kl else (teacher, student)
        divergences.append((wanted * (wanted / given).log()).sum(-1).mean().item())
    return divergences
