"""`ExitTrainer` takes texts, or tokens of any length, without a collator."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import DataCollatorWithPadding, TrainingArguments

from fastbert_hf import SelfDistillationArguments, SelfDistillationTrainer
from fastbert_hf.rows import PaddingCollator
from fastbert_hf.training import (
    DifficultyAwareArguments,
    DifficultyAwareTrainer,
    ExitTrainer,
    ExitTrainingArguments,
    label_difficulty,
)

from ..common import (
    assert_same_weights,
    changed_parameters,
    copied_state,
    tiny_model,
    tiny_texts,
    tiny_tokenizer,
    training_settings,
)


TEXTS = tiny_texts(24)


def encoded(texts=TEXTS) -> list[dict]:
    return [dict(tiny_tokenizer()(text)) for text in texts]


def trained(tmp_path, rows, objective="self_distillation", model=None, **kwargs) -> ExitTrainer:
    args = ExitTrainingArguments(**training_settings(tmp_path, objective=objective, max_steps=2))
    trainer = ExitTrainer(model or tiny_model(), args, train_dataset=rows, **kwargs)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A model that was trained with the stock collator."""
    collator = DataCollatorWithPadding(tiny_tokenizer())
    return trained(tmp_path_factory.mktemp("stock"), encoded(), data_collator=collator).model


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_tokens_of_any_length_need_no_tokenizer(tmp_path, expected, kind, remove_unused_columns):
    rows = kind([{"text": text, **row} for text, row in zip(TEXTS, encoded(), strict=True)])
    settings = training_settings(tmp_path, max_steps=2, remove_unused_columns=remove_unused_columns)
    trainer = SelfDistillationTrainer(tiny_model(), SelfDistillationArguments(**settings), train_dataset=rows)
    trainer.train()
    assert_same_weights(trainer.model, expected)


@pytest.mark.parametrize(
    "rows",
    [
        TEXTS,
        [{"text": text, "number": 1} for text in TEXTS],
        Dataset.from_dict({"number": [1] * len(TEXTS), "text": TEXTS}),
        tiny_tokenizer()(TEXTS),
    ],
    ids=["strings", "dicts", "dataset", "tokenizer output"],
)
def test_texts_are_tokenized(tmp_path, expected, rows):
    trainer = trained(tmp_path, rows, processing_class=tiny_tokenizer())
    assert_same_weights(trainer.model, expected)


def test_a_stream_of_texts_is_tokenized(tmp_path):
    stream = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    trainer = trained(tmp_path, stream, processing_class=tiny_tokenizer())
    assert list(trainer.train_dataset) == encoded()
    assert changed_parameters(trainer.model, tiny_model().state_dict())


def test_texts_are_evaluated_and_predicted_wherever_they_are_given(tmp_path):
    tokenizer, args = tiny_tokenizer(), ExitTrainingArguments(**training_settings(tmp_path))
    of_tokens = ExitTrainer(tiny_model(), args, eval_dataset=encoded(TEXTS[:9]))
    of_texts = ExitTrainer(
        tiny_model(), args, eval_dataset={"a": TEXTS[:9], "b": TEXTS[9:]}, processing_class=tokenizer
    )
    wanted = of_tokens.evaluate()
    for metrics in (of_texts.evaluate(TEXTS[:9]), of_texts.evaluate({"": TEXTS[:9]})):
        found = [value for name, value in metrics.items() if name.endswith("mean_exit_layer_speed_0.5")]
        assert found == [wanted["eval_mean_exit_layer_speed_0.5"]]
    both = of_texts.evaluate()
    assert both["eval_a_loss"] == pytest.approx(wanted["eval_loss"])
    assert both["eval_b_loss"] != pytest.approx(wanted["eval_loss"])
    predictions = [trainer.predict(rows).predictions for trainer, rows in ((of_texts, TEXTS), (of_tokens, encoded()))]
    assert (predictions[0] == predictions[1]).all()


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_labels_may_be_names(tmp_path, kind):
    names = ["LABEL_0", "LABEL_2", "LABEL_1"] * 8
    of_names = kind([{"text": text, "label": name} for text, name in zip(TEXTS, names, strict=True)])
    of_ids = [{**row, "labels": int(name[-1])} for row, name in zip(encoded(), names, strict=True)]
    models = [
        trained(
            tmp_path, rows, "joint_cross_entropy", tiny_model().requires_grad_(True), processing_class=tokenizer
        ).model
        for rows, tokenizer in ((of_names, tiny_tokenizer()), (of_ids, None))
    ]
    assert_same_weights(*models)


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_rows_with_difficulty_may_be_texts(tmp_path, kind):
    labels = [{"labels": row % 3, "difficulty": row % 2} for row in range(len(TEXTS))]
    args = DifficultyAwareArguments(**training_settings(tmp_path, max_steps=2))
    models = []
    for rows, tokenizer in ((encoded(), None), ([{"text": text} for text in TEXTS], tiny_tokenizer())):
        rows = kind([{**row, **label} for row, label in zip(rows, labels, strict=True)])
        trainer = DifficultyAwareTrainer(tiny_model(), args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        models.append(trainer.model)
        assert sum(log.get("difficulty_loss", 0) for log in trainer.state.log_history) > 0
    assert_same_weights(*models)


def test_difficulty_is_labelled_without_a_tokenizer(tmp_path):
    rows = Dataset.from_list([{**row, "labels": number % 3} for number, row in enumerate(encoded()[:8])])
    folders = [TrainingArguments(**training_settings(tmp_path / name, max_steps=1)) for name in ("a", "b")]
    labelled = [
        label_difficulty(tiny_model, args, rows, 2, [1], processing_class=tokenizer)["difficulty"][:]
        for args, tokenizer in zip(folders, (None, tiny_tokenizer()), strict=True)
    ]
    assert labelled[0] == labelled[1]


def test_texts_are_cut_to_what_the_model_reads(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    trainer = trained(tmp_path, ["word5 " * 100] * 8, processing_class=tokenizer)
    assert len(trainer.train_dataset[0]["input_ids"]) == 64


def test_all_splits_together_are_refused(tmp_path):
    splits = DatasetDict(train=Dataset.from_list(encoded()), test=Dataset.from_list(encoded()))
    with pytest.raises(TypeError, match=r"got DatasetDict of 'train', 'test'.*splits\[\"train\"\]"):
        trained(tmp_path, splits)
    trainer = trained(tmp_path, splits["train"], eval_dataset=splits)
    assert {"eval_train_loss", "eval_test_loss"} <= trainer.evaluate().keys()


def test_texts_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a trainer takes it as processing_class=tokenizer"):
        trained(tmp_path, TEXTS)


def test_rows_and_collators_of_the_caller_are_used_as_they_are(tmp_path):
    seen = []

    def collate(rows):
        seen.extend(rows)
        return PaddingCollator()(rows)

    rows = encoded()
    trainer = trained(tmp_path, rows, data_collator=collate)
    assert trainer.train_dataset is rows and trainer.data_collator is collate
    assert seen and all(row in rows for row in seen)


def test_a_training_as_the_readme_shows_it_warns_of_nothing(tmp_path):
    model, before = tiny_model(), copied_state(tiny_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = SelfDistillationArguments(str(tmp_path), max_steps=1, disable_tqdm=True, save_strategy="no")
        SelfDistillationTrainer(model, args, train_dataset=encoded()).train()
    assert changed_parameters(model, before)
    assert args.dataloader_pin_memory == torch.accelerator.is_available()
