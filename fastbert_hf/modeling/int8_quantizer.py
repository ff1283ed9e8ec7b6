"""Int8 as Transformers quantises: `from_pretrained(id, quantization_config=FastBertInt8Config())`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from .int8_products import quantise_weights


METHOD = "fastbert_int8"
# Names in a config.json, which comes from anywhere.
MOST_NAMES, LONGEST_NAME = 1_000, 200


class FastBertInt8Config(QuantizationConfigMixin):
    """
    Say that a model's backbone has int8 weights, a scale for each output, and rounds activations to int8, with a scale
    for each token. Exits stay in float32.

    Args:
        modules_to_not_convert (`list[str]`, *optional*):
            Modules that stay in float32: a part of their names between dots, such as `"layer.11"` or `"output.dense"`.

    Example:

    ```python
    >>> from fastbert_hf import FastBertInt8Config

    >>> model = AutoModelForSequenceClassification.from_pretrained(
    ...     "org/fastbert-chnsenticorp", quantization_config=FastBertInt8Config()
    ... )
    >>> model.save_pretrained("int8")  # about a quarter of the size
    ```
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None, **kwargs: Any):
        method = kwargs.pop("quant_method", METHOD)
        if kwargs or method != METHOD:
            raise ValueError(
                f"FastBertInt8Config has no {next(iter(kwargs), 'quant_method')!r:.80}. Example: "
                'FastBertInt8Config(modules_to_not_convert=["layer.11"])'
            )
        names = [] if modules_to_not_convert is None else modules_to_not_convert
        if not isinstance(names, (list, tuple)) or not all(
            isinstance(name, str) and 0 < len(name) <= LONGEST_NAME for name in names
        ):
            raise ValueError(
                f"modules_to_not_convert={names!r:.80} must be a list of names of modules. Example: "
                'FastBertInt8Config(modules_to_not_convert=["layer.11"])'
            )
        if len(names) > MOST_NAMES:
            raise ValueError(
                f"modules_to_not_convert names {len(names):,} modules, at most {MOST_NAMES:,} are allowed."
            )
        self.quant_method = METHOD
        self.modules_to_not_convert = list(names)


class Int8Quantize(ConversionOps):
    """Round a weight while it is loaded."""

    def __init__(self, hf_quantizer: HfQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], full_layer_name: str | None = None, **kwargs: Any) -> dict:
        (value,) = input_dict.values()
        quantised, scale = quantise_weights(value[0] if isinstance(value, list) else value)
        return {full_layer_name: quantised, f"{full_layer_name}_scale": scale}


class FastBertInt8Quantizer(HfQuantizer):
    """What `from_pretrained` asks for a [`FastBertInt8Config`]."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Need nothing beside PyTorch."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return not self.pre_quantized and name == "weight" and hasattr(module, "weight_scale")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        put_layers = getattr(model, "_put_int8_layers", None)  # its own, as a model may bring its code
        if put_layers is None:
            raise ValueError(
                f"FastBertInt8Config is for the models of fastbert_hf, not for {type(model).__name__}. Give it exits "
                "first: FastBertForSequenceClassification.from_classifier(...)"
            )
        put_layers(self.quantization_config.modules_to_not_convert)

    def get_quantize_ops(self) -> Int8Quantize:
        return Int8Quantize(self)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Students learn, and adapters; int8 weights do not."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """As [`is_trainable`]: Transformers asks for this where there are no adapters."""
        return True


# A model that brings its code may have come before.
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(FastBertInt8Config)
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(FastBertInt8Quantizer)


__all__ = ["FastBertInt8Config"]
