"""Recipes against their papers: what is taught in which order, what moves in which stage, and when a text leaves."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from datasets import Dataset
from transformers import BertModel, Trainer

from fastbert_hf import FastBertForSequenceClassification, SelfDistillationTrainer
from fastbert_hf.training import recipes
from fastbert_hf.training.recipes import RECIPES, StageSettings, get_recipe, stage_folders, train_recipe

from ..common import NUM_LAYERS, tiny_stock_model, tiny_texts, tiny_tokenizer


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


def saved(folder) -> dict[str, torch.Tensor]:
    return FastBertForSequenceClassification.from_pretrained(folder / "model").state_dict()


def moved(before: dict, after: dict) -> set[str]:
    return {
        name.split(".")[0] + "." + name.split(".")[1] for name in before if not torch.equal(before[name], after[name])
    }


def test_the_recipes_are_those_of_the_papers():
    stages = {name: recipe.stages for name, recipe in RECIPES.items()}
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
def test_every_recipe_trains_and_answers(backbone, tmp_path, name):
    recipe = RECIPES[name]
    model = train(recipe, backbone, tmp_path)
    assert model.config.num_hidden_layers == (K if recipe.fixed_depth else NUM_LAYERS)
    assert model.config.exit_policy == recipe.config.get("exit_policy", "entropy")
    assert model.config.id2label == LABELS
    batch = tiny_tokenizer()(tiny_texts(5), padding=True, return_tensors="pt")
    assert model(**batch, speed=0.5).logits.shape == (5, 3)
    folders = stage_folders(recipe, tmp_path, K if recipe.fixed_depth else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(folder.name for folder in folders)
    for folder in folders:
        assert any("eval_loss" in entry for entry in json.loads((folder / "model" / "log.json").read_text()))


@pytest.mark.parametrize("name", ["fastbert", "deebert"])
def test_the_second_stage_moves_the_students_alone(backbone, tmp_path, name):
    train(RECIPES[name], backbone, tmp_path)
    first, second = map(saved, stage_folders(RECIPES[name], tmp_path))
    assert moved(first, second) == {f"exits.{index}" for index in range(NUM_LAYERS - 1)}


def test_fine_tuning_moves_backbone_and_teacher_and_no_student(backbone, tmp_path, monkeypatch):
    before = {}
    original = Trainer.train

    def remember(self, *args, **kwargs):
        before.update({name: value.clone() for name, value in self.model.state_dict().items()})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", remember)
    recipe = dataclasses.replace(RECIPES["fastbert"], stages=("fine_tuning",))
    train(recipe, backbone, tmp_path)
    after = saved(stage_folders(recipe, tmp_path)[0])
    assert moved(before, after) == {"fastbert.backbone", f"exits.{NUM_LAYERS - 1}"}


def test_pabee_moves_everything_at_once_and_shares_its_pooler(backbone, tmp_path):
    model = train(RECIPES["pabee"], backbone, tmp_path)
    assert model.shared_pooler is not None
    pretrained = BertModel.from_pretrained(backbone, add_pooling_layer=False).state_dict()
    own = model.fastbert.backbone.state_dict()
    assert not any(torch.equal(own[name], value) for name, value in pretrained.items() if "weight" in name)
    biases = [exit_classifier.out_proj.bias for exit_classifier in model.exits]
    assert all(bias.any() for bias in biases)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_pabee_leaves_after_patience_agreements_in_a_row(backbone, tmp_path, patience):
    model = train(RECIPES["pabee"], backbone, tmp_path)
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


def test_deebert_leaves_at_the_first_entropy_below_its_threshold_in_nats(backbone, tmp_path):
    model = train(RECIPES["deebert"], backbone, tmp_path)
    batch = tiny_tokenizer()(tiny_texts(40), padding=True, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**batch, output_exit_logits=True).exit_logits.double().softmax(-1)
        entropies = -(probabilities * probabilities.log()).sum(-1)
        threshold = entropies[:, :-1].median().item()
        # Its entropy is not normalised: the speed is the threshold over ln N.
        exit_layer = model(**batch, speed=threshold / torch.log(torch.tensor(3.0)).item()).exit_layer.tolist()
    for row, layer in zip(entropies.tolist(), exit_layer, strict=True):
        below = [depth for depth, entropy in enumerate(row, start=1) if entropy < threshold - 1e-6]
        assert layer == (below[0] if below else NUM_LAYERS)
    assert len(set(exit_layer)) > 1


def test_bert_kl_starts_from_the_first_k_pretrained_layers(backbone, tmp_path):
    model = train(RECIPES["bert_kl"], backbone, tmp_path, whole_model=StageSettings(0.0, 1))
    pretrained = BertModel.from_pretrained(backbone, add_pooling_layer=False).state_dict()
    own = model.fastbert.backbone.state_dict()
    assert set(own) == {name for name in pretrained if not name.startswith(("encoder.layer.2", "encoder.layer.3"))}
    assert all(torch.equal(own[name], pretrained[name]) for name in own)


def test_static_student_learns_the_answers_of_the_fine_tuned_model_from_its_first_layers(
    backbone, tmp_path, monkeypatch
):
    seen = {}
    original = Trainer.train

    def remember(self, *args, **kwargs):
        seen["rows"], seen["model"] = self.train_dataset, self.model.fastbert.backbone.state_dict()
        seen["model"] = {name: value.clone() for name, value in seen["model"].items()}
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", remember)
    train(RECIPES["distilled_kl"], backbone, tmp_path)
    teacher_folder = stage_folders(RECIPES["distilled_kl"], tmp_path, K)[0]
    teacher = FastBertForSequenceClassification.from_pretrained(teacher_folder / "model")
    for row in list(seen["rows"])[:5]:
        with torch.no_grad():
            answer = teacher(torch.tensor([row["input_ids"]])).logits.softmax(-1)[0]
        assert row["labels"] == pytest.approx(answer.tolist(), abs=1e-5)
    tuned = teacher.fastbert.backbone.state_dict()
    assert all(torch.equal(seen["model"][name], tuned[name]) for name in seen["model"])


def test_the_loss_of_the_static_student_is_the_cross_entropy_with_its_teachers_probabilities():
    from ..common import ragged_batch, tiny_model

    model, batch = tiny_model(), ragged_batch((4, 6))
    wanted = torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.05, 0.05]])
    output = model(**batch, labels=wanted)
    log_probabilities = output.logits.double().log_softmax(-1)
    assert output.loss.item() == pytest.approx(-(wanted.double() * log_probabilities).sum(-1).mean().item(), abs=1e-6)


def test_a_joint_first_stage_hands_its_students_on(backbone, tmp_path, monkeypatch):
    handed = {}
    original = SelfDistillationTrainer.train

    def remember(self, *args, **kwargs):
        handed[self.args.objective] = {name: value.clone() for name, value in self.model.state_dict().items()}
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SelfDistillationTrainer, "train", remember)
    train(RECIPES["fastbert_joint_first"], backbone, tmp_path)
    first = saved(stage_folders(RECIPES["fastbert_joint_first"], tmp_path)[0])
    assert all(torch.equal(first[name], value) for name, value in handed["self_distillation"].items())


def test_recipes_share_what_they_have_in_common(backbone, tmp_path, monkeypatch):
    trained = []
    original = recipes._train_stage
    monkeypatch.setattr(recipes, "_train_stage", lambda *args: (trained.append(args[0]), original(*args)))
    shared_teacher = {"teacher_exit_type": "attention"}
    deebert = RECIPES["deebert"]
    deebert = dataclasses.replace(deebert, config={**deebert.config, **shared_teacher})
    train(RECIPES["fastbert"], backbone, tmp_path)
    model = train(deebert, backbone, tmp_path)
    assert trained == ["fine_tuning", "self_distillation", "frozen_cross_entropy"]
    tuned = FastBertForSequenceClassification.from_pretrained(tmp_path / "attention-fine_tuning" / "model")
    batch = tiny_tokenizer()(tiny_texts(5), padding=True, return_tensors="pt")
    assert torch.equal(model(**batch).logits, tuned(**batch).logits)
    train(RECIPES["fastbert"], backbone, tmp_path)
    assert len(trained) == 3


def test_an_interrupted_recipe_goes_on_with_the_stage_that_is_not_finished(backbone, tmp_path, monkeypatch):
    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SelfDistillationTrainer, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            train(RECIPES["fastbert"], backbone, tmp_path)
    first = stage_folders(RECIPES["fastbert"], tmp_path)[0]
    stamp = (first / "model" / "model.safetensors").stat().st_mtime_ns
    model = train(RECIPES["fastbert"], backbone, tmp_path)
    assert (first / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    uninterrupted = train(RECIPES["fastbert"], backbone, tmp_path / "other")
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in uninterrupted.state_dict().items())


def test_a_folder_of_other_settings_is_refused(backbone, tmp_path):
    train(RECIPES["fastbert"], backbone, tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate was 0.001 and is 0.5.*give another output_dir"):
        train(RECIPES["fastbert"], backbone, tmp_path, whole_model=StageSettings(0.5, 2))


def test_another_backbone_other_labels_or_other_data_are_other_settings(backbone, tmp_path):
    recipe = RECIPES["fastbert"]
    train(recipe, backbone, tmp_path)
    other = rows(seed=5)
    assert len(other) == len(rows())
    with pytest.raises(ValueError, match="data was"):
        train(recipe, backbone, tmp_path, train_dataset=other)
    elsewhere = tmp_path / "backbone"
    tiny_stock_model(seed=1).save_pretrained(elsewhere)
    with pytest.raises(ValueError, match="backbone was"):
        train(recipe, elsewhere, tmp_path)
    # What leaves no trace in the model may change.
    train(recipe, backbone, tmp_path, args={"logging_steps": 7, "per_device_eval_batch_size": 3})


def test_exits_of_another_width_are_other_settings(backbone, tmp_path):
    train(RECIPES["fastbert"], backbone, tmp_path)
    wider = dataclasses.replace(RECIPES["fastbert"], config={"exit_hidden_size": 64})
    with pytest.raises(ValueError, match=r"exit_hidden_size was None and is 64"):
        train(wider, backbone, tmp_path)


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


def test_exits_that_share_a_pooler_have_a_fine_tuned_model_of_their_own(backbone, tmp_path):
    shared = {"share_exit_pooler": True}
    recipe = dataclasses.replace(RECIPES["fastbert"], config=shared)
    assert [folder.name.partition("-")[0] for folder in stage_folders(recipe, tmp_path)] == ["attention_shared"] * 2
    train(RECIPES["fastbert"], backbone, tmp_path)
    model = train(recipe, backbone, tmp_path)
    assert model.shared_pooler is not None


def test_unlabeled_rows_join_self_distillation(backbone, tmp_path, monkeypatch):
    seen = {}
    original = recipes._train_stage

    def remember(stage, model, folder, settings, data, *rest):
        seen[stage] = data
        return original(stage, model, folder, settings, data, *rest)

    monkeypatch.setattr(recipes, "_train_stage", remember)
    unlabeled = rows(10, seed=3).remove_columns("labels")
    train(RECIPES["fastbert"], backbone, tmp_path, unlabeled_dataset=unlabeled)
    assert (tmp_path / "attention-fine_tuning-self_distillation_unlabeled" / "model").exists()
    assert len(seen["fine_tuning"]) == 24
    assert len(seen["self_distillation"]) == 34
    assert "labels" not in seen["self_distillation"].column_names


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
