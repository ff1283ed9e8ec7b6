"""What `import fastbert_hf` does, what it leaves alone, and what it does without: network, Trainer and extras."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

import fastbert_hf
from fastbert_hf import (
    CascadeConfig,
    CascadeForSequenceClassification,
    FastBertConfig,
    FastBertForSequenceClassification,
    FastBertModel,
    FastTextClassificationPipeline,
)

from .common import CUT_NETWORK, tiny_model


PACKAGE = Path(fastbert_hf.__file__).parent
EXTRAS = ("datasets", "evaluate", "matplotlib", "pandas", "sklearn")
NEED_EXTRA = (
    "from fastbert_hf.evaluation import sweep_speeds",
    "fastbert_hf.evaluation.load_table",
    "from fastbert_hf.evaluation.speed_sweep import SPEEDS",
    "from fastbert_hf.evaluation import figures",
    "import fastbert_hf.evaluation.metrics",
)

# In a process where the extras cannot be imported.
IMPORT_AND_LOAD = """
import json, sys

folder, need_extra, *extras = sys.argv[1:]
sys.modules.update(dict.fromkeys(extras))
import torch
torch.set_num_threads(3)
torch.set_num_interop_threads(2)
import fastbert_hf
training_imported = [name for name in sys.modules if name in ("fastbert_hf.training", "transformers.trainer")]
threads = [torch.get_num_threads(), torch.get_num_interop_threads()]
reached_at_import = list(reached)
try:
    socket.create_connection(("127.0.0.1", 9))
except OSError:
    pass

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
config, model, classifier = (
    load.from_pretrained(folder) for load in (AutoConfig, AutoModel, AutoModelForSequenceClassification)
)
batch = {"input_ids": torch.tensor([[2, 7, 9, 3]])}
with torch.no_grad():
    logits, hidden_states = classifier(**batch).logits, model(**batch).last_hidden_state
import fastbert_hf.evaluation
import fastbert_hf.training
from fastbert_hf import choose_speed
from fastbert_hf.evaluation import ExitRecord, executed_flops, paper_flops, record_exits, replay, replay_at_speed

def said_of(code):
    try:
        exec(code)
    except ImportError as error:
        return str(error)

print(json.dumps({
    "threads": threads,
    "training_imported": training_imported,
    "reached_at_import": reached_at_import,
    "guard_works": len(reached) > len(reached_at_import),
    "types": [type(loaded).__name__ for loaded in (config, model, classifier)],
    "without_extras": [fastbert_hf.SelfDistillationTrainer.__name__, fastbert_hf.evaluation.record_exits.__name__],
    "need_extra": [said_of(code) for code in need_extra.split(";")],
    "default_dtype": str(torch.get_default_dtype()),
    "logits": logits.tolist(),
    "hidden_states": hidden_states.tolist(),
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def elsewhere(folder) -> dict:
    """What a fresh process sees after `import fastbert_hf`, its network cut, and nothing of the extras there."""
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    finished = subprocess.run(
        [sys.executable, "-c", CUT_NETWORK + IMPORT_AND_LOAD, str(folder), ";".join(NEED_EXTRA), *EXTRAS],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def test_auto_classes_know_the_models(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is FastBertConfig
    assert type(AutoConfig.for_model("fastbert")) is FastBertConfig
    assert type(AutoModel.from_pretrained(folder)) is FastBertModel
    assert type(AutoModel.from_config(config)) is FastBertModel
    assert type(AutoModelForSequenceClassification.from_pretrained(folder)) is FastBertForSequenceClassification
    assert type(AutoModelForSequenceClassification.from_config(config)) is FastBertForSequenceClassification


def test_auto_classes_know_the_cascade(tmp_path):
    cascade = CascadeForSequenceClassification.from_members([tiny_model(), tiny_model(seed=1)])
    cascade.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CascadeConfig
    assert type(AutoConfig.for_model("fastbert_cascade", members=[tiny_model().config] * 2)) is CascadeConfig
    # It has no encoder of its own.
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        assert type(auto_class.from_pretrained(tmp_path)) is CascadeForSequenceClassification
        assert type(auto_class.from_config(config)) is CascadeForSequenceClassification


@pytest.mark.parametrize("loads", [FastBertConfig, FastBertForSequenceClassification])
def test_a_cascade_is_no_model_with_exits(tmp_path, loads):
    CascadeForSequenceClassification.from_members([tiny_model(), tiny_model(seed=1)]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the config of a 'fastbert_cascade' checkpoint"):
        loads.from_pretrained(tmp_path)


@pytest.mark.parametrize("loads", [CascadeConfig, CascadeForSequenceClassification])
def test_a_model_with_exits_is_no_cascade(folder, loads):
    with pytest.raises(ValueError, match="the config of a 'fastbert' checkpoint, not of a cascade"):
        loads.from_pretrained(folder)


def test_auto_classes_know_the_models_in_a_fresh_process(elsewhere):
    assert elsewhere["types"] == ["FastBertConfig", "FastBertModel", "FastBertForSequenceClassification"]


def test_auto_classes_load_every_weight_in_a_fresh_process(elsewhere):
    model = tiny_model()
    batch = {"input_ids": torch.tensor([[2, 7, 9, 3]])}
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(elsewhere["logits"]), model(**batch).logits)
        hidden_states = model.fastbert(**batch).last_hidden_state
        torch.testing.assert_close(torch.tensor(elsewhere["hidden_states"]), hidden_states)


def test_import_reaches_for_no_network(elsewhere):
    assert elsewhere["guard_works"]
    assert elsewhere["reached_at_import"] == []


def test_import_changes_no_thread_count_and_no_default_dtype(elsewhere):
    assert elsewhere["threads"] == [3, 2]
    assert elsewhere["default_dtype"] == "torch.float32"


def test_import_leaves_the_trainer_to_those_who_train(elsewhere):
    assert elsewhere["training_imported"] == []


def test_training_and_recording_need_no_extra(elsewhere):
    assert elsewhere["without_extras"] == ["SelfDistillationTrainer", "record_exits"]


def test_what_needs_the_extra_of_evaluation_says_what_to_install(elsewhere):
    message = 'fastbert_hf.evaluation needs its extra: pip install "fastbert-hf[evaluation]"'
    assert elsewhere["need_extra"] == [message] * len(NEED_EXTRA)


def test_pipeline_is_registered_without_the_mark_of_custom_code():
    targeted = PIPELINE_REGISTRY.check_task("fast-text-classification")[1]
    assert targeted["impl"] is FastTextClassificationPipeline
    assert targeted["pt"] == (AutoModelForSequenceClassification,)
    assert not hasattr(FastTextClassificationPipeline, "_registered_impl")


def test_saved_model_points_to_no_custom_code(folder):
    config = json.loads((folder / "config.json").read_text())
    assert not {"custom_pipelines", "auto_map"} & config.keys()
    assert not list(folder.glob("**/*.py"))


def test_public_names_are_those_of_the_contract():
    assert set(fastbert_hf.__all__) >= {
        "CascadeConfig",
        "CascadeForSequenceClassification",
        "FastBertConfig",
        "FastBertForSequenceClassification",
        "FastBertModel",
        "FastTextClassificationPipeline",
        "SelfDistillationArguments",
        "SelfDistillationTrainer",
    }
    assert all(hasattr(fastbert_hf, name) for name in fastbert_hf.__all__)
    with pytest.raises(AttributeError, match="'fastbert_hf' has no attribute 'FastBert'"):
        fastbert_hf.FastBert  # noqa: B018


def test_version_is_that_of_the_installed_package():
    assert fastbert_hf.__version__ == version("fastbert-hf")


def test_type_hints_are_shipped():
    assert (files("fastbert_hf") / "py.typed").is_file()
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    assert "py.typed" in setup["options.package_data"]["fastbert_hf"].split()
