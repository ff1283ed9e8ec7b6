"""Checkpoints that are broken or mean harm: each costs one clear error and little else, and none runs code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertConfig, pipeline

from fastbert_hf import (
    CascadeConfig,
    CascadeForSequenceClassification,
    FastBertConfig,
    FastBertForSequenceClassification,
    FastBertModel,
)
from tests.common import (
    assert_same_weights,
    copied_to_cache,
    tiny_model,
    tiny_stock_model,
    tiny_texts,
    tiny_tokenizer,
)

from .hostile_checkpoints import CONFIGS, FILES, Harm, break_checkpoint, little_cost, with_header


LOADERS = (
    AutoModelForSequenceClassification.from_pretrained,
    AutoModel.from_pretrained,
    FastBertForSequenceClassification.from_pretrained,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A good checkpoint of 4 layers and 3 labels."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    # What Transformers imports at the first load is nobody's cost.
    AutoModelForSequenceClassification.from_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def fast_pipeline(folder: Path):
    return pipeline("fast-text-classification", model=str(folder))


@pytest.mark.parametrize("case", [*CONFIGS, *FILES])
def test_a_hostile_checkpoint_costs_one_clear_error_and_little_else(folder, case):
    message = break_checkpoint(folder, case)
    with little_cost(), pytest.raises((ValueError, OSError), match=re.escape(message)):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("case", ["a billion layers", "a terabyte of sizes", "more layers", "data cut off"])
def test_every_way_to_load_refuses_it(folder, case):
    message = break_checkpoint(folder, case)
    of_configs = (AutoConfig.from_pretrained, FastBertForSequenceClassification.from_backbone)
    for load in (*LOADERS, fast_pipeline, *(of_configs if case in CONFIGS else ())):
        with pytest.raises((ValueError, OSError), match=re.escape(message)):
            load(folder)


def test_raw_config_is_refused_before_the_backbones_config_exists(folder, monkeypatch):
    def built(self, **kwargs):
        raise AssertionError("a BertConfig was built")

    message = break_checkpoint(folder, "a billion layers")
    monkeypatch.setattr(BertConfig, "__init__", built)
    for load in (AutoConfig.from_pretrained, AutoModelForSequenceClassification.from_pretrained):
        with pytest.raises(ValueError, match=re.escape(message)):
            load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + " " * 8_000_000, "bytes, but a config has at most 8,000,000"),
        (lambda text: text[:-1] + ',"unused":[' + "0," * 3_000_000 + "0]}", "and 3,000,"),
        (lambda text: text[:-1] + ',"unused":[' + "[]," * 2_000_000 + "[]]}", "and 4,000,"),
        (lambda text: "[" * 400_000, "config.json cannot be read (RecursionError: "),
        (lambda text: "[1, 2]", "config.json holds [1, 2], but a config is a JSON object"),
    ],
    ids=["bytes", "numbers", "lists", "nesting", "no object"],
)
def test_large_config_is_not_parsed(folder, change, message):
    file = folder / "config.json"
    file.write_text(change(json.dumps(json.loads(file.read_text()))))
    for load in (FastBertConfig.from_pretrained, FastBertForSequenceClassification.from_pretrained):
        with little_cost(), pytest.raises(ValueError, match=re.escape(message)):
            load(folder)
    with little_cost(), pytest.raises(ValueError, match=re.escape(message)):
        CascadeConfig.from_pretrained(folder)


def test_what_auto_classes_have_parsed_is_refused_at_sight(folder):
    config = json.loads((folder / "config.json").read_text())
    for changed in ({"unused": [0] * 3_000_000}, {"id2label": dict.fromkeys(range(600_000), "x")}):
        with little_cost(), pytest.raises(ValueError, match="holds more than 500,000 values"):
            FastBertConfig.from_dict({**config, **changed})


def test_hundred_thousand_labels_load(folder):
    config = json.loads((folder / "config.json").read_text())
    names = [f"label {index}" for index in range(100_000)]
    config.update(id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)})
    (folder / "config.json").write_text(json.dumps(config))
    with little_cost():
        assert FastBertConfig.from_pretrained(folder).id2label == dict(enumerate(names))


def test_unused_stock_pooler_is_no_harm(folder, caplog):
    weights = load_file(folder / "model.safetensors")
    for name in ("pooler.dense.weight", "pooler.bias", "embeddings.position_ids"):
        weights[f"fastbert.backbone.{name}"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(folder), tiny_model())
    assert "LOAD REPORT" not in caplog.text


def test_weights_given_as_state_dict_are_checked_too(whole):
    state = tiny_model().state_dict()
    del state["fastbert.backbone.embeddings.word_embeddings.weight"]
    with pytest.raises(ValueError, match=r"they lack backbone\.embeddings\.word_embeddings\.weight\."):
        FastBertForSequenceClassification.from_pretrained(
            None, config=FastBertConfig.from_pretrained(whole), state_dict=state
        )


def test_renamed_weights_must_all_be_there(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["fastbert.backbone.embeddings.word_embeddings.weight"]
    renamed = {name.replace("exits.", "classifiers."): value for name, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"has no weights for fastbert\.backbone\.embeddings\.word_embeddings\.weight:"
    ):
        FastBertForSequenceClassification.from_pretrained(folder, key_mapping={"^classifiers": "exits"})


def test_no_header_of_several_files_is_larger_than_that_of_one(folder):
    shards = {f"model-{index}.safetensors": b"{}" + b" " * 2_000_000 for index in range(3)}
    for name, header in shards.items():
        (folder / name).write_bytes(with_header(header))
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict(zip("abc", shards, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="headers of a checkpoint at most 5,000,000"):
        AutoModelForSequenceClassification.from_pretrained(folder)


# Cascades


@pytest.fixture(scope="module")
def whole_cascade(tmp_path_factory) -> Path:
    """A good cascade of three members."""
    folder = tmp_path_factory.mktemp("whole_cascade")
    members = [tiny_model(seed=seed) for seed in range(3)]
    CascadeForSequenceClassification.from_members(members).save_pretrained(folder)
    return folder


def of_12_billion_parameters(config: dict) -> None:
    """Let every member be of a size that is allowed, which together are not."""
    for member in config["members"]:
        member["text_config"].update(hidden_size=4096, num_hidden_layers=60, intermediate_size=11_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(members={}), "members={}, but it must list the configs of 2 to 16"),
        (lambda config: config.update(members=config["members"] * 20), "2 to 16"),
        (lambda config: config["members"].pop(), "they also hold members.2."),
        (lambda config: config["members"].append(config["members"][0]), "they lack members.3."),
        (lambda config: config["members"].__setitem__(1, "bert"), "member 2 of the cascade is 'bert', not the config"),
        (
            lambda config: config["members"][0]["text_config"].update(num_hidden_layers=10**6),
            "member 1 of the cascade: the config says text_config.num_hidden_layers=1000000",
        ),
        (of_12_billion_parameters, "parameters, but at most 20,000,000,000 are allowed"),
        (
            lambda config: config["members"][2]["text_config"].update(num_hidden_layers=5),
            "they lack members.2.fastbert.backbone.encoder.layer.4.",
        ),
        (lambda config: config["members"][1].update(model_type="bert"), "config of a 'bert' checkpoint"),
        (lambda config: config.update(attn_implementation="org/kernel"), "attn_implementation='org/kernel'"),
        (lambda config: config.update(speed=float("nan")), "speed must be a number"),
        (
            lambda config: config.update(num_hidden_layers=4),
            "num_hidden_layers=4, but that is a part of CascadeConfig",
        ),
        (lambda config: config.update(attribute_map={"a": "b"}), "that is a part of CascadeConfig itself"),
        (lambda config: config.update(id2label={"0": "a", "2": "b"}), "but the cascade {0: 'a', 2: 'b'}: all members"),
        (lambda config: config["members"][0].update(id2label={"0": "a", "2": "b"}), "{0: 'a', 2: 'b'} has no label 1"),
        (
            lambda config: config["members"][1].update(to_dict=5),
            "member 2 of the cascade: the config says to_dict=5, but that is a part of FastBertConfig itself",
        ),
        (
            lambda config: config["members"][0]["text_config"].update(hidden_act="nope"),
            "member 1 of the cascade: the config says text_config.hidden_act='nope', which is no activation",
        ),
        (lambda config: config.update(architectures=["BertModel"]), '["CascadeForSequenceClassification"]'),
        (
            lambda config: config["members"][0].update(id2label={"0": "a", "1": "b", "2": "c"}),
            "member 1 has the labels",
        ),
    ],
)
def test_a_hostile_cascade_costs_one_clear_error(whole_cascade, tmp_path, change, message):
    folder = Path(shutil.copytree(whole_cascade, tmp_path / "cascade"))
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with little_cost(), pytest.raises(ValueError, match=re.escape(message)):
        CascadeForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            lambda name: name.startswith("members.1.exits."),
            "they lack members.1.exits.0.pooler.exit_projection.weight,",
        ),
        (lambda name: name.startswith("members.0.") and "word_embeddings" in name, "they lack members.0.fastbert."),
        (lambda name: ".exits." in name, "they lack members.0.exits.0.pooler.exit_projection.weight,"),
    ],
)
def test_members_without_all_of_their_weights_are_refused(whole_cascade, tmp_path, lost, message):
    folder = Path(shutil.copytree(whole_cascade, tmp_path / "cascade"))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not lost(name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(message)):
        AutoModelForSequenceClassification.from_pretrained(folder)


# Pickles, and code


def as_pickle(folder: Path, weights: object, name: str = "pytorch_model.bin") -> None:
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / name)


def in_one_file(folder: Path, weights: dict) -> None:
    as_pickle(folder, weights)


def in_two_files(folder: Path, weights: dict) -> None:
    names = sorted(weights)
    as_pickle(folder, {name: weights[name] for name in names[::2]}, "pytorch_model-00001-of-00002.bin")
    torch.save({name: weights[name] for name in names[1::2]}, folder / "pytorch_model-00002-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("save", "name", "arguments"),
    [
        (in_one_file, "pytorch_model.bin", {}),
        (in_one_file, "pytorch_model.bin", {"subfolder": "checkpoint", "weights_only": True}),
        (in_two_files, "pytorch_model.bin.index.json", {"use_safetensors": None}),
    ],
)
def test_pickled_weights_are_refused_with_lines_that_convert_them(folder, save, name, arguments):
    save(folder, load_file(folder / "model.safetensors"))
    for load in LOADERS:
        with pytest.raises(OSError, match=rf"has its weights in {name} alone.* are safetensors only") as refused:
            load(folder.parent if "subfolder" in arguments else folder, **arguments)
    assert "weights_only=True" in str(refused.value)
    exec(str(refused.value).partition("\n\n")[2])
    assert_same_weights(FastBertForSequenceClassification.from_pretrained(folder), tiny_model())


def test_pickle_is_not_read_where_safetensors_are_not_wanted(folder):
    torch.save(Harm(folder / "marker"), folder / "pytorch_model.bin")
    for load in LOADERS:
        with pytest.raises(ValueError, match=r"safetensors only.*leave out use_safetensors=False"):
            load(folder, use_safetensors=False)
    assert not (folder / "marker").exists()


def test_pickle_given_by_its_own_path_is_refused(folder, monkeypatch):
    # With PEFT, Transformers takes the path of a file for a repository.
    monkeypatch.setattr("transformers.integrations.peft.is_peft_available", lambda: False)
    as_pickle(folder, Harm(folder / "marker"))
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a safetensors file: give the folder"):
        FastBertForSequenceClassification.from_pretrained(folder / "pytorch_model.bin", config=config)
    assert not (folder / "marker").exists()


def test_folder_without_weights_says_so(folder):
    (folder / "model.safetensors").unlink()
    message = r"has no model\.safetensors and no model\.safetensors\.index\.json: give a folder"
    with pytest.raises(OSError, match=message):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_distributed_checkpoint_does_not_take_the_place_of_the_checked_file(folder):
    shutil.copy(folder / "model.safetensors", folder / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match=r"is a distributed checkpoint.*model\.save_pretrained"):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.fixture
def old_backbone(tmp_path) -> Path:
    """A stock BERT as it was saved before safetensors."""
    backbone = tiny_stock_model()
    backbone.save_pretrained(tmp_path / "backbone")
    as_pickle(tmp_path / "backbone", backbone.state_dict())
    return tmp_path / "backbone"


def test_from_backbone_reads_an_old_backbones_pickle(old_backbone):
    model = FastBertForSequenceClassification.from_backbone(old_backbone, num_labels=3)
    loaded = model.fastbert.backbone.state_dict()
    expected = {name: value for name, value in tiny_stock_model().state_dict().items() if "pooler" not in name}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_from_backbone_runs_no_code_of_a_pickle(old_backbone):
    torch.save(Harm(old_backbone / "marker"), old_backbone / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"Weights only load failed"):
        FastBertForSequenceClassification.from_backbone(old_backbone, num_labels=3)
    assert not (old_backbone / "marker").exists()
    with pytest.raises(TypeError, match="unexpected weights_only"):
        FastBertForSequenceClassification.from_backbone(old_backbone, num_labels=3, weights_only=False)
    torch.load(old_backbone / "pytorch_model.bin", weights_only=False)
    assert (old_backbone / "marker").exists()  # it would have


def plant_code(folder: Path) -> Path:
    """Point to a file of the checkpoint's own wherever Transformers looks for code; return what that would make."""
    marker = folder / "marker"
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    config = json.loads((folder / "config.json").read_text())
    code = {
        "auto_map": {
            "AutoConfig": "evil.FastBertConfig",
            "AutoModel": "evil.FastBertModel",
            "AutoModelForSequenceClassification": "evil.FastBertForSequenceClassification",
        },
        "custom_pipelines": {
            "fast-text-classification": {"impl": "evil.Pipeline", "pt": ["AutoModelForSequenceClassification"]}
        },
    }
    config.update(code)
    if "text_config" in config:
        config["text_config"].update(code)
    else:
        config["attn_implementation"] = "evil/kernels"
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("pytorch_model.bin", "training_args.bin"):
        torch.save(Harm(marker), folder / name)
    return marker


def test_loading_runs_no_code_of_the_checkpoint(folder):
    marker = plant_code(folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert type(AutoConfig.from_pretrained(folder)) is FastBertConfig
    assert type(AutoModel.from_pretrained(folder)) is FastBertModel
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model) is FastBertForSequenceClassification
    assert_same_weights(model, tiny_model())
    classifier = fast_pipeline(folder)
    assert type(classifier.model) is FastBertForSequenceClassification
    assert len(classifier(tiny_texts(2))) == 2
    assert not marker.exists()


def test_trust_remote_code_runs_what_comes_with_a_tokenizer_and_nothing_else(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = plant_code(folder)
    for load in LOADERS:
        load(folder, trust_remote_code=True)
    pipeline("fast-text-classification", model=str(folder), trust_remote_code=True)
    assert not marker.exists()
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "evil.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(AttributeError, match="Tokenizer"):  # the planted file has no such class
        pipeline("fast-text-classification", model=str(folder), trust_remote_code=True)
    assert marker.exists()


def test_from_backbone_runs_no_code_of_the_backbone(tmp_path):
    tiny_stock_model().save_pretrained(tmp_path)
    marker = plant_code(tmp_path)
    FastBertForSequenceClassification.from_backbone(tmp_path, num_labels=3)
    assert not marker.exists()


def test_hostile_repository_in_the_cache_is_refused_offline(whole, tmp_path):
    cache = tmp_path / "cache"
    snapshot = copied_to_cache(whole, cache, "org/tiny")
    message = break_checkpoint(snapshot, "more layers")
    for load in LOADERS:
        with pytest.raises(ValueError, match=re.escape(message)):
            load("org/tiny", cache_dir=cache)
    as_pickle(snapshot, Harm(cache / "marker"))
    for load in LOADERS:
        with pytest.raises(OSError, match=r"(?s)pytorch_model\.bin alone.*snapshot_download"):
            load("org/tiny", cache_dir=cache)
    assert not (cache / "marker").exists()
