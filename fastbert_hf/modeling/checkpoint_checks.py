"""
What a config.json claims, checked before anything is built from it. A file that cannot be trusted then costs one clear
error, not gigabytes or minutes.

`AutoConfig` and `AutoModel` read the whole file themselves, before any class of this package is asked: its size is
bounded where these classes load it, and what it holds is bounded everywhere.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN

from .exit_classifiers import EXIT_TYPES
from .exit_policies import check_speed, exit_range
from .families import ENCODER_FAMILIES
from .feed_forward_settings import check_feed_forward, feed_forward_parameters
from .packed_attention import ATTENTION_KERNELS


# The largest value of every number that sizes a model; the smallest is 1. No BERT-like encoder comes near them.
LARGEST_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_hidden_groups", "inner_group_num"), 1_000),
    **dict.fromkeys(("hidden_size", "dim", "embedding_size", "exit_hidden_size"), 65_536),
    **dict.fromkeys(("num_attention_heads", "n_heads", "exit_num_attention_heads"), 65_536),
    **dict.fromkeys(("intermediate_size", "hidden_dim"), 1_048_576),
    **dict.fromkeys(("type_vocab_size", "task_type_vocab_size", "global_attn_every_n_layers", "patience"), 1_000),
    "vocab_size": 10_000_000,
    "max_position_embeddings": 1_000_000,
    "num_labels": 100_000,
}
# Sizes that are each allowed must not multiply to a terabyte. This is 80 GB in float32.
MOST_PARAMETERS = 20_000_000_000
# Bytes: one label takes 60, and what Python makes of a file up to 25 times as many as it has.
LARGEST_CONFIG = 8_000_000
# In all lists and dicts together: 100,000 labels have four entries each, two of them in the backbone's config.
MOST_VALUES = 500_000
LONGEST_STRING = 100_000
DEEPEST_NESTING = 8
MOST_MEMBERS = 16
DTYPES = ("float16", "bfloat16", "float32", "float64")
ACTIVATIONS = ("hidden_act", "activation", "hidden_activation", "classifier_activation")
# What Transformers would change the layers by, or fetch from the Hub and run.
KERNELS = ("attn_implementation", "_attn_implementation")
PATCHES = ("per_layer_config", "_heterogeneity_spec", "fusion_config", "distributed_config")
PATCHES += ("experts_implementation", "_experts_implementation")
WEIGHTS_FILE = r"[\w.-]+\.safetensors"
# What a file says may be of any length and depth, a message not.
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80
shortened = SHORT.repr


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn errors of Transformers and PyTorch, which name no setting, into a `ValueError` that says what failed."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{what} ({type(error).__name__}: {shortened(str(error))}): load the config that was saved with the "
            "weights."
        ) from error


def read_config(path: str | os.PathLike, read: Callable[[str | os.PathLike], Any]) -> dict[str, Any]:
    """Return what `read` makes of a config.json, unless it is larger than that of any model, or holds more."""
    size = os.path.getsize(path)
    # Only what is small is counted: every value but the first of a list or dict stands after a comma.
    values = 0 if size > LARGEST_CONFIG else sum(map(Path(path).read_bytes().count, (b",", b"[", b"{")))
    if size > LARGEST_CONFIG or values > MOST_VALUES:
        raise ValueError(
            f"{path} has {size:,} bytes{f' and {values:,} values' if values else ''}, but a config has at most "
            f"{LARGEST_CONFIG:,} and {MOST_VALUES:,}: save the checkpoint again with model.save_pretrained(folder)."
        )
    with explained(f"{path} cannot be read"):
        config = read(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {shortened(config)}, but a config is a JSON object, as in {{...}}.")
    return config


def check_raw_config(config: dict[str, Any], config_class: type[PreTrainedConfig]) -> None:
    """Raise a `ValueError` unless the model of a config.json can be built in bounded time and memory."""
    text_config = config.get("text_config")
    if isinstance(text_config, PreTrainedConfig):
        text_config = text_config.to_dict()
    text_config = {} if text_config is None else text_config
    if not isinstance(text_config, dict):
        raise ValueError(
            f"the config says text_config={shortened(text_config)}, but it must hold the backbone's own config, as in "
            '{"model_type": "bert", "num_hidden_layers": 12}.'
        )
    model_type = text_config.get("model_type", "bert")
    if not isinstance(model_type, str) or model_type not in ENCODER_FAMILIES:
        raise ValueError(
            f"the config says text_config.model_type={shortened(model_type)}: such a backbone is not supported. "
            f"Supported are: {', '.join(ENCODER_FAMILIES)}."
        )
    config = {**config, "text_config": text_config}
    check_numbers(config)
    check_values(config)
    check_names(config, "", config_class)
    check_names(text_config, "text_config.", CONFIG_MAPPING[model_type])
    for check in (check_sizes, check_raw_labels, check_kernels, check_choices):
        check(config, "")
        check(text_config, "text_config.")
    dropout = config.get("exit_dropout", 0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"exit_dropout must be a number in [0, 1), got {shortened(dropout)}.")
    exit_range(backbone_size(text_config, "num_hidden_layers"), config.get("min_exit_layer"), config.get("max_layers"))
    check_padding(text_config)
    check_parameters(estimated_parameters(config))
    check_other_files(config, "FastBertForSequenceClassification")


def check_raw_cascade(
    config: dict[str, Any], config_class: type[PreTrainedConfig], member_class: type[PreTrainedConfig]
) -> None:
    """Raise a `ValueError` unless every member of a cascade can be built so, and all of them together."""
    members = config.get("members")
    if not isinstance(members, list) or not 2 <= len(members) <= MOST_MEMBERS:
        raise ValueError(
            f"the config says members={shortened(members)}, but it must list the configs of 2 to {MOST_MEMBERS} "
            "FastBERT models."
        )
    own = {name: value for name, value in config.items() if name != "members"}
    check_numbers(own)
    check_values(own)
    check_names(own, "", config_class)
    for check in (check_sizes, check_raw_labels, check_kernels, check_choices):
        check(own, "")
    check_other_files(own, "CascadeForSequenceClassification")
    parameters = 0
    for number, member in enumerate(members, start=1):
        if isinstance(member, PreTrainedConfig):
            member = member.to_dict()
        if not isinstance(member, dict):
            raise ValueError(f"member {number} of the cascade is {shortened(member)}, not the config of a model.")
        try:
            check_raw_config(member, member_class)
        except ValueError as error:
            raise ValueError(f"member {number} of the cascade: {error}") from None
        parameters += estimated_parameters(member)
    check_parameters(parameters)


def check_parameters(parameters: int) -> None:
    """Raise unless a model of so many parameters may be built."""
    if parameters > MOST_PARAMETERS:
        raise ValueError(
            f"the config describes a model of about {parameters:,} parameters, but at most {MOST_PARAMETERS:,} are "
            "allowed: lower hidden_size, num_hidden_layers, intermediate_size, vocab_size or the number of labels."
        )


def check_numbers(config: dict[str, Any]) -> None:
    """Raise unless the speed is a number from 0 to 1, and the limits of the depth are no lists or long texts."""
    for name in ("speed", "min_exit_layer", "max_layers"):
        value = config.get(name)
        if isinstance(value, (dict, list)) or (isinstance(value, str) and len(value) > SHORT.maxstring):
            raise ValueError(f"the config says {name}={shortened(value)}, but it must be a number: leave it out.")
    check_speed(config.get("speed", 0))


def check_values(config: dict[str, Any]) -> None:
    """Raise at a number that is not finite, and at more values, longer texts or deeper nesting than a config has."""
    waiting, left = [("", config, 0)], MOST_VALUES
    while waiting:
        prefix, part, depth = waiting.pop()
        left -= len(part)
        if left < 0 or depth > DEEPEST_NESTING:
            raise ValueError(
                f"the config holds more than {MOST_VALUES:,} values or is nested more than {DEEPEST_NESTING} levels "
                f"deep, in {shortened(prefix)}: a config holds settings and the names of labels."
            )
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if isinstance(value, (dict, list)):
                waiting.append((f"{prefix}{key}.", value, depth + 1))
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"the config says {shortened(f'{prefix}{key}')}={value}, but every number must be finite."
                )
            elif isinstance(value, str) and len(value) > LONGEST_STRING:
                raise ValueError(
                    f"the config says {shortened(f'{prefix}{key}')}={shortened(value)}, but a text in it has at most "
                    f"{LONGEST_STRING:,} characters."
                )


def check_names(config: dict[str, Any], prefix: str, config_class: type[PreTrainedConfig]) -> None:
    """Raise at a name that would take the place of a method or a constant of the config's class."""
    settings = {field.name for field in fields(config_class)} | {"model_type", *KERNELS, *PATCHES}
    for name, value in config.items():
        known = None if name in settings else inspect.getattr_static(config_class, str(name), None)
        can_be_set = known.fset if isinstance(known, property) else hasattr(type(known), "__set__")
        if known is not None and not can_be_set:
            raise ValueError(
                f"the config says {prefix}{name}={shortened(value)}, but that is a part of "
                f"{config_class.__name__} itself and no setting: leave it out."
            )


def check_kernels(config: dict[str, Any], prefix: str) -> None:
    """Raise at an attention that Transformers would fetch from the Hub and run, and at what changes single layers."""
    for name in KERNELS:
        if config.get(name) not in (None, *ATTENTION_KERNELS):
            raise ValueError(
                f"the config says {prefix}{name}={shortened(config[name])}, but a checkpoint may ask for "
                f"{' or '.join(ATTENTION_KERNELS)} only: leave it out."
            )
    for name in PATCHES:
        if config.get(name):
            raise ValueError(
                f"the config says {prefix}{name}, but all layers have equal sizes and run as they are: leave it out."
            )


def check_sizes(config: dict[str, Any], prefix: str) -> None:
    """Raise unless everything that sizes the model is a whole number, none of them absurd."""
    for name, largest in LARGEST_SIZES.items():
        # Not isinstance, for which True is a whole number.
        if name in config and (type(config[name]) is not int or not 1 <= config[name] <= largest):
            raise ValueError(
                f"the config says {prefix}{name}={shortened(config[name])}, but it must be a whole number from 1 to "
                f"{largest:,}."
            )


def check_raw_labels(config: dict[str, Any], prefix: str) -> None:
    """Raise unless the ids of the labels are whole numbers from 0, and not too many."""
    largest = LARGEST_SIZES["num_labels"]
    for name, example in (("id2label", '{"0": "bad", "1": "good"}'), ("label2id", '{"bad": 0, "good": 1}')):
        labels = config.get(name)
        if labels is None:
            continue
        if not isinstance(labels, dict) or not 1 <= len(labels) <= largest:
            raise ValueError(
                f"the config says {prefix}{name}={shortened(labels)}, but it must name 1 to {largest:,} labels, as in "
                f"{example}."
            )
        for index in labels if name == "id2label" else labels.values():
            if type(index) not in (int, str) or not re.fullmatch(r"\d{1,9}", str(index)):
                raise ValueError(
                    f"the config gives a label the id {shortened(index)} in {prefix}{name}, but ids are whole numbers "
                    f"from 0, as in {example}."
                )


def check_labels(id2label: dict[int, Any]) -> None:
    """Raise a `ValueError` unless the labels are names for the ids 0, 1, 2 and so on."""
    missing = next((index for index in range(len(id2label)) if index not in id2label), None)
    if missing is not None:
        raise ValueError(
            f"id2label={shortened(id2label)} has no label {missing}: it must name every id from 0 to "
            f"{len(id2label) - 1} (the number of labels is {len(id2label)})."
        )
    for index, name in id2label.items():
        if type(name) not in (str, int):
            raise ValueError(f"id2label calls label {index} {shortened(name)}, but a label is a text, as in 'good'.")


def check_choices(config: dict[str, Any], prefix: str) -> None:
    """Raise at a dtype, an activation, a name or a quantisation that Transformers does not know."""
    for name in ("dtype", "torch_dtype"):
        dtype = config.get(name)
        if dtype is not None and not isinstance(dtype, torch.dtype) and dtype not in DTYPES:
            raise ValueError(
                f"the config says {prefix}{name}={shortened(dtype)}, but weights are of one of {', '.join(DTYPES)}."
            )
    for name in ACTIVATIONS:
        if name in config and (not isinstance(config[name], str) or config[name] not in ACT2FN):
            raise ValueError(
                f"the config says {prefix}{name}={shortened(config[name])}, which is no activation: choose one of "
                f"{', '.join(ACT2FN)}."
            )
    if not isinstance(config.get("_name_or_path", ""), str):
        raise ValueError(
            f"the config says {prefix}_name_or_path={shortened(config['_name_or_path'])}, but a name is a text: leave "
            "it out."
        )
    quantised = config.get("quantization_config")
    names_method = isinstance(quantised, dict) and isinstance(quantised.get("quant_method", ""), str)
    if quantised is not None and not names_method:
        raise ValueError(
            f"the config says {prefix}quantization_config={shortened(quantised)}, but it must say how the weights "
            'were quantised, as in {"quant_method": "torchao"}: leave it out if they were not.'
        )


def check_padding(text_config: dict[str, Any]) -> None:
    """Raise unless the padding id of a backbone is one of its tokens, and leaves room for positions after it."""
    model_type = text_config.get("model_type", "bert")
    padding_id = text_config.get("pad_token_id", CONFIG_MAPPING[model_type].pad_token_id)
    counts_from_it = ENCODER_FAMILIES[model_type].positions == "after_padding"
    vocab_size = backbone_size(text_config, "vocab_size")
    smallest, largest = -vocab_size, vocab_size - 1
    if counts_from_it:
        smallest, largest = 0, min(largest, backbone_size(text_config, "max_position_embeddings") - 2)
    elif padding_id is None:
        return
    if type(padding_id) is not int or not smallest <= padding_id <= largest:
        raise ValueError(
            f"the config says text_config.pad_token_id={shortened(padding_id)}, but it must be a whole number from "
            f"{smallest:,} to {largest:,}, as the id of a token is."
        )


def check_other_files(config: dict[str, Any], architecture: str) -> None:
    """Raise at what would make Transformers build or read something that these checks never see."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or any(
        not isinstance(name, str) or name in transformers.__all__ for name in architectures
    ):
        # A pipeline goes on to these classes when the model does not load.
        raise ValueError(
            f"the config says architectures={shortened(architectures)}, which is no FastBERT model: write "
            f'["{architecture}"].'
        )
    weights = config.get("transformers_weights")
    if weights is not None and not re.fullmatch(rf"{WEIGHTS_FILE}(\.index\.json)?", str(weights)):
        raise ValueError(
            f"the config says transformers_weights={shortened(weights)}, but it must name a safetensors file beside "
            'it, as in "model.safetensors".'
        )


def backbone_size(text_config: dict[str, Any], name: str) -> int:
    """Return one size of a backbone by its common name: its family's default unless given, 0 if it has none."""
    family = CONFIG_MAPPING[text_config.get("model_type", "bert")]
    own = {"intermediate_size": "hidden_dim", **family.attribute_map}.get(name, name)
    own = name if hasattr(family, name) else own
    # Where a family has a name of its own, Transformers reads either.
    given = [text_config[key] for key in {name, own} & text_config.keys()]
    return max(given, default=getattr(family, own, 0))


def estimated_parameters(config: dict[str, Any]) -> int:
    """Return about how many parameters the model of a raw config has, with all that any family or exit may have."""
    text_config = config.get("text_config") or {}
    hidden, layers = (backbone_size(text_config, name) for name in ("hidden_size", "num_hidden_layers"))
    # ALBERT repeats a few groups of layers; the other families have neither number.
    groups = backbone_size(text_config, "num_hidden_groups") * backbone_size(text_config, "inner_group_num")
    # Four of the attention, and three of a gated feed-forward layer.
    of_layer, settings = 3 * hidden * backbone_size(text_config, "intermediate_size"), config.get("feed_forward")
    if settings is not None:
        check_feed_forward(settings, layers)
        of_layer = max(of_layer * ("layers" in settings), feed_forward_parameters(settings, hidden))
    backbone = (groups or layers) * (4 * hidden**2 + of_layer)
    tables = ["vocab_size", "type_vocab_size", "task_type_vocab_size", "max_position_embeddings"]
    if ENCODER_FAMILIES[text_config.get("model_type", "bert")].positions == "rotary":
        tables.remove("max_position_embeddings")
    rows = sum(backbone_size(text_config, name) for name in tables)
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    exit_type = EXIT_TYPES.get(str(config.get("exit_type", "attention")), EXIT_TYPES["attention"])
    features, weights = exit_type.sizes(hidden, config.get("exit_hidden_size", 128))
    exits = layers * (weights + features * labels)
    return backbone + rows * (backbone_size(text_config, "embedding_size") or hidden) + exits
