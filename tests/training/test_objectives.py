"""The loss of each recipe on fixed logits, by hand in float64, and what learns by it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import default_data_collator

from fastbert_hf.training import OBJECTIVES, ExitTrainer, ExitTrainingArguments, depth_weights, student_divergences

from ..common import (
    NUM_LAYERS,
    assert_close,
    changed_parameters,
    copied_state,
    one_label,
    student_names,
    tiny_model,
    tiny_rows,
    training_settings,
)
from .common import assert_moved, float64_divergences


# Two rows, three exits, two labels.
LOGITS = torch.tensor([[[2.0, 0.0], [1.0, -1.0], [0.0, 3.0]], [[0.5, 0.5], [-1.0, 2.0], [4.0, 0.0]]])
LABELS = torch.tensor([1, 0])
TASK = one_label()


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def cross_entropies() -> list[float]:
    """Of each exit, averaged over the two rows."""
    rows = zip(LOGITS.tolist(), LABELS.tolist(), strict=True)
    table = [[-math.log(softmax(exit_logits)[label]) for exit_logits in row] for row, label in rows]
    return [sum(column) / 2 for column in zip(*table, strict=True)]


def divergences(temperature: float) -> list[float]:
    """KL(teacher || student) of each student, averaged over the two rows, times the squared temperature."""
    table = []
    for row in LOGITS.tolist():
        *students, teacher = (softmax([logit / temperature for logit in exit_logits]) for exit_logits in row)
        table.append([sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True)) for student in students])
    return [temperature**2 * sum(column) / 2 for column in zip(*table, strict=True)]


def losses(tmp_path, objective: str, **settings) -> list[float]:
    arguments = ExitTrainingArguments(str(tmp_path), use_cpu=True, objective=objective, **settings)
    return OBJECTIVES[objective].losses(LOGITS, LABELS, arguments, TASK).tolist()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_self_distillation_is_the_papers_equation_5(tmp_path, temperature):
    assert losses(tmp_path, "self_distillation", temperature=temperature) == pytest.approx(divergences(temperature))


def test_frozen_cross_entropy_leaves_out_the_last_exit(tmp_path):
    assert losses(tmp_path, "frozen_cross_entropy") == pytest.approx(cross_entropies()[:-1])


def test_joint_cross_entropy_is_that_of_every_exit(tmp_path):
    assert losses(tmp_path, "joint_cross_entropy") == pytest.approx(cross_entropies())


def test_weighted_cross_entropy_counts_exit_j_j_times(tmp_path):
    # sum_j j L_j / sum_j j, as PABEE writes it.
    values = losses(tmp_path, "weighted_cross_entropy")
    assert sum(values) == pytest.approx(sum(j * loss for j, loss in enumerate(cross_entropies(), start=1)) / 6)


def test_objectives_are_those_of_the_task(tmp_path):
    """With a task whose loss and divergence are squares: no objective knows of a softmax."""
    squares = one_label()
    squares.loss = lambda logits, labels: ((logits[:, 0] - labels) ** 2).mean()
    squares.divergence = lambda students, teacher, temperature, reverse: (
        (students - teacher)[..., 0] ** 2 * temperature
    )
    to_teacher = ((LOGITS[:, :-1, 0] - LOGITS[:, -1:, 0]) ** 2).mean(0)
    to_labels = ((LOGITS[..., 0] - LABELS[:, None]) ** 2).mean(0)
    expected = {
        "self_distillation": 3 * to_teacher,
        "frozen_cross_entropy": to_labels[:-1],
        "joint_cross_entropy": to_labels,
        "weighted_cross_entropy": to_labels * depth_weights(3),
    }
    assert expected.keys() == OBJECTIVES.keys()
    for name, losses in expected.items():
        arguments = ExitTrainingArguments(str(tmp_path), use_cpu=True, objective=name, temperature=3.0)
        assert_close(OBJECTIVES[name].losses(LOGITS, LABELS, arguments, squares), losses)


def test_depth_weights_grow_and_add_up_to_one():
    assert depth_weights(4).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_of_half_precision_logits_are_float32(tmp_path, objective):
    arguments = ExitTrainingArguments(str(tmp_path), use_cpu=True, objective=objective, temperature=2.0)
    assert OBJECTIVES[objective].losses(LOGITS.bfloat16(), LABELS, arguments, TASK).dtype == torch.float32


def test_temperature_keeps_the_size_of_the_gradients():
    sizes = []
    for temperature in (10.0, 20.0):
        logits = LOGITS.clone().requires_grad_()
        student_divergences(logits, temperature=temperature).sum().backward()
        sizes.append(logits.grad.abs().max().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


@pytest.mark.parametrize("reverse_kl", [False, True])
def test_divergences_and_their_gradients_equal_float64_formulas(reverse_kl):
    rows, num_exits, num_labels = 7, 5, 4
    generator = torch.Generator().manual_seed(0)
    exit_logits = (torch.randn(rows, num_exits, num_labels, generator=generator) * 3).requires_grad_()

    divergences = student_divergences(exit_logits, reverse_kl)
    divergences.sum().backward()

    expected = torch.tensor(float64_divergences(exit_logits.detach(), reverse_kl))
    assert divergences.shape == (num_exits - 1,)
    assert_close(divergences.detach(), expected.float(), 1e-5)
    student, teacher = exit_logits.detach().double().softmax(-1).split([num_exits - 1, 1], 1)
    ratio = (student / teacher).log()
    if reverse_kl:
        gradient = student * (ratio - (student * ratio).sum(-1, keepdim=True)) / rows
    else:
        gradient = (student - teacher) / rows
    assert_close(exit_logits.grad[:, :-1], gradient.float(), 1e-6)
    assert not exit_logits.grad[:, -1].any()


def test_the_two_directions_of_the_divergence_differ_and_vanish_for_equal_answers():
    exit_logits = torch.tensor([[[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]]])
    forward, reverse = student_divergences(exit_logits), student_divergences(exit_logits, reverse_kl=True)
    assert abs(forward - reverse).item() > 0.05
    assert student_divergences(exit_logits[:, [1, 1]]).item() == pytest.approx(0, abs=1e-7)


def test_divergences_of_half_precision_logits_are_float32():
    exit_logits = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    divergences = student_divergences(exit_logits)
    assert divergences.dtype == torch.float32
    assert_close(divergences, torch.tensor(float64_divergences(exit_logits)).float(), 1e-5)


def trainer_for(tmp_path, model, objective: str, rows=None, **settings) -> ExitTrainer:
    arguments = ExitTrainingArguments(**training_settings(tmp_path, objective=objective, **settings))
    rows = tiny_rows() if rows is None else rows
    return ExitTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("objective", ["self_distillation", "frozen_cross_entropy"])
def test_frozen_objectives_move_every_student_and_nothing_else(tmp_path, objective):
    model = tiny_model()
    before = copied_state(model)
    trainer_for(tmp_path, model, objective, learning_rate=1e-2).train()
    assert_moved(model, before, student_names(model))


@pytest.mark.parametrize("config", [{}, {"exit_type": "linear", "share_exit_pooler": True}])
@pytest.mark.parametrize("objective", ["joint_cross_entropy", "weighted_cross_entropy"])
def test_joint_objectives_move_everything(tmp_path, objective, config):
    model = tiny_model(**config)
    before = copied_state(model)
    trainer_for(tmp_path, model, objective, learning_rate=1e-2).train()
    assert_moved(model, before, set(before))


def test_joint_objectives_train_with_dropout_everywhere(tmp_path):
    model, seen = tiny_model(exit_type="linear"), []
    for module in [*model.fastbert.layers(), *model.exits]:
        module.register_forward_hook(lambda module, *_: seen.append({part.training for part in module.modules()}))
    trainer_for(tmp_path, model, "joint_cross_entropy", max_steps=1).train()
    assert seen == [{True}] * 2 * NUM_LAYERS
    assert not model.training


@pytest.mark.parametrize("part", ["backbone", "teacher"])
def test_joint_objectives_refuse_a_model_that_cannot_learn_as_a_whole(tmp_path, part):
    model = tiny_model()
    (model.fastbert if part == "backbone" else model.teacher).requires_grad_(False)
    with pytest.raises(ValueError, match=r"asks for no gradients.*model\.requires_grad_\(True\)"):
        trainer_for(tmp_path, model, "joint_cross_entropy")


def test_a_few_frozen_parameters_stay_frozen_in_joint_training(tmp_path):
    model = tiny_model()
    model.fastbert.backbone.embeddings.requires_grad_(False)
    before = copied_state(model)
    trainer_for(tmp_path, model, "joint_cross_entropy", learning_rate=1e-2).train()
    assert not any(".embeddings." in name for name in changed_parameters(model, before))


def test_joint_objectives_refuse_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    names = [f"exits.{index}" for index in range(NUM_LAYERS)]
    adapter = peft.LoraConfig(target_modules=["query"], modules_to_save=names)
    with pytest.raises(ValueError, match="the model is wrapped by PEFT"):
        trainer_for(tmp_path, peft.get_peft_model(tiny_model(), adapter), "weighted_cross_entropy")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_unlabeled_rows_can_be_predicted_whatever_was_taught(tmp_path, objective):
    rows = tiny_rows(labels=False)
    trainer = trainer_for(tmp_path, tiny_model(), objective, rows)
    assert trainer.predict(rows).predictions.shape == (len(rows), NUM_LAYERS, 3)
    assert ("eval_loss" in trainer.evaluate()) == (objective == "self_distillation")


@pytest.mark.parametrize("objective", [name for name, objective in OBJECTIVES.items() if objective.needs_labels])
def test_rows_without_a_label_do_not_count(tmp_path, objective):
    arguments = ExitTrainingArguments(str(tmp_path), use_cpu=True, objective=objective)
    losses = OBJECTIVES[objective].losses
    expected = losses(LOGITS[:1], LABELS[:1], arguments, TASK)
    assert_close(losses(LOGITS, torch.tensor([1, -100]), arguments, TASK), expected)


def test_joint_objectives_need_no_trained_teacher(tmp_path):
    model = tiny_model()
    torch.nn.init.zeros_(model.teacher.out_proj.bias)
    trainer_for(tmp_path, model, "joint_cross_entropy", max_steps=1).train()
    with pytest.raises(ValueError, match="random initialisation"):
        model = tiny_model()
        torch.nn.init.zeros_(model.teacher.out_proj.bias)
        trainer_for(tmp_path, model, "frozen_cross_entropy").train()


@pytest.mark.parametrize(
    ("objective", "name", "exits"),
    [
        ("self_distillation", "kl", NUM_LAYERS - 1),
        ("frozen_cross_entropy", "cross_entropy", NUM_LAYERS - 1),
        ("joint_cross_entropy", "cross_entropy", NUM_LAYERS),
        ("weighted_cross_entropy", "weighted_cross_entropy", NUM_LAYERS),
    ],
)
def test_losses_of_each_exit_are_logged_and_add_up(tmp_path, objective, name, exits):
    model, rows = tiny_model(), tiny_rows()
    trainer = trainer_for(tmp_path, model, objective, rows)
    metrics = trainer.evaluate()
    parts = [metrics[f"eval_{name}_exit_{depth}"] for depth in range(1, exits + 1)]
    assert f"eval_{name}_exit_{exits + 1}" not in metrics
    assert metrics["eval_loss"] == pytest.approx(sum(parts), rel=1e-5)
    batch = default_data_collator(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        exit_logits = model(**batch, output_exit_logits=True).exit_logits
    expected = OBJECTIVES[objective].losses(exit_logits, labels, trainer.args, TASK)
    assert_close(torch.tensor(parts), expected, 1e-4)
    trainer.train()
    assert f"{name}_exit_{exits}" in trainer.state.log_history[0]


@pytest.mark.parametrize("objective", [name for name, objective in OBJECTIVES.items() if objective.needs_labels])
def test_objectives_that_need_labels_say_so(tmp_path, objective):
    with pytest.raises(ValueError, match=f"objective='{objective}' learns from labels, but the rows have none"):
        trainer_for(tmp_path, tiny_model(), objective, tiny_rows(labels=False)).train()


def test_unknown_objective_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=f"objective='hope' is not known; choose one of {', '.join(OBJECTIVES)}"):
        ExitTrainingArguments(str(tmp_path), use_cpu=True, objective="hope")


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_impossible_temperatures_are_refused(tmp_path, temperature):
    with pytest.raises(ValueError, match="temperature must be a number above 0"):
        ExitTrainingArguments(str(tmp_path), use_cpu=True, temperature=temperature)
