"""Records that a model could have made: exits that know more the deeper they are."""

from __future__ import annotations

import torch

from fastbert_hf.evaluation import ExitRecord

from ..common import NUM_LAYERS


def made_up_record(
    rows: int = 2000, seed: int = 0, noise: float = 1.0, num_exits: int = NUM_LAYERS, labels: bool = True
) -> ExitRecord:
    """Return the record of `rows` texts with three labels; a layer costs 100, an exit 5."""
    generator = torch.Generator().manual_seed(seed)
    full = 3 * torch.randn(rows, 3, generator=generator)
    scales = noise * torch.linspace(3.0, 0.0, num_exits)
    logits = full[:, None] + scales[:, None] * torch.randn(rows, num_exits, 3, generator=generator)
    gold = (full + torch.randn(rows, 3, generator=generator)).argmax(-1)
    costs = torch.ones(rows, num_exits, dtype=torch.long)
    return ExitRecord(logits, 100 * costs, 5 * costs, gold if labels else None)
