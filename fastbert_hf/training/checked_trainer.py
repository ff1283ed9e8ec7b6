"""CheckedTrainer: a `Trainer` that takes texts or tokens as they come, and keeps no weights that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, Trainer
from transformers.utils import logging

from ..modeling.checkpoint_files import read_shapes
from ..modeling.dials import threshold_of
from ..modeling.families import max_text_tokens
from ..rows import PaddingCollator, encoded_rows
from .leaf_usage import LeafUsage, trees_of


logger = logging.get_logger(__name__)


class CheckedTrainer(Trainer):
    """
    A `Trainer` for rows of texts, with these differences:

    - Rows may be texts (strings, or rows with `text`, `text_pair`, `label`), tokenized with `processing_class`, or
      tokens of any length. Batches are padded, and columns that the model does not read are left out.
    - A training whose weights become NaN or infinite ends with an error: at a log that shows it, at the next save, or
      at its end. Such weights are never saved.
    - Logs tell how the trees of fast feed-forward layers are used ([`LeafUsage`]).
    - What was calibrated of the weights before ([`calibrate`]) is taken out of the config.
    - A checkpoint to resume from must hold every weight of the model, finite and in its shape, and no others.

    Args:
        model (`PreTrainedModel`): A model of texts. A PEFT model around one works, too.
        kwargs: As in `Trainer`.
    """

    # What the rows may have for this trainer, beside what the model reads: a number each.
    own_columns: tuple[str, ...] = ()

    def __init__(self, model: PreTrainedModel | None = None, args: Any = None, **kwargs):
        super().__init__(model, args, **kwargs)
        if any(weight.requires_grad for tree in trees_of(self.model) for weight in tree.parameters()):
            self.add_callback(LeafUsage())
        if kwargs.get("data_collator") is None:
            self.data_collator = PaddingCollator.of(self.model, columns=self.own_columns)
        self.train_dataset = self._encoded(self.train_dataset)
        has_several = isinstance(self.eval_dataset, Mapping) and "input_ids" not in self.eval_dataset
        of_names = self.eval_dataset if has_several else {"": self.eval_dataset}
        encoded = {name: self._encoded(rows) for name, rows in of_names.items()}
        self.eval_dataset = encoded if has_several else encoded[""]

    def _encoded(self, rows: Any) -> Any:
        if rows is None or isinstance(rows, str):  # a name among several data sets
            return rows
        tokenizer, config, limit = self.processing_class, base_model(self.model).config, None
        if tokenizer is not None and hasattr(config, "text_config"):
            limit = min(tokenizer.model_max_length, max_text_tokens(config.text_config))
        kind = getattr(config, "label_kind", "ids")
        return encoded_rows(rows, tokenizer, limit, config.label2id, self.own_columns, kind)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self.own_columns if name not in self._signature_columns]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return super().get_eval_dataloader(self._encoded(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return super().get_test_dataloader(self._encoded(test_dataset))

    def train(self, *args, **kwargs):
        # What was calibrated is of the weights before. With `model_init` there is no model yet.
        if self.model is not None:
            forget_calibration(base_model(self.model).config)
        output = super().train(*args, **kwargs)
        check_finite_weights(self.model)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        # Weights are looked at only where a loss gives reason to. With float16 a single loss may overflow, and the
        # step is left out.
        if not all(math.isfinite(value) for value in logs.values() if isinstance(value, Real)):
            check_finite_weights(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        check_finite_weights(self.model)
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if model is None:  # not in shards
            check_resumable(self.model, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        check_finite_weights(self.model, f"{resume_from_checkpoint} holds weights")


def forget_calibration(config: PreTrainedConfig) -> None:
    """Take out of a config what was measured with the weights before. A linear speed becomes the threshold it was."""
    if getattr(config, "calibration", None) is not None:
        config.speed = threshold_of(config, config.speed)
    if getattr(config, "exit_policy", None) == "learned":
        logger.warning('the gates of exit_policy="learned" are of the weights before: the policy is "entropy" now.')
        config.exit_policy = "entropy"
    for name in ("gates", "calibration", "certification"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the model itself, out of a PEFT model where there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_finite_weights(model: nn.Module, whose: str = "the training ended with weights") -> None:
    """
    Raise a `ValueError` if a weight that learns is NaN or infinite.

    Args:
        model (`nn.Module`): After a training, or after a checkpoint was loaded.
        whose (`str`): The beginning of the message.
    """
    learning = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    broken = [name for name, weight in learning if not weight.is_meta and not weight.isfinite().all()]
    if broken:
        raise ValueError(
            f"{whose} that are NaN or infinite: {_listed(broken)} (of {len(learning)} that learn). Train anew with a "
            "lower learning_rate, such as 2e-5 for a whole model or 2e-4 for exits alone, or resume from an earlier "
            "checkpoint: trainer.train(resume_from_checkpoint='outputs/checkpoint-500')"
        )


def check_resumable(model: nn.Module, checkpoint: str | Path) -> None:
    """
    Raise a `ValueError` unless a checkpoint holds the weights of the model (with PEFT those of its adapter), name by
    name and shape by shape. `Trainer` would leave what is missing as it is, and what is too much out.

    Args:
        model (`nn.Module`): That is to go on from the checkpoint.
        checkpoint (`str` or `Path`): Folder that a `Trainer` wrote.
    """
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        files, weights = Path(checkpoint).glob("adapter_model.safetensors"), get_peft_model_state_dict(model)
    else:
        files, weights = Path(checkpoint).glob("model*.safetensors"), model.state_dict()
    found = read_shapes(sorted(map(str, files)))
    wanted = {name: tuple(weight.shape) for name, weight in weights.items()}
    faults = {
        "lacks": [name for name in wanted if name not in found],
        "also holds": [name for name in found if name not in wanted],
        "has other shapes of": [name for name in wanted if found.get(name, wanted[name]) != wanted[name]],
    }
    if found and any(faults.values()):  # other formats are left to `Trainer`
        differences = "; ".join(f"it {fault} {_listed(names)}" for fault, names in faults.items() if names)
        raise ValueError(
            f"{checkpoint} is no checkpoint of this model: {differences}. Resume with a model of the config that was "
            "saved there, or train from the start: trainer.train()"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
