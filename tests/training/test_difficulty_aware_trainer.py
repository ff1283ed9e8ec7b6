"""CascadeBERT's regularisation: the loss that knows which rows are hard, and the fine-tuning with it."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from fastbert_hf.training import DifficultyAwareArguments, DifficultyAwareTrainer, difficulty_margin_loss

from ..common import (
    assert_close,
    changed_parameters,
    copied_state,
    spread_out,
    student_names,
    tiny_model,
    tiny_rows,
    tiny_text_config,
    tiny_texts,
    tiny_tokenizer,
    training_settings,
    without_dropout,
)
from .common import SGD, assert_moved


def random_logits(rows: int = 9, num_labels: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, num_labels, generator=generator, dtype=torch.float64)
    return logits, torch.arange(rows) % 3 % 2


def loss_by_loops(logits: list[list[float]], difficulty: list[int], margin: float) -> tuple[float, list[list[float]]]:
    """Eq. 4 to 6 over all pairs in float64, and the gradient of every logit."""
    probabilities = []
    for row in logits:
        weights = [math.exp(logit) for logit in row]
        probabilities.append([weight / sum(weights) for weight in weights])
    confidence = [max(row) for row in probabilities]
    pairs = [(i, j) for i, d in enumerate(difficulty) for j, other in enumerate(difficulty) if (d, other) == (0, 1)]
    loss, of_confidence = 0.0, [0.0] * len(logits)
    for easy, hard in pairs:
        short = margin - (confidence[easy] - confidence[hard])
        if short > 0:
            loss += short / len(pairs)
            of_confidence[easy] -= 1 / len(pairs)
            of_confidence[hard] += 1 / len(pairs)
    gradient = [
        [slope * max(row) * ((p == max(row)) - p) for p in row]
        for slope, row in zip(of_confidence, probabilities, strict=True)
    ]
    return loss, gradient


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_gradient_are_those_of_a_loop_over_pairs(margin, dtype, tolerance):
    for seed in range(5):
        logits, difficulty = random_logits(seed=seed)
        expected, gradient = loss_by_loops(logits.tolist(), difficulty.tolist(), margin)
        logits = logits.to(dtype).requires_grad_()
        loss = difficulty_margin_loss(logits, difficulty, margin)
        loss.backward()
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(expected, abs=tolerance)
        assert_close(logits.grad.double(), torch.tensor(gradient, dtype=torch.float64), tolerance)
        assert expected > 0 or margin == 0


def test_learning_lowers_the_confidence_of_hard_rows_and_raises_that_of_easy_ones():
    logits, difficulty = random_logits()
    logits.requires_grad_()
    difficulty_margin_loss(logits, difficulty, margin=1.0).backward()
    before, after = (values.softmax(-1).amax(-1) for values in (logits.detach(), logits.detach() - logits.grad))
    assert (after[difficulty == 0] > before[difficulty == 0]).all()
    assert (after[difficulty == 1] < before[difficulty == 1]).all()


@pytest.mark.parametrize("sample_pairs", [False, True])
@pytest.mark.parametrize("hard", [0, 1])
def test_a_batch_without_pairs_gives_zero_and_no_gradient(hard, sample_pairs):
    logits = random_logits()[0].requires_grad_()
    loss = difficulty_margin_loss(logits, torch.full((len(logits),), hard), 0.5, sample_pairs)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_sampled_pairs_give_the_loss_of_all_pairs_on_average():
    logits, difficulty = random_logits()
    torch.manual_seed(0)
    draws = torch.stack([difficulty_margin_loss(logits, difficulty, 0.5, sample_pairs=True) for _ in range(3000)])
    standard_error = draws.std() / len(draws) ** 0.5
    assert standard_error > 0
    expected = difficulty_margin_loss(logits, difficulty, 0.5)
    assert abs(draws.mean() - expected) < 4 * standard_error


def test_sampled_pairs_have_one_easy_row_and_any_hard_one():
    logits, difficulty = random_logits()
    difficulty = torch.where(torch.arange(len(logits)) == 4, 0, 1)
    confidence = logits.softmax(-1).amax(-1)
    expected = {round((1 - confidence[4] + other).item(), 9) for other in confidence[difficulty == 1]}
    torch.manual_seed(0)
    draws = [difficulty_margin_loss(logits, difficulty, 1.0, sample_pairs=True).item() for _ in range(200)]
    assert {round(draw, 9) for draw in draws} == expected
    assert len(expected) == len(logits) - 1


def test_loss_of_half_precision_logits_is_float32():
    logits, difficulty = random_logits()
    loss = difficulty_margin_loss(logits.bfloat16(), difficulty)
    assert loss.dtype == torch.float32
    assert_close(loss, difficulty_margin_loss(logits.bfloat16().float(), difficulty))


@pytest.mark.parametrize("difficulty", [[0, 2], [0, -1], [0.5, 1.0], [math.nan, 0.0], [0], [0, 1, 1], [[0, 1]]])
def test_other_difficulties_are_refused(difficulty):
    with pytest.raises(ValueError, match=r"difficulty must be 0 \(easy\) or 1 \(hard\) for each of the 2 rows, got"):
        difficulty_margin_loss(torch.zeros(2, 3), torch.tensor(difficulty))


def stock_classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    config = tiny_text_config("bert")
    config.num_labels = 3
    return spread_out(AutoModelForSequenceClassification.from_config(config))


MODELS = {"stock": stock_classifier, "fastbert": partial(tiny_model, exit_dropout=0)}


def difficult_rows(number: int = 32, **kwargs) -> list[dict[str, torch.Tensor]]:
    """Of which every third is hard."""
    rows = tiny_rows(number, **kwargs)
    return [{**row, "difficulty": torch.tensor(int(index % 3 == 0))} for index, row in enumerate(rows)]


def trainer_for(tmp_path, model, rows=None, eval_rows=None, others=(), **settings) -> DifficultyAwareTrainer:
    arguments = DifficultyAwareArguments(**training_settings(tmp_path, **settings))
    rows = difficult_rows() if rows is None else rows
    return DifficultyAwareTrainer(model, arguments, train_dataset=rows, eval_dataset=eval_rows, **dict(others))


def losses_of(model, rows, margin: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """The task loss and the regularisation of one batch, with their graphs."""
    batch = default_data_collator(rows)
    labels, difficulty = batch.pop("labels"), batch.pop("difficulty")
    logits = model(**batch).logits
    return torch.nn.functional.cross_entropy(logits, labels), difficulty_margin_loss(logits, difficulty, margin)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_step_goes_down_the_task_loss_and_the_weighted_regularisation(tmp_path, build):
    model, rows = without_dropout(build()), difficult_rows(8)
    before = copied_state(model)
    task_loss, regularisation = losses_of(model, rows, margin=0.7)
    assert regularisation > 0.05
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(task_loss + 0.3 * regularisation, parameters, allow_unused=True)
    settings = {"max_steps": 1, "difficulty_weight": 0.3, "difficulty_margin": 0.7, **SGD, "learning_rate": 1.0}
    trainer = trainer_for(tmp_path, model, rows, **settings)
    trainer.train()

    log = trainer.state.log_history[0]
    assert log["difficulty_loss"] == pytest.approx(regularisation.item(), abs=1e-5)
    assert log["loss"] == pytest.approx((task_loss + 0.3 * regularisation).item(), abs=1e-4)
    after = model.state_dict()
    for name, gradient in zip(names, gradients, strict=True):
        assert_close(after[name], before[name] - (0 if gradient is None else gradient), 1e-4)
    assert changed_parameters(model, before) <= set(names)


def test_fastbert_learns_as_in_stage_one(tmp_path):
    model = tiny_model()
    before = copied_state(model)
    trainer_for(tmp_path, model).train()
    assert_moved(model, before, {name for name, _ in model.named_parameters()} - student_names(model))


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_without_weight_it_is_the_stock_trainer(tmp_path, build):
    model, stock = build(), build()
    trainer_for(tmp_path, model, difficulty_weight=0.0).train()
    Trainer(stock, TrainingArguments(**training_settings(tmp_path)), train_dataset=tiny_rows()).train()
    assert not changed_parameters(model, copied_state(stock))
    other = build()
    trainer_for(tmp_path, other).train()
    assert changed_parameters(other, copied_state(stock))


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_column_reaches_the_loss_from_a_data_set_with_others(tmp_path, build):
    model, tokenizer = without_dropout(build()), tiny_tokenizer()
    columns = {"labels": [0, 1, 2] * 4, "difficulty": [0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1], "text": tiny_texts(12)}
    rows = Dataset.from_dict({**tokenizer(columns["text"]), **columns})
    # Each step sees the weights of the beginning, and the rows in their order.
    settings = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4, "learning_rate": 0.0}
    trainer = trainer_for(tmp_path, model, rows, others={"processing_class": tokenizer}, **settings)
    trainer.train()
    logged = [entry["difficulty_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for step, value in enumerate(logged):
        part = slice(4 * step, 4 * step + 4)
        with torch.no_grad():
            logits = model(**tokenizer(columns["text"][part], padding=True, return_tensors="pt")).logits
        expected = difficulty_margin_loss(logits, torch.tensor(columns["difficulty"][part]))
        assert value == pytest.approx(expected.item(), abs=1e-5)
    assert max(logged) > 0.05


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_training_rows_without_difficulty_are_refused(tmp_path, build):
    with pytest.raises(ValueError, match=r"no 'difficulty'.*label_difficulty\(model_init, args, train_dataset\)"):
        trainer_for(tmp_path, build(), tiny_rows()).train()


def mean_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("task", ["model", "smoothing", "own"])
def test_four_accumulated_batches_of_8_equal_one_of_32(tmp_path, build, task):
    # Pairs are made within a micro-batch: with the same rows in each they are those of the large one.
    rows, weights = difficult_rows(8) * 12, []
    for batch_size, accumulation in ((8, 4), (32, 1)):
        model = without_dropout(build())
        before = copied_state(model)
        trainer_for(
            tmp_path,
            model,
            rows,
            others={"compute_loss_func": mean_loss} if task == "own" else {},
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            label_smoothing_factor=0.2 if task == "smoothing" else 0.0,
            **SGD,
        ).train()
        weights.append(copied_state(model))
        assert max((weights[-1][name] - before[name]).abs().max() for name in before) > 1e-3
    for name, value in weights[0].items():
        assert_close(value, weights[1][name], 1e-6)


@pytest.mark.parametrize("task", ["smoothing", "own"])
def test_smoothed_labels_and_a_loss_of_ones_own_stay_the_task_loss(tmp_path, task):
    model, rows = without_dropout(stock_classifier()), difficult_rows(8)
    with torch.no_grad():
        task_loss, regularisation = losses_of(model, rows)
        batch = default_data_collator(tiny_rows(8))
        logits = model(**batch).logits
    if task == "smoothing":
        task_loss = torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.2)
        trainer = trainer_for(tmp_path, model, rows, max_steps=1, label_smoothing_factor=0.2)
    else:
        trainer = trainer_for(
            tmp_path, model, rows, others={"compute_loss_func": lambda *call, **items: 2 * mean_loss(*call, **items)}
        )
        task_loss = 2 * task_loss
    trainer.train()
    expected = (task_loss + 0.5 * regularisation).item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("sample_pairs", [False, True])
def test_sampled_pairs_are_those_of_the_training_alone(tmp_path, sample_pairs):
    model, rows = without_dropout(tiny_model(exit_dropout=0)), difficult_rows(8)
    with torch.no_grad():
        task_loss, regularisation = losses_of(model, rows)
    trainer = trainer_for(tmp_path, model, rows, max_steps=1, sample_pairs=sample_pairs, learning_rate=0.0)
    trainer.train()
    of_all_pairs = pytest.approx(regularisation.item(), abs=1e-5)
    assert (trainer.state.log_history[0]["difficulty_loss"] == of_all_pairs) is not sample_pairs
    expected = (task_loss + 0.5 * regularisation).item()
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_evaluation_is_that_of_the_stock_trainer_and_adds_what_it_knows(tmp_path, build):
    model, rows, hard = build(), tiny_rows(22), difficult_rows(22)
    settings = {"per_device_eval_batch_size": 22}
    scores = []

    def compute_metrics(prediction):
        scores.append(prediction)
        return {"first": float(prediction.predictions[0].max())}

    trainer = trainer_for(tmp_path, model, others={"compute_metrics": compute_metrics}, **settings)
    arguments = TrainingArguments(**training_settings(tmp_path, **settings))
    expected = Trainer(model, arguments, compute_metrics=compute_metrics).evaluate(rows)
    timed = {key for key in expected if "runtime" in key or "second" in key or "time" in key}
    metrics = trainer.evaluate(rows)
    assert {key: metrics[key] for key in metrics.keys() - timed} == {
        key: expected[key] for key in expected.keys() - timed
    }
    with torch.no_grad():
        task_loss, regularisation = losses_of(model, hard)
    assert regularisation > 0.05
    with_difficulty = trainer.evaluate(hard)
    assert with_difficulty["eval_loss"] == pytest.approx((task_loss + 0.5 * regularisation).item(), abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(task_loss.item(), abs=1e-5)
    assert with_difficulty["eval_first"] == metrics["eval_first"]
    assert all(np.array_equal(score.predictions, scores[0].predictions) for score in scores)
    assert all(np.array_equal(score.label_ids, scores[0].label_ids) for score in scores)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("labels", [True, False])
def test_predict_returns_the_logits(tmp_path, build, labels):
    model = build()
    rows = difficult_rows(10, labels=labels)
    output = trainer_for(tmp_path, model, per_device_eval_batch_size=4).predict(rows)
    batch = default_data_collator(tiny_rows(10))
    with torch.no_grad():
        assert_close(torch.from_numpy(output.predictions), model(**batch).logits)
    assert (output.label_ids is not None) == labels


@pytest.mark.parametrize(("logging_steps", "accumulation"), [(1, 1), (2, 1), (2, 2)])
def test_the_logs_have_the_mean_regularisation_of_their_steps(tmp_path, logging_steps, accumulation):
    # A task loss of 1, whatever the weights, so that the rest of the loss is the regularisation.
    one = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: 0 * outputs.logits.sum() + 1}
    trainer = trainer_for(
        tmp_path,
        tiny_model(),
        difficult_rows(64),
        eval_rows=difficult_rows(8),
        others=one,
        max_steps=4,
        logging_steps=logging_steps,
        gradient_accumulation_steps=accumulation,
        eval_strategy="steps",
        eval_steps=1,
        difficulty_weight=2.0,
    )
    for _ in range(2):
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logs) == 4 // logging_steps
        for entry in logs:
            assert entry["loss"] == pytest.approx(1 + 2 * entry["difficulty_loss"], abs=2e-4)
            assert entry["difficulty_loss"] > 0.01
        assert not any("difficulty_loss" in entry for entry in trainer.state.log_history if "eval_loss" in entry)


def test_a_second_training_logs_its_own_regularisation(tmp_path):
    one = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: 0 * outputs.logits.sum() + 1}
    trainer = trainer_for(tmp_path, tiny_model(), others=one, max_steps=3, logging_steps=2, learning_rate=1e-4)
    trainer.train()
    trainer.train()
    first_log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first_log["loss"] == pytest.approx(1 + 0.5 * first_log["difficulty_loss"], abs=2e-4)


def test_defaults_are_those_of_the_paper_and_the_command_line_sets_them(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu"]
    parser = HfArgumentParser(DifficultyAwareArguments)
    (args,) = parser.parse_args_into_dataclasses(words)
    assert (args.difficulty_weight, args.difficulty_margin, args.sample_pairs) == (0.5, 0.5, False)
    words += "--difficulty_weight 2 --difficulty_margin 0.3 --sample_pairs".split()
    (args,) = parser.parse_args_into_dataclasses(words)
    assert (args.difficulty_weight, args.difficulty_margin, args.sample_pairs) == (2, 0.3, True)


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_impossible_weights_are_refused(tmp_path, weight):
    with pytest.raises(ValueError, match="difficulty_weight must be a finite number from 0 on, got"):
        DifficultyAwareArguments(str(tmp_path), use_cpu=True, difficulty_weight=weight)


@pytest.mark.parametrize("margin", [-0.1, 1.1, math.inf, math.nan])
def test_impossible_margins_are_refused(tmp_path, margin):
    with pytest.raises(ValueError, match=r"difficulty_margin must be a number in \[0, 1\], got .*Example:"):
        DifficultyAwareArguments(str(tmp_path), use_cpu=True, difficulty_margin=margin)


def test_arguments_of_another_class_are_refused(tmp_path, monkeypatch):
    expected = r"args must be DifficultyAwareArguments, got TrainingArguments.*DifficultyAwareArguments\('outputs'"
    with pytest.raises(TypeError, match=expected):
        DifficultyAwareTrainer(tiny_model(), TrainingArguments(str(tmp_path), use_cpu=True))
    monkeypatch.chdir(tmp_path)
    assert DifficultyAwareTrainer(tiny_model()).args.difficulty_margin == 0.5
