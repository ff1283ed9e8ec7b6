"""When a row is done: uncertainties in [0, 1], the speeds they are compared with, and the depth limit."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch


EXIT_POLICIES = ("entropy", "confidence", "margin", "patience")


def exit_uncertainty(
    logits: torch.Tensor, policy: str, patience: int = 1, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""
    The uncertainty of one exit's answers, computed in float32 whatever the dtype of the logits.

    | policy | uncertainty | source |
    |---|---|---|
    | `"entropy"` | \\( -\sum_i p_i \ln p_i / \ln N \\) | FastBERT (ACL 2020), Eq. 7 |
    | `"confidence"` | \\( (1 - \max_i p_i) \cdot N / (N - 1) \\) | maximum softmax probability |
    | `"margin"` | \\( 1 - (p_{(1)} - p_{(2)}) \\) | difference of the two best |
    | `"patience"` | \\( 1 - a / \text{patience} \\), `a` exits in a row agreed with the one before | PABEE |

    Args:
        logits (`torch.Tensor` of shape `[rows, num_labels]`): What the exit says.
        policy (`str`): One of `EXIT_POLICIES`.
        patience (`int`): Agreements after which the patience policy is certain.
        state (`torch.Tensor` of shape `[rows, 2]`, *optional*):
            What the policy remembers of the exit before; `None` at the first exit. Drop its rows with the batch's.

    Returns:
        `tuple`: the uncertainty, float32 of shape `[rows]`, NaN where the logits are, and the new state (`None` for
        policies that remember nothing).
    """
    probabilities = logits.float().softmax(-1)  # [rows, num_labels]
    if policy == "entropy":
        entropy = torch.special.entr(probabilities).sum(-1)
        return (entropy / math.log(logits.shape[-1])).clamp(0, 1), None
    if policy == "confidence":
        num_labels = logits.shape[-1]
        # Written so that equal probabilities round to exactly 1.
        return (1 - (probabilities.amax(-1) * num_labels - 1) / (num_labels - 1)).clamp(0, 1), None
    if policy == "margin":
        best, second = probabilities.topk(2).values.unbind(-1)
        return 1 - (best - second), None
    if policy == "patience":
        labels = probabilities.argmax(-1)
        agreements = torch.zeros_like(labels)
        if state is not None:
            agreements = torch.where(labels == state[:, 0], state[:, 1] + 1, 0)
        # Not 1 - a / patience, whose rounding error would pass for an agreement at speeds that are k / patience.
        uncertainty = (patience - agreements).clamp(min=0).float() / patience
        uncertainty = uncertainty.masked_fill(probabilities.isnan().any(-1), math.nan)
        return uncertainty, torch.stack([labels, agreements], -1)
    raise ValueError(f"exit policy {policy!r} is not known; choose one of {', '.join(EXIT_POLICIES)}.")


def exit_uncertainties(exit_logits: torch.Tensor, policy: str, patience: int = 1) -> torch.Tensor:
    """
    The uncertainty of every exit on every row, from a full-depth pass.

    Args:
        exit_logits (`torch.Tensor` of shape `[rows, L, num_labels]`): `exit_logits` of a model output.
        policy (`str`): One of `EXIT_POLICIES`.
        patience (`int`): As in [`exit_uncertainty`].

    Returns:
        `torch.Tensor`: float32 of shape `[rows, L]`.
    """
    state, columns = None, []
    for logits in exit_logits.unbind(1):
        uncertainty, state = exit_uncertainty(logits, policy, patience, state)
        columns.append(uncertainty)
    return torch.stack(columns, 1)


def first_exits(uncertainties: torch.Tensor, speed: float, exits: range | None = None) -> torch.Tensor:
    """
    The exit layer that each row takes at a speed: the first one whose uncertainty is below it, else the last.

    Args:
        uncertainties (`torch.Tensor` of shape `[rows, L]`): From [`exit_uncertainties`].
        speed (`float`): In [0, 1].
        exits (`range`, *optional*): The layers whose exits may answer, from [`exit_range`]; all unless given.

    Returns:
        `torch.Tensor`: long of shape `[rows]`, 1 to L.
    """
    check_speed(speed)
    exits = range(1, uncertainties.shape[1] + 1) if exits is None else exits
    done = uncertainties[:, exits.start - 1 : exits.stop - 1] < torch.tensor(float(speed), dtype=torch.float32)
    done[:, -1] = True
    return done.int().argmax(1) + exits.start


def check_speed(speed: float) -> None:
    """Raises a `ValueError` unless `speed` is one number in [0, 1]."""
    is_number = isinstance(speed, Real) and not isinstance(speed, bool)
    # NaN fails both comparisons.
    if not is_number or not 0 <= speed <= 1:
        raise ValueError(
            f"speed must be a number in [0, 1], got {speed!r}: 0 runs every layer, 1 leaves as early as it can. "
            "Example: speed=0.5"
        )


def row_speeds(speed: float | list | torch.Tensor | None, batch_size: int) -> torch.Tensor:
    """
    The speed of every row of a batch.

    Args:
        speed (`float`, sequence or tensor of `batch_size` numbers, *optional*):
            One number in [0, 1] for all rows, or one per row. `None` means 0.
        batch_size (`int`): Number of rows.

    Returns:
        `torch.Tensor`: float32 of shape `[batch_size]`, on the CPU, where the rows are kept in account.
    """
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
    The layers whose exits may answer. Every text has answered at the last of them.

    Args:
        num_hidden_layers (`int`): Layers of the model, L.
        min_exit_layer (`int`, *optional*): The first of them, 1 unless given.
        max_layers (`int`, *optional*): The last of them, L unless given.

    Returns:
        `range`, or a `ValueError` unless 1 <= `min_exit_layer` <= `max_layers` <= L.
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
