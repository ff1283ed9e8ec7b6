"""Stock encoders and classifiers, loaded for `from_backbone` and `from_classifier`."""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from .adapter_checks import find_adapter
from .families import ENCODER_FAMILIES, EncoderFamily, get_encoder_family
from .int8_layers import has_int8_layers


DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
LOADING_ARGUMENTS = (*DOWNLOAD_ARGUMENTS, "dtype", "trust_remote_code", "use_safetensors")
# Fields of every config, beside our own, that matter here.
OF_LABELS = ("id2label", "label2id", "problem_type")
# The packed attention takes the place of any other, and one that a checkpoint names may be code on the Hub.
LOADING_DEFAULTS = {"dtype": torch.float32, "attn_implementation": "eager"}


def split_arguments(
    config_class: type[PreTrainedConfig], arguments: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort keywords into fields of the config and arguments of `from_pretrained`; others are a `TypeError`."""
    fields = [name for name in config_class.__dataclass_fields__ if name not in ("text_config", "dtype")]
    fields += ["num_labels", "attn_implementation"]
    unknown = [name for name in arguments if name not in fields and name not in LOADING_ARGUMENTS]
    if unknown:
        own = [name for name in fields if name not in PreTrainedConfig.__dataclass_fields__] + list(OF_LABELS)
        near = get_close_matches(unknown[0], [*own, *LOADING_ARGUMENTS], 1)
        raise TypeError(
            f"unexpected {', '.join(unknown)}{f' (did you mean {near[0]}?)' if near else ''}: give fields of "
            f"{config_class.__name__} ({', '.join(own)}) or arguments of from_pretrained "
            f"({', '.join(LOADING_ARGUMENTS)})."
        )
    config_arguments = {name: value for name, value in arguments.items() if name in fields}
    loading_arguments = {name: value for name, value in arguments.items() if name not in fields}
    return config_arguments, loading_arguments


def load_encoder(name_or_path: str | PathLike | PreTrainedModel, **kwargs) -> PreTrainedModel:
    """Return a supported encoder without head and pooler. Arguments as in `from_backbone` and `from_pretrained`."""
    if isinstance(name_or_path, PreTrainedModel):
        refuse_wrapped(name_or_path.config)
        return bare_encoder(copy_of(name_or_path.base_model, **kwargs))
    config = AutoConfig.from_pretrained(name_or_path, **without_dtype(kwargs))
    refuse_wrapped(config)
    arguments = {"add_pooling_layer": False} if get_encoder_family(config).has_pooler else {}
    return bare_encoder(load_stock(AutoModel, name_or_path, [], **kwargs, **arguments))


class StockHead(NamedTuple):
    """What stock Transformers has for a task."""

    auto_class: type
    suffix: str  # of the names of its models
    # From a family to the Linears of its head, `(dense, out_proj)` or `(out_proj,)`; `None` where it has another form.
    names: Callable[[EncoderFamily], tuple[str, ...] | None]
    exit_type: str  # that of an exit of the same structure


STOCK_HEADS = {
    "text-classification": StockHead(
        AutoModelForSequenceClassification, "ForSequenceClassification", lambda family: family.head, "linear"
    ),
    "token-classification": StockHead(
        AutoModelForTokenClassification,
        "ForTokenClassification",
        lambda family: family.token_head and (family.token_head,),
        "token_linear",
    ),
    "question-answering": StockHead(
        AutoModelForQuestionAnswering,
        "ForQuestionAnswering",
        lambda family: family.span_head and (family.span_head,),
        "token_linear",
    ),
}


def load_classifier(
    name_or_path: str | PathLike | PreTrainedModel, task: str = "text-classification", **kwargs
) -> tuple[PreTrainedModel, nn.Linear | None, nn.Linear]:
    """
    Return a fine-tuned stock classifier in parts: its encoder without the pooler, and the Linears of its head, of
    which that of tokens has one.
    """
    stock = STOCK_HEADS[task]
    if isinstance(name_or_path, PreTrainedModel):
        names = head_names(name_or_path.config, task)
        model = copy_of(name_or_path, **kwargs)
        if not type(model).__name__.endswith(stock.suffix):
            what = task.replace("text", "sequence").replace("-classification", " classifier")
            raise ValueError(f"{type(model).__name__} is not a {what}. Use from_backbone(model, num_labels=...).")
    else:
        names = head_names(AutoConfig.from_pretrained(name_or_path, **without_dtype(kwargs)), task)
        model = load_stock(stock.auto_class, name_or_path, names, **kwargs)
    *dense, out_proj = map(model.get_submodule, names)
    return bare_encoder(model.base_model), dense[0] if dense else None, out_proj


def load_stock(auto_class: type, name_or_path: str | PathLike, head: Sequence[str], **kwargs) -> PreTrainedModel:
    """
    Load a stock model as `auto_class.from_pretrained`; `head` names its layers beside the encoder. Weights that it
    lacks are a `ValueError`. What Transformers reports of weights that are not needed, such as a pooler or the head of
    the pretraining, is not shown.
    """
    places = {name: value for name, value in kwargs.items() if name in DOWNLOAD_ARGUMENTS}
    if find_adapter(name_or_path, **places) is not None:
        raise ValueError(
            f"{name_or_path} holds an adapter beside the model, which PEFT would put on it unasked: move adapter_* "
            "elsewhere, or merge it first and give the model, as in PeftModel.from_pretrained(model, "
            "adapter).merge_and_unload()."
        )
    with held_reports() as reports:
        model, info = auto_class.from_pretrained(
            name_or_path, output_loading_info=True, **{**LOADING_DEFAULTS, **kwargs}
        )
        missing = sorted(info["missing_keys"])
        if any(name.rpartition(".")[0] in head for name in missing):
            raise ValueError(
                f"{name_or_path} has no fine-tuned classifier head (its checkpoint lacks {', '.join(missing[:6])}). "
                f"For a pretrained encoder use from_backbone({str(name_or_path)!r}, num_labels=...)."
            )
        if missing:
            raise ValueError(
                f"{name_or_path} lacks weights of the encoder that its config describes: {', '.join(missing[:3])}"
                f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}. Download or save it again."
            )
        parts = {name for name, _ in model.base_model.named_children()}
        unexpected = (name.removeprefix(f"{model.base_model_prefix}.") for name in info["unexpected_keys"])
        if not any(name.partition(".")[0] in parts for name in unexpected):
            reports.clear()
    return model


@contextmanager
def held_reports() -> Iterator[list[logging.LogRecord]]:
    """Hold what Transformers reports of weights that this thread loads. What the list holds at the end is shown."""
    logger, reports, this_thread = logging.getLogger("transformers.modeling_utils"), [], threading.get_ident()

    def hold(record: logging.LogRecord) -> bool:
        is_report = " LOAD REPORT" in str(record.msg) and record.thread == this_thread
        if is_report:
            reports.append(record)
        return not is_report

    logger.addFilter(hold)
    try:
        yield reports
    finally:
        logger.removeFilter(hold)
        for record in reports:
            logger.handle(record)


def classifier_config(text_config: PreTrainedConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of the config around a stock classifier, which brings its labels and its head."""
    kept = ("teacher_exit_type", "num_labels", "id2label", "label2id", "problem_type")
    given = [name for name in kept if name in arguments]
    if given:
        raise ValueError(
            f"from_classifier keeps the classifier's own head and its {text_config.num_labels} labels: leave out "
            f"{', '.join(given)}."
        )
    return {
        "text_config": text_config,
        "teacher_exit_type": STOCK_HEADS[arguments["task"]].exit_type,
        **{name: getattr(text_config, name) for name in ("id2label", "label2id", "problem_type")},
        **arguments,
    }


def head_names(config: PreTrainedConfig, task: str = "text-classification") -> tuple[str, ...]:
    """Return the Linears of a family's stock classifier. If it cannot be kept, a `ValueError` says why."""
    refuse_wrapped(config)
    names_of = STOCK_HEADS[task].names
    names = names_of(get_encoder_family(config))
    if names is None:
        supported = [name for name, family in ENCODER_FAMILIES.items() if names_of(family) is not None]
        raise ValueError(
            f"The stock classifier of {config.model_type!r} is not dense, activation, dropout, Linear on the first "
            "token (it has a normalisation of its own and may average the tokens), so it cannot be kept as the "
            f"teacher. Supported are: {', '.join(supported)}. Use from_backbone(...) and fine-tune instead."
        )
    return names


def refuse_wrapped(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` at a FastBERT checkpoint, which needs no wrapping."""
    if config.model_type == "fastbert":
        raise ValueError(
            "This is a FastBERT model already. Use FastBertForSequenceClassification.from_pretrained(...)."
        )


def copy_of(model: PreTrainedModel, dtype: str | torch.dtype | None = None, **kwargs) -> PreTrainedModel:
    """Return a copy of a loaded model, which needs no other arguments of `from_pretrained`."""
    if kwargs:
        raise ValueError(f"the model is loaded already: leave out {', '.join(kwargs)}, or give its name.")
    if has_int8_layers(model):
        raise ValueError("the encoder has int8 layers: give the one in float32, and convert what comes out.")
    return copy.deepcopy(model).to(dtype_of(dtype) or model.dtype)


def bare_encoder(encoder: PreTrainedModel) -> PreTrainedModel:
    """Strip an encoder of the pooler that no exit reads, and of the chunks of its feed-forward layers."""
    if get_encoder_family(encoder.config).has_pooler:
        encoder.pooler = None
    # A name on the Hub tells where the model came from; a folder means nothing on another machine.
    if os.path.isdir(encoder.config._name_or_path):
        encoder.config._name_or_path = ""
    # Chunks must divide the number of tokens, which no packed batch can promise.
    for module in [encoder.config, *encoder.modules()]:
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 0
    return encoder


def keep_first_layers(encoder: PreTrainedModel, num_hidden_layers: int) -> None:
    """Drop the layers above the first `num_hidden_layers`."""
    config = encoder.config
    if not 1 <= num_hidden_layers <= config.num_hidden_layers:
        raise ValueError(
            f"num_hidden_layers must be from 1 to {config.num_hidden_layers} (the layers of this encoder), got "
            f"{num_hidden_layers}."
        )
    layers = encoder.get_submodule(get_encoder_family(config).layers)
    # ALBERT repeats a few groups of layers, by a rule that depends on how many layers there are.
    if len(layers) != config.num_hidden_layers and len(layers) > 1:
        raise ValueError(f"an encoder of type {config.model_type} with {len(layers)} groups of layers cannot be cut.")
    del layers[num_hidden_layers:]
    config.num_hidden_layers = num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_hidden_layers]


def dtype_of(asked: str | torch.dtype | None) -> torch.dtype | None:
    """Return what the `dtype` of a call of `from_pretrained` stands for; `None` where that is the model's own."""
    if asked == "auto":
        return None
    return getattr(torch, asked) if isinstance(asked, str) else asked


def without_dtype(arguments: dict[str, Any]) -> dict[str, Any]:
    """Leave out the dtype: a config is loaded as it is, whatever its weights are wanted in."""
    return {name: value for name, value in arguments.items() if name != "dtype"}
