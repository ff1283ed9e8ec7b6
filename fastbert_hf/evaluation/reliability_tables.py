"""What an uncertainty means: of the answers of which an exit says so much, how many differ from the full model's."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.exit_policies import ExitPolicy
from ..modeling.tasks import task_of
from .exit_record import ExitRecord
from .replay import exit_uncertainties, raw_thresholds, replay_at_speed


try:
    import pandas as pd
except ImportError as error:
    raise ImportError('fastbert_hf.evaluation needs its extra: pip install "fastbert-hf[evaluation]"') from error


def reliability(
    record: ExitRecord, config: PreTrainedConfig, policy: str | None = None, num_bins: int = 10
) -> pd.DataFrame:
    """
    Make a reliability table of the answers of all exits but the full model's: as many answers in each bin, ordered by
    their uncertainty. Of the policy `"learned"` the mean uncertainty of a bin shall be the share that differs.

    | column | meaning |
    |---|---|
    | `from`, `to`, `uncertainty` | least, greatest and mean uncertainty of the bin |
    | `differs` | share of its answers that are not the full model's |
    | `answers` | their number; a text has one at every exit |

    Args:
        record ([`ExitRecord`]): From [`record_exits`]. No labels are needed.
        config ([`FastBertConfig`] or [`CascadeConfig`]): Of the model of the record, with its limits.
        policy (`str`, *optional*): The config's own unless given.
        num_bins (`int`): At least 1.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
    exit_policy, task = ExitPolicy.of(config, policy), task_of(config)
    full = replay_at_speed(record, config, 0.0).logits
    thresholds = raw_thresholds(record, config, 1.0)
    uncertainties = exit_uncertainties(record, exit_policy, thresholds > 0)
    is_early = (thresholds > 0) & ~thresholds.isinf()
    if not is_early.any():
        raise ValueError("no exit but the last may answer within the limits of this config.")
    uncertainties = uncertainties[is_early]
    differs = task.differs(record.exit_logits, full[:, None])[is_early]
    order = uncertainties.argsort(stable=True)
    rows = [
        {
            "from": uncertainties[own].min().item(),
            "to": uncertainties[own].max().item(),
            "uncertainty": uncertainties[own].double().mean().item(),
            "differs": differs[own].double().mean().item(),
            "answers": len(own),
        }
        for own in order.tensor_split(num_bins)
        if len(own) > 0
    ]
    return pd.DataFrame(rows)


def reliability_error(table: pd.DataFrame) -> float:
    """Return how far the uncertainties of a [`reliability`] table are from what differs, weighted by the answers."""
    gaps = (table["uncertainty"] - table["differs"]).abs()
    return float((gaps * table["answers"]).sum() / table["answers"].sum())
