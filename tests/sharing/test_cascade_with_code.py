"""A cascade with its code beside the weights, where the package is and where it is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertTokenizer, pipeline

import fastbert_hf
from fastbert_hf import CascadeForSequenceClassification, CascadeProcessor, save_with_code

from ..common import other_tokenizer, stock, tiny_model, tiny_texts, tiny_tokenizer


TEXTS = tiny_texts(8)
SPEEDS = (0.0, 0.4, 0.8, 1.0)
KINDS = ("shared", "own")
CODE = {path.name for path in (Path(fastbert_hf.__file__).parent / "modeling").glob("*.py")} - {"__init__.py"}

# A process that cannot import the package, and notes what it is asked.
ELSEWHERE = """
import builtins, json, sys
from pathlib import Path

sys.modules["fastbert_hf"] = None
try:
    import fastbert_hf
    raise SystemExit("the package is here")
except ImportError:
    pass
asked = []

def ask(prompt=""):
    asked.append(prompt)
    raise EOFError

builtins.input = ask
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline

texts, speeds, folders, marked = (json.loads(argument) for argument in sys.argv[1:])
trust, seen = {"trust_remote_code": True}, {}
torch.set_grad_enabled(False)
for folder in folders:
    config = AutoConfig.from_pretrained(folder, **trust)
    model = AutoModelForSequenceClassification.from_pretrained(folder, **trust)
    pipe = pipeline(model=folder, speed=0.8, **trust)
    named = pipeline("fast-text-classification", model=folder, **trust)
    own = [
        tokenizer(texts, padding=True, return_tensors="pt")
        for tokenizer in getattr(pipe.tokenizer, "tokenizers", [pipe.tokenizer])
    ]
    inputs = {"member_inputs": own} if config.own_tokenizers else own[0]
    things = [config, AutoModel.from_pretrained(folder, **trust), model, *model.members, *config.members, pipe]
    there = {
        "modules": [type(thing).__module__ for thing in things],
        "logits": [model(**inputs, speed=speed).logits.tolist() for speed in speeds],
        "exit_member": [
            [answer.exit_member for answer in model.predict(pipe.tokenizer(texts), speed=speed)] for speed in speeds
        ],
        "answers": [pipe(texts, speed=speed) for speed in speeds],
        "answers_at_constructor_speed": pipe(texts),
        "answers_at_config_speed": named(texts),
    }
    again = Path(folder, "saved_again")
    pipe.save_pretrained(again)
    there["saved_again"] = pipeline(model=str(again), speed=0.8, **trust)(texts)
    seen[Path(folder).name] = there
seen["asked"] = list(asked)

def refusal(load, folder, **kwargs):
    try:
        load(folder, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

loads = [AutoConfig.from_pretrained, AutoModel.from_pretrained, AutoModelForSequenceClassification.from_pretrained]
loads += [lambda model, **kwargs: pipeline(model=model, **kwargs)]
loads += [lambda model, **kwargs: pipeline("fast-text-classification", model=model, **kwargs)]
untrusted = [{}, {"trust_remote_code": False}]
seen["refusals"] = [refusal(load, folder, **kwargs) for folder in marked for load in loads for kwargs in untrusted]
seen["asked_without_trust"] = len(asked)
print("\\n" + json.dumps(seen))
"""


def tokenizers_of(kind: str) -> list[BertTokenizer]:
    """Those of the two members."""
    return [tiny_tokenizer(), tiny_tokenizer() if kind == "shared" else other_tokenizer()]


def processor_of(kind: str) -> BertTokenizer | CascadeProcessor:
    """What is saved beside the cascade and given to the pipeline."""
    return tiny_tokenizer() if kind == "shared" else CascadeProcessor(tokenizers_of(kind))


def cascade_of(kind: str) -> CascadeForSequenceClassification:
    members = [stock("distilbert", 1, 4), tiny_model(seed=1)]
    return CascadeForSequenceClassification.from_members(members, tokenizers_of(kind), exit_policy="margin", speed=0.6)


@pytest.fixture(scope="module")
def cascades() -> dict[str, CascadeForSequenceClassification]:
    return {kind: cascade_of(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(cascades, tmp_path_factory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp("with_code") / kind for kind in KINDS}
    for kind, folder in folders.items():
        save_with_code(cascades[kind], folder, tokenizer=processor_of(kind))
    return folders


@pytest.fixture(scope="module")
def marked(folders, tmp_path_factory) -> dict[str, Path]:
    """The same folders with code that leaves a mark where it is run."""
    place = tmp_path_factory.mktemp("marked")
    for kind, folder in folders.items():
        shutil.copytree(folder, place / kind)
        for path in (place / kind).glob("*.py"):
            path.write_text(f"open({str(place / 'mark')!r}, 'w').close()\n" + path.read_text())
    return {kind: place / kind for kind in KINDS}


@pytest.fixture(scope="module")
def elsewhere(folders, marked, tmp_path_factory) -> dict:
    """What a process without the package sees."""
    names = [list(map(str, places.values())) for places in (folders, marked)]
    finished = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(json.dumps, (TEXTS, SPEEDS, *names))],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def assert_same_answers(there: list[dict], here: list[dict]) -> None:
    names = ("label", "exit_layer", "exit_member")
    assert [[answer[name] for name in names] for answer in there] == [
        [answer[name] for name in names] for answer in here
    ]
    assert [answer["score"] for answer in there] == pytest.approx([answer["score"] for answer in here], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_lies_beside_the_weights_and_the_tokenizers(folders, kind):
    names = {str(path.relative_to(folders[kind])) for path in folders[kind].rglob("*") if path.is_file()}
    of_members = {"member_2/tokenizer.json", "member_2/tokenizer_config.json"} if kind == "own" else set()
    saved = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {name for name in names if not name.startswith("saved_again/")} == CODE | saved | of_members
    config = json.loads((folders[kind] / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForSequenceClassification"}
    assert "default" not in config["custom_pipelines"]["fast-text-classification"]
    assert "trust_remote_code=True" in (folders[kind] / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_classes_come_from_that_code_elsewhere_and_nothing_is_asked(elsewhere, kind):
    assert {name.partition(".")[0] for name in elsewhere[kind]["modules"]} == {"transformers_modules"}
    assert elsewhere["asked"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same_elsewhere(cascades, elsewhere, kind):
    cascade = cascades[kind]
    own = [tokenizer(TEXTS, padding=True, return_tensors="pt") for tokenizer in tokenizers_of(kind)]
    inputs = {"member_inputs": own} if kind == "own" else own[0]
    for speed, logits, members in zip(SPEEDS, elsewhere[kind]["logits"], elsewhere[kind]["exit_member"], strict=True):
        with torch.no_grad():
            output = cascade(**inputs, speed=speed)
        torch.testing.assert_close(torch.tensor(logits), output.logits)
        assert members == output.exit_member.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_and_its_speed_are_the_same_elsewhere(cascades, elsewhere, kind):
    classifier = pipeline("fast-text-classification", model=cascades[kind], tokenizer=processor_of(kind))
    answers = [classifier(TEXTS, speed=speed) for speed in SPEEDS]
    assert {answer["exit_member"] for part in answers[1:] for answer in part} == {1, 2}
    for part, there in zip(answers, elsewhere[kind]["answers"], strict=True):
        assert_same_answers(there, part)
    assert_same_answers(elsewhere[kind]["answers_at_constructor_speed"], classifier(TEXTS, speed=0.8))
    assert_same_answers(elsewhere[kind]["answers_at_config_speed"], classifier(TEXTS, speed=0.6))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_again_elsewhere_it_has_all_that_it_needs(folders, elsewhere, kind):
    again = folders[kind] / "saved_again"
    assert {path.name for path in again.glob("*.py")} == CODE
    assert (again / "member_2" / "tokenizer.json").exists() == (kind == "own")
    assert_same_answers(elsewhere[kind]["saved_again"], elsewhere[kind]["answers_at_constructor_speed"])
    # And it loads here as any other.
    classifier = pipeline("fast-text-classification", model=str(again), speed=0.8)
    assert type(classifier.model) is CascadeForSequenceClassification
    assert_same_answers(classifier(TEXTS), elsewhere[kind]["saved_again"])


def test_without_trust_nothing_of_it_runs_elsewhere(elsewhere, marked):
    assert len(elsewhere["refusals"]) == 20
    for refusal in elsewhere["refusals"]:
        assert refusal is not None and "trust_remote_code" in refusal
    assert elsewhere["asked_without_trust"] >= 10
    assert not (marked["own"].parent / "mark").exists()


@pytest.mark.parametrize("kwargs", [{}, {"trust_remote_code": True}], ids=["untrusted", "trusted"])
@pytest.mark.parametrize("kind", KINDS)
def test_where_the_package_is_its_own_classes_load(cascades, marked, tmp_path, monkeypatch, kind, kwargs):
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(prompt))
    config = AutoConfig.from_pretrained(marked[kind], **kwargs)
    model = AutoModelForSequenceClassification.from_pretrained(marked[kind], **kwargs)
    classifier = pipeline("fast-text-classification", model=str(marked[kind]), **kwargs)
    assert type(config) is fastbert_hf.CascadeConfig
    assert {type(member) for member in config.members} == {fastbert_hf.FastBertConfig}
    assert type(AutoModel.from_pretrained(marked[kind], **kwargs)) is CascadeForSequenceClassification
    assert type(model) is CascadeForSequenceClassification
    assert {type(member) for member in model.members} == {fastbert_hf.FastBertForSequenceClassification}
    assert type(classifier) is fastbert_hf.FastTextClassificationPipeline
    expected = pipeline("fast-text-classification", model=cascades[kind], tokenizer=processor_of(kind))
    assert_same_answers(classifier(TEXTS), expected(TEXTS, speed=0.6))
    assert not (marked[kind].parent / "mark").exists()
    for name, saveable in (("config", config), ("model", model), ("pipeline", classifier)):
        saveable.save_pretrained(tmp_path / name)
        saved = (tmp_path / name / "config.json").read_text()
        assert "auto_map" not in saved and "custom_pipelines" not in saved
        assert not list((tmp_path / name).rglob("*.py"))


@pytest.mark.parametrize("kwargs", [{}, {"trust_remote_code": True}], ids=["untrusted", "trusted"])
def test_code_that_a_tokenizer_of_a_member_names_is_not_run(marked, tmp_path, monkeypatch, kwargs):
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(prompt))
    folder, mark = tmp_path / "cascade", tmp_path / "mark"
    shutil.copytree(marked["own"], folder)
    path = folder / "member_2" / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["hostile.Tokenizer", None]}}
    path.write_text(json.dumps({**config, "tokenizer_class": "Tokenizer"}))
    for place in (folder, folder / "member_2"):
        (place / "hostile.py").write_text(
            f"open({str(mark)!r}, 'w').close()\nfrom transformers import BertTokenizer as Tokenizer\n"
        )
    for load in (CascadeProcessor.from_pretrained, partial(pipeline, "fast-text-classification")):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(str(folder), **kwargs)
    assert not mark.exists()


def test_the_tokenizer_of_one_member_does_not_take_the_place_of_all(cascades, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer=CascadeProcessor.from_members\(\[small, large\]\)"):
        save_with_code(cascades["own"], tmp_path / "folder", tokenizer=tiny_tokenizer())
    assert not (tmp_path / "folder").exists()


def test_saving_with_code_twice_leaves_the_second(cascades, folders, tmp_path):
    def contents(folder: Path) -> dict[str, bytes]:
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        left_out = ("README.md", "saved_again/")
        return {name: path.read_bytes() for name, path in files.items() if not name.startswith(left_out)}

    save_with_code(cascades["shared"], tmp_path, tokenizer=processor_of("shared"))
    assert contents(tmp_path) != contents(folders["own"])
    save_with_code(cascades["own"], tmp_path, tokenizer=processor_of("own"))
    assert contents(tmp_path) == contents(folders["own"])
