"""BackboneDistillationTrainer teaches a changed backbone what the unchanged one answers, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.tasks import task_of
from .arguments import StageArguments
from .checked_trainer import CheckedTrainer, base_model


@dataclass
class BackboneDistillationArguments(StageArguments):
    """
    `TrainingArguments` for [`BackboneDistillationTrainer`].

    Args:
        learning_rate (`float`, *optional*, defaults to 5e-5): Initial learning rate.
        num_train_epochs (`float`, *optional*, defaults to 2): Passes over the training texts.
        warmup_steps (`float`, *optional*, defaults to 0.1): Below 1 a share of all steps, else a number of steps.
        hidden_states_weight (`float`, *optional*, defaults to 1.0):
            Weight of the squared error of the layers' outputs, each in units of its variance, beside the divergence of
            the answers.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Initial learning rate."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the training texts."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Below 1 a share of all steps, else a number of steps."}
    )
    hidden_states_weight: float = field(
        default=1.0, metadata={"help": "Weight of the squared error of the layers' outputs."}
    )

    def __post_init__(self):
        if not 0 <= self.hidden_states_weight < float("inf"):
            raise ValueError(f"hidden_states_weight must be at least 0, got {self.hidden_states_weight}.")
        super().__post_init__()


class BackboneDistillationTrainer(CheckedTrainer):
    """
    Teach a backbone of which parts were replaced, such as its feed-forward layers, to give what the unchanged model
    gives: its answers, and the outputs of all its layers (as in TinyBERT, Jiao et al., Findings of EMNLP 2020, Eq. 8
    and 10). Labels are not used. The layers learn; embeddings and exits stay as they are, and nothing is dropped out.

    Args:
        model ([`FastBertForSequenceClassification`]): What learns.
        args ([`BackboneDistillationArguments`], *optional*): Settings.
        teacher ([`FastBertForSequenceClassification`]):
            The unchanged model, with as many layers of the same width. It is put into eval mode, on the device of the
            training.
        kwargs: As in [`CheckedTrainer`].
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: BackboneDistillationArguments | None = None,
        *,
        teacher: PreTrainedModel,
        **kwargs: Any,
    ):
        args = BackboneDistillationArguments("trainer_output") if args is None else args
        own, wanted = (base_model(which).config for which in (model, teacher))
        shapes = [(of.num_hidden_layers, of.hidden_size, of.num_labels) for of in (own, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"teacher must have the layers, the hidden size and the labels of the model, {shapes[0]}, got "
                f"{shapes[1]}: give the model that this one was made of."
            )
        fastbert = base_model(model)
        fastbert.requires_grad_(False)
        for layer in fastbert.fastbert.layers():
            layer.requires_grad_(True)
        super().__init__(model, args, **kwargs)
        self.teacher = teacher.eval().to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        base_model(self.accelerator.unwrap_model(model)).eval()
        inputs = {**inputs, "labels": None, "output_hidden_states": True}
        outputs = model(**inputs)
        with torch.no_grad():
            wanted = self.teacher(**inputs)
        loss = task_of(self.teacher.config).divergence(outputs.logits, wanted.logits).mean()
        errors = []
        for own, other in zip(outputs.hidden_states[1:], wanted.hidden_states[1:], strict=True):
            is_token = other.any(-1) & own.any(-1)  # not padding, nor what was dropped on the way
            weights = shares_of_units(own)[is_token]
            own, other = own[is_token], other[is_token]
            error = ((own - other).square().mean(-1) * weights).sum() / weights.sum()
            errors.append(error / other.var(0, correction=0).mean())
        loss = loss + self.args.hidden_states_weight * torch.stack(errors).mean()
        return (loss, outputs) if return_outputs else loss


@torch.no_grad()
def shares_of_units(states: torch.Tensor) -> torch.Tensor:
    """
    Return the part that each token is of what it was merged into, `[batch_size, sequence_length]`: 1 where it stands
    for itself. Merged tokens have the same states, `[batch_size, sequence_length, hidden_size]`; what many of them
    share would otherwise count as often in a loss.
    """
    # Their plain sum would not do: norms bring it close to the same number for all tokens.
    directions = torch.arange(states.shape[-1], dtype=torch.float64, device=states.device).cos()
    keys = states.double() @ directions
    return 1 / (keys.unsqueeze(1) == keys.unsqueeze(2)).sum(-1)
