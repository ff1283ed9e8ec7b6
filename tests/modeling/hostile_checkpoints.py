"""Checkpoints that are broken or mean harm, one for each class: how a good one turns, and what the error says."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


SECONDS, MEGABYTES = 2, 200


class Harm:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@contextmanager
def little_cost() -> Iterator[None]:
    """Fail where a block takes two seconds of this process, or 200 MB at any time (told by Linux alone)."""
    clear_refs, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def megabytes(field: str) -> float:
        return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1]) / 1024 if clear_refs.exists() else 0

    if clear_refs.exists():
        clear_refs.write_text("5")  # the peak counts from here
    memory, seconds = megabytes("VmRSS"), time.process_time()
    yield
    assert time.process_time() - seconds < SECONDS
    assert megabytes("VmHWM") - memory < MEGABYTES


def nested(depth: int) -> dict:
    config = {}
    for _ in range(depth):
        config = {"model_type": "bert", "text_config": config}
    return config


LISTS = json.loads("[" * 90 + "]" * 90)
ALBERT, DISTILBERT = {"model_type": "albert"}, {"model_type": "distilbert"}
TERABYTE = {"num_hidden_layers": 1000, "hidden_size": 8192, "intermediate_size": 10**6}
LARGE = "parameters, but at most 20,000,000,000 are allowed"
NOT_FINITE = "every number must be finite"
LAYERS_BY_ANOTHER_NAME = {"attribute_map": {"num_hidden_layers": "zz"}, "zz": 10**9}
NO_SETTING = "Config itself and no setting: leave it out."
DEEP = "nested more than 8 levels deep, in"
# What config.json says in place of the truth, and what the error says of it.
CONFIGS = {
    # Sizes: each by itself, by either of its names, and all together
    "a billion layers": (
        {"text_config.num_hidden_layers": 10**9},
        "text_config.num_hidden_layers=1000000000, but it must be a whole number from 1 to 1,000.",
    ),
    "layers of 4,000 digits": ({"text_config.num_hidden_layers": 10**4000}, "text_config.num_hidden_layers=10000"),
    "no layers": ({"text_config.num_hidden_layers": 0}, "num_hidden_layers=0, but it must be a whole number"),
    "true layers": ({"text_config.num_hidden_layers": True}, "num_hidden_layers=True, but it must be a whole number"),
    "layers in words": ({"text_config.num_hidden_layers": "4"}, "num_hidden_layers='4', but it must be a whole"),
    "half a text of patience": (
        {"patience": 1.5},
        "says patience=1.5, but it must be a whole number from 1 to 1,000.",
    ),
    "other name": ({"text_config": {**DISTILBERT, "n_layers": 10**9}}, "text_config.n_layers=1000000000"),
    "both names": (
        {"text_config": {**DISTILBERT, "n_layers": 4, "dim": 2, "hidden_size": 10**9}},
        "hidden_size=1000000000",
    ),
    "a terabyte of sizes": ({"text_config": TERABYTE}, f"{LARGE}: lower hidden_size"),
    "a terabyte with the defaults": ({"text_config": {"hidden_size": 65536}}, LARGE),
    "a terabyte by the other name": ({"text_config": {**DISTILBERT, "dim": 2, "hidden_size": 65536}}, LARGE),
    "a terabyte of groups": ({"text_config": {**ALBERT, "num_hidden_groups": 1000, "inner_group_num": 1000}}, LARGE),
    "a terabyte of exits": ({"exit_hidden_size": 65536}, LARGE),
    "a terabyte of labels": (
        {"text_config.num_hidden_layers": 1000, "exit_hidden_size": 1000, "num_labels": 10**5, "id2label": None},
        LARGE,
    ),
    "sizes by layer": (
        {"text_config.per_layer_config": {"0": {"intermediate_size": 10**9}}},
        "text_config.per_layer_config, but all layers have equal sizes",
    ),
    # Numbers and limits
    "speed of NaN": ({"speed": math.nan}, "speed must be a number in [0, 1], got nan: 0 runs every layer"),
    "speed in words": ({"speed": "0.5"}, "speed must be a number in [0, 1], got '0.5'"),
    "dropout of one": ({"exit_dropout": 1}, "exit_dropout must be a number in [0, 1), got 1."),
    "NaN in the backbone": (
        {"text_config.layer_norm_eps": math.nan},
        f"'text_config.layer_norm_eps'=nan, but {NOT_FINITE}",
    ),
    "infinity in a list": ({"thresholds": [0.5, -math.inf]}, f"'thresholds.1'=-inf, but {NOT_FINITE}"),
    "max_layers above the layers": (
        {"max_layers": 5},
        "max_layers must be a whole number from 1 to 4 (the layers of this model)",
    ),
    "speed in a list": ({"speed": [0.5] * 10**5}, "the config says speed=[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, ...], but it"),
    "10,000 digits of a limit": ({"max_layers": "1" * 10_000}, "but it must be a number: leave it out."),
    "padding beyond the vocabulary": (
        {"text_config.pad_token_id": 100},
        "text_config.pad_token_id=100, but it must be a whole number from -100 to 99",
    ),
    "no padding to count positions from": (
        {"text_config.model_type": "roberta", "text_config.pad_token_id": None},
        "text_config.pad_token_id=None, but it must be a whole number from 0 to 62",
    ),
    "heads that do not divide": ({"text_config.num_attention_heads": 5}, "not a multiple of the number of attention"),
    # Settings that are none
    "sizes by another name": (
        {"text_config.attribute_map": {"num_hidden_layers": "zz"}, "text_config.zz": 10**9},
        f"text_config.attribute_map={{'num_hidden_layers': 'zz'}}, but that is a part of Bert{NO_SETTING}",
    ),
    "own sizes by another name": (LAYERS_BY_ANOTHER_NAME, f"is a part of FastBert{NO_SETTING}"),
    "number for a method": ({"to_dict": 5}, f"to_dict=5, but that is a part of FastBert{NO_SETTING}"),
    "method of the backbone": ({"text_config.validate": []}, "text_config.validate=[], but that is a part of Bert"),
    "other defaults of a call": (
        {"call_defaults": ["speed", "x"]},
        "call_defaults=['speed', 'x'], but that is",
    ),
    "layers beside the backbone": (
        {"num_hidden_layers": 4},
        "num_hidden_layers=4 is the backbone's, and no field of FastBertConfig: give it before the model is built, as "
        "in FastBertConfig(text_config=BertConfig(num_hidden_layers=4))",
    ),
    "width beside the backbone": ({"hidden_size": 32}, "hidden_size=32 is the backbone's, and no field of"),
    "function as dtype": ({"dtype": "load"}, "dtype='load', but weights are of one of float16, bfloat16, float32,"),
    "module as dtype": ({"text_config.torch_dtype": "nn"}, "text_config.torch_dtype='nn', but weights are of one of"),
    "unknown activation": (
        {"text_config.hidden_act": "nope"},
        "text_config.hidden_act='nope', which is no activation: choose one of gelu, ",
    ),
    "architecture of nothing": ({"architectures": [None]}, "architectures=[None], which is no FastBERT model: write"),
    "quantised by a number": ({"quantization_config": 5}, "quantization_config=5, but it must say how the weights"),
    "kinds of problems": (
        {"problem_type": ["x"]},
        "problem_type=['x'] is not known; choose one of single_label_classification, multi_label_classification, ",
    ),
    # Labels
    "hole in the labels": (
        {"id2label": {"0": "a", "7": "b"}},
        "id2label={0: 'a', 7: 'b'} has no label 1: it must name every id from 0 to 1 (the number of labels is 2).",
    ),
    "label without a name": (
        {"id2label": {"0": "a", "1": None}},
        "id2label calls label 1 None, but a label is a text, as in 'good'.",
    ),
    "label of a list": ({"id2label": {"0": ["a"], "1": "b"}}, "id2label calls label 0 ['a'], but a label is a text"),
    "100,001 labels": (
        {"id2label": {str(index): "x" for index in range(100_001)}},
        "but it must name 1 to 100,000 labels, as in",
    ),
    "labels in a list": ({"id2label": ["a", "b"]}, "id2label=['a', 'b'], but it must name"),
    "label below zero": (
        {"id2label": {"-1": "a", "0": "b"}},
        "a label the id '-1' in id2label, but ids are whole numbers from 0",
    ),
    "name of half a label": ({"label2id": {"a": 0.5}}, "gives a label the id 0.5 in label2id"),
    "label of the backbone": ({"text_config.label2id": {"a": -1}}, "the id -1 in text_config.label2id"),
    # Other models, and code
    "backbone of lists": (
        {"text_config": LISTS},
        "text_config=[[[[[[[...]]]]]]], but it must hold the backbone's own",
    ),
    "unsupported backbone": (
        {"text_config": {"model_type": "gpt2"}},
        "'gpt2': such a backbone is not supported. Supported are: bert",
    ),
    "several backbones": ({"text_config": {"model_type": ["bert"]}}, "text_config.model_type=['bert']: such a"),
    "code for attention": (
        {"attn_implementation": "org/code"},
        "attn_implementation='org/code', but a checkpoint may ask for sdpa",
    ),
    "code for attention by its other name": (
        {"_attn_implementation": "kernels-community/flash-attn"},
        "says _attn_implementation='kernels-community/flash-attn', but a checkpoint may ask for sdpa or eager only",
    ),
    "code for the backbone's attention": (
        {"text_config._attn_implementation": {"": "org/code"}},
        "text_config._attn_implementation={'': 'org/code'}, but a checkpoint may ask for sdpa",
    ),
    "patched layers": ({"fusion_config": {"layernorm": True}}, "says fusion_config, but all layers have equal sizes"),
    "more values than a config has": (
        {"text_config.unused": [[0] * 1000] * 600},
        "holds more than 500,000 values or is nested more than 8 levels deep, in 'text_config.unused.",
    ),
    "long text": ({"unused": "x" * 100_001}, "but a text in it has at most 100,000 characters."),
    "nesting bomb": ({"text_config": nested(300)}, f"{DEEP} 'text_config."),
    "nesting bomb of lists": ({"layers": LISTS}, f"{DEEP} 'layers."),
    "stock architecture": (
        {"architectures": ["BertModel"]},
        "architectures=['BertModel'], which is no FastBERT model",
    ),
    "weights in a pickle": (
        {"transformers_weights": "adapter_model.bin"},
        "'adapter_model.bin', but it must name a safetensors",
    ),
    "weights elsewhere": (
        {"transformers_weights": "../model.safetensors"},
        "'../model.safetensors', but it must name",
    ),
}


def with_header(header: dict | bytes, data: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def tensors(data: int, **entries: tuple[list[int], int, int]) -> bytes:
    """A file whose header claims tensors of some shape from one place of the data to another."""
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        for name, (shape, begin, end) in entries.items()
    }
    return with_header(header, bytes(data))


def empty_tensors(number: int) -> bytes:
    entry = b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return with_header(b"{" + b",".join(entry % index for index in range(number)) + b"}")


NOT_THOSE = "the weights are not those of the model that the config describes: they"
NO_LAYERS = f"{NOT_THOSE} lack backbone.embeddings.word_embeddings.weight,"
# What becomes of the bytes of model.safetensors, and what the error says of them.
BYTES = {
    "no bytes": (lambda data: b"", "header has 0 bytes, but the file has 0,"),
    "header cut off": (
        lambda data: data[:200],
        "but the file has 200, and the headers of a checkpoint at most 5,000,000: it was cut off",
    ),
    "header of 2**63 bytes": (
        lambda data: struct.pack("<Q", 2**63) + data[8:],
        "its header has 9,223,372,036,854,775,808 bytes",
    ),
    "header of 300,000 tensors": (lambda data: empty_tensors(300_000), "headers of a checkpoint at most 5,000,000"),
    "header of 90,000 tensors": (lambda data: empty_tensors(90_000), NO_LAYERS),
    "shape of a million sizes": (
        lambda data: tensors(4, a=([1] * 10**6, 0, 4)),
        "the weights hold 1 in 1 tensors: load",
    ),
    "header of nested lists": (lambda data: with_header(b"[" * 10**6), "invalid JSON in header"),
    "data cut off": (
        lambda data: data[:-10],
        "is no whole safetensors file (Error while deserializing header: incomplete",
    ),
    "overlapping tensors": (lambda data: tensors(12, a=([2], 0, 8), b=([2], 4, 12)), "invalid offset for tensor `b`"),
    "tensor outside of the file": (lambda data: tensors(8, a=([2**40], 0, 2**42)), "file not fully covered"),
    "tensor of overflowing size": (lambda data: tensors(8, a=([2**62, 2**62], 0, 8)), "overflow"),
}


def without(prefix: str) -> Callable[[dict], dict]:
    return lambda weights: {name: value for name, value in weights.items() if not name.startswith(prefix)}


def zeros(name: str, *shape: int) -> Callable[[dict], dict]:
    return lambda weights: {**weights, name: torch.zeros(shape)}


RELOAD = "Load the config that was saved with them"
# What becomes of the weights of a model with 4 layers and 3 labels, and what the error says of them.
WEIGHTS = {
    "more exits than layers": (
        zeros("exits.4.out_proj.weight", 3, 128),
        f"{NOT_THOSE} also hold exits.4.out_proj.weight. {RELOAD}",
    ),
    "no exit in between": (without("exits.1."), f"{NOT_THOSE} lack exits.1.pooler.exit_projection.weight,"),
    "exit of 7 labels": (
        zeros("exits.2.out_proj.weight", 7, 128),
        f"{NOT_THOSE} hold exits.2.out_proj.weight of shape [7, 128] instead of [3, 128]. {RELOAD}",
    ),
    "exit of three dimensions": (
        zeros("exits.0.out_proj.weight", 3, 128, 1),
        "hold exits.0.out_proj.weight of shape [3, 128, 1] instead of [3, 128]",
    ),
    "no layer in between": (
        without("fastbert.backbone.encoder.layer.1."),
        f"{NOT_THOSE} lack backbone.encoder.layer.1.attention.self.query.weight,",
    ),
    "more layers": (
        zeros("fastbert.backbone.encoder.layer.4.output.dense.weight", 32, 64),
        f"{NOT_THOSE} also hold backbone.encoder.layer.4.output.dense.weight.",
    ),
    "no word embeddings": (
        without("fastbert.backbone.embeddings.word_embeddings."),
        f"{NOT_THOSE} lack backbone.embeddings.word_embeddings.weight. {RELOAD}",
    ),
    "no feed-forward matrices": (
        lambda weights: {name: value for name, value in weights.items() if ".intermediate." not in name},
        f"{NOT_THOSE} lack backbone.encoder.layer.0.intermediate.dense.weight,",
    ),
    "layer by another number": (
        lambda weights: {name.replace("layer.1.", "layer.01."): value for name, value in weights.items()},
        f"{NOT_THOSE} lack backbone.encoder.layer.1.attention.self.query.weight,",
    ),
    "no exits": (without("exits."), f"{NOT_THOSE} lack exits.0.pooler.exit_projection.weight,"),
    "weight by two names": (
        zeros("backbone.embeddings.LayerNorm.bias", 32),
        f"{NOT_THOSE} hold backbone.embeddings.LayerNorm.bias twice. {RELOAD}",
    ),
    "pooler of something else": (zeros("x.pooler.dense.weight", 3), f"{NOT_THOSE} also hold x.pooler.dense.weight."),
    "no weights": (
        lambda weights: {},
        "4 layers and about 391,872 parameters, but the weights hold 0 in 0 tensors: load",
    ),
}
SEVEN_LABELS = {"id2label": None, "label2id": None, "num_labels": 7}
TINY_SHAPE = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1000}
# Configs that are allowed, but not with the weights of that model.
CONFIGS_OF_OTHERS = {
    "vocabulary of others": (
        {"text_config.vocab_size": 10**7},
        "about 320,388,672 parameters, but the weights hold 388,236 in 125 tensors: load the config that was saved",
    ),
    "a thousand tiny layers": (
        {**{f"text_config.{name}": size for name, size in TINY_SHAPE.items()}, "exit_hidden_size": 4},
        "a model of 1000 layers and about 220,664 parameters, but the weights hold 388,236 in 125 tensors",
    ),
    "3 layers": ({"text_config.num_hidden_layers": 3}, f"{NOT_THOSE} also hold"),
    "quantised in name alone": (
        {"quantization_config": {"quant_method": "torchao"}, "text_config.num_hidden_layers": 5},
        f"{NOT_THOSE} lack backbone.encoder.layer.4.attention.self.query.weight,",
    ),
    "unknown quantiser": (
        {**SEVEN_LABELS, "quantization_config": {"quant_method": "none such"}},
        f"{NOT_THOSE} hold exits.0.out_proj.weight of shape [3, 128] instead of [7, 128],",
    ),
    "exit type of others": ({"exit_type": "linear"}, f"{NOT_THOSE} also hold exits.0.pooler.exit_"),
    "shared pooler of others": (
        {"share_exit_pooler": True},
        f"{NOT_THOSE} lack shared_pooler.exit_projection.weight,",
    ),
}

SHARD = "model-00001-of-00001.safetensors"
STRANGE = "where only safetensors files of its own folder may be"
NO_INDEX = "is no index of weights"
# What model.safetensors.index.json says in place of a model.safetensors, and what the error says of it.
INDICES = {
    **{
        f"shard of {name}": (json.dumps({"metadata": {}, "weight_map": {"a": name}}), f"names [{name!r}] {STRANGE}")
        for name in ("../../model.safetensors", "/etc/model.safetensors", "pytorch_model.bin", None)
    },
    "lost shard": (json.dumps({"metadata": {}, "weight_map": {"a": SHARD}}), f"{SHARD}, which does not exist"),
    "shard of a list": (json.dumps({"metadata": {}, "weight_map": {"a": ["x"]}}), NO_INDEX),
    "index of nothing": (json.dumps({"metadata": {}, "weight_map": {}}), STRANGE),
    "index without metadata": (json.dumps({"weight_map": {"a": SHARD}}), f"{NO_INDEX} (KeyError('metadata'))"),
    "index of a list": ("[1, 2]", NO_INDEX),
    "index of no JSON": ("{", f"{NO_INDEX} (JSONDecodeError("),
    "index of nested lists": ("[" * 10**5, f"{NO_INDEX} (RecursionError("),
    "index of blanks": (" " * 10_000_000, f"{NO_INDEX} (ValueError('more than 5,000,000 bytes'))"),
}
FILES = {**BYTES, **WEIGHTS, **CONFIGS_OF_OTHERS, **INDICES}


def edit_config(folder: Path, changes: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *parents, last = name.split(".")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    (folder / "config.json").write_text(json.dumps(config))


def break_checkpoint(folder: Path, case: str) -> str:
    """Turn a good checkpoint into one of the cases, and return what the error says."""
    change, message = {**CONFIGS, **FILES}[case]
    weights = folder / "model.safetensors"
    if case in BYTES:
        weights.write_bytes(change(weights.read_bytes()))
    elif case in WEIGHTS:
        save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    elif case in INDICES:
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(change)
    else:
        edit_config(folder, change)
    return message
