"""Adapters load where the caller names them; any other, and one that means harm, costs one clear error."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from fastbert_hf import FastBertForSequenceClassification

from ..common import assert_close, copied_to_cache, ragged_batch, stock, tiny_model, tiny_tokenizer
from .hostile_checkpoints import Harm, little_cost


LOADERS = (
    FastBertForSequenceClassification.from_pretrained,
    AutoModelForSequenceClassification.from_pretrained,
    lambda folder: pipeline("fast-text-classification", model=str(folder)),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A good model of 4 layers."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_adapter(whole, tmp_path_factory) -> Path:
    """A good adapter of it, which carries an exit."""
    folder = tmp_path_factory.mktemp("adapter")
    base = FastBertForSequenceClassification.from_pretrained(whole)
    lora = LoraConfig(r=4, target_modules=["query"], modules_to_save=["exits.0"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved_adapter, tmp_path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(saved_adapter, tmp_path / "adapter"))


def edit(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_adapter_that_is_named_loads_on_its_base(adapter, whole):
    assert not (adapter / "config.json").exists()
    batch = ragged_batch()
    expected = PeftModel.from_pretrained(tiny_model(), adapter)(**batch, output_exit_logits=True).exit_logits
    assert (expected - tiny_model()(**batch, output_exit_logits=True).exit_logits).abs().max() > 1e-3
    for load in LOADERS[:2]:
        loaded = load(adapter)
        assert type(loaded) is FastBertForSequenceClassification
        assert_close(loaded(**batch, output_exit_logits=True).exit_logits, expected)
    model, info = FastBertForSequenceClassification.from_pretrained(adapter, output_loading_info=True)
    assert_close(model(**batch, output_exit_logits=True).exit_logits, expected)
    assert not info["missing_keys"]
    assert pipeline("fast-text-classification", model=str(adapter))("word5", speed=1.0)[0]["exit_layer"] == 1


CASES = {
    "a million ranks": ({"r": 10**6}, "r=1000000 must be a whole number from 1 to 1,024."),
    "rank in words": ({"r": "4"}, "r='4' must be a whole number from 1 to 1,024."),
    "no rank": ({"r": None}, "r=None must be a whole number"),
    "a million ranks of one module": ({"rank_pattern": {"query": 10**6}}, "r=1000000 must be a whole number"),
    "pattern of ranks": ({"rank_pattern": {"(a+)+$": 4}}, "'rank_pattern'={'(a+)+$': 4} is none of the settings"),
    "pattern of modules": (
        {"target_modules": "(.*)*(.*)*(.*)*x"},
        "'target_modules'='(.*)*(.*)*(.*)*x' is none of the settings that are read here: numbers, and up to 1,000 "
        "names of modules (no patterns).",
    ),
    "pattern in a list": (
        {"exclude_modules": ["query", "(a+)+$"]},
        "'exclude_modules'=['query', '(a+)+$'] is none",
    ),
    "a thousand modules": ({"target_modules": ["query"] * 10**4}, "'target_modules'=['query', 'query', 'query', "),
    "layers again and again": (
        {"layer_replication": [[0, 4], [0, 4]]},
        "'layer_replication'=[[0, 4], [0, 4]] is",
    ),
    "code of another library": ({"megatron_config": {"a": 1}}, "'megatron_config'={'a': 1} is none of the settings"),
    "number that is none": ({"lora_alpha": float("nan")}, "'lora_alpha'=nan is none of the settings"),
    "another kind": ({"peft_type": "PROMPT_TUNING"}, "adapter_config.json does not say peft_type='LORA'."),
    "no base": ({"base_model_name_or_path": None}, "base_model_name_or_path=None is no folder and no repository."),
    "base elsewhere": ({"base_model_name_or_path": "not/to/be/found"}, "='not/to/be/found' is no folder and"),
}


@pytest.mark.parametrize("case", CASES)
def test_hostile_adapter_costs_one_clear_error(adapter, case):
    changes, message = CASES[case]
    edit(adapter, **changes)
    message = rf"{re.escape(message)}.*load it with PEFT on the model that you know to be its base: PeftModel\."
    with little_cost(), pytest.raises(ValueError, match=message):
        FastBertForSequenceClassification.from_pretrained(adapter)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" " * 2_000_000, "has 2,000,000 bytes, but at most 1,000,000 are read."),
        ("[" * 10**5, "does not say peft_type"),
        ("[1, 2]", "does not say peft_type"),
        ("{", "is an adapter that from_pretrained does not load: Expecting property name"),
    ],
    ids=["bytes", "nesting", "list", "no JSON"],
)
def test_file_that_is_no_adapter_config_is_refused(adapter, text, message):
    (adapter / "adapter_config.json").write_text(text)
    with little_cost(), pytest.raises(ValueError, match=re.escape(message)):
        FastBertForSequenceClassification.from_pretrained(adapter)


def test_hostile_adapter_is_refused_on_every_way(adapter):
    edit(adapter, r=10**6)
    for load in LOADERS:
        with little_cost(), pytest.raises(ValueError, match="r=1000000 must be a whole number"):
            load(adapter)


def put_beside(adapter: Path, model: Path) -> None:
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, model)


@pytest.mark.parametrize("r", [4, 10**6])
def test_adapter_that_nobody_asked_for_is_refused(adapter, whole, tmp_path, r):
    edit(adapter, r=r)
    folder = Path(shutil.copytree(whole, tmp_path / "both"))
    put_beside(adapter, folder)
    for load in (*LOADERS, AutoModel.from_pretrained):
        with (
            little_cost(),
            pytest.raises(ValueError, match=r"a whole model and an adapter_config\.json beside it"),
        ):
            load(folder)


@pytest.mark.parametrize(
    "wrap",
    [
        FastBertForSequenceClassification.from_classifier,
        lambda folder: FastBertForSequenceClassification.from_backbone(folder, num_labels=3),
    ],
)
def test_adapter_beside_a_stock_model_is_refused(adapter, tmp_path, wrap: Callable):
    stock().save_pretrained(tmp_path / "stock")
    put_beside(adapter, tmp_path / "stock")
    with pytest.raises(ValueError, match=r"holds an adapter beside the model.*merge_and_unload\(\)"):
        wrap(tmp_path / "stock")


def test_pickled_adapter_is_refused_and_not_opened(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Harm(adapter / "marker"), adapter / "adapter_model.bin")
    for load in LOADERS:
        with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors, and a \.bin can run code"):
            load(adapter)
    assert not (adapter / "marker").exists()


@pytest.mark.parametrize("lost", ["lora_B", "out_proj"])
def test_adapter_without_all_of_its_weights_is_refused(adapter, lost):
    weights = load_file(adapter / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if lost not in name}
    assert len(kept) < len(weights)
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"has no weights for .*{lost}"):
        FastBertForSequenceClassification.from_pretrained(adapter)


def test_repository_leads_to_no_folder_of_this_machine(adapter, whole, tmp_path):
    copied_to_cache(adapter, tmp_path / "cache", "org/adapter")
    with pytest.raises(ValueError, match=rf"base_model_name_or_path='{whole}'[^\n]* is a place on this machine"):
        FastBertForSequenceClassification.from_pretrained("org/adapter", cache_dir=tmp_path / "cache")
    edit(adapter, base_model_name_or_path="org/base")
    copied_to_cache(adapter, tmp_path / "other", "org/adapter")
    copied_to_cache(whole, tmp_path / "other", "org/base")
    loaded = FastBertForSequenceClassification.from_pretrained("org/adapter", cache_dir=tmp_path / "other")
    assert any("lora" in name for name, _ in loaded.named_parameters())
