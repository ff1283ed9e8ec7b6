"""A checkpoint with its code beside the weights, where the package is and where it is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline

import fastbert_hf
from fastbert_hf import calibrate, save_with_code

from ..common import FAMILIES, tiny_model, tiny_texts, tiny_tokenizer


TEXTS = tiny_texts(8)
SPEEDS = (0.0, 0.3, 0.9, 1.0)
DIALS = ({"speed": 0.6}, {"speedup": 1.2}, {"max_disagreement": 0.3}, {"max_disagreement": 0.5, "confidence": 0.99})
BATCH = {"input_ids": torch.tensor([[2, 7, 9, 3], [2, 8, 11, 3]])}
CODE = {
    path.name
    for path in (Path(fastbert_hf.__file__).parent / "modeling").glob("*.py")
    if path.stem not in ("__init__", "configuration_cascade", "modeling_cascade")
}
# Of every family, and one with all that changes what layers compute.
MODELS = {family: {"family": family} for family in FAMILIES} | {
    "fast_and_short": {
        "feed_forward": {"form": "leaves", "depth": 2, "leaf_size": 8, "master_size": 4},
        "coarsening": {"layers": [1, 2], "retention": [0.7, 0.4]},
    }
}

# A process that cannot import the package.
ELSEWHERE = """
import json, sys
from pathlib import Path

sys.modules["fastbert_hf"] = None
try:
    import fastbert_hf
    raise SystemExit("the package is here")
except ImportError:
    pass
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline

folder, marked, others = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
job = json.loads((folder / "job.json").read_text())
trust = {"trust_remote_code": True}
batch = {"input_ids": torch.tensor(job["input_ids"])}
torch.set_grad_enabled(False)
classifier = AutoModelForSequenceClassification.from_pretrained(folder, **trust)
pipe = pipeline(model=str(folder), speed=0.9, **trust)
named = pipeline("fast-text-classification", model=str(folder), **trust)
seen = {
    "modules": [
        type(AutoConfig.from_pretrained(folder, **trust)).__module__,
        type(AutoModel.from_pretrained(folder, **trust)).__module__,
        type(classifier).__module__,
        type(pipe).__module__,
    ],
    "hidden_states": AutoModel.from_pretrained(folder, **trust)(**batch).last_hidden_state.tolist(),
    "logits": [classifier(**batch, speed=speed).logits.tolist() for speed in job["speeds"]],
    "answers": [pipe(job["texts"], speed=speed) for speed in job["speeds"]],
    "answers_at_constructor_speed": pipe(job["texts"]),
    "answers_at_config_speed": named(job["texts"]),
    "others": {},
}
for other in others:
    loaded = AutoModelForSequenceClassification.from_pretrained(other, **trust)
    seen["others"][Path(other).name] = [loaded(**batch, speed=speed).logits.tolist() for speed in (0.0, 0.5)]
calibrated = pipeline("fast-text-classification", model=job["calibrated"], **trust)
seen["calibrated"] = [calibrated(job["texts"], **dial) for dial in job["dials"]]
pipe.save_pretrained(folder / "saved_again")
seen["saved_again"] = pipeline(model=str(folder / "saved_again"), speed=0.9, **trust)(job["texts"])

def refusal(load, **kwargs):
    try:
        load(marked, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

loads = [AutoConfig.from_pretrained, AutoModel.from_pretrained, AutoModelForSequenceClassification.from_pretrained]
loads += [lambda model, **kwargs: pipeline(model=model, **kwargs)]
loads += [lambda model, **kwargs: pipeline("fast-text-classification", model=model, **kwargs)]
seen["refusals"] = [refusal(load, **kwargs) for load in loads for kwargs in ({}, {"trust_remote_code": False})]
# The question whether to trust leaves its line open.
print("\\n" + json.dumps(seen))
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_labels=3, speed=0.4)


@pytest.fixture(scope="module")
def calibrated_model():
    model = tiny_model(seed=1)
    calibrate(model, tiny_texts(400), tiny_tokenizer(), exit_policy="learned", linear=True, progress=False)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    save_with_code(model, folder, tokenizer=tiny_tokenizer())
    return folder


@pytest.fixture(scope="module")
def marked(folder, tmp_path_factory) -> Path:
    """The same folder with code that leaves a mark where it is run."""
    marked = tmp_path_factory.mktemp("marked") / "checkpoint"
    shutil.copytree(folder, marked)
    for path in marked.glob("*.py"):
        path.write_text(f"open({str(marked.parent / 'mark')!r}, 'w').close()\n" + path.read_text())
    return marked


@pytest.fixture(scope="module")
def elsewhere(folder, marked, calibrated_model, tmp_path_factory) -> dict:
    """What a process without the package sees."""
    calibrated = tmp_path_factory.mktemp("calibrated")
    save_with_code(calibrated_model, calibrated, tokenizer=tiny_tokenizer())
    job = {"input_ids": BATCH["input_ids"].tolist(), "texts": TEXTS, "speeds": SPEEDS}
    job |= {"calibrated": str(calibrated), "dials": DIALS}
    (folder / "job.json").write_text(json.dumps(job))
    others = []
    for name, settings in MODELS.items():
        others.append(tmp_path_factory.mktemp("others") / name)
        save_with_code(tiny_model(**settings), others[-1])
    finished = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder), str(marked), *map(str, others)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def test_the_code_lies_beside_the_weights(folder):
    names = {path.name for path in folder.iterdir()}
    assert CODE | {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert {name for name in names if name.endswith(".py")} == CODE
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForSequenceClassification"}
    assert "default" not in config["custom_pipelines"]["fast-text-classification"]


def test_classes_come_from_that_code_elsewhere(elsewhere):
    assert [name.partition(".")[0] for name in elsewhere["modules"]] == ["transformers_modules"] * 4


def test_answers_are_the_same_elsewhere(model, elsewhere):
    with torch.no_grad():
        for speed, logits in zip(SPEEDS, elsewhere["logits"], strict=True):
            torch.testing.assert_close(torch.tensor(logits), model(**BATCH, speed=speed).logits)
        hidden_states = model.fastbert(**BATCH).last_hidden_state
    torch.testing.assert_close(torch.tensor(elsewhere["hidden_states"]), hidden_states)


def test_the_pipeline_and_its_speed_are_the_same_elsewhere(model, elsewhere):
    classifier = pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer())
    answers = [classifier(TEXTS, speed=speed) for speed in SPEEDS]
    assert len({tuple(answer["exit_layer"] for answer in part) for part in answers}) > 1
    for part, there in zip(answers, elsewhere["answers"], strict=True):
        assert_same_answers(there, part)
    assert_same_answers(elsewhere["answers_at_constructor_speed"], classifier(TEXTS, speed=0.9))
    assert_same_answers(elsewhere["answers_at_config_speed"], classifier(TEXTS, speed=0.4))


def test_what_a_calibrated_model_may_be_asked_for_is_the_same_elsewhere(calibrated_model, elsewhere):
    classifier = pipeline("fast-text-classification", model=calibrated_model, tokenizer=tiny_tokenizer())
    for dial, there in zip(DIALS, elsewhere["calibrated"], strict=True):
        assert_same_answers(there, classifier(TEXTS, **dial))


def assert_same_answers(there: list[dict], here: list[dict]) -> None:
    assert [(answer["label"], answer["exit_layer"]) for answer in there] == [
        (answer["label"], answer["exit_layer"]) for answer in here
    ]
    assert [answer["score"] for answer in there] == pytest.approx([answer["score"] for answer in here], abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_and_every_kind_of_layers_answers_elsewhere(elsewhere, name):
    model = tiny_model(**MODELS[name])
    for speed, logits in zip((0.0, 0.5), elsewhere["others"][name], strict=True):
        with torch.no_grad():
            expected = model(**BATCH, speed=speed).logits
        torch.testing.assert_close(torch.tensor(logits), expected)


def test_saved_again_elsewhere_it_still_has_its_code(folder, elsewhere):
    assert {path.name for path in (folder / "saved_again").glob("*.py")} == CODE
    assert_same_answers(elsewhere["saved_again"], elsewhere["answers_at_constructor_speed"])


def test_without_trust_nothing_of_it_runs_elsewhere(elsewhere, marked):
    assert len(elsewhere["refusals"]) == 10
    for refusal in elsewhere["refusals"]:
        assert refusal is not None and "trust_remote_code" in refusal
    assert not (marked.parent / "mark").exists()


@pytest.mark.parametrize("kwargs", [{}, {"trust_remote_code": True}], ids=["untrusted", "trusted"])
def test_where_the_package_is_its_own_classes_load(marked, tmp_path, kwargs):
    config = AutoConfig.from_pretrained(marked, **kwargs)
    model = AutoModelForSequenceClassification.from_pretrained(marked, **kwargs)
    classifier = pipeline("fast-text-classification", model=str(marked), **kwargs)
    assert type(config) is fastbert_hf.FastBertConfig
    assert type(AutoModel.from_pretrained(marked, **kwargs)) is fastbert_hf.FastBertModel
    assert type(model) is fastbert_hf.FastBertForSequenceClassification
    assert type(classifier) is fastbert_hf.FastTextClassificationPipeline
    assert classifier(TEXTS[0], speed=1.0)[0]["exit_layer"] == 1
    assert not (marked.parent / "mark").exists()
    for name, saveable in (("config", config), ("model", model), ("pipeline", classifier)):
        saveable.save_pretrained(tmp_path / name)
        assert not {"auto_map", "custom_pipelines"} & json.loads((tmp_path / name / "config.json").read_text()).keys()
        assert not list((tmp_path / name).glob("*.py"))


def test_a_bare_model_is_saved_with_its_code_too(tmp_path):
    save_with_code(tiny_model().fastbert, tmp_path / "bare")
    assert {path.name for path in (tmp_path / "bare").glob("*.py")} == CODE
    assert not (tmp_path / "bare" / "README.md").exists()
    assert type(AutoModel.from_pretrained(tmp_path / "bare")) is fastbert_hf.FastBertModel


def test_a_model_card_that_is_there_stays(model, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save_with_code(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_saving_twice_leaves_no_trace_of_the_first(model, folder, tmp_path):
    save_with_code(tiny_model(seed=1), tmp_path)
    save_with_code(model, tmp_path, tokenizer=tiny_tokenizer())
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {path.name for path in folder.iterdir()} - {"job.json", "saved_again"}
    for name in left:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes() or name == "README.md"


def test_other_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"save_with_code saves FastBERT models, got Linear\. Wrap a stock classifier"):
        save_with_code(torch.nn.Linear(1, 1), tmp_path)


def test_an_adapter_is_refused_before_anything_is_written(tmp_path):
    adapter = get_peft_model(tiny_model(), LoraConfig(target_modules=["query"], modules_to_save=["exits.0"]))
    with pytest.raises(TypeError, match=r"for an adapter give model\.merge_and_unload\(\)"):
        save_with_code(adapter, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    save_with_code(adapter.merge_and_unload(), tmp_path / "folder")


def test_a_file_is_no_folder(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file: give a folder"):
        save_with_code(model, tmp_path / "file")
