"""When a text leaves: the uncertainty of an exit, the thresholds it is compared with, and the one exit rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from transformers import PreTrainedConfig

from .exit_gates import ExitGates, check_gates
from .task_interface import Task
from .tasks import EVERY_TASK, task_of


# Patience needs to know what is answered, not how sure the exit is of it, and gates what was answered before.
FREE_POLICIES = (*dict.fromkeys(name for task in EVERY_TASK for name in task.uncertainties), "patience")
EXIT_POLICIES = (*FREE_POLICIES, "learned")  # whose gates are fitted when a model is trained


@dataclass(frozen=True)
class ExitPolicy:
    r"""
    How the logits of an exit become an uncertainty in [0, 1], computed in float32 whatever their dtype. Where a text
    has several labels, or one for each token, it is that of the least certain one.

    | name | uncertainty | source |
    |---|---|---|
    | `"entropy"` | \\( -\sum_i p_i \ln p_i / \ln N \\) | FastBERT (ACL 2020), Eq. 7 |
    | `"confidence"` | \\( (1 - \max_i p_i) \cdot N / (N - 1) \\) | maximum softmax probability |
    | `"margin"` | \\( 1 - (p_{(1)} - p_{(2)}) \\) | difference of the two best |
    | `"mean_entropy"` | the mean entropy of all labels or tokens | |
    | `"window_entropy"` | the greatest mean entropy of 5 neighbouring tokens | after Li et al. (ACL 2021) |
    | `"patience"` | \\( 1 - a / \text{patience} \\), `a` exits in a row agreed with the one before | PABEE |
    | `"learned"` | \\( P(\text{the answer differs from the full model's}) \\), by a gate ([`ExitGates`]) | |

    Args:
        name (`str`): One of `EXIT_POLICIES`.
        task ([`Task`]): What the logits mean.
        patience (`int`): Agreements after which `"patience"` is certain.
        gates ([`ExitGates`], *optional*): Needed for `"learned"`.
    """

    name: str
    task: Task
    patience: int = 1
    gates: ExitGates | None = None

    def __post_init__(self):
        check_policy(self.name, self.task)
        if (self.name == "learned") != (self.gates is not None):
            raise ValueError(
                f"exit policy {self.name!r} with gates={self.gates!r:.40}: gates are for 'learned' alone."
            )

    @classmethod
    def of(cls, config: PreTrainedConfig, name: str | None = None) -> ExitPolicy:
        """Return the policy of a config, or another one by its `name`."""
        name = config.exit_policy if name is None else name
        gates = None
        if name == "learned":
            check_gates(config.gates, config.num_hidden_layers, name)
            gates = ExitGates(torch.tensor(config.gates))
        return cls(name, task_of(config), getattr(config, "patience", 1), gates)

    def start(self, texts: int, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """Return what the policy remembers of texts before their first exit, `None` if it remembers nothing."""
        if self.gates is not None:
            return self.task.start_gate(texts, device)
        return self.task.start_patience(texts, device) if self.name == "patience" else None

    def uncertainty(
        self,
        logits: torch.Tensor,
        state: torch.Tensor | None = None,
        asked: torch.Tensor | None = None,
        place: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Return the uncertainty of one exit's answers, float32 of shape `[rows]`, and what the policy remembers of them.

        Args:
            logits (`torch.Tensor` of shape `[rows, num_labels]`, or `[rows, tokens, num_labels]`):
                What the exit says. NaN stays NaN.
            state (`torch.Tensor`, *optional*): What this method returned at the exit before, [`start`] at the first.
            asked (`torch.Tensor` of shape `[rows]`, bool, CPU, *optional*):
                The rows that this exit may answer; the others keep their state. All unless given.
            place (`int`): Number of the exit, from 1; those of all members of a cascade are counted.
        """
        if self.name in self.task.uncertainties:
            return self.task.uncertainty(self.name, logits.float()), state
        state = self.start(len(logits), logits.device) if state is None else state
        state = self.task.fit(state, logits, 0 if self.gates is not None else -1)
        if self.gates is not None:
            uncertainty, remembered = self.gates.uncertainty(self.task, logits, state, place)
        else:
            uncertainty, remembered = self._patience(logits, state)
        if asked is not None and not asked.all():
            is_asked = asked.to(state.device).view(-1, *[1] * (state.dim() - 1))
            remembered = torch.where(is_asked, remembered, state)
        return uncertainty, remembered

    def _patience(self, logits: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        answers = self.task.decided(logits)
        agreements = torch.where(self.task.is_same(answers, state[..., 0]), state[..., 1] + 1, 0)
        nothing = self.task.has_no_token(logits)
        counted = agreements if nothing is None else agreements.masked_fill(nothing, self.patience)
        # Not 1 - a / patience, whose rounding error would pass for an agreement at speeds that are k / patience.
        uncertainty = (self.patience - counted.amin(-1)).clamp(min=0).float() / self.patience
        uncertainty = uncertainty.masked_fill(self.task.has_nan(logits), math.nan)
        return uncertainty, torch.stack([answers, agreements], -1)


def check_policy(name: str, task: Task | type[Task]) -> None:
    """Raise a `ValueError` unless a task has such an exit policy."""
    if name not in task.policies():
        raise ValueError(
            f"exit_policy={name!r} is not known for {task.name}; choose one of {', '.join(task.policies())}."
        )


def leaves(uncertainty: torch.Tensor, threshold: torch.Tensor, at_end: bool = False) -> torch.Tensor:
    """
    Decide which texts leave at an exit: those whose uncertainty is below their threshold. This is the one exit rule.

    NaN is below nothing: such a text goes on, and where it ends its answer is an error.

    Args:
        uncertainty, threshold (`torch.Tensor` of shape `[texts]`): Of this exit; see [`exit_thresholds`].
        at_end (`bool`):
            Whether no exit of this model may answer after this one. NaN leaves here, and the caller raises an error:
            else the next member of a cascade would hide that this one is broken.
    """
    leaving = uncertainty < threshold
    return leaving | uncertainty.isnan() if at_end else leaving


def exit_thresholds(
    speeds: torch.Tensor,
    num_hidden_layers: int,
    min_exit_layer: int | None = None,
    max_layers: int | None = None,
    is_last_member: bool = True,
) -> torch.Tensor:
    """
    Return the threshold of every exit for every text, float32 of shape `[texts, L]`: 0 where it may not answer,
    infinity at the last one that may, which answers all that is left.

    Args:
        speeds (`torch.Tensor` of shape `[texts]`): In [0, 1].
        num_hidden_layers, min_exit_layer, max_layers: As in [`exit_range`].
        is_last_member (`bool`):
            Whether no other model answers what is left. Otherwise the last exit, too, answers only below the speed.
    """
    exits = exit_range(num_hidden_layers, min_exit_layer, max_layers)
    thresholds = torch.zeros(len(speeds), num_hidden_layers)
    thresholds[:, exits.start - 1 : exits.stop - 1] = speeds[:, None]
    if is_last_member:
        thresholds[:, exits.stop - 2] = math.inf
    return thresholds


def config_thresholds(config: PreTrainedConfig, speeds: torch.Tensor) -> list[torch.Tensor]:
    """
    Return the thresholds within the limits that a [`FastBertConfig`] or [`CascadeConfig`] sets: `[texts, L]` for each
    member, where a single model counts as a cascade of one.
    """
    members = getattr(config, "members", None) or [config]
    return [
        exit_thresholds(
            speeds, member.num_hidden_layers, member.min_exit_layer, member.max_layers, number == len(members)
        )
        for number, member in enumerate(members, start=1)
    ]


def check_speed(speed: float) -> None:
    """Raise a `ValueError` unless `speed` is one number in [0, 1]."""
    is_number = isinstance(speed, Real) and not isinstance(speed, bool)
    # NaN fails both comparisons.
    if not is_number or not 0 <= speed <= 1:
        raise ValueError(
            f"speed must be a number in [0, 1], got {speed!r}: 0 runs every layer, 1 leaves as early as it can. "
            "Example: speed=0.5"
        )


def row_speeds(speed: float | list | torch.Tensor | None, batch_size: int) -> torch.Tensor:
    """Return the speed of every row, float32 on the CPU, from one number for all or one per row; `None` means 0."""
    if hasattr(speed, "tolist"):  # tensors, NumPy arrays and NumPy numbers
        speed = speed.tolist()
    if speed is None:
        return torch.zeros(batch_size)
    if not isinstance(speed, (list, tuple)):
        check_speed(speed)
        return torch.full((batch_size,), float(speed))
    if len(speed) != batch_size:
        raise ValueError(
            f"got {len(speed)} speeds for a batch of {batch_size} rows: give one number for all of them, or one per "
            "row."
        )
    for row_speed in speed:
        check_speed(row_speed)
    return torch.tensor(speed, dtype=torch.float32)


def exit_range(num_hidden_layers: int, min_exit_layer: int | None = None, max_layers: int | None = None) -> range:
    """
    Return the layers whose exits may answer: from `min_exit_layer`, 1 unless given, to `max_layers`, all unless given,
    where every text has answered. Raise a `ValueError` unless both are among the model's layers, in this order.
    """
    limits = {"min_exit_layer": (min_exit_layer, 1), "max_layers": (max_layers, num_hidden_layers)}
    for name, (value, default) in limits.items():
        is_integer = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (is_integer and 1 <= value <= num_hidden_layers):
            raise ValueError(
                f"{name} must be a whole number from 1 to {num_hidden_layers} (the layers of this model), or None "
                f"for {default}, got {value!r}."
            )
    first, last = (default if value is None else int(value) for value, default in limits.values())
    if first > last:
        raise ValueError(
            f"min_exit_layer={first} is beyond max_layers={last}, after which every text must have answered: lower "
            "the one or raise the other."
        )
    return range(first, last + 1)
