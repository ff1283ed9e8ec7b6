"""LeafUsage logs how the trees of fast feed-forward layers are used while they are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling.feed_forward_settings import FORMS


class LeafUsage(TrainerCallback):
    """
    Add to every log what the training texts since the last one did in the trees, as means over all layers of one
    process:

    | name | meaning |
    |---|---|
    | `decision_entropy` | of the decisions on a token's way, in bits: 0 is sure, 1 is a toss |
    | `leaf_usage` | 1 where every leaf has as many tokens as another, 1 / leaves where one has them all |
    | `dead_leaves` | share of the leaves that no token came to |

    `leaf_usage` is 2 to the power of the entropy, in bits, of the shares that the leaves have of the tokens, divided
    by their number.

    [`CheckedTrainer`] and its subclasses add it by themselves to a model with trees; a stock `Trainer` takes it as
    `callbacks=[LeafUsage()]`. It counts in the forward passes of the training.
    """

    def __init__(self):
        self._layers: list[_Counts] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module = None, **kwargs
    ) -> None:
        self._close()
        self._layers = [_Counts(layer) for layer in trees_of(model)]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        counted = [counts.read() for counts in self._layers if counts.tokens]
        if not counted or logs is None or "loss" not in logs:
            return
        usage = {name: sum(of[name] for of in counted) / len(counted) for name in counted[0]}
        logs.update(usage)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(usage)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._close()

    def _close(self) -> None:
        for counts in self._layers:
            counts.hook.remove()
        self._layers = []


def trees_of(model: nn.Module | PreTrainedModel) -> list[nn.Module]:
    """Return the fast feed-forward layers of a model that decide anything."""
    kinds = tuple(FORMS.values())
    return [
        module
        for module in model.modules()
        if isinstance(module, kinds) and module.depth > 0 and getattr(module, "trees", 1) > 0
    ]


class _Counts:
    """What the tokens of one layer did since it was read."""

    def __init__(self, layer: nn.Module):
        self.trees, self.leaves = getattr(layer, "trees", 1), 2**layer.depth
        self.tokens, self.entropy, self.used = 0, 0.0, torch.zeros(self.trees, self.leaves)
        self.hook = layer.register_forward_hook(self.count)

    @torch.no_grad()
    def count(self, layer: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not layer.training and not output.requires_grad:  # an evaluation
            return
        tokens = arguments[0].detach().flatten(0, -2)
        nodes, logits = layer.ways(tokens)  # [T, trees, depth]
        leaf = 2 * nodes[..., -1] + 2 - self.leaves + (logits[..., -1] > 0)
        first = torch.arange(self.trees, device=leaf.device) * self.leaves
        counted = torch.bincount((leaf + first).flatten(), minlength=self.used.numel())
        self.used = self.used.to(counted.device) + counted.view_as(self.used)
        to_right = torch.sigmoid(logits.float())
        entropy = torch.special.entr(to_right) + torch.special.entr(1 - to_right)
        self.entropy = self.entropy + entropy.mean() * len(tokens)
        self.tokens += len(tokens)

    def read(self) -> dict[str, float]:
        shares = self.used / self.tokens
        bits = torch.special.entr(shares).sum(1) / torch.log(torch.tensor(2.0))
        usage = {
            "decision_entropy": float(self.entropy / self.tokens / torch.log(torch.tensor(2.0))),
            "leaf_usage": (2**bits / self.leaves).mean().item(),
            "dead_leaves": (self.used == 0).float().mean().item(),
        }
        self.tokens, self.entropy, self.used = 0, 0.0, torch.zeros_like(self.used)
        return usage
