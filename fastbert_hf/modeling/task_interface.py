"""What the package asks of a task: what logits mean, how far two answers are from each other, how sure one is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .answer_layouts import TextLayout


class Task:
    """
    What the logits of an exit mean. No other code knows it. Logits are `[..., num_labels]`, or of a task that labels
    tokens `[..., tokens, num_labels]`; dimensions before these are texts, and exits.

    An answer consists of decisions: one for a single label, one for each label where a text may have several, one for
    each token. Answers differ where one of these does, and are as uncertain as the least certain of them.

    Args:
        config (`PreTrainedConfig`, *optional*): Of the model, for what a task reads of it.
    """

    name: str  # as errors call it
    layout: TextLayout = TextLayout()
    function_to_apply: str  # by which the stock pipeline makes scores of logits
    least_labels = 1  # fewer are an error
    exit_policy: str  # the one of a new model
    label_kind = "ids"  # what gold labels are, to a collator
    # By the name of an exit policy, from logits to a number in [0, 1] for each text.
    uncertainties: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    # What a gate weighs of an exit's answer, and what its sum is: the "logit" of a probability, or a "log".
    gate_features: tuple[str, ...]
    gate_link: str

    def __init__(self, config: Any = None):
        self.num_labels = getattr(config, "num_labels", 2)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the scores that an answer reports, shaped as the logits, at least in float32."""
        raise NotImplementedError

    def predictions(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what is answered: `[...]`, or `[..., decisions]` where there are several."""
        raise NotImplementedError

    def decided(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what is answered, `[..., decisions]`."""
        return self.predictions(logits)

    def is_same(self, decided: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Tell of each decision whether it is the same, shaped as they are."""
        return decided == other

    def differs(self, logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Tell whether two answers differ, `[...]`, from the logits of both."""
        return ~self.is_same(self.decided(logits), self.decided(other)).all(-1)

    def check_comparable(self) -> None:
        """Raise a `ValueError` unless it is known which answers count as the same."""

    def labelled(self, logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Return the logits of the tokens that have labels, as if there were no others; `[rows, ...]`."""
        return logits

    def is_right(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Tell whether an answer is that of its labels, `[rows]`, one for each decision where there are several."""
        labels = labels.view(len(labels), -1)
        return (self.is_same(self.decided(logits), labels) | (labels == -100)).all(-1)

    def has_nan(self, logits: torch.Tensor) -> torch.Tensor:
        """Tell of each answer whether it is none, as something in it is not a number: `[...]`."""
        broken = (self.probabilities(logits).isnan() | logits.isposinf()).any(-1)
        return broken.any(-1) if self.layout.per_token else broken

    def has_no_token(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Tell of each decision whether there is nothing to decide, `[..., decisions]`; `None` where there is."""
        return None

    def cat_labels(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the gold labels of several batches one below the other."""
        return self.layout.cat_labels(parts)

    def check_gold(self, labels: torch.Tensor) -> None:
        """Raise a `ValueError` if a batch of gold labels is not what answers can be compared with."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of float32 logits averaged over all that has a label."""
        raise NotImplementedError

    def mean_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Return the loss averaged over all that has a label, in float32, or that of each of several exits.

        Args:
            logits (`torch.Tensor` of shape `[rows, num_labels]` or `[rows, exits, num_labels]`):
                Of one or more exits; with tokens before the labels where those have them.
            labels (`torch.Tensor`): Of the rows, as the task has them.
        """
        if logits.dim() == 3 + self.layout.per_token:
            return torch.stack([self.mean_loss(of_exit, labels) for of_exit in logits.unbind(1)])
        return self.loss(logits.float(), labels)

    def divergence(
        self, students: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0, reverse: bool = False
    ) -> torch.Tensor:
        """Return how far each answer of a student is from the teacher's, `[...]`, which need not be as many."""
        raise NotImplementedError

    def uncertainty(self, policy: str, logits: torch.Tensor) -> torch.Tensor:
        """Return the uncertainty of each text's answer, `[texts]`, by one of `uncertainties`, of float32 logits."""
        return self.uncertainties[policy](self, logits)

    def start_patience(self, texts: int, device: torch.device | str) -> torch.Tensor:
        """Return `[texts, decisions, 2]`: what each text was answered before, and how often in a row. Nothing yet."""
        raise NotImplementedError

    def fit(self, state: torch.Tensor, logits: torch.Tensor, value: float) -> torch.Tensor:
        """Return what is remembered of texts, for as many tokens as their logits have; new ones have this value."""
        return state

    def start_gate(self, texts: int, device: torch.device | str) -> torch.Tensor:
        """Return what a gate remembers of texts before their first exit."""
        raise NotImplementedError

    def gate(self, logits: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `gate_features` of an exit's answers, `[texts, features]`, and what is remembered from here on."""
        raise NotImplementedError

    def gate_uncertainty(self, weighed: torch.Tensor) -> torch.Tensor:
        """Return the uncertainty that a gate's weighted sum stands for."""
        raise NotImplementedError

    def gate_target(self, logits: torch.Tensor, full_logits: torch.Tensor) -> torch.Tensor:
        """Return of each text what its gate is to expect, `[texts]`, from its logits and those of the full model."""
        raise NotImplementedError

    @classmethod
    def policies(cls) -> tuple[str, ...]:
        """Return the names of the exit policies that the task has."""
        return (*cls.uncertainties, "patience", "learned")
