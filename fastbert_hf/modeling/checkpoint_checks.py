"""
What a checkpoint claims, checked before anything is built from it: its raw config, and what its weights are.

A file that cannot be trusted then costs one clear error, not gigabytes or minutes. The numbers inside the weights are
not read: a model whose logits are not finite refuses to answer.
"""

from __future__ import annotations

import math
import re
import reprlib
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .exit_classifiers import EXIT_TYPES
from .exit_policies import check_speed, exit_range
from .families import ENCODER_FAMILIES
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
# What a config may ask for beyond twice what its weights hold: the exits of a checkpoint that brings none.
SPARE_PARAMETERS = 10_000_000
DEEPEST_NESTING = 8
MOST_MEMBERS = 16
WEIGHTS_FILE = r"[\w.-]+\.safetensors"
IS_EXIT = re.compile(r"(exits|shared_pooler)\.").match
# What older checkpoints may hold beside: a stock pooler that no exit reads, and ids that are counted anew.
IS_HARMLESS = re.compile(r"(.*\.)?(pooler\.dense\.(weight|bias)|position_ids|token_type_ids)$").fullmatch
# What a file says may be of any length and depth, a message not.
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80
shortened = SHORT.repr


def check_raw_config(config: dict[str, Any]) -> None:
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
    check_speed(config.get("speed", 0))
    for check in (check_values, check_sizes, check_labels, check_kernel):
        check(config, "")
        check(text_config, "text_config.")
    dropout = config.get("exit_dropout", 0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"exit_dropout must be a number in [0, 1), got {shortened(dropout)}.")
    exit_range(backbone_size(text_config, "num_hidden_layers"), config.get("min_exit_layer"), config.get("max_layers"))
    check_parameters(estimated_parameters({**config, "text_config": text_config}))
    check_other_files(config, "FastBertForSequenceClassification")


def check_raw_cascade(config: dict[str, Any]) -> None:
    """Raise a `ValueError` unless every member of a cascade can be built so, and all of them together."""
    members = config.get("members")
    if not isinstance(members, list) or not 2 <= len(members) <= MOST_MEMBERS:
        raise ValueError(
            f"the config says members={shortened(members)}, but it must list the configs of 2 to {MOST_MEMBERS} "
            "FastBERT models."
        )
    own = {name: value for name, value in config.items() if name != "members"}
    check_speed(own.get("speed", 0))
    for check in (check_values, check_sizes, check_labels, check_kernel):
        check(own, "")
    check_other_files(own, "CascadeForSequenceClassification")
    parameters = 0
    for number, member in enumerate(members, start=1):
        if isinstance(member, PreTrainedConfig):
            member = member.to_dict()
        if not isinstance(member, dict):
            raise ValueError(f"member {number} of the cascade is {shortened(member)}, not the config of a model.")
        try:
            check_raw_config(member)
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


def check_kernel(config: dict[str, Any], prefix: str) -> None:
    """Raise at an attention that Transformers would fetch from the Hub and run, as it does not know it."""
    kernel = config.get("attn_implementation")
    if kernel not in (None, *ATTENTION_KERNELS):
        raise ValueError(
            f"the config says {prefix}attn_implementation={shortened(kernel)}, but a checkpoint may ask for "
            f"{' or '.join(ATTENTION_KERNELS)} only: leave it out."
        )


def check_values(config: dict[str, Any], prefix: str) -> None:
    """Raise at a number that is not finite, and at nesting that no config has."""
    waiting = [(prefix + str(key), value, 1) for key, value in config.items()]
    while waiting:
        name, value, depth = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"the config says {shortened(name)}={value}, but every number must be finite.")
        if depth > DEEPEST_NESTING:
            raise ValueError(
                f"the config is nested more than {DEEPEST_NESTING} levels deep, in {shortened(name)}: the backbone's "
                "config holds plain values."
            )
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        waiting.extend((f"{name}.{key}", child, depth + 1) for key, child in children)


def check_sizes(config: dict[str, Any], prefix: str) -> None:
    """Raise unless everything that sizes the model is a whole number, none of them absurd."""
    for name, largest in LARGEST_SIZES.items():
        # Not isinstance, for which True is a whole number.
        if name in config and (type(config[name]) is not int or not 1 <= config[name] <= largest):
            raise ValueError(
                f"the config says {prefix}{name}={shortened(config[name])}, but it must be a whole number from 1 to "
                f"{largest:,}."
            )
    if config.get("per_layer_config"):
        raise ValueError(f"the config says {prefix}per_layer_config, but all layers have equal sizes: leave it out.")


def check_labels(config: dict[str, Any], prefix: str) -> None:
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


def check_other_files(config: dict[str, Any], architecture: str) -> None:
    """Raise at what would make Transformers build or read something that these checks never see."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or any(name in transformers.__all__ for name in architectures):
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
    backbone = (groups or layers) * (4 * hidden**2 + 3 * hidden * backbone_size(text_config, "intermediate_size"))
    tables = ["vocab_size", "type_vocab_size", "task_type_vocab_size", "max_position_embeddings"]
    if ENCODER_FAMILIES[text_config.get("model_type", "bert")].positions == "rotary":
        tables.remove("max_position_embeddings")
    rows = sum(backbone_size(text_config, name) for name in tables)
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    exit_type = EXIT_TYPES.get(str(config.get("exit_type", "attention")), EXIT_TYPES["attention"])
    features, weights = exit_type.sizes(hidden, config.get("exit_hidden_size", 128))
    exits = layers * (weights + features * labels)
    return backbone + rows * (backbone_size(text_config, "embedding_size") or hidden) + exits


def check_total_size(shapes: dict[str, tuple[int, ...]], config: PreTrainedConfig, is_packed: bool) -> None:
    """Raise unless weights of these shapes could be those of the model, so that a small file builds no huge one."""
    members = getattr(config, "members", None) or [config]
    parameters = sum(estimated_parameters({**own.to_dict(), "num_labels": own.num_labels}) for own in members)
    # Quantised weights are packed, up to eight into one number.
    held = sum(map(math.prod, shapes.values())) * (8 if is_packed else 1)
    layers = sum(own.num_hidden_layers for own in members)  # each has tensors of its own, or its exit has
    if parameters > 2 * held + SPARE_PARAMETERS * len(members) or layers > len(shapes):
        raise ValueError(
            f"the config describes a model of {layers} layers and about {parameters:,} parameters, but the weights "
            f"hold {held:,} in {len(shapes)} tensors: load the config that was saved with them."
        )


def check_weights(
    shapes: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], prefix: str, check_shapes: bool = True
) -> None:
    """
    Raise a `ValueError` unless a file holds every weight that the model wants, in its shape, and no others. `prefix`
    stands before the names of an encoder inside a classifier.
    """
    found, wanted = ({name.removeprefix(prefix): shape for name, shape in of.items()} for of in (shapes, wanted))
    # An encoder needs no exits, and a classifier may be built on an encoder alone, with all its exits new.
    if not (any(map(IS_EXIT, found)) and any(map(IS_EXIT, wanted))):
        found, wanted = ({name: shape for name, shape in of.items() if not IS_EXIT(name)} for of in (found, wanted))
    faults = [f"lack {name}" for name in wanted if name not in found]
    faults += [f"also hold {name}" for name in found if name not in wanted and not IS_HARMLESS(name)]
    if check_shapes:
        faults += [
            f"hold {name} of shape {list(found[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        ]
    if faults:
        listed = ", ".join(faults[:3])[:400] + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise ValueError(
            f"the weights are not those of the model that the config describes: they {listed}. Load the config that "
            "was saved with them; ignore_mismatched_sizes=True makes what differs in shape, such as exits, anew."
        )
