"""CascadeBERT's regularisation: which rows are hard, the loss that knows it, and the fine-tuning with both."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from fastbert_hf.training import (
    DifficultyAwareArguments,
    DifficultyAwareTrainer,
    difficulty_margin_loss,
    hard_shares,
    label_difficulty,
)
from fastbert_hf.training.difficulty import split_into_folds

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


SGD = {"optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 0.0}


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
    assert changed_parameters(model, before) == {name for name, _ in model.named_parameters()} - student_names(model)


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
def test_the_column_reaches_the_loss_from_a_data_set_with_others(tmp_path, build, monkeypatch):
    from fastbert_hf.training import difficulty_aware_trainer

    seen = []

    def remember(logits, difficulty, *settings):
        seen.extend(difficulty.tolist())
        return difficulty_margin_loss(logits, difficulty, *settings)

    monkeypatch.setattr(difficulty_aware_trainer, "difficulty_margin_loss", remember)
    rows = encoded_rows(12)
    difficulty = [0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1]
    rows = rows.add_column("difficulty", difficulty, feature=ClassLabel(names=["easy", "hard"]))
    rows = rows.add_column("text", tiny_texts(12))
    settings = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4}
    trainer_for(tmp_path, build(), rows, others={"processing_class": tiny_tokenizer()}, **settings).train()
    assert seen == difficulty


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
def test_sampled_pairs_are_those_of_the_training_alone(tmp_path, sample_pairs, monkeypatch):
    from fastbert_hf.training import difficulty_aware_trainer

    seen = []

    def remember(logits, difficulty, margin, sample_pairs):
        seen.append(sample_pairs)
        return difficulty_margin_loss(logits, difficulty, margin, sample_pairs)

    monkeypatch.setattr(difficulty_aware_trainer, "difficulty_margin_loss", remember)
    trainer = trainer_for(tmp_path, tiny_model(), max_steps=1, sample_pairs=sample_pairs)
    trainer.train()
    trainer.evaluate(difficult_rows(8))
    assert seen == [sample_pairs, False]


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


def encoded_rows(number: int = 20, seed: int = 0) -> Dataset:
    """Tokenized texts of two labels that can be learnt in part: which one is at random."""
    labels = torch.randint(2, (number,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({**tiny_tokenizer()(tiny_texts(number, seed)), "labels": labels})


def small_model() -> torch.nn.Module:
    """What `set_seed` says of its new head, on a backbone that is always the same."""
    # Drawn first, as the rest sets a seed of its own.
    head = torch.randn(2, 32) / 4
    model = tiny_model(num_labels=2, exit_type="linear")
    model.teacher.out_proj.weight.data.copy_(head)
    return model


def labelling_arguments(folder, **settings) -> TrainingArguments:
    settings = {"learning_rate": 1e-3, "per_device_eval_batch_size": 4, **settings}
    return TrainingArguments(**training_settings(folder, **settings))


def label(folder, rows=None, num_folds=3, seeds=(1, 2), model_init=small_model, **settings) -> Dataset:
    rows, args = encoded_rows() if rows is None else rows, labelling_arguments(folder, **settings)
    return label_difficulty(model_init, args, rows, num_folds, seeds, processing_class=tiny_tokenizer())


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Dataset:
    """The rows as an undisturbed labelling leaves them."""
    return label(tmp_path_factory.mktemp("labelled"))


def label_slowly(folder, rows: Dataset, num_folds: int, seeds: tuple[int, ...], **settings) -> list[int]:
    """Section 3.2 of the paper, row by row."""
    wrong = {row: 0 for row in range(len(rows))}
    for seed in seeds:
        for fold in split_into_folds(len(rows), num_folds):
            set_seed(seed)
            model = small_model()
            trainer = Trainer(
                model,
                labelling_arguments(folder, seed=seed, **settings),
                train_dataset=rows.select([row for row in range(len(rows)) if row not in fold]),
                data_collator=DataCollatorWithPadding(tiny_tokenizer()),
            )
            trainer.train()
            model.eval()
            for row in fold.tolist():
                with torch.no_grad():
                    answer = model(torch.tensor([rows[row]["input_ids"]])).logits.argmax().item()
                wrong[row] += answer != rows[row]["labels"]
    return [int(wrong[row] > 0) for row in range(len(rows))]


@pytest.fixture
def trainings(monkeypatch) -> list[tuple[int, int]]:
    """The seed and the number of rows of every training that is started."""
    started, original = [], Trainer.train

    def count(self, *args, **kwargs):
        started.append((self.args.seed, len(self.train_dataset)))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", count)
    return started


def test_labels_are_those_of_the_paper_done_row_by_row(tmp_path, labelled):
    assert labelled["difficulty"][:] == label_slowly(tmp_path, encoded_rows(), 3, (1, 2))
    assert set(labelled["difficulty"]) == {0, 1}


def test_rows_grouped_by_length_keep_their_own_labels(tmp_path):
    settings = {"num_folds": 2, "seeds": (1,), "train_sampling_strategy": "group_by_length"}
    labelled = label(tmp_path / "labels", **settings)
    assert labelled["difficulty"][:] == label_slowly(tmp_path, encoded_rows(), **settings)
    assert set(labelled["difficulty"]) == {0, 1}


def test_difficulty_is_a_column_that_collates_beside_those_that_were_there(labelled):
    assert labelled.features["difficulty"] == ClassLabel(names=["easy", "hard"])
    assert labelled.remove_columns("difficulty")[:] == encoded_rows()[:]
    batch = DataCollatorWithPadding(tiny_tokenizer())([labelled[row] for row in range(3)])
    assert batch["difficulty"].tolist() == labelled["difficulty"][:3]


def test_easy_rows_are_answered_rightly_under_every_seed(tmp_path, labelled):
    alone = [np.array(label(tmp_path, seeds=(seed,))["difficulty"]) for seed in (1, 2)]
    assert (alone[0] != alone[1]).any()
    assert labelled["difficulty"][:] == (alone[0] | alone[1]).tolist()


def test_each_training_leaves_a_small_file_and_nothing_else(tmp_path, capsys, labelled, trainings):
    evaluating = {"eval_strategy": "epoch", "eval_on_start": True}
    evaluating |= {"prediction_loss_only": True, "eval_do_concat_batches": False}
    saving = {"save_strategy": "epoch", "load_best_model_at_end": True, "push_to_hub": True}
    assert label(tmp_path, **evaluating, **saving)["difficulty"][:] == labelled["difficulty"][:]
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    names = [f"seed_{seed}/fold_{fold}_of_3.json" for seed in (1, 2) for fold in (1, 2, 3)]
    assert files == [*names, "settings.json"]
    contents = [json.loads((tmp_path / name).read_text()) for name in names]
    wrong = {row for content in contents for row in content["wrong"]}
    assert wrong == {row for row, hard in enumerate(labelled["difficulty"]) if hard}
    for content, fold in zip(contents, 2 * split_into_folds(20, 3), strict=True):
        assert content["rows"] == len(fold)
        assert set(content["wrong"]) <= set(fold.tolist())
    assert trainings == [(seed, rows) for seed in (1, 2) for rows in (13, 13, 14)]
    printed = capsys.readouterr()
    assert printed.out == "" and "Labelling" not in printed.err


def test_progress_counts_the_trainings(tmp_path, capsys):
    label(tmp_path, seeds=(1,), disable_tqdm=False)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.replace("\r", "\n").splitlines() if line.strip()]
    assert "3/3" in lines[-1]
    # The trainings show nothing of their own.
    assert all(line.startswith("Labelling difficulty") for line in lines) and printed.out == ""


@pytest.mark.parametrize("finished", [0, 4])
def test_an_interrupted_labelling_goes_on(tmp_path, finished, monkeypatch, labelled, trainings):
    counted = Trainer.train

    def stop(self, *args, **kwargs):
        if len(trainings) == finished:
            raise KeyboardInterrupt
        return counted(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            label(tmp_path)
    assert len(list(tmp_path.rglob("fold_*.json"))) == finished
    assert label(tmp_path)["difficulty"][:] == labelled["difficulty"][:]
    assert len(trainings) == 6


def test_nothing_is_repeated_and_seeds_can_be_added(tmp_path, trainings):
    first = label(tmp_path)
    assert len(trainings) == 6
    # What leaves no trace in the answers may change.
    saving = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    second = label(tmp_path, per_device_eval_batch_size=7, logging_steps=2, **saving)
    assert len(trainings) == 6
    assert second["difficulty"][:] == first["difficulty"][:]
    label(tmp_path, seeds=(2, 3))
    assert [seed for seed, _ in trainings[6:]] == [3, 3, 3]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_folds": 2}, "num_folds was 3 and is 2"),
        ({"rows": encoded_rows(seed=1)}, "data was '.*' and is '.*'"),
        ({"learning_rate": 0.5}, "learning_rate was 0.001 and is 0.5"),
        ({"weight_decay": 0.1}, "weight_decay was None and is 0.1"),
        ({"model_init": lambda: tiny_model(num_labels=2, seed=1)}, "model was '.*' and is '.*'"),
    ],
)
def test_a_folder_of_other_settings_is_refused(tmp_path, changed, message, trainings):
    label(tmp_path, seeds=(1,))
    with pytest.raises(ValueError, match=rf"other settings \({message}\): give another output_dir"):
        label(tmp_path, seeds=(1,), **changed)
    assert len(trainings) == 3


def test_a_folder_without_finished_trainings_takes_other_settings(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            label(tmp_path, learning_rate=0.5)
    assert len(label(tmp_path, seeds=(1,))) == 20


@pytest.mark.parametrize(("num_rows", "num_folds"), [(20, 2), (20, 3), (20, 8), (20, 20), (1000, 8)])
def test_folds_partition_the_rows(num_rows, num_folds):
    folds, again = (split_into_folds(num_rows, num_folds) for _ in range(2))
    assert len(folds) == num_folds
    assert sorted(np.concatenate(folds).tolist()) == list(range(num_rows))
    sizes = [len(fold) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    assert all(np.array_equal(fold, other) for fold, other in zip(folds, again, strict=True))
    # At random: neighbours do not share a fold.
    if num_rows == 1000:
        together = sum((np.diff(fold) == 1).sum() for fold in folds)
        assert 80 < together < 170


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_folds": 1}, "num_folds must be from 2 to 20, the number of rows, got 1"),
        ({"num_folds": 21}, "num_folds must be from 2 to 20, the number of rows, got 21"),
        ({"seeds": ()}, r"seeds must be one or more different numbers, got \[\]"),
        ({"seeds": (1, 2, 1)}, r"seeds must be one or more different numbers, got \[1, 2, 1\]"),
        ({"rows": encoded_rows().select([])}, "the dataset has no rows"),
        (
            {"rows": encoded_rows().rename_column("labels", "label")},
            "no column 'labels', only .*Example: dataset",
        ),
        ({"rows": encoded_rows().remove_columns("input_ids")}, "no column 'input_ids', only .*Example: dataset"),
        ({"rows": encoded_rows().add_column("difficulty", [0] * 20)}, r"already.*remove_columns\('difficulty'\)"),
        (
            {"rows": encoded_rows().remove_columns("labels").add_column("labels", [0.5] * 20)},
            "labels must be the ids of classes, numbers such as 0 and 1, got float",
        ),
    ],
)
def test_what_cannot_be_labelled_is_refused_before_any_training(tmp_path, arguments, message, trainings):
    with pytest.raises(ValueError, match=message):
        label(tmp_path, **arguments)
    assert not trainings and not list(tmp_path.iterdir())


def test_hard_shares_of_each_label_and_of_all():
    rows = Dataset.from_dict({"labels": [0, 0, 2, 2, 2, 2], "difficulty": [0, 1, 1, 0, 0, 0]})
    assert hard_shares(rows) == {"0": 0.5, "2": 0.25, "all": pytest.approx(1 / 3)}
    assert hard_shares(rows.with_format("torch"), ["no", "so", "yes"]) == hard_shares(rows, ("no", "so", "yes"))
    assert list(hard_shares(rows, ["no", "so", "yes"])) == ["no", "yes", "all"]


@pytest.mark.parametrize("missing", ["labels", "difficulty", "rows"])
def test_hard_shares_need_labelled_rows(missing):
    rows = Dataset.from_dict({"labels": [0, 1], "difficulty": [0, 1]})
    rows = rows.select([]) if missing == "rows" else rows.remove_columns(missing)
    with pytest.raises(ValueError, match=r"need rows with 'labels' and 'difficulty', got [02] rows with"):
        hard_shares(rows)


def test_labelled_rows_train_the_trainer(tmp_path, labelled):
    trainer = trainer_for(tmp_path, small_model(), labelled, others={"processing_class": tiny_tokenizer()})
    trainer.train()
    assert all(entry["difficulty_loss"] >= 0 for entry in trainer.state.log_history if "loss" in entry)
