"""A model whose rows leave at every exit, and where each row must leave, in NumPy from the policies' definitions."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from fastbert_hf import FastBertForSequenceClassification
from tests.common import NUM_LAYERS, assert_close, pad_token_id_of, ragged_batch, tiny_model


SPEEDS = tuple(tenth / 10 for tenth in range(11))
POLICIES = ("entropy", "confidence", "margin", "patience")
# An uncertainty this near to a speed might fall on either side of it in float32.
TIE = 1e-6


@functools.cache
@torch.no_grad()
def decisive_model(family: str = "bert", **config) -> FastBertForSequenceClassification:
    """
    A model whose exits prefer no label and grow surer with depth, so that every speed divides its rows. In float64, as
    it magnifies what the exits say: by rounding alone a row could leave elsewhere on another machine.
    """
    model = tiny_model(family, **config).double()
    exit_logits = full_depth(model, texts(100, family)).exit_logits
    for depth, exit_classifier in enumerate(model.exits, start=1):
        said = exit_logits[:, depth - 1]
        scale = (0.5 + depth / 2) / said.std(0).mean()
        exit_classifier.out_proj.weight *= scale
        exit_classifier.out_proj.bias.sub_(said.mean(0)).mul_(scale)
    return model


def texts(number: int, family: str = "bert", longest: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(1, longest + 1, (number,), generator=generator)
    return ragged_batch(tuple(lengths.tolist()), pad_token_id=pad_token_id_of(family))


def oracle_uncertainties(
    model: FastBertForSequenceClassification, exit_logits: torch.Tensor, first: int = 1
) -> np.ndarray:
    """
    The uncertainty of each exit on each row, `[rows, L]`, in float64 from the policies' definitions. No exit before
    the layer `first` is asked.
    """
    logits = exit_logits.double().numpy()
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    policy = model.config.exit_policy
    if policy == "entropy":
        return -(probabilities * np.log(probabilities)).sum(-1) / math.log(logits.shape[-1])
    ordered = np.sort(probabilities, -1)
    if policy == "confidence":
        return (1 - ordered[..., -1]) * logits.shape[-1] / (logits.shape[-1] - 1)
    if policy == "margin":
        return 1 - (ordered[..., -1] - ordered[..., -2])
    labels = logits.argmax(-1)
    uncertainties = np.ones(labels.shape)
    for row, said in enumerate(labels):
        agreements = 0
        for depth in range(first, len(said)):
            agreements = agreements + 1 if said[depth] == said[depth - 1] else 0
            uncertainties[row, depth] = 1 - min(agreements, model.config.patience) / model.config.patience
    return uncertainties


def oracle_exit(uncertainties: np.ndarray, speed: float, first: int, last: int, ties_are_at_speed: bool) -> int:
    for depth in range(first, last):
        distance = speed - uncertainties[depth - 1]
        if speed > 0 and not ties_are_at_speed:
            assert abs(distance) > TIE, "a tie: choose another seed"
        if distance > TIE:
            return depth
    return last


def assert_answers_are_the_oracles(
    model: FastBertForSequenceClassification, batch: dict[str, torch.Tensor], speeds, **limits
) -> list[int]:
    """Compares a call at each of the speeds with what the exits say at full depth, and returns all exit layers."""
    exit_logits = full_depth(model, batch).exit_logits
    first, last = limits.get("min_exit_layer", 1), limits.get("max_layers", NUM_LAYERS)
    uncertainties = oracle_uncertainties(model, exit_logits, first)
    is_patience = model.config.exit_policy == "patience"
    rows, taken = range(len(exit_logits)), []
    for speed in speeds:
        with torch.no_grad():
            output = model(**batch, speed=speed, **limits)
        row_speeds = [float(one) for one in ([speed or 0.0] * len(rows) if np.ndim(speed) == 0 else speed)]
        exits = [oracle_exit(uncertainties[row], row_speeds[row], first, last, is_patience) for row in rows]
        expected = torch.stack([exit_logits[row, depth - 1] for row, depth in enumerate(exits)])
        # At speed 0 a row hears its last exit alone, which agrees with nobody.
        uncertainty = [
            1.0 if is_patience and row_speeds[row] == 0 else uncertainties[row, exits[row] - 1] for row in rows
        ]
        assert output.exit_layer.tolist() == exits
        assert_close(output.logits, expected)
        assert output.logits.argmax(-1).tolist() == expected.argmax(-1).tolist()
        assert_close(output.uncertainty.double(), torch.tensor(uncertainty, dtype=torch.float64))
        assert output.uncertainty.dtype == torch.float32
        assert output.exit_layer.dtype == torch.long
        taken += exits
    return taken


@torch.no_grad()
def full_depth(model: FastBertForSequenceClassification, batch: dict[str, torch.Tensor]):
    return model(**batch, output_exit_logits=True)
