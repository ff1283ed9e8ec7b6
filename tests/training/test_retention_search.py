"""Which layers keep how many tokens: what a search finds, what it is worth, and what it leaves as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from fastbert_hf.modeling.token_coarsening import check_coarsening
from fastbert_hf.training import TokenCoarsening, retention_schedule, search_retention
from fastbert_hf.training.retention_search import (
    SoftRetention,
    exit_logits,
    reach_of_layers,
    with_mean,
)

from ..common import FAMILIES, expanded, stock, tiny_model, tiny_rows, training_settings


QUIET = {"progress": False, "steps": 3, "batch_size": 4}


@pytest.mark.parametrize("target", [0.3, 0.5, 0.9, 1.0])
def test_what_is_found_leaves_what_was_asked_for(target):
    found = search_retention(tiny_model(), tiny_rows(16, labels=False), target=target, **QUIET)
    check_coarsening(found, 4)
    assert sum(expanded(found)) / 4 == pytest.approx(target, abs=1e-3)


def test_a_layer_whose_tokens_are_needed_keeps_them():
    """Only the attention of layer 3 adds anything, so tokens matter up to there and nowhere above."""
    model = tiny_model(exit_type="linear")
    for number, layer in enumerate(model.fastbert.layers(), start=1):
        dense = layer.attention.output.dense
        torch.nn.init.zeros_(dense.bias)
        if number == 3:
            torch.nn.init.normal_(dense.weight, std=1.0)
        else:
            torch.nn.init.zeros_(dense.weight)
    rows = tiny_rows(64, labels=False)
    settings = {"target": 0.6, "layers": [1, 2, 3, 4]}
    found = expanded(search_retention(model, rows, **settings, steps=40, learning_rate=0.2, progress=False))
    even = expanded(retention_schedule(4, **settings))
    assert found[1] > even[1] + 0.1 and found[3] < even[3] - 0.1, found


def test_the_model_stays_as_it_was():
    model = tiny_model().train()
    model.fastbert.backbone.embeddings.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    learnt = [weight.requires_grad for weight in model.parameters()]
    search_retention(model, tiny_rows(8, labels=False), **QUIET)
    assert model.training and model.config.coarsening is None
    assert [weight.requires_grad for weight in model.parameters()] == learnt
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_soft_weights_of_one_change_nothing(family):
    from fastbert_hf.modeling.engine import TorchEngine

    model = tiny_model(family)
    soft = SoftRetention(torch.ones(4), [1, 2, 3, 4])
    soft.shares = lambda: torch.full((4,), 3.0)
    engine = TorchEngine(model.fastbert.backbone, model.exits, model.shared_pooler, coarsening=soft)
    ids = torch.randint(5, 25, (3, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        torch.testing.assert_close(
            exit_logits(engine, model, batch), exit_logits(model.engine(), model, batch), rtol=1e-4, atol=1e-5
        )


def test_layers_that_few_texts_reach_cost_little():
    """With texts that leave early, the schedule of the layers that they run through is what counts."""
    reach = torch.tensor([1.0, 1.0, 0.1, 0.1])
    shares = with_mean(torch.full((4,), 0.5).cumprod(0), 0.5, reach)
    assert (shares * reach).sum() / reach.sum() == pytest.approx(0.5, abs=1e-6)
    model = tiny_model()
    from fastbert_hf.modeling.teacher_digest import teacher_digest

    model.config.distilled_for = teacher_digest(model)
    rows = tiny_rows(16, labels=False)
    found = reach_of_layers(model, rows, 0.999, progress=False)
    assert found[0] == 1 and (found.diff() <= 0).all()
    schedule = search_retention(model, rows, target=0.5, layers=[1, 2, 4], speed=0.999, **QUIET)
    kept = torch.tensor(expanded(schedule)) * found
    assert kept.sum() / found.sum() == pytest.approx(0.5, abs=1e-3)


def test_a_search_that_is_done_is_not_repeated(tmp_path, monkeypatch):
    stage = TokenCoarsening(target=0.5, search=True)
    settings = training_settings(tmp_path, max_steps=1)
    folder = settings.pop("output_dir")
    rows = tiny_rows(8, labels=False)
    made = stage.make_trainer(folder, tiny_model(), rows, None, None, **settings)
    found = json.loads((tmp_path / "retention.json").read_text())["schedule"]
    assert {**found, "merge": "mean", "clusters": 1, "size_aware": True} == made.model.config.coarsening
    calls = []
    monkeypatch.setattr(
        "fastbert_hf.training.token_coarsening_stage.search_retention",
        lambda *args, **kwargs: calls.append(kwargs) or retention_schedule(4, 0.5),
    )
    again = stage.make_trainer(folder, tiny_model(), rows, None, None, **settings)
    assert again.model.config.coarsening == made.model.config.coarsening and not calls
    TokenCoarsening(target=0.4, search=True).make_trainer(folder, tiny_model(), rows, None, None, **settings)
    for model, own in ((tiny_model(seed=1), rows), (tiny_model(), tiny_rows(9, labels=False))):
        stage.make_trainer(folder, model, own, None, None, **settings)
    assert [call["target"] for call in calls] == [0.4, 0.5, 0.5]


def test_a_search_that_goes_astray_says_so_and_leaves_the_model_as_it_was():
    rows = tiny_rows(8, labels=False)
    broken = tiny_model()
    learnt = [weight.requires_grad for weight in broken.parameters()]
    broken.exits[3].out_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the loss of the search is nan at step 1"):
        search_retention(broken, rows, **QUIET)
    model = tiny_model()
    for learning_rate in (-1, 0, float("inf")):
        with pytest.raises(ValueError, match="learning_rate must be above 0"):
            search_retention(model, rows, learning_rate=learning_rate, **QUIET)
    assert all([weight.requires_grad for weight in of.parameters()] == learnt for of in (broken, model))
    with pytest.raises(TypeError, match="model must be one with exits"):
        search_retention(stock(), rows, progress=False)


def test_what_cannot_be_is_refused():
    model, rows = tiny_model(), tiny_rows(8, labels=False)
    for settings, message in (
        ({"target": 0}, "target must be"),
        ({"speed": 2}, "speed"),
        ({"speed": 0.5}, "needs exits that are trained"),
        ({"layers": [3]}, "cannot be reached, as texts run through 2 of 4 layers"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            search_retention(model, rows, progress=False, **settings)
    with pytest.raises(ValueError, match="there are no rows"):
        search_retention(model, [], progress=False)
    model.config.coarsening = retention_schedule(4, 0.5)
    with pytest.raises(ValueError, match="become shorter already"):
        search_retention(model, rows, progress=False)
    for arguments, message in (
        ({"search": True, "coarsening": retention_schedule(4, 0.5)}, "nothing to search"),
        ({"speed": 0.5}, "for the search alone"),
        ({"layers": [0]}, "layers of coarsening must be numbers from 1"),
        ({"layers": "ab"}, "layers of coarsening must be numbers from 1"),
        ({"retraining": "hope"}, "one of distillation, labels"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenCoarsening(**arguments)
