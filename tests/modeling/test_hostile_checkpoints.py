"""Checkpoints that are broken or mean harm: each costs one clear error and little else, and none runs code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    XLMRobertaConfig,
    pipeline,
)

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification, FastBertModel
from fastbert_hf.modeling.checkpoint_checks import check_raw_config, estimated_parameters
from tests.common import (
    FAMILIES,
    NUM_LAYERS,
    tiny_model,
    tiny_stock_model,
    tiny_text_config,
    tiny_texts,
    tiny_tokenizer,
)

from .hostile_checkpoints import (
    CONFIGS,
    FILES,
    MEGABYTES,
    SECONDS,
    break_files,
    edit_config,
    with_header,
)


REPOSITORY, COMMIT = "org/fastbert-tiny", "0123456789abcdef0123456789abcdef01234567"


class Harm:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def assert_same_weights(
    loaded: FastBertForSequenceClassification, expected: FastBertForSequenceClassification
) -> None:
    loaded, expected = loaded.state_dict(), expected.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A good checkpoint of 4 layers and 3 labels."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def saying(message: str) -> str:
    return re.escape(message)


def fast_pipeline(folder: Path):
    return pipeline("fast-text-classification", model=str(folder))


@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_config_is_refused(folder, case):
    changes, message = CONFIGS[case]
    edit_config(folder, changes)
    for load in (
        AutoConfig.from_pretrained,
        AutoModel.from_pretrained,
        AutoModelForSequenceClassification.from_pretrained,
        FastBertForSequenceClassification.from_pretrained,
        FastBertForSequenceClassification.from_backbone,
        fast_pipeline,
    ):
        with pytest.raises(ValueError, match=saying(message)):
            load(folder)


def test_raw_config_is_refused_before_the_backbones_config_exists(folder, monkeypatch):
    def built(self, **kwargs):
        raise AssertionError("a BertConfig was built")

    edit_config(folder, {"text_config.num_hidden_layers": 10**9})
    monkeypatch.setattr(BertConfig, "__init__", built)
    for load in (AutoConfig.from_pretrained, AutoModelForSequenceClassification.from_pretrained):
        with pytest.raises(ValueError, match="num_hidden_layers=1000000000"):
            load(folder)


@pytest.mark.parametrize("case", FILES)
def test_hostile_weights_are_refused(folder, case):
    _, message = FILES[case]
    break_files(folder, case)
    for load in (
        AutoModelForSequenceClassification.from_pretrained,
        AutoModel.from_pretrained,
        FastBertForSequenceClassification.from_pretrained,
    ):
        with pytest.raises((ValueError, OSError), match=saying(message)):
            load(folder)


def test_weights_are_refused_before_a_model_or_tensor_exists(folder, monkeypatch):
    def built(*args, **kwargs):
        raise AssertionError("a model was built")

    break_files(folder, "more exits than layers")
    monkeypatch.setattr(FastBertForSequenceClassification, "__init__", built)
    monkeypatch.setattr(torch, "empty", built)
    monkeypatch.setattr(torch.nn.Module, "__init__", built)
    with pytest.raises(ValueError, match="also number 4"):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("case", ["more exits than layers", "header cut off", "shard of ../../model.safetensors"])
def test_pipeline_refuses_hostile_weights(folder, case):
    break_files(folder, case)
    with pytest.raises(ValueError, match=saying(FILES[case][1])):
        fast_pipeline(folder)


def test_no_header_of_several_files_is_larger_than_that_of_one(folder):
    shards = {f"model-{index}.safetensors": b"{}" + b" " * 2_000_000 for index in range(3)}
    for name, header in shards.items():
        (folder / name).write_bytes(with_header(header))
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict(zip("abc", shards, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="headers of a checkpoint at most 5,000,000"):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_no_refusal_takes_two_seconds_or_200_mb(whole, tmp_path):
    cases = {**{name: message for name, (_, message) in CONFIGS.items()}, **{name: FILES[name][1] for name in FILES}}
    assert len(cases) == len(CONFIGS) + len(FILES)
    parent = tmp_path / "checkpoints"
    # Its cost is that of the modules which Transformers imports late.
    shutil.copytree(whole, parent / "000")
    names = {f"{number:03d}": case for number, case in enumerate(cases, start=1)}
    for name, case in names.items():
        shutil.copytree(whole, parent / name)
        if case in CONFIGS:
            edit_config(parent / name, CONFIGS[case][0])
        else:
            break_files(parent / name, case)
    finished = subprocess.run(
        [sys.executable, "-m", "tests.modeling.hostile_checkpoints", str(parent)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    shutil.rmtree(parent)
    assert finished.returncode == 0, finished.stderr[-3000:]
    costs = json.loads(finished.stdout.splitlines()[-1])
    assert costs.pop("000")["outcome"] == "loaded"
    assert costs.keys() == names.keys()
    for name, case in names.items():
        assert cases[case] in costs[name]["outcome"], case
        assert costs[name]["seconds"] < SECONDS, (case, costs[name])
        assert costs[name]["megabytes"] < MEGABYTES, (case, costs[name])


# Pickles


def as_pickle(folder: Path, weights: object, name: str = "pytorch_model.bin") -> None:
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / name)


@pytest.mark.parametrize("arguments", [{}, {"use_safetensors": None}, {"weights_only": True}, {"subfolder": "best"}])
def test_pickled_weights_are_refused_with_lines_that_convert_them(folder, arguments):
    weights = load_file(folder / "model.safetensors")
    as_pickle(folder, weights)
    name = folder
    if "subfolder" in arguments:
        folder = folder.rename(folder.parent / "best")
        name = folder.parent
    for load in (AutoModelForSequenceClassification, AutoModel, FastBertForSequenceClassification):
        with pytest.raises(
            OSError, match=r"has its weights in pytorch_model\.bin alone.* are safetensors only"
        ) as refused:
            load.from_pretrained(name, **arguments)
    assert "weights_only=True" in str(refused.value)
    exec(str(refused.value).partition("\n\n")[2])
    assert_same_weights(FastBertForSequenceClassification.from_pretrained(folder), tiny_model())


def test_pickled_shards_are_refused_with_lines_that_convert_them(folder):
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    as_pickle(folder, {name: weights[name] for name in names[::2]}, "pytorch_model-00001-of-00002.bin")
    torch.save({name: weights[name] for name in names[1::2]}, folder / "pytorch_model-00002-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(OSError, match=r"has its weights in pytorch_model\.bin\.index\.json alone") as refused:
        AutoModelForSequenceClassification.from_pretrained(folder)
    exec(str(refused.value).partition("\n\n")[2])
    assert_same_weights(FastBertForSequenceClassification.from_pretrained(folder), tiny_model())


def test_pickle_is_not_read_where_safetensors_are_not_wanted(folder):
    torch.save(Harm(folder / "marker"), folder / "pytorch_model.bin")
    for load in (AutoModelForSequenceClassification, AutoModel, FastBertForSequenceClassification):
        with pytest.raises(ValueError, match=r"safetensors only.*leave out use_safetensors=False"):
            load.from_pretrained(folder, use_safetensors=False)
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
    with pytest.raises(
        OSError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json: give a folder"
    ):
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
    (tmp_path / "backbone" / "model.safetensors").unlink()
    torch.save(backbone.state_dict(), tmp_path / "backbone" / "pytorch_model.bin")
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
    """Points to a file of the checkpoint's own wherever Transformers looks for code; returns what that would make."""
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


def test_from_backbone_runs_no_code_of_the_backbone(tmp_path):
    tiny_stock_model().save_pretrained(tmp_path)
    marker = plant_code(tmp_path)
    FastBertForSequenceClassification.from_backbone(tmp_path, num_labels=3)
    assert not marker.exists()


# Good checkpoints pass


@pytest.mark.parametrize("family", FAMILIES)
def test_good_checkpoint_of_every_family_loads(tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    model.save_pretrained(tmp_path / "parent" / "child")
    model.save_pretrained(tmp_path / "variant", variant="fp32")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    for path, arguments in (
        (tmp_path / "whole", {}),
        (str(tmp_path / "shards"), {}),
        (tmp_path / "parent", {"subfolder": "child"}),
        (tmp_path / "variant", {"variant": "fp32"}),
    ):
        loaded = AutoModelForSequenceClassification.from_pretrained(path, **arguments)
        assert_same_weights(loaded, model)
        assert all(not parameter.requires_grad for parameter in loaded.student_parameters())


@pytest.mark.parametrize("exit_type", ["attention", "linear", "linear_mean"])
@pytest.mark.parametrize("teacher_exit_type", ["attention", "linear"])
@pytest.mark.parametrize("share_exit_pooler", [False, True])
def test_good_checkpoint_of_every_kind_of_exits_loads(tmp_path, exit_type, teacher_exit_type, share_exit_pooler):
    types = {"exit_type": exit_type, "teacher_exit_type": teacher_exit_type, "share_exit_pooler": share_exit_pooler}
    model = tiny_model(num_labels=5, exit_hidden_size=24, **types)
    model.save_pretrained(tmp_path)
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path), model)


def test_weights_given_in_other_ways_load(whole, tmp_path, monkeypatch):
    model, config = tiny_model(), AutoConfig.from_pretrained(whole)
    load = FastBertForSequenceClassification.from_pretrained
    assert_same_weights(load(None, config=config, state_dict=model.state_dict()), model)
    with monkeypatch.context() as patches:
        patches.setattr("transformers.integrations.peft.is_peft_available", lambda: False)
        assert_same_weights(load(whole / "model.safetensors", config=config), model)
    assert_same_weights(load(whole, config=whole / "config.json"), model)
    assert_same_weights(load(pretrained_model_name_or_path=whole, dtype="auto", force_download=True), model)
    loaded, info = load(whole, output_loading_info=True)
    assert_same_weights(loaded, model)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    renamed = {name.replace("exits.", "classifiers."): value for name, value in model.state_dict().items()}
    shutil.copy(whole / "config.json", tmp_path)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(load(tmp_path, key_mapping={"^classifiers": "exits"}), model)


def test_other_labels_need_ignore_mismatched_sizes(whole):
    load = FastBertForSequenceClassification.from_pretrained
    with pytest.raises(ValueError, match=r"asks for exits.0.out_proj.weight of shape \[7, 128\]"):
        load(whole, num_labels=7)
    assert load(whole, num_labels=7, ignore_mismatched_sizes=True).teacher.out_proj.out_features == 7


def test_encoder_of_a_checkpoint_without_exits_loads_into_both_models(tmp_path):
    encoder = tiny_model().fastbert
    encoder.save_pretrained(tmp_path)
    for loaded in (
        FastBertModel.from_pretrained(tmp_path),
        FastBertForSequenceClassification.from_pretrained(tmp_path).fastbert,
    ):
        state = loaded.state_dict()
        assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())


def test_adapter_folder_leads_to_its_base(whole, tmp_path):
    peft = pytest.importorskip("peft")
    base = FastBertForSequenceClassification.from_pretrained(whole)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    loaded = FastBertForSequenceClassification.from_pretrained(tmp_path)
    assert any("lora" in name for name, _ in loaded.named_parameters())


@pytest.fixture
def cache(whole, tmp_path, monkeypatch) -> Path:
    """A cache that holds the checkpoint under the id of a repository, as the client of the Hub lays it out."""
    repository = tmp_path / "cache" / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(whole, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    for revision in ("main", "other"):
        (repository / "refs" / revision).write_text(COMMIT)
    return tmp_path / "cache"


@pytest.mark.parametrize("revision", [None, "main", "other", COMMIT])
def test_repository_in_the_cache_loads_offline(cache, revision):
    for load in (AutoModelForSequenceClassification, FastBertForSequenceClassification):
        assert_same_weights(load.from_pretrained(REPOSITORY, cache_dir=cache, revision=revision), tiny_model())
    with pytest.raises(OSError):
        FastBertForSequenceClassification.from_pretrained(REPOSITORY, cache_dir=cache, revision="unknown")


def test_hostile_repository_in_the_cache_is_refused_offline(cache):
    snapshot = next(cache.glob("*/snapshots/*"))
    break_files(snapshot, "more exits than layers")
    for load in (AutoModelForSequenceClassification, FastBertForSequenceClassification):
        with pytest.raises(ValueError, match="the weights hold 5, also number 4"):
            load.from_pretrained(REPOSITORY, cache_dir=cache)
    as_pickle(snapshot, Harm(cache / "marker"))
    for load in (AutoModelForSequenceClassification, FastBertForSequenceClassification):
        with pytest.raises(OSError, match=r"(?s)pytorch_model\.bin alone.*snapshot_download"):
            load.from_pretrained(REPOSITORY, cache_dir=cache)
    assert not (cache / "marker").exists()


LARGE_SHAPE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
FULL_SIZE = {
    "bert-base": BertConfig(),
    "bert-large": BertConfig(**LARGE_SHAPE),
    "bert-large with 10,000 labels": BertConfig(**LARGE_SHAPE, num_labels=10_000),
    "xlm-roberta-large": XLMRobertaConfig(**LARGE_SHAPE, vocab_size=250_002),
    "albert-base": AlbertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    "albert-xxlarge": AlbertConfig(),
    "distilbert": DistilBertConfig(),
    "electra-small": ElectraConfig(),
    "modernbert-base": ModernBertConfig(),
    "modernbert-large": ModernBertConfig(**{**LARGE_SHAPE, "num_hidden_layers": 28, "intermediate_size": 2624}),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_config_passes_with_a_fair_estimate_of_its_size(tmp_path, name):
    text_config = FULL_SIZE[name]
    config = FastBertConfig(text_config=text_config, num_labels=text_config.num_labels)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).text_config.to_dict() == text_config.to_dict()
    with torch.device("meta"):
        model = FastBertForSequenceClassification(config)
    # Weights may hold half of what is estimated.
    assert 0.9 < estimated_parameters(config.to_dict()) / model.num_parameters() < 1.8


@pytest.mark.parametrize("family", FAMILIES)
def test_config_of_every_family_passes_with_its_exact_sizes(family):
    config = FastBertConfig(text_config=tiny_text_config(family), max_layers=NUM_LAYERS, speed=1, exit_dropout=0)
    check_raw_config(config.to_dict())
    check_raw_config({"text_config": tiny_text_config(family)})
    with pytest.raises(ValueError, match="max_layers must be a whole number from 1 to 4"):
        check_raw_config({**config.to_dict(), "max_layers": NUM_LAYERS + 1})
