"""What a calibrated model may be asked for, printed and drawn: its dial, its certificates, and its reliability."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .options import one_line_errors


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..calibration import Calibration
    from ..evaluation import ExitRecord


FIELDS = ("exit_policy", "speed", "gates", "calibration", "certification")


def calibrate_folder(
    model: PreTrainedModel,
    record: ExitRecord,
    folder: str,
    exit_policy: str | None,
    linear: bool,
    max_length: int | None,
) -> Calibration:
    """Calibrate a model, and write what was found into the config of its folder."""
    from transformers import AutoTokenizer

    from ..calibration import calibrate
    from ..files import write_whole

    with one_line_errors():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = calibrate(model, record, tokenizer, exit_policy=exit_policy, linear=linear, max_length=max_length)
    path = Path(folder, "config.json")
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved.update({name: getattr(model.config, name) for name in FIELDS})
    write_whole(path, json.dumps(saved, indent=2, sort_keys=True) + "\n")
    return found


def print_policies(found: Calibration) -> None:
    """Print how far each exit policy agrees with the full model."""
    import pandas as pd

    table = pd.DataFrame(found.agreements).T
    table.columns = [f"{speed_up:g}x" for speed_up in table.columns]
    print("Agreement with the full model at equal costs, on texts to which no gate was fitted\n")
    print(table.to_string(float_format="{:.4f}".format, na_rep="-"))
    print(f"\nThe best policy here is {found.best_policy}.\n")


def print_dial(config: PreTrainedConfig, folder: str) -> None:
    """Print which speed-ups and certificates calls may ask for, if the model was calibrated."""
    from ..modeling.dials import SPEED_UPS, greatest_speedup, speed_for
    from ..sharing.dial_tables import certificates_of

    calibration = config.calibration
    if calibration is None:
        return
    greatest, policy = greatest_speedup(calibration), config.exit_policy
    known = [speedup for speedup in SPEED_UPS if speedup <= greatest]
    speeds = ", ".join(f"{speedup:g}x is below {speed_for(calibration, speedup):.4g}" for speedup in known)
    speeds = f": with {policy} {speeds}" if speeds else ""
    print(f"Calls of {folder} may ask for a speedup up to {greatest:g}{speeds}.")
    if config.certification is None:
        return
    rows = config.certification["rows"]
    print(f"Certified with confidence 0.9, on {rows:,} texts:")
    for risk, certificate in certificates_of(config).items():
        told = "not certifiable with so few texts, or at no speed"
        if certificate is not None:
            speed, speed_up = certificate
            told = f"{speed_up:.2f}x, below {speed:.4g}"
        print(f"  max_disagreement={risk:g}  {told}")
    print()


def print_reliability(record: ExitRecord, config: PreTrainedConfig) -> None:
    """Print how many answers differ that are so uncertain."""
    from ..evaluation import reliability, reliability_error
    from ..modeling.exit_policies import exit_range

    if len(exit_range(config.num_hidden_layers, config.min_exit_layer, config.max_layers)) == 1:
        return  # one exit answers everything
    table = reliability(record, config)
    print(f"Answers of the exits by their uncertainty ({config.exit_policy}), and how many are not the full model's\n")
    print(table.to_string(index=False, float_format="{:.4f}".format))
    print(f"\nOn average the uncertainty is {100 * reliability_error(table):.1f} points off that share.\n")
