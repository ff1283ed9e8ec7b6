"""The stage that makes texts shorter: its schedule, what distillation repairs, one call for everything, resuming."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, default_data_collator

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.modeling.teacher_digest import teacher_digest
from fastbert_hf.training import (
    ExitTraining,
    TokenCoarsening,
    retention_schedule,
    run_stage,
    token_coarsening_stage,
    train,
)
from fastbert_hf.training.backbone_distillation_trainer import shares_of_units

from ..common import (
    assert_close,
    changed_parameters,
    copied_state,
    expanded,
    spread_out,
    tiny_model,
    tiny_rows,
    tiny_text_config,
    tiny_tokenizer,
    training_settings,
)
from .common import Interrupted, Stop


TEXTS = ["a b c d e f", "f g h i j", "c a d", "j i h g f e d c"] * 40


def classifier_of(tmp_path):
    """Return the folder of a stock classifier with its tokenizer."""
    folder = tmp_path / "classifier"
    spread_out(AutoModelForSequenceClassification.from_config(tiny_text_config("bert"))).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_schedule_leaves_what_was_asked_for():
    for num_layers in (1, 2, 4, 6, 12):
        for target in (0.05, 0.2, 0.5, 0.9, 1.0):
            schedule = retention_schedule(num_layers, target)
            shares = expanded(schedule, num_layers)
            assert sum(shares) / num_layers == pytest.approx(target, abs=1e-3)
            assert schedule["retention"] == sorted(schedule["retention"], reverse=True)
    assert [retention_schedule(n, 0.5)["layers"] for n in (1, 2, 4, 6, 12)] == [
        [1],
        [1],
        [2],
        [2, 4],
        [2, 4, 6, 8, 10],
    ]
    assert retention_schedule(4, 0.1)["layers"] == [1, 2, 3, 4]  # every second one would be too late
    assert retention_schedule(4, 0.75, layers=[3])["retention"] == [0.5]
    for wrong in (0, 1.1, float("nan"), "half", True):
        with pytest.raises(ValueError, match=r"target must be in \(0, 1\]"):
            retention_schedule(4, wrong)
    with pytest.raises(ValueError, match="cannot be reached, as texts run through 2 of 4 layers"):
        retention_schedule(4, 0.5, layers=[3])
    with pytest.raises(ValueError, match="numbers from 1 to 4 in rising order"):
        retention_schedule(4, 0.5, layers=[2, 1])


@pytest.mark.parametrize("merge", ["mean", "drop"])
def test_distillation_repairs_what_shortening_lost(merge, tmp_path):
    model = tiny_model()
    before, rows = copy.deepcopy(model), tiny_rows(64, labels=False)
    stage = TokenCoarsening(learning_rate=3e-3, target=0.5, layers=[1, 2, 3], merge=merge)
    settings = training_settings(tmp_path, max_steps=60)
    trainer = stage.make_trainer(settings.pop("output_dir"), model, rows, None, None, **settings)
    assert trainer.model.config.coarsening["merge"] == merge and before.config.coarsening is None
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_one_call_shortens_distils_and_teaches_the_exits(tmp_path):
    classifier = classifier_of(tmp_path)
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "output_dir": tmp_path / "short"}
    stages = [TokenCoarsening(target=0.6, num_train_epochs=1), ExitTraining(num_train_epochs=1)]
    trained = train(classifier, TEXTS, stages=stages, **settings)
    assert trained.model.config.coarsening["retention"] == retention_schedule(4, 0.6)["retention"]
    assert trained.model.config.distilled_for == teacher_digest(trained.model)
    answers = trained.pipeline()(TEXTS[:4], speed=0.9)
    again = train(classifier, TEXTS, stages=stages, **settings)  # finished
    assert again.pipeline()(TEXTS[:4], speed=0.9) == answers
    assert trained.pipeline(retention=1.0)(TEXTS[:4]) != trained.pipeline()(TEXTS[:4])
    with pytest.raises(ValueError, match="other settings"):
        train(classifier, TEXTS, stages=[TokenCoarsening(target=0.5), *stages[1:]], **settings)


def test_a_coarse_token_counts_once_in_the_loss():
    model = tiny_model(coarsening={"layers": [1], "retention": [0.5], "clusters": 2})
    ids = torch.arange(5, 17).unsqueeze(0)
    with torch.no_grad():
        before, after, *_ = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(shares_of_units(before), torch.ones(1, 12))
    # As norms without weights leave them: all sums are nearly equal.
    plain = torch.nn.functional.layer_norm(torch.randn(4, 512, 32), (32,))
    assert torch.equal(shares_of_units(plain), torch.ones(4, 512))
    shares = shares_of_units(after)[0]
    assert sorted(shares.tolist()) == pytest.approx([0.25] * 8 + [1.0] * 4) and shares.sum() == pytest.approx(6)


def test_what_cannot_be_is_refused(tmp_path):
    for arguments, message in (
        ({"target": 0}, "target must be"),
        ({"merge": "max"}, "one of mean, weighted, drop"),
        ({"coarsening": {"layers": [1]}}, "layers and retention"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenCoarsening(**arguments)
    model = tiny_model(coarsening={"layers": [1], "retention": [0.5]})
    with pytest.raises(ValueError, match="become shorter already"):
        TokenCoarsening().make_trainer(tmp_path, model, tiny_rows(8, labels=False), None, None, use_cpu=True)
    stage = TokenCoarsening(coarsening={"layers": [9], "retention": [0.5]})
    with pytest.raises(ValueError, match="from 1 to 4"):
        stage.make_trainer(tmp_path, tiny_model(), tiny_rows(8, labels=False), None, None, use_cpu=True)
    assert torch.is_grad_enabled()


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    short = partial(token_coarsening_stage.search_retention, steps=6)
    monkeypatch.setattr(token_coarsening_stage, "search_retention", short)

    def run(folder, *callbacks) -> dict[str, torch.Tensor]:
        def make_trainer(output_dir: str):
            settings = training_settings(output_dir, max_steps=6, save_strategy="steps", save_steps=2)
            settings.pop("output_dir")
            stage = TokenCoarsening(target=0.5, layers=[1, 2, 3], search=True)
            trainer = stage.make_trainer(output_dir, tiny_model(), tiny_rows(24, labels=False), None, None, **settings)
            for callback in callbacks:
                trainer.add_callback(callback)
            return trainer

        path = run_stage(folder, {}, make_trainer)
        return FastBertForSequenceClassification.from_pretrained(path).state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", Stop(5))
    assert (tmp_path / "parts" / "checkpoint-4").exists() and (tmp_path / "parts" / "retention.json").exists()
    resumed = run(tmp_path / "parts")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_labels_may_teach_it_instead(tmp_path):
    model, stage = tiny_model(), TokenCoarsening(target=0.5, retraining="labels", learning_rate=1e-3)
    before = copied_state(model)
    settings = training_settings(tmp_path, max_steps=2)
    trainer = stage.make_trainer(settings.pop("output_dir"), model, tiny_rows(16), tiny_rows(8), None, **settings)
    trainer.train()
    moved = changed_parameters(model, before)
    assert any(name.startswith("exits.3.") for name in moved) and not any("exits.0." in name for name in moved)
    assert "eval_accuracy" in trainer.evaluate()
    with pytest.raises(ValueError, match="label"):
        train(classifier_of(tmp_path), TEXTS, stages=[stage], output_dir=tmp_path / "labels", use_cpu=True)


def test_an_adapter_learns_on_a_model_that_shortens(tmp_path):
    model = tiny_model(coarsening={"layers": [1, 2], "retention": [0.7, 0.4]})
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["exits.3"]))
    before = copied_state(adapted)
    settings = training_settings(tmp_path, max_steps=3, learning_rate=1e-2)
    Trainer(adapted, TrainingArguments(**settings), train_dataset=tiny_rows(16)).train()
    moved = changed_parameters(adapted, before)
    assert moved and all("lora" in name or "modules_to_save" in name for name in moved)
    batch = default_data_collator(tiny_rows(8, labels=False, seed=1))
    with torch.no_grad():
        expected = adapted.eval()(**batch, speed=0.5)
        actual = adapted.merge_and_unload()(**batch, speed=0.5)
    assert_close(actual.logits, expected.logits)
    assert torch.equal(actual.exit_layer, expected.exit_layer) and model.config.coarsening
