"""
Round trips by repository id: the real client uploads to the Hub of `hub_server.py` and downloads from it.

Three processes, one after the other: `push` fills the Hub; `load_online` reads it, as nobody, into an empty cache;
`load_offline` reads that cache again when the Hub is gone. The tests look at what they returned, and into the Hub.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Pipeline,
    PreTrainedModel,
    pipeline,
)

import fastbert_hf
from fastbert_hf import CascadeForSequenceClassification, CascadeProcessor, FastBertForSequenceClassification

from .common import other_tokenizer, tiny_model, tiny_rows, tiny_texts, tiny_tokenizer, training_settings
from .hub_server import HubServer, run_with_hub
from .sharing.without_package import answers_by_id


MAIN = "org/fastbert-chnsenticorp"
# Named after what filled them. Without hub_model_id a trainer names its repository after its folder.
SAVED, SHARDED, PIPELINE = "org/by-save-pretrained", "org/in-shards", "org/by-pipeline"
DISTILLED, STOCK_TRAINER = "org/by-self-distillation", "tester/by-stock-trainer"
WITH_CODE, SCRIPT = "org/with-code", "org/by-script"
# The members of the second have tokenizers of their own, and their code lies beside them.
CASCADE, MIXED = "org/cascade", "org/mixed-cascade"
REPO_IDS = (MAIN, SAVED, SHARDED, PIPELINE, DISTILLED, STOCK_TRAINER, WITH_CODE, SCRIPT, CASCADE, MIXED)
SHARED_WITH_CODE = (WITH_CODE, MIXED)
# One of each kind of files; how they were pushed makes no difference to a cache.
READ_OFFLINE = (MAIN, SHARDED, WITH_CODE, MIXED)
# A second branch of MAIN, with weights of its own, and one of MIXED, with other tokenizers.
BRANCH = "other"

DEFAULT_SPEED = 0.75
# None leaves it to the config.
SPEEDS = (None, 0, DEFAULT_SPEED, 0.9)
LABELS = {0: "negative", 1: "neutral", 2: "positive"}

BASE_FILES = {".gitattributes", "README.md", "config.json", "tokenizer.json", "tokenizer_config.json"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
MODELING = Path(fastbert_hf.__file__).parent / "modeling"


def with_siblings(*names: str) -> set[str]:
    """Files of `modeling/`, and those that they import."""
    waiting, found = {f"{name}.py" for name in names}, set()
    while waiting:
        found |= waiting
        sources = [(MODELING / name).read_text() for name in waiting]
        imported = {name for source in sources for name in re.findall(r"^ *from \.(\w+) import", source, re.MULTILINE)}
        waiting = {f"{name}.py" for name in imported} - found
    return found


CODE_OF_ONE_MODEL = with_siblings("configuration_fastbert", "modeling_fastbert", "pipeline_fastbert")
CODE_OF_A_CASCADE = with_siblings("configuration_cascade", "modeling_cascade", "pipeline_fastbert")
FILES = {
    **{repo_id: BASE_FILES | {"model.safetensors"} for repo_id in (MAIN, SAVED, PIPELINE, SCRIPT, CASCADE)},
    SHARDED: BASE_FILES | SHARDS | {"model.safetensors.index.json"},
    # Every Trainer adds its arguments as a pickle, which nobody with the package downloads.
    **{repo_id: BASE_FILES | {"model.safetensors", "training_args.bin"} for repo_id in (DISTILLED, STOCK_TRAINER)},
    WITH_CODE: BASE_FILES | {"model.safetensors"} | CODE_OF_ONE_MODEL,
    MIXED: BASE_FILES
    | {"model.safetensors", "member_2/tokenizer.json", "member_2/tokenizer_config.json"}
    | CODE_OF_A_CASCADE,
}
FILES[DISTILLED] |= {"speed_accuracy.png"}


def weight_hashes(model: PreTrainedModel) -> dict[str, str]:
    state = model.state_dict()
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}


def what_it_says(classifier: Pipeline) -> dict[str, Any]:
    """The weights, and the answers at several speeds."""
    answers = {str(speed): classifier(tiny_texts(6), speed=speed) for speed in SPEEDS}
    return {"weights": weight_hashes(classifier.model), "answers": answers}


def classifier_of(model: PreTrainedModel, tokenizer: CascadeProcessor | None = None) -> Pipeline:
    return pipeline("fast-text-classification", model=model, tokenizer=tokenizer or tiny_tokenizer())


def cascade_of(seed: int, processor: CascadeProcessor, **config) -> CascadeForSequenceClassification:
    """A member that answers at its last layer alone, as stock classifiers do, and one that texts leave early."""
    small = tiny_model("distilbert", seed, exit_type="linear", share_exit_pooler=True, min_exit_layer=4, **config)
    members = [small, tiny_model(seed=seed + 100, **config)]
    tokenizers = processor.tokenizers if processor.own_tokenizers else processor.tokenizers * 2
    return CascadeForSequenceClassification.from_members(members, tokenizers, speed=DEFAULT_SPEED)


def ids_of_members(processor: CascadeProcessor) -> list[list[list[int]]]:
    """What each member reads of each text."""
    return [[list(encoded["input_ids"]) for encoded in row] for row in processor(tiny_texts(6))]


def error_of(function: Callable, *args, **kwargs) -> list[str]:
    """What a call raises, what that was raised from, and what it says."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, type(error.__cause__).__name__, str(error)]
    return ["nothing"]


def push(folder: str) -> dict:
    """Fills the Hub in every way there is. Returns what each repository should say."""
    # The other processes do without these imports, which take a second.
    from huggingface_hub import ModelCard
    from transformers import Trainer, TrainingArguments

    from fastbert_hf import SelfDistillationArguments, SelfDistillationTrainer
    from fastbert_hf.commands.self_distill import push_folder

    names = {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}}
    models = {
        name: tiny_model(seed=seed, speed=DEFAULT_SPEED, exit_hidden_size=32, **names)
        for seed, name in enumerate((*REPO_IDS, BRANCH))
    }
    tokenizer, rows = tiny_tokenizer(), tiny_rows(16)
    processors = {CASCADE: CascadeProcessor([tokenizer]), MIXED: CascadeProcessor([tokenizer, other_tokenizer()])}
    models.update({name: cascade_of(seed, processors[name], **names) for seed, name in enumerate((CASCADE, MIXED), 1)})
    pushed = {}

    def note(name: str) -> PreTrainedModel:
        model = models[name].eval()
        pushed[name] = what_it_says(classifier_of(model, processors.get(name)))
        return model

    commit = note(MAIN).push_to_hub(MAIN)
    tokenizer.push_to_hub(MAIN)
    note(BRANCH).push_to_hub(MAIN, revision=BRANCH)
    note(SAVED).save_pretrained(f"{folder}/saved", push_to_hub=True, repo_id=SAVED)
    tokenizer.save_pretrained(f"{folder}/saved", push_to_hub=True, repo_id=SAVED)
    note(SHARDED).push_to_hub(SHARDED, max_shard_size="150KB")
    tokenizer.push_to_hub(SHARDED)
    classifier_of(note(PIPELINE)).push_to_hub(PIPELINE)

    settings = training_settings(f"{folder}/distilled", max_steps=2, hub_model_id=DISTILLED)
    trainer = SelfDistillationTrainer(
        models[DISTILLED],
        SelfDistillationArguments(**settings),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    note(DISTILLED)
    trainer.push_to_hub()

    # With push_to_hub=True it is save_model that pushes.
    settings = training_settings(f"{folder}/by-stock-trainer", max_steps=2, push_to_hub=True)
    trainer = Trainer(
        models[STOCK_TRAINER], TrainingArguments(**settings), train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    note(STOCK_TRAINER)
    trainer.save_model()

    note(WITH_CODE).push_to_hub(WITH_CODE, with_code=True, tokenizer=tokenizer)
    # A card that its owner wrote.
    ModelCard("---\nlicense: mit\nlibrary_name: fastbert_hf\n---\nMine.\n").push_to_hub(WITH_CODE)
    models[WITH_CODE].push_to_hub(WITH_CODE, with_code=True, tags=["new"])

    # The folder of a finished run of the command, with a stage below it.
    run = Path(folder, "run")
    classifier_of(note(SCRIPT)).save_pretrained(run)
    fastbert_hf.write_model_card(run, models[SCRIPT])
    (run / "stage1").mkdir()
    (run / "stage1" / "checkpoint.bin").touch()
    push_folder(run, TrainingArguments(str(run), hub_model_id=SCRIPT, use_cpu=True))

    note(CASCADE).push_to_hub(CASCADE, tokenizer=processors[CASCADE])
    classifier_of(note(MIXED), processors[MIXED]).push_to_hub(MIXED, with_code=True)
    in_turn = CascadeProcessor(processors[MIXED].tokenizers[::-1])
    models[MIXED].push_to_hub(MIXED, revision=BRANCH, tokenizer=in_turn)

    return {
        "pushed": pushed,
        "ids_of_mixed": ids_of_members(processors[MIXED]),
        "metrics": metrics,
        "config": models[MAIN].config.to_dict(),
        "text_config": models[MAIN].config.text_config.to_dict(),
        "commit": commit.oid,
        "errors": {
            "new": error_of(models[MAIN].push_to_hub, "org/new", token="hf_wrong"),
            "existing": error_of(models[BRANCH].push_to_hub, MAIN, token="hf_wrong"),
        },
    }


def load(repo_ids: tuple[str, ...]) -> dict:
    """What repositories say, loaded by their ids."""
    loaded = {repo_id: what_it_says(pipeline("fast-text-classification", model=repo_id)) for repo_id in repo_ids}
    # The branch began as a copy of main, so it has a tokenizer, too.
    loaded[BRANCH] = what_it_says(pipeline("fast-text-classification", model=MAIN, revision=BRANCH))
    config, tokenizer = AutoConfig.from_pretrained(MAIN), AutoTokenizer.from_pretrained(MAIN)
    backbone, model = AutoModel.from_pretrained(MAIN), AutoModelForSequenceClassification.from_pretrained(MAIN)
    of_cascade = [
        load.from_pretrained(CASCADE) for load in (AutoConfig, AutoModel, AutoModelForSequenceClassification)
    ]
    mixed, of_branch = (CascadeProcessor.from_pretrained(MIXED, revision=revision) for revision in ("main", BRANCH))
    return {
        "loaded": loaded,
        "types": [type(thing).__name__ for thing in (config, tokenizer, backbone, model)],
        "types_of_cascade": [type(thing).__name__ for thing in of_cascade],
        "cascade": [weight_hashes(model) for model in of_cascade[1:]],
        "ids_of_mixed": ids_of_members(mixed),
        "ids_of_branch": ids_of_members(of_branch),
        "config": config.to_dict(),
        "text_config": config.text_config.to_dict(),
        "input_ids": tokenizer(tiny_texts())["input_ids"],
        "backbone": weight_hashes(backbone),
        "auto_model": weight_hashes(model),
        "model": weight_hashes(FastBertForSequenceClassification.from_pretrained(MAIN)),
        "model_of_branch": weight_hashes(FastBertForSequenceClassification.from_pretrained(MAIN, revision=BRANCH)),
        "stock_answers": pipeline("text-classification", model=MAIN)(tiny_texts(6)),
    }


def load_online(commit: str) -> dict:
    at_commit = AutoModelForSequenceClassification.from_pretrained(MAIN, revision=commit)
    errors = {
        "model": error_of(AutoModelForSequenceClassification.from_pretrained, "org/nowhere"),
        "pipeline": error_of(pipeline, "fast-text-classification", model="org/nowhere"),
        "revision": error_of(FastBertForSequenceClassification.from_pretrained, MAIN, revision="nowhere"),
    }
    return {**load(REPO_IDS), "at_commit": weight_hashes(at_commit), "errors": errors}


def load_offline(empty: str) -> dict:
    errors = {
        "config": error_of(AutoConfig.from_pretrained, MAIN, cache_dir=empty),
        "model": error_of(FastBertForSequenceClassification.from_pretrained, MAIN, cache_dir=empty),
        "tokenizer": error_of(AutoTokenizer.from_pretrained, MAIN, cache_dir=empty),
        "pipeline": error_of(pipeline, "fast-text-classification", model="org/never-seen"),
    }
    return {**load(READ_OFFLINE), "errors": errors}


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def before(hub, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("push")
    return run_with_hub(hub, folder / "home", push, folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("load") / "home"


@pytest.fixture(scope="module")
def online(hub, before, home) -> dict:
    first = len(hub.requests)
    seen = run_with_hub(hub, home, load_online, before["commit"], token=None)
    return {**seen, "requests": hub.requests[first:]}


@pytest.fixture(scope="module")
def elsewhere(hub, before, tmp_path_factory) -> dict:
    """Without the package."""
    home, text = tmp_path_factory.mktemp("elsewhere") / "home", tiny_texts(6)[0]
    return run_with_hub(hub, home, answers_by_id, text, *SHARED_WITH_CODE, token=None)


@pytest.fixture(scope="module")
def offline(hub, online, elsewhere, home) -> dict:
    hub.stop()
    return run_with_hub(hub, home, load_offline, home.parent / "empty", offline=True)


@pytest.fixture(params=["online", "offline"])
def after(request) -> dict:
    return request.getfixturevalue(request.param)


def assert_same_answers(actual: list[dict], expected: list[dict]) -> None:
    """Scores up to the last bits, which depend on where in memory the weights lie."""
    assert [answer["score"] for answer in actual] == pytest.approx([answer["score"] for answer in expected], abs=1e-6)
    actual, expected = ([{**answer, "score": None} for answer in answers] for answers in (actual, expected))
    assert actual == expected


@pytest.mark.parametrize("repo_id", REPO_IDS)
def test_repository_holds_the_files_of_a_checkpoint_and_code_where_it_was_asked_for(hub, before, repo_id):
    assert set(hub.files(repo_id)) == FILES[repo_id]
    of_code = {"auto_map", "custom_pipelines"} & json.loads(hub.files(repo_id)["config.json"].content).keys()
    assert of_code == ({"auto_map", "custom_pipelines"} if repo_id in SHARED_WITH_CODE else set())
    assert hub.card(repo_id)["library_name"]


@pytest.mark.parametrize("repo_id", SHARED_WITH_CODE)
def test_without_the_package_the_code_beside_the_weights_answers(before, elsewhere, repo_id):
    said = elsewhere[repo_id]
    assert [module.partition(".")[0] for module in said["modules"]] == ["transformers_modules"] * 2
    for speed, answers in said["answers"].items():
        assert_same_answers(answers, before["pushed"][repo_id]["answers"][speed][:1])
    assert "trust_remote_code=True" in said["refused"]


@pytest.mark.parametrize("repo_id", [MAIN, SHARDED, PIPELINE, CASCADE, MIXED])
def test_a_push_writes_a_card_without_numbers_where_nothing_was_measured(hub, before, repo_id):
    text = hub.files(repo_id)["README.md"].content.decode()
    assert f'pipeline("fast-text-classification", model="{repo_id}")' in text
    assert "Nothing was measured for this card." in text
    assert hub.card(repo_id)["library_name"] == "fastbert_hf"
    assert "model-index" not in hub.card(repo_id)


def test_a_trainer_pushes_a_card_of_what_it_measured(hub, before):
    card, text = hub.card(DISTILLED), hub.files(DISTILLED)["README.md"].content.decode()
    (result,) = card["model-index"][0]["results"]
    assert card["library_name"] == "fastbert_hf"
    assert [metric["name"] for metric in result["metrics"]] == ["accuracy at speed 0"]
    layers = before["metrics"]["eval_mean_exit_layer_speed_0.5"]
    assert f"| {layers:.4g} | {4 / layers:.2f}x |" in text
    assert f'model="{DISTILLED}"' in text
    assert hub.files(DISTILLED)["speed_accuracy.png"].content.startswith(b"\x89PNG")


def test_a_card_that_its_owner_wrote_survives_a_push(hub, before):
    text = hub.files(WITH_CODE)["README.md"].content.decode()
    assert text.endswith("Mine.\n") and "Nothing was measured" not in text
    assert hub.card(WITH_CODE)["license"] == "mit" and hub.card(WITH_CODE)["tags"] == ["new"]


@pytest.mark.parametrize("repo_id", REPO_IDS)
def test_weights_and_nothing_readable_went_through_lfs(hub, before, repo_id):
    by_lfs = {path: file for path, file in hub.files(repo_id).items() if file.lfs}
    assert set(by_lfs) == {path for path in FILES[repo_id] if path.endswith((".safetensors", ".bin", ".png"))}
    uploads = [path for method, path, status in hub.requests if method == "PUT" and status == 200]
    for file in by_lfs.values():
        assert any(path.startswith(f"/lfs/{file.oid}?") for path in uploads)


def test_those_with_the_package_download_neither_pickles_nor_code(online):
    downloads = [path for method, path, _ in online["requests"] if method in ("GET", "HEAD") and "/resolve/" in path]
    assert any(path.endswith("/model.safetensors") for path in downloads)
    assert not [path for path in downloads if path.endswith((".bin", ".pkl", ".pt", ".py"))]


def test_each_push_is_one_commit(hub, before):
    pushes = {MAIN: 3, SAVED: 2, SHARDED: 2, PIPELINE: 1, DISTILLED: 1, STOCK_TRAINER: 1, WITH_CODE: 3, SCRIPT: 1}
    pushes.update({CASCADE: 1, MIXED: 2})
    # The first commit is the Hub's own.
    assert {repo_id: len(hub.repository(repo_id).commits) - 1 for repo_id in REPO_IDS} == pushes


def test_weights_come_back_bit_identical(before, after):
    for name, said in after["loaded"].items():
        assert said["weights"] == before["pushed"][name]["weights"], name


def test_answers_come_back_at_every_speed(before, after):
    for name, said in after["loaded"].items():
        for speed, answers in before["pushed"][name]["answers"].items():
            assert_same_answers(said["answers"][speed], answers)


def test_every_repository_was_read(online, offline):
    assert online["loaded"].keys() == {*REPO_IDS, BRANCH}
    assert offline["loaded"].keys() == {*READ_OFFLINE, BRANCH}


def test_repositories_and_speeds_can_be_told_apart(before):
    weights = [json.dumps(said["weights"]) for said in before["pushed"].values()]
    assert len(set(weights)) == len(REPO_IDS) + 1
    answers = before["pushed"][MAIN]["answers"]
    assert {answer["exit_layer"] for answer in answers["0"]} == {4}
    assert len({answer["exit_layer"] for answer in answers["0.75"]}) > 1
    assert len({answer["label"] for answer in answers["0.75"]}) > 1


def test_every_class_loads_by_id(before, after):
    assert after["types"] == ["FastBertConfig", "BertTokenizer", "FastBertModel", "FastBertForSequenceClassification"]
    weights = before["pushed"][MAIN]["weights"]
    assert after["auto_model"] == after["model"] == weights
    assert after["model_of_branch"] == before["pushed"][BRANCH]["weights"]
    backbone = {f"fastbert.{name}": value for name, value in after["backbone"].items()}
    assert backbone == {name: value for name, value in weights.items() if name.startswith("fastbert.")}


def test_every_class_loads_a_cascade_by_id(before, after):
    assert after["types_of_cascade"] == ["CascadeConfig", *["CascadeForSequenceClassification"] * 2]
    assert after["cascade"] == [before["pushed"][CASCADE]["weights"]] * 2


def test_tokenizers_of_the_members_come_back_from_each_branch(before, after):
    assert after["ids_of_mixed"] == before["ids_of_mixed"]
    assert all(first != second for first, second in before["ids_of_mixed"])
    assert after["ids_of_branch"] == [row[::-1] for row in before["ids_of_mixed"]]


def test_both_members_answer(before):
    for repo_id in (CASCADE, MIXED):
        answers = before["pushed"][repo_id]["answers"]
        assert {answer["exit_member"] for answer in answers[str(DEFAULT_SPEED)]} == {1, 2}
        assert {answer["exit_member"] for answer in answers["0"]} == {2}


def test_config_comes_back(before, after):
    changed = {name for name, value in before["config"].items() if after["config"].get(name) != value}
    assert changed <= {"_name_or_path", "architectures", "dtype", "transformers_version", "text_config"}
    changed = {name for name, value in before["text_config"].items() if after["text_config"].get(name) != value}
    assert changed <= {"_name_or_path", "dtype"}


def test_tokenizer_comes_back(after):
    assert after["input_ids"] == tiny_tokenizer()(tiny_texts())["input_ids"]


def test_pipeline_takes_its_speed_from_the_downloaded_config(after):
    answers = after["loaded"][MAIN]["answers"]
    assert answers["None"] == answers[str(DEFAULT_SPEED)] != answers["0"]


def test_stock_pipeline_answers_as_at_speed_0(before, after):
    expected = [
        {name: value for name, value in answer.items() if name != "exit_layer"}
        for answer in before["pushed"][MAIN]["answers"]["0"]
    ]
    assert_same_answers(after["stock_answers"], expected)


def test_commit_hash_is_a_revision(before, online):
    assert online["at_commit"] == before["pushed"][MAIN]["weights"]


def test_missing_repository_or_revision_is_the_usual_error(online):
    for name in ("model", "pipeline"):
        error, cause, message = online["errors"][name]
        assert (error, cause) == ("OSError", "RepositoryNotFoundError")
        assert "org/nowhere is not a local folder and is not a valid model identifier" in message
    error, cause, message = online["errors"]["revision"]
    assert (error, cause) == ("OSError", "RevisionNotFoundError")
    assert "nowhere is not a valid git identifier" in message


@pytest.mark.parametrize("name", ["config", "model", "tokenizer", "pipeline"])
def test_empty_cache_offline_is_an_error(offline, name):
    error, _, message = offline["errors"][name]
    assert error == "OSError"
    assert "couldn't find them in the cached files" in message


@pytest.mark.parametrize("name", ["new", "existing"])
def test_wrong_token_pushes_nothing(hub, before, name):
    error, _, message = before["errors"][name]
    assert error == "HfHubHTTPError"
    assert "401" in message
    assert "org/new" not in hub.repositories
