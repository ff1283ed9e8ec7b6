"""The model of a process that serves: the same whether it is an actor, a replica or a page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, pipeline

from ..modeling.int8_quantizer import FastBertInt8Config
from ..modeling.pipeline_fastbert import FastTextClassificationPipeline


DEFAULT_MODEL_DIR = Path(__file__).parents[1] / "default_model"


def load_config(model: str | os.PathLike | None = None) -> PreTrainedConfig:
    """
    Load the config of a model, by which it is known what it can be asked for before its weights are loaded.

    Args:
        model (`str` or `PathLike`, *optional*): As in [`load_pipeline`].

    Raises:
        ValueError: If there is no such model, or it is not one of FastBERT.
    """
    try:
        config = AutoConfig.from_pretrained(model or DEFAULT_MODEL_DIR)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"the model {model} cannot be loaded: {str(error).splitlines()[0]}") from error
    if not config.model_type.startswith("fastbert"):
        raise ValueError(
            f"{model} is a model of type {config.model_type!r}, not one of FastBERT: wrap it with "
            "FastBertForSequenceClassification.from_classifier(name) and self-distil it first"
        )
    return config


def load_pipeline(
    model: str | os.PathLike | None = None,
    int8: bool = False,
    truncate: bool = False,
    max_length: int | None = None,
    **settings: Any,
) -> FastTextClassificationPipeline:
    """
    Load a model and its tokenizer.

    Args:
        model (`str` or `PathLike`, *optional*): A folder or a name on the Hub; the package's own model unless given.
        int8 (`bool`): Whether to round the weights while they are loaded ([`FastBertInt8Config`]).
        truncate (`bool`): Whether texts are cut to what the model reads. Those that are longer are errors otherwise.
        max_length (`int`, *optional*): Cut texts to this many tokens.
        settings: Of [`FastTextClassificationPipeline`], such as `speed`, `speedup` or `max_disagreement`.
    """
    if int8:
        settings["model_kwargs"] = {"quantization_config": FastBertInt8Config()}
    if truncate or max_length is not None:
        settings["truncation"] = True
    if max_length is not None:
        settings["max_length"] = max_length
    return pipeline("fast-text-classification", model=None if model is None else os.fspath(model), **settings)
