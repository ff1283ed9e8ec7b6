"""What is measured of "Speed as a contract": policies at equal costs, the dial, certificates and their price."""

from __future__ import annotations

import time

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.calibration import calibrate
from fastbert_hf.calibration.certificates import upper_bounds
from fastbert_hf.calibration.curves import agreement_at, curve_of
from fastbert_hf.calibration.policy_report import fitted_gates, with_fields
from fastbert_hf.evaluation import (
    ExitRecord,
    exit_uncertainties,
    reliability,
    reliability_error,
    replay_at_speed,
)
from fastbert_hf.modeling.dial_checks import GRID
from fastbert_hf.modeling.dials import speed_for
from fastbert_hf.modeling.exit_policies import ExitPolicy


SPEED_UPS = (1.5, 2.0, 3.0, 4.0)
COMPARED = (2.0, 3.0, 4.0)
GATE_SEEDS = (1, 2, 3)
# Of the dev texts, to which the gates of a seed are fitted.
GATE_SHARE = 0.8
PROMISES = ((0.01, 0.9), (0.02, 0.95), (0.05, 0.9))
SPLITS = 1000
TEMPERATURES = torch.logspace(-0.6, 1.2, 60)


def policies(config: PreTrainedConfig, dev: ExitRecord, test: ExitRecord) -> dict[str, dict[str, list]]:
    """Return accuracy and agreement on test at equal executed FLOPs, by the policy. Dev is what they are fitted to."""
    entropy = with_fields(config, exit_policy="entropy", calibration=None)
    teacher = dev.exit_logits[:, -1].argmax(-1)
    logits = dev.exit_logits[:, :-1]
    losses = torch.stack(
        [torch.stack([cross_entropy(own / t, teacher) for own in logits.unbind(1)]) for t in TEMPERATURES]
    )
    temperatures = torch.cat([TEMPERATURES[losses.argmin(0)], torch.ones(1)])
    energies = [record.exit_logits.logsumexp(-1) for record in (dev, test)]
    lowest, highest = energies[0].min(0).values, energies[0].max(0).values
    energy = 1 - ((energies[1] - lowest) / (highest - lowest)).clamp(0, 1)
    log_probabilities = test.exit_logits.log_softmax(-1)
    ensemble = log_probabilities.cumsum(1) / torch.arange(1, test.num_exits + 1)[:, None]
    ensemble[:, -1] = log_probabilities[:, -1]
    ensemble = changed(test, ensemble)
    found = {
        "entropy": scores(test, entropy),
        "confidence": scores(test, with_fields(entropy, exit_policy="confidence")),
        "temperature": scores(changed(test, test.exit_logits / temperatures[:, None]), entropy),
        "energy": scores(test, entropy, energy),
        "ensemble": scores(ensemble, entropy),
        "ensemble_uncertainty": scores(test, entropy, exit_uncertainties(ensemble, ExitPolicy.of(entropy))),
    }
    of_seeds = []
    for seed in GATE_SEEDS:
        order = torch.randperm(len(dev.exit_logits), generator=torch.Generator().manual_seed(seed))
        part = dev.select(order[: round(GATE_SHARE * len(order))].sort().values)
        learned = with_fields(config, gates=fitted_gates(part, config), exit_policy="learned", calibration=None)
        of_seeds.append({**scores(test, learned), **told_by(test, learned)})
    found["learned"] = {name: mean([own[name] for own in of_seeds]) for name in ("accuracy", "agreement")}
    found["learned"] |= {"seeds": of_seeds}
    found["entropy"] |= told_by(test, entropy)
    return found


def told_by(record: ExitRecord, config: PreTrainedConfig) -> dict:
    """Return the reliability diagram of a config's policy, and how far it is off."""
    table = reliability(record, config)
    return {"off": reliability_error(table), "reliability": table[["uncertainty", "differs"]].round(5).values.tolist()}


def changed(record: ExitRecord, exit_logits: torch.Tensor) -> ExitRecord:
    return ExitRecord(exit_logits, record.layer_flops, record.exit_flops, record.labels, record.member_layers)


def mean(rows: list[list[float | None]]) -> list[float | None]:
    return [None if None in column else sum(column) / len(column) for column in zip(*rows, strict=True)]


def scores(
    record: ExitRecord, config: PreTrainedConfig, uncertainties: torch.Tensor | None = None
) -> dict[str, list[float | None]]:
    """Return accuracy and agreement at each of `COMPARED`."""
    curves = {
        "accuracy": curve_of(record, config, "flops", lambda answers, _: answers != record.labels, uncertainties),
        "agreement": curve_of(record, config, "flops", torch.ne, uncertainties),
    }
    return {name: [agreement_at(curve, wanted) for wanted in COMPARED] for name, curve in curves.items()}


def dial(model: FastBertForSequenceClassification, dev: ExitRecord, test: ExitRecord) -> dict[str, list]:
    """Return by the policy what was got on test of the speed-ups asked for, as a share; calibrated on dev."""
    found = {}
    for policy in ("entropy", "learned"):
        calibrate(model, dev, exit_policy=policy)
        config, got = model.config, []
        full = replay_at_speed(test, config, 0.0).flops.sum().item()
        for wanted in SPEED_UPS:
            reaches = wanted <= config.calibration["speed_ups"][-1]
            speed = speed_for(config.calibration, wanted) if reaches else None
            spent = None if speed is None else replay_at_speed(test, config, speed).flops.sum().item()
            got.append(None if spent is None else full / spent / wanted)
        found[policy] = got
    return found


def seconds_to_calibrate(model: FastBertForSequenceClassification, record: ExitRecord, rows: int = 2000) -> float:
    """Return how long calibration takes beside its pass, for gates and so many texts; the median of three."""
    numbers = torch.arange(rows) % len(record.exit_logits)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        calibrate(model, record.select(numbers), exit_policy="learned")
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[1]


def certificates(config: PreTrainedConfig, dev: ExitRecord, test: ExitRecord) -> dict[str, dict]:
    """
    Certify on one half of the test texts, chosen 1,000 times by chance, and look how many answers differ on all and on
    the other half: by fixed-sequence testing, and by a procedure that must not be used: the greatest speed of the grid
    at which no more than the share differ on the half itself.
    """
    found = {}
    for policy in ("entropy", "learned"):
        gates = fitted_gates(dev, config) if policy == "learned" else None
        own = with_fields(config, gates=gates, exit_policy=policy, calibration=None)
        full = replay_at_speed(test, own, 0.0)
        differs, costs = [], []
        for speed in GRID:
            replayed = replay_at_speed(test, own, speed)
            differs.append(replayed.logits.argmax(-1) != full.logits.argmax(-1))
            costs.append(replayed.flops)
        differs, costs = torch.stack(differs, 1), torch.stack(costs, 1).double().mean(0)  # [rows, speeds], [speeds]
        speed_ups, shares = full.flops.double().mean() / costs, differs.double().mean(0)
        found[policy] = {
            f"{risk:g}, {confidence:g}": of_promise(differs, speed_ups, shares, risk, confidence)
            for risk, confidence in PROMISES
        }
    return found


def of_promise(
    differs: torch.Tensor, speed_ups: torch.Tensor, shares: torch.Tensor, risk: float, confidence: float
) -> dict[str, float]:
    rows, generator = len(differs), torch.Generator().manual_seed(0)
    half = rows // 2
    broken, exceeded, uncorrected, reached, none = 0, 0, 0, [], 0
    for _ in range(SPLITS):
        order = torch.randperm(rows, generator=generator)
        errors = differs[order[:half]].sum(0)
        bounds = upper_bounds(errors.tolist(), half, confidence)
        accepted = [place for place, bound in enumerate(bounds) if bound <= risk]
        if accepted:
            place = accepted[-1]
            broken += shares[place].item() > risk
            exceeded += differs[order[half:], place].double().mean().item() > risk
            reached.append(speed_ups[place].item())
        else:
            none += 1
            reached.append(1.0)
        naive = (errors / half <= risk).nonzero()[-1].item()
        uncorrected += shares[naive].item() > risk
    oracle = (shares <= risk).nonzero()[:, 0]
    return {
        "texts": half,
        "broken": broken / SPLITS,
        "exceeded_on_the_other_half": exceeded / SPLITS,
        "broken_without_correction": uncorrected / SPLITS,
        "nothing_certified": none / SPLITS,
        "speed_up": sum(reached) / len(reached),
        "speed_up_of_an_oracle": speed_ups[oracle].max().item() if len(oracle) else 1.0,
    }
