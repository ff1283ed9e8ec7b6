"""Texts that are given numbers: `problem_type="regression"`."""

from __future__ import annotations

import math

import torch
from torch import nn

from .task_interface import Task


class Regression(Task):
    r"""
    One number for each text, or several. No exit says how sure it is of a number, so what remains is whether exits say
    the same: answers within the `tolerance` of the config count as the same (PABEE, NeurIPS 2020).

    The gates of the policy `"learned"` expect the squared difference from the last layer, after the learning-to-exit
    of BERxiT (EACL 2021), here from what the exits said so far: \\( u = \min(1, e^{w \cdot x + b}) \\),
    of the variance that the full model's answers have.
    """

    name = "regression"
    function_to_apply = "none"
    exit_policy = "patience"
    gate_features = ("change", "distance from the mean", "value", "square of the value")
    gate_link = "log"
    label_kind = "numbers"

    def __init__(self, config=None):
        super().__init__(config)
        self.is_named = getattr(config, "tolerance", None) is not None
        self.tolerance = config.tolerance if self.is_named else 0.0

    def check_comparable(self):
        if not self.is_named:
            raise ValueError(
                "a regression needs to know how far two numbers may be apart and still agree, in the units of the "
                "labels: set it in the config, as in model.config.tolerance = 0.25"
            )

    def probabilities(self, logits):
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def predictions(self, logits):
        return self.probabilities(logits)

    def is_same(self, decided, other):
        return (decided - other).abs() <= self.tolerance  # NaN is the same as nothing

    def check_gold(self, labels):
        if labels.shape[1:] not in ((), (self.num_labels,)) or (labels.dim() == 1 and self.num_labels > 1):
            raise ValueError(
                f"labels must be {self.num_labels} numbers for each row, got {list(labels.shape[1:])}: for data "
                "without gold labels leave out the column 'labels'."
            )
        if not labels.isfinite().all():
            strange = labels[~labels.isfinite()][0].item()
            raise ValueError(f"labels must be finite numbers, got {strange}: leave out rows without one.")

    def loss(self, logits, labels):
        labels = labels.to(logits.dtype)
        if labels.dim() == 1 and logits.shape[1] == 1:
            labels = labels[:, None]
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels of shape {list(labels.shape)} do not fit outputs of shape {list(logits.shape)}: give a "
                "number for each output of each row, as torch.tensor([3.5, 1.0]) where there is one."
            )
        self.check_gold(labels)
        return nn.functional.mse_loss(logits, labels)

    def divergence(self, students, teacher, temperature=1.0, reverse=False):
        # A temperature divides the numbers, and its square multiplies the result: nothing changes.
        return (students.float() - teacher.float()).square().mean(-1)

    def has_nan(self, logits):
        return ~logits.isfinite().all(-1)

    def start_patience(self, texts, device):
        return torch.full((texts, self.num_labels, 2), math.nan, device=device).index_fill_(
            2, torch.tensor([1], device=device), 0.0
        )

    def start_gate(self, texts, device):
        # How many exits were asked, their sum, and what the last of them said.
        return torch.zeros(texts, 3, self.num_labels, device=device)

    def gate(self, logits, state):
        values = logits.float()
        values = values.where(values.isfinite(), math.nan)
        asked, total, last = state.unbind(1)
        is_first = asked == 0
        change = (values - last).abs().masked_fill(is_first, 0)
        distance = (values - total / asked.clamp(min=1)).abs().masked_fill(is_first, 0)
        features = [change.amax(-1), distance.amax(-1), values.mean(-1), values.square().mean(-1)]
        return torch.stack(features, -1), torch.stack([asked + 1, total + values, values], 1)

    def gate_uncertainty(self, weighed):
        return weighed.clamp(max=0).exp()

    def gate_target(self, logits, full_logits):
        full = full_logits.double()
        variance = full.var(0, correction=0).clamp(min=1e-12)
        return ((logits.double() - full).square() / variance).mean(-1)
