"""Recipes against their papers: what is taught in which order, what moves in which stage, and when a text leaves."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import BertModel, Trainer

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.training import ExitTrainer
from fastbert_hf.training.recipes import RECIPES, StageSettings, get_recipe, stage_folders, train_recipe

from ..common import (
    NUM_LAYERS,
    assert_same_weights,
    ragged_batch,
    tiny_model,
    tiny_stock_model,
    tiny_texts,
    tiny_tokenizer,
)


LABELS = {0: "no", 1: "yes", 2: "so"}
K = 2


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    tiny_stock_model().save_pretrained(folder)
    return folder


def rows(number: int = 24, seed: int = 0) -> Dataset:
    encoded = tiny_tokenizer()(tiny_texts(number, seed))
    labels = [index % len(LABELS) for index in range(number)]
    return Dataset.from_dict({**encoded, "labels": labels})


def train(recipe, backbone, folder, **settings):
    depth = K if recipe.fixed_depth else None
    arguments = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "seed": 1, **settings.pop("args", {})}
    return train_recipe(
        recipe,
        backbone,
        folder,
        settings.pop("train_dataset", rows()),
        rows(seed=1),
        tiny_tokenizer(),
        settings.pop("whole_model", StageSettings(1e-3, 2)),
        settings.pop("exits_alone", StageSettings(1e-2, 2)),
        LABELS,
        num_hidden_layers=settings.pop("num_hidden_layers", depth),
        **settings,
        **arguments,
    )


@pytest.fixture(scope="module")
def finished(backbone, tmp_path_factory) -> Callable[[str], tuple[FastBertForSequenceClassification, Path]]:
    """Train a recipe when it is first asked for; return its model and its folder, which are to stay as they are."""

    @cache
    def train_once(name: str) -> tuple[FastBertForSequenceClassification, Path]:
        folder = tmp_path_factory.mktemp(name)
        return train(RECIPES[name], backbone, folder), folder

    return train_once


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of the folder of the recipe `fastbert`."""
    return Path(shutil.copytree(finished("fastbert")[1], tmp_path / "fastbert"))


def saved(folder) -> dict[str, torch.Tensor]:
    return FastBertForSequenceClassification.from_pretrained(folder / "model").state_dict()


def moved(before: dict, after: dict) -> set[str]:
    return {
        name.split(".")[0] + "." + name.split(".")[1] for name in before if not torch.equal(before[name], after[name])
    }


def test_the_recipes_are_those_of_the_papers():
    stages = {name: tuple(stage.name for stage in recipe.stages) for name, recipe in RECIPES.items()}
    assert stages == {
        "fastbert": ("fine_tuning", "self_distillation"),
        "fastbert_joint_first": ("weighted_cross_entropy", "self_distillation"),
        "fastbert_without_self_distillation": ("joint_cross_entropy",),
        "deebert": ("fine_tuning", "frozen_cross_entropy"),
        "pabee": ("weighted_cross_entropy",),
        "bert_kl": ("fine_tuning",),
        "distilled_kl": ("fine_tuning", "distillation"),
    }


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_and_answers(finished, name):
    recipe = RECIPES[name]
    model, output_dir = finished(name)
    assert model.config.num_hidden_layers == (K if recipe.fixed_depth else NUM_LAYERS)
    assert model.config.exit_policy == recipe.config.get("exit_policy", "entropy")
    assert model.config.id2label == LABELS
    batch = tiny_tokenizer()(tiny_texts(5), padding=True, return_tensors="pt")
    assert model(**batch, speed=0.5).logits.shape == (5, 3)
    folders = stage_folders(recipe, output_dir, K if recipe.fixed_depth else None)
    assert {path.name for path in output_dir.iterdir()} == {folder.name for folder in folders}
    for folder in folders:
        assert any("eval_loss" in entry for entry in json.loads((folder / "model" / "log.json").read_text()))


@pytest.mark.parametrize("name", ["fastbert", "deebert"])
def test_the_second_stage_moves_the_students_alone(finished, name):
    first, second = map(saved, stage_folders(RECIPES[name], finished(name)[1]))
    assert moved(first, second) == {f"exits.{index}" for index in range(NUM_LAYERS - 1)}


def test_fine_tuning_moves_backbone_and_teacher_and_no_student(backbone, tmp_path, monkeypatch):
    before = {}
    original = Trainer.train

    def remember(self, *args, **kwargs):
        before.update({name: value.clone() for name, value in self.model.state_dict().items()})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", remember)
    recipe = dataclasses.replace(RECIPES["fastbert"], stages=RECIPES["fastbert"].stages[:1])
    train(recipe, backbone, tmp_path)
    after = saved(stage_folders(recipe, tmp_path)[0])
    assert moved(before, after) == {"fastbert.backbone", f"exits.{NUM_LAYERS - 1}"}


def test_pabee_moves_everything_at_once_and_shares_its_pooler(backbone, finished):
    model = finished("pabee")[0]
    assert model.shared_pooler is not None
    pretrained = BertModel.from_pretrained(backbone, add_pooling_layer=False).state_dict()
    own = model.fastbert.backbone.state_dict()
    assert not any(torch.equal(own[name], value) for name, value in pretrained.items() if "weight" in name)
    biases = [exit_classifier.out_proj.bias for exit_classifier in model.exits]
    assert all(bias.any() for bias in biases)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_pabee_leaves_after_patience_agreements_in_a_row(finished, patience):
    model = copy.deepcopy(finished("pabee")[0])
    model.config.patience = patience
    batch = tiny_tokenizer()(tiny_texts(40), padding=True, return_tensors="pt")
    with torch.no_grad():
        says = model(**batch, output_exit_logits=True).exit_logits.argmax(-1).tolist()
        exit_layer = model(**batch, speed=1 / patience).exit_layer.tolist()
    for labels, layer in zip(says, exit_layer, strict=True):
        agreements, expected = 0, NUM_LAYERS
        for depth in range(2, NUM_LAYERS + 1):
            agreements = agreements + 1 if labels[depth - 1] == labels[depth - 2] else 0
            if agreements == patience:
                expected = depth
                break
        assert layer == expected


def test_deebert_leaves_at_the_first_entropy_below_its_threshold_in_nats(finished):
    model = finished("deebert")[0]
    batch = tiny_tokenizer()(tiny_texts(40), padding=True, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**batch, output_exit_logits=True).exit_logits.double().softmax(-1)
        entropies = -(probabilities * probabilities.log()).sum(-1)
        # Between two of them, and far from both.
        middle = entropies[:, :-1].flatten().sort().values[40:80]
        widest = middle.diff().argmax()
        threshold = middle[widest : widest + 2].mean().item()
        # Its entropy is not normalised: the speed is the threshold over ln N.
        exit_layer = model(**batch, speed=threshold / torch.log(torch.tensor(3.0)).item()).exit_layer.tolist()
    for row, layer in zip(entropies.tolist(), exit_layer, strict=True):
        below = [depth for depth, entropy in enumerate(row, start=1) if entropy < threshold]
        assert layer == (below[0] if below else NUM_LAYERS)
    assert len(set(exit_layer)) > 1


def test_bert_kl_starts_from_the_first_k_pretrained_layers(backbone, tmp_path):
    model = train(RECIPES["bert_kl"], backbone, tmp_path, whole_model=StageSettings(0.0, 1))
    pretrained = BertModel.from_pretrained(backbone, add_pooling_layer=False).state_dict()
    own = model.fastbert.backbone.state_dict()
    assert set(own) == {name for name in pretrained if not name.startswith(("encoder.layer.2", "encoder.layer.3"))}
    assert all(torch.equal(own[name], pretrained[name]) for name in own)


def test_static_student_learns_the_answers_of_the_fine_tuned_model_from_its_first_layers(
    backbone, finished, tmp_path, monkeypatch
):
    folder = shutil.copytree(finished("distilled_kl")[1], tmp_path / "again")
    teacher_folder, student_folder = stage_folders(RECIPES["distilled_kl"], folder, K)
    shutil.rmtree(student_folder)
    seen = {}
    original = Trainer.train

    def remember(self, *args, **kwargs):
        seen["rows"], seen["model"] = self.train_dataset, self.model.fastbert.backbone.state_dict()
        seen["model"] = {name: value.clone() for name, value in seen["model"].items()}
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", remember)
    train(RECIPES["distilled_kl"], backbone, folder)
    teacher = FastBertForSequenceClassification.from_pretrained(teacher_folder / "model")
    assert teacher.config.num_hidden_layers == NUM_LAYERS
    for row in list(seen["rows"])[:5]:
        with torch.no_grad():
            answer = teacher(torch.tensor([row["input_ids"]])).logits.softmax(-1)[0]
        assert row["labels"] == pytest.approx(answer.tolist(), abs=1e-5)
    tuned = teacher.fastbert.backbone.state_dict()
    assert all(torch.equal(seen["model"][name], tuned[name]) for name in seen["model"])


def test_the_loss_of_the_static_student_is_the_cross_entropy_with_its_teachers_probabilities():
    model, batch = tiny_model(), ragged_batch((4, 6))
    wanted = torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.05, 0.05]])
    output = model(**batch, labels=wanted)
    log_probabilities = output.logits.double().log_softmax(-1)
    assert output.loss.item() == pytest.approx(-(wanted.double() * log_probabilities).sum(-1).mean().item(), abs=1e-6)


def test_a_joint_first_stage_hands_its_students_on(backbone, tmp_path, monkeypatch):
    handed = {}
    original = ExitTrainer.train

    def remember(self, *args, **kwargs):
        handed[self.args.objective] = {name: value.clone() for name, value in self.model.state_dict().items()}
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ExitTrainer, "train", remember)
    train(RECIPES["fastbert_joint_first"], backbone, tmp_path)
    first = saved(stage_folders(RECIPES["fastbert_joint_first"], tmp_path)[0])
    assert all(torch.equal(first[name], value) for name, value in handed["self_distillation"].items())


@pytest.fixture
def trained(monkeypatch) -> dict[str, Dataset]:
    """The folder and the rows of every stage that is trained."""
    rows_of, original = {}, Trainer.train

    def remember(self, *args, **kwargs):
        rows_of[Path(self.args.output_dir).name] = self.train_dataset
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", remember)
    return rows_of


def test_recipes_share_what_they_have_in_common(backbone, folder, trained):
    shared_teacher = {"teacher_exit_type": "attention"}
    deebert = RECIPES["deebert"]
    deebert = dataclasses.replace(deebert, config={**deebert.config, **shared_teacher})
    train(RECIPES["fastbert"], backbone, folder)
    assert not trained
    model = train(deebert, backbone, folder)
    assert list(trained) == ["linear_under_attention-fine_tuning-frozen_cross_entropy"]
    tuned = FastBertForSequenceClassification.from_pretrained(folder / "attention-fine_tuning" / "model")
    batch = tiny_tokenizer()(tiny_texts(5), padding=True, return_tensors="pt")
    assert torch.equal(model(**batch).logits, tuned(**batch).logits)


def test_an_interrupted_recipe_goes_on_with_the_stage_that_is_not_finished(backbone, finished, tmp_path, monkeypatch):
    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ExitTrainer, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            train(RECIPES["fastbert"], backbone, tmp_path)
    first = stage_folders(RECIPES["fastbert"], tmp_path)[0]
    stamp = (first / "model" / "model.safetensors").stat().st_mtime_ns
    model = train(RECIPES["fastbert"], backbone, tmp_path)
    assert (first / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    assert_same_weights(model, finished("fastbert")[0])


def test_a_folder_of_other_settings_is_refused(backbone, folder):
    with pytest.raises(ValueError, match=r"learning_rate was 0.001 and is 0.5.*give another output_dir"):
        train(RECIPES["fastbert"], backbone, folder, whole_model=StageSettings(0.5, 2))
    with pytest.raises(ValueError, match=r"self_distillation holds.*temperature was 1.0 and is 2.0"):
        train(RECIPES["fastbert"], backbone, folder, exits_alone=StageSettings(1e-2, 2, temperature=2.0))


def test_another_backbone_other_labels_or_other_data_are_other_settings(backbone, folder, tmp_path, trained):
    recipe = RECIPES["fastbert"]
    other = rows(seed=5)
    assert len(other) == len(rows())
    with pytest.raises(ValueError, match="data was"):
        train(recipe, backbone, folder, train_dataset=other)
    elsewhere = tmp_path / "backbone"
    tiny_stock_model(seed=1).save_pretrained(elsewhere)
    with pytest.raises(ValueError, match="backbone was"):
        train(recipe, elsewhere, folder)
    # What leaves no trace in the model may change.
    train(recipe, backbone, folder, args={"logging_steps": 7, "per_device_eval_batch_size": 3})
    assert not trained


def test_exits_of_another_width_are_other_settings(backbone, folder):
    wider = dataclasses.replace(RECIPES["fastbert"], config={"exit_hidden_size": 64})
    with pytest.raises(ValueError, match=r"exit_hidden_size was None and is 64"):
        train(wider, backbone, folder)


def test_students_under_another_teacher_have_a_folder_of_their_own(tmp_path):
    own, other = (
        dataclasses.replace(RECIPES["deebert"], config={"exit_type": "linear", "teacher_exit_type": teacher})
        for teacher in ("linear", "attention")
    )
    assert [folder.name for folder in stage_folders(own, tmp_path)] == [
        "linear-fine_tuning",
        "linear-fine_tuning-frozen_cross_entropy",
    ]
    assert [folder.name for folder in stage_folders(other, tmp_path)] == [
        "attention-fine_tuning",
        "linear_under_attention-fine_tuning-frozen_cross_entropy",
    ]


def test_exits_that_share_a_pooler_have_a_fine_tuned_model_of_their_own(backbone, folder):
    recipe = dataclasses.replace(RECIPES["fastbert"], config={"share_exit_pooler": True})
    assert [path.name.partition("-")[0] for path in stage_folders(recipe, folder)] == ["attention_shared"] * 2
    model = train(dataclasses.replace(recipe, stages=recipe.stages[:1]), backbone, folder)
    assert model.shared_pooler is not None


def test_unlabeled_rows_join_self_distillation(backbone, folder, trained):
    unlabeled = rows(10, seed=3).remove_columns("labels")
    train(RECIPES["fastbert"], backbone, folder, unlabeled_dataset=unlabeled)
    distilled = "attention-fine_tuning-self_distillation_unlabeled"
    assert (folder / distilled / "model").exists()
    assert {name: len(data) for name, data in trained.items()} == {distilled: 34}
    assert "labels" not in trained[distilled].column_names


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ValueError, match=f"recipe 'magic' is not known; choose one of {', '.join(RECIPES)}"):
        get_recipe("magic")


@pytest.mark.parametrize(("name", "depth"), [("fastbert", 2), ("bert_kl", None)])
def test_depth_belongs_to_recipes_of_a_fixed_depth(backbone, tmp_path, name, depth):
    with pytest.raises(ValueError, match="num_hidden_layers"):
        train(RECIPES[name], backbone, tmp_path, num_hidden_layers=depth)


@pytest.mark.parametrize("depth", [0, NUM_LAYERS + 1])
def test_a_depth_that_the_backbone_does_not_have_is_refused(backbone, tmp_path, depth):
    with pytest.raises(ValueError, match=f"num_hidden_layers must be from 1 to {NUM_LAYERS}.*got {depth}"):
        train(RECIPES["bert_kl"], backbone, tmp_path, num_hidden_layers=depth)
